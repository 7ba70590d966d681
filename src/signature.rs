//! How signatures are written down.
//!
//! A [`Format`] says what is signed and in which bytes; it is kept in one of two places. `cosign`, the layout that nearly
//! every verifier reads, has simple signing payloads as the layers of one manifest under the tag `sha256-<hex>.sig`. Every
//! other format is an artifact of its own that refers to the image: a [`referrer`].

pub mod bundle;
pub mod cosign;
pub mod notation;
pub mod referrer;

use std::fmt;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::{
    kms::{Algorithm, KeySpec, PublicKey, RawSignature},
    oci::{Digest, Reference},
};
use notation::Envelope;
use referrer::Referrer;

/// The content of the config blob of all that is written: constant, so that a repository needs it once.
pub const EMPTY_CONFIG: &[u8] = b"{}";

/// A way to write a signature, by its name in the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// The `.sig` tag.
    Cosign,
    /// The sigstore bundle, a referrer.
    Bundle,
    /// Notation's JWS envelope, a referrer.
    Notation,
    /// Notation's COSE envelope, a referrer.
    NotationCose,
}

impl Format {
    /// In the order of the configuration's words.
    pub const ALL: [Self; 4] = [Self::Cosign, Self::Bundle, Self::Notation, Self::NotationCose];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Cosign => "cosign",
            Self::Bundle => "bundle",
            Self::Notation => "notation",
            Self::NotationCose => "notation-cose",
        }
    }

    /// None if it is none of notation's. Those that are need a certificate of the key.
    #[must_use]
    pub fn envelope(self) -> Option<Envelope> {
        match self {
            Self::Cosign | Self::Bundle => None,
            Self::Notation => Some(Envelope::Jws),
            Self::NotationCose => Some(Envelope::Cose),
        }
    }

    /// The algorithm that this format's verifiers take from a key of this kind. None if they take no SHA-256 from it at all.
    #[must_use]
    pub fn algorithm(self, spec: KeySpec) -> Option<Algorithm> {
        match (self, spec) {
            (_, KeySpec::EcP256) => Some(Algorithm::EcdsaSha256),
            (Self::Cosign | Self::Bundle, KeySpec::Rsa2048 | KeySpec::Rsa3072 | KeySpec::Rsa4096) => {
                Some(Algorithm::RsaPkcs1Sha256)
            }
            (Self::Notation | Self::NotationCose, KeySpec::Rsa2048) => Some(Algorithm::RsaPssSha256),
            (Self::Notation | Self::NotationCose, KeySpec::Rsa3072 | KeySpec::Rsa4096) => None,
        }
    }
}

impl From<Envelope> for Format {
    fn from(envelope: Envelope) -> Self {
        match envelope {
            Envelope::Jws => Self::Notation,
            Envelope::Cose => Self::NotationCose,
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Bytes that are ready to be signed, in one of the formats.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prepared {
    Cosign(cosign::Prepared),
    Bundle(bundle::Prepared),
    Notation(notation::Prepared),
}

impl Prepared {
    #[must_use]
    pub fn format(&self) -> Format {
        match self {
            Self::Cosign(_) => Format::Cosign,
            Self::Bundle(_) => Format::Bundle,
            Self::Notation(prepared) => prepared.envelope().into(),
        }
    }

    /// What the KMS signs: SHA-256 of the bytes that the format has signed, 32 bytes.
    #[must_use]
    pub fn sha256(&self) -> &[u8; 32] {
        match self {
            Self::Cosign(prepared) => prepared.payload_sha256(),
            Self::Bundle(prepared) => prepared.pae_sha256(),
            Self::Notation(prepared) => prepared.sha256(),
        }
    }

    /// What the image is approved as; None in formats that name the digest alone.
    #[must_use]
    pub fn reference(&self) -> Option<&Reference> {
        match self {
            Self::Cosign(prepared) => Some(prepared.reference()),
            Self::Bundle(_) | Self::Notation(_) => None,
        }
    }

    /// What is stored once `key` has signed.
    ///
    /// # Errors
    /// If the signature is not of the kind that was asked for; one that a witness made always is.
    pub fn assemble(&self, signature: &RawSignature, key: &PublicKey) -> Result<Artifact, notation::Error> {
        let artifact = match self {
            Self::Cosign(prepared) => {
                Artifact::Layer { layer: prepared.assemble(signature), payload: prepared.payload().clone() }
            }
            Self::Bundle(prepared) => Artifact::Bundle(prepared.assemble(signature, key)),
            Self::Notation(prepared) => Artifact::Notation(prepared.envelope(), prepared.assemble(signature)?),
        };
        Ok(artifact)
    }
}

/// A signature as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Artifact {
    /// Among the layers of the `.sig` manifest, over this payload.
    Layer {
        layer: cosign::Layer,
        payload: Bytes,
    },
    Bundle(Referrer),
    Notation(Envelope, Referrer),
}

impl Artifact {
    /// What it says, read as a verifier will read it.
    ///
    /// # Errors
    /// A clause that says why no verifier would take it.
    pub fn claim(&self) -> Result<Claim, String> {
        match self {
            Self::Layer { layer, payload } => layer.claim(payload),
            Self::Bundle(referrer) => bundle::read(referrer.blob()),
            Self::Notation(envelope, referrer) => notation::read(*envelope, referrer.blob()),
        }
    }

    /// The layer, if it is one.
    #[must_use]
    pub fn layer(&self) -> Option<&cosign::Layer> {
        match self {
            Self::Layer { layer, .. } => Some(layer),
            Self::Bundle(_) | Self::Notation(..) => None,
        }
    }

    /// The referrer, if it is one.
    #[must_use]
    pub fn referrer(&self) -> Option<&Referrer> {
        match self {
            Self::Layer { .. } => None,
            Self::Bundle(referrer) | Self::Notation(_, referrer) => Some(referrer),
        }
    }
}

/// What a stored signature says. None of it is to be believed before the signature over it is verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// What the signature is over, hashed.
    pub signed_sha256: [u8; 32],
    /// PKCS#1 or PSS octets, or an ASN.1 `ECDSA-Sig-Value`.
    pub signature: Vec<u8>,
    /// The digests that it approves: at least one.
    pub digests: Vec<Digest>,
    /// What it approves them as, as it stands; None: whatever they are called.
    pub reference: Option<String>,
    /// What notation's formats say besides, and what else they have to be held against.
    pub notation: Option<Box<notation::Claim>>,
}
