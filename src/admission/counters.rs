use std::{
    collections::HashMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use super::judge::Verdict;
use crate::{policy::Mode, telemetry::Sample};

/// What is counted, for [`crate::telemetry::Metrics::attach`].
pub const FAMILIES: &[(&str, &str)] = &[
    ("admission_images_attested", "Images of reviews that met every policy"),
    ("admission_images_unmet", "Images of reviews that did not meet a policy, by policy, its mode and why"),
    ("admission_malformed", "Requests that were no AdmissionReview"),
];

/// What reviews found, since the process began.
#[derive(Debug, Default)]
pub struct Counters {
    attested: AtomicU64,
    malformed: AtomicU64,
    /// By names of the configuration and words of this program, so of bounded number.
    unmet: Mutex<HashMap<(String, Mode, &'static str), u64>>,
}

impl Counters {
    pub(super) fn judged(&self, verdicts: &[Verdict]) {
        for verdict in verdicts {
            if verdict.unmet.is_empty() {
                self.attested.fetch_add(1, Relaxed);
                continue;
            }
            let mut counts = self.unmet.lock().unwrap_or_else(PoisonError::into_inner);
            for unmet in &verdict.unmet {
                let policy = &unmet.bound.policy;
                *counts.entry((policy.name.clone(), policy.mode, unmet.why.name())).or_default() += 1;
            }
        }
    }

    pub(super) fn malformed(&self) {
        self.malformed.fetch_add(1, Relaxed);
    }

    #[must_use]
    pub fn samples(&self) -> Vec<Sample> {
        let one = |name, value: &AtomicU64| Sample { name, labels: vec![], value: value.load(Relaxed) };
        let counts = self.unmet.lock().unwrap_or_else(PoisonError::into_inner);
        let unmet = counts.iter().map(|((policy, mode, why), value)| Sample {
            name: FAMILIES[1].0,
            labels: vec![("policy", policy.clone()), ("mode", mode.name().to_owned()), ("reason", (*why).to_owned())],
            value: *value,
        });
        let fixed = [one(FAMILIES[0].0, &self.attested), one(FAMILIES[2].0, &self.malformed)];
        fixed.into_iter().chain(unmet).collect()
    }
}
