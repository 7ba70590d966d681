use std::path::PathBuf;

use aws_credential_types::Credentials;
use http::{
    HeaderMap, HeaderValue,
    header::{ACCEPT, CONTENT_TYPE},
};
use jiff::Timestamp;
use reqwest::Url;
use secrecy::{ExposeSecret, zeroize::Zeroizing};

use super::{CredentialsError, checked};
use crate::{
    clock::Clock,
    kms::{
        Environment,
        aws::{
            place,
            sigv4::{Scope, signed_headers},
        },
        caller::TheirClock,
        exchange::{Answer, exchange, one_line, without},
        refresh::token_of,
    },
};

/// A role to take with other credentials.
pub(super) struct Role {
    pub(super) arn: String,
    /// What the audit trail calls us.
    pub(super) session: Option<String>,
    pub(super) external_id: Option<String>,
    /// Seconds; an hour if absent.
    pub(super) duration: Option<u32>,
}

/// A role to take with a token of somebody that AWS trusts.
pub(super) struct Identity {
    pub(super) role: String,
    pub(super) session: Option<String>,
    pub(super) token_file: PathBuf,
}

/// AWS Security Token Service (query protocol, version 2011-06-15), the region's own.
pub(super) struct Sts<'a> {
    endpoint: Url,
    region: String,
    http: &'a reqwest::Client,
    clock: &'a Clock,
}

const SESSION: &str = "countersign";
const FORM: &str = "application/x-www-form-urlencoded; charset=utf-8";
const LARGEST: usize = 64 * 1024;

impl<'a> Sts<'a> {
    pub(super) fn of(
        environment: &Environment,
        region: &str,
        http: &'a reqwest::Client,
        clock: &'a Clock,
    ) -> Result<Self, CredentialsError> {
        let (endpoint, region) = place::sts(environment, region).map_err(CredentialsError::Wrong)?;
        Ok(Self { endpoint, region, http, clock })
    }

    /// `AssumeRole`, signed with the credentials of whoever may take the role.
    pub(super) async fn assume(&self, role: &Role, with: &Credentials) -> Result<Credentials, CredentialsError> {
        let duration = role.duration.map(|seconds| seconds.to_string());
        let mut form = vec![
            ("Action", "AssumeRole"),
            ("Version", "2011-06-15"),
            ("RoleArn", role.arn.as_str()),
            ("RoleSessionName", role.session.as_deref().unwrap_or(SESSION)),
        ];
        form.extend(role.external_id.as_deref().map(|id| ("ExternalId", id)));
        form.extend(duration.as_deref().map(|seconds| ("DurationSeconds", seconds)));
        let secrets: Vec<_> = [Some(with.secret_access_key()), with.session_token()].into_iter().flatten().collect();
        let time = TheirClock::new(self.clock.clone());
        let mut answer = self.post(&form, Some((with, time.now()))).await?;
        // A clock that is wrong makes the signature wrong: once more by theirs.
        if !answer.status.is_success() && time.set_by(&answer, "STS") {
            answer = self.post(&form, Some((with, time.now()))).await?;
        }
        self.read(&role.arn, &answer, &secrets)
    }

    /// `AssumeRoleWithWebIdentity`, which the token authenticates and nothing else.
    pub(super) async fn with_token(&self, identity: &Identity) -> Result<Credentials, CredentialsError> {
        let token = token_of(&identity.token_file)?;
        let form = [
            ("Action", "AssumeRoleWithWebIdentity"),
            ("Version", "2011-06-15"),
            ("RoleArn", identity.role.as_str()),
            ("RoleSessionName", identity.session.as_deref().unwrap_or(SESSION)),
            ("WebIdentityToken", token.expose_secret()),
        ];
        let answer = self.post(&form, None).await?;
        self.read(&identity.role, &answer, &[token.expose_secret()])
    }

    async fn post(&self, form: &[(&str, &str)], signer: Option<(&Credentials, Timestamp)>) -> Result<Answer, CredentialsError> {
        let body = serde_urlencoded::to_string(form).expect("pairs of texts can be encoded");
        let mut headers = HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static(FORM))]);
        if let Some((credentials, time)) = signer {
            let scope = Scope { service: "sts", region: &self.region };
            let plain = [(CONTENT_TYPE.as_str(), FORM)];
            headers =
                signed_headers(credentials, scope, time, self.endpoint.as_str(), &plain, body.as_bytes()).map_err(|error| {
                    CredentialsError::Wrong(format!("a request to STS cannot be signed with these credentials: {error}"))
                })?;
        }
        let request = self.http.post(self.endpoint.clone()).headers(headers).header(ACCEPT, "text/xml").body(body);
        exchange(request, LARGEST).await.map_err(|error| CredentialsError::unanswered(&self.name(), error))
    }

    fn read(&self, role: &str, answer: &Answer, secrets: &[&str]) -> Result<Credentials, CredentialsError> {
        let from = self.name();
        let xml = answer.text();
        if !answer.status.is_success() {
            let code = element(xml, "Code").unwrap_or_default();
            // What follows the first line repeats the request.
            let message = element(xml, "Message").unwrap_or_default().trim().lines().next().unwrap_or_default();
            let said = without(format!("{code}: {message} (for {role})"), secrets.iter().copied());
            let said = one_line(&said, 300);
            return Err(match code {
                "Throttling"
                | "ThrottlingException"
                | "RequestLimitExceeded"
                | "IDPCommunicationError"
                | "IDPCommunicationErrorException" => CredentialsError::Passing { from, what: said },
                _ => CredentialsError::of_status(&from, answer.status, &said),
            });
        }
        let bad = |what: &str| CredentialsError::BadAnswer { from: from.clone(), what: what.to_owned() };
        let credentials = element_with_children(xml, "Credentials").ok_or_else(|| bad("no Credentials came"))?;
        let part = |name| element(credentials, name).map(|text| Zeroizing::new(text.to_owned()));
        let (Some(id), Some(secret), Some(token)) = (part("AccessKeyId"), part("SecretAccessKey"), part("SessionToken")) else {
            return Err(bad("Credentials without AccessKeyId, SecretAccessKey or SessionToken came"));
        };
        let expires = element(credentials, "Expiration").and_then(|text| text.trim().parse().ok());
        let expires = expires.ok_or_else(|| bad("Credentials without an Expiration came"))?;
        checked(&from, &id, &secret, Some(&token), Some(expires))
    }

    fn name(&self) -> String {
        format!("STS at {}", self.endpoint.authority())
    }
}

/// The text of the first element of that name. STS's replies have no attributes, comments or prefixes, and what is wanted of
/// them holds no character that XML would write another way; an element that does counts as absent.
fn element<'a>(xml: &'a str, name: &str) -> Option<&'a str> {
    element_with_children(xml, name).filter(|text| !text.contains('<'))
}

fn element_with_children<'a>(xml: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = xml.split_once(&format!("<{name}>"))?;
    Some(rest.split_once(&format!("</{name}>"))?.0)
}
