//! Getting past all policies in an emergency: an annotation that says until when and why, from somebody who may.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::{
    review::{Request, UserInfo},
    workload::BREAKGLASS,
};
use crate::{config::Breakglass, kubernetes::Notice};

/// An annotation that counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Emergency {
    pub until: Timestamp,
    pub reason: String,
}

/// Why an annotation does not count. Each denies the object, whatever its images are: who writes it wants something that
/// is not to be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error(
        "it is written \"until TIME because REASON\", for example \"until 2026-11-22T18:00:00Z because INC-42: registry down\""
    )]
    Malformed,
    #[error("{0:?} is none of the users and groups that [admission] breakglass names")]
    NotAllowed(String),
    #[error("nobody may use it here: [admission] has no breakglass")]
    Off,
    #[error("it ended at {0}")]
    Over(Timestamp),
    #[error("it would last until {until}, and may last until {latest} at most")]
    TooLong { until: Timestamp, latest: Timestamp },
    #[error("the object and its pod template have different ones")]
    Ambiguous,
}

/// What the annotations of an object and its templates are worth. There is at least one.
pub fn judge(
    annotations: &[String],
    user: &UserInfo,
    allowed: Option<&Breakglass>,
    now: Timestamp,
) -> Result<Emergency, Refusal> {
    let [annotation] = annotations else { return Err(Refusal::Ambiguous) };
    let allowed = allowed.ok_or(Refusal::Off)?;
    let is_allowed = allowed.users.contains(&user.username) || user.groups.iter().any(|group| allowed.groups.contains(group));
    if !is_allowed {
        return Err(Refusal::NotAllowed(user.username.clone()));
    }
    let emergency = parse(annotation).ok_or(Refusal::Malformed)?;
    if emergency.until <= now {
        return Err(Refusal::Over(emergency.until));
    }
    let latest = now.checked_add(allowed.longest).unwrap_or(Timestamp::MAX);
    if emergency.until > latest {
        return Err(Refusal::TooLong { until: emergency.until, latest });
    }
    Ok(emergency)
}

impl Emergency {
    /// What the cluster is told of the object that was admitted.
    #[must_use]
    pub fn notice(&self, request: &Request<'_>) -> Notice {
        let user = &request.user_info.username;
        Notice {
            regarding: regarding(request),
            reason: "Breakglass",
            action: "Admitted",
            note: format!("{user} got past all policies, until {}: {}", self.until, self.reason),
            once: None,
        }
    }
}

/// The object of a review. What is created has its name and its uid in the object alone.
fn regarding(request: &Request<'_>) -> ObjectReference {
    #[derive(Default, Deserialize)]
    struct Object {
        #[serde(default)]
        metadata: Metadata,
    }
    #[derive(Default, Deserialize)]
    struct Metadata {
        name: Option<String>,
        uid: Option<String>,
    }
    let read = |object: &RawValue| serde_json::from_str::<Object>(object.get()).ok();
    let Metadata { name, uid } = request.object.and_then(read).unwrap_or_default().metadata;
    let (group, version) = (&request.kind.group, &request.resource.version);
    let version = if version.is_empty() { "v1" } else { version };
    ObjectReference {
        api_version: Some(if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") }),
        kind: Some(request.kind.kind.clone()),
        namespace: Some(request.namespace.clone()),
        name: name.or_else(|| Some(request.name.clone()).filter(|name| !name.is_empty())),
        uid,
        ..ObjectReference::default()
    }
}

impl Refusal {
    /// What the user reads.
    #[must_use]
    pub fn message(&self) -> String {
        format!("the annotation {BREAKGLASS} does not count: {self}")
    }
}

fn parse(annotation: &str) -> Option<Emergency> {
    const LONGEST: usize = 1024;
    let rest = annotation.trim().strip_prefix("until ")?;
    let (until, reason) = rest.split_once(" because ")?;
    let (until, reason) = (until.trim().parse().ok()?, reason.trim());
    let is_readable = !reason.is_empty() && reason.len() <= LONGEST && !reason.contains(char::is_control);
    is_readable.then(|| Emergency { until, reason: reason.to_owned() })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn judged(annotations: &[&str], user: &str, groups: &[&str]) -> Result<Emergency, Refusal> {
        let allowed =
            Breakglass { users: vec!["anna".into()], groups: vec!["oncall".into()], longest: Duration::from_secs(24 * 3600) };
        let user = UserInfo { username: user.into(), groups: groups.iter().map(|&group| group.into()).collect() };
        let annotations: Vec<_> = annotations.iter().map(|&text| text.to_owned()).collect();
        judge(&annotations, &user, Some(&allowed), "2026-11-22T12:00:00Z".parse().unwrap())
    }

    #[test]
    fn the_cluster_is_told_of_the_object_by_its_kind_name_and_uid() {
        let review = br#"{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1","request":{"uid":"u","operation":"CREATE",
            "kind":{"group":"apps","version":"v1","kind":"Deployment"},"resource":{"group":"apps","version":"v1","resource":"deployments"},
            "namespace":"payments","userInfo":{"username":"anna"},"object":{"metadata":{"name":"web","uid":"42"}}}}"#;
        let emergency = Emergency { until: "2026-11-22T18:00:00Z".parse().unwrap(), reason: "INC-42".into() };
        let notice = emergency.notice(&Request::parse(review).unwrap());
        let of = |text: &Option<String>| text.clone().unwrap_or_default();
        let regarding = &notice.regarding;
        assert_eq!((of(&regarding.api_version), of(&regarding.kind)), ("apps/v1".into(), "Deployment".into()));
        assert_eq!((of(&regarding.namespace), of(&regarding.name)), ("payments".into(), "web".into()));
        assert_eq!(of(&regarding.uid), "42");
        assert_eq!(notice.note, "anna got past all policies, until 2026-11-22T18:00:00Z: INC-42");
    }

    #[test]
    fn users_and_groups_that_may_get_past_until_the_time_they_name() {
        let annotation = "until 2026-11-22T18:00:00Z because INC-42: the registry is down";
        for (user, groups) in [("anna", &[][..]), ("bob", &["devs", "oncall"])] {
            let emergency = judged(&[annotation], user, groups).unwrap();
            assert_eq!(emergency.reason, "INC-42: the registry is down");
            assert_eq!(emergency.until, "2026-11-22T18:00:00Z".parse().unwrap());
        }
    }

    #[test]
    fn anything_else_is_refused_with_the_reason() {
        let good = "until 2026-11-22T18:00:00Z because x";
        assert_eq!(judged(&[good], "bob", &["devs"]), Err(Refusal::NotAllowed("bob".into())));
        assert_eq!(judged(&[good, "true"], "anna", &[]), Err(Refusal::Ambiguous));
        for bad in ["", "true", "until tomorrow because x", "until 2026-11-22T18:00:00Z because ", "2026-11-22T18:00:00Z x"] {
            assert_eq!(judged(&[bad], "anna", &[]), Err(Refusal::Malformed), "{bad}");
        }
        assert!(matches!(judged(&["until 2026-11-22T12:00:00Z because x"], "anna", &[]), Err(Refusal::Over(_))));
        assert!(matches!(judged(&["until 2026-11-23T12:00:01Z because x"], "anna", &[]), Err(Refusal::TooLong { .. })));
        let nobody = judge(&[good.to_owned()], &UserInfo::default(), None, Timestamp::UNIX_EPOCH);
        assert_eq!(nobody, Err(Refusal::Off));
    }
}
