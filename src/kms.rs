//! Keys that sign without leaving their KMS.

mod uri;

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

pub use uri::{KeyUri, UriError};

/// How a digest is signed, by the names that Alibaba Cloud KMS gave these and the seeds' rules use. All are over SHA-256.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Algorithm {
    /// RSASSA-PKCS1-v1_5 (RFC 8017 section 8.2).
    #[serde(rename = "RSA_PKCS1_SHA_256")]
    RsaPkcs1Sha256,
    /// RSASSA-PSS with MGF1-SHA-256 and a salt of exactly 32 bytes (RFC 8017 section 8.1).
    #[serde(rename = "RSA_PSS_SHA_256")]
    RsaPssSha256,
    /// ECDSA on P-256, as an ASN.1 DER `ECDSA-Sig-Value` (RFC 3279 section 2.2.3).
    #[serde(rename = "ECDSA_SHA_256")]
    EcdsaSha256,
}

impl Algorithm {
    pub const ALL: [Self; 3] = [Self::RsaPkcs1Sha256, Self::RsaPssSha256, Self::EcdsaSha256];

    /// The name in the configuration.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::RsaPkcs1Sha256 => "RSA_PKCS1_SHA_256",
            Self::RsaPssSha256 => "RSA_PSS_SHA_256",
            Self::EcdsaSha256 => "ECDSA_SHA_256",
        }
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Algorithm {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|algorithm| algorithm.name() == text)
            .ok_or_else(|| format!("{text:?} is no algorithm: use one of {}", Self::ALL.map(Self::name).join(", ")))
    }
}
