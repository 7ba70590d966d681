//! A registry that has any number of images, each signed: one is made when it is asked for, and nothing is kept of it.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use axum::Router;
use axum::extract::{Path as UrlPath, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tokio::net::TcpListener;

use crate::fake::{Padding, pair};
use crate::image::{Manifest, OCI_CONFIG, OCI_MANIFEST, digest};
use crate::signature::{SIMPLE_SIGNING, tag_of};

const KEY: &str = "EC_P256";

/// Serves until the runtime ends.
#[derive(Debug, Clone)]
pub struct Endless {
    host: String,
}

impl Endless {
    pub async fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let host = listener.local_addr()?.to_string();
        let app = Router::new()
            .route("/v2/", get(async || "{}"))
            .route("/v2/endless/{number}/manifests/{reference}", get(manifest))
            .route("/v2/endless/{number}/blobs/{digest}", get(blob))
            .fallback(async || missing())
            .with_state(Arc::from(host.as_str()));
        #[expect(clippy::disallowed_methods, reason = "it ends with the test's own runtime")]
        tokio::spawn(async move { axum::serve(listener, app).await });
        Ok(Self { host })
    }

    /// As it stands in references.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The image with this number, by its digest.
    pub fn reference(&self, number: u64) -> String {
        format!("{}/endless/{number}@{}", self.host, image(number).digest)
    }

    /// Writes down the public key by which all of them are signed (PEM).
    pub fn write_public_key(&self, path: &Path) -> Result<()> {
        Ok(fs::write(path, pair(KEY).public_pem())?)
    }
}

fn image(number: u64) -> Manifest {
    let empty = json!({"mediaType": OCI_CONFIG, "digest": digest(b"{}"), "size": 2});
    let manifest = json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": empty, "layers": [],
        "annotations": {"number": number.to_string()}});
    Manifest::new(OCI_MANIFEST, manifest.to_string())
}

fn payload(host: &str, number: u64) -> String {
    let (reference, digest) = (format!("{host}/endless/{number}"), image(number).digest);
    json!({"critical": {"identity": {"docker-reference": reference}, "image": {"docker-manifest-digest": digest},
        "type": "cosign container image signature"}, "optional": null})
    .to_string()
}

/// As it is under the `.sig` tag.
fn signatures(host: &str, number: u64) -> Manifest {
    let payload = payload(host, number);
    let signature = pair(KEY).sign(Padding::Asn1, &Sha256::digest(&payload).into()).expect("such keys sign so");
    let layer = json!({"mediaType": SIMPLE_SIGNING, "digest": digest(payload.as_bytes()), "size": payload.len(),
        "annotations": {"dev.cosignproject.cosign/signature": BASE64_STANDARD.encode(signature)}});
    let empty = json!({"mediaType": OCI_CONFIG, "digest": digest(b"{}"), "size": 2});
    let manifest = json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": empty, "layers": [layer]});
    Manifest::new(OCI_MANIFEST, manifest.to_string())
}

async fn manifest(State(host): State<Arc<str>>, UrlPath((number, reference)): UrlPath<(u64, String)>) -> Response {
    let image = image(number);
    let found = if reference == image.digest {
        image
    } else if reference == tag_of(&image.digest) {
        signatures(&host, number)
    } else {
        return missing();
    };
    let digest = HeaderValue::from_str(&found.digest).expect("a digest is plain");
    (
        [
            (CONTENT_TYPE, HeaderValue::from_static(OCI_MANIFEST)),
            ("docker-content-digest".parse().expect("it is a name"), digest),
        ],
        found.bytes,
    )
        .into_response()
}

async fn blob(State(host): State<Arc<str>>, UrlPath((number, wanted)): UrlPath<(u64, String)>) -> Response {
    let payload = payload(&host, number);
    if digest(payload.as_bytes()) == wanted { payload.into_response() } else { missing() }
}

fn missing() -> Response {
    let errors = json!({"errors": [{"code": "MANIFEST_UNKNOWN", "message": "there is no such thing"}]});
    (StatusCode::NOT_FOUND, [(CONTENT_TYPE, "application/json")], errors.to_string()).into_response()
}
