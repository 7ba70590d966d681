//! A Kubernetes cluster as far as admission is concerned: etcd, kube-apiserver and kubectl, on 127.0.0.1. No controllers and no
//! nodes: what is admitted is kept, and never runs.

pub mod scene;

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::AsyncWriteExt as _;

use crate::daemon::Output;
use crate::process::{Process, free_ports, scratch, tool};

/// May do everything, and is of no group that a configuration could name.
pub const ADMIN: &str = "admin";
/// May do everything, and is of the group `oncall`.
pub const ANNA: &str = "anna";
/// May do nothing that it is not granted.
pub const WEBHOOK: &str = "webhook";

const TOKENS: &str = "token-of-admin,admin,1,\"system:masters\"\ntoken-of-anna,anna,2,\"system:masters,oncall\"\n\
                      token-of-webhook,webhook,3\n";
/// Writes what webhooks annotate into the audit log.
const AUDIT: &str = "apiVersion: audit.k8s.io/v1\nkind: Policy\nomitStages: [RequestReceived]\nrules: [{level: Metadata}]\n";
const READY: Duration = Duration::from_secs(120);

/// Dropping it ends it.
#[derive(Debug)]
pub struct Cluster {
    // Dropped in this order.
    server: Process,
    _etcd: Process,
    port: u16,
    folder: TempDir,
}

impl Cluster {
    /// Ready, and empty.
    pub async fn start() -> Result<Self> {
        let (folder, ports) = (scratch()?, free_ports(3)?);
        let path = |name: &str| folder.path().join(name);
        let (client, peer) = (format!("http://127.0.0.1:{ports}"), format!("http://127.0.0.1:{}", ports + 1));
        let mut etcd = Command::new(tool("bin/etcd")?);
        etcd.arg("--data-dir").arg(path("etcd")).args(["--unsafe-no-fsync", "--initial-cluster", &format!("default={peer}")]);
        for (option, url) in [
            ("--listen-client-urls", &client),
            ("--advertise-client-urls", &client),
            ("--listen-peer-urls", &peer),
            ("--initial-advertise-peer-urls", &peer),
        ] {
            etcd.args([option, url]);
        }
        let etcd = Process::start("etcd", &mut etcd, &path("etcd.log"))?;

        fs::write(path("tokens.csv"), TOKENS)?;
        fs::write(path("audit.yaml"), AUDIT)?;
        let generated = Command::new("openssl").args(["genrsa", "-out"]).arg(path("accounts.key")).arg("2048").output()?;
        ensure!(generated.status.success(), "openssl: {}", String::from_utf8_lossy(&generated.stderr));
        let port = ports + 2;
        let mut server = Command::new(tool("bin/kube-apiserver")?);
        // Webhooks that are named by their service would be asked for at a proxy.
        for variable in ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"] {
            server.env_remove(variable);
        }
        server.args([
            &format!("--etcd-servers={client}"),
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            &format!("--secure-port={port}"),
            "--authorization-mode=RBAC",
            "--service-account-issuer=https://kubernetes.default.svc",
            "--service-cluster-ip-range=10.0.0.0/24",
            "--feature-gates=EphemeralContainers=true",
            // Nobody makes the service accounts that it would ask for.
            "--disable-admission-plugins=ServiceAccount",
        ]);
        for (option, file) in [
            ("--cert-dir", "certificates"),
            ("--service-account-key-file", "accounts.key"),
            ("--service-account-signing-key-file", "accounts.key"),
            ("--token-auth-file", "tokens.csv"),
            ("--audit-policy-file", "audit.yaml"),
            ("--audit-log-path", "audit.log"),
        ] {
            server.arg(option).arg(path(file));
        }
        let server = Process::start("kube-apiserver", &mut server, &path("server.log"))?;
        let mut cluster = Self { server, _etcd: etcd, port, folder };
        cluster.wait_ready().await?;
        Ok(cluster)
    }

    async fn wait_ready(&mut self) -> Result<()> {
        let http = reqwest::Client::builder().no_proxy().tls_danger_accept_invalid_certs(true).timeout(READY).build()?;
        let url = format!("https://127.0.0.1:{}/readyz", self.port);
        let ready = || async {
            http.get(&url).bearer_auth("token-of-admin").send().await.is_ok_and(|answer| answer.status().is_success())
        };
        self.server.wait_ready(READY, ready).await?;
        for user in [ADMIN, ANNA, WEBHOOK] {
            fs::write(self.kubeconfig(user), self.login(user).to_string())?;
        }
        Ok(())
    }

    /// A file by which this user reaches it.
    pub fn kubeconfig(&self, user: &str) -> PathBuf {
        self.folder.path().join(user).with_extension("json")
    }

    /// It trusts the certificate that the server has made for itself.
    fn login(&self, user: &str) -> Value {
        json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": {
                "server": format!("https://127.0.0.1:{}", self.port),
                "certificate-authority": self.folder.path().join("certificates/apiserver.crt"),
            }}],
            "users": [{"name": user, "user": {"token": format!("token-of-{user}")}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": user}}],
        })
    }

    /// What kubectl prints, run by this user with this as its input.
    pub async fn kubectl_as(&self, user: &str, arguments: &[&str], input: &str) -> Result<Output> {
        let limit = Duration::from_secs(120);
        let mut command = tokio::process::Command::new(tool("bin/kubectl")?);
        command.arg("--kubeconfig").arg(self.kubeconfig(user)).args(arguments).env("HOME", self.folder.path());
        // The one server there is goes by no proxy.
        command.env("NO_PROXY", "127.0.0.1").env("no_proxy", "127.0.0.1");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().context("start kubectl")?;
        let mut stdin = child.stdin.take().context("it has an input")?;
        stdin.write_all(input.as_bytes()).await?;
        drop(stdin);
        let output = tokio::time::timeout(limit, child.wait_with_output()).await;
        let output = output.with_context(|| format!("kubectl {arguments:?} is still running after {limit:?}"))??;
        Ok(Output {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// The same by the administrator, without input.
    pub async fn kubectl(&self, arguments: &[&str]) -> Result<Output> {
        self.kubectl_as(ADMIN, arguments, "").await
    }

    /// `kubectl apply` of a manifest, with these options.
    pub async fn apply(&self, manifest: &str, options: &[&str]) -> Result<Output> {
        self.kubectl_as(ADMIN, &[&["apply", "--filename=-"], options].concat(), manifest).await
    }

    /// What the audit log says so far of the object with this name.
    pub fn audited(&self, name: &str) -> Result<Vec<Value>> {
        let log = fs::read_to_string(self.folder.path().join("audit.log"))?;
        // The last line may be on its way.
        let events = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        Ok(events.filter(|event| event["objectRef"]["name"] == name).collect())
    }
}
