//! countersign on RabbitMQ.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use integration_tests::daemon::Daemon;
use integration_tests::house::{House, Plan, TOKEN};
use integration_tests::image::Image;
use integration_tests::process::eventually;
use integration_tests::proxy::Proxy;
use integration_tests::rabbitmq::RabbitMq;
use integration_tests::recorder::Recorder;
use integration_tests::registry;
use integration_tests::signature::tag_of;
use reqwest::Method;
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(60);

fn plan(broker: &RabbitMq) -> Plan {
    let queue = "backend = \"amqp\"\nurl = { env = \"AMQP_URL\" }\npartitions = 4\n".to_owned();
    Plan { queue, environment: vec![("AMQP_URL", broker.url())], ..Plan::default() }
}

async fn is_ready(daemon: &Daemon) -> Result<bool> {
    let answer = integration_tests::process::http_client()?.get(format!("{}/readyz", daemon.url())).send().await?;
    Ok(answer.status().is_success())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pushed_image_is_signed_through_rabbitmq_though_the_broker_is_killed() -> Result<()> {
    let mut broker = RabbitMq::start().await?;
    let house = House::start(plan(&broker)).await?;
    broker.sync().await?;
    let (first, second) = (Image::oci("before")?, Image::oci("after")?);
    house.push(&first, "team/app", &["v1"]).await?;
    house.wait_signed("team/app", &first.manifest.digest, &["v1"]).await?;
    house.wait_settled(1, LIMIT).await?;

    broker.kill()?;
    let event = House::event(&house.registry.host(), "team/app", Some("v1"), &first.manifest.digest);
    eventually("a push is refused", LIMIT, async || Ok((house.notify(Some(TOKEN), &event).await?.as_u16() == 503).then_some(())))
        .await?;
    // An answer stands for a second.
    eventually("it is not ready", LIMIT, async || Ok((!is_ready(&house.daemon).await?).then_some(()))).await?;

    broker.start_again().await?;
    house.push(&second, "team/app", &["v2"]).await?;
    house.wait_signed("team/app", &second.manifest.digest, &["v2"]).await?;
    eventually("it is ready again", LIMIT, async || Ok(is_ready(&house.daemon).await?.then_some(()))).await?;
    house.wait_settled(2, LIMIT).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tags_that_wait_for_each_other_on_rabbitmq_are_written_together() -> Result<()> {
    let broker = RabbitMq::start().await?;
    let registry = registry::Options { notify: Some(registry::Notify::nobody()), ..registry::Options::default() };
    let mut house = House::build(Plan { registry, ..plan(&broker) }).await?;
    let recorder = Recorder::start(&house.registry.host()).await?;
    house.route_registry(&recorder.url())?;
    house.daemon.start().await?;
    let (image, tags) = (Image::oci("tags")?, (0..20).map(|n| format!("1.{n}")).collect::<Vec<_>>());
    let (digest, tags) = (&image.manifest.digest, tags.iter().map(String::as_str).collect::<Vec<_>>());
    house.push(&image, "team/app", &tags).await?;
    let host = house.registry.host();
    let events: Vec<_> = tags.iter().map(|tag| House::event(&host, "team/app", Some(tag), digest)["events"][0].clone()).collect();
    assert_eq!(house.notify(Some(TOKEN), &json!({ "events": events })).await?, 202);
    house.wait_settled(20, LIMIT).await?;
    house.wait_signed("team/app", digest, &tags).await?;
    let path = format!("/v2/team/app/manifests/{}", tag_of(digest));
    let written = recorder.exchanges().iter().filter(|asked| asked.method == Method::PUT && asked.path == path).count();
    println!("20 tags in {written} writes");
    // Whoever was idle has taken the first that came.
    assert!((1..10).contains(&written), "20 tags in {written} writes");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replica_that_a_silent_network_cuts_off_is_replaced_and_nothing_is_signed_twice() -> Result<()> {
    let broker = RabbitMq::start().await?;
    let proxy = Proxy::start(&broker.host()).await?;
    let registry = registry::Options { count_requests: true, ..registry::Options::default() };
    let mut house = House::build(Plan { registry, ..plan(&broker) }).await?;
    let url = broker.url().replace(&broker.host(), &proxy.host());
    let mut second = house.replica("second", &house.config(), &[("AMQP_URL", url)])?;
    // The first to come has all partitions; the registry tells the other.
    second.start().await?;
    house.daemon.start().await?;
    let images = (0..7).map(|n| Image::oci(&format!("image {n}"))).collect::<Result<Vec<_>>>()?;
    let (before, rest) = images.split_first().context("there are seven")?;
    house.push(before, "team/app", &["v0"]).await?;
    house.wait_signed("team/app", &before.manifest.digest, &["v0"]).await?;
    // What is in hand then is begun, and its end is heard by nobody.
    let (during, after) = rest.split_at(4);
    let mut silent_since = None;
    for (n, image) in during.iter().enumerate() {
        if n == 2 {
            proxy.silence(true);
            silent_since = Some(Instant::now());
        }
        house.push(image, &format!("team/app{n}"), &["v1"]).await?;
    }
    eventually("it knows that it is cut off", LIMIT, async || Ok((!is_ready(&second).await?).then_some(()))).await?;
    for (n, image) in during.iter().enumerate() {
        let repository = format!("team/app{n}");
        let signed = async || Ok((house.signed(&repository, &image.manifest.digest).await?.len() == 1).then_some(()));
        eventually("the other signs", LIMIT, signed).await?;
    }
    let settled = async || Ok((house.daemon.metrics().await?.queued() == 0).then_some(()));
    eventually("the other has handled everything", LIMIT, settled).await?;
    // It goes on elsewhere for as long as it lasts, a minute.
    let silent_since = silent_since.context("it is silent")?;
    tokio::time::sleep(Duration::from_secs(60).saturating_sub(silent_since.elapsed())).await;
    house.push(&after[0], "team/late", &["v1"]).await?;
    house.wait_signed("team/late", &after[0].manifest.digest, &["v1"]).await?;

    proxy.silence(false);
    eventually("it is back", LIMIT, async || Ok(is_ready(&second).await?.then_some(()))).await?;
    house.push(&after[1], "team/app", &["v2"]).await?;
    house.wait_signed("team/app", &after[1].manifest.digest, &["v2"]).await?;
    eventually("the last is settled", LIMIT, settled).await?;
    for image in &images {
        let tag = format!("{}.sig", image.manifest.digest.replace(':', "-"));
        let requests = house.registry.requests()?;
        let written = requests.iter().filter(|request| request.method == "PUT" && request.path.ends_with(&tag)).count();
        assert_eq!(written, 1, "{tag}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_without_a_daemon_leave_the_messages_to_the_replicas() -> Result<()> {
    let broker = RabbitMq::start().await?;
    let mut house = House::start(plan(&broker)).await?;
    house.daemon.terminate(LIMIT).await?;
    // As one that was accepted and not handled.
    let message = json!({ "properties": {}, "routing_key": "4.0", "payload": "no event", "payload_encoding": "string" });
    broker.manage("POST", "/api/exchanges/%2F/countersign.v1.accept/publish", Some(&message)).await?;
    for _ in 0..2 {
        let status = house.run(&["queue", "status", "--output", "json"]).await?.expect_code(0)?.json()?;
        let empty =
            |n: u32| json!({ "name": format!("4.{n}"), "holder": null, "ready": 0, "in_flight": 0, "oldest_seconds": null });
        let mut partitions = [empty(0), empty(1), empty(2), empty(3)];
        // Ready, and held by nobody.
        partitions[0]["ready"] = 1.into();
        assert_eq!(status["partitions"], json!(partitions), "{status}");
    }
    house.daemon.start().await?;
    eventually("a replica takes it", LIMIT, async || {
        let status = house.run(&["queue", "status", "--output", "json"]).await?.expect_code(0)?.json()?;
        Ok((status["dead_letters"] == 1 && status["queued"] == 0).then_some(()))
    })
    .await?;
    eventually("each partition is told to be held, by the one that there is", LIMIT, async || {
        let status = house.run(&["queue", "status", "--output", "json"]).await?.expect_code(0)?.json()?;
        let holders: Vec<&str> =
            status["partitions"].as_array().into_iter().flatten().filter_map(|one| one["holder"].as_str()).collect();
        Ok((holders.len() == 4 && holders.iter().all(|holder| !holder.is_empty() && *holder == holders[0])).then_some(()))
    })
    .await
}
