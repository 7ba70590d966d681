//! The keys that it has.

use std::sync::LazyLock;

use aws_lc_rs::{
    digest::{Digest as Hashed, SHA256},
    encoding::{AsDer, PublicKeyX509Der},
    rsa::KeySize,
    signature::{
        ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair, ParsedPublicKey,
        RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_SHA256, RSA_PSS_2048_8192_SHA256, RSA_PSS_SHA256, RsaEncoding, RsaKeyPair,
        VerificationAlgorithm,
    },
};
use base64::{Engine, prelude::BASE64_STANDARD};

use super::{Refusal, refuse};

pub(super) enum Pair {
    Rsa(RsaKeyPair),
    Ec(EcdsaKeyPair),
}

pub(super) static RSA: LazyLock<Pair> = LazyLock::new(|| {
    let der = der(include_str!("../../../tests/data/vectors/keys/rsa2048.key.pem"));
    Pair::Rsa(RsaKeyPair::from_pkcs8(&der).expect("the file holds an RSA key"))
});
pub(super) static EC: LazyLock<Pair> = LazyLock::new(|| {
    let der = der(include_str!("../../../tests/data/vectors/keys/p256.key.pem"));
    Pair::Ec(EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &der).expect("the file holds a P-256 key"))
});
/// The material of the old version.
pub(super) static FORMER: LazyLock<Pair> =
    LazyLock::new(|| Pair::Rsa(RsaKeyPair::generate(KeySize::Rsa2048).expect("a key can be made")));

fn der(pem: &str) -> Vec<u8> {
    let base64: String = pem.lines().filter(|line| !line.starts_with('-')).collect();
    BASE64_STANDARD.decode(base64).expect("PEM holds base64")
}

impl Pair {
    pub(super) fn public_pem(&self) -> String {
        let der: PublicKeyX509Der<'_> = match self {
            Self::Rsa(pair) => pair.public_key().as_der(),
            Self::Ec(pair) => pair.public_key().as_der(),
        }
        .expect("a public key can be encoded");
        let base64 = BASE64_STANDARD.encode(der.as_ref());
        let lines: Vec<_> = base64.as_bytes().chunks(64).map(String::from_utf8_lossy).collect();
        format!("-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n", lines.join("\n"))
    }
}

pub(super) fn verifies(pair: &Pair, algorithm: &str, digest: &[u8; 32], value: &[u8]) -> Result<bool, Refusal> {
    let hashed = Hashed::import_less_safe(digest, &SHA256).expect("it is 32 bytes");
    let (algorithm, der): (&'static dyn VerificationAlgorithm, PublicKeyX509Der<'_>) = match (algorithm, pair) {
        ("RSA_PSS_SHA_256", Pair::Rsa(pair)) => (&RSA_PSS_2048_8192_SHA256, pair.public_key().as_der().unwrap()),
        ("RSA_PKCS1_SHA_256", Pair::Rsa(pair)) => (&RSA_PKCS1_2048_8192_SHA256, pair.public_key().as_der().unwrap()),
        ("ECDSA_SHA_256", Pair::Ec(pair)) => (&ECDSA_P256_SHA256_ASN1, pair.public_key().as_der().unwrap()),
        _ => return refuse(400, "InvalidParameter", "The specified parameter Algorithm is not valid."),
    };
    let key = ParsedPublicKey::new(algorithm, der.as_ref()).expect("it is a key");
    Ok(key.verify_digest_sig(&hashed, value).is_ok())
}

pub(super) fn sign(pair: &Pair, algorithm: &str, digest: &[u8; 32]) -> Result<Vec<u8>, Refusal> {
    let hashed = Hashed::import_less_safe(digest, &SHA256).expect("it is 32 bytes");
    let padding: &'static dyn RsaEncoding = match (algorithm, pair) {
        ("RSA_PSS_SHA_256", Pair::Rsa(_)) => &RSA_PSS_SHA256,
        ("RSA_PKCS1_SHA_256", Pair::Rsa(_)) => &RSA_PKCS1_SHA256,
        ("ECDSA_SHA_256", Pair::Ec(pair)) => {
            return Ok(pair.sign_digest(&hashed).unwrap().as_ref().to_vec());
        }
        _ => return refuse(400, "InvalidParameter", "The specified parameter Algorithm is not valid."),
    };
    let Pair::Rsa(pair) = pair else { unreachable!("the algorithms of EC keys are above") };
    let mut signature = vec![0; pair.public_modulus_len()];
    pair.sign_digest(padding, &hashed, &mut signature).unwrap();
    Ok(signature)
}
