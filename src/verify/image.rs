//! All signatures of an image in its registry, each judged.

use std::collections::HashMap;

use bytes::Bytes;
use jiff::Timestamp;
use serde::Serialize;

use super::{Rejection, Trust, Verified, Wanted, signature};
use crate::{
    oci::{Digest, Reference, Tag},
    registry::{self, Address, Registry},
    signature::cosign::{MAX_PAYLOAD, SignatureManifest},
};

/// What is known of an image's signatures.
#[derive(Debug, Clone, Serialize)]
pub struct Examination {
    pub reference: Reference,
    /// What the reference resolves to; None if the registry has no such image.
    pub digest: Option<Digest>,
    pub signatures: Vec<Examined>,
    /// Why nothing could be read where signatures are, although something is there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unreadable: Option<String>,
}

/// One signature, and whether it counts.
#[derive(Debug, Clone, Serialize)]
pub struct Examined {
    pub format: &'static str,
    #[serde(flatten)]
    pub verdict: Judgement,
}

#[derive(Debug, Clone, Serialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
pub enum Judgement {
    Verified(Verified),
    Rejected { reason: Rejection, message: String },
}

impl Examination {
    /// The signatures that stand.
    pub fn verified(&self) -> impl Iterator<Item = &Verified> {
        self.signatures.iter().filter_map(|examined| match &examined.verdict {
            Judgement::Verified(verified) => Some(verified),
            Judgement::Rejected { .. } => None,
        })
    }

    /// Whether at least one signature stands.
    #[must_use]
    pub fn is_attested(&self) -> bool {
        self.verified().next().is_some()
    }
}

/// Resolves the reference, and judges every signature that the registry has for what it resolves to.
///
/// # Errors
/// When the registry could not be asked: that is no answer, neither way.
pub async fn examine(
    registry: &Registry,
    reference: &Reference,
    trusts: &[Trust<'_>],
    now: Timestamp,
) -> Result<Examination, registry::Error> {
    let repository = &reference.repository;
    let mut examination = Examination { reference: reference.clone(), digest: None, signatures: vec![], unreadable: None };
    let digest = match (&reference.digest, &reference.tag) {
        (Some(digest), _) => registry.manifest(repository, &Address::Digest(digest.clone())).await?.map(|_| digest.clone()),
        (None, Some(tag)) => registry.resolve(repository, tag).await?,
        (None, None) => registry.resolve(repository, &Tag::latest()).await?,
    };
    let Some(digest) = digest else { return Ok(examination) };
    examination.digest = Some(digest.clone());
    let Some(tag) = Tag::cosign_signatures(&digest) else { return Ok(examination) };
    let Some(manifest) = registry.manifest(repository, &Address::Tag(tag)).await? else { return Ok(examination) };
    let manifest = match SignatureManifest::read(manifest.media_type(), manifest.content()) {
        Ok(manifest) => manifest,
        Err(error) => {
            examination.unreadable = Some(error.to_string());
            return Ok(examination);
        }
    };
    let wanted = Wanted { digest, reference: reference.clone() };
    let mut fetched: HashMap<&Digest, Option<Bytes>> = HashMap::new();
    for layer in manifest.layers() {
        // The payload of a signature that nobody trusted made is not worth a request, and any other is worth one.
        let payload = match fetched.get(layer.payload()) {
            Some(payload) => payload.clone(),
            None if super::signer(layer, trusts, now).is_none() => None,
            None => {
                let payload = registry.blob(repository, layer.payload(), MAX_PAYLOAD).await?;
                fetched.entry(layer.payload()).or_insert(payload).clone()
            }
        };
        let verdict = match signature(layer, payload.as_ref(), &wanted, trusts, now) {
            Ok(verified) => Judgement::Verified(verified),
            Err(reason) => Judgement::Rejected { message: reason.to_string(), reason },
        };
        examination.signatures.push(Examined { format: "cosign", verdict });
    }
    Ok(examination)
}
