//! Signatures under the `.sig` tag: layers of one manifest.

use bytes::Bytes;

use super::{Copied, Error, Kind, Route, State, settle};
use crate::{
    oci::{Digest, media_type},
    pipeline::{
        self,
        write::{
            signature_tag::{ListingConfig, SignatureTag},
            tag::{self, Addition, Merged},
        },
    },
    registry,
    signature::cosign::{Entry, Layer, MAX_PAYLOAD, SignatureManifest, Statement},
};

impl Route<'_> {
    /// Copies what is under the `.sig` tag.
    pub(super) async fn layers(&self) -> Result<Vec<Copied>, Error> {
        let source = SignatureTag::of(self.source.registry, self.source.repository(), self.subject);
        let destination = SignatureTag::of(self.destination.registry, self.destination.repository(), self.subject);
        let (Some(source), Some(destination)) = (source, destination) else { return Ok(vec![]) };
        let read = tokio::try_join!(source.read(), destination.read());
        let (found, there) = match read {
            Ok(read) => read,
            Err(pipeline::Error::Registry(error)) => return Err(error.into()),
            Err(error) => return Ok(vec![self.copied(Kind::Cosign, None, State::failed(&error))]),
        };
        let Some((_, found)) = found else { return Ok(vec![]) };
        let there = there.map_or_else(SignatureManifest::empty, |(_, there)| there);

        let mut copied = vec![];
        let mut missing = vec![];
        for entry in found.entries() {
            let payload = self.payload(entry.layer()).await?;
            let reference = payload.as_deref().and_then(|payload| Statement::read(payload).ok()).map(|said| said.reference);
            let state = match (self.unwritten(there.contains(entry.layer())), payload) {
                (Some(state), _) => state,
                (None, None) => State::LeftOut { reason: "its payload is missing in the source, so it counts nowhere" },
                (None, Some(payload)) => {
                    missing.push((entry, payload));
                    State::Copied
                }
            };
            copied.push(self.copied(Kind::Cosign, reference, state));
        }
        if !missing.is_empty() {
            let mut layers = Layers { store: &destination, missing: &missing, config: ListingConfig::default() };
            let added = tag::add(self.destination.registry, self.destination.repository(), destination.tag(), &mut layers);
            settle(&mut copied, added.await);
        }
        Ok(copied)
    }

    /// Its bytes; None if the source does not have them.
    async fn payload(&self, layer: &Layer) -> Result<Option<Bytes>, registry::Error> {
        match self.source.registry.blob(self.source.repository(), layer.payload(), MAX_PAYLOAD).await {
            Err(registry::Error::Oversized { .. }) => Ok(None),
            payload => payload,
        }
    }
}

/// Layers, with their payloads, that are added to the destination's manifest.
struct Layers<'a> {
    store: &'a SignatureTag<'a>,
    missing: &'a [(Entry, Bytes)],
    config: ListingConfig,
}

impl Addition for Layers<'_> {
    type Content = SignatureManifest;
    const MEDIA_TYPE: &'static str = media_type::OCI_MANIFEST;

    async fn upload(&self) -> Result<(), pipeline::Error> {
        Ok(self.store.upload(self.missing.iter().map(|(_, payload)| payload.clone())).await?)
    }

    async fn look(&self) -> Result<Option<(Digest, SignatureManifest)>, pipeline::Error> {
        self.store.read().await
    }

    async fn merge(&mut self, current: Option<SignatureManifest>) -> Result<Merged, pipeline::Error> {
        let mut manifest = current.unwrap_or_else(SignatureManifest::empty);
        let absent: Vec<&Entry> =
            self.missing.iter().map(|(entry, _)| entry).filter(|entry| !manifest.contains(entry.layer())).collect();
        if absent.is_empty() {
            return Ok(Merged::Complete);
        }
        let layers: Vec<Layer> = absent.iter().map(|entry| entry.layer().clone()).collect();
        if !self.config.extend(self.store, &mut manifest, &layers).await? {
            return Ok(Merged::LookAgain);
        }
        manifest.add_entries(absent).map_err(|error| self.store.unreadable(error))?;
        manifest.to_bytes().map(Merged::Write).map_err(|error| self.store.unreadable(error))
    }

    fn written(&mut self) {}

    fn is_in(&self, content: &SignatureManifest) -> bool {
        self.missing.iter().all(|(entry, _)| content.contains(entry.layer()))
    }
}
