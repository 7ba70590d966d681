//! Azure Key Vault and Managed HSM (REST interface 7.4).

mod credentials;
mod fault;
mod reference;

use std::fmt;

use async_trait::async_trait;
use base64::{
    Engine,
    alphabet::URL_SAFE,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use http::header::AUTHORIZATION;
use jiff::Timestamp;
use reqwest::Url;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};

use super::{
    Algorithm, Environment, Error, KeyUri, PublicKey, PublicKeyError, RawSignature, SigningKey,
    bearer::Bearer,
    caller::{self, Caller, no_connection},
    ecdsa,
    exchange::Patience,
};
use crate::clock::Clock;
use credentials::Source;
pub use reference::AzureReference;

/// One version of an asymmetric key in a vault. A key gets new versions at any time, also by itself, so one is chosen when the key is
/// opened, and kept.
pub(super) struct AzureKey {
    caller: Caller<Source>,
    /// The identifier of the version: `https://…/keys/NAME/VERSION`.
    kid: String,
    /// `keys/NAME/VERSION`.
    path: String,
    public_key: PublicKey,
}

const VERSION: &str = "7.4";
const METADATA: &str = "http://169.254.169.254";

/// They write without padding, and read with it, too.
const BASE64URL: GeneralPurpose = GeneralPurpose::new(
    &URL_SAFE,
    GeneralPurposeConfig::new().with_encode_padding(false).with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

impl AzureKey {
    pub(super) async fn open(uri: &KeyUri, clock: Clock, environment: &Environment) -> Result<Self, Error> {
        Self::open_beside(METADATA, uri, clock, environment).await
    }

    /// With the machine's metadata at this address.
    async fn open_beside(metadata: &str, uri: &KeyUri, clock: Clock, environment: &Environment) -> Result<Self, Error> {
        let KeyUri::AzureKms(reference) = uri else { unreachable!("kms::open chose by the kind of URI") };
        let (endpoint, cloud) = reference.place().expect("it was checked when the reference was read");
        let unconnected = |error: reqwest::Error| no_connection(uri, &error);
        let http = caller::client(&endpoint, Patience::USUAL).build().map_err(unconnected)?;
        let credentials = credentials::kept(environment.clone(), clock.clone(), http.clone(), cloud, metadata);
        let fault = |answer: &_, credentials: &Bearer| fault::fault(answer, credentials.secret());
        let caller = Caller::new(uri, endpoint, http, credentials.map_err(unconnected)?, fault, clock.clone());

        let mut path = format!("keys/{}", reference.key);
        if let Some(version) = &reference.version {
            path = format!("{path}/{version}");
        }
        let KeyBundle { key, attributes } = caller.ask("get key", &path, None).await?;
        let path = caller.path_of(&key.kid)?;
        let is_asked = path.split('/').nth(1).is_some_and(|name| name.eq_ignore_ascii_case(&reference.key))
            && reference.version.as_deref().is_none_or(|version| path.split('/').nth(2) == Some(version));
        if !is_asked {
            return Err(caller.bad(format!("it is asked about {uri} and speaks of {path}")));
        }
        caller.check_usable(&path, &key, &attributes, clock.now())?;
        let public_key = key.public_key().map_err(|source| Error::PublicKey { key: caller.uri(), source })?;
        tracing::info!(key = %uri, resolved = key.kid, spec = %public_key.spec(), "key opened");
        Ok(Self { caller, kid: key.kid, path, public_key })
    }
}

#[async_trait]
impl SigningKey for AzureKey {
    fn uri(&self) -> &KeyUri {
        self.caller.key_uri()
    }

    fn resolved(&self) -> &str {
        &self.kid
    }

    fn public_key(&self) -> &PublicKey {
        &self.public_key
    }

    async fn sign(&self, algorithm: Algorithm, digest: &[u8; 32]) -> Result<RawSignature, Error> {
        let spec = self.public_key.spec();
        if !spec.supports(algorithm) {
            return Err(Error::WrongAlgorithm { key: self.caller.uri(), spec, algorithm });
        }
        let body = json!({ "alg": algorithm_name(algorithm), "value": BASE64URL.encode(digest) });
        let answer: SignAnswer = self.caller.ask("sign", &format!("{}/sign", self.path), Some(&body)).await?;
        if self.caller.path_of(&answer.kid)? != self.path {
            return Err(self.caller.bad(format!("{} is asked to sign and {:?} does", self.kid, answer.kid)));
        }
        let signature = BASE64URL.decode(&answer.value).map_err(|_| self.caller.bad("a signature that is not base64url"))?;
        if algorithm != Algorithm::EcdsaSha256 {
            return Ok(RawSignature(signature));
        }
        let signature = ecdsa::der_of_p256(&signature);
        signature.map(RawSignature).ok_or_else(|| self.caller.bad("an ES256 signature that is not 64 bytes long"))
    }

    async fn verify(&self, algorithm: Algorithm, digest: &[u8; 32], signature: &[u8]) -> Result<Option<bool>, Error> {
        let signature = match algorithm {
            Algorithm::RsaPkcs1Sha256 | Algorithm::RsaPssSha256 => BASE64URL.encode(signature),
            Algorithm::EcdsaSha256 => match ecdsa::p256_of_der(signature) {
                Some(raw) => BASE64URL.encode(raw),
                // It cannot even be written as Azure reads it.
                None => return Ok(Some(false)),
            },
        };
        let body = json!({ "alg": algorithm_name(algorithm), "digest": BASE64URL.encode(digest), "value": signature });
        let answer: VerifyAnswer = self.caller.ask("verify", &format!("{}/verify", self.path), Some(&body)).await?;
        Ok(Some(answer.value))
    }
}

impl fmt::Debug for AzureKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AzureKey").field("uri", self.uri()).field("kid", &self.kid).finish_non_exhaustive()
    }
}

impl Caller<Source> {
    /// `path` is of names that were checked: nothing in them has a meaning in a URL.
    async fn ask<A: DeserializeOwned>(&self, operation: &str, path: &str, body: Option<&Value>) -> Result<A, Error> {
        let mut url = self.endpoint().clone();
        url.set_path(path);
        url.query_pairs_mut().append_pair("api-version", VERSION);
        let called = self.call(operation, |bearer, _| {
            let request = match body {
                Some(body) => self.http().post(url.clone()).json(body),
                None => self.http().get(url.clone()),
            };
            Ok(request.header(AUTHORIZATION, bearer.header()))
        });
        called.await.map_err(Error::from)
    }

    /// `keys/NAME/VERSION` of a key identifier in this vault.
    fn path_of(&self, kid: &str) -> Result<String, Error> {
        let url: Option<Url> = kid.parse().ok();
        let url = url.filter(|url| url.authority().eq_ignore_ascii_case(self.endpoint().authority()));
        let is_name = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        let path = url.and_then(|url| {
            let path = url.path().strip_prefix('/')?;
            let parts: Vec<_> = path.split('/').collect();
            matches!(parts[..], ["keys", name, version] if is_name(name) && is_name(version)).then(|| path.to_owned())
        });
        path.ok_or_else(|| self.bad(format!("{kid:?} is the identifier of no key in {}", self.endpoint().authority())))
    }

    /// Whether a key in this state can sign.
    fn check_usable(&self, path: &str, key: &JsonWebKey, attributes: &Attributes, now: Timestamp) -> Result<(), Error> {
        let unusable = |what: String| Err(Error::KeyUnusable { key: self.uri(), what });
        let at = |seconds: i64| Timestamp::from_second(seconds).ok();
        if !attributes.enabled {
            return unusable(format!("{path} is disabled"));
        }
        if !key.key_ops.iter().any(|operation| operation == "sign") {
            return unusable(format!("{path} is there for {}, not for sign", key.key_ops.join(", ")));
        }
        match (attributes.nbf.and_then(at), attributes.exp.and_then(at)) {
            (Some(from), _) if now < from => unusable(format!("{path} may not sign before {from}")),
            (_, Some(end)) if end <= now => unusable(format!("{path} may not sign any more since {end}")),
            _ => Ok(()),
        }
    }
}

fn algorithm_name(algorithm: Algorithm) -> &'static str {
    match algorithm {
        Algorithm::RsaPkcs1Sha256 => "RS256",
        Algorithm::RsaPssSha256 => "PS256",
        Algorithm::EcdsaSha256 => "ES256",
    }
}

#[derive(Deserialize)]
struct SignAnswer {
    kid: String,
    /// Base64url; of ES256 it is the two numbers, 32 bytes each.
    value: String,
}

#[derive(Deserialize)]
struct VerifyAnswer {
    value: bool,
}

#[derive(Deserialize)]
struct KeyBundle {
    key: JsonWebKey,
    #[serde(default)]
    attributes: Attributes,
}

/// RFC 7517 and 7518, numbers in base64url.
#[derive(Deserialize)]
struct JsonWebKey {
    kid: String,
    kty: String,
    #[serde(default)]
    key_ops: Vec<String>,
    n: Option<String>,
    e: Option<String>,
    crv: Option<String>,
    x: Option<String>,
    y: Option<String>,
}

#[derive(Deserialize, Default)]
struct Attributes {
    #[serde(default)]
    enabled: bool,
    /// Seconds since 1970.
    nbf: Option<i64>,
    exp: Option<i64>,
}

impl JsonWebKey {
    fn public_key(&self) -> Result<PublicKey, PublicKeyError> {
        let kind = self.kty.strip_suffix("-HSM").unwrap_or(&self.kty);
        let number = |text: &Option<String>| {
            let decoded = text.as_ref().and_then(|text| BASE64URL.decode(text).ok());
            decoded.ok_or(PublicKeyError::Invalid(if kind == "RSA" { "RSA" } else { "P-256" }))
        };
        match (kind, self.crv.as_deref()) {
            ("RSA", _) => PublicKey::from_rsa(&number(&self.n)?, &number(&self.e)?),
            ("EC", Some("P-256")) => PublicKey::from_p256(&number(&self.x)?, &number(&self.y)?),
            ("EC", curve) => Err(PublicKeyError::Unsupported(format!("elliptic curve ({})", curve.unwrap_or("unnamed")))),
            _ => Err(PublicKeyError::Unsupported(self.kty.clone())),
        }
    }
}

#[cfg(test)]
mod tests;
