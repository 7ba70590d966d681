use std::{fs, sync::Arc, time::Duration};

use futures::future::join_all;
use integration_tests::alibaba::{BASE, Fake, Fault, NEW, OLD, PROVIDER, ROLE};
use jiff::SignedDuration;
use tempfile::TempDir;
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    },
};

use super::*;
use crate::{
    clock::ManualClock,
    kms::logged::logged,
    outcome::{Classify, Verdict},
    witness::{Witness, WitnessSettings},
};

const DIGEST: [u8; 32] = [7; 32];

/// The service, at our time.
pub(super) async fn fake(clock: &Clock) -> Fake {
    let clock = clock.clone();
    Fake::start(Arc::new(move || clock.now())).await
}

/// The KMS, and a machine with credentials for it.
struct Scene {
    kms: Fake,
    clock: Clock,
    hand: ManualClock,
    folder: TempDir,
}

impl Scene {
    async fn set() -> Self {
        let (clock, hand) = Clock::manual("2026-11-22T05:00:00Z".parse().unwrap());
        Self { kms: fake(&clock).await, clock, hand, folder: tempfile::tempdir().unwrap() }
    }

    fn uri(&self, key: &str) -> KeyUri {
        format!("alibabakms://{}/{key}", self.kms.address).parse().unwrap()
    }

    async fn open(&self, key: &str) -> Result<AlibabaKey, Error> {
        let keys = [("ALIBABA_CLOUD_ACCESS_KEY_ID", BASE[0]), ("ALIBABA_CLOUD_ACCESS_KEY_SECRET", BASE[1])];
        self.open_with(key, &Environment::of(keys)).await
    }

    async fn open_with(&self, key: &str, environment: &Environment) -> Result<AlibabaKey, Error> {
        let uri = self.uri(key);
        let mut place = Place::of(&uri, environment)?;
        let here: reqwest::Url = format!("http://{}/", self.kms.address).parse().unwrap();
        (place.sts, place.metadata) = (here.clone(), here);
        if self.kms.given().dedicated {
            place.gateway = Gateway::Dedicated;
        }
        AlibabaKey::open_at(&uri, place, self.clock.clone(), environment, Patience::USUAL).await
    }

    /// Opened, with the requests for that forgotten.
    async fn opened(&self, key: &str) -> AlibabaKey {
        let opened = self.open(key).await.unwrap();
        self.kms.requests();
        opened
    }
}

#[tokio::test]
async fn keys_sign_by_alias_id_and_arn() {
    let scene = Scene::set().await;
    let (rsa, ec): (&[_], &[_]) = (&[Algorithm::RsaPkcs1Sha256, Algorithm::RsaPssSha256], &[Algorithm::EcdsaSha256]);
    for (key, algorithms, id) in [
        ("/alias/rsa", rsa, "key-rsa"),
        ("/key-rsa", rsa, "key-rsa"),
        ("kst-1/key-rsa", rsa, "key-rsa"),
        ("/acs:kms:cn-hangzhou:1111222233334444:key/key-ec", ec, "key-ec"),
        ("/alias/ec", ec, "key-ec"),
    ] {
        let key = scene.open(key).await.unwrap();
        assert_eq!(key.resolved(), format!("acs:kms:cn-hangzhou:1111222233334444:key/{id}/versions/{NEW}"));
        for algorithm in algorithms {
            let signature = key.sign(*algorithm, &DIGEST).await.unwrap();
            assert_eq!(key.public_key().verify(*algorithm, &DIGEST, signature.as_ref()), Ok(()));
        }
    }
}

#[tokio::test]
async fn the_newest_version_is_kept_and_a_named_one_is_that() {
    let scene = Scene::set().await;
    let newest = scene.open("/alias/rsa").await.unwrap();
    assert_eq!(scene.kms.requests(), ["DescribeKey", "ListKeyVersions", "GetPublicKey"]);
    let old = scene.open(&format!("/alias/rsa/versions/{OLD}")).await.unwrap();
    assert_eq!(scene.kms.requests(), ["DescribeKey", "GetPublicKey"]);
    assert_ne!(newest.public_key().fingerprint(), old.public_key().fingerprint());
    let signature = old.sign(Algorithm::RsaPssSha256, &DIGEST).await.unwrap();
    assert_eq!(old.public_key().verify(Algorithm::RsaPssSha256, &DIGEST, signature.as_ref()), Ok(()));

    scene.kms.given().padding = 350;
    scene.kms.requests();
    assert!(scene.open("/alias/rsa").await.unwrap().resolved().ends_with(NEW));
    let pages = scene.kms.requests().into_iter().filter(|request| request == "ListKeyVersions").count();
    assert_eq!(pages, 4);

    let error = scene.open("/alias/rsa/versions/nowhere").await.unwrap_err();
    assert!(matches!(error, Error::NotFound { .. }), "{error}");
}

#[tokio::test]
async fn an_instances_own_gateway_needs_the_version_and_is_not_asked_to_describe() {
    let scene = Scene::set().await;
    scene.kms.given().dedicated = true;
    let error = scene.open("/alias/rsa").await.unwrap_err();
    assert!(matches!(error, Error::Misconfigured { .. }) && error.to_string().contains("/versions/"), "{error}");
    assert!(scene.kms.requests().is_empty());
    let key = scene.open(&format!("/alias/rsa/versions/{NEW}")).await.unwrap();
    assert_eq!(scene.kms.requests(), ["GetPublicKey"]);
    assert_eq!(key.resolved(), format!("key-rsa/versions/{NEW}"));
    let signature = key.sign(Algorithm::RsaPkcs1Sha256, &DIGEST).await.unwrap();
    assert_eq!(key.public_key().verify(Algorithm::RsaPkcs1Sha256, &DIGEST, signature.as_ref()), Ok(()));
    // Whether an answer repeats the alias or names the key's id is not documented for every operation.
    scene.kms.then([Fault::As("alias/rsa", NEW)]);
    let key = scene.open(&format!("/alias/rsa/versions/{NEW}")).await.unwrap();
    key.sign(Algorithm::RsaPkcs1Sha256, &DIGEST).await.unwrap();
    scene.kms.then([Fault::As("alias/rsa", NEW)]);
    key.sign(Algorithm::RsaPkcs1Sha256, &DIGEST).await.unwrap();
    scene.kms.then([Fault::As("key-other", NEW)]);
    let error = scene.open(&format!("/key-rsa/versions/{NEW}")).await.unwrap_err();
    assert!(matches!(error, Error::BadResponse { .. }), "{error}");
}

#[tokio::test]
async fn documented_errors_are_sorted_into_retry_and_refuse() {
    for (fault, kind, retried) in [
        (Fault::Error(400, "Throttling.User"), "throttled", true),
        (Fault::Throttled { retry_after: 3 }, "throttled", true),
        (Fault::Error(500, "InternalFailure"), "transient", true),
        (Fault::Error(503, "ServiceUnavailableTemporary"), "transient", true),
        (Fault::Error(503, "SerivceUnavailableTemporary"), "transient", true),
        (Fault::Error(502, ""), "transient", true),
        (Fault::Reset, "unreachable", true),
        (Fault::NoAnswer, "unreachable", true),
        (Fault::Error(403, "Forbidden.NoPermission"), "denied", false),
        (Fault::Error(403, "Forbidden.KmsServiceNotEnabled"), "denied", false),
        (Fault::Error(403, "Forbidden.InDebtOverdue"), "denied", false),
        (Fault::Error(403, "Forbidden.ProhibitedByRiskControl"), "denied", false),
        (Fault::Error(409, "Rejected.Disabled"), "key_unusable", false),
        (Fault::Error(409, "Rejected.PendingDeletion"), "key_unusable", false),
        (Fault::Error(409, "Rejected.PendingImport"), "key_unusable", false),
        (Fault::Error(400, "UnsupportedOperation"), "key_unusable", false),
        (Fault::Error(404, "Forbidden.KeyNotFound"), "not_found", false),
        (Fault::Error(404, "Forbidden.KeyVersionNotFound"), "not_found", false),
        (Fault::Error(404, "Forbidden.AliasNotFound"), "not_found", false),
        (Fault::Error(400, "InvalidParameter"), "misconfigured", false),
        (Fault::Error(400, "SignatureDoesNotMatch"), "credentials", false),
        (Fault::Error(403, "InvalidAccessKeyId.Inactive"), "credentials", false),
        (Fault::Error(302, ""), "misconfigured", false),
        (Fault::Says("{".into()), "bad_response", false),
        (Fault::Says(format!(r#"{{"KeyId":"key-rsa","KeyVersionId":"{NEW}","Value":"?"}}"#)), "bad_response", false),
        (Fault::Endless, "bad_response", false),
        (Fault::As("key-ec", NEW), "key_changed", false),
        (Fault::As("key-rsa", OLD), "key_changed", false),
    ] {
        let scene = Scene::set().await;
        let key = scene.opened("/alias/rsa").await;
        scene.kms.then([fault.clone()]);
        let error = key.sign(Algorithm::RsaPkcs1Sha256, &DIGEST).await.unwrap_err();
        assert_eq!(error.name(), kind, "{fault:?}: {error}");
        assert_eq!(matches!(error.verdict(), Verdict::Retry { .. }), retried, "{fault:?}: {error}");
        assert_eq!(scene.kms.requests(), ["AsymmetricSign"], "{fault:?}: asked once");
        if let Fault::Throttled { .. } = fault {
            assert_eq!(error.verdict(), Verdict::Retry { after: Some(Duration::from_secs(3)), throttled: true });
        }
    }
}

#[tokio::test]
async fn what_helps_at_once_is_tried_at_once_and_once() {
    let scene = Scene::set().await;
    let key = scene.opened("/alias/rsa").await;
    for code in ["InvalidSecurityToken.Expired", "InvalidAccessKeyId.NotFound", "SignatureNonceUsed"] {
        scene.kms.then([Fault::Error(400, code)]);
        key.sign(Algorithm::RsaPkcs1Sha256, &DIGEST).await.unwrap();
        assert_eq!(scene.kms.requests(), ["AsymmetricSign"; 2], "{code}");
        scene.kms.then([Fault::Error(400, code), Fault::Error(400, code)]);
        key.sign(Algorithm::RsaPkcs1Sha256, &DIGEST).await.unwrap_err();
        assert_eq!(scene.kms.requests(), ["AsymmetricSign"; 2], "{code}");
    }
    for minutes in [20, -20] {
        let scene = Scene::set().await;
        scene.kms.given().ahead = SignedDuration::from_mins(minutes);
        let key = scene.open("/alias/rsa").await.unwrap();
        assert_eq!(scene.kms.requests(), ["DescribeKey", "DescribeKey", "ListKeyVersions", "GetPublicKey"]);
        key.sign(Algorithm::RsaPkcs1Sha256, &DIGEST).await.unwrap();
        assert_eq!(scene.kms.requests(), ["AsymmetricSign"]);
    }
    scene.kms.then([Fault::Error(400, "InvalidTimeStamp.Expired")]);
    let error = key.sign(Algorithm::RsaPkcs1Sha256, &DIGEST).await.unwrap_err();
    assert_eq!(error.verdict(), Verdict::TRANSIENT, "{error}");
}

#[tokio::test]
async fn opening_checks_what_the_key_is_for_and_that_the_answers_agree() {
    let scene = Scene::set().await;
    for (state, part) in [
        ("Disabled", "is disabled"),
        ("PendingDeletion", "going to be deleted on 2027-01-15T08:00:00Z"),
        ("PendingImport", "PendingImport"),
    ] {
        scene.kms.given().key_state = state;
        let error = scene.open("/alias/rsa").await.unwrap_err();
        assert!(matches!(error, Error::KeyUnusable { .. }) && error.to_string().contains(part), "{error}");
    }
    scene.kms.given().key_state = "Enabled";
    scene.kms.given().usage = "ENCRYPT/DECRYPT";
    let error = scene.open("/alias/rsa").await.unwrap_err();
    assert!(matches!(error, Error::KeyUnusable { .. }) && error.to_string().contains("ENCRYPT/DECRYPT"), "{error}");
    scene.kms.given().usage = "SIGN/VERIFY";

    let error = scene.open("kst-2/alias/rsa").await.unwrap_err();
    assert!(matches!(error, Error::Misconfigured { .. }) && error.to_string().contains("kst-2"), "{error}");
    assert!(matches!(scene.open("/alias/nobody").await.unwrap_err(), Error::NotFound { .. }));
    scene.kms.given().spec = Some("RSA_3072");
    assert!(matches!(scene.open("/alias/rsa").await.unwrap_err(), Error::BadResponse { .. }));
    scene.kms.given().spec = None;
    scene.kms.then([Fault::As("key-ec", "")]);
    assert!(matches!(scene.open("/key-rsa").await.unwrap_err(), Error::BadResponse { .. }));
    scene.kms.then([Fault::As("key-ec", "")]);
    assert!(scene.open(&format!("/alias/rsa/versions/{NEW}")).await.is_err(), "an alias that moves meanwhile");
    for key in ["", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"] {
        let scene = Scene::set().await;
        scene.kms.given().dedicated = true;
        scene
            .kms
            .then([Fault::Says(serde_json::json!({ "KeyId": "key-rsa", "KeyVersionId": NEW, "PublicKey": key }).to_string())]);
        let error = scene.open(&format!("/key-rsa/versions/{NEW}")).await.unwrap_err();
        assert!(matches!(error, Error::PublicKey { .. }), "{error}");
    }
}

#[tokio::test]
async fn a_signature_that_does_not_verify_is_asked_for_once_more_and_then_refused() {
    let scene = Scene::set().await;
    let settings = WitnessSettings {
        name: "release".into(),
        description: String::new(),
        key: scene.uri("/alias/rsa"),
        login: None,
        verify: vec![],
        rate: None,
        pin: None,
    };
    let witness = Witness::from_key(&settings, Arc::new(scene.opened("/alias/rsa").await), scene.clock.clone()).unwrap();
    scene.kms.then([Fault::WrongKey]);
    witness.sign(Algorithm::RsaPssSha256, &DIGEST).await.unwrap();
    scene.kms.then([Fault::WrongKey, Fault::WrongKey]);
    let error = witness.sign(Algorithm::RsaPssSha256, &DIGEST).await.unwrap_err();
    assert!(matches!(error, Error::BadSignature { .. }), "{error}");
}

#[tokio::test]
async fn an_algorithm_of_another_kind_of_key_is_not_even_asked_for() {
    let scene = Scene::set().await;
    let key = scene.opened("/alias/rsa").await;
    assert!(matches!(key.sign(Algorithm::EcdsaSha256, &DIGEST).await, Err(Error::WrongAlgorithm { .. })));
    assert!(scene.kms.requests().is_empty());
}

#[tokio::test]
async fn the_gateways_own_authority_is_the_only_one_that_counts() {
    let scene = Scene::set().await;
    let file = scene.folder.path().join("ca.pem");
    let with_ca = format!("/key-rsa?ca={}", file.display());
    let error = scene.open(&with_ca).await.unwrap_err();
    assert!(matches!(error, Error::Misconfigured { .. }) && error.to_string().contains("is not there"), "{error}");
    fs::write(&file, "not a certificate").unwrap();
    let error = scene.open(&with_ca).await.unwrap_err();
    assert!(error.to_string().contains("no certificate in PEM"), "{error}");
}

/// A door to somewhere by TLS, with this certificate.
async fn tls_door(to: String, certificate: &[u8], key: &[u8]) -> u16 {
    let config = ServerConfig::builder_with_provider(Arc::new(tokio_rustls::rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![CertificateDer::from_pem_slice(certificate).unwrap()], PrivateKeyDer::from_pem_slice(key).unwrap())
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let doors = async move {
        let mut doors = JoinSet::new();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let (acceptor, to) = (acceptor.clone(), to.clone());
            doors.spawn(async move {
                // A client that does not trust us hangs up here.
                let Ok(mut stream) = acceptor.accept(stream).await else { return };
                let mut behind = TcpStream::connect(to).await.unwrap();
                let _ = copy_bidirectional(&mut stream, &mut behind).await;
            });
        }
    };
    #[expect(clippy::disallowed_methods, reason = "it ends with the test's own runtime")]
    tokio::spawn(doors);
    port
}

#[tokio::test]
async fn an_instances_own_gateway_is_trusted_by_its_own_authority() {
    let scene = Scene::set().await;
    scene.kms.given().dedicated = true;
    let (own, other) = (
        include_bytes!("../../http/server/testdata/first.cert.pem").as_slice(),
        include_bytes!("../../http/server/testdata/renewed.cert.pem"),
    );
    let port = tls_door(scene.kms.address.clone(), own, include_bytes!("../../http/server/testdata/first.key.pem")).await;
    let keys = Environment::of([("ALIBABA_CLOUD_ACCESS_KEY_ID", BASE[0]), ("ALIBABA_CLOUD_ACCESS_KEY_SECRET", BASE[1])]);
    for (certificate, trusted) in [(own, true), (other, false)] {
        let file = scene.folder.path().join("ca.pem");
        fs::write(&file, certificate).unwrap();
        let uri = format!("alibabakms://https://localhost:{port}//key-ec/versions/{NEW}?ca={}", file.display());
        let uri: KeyUri = uri.parse().unwrap();
        let place = Place { gateway: Gateway::Dedicated, ..Place::of(&uri, &keys).unwrap() };
        match AlibabaKey::open_at(&uri, place, scene.clock.clone(), &keys, Patience::USUAL).await {
            Ok(key) if trusted => {
                key.sign(Algorithm::EcdsaSha256, &DIGEST).await.unwrap();
            }
            Err(Error::Unreachable { source, .. }) if !trusted => assert!(source.to_string().contains("certificate"), "{source}"),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_role_that_ends_mid_run_costs_no_signature_and_shows_in_no_log() {
    let scene = Scene::set().await;
    let token = scene.folder.path().join("token");
    fs::write(&token, "oidc.token-1").unwrap();
    let environment = Environment::of([
        ("ALIBABA_CLOUD_OIDC_TOKEN_FILE", token.to_str().unwrap()),
        ("ALIBABA_CLOUD_OIDC_PROVIDER_ARN", PROVIDER),
        ("ALIBABA_CLOUD_ROLE_ARN", ROLE),
    ]);
    let log = logged(async {
        let key = scene.open_with("/alias/rsa", &environment).await.unwrap();
        for hour in 2..5 {
            scene.hand.advance(Duration::from_secs(3600));
            // The KMS forgets all but the newest.
            scene.kms.given().only = Some(format!("STS.{hour}"));
            let signed = join_all((0..32).map(|_| key.sign(Algorithm::RsaPkcs1Sha256, &DIGEST))).await;
            assert!(signed.iter().all(Result::is_ok), "{:?}", signed.iter().find(|signed| signed.is_err()));
        }
        // The signature of a role that the KMS has taken away is refused after one more exchange.
        scene.kms.given().only = Some("STS.99".into());
        let error = key.sign(Algorithm::RsaPkcs1Sha256, &DIGEST).await.unwrap_err();
        assert!(matches!(error, Error::Credentials { .. }), "{error}");
        tracing::trace!(?error, ?key);
        // A peer that repeats what was signed, with the token in it.
        scene.kms.given().only = None;
        let wrong =
            Environment::of([("ALIBABA_CLOUD_ACCESS_KEY_ID", BASE[0]), ("ALIBABA_CLOUD_ACCESS_KEY_SECRET", "notTheSecret")]);
        let error = scene.open_with("/alias/rsa", &wrong).await.unwrap_err();
        assert!(matches!(error, Error::Credentials { .. }) && !error.to_string().contains("CanonicalRequest"), "{error}");
        tracing::trace!(?error);
    })
    .await;
    assert!(log.contains("Alibaba Cloud credentials fetched") && log.contains("key opened"), "{log}");
    for secret in [BASE[1], "issuedSecret", "issuedToken", "oidc.token", "notTheSecret", "Signature="] {
        assert!(!log.contains(secret), "{secret} is in the log");
    }
}
