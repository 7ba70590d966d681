//! A whole small installation: a registry that tells of pushes, a key, a configuration, and countersign.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::daemon::{self, Daemon, Output};
use crate::image::{Image, OCI_MANIFEST};
use crate::process::{eventually, free_port, scratch};
use crate::registry::{Client, LOGIN, Notify, Options, Registry};
use crate::signature::{PublicKey, signed_references};

/// The webhook's secret, and the registry's login where it has one: neither may ever be printed.
pub const TOKEN: &str = "the-secret-of-the-webhook";

/// The witness's algorithm and the `--spec` that `countersign key generate` takes for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keys {
    P256,
    Rsa2048,
    Rsa3072,
    Rsa4096,
}

impl Keys {
    /// What `countersign key generate --spec` takes.
    pub fn spec(self) -> &'static str {
        match self {
            Self::P256 => "EC_P256",
            Self::Rsa2048 => "RSA_2048",
            Self::Rsa3072 => "RSA_3072",
            Self::Rsa4096 => "RSA_4096",
        }
    }

    pub fn algorithm(self) -> &'static str {
        match self {
            Self::P256 => "ECDSA_SHA_256",
            Self::Rsa2048 | Self::Rsa3072 | Self::Rsa4096 => "RSA_PKCS1_SHA_256",
        }
    }
}

/// What is built; [`Plan::default`] signs `team` and all below it with a P-256 key of its own.
#[derive(Debug, Clone)]
pub struct Plan {
    pub keys: Keys,
    /// A key elsewhere (`awskms://…`), instead of one that is generated.
    pub key_uri: Option<String>,
    /// The `[[rule]]` tables, or what there is to be of them; `None` for the one of the default.
    pub rules: Option<String>,
    /// Further lines of `[queue]`.
    pub queue: String,
    pub registry: Options,
    /// What `[ledger] url` is, as it stands in the file: a text in quotes, or where the secret is.
    pub ledger: Option<String>,
    pub environment: Vec<(&'static str, String)>,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            keys: Keys::P256,
            key_uri: None,
            rules: None,
            queue: String::new(),
            registry: Options::default(),
            ledger: None,
            environment: Vec::new(),
        }
    }
}

/// The rule of [`Plan::default`]: it writes under the `.sig` tag only.
pub fn rule(name: &str, scope: &str, keys: Keys) -> String {
    rule_of_all_formats(name, scope, keys) + "formats = [\"cosign\"]\n"
}

/// The same, writing what a rule writes that says nothing of formats.
pub fn rule_of_all_formats(name: &str, scope: &str, keys: Keys) -> String {
    let algorithm = keys.algorithm();
    format!("[[rule]]\nname = \"{name}\"\nscope = \"{scope}\"\nwitness = \"release\"\nalgorithm = \"{algorithm}\"\n")
}

#[derive(Debug)]
pub struct House {
    // Dropped in this order: the daemon first, its folder last.
    pub daemon: Daemon,
    pub registry: Registry,
    pub client: Client,
    public_key: PublicKey,
    folder: TempDir,
    port: u16,
    plan: Plan,
    registry_url: String,
}

impl House {
    /// Everything running, and countersign ready.
    pub async fn start(plan: Plan) -> Result<Self> {
        let mut house = Self::build(plan).await?;
        house.daemon.start().await?;
        Ok(house)
    }

    /// With a registry that tells nobody: all events are the test's.
    pub async fn start_quiet(rules: Option<String>) -> Result<Self> {
        let registry = Options { notify: Some(Notify::nobody()), ..Options::default() };
        Self::start(Plan { rules, registry, ..Plan::default() }).await
    }

    /// The registry running, and countersign not yet.
    pub async fn build(plan: Plan) -> Result<Self> {
        let port = free_port()?;
        let folder = scratch()?;
        let mut options = plan.registry.clone();
        let hook = format!("http://127.0.0.1:{port}/events/main");
        options.notify.get_or_insert_with(|| Notify::new(hook, TOKEN));
        let registry = Registry::start_with(options).await?;
        let daemon = Daemon::new(&folder.path().join("countersign.toml"), port, &plan.environment);
        let token = folder.path().join("token");
        File::options().write(true).create_new(true).mode(0o600).open(token)?.write_all(TOKEN.as_bytes())?;
        let client = registry.client()?;

        if plan.key_uri.is_none() {
            let key = folder.path().join("release.key.pem");
            let out = key.to_str().context("a folder whose name is no text")?;
            daemon::run(&["key", "generate", "--spec", plan.keys.spec(), "--out", out], &[]).await?.expect_code(0)?;
        }
        let registry_url = registry.url();
        let mut house = Self { daemon, registry, client, public_key: PublicKey::none(), folder, port, plan, registry_url };
        house.write_config(&house.config())?;
        let pem = house.run(&["witness", "public-key", "release"]).await?.expect_code(0)?.stdout;
        fs::write(house.public_key_path(), &pem)?;
        house.public_key = PublicKey::from_pem(&pem)?;
        Ok(house)
    }

    /// The configuration as the plan has it, for a test to write another.
    pub fn config(&self) -> String {
        let Plan { keys, key_uri, rules, queue, registry: options, ledger, .. } = &self.plan;
        let (port, folder, host, url) = (self.port, self.folder.path().display(), self.registry.name(), &self.registry_url);
        let key = key_uri.clone().unwrap_or_else(|| format!("file://{folder}/release.key.pem"));
        let mut config = format!(
            "[server]\nlisten = \"127.0.0.1:{port}\"\n\n\
             [queue]\npath = \"{folder}/state\"\nretry = {{ first = \"100ms\", longest = \"2s\", give_up = \"1h\" }}\n{queue}\n\
             [[registry]]\nname = \"{host}\"\nurl = \"{url}\"\n",
        );
        if options.login || options.tokens.is_some() {
            // A literal secret is taken, with a warning.
            writeln!(config, "username = \"{}\"\npassword = \"{}\"", LOGIN.0, LOGIN.1).expect("a String takes everything");
        }
        if let Some(url) = ledger {
            writeln!(config, "\n[ledger]\nurl = {url}").expect("a String takes everything");
        }
        let rules = rules.clone().unwrap_or_else(|| rule("team", "team", *keys));
        write!(
            config,
            "\n[[source]]\nname = \"main\"\nkind = \"distribution\"\nregistry = \"{host}\"\ntoken = {{ file = \"token\" }}\n\n\
             [[witness]]\nname = \"release\"\nkey = \"{key}\"\n\n{rules}",
        )
        .expect("a String takes everything");
        config
    }

    /// A registry with other options instead of the one there is; before countersign is started.
    pub async fn replace_registry(&mut self, options: Options) -> Result<()> {
        self.registry = Registry::start_with(options).await?;
        self.client = self.registry.client()?;
        self.route_registry(&self.registry.url())
    }

    /// From its next start on, countersign reaches the registry by this URL: that of a proxy.
    pub fn route_registry(&mut self, url: &str) -> Result<()> {
        url.clone_into(&mut self.registry_url);
        self.write_config(&self.config())
    }

    /// Another replica of the daemon, not started yet: with a port and a state folder of its own, and all else as in `config`,
    /// which [`House::config`] gave.
    pub fn replica(&self, name: &str, config: &str, environment: &[(&'static str, String)]) -> Result<Daemon> {
        let (port, path) = (free_port()?, self.folder.path().join(name).with_extension("toml"));
        let config = config.replacen(&format!("127.0.0.1:{}", self.port), &format!("127.0.0.1:{port}"), 1);
        fs::write(&path, config.replacen("/state\"", &format!("/{name}\""), 1))?;
        Ok(Daemon::new(&path, port, environment))
    }

    /// Takes effect at the next start or reload.
    pub fn write_config(&self, config: &str) -> Result<()> {
        fs::write(self.config_path(), config).context("write the configuration")
    }

    pub fn config_path(&self) -> PathBuf {
        self.folder.path().join("countersign.toml")
    }

    /// The witness's public key, for the judges.
    pub fn public_key_path(&self) -> PathBuf {
        self.folder.path().join("release.pub.pem")
    }

    pub fn public_key(&self) -> &PublicKey {
        &self.public_key
    }

    /// `host/repository:tag` or `host/repository@digest`
    pub fn reference(&self, repository: &str, reference: &str) -> String {
        let separator = if reference.contains(':') { '@' } else { ':' };
        format!("{}/{repository}{separator}{reference}", self.registry.name())
    }

    /// Runs a command of countersign's with this house's configuration.
    pub async fn run(&self, arguments: &[&str]) -> Result<Output> {
        let config = self.config_path();
        let mut arguments = arguments.to_vec();
        arguments.extend(["--config", config.to_str().context("a folder whose name is no text")?]);
        daemon::run(&arguments, &self.plan.environment).await
    }

    pub async fn push(&self, image: &Image, repository: &str, tags: &[&str]) -> Result<()> {
        self.client.push(image, repository, tags).await
    }

    /// The references that the witness signed for this digest, sorted, with a double where there is one.
    pub async fn signed(&self, repository: &str, digest: &str) -> Result<Vec<String>> {
        signed_references(&self.client, repository, digest, &self.public_key).await
    }

    /// Waits until the witness has signed the digest under exactly these tags.
    pub async fn wait_signed(&self, repository: &str, digest: &str, tags: &[&str]) -> Result<()> {
        let mut expected: Vec<_> = tags.iter().map(|tag| self.reference(repository, tag)).collect();
        expected.sort();
        let last = Mutex::new(Vec::new());
        let waited = eventually("it is signed", Duration::from_secs(90), async || {
            let signed = self.signed(repository, digest).await?;
            let is_so = signed == expected;
            *last.lock().unwrap_or_else(PoisonError::into_inner) = signed;
            Ok(is_so.then_some(()))
        });
        waited.await.with_context(|| format!("{repository}@{digest} is signed as {last:?}, and not as {expected:?}"))
    }

    /// Waits until so many events were received, none is queued any more, and the sums add up.
    pub async fn wait_settled(&self, received: u64, limit: Duration) -> Result<daemon::Metrics> {
        let what = format!("{received} events are received and settled");
        let last = Mutex::new(None);
        let metrics = eventually(&what, limit, async || {
            // Whoever has lost its broker or its database is connected again soon, and then it tells. The queue is read before the
            // ledger: what comes in between is in one of them.
            let metrics = self.daemon.metrics().await;
            let is_settled =
                |metrics: &&daemon::Metrics| metrics.received() >= received && metrics.queued() == 0 && metrics.adds_up();
            let settled = metrics.as_ref().ok().filter(is_settled).cloned();
            *last.lock().unwrap_or_else(PoisonError::into_inner) = Some(metrics);
            Ok(settled)
        });
        metrics.await.with_context(|| format!("at last: {last:?}"))
    }

    /// A notification of docker-registry's, saying that it came to `host`.
    pub fn event(host: &str, repository: &str, tag: Option<&str>, digest: &str) -> Value {
        let mut target = json!({
            "mediaType": OCI_MANIFEST,
            "digest": digest,
            "size": 400,
            "length": 400,
            "repository": repository,
            "url": format!("http://{host}/v2/{repository}/manifests/{digest}"),
        });
        if let Some(tag) = tag {
            target["tag"] = json!(tag);
        }
        json!({"events": [{
            "id": format!("made-{}", fastrand::u64(..)),
            "timestamp": "2026-06-01T12:00:00.000000000Z",
            "action": "push",
            "target": target,
            "request": {"id": "1", "addr": "192.0.2.1:1234", "host": host, "method": "PUT", "useragent": "docker/28"},
            "actor": {},
            "source": {"addr": host, "instanceID": "1"},
        }]})
    }

    /// Sends a notification to countersign as the registry would, with this token.
    pub async fn notify(&self, token: Option<&str>, body: &Value) -> Result<reqwest::StatusCode> {
        let mut request = crate::process::http_client()?.post(format!("{}/events/main", self.daemon.url()));
        if let Some(token) = token {
            request = request.bearer_auth(token);
        }
        request = request.header("content-type", "application/vnd.docker.distribution.events.v1+json");
        Ok(request.body(body.to_string()).send().await?.status())
    }
}
