//! How a connection is kept up, how its end is noticed, and how soon the next one is tried.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use countersign_queue::{
    Amqp, Burial, Queue as _,
    amqp::{Access, Feed, Options},
};
use integration_tests::{process::eventually, proxy::Proxy};
use tokio::{net::TcpListener, time::timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    LIMIT,
    broker::{Broker, options},
    message, next, push_until_taken,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heartbeats_keep_an_idle_connection_up_and_tell_of_a_silent_one() {
    let vhost = Broker::shared().await.vhost().await;
    let proxy = Proxy::start(&vhost.broker.rabbitmq.host()).await.unwrap();
    let hold = async |name: &str, host: String| {
        // Another prefix is another queue.
        let url = format!("{}?heartbeat=6", vhost.url().replace(&vhost.broker.rabbitmq.host(), &host));
        let options = Options { prefix: name.to_owned(), ..options(name, move || vec![url.clone()]) };
        let queue = Amqp::open(options, &TaskTracker::new()).await.unwrap();
        push_until_taken(&queue, message(name, 1)).await;
        let held = next(&queue).await;
        (queue, held)
    };
    let ((_queue, idle), (_other, cut_off)) =
        tokio::join!(hold("idle", vhost.broker.rabbitmq.host()), hold("cut-off", proxy.host()));
    // The broker ends a connection on which it has heard nothing for 12 to 18 seconds, and we say nothing else on that of our
    // consumers.
    let idle = timeout(Duration::from_secs(19), idle.lost().cancelled());
    proxy.silence(true);
    let began = Instant::now();
    let noticed = async {
        timeout(LIMIT, cut_off.lost().cancelled()).await.expect("it is lost");
        began.elapsed()
    };
    let (idle, noticed) = tokio::join!(idle, noticed);
    idle.expect_err("it is idle, not lost");
    // Before the broker may give it to others, at the earliest 1.5 times the heartbeat after the last it heard, as a rule 2 to
    // 3 times. lapin notices after twice the heartbeat; and what we ask in the background goes unanswered for 10 s.
    assert!(noticed < Duration::from_millis(9800), "{noticed:?}");
}

/// Lets in and throws out at once, six times: how long that takes.
async fn thrown_out_six_times(listener: TcpListener) -> Duration {
    let began = Instant::now();
    for _ in 0..6 {
        drop(timeout(LIMIT, listener.accept()).await.expect("it is tried again").unwrap());
    }
    began.elapsed()
}

async fn listen() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("amqp://guest:guest@{}", listener.local_addr().unwrap());
    (listener, url)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn broker_that_throws_everybody_out_is_tried_less_and_less_often() {
    let (tracker, stop) = (TaskTracker::new(), CancellationToken::new());
    let ((for_queue, queue), (for_feed, feed)) = (listen().await, listen().await);
    let feed = Feed {
        access: Arc::new(move || Ok(Access { urls: vec![feed.clone().into()], ..Access::default() })),
        queue: "events".to_owned(),
        exchange: None,
        window: 1,
        name: "feed".to_owned(),
    };
    let feeding = tracker.spawn(feed.run(Arc::new(|_| Box::pin(async { true })), tracker.clone(), stop.clone()));
    let opening = Amqp::open(options("replica", move || vec![queue.clone()]), &tracker);
    let (queue, by_queue, by_feed) = tokio::join!(opening, thrown_out_six_times(for_queue), thrown_out_six_times(for_feed));
    // Half of 200, 400, 800, 1600 and 3200 ms at least.
    for took in [by_queue, by_feed] {
        assert!(took >= Duration::from_millis(3100), "{took:?}");
    }
    drop(queue);
    stop.cancel();
    timeout(LIMIT, feeding).await.expect("it ends").unwrap();
}

/// What is left of a listing is tidied up in the background, which a broker that has just gone silent does not answer either.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn broker_that_falls_silent_after_a_listing_is_connected_to_again() {
    let vhost = Broker::shared().await.vhost().await;
    let proxy = Proxy::start(&vhost.broker.rabbitmq.host()).await.unwrap();
    let through = vhost.url().replace(&vhost.broker.rabbitmq.host(), &proxy.host());
    let queue = Amqp::open(options("replica", move || vec![through.clone()]), &TaskTracker::new()).await.unwrap();
    for n in 0..3 {
        push_until_taken(&queue, message(&n.to_string(), n)).await;
        let burial = Burial { kind: "denied".to_owned(), reason: "no".to_owned() };
        next(&queue).await.bury(burial).await.unwrap();
    }
    for round in 0..3 {
        let listed = eventually("some are listed", LIMIT, async || Ok(queue.dead_letters(None, 1).await.ok()));
        assert_eq!(listed.await.unwrap().len(), 1);
        proxy.silence(true);
        let down = async || Ok(queue.push(vec![message("refused", 9)]).await.err());
        eventually("it is noticed", LIMIT, down).await.unwrap();
        proxy.silence(false);
        push_until_taken(&queue, message(&format!("after {round}"), 4)).await;
    }
}
