//! What runs already is looked at again: by the webhook now and then, and by `countersign report`.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result};
use integration_tests::api_server::{ApiServer, PODS};
use integration_tests::daemon;
use integration_tests::house::{House, Plan};
use integration_tests::image::{Image, Manifest, OCI_MANIFEST};
use integration_tests::process::{eventually, scratch};
use integration_tests::signature::tag_of;
use integration_tests::webhook::{POLICY, Webhook, witnessed};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);
const EVENTS: &str = "/apis/events.k8s.io/v1/namespaces/payments/events";
/// More than one page has.
const REPLICAS: usize = 230;

fn run(api: &ApiServer, namespace: &str, name: &str, phase: &str, image: &str) {
    let pod = json!({
        "metadata": {"namespace": namespace, "uid": format!("uid-of-{name}")},
        "spec": {"containers": [{"name": "app", "image": image}]},
        "status": {"phase": phase},
    });
    api.put(PODS, name, &pod);
}

#[tokio::test]
async fn what_runs_and_would_be_denied_now_is_told_of_and_left_alone() -> Result<()> {
    let mut house = House::start(Plan::default()).await?;
    let (signed, unsigned) = (Image::oci("signed")?, Image::oci("unsigned")?);
    house.push(&signed, "team/app", &["1.0"]).await?;
    house.push(&unsigned, "other/app", &["1.0"]).await?;
    house.wait_signed("team/app", &signed.manifest.digest, &["1.0"]).await?;
    let (good, bad) =
        (house.reference("team/app", &signed.manifest.digest), house.reference("other/app", &unsigned.manifest.digest));

    let (folder, api) = (scratch()?, ApiServer::start().await?);
    for number in 0..REPLICAS {
        run(&api, "payments", &format!("web-{number:03}"), "Running", &good);
    }
    run(&api, "payments", "old", "Running", &bad);
    run(&api, "payments", "done", "Succeeded", &bad);
    run(&api, "warned", "old-too", "Running", &bad);
    run(&api, "elsewhere", "free", "Running", &bad);
    let warn = POLICY.replace("\"payments\"", "\"warned\"") + "mode = \"warn\"\n";
    let kubeconfig = api.kubeconfig(folder.path())?;
    let kubernetes =
        format!("kubernetes = {{ kubeconfig = \"{}\", recheck = {{ every = \"1s\", rate = 100 }} }}", kubeconfig.display());
    let config = witnessed(&house, &format!("{kubernetes}\n{POLICY}{warn}"));
    let webhook = Webhook::start(&config).await?;
    let until = async |attested: u64, unmet: u64, unknown: u64| {
        eventually(&format!("{attested} attested, {unmet} unmet, {unknown} unknown"), LIMIT, async || {
            let metrics = webhook.metrics().await?;
            let count = |state| metrics.count("countersign_admission_running_images", &[("state", state)]);
            Ok(((count("attested"), count("unmet"), count("unknown")) == (attested, unmet, unknown)).then_some(metrics))
        })
        .await
    };

    let metrics = until(1, 2, 0).await?;
    for (policy, mode) in [("payments", "enforce"), ("warned", "warn")] {
        let labels = [("policy", policy), ("mode", mode), ("reason", "unsigned")];
        assert_eq!(metrics.count("countersign_admission_running_unmet", &labels), 1, "{metrics:?}");
    }
    let event = eventually("an Event tells of the pod", LIMIT, async || Ok(api.objects(EVENTS).into_iter().next())).await?;
    assert_eq!(
        (&event["reason"], &event["regarding"]["name"], &event["type"]),
        (&json!("NotAttested"), &json!("old"), &json!("Warning"))
    );
    let note = event["note"].as_str().context("a note")?;
    assert!(note.starts_with(&format!("image {bad} is not attested\n  policy payments: it is not signed")), "{note}");

    // The same by hand.
    let report = webhook.run(&["report"]).await?.expect_code(1)?.stdout;
    assert!(report.starts_with(&format!("payments: would be denied now\n  image {bad} is not attested\n")), "{report}");
    assert!(report.contains("  pods: old\nwarned: is only told of\n"), "{report}");
    let sum = format!("{} pods run; of 3 images where policies are in force, 1 would be denied now\n", REPLICAS + 3);
    assert!(report.ends_with(&sum), "{report}");
    let report = webhook.run(&["report", "--output", "json"]).await?.expect_code(1)?.json()?;
    let lines = report["unmet"].as_array().context("a list")?;
    let short = |line: &Value| json!([line["namespace"], line["denied"], line["pods"], line["unmet"][0]["reason"]]);
    assert_eq!(
        lines.iter().map(short).collect::<Vec<_>>(),
        [json!(["payments", true, ["old"], "unsigned"]), json!(["warned", false, ["old-too"], "unsigned"])]
    );

    // Its signature is gone. Reviews remember it for a while; who looks again does not go by that.
    let empty = Manifest::new(
        OCI_MANIFEST,
        json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config_of(&house).await?, "layers": []}).to_string(),
    );
    house.client.put_manifest("team/app", &tag_of(&signed.manifest.digest), &empty).await?;
    until(0, 3, 0).await?;
    let told = async || Ok((api.objects(EVENTS).len() > 20).then_some(()));
    eventually("Events tell of its pods, but not of all", LIMIT, told).await?;
    assert_eq!(api.objects(EVENTS).len(), 21, "each once, however often it is looked");

    // Nobody is blamed for a registry that is away.
    house.registry.kill()?;
    until(0, 0, 3).await?;
    let report = webhook.run(&["report"]).await?.expect_code(0)?.stdout;
    assert!(report.contains("payments: cannot be told now\n"), "{report}");

    let requests = api.requests();
    assert!(requests.iter().any(|request| request.contains("continue=")), "one page does not hold them");
    let changes: Vec<_> = requests.iter().filter(|request| !request.starts_with("GET ") && request.contains("pods")).collect();
    assert!(changes.is_empty(), "{changes:?}");
    api.fail(Some(503));
    let failed = webhook.run(&["report"]).await?.expect_code(3)?;
    assert!(failed.stderr.contains("the pods that run cannot be listed"), "{failed:?}");
    Ok(())
}

/// The descriptor of a config that the repository has.
async fn config_of(house: &House) -> Result<Value> {
    let manifest = house.client.manifest("team/app", "1.0").await?.context("it was pushed")?;
    let manifest: Value = serde_json::from_slice(&manifest.bytes)?;
    Ok(manifest["config"].clone())
}

#[tokio::test]
async fn without_an_api_to_ask_a_report_says_what_to_write() -> Result<()> {
    let webhook = Webhook::start("").await?;
    let refused = webhook.run(&["report"]).await?.expect_code(2)?;
    assert!(refused.stderr.contains("give --kubeconfig FILE, or write `kubernetes` into [admission]"), "{refused:?}");
    Ok(())
}

#[tokio::test]
async fn a_kubeconfig_that_is_none_is_an_error_of_whoever_wrote_it_and_said_once() -> Result<()> {
    let folder = scratch()?;
    let (config, kubeconfig) = (folder.path().join("countersign.toml"), folder.path().join("kubeconfig"));
    fs::write(&kubeconfig, "nonsense: [")?;
    fs::write(
        &config,
        "[admission]\ntls = { folder = \"tls\", names = [\"a.b.svc\"] }\nkubernetes = { kubeconfig = \"kubeconfig\" }\n",
    )?;
    let config = config.to_str().context("a folder whose name is no text")?;
    for command in ["admission", "report"] {
        let refused = daemon::run(&[command, "--config", config], &[]).await?.expect_code(2)?;
        assert_eq!(refused.stderr.matches("is no kubeconfig that can be used").count(), 1, "{refused:?}");
        assert_eq!(refused.stderr.matches("unclosed bracket '['\n --> ").count(), 1, "{refused:?}");
    }
    Ok(())
}
