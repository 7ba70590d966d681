use std::{path::Path, sync::Arc};

use reqwest::{Certificate, Url};

use crate::kms::{Environment, Error, KeyUri, aws, refresh::text_of};

/// Where requests go.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) endpoint: Url,
    pub(super) gateway: Gateway,
    pub(super) sts: Url,
    pub(super) metadata: Url,
}

/// Which of the two doors of the same KMS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Gateway {
    /// A region's, which has every operation.
    Shared,
    /// An instance's own, which signs and gives public keys, and does not describe.
    Dedicated,
}

impl Place {
    pub(super) fn of(uri: &KeyUri, environment: &Environment) -> Result<Self, Error> {
        let KeyUri::AlibabaKms { endpoint, instance, .. } = uri else { unreachable!("kms::open chose by the kind of URI") };
        let misconfigured = |what: String| Error::Misconfigured { key: Arc::new(uri.clone()), what };
        let endpoint = aws::endpoint_url(endpoint).map_err(|what| misconfigured(what.to_owned()))?;
        let host = endpoint.host_str().unwrap_or_default();
        let of_instance = host.strip_suffix(".cryptoservice.kms.aliyuncs.com");
        if let (Some(one), Some(other)) = (of_instance, instance)
            && one != other
        {
            return Err(misconfigured(format!("the endpoint is instance {one}'s and the reference names {other}")));
        }
        let gateway = if of_instance.is_some() { Gateway::Dedicated } else { Gateway::Shared };
        let sts = sts(host, environment).map_err(misconfigured)?;
        let metadata = "http://100.100.100.200/".parse().expect("it is a constant");
        Ok(Self { endpoint, gateway, sts, metadata })
    }
}

/// STS of the region, if one is known: `ALIBABA_CLOUD_STS_REGION`, `ALIBABA_CLOUD_REGION_ID`, the KMS's. The one in the VPC if that
/// is asked for, or if the KMS is spoken to there.
fn sts(kms: &str, environment: &Environment) -> Result<Url, String> {
    let at_kms = kms.strip_suffix(".aliyuncs.com").and_then(|rest| rest.split_once('.'));
    let of_kms = at_kms.filter(|(service, _)| matches!(*service, "kms" | "kms-vpc"));
    let region = environment
        .get("ALIBABA_CLOUD_STS_REGION")
        .or_else(|| environment.get("ALIBABA_CLOUD_REGION_ID"))
        .or_else(|| of_kms.map(|(_, region)| region.to_owned()));
    if region.as_deref().is_some_and(|region| !aws::is_region(region)) {
        return Err("ALIBABA_CLOUD_STS_REGION (or ALIBABA_CLOUD_REGION_ID) is no region: correct it".to_owned());
    }
    let in_vpc = environment.get("ALIBABA_CLOUD_VPC_ENDPOINT_ENABLED").is_some_and(|value| value.eq_ignore_ascii_case("true"))
        || of_kms.is_some_and(|(service, _)| service == "kms-vpc");
    let host = match region {
        Some(region) if in_vpc => format!("sts-vpc.{region}.aliyuncs.com"),
        Some(region) => format!("sts.{region}.aliyuncs.com"),
        None => "sts.aliyuncs.com".to_owned(),
    };
    Ok(format!("https://{host}/").parse().expect("a region holds nothing that a host name may not"))
}

/// The certificates that the endpoint's is held against, if not the machine's own.
pub(super) fn authorities(file: &Path) -> Result<Vec<Certificate>, String> {
    let text = text_of(file).map_err(|error| error.to_string())?;
    let text = text.ok_or_else(|| format!("{} is not there", file.display()))?;
    match Certificate::from_pem_bundle(text.as_bytes()) {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        Ok(_) | Err(_) => Err(format!("{} holds no certificate in PEM", file.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place<const N: usize>(uri: &str, variables: [(&str, &str); N]) -> Result<Place, String> {
        Place::of(&uri.parse().unwrap(), &Environment::of(variables)).map_err(|error| error.to_string())
    }

    #[test]
    fn the_endpoint_says_which_gateway_it_is() {
        for (host, gateway) in [
            ("kms.cn-hangzhou.aliyuncs.com", Gateway::Shared),
            ("kms-vpc.cn-hangzhou.aliyuncs.com", Gateway::Shared),
            ("kst-1.cryptoservice.kms.aliyuncs.com", Gateway::Dedicated),
            ("kms.internal:8443", Gateway::Shared),
        ] {
            let place = place(&format!("alibabakms://{host}//alias/a"), []).unwrap();
            assert_eq!((place.gateway, place.endpoint.as_str()), (gateway, format!("https://{host}/").as_str()));
        }
        let error = place("alibabakms://kst-1.cryptoservice.kms.aliyuncs.com/kst-2/alias/a", []).unwrap_err();
        assert!(error.contains("the endpoint is instance kst-1's and the reference names kst-2"), "{error}");
    }

    #[test]
    fn sts_is_asked_where_the_key_is_unless_another_region_is_set() {
        let sts = |host: &str, variables: [(&str, &str); 2]| {
            place(&format!("alibabakms://{host}//k"), variables).map(|place| place.sts.host_str().unwrap().to_owned())
        };
        let none = ("", "");
        for (host, variables, expected) in [
            ("kms.cn-hangzhou.aliyuncs.com", [none, none], "sts.cn-hangzhou.aliyuncs.com"),
            ("kms-vpc.cn-hangzhou.aliyuncs.com", [none, none], "sts-vpc.cn-hangzhou.aliyuncs.com"),
            ("kst-1.cryptoservice.kms.aliyuncs.com", [none, none], "sts.aliyuncs.com"),
            (
                "kms.cn-hangzhou.aliyuncs.com",
                [("ALIBABA_CLOUD_STS_REGION", "eu-central-1"), none],
                "sts.eu-central-1.aliyuncs.com",
            ),
            (
                "kst-1.cryptoservice.kms.aliyuncs.com",
                [("ALIBABA_CLOUD_REGION_ID", "cn-beijing"), ("ALIBABA_CLOUD_VPC_ENDPOINT_ENABLED", "true")],
                "sts-vpc.cn-beijing.aliyuncs.com",
            ),
        ] {
            assert_eq!(sts(host, variables).unwrap(), expected);
        }
        assert!(sts("kms.internal", [("ALIBABA_CLOUD_STS_REGION", "evil.com/"), none]).unwrap_err().contains("no region"));
    }
}
