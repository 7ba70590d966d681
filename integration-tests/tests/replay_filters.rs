//! Dead letters replayed by what went wrong with them, and by the rule that failed: on the embedded queue and on RabbitMQ.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration_tests::house::{House, Keys, Plan, TOKEN, rule};
use integration_tests::image::Image;
use integration_tests::process::eventually;
use integration_tests::rabbitmq::RabbitMq;
use integration_tests::registry::{Notify, Options};
use rustix::process::Signal;
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(90);

#[tokio::test]
async fn dead_letters_are_replayed_by_error_and_by_rule() -> Result<()> {
    replayed_by_error_and_by_rule(Plan::default()).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dead_letters_on_rabbitmq_are_replayed_by_error_and_by_rule() -> Result<()> {
    let broker = RabbitMq::start().await?;
    let queue = "backend = \"amqp\"\nurl = { env = \"AMQP_URL\" }\npartitions = 2\n".to_owned();
    replayed_by_error_and_by_rule(Plan { queue, environment: vec![("AMQP_URL", broker.url())], ..Plan::default() }).await
}

async fn replayed_by_error_and_by_rule(plan: Plan) -> Result<()> {
    let registry = Options { login: true, notify: Some(Notify::nobody()), ..Options::default() };
    let rules = ["team", "tools", "docs"].map(|name| rule(name, name, Keys::P256)).join("\n");
    let mut house = House::build(Plan { registry, rules: Some(rules), ..plan }).await?;
    let repositories = ["docs/site", "team/app", "team/web", "tools/cli"];
    let images = repositories.iter().map(|repository| Image::oci(repository)).collect::<Result<Vec<_>>>()?;
    for (repository, image) in repositories.iter().zip(&images) {
        house.push(image, repository, &["1.0"]).await?;
    }
    // Without its login the registry shows the daemon nothing.
    let right = house.config().replace("longest = \"2s\", give_up = \"1h\"", "longest = \"500ms\", give_up = \"1s\"");
    let is_login = |line: &&str| line.starts_with("username") || line.starts_with("password");
    house.write_config(&right.lines().filter(|line| !is_login(line)).collect::<Vec<_>>().join("\n"))?;
    house.daemon.start_alive().await?;
    notify(&house, repositories[0], &images[0]).await?;
    ensure!(house.notify(Some(TOKEN), &Value::String("no event".into())).await?.as_u16() == 202);
    house.wait_settled(2, LIMIT).await?;
    // And one that takes no writes gets no signature.
    house.registry.set_read_only(true).await?;
    reload(&house, &right, 1).await?;
    for (repository, image) in repositories.iter().zip(&images).skip(1) {
        notify(&house, repository, image).await?;
    }
    ensure!(house.wait_settled(5, LIMIT).await?.ended("dead") == 5);
    assert_eq!(dead(&house, &[]).await?, ["", "docs/site", "team/app", "team/web", "tools/cli"]);

    // The tools' rule is for something else by now: that it failed is on record. The documents' has not got so far.
    house.registry.set_read_only(false).await?;
    let tools = rule("tools", "tools", Keys::P256);
    reload(&house, &right.replace(&tools, &tools.replace("scope = \"tools\"", "scope = \"toys\"")), 2).await?;
    for (rule, its) in [("team", &["team/app", "team/web"][..]), ("tools", &["tools/cli"]), ("docs", &["docs/site"])] {
        assert_eq!(dead(&house, &["--rule", rule]).await?, its, "{rule}");
    }
    replay(&house, &["--rule", "team", "--error", "nobody says that"], 0).await?;
    replay(&house, &["--rule", "team"], 2).await?;
    for (repository, image) in repositories.iter().zip(&images).skip(1).take(2) {
        house.wait_signed(repository, &image.manifest.digest, &["1.0"]).await?;
    }
    house.wait_settled(5, LIMIT).await?;
    assert_eq!(dead(&house, &[]).await?, ["", "docs/site", "tools/cli"]);

    replay(&house, &["--error", "status 401"], 1).await?;
    house.wait_signed(repositories[0], &images[0].manifest.digest, &["1.0"]).await?;
    replay(&house, &["--rule", "tools", "--error", "read-only"], 1).await?;
    let metrics = house.wait_settled(5, LIMIT).await?;
    assert_eq!((metrics.ended("signed"), metrics.ended("skipped"), metrics.ended("dead")), (3, 1, 1), "{metrics:?}");
    assert_eq!(dead(&house, &[]).await?, [""]);
    Ok(())
}

async fn notify(house: &House, repository: &str, image: &Image) -> Result<()> {
    let event = House::event(&house.registry.host(), repository, Some("1.0"), &image.manifest.digest);
    let status = house.notify(Some(TOKEN), &event).await?;
    ensure!(status.as_u16() == 202, "{status}");
    Ok(())
}

/// Has the daemon read this configuration, the `times`-th that it reads again.
async fn reload(house: &House, config: &str, times: u64) -> Result<()> {
    house.write_config(config)?;
    house.daemon.signal(Signal::HUP)?;
    eventually("the configuration to be in force", LIMIT, || async {
        let reloads = house.daemon.metrics().await?.count("countersign_config_reloads_total", &[("result", "ok")]);
        Ok((reloads == times).then_some(()))
    })
    .await
}

/// The repositories of the dead letters that these filters leave, sorted; "" is one that is no event.
async fn dead(house: &House, filters: &[&str]) -> Result<Vec<String>> {
    let letters = house.run(&[&["queue", "dead", "--output", "json"], filters].concat()).await?.expect_code(0)?.json()?;
    let letters = letters.as_array().context("no list")?;
    let mut repositories: Vec<_> =
        letters.iter().map(|letter| letter["repository"].as_str().unwrap_or_default().to_owned()).collect();
    repositories.sort();
    Ok(repositories)
}

/// Looks first, which changes nothing.
async fn replay(house: &House, filters: &[&str], expected: u64) -> Result<()> {
    let before = dead(house, &[]).await?;
    let looked = house.run(&[&["queue", "replay", "--dry-run"], filters].concat()).await?.expect_code(0)?.stdout;
    ensure!(looked.contains(&format!("would replay {expected} dead letter")), "{filters:?}: {looked}");
    ensure!(dead(house, &[]).await? == before, "{filters:?}: a dry run changes nothing");
    let replayed = house.run(&[&["queue", "replay", "--output", "json"], filters].concat()).await?.expect_code(0)?.json()?;
    ensure!((replayed["done"].as_u64(), replayed["left"].as_u64()) == (Some(expected), Some(0)), "{filters:?}: {replayed}");
    Ok(())
}
