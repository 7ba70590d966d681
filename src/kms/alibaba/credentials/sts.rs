use http::{StatusCode, header::ACCEPT};
use secrecy::ExposeSecret;
use serde::Deserialize;

use super::{Chain, Credentials, CredentialsError, Document, Identity, Role};
use crate::kms::{
    alibaba::acs3::Call,
    caller::TheirClock,
    exchange::{Answer, exchange, one_line, without},
    refresh::token_of,
};

const VERSION: &str = "2015-04-01";
const SESSION_NAME: &str = "countersign";
const LARGEST: usize = 64 * 1024;

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Assumed {
    credentials: Document,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase")]
struct Complaint {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

/// Security Token Service (interface version 2015-04-01).
impl Chain {
    /// `AssumeRole`, signed with the credentials of whoever may take the role.
    pub(super) async fn assume(&self, role: &Role, with: &Credentials) -> Result<Credentials, CredentialsError> {
        let mut parameters =
            vec![("RoleArn", role.arn.as_str()), ("RoleSessionName", role.session.as_deref().unwrap_or(SESSION_NAME))];
        parameters.extend(role.external_id.as_deref().map(|id| ("ExternalId", id)));
        let call = Call { endpoint: &self.sts, action: "AssumeRole", version: VERSION, parameters: &parameters };
        let time = TheirClock::new(self.clock.clone());
        let post = async || {
            let (url, headers) = call.signed(with, time.now(), &super::super::nonce());
            let answer = exchange(self.outside.post(url).headers(headers), LARGEST).await;
            answer.map_err(|error| CredentialsError::unanswered(&self.sts_name(), error))
        };
        let mut answer = post().await?;
        // A clock that is wrong makes the request too old: once more by theirs.
        if !answer.status.is_success() && time.set_by(&answer, "STS") {
            answer = post().await?;
        }
        self.read(&role.arn, &answer, with.secrets())
    }

    /// `AssumeRoleWithOIDC`, which the token authenticates and nothing else.
    pub(super) async fn with_token(&self, identity: &Identity) -> Result<Credentials, CredentialsError> {
        let token = token_of(&identity.token_file)?;
        let time = self.clock.now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let query = [
            ("Action", "AssumeRoleWithOIDC"),
            ("Version", VERSION),
            ("Format", "JSON"),
            ("Timestamp", time.as_str()),
            ("SignatureNonce", &super::super::nonce()),
        ];
        let form = [
            ("RoleArn", identity.role.as_str()),
            ("OIDCProviderArn", identity.provider.as_str()),
            ("OIDCToken", token.expose_secret()),
            ("RoleSessionName", identity.session.as_deref().unwrap_or(SESSION_NAME)),
        ];
        let mut url = self.sts.clone();
        url.query_pairs_mut().extend_pairs(query);
        let body = serde_urlencoded::to_string(form).expect("pairs of texts can be encoded");
        let content = (http::header::CONTENT_TYPE, "application/x-www-form-urlencoded");
        let request = self.outside.post(url).header(content.0, content.1).header(ACCEPT, "application/json").body(body);
        let answer = exchange(request, LARGEST).await.map_err(|error| CredentialsError::unanswered(&self.sts_name(), error))?;
        self.read(&identity.role, &answer, [token.expose_secret()])
    }

    fn read<'a>(
        &self,
        role: &str,
        answer: &Answer,
        secrets: impl IntoIterator<Item = &'a str>,
    ) -> Result<Credentials, CredentialsError> {
        let from = self.sts_name();
        if answer.status == StatusCode::OK {
            let Ok(assumed) = serde_json::from_slice::<Assumed>(&answer.body) else {
                let what = "what came is not the JSON of credentials".to_owned();
                return Err(CredentialsError::BadAnswer { from, what });
            };
            return assumed.credentials.checked(&from);
        }
        let Complaint { code, message } = serde_json::from_slice(&answer.body).unwrap_or_default();
        // Where a signature is wrong, what they signed is repeated, security token included.
        let message = if code.contains("Signature") { message.split(". ").next().unwrap_or_default() } else { &message };
        let said = one_line(&without(format!("{code}: {message} (for {role})"), secrets), 300);
        if code.starts_with("Throttling") || code.starts_with("ServiceUnavailable") || code == "SignatureNonceUsed" {
            return Err(CredentialsError::Passing { from, what: said });
        }
        Err(CredentialsError::of_status(&from, answer.status, &said))
    }

    fn sts_name(&self) -> String {
        format!("STS at {}", self.sts.authority())
    }
}
