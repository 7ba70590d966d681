//! The admission webhook: an `AdmissionReview` in, an answer out inside its deadline, and only attested images run.
//!
//! It needs public keys only. What it cannot find out in time it denies, with the reason (fail-closed); what it has verified
//! it remembers, so that most reviews cost no request at all. Nothing here signs, and no cloud is called.
//!
//! ```text
//! route > review > workload (which images, and which of them are new) > policy (what the namespace demands)
//!       > breakglass | judge > evidence > registry, verify                       answers allow or deny(reason)
//! ```

mod answer;
mod breakglass;
mod built;
mod cache;
mod certificate;
mod counters;
mod daemon;
mod docker_config;
mod evidence;
mod judge;
pub mod manifest;
mod pull_secrets;
mod resources;
mod review;
mod route;
mod running;
mod why;
mod workload;

use std::{sync::Arc, time::Duration};

use serde_json::value::RawValue;
use tokio::time::Instant;
use tracing::{info, warn};

pub use self::{
    answer::{of_image, shown},
    certificate::{Authority, Error as CertificateError, RENEWAL},
    counters::{Counters, FAMILIES},
    daemon::Daemon,
    docker_config::{DockerConfig, Error as DockerConfigError},
    evidence::{Examiner, Settings as ExaminerSettings},
    judge::{Judge, MOST_IMAGES, Terms, Verdict},
    pull_secrets::{Logins, PullSecrets},
    resources::{
        Beside, Given as GivenResources, Kept, Kind as ResourceKind, Resources, State, definitions,
        manifest as definitions_manifest,
    },
    review::{GroupKind, Request, Response},
    route::{Webhook, router},
    running::{Error as RunningError, Finding, Findings, Looks, Pod, Running},
    why::{Fault, Why, chain},
    workload::{Image, Kinds, PulledWith, Workload},
};
use crate::policy::Bound;

/// Which of the two webhooks asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// It may only say yes or no.
    Validate,
    /// It may also pin tags.
    Mutate,
}

impl Endpoint {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Validate => "validate",
            Self::Mutate => "mutate",
        }
    }
}

/// What came of a review, as metrics have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Decision {
    Attested,
    Denied,
    /// Admitted in an emergency.
    Breakglass,
    /// No policy is in force in the namespace.
    NoPolicy,
    /// The update brings no image.
    Unchanged,
    /// Neither a creation nor an update, or of a kind that runs nothing.
    NotAsked,
}

impl Decision {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Attested => "attested",
            Self::Denied => "denied",
            Self::Breakglass => "breakglass",
            Self::NoPolicy => "no_policy",
            Self::Unchanged => "unchanged",
            Self::NotAsked => "not_asked",
        }
    }
}

impl Judge {
    /// Answers one review before `deadline`, which is `patience` after it came.
    pub async fn review(
        &self,
        request: &Request<'_>,
        endpoint: Endpoint,
        deadline: Instant,
        patience: Duration,
        counters: &Counters,
    ) -> (Decision, Response) {
        let admitted = |decision| (decision, Response::default());
        let denied = |message| (Decision::Denied, Response { denied: Some(message), ..Response::default() });
        if !matches!(&*request.operation, "CREATE" | "UPDATE") {
            return admitted(Decision::NotAsked);
        }
        let workload = match request.object.map(|object| self.kinds.read(&request.kind, object)) {
            None | Some(Ok(None)) => return self.not_known(request),
            Some(Ok(Some(workload))) => workload,
            Some(Err(error)) => return denied(why::chain(&error)),
        };
        let before = match request.old_object.filter(|_| request.operation == "UPDATE").map(|old| self.read_old(request, old)) {
            None => Workload::default(),
            Some(Ok(before)) => before,
            Some(Err(message)) => return denied(message),
        };
        let images = workload.changed_since(&before);
        // Who only adds the annotation prepares for images that are still to come.
        let is_emergency = !workload.breakglass.is_empty() && (!images.is_empty() || workload.breakglass != before.breakglass);
        if images.is_empty() && !is_emergency {
            return admitted(Decision::Unchanged);
        }
        let policies = self.policies.of(&request.namespace);
        if policies.is_empty() {
            return admitted(Decision::NoPolicy);
        }
        if is_emergency {
            return self.emergency(request, endpoint, &workload, &images);
        }
        let logins = self.pull_secrets.as_ref().map(|secrets| secrets.of(&request.namespace, &workload.pulled_with));
        let terms = Terms { pins: endpoint == Endpoint::Mutate, fresh: false, deadline, patience, logins: logins.as_ref() };
        let Some(verdicts) = self.images(images.iter().map(|image| image.text.as_str()), &policies, terms).await else {
            return denied(format!(
                "the object has more than {MOST_IMAGES} different images, which is more than is ever looked at"
            ));
        };
        counters.judged(&verdicts);
        respond(request, &policies, &images, &verdicts)
    }

    fn read_old(&self, request: &Request<'_>, old: &RawValue) -> Result<Workload, String> {
        self.kinds.read(&request.kind, old).map(Option::unwrap_or_default).map_err(|error| why::chain(&error))
    }

    fn not_known(&self, request: &Request<'_>) -> (Decision, Response) {
        let mut response = Response::default();
        // Subresources such as `scale` have objects of other kinds, which run nothing themselves.
        if request.sub_resource.is_empty() && request.object.is_some() && !self.policies.of(&request.namespace).is_empty() {
            let GroupKind { group, kind } = &request.kind;
            let (group, kind) = (shown(group), shown(kind));
            response
                .warnings
                .push(format!("countersign does not know where {kind} of {group:?} has its pods: see [admission] kinds"));
        }
        (Decision::NotAsked, response)
    }

    fn emergency(
        &self,
        request: &Request<'_>,
        endpoint: Endpoint,
        workload: &Workload,
        images: &[Image],
    ) -> (Decision, Response) {
        let mut response = Response::default();
        let user = &request.user_info;
        match breakglass::judge(&workload.breakglass, user, self.breakglass.as_ref(), self.clock.now()) {
            Ok(emergency) => {
                let reason = format!("{} until {}: {}", user.username, emergency.until, emergency.reason);
                // Not only what is unmet: in an emergency, nothing is asked of a registry that may be what is down.
                warn!(
                    namespace = request.namespace,
                    kind = request.kind.kind,
                    name = request.name,
                    user = user.username,
                    until = %emergency.until,
                    reason = emergency.reason,
                    images = images.len(),
                    dry_run = request.dry_run.unwrap_or_default(),
                    "breakglass: admitted past all policies"
                );
                // Both webhooks may be asked of one object, and it has its name and uid for sure only when it is validated.
                if let Some(events) = &self.events
                    && endpoint == Endpoint::Validate
                    && !request.dry_run.unwrap_or_default()
                {
                    events.report(emergency.notice(request));
                }
                response.warnings.push("breakglass: the images were admitted past all policies".to_owned());
                response.audit.insert("breakglass".to_owned(), reason);
                (Decision::Breakglass, response)
            }
            Err(refusal) => {
                warn!(
                    namespace = request.namespace,
                    kind = request.kind.kind,
                    name = request.name,
                    user = user.username,
                    error = &refusal as &dyn std::error::Error,
                    "breakglass: refused"
                );
                response.denied = Some(refusal.message());
                (Decision::Denied, response)
            }
        }
    }
}

/// What the API server is told of the images that were judged.
fn respond(request: &Request<'_>, policies: &[Arc<Bound>], images: &[Image], verdicts: &[Verdict]) -> (Decision, Response) {
    let mut response = Response {
        denied: answer::denial(verdicts),
        warnings: answer::warnings(verdicts),
        audit: answer::audit(verdicts),
        patch: vec![],
    };
    let decision = if response.denied.is_some() { Decision::Denied } else { Decision::Attested };
    if decision == Decision::Attested {
        for image in images {
            let pinned = verdicts.iter().find(|verdict| verdict.text == image.text).and_then(|verdict| verdict.pinned.as_ref());
            response.patch.extend(pinned.map(|pinned| image.replaced_by(pinned.to_string())));
        }
    }
    for verdict in verdicts.iter().filter(|verdict| !verdict.unmet.is_empty()) {
        let reasons: Vec<_> =
            verdict.unmet.iter().take(8).map(|unmet| (unmet.bound.policy.name.as_str(), unmet.why.name())).collect();
        info!(
            namespace = request.namespace,
            kind = request.kind.kind,
            name = request.name,
            user = request.user_info.username,
            image = shown(&verdict.text),
            policies = policies.len(),
            reasons = ?reasons,
            denied = response.denied.is_some(),
            "an image is not attested"
        );
    }
    (decision, response)
}

#[cfg(test)]
mod tests;
