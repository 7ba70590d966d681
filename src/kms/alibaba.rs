mod acs3;
mod client;
mod credentials;
mod fault;
mod place;

use async_trait::async_trait;
use base64::{Engine, prelude::BASE64_STANDARD};
use jiff::Timestamp;
use serde::Deserialize;

use super::exchange::Patience;
use super::fault::Class;
use super::{Algorithm, Environment, Error, KeySpec, KeyUri, PublicKey, RawSignature, SigningKey};
use crate::clock::Clock;
use client::Client;
use place::{Gateway, Place};

/// One version of an asymmetric signing key in Alibaba Cloud KMS (interface version 2016-01-20). Each version has key material of its
/// own and none is primary, so a version is chosen when the key is opened, and kept.
#[derive(Debug)]
pub(super) struct AlibabaKey {
    client: Client,
    /// The reference as configured: an alias stays one, so that it is seen if it is moved.
    key: String,
    /// Unless the KMS only repeats the alias.
    id: Option<String>,
    version: String,
    resolved: String,
    public_key: PublicKey,
}

/// Of 100 versions each.
const MOST_PAGES: u32 = 50;

impl AlibabaKey {
    pub(super) async fn open(uri: &KeyUri, clock: Clock, environment: &Environment) -> Result<Self, Error> {
        Self::open_at(uri, Place::of(uri, environment)?, clock, environment, Patience::USUAL).await
    }

    async fn open_at(
        uri: &KeyUri,
        place: Place,
        clock: Clock,
        environment: &Environment,
        patience: Patience,
    ) -> Result<Self, Error> {
        let KeyUri::AlibabaKms { instance, key, version, .. } = uri else { unreachable!("kms::open chose by the kind of URI") };
        let client = Client::new(uri, place, clock, environment, patience)?;
        let metadata = match client.gateway() {
            Gateway::Shared => {
                let metadata = client.describe(key).await?;
                client.check_usable(&metadata, instance.as_deref())?;
                Some(metadata)
            }
            Gateway::Dedicated => None,
        };
        let version = match (version, &metadata) {
            (Some(version), _) => version.clone(),
            (None, Some(metadata)) => client.newest_version(&metadata.key_id).await?,
            (None, None) => {
                let what = "an instance's own gateway does not list versions: add /versions/VERSION to the key, as the console \
                            shows it"
                    .to_owned();
                return Err(Error::Misconfigured { key: client.uri(), what });
            }
        };
        let asked = [("KeyId", key.as_str()), ("KeyVersionId", version.as_str())];
        let answer: PublicKeyAnswer = client.call("GetPublicKey", &asked).await?;
        if answer.key_version_id != version {
            return Err(client.bad(format!("it is asked for version {version} and gives {}", answer.key_version_id)));
        }
        // That it repeats what it was asked for is not documented, and not excluded.
        let is_echo = answer.key_id == *key;
        match &metadata {
            Some(metadata) if metadata.key_id != answer.key_id && !is_echo => {
                let what = format!("it was {} and a moment later {}", metadata.key_id, answer.key_id);
                return Err(Error::Transient { key: client.uri(), what });
            }
            None if !names(key, &answer.key_id) && !is_echo => {
                return Err(client.bad(format!("it is asked about {key} and speaks of {}", answer.key_id)));
            }
            Some(_) | None => {}
        }
        let public_key =
            PublicKey::from_pem(&answer.public_key).map_err(|source| Error::PublicKey { key: client.uri(), source })?;
        if let Some(metadata) = &metadata
            && spec_name(public_key.spec()) != metadata.key_spec
        {
            let what = format!("a {} public key for a key that it calls {}", public_key.spec(), metadata.key_spec);
            return Err(client.bad(what));
        }
        let (whole, id) = match metadata {
            Some(metadata) => (metadata.arn, Some(metadata.key_id)),
            None => (answer.key_id.clone(), Some(answer.key_id).filter(|_| !is_echo || !key.contains("alias/"))),
        };
        let (key, resolved) = (key.clone(), format!("{whole}/versions/{version}"));
        tracing::info!(key = %client.uri(), resolved, spec = %public_key.spec(), "key opened");
        Ok(Self { client, key, id, version, resolved, public_key })
    }
}

#[async_trait]
impl SigningKey for AlibabaKey {
    fn uri(&self) -> &KeyUri {
        self.client.key_uri()
    }

    fn resolved(&self) -> &str {
        &self.resolved
    }

    fn public_key(&self) -> &PublicKey {
        &self.public_key
    }

    async fn sign(&self, algorithm: Algorithm, digest: &[u8; 32]) -> Result<RawSignature, Error> {
        let spec = self.public_key.spec();
        if !spec.supports(algorithm) {
            return Err(Error::WrongAlgorithm { key: self.client.uri(), spec, algorithm });
        }
        let digest = BASE64_STANDARD.encode(digest);
        let answer: SignAnswer = self.client.call("AsymmetricSign", &self.asked(algorithm, &digest)).await?;
        self.check_identity(&answer.key_id, &answer.key_version_id)?;
        let signature = BASE64_STANDARD.decode(&answer.value);
        signature.map(RawSignature).map_err(|_| self.client.bad("a signature that is not base64"))
    }

    async fn dry_run(&self, algorithm: Algorithm, digest: &[u8; 32]) -> Result<bool, Error> {
        let digest = BASE64_STANDARD.encode(digest);
        let asked: Vec<_> = self.asked(algorithm, &digest).into_iter().chain([("DryRun", "true")]).collect();
        match self.client.call::<SignAnswer>("AsymmetricSign", &asked).await {
            // That it would have worked is told as an error.
            Err(failed) if failed.class == Some(Class::DryRun) => Ok(true),
            Err(failed) => Err(failed.error),
            Ok(_) => {
                tracing::debug!(key = %self.client.uri(), "the KMS does not know dry runs, and made a signature");
                Ok(false)
            }
        }
    }

    async fn verify(&self, algorithm: Algorithm, digest: &[u8; 32], signature: &[u8]) -> Result<Option<bool>, Error> {
        let (digest, value) = (BASE64_STANDARD.encode(digest), BASE64_STANDARD.encode(signature));
        let asked: Vec<_> = self.asked(algorithm, &digest).into_iter().chain([("Value", value.as_str())]).collect();
        let answer: VerifyAnswer = self.client.call("AsymmetricVerify", &asked).await?;
        self.check_identity(&answer.key_id, &answer.key_version_id)?;
        Ok(Some(answer.value))
    }
}

impl AlibabaKey {
    /// The configuration's names of the algorithms are this KMS's own.
    fn asked<'a>(&'a self, algorithm: Algorithm, digest: &'a str) -> [(&'a str, &'a str); 4] {
        [("KeyId", &self.key), ("KeyVersionId", &self.version), ("Algorithm", algorithm.name()), ("Digest", digest)]
    }

    /// Whether it was this key that answered.
    fn check_identity(&self, key_id: &str, key_version_id: &str) -> Result<(), Error> {
        let is_key = key_id == self.key || self.id.as_ref().is_none_or(|id| id == key_id);
        if is_key && key_version_id == self.version {
            return Ok(());
        }
        let now = format!("{key_id}/versions/{key_version_id}");
        Err(Error::KeyChanged { key: self.client.uri(), was: self.resolved.clone(), now })
    }
}

impl Client {
    async fn describe(&self, key: &str) -> Result<Metadata, Error> {
        let answer: DescribeAnswer = self.call("DescribeKey", &[("KeyId", key)]).await?;
        let metadata = answer.key_metadata;
        if !names(key, &metadata.key_id) {
            return Err(self.bad(format!("it is asked about {key} and speaks of {}", metadata.key_id)));
        }
        Ok(metadata)
    }

    /// Whether a key in this state can sign.
    fn check_usable(&self, metadata: &Metadata, instance: Option<&str>) -> Result<(), Error> {
        let Metadata { arn, key_state, key_usage, delete_date, dkms_instance_id, .. } = metadata;
        let unusable = |what: String| Err(Error::KeyUnusable { key: self.uri(), what });
        if let Some(instance) = instance
            && instance != dkms_instance_id
        {
            let what = format!("the reference names instance {instance}, and the key is in {dkms_instance_id:?}");
            return Err(Error::Misconfigured { key: self.uri(), what });
        }
        match key_state.as_str() {
            "Enabled" if key_usage == "SIGN/VERIFY" => Ok(()),
            "Enabled" => unusable(format!("{arn} is there for {key_usage}, not for SIGN/VERIFY")),
            "Disabled" => unusable(format!("{arn} is disabled")),
            "PendingDeletion" => match delete_date.as_deref().and_then(|date| date.parse::<Timestamp>().ok()) {
                Some(time) => unusable(format!("{arn} is going to be deleted on {time}")),
                None => unusable(format!("{arn} is going to be deleted")),
            },
            _ => unusable(format!("{arn} cannot sign: its state is {key_state}")),
        }
    }

    /// The version that was made last. Where two were in the same second, the one that is listed first.
    async fn newest_version(&self, key_id: &str) -> Result<String, Error> {
        let mut newest: Option<Version> = None;
        let mut seen = 0;
        for page in 1..=MOST_PAGES {
            let page = page.to_string();
            let asked = [("KeyId", key_id), ("PageNumber", page.as_str()), ("PageSize", "100")];
            let VersionsAnswer { key_versions, total_count } = self.call("ListKeyVersions", &asked).await?;
            let came = key_versions.key_version;
            seen += came.len();
            let is_last = came.is_empty() || seen >= total_count;
            for version in came {
                if newest.as_ref().is_none_or(|newest| newest.creation_date < version.creation_date) {
                    newest = Some(version);
                }
            }
            if is_last {
                let found = newest.map(|version| version.key_version_id);
                return found.ok_or_else(|| self.bad(format!("{key_id} has no version")));
            }
        }
        Err(self.bad(format!("{key_id} has more than {MOST_PAGES} pages of versions: add /versions/VERSION to the key")))
    }
}

/// Whether an id is that of the key that was asked for. Of an alias that cannot be told.
fn names(key: &str, id: &str) -> bool {
    let asked = key.rsplit(':').next().unwrap_or_default();
    asked.starts_with("alias/") || asked.strip_prefix("key/").unwrap_or(asked) == id
}

fn spec_name(spec: KeySpec) -> &'static str {
    match spec {
        KeySpec::Rsa2048 => "RSA_2048",
        KeySpec::Rsa3072 => "RSA_3072",
        KeySpec::Rsa4096 => "RSA_4096",
        KeySpec::EcP256 => "EC_P256",
    }
}

/// Used once: they remember for a while, and refuse the same again.
fn nonce() -> String {
    format!("{:016x}{:016x}", fastrand::u64(..), fastrand::u64(..))
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct SignAnswer {
    key_id: String,
    key_version_id: String,
    value: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct VerifyAnswer {
    key_id: String,
    key_version_id: String,
    value: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct PublicKeyAnswer {
    key_id: String,
    key_version_id: String,
    /// PEM.
    public_key: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DescribeAnswer {
    key_metadata: Metadata,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Metadata {
    key_id: String,
    arn: String,
    key_state: String,
    key_usage: String,
    key_spec: String,
    delete_date: Option<String>,
    #[serde(default, rename = "DKMSInstanceId")]
    dkms_instance_id: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct VersionsAnswer {
    key_versions: Versions,
    total_count: usize,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Versions {
    #[serde(default)]
    key_version: Vec<Version>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Version {
    key_version_id: String,
    creation_date: Timestamp,
}

#[cfg(test)]
mod tests;
