use std::sync::{
    Arc,
    atomic::{AtomicI64, Ordering},
};

use aws_credential_types::Credentials;
use bytes::Bytes;
use http::{StatusCode, header::CONTENT_TYPE};
use jiff::{SignedDuration, Timestamp};
use serde::{Serialize, de::DeserializeOwned};

use super::{
    credentials::Provider,
    fault::{Class, Fault},
    place::Place,
    sigv4::{self, Scope},
};
use crate::{
    clock::Clock,
    kms::{
        Environment, Error, KeyUri,
        exchange::{self, Answer, NoAnswer, Patience, exchange},
        refresh::CredentialsError,
    },
};

/// Speaks to one KMS endpoint: awsJson 1.1 over HTTP, requests signed by Signature Version 4.
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

/// An operation of the service model.
#[derive(Debug, Clone, Copy)]
pub(super) enum Operation {
    DescribeKey,
    GetPublicKey,
    Sign,
    Verify,
}

/// An error, and what the KMS's answer meant, if there was one.
pub(super) struct Failed {
    pub(super) error: Error,
    pub(super) class: Option<Class>,
}

/// The largest honest answer is a description of a few kilobytes.
const LARGEST_ANSWER: usize = 64 * 1024;
/// AWS takes 5 minutes; the date in an answer is only as exact as the answer is fast.
const LEAST_SKEW: SignedDuration = SignedDuration::from_secs(60);

impl Client {
    pub(super) fn new(uri: &KeyUri, clock: Clock, environment: &Environment, patience: Patience) -> Result<Self, Error> {
        let place = Place::of(uri, environment)?;
        let mut http = exchange::client(patience.connect, patience.attempt);
        if place.is_this_machine() {
            http = http.no_proxy();
        }
        let no_connection = |error: reqwest::Error| Error::Misconfigured {
            key: Arc::new(uri.clone()),
            what: format!("no connection to a KMS can be set up here: {error}"),
        };
        let http = http.build().map_err(no_connection)?;
        let credentials =
            Provider::new(environment.clone(), clock.clone(), &place.region, http.clone()).map_err(no_connection)?;
        Ok(Self { uri: Arc::new(uri.clone()), place, http, credentials, clock, ahead: AtomicI64::new(0) })
    }

    pub(super) fn key_uri(&self) -> &KeyUri {
        &self.uri
    }

    /// The reference as errors hold it.
    pub(super) fn uri(&self) -> Arc<KeyUri> {
        Arc::clone(&self.uri)
    }

    pub(super) fn bad(&self, what: impl Into<String>) -> Error {
        Error::BadResponse { key: self.uri(), what: what.into() }
    }

    /// Calls an operation. Asks once more within the call where that can help at once: after the credentials were read anew,
    /// and after the time was set by the KMS's clock.
    pub(super) async fn call<A: DeserializeOwned>(&self, operation: Operation, request: &impl Serialize) -> Result<A, Failed> {
        let body = Bytes::from(serde_json::to_vec(request).expect("the requests are plain structs of texts"));
        let no_credentials = |error: CredentialsError| error.of_key(self.uri());
        let mut credentials = self.credentials.current().await.map_err(no_credentials)?;
        let (mut renewed, mut time_set) = (false, false);
        loop {
            let answer = self.send(&credentials, operation, body.clone()).await?;
            if answer.status == StatusCode::OK {
                return serde_json::from_slice(&answer.body).map_err(|error| {
                    // Not serde's own message, which can repeat what the answer held.
                    let (line, column) = (error.line(), error.column());
                    self.bad(format!("what came for {} is not the JSON of one (line {line}, column {column})", operation.name()))
                        .into()
                });
            }
            let secrets = [credentials.session_token(), Some(credentials.secret_access_key())];
            let fault = Fault::of(&answer, secrets.into_iter().flatten());
            match fault.class {
                Class::CredentialsExpired if !renewed => {
                    renewed = true;
                    tracing::info!(key = %self.uri, what = fault.what, "the KMS no longer takes the credentials: reading them anew");
                    credentials = self.credentials.renewed(&credentials).await.map_err(no_credentials)?;
                }
                Class::Clock if !time_set && self.set_time(&answer) => time_set = true,
                _ => return Err(self.failed(operation, fault)),
            }
        }
    }

    async fn send(&self, credentials: &Credentials, operation: Operation, body: Bytes) -> Result<Answer, Error> {
        let url = self.place.endpoint.as_str();
        let scope = Scope { service: "kms", region: &self.place.region };
        let plain = [(CONTENT_TYPE.as_str(), sigv4::CONTENT), (sigv4::TARGET, operation.target())];
        let signed = sigv4::signed_headers(credentials, scope, self.now(), url, &plain, &body);
        let headers = signed.map_err(|error| Error::Credentials {
            key: self.uri(),
            what: format!("a request cannot be signed with these credentials: {error}"),
        })?;
        let request = self.http.post(self.place.endpoint.clone()).headers(headers).body(body);
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
        let ours = self.clock.now();
        if theirs.duration_since(self.now()).abs() < LEAST_SKEW {
            return false;
        }
        let ahead = theirs.duration_since(ours).as_secs();
        self.ahead.store(ahead, Ordering::Relaxed);
        tracing::warn!(key = %self.uri, seconds = -ahead, "this machine's clock differs from the KMS's: set it right; signing by the KMS's until then");
        true
    }

    fn failed(&self, operation: Operation, fault: Fault) -> Failed {
        let key = self.uri();
        let Fault { class, what, retry_after } = fault;
        let (operation, region) = (operation.name(), &self.place.region);
        let error = match class {
            Class::Throttled => Error::Throttled { key, what: format!("{operation}: {what}"), retry_after },
            Class::Transient => {
                Error::Transient { key, what: format!("the KMS could not carry out {operation} just now: {what}") }
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
                let what = format!(
                    "the KMS finds {operation} wrongly signed: the secret access key is not the one of the access key id: {what}"
                );
                Error::Credentials { key, what }
            }
            Class::Denied => Error::Denied { key, what: format!("the KMS refuses this identity {operation}: {what}") },
            Class::KeyUnusable | Class::InvalidState => {
                Error::KeyUnusable { key, what: format!("the key cannot be used for {operation}: {what}") }
            }
            Class::NotFound => Error::NotFound { key, what: format!("there is no such key in region {region}: {what}") },
            Class::DryRun | Class::InvalidSignature => Error::BadResponse { key, what: format!("to {operation} it says {what}") },
            Class::Misconfigured => {
                Error::Misconfigured { key, what: format!("{} did not understand {operation}: {what}", self.place.endpoint) }
            }
        };
        Failed { error, class: Some(class) }
    }
}

impl Operation {
    fn name(self) -> &'static str {
        self.target().strip_prefix("TrentService.").expect("every target has the service's name")
    }

    fn target(self) -> &'static str {
        match self {
            Self::DescribeKey => "TrentService.DescribeKey",
            Self::GetPublicKey => "TrentService.GetPublicKey",
            Self::Sign => "TrentService.Sign",
            Self::Verify => "TrentService.Verify",
        }
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
