//! A fake of a Kubernetes API server, for what a real one does not do when a test wants it to: it fails, cuts watches and forgets
//! what was before. It keeps objects in memory, lists and watches them as the API's conventions have it, and takes merge patches of
//! statuses. It authenticates nobody. [`crate::kubernetes`] has a real one.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use anyhow::Result;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::Method;
use axum::response::Response;
use futures::stream;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::fake::decoded;

/// Where it has pods, whatever their namespace.
pub const PODS: &str = "/api/v1/pods";

/// Dropping it leaves it running as long as the test's runtime.
#[derive(Clone)]
pub struct ApiServer {
    address: String,
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<Kept>,
    /// Changes with each change of `state`.
    changed: watch::Sender<u64>,
}

/// What it keeps.
#[derive(Default)]
struct Kept {
    version: u64,
    /// By their path, such as `/apis/countersign.dev/v1/witnesses/release`.
    objects: BTreeMap<String, Value>,
    /// What happened, with its version.
    history: Vec<(u64, String, Value)>,
    /// Watches from an older version are told that it is gone.
    forgotten: u64,
    /// Every request is answered so.
    fails: Option<u16>,
    /// Watches that began under another number end.
    cuts: u64,
    requests: Vec<String>,
}

impl ApiServer {
    pub async fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?.to_string();
        let shared = Arc::new(Shared { state: Mutex::default(), changed: watch::Sender::new(0) });
        let app = Router::new().fallback(answer).with_state(Arc::clone(&shared));
        #[expect(clippy::disallowed_methods, reason = "it ends with the test's own runtime")]
        tokio::spawn(async move { axum::serve(listener, app).await });
        Ok(Self { address, shared })
    }

    /// Writes a kubeconfig for it.
    pub fn kubeconfig(&self, folder: &Path) -> Result<PathBuf> {
        let path = folder.join("kubeconfig");
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "fake",
            "clusters": [{"name": "fake", "cluster": {"server": format!("http://{}", self.address)}}],
            "users": [{"name": "webhook", "user": {"token": "token"}}],
            "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "webhook"}}],
        });
        fs::write(&path, config.to_string())?;
        Ok(path)
    }

    /// Makes or changes an object of this collection, such as `/api/v1/namespaces/payments/secrets`.
    pub fn put(&self, collection: &str, name: &str, object: &Value) {
        let path = format!("{collection}/{name}");
        self.change(|kept| {
            let before = kept.objects.get(&path).cloned();
            let mut new = object.clone();
            new["metadata"]["name"] = json!(name);
            let generation = before.as_ref().map_or(0, |before| before["metadata"]["generation"].as_u64().unwrap_or_default());
            new["metadata"]["generation"] = json!(generation + 1);
            if let Some(status) = before.as_ref().and_then(|before| before.get("status")) {
                new["status"] = status.clone();
            }
            kept.store(&path, if before.is_some() { "MODIFIED" } else { "ADDED" }, new);
        });
    }

    pub fn delete(&self, collection: &str, name: &str) {
        let path = format!("{collection}/{name}");
        self.change(|kept| {
            if let Some(object) = kept.objects.get(&path).cloned() {
                kept.store(&path, "DELETED", object);
                kept.objects.remove(&path);
            }
        });
    }

    /// The objects below this path.
    pub fn objects(&self, collection: &str) -> Vec<Value> {
        let kept = self.shared.lock();
        kept.objects
            .iter()
            .filter(|(path, _)| path.starts_with(&format!("{collection}/")))
            .map(|(_, object)| object.clone())
            .collect()
    }

    /// The condition `Ready` of an object: its status and its message.
    pub fn ready(&self, collection: &str, name: &str) -> Option<(String, String)> {
        let kept = self.shared.lock();
        let condition = &kept.objects.get(&format!("{collection}/{name}"))?["status"]["conditions"][0];
        let text = |member: &str| condition[member].as_str().map(str::to_owned);
        Some((text("status")?, text("message")?))
    }

    /// Answers everything with this status from here on, and ends the watches; or, with none, as it should again.
    pub fn fail(&self, status: Option<u16>) {
        self.change(|kept| {
            kept.fails = status;
            kept.cuts += 1;
        });
    }

    /// Ends every watch in the middle.
    pub fn cut(&self) {
        self.change(|kept| kept.cuts += 1);
    }

    /// Cuts, and forgets what was before: watches that go on from there are told `410 Gone`.
    pub fn forget(&self) {
        self.change(|kept| {
            kept.version += 1;
            kept.forgotten = kept.version;
            kept.history.clear();
            kept.cuts += 1;
        });
    }

    /// What was asked for since this was asked last: `GET /api/…`.
    pub fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.shared.lock().requests)
    }

    fn change(&self, change: impl FnOnce(&mut Kept)) {
        change(&mut self.shared.lock());
        self.shared.changed.send_modify(|count| *count += 1);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.state.lock().expect("nothing panics while it holds this")
    }
}

impl Kept {
    fn store(&mut self, path: &str, kind: &str, mut object: Value) {
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.objects.insert(path.to_owned(), object.clone());
        self.history.push((self.version, path.to_owned(), json!({"type": kind, "object": object})));
    }
}

async fn answer(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let path = parts.uri.path().to_owned();
    let query = decoded(parts.uri.query().unwrap_or_default());
    let body = axum::body::to_bytes(body, 1 << 20).await.unwrap_or_default();
    let fails = {
        let mut kept = shared.lock();
        kept.requests.push(format!("{} {}", parts.method, parts.uri));
        kept.fails
    };
    if let Some(status) = fails {
        return failure(status, "as the test has it");
    }
    if query.get("watch").is_some_and(|watch| watch == "true" || watch == "1") {
        return watching(shared, &path, query.get("resourceVersion").map_or("", String::as_str));
    }
    let mut kept = shared.lock();
    let answer = match parts.method {
        Method::GET => match kept.objects.get(&path) {
            Some(object) => json_answer(200, object),
            None if is_collection(&path) => list(&kept, &path, &query),
            None => failure(404, &format!("{path} not found")),
        },
        Method::POST => {
            let Ok(object) = serde_json::from_slice::<Value>(&body) else { return failure(400, "no JSON") };
            let name = object["metadata"]["name"].as_str().unwrap_or("unnamed").to_owned();
            let path = format!("{path}/{name}");
            if kept.objects.contains_key(&path) {
                failure(409, &format!("{name} already exists"))
            } else {
                kept.store(&path, "ADDED", object.clone());
                json_answer(201, &object)
            }
        }
        Method::PATCH => {
            let of = path.strip_suffix("/status").unwrap_or(&path).to_owned();
            let Ok(change) = serde_json::from_slice::<Value>(&body) else { return failure(400, "no JSON") };
            match kept.objects.get(&of).cloned() {
                None => failure(404, "not found"),
                Some(mut object) => {
                    object["status"] = change["status"].clone();
                    kept.store(&of, "MODIFIED", object.clone());
                    json_answer(200, &object)
                }
            }
        }
        _ => failure(405, "not here"),
    };
    drop(kept);
    shared.changed.send_modify(|count| *count += 1);
    answer
}

/// As far as tests list anything.
fn is_collection(path: &str) -> bool {
    path == PODS || path.starts_with("/apis/countersign.dev/v1/") && path.matches('/').count() == 4
}

/// A page of them, if one is asked for: from the object on that `continue` names.
fn list(kept: &Kept, collection: &str, query: &BTreeMap<String, String>) -> Response {
    let first = query.get("continue").cloned().unwrap_or_default();
    let of_collection = |path: &str| path.starts_with(&format!("{collection}/")) && *path >= *first;
    let mut found: Vec<_> = kept.objects.iter().filter(|(path, _)| of_collection(path)).collect();
    let mut metadata = json!({"resourceVersion": kept.version.to_string()});
    if let Some(limit) = query.get("limit").and_then(|limit| limit.parse::<usize>().ok())
        && found.len() > limit
    {
        metadata["continue"] = json!(found[limit].0);
        found.truncate(limit);
    }
    let items: Vec<_> = found.into_iter().map(|(_, object)| object).collect();
    json_answer(200, &json!({"apiVersion": "countersign.dev/v1", "kind": "List", "metadata": metadata, "items": items}))
}

fn watching(shared: Arc<Shared>, collection: &str, from: &str) -> Response {
    let prefix = format!("{collection}/");
    let from: u64 = from.parse().unwrap_or_default();
    let cuts = shared.lock().cuts;
    let changed = shared.changed.subscribe();
    let lines = stream::unfold((shared, changed, from, false), move |(shared, mut changed, from, is_over)| {
        let prefix = prefix.clone();
        async move {
            if is_over {
                return None;
            }
            loop {
                changed.borrow_and_update();
                let (text, version, is_over) = {
                    let kept = shared.lock();
                    if kept.cuts != cuts {
                        return Some((Err(std::io::Error::other("cut")), (Arc::clone(&shared), changed.clone(), from, true)));
                    }
                    if from < kept.forgotten {
                        (format!("{}\n", json!({"type": "ERROR", "object": status(410, "too old resource version")})), from, true)
                    } else {
                        let new = kept.history.iter().filter(|(version, path, _)| *version > from && path.starts_with(&prefix));
                        let text = new.fold(String::new(), |text, (_, _, event)| format!("{text}{event}\n"));
                        (text, kept.version, false)
                    }
                };
                if !text.is_empty() {
                    return Some((Ok(Bytes::from(text)), (shared, changed, version, is_over)));
                }
                if tokio::time::timeout(Duration::from_secs(60), changed.changed()).await.is_err() {
                    return None;
                }
            }
        }
    });
    Response::builder().header("content-type", "application/json").body(Body::from_stream(lines)).expect("it is an answer")
}

fn json_answer(status: u16, value: &Value) -> Response {
    let response = Response::builder().status(status).header("content-type", "application/json");
    response.body(value.to_string().into()).expect("it is an answer")
}

fn failure(code: u16, message: &str) -> Response {
    json_answer(code, &status(code, message))
}

fn status(code: u16, message: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "reason": "", "code": code})
}
