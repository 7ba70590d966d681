use std::time::Duration;

use http::StatusCode;
use serde::Deserialize;
use serde_json::Value;

use crate::kms::{
    exchange::Answer,
    fault::{Class, Fault, Told},
};

#[derive(Deserialize, Default)]
struct ErrorBody {
    #[serde(default)]
    error: ErrorStatus,
}

/// `google.rpc.Status`, as its REST interfaces write it.
#[derive(Deserialize, Default)]
struct ErrorStatus {
    #[serde(default)]
    status: String,
    #[serde(default)]
    message: String,
    #[serde(default)]
    details: Vec<Value>,
}

/// What an error answer of a Google API says (<https://google.aip.dev/193>). `secret` is the request's.
pub(super) fn fault(answer: &Answer, secret: &str) -> Fault {
    let ErrorStatus { status, message, details } = serde_json::from_slice::<ErrorBody>(&answer.body).unwrap_or_default().error;
    let told = Told { code: &status, message: &message, request: "" };
    let fault = Fault::new(classify(answer.status, &status, &message), answer, &told, [secret]);
    let retry_after = fault.retry_after.or_else(|| details.iter().find_map(retry_delay));
    Fault { retry_after, ..fault }
}

/// That of a `google.rpc.RetryInfo`: seconds, as `"3.5s"`.
fn retry_delay(detail: &Value) -> Option<Duration> {
    detail["@type"].as_str().filter(|kind| kind.ends_with("/google.rpc.RetryInfo"))?;
    let seconds = detail["retryDelay"].as_str()?.strip_suffix('s')?.parse().ok()?;
    Duration::try_from_secs_f64(seconds).ok()
}

fn classify(http: StatusCode, status: &str, message: &str) -> Class {
    let says = |word: &str| message.to_ascii_lowercase().contains(word);
    match status {
        "RESOURCE_EXHAUSTED" => Class::Throttled,
        "UNAVAILABLE" | "DEADLINE_EXCEEDED" | "INTERNAL" | "ABORTED" | "CANCELLED" | "UNKNOWN" => Class::Transient,
        "UNAUTHENTICATED" => Class::CredentialsExpired,
        "PERMISSION_DENIED" => Class::Denied,
        "NOT_FOUND" => Class::NotFound,
        // It names the state; this one ends by itself.
        "FAILED_PRECONDITION" if says("pending_generation") => Class::Transient,
        "FAILED_PRECONDITION" => Class::KeyUnusable,
        // What came is not what the checksum beside it is of.
        "INVALID_ARGUMENT" if says("crc32c") || says("checksum") => Class::Garbled,
        "INVALID_ARGUMENT" | "OUT_OF_RANGE" | "UNIMPLEMENTED" => Class::Misconfigured,
        _ if http == StatusCode::UNAUTHORIZED => Class::CredentialsExpired,
        _ => Class::of_status(http),
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderMap;

    use super::*;

    fn fault_of(http: u16, body: &str) -> Fault {
        let status = StatusCode::from_u16(http).unwrap();
        fault(&Answer { status, headers: HeaderMap::new(), body: body.as_bytes().to_vec().into() }, "ya29.secret")
    }

    #[test]
    fn statuses_mean_what_the_documentation_says() {
        for (http, status, message, expected) in [
            (429, "RESOURCE_EXHAUSTED", "Quota exceeded for quota metric", Class::Throttled),
            (503, "UNAVAILABLE", "", Class::Transient),
            (504, "DEADLINE_EXCEEDED", "", Class::Transient),
            (500, "INTERNAL", "", Class::Transient),
            (409, "ABORTED", "", Class::Transient),
            (401, "UNAUTHENTICATED", "", Class::CredentialsExpired),
            (403, "PERMISSION_DENIED", "Permission 'cloudkms.cryptoKeyVersions.useToSign' denied", Class::Denied),
            (404, "NOT_FOUND", "", Class::NotFound),
            (400, "FAILED_PRECONDITION", "k/1 is not enabled, current state is: DISABLED.", Class::KeyUnusable),
            (400, "FAILED_PRECONDITION", "k/1 is not enabled, current state is: DESTROYED.", Class::KeyUnusable),
            (400, "FAILED_PRECONDITION", "k/1 is not enabled, current state is: PENDING_GENERATION.", Class::Transient),
            (400, "INVALID_ARGUMENT", "Digest has the wrong length", Class::Misconfigured),
            (400, "INVALID_ARGUMENT", "The checksum in field digest_crc32c did not match", Class::Garbled),
            (400, "SOMETHING_NEW", "", Class::Misconfigured),
            (502, "SOMETHING_NEW", "", Class::Transient),
        ] {
            let body = serde_json::json!({ "error": { "code": http, "status": status, "message": message } });
            assert_eq!(fault_of(http, &body.to_string()).class, expected, "{status} {message}");
        }
    }

    #[test]
    fn the_time_to_wait_is_heard_in_the_body_too() {
        let after = |delay: &str| {
            let info = serde_json::json!({ "@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay });
            let body = serde_json::json!({ "error": { "status": "RESOURCE_EXHAUSTED", "details": [{ "@type": "x" }, info] } });
            fault_of(429, &body.to_string()).retry_after
        };
        assert_eq!((after("3.5s"), after("7s")), (Some(Duration::from_millis(3500)), Some(Duration::from_secs(7))));
        assert_eq!((after("-1s"), after("soon"), after("1e99s")), (None, None, None));
    }

    #[test]
    fn without_a_status_that_of_http_decides_and_no_secret_is_repeated() {
        for (http, expected) in
            [(429, Class::Throttled), (502, Class::Transient), (401, Class::CredentialsExpired), (302, Class::Misconfigured)]
        {
            for body in ["", "<html>", "{}", "[1]", r#"{"error":7}"#] {
                let fault = fault_of(http, body);
                assert_eq!((fault.class, fault.what), (expected, format!("HTTP {http}")), "{body}");
            }
        }
        let echo = r#"{"error":{"status":"INTERNAL","message":"ya29.secret is\nnot one"}}"#;
        assert_eq!(fault_of(500, echo).what, "HTTP 500: INTERNAL: <redacted> is");
    }
}
