//! The webhook in a cluster: a real kube-apiserver asks it by TLS, as deploy/kubernetes has it asked, and what is read here is
//! what kubectl prints. `make cluster-test` runs this.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use integration_tests::daemon::Output;
use integration_tests::house::{House, Plan};
use integration_tests::image::Image;
use integration_tests::kubernetes::{ADMIN, ANNA, Cluster, WEBHOOK};
use integration_tests::process::{eventually, scratch};
use integration_tests::webhook::{SERVICE, Webhook};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);
const HOOK: &str = "admission.countersign.dev";

/// Signed and unsigned images in a registry, a webhook that has policies on them, and a cluster that does not ask it yet.
struct Scene {
    cluster: Cluster,
    webhook: Webhook,
    tag: String,
    signed: String,
    unsigned: String,
    house: House,
}

impl Scene {
    async fn set() -> Result<Self> {
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

    /// As deploy/kubernetes/webhook.yaml has it, and for a kind that the configuration tells it of; but by address, as there is no network
    /// of pods.
    async fn register(&self) -> Result<()> {
        let url = format!("url: https://127.0.0.1:{}/validate", self.webhook.port());
        let by_service = "service: {namespace: countersign, name: countersign-admission, path: /validate}";
        let registration = manifest("webhook.yaml", &[(by_service, &url), ("CA_BUNDLE", self.webhook.bundle())])?;
        let templates = "      - {operations: [CREATE, UPDATE], apiGroups: [\"\"], apiVersions: [v1], resources: [podtemplates]}";
        self.cluster.apply(&format!("{registration}{templates}\n"), &[]).await?.expect_code(0)?;
        in_force(&self.cluster, &self.unsigned).await
    }

    async fn kubectl(&self, line: &str) -> Result<Output> {
        let arguments: Vec<&str> = line.split(' ').collect();
        self.cluster.kubectl(&arguments).await
    }

    async fn create(&self, user: &str, namespace: &str, object: &Value) -> Result<Output> {
        self.cluster.kubectl_as(user, &["--namespace", namespace, "create", "--filename=-"], &object.to_string()).await
    }

    /// None for a Job: the API server itself lets nobody change what it runs.
    async fn change_image(&self, object: &Value, pointer: &str, image: &str) -> Result<Option<Output>> {
        if object["kind"] == "Job" {
            return Ok(None);
        }
        let patch = json!([{"op": "replace", "path": pointer, "value": image}]).to_string();
        let arguments = ["--namespace=payments", "patch", &named(object), "--type=json", "--patch", &patch];
        self.cluster.kubectl(&arguments).await.map(Some)
    }
}

/// Lets the webhook do this, as the README says what it needs.
async fn grant(cluster: &Cluster, group: &str, resources: &[&str], verbs: &[&str]) -> Result<()> {
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
async fn pushed(house: &House) -> Result<(String, String)> {
    let (signed, unsigned) = (Image::oci("signed")?, Image::oci("unsigned")?);
    house.push(&signed, "team/app", &["1.0"]).await?;
    house.push(&unsigned, "other/app", &["1.0"]).await?;
    house.wait_signed("team/app", &signed.manifest.digest, &["1.0"]).await?;
    let reference = |repository: &str, image: &Image| house.reference(repository, &image.manifest.digest);
    Ok((reference("team/app", &signed), reference("other/app", &unsigned)))
}

/// The API server hears of webhooks a little later than it has stored them.
async fn in_force(cluster: &Cluster, unsigned: &str) -> Result<()> {
    let pod = pod("probe", unsigned).to_string();
    eventually("the webhook is asked", LIMIT, async || {
        let probe = ["--namespace=payments", "create", "--dry-run=server", "--filename=-"];
        Ok((cluster.kubectl_as(ADMIN, &probe, &pod).await?.code != Some(0)).then_some(()))
    })
    .await
}

/// A file of deploy/kubernetes, with other words where it says so.
fn manifest(name: &str, changes: &[(&str, &str)]) -> Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("deploy").join("kubernetes").join(name);
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    changes.iter().try_fold(text, |text, (from, to)| {
        ensure!(text.contains(from), "{name} has no {from:?}");
        Ok(text.replace(from, to))
    })
}

fn pod(name: &str, image: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
        "spec": {"containers": [{"name": "web", "image": image}]}})
}

/// Every kind with a pod of this image in it, and where that stands.
fn kinds(name: &str, image: &str) -> Vec<(Value, &'static str)> {
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
fn named(object: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_lowercase();
    format!("{}/{}", text(&object["kind"]), text(&object["metadata"]["name"]))
}

/// What kubectl printed of a denial, after what it says itself.
#[track_caller]
fn denied(output: &Output, image: &str) -> String {
    assert_eq!((output.code, output.stdout.as_str()), (Some(1), ""), "{output:?}");
    let denial = format!("admission webhook \"{HOOK}\" denied the request: image {image} is not attested\n");
    let why = output.stderr.split_once(&denial).unwrap_or_else(|| panic!("{denial}: {output:?}")).1;
    why.trim_end().to_owned()
}

#[tokio::test]
async fn of_the_three_commands_the_one_with_a_signed_digest_deploys() -> Result<()> {
    let scene = Scene::set().await?;
    scene.register().await?;
    let Scene { tag, signed, unsigned, .. } = &scene;
    let (_, digest) = signed.split_once('@').context("a digest")?;
    let head = format!("error: failed to create deployment: admission webhook \"{HOOK}\" denied the request: ");
    let command = |image: &str| format!("--namespace payments create deployment web --image={image}");

    let by_tag = scene.kubectl(&command(tag)).await?;
    let why = "it is used by a tag, and tags can be moved; use the digest, which is attested";
    assert_eq!(by_tag.stderr, format!("{head}image {tag} is not attested\n  policy payments: {why}: {tag}@{digest}\n"));
    assert_eq!((by_tag.code, by_tag.stdout.as_str()), (Some(1), ""));

    let by_unsigned = scene.kubectl(&command(unsigned)).await?;
    let why = "it is not signed, and witness release must have signed it";
    assert_eq!(by_unsigned.stderr, format!("{head}image {unsigned} is not attested\n  policy payments: {why}\n"));
    assert_eq!((by_unsigned.code, by_unsigned.stdout.as_str()), (Some(1), ""));

    let admitted = scene.kubectl(&command(signed)).await?;
    assert_eq!((admitted.stdout.as_str(), admitted.stderr.as_str()), ("deployment.apps/web created\n", ""));
    let listed = scene.kubectl("--namespace payments get deployments --output=name").await?;
    assert_eq!(listed.stdout, "deployment.apps/web\n");
    Ok(())
}

#[tokio::test]
async fn every_kind_is_judged_when_it_is_created_and_when_its_images_change() -> Result<()> {
    let scene = Scene::set().await?;
    let Scene { tag, signed, unsigned, .. } = &scene;
    // What was there before anybody asked.
    for (object, _) in kinds("old", unsigned) {
        scene.create(ADMIN, "payments", &object).await?.expect_code(0)?;
    }
    scene.register().await?;

    for (object, _) in kinds("web", tag) {
        let why = denied(&scene.create(ADMIN, "payments", &object).await?, tag);
        assert!(why.contains("use the digest, which is attested"), "{}: {why}", named(&object));
    }
    for (object, _) in kinds("web", unsigned) {
        let why = denied(&scene.create(ADMIN, "payments", &object).await?, unsigned);
        assert_eq!(why, "  policy payments: it is not signed, and witness release must have signed it", "{}", named(&object));
    }
    for (object, pointer) in kinds("web", signed) {
        scene.create(ADMIN, "payments", &object).await?.expect_code(0)?;
        if let Some(changed) = scene.change_image(&object, pointer, unsigned).await? {
            denied(&changed, unsigned);
        }
    }
    // What touches no image is nobody's to block, whatever the images are; and what does is better.
    for (object, pointer) in kinds("old", unsigned) {
        let name = named(&object);
        scene.kubectl(&format!("--namespace payments annotate {name} mended=true")).await?.expect_code(0)?;
        if let Some(changed) = scene.change_image(&object, pointer, signed).await? {
            changed.expect_code(0)?;
        }
    }
    scene.kubectl("--namespace payments scale deployment/old --replicas=3").await?.expect_code(0)?;
    Ok(())
}

#[tokio::test]
async fn a_tag_is_pinned_in_what_is_stored_and_a_custom_resource_is_judged_by_its_path() -> Result<()> {
    let scene = Scene::set().await?;
    let Scene { cluster, tag, signed, unsigned, webhook, .. } = &scene;
    cluster.apply(ROLLOUTS, &[]).await?.expect_code(0)?;
    scene.register().await?;
    let url = format!("url: https://127.0.0.1:{}/mutate", webhook.port());
    let by_service = "service: {namespace: countersign, name: countersign-admission, path: /mutate}";
    let again = "    # Another webhook";
    let rollouts = "      - {operations: [CREATE, UPDATE], apiGroups: [argoproj.io], apiVersions: [v1], resources: [rollouts]}";
    let registration = manifest(
        "mutating.yaml",
        &[(by_service, &url), ("CA_BUNDLE", webhook.bundle()), (again, &format!("{rollouts}\n{again}"))],
    )?;
    cluster.apply(&registration, &[]).await?.expect_code(0)?;
    let (_, digest) = signed.split_once('@').context("a digest")?;
    let pinned = format!("{tag}@{digest}");
    let image_of = async |name: &str, pointer: &str| {
        let path = format!("--output=jsonpath={{{}}}", pointer.replace("/0/", "[0]/").replace('/', "."));
        anyhow::Ok(cluster.kubectl(&["--namespace=pinned", "get", name, &path]).await?.expect_code(0)?.stdout)
    };
    let mut pins = kinds("web", tag);
    pins.retain(|(object, _)| object["kind"] != "PodTemplate");
    let template = json!({"spec": pod("web", tag)["spec"]});
    let rollout =
        json!({"apiVersion": "argoproj.io/v1", "kind": "Rollout", "metadata": {"name": "web"}, "spec": {"template": template}});
    pins.push((rollout, "/spec/template/spec/containers/0/image"));
    // The API server hears of the second webhook a little later than it has stored it.
    let probe = pod("probe", tag).to_string();
    eventually("the mutating webhook is asked", LIMIT, async || {
        let probe_it = ["--namespace=pinned", "create", "--dry-run=server", "--output=yaml", "--filename=-"];
        Ok(cluster.kubectl_as(ADMIN, &probe_it, &probe).await?.stdout.contains(&pinned).then_some(()))
    })
    .await?;
    for (object, pointer) in &pins {
        scene.create(ADMIN, "pinned", object).await?.expect_code(0)?;
        assert_eq!(image_of(&named(object), pointer).await?, pinned, "{}", named(object));
    }
    let (mut other, pointer) = pins.pop().context("the rollout")?;
    other["metadata"]["name"] = json!("other");
    *other.pointer_mut(pointer).context("an image")? = json!(unsigned);
    let why = denied(&scene.create(ADMIN, "pinned", &other).await?, unsigned);
    assert!(why.contains("it is not signed"), "{why}");
    Ok(())
}

/// A kind that Kubernetes does not have.
const ROLLOUTS: &str = "apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: rollouts.argoproj.io}
spec:
  group: argoproj.io
  scope: Namespaced
  names: {kind: Rollout, plural: rollouts, singular: rollout}
  versions:
    - name: v1
      served: true
      storage: true
      schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}
";

#[tokio::test]
async fn ephemeral_containers_are_judged_alone() -> Result<()> {
    let scene = Scene::set().await?;
    scene.create(ADMIN, "payments", &pod("old", &scene.unsigned)).await?.expect_code(0)?;
    scene.register().await?;
    // As Kubernetes 1.20 has it; `kubectl debug` of today speaks of the pod itself.
    let debug = async |image: &str| {
        let containers = json!([{"name": "debug", "image": image, "imagePullPolicy": "IfNotPresent",
            "terminationMessagePolicy": "File"}]);
        let object = json!({"apiVersion": "v1", "kind": "EphemeralContainers", "metadata": {"name": "old"},
            "ephemeralContainers": containers});
        let path = "/api/v1/namespaces/payments/pods/old/ephemeralcontainers";
        scene.cluster.kubectl_as(ADMIN, &["replace", "--raw", path, "--filename=-"], &object.to_string()).await
    };
    let why = denied(&debug(&scene.unsigned).await?, &scene.unsigned);
    assert!(why.contains("it is not signed"), "{why}");
    debug(&scene.signed).await?.expect_code(0)?;
    let name = scene.kubectl("--namespace payments get pod old --output=jsonpath={.spec.ephemeralContainers[*].image}").await?;
    assert_eq!(name.stdout, scene.signed);
    Ok(())
}

#[tokio::test]
async fn a_dry_run_warnings_the_audit_log_and_namespaces_that_are_left_out_are_as_kubectl_has_them() -> Result<()> {
    let scene = Scene::set().await?;
    scene.register().await?;
    let Scene { cluster, tag, signed, unsigned, .. } = &scene;

    denied(&cluster.apply(&pod("dry", unsigned).to_string(), &["--namespace=payments", "--dry-run=server"]).await?, unsigned);
    let dry = cluster.apply(&pod("dry", signed).to_string(), &["--namespace=payments", "--dry-run=server"]).await?;
    assert_eq!(dry.stdout, "pod/dry created (server dry run)\n", "{dry:?}");
    assert_eq!(scene.kubectl("--namespace payments get pods --output=name").await?.stdout, "");

    let warned = scene.create(ADMIN, "warned", &pod("warned", unsigned)).await?;
    let warning = format!("Warning: image {unsigned} is not attested (policy warned): it is not signed, and witness release");
    assert_eq!(warned.stdout, "pod/warned created\n", "{warned:?}");
    assert!(warned.stderr.starts_with(&warning), "{warned:?}");
    assert_eq!(scene.create(ADMIN, "warned", &pod("fine", signed)).await?.stderr, "");

    let audited = scene.create(ADMIN, "audited", &pod("audited", tag)).await?;
    assert_eq!((audited.stdout.as_str(), audited.stderr.as_str()), ("pod/audited created\n", ""));
    let annotation = eventually("it is in the audit log", LIMIT, async || {
        let events = cluster.audited("audited")?;
        let mut annotations = events.iter().map(|event| &event["annotations"]);
        Ok(annotations.find_map(|of| of[format!("{HOOK}/unmet-audit")].as_str().map(str::to_owned)))
    })
    .await?;
    assert!(
        annotation.starts_with(&format!("image {tag} is not attested\n  policy audited: it is used by a tag")),
        "{annotation}"
    );

    // The policy is in force there, and the cluster does not ask.
    assert!(!scene.webhook.create("exempt", unsigned).await?.allowed);
    scene.create(ADMIN, "exempt", &pod("web", unsigned)).await?.expect_code(0)?;
    Ok(())
}

#[tokio::test]
#[expect(clippy::disallowed_methods, reason = "the webhook goes by the system's clock")]
async fn breakglass_is_for_those_who_may() -> Result<()> {
    let scene = Scene::set().await?;
    scene.register().await?;
    let mut urgent = pod("urgent", &scene.unsigned);
    let until = jiff::Timestamp::now() + Duration::from_secs(3600);
    urgent["metadata"]["annotations"] = json!({"countersign.dev/breakglass": format!("until {until} because INC-42")});
    let refused = scene.create(ADMIN, "payments", &urgent).await?;
    let why = format!(
        "admission webhook \"{HOOK}\" denied the request: the annotation countersign.dev/breakglass does not count: \
         \"admin\" is none of the users and groups that [admission] breakglass names\n"
    );
    assert!(refused.code == Some(1) && refused.stderr.ends_with(&why), "{refused:?}");
    let admitted = scene.create(ANNA, "payments", &urgent).await?;
    assert_eq!(admitted.stdout, "pod/urgent created\n", "{admitted:?}");
    denied(&scene.create(ANNA, "payments", &pod("usual", &scene.unsigned)).await?, &scene.unsigned);
    let told = eventually("an Event tells of it", LIMIT, async || {
        let events = scene.kubectl("--namespace payments describe pod urgent").await?.expect_code(0)?.stdout;
        Ok(events.contains("Breakglass").then_some(events))
    })
    .await?;
    assert!(told.contains(&format!("anna got past all policies, until {until}: INC-42")), "{told}");
    Ok(())
}

/// Waits for the condition of the policy `payments`.
async fn until_ready_is(cluster: &Cluster, status: &str) -> Result<()> {
    let until = format!("--for=condition=Ready={status}");
    cluster.kubectl(&["wait", &until, "--timeout=60s", "securitypolicy/payments"]).await?.expect_code(0)?;
    Ok(())
}

#[tokio::test]
async fn policies_that_the_cluster_keeps_are_in_force_and_it_says_of_each_whether_it_can_be() -> Result<()> {
    let house = House::start(Plan::default()).await?;
    let (signed, unsigned) = pushed(&house).await?;
    let cluster = Cluster::start().await?;
    let definitions = integration_tests::daemon::run(&["admission", "--crds"], &[]).await?.expect_code(0)?.stdout;
    assert_eq!(definitions, manifest("resources.yaml", &[])?);
    cluster.apply(&definitions, &[]).await?.expect_code(0)?;
    for plural in ["securitypolicies", "witnesses"] {
        let definition = format!("crd/{plural}.countersign.dev");
        cluster.kubectl(&["wait", "--for=condition=Established", "--timeout=60s", &definition]).await?.expect_code(0)?;
    }
    cluster.kubectl(&["create", "namespace", "payments"]).await?.expect_code(0)?;
    let config = format!(
        "kubernetes = {{ kubeconfig = \"{}\", resources = true, pull_secrets = true }}\n\
         [[registry]]\nname = \"{}\"\nurl = \"{}\"\n",
        cluster.kubeconfig(WEBHOOK).display(),
        house.registry.host(),
        house.registry.url(),
    );
    grant(&cluster, "countersign.dev", &["securitypolicies", "witnesses"], &["get", "list", "watch"]).await?;
    grant(&cluster, "countersign.dev", &["securitypolicies/status", "witnesses/status"], &["patch"]).await?;
    grant(&cluster, "", &["secrets", "serviceaccounts"], &["get"]).await?;
    let webhook = Webhook::start(&config).await?;
    let resource = |kind: &str, name: &str, spec: &Value| {
        json!({"apiVersion": "countersign.dev/v1", "kind": kind, "metadata": {"name": name}, "spec": spec}).to_string()
    };
    let policy = |spec: &Value| resource("SecurityPolicy", "payments", spec);

    // What its definition says is no policy the API server itself does not take.
    for (spec, what) in [
        (json!({"namespace": "payments"}), "spec"),
        (json!({"witness": "release", "namespace": "payments", "mode": "hard"}), "spec.mode"),
        (json!({"witness": "release", "namespace": "payments", "maxAge": "soon"}), "spec.maxAge"),
    ] {
        let refused = cluster.apply(&policy(&spec), &[]).await?;
        assert!(refused.code == Some(1) && refused.stderr.contains(what), "{refused:?}");
    }
    // One that nobody can meet, because there is no such witness, closes its namespace and says so.
    let payments = json!({"witness": "release", "namespace": "payments", "enabled": true});
    cluster.apply(&policy(&payments), &[]).await?.expect_code(0)?;
    until_ready_is(&cluster, "False").await?;
    let wide = cluster.kubectl(&["get", "securitypolicies", "--output=wide"]).await?.expect_code(0)?.stdout;
    assert!(wide.contains("no Witness is named \"release\""), "{wide}");
    let scene = Scene { tag: house.reference("team/app", "1.0"), signed, unsigned, cluster, webhook, house };
    scene.register().await?;
    let closed = denied(&scene.create(ADMIN, "payments", &pod("early", &scene.signed)).await?, &scene.signed);
    assert!(closed.contains("nothing is admitted as long as this policy cannot be used"), "{closed}");

    let pem = fs::read_to_string(scene.house.public_key_path())?;
    scene.cluster.apply(&resource("Witness", "release", &json!({"publicKey": pem})), &[]).await?.expect_code(0)?;
    until_ready_is(&scene.cluster, "True").await?;
    // Pulled with a secret of its own, which the webhook reads and this registry does not mind.
    let server = format!("--docker-server={}", scene.house.registry.host());
    let secret = ["--namespace=payments", "create", "secret", "docker-registry", "pull", &server];
    let login = ["--docker-username=tester", "--docker-password=tester"];
    scene.cluster.kubectl(&[&secret[..], &login].concat()).await?.expect_code(0)?;
    let mut web = pod("web", &scene.signed);
    web["spec"]["imagePullSecrets"] = json!([{"name": "pull"}]);
    scene.create(ADMIN, "payments", &web).await?.expect_code(0)?;
    let read = scene.cluster.audited("pull")?.into_iter().find(|event| event["verb"] == "get").context("the secret was read")?;
    assert_eq!((&read["user"]["username"], &read["responseStatus"]["code"]), (&json!(WEBHOOK), &json!(200)), "{read}");
    let why = denied(&scene.create(ADMIN, "payments", &pod("other", &scene.unsigned)).await?, &scene.unsigned);
    assert_eq!(why, "  policy payments: it is not signed, and witness release must have signed it");
    scene.cluster.kubectl(&["delete", "securitypolicy", "payments"]).await?.expect_code(0)?;
    eventually("the policy is gone", LIMIT, async || {
        let dry = ["--namespace=payments", "create", "--dry-run=server", "--filename=-"];
        Ok((scene.cluster.kubectl_as(ADMIN, &dry, &pod("free", &scene.unsigned).to_string()).await?.code == Some(0))
            .then_some(()))
    })
    .await
}

#[tokio::test]
async fn what_is_in_deploy_kubernetes_is_taken_by_the_api_server_and_keeps_it_from_running_what_is_not_signed() -> Result<()> {
    let house = House::start(Plan::default()).await?;
    let (signed, unsigned) = pushed(&house).await?;

    let cluster = Cluster::start().await?;
    let host = house.registry.host();
    let public_key = fs::read_to_string(house.public_key_path())?.trim_end().replace('\n', "\n    ");
    let installed = manifest(
        "admission.yaml",
        &[
            ("registry.example.com", &host),
            ("PUBLIC_KEY", &public_key),
            // What Kubernetes 1.20 does not have yet.
            ("apiVersion: policy/v1\n", "apiVersion: policy/v1beta1\n"),
            ("preStop: {sleep: {seconds: 5}}", "preStop: {exec: {command: [/countersign, health]}}"),
        ],
    )?;
    let applied = cluster.apply(&installed, &[]).await?.expect_code(0)?;
    let mut kinds: Vec<_> = applied.stdout.lines().filter_map(|line| line.split(['/', '.']).next()).collect();
    kinds.sort_unstable();
    assert_eq!(
        kinds,
        [
            "configmap",
            "deployment",
            "namespace",
            "networkpolicy",
            "poddisruptionbudget",
            "resourcequota",
            "service",
            "serviceaccount"
        ],
        "{applied:?}"
    );

    let daemon = manifest("daemon.yaml", &[])?;
    let applied = cluster.apply(&daemon, &[]).await?.expect_code(0)?;
    assert!(applied.stdout.contains("statefulset.apps/countersign created"), "{applied:?}");

    // The webhook, by the configuration that is now in the cluster. Its paths are the container's.
    let folder = scratch()?;
    let read = async |name: &str| {
        let path = format!("--output=jsonpath={{.data.{name}}}");
        let arguments = ["--namespace=countersign", "get", "configmap", "countersign-admission", &path];
        anyhow::Ok(cluster.kubectl(&arguments).await?.expect_code(0)?.stdout)
    };
    let (key, logins) = (folder.path().join("release.pub.pem"), folder.path().join("config.json"));
    fs::write(&key, read("release\\.pub\\.pem").await?)?;
    fs::write(&logins, json!({"auths": {&host: {"username": "nobody", "password": "nothing"}}}).to_string())?;
    let mut config = read("countersign\\.toml").await?;
    let listener = format!(
        "[admission]\nlisten = \"0.0.0.0:8443\"\ncluster = \"prod-eu\"\n\
         tls = {{ folder = \"/var/lib/countersign/admission\", names = [\"{SERVICE}\"] }}\n"
    );
    for (from, to) in [
        (listener, "cluster = \"prod-eu\"\n".to_owned()),
        ("/run/secrets/countersign/config.json".to_owned(), logins.display().to_string()),
        ("\"release.pub.pem\"".to_owned(), format!("\"{}\"", key.display())),
        (format!("name = \"{host}\"\n"), format!("name = \"{host}\"\nurl = \"{}\"\n", house.registry.url())),
    ] {
        ensure!(config.contains(&from), "the configuration has no {from:?}: {config}");
        config = config.replace(&from, &to);
    }
    let webhook = Webhook::start(&config).await?;

    // A service by its name, and the certificate for that name; where it leads is another matter, as there is no network of pods.
    let outside = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "countersign-admission", "namespace": "countersign"},
        "spec": {"type": "ExternalName", "externalName": "localhost"}});
    let kubectl = async |line: &str| cluster.kubectl(&line.split(' ').collect::<Vec<_>>()).await?.expect_code(0);
    kubectl("--namespace countersign delete service countersign-admission").await?;
    cluster.apply(&outside.to_string(), &[]).await?.expect_code(0)?;
    kubectl("create namespace payments").await?;
    let port = format!("path: /validate, port: {}}}", webhook.port());
    let registration = manifest("webhook.yaml", &[("path: /validate}", &port), ("CA_BUNDLE", webhook.bundle())])?;
    cluster.apply(&registration, &[]).await?.expect_code(0)?;
    in_force(&cluster, &unsigned).await?;

    let create = async |namespace: &str, name: &str, image: &str| {
        let namespace = format!("--namespace={namespace}");
        cluster.kubectl_as(ADMIN, &[&namespace, "create", "--filename=-"], &pod(name, image).to_string()).await
    };
    let is_asked = async || Ok((create("payments", "signed", &signed).await?.code == Some(0)).then_some(()));
    eventually("the service is found", LIMIT, is_asked).await?;
    denied(&create("payments", "unsigned", &unsigned).await?, &unsigned);
    let own = kubectl("--namespace countersign get deployment countersign-admission --output=jsonpath={..image}").await?.stdout;
    assert!(own.ends_with("/tools/countersign:0.1.0"), "{own}");
    create("payments", "own", &own).await?.expect_code(0)?;
    create("countersign", "unsigned", &unsigned).await?.expect_code(0)?;

    // Without countersign nothing comes in, but for what mends it.
    drop(webhook);
    let refused = create("payments", "later", &signed).await?;
    let failed = format!("failed calling webhook \"{HOOK}\"");
    assert!(refused.code == Some(1) && refused.stderr.contains(&failed), "{refused:?}");
    create("countersign", "later", &own).await?.expect_code(0)?;
    cluster.kubectl_as(ADMIN, &["delete", "--filename=-"], &registration).await?.expect_code(0)?;
    let open = async || Ok((create("payments", "later", &signed).await?.code == Some(0)).then_some(()));
    eventually("nobody is asked any more", LIMIT, open).await
}
