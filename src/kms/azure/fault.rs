use http::StatusCode;
use serde::Deserialize;

use crate::kms::{
    exchange::Answer,
    fault::{Class, Fault, Told},
};

#[derive(Deserialize, Default)]
struct ErrorBody {
    #[serde(default)]
    error: ErrorDetail,
}

#[derive(Deserialize, Default)]
struct ErrorDetail {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
    #[serde(default, alias = "innerError")]
    innererror: Option<InnerError>,
}

#[derive(Deserialize)]
struct InnerError {
    #[serde(default)]
    code: String,
}

/// What an error answer of Key Vault says. `secret` is the request's.
/// <https://learn.microsoft.com/azure/key-vault/general/rest-error-codes>
pub(super) fn fault(answer: &Answer, secret: &str) -> Fault {
    let ErrorDetail { code, message, innererror } = serde_json::from_slice::<ErrorBody>(&answer.body).unwrap_or_default().error;
    let inner = innererror.map(|inner| inner.code).unwrap_or_default();
    let both = if inner.is_empty() { code.clone() } else { format!("{code} ({inner})") };
    let request = answer.headers.get("x-ms-request-id").and_then(|value| value.to_str().ok()).unwrap_or_default();
    let told = Told { code: &both, message: &message, request };
    Fault::new(classify(answer.status, &code, &inner), answer, &told, [secret])
}

fn classify(status: StatusCode, code: &str, inner: &str) -> Class {
    match (code, inner) {
        ("Throttled" | "TooManyRequests", _) => Class::Throttled,
        (
            _,
            "KeyDisabled"
            | "KeyNotYetValid"
            | "KeyExpired"
            | "KeyOperationForbidden"
            | "ObjectIsBeingDeleted"
            | "ObjectIsDeletedButRecoverable"
            | "ObjectIsBeingRecovered",
        )
        | ("KeyDisabled" | "KeyNotYetValid" | "KeyExpired" | "KeyOperationForbidden", _) => Class::KeyUnusable,
        ("KeyNotFound" | "SecretNotFound" | "VaultNotFound", _) => Class::NotFound,
        ("Unauthorized", _) => Class::CredentialsExpired,
        ("Forbidden" | "AccessDenied", _) => Class::Denied,
        ("BadParameter" | "BadRequest", _) => Class::Misconfigured,
        _ => match status {
            StatusCode::UNAUTHORIZED => Class::CredentialsExpired,
            StatusCode::NOT_FOUND => Class::NotFound,
            // Deleted, being deleted or being recovered.
            StatusCode::CONFLICT => Class::KeyUnusable,
            status => Class::of_status(status),
        },
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderMap;

    use super::*;

    fn fault_of(http: u16, body: &str) -> Fault {
        let status = StatusCode::from_u16(http).unwrap();
        let headers = HeaderMap::from_iter([("x-ms-request-id".parse().unwrap(), "0a1b".parse().unwrap())]);
        fault(&Answer { status, headers, body: body.as_bytes().to_vec().into() }, "eyJ0.secret")
    }

    #[test]
    fn codes_mean_what_the_documentation_says() {
        for (http, code, inner, expected) in [
            (401, "Unauthorized", "", Class::CredentialsExpired),
            (403, "Forbidden", "ForbiddenByRbac", Class::Denied),
            (403, "Forbidden", "ForbiddenByPolicy", Class::Denied),
            (403, "Forbidden", "ForbiddenByFirewall", Class::Denied),
            (403, "Forbidden", "ForbiddenByConnection", Class::Denied),
            (403, "Forbidden", "AccessDenied", Class::Denied),
            (403, "Forbidden", "KeyDisabled", Class::KeyUnusable),
            (403, "Forbidden", "KeyNotYetValid", Class::KeyUnusable),
            (403, "Forbidden", "KeyExpired", Class::KeyUnusable),
            (404, "KeyNotFound", "", Class::NotFound),
            (404, "", "", Class::NotFound),
            (409, "Conflict", "ObjectIsDeletedButRecoverable", Class::KeyUnusable),
            (409, "Conflict", "", Class::KeyUnusable),
            (429, "Throttled", "", Class::Throttled),
            (429, "", "", Class::Throttled),
            (500, "InternalServerError", "", Class::Transient),
            (503, "ServiceUnavailable", "", Class::Transient),
            (400, "BadParameter", "", Class::Misconfigured),
            (400, "SomethingNew", "", Class::Misconfigured),
        ] {
            let inner = if inner.is_empty() { serde_json::Value::Null } else { serde_json::json!({ "code": inner }) };
            let body = serde_json::json!({ "error": { "code": code, "message": "m", "innererror": inner } });
            assert_eq!(fault_of(http, &body.to_string()).class, expected, "{http} {code} {inner}");
        }
    }

    #[test]
    fn what_is_said_is_one_line_and_no_secret_is_repeated() {
        let body = r#"{"error":{"code":"Forbidden","message":"Caller eyJ0.secret is not authorized\r\nAction: sign","innererror":{"code":"ForbiddenByRbac"}}}"#;
        let what = "HTTP 403: Forbidden (ForbiddenByRbac): Caller <redacted> is not authorized (request 0a1b)";
        assert_eq!(fault_of(403, body).what, what);
        for body in ["", "<html>", "{}", "[1]", r#"{"error":7}"#] {
            assert_eq!(fault_of(502, body).what, "HTTP 502 (request 0a1b)", "{body}");
        }
    }
}
