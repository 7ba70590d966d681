use std::{io, sync::Arc, time::Duration};

use jiff::Timestamp;

use super::{Algorithm, KeySpec, KeyUri, PublicKeyError};
use crate::outcome::{Classify, Verdict};

type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Why a key could not be opened, or did not sign. Every one names the key; none holds a secret.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The KMS is there and asks for fewer requests. Costs an event nothing but time.
    #[error("{key}: the KMS asks for fewer requests: {what}")]
    Throttled { key: Arc<KeyUri>, what: String, retry_after: Option<Duration> },
    /// No whole answer came: refused, reset, timed out, cut short.
    #[error("{key}: no answer from the KMS at {at}")]
    Unreachable { key: Arc<KeyUri>, at: String, source: Cause },
    /// It did not answer several times in a row, and is asked one thing at a time until it does. This was not asked, so it costs an
    /// event nothing but time.
    #[error("{key}: the KMS has been away since {since} and was not asked: it is tried again at {next}")]
    Away {
        key: Arc<KeyUri>,
        since: Timestamp,
        next: Timestamp,
        /// How long it is until then.
        after: Duration,
    },
    /// The KMS answered with a fault of its own, or the key is just being made.
    #[error("{key}: {what}")]
    Transient { key: Arc<KeyUri>, what: String },
    /// The KMS refuses this identity this operation. A key that the identity may not see can look so, too.
    #[error("{key}: {what}")]
    Denied { key: Arc<KeyUri>, what: String },
    /// There are no credentials, or the KMS does not know them.
    #[error("{key}: {what}")]
    Credentials { key: Arc<KeyUri>, what: String },
    /// The key is disabled, about to be deleted, or made for another purpose.
    #[error("{key}: {what}")]
    KeyUnusable { key: Arc<KeyUri>, what: String },
    #[error("{key}: {what}")]
    NotFound { key: Arc<KeyUri>, what: String },
    /// What is configured cannot work, or the KMS did not understand the request.
    #[error("{key}: {what}")]
    Misconfigured { key: Arc<KeyUri>, what: String },
    /// The answer is not what the KMS's interface promises.
    #[error("{key}: the KMS answered something that cannot be right: {what}")]
    BadResponse { key: Arc<KeyUri>, what: String },
    /// The signature does not verify with the public key that was read when the key was opened.
    #[error(
        "{key}: the {algorithm} signature that came back does not verify with public key sha256:{fingerprint}, and was thrown \
         away; the key behind the reference was exchanged, or the KMS hashes the digest again or pads it another way"
    )]
    BadSignature { key: Arc<KeyUri>, algorithm: Algorithm, fingerprint: String },
    /// The reference names another key by now: an alias that was moved.
    #[error("{key}: it was {was} when it was opened and is {now} now, so nothing was signed")]
    KeyChanged { key: Arc<KeyUri>, was: String, now: String },
    #[error("{key}: a key of kind {spec} cannot sign with {algorithm}")]
    WrongAlgorithm { key: Arc<KeyUri>, spec: KeySpec, algorithm: Algorithm },
    #[error("{key}: its public key cannot be used")]
    PublicKey { key: Arc<KeyUri>, source: PublicKeyError },
    /// A local key that could not be read or written.
    #[error("{key}: {what}")]
    File { key: Arc<KeyUri>, what: &'static str, source: io::Error },
}

impl Error {
    /// The word for metrics.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Throttled { .. } => "throttled",
            Self::Unreachable { .. } => "unreachable",
            Self::Away { .. } => "away",
            Self::Transient { .. } => "transient",
            Self::Denied { .. } => "denied",
            Self::Credentials { .. } => "credentials",
            Self::KeyUnusable { .. } => "key_unusable",
            Self::NotFound { .. } => "not_found",
            Self::Misconfigured { .. } | Self::WrongAlgorithm { .. } => "misconfigured",
            Self::BadResponse { .. } => "bad_response",
            Self::BadSignature { .. } => "bad_signature",
            Self::KeyChanged { .. } | Self::PublicKey { .. } => "key_changed",
            Self::File { .. } => "file",
        }
    }

    /// Whether this says that the KMS as a whole is away. One that throttles or refuses is there.
    pub(crate) fn is_absence(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Transient { .. })
    }

    /// Whether asking once more at once is worth it: a garbled answer can be a garbled transport.
    pub(crate) fn is_garbled(&self) -> bool {
        matches!(self, Self::BadResponse { .. } | Self::BadSignature { .. })
    }
}

impl Classify for Error {
    fn verdict(&self) -> Verdict {
        let cure = match self {
            Self::Throttled { retry_after, .. } => return Verdict::Retry { after: *retry_after, throttled: true },
            Self::Away { after, .. } => return Verdict::Retry { after: Some(*after), throttled: true },
            Self::Unreachable { .. } | Self::Transient { .. } => return Verdict::TRANSIENT,
            Self::Denied { .. } => {
                "allow countersign's identity to sign with this key (on AWS: kms:Sign, kms:GetPublicKey and kms:DescribeKey; on Alibaba \
                 Cloud: kms:AsymmetricSign, kms:GetPublicKey, kms:DescribeKey and kms:ListKeyVersions; on Google Cloud: useToSign and \
                 viewPublicKey of cloudkms.cryptoKeyVersions, and list where the key names no version; on Azure: keys/read and \
                 keys/sign/action; in a Vault: as the message says), then replay"
            }
            Self::Credentials { .. } => "give countersign credentials that the KMS knows, then replay",
            Self::KeyUnusable { .. } => {
                "enable the key, cancel its deletion, let its version sign again, or name an asymmetric signing key in the witness, then \
                 replay"
            }
            Self::NotFound { .. } => {
                "correct the key's name, region and account (in a Vault: mount and namespace) in the witness's `key`, then replay"
            }
            Self::Misconfigured { .. } => "correct the witness's `key` as the message says, then replay",
            Self::BadResponse { .. } => {
                "check that the endpoint is the KMS, and that nothing between changes its answers, then replay"
            }
            Self::BadSignature { .. } => {
                "check which key the reference names now and that the endpoint is a KMS which signs digests as they are; then \
                 restart, which reads the public key again, and replay"
            }
            Self::KeyChanged { .. } => {
                "if the alias was moved on purpose: list the old public key under the witness's `verify`, remove the pinned one, \
                 restart, and replay; else move the alias back and replay"
            }
            Self::WrongAlgorithm { .. } => {
                "use RSA_PKCS1_SHA_256 or RSA_PSS_SHA_256 with an RSA key and ECDSA_SHA_256 with a P-256 key, then replay"
            }
            Self::PublicKey { .. } => "use an RSA key of 2048, 3072 or 4096 bits or a P-256 key, then replay",
            Self::File { .. } => "let countersign's user, and nobody else, read the key file, then replay",
        };
        Verdict::Refuse { cure }
    }
}
