//! The recipe of the image and the compose file, held to each other and to the configuration that they run with. What is built
//! from the recipe is looked at by tests/image.rs (`make image-test`).

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use integration_tests::daemon::{self, Daemon};
use integration_tests::house::House;
use integration_tests::process::{free_port, scratch, tool};
use serde_json::{Value, json};
use tempfile::TempDir;
use toml::Table;

/// Who countersign is in its image.
const USER: u32 = 65532;

#[test]
fn the_recipe_has_nothing_that_a_linter_minds() -> Result<()> {
    let output = Command::new(tool("bin/hadolint")?).arg(top().join("Dockerfile")).output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.is_empty(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

#[test]
fn the_recipe_says_what_the_source_and_the_example_say() -> Result<()> {
    let recipe = read("Dockerfile")?;
    let has = |line: &str| assert!(recipe.lines().any(|found| found.trim() == line), "the Dockerfile has no line {line}");
    has(&format!("ARG VERSION={}", env!("CARGO_PKG_VERSION")));
    has(&format!("USER {USER}:{USER}"));
    has(&format!("EXPOSE {}", listen_port(&example()?)?));
    // In exec form: there is no shell.
    has(r#"ENTRYPOINT ["/countersign"]"#);
    has(r#"CMD ["serve", "--config", "/etc/countersign/countersign.toml"]"#);
    assert!(recipe.contains(r#" CMD ["/countersign", "health"]"#));
    let toolchain = recipe.lines().find_map(|line| line.strip_prefix("ARG RUST=")).context("no ARG RUST")?;
    let least = read("Cargo.toml")?.parse::<Table>()?;
    let least = least["workspace"]["package"]["rust-version"].as_str().context("no rust-version")?.to_owned();
    let number = |version: &str| version.split('.').map(|part| part.parse().unwrap_or(0)).collect::<Vec<u32>>();
    assert!(number(toolchain) >= number(&least), "the image is built by Rust {toolchain}, and {least} is needed");
    Ok(())
}

/// cargo builds nothing of a package that names a target whose file is not there.
#[test]
fn the_recipe_is_given_every_target_of_the_workspace() -> Result<()> {
    let (folder, ignored) = (scratch()?, read(".dockerignore")?);
    for path in ignored.lines().filter_map(|line| line.strip_prefix('!')) {
        let to = folder.path().join(path);
        fs::create_dir_all(to.parent().context("it is in the folder")?)?;
        let copied = Command::new("cp").arg("--recursive").args([top().join(path), to]).status()?;
        ensure!(copied.success(), ".dockerignore names {path}, which cannot be copied");
    }
    let given = targets(folder.path())?;
    assert!(given.len() > 4, "{given:?}");
    assert_eq!(given, targets(&top())?);
    Ok(())
}

/// What cargo finds there, by package; but tests, which no manifest names.
fn targets(folder: &Path) -> Result<BTreeSet<(String, String)>> {
    let arguments = ["metadata", "--no-deps", "--offline", "--format-version=1"];
    let output = Command::new("cargo").args(arguments).current_dir(folder).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout)?;
    let of = |package: &Value| {
        let name = |value: &Value| value["name"].as_str().unwrap_or_default().to_owned();
        let targets = package["targets"].as_array().into_iter().flatten();
        let named = targets.filter(|target| target["kind"] != json!(["test"]));
        named.map(|target| (name(package), name(target))).collect::<Vec<_>>()
    };
    Ok(metadata["packages"].as_array().context("no packages")?.iter().flat_map(of).collect())
}

#[test]
fn every_service_is_pinned_watched_and_may_do_no_more_than_it_must() -> Result<()> {
    let compose = compose()?;
    for (name, service) in services(&compose)? {
        let image = service["image"].as_str().context("no image")?;
        let tag = image.rsplit_once(':').map_or("", |(_, tag)| tag);
        assert!(tag.starts_with(|c: char| c.is_ascii_digit()) && tag.contains('.'), "{name}: {image} is no version");
        assert!(image.split('/').next().is_some_and(|host| host == "docker.io" || host == "localhost"), "{name}: whose {image}?");
        assert_eq!(service["read_only"], true, "{name}");
        assert_eq!(strings(&service["cap_drop"]), ["ALL"], "{name}");
        assert_eq!(strings(&service["security_opt"]), ["no-new-privileges:true"], "{name}");
        for key in ["privileged", "cap_add", "network_mode", "pid", "env_file"] {
            assert!(service.get(key).is_none(), "{name} has {key}");
        }
        // countersign's is in its image.
        assert_eq!(service.get("healthcheck").is_none(), name == "countersign", "{name}: who asks how it is?");
        for port in strings(&service["ports"]) {
            assert!(port.starts_with("127.0.0.1:"), "{name} is open to the world at {port}");
        }
        for variable in service["environment"].as_object().into_iter().flat_map(|all| all.keys()) {
            let is_secret = ["PASS", "TOKEN", "SECRET"].iter().any(|word| variable.contains(word));
            assert!(!is_secret || variable.ends_with("_FILE"), "{name}: {variable} is a secret and stands in the environment");
        }
        for (other, how) in service["depends_on"].as_object().into_iter().flatten() {
            assert!(compose["services"][other].get("healthcheck").is_some(), "{name} waits for {other}, which nobody asks");
            assert_eq!(how["condition"], "service_healthy", "{name}, {other}");
        }
    }
    assert_eq!(compose["services"]["countersign"]["deploy"]["replicas"], 2);
    assert_eq!(
        compose["services"]["countersign"]["image"].as_str().and_then(|image| image.rsplit_once(':')).map(|(_, tag)| tag),
        Some(env!("CARGO_PKG_VERSION"))
    );
    Ok(())
}

#[test]
fn whatever_is_mounted_is_there_and_belongs_to_who_reads_it() -> Result<()> {
    let (compose, secrets) = (compose()?, Secrets::make()?);
    let declared: BTreeSet<&str> = compose["secrets"].as_object().context("no secrets")?.keys().map(String::as_str).collect();
    for name in &declared {
        assert_eq!(compose["secrets"][name]["file"], format!("./secrets/{name}"));
        assert!(secrets.path(name).is_file(), "make-secrets.sh makes no {name}");
    }
    let written: BTreeSet<String> = fs::read_dir(secrets.folder())?
        .map(|file| Ok(file?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    assert_eq!(written.iter().map(String::as_str).collect::<BTreeSet<_>>(), declared, "made, and declared");

    let (mut handed_out, mut volumes) = (BTreeSet::new(), BTreeSet::new());
    for (name, service) in services(&compose)? {
        let user = match service["user"].as_str() {
            Some(user) => user.split(':').next().unwrap_or(user).parse()?,
            None if name == "countersign" => USER,
            None => 0,
        };
        for secret in granted(service) {
            assert!(declared.contains(secret.as_str()), "{name} is given {secret}, which is nowhere");
            let metadata = fs::metadata(secrets.path(&secret))?;
            let (mode, owner) = (metadata.permissions().mode() & 0o777, metadata.uid());
            let for_all = !rustix::process::geteuid().is_root() || secret == "tls_certificate";
            assert!(
                if for_all { mode == 0o444 } else { mode == 0o400 && owner == user },
                "{name}: {secret} is {owner}'s, {mode:o}"
            );
            handed_out.insert(secret);
        }
        for config in service["configs"].as_array().into_iter().flatten() {
            let file = compose["configs"][config["source"].as_str().context("no source")?]["file"].as_str().context("no file")?;
            assert!(top().join(file).is_file(), "{name}: there is no {file}");
        }
        for volume in strings(&service["volumes"]) {
            let (volume, _) = volume.split_once(':').context("a volume without a name")?;
            assert!(compose["volumes"].get(volume).is_some(), "{name}: there is no volume {volume}");
            volumes.insert(volume.to_owned());
        }
    }
    assert_eq!(handed_out.iter().map(String::as_str).collect::<BTreeSet<_>>(), declared, "used, and declared");
    assert_eq!(volumes.len(), compose["volumes"].as_object().context("no volumes")?.len());
    Ok(())
}

#[test]
fn secrets_are_made_once_and_no_two_are_alike() -> Result<()> {
    let (one, other) = (Secrets::make()?, Secrets::make()?);
    for name in ["webhook_token", "postgres_password", "amqp_url", "release_key", "tls_key"] {
        assert_ne!(one.read(name)?, other.read(name)?, "{name}");
    }
    let token = one.read("webhook_token")?;
    let again = Secrets::command(&one.folder()).output()?;
    assert!(!again.status.success() && String::from_utf8_lossy(&again.stderr).contains("remove it first"));
    assert_eq!(one.read("webhook_token")?, token);
    Ok(())
}

#[test]
fn the_example_reads_exactly_the_secrets_that_its_service_is_given() -> Result<()> {
    let (compose, text) = (compose()?, read("config/examples/compose.toml")?);
    let service = &compose["services"]["countersign"];
    let read: BTreeSet<String> = text
        .split("/run/secrets/")
        .skip(1)
        .filter_map(|rest| rest.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).next())
        .map(str::to_owned)
        .collect();
    assert_eq!(read, granted(service), "read by the example, and granted to the service");
    assert!(!text.contains("env = "), "the service has no environment");
    let mounted = &service["configs"][0];
    assert_eq!(mounted["target"], "/etc/countersign/countersign.toml");
    assert_eq!(compose["configs"][mounted["source"].as_str().unwrap_or_default()]["file"], "./config/examples/compose.toml");
    Ok(())
}

#[tokio::test]
async fn the_example_is_a_good_configuration_with_the_secrets_that_are_made() -> Result<()> {
    let secrets = Secrets::make()?;
    let config = secrets.configured(&read("config/examples/compose.toml")?)?;
    let checked = daemon::run(&["check", "--config", &config, "--output", "json"], &[]).await?.expect_code(0)?.json()?;
    // Only files that everybody may read are minded, and only where they could be given to nobody else.
    for problem in checked["problems"].as_array().context("no problems")? {
        assert!(!rustix::process::geteuid().is_root() && problem.to_string().contains("every user"), "{problem}");
    }
    Ok(())
}

#[test]
fn everybody_is_called_by_the_name_port_and_password_that_it_has() -> Result<()> {
    let (compose, example, secrets) = (compose()?, example()?, Secrets::make()?);
    let registry = &example["registry"][0];
    let served: Value = secrets.yaml("registry_config")?;
    let port = served["http"]["addr"].as_str().and_then(|addr| addr.strip_prefix(':')).context("no port")?;
    assert_eq!(registry["url"].as_str(), Some(format!("http://registry:{port}").as_str()));
    assert!(compose["services"].get("registry").is_some());
    let name = registry["name"].as_str().context("no name")?;
    let published = name.replace("localhost", "127.0.0.1") + ":" + port;
    assert_eq!(strings(&compose["services"]["registry"]["ports"]), [published], "as {name} is reached from this machine");

    let amqp = reqwest::Url::parse(secrets.read("amqp_url")?.trim())?;
    let (user, password) = (amqp.username(), amqp.password().context("no password")?);
    let conf = secrets.read("rabbitmq_config")?;
    assert_eq!(conf, format!("default_user = {user}\ndefault_pass = {password}\n"));
    assert_eq!((amqp.scheme(), amqp.host_str(), amqp.port()), ("amqp", Some("rabbitmq"), Some(5672)));
    assert_eq!(compose["services"]["rabbitmq"]["hostname"], "rabbitmq", "its data belong to a name that stays");

    let ledger = reqwest::Url::parse(secrets.read("ledger_url")?.trim())?;
    let environment = &compose["services"]["postgres"]["environment"];
    assert_eq!((ledger.scheme(), ledger.host_str(), ledger.port()), ("postgres", Some("postgres"), Some(5432)));
    assert_eq!(environment["POSTGRES_USER"], ledger.username());
    assert_eq!(environment["POSTGRES_DB"], ledger.path().trim_start_matches('/'));
    assert_eq!(environment["POSTGRES_PASSWORD_FILE"], "/run/secrets/postgres_password");
    assert_eq!(ledger.password(), Some(secrets.read("postgres_password")?.trim()));

    let patience = compose["services"]["countersign"]["stop_grace_period"].as_str().and_then(|text| text.strip_suffix('s'));
    let grace = example.get("server").and_then(|server| server.get("grace")).map_or("20s", |grace| grace.as_str().unwrap_or(""));
    let grace = grace.strip_suffix('s').context("a grace in seconds")?.parse::<u32>()?;
    assert!(patience.context("no stop_grace_period")?.parse::<u32>()? > grace, "it would be killed while it finishes");
    Ok(())
}

/// The registry's own words, sent as its configuration has them, to a countersign with the example's listener and source.
#[tokio::test]
async fn what_the_registry_sends_comes_in() -> Result<()> {
    let (example, secrets) = (example()?, Secrets::make()?);
    let config: Value = secrets.yaml("registry_config")?;
    let endpoint = &config["notifications"]["endpoints"][0];
    let url = reqwest::Url::parse(endpoint["url"].as_str().context("no url")?)?;
    let (host, port) = (url.host_str().context("no host")?.to_owned(), listen_port(&example)?);
    assert!(compose()?["services"].get(&host).is_some(), "there is no service {host}");
    assert_eq!(url.port(), Some(port));

    // What it shares with others is another test's.
    let mut alone = example.clone();
    let (state, here) = (scratch()?, free_port()?);
    for section in ["queue", "ledger"] {
        alone.remove(section);
    }
    alone.insert(
        "queue".to_owned(),
        toml::Value::Table([("path".to_owned(), state.path().display().to_string().into())].into_iter().collect()),
    );
    alone["server"]["listen"] = format!("127.0.0.1:{here}").into();
    let file = secrets.configured(&toml::to_string(&alone)?)?;
    let mut daemon = Daemon::new(Path::new(&file), here, &[]);
    daemon.start_unready()?;
    while daemon::run(&["health", "--config", &file], &[]).await?.code == Some(3) {
        ensure!(daemon.is_running()?, "it ended: {}", daemon.logged());
    }

    // Trusting the certificate that the registry is given, and no other; by the name that the registry has for it.
    let certificate = reqwest::Certificate::from_pem(secrets.read("tls_certificate")?.as_bytes())?;
    let address = format!("127.0.0.1:{here}").parse()?;
    let client = reqwest::Client::builder().no_proxy().tls_certs_only([certificate]).resolve(&host, address);
    let client = client.timeout(Duration::from_secs(20)).build()?;
    let mut url = url;
    url.set_port(Some(here)).ok().context("a URL with a port")?;
    let event = House::event("localhost:5000", "production/app", Some("1.0"), &integration_tests::image::digest(b"an image"));
    let mut statuses = vec![];
    for headers in [endpoint["headers"].as_object(), None] {
        let mut request = client.post(url.clone()).body(event.to_string());
        request = request.header("content-type", "application/vnd.docker.distribution.events.v1+json");
        for (name, values) in headers.into_iter().flatten() {
            request = strings(values).into_iter().fold(request, |request, value| request.header(name, value));
        }
        statuses.push(request.send().await?.status().as_u16());
    }
    assert_eq!(statuses, [202, 401], "with its headers, and without");
    Ok(())
}

/// What make-secrets.sh made, in a folder that is gone with this.
struct Secrets(TempDir);

impl Secrets {
    fn make() -> Result<Self> {
        let secrets = Self(scratch()?);
        let output = Self::command(&secrets.folder()).output()?;
        ensure!(output.status.success(), "make-secrets.sh: {}", String::from_utf8_lossy(&output.stderr));
        Ok(secrets)
    }

    fn command(folder: &Path) -> Command {
        let mut command = Command::new(top().join("config/compose/make-secrets.sh"));
        command.arg(folder);
        command
    }

    fn folder(&self) -> PathBuf {
        self.0.path().join("secrets")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder().join(name)
    }

    fn read(&self, name: &str) -> Result<String> {
        fs::read_to_string(self.path(name)).with_context(|| format!("read the secret {name}"))
    }

    fn yaml(&self, name: &str) -> Result<Value> {
        Ok(serde_saphyr::from_str(&self.read(name)?)?)
    }

    /// Writes a configuration that finds these secrets, and returns its file.
    fn configured(&self, text: &str) -> Result<String> {
        let file = self.0.path().join("countersign.toml");
        fs::write(&file, text.replace("/run/secrets", &self.folder().display().to_string()))?;
        Ok(file.display().to_string())
    }
}

fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("")
}

fn read(file: &str) -> Result<String> {
    fs::read_to_string(top().join(file)).with_context(|| file.to_owned())
}

fn compose() -> Result<Value> {
    Ok(serde_saphyr::from_str(&read("compose.yaml")?)?)
}

fn example() -> Result<Table> {
    Ok(read("config/examples/compose.toml")?.parse()?)
}

fn services(compose: &Value) -> Result<&serde_json::Map<String, Value>> {
    compose["services"].as_object().context("no services")
}

/// The secrets that a service is given, in the short and the long form.
fn granted(service: &Value) -> BTreeSet<String> {
    let secrets = service["secrets"].as_array().into_iter().flatten();
    secrets.filter_map(|secret| secret.as_str().or(secret["source"].as_str())).map(str::to_owned).collect()
}

fn strings(list: &Value) -> Vec<&str> {
    list.as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

fn listen_port(example: &Table) -> Result<u16> {
    let listen = example["server"]["listen"].as_str().context("no listen")?;
    Ok(listen.parse::<std::net::SocketAddr>()?.port())
}
