use std::{
    fmt,
    fs::File,
    io::{self, Read},
    path::PathBuf,
};

use secrecy::{ExposeSecret, SecretString, zeroize::Zeroizing};

use super::{place::variable, reference::Flavor};
use crate::kms::Environment;

/// How a Vault or an OpenBao is told who asks, or what opens a key elsewhere. Paths are those of the auth methods' mounts, without slashes around them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Login {
    /// A token that somebody else obtained.
    Token { token: SecretSource },
    /// The `AppRole` method; a role may do without a secret id.
    AppRole { path: String, role_id: String, secret_id: Option<SecretSource> },
    /// A signed statement of who asks: the JWT method, and the Kubernetes method, where it is a service account's token.
    Jwt { path: String, role: String, jwt: SecretSource },
    /// What opens the key itself: an encrypted file's passphrase, or the PIN of a PKCS#11 token. A Vault takes it for its token.
    Secret(SecretSource),
}

/// Where a secret is. It is read anew whenever it is needed, because files are rotated.
#[derive(Clone)]
pub enum SecretSource {
    File(PathBuf),
    /// The environment variable of this name.
    Variable(String),
    Given(SecretString),
}

impl SecretSource {
    /// The secret, without spaces and line ends around it; or why there is none, for people.
    pub(super) fn read(&self, environment: &Environment) -> Result<SecretString, String> {
        self.read_trimmed(environment, str::trim)
    }

    /// The same of a secret whose spaces count: only the end of its line is not part of it.
    pub(crate) fn read_line(&self, environment: &Environment) -> Result<SecretString, String> {
        self.read_trimmed(environment, |text| text.trim_end_matches(['\r', '\n']))
    }

    fn read_trimmed(&self, environment: &Environment, trim: fn(&str) -> &str) -> Result<SecretString, String> {
        let text = match self {
            Self::File(path) => read_file(path).map_err(|error| format!("{} cannot be read: {error}", path.display()))?,
            Self::Variable(name) => {
                Zeroizing::new(environment.get(name).ok_or_else(|| format!("the environment variable {name} is not set"))?)
            }
            Self::Given(secret) => return Ok(secret.clone()),
        };
        match trim(&text) {
            "" => Err(format!("{self} is empty")),
            secret => Ok(SecretString::from(secret)),
        }
    }
}

impl Login {
    /// For a witness that says nothing of it: `VAULT_TOKEN` or `BAO_TOKEN`, else the file that `vault login` and `bao login`
    /// leave behind.
    pub(super) fn of_environment(flavor: Flavor, environment: &Environment) -> Result<Self, String> {
        let file = |folder| PathBuf::from(folder).join(".vault-token");
        let token = match (variable(flavor, environment, "TOKEN"), environment.get("HOME").map(file)) {
            (Some((name, _)), _) => SecretSource::Variable(name),
            (None, Some(path)) if path.is_file() => SecretSource::File(path),
            (None, _) => {
                let what = "there is no token: set VAULT_TOKEN (or BAO_TOKEN), or give the witness a `login`";
                return Err(what.to_owned());
            }
        };
        Ok(Self::Token { token })
    }

    /// The mount's API path, if it is a login at all.
    pub(super) fn path(&self) -> Option<String> {
        match self {
            Self::Token { .. } | Self::Secret(_) => None,
            Self::AppRole { path, .. } | Self::Jwt { path, .. } => Some(format!("auth/{path}/login")),
        }
    }
}

fn read_file(path: &PathBuf) -> io::Result<Zeroizing<String>> {
    /// Far above any token.
    const LARGEST_FILE: u64 = 64 * 1024;
    let mut text = Zeroizing::new(String::with_capacity(8 * 1024));
    File::open(path)?.take(LARGEST_FILE).read_to_string(&mut text)?;
    Ok(text)
}

impl fmt::Display for SecretSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Variable(name) => write!(f, "the environment variable {name}"),
            Self::Given(_) => f.write_str("what stands in the configuration"),
        }
    }
}

impl fmt::Debug for SecretSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretSource({self})")
    }
}

impl PartialEq for SecretSource {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::File(a), Self::File(b)) => a == b,
            (Self::Variable(a), Self::Variable(b)) => a == b,
            (Self::Given(a), Self::Given(b)) => a.expose_secret() == b.expose_secret(),
            _ => false,
        }
    }
}

impl Eq for SecretSource {}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn token(environment: &Environment) -> Result<String, String> {
        let Login::Token { token } = Login::of_environment(Flavor::OpenBao, environment)? else { panic!("no token") };
        token.read(environment).map(|secret| secret.expose_secret().to_owned())
    }

    #[test]
    fn a_token_is_looked_for_where_the_servers_own_tools_do() {
        let folder = tempfile::tempdir().unwrap();
        let home = ("HOME", folder.path().to_str().unwrap());
        assert!(token(&Environment::of([home])).unwrap_err().contains("BAO_TOKEN"));
        fs::write(folder.path().join(".vault-token"), "s.file\n").unwrap();
        assert_eq!(token(&Environment::of([home])).unwrap(), "s.file");
        assert_eq!(token(&Environment::of([home, ("VAULT_TOKEN", "s.vault")])).unwrap(), "s.vault");
        assert_eq!(token(&Environment::of([("BAO_TOKEN", "s.bao"), ("VAULT_TOKEN", "s.vault")])).unwrap(), "s.bao");
    }

    #[test]
    fn what_is_missing_is_named_and_a_secret_is_not_shown() {
        let environment = Environment::of([]);
        let missing = SecretSource::File("/nonexistent/token".into()).read(&environment).unwrap_err();
        assert!(missing.starts_with("/nonexistent/token cannot be read"), "{missing}");
        assert!(SecretSource::Variable("X".into()).read(&environment).unwrap_err().contains("variable X is not set"));
        assert_eq!(SecretSource::File("/dev/null".into()).read(&environment).unwrap_err(), "/dev/null is empty");
        let given = SecretSource::Given("hunter2".into());
        assert!(!format!("{given} {given:?}").contains("hunter2"));
        assert_eq!(given.read(&environment).unwrap().expose_secret(), "hunter2");
    }
}
