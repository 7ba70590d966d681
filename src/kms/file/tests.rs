use std::process::Command;

use rsa::{
    pkcs8::DecodePublicKey,
    sha2::{Digest as _, Sha256},
    signature::hazmat::PrehashVerifier,
};
use tempfile::TempDir;

use super::*;
use crate::kms::VerifyError;

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
    let error = FileKey::open(&path).unwrap_err();
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
        let key = FileKey::open(&path).unwrap();
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
    let key = FileKey::open(&write(&folder, RSA, 0o600)).unwrap();
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
        FileKey::open(&write(&folder, P256, mode)).unwrap();
    }
}

#[test]
fn what_is_no_pkcs8_private_key_is_refused_with_a_way_out() {
    let block = |label: &str, body: &str| format!("-----BEGIN {label}-----\n{body}\n-----END {label}-----\n");
    for (text, part) in [
        (include_str!("../../../tests/data/vectors/keys/rsa2048.pub.pem").to_owned(), "it is a public key"),
        (block("RSA PRIVATE KEY", "AAAA"), "openssl pkcs8 -topk8 -nocrypt"),
        (block("RSA PRIVATE KEY", "Proc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00\n\nAAAA"), "not supported yet"),
        (block("EC PARAMETERS", "BggqhkjOPQMBBw=="), "openssl pkcs8 -topk8 -nocrypt"),
        (block("EC PRIVATE KEY", "AAAA"), "openssl pkcs8 -topk8 -nocrypt"),
        (block("ENCRYPTED PRIVATE KEY", "AAAA"), "not supported yet"),
        (block("ENCRYPTED SIGSTORE PRIVATE KEY", "AAAA"), "not supported yet"),
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
        let error = FileKey::open(&path).unwrap_err().to_string();
        assert!(error.contains(part), "{arguments:?}: {error}");
    }
}

#[test]
fn a_missing_file_a_folder_and_a_pipe_are_refused_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let missing = FileKey::open(&folder.path().join("missing.pem")).unwrap_err();
    assert!(matches!(missing, Error::File { .. }), "{missing}");
    let error = FileKey::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("not a file"), "{error}");
    let pipe = folder.path().join("pipe");
    assert!(Command::new("mkfifo").arg("-m600").arg(&pipe).status().unwrap().success());
    let error = FileKey::open(&pipe).unwrap_err().to_string();
    assert!(error.contains("not a file"), "{error}");
}

#[test]
fn debug_shows_no_private_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(&folder, P256, 0o600);
    let shown = format!("{:?}", FileKey::open(&path).unwrap());
    assert!(shown.contains("EC_P256") && shown.len() < 400, "{shown}");
}
