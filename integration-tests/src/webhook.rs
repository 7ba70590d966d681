//! `countersign admission`, called as an API server calls it: by HTTPS, trusting only its `caBundle`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use reqwest::Body;
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::daemon::{self, Metrics, Output, binary};
use crate::house::House;
use crate::process::{Process, free_port, http_client, scratch};

/// What it is called in a cluster that has it as deploy/kubernetes says.
pub const SERVICE: &str = "countersign-admission.countersign.svc";

/// In the namespace `payments` only what `release` has signed may run.
pub const POLICY: &str = "[[policy]]\nname = \"payments\"\nwitness = \"release\"\nnamespace = \"payments\"\nenabled = true\n";

/// A running webhook.
#[derive(Debug)]
pub struct Webhook {
    process: Option<Process>,
    http: reqwest::Client,
    port: u16,
    /// As it stands in the configuration.
    certificate: String,
    roots: Vec<reqwest::Certificate>,
    bundle: String,
    /// Without its listener and certificate.
    settings: String,
    config: PathBuf,
    /// Replicas share it, as they share the authority in it.
    folder: Arc<TempDir>,
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
    /// With this configuration besides its own listener and a certificate that it makes itself.
    pub async fn start(config: &str) -> Result<Self> {
        let names = format!("{{ folder = \"authority\", names = [\"127.0.0.1\", \"{SERVICE}\"] }}");
        let mut webhook = Self::prepare(Arc::new(scratch()?), config, &names)?;
        let printed = webhook.run(&["admission", "--ca-bundle"]).await?.expect_code(0)?;
        printed.stdout.trim().clone_into(&mut webhook.bundle);
        webhook.roots = vec![reqwest::Certificate::from_pem(&STANDARD.decode(&webhook.bundle)?)?];
        webhook.started().await
    }

    /// With the certificate and the key in these files. Called by those who trust `roots` (PEM).
    pub async fn start_with_files(config: &str, certificate: &Path, key: &Path, roots: &[&[u8]]) -> Result<Self> {
        let files = format!("{{ certificate = \"{}\", key = {{ file = \"{}\" }} }}", certificate.display(), key.display());
        let mut webhook = Self::prepare(Arc::new(scratch()?), config, &files)?;
        webhook.roots = roots.iter().map(|pem| reqwest::Certificate::from_pem(pem)).collect::<Result<_, _>>()?;
        webhook.started().await
    }

    /// Another one with the same configuration and authority.
    pub async fn replica(&self) -> Result<Self> {
        let replica = Self::prepare(self.folder.clone(), &self.settings, &self.certificate)?;
        Self { bundle: self.bundle.clone(), roots: self.roots.clone(), ..replica }.started().await
    }

    fn prepare(folder: Arc<TempDir>, settings: &str, certificate: &str) -> Result<Self> {
        let port = free_port()?;
        let config = folder.path().join(format!("webhook-{port}.toml"));
        let (settings, certificate) = (settings.to_owned(), certificate.to_owned());
        // Until it is known whom to trust.
        let http = http_client()?;
        let webhook =
            Self { process: None, http, port, certificate, roots: vec![], bundle: String::new(), settings, config, folder };
        webhook.write(&webhook.settings)?;
        Ok(webhook)
    }

    async fn started(mut self) -> Result<Self> {
        self.http = self.client().build()?;
        self.start_again().await?;
        Ok(self)
    }

    fn client(&self) -> reqwest::ClientBuilder {
        let limit = Duration::from_secs(40);
        let roots = self.roots.iter().cloned();
        let client = reqwest::Client::builder().no_proxy().tls_certs_only(roots).connect_timeout(limit).timeout(limit);
        // As for `process::http_client`.
        client.pool_idle_timeout(Duration::from_secs(5))
    }

    /// Starts it on the port that it had.
    pub async fn start_again(&mut self) -> Result<()> {
        self.start_until("/readyz").await
    }

    /// The same, and waits only until it answers.
    pub async fn start_unready(&mut self) -> Result<()> {
        self.start_until("/livez").await
    }

    async fn start_until(&mut self, probe: &str) -> Result<()> {
        let mut command = Command::new(binary()?);
        command.arg("admission").arg("--config").arg(&self.config);
        let process =
            self.process.insert(Process::start("countersign admission", &mut command, &self.config.with_extension("log"))?);
        let (http, probe) = (&self.http, format!("https://127.0.0.1:{}{probe}", self.port));
        let ready = || async { http.get(&probe).send().await.is_ok_and(|answer| answer.status().is_success()) };
        process.wait_ready(Duration::from_secs(60), ready).await
    }

    /// kill -9.
    pub fn kill(&mut self) -> Result<()> {
        self.process.take().map_or(Ok(()), Process::kill)
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.process.as_ref().context("the webhook is not running")?.signal(signal)
    }

    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Process::id)
    }

    /// The certificate that it proves its name with on a new connection: DER.
    pub async fn served(&self) -> Result<Vec<u8>> {
        let http = self.client().tls_info(true).build()?;
        let answer = http.get(format!("https://127.0.0.1:{}/livez", self.port)).send().await?;
        let certificate = answer.extensions().get::<reqwest::tls::TlsInfo>().and_then(|info| info.peer_certificate());
        Ok(certificate.context("a connection without a certificate")?.to_vec())
    }

    fn write(&self, settings: &str) -> Result<()> {
        let Self { port, certificate, .. } = self;
        Ok(fs::write(&self.config, format!("[admission]\nlisten = \"127.0.0.1:{port}\"\ntls = {certificate}\n{settings}"))?)
    }

    /// Writes another configuration and has it read, until it is in force.
    pub async fn reload(&self, config: &str) -> Result<()> {
        let count = |metrics: &Metrics, result| metrics.count("countersign_config_reloads_total", &[("result", result)]);
        let before = count(&self.metrics().await?, "ok");
        self.write(config)?;
        self.signal(Signal::HUP)?;
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

    pub fn config(&self) -> &Path {
        &self.config
    }

    /// Everything it has logged.
    pub fn logged(&self) -> String {
        fs::read(self.config.with_extension("log"))
            .map_or_else(|_| String::new(), |log| String::from_utf8_lossy(&log).into_owned())
    }

    /// Runs another command of countersign's with the webhook's configuration.
    pub async fn run(&self, arguments: &[&str]) -> Result<Output> {
        let mut arguments = arguments.to_vec();
        arguments.extend(["--config", self.config.to_str().context("a folder whose name is no text")?]);
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
        let answer: Value = serde_json::from_slice(&self.post(path, review.to_string()).await?)?;
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

    /// What is answered to a review that is ready to be sent.
    pub async fn post(&self, path: &str, review: impl Into<Body>) -> Result<Bytes> {
        let url = format!("https://127.0.0.1:{}{path}", self.port);
        let answer = self.http.post(url).header("content-type", "application/json").body(review).send().await?;
        ensure!(answer.status().is_success(), "{}: {}", answer.status(), answer.text().await?);
        Ok(answer.bytes().await?)
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

/// The house's registry and witness as a cluster has them: with the public key, and a KMS that is never asked.
pub fn witnessed(house: &House, rest: &str) -> String {
    settings(&house.registry.host(), &house.registry.url(), &house.public_key_path(), rest)
}

/// The same of any registry and key.
pub fn settings(registry: &str, url: &str, public_key: &Path, rest: &str) -> String {
    format!(
        "{rest}\n[[registry]]\nname = \"{registry}\"\nurl = \"{url}\"\n\n\
         [[witness]]\nname = \"release\"\nkey = \"awskms:///alias/never-asked?region=eu-west-1\"\npublic_key = \"{}\"\n",
        public_key.display(),
    )
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
