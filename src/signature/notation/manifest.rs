//! The manifest that makes an envelope a referrer of its image, as notation's readers take it. Ours is a [`super::Referrer`].

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{Envelope, Error, MAX_ENVELOPE};
use crate::{
    oci::{Descriptor, Digest, media_type},
    registry::Manifest,
};

/// By this, referrers are known to be notation's signatures.
pub const ARTIFACT_TYPE: &str = "application/vnd.cncf.notary.signature";
/// The annotation that names the certificates: a JSON list of [`crate::certificate::Chain::thumbprints`], as text.
pub const THUMBPRINTS: &str = "io.cncf.notary.x509chain.thumbprint#S256";

/// As OCI image-spec 1.1 has it, or as notation 1 writes it: with the type in the config, and no `artifactType`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    #[serde(default)]
    artifact_type: Option<String>,
    config: Descriptor,
    layers: Vec<Descriptor>,
    subject: Descriptor,
    #[serde(default, deserialize_with = "crate::oci::null_is_none")]
    annotations: BTreeMap<String, String>,
}

/// What a manifest that claims to be a notation signature says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignatureManifest {
    /// The image that it refers to.
    pub subject: Digest,
    pub envelope: Envelope,
    /// Where the envelope's bytes are, and how many: at most [`MAX_ENVELOPE`].
    pub content: Digest,
    pub size: u64,
    /// Of the certificates, the leaf first, as the annotation has them. Nobody vouches for it: it saves fetching what is
    /// certainly somebody else's.
    pub thumbprints: Vec<String>,
}

impl SignatureManifest {
    /// # Errors
    /// If it is none: another kind of referrer, a mixture of both layouts, or without exactly one envelope.
    pub fn read(media_type: &str, content: &[u8]) -> Result<Self, Error> {
        if media_type != media_type::OCI_MANIFEST {
            return Err(Error::Unexpected("media type", media_type.chars().take(80).collect(), media_type::OCI_MANIFEST));
        }
        if content.len() > Manifest::LIMIT {
            return Err(Error::TooLarge(content.len()));
        }
        let document: Document =
            serde_json::from_slice(content).map_err(|error| Error::Malformed("its manifest", error.to_string()))?;
        match (document.artifact_type.as_deref(), document.config.media_type.as_str()) {
            (Some(ARTIFACT_TYPE), media_type::OCI_EMPTY) | (None, ARTIFACT_TYPE) => {}
            _ => return Err(Error::Broken("its manifest is not that of a notation signature")),
        }
        let [layer] = document.layers.as_slice() else {
            return Err(Error::Broken("its manifest does not have exactly one layer"));
        };
        let envelope = Envelope::of_media_type(&layer.media_type).ok_or_else(|| {
            let found = layer.media_type.chars().take(80).collect();
            Error::Unexpected("envelope's media type", found, "application/jose+json or application/cose")
        })?;
        if layer.size > MAX_ENVELOPE {
            return Err(Error::TooLarge(usize::try_from(layer.size).unwrap_or(usize::MAX)));
        }
        Ok(Self {
            subject: document.subject.digest,
            envelope,
            content: layer.digest.clone(),
            size: layer.size,
            thumbprints: thumbprints(&document.annotations).unwrap_or_default(),
        })
    }
}

/// The certificates that a referrer's annotations name, the leaf first. None if they name none.
#[must_use]
pub fn thumbprints(annotations: &BTreeMap<String, String>) -> Option<Vec<String>> {
    serde_json::from_str(annotations.get(THUMBPRINTS)?).ok()
}
