//! Keys that never leave their KMS: ministack checks the signature of each request, as AWS does; SoftHSM is a token.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use integration_tests::alibaba::{BASE, Fake, Fault};
use integration_tests::daemon;
use integration_tests::fake::Now;
use integration_tests::house::{House, Keys, Plan};
use integration_tests::image::Image;
use integration_tests::keys::{in_ministack, sign_what_everybody_accepts};
use integration_tests::ministack::Ministack;
use integration_tests::process::{eventually, scratch};
use integration_tests::softhsm::{PIN, SoftHsm};
use integration_tests::verifier::Cosign;
use integration_tests::{azure, google};
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(60);

async fn a_key_in_the_kms_signs_what_everybody_accepts(keys: Keys) -> Result<()> {
    let kms = Ministack::start().await?;
    let (plan, _) = in_ministack(&kms, &kms.host(), keys).await?;
    let secret = plan.environment[1].1.clone();
    sign_what_everybody_accepts(plan, &secret).await
}

#[tokio::test]
async fn a_p256_key_in_the_kms_signs_what_everybody_accepts() -> Result<()> {
    a_key_in_the_kms_signs_what_everybody_accepts(Keys::P256).await
}

#[tokio::test]
async fn an_rsa_key_in_the_kms_signs_what_everybody_accepts() -> Result<()> {
    a_key_in_the_kms_signs_what_everybody_accepts(Keys::Rsa2048).await
}

#[tokio::test]
async fn a_disabled_key_makes_a_dead_letter_with_its_cure_and_a_replay_signs() -> Result<()> {
    let kms = Ministack::start().await?;
    let (plan, id) = in_ministack(&kms, &kms.host(), Keys::P256).await?;
    let house = House::start(plan).await?;
    kms.kms("DisableKey", &json!({"KeyId": id})).await?;
    let image = Image::oci("disabled")?;
    house.push(&image, "team/app", &["1.0"]).await?;
    let metrics = house.wait_settled(1, LIMIT).await?;
    assert_eq!(metrics.ended("dead"), 1);
    let dead = house.run(&["queue", "dead"]).await?.expect_code(0)?.stdout;
    assert!(dead.contains("enable"), "no cure in: {dead}");

    kms.kms("EnableKey", &json!({"KeyId": id})).await?;
    house.run(&["queue", "replay", "--all"]).await?.expect_code(0)?;
    house.wait_signed("team/app", &image.manifest.digest, &["1.0"]).await?;
    let metrics = house.wait_settled(1, LIMIT).await?;
    assert_eq!((metrics.ended("dead"), metrics.ended("signed")), (0, 1));
    Ok(())
}

fn at_token(hsm: &SoftHsm, keys: Keys) -> Plan {
    Plan { keys, key_uri: Some(hsm.uri("release")), environment: hsm.environment(), ..Plan::default() }
}

async fn a_key_in_a_token_signs_what_everybody_accepts(keys: Keys) -> Result<()> {
    let hsm = SoftHsm::start()?;
    hsm.key(if keys == Keys::P256 { "EC:prime256v1" } else { "rsa:2048" }, "release", 1)?;
    sign_what_everybody_accepts(at_token(&hsm, keys), PIN).await
}

#[tokio::test]
async fn a_p256_key_in_a_token_signs_what_everybody_accepts() -> Result<()> {
    a_key_in_a_token_signs_what_everybody_accepts(Keys::P256).await
}

#[tokio::test]
async fn an_rsa_key_in_a_token_signs_what_everybody_accepts() -> Result<()> {
    a_key_in_a_token_signs_what_everybody_accepts(Keys::Rsa2048).await
}

#[tokio::test]
async fn what_is_pushed_while_a_token_is_out_is_signed_when_it_is_back() -> Result<()> {
    let hsm = SoftHsm::start()?;
    hsm.key("EC:prime256v1", "release", 1)?;
    let house = House::start(at_token(&hsm, Keys::P256)).await?;
    hsm.take_out()?;
    let image = Image::oci("out")?;
    house.push(&image, "team/app", &["1.0"]).await?;
    eventually("a try to sign", LIMIT, async || {
        Ok(house.daemon.logged().contains("CKR_").then_some(()).or(house
            .daemon
            .logged()
            .contains("no token that fits")
            .then_some(())))
    })
    .await?;
    hsm.put_back()?;
    house.wait_signed("team/app", &image.manifest.digest, &["1.0"]).await?;
    let metrics = house.wait_settled(1, LIMIT).await?;
    assert_eq!((metrics.ended("signed"), metrics.ended("dead")), (1, 0));
    Ok(())
}

#[tokio::test]
async fn a_wrong_pin_keeps_the_daemon_from_starting_and_it_says_why() -> Result<()> {
    let hsm = SoftHsm::start()?;
    hsm.key("EC:prime256v1", "release", 1)?;
    let mut house = House::build(at_token(&hsm, Keys::P256)).await?;
    hsm.write_pin("hunter2")?;
    house.daemon.start_unready()?;
    let status = house.daemon.wait(LIMIT).await?;
    assert!(!status.success(), "{status}");
    let log = house.daemon.logged();
    assert!(log.contains("refuses the PIN in") && !log.contains("hunter2"), "{log}");
    Ok(())
}

#[tokio::test]
async fn a_key_file_with_a_passphrase_signs_what_cosign_accepts() -> Result<()> {
    const PASSPHRASE: &str = "correct horse battery staple";
    let folder = scratch()?;
    let (key, passphrase) = (folder.path().join("key.pem"), folder.path().join("passphrase"));
    File::options().write(true).create_new(true).mode(0o600).open(&passphrase)?.write_all(PASSPHRASE.as_bytes())?;
    let text = |path: &Path| path.to_str().context("a folder whose name is no text").map(str::to_owned);
    let generate = ["key", "generate", "--spec", "EC_P256", "--out", &text(&key)?, "--passphrase-file", &text(&passphrase)?];
    daemon::run(&generate, &[]).await?.expect_code(0)?;
    assert!(fs::read_to_string(&key)?.starts_with("-----BEGIN ENCRYPTED PRIVATE KEY-----"));
    let hsm = SoftHsm::start()?;
    hsm.key("EC:prime256v1", "release", 1)?;
    let mut house = House::build(at_token(&hsm, Keys::P256)).await?;
    // The house as it was built, with the file in the token's place.
    let witness = format!("key = \"file://{}\"\npassphrase = {{ file = \"{}\" }}", text(&key)?, text(&passphrase)?);
    house.write_config(&house.config().replace(&format!("key = \"{}\"", hsm.uri("release")), &witness))?;
    house.daemon.start().await?;
    let image = Image::oci("passphrase")?;
    house.push(&image, "team/app", &["1.0"]).await?;
    let metrics = house.wait_settled(1, LIMIT).await?;
    assert_eq!(metrics.ended("signed"), 1);
    let pem = house.run(&["witness", "public-key", "release"]).await?.expect_code(0)?.stdout;
    let public_key = folder.path().join("public.pem");
    fs::write(&public_key, pem)?;
    let ruling = Cosign::V3.verify(&public_key, &house.reference("team/app", "1.0")).await?;
    assert!(ruling.accepted, "{}", ruling.words);
    assert!(!house.daemon.logged().contains(PASSPHRASE), "the log holds the passphrase");
    Ok(())
}

fn at_alibaba(service: &Fake, keys: Keys, key: &str) -> Plan {
    let key_uri = Some(format!("alibabakms://http://{}//{key}", service.address));
    let environment = ["ALIBABA_CLOUD_ACCESS_KEY_ID", "ALIBABA_CLOUD_ACCESS_KEY_SECRET"].into_iter().zip(BASE.map(str::to_owned));
    Plan { keys, key_uri, environment: environment.collect(), ..Plan::default() }
}

fn now() -> Now {
    #[expect(clippy::disallowed_methods, reason = "the other side compares it with its own clock")]
    Arc::new(jiff::Timestamp::now)
}

async fn alibaba() -> Fake {
    Fake::start(now()).await
}

/// Where a fake fails three times in passing, and shows in its own way that nothing secret is in the log.
async fn what_it_signs_is_accepted(plan: Plan, fail: impl FnOnce(), secrets: &[&str]) -> Result<()> {
    let house = House::start(plan).await?;
    // What passes costs nothing but time.
    fail();
    let image = Image::oci("cloud")?;
    house.push(&image, "team/app", &["1.0"]).await?;
    house.wait_signed("team/app", &image.manifest.digest, &["1.0"]).await?;
    for cosign in [Cosign::V2, Cosign::V3] {
        let ruling = cosign.verify(&house.public_key_path(), &house.reference("team/app", "1.0")).await?;
        assert!(ruling.accepted, "{cosign:?}: {}", ruling.words);
    }
    let log = house.daemon.logged();
    for secret in secrets {
        assert!(!log.contains(secret), "the log holds {secret}");
    }
    Ok(())
}

async fn a_key_at_alibaba_signs_what_cosign_accepts(keys: Keys, key: &str) -> Result<()> {
    let service = alibaba().await;
    let plan = at_alibaba(&service, keys, key);
    let faults = [Fault::Throttled { retry_after: 1 }, Fault::Error(503, "ServiceUnavailableTemporary"), Fault::Reset];
    what_it_signs_is_accepted(plan, || service.then(faults), &[BASE[1], "Signature="]).await
}

#[tokio::test]
async fn an_rsa_key_at_alibaba_signs_what_cosign_accepts() -> Result<()> {
    a_key_at_alibaba_signs_what_cosign_accepts(Keys::Rsa2048, "alias/rsa").await
}

#[tokio::test]
async fn a_p256_key_at_alibaba_signs_what_cosign_accepts() -> Result<()> {
    a_key_at_alibaba_signs_what_cosign_accepts(Keys::P256, "key-ec").await
}

#[tokio::test]
async fn a_key_at_alibaba_that_is_disabled_makes_a_dead_letter_and_a_replay_signs() -> Result<()> {
    let service = alibaba().await;
    let house = House::start(at_alibaba(&service, Keys::P256, "alias/ec")).await?;
    service.given().key_state = "Disabled";
    let image = Image::oci("disabled")?;
    house.push(&image, "team/app", &["1.0"]).await?;
    let metrics = house.wait_settled(1, LIMIT).await?;
    assert_eq!(metrics.ended("dead"), 1);
    let dead = house.run(&["queue", "dead"]).await?.expect_code(0)?.stdout;
    assert!(dead.contains("enable") && dead.contains("Rejected.Disabled"), "no cure in: {dead}");

    service.given().key_state = "Enabled";
    house.run(&["queue", "replay", "--all"]).await?.expect_code(0)?;
    house.wait_signed("team/app", &image.manifest.digest, &["1.0"]).await?;
    Ok(())
}

#[tokio::test]
async fn a_key_at_alibaba_is_checked_by_a_dry_run_and_verifies_when_it_is_asked() -> Result<()> {
    let service = alibaba().await;
    let house = House::start(at_alibaba(&service, Keys::Rsa2048, "alias/rsa")).await?;
    service.requests();
    let said = house.run(&["check", "--online"]).await?.expect_code(0)?.stdout;
    assert!(said.contains("witness release may sign, by a dry run, with alibabakms://"), "{said}");
    assert_eq!(service.requests().iter().filter(|asked| *asked == "AsymmetricSign").count(), 1);

    let image = Image::oci("verified")?;
    house.push(&image, "team/app", &["1.0"]).await?;
    house.wait_signed("team/app", &image.manifest.digest, &["1.0"]).await?;
    let reference = house.reference("team/app", "1.0");
    let verified = house.run(&["verify", &reference, "--with-kms", "--output", "json"]).await?.expect_code(0)?.json()?;
    assert_eq!(verified[0]["kms"][0]["said"], "valid");
    Ok(())
}

async fn a_key_at_google_signs_what_cosign_accepts(keys: Keys, key: &str) -> Result<()> {
    let cloud = google::Fake::start(now()).await;
    let account = tempfile::NamedTempFile::new()?;
    std::fs::write(account.path(), cloud.service_account().to_string())?;
    let file = account.path().to_str().expect("the name is made of letters").to_owned();
    let environment = vec![("GOOGLE_APPLICATION_CREDENTIALS", file)];
    let plan = Plan { keys, key_uri: Some(cloud.uri(key)), environment, ..Plan::default() };
    let faults = [Fault::Throttled { retry_after: 1 }, Fault::Error(503, "UNAVAILABLE"), Fault::Reset];
    what_it_signs_is_accepted(plan, || cloud.then(faults), &["issuedToken", "PRIVATE KEY", "eyJ"]).await
}

#[tokio::test]
async fn an_rsa_key_at_google_signs_what_cosign_accepts() -> Result<()> {
    a_key_at_google_signs_what_cosign_accepts(Keys::Rsa2048, "RSA_SIGN_PKCS1_2048_SHA256").await
}

#[tokio::test]
async fn a_p256_key_at_google_signs_what_cosign_accepts() -> Result<()> {
    a_key_at_google_signs_what_cosign_accepts(Keys::P256, "EC_SIGN_P256_SHA256/cryptoKeyVersions/10").await
}

#[tokio::test]
async fn a_rule_cannot_ask_a_key_at_google_for_another_padding_than_its_own() -> Result<()> {
    let cloud = google::Fake::start(now()).await;
    let account = tempfile::NamedTempFile::new()?;
    std::fs::write(account.path(), cloud.service_account().to_string())?;
    let file = account.path().to_str().expect("the name is made of letters").to_owned();
    let environment = vec![("GOOGLE_APPLICATION_CREDENTIALS", file)];
    let key_uri = Some(cloud.uri("RSA_SIGN_PSS_2048_SHA256"));
    let house = House::build(Plan { keys: Keys::Rsa2048, key_uri, environment, ..Plan::default() }).await?;
    let said = house.run(&["check", "--online"]).await?.expect_code(3)?.stdout;
    assert!(said.contains("with RSA_PKCS1_SHA_256") && said.contains("write algorithm = \"RSA_PSS_SHA_256\""), "{said}");
    // The key itself is all right, and the probe is signed as it signs.
    let without_rules = house.config().split("[[rule]]").next().expect("there is what comes before").to_owned();
    house.write_config(&without_rules)?;
    house.run(&["check", "--online"]).await?.expect_code(0)?;
    Ok(())
}

async fn a_key_at_azure_signs_what_cosign_accepts(keys: Keys, key: &str) -> Result<()> {
    let cloud = azure::Fake::start(now()).await;
    let (key_uri, environment) = (Some(cloud.uri(key)), cloud.variables().to_vec());
    let plan = Plan { keys, key_uri, environment, ..Plan::default() };
    let faults = [Fault::Throttled { retry_after: 1 }, Fault::Error(503, "ServiceUnavailable"), Fault::Reset];
    what_it_signs_is_accepted(plan, || cloud.then(faults), &["issuedToken", azure::CLIENT[1]]).await
}

#[tokio::test]
async fn an_rsa_key_at_azure_signs_what_cosign_accepts() -> Result<()> {
    a_key_at_azure_signs_what_cosign_accepts(Keys::Rsa2048, "RSA-2048").await
}

#[tokio::test]
async fn a_p256_key_at_azure_signs_what_cosign_accepts() -> Result<()> {
    a_key_at_azure_signs_what_cosign_accepts(Keys::P256, &format!("EC-P256/{}", azure::NEW)).await
}
