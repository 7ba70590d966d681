//! What notation's signatures are held against besides their key.
//!
//! What is trusted is a witness's key, as everywhere; the envelope only says which certificate goes with it, and that part of it
//! is not signed. So a certificate can make a signature count less, and never more.

use jiff::Timestamp;

use super::Rejection;
use crate::{
    certificate::Chain,
    kms::PublicKey,
    signature::notation::{Claim, Target},
};

/// Whether the envelope is about this manifest and names one of these certificates of this key of the witness's (any, if none is
/// known), or another for the same key that the same root answers for, as it does for one that was renewed; and whether it and
/// its certificate count at this time.
pub(crate) fn check(
    claim: &Claim,
    witness: &str,
    key: &PublicKey,
    certificates: &[Chain],
    wanted: &Target,
    now: Timestamp,
) -> Result<(), Rejection> {
    if !claim.target().is_same_manifest(wanted) {
        return Err(Rejection::Malformed("it says another media type or size than the manifest has".to_owned()));
    }
    let thumbprint = claim.chain().thumbprint();
    // Those of other keys are a former key's, whose certificates are not known any more.
    let mut known = certificates.iter().filter(|known| known.public_key() == key).peekable();
    let is_known = known.peek().is_none() || known.any(|known| known.root_thumbprint() == claim.chain().root_thumbprint());
    if claim.chain().public_key() != key || !is_known {
        return Err(Rejection::OtherCertificate { witness: witness.to_owned(), thumbprint: thumbprint.to_owned() });
    }
    let (not_before, not_after) = (claim.chain().not_before(), claim.chain().not_after());
    if now < not_before || now > not_after {
        return Err(Rejection::CertificateInvalid { not_before, not_after });
    }
    claim.expiry().filter(|expiry| *expiry <= now).map_or(Ok(()), |expiry| Err(Rejection::Over(expiry)))
}

#[cfg(test)]
mod tests;
