//! Network namespaces of Linux: replicas that reach the servers over a cable of their own, and nothing else. Needs root.

use std::net::Ipv4Addr;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};

/// Set in the process that [`inside`] starts.
const MARK: &str = "COUNTERSIGN_TEST_IN_NAMESPACE";

/// Whether this process has a network of its own. If not, the test of this name is run again in one, and has passed when this
/// returns false.
pub fn inside(test: &str) -> Result<bool> {
    if std::env::var_os(MARK).is_some() {
        run(Command::new("ip").args(["link", "set", "lo", "up"]))?;
        return Ok(true);
    }
    let mut again = Command::new("unshare");
    again.arg("--net").arg("--").arg(std::env::current_exe()?).args(["--exact", test, "--nocapture", "--test-threads=1"]);
    let status = again.env(MARK, "1").status().context("run unshare")?;
    ensure!(
        status.success(),
        "{test}: {status}. It needs network namespaces and iptables: root with CAP_SYS_ADMIN and CAP_NET_ADMIN"
    );
    Ok(false)
}

/// A namespace that a cable joins to ours. It ends when this is dropped, and with this process.
#[derive(Debug)]
pub struct Namespace {
    /// Our end of the cable.
    pub here: Ipv4Addr,
    /// Its end.
    pub there: Ipv4Addr,
    /// A process that does nothing but live in it, until its input ends.
    holder: Child,
}

impl Namespace {
    /// `number` is its own: 10.77.NUMBER.0/30 is the cable's.
    pub fn join(number: u8) -> Result<Self> {
        let holder = Command::new("unshare").args(["--net", "cat"]).stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
        let (here, there) = (Ipv4Addr::new(10, 77, number, 1), Ipv4Addr::new(10, 77, number, 2));
        let namespace = Self { here, there, holder };
        let pid = namespace.holder.id().to_string();
        // It is there once it is another than ours.
        let network = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net"));
        while network(&pid)? == network("self")? {
            std::thread::yield_now();
        }
        let (near, far) = (format!("near{number}"), format!("far{number}"));
        let ip = |words: &str| run(Command::new("ip").args(words.split(' ')));
        ip(&format!("link add {near} type veth peer name {far} netns {pid}"))?;
        ip(&format!("addr add {here}/30 dev {near}"))?;
        ip(&format!("link set {near} up"))?;
        run(namespace.command("ip").args(format!("addr add {there}/30 dev {far}").split(' ')))?;
        run(namespace.command("ip").args(["link", "set", "lo", "up"]))?;
        run(namespace.command("ip").args(format!("link set {far} up").split(' ')))?;
        Ok(namespace)
    }

    /// What to write before a command so that it runs in there.
    pub fn prefix(&self) -> [String; 3] {
        ["nsenter".to_owned(), format!("--net=/proc/{}/ns/net", self.holder.id()), "--".to_owned()]
    }

    fn command(&self, program: &str) -> Command {
        let [enter, words @ ..] = self.prefix();
        let mut command = Command::new(enter);
        command.args(words).arg(program);
        command
    }

    /// From now on, or no longer: whatever goes to this TCP port of ours or comes from it is lost on the way.
    pub fn drop_packets(&self, port: u16, lost: bool) -> Result<()> {
        for (chain, end) in [("INPUT", "--sport"), ("OUTPUT", "--dport")] {
            let change = if lost { "--append" } else { "--delete" };
            let mut iptables = self.command("iptables");
            run(iptables.args([change, chain, "--protocol", "tcp", end, &port.to_string(), "--jump", "DROP"]))?;
        }
        Ok(())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // Harmless if it is gone already.
        let _ = (self.holder.kill(), self.holder.wait());
    }
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("run {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
