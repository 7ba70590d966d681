//! Notation's signatures as the daemon writes them, beside `.sig` tags, bundles and notation's own, in a registry that lists
//! referrers itself and in one that does not.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use integration_tests::authority::Authority;
use integration_tests::daemon;
use integration_tests::formats::{Referrers, found, listed, ours, wait_for};
use integration_tests::house::{House, Keys, Plan};
use integration_tests::image::Image;
use integration_tests::keys::in_openbao;
use integration_tests::openbao::OpenBao;
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

/// A house whose witness has its key in OpenBao, with this certificate for it, that signs for notation.
async fn certified(bao: &OpenBao, keys: Keys, authority: &Authority, subject: &str) -> Result<House> {
    let (plan, _) = in_openbao(bao, keys).await?;
    let rules = rule("team", "team", keys, &["notation", "notation-cose"]);
    let house = House::build(Plan { rules: Some(rules), ..plan }).await?;
    fs::write(house.config_path().with_file_name("chain.pem"), authority.chain(&house.public_key_path(), subject)?)?;
    let witness = "[[witness]]\nname = \"release\"\n";
    house.write_config(&house.config().replace(witness, &format!("{witness}certificate = \"chain.pem\"\n")))?;
    Ok(house)
}

const SUBJECT: &str = "/C=DE/ST=Berlin/O=Example/CN=signing";

#[tokio::test]
async fn what_the_daemon_signs_under_an_administrators_chain_is_accepted_by_its_root() -> Result<()> {
    let (authority, other) = (Authority::new()?, Authority::new()?);
    for keys in [Keys::P256, Keys::Rsa2048] {
        let bao = OpenBao::start().await?;
        let mut house = certified(&bao, keys, &authority, SUBJECT).await?;
        house.daemon.start().await?;
        let image = Image::index("chained")?;
        house.push(&image, "team/app", &["1.0"]).await?;
        let tagged = house.reference("team/app", "1.0");
        wait_for(&house, &tagged, &["notation", "notation-cose"]).await?;
        let identity = "x509.subject: C=DE, ST=Berlin, O=Example, CN=signing";
        accepts(&Notation::trusting(&authority.root()?, identity, "*")?.verify(&tagged).await?, "by its root");
        accepts(&Notation::trusting_witness(&house, "*").await?.verify(&tagged).await?, "by what we say of it");
        let ruling = Notation::trusting(&other.root()?, "*", "*")?.verify(&tagged).await?;
        assert!(!ruling.accepted && ruling.words.contains("any trusted certificate"), "{}", ruling.words);
        house.run(&["verify", &tagged]).await?.expect_code(0)?;
        assert!(!house.daemon.logged().contains("the certificate's subject"), "{}", house.daemon.logged());
    }
    Ok(())
}

/// By us as by notation: the root answers for both. What the key certified itself before counts on, too.
#[tokio::test]
async fn signatures_from_before_a_certificate_was_renewed_count_on() -> Result<()> {
    let (authority, other) = (Authority::new()?, Authority::new()?);
    let bao = OpenBao::start().await?;
    let (plan, _) = in_openbao(&bao, Keys::P256).await?;
    let rules = rule("team", "team", Keys::P256, &["notation"]);
    let mut house = House::build(Plan { rules: Some(rules), ..plan }).await?;
    let (certificate, public) = (house.config_path().with_file_name("chain.pem"), house.public_key_path());
    let issue = |authority: &Authority| fs::write(&certificate, authority.chain(&public, SUBJECT)?).context("write");
    let own_config = house.config();
    let witness = "[[witness]]\nname = \"release\"\n";
    let by_chain = own_config.replace(witness, &format!("{witness}certificate = \"chain.pem\"\n"));
    let mut signed = vec![];
    for (step, config, issuer) in
        [("own", &own_config, None), ("first", &by_chain, Some(&authority)), ("second", &by_chain, Some(&authority))]
    {
        if let Some(authority) = issuer {
            issue(authority)?;
        }
        house.write_config(config)?;
        house.daemon.start().await?;
        house.push(&Image::oci(step)?, "team/app", &[step]).await?;
        let tagged = house.reference("team/app", step);
        wait_for(&house, &tagged, &["notation"]).await?;
        assert!(house.daemon.terminate(Duration::from_secs(60)).await?.success());
        signed.push(tagged);
    }
    let by_root = Notation::trusting(&authority.root()?, "*", "*")?;
    for tagged in &signed {
        house.run(&["verify", tagged]).await?.expect_code(0)?;
        assert_eq!(by_root.verify(tagged).await?.accepted, tagged != &signed[0], "{tagged}");
    }
    // Another authority that certifies the same key answers for none of the former.
    issue(&other)?;
    house.run(&["verify", &signed[0]]).await?.expect_code(0)?;
    for tagged in &signed[1..] {
        let said = house.run(&["verify", tagged]).await?.expect_code(1)?.stdout;
        assert!(said.contains("which is none of witness release's"), "{said}");
    }
    Ok(())
}

#[tokio::test]
async fn a_chain_for_another_key_keeps_the_daemon_from_starting_and_it_says_which_key_it_is_for() -> Result<()> {
    let (authority, bao) = (Authority::new()?, OpenBao::start().await?);
    let mut house = certified(&bao, Keys::P256, &authority, SUBJECT).await?;
    let other = house.config_path().with_file_name("other.key.pem");
    let other_path = other.to_str().context("no text")?;
    daemon::run(&["key", "generate", "--spec", "EC_P256", "--out", other_path], &[]).await?.expect_code(0)?;
    let public = other.with_file_name("other.pub.pem");
    let openssl =
        std::process::Command::new("openssl").args(["pkey", "-pubout", "-in"]).arg(&other).arg("-out").arg(&public).status()?;
    assert!(openssl.success());
    fs::write(house.config_path().with_file_name("chain.pem"), authority.chain(&public, SUBJECT)?)?;
    house.daemon.start_unready()?;
    let status = house.daemon.wait(Duration::from_secs(60)).await?;
    assert!(!status.success(), "{status}");
    let log = house.daemon.logged();
    assert!(log.contains("release") && log.contains("is for the key sha256:"), "{log}");
    let check = house.run(&["check", "--online"]).await?;
    assert!(check.code != Some(0) && check.stdout.contains("is for the key sha256:"), "{check:?}");
    Ok(())
}

#[tokio::test]
async fn a_certificate_that_names_too_little_is_warned_of_as_notation_has_it() -> Result<()> {
    let (authority, bao) = (Authority::new()?, OpenBao::start().await?);
    let mut house = certified(&bao, Keys::P256, &authority, "/C=DE/CN=signing").await?;
    let said = house.run(&["check"]).await?.expect_code(0)?.stdout;
    assert!(said.contains("the certificate's subject (CN=signing,C=DE) has no ST and no O"), "{said}");
    house.daemon.start().await?;
    assert!(house.daemon.logged().contains("has no ST and no O"), "{}", house.daemon.logged());
    house.push(&Image::oci("nameless")?, "team/app", &["1.0"]).await?;
    let tagged = house.reference("team/app", "1.0");
    wait_for(&house, &tagged, &["notation", "notation-cose"]).await?;
    accepts(&Notation::trusting(&authority.root()?, "*", "*")?.verify(&tagged).await?, "all that the root certifies");
    let named = Notation::trusting(&authority.root()?, "x509.subject: C=DE, ST=Berlin, O=Example", "*")?;
    let ruling = named.verify(&tagged).await?;
    assert!(!ruling.accepted && ruling.words.contains("mandatory RDN attribute"), "{}", ruling.words);
    // It is not for us to say that everybody is to be trusted.
    let output = house.run(&["witness", "certificate", "release", "--output", "json"]).await?.expect_code(0)?;
    assert!(output.json()?["trusted_identity"].is_null(), "{output:?}");
    assert!(output.stderr.contains("has no ST and no O"), "{output:?}");
    Ok(())
}

#[tokio::test]
async fn verify_tells_when_a_signature_was_made_as_notation_tells_it() -> Result<()> {
    let rules = rule("both", "team", Keys::P256, &["notation", "notation-cose"]);
    let house = House::start(Plan { rules: Some(rules), ..Plan::default() }).await?;
    let image = Image::oci("timed")?;
    house.push(&image, "team/app", &["1.0"]).await?;
    let tagged = house.reference("team/app", "1.0");
    wait_for(&house, &tagged, &["notation", "notation-cose"]).await?;
    let pinned = house.reference("team/app", &image.manifest.digest);
    let theirs = Notation::trusting_witness(&house, "*").await?.signing_times(&pinned).await?;
    let answer = house.run(&["verify", &tagged, "--output", "json"]).await?.expect_code(0)?.json()?;
    let text = house.run(&["verify", &tagged]).await?.expect_code(0)?.stdout;
    for (format, media_type) in [("notation", "application/jose+json"), ("notation-cose", "application/cose")] {
        let theirs = theirs.get(media_type).with_context(|| format!("notation knows no {media_type}: {theirs:?}"))?;
        let signatures = answer[0]["signatures"].as_array().context("no signatures")?;
        let ours = signatures.iter().find(|one| one["format"] == format).context("not listed")?;
        assert_eq!(ours["time"], *theirs, "{answer}");
        let line = text.lines().find(|line| line.contains(&format!("ok: {format} signature"))).context("no line")?;
        assert!(line.ends_with(&format!(", said to be of {theirs}")), "{line}");
    }
    Ok(())
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
