//! How a cloud's KMS is asked, whichever it is: with credentials that are kept fresh, and once more within the call where that can
//! help at once.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
};

use jiff::{SignedDuration, Timestamp};
use reqwest::{RequestBuilder, Url};
use serde::de::DeserializeOwned;

use super::{
    Error, KeyUri,
    exchange::{self, Answer, NoAnswer, Patience, exchange},
    fault::{Class, Fault},
    refresh::{CredentialsError, Kept, Source},
};
use crate::clock::Clock;

/// Asks one endpoint about one key. `S` gives the credentials.
pub(super) struct Caller<S: Source> {
    uri: Arc<KeyUri>,
    endpoint: Url,
    http: reqwest::Client,
    credentials: Kept<S>,
    /// Reads an error answer to a request with these credentials.
    fault: fn(&Answer, &S::Credentials) -> Fault,
    time: TheirClock,
}

/// The largest honest answer is a page of versions.
const LARGEST_ANSWER: usize = 256 * 1024;

/// An error, and what class of fault made it, if the KMS answered at all.
pub(super) struct Failed {
    pub(super) error: Error,
    pub(super) class: Option<Class>,
}

impl<S: Source<Error = CredentialsError>> Caller<S> {
    pub(super) fn new(
        uri: &KeyUri,
        endpoint: Url,
        http: reqwest::Client,
        credentials: Kept<S>,
        fault: fn(&Answer, &S::Credentials) -> Fault,
        clock: Clock,
    ) -> Self {
        Self { uri: Arc::new(uri.clone()), endpoint, http, credentials, fault, time: TheirClock::new(clock) }
    }

    pub(super) fn key_uri(&self) -> &KeyUri {
        &self.uri
    }

    /// The reference as errors hold it.
    pub(super) fn uri(&self) -> Arc<KeyUri> {
        Arc::clone(&self.uri)
    }

    pub(super) fn endpoint(&self) -> &Url {
        &self.endpoint
    }

    pub(super) fn http(&self) -> &reqwest::Client {
        &self.http
    }

    pub(super) fn bad(&self, what: impl Into<String>) -> Error {
        Error::BadResponse { key: self.uri(), what: what.into() }
    }

    /// Calls an operation. `request` makes the request with these credentials and for this time; that it cannot is for people.
    /// Asks once more where that can help at once: after the credentials were fetched anew, after the time was set by the KMS's
    /// clock, and with another nonce.
    pub(super) async fn call<A: DeserializeOwned>(
        &self,
        operation: &str,
        request: impl Fn(&S::Credentials, Timestamp) -> Result<RequestBuilder, String> + Send,
    ) -> Result<A, Failed> {
        let no_credentials = |error: CredentialsError| error.of_key(self.uri());
        let mut credentials = self.credentials.current().await.map_err(no_credentials)?;
        let (mut renewed, mut time_set, mut nonce_changed) = (false, false, false);
        loop {
            let request = request(&credentials, self.time.now()).map_err(|what| Error::Credentials { key: self.uri(), what })?;
            let answer = self.send(request).await?;
            if answer.status.is_success() {
                return serde_json::from_slice(&answer.body).map_err(|error| {
                    // Not serde's own message, which can repeat what the answer held.
                    let (line, column) = (error.line(), error.column());
                    let what = format!("what came for {operation} is not the JSON of one (line {line}, column {column})");
                    self.bad(what).into()
                });
            }
            let fault = (self.fault)(&answer, &credentials);
            match fault.class {
                Class::CredentialsExpired if !renewed => {
                    renewed = true;
                    tracing::info!(key = %self.uri, what = fault.what, "the KMS no longer takes the credentials: fetching them anew");
                    credentials = self.credentials.renewed(&credentials).await.map_err(no_credentials)?;
                }
                Class::Clock if !time_set && self.time.set_by(&answer, "the KMS") => time_set = true,
                Class::Nonce if !nonce_changed => nonce_changed = true,
                _ => return Err(self.failed(operation, fault)),
            }
        }
    }

    async fn send(&self, request: RequestBuilder) -> Result<Answer, Error> {
        exchange(request, LARGEST_ANSWER).await.map_err(|error| match error {
            long @ NoAnswer::TooLong { .. } => self.bad(long.to_string()),
            silent @ NoAnswer::Transport(_) => {
                Error::Unreachable { key: self.uri(), at: self.endpoint.to_string(), source: Box::new(silent) }
            }
        })
    }

    fn failed(&self, operation: &str, fault: Fault) -> Failed {
        let (key, at) = (self.uri(), &self.endpoint);
        let Fault { class, what, retry_after } = fault;
        let error = match class {
            Class::Throttled => Error::Throttled { key, what: format!("{operation}: {what}"), retry_after },
            Class::Transient | Class::Nonce => {
                Error::Transient { key, what: format!("the KMS could not carry out {operation} just now: {what}") }
            }
            Class::Clock => {
                let what = format!(
                    "the KMS finds the time of a request wrong, also by its own clock: set this machine's clock right: {what}"
                );
                Error::Transient { key, what }
            }
            Class::DryRun | Class::InvalidSignature => self.bad(format!("to {operation} it says {what}")),
            Class::Garbled => self.bad(format!("it says that {operation} came to it changed: {what}")),
            Class::CredentialsExpired => {
                Error::Credentials { key, what: format!("the KMS does not know the credentials, or no longer: {what}") }
            }
            Class::BadCredentials => {
                let what = format!("the KMS finds {operation} wrongly signed, or does not take these credentials: {what}");
                Error::Credentials { key, what }
            }
            Class::Denied => Error::Denied { key, what: format!("the KMS refuses this identity {operation}: {what}") },
            Class::KeyUnusable | Class::InvalidState => {
                Error::KeyUnusable { key, what: format!("the key cannot be used for {operation}: {what}") }
            }
            Class::NotFound => Error::NotFound { key, what: format!("there is no such key, alias or version at {at}: {what}") },
            Class::Misconfigured => Error::Misconfigured { key, what: format!("{at} did not understand {operation}: {what}") },
        };
        Failed { error, class: Some(class) }
    }
}

impl<S: Source> fmt::Debug for Caller<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Caller").field("uri", &self.uri).field("endpoint", &self.endpoint.as_str()).finish_non_exhaustive()
    }
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self { error, class: None }
    }
}

impl From<Failed> for Error {
    fn from(failed: Failed) -> Self {
        failed.error
    }
}

/// A client for an endpoint; none of a proxy's for one on this machine.
pub(super) fn client(endpoint: &Url, patience: Patience) -> reqwest::ClientBuilder {
    let http = exchange::client(patience.connect, patience.attempt);
    if super::aws::is_loopback(endpoint) { http.no_proxy() } else { http }
}

pub(super) fn no_connection(uri: &KeyUri, error: &reqwest::Error) -> Error {
    let what = format!("no connection to a KMS can be set up here: {error}");
    Error::Misconfigured { key: Arc::new(uri.clone()), what }
}

/// The time by the clock of whom we ask, as far as we know it: ours until they complain.
pub(super) struct TheirClock {
    clock: Clock,
    /// Seconds that theirs is ahead.
    ahead: AtomicI64,
}

/// They take minutes; the date in an answer is only as exact as the answer is fast.
const LEAST_SKEW: SignedDuration = SignedDuration::from_secs(60);

impl TheirClock {
    pub(super) fn new(clock: Clock) -> Self {
        Self { clock, ahead: AtomicI64::new(0) }
    }

    pub(super) fn now(&self) -> Timestamp {
        let ahead = SignedDuration::from_secs(self.ahead.load(Ordering::Relaxed));
        let now = self.clock.now();
        now.checked_add(ahead).unwrap_or(now)
    }

    /// Takes their time from an answer. Whether that differs from what the request was made with.
    pub(super) fn set_by(&self, answer: &Answer, who: &str) -> bool {
        let Some(theirs) = answer.date() else { return false };
        if theirs.duration_since(self.now()).abs() < LEAST_SKEW {
            return false;
        }
        let ahead = theirs.duration_since(self.clock.now()).as_secs();
        self.ahead.store(ahead, Ordering::Relaxed);
        tracing::warn!(
            seconds = -ahead,
            "this machine's clock differs from {who}'s: set it right; requests are signed by theirs until then"
        );
        true
    }
}
