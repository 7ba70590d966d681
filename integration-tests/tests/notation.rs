//! Notation's signatures as the daemon writes them, beside `.sig` tags, bundles and notation's own, in a registry that lists
//! referrers itself and in one that does not.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use integration_tests::daemon;
use integration_tests::formats::{Referrers, found, listed, ours, wait_for};
use integration_tests::house::{House, Keys, Plan};
use integration_tests::image::Image;
use integration_tests::process::eventually;
use integration_tests::verifier::{Cosign, Notation, Ruling};

/// A rule; RSA keys sign by the first of these algorithms that these formats take.
fn rule(name: &str, scope: &str, keys: Keys, formats: &[&str]) -> String {
    let algorithm = match keys {
        Keys::Rsa2048 if formats.contains(&"notation") || formats.contains(&"notation-cose") => "RSA_PSS_SHA_256",
        _ => keys.algorithm(),
    };
    format!(
        "[[rule]]\nname = \"{name}\"\nscope = \"{scope}\"\nwitness = \"release\"\nalgorithm = \"{algorithm}\"\n\
         formats = {formats:?}\n"
    )
}

fn plan(kind: Referrers, keys: Keys) -> Plan {
    let rules = rule("usual", "team", keys, &["cosign", "bundle"])
        + &rule("jws", "team/jws", keys, &["notation"])
        + &rule("cose", "team/cose", keys, &["notation-cose"]);
    Plan { keys, registry: kind.registry(), rules: Some(rules), ..Plan::default() }
}

fn accepts(ruling: &Ruling, context: &str) {
    assert!(ruling.accepted, "{context}: {}", ruling.words);
}

async fn every_judge_accepts(kind: Referrers, keys: Keys) -> Result<()> {
    let house = House::start(plan(kind, keys)).await?;
    for (repository, format) in [("team/jws", "notation"), ("team/cose", "notation-cose")] {
        let context = format!("{kind:?} {keys:?} {format}");
        let image = Image::index(repository)?;
        kind.push(&house, &image, repository, "1.0").await?;
        let (tagged, pinned) = (house.reference(repository, "1.0"), house.reference(repository, &image.manifest.digest));
        wait_for(&house, &tagged, &["bundle", "cosign", format]).await?;
        let (notation, key) = (Notation::trusting_witness(&house, "*").await?, house.public_key_path());
        for reference in [&tagged, &pinned] {
            accepts(&notation.verify(reference).await?, &context);
            for cosign in [Cosign::V2, Cosign::V3] {
                accepts(&cosign.verify(&key, reference).await?, &context);
            }
            assert_eq!(found(&house, reference).await?, [ours("bundle"), ours("cosign"), ours(format)], "{context}");
        }
        // A platform is not signed for those who resolve the tag.
        let platform = house.reference(repository, &image.child("amd64").digest);
        assert_eq!(found(&house, &platform).await?, [ours("cosign")], "{context}");
        let stranger = Notation::signing(&format!("{}/{repository}", house.registry.host())).await?;
        let ruling = stranger.verify(&tagged).await?;
        assert!(!ruling.accepted && ruling.words.contains("trusted certificate"), "{context}: {}", ruling.words);

        // Where there is no ledger, the key decides alone: on the command line as in admission.
        let folder = house.config_path().with_file_name("elsewhere");
        fs::create_dir_all(&folder)?;
        let policy = format!(
            "\n[[policy]]\nname = \"team\"\nwitnesses = [\"release\"]\nnamespaces = [\"default\"]\nenabled = true\n\
             formats = [\"{format}\"]\n"
        );
        let config = house.config().replacen("/state\"", "/nowhere\"", 1) + &policy;
        let path = house.config_path().with_file_name("without.toml");
        fs::write(&path, config)?;
        let pod = folder.join("pod.yaml");
        let yaml = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: app}}\nspec: {{containers: [{{name: app, image: \"{pinned}\"}}]}}\n"
        );
        fs::write(&pod, yaml)?;
        let (path, pod) = (path.to_str().context("no text")?, pod.to_str().context("no text")?);
        let answer = daemon::run(&["verify", &pinned, "--output", "json", "--config", path], &[]).await?.expect_code(0)?;
        assert_eq!(listed(&answer.json()?)?, [ours("bundle"), ours("cosign"), ours(format)], "{context}");
        daemon::run(&["verify", "-f", pod, "--config", path], &[]).await?.expect_code(0)?;
        let other = if format == "notation" { "notation-cose" } else { "notation" };
        fs::write(
            path,
            fs::read_to_string(path)?.replace(&policy, &policy.replace(&format!("\"{format}\""), &format!("\"{other}\""))),
        )?;
        daemon::run(&["verify", "-f", pod, "--config", path], &[]).await?.expect_code(1)?;
    }
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

/// notation before us, after us, and both verify; ours is not made again for it.
async fn signatures_of_notations_stand_beside_ours(kind: Referrers) -> Result<()> {
    let house = House::start(plan(kind, Keys::Rsa2048)).await?;
    for (name, notation_first) in [("after", false), ("before", true)] {
        let image = Image::oci(name)?;
        let repository = format!("team/jws/{name}");
        let pinned = house.reference(&repository, &image.manifest.digest);
        let theirs = Notation::signing(&format!("{}/{repository}", house.registry.host())).await?;
        if notation_first {
            house.push(&image, &repository, &[]).await?;
            theirs.sign(&pinned, kind == Referrers::FallbackTag).await?;
        }
        kind.push(&house, &image, &repository, "1.0").await?;
        wait_for(&house, &house.reference(&repository, "1.0"), &["bundle", "cosign", "notation"]).await?;
        if !notation_first {
            theirs.sign(&pinned, kind == Referrers::FallbackTag).await?;
        }
        kind.push(&house, &image, &repository, "1.0").await?;
        kind.push(&house, &image, &repository, "2.0").await?;
        wait_for(&house, &house.reference(&repository, "2.0"), &["bundle", "cosign", "notation"]).await?;
        let context = format!("{kind:?}, notation {name}");
        let judge = Notation::trusting_witness(&house, "*").await?;
        for notation in [&judge, &theirs] {
            accepts(&notation.verify(&pinned).await?, &context);
            let list = notation.list(&pinned).await?;
            assert_eq!(list.words.matches("sha256:").count(), 1 + 2, "{context}: {}", list.words);
        }
        accepts(&Cosign::V3.verify(&house.public_key_path(), &pinned).await?, &context);
        let found = found(&house, &pinned).await?;
        let notations: Vec<_> = found.into_iter().filter(|(format, ..)| format == "notation").collect();
        assert_eq!(notations, [("notation".into(), "rejected".into(), "nobody".into()), ours("notation")], "{context}");
    }
    Ok(())
}

#[tokio::test]
async fn signatures_of_notations_stand_beside_ours_with_the_fallback_tag() -> Result<()> {
    signatures_of_notations_stand_beside_ours(Referrers::FallbackTag).await
}

#[tokio::test]
async fn signatures_of_notations_stand_beside_ours_with_the_referrers_api() -> Result<()> {
    signatures_of_notations_stand_beside_ours(Referrers::Api).await
}

#[tokio::test]
async fn a_signature_counts_for_as_long_as_its_rule_says_and_is_made_again_after_that() -> Result<()> {
    let rules = rule("ending", "team", Keys::P256, &["notation", "notation-cose"]) + "expiry = \"40s\"\n";
    // Another rule that wants the same for longer.
    let rules = rules + "\n" + &rule("lasting", "team", Keys::P256, &["notation"]) + "expiry = \"90d\"\n";
    let house = House::start(Plan { rules: Some(rules), ..Plan::default() }).await?;
    let (image, repository) = (Image::oci("ending")?, "team/ending");
    let (tagged, notation) = (house.reference(repository, "1.0"), Notation::trusting_witness(&house, "*").await?);
    let both = [ours("notation"), ours("notation-cose")];
    for _ in 0..2 {
        house.push(&image, repository, &["1.0"]).await?;
        wait_for(&house, &tagged, &["notation", "notation-cose"]).await?;
        accepts(&notation.verify(&tagged).await?, "before they end");
        eventually("they end", Duration::from_secs(120), async || {
            let found = found(&house, &tagged).await?;
            Ok((!both.iter().any(|one| found.contains(one))).then_some(()))
        })
        .await?;
        let answer = house.run(&["verify", &tagged, "--output", "json"]).await?.expect_code(1)?.stdout;
        assert!(answer.contains("signature_expired"), "{answer}");
        let ruling = notation.verify(&tagged).await?;
        assert!(!ruling.accepted && ruling.words.contains("expired"), "{}", ruling.words);
    }
    Ok(())
}
