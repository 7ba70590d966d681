//! Who asks Alibaba Cloud: the chain of places that its own SDKs look for credentials in, in their order.
//! <https://www.alibabacloud.com/help/en/sdk/developer-reference/v2-manage-go-access-credentials>

mod instance;
mod profile;
mod sts;

use std::{
    fmt,
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use jiff::Timestamp;
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;

use super::place::Place;
use crate::{
    clock::Clock,
    kms::{
        Environment, caller,
        exchange::{self, Patience},
        refresh::{CredentialsError, Expiring, Kept, Source, is_sendable},
    },
};

/// The id and secret of an access key, and the token that goes with it if it lasts for a time only.
#[derive(Clone)]
pub(super) struct Credentials {
    pub(super) id: String,
    pub(super) secret: SecretString,
    pub(super) token: Option<SecretString>,
    pub(super) expires: Option<Timestamp>,
}

/// The environment, the pod's OIDC token (RRSA), the profile of the command line tool, the instance's RAM role; and then the role
/// that the key's reference names. The first that is set up at all has to provide: one that is set up wrongly, or fails, is never
/// passed over.
pub(super) struct Chain {
    environment: Environment,
    clock: Clock,
    sts: reqwest::Url,
    role: Option<String>,
    /// To STS.
    outside: reqwest::Client,
    /// To the instance's metadata, which no proxy reaches.
    inside: reqwest::Client,
    metadata: reqwest::Url,
    /// Whether instance metadata has given credentials before.
    has_role: AtomicBool,
}

/// An OIDC token to exchange for a role.
struct Identity {
    role: String,
    provider: String,
    token_file: PathBuf,
    session: Option<String>,
}

/// A role to take with other credentials.
struct Role {
    arn: String,
    session: Option<String>,
    external_id: Option<String>,
}

/// The credentials that requests are signed with, fetched anew before they expire. `role` is taken with what the chain gives.
pub(super) fn provider(
    environment: Environment,
    clock: Clock,
    place: &Place,
    role: Option<&str>,
) -> Result<Kept<Chain>, reqwest::Error> {
    let chain = Chain {
        environment,
        clock: clock.clone(),
        sts: place.sts.clone(),
        role: role.map(str::to_owned),
        outside: caller::client(&place.endpoint, Patience::USUAL).build()?,
        inside: exchange::client(Duration::from_secs(1), Duration::from_secs(5)).no_proxy().build()?,
        metadata: place.metadata.clone(),
        has_role: AtomicBool::new(false),
    };
    Ok(Kept::new(chain, clock))
}

impl Credentials {
    /// Credentials of which every part can stand in a header.
    fn checked(
        from: &str,
        id: &str,
        secret: &str,
        token: Option<&str>,
        expires: Option<Timestamp>,
    ) -> Result<Self, CredentialsError> {
        let unsendable = |what| Err(CredentialsError::Unsendable { from: from.to_owned(), what });
        let (id, secret, token) = (id.trim(), secret.trim(), token.map(str::trim).filter(|token| !token.is_empty()));
        if !is_sendable(id) || id.contains(',') {
            return unsendable("the AccessKey ID");
        }
        if secret.is_empty() {
            return unsendable("the AccessKey secret");
        }
        if token.is_some_and(|token| !is_sendable(token)) {
            return unsendable("the security token");
        }
        Ok(Self { id: id.to_owned(), secret: secret.into(), token: token.map(Into::into), expires })
    }

    /// What must not be repeated of them.
    pub(super) fn secrets(&self) -> impl Iterator<Item = &str> {
        [Some(&self.secret), self.token.as_ref()].into_iter().flatten().map(ExposeSecret::expose_secret)
    }
}

impl PartialEq for Credentials {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id && self.expires == other.expires && self.secrets().eq(other.secrets())
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("id", &self.id).field("expires", &self.expires).finish_non_exhaustive()
    }
}

impl Expiring for Credentials {
    fn expires(&self) -> Option<Timestamp> {
        self.expires
    }
}

impl Source for Chain {
    type Credentials = Credentials;
    type Error = CredentialsError;

    async fn fetch(&self) -> Result<Credentials, CredentialsError> {
        let (source, mut credentials) = self.first().await?;
        if let Some(arn) = &self.role {
            let role = Role { arn: arn.clone(), session: self.environment.get(SESSION), external_id: None };
            credentials = self.assume(&role, &credentials).await?;
        }
        // Those in files and variables are read again and again, and last: nothing to tell.
        if let Some(expires) = credentials.expires {
            tracing::info!(source, role = self.role, %expires, "Alibaba Cloud credentials fetched");
        }
        Ok(credentials)
    }
}

const SESSION: &str = "ALIBABA_CLOUD_ROLE_SESSION_NAME";

impl Chain {
    async fn first(&self) -> Result<(&'static str, Credentials), CredentialsError> {
        if let Some(credentials) = of_environment(&self.environment)? {
            return Ok(("environment", credentials));
        }
        if let Some(identity) = identity(&self.environment)? {
            return Ok(("OIDC token", self.with_token(&identity).await?));
        }
        if let Some(plan) = profile::plan(&self.environment)? {
            let credentials = match plan {
                profile::Plan::Keys(credentials) => credentials,
                profile::Plan::Role(role, credentials) => self.assume(&role, &credentials).await?,
                profile::Plan::Identity(identity) => self.with_token(&identity).await?,
                profile::Plan::Instance(role) => self.of_instance(role.as_deref()).await?,
            };
            return Ok(("profile", credentials));
        }
        let nothing = |instance: &str| {
            CredentialsError::None(format!(
                "there are no Alibaba Cloud credentials: set ALIBABA_CLOUD_ACCESS_KEY_ID and ALIBABA_CLOUD_ACCESS_KEY_SECRET, or give \
                 the pod a RAM role (RRSA) or the instance one (this one has none: {instance}), or make a profile with `aliyun configure`"
            ))
        };
        let named = self.environment.get("ALIBABA_CLOUD_ECS_METADATA");
        if self.environment.get("ALIBABA_CLOUD_ECS_METADATA_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true")) {
            return Err(nothing("instance metadata is switched off here"));
        }
        // Asked without being told to, so most often nobody is there.
        match self.of_instance(named.as_deref()).await {
            Ok(credentials) => {
                self.has_role.store(true, Ordering::Relaxed);
                Ok(("instance metadata", credentials))
            }
            Err(error @ (CredentialsError::Unanswered { .. } | CredentialsError::Refused { .. }))
                if named.is_none() && !self.has_role.load(Ordering::Relaxed) =>
            {
                Err(nothing(&error.to_string()))
            }
            Err(error) => Err(error),
        }
    }
}

fn of_environment(environment: &Environment) -> Result<Option<Credentials>, CredentialsError> {
    const ID: &str = "ALIBABA_CLOUD_ACCESS_KEY_ID";
    const SECRET: &str = "ALIBABA_CLOUD_ACCESS_KEY_SECRET";
    match (environment.get(ID), environment.get(SECRET)) {
        (Some(id), Some(secret)) => {
            let token = environment.get("ALIBABA_CLOUD_SECURITY_TOKEN");
            Credentials::checked("the environment", &id, &secret, token.as_deref(), None).map(Some)
        }
        (Some(_), None) => Err(CredentialsError::Half { one: ID, other: SECRET }),
        (None, Some(_)) => Err(CredentialsError::Half { one: SECRET, other: ID }),
        (None, None) => Ok(None),
    }
}

/// As ACK gives it to a pod whose service account has a RAM role (RRSA).
fn identity(environment: &Environment) -> Result<Option<Identity>, CredentialsError> {
    const FILE: &str = "ALIBABA_CLOUD_OIDC_TOKEN_FILE";
    let Some(token_file) = environment.get(FILE) else { return Ok(None) };
    let beside = |other| environment.get(other).ok_or(CredentialsError::Half { one: FILE, other });
    let (role, provider) = (beside("ALIBABA_CLOUD_ROLE_ARN")?, beside("ALIBABA_CLOUD_OIDC_PROVIDER_ARN")?);
    Ok(Some(Identity { role, provider, token_file: token_file.into(), session: environment.get(SESSION) }))
}

/// As STS and the instance's metadata write credentials.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Document {
    code: Option<String>,
    access_key_id: Option<String>,
    access_key_secret: Option<String>,
    security_token: Option<String>,
    expiration: Option<Timestamp>,
}

impl Document {
    fn checked(&self, from: &str) -> Result<Credentials, CredentialsError> {
        if let Some(code) = self.code.as_deref().filter(|code| *code != "Success") {
            let what = format!("it has no credentials: {}", exchange::one_line(code, 64));
            return Err(CredentialsError::Refused { from: from.to_owned(), what });
        }
        match (&self.access_key_id, &self.access_key_secret, &self.security_token, self.expiration) {
            (Some(id), Some(secret), Some(token), Some(expires)) => {
                Credentials::checked(from, id, secret, Some(token), Some(expires))
            }
            _ => Err(CredentialsError::BadAnswer {
                from: from.to_owned(),
                what: "credentials without AccessKeyId, AccessKeySecret, SecurityToken or Expiration came".to_owned(),
            }),
        }
    }
}

#[cfg(test)]
mod tests;
