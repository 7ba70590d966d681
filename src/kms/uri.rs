use std::{fmt, path::PathBuf, str::FromStr};

use super::{aws, azure::AzureReference, gcp::GcpReference, pkcs11::Pkcs11Reference, vault::VaultReference};

/// Where a key is: a URI as cosign's users know them. It names a key and never holds a secret.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum KeyUri {
    /// `file:///path/key.pem`, a PKCS#8 private key on this machine.
    File(PathBuf),
    /// `awskms://[ENDPOINT]/KEY[?region=REGION]`; KEY is an id, an ARN or `alias/NAME`.
    AwsKms {
        /// Host with optional port, or a whole `http://…`/`https://…` URL; the region's public endpoint if absent.
        /// Without a scheme it is reached over https, or over plain http if it is this machine itself.
        endpoint: Option<String>,
        key: String,
        region: Option<String>,
    },
    /// `alibabakms://ENDPOINT/[INSTANCE]/KEY[/versions/VERSION][?ca=FILE&role=ARN]`, as the cosign plugin of that name has it; KEY is
    /// an id, an ARN or `alias/NAME`.
    AlibabaKms {
        /// As in `AwsKms`: the shared gateway of a region, or the dedicated one of an instance.
        endpoint: String,
        instance: Option<String>,
        key: String,
        /// The newest when the key is opened, if absent.
        version: Option<String>,
        /// PEM file with the certificate of the dedicated gateway's own authority.
        ca: Option<PathBuf>,
        /// A RAM role to take with the credentials that the environment gives.
        role: Option<String>,
    },
    /// `gcpkms://projects/…/cryptoKeys/KEY[/cryptoKeyVersions/N]`.
    GcpKms(GcpReference),
    /// `azurekms://HOST/KEY[/VERSION]`.
    AzureKms(AzureReference),
    /// `hashivault://KEY` or `openbao://KEY`: a key in a Transit engine.
    Vault(VaultReference),
    /// `pkcs11:token=LABEL;object=LABEL?module-path=PATH`: a key in a hardware security module or another token.
    Pkcs11(Pkcs11Reference),
}

/// Why a text is no key reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UriError {
    #[error("{0:?} has no scheme: write file:///path/key.pem or awskms:///alias/NAME?region=REGION")]
    NoScheme(String),
    #[error(
        "{0:?} is no key provider: this version has file://, awskms://, alibabakms://, gcpkms://, azurekms://, hashivault://, openbao:// and pkcs11:"
    )]
    UnknownScheme(String),
    #[error("{uri:?}: {what}")]
    Malformed { uri: String, what: &'static str },
    /// Its text is not repeated: it may hold a password.
    #[error("the server in a key reference stands behind a user name or password: who asks is said elsewhere")]
    Secret,
}

impl FromStr for KeyUri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        if let Some(rest) = Pkcs11Reference::after_scheme(text) {
            let malformed = |what| UriError::Malformed { uri: Pkcs11Reference::shown(text), what };
            return Pkcs11Reference::read(rest).map(Self::Pkcs11).map_err(malformed);
        }
        let (scheme, rest) = text.split_once("://").ok_or_else(|| UriError::NoScheme(text.to_owned()))?;
        if scheme != "file" && rest.contains('@') {
            return Err(UriError::Secret);
        }
        let malformed = |what| UriError::Malformed { uri: text.to_owned(), what };
        match scheme {
            "file" => {
                if !rest.starts_with('/') {
                    return Err(malformed("the path must be absolute: file:///path/key.pem has three slashes"));
                }
                Ok(Self::File(rest.into()))
            }
            "awskms" => aws_kms(rest).map_err(malformed),
            "alibabakms" => alibaba_kms(rest).map_err(malformed),
            "gcpkms" => GcpReference::read(rest).map(Self::GcpKms).map_err(malformed),
            "azurekms" => AzureReference::read(rest).map(Self::AzureKms).map_err(malformed),
            "hashivault" => VaultReference::hashivault(rest).map(Self::Vault).map_err(malformed),
            "openbao" => VaultReference::openbao(rest).map(Self::Vault).map_err(malformed),
            other => Err(UriError::UnknownScheme(other.to_owned())),
        }
    }
}

fn aws_kms(rest: &str) -> Result<KeyUri, &'static str> {
    let (rest, query) = rest.split_once('?').map_or((rest, None), |(rest, query)| (rest, Some(query)));
    let (endpoint, key) =
        endpoint_and_rest(rest).ok_or("no key: awskms:///alias/NAME has three slashes when no endpoint is named")?;
    if key.is_empty() {
        return Err("no key after the endpoint: an id, an ARN or alias/NAME");
    }
    // What AWS's interface model allows in a KeyId.
    if key.len() > 2048 || !key.bytes().all(|b| b.is_ascii_alphanumeric() || b"/_-:".contains(&b)) {
        return Err("a key is an id, an ARN or alias/NAME, of letters, digits and / _ - :");
    }
    let mut region = None;
    for pair in query.into_iter().flat_map(|query| query.split('&')) {
        match pair.split_once('=') {
            Some(("region", value)) if aws::is_region(value) && region.is_none() => region = Some(value.to_owned()),
            _ => return Err("the only parameter is region, once: ?region=eu-west-1"),
        }
    }
    if key.starts_with("arn:") {
        let in_arn = aws::region_of_arn(key).ok_or("that is no ARN of a KMS key: arn:aws:kms:REGION:ACCOUNT:key/ID")?;
        if region.as_deref().is_some_and(|region| region != in_arn) {
            return Err("the region in the ARN and ?region= differ: leave ?region= out");
        }
    }
    let endpoint = (!endpoint.is_empty()).then(|| endpoint.to_owned());
    if let Some(endpoint) = &endpoint {
        aws::endpoint_url(endpoint)?;
    }
    Ok(KeyUri::AwsKms { endpoint, key: key.to_owned(), region })
}

fn alibaba_kms(rest: &str) -> Result<KeyUri, &'static str> {
    const FORM: &str =
        "write alibabakms://ENDPOINT/INSTANCE/alias/NAME, or with two slashes after the endpoint if there is no instance";
    let (rest, query) = rest.split_once('?').map_or((rest, None), |(rest, query)| (rest, Some(query)));
    let (endpoint, rest) = endpoint_and_rest(rest).ok_or(FORM)?;
    if endpoint.is_empty() {
        return Err("no endpoint: kms.REGION.aliyuncs.com, or INSTANCE.cryptoservice.kms.aliyuncs.com");
    }
    aws::endpoint_url(endpoint)?;
    let (instance, rest) = rest.split_once('/').ok_or(FORM)?;
    let (key, version) = rest.split_once("/versions/").map_or((rest, None), |(key, version)| (key, Some(version)));
    let is_plain = |text: &str| text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b)) && text.len() <= 128;
    if !is_plain(instance) {
        return Err(FORM);
    }
    // What the interface allows in a KeyId: `acs:kms:REGION:ACCOUNT:key/ID` for another account's.
    if key.is_empty() || key.len() > 512 || !key.bytes().all(|b| b.is_ascii_alphanumeric() || b"/_-:".contains(&b)) {
        return Err("a key is an id, an ARN or alias/NAME, of letters, digits and / _ - :");
    }
    if version.is_some_and(|version| version.is_empty() || !is_plain(version)) {
        return Err("a version is an id of letters, digits and -");
    }
    let (mut ca, mut role) = (None, None);
    for pair in query.into_iter().flat_map(|query| query.split('&')) {
        match pair.split_once('=') {
            Some(("ca", path)) if path.starts_with('/') && ca.is_none() => ca = Some(path.into()),
            Some(("role", arn)) if arn.starts_with("acs:ram::") && role.is_none() => role = Some(arn.to_owned()),
            _ => return Err("the parameters are ca and role, each once: ?ca=/path/ca.pem&role=acs:ram::ACCOUNT:role/NAME"),
        }
    }
    let instance = (!instance.is_empty()).then(|| instance.to_owned());
    let (endpoint, key, version) = (endpoint.to_owned(), key.to_owned(), version.map(str::to_owned));
    Ok(KeyUri::AlibabaKms { endpoint, instance, key, version, ca, role })
}

/// Apart at the first slash that is not in a scheme.
fn endpoint_and_rest(text: &str) -> Option<(&str, &str)> {
    let after_scheme = text.find("://").map_or(0, |at| at + 3);
    let slash = after_scheme + text[after_scheme..].find('/')?;
    Some((&text[..slash], &text[slash + 1..]))
}

impl fmt::Display for KeyUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "file://{}", path.display()),
            Self::GcpKms(reference) => reference.fmt(f),
            Self::AzureKms(reference) => reference.fmt(f),
            Self::Vault(reference) => reference.fmt(f),
            Self::Pkcs11(reference) => reference.fmt(f),
            Self::AwsKms { endpoint, key, region } => {
                write!(f, "awskms://{}/{key}", endpoint.as_deref().unwrap_or_default())?;
                region.as_ref().map_or(Ok(()), |region| write!(f, "?region={region}"))
            }
            Self::AlibabaKms { endpoint, instance, key, version, ca, role } => {
                write!(f, "alibabakms://{endpoint}/{}/{key}", instance.as_deref().unwrap_or_default())?;
                version.as_ref().map_or(Ok(()), |version| write!(f, "/versions/{version}"))?;
                let ca = ca.as_ref().map(|ca| format!("ca={}", ca.display()));
                let role = role.as_ref().map(|role| format!("role={role}"));
                let query: Vec<_> = [ca, role].into_iter().flatten().collect();
                if query.is_empty() { Ok(()) } else { write!(f, "?{}", query.join("&")) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_read_and_written_back() {
        for (text, endpoint, key, region) in [
            ("awskms:///alias/release", None, "alias/release", None),
            ("awskms:///alias/release?region=eu-west-1", None, "alias/release", Some("eu-west-1")),
            (
                "awskms:///arn:aws:kms:eu-west-1:111122223333:key/mrk-1",
                None,
                "arn:aws:kms:eu-west-1:111122223333:key/mrk-1",
                None,
            ),
            ("awskms://kms.internal:8443/1234abcd-12ab", Some("kms.internal:8443"), "1234abcd-12ab", None),
            ("awskms://localhost:4566/alias/a/b", Some("localhost:4566"), "alias/a/b", None),
            ("awskms://http://127.0.0.1:4566/alias/a", Some("http://127.0.0.1:4566"), "alias/a", None),
            ("awskms://[::1]:4566/alias/a", Some("[::1]:4566"), "alias/a", None),
        ] {
            let uri: KeyUri = text.parse().unwrap();
            let expected =
                KeyUri::AwsKms { endpoint: endpoint.map(str::to_owned), key: key.to_owned(), region: region.map(str::to_owned) };
            assert_eq!(uri, expected);
            assert_eq!(uri.to_string(), text);
        }
        assert_eq!("file:///a/key.pem".parse(), Ok(KeyUri::File("/a/key.pem".into())));
    }

    #[test]
    fn alibaba_references_are_read_as_cosigns_plugin_has_them() {
        let read = |text: &str| {
            let uri: KeyUri = text.parse().unwrap();
            assert_eq!(uri.to_string(), text);
            let KeyUri::AlibabaKms { endpoint, instance, key, version, ca, role } = uri else { panic!("{text}") };
            (
                endpoint,
                instance.unwrap_or_default(),
                key,
                version.unwrap_or_default(),
                ca.unwrap_or_default(),
                role.unwrap_or_default(),
            )
        };
        let (shared, own) = ("kms.cn-hangzhou.aliyuncs.com", "kst-hzz1.cryptoservice.kms.aliyuncs.com");
        for (text, endpoint, instance, key, version) in [
            (format!("alibabakms://{shared}//alias/a/b"), shared, "", "alias/a/b", ""),
            (format!("alibabakms://{shared}/kst-1/key-hzz1"), shared, "kst-1", "key-hzz1", ""),
            (format!("alibabakms://{shared}//key-hzz1/versions/2ab1-77"), shared, "", "key-hzz1", "2ab1-77"),
            (format!("alibabakms://{own}/kst-hzz1/alias/a/versions/v1"), own, "kst-hzz1", "alias/a", "v1"),
            (format!("alibabakms://{shared}//acs:kms:cn-hangzhou:1:key/k"), shared, "", "acs:kms:cn-hangzhou:1:key/k", ""),
        ] {
            let expected =
                (endpoint.to_owned(), instance.to_owned(), key.to_owned(), version.to_owned(), PathBuf::new(), String::new());
            assert_eq!(read(&text), expected);
        }
        let (.., ca, role) = read("alibabakms://kms.cn-hangzhou.aliyuncs.com//k?ca=/a/ca.pem&role=acs:ram::1:role/signer");
        assert_eq!((ca, role.as_str()), ("/a/ca.pem".into(), "acs:ram::1:role/signer"));
        for (text, part) in [
            ("alibabakms:////k", "no endpoint"),
            ("alibabakms://kms.cn-hangzhou.aliyuncs.com", "two slashes"),
            ("alibabakms://kms.cn-hangzhou.aliyuncs.com/k", "two slashes"),
            ("alibabakms://kms.cn-hangzhou.aliyuncs.com//", "a key is"),
            ("alibabakms://kms.cn-hangzhou.aliyuncs.com//k/versions/", "a version is"),
            ("alibabakms://kms.cn-hangzhou.aliyuncs.com//k/versions/a/b", "a version is"),
            ("alibabakms://kms.cn-hangzhou.aliyuncs.com//k?ca=ca.pem", "?ca="),
            ("alibabakms://kms.cn-hangzhou.aliyuncs.com//k?token=hunter2", "?ca="),
            ("alibabakms://http://kms.cn-hangzhou.aliyuncs.com//k", "plain http"),
            ("alibabakms://me:x@kms.cn-hangzhou.aliyuncs.com//k", "password"),
        ] {
            let error = text.parse::<KeyUri>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error:?} does not say {part:?}");
        }
    }

    #[test]
    fn what_is_no_reference_is_refused_with_its_reason() {
        for (text, part) in [
            ("/a/key.pem", "no scheme"),
            ("ftpkms://projects/p", "is no key provider"),
            ("file://key.pem", "three slashes"),
            ("awskms://alias", "three slashes"),
            ("awskms:///", "no key after"),
            ("awskms://http://127.0.0.1:1", "no key"),
            ("awskms:///alias/a b", "letters, digits"),
            ("awskms:///alias/a?region=", "?region="),
            ("awskms:///alias/a?region=eu-west-1.evil.com/", "?region="),
            ("awskms:///alias/a?region=a&region=b", "once"),
            ("awskms:///alias/a?profile=x", "?region="),
            ("awskms:///arn:aws:s3:::bucket", "no ARN of a KMS key"),
            ("awskms:///arn:aws:kms:eu-west-1:1:key/a?region=us-east-1", "differ"),
            ("awskms://http://kms.example.com/alias/a", "plain http"),
            ("awskms://ftp://kms.example.com/alias/a", "http"),
            ("awskms://:80/alias/a", "endpoint"),
        ] {
            let error = text.parse::<KeyUri>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error:?} does not say {part:?}");
        }
    }

    #[test]
    fn a_password_in_an_endpoint_is_refused_and_not_repeated() {
        let error = "awskms://me:hunter2@kms.example.com/alias/a".parse::<KeyUri>().unwrap_err();
        assert!(!format!("{error} {error:?}").contains("hunter2"));
    }
}
