use std::{fs, os::unix::fs::PermissionsExt, process::Command};

use rsa::{
    pkcs8::DecodePublicKey,
    sha2::{Digest as _, Sha256},
    signature::hazmat::PrehashVerifier,
};
use tempfile::TempDir;

use super::*;
use crate::kms::{SecretSource, VerifyError};

const RSA: &str = include_str!("../../../tests/data/vectors/keys/rsa2048.key.pem");
const P256: &str = include_str!("../../../tests/data/vectors/keys/p256.key.pem");
const MESSAGE: &[u8] = b"hello manifest";

fn write(folder: &TempDir, text: &str, mode: u32) -> PathBuf {
    let path = folder.path().join(format!("{}.pem", fastrand::u64(..)));
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    path
}

fn refusal(text: &str, mode: u32) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = write(&folder, text, mode);
    let error = FileKey::open_with(&path, None).unwrap_err();
    assert!(error.to_string().contains(path.to_str().unwrap()), "{error} does not name the file");
    error.to_string()
}

fn verifies_with_the_rsa_crate(key: &PublicKey, algorithm: Algorithm, digest: &[u8; 32], signature: &[u8]) -> bool {
    let rsa = rsa::RsaPublicKey::from_public_key_der(key.spki_der()).unwrap();
    match algorithm {
        Algorithm::RsaPkcs1Sha256 => rsa::pkcs1v15::VerifyingKey::<Sha256>::new(rsa)
            .verify_prehash(digest, &rsa::pkcs1v15::Signature::try_from(signature).unwrap())
            .is_ok(),
        Algorithm::RsaPssSha256 => rsa::pss::VerifyingKey::<Sha256>::new_with_salt_len(rsa, 32)
            .verify_prehash(digest, &rsa::pss::Signature::try_from(signature).unwrap())
            .is_ok(),
        Algorithm::EcdsaSha256 => unreachable!("no RSA algorithm"),
    }
}

fn verifies_with_openssl(key: &PublicKey, algorithm: Algorithm, message: &[u8], signature: &[u8]) -> bool {
    let folder = tempfile::tempdir().unwrap();
    let [public, message_file, signature_file] = ["public.pem", "message", "signature"].map(|name| folder.path().join(name));
    fs::write(&public, key.to_pem()).unwrap();
    fs::write(&message_file, message).unwrap();
    fs::write(&signature_file, signature).unwrap();
    let mut openssl = Command::new("openssl");
    openssl.args(["dgst", "-sha256", "-verify"]).arg(public).arg("-signature").arg(signature_file);
    if algorithm == Algorithm::RsaPssSha256 {
        openssl.args(["-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:32"]);
    }
    openssl.arg(message_file).output().expect("these tests need the openssl command").status.success()
}

#[tokio::test]
async fn every_kind_of_generated_key_signs_and_others_verify() {
    let folder = tempfile::tempdir().unwrap();
    let digest: [u8; 32] = Sha256::digest(MESSAGE).into();
    let digest_of_digest: [u8; 32] = Sha256::digest(digest).into();
    for spec in KeySpec::ALL {
        let path = folder.path().join(spec.name());
        let public_key = generate(spec, &path).unwrap();
        assert_eq!(public_key.spec(), spec);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let key = FileKey::open_with(&path, None).unwrap();
        assert_eq!(key.public_key(), &public_key);
        for algorithm in Algorithm::ALL {
            let signed = key.sign(algorithm, &digest).await;
            if !spec.supports(algorithm) {
                assert!(matches!(signed, Err(Error::WrongAlgorithm { .. })), "{spec} {algorithm}");
                continue;
            }
            let signature = signed.unwrap();
            assert_eq!(public_key.verify(algorithm, &digest, signature.as_ref()), Ok(()), "{spec} {algorithm}");
            // The classic mistake of a KMS client: the digest hashed again.
            let mismatch = Err(VerifyError::Mismatch);
            assert_eq!(public_key.verify(algorithm, &digest_of_digest, signature.as_ref()), mismatch, "{spec} {algorithm}");
            if spec != KeySpec::EcP256 {
                assert!(verifies_with_the_rsa_crate(&public_key, algorithm, &digest, signature.as_ref()), "{spec} {algorithm}");
                assert!(!verifies_with_the_rsa_crate(&public_key, algorithm, &digest_of_digest, signature.as_ref()));
            }
            assert!(verifies_with_openssl(&public_key, algorithm, MESSAGE, signature.as_ref()), "{spec} {algorithm}");
            assert!(!verifies_with_openssl(&public_key, algorithm, &digest, signature.as_ref()), "{spec} {algorithm}");
        }
    }
}

#[test]
fn openssl_reads_a_generated_key() {
    let folder = tempfile::tempdir().unwrap();
    for spec in [KeySpec::Rsa2048, KeySpec::EcP256] {
        let path = folder.path().join(spec.name());
        let public_key = generate(spec, &path).unwrap();
        let output = Command::new("openssl").args(["pkey", "-pubout", "-in"]).arg(&path).output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), public_key.to_pem());
    }
}

#[tokio::test]
async fn pkcs1_signatures_are_the_vectors_to_the_byte() {
    use base64::{Engine, prelude::BASE64_STANDARD};
    let folder = tempfile::tempdir().unwrap();
    let key = FileKey::open_with(&write(&folder, RSA, 0o600), None).unwrap();
    let digest = hex::decode(include_str!("../../../tests/data/vectors/A-rsa-pkcs1/payload.sha256.hex").trim()).unwrap();
    let signature = key.sign(Algorithm::RsaPkcs1Sha256, &digest.try_into().unwrap()).await.unwrap();
    let expected = include_str!("../../../tests/data/vectors/A-rsa-pkcs1/signature.b64");
    assert_eq!(BASE64_STANDARD.encode(signature), expected.trim());
}

#[test]
fn a_key_is_never_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(&folder, RSA, 0o600);
    let error = generate(KeySpec::EcP256, &path).unwrap_err();
    assert!(error.to_string().contains("never overwritten"), "{error}");
    assert_eq!(fs::read_to_string(&path).unwrap(), RSA);
}

#[test]
fn a_key_that_others_can_reach_is_refused_with_the_command_that_helps() {
    for mode in [0o640, 0o604, 0o620, 0o602, 0o610, 0o601, 0o644, 0o777] {
        let refusal = refusal(RSA, mode);
        assert!(refusal.contains("chmod 600 /") && refusal.contains(&format!("{mode:04o}")), "{refusal}");
    }
    let folder = tempfile::tempdir().unwrap();
    for mode in [0o600, 0o400, 0o700] {
        FileKey::open_with(&write(&folder, P256, mode), None).unwrap();
    }
}

#[test]
fn what_is_no_pkcs8_private_key_is_refused_with_a_way_out() {
    let block = |label: &str, body: &str| format!("-----BEGIN {label}-----\n{body}\n-----END {label}-----\n");
    for (text, part) in [
        (include_str!("../../../tests/data/vectors/keys/rsa2048.pub.pem").to_owned(), "it is a public key"),
        (block("RSA PRIVATE KEY", "AAAA"), "openssl pkcs8 -topk8 -nocrypt"),
        (block("RSA PRIVATE KEY", "Proc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00\n\nAAAA"), "-topk8 -v2 aes-256-cbc"),
        (block("EC PARAMETERS", "BggqhkjOPQMBBw=="), "openssl pkcs8 -topk8 -nocrypt"),
        (block("EC PRIVATE KEY", "AAAA"), "openssl pkcs8 -topk8 -nocrypt"),
        (block("ENCRYPTED PRIVATE KEY", "AAAA"), "passphrase = { file"),
        (block("ENCRYPTED SIGSTORE PRIVATE KEY", "AAAA"), "cosign's own"),
        (block("OPENSSH PRIVATE KEY", "AAAA"), "not of a PRIVATE KEY"),
        (block("PRIVATE KEY", "AAAA"), "damaged"),
        (block("PRIVATE KEY", "MAA="), "neither an RSA nor a P-256"),
        (RSA.replace("-----END PRIVATE KEY-----", ""), "damaged"),
        (format!("{RSA}{P256}"), "damaged"),
        (String::new(), "not a PEM file"),
        ("0\u{82}".to_owned(), "not a PEM file"),
        ("x".repeat(70_000), "too large"),
    ] {
        let refusal = refusal(&text, 0o600);
        assert!(refusal.contains(part), "{refusal:?} does not say {part:?}");
        assert!(!refusal.contains("AAAA"));
    }
}

#[test]
fn keys_of_other_kinds_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    for (arguments, part) in [
        (["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"].as_slice(), "neither an RSA nor a P-256"),
        (["-algorithm", "ED25519"].as_slice(), "neither an RSA nor a P-256"),
        (["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2056"].as_slice(), "public key cannot be used"),
        (["-algorithm", "RSA-PSS", "-pkeyopt", "rsa_keygen_bits:2048"].as_slice(), "neither an RSA nor a P-256"),
    ] {
        let path = folder.path().join("other.pem");
        let status = Command::new("openssl").arg("genpkey").args(arguments).arg("-out").arg(&path).output().unwrap().status;
        assert!(status.success(), "{arguments:?}");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let error = FileKey::open_with(&path, None).unwrap_err().to_string();
        assert!(error.contains(part), "{arguments:?}: {error}");
    }
}

#[test]
fn a_missing_file_a_folder_and_a_pipe_are_refused_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let missing = FileKey::open_with(&folder.path().join("missing.pem"), None).unwrap_err();
    assert!(matches!(missing, Error::File { .. }), "{missing}");
    let error = FileKey::open_with(folder.path(), None).unwrap_err().to_string();
    assert!(error.contains("not a file"), "{error}");
    let pipe = folder.path().join("pipe");
    assert!(Command::new("mkfifo").arg("-m600").arg(&pipe).status().unwrap().success());
    let error = FileKey::open_with(&pipe, None).unwrap_err().to_string();
    assert!(error.contains("not a file"), "{error}");
}

const PASSPHRASE: &str = " correct horse ß ";

fn opened(path: &Path, passphrase: &str) -> Result<FileKey, Error> {
    FileKey::open_with(path, Some(&passphrase.into()))
}

/// Encrypts a key as OpenSSL does.
fn encrypted_by_openssl(folder: &TempDir, key: &str, arguments: &[&str]) -> PathBuf {
    let (plain, encrypted) = (write(folder, key, 0o600), folder.path().join(format!("{}.pem", fastrand::u64(..))));
    let mut openssl = Command::new("openssl");
    openssl.args(["pkcs8", "-topk8", "-passout", &format!("pass:{PASSPHRASE}"), "-in"]).arg(plain);
    let output = openssl.args(arguments).arg("-out").arg(&encrypted).output().expect("these tests need the openssl command");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    fs::set_permissions(&encrypted, fs::Permissions::from_mode(0o600)).unwrap();
    encrypted
}

#[test]
fn an_encrypted_key_is_one_that_openssl_reads() {
    let folder = tempfile::tempdir().unwrap();
    for spec in [KeySpec::Rsa2048, KeySpec::EcP256] {
        let path = folder.path().join(spec.name());
        let public_key = generate_encrypted(spec, &path, &PASSPHRASE.into()).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("-----BEGIN ENCRYPTED PRIVATE KEY-----"), "{text}");
        let passphrase = format!("pass:{PASSPHRASE}");
        let output =
            Command::new("openssl").args(["pkey", "-pubout", "-passin", &passphrase, "-in"]).arg(&path).output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), public_key.to_pem());
        assert_eq!(opened(&path, PASSPHRASE).unwrap().public_key(), &public_key);
    }
}

#[tokio::test]
async fn what_openssl_encrypted_signs() {
    let folder = tempfile::tempdir().unwrap();
    let digest = Sha256::digest(MESSAGE).into();
    for (key, algorithm) in [(RSA, Algorithm::RsaPssSha256), (P256, Algorithm::EcdsaSha256)] {
        for arguments in [
            ["-v2", "aes-256-cbc"].as_slice(),
            &["-v2", "aes-256-cbc", "-v2prf", "hmacWithSHA512", "-iter", "600000"],
            &["-v2", "aes-128-cbc"],
            &["-scrypt"],
        ] {
            let key = opened(&encrypted_by_openssl(&folder, key, arguments), PASSPHRASE).unwrap();
            let signature = key.sign(algorithm, &digest).await.unwrap();
            assert_eq!(key.public_key().verify(algorithm, &digest, signature.as_ref()), Ok(()), "{arguments:?}");
        }
    }
}

#[test]
fn a_passphrase_that_is_wrong_missing_or_too_much_is_said_and_never_shown() {
    let folder = tempfile::tempdir().unwrap();
    let encrypted = encrypted_by_openssl(&folder, P256, &["-v2", "aes-256-cbc", "-iter", "1"]);
    // About one in 256 of them leaves well-padded noise behind.
    for number in 0..300 {
        let error = opened(&encrypted, &format!("hunter{number}")).unwrap_err();
        assert!(error.to_string().contains("its passphrase is another one"), "{error}");
        assert!(!format!("{error:?}").contains("hunter"));
    }
    let error = FileKey::open_with(&encrypted, None).unwrap_err().to_string();
    assert!(error.contains("there is no passphrase for it"), "{error}");
    let error = opened(&write(&folder, P256, 0o600), "hunter2").unwrap_err().to_string();
    assert!(error.contains("remove `passphrase`") && !error.contains("hunter2"), "{error}");

    let given = |source| FileKey::open(&encrypted, Some(&Login::Secret(source)), &Environment::of([("PASSPHRASE", PASSPHRASE)]));
    let file = write(&folder, &format!("{PASSPHRASE}\r\n"), 0o600);
    given(SecretSource::File(file)).unwrap();
    given(SecretSource::Variable("PASSPHRASE".into())).unwrap();
    let error = given(SecretSource::Variable("NOBODY".into())).unwrap_err().to_string();
    assert!(error.contains("NOBODY is not set"), "{error}");
    let login = Login::Token { token: SecretSource::Given("hunter2".into()) };
    let error = FileKey::open(&encrypted, Some(&login), &Environment::of([])).unwrap_err().to_string();
    assert!(error.contains("takes a `passphrase`"), "{error}");
}

#[test]
fn ways_of_encryption_that_are_too_weak_or_cost_too_much_are_refused_with_the_command_that_helps() {
    let folder = tempfile::tempdir().unwrap();
    for (arguments, part) in [
        (["-v2", "aes-256-cbc", "-v2prf", "hmacWithSHA1"].as_slice(), "-v2prf hmacWithSHA256"),
        (&["-v2", "des3"], "-v2prf hmacWithSHA256"),
        (&["-v1", "PBE-SHA1-3DES"], "-v2prf hmacWithSHA256"),
        (&["-v2", "aes-256-cbc", "-iter", "10000001"], "too much time or memory"),
    ] {
        let error = opened(&encrypted_by_openssl(&folder, P256, arguments), PASSPHRASE).unwrap_err().to_string();
        assert!(error.contains(part), "{arguments:?}: {error}");
    }
    // A file that asks for all memory there is.
    let greedy = fs::read_to_string(encrypted_by_openssl(&folder, P256, &["-scrypt"])).unwrap();
    let (_, document) = SecretDocument::from_pem(&greedy).unwrap();
    let mut der = document.as_bytes().to_vec();
    // The cost (INTEGER 16384) and the block size (INTEGER 8) grow to 32767 and 127.
    let at = der.windows(10).position(|bytes| bytes[..7] == [2, 2, 0x40, 0, 2, 1, 8]).unwrap();
    der[at + 6] = 127;
    der[at + 2] = 0x7f;
    der[at + 3] = 0xff;
    let scrypt =
        SecretDocument::try_from(der.as_slice()).unwrap().to_pem("ENCRYPTED PRIVATE KEY", rsa::pkcs8::LineEnding::LF).unwrap();
    let error = opened(&write(&folder, &scrypt, 0o600), PASSPHRASE).unwrap_err().to_string();
    assert!(error.contains("too much time or memory"), "{error}");
}

#[test]
fn debug_shows_no_private_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(&folder, P256, 0o600);
    let shown = format!("{:?}", FileKey::open_with(&path, None).unwrap());
    assert!(shown.contains("EC_P256") && shown.len() < 400, "{shown}");
}
