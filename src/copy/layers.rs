//! Signatures under the `.sig` tag: layers of one manifest.

use std::collections::HashMap;

use bytes::Bytes;

use super::{Copied, Error, Kind, MOST_LAYERS, Route, State, settle};
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

/// Bytes of all payloads of one image: some hundred have each a few hundred, and anybody who can push can add larger ones.
const MOST_BYTES: usize = 16 * 1024 * 1024;

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
        let mut payloads = Payloads::default();
        for (place, entry) in found.entries().enumerate() {
            let payload = if place < MOST_LAYERS {
                self.payload(entry.layer(), &mut payloads).await?
            } else {
                Err("it is behind a thousand others, and cosign reads no more")
            };
            let said = payload.as_ref().ok().and_then(|payload| Statement::read(payload).ok());
            let reference = said.map(|said| said.reference);
            let state = match (self.unwritten(there.contains(entry.layer())), payload) {
                (None | Some(State::Missing), Err(reason)) => State::LeftOut { reason },
                (Some(state), _) => state,
                (None, Ok(payload)) => {
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

    /// Its bytes, or why they cannot be had.
    async fn payload(&self, layer: &Layer, known: &mut Payloads) -> Result<Payload, registry::Error> {
        if let Some(payload) = known.read.get(layer.payload()) {
            return Ok(payload.clone());
        }
        if known.bytes > MOST_BYTES {
            return Ok(Err("the payloads before it are larger in all than those of any image"));
        }
        let payload = match self.source.registry.blob(self.source.repository(), layer.payload(), MAX_PAYLOAD).await {
            Ok(Some(payload)) => Ok(payload),
            Ok(None) => Err("its payload is missing in the source, so it counts nowhere"),
            Err(registry::Error::Oversized { .. }) => Err("its payload is larger than any that is read"),
            Err(error) => return Err(error),
        };
        known.bytes += payload.as_ref().map_or(0, Bytes::len);
        known.read.insert(layer.payload().clone(), payload.clone());
        Ok(payload)
    }
}

/// A layer's payload, or why it cannot be had.
type Payload = Result<Bytes, &'static str>;

/// Layers may share them: two signatures over one payload do.
#[derive(Default)]
struct Payloads {
    read: HashMap<Digest, Payload>,
    bytes: usize,
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
