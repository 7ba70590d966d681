use std::sync::{
    Arc,
    atomic::{AtomicI64, Ordering},
};

use http::StatusCode;
use jiff::{SignedDuration, Timestamp};
use serde::de::DeserializeOwned;

use super::{
    acs3::Call,
    credentials::{Credentials, Provider},
    fault::{Class, Fault},
    nonce,
    place::{Gateway, Place, authorities},
};
use crate::{
    clock::Clock,
    kms::{
        Environment, Error, KeyUri,
        exchange::{self, Answer, NoAnswer, Patience, exchange},
    },
};

/// Speaks to one gateway: the RPC style over HTTP, requests signed by `ACS3-HMAC-SHA256`.
#[derive(Debug)]
pub(super) struct Client {
    uri: Arc<KeyUri>,
    place: Place,
    http: reqwest::Client,
    credentials: Provider,
    clock: Clock,
    /// Seconds that the KMS's clock is ahead of ours; 0 until it complains.
    ahead: AtomicI64,
}

const VERSION: &str = "2016-01-20";
/// A page of versions is the largest honest answer.
const LARGEST_ANSWER: usize = 256 * 1024;
/// They take 15 minutes; the date in an answer is only as exact as the answer is fast.
const LEAST_SKEW: SignedDuration = SignedDuration::from_secs(60);

impl Client {
    pub(super) fn new(
        uri: &KeyUri,
        place: Place,
        clock: Clock,
        environment: &Environment,
        patience: Patience,
    ) -> Result<Self, Error> {
        let KeyUri::AlibabaKms { ca, role, .. } = uri else { unreachable!("kms::open chose by the kind of URI") };
        let misconfigured = |what: String| Error::Misconfigured { key: Arc::new(uri.clone()), what };
        let no_connection = |error: reqwest::Error| misconfigured(format!("no connection to a KMS can be set up here: {error}"));
        let mut http = exchange::client(patience.connect, patience.attempt);
        if let Some(ca) = ca {
            // And no others: the dedicated gateway is its own authority's.
            http = http.tls_certs_only(authorities(ca).map_err(misconfigured)?);
        }
        if place.is_this_machine() {
            http = http.no_proxy();
        }
        let http = http.build().map_err(no_connection)?;
        let credentials = Provider::new(environment.clone(), clock.clone(), &place, role.as_deref()).map_err(no_connection)?;
        Ok(Self { uri: Arc::new(uri.clone()), place, http, credentials, clock, ahead: AtomicI64::new(0) })
    }

    pub(super) fn key_uri(&self) -> &KeyUri {
        &self.uri
    }

    /// The reference as errors hold it.
    pub(super) fn uri(&self) -> Arc<KeyUri> {
        Arc::clone(&self.uri)
    }

    pub(super) fn gateway(&self) -> Gateway {
        self.place.gateway
    }

    pub(super) fn bad(&self, what: impl Into<String>) -> Error {
        Error::BadResponse { key: self.uri(), what: what.into() }
    }

    /// Calls an operation. Asks once more within the call where that can help at once: after the credentials were fetched anew,
    /// after the time was set by the KMS's clock, and with another nonce.
    pub(super) async fn call<A: DeserializeOwned>(&self, action: &'static str, parameters: &[(&str, &str)]) -> Result<A, Error> {
        self.try_call(action, parameters).await.map_err(|(_, error)| error)
    }

    /// The same, with what the KMS's answer meant, if there was one.
    pub(super) async fn try_call<A: DeserializeOwned>(
        &self,
        action: &'static str,
        parameters: &[(&str, &str)],
    ) -> Result<A, (Option<Class>, Error)> {
        let call = Call { endpoint: &self.place.endpoint, action, version: VERSION, parameters };
        let mut credentials = self.credentials.current().await.map_err(|error| (None, error.of_key(self.uri())))?;
        let (mut renewed, mut time_set, mut nonce_changed) = (false, false, false);
        loop {
            let answer = self.send(&call, &credentials).await.map_err(|error| (None, error))?;
            if answer.status == StatusCode::OK {
                return serde_json::from_slice(&answer.body).map_err(|error| {
                    // Not serde's own message, which can repeat what the answer held.
                    let (line, column) = (error.line(), error.column());
                    (None, self.bad(format!("what came for {action} is not the JSON of one (line {line}, column {column})")))
                });
            }
            let fault = Fault::of(&answer, credentials.secrets());
            match fault.class {
                Class::CredentialsExpired if !renewed => {
                    renewed = true;
                    tracing::info!(key = %self.uri, what = fault.what, "the KMS no longer takes the credentials: fetching them anew");
                    let renewal = self.credentials.renewed(&credentials).await;
                    credentials = renewal.map_err(|error| (None, error.of_key(self.uri())))?;
                }
                Class::Clock if !time_set && self.set_time(&answer) => time_set = true,
                Class::Nonce if !nonce_changed => nonce_changed = true,
                class => return Err((Some(class), self.failed(action, fault))),
            }
        }
    }

    async fn send(&self, call: &Call<'_>, credentials: &Credentials) -> Result<Answer, Error> {
        let (url, headers) = call.signed(credentials, self.now(), &nonce());
        let request = self.http.post(url).headers(headers);
        exchange(request, LARGEST_ANSWER).await.map_err(|error| match error {
            long @ NoAnswer::TooLong { .. } => self.bad(long.to_string()),
            silent @ NoAnswer::Transport(_) => {
                let at = self.place.endpoint.to_string();
                Error::Unreachable { key: self.uri(), at, source: Box::new(silent) }
            }
        })
    }

    fn now(&self) -> Timestamp {
        let ahead = SignedDuration::from_secs(self.ahead.load(Ordering::Relaxed));
        let now = self.clock.now();
        now.checked_add(ahead).unwrap_or(now)
    }

    /// Takes the KMS's time from an answer. Whether that differs from what the request was signed with.
    fn set_time(&self, answer: &Answer) -> bool {
        let Some(theirs) = answer.date() else { return false };
        if theirs.duration_since(self.now()).abs() < LEAST_SKEW {
            return false;
        }
        let ahead = theirs.duration_since(self.clock.now()).as_secs();
        self.ahead.store(ahead, Ordering::Relaxed);
        tracing::warn!(key = %self.uri, seconds = -ahead, "this machine's clock differs from the KMS's: set it right; signing by the KMS's until then");
        true
    }

    fn failed(&self, action: &str, fault: Fault) -> Error {
        let key = self.uri();
        let Fault { class, what, retry_after } = fault;
        match class {
            Class::Throttled => Error::Throttled { key, what: format!("{action}: {what}"), retry_after },
            Class::Transient | Class::Nonce => {
                Error::Transient { key, what: format!("the KMS could not carry out {action} just now: {what}") }
            }
            Class::Clock => {
                let what = format!(
                    "the KMS finds the time of a request wrong, also by its own clock: set this machine's clock right: {what}"
                );
                Error::Transient { key, what }
            }
            Class::CredentialsExpired => {
                Error::Credentials { key, what: format!("the KMS does not know the credentials, or no longer: {what}") }
            }
            Class::BadCredentials => {
                let what = format!("the KMS does not take {action} from these credentials: {what}");
                Error::Credentials { key, what }
            }
            Class::Denied => Error::Denied { key, what: format!("the KMS refuses this identity {action}: {what}") },
            Class::KeyUnusable => Error::KeyUnusable { key, what: format!("the key cannot be used for {action}: {what}") },
            Class::NotFound => {
                let at = &self.place.endpoint;
                Error::NotFound { key, what: format!("{at} has no such key, alias or version: {what}") }
            }
            Class::DryRun => Error::BadResponse { key, what: format!("to {action} it says {what}") },
            Class::Misconfigured => {
                Error::Misconfigured { key, what: format!("{} did not understand {action}: {what}", self.place.endpoint) }
            }
        }
    }
}
