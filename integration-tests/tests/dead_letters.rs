//! Thousands of dead letters on RabbitMQ: listed in pages, and replayed by filter, at a pace, with a break. How it is with a
//! hundred thousand: `make bench ARGS="--only dead-letters"`.

use std::collections::HashSet;
use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use integration_tests::daemon;
use integration_tests::house::{House, Plan, TOKEN};
use integration_tests::process::{Process, eventually, http_client};
use integration_tests::rabbitmq::RabbitMq;
use integration_tests::registry::{Notify, Options};
use rustix::process::Signal;
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(120);
const EACH: usize = 1500;

/// Events of images that are not there, in two repositories.
async fn post_events(house: &House) -> Result<()> {
    let (http, url, host) = (http_client()?, format!("{}/events/main", house.daemon.url()), house.registry.host());
    let posts = (0..2 * EACH).map(|number| {
        let repository = if number % 2 == 0 { "team/even" } else { "team/odd" };
        let event = House::event(&host, repository, Some("1.0"), &format!("sha256:{number:064x}"));
        let kind = "application/vnd.docker.distribution.events.v1+json";
        let request = http.post(&url).bearer_auth(TOKEN).header("content-type", kind);
        async move {
            let status = request.body(event.to_string()).send().await?.status();
            ensure!(status.as_u16() == 202, "{status}");
            Ok(())
        }
    });
    stream::iter(posts).buffer_unordered(16).try_collect().await
}

async fn listed(house: &House) -> Result<Vec<Value>> {
    let letters = house.run(&["queue", "dead", "--output", "json"]).await?.expect_code(0)?.json()?;
    Ok(letters.as_array().context("no list")?.clone())
}

/// Everything dead: without its login the registry shows the daemon nothing. With it, in the configuration that is returned, it
/// says that nothing of it is there.
async fn house_of_the_dead(broker: &RabbitMq) -> Result<(House, String)> {
    let registry = Options { login: true, notify: Some(Notify::nobody()), ..Options::default() };
    let queue = "backend = \"amqp\"\nurl = { env = \"AMQP_URL\" }\npartitions = 4\nin_flight = 32\n".to_owned();
    let environment = vec![("AMQP_URL", broker.url())];
    let mut house = House::build(Plan { registry, queue, environment, ..Plan::default() }).await?;
    let config = house.config();
    let without = config.lines().filter(|line| !line.starts_with("username") && !line.starts_with("password"));
    house.write_config(&without.collect::<Vec<_>>().join("\n"))?;
    house.daemon.start_alive().await?;
    post_events(&house).await?;
    let metrics = eventually("all are dead", LIMIT, async || {
        let metrics = house.daemon.metrics().await?;
        Ok((metrics.ended("dead") == 2 * EACH as u64 && metrics.queued() == 0).then_some(metrics))
    });
    ensure!(metrics.await?.adds_up());
    Ok((house, config))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_of_dead_letters_are_listed_whole_and_replayed_by_filter_with_a_break() -> Result<()> {
    let broker = RabbitMq::start().await?;
    let (mut house, config) = house_of_the_dead(&broker).await?;
    let (each, all) = (EACH as u64, 2 * EACH as u64);
    let first = listed(&house).await?;
    let ids: HashSet<_> = first.iter().filter_map(|letter| letter["id"].as_str()).collect();
    assert_eq!((first.len(), ids.len()), (2 * EACH, 2 * EACH));
    // As a rule in the same order; a broker that is busy may give some of it up.
    let sorted = |mut letters: Vec<Value>| {
        letters.sort_by_key(|letter| letter["id"].to_string());
        letters
    };
    ensure!(sorted(listed(&house).await?) == sorted(first.clone()), "listing loses none, and counts none as tried");
    let metrics = house.daemon.metrics().await?;
    assert_eq!((metrics.ended("dead"), metrics.queued(), metrics.received()), (all, 0, all));
    assert_eq!(metrics.count("countersign_queue_messages", &[("state", "dead")]), all);

    house.daemon.terminate(LIMIT).await?;
    house.write_config(&config)?;
    house.daemon.start().await?;
    // Ctrl-C in the middle of it.
    let log = house.config_path().with_file_name("replay.json");
    let mut command = Command::new(daemon::binary()?);
    command.args(["queue", "replay", "--repository", "team/even", "--rate", "100", "--output", "json", "--config"]);
    command.arg(house.config_path()).env("AMQP_URL", broker.url());
    let began = Instant::now();
    let mut replay = Process::start("replay", &mut command, &log)?;
    let some = async || Ok((house.daemon.metrics().await?.ended("skipped") >= 150).then_some(()));
    eventually("some are replayed", LIMIT, some).await?;
    replay.signal(Signal::INT)?;
    assert_eq!(replay.wait(LIMIT).await?.code(), Some(1));
    let (took, told) = (began.elapsed(), fs::read_to_string(&log)?);
    let told: Value = serde_json::from_str(&told).with_context(|| format!("what the command says: {told}"))?;
    let (done, left) = (told["done"].as_u64().context("done")?, told["left"].as_u64().context("left")?);
    assert_eq!(done + left, each, "{told}");
    // And a quarter of a second's worth at once.
    let most = u64::try_from(took.as_millis())? / 10 + 25;
    ensure!((150..=most).contains(&done), "{done} in {took:?} are no hundred a second");

    let again = house.run(&["queue", "replay", "--repository", "team/even", "--output", "json"]).await?.expect_code(0)?.json()?;
    assert_eq!((again["done"].as_u64(), again["left"].as_u64()), (Some(left), Some(0)), "{again}");
    let metrics = house.wait_settled(all, LIMIT).await?;
    assert_eq!((metrics.ended("skipped"), metrics.ended("dead")), (each, each), "{metrics:?}");
    // What was looked at and then broken off may come last.
    let odd: Vec<Value> = first.into_iter().filter(|letter| letter["repository"] == "team/odd").collect();
    ensure!(odd.len() == EACH && sorted(listed(&house).await?) == sorted(odd), "the others are as they were");
    Ok(())
}
