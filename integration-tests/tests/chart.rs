//! The Helm chart: what it renders for several values is what Kubernetes takes, its configurations are ones that countersign takes, and
//! deploy/kubernetes is made from it (`make manifests`).

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use integration_tests::daemon;
use integration_tests::process::{scratch, tool};
use serde_json::{Value, json};

/// The oldest Kubernetes that the chart says it is for, those where something that it uses came, and one of today.
const VERSIONS: [&str; 5] = ["1.22.0", "1.25.3", "1.29.9", "1.30.0", "1.34.1"];
/// Every API that is used, and since when it is there: none is anything but stable, and none will be removed.
const APIS: [(&str, &[&str]); 7] = [
    ("v1", &["Namespace", "ServiceAccount", "ConfigMap", "ResourceQuota", "Service"]),
    ("apps/v1", &["Deployment", "StatefulSet"]),
    // 1.21
    ("policy/v1", &["PodDisruptionBudget"]),
    ("networking.k8s.io/v1", &["NetworkPolicy"]),
    // 1.16
    ("admissionregistration.k8s.io/v1", &["ValidatingWebhookConfiguration", "MutatingWebhookConfiguration"]),
    ("rbac.authorization.k8s.io/v1", &["ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"]),
    // The Prometheus operator's.
    ("monitoring.coreos.com/v1", &["ServiceMonitor"]),
];

const ALL: &[&str] = &[
    "admission.caBundle=abc",
    "admission.pinTags=true",
    "admission.kubernetes.recheck=1h",
    "daemon.enabled=true",
    "serviceMonitor.enabled=true",
    "plain=true",
];
const REPLICAS: &str = "daemon:\n  enabled: true\n  replicas: 3\n  tlsSecret: countersign-tls\n  egressPorts: [443, 5671, 5432]\n  config: |\n    \
    [server]\n    listen = \"0.0.0.0:8080\"\n    tls = { certificate = \"/run/secrets/tls/tls.crt\", key = { file = \"/run/secrets/tls/tls.key\" } }\n    \
    [queue]\n    backend = \"amqp\"\n    url = { file = \"/run/secrets/countersign/amqp-url\" }\n    \
    [ledger]\n    url = { file = \"/run/secrets/countersign/ledger-url\" }\n";

/// By kind and name.
type Objects = BTreeMap<(String, String), Value>;

/// What deploy/kubernetes has: each file, its header, and the templates that it is made of.
const PLAIN: [(&str, &str, &[&str]); 4] = [
    (
        "admission.yaml",
        "# `countersign admission` in a cluster: everything but the webhook's registration, which is webhook.yaml and comes last.\n\
         # What has to be yours: the image, the registry, the witness's public key and the policies. The two Secrets are made by hand,\n\
         # as the README says.\n",
        &["namespace", "admission"],
    ),
    (
        "webhook.yaml",
        "# From here on the cluster asks countersign. Apply it once the Deployment of admission.yaml is available, with the authority's\n\
         # certificate in the place of CA_BUNDLE: `countersign admission --ca-bundle` prints it, as the README says.\n\
         #\n\
         # To be rid of it in an emergency: `kubectl delete --filename webhook.yaml`.\n",
        &["webhook"],
    ),
    (
        "mutating.yaml",
        "# For policies with tags = \"resolve\": the cluster asks countersign to pin tags, too. As webhook.yaml, and beside it.\n",
        &["mutating"],
    ),
    (
        "daemon.yaml",
        "# `countersign serve` in a cluster: one replica, with its queue and ledger in a volume. What has to be yours: the image, and what the\n\
         # configuration says. The Secrets countersign-registry and countersign-daemon are made by hand, as the README says.\n",
        &["namespace", "daemon"],
    ),
];

#[test]
fn deploy_kubernetes_is_made_from_the_chart() -> Result<()> {
    for (file, header, templates) in PLAIN {
        let mut made = format!("{header}# Made from deploy/helm/countersign by `make manifests`: a change belongs there.\n");
        let mut documents = vec![];
        for template in templates {
            let values = ["plain=true", "admission.caBundle=CA_BUNDLE", "admission.pinTags=true", "daemon.enabled=true"]
                .map(|value| ["--set", value]);
            let only = format!("templates/{template}.yaml");
            let text = helm("countersign", "1.30.0", &[values.concat(), vec!["--show-only", &only]].concat(), "")?;
            documents.extend(text.split("---\n").filter(|part| !part.trim().is_empty()).map(without_source));
        }
        made.push_str(&documents.join("---\n"));
        let path = deploy("kubernetes").join(file);
        if std::env::var_os("BLESS").is_some() {
            fs::write(&path, made)?;
        } else {
            assert!(
                fs::read_to_string(&path).unwrap_or_default() == made,
                "{} is not what the chart makes: run `make manifests`",
                path.display()
            );
        }
    }
    Ok(())
}

#[tokio::test]
async fn deploy_kubernetes_and_the_chart_have_the_definitions_that_countersign_prints() -> Result<()> {
    let folder = scratch()?;
    let config = folder.path().join("empty.toml");
    fs::write(&config, "")?;
    let config = config.to_str().context("a folder whose name is no text")?;
    let printed = daemon::run(&["admission", "--crds", "--config", config], &[]).await?.expect_code(0)?.stdout;
    ensure!(printed.matches("kind: CustomResourceDefinition").count() == 2, "{printed}");
    for path in ["kubernetes/resources.yaml", "helm/countersign/crds/resources.yaml"] {
        let path = deploy(path);
        if std::env::var_os("BLESS").is_some() {
            fs::create_dir_all(path.parent().context("a folder")?)?;
            fs::write(&path, &printed)?;
        } else {
            let is_same = fs::read_to_string(&path).unwrap_or_default() == printed;
            assert!(is_same, "{} is not what countersign prints: run `make manifests`", path.display());
        }
    }
    Ok(())
}

/// Helm says of each document which template it is of.
fn without_source(document: &str) -> String {
    let mut text = String::new();
    for line in document.lines() {
        // What is blank inside of a configuration is indented.
        let is_text = !line.trim().is_empty() && !line.starts_with("# Source: ");
        if is_text || line.starts_with("   ") {
            text.push_str(line.trim_end());
            text.push('\n');
        }
    }
    text
}

#[test]
fn the_cluster_does_not_ask_before_there_is_somebody_to_answer() -> Result<()> {
    let rendered = render("countersign", &[])?;
    let kinds: Vec<&str> = rendered.keys().map(|(kind, _)| kind.as_str()).collect();
    assert_eq!(
        kinds,
        ["ConfigMap", "Deployment", "NetworkPolicy", "PodDisruptionBudget", "ResourceQuota", "Service", "ServiceAccount"],
        "the webhook and what it needs, and no more"
    );
    Ok(())
}

#[test]
fn every_kubernetes_from_the_oldest_on_has_the_apis_that_are_used() -> Result<()> {
    for version in VERSIONS {
        let rendered = objects(&helm("countersign", version, &sets(ALL), "")?)?;
        for ((kind, name), object) in &rendered {
            let version = object["apiVersion"].as_str().unwrap_or_default();
            assert!(APIS.iter().any(|(api, kinds)| *api == version && kinds.contains(&kind.as_str())), "{version} {kind} {name}");
        }
        assert_eq!(rendered.keys().filter(|(kind, _)| kind == "ServiceMonitor").count(), 2);
        // What came with 1.30.
        let pause = find(&rendered, "Deployment", "countersign-admission")?.pointer("/spec/template/spec/containers/0/lifecycle");
        let minor: u32 = version.split('.').nth(1).context("a minor version")?.parse()?;
        assert_eq!(pause.is_some(), minor >= 30, "{version}");
    }
    let refused = helm("countersign", "1.21.14", &[], "").unwrap_err().to_string();
    assert!(refused.contains("requires kubeVersion: >=1.22.0-0"), "{refused}");
    Ok(())
}

#[test]
fn another_namespace_and_other_values_are_everywhere_that_they_belong() -> Result<()> {
    let values = [
        "admission.caBundle=abc",
        "admission.pinTags=true",
        "image=r.example.com:5000/guard/countersign:2@sha256:1",
        "registrySecret=login",
        "admission.rules[0].apiGroups[0]=example.com",
        "admission.rules[0].resources[0]=rollouts",
        "daemon.enabled=true",
    ];
    let rendered = render("guard", &values)?;
    let of_cluster = |kind: &str| kind.ends_with("WebhookConfiguration");
    for ((kind, name), object) in rendered.iter().filter(|((kind, _), _)| !of_cluster(kind)) {
        assert_eq!(object["metadata"]["namespace"], "guard", "{kind} {name}");
    }
    let config = find(&rendered, "ConfigMap", "countersign-admission")?["data"]["countersign.toml"].as_str().context("a text")?;
    assert!(config.contains("names = [\"countersign-admission.guard.svc\"]"), "{config}");
    assert!(config.contains("allow = [\"registry.k8s.io/**\", \"r.example.com:5000/guard/countersign\"]"), "{config}");
    for (kind, path) in [("ValidatingWebhookConfiguration", "/validate"), ("MutatingWebhookConfiguration", "/mutate")] {
        let hook = &find(&rendered, kind, "countersign")?["webhooks"][0];
        assert_eq!(hook["clientConfig"]["service"], json!({"namespace": "guard", "name": "countersign-admission", "path": path}));
        assert_eq!(hook["namespaceSelector"]["matchExpressions"][0]["values"], json!(["kube-system", "guard"]));
        assert_eq!(hook["rules"][3], json!({"apiGroups": ["example.com"], "resources": ["rollouts"]}));
        assert_eq!((&hook["failurePolicy"], &hook["clientConfig"]["caBundle"]), (&json!("Fail"), &json!("abc")));
    }
    for (kind, name) in [("Deployment", "countersign-admission"), ("StatefulSet", "countersign")] {
        let pod = &find(&rendered, kind, name)?["spec"]["template"]["spec"];
        assert_eq!(pod["containers"][0]["image"], "r.example.com:5000/guard/countersign:2@sha256:1");
        assert_eq!(pod["imagePullSecrets"], json!([{"name": "login"}]));
        assert_eq!(
            (&pod["securityContext"]["runAsNonRoot"], &pod["automountServiceAccountToken"]),
            (&json!(true), &json!(false))
        );
    }
    let annotations = |rendered: &Objects| -> Result<Value> {
        Ok(find(rendered, "Deployment", "countersign-admission")?["spec"]["template"]["metadata"]["annotations"].clone())
    };
    let changed = render("guard", &[&values[..], &["admission.publicKeys.other=PEM"]].concat())?;
    assert_ne!(annotations(&rendered)?, annotations(&changed)?, "pods read their configuration at the start");
    let misspelt = render("guard", &["admission.replica=3"]).unwrap_err().to_string();
    assert!(misspelt.contains("replica"), "{misspelt}");
    Ok(())
}

#[test]
fn the_webhook_may_do_what_it_is_asked_to_and_no_more() -> Result<()> {
    let none = render("guard", &[])?;
    assert!(!none.keys().any(|(kind, _)| kind.starts_with("ClusterRole")));
    let pod = |rendered: &Objects| {
        anyhow::Ok(find(rendered, "Deployment", "countersign-admission")?["spec"]["template"]["spec"].clone())
    };
    assert_eq!(pod(&none)?["automountServiceAccountToken"], false);
    for (value, rights) in [
        ("resources=true", json!([["securitypolicies", "witnesses"], ["securitypolicies/status", "witnesses/status"]])),
        ("pullSecrets=true", json!([["secrets", "serviceaccounts"]])),
        ("events=true", json!([["events"]])),
        ("recheck=1h", json!([["pods"]])),
    ] {
        let rendered = render("guard", &[&format!("admission.kubernetes.{value}")])?;
        let role = &find(&rendered, "ClusterRole", "countersign-admission")?["rules"];
        let resources: Value = role.as_array().context("rules")?.iter().map(|rule| rule["resources"].clone()).collect();
        assert_eq!(resources, rights, "{value}");
        let binding = find(&rendered, "ClusterRoleBinding", "countersign-admission")?;
        assert_eq!(binding["subjects"][0]["namespace"], "guard");
        assert_eq!(pod(&rendered)?["automountServiceAccountToken"], true);
        let egress = &find(&rendered, "NetworkPolicy", "countersign-admission")?["spec"]["egress"][0]["ports"];
        assert!(egress.as_array().context("ports")?.iter().any(|port| port["port"] == 6443), "{egress}");
    }
    Ok(())
}

#[test]
fn the_daemon_is_what_its_queue_demands() -> Result<()> {
    let one = render("countersign", &["admission.enabled=false", "daemon.enabled=true"])?;
    let set = find(&one, "StatefulSet", "countersign")?;
    assert_eq!(
        (&set["spec"]["replicas"], &set["spec"]["volumeClaimTemplates"][0]["metadata"]["name"]),
        (&json!(1), &json!("state"))
    );
    assert!(!one.keys().any(|(kind, _)| kind == "PodDisruptionBudget"), "one that must not be disrupted could never be moved");
    let refused = render("countersign", &["daemon.enabled=true", "daemon.replicas=2"]).unwrap_err().to_string();
    assert!(refused.contains("replicas share a queue on RabbitMQ"), "{refused}");

    let many = objects(&helm("countersign", "1.34.1", &[], REPLICAS)?)?;
    let set = find(&many, "StatefulSet", "countersign")?;
    assert_eq!((&set["spec"]["replicas"], &set["spec"]["podManagementPolicy"]), (&json!(3), &json!("Parallel")));
    let budget = find(&many, "PodDisruptionBudget", "countersign")?;
    assert_eq!(budget["spec"]["maxUnavailable"], 1);
    let container = &set["spec"]["template"]["spec"]["containers"][0];
    assert_eq!(container["readinessProbe"]["httpGet"]["scheme"], "HTTPS");
    let egress = &find(&many, "NetworkPolicy", "countersign")?["spec"]["egress"][0]["ports"];
    assert_eq!(egress.as_array().context("a list")?.iter().filter(|port| port["port"] == 5671).count(), 1);
    Ok(())
}

#[tokio::test]
async fn every_configuration_in_it_is_one_that_countersign_takes() -> Result<()> {
    let house = integration_tests::house::House::start_quiet(None).await?;
    let key = fs::read_to_string(house.public_key_path())?;
    let keys = format!("admission: {{publicKeys: {{release.pub.pem: {}}}}}\n", Value::from(key));
    let with_tls = "daemon: {enabled: true, tlsSecret: countersign-tls}\n";
    let cases =
        [keys.clone(), format!("{keys}{with_tls}"), format!("{keys}{REPLICAS}"), format!("{keys}plain: true\n{with_tls}")];
    for values in &cases {
        let rendered = objects(&helm("guard", "1.34.1", &[], values)?)?;
        let mut checked = 0;
        for ((kind, name), object) in &rendered {
            if matches!(kind.as_str(), "Deployment" | "StatefulSet") {
                check(&rendered, object).await.with_context(|| format!("{kind} {name} with {values}"))?;
                checked += 1;
            }
        }
        assert_eq!(checked, 1 + usize::from(values.contains("daemon:")));
    }
    Ok(())
}

/// Lays out what the container of this workload would see, and has its configuration checked there.
async fn check(rendered: &Objects, workload: &Value) -> Result<()> {
    const SECRETS: [(&str, &str); 8] = [
        ("config.json", "{\"auths\": {}}"),
        ("tls.crt", "certificate"),
        ("tls.key", "key"),
        ("registry-password", "password"),
        ("webhook-token", "8d969eef6ecad3c29a3a629280e686cf"),
        ("amqp-url", "amqp://user:password@rabbitmq:5672/%2f"),
        ("ledger-url", "postgres://user:password@postgres/countersign?sslmode=disable"),
        ("authority.pem", ""),
    ];
    let root = scratch()?;
    let pod = &workload["spec"]["template"]["spec"];
    let container = &pod["containers"][0];
    let mounts = container["volumeMounts"].as_array().context("mounts")?;
    let inside = |path: &str| root.path().join(path.trim_start_matches('/'));
    for mount in mounts {
        let folder = inside(mount["mountPath"].as_str().context("a path")?);
        fs::create_dir_all(&folder)?;
        let volume = pod["volumes"].as_array().into_iter().flatten().find(|volume| volume["name"] == mount["name"]);
        if let Some(name) = volume.and_then(|volume| volume["configMap"]["name"].as_str()) {
            for (file, text) in find(rendered, "ConfigMap", name)?["data"].as_object().context("data")? {
                fs::write(folder.join(file), text.as_str().context("a text")?)?;
            }
        } else if volume.is_some() {
            for (file, text) in SECRETS {
                let path = folder.join(file);
                fs::write(&path, text)?;
                // As a volume of a Secret has it.
                fs::set_permissions(&path, fs::Permissions::from_mode(0o440))?;
            }
        }
    }
    let arguments: Vec<&str> = container["args"].as_array().context("arguments")?.iter().filter_map(Value::as_str).collect();
    let config = arguments.iter().skip_while(|argument| **argument != "--config").nth(1).context("a configuration")?;
    let path = inside(config);
    let mut text = fs::read_to_string(&path)?;
    for mount in mounts {
        let folder = mount["mountPath"].as_str().context("a path")?;
        text = text.replace(&format!("\"{folder}/"), &format!("\"{}/", inside(folder).display()));
    }
    fs::write(&path, text)?;
    let path = path.to_str().context("a folder whose name is no text")?;
    daemon::run(&["check", "--config", path], &[]).await?.expect_code(0)?;
    Ok(())
}

fn find<'a>(objects: &'a Objects, kind: &str, name: &str) -> Result<&'a Value> {
    objects.get(&(kind.to_owned(), name.to_owned())).with_context(|| format!("no {kind} {name} in {:?}", objects.keys()))
}

/// What `helm template` prints, with these values set.
fn render(namespace: &str, values: &[&str]) -> Result<Objects> {
    objects(&helm(namespace, "1.34.1", &sets(values), "")?)
}

fn sets<'a>(values: &[&'a str]) -> Vec<&'a str> {
    values.iter().flat_map(|value| ["--set", value]).collect()
}

/// For a cluster of this version, with these arguments and this file of values.
fn helm(namespace: &str, version: &str, arguments: &[&str], values: &str) -> Result<String> {
    let home = scratch()?;
    let file = home.path().join("values.yaml");
    fs::write(&file, values)?;
    let mut command = Command::new(tool("bin/helm")?);
    command.env("HOME", home.path()).args(["template", "countersign"]).arg(deploy("helm/countersign"));
    command.args(["--kube-version", version, "--namespace", namespace, "--values"]).arg(&file).args(arguments);
    let output = command.output().context("run helm")?;
    ensure!(output.status.success(), "helm: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

fn objects(text: &str) -> Result<Objects> {
    let objects: Vec<Value> = serde_saphyr::from_multiple(text)?;
    let count = objects.len();
    let named = |object: Value| {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        Some(((text(&object["kind"])?, text(&object["metadata"]["name"])?), object))
    };
    let objects: Objects = objects.into_iter().filter_map(named).collect();
    ensure!(objects.len() == count, "there are two of one name, or one without: {:?}", objects.keys());
    Ok(objects)
}

fn deploy(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("deploy").join(path)
}
