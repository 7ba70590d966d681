//! Events that others publish on a broker, beside a queue of our own on disk.

use std::time::Duration;

use anyhow::{Result, ensure};
use integration_tests::house::{House, Plan, TOKEN};
use integration_tests::image::Image;
use integration_tests::process::eventually;
use integration_tests::rabbitmq::RabbitMq;
use integration_tests::registry::{Notify, Options};
use serde_json::{Map, Value, json};

const LIMIT: Duration = Duration::from_secs(60);

/// A registry that tells nobody, and two queues that events come in by: one that is bound to an exchange, one that is there.
async fn house(broker: &RabbitMq) -> Result<House> {
    house_with(broker, String::new(), vec![]).await
}

/// The same, with further lines of `[queue]`.
async fn house_with(broker: &RabbitMq, queue: String, more: Vec<(&'static str, String)>) -> Result<House> {
    broker.manage("PUT", "/api/queues/%2F/ci-events", Some(&json!({ "durable": true }))).await?;
    let registry = Options { notify: Some(Notify::nobody()), ..Options::default() };
    let environment = [vec![("EVENTS_URL", broker.url())], more].concat();
    let mut house = House::build(Plan { registry, environment, queue, ..Plan::default() }).await?;
    let host = house.registry.host();
    let sources = format!(
        "\n[[source]]\nname = \"relayed\"\nkind = \"distribution\"\nregistry = \"{host}\"\n\
         queue = {{ name = \"registry-events\", url = {{ env = \"EVENTS_URL\" }}, exchange = \"amq.topic\", routing_key = \"push.#\" }}\n\
         \n[[source]]\nname = \"ci\"\nkind = \"cloudevents\"\nregistry = \"{host}\"\n\
         queue = {{ name = \"ci-events\", url = {{ env = \"EVENTS_URL\" }} }}\n"
    );
    house.write_config(&(house.config() + &sources))?;
    house.daemon.start().await?;
    Ok(house)
}

async fn publish(broker: &RabbitMq, exchange: &str, key: &str, content_type: &str, payload: &str) -> Result<()> {
    publish_with(broker, exchange, key, json!({ "content_type": content_type, "delivery_mode": 2 }), payload).await
}

async fn publish_with(broker: &RabbitMq, exchange: &str, key: &str, properties: Value, payload: &str) -> Result<()> {
    let message = json!({ "properties": properties, "routing_key": key, "payload": payload, "payload_encoding": "string" });
    // A queue is there a moment before it is bound, and what no queue takes is nowhere.
    eventually("a queue takes it", LIMIT, async || {
        let published = broker.manage("POST", &format!("/api/exchanges/%2F/{exchange}/publish"), Some(&message)).await?;
        Ok((published["routed"] == true).then_some(()))
    })
    .await
}

async fn relay(broker: &RabbitMq, event: &Value) -> Result<()> {
    let content_type = "application/vnd.docker.distribution.events.v2+json";
    publish(broker, "amq.topic", "push.registry", content_type, &event.to_string()).await
}

fn push(repository: &str, tag: &str, digest: &str) -> String {
    let event = json!({
        "specversion": "1.0", "id": format!("ci-{tag}"), "source": "ci", "type": "com.example.image.pushed",
        "data": { "repository": repository, "tag": tag, "digest": digest },
    });
    event.to_string()
}

async fn left(broker: &RabbitMq, queue: &str) -> Result<u64> {
    let queue = broker.manage("GET", &format!("/api/queues/%2F/{queue}"), None).await?;
    Ok(queue["messages"].as_u64().unwrap_or(u64::MAX))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_that_others_publish_are_signed_for_and_poison_blocks_nothing() -> Result<()> {
    let mut broker = RabbitMq::start().await?;
    let mut house = house(&broker).await?;
    let host = house.registry.host();
    let reached = house.run(&["check", "--online"]).await?.expect_code(0)?.stdout;
    for part in ["ok: queue registry-events of source relayed", "ok: queue ci-events of source ci"] {
        ensure!(reached.contains(part), "{part:?} is not in: {reached}");
    }
    let images = (1..=4).map(|number| Image::oci(&format!("fed {number}"))).collect::<Result<Vec<_>>>()?;
    for (number, image) in images.iter().enumerate() {
        house.push(image, "team/app", &[&format!("{}.0", number + 1)]).await?;
    }
    let digest = |number: usize| images[number].manifest.digest.clone();

    relay(&broker, &House::event("elsewhere.example.com", "team/app", Some("1.0"), &digest(0))).await?;
    house.wait_signed("team/app", &digest(0), &["1.0"]).await?;

    publish(&broker, "amq.default", "ci-events", "text/plain", "no event at all").await?;
    publish(&broker, "amq.default", "ci-events", "application/cloudevents+json", &push("team/app", "2.0", &digest(1))).await?;
    house.wait_signed("team/app", &digest(1), &["2.0"]).await?;
    house.wait_settled(3, LIMIT).await?;
    let letters = house.run(&["queue", "dead", "--output", "json"]).await?.expect_code(0)?.json()?;
    let bodies: Vec<_> = letters.as_array().into_iter().flatten().filter_map(|letter| letter["body"].as_str()).collect();
    assert_eq!(bodies, ["bm8gZXZlbnQgYXQgYWxs"], "{letters}");

    // What is published while nobody listens waits, and a broker that comes back is found again.
    house.daemon.kill()?;
    relay(&broker, &House::event(&host, "team/app", Some("3.0"), &digest(2))).await?;
    house.daemon.start().await?;
    house.wait_signed("team/app", &digest(2), &["3.0"]).await?;
    broker.stop().await?;
    broker.start_again().await?;
    relay(&broker, &House::event(&host, "team/app", Some("4.0"), &digest(3))).await?;
    house.wait_signed("team/app", &digest(3), &["4.0"]).await?;
    for queue in ["registry-events", "ci-events"] {
        eventually("all is acked", LIMIT, async || Ok((left(&broker, queue).await? == 0).then_some(()))).await?;
    }
    // A source without a token is no door.
    let event = House::event(&host, "team/app", Some("4.0"), &digest(3));
    let http = integration_tests::process::http_client()?;
    for token in ["", TOKEN] {
        let url = format!("{}/events/relayed", house.daemon.url());
        assert_eq!(http.post(url).bearer_auth(token).body(event.to_string()).send().await?.status().as_u16(), 401);
    }
    Ok(())
}

#[tokio::test]
async fn cloud_events_whose_attributes_are_headers_are_read_with_either_prefix() -> Result<()> {
    let broker = RabbitMq::start().await?;
    let house = house(&broker).await?;
    let images = (0..2).map(|number| Image::oci(&format!("binary {number}"))).collect::<Result<Vec<_>>>()?;
    for (number, image) in images.iter().enumerate() {
        house.push(image, "team/app", &[&format!("{number}.0")]).await?;
    }
    let publish = async |prefix: &str, kind: &str, number: usize| {
        let attributes = [("specversion", "1.0"), ("id", "1"), ("source", "ci"), ("type", kind)];
        let headers = attributes.map(|(name, value)| (format!("{prefix}{name}"), json!(value)));
        let headers: Map<_, _> = headers.into_iter().collect();
        let data = json!({ "repository": "team/app", "tag": format!("{number}.0"), "digest": images[number].manifest.digest });
        let properties = json!({ "content_type": "application/json", "headers": headers });
        publish_with(&broker, "amq.default", "ci-events", properties, &data.to_string()).await
    };
    // What happened stands in a header: another kind of event is none of ours, and without any it is no event at all.
    publish("cloudEvents:", "com.example.image.pulled", 0).await?;
    publish("elsewhere:", "com.example.image.pushed", 0).await?;
    publish("cloudEvents:", "com.example.image.pushed", 0).await?;
    publish("cloudEvents_", "com.example.image.pushed", 1).await?;
    for (number, image) in images.iter().enumerate() {
        house.wait_signed("team/app", &image.manifest.digest, &[&format!("{number}.0")]).await?;
    }
    let metrics = house.wait_settled(3, LIMIT).await?;
    assert_eq!((metrics.ended("signed"), metrics.ended("dead"), metrics.received()), (2, 1, 3), "{metrics:?}");
    eventually("all is acked", LIMIT, async || Ok((left(&broker, "ci-events").await? == 0).then_some(()))).await
}

#[tokio::test]
async fn a_queue_that_is_not_there_is_said_to_be_and_stops_nothing() -> Result<()> {
    let broker = RabbitMq::start().await?;
    let house = house(&broker).await?;
    broker.manage("DELETE", "/api/queues/%2F/ci-events", None).await?;
    eventually("the log says so", LIMIT, async || {
        let logged = house.daemon.logged();
        Ok((logged.contains("ci-events") && logged.contains("NOT_FOUND")).then_some(()))
    })
    .await?;
    let image = Image::oci("posted")?;
    house.push(&image, "team/app", &["1.0"]).await?;
    let event = House::event(&house.registry.host(), "team/app", Some("1.0"), &image.manifest.digest);
    house.notify(Some(TOKEN), &event).await?;
    house.wait_signed("team/app", &image.manifest.digest, &["1.0"]).await?;
    // And it is consumed as soon as it is there again.
    broker.manage("PUT", "/api/queues/%2F/ci-events", Some(&json!({ "durable": true }))).await?;
    let again = Image::oci("again")?;
    house.push(&again, "team/app", &["2.0"]).await?;
    let digest = &again.manifest.digest;
    publish(&broker, "amq.default", "ci-events", "application/cloudevents+json", &push("team/app", "2.0", digest)).await?;
    house.wait_signed("team/app", digest, &["2.0"]).await?;
    assert!(!house.daemon.logged().contains("guest:guest"), "the password is in the log");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_stay_with_the_broker_they_come_from_while_our_own_queue_is_away() -> Result<()> {
    // What a queue has in hand is told every five seconds otherwise.
    let (broker, own) = tokio::join!(RabbitMq::start_with("collect_statistics_interval = 500\n"), RabbitMq::start());
    let (broker, mut own) = (broker?, own?);
    let queue = "backend = \"amqp\"\nurl = { env = \"AMQP_URL\" }\npartitions = 2\n".to_owned();
    let house = house_with(&broker, queue, vec![("AMQP_URL", own.url())]).await?;
    let image = Image::oci("fed")?;
    house.push(&image, "team/app", &["1.0"]).await?;
    let digest = &image.manifest.digest;
    // In order, so that it has its queues again: killed this soon, RabbitMQ would forget them.
    own.stop().await?;
    publish(&broker, "amq.default", "ci-events", "application/cloudevents+json", &push("team/app", "1.0", digest)).await?;
    let in_hand = async || {
        let queue = broker.manage("GET", "/api/queues/%2F/ci-events", None).await?;
        Ok((queue["messages_unacknowledged"] == 1).then_some(()))
    };
    eventually("it is in hand and not acked", LIMIT, in_hand).await?;
    own.start_again().await?;
    house.wait_signed("team/app", digest, &["1.0"]).await?;
    eventually("it is acked", LIMIT, async || Ok((left(&broker, "ci-events").await? == 0).then_some(()))).await?;
    house.wait_settled(1, LIMIT).await?;

    // Our queue on their broker, deleted: what is published then goes nowhere, until we have declared it again.
    broker.manage("DELETE", "/api/queues/%2F/registry-events", None).await?;
    let again = Image::oci("again")?;
    house.push(&again, "team/app", &["2.0"]).await?;
    relay(&broker, &House::event(&house.registry.host(), "team/app", Some("2.0"), &again.manifest.digest)).await?;
    house.wait_signed("team/app", &again.manifest.digest, &["2.0"]).await
}
