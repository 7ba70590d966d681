//! Signatures as they are found among an image's referrers: fetched and read, and not yet judged.

use std::collections::BTreeMap;

use bytes::Bytes;
use jiff::Timestamp;

use super::Rejection;
use crate::{
    oci::{Descriptor, Digest, Repository},
    registry::{self, Address, Referrers, Registry},
    signature::{
        Claim, Format, bundle,
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
    const ARTIFACT_TYPES: &[&str] = &[bundle::MEDIA_TYPE];

    /// Those of the listed referrers that may be signatures; first those that say that one of these keys made them.
    pub(crate) fn candidates<'a>(listed: &'a Referrers, hints: &[String]) -> Vec<&'a Descriptor> {
        let candidates = listed.candidates(Self::ARTIFACT_TYPES);
        let mut candidates: Vec<_> = candidates.filter(|entry| !Self::is_ruled_out(&entry.annotations)).collect();
        candidates.sort_by_key(|entry| !entry.annotations.get(bundle::HINT_ANNOTATION).is_some_and(|hint| hints.contains(hint)));
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
    let Some(manifest) = found else { return Ok(None) };
    let Ok(manifest) = ReferrerManifest::read(manifest.media_type(), manifest.content()) else { return Ok(None) };
    if manifest.subject != *subject || Stored::is_ruled_out(&manifest.annotations) {
        return Ok(None);
    }
    let (format, limit, read): (Format, u64, Reader) = match manifest.blob.media_type.as_str() {
        bundle::MEDIA_TYPE => (Format::Bundle, bundle::MAX_BUNDLE, bundle::read),
        _ => return Ok(None),
    };
    let blob = blob(registry, repository, &manifest.blob, limit).await?;
    let claim = blob.ok_or(Rejection::NoPayload).and_then(|blob| read(&blob).map_err(Rejection::Malformed));
    let time = manifest.annotations.get(CREATED_ANNOTATION).and_then(|created| created.parse().ok());
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
