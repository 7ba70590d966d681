//! Judges notation's signatures.
//!
//! What is trusted is a witness's key, as everywhere; the envelope only says which certificate goes with it, and that part of it
//! is not signed. So a certificate can make a signature count less, and never more.

use jiff::Timestamp;

use super::{Rejection, Trust};
use crate::{
    certificate::Chain,
    kms::PublicKey,
    signature::notation::{Claim, Envelope, Target},
    witness::{Signed, Standing, Witness},
};

/// A witness, the keys whose signatures count as its own, and the certificates that are known of it.
#[derive(Debug, Clone, Copy)]
pub struct Certified<'a> {
    pub trust: Trust<'a>,
    /// If there are any, a signature must name one of them: it is what notation's users have in their trust stores.
    pub certificates: &'a [Chain],
}

/// A signature that stands. Only [`signature`] and [`fresh`] make it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Approval {
    witness: String,
    key: String,
    thumbprint: String,
    signing_time: Timestamp,
}

impl Approval {
    #[must_use]
    pub fn witness(&self) -> &str {
        &self.witness
    }

    /// SHA-256 of the key's `SubjectPublicKeyInfo`, lower-case hex.
    #[must_use]
    pub fn key_fingerprint(&self) -> &str {
        &self.key
    }

    /// SHA-256 of the certificate, lower-case hex.
    #[must_use]
    pub fn thumbprint(&self) -> &str {
        &self.thumbprint
    }

    /// By the signer's clock.
    #[must_use]
    pub fn signing_time(&self) -> Timestamp {
        self.signing_time
    }
}

/// Judges one envelope. `wanted` is the manifest that must have been signed, as the registry serves it.
pub fn signature(
    envelope: Envelope,
    content: &[u8],
    wanted: &Target,
    witnesses: &[Certified<'_>],
    now: Timestamp,
) -> Result<Approval, Rejection> {
    let claim = Claim::read(envelope, content).map_err(Rejection::NotNotation)?;
    let key = claim.chain().public_key();
    // One key may be several witnesses': one for whom the signature counts comes first.
    let mut judged = witnesses.iter().filter_map(|certified| {
        let standing = certified.trust.keys.standing(key, now)?;
        Some(judge(&claim, certified, key, standing, wanted, now))
    });
    let first = judged.next().ok_or(Rejection::UnknownKey)?;
    // With the key that a witness is known by, which is the same; and only for those who have it.
    claim.is_signed_by(key).map_err(|_| Rejection::UnknownKey)?;
    if first.is_ok() { first } else { judged.find(Result::is_ok).unwrap_or(first) }
}

/// The same for an envelope that holds what `witness` has just signed: it was verified then, and is not again.
pub fn fresh(
    envelope: Envelope,
    content: &[u8],
    wanted: &Target,
    witness: &Witness,
    chain: &Chain,
    signed: &Signed,
    now: Timestamp,
) -> Result<Approval, Rejection> {
    let claim = Claim::read(envelope, content).map_err(Rejection::NotNotation)?;
    let (algorithm, sha256, raw) = claim.raw();
    let key = witness.public_key();
    if claim.chain().public_key() != key || !signed.is(algorithm, sha256, raw) {
        return Err(Rejection::UnknownKey);
    }
    let standing = witness.trusted_keys().standing(key, now).ok_or(Rejection::UnknownKey)?;
    let trust = Trust { witness: witness.name(), keys: witness.trusted_keys() };
    judge(&claim, &Certified { trust, certificates: std::slice::from_ref(chain) }, key, standing, wanted, now)
}

/// Whether what the signer said is what was asked for, and the signer may still say it.
fn judge(
    claim: &Claim,
    certified: &Certified<'_>,
    key: &PublicKey,
    standing: Standing,
    wanted: &Target,
    now: Timestamp,
) -> Result<Approval, Rejection> {
    let (witness, thumbprint) = (certified.trust.witness.to_owned(), claim.chain().thumbprint().to_owned());
    if claim.target().digest != wanted.digest {
        return Err(Rejection::OtherDigest(claim.target().digest.clone()));
    }
    if !claim.target().is_same_manifest(wanted) {
        return Err(Rejection::Malformed("it says another media type or size than the manifest has".to_owned()));
    }
    match standing {
        Standing::Counts => {}
        Standing::Ended { until } => return Err(Rejection::Expired { witness, until }),
        Standing::Revoked { since, reason } => return Err(Rejection::Revoked { witness, at: since, reason }),
    }
    if !(certified.certificates.is_empty() || certified.certificates.iter().any(|known| known.thumbprint() == thumbprint)) {
        return Err(Rejection::OtherCertificate { witness, thumbprint });
    }
    let (not_before, not_after) = (claim.chain().not_before(), claim.chain().not_after());
    if now < not_before || now > not_after {
        return Err(Rejection::CertificateInvalid { not_before, not_after });
    }
    if let Some(expiry) = claim.expiry().filter(|expiry| *expiry <= now) {
        return Err(Rejection::Over(expiry));
    }
    Ok(Approval { witness, key: key.fingerprint().to_owned(), thumbprint, signing_time: claim.signing_time() })
}

#[cfg(test)]
mod tests;
