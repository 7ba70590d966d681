//! The judges: stock cosign 2 and 3, notation, skopeo and podman, as their users run them, and the libraries sigstore-rs and
//! sigstore-js in the programs of `verifiers/`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::Command;

use crate::house::House;
use crate::process::{scratch, tool};

/// What a judge said.
#[derive(Debug, Clone)]
pub struct Ruling {
    pub accepted: bool,
    /// Everything it printed.
    pub words: String,
}

/// What `cosign tree` lists of one place.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Branch {
    /// `Signatures for an image tag`, `application/… artifacts via OCI referrer`
    pub kind: String,
    pub at: String,
    /// The digests of the layers there.
    pub blobs: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cosign {
    V2,
    V3,
}

impl Cosign {
    /// `cosign verify --key`. `reference` is `host/repo:tag` or `host/repo@digest`.
    pub async fn verify(self, public_key: &Path, reference: &str) -> Result<Ruling> {
        let home = scratch()?;
        let mut command = self.command(home.path(), "verify")?;
        command.arg("--key").arg(public_key).args(["--insecure-ignore-tlog=true", "--allow-http-registry", reference]);
        rule(command).await
    }

    /// `cosign sign --key`, with the signature under the `.sig` tag whichever cosign it is.
    pub async fn sign(self, key: &KeyPair, reference: &str) -> Result<()> {
        let mut command = self.command(key.folder.path(), "sign")?;
        command.args(["--yes", "--tlog-upload=false", "--allow-http-registry", "--key"]).arg(key.private());
        if self == Self::V3 {
            command.args(["--use-signing-config=false", "--new-bundle-format=false"]);
        }
        must(command.arg(reference)).await
    }

    /// `cosign sign --key` as cosign 3 does it: as a bundle that refers to the image.
    pub async fn sign_bundle(key: &KeyPair, reference: &str) -> Result<()> {
        let mut command = Self::V3.command(key.folder.path(), "sign")?;
        command.args(["--yes", "--tlog-upload=false", "--use-signing-config=false", "--allow-http-registry", "--key"]);
        must(command.arg(key.private()).arg(reference)).await
    }

    /// `cosign sign --key` as a referrer that has the layers of a `.sig` tag: cosign's experimental mode `oci-1-1`. cosign takes all
    /// signatures along that it finds under the `.sig` tag.
    pub async fn sign_referrer(self, key: &KeyPair, reference: &str) -> Result<()> {
        let mut command = self.command(key.folder.path(), "sign")?;
        command.env("COSIGN_EXPERIMENTAL", "1").args(["--yes", "--tlog-upload=false", "--allow-http-registry", "--key"]);
        command.arg(key.private()).arg("--registry-referrers-mode=oci-1-1");
        if self == Self::V3 {
            command.args(["--use-signing-config=false", "--new-bundle-format=false"]);
        }
        must(command.arg(reference)).await
    }

    /// `cosign verify --key` of such a one.
    pub async fn verify_referrer(self, public_key: &Path, reference: &str) -> Result<Ruling> {
        let home = scratch()?;
        let mut command = self.command(home.path(), "verify")?;
        command.env("COSIGN_EXPERIMENTAL", "1").arg("--key").arg(public_key);
        command.args(["--insecure-ignore-tlog=true", "--allow-http-registry", "--experimental-oci11"]);
        if self == Self::V3 {
            command.arg("--new-bundle-format=false");
        }
        command.arg(reference);
        rule(command).await
    }

    /// `cosign tree`: what it finds attached to the image, sorted.
    pub async fn tree(self, reference: &str) -> Result<Vec<Branch>> {
        let home = scratch()?;
        let mut command = self.command(home.path(), "tree")?;
        command.args(["--allow-http-registry", reference]);
        let said = rule(command).await?;
        ensure!(said.accepted, "{self:?} tree {reference}: {}", said.words);
        let mut branches: Vec<Branch> = Vec::new();
        // Below a line for the image, one for each place, and below that one for each of its blobs.
        for line in said.words.lines().skip(1) {
            let line = line.trim_start_matches(|c: char| !c.is_ascii());
            match line.trim().trim_start_matches(|c: char| !c.is_ascii() || c == ' ') {
                blob if blob.starts_with("sha256:") => {
                    let branch = branches.last_mut().with_context(|| format!("a blob of nothing in {}", said.words))?;
                    branch.blobs.push(blob.to_owned());
                }
                place => {
                    let (kind, at) = place.split_once(": ").with_context(|| format!("{place:?} in {}", said.words))?;
                    branches.push(Branch { kind: kind.to_owned(), at: at.to_owned(), blobs: Vec::new() });
                }
            }
        }
        branches.sort();
        Ok(branches)
    }

    pub(crate) fn command(self, home: &Path, verb: &str) -> Result<Command> {
        let mut command = Command::new(tool(match self {
            Self::V2 => "bin/cosign2",
            Self::V3 => "bin/cosign3",
        })?);
        command.arg(verb).env("HOME", home).env("DOCKER_CONFIG", home).env("COSIGN_PASSWORD", KeyPair::PASSWORD);
        Ok(command)
    }
}

/// A key pair of cosign's own.
#[derive(Debug)]
pub struct KeyPair {
    folder: TempDir,
}

impl KeyPair {
    const PASSWORD: &str = "test";

    pub async fn generate() -> Result<Self> {
        let folder = scratch()?;
        let mut command = Cosign::V2.command(folder.path(), "generate-key-pair")?;
        must(command.current_dir(folder.path())).await?;
        Ok(Self { folder })
    }

    /// A key that was made elsewhere, in PKCS#8 PEM.
    pub async fn import(key: &Path) -> Result<Self> {
        let folder = scratch()?;
        // Debian's cosign 2 refuses every key here.
        let mut command = Cosign::V3.command(folder.path(), "import-key-pair")?;
        must(command.current_dir(folder.path()).args(["--output-key-prefix", "cosign", "--key"]).arg(key)).await?;
        Ok(Self { folder })
    }

    pub fn public(&self) -> PathBuf {
        self.folder.path().join("cosign.pub")
    }

    pub(crate) fn private(&self) -> PathBuf {
        self.folder.path().join("cosign.key")
    }
}

/// A home in which skopeo and podman find what they hold images against: signed by one key, and all else rejected.
fn home_requiring(public_key: &Path, host: &str, identity: Option<&Value>) -> Result<TempDir> {
    let home = scratch()?;
    let folder = home.path().join(".config/containers");
    fs::create_dir_all(folder.join("registries.d"))?;
    let mut requirement = json!({"type": "sigstoreSigned", "keyPath": public_key});
    if let Some(identity) = identity {
        requirement["signedIdentity"] = identity.clone();
    }
    let policy = json!({"default": [{"type": "reject"}], "transports": {"docker": {host: [requirement]}}});
    fs::write(folder.join("policy.json"), policy.to_string())?;
    let attachments = format!("docker: {{\"{host}\": {{use-sigstore-attachments: true}}}}\n");
    fs::write(folder.join("registries.d/registry.yaml"), attachments)?;
    Ok(home)
}

/// `skopeo copy` under a policy that demands a signature by one key, and rejects everything else.
#[derive(Debug)]
pub struct Skopeo {
    home: TempDir,
    arguments: Vec<String>,
}

impl Skopeo {
    /// Accepts images of `host` that `public_key` signed, under the default identity rule (`matchRepoDigestOrExact`).
    pub fn requiring(public_key: &Path, host: &str) -> Result<Self> {
        Self::with_identity(public_key, host, None)
    }

    /// The same with a `signedIdentity` of the caller's.
    pub fn with_identity(public_key: &Path, host: &str, identity: Option<&Value>) -> Result<Self> {
        Ok(Self { home: home_requiring(public_key, host, identity)?, arguments: Vec::new() })
    }

    /// Pulls for another platform than this machine's.
    #[must_use]
    pub fn architecture(mut self, architecture: &str) -> Self {
        self.arguments.extend(["--override-os", "linux", "--override-arch", architecture].map(str::to_owned));
        self
    }

    /// `skopeo copy` that signs under the `.sig` tag: onto the image's own place, so that the signature is all that is new.
    pub async fn sign(key: &KeyPair, reference: &str) -> Result<()> {
        let host = reference.split('/').next().unwrap_or_default();
        // Its policy is not asked, and where signatures go is.
        let this = Self::requiring(&key.public(), host)?;
        let home = this.home.path();
        let passphrase = home.join("passphrase");
        fs::write(&passphrase, KeyPair::PASSWORD)?;
        let mut command = Command::new(tool("bin/skopeo")?);
        command.env("HOME", home).env("TMPDIR", home).arg("--insecure-policy");
        command.args(["copy", "--src-tls-verify=false", "--dest-tls-verify=false", "--sign-by-sigstore-private-key"]);
        command.arg(key.private()).arg("--sign-passphrase-file").arg(passphrase);
        must(command.args([format!("docker://{reference}"), format!("docker://{reference}")])).await
    }

    pub async fn copy(&self, reference: &str) -> Result<Ruling> {
        let home = self.home.path();
        let copied = tempfile::tempdir_in(home)?;
        let mut command = Command::new(tool("bin/skopeo")?);
        command.env("HOME", home).env("TMPDIR", home).args(&self.arguments);
        command.args(["copy", "--src-tls-verify=false", &format!("docker://{reference}")]);
        command.arg(format!("dir:{}", copied.path().display()));
        rule(command).await
    }
}

/// `podman pull` into a storage of its own, under such a policy.
#[derive(Debug)]
pub struct Podman {
    home: TempDir,
}

impl Podman {
    /// Accepts what [`Skopeo::requiring`] accepts.
    pub fn requiring(public_key: &Path, host: &str) -> Result<Self> {
        Self::with_identity(public_key, host, None)
    }

    /// Accepts what [`Skopeo::with_identity`] accepts.
    pub fn with_identity(public_key: &Path, host: &str, identity: Option<&Value>) -> Result<Self> {
        Ok(Self { home: home_requiring(public_key, host, identity)? })
    }

    pub async fn pull(&self, reference: &str) -> Result<Ruling> {
        let home = self.home.path();
        let storage = tempfile::tempdir_in(home)?;
        let mut command = Command::new(tool("bin/podman5")?);
        command.env("HOME", home).env("TMPDIR", home).env("XDG_RUNTIME_DIR", storage.path()).args(["--storage-driver", "vfs"]);
        for place in ["root", "runroot", "tmpdir"] {
            command.arg(format!("--{place}")).arg(storage.path().join(place));
        }
        command.args(["pull", "--quiet", "--os", "linux", "--arch", "amd64", "--tls-verify=false", reference]);
        rule(command).await
    }
}

/// The crate sigstore, which looks for signatures itself; see `verifiers/sigstore-rs`.
pub async fn sigstore_rs(public_key: &Path, reference: &str) -> Result<Ruling> {
    library("bin/sigstore-rs", public_key, reference).await
}

/// The packages `@sigstore/bundle` and `@sigstore/verify`, which are handed bundles; see `verifiers/sigstore-js`.
pub async fn sigstore_js(public_key: &Path, reference: &str) -> Result<Ruling> {
    library("bin/sigstore-js", public_key, reference).await
}

async fn library(program: &str, public_key: &Path, reference: &str) -> Result<Ruling> {
    let mut command = Command::new(tool(program)?);
    command.arg(public_key).arg(reference);
    rule(command).await
}

/// `notation verify` at the level `strict`, under a policy that trusts one certificate.
#[derive(Debug)]
pub struct Notation {
    folder: TempDir,
}

impl Notation {
    /// Trusts signatures of `repository` (`host/path`, or `*`) by `identity` (`x509.subject: …`, or `*`) under the certificate in `pem`.
    pub fn trusting(pem: &str, identity: &str, repository: &str) -> Result<Self> {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = scratch()?;
        let config = folder.path().join("notation");
        let store = config.join("truststore/x509/ca/countersign");
        fs::create_dir_all(&store)?;
        fs::write(store.join("certificate.pem"), pem)?;
        let policy = json!({"version": "1.0", "trustPolicies": [{
            "name": "countersign",
            "registryScopes": [repository],
            "signatureVerification": {"level": "strict"},
            "trustStores": ["ca:countersign"],
            "trustedIdentities": [identity],
        }]});
        let path = config.join("trustpolicy.json");
        fs::write(&path, policy.to_string())?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        Ok(Self { folder })
    }

    /// Trusts what `countersign witness certificate` says that notation's user needs, for one repository or for all (`*`).
    pub async fn trusting_witness(house: &House, repository: &str) -> Result<Self> {
        let answer = house.run(&["witness", "certificate", "release", "--output", "json"]).await?.expect_code(0)?.json()?;
        let text = |member: &str| answer[member].as_str().with_context(|| format!("no {member} in {answer}"));
        Self::trusting(text("certificate")?, text("trusted_identity")?, repository)
    }

    /// One that has a key of its own, and trusts no other for `repository`.
    pub async fn signing(repository: &str) -> Result<Self> {
        let own = Self::trusting("", "*", repository)?;
        fs::remove_dir_all(own.folder.path().join("notation/truststore"))?;
        // It keeps the certificate in the store that has the key's name.
        must(own.command("cert")?.args(["generate-test", "--default", "countersign"])).await?;
        Ok(own)
    }

    /// One that signs with a key that was made elsewhere (PKCS#8 PEM), for which there is this certificate.
    pub fn with_key(key: &Path, certificate: &str) -> Result<Self> {
        let own = Self::trusting(certificate, "*", "*")?;
        let config = own.folder.path().join("notation");
        let path = config.join("certificate.pem");
        fs::write(&path, certificate)?;
        let keys = json!({"default": "own", "keys": [{"name": "own", "keyPath": key, "certPath": path}]});
        fs::write(config.join("signingkeys.json"), keys.to_string())?;
        Ok(own)
    }

    /// The public key of the one that [`Self::signing`] made, as PEM, in a file.
    pub fn public_key(&self) -> Result<PathBuf> {
        let (certificate, key) =
            ("notation/truststore/x509/ca/countersign/countersign.crt", self.folder.path().join("key.pub.pem"));
        let mut openssl = std::process::Command::new("openssl");
        openssl.args(["x509", "-noout", "-pubkey", "-in"]).arg(self.folder.path().join(certificate));
        let output = openssl.output().context("run openssl")?;
        ensure!(output.status.success(), "openssl: {}", String::from_utf8_lossy(&output.stderr));
        fs::write(&key, output.stdout)?;
        Ok(key)
    }

    /// `notation sign`, as [`Self::signing`] made it. `by_tag` is its default: it keeps the fallback tag whatever the registry can.
    pub async fn sign(&self, reference: &str, by_tag: bool) -> Result<()> {
        let mut command = self.command("sign")?;
        command.args(["--insecure-registry", &format!("--force-referrers-tag={by_tag}"), reference]);
        must(&mut command).await
    }

    /// `reference` is `host/repo:tag` or `host/repo@digest`.
    pub async fn verify(&self, reference: &str) -> Result<Ruling> {
        let mut command = self.command("verify")?;
        // Why a signature does not count, it says only when asked to be verbose.
        command.args(["--verbose", "--insecure-registry", reference]);
        rule(command).await
    }

    /// `notation list`: the signatures that it finds.
    pub async fn list(&self, reference: &str) -> Result<Ruling> {
        let mut command = self.command("list")?;
        command.args(["--insecure-registry", reference]);
        rule(command).await
    }

    /// When it says that the signatures of these media types were made, as they have it: `notation inspect`. By digest,
    /// since it warns of tags in the midst of its answer.
    pub async fn signing_times(&self, reference: &str) -> Result<BTreeMap<String, String>> {
        let mut command = self.command("inspect")?;
        let said = run(command.args(["--insecure-registry", "--output", "json", reference])).await?;
        let answer: Value = serde_json::from_str(&said.words).with_context(|| format!("not JSON: {}", said.words))?;
        let signatures = answer["Signatures"].as_array().with_context(|| format!("no signatures in {answer}"))?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        Ok(signatures.iter().map(|one| (text(&one["mediaType"]), text(&one["signedAttributes"]["signingTime"]))).collect())
    }

    fn command(&self, verb: &str) -> Result<Command> {
        let mut command = Command::new(tool("bin/notation")?);
        let folder = self.folder.path();
        command.arg(verb).env("HOME", folder).env("XDG_CONFIG_HOME", folder).env("XDG_CACHE_HOME", folder);
        Ok(command)
    }
}

/// For those who write. docker-registry has moments in which it forgets a blob that somebody else is uploading too, and refuses the
/// manifest that names it: then it is tried again.
pub(crate) async fn must(command: &mut Command) -> Result<()> {
    let mut pauses = [100, 500, 2000].into_iter();
    loop {
        let ruling = run(command).await?;
        if ruling.accepted {
            return Ok(());
        }
        let is_forgotten = ruling.words.to_lowercase().replace('_', " ").contains("blob unknown");
        let pause = pauses.next().filter(|_| is_forgotten);
        let pause = pause.with_context(|| format!("{:?} failed:\n{}", command.as_std(), ruling.words))?;
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
}

async fn rule(mut command: Command) -> Result<Ruling> {
    let ruling = run(&mut command).await?;
    // Neither accepts nor refuses: the test is wrong, or the registry is away.
    let broken =
        ["unknown flag", "connection refused", "no such host", "cannot judge"].iter().any(|words| ruling.words.contains(words));
    ensure!(!broken, "{:?} did not get to judge:\n{}", command.as_std(), ruling.words);
    Ok(ruling)
}

pub(crate) async fn run(command: &mut Command) -> Result<Ruling> {
    command.stdin(Stdio::null()).kill_on_drop(true);
    let limit = Duration::from_secs(120);
    let output = tokio::time::timeout(limit, command.output()).await;
    let output = output.with_context(|| format!("{:?} is still running after {limit:?}", command.as_std()))?;
    let output = output.with_context(|| format!("start {:?}", command.as_std()))?;
    let words = [output.stderr, output.stdout].concat();
    Ok(Ruling { accepted: output.status.success(), words: String::from_utf8_lossy(&words).into_owned() })
}
