use std::fmt::Write as _;

use aws_lc_rs::{
    digest::{SHA256, digest},
    hmac,
};
use http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{ACCEPT, AUTHORIZATION},
};
use jiff::Timestamp;
use reqwest::Url;
use secrecy::ExposeSecret;

use super::credentials::Credentials;

/// An operation of one of Alibaba Cloud's services, in the RPC style: its parameters are in the query, and the body is empty.
pub(super) struct Call<'a> {
    /// With path `/`.
    pub(super) endpoint: &'a Url,
    pub(super) action: &'a str,
    /// Of the interface: a date.
    pub(super) version: &'a str,
    pub(super) parameters: &'a [(&'a str, &'a str)],
}

impl Call<'_> {
    /// Where to `POST` to, and with which headers, signed by `ACS3-HMAC-SHA256`. The nonce is used once. Pure: the same input
    /// gives the same headers.
    /// <https://www.alibabacloud.com/help/en/sdk/product-overview/v3-request-structure-and-signature>
    pub(super) fn signed(&self, credentials: &Credentials, time: Timestamp, nonce: &str) -> (Url, HeaderMap) {
        let query = canonical_query(self.parameters);
        let date = time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let body = hex_digest(b"");
        let token = credentials.token.as_ref().map(ExposeSecret::expose_secret);
        // In the order of their names, as they are signed.
        let signed: Vec<(&'static str, &str)> = [
            ("host", Some(self.endpoint.authority())),
            ("x-acs-action", Some(self.action)),
            ("x-acs-content-sha256", Some(body.as_str())),
            ("x-acs-date", Some(date.as_str())),
            ("x-acs-security-token", token),
            ("x-acs-signature-nonce", Some(nonce)),
            ("x-acs-version", Some(self.version)),
        ]
        .into_iter()
        .filter_map(|(name, value)| Some((name, value?)))
        .collect();
        let lines: String = signed.iter().fold(String::new(), |lines, (name, value)| lines + name + ":" + value + "\n");
        let names = signed.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(";");
        let canonical = format!("POST\n/\n{query}\n{lines}\n{names}\n{body}");
        let to_sign = format!("ACS3-HMAC-SHA256\n{}", hex_digest(canonical.as_bytes()));
        let key = hmac::Key::new(hmac::HMAC_SHA256, credentials.secret.expose_secret().as_bytes());
        let signature = hex::encode(hmac::sign(&key, to_sign.as_bytes()));
        let authorization = format!("ACS3-HMAC-SHA256 Credential={},SignedHeaders={names},Signature={signature}", credentials.id);

        let value = |text: &str| HeaderValue::from_str(text).expect("credentials are checked to be sendable, the rest is ours");
        let mut headers = HeaderMap::with_capacity(8);
        // Its default is XML.
        headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
        for (name, text) in signed.into_iter().filter(|(name, _)| *name != "host") {
            let mut value = value(text);
            value.set_sensitive(name == "x-acs-security-token");
            headers.insert(HeaderName::from_static(name), value);
        }
        let mut authorization = value(&authorization);
        authorization.set_sensitive(true);
        headers.insert(AUTHORIZATION, authorization);
        let mut url = self.endpoint.clone();
        url.set_query(Some(&query));
        (url, headers)
    }
}

/// The parameters in the order of their names, percent-encoded as RFC 3986 has it: all but unreserved characters.
fn canonical_query(parameters: &[(&str, &str)]) -> String {
    let mut pairs: Vec<_> = parameters.iter().map(|(name, value)| (encoded(name), encoded(value))).collect();
    pairs.sort();
    pairs.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join("&")
}

fn encoded(text: &str) -> String {
    text.bytes().fold(String::with_capacity(text.len()), |mut encoded, byte| {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            write!(encoded, "%{byte:02X}").expect("a String takes everything");
        }
        encoded
    })
}

fn hex_digest(bytes: &[u8]) -> String {
    hex::encode(digest(&SHA256, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signed(call: &Call<'_>, who: (&str, &str, Option<&str>), time: &str, nonce: &str) -> (Url, HeaderMap) {
        let (id, secret, token) = who;
        let credentials = Credentials { id: id.into(), secret: secret.into(), token: token.map(Into::into), expires: None };
        call.signed(&credentials, time.parse().unwrap(), nonce)
    }

    fn signature(headers: &HeaderMap) -> &str {
        headers[AUTHORIZATION].to_str().unwrap().split_once("Signature=").unwrap().1
    }

    /// The example in Alibaba Cloud's documentation of the signature.
    #[test]
    fn the_documented_example_comes_out() {
        let call = Call {
            endpoint: &"https://ecs.cn-shanghai.aliyuncs.com/".parse().unwrap(),
            action: "RunInstances",
            version: "2014-05-26",
            parameters: &[("RegionId", "cn-shanghai"), ("ImageId", "win2019_1809_x64_dtc_zh-cn_40G_alibase_20230811.vhd")],
        };
        let who = ("YourAccessKeyId", "YourAccessKeySecret", None);
        let (_, headers) = signed(&call, who, "2023-10-26T10:22:32Z", "3156853299f313e23d1673dc12e1703d");
        assert_eq!(
            headers[AUTHORIZATION],
            "ACS3-HMAC-SHA256 Credential=YourAccessKeyId,SignedHeaders=host;x-acs-action;x-acs-content-sha256;x-acs-date;\
             x-acs-signature-nonce;x-acs-version,Signature=06563a9e1b43f5dfe96b81484da74bceab24a1d853912eee15083a6f0f3283c0"
        );
    }

    #[test]
    fn a_digest_is_asked_to_be_signed_with_and_without_a_token() {
        let call = Call {
            endpoint: &"https://kms.cn-hangzhou.aliyuncs.com/".parse().unwrap(),
            action: "AsymmetricSign",
            version: "2016-01-20",
            parameters: &[
                ("KeyId", "key-hzz000000000000000001"),
                ("KeyVersionId", "2ab1a983-7072-4bbc-a582-584b5bd80001"),
                ("Algorithm", "RSA_PSS_SHA_256"),
                ("Digest", "+H00AJqLJ4pkCe1V1ZGHyNktm3KE+hUCMxkXSvzg2wk="),
            ],
        };
        let nonce = "00000000000000000000000000000001";
        let (url, headers) = signed(&call, ("testid", "testsecret", None), "2026-01-01T00:00:00Z", nonce);
        assert_eq!(signature(&headers), "89d497c080d1a04c0451b6c6eb24b79b87a4058ab2ac72bcc1a0cb67319a1e3a");
        let query = url.query().unwrap();
        assert!(query.contains("Digest=%2BH00AJqLJ4pkCe1V1ZGHyNktm3KE%2BhUCMxkXSvzg2wk%3D&KeyId"), "{query}");
        assert_eq!(headers[ACCEPT], "application/json");

        let (_, headers) = signed(&call, ("testid", "testsecret", Some("ststoken")), "2026-01-01T00:00:00Z", nonce);
        assert_eq!(signature(&headers), "96e85078d0e195803c0081ef15df2361c1030d3023681e9b688e2c117a0c3015");
        assert_eq!(headers["x-acs-security-token"], "ststoken");
        let shown = format!("{headers:?}");
        assert!(!shown.contains("ststoken") && !shown.contains("96e85078"), "{shown}");
    }

    #[test]
    fn what_is_not_unreserved_is_encoded() {
        assert_eq!(encoded("aZ09-_.~"), "aZ09-_.~");
        assert_eq!(encoded(" +/=*%é\n"), "%20%2B%2F%3D%2A%25%C3%A9%0A");
        assert_eq!(canonical_query(&[("b", "2"), ("a", "x y"), ("A", "")]), "A=&a=x%20y&b=2");
    }
}
