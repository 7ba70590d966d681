use std::fmt;

use crate::kms::aws;

/// A key in Google Cloud KMS, as cosign has it:
/// `gcpkms://projects/P/locations/L/keyRings/R/cryptoKeys/K[/cryptoKeyVersions/N][?endpoint=HOST]`; before N also `/versions/`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct GcpReference {
    /// The name of the key, from `projects/` on.
    pub(super) key: String,
    /// The highest one that is enabled when the key is opened, if absent.
    pub(super) version: Option<u32>,
    /// A host with optional port, for a regional or private endpoint; the public one if absent.
    pub(super) endpoint: Option<String>,
}

impl GcpReference {
    /// Reads what follows `gcpkms://`; or what is wrong with it, for people.
    pub(in crate::kms) fn read(rest: &str) -> Result<Self, &'static str> {
        const FORM: &str = "write gcpkms://projects/PROJECT/locations/LOCATION/keyRings/RING/cryptoKeys/KEY, and /cryptoKeyVersions/NUMBER for a \
             version";
        let (name, query) = rest.split_once('?').map_or((rest, None), |(name, query)| (name, Some(query)));
        let parts: Vec<&str> = name.split('/').collect();
        let (path, version) = match parts.as_slice() {
            [path @ .., "cryptoKeyVersions" | "versions", version] => (path, Some(*version)),
            path => (path, None),
        };
        let ["projects", project, "locations", location, "keyRings", ring, "cryptoKeys", key] = path else { return Err(FORM) };
        // Ids of projects of an organisation's own domain hold a colon and points.
        let is_id = |text: &str| {
            (1..=128).contains(&text.len())
                && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-.:".contains(&b))
                && !text.starts_with('.')
        };
        if ![project, location, ring, key].into_iter().all(|id| is_id(id)) {
            return Err("names are of letters, digits and _ -");
        }
        let version = match version {
            Some(text) => match text.parse() {
                Ok(number) if number > 0 && !text.starts_with(['+', '0']) => Some(number),
                Ok(_) | Err(_) => return Err("a version is a number, from 1 on"),
            },
            None => None,
        };
        let mut endpoint = None;
        for pair in query.into_iter().flat_map(|query| query.split('&')) {
            match pair.split_once('=') {
                Some(("endpoint", host)) if endpoint.is_none() => {
                    // A token is given to nobody else.
                    let url = aws::endpoint_url(host)?;
                    if !url.host_str().unwrap_or_default().ends_with(".googleapis.com") && !aws::is_loopback(&url) {
                        return Err("the endpoint is none of Google's: their names end in .googleapis.com");
                    }
                    endpoint = Some(host.to_owned());
                }
                _ => return Err("the only parameter is endpoint, once: ?endpoint=cloudkms.europe-west3.rep.googleapis.com"),
            }
        }
        Ok(Self { key: path.join("/"), version, endpoint })
    }
}

impl fmt::Display for GcpReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gcpkms://{}", self.key)?;
        self.version.map_or(Ok(()), |version| write!(f, "/cryptoKeyVersions/{version}"))?;
        self.endpoint.as_ref().map_or(Ok(()), |endpoint| write!(f, "?endpoint={endpoint}"))
    }
}

#[cfg(test)]
mod tests {
    use crate::kms::KeyUri;

    const KEY: &str = "projects/p-1/locations/europe-west3/keyRings/r/cryptoKeys/k";

    #[test]
    fn references_are_read_as_cosign_has_them() {
        for (text, version, endpoint) in [
            (format!("gcpkms://{KEY}"), None, None),
            (format!("gcpkms://{KEY}/cryptoKeyVersions/12"), Some(12), None),
            (format!("gcpkms://{KEY}?endpoint=127.0.0.1:8080"), None, Some("127.0.0.1:8080")),
            (
                format!("gcpkms://{KEY}/cryptoKeyVersions/1?endpoint=cloudkms-a.p.googleapis.com"),
                Some(1),
                Some("cloudkms-a.p.googleapis.com"),
            ),
        ] {
            let uri: KeyUri = text.parse().unwrap();
            let KeyUri::GcpKms(reference) = &uri else { panic!("{text}") };
            assert_eq!((reference.key.as_str(), reference.version, reference.endpoint.as_deref()), (KEY, version, endpoint));
            assert_eq!(uri.to_string(), text);
        }
        let short: KeyUri = format!("gcpkms://{KEY}/versions/12").parse().unwrap();
        assert_eq!(short.to_string(), format!("gcpkms://{KEY}/cryptoKeyVersions/12"));
        assert!("gcpkms://projects/example.com:p/locations/l/keyRings/r/cryptoKeys/k".parse::<KeyUri>().is_ok());
    }

    #[test]
    fn what_is_no_reference_is_refused_with_its_reason() {
        for (text, part) in [
            ("projects/p".to_owned(), "cryptoKeys/KEY"),
            (format!("/{KEY}"), "cryptoKeys/KEY"),
            (format!("{KEY}/"), "cryptoKeys/KEY"),
            (format!("{KEY}/cryptoKeyVersions"), "cryptoKeys/KEY"),
            (format!("{KEY}/cryptoKeyVersions/"), "a version is"),
            (format!("{KEY}/cryptoKeyVersions/0"), "a version is"),
            (format!("{KEY}/cryptoKeyVersions/+1"), "a version is"),
            (format!("{KEY}/cryptoKeyVersions/latest"), "a version is"),
            ("projects/../locations/l/keyRings/r/cryptoKeys/k".to_owned(), "names are"),
            ("projects/p/locations/l/keyRings/r/cryptoKeys/k%2Fa".to_owned(), "names are"),
            (format!("{KEY}?version=1"), "?endpoint="),
            (format!("{KEY}?endpoint=http://kms.example.com"), "plain http"),
            (format!("{KEY}?endpoint=a.googleapis.com&endpoint=b"), "once"),
            (format!("{KEY}?endpoint=kms.example.com"), "none of Google's"),
            (format!("{KEY}?endpoint=googleapis.com.example.com"), "none of Google's"),
        ] {
            let error = format!("gcpkms://{text}").parse::<KeyUri>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error:?} does not say {part:?}");
        }
    }
}
