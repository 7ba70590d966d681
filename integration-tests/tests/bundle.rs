//! Bundles, beside `.sig` tags and beside cosign's own, in a registry that lists referrers itself and in one that does not.

use std::time::Duration;

use anyhow::Result;
use integration_tests::formats::{Referrers, found, ours, wait_for};
use integration_tests::house::{House, Keys, Plan, rule_of_all_formats};
use integration_tests::image::Image;
use integration_tests::signature::tag_of;
use integration_tests::verifier::{Cosign, KeyPair, Skopeo};
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(60);

const BOTH: [&str; 2] = ["bundle", "cosign"];

fn plan(kind: Referrers, keys: Keys) -> Plan {
    Plan { keys, registry: kind.registry(), rules: Some(rule_of_all_formats("team", "team", keys)), ..Plan::default() }
}

async fn every_judge_accepts(kind: Referrers, keys: Keys) -> Result<()> {
    let house = House::start(plan(kind, keys)).await?;
    let image = Image::index("judged")?;
    kind.push(&house, &image, "team/app", "1.0").await?;
    let (tagged, pinned) = (house.reference("team/app", "1.0"), house.reference("team/app", &image.manifest.digest));
    wait_for(&house, &tagged, &BOTH).await?;
    let key = house.public_key_path();
    for reference in [&tagged, &pinned] {
        for cosign in [Cosign::V2, Cosign::V3] {
            let ruling = cosign.verify(&key, reference).await?;
            assert!(ruling.accepted, "{kind:?}: {cosign:?} refuses {reference}: {}", ruling.words);
        }
        let ruling = Skopeo::requiring(&key, &house.registry.host())?.architecture("amd64").copy(reference).await?;
        assert!(ruling.accepted, "{kind:?}: skopeo refuses {reference}: {}", ruling.words);
        assert_eq!(found(&house, reference).await?, BOTH.map(ours));
    }
    // A platform's manifest is signed under its tag, and is not bundled.
    let platform = house.reference("team/app", &image.child("amd64").digest);
    assert_eq!(found(&house, &platform).await?, [ours("cosign")]);
    assert!(Cosign::V3.verify(&key, &platform).await?.accepted);

    // The bundle by itself: cosign 3 asks for nothing else, and the others see nothing.
    let empty = json!({"schemaVersion": 2, "mediaType": integration_tests::image::OCI_MANIFEST, "config": {
        "mediaType": "application/vnd.oci.image.config.v1+json", "size": 2,
        "digest": "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}, "layers": []});
    let empty = integration_tests::image::Manifest::new(integration_tests::image::OCI_MANIFEST, empty.to_string());
    house.client.put_manifest("team/app", &tag_of(&image.manifest.digest), &empty).await?;
    let ruling = Cosign::V3.verify(&key, &tagged).await?;
    assert!(ruling.accepted, "{kind:?}: cosign 3 refuses the bundle: {}", ruling.words);
    assert!(!Cosign::V2.verify(&key, &tagged).await?.accepted);
    house.run(&["verify", &tagged]).await?.expect_code(0)?;

    // Nobody else's key.
    let other = KeyPair::generate().await?;
    assert!(!Cosign::V3.verify(&other.public(), &tagged).await?.accepted);
    Ok(())
}

#[tokio::test]
async fn every_judge_accepts_with_the_fallback_tag() -> Result<()> {
    every_judge_accepts(Referrers::FallbackTag, Keys::P256).await?;
    every_judge_accepts(Referrers::FallbackTag, Keys::Rsa2048).await
}

#[tokio::test]
async fn every_judge_accepts_with_the_referrers_api() -> Result<()> {
    every_judge_accepts(Referrers::Api, Keys::P256).await?;
    every_judge_accepts(Referrers::Api, Keys::Rsa2048).await
}

/// cosign 3 before us, after us, and both verify; ours is not made again for it.
async fn bundles_of_cosigns_stand_beside_ours(kind: Referrers) -> Result<()> {
    let house = House::start(plan(kind, Keys::P256)).await?;
    let theirs = KeyPair::generate().await?;
    for (name, cosign_first) in [("after", false), ("before", true)] {
        let image = Image::oci(name)?;
        let repository = format!("team/{name}");
        let reference = house.reference(&repository, "1.0");
        if cosign_first {
            house.push(&image, &repository, &[]).await?;
            Cosign::sign_bundle(&theirs, &house.reference(&repository, &image.manifest.digest)).await?;
        }
        kind.push(&house, &image, &repository, "1.0").await?;
        wait_for(&house, &reference, &BOTH).await?;
        if !cosign_first {
            Cosign::sign_bundle(&theirs, &reference).await?;
        }
        kind.push(&house, &image, &repository, "1.0").await?;
        kind.push(&house, &image, &repository, "2.0").await?;
        wait_for(&house, &house.reference(&repository, "2.0"), &BOTH).await?;
        for key in [house.public_key_path(), theirs.public()] {
            let ruling = Cosign::V3.verify(&key, &reference).await?;
            assert!(ruling.accepted, "{kind:?}, cosign {name}: {}", ruling.words);
        }
        let found = found(&house, &reference).await?;
        let bundles: Vec<_> =
            found.iter().filter(|(format, ..)| format == "bundle").map(|(_, verdict, by)| (&**verdict, &**by)).collect();
        assert_eq!(bundles, [("rejected", "nobody"), ("verified", "release")], "{kind:?}, cosign {name}");
    }
    Ok(())
}

#[tokio::test]
async fn bundles_of_cosigns_stand_beside_ours_with_the_fallback_tag() -> Result<()> {
    bundles_of_cosigns_stand_beside_ours(Referrers::FallbackTag).await
}

#[tokio::test]
async fn bundles_of_cosigns_stand_beside_ours_with_the_referrers_api() -> Result<()> {
    bundles_of_cosigns_stand_beside_ours(Referrers::Api).await
}

#[tokio::test]
async fn what_we_write_comes_back_as_events_and_is_not_signed() -> Result<()> {
    let rules = rule_of_all_formats("team", "team", Keys::P256) + "untagged = true\n";
    let house = House::start(Plan { rules: Some(rules), ..Plan::default() }).await?;
    let image = Image::oci("no loop")?;
    house.push(&image, "team/app", &["1.0"]).await?;
    wait_for(&house, &house.reference("team/app", "1.0"), &BOTH).await?;
    // Each wave of events may cause writes, and each of those an event: after some rounds of both it would be seen.
    for _ in 0..3 {
        house.registry.wait_delivered(LIMIT).await?;
        house.wait_settled(1, LIMIT).await?;
    }
    let metrics = house.wait_settled(1, LIMIT).await?;
    assert_eq!((metrics.ended("signed"), metrics.ended("already_signed"), metrics.ended("dead")), (1, 0, 0), "{metrics:?}");
    let mut tags = house.client.tags("team/app").await?;
    tags.sort();
    let signatures = tag_of(&image.manifest.digest);
    assert_eq!(tags, ["1.0", signatures.trim_end_matches(".sig"), &signatures]);
    let explained = house.run(&["explain", &house.reference("team/app", "1.0")]).await?.expect_code(0)?.stdout;
    for words in ["ok: cosign signature", "ok: bundle signature"] {
        assert!(explained.contains(words), "{explained}");
    }
    Ok(())
}
