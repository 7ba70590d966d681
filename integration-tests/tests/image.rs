//! The container image, as it is and as it runs: `make image-test` builds it and runs this, as root. It is run as compose.yaml
//! runs it, on a file system that cannot be written, without a right and without a shell.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Permissions};
use std::io::Read;
use std::net::UdpSocket;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use flate2::read::GzDecoder;
use integration_tests::daemon::Output;
use integration_tests::house::{Keys, TOKEN, rule};
use integration_tests::image::Image;
use integration_tests::process::{eventually, free_port, http_client, scratch, tool};
use integration_tests::registry::{Notify, Options, Registry};
use integration_tests::signature::{PublicKey, signed_references};
use serde_json::{Value, json};
use tempfile::TempDir;

const USER: u32 = 65532;
const LIMIT: Duration = Duration::from_secs(30);

#[test]
fn it_holds_the_binary_and_what_that_reads_and_nothing_else() -> Result<()> {
    let entries = entries()?;
    let files: BTreeSet<&str> = entries.iter().filter(|(_, entry)| !entry.is_folder).map(|(path, _)| path.as_str()).collect();
    assert_eq!(files, BTreeSet::from(["countersign", "etc/nsswitch.conf", "etc/ssl/certs/ca-certificates.crt"]));
    let size: u64 = entries.values().map(|entry| entry.size).sum();
    assert!(size < 25_000_000, "{size} bytes");
    let dates: BTreeSet<u64> = entries.values().map(|entry| entry.date).collect();
    assert_eq!(dates.len(), 1, "the time of the build shows: {dates:?}");
    for (path, entry) in &entries {
        let (owner, mode) = if path == "var/lib/countersign" { (USER, 0o700) } else { (0, entry.mode) };
        assert_eq!((entry.owner, entry.mode), (owner, mode), "{path}");
        assert_eq!(entry.mode & 0o7022, 0, "{path} is {:o}", entry.mode);
    }
    let binary = &entries["countersign"];
    assert_eq!(binary.mode, 0o755);
    for path in ["/src/src/", "/src/queue/", "/usr/local/cargo", "/root/", "/target/"] {
        let found = binary.bytes.windows(path.len()).any(|window| window == path.as_bytes());
        assert!(!found, "the folder {path} of the build is in the binary");
    }
    Ok(())
}

#[test]
fn second_build_of_the_same_source_is_the_same_to_the_byte() -> Result<()> {
    let again = inspected(&format!("{}-again", image()?))?;
    let first = inspected(&image()?)?;
    // Layers are named by the hashes of what is in them.
    assert_eq!(first["RootFS"]["Layers"].as_array().map(Vec::len), Some(1), "{first}");
    // The image's own id is another one: buildah writes into it which container it was built in.
    for part in ["RootFS", "Config", "Created", "Architecture", "Os", "History", "Healthcheck"] {
        assert!(!first[part].is_null(), "{part}: {first}");
        assert_eq!(again[part], first[part], "{part}");
    }
    Ok(())
}

#[test]
fn it_says_what_it_is_and_how_it_is_run() -> Result<()> {
    let inspected = inspected(&image()?)?;
    let config = &inspected["Config"];
    assert_eq!(config["User"], format!("{USER}:{USER}"));
    assert_eq!(config["Entrypoint"], json!(["/countersign"]));
    assert_eq!(config["Cmd"], json!(["serve", "--config", "/etc/countersign/countersign.toml"]));
    assert_eq!(config["ExposedPorts"], json!({"8080/tcp": {}}));
    assert_eq!(config["Volumes"], json!({"/var/lib/countersign": {}}));
    assert_eq!(inspected["Healthcheck"]["Test"], json!(["CMD", "/countersign", "health"]));
    assert_eq!(config["Env"].as_array().map(Vec::len), Some(1), "nothing but PATH: {}", config["Env"]);
    let label = |name: &str| config["Labels"][format!("org.opencontainers.image.{name}")].as_str().unwrap_or_default();
    assert_eq!((label("title"), label("licenses")), ("countersign", "Apache-2.0"));
    assert_eq!(label("version"), env!("CARGO_PKG_VERSION"));
    assert!(label("revision").len() >= 40 && label("source").starts_with("https://") && !label("description").is_empty());
    let version = podman(&["run", "--rm", "--network=none", &image()?, "--version"])?.expect_code(0)?.stdout;
    assert_eq!(version.trim(), format!("countersign {}", label("version")));
    Ok(())
}

#[tokio::test]
async fn it_signs_what_is_pushed_and_ends_when_it_is_told_to() -> Result<()> {
    let (port, folder) = (free_port()?, shared_folder()?);
    let notify = Notify::new(format!("http://127.0.0.1:{port}/events/main"), TOKEN);
    let registry = Registry::start_with(Options { notify: Some(notify), ..Options::default() }).await?;
    fs::write(folder.path().join("token"), TOKEN)?;
    let (host, url, rule) = (registry.host(), registry.url(), rule("team", "team", Keys::P256));
    write_config(
        &folder,
        &format!(
            "[server]\nlisten = \"127.0.0.1:{port}\"\n\n[[registry]]\nname = \"{host}\"\nurl = \"{url}\"\n\n\
             [[source]]\nname = \"main\"\nkind = \"distribution\"\nregistry = \"{host}\"\ntoken = {{ file = \"token\" }}\n\n\
             [[witness]]\nname = \"release\"\nkey = \"file:///etc/countersign/release.pem\"\n\n{rule}"
        ),
    )?;
    run(&folder, &[], &["key", "generate", "--out", "/etc/countersign/release.pem"])?.expect_code(0)?;
    let public = run(&folder, &[], &["witness", "public-key", "release"])?.expect_code(0)?.stdout;

    let container = Container::start(&folder)?;
    let (http, probe) = (http_client()?, format!("http://127.0.0.1:{port}/readyz"));
    let ready = async || Ok(http.get(&probe).send().await.is_ok_and(|answer| answer.status().is_success()).then_some(()));
    eventually("it is ready", LIMIT, ready).await.with_context(|| container.logs())?;
    podman(&["healthcheck", "run", &container.0])?.expect_code(0)?;
    let health = podman(&["exec", &container.0, "/countersign", "health", "--ready"])?.expect_code(0)?;
    assert_eq!(health.stdout.trim(), "ready");
    assert_ne!(podman(&["exec", &container.0, "/bin/sh", "-c", "true"])?.code, Some(0));

    let (client, pushed, key) = (registry.client()?, Image::oci("in a container")?, PublicKey::from_pem(&public)?);
    client.push(&pushed, "team/app", &["1.0"]).await?;
    let digest = &pushed.manifest.digest;
    let signed = async || Ok(Some(signed_references(&client, "team/app", digest, &key).await?).filter(|found| !found.is_empty()));
    let signed = eventually("the image is signed", LIMIT, signed).await.with_context(|| container.logs())?;
    assert_eq!(signed, [format!("{host}/team/app:1.0")]);

    podman(&["stop", "--time", "30", &container.0])?.expect_code(0)?;
    let ended = podman(&["inspect", "--format", "{{.State.ExitCode}}", &container.0])?.expect_code(0)?.stdout;
    assert_eq!(ended.trim(), "0", "{}", container.logs());
    assert!(container.logs().contains("stopped"));
    Ok(())
}

/// A static glibc can be built without the means to look names up.
#[tokio::test]
async fn it_finds_hosts_by_the_hosts_file_and_by_a_name_server() -> Result<()> {
    let (registry, folder) = (Registry::start().await?, shared_folder()?);
    let port = registry.host().rsplit_once(':').context("no port")?.1.to_owned();
    // A resolver is always asked on port 53.
    let server = UdpSocket::bind("127.0.7.53:53").context("port 53 of 127.0.7.53, which takes root")?;
    thread::spawn(move || answer_names(&server, b"\x07by-name\x04test"));
    fs::write(folder.path().join("resolv.conf"), "nameserver 127.0.7.53\noptions timeout:1 attempts:1\n")?;
    let resolver = format!("{}/resolv.conf:/etc/resolv.conf:ro", folder.path().display());
    for (host, code) in [("by-file.test", 0), ("by-name.test", 0), ("nowhere.test", 3)] {
        write_config(&folder, &format!("[[registry]]\nname = \"{host}:{port}\"\nurl = \"http://{host}:{port}\"\n"))?;
        let more = ["--add-host=by-file.test:127.0.0.1", "--volume", &resolver];
        run(&folder, &more, &["check", "--online"])?.expect_code(code).context(host)?;
    }
    Ok(())
}

/// Answers 127.0.0.1 for one name (RFC 1035 section 3.1), and NXDOMAIN for every other, until the test's process ends.
fn answer_names(server: &UdpSocket, known: &[u8]) {
    const HEADER: usize = 12;
    let mut query = [0; 512];
    while let Ok((length, from)) = server.recv_from(&mut query) {
        let Some(name) = query[HEADER..length].iter().position(|&byte| byte == 0).map(|end| &query[HEADER..HEADER + end]) else {
            continue;
        };
        let question = &query[HEADER..HEADER + name.len() + 5];
        let (is_known, is_address) = (name == known, question[name.len() + 1..name.len() + 3] == [0, 1]);
        let mut answer = query[..2].to_vec();
        answer.extend([0x81, if is_known { 0x80 } else { 0x83 }, 0, 1, 0, u8::from(is_known && is_address), 0, 0, 0, 0]);
        answer.extend(question);
        if is_known && is_address {
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 127, 0, 0, 1]);
        }
        let _ = server.send_to(&answer, from);
    }
}

/// One file or folder of the image.
struct Entry {
    is_folder: bool,
    size: u64,
    date: u64,
    owner: u32,
    mode: u32,
    bytes: Vec<u8>,
}

/// All that is in the image's layers, by path.
fn entries() -> Result<BTreeMap<String, Entry>> {
    let folder = scratch()?;
    let saved = folder.path().join("image");
    podman(&["save", "--quiet", "--format", "oci-dir", "--output", text(&saved)?, &image()?])?.expect_code(0)?;
    let read = |digest: &Value| -> Result<Vec<u8>> {
        let digest = digest.as_str().context("no digest")?.replace(':', "/");
        Ok(fs::read(saved.join("blobs").join(digest))?)
    };
    let index: Value = serde_json::from_slice(&fs::read(saved.join("index.json"))?)?;
    let manifest: Value = serde_json::from_slice(&read(&index["manifests"][0]["digest"])?)?;
    let mut entries = BTreeMap::new();
    for layer in manifest["layers"].as_array().context("no layers")? {
        let bytes = read(&layer["digest"])?;
        let layer: Box<dyn Read> =
            if bytes.starts_with(&[0x1f, 0x8b]) { Box::new(GzDecoder::new(&bytes[..])) } else { Box::new(&bytes[..]) };
        for entry in tar::Archive::new(layer).entries()? {
            let mut entry = entry?;
            let path = entry.path()?.to_string_lossy().trim_end_matches('/').to_owned();
            let header = entry.header().clone();
            let mut bytes = vec![];
            entry.read_to_end(&mut bytes)?;
            let (date, owner) = (header.mtime()?, u32::try_from(header.uid()?)?);
            let is_folder = header.entry_type().is_dir();
            entries.insert(path, Entry { is_folder, size: header.size()?, date, owner, mode: header.mode()? & 0o7777, bytes });
        }
    }
    Ok(entries)
}

/// A daemon in a container; removed when it is dropped.
struct Container(String);

impl Container {
    fn start(folder: &TempDir) -> Result<Self> {
        let (mount, image) = (mounted(folder)?, image()?);
        let arguments = [&["run", "--detach"][..], &CONFINED, &["--volume", &mount, &image]].concat();
        Ok(Self(podman(&arguments)?.expect_code(0)?.stdout.trim().to_owned()))
    }

    fn logs(&self) -> String {
        podman(&["logs", &self.0]).map_or_else(|error| format!("{error:#}"), |output| output.stdout + &output.stderr)
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        drop(podman(&["rm", "--force", "--volumes", "--time", "0", &self.0]));
    }
}

const CONFINED: [&str; 4] = ["--network=host", "--read-only", "--cap-drop=all", "--security-opt=no-new-privileges"];

/// Runs a command of countersign's to its end.
fn run(folder: &TempDir, more: &[&str], command: &[&str]) -> Result<Output> {
    let (mount, image) = (mounted(folder)?, image()?);
    podman(&[&["run", "--rm"][..], &CONFINED, &["--volume", &mount], more, &[&image], command].concat())
}

fn podman(arguments: &[&str]) -> Result<Output> {
    let output = Command::new(tool("bin/podman")?).args(arguments).output()?;
    Ok(Output {
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

fn inspected(image: &str) -> Result<Value> {
    let all: Value = serde_json::from_str(&podman(&["image", "inspect", image])?.expect_code(0)?.stdout)?;
    Ok(all[0].clone())
}

/// The image under test.
fn image() -> Result<String> {
    std::env::var("COUNTERSIGN_IMAGE").context("COUNTERSIGN_IMAGE names no image: run `make image-test`")
}

/// A folder that belongs to the image's user, for /etc/countersign.
fn shared_folder() -> Result<TempDir> {
    let folder = scratch()?;
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755))?;
    chown(folder.path(), Some(USER), Some(USER)).context("give a folder to the image's user, which takes root")?;
    Ok(folder)
}

fn write_config(folder: &TempDir, text: &str) -> Result<()> {
    Ok(fs::write(folder.path().join("countersign.toml"), text)?)
}

fn mounted(folder: &TempDir) -> Result<String> {
    Ok(format!("{}:/etc/countersign", text(folder.path())?))
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is no text")
}
