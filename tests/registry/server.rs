//! A real docker-registry on a loopback port, for as long as the value lives.

use std::{
    fs,
    net::TcpStream,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use countersign::oci::{Digest, RegistryName};
use integration_tests::{issuer::Issuer, process::free_port};
use tempfile::TempDir;

pub const PASSWORD: &str = "correct horse";
/// bcrypt of [`PASSWORD`] for the user `ann`, in 16 rounds: this guards nothing.
const HTPASSWD: &str = "ann:$2b$04$9u4aA49w6Jmn6DyMaInVMOUhnqxszOMUcx7KIgEjYyPQjVSuBZsL.\n";

pub enum Auth {
    None,
    Password,
    Token { realm: String, certificate: PathBuf },
}

impl Auth {
    pub fn of(issuer: &Issuer) -> Self {
        Self::Token { realm: issuer.realm(), certificate: issuer.certificate() }
    }
}

pub struct Server {
    child: Child,
    folder: TempDir,
    port: u16,
}

impl Server {
    pub fn start(auth: &Auth) -> Self {
        let shm = PathBuf::from("/dev/shm");
        let folder = if shm.is_dir() { TempDir::new_in(shm) } else { TempDir::new() }.unwrap();
        let at = |name: &str| folder.path().join(name);
        let auth = match auth {
            Auth::None => String::new(),
            Auth::Password => {
                fs::write(at("htpasswd"), HTPASSWD).unwrap();
                format!("auth: {{htpasswd: {{realm: test, path: {}}}}}\n", at("htpasswd").display())
            }
            Auth::Token { realm, certificate } => format!(
                "auth: {{token: {{realm: '{realm}', service: registry, issuer: test, rootcertbundle: {}}}}}\n",
                certificate.display()
            ),
        };
        let config = |port: u16| {
            format!(
                "version: 0.1\n\
                 log: {{level: error, accesslog: {{disabled: false}}}}\n\
                 storage: {{filesystem: {{rootdirectory: {}}}, maintenance: {{uploadpurging: {{enabled: false}}}}}}\n\
                 http: {{addr: '127.0.0.1:{port}', secret: test}}\n\
                 {auth}",
                at("data").display()
            )
        };
        let port = free_port().unwrap();
        fs::write(at("config.yml"), config(port)).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(at("config.yml"))
            .stdin(Stdio::null())
            .stdout(fs::File::create(at("log")).unwrap())
            .stderr(fs::File::create(at("errors")).unwrap())
            .spawn()
            .expect("docker-registry must be installed: apt-get install docker-registry");
        let mut server = Self { child, folder, port };
        server.wait_up();
        server
    }

    fn wait_up(&mut self) {
        let began = Instant::now();
        while TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            let ended = self.child.try_wait().unwrap();
            let errors = || fs::read_to_string(self.folder.path().join("errors")).unwrap();
            assert!(ended.is_none(), "docker-registry does not start: {}", errors());
            assert!(began.elapsed() < Duration::from_secs(60), "docker-registry runs, but does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn url(&self) -> reqwest::Url {
        format!("http://127.0.0.1:{}", self.port).parse().unwrap()
    }

    pub fn name(&self) -> RegistryName {
        format!("127.0.0.1:{}", self.port).parse().unwrap()
    }

    /// Takes a manifest away and leaves the tags that name it: what a reader sees in the middle of a deletion.
    pub fn delete_revision(&self, repository: &str, digest: &Digest) {
        let revisions = format!("data/docker/registry/v2/repositories/{repository}/_manifests/revisions/sha256");
        fs::remove_dir_all(self.folder.path().join(revisions).join(digest.encoded())).unwrap();
    }

    /// The access log's lines: `… "GET /v2/ HTTP/1.1" 200 …`.
    pub fn requests(&self) -> Vec<String> {
        let log = fs::read_to_string(self.folder.path().join("log")).unwrap();
        log.lines().filter(|line| line.contains("\" \"")).map(str::to_owned).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
