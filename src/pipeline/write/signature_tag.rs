//! The `.sig` tag: all signatures of a digest are layers of one manifest, so all of them are added in one write.

use std::collections::HashSet;

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, future, stream};

use super::{
    Numbered, Ready, Store,
    tag::{self, Addition, Merged},
};
use crate::{
    oci::{Digest, Repository, Tag, media_type},
    pipeline::{
        Error,
        plan::{Target, Wanted},
    },
    registry::{self, Address, Registry},
    signature::{
        EMPTY_CONFIG, Format, Prepared,
        cosign::{self, Layer, SignatureManifest, extend_config},
    },
};

/// Blobs that are uploaded at once.
const UPLOADS_AT_ONCE: usize = 8;

/// The signatures under the `.sig` tag of one digest.
pub(crate) struct SignatureTag<'a> {
    registry: &'a Registry,
    repository: &'a Repository,
    tag: Tag,
}

impl<'a> SignatureTag<'a> {
    pub(super) fn new(registry: &'a Registry, target: &'a Target) -> Self {
        let subject = &target.subject;
        Self::of(registry, subject.repository(), subject.digest()).expect("only SHA-256 digests are planned for")
    }

    /// None for a digest that has no such tag.
    pub(crate) fn of(registry: &'a Registry, repository: &'a Repository, digest: &Digest) -> Option<Self> {
        Some(Self { registry, repository, tag: Tag::cosign_signatures(digest)? })
    }

    pub(crate) fn tag(&self) -> &Tag {
        &self.tag
    }

    pub(crate) async fn read(&self) -> Result<Option<(Digest, SignatureManifest)>, Error> {
        let Some(found) = self.registry.manifest(self.repository, &Address::Tag(self.tag.clone())).await? else {
            return Ok(None);
        };
        let manifest = SignatureManifest::read(found.media_type(), found.content()).map_err(|error| self.unreadable(error))?;
        Ok(Some((found.digest().clone(), manifest)))
    }

    /// Makes sure that the repository has these and the constant config.
    pub(crate) async fn upload(&self, payloads: impl Iterator<Item = Bytes>) -> Result<(), registry::Error> {
        let blobs = payloads.chain([EMPTY_CONFIG.into()]);
        let uploads: Vec<_> = blobs.map(|blob| self.registry.ensure_blob(self.repository, blob)).collect();
        stream::iter(uploads).buffer_unordered(UPLOADS_AT_ONCE).try_for_each(|_| future::ready(Ok(()))).await
    }

    /// The config that lists these layers too, uploaded. None if it is none that lists layers, and so stays as it is.
    async fn extend_config(&self, own: &Digest, layers: &[Layer]) -> Result<Option<Vec<u8>>, Error> {
        let content = match self.registry.blob(self.repository, own, cosign::MAX_PAYLOAD).await {
            Err(registry::Error::Oversized { .. }) => None,
            content => content?,
        };
        let Some(content) = content.and_then(|content| extend_config(&content, layers)) else { return Ok(None) };
        self.registry.ensure_blob(self.repository, content.clone().into()).await?;
        Ok(Some(content))
    }

    pub(crate) fn unreadable(&self, source: cosign::Error) -> Error {
        Error::SignatureTag { repository: self.repository.clone(), tag: self.tag.clone(), source }
    }
}

impl Store for SignatureTag<'_> {
    fn keeps(format: Format) -> bool {
        match format {
            Format::Cosign => true,
            Format::Bundle | Format::Notation | Format::NotationCose => false,
        }
    }

    async fn look(&mut self, wanted: &[Numbered<'_>]) -> Result<HashSet<usize>, Error> {
        let Some((_, manifest)) = self.read().await? else { return Ok(HashSet::new()) };
        Ok(wanted.iter().filter(|(_, wanted)| is_there(&manifest, wanted)).map(|(index, _)| *index).collect())
    }

    async fn prepare(&self, missing: &[Numbered<'_>]) -> Result<(), registry::Error> {
        self.upload(missing.iter().filter_map(|(_, wanted)| payload(&wanted.prepared)).cloned()).await
    }

    async fn write(&mut self, ready: &[Ready<'_>]) -> Result<HashSet<usize>, Error> {
        let mut layers = Layers { store: self, ready, config: ListingConfig::default(), merged: vec![], ours: HashSet::new() };
        tag::add(self.registry, self.repository, &self.tag, &mut layers).await?;
        Ok(layers.ours)
    }
}

/// What is added to the manifest.
struct Layers<'a> {
    store: &'a SignatureTag<'a>,
    ready: &'a [Ready<'a>],
    config: ListingConfig,
    /// What the last merge added, and what was written of it.
    merged: Vec<usize>,
    ours: HashSet<usize>,
}

impl Addition for Layers<'_> {
    type Content = SignatureManifest;
    const MEDIA_TYPE: &'static str = media_type::OCI_MANIFEST;

    async fn upload(&self) -> Result<(), Error> {
        let payloads = self.ready.iter().filter_map(|one| payload(&one.wanted.prepared)).cloned();
        Ok(self.store.upload(payloads).await?)
    }

    async fn look(&self) -> Result<Option<(Digest, SignatureManifest)>, Error> {
        self.store.read().await
    }

    async fn merge(&mut self, current: Option<SignatureManifest>) -> Result<Merged, Error> {
        let mut manifest = current.unwrap_or_else(SignatureManifest::empty);
        // Another replica may have been here, or a write of ours whose answer was lost.
        let absent = || self.ready.iter().filter(|one| !is_there(&manifest, one.wanted));
        let merged: Vec<usize> = absent().map(|one| one.index).collect();
        let layers: Vec<Layer> = absent().filter_map(|one| one.fresh.artifact().layer()).cloned().collect();
        if merged.is_empty() {
            return Ok(Merged::Complete);
        }
        if !self.config.extend(self.store, &mut manifest, &layers).await? {
            return Ok(Merged::LookAgain);
        }
        self.merged = merged;
        manifest.add(layers).map_err(|error| self.store.unreadable(error))?;
        manifest.to_bytes().map(Merged::Write).map_err(|error| self.store.unreadable(error))
    }

    fn written(&mut self) {
        self.ours.extend(self.merged.drain(..));
    }

    fn is_in(&self, content: &SignatureManifest) -> bool {
        self.ready.iter().all(|one| is_there(content, one.wanted))
    }
}

/// The config that lists some layers too, after the one that it was made of.
#[derive(Default)]
pub(crate) struct ListingConfig(Option<(Digest, Vec<Layer>, Option<Vec<u8>>)>);

impl ListingConfig {
    /// Has the manifest's config list these layers, if it is one that lists layers. False if it had to be uploaded first, which
    /// takes a while: then the manifest is to be looked at again.
    pub(crate) async fn extend(
        &mut self,
        store: &SignatureTag<'_>,
        manifest: &mut SignatureManifest,
        layers: &[Layer],
    ) -> Result<bool, Error> {
        let Some(own) = manifest.own_config() else { return Ok(true) };
        match &self.0 {
            Some((of, lists, content)) if *of == own && *lists == layers => {
                if let Some(content) = content {
                    manifest.set_config(content);
                }
                Ok(true)
            }
            _ => {
                let content = store.extend_config(&own, layers).await?;
                self.0 = Some((own, layers.to_vec(), content));
                Ok(false)
            }
        }
    }
}

/// Whether a valid signature of this witness over this payload is in the manifest. Time and key rotation aside, its
/// bytes do not matter: one is enough.
fn is_there(manifest: &SignatureManifest, wanted: &Wanted) -> bool {
    let sha256 = wanted.prepared.sha256();
    let payload = Digest::from_sha256(sha256);
    let key = wanted.witness.public_key();
    let mut candidates = manifest.layers().iter().filter(|layer| *layer.payload() == payload);
    candidates.any(|layer| key.verify(wanted.algorithm, sha256, layer.signature()).is_ok())
}

fn payload(prepared: &Prepared) -> Option<&Bytes> {
    match prepared {
        Prepared::Cosign(prepared) => Some(prepared.payload()),
        Prepared::Bundle(_) | Prepared::Notation(_) => None,
    }
}
