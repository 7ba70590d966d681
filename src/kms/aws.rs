mod client;
mod credentials;
mod fault;
mod place;
mod sigv4;

use async_trait::async_trait;
use base64::{Engine, prelude::BASE64_STANDARD};
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use super::exchange::Patience;
use super::fault::Class;
use super::{Algorithm, Environment, Error, KeySpec, KeyUri, PublicKey, RawSignature, SigningKey};
use crate::clock::Clock;
use client::{Client, Operation};
pub(super) use place::{endpoint_url, is_loopback, is_region, region_of_arn};

/// An asymmetric signing key in AWS KMS (service model `TrentService`, version 2014-11-01).
#[derive(Debug)]
pub(super) struct AwsKey {
    client: Client,
    /// The reference as configured, which is what policies may demand in a request (`kms:RequestAlias`).
    key: String,
    arn: String,
    public_key: PublicKey,
}

impl AwsKey {
    pub(super) async fn open(uri: &KeyUri, clock: Clock, environment: &Environment) -> Result<Self, Error> {
        Self::open_patiently(uri, clock, environment, Patience::USUAL).await
    }

    async fn open_patiently(uri: &KeyUri, clock: Clock, environment: &Environment, patience: Patience) -> Result<Self, Error> {
        let KeyUri::AwsKms { key, .. } = uri else { unreachable!("kms::open chose by the kind of URI") };
        let client = Client::new(uri, clock, environment, patience)?;
        let metadata = client.describe(key).await?;
        client.check_usable(&metadata)?;
        let answer: PublicKeyAnswer = client.call(Operation::GetPublicKey, &KeyRequest { key_id: key }).await?;
        if answer.key_id != metadata.arn {
            let what = format!("it was {} and a moment later {}", metadata.arn, answer.key_id);
            return Err(Error::Transient { key: client.uri(), what });
        }
        if !names(key, &metadata.arn) {
            return Err(client.bad(format!("it is asked about {key} and speaks of {}", metadata.arn)));
        }
        let der = BASE64_STANDARD.decode(&answer.public_key).map_err(|_| client.bad("a public key that is not base64"))?;
        let public_key = PublicKey::from_spki_der(&der).map_err(|source| Error::PublicKey { key: client.uri(), source })?;
        if spec_name(public_key.spec()) != metadata.key_spec {
            let what = format!("a {} public key for a key that it calls {}", public_key.spec(), metadata.key_spec);
            return Err(client.bad(what));
        }
        let (key, arn) = (key.to_owned(), metadata.arn);
        tracing::info!(key = %client.uri(), arn, spec = %public_key.spec(), "key opened");
        Ok(Self { client, key, arn, public_key })
    }
}

#[async_trait]
impl SigningKey for AwsKey {
    fn uri(&self) -> &KeyUri {
        self.client.key_uri()
    }

    fn resolved(&self) -> &str {
        &self.arn
    }

    fn public_key(&self) -> &PublicKey {
        &self.public_key
    }

    async fn sign(&self, algorithm: Algorithm, digest: &[u8; 32]) -> Result<RawSignature, Error> {
        let spec = self.public_key.spec();
        if !spec.supports(algorithm) {
            return Err(Error::WrongAlgorithm { key: self.client.uri(), spec, algorithm });
        }
        let request = self.sign_request(algorithm, digest);
        let answer: SignAnswer = match self.client.call(Operation::Sign, &request).await {
            Ok(answer) => answer,
            // Which state it is, and whether it passes, only the description says.
            Err(failed) if failed.class == Some(Class::InvalidState) => match self.client.describe(&self.key).await {
                Ok(metadata) => {
                    self.client.check_usable(&metadata)?;
                    return Err(Error::Transient {
                        key: self.client.uri(),
                        what: format!("the state of {} was just changing", self.arn),
                    });
                }
                Err(_) => return Err(failed.error),
            },
            Err(failed) => return Err(failed.error),
        };
        if answer.key_id != self.arn {
            return Err(Error::KeyChanged { key: self.client.uri(), was: self.arn.clone(), now: answer.key_id });
        }
        if answer.signing_algorithm != request.signing_algorithm {
            let what =
                format!("a signature of kind {:?}, when asked for {}", answer.signing_algorithm, request.signing_algorithm);
            return Err(self.client.bad(what));
        }
        let signature =
            BASE64_STANDARD.decode(&answer.signature).map_err(|_| self.client.bad("a signature that is not base64"))?;
        Ok(RawSignature(signature))
    }

    async fn dry_run(&self, algorithm: Algorithm, digest: &[u8; 32]) -> Result<bool, Error> {
        let request = SignRequest { dry_run: true, ..self.sign_request(algorithm, digest) };
        match self.client.call::<SignAnswer>(Operation::Sign, &request).await {
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
        let request = VerifyRequest { signature: BASE64_STANDARD.encode(signature), of: self.sign_request(algorithm, digest) };
        match self.client.call::<VerifyAnswer>(Operation::Verify, &request).await {
            Ok(answer) if answer.key_id != self.arn => {
                Err(Error::KeyChanged { key: self.client.uri(), was: self.arn.clone(), now: answer.key_id })
            }
            Ok(answer) => Ok(Some(answer.signature_valid)),
            Err(failed) if failed.class == Some(Class::InvalidSignature) => Ok(Some(false)),
            Err(failed) => Err(failed.error),
        }
    }
}

impl AwsKey {
    fn sign_request(&self, algorithm: Algorithm, digest: &[u8; 32]) -> SignRequest<'_> {
        SignRequest {
            key_id: &self.key,
            message: BASE64_STANDARD.encode(digest),
            message_type: "DIGEST",
            signing_algorithm: algorithm_name(algorithm),
            dry_run: false,
        }
    }
}

impl Client {
    async fn describe(&self, key: &str) -> Result<Metadata, Error> {
        let answer: DescribeAnswer = self.call(Operation::DescribeKey, &KeyRequest { key_id: key }).await?;
        Ok(answer.key_metadata)
    }

    /// Whether a key in this state can sign, and if not, whether it passes.
    fn check_usable(&self, metadata: &Metadata) -> Result<(), Error> {
        let Metadata { arn, key_state, key_usage, .. } = metadata;
        let unusable = |what: String| Err(Error::KeyUnusable { key: self.uri(), what });
        match key_state.as_str() {
            "Enabled" if key_usage == "SIGN_VERIFY" => Ok(()),
            "Enabled" => unusable(format!("{arn} is there for {key_usage}, not for SIGN_VERIFY")),
            "Creating" | "Updating" | "Unavailable" => {
                Err(Error::Transient { key: self.uri(), what: format!("{arn} is not ready: its state is {key_state}") })
            }
            "Disabled" => unusable(format!("{arn} is disabled")),
            "PendingDeletion" | "PendingReplicaDeletion" => match metadata.deletion_time() {
                Some(time) => unusable(format!("{arn} is going to be deleted on {time}")),
                None => unusable(format!("{arn} is going to be deleted")),
            },
            _ => unusable(format!("{arn} cannot sign: its state is {key_state}")),
        }
    }
}

/// Whether an ARN is that of the key that was asked for. Of an alias that cannot be told.
fn names(key: &str, arn: &str) -> bool {
    if key.contains("alias/") {
        return region_of_arn(arn).is_some();
    }
    arn == key || (!key.starts_with("arn:") && arn.strip_suffix(key).is_some_and(|rest| rest.ends_with(":key/")))
}

fn algorithm_name(algorithm: Algorithm) -> &'static str {
    match algorithm {
        Algorithm::RsaPkcs1Sha256 => "RSASSA_PKCS1_V1_5_SHA_256",
        Algorithm::RsaPssSha256 => "RSASSA_PSS_SHA_256",
        Algorithm::EcdsaSha256 => "ECDSA_SHA_256",
    }
}

fn spec_name(spec: KeySpec) -> &'static str {
    match spec {
        KeySpec::Rsa2048 => "RSA_2048",
        KeySpec::Rsa3072 => "RSA_3072",
        KeySpec::Rsa4096 => "RSA_4096",
        KeySpec::EcP256 => "ECC_NIST_P256",
    }
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct KeyRequest<'a> {
    key_id: &'a str,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct SignRequest<'a> {
    key_id: &'a str,
    message: String,
    /// Its default would have the KMS hash the digest again.
    message_type: &'static str,
    signing_algorithm: &'static str,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    dry_run: bool,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct VerifyRequest<'a> {
    signature: String,
    #[serde(flatten)]
    of: SignRequest<'a>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct VerifyAnswer {
    key_id: String,
    signature_valid: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct SignAnswer {
    /// Always the key's ARN, whatever it was asked for by.
    key_id: String,
    signature: String,
    signing_algorithm: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct PublicKeyAnswer {
    key_id: String,
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
    arn: String,
    key_state: String,
    key_usage: String,
    key_spec: String,
    /// Seconds since 1970.
    deletion_date: Option<f64>,
}

impl Metadata {
    fn deletion_time(&self) -> Option<Timestamp> {
        let since_1970 = SignedDuration::try_from_secs_f64(self.deletion_date?.trunc()).ok()?;
        Timestamp::from_duration(since_1970).ok()
    }
}

#[cfg(test)]
mod tests;
