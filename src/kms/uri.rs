use std::{fmt, path::PathBuf, str::FromStr};

/// Where a key is: a URI as cosign's users know them. It names a key and never holds a secret.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum KeyUri {
    /// `file:///path/key.pem`, a PKCS#8 private key on this machine.
    File(PathBuf),
    /// `awskms://[ENDPOINT]/KEY[?region=REGION]`; KEY is an id, an ARN or `alias/NAME`.
    AwsKms {
        /// Host with optional port, or a whole `http://…`/`https://…` URL; the region's public endpoint if absent.
        endpoint: Option<String>,
        key: String,
        region: Option<String>,
    },
}

/// Why a text is no key reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UriError {
    #[error("{0:?} has no scheme: write file:///path/key.pem or awskms:///alias/NAME?region=REGION")]
    NoScheme(String),
    #[error("{0:?} is no key provider: this version has file:// and awskms://")]
    UnknownScheme(String),
    #[error("{uri:?}: {what}")]
    Malformed { uri: String, what: &'static str },
}

impl FromStr for KeyUri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        let (scheme, rest) = text.split_once("://").ok_or_else(|| UriError::NoScheme(text.to_owned()))?;
        let malformed = |what| UriError::Malformed { uri: text.to_owned(), what };
        match scheme {
            "file" => {
                if !rest.starts_with('/') {
                    return Err(malformed("the path must be absolute: file:///path/key.pem has three slashes"));
                }
                Ok(Self::File(rest.into()))
            }
            "awskms" => {
                let (rest, query) = rest.split_once('?').map_or((rest, None), |(rest, query)| (rest, Some(query)));
                let (endpoint, key) = rest
                    .split_once('/')
                    .ok_or_else(|| malformed("no key: awskms:///alias/NAME has three slashes when no endpoint is named"))?;
                if key.is_empty() {
                    return Err(malformed("no key after the endpoint: an id, an ARN or alias/NAME"));
                }
                let mut region = None;
                for pair in query.into_iter().flat_map(|query| query.split('&')) {
                    match pair.split_once('=') {
                        Some(("region", value)) if !value.is_empty() => region = Some(value.to_owned()),
                        _ => return Err(malformed("the only parameter is region: ?region=eu-west-1")),
                    }
                }
                let endpoint = (!endpoint.is_empty()).then(|| endpoint.to_owned());
                Ok(Self::AwsKms { endpoint, key: key.to_owned(), region })
            }
            other => Err(UriError::UnknownScheme(other.to_owned())),
        }
    }
}

impl fmt::Display for KeyUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "file://{}", path.display()),
            Self::AwsKms { endpoint, key, region } => {
                write!(f, "awskms://{}/{key}", endpoint.as_deref().unwrap_or_default())?;
                region.as_ref().map_or(Ok(()), |region| write!(f, "?region={region}"))
            }
        }
    }
}
