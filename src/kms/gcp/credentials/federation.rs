use http::header::AUTHORIZATION;
use jiff::Timestamp;
use secrecy::{ExposeSecret, SecretString, zeroize::Zeroizing};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    SCOPE, Source,
    file::{External, Subject},
    name_of,
};
use crate::kms::{
    bearer::{Bearer, Issuer, form},
    refresh::{CredentialsError, is_sendable, text_of, token_of},
};

/// To become a service account; what that one may do is asked for of it.
const TO_BECOME: &str = "https://www.googleapis.com/auth/cloud-platform";

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Impersonated {
    access_token: String,
    expire_time: Timestamp,
}

impl Source {
    /// A token of somebody that the pool trusts, exchanged for one of Google's (RFC 8693), and that for one of a service account if
    /// there is one to become. <https://cloud.google.com/iam/docs/workload-identity-federation>
    pub(super) async fn of_federation(&self, account: &External) -> Result<Bearer, CredentialsError> {
        let subject = account.subject.token()?;
        let name = name_of(&account.token_url);
        let issuer = Issuer { name: &name, secrets: &[subject.expose_secret()], now: self.clock.now() };
        let asked = [
            ("grant_type", "urn:ietf:params:oauth:grant-type:token-exchange"),
            ("audience", &account.audience),
            ("scope", if account.impersonation.is_some() { TO_BECOME } else { SCOPE }),
            ("requested_token_type", "urn:ietf:params:oauth:token-type:access_token"),
            ("subject_token_type", &account.token_type),
            ("subject_token", subject.expose_secret()),
        ];
        let federated = issuer.grant(form(self.outside.post(account.token_url.clone()), &asked)).await?;
        let Some(url) = &account.impersonation else { return Ok(federated) };
        let name = name_of(url);
        let issuer = Issuer { name: &name, secrets: &[federated.secret()], now: self.clock.now() };
        let request = self.outside.post(url.clone()).header(AUTHORIZATION, federated.header());
        let answer = issuer.ask(request.json(&json!({ "scope": [SCOPE], "lifetime": "3600s" }))).await?;
        let Impersonated { access_token, expire_time } = issuer.document(&answer)?;
        Bearer::checked(&name, &Zeroizing::new(access_token), expire_time)
    }
}

impl Subject {
    /// Read each time: such tokens last for minutes, and are exchanged in place.
    fn token(&self) -> Result<SecretString, CredentialsError> {
        let Some(field) = &self.field else { return token_of(&self.file) };
        let text = text_of(&self.file)?.unwrap_or_default();
        let document: Value = serde_json::from_str(&text).unwrap_or_default();
        let token = document[field.as_str()].as_str().filter(|token| is_sendable(token));
        token.map(Into::into).ok_or_else(|| CredentialsError::NoToken { file: self.file.clone() })
    }
}
