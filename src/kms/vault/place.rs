use std::{fs::File, io::Read, path::Path};

use reqwest::{Certificate, Url};

use super::reference::{Flavor, VaultReference, address, path, shown};
use crate::kms::{
    Environment,
    aws::is_loopback,
    exchange::{self, Patience},
};

/// Which server, and which engine on it.
#[derive(Debug)]
pub(super) struct Place {
    address: Url,
    pub(super) namespace: Option<String>,
    pub(super) mount: String,
}

impl Place {
    /// What the reference says, else the environment: `VAULT_ADDR`, `VAULT_NAMESPACE` (or `BAO_…`), `TRANSIT_SECRET_ENGINE_PATH`.
    /// An error is for people.
    pub(super) fn of(reference: &VaultReference, environment: &Environment) -> Result<Self, String> {
        let variable = |name: &str| variable(reference.flavor, environment, name);
        // Values are not repeated: an address may hold a password.
        let address = match (&reference.address, variable("ADDR")) {
            (Some(written), _) => address(written).map_err(str::to_owned)?,
            (None, Some((name, value))) => address(&value).map_err(|what| format!("{name}: {what}"))?,
            (None, None) => {
                let what =
                    "where the server is is not known: set VAULT_ADDR (or BAO_ADDR), or add ?address=https://HOST:8200 to it";
                return Err(what.to_owned());
            }
        };
        let namespace = match (&reference.namespace, variable("NAMESPACE")) {
            (Some(written), _) => Some(written.clone()),
            (None, Some((name, value))) => {
                Some(path(&value).ok_or_else(|| format!("{name} is no path of a namespace: team-a/images"))?)
            }
            (None, None) => None,
        };
        let mount = match (&reference.mount, environment.get("TRANSIT_SECRET_ENGINE_PATH")) {
            (Some(written), _) => written.clone(),
            (None, Some(value)) => path(&value).ok_or("TRANSIT_SECRET_ENGINE_PATH is no path of a Transit engine: transit")?,
            (None, None) => "transit".to_owned(),
        };
        Ok(Self { address, namespace, mount })
    }

    /// The URL of an API path.
    pub(super) fn url(&self, path: &str) -> Url {
        format!("{}/v1/{path}", self.address()).parse().expect("a URL followed by names that were checked is a URL")
    }

    pub(super) fn address(&self) -> String {
        shown(&self.address)
    }

    /// A name for one version of a key: `https://vault.internal:8200/v1/team-a/transit/keys/release:v3`.
    pub(super) fn name(&self, key: &str, version: u32) -> String {
        let namespace = self.namespace.as_ref().map(|namespace| format!("{namespace}/")).unwrap_or_default();
        format!("{}/v1/{namespace}{}/keys/{key}:v{version}", self.address(), self.mount)
    }

    /// Whether what is sent could be read on the way.
    pub(super) fn is_in_the_clear(&self) -> bool {
        self.address.scheme() == "http" && !is_loopback(&self.address)
    }

    /// A client for the server. `VAULT_CACERT` (or `BAO_CACERT`) names a PEM bundle: with it, those authorities count and no
    /// others, as in the servers' own tools.
    pub(super) fn http(
        &self,
        reference: &VaultReference,
        environment: &Environment,
        patience: Patience,
    ) -> Result<reqwest::Client, String> {
        let mut client = exchange::client(patience.connect, patience.attempt);
        if is_loopback(&self.address) {
            client = client.no_proxy();
        }
        if let Some((name, bundle)) = variable(reference.flavor, environment, "CACERT") {
            client = client.tls_certs_only(authorities(Path::new(&bundle)).map_err(|what| format!("{name}: {bundle} {what}"))?);
        }
        client.build().map_err(|error| format!("no connection to a server can be set up here: {error}"))
    }
}

/// `VAULT_NAME` or `BAO_NAME`, and its name: first that of the flavor that the reference names.
pub(super) fn variable(flavor: Flavor, environment: &Environment, name: &str) -> Option<(String, String)> {
    let prefixes = match flavor {
        Flavor::HashiVault => ["VAULT", "BAO"],
        Flavor::OpenBao => ["BAO", "VAULT"],
    };
    let named = |prefix| {
        let name = format!("{prefix}_{name}");
        environment.get(&name).map(|value| (name, value))
    };
    prefixes.into_iter().find_map(named)
}

fn authorities(bundle: &Path) -> Result<Vec<Certificate>, String> {
    const LARGEST_FILE: u64 = 4 * 1024 * 1024;
    let mut pem = Vec::new();
    let read = File::open(bundle).and_then(|file| file.take(LARGEST_FILE).read_to_end(&mut pem));
    read.map_err(|error| format!("cannot be read: {error}"))?;
    match Certificate::from_pem_bundle(&pem) {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        _ => Err("holds no certificate in PEM".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kms::KeyUri;

    fn place<const N: usize>(uri: &str, variables: [(&str, &str); N]) -> Result<String, String> {
        let Ok(KeyUri::Vault(reference)) = uri.parse() else { panic!("{uri} is no reference") };
        let environment = Environment::of(variables);
        let place = Place::of(&reference, &environment)?;
        place.http(&reference, &environment, Patience::USUAL)?;
        Ok(place.name("k", 7))
    }

    #[test]
    fn the_reference_comes_before_the_environment() {
        let all = [
            ("VAULT_ADDR", "https://vault.internal:8200/"),
            ("BAO_ADDR", "https://bao.internal"),
            ("VAULT_NAMESPACE", "team-a/"),
            ("TRANSIT_SECRET_ENGINE_PATH", "engines/transit"),
        ];
        for (uri, expected) in [
            ("hashivault://k", "https://vault.internal:8200/v1/team-a/engines/transit/keys/k:v7"),
            ("openbao://k", "https://bao.internal/v1/team-a/engines/transit/keys/k:v7"),
            ("hashivault://k?address=http://127.0.0.1:1&namespace=b&mount=t", "http://127.0.0.1:1/v1/b/t/keys/k:v7"),
            (
                "hashivault://k?address=https://gate.internal/vault",
                "https://gate.internal/vault/v1/team-a/engines/transit/keys/k:v7",
            ),
        ] {
            assert_eq!(place(uri, all).unwrap(), expected);
        }
        assert_eq!(place("hashivault://k", [("BAO_ADDR", "https://b")]).unwrap(), "https://b/v1/transit/keys/k:v7");
        assert_eq!(place("openbao://k", [("VAULT_ADDR", "https://v")]).unwrap(), "https://v/v1/transit/keys/k:v7");
    }

    #[test]
    fn what_the_environment_says_wrongly_is_named_and_not_repeated() {
        let good = ("VAULT_ADDR", "https://vault.internal");
        for (variables, part) in [
            ([("HOME", "/"), ("", "")], "set VAULT_ADDR"),
            ([("VAULT_ADDR", "vault.internal:8200"), ("", "")], "VAULT_ADDR: the address is a URL"),
            ([("VAULT_ADDR", "https://me:hunter2@vault.internal"), ("", "")], "VAULT_ADDR: the address holds"),
            ([good, ("VAULT_NAMESPACE", "a b")], "VAULT_NAMESPACE is no path"),
            ([good, ("TRANSIT_SECRET_ENGINE_PATH", "../sys")], "TRANSIT_SECRET_ENGINE_PATH is no path"),
            ([good, ("VAULT_CACERT", "/nonexistent/ca.pem")], "VAULT_CACERT: /nonexistent/ca.pem cannot be read"),
            ([good, ("BAO_CACERT", "/dev/null")], "BAO_CACERT: /dev/null holds no certificate"),
        ] {
            let error = place("hashivault://k", variables).unwrap_err();
            assert!(error.contains(part) && !error.contains("hunter2"), "{error:?} does not say {part:?}");
        }
    }

    #[test]
    fn only_a_plain_address_elsewhere_can_be_read_on_the_way() {
        for (address, expected) in
            [("http://127.0.0.1:8200", false), ("http://[::1]:8200", false), ("https://v", false), ("http://v:8200", true)]
        {
            let Ok(KeyUri::Vault(reference)) = format!("openbao://k?address={address}").parse() else { panic!("{address}") };
            assert_eq!(Place::of(&reference, &Environment::of([])).unwrap().is_in_the_clear(), expected, "{address}");
        }
    }
}
