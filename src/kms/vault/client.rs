use http::{HeaderMap, HeaderName, HeaderValue, Method};
use secrecy::{ExposeSecret, SecretString};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{
    fault::{Class, Fault},
    place::Place,
    reference::VaultReference,
    session::Token,
};
use crate::kms::{
    Environment,
    exchange::{NoAnswer, Patience, exchange},
};

/// Speaks to one server: JSON over HTTP, and a header for who asks.
#[derive(Debug)]
pub(super) struct Client {
    place: Place,
    http: reqwest::Client,
    headers: HeaderMap,
}

/// The largest honest answer is the description of a key with very many versions.
const LARGEST_ANSWER: usize = 256 * 1024;

/// A request, good for being sent once more.
pub(super) struct Request<'a> {
    pub(super) method: Method,
    /// After `/v1/`, of names that need no encoding.
    pub(super) path: &'a str,
    pub(super) body: Option<Value>,
    /// What of the body no error may repeat.
    pub(super) secret: Option<&'a SecretString>,
}

const TOKEN: HeaderName = HeaderName::from_static("x-vault-token");
const NAMESPACE: HeaderName = HeaderName::from_static("x-vault-namespace");
/// Agents and proxies for Vault can be set up to take only requests that have it: a browser's cannot.
const REQUEST: HeaderName = HeaderName::from_static("x-vault-request");

impl Client {
    /// An error is for people.
    pub(super) fn new(reference: &VaultReference, environment: &Environment, patience: Patience) -> Result<Self, String> {
        let place = Place::of(reference, environment)?;
        let http = place.http(reference, environment, patience)?;
        let mut headers = HeaderMap::from_iter([(REQUEST, HeaderValue::from_static("true"))]);
        if let Some(namespace) = &place.namespace {
            let value = HeaderValue::from_str(namespace).expect("a namespace holds nothing that a header may not");
            headers.insert(NAMESPACE, value);
        }
        if place.is_in_the_clear() {
            tracing::warn!(
                server = place.address(),
                "its address begins with http://: the token goes over the network unencrypted"
            );
        }
        Ok(Self { place, http, headers })
    }

    pub(super) fn address(&self) -> String {
        self.place.address()
    }

    pub(super) fn place(&self) -> &Place {
        &self.place
    }

    /// Sends a request once and reads the answer.
    pub(super) async fn send<A: DeserializeOwned>(&self, request: &Request<'_>, token: Option<&Token>) -> Result<A, Fault> {
        let mut sent = self.http.request(request.method.clone(), self.place.url(request.path)).headers(self.headers.clone());
        if let Some(token) = token {
            sent = sent.header(TOKEN, token.header());
        }
        if let Some(body) = &request.body {
            sent = sent.json(body);
        }
        let answer = exchange(sent, LARGEST_ANSWER).await.map_err(|no_answer| match no_answer {
            NoAnswer::Transport(_) => Fault::new(Class::Unreachable(no_answer), "no answer"),
            NoAnswer::TooLong { .. } => Fault::new(Class::Garbled, no_answer.to_string()),
        })?;
        if !answer.status.is_success() {
            let secrets = [request.secret, token.map(Token::text)].into_iter().flatten().map(ExposeSecret::expose_secret);
            return Err(Fault::of(&answer, secrets));
        }
        serde_json::from_slice(&answer.body).map_err(|error| {
            // Not serde's own message, which can repeat what the answer held.
            let (line, column) = (error.line(), error.column());
            let what = format!("what came for {} is not the JSON of one (line {line}, column {column})", request.path);
            Fault::new(Class::Garbled, what)
        })
    }
}
