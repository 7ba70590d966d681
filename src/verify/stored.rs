//! Signatures as they are found among an image's referrers: fetched and read, and not yet judged.

use std::collections::BTreeMap;

use bytes::Bytes;
use jiff::Timestamp;

use super::Rejection;
use crate::{
    oci::{Descriptor, Digest, Repository},
    registry::{self, Address, Referrers, Registry},
    signature::{
        Claim, Format, bundle, notation,
        referrer::{CREATED_ANNOTATION, ReferrerManifest},
    },
};

/// One that was found, and what it says or why that cannot be told.
#[derive(Debug, Clone)]
pub(crate) struct Stored {
    pub(crate) format: Format,
    /// When it was made, on the word of whoever wrote it.
    pub(crate) time: Option<Timestamp>,
    pub(crate) claim: Result<Claim, Rejection>,
}

impl Stored {
    /// The types of artifacts that are signatures.
    const ARTIFACT_TYPES: &[&str] = &[bundle::MEDIA_TYPE, notation::ARTIFACT_TYPE];

    /// Those of the listed referrers that may be signatures; first those that say that one of these made them: keys, as bundles
    /// name them, and certificates, by thumbprint.
    pub(crate) fn candidates<'a>(listed: &'a Referrers, hints: &[String]) -> Vec<&'a Descriptor> {
        let candidates = listed.candidates(Self::ARTIFACT_TYPES);
        let mut candidates: Vec<_> = candidates.filter(|entry| !Self::is_ruled_out(&entry.annotations)).collect();
        let is_named = |entry: &&Descriptor| {
            let key = entry.annotations.get(bundle::HINT_ANNOTATION).cloned();
            let leaf = notation::thumbprints(&entry.annotations).and_then(|all| all.into_iter().next());
            [key, leaf].iter().flatten().any(|named| hints.contains(named))
        };
        candidates.sort_by_cached_key(|entry| !is_named(entry));
        candidates
    }

    /// Whether its annotations say that an artifact is something else than a signature.
    pub(crate) fn is_ruled_out(annotations: &BTreeMap<String, String>) -> bool {
        annotations.get(bundle::PREDICATE_ANNOTATION).is_some_and(|predicate| predicate != bundle::PREDICATE_TYPE)
    }
}

/// Reads a blob of one format.
type Reader = fn(&[u8]) -> Result<Claim, String>;

/// Reads a referrer of `subject` that is listed as `entry`. None if it is no signature, or no referrer of this subject.
///
/// # Errors
/// When the registry could not be asked. What anybody can have put there, such as a manifest that cannot be read, is no error.
pub(crate) async fn read_referrer(
    registry: &Registry,
    repository: &Repository,
    subject: &Digest,
    entry: &Descriptor,
) -> Result<Option<Stored>, registry::Error> {
    let found = match registry.manifest(repository, &Address::Digest(entry.digest.clone())).await {
        Err(registry::Error::Unsupported { .. } | registry::Error::Oversized { .. }) => None,
        found => found?,
    };
    let Some(found) = found else { return Ok(None) };
    let Ok(manifest) = ReferrerManifest::read(found.media_type(), found.content()) else { return Ok(None) };
    if manifest.subject != *subject || Stored::is_ruled_out(&manifest.annotations) {
        return Ok(None);
    }
    let (format, limit, read): (Format, u64, Reader) = match manifest.blob.media_type.as_str() {
        bundle::MEDIA_TYPE => (Format::Bundle, bundle::MAX_BUNDLE, bundle::read),
        other => match notation::Envelope::of_media_type(other) {
            // It has rules of its own for what says the artifact's type.
            Some(_) if notation::SignatureManifest::read(found.media_type(), found.content()).is_err() => return Ok(None),
            Some(notation::Envelope::Jws) => {
                (Format::Notation, notation::MAX_ENVELOPE, |blob| notation::read(notation::Envelope::Jws, blob))
            }
            Some(notation::Envelope::Cose) => {
                (Format::NotationCose, notation::MAX_ENVELOPE, |blob| notation::read(notation::Envelope::Cose, blob))
            }
            None => return Ok(None),
        },
    };
    let blob = blob(registry, repository, &manifest.blob, limit).await?;
    let claim = blob.ok_or(Rejection::NoPayload).and_then(|blob| read(&blob).map_err(Rejection::Malformed));
    let signed = claim.as_ref().ok().and_then(|claim| claim.notation.as_ref()).map(|envelope| envelope.signing_time());
    let time = signed.or_else(|| manifest.annotations.get(CREATED_ANNOTATION).and_then(|created| created.parse().ok()));
    Ok(Some(Stored { format, time, claim }))
}

/// A blob that is not there, or larger than it may be, is None alike.
async fn blob(
    registry: &Registry,
    repository: &Repository,
    at: &Descriptor,
    limit: u64,
) -> Result<Option<Bytes>, registry::Error> {
    if at.size > limit {
        return Ok(None);
    }
    match registry.blob(repository, &at.digest, limit).await {
        Err(registry::Error::Oversized { .. }) => Ok(None),
        blob => blob,
    }
}
