//! Media types by which a signature, attestation or SBOM is told from an image. A list of what to leave alone, not of what
//! to sign: Helm charts and other artifacts are signed like images.

use crate::signature::{cosign, notation};

/// Whether a manifest with a config of this type (or of this `artifactType`) belongs to another manifest.
pub fn is_config(media_type: &str) -> bool {
    is_bundle(media_type)
        || matches!(
            media_type,
            cosign::ARTIFACT_TYPE
                | "application/vnd.dev.cosign.artifact.att.v1+json"
                | "application/vnd.dev.cosign.artifact.sbom.v1+json"
                | notation::ARTIFACT_TYPE
                | "application/vnd.in-toto+json"
        )
}

/// Whether a manifest whose layers are all of such types belongs to another manifest.
pub fn is_layer(media_type: &str) -> bool {
    is_bundle(media_type)
        || matches!(
            media_type,
            cosign::LAYER_MEDIA_TYPE
                | "application/vnd.dsse.envelope.v1+json"
                | "application/vnd.in-toto+json"
                | "application/jose+json"
                | "application/cose"
                | "text/spdx"
                | "text/spdx+json"
                | "application/vnd.cyclonedx+json"
                | "application/vnd.cyclonedx+xml"
                | "application/vnd.syft+json"
        )
}

/// Whether a referrer of this type is a signature, or a bundle, of which some are attestations instead.
pub fn is_signature(artifact_type: &str) -> bool {
    is_bundle(artifact_type) || matches!(artifact_type, notation::ARTIFACT_TYPE | cosign::ARTIFACT_TYPE)
}

/// Whichever the version of the bundle.
pub fn is_bundle(media_type: &str) -> bool {
    media_type.starts_with("application/vnd.dev.sigstore.bundle")
}
