//! Starting, reloading, stopping, and refusing to.

use std::time::Duration;

use anyhow::Result;
use integration_tests::daemon::Daemon;
use integration_tests::house::{House, Keys, Plan, TOKEN, rule};
use integration_tests::image::Image;
use integration_tests::process::{eventually, free_port, http_client};
use rustix::process::Signal;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::time::timeout;

const LIMIT: Duration = Duration::from_secs(60);

#[tokio::test]
async fn sigterm_finishes_and_exits_0_and_what_came_meanwhile_is_signed_after_the_next_start() -> Result<()> {
    let mut house = House::start(Plan::default()).await?;
    let images = (0..20).map(|number| Image::oci(&format!("stop {number}"))).collect::<Result<Vec<_>>>()?;
    let (client, host) = (house.client.clone(), house.registry.host());
    let pushing = async {
        for image in &images {
            client.push(image, "team/app", &[&image.manifest.digest[7..20]]).await?;
        }
        Ok(())
    };
    let stopping = async {
        tokio::time::sleep(Duration::from_millis(60)).await;
        house.daemon.terminate(LIMIT).await
    };
    let (status, ()) = tokio::try_join!(stopping, pushing)?;
    assert_eq!(status.code(), Some(0), "{host}: {status}");

    house.daemon.start().await?;
    for image in &images {
        house.wait_signed("team/app", &image.manifest.digest, &[&image.manifest.digest[7..20]]).await?;
    }
    house.wait_settled(20, LIMIT).await?;
    Ok(())
}

#[tokio::test]
async fn a_second_sigterm_does_not_wait_for_a_registry_that_hangs() -> Result<()> {
    let mut house = House::start(Plan::default()).await?;
    let image = Image::oci("abort")?;
    house.push(&image, "team/app", &["1.0"]).await?;
    house.wait_signed("team/app", &image.manifest.digest, &["1.0"]).await?;
    house.registry.pause()?;
    let again = House::event(&house.registry.host(), "team/app", Some("1.0"), &image.manifest.digest);
    house.notify(Some(TOKEN), &again).await?;
    wait_in_hand(&house, 1).await?;
    house.daemon.signal(Signal::TERM)?;
    let daemon = &house.daemon;
    let stopping = async || Ok(daemon.logged().contains("a second signal stops at once").then_some(()));
    eventually("it is told that it stops", LIMIT, stopping).await?;
    assert!(house.daemon.is_running()?, "the first SIGTERM did not wait for what was in hand");
    house.daemon.signal(Signal::TERM)?;
    // In hand it would be for some more time: for three quarters of the grace.
    house.daemon.wait(Duration::from_secs(12)).await?;
    house.registry.resume()?;

    // What was in hand is still in the queue.
    house.daemon.start().await?;
    house.wait_settled(2, LIMIT).await?;
    Ok(())
}

#[tokio::test]
async fn sigterm_gives_back_what_a_hanging_registry_holds_up_and_exits_0() -> Result<()> {
    let mut house = House::build(Plan::default()).await?;
    house.write_config(&house.config().replacen("[server]\n", "[server]\ngrace = \"4s\"\n", 1))?;
    house.daemon.start().await?;
    let image = Image::oci("given back")?;
    house.push(&image, "team/app", &["1.0"]).await?;
    house.wait_signed("team/app", &image.manifest.digest, &["1.0"]).await?;
    house.registry.pause()?;
    let again = House::event(&house.registry.host(), "team/app", Some("1.0"), &image.manifest.digest);
    house.notify(Some(TOKEN), &again).await?;
    wait_in_hand(&house, 1).await?;
    assert_eq!(house.daemon.terminate(LIMIT).await?.code(), Some(0), "{}", house.daemon.logged());
    house.registry.resume()?;

    house.daemon.start().await?;
    house.wait_settled(2, LIMIT).await?;
    Ok(())
}

#[tokio::test]
async fn it_is_ready_by_what_is_in_force_and_says_so_of_nothing_that_is_not() -> Result<()> {
    let mut house = House::build(Plan::default()).await?;
    let good = house.config();
    let key = good.lines().find(|line| line.starts_with("key = ")).unwrap();
    house.write_config(&format!("{good}\n[[witness]]\nname = \"leaves\"\n{key}\n"))?;
    house.daemon.start().await?;
    house.write_config(&format!("{good}\n[[witness]]\nname = \"comes\"\n{key}\n"))?;
    house.daemon.signal(Signal::HUP)?;
    wait_reloads(&house, "ok", 1).await?;
    // An answer stands for a second.
    eventually("it is ready by the new one", LIMIT, async || {
        let ready = http_client()?.get(format!("{}/readyz", house.daemon.url())).send().await?;
        let (status, text) = (ready.status(), ready.text().await?);
        Ok((status.is_success() && text.contains("comes") && !text.contains("leaves")).then_some(()))
    })
    .await?;

    for (number, changed) in
        [("[queue]\n", "[queue]\nin_flight = 3\n"), ("[server]\n", "[server]\nmax_body = \"6MiB\"\n")].iter().enumerate()
    {
        house.write_config(&good.replacen(changed.0, changed.1, 1))?;
        house.daemon.signal(Signal::HUP)?;
        wait_reloads(&house, "failed", number as u64 + 1).await?;
        let logged = house.daemon.logged();
        assert!(logged.contains("cannot be changed while the daemon runs") && logged.contains(changed.0.trim()), "{logged}");
    }
    Ok(())
}

#[tokio::test]
async fn commands_tell_what_they_know_when_something_cannot_be_reached() -> Result<()> {
    let mut house = House::start(Plan::default()).await?;
    let image = Image::oci("unreached")?;
    house.push(&image, "team/app", &["1.0"]).await?;
    house.wait_signed("team/app", &image.manifest.digest, &["1.0"]).await?;
    let (there, missing) = (house.reference("team/app", "1.0"), house.reference("team/app", "2.0"));
    let signed = house.run(&["sign", &missing, &there]).await?.expect_code(1)?.stdout;
    assert!(signed.contains("no such image") && signed.contains("already signed"), "{signed}");

    house.registry.kill()?;
    let signed = house.run(&["sign", &there, &missing, "--output", "json"]).await?.expect_code(3)?.json()?;
    assert_eq!((signed[0]["outcome"].as_str(), signed[1]["outcome"].as_str()), (Some("failed"), Some("failed")), "{signed}");
    let story = house.run(&["explain", &there]).await?.expect_code(3)?.stdout;
    assert!(story.contains("team signs it") && story.contains("could not be asked"), "{story}");
    house.run(&["queue", "replay", "no-such-id"]).await?.expect_code(1)?;

    // A witness that is not known here yet spoils the answers about no other.
    house.registry.start_again().await?;
    let unknown = "[[witness]]\nname = \"elsewhere\"\nkey = \"awskms:///alias/never-asked?region=eu-west-1\"\n";
    house.write_config(&format!("{}\n{unknown}", house.config()))?;
    house.run(&["verify", &there, "--witness", "release"]).await?.expect_code(0)?;
    let story = house.run(&["explain", &there]).await?.expect_code(0)?.stdout;
    assert!(story.contains("signed by release") && story.contains("elsewhere"), "{story}");
    Ok(())
}

#[tokio::test]
async fn sighup_takes_a_good_file_and_leaves_a_bad_one() -> Result<()> {
    let mut house = House::start(Plan::default()).await?;
    let image = Image::oci("reload")?;
    house.push(&image, "other/app", &["1.0"]).await?;
    house.wait_settled(1, LIMIT).await?;
    assert!(house.signed("other/app", &image.manifest.digest).await?.is_empty());

    let good = house.config();
    house.write_config(&format!("{good}\n{}", rule("other", "other", Keys::P256)))?;
    house.daemon.signal(Signal::HUP)?;
    wait_reloads(&house, "ok", 1).await?;
    house.push(&image, "other/app", &["2.0"]).await?;
    house.wait_signed("other/app", &image.manifest.digest, &["2.0"]).await?;

    house.write_config(&format!("{good}\n[[rule]]\nname = \"broken\"\nscoop = \"x\"\n"))?;
    house.daemon.signal(Signal::HUP)?;
    wait_reloads(&house, "failed", 1).await?;
    let metrics = house.daemon.metrics().await?;
    assert_eq!(metrics.count("countersign_config_last_reload_success", &[]), 0);
    let line = good.lines().count() + 4;
    let logged = house.daemon.logged();
    assert!(logged.contains("scoop") && logged.contains(&format!(":{line}:")), "the log does not name line {line}:\n{logged}");
    house.push(&image, "other/app", &["3.0"]).await?;
    house.wait_signed("other/app", &image.manifest.digest, &["2.0", "3.0"]).await?;
    assert!(house.daemon.is_running()?);
    Ok(())
}

/// Waits until so many events are being handled.
async fn wait_in_hand(house: &House, events: u64) -> Result<()> {
    eventually(&format!("{events} are in hand"), LIMIT, async || {
        let metrics = house.daemon.metrics().await?;
        Ok((metrics.count("countersign_queue_messages", &[("state", "in_flight")]) == events).then_some(()))
    })
    .await
}

async fn wait_reloads(house: &House, result: &str, count: u64) -> Result<()> {
    eventually(&format!("{count} reloads were {result}"), LIMIT, async || {
        let reloads = house.daemon.metrics().await?.count("countersign_config_reloads_total", &[("result", result)]);
        Ok((reloads >= count).then_some(()))
    })
    .await
}

#[tokio::test]
async fn sigterm_ends_a_start_that_waits_for_a_broker() -> Result<()> {
    let broker = TcpListener::bind("127.0.0.1:0").await?;
    let queue = format!("backend = \"amqp\"\nurl = \"amqp://guest:guest@{}\"\n", broker.local_addr()?);
    let mut house = House::build(Plan { queue, ..Plan::default() }).await?;
    house.daemon.start_unready()?;
    // It takes the connection, and says nothing: by itself, the daemon would wait 20 s and start without.
    let _connection = timeout(LIMIT, broker.accept()).await??;
    assert_eq!(house.daemon.terminate(Duration::from_secs(8)).await?.code(), Some(0), "{}", house.daemon.logged());
    assert!(house.daemon.logged().contains("stopped before the queue"), "{}", house.daemon.logged());
    Ok(())
}

#[tokio::test]
async fn a_second_process_on_the_same_folder_is_refused_and_does_no_harm() -> Result<()> {
    let house = House::start(Plan::default()).await?;
    let port = free_port()?;
    let own_port = house.daemon.url().rsplit_once(':').unwrap().1.to_owned();
    let second_config = house.config_path().with_file_name("second.toml");
    std::fs::write(&second_config, house.config().replacen(&own_port, &port.to_string(), 1))?;
    let mut second = Daemon::new(&second_config, port, &[]);
    second.start_unready()?;
    let status = second.wait(LIMIT).await?;
    assert!(!status.success(), "{status}");
    let words = second.logged();
    assert!(words.contains("another") && words.contains("state"), "not said clearly: {words}");

    let image = Image::oci("first")?;
    house.push(&image, "team/app", &["1.0"]).await?;
    house.wait_signed("team/app", &image.manifest.digest, &["1.0"]).await
}

#[tokio::test]
async fn a_bad_configuration_is_refused_with_all_its_errors() -> Result<()> {
    let mut house = House::build(Plan::default()).await?;
    let good = house.config();
    let pss = good.replace("algorithm = \"ECDSA_SHA_256\"", "algorithm = \"RSA_PSS_SHA_256\"");
    house.write_config(&pss.replace("kind = \"distribution\"", "kind = \"distributor\"").replace("scope = ", "scoop = "))?;
    let check = house.run(&["check"]).await?.expect_code(1)?;
    let words = check.stdout + &check.stderr;
    for expected in ["countersign.toml:", "distributor", "scoop", "scope"] {
        assert!(words.contains(expected), "no {expected} in: {words}");
    }
    house.daemon.start_unready()?;
    assert!(!house.daemon.wait(LIMIT).await?.success());

    house.write_config(&pss)?;
    let check = house.run(&["check"]).await?.expect_code(1)?;
    let words = check.stdout + &check.stderr;
    assert!(words.contains("RSA_PSS_SHA_256"), "{words}");
    house.write_config(&good)?;
    house.run(&["check"]).await?.expect_code(0)?;
    house.run(&["check", "--online"]).await?.expect_code(0)?;
    Ok(())
}

#[tokio::test]
async fn a_taken_port_is_said_to_be_taken() -> Result<()> {
    let mut house = House::build(Plan::default()).await?;
    let address = house.daemon.url().trim_start_matches("http://").to_owned();
    let _taken = std::net::TcpListener::bind(&address)?;
    house.daemon.start_unready()?;
    assert!(!house.daemon.wait(LIMIT).await?.success());
    assert!(house.daemon.logged().contains(&address), "{}", house.daemon.logged());
    Ok(())
}

#[tokio::test]
async fn it_is_alive_but_not_ready_without_its_registry() -> Result<()> {
    let mut house = House::build(Plan::default()).await?;
    house.registry.kill()?;
    house.daemon.start_alive().await?;
    let ready = http_client()?.get(format!("{}/readyz", house.daemon.url())).send().await?;
    assert_eq!(ready.status().as_u16(), 503);
    assert!(ready.text().await?.contains(&house.registry.host()));
    house.registry.start_again().await?;
    eventually("it is ready", LIMIT, async || {
        let ready = http_client()?.get(format!("{}/readyz", house.daemon.url())).send().await?;
        Ok(ready.status().is_success().then_some(()))
    })
    .await
}

#[tokio::test]
async fn health_is_what_the_daemon_says_of_itself_whatever_became_of_its_file() -> Result<()> {
    let mut house = House::start(Plan::default()).await?;
    assert_eq!(house.run(&["health"]).await?.expect_code(0)?.stdout, "alive\n");
    assert_eq!(house.run(&["health", "--ready"]).await?.expect_code(0)?.stdout, "ready\n");

    house.write_config(&format!("{}\n[[rule]]\nname\n", house.config()))?;
    house.run(&["check"]).await?.expect_code(1)?;
    house.run(&["health", "--ready"]).await?.expect_code(0)?;

    house.registry.kill()?;
    let unready = async || Ok((house.run(&["health", "--ready"]).await?.code == Some(1)).then_some(()));
    eventually("it is not ready without its registry", LIMIT, unready).await?;
    let said = house.run(&["health", "--ready", "--output", "json"]).await?.expect_code(1)?.json()?;
    assert!(said["status"] == 503 && said["body"]["checks"].to_string().contains(&house.registry.host()), "{said}");
    house.run(&["health"]).await?.expect_code(0)?;

    house.daemon.terminate(LIMIT).await?;
    let gone = house.run(&["health"]).await?.expect_code(3)?.stderr;
    assert!(gone.contains(&format!("{}/livez does not answer", house.daemon.url())), "{gone}");
    Ok(())
}

#[tokio::test]
async fn dead_letters_are_listed_replayed_and_discarded_with_the_daemon_and_without() -> Result<()> {
    let mut house = House::start(Plan::default()).await?;
    for number in 0..4 {
        house.notify(Some(TOKEN), &json!({"events": [{"action": "push", "no": number}]})).await?;
    }
    let ids = async |house: &House| {
        let dead = house.run(&["queue", "dead", "--output", "json"]).await?.expect_code(0)?.json()?;
        let ids = dead.as_array().into_iter().flatten().map(|letter| letter["id"].as_str().unwrap().to_owned());
        anyhow::Ok(ids.collect::<Vec<_>>())
    };
    house.wait_settled(4, LIMIT).await?;
    let listed = ids(&house).await?;
    assert_eq!(listed.len(), 4);

    house.run(&["queue", "discard", &listed[0]]).await?.expect_code(0)?;
    assert_eq!(ids(&house).await?, listed[1..]);
    assert_eq!(house.daemon.terminate(LIMIT).await?.code(), Some(0));

    assert_eq!(ids(&house).await?, listed[1..]);
    house.run(&["queue", "discard", &listed[1], "--dry-run"]).await?.expect_code(0)?;
    assert_eq!(ids(&house).await?, listed[1..]);
    house.run(&["queue", "discard", &listed[1]]).await?.expect_code(0)?;
    assert_eq!(ids(&house).await?, listed[2..]);

    house.daemon.start().await?;
    // They are no better the second time, and come back.
    house.run(&["queue", "replay", "--all"]).await?.expect_code(0)?;
    eventually("both are dead again", LIMIT, async || Ok((ids(&house).await?.len() == 2).then_some(()))).await?;
    house.wait_settled(4, LIMIT).await?;
    Ok(())
}
