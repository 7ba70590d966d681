//! A Transit engine in this process that signs with a real key, and goes wrong as a test asks. What a real one does is asked of
//! a real one, in `tests/kms_openbao.rs`.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair};
use axum::{
    Router,
    body::{Body, Bytes},
    extract::State,
    response::Response,
};
use base64::{Engine, prelude::BASE64_STANDARD};
use futures::{StreamExt, stream};
use http::{HeaderMap, Method, StatusCode, Uri};
use rsa::pkcs8::SecretDocument;
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::Notify};

use crate::kms::public_key::import;

/// The role's secret id, and a token that is always known.
pub(super) const SECRET: &str = "the-secret-id";

/// What the server does with a request instead of answering it.
#[derive(Debug, Clone)]
pub(super) enum Fault {
    /// Answers this one.
    Nothing,
    Error {
        status: u16,
        text: &'static str,
        headers: Vec<(&'static str, String)>,
    },
    /// Headers and half a body, and then nothing.
    SlowBody,
    /// The connection is gone before any answer.
    NoAnswer,
    /// A body of exactly this text.
    Says(String),
    Endless,
}

impl Fault {
    pub(super) fn error(status: u16, text: &'static str) -> Self {
        Self::Error { status, text, headers: vec![] }
    }
}

pub(super) struct Fake {
    pub(super) address: String,
    state: Arc<Served>,
}

struct Served {
    script: Mutex<VecDeque<Fault>>,
    requests: Mutex<Vec<String>>,
    came: Notify,
    headers: Mutex<Vec<HeaderMap>>,
    lease: Mutex<(u64, bool)>,
    refuses_logins: Mutex<bool>,
    logins: AtomicU64,
    /// Tokens of logins up to this one are revoked.
    revoked: AtomicU64,
    key: EcdsaKeyPair,
}

pub(super) fn public_key() -> &'static str {
    include_str!("../../../../tests/data/vectors/keys/p256.pub.pem")
}

impl Fake {
    pub(super) async fn start() -> Self {
        let pem = include_str!("../../../../tests/data/vectors/keys/p256.key.pem");
        let (_, document) = SecretDocument::from_pem(pem).unwrap();
        let state = Arc::new(Served {
            script: Mutex::default(),
            requests: Mutex::default(),
            came: Notify::new(),
            headers: Mutex::default(),
            lease: Mutex::new((3600, true)),
            refuses_logins: Mutex::default(),
            logins: AtomicU64::new(0),
            revoked: AtomicU64::new(0),
            key: EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, document.as_bytes()).unwrap(),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let app = Router::new().fallback(serve).with_state(state.clone());
        #[expect(clippy::disallowed_methods, reason = "it ends with the test's own runtime")]
        tokio::spawn(async move { axum::serve(listener, app).await });
        Self { address, state }
    }

    /// These instead of the next requests' answers.
    pub(super) fn then(&self, faults: impl IntoIterator<Item = Fault>) {
        self.state.script.lock().unwrap().extend(faults);
    }

    /// What came since the last time this was asked.
    pub(super) fn requests(&self) -> Vec<String> {
        std::mem::take(&mut *self.state.requests.lock().unwrap())
    }

    /// The first request that came, or comes, since then.
    pub(super) async fn next_request(&self) -> String {
        loop {
            let came = self.state.came.notified();
            let first = {
                let mut requests = self.state.requests.lock().unwrap();
                (!requests.is_empty()).then(|| requests.remove(0))
            };
            if let Some(request) = first {
                return request;
            }
            came.await;
        }
    }

    pub(super) fn headers(&self) -> Vec<HeaderMap> {
        self.state.headers.lock().unwrap().clone()
    }

    /// How many seconds tokens last from now on.
    pub(super) fn set_lease(&self, seconds: u64, renewable: bool) {
        *self.state.lease.lock().unwrap() = (seconds, renewable);
    }

    pub(super) fn revoke_tokens(&self) {
        self.state.revoked.store(self.state.logins.load(Ordering::SeqCst), Ordering::SeqCst);
    }

    pub(super) fn refuse_logins(&self) {
        *self.state.refuses_logins.lock().unwrap() = true;
    }
}

async fn serve(State(served): State<Arc<Served>>, method: Method, uri: Uri, headers: HeaderMap, body: Bytes) -> Response {
    served.requests.lock().unwrap().push(format!("{method} {}", uri.path()));
    served.headers.lock().unwrap().push(headers.clone());
    served.came.notify_waiters();
    let fault = served.script.lock().unwrap().pop_front();
    match fault {
        None | Some(Fault::Nothing) => served.answer(&uri, &headers, &body),
        Some(fault) => go_wrong(fault),
    }
}

impl Served {
    fn answer(&self, uri: &Uri, headers: &HeaderMap, body: &[u8]) -> Response {
        let (seconds, renewable) = *self.lease.lock().unwrap();
        let lease = |token: String| json!({"auth": {"client_token": token, "lease_duration": seconds, "renewable": renewable}});
        if uri.path() == "/v1/auth/approle/login" {
            let body: Value = serde_json::from_slice(body).unwrap();
            if *self.refuses_logins.lock().unwrap() || body["secret_id"] != SECRET {
                return error(400, "invalid role or secret ID");
            }
            let number = self.logins.fetch_add(1, Ordering::SeqCst) + 1;
            return says(&lease(format!("s.login-{number}-of-the-fake")).to_string());
        }
        let token = headers.get("x-vault-token").map(|token| token.to_str().unwrap()).unwrap_or_default();
        let number = token.strip_prefix("s.login-").and_then(|rest| rest.split('-').next()?.parse::<u64>().ok());
        if token != SECRET && number.is_none_or(|number| number <= self.revoked.load(Ordering::SeqCst)) {
            return error(403, "permission denied");
        }
        match uri.path() {
            "/v1/auth/token/lookup-self" => says(&json!({"data": {"id": token, "ttl": 0, "renewable": false}}).to_string()),
            "/v1/auth/token/renew-self" => says(&lease(token.to_owned()).to_string()),
            "/v1/transit/keys/release" => {
                let keys = json!({"1": {"public_key": public_key()}});
                let data = json!({"type": "ecdsa-p256", "latest_version": 1, "min_encryption_version": 0,
                                  "supports_signing": true, "keys": keys});
                says(&json!({ "data": data }).to_string())
            }
            "/v1/transit/sign/release/sha2-256" => {
                let body: Value = serde_json::from_slice(body).unwrap();
                let digest = BASE64_STANDARD.decode(body["input"].as_str().unwrap()).unwrap();
                let signature = self.key.sign_digest(&import(&digest.try_into().unwrap())).unwrap();
                let signature = format!("vault:v{}:{}", body["key_version"], BASE64_STANDARD.encode(signature));
                says(&json!({"data": {"signature": signature, "key_version": body["key_version"]}}).to_string())
            }
            path => error(404, &format!("no handler for route {path}")),
        }
    }
}

fn go_wrong(fault: Fault) -> Response {
    match fault {
        Fault::Nothing => unreachable!("that is an answer"),
        Fault::Error { status, text, headers } => {
            let mut response = error(status, text);
            for (name, value) in headers {
                response.headers_mut().insert(name, value.parse().unwrap());
            }
            response
        }
        Fault::Says(text) => says(&text),
        Fault::SlowBody => {
            let half = stream::iter([Ok::<_, std::io::Error>(Bytes::from_static(b"{\"data\":"))]);
            Response::new(Body::from_stream(half.chain(stream::pending())))
        }
        Fault::NoAnswer => {
            // An error in a body before its first byte makes the server hang up.
            let broken = stream::iter([Err::<Bytes, _>(std::io::Error::other("gone"))]);
            Response::new(Body::from_stream(broken))
        }
        Fault::Endless => {
            let block = Bytes::from_static(&[b' '; 4096]);
            Response::new(Body::from_stream(stream::repeat_with(move || Ok::<_, std::io::Error>(block.clone()))))
        }
    }
}

fn says(text: &str) -> Response {
    Response::new(Body::from(text.to_owned()))
}

fn error(status: u16, text: &str) -> Response {
    let mut response = says(&json!({ "errors": [text] }).to_string());
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    response
}
