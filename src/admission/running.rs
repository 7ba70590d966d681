//! What runs already, judged again as what comes in is. It is only told of: nothing is ever evicted.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::{GroupKind, Judge, Kinds, PulledWith, Terms, Verdict, workload};
use crate::{policy::Mode, telemetry::Sample};

/// The images that run in a cluster.
#[derive(Debug, Default)]
pub struct Running {
    pods: usize,
    /// By image and namespace.
    images: BTreeMap<String, BTreeMap<String, Users>>,
}

/// The pods of a namespace that have one image, and what nodes pull it with.
#[derive(Debug, Default)]
struct Users {
    pods: Vec<Pod>,
    pulled_with: PulledWith,
}

/// A pod that runs.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct Pod {
    pub name: String,
    pub uid: String,
}

/// What was found.
#[derive(Debug, Default)]
pub struct Findings {
    /// Pods that run, whatever is demanded of them.
    pub pods: usize,
    /// Images in namespaces where policies have something to say of them.
    pub images: usize,
    /// Those of them that do not meet a policy.
    pub unmet: Vec<Finding>,
}

/// An image that runs in a namespace, and does not meet a policy there.
#[derive(Debug)]
pub struct Finding {
    pub namespace: String,
    pub pods: Vec<Pod>,
    pub verdict: Verdict,
}

/// Why it cannot be told what runs.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the cluster's list of pods cannot be read")]
    List(#[source] serde_json::Error),
    #[error("a pod of the cluster's list cannot be read")]
    Pod(#[source] workload::Error),
}

impl Running {
    /// Takes one page of the API's `PodList`, as JSON; returns what the next one is asked for by, if there is one. Pods that have
    /// ended run nothing.
    pub fn add(&mut self, page: &str) -> Result<Option<String>, Error> {
        #[derive(Deserialize)]
        struct List<'a> {
            metadata: ListMetadata,
            // A cluster without pods may say `null`.
            #[serde(borrow)]
            items: Option<Vec<&'a RawValue>>,
        }
        #[derive(Deserialize)]
        struct ListMetadata {
            #[serde(rename = "continue")]
            next: Option<String>,
        }
        let list: List<'_> = serde_json::from_str(page).map_err(Error::List)?;
        for pod in list.items.unwrap_or_default() {
            self.add_pod(pod)?;
        }
        Ok(list.metadata.next.filter(|next| !next.is_empty()))
    }

    fn add_pod(&mut self, object: &RawValue) -> Result<(), Error> {
        #[derive(Deserialize)]
        struct Head {
            metadata: Metadata,
            #[serde(default)]
            status: Status,
        }
        #[derive(Deserialize)]
        struct Metadata {
            name: String,
            namespace: String,
            uid: String,
        }
        #[derive(Default, Deserialize)]
        struct Status {
            #[serde(default)]
            phase: String,
        }
        let Head { metadata, status } = serde_json::from_str(object.get()).map_err(Error::List)?;
        if matches!(status.phase.as_str(), "Succeeded" | "Failed") {
            return Ok(());
        }
        let kind = GroupKind { group: String::new(), kind: "Pod".to_owned() };
        let workload = Kinds::default().read(&kind, object).map_err(Error::Pod)?.unwrap_or_default();
        self.pods += 1;
        for image in workload.images {
            let users = self.images.entry(image.text).or_default().entry(metadata.namespace.clone()).or_default();
            // Several of its containers may have the same image.
            if users.pods.last().is_none_or(|pod| pod.uid != metadata.uid) {
                users.pods.push(Pod { name: metadata.name.clone(), uid: metadata.uid.clone() });
                users.pulled_with.add(&workload.pulled_with);
            }
        }
        Ok(())
    }
}

impl Judge {
    /// Asks registries again for every image that runs where policies are in force: one after the other, `pause` apart at least.
    /// Each may take as long as `patience`.
    pub async fn recheck(&self, running: &Running, pause: Duration, patience: Duration) -> Findings {
        let mut turn = interval(pause);
        turn.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut findings = Findings { pods: running.pods, ..Findings::default() };
        for (image, namespaces) in &running.images {
            let demands = namespaces.iter().map(|(namespace, users)| (namespace, users, self.policies.of(namespace)));
            let demands: Vec<_> = demands.filter(|(_, _, policies)| !policies.is_empty()).collect();
            if demands.is_empty() {
                continue;
            }
            turn.tick().await;
            for (namespace, users, policies) in demands {
                let logins = self.pull_secrets.as_ref().map(|secrets| secrets.of(namespace, &users.pulled_with));
                // A tag that was admitted was pinned, or nobody minded.
                let deadline = Instant::now() + patience;
                let terms = Terms { pins: true, fresh: true, deadline, patience, logins: logins.as_ref() };
                let verdicts = self.images([image.as_str()], &policies, terms).await.unwrap_or_default();
                for verdict in verdicts.into_iter().filter(|verdict| verdict.asked > 0) {
                    findings.images += 1;
                    if !verdict.unmet.is_empty() {
                        findings.unmet.push(Finding { namespace: namespace.clone(), pods: users.pods.clone(), verdict });
                    }
                }
            }
        }
        findings.unmet.sort_by(|one, other| (&one.namespace, &one.verdict.text).cmp(&(&other.namespace, &other.verdict.text)));
        findings
    }
}

/// What the last look at a cluster found, for [`crate::telemetry::Metrics::attach_gauges`].
#[derive(Debug, Default)]
pub struct Looks(Mutex<Option<Look>>);

#[derive(Debug)]
struct Look {
    at: Timestamp,
    attested: usize,
    unmet: usize,
    unknown: usize,
    by_policy: BTreeMap<(String, Mode, &'static str), u64>,
}

impl Looks {
    pub const FAMILIES: &[(&str, &str)] = &[
        ("admission_running_looked_at", "When it was last looked at what runs, in seconds since 1970"),
        ("admission_running_images", "Images that ran then where policies are in force, by what they were found to be"),
        ("admission_running_unmet", "Images that ran then and did not meet a policy, by policy, its mode and why"),
    ];

    pub fn found(&self, findings: &Findings, at: Timestamp) {
        let unknown = findings.unmet.iter().filter(|finding| finding.is_unknown()).count();
        let mut by_policy = BTreeMap::new();
        for unmet in findings.unmet.iter().flat_map(|finding| &finding.verdict.unmet) {
            let policy = &unmet.bound.policy;
            *by_policy.entry((policy.name.clone(), policy.mode, unmet.why.name())).or_default() += 1;
        }
        let unmet = findings.unmet.len() - unknown;
        let look = Look { at, attested: findings.images - findings.unmet.len(), unmet, unknown, by_policy };
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(look);
    }

    #[must_use]
    pub fn samples(&self) -> Vec<Sample> {
        let look = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(look) = &*look else { return vec![] };
        let [looked_at, images, unmet] = [0, 1, 2].map(|family: usize| Self::FAMILIES[family].0);
        let at = Sample { name: looked_at, labels: vec![], value: look.at.as_second().unsigned_abs() };
        let by_state = [("attested", look.attested), ("unmet", look.unmet), ("unknown", look.unknown)];
        let by_state = by_state.map(|(state, count)| Sample {
            name: images,
            labels: vec![("state", state.to_owned())],
            value: count.try_into().unwrap_or(u64::MAX),
        });
        let by_policy = look.by_policy.iter().map(|((policy, mode, why), value)| Sample {
            name: unmet,
            labels: vec![("policy", policy.clone()), ("mode", mode.name().to_owned()), ("reason", (*why).to_owned())],
            value: *value,
        });
        [at].into_iter().chain(by_state).chain(by_policy).collect()
    }
}

impl Finding {
    /// Whether it would be denied now, for a reason that is the image's own.
    #[must_use]
    pub fn is_denied(&self) -> bool {
        self.verdict.enforced().any(|unmet| !unmet.why.is_unknown())
    }

    /// Whether all that is against it is that its registry did not answer.
    #[must_use]
    pub fn is_unknown(&self) -> bool {
        self.verdict.unmet.iter().all(|unmet| unmet.why.is_unknown())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(namespace: &str, name: &str, phase: &str, images: &[&str]) -> Value {
        let containers: Vec<_> = images.iter().map(|image| json!({"name": "c", "image": image})).collect();
        json!({
            "metadata": {"name": name, "namespace": namespace, "uid": format!("uid of {name}")},
            "spec": {"containers": containers, "initContainers": [{"name": "init", "image": "init:1"}]},
            "status": {"phase": phase},
        })
    }

    #[test]
    fn what_runs_is_taken_from_every_page_and_each_image_once_for_a_namespace() {
        let mut running = Running::default();
        let first = json!({"metadata": {"continue": "more"}, "items": [
            pod("payments", "a", "Running", &["app:1", "app:1"]),
            pod("payments", "b", "Pending", &["app:1"]),
            pod("payments", "done", "Succeeded", &["job:1"]),
            pod("payments", "lost", "Failed", &["job:1"]),
        ]});
        assert_eq!(running.add(&first.to_string()).unwrap().as_deref(), Some("more"));
        let last = json!({"metadata": {"continue": ""}, "items": [pod("shop", "c", "Running", &["app:1"])]});
        assert_eq!(running.add(&last.to_string()).unwrap(), None);
        assert_eq!(running.add(r#"{"metadata": {}, "items": null}"#).unwrap(), None);
        assert_eq!(running.pods, 3);
        assert_eq!(running.images.keys().collect::<Vec<_>>(), ["app:1", "init:1"]);
        let names =
            |namespace: &str| running.images["app:1"][namespace].pods.iter().map(|pod| pod.name.as_str()).collect::<Vec<_>>();
        assert_eq!((names("payments"), names("shop")), (vec!["a", "b"], vec!["c"]));
    }

    #[test]
    fn what_is_no_list_of_pods_is_an_error() {
        for page in ["", "[]", r#"{"items": []}"#, r#"{"metadata": {}, "items": [{}]}"#, r#"{"metadata": {}, "items": [7]}"#] {
            assert!(matches!(Running::default().add(page), Err(Error::List(_))), "{page}");
        }
        let broken = json!({"metadata": {}, "items": [{"metadata": {"name": "a", "namespace": "b", "uid": "c"}, "spec": 7}]});
        assert!(matches!(Running::default().add(&broken.to_string()), Err(Error::Pod(_))));
    }
}
