use std::time::SystemTime;

use aws_credential_types::Credentials;
use aws_sigv4::{
    http_request::{SignableBody, SignableRequest, SigningError, SigningSettings, sign},
    sign::v4::SigningParams,
};
use http::{HeaderMap, HeaderName, HeaderValue, header::AUTHORIZATION};
use jiff::Timestamp;
use tracing::{Dispatch, dispatcher};

pub(super) const CONTENT: &str = "application/x-amz-json-1.1";
pub(super) const TARGET: &str = "x-amz-target";

/// What a signature is good for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scope<'a> {
    /// `kms` or `sts`.
    pub(super) service: &'static str,
    pub(super) region: &'a str,
}

/// The headers of a `POST`, signed by Signature Version 4 over the real payload: `plain` and those that sign them.
///
/// `url` is the endpoint with path `/`. Pure: the same input gives the same headers.
pub(super) fn signed_headers(
    credentials: &Credentials,
    scope: Scope<'_>,
    time: Timestamp,
    url: &str,
    plain: &[(&'static str, &'static str)],
    body: &[u8],
) -> Result<HeaderMap, SigningError> {
    let identity = credentials.clone().into();
    let parameters = SigningParams::builder()
        .identity(&identity)
        .region(scope.region)
        .name(scope.service)
        .time(SystemTime::from(time))
        .settings(SigningSettings::default())
        .build()
        .expect("every parameter is set")
        .into();
    let request = SignableRequest::new("POST", url, plain.iter().copied(), SignableBody::Bytes(body))?;
    // The signer's own trace events hold the session token in the clear.
    let signed = dispatcher::with_default(&Dispatch::none(), || sign(request, &parameters))?;

    let mut signed_headers = HeaderMap::with_capacity(8);
    for (name, value) in plain {
        signed_headers.insert(HeaderName::from_static(name), HeaderValue::from_static(value));
    }
    for header in signed.into_parts().0.into_parts().0 {
        let mut value = HeaderValue::from_str(header.value()).expect("credentials are checked to be sendable when they are read");
        value.set_sensitive(header.sensitive() || header.name() == AUTHORIZATION);
        signed_headers.insert(HeaderName::from_static(header.name()), value);
    }
    Ok(signed_headers)
}

#[cfg(test)]
mod tests {
    use http::header::CONTENT_TYPE;

    use super::*;

    const BODY: &[u8] = br#"{"KeyId":"alias/witness","Message":"+H00AJqLJ4pkCe1V1ZGHyNktm3KE+hUCMxkXSvzg2wk=","MessageType":"DIGEST","SigningAlgorithm":"RSASSA_PSS_SHA_256"}"#;

    fn signed(token: Option<&str>) -> HeaderMap {
        let credentials =
            Credentials::new("AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY", token.map(str::to_owned), None, "test");
        let time = "2026-01-01T00:00:00Z".parse().unwrap();
        let scope = Scope { service: "kms", region: "us-east-1" };
        let plain = [(CONTENT_TYPE.as_str(), CONTENT), (TARGET, "TrentService.Sign")];
        signed_headers(&credentials, scope, time, "https://kms.us-east-1.amazonaws.com/", &plain, BODY).unwrap()
    }

    /// Computed with botocore.
    #[test]
    fn the_signature_is_the_one_that_awss_own_client_makes() {
        let headers = signed(None);
        assert_eq!(
            headers[AUTHORIZATION],
            "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20260101/us-east-1/kms/aws4_request, \
             SignedHeaders=content-type;host;x-amz-date;x-amz-target, \
             Signature=9b318d7da6a3429afe4a24dfa225ede25249f6e877bf04fb188a376f5d3fe7f0"
        );
        assert_eq!(headers["x-amz-date"], "20260101T000000Z");
        assert_eq!(headers[TARGET], "TrentService.Sign");
        assert_eq!(headers[CONTENT_TYPE], CONTENT);
        assert_eq!(headers.len(), 4);
    }

    #[test]
    fn the_session_token_is_signed_and_marked_as_secret() {
        let headers = signed(Some("SESSIONTOKEN"));
        assert_eq!(
            headers[AUTHORIZATION],
            "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20260101/us-east-1/kms/aws4_request, \
             SignedHeaders=content-type;host;x-amz-date;x-amz-security-token;x-amz-target, \
             Signature=8874b8f30dea1e935d7f1b2f0b934a98e41455af2c454e390daed85a4783e388"
        );
        assert_eq!(headers["x-amz-security-token"], "SESSIONTOKEN");
        let shown = format!("{headers:?}");
        assert!(!shown.contains("SESSIONTOKEN") && !shown.contains("8874b8f3"), "{shown}");
    }

    const BOTOCORE: &str = r#"
import datetime, json, sys
from botocore import auth, awsrequest, credentials
for line in sys.stdin:
    case = json.loads(line)
    auth.get_current_datetime = lambda: datetime.datetime.strptime(case["time"], "%Y%m%dT%H%M%SZ")
    request = awsrequest.AWSRequest("POST", case["url"], data=case["body"].encode(), headers=case["headers"])
    who = credentials.Credentials(case["id"], case["secret"], case["token"])
    auth.SigV4Auth(who, case["service"], case["region"]).add_auth(request)
    print(json.dumps({name.lower(): value for name, value in request.headers.items()}))
"#;

    #[test]
    fn every_request_is_signed_as_botocore_signs_it() {
        let (kms, form) = (CONTENT, "application/x-www-form-urlencoded; charset=utf-8");
        let long = "x".repeat(2000);
        let mut cases = Vec::new();
        for (service, host, content, target) in [
            ("kms", "kms.eu-west-1.amazonaws.com", kms, Some("TrentService.Sign")),
            ("kms", "127.0.0.1:4566", kms, Some("TrentService.DescribeKey")),
            ("sts", "sts.eu-west-1.amazonaws.com", form, None),
        ] {
            for (secret, token) in [("wJalr/X+utn=", None), ("a", Some("IQoJb3JpZ2luX2VjE+/=")), ("s3cret", Some(long.as_str()))]
            {
                for body in ["", "{}", "Action=AssumeRole&RoleArn=arn%3Aaws", "{\"KeyId\":\"alias/\u{e9}\"}"] {
                    let mut plain = vec![("content-type", content)];
                    plain.extend(target.map(|target| (TARGET, target)));
                    cases.push((service, format!("http://{host}/"), plain, secret, token, body));
                }
            }
        }
        let input: Vec<_> = cases
            .iter()
            .map(|(service, url, plain, secret, token, body)| {
                let headers: std::collections::BTreeMap<_, _> = plain.iter().copied().collect();
                let case = serde_json::json!({
                    "service": service, "region": "eu-west-1", "time": "20260309T235959Z", "url": url, "headers": headers,
                    "id": "AKIDEXAMPLE", "secret": secret, "token": token, "body": body,
                });
                format!("{case}\n")
            })
            .collect();
        let mut python = std::process::Command::new(integration_tests::process::tool("ministack/bin/python").unwrap())
            .args(["-c", BOTOCORE])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // All of it fits into a pipe's buffer of answers only if it is read meanwhile: so the input is written beside.
        let mut stdin = python.stdin.take().unwrap();
        let writer = std::thread::spawn(move || std::io::Write::write_all(&mut stdin, input.concat().as_bytes()).unwrap());
        let output = python.wait_with_output().unwrap();
        writer.join().unwrap();
        assert!(output.status.success());
        let theirs = String::from_utf8(output.stdout).unwrap();
        assert_eq!(theirs.lines().count(), cases.len());
        for (theirs, (service, url, plain, secret, token, body)) in theirs.lines().zip(cases) {
            let theirs: std::collections::BTreeMap<String, String> = serde_json::from_str(theirs).unwrap();
            let who = Credentials::new("AKIDEXAMPLE", secret, token.map(str::to_owned), None, "test");
            let scope = Scope { service, region: "eu-west-1" };
            let time = "2026-03-09T23:59:59Z".parse().unwrap();
            let ours = signed_headers(&who, scope, time, &url, &plain, body.as_bytes()).unwrap();
            for name in ["authorization", "x-amz-date", "content-type"] {
                assert_eq!(ours[name].to_str().unwrap(), theirs[name], "{name} of {service} {url} {body}");
            }
            assert_eq!(ours.get("x-amz-security-token").map(|value| value.to_str().unwrap()), token);
        }
    }
}
