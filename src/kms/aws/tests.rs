mod fake;
mod secrets;

use std::{fs, sync::Arc, time::Duration};

use futures::future::join_all;
use tempfile::TempDir;

use super::*;
use crate::{
    clock::ManualClock,
    outcome::{Classify, Verdict},
    witness::{Probed, Witness, WitnessSettings},
};
use fake::{ACCESS_KEY, EC_ARN, Fake, Fault, REGION, RSA_ARN, SECRET_KEY};

const DIGEST: [u8; 32] = [7; 32];
const IMPATIENT: Patience = Patience { connect: Duration::from_secs(5), attempt: Duration::from_secs(3) };

/// The KMS, and a machine with credentials for it.
struct Scene {
    kms: Fake,
    clock: Clock,
    hand: ManualClock,
    folder: TempDir,
}

impl Scene {
    async fn set() -> Self {
        let (clock, hand) = Clock::manual(fake::now());
        let scene = Self { kms: Fake::start().await, clock, hand, folder: tempfile::tempdir().unwrap() };
        scene.write_credentials(ACCESS_KEY, SECRET_KEY, None);
        scene
    }

    fn credentials_file(&self) -> std::path::PathBuf {
        self.folder.path().join("credentials")
    }

    fn write_credentials(&self, id: &str, secret: &str, token: Option<&str>) {
        let token = token.map_or_else(String::new, |token| format!("aws_session_token = {token}\n"));
        let text = format!("[default]\naws_access_key_id = {id}\naws_secret_access_key = {secret}\n{token}");
        fs::write(self.credentials_file(), text).unwrap();
    }

    fn uri(&self, key: &str) -> KeyUri {
        format!("awskms://{}/{key}?region={REGION}", self.kms.address).parse().unwrap()
    }

    async fn open(&self, key: &str) -> Result<AwsKey, Error> {
        let path = self.credentials_file();
        let variables = [("AWS_SHARED_CREDENTIALS_FILE", path.to_str().unwrap()), ("AWS_EC2_METADATA_DISABLED", "true")];
        let environment = Environment::of(variables);
        AwsKey::open_patiently(&self.uri(key), self.clock.clone(), &environment, IMPATIENT).await
    }

    /// Opened, with the requests for that forgotten.
    async fn opened(&self, key: &str) -> AwsKey {
        let opened = self.open(key).await.unwrap();
        assert_eq!(self.kms.requests(), ["DescribeKey", "GetPublicKey"]);
        opened
    }

    async fn witness(&self, key: &str) -> Witness {
        let settings = WitnessSettings {
            name: "release".into(),
            description: String::new(),
            key: self.uri(key),
            login: None,
            verify: vec![],
            rate: None,
            pin: None,
        };
        Witness::from_key(&settings, Arc::new(self.opened(key).await), self.clock.clone()).unwrap()
    }
}

async fn rsa_error(scene: &Scene, faults: impl IntoIterator<Item = Fault>) -> Error {
    let key = scene.opened("alias/rsa").await;
    scene.kms.then(faults);
    let error = key.sign(Algorithm::RsaPkcs1Sha256, &DIGEST).await.unwrap_err();
    assert!(error.to_string().contains(&scene.uri("alias/rsa").to_string()), "{error} does not name the key");
    error
}

#[tokio::test]
async fn keys_sign_by_alias_id_and_arn() {
    let scene = Scene::set().await;
    for (name, arn, algorithms) in [
        ("rsa", RSA_ARN, [Algorithm::RsaPkcs1Sha256, Algorithm::RsaPssSha256].as_slice()),
        ("ec", EC_ARN, &[Algorithm::EcdsaSha256]),
    ] {
        for reference in [&format!("alias/{name}"), name, arn] {
            let key = if reference == arn {
                let uri = format!("awskms://{}/{arn}", scene.kms.address).parse().unwrap();
                let path = scene.credentials_file();
                let environment = Environment::of([("AWS_SHARED_CREDENTIALS_FILE", path.to_str().unwrap())]);
                AwsKey::open_patiently(&uri, scene.clock.clone(), &environment, IMPATIENT).await.unwrap()
            } else {
                scene.open(reference).await.unwrap()
            };
            assert_eq!(key.resolved(), arn);
            for algorithm in algorithms {
                let signature = key.sign(*algorithm, &DIGEST).await.unwrap();
                assert_eq!(key.public_key().verify(*algorithm, &DIGEST, signature.as_ref()), Ok(()));
            }
        }
    }
}

#[tokio::test]
async fn a_multi_region_key_is_named_by_its_id_or_arn() {
    assert!(names("mrk-1234abcd", "arn:aws:kms:eu-west-1:111122223333:key/mrk-1234abcd"));
    assert!(!names("mrk-1234abcd", "arn:aws:kms:eu-west-1:111122223333:key/mrk-1234abce"));
    let replica = "arn:aws:kms:us-east-2:111122223333:key/mrk-1234abcd";
    assert!(names(replica, replica) && names("alias/release", replica));
    assert!(!names(replica, "arn:aws:kms:eu-west-1:111122223333:key/mrk-1234abcd"), "a replica elsewhere is another resource");
}

#[tokio::test]
async fn an_algorithm_of_another_kind_of_key_is_not_even_asked_for() {
    let scene = Scene::set().await;
    let key = scene.opened("alias/rsa").await;
    assert!(matches!(key.sign(Algorithm::EcdsaSha256, &DIGEST).await, Err(Error::WrongAlgorithm { .. })));
    assert!(scene.kms.requests().is_empty());
}

#[tokio::test]
async fn throttling_goes_to_the_caller_each_time_and_costs_one_request_each() {
    let scene = Scene::set().await;
    let key = scene.opened("alias/rsa").await;
    let throttled = Fault::Error { status: 400, code: "ThrottlingException", message: "Rate exceeded", retry_after: None };
    let with_time = Fault::Error { status: 429, code: "", message: "", retry_after: Some(3) };
    scene.kms.then([throttled.clone(), throttled, with_time]);
    for after in [None, None, Some(Duration::from_secs(3))] {
        let error = key.sign(Algorithm::RsaPkcs1Sha256, &DIGEST).await.unwrap_err();
        assert_eq!(error.verdict(), Verdict::Retry { after, throttled: true }, "{error}");
    }
    assert_eq!(scene.kms.requests(), ["Sign"; 3]);
    key.sign(Algorithm::RsaPkcs1Sha256, &DIGEST).await.unwrap();
}

#[tokio::test]
async fn passing_faults_are_for_the_caller_to_retry() {
    for fault in [
        Fault::error(500, "KMSInternalException"),
        Fault::error(500, ""),
        Fault::error(400, "DependencyTimeoutException"),
        Fault::error(503, "ServiceUnavailable"),
        Fault::SlowBody,
        Fault::Reset,
        Fault::NoAnswer,
    ] {
        let scene = Scene::set().await;
        let error = rsa_error(&scene, [fault.clone()]).await;
        assert_eq!(error.verdict(), Verdict::TRANSIENT, "{fault:?}: {error}");
        assert_eq!(scene.kms.requests(), ["Sign"], "{fault:?}");
    }
}

#[tokio::test]
async fn a_kms_that_is_not_there_is_unreachable() {
    let scene = Scene::set().await;
    let (_taken, nobody) = integration_tests::process::nobody().unwrap();
    let path = scene.credentials_file();
    let environment = Environment::of([("AWS_SHARED_CREDENTIALS_FILE", path.to_str().unwrap())]);
    let uri = format!("awskms://{nobody}/alias/rsa?region={REGION}").parse().unwrap();
    let error = AwsKey::open_patiently(&uri, scene.clock.clone(), &environment, IMPATIENT).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains(&format!("http://{nobody}/")), "{error}");
}

#[tokio::test]
async fn answers_that_cannot_be_right_are_refused_as_such() {
    for (fault, part) in [
        (Fault::Says(r#"{"KeyId":"arn:aws"#.into()), "not the JSON of one"),
        (Fault::Says(r#"{"KeyId":1,"Signature":"","SigningAlgorithm":""}"#.into()), "not the JSON of one"),
        (Fault::Says("<html>sign in to the guest network</html>".into()), "not the JSON of one"),
        (Fault::Says(String::new()), "not the JSON of one"),
        (
            Fault::Says(format!(r#"{{"KeyId":"{RSA_ARN}","Signature":"?","SigningAlgorithm":"RSASSA_PKCS1_V1_5_SHA_256"}}"#)),
            "not base64",
        ),
        (Fault::OtherAlgorithm, "RSASSA_PSS_SHA_512"),
        (Fault::Endless, "more than"),
    ] {
        let scene = Scene::set().await;
        let error = rsa_error(&scene, [fault.clone()]).await;
        assert!(matches!(error, Error::BadResponse { .. }) && error.to_string().contains(part), "{fault:?}: {error}");
        assert!(!error.to_string().contains("guest"), "{error}");
    }
}

#[tokio::test]
async fn refusals_say_what_an_administrator_has_to_do() {
    for (fault, part, cure) in [
        (Fault::error(400, "AccessDeniedException"), "AccessDeniedException: as the test has it (request 0a1b2c)", "kms:Sign"),
        (Fault::error(400, "NotFoundException"), "no such key, alias or version at http", "name, region"),
        (Fault::error(400, "InvalidKeyUsageException"), "cannot be used for Sign", "asymmetric signing key"),
        (Fault::error(400, "ValidationException"), "did not understand Sign", "correct"),
        (Fault::error(302, ""), "did not understand Sign: HTTP 302", "correct"),
        (Fault::OtherArn(EC_ARN), EC_ARN, "alias was moved"),
    ] {
        let scene = Scene::set().await;
        let error = rsa_error(&scene, [fault.clone()]).await;
        let Verdict::Refuse { cure: said } = error.verdict() else { panic!("{fault:?}: {error}") };
        assert!(error.to_string().contains(part) && said.contains(cure), "{fault:?}: {error}: {said}");
        assert_eq!(scene.kms.requests(), ["Sign"], "{fault:?}");
    }
}

#[tokio::test]
async fn the_state_of_a_key_says_whether_it_passes() {
    for (state, part) in [
        ("Disabled", Some("DisabledException")),
        ("PendingDeletion", Some("going to be deleted on 2027-01-15T08:00:00Z")),
        ("PendingImport", Some("PendingImport")),
        ("Unavailable", None),
        ("Updating", None),
    ] {
        let scene = Scene::set().await;
        let key = scene.opened("alias/rsa").await;
        scene.kms.set_state(state);
        for error in [key.sign(Algorithm::RsaPkcs1Sha256, &DIGEST).await.unwrap_err(), scene.open("alias/rsa").await.unwrap_err()]
        {
            match part {
                Some(_) => assert!(matches!(error, Error::KeyUnusable { .. }), "{error}"),
                None => assert_eq!(error.verdict(), Verdict::TRANSIENT, "{error}"),
            }
        }
        let error = key.sign(Algorithm::RsaPkcs1Sha256, &DIGEST).await.unwrap_err().to_string();
        assert!(error.contains(part.unwrap_or(state)), "{error}");
    }
}

#[tokio::test]
async fn opening_checks_what_the_key_is_for_and_that_the_answers_agree() {
    let scene = Scene::set().await;
    scene.kms.set_usage("KEY_AGREEMENT");
    let error = scene.open("alias/rsa").await.unwrap_err();
    assert!(matches!(error, Error::KeyUnusable { .. }) && error.to_string().contains("KEY_AGREEMENT"), "{error}");
    scene.kms.set_usage("SIGN_VERIFY");

    let error = scene.open("alias/nobody").await.unwrap_err();
    assert!(matches!(error, Error::NotFound { .. }), "{error}");

    // An alias that moves between the two questions passes; a key id that is answered with another key does not.
    scene.kms.then([Fault::OtherArn(EC_ARN)]);
    assert_eq!(scene.open("alias/rsa").await.unwrap_err().verdict(), Verdict::TRANSIENT);
    scene.kms.then([Fault::OtherArn(EC_ARN), Fault::OtherArn(EC_ARN)]);
    let error = scene.open("rsa").await.unwrap_err();
    assert!(matches!(error, Error::BadResponse { .. }), "{error}");
}

#[tokio::test]
async fn a_public_key_that_cannot_be_used_or_is_of_another_kind_is_refused() {
    let scene = Scene::set().await;
    let described = |spec: &str| {
        let metadata = format!(r#"{{"Arn":"{RSA_ARN}","KeyState":"Enabled","KeyUsage":"SIGN_VERIFY","KeySpec":"{spec}"}}"#);
        Fault::Says(format!(r#"{{"KeyMetadata":{metadata}}}"#))
    };
    let public = |key: &str| Fault::Says(format!(r#"{{"KeyId":"{RSA_ARN}","PublicKey":"{key}"}}"#));
    let p256 = "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE";
    scene.kms.then([described("RSA_3072")]);
    assert!(matches!(scene.open("alias/rsa").await, Err(Error::BadResponse { .. })));
    scene.kms.then([described("SYMMETRIC_DEFAULT"), public("AAAA")]);
    assert!(matches!(scene.open("alias/rsa").await, Err(Error::PublicKey { .. })));
    scene.kms.then([described("RSA_2048"), public("?")]);
    assert!(matches!(scene.open("alias/rsa").await, Err(Error::BadResponse { .. })));
    scene.kms.then([described("RSA_2048"), public(p256)]);
    assert!(matches!(scene.open("alias/rsa").await, Err(Error::PublicKey { .. })));
}

#[tokio::test]
async fn signatures_that_no_verifier_would_take_are_asked_for_once_more_and_then_refused() {
    for (fault, algorithm) in [
        (Fault::WrongKey, Algorithm::RsaPkcs1Sha256),
        (Fault::WrongKey, Algorithm::RsaPssSha256),
        (Fault::DoubleHash, Algorithm::RsaPkcs1Sha256),
        (Fault::DoubleHash, Algorithm::RsaPssSha256),
        (Fault::MaximumSalt, Algorithm::RsaPssSha256),
    ] {
        let scene = Scene::set().await;
        let witness = scene.witness("alias/rsa").await;
        scene.kms.then([fault.clone()]);
        witness.sign(algorithm, &DIGEST).await.unwrap();
        assert_eq!(scene.kms.requests(), ["Sign"; 2], "{fault:?}");
        scene.kms.then([fault.clone(), fault.clone()]);
        let error = witness.sign(algorithm, &DIGEST).await.unwrap_err();
        assert!(matches!(error, Error::BadSignature { .. }), "{fault:?}: {error}");
        assert_eq!(scene.kms.requests(), ["Sign"; 2], "{fault:?}");
    }
}

#[tokio::test]
async fn an_expired_token_is_read_anew_and_asked_with_once() {
    let scene = Scene::set().await;
    scene.write_credentials(ACCESS_KEY, SECRET_KEY, Some("token-1"));
    scene.kms.set_token("token-1");
    let key = scene.opened("alias/rsa").await;
    // The token is rotated on disk and at the KMS.
    scene.kms.set_token("token-2");
    scene.write_credentials(ACCESS_KEY, SECRET_KEY, Some("token-2"));
    key.sign(Algorithm::RsaPkcs1Sha256, &DIGEST).await.unwrap();
    assert_eq!(scene.kms.requests(), ["Sign"; 2]);
    // And then at the KMS alone.
    scene.kms.set_token("token-3");
    let error = key.sign(Algorithm::RsaPkcs1Sha256, &DIGEST).await.unwrap_err();
    assert!(matches!(error, Error::Credentials { .. }), "{error}");
    assert!(matches!(error.verdict(), Verdict::Refuse { .. }));
    assert_eq!(scene.kms.requests(), ["Sign"; 2]);

    let scene = Scene::set().await;
    let key = scene.opened("alias/rsa").await;
    scene.kms.then([Fault::error(400, "ExpiredTokenException")]);
    key.sign(Algorithm::RsaPkcs1Sha256, &DIGEST).await.unwrap();
}

#[tokio::test]
async fn a_wrong_secret_is_said_and_what_the_kms_repeats_of_the_request_is_not() {
    let scene = Scene::set().await;
    scene.write_credentials(ACCESS_KEY, "not-the-secret", Some("a-session-token"));
    scene.kms.set_token("a-session-token");
    let error = scene.open("alias/rsa").await.unwrap_err();
    assert!(matches!(error, Error::Credentials { .. }) && error.to_string().contains("wrongly signed"), "{error}");
    for secret in ["not-the-secret", "a-session-token"] {
        assert!(!format!("{error} {error:?}").contains(secret), "{error:?}");
    }

    let echo = Fault::Error { status: 400, code: "Strange", message: "you sent a-session-token", retry_after: None };
    scene.kms.then([echo]);
    let error = scene.open("alias/rsa").await.unwrap_err();
    assert!(error.to_string().contains("you sent <redacted>"), "{error}");
}

#[tokio::test]
async fn a_wrong_clock_is_set_by_the_kms_once_and_stays_set() {
    for minutes in [10, -10, 60 * 24 * 400] {
        let scene = Scene::set().await;
        scene.kms.set_ahead(SignedDuration::from_mins(minutes));
        let key = scene.open("alias/rsa").await.unwrap();
        assert_eq!(scene.kms.requests(), ["DescribeKey", "DescribeKey", "GetPublicKey"]);
        key.sign(Algorithm::RsaPkcs1Sha256, &DIGEST).await.unwrap();
        assert_eq!(scene.kms.requests(), ["Sign"]);
        // Somebody sets the machine's clock right.
        if minutes > 0 {
            scene.hand.advance(Duration::from_secs(u64::try_from(minutes).unwrap() * 60));
            key.sign(Algorithm::RsaPkcs1Sha256, &DIGEST).await.unwrap();
            assert_eq!(scene.kms.requests(), ["Sign"; 2]);
        }
    }
}

#[tokio::test]
async fn a_kms_that_complains_of_the_time_without_reason_is_asked_once() {
    let scene = Scene::set().await;
    let complaint = Fault::Error {
        status: 400,
        code: "InvalidSignatureException",
        message: "Signature expired: - 5 min.",
        retry_after: None,
    };
    let error = rsa_error(&scene, [complaint]).await;
    assert_eq!(error.verdict(), Verdict::TRANSIENT, "{error}");
    assert_eq!(scene.kms.requests(), ["Sign"]);
}

#[tokio::test]
async fn no_more_than_sixteen_calls_of_a_witness_are_under_way_at_once() {
    let scene = Scene::set().await;
    let witness = scene.witness("alias/ec").await;
    scene.kms.set_delay(Duration::from_millis(300));
    let signed = join_all((0..64).map(|_| witness.sign(Algorithm::EcdsaSha256, &DIGEST))).await;
    assert!(signed.iter().all(Result::is_ok));
    assert_eq!(scene.kms.most_under_way(), 16);
}

#[tokio::test]
async fn a_dry_run_tells_what_a_signature_would_and_makes_none() {
    let scene = Scene::set().await;
    let witness = scene.witness("alias/ec").await;
    scene.kms.requests();
    assert_eq!(witness.probe(Algorithm::EcdsaSha256).await.unwrap(), Probed::DryRun);
    assert_eq!(scene.kms.requests(), ["Sign"]);
    scene.kms.set_state("Disabled");
    let error = witness.probe(Algorithm::EcdsaSha256).await.unwrap_err();
    assert!(matches!(error, Error::KeyUnusable { .. }), "{error}");
    // A signature is never asked for so, and an answer as if it had been is none.
    scene.kms.set_state("Enabled");
    scene.kms.then([Fault::Error { status: 412, code: "DryRunOperationException", message: "dry", retry_after: None }]);
    let error = witness.sign(Algorithm::EcdsaSha256, &DIGEST).await;
    assert!(error.is_ok(), "a garbled answer is asked for once more: {error:?}");
}

#[tokio::test]
async fn the_kms_verifies_where_it_is_asked_to() {
    let scene = Scene::set().await;
    for (name, algorithm) in [("alias/rsa", Algorithm::RsaPkcs1Sha256), ("alias/ec", Algorithm::EcdsaSha256)] {
        let key = scene.opened(name).await;
        let signature = key.sign(algorithm, &DIGEST).await.unwrap();
        assert_eq!(key.verify(algorithm, &DIGEST, signature.as_ref()).await.unwrap(), Some(true));
        assert_eq!(key.verify(algorithm, &[8; 32], signature.as_ref()).await.unwrap(), Some(false));
        assert_eq!(scene.kms.requests(), ["Sign", "Verify", "Verify"]);
        scene.kms.then([Fault::OtherArn("arn:aws:kms:us-east-1:000000000000:key/other")]);
        let error = key.verify(algorithm, &DIGEST, signature.as_ref()).await.unwrap_err();
        assert!(matches!(error, Error::KeyChanged { .. }), "{error}");
        scene.kms.requests();
    }
}

#[tokio::test]
async fn without_credentials_nothing_is_sent() {
    let scene = Scene::set().await;
    fs::remove_file(scene.credentials_file()).unwrap();
    let error = scene.open("alias/rsa").await.unwrap_err();
    assert!(matches!(error, Error::Credentials { .. }), "{error}");
    assert!(error.to_string().contains("metadata is switched off"), "{error}");
    assert!(error.to_string().contains(scene.credentials_file().to_str().unwrap()), "{error}");
    assert!(scene.kms.requests().is_empty());
}
