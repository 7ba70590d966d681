//! The Transit engine of Vault and of OpenBao, which speak the same (HTTP API v1).

mod client;
mod fault;
mod login;
mod place;
mod reference;
mod session;

use std::{collections::BTreeMap, fmt, sync::Arc};

use async_trait::async_trait;
use base64::{Engine, prelude::BASE64_STANDARD};
use http::Method;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::exchange::Patience;
use super::{Algorithm, Environment, Error, KeySpec, KeyUri, PublicKey, RawSignature, SigningKey};
use client::{Client, Request};
use fault::{Class, Fault};
pub use login::{Login, SecretSource};
pub use reference::VaultReference;
pub(crate) use reference::path;
use session::Session;

/// One version of an asymmetric key in a Transit engine.
pub(super) struct VaultKey {
    uri: Arc<KeyUri>,
    client: Arc<Client>,
    session: Arc<Session>,
    paths: Paths,
    version: u32,
    resolved: String,
    public_key: PublicKey,
    /// Renews the token, and ends with the key.
    _keeper: JoinSet<()>,
}

/// API paths, which are also what policies are written for.
struct Paths {
    key: String,
    sign: String,
    verify: String,
}

impl VaultKey {
    pub(super) async fn open(uri: &KeyUri, login: Option<&Login>, environment: &Environment) -> Result<Self, Error> {
        Self::open_patiently(uri, login, environment, Patience::USUAL).await
    }

    async fn open_patiently(
        uri: &KeyUri,
        login: Option<&Login>,
        environment: &Environment,
        patience: Patience,
    ) -> Result<Self, Error> {
        let KeyUri::Vault(reference) = uri else { unreachable!("kms::open chose by the kind of URI") };
        let uri = Arc::new(uri.clone());
        let misconfigured = |what| Error::Misconfigured { key: Arc::clone(&uri), what };
        let client = Arc::new(Client::new(reference, environment, patience).map_err(misconfigured)?);
        let login = login.map_or_else(|| Login::of_environment(reference.flavor, environment), |login| Ok(login.clone()));
        let login = login.map_err(|what| Error::Credentials { key: Arc::clone(&uri), what })?;
        let session = Arc::new(Session::new(Arc::clone(&client), login, environment.clone()));
        let (mount, name) = (&client.place().mount, &reference.key);
        let paths = Paths {
            key: format!("{mount}/keys/{name}"),
            sign: format!("{mount}/sign/{name}/sha2-256"),
            verify: format!("{mount}/verify/{name}/sha2-256"),
        };

        let opened = async {
            let answer: KeyAnswer = call(&client, &session, &paths.key, "read", None).await?;
            answer.data.open(&paths.key, reference.version)
        };
        let (version, pem) = opened.await.map_err(|fault| {
            let fault = match fault.class {
                Class::NotFound => fault.told(&format!(
                    "there is no key at {} on {}: check its name, ?mount= and ?namespace=",
                    paths.key,
                    client.address()
                )),
                _ => fault,
            };
            fault.into_error(Arc::clone(&uri), &client.address())
        })?;
        let public_key = PublicKey::from_pem(&pem.0).map_err(|source| Error::PublicKey { key: Arc::clone(&uri), source })?;
        if spec_name(public_key.spec()) != pem.1 {
            let what = format!("a {} public key for a key that it calls {}", public_key.spec(), pem.1);
            return Err(Error::BadResponse { key: uri, what });
        }
        let resolved = client.place().name(name, version);
        tracing::info!(key = %uri, resolved, spec = %public_key.spec(), "key opened");
        let mut keeper = JoinSet::new();
        let kept = Arc::clone(&session);
        keeper.spawn(async move { kept.keep().await });
        Ok(Self { uri, client, session, paths, version, resolved, public_key, _keeper: keeper })
    }

    async fn ask(&self, body: &Value) -> Result<Signature, Fault> {
        let answer: SignAnswer = call(&self.client, &self.session, &self.paths.sign, "update", Some(body)).await?;
        Ok(answer.data)
    }

    /// What an administrator has to know of a key that was usable when it was opened.
    fn explained(&self, fault: Fault) -> Fault {
        let (key, version) = (&self.paths.key, self.version);
        match fault.class {
            Class::KeyUnusable if fault.what.contains("version") => fault.told(&format!(
                "version {version} of {key}, which was opened, may not sign any more: lower min_encryption_version and min_decryption_version \
                 at {key}/config, or name another version in the witness's key (?version=) and list the old public key under its `verify`"
            )),
            Class::KeyUnusable | Class::NotFound => {
                fault.told(&format!("{key}, which was there when it was opened, cannot be used any more"))
            }
            _ => fault,
        }
    }
}

/// Asks with the token that there is. One that is refused may be past its time or revoked: then once more with another.
async fn call<A: DeserializeOwned>(
    client: &Client,
    session: &Session,
    path: &str,
    capability: &str,
    body: Option<&Value>,
) -> Result<A, Fault> {
    let method = if body.is_some() { Method::POST } else { Method::GET };
    let request = Request { method, path, body: body.cloned(), secret: None };
    let before = session.logins();
    let token = session.token().await?;
    match client.send(&request, Some(&token)).await {
        Err(fault) if fault.is_forbidden() => {
            let token = session.renewed(&token, before).await?;
            let again = client.send(&request, Some(&token)).await;
            again.map_err(|fault| if fault.is_forbidden() { session.explain(&token, path, capability, fault) } else { fault })
        }
        result => result,
    }
}

#[async_trait]
impl SigningKey for VaultKey {
    fn uri(&self) -> &KeyUri {
        &self.uri
    }

    fn resolved(&self) -> &str {
        &self.resolved
    }

    fn public_key(&self) -> &PublicKey {
        &self.public_key
    }

    async fn sign(&self, algorithm: Algorithm, digest: &[u8; 32]) -> Result<RawSignature, Error> {
        let (key, spec) = (|| Arc::clone(&self.uri), self.public_key.spec());
        if !spec.supports(algorithm) {
            return Err(Error::WrongAlgorithm { key: key(), spec, algorithm });
        }
        let body = sign_request(algorithm, digest, self.version);
        let answer = self.ask(&body).await.map_err(|fault| self.explained(fault).into_error(key(), &self.client.address()))?;
        let bad = |what: &str| Error::BadResponse { key: key(), what: what.to_owned() };
        let (version, signature) =
            answer.parts().ok_or_else(|| bad("a signature that does not begin with vault:v and a number"))?;
        if version != self.version {
            let (was, now) = (format!("version {}", self.version), format!("version {version}"));
            return Err(Error::KeyChanged { key: key(), was, now });
        }
        let signature = BASE64_STANDARD.decode(signature).map_err(|_| bad("a signature that is not base64"))?;
        Ok(RawSignature(signature))
    }

    async fn verify(&self, algorithm: Algorithm, digest: &[u8; 32], signature: &[u8]) -> Result<Option<bool>, Error> {
        let mut body = sign_request(algorithm, digest, self.version);
        // Here the version is part of the signature.
        body.as_object_mut().expect("it is one").remove("key_version");
        body["signature"] = format!("vault:v{}:{}", self.version, BASE64_STANDARD.encode(signature)).into();
        let answer = call(&self.client, &self.session, &self.paths.verify, "update", Some(&body)).await;
        let answer: VerifyAnswer =
            answer.map_err(|fault| self.explained(fault).into_error(Arc::clone(&self.uri), &self.client.address()))?;
        Ok(Some(answer.data.valid))
    }
}

impl fmt::Debug for VaultKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VaultKey")
            .field("uri", &self.uri)
            .field("resolved", &self.resolved)
            .field("session", &self.session)
            .field("public_key", &self.public_key)
            .finish_non_exhaustive()
    }
}

/// Everything is said, because the defaults are others: the newest version, a digest hashed again, PSS, and that with as much
/// salt as fits.
fn sign_request(algorithm: Algorithm, digest: &[u8; 32], version: u32) -> Value {
    let mut body = json!({ "input": BASE64_STANDARD.encode(digest), "prehashed": true, "key_version": version });
    match algorithm {
        Algorithm::RsaPkcs1Sha256 => body["signature_algorithm"] = "pkcs1v15".into(),
        Algorithm::RsaPssSha256 => {
            body["signature_algorithm"] = "pss".into();
            body["salt_length"] = "hash".into();
        }
        Algorithm::EcdsaSha256 => body["marshaling_algorithm"] = "asn1".into(),
    }
    body
}

fn spec_name(spec: KeySpec) -> &'static str {
    match spec {
        KeySpec::Rsa2048 => "rsa-2048",
        KeySpec::Rsa3072 => "rsa-3072",
        KeySpec::Rsa4096 => "rsa-4096",
        KeySpec::EcP256 => "ecdsa-p256",
    }
}

#[derive(Deserialize)]
struct KeyAnswer {
    data: Description,
}

#[derive(Deserialize)]
struct Description {
    #[serde(rename = "type")]
    kind: String,
    latest_version: u32,
    /// The lowest version that signs; 0 stands for any.
    min_encryption_version: u32,
    supports_signing: bool,
    /// Only OpenBao says so.
    #[serde(default)]
    soft_deleted: bool,
    /// Seconds; only to warn of it.
    #[serde(default)]
    auto_rotate_period: Value,
    /// By version. A symmetric key has the time of its making here.
    keys: BTreeMap<String, Value>,
}

impl Description {
    /// The version that is to sign, its public key in PEM, and what kind of key it is.
    fn open(self, path: &str, wanted: Option<u32>) -> Result<(u32, (String, String)), Fault> {
        let Self { kind, latest_version: latest, min_encryption_version: least, .. } = &self;
        let unusable = |what: String| Err(Fault::new(Class::KeyUnusable, what));
        if self.soft_deleted {
            return unusable(format!("{path} was deleted and can still be restored: POST to {path}/soft-delete-restore"));
        }
        if !self.supports_signing || !KeySpec::ALL.map(spec_name).contains(&kind.as_str()) {
            let kinds = KeySpec::ALL.map(spec_name).join(", ");
            return unusable(format!("{path} is a key of type {kind}, and countersign signs with {kinds}"));
        }
        let version = wanted.unwrap_or(*latest);
        if version > *latest {
            return unusable(format!("{path} has versions up to {latest}, and the reference asks for {version}"));
        }
        let entry = self.keys.get(&version.to_string());
        if version < *least || entry.is_none() {
            return unusable(format!(
                "version {version} of {path} may not sign: lower min_encryption_version and min_decryption_version at {path}/config, \
                 or ask for another of its versions, up to {latest}"
            ));
        }
        if wanted.is_none() && self.auto_rotate_period.as_u64().is_some_and(|seconds| seconds > 0) {
            tracing::warn!(
                path,
                version,
                "this key is rotated by itself, and a new version is another key: name one with ?version="
            );
        }
        if version < *latest {
            tracing::info!(path, version, latest, "signing goes on with the version that the reference names, not the newest");
        }
        let pem = entry.and_then(|entry| entry["public_key"].as_str()).map(str::to_owned);
        let pem = pem.ok_or_else(|| Fault::new(Class::Garbled, format!("version {version} of {path} without a public key")))?;
        Ok((version, (pem, self.kind)))
    }
}

#[derive(Deserialize)]
struct SignAnswer {
    data: Signature,
}

#[derive(Deserialize)]
struct VerifyAnswer {
    data: Validity,
}

#[derive(Deserialize)]
struct Validity {
    valid: bool,
}

#[derive(Deserialize)]
struct Signature {
    /// `vault:v3:` and base64.
    signature: String,
}

impl Signature {
    fn parts(&self) -> Option<(u32, &str)> {
        let (version, signature) = self.signature.strip_prefix("vault:v")?.split_once(':')?;
        Some((version.parse().ok()?, signature))
    }
}

#[cfg(test)]
mod tests;
