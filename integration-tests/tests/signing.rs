//! What countersign signs, stock verifiers accept; what it did not sign, or what was changed afterwards, they refuse.

use anyhow::Result;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures::future::try_join_all;
use integration_tests::house::{House, Keys, Plan, rule};
use integration_tests::image::{self, Image, Manifest};
use integration_tests::registry::Options;
use integration_tests::signature::{signatures, tag_of};
use integration_tests::verifier::{Cosign, Ruling, Skopeo};
use serde_json::Value;

/// What each judge says of each reference: (judge, reference, ruling).
async fn rulings(house: &House, references: &[String]) -> Result<Vec<(String, String, Ruling)>> {
    let key = house.public_key_path();
    let mut trials = Vec::new();
    for reference in references {
        for cosign in [Cosign::V2, Cosign::V3] {
            let key = key.clone();
            let trial =
                async move { anyhow::Ok((format!("{cosign:?}"), reference.clone(), cosign.verify(&key, reference).await?)) };
            trials.push(Box::pin(trial) as std::pin::Pin<Box<dyn Future<Output = _>>>);
        }
        for architecture in ["amd64", "arm64"] {
            let skopeo = Skopeo::requiring(&key, &house.registry.host())?.architecture(architecture);
            let trial = async move {
                let ruling = skopeo.copy(reference).await?;
                Ok((format!("skopeo for {architecture}"), reference.clone(), ruling))
            };
            trials.push(Box::pin(trial));
        }
    }
    try_join_all(trials).await
}

async fn all_accept(house: &House, references: &[String]) -> Result<()> {
    for (judge, reference, ruling) in rulings(house, references).await? {
        assert!(ruling.accepted, "{judge} refuses {reference}: {}", ruling.words);
    }
    for reference in references {
        house.run(&["verify", reference]).await?.expect_code(0)?;
    }
    Ok(())
}

async fn all_refuse(house: &House, references: &[String]) -> Result<()> {
    for (judge, reference, ruling) in rulings(house, references).await? {
        assert!(!ruling.accepted, "{judge} accepts {reference}: {}", ruling.words);
    }
    for reference in references {
        house.run(&["verify", reference]).await?.expect_code(1)?;
    }
    Ok(())
}

async fn an_index_with_two_tags_is_accepted(keys: Keys) -> Result<()> {
    let house = House::start(Plan { keys, ..Plan::default() }).await?;
    let image = Image::index("accepted")?;
    house.push(&image, "team/app", &["1.0", "latest"]).await?;
    for manifest in [&image.manifest, image.child("amd64"), image.child("arm64")] {
        house.wait_signed("team/app", &manifest.digest, &["1.0", "latest"]).await?;
    }
    assert!(house.signed("team/app", &image.child("attestation").digest).await?.is_empty());
    let references = ["1.0", "latest", &image.manifest.digest].map(|reference| house.reference("team/app", reference));
    all_accept(&house, &references).await
}

#[tokio::test]
async fn an_index_with_two_tags_is_accepted_with_p256() -> Result<()> {
    an_index_with_two_tags_is_accepted(Keys::P256).await
}

#[tokio::test]
async fn an_index_with_two_tags_is_accepted_with_rsa() -> Result<()> {
    an_index_with_two_tags_is_accepted(Keys::Rsa2048).await
}

#[tokio::test]
async fn every_kind_of_image_is_accepted() -> Result<()> {
    let house = House::start(Plan::default()).await?;
    let single = [("oci", Image::oci("one")?), ("docker", Image::docker("two")?)];
    let several = [("list", Image::docker_list("three")?), ("nested", Image::nested_index("four")?)];
    for (tag, image) in single.iter().chain(&several) {
        house.push(image, "team/kinds", &[tag]).await?;
    }
    for (tag, image) in single.iter().chain(&several) {
        house.wait_signed("team/kinds", &image.manifest.digest, &[tag]).await?;
    }
    let (_, nested) = &several[1];
    for child in ["index", "amd64", "arm64", "s390x"] {
        house.wait_signed("team/kinds", &nested.child(child).digest, &["nested"]).await?;
    }
    // skopeo takes an image of one platform for every platform.
    all_accept(&house, &["oci", "docker", "list"].map(|tag| house.reference("team/kinds", tag))).await
}

#[tokio::test]
async fn an_image_that_no_rule_covers_is_refused_and_said_to_be_unsigned() -> Result<()> {
    let house = House::start(Plan::default()).await?;
    let image = Image::index("uncovered")?;
    house.push(&image, "teams/app", &["1.0"]).await?;
    // Its index and two platforms; that of the attestation is not taken in.
    let metrics = house.wait_settled(3, std::time::Duration::from_secs(60)).await?;
    assert_eq!((metrics.ended("skipped"), metrics.ended("signed")), (3, 0));
    assert_eq!(house.client.tags("teams/app").await?, ["1.0"]);
    let reference = house.reference("teams/app", "1.0");
    let explained = house.run(&["explain", &reference]).await?.expect_code(0)?;
    assert!(explained.stdout.contains("no rule"), "{explained:?}");
    all_refuse(&house, &[reference, house.reference("teams/app", &image.manifest.digest)]).await
}

#[tokio::test]
async fn tampered_signatures_are_refused() -> Result<()> {
    let house = House::start(Plan::default()).await?;
    let (signed, target) = (Image::oci("signed")?, Image::oci("target")?);
    house.push(&signed, "team/app", &["1.0"]).await?;
    house.wait_signed("team/app", &signed.manifest.digest, &["1.0"]).await?;
    let genuine = house.client.manifest("team/app", &tag_of(&signed.manifest.digest)).await?.unwrap();

    // The signature of another image.
    house.push(&target, "other/borrowed", &["1.0"]).await?;
    copy_signature(&house, &genuine, &target, "other/borrowed", |payload| payload).await?;

    // The same with the payload changed to name this image, which the signature does not cover.
    house.push(&target, "other/rewritten", &["1.0"]).await?;
    copy_signature(&house, &genuine, &target, "other/rewritten", |payload| {
        let payload = payload.replace(&signed.manifest.digest, &target.manifest.digest);
        payload.replace("team/app", "other/rewritten")
    })
    .await?;

    let repositories = ["other/borrowed", "other/rewritten"];
    for repository in repositories {
        assert_eq!(signatures(&house.client, repository, &target.manifest.digest).await?.len(), 1);
    }
    all_refuse(&house, &repositories.map(|repository| house.reference(repository, "1.0"))).await
}

/// Puts a copy of the `.sig` manifest where verifiers look for the target's, with its payload changed.
async fn copy_signature(
    house: &House,
    genuine: &Manifest,
    target: &Image,
    repository: &str,
    change: impl Fn(String) -> String,
) -> Result<()> {
    let mut manifest: Value = serde_json::from_slice(&genuine.bytes)?;
    let config = manifest["config"]["digest"].as_str().unwrap().to_owned();
    house.client.push_blob(repository, &house.client.blob("team/app", &config).await?).await?;
    let payload = house.client.blob("team/app", manifest["layers"][0]["digest"].as_str().unwrap()).await?;
    let payload = Bytes::from(change(String::from_utf8(payload.to_vec())?));
    house.client.push_blob(repository, &payload).await?;
    manifest["layers"][0]["digest"] = image::digest(&payload).into();
    manifest["layers"][0]["size"] = payload.len().into();
    let manifest = Manifest::new(&genuine.media_type, manifest.to_string());
    house.client.put_manifest(repository, &tag_of(&target.manifest.digest), &manifest).await
}

#[tokio::test]
async fn one_flipped_bit_in_the_signature_is_refused() -> Result<()> {
    let house = House::start(Plan::default()).await?;
    let signed = Image::oci("flipped")?;
    house.push(&signed, "team/app", &["1.0"]).await?;
    house.wait_signed("team/app", &signed.manifest.digest, &["1.0"]).await?;
    house.daemon.signal(rustix::process::Signal::STOP)?;

    let tag = tag_of(&signed.manifest.digest);
    let genuine = house.client.manifest("team/app", &tag).await?.unwrap();
    let mut manifest: Value = serde_json::from_slice(&genuine.bytes)?;
    let signature = &mut manifest["layers"][0]["annotations"]["dev.cosignproject.cosign/signature"];
    let mut bytes = STANDARD.decode(signature.as_str().unwrap())?;
    *bytes.last_mut().unwrap() ^= 1;
    *signature = STANDARD.encode(bytes).into();
    house.client.put_manifest("team/app", &tag, &Manifest::new(&genuine.media_type, manifest.to_string())).await?;

    all_refuse(&house, &[house.reference("team/app", "1.0")]).await
}

#[tokio::test]
async fn a_tag_that_was_moved_behind_countersigns_back_is_refused() -> Result<()> {
    let mut house = House::start(Plan::default()).await?;
    let (old, new) = (Image::oci("old")?, Image::oci("new")?);
    house.push(&old, "team/app", &["1.0"]).await?;
    house.push(&new, "team/app", &["2.0"]).await?;
    house.wait_signed("team/app", &old.manifest.digest, &["1.0"]).await?;
    house.wait_signed("team/app", &new.manifest.digest, &["2.0"]).await?;
    house.daemon.kill()?;

    // To an image that nobody signed: everybody refuses.
    house.push(&Image::oci("evil")?, "team/app", &["1.0"]).await?;
    let moved = house.reference("team/app", "1.0");
    for (judge, reference, ruling) in rulings(&house, std::slice::from_ref(&moved)).await? {
        assert!(!ruling.accepted, "{judge} accepts {reference}: {}", ruling.words);
    }

    // To one that was signed under another tag: those who read the reference refuse. cosign does not read it.
    house.client.put_manifest("team/app", "2.0", &old.manifest).await?;
    let rolled_back = house.reference("team/app", "2.0");
    for (judge, reference, ruling) in rulings(&house, &[rolled_back]).await? {
        assert_eq!(ruling.accepted, judge.starts_with('V'), "{judge} on {reference}: {}", ruling.words);
    }
    Ok(())
}

#[tokio::test]
async fn a_tag_that_moves_is_signed_for_what_it_points_to_now() -> Result<()> {
    let house = House::start(Plan::default()).await?;
    let (old, new) = (Image::oci("before")?, Image::oci("after")?);
    house.push(&old, "team/app", &["latest"]).await?;
    house.wait_signed("team/app", &old.manifest.digest, &["latest"]).await?;
    house.push(&new, "team/app", &["latest"]).await?;
    house.wait_signed("team/app", &new.manifest.digest, &["latest"]).await?;
    all_accept(&house, &[house.reference("team/app", "latest")]).await
}

#[tokio::test]
async fn a_simple_signature_names_the_digest_and_holds_wherever_the_image_goes() -> Result<()> {
    let rules = rule("team", "team", Keys::P256) + "signature_type = \"simple\"\n";
    let house = House::start(Plan { rules: Some(rules), ..Plan::default() }).await?;
    let image = Image::oci("simple")?;
    house.push(&image, "team/app", &["1.0", "2.0"]).await?;
    house.wait_signed("team/app", &image.manifest.digest, &[&image.manifest.digest]).await?;
    let by_digest = house.reference("team/app", &image.manifest.digest);
    all_accept(&house, std::slice::from_ref(&by_digest)).await?;
    // skopeo wants the tag in the signature when it pulls by tag; cosign does not.
    for (judge, reference, ruling) in rulings(&house, &[house.reference("team/app", "1.0")]).await? {
        assert_eq!(ruling.accepted, judge.starts_with('V'), "{judge} on {reference}: {}", ruling.words);
    }
    Ok(())
}

#[tokio::test]
async fn the_same_push_again_adds_nothing_and_signatures_are_not_signed() -> Result<()> {
    let house = House::start(Plan::default()).await?;
    let image = Image::oci("again")?;
    house.push(&image, "team/app", &["1.0"]).await?;
    house.wait_signed("team/app", &image.manifest.digest, &["1.0"]).await?;
    for _ in 0..3 {
        house.push(&image, "team/app", &["1.0"]).await?;
    }
    let metrics = house.wait_settled(4, std::time::Duration::from_secs(60)).await?;
    assert_eq!((metrics.ended("signed"), metrics.ended("already_signed")), (1, 3));
    assert_eq!(house.signed("team/app", &image.manifest.digest).await?, [house.reference("team/app", "1.0")]);
    let mut tags = house.client.tags("team/app").await?;
    tags.sort();
    assert_eq!(tags, ["1.0".to_owned(), tag_of(&image.manifest.digest)]);
    Ok(())
}

#[tokio::test]
async fn several_rules_each_sign_and_their_filters_hold() -> Result<()> {
    let rules = rule("versions", "team", Keys::P256)
        + "tags = [\"v*\"]\nexclude = [\"team/scratch/**\"]\n\n"
        + &rule("digests", "team/app", Keys::P256)
        + "signature_type = \"simple\"\n\n"
        + &rule("off", "off", Keys::P256)
        + "enabled = false\n\n"
        + &rule("manual", "manual", Keys::P256)
        + "trigger = \"manual\"\n\n"
        + &rule("later", "later", Keys::P256)
        + "created = 2999-01-01T00:00:00Z\n";
    let house = House::start(Plan { rules: Some(rules), ..Plan::default() }).await?;
    let image = Image::oci("filters")?;
    let digest = image.manifest.digest.as_str();
    let places = [
        ("team/app", "v1"),
        ("team/other", "latest"),
        ("team/scratch/x", "v1"),
        ("off/x", "v1"),
        ("manual/x", "v1"),
        ("later/x", "v1"),
    ];
    for (repository, tag) in places {
        house.push(&image, repository, &[tag]).await?;
    }
    house.wait_signed("team/app", digest, &["v1", digest]).await?;
    let metrics = house.wait_settled(6, std::time::Duration::from_secs(60)).await?;
    assert_eq!((metrics.ended("signed"), metrics.ended("skipped")), (1, 5));
    for (repository, _) in &places[1..] {
        assert!(house.signed(repository, digest).await?.is_empty(), "{repository} was signed");
    }
    house.run(&["sign", &house.reference("manual/x", "v1")]).await?.expect_code(0)?;
    assert_eq!(house.signed("manual/x", digest).await?, [house.reference("manual/x", "v1")]);
    Ok(())
}

#[tokio::test]
async fn a_registry_that_asks_for_a_login_is_signed_in_and_the_password_is_not_printed() -> Result<()> {
    let house = House::start(Plan { registry: Options { login: true, ..Options::default() }, ..Plan::default() }).await?;
    let image = Image::oci("login")?;
    house.push(&image, "team/app", &["1.0"]).await?;
    house.wait_signed("team/app", &image.manifest.digest, &["1.0"]).await?;
    let logged = house.daemon.logged();
    for secret in [integration_tests::house::TOKEN, "tester:tester", &STANDARD.encode("tester:tester")] {
        assert!(!logged.contains(secret), "the log holds {secret}");
    }
    Ok(())
}
