//! What the webhook has of its cluster's API: `SecurityPolicy` and `Witness` resources, `imagePullSecrets`, Events; beside an API that is
//! cut, forgets and fails. `tests/cluster_api.rs` has the same beside a real kube-apiserver.

use std::time::Duration;

use anyhow::{Context as _, Result};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use integration_tests::api_server::ApiServer;
use integration_tests::house::{House, Plan};
use integration_tests::image::Image;
use integration_tests::process::{eventually, scratch};
use integration_tests::registry::{LOGIN, Options};
use integration_tests::webhook::{Webhook, pod, review};
use serde_json::{Value, json};
use tempfile::TempDir;

const LIMIT: Duration = Duration::from_secs(60);
const POLICIES: &str = "/apis/countersign.dev/v1/securitypolicies";
const WITNESSES: &str = "/apis/countersign.dev/v1/witnesses";

/// A house with a signed and an unsigned image, an API with the house's witness, and a webhook that has nothing but these.
struct Scene {
    house: House,
    api: ApiServer,
    webhook: Webhook,
    config: String,
    signed: String,
    unsigned: String,
    _folder: TempDir,
}

impl Scene {
    async fn set(registry: Options, kubernetes: &str, more: &str) -> Result<Self> {
        let house = House::start(Plan { registry, ..Plan::default() }).await?;
        let (signed, unsigned) = (Image::oci("signed")?, Image::oci("unsigned")?);
        house.push(&signed, "team/app", &["1.0"]).await?;
        house.push(&unsigned, "other/app", &["1.0"]).await?;
        house.wait_signed("team/app", &signed.manifest.digest, &["1.0"]).await?;
        let (folder, api) = (scratch()?, ApiServer::start().await?);
        let pem = std::fs::read_to_string(house.public_key_path())?;
        api.put(WITNESSES, "release", &json!({"spec": {"publicKey": pem}}));
        let kubeconfig = api.kubeconfig(folder.path())?;
        let config = format!(
            "kubernetes = {{ kubeconfig = \"{}\", {kubernetes} }}\n{more}\n[[registry]]\nname = \"{}\"\nurl = \"{}\"\n",
            kubeconfig.display(),
            house.registry.host(),
            house.registry.url(),
        );
        let webhook = Webhook::start(&config).await?;
        let signed = house.reference("team/app", &signed.manifest.digest);
        let unsigned = house.reference("other/app", &unsigned.manifest.digest);
        Ok(Self { house, api, webhook, config, signed, unsigned, _folder: folder })
    }

    async fn with_resources() -> Result<Self> {
        Self::set(Options::default(), "resources = true", "").await
    }

    fn policy(&self, name: &str, spec: &Value) {
        self.api.put(POLICIES, name, &json!({"spec": spec}));
    }

    /// Waits until an unsigned image is denied in the namespace, or admitted.
    async fn until_unsigned_is(&self, allowed: bool, namespace: &str) -> Result<()> {
        eventually("the policy is in force", LIMIT, async || {
            Ok((self.webhook.create(namespace, &self.unsigned).await?.allowed == allowed).then_some(()))
        })
        .await
    }

    async fn until_ready_is(&self, collection: &str, name: &str, status: &str) -> Result<String> {
        eventually("the status says so", LIMIT, async || {
            Ok(self.api.ready(collection, name).filter(|(is, _)| is == status).map(|(_, message)| message))
        })
        .await
    }
}

fn payments() -> Value {
    json!({"witness": "release", "namespace": "payments", "enabled": true})
}

#[tokio::test]
async fn policies_come_into_force_change_and_go_as_the_cluster_has_them() -> Result<()> {
    let scene = Scene::with_resources().await?;
    assert!(scene.webhook.create("payments", &scene.unsigned).await?.allowed, "nothing is demanded yet");
    scene.policy("payments", &payments());
    scene.until_unsigned_is(false, "payments").await?;
    assert!(scene.webhook.create("payments", &scene.signed).await?.allowed);
    let answer = scene.webhook.create("payments", &scene.unsigned).await?;
    assert_eq!(answer.why(&scene.unsigned)?, "  policy payments: it is not signed, and witness release must have signed it");
    assert_eq!(scene.until_ready_is(POLICIES, "payments", "True").await?, "it is in force");
    scene.until_ready_is(WITNESSES, "release", "True").await?;

    scene.policy("payments", &json!({"witness": "release", "namespace": "pay*", "enabled": true, "mode": "warn"}));
    scene.until_unsigned_is(true, "payments").await?;
    let warned = scene.webhook.create("paying", &scene.unsigned).await?;
    assert!(warned.response["warnings"][0].as_str().context("a warning")?.contains("policy payments"), "{warned:?}");
    scene.policy("payments", &payments());
    scene.until_unsigned_is(false, "payments").await?;
    scene.api.delete(POLICIES, "payments");
    scene.until_unsigned_is(true, "payments").await
}

#[tokio::test]
async fn nothing_is_admitted_before_the_policies_were_read_and_nothing_forgotten_when_the_configuration_is_read_again()
-> Result<()> {
    let mut scene = Scene::with_resources().await?;
    scene.policy("payments", &payments());
    scene.until_unsigned_is(false, "payments").await?;
    scene.webhook.reload(&scene.config).await?;
    assert!(!scene.webhook.create("payments", &scene.unsigned).await?.allowed);
    assert!(scene.webhook.create("payments", &scene.signed).await?.allowed);

    scene.webhook.kill()?;
    scene.api.fail(Some(500));
    scene.webhook.start_unready().await?;
    for namespace in ["payments", "elsewhere"] {
        let answer = scene.webhook.create(namespace, &scene.signed).await?;
        assert!(answer.why(&scene.signed)?.contains("have not been read yet: try again in a moment"), "{answer:?}");
    }
    assert!(scene.webhook.get("/readyz").await.is_err(), "nobody is to be sent here");
    scene.api.fail(None);
    eventually("they are read", LIMIT, async || Ok(scene.webhook.get("/readyz").await.is_ok().then_some(()))).await?;
    scene.until_unsigned_is(true, "elsewhere").await?;
    assert!(scene.webhook.create("payments", &scene.signed).await?.allowed);
    assert!(!scene.webhook.create("payments", &scene.unsigned).await?.allowed);
    Ok(())
}

#[tokio::test]
async fn a_bad_policy_closes_its_namespace_says_why_and_harms_no_other() -> Result<()> {
    let scene = Scene::with_resources().await?;
    scene.policy("payments", &payments());
    scene.until_unsigned_is(false, "payments").await?;
    scene.policy("shop", &json!({"witness": "nobody", "namespace": "shop", "enabled": true}));
    scene.until_unsigned_is(false, "shop").await?;
    let answer = scene.webhook.create("shop", &scene.signed).await?;
    let why = answer.why(&scene.signed)?;
    assert!(
        why.starts_with(
            "  policy shop: nothing is admitted as long as this policy cannot be used: `witness`: no Witness is named"
        ),
        "{why}"
    );
    let said = scene.until_ready_is(POLICIES, "shop", "False").await?;
    assert!(said.contains("no Witness is named \"nobody\"") && said.ends_with("nothing is admitted to shop"), "{said}");
    assert!(scene.webhook.create("payments", &scene.signed).await?.allowed);
    let logged = scene.webhook.logged();
    assert_eq!(logged.matches("a resource of the cluster cannot be used kind=SecurityPolicy name=shop").count(), 1, "{logged}");
    let metrics = scene.webhook.metrics().await?;
    let refused = [("kind", "SecurityPolicy"), ("state", "refused")];
    assert_eq!(metrics.count("countersign_admission_resources", &refused), 1);

    // The witness comes later than the policy that wants it.
    let pem = std::fs::read_to_string(scene.house.public_key_path())?;
    scene.api.put(WITNESSES, "nobody", &json!({"spec": {"publicKey": pem}}));
    scene.until_ready_is(POLICIES, "shop", "True").await?;
    assert!(scene.webhook.create("shop", &scene.signed).await?.allowed);
    // And a key that is revoked counts no more, whatever was remembered of its signatures.
    let revoked = json!([{"key": pem, "revoked": "2020-01-01T00:00:00Z", "reason": "stolen"}]);
    scene.api.put(WITNESSES, "release", &json!({"spec": {"publicKey": pem, "verify": revoked}}));
    eventually("the key is revoked", LIMIT, async || {
        Ok((!scene.webhook.create("payments", &scene.signed).await?.allowed).then_some(()))
    })
    .await?;
    let answer = scene.webhook.create("payments", &scene.signed).await?;
    assert!(answer.why(&scene.signed)?.contains("it is signed by nobody, and not by witness release"), "{answer:?}");
    assert!(scene.webhook.create("shop", &scene.signed).await?.allowed, "as the other witness's it still counts");
    Ok(())
}

#[tokio::test]
async fn what_changed_while_a_watch_was_cut_or_its_place_forgotten_is_found() -> Result<()> {
    let scene = Scene::with_resources().await?;
    scene.policy("payments", &payments());
    scene.until_unsigned_is(false, "payments").await?;
    scene.api.cut();
    scene.policy("shop", &json!({"witness": "release", "namespace": "shop", "enabled": true}));
    scene.until_unsigned_is(false, "shop").await?;
    scene.policy("third", &json!({"witness": "release", "namespace": "third", "enabled": true}));
    scene.api.forget();
    scene.api.delete(POLICIES, "payments");
    scene.until_unsigned_is(true, "payments").await?;
    scene.until_unsigned_is(false, "third").await?;
    assert!(!scene.webhook.create("shop", &scene.unsigned).await?.allowed);
    Ok(())
}

#[tokio::test]
async fn while_the_api_is_away_the_policies_count_on_and_readyz_and_metrics_say_so() -> Result<()> {
    let scene = Scene::with_resources().await?;
    scene.policy("payments", &payments());
    scene.until_unsigned_is(false, "payments").await?;
    scene.api.fail(Some(500));
    eventually("it is noticed", LIMIT, async || {
        Ok(scene.webhook.get("/readyz").await?.contains("SecurityPolicy resources are as they were at").then_some(()))
    })
    .await?;
    assert!(!scene.webhook.create("payments", &scene.unsigned).await?.allowed);
    assert!(scene.webhook.create("payments", &scene.signed).await?.allowed);
    let lost = [("kind", "SecurityPolicy")];
    eventually("the metric rises", LIMIT, async || {
        Ok((scene.webhook.metrics().await?.count("countersign_admission_resources_lost_seconds", &lost) > 0).then_some(()))
    })
    .await?;
    scene.api.fail(None);
    scene.policy("shop", &json!({"witness": "release", "namespace": "shop", "enabled": true}));
    scene.until_unsigned_is(false, "shop").await?;
    eventually("it is well again", LIMIT, async || {
        let is_noted = scene.webhook.get("/readyz").await?.contains("as they were");
        let lost = scene.webhook.metrics().await?.count("countersign_admission_resources_lost_seconds", &lost);
        Ok((!is_noted && lost == 0).then_some(()))
    })
    .await
}

#[tokio::test]
async fn a_registry_is_logged_in_to_with_the_secrets_of_the_pod_or_of_its_service_account() -> Result<()> {
    let registry = Options { login: true, ..Options::default() };
    let scene = Scene::set(registry, "resources = true, pull_secrets = true", "").await?;
    scene.policy("payments", &payments());
    scene.until_unsigned_is(false, "payments").await?;
    let answer = scene.webhook.create("payments", &scene.signed).await?;
    assert!(answer.why(&scene.signed)?.contains("its registry could not be asked"), "{answer:?}");

    let auths = json!({"auths": {scene.house.registry.host(): {"username": LOGIN.0, "password": LOGIN.1}}});
    let secret = |content: &Value| {
        let data = BASE64_STANDARD.encode(content.to_string());
        json!({"apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/dockerconfigjson", "data": {".dockerconfigjson": data}})
    };
    let secrets = "/api/v1/namespaces/payments/secrets";
    scene.api.put(secrets, "good", &secret(&auths));
    scene.api.put(secrets, "other", &secret(&json!({"auths": {"elsewhere.example.com": {"username": "a", "password": "b"}}})));
    let wrong = json!({"auths": {scene.house.registry.host(): {"username": LOGIN.0, "password": "wrong"}}});
    scene.api.put(secrets, "wrong", &secret(&wrong));
    scene.api.put(
        "/api/v1/namespaces/payments/serviceaccounts",
        "web",
        &json!({"apiVersion": "v1", "kind": "ServiceAccount", "imagePullSecrets": [{"name": "good"}]}),
    );
    let create = async |change: &dyn Fn(&mut Value)| {
        let mut pod = pod(&[&scene.signed]);
        change(&mut pod["spec"]);
        scene.webhook.call("/validate?timeout=30s", &review("CREATE", "payments", "/v1", "Pod", &pod, &Value::Null)).await
    };
    let of = |names: &'static [&'static str]| {
        move |spec: &mut Value| spec["imagePullSecrets"] = names.iter().map(|name| json!({"name": name})).collect()
    };
    // What is in them is nobody's to read, and why they are of no use is for whoever named them.
    scene.api.put(
        secrets,
        "opaque",
        &json!({"apiVersion": "v1", "kind": "Secret", "type": "Opaque", "data": {"password": "aHVudGVyMg=="}}),
    );
    scene.api.put(
        secrets,
        "broken",
        &json!({"apiVersion": "v1", "kind": "Secret", "data": {".dockerconfigjson": "aHVudGVyMg=="}}),
    );
    let denied = create(&of(&["other", "missing", "opaque", "broken", "../secrets/good"])).await?;
    let why = denied.why(&scene.signed)?;
    let make = "make it by `kubectl create secret docker-registry`";
    let host = scene.house.registry.host();
    for (number, expected) in [
        "no Secret can have the name \"../secrets/good\": correct it in the object".to_owned(),
        "there is no Secret payments/missing: make it, or correct its name in the object".to_owned(),
        format!("the Secret payments/opaque is of the type \"Opaque\", which has no logins: {make}"),
        format!("what the Secret payments/broken holds is no docker configuration: {make}"),
        format!("the Secret payments/other has no login of {host}: {make} --docker-server={host}"),
    ]
    .iter()
    .enumerate()
    {
        assert_eq!(why.trim_end().split("; ").nth(number + 1), Some(expected.as_str()), "{why}");
    }
    assert!(!why.contains("hunter2") && !why.contains("aHVudGVyMg"), "{why}");
    let denied = create(&of(&["wrong"])).await?;
    let why = denied.why(&scene.signed)?;
    assert!(why.contains(&format!("the account {:?} is not let in", LOGIN.0)) && !why.contains("Secret"), "{why}");
    let unknown_account = create(&|spec| spec["serviceAccountName"] = json!("nobody")).await?;
    let why = unknown_account.why(&scene.signed)?;
    assert!(why.contains("; there is no ServiceAccount payments/nobody: make it"), "{why}");
    let by_account = create(&|spec| spec["serviceAccountName"] = json!("web")).await?;
    assert!(by_account.allowed, "{by_account:?}");
    scene.api.requests();
    assert!(create(&of(&["wrong", "good"])).await?.allowed);
    let read: Vec<_> = scene.api.requests().into_iter().filter(|request| request.contains("/namespaces/payments/")).collect();
    assert_eq!(read, [""; 0], "what is known of the image needs no secret");
    assert!(!scene.webhook.logged().contains(&BASE64_STANDARD.encode(auths.to_string())));
    Ok(())
}

#[tokio::test]
#[expect(clippy::disallowed_methods, reason = "the webhook goes by the system's clock")]
async fn an_emergency_is_told_by_an_event_on_the_object_and_waits_for_none() -> Result<()> {
    let breakglass = "breakglass = { users = [\"anna\"] }\n";
    let scene = Scene::set(Options::default(), "resources = true", breakglass).await?;
    scene.policy("payments", &payments());
    scene.until_unsigned_is(false, "payments").await?;
    let until = (jiff::Timestamp::now() + Duration::from_secs(3600)).to_string();
    let mut object = pod(&[&scene.unsigned]);
    object["metadata"]["uid"] = json!("4711");
    object["metadata"]["annotations"] = json!({"countersign.dev/breakglass": format!("until {until} because INC-42")});
    let mut emergency = review("CREATE", "payments", "/v1", "Pod", &object, &Value::Null);
    emergency["request"]["dryRun"] = json!(true);
    assert!(scene.webhook.call("/validate", &emergency).await?.allowed);
    assert!(scene.webhook.call("/mutate", &emergency).await?.allowed);
    emergency["request"]["dryRun"] = json!(false);
    assert!(scene.webhook.call("/validate", &emergency).await?.allowed);
    let events = "/apis/events.k8s.io/v1/namespaces/payments/events";
    let sent = eventually("the Event is there", LIMIT, async || {
        let events = scene.api.objects(events);
        Ok((!events.is_empty()).then_some(events))
    })
    .await?;
    assert_eq!(sent.len(), 1, "none of a dry run, and one of the two webhooks: {sent:?}");
    let event = &sent[0];
    assert_eq!((&event["reason"], &event["type"]), (&json!("Breakglass"), &json!("Warning")));
    assert_eq!(event["note"], format!("anna got past all policies, until {until}: INC-42"));
    assert_eq!(
        event["regarding"],
        json!({"apiVersion": "v1", "kind": "Pod", "name": "web", "namespace": "payments", "uid": "4711"})
    );

    scene.api.fail(Some(503));
    assert!(scene.webhook.call("/validate", &emergency).await?.allowed);
    eventually("the failure is counted", LIMIT, async || {
        let failed = scene.webhook.metrics().await?.count("countersign_kubernetes_events_total", &[("result", "failed")]);
        Ok((failed == 1).then_some(()))
    })
    .await
}
