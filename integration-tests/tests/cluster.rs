//! The webhook in a cluster: a real kube-apiserver asks it by TLS, as deploy/kubernetes has it asked, and what is read here is
//! what kubectl prints. `make cluster-test` runs this; `tests/cluster_api.rs` has what the webhook asks the cluster for.

use anyhow::{Context as _, Result};
use integration_tests::kubernetes::ADMIN;
use integration_tests::kubernetes::scene::{HOOK, LIMIT, Scene, denied, kinds, manifest, named, pod};
use integration_tests::process::eventually;
use serde_json::json;

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
