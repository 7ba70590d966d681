//! Signatures as they are found among an image's referrers: fetched and read, and not yet judged.

use std::{cmp::Reverse, collections::BTreeMap};

use bytes::Bytes;
use jiff::Timestamp;

use super::Rejection;
use crate::{
    oci::{Descriptor, Digest, Repository},
    registry::{self, Address, Referrers, Registry},
    signature::{
        Claim, Format, bundle, cosign, notation,
        referrer::{CREATED_ANNOTATION, ReferrerManifest},
    },
};

/// What a referrer turned out to be.
#[derive(Debug)]
pub(crate) enum Referring {
    Signature(Stored),
    /// Signatures as cosign's mode `oci-1-1` keeps them: what is under the `.sig` tag otherwise.
    Layers(cosign::SignatureManifest),
    /// A bundle that says of itself that its statement is another one than that the image is signed.
    Attestation {
        predicate: String,
    },
    /// No referrer of this image, or of a kind that is nobody's signature.
    Other,
}

/// A signature that was found, and what it says or why that cannot be told.
#[derive(Debug, Clone)]
pub(crate) struct Stored {
    pub(crate) format: Format,
    /// When it was made, on the word of whoever wrote it.
    pub(crate) time: Option<Timestamp>,
    pub(crate) claim: Result<Claim, Rejection>,
}

impl Stored {
    /// The types of artifacts that are signatures such as ours.
    pub(crate) const ARTIFACT_TYPES: &[&str] = &[bundle::MEDIA_TYPE, notation::ARTIFACT_TYPE];
    /// The same, and of those that only others write.
    pub(crate) const ALL_ARTIFACT_TYPES: &[&str] = &[bundle::MEDIA_TYPE, notation::ARTIFACT_TYPE, cosign::ARTIFACT_TYPE];

    /// Those of the listed referrers that may be signatures of these types; first those that say that one of these made them: keys,
    /// as bundles name them, and certificates, by thumbprint. Of these the newest by their own word come first, since those before
    /// may have expired. Last those that only cosign's experimental mode writes.
    pub(crate) fn candidates<'a>(listed: &'a Referrers, types: &'static [&'static str], hints: &[String]) -> Vec<&'a Descriptor> {
        let candidates = listed.candidates(types);
        let mut candidates: Vec<_> = candidates.filter(|entry| Self::other_predicate(&entry.annotations).is_none()).collect();
        let is_named = |entry: &&Descriptor| {
            let key = entry.annotations.get(bundle::HINT_ANNOTATION).cloned();
            let leaf = notation::thumbprints(&entry.annotations).and_then(|all| all.into_iter().next());
            [key, leaf].iter().flatten().any(|named| hints.contains(named))
        };
        let is_experimental = |entry: &Descriptor| entry.artifact_type.as_deref() == Some(cosign::ARTIFACT_TYPE);
        let age = |entry: &Descriptor| Reverse(created(&entry.annotations));
        candidates.sort_by_cached_key(|entry| {
            let is_named = is_named(entry);
            (!is_named, is_experimental(entry), is_named.then(|| age(entry)))
        });
        candidates
    }

    /// What an artifact states, where its annotations say that it is something else than a signature: no more than is shown, since
    /// anybody can have written it.
    pub(crate) fn other_predicate(annotations: &BTreeMap<String, String>) -> Option<String> {
        const SHOWN: usize = 200;
        let predicate = annotations.get(bundle::PREDICATE_ANNOTATION).filter(|predicate| *predicate != bundle::PREDICATE_TYPE);
        predicate.map(|predicate| predicate.chars().take(SHOWN).collect())
    }
}

/// Reads a blob of one format.
type Reader = fn(&[u8]) -> Result<Claim, String>;

/// Reads a referrer of `subject` that is listed as `entry`.
///
/// # Errors
/// When the registry could not be asked. What anybody can have put there, such as a manifest that cannot be read, is no error.
pub(crate) async fn read_referrer(
    registry: &Registry,
    repository: &Repository,
    subject: &Digest,
    entry: &Descriptor,
) -> Result<Referring, registry::Error> {
    let found = match registry.manifest(repository, &Address::Digest(entry.digest.clone())).await {
        Err(registry::Error::Unsupported { .. } | registry::Error::Oversized { .. }) => None,
        found => found?,
    };
    let Some(found) = found else { return Ok(Referring::Other) };
    let Ok(manifest) = ReferrerManifest::read(found.media_type(), found.content()) else { return Ok(Referring::Other) };
    if manifest.subject != *subject {
        return Ok(Referring::Other);
    }
    if let Some(predicate) = Stored::other_predicate(&manifest.annotations) {
        return Ok(Referring::Attestation { predicate });
    }
    if manifest.artifact_type == cosign::ARTIFACT_TYPE {
        let layers = cosign::SignatureManifest::read(found.media_type(), found.content());
        return Ok(layers.map_or(Referring::Other, Referring::Layers));
    }
    let Some(at) = manifest.blob() else { return Ok(Referring::Other) };
    let (format, limit, read): (Format, u64, Reader) = match at.media_type.as_str() {
        bundle::MEDIA_TYPE => (Format::Bundle, bundle::MAX_BUNDLE, bundle::read),
        other => match notation::Envelope::of_media_type(other) {
            // It has rules of its own for what says the artifact's type.
            Some(_) if notation::SignatureManifest::read(found.media_type(), found.content()).is_err() => {
                return Ok(Referring::Other);
            }
            Some(notation::Envelope::Jws) => {
                (Format::Notation, notation::MAX_ENVELOPE, |blob| notation::read(notation::Envelope::Jws, blob))
            }
            Some(notation::Envelope::Cose) => {
                (Format::NotationCose, notation::MAX_ENVELOPE, |blob| notation::read(notation::Envelope::Cose, blob))
            }
            None => return Ok(Referring::Other),
        },
    };
    let blob = blob(registry, repository, at, limit).await?;
    let claim = blob.ok_or(Rejection::NoPayload).and_then(|blob| read(&blob).map_err(Rejection::Malformed));
    let signed = claim.as_ref().ok().and_then(|claim| claim.notation.as_ref()).map(|envelope| envelope.signing_time());
    let time = signed.or_else(|| created(&manifest.annotations));
    Ok(Referring::Signature(Stored { format, time, claim }))
}

/// When an artifact was made, by its own word.
fn created(annotations: &BTreeMap<String, String>) -> Option<Timestamp> {
    annotations.get(CREATED_ANNOTATION)?.parse().ok()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{oci::media_type, registry::ReferrersIndex};

    #[test]
    fn what_only_an_experiment_writes_takes_no_others_place() {
        let entry = |number: u8, artifact_type: &str| Descriptor {
            media_type: media_type::OCI_MANIFEST.to_owned(),
            digest: Digest::of(&[number]),
            size: 1,
            artifact_type: Some(artifact_type.to_owned()),
            platform: None,
            annotations: BTreeMap::new(),
        };
        let mut index = ReferrersIndex::empty();
        for one in [entry(1, cosign::ARTIFACT_TYPE), entry(2, bundle::MEDIA_TYPE), entry(3, cosign::ARTIFACT_TYPE)] {
            index.add(&one).unwrap();
        }
        let listed = Referrers::of_index(index);
        let order = |types| Stored::candidates(&listed, types, &[]).iter().map(|one| one.digest.clone()).collect::<Vec<_>>();
        assert_eq!(order(Stored::ALL_ARTIFACT_TYPES), [2, 1, 3].map(|number| Digest::of(&[number])));
        assert_eq!(order(Stored::ARTIFACT_TYPES), [Digest::of(&[2])]);
    }

    #[test]
    fn of_those_that_name_a_witness_the_newest_comes_first() {
        let mut index = ReferrersIndex::empty();
        let entries = [(1, "2026-01-01T00:00:00Z", true), (2, "2026-03-01T00:00:00Z", true), (3, "2026-12-01T00:00:00Z", false)];
        for (number, created, is_named) in entries {
            let hint = if is_named { "ours" } else { "theirs" };
            let annotations = [(CREATED_ANNOTATION, created), (bundle::HINT_ANNOTATION, hint)];
            let one = Descriptor {
                media_type: media_type::OCI_MANIFEST.to_owned(),
                digest: Digest::of(&[number]),
                size: 1,
                artifact_type: Some(bundle::MEDIA_TYPE.to_owned()),
                platform: None,
                annotations: annotations.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
            };
            index.add(&one).unwrap();
        }
        let listed = Referrers::of_index(index);
        let order = Stored::candidates(&listed, Stored::ARTIFACT_TYPES, &["ours".to_owned()]);
        assert_eq!(
            order.iter().map(|one| &one.digest).collect::<Vec<_>>(),
            [2, 1, 3].map(|number| Digest::of(&[number])).each_ref()
        );
    }

    #[test]
    fn what_an_attestation_says_that_it_states_is_cut() {
        let said = |predicate: &str| {
            Stored::other_predicate(&BTreeMap::from([(bundle::PREDICATE_ANNOTATION.to_owned(), predicate.to_owned())]))
        };
        assert_eq!(said("https://slsa.dev/provenance/v1").as_deref(), Some("https://slsa.dev/provenance/v1"));
        assert_eq!(said(&"ä".repeat(4 << 20)), Some("ä".repeat(200)));
        assert_eq!(said(bundle::PREDICATE_TYPE), None);
    }
}
