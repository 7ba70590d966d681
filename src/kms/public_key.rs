use std::{fmt, str::FromStr, sync::Arc};

use aws_lc_rs::{
    digest::{Digest, SHA256},
    encoding::AsDer,
    signature::{
        ECDSA_P256_SHA256_ASN1, ParsedPublicKey, RSA_PKCS1_2048_8192_SHA256, RSA_PSS_2048_8192_SHA256, VerificationAlgorithm,
    },
};
use rsa::{
    BigUint, RsaPublicKey,
    pkcs8::{
        Document, EncodePublicKey, ObjectIdentifier, SubjectPublicKeyInfoRef,
        der::pem::{LineEnding, PemLabel},
    },
    traits::PublicKeyParts,
};

use super::Algorithm;

/// The kinds of key that sign here, by the names of the command line and of AWS (`EC_P256` apart, which AWS calls `ECC_NIST_P256`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KeySpec {
    Rsa2048,
    Rsa3072,
    Rsa4096,
    EcP256,
}

impl KeySpec {
    pub const ALL: [Self; 4] = [Self::Rsa2048, Self::Rsa3072, Self::Rsa4096, Self::EcP256];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Rsa2048 => "RSA_2048",
            Self::Rsa3072 => "RSA_3072",
            Self::Rsa4096 => "RSA_4096",
            Self::EcP256 => "EC_P256",
        }
    }

    /// Whether a key of this kind can sign with this algorithm.
    #[must_use]
    pub fn supports(self, algorithm: Algorithm) -> bool {
        match self {
            Self::Rsa2048 | Self::Rsa3072 | Self::Rsa4096 => {
                matches!(algorithm, Algorithm::RsaPkcs1Sha256 | Algorithm::RsaPssSha256)
            }
            Self::EcP256 => algorithm == Algorithm::EcdsaSha256,
        }
    }
}

impl fmt::Display for KeySpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for KeySpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|spec| spec.name() == text)
            .ok_or_else(|| format!("{text:?} is no kind of key: use one of {}", Self::ALL.map(Self::name).join(", ")))
    }
}

/// A public key that signatures are checked with: RSA of 2048, 3072 or 4096 bits, or P-256. Nothing else can be one.
/// Parsed once; cloning is cheap.
#[derive(Clone)]
pub struct PublicKey(Arc<Parsed>);

struct Parsed {
    spki: Vec<u8>,
    spec: KeySpec,
    fingerprint: String,
    verifiers: Verifiers,
}

enum Verifiers {
    Rsa { pkcs1: ParsedPublicKey, pss: ParsedPublicKey },
    P256(ParsedPublicKey),
}

/// Why bytes are no public key that can be used here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PublicKeyError {
    #[error("it is not PEM: a public key begins with `-----BEGIN PUBLIC KEY-----`")]
    NotPem,
    #[error("it is a PEM file of {label}, not of a PUBLIC KEY: {cure}")]
    WrongLabel { label: String, cure: &'static str },
    #[error("what is between its BEGIN and END lines is damaged, or something follows it")]
    Damaged,
    #[error("what it holds is no SubjectPublicKeyInfo in DER (RFC 5280 section 4.1.2.7)")]
    NotSpki,
    #[error("it is a {0} key: only RSA keys of 2048, 3072 or 4096 bits and P-256 keys can be used")]
    Unsupported(String),
    #[error("its numbers are not those of a valid {0} key")]
    Invalid(&'static str),
}

/// Why a signature does not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    #[error("a key of kind {spec} makes no {algorithm} signatures")]
    WrongAlgorithm { spec: KeySpec, algorithm: Algorithm },
    #[error("the signature was not made with this key over these bytes")]
    Mismatch,
}

const RSA_ENCRYPTION: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
const RSASSA_PSS: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.10");
const EC_PUBLIC_KEY: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");
const PRIME256V1: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.3.1.7");

impl PublicKey {
    /// Reads a PEM file's text with the label `PUBLIC KEY` (RFC 7468 section 13).
    pub fn from_pem(pem: &str) -> Result<Self, PublicKeyError> {
        let pem = pem.trim();
        let label = pem_label(pem).ok_or(PublicKeyError::NotPem)?;
        if label != SubjectPublicKeyInfoRef::PEM_LABEL {
            return Err(PublicKeyError::WrongLabel { label: label.to_owned(), cure: cure_for(label) });
        }
        let (_, document) = Document::from_pem(pem).map_err(|_| PublicKeyError::Damaged)?;
        Self::from_spki_der(document.as_bytes())
    }

    /// Reads a `SubjectPublicKeyInfo` in DER.
    pub fn from_spki_der(der: &[u8]) -> Result<Self, PublicKeyError> {
        let info = SubjectPublicKeyInfoRef::try_from(der).map_err(|_| PublicKeyError::NotSpki)?;
        let spec = match info.algorithm.oid {
            RSA_ENCRYPTION => rsa_spec(info)?,
            EC_PUBLIC_KEY => match info.algorithm.parameters_oid() {
                Ok(PRIME256V1) => KeySpec::EcP256,
                Ok(curve) => return Err(PublicKeyError::Unsupported(format!("elliptic curve ({curve})"))),
                Err(_) => return Err(PublicKeyError::Invalid("elliptic curve")),
            },
            RSASSA_PSS => {
                return Err(PublicKeyError::Unsupported(
                    "RSASSA-PSS-only RSA (the plain rsaEncryption kind signs PSS too)".into(),
                ));
            }
            other => return Err(PublicKeyError::Unsupported(other.to_string())),
        };
        let parse = |algorithm: &'static dyn VerificationAlgorithm| {
            ParsedPublicKey::new(algorithm, der).map_err(|_| PublicKeyError::Invalid(spec.name()))
        };
        let (verifiers, encoded) = if spec == KeySpec::EcP256 {
            let key = parse(&ECDSA_P256_SHA256_ASN1)?;
            let encoded = key.as_der();
            (Verifiers::P256(key), encoded)
        } else {
            let (pkcs1, pss) = (parse(&RSA_PKCS1_2048_8192_SHA256)?, parse(&RSA_PSS_2048_8192_SHA256)?);
            let encoded = pkcs1.as_der();
            (Verifiers::Rsa { pkcs1, pss }, encoded)
        };
        // One key has one fingerprint, so the encoding is ours and not what came in.
        let spki = encoded.map_err(|_| PublicKeyError::Invalid(spec.name()))?.as_ref().to_vec();
        let fingerprint = hex::encode(aws_lc_rs::digest::digest(&SHA256, &spki));
        Ok(Self(Arc::new(Parsed { spki, spec, fingerprint, verifiers })))
    }

    /// An RSA key by its modulus and public exponent, each big-endian.
    pub fn from_rsa(modulus: &[u8], exponent: &[u8]) -> Result<Self, PublicKeyError> {
        let (modulus, exponent) = (BigUint::from_bytes_be(modulus), BigUint::from_bytes_be(exponent));
        let key = RsaPublicKey::new(modulus, exponent)
            .map_err(|_| PublicKeyError::Unsupported("RSA (larger than 4096 bits, or with broken numbers)".into()))?;
        let der = key.to_public_key_der().map_err(|_| PublicKeyError::Invalid("RSA"))?;
        Self::from_spki_der(der.as_bytes())
    }

    /// A P-256 key by the coordinates of its point, 32 bytes each, big-endian.
    pub fn from_p256(x: &[u8], y: &[u8]) -> Result<Self, PublicKeyError> {
        // The SubjectPublicKeyInfo of a P-256 key (RFC 5480 section 2) up to the coordinates of an uncompressed point.
        const HEAD: [u8; 27] =
            *b"\x30\x59\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07\x03\x42\x00\x04";
        if x.len() != 32 || y.len() != 32 {
            return Err(PublicKeyError::Invalid(KeySpec::EcP256.name()));
        }
        Self::from_spki_der(&[&HEAD, x, y].concat())
    }

    /// The key as `SubjectPublicKeyInfo` in DER.
    #[must_use]
    pub fn spki_der(&self) -> &[u8] {
        &self.0.spki
    }

    /// The key as a PEM file's text, as `cosign verify --key` and OpenSSL take it.
    #[must_use]
    pub fn to_pem(&self) -> String {
        Document::try_from(self.spki_der())
            .and_then(|document| document.to_pem(SubjectPublicKeyInfoRef::PEM_LABEL, LineEnding::LF))
            .expect("the DER was encoded by this process and is far below PEM's limits")
    }

    /// Lower-case hex of the SHA-256 of [`Self::spki_der`].
    #[must_use]
    pub fn fingerprint(&self) -> &str {
        &self.0.fingerprint
    }

    #[must_use]
    pub fn spec(&self) -> KeySpec {
        self.0.spec
    }

    #[must_use]
    pub fn supports(&self, algorithm: Algorithm) -> bool {
        self.spec().supports(algorithm)
    }

    /// Checks a signature over a SHA-256 digest (the caller has hashed). PSS needs a salt of exactly 32 bytes.
    pub fn verify(&self, algorithm: Algorithm, digest: &[u8; 32], signature: &[u8]) -> Result<(), VerifyError> {
        let key = match (&self.0.verifiers, algorithm) {
            (Verifiers::Rsa { pkcs1, .. }, Algorithm::RsaPkcs1Sha256) => pkcs1,
            (Verifiers::Rsa { pss, .. }, Algorithm::RsaPssSha256) => pss,
            (Verifiers::P256(key), Algorithm::EcdsaSha256) => key,
            _ => return Err(VerifyError::WrongAlgorithm { spec: self.spec(), algorithm }),
        };
        key.verify_digest_sig(&import(digest), signature).map_err(|_| VerifyError::Mismatch)
    }
}

/// Hands a finished digest to aws-lc.
pub(super) fn import(digest: &[u8; 32]) -> Digest {
    Digest::import_less_safe(digest, &SHA256).expect("a SHA-256 digest has 32 bytes")
}

fn rsa_spec(info: SubjectPublicKeyInfoRef<'_>) -> Result<KeySpec, PublicKeyError> {
    let key = RsaPublicKey::try_from(info)
        .map_err(|_| PublicKeyError::Unsupported("RSA (larger than 4096 bits, or with broken numbers)".into()))?;
    match key.n().bits() {
        2048 => Ok(KeySpec::Rsa2048),
        3072 => Ok(KeySpec::Rsa3072),
        4096 => Ok(KeySpec::Rsa4096),
        bits => Err(PublicKeyError::Unsupported(format!("{bits}-bit RSA"))),
    }
}

/// The label of the first PEM block in a text.
pub(super) fn pem_label(text: &str) -> Option<&str> {
    let (_, rest) = text.split_once("-----BEGIN ")?;
    let (label, _) = rest.split_once("-----")?;
    (label.len() <= 64 && label.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b' ')).then_some(label)
}

fn cure_for(label: &str) -> &'static str {
    if label.ends_with("PRIVATE KEY") {
        "keep it secret, and take the public half with `openssl pkey -in KEY -pubout`"
    } else if label == "CERTIFICATE" {
        "take the key out of it with `openssl x509 -in CERTIFICATE -noout -pubkey`"
    } else if label == "RSA PUBLIC KEY" {
        "convert it with `openssl rsa -RSAPublicKey_in -in KEY -pubout`"
    } else {
        "write the key out with `openssl pkey -pubin -in KEY -pubout`"
    }
}

impl PartialEq for PublicKey {
    fn eq(&self, other: &Self) -> bool {
        self.spki_der() == other.spki_der()
    }
}

impl Eq for PublicKey {}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({} sha256:{})", self.spec(), self.fingerprint())
    }
}

#[cfg(test)]
mod tests {
    use base64::{Engine, prelude::BASE64_STANDARD};

    use rsa::pkcs8::DecodePublicKey;

    use super::*;

    const RSA: &str = include_str!("../../tests/data/vectors/keys/rsa2048.pub.pem");
    const P256: &str = include_str!("../../tests/data/vectors/keys/p256.pub.pem");

    fn digest(text: &str) -> [u8; 32] {
        hex::decode(text.trim()).unwrap().try_into().unwrap()
    }

    fn decoded(base64: &str) -> Vec<u8> {
        BASE64_STANDARD.decode(base64.trim()).unwrap()
    }

    macro_rules! vector {
        ($name:literal) => {
            (
                digest(include_str!(concat!("../../tests/data/vectors/", $name, "/payload.sha256.hex"))),
                decoded(include_str!(concat!("../../tests/data/vectors/", $name, "/signature.b64"))),
            )
        };
    }

    #[test]
    fn reads_the_keys_that_openssl_writes_and_writes_them_back() {
        for (pem, spec) in [(RSA, KeySpec::Rsa2048), (P256, KeySpec::EcP256)] {
            let key = PublicKey::from_pem(pem).unwrap();
            assert_eq!(key.spec(), spec);
            assert_eq!(key.to_pem(), pem);
            assert_eq!(PublicKey::from_spki_der(key.spki_der()).unwrap(), key);
            assert_eq!(key.fingerprint(), hex::encode(aws_lc_rs::digest::digest(&SHA256, key.spki_der())));
        }
    }

    #[test]
    fn pem_with_windows_line_ends_and_text_around_it_is_the_same_key() {
        let dressed = format!("subject=release\r\n{}\r\n\r\n", RSA.trim().replace('\n', "\r\n"));
        assert_eq!(PublicKey::from_pem(&dressed).unwrap(), PublicKey::from_pem(RSA).unwrap());
    }

    #[test]
    fn the_vectors_verify_with_their_own_algorithm_only() {
        let (rsa, p256) = (PublicKey::from_pem(RSA).unwrap(), PublicKey::from_pem(P256).unwrap());
        for (key, algorithm, (digest, signature)) in [
            (&rsa, Algorithm::RsaPkcs1Sha256, vector!("A-rsa-pkcs1")),
            (&rsa, Algorithm::RsaPssSha256, vector!("A-rsa-pss")),
            (&p256, Algorithm::EcdsaSha256, vector!("A-ecdsa-p256")),
        ] {
            assert_eq!(key.verify(algorithm, &digest, &signature), Ok(()));
            for other in Algorithm::ALL.into_iter().filter(|other| *other != algorithm) {
                assert!(key.verify(other, &digest, &signature).is_err(), "{algorithm} passed for {other}");
            }
            let mut wrong_digest = digest;
            wrong_digest[0] ^= 1;
            assert_eq!(key.verify(algorithm, &wrong_digest, &signature), Err(VerifyError::Mismatch));
            assert_eq!(key.verify(algorithm, &digest, &signature[1..]), Err(VerifyError::Mismatch));
            assert_eq!(key.verify(algorithm, &digest, &[signature.as_slice(), &[0]].concat()), Err(VerifyError::Mismatch));
            assert_eq!(key.verify(algorithm, &digest, &[]), Err(VerifyError::Mismatch));
        }
        let (digest, signature) = vector!("A-tampered-signature");
        assert_eq!(rsa.verify(Algorithm::RsaPkcs1Sha256, &digest, &signature), Err(VerifyError::Mismatch));
    }

    #[test]
    fn other_pem_files_are_named_with_a_way_out() {
        for (pem, part) in [
            (include_str!("../../tests/data/vectors/keys/p256.key.pem"), "keep it secret"),
            (include_str!("../../tests/data/vectors/keys/p256.notation.crt.pem"), "openssl x509"),
            ("-----BEGIN RSA PUBLIC KEY-----\nAAAA\n-----END RSA PUBLIC KEY-----\n", "-RSAPublicKey_in"),
            ("ssh-rsa AAAA", "not PEM"),
            ("", "not PEM"),
            ("-----BEGIN PUBLIC KEY-----\n????\n-----END PUBLIC KEY-----\n", "damaged"),
            (&RSA[..200], "damaged"),
            (&format!("{RSA}{P256}"), "something follows"),
            ("-----BEGIN PUBLIC KEY-----\nMAA=\n-----END PUBLIC KEY-----\n", "SubjectPublicKeyInfo"),
        ] {
            let error = PublicKey::from_pem(pem).unwrap_err().to_string();
            assert!(error.contains(part), "{error:?} does not say {part:?}");
        }
    }

    #[test]
    fn bytes_after_or_missing_from_the_key_are_refused() {
        for pem in [RSA, P256] {
            let der = PublicKey::from_pem(pem).unwrap().spki_der().to_vec();
            assert!(PublicKey::from_spki_der(&[der.as_slice(), &[0]].concat()).is_err());
            for length in 0..der.len() {
                assert!(PublicKey::from_spki_der(&der[..length]).is_err());
            }
        }
    }

    #[test]
    fn a_point_off_the_curve_is_refused() {
        let mut der = PublicKey::from_pem(P256).unwrap().spki_der().to_vec();
        *der.last_mut().unwrap() ^= 1;
        assert_eq!(PublicKey::from_spki_der(&der), Err(PublicKeyError::Invalid("EC_P256")));
    }

    #[test]
    fn keys_are_made_of_their_numbers() {
        let rsa = PublicKey::from_pem(RSA).unwrap();
        let numbers = RsaPublicKey::from_public_key_der(rsa.spki_der()).unwrap();
        let (modulus, exponent) = (numbers.n().to_bytes_be(), numbers.e().to_bytes_be());
        assert_eq!(PublicKey::from_rsa(&modulus, &exponent), Ok(rsa));
        assert!(PublicKey::from_rsa(&modulus[..128], &exponent).is_err(), "1024 bits");
        assert!(PublicKey::from_rsa(&modulus, &[]).is_err() && PublicKey::from_rsa(&[], &exponent).is_err());

        let p256 = PublicKey::from_pem(P256).unwrap();
        let (x, y) = p256.spki_der()[27..].split_at(32);
        assert_eq!(PublicKey::from_p256(x, y).unwrap(), p256);
        assert!(PublicKey::from_p256(y, x).is_err(), "off the curve");
        assert!(PublicKey::from_p256(x, &y[1..]).is_err() && PublicKey::from_p256(&[], &[]).is_err());
    }

    #[test]
    fn other_encodings_are_the_same_key_and_other_keys_are_refused_by_their_kind() {
        let openssl = |arguments: &[&str], input: &str| {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("in.pem");
            std::fs::write(&path, input).unwrap();
            let output = std::process::Command::new("openssl").args(arguments).arg("-in").arg(path).output();
            String::from_utf8(output.expect("these tests need the openssl command").stdout).unwrap()
        };
        let compressed = openssl(&["ec", "-pubin", "-pubout", "-conv_form", "compressed"], P256);
        assert_ne!(compressed, P256);
        assert_eq!(PublicKey::from_pem(&compressed).unwrap().to_pem(), P256);

        for (arguments, part) in [
            (["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"].as_slice(), "1.3.132.0.34"),
            (&["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-pkeyopt", "ec_param_enc:explicit"], "elliptic curve"),
            (&["-algorithm", "ED25519"], "1.3.101.112"),
            (&["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:1024"], "1024-bit RSA"),
            (&["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2056"], "2056-bit RSA"),
            (&["-algorithm", "RSA-PSS", "-pkeyopt", "rsa_keygen_bits:2048"], "RSASSA-PSS-only"),
        ] {
            let private = std::process::Command::new("openssl").arg("genpkey").args(arguments).output().unwrap().stdout;
            let public = openssl(&["pkey", "-pubout"], &String::from_utf8(private).unwrap());
            let error = PublicKey::from_pem(&public).unwrap_err().to_string();
            assert!(error.contains(part), "{arguments:?}: {error}");
        }
    }

    #[test]
    fn names_parse_back() {
        for spec in KeySpec::ALL {
            assert_eq!(spec.to_string().parse(), Ok(spec));
        }
        assert!("RSA_1024".parse::<KeySpec>().unwrap_err().contains("RSA_2048"));
    }
}
