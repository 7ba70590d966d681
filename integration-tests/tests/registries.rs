//! Registries as they are: read-only for a while, with immutable tags, with deep namespaces.

use std::time::Duration;

use anyhow::{Context, Result};
use integration_tests::house::{House, Keys, Plan, TOKEN, rule_of_all_formats};
use integration_tests::image::Image;
use integration_tests::process::eventually;
use integration_tests::recorder::{Mutable, Recorder};
use integration_tests::verifier::{Cosign, Skopeo};
use reqwest::StatusCode;

const LIMIT: Duration = Duration::from_secs(60);

async fn notify(house: &House, image: &Image, tag: &str) -> Result<()> {
    let event = House::event(&house.registry.host(), "team/app", Some(tag), &image.manifest.digest);
    assert_eq!(house.notify(Some(TOKEN), &event).await?, StatusCode::ACCEPTED);
    Ok(())
}

#[tokio::test]
async fn what_is_pushed_before_maintenance_is_signed_when_the_registry_takes_writes_again() -> Result<()> {
    let mut house = House::start_quiet(None).await?;
    let image = Image::oci("maintenance")?;
    house.push(&image, "team/app", &["1.0"]).await?;
    house.registry.set_read_only(true).await?;
    notify(&house, &image, "1.0").await?;
    eventually("the log says why", LIMIT, async || Ok(house.daemon.logged().contains("the registry is read-only").then_some(())))
        .await?;
    let metrics = house.daemon.metrics().await?;
    assert_eq!((metrics.queued(), metrics.ended("dead")), (1, 0), "{metrics:?}");

    house.registry.set_read_only(false).await?;
    let metrics = house.wait_settled(1, LIMIT).await?;
    assert_eq!((metrics.ended("signed"), metrics.ended("dead")), (1, 0), "{metrics:?}");
    house.wait_signed("team/app", &image.manifest.digest, &["1.0"]).await
}

#[tokio::test]
async fn immutable_tags_are_a_dead_letter_that_names_the_exemption_and_a_replay_after_it_signs() -> Result<()> {
    let mut house = House::build(Plan::default()).await?;
    let recorder = Recorder::start(&house.registry.host()).await?;
    recorder.set_mutable(Mutable::None);
    house.route_registry(&recorder.url())?;
    house.daemon.start().await?;
    let image = Image::oci("immutable")?;
    // The first signature makes the tag, and is no problem; the second would have to change it.
    house.push(&image, "team/app", &["1.0"]).await?;
    house.wait_signed("team/app", &image.manifest.digest, &["1.0"]).await?;
    house.push(&image, "team/app", &["2.0"]).await?;
    let dead = async || {
        let letters = house.run(&["queue", "dead"]).await?.expect_code(0)?.stdout;
        Ok(letters.contains("does not let this tag be changed").then_some(letters))
    };
    let letters = eventually("it is a dead letter", LIMIT, dead).await?;
    assert!(letters.contains("exempt tags of the form sha256-*"), "{letters}");
    assert_eq!(house.signed("team/app", &image.manifest.digest).await?, [house.reference("team/app", "1.0")]);

    recorder.set_mutable(Mutable::Signatures);
    house.run(&["queue", "replay", "--all"]).await?.expect_code(0)?;
    house.wait_signed("team/app", &image.manifest.digest, &["1.0", "2.0"]).await
}

#[tokio::test]
async fn a_repository_five_deep_is_signed_by_the_rule_of_its_namespace_and_verifies() -> Result<()> {
    let rules = rule_of_all_formats("deep", "team/of/many", Keys::P256);
    let house = House::start(Plan { rules: Some(rules), ..Plan::default() }).await?;
    let image = Image::index("deep")?;
    let repository = "team/of/many/parts/app";
    house.push(&image, "team/of", &["1.0"]).await?;
    house.push(&image, repository, &["1.0"]).await?;
    house.wait_signed(repository, &image.manifest.digest, &["1.0"]).await?;
    house.registry.wait_delivered(LIMIT).await?;
    house.wait_settled(1, LIMIT).await?;
    let (key, reference) = (house.public_key_path(), house.reference(repository, "1.0"));
    for cosign in [Cosign::V2, Cosign::V3] {
        let ruling = cosign.verify(&key, &reference).await?;
        assert!(ruling.accepted, "{cosign:?}: {}", ruling.words);
    }
    let ruling = Skopeo::requiring(&key, &house.registry.host())?.architecture("amd64").copy(&reference).await?;
    assert!(ruling.accepted, "skopeo: {}", ruling.words);
    let outside = house.run(&["verify", &house.reference("team/of", "1.0"), "--output", "json"]).await?.expect_code(1)?.json()?;
    assert_eq!(outside[0]["signatures"].as_array().context("no signatures")?.len(), 0, "{outside}");
    Ok(())
}
