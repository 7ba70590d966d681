//! Keys that sign without leaving their KMS.

mod alibaba;
mod aws;
mod azure;
mod bearer;
mod caller;
mod create;
mod ecdsa;
mod environment;
mod error;
mod exchange;
mod fault;
mod file;
mod gcp;
#[cfg(test)]
mod logged;
mod pkcs11;
mod public_key;
mod refresh;
mod uri;
mod vault;

use std::{fmt, str::FromStr, sync::Arc};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::clock::Clock;
pub use azure::AzureReference;
pub(crate) use create::{create_file, replace_file};
pub use environment::Environment;
pub use error::Error;
pub(crate) use file::public_key_of_file;
pub use file::{generate, generate_encrypted};
pub use gcp::GcpReference;
pub use pkcs11::Pkcs11Reference;
pub use public_key::{KeySpec, PublicKey, PublicKeyError, VerifyError};
pub use uri::{KeyUri, UriError};
pub(crate) use vault::path as vault_path;
pub use vault::{Login, SecretSource, VaultReference};

/// One asymmetric key that signs without leaving its KMS.
#[async_trait]
pub trait SigningKey: fmt::Debug + Send + Sync {
    /// The reference as configured, for logs and metrics: `awskms:///alias/release`. Never a secret.
    fn uri(&self) -> &KeyUri;

    /// What the KMS itself called the key when it was opened, for the ledger: on AWS its ARN, on Alibaba
    /// Cloud its ARN and version, in Vault its path and version. An alias says nothing about old
    /// signatures once it has been moved; this does.
    fn resolved(&self) -> &str;

    /// `SubjectPublicKeyInfo`, read once when the key was opened.
    fn public_key(&self) -> &PublicKey;

    /// Whether it signs with this algorithm. A KMS may hold a key to fewer than its kind allows.
    fn allows(&self, algorithm: Algorithm) -> bool {
        self.public_key().supports(algorithm)
    }

    /// Signs a SHA-256 digest (32 bytes); the caller has hashed, the provider only pads.
    /// Returns PKCS#1 or PSS octets (modulus length) for RSA, an ASN.1 `ECDSA-Sig-Value` for ECDSA. What comes back is not
    /// verified yet: [`crate::witness::Witness::sign`] does that.
    async fn sign(&self, algorithm: Algorithm, digest: &[u8; 32]) -> Result<RawSignature, Error>;

    /// Has the KMS check that this identity may sign so with this key, without making a signature. False, and nothing was asked, where
    /// the provider has no such thing: then only a signature tells.
    async fn dry_run(&self, _algorithm: Algorithm, _digest: &[u8; 32]) -> Result<bool, Error> {
        Ok(false)
    }

    /// Has the KMS say whether this is the key's signature, over a SHA-256 digest and encoded as [`Self::sign`] returns it. None, and
    /// nothing was asked, where the provider does not verify.
    async fn verify(&self, _algorithm: Algorithm, _digest: &[u8; 32], _signature: &[u8]) -> Result<Option<bool>, Error> {
        Ok(None)
    }

    /// Threads that wait for the key's PKCS#11 module though their callers have given up; `None` where no module is loaded.
    fn stuck_threads(&self) -> Option<usize> {
        None
    }
}

/// Opens a key: finds it, and reads its public half once. `login` says who asks, where that does not come from the environment.
pub async fn open(uri: &KeyUri, login: Option<&Login>, clock: Clock) -> Result<Arc<dyn SigningKey>, Error> {
    open_in(uri, login, clock, &Environment::system()).await
}

/// The same, with the environment variables that its provider looks at said by the caller.
pub async fn open_in(
    uri: &KeyUri,
    login: Option<&Login>,
    clock: Clock,
    environment: &Environment,
) -> Result<Arc<dyn SigningKey>, Error> {
    match uri {
        KeyUri::File(path) => Ok(Arc::new(file::FileKey::open(path, login, environment)?)),
        KeyUri::AwsKms { .. } => Ok(Arc::new(aws::AwsKey::open(uri, clock, environment).await?)),
        KeyUri::AlibabaKms { .. } => Ok(Arc::new(alibaba::AlibabaKey::open(uri, clock, environment).await?)),
        KeyUri::GcpKms(_) => Ok(Arc::new(gcp::GcpKey::open(uri, clock, environment).await?)),
        KeyUri::AzureKms(_) => Ok(Arc::new(azure::AzureKey::open(uri, clock, environment).await?)),
        KeyUri::Vault(_) => Ok(Arc::new(vault::VaultKey::open(uri, login, environment).await?)),
        KeyUri::Pkcs11(_) => pkcs11::open(uri, login, environment).await,
    }
}

/// The bytes of a signature as [`SigningKey::sign`] describes them.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct RawSignature(pub Vec<u8>);

impl AsRef<[u8]> for RawSignature {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for RawSignature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RawSignature({} bytes)", self.0.len())
    }
}

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
