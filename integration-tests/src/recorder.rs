//! An HTTP proxy that writes down what passes through it, so that a test can say who wrote what, and having read what; and that can
//! make a registry's tags immutable, throttle its writes or limit its storage, which docker-registry has no settings for.

use std::collections::{BTreeSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use reqwest::header::{ACCEPT, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, RETRY_AFTER, TRANSFER_ENCODING};
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
    /// When it was answered.
    pub at: Instant,
}

#[derive(Debug)]
pub struct Recorder {
    port: u16,
    desk: Arc<Desk>,
    _server: JoinSet<()>,
}

#[derive(Debug)]
struct Desk {
    target: String,
    http: reqwest::Client,
    exchanges: Mutex<Vec<Exchange>>,
    tags: AtomicU8,
    knows_types: AtomicBool,
    refusals: Mutex<VecDeque<(Write, Refusal)>>,
}

/// Of a manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Write {
    UnderTag,
    ByDigest,
}

impl Write {
    /// None of what writes no manifest.
    pub fn of(exchange: &Exchange) -> Option<Self> {
        let (_, reference) = exchange.path.split_once("/manifests/").filter(|_| exchange.method == Method::PUT)?;
        Some(if reference.contains(':') { Self::ByDigest } else { Self::UnderTag })
    }
}

/// How the next manifest is refused that is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// 429, with this many seconds to wait.
    Throttled { retry_after: u32 },
    /// As Harbor has it, when a project's storage is used up.
    Quota,
}

const OCI_EMPTY: &str = "application/vnd.oci.empty.v1+json";

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
        let tags = AtomicU8::new(Mutable::All as u8);
        let (exchanges, refusals) = (Mutex::default(), Mutex::default());
        let desk = Arc::new(Desk {
            target: target.to_owned(),
            http: http_client()?,
            exchanges,
            tags,
            knows_types: true.into(),
            refusals,
        });
        let router = Router::new().fallback(pass).with_state(Arc::clone(&desk));
        let mut server = JoinSet::new();
        server.spawn(async move { axum::serve(listener, router).await.expect("serving ends with its task only") });
        Ok(Self { port, desk, _server: server })
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// From now on, only these tags can be written again.
    pub fn set_mutable(&self, tags: Mutable) {
        self.desk.tags.store(tags as u8, Ordering::SeqCst);
    }

    /// From now on, manifests are refused that have what OCI image-spec 1.1 has come with: an `artifactType`, the empty config.
    pub fn forget_artifact_types(&self) {
        self.desk.knows_types.store(false, Ordering::SeqCst);
    }

    /// The next writes of this kind are refused so, one after the other.
    pub fn refuse(&self, write: Write, refusals: impl IntoIterator<Item = Refusal>) {
        let refusals = refusals.into_iter().map(|refusal| (write, refusal));
        self.desk.refusals.lock().unwrap_or_else(PoisonError::into_inner).extend(refusals);
    }

    /// What has passed, in the order in which it was answered.
    pub fn exchanges(&self) -> Vec<Exchange> {
        self.desk.exchanges().clone()
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
    fn exchanges(&self) -> MutexGuard<'_, Vec<Exchange>> {
        self.exchanges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the registry answers.
    async fn ask(&self, exchange: &Exchange, url: &str, headers: HeaderMap) -> Result<Response> {
        let request = self.http.request(exchange.method.clone(), url).headers(headers).body(exchange.sent.clone());
        let answer = request.send().await?;
        let (status, headers) = (answer.status(), answer.headers().clone());
        let mut response = Response::new(Body::from(answer.bytes().await?));
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        response.headers_mut().remove(TRANSFER_ENCODING);
        Ok(response)
    }

    /// What a registry of another kind would answer.
    async fn refusal(&self, exchange: &Exchange, url: &str, headers: &HeaderMap) -> Result<Option<Response>> {
        let Some((_, tag)) = exchange.path.split_once("/manifests/").filter(|_| exchange.method == Method::PUT) else {
            return Ok(None);
        };
        let answer = |status: StatusCode, code: &str, message: &str| {
            (status, json!({"errors": [{"code": code, "message": message}]}).to_string()).into_response()
        };
        if !self.knows_types.load(Ordering::SeqCst) {
            let manifest: Value = serde_json::from_slice(&exchange.sent)?;
            let config = &manifest["config"]["mediaType"];
            if !manifest["artifactType"].is_null() || *config == OCI_EMPTY {
                // Such as those that have a list of what may be a config.
                let message = format!("config {config} is not supported");
                return Ok(Some(answer(StatusCode::BAD_REQUEST, "MANIFEST_INVALID", &message)));
            }
        }
        let write = Write::of(exchange);
        let next = || {
            let mut refusals = self.refusals.lock().unwrap_or_else(PoisonError::into_inner);
            let is_meant = refusals.front().is_some_and(|(next, _)| Some(*next) == write);
            if is_meant { refusals.pop_front() } else { None }
        };
        match next().map(|(_, refusal)| refusal) {
            Some(Refusal::Throttled { retry_after }) => {
                let mut response = answer(StatusCode::TOO_MANY_REQUESTS, "TOOMANYREQUESTS", "too many requests");
                response.headers_mut().insert(RETRY_AFTER, retry_after.into());
                return Ok(Some(response));
            }
            Some(Refusal::Quota) => {
                let message = "adding 1.1 KiB of storage resource, which when updated to current usage of 10.0 GiB will exceed the \
                               configured upper limit of 10.0 GiB.";
                return Ok(Some(answer(StatusCode::FORBIDDEN, "DENIED", message)));
            }
            None => {}
        }
        let exists = async || {
            let head = self.http.head(url).header(ACCEPT, headers[CONTENT_TYPE].clone());
            anyhow::Ok(head.send().await?.status().is_success())
        };
        if self.is_immutable(tag) && exists().await? {
            // In ECR's words.
            let message = format!(
                "The image tag '{tag}' already exists in the repository and cannot be overwritten because the tag is immutable."
            );
            return Ok(Some(answer(StatusCode::BAD_REQUEST, "TAG_INVALID", &message)));
        }
        Ok(None)
    }

    fn is_immutable(&self, tag: &str) -> bool {
        let mutable = self.tags.load(Ordering::SeqCst);
        let is_mutable = match tag {
            _ if tag.contains(':') || mutable == Mutable::All as u8 => true,
            _ => mutable == Mutable::Signatures as u8 && tag.starts_with("sha256-"),
        };
        !is_mutable
    }
}

async fn pass(State(desk): State<Arc<Desk>>, request: Request) -> Response {
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
    let mut exchange = Exchange {
        method: head.method,
        path: head.uri.to_string(),
        sent,
        status: StatusCode::OK,
        received: Bytes::new(),
        at: Instant::now(),
    };
    let mut response = match desk.refusal(&exchange, &url, &headers).await? {
        Some(response) => response,
        None => desk.ask(&exchange, &url, headers).await?,
    };
    let received = to_bytes(std::mem::take(response.body_mut()), LONGEST).await?;
    *response.body_mut() = Body::from(received.clone());
    (exchange.status, exchange.received, exchange.at) = (response.status(), received, Instant::now());
    desk.exchanges().push(exchange);
    Ok(response)
}
