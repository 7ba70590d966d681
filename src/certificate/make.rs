use jiff::{SignedDuration, Timestamp};
use rsa::pkcs1::RsaPssParams;
use sha2::{Digest as _, Sha256};
use x509_cert::{
    Certificate, TbsCertificate, Version,
    der::{
        self, Decode as _, Encode as _,
        asn1::{Any, BitString, GeneralizedTime, OctetString, UtcTime},
        oid::{
            AssociatedOid,
            db::{
                rfc5280::ID_KP_CODE_SIGNING,
                rfc5912::{ECDSA_WITH_SHA_256, ID_RSASSA_PSS, SHA_256_WITH_RSA_ENCRYPTION},
            },
        },
    },
    ext::{
        Extension,
        pkix::{BasicConstraints, ExtendedKeyUsage, KeyUsage, KeyUsages},
    },
    serial_number::SerialNumber,
    spki::{AlgorithmIdentifierOwned, SubjectPublicKeyInfoOwned},
    time::{Time, Validity},
};

use super::{Chain, SubjectName};
use crate::{
    kms::{self, Algorithm, KeySpec},
    outcome::{Classify, Verdict},
    witness::Witness,
};

/// Clocks of verifiers may be late.
const SLACK: SignedDuration = SignedDuration::from_hours(1);
/// Ten years: signatures carry no trusted time, so with the certificate all of them end.
const VALIDITY: SignedDuration = SignedDuration::from_hours(10 * 366 * 24);

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the certificate of witness {witness} was not signed")]
    Kms { witness: String, source: kms::Error },
    #[error(
        "witness {witness} has a key of kind {spec}: notation's readers want another hash than SHA-256 from it, so only RSA_2048 and \
         EC_P256 keys sign in notation's formats"
    )]
    KeySpec { witness: String, spec: KeySpec },
    #[error("the certificate of witness {witness} cannot be written: {what}")]
    Unfit { witness: String, what: String },
}

impl Classify for Error {
    fn verdict(&self) -> Verdict {
        match self {
            Self::Kms { source, .. } => source.verdict(),
            Self::KeySpec { .. } => {
                Verdict::Refuse { cure: "give the witness an RSA_2048 or EC_P256 key, or its rules other formats" }
            }
            Self::Unfit { .. } => Verdict::Refuse { cure: "correct the witness's name or `subject`" },
        }
    }
}

/// Has a witness's key sign a certificate for itself, valid from `now` on for ten years. Each call makes another one, so it
/// has to be kept: it is what readers of its signatures put into their trust stores.
pub async fn make(witness: &Witness, subject: &SubjectName, now: Timestamp) -> Result<Chain, Error> {
    let name = || witness.name().to_owned();
    let first = match witness.public_key().spec() {
        KeySpec::Rsa2048 => Algorithm::RsaPkcs1Sha256,
        KeySpec::EcP256 => Algorithm::EcdsaSha256,
        spec => return Err(Error::KeySpec { witness: name(), spec }),
    };
    match make_with(first, witness, subject, now).await {
        // A KMS may allow a key one padding only.
        Err(Error::Kms { source, .. })
            if first == Algorithm::RsaPkcs1Sha256 && matches!(source.verdict(), Verdict::Refuse { .. }) =>
        {
            let second = make_with(Algorithm::RsaPssSha256, witness, subject, now).await;
            // If it allows neither, the first word is the plainer one.
            second.map_err(|_| Error::Kms { witness: name(), source })
        }
        result => result,
    }
}

async fn make_with(algorithm: Algorithm, witness: &Witness, subject: &SubjectName, now: Timestamp) -> Result<Chain, Error> {
    let unfit = |what: String| Error::Unfit { witness: witness.name().to_owned(), what };
    let written = |error: der::Error| unfit(error.to_string());
    let tbs = unsigned(algorithm, witness.public_key().spki_der(), subject, now).map_err(written)?;
    let digest: [u8; 32] = Sha256::digest(tbs.to_der().map_err(written)?).into();
    let signed = witness.sign(algorithm, &digest).await;
    let signed = signed.map_err(|source| Error::Kms { witness: witness.name().to_owned(), source })?;
    let signature_algorithm = tbs.signature.clone();
    let signature = BitString::from_bytes(signed.raw().as_ref()).map_err(written)?;
    let certificate = Certificate { tbs_certificate: tbs, signature_algorithm, signature };
    // What readers refuse never leaves.
    Chain::from_der(vec![certificate.to_der().map_err(written)?]).map_err(|error| unfit(error.to_string()))
}

fn unsigned(algorithm: Algorithm, spki: &[u8], subject: &SubjectName, now: Timestamp) -> der::Result<TbsCertificate> {
    let name = subject.to_name()?;
    // Positive, not zero, 16 bytes.
    let mut serial: [u8; 16] = fastrand::u128(..).to_be_bytes();
    serial[0] = serial[0] & 0x3f | 0x40;
    let saturating = |by: SignedDuration| now.checked_add(by).unwrap_or(now);
    Ok(TbsCertificate {
        version: Version::V3,
        serial_number: SerialNumber::new(&serial)?,
        signature: identifier(algorithm)?,
        issuer: name.clone(),
        validity: Validity { not_before: time(saturating(-SLACK))?, not_after: time(saturating(VALIDITY))? },
        subject: name,
        subject_public_key_info: SubjectPublicKeyInfoOwned::from_der(spki)?,
        issuer_unique_id: None,
        subject_unique_id: None,
        extensions: Some(vec![
            extension(true, &BasicConstraints { ca: false, path_len_constraint: None })?,
            extension(true, &KeyUsage(KeyUsages::DigitalSignature.into()))?,
            extension(false, &ExtendedKeyUsage(vec![ID_KP_CODE_SIGNING]))?,
        ]),
    })
}

fn identifier(algorithm: Algorithm) -> der::Result<AlgorithmIdentifierOwned> {
    let (oid, parameters) = match algorithm {
        Algorithm::RsaPkcs1Sha256 => (SHA_256_WITH_RSA_ENCRYPTION, Some(Any::null())),
        Algorithm::RsaPssSha256 => (ID_RSASSA_PSS, Some(Any::encode_from(&RsaPssParams::new::<Sha256>(32))?)),
        Algorithm::EcdsaSha256 => (ECDSA_WITH_SHA_256, None),
    };
    Ok(AlgorithmIdentifierOwned { oid, parameters })
}

/// As RFC 5280 section 4.1.2.5 has it: two digits of the year to 2049, four from then on.
fn time(at: Timestamp) -> der::Result<Time> {
    let since_1970 = std::time::Duration::from_secs(u64::try_from(at.as_second()).unwrap_or_default());
    UtcTime::from_unix_duration(since_1970)
        .map(Time::UtcTime)
        .or_else(|_| GeneralizedTime::from_unix_duration(since_1970).map(Time::GeneralTime))
}

fn extension<T: AssociatedOid + der::Encode>(critical: bool, value: &T) -> der::Result<Extension> {
    Ok(Extension { extn_id: T::OID, critical, extn_value: OctetString::new(value.to_der()?)? })
}
