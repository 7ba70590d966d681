use std::path::{Path, PathBuf};

use reqwest::Url;
use secrecy::SecretString;
use serde::Deserialize;

use crate::kms::{
    aws::is_loopback,
    refresh::{CredentialsError, text_of},
};

/// What a file of credentials is good for.
pub(super) enum Account {
    Service(ServiceAccount),
    External(External),
    User(User),
}

/// A service account with a key of its own.
pub(super) struct ServiceAccount {
    pub(super) email: String,
    pub(super) key_id: String,
    /// PKCS#8 in PEM.
    pub(super) key: SecretString,
    pub(super) token_uri: Url,
}

/// Somebody whom a provider of a workload identity pool knows, by a token in a file.
pub(super) struct External {
    /// The provider: `//iam.googleapis.com/projects/…/providers/…`.
    pub(super) audience: String,
    pub(super) token_type: String,
    pub(super) token_url: Url,
    /// `…:generateAccessToken` of a service account to become.
    pub(super) impersonation: Option<Url>,
    pub(super) subject: Subject,
}

/// Where the token is.
pub(super) struct Subject {
    pub(super) file: PathBuf,
    /// The field of a JSON object; the whole file is the token, if absent.
    pub(super) field: Option<String>,
}

/// A person, as `gcloud auth application-default login` writes it.
pub(super) struct User {
    pub(super) client_id: String,
    pub(super) client_secret: SecretString,
    pub(super) refresh_token: SecretString,
    pub(super) token_uri: Url,
}

#[derive(Deserialize)]
struct File {
    r#type: Option<String>,
    universe_domain: Option<String>,
    token_uri: Option<String>,
    client_email: Option<String>,
    private_key: Option<SecretText>,
    private_key_id: Option<String>,
    client_id: Option<String>,
    client_secret: Option<SecretText>,
    refresh_token: Option<SecretText>,
    audience: Option<String>,
    subject_token_type: Option<String>,
    token_url: Option<String>,
    service_account_impersonation_url: Option<String>,
    workforce_pool_user_project: Option<String>,
    credential_source: Option<CredentialSource>,
}

#[derive(Deserialize)]
#[serde(from = "String")]
struct SecretText(SecretString);

impl From<String> for SecretText {
    fn from(text: String) -> Self {
        Self(text.into())
    }
}

#[derive(Deserialize)]
struct CredentialSource {
    file: Option<PathBuf>,
    format: Option<Format>,
}

#[derive(Deserialize)]
struct Format {
    r#type: Option<String>,
    subject_token_field_name: Option<String>,
}

/// Read each time that it is needed: files of credentials are exchanged in place.
pub(super) fn read(path: &Path) -> Result<Account, CredentialsError> {
    let shown = path.display();
    let wrong = |what: String| CredentialsError::Wrong(format!("{shown} {what}"));
    let text = text_of(path)?.ok_or_else(|| wrong("is not there, and GOOGLE_APPLICATION_CREDENTIALS names it".to_owned()))?;
    // Not serde's own message, which can repeat what the file holds.
    let file: File = serde_json::from_str(&text).map_err(|error| {
        wrong(format!("is not the JSON of Google's credentials (line {}, column {})", error.line(), error.column()))
    })?;
    file.account().map_err(wrong)
}

impl File {
    fn account(self) -> Result<Account, String> {
        if self.universe_domain.as_deref().is_some_and(|domain| domain != "googleapis.com") {
            return Err("is for another universe_domain than googleapis.com: that is not supported".to_owned());
        }
        let kind = self.r#type.as_deref().unwrap_or_default();
        let missing = |name: &str| format!("is of type {kind} and has no {name}");
        let text = |value: Option<String>, name: &str| value.filter(|value| !value.is_empty()).ok_or_else(|| missing(name));
        let secret = |value: Option<SecretText>, name: &str| value.map(|text| text.0).ok_or_else(|| missing(name));
        let google = || "https://oauth2.googleapis.com/token".to_owned();
        match kind {
            "service_account" => Ok(Account::Service(ServiceAccount {
                email: text(self.client_email, "client_email")?,
                key_id: self.private_key_id.unwrap_or_default(),
                key: secret(self.private_key, "private_key")?,
                token_uri: safe(&self.token_uri.unwrap_or_else(google), "token_uri")?,
            })),
            "authorized_user" => Ok(Account::User(User {
                client_id: text(self.client_id, "client_id")?,
                client_secret: secret(self.client_secret, "client_secret")?,
                refresh_token: secret(self.refresh_token, "refresh_token")?,
                token_uri: safe(&self.token_uri.unwrap_or_else(google), "token_uri")?,
            })),
            "external_account" => {
                if self.workforce_pool_user_project.is_some() || self.client_id.is_some() {
                    return Err(
                        "is of a workforce pool, which is for people: name a provider of a workload identity pool".to_owned()
                    );
                }
                let impersonation = self.service_account_impersonation_url.as_deref();
                Ok(Account::External(External {
                    audience: text(self.audience, "audience")?,
                    token_type: text(self.subject_token_type, "subject_token_type")?,
                    token_url: safe(&text(self.token_url, "token_url")?, "token_url")?,
                    impersonation: impersonation.map(|url| safe(url, "service_account_impersonation_url")).transpose()?,
                    subject: self.credential_source.ok_or_else(|| missing("credential_source"))?.subject()?,
                }))
            }
            "" => Err("has no type: it is no file of Google's credentials".to_owned()),
            _ => Err(format!("is of type {kind:?}: countersign has service_account, external_account and authorized_user")),
        }
    }
}

impl CredentialSource {
    fn subject(self) -> Result<Subject, String> {
        let file = self
            .file
            .ok_or("has a credential_source without a file: tokens by URL, certificate, command or from AWS are not supported")?;
        let Format { r#type: kind, subject_token_field_name: field } =
            self.format.unwrap_or(Format { r#type: None, subject_token_field_name: None });
        match (kind.as_deref(), field) {
            (None | Some("text"), _) => Ok(Subject { file, field: None }),
            (Some("json"), Some(field)) => Ok(Subject { file, field: Some(field) }),
            (Some("json"), None) => Err("has a credential_source of format json without subject_token_field_name".to_owned()),
            (Some(_), _) => Err("has a credential_source of a format that is neither text nor json".to_owned()),
        }
    }
}

/// Secrets go there, so it is reached by TLS, or is this machine.
fn safe(text: &str, name: &str) -> Result<Url, String> {
    let url: Option<Url> = text.parse().ok();
    url.filter(|url| url.username().is_empty() && url.password().is_none() && url.has_host())
        .filter(|url| url.scheme() == "https" || (url.scheme() == "http" && is_loopback(url)))
        .ok_or_else(|| format!("has a {name} that is no https:// URL"))
}
