use http::StatusCode;
use serde::Deserialize;

use crate::kms::{
    exchange::Answer,
    fault::{Class, Fault, Told},
};

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase")]
struct ErrorBody {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
    #[serde(default)]
    request_id: String,
}

/// What an error answer of Alibaba Cloud says. `secrets` are those of the request.
pub(super) fn fault<'a>(answer: &Answer, secrets: impl IntoIterator<Item = &'a str>) -> Fault {
    let ErrorBody { code, message, request_id } = serde_json::from_slice(&answer.body).unwrap_or_default();
    // Where a signature is wrong, what they signed is repeated, security token included.
    let message = if code.contains("Signature") { message.split(". ").next().unwrap_or_default() } else { &message };
    Fault::new(classify(answer.status, &code), answer, &Told { code: &code, message, request: &request_id }, secrets)
}

/// By the code, not by the status: a key that is not there is a 404, and so can a token be that has expired.
/// <https://www.alibabacloud.com/help/en/kms/key-management-service/developer-reference/api-kms-2016-01-20-errorcodes>
fn classify(status: StatusCode, code: &str) -> Class {
    let (family, rest) = code.split_once('.').unwrap_or((code, ""));
    match (family, rest) {
        ("Throttling", _) | ("Rejected", "Throttling") => Class::Throttled,
        ("InvalidAccessKeyId", "NotFound") | ("InvalidSecurityToken", _) => Class::CredentialsExpired,
        ("Forbidden", "KeyNotFound" | "KeyVersionNotFound" | "AliasNotFound" | "ResourceNotFound") => Class::NotFound,
        _ => classify_family(status, family),
    }
}

fn classify_family(status: StatusCode, family: &str) -> Class {
    match family {
        "InternalFailure"
        | "InternalError"
        | "ServiceUnavailable"
        | "ServiceUnavailableTemporary"
        // The service itself spells it so, too.
        | "SerivceUnavailableTemporary"
        | "Timeout" => Class::Transient,
        "SignatureNonceUsed" => Class::Nonce,
        "DryRunOperationError" => Class::DryRun,
        "InvalidTimeStamp" | "IllegalTimestamp" => Class::Clock,
        "SignatureDoesNotMatch"
        | "InvalidSignature"
        | "IncompleteSignature"
        | "InvalidAccessKeyId"
        | "InvalidAccessKeySecret"
        | "MissingSecurityToken"
        | "MissingAccessKeyId" => Class::BadCredentials,
        "Forbidden" | "NoPermission" | "Unauthorized" => Class::Denied,
        "Rejected" | "Unsupported" | "UnsupportedOperation" => Class::KeyUnusable,
        "InvalidParameter" | "MissingParameter" | "ParseRequestParameterException" | "InvalidAction" | "InvalidVersion" => {
            Class::Misconfigured
        }
        _ => Class::of_status(status),
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderMap;
    use secrecy::zeroize::Zeroizing;

    use super::*;

    fn fault(status: u16, body: &str) -> Fault {
        let body = Zeroizing::new(body.as_bytes().to_vec());
        super::fault(
            &Answer { status: StatusCode::from_u16(status).unwrap(), headers: HeaderMap::new(), body },
            ["a-secret-token"],
        )
    }

    #[test]
    fn codes_mean_what_the_documentation_says() {
        for (status, code, expected) in [
            (429, "Rejected.Throttling", Class::Throttled),
            (400, "Throttling", Class::Throttled),
            (400, "Throttling.User", Class::Throttled),
            (400, "Throttling.Api", Class::Throttled),
            (500, "InternalFailure", Class::Transient),
            (503, "ServiceUnavailableTemporary", Class::Transient),
            (503, "SerivceUnavailableTemporary", Class::Transient),
            (400, "SignatureNonceUsed", Class::Nonce),
            (400, "DryRunOperationError", Class::DryRun),
            (400, "InvalidSecurityToken.Expired", Class::CredentialsExpired),
            (400, "InvalidSecurityToken.Malformed", Class::CredentialsExpired),
            (404, "InvalidAccessKeyId.NotFound", Class::CredentialsExpired),
            (403, "InvalidAccessKeyId.Inactive", Class::BadCredentials),
            (400, "InvalidTimeStamp.Expired", Class::Clock),
            (400, "IllegalTimestamp", Class::Clock),
            (403, "Forbidden.NoPermission", Class::Denied),
            (403, "Forbidden.AccessKey", Class::Denied),
            (403, "Forbidden.KmsServiceNotEnabled", Class::Denied),
            (403, "Forbidden.InDebt", Class::Denied),
            (403, "Forbidden.InDebtOverdue", Class::Denied),
            (403, "Forbidden.ProhibitedByRiskControl", Class::Denied),
            (400, "SignatureDoesNotMatch", Class::BadCredentials),
            (400, "IncompleteSignature", Class::BadCredentials),
            (409, "Rejected.Disabled", Class::KeyUnusable),
            (409, "Rejected.PendingDeletion", Class::KeyUnusable),
            (409, "Rejected.PendingImport", Class::KeyUnusable),
            (400, "UnsupportedOperation", Class::KeyUnusable),
            (400, "Unsupported.KeySpec", Class::KeyUnusable),
            (404, "Forbidden.KeyNotFound", Class::NotFound),
            (404, "Forbidden.KeyVersionNotFound", Class::NotFound),
            (404, "Forbidden.AliasNotFound", Class::NotFound),
            (400, "InvalidParameter", Class::Misconfigured),
            (400, "MissingParameter", Class::Misconfigured),
            (400, "ParseRequestParameterException", Class::Misconfigured),
            (400, "SomethingNew", Class::Misconfigured),
            (502, "SomethingNew", Class::Transient),
        ] {
            let body = format!(r#"{{"Code":"{code}","Message":"m","RequestId":"r","HostId":"h"}}"#);
            assert_eq!(fault(status, &body).class, expected, "{code}");
        }
    }

    #[test]
    fn without_a_code_the_status_decides() {
        for (status, expected) in [
            (429, Class::Throttled),
            (500, Class::Transient),
            (408, Class::Transient),
            (403, Class::Denied),
            (302, Class::Misconfigured),
        ] {
            for body in ["", "<html>", "{}", "[1]", r#"{"Code":7}"#] {
                assert_eq!(fault(status, body).class, expected, "{status} {body}");
            }
        }
    }

    #[test]
    fn a_message_is_one_bounded_line_without_what_was_signed() {
        let said = "Specified signature does not match our calculation. server StringToSign is [..x-acs-security-token:SECRET..]";
        let body = format!(r#"{{"Code":"SignatureDoesNotMatch","Message":"{said}","RequestId":"0A1B"}}"#);
        let what = "HTTP 400: SignatureDoesNotMatch: Specified signature does not match our calculation (request 0A1B)";
        assert_eq!(fault(400, &body).what, what);
        let body = format!(r#"{{"Code":"{}","Message":"\u001b[31m{}"}}"#, "A".repeat(500), "é".repeat(5_000));
        let echo = format!(r#"{{"Code":"Strange","Message":"{}a-secret-token"}}"#, "x".repeat(293));
        let what_of_echo = fault(400, &echo).what;
        assert!(what_of_echo.contains("x<redac") && !what_of_echo.contains("a-sec"), "{what_of_echo}");
        let what = fault(400, &body).what;
        assert!(what.chars().count() < 450 && !what.contains('\u{1b}'), "{what}");
    }
}
