use std::{net::IpAddr, sync::Arc};

use reqwest::Url;

use super::credentials::setting_of_profile;
use crate::kms::{Environment, Error, KeyUri};

/// Where requests go, and for which region they are signed.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) endpoint: Url,
    pub(super) region: String,
}

impl Place {
    /// The region: of the ARN, `?region=`, `AWS_REGION`, `AWS_DEFAULT_REGION`, the profile's. The endpoint: of the reference,
    /// `AWS_ENDPOINT_URL_KMS`, `AWS_ENDPOINT_URL`, the region's public one.
    pub(super) fn of(uri: &KeyUri, environment: &Environment) -> Result<Self, Error> {
        let KeyUri::AwsKms { endpoint, key, region } = uri else { unreachable!("kms::open chose by the kind of URI") };
        let misconfigured = |what: String| Error::Misconfigured { key: Arc::new(uri.clone()), what };
        let region = region_of_arn(key)
            .map(str::to_owned)
            .or_else(|| region.clone())
            .or_else(|| environment.get("AWS_REGION"))
            .or_else(|| environment.get("AWS_DEFAULT_REGION"))
            .or_else(|| setting_of_profile(environment, "region"))
            .ok_or_else(|| misconfigured("no region is known: add ?region=REGION to it, or set AWS_REGION".to_owned()))?;
        if !is_region(&region) {
            return Err(misconfigured(format!("{region:?} is no region: add ?region=REGION to it, or correct AWS_REGION")));
        }
        let named =
            ["AWS_ENDPOINT_URL_KMS", "AWS_ENDPOINT_URL"].into_iter().find_map(|name| Some((name, environment.get(name)?)));
        let fips = wants_fips(environment).map_err(misconfigured)?;
        let is_public = endpoint.is_none() && named.is_none();
        let endpoint = match (endpoint, named) {
            (Some(endpoint), _) => endpoint_url(endpoint).map_err(|what| misconfigured(what.to_owned()))?,
            // The value is not repeated: it may hold a password.
            (None, Some((name, url))) => endpoint_url(&url).map_err(|what| misconfigured(format!("{name}: {what}")))?,
            (None, None) => public("kms", &region, fips),
        };
        if fips && !is_public {
            return Err(misconfigured(NO_FIPS.to_owned()));
        }
        Ok(Self { endpoint, region })
    }
}

/// Where STS is, and for which region requests to it are signed: `AWS_REGION`, `AWS_DEFAULT_REGION`, the profile's, or else the
/// key's. Always the region's own: the global one is in one place of the world only.
pub(super) fn sts(environment: &Environment, region_of_key: &str) -> Result<(Url, String), String> {
    let region = environment
        .get("AWS_REGION")
        .or_else(|| environment.get("AWS_DEFAULT_REGION"))
        .or_else(|| setting_of_profile(environment, "region"))
        .unwrap_or_else(|| region_of_key.to_owned());
    if !is_region(&region) {
        return Err("AWS_REGION is no region: correct it".to_owned());
    }
    let fips = wants_fips(environment)?;
    let named = ["AWS_ENDPOINT_URL_STS", "AWS_ENDPOINT_URL"].into_iter().find_map(|name| Some((name, environment.get(name)?)));
    let endpoint = match named {
        Some(_) if fips => return Err(NO_FIPS.to_owned()),
        Some((name, url)) => endpoint_url(&url).map_err(|what| format!("{name}: {what}"))?,
        None => public("sts", &region, fips),
    };
    Ok((endpoint, region))
}

const NO_FIPS: &str =
    "AWS_USE_FIPS_ENDPOINT is true and an endpoint is named, of which that cannot be told: remove one of the two";

fn wants_fips(environment: &Environment) -> Result<bool, String> {
    let name = "AWS_USE_FIPS_ENDPOINT";
    let said = environment.get(name).or_else(|| setting_of_profile(environment, "use_fips_endpoint"));
    match said.map(|value| value.to_ascii_lowercase()).as_deref() {
        Some("true") => Ok(true),
        Some("false") | None => Ok(false),
        Some(_) => Err(format!("{name} (or use_fips_endpoint of the profile) is neither true nor false")),
    }
}

/// A service's public endpoint (AWS General Reference, "Service endpoints").
fn public(service: &str, region: &str, fips: bool) -> Url {
    let domain = match region.split('-').next().unwrap_or_default() {
        "cn" => "amazonaws.com.cn",
        "eusc" => "amazonaws.eu",
        _ if region.starts_with("us-iso-") => "c2s.ic.gov",
        _ if region.starts_with("us-isob-") => "sc2s.sgov.gov",
        _ => "amazonaws.com",
    };
    // Those for the government of the United States are FIPS endpoints under their usual name, except KMS's.
    let fips = if fips && !(service == "sts" && region.starts_with("us-gov-")) { "-fips" } else { "" };
    let url = format!("https://{service}{fips}.{region}.{domain}/");
    url.parse().expect("a region holds nothing that a host name may not")
}

/// Reads an endpoint: a host with optional port, or a URL with nothing after the host. Plain http is for this machine only.
pub(crate) fn endpoint_url(text: &str) -> Result<Url, &'static str> {
    const NO_ENDPOINT: &str = "the endpoint is a host with optional port, or a URL of http:// or https:// and these";
    let has_scheme = text.contains("://");
    let whole = if has_scheme { text.to_owned() } else { format!("https://{text}") };
    let mut url: Url = whole.parse().map_err(|_| NO_ENDPOINT)?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err("the endpoint holds a user name or password: credentials come from elsewhere");
    }
    if !matches!(url.scheme(), "http" | "https")
        || !url.has_host()
        || url.path() != "/"
        || url.query().is_some()
        || url.fragment().is_some()
    {
        return Err(NO_ENDPOINT);
    }
    if is_loopback(&url) {
        if !has_scheme {
            // Parsed anew, because https's own port would have been dropped as the default.
            url = format!("http://{text}").parse().map_err(|_| NO_ENDPOINT)?;
        }
    } else if url.scheme() == "http" {
        return Err("plain http is for an endpoint on this machine only: use https");
    }
    Ok(url)
}

pub(crate) fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

/// It becomes part of a host name, so it is held to that.
pub(crate) fn is_region(text: &str) -> bool {
    (1..=32).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-')
}

/// The region in `arn:PARTITION:kms:REGION:ACCOUNT:key/ID`, or with `alias/NAME` at the end.
pub(crate) fn region_of_arn(text: &str) -> Option<&str> {
    let parts: Vec<&str> = text.split(':').collect();
    let ["arn", _, "kms", region, _, resource] = parts[..] else { return None };
    let is_key = ["key/", "alias/"].iter().any(|kind| resource.strip_prefix(kind).is_some_and(|name| !name.is_empty()));
    (is_region(region) && is_key).then_some(region)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place<const N: usize>(uri: &str, variables: [(&str, &str); N]) -> Result<(String, String), String> {
        let place = Place::of(&uri.parse().unwrap(), &Environment::of(variables)).map_err(|error| error.to_string())?;
        Ok((place.endpoint.to_string(), place.region))
    }

    #[test]
    fn the_region_comes_from_the_nearest_place_that_names_one() {
        let both = [("AWS_REGION", "eu-north-1"), ("AWS_DEFAULT_REGION", "eu-south-1")];
        for (uri, expected) in [
            ("awskms:///arn:aws:kms:us-east-2:111122223333:key/a", "us-east-2"),
            ("awskms:///alias/a?region=eu-west-1", "eu-west-1"),
            ("awskms:///alias/a", "eu-north-1"),
        ] {
            let (endpoint, region) = place(uri, both).unwrap();
            assert_eq!(region, expected);
            assert_eq!(endpoint, format!("https://kms.{expected}.amazonaws.com/"));
        }
        assert_eq!(place("awskms:///alias/a", [("AWS_DEFAULT_REGION", "eu-south-1")]).unwrap().1, "eu-south-1");
        assert!(place("awskms:///alias/a", []).unwrap_err().contains("no region"));
        assert!(place("awskms:///alias/a", [("AWS_REGION", "evil.com/")]).unwrap_err().contains("no region"));
        let (endpoint, _) = place("awskms:///alias/a?region=cn-north-1", []).unwrap();
        assert_eq!(endpoint, "https://kms.cn-north-1.amazonaws.com.cn/");
    }

    #[test]
    fn the_profile_is_asked_for_the_region_last() {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("config");
        std::fs::write(&config, "[profile prod]\nregion = sa-east-1\n").unwrap();
        let variables = [("AWS_CONFIG_FILE", config.to_str().unwrap()), ("AWS_PROFILE", "prod")];
        assert_eq!(place("awskms:///alias/a", variables).unwrap().1, "sa-east-1");
    }

    #[test]
    fn the_endpoint_comes_from_the_reference_or_the_environment() {
        let variables = [
            ("AWS_REGION", "eu-west-1"),
            ("AWS_ENDPOINT_URL_KMS", "https://vpce.example"),
            ("AWS_ENDPOINT_URL", "https://all.example"),
        ];
        for (uri, expected) in [
            ("awskms://kms.internal/alias/a", "https://kms.internal/"),
            ("awskms://kms.internal:8443/alias/a", "https://kms.internal:8443/"),
            ("awskms://localhost:4566/alias/a", "http://localhost:4566/"),
            ("awskms://localhost:443/alias/a", "http://localhost:443/"),
            ("awskms://127.0.0.1:4566/alias/a", "http://127.0.0.1:4566/"),
            ("awskms://[::1]:4566/alias/a", "http://[::1]:4566/"),
            ("awskms://https://127.0.0.1:4566/alias/a", "https://127.0.0.1:4566/"),
            ("awskms:///alias/a", "https://vpce.example/"),
        ] {
            assert_eq!(place(uri, variables).unwrap().0, expected);
        }
        let all = [("AWS_REGION", "eu-west-1"), ("AWS_ENDPOINT_URL", "https://all.example")];
        assert_eq!(place("awskms:///alias/a", all).unwrap().0, "https://all.example/");
    }

    #[test]
    fn an_endpoint_that_would_be_spoken_to_in_the_clear_or_holds_a_password_is_refused() {
        for (url, part) in [
            ("http://kms.example", "AWS_ENDPOINT_URL: plain http"),
            ("http://127.0.0.1.example", "plain http"),
            ("http://localhost.example", "plain http"),
            ("https://me:hunter2@kms.example", "password"),
            ("https://kms.example/path", "AWS_ENDPOINT_URL: the endpoint"),
            ("https://kms.example/?a=b", "the endpoint"),
            ("ftp://kms.example", "the endpoint"),
            ("https://", "the endpoint"),
        ] {
            let error = place("awskms:///alias/a", [("AWS_REGION", "eu-west-1"), ("AWS_ENDPOINT_URL", url)]).unwrap_err();
            assert!(error.contains(part) && !error.contains("hunter2"), "{url}: {error}");
        }
    }

    #[test]
    fn partitions_and_fips_have_hosts_of_their_own() {
        for (region, fips, kms, sts_host) in [
            ("eu-west-1", "false", "kms.eu-west-1.amazonaws.com", "sts.eu-west-1.amazonaws.com"),
            ("us-east-1", "true", "kms-fips.us-east-1.amazonaws.com", "sts-fips.us-east-1.amazonaws.com"),
            ("us-gov-west-1", "TRUE", "kms-fips.us-gov-west-1.amazonaws.com", "sts.us-gov-west-1.amazonaws.com"),
            ("cn-north-1", "", "kms.cn-north-1.amazonaws.com.cn", "sts.cn-north-1.amazonaws.com.cn"),
            ("eusc-de-east-1", "", "kms.eusc-de-east-1.amazonaws.eu", "sts.eusc-de-east-1.amazonaws.eu"),
            ("us-iso-east-1", "", "kms.us-iso-east-1.c2s.ic.gov", "sts.us-iso-east-1.c2s.ic.gov"),
        ] {
            let variables = [("AWS_REGION", region), ("AWS_USE_FIPS_ENDPOINT", fips)];
            assert_eq!(place("awskms:///alias/a", variables).unwrap().0, format!("https://{kms}/"));
            let (endpoint, signed_for) = sts(&Environment::of(variables), "us-east-2").unwrap();
            assert_eq!((endpoint.to_string(), signed_for.as_str()), (format!("https://{sts_host}/"), region));
        }
        let both = [("AWS_REGION", "us-east-1"), ("AWS_USE_FIPS_ENDPOINT", "true"), ("AWS_ENDPOINT_URL", "https://a.example")];
        assert!(place("awskms:///alias/a", both).unwrap_err().contains("remove one of the two"));
        assert!(sts(&Environment::of(both), "us-east-1").unwrap_err().contains("remove one of the two"));
        let named = [("AWS_REGION", "us-east-1"), ("AWS_USE_FIPS_ENDPOINT", "true")];
        assert!(place("awskms://kms.internal/alias/a", named).unwrap_err().contains("remove one of the two"));
        let unclear = [("AWS_REGION", "us-east-1"), ("AWS_USE_FIPS_ENDPOINT", "yes")];
        assert!(place("awskms:///alias/a", unclear).unwrap_err().contains("neither true nor false"));
    }

    #[test]
    fn sts_is_asked_in_the_region_that_is_set_or_else_in_the_keys() {
        let (endpoint, region) = sts(&Environment::of([("AWS_DEFAULT_REGION", "eu-south-1")]), "us-east-2").unwrap();
        assert_eq!((endpoint.as_str(), region.as_str()), ("https://sts.eu-south-1.amazonaws.com/", "eu-south-1"));
        assert_eq!(sts(&Environment::of([]), "us-east-2").unwrap().1, "us-east-2");
        let named = [("AWS_ENDPOINT_URL_STS", "http://127.0.0.1:4566"), ("AWS_ENDPOINT_URL", "https://all.example")];
        assert_eq!(sts(&Environment::of(named), "us-east-2").unwrap().0.as_str(), "http://127.0.0.1:4566/");
        let clear = [("AWS_ENDPOINT_URL_STS", "http://sts.example")];
        assert!(sts(&Environment::of(clear), "us-east-2").unwrap_err().contains("AWS_ENDPOINT_URL_STS: plain http"));
    }
}
