//! The `countersign` binary: as a daemon that can be killed, asked and started again, and as a command line.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;

use crate::namespace::Namespace;
use crate::process::{Process, eventually, http_client};

/// The binary under test: `COUNTERSIGN_BIN`, or the one that was built beside this test.
pub fn binary() -> Result<PathBuf> {
    if let Some(named) = env::var_os("COUNTERSIGN_BIN") {
        let named = PathBuf::from(named);
        ensure!(named.is_file(), "COUNTERSIGN_BIN names {}, which is not there", named.display());
        return Ok(named);
    }
    // target/debug/deps/TEST or target/debug/PROGRAM
    let test = env::current_exe()?;
    let beside = test.ancestors().skip(1).take(2).map(|folder| folder.join("countersign")).find(|path| path.is_file());
    beside.with_context(|| format!("no countersign beside {}: run `cargo build --workspace` first", test.display()))
}

/// What a command printed and how it ended.
#[derive(Debug)]
pub struct Output {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Output {
    /// Standard output of a command with `--output json`.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.stdout).with_context(|| format!("not JSON: {self:?}"))
    }

    /// The output, if the command ended with this code.
    pub fn expect_code(self, code: i32) -> Result<Self> {
        ensure!(self.code == Some(code), "expected exit code {code}: {self:?}");
        Ok(self)
    }
}

/// Runs `countersign` with these arguments to its end, with these variables in its environment.
pub async fn run(arguments: &[&str], environment: &[(&str, String)]) -> Result<Output> {
    let limit = Duration::from_secs(120);
    let mut command = tokio::process::Command::new(binary()?);
    command.args(arguments).envs(environment.iter().cloned()).stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(limit, command.output()).await;
    let output = output.with_context(|| format!("countersign {arguments:?} is still running after {limit:?}"))??;
    Ok(Output {
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// `countersign serve`, running or not.
#[derive(Debug)]
pub struct Daemon {
    config: PathBuf,
    url: String,
    environment: Vec<(&'static str, String)>,
    /// What to write before the command.
    prefix: Vec<String>,
    process: Option<Process>,
}

impl Daemon {
    /// Not started yet. `config` is its file, which has it listen on `port`.
    pub fn new(config: &Path, port: u16, environment: &[(&'static str, String)]) -> Self {
        let url = format!("http://127.0.0.1:{port}");
        Self { config: config.to_owned(), url, environment: environment.to_owned(), prefix: vec![], process: None }
    }

    /// From its next start on it runs in the namespace, and listens there on this address.
    pub fn moved_to(mut self, namespace: &Namespace, listen: Ipv4Addr) -> Result<Self> {
        let (before, after) = (self.url.clone(), self.url.replace("127.0.0.1", &listen.to_string()));
        let bare = |url: &str| url.trim_start_matches("http://").to_owned();
        let config = fs::read_to_string(&self.config)?.replacen(&bare(&before), &bare(&after), 1);
        fs::write(&self.config, config)?;
        self.prefix = namespace.prefix().to_vec();
        self.url = after;
        Ok(self)
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    /// Starts it and waits until it says that it is ready.
    pub async fn start(&mut self) -> Result<()> {
        self.start_until("readyz").await
    }

    /// Starts it and waits until it lives and takes events, ready or not.
    pub async fn start_alive(&mut self) -> Result<()> {
        self.start_until("livez").await
    }

    async fn start_until(&mut self, probe: &str) -> Result<()> {
        self.start_unready()?;
        let (http, probe) = (http_client()?, format!("{}/{probe}", self.url));
        let process = self.process.as_mut().context("not started")?;
        let ready = || async { http.get(&probe).send().await.is_ok_and(|response| response.status().is_success()) };
        process.wait_ready(Duration::from_secs(60), ready).await
    }

    /// Starts it and does not wait.
    pub fn start_unready(&mut self) -> Result<()> {
        let mut words = self.prefix.iter().map(PathBuf::from).chain([binary()?]);
        let mut command = Command::new(words.next().context("there is the binary at least")?);
        command.args(words).arg("serve").arg("--config").arg(&self.config).envs(self.environment.iter().cloned());
        self.process = Some(Process::start("countersign", &mut command, &self.log())?);
        Ok(())
    }

    /// kill -9.
    pub fn kill(&mut self) -> Result<()> {
        self.process.take().map_or(Ok(()), Process::kill)
    }

    /// One SIGTERM; returns how the daemon ended.
    pub async fn terminate(&mut self, limit: Duration) -> Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        self.wait(limit).await
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.process.as_ref().context("the daemon is not running")?.signal(signal)
    }

    /// Waits for its end.
    pub async fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let status = self.process.as_mut().context("the daemon is not running")?.wait(limit).await?;
        self.process = None;
        Ok(status)
    }

    pub fn is_running(&mut self) -> Result<bool> {
        Ok(match &mut self.process {
            Some(process) => process.ended()?.is_none(),
            None => false,
        })
    }

    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Process::id)
    }

    /// Everything it has logged, over all its starts.
    pub fn logged(&self) -> String {
        fs::read(self.log()).map_or_else(|_| String::new(), |log| String::from_utf8_lossy(&log).into_owned())
    }

    /// Of the whole: what is left out of a scrape is not zero, and one that gets no answer from the queue or the ledger is tried
    /// again for some time.
    pub async fn metrics(&self) -> Result<Metrics> {
        let (http, url) = (http_client()?, format!("{}/metrics", self.url));
        eventually("the queue and the ledger are up", Duration::from_secs(15), async || {
            let response = http.get(&url).send().await?.error_for_status()?;
            let metrics = Metrics::parse(&response.text().await?)?;
            Ok((metrics.count("countersign_up", &[]) == 2).then_some(metrics))
        })
        .await
    }

    /// Where it logs.
    pub fn log(&self) -> PathBuf {
        self.config.with_extension("log")
    }
}

/// One scrape: each series as it is written, `name{label="value"}`, and its value as it is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metrics(BTreeMap<String, String>);

impl Metrics {
    /// What `GET /metrics` answered.
    pub fn parse(text: &str) -> Result<Self> {
        let samples = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
        let samples = samples.map(|line| {
            let (series, value) = line.rsplit_once(' ').with_context(|| format!("no sample: {line}"))?;
            anyhow::Ok((series.to_owned(), value.to_owned()))
        });
        Ok(Self(samples.collect::<Result<_>>()?))
    }

    /// The sum over all series of this name that have all of these labels; 0 if there are none.
    ///
    /// # Panics
    /// If a value is no whole number.
    pub fn count(&self, name: &str, labels: &[(&str, &str)]) -> u64 {
        let matches = |series: &str| {
            let (found, rest) = series.split_once('{').unwrap_or((series, ""));
            found == name && labels.iter().all(|(label, value)| rest.contains(&format!("{label}=\"{value}\"")))
        };
        let values = self.0.iter().filter(|(series, _)| matches(series));
        values.map(|(series, value)| value.parse::<u64>().unwrap_or_else(|_| panic!("{series} is {value}, no count"))).sum()
    }

    /// Push events taken in, since the ledger and the queue exist.
    pub fn received(&self) -> u64 {
        self.count("countersign_events_received_total", &[])
    }

    /// Events that ended so: `signed`, `already_signed`, `skipped`, `dead`.
    pub fn ended(&self, outcome: &str) -> u64 {
        self.count("countersign_events", &[("outcome", outcome)])
    }

    pub fn queued(&self) -> u64 {
        self.count("countersign_events_queued", &[])
    }

    /// received = signed + already signed + skipped + dead + queued
    pub fn adds_up(&self) -> bool {
        let ended: u64 = ["signed", "already_signed", "skipped", "dead"].iter().map(|outcome| self.ended(outcome)).sum();
        self.received() == ended + self.queued()
    }
}
