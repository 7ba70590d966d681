use integration_tests::azure::{CLIENT, Fault, IDENTITY_HEADER, TENANT as TENANT_ID};
use jiff::SignedDuration;
use refresh::Source as _;

use super::*;
use crate::kms::azure::tests::Scene;

impl Scene {
    fn source(&self, variables: &[(&str, &str)]) -> Source {
        let http = exchange::client(Patience::USUAL.connect, Patience::USUAL.attempt).no_proxy().build().unwrap();
        Source {
            environment: Environment::of_all(variables.iter().copied()),
            clock: self.clock.clone(),
            cloud: Cloud { domain: "vault.azure.net", authority: "login.microsoftonline.com" },
            outside: http.clone(),
            inside: http,
            metadata: format!("http://{}", self.cloud.address),
            has_identity: AtomicBool::new(false),
        }
    }

    async fn with(&self, variables: &[(&str, &str)]) -> Result<Bearer, CredentialsError> {
        self.source(variables).fetch().await
    }

    async fn wrong_with(&self, variables: &[(&str, &str)]) -> String {
        self.with(variables).await.unwrap_err().to_string()
    }

    fn authority(&self) -> String {
        format!("http://{}", self.cloud.address)
    }
}

const MACHINE: &str = "GET /metadata/identity/oauth2/token";

#[tokio::test]
async fn a_clients_secret_comes_before_a_federated_token_and_that_before_the_machine() {
    let scene = Scene::set().await;
    let authority = scene.authority();
    let folder = tempfile::tempdir().unwrap();
    let token = folder.path().join("token");
    std::fs::write(&token, "federated.token-1\n").unwrap();
    let (tenant, client, host) = ((TENANT, TENANT_ID), (CLIENT_ID, CLIENT[0]), ("AZURE_AUTHORITY_HOST", authority.as_str()));
    let (secret, file) = ((SECRET, CLIENT[1]), (TOKEN_FILE, token.to_str().unwrap()));
    let entra = format!("POST /{TENANT_ID}/oauth2/v2.0/token");

    let bearer = scene.with(&[tenant, client, host, secret, file]).await.unwrap();
    assert_eq!(bearer.expires(), Some(scene.clock.now() + SignedDuration::from_secs(3599)));
    let federated = scene.source(&[tenant, client, host, file]);
    federated.fetch().await.unwrap();
    assert_eq!(scene.cloud.requests(), [entra.as_str(), &entra]);
    std::fs::write(&token, "federated.token-2").unwrap();
    scene.cloud.given().federated_token = "federated.token-2".into();
    federated.fetch().await.unwrap();
    scene.cloud.given().federated_token = "federated.token-3".into();
    let error = federated.fetch().await.unwrap_err();
    assert!(!error.is_passing() && error.to_string().contains("AADSTS700024"), "{error}");
    assert!(!format!("{error} {error:?}").contains("federated.token"), "{error:?}");
    scene.cloud.requests();
    scene.with(&[tenant, client, host]).await.unwrap();
    assert_eq!(scene.cloud.requests(), [MACHINE]);
}

#[tokio::test]
async fn what_is_half_there_wrong_or_refused_is_said_and_nothing_is_passed_over() {
    let scene = Scene::set().await;
    let authority = scene.authority();
    let all = [(TENANT, TENANT_ID), (CLIENT_ID, CLIENT[0]), (SECRET, CLIENT[1]), ("AZURE_AUTHORITY_HOST", authority.as_str())];
    let but = |name: &str, value: &'static str| all.map(|pair| if pair.0 == name { (pair.0, value) } else { pair });
    for (variables, part) in [
        (but(TENANT, ""), "AZURE_CLIENT_SECRET is set without AZURE_TENANT_ID"),
        (but(CLIENT_ID, ""), "AZURE_CLIENT_SECRET is set without AZURE_CLIENT_ID"),
        (but(TENANT, "../common"), "no tenant's id"),
        (but("AZURE_AUTHORITY_HOST", "http://login.example.com"), "plain http"),
        (but(TENANT, "other.example.com"), "AADSTS90002"),
        (but(CLIENT_ID, "somebody"), "AADSTS700016"),
        (but(SECRET, "not-the-secret"), "AADSTS7000215"),
    ] {
        let error = scene.wrong_with(&variables).await;
        assert!(error.contains(part) && !error.contains("not-the-secret"), "{error} does not say {part}");
    }
    let error = scene.wrong_with(&[(TOKEN_FILE, "/nonexistent"), all[0], all[1]]).await;
    assert!(error.contains("/nonexistent holds no token"), "{error}");
    let error = scene.wrong_with(&[("AZURE_CLIENT_CERTIFICATE_PATH", "/a.pem"), all[0], all[1]]).await;
    assert!(error.contains("AZURE_CLIENT_CERTIFICATE_PATH"), "{error}");
    assert!(!scene.cloud.requests().contains(&MACHINE.to_owned()));
}

#[tokio::test]
async fn managed_identities_are_asked_of_the_app_or_else_of_the_machine() {
    let scene = Scene::set().await;
    let endpoint = format!("{}/msi/token", scene.authority());
    let (endpoint, header) = (("IDENTITY_ENDPOINT", endpoint.as_str()), ("IDENTITY_HEADER", IDENTITY_HEADER));
    for client in [("AZURE_CLIENT_ID", CLIENT[0]), ("", "")] {
        let bearer = scene.with(&[client, endpoint, header]).await.unwrap();
        assert_eq!(bearer.expires(), Some(scene.clock.now() + SignedDuration::from_secs(3599)));
        scene.with(&[client]).await.unwrap();
        assert_eq!(scene.cloud.requests(), ["GET /msi/token", MACHINE]);
    }
    let wrong = scene.wrong_with(&[endpoint, ("IDENTITY_HEADER", "not-the-header")]).await;
    assert!(wrong.contains("the identity endpoint at") && !wrong.contains("not-the-header"), "{wrong}");
    assert!(scene.wrong_with(&[("AZURE_CLIENT_ID", "another")]).await.contains("Identity not found"));
    scene.cloud.requests();
    for (variables, part) in [
        (vec![endpoint], "Azure Arc"),
        (vec![("IDENTITY_ENDPOINT", "http://identity.example.com/"), header], "on this machine"),
        (vec![("IDENTITY_ENDPOINT", "nowhere"), header], "no URL"),
        (vec![endpoint, ("IDENTITY_HEADER", "a\nb")], "IDENTITY_HEADER"),
    ] {
        let error = scene.wrong_with(&variables).await;
        assert!(error.contains(part), "{error} does not say {part}");
    }
    assert_eq!(scene.cloud.requests(), [""; 0]);
}

#[tokio::test]
async fn a_machine_without_an_identity_is_not_one_that_is_being_renewed() {
    let scene = Scene::set().await;
    for fault in [Fault::NoAnswer, Fault::Error(404, ""), Fault::Error(400, "invalid_request")] {
        scene.cloud.then([fault]);
        let error = scene.with(&[]).await.unwrap_err();
        assert!(!error.is_passing() && error.to_string().contains("there are no Azure credentials"), "{error}");
    }
    let source = scene.source(&[]);
    source.fetch().await.unwrap();
    for (fault, passing) in [
        (Fault::NoAnswer, true),
        (Fault::Error(404, ""), true),
        (Fault::Error(410, ""), true),
        (Fault::Error(429, ""), true),
        (Fault::Error(500, "unknown"), true),
        (Fault::Says("<html>".into()), true),
        (Fault::Error(400, "invalid_request"), false),
    ] {
        scene.cloud.then([fault.clone()]);
        let error = source.fetch().await.unwrap_err();
        assert_eq!(error.is_passing(), passing, "{fault:?}: {error}");
    }
}
