//! Notation's signatures as the daemon writes them, beside `.sig` tags, bundles and notation's own, in a registry that lists
//! referrers itself and in one that does not.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use integration_tests::daemon;
use integration_tests::formats::{Referrers, found, listed, ours, wait_for};
use integration_tests::house::{House, Keys, Plan};
use integration_tests::image::Image;
use integration_tests::registry::Options;
use integration_tests::verifier::{Cosign, Notation, Ruling};

const LIMIT: Duration = Duration::from_secs(60);

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

async fn judge(house: &House, repository: &str) -> Result<Notation> {
    Notation::trusting_witness(house, &format!("{}/{repository}", house.registry.host())).await
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
        let (notation, key) = (judge(&house, repository).await?, house.public_key_path());
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
        let judge = judge(&house, &repository).await?;
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
async fn a_notation_signature_costs_as_many_requests_as_the_readme_says() -> Result<()> {
    let registry = Options { count_requests: true, ..Options::default() };
    let rules = Some(rule("jws", "team", Keys::P256, &["notation"]));
    let house = House::start(Plan { registry, rules, ..Plan::default() }).await?;
    let count = || anyhow::Ok(house.registry.count_requests("countersign/")?.values().sum::<usize>());
    let mut before = count()?;
    // What a repository needs once (the config), and the registry (whether it has the API), comes with the first.
    for (name, tag, expected) in [("first", "1", 8 + 2 + 1), ("second", "2", 8), ("second", "2", 4)] {
        let image = Image::oci(name)?;
        house.push(&image, "team/app", &[tag]).await?;
        house.registry.wait_delivered(LIMIT).await?;
        house.wait_settled(1, LIMIT).await?;
        let now = count()?;
        assert_eq!(now - before, expected, "{name}: {:?}", house.registry.requests()?);
        before = now;
    }
    Ok(())
}
