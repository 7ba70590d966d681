//! `AdmissionReview` of `admission.k8s.io/v1`, as much of it as a decision takes. Objects stay the text they came as: only
//! the members on the way to images are ever looked at, so a review of megabytes costs one pass over its bytes.

use std::{borrow::Cow, collections::BTreeMap, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

const API_VERSION: &str = "admission.k8s.io/v1";

/// What the API server asks.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Request<'a> {
    #[serde(borrow)]
    pub uid: Cow<'a, str>,
    pub kind: GroupKind,
    #[serde(default)]
    pub resource: Resource,
    /// `CREATE`, `UPDATE`, `DELETE` or `CONNECT`.
    #[serde(borrow)]
    pub operation: Cow<'a, str>,
    /// Empty for what is in no namespace.
    #[serde(default)]
    pub namespace: String,
    /// Empty where the API server is still to make it up.
    #[serde(default)]
    pub name: String,
    #[serde(default)]
    pub sub_resource: String,
    #[serde(default)]
    pub user_info: UserInfo,
    #[serde(borrow, default)]
    pub object: Option<&'a RawValue>,
    #[serde(borrow, default)]
    pub old_object: Option<&'a RawValue>,
    #[serde(default)]
    pub dry_run: Option<bool>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Deserialize)]
pub struct GroupKind {
    #[serde(default)]
    pub group: String,
    pub kind: String,
}

/// What is asked about, by the version that its object is in.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Resource {
    #[serde(default)]
    pub version: String,
}

/// Who asked for it, as the cluster authenticated them.
#[derive(Debug, Default, Deserialize)]
pub struct UserInfo {
    #[serde(default)]
    pub username: String,
    #[serde(default)]
    pub groups: Vec<String>,
}

/// Why a body is no review.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the body is no AdmissionReview: {0}")]
    Json(#[source] serde_json::Error),
    #[error("the body is no AdmissionReview of {API_VERSION}: set admissionReviewVersions: [\"v1\"] on the webhook")]
    Version,
    #[error("the AdmissionReview has no request")]
    NoRequest,
}

impl<'a> Request<'a> {
    /// Reads the body of a call.
    pub fn parse(body: &'a [u8]) -> Result<Self, Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Review<'a> {
            #[serde(borrow)]
            api_version: Cow<'a, str>,
            #[serde(borrow)]
            kind: Cow<'a, str>,
            // Read only once it is known to be of the version that has such a one.
            #[serde(borrow)]
            request: Option<&'a RawValue>,
        }
        let review: Review<'_> = serde_json::from_slice(body).map_err(Error::Json)?;
        if review.api_version != API_VERSION || review.kind != "AdmissionReview" {
            return Err(Error::Version);
        }
        let request = review.request.ok_or(Error::NoRequest)?;
        serde_json::from_str(request.get()).map_err(Error::Json)
    }
}

/// What the API server is told.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Response {
    /// None: it is admitted. Otherwise what its user reads.
    pub denied: Option<String>,
    /// What its user reads although it is admitted. The API server cuts each at 256 characters.
    pub warnings: Vec<String>,
    /// For the cluster's audit log; the API server puts the webhook's name before each key.
    pub audit: BTreeMap<String, String>,
    pub patch: Vec<Replace>,
}

/// One member of the object that is to have another value: an operation of a JSON patch (RFC 6902).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replace {
    /// A JSON pointer (RFC 6901).
    pub path: String,
    pub value: String,
}

impl Response {
    /// The answer to the review with this `uid`.
    #[must_use]
    pub fn to_json(&self, uid: &str) -> Vec<u8> {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Review<'a> {
            api_version: &'a str,
            kind: &'a str,
            response: Wire<'a>,
        }
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Wire<'a> {
            uid: &'a str,
            allowed: bool,
            #[serde(skip_serializing_if = "Option::is_none")]
            status: Option<Status<'a>>,
            #[serde(skip_serializing_if = "<[_]>::is_empty")]
            warnings: &'a [String],
            #[serde(skip_serializing_if = "BTreeMap::is_empty")]
            audit_annotations: &'a BTreeMap<String, String>,
            #[serde(skip_serializing_if = "Option::is_none")]
            patch_type: Option<&'a str>,
            #[serde(skip_serializing_if = "Option::is_none")]
            patch: Option<String>,
        }
        #[derive(Serialize)]
        struct Status<'a> {
            code: u16,
            reason: &'a str,
            message: &'a str,
        }
        #[derive(Serialize)]
        struct Operation<'a> {
            op: &'a str,
            path: &'a str,
            value: &'a str,
        }
        let operations = || {
            let replace = |one: &Replace| serde_json::json!(Operation { op: "replace", path: &one.path, value: &one.value });
            self.patch.iter().map(replace).collect::<serde_json::Value>().to_string()
        };
        let is_patched = self.denied.is_none() && !self.patch.is_empty();
        let response = Wire {
            uid,
            allowed: self.denied.is_none(),
            status: self.denied.as_deref().map(|message| Status { code: 403, reason: "Forbidden", message }),
            warnings: &self.warnings,
            audit_annotations: &self.audit,
            patch_type: is_patched.then_some("JSONPatch"),
            patch: is_patched.then(|| BASE64.encode(operations())),
        };
        let review = Review { api_version: API_VERSION, kind: "AdmissionReview", response };
        serde_json::to_vec(&review).expect("texts always serialise")
    }
}

/// The time that the API server waits, from the query that it calls with (`?timeout=10s`).
#[must_use]
pub fn timeout_of(query: Option<&str>) -> Option<Duration> {
    let value = query?.split('&').find_map(|pair| pair.strip_prefix("timeout="))?;
    crate::config::parse_duration(value).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_review_is_read_and_its_objects_stay_as_they_came() {
        let body =
            br#"{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1","request":{"uid":"u-1","kind":{"group":"apps",
            "version":"v1","kind":"Deployment"},"operation":"CREATE","namespace":"payments","userInfo":{"username":"\u0061nna",
            "groups":["devs"],"extra":{"a":["b"]}},"object":{"spec": {}},"oldObject":null,"dryRun":true,"options":null}}"#;
        let request = Request::parse(body).unwrap();
        assert_eq!((&*request.uid, &*request.operation, request.namespace.as_str()), ("u-1", "CREATE", "payments"));
        assert_eq!((request.kind.group.as_str(), request.kind.kind.as_str()), ("apps", "Deployment"));
        assert_eq!((request.user_info.username.as_str(), request.user_info.groups.len()), ("anna", 1));
        assert_eq!(request.object.map(RawValue::get), Some(r#"{"spec": {}}"#));
        assert!(request.old_object.is_none() && request.dry_run == Some(true));
    }

    #[test]
    fn what_is_no_review_of_this_version_is_refused_with_what_to_do() {
        let refused = |body: &str| Request::parse(body.as_bytes()).unwrap_err().to_string();
        assert!(refused("<html>").contains("no AdmissionReview"));
        let old = r#"{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1beta1","request":{}}"#;
        assert!(refused(old).contains("admissionReviewVersions"));
        let empty = r#"{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1"}"#;
        assert!(refused(empty).contains("no request"));
        let without_uid = r#"{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1","request":{"operation":"CREATE"}}"#;
        assert!(refused(without_uid).contains("no AdmissionReview"));
    }

    #[test]
    fn a_denial_carries_no_patch_and_an_admission_no_status() {
        let patch = vec![Replace { path: "/spec/containers/0/image".into(), value: "a@b".into() }];
        let admitted = Response { patch: patch.clone(), ..Response::default() };
        let told: serde_json::Value = serde_json::from_slice(&admitted.to_json("u")).unwrap();
        assert_eq!((&told["response"]["allowed"], &told["response"]["status"]), (&true.into(), &serde_json::Value::Null));
        let decoded = BASE64.decode(told["response"]["patch"].as_str().unwrap()).unwrap();
        assert_eq!(decoded, br#"[{"op":"replace","path":"/spec/containers/0/image","value":"a@b"}]"#);
        let denied = Response { denied: Some("no".into()), patch, ..Response::default() };
        let told: serde_json::Value = serde_json::from_slice(&denied.to_json("u")).unwrap();
        assert_eq!(
            (&told["response"]["patch"], &told["response"]["status"]["message"]),
            (&serde_json::Value::Null, &"no".into())
        );
    }

    #[test]
    fn the_api_servers_patience_is_read_from_its_query() {
        assert_eq!(timeout_of(Some("timeout=5s")), Some(Duration::from_secs(5)));
        assert_eq!(timeout_of(Some("a=b&timeout=500ms")), Some(Duration::from_millis(500)));
        assert_eq!((timeout_of(Some("timeout=soon")), timeout_of(None)), (None, None));
    }
}
