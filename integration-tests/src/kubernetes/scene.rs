//! A cluster that asks the webhook, with images that are signed and images that are not.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::{ADMIN, Cluster, WEBHOOK};
use crate::daemon::Output;
use crate::house::{House, Plan};
use crate::image::Image;
use crate::process::eventually;
use crate::registry::Options;
use crate::webhook::Webhook;

pub const LIMIT: Duration = Duration::from_secs(60);
/// The webhook, as it is registered.
pub const HOOK: &str = "admission.countersign.dev";

/// Signed and unsigned images in a registry, a webhook that has policies on them, and a cluster that does not ask it yet.
pub struct Scene {
    pub cluster: Cluster,
    pub webhook: Webhook,
    /// The signed image, by its tag and by its digest.
    pub tag: String,
    pub signed: String,
    pub unsigned: String,
    pub house: House,
}

impl Scene {
    /// With policies in its configuration: for `payments` and `exempt`, which is not asked about, and one for each mode.
    pub async fn set() -> Result<Self> {
        let house = House::start(Plan::default()).await?;
        let (signed, unsigned) = pushed(&house).await?;
        let policy = |name: &str, mode: &str| {
            format!(
                "[[policy]]\nname = \"{name}\"\nwitness = \"release\"\nnamespace = \"{name}\"\nmode = \"{mode}\"\nenabled = true\n"
            )
        };
        let cluster = Cluster::start().await?;
        let config = format!(
            "breakglass = {{ groups = [\"oncall\"] }}\n\
             kubernetes = {{ kubeconfig = \"{}\" }}\n\
             kinds = [\n  {{ group = \"\", kind = \"PodTemplate\", paths = [\"template\"] }},\n  \
             {{ group = \"argoproj.io\", kind = \"Rollout\", paths = [\"spec.template\"] }},\n]\n\
             [[registry]]\nname = \"{}\"\nurl = \"{}\"\n\
             [[witness]]\nname = \"release\"\nkey = \"awskms:///alias/never-asked?region=eu-west-1\"\npublic_key = \"{}\"\n{}{}{}{}",
            cluster.kubeconfig(WEBHOOK).display(),
            house.registry.host(),
            house.registry.url(),
            house.public_key_path().display(),
            policy("payments", "enforce"),
            policy("exempt", "enforce"),
            policy("warned", "warn"),
            policy("audited", "audit") + &(policy("pinned", "enforce") + "tags = \"resolve\"\n"),
        );
        grant(&cluster, "events.k8s.io", &["events"], &["create"]).await?;
        let webhook = Webhook::start(&config).await?;
        for namespace in ["payments", "exempt", "warned", "audited", "pinned"] {
            cluster.kubectl(&["create", "namespace", namespace]).await?.expect_code(0)?;
        }
        cluster.kubectl(&["label", "namespace", "exempt", "countersign.dev/admission=off"]).await?.expect_code(0)?;
        Ok(Self { tag: house.reference("team/app", "1.0"), signed, unsigned, cluster, webhook, house })
    }

    /// With nothing but what the cluster keeps: no policy yet, and the rights to follow them. `kubernetes` is what else there is in that
    /// section of the configuration.
    pub async fn with_resources(registry: Options, kubernetes: &str) -> Result<Self> {
        let house = House::start(Plan { registry, ..Plan::default() }).await?;
        let (signed, unsigned) = pushed(&house).await?;
        let cluster = Cluster::start().await?;
        cluster.apply(&manifest("resources.yaml", &[])?, &[]).await?.expect_code(0)?;
        for plural in ["securitypolicies", "witnesses"] {
            let definition = format!("crd/{plural}.countersign.dev");
            cluster.kubectl(&["wait", "--for=condition=Established", "--timeout=60s", &definition]).await?.expect_code(0)?;
        }
        cluster.kubectl(&["create", "namespace", "payments"]).await?.expect_code(0)?;
        let config = format!(
            "kubernetes = {{ kubeconfig = \"{}\", resources = true, {kubernetes} }}\n\
             [[registry]]\nname = \"{}\"\nurl = \"{}\"\n",
            cluster.kubeconfig(WEBHOOK).display(),
            house.registry.host(),
            house.registry.url(),
        );
        grant(&cluster, "countersign.dev", &["securitypolicies", "witnesses"], &["get", "list", "watch"]).await?;
        grant(&cluster, "countersign.dev", &["securitypolicies/status", "witnesses/status"], &["patch"]).await?;
        let webhook = Webhook::start(&config).await?;
        Ok(Self { tag: house.reference("team/app", "1.0"), signed, unsigned, cluster, webhook, house })
    }

    /// Applies a resource of ours.
    pub async fn resource(&self, kind: &str, name: &str, spec: &Value) -> Result<Output> {
        let object = json!({"apiVersion": "countersign.dev/v1", "kind": kind, "metadata": {"name": name}, "spec": spec});
        self.cluster.apply(&object.to_string(), &[]).await
    }

    /// The house's witness as a resource, and a policy that demands it in `payments`; in force.
    pub async fn witness_and_policy(&self) -> Result<()> {
        let pem = fs::read_to_string(self.house.public_key_path())?;
        self.resource("Witness", "release", &json!({"publicKey": pem})).await?.expect_code(0)?;
        let payments = json!({"witness": "release", "namespace": "payments", "enabled": true});
        self.resource("SecurityPolicy", "payments", &payments).await?.expect_code(0)?;
        self.until_ready_is("True").await
    }

    /// Waits for the condition of the policy `payments`.
    pub async fn until_ready_is(&self, status: &str) -> Result<()> {
        let until = format!("--for=condition=Ready={status}");
        self.cluster.kubectl(&["wait", &until, "--timeout=60s", "securitypolicy/payments"]).await?.expect_code(0)?;
        Ok(())
    }

    /// As deploy/kubernetes/webhook.yaml has it, and for a kind that the configuration tells it of; but by address, as there is no network
    /// of pods.
    pub async fn register(&self) -> Result<()> {
        let url = format!("url: https://127.0.0.1:{}/validate", self.webhook.port());
        let by_service = "service: {namespace: countersign, name: countersign-admission, path: /validate}";
        let registration = manifest("webhook.yaml", &[(by_service, &url), ("CA_BUNDLE", self.webhook.bundle())])?;
        let templates = "      - {operations: [CREATE, UPDATE], apiGroups: [\"\"], apiVersions: [v1], resources: [podtemplates]}";
        self.cluster.apply(&format!("{registration}{templates}\n"), &[]).await?.expect_code(0)?;
        in_force(&self.cluster, &self.unsigned).await
    }

    /// By the administrator, words between spaces.
    pub async fn kubectl(&self, line: &str) -> Result<Output> {
        let arguments: Vec<&str> = line.split(' ').collect();
        self.cluster.kubectl(&arguments).await
    }

    pub async fn create(&self, user: &str, namespace: &str, object: &Value) -> Result<Output> {
        self.cluster.kubectl_as(user, &["--namespace", namespace, "create", "--filename=-"], &object.to_string()).await
    }

    /// None for a Job: the API server itself lets nobody change what it runs.
    pub async fn change_image(&self, object: &Value, pointer: &str, image: &str) -> Result<Option<Output>> {
        if object["kind"] == "Job" {
            return Ok(None);
        }
        let patch = json!([{"op": "replace", "path": pointer, "value": image}]).to_string();
        let arguments = ["--namespace=payments", "patch", &named(object), "--type=json", "--patch", &patch];
        self.cluster.kubectl(&arguments).await.map(Some)
    }
}

/// Lets the webhook do this, as the README says what it needs.
pub async fn grant(cluster: &Cluster, group: &str, resources: &[&str], verbs: &[&str]) -> Result<()> {
    let role = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": {"name": format!("webhook-{}", resources[0].replace('/', "-"))},
        "rules": [{"apiGroups": [group], "resources": resources, "verbs": verbs}],
    });
    let name = &role["metadata"]["name"];
    let binding = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": name},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": WEBHOOK}],
    });
    cluster
        .apply(&json!({"apiVersion": "v1", "kind": "List", "items": [role, binding]}).to_string(), &[])
        .await?
        .expect_code(0)?;
    Ok(())
}

/// One image that is signed, and one that is not.
pub async fn pushed(house: &House) -> Result<(String, String)> {
    let (signed, unsigned) = (Image::oci("signed")?, Image::oci("unsigned")?);
    house.push(&signed, "team/app", &["1.0"]).await?;
    house.push(&unsigned, "other/app", &["1.0"]).await?;
    house.wait_signed("team/app", &signed.manifest.digest, &["1.0"]).await?;
    let reference = |repository: &str, image: &Image| house.reference(repository, &image.manifest.digest);
    Ok((reference("team/app", &signed), reference("other/app", &unsigned)))
}

/// The API server hears of webhooks a little later than it has stored them.
pub async fn in_force(cluster: &Cluster, unsigned: &str) -> Result<()> {
    let pod = pod("probe", unsigned).to_string();
    eventually("the webhook is asked", LIMIT, async || {
        let probe = ["--namespace=payments", "create", "--dry-run=server", "--filename=-"];
        Ok((cluster.kubectl_as(ADMIN, &probe, &pod).await?.code != Some(0)).then_some(()))
    })
    .await
}

/// A file of deploy/kubernetes, with other words where it says so.
pub fn manifest(name: &str, changes: &[(&str, &str)]) -> Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("deploy").join("kubernetes").join(name);
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    changes.iter().try_fold(text, |text, (from, to)| {
        ensure!(text.contains(from), "{name} has no {from:?}");
        Ok(text.replace(from, to))
    })
}

pub fn pod(name: &str, image: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
        "spec": {"containers": [{"name": "web", "image": image}]}})
}

/// Every kind with a pod of this image in it, and where that stands.
pub fn kinds(name: &str, image: &str) -> Vec<(Value, &'static str)> {
    const TEMPLATE: &str = "/spec/template/spec/containers/0/image";
    let labels = json!({"app": "web"});
    let spec = pod(name, image)["spec"].clone();
    let template = json!({"metadata": {"labels": labels}, "spec": spec});
    let mut job = template.clone();
    job["spec"]["restartPolicy"] = json!("Never");
    let mut init = pod(&format!("{name}-init"), image);
    init["spec"]["initContainers"] = json!([{"name": "init", "image": image}]);
    let mut objects = vec![(pod(name, image), "/spec/containers/0/image"), (init, "/spec/initContainers/0/image")];
    let selector = json!({"matchLabels": labels});
    let of = |version: &str, kind: &str, spec: Value| json!({"apiVersion": version, "kind": kind, "metadata": {"name": name}, "spec": spec});
    for kind in ["Deployment", "ReplicaSet", "DaemonSet"] {
        objects.push((of("apps/v1", kind, json!({"selector": selector, "template": template})), TEMPLATE));
    }
    let stateful = json!({"serviceName": "web", "selector": selector, "template": template});
    objects.push((of("apps/v1", "StatefulSet", stateful), TEMPLATE));
    objects.push((of("v1", "ReplicationController", json!({"selector": labels, "template": template})), TEMPLATE));
    objects.push((of("batch/v1", "Job", json!({"template": job})), TEMPLATE));
    let scheduled = json!({"schedule": "0 3 * * *", "jobTemplate": {"spec": {"template": job}}});
    // batch/v1 has it from Kubernetes 1.21 on.
    objects.push((of("batch/v1beta1", "CronJob", scheduled), "/spec/jobTemplate/spec/template/spec/containers/0/image"));
    // One that is known by its path only.
    let bare = json!({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": name}, "template": template});
    objects.push((bare, "/template/spec/containers/0/image"));
    objects
}

/// `pod/web`, as kubectl names it.
pub fn named(object: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_lowercase();
    format!("{}/{}", text(&object["kind"]), text(&object["metadata"]["name"]))
}

/// What kubectl printed of a denial, after what it says itself.
#[track_caller]
pub fn denied(output: &Output, image: &str) -> String {
    assert_eq!((output.code, output.stdout.as_str()), (Some(1), ""), "{output:?}");
    let denial = format!("admission webhook \"{HOOK}\" denied the request: image {image} is not attested\n");
    let why = output.stderr.split_once(&denial).unwrap_or_else(|| panic!("{denial}: {output:?}")).1;
    why.trim_end().to_owned()
}
