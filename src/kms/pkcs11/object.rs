use std::sync::Arc;

use cryptoki::{
    error::RvError,
    object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle},
    session::Session,
};
use rsa::{
    BigUint, RsaPublicKey,
    pkcs8::{
        EncodePublicKey,
        der::{
            Decode, Reader, SliceReader, Tag, Tagged,
            asn1::{AnyRef, OctetStringRef},
            oid::ObjectIdentifier,
        },
    },
};

use super::{
    fault::Fault,
    module::{Door, Entered},
};
use crate::kms::{Error, PublicKey, PublicKeyError};

/// A private key in a session, as far as it is found anew after each login.
pub(super) fn private_key(door: &Door, session: &Session) -> Result<ObjectHandle, Fault> {
    let mut template = vec![Attribute::Class(ObjectClass::PRIVATE_KEY)];
    template.extend(door.reference.id.clone().map(Attribute::Id));
    template.extend(door.reference.object.clone().map(|label| Attribute::Label(label.into_bytes())));
    let found = session.find_objects(&template)?;
    let key = || Arc::clone(&door.uri);
    match found.as_slice() {
        [one] => Ok(*one),
        [] => {
            let what = "its token has no private key that fits, or does not show it to this user: check id= and object= (`pkcs11-tool \
                        --login --list-objects`)";
            Err(Error::NotFound { key: key(), what: what.to_owned() }.into())
        }
        many => {
            let what =
                format!("{} private keys of its token fit: labels need not be unique, so add id= to the reference", many.len());
            Err(Error::Misconfigured { key: key(), what }.into())
        }
    }
}

/// The public half of a private key, and what the token calls the two.
pub(super) fn describe(door: &Door, entered: &Entered, private: ObjectHandle) -> Result<(PublicKey, String), Fault> {
    let (session, token) = (&entered.session, &entered.token);
    let own = Attributes::of(session, private)?;
    if own.flag(AttributeType::AlwaysAuthenticate) == Some(true) {
        let what =
            "the key wants the PIN for every signature (CKA_ALWAYS_AUTHENTICATE), which is not supported: make one that does not";
        return Err(Error::KeyUnusable { key: Arc::clone(&door.uri), what: what.to_owned() }.into());
    }
    if own.flag(AttributeType::Sign) == Some(false) {
        let what = "the key may not sign: CKA_SIGN is not set";
        return Err(Error::KeyUnusable { key: Arc::clone(&door.uri), what: what.to_owned() }.into());
    }
    let spki = public_half(session, &own)?.ok_or_else(|| {
        let what = "its token has no public half of the key: neither a public key nor a certificate with the same CKA_ID, nor does the \
                    private key tell; import the public key or a certificate beside it";
        Error::NotFound { key: Arc::clone(&door.uri), what: what.to_owned() }
    })?;
    let public_key = spki
        .and_then(|spki| PublicKey::from_spki_der(&spki))
        .map_err(|source| Error::PublicKey { key: Arc::clone(&door.uri), source })?;
    let id = hex::encode(own.bytes(AttributeType::Id).unwrap_or_default());
    let label = String::from_utf8_lossy(own.bytes(AttributeType::Label).unwrap_or_default()).into_owned();
    let resolved = format!("token {} serial {} key {label} id {id}", token.label(), token.serial_number());
    Ok((public_key, resolved))
}

type Spki = Result<Vec<u8>, PublicKeyError>;

/// The object beside a private key that is this public key, if the token has one.
pub(super) fn public_key(session: &Session, private: ObjectHandle, wanted: &PublicKey) -> Result<Option<ObjectHandle>, Fault> {
    let Some(same) = Attributes::of(session, private)?.shared_by_pair() else { return Ok(None) };
    for public in session.find_objects(&[Attribute::Class(ObjectClass::PUBLIC_KEY), same])? {
        if let Some(Ok(spki)) = Attributes::of(session, public)?.spki()
            && PublicKey::from_spki_der(&spki).is_ok_and(|found| found == *wanted)
        {
            return Ok(Some(public));
        }
    }
    Ok(None)
}

/// From wherever it is: the object beside the private key, the private key itself, or a certificate.
fn public_half(session: &Session, own: &Attributes) -> Result<Option<Spki>, Fault> {
    let Some(same) = own.shared_by_pair() else { return Ok(own.spki()) };
    for public in session.find_objects(&[Attribute::Class(ObjectClass::PUBLIC_KEY), same.clone()])? {
        if let Some(spki) = Attributes::of(session, public)?.spki() {
            return Ok(Some(spki));
        }
    }
    if let Some(spki) = own.spki() {
        return Ok(Some(spki));
    }
    for certificate in session.find_objects(&[Attribute::Class(ObjectClass::CERTIFICATE), same])? {
        if let Some(der) = Attributes::of(session, certificate)?.bytes(AttributeType::Value) {
            return Ok(Some(spki_of_certificate(der).ok_or(PublicKeyError::NotSpki)));
        }
    }
    Ok(None)
}

/// What an object tells of itself.
struct Attributes(Vec<Attribute>);

impl Attributes {
    fn of(session: &Session, object: ObjectHandle) -> Result<Self, Fault> {
        let mut found = Vec::new();
        // One by one: some modules answer nothing if one of several is unknown or secret.
        for kind in [
            AttributeType::Id,
            AttributeType::Label,
            AttributeType::KeyType,
            AttributeType::Sign,
            AttributeType::AlwaysAuthenticate,
            AttributeType::PublicKeyInfo,
            AttributeType::Modulus,
            AttributeType::PublicExponent,
            AttributeType::EcParams,
            AttributeType::EcPoint,
            AttributeType::Value,
        ] {
            match session.get_attributes(object, &[kind]) {
                Ok(attributes) => found.extend(attributes),
                Err(cryptoki::error::Error::Pkcs11(RvError::AttributeTypeInvalid | RvError::AttributeSensitive, _)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Self(found))
    }

    fn bytes(&self, kind: AttributeType) -> Option<&[u8]> {
        self.0.iter().find(|attribute| attribute.attribute_type() == kind).and_then(|attribute| match attribute {
            Attribute::Id(bytes)
            | Attribute::Label(bytes)
            | Attribute::PublicKeyInfo(bytes)
            | Attribute::Modulus(bytes)
            | Attribute::PublicExponent(bytes)
            | Attribute::EcParams(bytes)
            | Attribute::EcPoint(bytes)
            | Attribute::Value(bytes) => Some(bytes.as_slice()),
            _ => None,
        })
    }

    fn flag(&self, kind: AttributeType) -> Option<bool> {
        self.0.iter().find(|attribute| attribute.attribute_type() == kind).and_then(|attribute| match attribute {
            Attribute::Sign(is) | Attribute::AlwaysAuthenticate(is) => Some(*is),
            _ => None,
        })
    }

    /// What the other half of the pair has, too. An id stands for the pair, and a label may stand for more; not every maker gives both.
    fn shared_by_pair(&self) -> Option<Attribute> {
        match (self.bytes(AttributeType::Id), self.bytes(AttributeType::Label)) {
            (Some(id), _) if !id.is_empty() => Some(Attribute::Id(id.to_vec())),
            (_, Some(label)) if !label.is_empty() => Some(Attribute::Label(label.to_vec())),
            _ => None,
        }
    }

    fn kind(&self) -> Option<KeyType> {
        self.0.iter().find_map(|attribute| if let Attribute::KeyType(kind) = attribute { Some(*kind) } else { None })
    }

    /// `SubjectPublicKeyInfo`, given whole or put together; `None` if the object does not tell its public half.
    fn spki(&self) -> Option<Spki> {
        let whole = self.bytes(AttributeType::PublicKeyInfo).filter(|der| !der.is_empty());
        if let Some(der) = whole {
            return Some(Ok(der.to_vec()));
        }
        match self.kind()? {
            KeyType::RSA => {
                let (n, e) = (self.bytes(AttributeType::Modulus)?, self.bytes(AttributeType::PublicExponent)?);
                Some(spki_of_rsa(n, e))
            }
            KeyType::EC => {
                let (curve, point) = (self.bytes(AttributeType::EcParams)?, self.bytes(AttributeType::EcPoint)?);
                (!point.is_empty()).then(|| spki_of_p256(curve, point))
            }
            kind => Some(Err(PublicKeyError::Unsupported(format!("PKCS#11 {kind}")))),
        }
    }
}

fn spki_of_rsa(n: &[u8], e: &[u8]) -> Spki {
    let key = RsaPublicKey::new(BigUint::from_bytes_be(n), BigUint::from_bytes_be(e)).ok();
    let der = key.and_then(|key| key.to_public_key_der().ok());
    Ok(der.ok_or(PublicKeyError::Invalid("RSA"))?.as_bytes().to_vec())
}

/// `CKA_EC_PARAMS` and `CKA_EC_POINT`, the latter in an OCTET STRING as the standard has it, or bare as some modules do.
fn spki_of_p256(curve: &[u8], point: &[u8]) -> Spki {
    /// A P-256 key's `SubjectPublicKeyInfo` up to its point (RFC 5480 section 2).
    const HEAD: [u8; 26] = [
        0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d,
        0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
    ];
    const PRIME256V1: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.3.1.7");
    match ObjectIdentifier::from_der(curve) {
        Ok(PRIME256V1) => {}
        Ok(other) => return Err(PublicKeyError::Unsupported(format!("elliptic curve ({other})"))),
        Err(_) => return Err(PublicKeyError::Unsupported("elliptic curve (without a name)".to_owned())),
    }
    let point = OctetStringRef::from_der(point).map_or(point, |inner| inner.as_bytes());
    match point {
        [4, rest @ ..] if rest.len() == 64 => Ok([&HEAD, point].concat()),
        _ => Err(PublicKeyError::Invalid("EC_P256")),
    }
}

/// The `SubjectPublicKeyInfo` in an X.509 certificate (RFC 5280 section 4.1), which is taken for what it holds and not verified.
fn spki_of_certificate(der: &[u8]) -> Option<Vec<u8>> {
    let mut certificate = SliceReader::new(inside(der)?).ok()?;
    let mut fields = SliceReader::new(inside(certificate.tlv_bytes().ok()?)?).ok()?;
    // Version, serial number, signature algorithm, issuer, validity, subject; the first version is not written.
    let before = if fields.peek_byte() == Some(0xa0) { 6 } else { 5 };
    for _ in 0..before {
        fields.tlv_bytes().ok()?;
    }
    fields.tlv_bytes().ok().map(<[u8]>::to_vec)
}

fn inside(sequence: &[u8]) -> Option<&[u8]> {
    AnyRef::from_der(sequence).ok().filter(|any| any.tag() == Tag::Sequence).map(AnyRef::value)
}

#[cfg(test)]
mod tests {
    use rsa::pkcs8::der::Document;

    use super::*;

    fn pem(text: &str) -> Vec<u8> {
        Document::from_pem(text).unwrap().1.as_bytes().to_vec()
    }

    const P256: &str = include_str!("../../../tests/data/vectors/keys/p256.pub.pem");

    #[test]
    fn a_certificate_holds_the_public_key() {
        let der = pem(include_str!("../../../tests/data/vectors/keys/p256.notation.crt.pem"));
        let spki = spki_of_certificate(&der).unwrap();
        assert_eq!(PublicKey::from_spki_der(&spki).unwrap(), PublicKey::from_pem(P256).unwrap());
        for length in 0..der.len() {
            assert_eq!(spki_of_certificate(&der[..length]), None);
        }
        assert_eq!(spki_of_certificate(&pem(P256)), None);
    }

    #[test]
    fn a_point_is_taken_wrapped_and_bare_and_other_curves_are_named() {
        let spki = PublicKey::from_pem(P256).unwrap().spki_der().to_vec();
        let (curve, point) = (&spki[13..23], &spki[26..]);
        let wrapped = [&[4, 65], point].concat();
        for point in [point, &wrapped] {
            assert_eq!(spki_of_p256(curve, point), Ok(spki.clone()));
        }
        assert_eq!(spki_of_p256(curve, &point[..33]), Err(PublicKeyError::Invalid("EC_P256")));
        let other = spki_of_p256(&[6, 5, 0x2b, 0x81, 4, 0, 0x22], point).unwrap_err();
        assert!(other.to_string().contains("1.3.132.0.34"), "{other}");
    }
}
