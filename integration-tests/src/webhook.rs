//! `countersign admission`, called as an API server calls it: by HTTPS, trusting only its `caBundle`.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::daemon::{self, Metrics, Output, binary};
use crate::process::{Process, free_port, scratch};

/// What it is called in a cluster that has it as deploy/kubernetes says.
pub const SERVICE: &str = "countersign-admission.countersign.svc";

/// A running webhook.
#[derive(Debug)]
pub struct Webhook {
    process: Process,
    http: reqwest::Client,
    port: u16,
    bundle: String,
    folder: TempDir,
}

/// What it answered.
#[derive(Debug, Clone)]
pub struct Answer {
    pub allowed: bool,
    /// What its user reads, if it is denied.
    pub message: String,
    /// The operations of the JSON patch.
    pub patch: Vec<Value>,
    pub response: Value,
}

impl Webhook {
    /// With this configuration besides its own listener and certificate.
    pub async fn start(config: &str) -> Result<Self> {
        let (folder, port) = (scratch()?, free_port()?);
        let webhook_toml = folder.path().join("webhook.toml");
        fs::write(&webhook_toml, with_listener(config, port))?;
        let path = webhook_toml.to_str().context("a folder whose name is no text")?;
        let bundle = daemon::run(&["admission", "--ca-bundle", "--config", path], &[]).await?.expect_code(0)?.stdout;
        let authority = reqwest::Certificate::from_pem(&STANDARD.decode(bundle.trim())?)?;
        let limit = Duration::from_secs(40);
        let http =
            reqwest::Client::builder().no_proxy().tls_certs_only([authority]).connect_timeout(limit).timeout(limit).build()?;
        let mut command = Command::new(binary()?);
        command.args(["admission", "--config", path]);
        let mut process = Process::start("countersign admission", &mut command, &folder.path().join("log"))?;
        let probe = format!("https://127.0.0.1:{port}/readyz");
        let ready = || async { http.get(&probe).send().await.is_ok_and(|answer| answer.status().is_success()) };
        process.wait_ready(Duration::from_secs(60), ready).await?;
        Ok(Self { process, http, port, bundle: bundle.trim().to_owned(), folder })
    }

    /// Writes another configuration and has it read, until it is in force.
    pub async fn reload(&self, config: &str) -> Result<()> {
        let count = |metrics: &Metrics, result| metrics.count("countersign_config_reloads_total", &[("result", result)]);
        let before = count(&self.metrics().await?, "ok");
        fs::write(self.config(), with_listener(config, self.port))?;
        self.process.signal(Signal::HUP)?;
        crate::process::eventually("the configuration is in force", Duration::from_secs(30), async || {
            let metrics = self.metrics().await?;
            ensure!(count(&metrics, "failed") == 0, "the configuration was refused:\n{}", self.logged());
            Ok((count(&metrics, "ok") > before).then_some(()))
        })
        .await
    }

    /// It listens on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// What API servers have as `caBundle`.
    pub fn bundle(&self) -> &str {
        &self.bundle
    }

    pub fn config(&self) -> PathBuf {
        self.folder.path().join("webhook.toml")
    }

    /// Everything it has logged.
    pub fn logged(&self) -> String {
        fs::read(self.folder.path().join("log")).map_or_else(|_| String::new(), |log| String::from_utf8_lossy(&log).into_owned())
    }

    /// Runs another command of countersign's with the webhook's configuration.
    pub async fn run(&self, arguments: &[&str]) -> Result<Output> {
        let config = self.config();
        let mut arguments = arguments.to_vec();
        arguments.extend(["--config", config.to_str().context("a folder whose name is no text")?]);
        daemon::run(&arguments, &[]).await
    }

    pub async fn metrics(&self) -> Result<Metrics> {
        Metrics::parse(&self.get("/metrics").await?)
    }

    /// What `GET` of this path answers, if it is a success.
    pub async fn get(&self, path: &str) -> Result<String> {
        let url = format!("https://127.0.0.1:{}{path}", self.port);
        Ok(self.http.get(url).send().await?.error_for_status()?.text().await?)
    }

    /// `path` is `/validate` or `/mutate`, with the query that an API server adds if there is to be one.
    pub async fn call(&self, path: &str, review: &Value) -> Result<Answer> {
        let url = format!("https://127.0.0.1:{}{path}", self.port);
        let answer = self.http.post(url).header("content-type", "application/json").body(review.to_string()).send().await?;
        ensure!(answer.status().is_success(), "{}: {}", answer.status(), answer.text().await?);
        let answer: Value = answer.json().await?;
        ensure!(answer["apiVersion"] == "admission.k8s.io/v1" && answer["kind"] == "AdmissionReview", "no review: {answer}");
        let response = answer["response"].clone();
        ensure!(response["uid"] == review["request"]["uid"], "the answer to another review: {response}");
        let operations = match response["patch"].as_str() {
            Some(encoded) => serde_json::from_slice(&STANDARD.decode(encoded)?)?,
            None => Vec::new(),
        };
        let message = response["status"]["message"].as_str().unwrap_or_default().to_owned();
        Ok(Answer { allowed: response["allowed"] == true, message, patch: operations, response })
    }

    /// Whether a pod of this image may be created in the namespace.
    pub async fn create(&self, namespace: &str, image: &str) -> Result<Answer> {
        self.call("/validate?timeout=30s", &review("CREATE", namespace, "/v1", "Pod", &pod(&[image]), &Value::Null)).await
    }
}

impl Answer {
    /// The reason, if it is a denial that begins with the line that users know.
    pub fn why(&self, image: &str) -> Result<&str> {
        let first = format!("image {image} is not attested\n");
        self.message.strip_prefix(&first).filter(|_| !self.allowed).with_context(|| format!("{image}: {self:?}"))
    }
}

fn with_listener(config: &str, port: u16) -> String {
    let names = format!("[\"127.0.0.1\", \"{SERVICE}\"]");
    format!("[admission]\nlisten = \"127.0.0.1:{port}\"\ntls = {{ folder = \"authority\", names = {names} }}\n{config}")
}

/// A pod with one container for each image.
pub fn pod(images: &[&str]) -> Value {
    let containers: Vec<_> =
        images.iter().enumerate().map(|(index, image)| json!({"name": format!("c{index}"), "image": image})).collect();
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web"}, "spec": {"containers": containers}})
}

/// What an API server asks. `version` is `apps/v1`, or `/v1` for the core group.
pub fn review(operation: &str, namespace: &str, version: &str, kind: &str, object: &Value, old: &Value) -> Value {
    let (group, version) = version.split_once('/').unwrap_or_default();
    json!({
        "kind": "AdmissionReview",
        "apiVersion": "admission.k8s.io/v1",
        "request": {
            "uid": format!("705ab4f5-{:08x}", fastrand::u32(..)),
            "kind": {"group": group, "version": version, "kind": kind},
            "resource": {"group": group, "version": version, "resource": format!("{}s", kind.to_lowercase())},
            "name": "web",
            "namespace": namespace,
            "operation": operation,
            "userInfo": {"username": "anna", "groups": ["system:authenticated"]},
            "object": object,
            "oldObject": old,
            "dryRun": false,
            "options": {"kind": "CreateOptions", "apiVersion": "meta.k8s.io/v1"},
        },
    })
}
