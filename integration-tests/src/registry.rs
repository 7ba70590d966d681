//! A real docker-registry or ferro-oci-server, and a plain client of it that pushes and reads.

mod client;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use std::time::Duration;

use anyhow::{Context, Result};
use jiff::{Span, Timestamp};
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::issuer::Issuer;
use crate::process::{Process, eventually, free_port, http_client, scratch, tool};
pub use client::{Client, Login};

/// Who is told of pushes, and how stubbornly.
#[derive(Debug, Clone)]
pub struct Notify {
    pub url: String,
    pub token: String,
    pub timeout: Duration,
    /// So many failures in a row, then a pause of `backoff` before each further try.
    pub threshold: u32,
    pub backoff: Duration,
}

impl Notify {
    /// Where nobody listens: all events are the test's.
    pub fn nobody() -> Self {
        Self::new("http://127.0.0.1:9/nobody", "none")
    }

    /// As `countersign`'s documentation recommends it, with less patience.
    pub fn new(url: impl Into<String>, token: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            token: token.into(),
            // What it gives up may come in all the same, and then comes twice: a busy machine is to have its time.
            timeout: Duration::from_secs(30),
            threshold: 3,
            backoff: Duration::from_secs(1),
        }
    }
}

#[derive(Debug, Clone, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a switch of its own")]
pub struct Options {
    pub notify: Option<Notify>,
    /// Logs each request, for [`Registry::requests`].
    pub count_requests: bool,
    /// Asks for [`LOGIN`] with basic authentication.
    pub login: bool,
    /// Asks for tokens of this service.
    pub tokens: Option<Arc<Issuer>>,
    /// Where it says that it is, if that is not where it is reached: `http://registry.example.com`.
    pub announces: Option<&'static str>,
    /// Another registry than Debian's, that somebody has installed.
    pub external: Option<External>,
    /// ferro-oci-server instead of docker-registry: it has the referrers API, keeps everything in its memory, and neither asks
    /// for a login nor tells anybody of pushes nor logs requests.
    pub referrers_api: bool,
    /// Takes no writes; see [`Registry::set_read_only`].
    pub read_only: bool,
}

/// A registry that is in no package: tests take it from `PATH`.
#[derive(Debug, Clone)]
pub enum External {
    /// distribution of version 3, whose program is called `registry`.
    Distribution(PathBuf),
    /// zot, with the referrers API; nobody is told of pushes.
    Zot(PathBuf),
}

/// The one user of a registry that asks for a login: name and password.
pub const LOGIN: (&str, &str) = ("tester", "tester");
/// [`LOGIN`] as htpasswd writes it (bcrypt is all that this registry takes; cost 5, for it is checked on every request).
const HTPASSWD: &str = "tester:$2b$05$okYPJYFNOLIZ9kKNfo6pX.ziqBTXkHaPYA4ai51k4NIu2mu.8iRl.\n";

/// One request that the registry answered.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Request {
    pub method: String,
    /// With the query.
    pub path: String,
    pub status: u16,
    pub user_agent: String,
}

/// One request that the registry handled: by whom, and from when to when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Served {
    pub source: IpAddr,
    pub method: String,
    /// With the query.
    pub path: String,
    pub began: Timestamp,
    pub ended: Timestamp,
}

#[derive(Debug)]
pub struct Registry {
    port: u16,
    debug_port: u16,
    folder: TempDir,
    options: Options,
    process: Option<Process>,
}

impl Registry {
    /// A registry without notifications.
    pub async fn start() -> Result<Self> {
        Self::start_with(Options::default()).await
    }

    pub async fn start_with(options: Options) -> Result<Self> {
        let mut registry = Self { port: free_port()?, debug_port: free_port()?, folder: scratch()?, options, process: None };
        registry.write_config()?;
        registry.start_again().await?;
        Ok(registry)
    }

    /// As it stands in image references: its host, unless it announces another.
    pub fn name(&self) -> String {
        self.options.announces.map_or_else(|| self.host(), |url| url.trim_start_matches("http://").to_owned())
    }

    /// Where it is reached: `127.0.0.1:PORT`.
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.host())
    }

    pub fn client(&self) -> Result<Client> {
        let Options { login, tokens, .. } = &self.options;
        let login = match tokens {
            Some(issuer) => Login::Tokens(Arc::clone(issuer)),
            None if *login => Login::Basic(LOGIN.0, LOGIN.1),
            None => Login::None,
        };
        Client::new(&self.url(), login)
    }

    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Process::id)
    }

    /// kill -9. Notifications that were not delivered are lost with it, as they are in life.
    pub fn kill(&mut self) -> Result<()> {
        self.process.take().map_or(Ok(()), Process::kill)
    }

    /// Starts it after a kill: same port, same data.
    pub async fn start_again(&mut self) -> Result<()> {
        let (name, mut command) = match &self.options.external {
            Some(External::Distribution(program)) => ("distribution", self.distribution(program)),
            Some(External::Zot(program)) => ("zot", self.zot(program)?),
            None if self.options.referrers_api => ("ferro-oci-server", self.ferro()?),
            None => ("docker-registry", self.distribution(&tool("bin/docker-registry")?)),
        };
        let mut process = Process::start(name, &mut command, &self.log())?;
        let (http, probe) = (http_client()?, format!("{}/v2/", self.url()));
        process.wait_ready(Duration::from_secs(60), || async { http.get(&probe).send().await.is_ok() }).await?;
        self.process = Some(process);
        Ok(())
    }

    /// Starts it again, with writes refused or taken.
    pub async fn set_read_only(&mut self, read_only: bool) -> Result<()> {
        self.options.read_only = read_only;
        self.write_config()?;
        self.kill()?;
        self.start_again().await
    }

    fn distribution(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.arg("serve").arg(self.folder.path().join("config.yml"));
        // With its default its collector takes half of the processor.
        command.env("GOGC", "1600").env("GOMEMLIMIT", "2GiB").env("OTEL_TRACES_EXPORTER", "none");
        command
    }

    fn ferro(&self) -> Result<Command> {
        let mut command = Command::new(tool("bin/ferro-oci-server")?);
        command.env("FERRO_OCI_LISTEN", self.host()).env("RUST_LOG", "warn");
        Ok(command)
    }

    fn zot(&self, program: &Path) -> Result<Command> {
        let config = json!({
            "distSpecVersion": "1.1.1",
            "storage": {"rootDirectory": self.folder.path().join("data")},
            "http": {"address": "127.0.0.1", "port": self.port.to_string()},
            "log": {"level": "error"},
        });
        let path = self.folder.path().join("zot.json");
        fs::write(&path, config.to_string())?;
        let mut command = Command::new(program);
        command.arg("serve").arg(path);
        Ok(command)
    }

    /// Stops answering, with connections left open, until [`Registry::resume`].
    pub fn pause(&self) -> Result<()> {
        self.process.as_ref().map_or(Ok(()), |process| process.signal(Signal::STOP))
    }

    pub fn resume(&self) -> Result<()> {
        self.process.as_ref().map_or(Ok(()), |process| process.signal(Signal::CONT))
    }

    /// How many notifications it still has to deliver. They are in its memory only.
    pub async fn pending_notifications(&self) -> Result<u64> {
        let url = format!("http://127.0.0.1:{}/debug/vars", self.debug_port);
        let vars: Value = http_client()?.get(url).send().await?.json().await?;
        let pending = vars["registry"]["notifications"]["endpoints"][0]["Metrics"]["Pending"].as_u64();
        pending.with_context(|| format!("no count of pending notifications in {vars}"))
    }

    /// Waits until every notification is delivered.
    pub async fn wait_delivered(&self, limit: Duration) -> Result<()> {
        // It answers a push a moment before it counts what it has to tell of it: so it is asked more than once.
        let looks = AtomicU8::new(0);
        let nothing_pending = async || {
            if self.pending_notifications().await? > 0 {
                looks.store(0, Relaxed);
            }
            Ok((looks.fetch_add(1, Relaxed) > 2).then_some(()))
        };
        eventually("every notification is delivered", limit, nothing_pending).await
    }

    /// Every request so far, in the order of their answers; needs [`Options::count_requests`].
    pub fn requests(&self) -> Result<Vec<Request>> {
        let log = fs::read_to_string(self.log()).context("read the registry's log")?;
        Ok(log.lines().filter_map(access_log_line).collect())
    }

    /// What was handled of manifests so far, by the second log, which knows times; needs [`Options::count_requests`].
    pub fn served(&self) -> Result<Vec<Served>> {
        let log = fs::read_to_string(self.log()).context("read the registry's log")?;
        log.lines().filter(|line| line.contains("response completed") && line.contains("/manifests/")).map(served).collect()
    }

    /// How many requests of each method and kind of path (`PUT manifest`, `POST upload`), from the clients with this user agent.
    pub fn count_requests(&self, user_agent: &str) -> Result<BTreeMap<String, usize>> {
        let mut counts = BTreeMap::new();
        for request in self.requests()? {
            if request.user_agent.contains(user_agent) {
                *counts.entry(format!("{} {}", request.method, kind_of(&request.path))).or_default() += 1;
            }
        }
        Ok(counts)
    }

    /// Takes a manifest away and leaves the tags that name it: what a reader sees in the middle of a deletion.
    pub fn delete_revision(&self, repository: &str, digest: &str) -> Result<()> {
        let revision = format!("_manifests/revisions/{}", digest.replace(':', "/"));
        let path = self.folder.path().join("data/docker/registry/v2/repositories").join(repository).join(revision);
        fs::remove_dir_all(&path).with_context(|| format!("remove {}", path.display()))
    }

    fn log(&self) -> PathBuf {
        self.folder.path().join("log")
    }

    fn write_config(&self) -> Result<()> {
        let folder = self.folder.path();
        let (level, unlogged) = if self.options.count_requests { ("info", false) } else { ("error", true) };
        let mut config = format!(
            "version: 0.1\n\
             log: {{level: {level}, accesslog: {{disabled: {unlogged}}}}}\n\
             storage:\n  filesystem: {{rootdirectory: {}}}\n  delete: {{enabled: true}}\n  maintenance: {{uploadpurging: {{enabled: false}}, readonly: {{enabled: {}}}}}\n\
             http: {{addr: '{}', secret: test, host: '{}', debug: {{addr: '127.0.0.1:{}'}}}}\n",
            folder.join("data").display(),
            self.options.read_only,
            self.host(),
            self.options.announces.unwrap_or_default(),
            self.debug_port,
        );
        if let Some(issuer) = &self.options.tokens {
            let (realm, certificate) = (issuer.realm(), issuer.certificate());
            let bundle = certificate.display();
            writeln!(config, "auth: {{token: {{realm: '{realm}', service: registry, issuer: test, rootcertbundle: {bundle}}}}}")?;
        }
        if self.options.login {
            fs::write(folder.join("htpasswd"), HTPASSWD)?;
            writeln!(config, "auth: {{htpasswd: {{realm: test, path: {}}}}}", folder.join("htpasswd").display())?;
        }
        if let Some(notify) = &self.options.notify {
            let Notify { url, token, timeout, threshold, backoff } = notify;
            writeln!(
                config,
                "notifications:\n  events: {{includereferences: true}}\n  endpoints:\n    - name: countersign\n      url: {url}\n      \
                 headers: {{Authorization: [Bearer {token}]}}\n      timeout: {timeout:?}\n      threshold: {threshold}\n      \
                 backoff: {backoff:?}\n      ignore: {{mediatypes: [application/octet-stream], actions: [pull, mount, delete]}}",
            )?;
        }
        fs::write(folder.join("config.yml"), config).context("write the registry's configuration")
    }
}

/// Reads a line of the combined log format: `ADDR - - [TIME] "METHOD PATH PROTOCOL" STATUS SIZE "REFERER" "AGENT"`.
fn access_log_line(line: &str) -> Option<Request> {
    let mut quoted = line.split('"');
    let (_address, request, status, _referer, _, user_agent) =
        (quoted.next()?, quoted.next()?, quoted.next()?, quoted.next()?, quoted.next()?, quoted.next()?);
    let mut request = request.split(' ');
    Some(Request {
        method: request.next()?.to_owned(),
        path: request.next()?.to_owned(),
        status: status.split_whitespace().next()?.parse().ok()?,
        user_agent: user_agent.to_owned(),
    })
}

/// Reads `time="…" level=… msg="response completed" … http.request.method=PUT … http.response.duration=1.6ms …`.
fn served(line: &str) -> Result<Served> {
    let field = |name: &str| {
        let found = line.split_once(&format!("{name}=")).map(|(_, rest)| match rest.strip_prefix('"') {
            Some(quoted) => quoted.split('"').next().unwrap_or_default(),
            None => rest.split(' ').next().unwrap_or_default(),
        });
        found.with_context(|| format!("no {name} in the registry's log: {line}"))
    };
    let took = field("http.response.duration")?.replace('µ', "u");
    let took: Span = took.parse().with_context(|| format!("a duration: {took}"))?;
    let ended: Timestamp = field("time")?.parse()?;
    Ok(Served {
        source: field("http.request.remoteaddr")?.parse::<SocketAddr>()?.ip(),
        method: field("http.request.method")?.to_owned(),
        path: field("http.request.uri")?.to_owned(),
        began: ended.checked_sub(took)?,
        ended,
    })
}

fn kind_of(path: &str) -> &'static str {
    if path.contains("/manifests/") {
        "manifest"
    } else if path.contains("/blobs/uploads/") {
        "upload"
    } else if path.contains("/blobs/") {
        "blob"
    } else if path.contains("/referrers/") {
        "referrers"
    } else {
        "other"
    }
}
