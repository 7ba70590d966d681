//! What notation's readers demand of a chain's certificates.

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA384_ASN1, ECDSA_P384_SHA256_ASN1, ECDSA_P384_SHA384_ASN1, ECDSA_P521_SHA256_ASN1,
    ECDSA_P521_SHA384_ASN1, ECDSA_P521_SHA512_ASN1, ParsedPublicKey, RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_2048_8192_SHA384,
    RSA_PKCS1_2048_8192_SHA512, RSA_PSS_2048_8192_SHA256, RSA_PSS_2048_8192_SHA384, RSA_PSS_2048_8192_SHA512,
    VerificationAlgorithm,
};
use rsa::pkcs1::RsaPssParams;
use sha2::{Sha256, Sha384, Sha512};
use x509_cert::{
    Certificate, Version,
    der::{
        Decode, Encode as _,
        asn1::ObjectIdentifier,
        oid::{
            AssociatedOid,
            db::{
                rfc5280::{
                    ANY_EXTENDED_KEY_USAGE, ID_KP_CLIENT_AUTH, ID_KP_EMAIL_PROTECTION, ID_KP_OCSP_SIGNING, ID_KP_SERVER_AUTH,
                    ID_KP_TIME_STAMPING,
                },
                rfc5912::{
                    ECDSA_WITH_SHA_256, ECDSA_WITH_SHA_384, ECDSA_WITH_SHA_512, ID_RSASSA_PSS, SECP_256_R_1, SECP_384_R_1,
                    SECP_521_R_1, SHA_256_WITH_RSA_ENCRYPTION, SHA_384_WITH_RSA_ENCRYPTION, SHA_512_WITH_RSA_ENCRYPTION,
                },
            },
        },
    },
    ext::pkix::{BasicConstraints, ExtendedKeyUsage, KeyUsage, KeyUsages},
    spki::AlgorithmIdentifierOwned,
};

use super::{Error, Parts};

/// What a certificate may be critical about: readers must refuse what they do not understand (RFC 5280 section 4.2), and of
/// these some are looked at below, the others restrict names and policies that nobody asks for here.
const UNDERSTOOD: [ObjectIdentifier; 3] = [BasicConstraints::OID, KeyUsage::OID, ExtendedKeyUsage::OID];

/// Purposes that a certificate which signs code must not have as well.
const FOREIGN_PURPOSES: [ObjectIdentifier; 6] = [
    ANY_EXTENDED_KEY_USAGE,
    ID_KP_SERVER_AUTH,
    ID_KP_CLIENT_AUTH,
    ID_KP_EMAIL_PROTECTION,
    ID_KP_TIME_STAMPING,
    ID_KP_OCSP_SIGNING,
];

/// `chain` begins with the leaf, and is not empty.
pub(super) fn check(chain: &[Parts]) -> Result<(), Error> {
    let unfit = |index: usize, what| Error::Unfit { number: index + 1, subject: chain[index].subject(), what };
    let alone = chain.len() == 1;
    for (index, parts) in chain.iter().enumerate() {
        let result = if index == 0 { leaf(&parts.certificate) } else { authority(&parts.certificate, index - 1) };
        result.map_err(|what| unfit(index, what))?;
        let is_own_issuer = is_issued_by(parts, parts);
        match chain.get(index + 1) {
            Some(issuer) => {
                if is_own_issuer {
                    return Err(unfit(index, "signed itself, but is not the last: a root ends the chain"));
                }
                if !is_issued_by(parts, issuer) {
                    return Err(unfit(index, "was not issued by the next: each must be followed by its issuer"));
                }
            }
            None if is_own_issuer => {}
            None if alone => {
                return Err(unfit(index, "did not sign itself, so its issuers must follow it, up to the root"));
            }
            None => return Err(unfit(index, "is the last and no root: append its issuer, up to the one that signed itself")),
        }
    }
    Ok(())
}

/// The `SubjectPublicKeyInfo` in DER.
pub(super) fn spki(certificate: &Certificate) -> Vec<u8> {
    certificate.tbs_certificate.subject_public_key_info.to_der().unwrap_or_default()
}

fn leaf(certificate: &Certificate) -> Result<(), &'static str> {
    common(certificate)?;
    if extension::<BasicConstraints>(certificate)?.is_some_and(|(_, constraints)| constraints.ca) {
        return Err("is an authority's: basicConstraints must not say CA");
    }
    let usage = key_usage(certificate)?;
    let foreign = KeyUsages::KeyEncipherment
        | KeyUsages::DataEncipherment
        | KeyUsages::KeyAgreement
        | KeyUsages::KeyCertSign
        | KeyUsages::CRLSign
        | KeyUsages::EncipherOnly
        | KeyUsages::DecipherOnly;
    if !usage.digital_signature() || !usage.0.is_disjoint(foreign) {
        return Err("must have the key usage digitalSignature and no other");
    }
    if let Some((_, ExtendedKeyUsage(purposes))) = extension::<ExtendedKeyUsage>(certificate)?
        && purposes.iter().any(|purpose| FOREIGN_PURPOSES.contains(purpose))
    {
        return Err("has an extended key usage that one for signing code must not have: leave codeSigning alone");
    }
    Ok(())
}

/// `below` is how many authorities stand between this one and the leaf.
fn authority(certificate: &Certificate, below: usize) -> Result<(), &'static str> {
    common(certificate)?;
    match extension::<BasicConstraints>(certificate)? {
        Some((_, BasicConstraints { ca: true, path_len_constraint })) => {
            if path_len_constraint.is_some_and(|most| usize::from(most) < below) {
                return Err("allows fewer authorities below it than there are (pathLenConstraint)");
            }
        }
        _ => return Err("is no authority's, but issued another: basicConstraints must say CA"),
    }
    if !key_usage(certificate)?.key_cert_sign() {
        return Err("must have the key usage keyCertSign");
    }
    Ok(())
}

fn common(certificate: &Certificate) -> Result<(), &'static str> {
    let tbs = &certificate.tbs_certificate;
    if tbs.version != Version::V3 {
        return Err("is not of X.509 version 3");
    }
    if tbs.signature != certificate.signature_algorithm {
        return Err("names two signature algorithms");
    }
    let extensions = tbs.extensions.as_deref().unwrap_or_default();
    if extensions.iter().any(|extension| extension.critical && !UNDERSTOOD.contains(&extension.extn_id)) {
        return Err("has a critical extension that is not known here");
    }
    Ok(())
}

fn key_usage(certificate: &Certificate) -> Result<KeyUsage, &'static str> {
    match extension::<KeyUsage>(certificate)? {
        Some((true, usage)) => Ok(usage),
        Some((false, _)) => Err("has a key usage that is not marked critical"),
        None => Err("has no key usage: it needs digitalSignature, or keyCertSign if it is an authority's, marked critical"),
    }
}

/// An extension and whether it is critical.
fn extension<'a, T: Decode<'a> + AssociatedOid>(certificate: &'a Certificate) -> Result<Option<(bool, T)>, &'static str> {
    certificate.tbs_certificate.get::<T>().map_err(|_| "has an extension that cannot be read, or has one twice")
}

fn is_issued_by(subject: &Parts, issuer: &Parts) -> bool {
    let (subject_names, issuer_names) = (&subject.certificate.tbs_certificate, &issuer.certificate.tbs_certificate);
    subject_names.issuer == issuer_names.subject && is_signed_by(subject, &issuer.certificate).is_some()
}

/// Some if the issuer's key signed the certificate.
fn is_signed_by(subject: &Parts, issuer: &Certificate) -> Option<()> {
    let key = ParsedPublicKey::new(algorithm(&subject.certificate.signature_algorithm, issuer)?, spki(issuer)).ok()?;
    key.verify_sig(&subject.signed, subject.certificate.signature.as_bytes()?).ok()
}

/// How the issuer's key is used. None for what no reader takes, SHA-1 among it.
fn algorithm(identifier: &AlgorithmIdentifierOwned, issuer: &Certificate) -> Option<&'static dyn VerificationAlgorithm> {
    let parameters = issuer.tbs_certificate.subject_public_key_info.algorithm.parameters.as_ref();
    let curve = || parameters?.decode_as::<ObjectIdentifier>().ok();
    Some(match identifier.oid {
        SHA_256_WITH_RSA_ENCRYPTION => &RSA_PKCS1_2048_8192_SHA256,
        SHA_384_WITH_RSA_ENCRYPTION => &RSA_PKCS1_2048_8192_SHA384,
        SHA_512_WITH_RSA_ENCRYPTION => &RSA_PKCS1_2048_8192_SHA512,
        ID_RSASSA_PSS => {
            let parameters: RsaPssParams<'_> = identifier.parameters.as_ref()?.decode_as().ok()?;
            if parameters == RsaPssParams::new::<Sha256>(32) {
                &RSA_PSS_2048_8192_SHA256
            } else if parameters == RsaPssParams::new::<Sha384>(48) {
                &RSA_PSS_2048_8192_SHA384
            } else if parameters == RsaPssParams::new::<Sha512>(64) {
                &RSA_PSS_2048_8192_SHA512
            } else {
                return None;
            }
        }
        ECDSA_WITH_SHA_256 => match curve()? {
            SECP_256_R_1 => &ECDSA_P256_SHA256_ASN1,
            SECP_384_R_1 => &ECDSA_P384_SHA256_ASN1,
            SECP_521_R_1 => &ECDSA_P521_SHA256_ASN1,
            _ => return None,
        },
        ECDSA_WITH_SHA_384 => match curve()? {
            SECP_256_R_1 => &ECDSA_P256_SHA384_ASN1,
            SECP_384_R_1 => &ECDSA_P384_SHA384_ASN1,
            SECP_521_R_1 => &ECDSA_P521_SHA384_ASN1,
            _ => return None,
        },
        ECDSA_WITH_SHA_512 if curve()? == SECP_521_R_1 => &ECDSA_P521_SHA512_ASN1,
        _ => return None,
    })
}
