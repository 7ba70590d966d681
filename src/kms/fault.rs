//! What an error answer of a cloud's KMS says, and means.

use std::time::Duration;

use http::{StatusCode, header::RETRY_AFTER};

use super::exchange::{Answer, one_line, without};

/// An error answer, read.
#[derive(Debug)]
pub(super) struct Fault {
    pub(super) class: Class,
    /// The status, the code and the message, for people. Bounded, and without anything that ends a line.
    pub(super) what: String,
    pub(super) retry_after: Option<Duration>,
}

/// What an error answer means for what happens next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    Throttled,
    Transient,
    /// The credentials are past their time, or unknown: fetching them anew may help.
    CredentialsExpired,
    /// The request was signed for a time that is not theirs.
    Clock,
    /// The request's nonce was used before: another one helps.
    Nonce,
    /// The request came to them changed.
    Garbled,
    BadCredentials,
    Denied,
    /// The state of the key forbids it. Some states pass: its description tells.
    InvalidState,
    KeyUnusable,
    NotFound,
    Misconfigured,
    /// It would have worked, had it not been a dry run.
    DryRun,
    /// To a request to verify: the signature is none of the key's.
    InvalidSignature,
}

/// What of an error answer is told to people.
#[derive(Default)]
pub(super) struct Told<'a> {
    pub(super) code: &'a str,
    pub(super) message: &'a str,
    /// By which the provider finds it again.
    pub(super) request: &'a str,
}

impl Fault {
    /// `secrets` are those of the request.
    pub(super) fn new<'a>(class: Class, answer: &Answer, told: &Told<'_>, secrets: impl IntoIterator<Item = &'a str>) -> Self {
        // Before it is cut, which would leave the beginning of one.
        let message = without(told.message.trim().lines().next().unwrap_or_default().to_owned(), secrets);
        let mut what = format!("HTTP {}", answer.status.as_u16());
        for part in [one_line(told.code, 64), one_line(&message, 300)] {
            if !part.is_empty() {
                what = format!("{what}: {part}");
            }
        }
        if !told.request.is_empty() {
            what = format!("{what} (request {})", one_line(told.request, 64));
        }
        let seconds = answer.headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.trim().parse().ok());
        Self { class, what, retry_after: seconds.map(Duration::from_secs) }
    }
}

impl Class {
    /// Where no code says more.
    pub(super) fn of_status(status: StatusCode) -> Self {
        match status.as_u16() {
            429 => Self::Throttled,
            408 | 500.. => Self::Transient,
            401 | 403 => Self::Denied,
            _ => Self::Misconfigured,
        }
    }
}
