//! Child processes, their ports and their folders.

use std::fs::{self, File};
use std::future::Future;
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::net::TcpSocket;

static QUIET: AtomicBool = AtomicBool::new(false);

/// From here on, children that end are not told of: for a program whose output somebody reads.
pub fn be_quiet() {
    QUIET.store(true, Ordering::Relaxed);
}

/// A running child. Dropping it kills it with -9, reaps it and prints the end of its log.
#[derive(Debug)]
pub struct Process {
    name: String,
    log: PathBuf,
    child: Child,
}

impl Process {
    /// Starts `command` with both outputs appended to the file `log`.
    pub fn start(name: &str, command: &mut Command, log: &Path) -> Result<Self> {
        let out = File::options().create(true).append(true).open(log).with_context(|| format!("open {}", log.display()))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            .spawn()
            .with_context(|| format!("start {name} ({})", command.get_program().display()))?;
        Ok(Self { name: name.to_owned(), log: log.to_owned(), child })
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What the process has ended with, if it has.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).with_context(|| format!("signal {} ({pid:?})", self.name))
    }

    /// kill -9, and wait until it is gone.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Waits until the process has ended by itself; an error if it is still there after `limit`.
    pub async fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            ensure!(start.elapsed() < limit, "{} is still running after {limit:?}", self.name);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Waits until `ready` answers true; an error, with the log, if the process ends first or `limit` has passed.
    pub async fn wait_ready<F: Future<Output = bool>>(&mut self, limit: Duration, mut ready: impl FnMut() -> F) -> Result<()> {
        let start = Instant::now();
        while !ready().await {
            if let Some(status) = self.ended()? {
                bail!("{} ended with {status} before it was ready:\n{}", self.name, self.log_end());
            }
            ensure!(start.elapsed() < limit, "{} is not ready after {limit:?}:\n{}", self.name, self.log_end());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    fn log_end(&self) -> String {
        let log = fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        // docker-registry takes each 404 for an error and says so at length.
        let lines: Vec<String> = log.lines().map(|line| line.chars().take(500).collect()).collect();
        lines[lines.len().saturating_sub(100)..].join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both are harmless on a child that is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if QUIET.load(Ordering::Relaxed) {
            return;
        }
        eprintln!("--- end of {} ({}) ---\n{}", self.name, self.log.display(), self.log_end());
    }
}

/// A folder that is removed with its owner; in memory where the system has such a place.
pub fn scratch() -> Result<TempDir> {
    let memory = Path::new("/dev/shm");
    let builder = tempfile::Builder::new().prefix("countersign-test-").tempdir_in(memory);
    builder.or_else(|_| tempfile::tempdir()).context("make a scratch folder")
}

/// A port of 127.0.0.1 that nobody listens on, and that stays free while a server is down to be started again: it is below
/// the range from which the system takes the ports of outgoing connections, and no other process finds it here until this one ends.
pub fn free_port() -> Result<u16> {
    free_ports(1)
}

/// The first of so many in a row.
pub fn free_ports(many: u16) -> Result<u16> {
    const FIRST: u16 = 10_000;
    const COUNT: u16 = 20_000;
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Until somebody listens there, and while a server is down, a port is nobody's. So whoever looks for one takes the same port
    // of UDP first, which no server here wants.
    static TAKEN: Mutex<Vec<UdpSocket>> = Mutex::new(Vec::new());
    // Test processes that run beside this one begin elsewhere.
    let start = u32::from(FIRST) + std::process::id().wrapping_mul(97) % u32::from(COUNT);
    for _ in 0..COUNT {
        let step = u32::from(NEXT.fetch_add(many, Ordering::Relaxed));
        let port = u16::try_from(u32::from(FIRST) + (start + step) % u32::from(COUNT))?;
        let taken: Result<Vec<_>, _> = (port..port + many).map(|port| UdpSocket::bind(("127.0.0.1", port))).collect();
        if let Ok(taken) = taken
            && (port..port + many).all(is_free)
        {
            TAKEN.lock().unwrap_or_else(PoisonError::into_inner).extend(taken);
            return Ok(port);
        }
    }
    bail!("no port from {FIRST} on is free on 127.0.0.1")
}

/// Without listening: what another thread forks just then would go on with that for a moment.
fn is_free(port: u16) -> bool {
    let bind = |socket: TcpSocket| {
        socket.set_reuseaddr(true)?;
        socket.bind((Ipv4Addr::LOCALHOST, port).into())
    };
    TcpSocket::new_v4().and_then(bind).is_ok()
}

/// An address of this machine that refuses connections as long as the socket is there: taken, so that nobody else gets it, and
/// not listened at.
pub fn nobody() -> Result<(TcpSocket, SocketAddr)> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((Ipv4Addr::LOCALHOST, 0).into())?;
    let address = socket.local_addr()?;
    Ok((socket, address))
}

/// MiB of a line of `/proc/PID/status`: `VmRSS`, or `VmHWM` for the most it ever was.
pub fn memory(pid: u32, line: &str) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let found = status.lines().find_map(|text| text.strip_prefix(line)?.strip_prefix(':'));
    let kibibytes = found.and_then(|text| text.trim().strip_suffix(" kB")).with_context(|| format!("no {line}"))?;
    Ok(kibibytes.trim().parse::<f64>()? / 1024.0)
}

/// Where `make tools` put a program.
pub fn tool(name: &str) -> Result<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name(".tools").join(name);
    ensure!(path.exists(), "{} is missing: run `make tools`", path.display());
    Ok(path)
}

/// The program with this name in `PATH`, if there is one.
pub fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|program| program.is_file())
}

/// Says something that is seen also where tests pass, whose output `cargo test` does not show.
pub fn say_aloud(what: &str) {
    // Not by a macro: what those print is what is held back.
    let _ = writeln!(std::io::stderr(), "{what}");
}

/// Asks `question` until it answers; an error saying `what` if it has not after `limit`.
pub async fn eventually<T, F>(what: &str, limit: Duration, mut question: impl FnMut() -> F) -> Result<T>
where
    F: Future<Output = Result<Option<T>>>,
{
    let start = Instant::now();
    loop {
        if let Some(answer) = question().await.with_context(|| what.to_owned())? {
            return Ok(answer);
        }
        ensure!(start.elapsed() < limit, "{what}: not after {limit:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A client with time limits that goes to 127.0.0.1 directly, whatever the environment says of proxies.
pub fn http_client() -> Result<reqwest::Client> {
    let limit = Duration::from_secs(60);
    let client = reqwest::Client::builder().no_proxy().connect_timeout(limit).timeout(limit);
    // countersign closes what is idle for ten seconds, at worst while the next request is on its way.
    Ok(client.pool_idle_timeout(Duration::from_secs(5)).build()?)
}
