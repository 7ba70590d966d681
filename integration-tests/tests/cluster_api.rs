//! What the webhook has of the API of its cluster, a real kube-apiserver: resources with their statuses, secrets, pods that run, Events.
//! And deploy/kubernetes in it. `make cluster-test` runs this.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use integration_tests::house::{House, Plan};
use integration_tests::kubernetes::scene::{HOOK, LIMIT, Scene, denied, grant, in_force, manifest, pod, pushed};
use integration_tests::kubernetes::{ADMIN, ANNA, Cluster, WEBHOOK};
use integration_tests::process::{eventually, scratch};
use integration_tests::registry::{LOGIN, Options};
use integration_tests::webhook::{SERVICE, Webhook};
use serde_json::json;

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

#[tokio::test]
async fn policies_that_the_cluster_keeps_are_in_force_and_it_says_of_each_whether_it_can_be() -> Result<()> {
    let definitions = integration_tests::daemon::run(&["admission", "--crds"], &[]).await?.expect_code(0)?.stdout;
    assert_eq!(definitions, manifest("resources.yaml", &[])?);
    let scene = Scene::with_resources(Options::default(), "events = true").await?;

    // What its definition says is no policy the API server itself does not take.
    for (spec, what) in [
        (json!({"namespace": "payments"}), "spec"),
        (json!({"witness": "release", "namespace": "payments", "mode": "hard"}), "spec.mode"),
        (json!({"witness": "release", "namespace": "payments", "maxAge": "soon"}), "spec.maxAge"),
    ] {
        let refused = scene.resource("SecurityPolicy", "payments", &spec).await?;
        assert!(refused.code == Some(1) && refused.stderr.contains(what), "{refused:?}");
    }
    // One that nobody can meet, because there is no such witness, closes its namespace and says so.
    let payments = json!({"witness": "release", "namespace": "payments", "enabled": true});
    scene.resource("SecurityPolicy", "payments", &payments).await?.expect_code(0)?;
    scene.until_ready_is("False").await?;
    let wide = scene.kubectl("get securitypolicies --output=wide").await?.expect_code(0)?.stdout;
    assert!(wide.contains("no Witness is named \"release\""), "{wide}");
    scene.register().await?;
    let closed = denied(&scene.create(ADMIN, "payments", &pod("early", &scene.signed)).await?, &scene.signed);
    assert!(closed.contains("nothing is admitted as long as this policy cannot be used"), "{closed}");

    scene.witness_and_policy().await?;
    scene.create(ADMIN, "payments", &pod("web", &scene.signed)).await?.expect_code(0)?;
    let why = denied(&scene.create(ADMIN, "payments", &pod("other", &scene.unsigned)).await?, &scene.unsigned);
    assert_eq!(why, "  policy payments: it is not signed, and witness release must have signed it");
    scene.kubectl("delete securitypolicy payments").await?.expect_code(0)?;
    eventually("the policy is gone", LIMIT, async || {
        let dry = ["--namespace=payments", "create", "--dry-run=server", "--filename=-"];
        Ok((scene.cluster.kubectl_as(ADMIN, &dry, &pod("free", &scene.unsigned).to_string()).await?.code == Some(0))
            .then_some(()))
    })
    .await
}

#[tokio::test]
async fn a_denial_says_what_keeps_a_pull_secret_from_being_read_until_it_can_be() -> Result<()> {
    let registry = Options { login: true, ..Options::default() };
    let scene = Scene::with_resources(registry, "pull_secrets = true").await?;
    scene.witness_and_policy().await?;
    scene.register().await?;
    let mut web = pod("web", &scene.signed);
    web["spec"]["imagePullSecrets"] = json!([{"name": "pull"}]);
    // What could not be read is asked for again some seconds later.
    let until_said = async |what: &str| {
        eventually(what, LIMIT, async || {
            let output = scene.create(ADMIN, "payments", &web).await?;
            let why = denied(&output, &scene.signed);
            assert!(why.starts_with("  policy payments: its registry could not be asked: "), "{why}");
            Ok(why.contains(what).then_some(()))
        })
        .await
    };
    until_said("; countersign may not read the Secret payments/pull: allow its service account to `get` secrets").await?;
    grant(&scene.cluster, "", &["secrets", "serviceaccounts"], &["get"]).await?;
    until_said("; there is no Secret payments/pull: make it, or correct its name in the object").await?;
    let make = async |line: &str| {
        scene.kubectl("--namespace payments delete secret pull --ignore-not-found").await?.expect_code(0)?;
        scene.kubectl(&format!("--namespace payments create secret {line}")).await?.expect_code(0)
    };
    make("generic pull --from-literal=password=hunter2").await?;
    until_said("; the Secret payments/pull is of the type \"Opaque\", which has no logins: make it by `kubectl create").await?;
    let login = format!("--docker-username={} --docker-password={}", LOGIN.0, LOGIN.1);
    make(&format!("docker-registry pull --docker-server={} {login}", scene.house.registry.host())).await?;
    eventually(
        "it is admitted",
        LIMIT,
        async || Ok((scene.create(ADMIN, "payments", &web).await?.code == Some(0)).then_some(())),
    )
    .await?;
    let read = scene.cluster.audited("pull")?.into_iter().rfind(|event| event["user"]["username"] == WEBHOOK);
    let read = read.context("the secret was read")?;
    assert_eq!((&read["verb"], &read["responseStatus"]["code"]), (&json!("get"), &json!(200)), "{read}");
    assert!(!scene.webhook.logged().contains(LOGIN.1), "{}", scene.webhook.logged());
    Ok(())
}

#[tokio::test]
async fn what_runs_is_told_of_when_its_witness_is_revoked_or_a_policy_is_new_and_runs_on() -> Result<()> {
    let scene = Scene::with_resources(Options::default(), "recheck = { every = \"1s\", rate = 100 }").await?;
    grant(&scene.cluster, "", &["pods"], &["list"]).await?;
    grant(&scene.cluster, "events.k8s.io", &["events"], &["create"]).await?;
    scene.kubectl("create namespace shop").await?.expect_code(0)?;
    scene.witness_and_policy().await?;
    scene.register().await?;
    let run = async |namespace: &str, image: &str| {
        scene.create(ADMIN, namespace, &pod("web", image)).await?.expect_code(0)?;
        // As a node would say.
        let status = ["--subresource=status", "--type=merge", "--patch={\"status\": {\"phase\": \"Running\"}}"];
        let patch = [&["--namespace", namespace, "patch", "pod", "web"], &status[..]].concat();
        scene.cluster.kubectl(&patch).await?.expect_code(0)
    };
    run("payments", &scene.signed).await?;
    run("shop", &scene.unsigned).await?;
    let uid_and_phase = async |namespace: &str| {
        let line = format!("--namespace {namespace} get pod web --output=jsonpath={{.metadata.uid}}/{{.status.phase}}");
        anyhow::Ok(scene.kubectl(&line).await?.expect_code(0)?.stdout)
    };
    let before = [uid_and_phase("payments").await?, uid_and_phase("shop").await?];
    assert!(before.iter().all(|pod| pod.ends_with("/Running")), "{before:?}");

    let until = async |attested: u64, unmet: u64| {
        eventually(&format!("{attested} attested, {unmet} unmet"), LIMIT, async || {
            let metrics = scene.webhook.metrics().await?;
            let count = |state| metrics.count("countersign_admission_running_images", &[("state", state)]);
            Ok(((count("attested"), count("unmet")) == (attested, unmet)).then_some(metrics))
        })
        .await
    };
    until(1, 0).await?;
    let report = scene.webhook.run(&["report"]).await?.expect_code(0)?.stdout;
    assert_eq!(report, "2 pods run; of 1 images where policies are in force, 0 would be denied now\n");

    let pem = fs::read_to_string(scene.house.public_key_path())?;
    let revoked = json!([{"key": pem, "revoked": "2020-01-01T00:00:00Z", "reason": "stolen"}]);
    scene.resource("Witness", "release", &json!({"publicKey": pem, "verify": revoked})).await?.expect_code(0)?;
    let shop = json!({"witness": "release", "namespace": "shop", "enabled": true});
    scene.resource("SecurityPolicy", "shop", &shop).await?.expect_code(0)?;
    let metrics = until(0, 2).await?;
    for (policy, reason) in [("payments", "revoked"), ("shop", "unsigned")] {
        let labels = [("policy", policy), ("mode", "enforce"), ("reason", reason)];
        assert_eq!(metrics.count("countersign_admission_running_unmet", &labels), 1, "{metrics:?}");
    }
    for (namespace, image, why) in [("payments", &scene.signed, "stolen"), ("shop", &scene.unsigned, "it is not signed")] {
        let said = eventually("an Event tells of the pod", LIMIT, async || {
            let said = scene.kubectl(&format!("--namespace {namespace} describe pod web")).await?.expect_code(0)?.stdout;
            Ok(said.contains("NotAttested").then_some(said))
        })
        .await?;
        assert!(said.contains(&format!("image {image} is not attested")) && said.contains(why), "{said}");
    }
    let report = scene.webhook.run(&["report"]).await?.expect_code(1)?.stdout;
    for namespace in ["payments", "shop"] {
        assert!(report.contains(&format!("{namespace}: would be denied now\n")), "{report}");
    }
    assert_eq!(report.matches("  pods: web\n").count(), 2, "{report}");
    assert!(report.ends_with("2 pods run; of 2 images where policies are in force, 2 would be denied now\n"), "{report}");

    // It would not be admitted again, and stays where it is.
    denied(&scene.create(ADMIN, "payments", &pod("again", &scene.signed)).await?, &scene.signed);
    assert_eq!([uid_and_phase("payments").await?, uid_and_phase("shop").await?], before);
    let verbs: Vec<_> = scene.cluster.audited("web")?.into_iter().filter(|event| event["user"]["username"] == WEBHOOK).collect();
    assert_eq!(verbs, [json!(null); 0], "it does nothing to pods");
    Ok(())
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
