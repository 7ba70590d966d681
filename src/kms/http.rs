//! What every KMS that is spoken to over HTTP needs: time limits, answers of bounded size, texts that can be shown.

use std::{net::IpAddr, time::Duration};

use http::{HeaderMap, StatusCode, header::RETRY_AFTER};
use reqwest::Url;

/// How long a KMS may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    pub(super) connect: Duration,
    /// From the first byte sent to the last one received.
    pub(super) attempt: Duration,
}

impl Patience {
    pub(super) const USUAL: Self = Self { connect: Duration::from_secs(2), attempt: Duration::from_secs(5) };

    /// A client for this server. It follows no redirect: what authorises a request does not go where an answer says.
    pub(super) fn client(self, server: &Url) -> reqwest::ClientBuilder {
        let client = reqwest::Client::builder()
            .connect_timeout(self.connect)
            .timeout(self.attempt)
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("countersign/", env!("CARGO_PKG_VERSION")));
        if is_loopback(server) { client.no_proxy() } else { client }
    }
}

/// An answer, read to its end.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Vec<u8>,
}

/// Why there is no whole answer.
pub(super) enum Broken {
    /// Nothing came, or not all of it. Its text does not have the URL.
    Unreachable(reqwest::Error),
    TooLong(StatusCode),
}

/// The largest honest answer is a description of some kilobytes.
pub(super) const LARGEST_ANSWER: usize = 64 * 1024;

/// Sends a request and reads the answer, whatever its status.
pub(super) async fn send(request: reqwest::RequestBuilder) -> Result<Answer, Broken> {
    let unreachable = |error: reqwest::Error| Broken::Unreachable(error.without_url());
    let mut response = request.send().await.map_err(unreachable)?;
    let (status, headers) = (response.status(), std::mem::take(response.headers_mut()));
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(unreachable)? {
        if body.len() + chunk.len() > LARGEST_ANSWER {
            return Err(Broken::TooLong(status));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(Answer { status, headers, body })
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

/// The text without what the request was authorised by: a peer that repeats what it was sent shall not bring it into a log.
pub(super) fn redacted<'a>(text: String, secrets: impl IntoIterator<Item = &'a str>) -> String {
    let secrets = secrets.into_iter().filter(|secret| secret.len() > 3);
    secrets.fold(text, |text, secret| text.replace(secret, "<redacted>"))
}

/// `Retry-After` in seconds (RFC 9110 section 10.2.3); KMSs do not send its other form, a date.
pub(super) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds))
}

/// Whether it is on this machine itself.
pub(super) fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}
