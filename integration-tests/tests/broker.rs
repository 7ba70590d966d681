//! What becomes of the broker, as those see it who send events: it takes none for a while, or it comes back with an empty disk.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use integration_tests::fleet::{Fleet, Sender, sums};
use integration_tests::house::House;
use integration_tests::image::Image;
use integration_tests::process::{eventually, http_client};
use reqwest::StatusCode;
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(90);
const REPOSITORY: &str = "team/app";

/// Pushes an image and returns it with its event.
async fn pushed(house: &House, tag: &str) -> Result<(Image, Value)> {
    let image = Image::oci(tag)?;
    house.push(&image, REPOSITORY, &[tag]).await?;
    let event = House::event(&house.registry.host(), REPOSITORY, Some(tag), &image.manifest.digest);
    Ok((image, event))
}

/// Sends events of new images, four at a time, until it is told to stop. Returns them with their tags once each was taken.
async fn load(house: &House, sender: &Sender, name: &str, stop: &AtomicBool) -> Result<Vec<(Image, String)>> {
    let numbers = stream::iter(0..).take_while(|_| std::future::ready(!stop.load(Ordering::Relaxed)));
    let sending = numbers.map(async |number| {
        let tag = format!("{name}.{number}");
        let (image, event) = pushed(house, &tag).await?;
        sender.send(&event).await?;
        Ok((image, tag))
    });
    sending.buffer_unordered(4).try_collect().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn short_of_disk_or_memory_events_are_refused_with_503_and_all_go_through_afterwards() -> Result<()> {
    let mut fleet = Fleet::build(2, "").await?;
    fleet.start().await?;
    let sender = fleet.sender()?;
    let mut accepted = 0;
    for kind in ["disk", "memory"] {
        let stop = AtomicBool::new(false);
        let alarm =
            async |on| if kind == "disk" { fleet.broker.disk_alarm(on).await } else { fleet.broker.memory_alarm(on).await };
        let alarming = async {
            let before = sender.refused();
            alarm(true).await?;
            let refused = async || Ok((sender.refused() > before).then_some(()));
            eventually("events are refused", LIMIT, refused).await?;
            // Every replica says so, and when to come again; one that had nothing to publish hears of it with its first push.
            let (_, event) = pushed(&fleet.house, &format!("{kind}.refused")).await?;
            for replica in 0..fleet.replicas.len() {
                let said = async || {
                    let answer = sender.post(replica, &event.to_string()).await?;
                    let seconds = answer.headers().get("retry-after").and_then(|value| value.to_str().ok()?.parse::<u32>().ok());
                    Ok((answer.status() == StatusCode::SERVICE_UNAVAILABLE).then_some(seconds))
                };
                let seconds = eventually("the webhook answers 503", LIMIT, said).await?;
                ensure!(seconds.is_some_and(|seconds| (1..=120).contains(&seconds)), "Retry-After: {seconds:?}");
                let url = format!("{}/readyz", fleet.replicas[replica].url());
                let unready = async || Ok((!http_client()?.get(&url).send().await?.status().is_success()).then_some(()));
                eventually("it is not ready", LIMIT, unready).await?;
            }
            alarm(false).await?;
            // And what is refused until then is taken.
            let more = sender.taken();
            eventually("events are taken again", LIMIT, async || Ok((sender.taken() > more + 10).then_some(()))).await?;
            stop.store(true, Ordering::Relaxed);
            Ok(())
        };
        let (images, ()) = tokio::try_join!(load(&fleet.house, &sender, kind, &stop), alarming)?;
        for (image, tag) in &images {
            fleet.house.wait_signed(REPOSITORY, &image.manifest.digest, &[tag]).await?;
        }
        accepted += images.len() as u64;
        let metrics = fleet.wait_settled(accepted).await?;
        ensure!(metrics.ended("dead") == 0, "{}", sums(&metrics));
        eprintln!("{kind}: {} images, 503: {} so far; {}", images.len(), sender.refused(), sums(&metrics));
    }
    ensure!(sender.broken() == 0, "a request was not answered");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn broker_that_comes_back_with_an_empty_disk_is_set_up_again_and_the_loss_is_told() -> Result<()> {
    let mut fleet = Fleet::build(2, "").await?;
    fleet.start().await?;
    let sender = fleet.sender()?;
    let (before, event) = pushed(&fleet.house, "before").await?;
    sender.send(&event).await?;
    sender.send_text("no event").await?;
    fleet.house.wait_signed(REPOSITORY, &before.manifest.digest, &["before"]).await?;
    let metrics = fleet.wait_settled(2).await?;
    ensure!(metrics.ended("dead") == 1, "{}", sums(&metrics));

    fleet.broker.stop().await?;
    fleet.broker.lose_disk()?;
    fleet.broker.start_again().await?;
    for replica in &fleet.replicas {
        let url = format!("{}/readyz", replica.url());
        let ready = async || Ok(http_client()?.get(&url).send().await?.status().is_success().then_some(()));
        eventually("it is ready again", LIMIT, ready).await?;
    }
    let (after, event) = pushed(&fleet.house, "after").await?;
    sender.send(&event).await?;
    fleet.house.wait_signed(REPOSITORY, &after.manifest.digest, &["after"]).await?;
    let told = |log: String| log.lines().any(|line| line.contains("ERROR") && line.contains("came back without"));
    ensure!(fleet.replicas.iter().any(|replica| told(replica.logged())), "nobody tells of the loss");
    // One that only was away is no such thing.
    let tell =
        |fleet: &Fleet| fleet.replicas.iter().map(|replica| replica.logged().matches("came back without").count()).sum::<usize>();
    let said = tell(&fleet);
    // What is signed and not acknowledged when the broker goes comes again, and is then one that was signed already.
    fleet.wait_quiet(1).await?;
    fleet.broker.stop().await?;
    fleet.broker.start_again().await?;
    let (last, event) = pushed(&fleet.house, "last").await?;
    sender.send(&event).await?;
    fleet.house.wait_signed(REPOSITORY, &last.manifest.digest, &["last"]).await?;
    ensure!(tell(&fleet) == said, "a restart is told as a loss");
    // The totals begin anew with the disk: two events came in since.
    for replica in &fleet.replicas {
        let counted = async || {
            // It answers 503 until it is connected.
            let Ok(metrics) = replica.metrics().await else { return Ok(None) };
            // What was not answered with 202 may have been taken all the same, and was sent again.
            let is_counted = (2..=2 + sender.refused() + sender.broken()).contains(&metrics.received());
            Ok((is_counted && metrics.queued() == 0 && metrics.ended("signed") == 3).then_some(()))
        };
        eventually("what came in since is counted", LIMIT, counted).await?;
    }
    Ok(())
}
