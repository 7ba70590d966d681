//! Reads what is stored under the `.sig` tag and checks it here, apart from the daemon and from the judges: where a test has
//! to count signatures, accepted or refused is not enough.

use anyhow::{Context, Result, anyhow, ensure};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, RSA_PKCS1_2048_8192_SHA256, UnparsedPublicKey, VerificationAlgorithm};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde_json::Value;

use crate::image::{Manifest, OCI_MANIFEST, digest};
use crate::registry::Client;

pub const SIMPLE_SIGNING: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
const ANNOTATION: &str = "dev.cosignproject.cosign/signature";

/// A public key, RSA or P-256.
#[derive(Debug, Clone)]
pub struct PublicKey {
    spki: Vec<u8>,
}

impl PublicKey {
    pub fn from_pem(pem: &str) -> Result<Self> {
        let body: String = pem.lines().filter(|line| !line.starts_with("-----")).collect();
        Ok(Self { spki: STANDARD.decode(body).context("the PEM's base64")? })
    }

    /// Verifies nothing.
    pub fn none() -> Self {
        Self { spki: Vec::new() }
    }

    pub fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        let algorithms: [&'static dyn VerificationAlgorithm; 2] = [&ECDSA_P256_SHA256_ASN1, &RSA_PKCS1_2048_8192_SHA256];
        algorithms.into_iter().any(|algorithm| UnparsedPublicKey::new(algorithm, &self.spki).verify(message, signature).is_ok())
    }
}

/// One layer of a `.sig` manifest.
#[derive(Debug, Clone)]
pub struct Signature {
    /// What the signature names: `host/repo:tag` or the like.
    pub reference: String,
    /// Which manifest it says was signed; whoever wrote it may lie.
    pub digest: String,
    payload: Bytes,
    bytes: Vec<u8>,
}

impl Signature {
    /// Whether `key` made it, over this payload.
    pub fn is_by(&self, key: &PublicKey) -> bool {
        key.verifies(&self.payload, &self.bytes)
    }
}

/// The tag under which signatures of this digest are kept.
pub fn tag_of(digest: &str) -> String {
    format!("{}.sig", digest.replace(':', "-"))
}

/// Every signature of the digest, by whomever; an error if what is stored cannot be read as `formats` demands it.
pub async fn signatures(registry: &Client, repository: &str, image: &str) -> Result<Vec<Signature>> {
    let Some(manifest) = registry.manifest(repository, &tag_of(image)).await? else {
        return Ok(Vec::new());
    };
    let mut signatures = Vec::new();
    for layer in layers(&manifest)? {
        let payload_digest = layer["digest"].as_str().context("a layer without a digest")?;
        let payload = registry.blob(repository, payload_digest).await?;
        ensure!(digest(&payload) == payload_digest, "the payload of {repository}@{image} is not what its digest says");
        let critical = &serde_json::from_slice::<Value>(&payload).context("the payload")?["critical"];
        let signature = layer["annotations"][ANNOTATION].as_str().context("a layer without a signature")?;
        signatures.push(Signature {
            reference: text(critical, "/identity/docker-reference")?,
            digest: text(critical, "/image/docker-manifest-digest")?,
            bytes: STANDARD.decode(signature).context("the signature's base64")?,
            payload,
        });
    }
    Ok(signatures)
}

/// The references that `key` signed for this digest, sorted; one that was signed twice is there twice.
pub async fn signed_references(registry: &Client, repository: &str, image: &str, key: &PublicKey) -> Result<Vec<String>> {
    let signatures = signatures(registry, repository, image).await?;
    let valid = signatures.into_iter().filter(|signature| signature.digest == image && signature.is_by(key));
    let mut references: Vec<_> = valid.map(|signature| signature.reference).collect();
    references.sort();
    Ok(references)
}

fn layers(manifest: &Manifest) -> Result<Vec<Value>> {
    ensure!(manifest.media_type == OCI_MANIFEST, "a signature manifest of type {}", manifest.media_type);
    let manifest: Value = serde_json::from_slice(&manifest.bytes).context("the signature manifest")?;
    let layers = manifest["layers"].as_array().context("a signature manifest without layers")?;
    for layer in layers {
        ensure!(layer["mediaType"] == SIMPLE_SIGNING, "a layer of type {} among signatures", layer["mediaType"]);
    }
    Ok(layers.clone())
}

fn text(value: &Value, pointer: &str) -> Result<String> {
    let found = value.pointer(pointer).and_then(Value::as_str);
    Ok(found.ok_or_else(|| anyhow!("the payload has no {pointer}"))?.to_owned())
}
