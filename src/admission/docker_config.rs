//! Logins as docker and nodes keep them: `~/.docker/config.json`, `/var/lib/kubelet/config.json`, and what a
//! `kubernetes.io/dockerconfigjson` secret holds. Helpers (`credsStore`, `credHelpers`) are programs, and are not run.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use secrecy::SecretString;
use serde::Deserialize;

use crate::{oci::RegistryName, registry::Credentials};

const LARGEST: u64 = 1 << 20;

/// Logins by registry. `Debug` shows no password.
#[derive(Debug, Clone, Default)]
pub struct DockerConfig(HashMap<RegistryName, Credentials>);

/// Why there are no logins to be had. Nothing of the file is repeated.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{}: cannot be read", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{}: it is larger than {LARGEST} bytes", .0.display())]
    TooLarge(PathBuf),
    #[error("the logins are no docker configuration, a JSON object with `auths`")]
    Malformed,
}

impl DockerConfig {
    pub fn read(path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Read { path: path.to_owned(), source };
        let mut text = Vec::new();
        File::open(path).and_then(|file| file.take(LARGEST + 1).read_to_end(&mut text)).map_err(failed)?;
        if text.len() as u64 > LARGEST {
            return Err(Error::TooLarge(path.to_owned()));
        }
        Self::parse(&text)
    }

    /// Entries without a password, and those for a part of a registry, are left out.
    pub fn parse(text: &[u8]) -> Result<Self, Error> {
        #[derive(Deserialize)]
        struct Wire {
            #[serde(default)]
            auths: HashMap<String, Login>,
        }
        #[derive(Deserialize)]
        struct Login {
            auth: Option<String>,
            username: Option<String>,
            password: Option<String>,
        }
        // What the parser says of it could quote a password.
        let wire: Wire = serde_json::from_slice(text).map_err(|_| Error::Malformed)?;
        let login = |(key, login): (String, Login)| {
            let registry = registry_of(&key)?;
            let (username, password) = match (login.username, login.password, login.auth) {
                (Some(username), Some(password), _) => (username, password.into()),
                (_, _, Some(auth)) => decode(&auth)?,
                _ => return None,
            };
            Some((registry, Credentials { username, password }))
        };
        Ok(Self(wire.auths.into_iter().filter_map(login).collect()))
    }

    #[must_use]
    pub fn login(&self, registry: &RegistryName) -> Option<&Credentials> {
        self.0.get(registry)
    }
}

/// `registry.example.com`, `https://registry.example.com/v2/`, or Docker Hub's `https://index.docker.io/v1/`.
fn registry_of(key: &str) -> Option<RegistryName> {
    let host = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    let (host, path) = host.split_once('/').unwrap_or((host, ""));
    matches!(path.trim_end_matches('/'), "" | "v1" | "v2").then(|| host.parse().ok()).flatten()
}

/// Base64 of `username:password`.
fn decode(auth: &str) -> Option<(String, SecretString)> {
    let decoded = BASE64.decode(auth.trim()).ok()?;
    let text = String::from_utf8(decoded).ok()?;
    let (username, password) = text.split_once(':')?;
    let password = password.trim_end_matches('\0');
    (!password.is_empty()).then(|| (username.to_owned(), password.to_owned().into()))
}

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret as _;

    use super::*;

    #[test]
    fn logins_are_read_in_every_form_that_docker_and_nodes_write() {
        let config = DockerConfig::parse(
            br#"{"auths":{
                "registry.example.com:5000":{"auth":"YW5uYTpodW50ZXIy"},
                "https://index.docker.io/v1/":{"username":"bob","password":"p:w"},
                "https://other.example.com":{"auth":"YW5uYTpodW50ZXIy","email":"a@b"},
                "helped.example.com":{},
                "part.example.com/team":{"auth":"YW5uYTpodW50ZXIy"},
                "broken.example.com":{"auth":"!"}},"credsStore":"desktop"}"#,
        )
        .unwrap();
        let login = |name: &str| {
            let login = config.login(&name.parse().unwrap())?;
            Some((login.username.clone(), login.password.expose_secret().to_owned()))
        };
        assert_eq!(login("registry.example.com:5000"), Some(("anna".into(), "hunter2".into())));
        assert_eq!(login("docker.io"), Some(("bob".into(), "p:w".into())));
        assert_eq!(login("other.example.com"), Some(("anna".into(), "hunter2".into())));
        for none in ["helped.example.com", "part.example.com", "broken.example.com", "unknown.example.com"] {
            assert_eq!(login(none), None, "{none}");
        }
        assert!(!format!("{config:?}").contains("hunter2"));
    }

    #[test]
    fn what_is_wrong_with_a_file_is_said_without_what_is_in_it() {
        let error = DockerConfig::parse(b"{\"auths\": \"hunter2\"}").unwrap_err();
        assert!(!format!("{error:?} {error}").contains("hunter2"));
        assert!(matches!(DockerConfig::read(Path::new("/nonexistent")), Err(Error::Read { .. })));
    }
}
