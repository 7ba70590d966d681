//! Registries that lie, stall, break off and point elsewhere. The real one is met in `tests/registry.rs`.

mod auth;
mod content;
mod referrers;
mod tls;
mod transport;

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use axum::{
    Router,
    body::{Body, to_bytes},
    extract::Request,
    response::Response,
};
use bytes::Bytes;
use http::{HeaderMap, Method};
use tokio::{net::TcpListener, task::JoinSet};

use super::{Address, Credentials, Error, Registry, Settings, Timeouts};
use crate::oci::{Digest, Repository, Tag, media_type};

const PASSWORD: &str = "hunter2-hunter2";

/// A server on loopback that answers as it is told, and remembers what it was asked.
struct Fake {
    port: u16,
    seen: Arc<Mutex<Vec<Seen>>>,
    _server: JoinSet<()>,
}

/// One request that came in.
#[derive(Debug, Clone)]
struct Seen {
    method: Method,
    /// Path and query.
    target: String,
    headers: HeaderMap,
    body: Bytes,
}

impl Seen {
    fn header(&self, name: &str) -> Option<&str> {
        assert!(self.headers.get_all(name).iter().count() <= 1, "{name} stands on several lines");
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    fn is(&self, method: &str, target: &str) -> bool {
        self.method == method && self.target == target
    }
}

impl Fake {
    async fn start(answer: impl Fn(&Seen) -> Response + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (log, answer) = (seen.clone(), Arc::new(answer));
        let router = Router::new().fallback(move |request: Request| {
            let (log, answer) = (log.clone(), answer.clone());
            async move {
                let (head, body) = request.into_parts();
                let body = to_bytes(body, 1 << 20).await.unwrap();
                let seen = Seen { method: head.method, target: head.uri.to_string(), headers: head.headers, body };
                log.lock().unwrap().push(seen.clone());
                answer(&seen)
            }
        });
        let mut server = JoinSet::new();
        server.spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { port, seen, _server: server }
    }

    /// Answers the n-th request by the n-th of `answers`, and what comes after by the last.
    async fn in_turn(answers: Vec<fn() -> Response>) -> Self {
        let turn = AtomicUsize::new(0);
        Self::start(move |_| answers[turn.fetch_add(1, SeqCst).min(answers.len() - 1)]()).await
    }

    fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.host())
    }

    fn settings(&self) -> Settings {
        settings(&self.url(""))
    }

    /// A client without an account.
    fn client(&self) -> Registry {
        Registry::new(Settings { credentials: None, ..self.settings() }).unwrap()
    }

    /// A client with an account.
    fn member(&self) -> Registry {
        Registry::new(self.settings()).unwrap()
    }
}

fn settings(url: &str) -> Settings {
    Settings {
        name: "registry.example.com".parse().unwrap(),
        url: url.parse().unwrap(),
        credentials: Some(Credentials { username: "ann".into(), password: PASSWORD.to_owned().into() }),
        ca: None,
        timeouts: Timeouts { connect: Duration::from_secs(5), request: Duration::from_secs(10) },
        observer: None,
    }
}

fn app() -> Repository {
    "team/app".parse().unwrap()
}

fn tag(name: &str) -> Tag {
    name.parse().unwrap()
}

fn one() -> Address {
    Address::Tag(tag("1"))
}

/// A manifest's bytes.
fn image() -> Bytes {
    Bytes::from(format!(r#"{{"schemaVersion":2,"mediaType":"{}","config":{{}},"layers":[]}}"#, media_type::OCI_MANIFEST))
}

fn respond(status: u16, headers: &[(&str, &str)], body: impl Into<Body>) -> Response {
    let mut response = Response::builder().status(status);
    for (name, value) in headers {
        response = response.header(*name, *value);
    }
    response.body(body.into()).unwrap()
}

fn status(status: u16) -> Response {
    respond(status, &[], "")
}

/// An error document as registries write it.
fn refuse(status: u16, code: &str, message: &str) -> Response {
    let body = serde_json::json!({ "errors": [{ "code": code, "message": message, "detail": {} }] });
    respond(status, &[("content-type", "application/json")], body.to_string())
}

fn serve_image() -> Response {
    respond(200, &[("content-type", media_type::OCI_MANIFEST)], image())
}
