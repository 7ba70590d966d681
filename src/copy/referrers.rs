//! Signatures that are referrers: each a manifest of its own, which keeps its bytes and so its digest.

use std::collections::HashMap;

use bytes::Bytes;

use super::{Copied, Error, Kind, MOST_LAYERS, Route, State, settle};
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
    signature::{bundle::MAX_BUNDLE, cosign, referrer::ReferrerManifest},
    verify::Stored,
};

/// Of all blobs of one referrer: a bundle and its config are the largest.
const MOST_BYTES: u64 = 2 * MAX_BUNDLE;

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
        let mut stored = vec![];
        let mut layers = 0;
        // Why the destination takes none at the moment.
        let mut unavailable = None;
        for entry in listed.entries() {
            let Some((kind, manifest, read)) = self.signature(entry).await? else { continue };
            let is_there = there.entries().iter().any(|entry| entry.digest == *manifest.digest());
            let unwritten = self.unwritten(is_there);
            if kind == Kind::CosignReferrer {
                layers += read.blobs.len();
                if layers > MOST_LAYERS {
                    let reason = "with it there are more than a thousand layers in referrers, and no more are copied";
                    let state = unwritten.filter(|state| *state != State::Missing).unwrap_or(State::LeftOut { reason });
                    copied.push(self.copied(kind, None, state));
                    continue;
                }
            }
            // What a layer approves is in its payload.
            let is_wanted = kind == Kind::CosignReferrer || matches!(unwritten, None | Some(State::Missing));
            let Blobs { had, lack } = if is_wanted { self.blobs(&read).await? } else { Blobs::default() };
            let references = match kind {
                Kind::CosignReferrer => references(&read, &had),
                Kind::Cosign | Kind::Bundle | Kind::Notation => vec![None],
            };
            let state = match (unwritten, lack) {
                (None | Some(State::Missing), Some(reason)) => State::LeftOut { reason },
                (Some(state), _) => state,
                (None, None) => {
                    let state = match unavailable.clone() {
                        Some(state) => state,
                        None => self.store(&manifest, had).await,
                    };
                    match &state {
                        State::Copied => stored.push(descriptor(&manifest, &read)),
                        State::Failed { retry: true, .. } => unavailable = Some(state.clone()),
                        _ => {}
                    }
                    state
                }
            };
            copied.extend(references.into_iter().map(|reference| self.copied(kind, reference, state.clone())));
        }
        if !stored.is_empty() {
            let listed = self.list(&stored, there.is_by_api()).await;
            settle(&mut copied, listed);
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
        let types = [Some(&read.artifact_type), read.blob().map(|blob| &blob.media_type)];
        let kind = if types.into_iter().flatten().any(|named| attachment::is_bundle(named)) {
            Kind::Bundle
        } else if read.artifact_type == cosign::ARTIFACT_TYPE {
            Kind::CosignReferrer
        } else if attachment::is_signature(&read.artifact_type) {
            Kind::Notation
        } else {
            return Ok(None);
        };
        let is_whole = kind == Kind::CosignReferrer || read.blob().is_some();
        let counts = is_whole && read.subject == *self.subject && Stored::other_predicate(&read.annotations).is_none();
        Ok(counts.then_some((kind, manifest, read)))
    }

    /// What the manifest needs, up to the first that cannot be had.
    async fn blobs(&self, read: &ReferrerManifest) -> Result<Blobs, registry::Error> {
        let mut blobs = Blobs::default();
        let mut left = MOST_BYTES;
        for Descriptor { digest, .. } in read.blobs.iter().chain([&read.config]) {
            if blobs.had.contains_key(digest) {
                continue;
            }
            blobs.lack = match self.source.registry.blob(self.source.repository(), digest, left).await {
                Err(registry::Error::Oversized { .. }) => Some("its content is larger than any that is copied"),
                Ok(None) => Some("its content is missing in the source, so it counts nowhere"),
                Ok(Some(blob)) => {
                    left -= (blob.len() as u64).min(left);
                    blobs.had.insert(digest.clone(), blob);
                    continue;
                }
                Err(error) => return Err(error),
            };
            break;
        }
        Ok(blobs)
    }

    async fn store(&self, manifest: &Manifest, blobs: HashMap<Digest, Bytes>) -> State {
        let (registry, repository) = (self.destination.registry, self.destination.repository());
        let blobs: Vec<Bytes> = blobs.into_values().collect();
        let stored = store(registry, repository, &blobs, manifest.digest(), manifest.content()).await;
        stored.map_or_else(|error| State::failed(&error), |()| State::Copied)
    }

    /// Sees to it that what is stored is found from its image.
    async fn list(&self, stored: &[Descriptor], by_api: bool) -> Result<(), pipeline::Error> {
        let (registry, repository) = (self.destination.registry, self.destination.repository());
        let digests: Vec<_> = stored.iter().map(|entry| &entry.digest).collect();
        if by_api && are_listed(registry, repository, self.subject, &digests).await? {
            return Ok(());
        }
        tag::add(registry, repository, &Tag::referrers(self.subject), &mut Entries { route: self, stored }).await
    }
}

/// What a manifest needs, and why not all of it can be had, if it cannot.
#[derive(Default)]
struct Blobs {
    had: HashMap<Digest, Bytes>,
    lack: Option<&'static str>,
}

/// As what each of the layers says that it approves the digest.
fn references(read: &ReferrerManifest, payloads: &HashMap<Digest, Bytes>) -> Vec<Option<String>> {
    let said = |layer: &Descriptor| Some(cosign::Statement::read(payloads.get(&layer.digest)?).ok()?.reference);
    read.blobs.iter().map(said).collect()
}

/// Entries that are added to the destination's index under the fallback tag.
struct Entries<'a> {
    route: &'a Route<'a>,
    stored: &'a [Descriptor],
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
        for entry in self.stored {
            index.add(entry).map_err(full)?;
        }
        index.to_bytes().map(Merged::Write).map_err(full)
    }

    fn written(&mut self) {}

    fn is_in(&self, content: &ReferrersIndex) -> bool {
        self.stored.iter().all(|entry| content.contains(&entry.digest))
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
