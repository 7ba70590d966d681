use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::Rate;
use crate::kms;

/// What a KMS was asked for. Each is a call that it may bill.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// A signature for an image.
    Sign,
    /// A dry run or, where there is none, a signature over [`super::PROBE`].
    Probe,
}

impl Operation {
    /// The word for metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Sign => "sign",
            Self::Probe => "probe",
        }
    }
}

/// What an [`Observer`] is told.
#[derive(Debug, Clone, Copy)]
pub enum Observation {
    /// The KMS was asked, after `waited` in line for it, and the answer took so long. `result` is `ok` or a word for the error.
    Asked { operation: Operation, waited: Duration, result: &'static str, took: Duration },
    /// From now on the KMS counts as away, or as there again.
    Away(bool),
}

/// Told of everything that a witness asks of its KMS.
#[derive(Clone)]
pub struct Observer(Arc<dyn Fn(Observation) + Send + Sync>);

impl Observer {
    pub fn new(observe: impl Fn(Observation) + Send + Sync + 'static) -> Self {
        Self(Arc::new(observe))
    }

    pub(super) fn tell(&self, observation: Observation) {
        (self.0)(observation);
    }
}

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Observer")
    }
}

/// How a witness and its KMS stand at this moment.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    /// `ok`; `away`: its KMS does not answer; `failing`: what was asked of it last was not granted;
    /// `ended`, `revoked`: its own public key counts no longer, so it signs nothing.
    pub state: String,
    /// Set while it is away: since when, and when it is asked again.
    pub away: Option<AwayView>,
    pub quota: Quota,
    pub last_signed: Option<Timestamp>,
    pub last_error: Option<LastError>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AwayView {
    pub since: Timestamp,
    pub next: Timestamp,
}

/// How much of the KMS's quota is used.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Quota {
    /// The configured calls a second, if any.
    pub configured: Option<u32>,
    /// What holds now: less for a while after the KMS throttled; no limit if absent.
    pub per_second: Option<f64>,
    /// Calls that were answered in the last second.
    pub served: f64,
    /// Calls in line.
    pub waiting: usize,
    /// Calls that the KMS has not answered yet.
    pub under_way: usize,
}

impl Quota {
    pub(super) fn new(configured: Option<Rate>, per_second: Option<f64>, served: f64) -> Self {
        Self { configured: configured.map(|rate| rate.per_second), per_second, served, waiting: 0, under_way: 0 }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastError {
    pub at: Timestamp,
    /// The word that metrics use.
    pub kind: String,
    pub message: String,
}

/// How long a good answer says that a key signs.
const FRESH: Duration = Duration::from_secs(300);
/// Between two probes that are asked for by whoever wants to know whether this process is ready.
const BETWEEN: Duration = Duration::from_secs(30);

/// What a witness's KMS said lately.
#[derive(Debug, Default)]
pub(super) struct Record {
    pub(super) waiting: Count,
    pub(super) under_way: Count,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    /// The last answer that says whether the key signs, and why not.
    verdict: Option<(Instant, Result<(), String>)>,
    probed: Option<Instant>,
    signed: Option<Timestamp>,
    error: Option<LastError>,
}

/// What is known without asking the KMS.
pub(super) enum Known {
    Ready,
    Unready(String),
    /// It is time to probe it.
    Unknown,
}

impl Record {
    pub(super) fn note<T>(&self, operation: Operation, result: &Result<T, kms::Error>, now: Timestamp) {
        let mut kept = self.kept();
        let error = result.as_ref().err();
        if error.is_none() && operation == Operation::Sign {
            kept.signed = Some(now);
        }
        let verdict = match error {
            None | Some(kms::Error::Throttled { .. }) => Some(Ok(())),
            // One lost connection says nothing about the key; the breaker knows when it is more.
            Some(error) if error.is_absence() && operation == Operation::Sign => None,
            Some(error) => Some(Err(error.to_string())),
        };
        if let Some(verdict) = verdict {
            kept.verdict = Some((Instant::now(), verdict));
        }
        if let Some(error) = error {
            kept.error = Some(LastError { at: now, kind: error.name().to_owned(), message: error.to_string() });
        }
    }

    /// Whether the key signs, as far as is known. Says at most twice a minute that it is to be asked.
    pub(super) fn known(&self) -> Known {
        let mut kept = self.kept();
        match &kept.verdict {
            Some((at, Ok(()))) if at.elapsed() < FRESH => return Known::Ready,
            _ => {}
        }
        if kept.probed.is_none_or(|probed| probed.elapsed() >= BETWEEN) {
            kept.probed = Some(Instant::now());
            return Known::Unknown;
        }
        match &kept.verdict {
            Some((_, Err(why))) => Known::Unready(why.clone()),
            Some((_, Ok(()))) | None => Known::Unready("its KMS has not answered the last probe".to_owned()),
        }
    }

    pub(super) fn is_failing(&self) -> bool {
        matches!(self.kept().verdict, Some((_, Err(_))))
    }

    pub(super) fn last(&self) -> (Option<Timestamp>, Option<LastError>) {
        let kept = self.kept();
        (kept.signed, kept.error.clone())
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().expect("nothing panics while it holds the record")
    }
}

/// How many are somewhere now.
#[derive(Debug, Default)]
pub(super) struct Count(AtomicUsize);

/// One of them, until it is dropped.
pub(super) struct Counted<'a>(&'a Count);

impl Count {
    pub(super) fn one(&self) -> Counted<'_> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Counted(self)
    }

    pub(super) fn now(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}
