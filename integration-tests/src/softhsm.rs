//! SoftHSM: a PKCS#11 module whose tokens are folders. Which ones it sees is said by an environment variable, and read once in a
//! process: what loads the module itself runs in a process of its own ([`SoftHsm::inside`]).

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::process::scratch;

/// Where Debian has it.
pub const MODULE: &str = "/usr/lib/softhsm/libsofthsm2.so";
/// May never be printed by countersign.
pub const PIN: &str = "the-pin-of-the-token";
pub const TOKEN: &str = "images";

#[derive(Debug)]
pub struct SoftHsm {
    folder: PathBuf,
    _owner: Option<TempDir>,
}

const HERE: &str = "COUNTERSIGN_TEST_TOKEN";

impl SoftHsm {
    /// A token without keys, and with a PIN that stands in the file [`Self::pin`].
    pub fn start() -> Result<Self> {
        ensure!(Path::new(MODULE).exists(), "there is no {MODULE}: `make tools` installs it");
        let owner = scratch()?;
        let hsm = Self { folder: owner.path().to_owned(), _owner: Some(owner) };
        fs::create_dir(hsm.tokens())?;
        fs::create_dir(hsm.folder.join("proxy"))?;
        let conf = format!("directories.tokendir = {}\nlog.level = ERROR\n", hsm.tokens().display());
        fs::write(hsm.folder.join("softhsm2.conf"), conf)?;
        hsm.write_pin(PIN)?;
        hsm.token(TOKEN)?;
        Ok(hsm)
    }

    /// Runs the test of this name once more, in a process in which the module sees a new token, and fails as it fails; then there
    /// is nothing left to do. In that process, the token.
    pub fn inside(test: &str) -> Option<Self> {
        if let Some(hsm) = Self::here() {
            return Some(hsm);
        }
        let hsm = Self::start().expect("SoftHSM is installed by `make tools`");
        let mut command = Command::new(std::env::current_exe().expect("a test has a program"));
        command.args([test, "--exact", "--nocapture"]).envs(hsm.there());
        let output = command.output().expect("a test can be run again");
        let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        // One that was not found did not fail, either.
        assert!(output.status.success() && said.contains("1 passed"), "in a process of its own, {}:\n{said}", output.status);
        None
    }

    /// The token that this process was started to see.
    pub fn here() -> Option<Self> {
        Some(Self { folder: std::env::var_os(HERE)?.into(), _owner: None })
    }

    /// What a process needs for the token to be [`Self::here`].
    pub fn there(&self) -> Vec<(&'static str, String)> {
        let mut environment = self.environment();
        environment.push((HERE, self.folder.to_str().expect("scratch folders have plain names").to_owned()));
        environment
    }

    /// What a process needs to see the token.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        let text = |path: PathBuf| path.to_str().expect("scratch folders have plain names").to_owned();
        vec![
            ("SOFTHSM2_CONF", text(self.folder.join("softhsm2.conf"))),
            ("PROXY_FOLDER", text(self.folder.join("proxy"))),
            ("PROXY_MODULE", MODULE.to_owned()),
        ]
    }

    /// The reference of the key with this label, which says where the PIN is.
    pub fn uri(&self, label: &str) -> String {
        format!("{}&pin-source=file:{}", self.uri_without_pin(label), self.pin().display())
    }

    pub fn uri_without_pin(&self, label: &str) -> String {
        format!("pkcs11:token={TOKEN};object={label}?module-path={MODULE}")
    }

    /// The file that the PIN is in.
    pub fn pin(&self) -> PathBuf {
        self.folder.join("pin")
    }

    pub fn write_pin(&self, pin: &str) -> Result<()> {
        let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(self.pin())?;
        Ok(writeln!(file, "{pin}")?)
    }

    /// Makes one more token.
    pub fn token(&self, label: &str) -> Result<()> {
        let mut softhsm = Command::new("softhsm2-util");
        softhsm.args(["--init-token", "--free", "--label", label, "--pin", PIN, "--so-pin", "the-officer"]);
        self.run(&mut softhsm)
    }

    /// A new key pair: `rsa:2048`, `EC:prime256v1`.
    pub fn key(&self, kind: &str, label: &str, id: u8) -> Result<()> {
        self.tool(&["--keypairgen", "--key-type", kind, "--label", label, "--id", &format!("{id:02x}")])
    }

    /// Has OpenSC's tool do something in the token, as its user.
    pub fn tool(&self, arguments: &[&str]) -> Result<()> {
        let mut tool = Command::new("pkcs11-tool");
        tool.args(["--module", MODULE, "--token-label", TOKEN, "--login", "--pin", PIN]).args(arguments);
        self.run(&mut tool)
    }

    /// Takes the tokens out.
    pub fn take_out(&self) -> Result<()> {
        fs::rename(self.tokens(), self.folder.join("away"))?;
        Ok(fs::create_dir(self.tokens())?)
    }

    /// Puts them back.
    pub fn put_back(&self) -> Result<()> {
        fs::remove_dir(self.tokens())?;
        Ok(fs::rename(self.folder.join("away"), self.tokens())?)
    }

    /// A module that stands before SoftHSM: it counts calls, and fails as [`Self::fault`] says.
    pub fn proxy(&self) -> Result<PathBuf> {
        let (source, module) = (self.folder.join("proxy.c"), self.folder.join("proxy.so"));
        fs::write(&source, include_str!("softhsm/proxy.c"))?;
        let mut compiler = Command::new("cc");
        self.run(compiler.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&module).arg(source).arg("-ldl"))?;
        Ok(module)
    }

    /// From now on the proxy's call fails: `b3` always with that code, `once b3` with it once, `hang` by never answering. `flags` is
    /// no call: it gives every token these flags.
    pub fn fault(&self, call: &str, how: &str) -> Result<()> {
        // Never there half.
        let draft = self.folder.join("fault");
        fs::write(&draft, how)?;
        Ok(fs::rename(draft, self.folder.join("proxy").join(call))?)
    }

    pub fn mend(&self, call: &str) -> Result<()> {
        Ok(fs::remove_file(self.folder.join("proxy").join(call))?)
    }

    /// How often the proxy was called so.
    pub fn calls(&self, call: &str) -> Result<usize> {
        let calls = fs::read_to_string(self.folder.join("proxy/calls")).unwrap_or_default();
        Ok(calls.lines().filter(|line| *line == call).count())
    }

    fn tokens(&self) -> PathBuf {
        self.folder.join("tokens")
    }

    fn run(&self, command: &mut Command) -> Result<()> {
        let output = command.envs(self.environment()).output();
        let program = command.get_program().display().to_string();
        let output = output.with_context(|| format!("{program} is installed by `make tools`"))?;
        let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success(), "{program}: {}: {said}", output.status);
        Ok(())
    }
}
