//! What is pushed is delivered, until it is settled.

use std::{collections::HashSet, sync::Arc, time::Duration};

use bytes::Bytes;
use countersign_queue::{Delivery, Message, PartitionKey};
use tokio::{sync::Barrier, task::JoinSet, time::timeout};

use super::{Backend, assert_empty, drain, fast_random, ids, message, next, soon};

pub async fn message_is_delivered_as_it_was_pushed(backend: impl Backend) {
    let queue = backend.queue();
    let pushed = Message {
        id: "0190-ä".into(),
        content_type: "application/cloudevents+json; charset=utf-8".into(),
        key: PartitionKey("sha256:00ff".into()),
        body: Bytes::from_static(b"\x00\xff{\"n\":1}\r\n"),
        replay_of: None,
    };
    queue.push(vec![pushed.clone()]).await.unwrap();
    let delivery = next(&*queue).await;
    assert_eq!(delivery.message(), &pushed);
    assert_eq!((delivery.attempts(), delivery.waited()), (0, Duration::ZERO));
    assert_eq!(queue.stats().await.unwrap().oldest, Some(delivery.pushed_at()));
}

pub async fn any_body_is_taken(backend: impl Backend) {
    let queue = backend.queue();
    for (n, size) in [0, 1, 4096, 100_000, 3_000_000].into_iter().enumerate() {
        let mut pushed = message(n);
        pushed.body = (0..=250).cycle().take(size).collect();
        queue.push(vec![pushed.clone()]).await.unwrap();
        let delivery = next(&*queue).await;
        assert!(delivery.message() == &pushed, "{size} bytes");
        delivery.ack().await.unwrap();
    }
}

pub async fn acked_message_is_gone_for_good(mut backend: impl Backend) {
    let queue = backend.queue();
    queue.push(vec![message(1)]).await.unwrap();
    next(&*queue).await.ack().await.unwrap();
    assert_empty(&*queue).await;
    drop(queue);
    assert_empty(&*backend.restart().await).await;
}

pub async fn pushed_message_survives_a_restart(mut backend: impl Backend) {
    backend.queue().push((0..10).map(message).collect()).await.unwrap();
    let queue = backend.restart().await;
    assert_eq!(drain(&*queue).await, ids(0..10));
}

pub async fn unsettled_message_is_delivered_again_after_a_restart(mut backend: impl Backend) {
    let queue = backend.queue();
    queue.push(vec![message(1), message(2)]).await.unwrap();
    let held = [next(&*queue).await, next(&*queue).await];
    queue.close().await;
    drop((held, queue));
    assert_eq!(drain(&*backend.restart().await).await, ids(1..3));
}

pub async fn dropped_delivery_goes_back_at_once(backend: impl Backend) {
    let queue = backend.queue();
    queue.push(vec![message(1)]).await.unwrap();
    for _ in 0..5 {
        let delivery = next(&*queue).await;
        assert_eq!((delivery.message().id.as_str(), delivery.attempts()), ("1", 0));
        drop(delivery);
    }
    next(&*queue).await.ack().await.unwrap();
    assert_empty(&*queue).await;
}

pub async fn delivery_lost_in_a_panic_goes_back(backend: impl Backend) {
    let queue = backend.queue();
    queue.push(vec![message(1)]).await.unwrap();
    let delivery = next(&*queue).await;
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let _held = delivery;
        std::panic::resume_unwind(Box::new("lost"));
    });
    assert!(tasks.join_next().await.unwrap().unwrap_err().is_panic());
    next(&*queue).await.ack().await.unwrap();
}

pub async fn pull_waits_for_a_push(backend: impl Backend) {
    let queue = backend.queue();
    let mut pull = queue.pull();
    assert!(timeout(Duration::from_millis(50), &mut pull).await.is_err(), "there is nothing yet");
    queue.push(vec![message(1)]).await.unwrap();
    assert_eq!(soon(pull).await.unwrap().unwrap().message().id, "1");
}

pub async fn each_of_many_pullers_gets_its_own_message(backend: impl Backend) {
    let queue = backend.queue();
    let mut pullers = JoinSet::new();
    for _ in 0..50 {
        let queue = Arc::clone(&queue);
        pullers.spawn(async move { next(&*queue).await });
    }
    queue.push((0..50).map(message).collect()).await.unwrap();
    let got: Vec<Delivery> = pullers.join_all().await;
    assert_eq!(got.iter().map(|delivery| delivery.message().id.clone()).collect::<HashSet<_>>(), ids(0..50));
    assert_eq!(queue.stats().await.unwrap().in_flight, 50);
}

pub async fn cancelled_pulls_lose_nothing(backend: impl Backend) {
    let queue = backend.queue();
    let canceller = {
        let queue = Arc::clone(&queue);
        async move {
            let mut got = HashSet::new();
            while got.len() < 100 {
                // Given up at any moment, also at the one at which a message arrives.
                if let Ok(delivery) = timeout(Duration::from_micros(fast_random() % 800), queue.pull()).await {
                    let delivery = delivery.unwrap().unwrap();
                    got.insert(delivery.message().id.clone());
                    delivery.ack().await.unwrap();
                }
            }
            got
        }
    };
    let pusher = async {
        for n in 0..100 {
            queue.push(vec![message(n)]).await.unwrap();
        }
    };
    let (got, ()) = soon(async { tokio::join!(canceller, pusher) }).await;
    assert_eq!(got, ids(0..100));
    assert_empty(&*queue).await;
}

pub async fn concurrent_pushes_are_all_delivered_once(backend: impl Backend) {
    let queue = backend.queue();
    let start = Arc::new(Barrier::new(100));
    let mut pushers = JoinSet::new();
    for n in 0..100 {
        let (queue, start) = (Arc::clone(&queue), Arc::clone(&start));
        pushers.spawn(async move {
            start.wait().await;
            queue.push(vec![message(3 * n), message(3 * n + 1), message(3 * n + 2)]).await.unwrap();
        });
    }
    pushers.join_all().await;
    assert_eq!(queue.stats().await.unwrap().ready, 300);
    let mut got = HashSet::new();
    for _ in 0..300 {
        let delivery = next(&*queue).await;
        assert!(got.insert(delivery.message().id.clone()), "delivered twice");
        delivery.ack().await.unwrap();
    }
    assert_eq!(got, ids(0..300));
}

pub async fn empty_push_is_no_push(backend: impl Backend) {
    let queue = backend.queue();
    queue.push(vec![]).await.unwrap();
    assert_empty(&*queue).await;
    assert_eq!(queue.stats().await.unwrap().pushed_total, 0);
}
