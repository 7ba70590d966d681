use std::str;

use http::StatusCode;
use serde::Deserialize;

use crate::kms::{
    exchange::{Answer, one_line},
    fault::{Class, Fault, Told},
};

/// What an error answer of KMS says. `secrets` are those of the request.
pub(super) fn fault<'a>(answer: &Answer, secrets: impl IntoIterator<Item = &'a str>) -> Fault {
    let header = |name| answer.headers.get(name).and_then(|value| str::from_utf8(value.as_bytes()).ok()).unwrap_or_default();
    let ErrorBody { code, message } = serde_json::from_slice(&answer.body).unwrap_or_default();
    // The header comes as `Code:http://…`, the field as `namespace#Code`.
    let code = if code.is_empty() { header("x-amzn-errortype") } else { &code };
    let code = code.rsplit('#').next().unwrap_or_default();
    let code = one_line(code.split(':').next().unwrap_or_default(), 64);
    let class = classify(answer.status, &code, &message);
    // Where a signature is wrong, AWS goes on to repeat the request, session token included, from the second line on.
    Fault::new(class, answer, &Told { code: &code, message: &message, request: header("x-amzn-requestid") }, secrets)
}

fn classify(status: StatusCode, code: &str, message: &str) -> Class {
    match code {
        "ThrottlingException"
        | "Throttling"
        | "ThrottledException"
        | "TooManyRequestsException"
        | "RequestThrottled"
        | "RequestThrottledException"
        | "RequestLimitExceeded"
        | "LimitExceededException"
        | "SlowDown" => Class::Throttled,
        "KMSInternalException"
        | "DependencyTimeoutException"
        | "KeyUnavailableException"
        | "ServiceUnavailable"
        | "ServiceUnavailableException"
        | "InternalFailure"
        | "InternalServerError"
        | "RequestTimeout"
        | "RequestTimeoutException" => Class::Transient,
        "ExpiredTokenException"
        | "ExpiredToken"
        | "UnrecognizedClientException"
        | "InvalidClientTokenId"
        | "InvalidClientTokenIdException"
        | "RequestExpired" => Class::CredentialsExpired,
        "RequestTimeTooSkewed" => Class::Clock,
        "InvalidSignatureException" | "SignatureDoesNotMatch" => {
            if message.contains("Signature expired") || message.contains("not yet current") {
                Class::Clock
            } else {
                Class::BadCredentials
            }
        }
        "IncompleteSignature"
        | "IncompleteSignatureException"
        | "MissingAuthenticationToken"
        | "MissingAuthenticationTokenException" => Class::BadCredentials,
        "AccessDeniedException" | "AccessDenied" | "OptInRequired" | "NotAuthorized" => Class::Denied,
        "KMSInvalidStateException" => Class::InvalidState,
        "DisabledException" | "InvalidKeyUsageException" | "UnsupportedOperationException" => Class::KeyUnusable,
        "DryRunOperationException" => Class::DryRun,
        "KMSInvalidSignatureException" => Class::InvalidSignature,
        "NotFoundException" | "InvalidArnException" => Class::NotFound,
        "ValidationException" | "SerializationException" => Class::Misconfigured,
        _ => Class::of_status(status),
    }
}

#[derive(Deserialize, Default)]
struct ErrorBody {
    #[serde(rename = "__type", default)]
    code: String,
    #[serde(alias = "Message", default)]
    message: String,
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use http::{HeaderMap, header::RETRY_AFTER};

    use super::*;

    const SECRET: &str = "the-session-token-of-the-request";

    fn fault(status: StatusCode, headers: HeaderMap, body: &str) -> Fault {
        super::fault(&Answer { status, headers, body: body.as_bytes().to_vec().into() }, [SECRET])
    }

    #[test]
    fn a_secret_that_is_repeated_is_taken_out_also_where_the_message_is_cut() {
        let body = format!(r#"{{"__type":"AccessDeniedException","message":"{}{SECRET}"}}"#, "x".repeat(290));
        let what = fault(StatusCode::BAD_REQUEST, HeaderMap::new(), &body).what;
        assert!(!what.contains(&SECRET[..5]), "{what}");
    }

    fn class(status: u16, body: &str) -> Class {
        fault(StatusCode::from_u16(status).unwrap(), HeaderMap::new(), body).class
    }

    #[test]
    fn codes_mean_what_the_service_model_says() {
        for (code, expected) in [
            ("ThrottlingException", Class::Throttled),
            ("LimitExceededException", Class::Throttled),
            ("TooManyRequestsException", Class::Throttled),
            ("RequestLimitExceeded", Class::Throttled),
            ("SlowDown", Class::Throttled),
            ("KMSInternalException", Class::Transient),
            ("DependencyTimeoutException", Class::Transient),
            ("KeyUnavailableException", Class::Transient),
            ("ExpiredTokenException", Class::CredentialsExpired),
            ("UnrecognizedClientException", Class::CredentialsExpired),
            ("AccessDeniedException", Class::Denied),
            ("InvalidSignatureException", Class::BadCredentials),
            ("IncompleteSignature", Class::BadCredentials),
            ("MissingAuthenticationToken", Class::BadCredentials),
            ("OptInRequired", Class::Denied),
            ("DisabledException", Class::KeyUnusable),
            ("KMSInvalidStateException", Class::InvalidState),
            ("InvalidKeyUsageException", Class::KeyUnusable),
            ("UnsupportedOperationException", Class::KeyUnusable),
            ("NotFoundException", Class::NotFound),
            ("InvalidArnException", Class::NotFound),
            ("ValidationException", Class::Misconfigured),
            ("SerializationException", Class::Misconfigured),
            ("DryRunOperationException", Class::DryRun),
            ("KMSInvalidSignatureException", Class::InvalidSignature),
            ("SomethingNewException", Class::Misconfigured),
        ] {
            assert_eq!(class(400, &format!(r#"{{"__type":"{code}","message":"m"}}"#)), expected, "{code}");
            assert_eq!(class(400, &format!(r#"{{"__type":"com.amazonaws.kms#{code}","Message":"m"}}"#)), expected, "{code}");
        }
        for skewed in ["Signature expired: 20260101T000000Z is now earlier than", "Signature not yet current: 2026"] {
            assert_eq!(class(400, &format!(r#"{{"__type":"InvalidSignatureException","message":"{skewed}"}}"#)), Class::Clock);
        }
    }

    #[test]
    fn without_a_code_the_status_decides() {
        for (status, expected) in [
            (429, Class::Throttled),
            (500, Class::Transient),
            (502, Class::Transient),
            (503, Class::Transient),
            (504, Class::Transient),
            (408, Class::Transient),
            (401, Class::Denied),
            (403, Class::Denied),
            (400, Class::Misconfigured),
            (404, Class::Misconfigured),
            (301, Class::Misconfigured),
        ] {
            for body in ["", "<html>", "{}", "[1]", r#"{"__type":7}"#, "\u{0}"] {
                assert_eq!(class(status, body), expected, "{status} {body}");
            }
        }
    }

    #[test]
    fn the_headers_count_where_the_body_is_silent() {
        let mut headers = HeaderMap::new();
        headers.insert("x-amzn-errortype", "NotFoundException:http://internal.amazon.com/".parse().unwrap());
        headers.insert("x-amzn-requestid", "2f1c".parse().unwrap());
        headers.insert(RETRY_AFTER, "7".parse().unwrap());
        let told = fault(StatusCode::BAD_REQUEST, headers, "");
        assert_eq!((told.class, told.retry_after), (Class::NotFound, Some(Duration::from_secs(7))));
        assert_eq!(told.what, "HTTP 400: NotFoundException (request 2f1c)");
    }

    #[test]
    fn a_message_is_one_bounded_line() {
        let body = r#"{"__type":"InvalidSignatureException","message":"It does not match.\n\nThe Canonical String was 'x-amz-security-token:SECRET'"}"#;
        let told = fault(StatusCode::BAD_REQUEST, HeaderMap::new(), body);
        assert_eq!(told.what, "HTTP 400: InvalidSignatureException: It does not match.");
        let body = format!(r#"{{"__type":"{}","message":"\u001b[31m{}"}}"#, "A".repeat(500), "é".repeat(5_000));
        let told = fault(StatusCode::BAD_REQUEST, HeaderMap::new(), &body);
        assert!(told.what.chars().count() < 450 && !told.what.contains('\u{1b}'), "{}", told.what);
    }
}
