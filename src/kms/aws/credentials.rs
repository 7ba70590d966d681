//! Who asks AWS: the chain of places that AWS's own SDKs look for credentials in, in their order.
//! <https://docs.aws.amazon.com/sdkref/latest/guide/standardized-credentials.html>

mod container;
mod imds;
mod profile;
mod sts;

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use aws_credential_types::Credentials;
use jiff::Timestamp;
use serde::Deserialize;

use crate::{
    clock::Clock,
    kms::{
        Environment, exchange,
        refresh::{CredentialsError, Expiring, Kept, Source, is_sendable},
    },
};
pub(super) use profile::setting_of_profile;
use profile::{Base, Plan};
use sts::{Identity, Sts};

/// The environment, the profile in the shared files, a web identity, the container's endpoint, the instance's.
/// The first that is set up at all has to provide: one that is set up wrongly, or fails, is never passed over.
pub(super) struct Chain {
    environment: Environment,
    clock: Clock,
    /// For the region that is used where nothing else names one.
    region: String,
    /// To STS, and wherever else a certificate is shown.
    outside: reqwest::Client,
    /// To this machine and its neighbours, which no proxy reaches.
    inside: reqwest::Client,
    hosts: Hosts,
    /// Whether instance metadata has given credentials before.
    has_role: AtomicBool,
}

/// Addresses that AWS gave to every machine.
#[derive(Debug, Clone)]
struct Hosts {
    container: String,
    instance: String,
}

impl Default for Hosts {
    fn default() -> Self {
        Self { container: "http://169.254.170.2".to_owned(), instance: "http://169.254.169.254".to_owned() }
    }
}

/// The credentials that requests are signed with, fetched anew before they expire. `region` is the key's; `http` is used for STS.
pub(super) fn provider(
    environment: Environment,
    clock: Clock,
    region: &str,
    http: reqwest::Client,
) -> Result<Kept<Chain>, reqwest::Error> {
    provider_at(Hosts::default(), environment, clock, region, http)
}

fn provider_at(
    hosts: Hosts,
    environment: Environment,
    clock: Clock,
    region: &str,
    outside: reqwest::Client,
) -> Result<Kept<Chain>, reqwest::Error> {
    let inside = exchange::client(Duration::from_secs(1), Duration::from_secs(5)).no_proxy().build()?;
    let (region, time) = (region.to_owned(), clock.clone());
    let chain = Chain { environment, clock: time, region, outside, inside, hosts, has_role: AtomicBool::new(false) };
    Ok(Kept::new(chain, clock))
}

impl Expiring for Credentials {
    fn expires(&self) -> Option<Timestamp> {
        Timestamp::try_from(self.expiry()?).ok()
    }
}

impl Source for Chain {
    type Credentials = Credentials;
    type Error = CredentialsError;

    async fn fetch(&self) -> Result<Credentials, CredentialsError> {
        let (source, credentials) = self.first().await?;
        // Those in files and variables are read again and again, and last: nothing to tell.
        if let Some(expires) = credentials.expires() {
            tracing::info!(source, %expires, "AWS credentials fetched");
        }
        Ok(credentials)
    }
}

impl Chain {
    async fn first(&self) -> Result<(&'static str, Credentials), CredentialsError> {
        if let Some(credentials) = of_environment(&self.environment)? {
            return Ok(("environment", credentials));
        }
        if let Some(plan) = profile::plan(&self.environment)? {
            return Ok(("profile", self.follow(plan).await?));
        }
        if let Some(identity) = web_identity(&self.environment)? {
            return Ok(("web identity", self.sts()?.with_token(&identity).await?));
        }
        if let Some(credentials) = self.of_container().await? {
            return Ok(("container", credentials));
        }
        // Asked without being told to, so most often nobody is there.
        match self.of_instance().await {
            Ok(Some(credentials)) => {
                self.has_role.store(true, Ordering::Relaxed);
                Ok(("instance metadata", credentials))
            }
            Ok(None) => Err(profile::nothing_found(&self.environment, "instance metadata is switched off here")),
            Err(error @ (CredentialsError::Unanswered { .. } | CredentialsError::Refused { .. }))
                if !self.has_role.load(Ordering::Relaxed) =>
            {
                Err(profile::nothing_found(&self.environment, &error.to_string()))
            }
            Err(error) => Err(error),
        }
    }

    /// Takes what the profile starts from, and then one role after another.
    async fn follow(&self, plan: Plan) -> Result<Credentials, CredentialsError> {
        let missing = |what: &str| CredentialsError::Wrong(format!("profile {} has {what}", plan.profile));
        let mut credentials = match &plan.base {
            Base::Keys(credentials) => credentials.clone(),
            Base::WebIdentity(identity) => self.sts()?.with_token(identity).await?,
            Base::Environment => of_environment(&self.environment)?
                .ok_or_else(|| missing("credential_source = Environment, and AWS_ACCESS_KEY_ID is not set"))?,
            Base::Container => self.of_container().await?.ok_or_else(|| {
                missing("credential_source = EcsContainer, and AWS_CONTAINER_CREDENTIALS_RELATIVE_URI and …_FULL_URI are not set")
            })?,
            Base::Instance => self
                .of_instance()
                .await?
                .ok_or_else(|| missing("credential_source = Ec2InstanceMetadata, and AWS_EC2_METADATA_DISABLED is set"))?,
        };
        for role in &plan.roles {
            credentials = self.sts()?.assume(role, &credentials).await?;
        }
        Ok(credentials)
    }

    fn sts(&self) -> Result<Sts<'_>, CredentialsError> {
        Sts::of(&self.environment, &self.region, &self.outside, &self.clock)
    }
}

fn of_environment(environment: &Environment) -> Result<Option<Credentials>, CredentialsError> {
    const ID: &str = "AWS_ACCESS_KEY_ID";
    const SECRET: &str = "AWS_SECRET_ACCESS_KEY";
    match (environment.get(ID), environment.get(SECRET)) {
        (Some(id), Some(secret)) => {
            let token = environment.get("AWS_SESSION_TOKEN");
            checked("the environment", &id, &secret, token.as_deref(), None).map(Some)
        }
        (Some(_), None) => Err(CredentialsError::Half { one: ID, other: SECRET }),
        (None, Some(_)) => Err(CredentialsError::Half { one: SECRET, other: ID }),
        (None, None) => Ok(None),
    }
}

/// As EKS gives it to a pod whose service account has a role (IRSA).
fn web_identity(environment: &Environment) -> Result<Option<Identity>, CredentialsError> {
    const FILE: &str = "AWS_WEB_IDENTITY_TOKEN_FILE";
    const ROLE: &str = "AWS_ROLE_ARN";
    // A role alone is nothing yet: other programs' settings have it, too.
    let Some(token_file) = environment.get(FILE) else { return Ok(None) };
    let role = environment.get(ROLE).ok_or(CredentialsError::Half { one: FILE, other: ROLE })?;
    Ok(Some(Identity { role, session: environment.get("AWS_ROLE_SESSION_NAME"), token_file: token_file.into() }))
}

/// Credentials of which every part can stand in a header.
fn checked(
    from: &str,
    id: &str,
    secret: &str,
    token: Option<&str>,
    expires: Option<Timestamp>,
) -> Result<Credentials, CredentialsError> {
    let unsendable = |what| Err(CredentialsError::Unsendable { from: from.to_owned(), what });
    let (id, secret, token) = (id.trim(), secret.trim(), token.map(str::trim).filter(|token| !token.is_empty()));
    if !is_sendable(id) || id.contains(['/', ',']) {
        return unsendable("the access key id");
    }
    if secret.is_empty() {
        return unsendable("the secret access key");
    }
    if token.is_some_and(|token| !is_sendable(token)) {
        return unsendable("the session token");
    }
    Ok(Credentials::new(id, secret, token.map(str::to_owned), expires.map(Into::into), "countersign"))
}

/// What container and instance endpoints answer.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Document {
    code: Option<String>,
    access_key_id: Option<String>,
    secret_access_key: Option<String>,
    token: Option<String>,
    expiration: Option<Timestamp>,
}

impl Document {
    fn read(from: &str, answer: &exchange::Answer) -> Result<Credentials, CredentialsError> {
        let bad = |what: &str| CredentialsError::BadAnswer { from: from.to_owned(), what: what.to_owned() };
        // Not serde's own message, which can repeat what the answer held.
        let document: Self = serde_json::from_slice(&answer.body).map_err(|_| bad("what came is not the JSON of credentials"))?;
        if let Some(code) = document.code.filter(|code| code != "Success") {
            let what = format!("it has no credentials: {}", exchange::one_line(&code, 64));
            return Err(CredentialsError::Refused { from: from.to_owned(), what });
        }
        let (Some(id), Some(secret)) = (&document.access_key_id, &document.secret_access_key) else {
            return Err(bad("credentials without AccessKeyId or SecretAccessKey came"));
        };
        checked(from, id, secret, document.token.as_deref(), document.expiration)
    }
}

#[cfg(test)]
mod tests;
#[cfg(test)]
pub(super) use tests::fake;
