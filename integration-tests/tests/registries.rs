//! Registries as they are: with tokens, read-only for a while, with immutable tags, throttling, full, under another name, with deep
//! namespaces; and of other makes.

use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use integration_tests::formats::{Referrers, found, ours, wait_for};
use integration_tests::house::{House, Keys, Plan, TOKEN, rule, rule_of_all_formats};
use integration_tests::image::Image;
use integration_tests::issuer::Issuer;
use integration_tests::oras::Oras;
use integration_tests::process::{eventually, on_path, say_aloud};
use integration_tests::recorder::{Mutable, Recorder, Refusal, Write};
use integration_tests::registry::{External, LOGIN, Options};
use integration_tests::verifier::{Cosign, KeyPair, Notation, Skopeo};
use reqwest::StatusCode;

const LIMIT: Duration = Duration::from_secs(60);

const FORMATS: [&str; 3] = ["bundle", "cosign", "notation"];

fn rule_of_three_formats() -> String {
    rule("team", "team", Keys::P256).replace("[\"cosign\"]", &format!("{FORMATS:?}"))
}

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

/// A house that reaches its registry through a recorder, with a rule for each format: `team/bundle/…` is signed as `bundle`.
async fn recorded() -> Result<(House, Recorder)> {
    let rule = |format: &str| {
        let rule = rule(format, &format!("team/{format}"), Keys::P256);
        rule.replace("[\"cosign\"]", &format!("[\"{format}\"]"))
    };
    let mut house = House::build(Plan { rules: Some(FORMATS.map(rule).join("\n")), ..Plan::default() }).await?;
    let recorder = Recorder::start(&house.registry.host()).await?;
    house.route_registry(&recorder.url())?;
    house.daemon.start().await?;
    Ok((house, recorder))
}

/// What `queue dead` says, as soon as this is in it.
async fn wait_dead(house: &House, words: &str) -> Result<String> {
    eventually(&format!("a dead letter says {words:?}"), LIMIT, async || {
        let letters = house.run(&["queue", "dead"]).await?.expect_code(0)?.stdout;
        Ok(letters.contains(words).then_some(letters))
    })
    .await
}

/// The `.sig` tag for one format, the tag of referrers for the others.
#[tokio::test]
async fn immutable_tags_are_a_dead_letter_that_names_the_exemption_and_a_replay_after_it_signs() -> Result<()> {
    let (house, recorder) = recorded().await?;
    let (key, notation) = (KeyPair::generate().await?, Notation::signing("*").await?);
    for format in FORMATS {
        recorder.set_mutable(Mutable::None);
        let (first, second, repository) = (Image::oci("first")?, Image::oci("second")?, format!("team/{format}/app"));
        // The first signature makes the tag, and is no problem.
        house.push(&first, &repository, &["1.0"]).await?;
        wait_for(&house, &house.reference(&repository, "1.0"), &[format]).await?;
        // Where somebody else was first, the tag would have to change.
        house.push(&second, &repository, &[]).await?;
        let (tagged, pinned) = (house.reference(&repository, "2.0"), house.reference(&repository, &second.manifest.digest));
        match format {
            "cosign" => Cosign::V2.sign(&key, &pinned).await?,
            "bundle" => Cosign::sign_bundle(&key, &pinned).await?,
            _ => notation.sign(&pinned, true).await?,
        }
        house.push(&second, &repository, &["2.0"]).await?;
        let letters = wait_dead(&house, "does not let this tag be changed").await.context(format)?;
        assert!(letters.contains("exempt tags of the form sha256-*"), "{letters}");
        let theirs = (format.to_owned(), "rejected".to_owned(), "nobody".to_owned());
        assert_eq!(found(&house, &tagged).await?, std::slice::from_ref(&theirs), "{format}");

        recorder.set_mutable(Mutable::Signatures);
        house.run(&["queue", "replay", "--all"]).await?.expect_code(0)?;
        wait_for(&house, &tagged, &[format]).await.context(format)?;
        assert_eq!(found(&house, &tagged).await?, [theirs, ours(format)], "{format}");
    }
    Ok(())
}

#[tokio::test]
async fn a_registry_of_before_image_spec_1_1_gets_the_layout_of_notation_1_and_notation_verifies() -> Result<()> {
    let rules = rule("team", "team", Keys::P256).replace("[\"cosign\"]", "[\"notation\", \"notation-cose\"]");
    let mut house = House::build(Plan { rules: Some(rules), ..Plan::default() }).await?;
    let recorder = Recorder::start(&house.registry.host()).await?;
    recorder.forget_artifact_types();
    house.route_registry(&recorder.url())?;
    house.daemon.start().await?;
    for name in ["first", "second"] {
        let (image, repository) = (Image::oci(name)?, format!("team/{name}"));
        house.push(&image, &repository, &["1.0"]).await?;
        let reference = house.reference(&repository, "1.0");
        wait_for(&house, &reference, &["notation", "notation-cose"]).await?;
        let ruling = Notation::trusting_witness(&house, "*").await?.verify(&reference).await?;
        assert!(ruling.accepted, "{}", ruling.words);
        let listed = Oras::new()?.discover(&reference).await?;
        assert!(listed.iter().all(|one| one.artifact_type == "application/vnd.cncf.notary.signature"), "{listed:?}");
        assert_eq!(listed.len(), 2, "{listed:?}");
    }
    // Both of the first image were tried in the layout of today, and no other.
    let refused = recorder.exchanges().iter().filter(|one| one.status == StatusCode::BAD_REQUEST).count();
    assert_eq!(refused, 2);
    let metrics = house.daemon.metrics().await?;
    assert_eq!(metrics.ended("dead"), 0, "{metrics:?}");
    Ok(())
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

#[tokio::test]
async fn a_registry_with_a_token_service_is_signed_in_with_tokens_that_run_out() -> Result<()> {
    let issuer = Arc::new(Issuer::start(LOGIN.1).await?);
    issuer.expire_after(2);
    let registry = Options { tokens: Some(Arc::clone(&issuer)), ..Options::default() };
    let house = House::start(Plan { registry, rules: Some(rule_of_three_formats()), ..Plan::default() }).await?;
    for name in ["first", "second"] {
        let (image, repository) = (Image::oci(name)?, format!("team/{name}"));
        house.push(&image, &repository, &["1.0"]).await?;
        let reference = house.reference(&repository, "1.0");
        wait_for(&house, &reference, &FORMATS).await?;
        house.run(&["verify", &reference]).await?.expect_code(0)?;
        // Longer than a token lasts: the next push of the same image needs another.
        let wanted = format!("repository:{repository}:pull,push");
        let asked = || issuer.scopes().into_iter().filter(|scope| *scope == wanted).count();
        let before = asked();
        assert!(before > 0, "{:?}", issuer.scopes());
        eventually("a token that ran out is replaced", LIMIT, async || {
            house.push(&Image::oci(&format!("{name} {}", fastrand::u64(..)))?, &repository, &["1.1"]).await?;
            tokio::time::sleep(Duration::from_millis(200)).await;
            Ok((asked() > before).then_some(()))
        })
        .await?;
    }
    let metrics = house.wait_settled(4, LIMIT).await?;
    assert_eq!(metrics.ended("dead"), 0, "{metrics:?}");
    let logged = house.daemon.logged();
    assert!(!logged.contains("eyJ"), "a token is in the log:\n{logged}");
    Ok(())
}

#[tokio::test]
async fn an_account_that_may_only_pull_is_a_dead_letter_that_names_it_and_the_right() -> Result<()> {
    let issuer = Arc::new(Issuer::start(LOGIN.1).await?);
    let registry = Options { tokens: Some(issuer), ..Options::default() };
    let mut house = House::build(Plan { registry, ..Plan::default() }).await?;
    let config = house.config();
    house.write_config(&config.replace(&format!("username = \"{}\"", LOGIN.0), &format!("username = \"{}\"", Issuer::READER)))?;
    house.daemon.start().await?;
    let image = Image::oci("reader")?;
    house.push(&image, "team/app", &["1.0"]).await?;
    let dead = async || {
        let letters = house.run(&["queue", "dead"]).await?.expect_code(0)?.stdout;
        Ok(letters.contains("may not push to this repository").then_some(letters))
    };
    let letters = eventually("it is a dead letter", LIMIT, dead).await?;
    assert!(letters.contains("\"reader\"") && letters.contains("check the registry's username"), "{letters}");
    Ok(())
}

/// Of one format, wherever it writes a manifest.
async fn throttled_and_full(house: &House, recorder: &Recorder, format: &str, write: Write) -> Result<()> {
    let (repository, context) = (format!("team/{format}"), format!("{format} {write:?}"));
    let before = recorder.exchanges().len();
    recorder.refuse(write, [Refusal::Throttled { retry_after: 2 }, Refusal::Throttled { retry_after: 1 }]);
    let throttled = Image::oci(&format!("throttled {write:?}"))?;
    house.push(&throttled, &repository, &["1.0"]).await?;
    wait_for(house, &house.reference(&repository, "1.0"), &[format]).await.context(context.clone())?;
    let writes: Vec<_> = recorder.exchanges().split_off(before).into_iter().filter(|one| Write::of(one) == Some(write)).collect();
    let statuses: Vec<_> = writes.iter().map(|one| one.status.as_u16()).collect();
    assert_eq!(statuses, [429, 429, 201], "{context}");
    let waits = [writes[1].at - writes[0].at, writes[2].at - writes[1].at];
    assert!(waits[0] >= Duration::from_secs(2) && waits[1] >= Duration::from_secs(1), "{context}: {waits:?}");

    recorder.refuse(write, [Refusal::Quota]);
    let full = Image::oci(&format!("full {write:?}"))?;
    house.push(&full, &repository, &["2.0"]).await?;
    let letters = wait_dead(house, "quota is used up").await.context(context.clone())?;
    assert!(letters.contains("raise the quota in the registry"), "{context}: {letters}");
    house.run(&["queue", "replay", "--all"]).await?.expect_code(0)?;
    wait_for(house, &house.reference(&repository, "2.0"), &[format]).await.context(context)
}

#[tokio::test]
async fn a_registry_that_throttles_is_given_the_time_it_asks_for_and_one_that_is_full_is_a_dead_letter() -> Result<()> {
    let (house, recorder) = recorded().await?;
    throttled_and_full(&house, &recorder, "cosign", Write::UnderTag).await?;
    for format in ["bundle", "notation"] {
        throttled_and_full(&house, &recorder, format, Write::UnderTag).await?;
        throttled_and_full(&house, &recorder, format, Write::ByDigest).await?;
    }
    house.registry.wait_delivered(LIMIT).await?;
    let metrics = house.wait_settled(10, LIMIT).await?;
    assert_eq!((metrics.ended("signed"), metrics.ended("dead")), (10, 0), "{metrics:?}");
    Ok(())
}

/// The registry has uploads go on at the name that its clients know, which is not where countersign reaches it.
#[tokio::test]
async fn uploads_go_on_where_the_registry_is_reached_and_not_where_it_says_that_it_is() -> Result<()> {
    let registry = Options { announces: Some("http://registry.example.com"), count_requests: true, ..Options::default() };
    let house = House::start(Plan { registry, rules: Some(rule_of_three_formats()), ..Plan::default() }).await?;
    let image = Image::oci("announced")?;
    house.push(&image, "team/app", &["1.0"]).await?;
    let reference = house.reference("team/app", "1.0");
    assert_eq!(reference, "registry.example.com/team/app:1.0");
    wait_for(&house, &reference, &FORMATS).await?;
    assert_eq!(house.signed("team/app", &image.manifest.digest).await?, [reference]);

    // A name that is neither the registry's nor its address gets no credentials and no uploads.
    let config = house.config().replace("registry.example.com", "other.example.com");
    let path = house.config_path().with_file_name("other.toml");
    std::fs::write(&path, config.replacen("/state\"", "/other\"", 1))?;
    let path = path.to_str().context("no text")?;
    house.push(&image, "team/other", &["1.0"]).await?;
    let refused = integration_tests::daemon::run(&["sign", "other.example.com/team/other:1.0", "--config", path], &[]).await?;
    assert_ne!(refused.code, Some(0), "{refused:?}");
    let said = refused.stdout + &refused.stderr;
    assert!(said.contains("points to http://registry.example.com") && said.contains("set the registry's `url`"), "{said}");
    Ok(())
}

/// There is no package of these. Where they are installed they are run, and where not it is said.
#[tokio::test]
async fn distribution_3_and_zot_are_signed_in_where_they_are_in_path() -> Result<()> {
    type Make = fn(std::path::PathBuf) -> External;
    let makes: [(&str, Referrers, Make); 2] =
        [("registry", Referrers::FallbackTag, External::Distribution), ("zot", Referrers::Api, External::Zot)];
    for (name, kind, make) in makes {
        let Some(program) = on_path(name) else {
            let full = if name == "zot" { "zot" } else { "distribution 3.x" };
            say_aloud(&format!("NOT RUN: signing in {full}, because there is no program `{name}` in PATH"));
            continue;
        };
        let version = Command::new(&program).arg("--version").output()?;
        let version = [version.stdout, version.stderr].concat();
        say_aloud(&format!("run: signing in {} ({})", program.display(), String::from_utf8_lossy(&version).trim()));
        let registry = Options { external: Some(make(program)), ..Options::default() };
        let house = House::start(Plan { registry, rules: Some(rule_of_three_formats()), ..Plan::default() }).await?;
        let image = Image::index("external")?;
        for tag in ["1.0", "2.0"] {
            kind.push(&house, &image, "team/of/external", tag).await?;
            let reference = house.reference("team/of/external", tag);
            wait_for(&house, &reference, &FORMATS).await?;
            for cosign in [Cosign::V2, Cosign::V3] {
                let ruling = cosign.verify(&house.public_key_path(), &reference).await?;
                assert!(ruling.accepted, "{name}: {cosign:?}: {}", ruling.words);
            }
            let ruling = Notation::trusting_witness(&house, "*").await?.verify(&reference).await?;
            assert!(ruling.accepted, "{name}: {}", ruling.words);
        }
        let metrics = house.wait_settled(2, LIMIT).await?;
        assert_eq!(metrics.ended("dead"), 0, "{name}: {metrics:?}");
    }
    Ok(())
}
