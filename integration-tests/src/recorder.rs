//! An HTTP proxy that writes down what passes through it, so that a test can say who wrote what, and having read what; and that can
//! make a registry's tags immutable, which docker-registry has no setting for.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use reqwest::header::{ACCEPT, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, TRANSFER_ENCODING};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::process::http_client;

/// One request and its answer.
#[derive(Debug, Clone)]
pub struct Exchange {
    pub method: Method,
    pub path: String,
    pub sent: Bytes,
    pub status: StatusCode,
    pub received: Bytes,
}

#[derive(Debug)]
pub struct Recorder {
    port: u16,
    exchanges: Arc<Mutex<Vec<Exchange>>>,
    tags: Arc<AtomicU8>,
    _server: JoinSet<()>,
}

#[derive(Clone)]
struct Desk {
    target: String,
    http: reqwest::Client,
    exchanges: Arc<Mutex<Vec<Exchange>>>,
    tags: Arc<AtomicU8>,
}

/// Which tags can be written again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Mutable {
    All,
    /// `sha256-*` alone, as countersign asks for it.
    Signatures,
    None,
}

impl Recorder {
    /// Passes everything on to `target` (`host:port`).
    pub async fn start(target: &str) -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.context("bind the recorder")?;
        let port = listener.local_addr()?.port();
        let exchanges = Arc::default();
        let tags = Arc::new(AtomicU8::new(Mutable::All as u8));
        let desk =
            Desk { target: target.to_owned(), http: http_client()?, exchanges: Arc::clone(&exchanges), tags: Arc::clone(&tags) };
        let router = Router::new().fallback(pass).with_state(desk);
        let mut server = JoinSet::new();
        server.spawn(async move { axum::serve(listener, router).await.expect("serving ends with its task only") });
        Ok(Self { port, exchanges, tags, _server: server })
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// From now on, only these tags can be written again.
    pub fn set_mutable(&self, tags: Mutable) {
        self.tags.store(tags as u8, Ordering::SeqCst);
    }

    /// What has passed, in the order in which it was answered.
    pub fn exchanges(&self) -> Vec<Exchange> {
        self.exchanges.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Checks that each manifest written under this path has in this list (`layers`, `manifests`) whatever the one had that was
    /// read last before; annotations included.
    pub fn ensure_what_was_found_was_kept(&self, path: &str, list: &str) -> Result<()> {
        let entries = |manifest: &[u8]| -> Result<BTreeSet<String>> {
            let manifest: Value = serde_json::from_slice(manifest)?;
            let entries = manifest[list].as_array().with_context(|| format!("a manifest without {list}"))?;
            Ok(entries.iter().map(Value::to_string).collect())
        };
        let mut found = BTreeSet::new();
        let mut writes = 0;
        for exchange in self.exchanges().iter().filter(|exchange| exchange.path == path) {
            match (&exchange.method, exchange.status) {
                (&Method::GET, StatusCode::OK) => found = entries(&exchange.received)?,
                (&Method::GET, StatusCode::NOT_FOUND) => found.clear(),
                (&Method::PUT, StatusCode::CREATED) => {
                    let written = entries(&exchange.sent)?;
                    ensure!(written.is_superset(&found), "countersign dropped {:?}", found.difference(&written));
                    writes += 1;
                    found = written;
                }
                _ => {}
            }
        }
        ensure!(writes > 0, "countersign wrote nothing to {path}");
        Ok(())
    }
}

impl Desk {
    fn is_immutable(&self, tag: &str) -> bool {
        let mutable = self.tags.load(Ordering::SeqCst);
        let is_mutable = match tag {
            _ if tag.contains(':') || mutable == Mutable::All as u8 => true,
            _ => mutable == Mutable::Signatures as u8 && tag.starts_with("sha256-"),
        };
        !is_mutable
    }
}

async fn pass(State(desk): State<Desk>, request: Request) -> Response {
    forward(&desk, request).await.unwrap_or_else(|error| (StatusCode::BAD_GATEWAY, format!("{error:#}")).into_response())
}

async fn forward(desk: &Desk, request: Request) -> Result<Response> {
    const LONGEST: usize = 16 << 20;
    let (head, body) = request.into_parts();
    let sent = to_bytes(body, LONGEST).await?;
    let mut headers = head.headers;
    headers.remove(CONNECTION);
    headers.remove(TRANSFER_ENCODING);
    headers.remove(CONTENT_LENGTH);
    let url = format!("http://{}{}", desk.target, head.uri);
    if let (&Method::PUT, Some((_, tag))) = (&head.method, head.uri.path().split_once("/manifests/"))
        && desk.is_immutable(tag)
        && desk.http.head(&url).header(ACCEPT, headers[CONTENT_TYPE].clone()).send().await?.status().is_success()
    {
        // In ECR's words.
        let message = format!(
            "The image tag '{tag}' already exists in the repository and cannot be overwritten because the tag is immutable."
        );
        let body = json!({"errors": [{"code": "TAG_INVALID", "message": message}]}).to_string();
        return Ok((StatusCode::BAD_REQUEST, body).into_response());
    }
    let answer = desk.http.request(head.method.clone(), url).headers(headers).body(sent.clone()).send().await?;
    let (status, headers) = (answer.status(), answer.headers().clone());
    let received = answer.bytes().await?;
    let exchange = Exchange { method: head.method, path: head.uri.to_string(), sent, status, received: received.clone() };
    desk.exchanges.lock().unwrap_or_else(PoisonError::into_inner).push(exchange);
    let mut response = Response::new(Body::from(received));
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response.headers_mut().remove(TRANSFER_ENCODING);
    Ok(response)
}
