use std::sync::Arc;

use serde::de::DeserializeOwned;

use super::{
    acs3::Call,
    credentials::{Chain, Credentials, provider},
    fault::fault,
    nonce,
    place::{Gateway, Place, authorities},
};
use crate::{
    clock::Clock,
    kms::{
        Environment, Error, KeyUri,
        caller::{self, Caller, Failed, no_connection},
        exchange::Patience,
    },
};

/// Speaks to one gateway: the RPC style over HTTP, requests signed by `ACS3-HMAC-SHA256`.
#[derive(Debug)]
pub(super) struct Client {
    caller: Caller<Chain>,
    gateway: Gateway,
}

const VERSION: &str = "2016-01-20";

impl Client {
    pub(super) fn new(
        uri: &KeyUri,
        place: Place,
        clock: Clock,
        environment: &Environment,
        patience: Patience,
    ) -> Result<Self, Error> {
        let KeyUri::AlibabaKms { ca, role, .. } = uri else { unreachable!("kms::open chose by the kind of URI") };
        let mut http = caller::client(&place.endpoint, patience);
        if let Some(ca) = ca {
            // And no others: the dedicated gateway is its own authority's.
            let trusted = authorities(ca).map_err(|what| Error::Misconfigured { key: Arc::new(uri.clone()), what })?;
            http = http.tls_certs_only(trusted);
        }
        let unconnected = |error: reqwest::Error| no_connection(uri, &error);
        let http = http.build().map_err(unconnected)?;
        let credentials = provider(environment.clone(), clock.clone(), &place, role.as_deref()).map_err(unconnected)?;
        let fault = |answer: &_, credentials: &Credentials| fault(answer, credentials.secrets());
        Ok(Self { caller: Caller::new(uri, place.endpoint, http, credentials, fault, clock), gateway: place.gateway })
    }

    pub(super) fn key_uri(&self) -> &KeyUri {
        self.caller.key_uri()
    }

    /// The reference as errors hold it.
    pub(super) fn uri(&self) -> Arc<KeyUri> {
        self.caller.uri()
    }

    pub(super) fn gateway(&self) -> Gateway {
        self.gateway
    }

    pub(super) fn bad(&self, what: impl Into<String>) -> Error {
        self.caller.bad(what)
    }

    /// Calls an operation, as [`Caller::call`] has it.
    pub(super) async fn call<A: DeserializeOwned>(&self, action: &'static str, parameters: &[(&str, &str)]) -> Result<A, Failed> {
        let call = Call { endpoint: self.caller.endpoint(), action, version: VERSION, parameters };
        let called = self.caller.call(action, |credentials, time| {
            let (url, headers) = call.signed(credentials, time, &nonce());
            Ok(self.caller.http().post(url).headers(headers))
        });
        called.await
    }
}
