//! Notation's signatures (Notary Project): a descriptor of the image in a signed envelope, stored as a referrer of the image.
//!
//! The envelope is a JWS ([`Envelope::Jws`]) or a COSE ([`Envelope::Cose`]); it carries the certificates of the key that signed,
//! and the time at which it was signed, as its signer has it. The algorithm follows from the key: RSA of 2048 bits with PSS and
//! a salt of 32 bytes, or P-256. No name or tag of the image is signed. Everything here is pure.
//!
//! Source: Notary Project's signature specification 1.0 with its envelopes for JWS (RFC 7515) and COSE (RFC 9052).

mod cose;
mod jws;
mod manifest;
mod numbers;

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{
    bundle::{HINT_ANNOTATION, hint},
    referrer::{CREATED_ANNOTATION, Layouts, Referrer},
};
use crate::{
    certificate::{self, Chain},
    kms::{Algorithm, KeySpec, RawSignature},
    oci::Digest,
    subject::Subject,
};
pub use manifest::{ARTIFACT_TYPE, SignatureManifest, THUMBPRINTS, thumbprints};

/// Bytes of an envelope. Ours have two or three thousand; a chain and a timestamp make it some more.
pub const MAX_ENVELOPE: u64 = 256 * 1024;

const PAYLOAD_TYPE: &str = "application/vnd.cncf.notary.payload.v1+json";
const SCHEME: &str = "notary.x509";
const SIGNING_SCHEME: &str = "io.cncf.notary.signingScheme";
const SIGNING_TIME: &str = "io.cncf.notary.signingTime";
const EXPIRY: &str = "io.cncf.notary.expiry";
const SIGNING_AGENT: &str = "io.cncf.notary.signingAgent";
const AGENT: &str = concat!("countersign/", env!("CARGO_PKG_VERSION"));

/// How the payload is wrapped and signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Envelope {
    /// JSON Web Signature in its flattened JSON form.
    Jws,
    /// `COSE_Sign1`, tagged.
    Cose,
}

impl Envelope {
    pub const ALL: [Self; 2] = [Self::Jws, Self::Cose];

    /// The media type of the layer that is the envelope.
    #[must_use]
    pub fn media_type(self) -> &'static str {
        match self {
            Self::Jws => "application/jose+json",
            Self::Cose => "application/cose",
        }
    }

    /// None if it is no envelope's.
    #[must_use]
    pub fn of_media_type(media_type: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|envelope| envelope.media_type() == media_type)
    }
}

/// Why something is no notation signature that counts, whatever key made it; or why none can be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("it has {0} bytes, more than any envelope")]
    TooLarge(usize),
    #[error("{0} cannot be read: {1}")]
    Malformed(&'static str, String),
    #[error("its {0} is {1:?}, and must be {2}")]
    Unexpected(&'static str, String, &'static str),
    #[error("it is critical about {0:?}, which is not known here")]
    Critical(String),
    #[error("{0}")]
    Broken(&'static str),
    #[error("its certificates cannot be used")]
    Certificate(#[from] certificate::Error),
}

/// What is signed: the image by its descriptor (OCI image-spec 1.1).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Target {
    pub media_type: String,
    pub digest: Digest,
    /// Bytes.
    pub size: u64,
    /// The signer's own words about the image. Ours have none.
    #[serde(default, skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    pub annotations: std::collections::BTreeMap<String, String>,
}

impl Target {
    #[must_use]
    pub fn of(subject: &Subject) -> Self {
        Self::new(subject.media_type(), subject.digest(), subject.size())
    }

    /// `size` is the manifest's, in bytes.
    #[must_use]
    pub fn new(media_type: &str, digest: &Digest, size: u64) -> Self {
        Self { media_type: media_type.to_owned(), digest: digest.clone(), size, annotations: std::collections::BTreeMap::new() }
    }

    /// Whether both are the same manifest, whatever is said about it.
    #[must_use]
    pub fn is_same_manifest(&self, other: &Self) -> bool {
        (&self.digest, &self.media_type, self.size) == (&other.digest, &other.media_type, other.size)
    }
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Payload {
    target_artifact: Target,
}

/// What is signed beside the payload.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Attributes {
    algorithm: Algorithm,
    /// Whole seconds, and so is the expiry.
    signing_time: Timestamp,
    expiry: Option<Timestamp>,
}

/// Bytes that are ready to be signed, made from a subject that the registry served and we hashed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prepared {
    envelope: Envelope,
    subject: Subject,
    chain: Chain,
    attributes: Attributes,
    payload: Vec<u8>,
    /// The protected headers, as they are signed.
    protected: Vec<u8>,
    sha256: [u8; 32],
}

impl Prepared {
    /// The envelope that says: the owner of `chain`'s key approves `subject`, at `now`, and for `lifetime` if there is one.
    /// Same input, same bytes.
    #[must_use]
    pub fn new(envelope: Envelope, subject: &Subject, chain: &Chain, now: Timestamp, lifetime: Option<Duration>) -> Self {
        let whole = |at: Timestamp| Timestamp::from_second(at.as_second()).unwrap_or(at);
        let expiry = lifetime.map(|lifetime| {
            // At least a second: an expiry at the signing time is no signature at all.
            let lifetime = SignedDuration::try_from(lifetime).unwrap_or(SignedDuration::MAX).max(SignedDuration::from_secs(1));
            whole(now.saturating_add(lifetime).unwrap_or(Timestamp::MAX))
        });
        let attributes = Attributes { algorithm: algorithm(chain.public_key().spec()), signing_time: whole(now), expiry };
        let payload = Payload { target_artifact: Target::of(subject) };
        let payload = serde_json::to_vec(&payload).expect("strings and numbers always serialise");
        let protected = match envelope {
            Envelope::Jws => jws::protected(&attributes),
            Envelope::Cose => cose::protected(&attributes),
        };
        let signed = match envelope {
            Envelope::Jws => jws::signing_input(&protected, &payload),
            Envelope::Cose => cose::sig_structure(&protected, &payload),
        };
        let sha256 = Sha256::digest(signed).into();
        Self { envelope, subject: subject.clone(), chain: chain.clone(), attributes, payload, protected, sha256 }
    }

    #[must_use]
    pub fn envelope(&self) -> Envelope {
        self.envelope
    }

    /// How the witness has to sign: what its key's kind asks for.
    #[must_use]
    pub fn algorithm(&self) -> Algorithm {
        self.attributes.algorithm
    }

    /// What the KMS signs: SHA-256 of the JWS signing input or of COSE's `Sig_structure`, 32 bytes.
    #[must_use]
    pub fn sha256(&self) -> &[u8; 32] {
        &self.sha256
    }

    /// The whole signature, from what the KMS answered (PSS octets, or an ASN.1 `ECDSA-Sig-Value`).
    ///
    /// # Errors
    /// If an ECDSA signature is no such value; one that a witness made always is.
    pub fn assemble(&self, signature: &RawSignature) -> Result<Referrer, Error> {
        let signature = match self.attributes.algorithm {
            Algorithm::EcdsaSha256 => numbers::from_der(signature.as_ref())?.to_vec(),
            Algorithm::RsaPssSha256 | Algorithm::RsaPkcs1Sha256 => signature.as_ref().to_vec(),
        };
        let content = match self.envelope {
            Envelope::Jws => jws::assemble(&self.protected, &self.payload, &signature, &self.chain),
            Envelope::Cose => cose::assemble(&self.protected, &self.payload, &signature, &self.chain),
        };
        let thumbprints: Vec<_> = self.chain.thumbprints().collect();
        let annotations = [
            (THUMBPRINTS, serde_json::to_string(&thumbprints).expect("strings always serialise")),
            (CREATED_ANNOTATION, self.attributes.signing_time.to_string()),
            (HINT_ANNOTATION, hint(self.chain.public_key())),
        ];
        let annotations = annotations.map(|(name, value)| (name.to_owned(), value)).into();
        let (layouts, media_type) = (Layouts::CurrentOrOlder, self.envelope.media_type());
        Ok(Referrer::new(layouts, ARTIFACT_TYPE, media_type, &content.into(), &self.subject, &annotations))
    }
}

/// What an envelope says, as every format's judge takes it.
///
/// # Errors
/// A clause that says why no verifier would take it as a signature.
pub fn read(envelope: Envelope, content: &[u8]) -> Result<super::Claim, String> {
    let claim = Claim::read(envelope, content).map_err(|error| match &error {
        Error::Certificate(why) => format!("{error}: {why}"),
        _ => error.to_string(),
    })?;
    Ok(super::Claim {
        signed_sha256: claim.sha256,
        signature: claim.signature.clone(),
        digests: vec![claim.target.digest.clone()],
        reference: None,
        notation: Some(Box::new(claim)),
    })
}

/// What an envelope says. None of it is to be believed before the signature over it is verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    target: Target,
    attributes: Attributes,
    chain: Chain,
    sha256: [u8; 32],
    /// As [`PublicKey::verify`] takes it.
    signature: Vec<u8>,
}

impl Claim {
    /// Reads an envelope as strictly as notation does, its certificates included; no times are looked at.
    pub fn read(envelope: Envelope, content: &[u8]) -> Result<Self, Error> {
        if content.len() as u64 > MAX_ENVELOPE {
            return Err(Error::TooLarge(content.len()));
        }
        let open = match envelope {
            Envelope::Jws => jws::read(content)?,
            Envelope::Cose => cose::read(content)?,
        };
        let payload: Payload =
            serde_json::from_slice(&open.payload).map_err(|error| Error::Malformed("its payload", error.to_string()))?;
        let chain = Chain::from_der(open.certificates)?;
        let Attributes { algorithm: named, signing_time, expiry } = open.attributes;
        if named != algorithm(chain.public_key().spec()) {
            return Err(Error::Unexpected("algorithm", named.to_string(), "the one that notation has for the certificate's key"));
        }
        if expiry.is_some_and(|expiry| expiry <= signing_time) {
            return Err(Error::Broken("it ends before it begins"));
        }
        let signature = match named {
            Algorithm::EcdsaSha256 => numbers::to_der(&open.signature)?,
            Algorithm::RsaPssSha256 | Algorithm::RsaPkcs1Sha256 => open.signature,
        };
        let sha256 = Sha256::digest(open.signed).into();
        Ok(Self { target: payload.target_artifact, attributes: open.attributes, chain, sha256, signature })
    }

    #[must_use]
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// When it was signed, by the signer's clock.
    #[must_use]
    pub fn signing_time(&self) -> Timestamp {
        self.attributes.signing_time
    }

    /// From then on it does not count, if there is such a time.
    #[must_use]
    pub fn expiry(&self) -> Option<Timestamp> {
        self.attributes.expiry
    }

    /// The certificates in the envelope, which are not signed: whoever stored it chose them.
    #[must_use]
    pub fn chain(&self) -> &Chain {
        &self.chain
    }

    /// When it stops to count, if its certificates are all that it is held against: they end, or it does.
    #[must_use]
    pub fn until(&self) -> Timestamp {
        let end = self.chain.not_after();
        self.expiry().map_or(end, |expiry| expiry.min(end))
    }
}

/// An envelope taken apart.
struct Open {
    attributes: Attributes,
    payload: Vec<u8>,
    /// The bytes that the signature is over.
    signed: Vec<u8>,
    /// As the envelope has it.
    signature: Vec<u8>,
    /// DER, the leaf first.
    certificates: Vec<Vec<u8>>,
}

/// What notation demands of a chain's key. A chain is for one of two kinds.
fn algorithm(spec: KeySpec) -> Algorithm {
    match spec {
        KeySpec::Rsa2048 | KeySpec::Rsa3072 | KeySpec::Rsa4096 => Algorithm::RsaPssSha256,
        KeySpec::EcP256 => Algorithm::EcdsaSha256,
    }
}

/// Holds what is marked critical against what is there. All that is known must be marked, and nothing else may be.
fn check_critical<'a>(critical: impl IntoIterator<Item = &'a str>, expiry: bool) -> Result<(), Error> {
    let (mut scheme_marked, mut expiry_marked) = (false, false);
    for name in critical {
        let marked = match name {
            SIGNING_SCHEME => &mut scheme_marked,
            EXPIRY if expiry => &mut expiry_marked,
            other => return Err(Error::Critical(other.chars().take(80).collect())),
        };
        if std::mem::replace(marked, true) {
            return Err(Error::Broken("it marks a header as critical twice"));
        }
    }
    if !scheme_marked || expiry_marked != expiry {
        return Err(Error::Broken("it does not mark its signing scheme and its expiry as critical"));
    }
    Ok(())
}

fn check_text(what: &'static str, found: &str, expected: &'static str) -> Result<(), Error> {
    if found == expected { Ok(()) } else { Err(Error::Unexpected(what, found.chars().take(80).collect(), expected)) }
}

#[cfg(test)]
mod tests;
