//! What policies demand, and of what: several of them, none, children of an index, age, what is allowed anyway.

use std::fs;
use std::time::Duration;

use anyhow::Result;
use integration_tests::house::{House, Plan};
use integration_tests::image::Image;
use integration_tests::process::scratch;
use integration_tests::registry::Options;
use integration_tests::verifier::{Cosign, KeyPair};
use integration_tests::webhook::{POLICY, Webhook, pod, review, settings, witnessed};
use serde_json::{Value, json};

fn policy(more: &str) -> String {
    format!("{POLICY}{more}\n")
}

#[tokio::test]
async fn a_child_counts_through_its_index_and_an_old_image_does_not_count() -> Result<()> {
    let house = House::start_quiet(None).await?;
    let image = Image::index("children")?;
    let key = KeyPair::generate().await?;
    for repository in ["team/app", "team/bundled"] {
        house.push(&image, repository, &["1.0"]).await?;
    }
    Cosign::V2.sign(&key, &house.reference("team/app", &image.manifest.digest)).await?;
    Cosign::sign_bundle(&key, &house.reference("team/bundled", &image.manifest.digest)).await?;
    let config = |more: &str| settings(&house.registry.host(), &house.registry.url(), &key.public(), &policy(more));
    let child = |repository| format!("{}@{}", house.reference(repository, "1.0"), image.child("amd64").digest);
    let children = ["team/app", "team/bundled"].map(child);
    let folder = scratch()?;
    let manifest = folder.path().join("pods.yaml");
    fs::write(&manifest, children.each_ref().map(|child| pod(&[child]).to_string()).join("\n---\n"))?;
    let judge = ["verify", "-n", "payments", "-f", manifest.to_str().expect("a text")];

    let webhook = Webhook::start(&config("")).await?;
    for child in &children {
        assert!(webhook.create("payments", child).await?.why(child)?.contains("it is not signed"));
    }
    webhook.run(&judge).await?.expect_code(1)?;
    webhook.reload(&config("through_index = true")).await?;
    for child in &children {
        let answer = webhook.create("payments", child).await?;
        assert!(answer.allowed, "{answer:?}");
    }
    webhook.run(&judge).await?.expect_code(0)?;
    // The images of these tests do not say when they were built.
    webhook.reload(&config("max_age = \"90d\"")).await?;
    let index = house.reference("team/app", &image.manifest.digest);
    let answer = webhook.create("payments", &index).await?;
    assert!(answer.why(&index)?.contains("it does not say when it was built"), "{answer:?}");
    Ok(())
}

#[tokio::test]
#[expect(clippy::disallowed_methods, reason = "the webhook goes by the system's clock")]
async fn what_no_policy_is_about_asks_no_registry_and_is_counted_as_what_it_is() -> Result<()> {
    let registry = Options { count_requests: true, ..Options::default() };
    let house = House::start(Plan { registry, ..Plan::default() }).await?;
    let host = house.registry.host();
    let config = format!(
        "allow = [\"{host}/tools/**\"]\nbreakglass = {{ users = [\"anna\"] }}\n{}",
        policy(&format!("allow = [\"{host}/team/app:1.0\"]"))
    );
    let webhook = Webhook::start(&witnessed(&house, &config)).await?;
    let requests = || anyhow::Ok(house.registry.count_requests("countersign/")?.values().sum::<usize>());
    let before = requests()?;
    let (tool, app, other) =
        (format!("{host}/tools/deep/down:2"), house.reference("team/app", "1.0"), house.reference("a/b", "1"));
    for (namespace, image) in [("payments", &tool), ("payments", &app), ("elsewhere", &other)] {
        let answer = webhook.create(namespace, image).await?;
        assert!(answer.allowed, "{image}: {answer:?}");
    }
    let mut urgent = pod(&[&other]);
    let until = jiff::Timestamp::now() + Duration::from_secs(3600);
    urgent["metadata"]["annotations"] = json!({"countersign.dev/breakglass": format!("until {until} because INC-42")});
    let emergency = review("CREATE", "payments", "/v1", "Pod", &urgent, &Value::Null);
    assert!(webhook.call("/validate", &emergency).await?.allowed);
    assert_eq!(requests()?, before);
    assert!(!webhook.create("payments", &other).await?.allowed);
    assert!(requests()? > before, "what a policy is about is asked for");

    let metrics = webhook.metrics().await?;
    for (decision, count) in [("attested", 2), ("no_policy", 1), ("breakglass", 1), ("denied", 1)] {
        let labels = [("endpoint", "validate"), ("decision", decision)];
        assert_eq!(metrics.count("countersign_admission_review_seconds_count", &labels), count, "{decision}: {metrics:?}");
    }
    let logged = webhook.logged();
    assert!(logged.contains("breakglass: admitted past all policies") && logged.contains("INC-42"), "{logged}");
    Ok(())
}

#[tokio::test]
async fn every_policy_of_a_namespace_must_hold_and_those_that_do_not_are_named() -> Result<()> {
    let house = House::start(Plan::default()).await?;
    let image = Image::oci("several")?;
    house.push(&image, "team/app", &["1.0"]).await?;
    house.wait_signed("team/app", &image.manifest.digest, &["1.0"]).await?;
    let others = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/vectors/keys/p256.pub.pem");
    let security = format!(
        "[[witness]]\nname = \"security\"\nkey = \"awskms:///alias/never-asked?region=eu-west-1\"\npublic_key = \"{others}\"\n"
    );
    let of = |name: &str, more: &str| format!("[[policy]]\nname = \"{name}\"\nnamespace = \"pay*\"\nenabled = true\n{more}\n");
    let config = [
        security,
        of("both", "witnesses = [\"release\", \"security\"]"),
        of("one", "witness = \"security\""),
        of("off", "witness = \"security\"").replace("enabled = true\n", ""),
    ];
    let webhook = Webhook::start(&witnessed(&house, &(policy("") + &config.concat()))).await?;
    let image = house.reference("team/app", &image.manifest.digest);
    let answer = webhook.create("payments", &image).await?;
    assert_eq!(answer.why(&image)?, "  policies both, one: it is signed by release, and not by witness security");
    webhook.reload(&witnessed(&house, &policy(""))).await?;
    assert!(webhook.create("payments", &image).await?.allowed);
    Ok(())
}
