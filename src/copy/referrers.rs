//! Signatures that are referrers: each a manifest of its own, which keeps its bytes and so its digest.

use bytes::Bytes;
use futures::future::try_join_all;

use super::{Copied, Error, Kind, Route, State, settle};
use crate::{
    attachment,
    oci::{Descriptor, Digest, Tag, media_type},
    pipeline::{
        self,
        write::{
            referrers::{are_listed, store},
            tag::{self, Addition, Merged},
        },
    },
    registry::{self, Address, Manifest, ReferrersIndex},
    signature::{bundle::MAX_BUNDLE, referrer::ReferrerManifest},
    verify::Stored,
};

impl Route<'_> {
    /// Copies the referrers that are signatures.
    pub(super) async fn referrers(&self) -> Result<Vec<Copied>, Error> {
        let (source, destination) = (self.source, self.destination);
        let lists = tokio::try_join!(
            source.registry.referrers(source.repository(), self.subject),
            destination.registry.referrers(destination.repository(), self.subject)
        );
        let (listed, there) = match lists {
            Ok(lists) => lists,
            Err(error @ registry::Error::NoIndex { .. }) => {
                return Ok(vec![self.copied(Kind::Bundle, None, State::failed(&error.into()))]);
            }
            Err(error) => return Err(error.into()),
        };
        let mut copied = vec![];
        let mut missing = vec![];
        for entry in listed.entries() {
            let Some((kind, manifest, read)) = self.signature(entry).await? else { continue };
            let is_there = there.entries().iter().any(|entry| entry.digest == *manifest.digest());
            let state = match self.unwritten(is_there) {
                Some(state) => state,
                None => match self.blobs(&read).await? {
                    Some(blobs) => {
                        missing.push((manifest, read, blobs));
                        State::Copied
                    }
                    None => State::LeftOut { reason: "its content is missing in the source, so it counts nowhere" },
                },
            };
            copied.push(self.copied(kind, None, state));
        }
        if !missing.is_empty() {
            let written = self.write(&missing, there.is_by_api()).await;
            settle(&mut copied, written);
        }
        Ok(copied)
    }

    /// The manifest that is listed so, if it is a signature of this subject.
    async fn signature(&self, entry: &Descriptor) -> Result<Option<(Kind, Manifest, ReferrerManifest)>, registry::Error> {
        // cosign lists without a type that would say anything.
        let says_other = |named: &str| !matches!(named, "" | media_type::OCI_EMPTY) && !attachment::is_signature(named);
        if entry.artifact_type.as_deref().is_some_and(says_other) || entry.media_type != media_type::OCI_MANIFEST {
            return Ok(None);
        }
        let at = Address::Digest(entry.digest.clone());
        let found = match self.source.registry.manifest(self.source.repository(), &at).await {
            Err(registry::Error::Unsupported { .. } | registry::Error::Oversized { .. }) => None,
            found => found?,
        };
        let Some(manifest) = found else { return Ok(None) };
        let Ok(read) = ReferrerManifest::read(manifest.media_type(), manifest.content()) else { return Ok(None) };
        // cosign's first bundles have a config that says nothing, and no type of their own.
        let types = [&read.artifact_type, &read.blob.media_type];
        let kind = if types.into_iter().any(|named| attachment::is_bundle(named)) {
            Kind::Bundle
        } else if attachment::is_signature(&read.artifact_type) {
            Kind::Notation
        } else {
            return Ok(None);
        };
        let counts = read.subject == *self.subject && !Stored::is_ruled_out(&read.annotations);
        Ok(counts.then_some((kind, manifest, read)))
    }

    /// What the manifest needs; None if the source does not have it.
    async fn blobs(&self, read: &ReferrerManifest) -> Result<Option<Vec<Bytes>>, registry::Error> {
        let wanted = [&read.blob, &read.config].map(async |blob: &Descriptor| {
            match self.source.registry.blob(self.source.repository(), &blob.digest, MAX_BUNDLE).await {
                Err(registry::Error::Oversized { .. }) => Ok(None),
                blob => blob,
            }
        });
        Ok(try_join_all(wanted).await?.into_iter().collect())
    }

    async fn write(&self, missing: &[Missing], by_api: bool) -> Result<(), pipeline::Error> {
        let (registry, repository) = (self.destination.registry, self.destination.repository());
        for (manifest, _, blobs) in missing {
            store(registry, repository, blobs, manifest.digest(), manifest.content()).await?;
        }
        let digests: Vec<_> = missing.iter().map(|(manifest, ..)| manifest.digest()).collect();
        if by_api && are_listed(registry, repository, self.subject, &digests).await? {
            return Ok(());
        }
        tag::add(registry, repository, &Tag::referrers(self.subject), &mut Entries { route: self, missing }).await
    }
}

/// A signature that the destination does not have: its manifest, what that says, and the blobs that it needs.
type Missing = (Manifest, ReferrerManifest, Vec<Bytes>);

/// Entries that are added to the destination's index under the fallback tag.
struct Entries<'a> {
    route: &'a Route<'a>,
    missing: &'a [Missing],
}

impl Addition for Entries<'_> {
    type Content = ReferrersIndex;
    const MEDIA_TYPE: &'static str = media_type::OCI_INDEX;

    async fn upload(&self) -> Result<(), pipeline::Error> {
        Ok(())
    }

    async fn look(&self) -> Result<Option<(Digest, ReferrersIndex)>, pipeline::Error> {
        let Route { destination, subject, .. } = self.route;
        Ok(destination.registry.referrers_index(destination.repository(), subject).await?)
    }

    async fn merge(&mut self, current: Option<ReferrersIndex>) -> Result<Merged, pipeline::Error> {
        let mut index = current.unwrap_or_else(ReferrersIndex::empty);
        if self.is_in(&index) {
            return Ok(Merged::Complete);
        }
        let full = |source| pipeline::Error::ReferrersTag {
            repository: self.route.destination.repository().clone(),
            tag: Tag::referrers(self.route.subject),
            source,
        };
        for (manifest, read, _) in self.missing {
            index.add(&descriptor(manifest, read)).map_err(full)?;
        }
        index.to_bytes().map(Merged::Write).map_err(full)
    }

    fn written(&mut self) {}

    fn is_in(&self, content: &ReferrersIndex) -> bool {
        self.missing.iter().all(|(manifest, ..)| content.contains(manifest.digest()))
    }
}

/// What listings say of it, by its own word rather than the source's: distribution-spec 1.1, "Listing Referrers".
fn descriptor(manifest: &Manifest, read: &ReferrerManifest) -> Descriptor {
    Descriptor {
        media_type: manifest.media_type().to_owned(),
        digest: manifest.digest().clone(),
        size: manifest.content().len() as u64,
        artifact_type: Some(read.artifact_type.clone()),
        platform: None,
        annotations: read.annotations.clone(),
    }
}
