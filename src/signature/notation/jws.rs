//! The JWS envelope: RFC 7515 section 7.2.2, flattened JSON.

use base64::{
    Engine as _,
    prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD},
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{AGENT, Attributes, EXPIRY, Error, Open, PAYLOAD_TYPE, SCHEME, SIGNING_SCHEME, check_critical, check_text};
use crate::{certificate::Chain, kms::Algorithm};

const NAMES: [(Algorithm, &str); 2] = [(Algorithm::RsaPssSha256, "PS256"), (Algorithm::EcdsaSha256, "ES256")];

/// Members that are not known are passed over, as notation does: what matters is marked critical.
#[derive(Serialize, Deserialize)]
struct Protected {
    alg: String,
    crit: Vec<String>,
    cty: String,
    #[serde(rename = "io.cncf.notary.signingScheme")]
    signing_scheme: String,
    #[serde(rename = "io.cncf.notary.signingTime")]
    signing_time: Timestamp,
    #[serde(rename = "io.cncf.notary.expiry", default, skip_serializing_if = "Option::is_none")]
    expiry: Option<Timestamp>,
    /// Of another signing scheme, and an error in this one.
    #[serde(rename = "io.cncf.notary.authenticSigningTime", default, skip_serializing)]
    authentic_signing_time: Option<serde::de::IgnoredAny>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Jws {
    payload: String,
    protected: String,
    header: Unprotected,
    signature: String,
}

/// Nothing in it is signed.
#[derive(Serialize, Deserialize)]
struct Unprotected {
    x5c: Vec<String>,
    #[serde(rename = "io.cncf.notary.signingAgent", default, skip_serializing_if = "Option::is_none")]
    signing_agent: Option<String>,
}

pub(super) fn protected(attributes: &Attributes) -> Vec<u8> {
    let name = NAMES.iter().find(|(algorithm, _)| *algorithm == attributes.algorithm).map(|(_, name)| *name);
    let mut crit = vec![SIGNING_SCHEME.to_owned()];
    if attributes.expiry.is_some() {
        crit.push(EXPIRY.to_owned());
    }
    let protected = Protected {
        alg: name.expect("a chain's key signs with one of the two").to_owned(),
        crit,
        cty: PAYLOAD_TYPE.to_owned(),
        signing_scheme: SCHEME.to_owned(),
        signing_time: attributes.signing_time,
        expiry: attributes.expiry,
        authentic_signing_time: None,
    };
    serde_json::to_vec(&protected).expect("strings and times always serialise")
}

pub(super) fn signing_input(protected: &[u8], payload: &[u8]) -> Vec<u8> {
    format!("{}.{}", BASE64_URL_SAFE_NO_PAD.encode(protected), BASE64_URL_SAFE_NO_PAD.encode(payload)).into_bytes()
}

pub(super) fn assemble(protected: &[u8], payload: &[u8], signature: &[u8], chain: &Chain) -> Vec<u8> {
    let jws = Jws {
        payload: BASE64_URL_SAFE_NO_PAD.encode(payload),
        protected: BASE64_URL_SAFE_NO_PAD.encode(protected),
        header: Unprotected {
            x5c: chain.certificates().map(|certificate| BASE64_STANDARD.encode(certificate)).collect(),
            signing_agent: Some(AGENT.to_owned()),
        },
        signature: BASE64_URL_SAFE_NO_PAD.encode(signature),
    };
    serde_json::to_vec(&jws).expect("strings always serialise")
}

pub(super) fn read(content: &[u8]) -> Result<Open, Error> {
    let jws: Jws = serde_json::from_slice(content).map_err(|error| Error::Malformed("its JWS", error.to_string()))?;
    let url_safe = |what: &'static str, text: &str| {
        BASE64_URL_SAFE_NO_PAD.decode(text).map_err(|error| Error::Malformed(what, error.to_string()))
    };
    let protected = url_safe("its protected header", &jws.protected)?;
    let protected: Protected =
        serde_json::from_slice(&protected).map_err(|error| Error::Malformed("its protected header", error.to_string()))?;
    check_text("content type", &protected.cty, PAYLOAD_TYPE)?;
    check_text("signing scheme", &protected.signing_scheme, SCHEME)?;
    if protected.authentic_signing_time.is_some() {
        return Err(Error::Broken("it has a time of another signing scheme"));
    }
    check_critical(protected.crit.iter().map(String::as_str), protected.expiry.is_some())?;
    let known = NAMES.iter().find(|(_, name)| *name == protected.alg);
    let (algorithm, _) =
        known.ok_or_else(|| Error::Unexpected("algorithm", protected.alg.chars().take(80).collect(), "PS256 or ES256"))?;
    let certificates = jws.header.x5c.iter().map(|text| {
        BASE64_STANDARD.decode(text).map_err(|error| Error::Malformed("its list of certificates", error.to_string()))
    });
    Ok(Open {
        attributes: Attributes { algorithm: *algorithm, signing_time: protected.signing_time, expiry: protected.expiry },
        payload: url_safe("its payload", &jws.payload)?,
        signed: format!("{}.{}", jws.protected, jws.payload).into_bytes(),
        signature: url_safe("its signature", &jws.signature)?,
        certificates: certificates.collect::<Result<_, _>>()?,
    })
}
