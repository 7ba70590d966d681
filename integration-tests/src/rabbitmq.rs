//! Debian's RabbitMQ, on 127.0.0.1, in a folder of its own, beside others of its kind. With `RABBITMQ=4` in the environment it
//! is the one of `make tools` in version 4.
//!
//! The packaged wrapper listens on all addresses and shares a daemon (epmd) with every other Erlang program; so the inner
//! script is run, with both moved to 127.0.0.1 and ports of this broker's.

use std::{
    env, fs,
    net::TcpStream,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::process::{Process, eventually, free_ports, say_aloud, scratch, tool};

const READY: Duration = Duration::from_secs(120);
/// After which a broker that was told to stop is killed, as an init system does: told so just after its streams were declared,
/// RabbitMQ 3.10 may wait for itself for ever.
const STOPPED: Duration = Duration::from_secs(30);

/// A running broker. Dropped, it is killed, and its folder removed.
#[derive(Debug)]
pub struct RabbitMq {
    port: u16,
    folder: TempDir,
    /// None while it is stopped.
    server: Option<Server>,
    http: reqwest::Client,
    /// Lines for its configuration.
    extra: String,
    version: Version,
}

/// Which one it is.
#[derive(Debug)]
struct Version {
    /// Its programs.
    bin: PathBuf,
    /// Where its Erlang is, before everything else that has one.
    path: String,
}

impl Version {
    fn wanted() -> Result<Self> {
        let path = env::var("PATH").unwrap_or_default();
        let version = match env::var("RABBITMQ").as_deref() {
            Err(_) | Ok("3") => Self { bin: "/usr/lib/rabbitmq/bin".into(), path },
            Ok("4") => {
                let tree = tool("rabbitmq-4")?;
                let erlang = tree.join("usr/lib/erlang/bin");
                Self { bin: tree.join("usr/lib/rabbitmq/bin"), path: format!("{}:{path}", erlang.display()) }
            }
            Ok(other) => bail!("RABBITMQ={other}: there is 3, of this Debian, and 4"),
        };
        ensure!(version.bin.is_dir(), "{} is missing: run `make tools`", version.bin.display());
        Ok(version)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.bin.join(program));
        command.env("PATH", &self.path);
        command
    }
}

#[derive(Debug)]
struct Server {
    broker: Process,
    /// Finds Erlang nodes by name; RabbitMQ does not start without one.
    names: Process,
}

impl RabbitMq {
    /// Starts one with nothing in it, and waits until it is ready (some seconds).
    pub async fn start() -> Result<Self> {
        Self::start_with("").await
    }

    /// The same, with further lines in its configuration; `{amqp}` in them is its port, `{tls}` a free one.
    pub async fn start_with(extra: &str) -> Result<Self> {
        let version = Version::wanted()?;
        let port = free_ports(5)?;
        let extra = extra.replace("{amqp}", &port.to_string()).replace("{tls}", &(port + 3).to_string());
        let limit = Duration::from_secs(20);
        // A connection that is kept belongs to the runtime of the test that made it.
        let http =
            reqwest::Client::builder().no_proxy().pool_max_idle_per_host(0).connect_timeout(limit).timeout(limit).build()?;
        let mut broker = Self { port, folder: scratch()?, server: None, http, extra, version };
        broker.start_again().await?;
        Ok(broker)
    }

    /// `amqp://guest:guest@127.0.0.1:PORT`
    pub fn url(&self) -> String {
        format!("amqp://guest:guest@{}", self.host())
    }

    /// `127.0.0.1:PORT`
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// The port that the configuration of [`RabbitMq::start_with`] may use for TLS.
    pub fn tls_port(&self) -> u16 {
        self.port + 3
    }

    /// The broker's process.
    pub fn pid(&self) -> Option<u32> {
        self.server.as_ref().map(|server| server.broker.id())
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Starts it on the data that it has, and waits until it is ready.
    pub async fn start_again(&mut self) -> Result<()> {
        if self.server.is_none() {
            self.spawn()?;
        }
        let mut server = self.server.take().context("just started")?;
        // It listens for clients last, and last of all for those who speak TLS.
        let tls = self.extra.contains("listeners.ssl").then(|| format!("127.0.0.1:{}", self.tls_port()));
        let hosts: Vec<_> = [Some(self.host()), tls].into_iter().flatten().collect();
        let is_ready = async || {
            self.manage("GET", "/api/health/checks/alarms", None).await.is_ok()
                && hosts.iter().all(|host| TcpStream::connect(host).is_ok())
        };
        let ready = server.broker.wait_ready(READY, is_ready).await;
        self.server = Some(server);
        ready
    }

    fn spawn(&mut self) -> Result<()> {
        let (folder, port) = (self.folder.path(), self.port);
        fs::create_dir_all(folder.join("mnesia"))?;
        let configuration = format!(
            "listeners.tcp.1 = 127.0.0.1:{port}\n\
             management.tcp.ip = 127.0.0.1\n\
             management.tcp.port = {}\n\
             log.file = false\n\
             log.console = true\n\
             log.console.level = warning\n\
             {}\n",
            port + 1,
            self.extra,
        );
        fs::write(folder.join("rabbitmq.conf"), configuration)?;
        fs::write(folder.join("enabled_plugins"), "[rabbitmq_management,rabbitmq_auth_mechanism_ssl].\n")?;
        // Erlang refuses one that others may read.
        let cookie = folder.join(".erlang.cookie");
        if !cookie.exists() {
            fs::write(&cookie, format!("{:016x}", fastrand::u64(..)))?;
            fs::set_permissions(&cookie, fs::Permissions::from_mode(0o400))?;
        }
        let names_port = (port + 4).to_string();
        let mut names = Command::new("epmd");
        names.args(["-address", "127.0.0.1", "-port", &names_port]).env_remove("ERL_EPMD_PORT");
        let mut broker = self.version.command("rabbitmq-server");
        broker
            .env("HOME", folder)
            .env("RABBITMQ_NODENAME", format!("test{port}@localhost"))
            .env("RABBITMQ_MNESIA_BASE", folder.join("mnesia"))
            .env("RABBITMQ_LOG_BASE", folder.join("log"))
            .env("RABBITMQ_CONFIG_FILE", folder.join("rabbitmq.conf"))
            .env("RABBITMQ_ENABLED_PLUGINS_FILE", folder.join("enabled_plugins"))
            .env("RABBITMQ_DIST_PORT", (port + 2).to_string())
            .env("ERL_EPMD_PORT", &names_port)
            .env("ERL_EPMD_ADDRESS", "127.0.0.1")
            // The script becomes the broker, instead of watching over it: signals are meant for that.
            .env("RABBITMQ_ALLOW_INPUT", "true")
            .env("RABBITMQ_SERVER_START_ARGS", "-noshell -noinput")
            // Two cores are shared with the test: schedulers that spin take them.
            .env(
                "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS",
                "-kernel inet_dist_use_interface {127,0,0,1} +sbwt none +sbwtdcpu none +sbwtdio none",
            );
        let log = folder.join("broker.log");
        self.server = Some(Server {
            names: Process::start("epmd", &mut names, &folder.join("epmd.log"))?,
            broker: Process::start("rabbitmq", &mut broker, &log)?,
        });
        Ok(())
    }

    /// Has it write down which queues it has, which it does some time after it has declared them: killed before that, it would
    /// forget them with all that is in them.
    pub async fn sync(&self) -> Result<()> {
        // Its tables of queues, and those in which quorum queues find their logs.
        self.evaluate("ok = mnesia:sync_log(), [] = [Table || Table <- dets:all(), dets:sync(Table) =/= ok].").await
    }

    /// Stops it in order (some seconds). [`RabbitMq::start_again`] brings it back.
    pub async fn stop(&mut self) -> Result<()> {
        let Some(mut server) = self.server.take() else { return Ok(()) };
        server.broker.signal(Signal::TERM)?;
        if server.broker.wait(STOPPED).await.is_err() {
            say_aloud(&format!("RabbitMQ has not stopped in {STOPPED:?}, and is killed"));
            server.broker.kill()?;
        }
        server.names.kill()
    }

    /// kill -9. [`RabbitMq::start_again`] brings it back.
    pub fn kill(&mut self) -> Result<()> {
        let Some(server) = self.server.take() else { return Ok(()) };
        server.broker.kill()?;
        server.names.kill()
    }

    /// Stops it in its tracks, its connections open, until it is told to go on.
    pub fn freeze(&self, frozen: bool) -> Result<()> {
        let server = self.server.as_ref().context("it does not run")?;
        server.broker.signal(if frozen { Signal::STOP } else { Signal::CONT })
    }

    /// Takes its data away while it is stopped.
    pub fn lose_disk(&self) -> Result<()> {
        ensure!(self.server.is_none(), "it runs");
        Ok(fs::remove_dir_all(self.folder.path().join("mnesia"))?)
    }

    /// Asks the management API; the answer, if it is JSON.
    pub async fn manage(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value> {
        let url = format!("http://127.0.0.1:{}{path}", self.port + 1);
        let mut request = self.http.request(method.parse()?, url).basic_auth("guest", Some("guest"));
        if let Some(body) = body {
            request = request.json(body);
        }
        let answer = request.send().await?;
        let (status, text) = (answer.status(), answer.text().await?);
        ensure!(status.is_success(), "{method} {path}: {status}: {text}");
        Ok(serde_json::from_str(&text).unwrap_or(Value::Null))
    }

    /// Ends all connections to a virtual host, as an administrator may. There have to be some: the broker lists them seconds later.
    pub async fn close_connections(&self, vhost: &str) -> Result<()> {
        let path = format!("/api/vhosts/{}/connections", vhost.replace('/', "%2F"));
        let connections = eventually("connections are listed", READY, async || {
            let listed = self.manage("GET", &path, None).await?;
            Ok(listed.as_array().filter(|listed| listed.len() >= 2).cloned())
        });
        for connection in connections.await? {
            let name = connection["name"].as_str().context("a connection without a name")?;
            let path = format!("/api/connections/{}", name.replace(' ', "%20").replace('>', "%3E"));
            // With one of a client's the others may end.
            let _ = self.manage("DELETE", &path, None).await;
        }
        Ok(())
    }

    /// Lets somebody in with this password, and no other, who may do everything in a virtual host.
    pub async fn let_in(&self, vhost: &str, user: &str, password: &str) -> Result<()> {
        let account = json!({ "password": password, "tags": "" });
        self.manage("PUT", &format!("/api/users/{user}"), Some(&account)).await?;
        let all = json!({ "configure": ".*", "write": ".*", "read": ".*" });
        self.manage("PUT", &format!("/api/permissions/{}/{user}", vhost.replace('/', "%2F")), Some(&all)).await.map(drop)
    }

    /// From now on the broker has too little disk, or no longer: it takes no messages then.
    pub async fn disk_alarm(&self, on: bool) -> Result<()> {
        let limit = if on { "mem_relative, 10000.0" } else { "mem_relative, 0.00001" };
        self.evaluate(&format!("rabbit_disk_monitor:set_disk_free_limit({{{limit}}}).")).await
    }

    /// From now on the broker has too little memory, or no longer: it takes no messages then.
    pub async fn memory_alarm(&self, on: bool) -> Result<()> {
        let limit = if on { "0.000001" } else { "0.4" };
        self.evaluate(&format!("vm_memory_monitor:set_vm_memory_high_watermark({limit}).")).await
    }

    /// Has an Erlang expression evaluated in the broker.
    async fn evaluate(&self, expression: &str) -> Result<()> {
        let output = tokio::process::Command::from(self.version.command("rabbitmqctl"))
            .args(["--node", &format!("test{}@localhost", self.port), "eval", expression])
            .env("HOME", self.folder.path())
            .env("ERL_EPMD_PORT", (self.port + 4).to_string())
            .env("ERL_EPMD_ADDRESS", "127.0.0.1")
            .output()
            .await?;
        ensure!(output.status.success(), "rabbitmqctl: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }
}
