//! Signatures in, `Verified` or the reason out. The pipeline, the command line and admission share this one road.
//!
//! A [`Claim`] is what a stored artifact says, whichever its format. None of it is believed before the signature over it verifies under a key of
//! a configured witness; what the payload then says is compared with what was asked for.

mod image;
pub mod notation;
mod stored;

use std::fmt;

use jiff::Timestamp;
use serde::Serialize;

use crate::{
    certificate::Chain,
    kms::{Algorithm, KeySpec, PublicKey},
    oci::{Digest, Reference},
    signature::{Artifact, Claim, Format, notation::Target},
    witness::{Signed, Standing, TrustedKeys, Witness},
};

pub use image::{Attestation, Depth, Examination, Examined, Judgement, Layout, examine};
pub(crate) use stored::{Referring, Stored, read_referrer};

/// A witness, and the public keys whose signatures count as its own.
#[derive(Debug, Clone, Copy)]
pub struct Trust<'a> {
    pub witness: &'a str,
    pub keys: &'a TrustedKeys,
    /// The certificates that are known of it. A notation signature must name one of those that there are for its key.
    pub certificates: &'a [Chain],
}

/// What is known of a witness without asking its KMS.
#[derive(Debug, Clone)]
pub struct Known {
    pub witness: String,
    pub keys: TrustedKeys,
    /// None may be known: then its keys decide alone.
    pub certificates: Vec<Chain>,
}

impl Known {
    #[must_use]
    pub fn trust(&self) -> Trust<'_> {
        Trust { witness: &self.witness, keys: &self.keys, certificates: &self.certificates }
    }
}

/// What is asked for: this digest, and what it is approved as.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// The manifest that must have been signed, as the registry serves it.
    pub manifest: Target,
    /// As the user names the image. Its tag, if it has one, must be the one that was signed.
    pub reference: Reference,
}

/// A signature that stands: by whom, over what. Only [`signature`] makes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verified {
    witness: String,
    /// SHA-256 of the key's `SubjectPublicKeyInfo`, lower-case hex.
    key: String,
    reference: Option<String>,
    /// Until then it stands, if nothing is revoked before.
    #[serde(skip_serializing_if = "Option::is_none")]
    until: Option<Timestamp>,
    #[serde(skip)]
    evidence: Evidence,
}

/// What a key signed, and how: for a KMS to verify once more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Evidence {
    pub algorithm: Algorithm,
    /// Of what was signed.
    pub sha256: [u8; 32],
    /// PKCS#1 or PSS octets, or an ASN.1 `ECDSA-Sig-Value`.
    pub signature: Vec<u8>,
}

impl Verified {
    pub fn witness(&self) -> &str {
        &self.witness
    }

    pub fn key_fingerprint(&self) -> &str {
        &self.key
    }

    /// The reference that was signed; None if the digest was signed alone, whatever it is called.
    pub fn reference(&self) -> Option<&str> {
        self.reference.as_deref()
    }

    /// When the signature stops to count by itself; None where the format does not tell, and its key decides alone.
    pub fn until(&self) -> Option<Timestamp> {
        self.until
    }

    pub fn evidence(&self) -> &Evidence {
        &self.evidence
    }
}

/// What may be written: an artifact whose signature was judged as it will be when it is read. Only [`fresh`] makes it.
#[derive(Debug, Clone)]
pub struct Fresh(Artifact);

impl Fresh {
    pub fn artifact(&self) -> &Artifact {
        &self.0
    }
}

/// Why a signature does not count.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    #[error("no key of the witnesses asked for made this signature")]
    UnknownKey,
    #[error("its payload is missing from the registry or has other bytes than its digest says")]
    NoPayload,
    #[error("what it says is nothing that verifiers take: {0}")]
    Malformed(String),
    #[error("it approves another digest, {0}")]
    OtherDigest(Digest),
    #[error("it approves the image as {0}")]
    OtherReference(String),
    #[error("witness {witness} trusted its key only until {until}")]
    Expired { witness: String, until: Timestamp },
    #[error("witness {witness} revoked its key on {at}: {reason}")]
    Revoked { witness: String, at: Timestamp, reason: String },
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
            Self::Malformed(_) => "malformed",
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

/// The algorithms by which a witness's key of this kind may have signed in this format.
fn algorithms(format: Format, spec: KeySpec, keys: &TrustedKeys) -> impl Iterator<Item = Algorithm> {
    let unreadable = format == Format::Cosign && keys.is_pss_taken() && spec.supports(Algorithm::RsaPssSha256);
    format.algorithm(spec).into_iter().chain(unreadable.then_some(Algorithm::RsaPssSha256))
}

/// Who made a signature, and whether the key still counts.
#[derive(Debug, Clone)]
struct Signer<'a> {
    trust: Trust<'a>,
    key: &'a PublicKey,
    algorithm: Algorithm,
    standing: Standing,
}

/// Those whose key made this signature over this SHA-256, whether it still counts or not: one key may be several witnesses'. Those
/// for whom it counts come first.
fn signers<'a>(format: Format, sha256: &[u8; 32], signature: &[u8], trusts: &[Trust<'a>], now: Timestamp) -> Vec<Signer<'a>> {
    let found = trusts.iter().find_map(|trust| {
        let mut keys = trust.keys.standings(now).map(|(key, _)| key);
        keys.find_map(|key| {
            let mut algorithms = algorithms(format, key.spec(), trust.keys);
            Some((key, algorithms.find(|algorithm| key.verify(*algorithm, sha256, signature).is_ok())?))
        })
    });
    let Some((key, algorithm)) = found else { return vec![] };
    let takes_it = |trust: &&Trust<'_>| algorithms(format, key.spec(), trust.keys).any(|taken| taken == algorithm);
    let owners = trusts.iter().filter(takes_it);
    let signer = |trust: &Trust<'a>| Some(Signer { trust: *trust, key, algorithm, standing: trust.keys.standing(key, now)? });
    let mut signers: Vec<_> = owners.filter_map(signer).collect();
    signers.sort_by_key(|signer| signer.standing != Standing::Counts);
    signers
}

/// Judges one signature.
///
/// Signatures carry no time that could be trusted, so a key that was revoked or has run out counts for none of them,
/// older ones included.
pub fn signature(
    format: Format,
    claim: &Claim,
    wanted: &Wanted,
    trusts: &[Trust<'_>],
    now: Timestamp,
) -> Result<Verified, Rejection> {
    judge(&signers(format, &claim.signed_sha256, &claim.signature, trusts, now), claim, wanted, now)
}

/// The same for a signature that `witness` has just made by `algorithm`: it was verified then, and is not again.
pub fn fresh(
    artifact: Artifact,
    wanted: &Wanted,
    witness: &Witness,
    algorithm: Algorithm,
    signed: &Signed,
    now: Timestamp,
) -> Result<Fresh, Rejection> {
    let claim = artifact.claim().map_err(Rejection::Malformed)?;
    let key = witness.public_key();
    let standing = witness.trusted_keys().standing(key, now).ok_or(Rejection::UnknownKey)?;
    if !signed.is(algorithm, &claim.signed_sha256, &claim.signature) {
        return Err(Rejection::UnknownKey);
    }
    let trust = Trust { witness: witness.name(), keys: witness.trusted_keys(), certificates: witness.certificates() };
    judge_one(&Signer { trust, key, algorithm, standing }, &claim, wanted, now)?;
    Ok(Fresh(artifact))
}

/// One for whom it counts is enough.
fn judge(signers: &[Signer<'_>], claim: &Claim, wanted: &Wanted, now: Timestamp) -> Result<Verified, Rejection> {
    let mut judged = signers.iter().map(|signer| judge_one(signer, claim, wanted, now));
    let first = judged.next().ok_or(Rejection::UnknownKey)?;
    if first.is_ok() { first } else { judged.find(Result::is_ok).unwrap_or(first) }
}

/// Whether what the signer said is what was asked for, and the signer may still say it.
fn judge_one(signer: &Signer<'_>, claim: &Claim, wanted: &Wanted, now: Timestamp) -> Result<Verified, Rejection> {
    if !claim.digests.contains(&wanted.manifest.digest) {
        return Err(claim.digests.first().map_or(Rejection::UnknownKey, |other| Rejection::OtherDigest(other.clone())));
    }
    let Trust { witness, certificates, .. } = signer.trust;
    match &signer.standing {
        Standing::Counts => {}
        Standing::Ended { until } => {
            return Err(Rejection::Expired { witness: witness.to_owned(), until: *until });
        }
        Standing::Revoked { since, reason } => {
            return Err(Rejection::Revoked { witness: witness.to_owned(), at: *since, reason: reason.clone() });
        }
    }
    if let Some(envelope) = &claim.notation {
        notation::check(envelope, witness, signer.key, certificates, &wanted.manifest, now)?;
    }
    // Last, because some policies take a signature of the digest under any name: all else about it has to be right.
    if let Some(reference) =
        claim.reference.as_ref().filter(|reference| !approves(reference, &wanted.manifest.digest, &wanted.reference))
    {
        return Err(Rejection::OtherReference(reference.clone()));
    }
    Ok(Verified {
        witness: witness.to_owned(),
        key: signer.key.fingerprint().to_owned(),
        reference: claim.reference.clone(),
        until: claim.notation.as_ref().map(|envelope| envelope.until()),
        evidence: Evidence { algorithm: signer.algorithm, sha256: claim.signed_sha256, signature: claim.signature.clone() },
    })
}

/// Whether a signed reference approves the image under the name that was asked for.
///
/// - `host/repo:tag` approves that tag, and the digest in that repository.
/// - `host/repo` (cosign's own) approves everything in that repository.
/// - `anything@digest` (signature type `simple`) approves the digest wherever it is: that is what the type is for.
pub(crate) fn approves(reference: &str, digest_wanted: &Digest, name: &Reference) -> bool {
    let Ok(signed) = reference.parse::<Reference>() else { return false };
    match (&signed.tag, &signed.digest) {
        (None, Some(digest)) => digest == digest_wanted,
        (tag, digest) => {
            signed.registry == name.registry
                && signed.repository == name.repository
                && digest.as_ref().is_none_or(|digest| digest == digest_wanted)
                && (tag.is_none() || name.tag.is_none() || *tag == name.tag)
        }
    }
}

impl fmt::Display for Verified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.reference {
            Some(reference) => write!(f, "signed by {} as {reference}", self.witness),
            None => write!(f, "signed by {} as whatever the digest is called", self.witness),
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::{
        kms::KeyUri,
        signature::{
            Prepared, bundle,
            cosign::{self, SignatureManifest},
        },
        witness::{TrustedKeySettings, WitnessSettings},
    };

    const REFERENCE: &str = "registry.example.com/team/app:1.0";
    const IMAGE: &str = "sha256:e9b028cb7b49c4dae3dc661c2e147f3d78b9b4d1165c406256db92f18d4a0454";

    fn vector(folder: &str, file: &str) -> Vec<u8> {
        let path = format!("{}/tests/data/vectors/{folder}/{file}", env!("CARGO_MANIFEST_DIR"));
        std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    fn manifest() -> Target {
        Target::new("", &IMAGE.parse().unwrap(), 0)
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

    /// What the vector says, in either format.
    fn claim(folder: &str) -> Result<(Format, Claim), Rejection> {
        if folder.starts_with("B-") {
            return bundle::read(&vector(folder, "bundle.json"))
                .map(|claim| (Format::Bundle, claim))
                .map_err(Rejection::Malformed);
        }
        let manifest = SignatureManifest::read(crate::oci::media_type::OCI_MANIFEST, &vector(folder, "manifest.json")).unwrap();
        let claim = manifest.layers()[0].claim(&vector(folder, "payload.json"));
        claim.map(|claim| (Format::Cosign, claim)).map_err(Rejection::Malformed)
    }

    fn judge(folder: &str, keys: &TrustedKeys, reference: &str, digest: &str) -> Result<Verified, Rejection> {
        let wanted = Wanted { manifest: Target::new("", &digest.parse().unwrap(), 0), reference: reference.parse().unwrap() };
        let now = "2026-11-21T09:00:00Z".parse().unwrap();
        let (format, claim) = claim(folder)?;
        signature(format, &claim, &wanted, &[Trust { witness: "release", keys, certificates: &[] }], now)
    }

    #[test]
    fn the_vectors_that_other_verifiers_accept_are_accepted_and_the_others_refused() {
        let (rsa, p256) = (keys("rsa2048", None, None), keys("p256", None, None));
        for (folder, keys) in [
            ("A-rsa-pkcs1", &rsa),
            ("A-ecdsa-p256", &p256),
            ("A-repo-only-rsa-pkcs1", &rsa),
            ("B-rsa-pkcs1", &rsa),
            ("B-ecdsa-p256", &p256),
        ] {
            let verified = judge(folder, keys, REFERENCE, IMAGE).unwrap_or_else(|rejection| panic!("{folder}: {rejection}"));
            assert_eq!(verified.witness(), "release");
        }
        for (folder, expected) in [
            ("A-rsa-pss", "unknown_key"),
            ("A-ecdsa-p256", "unknown_key"),
            ("A-tampered-signature", "unknown_key"),
            ("A-wrong-digest", "other_digest"),
            ("B-rsa-pss", "unknown_key"),
            ("B-ecdsa-p256", "unknown_key"),
            ("B-tampered-signature", "unknown_key"),
        ] {
            assert_eq!(judge(folder, &rsa, REFERENCE, IMAGE).unwrap_err().name(), expected, "{folder}");
        }
        assert!(judge("A-tampered-payload", &rsa, REFERENCE, IMAGE).is_err());
    }

    #[test]
    fn pss_under_the_signature_tag_counts_only_where_a_rule_insists_on_it() {
        let insisted = keys("rsa2048", None, None).taking_pss(true);
        assert!(judge("A-rsa-pss", &insisted, REFERENCE, IMAGE).is_ok());
        assert!(judge("A-rsa-pkcs1", &insisted, REFERENCE, IMAGE).is_ok());
        assert_eq!(judge("B-rsa-pss", &insisted, REFERENCE, IMAGE).unwrap_err().name(), "unknown_key");
    }

    #[test]
    fn a_bundle_counts_for_its_digest_whatever_that_is_called() {
        let rsa = keys("rsa2048", None, None);
        let verified = judge("B-rsa-pkcs1", &rsa, "mirror.example.com/other/app:any", IMAGE).unwrap();
        assert_eq!((verified.witness(), verified.reference()), ("release", None));
        let other = format!("sha256:{}", "0".repeat(64));
        assert_eq!(judge("B-rsa-pkcs1", &rsa, REFERENCE, &other).unwrap_err().name(), "other_digest");
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
        let approves = |signed: &str, name: &str| super::approves(signed, &IMAGE.parse().unwrap(), &name.parse().unwrap());
        let simple = format!("registry.example.com/team/app@{IMAGE}");
        assert!(approves(&simple, "mirror.example.com/copy:any"));
        let other = format!("registry.example.com/team/app@sha256:{}", "0".repeat(64));
        assert!(!approves(&other, "registry.example.com/team/app:1.0"));
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
        let wanted = Wanted { manifest: manifest(), reference: REFERENCE.parse().unwrap() };
        for prepared in [
            Prepared::Cosign(cosign::Prepared::new(&subject, &REFERENCE.parse().unwrap())),
            Prepared::Bundle(bundle::Prepared::new(&subject, Timestamp::UNIX_EPOCH)),
        ] {
            let algorithm = Algorithm::EcdsaSha256;
            let signed = witness.sign(algorithm, prepared.sha256()).await.unwrap();
            let other = witness.sign(algorithm, &[7; 32]).await.unwrap();
            let judge = |raw: &Signed, wanted: &Wanted, signed: &Signed| {
                let artifact = prepared.assemble(raw.raw(), witness.public_key()).unwrap();
                fresh(artifact, wanted, &witness, algorithm, signed, Timestamp::UNIX_EPOCH).map(drop)
            };
            assert_eq!(judge(&signed, &wanted, &signed), Ok(()));
            assert_eq!(judge(&signed, &wanted, &other), Err(Rejection::UnknownKey));
            assert_eq!(judge(&other, &wanted, &signed), Err(Rejection::UnknownKey));
            let elsewhere = Wanted { manifest: Target::new("", &Digest::of(b"elsewhere"), 0), ..wanted.clone() };
            assert!(matches!(judge(&signed, &elsewhere, &signed), Err(Rejection::OtherDigest(_))));
        }
        let signed = witness.sign(Algorithm::EcdsaSha256, &[7; 32]).await.unwrap();
        let prepared = cosign::Prepared::new(&subject, &REFERENCE.parse().unwrap());
        let artifact = Artifact::Layer { layer: prepared.assemble(signed.raw()), payload: Bytes::from_static(b"{}") };
        let judged = fresh(artifact, &wanted, &witness, Algorithm::EcdsaSha256, &signed, Timestamp::UNIX_EPOCH);
        assert!(matches!(judged, Err(Rejection::Malformed(_))));
    }
}
