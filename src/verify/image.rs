//! All signatures of an image in its registry, each judged.

use std::collections::HashMap;

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use jiff::Timestamp;
use serde::Serialize;

use super::{Referring, Rejection, Signer, Stored, Trust, Verified, Wanted, read_referrer};
use crate::{
    oci::{Descriptor, Digest, Reference, Tag},
    registry::{self, Address, Registry},
    signature::{
        Claim, Format,
        bundle::hint,
        cosign::{Layer, MAX_PAYLOAD, SignatureManifest},
        notation::Target,
    },
};

/// No more referrers are read that may be signatures: anybody who can push can add any number.
const MOST_REFERRERS: usize = 100;
/// No more signatures are looked at that are layers of referrers, in all of these together.
const MOST_LAYERS: usize = 1000;
/// No more payloads are read only to tell what signatures say that do not count.
const MOST_STATEMENTS: usize = 100;
const READS_AT_ONCE: usize = 4;

/// What is read of an image's signatures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// What decides.
    Verdicts,
    /// Also what is said by those that do not count, for people who want to know what is there.
    Statements,
}

/// What was read of the payloads of layers, each once: cosign says in each of its referrers what it said in the one before.
type Payloads = HashMap<Digest, Option<Bytes>>;

/// What is known of an image's signatures.
#[derive(Debug, Clone, Serialize)]
pub struct Examination {
    pub reference: Reference,
    /// What the reference resolves to; None if the registry has no such image.
    pub digest: Option<Digest>,
    pub signatures: Vec<Examined>,
    /// What was found beside the signatures and says that it is none. Nobody vouches for it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub attestations: Vec<Attestation>,
    /// Why nothing could be read where signatures are, although something is there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unreadable: Option<String>,
}

/// A bundle that states something about the image, such as how it was built: not that it is signed, whosever key it is by.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Attestation {
    /// Of its manifest.
    pub digest: Digest,
    /// What it states, by its in-toto predicate type; by its own word.
    pub predicate: String,
}

/// One signature, and whether it counts.
#[derive(Debug, Clone, Serialize)]
pub struct Examined {
    pub format: Format,
    /// How it is stored, if not as its format is by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layout: Option<Layout>,
    /// The other witnesses that have the same key, and of whom the verdict is the same.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub also: Vec<String>,
    /// When it was made, on the word of whoever wrote it; None where the format does not tell.
    pub time: Option<Timestamp>,
    #[serde(flatten)]
    pub verdict: Judgement,
}

/// A way of storing signatures that few verifiers look for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Layout {
    /// cosign's experimental referrer: the layers that are under the `.sig` tag otherwise.
    #[serde(rename = "oci-1-1")]
    Oci11,
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

    /// Whether a signature of this witness stands.
    #[must_use]
    pub fn is_signed_by(&self, witness: &str) -> bool {
        self.signatures.iter().any(|examined| match &examined.verdict {
            Judgement::Verified(verified) => verified.witness() == witness || examined.also.iter().any(|also| also == witness),
            Judgement::Rejected { .. } => false,
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
/// When the registry could not be asked: that is no answer, neither way. Nor is it one when what it says of one of the places
/// where signatures are is more than is read or makes no sense, and none stands in the other: anybody who can push can see to that.
pub async fn examine(
    registry: &Registry,
    reference: &Reference,
    trusts: &[Trust<'_>],
    now: Timestamp,
    depth: Depth,
) -> Result<Examination, registry::Error> {
    let repository = &reference.repository;
    let mut examination =
        Examination { reference: reference.clone(), digest: None, signatures: vec![], attestations: vec![], unreadable: None };
    let tag = || Address::Tag(reference.tag.clone().unwrap_or_else(Tag::latest));
    let address = reference.digest.clone().map_or_else(tag, Address::Digest);
    let Some(manifest) = registry.manifest(repository, &address).await? else { return Ok(examination) };
    examination.digest = Some(manifest.digest().clone());
    let manifest = Target::new(manifest.media_type(), manifest.digest(), manifest.content().len() as u64);
    let court = Court { registry, wanted: Wanted { manifest, reference: reference.clone() }, trusts, now, depth };
    let under_tag = async { set_aside(court.under_tag().await) };
    let referrers = async { set_aside(court.referrers().await) };
    let (under_tag, referrers) = tokio::try_join!(under_tag, referrers)?;
    let mut unread = None;
    for found in [under_tag, referrers] {
        match found {
            Ok(Found { signatures, attestations, unreadable }) => {
                examination.signatures.extend(signatures);
                examination.attestations.extend(attestations);
                examination.unreadable = examination.unreadable.or(unreadable);
            }
            Err(error) => unread = unread.or(Some(error)),
        }
    }
    match unread {
        Some(error) if !examination.is_attested() => return Err(error),
        Some(error) => examination.unreadable = Some(error.to_string()),
        None => {}
    }
    Ok(examination)
}

/// Sets the errors apart that what somebody has pushed can be the cause of.
fn set_aside(found: Result<Found, registry::Error>) -> Result<Result<Found, registry::Error>, registry::Error> {
    match found {
        Err(error @ (registry::Error::Oversized { .. } | registry::Error::Malformed { .. })) => Ok(Err(error)),
        found => found.map(Ok),
    }
}

/// What one place holds, and why something that is there was not read.
#[derive(Default)]
struct Found {
    signatures: Vec<Examined>,
    attestations: Vec<Attestation>,
    unreadable: Option<String>,
}

/// Who judges what, by whose keys.
struct Court<'a> {
    registry: &'a Registry,
    wanted: Wanted,
    trusts: &'a [Trust<'a>],
    now: Timestamp,
    depth: Depth,
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
        let signatures = self.layers(manifest.layers(), &mut Payloads::new(), None).await?;
        Ok(Found { signatures, ..Found::default() })
    }

    /// Judges those that are layers.
    async fn layers(
        &self,
        layers: &[Layer],
        payloads: &mut Payloads,
        layout: Option<Layout>,
    ) -> Result<Vec<Examined>, registry::Error> {
        let repository = &self.wanted.reference.repository;
        let mut signatures = vec![];
        for layer in layers {
            // The payload of a signature that nobody trusted made decides nothing.
            let signers = layer.payload_sha256().map(|sha256| self.signers(Format::Cosign, &sha256, layer.signature()));
            let signers = signers.unwrap_or_default();
            let is_told = self.depth == Depth::Statements && payloads.len() < MOST_STATEMENTS;
            if (is_told || !signers.is_empty()) && !payloads.contains_key(layer.payload()) {
                let payload = match self.registry.blob(repository, layer.payload(), MAX_PAYLOAD).await {
                    Err(registry::Error::Oversized { .. }) if signers.is_empty() => None,
                    payload => payload?,
                };
                payloads.insert(layer.payload().clone(), payload);
            }
            let payload = payloads.get(layer.payload()).and_then(Option::as_ref).ok_or(Rejection::NoPayload);
            let claim = payload.and_then(|payload| layer.claim(payload).map_err(Rejection::Malformed));
            let claim = claim.map_err(|reason| if signers.is_empty() { Rejection::UnknownKey } else { reason });
            signatures.push(self.judged(Format::Cosign, &signers, claim, layout, None));
        }
        Ok(signatures)
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
        let mut candidates = Stored::candidates(&listed, Stored::ALL_ARTIFACT_TYPES, &hints);
        let all = candidates.len();
        candidates.truncate(MOST_REFERRERS);
        let unreadable =
            (all > MOST_REFERRERS).then(|| format!("only {MOST_REFERRERS} of {all} referrers that may be signatures were read"));
        let says_so = |entry: &Descriptor| {
            let predicate = Stored::other_predicate(&entry.annotations)?;
            Some(Attestation { digest: entry.digest.clone(), predicate })
        };
        let says_so = listed.candidates(Stored::ALL_ARTIFACT_TYPES).filter_map(says_so);
        let mut found = Found { signatures: vec![], attestations: says_so.take(MOST_REFERRERS).collect(), unreadable };
        let read = candidates
            .into_iter()
            .map(async |entry| Ok((entry, read_referrer(self.registry, &reference.repository, digest, entry).await?)));
        let read: Vec<_> = read.collect();
        let mut read = stream::iter(read).buffered(READS_AT_ONCE);
        let (mut layers_left, mut payloads) = (MOST_LAYERS, Payloads::new());
        while let Some((entry, referring)) = read.try_next().await? {
            match referring {
                Referring::Signature(Stored { format, time, claim }) => {
                    let signers = claim.as_ref().map(|claim| self.signers(format, &claim.signed_sha256, &claim.signature));
                    found.signatures.push(self.judged(format, &signers.unwrap_or_default(), claim, None, time));
                }
                Referring::Layers(manifest) => {
                    let layers = &manifest.layers()[..manifest.layers().len().min(layers_left)];
                    if layers.len() < manifest.layers().len() {
                        let problem = || format!("only {MOST_LAYERS} signatures in oci-1-1 referrers were read");
                        found.unreadable.get_or_insert_with(problem);
                    }
                    layers_left -= layers.len();
                    found.signatures.extend(self.layers(layers, &mut payloads, Some(Layout::Oci11)).await?);
                }
                Referring::Attestation { predicate } => {
                    found.attestations.push(Attestation { digest: entry.digest.clone(), predicate });
                }
                Referring::Other => {}
            }
        }
        Ok(found)
    }

    fn signers(&self, format: Format, sha256: &[u8; 32], signature: &[u8]) -> Vec<Signer<'_>> {
        super::signers(format, sha256, signature, self.trusts, self.now)
    }

    fn judged(
        &self,
        format: Format,
        signers: &[Signer<'_>],
        claim: Result<Claim, Rejection>,
        layout: Option<Layout>,
        time: Option<Timestamp>,
    ) -> Examined {
        let judge = |signer| match &claim {
            Ok(claim) => super::judge_one(signer, claim, &self.wanted, self.now),
            Err(reason) => Err(reason.clone()),
        };
        let mut verdicts: Vec<_> = signers.iter().map(|signer| (signer.trust.witness, judge(signer))).collect();
        // One for whom it counts is enough.
        let told = verdicts.iter().position(|(_, verdict)| verdict.is_ok()).unwrap_or_default();
        let (witness, verdict) = if verdicts.is_empty() {
            (None, Err(claim.as_ref().err().cloned().unwrap_or(Rejection::UnknownKey)))
        } else {
            let (witness, verdict) = verdicts.remove(told);
            (Some(witness.to_owned()), verdict)
        };
        let word = |verdict: &Result<Verified, Rejection>| verdict.as_ref().map(drop).map_err(Rejection::name);
        let alike = verdicts.iter().filter(|(_, other)| word(other) == word(&verdict));
        let also = alike.map(|(witness, _)| (*witness).to_owned()).collect();
        let verdict = match verdict {
            Ok(verified) => Judgement::Verified(verified),
            Err(reason) => {
                let reference = claim.ok().and_then(|claim| claim.reference);
                Judgement::Rejected { witness, reference, message: reason.to_string(), reason }
            }
        };
        Examined { format, layout, also, time, verdict }
    }
}

#[cfg(test)]
mod tests;
