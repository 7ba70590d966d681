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

/// cosign reads no more layers than these.
const MAX_BLOBS: usize = 1000;

/// A referrer that can be stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Referrer {
    blob: Bytes,
    manifest: Bytes,
    /// What listings say of it: OCI distribution-spec 1.1, "Listing Referrers".
    descriptor: Descriptor,
    older: Option<Box<Referrer>>,
}

impl Referrer {
    /// One blob of this media type, which is the artifact's type too unless the manifest shall say another. Same input, same
    /// bytes.
    #[must_use]
    pub fn new(
        layouts: Layouts,
        artifact_type: &str,
        blob_type: &str,
        blob: &Bytes,
        subject: &Subject,
        annotations: &BTreeMap<String, String>,
    ) -> Self {
        let descriptor = |media_type: &str, digest: Digest, size: usize| Descriptor {
            media_type: media_type.to_owned(),
            digest,
            size: size as u64,
            artifact_type: None,
            platform: None,
            annotations: BTreeMap::new(),
        };
        let build = |named: Option<&str>, config_type: &str| {
            let manifest = Written {
                schema_version: 2,
                media_type: media_type::OCI_MANIFEST,
                artifact_type: named,
                config: descriptor(config_type, Digest::of(EMPTY_CONFIG), EMPTY_CONFIG.len()),
                layers: [descriptor(blob_type, Digest::of(blob), blob.len())],
                subject: Descriptor { size: subject.size(), ..descriptor(subject.media_type(), subject.digest().clone(), 0) },
                annotations,
            };
            let manifest = Bytes::from(serde_json::to_vec(&manifest).expect("texts and numbers always serialise"));
            let descriptor = Descriptor {
                artifact_type: Some(artifact_type.to_owned()),
                annotations: annotations.clone(),
                ..descriptor(media_type::OCI_MANIFEST, Digest::of(&manifest), manifest.len())
            };
            Self { blob: blob.clone(), manifest, descriptor, older: None }
        };
        let older = || Box::new(build(None, artifact_type));
        let older = (layouts == Layouts::CurrentOrOlder).then(older);
        Self { older, ..build(Some(artifact_type), media_type::OCI_EMPTY) }
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

    /// The same artifact for registries that refuse a manifest with an `artifactType` or an empty config: the type is the config's.
    /// None where no reader would take that.
    pub fn older(&self) -> Option<&Self> {
        self.older.as_deref()
    }

    /// The entry for an index of referrers.
    pub fn descriptor(&self) -> &Descriptor {
        &self.descriptor
    }
}

/// Where manifests may say what kind of artifact they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layouts {
    /// In `artifactType`, and the config is the empty one: OCI image-spec 1.1.
    Current,
    /// Or, where a registry takes no such manifest, in the config's media type: what this artifact's readers take as well.
    CurrentOrOlder,
}

/// What a referrer's manifest says, if it has blobs and a subject.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReferrerManifest {
    /// Its own, or else its config's.
    pub artifact_type: String,
    /// At least one, and one alone in all formats but cosign's own ([`super::cosign::ARTIFACT_TYPE`]).
    pub blobs: Vec<Descriptor>,
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
        if read.layers.is_empty() || read.layers.len() > MAX_BLOBS {
            return Err(format!("it has {} blobs, not 1 to {MAX_BLOBS}", read.layers.len()));
        }
        Ok(Self {
            artifact_type: read.artifact_type.filter(|named| !named.is_empty()).unwrap_or_else(|| read.config.media_type.clone()),
            blobs: read.layers,
            config: read.config,
            subject: read.subject.ok_or("it has no subject")?.digest,
            annotations: read.annotations.unwrap_or_default(),
        })
    }

    /// The blob, where there is one alone.
    #[must_use]
    pub fn blob(&self) -> Option<&Descriptor> {
        match self.blobs.as_slice() {
            [blob] => Some(blob),
            _ => None,
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Written<'a> {
    schema_version: u8,
    media_type: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    artifact_type: Option<&'a str>,
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

    fn referrer(blob: &Bytes, annotations: &BTreeMap<String, String>) -> Referrer {
        let (layouts, subject) = (Layouts::CurrentOrOlder, Subject::in_test(REFERENCE, IMAGE));
        Referrer::new(layouts, "application/x.signature", "application/x.blob", blob, &subject, annotations)
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(blob: Vec<u8>, annotations: BTreeMap<String, String>) {
            let current = referrer(&blob.clone().into(), &annotations);
            for written in [&current, current.older().unwrap()] {
                let read = ReferrerManifest::read(media_type::OCI_MANIFEST, written.manifest()).unwrap();
                prop_assert_eq!(read.artifact_type.as_str(), "application/x.signature");
                let found = read.blob().unwrap();
                prop_assert_eq!((&found.digest, found.size), (&Digest::of(&blob), blob.len() as u64));
                prop_assert_eq!((&read.subject, &read.annotations), (&Digest::of(IMAGE), &annotations));
                prop_assert_eq!(written.digest(), &Digest::of(written.manifest()));
            }
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
    fn what_is_no_referrer_with_blobs_is_refused() {
        let good: Value = serde_json::from_slice(&vector("B-rsa-pkcs1", "manifest.json")).unwrap();
        let with = |key: &str, value: Value| {
            let mut changed = good.clone();
            changed[key] = value;
            changed.to_string()
        };
        let blobs = |count: usize| with("layers", Value::Array(vec![good["layers"][0].clone(); count]));
        let two = ReferrerManifest::read(media_type::OCI_MANIFEST, blobs(2).as_bytes()).unwrap();
        assert_eq!((two.blobs.len(), two.blob()), (2, None));
        for bad in [blobs(0), blobs(MAX_BLOBS + 1), with("subject", Value::Null), with("config", json!(1)), "x".into()] {
            assert!(ReferrerManifest::read(media_type::OCI_MANIFEST, bad.as_bytes()).is_err(), "{bad}");
        }
        assert!(ReferrerManifest::read(media_type::DOCKER_MANIFEST, good.to_string().as_bytes()).is_err());
    }
}
