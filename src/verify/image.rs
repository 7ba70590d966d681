//! All signatures of an image in its registry, each judged.

use std::collections::HashMap;

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use jiff::Timestamp;
use serde::Serialize;

use super::{Rejection, Signer, Stored, Trust, Verified, Wanted, read_referrer};
use crate::{
    oci::{Digest, Reference, Tag},
    registry::{self, Address, Registry},
    signature::{
        Claim, Format,
        bundle::hint,
        cosign::{MAX_PAYLOAD, SignatureManifest},
        notation::Target,
    },
};

/// No more referrers are read that may be signatures: anybody who can push can add any number.
const MOST_REFERRERS: usize = 100;
const READS_AT_ONCE: usize = 4;

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
    pub format: Format,
    /// When it was made, on the word of whoever wrote it; None where the format does not tell.
    pub time: Option<Timestamp>,
    #[serde(flatten)]
    pub verdict: Judgement,
}

#[derive(Debug, Clone, Serialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
pub enum Judgement {
    Verified(Verified),
    Rejected {
        /// Whose key made it all the same; None: nobody's that is known here.
        witness: Option<String>,
        /// What it says that it approves, if that could be read.
        reference: Option<String>,
        reason: Rejection,
        message: String,
    },
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
    let tag = || Address::Tag(reference.tag.clone().unwrap_or_else(Tag::latest));
    let address = reference.digest.clone().map_or_else(tag, Address::Digest);
    let Some(manifest) = registry.manifest(repository, &address).await? else { return Ok(examination) };
    examination.digest = Some(manifest.digest().clone());
    let manifest = Target::new(manifest.media_type(), manifest.digest(), manifest.content().len() as u64);
    let court = Court { registry, wanted: Wanted { manifest, reference: reference.clone() }, trusts, now };
    let (under_tag, referrers) = tokio::try_join!(court.under_tag(), court.referrers())?;
    for Found { signatures, unreadable } in [under_tag, referrers] {
        examination.signatures.extend(signatures);
        examination.unreadable = examination.unreadable.or(unreadable);
    }
    Ok(examination)
}

/// What one place holds, and why something that is there was not read.
#[derive(Default)]
struct Found {
    signatures: Vec<Examined>,
    unreadable: Option<String>,
}

/// Who judges what, by whose keys.
struct Court<'a> {
    registry: &'a Registry,
    wanted: Wanted,
    trusts: &'a [Trust<'a>],
    now: Timestamp,
}

impl Court<'_> {
    /// Those under the `.sig` tag.
    async fn under_tag(&self) -> Result<Found, registry::Error> {
        let repository = &self.wanted.reference.repository;
        let Some(tag) = Tag::cosign_signatures(&self.wanted.manifest.digest) else { return Ok(Found::default()) };
        let Some(manifest) = self.registry.manifest(repository, &Address::Tag(tag)).await? else {
            return Ok(Found::default());
        };
        let manifest = match SignatureManifest::read(manifest.media_type(), manifest.content()) {
            Ok(manifest) => manifest,
            Err(error) => {
                let unreadable = Some(format!("what is under its signature tag cannot be read: {error}"));
                return Ok(Found { unreadable, ..Found::default() });
            }
        };
        let mut fetched: HashMap<&Digest, Option<Bytes>> = HashMap::new();
        let mut signatures = vec![];
        for layer in manifest.layers() {
            // The payload of a signature that nobody trusted made is not worth a request, and any other is worth one.
            let signers = layer.payload_sha256().map(|sha256| self.signers(Format::Cosign, &sha256, layer.signature()));
            let signers = signers.unwrap_or_default();
            let claim = if signers.is_empty() {
                Err(Rejection::UnknownKey)
            } else {
                if !fetched.contains_key(layer.payload()) {
                    let payload = self.registry.blob(repository, layer.payload(), MAX_PAYLOAD).await?;
                    fetched.insert(layer.payload(), payload);
                }
                let payload = fetched[layer.payload()].as_ref().ok_or(Rejection::NoPayload);
                payload.and_then(|payload| layer.claim(payload).map_err(Rejection::Malformed))
            };
            signatures.push(Examined { format: Format::Cosign, time: None, verdict: self.judge(&signers, claim) });
        }
        Ok(Found { signatures, unreadable: None })
    }

    /// Those that are referrers.
    async fn referrers(&self) -> Result<Found, registry::Error> {
        let Wanted { manifest: Target { digest, .. }, reference } = &self.wanted;
        let listed = match self.registry.referrers(&reference.repository, digest).await {
            Err(error @ registry::Error::NoIndex { .. }) => {
                return Ok(Found { unreadable: Some(error.to_string()), ..Found::default() });
            }
            listed => listed?,
        };
        let hints: Vec<_> = self
            .trusts
            .iter()
            .flat_map(|trust| {
                let keys = trust.keys.standings(self.now).map(|(key, _)| hint(key));
                keys.chain(trust.certificates.iter().map(|chain| chain.thumbprint().to_owned()))
            })
            .collect();
        let mut candidates = Stored::candidates(&listed, &hints);
        let all = candidates.len();
        candidates.truncate(MOST_REFERRERS);
        let unreadable =
            (all > MOST_REFERRERS).then(|| format!("only {MOST_REFERRERS} of {all} referrers that may be signatures were read"));
        let read: Vec<_> =
            candidates.into_iter().map(|entry| read_referrer(self.registry, &reference.repository, digest, entry)).collect();
        let stored: Vec<_> = stream::iter(read).buffered(READS_AT_ONCE).try_collect().await?;
        let signatures = stored.into_iter().flatten().map(|Stored { format, time, claim }| {
            let signers = claim.as_ref().map(|claim| self.signers(format, &claim.signed_sha256, &claim.signature));
            let signers = signers.unwrap_or_default();
            Examined { format, time, verdict: self.judge(&signers, claim) }
        });
        Ok(Found { signatures: signatures.collect(), unreadable })
    }

    fn signers(&self, format: Format, sha256: &[u8; 32], signature: &[u8]) -> Vec<Signer<'_>> {
        super::signers(format, sha256, signature, self.trusts, self.now)
    }

    fn judge(&self, signers: &[Signer<'_>], claim: Result<Claim, Rejection>) -> Judgement {
        let reference = claim.as_ref().ok().and_then(|claim| claim.reference.clone());
        let verdict = claim.and_then(|claim| super::judge(signers, &claim, &self.wanted, self.now));
        match verdict {
            Ok(verified) => Judgement::Verified(verified),
            Err(reason) => Judgement::Rejected {
                witness: signers.first().map(|signer| signer.trust.witness.to_owned()),
                reference,
                message: reason.to_string(),
                reason,
            },
        }
    }
}
