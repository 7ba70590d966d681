//! X.509 certificates of witnesses, as the readers of notation's signatures demand them.
//!
//! A signature in notation's formats names no key but a certificate, which is what its reader has in a trust store. A witness's
//! certificate is one that its own key signed ([`make`]), or an administrator's chain. A [`Chain`] that exists meets all that
//! readers ask of it, except that it may not be valid at a given time.
//!
//! Source: Notary Project's signature specification, "Certificate requirements"; RFC 5280.

mod kept;
mod make;
mod profile;
mod subject;

use std::{fmt, sync::Arc};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use jiff::Timestamp;
use sha2::{Digest as _, Sha256};
use x509_cert::{Certificate, der::Decode as _, time::Time};

use crate::kms::{KeySpec, PublicKey, PublicKeyError};
pub use kept::{Error as KeptError, kept, kept_or_made, renewed};
pub use make::{Error as MakeError, make};
pub use subject::{SubjectName, WrongSubject};

/// No chain that anybody uses is longer.
const MAX_CERTIFICATES: usize = 10;
/// Bytes of DER. Certificates have one or two thousand.
const MAX_CERTIFICATE: usize = 16 * 1024;
/// Bytes of a file with a chain in it: more than ten certificates in PEM, with room for text between them.
pub const MAX_PEM: u64 = 512 * 1024;

/// A certificate for a key that signs in notation's formats (RSA of 2048 bits, or P-256), with its issuers up to the root;
/// or one that its own key signed. Parsed once; cloning is cheap.
#[derive(Clone)]
pub struct Chain(Arc<Parsed>);

struct Parsed {
    /// The leaf first.
    certificates: Vec<Parts>,
    key: PublicKey,
    not_before: Timestamp,
    not_after: Timestamp,
}

struct Parts {
    der: Vec<u8>,
    /// The part of `der` that the signature is over.
    signed: Vec<u8>,
    thumbprint: String,
    certificate: Certificate,
}

/// Why certificates cannot be used. `number` counts from 1, the leaf.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("it holds no certificate: one begins with `-----BEGIN CERTIFICATE-----`")]
    Empty,
    #[error("it holds a {0} beside certificates: take it out, and if it is a private key keep it where nobody else reads it")]
    OtherLabel(String),
    #[error("certificate {number} is damaged between its BEGIN and END lines")]
    Damaged { number: usize },
    #[error("it holds more than {MAX_CERTIFICATES} certificates")]
    TooMany,
    #[error("certificate {number} is no X.509 certificate that can be read")]
    Malformed { number: usize },
    #[error("certificate {number} ({subject}) {what}")]
    Unfit { number: usize, subject: String, what: &'static str },
    #[error("the first certificate ({subject}) is for a key that cannot be used")]
    Key { subject: String, source: PublicKeyError },
    #[error(
        "the first certificate ({subject}) is for a key of kind {spec}: notation's readers want another hash than SHA-256 from it, so only \
         RSA_2048 and EC_P256 keys sign in notation's formats"
    )]
    KeySpec { subject: String, spec: KeySpec },
}

impl Chain {
    /// Reads the certificates of a PEM file's text (RFC 7468), the leaf first. Text between them is passed over.
    pub fn from_pem(text: &str) -> Result<Self, Error> {
        let mut certificates = vec![];
        for block in text.split("-----BEGIN ").skip(1) {
            let (label, rest) = block.split_once("-----").ok_or(Error::Empty)?;
            if label != "CERTIFICATE" {
                return Err(Error::OtherLabel(label.chars().take(40).filter(|c| !c.is_control()).collect()));
            }
            let damaged = Error::Damaged { number: certificates.len() + 1 };
            let (body, _) = rest.split_once("-----END CERTIFICATE-----").ok_or(damaged.clone())?;
            let body: String = body.split_ascii_whitespace().collect();
            certificates.push(BASE64_STANDARD.decode(body).map_err(|_| damaged)?);
        }
        Self::from_der(certificates)
    }

    /// The same from DER, the leaf first.
    pub fn from_der(certificates: Vec<Vec<u8>>) -> Result<Self, Error> {
        if certificates.len() > MAX_CERTIFICATES {
            return Err(Error::TooMany);
        }
        let certificates: Vec<_> = certificates
            .into_iter()
            .enumerate()
            .map(|(index, der)| Parts::read(der).ok_or(Error::Malformed { number: index + 1 }))
            .collect::<Result<_, _>>()?;
        let leaf = certificates.first().ok_or(Error::Empty)?;
        let key = leaf.public_key().map_err(|source| Error::Key { subject: leaf.subject(), source })?;
        if !matches!(key.spec(), KeySpec::Rsa2048 | KeySpec::EcP256) {
            return Err(Error::KeySpec { subject: leaf.subject(), spec: key.spec() });
        }
        profile::check(&certificates)?;
        let validity = |time: fn(&Certificate) -> Time| certificates.iter().map(move |parts| timestamp(time(&parts.certificate)));
        let not_before = validity(|certificate| certificate.tbs_certificate.validity.not_before).max();
        let not_after = validity(|certificate| certificate.tbs_certificate.validity.not_after).min();
        let (Some(not_before), Some(not_after)) = (not_before, not_after) else { return Err(Error::Empty) };
        Ok(Self(Arc::new(Parsed { certificates, key, not_before, not_after })))
    }

    /// The certificates as DER, the leaf first.
    pub fn certificates(&self) -> impl ExactSizeIterator<Item = &[u8]> {
        self.0.certificates.iter().map(|parts| parts.der.as_slice())
    }

    /// All of them as a PEM file's text, the leaf first: what stands in notation's trust store if there is one alone.
    #[must_use]
    pub fn to_pem(&self) -> String {
        self.certificates().map(pem).collect()
    }

    /// The last certificate as a PEM file's text: what notation's trust store wants, whether it is the leaf or a root.
    #[must_use]
    pub fn root_to_pem(&self) -> String {
        pem(&self.last().der)
    }

    /// Lower-case hex of the SHA-256 of each certificate, the leaf first.
    pub fn thumbprints(&self) -> impl ExactSizeIterator<Item = &str> {
        self.0.certificates.iter().map(|parts| parts.thumbprint.as_str())
    }

    /// The last of [`Self::thumbprints`]: that of the leaf, if it signed itself.
    #[must_use]
    pub fn root_thumbprint(&self) -> &str {
        &self.last().thumbprint
    }

    /// The first of [`Self::thumbprints`].
    #[must_use]
    pub fn thumbprint(&self) -> &str {
        &self.leaf().thumbprint
    }

    /// The leaf's key.
    #[must_use]
    pub fn public_key(&self) -> &PublicKey {
        &self.0.key
    }

    /// Whom the leaf is for: a distinguished name as `trustedIdentities` of notation's trust policy has it (RFC 4514).
    #[must_use]
    pub fn subject(&self) -> String {
        self.leaf().subject()
    }

    /// Why no trust policy of notation's can name the leaf's subject, if none can: a clause. Its reader would have to trust all that
    /// the root certifies (`trustedIdentities` is `*`).
    #[must_use]
    pub fn nameless(&self) -> Option<String> {
        subject::nameless(&self.leaf().certificate.tbs_certificate.subject)
    }

    /// Whom a trust policy of notation's names.
    #[must_use]
    pub fn trusted_identity(&self) -> Option<String> {
        self.nameless().is_none().then(|| format!("x509.subject: {}", self.subject()))
    }

    /// From then on all certificates of the chain are valid.
    #[must_use]
    pub fn not_before(&self) -> Timestamp {
        self.0.not_before
    }

    /// Until then they are.
    #[must_use]
    pub fn not_after(&self) -> Timestamp {
        self.0.not_after
    }

    fn leaf(&self) -> &Parts {
        self.0.certificates.first().expect("a chain has a leaf")
    }

    fn last(&self) -> &Parts {
        self.0.certificates.last().expect("a chain has a leaf")
    }
}

impl Parts {
    /// None if these bytes are no certificate, or larger than any.
    fn read(der: Vec<u8>) -> Option<Self> {
        use x509_cert::der::{Reader as _, SliceReader};
        if der.len() > MAX_CERTIFICATE {
            return None;
        }
        let certificate = Certificate::from_der(&der).ok()?;
        // As it came: another encoding of the same would not be what was signed.
        let mut reader = SliceReader::new(&der).ok()?;
        let signed = reader
            .sequence(|reader| {
                let signed = reader.tlv_bytes()?;
                reader.tlv_bytes()?;
                reader.tlv_bytes()?;
                Ok(signed.to_vec())
            })
            .ok()?;
        let thumbprint = hex::encode(Sha256::digest(&der));
        Some(Self { der, signed, thumbprint, certificate })
    }

    fn public_key(&self) -> Result<PublicKey, PublicKeyError> {
        PublicKey::from_spki_der(&profile::spki(&self.certificate))
    }

    fn subject(&self) -> String {
        // Untrusted text: names in it are escaped by RFC 4514, control characters are not.
        self.certificate.tbs_certificate.subject.to_string().escape_debug().to_string()
    }
}

fn pem(der: &[u8]) -> String {
    let body = BASE64_STANDARD.encode(der);
    let lines = body.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).expect("base64 is ASCII"));
    format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", lines.collect::<Vec<_>>().join("\n"))
}

fn timestamp(time: Time) -> Timestamp {
    // The year 9999 at most.
    i64::try_from(time.to_unix_duration().as_secs()).ok().and_then(|at| Timestamp::from_second(at).ok()).unwrap_or(Timestamp::MAX)
}

impl PartialEq for Chain {
    fn eq(&self, other: &Self) -> bool {
        self.certificates().eq(other.certificates())
    }
}

impl Eq for Chain {}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Chain({} of {}, sha256:{})", self.subject(), self.certificates().len(), self.thumbprint())
    }
}

#[cfg(test)]
mod tests;
