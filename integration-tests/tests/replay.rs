//! Running again what went wrong: the past after a wrong rule, and dead letters by filter.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use integration_tests::house::{House, Keys, Plan, TOKEN, rule};
use integration_tests::image::Image;
use integration_tests::process::eventually;
use integration_tests::rabbitmq::RabbitMq;
use integration_tests::verifier::Cosign;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::process::Command;
use tokio::time::timeout;

const LIMIT: Duration = Duration::from_secs(60);

#[tokio::test]
async fn what_a_wrong_rule_skipped_is_signed_by_replaying_since_then() -> Result<()> {
    skipped_is_signed_by_replaying_since_then(Plan::default()).await
}

#[tokio::test]
async fn what_a_wrong_rule_skipped_is_signed_by_replaying_since_then_through_rabbitmq() -> Result<()> {
    let broker = RabbitMq::start().await?;
    let queue = "backend = \"amqp\"\nurl = { env = \"AMQP_URL\" }\n".to_owned();
    skipped_is_signed_by_replaying_since_then(Plan { queue, environment: vec![("AMQP_URL", broker.url())], ..Plan::default() })
        .await
}

async fn skipped_is_signed_by_replaying_since_then(plan: Plan) -> Result<()> {
    let wrong = rule("team", "teem", Keys::P256);
    let mut house = House::start(Plan { rules: Some(wrong), ..plan }).await?;
    let images = (0..5).map(|number| Image::oci(&format!("skipped {number}"))).collect::<Result<Vec<_>>>()?;
    for image in &images {
        house.push(image, "team/app", &[&image.manifest.digest[7..20]]).await?;
    }
    house.wait_settled(5, LIMIT).await?;
    assert_eq!(house.daemon.metrics().await?.ended("skipped"), 5);

    house.write_config(&house.config().replace("\"teem\"", "\"team\""))?;
    house.daemon.signal(Signal::HUP)?;
    eventually("the corrected rule to be in force", LIMIT, || async {
        let reloads = house.daemon.metrics().await?.count("countersign_config_reloads_total", &[("result", "ok")]);
        Ok((reloads == 1).then_some(()))
    })
    .await?;

    let since = ["queue", "replay", "--since", "2026-01-01T00:00Z"];
    let looked = house.run(&[&since[..], &["--dry-run", "--rule", "team"]].concat()).await?.expect_code(0)?.stdout;
    assert!(looked.contains("would replay 5 events") && looked.contains("team/app:"), "{looked}");
    let listed = house.run(&[&since[..], &["--dry-run", "--output", "json"]].concat()).await?.expect_code(0)?.json()?;
    assert_eq!(listed.as_array().map(Vec::len), Some(5), "{listed}");
    let other = house.run(&[&since[..], &["--repository", "other/**"]].concat()).await?.expect_code(0)?.stdout;
    assert!(other.contains("replayed 0 events"), "{other}");
    assert_eq!(house.daemon.metrics().await?.received(), 5, "looking changes nothing");

    let replayed = house.run(&since).await?.expect_code(0)?.stdout;
    assert!(replayed.contains("replayed 5 events"), "{replayed}");
    for image in &images {
        house.wait_signed("team/app", &image.manifest.digest, &[&image.manifest.digest[7..20]]).await?;
    }
    let metrics = house.wait_settled(10, LIMIT).await?;
    assert_eq!((metrics.ended("signed"), metrics.ended("skipped")), (5, 5));

    // Once more costs look-ups only; this time without the daemon, which then finds it in its queue.
    house.daemon.terminate(LIMIT).await?;
    let replayed = house.run(&[&since[..], &["--output", "json"]].concat()).await?.expect_code(0)?.json()?;
    assert_eq!((replayed["events"].as_u64(), replayed["stopped_at"].as_str()), (Some(5), None), "{replayed}");
    house.daemon.start().await?;
    let metrics = house.wait_settled(15, LIMIT).await?;
    assert_eq!((metrics.ended("signed"), metrics.ended("already_signed")), (5, 5));
    let status = house.run(&["queue", "status"]).await?.expect_code(0)?.stdout;
    assert!(status.contains("`queue replay --since` reaches back to 20"), "{status}");
    Ok(())
}

#[tokio::test]
async fn what_a_wrong_key_signed_is_signed_with_the_right_one_by_replaying_since_then() -> Result<()> {
    let house = House::start(Plan::default()).await?;
    let image = Image::oci("signed with the wrong key")?;
    house.push(&image, "team/app", &["1.0"]).await?;
    house.wait_signed("team/app", &image.manifest.digest, &["1.0"]).await?;

    let right = house.config_path().with_file_name("right.key.pem");
    let generated = house.run(&["key", "generate", "--spec", "EC_P256", "--out", &right.display().to_string()]).await?;
    generated.expect_code(0)?;
    // Another witness: a key that changes behind a witness's back is refused.
    house.write_config(&house.config().replace("release.key.pem", "right.key.pem").replace("\"release\"", "\"right\""))?;
    house.daemon.signal(Signal::HUP)?;
    eventually("the right key to be in use", LIMIT, || async {
        let reloads = house.daemon.metrics().await?.count("countersign_config_reloads_total", &[("result", "ok")]);
        Ok((reloads == 1).then_some(()))
    })
    .await?;
    let public = house.run(&["witness", "public-key", "right"]).await?.expect_code(0)?.stdout;
    let public_path = right.with_file_name("right.pub");
    std::fs::write(&public_path, public)?;
    let reference = house.reference("team/app", "1.0");
    ensure!(!Cosign::V2.verify(&public_path, &reference).await?.accepted, "nothing has signed with it yet");

    house.run(&["queue", "replay", "--since", "2026-01-01"]).await?.expect_code(0)?;
    assert_eq!(house.wait_settled(2, LIMIT).await?.ended("signed"), 2);
    let ruling = Cosign::V2.verify(&public_path, &reference).await?;
    ensure!(ruling.accepted, "{}", ruling.words);
    // The other one's signature stays.
    assert_eq!(house.signed("team/app", &image.manifest.digest).await?, [reference]);
    Ok(())
}

#[tokio::test]
async fn rule_that_is_newer_than_its_images_does_not_sign_them_when_they_are_replayed() -> Result<()> {
    let house = House::start(Plan { rules: Some(rule("team", "teem", Keys::P256)), ..Plan::default() }).await?;
    let image = Image::oci("older than its rule")?;
    house.push(&image, "team/app", &["1.0"]).await?;
    house.wait_settled(1, LIMIT).await?;
    let created = format!("{}created = 2100-01-01T00:00:00Z\n", rule("team", "team", Keys::P256));
    house.write_config(&house.config().replace(&rule("team", "teem", Keys::P256), &created))?;
    house.daemon.signal(Signal::HUP)?;
    eventually("the new rule to be in force", LIMIT, || async {
        let reloads = house.daemon.metrics().await?.count("countersign_config_reloads_total", &[("result", "ok")]);
        Ok((reloads == 1).then_some(()))
    })
    .await?;
    house.run(&["queue", "replay", "--since", "2026-01-01"]).await?.expect_code(0)?;
    let metrics = house.wait_settled(2, LIMIT).await?;
    assert_eq!(metrics.ended("skipped"), 2);
    assert!(house.signed("team/app", &image.manifest.digest).await?.is_empty());
    let story = house.run(&["explain", &house.reference("team/app", "1.0")]).await?.stdout;
    assert!(story.contains("pushed before the rule"), "{story}");
    Ok(())
}

#[tokio::test]
async fn dead_letters_are_replayed_by_filter_at_the_rate_and_until_ctrl_c() -> Result<()> {
    let house = House::start_quiet(None).await?;
    // No events: each is a dead letter at once, and again when it is replayed.
    for number in 0..30 {
        let response = send(&house, &format!("no event {number}")).await?;
        ensure!(response == 202, "{response}");
    }
    house.wait_settled(30, LIMIT).await?;
    let dead = async |arguments: &[&str]| -> Result<Value> {
        house.run(&[&["queue", "dead", "--output", "json"], arguments].concat()).await?.expect_code(0)?.json()
    };
    assert_eq!(dead(&[]).await?.as_array().map(Vec::len), Some(30));
    assert_eq!(dead(&["--limit", "7"]).await?.as_array().map(Vec::len), Some(7));
    assert_eq!(dead(&["--kind", "refused"]).await?, serde_json::json!([]));
    assert_eq!(dead(&["--older-than", "1h"]).await?, serde_json::json!([]));
    assert_eq!(dead(&["--newer-than", "1h", "--kind", "poison"]).await?.as_array().map(Vec::len), Some(30));

    let before = dead(&[]).await?;
    let looked = house.run(&["queue", "replay", "--kind", "poison", "--dry-run"]).await?.expect_code(0)?.stdout;
    assert!(looked.contains("would replay 30 dead letters"), "{looked}");
    assert_eq!(dead(&[]).await?, before, "a dry run changes nothing");

    let began = Instant::now();
    let replayed = house.run(&["queue", "replay", "--all", "--rate", "20"]).await?.expect_code(0)?;
    assert!(replayed.stdout.contains("replay: 30 dead letters"), "{replayed:?}");
    // 30 in batches of 5, each of which waits a quarter of a second for the one before.
    assert!(began.elapsed() >= Duration::from_millis(1200), "{:?}", began.elapsed());
    assert!(!replayed.stderr.contains('█'), "there is a bar where nobody looks: {replayed:?}");
    house.wait_settled(30, LIMIT).await?;

    // Whoever looks sees how far it is.
    let seen = on_a_terminal(&house, &["queue", "replay", "--all", "--rate", "20"]).await?;
    assert!(seen.contains('█') && (1..30).any(|done| seen.contains(&format!(" {done}/30 "))), "{seen}");
    assert!(seen.contains("replay: 30 dead letters"), "{seen}");
    house.wait_settled(30, LIMIT).await?;

    let said = interrupted(&house, &["queue", "replay", "--all", "--rate", "60/m"], 3 * 30 + 2).await?;
    assert!(said.contains("to go: the same command goes on with them"), "{said}");
    house.wait_settled(30, LIMIT).await?;

    house.run(&["queue", "discard", "--all", "--kind", "poison"]).await?.expect_code(0)?;
    assert_eq!(dead(&[]).await?, serde_json::json!([]));
    Ok(())
}

#[tokio::test]
async fn what_cannot_be_meant_is_wrong_usage() -> Result<()> {
    let house = House::start_quiet(None).await?;
    for arguments in [
        &["queue", "replay"][..],
        &["queue", "replay", "--since", "yesterday"],
        &["queue", "replay", "--since", "2026-11-20T00:00"],
        &["queue", "replay", "--since", "2026-11-20", "--until", "2026-11-19"],
        &["queue", "replay", "--since", "2100-01-01"],
        &["queue", "replay", "--since", "2026-11-20", "--kind", "poison"],
        &["queue", "replay", "--since", "2026-11-20", "--rule", "teem"],
        &["queue", "replay", "--until", "2026-11-20"],
        &["queue", "replay", "--all", "--rate", "0"],
        &["queue", "replay", "--all", "--rate", "5/d"],
        &["queue", "replay", "--rule", "teem"],
        &["queue", "dead", "--repository", "{team"],
        &["queue", "discard", "--older-than", "long"],
    ] {
        house.run(arguments).await?.expect_code(2)?;
    }
    house.write_config(&house.config().replacen("[queue]\n", "[queue]\nhistory = \"0s\"\n", 1))?;
    let mut house = house;
    house.daemon.terminate(LIMIT).await?;
    let output = house.run(&["queue", "replay", "--since", "2026-11-20"]).await?.expect_code(2)?;
    assert!(output.stderr.contains("nothing is kept of the past"), "{}", output.stderr);
    Ok(())
}

#[tokio::test]
async fn replaying_the_past_stops_at_ctrl_c_and_says_how_to_go_on() -> Result<()> {
    let house = House::start_quiet(None).await?;
    for number in 0..10 {
        let digest = Image::oci(&format!("never pushed {number}"))?.manifest.digest;
        let status = house.notify(Some(TOKEN), &House::event(&house.registry.host(), "team/app", Some("1.0"), &digest)).await?;
        ensure!(status == 202, "{status}");
    }
    house.wait_settled(10, LIMIT).await?;
    let handled = house.daemon.metrics().await?.count("countersign_event_handling_seconds_count", &[]);
    let replay = ["queue", "replay", "--since", "2026-01-01", "--repository", "team/**", "--rate", "60/m"];
    let said = interrupted(&house, &replay, handled + 2).await?;
    assert!(said.contains("stopped: go on with `countersign queue replay --since 20"), "{said}");
    assert!(said.contains("Z --until 20") && said.contains("--repository 'team/**' --rate '60/m'`"), "{said}");
    Ok(())
}

/// What a command says that gets a Ctrl-C once the daemon has handled so many events.
async fn interrupted(house: &House, arguments: &[&str], handled: u64) -> Result<String> {
    let mut command = Command::new(integration_tests::daemon::binary()?);
    command.args(arguments).arg("--config").arg(house.config_path());
    let child = command.stdout(std::process::Stdio::piped()).kill_on_drop(true).spawn()?;
    let pid = Pid::from_raw(i32::try_from(child.id().expect("it runs"))?).expect("a pid");
    eventually("some to be replayed", LIMIT, || async {
        let so_far = house.daemon.metrics().await?.count("countersign_event_handling_seconds_count", &[]);
        Ok((so_far >= handled).then_some(()))
    })
    .await?;
    kill_process(pid, Signal::INT)?;
    let output = child.wait_with_output().await?;
    let said = String::from_utf8(output.stdout)?;
    assert_eq!(output.status.code(), Some(1), "{said}");
    Ok(said)
}

/// What a command writes to a terminal that it runs on until it ends.
async fn on_a_terminal(house: &House, arguments: &[&str]) -> Result<String> {
    let countersign = integration_tests::daemon::binary()?;
    let command = format!("{} {} --config {}", countersign.display(), arguments.join(" "), house.config_path().display());
    let mut script = Command::new("script");
    script.args(["-qec", &command, "/dev/null"]).env("TERM", "xterm").stdin(std::process::Stdio::null()).kill_on_drop(true);
    let output = timeout(LIMIT, script.output()).await??;
    let seen = String::from_utf8(output.stdout)?;
    ensure!(output.status.success(), "{}: {seen}", output.status);
    Ok(seen)
}

async fn send(house: &House, body: &str) -> Result<u16> {
    Ok(house.notify(Some(TOKEN), &Value::String(body.into())).await?.as_u16())
}
