//! Many signers at one digest. Registries have no conditional write, so cosign may lose what others wrote in between; countersign
//! never loses what it found or wrote itself.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Result;
use futures::future::try_join_all;
use integration_tests::formats::wait_for;
use integration_tests::house::{House, Keys, Plan, TOKEN, rule};
use integration_tests::image::Image;
use integration_tests::recorder::Recorder;
use integration_tests::signature::{PublicKey, signatures, tag_of};
use integration_tests::verifier::{Cosign, KeyPair, Notation};

const LIMIT: Duration = Duration::from_secs(60);

#[tokio::test]
async fn eight_tags_at_once_are_eight_signatures() -> Result<()> {
    let house = House::start(Plan::default()).await?;
    let tags = ["1", "2", "3", "4", "5", "6", "7", "8"];
    for round in 0..5 {
        let image = Image::oci(&format!("eight {round}"))?;
        let repository = format!("team/app-{round}");
        house.push(&image, &repository, &tags).await?;
        house.wait_signed(&repository, &image.manifest.digest, &tags).await?;
    }
    Ok(())
}

#[tokio::test]
async fn two_rules_and_four_tags_at_once_are_all_there() -> Result<()> {
    let rules = rule("tags", "team", Keys::P256) + "\n" + &rule("digest", "team", Keys::P256) + "signature_type = \"simple\"\n";
    let house = House::start(Plan { rules: Some(rules), ..Plan::default() }).await?;
    let image = Image::oci("two rules")?;
    house.push(&image, "team/app", &["1", "2", "3", "4"]).await?;
    let digest = &image.manifest.digest;
    house.wait_signed("team/app", digest, &["1", "2", "3", "4", digest]).await
}

#[tokio::test]
async fn countersign_beside_four_cosigns_loses_nothing_that_it_found_or_wrote() -> Result<()> {
    let mut house = House::build(Plan::default()).await?;
    let recorder = Recorder::start(&house.registry.host()).await?;
    house.route_registry(&recorder.url())?;
    house.daemon.start().await?;
    let keys = try_join_all((0..4).map(|_| KeyPair::generate())).await?;
    let tags = ["1", "2", "3", "4"];

    for round in 0..4 {
        let image = Image::oci(&format!("beside {round}"))?;
        let (repository, digest) = (format!("team/app-{round}"), &image.manifest.digest);
        house.push(&image, &repository, &[]).await?;
        let reference = house.reference(&repository, digest);
        let cosigns = keys.iter().zip([Cosign::V2, Cosign::V3].into_iter().cycle());
        let cosigns = try_join_all(cosigns.map(|(key, cosign)| cosign.sign(key, &reference)));
        // A cosign needs most of its time to open its key.
        let ours = async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            house.push(&image, &repository, &tags).await
        };
        tokio::try_join!(cosigns, ours)?;

        // cosign may have written over ours after we were done: the same push again puts that right.
        house.registry.wait_delivered(LIMIT).await?;
        house.wait_settled(u64::try_from(5 + round * 9)?, LIMIT).await?;
        house.push(&image, &repository, &tags).await?;
        house.wait_signed(&repository, digest, &tags).await?;
        house.wait_settled(u64::try_from(9 + round * 9)?, LIMIT).await?;

        // The last cosign to write lost nothing of its own; and every signature that is there is somebody's valid one.
        let public_keys = keys.iter().map(|key| PublicKey::from_pem(&std::fs::read_to_string(key.public())?));
        let mut public_keys = public_keys.collect::<Result<Vec<_>>>()?;
        public_keys.push(house.public_key().clone());
        let stored = signatures(&house.client, &repository, digest).await?;
        for signature in &stored {
            assert!(public_keys.iter().any(|key| signature.is_by(key)), "a signature of nobody's: {signature:?}");
        }
        let path = format!("/v2/{repository}/manifests/{}", tag_of(digest));
        recorder.ensure_what_was_found_was_kept(&path, "layers")?;
    }
    Ok(())
}

/// The same for the index under the fallback tag, to which cosign 3 adds its bundles and notation its envelopes; notation also deletes
/// the index that it has replaced.
#[tokio::test]
async fn countersign_in_all_formats_beside_cosign_and_notation_loses_nothing_that_it_found_or_wrote() -> Result<()> {
    const FORMATS: [&str; 4] = ["cosign", "bundle", "notation", "notation-cose"];
    let rules = rule("team", "team", Keys::P256).replace("[\"cosign\"]", &format!("{FORMATS:?}"));
    let mut house = House::build(Plan { rules: Some(rules), ..Plan::default() }).await?;
    let recorder = Recorder::start(&house.registry.host()).await?;
    house.route_registry(&recorder.url())?;
    house.daemon.start().await?;
    let keys = try_join_all((0..2).map(|_| KeyPair::generate())).await?;
    for round in 0..4 {
        let image = Image::oci(&format!("beside all {round}"))?;
        let (repository, digest) = (format!("team/app-{round}"), &image.manifest.digest);
        house.push(&image, &repository, &[]).await?;
        let reference = house.reference(&repository, digest);
        let full = format!("{}/{repository}", house.registry.host());
        let notations = try_join_all((0..2).map(|_| Notation::signing(&full))).await?;
        let cosigns = try_join_all(keys.iter().map(|key| Cosign::sign_bundle(key, &reference)));
        let notations = try_join_all(notations.iter().map(|notation| notation.sign(&reference, true)));
        // They need most of their time to start and to open their keys: ours goes on until they have written.
        let done = AtomicBool::new(false);
        let theirs = async {
            tokio::try_join!(cosigns, notations)?;
            done.store(true, Ordering::SeqCst);
            Ok(())
        };
        let ours = async {
            for tag in 0.. {
                house.push(&image, &repository, &[&tag.to_string()]).await?;
                if done.load(Ordering::SeqCst) {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            anyhow::Ok(())
        };
        tokio::try_join!(theirs, ours)?;
        house.registry.wait_delivered(LIMIT).await?;
        house.wait_settled(1, LIMIT).await?;

        // They may have written over ours after we were done: the same push again puts that right.
        house.push(&image, &repository, &["0"]).await?;
        // What verifies goes the same way, and is not to be taken for the daemon.
        house.registry.wait_delivered(LIMIT).await?;
        house.wait_settled(1, LIMIT).await?;
        wait_for(&house, &house.reference(&repository, "0"), &FORMATS).await?;
        let cosign = Cosign::V3.verify(&house.public_key_path(), &reference).await?;
        assert!(cosign.accepted, "round {round}: {}", cosign.words);
        let notation = Notation::trusting_witness(&house, "*").await?.verify(&reference).await?;
        assert!(notation.accepted, "round {round}: {}", notation.words);
        let signatures = tag_of(digest);
        for (tag, list) in [(signatures.as_str(), "layers"), (signatures.trim_end_matches(".sig"), "manifests")] {
            recorder.ensure_what_was_found_was_kept(&format!("/v2/{repository}/manifests/{tag}"), list)?;
        }
    }
    let metrics = house.wait_settled(1, LIMIT).await?;
    assert_eq!(metrics.ended("dead"), 0, "{metrics:?}");
    Ok(())
}

/// docker-registry announces a push just before it lets the tag point to it.
#[tokio::test]
async fn an_event_that_is_faster_than_its_tag_signs_the_tag() -> Result<()> {
    let house = House::start_quiet(None).await?;
    let (old, new) = (Image::oci("old")?, Image::oci("new")?);
    house.push(&old, "team/moved", &["1.0"]).await?;
    for repository in ["team/new", "team/moved"] {
        house.push(&new, repository, &[]).await?;
    }
    for repository in ["team/new", "team/moved"] {
        let event = House::event(&house.registry.host(), repository, Some("1.0"), &new.manifest.digest);
        house.notify(Some(TOKEN), &event).await?;
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    for repository in ["team/new", "team/moved"] {
        house.push(&new, repository, &["1.0"]).await?;
    }
    for repository in ["team/new", "team/moved"] {
        house.wait_signed(repository, &new.manifest.digest, &["1.0"]).await?;
    }
    Ok(())
}
