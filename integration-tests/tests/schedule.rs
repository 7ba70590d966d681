//! KMSs that throttle, vanish, lie, or exchange a key, beside real daemons and real registries.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use integration_tests::daemon::Metrics;
use integration_tests::gate::{Fate, Gate};
use integration_tests::house::{House, Keys, Plan, rule};
use integration_tests::image::Image;
use integration_tests::keys::{ACTIONS, aws_uri, in_ministack, in_openbao};
use integration_tests::ministack::{Credentials, Ministack};
use integration_tests::openbao::OpenBao;
use integration_tests::process::{eventually, http_client};
use integration_tests::proxy::Proxy;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);

/// `release` signs `team` with a key at `host`, and `other` signs `swift` with a key at ministack itself.
async fn two_witnesses(kms: &Ministack, host: &str) -> Result<Plan> {
    let (plan, _) = in_ministack(kms, host, Keys::P256).await?;
    kms.key("ECC_NIST_P256", "other").await?;
    let other = format!("[[witness]]\nname = \"other\"\nkey = \"{}\"\n", aws_uri(&kms.host(), "other"));
    let swift = rule("swift", "swift", Keys::P256).replace("witness = \"release\"", "witness = \"other\"");
    let rules = format!("{}\n{other}\n{swift}", rule("team", "team", Keys::P256));
    Ok(Plan { rules: Some(rules), ..plan })
}

async fn push_many(house: &House, repository: &str, count: usize) -> Result<()> {
    let pushes = (0..count).map(|number| async move {
        let image = Image::oci(&format!("{repository} {number}"))?;
        house.push(&image, repository, &[&format!("1.{number}")]).await
    });
    stream::iter(pushes).buffer_unordered(8).try_collect().await
}

fn written(metrics: &Metrics, witness: &str) -> u64 {
    metrics.count("countersign_signatures_total", &[("witness", witness), ("result", "written")])
}

#[tokio::test]
async fn throttled_to_five_a_second_two_hundred_images_are_all_signed_and_other_witnesses_do_not_notice() -> Result<()> {
    const QUOTA: u32 = 5;
    const WAITING: usize = 200;
    const OTHERS: usize = 60;
    let kms = Ministack::start().await?;
    let gate = Gate::start(&kms.host()).await?;
    gate.limit(QUOTA);
    let house = House::start(two_witnesses(&kms, &gate.host()).await?).await?;
    push_many(&house, "team/app", WAITING).await?;
    let before = written(&house.daemon.metrics().await?, "release");
    let begun = Instant::now();
    push_many(&house, "swift/app", OTHERS).await?;
    let metrics = eventually("the other witness has signed all of its own", LIMIT, async || {
        let metrics = house.daemon.metrics().await?;
        Ok((written(&metrics, "other") == 60).then_some(metrics))
    })
    .await?;
    let took = begun.elapsed();
    let meanwhile = written(&metrics, "release");
    // It signs as fast as they are pushed: at the other one's pace it would take as long as those that wait there.
    ensure!(took < Duration::from_secs(30), "{OTHERS} others took {took:?}");
    ensure!(meanwhile < WAITING as u64, "nothing waited any more: {before} and then {meanwhile} were signed");

    let metrics = house.wait_settled(260, Duration::from_secs(180)).await?;
    assert_eq!((metrics.ended("signed"), metrics.ended("dead")), (260, 0));
    let calls = gate.calls("Sign");
    let served: Vec<Instant> = calls.iter().filter(|call| call.fate == Fate::Passed).map(|call| call.at).collect();
    let throttled = calls.len() - served.len();
    // The first few are probes and the bucket's content.
    let served = &served[10..];
    let span = served[served.len() - 1].duration_since(served[0]).as_secs_f64();
    #[expect(clippy::cast_precision_loss, reason = "some hundred")]
    let rate = (served.len() - 1) as f64 / span;
    let least = (0..20).map(|window| {
        let from = served[0] + Duration::from_secs_f64(span / 20.0 * f64::from(window));
        served.iter().filter(|at| **at >= from && at.duration_since(from).as_secs_f64() < span / 20.0).count()
    });
    let least = least.min().context("no windows")?;
    println!("{rate:.2}/s served, least {least} in {:.1} s; {throttled} throttled; others {took:?}", span / 20.0);
    ensure!((4.2..=5.5).contains(&rate), "{rate} a second of {QUOTA}");
    ensure!(least >= 4, "only {least} in some {:.1} s", span / 20.0);
    ensure!(throttled <= 50, "{throttled} throttled calls for {} that were served", served.len());
    assert_eq!(metrics.count("countersign_kms_signs_total", &[("witness", "other"), ("result", "throttled")]), 0);
    assert_eq!(gate.calls("GetPublicKey").len(), 2, "once by the daemon, once by `witness public-key`");
    Ok(())
}

#[tokio::test]
async fn a_kms_that_vanishes_holds_nobody_up_and_all_is_signed_when_it_is_back() -> Result<()> {
    let kms = Ministack::start().await?;
    let proxy = Proxy::start(&kms.host()).await?;
    let house = House::start(two_witnesses(&kms, &proxy.host()).await?).await?;
    push_many(&house, "team/first", 1).await?;
    house.wait_settled(1, LIMIT).await?;
    proxy.refuse(true);
    proxy.cut();
    push_many(&house, "team/app", 20).await?;
    let release = [("witness", "release")];
    let metrics = eventually("the KMS counts as away", LIMIT, async || {
        let metrics = house.daemon.metrics().await?;
        Ok((metrics.count("countersign_witness_away", &release) == 1).then_some(metrics))
    })
    .await?;
    assert_eq!(metrics.count("countersign_witness_went_away_total", &release), 1);

    let list = house.run(&["witness", "list", "--output", "json"]).await?.expect_code(0)?.json()?;
    assert_eq!((&list[0]["state"], &list[0]["breaker"], &list[1]["state"]), (&json!("away"), &json!("open"), &json!("ok")));
    assert_eq!(list[0]["last_error"]["kind"], "unreachable");
    for key in ["resolved", "fingerprint", "spec", "provider"] {
        assert!(list[0][key].is_string(), "{list}");
    }
    // An answer stands for a second, so the one before may still.
    let (http, probe) = (http_client()?, format!("{}/readyz", house.daemon.url()));
    let unready = async || {
        let ready = http.get(&probe).send().await?;
        let status = ready.status();
        Ok((status == StatusCode::SERVICE_UNAVAILABLE).then_some(ready.text().await?))
    };
    let ready = eventually("it is not ready", LIMIT, unready).await?;
    ensure!(ready.contains("key of witness release"), "{ready}");

    push_many(&house, "swift/app", 10).await?;
    eventually("the other witness has signed", LIMIT, async || {
        Ok((written(&house.daemon.metrics().await?, "other") == 10).then_some(()))
    })
    .await?;
    let asked = house.daemon.metrics().await?.count("countersign_kms_signs_total", &release);
    ensure!(asked <= 30, "{asked} calls to a KMS that is away");
    proxy.refuse(false);
    let metrics = house.wait_settled(31, LIMIT).await?;
    assert_eq!((metrics.ended("signed"), metrics.ended("dead")), (31, 0));
    assert_eq!(metrics.count("countersign_witness_away", &release), 0);
    ensure!(house.daemon.logged().contains("the KMS is back"));
    Ok(())
}

#[tokio::test]
async fn a_kms_that_answers_wrong_signatures_makes_dead_letters_and_nothing_of_it_is_written() -> Result<()> {
    let kms = Ministack::start().await?;
    let gate = Gate::start(&kms.host()).await?;
    let (plan, _) = in_ministack(&kms, &gate.host(), Keys::P256).await?;
    let house = House::start(plan).await?;
    gate.spoil(true);
    let image = Image::oci("spoilt")?;
    house.push(&image, "team/app", &["1.0"]).await?;
    let metrics = house.wait_settled(1, LIMIT).await?;
    assert_eq!(metrics.ended("dead"), 1);
    let dead = house.run(&["queue", "dead"]).await?.expect_code(0)?.stdout;
    ensure!(dead.contains("does not verify with public key"), "no reason in: {dead}");
    assert_eq!(house.signed("team/app", &image.manifest.digest).await?, [""; 0]);
    assert_eq!(gate.calls("Sign").iter().filter(|call| call.fate == Fate::Spoilt).count(), 2, "asked once more, and no further");

    gate.spoil(false);
    house.run(&["queue", "replay", "--all"]).await?.expect_code(0)?;
    house.wait_signed("team/app", &image.manifest.digest, &["1.0"]).await?;

    // The KMS is asked to verify, and its word counts.
    let reference = house.reference("team/app", "1.0");
    let verify = ["verify", &reference, "--with-kms", "--output", "json"];
    let verified = house.run(&verify).await?.expect_code(0)?.json()?;
    assert_eq!((&verified[0]["attested"], &verified[0]["kms"][0]["said"]), (&json!(true), &json!("valid")));
    gate.spoil(true);
    let denied = house.run(&verify).await?.expect_code(1)?.json()?;
    assert_eq!((&denied[0]["attested"], &denied[0]["kms"][0]["said"]), (&json!(false), &json!("invalid")));
    house.run(&["verify", &reference]).await?.expect_code(0)?;
    Ok(())
}

#[tokio::test]
async fn credentials_that_end_while_signing_are_read_anew_and_cost_no_event_a_try() -> Result<()> {
    let kms = Ministack::start().await?;
    kms.key("ECC_NIST_P256", "release").await?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("credentials");
    let first = kms.user("countersign", &ACTIONS).await?;
    write_credentials(&file, &first)?;
    let environment = vec![("AWS_SHARED_CREDENTIALS_FILE", file.display().to_string())];
    let plan = Plan { key_uri: Some(aws_uri(&kms.host(), "release")), environment, ..Plan::default() };
    let house = House::start(plan).await?;
    push_many(&house, "team/before", 5).await?;
    house.wait_settled(5, LIMIT).await?;
    let second = kms.access_key("countersign").await?;
    write_credentials(&file, &second)?;
    kms.delete_access_key("countersign", &first).await?;
    push_many(&house, "team/after", 5).await?;
    let metrics = house.wait_settled(10, LIMIT).await?;
    assert_eq!((metrics.ended("signed"), metrics.ended("dead")), (10, 0));
    assert_eq!(metrics.count("countersign_kms_signs_total", &[("result", "ok")]), 10);
    assert_eq!(metrics.count("countersign_kms_signs_total", &[]), 10);
    ensure!(house.daemon.logged().contains("fetching them anew"));
    for secret in [first.secret_access_key, second.secret_access_key] {
        ensure!(!house.daemon.logged().contains(&secret), "the log holds a secret");
    }
    Ok(())
}

fn write_credentials(file: &Path, who: &Credentials) -> Result<()> {
    let (id, secret) = (&who.access_key_id, &who.secret_access_key);
    let next = file.with_extension("next");
    fs::write(&next, format!("[default]\naws_access_key_id = {id}\naws_secret_access_key = {secret}\n"))?;
    Ok(fs::rename(next, file)?)
}

#[tokio::test]
async fn an_alias_that_is_moved_stops_the_signing_and_is_never_followed_silently() -> Result<()> {
    let kms = Ministack::start().await?;
    let (plan, first) = in_ministack(&kms, &kms.host(), Keys::P256).await?;
    let mut house = House::start(plan).await?;
    let second = kms.key("ECC_NIST_P256", "second").await?;
    let point = async |id: &str| kms.kms("UpdateAlias", &json!({"AliasName": "alias/release", "TargetKeyId": id})).await;
    point(&second).await?;
    let image = Image::oci("moved")?;
    house.push(&image, "team/app", &["1.0"]).await?;
    assert_eq!(house.wait_settled(1, LIMIT).await?.ended("dead"), 1);
    let dead = house.run(&["queue", "dead"]).await?.expect_code(0)?.stdout;
    ensure!(dead.contains(&first) && dead.contains(&second) && dead.contains("nothing was signed"), "no reason in: {dead}");
    let list = house.run(&["witness", "list", "--output", "json"]).await?.expect_code(0)?.json()?;
    assert_eq!((&list[0]["state"], &list[0]["last_error"]["kind"]), (&json!("failing"), &json!("key_changed")));
    // Nor by a restart, which would read the other public key.
    house.daemon.kill()?;
    house.daemon.start_unready()?;
    ensure!(!house.daemon.wait(LIMIT).await?.success());
    ensure!(house.daemon.logged().contains("changed: "), "{}", house.daemon.logged());

    point(&first).await?;
    house.daemon.start().await?;
    house.run(&["queue", "replay", "--all"]).await?.expect_code(0)?;
    house.wait_signed("team/app", &image.manifest.digest, &["1.0"]).await
}

#[tokio::test]
async fn a_rotated_transit_key_signs_on_as_it_did_and_one_that_was_made_anew_signs_no_more() -> Result<()> {
    let bao = OpenBao::start().await?;
    let (plan, _) = in_openbao(&bao, Keys::P256).await?;
    let house = House::start(plan).await?;
    bao.root(Method::POST, "transit/keys/release/rotate", json!({})).await?;
    let image = Image::oci("rotated")?;
    house.push(&image, "team/app", &["1.0"]).await?;
    // By the public key that was read when the daemon was started.
    house.wait_signed("team/app", &image.manifest.digest, &["1.0"]).await?;

    bao.root(Method::POST, "transit/keys/release/config", json!({"deletion_allowed": true})).await?;
    bao.root(Method::DELETE, "transit/keys/release", Value::Null).await?;
    bao.key("release", "ecdsa-p256").await?;
    let other = Image::oci("made anew")?;
    house.push(&other, "team/app", &["2.0"]).await?;
    assert_eq!(house.wait_settled(2, LIMIT).await?.ended("dead"), 1);
    let dead = house.run(&["queue", "dead"]).await?.expect_code(0)?.stdout;
    ensure!(dead.contains("the key behind the reference was exchanged"), "no reason in: {dead}");
    assert_eq!(house.signed("team/app", &other.manifest.digest).await?, [""; 0]);
    Ok(())
}

#[tokio::test]
async fn everything_that_is_configured_is_reached_by_check_online() -> Result<()> {
    let kms = Ministack::start().await?;
    let (plan, id) = in_ministack(&kms, &kms.host(), Keys::P256).await?;
    let mut house = House::build(plan).await?;
    let check = ["check", "--online"];
    for _ in 0..2 {
        let said = house.run(&check).await?.expect_code(0)?.stdout;
        for part in ["ok: registry ", "ok: the queue", "ok: witness release signs a probe with awskms://"] {
            ensure!(said.contains(part), "{part:?} is not in: {said}");
        }
        // And once more beside the daemon.
        if house.daemon.pid().is_none() {
            house.daemon.start().await?;
        }
    }
    kms.kms("DisableKey", &json!({"KeyId": id})).await?;
    let said = house.run(&check).await?.expect_code(3)?.stdout;
    ensure!(said.contains("failed: witness release") && said.contains("disabled"), "{said}");
    Ok(())
}

#[tokio::test]
async fn being_asked_whether_it_is_ready_costs_one_probe() -> Result<()> {
    let kms = Ministack::start().await?;
    let gate = Gate::start(&kms.host()).await?;
    let house = House::start(in_ministack(&kms, &gate.host(), Keys::P256).await?.0).await?;
    let http = http_client()?;
    let probe = format!("{}/readyz", house.daemon.url());
    for _ in 0..20 {
        // A check has two seconds.
        eventually("it is ready", LIMIT, async || Ok(http.get(&probe).send().await?.status().is_success().then_some(()))).await?;
    }
    // A dry run, which ministack takes for a signature, and so the signature that is asked for where there are no dry runs.
    assert_eq!(gate.calls("Sign").len(), 2);
    let metrics = house.daemon.metrics().await?;
    assert_eq!(metrics.count("countersign_kms_calls_total", &[("operation", "probe")]), 1);
    assert_eq!(metrics.count("countersign_kms_calls_total", &[("operation", "get_public_key")]), 1);
    assert_eq!(metrics.count("countersign_kms_signs_total", &[]), 0, "no image was signed");
    Ok(())
}

#[tokio::test]
async fn a_transit_engine_verifies_when_it_is_asked_and_a_file_cannot() -> Result<()> {
    let bao = OpenBao::start().await?;
    for (plan, said) in [(in_openbao(&bao, Keys::Rsa2048).await?.0, "valid"), (Plan::default(), "not_asked")] {
        let house = House::start(plan).await?;
        let image = Image::oci(said)?;
        house.push(&image, "team/app", &["1.0"]).await?;
        house.wait_signed("team/app", &image.manifest.digest, &["1.0"]).await?;
        let reference = house.reference("team/app", "1.0");
        let verified = house.run(&["verify", &reference, "--with-kms", "--output", "json"]).await?.expect_code(0)?.json()?;
        assert_eq!((&verified[0]["attested"], &verified[0]["kms"][0]["said"]), (&json!(true), &json!(said)));
    }
    Ok(())
}
