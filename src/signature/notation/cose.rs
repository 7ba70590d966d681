//! The COSE envelope: a tagged `COSE_Sign1` (RFC 9052 section 4.2).

use coset::{
    CborSerializable as _, ContentType, CoseSign1, CoseSign1Builder, Header, HeaderBuilder, Label, ProtectedHeader,
    RegisteredLabelWithPrivate, SignatureContext, TaggedCborSerializable as _, cbor::Value, iana, sig_structure_data,
};
use jiff::Timestamp;

use super::{
    AGENT, Attributes, EXPIRY, Error, Open, PAYLOAD_TYPE, SCHEME, SIGNING_AGENT, SIGNING_SCHEME, SIGNING_TIME, check_critical,
    check_text,
};
use crate::{certificate::Chain, kms::Algorithm};

const NAMES: [(Algorithm, iana::Algorithm); 2] =
    [(Algorithm::RsaPssSha256, iana::Algorithm::PS256), (Algorithm::EcdsaSha256, iana::Algorithm::ES256)];
/// RFC 9360 section 2.
const X5CHAIN: Label = Label::Int(iana::HeaderParameter::X5Chain as i64);
/// Seconds since 1970 (RFC 8949 section 3.4.2).
const EPOCH_TIME: u64 = 1;

/// The protected headers' map, encoded.
pub(super) fn protected(attributes: &Attributes) -> Vec<u8> {
    let time = |at: Timestamp| Value::Tag(EPOCH_TIME, Box::new(Value::Integer(at.as_second().into())));
    let name = NAMES.iter().find(|(algorithm, _)| *algorithm == attributes.algorithm).map(|(_, name)| *name);
    let text = |name: &str| RegisteredLabelWithPrivate::Text(name.to_owned());
    let mut header = HeaderBuilder::new()
        .algorithm(name.expect("a chain's key signs with one of the two"))
        .add_critical_label(text(SIGNING_SCHEME))
        .content_type(PAYLOAD_TYPE.to_owned());
    if let Some(expiry) = attributes.expiry {
        header = header.add_critical_label(text(EXPIRY)).text_value(EXPIRY.to_owned(), time(expiry));
    }
    header
        .text_value(SIGNING_TIME.to_owned(), time(attributes.signing_time))
        .text_value(SIGNING_SCHEME.to_owned(), Value::Text(SCHEME.to_owned()))
        .build()
        .to_vec()
        .expect("labels that differ always encode")
}

/// RFC 9052 section 4.4, without external data.
pub(super) fn sig_structure(protected: &[u8], payload: &[u8]) -> Vec<u8> {
    sig_structure_data(SignatureContext::CoseSign1, as_encoded(protected), None, &[], payload)
}

pub(super) fn assemble(protected: &[u8], payload: &[u8], signature: &[u8], chain: &Chain) -> Vec<u8> {
    let certificates = chain.certificates().map(|certificate| Value::Bytes(certificate.to_vec())).collect();
    let unprotected = Header {
        rest: vec![(X5CHAIN, Value::Array(certificates)), (Label::Text(SIGNING_AGENT.to_owned()), Value::Text(AGENT.to_owned()))],
        ..Header::default()
    };
    let mut sign1 =
        CoseSign1Builder::new().unprotected(unprotected).payload(payload.to_vec()).signature(signature.to_vec()).build();
    sign1.protected = as_encoded(protected);
    sign1.to_tagged_vec().expect("labels that differ always encode")
}

/// What was encoded already stays as it is.
fn as_encoded(protected: &[u8]) -> ProtectedHeader {
    ProtectedHeader { original_data: Some(protected.to_vec()), header: Header::default() }
}

pub(super) fn read(content: &[u8]) -> Result<Open, Error> {
    let sign1 = CoseSign1::from_tagged_slice(content).map_err(|error| Error::Malformed("its COSE", error.to_string()))?;
    let signed = sign1.tbs_data(&[]);
    let CoseSign1 { protected: ProtectedHeader { header: protected, .. }, unprotected, payload, signature } = sign1;
    match &protected.content_type {
        Some(ContentType::Text(text)) => check_text("content type", text, PAYLOAD_TYPE)?,
        _ => return Err(Error::Broken("it has no content type in words")),
    }
    match member(&protected, SIGNING_SCHEME) {
        Some(Value::Text(text)) => check_text("signing scheme", text, SCHEME)?,
        _ => return Err(Error::Broken("it has no signing scheme")),
    }
    let signing_time = member(&protected, SIGNING_TIME).ok_or(Error::Broken("it has no signing time"))?;
    let expiry = member(&protected, EXPIRY).map(time).transpose()?;
    let critical = protected.crit.iter().map(|label| match label {
        RegisteredLabelWithPrivate::Text(text) => Ok(text.as_str()),
        RegisteredLabelWithPrivate::Assigned(label) => Err(Error::Critical(format!("{label:?}"))),
        RegisteredLabelWithPrivate::PrivateUse(label) => Err(Error::Critical(label.to_string())),
    });
    check_critical(critical.collect::<Result<Vec<_>, _>>()?, expiry.is_some())?;
    let known = NAMES.iter().find(|(_, name)| protected.alg == Some(RegisteredLabelWithPrivate::Assigned(*name)));
    let (algorithm, _) = known.ok_or_else(|| Error::Unexpected("algorithm", format!("{:?}", protected.alg), "PS256 or ES256"))?;
    let attributes = Attributes { algorithm: *algorithm, signing_time: time(signing_time)?, expiry };
    let certificates = unprotected.rest.into_iter().find(|(label, _)| *label == X5CHAIN).map(|(_, value)| value);
    let Some(Value::Array(certificates)) = certificates else {
        return Err(Error::Broken("it has no list of certificates"));
    };
    let certificates = certificates
        .into_iter()
        .map(|certificate| certificate.into_bytes().map_err(|_| Error::Broken("its list of certificates holds something else")));
    Ok(Open {
        attributes,
        payload: payload.ok_or(Error::Broken("it has no payload"))?,
        signed,
        signature,
        certificates: certificates.collect::<Result<_, _>>()?,
    })
}

fn member<'a>(header: &'a Header, name: &str) -> Option<&'a Value> {
    header.rest.iter().find(|(label, _)| matches!(label, Label::Text(text) if text == name)).map(|(_, value)| value)
}

fn time(value: &Value) -> Result<Timestamp, Error> {
    let Value::Tag(EPOCH_TIME, value) = value else {
        return Err(Error::Broken("its times are not all in seconds since 1970"));
    };
    let seconds = value.as_integer().and_then(|seconds| i64::try_from(seconds).ok());
    let time = seconds.and_then(|seconds| Timestamp::from_second(seconds).ok());
    time.ok_or(Error::Broken("its times are not all in seconds since 1970"))
}
