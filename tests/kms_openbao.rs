//! Keys in a Transit engine against a real OpenBao: logins, tokens that end, rotation, policies, quotas, TLS.

use std::{fs, path::PathBuf, sync::Arc, time::Duration};

use aws_lc_rs::{
    encoding::{AsDer, PublicKeyX509Der},
    rand::SystemRandom,
    rsa::KeySize,
    signature::{KeyPair, RSA_PKCS1_SHA256, RsaKeyPair},
};
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use countersign::{
    clock::Clock,
    kms::{self, Algorithm, Environment, Error, KeyUri, Login, PublicKey, SecretSource, SigningKey},
    outcome::{Classify, Verdict},
    witness::{self, Pin, TrustedKeySettings, Witness, WitnessSettings},
};
use integration_tests::{openbao::OpenBao, process::eventually};
use reqwest::Method;
use serde_json::{Value, json};
use tempfile::TempDir;

const DIGEST: [u8; 32] = [7; 32];
const LIMIT: Duration = Duration::from_secs(60);

async fn openbao() -> OpenBao {
    let bao = OpenBao::start().await.expect("these tests run OpenBao from .tools: `make tools` installs it there");
    bao.key("release", "ecdsa-p256").await.unwrap();
    bao.policy("signer", "release").await.unwrap();
    bao
}

fn uri(bao: &OpenBao, query: &str) -> KeyUri {
    format!("openbao://release?address={}{query}", bao.url()).parse().unwrap()
}

/// Opens with a token from the environment.
async fn open(bao: &OpenBao, query: &str, token: &str) -> Result<Arc<dyn SigningKey>, Error> {
    kms::open_in(&uri(bao, query), None, Clock::system(), &Environment::of([("VAULT_TOKEN", token)])).await
}

async fn open_by(bao: &OpenBao, login: &Login) -> Result<Arc<dyn SigningKey>, Error> {
    kms::open_in(&uri(bao, ""), Some(login), Clock::system(), &Environment::of([])).await
}

async fn signs(key: &dyn SigningKey) -> Result<(), Error> {
    let signature = key.sign(Algorithm::EcdsaSha256, &DIGEST).await?;
    assert_eq!(key.public_key().verify(Algorithm::EcdsaSha256, &DIGEST, signature.as_ref()), Ok(()));
    Ok(())
}

fn refused(error: &Error) -> bool {
    matches!(error.verdict(), Verdict::Refuse { .. })
}

async fn post(bao: &OpenBao, path: &str, body: Value) -> Value {
    bao.root(Method::POST, path, body).await.unwrap()
}

/// A secret's file that can be written anew.
struct Secret(TempDir);

impl Secret {
    fn new(text: &str) -> Self {
        let secret = Self(tempfile::tempdir().unwrap());
        secret.write(text);
        secret
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("secret")
    }

    fn write(&self, text: &str) {
        fs::write(self.path(), format!("{text}\n")).unwrap();
    }

    fn source(&self) -> SecretSource {
        SecretSource::File(self.path())
    }
}

#[tokio::test]
async fn a_rotated_key_goes_on_signing_and_is_not_followed_silently() {
    let bao = openbao().await;
    let token = bao.token("signer", json!({})).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let settings = |query: &str, verify| WitnessSettings {
        name: "release".into(),
        description: String::new(),
        key: uri(&bao, query),
        login: Some(Login::Token { token: SecretSource::Given(token.as_str().into()) }),
        verify,
        rate: None,
        pin: Some(Pin::Kept(folder.path().join("release.pub.pem"))),
    };
    let first = Witness::open(&settings("", vec![]), Clock::system()).await.unwrap();
    assert_eq!(first.resolved_key(), format!("{}/v1/transit/keys/release:v1", bao.url()));
    post(&bao, "transit/keys/release/rotate", json!({})).await;
    // What runs goes on with the version that it opened.
    first.sign(Algorithm::EcdsaSha256, &DIGEST).await.unwrap();

    let error = Witness::open(&settings("", vec![]), Clock::system()).await.unwrap_err();
    assert!(matches!(error, witness::Error::KeyChanged { .. }), "{error}");
    // Two ways out: the old version by its number, or the new one with the old key under `verify`.
    let old = Witness::open(&settings("&version=1", vec![]), Clock::system()).await.unwrap();
    assert_eq!(old.public_key(), first.public_key());
    old.sign(Algorithm::EcdsaSha256, &DIGEST).await.unwrap();
    let former = TrustedKeySettings { pem: first.public_key().to_pem(), until: None, revoked: None };
    let new = Witness::open(&settings("", vec![former]), Clock::system()).await.unwrap();
    assert!(new.resolved_key().ends_with("/release:v2"), "{}", new.resolved_key());
    new.sign(Algorithm::EcdsaSha256, &DIGEST).await.unwrap();

    // The old version is taken out of use.
    post(&bao, "transit/keys/release/config", json!({"min_decryption_version": 2})).await;
    for error in
        [first.sign(Algorithm::EcdsaSha256, &DIGEST).await.unwrap_err(), open(&bao, "&version=1", &token).await.unwrap_err()]
    {
        assert!(matches!(error, Error::KeyUnusable { .. }) && refused(&error), "{error}");
        for part in ["version 1 of transit/keys/release", "min_decryption_version"] {
            assert!(error.to_string().contains(part), "{error}");
        }
    }
    let error = open(&bao, "&version=9", &token).await.unwrap_err();
    assert!(error.to_string().contains("versions up to 2"), "{error}");
}

#[tokio::test]
async fn policies_are_asked_for_by_path_and_capability() {
    let bao = openbao().await;
    let token = bao.token("signer", json!({})).await.unwrap();
    let key = open(&bao, "", &token).await.unwrap();
    bao.root(
        Method::PUT,
        "sys/policies/acl/signer",
        json!({"policy": "path \"transit/keys/release\" { capabilities = [\"read\"] }"}),
    )
    .await
    .unwrap();
    let error = signs(&*key).await.unwrap_err();
    assert!(matches!(error, Error::Denied { .. }) && refused(&error), "{error}");
    assert!(error.to_string().contains("`update` on transit/sign/release/sha2-256"), "{error}");
    bao.policy("signer", "other").await.unwrap();
    let error = open(&bao, "", &token).await.unwrap_err();
    assert!(error.to_string().contains("`read` on transit/keys/release"), "{error}");
    bao.policy("signer", "release").await.unwrap();
    signs(&*key).await.unwrap();
}

#[tokio::test]
async fn keys_that_cannot_be_found_or_cannot_sign_are_refused_with_what_they_are() {
    let bao = openbao().await;
    bao.key("symmetric", "aes256-gcm96").await.unwrap();
    bao.key("edwards", "ed25519").await.unwrap();
    let environment = Environment::of([("VAULT_TOKEN", integration_tests::openbao::ROOT)]);
    for (key, query, part) in [
        ("nobody", "", "there is no key at transit/keys/nobody on http://127.0.0.1"),
        ("release", "&mount=elsewhere", "no handler for route"),
        ("release", "&namespace=nobody", "namespace not found"),
        ("symmetric", "", "aes256-gcm96"),
        ("edwards", "", "ed25519"),
    ] {
        let uri = format!("hashivault://{key}?address={}{query}", bao.url()).parse().unwrap();
        let error = kms::open_in(&uri, None, Clock::system(), &environment).await.unwrap_err();
        assert!(refused(&error) && error.to_string().contains(part), "{key}{query}: {error}");
    }
    let key = open(&bao, "", integration_tests::openbao::ROOT).await.unwrap();
    post(&bao, "transit/keys/release/config", json!({"deletion_allowed": true})).await;
    bao.root(Method::DELETE, "transit/keys/release", Value::Null).await.unwrap();
    let error = signs(&*key).await.unwrap_err();
    assert!(matches!(error, Error::NotFound { .. }) && error.to_string().contains("transit/keys/release"), "{error}");
}

#[tokio::test]
async fn a_namespace_has_its_own_keys_and_logins() {
    let bao = openbao().await;
    post(&bao, "sys/namespaces/team-a", json!({})).await;
    let ask = |method, path: &'static str, body| bao.ask(integration_tests::openbao::ROOT, Some("team-a"), method, path, body);
    ask(Method::POST, "sys/mounts/engines/signing", json!({"type": "transit"})).await.unwrap();
    ask(Method::POST, "engines/signing/keys/release", json!({"type": "rsa-2048"})).await.unwrap();
    let rules = "path \"engines/signing/sign/release/sha2-256\" { capabilities = [\"update\"] }
                 path \"engines/signing/keys/release\" { capabilities = [\"read\"] }";
    ask(Method::PUT, "sys/policies/acl/signer", json!({"policy": rules})).await.unwrap();
    let made = ask(Method::POST, "auth/token/create", json!({"policies": ["signer"]})).await.unwrap();
    let token = made["auth"]["client_token"].as_str().unwrap();
    let key = open(&bao, "&namespace=team-a&mount=engines/signing", token).await.unwrap();
    assert_eq!(key.resolved(), format!("{}/v1/team-a/engines/signing/keys/release:v1", bao.url()));
    let signature = key.sign(Algorithm::RsaPssSha256, &DIGEST).await.unwrap();
    assert_eq!(key.public_key().verify(Algorithm::RsaPssSha256, &DIGEST, signature.as_ref()), Ok(()));
    // Outside of its namespace the token is nobody's.
    let error = open(&bao, "", token).await.unwrap_err();
    assert!(refused(&error), "{error}");
}

#[tokio::test]
async fn an_approle_logs_in_and_again_with_what_its_file_holds_then() {
    let bao = openbao().await;
    post(&bao, "sys/auth/approle", json!({"type": "approle"})).await;
    // Each secret id is good for one login, and each token lasts as long as the test.
    post(&bao, "auth/approle/role/countersign", json!({"token_policies": ["signer"], "secret_id_num_uses": 1})).await;
    let role_id = bao.root(Method::GET, "auth/approle/role/countersign/role-id", Value::Null).await.unwrap();
    let role_id = role_id["data"]["role_id"].as_str().unwrap().to_owned();
    let secret_id = async || {
        let made = post(&bao, "auth/approle/role/countersign/secret-id", json!({})).await;
        made["data"]["secret_id"].as_str().unwrap().to_owned()
    };
    let first = secret_id().await;
    let secret = Secret::new(&first);
    let login = Login::AppRole { path: "approle".into(), role_id, secret_id: Some(secret.source()) };
    let key = open_by(&bao, &login).await.unwrap();
    signs(&*key).await.unwrap();

    // The token is revoked; the secret id was used up.
    post(&bao, "sys/leases/revoke-prefix/auth/approle/login", json!({})).await;
    let error = signs(&*key).await.unwrap_err();
    assert!(matches!(error, Error::Credentials { .. }) && refused(&error), "{error}");
    assert!(error.to_string().contains("the login at auth/approle/login was refused"), "{error}");
    assert!(!format!("{error} {error:?}").contains(&first), "{error:?}");
    secret.write(&secret_id().await);
    signs(&*key).await.unwrap();

    let elsewhere = Login::AppRole { path: "nowhere".into(), role_id: "r".into(), secret_id: Some(secret.source()) };
    let error = open_by(&bao, &elsewhere).await.unwrap_err();
    assert!(refused(&error) && error.to_string().contains("auth/nowhere/login"), "{error}");
}

/// An issuer of signed statements.
struct Issuer(RsaKeyPair);

impl Issuer {
    fn new() -> Self {
        Self(RsaKeyPair::generate(KeySize::Rsa2048).unwrap())
    }

    fn public_key(&self) -> String {
        let der = AsDer::<PublicKeyX509Der<'_>>::as_der(self.0.public_key()).unwrap();
        PublicKey::from_spki_der(der.as_ref()).unwrap().to_pem()
    }

    fn token(&self, claims: &Value) -> String {
        let encoded = |value: &Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!("{}.{}", encoded(&json!({"alg": "RS256", "typ": "JWT"})), encoded(claims));
        let mut signature = vec![0; self.0.public_modulus_len()];
        self.0.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), signed.as_bytes(), &mut signature).unwrap();
        format!("{signed}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature))
    }
}

/// Seconds since 1970.
fn in_seconds(seconds: i64) -> i64 {
    #[expect(clippy::disallowed_methods, reason = "the other side compares it with its own clock")]
    let now = jiff::Timestamp::now().as_second();
    now + seconds
}

#[tokio::test]
async fn a_signed_statement_logs_in_and_a_forged_one_does_not() {
    let bao = openbao().await;
    let issuer = Issuer::new();
    post(&bao, "sys/auth/ci/jwt", json!({"type": "jwt"})).await;
    post(&bao, "auth/ci/jwt/config", json!({"jwt_validation_pubkeys": [issuer.public_key()]})).await;
    let role = json!({"role_type": "jwt", "user_claim": "sub", "bound_audiences": ["bao"], "bound_subject": "countersign",
                      "token_policies": ["signer"], "token_type": "batch", "token_ttl": "6s"});
    post(&bao, "auth/ci/jwt/role/countersign", role).await;
    let claims = json!({"sub": "countersign", "aud": "bao", "iat": in_seconds(-5), "exp": in_seconds(600)});
    let jwt = Secret::new(&issuer.token(&claims));
    let login = Login::Jwt { path: "ci/jwt".into(), role: "countersign".into(), jwt: jwt.source() };
    let key = open_by(&bao, &login).await.unwrap();
    signs(&*key).await.unwrap();

    // Batch tokens cannot be renewed: a login takes the next one's place before its time is over.
    let forged = Issuer::new().token(&claims);
    jwt.write(&forged);
    let error = open_by(&bao, &login).await.unwrap_err();
    assert!(matches!(error, Error::Credentials { .. }) && error.to_string().contains("auth/ci/jwt/login was refused"), "{error}");
    assert!(!format!("{error} {error:?}").contains(&forged[..40]), "{error:?}");
    let error = eventually("the token has ended", LIMIT, async || Ok(signs(&*key).await.err())).await.unwrap();
    assert!(matches!(error, Error::Credentials { .. }), "{error}");
    jwt.write(&issuer.token(&claims));
    signs(&*key).await.unwrap();
}

/// What a Kubernetes cluster's API server answers when it is asked about a service account's token.
async fn cluster(known: String) -> String {
    use axum::{Json, Router, routing::post};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let review = move |Json(asked): Json<Value>| async move {
        let user = json!({"username": "system:serviceaccount:signing:countersign", "uid": "1234",
                          "groups": ["system:serviceaccounts", "system:serviceaccounts:signing"]});
        let authenticated = asked["spec"]["token"] == known.as_str();
        Json(json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview",
                    "status": {"authenticated": authenticated, "user": if authenticated { user } else { Value::Null }}}))
    };
    let app = Router::new().route("/apis/authentication.k8s.io/v1/tokenreviews", post(review));
    #[expect(clippy::disallowed_methods, reason = "it ends with the test's own runtime")]
    tokio::spawn(async move { axum::serve(listener, app).await });
    address
}

#[tokio::test]
async fn a_service_account_logs_in_when_its_cluster_vouches_for_it() {
    let bao = openbao().await;
    let claims = json!({"iss": "kubernetes/serviceaccount", "sub": "system:serviceaccount:signing:countersign",
                        "iat": in_seconds(-5), "exp": in_seconds(600),
                        "kubernetes.io": {"namespace": "signing", "serviceaccount": {"name": "countersign", "uid": "1234"}}});
    let token = Issuer::new().token(&claims);
    let host = cluster(token.clone()).await;
    post(&bao, "sys/auth/kubernetes", json!({"type": "kubernetes"})).await;
    // It wants an authority, and does not need one for plain http.
    let ca = include_str!("data/vectors/keys/p256.notation.crt.pem");
    let config = json!({"kubernetes_host": host, "disable_local_ca_jwt": true, "kubernetes_ca_cert": ca});
    post(&bao, "auth/kubernetes/config", config).await;
    let role = json!({"bound_service_account_names": ["countersign"], "bound_service_account_namespaces": ["signing"],
                      "token_policies": ["signer"]});
    post(&bao, "auth/kubernetes/role/countersign", role).await;
    let jwt = Secret::new(&token);
    let login = Login::Jwt { path: "kubernetes".into(), role: "countersign".into(), jwt: jwt.source() };
    signs(&*open_by(&bao, &login).await.unwrap()).await.unwrap();
    jwt.write(&Issuer::new().token(&claims));
    let error = open_by(&bao, &login).await.unwrap_err();
    assert!(matches!(error, Error::Credentials { .. }) && refused(&error), "{error}");
}

#[tokio::test]
async fn a_token_is_renewed_while_nothing_is_signed() {
    let bao = openbao().await;
    let token = bao.token("signer", json!({"ttl": "6s", "explicit_max_ttl": "1h"})).await.unwrap();
    let key = open(&bao, "", &token).await.unwrap();
    eventually("renewed twice", LIMIT, async || {
        let looked = bao.root(Method::POST, "auth/token/lookup", json!({"token": token})).await?;
        let (made, last) = (looked["data"]["creation_time"].as_i64(), looked["data"]["last_renewal_time"].as_i64());
        // Later than it could have lived unrenewed.
        Ok(last.zip(made).is_some_and(|(last, made)| last > made + 6).then_some(()))
    })
    .await
    .unwrap();
    signs(&*key).await.unwrap();
}

#[tokio::test]
async fn a_token_that_cannot_be_renewed_is_used_until_it_ends_and_a_new_one_in_its_file_is_taken() {
    let bao = openbao().await;
    let short = || bao.token("signer", json!({"ttl": "6s", "renewable": false}));
    let token = short().await.unwrap();
    let secret = Secret::new(&token);
    let key = open_by(&bao, &Login::Token { token: secret.source() }).await.unwrap();
    signs(&*key).await.unwrap();
    let error = eventually("the token has ended", LIMIT, async || Ok(signs(&*key).await.err())).await.unwrap();
    assert!(matches!(error, Error::Credentials { .. }) && refused(&error), "{error}");
    assert!(error.to_string().contains(secret.path().to_str().unwrap()), "{error}");
    assert!(!format!("{error} {error:?}").contains(&token), "{error:?}");
    secret.write(&bao.token("signer", json!({"ttl": "1h"})).await.unwrap());
    signs(&*key).await.unwrap();
}

#[tokio::test]
async fn a_quota_of_the_server_throttles() {
    let bao = openbao().await;
    let key = open(&bao, "", &bao.token("signer", json!({})).await.unwrap()).await.unwrap();
    let quota = json!({"path": "transit/sign/release/sha2-256", "rate": 1, "interval": "60s", "block_interval": "0"});
    post(&bao, "sys/quotas/rate-limit/test", quota).await;
    let error = eventually("throttled", LIMIT, async || Ok(signs(&*key).await.err())).await.unwrap();
    assert!(matches!(error, Error::Throttled { .. }), "{error}");
    assert!(matches!(error.verdict(), Verdict::Retry { throttled: true, .. }));
    bao.root(Method::DELETE, "sys/quotas/rate-limit/test", Value::Null).await.unwrap();
    signs(&*key).await.unwrap();
}

#[tokio::test]
async fn tls_is_checked_against_the_authority_that_is_named() {
    let bao = OpenBao::start_tls().await.expect("OpenBao is in .tools: `make tools` installs it there");
    bao.key("release", "ecdsa-p256").await.unwrap();
    let token = integration_tests::openbao::ROOT;
    let ca = bao.ca().to_str().unwrap();
    let opened = async |variables: Environment| {
        let reference = "hashivault://release".parse().unwrap();
        kms::open_in(&reference, None, Clock::system(), &variables).await
    };
    let all = Environment::of([("VAULT_ADDR", bao.url()), ("VAULT_TOKEN", token), ("VAULT_CACERT", ca)]);
    let key = opened(all).await.unwrap();
    signs(&*key).await.unwrap();

    let error = opened(Environment::of([("VAULT_ADDR", bao.url()), ("VAULT_TOKEN", token)])).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    let plain = bao.url().replace("https://", "http://");
    let error = opened(Environment::of([("VAULT_ADDR", &plain), ("VAULT_TOKEN", token)])).await.unwrap_err();
    assert!(refused(&error) && error.to_string().contains("begin its address with https://"), "{error}");
}

#[tokio::test]
async fn a_server_that_dies_is_unreachable() {
    let bao = openbao().await;
    let key = open(&bao, "", &bao.token("signer", json!({})).await.unwrap()).await.unwrap();
    let address = bao.url().to_owned();
    drop(bao);
    let error = signs(&*key).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }) && error.to_string().contains(&address), "{error}");
}
