//! AWS KMS keys against ministack, which checks the signature of every request and answers as AWS does.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use countersign::{
    clock::Clock,
    kms::{self, Algorithm, Environment, Error, KeyUri, SigningKey},
    outcome::{Classify, Verdict},
    witness::{self, Pin, Witness, WitnessSettings},
};
use integration_tests::ministack::{Credentials, Ministack, REGION};
use jiff::Timestamp;
use serde_json::json;

const DIGEST: [u8; 32] = [7; 32];
const ALL: [&str; 3] = ["kms:Sign", "kms:GetPublicKey", "kms:DescribeKey"];

async fn ministack() -> Ministack {
    Ministack::start().await.expect("these tests run ministack from .tools: `make tools` installs it there")
}

fn uri(kms: &Ministack, key: &str) -> KeyUri {
    format!("awskms://{}/{key}?region={REGION}", kms.host()).parse().unwrap()
}

fn environment(who: &Credentials) -> Environment {
    Environment::of([("AWS_ACCESS_KEY_ID", &who.access_key_id), ("AWS_SECRET_ACCESS_KEY", &who.secret_access_key)])
}

async fn open(kms: &Ministack, key: &str, who: &Credentials) -> Result<Arc<dyn SigningKey>, Error> {
    kms::open_in(&uri(kms, key), None, Clock::system(), &environment(who)).await
}

fn witness(kms: &Ministack, key: Arc<dyn SigningKey>, pin: PathBuf) -> Result<Witness, witness::Error> {
    let settings = WitnessSettings {
        name: "release".into(),
        description: String::new(),
        key: uri(kms, "alias/release"),
        login: None,
        verify: vec![],
        rate: None,
        pin: Some(Pin::Kept(pin)),
    };
    Witness::from_key(&settings, key, Clock::system())
}

#[tokio::test]
async fn every_kind_of_key_signs_by_id_arn_and_alias() {
    let kms = ministack().await;
    let who = kms.user("signer", &ALL).await.unwrap();
    for (spec, algorithms) in [
        ("RSA_2048", [Algorithm::RsaPkcs1Sha256, Algorithm::RsaPssSha256].as_slice()),
        ("RSA_3072", &[Algorithm::RsaPkcs1Sha256, Algorithm::RsaPssSha256]),
        ("RSA_4096", &[Algorithm::RsaPkcs1Sha256, Algorithm::RsaPssSha256]),
        ("ECC_NIST_P256", &[Algorithm::EcdsaSha256]),
    ] {
        let id = kms.key(spec, spec).await.unwrap();
        let arn = format!("arn:aws:kms:{REGION}:000000000000:key/{id}");
        for key in [&id, &arn, &format!("alias/{spec}")] {
            let opened = open(&kms, key, &who).await.unwrap();
            assert_eq!(opened.resolved(), arn);
            for algorithm in algorithms {
                let signature = opened.sign(*algorithm, &DIGEST).await.unwrap();
                assert_eq!(opened.public_key().verify(*algorithm, &DIGEST, signature.as_ref()), Ok(()), "{spec} {algorithm}");
            }
        }
    }
}

#[tokio::test]
async fn what_a_key_is_not_fit_for_is_refused_with_its_reason() {
    let kms = ministack().await;
    let who = kms.user("signer", &ALL).await.unwrap();

    let disabled = kms.key("ECC_NIST_P256", "disabled").await.unwrap();
    let deleted = kms.key("ECC_NIST_P256", "deleted").await.unwrap();
    let opened = [open(&kms, "alias/disabled", &who).await.unwrap(), open(&kms, "alias/deleted", &who).await.unwrap()];
    kms.kms("DisableKey", &json!({ "KeyId": disabled })).await.unwrap();
    kms.kms("ScheduleKeyDeletion", &json!({ "KeyId": deleted, "PendingWindowInDays": 7 })).await.unwrap();
    for (key, part) in opened.iter().zip(["disabled", "going to be deleted on"]) {
        for error in [
            key.sign(Algorithm::EcdsaSha256, &DIGEST).await.unwrap_err(),
            kms::open_in(key.uri(), None, Clock::system(), &environment(&who)).await.unwrap_err(),
        ] {
            assert!(matches!(error, Error::KeyUnusable { .. }) && error.to_string().contains(part), "{error}");
        }
    }
    kms.kms("EnableKey", &json!({ "KeyId": disabled })).await.unwrap();
    opened[0].sign(Algorithm::EcdsaSha256, &DIGEST).await.unwrap();

    let symmetric = kms.kms("CreateKey", &json!({})).await.unwrap();
    let symmetric = symmetric["KeyMetadata"]["KeyId"].as_str().unwrap().to_owned();
    let error = open(&kms, &symmetric, &who).await.unwrap_err();
    assert!(matches!(error, Error::KeyUnusable { .. }) && error.to_string().contains("ENCRYPT_DECRYPT"), "{error}");

    for unknown in ["alias/unknown", "11111111-2222-3333-4444-555555555555"] {
        let error = open(&kms, unknown, &who).await.unwrap_err();
        assert!(matches!(error, Error::NotFound { .. }) && error.to_string().contains(REGION), "{error}");
    }
}

#[tokio::test]
async fn who_may_not_sign_is_told_so() {
    let kms = ministack().await;
    kms.key("ECC_NIST_P256", "release").await.unwrap();

    let nobody = kms.user("nobody", &["sts:GetCallerIdentity"]).await.unwrap();
    let error = open(&kms, "alias/release", &nobody).await.unwrap_err();
    assert!(matches!(error, Error::Denied { .. }), "{error}");

    let reader = kms.user("reader", &["kms:GetPublicKey", "kms:DescribeKey"]).await.unwrap();
    let key = open(&kms, "alias/release", &reader).await.unwrap();
    let error = key.sign(Algorithm::EcdsaSha256, &DIGEST).await.unwrap_err();
    assert!(matches!(error, Error::Denied { .. }) && error.to_string().contains("Sign"), "{error}");
    assert!(matches!(error.verdict(), Verdict::Refuse { cure } if cure.contains("kms:Sign")));

    let signer = kms.user("signer", &ALL).await.unwrap();
    let mistyped = Credentials { secret_access_key: "mistyped".into(), ..signer.clone() };
    let error = open(&kms, "alias/release", &mistyped).await.unwrap_err();
    assert!(matches!(error, Error::Credentials { .. }) && error.to_string().contains("wrongly signed"), "{error}");
    assert!(!format!("{error:?}").contains("mistyped"));

    let unknown = Credentials { access_key_id: "AKIAUNKNOWN000000000".into(), ..signer };
    let error = open(&kms, "alias/release", &unknown).await.unwrap_err();
    assert!(matches!(error, Error::Credentials { .. }) && error.to_string().contains("does not know"), "{error}");
}

/// A profile that takes a role with a user's keys, for as long as is said.
fn profile(folder: &Path, role: &str, who: &Credentials, seconds: u32) -> (String, String) {
    let (config, credentials) = (folder.join("config"), folder.join("credentials"));
    let role = format!(
        "[profile signer]\nregion = {REGION}\nrole_arn = {role}\nsource_profile = base\nexternal_id = images\nduration_seconds = {seconds}\n"
    );
    let keys = format!("[base]\naws_access_key_id = {}\naws_secret_access_key = {}\n", who.access_key_id, who.secret_access_key);
    fs::write(&config, role).unwrap();
    fs::write(&credentials, keys).unwrap();
    (config.to_str().unwrap().to_owned(), credentials.to_str().unwrap().to_owned())
}

#[tokio::test]
async fn a_role_is_taken_from_sts_by_a_profile_and_signs_on_after_its_credentials_ended() {
    let kms = ministack().await;
    kms.key("ECC_NIST_P256", "release").await.unwrap();
    let who = kms.user("base", &["sts:AssumeRole"]).await.unwrap();
    let trust = json!({
        "Effect": "Allow", "Principal": {"AWS": "arn:aws:iam::000000000000:user/base"}, "Action": "sts:AssumeRole",
        "Condition": {"StringEquals": {"sts:ExternalId": "images"}},
    });
    let role = kms.role("signer", &trust, &ALL).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let url = format!("http://{}", kms.host());
    let (config, credentials) = profile(folder.path(), &role, &who, 4);
    let with = |profile| {
        Environment::of([
            ("AWS_CONFIG_FILE", &config),
            ("AWS_SHARED_CREDENTIALS_FILE", &credentials),
            ("AWS_PROFILE", profile),
            ("AWS_ENDPOINT_URL_STS", &url),
        ])
    };
    let uri = uri(&kms, "alias/release");
    let error = kms::open_in(&uri, None, Clock::system(), &with("base")).await.unwrap_err();
    assert!(matches!(error, Error::Denied { .. }), "the user itself may not: {error}");
    let key = kms::open_in(&uri, None, Clock::system(), &with("signer")).await.unwrap();
    // Credentials of four seconds, and ministack refuses those that ended.
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(9) {
        key.sign(Algorithm::EcdsaSha256, &DIGEST).await.unwrap();
    }

    let (_, _) = profile(folder.path(), "arn:aws:iam::000000000000:role/nobody", &who, 900);
    let error = kms::open_in(&uri, None, Clock::system(), &with("signer")).await.unwrap_err();
    assert!(matches!(error, Error::Credentials { .. }) && error.to_string().contains("AccessDenied"), "{error}");
    let mistyped = Credentials { secret_access_key: "mistyped".into(), ..who };
    let (_, _) = profile(folder.path(), &role, &mistyped, 900);
    let error = kms::open_in(&uri, None, Clock::system(), &with("signer")).await.unwrap_err();
    assert!(matches!(error, Error::Credentials { .. }) && error.to_string().contains("STS at"), "{error}");
    assert!(!format!("{error:?}").contains("mistyped"));
}

#[tokio::test]
async fn a_pods_web_identity_is_exchanged_for_its_role() {
    let kms = ministack().await;
    kms.key("ECC_NIST_P256", "release").await.unwrap();
    let provider = "oidc.eks.us-east-1.amazonaws.com/id/C1";
    let trust = json!({
        "Effect": "Allow", "Principal": {"Federated": format!("arn:aws:iam::000000000000:oidc-provider/{provider}")},
        "Action": "sts:AssumeRoleWithWebIdentity",
        "Condition": {"StringEquals": {format!("{provider}:sub"): "system:serviceaccount:countersign:countersign"}},
    });
    let role = kms.role("pod", &trust, &ALL).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("token");
    let url = format!("http://{}", kms.host());
    let environment = Environment::of([
        ("AWS_WEB_IDENTITY_TOKEN_FILE", file.to_str().unwrap()),
        ("AWS_ROLE_ARN", &role),
        ("AWS_ENDPOINT_URL_STS", &url),
    ]);
    let write = |subject: &str| {
        let part = |value: serde_json::Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
        let claims = json!({"iss": format!("https://{provider}"), "sub": subject, "aud": "sts.amazonaws.com"});
        fs::write(&file, format!("{}.{}.c2ln", part(json!({"alg": "RS256"})), part(claims))).unwrap();
    };
    write("system:serviceaccount:countersign:countersign");
    let uri = uri(&kms, "alias/release");
    let key = kms::open_in(&uri, None, Clock::system(), &environment).await.unwrap();
    key.sign(Algorithm::EcdsaSha256, &DIGEST).await.unwrap();
    write("system:serviceaccount:elsewhere:other");
    let error = kms::open_in(&uri, None, Clock::system(), &environment).await.unwrap_err();
    assert!(matches!(error, Error::Credentials { .. }) && error.to_string().contains("AccessDenied"), "{error}");
}

#[tokio::test]
async fn a_clock_that_is_ten_minutes_off_is_put_right() {
    let kms = ministack().await;
    kms.key("ECC_NIST_P256", "release").await.unwrap();
    let who = kms.user("signer", &ALL).await.unwrap();
    #[expect(clippy::disallowed_methods, reason = "the other side compares it with its own clock")]
    let now = Timestamp::now();
    for wrong in [now - Duration::from_secs(600), now + Duration::from_secs(600)] {
        let (clock, _) = Clock::manual(wrong);
        let key = kms::open_in(&uri(&kms, "alias/release"), None, clock, &environment(&who)).await.unwrap();
        key.sign(Algorithm::EcdsaSha256, &DIGEST).await.unwrap();
    }
}

#[tokio::test]
async fn an_alias_that_moves_is_noticed_while_running_and_at_the_next_start() {
    let kms = ministack().await;
    let first = kms.key("ECC_NIST_P256", "release").await.unwrap();
    let second = kms.key("ECC_NIST_P256", "next").await.unwrap();
    let who = kms.user("signer", &ALL).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let pin = folder.path().join("release.pub.pem");
    let running = witness(&kms, open(&kms, "alias/release", &who).await.unwrap(), pin.clone()).unwrap();
    running.sign(Algorithm::EcdsaSha256, &DIGEST).await.unwrap();

    kms.kms("UpdateAlias", &json!({ "AliasName": "alias/release", "TargetKeyId": second })).await.unwrap();
    let error = running.sign(Algorithm::EcdsaSha256, &DIGEST).await.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, Error::KeyChanged { .. }) && text.contains(&first) && text.contains(&second), "{text}");
    let error = witness(&kms, open(&kms, "alias/release", &who).await.unwrap(), pin.clone()).unwrap_err();
    assert!(matches!(error, witness::Error::KeyChanged { .. }), "{error}");

    kms.kms("UpdateAlias", &json!({ "AliasName": "alias/release", "TargetKeyId": first })).await.unwrap();
    running.sign(Algorithm::EcdsaSha256, &DIGEST).await.unwrap();
    witness(&kms, open(&kms, "alias/release", &who).await.unwrap(), pin).unwrap();
}

#[tokio::test]
async fn a_kms_that_dies_is_unreachable_and_nothing_waits_for_it() {
    let kms = ministack().await;
    kms.key("ECC_NIST_P256", "release").await.unwrap();
    let who = kms.user("signer", &ALL).await.unwrap();
    let key = open(&kms, "alias/release", &who).await.unwrap();
    drop(kms);
    let answered = tokio::time::timeout(Duration::from_secs(20), key.sign(Algorithm::EcdsaSha256, &DIGEST)).await;
    let error = answered.expect("a try has a limit of 5 seconds").unwrap_err();
    assert_eq!(error.verdict(), Verdict::TRANSIENT, "{error}");
}
