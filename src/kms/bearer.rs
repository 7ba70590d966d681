//! Bearer tokens of OAuth 2.0 (RFC 6749 and 6750): how Google and Azure are told who asks.

use std::fmt;

use http::{
    HeaderValue, StatusCode,
    header::{ACCEPT, CONTENT_TYPE},
};
use jiff::{SignedDuration, Timestamp};
use reqwest::RequestBuilder;
use secrecy::{ExposeSecret, SecretString, zeroize::Zeroizing};
use serde::Deserialize;
use serde_json::Value;

use super::{
    exchange::{Answer, exchange, one_line, without},
    refresh::{CredentialsError, Expiring, is_sendable},
};

/// A token that gives whoever has it what it was issued for.
#[derive(Clone)]
pub(super) struct Bearer {
    token: SecretString,
    /// By this machine's clock.
    expires: Timestamp,
}

const LARGEST: usize = 64 * 1024;
/// Some answer with a token of many hours; none lasts for years.
const LONGEST: SignedDuration = SignedDuration::from_hours(48);

impl Bearer {
    pub(super) fn checked(from: &str, token: &str, expires: Timestamp) -> Result<Self, CredentialsError> {
        if !is_sendable(token) {
            return Err(CredentialsError::Unsendable { from: from.to_owned(), what: "the access token" });
        }
        Ok(Self { token: token.into(), expires })
    }

    /// For `Authorization`.
    pub(super) fn header(&self) -> HeaderValue {
        let text = Zeroizing::new(format!("Bearer {}", self.secret()));
        let mut header = HeaderValue::from_str(&text).expect("it was checked to be sendable");
        header.set_sensitive(true);
        header
    }

    pub(super) fn secret(&self) -> &str {
        self.token.expose_secret()
    }
}

impl PartialEq for Bearer {
    fn eq(&self, other: &Self) -> bool {
        self.secret() == other.secret() && self.expires == other.expires
    }
}

impl Expiring for Bearer {
    fn expires(&self) -> Option<Timestamp> {
        Some(self.expires)
    }
}

impl fmt::Debug for Bearer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bearer").field("expires", &self.expires).finish_non_exhaustive()
    }
}

/// A place that tokens are asked of.
#[derive(Clone, Copy)]
pub(super) struct Issuer<'a> {
    /// What it is called in errors.
    pub(super) name: &'a str,
    /// What of the request no error may repeat.
    pub(super) secrets: &'a [&'a str],
    /// This machine's time.
    pub(super) now: Timestamp,
}

/// What a token endpoint answers (RFC 6749 section 5.1). Azure's metadata writes its numbers as texts.
#[derive(Deserialize)]
struct Granted {
    access_token: String,
    expires_in: Option<Number>,
    /// Seconds since 1970, where there is no `expires_in`.
    expires_on: Option<Number>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Number {
    Plain(i64),
    Written(String),
}

impl Number {
    fn seconds(self) -> Option<i64> {
        match self {
            Self::Plain(number) => Some(number),
            Self::Written(text) => text.parse().ok(),
        }
    }
}

impl Issuer<'_> {
    /// Asks, and takes the token that is granted.
    pub(super) async fn grant(&self, request: RequestBuilder) -> Result<Bearer, CredentialsError> {
        self.read(&self.ask(request).await?)
    }

    pub(super) async fn ask(&self, request: RequestBuilder) -> Result<Answer, CredentialsError> {
        exchange(request, LARGEST).await.map_err(|error| CredentialsError::unanswered(self.name, error))
    }

    pub(super) fn read(&self, answer: &Answer) -> Result<Bearer, CredentialsError> {
        let granted: Granted = self.document(answer)?;
        let token = Zeroizing::new(granted.access_token);
        let lasts = granted.expires_in.and_then(Number::seconds).map(SignedDuration::from_secs);
        let expires = match (lasts, granted.expires_on.and_then(Number::seconds)) {
            (Some(lasts), _) => self.now.checked_add(lasts.min(LONGEST)).ok(),
            (None, Some(second)) => Timestamp::from_second(second).ok(),
            (None, None) => None,
        };
        let expires = expires.ok_or_else(|| self.bad("a token without a time that it lasts came"))?;
        Bearer::checked(self.name, &token, expires)
    }

    /// The JSON of an answer that is a success.
    pub(super) fn document<A: for<'de> Deserialize<'de>>(&self, answer: &Answer) -> Result<A, CredentialsError> {
        if answer.status == StatusCode::OK {
            // Not serde's own message, which can repeat what the answer held.
            return serde_json::from_slice(&answer.body).map_err(|_| self.bad("what came is not the JSON of a token"));
        }
        let (code, message) = complaint(answer);
        let said = if message.is_empty() { code.clone() } else { format!("{code}: {message}") };
        let said = one_line(&without(said, self.secrets.iter().copied()), 300);
        if matches!(code.as_str(), "temporarily_unavailable" | "server_error" | "internal_failure") {
            return Err(CredentialsError::Passing { from: self.name.to_owned(), what: said });
        }
        Err(CredentialsError::of_status(self.name, answer.status, &said))
    }

    pub(super) fn bad(&self, what: &str) -> CredentialsError {
        CredentialsError::BadAnswer { from: self.name.to_owned(), what: what.to_owned() }
    }
}

/// A form of these, of which JSON is to come back.
pub(super) fn form(request: RequestBuilder, asked: &[(&str, &str)]) -> RequestBuilder {
    let body = serde_urlencoded::to_string(asked).expect("pairs of texts can be encoded");
    request.header(CONTENT_TYPE, "application/x-www-form-urlencoded").header(ACCEPT, "application/json").body(body)
}

/// The code and the first line of the message of an error, as OAuth has them (RFC 6749 section 5.2) or as Google's APIs do.
fn complaint(answer: &Answer) -> (String, String) {
    let body: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().lines().next().unwrap_or_default().trim().to_owned();
    let error = &body["error"];
    if error.is_object() {
        return (text(&error["status"]), text(&error["message"]));
    }
    // App Service's own endpoint has neither.
    let message = if body["error_description"].is_null() { &body["message"] } else { &body["error_description"] };
    (text(error), text(message))
}

#[cfg(test)]
mod tests {
    use http::HeaderMap;

    use super::*;

    fn read(status: u16, body: &str) -> Result<Bearer, CredentialsError> {
        let issuer = Issuer { name: "them", secrets: &["hunter2"], now: Timestamp::UNIX_EPOCH };
        let status = StatusCode::from_u16(status).unwrap();
        issuer.read(&Answer { status, headers: HeaderMap::new(), body: body.as_bytes().to_vec().into() })
    }

    #[test]
    fn tokens_are_read_in_each_way_that_their_time_is_written() {
        for body in [
            r#"{"access_token":"ya29.x","expires_in":3599,"token_type":"Bearer"}"#,
            r#"{"access_token":"ya29.x","expires_in":"3599","expires_on":"1"}"#,
            r#"{"access_token":"ya29.x","expires_on":"3599"}"#,
            r#"{"access_token":"ya29.x","expires_on":3599}"#,
        ] {
            let bearer = read(200, body).unwrap();
            assert_eq!((bearer.secret(), bearer.expires.as_second()), ("ya29.x", 3599), "{body}");
            assert!(!format!("{bearer:?} {:?}", bearer.header()).contains("ya29"));
        }
        let long = read(200, r#"{"access_token":"x","expires_in":99999999999}"#).unwrap();
        assert_eq!(long.expires.as_second(), LONGEST.as_secs());
    }

    #[test]
    fn what_is_no_token_is_told_by_whether_it_passes_and_never_repeated() {
        for (status, body, passing) in [
            (200, "<html>hunter2", true),
            (200, r#"{"access_token":"hunter2"}"#, true),
            (200, r#"{"access_token":"hunter2\n","expires_in":1}"#, false),
            (400, r#"{"error":"invalid_grant","error_description":"AADSTS7000215: hunter2 is bad.\r\nTrace: hunter2"}"#, false),
            (401, r#"{"error":"invalid_client"}"#, false),
            (403, r#"{"error":{"code":403,"status":"PERMISSION_DENIED","message":"not hunter2"}}"#, false),
            (400, r#"{"error":"temporarily_unavailable"}"#, true),
            (429, "", true),
            (503, r#"{"error":"x"}"#, true),
        ] {
            let error = read(status, body).unwrap_err();
            assert_eq!(error.is_passing(), passing, "{status} {body}: {error}");
            assert!(!format!("{error} {error:?}").contains("hunter2"), "{error:?}");
        }
        let error = read(400, r#"{"error":"invalid_grant","error_description":"Invalid JWT Signature."}"#).unwrap_err();
        assert_eq!(error.to_string(), "them gives no credentials: HTTP 400: invalid_grant: Invalid JWT Signature.");
    }
}
