//! Attestations, SBOMs and attached signatures of cosign's at an image of ours, written before ours and after them.

use std::time::Duration;

use anyhow::{Context, Result};
use integration_tests::attest::PREDICATE;
use integration_tests::formats::{Referrers, found, ours, wait_for};
use integration_tests::house::{House, Keys, Plan, rule_of_all_formats};
use integration_tests::image::Image;
use integration_tests::process::eventually;
use integration_tests::registry::Registry;
use integration_tests::verifier::{Cosign, KeyPair, Notation, Skopeo};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(60);
const FORMATS: [&str; 3] = ["bundle", "cosign", "notation"];

/// All that cosign writes beside signatures, and a signature of another key that it attaches.
async fn attest(key: &KeyPair, pinned: &str) -> Result<()> {
    Cosign::V2.attest(key, pinned).await?;
    Cosign::attach_attestation(pinned, pinned).await?;
    Cosign::attach_sbom(pinned).await?;
    Cosign::attach_signature(key, pinned).await?;
    Cosign::V3.attest(key, pinned).await
}

/// What `countersign verify` says of the image: the answer, and its exit code.
async fn answer(house: &House, reference: &str, code: i32) -> Result<Value> {
    Ok(house.run(&["verify", reference, "--output", "json"]).await?.expect_code(code)?.json()?[0].take())
}

fn predicates(answer: &Value) -> Vec<&Value> {
    answer["attestations"].as_array().into_iter().flatten().map(|one| &one["predicate"]).collect()
}

async fn ours_stand_beside_them(kind: Referrers) -> Result<()> {
    let rules = rule_of_all_formats("team", "team", Keys::P256) + &format!("formats = {FORMATS:?}\n");
    let house = House::start(Plan { registry: kind.registry(), rules: Some(rules), ..Plan::default() }).await?;
    let (theirs, key) = (KeyPair::generate().await?, house.public_key_path());
    let judge = Notation::trusting_witness(&house, "*").await?;
    for (number, (name, first)) in (0..).zip([("before", true), ("after", false)]) {
        let (image, repository) = (Image::oci(name)?, format!("team/{name}"));
        let (tagged, pinned) = (house.reference(&repository, "1.0"), house.reference(&repository, &image.manifest.digest));
        if first {
            house.push(&image, &repository, &[]).await?;
            attest(&theirs, &pinned).await?;
        }
        kind.push(&house, &image, &repository, "1.0").await?;
        wait_for(&house, &tagged, &FORMATS).await?;
        if !first {
            attest(&theirs, &pinned).await?;
        }
        let context = format!("{kind:?}, {name} ours");
        for cosign in [Cosign::V2, Cosign::V3] {
            let ruling = cosign.verify(&key, &tagged).await?;
            assert!(ruling.accepted, "{context}: {cosign:?}: {}", ruling.words);
        }
        assert!(Cosign::V2.verify(&theirs.public(), &tagged).await?.accepted, "{context}: what was attached");
        let ruling = judge.verify(&tagged).await?;
        assert!(ruling.accepted, "{context}: {}", ruling.words);
        let ruling = Skopeo::requiring(&key, &house.registry.host())?.copy(&tagged).await?;
        assert!(ruling.accepted, "{context}: {}", ruling.words);

        // Each of ours once, and the attached one; the attestation is told apart, and is no signature.
        let attached = ("cosign".to_owned(), "rejected".to_owned(), "nobody".to_owned());
        let mut expected = vec![attached];
        expected.extend(FORMATS.map(ours));
        expected.sort();
        assert_eq!(found(&house, &tagged).await?, expected, "{context}");
        let told = answer(&house, &tagged, 0).await?;
        assert_eq!(predicates(&told), [PREDICATE], "{context}: {told}");
        let text = house.run(&["verify", &tagged]).await?.expect_code(0)?.stdout;
        assert!(text.contains(&format!("is an attestation, and states {PREDICATE}")), "{context}: {text}");

        // Nothing is signed again for it.
        kind.push(&house, &image, &repository, "1.0").await?;
        eventually("the second push is handled", LIMIT, async || {
            Ok((house.daemon.metrics().await?.ended("already_signed") > number).then_some(()))
        })
        .await?;
        assert_eq!(found(&house, &tagged).await?, expected, "{context}, pushed again");
    }
    Ok(())
}

#[tokio::test]
async fn ours_stand_beside_them_with_the_fallback_tag() -> Result<()> {
    ours_stand_beside_them(Referrers::FallbackTag).await
}

#[tokio::test]
async fn ours_stand_beside_them_with_the_referrers_api() -> Result<()> {
    ours_stand_beside_them(Referrers::Api).await
}

/// cosign 3 takes any statement by the key for a signature. It is none: "the scan failed" could be stated so.
async fn an_attestation_by_the_witnesss_own_key_attests_nothing_and_stays_where_it_is(kind: Referrers) -> Result<()> {
    let house = House::start(Plan { registry: kind.registry(), ..Plan::default() }).await?;
    let key = KeyPair::import(&house.config_path().with_file_name("release.key.pem")).await?;
    let image = Image::oci("attested")?;
    house.push(&image, "other/app", &["1.0"]).await?;
    let reference = house.reference("other/app", "1.0");
    let pinned = house.reference("other/app", &image.manifest.digest);
    for cosign in [Cosign::V2, Cosign::V3] {
        cosign.attest(&key, &pinned).await?;
    }
    assert!(Cosign::V3.verify(&key.public(), &reference).await?.accepted, "or it was no statement by this key");
    let told = answer(&house, &reference, 1).await?;
    assert_eq!(told["signatures"].as_array().map(Vec::len), Some(0), "{told}");
    assert_eq!(predicates(&told), [PREDICATE], "{told}");

    let mirror = Registry::start_with(kind.registry()).await?;
    mirror.client()?.push(&image, "other/app", &["1.0"]).await?;
    let table = format!("[[registry]]\nname = \"{}\"\nurl = \"{}\"\n\n[[source]]", mirror.host(), mirror.url());
    let rule = format!("[[rule]]\nregistry = \"{}\"\n", house.registry.host());
    house.write_config(&house.config().replacen("[[source]]", &table, 1).replace("[[rule]]\n", &rule))?;
    let there = format!("{}/other/app:1.0", mirror.host());
    let copied = house.run(&["copy-signatures", &reference, &there, "--output", "json"]).await?.expect_code(0)?.json()?;
    assert_eq!(copied["signatures"].as_array().context("no list")?.len(), 0, "{copied}");
    assert_eq!(predicates(&answer(&house, &there, 1).await?), [] as [&Value; 0]);
    Ok(())
}

#[tokio::test]
async fn an_attestation_by_the_witnesss_own_key_attests_nothing_with_the_fallback_tag() -> Result<()> {
    an_attestation_by_the_witnesss_own_key_attests_nothing_and_stays_where_it_is(Referrers::FallbackTag).await
}

#[tokio::test]
async fn an_attestation_by_the_witnesss_own_key_attests_nothing_with_the_referrers_api() -> Result<()> {
    an_attestation_by_the_witnesss_own_key_attests_nothing_and_stays_where_it_is(Referrers::Api).await
}
