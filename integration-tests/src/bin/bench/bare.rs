//! The floors: what a registry, a KMS and a database engine do for a client that does nothing but ask.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use hyper::{Method, StatusCode};
use integration_tests::house::Keys;
use integration_tests::image::{DOCKER_LIST, DOCKER_MANIFEST, OCI_CONFIG, OCI_INDEX, OCI_MANIFEST, digest};
use integration_tests::ministack::{Credentials, Ministack};
use integration_tests::registry::Client;
use integration_tests::signature::{SIMPLE_SIGNING, tag_of};
use rusqlite::Connection;
use serde_json::json;

use crate::report::float;
use crate::stage::{Pushed, tag};
use crate::wire::{Wire, Work};

/// The requests that a first signature takes, in the order in which countersign makes them, with everything that is sent made
/// beforehand. The registry cannot tell the two apart: the bytes have the same form and length, only that the signatures
/// are random.
pub struct Writes {
    accept: String,
    each: Vec<Write>,
}

struct Write {
    image: String,
    signatures: String,
    uploads: String,
    payload: Bytes,
    payload_digest: String,
    manifest: Bytes,
}

impl Writes {
    /// Uploads the config that all signatures share, as countersign does once for each repository.
    pub async fn prepare(client: &Client, host: &str, pushed: &Pushed, keys: Keys) -> Result<Self> {
        let repository = &pushed.repository;
        client.push_blob(repository, &Bytes::from_static(b"{}")).await?;
        let length = match keys {
            Keys::P256 => 71,
            Keys::Rsa2048 => 256,
            Keys::Rsa3072 => 384,
            Keys::Rsa4096 => 512,
        };
        let write = |(number, image): (usize, &integration_tests::image::Manifest)| {
            let payload = json!({
                "critical": {
                    "identity": {"docker-reference": format!("{host}/{repository}:{}", tag(number))},
                    "image": {"docker-manifest-digest": image.digest},
                    "type": "cosign container image signature",
                },
                "optional": null,
            });
            let payload = Bytes::from(payload.to_string());
            let signature: Vec<u8> = (0..length).map(|_| fastrand::u8(..)).collect();
            let manifest = json!({
                "schemaVersion": 2,
                "mediaType": OCI_MANIFEST,
                "config": {"mediaType": OCI_CONFIG, "size": 2, "digest": digest(b"{}")},
                "layers": [{
                    "mediaType": SIMPLE_SIGNING,
                    "size": payload.len(),
                    "digest": digest(&payload),
                    "annotations": {"dev.cosignproject.cosign/signature": STANDARD.encode(signature)},
                }],
            });
            Write {
                image: format!("/v2/{repository}/manifests/{}", tag(number)),
                signatures: format!("/v2/{repository}/manifests/{}", tag_of(&image.digest)),
                uploads: format!("/v2/{repository}/blobs/uploads/"),
                payload_digest: digest(&payload),
                payload,
                manifest: manifest.to_string().into(),
            }
        };
        let accept = [OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_LIST].join(", ");
        Ok(Self { accept, each: pushed.manifests.iter().enumerate().map(write).collect() })
    }
}

impl Work for Writes {
    async fn one(&self, number: usize, wire: &mut Wire) -> Result<()> {
        let Write { image, signatures, uploads, payload, payload_digest, manifest } = &self.each[number];
        let accept = [("accept", self.accept.as_str())];
        let nothing = Bytes::new;
        wire.ask(Method::GET, image, &accept, nothing()).await?.expect(StatusCode::OK, "read the image")?;
        let found = wire.ask(Method::GET, signatures, &accept, nothing()).await?;
        found.expect(StatusCode::NOT_FOUND, "look for signatures")?;

        let begun = wire.ask(Method::POST, uploads, &[("content-length", "0")], nothing()).await?;
        let begun = begun.expect(StatusCode::ACCEPTED, "begin an upload")?;
        let location = begun.headers.get("location").context("an upload without a Location")?.to_str()?;
        // This registry's are absolute, and have a query.
        let (_, path) = location.split_once("/v2/").with_context(|| format!("an upload to {location}"))?;
        let target = format!("/v2/{path}&digest={payload_digest}");
        let octets = [("content-type", "application/octet-stream")];
        let uploaded = wire.ask(Method::PUT, &target, &octets, payload.clone()).await?;
        uploaded.expect(StatusCode::CREATED, "upload the payload")?;

        let found = wire.ask(Method::GET, signatures, &accept, nothing()).await?;
        found.expect(StatusCode::NOT_FOUND, "look for signatures once more")?;
        let written = wire.ask(Method::PUT, signatures, &[("content-type", OCI_MANIFEST)], manifest.clone()).await?;
        written.expect(StatusCode::CREATED, "write the signature")?;
        let read = wire.ask(Method::GET, signatures, &accept, nothing()).await?;
        let read = read.expect(StatusCode::OK, "read the signature back")?;
        ensure!(read.body == *manifest, "the signature that was read back is another");
        Ok(())
    }
}

/// Requests to a KMS for signatures over different digests, themselves signed beforehand.
pub struct Signings {
    each: Vec<(Vec<(String, String)>, Bytes)>,
}

impl Signings {
    pub fn prepare(kms: &Ministack, who: &Credentials, alias: &str, keys: Keys, count: usize) -> Self {
        let algorithm = match keys {
            Keys::P256 => "ECDSA_SHA_256",
            Keys::Rsa2048 | Keys::Rsa3072 | Keys::Rsa4096 => "RSASSA_PKCS1_V1_5_SHA_256",
        };
        let request = |_| {
            let message: [u8; 32] = std::array::from_fn(|_| fastrand::u8(..));
            let body = json!({
                "KeyId": format!("alias/{alias}"),
                "Message": STANDARD.encode(message),
                "MessageType": "DIGEST",
                "SigningAlgorithm": algorithm,
            });
            let body = body.to_string();
            (kms.kms_headers(who, "Sign", &body), body.into())
        };
        Self { each: (0..count).map(request).collect() }
    }
}

impl Work for Signings {
    async fn one(&self, number: usize, wire: &mut Wire) -> Result<()> {
        let (headers, body) = &self.each[number];
        let headers: Vec<(&str, &str)> = headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        wire.ask(Method::POST, "/", &headers, body.clone()).await?.expect(StatusCode::OK, "ask the KMS to sign")?;
        Ok(())
    }
}

/// Events per second that the queue's engine makes durable when nothing else is asked of it: one thread that inserts `batch`
/// rows of the size of an event in each synced transaction, into a table of two columns. As the queue's own benchmark has it.
pub fn commits(folder: &Path, batch: u64, span: Duration) -> Result<f64> {
    const BODY: usize = 1200;
    let connection = Connection::open(folder.join("bare.db"))?;
    connection.execute_batch(
        "PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;
         PRAGMA wal_autocheckpoint = 2000; CREATE TABLE event (id INTEGER PRIMARY KEY, body BLOB)",
    )?;
    let body = vec![b'x'; BODY];
    let (begun, mut events) = (Instant::now(), 0);
    while begun.elapsed() < span {
        connection.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
        for _ in 0..batch {
            connection.prepare_cached("INSERT INTO event (body) VALUES (?1)")?.execute([&body[..]])?;
        }
        connection.prepare_cached("COMMIT")?.execute([])?;
        events += batch;
    }
    Ok(float(events) / begun.elapsed().as_secs_f64())
}
