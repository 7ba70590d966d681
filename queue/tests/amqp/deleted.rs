//! An administrator deletes what the daemon has declared.

use std::{
    collections::HashSet,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use countersign_queue::{Amqp, Queue as _};
use futures::future::{join, join_all};
use integration_tests::process::eventually;
use jiff::Timestamp;
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

use crate::{LIMIT, broker::Broker, message};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deleted_queue_is_declared_again_and_the_past_has_what_was_pushed_meanwhile() {
    let vhost = Broker::shared().await.vhost().await;
    let queue = Amqp::open(vhost.options("replica"), &TaskTracker::new()).await.unwrap();
    queue.probe().await.unwrap();
    for n in 0..3 {
        let path = format!("/api/queues/{}/countersign.v1.events.3.{n}", vhost.name);
        vhost.broker.rabbitmq.manage("DELETE", &path, None).await.unwrap();
    }
    // What is pushed before the broker has told us is lost with the queue.
    let pushed = AtomicUsize::new(0);
    eventually("a message is delivered", LIMIT, async || {
        if queue.push(vec![message("1", 1)]).await.is_ok() {
            pushed.fetch_add(1, Ordering::Relaxed);
        }
        Ok(timeout(Duration::from_millis(200), queue.pull()).await.ok())
    })
    .await
    .unwrap()
    .unwrap();
    eventually("the past has them all", LIMIT, async || {
        let past = queue.history(Timestamp::UNIX_EPOCH, Timestamp::MAX, None, 1000).await?;
        Ok((past.len() >= pushed.load(Ordering::Relaxed) && !past.is_empty()).then_some(()))
    })
    .await
    .unwrap();
}

/// The broker sends it back, and confirms it; what is confirmed next to it is another's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_no_queue_takes_is_never_taken_for_kept_whatever_else_is_pushed() {
    let vhost = Broker::shared().await.vhost().await;
    let queue = Amqp::open(vhost.options("replica"), &TaskTracker::new()).await.unwrap();
    let (mut kept, refused) = (HashSet::new(), AtomicUsize::new(0));
    for round in 0..3 {
        eventually("it is connected", LIMIT, async || Ok(queue.probe().await.ok())).await.unwrap();
        let is_over = AtomicBool::new(false);
        let pushing = (0..64).map(async |pusher| {
            let mut kept = Vec::new();
            for n in (pusher..).step_by(64).take_while(|_| !is_over.load(Ordering::Relaxed)) {
                let id = format!("{round} {n}");
                if queue.push(vec![message(&id, n)]).await.is_ok() {
                    kept.push(id);
                } else {
                    refused.fetch_add(1, Ordering::Relaxed);
                    tokio::task::yield_now().await;
                }
            }
            kept
        });
        let unbinding = async {
            for to in ["history", "events.3.0"] {
                let path = format!("/api/bindings/{}/e/countersign.v1.accept/q/countersign.v1.{to}/3.0", vhost.name);
                vhost.broker.rabbitmq.manage("DELETE", &path, None).await.unwrap();
            }
            eventually("it is sent back", LIMIT, async || Ok((refused.load(Ordering::Relaxed) > 0).then_some(()))).await.unwrap();
            is_over.store(true, Ordering::Relaxed);
        };
        kept.extend(join(join_all(pushing), unbinding).await.0.into_iter().flatten());
        assert!(refused.swap(0, Ordering::Relaxed) > 0);
    }
    let begun = Instant::now();
    while !kept.is_empty() {
        let Ok(delivery) = timeout(LIMIT, queue.pull()).await else { break };
        let delivery = delivery.unwrap().expect("the queue is open");
        kept.remove(&delivery.message().id);
        delivery.ack().await.unwrap();
        assert!(begun.elapsed() < 3 * LIMIT);
    }
    assert!(kept.is_empty(), "{} that were taken never come: {kept:?}", kept.len());
}
