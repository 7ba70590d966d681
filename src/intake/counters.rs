//! What came in by each door, counted.

use std::{
    array,
    collections::BTreeMap,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use super::entry::{Ignored, Refusal};

/// The counters of all sources that there ever were in this process.
#[derive(Debug, Default)]
pub struct Counters {
    sources: RwLock<BTreeMap<String, Arc<SourceCounters>>>,
    /// For requests to sources that are not there.
    nobody: Arc<SourceCounters>,
}

/// One number to export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// Without the program's prefix and without `_total`: `intake_taken`.
    pub name: &'static str,
    /// In the order of writing. The values are from the configuration and from this program only.
    pub labels: Vec<(&'static str, String)>,
    pub value: u64,
}

impl Counters {
    /// Every counter, zeros too, so that a first count is seen as an increase. All only ever grow.
    #[must_use]
    pub fn samples(&self) -> Vec<Sample> {
        let sources = self.sources.read().unwrap_or_else(PoisonError::into_inner);
        let mut samples: Vec<Sample> = sources.iter().flat_map(|(name, counters)| counters.samples(name)).collect();
        samples.push(Sample {
            name: "intake_unauthorized",
            labels: vec![("source", String::new())],
            value: self.nobody.unauthorized.load(Relaxed),
        });
        samples
    }

    pub(super) fn of(&self, source: &str) -> Arc<SourceCounters> {
        let mut sources = self.sources.write().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(sources.entry(source.to_owned()).or_default())
    }

    pub(super) fn nobody(&self) -> &Arc<SourceCounters> {
        &self.nobody
    }
}

/// Why an authenticated request was not accepted.
#[derive(Debug, Clone, Copy)]
pub(super) enum Refused {
    /// The queue could not take it.
    Queue,
    /// Its body was too large, too slow or cut off.
    Body,
}

/// The counters of one source.
#[derive(Debug)]
pub(super) struct SourceCounters {
    requests: AtomicU64,
    unauthorized: AtomicU64,
    taken: AtomicU64,
    ignored: [AtomicU64; Ignored::ALL.len()],
    quarantined: [AtomicU64; Refusal::NAMES.len()],
    refused_queue: AtomicU64,
    refused_body: AtomicU64,
}

impl Default for SourceCounters {
    fn default() -> Self {
        Self {
            requests: AtomicU64::default(),
            unauthorized: AtomicU64::default(),
            taken: AtomicU64::default(),
            ignored: array::from_fn(|_| AtomicU64::default()),
            quarantined: array::from_fn(|_| AtomicU64::default()),
            refused_queue: AtomicU64::default(),
            refused_body: AtomicU64::default(),
        }
    }
}

impl SourceCounters {
    /// An authenticated request came in.
    pub(super) fn request(&self) {
        self.requests.fetch_add(1, Relaxed);
    }

    /// One without the secret was refused; returns how many there were by now.
    pub(super) fn unauthorized(&self) -> u64 {
        self.unauthorized.fetch_add(1, Relaxed) + 1
    }

    pub(super) fn refused(&self, why: Refused) {
        match why {
            Refused::Queue => &self.refused_queue,
            Refused::Body => &self.refused_body,
        }
        .fetch_add(1, Relaxed);
    }

    /// A body was accepted, and this is what was in it.
    pub(super) fn settled(&self, taken: usize, ignored: &[Ignored], refusals: &[Refusal]) {
        self.taken.fetch_add(taken as u64, Relaxed);
        for &reason in ignored {
            self.ignored[reason as usize].fetch_add(1, Relaxed);
        }
        for refusal in refusals {
            self.quarantined[refusal.index()].fetch_add(1, Relaxed);
        }
    }

    fn samples(&self, source: &str) -> Vec<Sample> {
        let sample = |name, reason: Option<&str>, value: &AtomicU64| {
            let mut labels = vec![("source", source.to_owned())];
            labels.extend(reason.map(|reason| ("reason", reason.to_owned())));
            Sample { name, labels, value: value.load(Relaxed) }
        };
        let mut samples = vec![
            sample("intake_requests", None, &self.requests),
            sample("intake_unauthorized", None, &self.unauthorized),
            sample("intake_taken", None, &self.taken),
            sample("intake_refused", Some("queue"), &self.refused_queue),
            sample("intake_refused", Some("body"), &self.refused_body),
        ];
        samples.extend(Ignored::ALL.map(|reason| sample("intake_ignored", Some(reason.name()), &self.ignored[reason as usize])));
        samples.extend(
            Refusal::NAMES.iter().zip(&self.quarantined).map(|(name, value)| sample("intake_quarantined", Some(name), value)),
        );
        samples
    }
}
