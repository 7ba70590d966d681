use std::sync::Arc;

use aws_credential_types::Credentials;
use bytes::Bytes;
use http::header::CONTENT_TYPE;
use serde::{Serialize, de::DeserializeOwned};

use super::{
    credentials::{Chain, provider},
    fault::fault,
    place::Place,
    sigv4::{self, Scope},
};
use crate::{
    clock::Clock,
    kms::{
        Environment, Error, KeyUri,
        caller::{self, Caller, Failed, no_connection},
        exchange::Patience,
    },
};

/// Speaks to one KMS endpoint: awsJson 1.1 over HTTP, requests signed by Signature Version 4.
#[derive(Debug)]
pub(super) struct Client {
    caller: Caller<Chain>,
    region: String,
}

/// An operation of the service model.
#[derive(Debug, Clone, Copy)]
pub(super) enum Operation {
    DescribeKey,
    GetPublicKey,
    Sign,
    Verify,
}

impl Client {
    pub(super) fn new(uri: &KeyUri, clock: Clock, environment: &Environment, patience: Patience) -> Result<Self, Error> {
        let Place { endpoint, region } = Place::of(uri, environment)?;
        let unconnected = |error: reqwest::Error| no_connection(uri, &error);
        let http = caller::client(&endpoint, patience).build().map_err(unconnected)?;
        let credentials = provider(environment.clone(), clock.clone(), &region, http.clone()).map_err(unconnected)?;
        let fault = |answer: &_, credentials: &Credentials| {
            fault(answer, [credentials.session_token(), Some(credentials.secret_access_key())].into_iter().flatten())
        };
        Ok(Self { caller: Caller::new(uri, endpoint, http, credentials, fault, clock), region })
    }

    pub(super) fn key_uri(&self) -> &KeyUri {
        self.caller.key_uri()
    }

    /// The reference as errors hold it.
    pub(super) fn uri(&self) -> Arc<KeyUri> {
        self.caller.uri()
    }

    pub(super) fn bad(&self, what: impl Into<String>) -> Error {
        self.caller.bad(what)
    }

    /// Calls an operation, as [`Caller::call`] has it.
    pub(super) async fn call<A: DeserializeOwned>(&self, operation: Operation, request: &impl Serialize) -> Result<A, Failed> {
        let body = Bytes::from(serde_json::to_vec(request).expect("the requests are plain structs of texts"));
        let endpoint = self.caller.endpoint();
        let called = self.caller.call(operation.name(), |credentials, time| {
            let scope = Scope { service: "kms", region: &self.region };
            let plain = [(CONTENT_TYPE.as_str(), sigv4::CONTENT), (sigv4::TARGET, operation.target())];
            let headers = sigv4::signed_headers(credentials, scope, time, endpoint.as_str(), &plain, &body)
                .map_err(|error| format!("a request cannot be signed with these credentials: {error}"))?;
            Ok(self.caller.http().post(endpoint.clone()).headers(headers).body(body.clone()))
        });
        called.await
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
