//! The ledger in a PostgreSQL database: as an administrator sees it, and when the database goes away and comes back.

use std::time::Duration;

use anyhow::{Result, ensure};
use integration_tests::daemon::Metrics;
use integration_tests::house::{House, Plan};
use integration_tests::image::Image;
use integration_tests::postgres::{PASSWORD, Postgres};
use integration_tests::process::{eventually, http_client};

const SETTLE: Duration = Duration::from_secs(60);

/// A house whose ledger is in a database of this server; not started.
async fn house(url: String) -> Result<House> {
    let ledger = Some("{ env = \"LEDGER_URL\" }".to_owned());
    House::build(Plan { ledger, environment: vec![("LEDGER_URL", url)], ..Plan::default() }).await
}

async fn is_ready(house: &House) -> Result<bool> {
    Ok(http_client()?.get(format!("{}/readyz", house.daemon.url())).send().await?.status().is_success())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_pushed_while_the_database_is_away_is_signed_once_it_is_back() -> Result<()> {
    let mut database = Postgres::start()?;
    let name = database.database()?;
    let mut house = house(database.url(&name)).await?;
    house.daemon.start().await?;
    let checked = house.run(&["check", "--online"]).await?.expect_code(0)?;
    ensure!(checked.stdout.contains(&format!("ok: ledger postgres://{}/{name}", database.host())), "{checked:?}");
    let before = Image::oci("before")?;
    house.push(&before, "team/app", &["1.0"]).await?;
    house.wait_signed("team/app", &before.manifest.digest, &["1.0"]).await?;
    assert_eq!(house.wait_settled(1, SETTLE).await?.ended("signed"), 1);
    let trail = "SELECT outcome, (SELECT string_agg(state, ',') FROM countersign.signature) FROM countersign.event";
    assert_eq!(database.sql(&name, trail)?, "signed|written");

    database.stop()?;
    let meanwhile = (0..5).map(|number| Image::oci(&format!("meanwhile {number}"))).collect::<Result<Vec<_>>>()?;
    for (number, image) in meanwhile.iter().enumerate() {
        house.push(image, "team/app", &[&format!("2.{number}")]).await?;
    }
    house.registry.wait_delivered(SETTLE).await?;
    eventually("it is not ready", SETTLE, async || Ok((!is_ready(&house).await?).then_some(()))).await?;
    // What the ledger would have said is missing from the metrics, and said to be.
    let scraped = http_client()?.get(format!("{}/metrics", house.daemon.url())).send().await?.error_for_status()?.text().await?;
    let metrics = Metrics::parse(&scraped)?;
    let up = |part: &str| metrics.count("countersign_up", &[("part", part)]);
    assert_eq!((up("ledger"), up("queue"), metrics.received(), metrics.queued()), (0, 1, 6, 5), "{scraped}");
    ensure!(!scraped.contains("countersign_events{") && scraped.contains("countersign_registry_request_seconds"), "{scraped}");
    for image in &meanwhile {
        let signed = house.signed("team/app", &image.manifest.digest).await?;
        ensure!(signed.is_empty(), "signed without a word in the ledger: {signed:?}");
    }
    database.start_again()?;
    for (number, image) in meanwhile.iter().enumerate() {
        house.wait_signed("team/app", &image.manifest.digest, &[&format!("2.{number}")]).await?;
    }
    let metrics = house.wait_settled(6, SETTLE).await?;
    assert_eq!((metrics.ended("signed"), metrics.ended("dead")), (6, 0), "{metrics:?}");
    eventually("it is ready again", SETTLE, async || Ok(is_ready(&house).await?.then_some(()))).await?;

    // And one that is killed.
    database.kill()?;
    database.start_again()?;
    let after = Image::oci("after")?;
    house.push(&after, "team/app", &["3.0"]).await?;
    house.wait_signed("team/app", &after.manifest.digest, &["3.0"]).await?;
    house.wait_settled(7, SETTLE).await?;

    let status = |status: serde_json::Value| (status["received"].as_u64(), status["signed"].as_u64());
    let told = house.run(&["queue", "status", "--output", "json"]).await?.expect_code(0)?.json()?;
    assert_eq!(status(told), (Some(7), Some(7)));
    let explained = house.run(&["explain", &house.reference("team/app", "2.3")]).await?.expect_code(0)?;
    assert!(explained.stdout.contains("signed"), "{explained:?}");
    // The same without the daemon, straight from the database.
    ensure!(house.daemon.terminate(SETTLE).await?.success());
    let told = house.run(&["queue", "status", "--output", "json"]).await?.expect_code(0)?.json()?;
    assert_eq!(status(told), (Some(7), Some(7)));
    house.run(&["explain", &house.reference("team/app", "1.0")]).await?.expect_code(0)?;
    assert!(!house.daemon.logged().contains(PASSWORD), "a password in the log");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_is_down_at_start_is_waited_for_and_one_that_refuses_is_not() -> Result<()> {
    let mut database = Postgres::start()?;
    let name = database.database()?;
    let url = database.url(&name);
    database.stop()?;
    let mut house = house(url.clone()).await?;
    house.daemon.start_alive().await?;
    ensure!(!is_ready(&house).await?);
    let image = Image::oci("early")?;
    house.push(&image, "team/app", &["1.0"]).await?;
    house.registry.wait_delivered(SETTLE).await?;
    database.start_again()?;
    house.wait_signed("team/app", &image.manifest.digest, &["1.0"]).await?;
    house.wait_settled(1, SETTLE).await?;
    ensure!(house.daemon.terminate(SETTLE).await?.success());

    for (wrong, expected) in [
        (url.replace(PASSWORD, "wrong-secret"), "correct the user and password"),
        (url.replace(&name, "no_such_database"), "create the database"),
    ] {
        let ledger = Some("{ env = \"LEDGER_URL\" }".to_owned());
        let mut house = House::build(Plan { ledger, environment: vec![("LEDGER_URL", wrong)], ..Plan::default() }).await?;
        house.run(&["check"]).await?.expect_code(0)?;
        let checked = house.run(&["check", "--online"]).await?.expect_code(3)?;
        ensure!(checked.stdout.contains(expected), "{checked:?}");
        house.daemon.start_unready()?;
        ensure!(!house.daemon.wait(SETTLE).await?.success());
        let log = house.daemon.logged();
        ensure!(log.contains(expected), "{log}");
        ensure!(!log.contains("wrong-secret") && !log.contains(PASSWORD), "{log}");
    }
    Ok(())
}
