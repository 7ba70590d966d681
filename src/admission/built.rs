//! When an image was built, by its own account: the `created` of its config (OCI image-spec 1.1, "Image Configuration"),
//! which its digest covers, and so its signature.

use bytes::Bytes;
use jiff::Timestamp;
use serde::Deserialize;

use crate::{
    oci::{Descriptor, Digest, Reference, media_type},
    registry::{self, Address, Manifest, Registry},
};

/// Bytes of a config; those of real images are some thousand.
const LARGEST_CONFIG: u64 = 4 << 20;
/// Platforms of an index that are looked at; of one that has more, the age is not known.
const MOST_PLATFORMS: usize = 32;

/// The time of the image, or of the oldest platform of an index: any of them may run. None if one of them does not say.
pub(super) async fn built(registry: &Registry, image: &Reference) -> Result<Option<Timestamp>, registry::Error> {
    let Some(digest) = &image.digest else { return Ok(None) };
    let Some(manifest) = read(registry, image, digest).await? else { return Ok(None) };
    if !media_type::is_index(manifest.media_type()) {
        return of_manifest(registry, image, &manifest).await;
    }
    let platforms = platforms(manifest.content());
    if platforms.is_empty() || platforms.len() > MOST_PLATFORMS {
        return Ok(None);
    }
    let mut oldest = Timestamp::MAX;
    for platform in platforms {
        let Some(manifest) = read(registry, image, &platform).await? else { return Ok(None) };
        let Some(created) = of_manifest(registry, image, &manifest).await? else { return Ok(None) };
        oldest = oldest.min(created);
    }
    Ok(Some(oldest))
}

/// The digests that an index lists.
pub(super) fn children(index: &Bytes) -> Vec<Digest> {
    descriptors(index).into_iter().map(|descriptor| descriptor.digest).collect()
}

/// Those of them that are for a machine: not the attestations that build tools list beside them.
fn platforms(index: &Bytes) -> Vec<Digest> {
    let is_image = |descriptor: &Descriptor| descriptor.platform.as_ref().is_none_or(|platform| platform.os != "unknown");
    descriptors(index).into_iter().filter(is_image).map(|descriptor| descriptor.digest).collect()
}

fn descriptors(index: &Bytes) -> Vec<Descriptor> {
    #[derive(Deserialize)]
    struct Index {
        manifests: Vec<Descriptor>,
    }
    serde_json::from_slice::<Index>(index).map(|index| index.manifests).unwrap_or_default()
}

async fn read(registry: &Registry, image: &Reference, digest: &Digest) -> Result<Option<Manifest>, registry::Error> {
    registry.manifest(&image.repository, &Address::Digest(digest.clone())).await
}

async fn of_manifest(registry: &Registry, image: &Reference, manifest: &Manifest) -> Result<Option<Timestamp>, registry::Error> {
    #[derive(Deserialize)]
    struct OfImage {
        config: Descriptor,
    }
    #[derive(Deserialize)]
    struct Config {
        created: Option<Timestamp>,
    }
    let Ok(OfImage { config }) = serde_json::from_slice(manifest.content()) else { return Ok(None) };
    let Some(content) = registry.blob(&image.repository, &config.digest, LARGEST_CONFIG).await? else { return Ok(None) };
    Ok(serde_json::from_slice(&content).ok().and_then(|config: Config| config.created))
}
