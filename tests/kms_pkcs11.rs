//! Keys behind a PKCS#11 module: SoftHSM, and the same behind a proxy that fails where it is told to. A module sees its tokens
//! once in a process, so each test runs in one of its own.
#![cfg(feature = "pkcs11")]

use std::{error::Error as _, sync::Arc, time::Duration};

use countersign::{
    clock::Clock,
    kms::{self, Algorithm, Environment, Error, Login, SecretSource, SigningKey},
    outcome::{Classify, Verdict},
};
use futures::future::join_all;
use integration_tests::{
    process::eventually,
    softhsm::{MODULE, PIN, SoftHsm},
};

const DIGEST: [u8; 32] = [7; 32];
const LIMIT: Duration = Duration::from_secs(60);

async fn open(uri: &str) -> Result<Arc<dyn SigningKey>, Error> {
    kms::open_in(&uri.parse().unwrap(), None, Clock::system(), &Environment::of([])).await
}

async fn open_with(uri: &str, pin: SecretSource) -> Result<Arc<dyn SigningKey>, Error> {
    let environment = Environment::of([("PIN", PIN)]);
    kms::open_in(&uri.parse().unwrap(), Some(&Login::Secret(pin)), Clock::system(), &environment).await
}

async fn signs(key: &dyn SigningKey) -> Result<(), Error> {
    let algorithm = Algorithm::ALL.into_iter().find(|algorithm| key.public_key().supports(*algorithm)).unwrap();
    let signature = key.sign(algorithm, &DIGEST).await?;
    assert_eq!(key.public_key().verify(algorithm, &DIGEST, signature.as_ref()), Ok(()));
    Ok(())
}

fn refused(error: &Error) -> bool {
    matches!(error.verdict(), Verdict::Refuse { .. })
}

/// All that it says, which is never the PIN.
fn told(error: &Error) -> String {
    let told = format!("{error}: {}", error.source().map(ToString::to_string).unwrap_or_default());
    assert!(!format!("{told} {error:?}").contains(PIN), "{error:?}");
    told
}

/// A token with a P-256 key, and the key's reference behind the proxy.
fn proxied(hsm: &SoftHsm) -> String {
    hsm.key("EC:prime256v1", "release", 1).unwrap();
    let uri = hsm.uri("release");
    uri.replace(MODULE, hsm.proxy().unwrap().to_str().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn many_sign_at_once_in_few_sessions_after_one_login() {
    let Some(hsm) = SoftHsm::inside("many_sign_at_once_in_few_sessions_after_one_login") else { return };
    hsm.key("rsa:2048", "rsa", 2).unwrap();
    let uri = proxied(&hsm);
    let (p256, rsa) = (open(&uri).await.unwrap(), open(&uri.replace("release", "rsa")).await.unwrap());
    let again = open(&uri).await.unwrap();
    let all = (0..300).map(|number| {
        signs(if number % 3 == 0 {
            &*rsa
        } else if number % 3 == 1 {
            &*p256
        } else {
            &*again
        })
    });
    for signed in join_all(all).await {
        signed.unwrap();
    }
    let sessions = hsm.calls("C_OpenSession").unwrap();
    assert!((4..=18).contains(&sessions), "{sessions} sessions for two keys");
    assert_eq!((hsm.calls("C_Initialize").unwrap(), hsm.calls("C_Login").unwrap()), (1, 1));
}

#[tokio::test]
async fn a_token_that_is_taken_out_and_put_back_signs_again() {
    let Some(hsm) = SoftHsm::inside("a_token_that_is_taken_out_and_put_back_signs_again") else { return };
    hsm.key("EC:prime256v1", "release", 1).unwrap();
    let key = open(&hsm.uri("release")).await.unwrap();
    for _ in 0..2 {
        signs(&*key).await.unwrap();
        hsm.take_out().unwrap();
        let error = signs(&*key).await.unwrap_err();
        assert!(matches!(error.verdict(), Verdict::Retry { .. }), "{}", told(&error));
        let error = open(&hsm.uri("release")).await.unwrap_err();
        assert!(matches!(error.verdict(), Verdict::Retry { .. }), "{}", told(&error));
        hsm.put_back().unwrap();
        signs(&*key).await.unwrap();
        signs(&*open(&hsm.uri("release")).await.unwrap()).await.unwrap();
    }
}

#[tokio::test]
async fn a_lost_session_is_opened_again_and_the_caller_sees_nothing_of_it() {
    let Some(hsm) = SoftHsm::inside("a_lost_session_is_opened_again_and_the_caller_sees_nothing_of_it") else { return };
    let key = open(&proxied(&hsm)).await.unwrap();
    // SESSION_HANDLE_INVALID, SESSION_CLOSED, DEVICE_REMOVED, DEVICE_ERROR, TOKEN_NOT_PRESENT, USER_NOT_LOGGED_IN, KEY_HANDLE_INVALID
    for code in ["b3", "b0", "32", "30", "e0", "101", "60"] {
        for call in ["C_SignInit", "C_Sign"] {
            let before = hsm.calls("C_OpenSession").unwrap();
            hsm.fault(call, &format!("once {code}")).unwrap();
            signs(&*key).await.unwrap();
            assert_eq!(hsm.calls("C_OpenSession").unwrap(), before + 1, "{call} {code}");
            // What lasts goes to the caller after the second time, and signs when it is over.
            hsm.fault(call, code).unwrap();
            let error = signs(&*key).await.unwrap_err();
            assert!(matches!(error.verdict(), Verdict::Retry { .. }), "{call} {code}: {}", told(&error));
            hsm.mend(call).unwrap();
            signs(&*key).await.unwrap();
        }
    }
    // No second time makes these better.
    for (code, part) in [("70", "CKR_MECHANISM_INVALID"), ("68", "CKR_KEY_FUNCTION_NOT_PERMITTED")] {
        let before = hsm.calls("C_SignInit").unwrap();
        hsm.fault("C_SignInit", code).unwrap();
        let error = signs(&*key).await.unwrap_err();
        assert!(refused(&error) && told(&error).contains(part), "{}", told(&error));
        assert_eq!(hsm.calls("C_SignInit").unwrap(), before + 1);
        hsm.mend("C_SignInit").unwrap();
    }
    hsm.fault("C_OpenSession", "b1").unwrap();
    let error = signs(&*key).await.unwrap_err();
    assert!(matches!(error.verdict(), Verdict::Retry { .. }) && told(&error).contains("CKR_SESSION_COUNT"), "{}", told(&error));
    hsm.mend("C_OpenSession").unwrap();
    signs(&*key).await.unwrap();
}

#[tokio::test]
async fn a_wrong_pin_is_tried_once_and_never_again() {
    let Some(hsm) = SoftHsm::inside("a_wrong_pin_is_tried_once_and_never_again") else { return };
    let uri = proxied(&hsm);
    hsm.write_pin("hunter2").unwrap();
    for attempt in 0..5 {
        let error = open(&uri).await.unwrap_err();
        assert!(matches!(error, Error::Credentials { .. }) && refused(&error), "{}", told(&error));
        let part = if attempt == 0 { "refuses the PIN in" } else { "is not tried again" };
        assert!(told(&error).contains(part) && told(&error).contains(hsm.pin().to_str().unwrap()), "{}", told(&error));
        assert!(!told(&error).contains("hunter2"));
    }
    // Nor under another name of the key.
    assert!(open(&uri.replace("object=release", "id=%01")).await.is_err());
    assert_eq!(hsm.calls("C_Login").unwrap(), 1);

    // One that is locked or about to be is not tried, right or not: CKF_USER_PIN_FINAL_TRY, CKF_USER_PIN_LOCKED.
    hsm.write_pin(PIN).unwrap();
    for (flags, part) in [("20000", "would lock"), ("40000", "is locked")] {
        hsm.fault("flags", flags).unwrap();
        let error = open(&uri).await.unwrap_err();
        assert!(refused(&error) && told(&error).contains(part), "{}", told(&error));
        hsm.mend("flags").unwrap();
    }
    assert_eq!(hsm.calls("C_Login").unwrap(), 1);
    signs(&*open(&uri).await.unwrap()).await.unwrap();
    assert_eq!(hsm.calls("C_Login").unwrap(), 2);
}

#[tokio::test]
async fn a_login_that_fails_is_not_repeated_at_once() {
    let Some(hsm) = SoftHsm::inside("a_login_that_fails_is_not_repeated_at_once") else { return };
    let uri = proxied(&hsm);
    hsm.fault("C_Login", "a4").unwrap();
    let error = open(&uri).await.unwrap_err();
    assert!(matches!(error, Error::Credentials { .. }) && told(&error).contains("CKR_PIN_LOCKED"), "{}", told(&error));
    assert_eq!(hsm.calls("C_Login").unwrap(), 1);
    // DEVICE_ERROR, GENERAL_ERROR: some tokens mean a wrong PIN by it.
    for (calls, code) in [(2, "30"), (3, "5")] {
        hsm.fault("C_Login", code).unwrap();
        let error = open(&uri).await.unwrap_err();
        assert!(matches!(error.verdict(), Verdict::Retry { .. }), "{}", told(&error));
        assert_eq!(hsm.calls("C_Login").unwrap(), calls);
    }
    hsm.mend("C_Login").unwrap();
    signs(&*open(&uri).await.unwrap()).await.unwrap();
}

#[tokio::test]
async fn a_pin_comes_from_a_file_a_variable_or_the_reference_and_from_one_of_them() {
    let Some(hsm) = SoftHsm::inside("a_pin_comes_from_a_file_a_variable_or_the_reference_and_from_one_of_them") else { return };
    hsm.key("EC:prime256v1", "release", 1).unwrap();
    let uri = hsm.uri_without_pin("release");
    let error = open(&uri).await.unwrap_err();
    assert!(refused(&error) && told(&error).contains("give the witness `pin = {"), "{}", told(&error));
    let error = open_with(&hsm.uri("release"), SecretSource::Given(PIN.into())).await.unwrap_err();
    assert!(refused(&error) && told(&error).contains("one of the two"), "{}", told(&error));
    let error = open_with(&uri, SecretSource::Variable("NOBODY".into())).await.unwrap_err();
    assert!(refused(&error) && told(&error).contains("NOBODY is not set"), "{}", told(&error));
    for pin in [SecretSource::Variable("PIN".into()), SecretSource::File(hsm.pin()), SecretSource::Given(PIN.into())] {
        // When its last session is gone, the token has forgotten who was there.
        signs(&*open_with(&uri, pin).await.unwrap()).await.unwrap();
    }
    signs(&*open(&format!("{uri}&pin-value={PIN}")).await.unwrap()).await.unwrap();
}

#[tokio::test]
async fn a_module_that_hangs_is_given_up_and_asked_again_when_it_answers() {
    let Some(hsm) = SoftHsm::inside("a_module_that_hangs_is_given_up_and_asked_again_when_it_answers") else { return };
    let uri = proxied(&hsm);
    let key = open(&uri).await.unwrap();
    hsm.fault("C_Sign", "hang").unwrap();
    // Nothing else runs here, so time passes at once.
    tokio::time::pause();
    for hanging in 1..=8 {
        let error = signs(&*key).await.unwrap_err();
        assert!(matches!(error, Error::Unreachable { .. }), "{}", told(&error));
        assert!(told(&error).contains(&format!("{hanging} of its 8 sessions hang")), "{}", told(&error));
        assert_eq!(key.stuck_threads(), Some(hanging));
    }
    for _ in 0..20 {
        let error = signs(&*key).await.unwrap_err();
        assert!(told(&error).contains("all its 8 sessions hang"), "{}", told(&error));
        assert!(open(&uri).await.is_err());
    }
    tokio::time::resume();
    let threads = std::fs::read_dir("/proc/self/task").unwrap().count();
    assert!(threads < 8 + 20, "{threads} threads");
    hsm.mend("C_Sign").unwrap();
    eventually("the module answers again", LIMIT, async || Ok(signs(&*key).await.ok())).await.unwrap();
}

#[tokio::test]
async fn what_cannot_be_found_or_used_is_said_with_the_cure() {
    let Some(hsm) = SoftHsm::inside("what_cannot_be_found_or_used_is_said_with_the_cure") else { return };
    hsm.token("spare").unwrap();
    for (kind, label, id) in [
        ("EC:prime256v1", "release", 1),
        ("EC:prime256v1", "twice", 2),
        ("EC:prime256v1", "twice", 3),
        ("EC:secp384r1", "p384", 4),
    ] {
        hsm.key(kind, label, id).unwrap();
    }
    let uri = hsm.uri("release");
    for (from, to, refuse, part) in [
        ("token=images", "token=nobody", false, "\"images\" (serial "),
        ("token=images", "manufacturer=SoftHSM%20project", true, "2 tokens fit: add serial="),
        ("object=release", "object=nobody", true, "no private key that fits"),
        ("object=release", "object=release;id=%02", true, "no private key that fits"),
        ("object=release", "object=twice", true, "add id="),
        ("object=release", "object=p384", true, "public key cannot be used"),
        (MODULE, "/nonexistent/module.so", true, "/nonexistent/module.so cannot be used"),
        (MODULE, "/etc/passwd", true, "its module cannot be loaded"),
        (&format!("module-path={MODULE}"), "module-name=nobody", true, "there is no libnobody.so or nobody.so in "),
    ] {
        let error = open(&uri.replace(from, to)).await.unwrap_err();
        assert!(refused(&error) == refuse && told(&error).contains(part), "{to}: {}", told(&error));
    }
    for (from, to) in [
        ("object=release", "id=%01"),
        ("object=release", "object=twice;id=%03"),
        ("token=images", "token=images;manufacturer=SoftHSM%20project;model=SoftHSM%20v2"),
        (&format!("module-path={MODULE}"), "module-name=softhsm2"),
    ] {
        signs(&*open(&uri.replace(from, to)).await.unwrap()).await.unwrap();
    }
}

#[tokio::test]
async fn the_public_half_comes_from_wherever_it_is() {
    let Some(hsm) = SoftHsm::inside("the_public_half_comes_from_wherever_it_is") else { return };
    for (kind, label, id) in [("rsa:2048", "rsa", 1), ("EC:prime256v1", "ec", 2)] {
        hsm.key(kind, label, id).unwrap();
    }
    let (rsa, ec) = (open(&hsm.uri("rsa")).await.unwrap(), open(&hsm.uri("ec")).await.unwrap());
    for id in ["01", "02"] {
        hsm.tool(&["--delete-object", "--type", "pubkey", "--id", id]).unwrap();
    }
    // An RSA key's private object has the modulus and the exponent, but verifies nothing.
    let found = open(&hsm.uri("rsa")).await.unwrap();
    assert_eq!(found.public_key(), rsa.public_key());
    assert_eq!(found.verify(Algorithm::RsaPkcs1Sha256, &DIGEST, &[7; 256]).await.unwrap(), None);
    let error = open(&hsm.uri("ec")).await.unwrap_err();
    assert!(refused(&error) && told(&error).contains("import the public key or a certificate"), "{}", told(&error));
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("public.pem"), ec.public_key().to_pem()).unwrap();
    let openssl = |arguments: &[&str]| {
        let output = std::process::Command::new("openssl").args(arguments).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    openssl(&["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", &path("ca.pem")]);
    openssl(&["req", "-new", "-key", &path("ca.pem"), "-subj", "/CN=release", "-out", &path("request.pem")]);
    openssl(&[
        "x509",
        "-req",
        "-in",
        &path("request.pem"),
        "-signkey",
        &path("ca.pem"),
        "-force_pubkey",
        &path("public.pem"),
        "-outform",
        "DER",
        "-out",
        &path("certificate.der"),
    ]);
    hsm.tool(&["--write-object", &path("certificate.der"), "--type", "cert", "--id", "02", "--label", "ec"]).unwrap();
    let found = open(&hsm.uri("ec")).await.unwrap();
    assert_eq!(found.public_key(), ec.public_key());
    signs(&*found).await.unwrap();
}
