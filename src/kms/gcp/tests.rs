use std::{sync::Arc, time::Duration};

use futures::future::join_all;
use integration_tests::google::{EMAIL, Fake, Fault};
use jiff::SignedDuration;
use tempfile::TempDir;

use super::*;
use crate::{
    clock::ManualClock,
    kms::logged::logged,
    outcome::{Classify, Verdict},
    witness::{Witness, WitnessSettings},
};

const DIGEST: [u8; 32] = [7; 32];
const PKCS1: &str = "RSA_SIGN_PKCS1_2048_SHA256";
const VERSION: &str =
    "projects/p-1/locations/europe-west3/keyRings/images/cryptoKeys/RSA_SIGN_PKCS1_2048_SHA256/cryptoKeyVersions/10";

/// Google Cloud, and a machine with credentials for it.
pub(super) struct Scene {
    pub(super) cloud: Fake,
    pub(super) clock: Clock,
    pub(super) hand: ManualClock,
    pub(super) folder: TempDir,
}

impl Scene {
    pub(super) async fn set() -> Self {
        let (clock, hand) = Clock::manual("2026-11-22T05:00:00Z".parse().unwrap());
        let now = clock.clone();
        let cloud = Fake::start(Arc::new(move || now.now())).await;
        Self { cloud, clock, hand, folder: tempfile::tempdir().unwrap() }
    }

    pub(super) fn write(&self, name: &str, text: &str) -> String {
        let path = self.folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn uri(&self, key: &str) -> KeyUri {
        self.cloud.uri(key).parse().unwrap()
    }

    async fn open(&self, key: &str) -> Result<GcpKey, Error> {
        let file = self.write("account.json", &self.cloud.service_account().to_string());
        self.open_with(key, &Environment::of([("GOOGLE_APPLICATION_CREDENTIALS", &file)])).await
    }

    async fn open_with(&self, key: &str, environment: &Environment) -> Result<GcpKey, Error> {
        GcpKey::open_beside(&self.cloud.address, &self.uri(key), self.clock.clone(), environment).await
    }

    /// Opened, with the requests for that forgotten.
    async fn opened(&self, key: &str) -> GcpKey {
        let opened = self.open(key).await.unwrap();
        self.cloud.requests();
        opened
    }
}

#[tokio::test]
async fn each_kind_of_key_signs_with_its_own_algorithm_and_no_other() {
    let scene = Scene::set().await;
    for (name, own) in [
        (PKCS1, Algorithm::RsaPkcs1Sha256),
        ("RSA_SIGN_PSS_3072_SHA256", Algorithm::RsaPssSha256),
        ("RSA_SIGN_PSS_4096_SHA256", Algorithm::RsaPssSha256),
        ("EC_SIGN_P256_SHA256", Algorithm::EcdsaSha256),
    ] {
        let key = scene.opened(name).await;
        for algorithm in Algorithm::ALL {
            assert_eq!(key.allows(algorithm), algorithm == own);
            match key.sign(algorithm, &DIGEST).await {
                Ok(signature) => assert_eq!(key.public_key().verify(own, &DIGEST, signature.as_ref()), Ok(())),
                Err(Error::WrongAlgorithm { .. }) => assert!(!key.public_key().supports(algorithm)),
                Err(Error::Misconfigured { what, .. }) => assert!(what.contains(own.name()), "{what}"),
                Err(error) => panic!("{error}"),
            }
        }
        let asked: Vec<_> = scene.cloud.requests().into_iter().filter(|request| request.starts_with("POST /")).collect();
        assert_eq!(asked, [format!("POST /{name}/cryptoKeyVersions/10:asymmetricSign")], "what cannot be is not asked for");
    }
    let error = scene.open("RSA_SIGN_PKCS1_4096_SHA512").await.unwrap_err();
    assert!(matches!(&error, Error::KeyUnusable { what, .. } if what.contains("SHA512")), "{error}");
}

#[tokio::test]
async fn the_highest_version_that_is_enabled_is_kept_and_a_named_one_is_that() {
    let scene = Scene::set().await;
    let newest = scene.open(PKCS1).await.unwrap();
    assert_eq!(newest.resolved(), VERSION);
    let list = format!("GET /{PKCS1}/cryptoKeyVersions");
    assert_eq!(scene.cloud.requests(), ["POST /token", &list, &format!("{list}/10/publicKey")]);
    let named = scene.opened(&format!("{PKCS1}/cryptoKeyVersions/9")).await;
    assert_ne!(named.public_key(), newest.public_key());
    let signature = named.sign(Algorithm::RsaPkcs1Sha256, &DIGEST).await.unwrap();
    assert_eq!(named.public_key().verify(Algorithm::RsaPkcs1Sha256, &DIGEST, signature.as_ref()), Ok(()));

    scene.cloud.given().versions.insert(12, "ENABLED");
    scene.cloud.given().page = 1;
    newest.sign(Algorithm::RsaPkcs1Sha256, &DIGEST).await.unwrap();
    assert_eq!(scene.cloud.requests().pop().unwrap(), format!("POST /{PKCS1}/cryptoKeyVersions/10:asymmetricSign"));
    assert!(scene.open(PKCS1).await.unwrap().resolved().ends_with("/12"), "over several pages");
    assert_eq!(scene.cloud.requests().iter().filter(|request| **request == list).count(), 3);

    scene.cloud.given().versions.retain(|_, state| *state != "ENABLED");
    let error = scene.open(PKCS1).await.unwrap_err();
    assert!(matches!(error, Error::KeyUnusable { .. }) && error.to_string().contains("no version that is enabled"), "{error}");
}

#[tokio::test]
async fn a_version_that_may_not_sign_is_refused_with_its_state() {
    let scene = Scene::set().await;
    let key = scene.opened(&format!("{PKCS1}/cryptoKeyVersions/10")).await;
    for state in ["DISABLED", "DESTROYED", "DESTROY_SCHEDULED", "IMPORT_FAILED", "PENDING_IMPORT"] {
        scene.cloud.given().versions.insert(10, state);
        for error in [
            key.sign(Algorithm::RsaPkcs1Sha256, &DIGEST).await.unwrap_err(),
            scene.open(&format!("{PKCS1}/cryptoKeyVersions/10")).await.unwrap_err(),
        ] {
            assert!(matches!(error, Error::KeyUnusable { .. }) && error.to_string().contains(state), "{error}");
        }
    }
    scene.cloud.given().versions.insert(10, "PENDING_GENERATION");
    let error = key.sign(Algorithm::RsaPkcs1Sha256, &DIGEST).await.unwrap_err();
    assert_eq!(error.verdict(), Verdict::TRANSIENT, "{error}");
    scene.cloud.given().versions.insert(10, "ENABLED");
    key.sign(Algorithm::RsaPkcs1Sha256, &DIGEST).await.unwrap();
    for missing in [format!("{PKCS1}/cryptoKeyVersions/7"), "nobody/cryptoKeyVersions/1".to_owned(), "nobody".to_owned()] {
        assert!(matches!(scene.open(&missing).await.unwrap_err(), Error::NotFound { .. }), "{missing}");
    }
}

#[tokio::test]
async fn documented_errors_are_sorted_into_retry_and_refuse() {
    let crc = "The checksum in field digest_crc32c did not match the data in field digest.";
    for (fault, kind, retried) in [
        (Fault::Error(429, "RESOURCE_EXHAUSTED"), "throttled", true),
        (Fault::Throttled { retry_after: 3 }, "throttled", true),
        (Fault::Error(503, "UNAVAILABLE"), "transient", true),
        (Fault::Error(504, "DEADLINE_EXCEEDED"), "transient", true),
        (Fault::Error(500, "INTERNAL"), "transient", true),
        (Fault::Error(409, "ABORTED"), "transient", true),
        (Fault::Error(502, ""), "transient", true),
        (Fault::Reset, "unreachable", true),
        (Fault::NoAnswer, "unreachable", true),
        (Fault::Error(403, "PERMISSION_DENIED"), "denied", false),
        (Fault::Error(404, "NOT_FOUND"), "not_found", false),
        (Fault::Error(400, "FAILED_PRECONDITION"), "key_unusable", false),
        (Fault::Error(400, "INVALID_ARGUMENT"), "misconfigured", false),
        (Fault::Saying(400, "INVALID_ARGUMENT", crc), "bad_response", false),
        (Fault::Error(302, ""), "misconfigured", false),
        (Fault::Says("{".into()), "bad_response", false),
        (Fault::Endless, "bad_response", false),
        (Fault::Field("signature", Some("?")), "bad_response", false),
        (Fault::Field("signature", Some("AAAA")), "bad_response", false),
        (Fault::Field("signatureCrc32c", None), "bad_response", false),
        (Fault::Field("signatureCrc32c", Some("\"7\"")), "bad_response", false),
        (Fault::Field("verifiedDigestCrc32c", None), "bad_response", false),
        (Fault::Field("verifiedDigestCrc32c", Some("false")), "bad_response", false),
        (Fault::Field("name", Some("projects/p-1/other")), "bad_response", false),
    ] {
        let scene = Scene::set().await;
        let key = scene.opened(PKCS1).await;
        scene.cloud.then([fault.clone()]);
        let error = key.sign(Algorithm::RsaPkcs1Sha256, &DIGEST).await.unwrap_err();
        assert_eq!(error.name(), kind, "{fault:?}: {error}");
        assert_eq!(matches!(error.verdict(), Verdict::Retry { .. }), retried, "{fault:?}: {error}");
        assert_eq!(scene.cloud.requests().len(), 1, "{fault:?}: asked once");
        if let Fault::Throttled { .. } = fault {
            assert_eq!(error.verdict(), Verdict::Retry { after: Some(Duration::from_secs(3)), throttled: true });
        }
    }
}

#[tokio::test]
async fn a_public_key_is_believed_only_if_it_came_whole_and_is_the_asked_one() {
    for (field, value) in [
        ("pemCrc32c", Some("\"7\"")),
        ("pemCrc32c", None),
        ("pem", None),
        ("name", Some("projects/p-1/other")),
        ("algorithm", Some("RSA_SIGN_PKCS1_3072_SHA256")),
    ] {
        let scene = Scene::set().await;
        scene.cloud.then([Fault::WrongKey, Fault::Field(field, value)]);
        let error = scene.open(&format!("{PKCS1}/cryptoKeyVersions/10")).await.unwrap_err();
        assert!(matches!(error, Error::BadResponse { .. }), "{field}: {error}");
    }
    let scene = Scene::set().await;
    scene.cloud.then([Fault::WrongKey, Fault::Field("algorithm", Some("GOOGLE_SYMMETRIC_ENCRYPTION"))]);
    let error = scene.open(&format!("{PKCS1}/cryptoKeyVersions/10")).await.unwrap_err();
    assert!(matches!(error, Error::KeyUnusable { .. }), "{error}");
}

#[tokio::test]
async fn a_signature_of_another_key_is_asked_for_once_more_and_then_refused() {
    let scene = Scene::set().await;
    let settings = WitnessSettings {
        name: "release".into(),
        description: String::new(),
        key: scene.uri(PKCS1),
        login: None,
        verify: vec![],
        rate: None,
        pin: None,
    };
    let witness = Witness::from_key(&settings, Arc::new(scene.opened(PKCS1).await), scene.clock.clone()).unwrap();
    for passing in [Fault::WrongKey, Fault::Field("verifiedDigestCrc32c", None), Fault::Field("signatureCrc32c", Some("\"7\""))] {
        scene.cloud.then([passing]);
        witness.sign(Algorithm::RsaPkcs1Sha256, &DIGEST).await.unwrap();
        assert_eq!(scene.cloud.requests().len(), 2);
    }
    scene.cloud.then([Fault::WrongKey, Fault::WrongKey]);
    let error = witness.sign(Algorithm::RsaPkcs1Sha256, &DIGEST).await.unwrap_err();
    assert!(matches!(error, Error::BadSignature { .. }), "{error}");
}

#[tokio::test]
async fn tokens_that_end_or_are_revoked_mid_run_cost_no_signature_and_show_in_no_log() {
    let scene = Scene::set().await;
    let log = logged(async {
        let key = scene.open(PKCS1).await.unwrap();
        for _ in 0..3 {
            scene.hand.advance(Duration::from_secs(3600));
            scene.cloud.revoke();
            scene.cloud.requests();
            let signed = join_all((0..32).map(|_| key.sign(Algorithm::RsaPkcs1Sha256, &DIGEST))).await;
            assert!(signed.iter().all(Result::is_ok), "{:?}", signed.iter().find(|signed| signed.is_err()));
            assert_eq!(scene.cloud.requests().iter().filter(|request| *request == "POST /token").count(), 1);
        }
        scene.cloud.revoke();
        key.sign(Algorithm::RsaPkcs1Sha256, &DIGEST).await.unwrap();
        // One that the KMS does not know, however often it is fetched.
        scene.cloud.requests();
        scene.cloud.then([Fault::Error(401, "UNAUTHENTICATED"), Fault::WrongKey, Fault::Error(401, "UNAUTHENTICATED")]);
        let error = key.sign(Algorithm::RsaPkcs1Sha256, &DIGEST).await.unwrap_err();
        assert!(matches!(error, Error::Credentials { .. }), "{error}");
        assert_eq!(scene.cloud.requests().len(), 3);
        tracing::trace!(?error, ?key);
        scene.cloud.given().denied = Some("service account");
        let error = key.sign(Algorithm::RsaPkcs1Sha256, &DIGEST).await.unwrap_err();
        assert!(matches!(error, Error::Denied { .. }) && error.to_string().contains("useToSign"), "{error}");
    })
    .await;
    assert!(log.contains("Google Cloud credentials fetched") && log.contains("key opened"), "{log}");
    for secret in ["issuedToken", "PRIVATE KEY", "eyJ"] {
        assert!(!log.contains(secret), "{secret} is in the log");
    }
    assert!(!log.contains(EMAIL));
}

#[tokio::test]
async fn a_clock_that_is_wrong_does_not_make_a_jwt_useless() {
    for minutes in [20, -20, 90, -90] {
        let scene = Scene::set().await;
        scene.cloud.given().ahead = SignedDuration::from_mins(minutes);
        scene.open(PKCS1).await.unwrap();
        let tokens = scene.cloud.requests().iter().filter(|request| *request == "POST /token").count();
        assert_eq!(tokens, if minutes == 20 { 1 } else { 2 }, "{minutes}: 20 minutes are within the hour that it lasts");
    }
}
