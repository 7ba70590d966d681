use std::fmt;

use reqwest::Url;

/// A key in the Transit engine of a Vault or an OpenBao: `hashivault://KEY` or `openbao://KEY`, as cosign has it. What differs
/// from what the environment says stands in its query: `?address=URL&namespace=NAMESPACE&mount=PATH&version=NUMBER`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct VaultReference {
    pub(super) flavor: Flavor,
    pub(super) key: String,
    /// The server's URL, without a slash at its end.
    pub(super) address: Option<String>,
    pub(super) namespace: Option<String>,
    /// Where the Transit engine is mounted.
    pub(super) mount: Option<String>,
    /// The key's newest version when it is opened, if absent.
    pub(super) version: Option<u32>,
}

/// Which of the two it is called: they speak the same, and read each other's environment variables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Flavor {
    HashiVault,
    OpenBao,
}

impl Flavor {
    fn scheme(self) -> &'static str {
        match self {
            Self::HashiVault => "hashivault",
            Self::OpenBao => "openbao",
        }
    }
}

impl VaultReference {
    /// Reads what follows `hashivault://`; or what is wrong with it, for people.
    pub(in crate::kms) fn hashivault(rest: &str) -> Result<Self, &'static str> {
        Self::read(Flavor::HashiVault, rest)
    }

    /// Reads what follows `openbao://`; or what is wrong with it, for people.
    pub(in crate::kms) fn openbao(rest: &str) -> Result<Self, &'static str> {
        Self::read(Flavor::OpenBao, rest)
    }

    fn read(flavor: Flavor, rest: &str) -> Result<Self, &'static str> {
        let (key, query) = rest.split_once('?').map_or((rest, None), |(key, query)| (key, Some(query)));
        // The names that the Transit engine's own paths take.
        let is_word = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric() || c == '_');
        if !is_name(key) || !is_word(key.chars().next()) || !is_word(key.chars().next_back()) {
            return Err(
                "after :// stands the name of a Transit key, of letters, digits and _ - . between them; the engine's path and \
                        the server's address go into ?mount= and ?address=",
            );
        }
        let mut reference = Self { flavor, key: key.to_owned(), address: None, namespace: None, mount: None, version: None };
        for pair in query.into_iter().flat_map(|query| query.split('&')) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let (slot, value) = match name {
                "address" => (&mut reference.address, address(value).map(|url| shown(&url))?),
                "namespace" => (&mut reference.namespace, path(value).ok_or("?namespace= is the path of one: team-a/images")?),
                "mount" => (&mut reference.mount, path(value).ok_or("?mount= is the path of a Transit engine: transit")?),
                "version" => {
                    let version = value.parse().ok().filter(|version| *version > 0);
                    let version = version.ok_or("?version= is the number of a version of the key, from 1 on")?;
                    if reference.version.replace(version).is_some() {
                        return Err(TWICE);
                    }
                    continue;
                }
                _ => return Err("the parameters are address, namespace, mount and version, each at most once, without spaces"),
            };
            if slot.replace(value).is_some() {
                return Err(TWICE);
            }
        }
        Ok(reference)
    }
}

const TWICE: &str = "a parameter stands there twice";

/// Reads a server's URL. A path is taken, for servers behind one; a user, query or fragment is not.
pub(super) fn address(text: &str) -> Result<Url, &'static str> {
    const NO_ADDRESS: &str = "the address is a URL of https:// (or http://) and a host with optional port";
    if text.contains('@') {
        return Err("the address holds a user name or password: a token or a login says who asks");
    }
    let url: Url = text.parse().map_err(|_| NO_ADDRESS)?;
    if !matches!(url.scheme(), "http" | "https") || !url.has_host() || url.query().is_some() || url.fragment().is_some() {
        return Err(NO_ADDRESS);
    }
    Ok(url)
}

/// An address as it is written: without a slash at its end.
pub(super) fn shown(address: &Url) -> String {
    address.as_str().trim_end_matches('/').to_owned()
}

/// The path of a mount or a namespace, without slashes around it; `None` if it is none.
pub(crate) fn path(text: &str) -> Option<String> {
    let path = text.trim_matches('/');
    let is_segment = |segment: &str| is_name(segment) && segment != "." && segment != "..";
    (path.len() <= 256 && path.split('/').all(is_segment)).then(|| path.to_owned())
}

fn is_name(text: &str) -> bool {
    (1..=128).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-.".contains(&b))
}

impl fmt::Display for VaultReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.flavor.scheme(), self.key)?;
        let version = self.version.map(|version| version.to_string());
        let parameters =
            [("address", &self.address), ("namespace", &self.namespace), ("mount", &self.mount), ("version", &version)];
        let mut mark = '?';
        for (name, value) in parameters {
            if let Some(value) = value {
                write!(f, "{mark}{name}={value}")?;
                mark = '&';
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crate::kms::KeyUri;

    #[test]
    fn references_are_read_and_written_back() {
        for text in [
            "hashivault://release",
            "openbao://release",
            "hashivault://a",
            "hashivault://team_a.images-1?version=3",
            "openbao://r?address=https://bao.internal:8200&namespace=team-a/images&mount=kv/transit&version=12",
            "hashivault://r?address=http://127.0.0.1:8200",
            "hashivault://r?address=https://gate.internal/vault&mount=t",
        ] {
            assert_eq!(text.parse::<KeyUri>().unwrap().to_string(), text);
        }
        let written = "hashivault://r?version=2&mount=/t/&address=https://v.internal/".parse::<KeyUri>().unwrap().to_string();
        assert_eq!(written, "hashivault://r?address=https://v.internal&mount=t&version=2");
    }

    #[test]
    fn what_is_no_reference_is_refused_with_its_reason() {
        for (text, part) in [
            ("hashivault://", "name of a Transit key"),
            ("hashivault://a/b", "?mount="),
            ("hashivault://-a", "name of a Transit key"),
            ("hashivault://a.", "name of a Transit key"),
            ("hashivault://a b", "name of a Transit key"),
            ("hashivault://a%2Fb", "name of a Transit key"),
            ("openbao://..", "name of a Transit key"),
            ("openbao://a?version=0", "from 1 on"),
            ("openbao://a?version=latest", "from 1 on"),
            ("openbao://a?version=1&version=2", "twice"),
            ("openbao://a?mount=a&mount=a", "twice"),
            ("openbao://a?mount=", "path of a Transit engine"),
            ("openbao://a?mount=a/../sys", "path of a Transit engine"),
            ("openbao://a?mount=a//b", "path of a Transit engine"),
            ("openbao://a?namespace=a%2f..", "?namespace="),
            ("openbao://a?address=vault:8200", "https://"),
            ("openbao://a?address=ftp://vault", "https://"),
            ("openbao://a?address=https://vault?x", "https://"),
            ("openbao://a?token=s.1234", "the parameters are"),
            ("openbao://a?", "the parameters are"),
        ] {
            let error = text.parse::<KeyUri>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error:?} does not say {part:?}");
        }
    }

    #[test]
    fn a_password_in_an_address_is_refused_and_not_repeated() {
        let error = "hashivault://r?address=https://me:hunter2@vault.internal".parse::<KeyUri>().unwrap_err();
        assert!(!format!("{error} {error:?}").contains("hunter2"), "{error:?}");
    }
}
