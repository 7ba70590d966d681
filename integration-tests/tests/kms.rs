//! Keys that never leave their KMS: ministack checks the signature of each request, as AWS does.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use integration_tests::alibaba::{BASE, Fake, Fault};
use integration_tests::house::{House, Keys, Plan};
use integration_tests::image::Image;
use integration_tests::keys::{in_ministack, sign_what_everybody_accepts};
use integration_tests::ministack::Ministack;
use integration_tests::verifier::Cosign;
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(20);

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

fn at_alibaba(service: &Fake, keys: Keys, key: &str) -> Plan {
    let key_uri = Some(format!("alibabakms://http://{}//{key}", service.address));
    let environment = ["ALIBABA_CLOUD_ACCESS_KEY_ID", "ALIBABA_CLOUD_ACCESS_KEY_SECRET"].into_iter().zip(BASE.map(str::to_owned));
    Plan { keys, key_uri, environment: environment.collect(), ..Plan::default() }
}

async fn alibaba() -> Fake {
    #[expect(clippy::disallowed_methods, reason = "the other side compares it with its own clock")]
    Fake::start(Arc::new(jiff::Timestamp::now)).await
}

async fn a_key_at_alibaba_signs_what_cosign_accepts(keys: Keys, key: &str) -> Result<()> {
    let service = alibaba().await;
    let house = House::start(at_alibaba(&service, keys, key)).await?;
    // What passes costs nothing but time.
    service.then([Fault::Throttled { retry_after: 1 }, Fault::Error(503, "ServiceUnavailableTemporary"), Fault::Reset]);
    let image = Image::oci("alibaba")?;
    house.push(&image, "team/app", &["1.0"]).await?;
    house.wait_signed("team/app", &image.manifest.digest, &["1.0"]).await?;
    for cosign in [Cosign::V2, Cosign::V3] {
        let ruling = cosign.verify(&house.public_key_path(), &house.reference("team/app", "1.0")).await?;
        assert!(ruling.accepted, "{cosign:?}: {}", ruling.words);
    }
    let log = house.daemon.logged();
    assert!(!log.contains(BASE[1]) && !log.contains("Signature="), "the log holds the KMS's secret");
    Ok(())
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
