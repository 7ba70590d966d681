//! An OCI artifact that refers to an image: one blob, and a manifest whose `subject` is the image (OCI image-spec 1.1,
//! "Guidelines for Artifact Usage"). All formats but `cosign` are stored so. Everything here is pure.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::EMPTY_CONFIG;
use crate::{
    oci::{Descriptor, Digest, media_type},
    subject::Subject,
};

/// When it was made, in RFC 3339. Whoever can write to the repository can write anything here.
pub const CREATED_ANNOTATION: &str = "org.opencontainers.image.created";

/// A referrer that can be stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Referrer {
    blob: Bytes,
    manifest: Bytes,
    /// What listings say of it: OCI distribution-spec 1.1, "Listing Referrers".
    descriptor: Descriptor,
}

impl Referrer {
    /// One blob of this media type, which is the artifact's type too unless the manifest shall say another. Same input, same
    /// bytes.
    #[must_use]
    pub fn new(
        artifact_type: &str,
        blob_type: &str,
        blob: Bytes,
        subject: &Subject,
        annotations: BTreeMap<String, String>,
    ) -> Self {
        let descriptor = |media_type: &str, digest: Digest, size: usize| Descriptor {
            media_type: media_type.to_owned(),
            digest,
            size: size as u64,
            artifact_type: None,
            platform: None,
            annotations: BTreeMap::new(),
        };
        let manifest = Written {
            schema_version: 2,
            media_type: media_type::OCI_MANIFEST,
            artifact_type,
            config: descriptor(media_type::OCI_EMPTY, Digest::of(EMPTY_CONFIG), EMPTY_CONFIG.len()),
            layers: [descriptor(blob_type, Digest::of(&blob), blob.len())],
            subject: Descriptor { size: subject.size(), ..descriptor(subject.media_type(), subject.digest().clone(), 0) },
            annotations: &annotations,
        };
        let manifest = Bytes::from(serde_json::to_vec(&manifest).expect("texts and numbers always serialise"));
        let descriptor = Descriptor {
            artifact_type: Some(artifact_type.to_owned()),
            annotations,
            ..descriptor(media_type::OCI_MANIFEST, Digest::of(&manifest), manifest.len())
        };
        Self { blob, manifest, descriptor }
    }

    pub fn blob(&self) -> &Bytes {
        &self.blob
    }

    /// Its media type is [`media_type::OCI_MANIFEST`], its config [`EMPTY_CONFIG`].
    pub fn manifest(&self) -> &Bytes {
        &self.manifest
    }

    /// The manifest's digest.
    pub fn digest(&self) -> &Digest {
        &self.descriptor.digest
    }

    /// The entry for an index of referrers.
    pub fn descriptor(&self) -> &Descriptor {
        &self.descriptor
    }
}

/// What a referrer's manifest says, if it has one blob and a subject.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReferrerManifest {
    /// Its own, or else its config's.
    pub artifact_type: String,
    pub blob: Descriptor,
    pub config: Descriptor,
    pub subject: Digest,
    pub annotations: BTreeMap<String, String>,
}

impl ReferrerManifest {
    /// # Errors
    /// A clause that says why it is none.
    pub fn read(media_type: &str, content: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Read {
            artifact_type: Option<String>,
            config: Descriptor,
            layers: Vec<Descriptor>,
            subject: Option<Subject>,
            annotations: Option<BTreeMap<String, String>>,
        }
        #[derive(Deserialize)]
        struct Subject {
            digest: Digest,
        }
        if media_type != media_type::OCI_MANIFEST {
            return Err(format!("it is {}, not an image manifest", media_type.escape_debug()));
        }
        let read: Read = serde_json::from_slice(content).map_err(|error| error.to_string())?;
        let count = read.layers.len();
        let [blob] = <[Descriptor; 1]>::try_from(read.layers).map_err(|_| format!("it has {count} blobs, not one"))?;
        Ok(Self {
            artifact_type: read.artifact_type.filter(|named| !named.is_empty()).unwrap_or_else(|| read.config.media_type.clone()),
            blob,
            config: read.config,
            subject: read.subject.ok_or("it has no subject")?.digest,
            annotations: read.annotations.unwrap_or_default(),
        })
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Written<'a> {
    schema_version: u8,
    media_type: &'a str,
    artifact_type: &'a str,
    config: Descriptor,
    layers: [Descriptor; 1],
    subject: Descriptor,
    annotations: &'a BTreeMap<String, String>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::signature::cosign::tests::{IMAGE, REFERENCE, vector};

    fn referrer(blob: Bytes, annotations: BTreeMap<String, String>) -> Referrer {
        Referrer::new("application/x.signature", "application/x.blob", blob, &Subject::in_test(REFERENCE, IMAGE), annotations)
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(blob: Vec<u8>, annotations: BTreeMap<String, String>) {
            let written = referrer(blob.clone().into(), annotations.clone());
            let read = ReferrerManifest::read(media_type::OCI_MANIFEST, written.manifest()).unwrap();
            prop_assert_eq!(read.artifact_type.as_str(), "application/x.signature");
            prop_assert_eq!((read.blob.digest, read.blob.size), (Digest::of(&blob), blob.len() as u64));
            prop_assert_eq!((read.subject, read.annotations), (Digest::of(IMAGE), annotations));
            prop_assert_eq!(written.digest(), &Digest::of(written.manifest()));
        }
    }

    #[test]
    fn manifests_of_every_layout_that_others_write_are_read() {
        let read = |content: &[u8]| ReferrerManifest::read(media_type::OCI_MANIFEST, content);
        let bundle = read(&vector("B-rsa-pkcs1", "manifest.json")).unwrap();
        assert_eq!(bundle.artifact_type, "application/vnd.dev.sigstore.bundle.v0.3+json");
        assert_eq!(bundle.subject, Digest::of(IMAGE));
        let mut typed_by_config: Value = serde_json::from_slice(&vector("B-rsa-pkcs1", "manifest.json")).unwrap();
        typed_by_config.as_object_mut().unwrap().remove("artifactType");
        typed_by_config["config"]["mediaType"] = json!("application/vnd.cncf.notary.signature");
        let typed_by_config = read(typed_by_config.to_string().as_bytes()).unwrap();
        assert_eq!(typed_by_config.artifact_type, "application/vnd.cncf.notary.signature");
    }

    #[test]
    fn what_is_no_referrer_with_one_blob_is_refused() {
        let good: Value = serde_json::from_slice(&vector("B-rsa-pkcs1", "manifest.json")).unwrap();
        let with = |key: &str, value: Value| {
            let mut changed = good.clone();
            changed[key] = value;
            changed.to_string()
        };
        let two = json!([good["layers"][0], good["layers"][0]]);
        for bad in
            [with("layers", json!([])), with("layers", two), with("subject", Value::Null), with("config", json!(1)), "x".into()]
        {
            assert!(ReferrerManifest::read(media_type::OCI_MANIFEST, bad.as_bytes()).is_err(), "{bad}");
        }
        assert!(ReferrerManifest::read(media_type::DOCKER_MANIFEST, good.to_string().as_bytes()).is_err());
    }
}
