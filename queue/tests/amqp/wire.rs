//! What the broker itself says of what we send it, and of how we take it.

use std::time::{Duration, Instant};

use countersign_queue::{Amqp, Burial, Queue as _, Retry, amqp::Options};
use integration_tests::{process::eventually, proxy::Proxy};
use serde_json::{Value, json};
use tokio_util::task::TaskTracker;

use crate::{
    LIMIT,
    broker::{Broker, Vhost},
    message, next, push_until_taken, unavailable,
};

/// The first message of a queue, as it lies there.
async fn peek(vhost: &Vhost, queue: &str) -> Value {
    let path = format!("/api/queues/{}/{queue}/get", vhost.name);
    let how = json!({ "count": 1, "ackmode": "ack_requeue_true", "encoding": "auto" });
    vhost.broker.rabbitmq.manage("POST", &path, Some(&how)).await.unwrap()[0].clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_are_persistent_and_a_dead_letter_says_when_why_by_whom_and_how_often() {
    let vhost = Broker::shared().await.vhost().await;
    let tracker = TaskTracker::new();
    let pushes = Amqp::open(Options { consume: false, ..vhost.options("pushes") }, &tracker).await.unwrap();
    pushes.push((0..30).map(|n| message(&n.to_string(), n)).collect()).await.unwrap();
    // A queue with a single active consumer shows nothing: one beside it does.
    let (manage, name) = (&vhost.broker.rabbitmq, &vhost.name);
    manage.manage("PUT", &format!("/api/queues/{name}/tap"), Some(&json!({ "durable": true }))).await.unwrap();
    for partition in 0..3 {
        let path = format!("/api/bindings/{name}/e/countersign.v1.accept/q/tap");
        manage.manage("POST", &path, Some(&json!({ "routing_key": format!("3.{partition}") }))).await.unwrap();
    }
    pushes.push(vec![message("tapped", 1)]).await.unwrap();
    let lies = peek(&vhost, "tap").await;
    assert_eq!(
        (&lies["properties"]["delivery_mode"], &lies["properties"]["message_id"]),
        (&json!(2), &json!("tapped")),
        "{lies}"
    );

    let handles = Amqp::open(vhost.options("handles"), &tracker).await.unwrap();
    let delivery = next(&handles).await;
    let retried = delivery.message().id.clone();
    delivery.retry(Retry { after: Duration::from_millis(1), counted: true, reason: "busy".to_owned() }).await.unwrap();
    let delivery = loop {
        let delivery = next(&handles).await;
        if delivery.message().id == retried {
            break delivery;
        }
        delivery.ack().await.unwrap();
    };
    let body = String::from_utf8(delivery.message().body.to_vec()).unwrap();
    delivery.bury(Burial { kind: "denied".to_owned(), reason: "the key says no".to_owned() }).await.unwrap();
    let dead = peek(&vhost, "countersign.v1.dead").await;
    assert_eq!((&dead["payload"], &dead["properties"]["delivery_mode"]), (&json!(body), &json!(2)), "{dead}");
    let headers = &dead["properties"]["headers"];
    assert_eq!((&headers["buried-by"], &headers["kind"]), (&json!("handles"), &json!("denied")), "{headers}");
    assert_eq!((&headers["reason"], &headers["attempts"]), (&json!("the key says no"), &json!(1)), "{headers}");
    assert!(headers["buried-at"].as_i64() >= headers["pushed-at"].as_i64() && headers["pushed-at"].is_i64(), "{headers}");
}

/// What waits longer than a delay queue holds anything has the rest written on it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wait_of_an_hour_goes_on_where_a_delay_queue_ends_it() {
    const LEFT: Duration = Duration::from_secs(2);
    let vhost = Broker::shared().await.vhost().await;
    let queue = Amqp::open(vhost.options("replica"), &TaskTracker::new()).await.unwrap();
    queue.push(vec![message("1", 1)]).await.unwrap();
    let hour = Duration::from_secs(3600);
    next(&queue).await.retry(Retry { after: hour, counted: true, reason: "busy".to_owned() }).await.unwrap();
    let mut waits = peek(&vhost, "countersign.v1.delay.1048576").await;
    let properties = &mut waits["properties"];
    assert_eq!((&properties["expiration"], &properties["headers"]["left"]), (&json!("1048576"), &json!(3_600_002 - 1_048_576)));

    // As it comes out of its last delay queue but one.
    properties["headers"]["left"] = json!(LEFT.as_millis());
    properties.as_object_mut().unwrap().remove("expiration");
    waits["payload_encoding"] = json!("string");
    let began = Instant::now();
    let path = format!("/api/exchanges/{}/countersign.v1.again/publish", vhost.name);
    let published = vhost.broker.rabbitmq.manage("POST", &path, Some(&waits)).await.unwrap();
    assert_eq!(published["routed"], true);
    let delivery = next(&queue).await;
    assert!(began.elapsed() >= LEFT, "{:?}", began.elapsed());
    assert_eq!((delivery.message(), delivery.attempts(), delivery.waited()), (&message("1", 1), 1, hour));
    delivery.ack().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_more_is_in_hand_than_was_asked_for() {
    const WINDOW: u16 = 8;
    let vhost = Broker::shared().await.vhost().await;
    let tracker = TaskTracker::new();
    let queue = Amqp::open(Options { window: WINDOW, ..vhost.options("replica") }, &tracker).await.unwrap();
    queue.push((0..300).map(|n| message(&n.to_string(), n)).collect()).await.unwrap();
    let held = next(&queue).await;
    let consumers = eventually("it consumes", LIMIT, async || {
        let all = vhost.broker.rabbitmq.manage("GET", &format!("/api/consumers/{}", vhost.name), None).await?;
        let of_events =
            |one: &&Value| one["queue"]["name"].as_str().is_some_and(|name| name.starts_with("countersign.v1.events."));
        let found: Vec<Value> = all.as_array().unwrap().iter().filter(of_events).cloned().collect();
        Ok((found.len() == 3).then_some(found))
    });
    for consumer in consumers.await.unwrap() {
        let most = consumer["prefetch_count"].as_u64().unwrap();
        assert!((1..=WINDOW.into()).contains(&most) && consumer["ack_required"] == true, "{consumer}");
    }
    held.ack().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_broker_is_waited_for() {
    let vhost = Broker::shared().await.vhost().await;
    let proxy = Proxy::start(&vhost.broker.rabbitmq.host()).await.unwrap();
    // All that is declared at the beginning takes more than 20 s so, one answer after the other.
    proxy.delay(Duration::from_millis(150));
    let url = vhost.url().replace(&vhost.broker.rabbitmq.host(), &proxy.host());
    let queue = Amqp::open(crate::broker::options("far", move || vec![url.clone()]), &TaskTracker::new()).await.unwrap();
    unavailable(queue.push(vec![message("too early", 1)]).await);
    for n in 0..3 {
        push_until_taken(&queue, message(&n.to_string(), n)).await;
        let delivery = next(&queue).await;
        assert_eq!(delivery.message().id, n.to_string());
        delivery.ack().await.unwrap();
    }
    eventually("all is settled", LIMIT, async || {
        let stats = queue.stats().await.ok();
        Ok(stats.filter(|stats| stats.queued() == 0 && stats.pushed_total == 3))
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn channel_that_the_broker_closes_is_opened_again() {
    let vhost = Broker::shared().await.vhost().await;
    let queue = Amqp::open(vhost.options("replica"), &TaskTracker::new()).await.unwrap();
    queue.stats().await.unwrap();
    // What is asked of a queue that is not there, the broker answers by closing the channel.
    let path = format!("/api/queues/{}/countersign.v1.dead", vhost.name);
    vhost.broker.rabbitmq.manage("DELETE", &path, None).await.unwrap();
    let stats = eventually("it knows of the dead letters again", LIMIT, async || Ok(queue.stats().await.ok())).await.unwrap();
    assert_eq!(stats.dead, 0);
    push_until_taken(&queue, message("1", 1)).await;
    eventually("it is a dead letter", LIMIT, async || {
        // What could not be buried comes again.
        if let Ok(delivery) = tokio::time::timeout(Duration::from_secs(1), queue.pull()).await {
            let burial = Burial { kind: "denied".to_owned(), reason: "no".to_owned() };
            let _ = delivery?.expect("the queue is open").bury(burial).await;
        }
        Ok(queue.stats().await.ok().filter(|stats| stats.dead == 1))
    })
    .await
    .unwrap();
}
