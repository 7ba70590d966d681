//! OpenBao in its development mode: everything in memory and unsealed, with a root token that is known; else the real thing.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use reqwest::{Certificate, Method, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::process::{Process, free_ports, http_client, scratch, tool};

/// Must never be printed by countersign.
pub const ROOT: &str = "the-root-token-of-the-test";

#[derive(Debug)]
pub struct OpenBao {
    url: String,
    http: reqwest::Client,
    ca: PathBuf,
    log: PathBuf,
    _process: Process,
    _folder: TempDir,
}

impl OpenBao {
    /// Without TLS, and with a Transit engine at `transit`.
    pub async fn start() -> Result<Self> {
        Self::start_with("http").await
    }

    /// With TLS, by a certificate authority of its own: [`Self::ca`].
    pub async fn start_tls() -> Result<Self> {
        Self::start_with("https").await
    }

    async fn start_with(scheme: &str) -> Result<Self> {
        // It listens on the next port, too.
        let (port, folder) = (free_ports(2)?, scratch()?);
        let (log, certificates) = (folder.path().join("log"), folder.path().join("tls"));
        fs::create_dir(&certificates)?;
        let mut command = Command::new(tool("bin/bao")?);
        command.current_dir(folder.path()).env("HOME", folder.path()).env("TMPDIR", folder.path());
        command.args(["server", "-dev", "-dev-no-store-token"]).arg(format!("-dev-root-token-id={ROOT}"));
        command.arg(format!("-dev-listen-address=127.0.0.1:{port}"));
        if scheme == "https" {
            command.arg("-dev-tls").arg(format!("-dev-tls-cert-dir={}", certificates.display()));
        }
        let mut process = Process::start("bao", &mut command, &log)?;
        let (url, ca) = (format!("{scheme}://127.0.0.1:{port}"), certificates.join("vault-ca.pem"));
        let health = format!("{url}/v1/sys/health");
        let ready = || async {
            let Ok(http) = client(scheme, &ca) else { return false };
            http.get(&health).send().await.is_ok_and(|response| response.status() == StatusCode::OK)
        };
        process.wait_ready(Duration::from_secs(60), ready).await?;
        let bao = Self { url, http: client(scheme, &ca)?, ca, log, _process: process, _folder: folder };
        bao.root(Method::POST, "sys/mounts/transit", json!({"type": "transit"})).await?;
        Ok(bao)
    }

    /// Its address, as `VAULT_ADDR` takes it.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The certificate authority that its certificate leads to.
    pub fn ca(&self) -> &Path {
        &self.ca
    }

    /// A new key in the Transit engine: `rsa-2048`, `ecdsa-p256`.
    pub async fn key(&self, name: &str, kind: &str) -> Result<()> {
        self.root(Method::POST, &format!("transit/keys/{name}"), json!({"type": kind})).await.map(|_| ())
    }

    /// A policy with the rights that countersign needs for a key, and no others.
    pub async fn policy(&self, name: &str, key: &str) -> Result<()> {
        self.allow(name, &[("sign", key)], key).await
    }

    /// The same, and the right to have it verify.
    pub async fn verifying_policy(&self, name: &str, key: &str) -> Result<()> {
        self.allow(name, &[("sign", key), ("verify", key)], key).await
    }

    async fn allow(&self, name: &str, updates: &[(&str, &str)], read: &str) -> Result<()> {
        let updates = updates
            .iter()
            .map(|(verb, key)| format!("path \"transit/{verb}/{key}/sha2-256\" {{ capabilities = [\"update\"] }}\n"));
        let rules = format!("{}path \"transit/keys/{read}\" {{ capabilities = [\"read\"] }}\n", updates.collect::<String>());
        self.root(Method::PUT, &format!("sys/policies/acl/{name}"), json!({"policy": rules})).await.map(|_| ())
    }

    /// A new token with one policy beside `default`, as `settings` has it otherwise (`{"ttl": "1h"}`).
    pub async fn token(&self, policy: &str, mut settings: Value) -> Result<String> {
        settings["policies"] = json!([policy]);
        let answer = self.root(Method::POST, "auth/token/create", settings).await?;
        Ok(answer["auth"]["client_token"].as_str().context("no token")?.to_owned())
    }

    /// Stops it from answering anything but that it is sealed.
    pub async fn seal(&self) -> Result<()> {
        self.root(Method::PUT, "sys/seal", json!({})).await.map(|_| ())
    }

    pub async fn unseal(&self) -> Result<()> {
        let log = fs::read_to_string(&self.log)?;
        let key = log.lines().find_map(|line| line.strip_prefix("Unseal Key: ")).context("no unseal key in the log")?;
        let answer = self.root(Method::PUT, "sys/unseal", json!({"key": key})).await?;
        ensure!(answer["sealed"] == false, "still sealed: {answer}");
        let http = &self.http;
        let health = format!("{}/v1/sys/health", self.url);
        crate::process::eventually("unsealed", Duration::from_secs(20), async || {
            Ok((http.get(&health).send().await?.status() == StatusCode::OK).then_some(()))
        })
        .await
    }

    /// Asks as root; an error with its words if it refuses. `null` for an empty answer.
    pub async fn root(&self, method: Method, path: &str, body: Value) -> Result<Value> {
        self.ask(ROOT, None, method, path, body).await
    }

    /// Asks with this token, in this namespace.
    pub async fn ask(&self, token: &str, namespace: Option<&str>, method: Method, path: &str, body: Value) -> Result<Value> {
        let mut request = self.http.request(method.clone(), format!("{}/v1/{path}", self.url)).header("x-vault-token", token);
        if let Some(namespace) = namespace {
            request = request.header("x-vault-namespace", namespace);
        }
        if method != Method::GET && method != Method::DELETE {
            request = request.json(&body);
        }
        let response = request.send().await?;
        let (status, text) = (response.status(), response.text().await?);
        ensure!(status.is_success(), "{method} {path}: {status}: {text}");
        if text.is_empty() { Ok(Value::Null) } else { Ok(serde_json::from_str(&text)?) }
    }
}

fn client(scheme: &str, ca: &Path) -> Result<reqwest::Client> {
    if scheme == "http" {
        return http_client();
    }
    let limit = Duration::from_secs(20);
    let trusted = Certificate::from_pem_bundle(&fs::read(ca)?)?;
    Ok(reqwest::Client::builder().no_proxy().tls_certs_only(trusted).connect_timeout(limit).timeout(limit).build()?)
}
