mod fake;

use std::{sync::Arc, time::Duration};

use futures::future::join_all;

use super::*;
use crate::{
    kms::logged::logged,
    outcome::{Classify, Verdict},
};
use fake::{Fake, Fault as Wrong, SECRET};

const DIGEST: [u8; 32] = [7; 32];
const IMPATIENT: Patience = Patience { connect: Duration::from_secs(5), attempt: Duration::from_secs(3) };
const SIGN: &str = "POST /v1/transit/sign/release/sha2-256";
const READ: &str = "GET /v1/transit/keys/release";
const LOGIN: &str = "POST /v1/auth/approle/login";
const LOOK_UP: &str = "GET /v1/auth/token/lookup-self";

fn approle() -> Login {
    Login::AppRole { path: "approle".into(), role_id: "role".into(), secret_id: Some(SecretSource::Given(SECRET.into())) }
}

async fn open_by(fake: &Fake, login: Option<&Login>, environment: &Environment) -> Result<VaultKey, Error> {
    let uri = format!("hashivault://release?address={}", fake.address).parse().unwrap();
    VaultKey::open_patiently(&uri, login, environment, IMPATIENT).await
}

async fn open(fake: &Fake) -> Result<VaultKey, Error> {
    open_by(fake, Some(&approle()), &Environment::of([])).await
}

/// Opened, with the requests for that forgotten.
async fn opened(fake: &Fake) -> VaultKey {
    let key = open(fake).await.unwrap();
    assert_eq!(fake.requests(), [LOGIN, READ]);
    key
}

async fn sign(key: &VaultKey) -> Result<RawSignature, Error> {
    key.sign(Algorithm::EcdsaSha256, &DIGEST).await
}

#[tokio::test]
async fn everything_that_has_a_default_is_said() {
    for (algorithm, expected) in [
        (Algorithm::RsaPkcs1Sha256, json!({"signature_algorithm": "pkcs1v15"})),
        (Algorithm::RsaPssSha256, json!({"signature_algorithm": "pss", "salt_length": "hash"})),
        (Algorithm::EcdsaSha256, json!({"marshaling_algorithm": "asn1"})),
    ] {
        let mut body = sign_request(algorithm, &DIGEST, 3);
        for (name, value) in
            [("input", json!(BASE64_STANDARD.encode(DIGEST))), ("prehashed", json!(true)), ("key_version", json!(3))]
        {
            assert_eq!(body.as_object_mut().unwrap().remove(name), Some(value), "{algorithm} {name}");
        }
        assert_eq!(body, expected, "{algorithm}");
    }
}

#[tokio::test]
async fn requests_say_who_asks_and_in_which_namespace() {
    let fake = Fake::start().await;
    let uri = format!("openbao://release?address={}&namespace=team-a/images", fake.address).parse().unwrap();
    let environment = Environment::of([("BAO_TOKEN", SECRET)]);
    let key = VaultKey::open_patiently(&uri, None, &environment, IMPATIENT).await.unwrap();
    sign(&key).await.unwrap();
    for headers in fake.headers() {
        let value = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        assert_eq!(value("x-vault-token").as_deref(), Some(SECRET));
        assert_eq!(value("x-vault-namespace").as_deref(), Some("team-a/images"));
        assert_eq!(value("x-vault-request").as_deref(), Some("true"));
        assert!(value("user-agent").unwrap().starts_with("countersign/"));
    }
    assert_eq!(fake.requests(), [LOOK_UP, READ, SIGN]);
    assert!(matches!(key.sign(Algorithm::RsaPssSha256, &DIGEST).await, Err(Error::WrongAlgorithm { .. })));
    assert!(fake.requests().is_empty());
}

#[tokio::test]
async fn passing_faults_are_for_the_caller_to_retry() {
    for wrong in [
        Wrong::error(500, "something broke"),
        Wrong::error(503, "Vault is sealed"),
        Wrong::error(473, ""),
        Wrong::SlowBody,
        Wrong::NoAnswer,
    ] {
        let fake = Fake::start().await;
        let key = opened(&fake).await;
        fake.then([wrong.clone()]);
        let error = sign(&key).await.unwrap_err();
        assert_eq!(error.verdict(), Verdict::TRANSIENT, "{wrong:?}: {error}");
        assert_eq!(fake.requests(), [SIGN], "{wrong:?}");
        sign(&key).await.unwrap();
    }
}

#[tokio::test]
async fn throttling_is_told_with_the_time_that_the_server_names() {
    let fake = Fake::start().await;
    let key = opened(&fake).await;
    let named = Wrong::Error { status: 429, text: "rate limit quota exceeded", headers: vec![("retry-after", "3".into())] };
    fake.then([Wrong::error(429, "rate limit quota exceeded"), named]);
    for after in [None, Some(Duration::from_secs(3))] {
        assert_eq!(sign(&key).await.unwrap_err().verdict(), Verdict::Retry { after, throttled: true });
    }
}

#[tokio::test]
async fn a_redirect_is_not_followed() {
    let fake = Fake::start().await;
    let other = Fake::start().await;
    let key = opened(&fake).await;
    let location = format!("{}/v1/transit/sign/release/sha2-256", other.address);
    fake.then([Wrong::Error { status: 307, text: "", headers: vec![("location", location)] }]);
    let error = sign(&key).await.unwrap_err();
    assert_eq!(error.verdict(), Verdict::TRANSIENT, "{error}");
    assert!(error.to_string().contains("it is a standby"), "{error}");
    assert!(other.requests().is_empty());
}

#[tokio::test]
async fn answers_that_cannot_be_right_are_told_as_such() {
    let says = |signature: &str| Wrong::Says(json!({"data": {"signature": signature}}).to_string());
    for (wrong, part) in [
        (Wrong::Says("<html>sign in to the guest network</html>".into()), "not the JSON of one"),
        (Wrong::Says("{}".into()), "not the JSON of one"),
        (says("MEUCIQ"), "vault:v and a number"),
        (says("vault:vx:MEUCIQ"), "vault:v and a number"),
        (says("vault:v1:?"), "not base64"),
        (Wrong::Endless, "more than"),
    ] {
        let fake = Fake::start().await;
        let key = opened(&fake).await;
        fake.then([wrong.clone()]);
        let error = sign(&key).await.unwrap_err();
        assert!(error.is_garbled() && error.to_string().contains(part), "{wrong:?}: {error}");
        assert!(!error.to_string().contains("guest"), "{error}");
    }
    let fake = Fake::start().await;
    let key = opened(&fake).await;
    fake.then([says("vault:v2:MEUCIQ")]);
    let error = sign(&key).await.unwrap_err();
    assert!(matches!(error, Error::KeyChanged { .. }) && error.to_string().contains("version 2"), "{error}");
}

#[tokio::test]
async fn a_description_is_not_believed_when_it_contradicts_itself() {
    let described = |kind: &str, keys: Value| {
        let data =
            json!({"type": kind, "latest_version": 1, "min_encryption_version": 0, "supports_signing": true, "keys": keys});
        Wrong::Says(json!({ "data": data }).to_string())
    };
    for (wrong, name) in [
        (described("rsa-2048", json!({"1": {"public_key": fake::public_key()}})), "bad_response"),
        (described("ecdsa-p256", json!({"1": {"public_key": "?"}})), "key_changed"),
        (described("ecdsa-p256", json!({"1": {}})), "bad_response"),
        (described("ecdsa-p256", json!({})), "key_unusable"),
    ] {
        let fake = Fake::start().await;
        fake.then([Wrong::Nothing, wrong.clone()]);
        let error = open(&fake).await.unwrap_err();
        assert_eq!(error.name(), name, "{wrong:?}: {error}");
    }
}

#[tokio::test]
async fn a_refused_token_is_replaced_once_for_all_who_were_refused() {
    let fake = Fake::start().await;
    let key = opened(&fake).await;
    fake.revoke_tokens();
    let signed = join_all((0..12).map(|_| sign(&key))).await;
    assert!(signed.iter().all(Result::is_ok), "{signed:?}");
    let requests = fake.requests();
    assert_eq!(requests.iter().filter(|request| *request == LOGIN).count(), 1, "{requests:?}");

    // Denied for another reason: one login more, and then it is refused.
    fake.then([Wrong::error(403, "permission denied"), Wrong::Nothing, Wrong::error(403, "permission denied")]);
    let error = sign(&key).await.unwrap_err();
    assert!(matches!(error, Error::Denied { .. }) && error.to_string().contains("`update` on transit/sign/release"), "{error}");
    assert_eq!(fake.requests(), [SIGN, LOGIN, SIGN]);
}

#[tokio::test]
async fn how_a_login_ends_counts_for_all_who_waited_for_it() {
    let fake = Fake::start().await;
    let key = opened(&fake).await;
    fake.revoke_tokens();
    fake.refuse_logins();
    let signed = join_all((0..12).map(|_| sign(&key))).await;
    for error in signed.into_iter().map(Result::unwrap_err) {
        assert!(matches!(error, Error::Credentials { .. }), "{error}");
    }
    let logins = fake.requests().iter().filter(|request| *request == LOGIN).count();
    assert_eq!(logins, 1);
}

#[tokio::test]
async fn a_token_is_renewed_before_two_thirds_of_its_time_and_replaced_where_it_cannot_be() {
    for (renewable, expected) in [(true, "POST /v1/auth/token/renew-self"), (false, LOGIN)] {
        let fake = Fake::start().await;
        fake.set_lease(1, renewable);
        let began = std::time::Instant::now();
        let key = opened(&fake).await;
        let request = fake.next_request().await;
        let took = began.elapsed();
        assert_eq!(request, expected);
        assert!(took >= Duration::from_millis(490), "{took:?}");
        sign(&key).await.unwrap();
    }
}

#[tokio::test]
async fn a_token_near_its_greatest_age_is_replaced() {
    for left in [0, 1] {
        let fake = Fake::start().await;
        fake.set_lease(3, true);
        let key = opened(&fake).await;
        let capped = json!({"auth": {"client_token": "s.login-1-of-the-fake", "lease_duration": left, "renewable": true}});
        fake.then([Wrong::Says(capped.to_string())]);
        assert_eq!(fake.next_request().await, "POST /v1/auth/token/renew-self");
        assert_eq!(fake.next_request().await, LOGIN);
        sign(&key).await.unwrap();
    }
}

#[tokio::test]
async fn a_renewal_that_fails_is_tried_again_while_the_token_lasts() {
    let fake = Fake::start().await;
    fake.set_lease(3, true);
    let key = opened(&fake).await;
    fake.then([Wrong::error(503, "Vault is sealed")]);
    for _ in 0..2 {
        assert_eq!(fake.next_request().await, "POST /v1/auth/token/renew-self");
    }
    sign(&key).await.unwrap();
    // On a busy machine the time of the next renewal has come as well.
    assert!(!fake.requests().contains(&LOGIN.to_owned()));
}

#[tokio::test]
async fn nobody_renews_for_a_key_that_is_gone() {
    let fake = Fake::start().await;
    let key = opened(&fake).await;
    let session = Arc::downgrade(&key.session);
    drop(key);
    while session.upgrade().is_some() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_login_that_gives_no_token_is_refused() {
    let fake = Fake::start().await;
    let answer = json!({"auth": {"client_token": "", "lease_duration": 0, "renewable": false}}).to_string();
    fake.then([Wrong::Says(answer)]);
    let error = open(&fake).await.unwrap_err();
    assert!(matches!(error, Error::Credentials { .. }) && error.to_string().contains("second factor"), "{error}");
    let unsendable = json!({"auth": {"client_token": "a\nb", "lease_duration": 0, "renewable": false}}).to_string();
    fake.then([Wrong::Says(unsendable)]);
    let error = open(&fake).await.unwrap_err();
    assert!(matches!(error, Error::Credentials { .. }) && error.to_string().contains("cannot be sent"), "{error}");
}

#[tokio::test]
async fn what_a_server_repeats_of_a_request_is_not_told() {
    let fake = Fake::start().await;
    fake.then([Wrong::error(400, "you sent the-secret-id")]);
    let error = open(&fake).await.unwrap_err();
    assert!(error.to_string().contains("you sent <redacted>"), "{error}");
    let key = open(&fake).await.unwrap();
    fake.then([Wrong::error(400, "your token is s.login-1-of-the-fake")]);
    let error = sign(&key).await.unwrap_err();
    assert!(error.to_string().contains("your token is <redacted>"), "{error}");
}

#[tokio::test]
async fn the_most_talkative_log_holds_no_secret() {
    let fake = Fake::start().await;
    let log = logged(async {
        // Twice: another test may meet an event's place for the first time in the same moment, and that nobody listened would
        // be remembered of it.
        for _ in 0..2 {
            let key = open(&fake).await.unwrap();
            fake.revoke_tokens();
            sign(&key).await.unwrap();
            let by_token = open_by(&fake, None, &Environment::of([("VAULT_TOKEN", SECRET)])).await.unwrap();
            tracing::trace!(?key, ?by_token);
            tracing::callsite::rebuild_interest_cache();
        }
    })
    .await;
    assert!(log.contains("key opened") && log.contains("logged in") && log.contains("TRACE"), "{log}");
    for secret in [SECRET, "s.login-"] {
        assert!(!log.contains(secret), "{secret} is in the log");
    }
}
