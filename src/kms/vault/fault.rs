use std::{sync::Arc, time::Duration};

use http::{StatusCode, header::RETRY_AFTER};
use serde::Deserialize;

use crate::kms::{
    Error, KeyUri,
    exchange::{Answer, NoAnswer, one_line, without},
};

/// Why a request did not bring what it was for. It can be told to many who waited for the same.
#[derive(Debug, Clone)]
pub(super) struct Fault {
    pub(super) class: Class,
    /// For people. Bounded, and without anything that ends a line.
    pub(super) what: String,
    pub(super) retry_after: Option<Duration>,
}

/// What it means for what happens next.
#[derive(Debug, Clone)]
pub(super) enum Class {
    Throttled,
    /// The server is sealed, starting, changing its leader, or has a fault of its own.
    Transient,
    /// No whole answer came.
    Unreachable(NoAnswer),
    /// The token is bad, past its time, or its policies deny it: the answer is the same for all of these.
    Forbidden,
    /// There is no token, and no way to one.
    Credentials,
    KeyUnusable,
    NotFound,
    Misconfigured,
    /// An answer that cannot be right.
    Garbled,
}

impl Fault {
    pub(super) fn new(class: Class, what: impl Into<String>) -> Self {
        Self { class, what: what.into(), retry_after: None }
    }

    /// Reads an answer that is no success: `{"errors": ["…"]}`.
    /// `secrets` are those of the request.
    pub(super) fn of<'a>(answer: &Answer, secrets: impl IntoIterator<Item = &'a str>) -> Self {
        let Answer { status, headers, body } = answer;
        let text = match serde_json::from_slice::<ErrorBody>(body) {
            Ok(ErrorBody { errors }) => errors.join("; "),
            // Go's own server says this in plain text; other texts, such as a proxy's page, are nobody's to read here.
            Err(_) if body.windows(PLAIN_TO_TLS.len()).any(|part| part == PLAIN_TO_TLS) => {
                "the server speaks TLS: begin its address with https://".to_owned()
            }
            Err(_) => String::new(),
        };
        // Several errors come as a list with bullets, one a line.
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        let text = text.strip_prefix("1 error occurred: * ").unwrap_or(&text);
        let mut what = format!("HTTP {}", status.as_u16());
        if !text.is_empty() {
            what = format!("{what}: {}", one_line(&without(text.to_owned(), secrets), 300));
        }
        if matches!(status.as_u16(), 307 | 308) {
            what = format!(
                "{what}: it is a standby and names another server, which is not followed with a token: let its address be that \
                            of the active one, or of a balancer that knows it"
            );
        }
        // In seconds (RFC 9110 section 10.2.3); the other form, a date, is not sent.
        let retry_after = headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.trim().parse().ok());
        Self { class: classify(*status, text), what, retry_after: retry_after.map(Duration::from_secs) }
    }

    /// The same, with words before what it says.
    pub(super) fn told(self, before: &str) -> Self {
        Self { what: format!("{before}: {}", self.what), ..self }
    }

    pub(super) fn is_forbidden(&self) -> bool {
        matches!(self.class, Class::Forbidden)
    }

    /// As the rest of this program knows it. `at` is the server's address.
    pub(super) fn into_error(self, key: Arc<KeyUri>, at: &str) -> Error {
        let Self { class, what, retry_after } = self;
        match class {
            Class::Throttled => Error::Throttled { key, what, retry_after },
            Class::Transient => Error::Transient { key, what: format!("{at} cannot do that just now: {what}") },
            Class::Unreachable(source) => Error::Unreachable { key, at: at.to_owned(), source: Box::new(source) },
            Class::Forbidden => Error::Denied { key, what },
            Class::Credentials => Error::Credentials { key, what },
            Class::KeyUnusable => Error::KeyUnusable { key, what },
            Class::NotFound => Error::NotFound { key, what },
            Class::Misconfigured => Error::Misconfigured { key, what: format!("{at} did not understand: {what}") },
            Class::Garbled => Error::BadResponse { key, what },
        }
    }
}

const PLAIN_TO_TLS: &[u8] = b"HTTP request to an HTTPS server";

/// The status alone misleads: Transit answers 500 to much that no repetition helps.
fn classify(status: StatusCode, text: &str) -> Class {
    const UNUSABLE: [&str; 4] =
        ["does not support signing", "soft-deleted key", "no such key version", "requested version for signing"];
    const NO_KEY: &str = "signing key not found";
    const REQUEST: [&str; 4] =
        ["past the max TTL", "unsupported rsa signature algorithm", "input must be hashed", "unsupported signature algorithm"];
    let says = |parts: &[&str]| parts.iter().any(|part| text.contains(part));
    match status.as_u16() {
        429 => Class::Throttled,
        401 | 403 => Class::Forbidden,
        400 | 500 if says(&UNUSABLE) => Class::KeyUnusable,
        400 | 500 if says(&[NO_KEY]) => Class::NotFound,
        500 if says(&REQUEST) => Class::Misconfigured,
        404 => Class::NotFound,
        // 307, 308: a standby that cannot ask the active node for us, which passes during a change of leaders. 412: a replica
        // that is behind. 472, 473: replicas that only stand by.
        307 | 308 | 408 | 412 | 472 | 473 | 500.. => Class::Transient,
        _ => Class::Misconfigured,
    }
}

#[derive(Deserialize)]
struct ErrorBody {
    errors: Vec<String>,
}

#[cfg(test)]
mod tests {
    use http::HeaderMap;

    use super::*;
    use crate::outcome::{Classify, Verdict};

    fn fault(status: u16, body: &str) -> Fault {
        Fault::of(
            &Answer {
                status: StatusCode::from_u16(status).unwrap(),
                headers: HeaderMap::new(),
                body: body.as_bytes().to_vec().into(),
            },
            [],
        )
    }

    /// The error's name in metrics, and whether it is for a later try.
    fn ends(status: u16, text: &str) -> (&'static str, bool) {
        let body = serde_json::json!({ "errors": [text] }).to_string();
        let key = Arc::new("hashivault://k".parse().unwrap());
        let error = fault(status, &body).into_error(key, "https://vault.internal:8200");
        (error.name(), matches!(error.verdict(), Verdict::Retry { .. }))
    }

    #[test]
    fn what_servers_say_means_what_it_was_seen_to_mean() {
        for (status, text, name, retry) in [
            (403, "permission denied", "denied", false),
            (403, "1 error occurred:\n\t* permission denied\n\n", "denied", false),
            (400, "signing key not found", "not_found", false),
            (404, "namespace not found", "not_found", false),
            (404, "no handler for route \"transit/keys/r\". route entry not found.", "not_found", false),
            (400, "key type aes256-gcm96 does not support signing", "key_unusable", false),
            (500, "1 error occurred:\n\t* no such key version\n\n", "key_unusable", false),
            (500, "requested version for signing is higher than the latest key version", "key_unusable", false),
            (500, "requested version for signing is less than the minimum encryption key version", "key_unusable", false),
            (500, "1 error occurred:\n\t* refusing to use soft-deleted key\n\n", "key_unusable", false),
            (500, "crypto/rsa: input must be hashed message", "misconfigured", false),
            (500, "unsupported rsa signature algorithm pss2", "misconfigured", false),
            (500, "1 error occurred:\n\t* past the max TTL, cannot renew\n\n", "misconfigured", false),
            (400, "missing required field", "misconfigured", false),
            (405, "unsupported operation", "misconfigured", false),
            (503, "Vault is sealed", "transient", true),
            (500, "local node not active but active cluster node not found", "transient", true),
            (412, "required index state not present", "transient", true),
            (473, "", "transient", true),
            (307, "", "transient", true),
            (429, "request path \"transit/sign/r\": rate limit quota exceeded", "throttled", true),
            (502, "", "transient", true),
        ] {
            assert_eq!(ends(status, text), (name, retry), "{status} {text}");
        }
    }

    #[test]
    fn a_body_that_is_none_of_a_vault_is_not_repeated() {
        for body in ["", "<html>sign in to the guest network</html>", "{}", "[1]", r#"{"errors":7}"#, "\u{0}"] {
            assert_eq!(fault(502, body).what, "HTTP 502", "{body}");
        }
        assert_eq!(fault(404, r#"{"errors":[]}"#).what, "HTTP 404");
        let plain = fault(400, "Client sent an HTTP request to an HTTPS server.\n");
        assert!(plain.what.contains("https://"), "{}", plain.what);
    }

    #[test]
    fn a_text_is_one_bounded_line() {
        let body = serde_json::json!({ "errors": ["2 errors occurred:\n\t* one\n\t* two \u{1b}[31m\n\n", "é".repeat(5_000)] });
        let what = fault(400, &body.to_string()).what;
        assert!(what.starts_with("HTTP 400: 2 errors occurred: * one * two [31m ; é"), "{what}");
        assert!(what.chars().count() < 350 && !what.contains('\u{1b}'));
    }

    #[test]
    fn retry_after_is_heard() {
        let mut headers = HeaderMap::new();
        headers.insert(RETRY_AFTER, "7".parse().unwrap());
        let fault = Fault::of(&Answer { status: StatusCode::TOO_MANY_REQUESTS, headers, body: Vec::new().into() }, []);
        assert_eq!(fault.retry_after, Some(Duration::from_secs(7)));
    }
}
