use std::{sync::Arc, time::Duration};

use futures::future::join_all;
use integration_tests::azure::{CLIENT, Fake, Fault, NEW, OLD};
use jiff::SignedDuration;

use super::*;
use crate::{
    clock::ManualClock,
    kms::{KeySpec, logged::logged},
    outcome::{Classify, Verdict},
    witness::{Witness, WitnessSettings},
};

const DIGEST: [u8; 32] = [7; 32];

/// Azure, and a machine with credentials for it.
pub(super) struct Scene {
    pub(super) cloud: Fake,
    pub(super) clock: Clock,
    pub(super) hand: ManualClock,
}

impl Scene {
    pub(super) async fn set() -> Self {
        let (clock, hand) = Clock::manual("2026-11-22T05:00:00Z".parse().unwrap());
        let now = clock.clone();
        Self { cloud: Fake::start(Arc::new(move || now.now())).await, clock, hand }
    }

    fn uri(&self, key: &str) -> KeyUri {
        self.cloud.uri(key).parse().unwrap()
    }

    async fn open(&self, key: &str) -> Result<AzureKey, Error> {
        let variables = self.cloud.variables();
        let environment = Environment::of_all(variables.iter().map(|(name, value)| (*name, value.as_str())));
        let metadata = format!("http://{}", self.cloud.address);
        AzureKey::open_beside(&metadata, &self.uri(key), self.clock.clone(), &environment).await
    }

    /// Opened, with the requests for that forgotten.
    async fn opened(&self, key: &str) -> AzureKey {
        let opened = self.open(key).await.unwrap();
        self.cloud.requests();
        opened
    }
}

#[tokio::test]
async fn each_kind_of_key_signs_with_every_algorithm_of_its_kind() {
    for hsm in [false, true] {
        let scene = Scene::set().await;
        scene.cloud.given().hsm = hsm;
        for spec in KeySpec::ALL {
            let key = scene.open(&spec.name().replace('_', "-")).await.unwrap();
            assert_eq!(key.public_key().spec(), spec);
            for algorithm in Algorithm::ALL {
                match key.sign(algorithm, &DIGEST).await {
                    Ok(signature) => {
                        assert_eq!(key.public_key().verify(algorithm, &DIGEST, signature.as_ref()), Ok(()));
                    }
                    Err(Error::WrongAlgorithm { .. }) => assert!(!spec.supports(algorithm)),
                    Err(error) => panic!("{error}"),
                }
            }
        }
    }
}

/// One number in 256 is a byte shorter than the others, and every other one needs one more.
#[tokio::test]
async fn ecdsa_signatures_verify_whatever_their_numbers_begin_with() {
    let scene = Scene::set().await;
    let key = scene.open("EC-P256").await.unwrap();
    let mut lengths = std::collections::BTreeSet::new();
    for number in 0..=255 {
        let digest = [number; 32];
        let signature = key.sign(Algorithm::EcdsaSha256, &digest).await.unwrap();
        assert_eq!(key.public_key().verify(Algorithm::EcdsaSha256, &digest, signature.as_ref()), Ok(()));
        lengths.insert(signature.as_ref().len());
    }
    assert!(lengths.contains(&70) && lengths.contains(&71) && lengths.contains(&72), "{lengths:?}");
}

#[tokio::test]
async fn the_current_version_is_kept_and_a_named_one_is_that() {
    let scene = Scene::set().await;
    let current = scene.open("RSA-2048").await.unwrap();
    assert_eq!(current.resolved(), format!("http://{}/keys/RSA-2048/{NEW}", scene.cloud.address));
    scene.cloud.requests();
    scene.cloud.given().current = OLD;
    let signature = current.sign(Algorithm::RsaPssSha256, &DIGEST).await.unwrap();
    assert_eq!(current.public_key().verify(Algorithm::RsaPssSha256, &DIGEST, signature.as_ref()), Ok(()));
    assert_eq!(scene.cloud.requests(), [format!("POST /keys/RSA-2048/{NEW}/sign")]);

    let other = scene.open("RSA-2048").await.unwrap();
    assert!(other.resolved().ends_with(OLD) && other.public_key() != current.public_key());
    let named = scene.open(&format!("rsa-2048/{NEW}")).await.unwrap();
    assert_eq!(named.public_key(), current.public_key());
    for missing in ["nobody".to_owned(), format!("RSA-2048/{}", OLD.replace('1', "3"))] {
        assert!(matches!(scene.open(&missing).await.unwrap_err(), Error::NotFound { .. }), "{missing}");
    }
}

/// What makes a key useless, what is said when it is opened then, and what when it is to sign.
type Way = (fn(&Fake, Timestamp), &'static str, &'static str);

#[tokio::test]
async fn a_key_that_may_not_sign_is_refused_with_its_reason() {
    let scene = Scene::set().await;
    let key = scene.opened("RSA-2048").await;
    let now = scene.clock.now();
    let ways: [Way; 4] = [
        (|cloud, _| cloud.given().enabled = false, "is disabled", "KeyDisabled"),
        (
            |cloud, now| cloud.given().not_before = Some(now + SignedDuration::from_hours(1)),
            "before 2026-11-22T06:00:00Z",
            "KeyNotYetValid",
        ),
        (|cloud, now| cloud.given().expires = Some(now), "any more since 2026-11-22T05:00:00Z", "KeyExpired"),
        (|cloud, _| cloud.given().key_ops = vec!["encrypt", "decrypt"], "for encrypt, decrypt", "KeyOperationForbidden"),
    ];
    for (make, opening, signing) in ways {
        make(&scene.cloud, now);
        for (error, part) in [
            (scene.open("RSA-2048").await.unwrap_err(), opening),
            (key.sign(Algorithm::RsaPkcs1Sha256, &DIGEST).await.unwrap_err(), signing),
        ] {
            assert!(
                matches!(error, Error::KeyUnusable { .. }) && error.to_string().contains(part),
                "{error} does not say {part}"
            );
        }
        let mut given = scene.cloud.given();
        (given.enabled, given.not_before, given.expires, given.key_ops) = (true, None, None, vec!["sign"]);
    }
    key.sign(Algorithm::RsaPkcs1Sha256, &DIGEST).await.unwrap();
    scene.cloud.given().deleted = true;
    assert!(matches!(key.sign(Algorithm::RsaPkcs1Sha256, &DIGEST).await.unwrap_err(), Error::NotFound { .. }));
}

#[tokio::test]
async fn documented_errors_are_sorted_into_retry_and_refuse() {
    let kid = |rest: &str| Fault::Field("/kid", Some(Box::leak(rest.to_owned().into_boxed_str())));
    for (fault, kind, retried) in [
        (Fault::Error(429, "Throttled"), "throttled", true),
        (Fault::Throttled { retry_after: 3 }, "throttled", true),
        (Fault::Error(500, "InternalServerError"), "transient", true),
        (Fault::Error(503, "ServiceUnavailable"), "transient", true),
        (Fault::Error(502, ""), "transient", true),
        (Fault::Reset, "unreachable", true),
        (Fault::NoAnswer, "unreachable", true),
        (Fault::Error(403, "Forbidden"), "denied", false),
        (Fault::Error(404, "KeyNotFound"), "not_found", false),
        (Fault::Error(409, "Conflict"), "key_unusable", false),
        (Fault::Error(400, "BadParameter"), "misconfigured", false),
        (Fault::Error(302, ""), "misconfigured", false),
        (Fault::Says("{".into()), "bad_response", false),
        (Fault::Endless, "bad_response", false),
        (Fault::Field("/value", Some("?")), "bad_response", false),
        (Fault::As("EC-P256", NEW), "bad_response", false),
        (Fault::As("RSA-2048", OLD), "bad_response", false),
        (kid("https://other.vault.azure.net/keys/RSA-2048/1"), "bad_response", false),
        (kid("RSA-2048"), "bad_response", false),
    ] {
        let scene = Scene::set().await;
        let key = scene.opened("RSA-2048").await;
        scene.cloud.then([fault.clone()]);
        let error = key.sign(Algorithm::RsaPkcs1Sha256, &DIGEST).await.unwrap_err();
        assert_eq!(error.name(), kind, "{fault:?}: {error}");
        assert_eq!(matches!(error.verdict(), Verdict::Retry { .. }), retried, "{fault:?}: {error}");
        assert_eq!(scene.cloud.requests().len(), 1, "{fault:?}: asked once");
        if let Fault::Throttled { .. } = fault {
            assert_eq!(error.verdict(), Verdict::Retry { after: Some(Duration::from_secs(3)), throttled: true });
        }
    }
    let scene = Scene::set().await;
    let key = scene.opened("EC-P256").await;
    for value in ["AAAA", "", "MAYCAQECAQE"] {
        scene.cloud.then([Fault::Field("/value", Some(value))]);
        let error = key.sign(Algorithm::EcdsaSha256, &DIGEST).await.unwrap_err();
        assert!(matches!(error, Error::BadResponse { .. }) && error.to_string().contains("64 bytes"), "{error}");
    }
    for inner in ["ForbiddenByRbac", "ForbiddenByPolicy", "ForbiddenByFirewall", "AccessDenied"] {
        scene.cloud.given().denied = Some(inner);
        let error = key.sign(Algorithm::EcdsaSha256, &DIGEST).await.unwrap_err();
        assert!(matches!(error, Error::Denied { .. }) && error.to_string().contains(inner), "{error}");
    }
}

#[tokio::test]
async fn what_comes_when_a_key_is_opened_has_to_be_the_asked_key_and_a_whole_one() {
    for (key, fault, kind) in [
        ("RSA-2048", Fault::As("RSA-3072", NEW), "bad_response"),
        ("RSA-2048/00000000000000000000000000000001", Fault::As("RSA-2048", NEW), "bad_response"),
        ("RSA-2048", Fault::Field("/key/kid", Some("https://elsewhere.example/keys/RSA-2048/1")), "bad_response"),
        ("RSA-2048", Fault::Field("/key/n", Some("AQAB")), "key_changed"),
        ("RSA-2048", Fault::Field("/key/e", None), "key_changed"),
        ("RSA-2048", Fault::Field("/key/kty", Some("oct-HSM")), "key_changed"),
        ("EC-P256", Fault::Field("/key/crv", Some("P-384")), "key_changed"),
        ("EC-P256", Fault::Field("/key/x", Some("AAAA")), "key_changed"),
        ("EC-P256", Fault::Field("/key/y", None), "key_changed"),
        ("EC-P256", Fault::Says(r#"{"attributes":{}}"#.into()), "bad_response"),
    ] {
        let scene = Scene::set().await;
        // The token comes first.
        scene.cloud.then([Fault::WrongKey, fault.clone()]);
        let error = scene.open(key).await.unwrap_err();
        assert_eq!(error.name(), kind, "{fault:?}: {error}");
    }
}

#[tokio::test]
async fn a_signature_of_another_key_is_asked_for_once_more_and_then_refused() {
    let scene = Scene::set().await;
    let settings = WitnessSettings {
        name: "release".into(),
        description: String::new(),
        key: scene.uri("EC-P256"),
        login: None,
        verify: vec![],
        rate: None,
        pin: None,
    };
    let witness = Witness::from_key(&settings, Arc::new(scene.opened("EC-P256").await), scene.clock.clone()).unwrap();
    scene.cloud.then([Fault::WrongKey]);
    witness.sign(Algorithm::EcdsaSha256, &DIGEST).await.unwrap();
    scene.cloud.then([Fault::WrongKey, Fault::WrongKey]);
    let error = witness.sign(Algorithm::EcdsaSha256, &DIGEST).await.unwrap_err();
    assert!(matches!(error, Error::BadSignature { .. }), "{error}");
}

#[tokio::test]
async fn tokens_that_end_or_are_revoked_mid_run_cost_no_signature_and_show_in_no_log() {
    let scene = Scene::set().await;
    let log = logged(async {
        let key = scene.open("RSA-2048").await.unwrap();
        for _ in 0..3 {
            scene.hand.advance(Duration::from_secs(3600));
            scene.cloud.revoke();
            scene.cloud.requests();
            let signed = join_all((0..32).map(|_| key.sign(Algorithm::RsaPkcs1Sha256, &DIGEST))).await;
            assert!(signed.iter().all(Result::is_ok), "{:?}", signed.iter().find(|signed| signed.is_err()));
            assert_eq!(scene.cloud.requests().iter().filter(|request| request.ends_with("/token")).count(), 1);
        }
        scene.cloud.revoke();
        key.sign(Algorithm::RsaPkcs1Sha256, &DIGEST).await.unwrap();
        // One that the vault does not know, however often it is fetched.
        scene.cloud.requests();
        scene.cloud.then([Fault::Error(401, "Unauthorized"), Fault::WrongKey, Fault::Error(401, "Unauthorized")]);
        let error = key.sign(Algorithm::RsaPkcs1Sha256, &DIGEST).await.unwrap_err();
        assert!(matches!(error, Error::Credentials { .. }), "{error}");
        assert_eq!(scene.cloud.requests().len(), 3);
        tracing::trace!(?error, ?key);
    })
    .await;
    assert!(log.contains("Azure credentials fetched") && log.contains("key opened"), "{log}");
    for secret in ["issuedToken", CLIENT[1]] {
        assert!(!log.contains(secret), "{secret} is in the log");
    }
}
