use integration_tests::google::{EMAIL, Fault, PROVIDER, USER};
use refresh::Source as _;
use serde_json::{Value, json};

use super::*;
use crate::kms::gcp::tests::Scene;

impl Scene {
    fn source(&self, variables: &[(&str, &str)]) -> Source {
        let home = [("HOME", self.folder.path().to_str().unwrap())];
        let environment = Environment::of_all(home.into_iter().chain(variables.iter().copied()));
        let http = exchange::client(Patience::USUAL.connect, Patience::USUAL.attempt).no_proxy().build().unwrap();
        let named = environment.get("GCE_METADATA_HOST");
        Source {
            clock: self.clock.clone(),
            outside: http.clone(),
            inside: http,
            has_account: AtomicBool::new(named.is_some()),
            metadata: named.unwrap_or_else(|| self.cloud.address.clone()),
            environment,
        }
    }

    /// What the file of credentials is good for, or what is wrong with it.
    async fn with(&self, file: &Value) -> Result<Bearer, CredentialsError> {
        let path = self.write("credentials.json", &file.to_string());
        self.source(&[("GOOGLE_APPLICATION_CREDENTIALS", &path)]).fetch().await
    }

    async fn wrong_with(&self, file: &Value) -> String {
        self.with(file).await.unwrap_err().to_string()
    }
}

#[tokio::test]
async fn the_file_that_is_named_comes_before_gclouds_and_that_before_the_machine() {
    let scene = Scene::set().await;
    let named = scene.write("named.json", &scene.cloud.service_account().to_string());
    scene.source(&[]).fetch().await.unwrap();
    let machine = "GET /computeMetadata/v1/instance/service-accounts/default/token";
    assert_eq!(scene.cloud.requests(), [machine]);
    let folder = scene.folder.path().join(".config/gcloud");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("application_default_credentials.json"), scene.cloud.user().to_string()).unwrap();
    scene.source(&[]).fetch().await.unwrap();
    assert_eq!(scene.cloud.requests(), ["POST /token"]);
    scene.source(&[("CLOUDSDK_CONFIG", "/nonexistent")]).fetch().await.unwrap();
    assert_eq!(scene.cloud.requests(), [machine]);
    scene.source(&[("GOOGLE_APPLICATION_CREDENTIALS", &named)]).fetch().await.unwrap();
    let error = scene.source(&[("GOOGLE_APPLICATION_CREDENTIALS", "/nonexistent")]).fetch().await.unwrap_err();
    assert!(error.to_string().contains("/nonexistent is not there"), "{error}");
    assert_eq!(scene.cloud.requests(), ["POST /token"], "no place is passed over");
}

#[tokio::test]
async fn a_federated_token_is_exchanged_and_read_each_time() {
    let scene = Scene::set().await;
    let token = scene.write("token", "subject.token-1\n");
    scene.with(&scene.cloud.external_account(&token, None)).await.unwrap();
    assert_eq!(scene.cloud.requests(), ["POST /v1/token"]);
    scene.write("token", "subject.token-2");
    scene.cloud.given().subject_token = "subject.token-2".into();
    let become_account = scene.cloud.external_account(&token, Some(EMAIL));
    let bearer = scene.with(&become_account).await.unwrap();
    let impersonation = format!("POST /v1/projects/-/serviceAccounts/{EMAIL}:generateAccessToken");
    assert_eq!(scene.cloud.requests(), ["POST /v1/token", &impersonation]);
    assert_eq!(bearer.expires(), Some("2026-11-22T05:59:59Z".parse().unwrap()));

    let mut in_json = become_account.clone();
    in_json["credential_source"]["format"] = json!({ "type": "json", "subject_token_field_name": "access_token" });
    scene.write("token", r#"{"access_token":"subject.token-2"}"#);
    scene.with(&in_json).await.unwrap();
    for text in ["{}", "", r#"{"access_token":7}"#, r#"{"access_token":"a b"}"#] {
        scene.write("token", text);
        assert!(scene.wrong_with(&in_json).await.contains("holds no token"), "{text}");
    }
    scene.write("token", "subject.token-1");
    let error = scene.with(&become_account).await.unwrap_err();
    assert!(!error.is_passing() && error.to_string().contains("is rejected"), "{error}");
    assert!(!format!("{error:?}").contains("subject.token"), "{error:?}");
    scene.write("token", "subject.token-2");
    let error = scene.wrong_with(&scene.cloud.external_account(&token, Some("other@p"))).await;
    assert!(error.contains("getAccessToken") && error.contains("other@p"), "{error}");
    let mut other = become_account;
    other["audience"] = PROVIDER.replace("ci", "cd").into();
    assert!(scene.wrong_with(&other).await.contains("invalid_target"));
}

#[tokio::test]
async fn a_persons_credentials_work_and_are_not_shown() {
    let scene = Scene::set().await;
    let mut file = scene.cloud.user();
    file.as_object_mut().unwrap().remove("client_secret");
    assert!(scene.wrong_with(&file).await.contains("has no client_secret"));
    scene.with(&scene.cloud.user()).await.unwrap();
    for field in ["client_secret", "refresh_token"] {
        let mut file = scene.cloud.user();
        file[field] = "another-secret".into();
        let error = scene.with(&file).await.unwrap_err();
        assert!(!error.is_passing(), "{error}");
        assert!(!format!("{error:?}").contains("another-secret") && !format!("{error:?}").contains(USER[2]), "{error:?}");
    }
}

#[tokio::test]
async fn files_that_cannot_be_used_are_said_and_not_repeated() {
    let scene = Scene::set().await;
    let account = scene.cloud.service_account();
    let external = scene.cloud.external_account("/token", None);
    let changed = |file: &Value, field: &str, value: Value| {
        let mut file = file.clone();
        file[field] = value;
        file
    };
    let source = |value: Value| changed(&external, "credential_source", value);
    for (file, part) in [
        (json!({}), "has no type"),
        (json!({ "type": "impersonated_service_account" }), "impersonated_service_account"),
        (changed(&account, "client_email", Value::Null), "has no client_email"),
        (changed(&account, "private_key", Value::Null), "has no private_key"),
        (changed(&account, "private_key", "hunter2".into()), "no RSA key"),
        (changed(&account, "token_uri", "http://oauth2.example.com/token".into()), "no https:// URL"),
        (changed(&account, "token_uri", "https://me:hunter2@oauth2.example.com/".into()), "no https:// URL"),
        (changed(&account, "universe_domain", "example.com".into()), "universe_domain"),
        (changed(&external, "token_url", "http://sts.example.com/".into()), "no https:// URL"),
        (changed(&external, "service_account_impersonation_url", "ftp://a".into()), "no https:// URL"),
        (changed(&external, "workforce_pool_user_project", "1".into()), "workforce"),
        (source(json!({ "url": "http://169.254.169.254/" })), "without a file"),
        (source(json!({ "file": "/token", "format": { "type": "json" } })), "subject_token_field_name"),
        (source(json!({ "file": "/token", "format": { "type": "xml" } })), "neither text nor json"),
    ] {
        let error = scene.wrong_with(&file).await;
        assert!(error.contains(part) && !error.contains("hunter2"), "{error} does not say {part}");
    }
    let path = scene.write("broken.json", "{\"private_key\": hunter2");
    let error = scene.source(&[("GOOGLE_APPLICATION_CREDENTIALS", &path)]).fetch().await.unwrap_err().to_string();
    assert!(error.contains("is not the JSON of Google's credentials (line 1") && !error.contains("hunter2"), "{error}");
    assert_eq!(scene.cloud.requests(), [""; 0]);
}

#[tokio::test]
async fn the_metadata_server_has_to_say_that_it_is_one() {
    let scene = Scene::set().await;
    scene.cloud.then([Fault::Says(r#"{"access_token":"x","expires_in":1}"#.into())]);
    let error = scene.source(&[]).fetch().await.unwrap_err().to_string();
    assert!(error.contains("there are no Google Cloud credentials") && error.contains("Metadata-Flavor"), "{error}");
    scene.cloud.then([Fault::Error(404, "")]);
    let error = scene.source(&[]).fetch().await.unwrap_err();
    assert!(!error.is_passing() && error.to_string().contains("GOOGLE_APPLICATION_CREDENTIALS"), "{error}");

    // Where there was an account before, or somebody says that there is one, it is away and not absent.
    let source = scene.source(&[]);
    source.fetch().await.unwrap();
    scene.cloud.then([Fault::NoAnswer]);
    assert!(source.fetch().await.unwrap_err().is_passing());
    let error = scene.source(&[("GCE_METADATA_HOST", "127.0.0.1:1")]).fetch().await.unwrap_err();
    assert!(error.is_passing(), "{error}");
    let error = scene.source(&[("GCE_METADATA_HOST", "not a host")]).fetch().await.unwrap_err();
    assert!(!error.is_passing() && error.to_string().contains("GCE_METADATA_HOST"), "{error}");
}

#[tokio::test]
async fn faults_of_the_token_endpoint_are_sorted_by_whether_they_pass() {
    let scene = Scene::set().await;
    for (fault, passing) in [
        (Fault::Error(503, "backend_error"), true),
        (Fault::Error(500, "internal_failure"), true),
        (Fault::Error(429, "rate_limit_exceeded"), true),
        (Fault::NoAnswer, true),
        (Fault::Reset, true),
        (Fault::Endless, true),
        (Fault::Says("<html>".into()), true),
        (Fault::Error(400, "invalid_grant"), false),
        (Fault::Error(401, "invalid_client"), false),
        (Fault::Error(403, "access_denied"), false),
    ] {
        scene.cloud.then([fault.clone()]);
        let error = scene.with(&scene.cloud.service_account()).await.unwrap_err();
        assert_eq!(error.is_passing(), passing, "{fault:?}: {error}");
    }
    let mut other = scene.cloud.service_account();
    other["client_email"] = "nobody@p-1".into();
    assert!(scene.wrong_with(&other).await.contains("account not found"));
    let mut other = scene.cloud.service_account();
    other["private_key"] = include_str!("../../../../tests/data/vectors/keys/rsa2048.key.pem").into();
    let error = scene.wrong_with(&other).await;
    assert!(error.contains("Invalid JWT Signature: <redacted>"), "{error}");
}
