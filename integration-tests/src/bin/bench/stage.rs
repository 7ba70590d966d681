//! One daemon on a folder of its own, what is pushed for it, and the events that tell it so.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use hyper::{Method, StatusCode};
use integration_tests::daemon::{self, Daemon, Metrics};
use integration_tests::house::{House, Keys, TOKEN};
use integration_tests::image::{Image, Manifest, OCI_MANIFEST};
use integration_tests::process::{free_port, scratch};
use integration_tests::registry::Client;
use integration_tests::signature::{PublicKey, signed_references};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::meter;
use crate::report::{float, target};
use crate::wire::{Until, Wire, Work, at_once};

/// What the daemon is to be. Everything else is as its defaults have it, the log included.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The registry, by plain HTTP: an address and a port.
    pub registry: String,
    pub keys: Keys,
    /// A key elsewhere, instead of a file.
    pub key_uri: Option<String>,
    pub in_flight: usize,
    pub rules: String,
    /// Further lines of `[queue]`, and the `[ledger]`.
    pub queue: String,
    /// Keeps its state in memory, or on a disk.
    pub on_disk: bool,
    pub environment: Vec<(&'static str, String)>,
}

impl Plan {
    /// A P-256 key, and `rules`.
    pub fn new(registry: impl Into<String>, in_flight: usize, rules: impl Into<String>) -> Self {
        let (registry, rules) = (registry.into(), rules.into());
        let (keys, queue, environment) = (Keys::P256, String::new(), Vec::new());
        Self { registry, keys, key_uri: None, in_flight, rules, queue, on_disk: false, environment }
    }
}

const KEY: &str = "release.key.pem";

pub struct Stage {
    // Dropped in this order: the daemon first.
    daemon: Daemon,
    host: String,
    plan: Plan,
    folder: TempDir,
    _state: Option<TempDir>,
}

impl Stage {
    /// A running daemon that takes events.
    pub async fn start(plan: Plan) -> Result<Self> {
        let (port, folder) = (free_port()?, scratch()?);
        let on_disk = || tempfile::Builder::new().prefix("bench-").tempdir_in(target()?).context("make a folder on the disk");
        let state = plan.on_disk.then(on_disk).transpose()?;
        let state_path = state.as_ref().map_or_else(|| folder.path().join("state"), |state| state.path().join("state"));
        let key_path = folder.path().join(KEY);
        let key_uri = if let Some(uri) = &plan.key_uri {
            uri.clone()
        } else {
            let out = key_path.to_str().context("a folder whose name is no text")?;
            daemon::run(&["key", "generate", "--spec", plan.keys.spec(), "--out", out], &[]).await?.expect_code(0)?;
            format!("file://{out}")
        };
        File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(folder.path().join("token"))?
            .write_all(TOKEN.as_bytes())?;
        let Plan { registry, in_flight, rules, queue, .. } = &plan;
        let config = format!(
            "[server]\nlisten = \"127.0.0.1:{port}\"\n\n\
             [queue]\npath = \"{}\"\nin_flight = {in_flight}\n{queue}\n\
             [[registry]]\nname = \"{registry}\"\nurl = \"http://{registry}\"\n\n\
             [[source]]\nname = \"main\"\nkind = \"distribution\"\nregistry = \"{registry}\"\ntoken = {{ file = \"token\" }}\n\n\
             [[witness]]\nname = \"release\"\nkey = \"{key_uri}\"\n\n{rules}",
            state_path.display(),
        );
        let config_path = folder.path().join("countersign.toml");
        fs::write(&config_path, config)?;
        let mut daemon = Daemon::new(&config_path, port, &plan.environment);
        // Alive rather than ready: some stages have a registry that never answers.
        daemon.start_alive().await?;
        Ok(Self { daemon, host: format!("127.0.0.1:{port}"), plan, folder, _state: state })
    }

    /// Where it takes events: an address and a port.
    pub fn host(&self) -> &str {
        &self.host
    }

    pub fn pid(&self) -> Result<u32> {
        self.daemon.pid().context("the daemon is not running")
    }

    /// Its configuration, and what it needs in the environment.
    pub fn config(&self) -> PathBuf {
        self.folder.path().join("countersign.toml")
    }

    pub fn environment(&self) -> Vec<(&'static str, String)> {
        self.plan.environment.clone()
    }

    pub fn log(&self) -> PathBuf {
        self.daemon.log()
    }

    /// Seconds of processor time so far.
    pub fn cpu(&self) -> Result<f64> {
        meter::cpu(self.pid()?)
    }

    pub async fn metrics(&self, wire: &mut Wire) -> Result<Metrics> {
        let answer = wire.get("/metrics").await?.expect(StatusCode::OK, "read /metrics")?;
        Metrics::parse(std::str::from_utf8(&answer.body)?)
    }

    /// Sends the events, `posters` at a time, waits until all have ended, and says how long that took from the first one's
    /// sending. Each has to end as `outcome`.
    pub async fn work_off(&self, events: Vec<Bytes>, posters: usize, outcome: &str) -> Result<Duration> {
        self.work_off_with(&[], events, posters, outcome).await
    }

    /// The same, with replicas beside it that share its queue and its ledger: each is sent its part of the events.
    pub async fn work_off_with(&self, others: &[Self], events: Vec<Bytes>, posters: usize, outcome: &str) -> Result<Duration> {
        let mut wire = Wire::open(&self.host).await?;
        let before = self.metrics(&mut wire).await?.ended(outcome);
        let count = events.len();
        let begun = Instant::now();
        let all: Vec<&Self> = std::iter::once(self).chain(others).collect();
        let posting = all.iter().enumerate().map(|(place, stage)| {
            let share: Vec<Bytes> = events.iter().skip(place).step_by(all.len()).cloned().collect();
            let posters = posters / all.len();
            async move { at_once(&stage.host, posters, Until::Count(share.len()), &Arc::new(Events(share))).await }
        });
        futures::future::try_join_all(posting).await?;
        let wanted = before + u64::try_from(count)?;
        loop {
            let metrics = self.metrics(&mut wire).await?;
            let ended = metrics.ended(outcome);
            if ended >= wanted {
                return Ok(begun.elapsed());
            }
            let (failed, retried) = (metrics.ended("dead"), begun.elapsed() > Duration::from_secs(120));
            ensure!(
                failed == 0 && !retried,
                "{ended} of {wanted} events are {outcome}, {failed} dead; see the log:\n{}",
                self.log_end()
            );
            // A scrape costs both sides something: ask seldom while there is much left, and often towards the end.
            let left = float(wanted - ended) / float(ended - before).max(1.0) * begun.elapsed().as_secs_f64();
            tokio::time::sleep(Duration::from_secs_f64((left * 0.4).clamp(0.005, 0.5))).await;
        }
    }

    /// An error unless what is stored for these is exactly one signature by this daemon's key, over the tag.
    pub async fn check(&self, client: &Client, pushed: &Pushed, numbers: &[usize]) -> Result<()> {
        let key = PublicKey::from_pem(&self.public_key_pem().await?)?;
        for &number in numbers {
            let (repository, digest) = (&pushed.repository, &pushed.manifests[number].digest);
            let found = signed_references(client, repository, digest, &key).await?;
            let wanted = format!("{}/{repository}:{}", self.plan.registry, tag(number));
            ensure!(found == [wanted.as_str()], "{repository}@{digest} is signed as {found:?}, not {wanted}");
        }
        Ok(())
    }

    /// The witness's public key.
    pub async fn public_key_pem(&self) -> Result<String> {
        self.of_witness("public-key").await
    }

    /// The certificate that its notation signatures name.
    pub async fn certificate_pem(&self) -> Result<String> {
        self.of_witness("certificate").await
    }

    /// The private key, where [`Plan::key_uri`] names no other.
    pub fn key(&self) -> PathBuf {
        self.folder.path().join(KEY)
    }

    async fn of_witness(&self, what: &str) -> Result<String> {
        let config = self.config();
        let arguments = ["witness", what, "release", "--config", config.to_str().context("no text")?];
        Ok(daemon::run(&arguments, &self.plan.environment).await?.expect_code(0)?.stdout)
    }

    /// The last lines of its log.
    pub fn log_end(&self) -> String {
        let logged = self.daemon.logged();
        let lines: Vec<&str> = logged.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

/// All images share their layer and their config.
const SEED: &str = "bench";

/// Images of one repository, that differ in an annotation. The `number`th has the tag [`tag`].
pub struct Pushed {
    pub repository: String,
    pub manifests: Vec<Manifest>,
}

impl Pushed {
    pub async fn push(client: &Client, repository: &str, count: usize) -> Result<Self> {
        let document: Value = serde_json::from_slice(&Image::oci(SEED)?.manifest.bytes)?;
        let manifest = |number| {
            let mut document = document.clone();
            document["annotations"] = json!({"image": format!("{number} of {repository}")});
            Manifest::new(OCI_MANIFEST, document.to_string())
        };
        let pushed = Self { repository: repository.to_owned(), manifests: (0..count).map(manifest).collect() };
        pushed.copy(client, repository).await?;
        Ok(pushed)
    }

    /// Pushes them, with their tags, to this repository.
    pub async fn copy(&self, client: &Client, repository: &str) -> Result<()> {
        for blob in &Image::oci(SEED)?.blobs {
            client.push_blob(repository, blob).await?;
        }
        let puts = self
            .manifests
            .iter()
            .enumerate()
            .map(|(number, manifest)| async move { client.put_manifest(repository, &tag(number), manifest).await });
        stream::iter(puts).buffer_unordered(8).try_collect::<Vec<()>>().await.map(drop)
    }

    /// What the registry would tell of these pushes.
    pub fn events(&self, registry: &str) -> Vec<Bytes> {
        let event = |(number, manifest): (usize, &Manifest)| {
            House::event(registry, &self.repository, Some(&tag(number)), &manifest.digest).to_string().into()
        };
        self.manifests.iter().enumerate().map(event).collect()
    }

    /// Gives each of them further tags, so that it has as many. Returns what the registry would tell of all these pushes.
    pub async fn with_tags(&self, client: &Client, registry: &str, tags: usize) -> Result<Vec<Bytes>> {
        let mut events = self.events(registry).into_iter();
        let mut all = vec![];
        for (number, manifest) in self.manifests.iter().enumerate() {
            all.extend(events.next());
            let further: Vec<String> = (1..tags).map(|further| format!("{}.{further}", tag(number))).collect();
            let puts = further.iter().map(|tag| client.put_manifest(&self.repository, tag, manifest));
            futures::future::try_join_all(puts).await?;
            let event = |tag: &String| House::event(registry, &self.repository, Some(tag), &manifest.digest).to_string().into();
            all.extend(further.iter().map(event));
        }
        Ok(all)
    }
}

pub fn tag(number: usize) -> String {
    format!("t{number}")
}

/// Posts the events, one after the other.
pub struct Events(pub Vec<Bytes>);

impl Work for Events {
    async fn one(&self, number: usize, wire: &mut Wire) -> Result<()> {
        post(wire, self.0[number].clone()).await
    }
}

/// Sends one notification, which has to be taken.
pub async fn post(wire: &mut Wire, body: Bytes) -> Result<()> {
    let authorization = format!("Bearer {TOKEN}");
    let headers = [
        ("authorization", authorization.as_str()),
        ("content-type", "application/vnd.docker.distribution.events.v1+json"),
        ("user-agent", "Go-http-client/1.1"),
    ];
    wire.ask(Method::POST, "/events/main", &headers, body).await?.expect(StatusCode::ACCEPTED, "send an event")?;
    Ok(())
}

/// As many different events as are asked for, made of one: each has a digest of its own.
pub struct Flood {
    parts: Vec<String>,
}

impl Flood {
    const MARK: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    pub fn new(registry: &str, repository: &str) -> Self {
        let mut event = House::event(registry, repository, Some("1.0"), &format!("sha256:{}", Self::MARK));
        event["events"][0]["id"] = json!(format!("made-{}", Self::MARK));
        Self { parts: event.to_string().split(Self::MARK).map(str::to_owned).collect() }
    }

    pub fn event(&self, number: usize) -> Bytes {
        self.parts.join(&format!("{number:064x}")).into()
    }
}

impl Work for Flood {
    async fn one(&self, number: usize, wire: &mut Wire) -> Result<()> {
        post(wire, self.event(number)).await
    }
}
