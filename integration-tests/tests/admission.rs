//! Only attested images run: the webhook beside a real registry, called by HTTPS with the reviews that API servers send.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::Result;
use integration_tests::house::{House, Plan};
use integration_tests::image::Image;
use integration_tests::process::{eventually, scratch};
use integration_tests::registry::{LOGIN, Options};
use integration_tests::verifier::{Cosign, KeyPair, Notation};
use integration_tests::webhook::{POLICY, Webhook, pod, review, settings, witnessed};
use serde_json::{Value, json};

fn policy(more: &str) -> String {
    format!("{POLICY}{more}\n")
}

/// A house with a signed image, and the digest.
async fn house_with(seed: &str) -> Result<(House, String)> {
    let house = House::start(Plan::default()).await?;
    let image = Image::oci(seed)?;
    house.push(&image, "team/app", &["1.0"]).await?;
    house.wait_signed("team/app", &image.manifest.digest, &["1.0"]).await?;
    Ok((house, image.manifest.digest))
}

/// Every kind with a pod of this image in it: API version, kind, object.
fn kinds(image: &str) -> Vec<(&'static str, &'static str, Value)> {
    let pod = pod(&[image]);
    let template = json!({"metadata": {"labels": {"app": "web"}}, "spec": pod["spec"]});
    let of_template = |kind: &'static str| ("apps/v1", kind, json!({"spec": {"template": template}}));
    vec![
        ("/v1", "Pod", pod.clone()),
        ("/v1", "ReplicationController", json!({"spec": {"template": template}})),
        of_template("Deployment"),
        of_template("ReplicaSet"),
        of_template("StatefulSet"),
        of_template("DaemonSet"),
        ("batch/v1", "Job", json!({"spec": {"template": template}})),
        ("batch/v1", "CronJob", json!({"spec": {"jobTemplate": {"spec": {"template": template}}}})),
        ("argoproj.io/v1alpha1", "Rollout", json!({"spec": {"template": template}})),
    ]
}

#[tokio::test]
async fn in_every_kind_a_tag_and_an_unsigned_digest_are_denied_and_a_signed_digest_is_admitted() -> Result<()> {
    let (house, signed) = house_with("kinds").await?;
    let unsigned = Image::oci("unsigned")?;
    house.push(&unsigned, "other/app", &["1.0"]).await?;
    let (tag, signed) = (house.reference("team/app", "1.0"), house.reference("team/app", &signed));
    let unsigned = house.reference("other/app", &unsigned.manifest.digest);
    let rollout = "kinds = [{ group = \"argoproj.io\", kind = \"Rollout\", paths = [\"spec.template\"] }]\n";
    let webhook = Webhook::start(&witnessed(&house, &format!("{rollout}{POLICY}"))).await?;

    let none = Value::Null;
    let path = "/validate?timeout=30s";
    for (operation, is_update) in [("CREATE", false), ("UPDATE", true)] {
        let before = |version: &str, kind: &str| {
            let found = kinds("before:1").into_iter().find(|(v, k, _)| (*v, *k) == (version, kind));
            if is_update { found.map(|(_, _, object)| object).unwrap_or_default() } else { none.clone() }
        };
        for (version, kind, object) in kinds(&tag) {
            let answer =
                webhook.call(path, &review(operation, "payments", version, kind, &object, &before(version, kind))).await?;
            let why = answer.why(&tag)?;
            assert!(why.contains(&format!("use the digest, which is attested: {tag}@sha256:")), "{operation} {kind}: {why}");
        }
        for (version, kind, object) in kinds(&unsigned) {
            let answer =
                webhook.call(path, &review(operation, "payments", version, kind, &object, &before(version, kind))).await?;
            let why = answer.why(&unsigned)?;
            assert!(why.contains("it is not signed, and witness release must have signed it"), "{operation} {kind}: {why}");
        }
        for (version, kind, object) in kinds(&signed) {
            let answer =
                webhook.call(path, &review(operation, "payments", version, kind, &object, &before(version, kind))).await?;
            assert!(answer.allowed, "{operation} {kind}: {answer:?}");
        }
    }
    for (version, kind, object) in kinds(&unsigned) {
        let unchanged = review("UPDATE", "payments", version, kind, &object, &object);
        assert!(webhook.call(path, &unchanged).await?.allowed, "{kind}");
        let elsewhere = review("CREATE", "default", version, kind, &object, &none);
        assert!(webhook.call(path, &elsewhere).await?.allowed, "{kind}");
    }

    // Ephemeral containers of a pod that runs already: only they are judged.
    let with_debugger = |image: &str| {
        let mut object = pod(&[&unsigned]);
        object["spec"]["ephemeralContainers"] = json!([{"name": "debug", "image": image}]);
        let mut review = review("UPDATE", "payments", "/v1", "Pod", &object, &pod(&[&unsigned]));
        review["request"]["subResource"] = json!("ephemeralcontainers");
        review
    };
    assert!(webhook.call(path, &with_debugger(&signed)).await?.allowed);
    let denied = webhook.call(path, &with_debugger(&unsigned)).await?;
    assert!(denied.why(&unsigned)?.contains("it is not signed"));
    Ok(())
}

#[tokio::test]
async fn signatures_of_stock_cosign_with_the_witness_key_count_and_those_of_others_do_not() -> Result<()> {
    let house = House::start_quiet(None).await?;
    let (ours, theirs) = (KeyPair::generate().await?, KeyPair::generate().await?);
    let mut references = vec![];
    for (seed, cosign) in [("two", Cosign::V2), ("three", Cosign::V3)] {
        let image = Image::oci(seed)?;
        house.push(&image, "team/app", &[seed]).await?;
        let reference = house.reference("team/app", &image.manifest.digest);
        cosign.sign(&ours, &reference).await?;
        references.push(reference);
    }
    let image = Image::oci("others")?;
    house.push(&image, "team/app", &["others"]).await?;
    let other = house.reference("team/app", &image.manifest.digest);
    Cosign::V2.sign(&theirs, &other).await?;

    let webhook = Webhook::start(&settings(&house.registry.host(), &house.registry.url(), &ours.public(), POLICY)).await?;
    for reference in &references {
        let answer = webhook.create("payments", reference).await?;
        assert!(answer.allowed, "{answer:?}");
    }
    let answer = webhook.create("payments", &other).await?;
    assert!(answer.why(&other)?.contains("it is signed by another key, and not by one of witness release"), "{answer:?}");
    Ok(())
}

#[tokio::test]
async fn signatures_of_stock_notation_with_the_witness_key_count_and_those_of_others_do_not() -> Result<()> {
    let house = House::start_quiet(None).await?;
    let repository = format!("{}/team/app", house.registry.host());
    let (ours, theirs) = (Notation::signing(&repository).await?, Notation::signing(&repository).await?);
    let mut references = vec![];
    for (seed, notation) in [("ours", &ours), ("theirs", &theirs)] {
        let image = Image::oci(seed)?;
        house.push(&image, "team/app", &[seed]).await?;
        let reference = house.reference("team/app", &image.manifest.digest);
        notation.sign(&reference, true).await?;
        references.push(reference);
    }
    let key = ours.public_key()?;
    let webhook = Webhook::start(&settings(&house.registry.host(), &house.registry.url(), &key, POLICY)).await?;
    let answer = webhook.create("payments", &references[0]).await?;
    assert!(answer.allowed, "{answer:?}");
    let other = &references[1];
    let answer = webhook.create("payments", other).await?;
    assert!(answer.why(other)?.contains("it is signed by another key, and not by one of witness release"), "{answer:?}");
    Ok(())
}

#[tokio::test]
async fn a_tampered_signature_a_moved_tag_another_name_and_a_revoked_witness_are_denied_each_with_its_own_text() -> Result<()> {
    let (house, digest) = house_with("genuine").await?;
    let config = witnessed(&house, &policy("tags = \"resolve\""));
    let webhook = Webhook::start(&config).await?;
    let good = house.reference("team/app", &digest);
    assert!(webhook.create("payments", &good).await?.allowed);

    // The signature of another image, under this one's tag for signatures.
    let target = Image::oci("tampered")?;
    house.push(&target, "other/app", &["1.0"]).await?;
    copy_signature(&house, &digest, &target).await?;
    let tampered = house.reference("other/app", &target.manifest.digest);
    let answer = webhook.create("payments", &tampered).await?;
    assert!(answer.why(&tampered)?.contains(&format!("it approves another digest, {digest}")), "{answer:?}");

    // The tag was moved to an image that nobody signed, behind countersign's back.
    let (evil, third) = (Image::oci("evil")?, Image::oci("third")?);
    house.push(&third, "team/app", &["3.0"]).await?;
    house.wait_signed("team/app", &third.manifest.digest, &["3.0"]).await?;
    house.daemon.signal(rustix::process::Signal::STOP)?;
    house.push(&evil, "team/app", &["1.0"]).await?;
    let moved = house.reference("team/app", "1.0");
    let mutate = |image: &str| review("CREATE", "payments", "/v1", "Pod", &pod(&[image]), &Value::Null);
    let answer = webhook.call("/mutate?timeout=30s", &mutate(&moved)).await?;
    assert!(answer.why(&moved)?.contains("it is not signed"), "{answer:?}");

    // Or to one that was signed, but not as this.
    house.push(&third, "team/app", &["1.0"]).await?;
    let answer = webhook.call("/mutate?timeout=30s", &mutate(&moved)).await?;
    let expected = format!("witness release signed it as {}, and not under this name", house.reference("team/app", "3.0"));
    assert!(answer.why(&moved)?.contains(&expected), "{answer:?}");

    // What was signed as 1.0 is no 2.0.
    let renamed = format!("{}:2.0@{digest}", house.reference("team/app", "x").trim_end_matches(":x"));
    let answer = webhook.create("payments", &renamed).await?;
    let expected = format!("witness release signed it as {}, and not under this name", house.reference("team/app", "1.0"));
    assert!(answer.why(&renamed)?.contains(&expected), "{answer:?}");

    // The witness's key is revoked: what was admitted a moment ago, and is remembered, counts no more.
    let key = house.public_key_path();
    let revoked = format!(
        "{config}verify = [{{ key = \"{}\", revoked = 2026-01-01T00:00:00Z, reason = \"found in a build log\" }}]\n",
        key.display()
    );
    webhook.reload(&revoked).await?;
    let answer = webhook.create("payments", &good).await?;
    let why = answer.why(&good)?;
    assert!(why.contains("witness release revoked its key on 2026-01-01T00:00:00Z: found in a build log"), "{why}");
    Ok(())
}

/// Puts the signature of `digest` where verifiers look for the target's.
async fn copy_signature(house: &House, digest: &str, target: &Image) -> Result<()> {
    let tag = |digest: &str| integration_tests::signature::tag_of(digest);
    let genuine = house.client.manifest("team/app", &tag(digest)).await?.expect("it is signed");
    let manifest: Value = serde_json::from_slice(&genuine.bytes)?;
    for blob in [&manifest["config"], &manifest["layers"][0]] {
        let blob = house.client.blob("team/app", blob["digest"].as_str().expect("a digest")).await?;
        house.client.push_blob("other/app", &blob).await?;
    }
    house.client.put_manifest("other/app", &tag(&target.manifest.digest), &genuine).await
}

#[tokio::test]
async fn a_tag_is_pinned_to_the_digest_that_verified() -> Result<()> {
    let (house, digest) = house_with("pinned").await?;
    let webhook = Webhook::start(&witnessed(&house, &policy("tags = \"resolve\""))).await?;
    let tag = house.reference("team/app", "1.0");
    let pinned = format!("{tag}@{digest}");
    for (version, kind, object) in kinds(&tag).into_iter().filter(|(_, kind, _)| *kind != "Rollout") {
        let answer =
            webhook.call("/mutate?timeout=30s", &review("CREATE", "payments", version, kind, &object, &Value::Null)).await?;
        assert!(answer.allowed, "{kind}: {answer:?}");
        let [operation] = answer.patch.as_slice() else { panic!("{kind}: {answer:?}") };
        let path = operation["path"].as_str().expect("a pointer");
        assert_eq!((object.pointer(path), &operation["op"]), (Some(&json!(tag)), &json!("replace")), "{kind}");
        assert_eq!(operation["value"], json!(pinned), "{kind}");
        let mut patched = object.clone();
        *patched.pointer_mut(path).expect("it is there") = operation["value"].clone();
        let validated =
            webhook.call("/validate?timeout=30s", &review("CREATE", "payments", version, kind, &patched, &Value::Null)).await?;
        assert!(validated.allowed && validated.patch.is_empty(), "{kind}: {validated:?}");
    }
    // Where only the validating webhook is called, a tag is still one that can be moved.
    let answer = webhook.create("payments", &tag).await?;
    assert!(answer.why(&tag)?.contains("let the mutating webhook (/mutate) be called"), "{answer:?}");
    Ok(())
}

#[tokio::test]
async fn with_the_registry_gone_what_verified_is_admitted_and_all_else_denied_in_time_with_the_reason() -> Result<()> {
    let (mut house, digest) = house_with("gone").await?;
    let webhook = Webhook::start(&witnessed(&house, POLICY)).await?;
    let known = house.reference("team/app", &digest);
    assert!(webhook.create("payments", &known).await?.allowed);
    let unknown = format!("{}@sha256:{}", house.reference("team/app", "x").trim_end_matches(":x"), "a".repeat(64));
    let both = review("CREATE", "payments", "/v1", "Pod", &pod(&[&known, &unknown]), &Value::Null);

    // Silent: connections are taken, and nothing is answered.
    house.registry.pause()?;
    assert!(webhook.create("payments", &known).await?.allowed);
    let began = Instant::now();
    let answer = webhook.call("/validate?timeout=2s", &both).await?;
    let why = answer.why(&unknown)?;
    assert!(why.contains("its registry did not answer within the 1.8 s that the cluster waits"), "{why}");
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    house.registry.resume()?;

    // Gone: connections are refused.
    house.registry.kill()?;
    assert!(webhook.create("payments", &known).await?.allowed);
    let answer = webhook.call("/validate?timeout=30s", &both).await?;
    assert!(answer.why(&unknown)?.contains("its registry could not be asked: "), "{answer:?}");
    assert!(!answer.message.contains(&known), "{answer:?}");

    // Back: it is asked again.
    house.registry.start_again().await?;
    let answer = webhook.call("/validate?timeout=30s", &both).await?;
    assert!(answer.why(&unknown)?.contains("its registry has no such image"), "{answer:?}");
    let metrics = webhook.metrics().await?;
    assert!(metrics.count("countersign_admission_cache_hits_total", &[]) >= 3);
    assert_eq!(metrics.count("countersign_admission_images_unmet_total", &[("policy", "payments"), ("reason", "late")]), 1);
    Ok(())
}

#[tokio::test]
async fn an_image_that_is_signed_a_moment_later_is_admitted_then() -> Result<()> {
    let house = House::start_quiet(None).await?;
    let image = Image::oci("later")?;
    house.push(&image, "team/app", &["1.0"]).await?;
    let webhook = Webhook::start(&witnessed(&house, POLICY)).await?;
    let reference = house.reference("team/app", &image.manifest.digest);
    assert!(webhook.create("payments", &reference).await?.why(&reference)?.contains("it is not signed"));
    house.run(&["sign", &house.reference("team/app", "1.0")]).await?.expect_code(0)?;
    let admitted = async || Ok(webhook.create("payments", &reference).await?.allowed.then_some(()));
    eventually("it is admitted", Duration::from_secs(60), admitted).await
}

#[tokio::test]
async fn an_image_that_still_waits_for_its_signature_is_said_to() -> Result<()> {
    let mut house = House::build(Plan::default()).await?;
    // The daemon is told of pushes, and cannot reach the registry to sign them.
    house.route_registry("http://127.0.0.1:9")?;
    house.daemon.start_alive().await?;
    let image = Image::oci("waiting")?;
    house.push(&image, "team/app", &["1.0"]).await?;
    let socket = house.config_path().with_file_name("state").join("countersign.sock");
    let daemon = format!("daemon = \"unix://{}\"\n{POLICY}", socket.display());
    let webhook = Webhook::start(&witnessed(&house, &daemon)).await?;
    let reference = house.reference("team/app", &image.manifest.digest);
    let said = async || {
        let answer = webhook.create("payments", &reference).await?;
        let why = answer.why(&reference)?.to_owned();
        Ok((why.contains("s ago, being signed: retry")).then_some(why))
    };
    let why = eventually("it is said to be waiting", Duration::from_secs(60), said).await?;
    assert!(why.contains("it is not signed") && why.contains("\n  pushed "), "{why}");
    Ok(())
}

#[tokio::test]
async fn the_registrys_login_may_stand_in_a_docker_configuration() -> Result<()> {
    let registry = Options { login: true, ..Options::default() };
    let house = House::start(Plan { registry, ..Plan::default() }).await?;
    let image = Image::oci("login")?;
    house.push(&image, "team/app", &["1.0"]).await?;
    house.wait_signed("team/app", &image.manifest.digest, &["1.0"]).await?;
    let reference = house.reference("team/app", &image.manifest.digest);

    let without = Webhook::start(&witnessed(&house, POLICY)).await?;
    let answer = without.create("payments", &reference).await?;
    assert!(answer.why(&reference)?.contains("its registry could not be asked"), "{answer:?}");

    let folder = scratch()?;
    let logins = folder.path().join("config.json");
    let login = json!({"username": LOGIN.0, "password": LOGIN.1});
    fs::write(&logins, json!({"auths": {house.registry.host(): login}}).to_string())?;
    let with = format!("docker_config = \"{}\"\n{POLICY}", logins.display());
    let webhook = Webhook::start(&witnessed(&house, &with)).await?;
    assert!(webhook.create("payments", &reference).await?.allowed);
    assert!(!webhook.logged().contains(LOGIN.1) || LOGIN.0 == LOGIN.1);
    Ok(())
}

#[tokio::test]
async fn a_witness_without_a_public_key_is_refused_at_the_start_with_what_to_do() -> Result<()> {
    let folder = scratch()?;
    let config = folder.path().join("webhook.toml");
    fs::write(
        &config,
        format!(
            "[queue]\npath = \"state\"\n[[witness]]\nname = \"release\"\nkey = \"awskms:///alias/release?region=eu-west-1\"\n{POLICY}"
        ),
    )?;
    let path = config.to_str().expect("a text");
    let refused = integration_tests::daemon::run(&["admission", "--config", path], &[]).await?;
    assert_ne!(refused.code, Some(0));
    assert!(refused.stderr.contains("write public_key = \"release.pub.pem\" into its [[witness]]"), "{refused:?}");
    Ok(())
}

#[tokio::test]
async fn of_many_reviews_at_once_one_asks_the_registry() -> Result<()> {
    let registry = Options { count_requests: true, ..Options::default() };
    let house = House::start(Plan { registry, ..Plan::default() }).await?;
    let image = Image::oci("flight")?;
    house.push(&image, "team/app", &["1.0"]).await?;
    house.wait_signed("team/app", &image.manifest.digest, &["1.0"]).await?;
    // Whoever has signed looks once more at what was written, and is counted here as well.
    house.registry.wait_delivered(Duration::from_secs(60)).await?;
    house.wait_settled(1, Duration::from_secs(60)).await?;
    let webhook = Webhook::start(&witnessed(&house, POLICY)).await?;
    let reference = house.reference("team/app", &image.manifest.digest);
    let requests = || anyhow::Ok(house.registry.count_requests("countersign/")?.values().sum::<usize>());
    let before = requests()?;
    let reviews = (0..50).map(|_| webhook.create("payments", &reference));
    let answers = futures::future::try_join_all(reviews).await?;
    assert!(answers.iter().all(|answer| answer.allowed));
    // The manifest, the signatures, and one payload; and other signatures are looked for by the referrers API and its fallback tag.
    assert_eq!(requests()? - before, 5);
    Ok(())
}
