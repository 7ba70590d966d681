//! A real PostgreSQL server, on 127.0.0.1 and in a folder of its own, and what its administrator does.

use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::{Signal, geteuid};
use tempfile::TempDir;

use crate::process::{Process, free_port, scratch, tool};

/// The user that owns the databases, and its password, which may never be printed.
pub const USER: &str = "countersign";
pub const PASSWORD: &str = "the-secret-of-the-database";

const READY: Duration = Duration::from_secs(60);

/// Dropping it ends it.
#[derive(Debug)]
pub struct Postgres {
    process: Option<Process>,
    folder: TempDir,
    port: u16,
    settings: Vec<String>,
}

impl Postgres {
    /// A server with the user [`USER`], who needs the password over TCP.
    pub fn start() -> Result<Self> {
        Self::start_with(&[])
    }

    /// With these settings besides: `ssl=on`.
    pub fn start_with(settings: &[&str]) -> Result<Self> {
        let folder = scratch()?;
        if let Some((user, group)) = other_user()? {
            chown(folder.path(), Some(user), Some(group))?;
        }
        let mut initdb = program("initdb")?;
        initdb.args(["--username=postgres", "--auth-local=trust", "--auth-host=scram-sha-256", "--encoding=UTF8", "--locale=C"]);
        initdb.arg("--no-sync").arg("--pgdata").arg(folder.path().join("data"));
        let output = initdb.output().context("run initdb")?;
        ensure!(output.status.success(), "initdb: {}", String::from_utf8_lossy(&output.stderr));
        let settings = settings.iter().map(|&setting| setting.to_owned()).collect();
        let mut server = Self { process: None, folder, port: free_port()?, settings };
        server.start_again()?;
        server.sql("postgres", &format!("CREATE ROLE {USER} LOGIN PASSWORD '{PASSWORD}'"))?;
        Ok(server)
    }

    /// One that the tests of this process share, and that ends with the process, however that ends.
    ///
    /// # Panics
    /// If it does not start.
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<(Postgres, Child)> = OnceLock::new();
        let (server, _) = SHARED.get_or_init(|| {
            let server = Self::start().expect("PostgreSQL starts");
            let mourner = server.mourn().expect("bash starts");
            (server, mourner)
        });
        server
    }

    /// Waits for the end of this process, then stops the server and removes its folder.
    fn mourn(&self) -> Result<Child> {
        // Its input ends when we do.
        let script = "cat; kill -QUIT $0; for i in {1..200}; do [ -e \"$1/data/postmaster.pid\" ] || break; sleep 0.05; done; \
                      rm -rf \"$1\"";
        let pid = self.process.as_ref().context("the server is not running")?.id().to_string();
        let mut bash = Command::new("bash");
        bash.args(["-c", script, &pid]).arg(self.folder.path());
        bash.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(bash.spawn()?)
    }

    /// A new database that [`USER`] owns; returns its name.
    pub fn database(&self) -> Result<String> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("ledger{}_{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        self.sql("postgres", &format!("CREATE DATABASE {name} OWNER {USER}"))?;
        Ok(name)
    }

    /// As it stands in a configuration.
    pub fn url(&self, database: &str) -> String {
        format!("postgres://{USER}:{PASSWORD}@127.0.0.1:{}/{database}?sslmode=disable", self.port)
    }

    /// `127.0.0.1:PORT`
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// The folder of its data, and of its socket.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Gives a file in its folder to the server, for it alone to read.
    pub fn hand_over(&self, name: &str, contents: &[u8]) -> Result<()> {
        let path = self.folder.path().join(name);
        fs::write(&path, contents)?;
        fs::set_permissions(&path, Permissions::from_mode(0o600))?;
        if let Some((user, group)) = other_user()? {
            chown(&path, Some(user), Some(group))?;
        }
        Ok(())
    }

    /// What the superuser is answered: rows as lines, columns divided by `|`.
    pub fn sql(&self, database: &str, sql: &str) -> Result<String> {
        let output = self.psql(database).args(["--command", sql]).output().context("run psql")?;
        ensure!(output.status.success(), "{sql}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?.trim_end().to_owned())
    }

    /// A session of the superuser's, which runs what it is sent until its input ends.
    pub fn session(&self, database: &str) -> Result<Child> {
        Ok(self.psql(database).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?)
    }

    fn psql(&self, database: &str) -> Command {
        let mut psql = Command::new(tool("postgresql/bin/psql").unwrap_or_default());
        psql.args(["--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "--set=ON_ERROR_STOP=1", "--username=postgres"]);
        psql.arg("--host").arg(self.folder.path()).args(["--port", &self.port.to_string(), "--dbname", database]);
        psql
    }

    /// Of the server's first process.
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Process::id)
    }

    /// kill -9 of the server; its other processes notice.
    pub fn kill(&mut self) -> Result<()> {
        self.process.take().map_or(Ok(()), Process::kill)?;
        // They hold on to the memory that the next server wants.
        let pid = self.folder.path().join("data/postmaster.pid");
        let start = Instant::now();
        let memory = fs::read_to_string(&pid).unwrap_or_default();
        let attached = || {
            let key = memory.lines().nth(6).and_then(|line| line.split_whitespace().nth(1)).unwrap_or_default();
            let segments = fs::read_to_string("/proc/sysvipc/shm").unwrap_or_default();
            segments.lines().any(|line| {
                let columns: Vec<_> = line.split_whitespace().collect();
                columns.get(1) == Some(&key) && columns.get(6).is_some_and(|attached| *attached != "0")
            })
        };
        while attached() {
            ensure!(start.elapsed() < READY, "processes of the killed server are still there");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Stops it as its administrator does: sessions are ended, and told so.
    pub fn stop(&mut self) -> Result<()> {
        let Some(mut process) = self.process.take() else { return Ok(()) };
        process.signal(Signal::INT)?;
        let start = Instant::now();
        while process.ended()?.is_none() {
            ensure!(start.elapsed() < READY, "the server does not stop");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Starts it after [`Self::kill`] or [`Self::stop`]: same port, same data.
    pub fn start_again(&mut self) -> Result<()> {
        let folder = self.folder.path();
        let mut command = program("postgres")?;
        command.arg("-D").arg(folder.join("data")).arg("-k").arg(folder).args(["-p", &self.port.to_string()]);
        command.args(["-h", "127.0.0.1", "-c", "fsync=on", "-c", "shared_buffers=16MB", "-c", "max_wal_size=64MB"]);
        // In its folder, which goes with it: what a killed server has elsewhere stays for ever.
        command.args(["-c", "dynamic_shared_memory_type=mmap"]);
        for setting in &self.settings {
            command.args(["-c", setting]);
        }
        let mut process = Process::start("postgres", &mut command, &folder.join("log"))?;
        let start = Instant::now();
        while self.sql("postgres", "SELECT 1").is_err() {
            ensure!(process.ended()?.is_none(), "postgres ended before it was ready");
            ensure!(start.elapsed() < READY, "postgres is not ready after {READY:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
        self.process = Some(process);
        Ok(())
    }

    /// `STOP`: stops answering, with connections left open, until `CONT`.
    pub fn signal_all(&self, signal: &str) -> Result<()> {
        let pid = self.process.as_ref().context("the server is not running")?.id().to_string();
        let status = Command::new("bash").args(["-c", "kill -$0 $1 $(pgrep -P $1)", signal, &pid]).status()?;
        ensure!(status.success(), "kill -{signal} {pid}");
        Ok(())
    }
}

impl Drop for Postgres {
    /// Killed at once, it would leave memory behind that belongs to nobody.
    fn drop(&mut self) {
        let Some(mut process) = self.process.take() else { return };
        // One that does not end is killed when `process` is dropped; one that was stopped by a signal cannot end.
        let _ = (process.signal(Signal::QUIT), process.signal(Signal::CONT));
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(10) && matches!(process.ended(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// The user and group to run the server as. It refuses to be root.
fn other_user() -> Result<Option<(u32, u32)>> {
    if !geteuid().is_root() {
        return Ok(None);
    }
    let users = fs::read_to_string("/etc/passwd").context("read /etc/passwd")?;
    let ids = |name: &str| {
        let columns: Vec<_> = users.lines().map(|line| line.split(':')).find(|line| line.clone().next() == Some(name))?.collect();
        Some((columns.get(2)?.parse().ok()?, columns.get(3)?.parse().ok()?))
    };
    ids("postgres").or_else(|| ids("nobody")).map(Some).context("there is neither a user postgres nor nobody")
}

/// A program of PostgreSQL's, run as the server's user.
fn program(name: &str) -> Result<Command> {
    let path = tool(&format!("postgresql/bin/{name}"))?;
    let Some((user, group)) = other_user()? else { return Ok(Command::new(path)) };
    let mut command = Command::new("setpriv");
    let (user, group) = (format!("--reuid={user}"), format!("--regid={group}"));
    command.args([&user, &group].map(OsStr::new)).arg("--clear-groups").arg(path).current_dir("/");
    Ok(command)
}
