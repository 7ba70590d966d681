//! A registry in memory that does as it is told: it can refuse, hang, and let somebody else write at the worst moment.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
};

use axum::{
    Router,
    body::{Body, to_bytes},
    extract::Request,
    response::Response,
};
use bytes::Bytes;
use serde_json::{Value, json};
use tokio::{net::TcpListener, task::JoinSet};

use crate::{
    oci::{Digest, Repository, media_type},
    registry::{Registry, Settings, Timeouts},
};

pub(crate) const NAME: &str = "registry.example.com";

/// What is done about a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Act {
    Serve,
    /// This status and an empty error document.
    Refuse(u16),
}

type Hook = Box<dyn FnMut(&str, &mut Store) -> Act + Send>;

/// What the registry holds.
#[derive(Debug, Default)]
pub(crate) struct Store {
    /// By `repository/tag` or `repository/digest`: media type and content.
    manifests: HashMap<String, (String, Bytes)>,
    blobs: HashMap<String, Bytes>,
    /// Whether it lists referrers itself.
    pub(crate) has_api: bool,
    /// Whether it says that it took notice of a subject, if not as it lists them.
    pub(crate) says_subject: Option<bool>,
    /// The manifests that it refuses to take.
    pub(crate) refuses: Option<fn(&Value) -> bool>,
    /// `METHOD path`, without `/v2/`, of each request.
    pub(crate) asked: Vec<String>,
}

impl Store {
    /// Puts a manifest there, by its digest and under a tag.
    pub(crate) fn put(&mut self, repository: &str, tag: Option<&str>, media_type: &str, content: &Value) -> Digest {
        let content = Bytes::from(content.to_string());
        let digest = Digest::of(&content);
        self.put_as(repository, digest.as_str(), media_type, content.clone());
        if let Some(tag) = tag {
            self.put_as(repository, tag, media_type, content);
        }
        digest
    }

    pub(crate) fn put_as(&mut self, repository: &str, reference: &str, media_type: &str, content: Bytes) {
        self.manifests.insert(format!("{repository}/{reference}"), (media_type.to_owned(), content));
    }

    pub(crate) fn put_blob(&mut self, content: &'static [u8]) -> Digest {
        let digest = Digest::of(content);
        self.blobs.insert(digest.to_string(), content.into());
        digest
    }

    pub(crate) fn remove(&mut self, repository: &str, reference: &str) {
        self.manifests.remove(&format!("{repository}/{reference}"));
    }

    pub(crate) fn manifest(&self, repository: &str, reference: &str) -> Option<(String, Bytes)> {
        self.manifests.get(&format!("{repository}/{reference}")).cloned()
    }

    pub(crate) fn blob(&self, digest: &str) -> Option<Bytes> {
        self.blobs.get(digest).cloned()
    }

    /// The descriptors of all manifests with this subject, as the referrers API lists them.
    pub(crate) fn referrers(&self, repository: &str, subject: &str) -> Vec<Value> {
        let by_digest = self.manifests.iter().filter(|(name, _)| name.starts_with(&format!("{repository}/sha256:")));
        let read = by_digest.map(|(_, (_, content))| (content, serde_json::from_slice::<Value>(content).unwrap_or_default()));
        let referring = read.filter(|(_, manifest)| manifest["subject"]["digest"] == subject);
        let entry = |(content, manifest): (&Bytes, Value)| {
            json!({
                "mediaType": manifest["mediaType"], "digest": Digest::of(content), "size": content.len(),
                "artifactType": manifest["artifactType"], "annotations": manifest["annotations"],
            })
        };
        referring.map(entry).collect()
    }

    fn serve(&mut self, method: &str, path: &str, query: &str, kind: &str, body: Bytes) -> Response {
        if let Some((repository, subject)) = path.split_once("/referrers/").filter(|_| self.has_api) {
            let index = json!({ "schemaVersion": 2, "mediaType": media_type::OCI_INDEX, "manifests": self.referrers(repository, subject) });
            return respond(200, &[("content-type", media_type::OCI_INDEX)], index.to_string().into());
        }
        let Some((repository, rest)) = path.split_once("/manifests/").or_else(|| path.split_once("/blobs/")) else {
            return respond(if path.is_empty() { 200 } else { 404 }, &[], Bytes::new());
        };
        match (method, path.contains("/manifests/")) {
            ("GET" | "HEAD", true) => match self.manifest(repository, rest) {
                Some((kind, content)) => {
                    let digest = if rest.starts_with("sha512:") { rest.to_owned() } else { Digest::of(&content).to_string() };
                    respond(200, &[("content-type", &kind), ("docker-content-digest", &digest)], content)
                }
                None => refuse(404, "MANIFEST_UNKNOWN"),
            },
            ("PUT", true) => {
                let document: Value = serde_json::from_slice(&body).unwrap();
                if self.refuses.is_some_and(|refuses| refuses(&document)) {
                    return refuse(400, "MANIFEST_INVALID");
                }
                let layers = document["layers"].as_array().into_iter().flatten();
                let mut needed = layers.chain([&document["config"]]).filter_map(|descriptor| descriptor["digest"].as_str());
                if needed.any(|digest| !self.blobs.contains_key(digest)) {
                    return refuse(400, "MANIFEST_BLOB_UNKNOWN");
                }
                self.put_as(repository, Digest::of(&body).as_str(), kind, body.clone());
                self.put_as(repository, rest, kind, body);
                match document["subject"]["digest"].as_str().filter(|_| self.says_subject.unwrap_or(self.has_api)) {
                    Some(subject) => respond(201, &[("oci-subject", subject)], Bytes::new()),
                    None => respond(201, &[], Bytes::new()),
                }
            }
            ("POST", false) => respond(202, &[("location", &format!("/v2/{repository}/blobs/uploads/1"))], Bytes::new()),
            ("PUT", false) => {
                let digest = query.strip_prefix("digest=").unwrap().replace("%3A", ":");
                assert_eq!(Digest::of(&body).as_str(), digest);
                self.blobs.insert(digest, body);
                respond(201, &[], Bytes::new())
            }
            ("GET", false) => match self.blob(rest) {
                Some(content) => respond(200, &[], content),
                None => refuse(404, "BLOB_UNKNOWN"),
            },
            _ => refuse(405, "UNSUPPORTED"),
        }
    }
}

/// A running one.
pub(crate) struct Fake {
    port: u16,
    store: Arc<Mutex<Store>>,
    hook: Arc<Mutex<Option<Hook>>>,
    _server: JoinSet<()>,
}

impl Fake {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let store = Arc::new(Mutex::new(Store::default()));
        let hook = Arc::new(Mutex::new(None::<Hook>));
        let (kept, called) = (store.clone(), hook.clone());
        let router = Router::new().fallback(move |request: Request| {
            let (store, hook) = (kept.clone(), called.clone());
            async move {
                let (head, body) = request.into_parts();
                let body = to_bytes(body, 8 << 20).await.unwrap();
                let path = head.uri.path().trim_start_matches("/v2/").to_owned();
                let kind = head.headers.get("content-type").and_then(|kind| kind.to_str().ok()).unwrap_or_default().to_owned();
                let asked = format!("{} {path}", head.method);
                let act = {
                    let mut store = store.lock().unwrap();
                    store.asked.push(asked.clone());
                    hook.lock().unwrap().as_mut().map_or(Act::Serve, |hook| hook(&asked, &mut store))
                };
                match act {
                    Act::Serve => {
                        let query = head.uri.query().unwrap_or_default();
                        store.lock().unwrap().serve(head.method.as_str(), &path, query, &kind, body)
                    }
                    Act::Refuse(status) => refuse(status, "TOLD_TO"),
                }
            }
        });
        let mut server = JoinSet::new();
        server.spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { port, store, hook, _server: server }
    }

    pub(crate) fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap()
    }

    /// Called for each request before it is served.
    pub(crate) fn on_request(&self, hook: impl FnMut(&str, &mut Store) -> Act + Send + 'static) {
        *self.hook.lock().unwrap() = Some(Box::new(hook));
    }

    pub(crate) fn client(&self) -> Registry {
        Registry::new(Settings {
            name: NAME.parse().unwrap(),
            url: format!("http://127.0.0.1:{}", self.port).parse().unwrap(),
            credentials: None,
            ca: None,
            timeouts: Timeouts::default(),
            observer: None,
        })
        .unwrap()
    }

    /// The entries of the index under the fallback tag of a digest.
    pub(crate) fn fallback(&self, repository: &Repository, digest: &Digest) -> Vec<Value> {
        let Some((_, content)) = self.store().manifest(repository.as_str(), &format!("sha256-{}", digest.encoded())) else {
            return vec![];
        };
        let index: Value = serde_json::from_slice(&content).unwrap();
        index["manifests"].as_array().unwrap().clone()
    }

    /// The `.sig` manifest of a digest.
    pub(crate) fn signatures(&self, repository: &Repository, digest: &Digest) -> Option<Value> {
        let tag = format!("sha256-{}.sig", digest.encoded());
        let (_, content) = self.store().manifest(repository.as_str(), &tag)?;
        Some(serde_json::from_slice(&content).unwrap())
    }
}

/// An image manifest; `name` makes it another one.
pub(crate) fn image(name: &str) -> Value {
    json!({
        "schemaVersion": 2,
        "mediaType": media_type::OCI_MANIFEST,
        "config": { "mediaType": media_type::OCI_CONFIG, "digest": Digest::of(b"{}"), "size": 2 },
        "layers": [],
        "annotations": { "name": name },
    })
}

/// An index of these children.
pub(crate) fn index<'a>(children: impl IntoIterator<Item = &'a str>) -> Value {
    let descriptor = |digest: &str| json!({ "mediaType": media_type::OCI_MANIFEST, "digest": digest, "size": 1 });
    let manifests: Vec<_> = children.into_iter().map(descriptor).collect();
    json!({ "schemaVersion": 2, "mediaType": media_type::OCI_INDEX, "manifests": manifests })
}

fn refuse(status: u16, code: &str) -> Response {
    respond(status, &[], Bytes::from(json!({ "errors": [{ "code": code, "message": "told to" }] }).to_string()))
}

fn respond(status: u16, headers: &[(&str, &str)], body: Bytes) -> Response {
    let mut response = Response::builder().status(status);
    for (name, value) in headers {
        response = response.header(*name, *value);
    }
    response.body(Body::from(body)).unwrap()
}
