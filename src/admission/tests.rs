//! Reviews from end to end, but for what a registry says: `integration-tests` has that.

use std::{collections::HashMap, sync::Mutex};

use axum::body::Body;
use http::StatusCode;
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tower::ServiceExt as _;

use super::*;
use crate::{
    clock::Clock,
    config::Breakglass,
    policy::{Mode, Patterns, Policies, Policy},
    registry::{self, Registry, Timeouts},
    telemetry::Metrics,
};

const PATIENCE: Duration = Duration::from_millis(300);

/// A webhook with these policies, and a registry `127.0.0.1:PORT` that takes connections and never answers.
struct Bench {
    webhook: Arc<Webhook>,
    silent: String,
    _listener: Mutex<TcpListener>,
}

async fn bench(policies: Vec<Policy>) -> Bench {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent = listener.local_addr().unwrap().to_string();
    let registry = Registry::new(registry::Settings {
        name: silent.parse().unwrap(),
        url: format!("http://{silent}").parse().unwrap(),
        credentials: None,
        ca: None,
        timeouts: Timeouts::default(),
        observer: None,
    })
    .unwrap();
    let (clock, _) = Clock::manual("2026-11-22T12:00:00Z".parse().unwrap());
    let judge = Judge {
        policies: Policies::new(policies.into_iter().map(|policy| Policy { enabled: true, ..policy }), None).unwrap(),
        allow: Patterns::parse(&["registry.k8s.io/**".to_owned()]).unwrap(),
        kinds: Kinds::default(),
        examiner: Examiner::new(ExaminerSettings {
            registries: HashMap::from([(silent.parse().unwrap(), registry)]),
            witnesses: vec![],
            entries: 100,
            keep: Duration::from_secs(60),
            clock: clock.clone(),
        }),
        breakglass: Some(Breakglass { users: vec!["anna".into()], groups: vec![], longest: Duration::from_secs(24 * 3600) }),
        daemon: None,
        pull_secrets: None,
        events: None,
        clock,
    };
    let webhook = Arc::new(Webhook::new(judge, PATIENCE, Metrics::new()));
    Bench { webhook, silent, _listener: Mutex::new(listener) }
}

fn policy() -> Policy {
    Policy::new("payments", "release", "payments")
}

fn pod(images: &[&str]) -> Value {
    let containers: Vec<_> =
        images.iter().enumerate().map(|(index, image)| json!({"name": format!("c{index}"), "image": image})).collect();
    json!({"metadata": {"name": "web"}, "spec": {"containers": containers}})
}

fn request(operation: &str, namespace: &str, object: &Value, old: &Value) -> Value {
    json!({
        "kind": "AdmissionReview",
        "apiVersion": "admission.k8s.io/v1",
        "request": {
            "uid": "u",
            "kind": {"group": "", "version": "v1", "kind": "Pod"},
            "operation": operation,
            "namespace": namespace,
            "userInfo": {"username": "anna"},
            "object": object,
            "oldObject": old,
        },
    })
}

impl Bench {
    async fn post(&self, path: &str, body: String) -> (StatusCode, Value) {
        let request = http::Request::post(path).body(Body::from(body)).unwrap();
        let answer = router(self.webhook.clone()).oneshot(request).await.unwrap();
        let status = answer.status();
        (status, serde_json::from_slice(&answer.into_body().collect().await.unwrap().to_bytes()).unwrap())
    }

    async fn review(&self, body: &Value) -> Value {
        let (status, answer) = self.post("/validate?timeout=30s", body.to_string()).await;
        assert_eq!((status, &answer["response"]["uid"]), (StatusCode::OK, &json!("u")));
        answer["response"].clone()
    }

    async fn create(&self, namespace: &str, images: &[&str]) -> Value {
        self.review(&request("CREATE", namespace, &pod(images), &Value::Null)).await
    }
}

fn message(response: &Value) -> &str {
    assert_eq!(response["allowed"], false, "{response}");
    response["status"]["message"].as_str().unwrap()
}

#[tokio::test]
async fn where_nothing_is_demanded_everything_is_admitted() {
    let bench = bench(vec![policy()]).await;
    assert_eq!(bench.create("default", &["alpine:3.11"]).await["allowed"], true);
    assert_eq!(bench.create("payments", &["registry.k8s.io/pause:3.10"]).await["allowed"], true);
    for operation in ["DELETE", "CONNECT"] {
        let review = request(operation, "payments", &Value::Null, &pod(&["alpine:3.11"]));
        assert_eq!(bench.review(&review).await["allowed"], true, "{operation}");
    }
}

#[tokio::test]
async fn an_image_that_cannot_be_verified_is_denied_with_the_line_that_users_know() {
    let bench = bench(vec![policy()]).await;
    let response = bench.create("payments", &["alpine:3.11", "alpine:3.11", "Bad Reference"]).await;
    let text = message(&response);
    assert!(
        text.starts_with("image alpine:3.11 is not attested\n  policy payments: images of the registry docker.io "),
        "{text}"
    );
    assert_eq!(text.matches("alpine:3.11 is not attested").count(), 1);
    assert!(text.contains("\nimage Bad Reference is not attested\n  policy payments: it is no image reference"), "{text}");
}

#[tokio::test]
async fn a_silent_registry_is_answered_in_time_and_with_the_reason() {
    let bench = bench(vec![policy()]).await;
    let image = format!("{}/app@sha256:{}", bench.silent, "a".repeat(64));
    let began = Instant::now();
    let response = bench.create("payments", &[&image]).await;
    assert!(message(&response).contains("its registry did not answer within the 0.3 s"), "{response}");
    assert!(began.elapsed() < Duration::from_secs(20), "within the deadline, give or take a busy machine");
}

#[tokio::test]
async fn an_update_that_brings_no_image_is_admitted_whatever_the_policies() {
    let bench = bench(vec![policy()]).await;
    let mut labelled = pod(&["alpine:3.11"]);
    labelled["metadata"]["labels"] = json!({"a": "b"});
    let unchanged = request("UPDATE", "payments", &labelled, &pod(&["alpine:3.11"]));
    assert_eq!(bench.review(&unchanged).await["allowed"], true);
    let changed = request("UPDATE", "payments", &pod(&["alpine:3.12"]), &pod(&["alpine:3.11"]));
    assert!(message(&bench.review(&changed).await).starts_with("image alpine:3.12 is not attested\n"));
}

#[tokio::test]
async fn policies_that_only_warn_or_audit_admit_and_tell() {
    let warn = Policy { mode: Mode::Warn, ..policy() };
    let audit = Policy { mode: Mode::Audit, name: "audited".into(), ..policy() };
    let bench = bench(vec![warn, audit]).await;
    let response = bench.create("payments", &["alpine:3.11"]).await;
    assert_eq!(response["allowed"], true);
    let warning = response["warnings"][0].as_str().unwrap();
    assert!(warning.starts_with("image alpine:3.11 is not attested (policy payments): "), "{warning}");
    let audited = response["auditAnnotations"]["unmet-audit"].as_str().unwrap();
    assert!(audited.contains("policy audited: "), "{audited}");
}

#[tokio::test]
async fn breakglass_admits_those_who_may_and_denies_everybody_else() {
    let bench = bench(vec![policy()]).await;
    let annotated = |annotation: &str| {
        let mut pod = pod(&["alpine:3.11"]);
        pod["metadata"]["annotations"] = json!({"countersign.dev/breakglass": annotation});
        pod
    };
    let good = annotated("until 2026-11-22T18:00:00Z because INC-42");
    let mut review = request("CREATE", "payments", &good, &Value::Null);
    let admitted = bench.review(&review).await;
    assert_eq!(admitted["allowed"], true);
    assert!(admitted["auditAnnotations"]["breakglass"].as_str().unwrap().contains("anna until 2026-11-22T18:00:00Z: INC-42"));
    review["request"]["userInfo"]["username"] = json!("bob");
    assert!(message(&bench.review(&review).await).contains("\"bob\" is none of the users"));
    // Not even by adding it to what runs already, for the pods that are made of it later.
    let prepared = |user: &str| {
        let mut review = request("UPDATE", "payments", &good, &pod(&["alpine:3.11"]));
        review["request"]["userInfo"]["username"] = json!(user);
        review
    };
    assert_eq!(bench.review(&prepared("bob")).await["allowed"], false);
    assert_eq!(bench.review(&prepared("anna")).await["allowed"], true);
    let over = request("CREATE", "payments", &annotated("until 2026-11-22T11:00:00Z because x"), &Value::Null);
    assert!(message(&bench.review(&over).await).contains("it ended at"));
}

#[tokio::test]
async fn enormous_objects_get_a_clear_answer() {
    let bench = bench(vec![policy()]).await;
    let same = vec!["alpine:3.11"; 10_000];
    assert!(message(&bench.create("payments", &same).await).starts_with("image alpine:3.11 is not attested\n"));
    let texts: Vec<_> = (0..10_000).map(|number| format!("alpine:{number}")).collect();
    let different: Vec<_> = texts.iter().map(String::as_str).collect();
    assert!(message(&bench.create("payments", &different).await).contains("more than 512 different images"));
    let long = "x".repeat(3 << 20);
    let response = bench.create("payments", &[&long]).await;
    assert!(message(&response).len() < 2000);
}

#[tokio::test]
async fn a_body_that_is_no_review_is_a_problem_and_never_an_admission() {
    let bench = bench(vec![policy()]).await;
    for body in ["", "{}", "null", "<html>", r#"{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1","request":{}}"#] {
        let (status, problem) = bench.post("/validate", body.to_owned()).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{body}");
        assert!(problem["detail"].as_str().unwrap().contains("AdmissionReview"), "{problem}");
    }
    let malformed = request("CREATE", "payments", &json!({"spec": {"containers": "none"}}), &Value::Null);
    assert!(message(&bench.review(&malformed).await).contains("not what its kind says"));
}

#[tokio::test]
async fn a_kind_that_is_not_known_is_admitted_with_a_warning() {
    let bench = bench(vec![policy()]).await;
    let mut review = request("CREATE", "payments", &json!({"spec": {}}), &Value::Null);
    review["request"]["kind"] = json!({"group": "argoproj.io", "version": "v1alpha1", "kind": "Rollout"});
    let response = bench.review(&review).await;
    assert_eq!(response["allowed"], true);
    assert!(response["warnings"][0].as_str().unwrap().contains("[admission] kinds"));
    review["request"]["subResource"] = json!("scale");
    assert!(bench.review(&review).await["warnings"].is_null());
}
