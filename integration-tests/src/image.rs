//! Images made in memory, without an engine: small, and different for each seed.

use std::io::Write;

use anyhow::Result;
use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
pub const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

/// `sha256:` and 64 hex digits of the bytes.
pub fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

/// A manifest or an index, as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    pub media_type: String,
    pub digest: String,
    pub bytes: Bytes,
}

impl Manifest {
    pub fn new(media_type: &str, bytes: impl Into<Bytes>) -> Self {
        let bytes = bytes.into();
        Self { media_type: media_type.to_owned(), digest: digest(&bytes), bytes }
    }

    fn of(media_type: &str, value: &Value) -> Self {
        Self::new(media_type, value.to_string())
    }

    fn descriptor(&self, platform: Option<(&str, &str)>) -> Value {
        let mut descriptor = json!({"mediaType": self.media_type, "digest": self.digest, "size": self.bytes.len()});
        if let Some((os, architecture)) = platform {
            descriptor["platform"] = json!({"os": os, "architecture": architecture});
        }
        descriptor
    }
}

/// What is pushed: blobs, then the children, then the manifest that a tag points to.
#[derive(Debug, Clone)]
pub struct Image {
    pub blobs: Vec<Bytes>,
    /// By name: an architecture, `attestation`, or `index` for an index inside an index.
    pub children: Vec<(String, Manifest)>,
    pub manifest: Manifest,
}

/// The two manifest dialects that engines write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    Oci,
    Docker,
}

impl Image {
    /// An OCI image for linux/amd64.
    pub fn oci(seed: &str) -> Result<Self> {
        Self::single(seed, "amd64", Dialect::Oci)
    }

    /// A Docker schema 2 image for linux/amd64.
    pub fn docker(seed: &str) -> Result<Self> {
        Self::single(seed, "amd64", Dialect::Docker)
    }

    /// An OCI index as `BuildKit` writes it: amd64, arm64, and the attestation of the first.
    pub fn index(seed: &str) -> Result<Self> {
        let amd64 = Self::single(seed, "amd64", Dialect::Oci)?;
        let arm64 = Self::single(seed, "arm64", Dialect::Oci)?;
        let attestation = Self::attestation(seed, &amd64.manifest);
        let mut attested = attestation.manifest.descriptor(Some(("unknown", "unknown")));
        attested["annotations"] =
            json!({"vnd.docker.reference.type": "attestation-manifest", "vnd.docker.reference.digest": amd64.manifest.digest});
        let manifests = json!([
            amd64.manifest.descriptor(Some(("linux", "amd64"))),
            arm64.manifest.descriptor(Some(("linux", "arm64"))),
            attested,
        ]);
        let parts = [("amd64", amd64), ("arm64", arm64), ("attestation", attestation)];
        Ok(Self::over(
            parts,
            &Manifest::of(OCI_INDEX, &json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests})),
        ))
    }

    /// A Docker manifest list of amd64 and arm64.
    pub fn docker_list(seed: &str) -> Result<Self> {
        let amd64 = Self::single(seed, "amd64", Dialect::Docker)?;
        let arm64 = Self::single(seed, "arm64", Dialect::Docker)?;
        let manifests =
            json!([amd64.manifest.descriptor(Some(("linux", "amd64"))), arm64.manifest.descriptor(Some(("linux", "arm64")))]);
        let list = Manifest::of(DOCKER_LIST, &json!({"schemaVersion": 2, "mediaType": DOCKER_LIST, "manifests": manifests}));
        Ok(Self::over([("amd64", amd64), ("arm64", arm64)], &list))
    }

    /// An index that holds an index (amd64, arm64, attestation) and an image of its own for s390x.
    pub fn nested_index(seed: &str) -> Result<Self> {
        let inner = Self::index(seed)?;
        let own = Self::single(seed, "s390x", Dialect::Oci)?;
        let manifests = json!([inner.manifest.descriptor(None), own.manifest.descriptor(Some(("linux", "s390x")))]);
        let outer = Manifest::of(OCI_INDEX, &json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}));
        Ok(Self::over([("index", inner), ("s390x", own)], &outer))
    }

    /// The manifest of the child with this name.
    ///
    /// # Panics
    /// If the image has no such child.
    pub fn child(&self, name: &str) -> &Manifest {
        let found = self.children.iter().find(|(child, _)| child == name);
        &found.unwrap_or_else(|| panic!("the image has no child {name}")).1
    }

    fn single(seed: &str, architecture: &str, dialect: Dialect) -> Result<Self> {
        let (manifest_type, config_type, layer_type) = match dialect {
            Dialect::Oci => (OCI_MANIFEST, OCI_CONFIG, OCI_LAYER),
            Dialect::Docker => (
                DOCKER_MANIFEST,
                "application/vnd.docker.container.image.v1+json",
                "application/vnd.docker.image.rootfs.diff.tar.gzip",
            ),
        };
        let tar = tar_of("etc/image", format!("{seed} {architecture}\n").as_bytes())?;
        let layer = Bytes::from(gzip(&tar)?);
        let config = Bytes::from(
            json!({
                "architecture": architecture,
                "os": "linux",
                "config": {"Labels": {"seed": seed}},
                "rootfs": {"type": "layers", "diff_ids": [digest(&tar)]},
            })
            .to_string(),
        );
        let manifest = Manifest::of(
            manifest_type,
            &json!({
                "schemaVersion": 2,
                "mediaType": manifest_type,
                "config": {"mediaType": config_type, "digest": digest(&config), "size": config.len()},
                "layers": [{"mediaType": layer_type, "digest": digest(&layer), "size": layer.len()}],
            }),
        );
        Ok(Self { blobs: vec![layer, config], children: Vec::new(), manifest })
    }

    fn attestation(seed: &str, of: &Manifest) -> Self {
        let statement = Bytes::from(
            json!({
                "_type": "https://in-toto.io/Statement/v1",
                "subject": [{"name": seed, "digest": {"sha256": of.digest.trim_start_matches("sha256:")}}],
                "predicateType": "https://slsa.dev/provenance/v1",
                "predicate": {},
            })
            .to_string(),
        );
        let config = Bytes::from(
            json!({"architecture": "unknown", "os": "unknown", "rootfs": {"type": "layers", "diff_ids": [digest(&statement)]}})
                .to_string(),
        );
        let manifest = Manifest::of(
            OCI_MANIFEST,
            &json!({
                "schemaVersion": 2,
                "mediaType": OCI_MANIFEST,
                "config": {"mediaType": OCI_CONFIG, "digest": digest(&config), "size": config.len()},
                "layers": [{
                    "mediaType": "application/vnd.in-toto+json",
                    "digest": digest(&statement),
                    "size": statement.len(),
                    "annotations": {"in-toto.io/predicate-type": "https://slsa.dev/provenance/v1"},
                }],
            }),
        );
        Self { blobs: vec![statement, config], children: Vec::new(), manifest }
    }

    fn over<const N: usize>(parts: [(&str, Self); N], top: &Manifest) -> Self {
        let mut whole = Self { blobs: Vec::new(), children: Vec::new(), manifest: top.clone() };
        for (name, part) in parts {
            whole.blobs.extend(part.blobs);
            whole.children.extend(part.children);
            whole.children.push((name.to_owned(), part.manifest));
        }
        whole
    }
}

fn tar_of(path: &str, content: &[u8]) -> Result<Vec<u8>> {
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    let mut archive = tar::Builder::new(Vec::new());
    archive.append_data(&mut header, path, content)?;
    Ok(archive.into_inner()?)
}

fn gzip(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes)?;
    Ok(encoder.finish()?)
}
