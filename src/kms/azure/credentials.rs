//! Who asks Azure: the places that its own libraries look at on a server, in their order.
//! <https://learn.microsoft.com/azure/developer/go/sdk/authentication/credential-chains>

use std::{
    net::IpAddr,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use http::{HeaderValue, StatusCode};
use reqwest::{RequestBuilder, Url};
use secrecy::{ExposeSecret, SecretString};

use super::reference::Cloud;
use crate::{
    clock::Clock,
    kms::{
        Environment,
        aws::{endpoint_url, is_loopback},
        bearer::{Bearer, Issuer, form},
        exchange::{self, Patience},
        refresh::{self, CredentialsError, Expiring, Kept, token_of},
    },
};

/// The client's secret, the pod's federated token, the managed identity of the machine or app. The first that is set up at all has to
/// provide: one that is set up wrongly, or fails, is never passed over.
pub(super) struct Source {
    environment: Environment,
    clock: Clock,
    cloud: Cloud,
    outside: reqwest::Client,
    /// To the endpoints of managed identities, which no proxy reaches.
    inside: reqwest::Client,
    metadata: String,
    /// Whether a managed identity is named, or has given a token before.
    has_identity: AtomicBool,
}

const TENANT: &str = "AZURE_TENANT_ID";
const CLIENT_ID: &str = "AZURE_CLIENT_ID";
const SECRET: &str = "AZURE_CLIENT_SECRET";
const TOKEN_FILE: &str = "AZURE_FEDERATED_TOKEN_FILE";

/// Tokens for vaults of this cloud, asked for anew before they expire. `metadata` is the address of the machine's metadata.
pub(super) fn kept(
    environment: Environment,
    clock: Clock,
    outside: reqwest::Client,
    cloud: Cloud,
    metadata: &str,
) -> Result<Kept<Source>, reqwest::Error> {
    let inside = exchange::client(Duration::from_secs(1), Patience::USUAL.attempt).no_proxy().build()?;
    let (metadata, has_identity) = (metadata.to_owned(), AtomicBool::new(false));
    Ok(Kept::new(Source { environment, clock: clock.clone(), cloud, outside, inside, metadata, has_identity }, clock))
}

impl refresh::Source for Source {
    type Credentials = Bearer;
    type Error = CredentialsError;

    async fn fetch(&self) -> Result<Bearer, CredentialsError> {
        let get = |name| self.environment.get(name);
        let (source, bearer) = if let Some(secret) = get(SECRET) {
            let secret = SecretString::from(secret);
            let asked = [("client_secret", secret.expose_secret())];
            ("client secret", self.of_client(SECRET, &asked, secret.expose_secret()).await?)
        } else if let Some(file) = get(TOKEN_FILE) {
            let token = token_of(file.as_ref())?;
            let asked = [
                ("client_assertion_type", "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"),
                ("client_assertion", token.expose_secret()),
            ];
            ("federated token", self.of_client(TOKEN_FILE, &asked, token.expose_secret()).await?)
        } else if get("AZURE_CLIENT_CERTIFICATE_PATH").is_some() {
            let what = "AZURE_CLIENT_CERTIFICATE_PATH is set, and certificates of clients are not supported: use a client secret, a \
                        federated token or a managed identity";
            return Err(CredentialsError::Wrong(what.to_owned()));
        } else {
            ("managed identity", self.of_identity().await?)
        };
        tracing::info!(source, expires = bearer.expires().map(tracing::field::display), "Azure credentials fetched");
        Ok(bearer)
    }
}

impl Source {
    /// An application's own token, for which it shows what `with` says (RFC 6749 section 4.4).
    /// <https://learn.microsoft.com/entra/identity-platform/v2-oauth2-client-creds-grant-flow>
    async fn of_client(&self, one: &'static str, with: &[(&str, &str)], secret: &str) -> Result<Bearer, CredentialsError> {
        let beside = |other| self.environment.get(other).ok_or(CredentialsError::Half { one, other });
        let (tenant, client) = (beside(TENANT)?, beside(CLIENT_ID)?);
        // It becomes part of a path.
        if !tenant.bytes().all(|b| b.is_ascii_alphanumeric() || b"-.".contains(&b)) || tenant.starts_with('.') {
            return Err(CredentialsError::Wrong(format!("{TENANT} is no tenant's id or domain")));
        }
        let authority = self.environment.get("AZURE_AUTHORITY_HOST").unwrap_or_else(|| self.cloud.authority.to_owned());
        let mut url = endpoint_url(&authority)
            .map_err(|what| CredentialsError::Wrong(format!("AZURE_AUTHORITY_HOST cannot be used: {what}")))?;
        url.set_path(&format!("{tenant}/oauth2/v2.0/token"));
        let scope = format!("{}/.default", self.resource());
        let asked = [&[("grant_type", "client_credentials"), ("client_id", &client), ("scope", &scope)], with].concat();
        let issuer = Issuer { name: url.authority(), secrets: &[secret], now: self.clock.now() };
        issuer.grant(form(self.outside.post(url.clone()), &asked)).await
    }

    /// That of an App Service, a Function or a Container App, or else that of the virtual machine or the node.
    async fn of_identity(&self) -> Result<Bearer, CredentialsError> {
        const ENDPOINT: &str = "IDENTITY_ENDPOINT";
        const HEADER: &str = "IDENTITY_HEADER";
        match (self.environment.get(ENDPOINT), self.environment.get(HEADER)) {
            (Some(endpoint), Some(secret)) => self.of_app(&endpoint, &secret.into()).await,
            (Some(_), None) => {
                let what = "IDENTITY_ENDPOINT is set without IDENTITY_HEADER: managed identities of Azure Arc are not supported";
                Err(CredentialsError::Wrong(what.to_owned()))
            }
            (None, _) => self.of_machine().await,
        }
    }

    /// <https://learn.microsoft.com/azure/app-service/overview-managed-identity#rest-endpoint-reference>
    async fn of_app(&self, endpoint: &str, secret: &SecretString) -> Result<Bearer, CredentialsError> {
        let wrong = |what: &str| CredentialsError::Wrong(what.to_owned());
        let url: Url = endpoint.parse().map_err(|_| wrong("IDENTITY_ENDPOINT is no URL"))?;
        // It is answered by a neighbour on this machine; what it is shown is secret.
        let is_link_local = url.host_str().and_then(|host| host.parse().ok()).is_some_and(|address: IpAddr| match address {
            IpAddr::V4(address) => address.is_link_local(),
            IpAddr::V6(_) => false,
        });
        if !(url.scheme() == "https" || (url.scheme() == "http" && (is_loopback(&url) || is_link_local))) {
            return Err(wrong("IDENTITY_ENDPOINT is neither on this machine nor reached by https"));
        }
        let mut header = HeaderValue::from_str(secret.expose_secret())
            .map_err(|_| CredentialsError::Unsendable { from: "the environment".to_owned(), what: "IDENTITY_HEADER" })?;
        header.set_sensitive(true);
        let name = format!("the identity endpoint at {}", url.authority());
        let request = self.inside.get(self.query(url, "2019-08-01")).header("x-identity-header", header);
        self.granted(&name, &[secret.expose_secret()], request).await
    }

    /// <https://learn.microsoft.com/entra/identity/managed-identities-azure-resources/how-to-use-vm-token>
    async fn of_machine(&self) -> Result<Bearer, CredentialsError> {
        let url: Url = format!("{}/metadata/identity/oauth2/token", self.metadata).parse().expect("it is a constant");
        let name = format!("instance metadata at {}", url.authority());
        let request = self.inside.get(self.query(url, "2018-02-01")).header("metadata", "true");
        // Asked without being told to, so most often nobody is there.
        match self.granted(&name, &[], request).await {
            Ok(bearer) => {
                self.has_identity.store(true, Ordering::Relaxed);
                Ok(bearer)
            }
            Err(error @ (CredentialsError::Unanswered { .. } | CredentialsError::Refused { .. }))
                if !self.has_identity.load(Ordering::Relaxed) =>
            {
                Err(CredentialsError::None(format!(
                    "there are no Azure credentials: set AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_CLIENT_SECRET or \
                     AZURE_FEDERATED_TOKEN_FILE, or give the machine a managed identity (this one has none: {error})"
                )))
            }
            Err(error) => Err(error),
        }
    }

    fn query(&self, mut url: Url, version: &str) -> Url {
        let client = self.environment.get(CLIENT_ID);
        url.query_pairs_mut()
            .extend_pairs([("api-version", version), ("resource", &self.resource())])
            .extend_pairs(client.as_deref().map(|client| ("client_id", client)));
        url
    }

    async fn granted(&self, name: &str, secrets: &[&str], request: RequestBuilder) -> Result<Bearer, CredentialsError> {
        let issuer = Issuer { name, secrets, now: self.clock.now() };
        let answer = issuer.ask(request).await?;
        // So they say that they are being renewed; or a 404 that they are not there at all.
        let is_renewed = answer.status == StatusCode::GONE
            || (answer.status == StatusCode::NOT_FOUND && self.has_identity.load(Ordering::Relaxed));
        issuer.read(&answer).map_err(|error| match error {
            CredentialsError::Refused { from, what } if is_renewed => CredentialsError::Passing { from, what },
            error => error,
        })
    }

    /// What a token is for.
    fn resource(&self) -> String {
        format!("https://{}", self.cloud.domain)
    }
}

#[cfg(test)]
mod tests;
