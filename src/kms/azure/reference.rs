use std::fmt;

use reqwest::Url;

use crate::kms::aws::{endpoint_url, is_loopback};

/// A key in Azure Key Vault or a Managed HSM, as cosign has it: `azurekms://HOST/KEY[/VERSION]`. The host is the whole name,
/// `NAME.vault.azure.net`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct AzureReference {
    pub(super) vault: String,
    pub(super) key: String,
    /// The current one when the key is opened, if absent.
    pub(super) version: Option<String>,
}

/// The part of Azure that a vault is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cloud {
    /// What the names of vaults end in, which is also what tokens for them are for.
    pub(super) domain: &'static str,
    /// Who issues tokens, unless `AZURE_AUTHORITY_HOST` says otherwise.
    pub(super) authority: &'static str,
}

const CLOUDS: [Cloud; 6] = [
    Cloud { domain: "vault.azure.net", authority: "login.microsoftonline.com" },
    Cloud { domain: "managedhsm.azure.net", authority: "login.microsoftonline.com" },
    Cloud { domain: "vault.azure.cn", authority: "login.chinacloudapi.cn" },
    Cloud { domain: "managedhsm.azure.cn", authority: "login.chinacloudapi.cn" },
    Cloud { domain: "vault.usgovcloudapi.net", authority: "login.microsoftonline.us" },
    Cloud { domain: "managedhsm.usgovcloudapi.net", authority: "login.microsoftonline.us" },
];

impl AzureReference {
    /// Reads what follows `azurekms://`; or what is wrong with it, for people.
    pub(in crate::kms) fn read(rest: &str) -> Result<Self, &'static str> {
        const FORM: &str = "write azurekms://NAME.vault.azure.net/KEY, and /VERSION for a version";
        let after_scheme = rest.find("://").map_or(0, |at| at + 3);
        let slash = rest[after_scheme..].find('/').ok_or(FORM)?;
        let (vault, path) = rest.split_at(after_scheme + slash);
        let parts: Vec<&str> = path[1..].split('/').collect();
        let (key, version) = match parts[..] {
            [key] => (key, None),
            [key, version] => (key, Some(version)),
            _ => return Err(FORM),
        };
        let is_name =
            |text: &str| (1..=127).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        if !is_name(key) {
            return Err("a key's name is of letters, digits and -");
        }
        if version.is_some_and(|version| !is_name(version) || version.contains('-')) {
            return Err("a version is the 32 digits and letters that end the key's identifier");
        }
        let reference = Self { vault: vault.to_owned(), key: key.to_owned(), version: version.map(str::to_owned) };
        reference.place()?;
        Ok(reference)
    }

    /// The vault, and the cloud that it is in. A token is given to no host that is in none, except this machine.
    pub(super) fn place(&self) -> Result<(Url, Cloud), &'static str> {
        let url = endpoint_url(&self.vault)?;
        let host = url.host_str().unwrap_or_default();
        let of_name = |cloud: &Cloud| {
            let name = host.strip_suffix(cloud.domain).and_then(|rest| rest.strip_suffix('.'));
            name.is_some_and(|name| !name.is_empty() && !name.contains('.'))
        };
        let cloud = CLOUDS.into_iter().find(of_name).or_else(|| is_loopback(&url).then_some(CLOUDS[0])).ok_or(
            "the host is no vault's: NAME.vault.azure.net or NAME.managedhsm.azure.net, in China .azure.cn, for the government of the \
             United States .usgovcloudapi.net",
        )?;
        Ok((url, cloud))
    }
}

impl fmt::Display for AzureReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "azurekms://{}/{}", self.vault, self.key)?;
        self.version.as_ref().map_or(Ok(()), |version| write!(f, "/{version}"))
    }
}

#[cfg(test)]
mod tests {
    use crate::kms::KeyUri;

    #[test]
    fn references_are_read_as_cosign_has_them_and_the_host_says_which_cloud() {
        const VERSION: &str = "0123456789abcdef0123456789abcdef";
        for (text, version, url, domain, authority) in [
            (
                "azurekms://a.vault.azure.net/k".to_owned(),
                None,
                "https://a.vault.azure.net/",
                "vault.azure.net",
                "login.microsoftonline.com",
            ),
            (
                format!("azurekms://a.vault.azure.cn/k/{VERSION}"),
                Some(VERSION),
                "https://a.vault.azure.cn/",
                "vault.azure.cn",
                "login.chinacloudapi.cn",
            ),
            (
                "azurekms://a.vault.usgovcloudapi.net/k".to_owned(),
                None,
                "https://a.vault.usgovcloudapi.net/",
                "vault.usgovcloudapi.net",
                "login.microsoftonline.us",
            ),
            (
                "azurekms://a.managedhsm.azure.net/k".to_owned(),
                None,
                "https://a.managedhsm.azure.net/",
                "managedhsm.azure.net",
                "login.microsoftonline.com",
            ),
            (
                "azurekms://127.0.0.1:81/k".to_owned(),
                None,
                "http://127.0.0.1:81/",
                "vault.azure.net",
                "login.microsoftonline.com",
            ),
            (
                "azurekms://http://127.0.0.1:81/k/1a".to_owned(),
                Some("1a"),
                "http://127.0.0.1:81/",
                "vault.azure.net",
                "login.microsoftonline.com",
            ),
        ] {
            let uri: KeyUri = text.parse().unwrap();
            assert_eq!(uri.to_string(), text);
            let KeyUri::AzureKms(reference) = uri else { panic!("{text}") };
            assert_eq!((reference.key.as_str(), reference.version.as_deref()), ("k", version));
            let (place, cloud) = reference.place().unwrap();
            assert_eq!((place.as_str(), cloud.domain, cloud.authority), (url, domain, authority), "{text}");
        }
    }

    #[test]
    fn what_is_no_reference_is_refused_with_its_reason() {
        for (text, part) in [
            ("a.vault.azure.net", "NAME.vault.azure.net/KEY"),
            ("a.vault.azure.net/", "a key's name"),
            ("a.vault.azure.net/keys/k/1", "NAME.vault.azure.net/KEY"),
            ("a.vault.azure.net/k/", "a version is"),
            ("a.vault.azure.net/k?version=1", "a key's name"),
            ("a.vault.azure.net/..", "a key's name"),
            ("/k", "endpoint"),
            ("vault.azure.net/k", "no vault's"),
            ("a.b.vault.azure.net/k", "no vault's"),
            ("avault.azure.net/k", "no vault's"),
            ("a.vault.azure.net.evil.example/k", "no vault's"),
            ("vault.example.com/k", "no vault's"),
            ("http://a.vault.azure.net/k", "plain http"),
            ("me:x@a.vault.azure.net/k", "password"),
        ] {
            let error = format!("azurekms://{text}").parse::<KeyUri>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error:?} does not say {part:?}");
        }
    }
}
