//! The Helm chart: what it renders is what deploy/kubernetes has, which a cluster takes (tests/cluster.rs).

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use integration_tests::process::{scratch, tool};
use serde_json::{Value, json};

/// By kind: there is one of each.
type Objects = BTreeMap<String, Value>;

#[test]
fn as_it_comes_it_renders_what_is_in_deploy_kubernetes() -> Result<()> {
    let mut rendered = render("countersign", &["caBundle=CA_BUNDLE"])?;
    let mut plain = objects(&fs::read_to_string(deploy("kubernetes/admission.yaml"))?)?;
    plain.extend(objects(&fs::read_to_string(deploy("kubernetes/webhook.yaml"))?)?);
    // Helm makes the namespace, and knows when the configuration changes.
    plain.remove("Namespace").context("it has a namespace")?;
    let pods = rendered.get_mut("Deployment").and_then(|object| object.pointer_mut("/spec/template/metadata"));
    let removed = pods.and_then(Value::as_object_mut).and_then(|metadata| metadata.remove("annotations"));
    assert!(removed.is_some_and(|annotations| annotations["checksum/config"].is_string()));
    assert_eq!(rendered, plain);
    Ok(())
}

#[test]
fn the_cluster_does_not_ask_before_there_is_somebody_to_answer() -> Result<()> {
    let rendered = render("countersign", &[])?;
    assert!(rendered.contains_key("Deployment") && !rendered.contains_key("ValidatingWebhookConfiguration"));
    Ok(())
}

#[test]
fn another_namespace_and_other_values_are_everywhere_that_they_belong() -> Result<()> {
    let values = [
        "caBundle=abc",
        "image=r.example.com/countersign@sha256:1",
        "registrySecret=login",
        "rules[0].apiGroups[0]=example.com",
        "rules[0].resources[0]=rollouts",
    ];
    let rendered = render("guard", &values)?;
    for (kind, object) in rendered.iter().filter(|(kind, _)| *kind != "ValidatingWebhookConfiguration") {
        assert_eq!(object["metadata"]["namespace"], "guard", "{kind}");
    }
    let config = rendered["ConfigMap"]["data"]["countersign.toml"].as_str().context("a text")?;
    assert!(config.contains("names = [\"countersign-admission.guard.svc\"]"), "{config}");
    let hook = &rendered["ValidatingWebhookConfiguration"]["webhooks"][0];
    assert_eq!(hook["clientConfig"]["service"]["namespace"], "guard");
    assert_eq!(hook["namespaceSelector"]["matchExpressions"][0]["values"], json!(["kube-system", "guard"]));
    assert_eq!(hook["rules"][3], json!({"apiGroups": ["example.com"], "resources": ["rollouts"]}));
    let pod = &rendered["Deployment"]["spec"]["template"]["spec"];
    assert_eq!(pod["containers"][0]["image"], "r.example.com/countersign@sha256:1");
    assert_eq!(
        (&pod["imagePullSecrets"][0]["name"], &pod["volumes"][2]["secret"]["secretName"]),
        (&json!("login"), &json!("login"))
    );

    let before = |rendered: &Objects| rendered["Deployment"]["spec"]["template"]["metadata"]["annotations"].clone();
    let changed = render("guard", &[&values[..], &["publicKeys.other=PEM"]].concat())?;
    assert_ne!(before(&rendered), before(&changed), "pods read their configuration at the start");
    Ok(())
}

/// What `helm template` prints, with these values set.
fn render(namespace: &str, values: &[&str]) -> Result<Objects> {
    let home = scratch()?;
    let mut command = Command::new(tool("bin/helm")?);
    command.env("HOME", home.path()).args(["template", "countersign"]).arg(deploy("helm/countersign"));
    command.args(["--kube-version", "1.30.0", "--namespace", namespace]);
    command.args(values.iter().flat_map(|value| ["--set", value]));
    let output = command.output().context("run helm")?;
    ensure!(output.status.success(), "helm: {}", String::from_utf8_lossy(&output.stderr));
    objects(&String::from_utf8(output.stdout)?)
}

fn objects(text: &str) -> Result<Objects> {
    let objects: Vec<Value> = serde_saphyr::from_multiple(text)?;
    let count = objects.len();
    let by_kind: Objects = objects.into_iter().filter_map(|object| Some((object["kind"].as_str()?.to_owned(), object))).collect();
    ensure!(by_kind.len() == count, "of some kind there are two, or none: {:?}", by_kind.keys());
    Ok(by_kind)
}

fn deploy(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("deploy").join(path)
}
