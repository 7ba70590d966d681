//! Google Cloud KMS (REST interface v1).

mod crc32c;
mod credentials;
mod fault;
mod reference;

use std::{cmp::Reverse, fmt};

use async_trait::async_trait;
use base64::{Engine, prelude::BASE64_STANDARD};
use http::header::AUTHORIZATION;
use reqwest::{RequestBuilder, Url};
use serde::Deserialize;
use serde_json::json;

use super::{
    Algorithm, Environment, Error, KeySpec, KeyUri, PublicKey, RawSignature, SigningKey, aws,
    bearer::Bearer,
    caller::{self, Caller, no_connection},
    exchange::Patience,
};
use crate::clock::Clock;
use crc32c::crc32c;
use credentials::Source;
pub use reference::GcpReference;

/// One version of an asymmetric signing key in Google Cloud KMS. Each version has key material and an algorithm of its own, padding
/// included, and none is primary; so a version is chosen when the key is opened, and kept.
pub(super) struct GcpKey {
    caller: Caller<Source>,
    /// `projects/…/cryptoKeyVersions/N`.
    version: String,
    algorithm: Algorithm,
    public_key: PublicKey,
}

/// Of 100 versions each.
const MOST_PAGES: usize = 50;

impl GcpKey {
    pub(super) async fn open(uri: &KeyUri, clock: Clock, environment: &Environment) -> Result<Self, Error> {
        Self::open_beside("metadata.google.internal", uri, clock, environment).await
    }

    /// With the metadata server at this host.
    async fn open_beside(metadata: &str, uri: &KeyUri, clock: Clock, environment: &Environment) -> Result<Self, Error> {
        let KeyUri::GcpKms(reference) = uri else { unreachable!("kms::open chose by the kind of URI") };
        let endpoint = reference.endpoint.as_deref().unwrap_or("cloudkms.googleapis.com");
        let endpoint = aws::endpoint_url(endpoint).expect("it was checked when the reference was read");
        let unconnected = |error: reqwest::Error| no_connection(uri, &error);
        let http = caller::client(&endpoint, Patience::USUAL).build().map_err(unconnected)?;
        let credentials = credentials::kept(environment.clone(), clock.clone(), http.clone(), metadata).map_err(unconnected)?;
        let fault = |answer: &_, credentials: &Bearer| fault::fault(answer, credentials.secret());
        let caller = Caller::new(uri, endpoint, http, credentials, fault, clock);

        let number = match reference.version {
            Some(number) => number,
            None => caller.highest_enabled(&reference.key).await?,
        };
        let version = format!("{}/cryptoKeyVersions/{number}", reference.key);
        let (algorithm, public_key) = caller.public_key(&version).await?;
        tracing::info!(key = %uri, resolved = version, spec = %public_key.spec(), %algorithm, "key opened");
        Ok(Self { caller, version, algorithm, public_key })
    }
}

#[async_trait]
impl SigningKey for GcpKey {
    fn uri(&self) -> &KeyUri {
        self.caller.key_uri()
    }

    fn resolved(&self) -> &str {
        &self.version
    }

    fn public_key(&self) -> &PublicKey {
        &self.public_key
    }

    fn allows(&self, algorithm: Algorithm) -> bool {
        self.algorithm == algorithm
    }

    async fn sign(&self, algorithm: Algorithm, digest: &[u8; 32]) -> Result<RawSignature, Error> {
        let (key, spec) = (self.caller.uri(), self.public_key.spec());
        if !spec.supports(algorithm) {
            return Err(Error::WrongAlgorithm { key, spec, algorithm });
        }
        if !self.allows(algorithm) {
            let what = format!(
                "{} signs with {} only, as it was made, and not with {algorithm}: change the rule's algorithm, or name a key that was \
                 made for it",
                self.version, self.algorithm
            );
            return Err(Error::Misconfigured { key, what });
        }
        let body = json!({ "digest": { "sha256": BASE64_STANDARD.encode(digest) }, "digestCrc32c": crc32c(digest).to_string() });
        let url = self.caller.url(&format!("{}:asymmetricSign", self.version));
        let called = self
            .caller
            .call("asymmetricSign", |bearer, _| Ok(authorized(self.caller.http().post(url.clone()).json(&body), bearer)));
        let answer: SignAnswer = called.await?;
        if answer.name != self.version {
            return Err(self.caller.bad(format!("{:?} is asked to sign and {:?} does", self.version, answer.name)));
        }
        if !answer.verified_digest_crc32c {
            return Err(self.caller.bad("a signature over a digest of which it does not say that it came unchanged"));
        }
        let signature = BASE64_STANDARD.decode(&answer.signature);
        let signature = signature.map_err(|_| self.caller.bad("a signature that is not base64"))?;
        self.caller.check_crc("a signature", &signature, &answer.signature_crc32c)?;
        Ok(RawSignature(signature))
    }
}

impl fmt::Debug for GcpKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GcpKey").field("uri", self.uri()).field("version", &self.version).finish_non_exhaustive()
    }
}

impl Caller<Source> {
    /// The names were checked when the reference was read: nothing in them has a meaning in a URL.
    fn url(&self, path: &str) -> Url {
        let mut url = self.endpoint().clone();
        url.set_path(&format!("/v1/{path}"));
        url
    }

    /// The version with the highest number among those that can sign. The order of the list is not relied upon: it is one of names.
    async fn highest_enabled(&self, key: &str) -> Result<u32, Error> {
        let mut numbers = Vec::new();
        let mut token = String::new();
        for _ in 0..MOST_PAGES {
            let mut url = self.url(&format!("{key}/cryptoKeyVersions"));
            url.query_pairs_mut().extend_pairs([("filter", "state=ENABLED"), ("pageSize", "100")]);
            if !token.is_empty() {
                url.query_pairs_mut().append_pair("pageToken", &token);
            }
            let called = self.call("cryptoKeyVersions.list", |bearer, _| Ok(authorized(self.http().get(url.clone()), bearer)));
            let page: Versions = called.await?;
            let enabled = page.versions.iter().filter(|version| version.state == "ENABLED");
            numbers.extend(enabled.filter_map(|version| version.name.rsplit_once("/cryptoKeyVersions/")?.1.parse::<u32>().ok()));
            token = page.next_page_token;
            if token.is_empty() {
                numbers.sort_unstable_by_key(|number| Reverse(*number));
                let what = format!("{key} has no version that is enabled");
                return numbers.first().copied().ok_or(Error::KeyUnusable { key: self.uri(), what });
            }
        }
        Err(self.bad(format!("{key} has more than {MOST_PAGES} pages of versions: add /cryptoKeyVersions/NUMBER to the key")))
    }

    /// What a version signs with.
    async fn public_key(&self, version: &str) -> Result<(Algorithm, PublicKey), Error> {
        let url = self.url(&format!("{version}/publicKey"));
        let called = self.call("getPublicKey", |bearer, _| Ok(authorized(self.http().get(url.clone()), bearer)));
        let answer: PublicKeyAnswer = called.await?;
        if answer.name != version {
            return Err(self.bad(format!("it is asked for {version:?} and gives {:?}", answer.name)));
        }
        self.check_crc("a public key", answer.pem.as_bytes(), &answer.pem_crc32c)?;
        let public_key = PublicKey::from_pem(&answer.pem).map_err(|source| Error::PublicKey { key: self.uri(), source })?;
        let Some((algorithm, spec)) = algorithm_of(&answer.algorithm) else {
            let what = format!(
                "{version} is made for {}, and this signs with RSA_SIGN_PKCS1_*_SHA256, RSA_SIGN_PSS_*_SHA256 and EC_SIGN_P256_SHA256",
                answer.algorithm
            );
            return Err(Error::KeyUnusable { key: self.uri(), what });
        };
        if public_key.spec() != spec {
            return Err(self.bad(format!("a {} public key for a version of {}", public_key.spec(), answer.algorithm)));
        }
        Ok((algorithm, public_key))
    }

    fn check_crc(&self, what: &str, bytes: &[u8], theirs: &str) -> Result<(), Error> {
        if theirs.parse() == Ok(crc32c(bytes)) {
            Ok(())
        } else {
            Err(self.bad(format!("{what} that is not what its CRC32C is of")))
        }
    }
}

fn authorized(request: RequestBuilder, bearer: &Bearer) -> RequestBuilder {
    request.header(AUTHORIZATION, bearer.header())
}

/// `CryptoKeyVersionAlgorithm`: those over SHA-256 of the kinds of key that sign here.
fn algorithm_of(name: &str) -> Option<(Algorithm, KeySpec)> {
    Some(match name {
        "RSA_SIGN_PKCS1_2048_SHA256" => (Algorithm::RsaPkcs1Sha256, KeySpec::Rsa2048),
        "RSA_SIGN_PKCS1_3072_SHA256" => (Algorithm::RsaPkcs1Sha256, KeySpec::Rsa3072),
        "RSA_SIGN_PKCS1_4096_SHA256" => (Algorithm::RsaPkcs1Sha256, KeySpec::Rsa4096),
        "RSA_SIGN_PSS_2048_SHA256" => (Algorithm::RsaPssSha256, KeySpec::Rsa2048),
        "RSA_SIGN_PSS_3072_SHA256" => (Algorithm::RsaPssSha256, KeySpec::Rsa3072),
        "RSA_SIGN_PSS_4096_SHA256" => (Algorithm::RsaPssSha256, KeySpec::Rsa4096),
        "EC_SIGN_P256_SHA256" => (Algorithm::EcdsaSha256, KeySpec::EcP256),
        _ => return None,
    })
}

/// Their integers of 64 bits are texts in JSON.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct SignAnswer {
    name: String,
    signature: String,
    #[serde(default)]
    signature_crc32c: String,
    #[serde(default)]
    verified_digest_crc32c: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PublicKeyAnswer {
    name: String,
    algorithm: String,
    #[serde(default)]
    pem: String,
    #[serde(default)]
    pem_crc32c: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Versions {
    #[serde(default, rename = "cryptoKeyVersions")]
    versions: Vec<Version>,
    #[serde(default)]
    next_page_token: String,
}

#[derive(Deserialize)]
struct Version {
    name: String,
    #[serde(default)]
    state: String,
}

#[cfg(test)]
mod tests;
