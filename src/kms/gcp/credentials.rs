//! Who asks Google Cloud: Application Default Credentials, in the order of Google's own libraries.
//! <https://cloud.google.com/docs/authentication/application-default-credentials>

mod federation;
mod file;
mod service_account;

use std::{
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use http::HeaderName;
use reqwest::Url;
use secrecy::ExposeSecret;

use crate::{
    clock::Clock,
    kms::{
        Environment,
        bearer::{Bearer, Issuer, form},
        exchange::{self, Patience},
        refresh::{self, CredentialsError, Expiring, Kept},
    },
};
use file::{Account, User};

/// What a token has to be good for, and no more.
const SCOPE: &str = "https://www.googleapis.com/auth/cloudkms";

/// The file of `GOOGLE_APPLICATION_CREDENTIALS`, the one that `gcloud auth application-default login` writes, the metadata server of the
/// machine or pod. The first that is set up at all has to provide: one that is set up wrongly, or fails, is never passed over.
pub(super) struct Source {
    environment: Environment,
    clock: Clock,
    outside: reqwest::Client,
    /// To the metadata server, which no proxy reaches.
    inside: reqwest::Client,
    metadata: String,
    /// Whether the metadata server is named, or has given a token before.
    has_account: AtomicBool,
}

/// Tokens for the KMS, asked for anew before they expire. `outside` is used for everything but the metadata server, which is at the
/// host `metadata` unless `GCE_METADATA_HOST` says otherwise.
pub(super) fn kept(
    environment: Environment,
    clock: Clock,
    outside: reqwest::Client,
    metadata: &str,
) -> Result<Kept<Source>, reqwest::Error> {
    let inside = exchange::client(Duration::from_secs(1), Patience::USUAL.attempt).no_proxy().build()?;
    let named = environment.get("GCE_METADATA_HOST");
    let has_account = AtomicBool::new(named.is_some());
    let metadata = named.unwrap_or_else(|| metadata.to_owned());
    Ok(Kept::new(Source { environment, clock: clock.clone(), outside, inside, metadata, has_account }, clock))
}

impl refresh::Source for Source {
    type Credentials = Bearer;
    type Error = CredentialsError;

    async fn fetch(&self) -> Result<Bearer, CredentialsError> {
        let (source, bearer) = match self.file()? {
            Some(path) => match file::read(&path)? {
                Account::Service(account) => ("service account", self.of_service_account(&account).await?),
                Account::External(account) => ("workload identity federation", self.of_federation(&account).await?),
                Account::User(account) => ("user", self.of_user(&account).await?),
            },
            None => ("metadata server", self.of_machine().await?),
        };
        tracing::info!(source, expires = bearer.expires().map(tracing::field::display), "Google Cloud credentials fetched");
        Ok(bearer)
    }
}

impl Source {
    fn file(&self) -> Result<Option<PathBuf>, CredentialsError> {
        if let Some(path) = self.environment.get("GOOGLE_APPLICATION_CREDENTIALS") {
            return Ok(Some(path.into()));
        }
        let named = self.environment.get("CLOUDSDK_CONFIG").map(PathBuf::from);
        let folder = named.or_else(|| Some(PathBuf::from(self.environment.get("HOME")?).join(".config/gcloud")));
        let Some(path) = folder.map(|folder| folder.join("application_default_credentials.json")) else { return Ok(None) };
        match path.try_exists() {
            Ok(exists) => Ok(exists.then_some(path)),
            Err(error) => Err(CredentialsError::Unreadable { file: path, why: error.to_string() }),
        }
    }

    /// The refresh token of a person (RFC 6749 section 6), for trying things out.
    async fn of_user(&self, user: &User) -> Result<Bearer, CredentialsError> {
        let (secret, token) = (user.client_secret.expose_secret(), user.refresh_token.expose_secret());
        let issuer = Issuer { name: &name_of(&user.token_uri), secrets: &[secret, token], now: self.clock.now() };
        let asked = [
            ("grant_type", "refresh_token"),
            ("client_id", &user.client_id),
            ("client_secret", secret),
            ("refresh_token", token),
        ];
        issuer.grant(form(self.outside.post(user.token_uri.clone()), &asked)).await
    }

    /// The account of a virtual machine, of a container service, or of a pod in GKE.
    /// <https://cloud.google.com/compute/docs/access/authenticate-workloads>
    async fn of_machine(&self) -> Result<Bearer, CredentialsError> {
        const FLAVOR: HeaderName = HeaderName::from_static("metadata-flavor");
        let name = format!("the metadata server at {}", self.metadata);
        let url = format!("http://{}/computeMetadata/v1/instance/service-accounts/default/token", self.metadata);
        let url: Url = url.parse().map_err(|_| CredentialsError::Wrong("GCE_METADATA_HOST is no host".to_owned()))?;
        let issuer = Issuer { name: &name, secrets: &[], now: self.clock.now() };
        let answered = async {
            let answer = issuer.ask(self.inside.get(url).header(FLAVOR, "Google")).await?;
            // Without it, somebody else's server is there.
            if answer.headers.get(FLAVOR).is_none_or(|flavor| flavor != "Google") {
                let what = "what answers there is none: it does not say Metadata-Flavor: Google".to_owned();
                return Err(CredentialsError::Refused { from: name.clone(), what });
            }
            issuer.read(&answer)
        };
        // Asked without being told to, so most often nobody is there.
        match answered.await {
            Ok(bearer) => {
                self.has_account.store(true, Ordering::Relaxed);
                Ok(bearer)
            }
            Err(error @ (CredentialsError::Unanswered { .. } | CredentialsError::Refused { .. }))
                if !self.has_account.load(Ordering::Relaxed) =>
            {
                Err(CredentialsError::None(format!(
                    "there are no Google Cloud credentials: set GOOGLE_APPLICATION_CREDENTIALS to a file of them, or give the machine or \
                     pod a service account (this one has none: {error})"
                )))
            }
            Err(error) => Err(error),
        }
    }
}

fn name_of(url: &Url) -> String {
    format!("{}{}", url.authority(), url.path())
}

#[cfg(test)]
mod tests;
