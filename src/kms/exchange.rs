//! What providers share: one request and its answer, and text for people, within bounds.

use std::{error::Error as _, time::Duration};

use http::{HeaderMap, StatusCode, header::DATE};
use jiff::{Timestamp, fmt::rfc2822};
use secrecy::zeroize::Zeroizing;

/// An answer that came whole.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    /// It may hold credentials.
    pub(super) body: Zeroizing<Vec<u8>>,
}

/// Why there is no answer. None of it repeats the URL, which is not always ours to show.
#[derive(Debug, Clone, thiserror::Error)]
pub(super) enum NoAnswer {
    #[error("{0}")]
    Transport(String),
    #[error("HTTP {status} with more than {most} bytes")]
    TooLong { status: u16, most: usize },
}

/// How long a KMS may take to be connected to, and to answer from the first byte sent to the last one received.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    pub(super) connect: Duration,
    pub(super) attempt: Duration,
}

impl Patience {
    pub(super) const USUAL: Self = Self { connect: Duration::from_secs(2), attempt: Duration::from_secs(5) };
}

/// A client that follows no redirect, which would carry what was signed or secret elsewhere.
pub(super) fn client(connect: Duration, attempt: Duration) -> reqwest::ClientBuilder {
    reqwest::Client::builder()
        .connect_timeout(connect)
        .timeout(attempt)
        .redirect(reqwest::redirect::Policy::none())
        .user_agent(concat!("countersign/", env!("CARGO_PKG_VERSION")))
}

/// Sends a request and takes an answer of at most so many bytes.
pub(super) async fn exchange(request: reqwest::RequestBuilder, most: usize) -> Result<Answer, NoAnswer> {
    let mut response = request.send().await.map_err(transport)?;
    let (status, headers) = (response.status(), std::mem::take(response.headers_mut()));
    let mut body = Zeroizing::new(Vec::new());
    while let Some(chunk) = response.chunk().await.map_err(transport)? {
        if body.len() + chunk.len() > most {
            return Err(NoAnswer::TooLong { status: status.as_u16(), most });
        }
        body.extend_from_slice(&chunk);
    }
    Ok(Answer { status, headers, body })
}

impl Answer {
    /// The time that the other side has (RFC 9110 section 6.6.1).
    pub(super) fn date(&self) -> Option<Timestamp> {
        rfc2822::DateTimeParser::new().parse_timestamp(self.headers.get(DATE)?).ok()
    }

    pub(super) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap_or_default()
    }
}

/// At most so many characters, none of which ends a line or moves a cursor.
pub(super) fn one_line(text: &str, most: usize) -> String {
    let mut line: String = text.chars().filter(|c| !c.is_control()).take(most + 1).collect();
    if line.chars().count() > most {
        line.pop();
        line.push('…');
    }
    line
}

/// The text without these: a peer that repeats what it was sent shall not bring it into a log.
pub(super) fn without<'a>(text: String, secrets: impl IntoIterator<Item = &'a str>) -> String {
    let secrets = secrets.into_iter().filter(|secret| secret.len() > 3);
    secrets.fold(text, |text, secret| text.replace(secret, "<redacted>"))
}

fn transport(error: reqwest::Error) -> NoAnswer {
    let error = error.without_url();
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    NoAnswer::Transport(one_line(&text, 300))
}
