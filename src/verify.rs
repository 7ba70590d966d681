//! Signatures in, `Verified` or the reason out. The pipeline, the command line and admission share this one road.
//!
//! A claim is what a stored artifact says. None of it is believed before the signature over it verifies under a key of
//! a configured witness; what the payload then says is compared with what was asked for.

mod image;
pub mod notation;

use std::fmt;

use bytes::Bytes;
use jiff::Timestamp;
use serde::Serialize;

use crate::{
    kms::{Algorithm, KeySpec, PublicKey},
    oci::{Digest, Reference},
    signature::{
        self as format,
        cosign::{Layer, Statement},
    },
    witness::{Signed, Standing, TrustedKeys, Witness},
};

pub use image::{Examination, Examined, Judgement, examine};

/// A witness, and the public keys whose signatures count as its own.
#[derive(Debug, Clone, Copy)]
pub struct Trust<'a> {
    pub witness: &'a str,
    pub keys: &'a TrustedKeys,
}

/// What is asked for: this digest, and what it is approved as.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// The digest that must have been signed.
    pub digest: Digest,
    /// As the user names the image. Its tag, if it has one, must be the one that was signed.
    pub reference: Reference,
}

/// A signature that stands: by whom, over what. Only [`signature`] and [`fresh`] make it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verified {
    witness: String,
    /// SHA-256 of the key's `SubjectPublicKeyInfo`, lower-case hex.
    key: String,
    reference: String,
    #[serde(skip)]
    layer: Layer,
}

impl Verified {
    pub fn witness(&self) -> &str {
        &self.witness
    }

    pub fn key_fingerprint(&self) -> &str {
        &self.key
    }

    /// The reference that was signed.
    pub fn reference(&self) -> &str {
        &self.reference
    }

    pub fn layer(&self) -> &Layer {
        &self.layer
    }

    /// The SHA-256 of what was signed and the signature over it, for a KMS to verify once more by [`cosign_algorithm`].
    pub fn evidence(&self) -> Option<([u8; 32], &[u8])> {
        Some((self.layer.payload_sha256()?, self.layer.signature()))
    }
}

/// Why a signature does not count.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    #[error("no key of the witnesses asked for made this signature")]
    UnknownKey,
    #[error("its payload is missing from the registry or has other bytes than its digest says")]
    NoPayload,
    #[error("its payload is none that verifiers take: {0}")]
    Malformed(String),
    #[error("it approves another digest, {0}")]
    OtherDigest(Digest),
    #[error("it approves the image as {0}")]
    OtherReference(String),
    #[error("witness {witness} trusted its key only until {until}")]
    Expired { witness: String, until: Timestamp },
    #[error("witness {witness} revoked its key on {at}: {reason}")]
    Revoked { witness: String, at: Timestamp, reason: String },
    #[error("it is none of notation's signatures that count: {0}")]
    NotNotation(format::notation::Error),
    #[error("it names the certificate sha256:{thumbprint}, which is none of witness {witness}'s")]
    OtherCertificate { witness: String, thumbprint: String },
    #[error("its certificate is valid only from {not_before} to {not_after}")]
    CertificateInvalid { not_before: Timestamp, not_after: Timestamp },
    #[error("it counted until {0}")]
    Over(Timestamp),
}

impl Rejection {
    /// The word for JSON output.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::UnknownKey => "unknown_key",
            Self::NoPayload => "no_payload",
            Self::Malformed(_) | Self::NotNotation(_) => "malformed",
            Self::OtherDigest(_) => "other_digest",
            Self::OtherReference(_) => "other_reference",
            Self::Expired { .. } => "expired",
            Self::Revoked { .. } => "revoked",
            Self::OtherCertificate { .. } => "other_certificate",
            Self::CertificateInvalid { .. } => "certificate_invalid",
            Self::Over(_) => "signature_expired",
        }
    }
}

impl Serialize for Rejection {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// How signatures in the `cosign` format are made with a key of this kind: what every verifier of a PEM key takes.
#[must_use]
pub fn cosign_algorithm(spec: KeySpec) -> Algorithm {
    match spec {
        KeySpec::Rsa2048 | KeySpec::Rsa3072 | KeySpec::Rsa4096 => Algorithm::RsaPkcs1Sha256,
        KeySpec::EcP256 => Algorithm::EcdsaSha256,
    }
}

/// Who made a layer's signature, and whether the key still counts.
#[derive(Debug, Clone)]
pub struct Signer<'a> {
    pub witness: &'a str,
    pub key: &'a PublicKey,
    pub standing: Standing,
}

/// The key that made this layer's signature, whether it still counts or not. Needs no payload: the layer names it by its
/// SHA-256, which is what was signed.
#[must_use]
pub fn signer<'a>(layer: &Layer, trusts: &[Trust<'a>], now: Timestamp) -> Option<Signer<'a>> {
    let hash = layer.payload_sha256()?;
    let keys = trusts
        .iter()
        .flat_map(|trust| trust.keys.standings(now).map(|(key, standing)| Signer { witness: trust.witness, key, standing }));
    let mut made_it = keys.filter(|signer| is_signed_by(signer.key, &hash, layer.signature()));
    // One key may be several witnesses': a witness for whom it counts comes first.
    let first = made_it.next()?;
    if first.standing == Standing::Counts {
        Some(first)
    } else {
        Some(made_it.find(|signer| signer.standing == Standing::Counts).unwrap_or(first))
    }
}

/// Whether `signature` is this key's, over this SHA-256, as the `cosign` format has it.
#[must_use]
pub fn is_signed_by(key: &PublicKey, payload_sha256: &[u8; 32], signature: &[u8]) -> bool {
    key.verify(cosign_algorithm(key.spec()), payload_sha256, signature).is_ok()
}

/// Judges one signature. `payload` are the bytes of the layer's blob; None if they could not be had.
///
/// Signatures carry no time that could be trusted, so a key that was revoked or has run out counts for none of them,
/// older ones included.
pub fn signature(
    layer: &Layer,
    payload: Option<&Bytes>,
    wanted: &Wanted,
    trusts: &[Trust<'_>],
    now: Timestamp,
) -> Result<Verified, Rejection> {
    let signer = signer(layer, trusts, now).ok_or(Rejection::UnknownKey)?;
    judge(signer, layer, payload, wanted)
}

/// The same for a signature that `witness` has just made: it was verified then, and is not again.
pub fn fresh(
    layer: &Layer,
    payload: &Bytes,
    wanted: &Wanted,
    witness: &Witness,
    signed: &Signed,
    now: Timestamp,
) -> Result<Verified, Rejection> {
    let key = witness.public_key();
    let hash = layer.payload_sha256().ok_or(Rejection::UnknownKey)?;
    let standing = witness.trusted_keys().standing(key, now).ok_or(Rejection::UnknownKey)?;
    if !signed.is(cosign_algorithm(key.spec()), &hash, layer.signature()) {
        return Err(Rejection::UnknownKey);
    }
    judge(Signer { witness: witness.name(), key, standing }, layer, Some(payload), wanted)
}

/// Whether what the signer said is what was asked for, and the signer may still say it.
fn judge(signer: Signer<'_>, layer: &Layer, payload: Option<&Bytes>, wanted: &Wanted) -> Result<Verified, Rejection> {
    let payload = payload.filter(|payload| layer.payload().matches(payload)).ok_or(Rejection::NoPayload)?;
    let statement = Statement::read(payload).map_err(Rejection::Malformed)?;
    if statement.digest != wanted.digest {
        return Err(Rejection::OtherDigest(statement.digest));
    }
    let witness = signer.witness.to_owned();
    match signer.standing {
        Standing::Counts => {}
        Standing::Ended { until } => return Err(Rejection::Expired { witness, until }),
        Standing::Revoked { since, reason } => return Err(Rejection::Revoked { witness, at: since, reason }),
    }
    // Last, because some policies take a signature of the digest under any name: all else about it has to be right.
    if !approves(&statement, wanted) {
        return Err(Rejection::OtherReference(statement.reference));
    }
    let key = signer.key.fingerprint().to_owned();
    Ok(Verified { witness, key, reference: statement.reference, layer: layer.clone() })
}

/// Whether a signed reference approves the image under the name that was asked for.
///
/// - `host/repo:tag` approves that tag, and the digest in that repository.
/// - `host/repo` (cosign's own) approves everything in that repository.
/// - `anything@digest` (signature type `simple`) approves the digest wherever it is: that is what the type is for.
fn approves(statement: &Statement, wanted: &Wanted) -> bool {
    let Ok(signed) = statement.reference.parse::<Reference>() else { return false };
    match (&signed.tag, &signed.digest) {
        (None, Some(digest)) => *digest == wanted.digest,
        (tag, digest) => {
            signed.registry == wanted.reference.registry
                && signed.repository == wanted.reference.repository
                && digest.as_ref().is_none_or(|digest| *digest == wanted.digest)
                && (tag.is_none() || wanted.reference.tag.is_none() || *tag == wanted.reference.tag)
        }
    }
}

impl fmt::Display for Verified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "signed by {} as {}", self.witness, self.reference)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        kms::KeyUri,
        signature::cosign::SignatureManifest,
        witness::{TrustedKeySettings, WitnessSettings},
    };

    const REFERENCE: &str = "registry.example.com/team/app:1.0";
    const IMAGE: &str = "sha256:e9b028cb7b49c4dae3dc661c2e147f3d78b9b4d1165c406256db92f18d4a0454";

    fn vector(folder: &str, file: &str) -> Vec<u8> {
        let path = format!("{}/tests/data/vectors/{folder}/{file}", env!("CARGO_MANIFEST_DIR"));
        std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    fn keys(name: &str, until: Option<&str>, revoked: Option<&str>) -> TrustedKeys {
        let settings = WitnessSettings {
            name: "release".into(),
            description: String::new(),
            key: "awskms:///alias/never-asked?region=eu-west-1".parse::<KeyUri>().unwrap(),
            login: None,
            verify: vec![TrustedKeySettings {
                pem: String::from_utf8(vector("keys", &format!("{name}.pub.pem"))).unwrap(),
                until: until.map(|until| until.parse().unwrap()),
                revoked: revoked.map(|at| (at.parse().unwrap(), "stolen".to_owned())),
            }],
            rate: None,
            pin: None,
        };
        TrustedKeys::offline(&settings).unwrap()
    }

    fn judge(folder: &str, keys: &TrustedKeys, reference: &str, digest: &str) -> Result<Verified, Rejection> {
        let manifest = SignatureManifest::read(crate::oci::media_type::OCI_MANIFEST, &vector(folder, "manifest.json")).unwrap();
        let wanted = Wanted { digest: digest.parse().unwrap(), reference: reference.parse().unwrap() };
        let payload = Bytes::from(vector(folder, "payload.json"));
        let now = "2026-11-21T09:00:00Z".parse().unwrap();
        signature(&manifest.layers()[0], Some(&payload), &wanted, &[Trust { witness: "release", keys }], now)
    }

    #[test]
    fn the_vectors_that_other_verifiers_accept_are_accepted_and_the_others_refused() {
        let (rsa, p256) = (keys("rsa2048", None, None), keys("p256", None, None));
        for (folder, keys) in [("A-rsa-pkcs1", &rsa), ("A-ecdsa-p256", &p256), ("A-repo-only-rsa-pkcs1", &rsa)] {
            let verified = judge(folder, keys, REFERENCE, IMAGE).unwrap_or_else(|rejection| panic!("{folder}: {rejection}"));
            assert_eq!(verified.witness(), "release");
        }
        for (folder, expected) in [
            ("A-rsa-pss", "unknown_key"),
            ("A-ecdsa-p256", "unknown_key"),
            ("A-tampered-signature", "unknown_key"),
            ("A-wrong-digest", "other_digest"),
        ] {
            assert_eq!(judge(folder, &rsa, REFERENCE, IMAGE).unwrap_err().name(), expected, "{folder}");
        }
        assert!(judge("A-tampered-payload", &rsa, REFERENCE, IMAGE).is_err());
    }

    #[test]
    fn a_signature_counts_only_for_the_reference_that_was_signed() {
        let rsa = keys("rsa2048", None, None);
        let name = "registry.example.com/team/app";
        for (asked, stands) in [
            (format!("{name}:1.0"), true),
            (format!("{name}@{IMAGE}"), true),
            (format!("{name}:1.0@{IMAGE}"), true),
            (format!("{name}:latest"), false),
            (format!("{name}:latest@{IMAGE}"), false),
            ("registry.example.com/other/app:1.0".to_owned(), false),
            (format!("mirror.example.com/team/app@{IMAGE}"), false),
        ] {
            let judged = judge("A-rsa-pkcs1", &rsa, &asked, IMAGE);
            assert_eq!(judged.is_ok(), stands, "{asked}: {judged:?}");
        }
        assert!(judge("A-repo-only-rsa-pkcs1", &rsa, &format!("{name}:any"), IMAGE).is_ok());
    }

    #[test]
    fn a_simple_signature_counts_wherever_the_digest_is() {
        let wanted = |reference: &str| Wanted { digest: IMAGE.parse().unwrap(), reference: reference.parse().unwrap() };
        let statement = |reference: String| Statement { reference, digest: IMAGE.parse().unwrap() };
        let simple = statement(format!("registry.example.com/team/app@{IMAGE}"));
        assert!(approves(&simple, &wanted("mirror.example.com/copy:any")));
        let other = statement(format!("registry.example.com/team/app@sha256:{}", "0".repeat(64)));
        assert!(!approves(&other, &wanted("registry.example.com/team/app:1.0")));
    }

    #[test]
    fn keys_that_ran_out_or_were_revoked_count_for_nothing() {
        let past = Some("2026-11-20T00:00:00Z");
        let future = Some("2027-01-01T00:00:00Z");
        let name = |keys: &TrustedKeys| judge("A-rsa-pkcs1", keys, REFERENCE, IMAGE).map_err(|rejection| rejection.name());
        assert!(name(&keys("rsa2048", future, None)).is_ok());
        assert_eq!(name(&keys("rsa2048", past, None)).unwrap_err(), "expired");
        assert_eq!(name(&keys("rsa2048", None, past)).unwrap_err(), "revoked");
        assert!(name(&keys("rsa2048", None, future)).is_ok());
    }

    #[tokio::test]
    async fn a_fresh_signature_stands_for_what_was_signed_and_for_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("key.pem");
        crate::kms::generate(KeySpec::EcP256, &file).unwrap();
        let settings = WitnessSettings {
            name: "release".into(),
            description: String::new(),
            key: format!("file://{}", file.display()).parse().unwrap(),
            login: None,
            verify: vec![],
            rate: None,
            pin: None,
        };
        let witness = Witness::open(&settings, crate::clock::Clock::system()).await.unwrap();
        let image = vector("image", "manifest.json");
        let subject = crate::subject::Subject::in_test(REFERENCE, &image);
        let prepared = crate::signature::cosign::Prepared::new(&subject, &REFERENCE.parse().unwrap());
        let payload = prepared.payload().clone();
        let wanted = Wanted { digest: IMAGE.parse().unwrap(), reference: REFERENCE.parse().unwrap() };
        let signed = witness.sign(Algorithm::EcdsaSha256, prepared.payload_sha256()).await.unwrap();
        let other = witness.sign(Algorithm::EcdsaSha256, &[7; 32]).await.unwrap();
        let layer = prepared.assemble(signed.raw());
        let judge = |layer: &Layer, payload: &Bytes, wanted: &Wanted, signed: &Signed| {
            fresh(layer, payload, wanted, &witness, signed, Timestamp::UNIX_EPOCH).map(|verified| verified.reference().to_owned())
        };
        assert_eq!(judge(&layer, &payload, &wanted, &signed), Ok(REFERENCE.to_owned()));
        assert_eq!(judge(&layer, &payload, &wanted, &other), Err(Rejection::UnknownKey));
        assert_eq!(judge(&prepared.assemble(other.raw()), &payload, &wanted, &signed), Err(Rejection::UnknownKey));
        assert_eq!(judge(&layer, &Bytes::from_static(b"{}"), &wanted, &signed), Err(Rejection::NoPayload));
        let elsewhere = Wanted { digest: Digest::of(b"elsewhere"), ..wanted.clone() };
        assert!(matches!(judge(&layer, &payload, &elsewhere, &signed), Err(Rejection::OtherDigest(_))));
    }

    #[test]
    fn a_payload_that_is_not_what_was_signed_does_not_count() {
        let manifest =
            SignatureManifest::read(crate::oci::media_type::OCI_MANIFEST, &vector("A-rsa-pkcs1", "manifest.json")).unwrap();
        let keys = keys("rsa2048", None, None);
        let wanted = Wanted { digest: IMAGE.parse().unwrap(), reference: REFERENCE.parse().unwrap() };
        for payload in [None, Some(Bytes::from_static(b"{}"))] {
            let trusts = [Trust { witness: "release", keys: &keys }];
            let judged = signature(&manifest.layers()[0], payload.as_ref(), &wanted, &trusts, Timestamp::UNIX_EPOCH);
            assert_eq!(judged, Err(Rejection::NoPayload));
        }
    }
}
