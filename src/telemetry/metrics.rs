//! Metrics, in the `OpenMetrics` text format that Prometheus reads.
//!
//! What must add up and survive a restart (events received, concluded and queued) is taken from the queue and the ledger
//! at each scrape. The rest counts from the start of the process.
//!
//! Only names of the configuration, of replicas and words of this program become labels, never text of an event: the number
//! of series has a bound.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use jiff::Timestamp;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, text},
    metrics::{
        TypedMetric,
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::{ConstGauge, Gauge},
        histogram::{Histogram, exponential_buckets},
        info::Info,
    },
    registry::Registry,
};

use crate::{
    ledger::Sums,
    outcome::{Outcome, Skip},
};

/// Of what [`Metrics::render`] returns.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

const PREFIX: &str = "countersign";

/// The counters that intake keeps itself, for [`Metrics::attach`].
pub const INTAKE_FAMILIES: &[(&str, &str)] = &[
    ("intake_requests", "Authenticated requests, by source"),
    ("intake_unauthorized", "Requests without the source's secret"),
    ("intake_taken", "Push events taken from requests and made durable"),
    ("intake_refused", "Authenticated requests that were not accepted: the queue could not take them, or the body was bad"),
    ("intake_ignored", "Notifications that are about no push of an image"),
    ("intake_quarantined", "Bodies that are no notification of this kind, kept as dead letters"),
];

/// One counter or gauge that another module keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// Without `countersign_` and without `_total`.
    pub name: &'static str,
    pub labels: Vec<(&'static str, String)>,
    pub value: u64,
}

/// What the scrape takes from elsewhere. The two are read one after the other: while events are handled, one that is concluded
/// in the ledger and not yet acknowledged to the queue is counted in both. What cannot be asked now is left out of the scrape.
#[derive(Debug, Clone)]
pub struct Snapshot {
    pub queue: Option<queue::Stats>,
    pub ledger: Option<Sums>,
    /// When they were taken.
    pub now: Timestamp,
}

/// The process's own counters. Clones share them; counting takes no lock that another count holds for long.
#[derive(Clone)]
pub struct Metrics(Arc<Inner>);

struct Inner {
    registry: Registry,
    rule_outcomes: Family<RuleLabels, Counter>,
    signatures: Family<SignatureLabels, Counter>,
    kms_signs: Family<KmsLabels, Counter>,
    kms_sign_seconds: Family<KmsLabels, Histogram, fn() -> Histogram>,
    kms_calls: Family<CallLabels, Counter>,
    witness_away: Family<WitnessLabels, Gauge>,
    witness_went_away: Family<WitnessLabels, Counter>,
    witness_stuck_threads: Family<WitnessLabels, Gauge>,
    throttle_wait_seconds: Family<WitnessLabels, Histogram, fn() -> Histogram>,
    registry_request_seconds: Family<RequestLabels, Histogram, fn() -> Histogram>,
    event_handling_seconds: Histogram,
    push_to_signed_seconds: Histogram,
    review_seconds: Family<ReviewLabels, Histogram, fn() -> Histogram>,
    config_reloads: Family<ResultLabels, Counter>,
    config_last_reload_success: Gauge,
    attached: RwLock<Vec<Attached>>,
}

impl Metrics {
    #[must_use]
    pub fn new() -> Self {
        let registry = Registry::with_prefix(PREFIX);
        let mut inner = Inner {
            registry,
            rule_outcomes: Family::default(),
            signatures: Family::default(),
            kms_signs: Family::default(),
            kms_sign_seconds: Family::new_with_constructor(request_histogram),
            kms_calls: Family::default(),
            witness_away: Family::default(),
            witness_went_away: Family::default(),
            witness_stuck_threads: Family::default(),
            throttle_wait_seconds: Family::new_with_constructor(request_histogram),
            registry_request_seconds: Family::new_with_constructor(request_histogram),
            event_handling_seconds: request_histogram(),
            push_to_signed_seconds: Histogram::new(PUSH_TO_SIGNED),
            review_seconds: Family::new_with_constructor(request_histogram),
            config_reloads: Family::default(),
            config_last_reload_success: Gauge::default(),
            attached: RwLock::default(),
        };
        inner.register();
        // There from the start, so that the first failure is seen as an increase.
        for result in [ResultLabels::OK, ResultLabels::FAILED] {
            drop(inner.config_reloads.get_or_create(&result));
        }
        inner.config_last_reload_success.set(1);
        Self(Arc::new(inner))
    }

    /// A rule was carried out, or was looked at and did not apply.
    pub fn rule_concluded(&self, rule: &str, outcome: &Outcome) {
        let reason = match outcome {
            Outcome::Skipped(skip) => skip.name(),
            Outcome::Signed | Outcome::AlreadySigned | Outcome::Retrying | Outcome::Dead => "",
        };
        self.0.rule_outcomes.get_or_create(&RuleLabels { rule: rule.into(), outcome: outcome.name(), reason }).inc();
    }

    /// A signature of this witness was written by us, and verified.
    pub fn signature_written(&self, witness: &str, format: &'static str) {
        self.signature(witness, format, "written");
    }

    /// A signature of this witness was in the registry already, and valid.
    pub fn signature_found(&self, witness: &str, format: &'static str) {
        self.signature(witness, format, "found");
    }

    fn signature(&self, witness: &str, format: &'static str, result: &'static str) {
        self.0.signatures.get_or_create(&SignatureLabels { witness: witness.into(), format, result }).inc();
    }

    /// The witness's key was asked, and answered (or did not) after `took`. `result` is `ok` or a word for the error's kind.
    pub fn kms_asked(&self, witness: &str, result: &'static str, took: Duration) {
        let labels = KmsLabels { witness: witness.into(), result };
        self.0.kms_signs.get_or_create(&labels).inc();
        self.0.kms_sign_seconds.get_or_create(&labels).observe(took.as_secs_f64());
    }

    /// The witness's KMS was asked for something that it may bill: `sign`, `probe` or `get_public_key`.
    pub fn kms_called(&self, witness: &str, operation: &'static str) {
        self.0.kms_calls.get_or_create(&CallLabels { witness: witness.into(), operation }).inc();
    }

    /// Whether the witness's KMS does not answer now and is asked one thing at a time.
    pub fn kms_away(&self, witness: &str, away: bool) {
        self.0.witness_away.get_or_create(&WitnessLabels { witness: witness.into() }).set(i64::from(away));
    }

    /// So many times it stopped answering: once, or not at all, so that the first time is seen as an increase.
    pub fn kms_went_away(&self, witness: &str, times: u64) {
        self.0.witness_went_away.get_or_create(&WitnessLabels { witness: witness.into() }).inc_by(times);
    }

    /// So many threads wait for the witness's PKCS#11 module, which answered none of their callers in time.
    pub fn kms_stuck_threads(&self, witness: &str, threads: usize) {
        let threads = i64::try_from(threads).unwrap_or(i64::MAX);
        self.0.witness_stuck_threads.get_or_create(&WitnessLabels { witness: witness.into() }).set(threads);
    }

    /// A signing waited this long for the witness's rate limit.
    pub fn throttled(&self, witness: &str, waited: Duration) {
        self.0.throttle_wait_seconds.get_or_create(&WitnessLabels { witness: witness.into() }).observe(waited.as_secs_f64());
    }

    /// A request to a registry ended after `took`. `result` is `ok` or a word for the error's kind.
    pub fn registry_asked(&self, registry: &str, operation: &'static str, result: &'static str, took: Duration) {
        let labels = RequestLabels { registry: registry.into(), operation, result };
        self.0.registry_request_seconds.get_or_create(&labels).observe(took.as_secs_f64());
    }

    /// One delivery of an event was handled in this time, whatever came of it.
    pub fn event_handled(&self, took: Duration) {
        self.0.event_handling_seconds.observe(took.as_secs_f64());
    }

    /// An event ended as signed, this long after it was received: by our clock alone.
    pub fn pushed_to_signed(&self, took: Duration) {
        self.0.push_to_signed_seconds.observe(took.as_secs_f64());
    }

    /// The admission webhook answered a review after `took`. `endpoint` and `decision` are words of this program.
    pub fn review_answered(&self, endpoint: &'static str, decision: &'static str, took: Duration) {
        self.0.review_seconds.get_or_create(&ReviewLabels { endpoint, decision }).observe(took.as_secs_f64());
    }

    /// The configuration was read again and took effect, or did not.
    pub fn config_reloaded(&self, took_effect: bool) {
        let result = if took_effect { ResultLabels::OK } else { ResultLabels::FAILED };
        self.0.config_last_reload_success.set(i64::from(took_effect));
        self.0.config_reloads.get_or_create(&result).inc();
    }

    /// Exports counters that another module keeps: `read` is called at each scrape. `families` holds each counter's name and what
    /// it counts.
    pub fn attach(&self, families: &'static [(&str, &str)], read: impl Fn() -> Vec<Sample> + Send + Sync + 'static) {
        self.attach_as(false, families, Arc::new(read));
    }

    /// The same of numbers that may also become smaller.
    pub fn attach_gauges(&self, families: &'static [(&str, &str)], read: impl Fn() -> Vec<Sample> + Send + Sync + 'static) {
        self.attach_as(true, families, Arc::new(read));
    }

    fn attach_as(&self, are_gauges: bool, families: &'static [(&str, &str)], read: Arc<dyn Fn() -> Vec<Sample> + Send + Sync>) {
        let mut attached = self.0.attached.write().unwrap_or_else(PoisonError::into_inner);
        attached.push(Attached { are_gauges, families, read });
    }

    /// Everything, as [`CONTENT_TYPE`]. What has no queue and no ledger takes no snapshot of them.
    #[must_use]
    pub fn render(&self, snapshot: impl Into<Option<Snapshot>>) -> String {
        let mut passing = Registry::with_prefix(PREFIX);
        if let Some(snapshot) = snapshot.into() {
            passing.register_collector(Box::new(Standing(snapshot)));
        }
        for attached in &*self.0.attached.read().unwrap_or_else(PoisonError::into_inner) {
            passing.register_collector(Box::new(attached.clone()));
        }
        let mut out = String::with_capacity(16 * 1024);
        text::encode_registry(&mut out, &passing)
            .and_then(|()| text::encode_registry(&mut out, &self.0.registry))
            .and_then(|()| text::encode_eof(&mut out))
            .expect("writing to a string does not fail");
        out
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Inner {
    fn register(&mut self) {
        let to = &mut self.registry;
        to.register("build", "The version that runs", Info::new([("version", env!("CARGO_PKG_VERSION"))]));
        to.register("rule_outcomes", "What rules made of events, retried deliveries included", self.rule_outcomes.clone());
        to.register("signatures", "Signatures that were written, or found to be there", self.signatures.clone());
        to.register("kms_signs", "Signatures that keys were asked for", self.kms_signs.clone());
        to.register("kms_sign_seconds", "How long keys took to answer", self.kms_sign_seconds.clone());
        to.register(
            "kms_calls",
            "What KMSs were asked for and may bill: signatures, probes, public keys",
            self.kms_calls.clone(),
        );
        to.register(
            "witness_away",
            "1 while the witness's KMS does not answer and is asked one thing at a time, else 0",
            self.witness_away.clone(),
        );
        to.register("witness_went_away", "How often a witness's KMS stopped answering", self.witness_went_away.clone());
        to.register(
            "witness_stuck_threads",
            "Threads that hang in the witness's PKCS#11 module, of 8: with all of them nothing is signed",
            self.witness_stuck_threads.clone(),
        );
        to.register(
            "witness_throttle_wait_seconds",
            "How long signings waited for their witness's rate limit, its KMS's quota, or the calls before them",
            self.throttle_wait_seconds.clone(),
        );
        to.register("registry_request_seconds", "How long registries took to answer", self.registry_request_seconds.clone());
        to.register(
            "event_handling_seconds",
            "How long one delivery of an event was in hand, whatever came of it",
            self.event_handling_seconds.clone(),
        );
        to.register(
            "push_to_signed_seconds",
            "From the receipt of an event to its signature in the registry",
            self.push_to_signed_seconds.clone(),
        );
        to.register(
            "admission_review_seconds",
            "How long admission reviews took, by what came of them",
            self.review_seconds.clone(),
        );
        to.register("config_reloads", "How often the configuration was read again", self.config_reloads.clone());
        to.register(
            "config_last_reload_success",
            "1 if the configuration that was read last took effect, 0 if it was refused",
            self.config_last_reload_success.clone(),
        );
    }
}

/// 0.5 ms to 33 s, each bound twice the one before.
fn request_histogram() -> Histogram {
    Histogram::new(exponential_buckets(0.0005, 2.0, 17))
}

/// Seconds: from moments to the day after which the queue gives up.
const PUSH_TO_SIGNED: [f64; 17] =
    [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 21600.0, 86400.0];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RuleLabels {
    rule: Arc<str>,
    outcome: &'static str,
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SignatureLabels {
    witness: Arc<str>,
    format: &'static str,
    result: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KmsLabels {
    witness: Arc<str>,
    result: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallLabels {
    witness: Arc<str>,
    operation: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WitnessLabels {
    witness: Arc<str>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    registry: Arc<str>,
    operation: &'static str,
    result: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReviewLabels {
    endpoint: &'static str,
    decision: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabels {
    result: &'static str,
}

impl ResultLabels {
    const OK: Self = Self { result: "ok" };
    const FAILED: Self = Self { result: "failed" };
}

/// What the queue and the ledger say, for one scrape.
#[derive(Debug)]
struct Standing(Snapshot);

impl Collector for Standing {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Snapshot { queue, ledger, now } = &self.0;
        let mut to = Exposition(encoder);
        let up = [("queue", queue.is_some()), ("ledger", ledger.is_some())];
        let up = up.map(|(part, is_up)| ([("part", part)], u64::from(is_up)));
        to.each(
            "up",
            "1 if the queue and the ledger told how they are, 0 for the one whose series are missing",
            up,
            ConstGauge::new,
        )?;
        queue.as_ref().map_or(Ok(()), |queue| encode_queue(&mut to, queue, *now))?;
        ledger.as_ref().map_or(Ok(()), |ledger| encode_ledger(&mut to, ledger))
    }
}

fn encode_queue(to: &mut Exposition<'_>, queue: &queue::Stats, now: Timestamp) -> fmt::Result {
    let states = [("ready", queue.ready), ("waiting", queue.waiting), ("in_flight", queue.in_flight), ("dead", queue.dead)];
    let states = states.map(|(state, messages)| ([("state", state)], messages));
    let age = |oldest: Option<Timestamp>| oldest.map_or(0.0, |oldest| now.duration_since(oldest).as_secs_f64().max(0.0));
    let oldest = age(queue.oldest);
    to.one("events_received", "Events ever taken in", &ConstCounter::new(queue.pushed_total))?;
    to.one("events_discarded", "Dead letters that were discarded", &ConstCounter::new(queue.discarded_total))?;
    to.one("events_queued", "Events that are still to be handled", &ConstGauge::new(queue.queued()))?;
    to.each("queue_messages", "Messages in the queue now, by state", states, ConstGauge::new)?;
    to.one("queue_oldest_seconds", "Age of the oldest event that is still to be handled, or 0", &ConstGauge::new(oldest))?;
    if queue.partitions.is_empty() { Ok(()) } else { partitions(to, &queue.partitions, age) }
}

fn encode_ledger(to: &mut Exposition<'_>, ledger: &Sums) -> fmt::Result {
    let outcomes = [
        (&Outcome::Signed, ledger.signed),
        (&Outcome::AlreadySigned, ledger.already_signed),
        (&Outcome::Skipped(Skip::NoRule), ledger.skipped),
        (&Outcome::Dead, ledger.dead),
    ];
    let outcomes = outcomes.map(|(outcome, events)| ([("outcome", outcome.name())], events));
    let reasons = ledger.skip_reasons.iter().map(|(skip, events)| ([("reason", skip.name())], *events));
    to.each(
        "events",
        "Events by their latest outcome: one that is replayed leaves its old one, so this can fall",
        outcomes,
        ConstGauge::new,
    )?;
    to.each("events_skipped", "Events of which nothing was signed, by why", reasons, ConstGauge::new)
}

/// By partition: 64 at most, and those of other layouts as long as there is something in them. Each has one holder at a time.
fn partitions(to: &mut Exposition<'_>, partitions: &[queue::Partition], age: impl Fn(Option<Timestamp>) -> f64) -> fmt::Result {
    let name = |partition: &queue::Partition| ("partition", partition.name.clone());
    let messages = partitions.iter().flat_map(|partition| {
        let states = [("ready", partition.ready), ("in_flight", partition.in_flight)];
        states.map(|(state, messages)| ([name(partition), ("state", state.to_owned())], messages))
    });
    to.each("queue_partition_messages", "Messages in the queue now, by partition and state", messages, ConstGauge::new)?;
    let oldest = partitions.iter().map(|partition| ([name(partition)], age(partition.oldest)));
    to.each(
        "queue_partition_oldest_seconds",
        "Age of the oldest event that the holder of a partition has, or 0",
        oldest,
        ConstGauge::new,
    )?;
    let held = partitions.iter().filter_map(|partition| Some((partition, partition.holder.clone()?)));
    let holders = held.map(|(partition, holder)| ([name(partition), ("replica", holder)], 1_u64));
    to.each("queue_partition_holder", "1 for the replica that the messages of a partition come to", holders, ConstGauge::new)
}

/// What another module counts.
#[derive(Clone)]
struct Attached {
    are_gauges: bool,
    families: &'static [(&'static str, &'static str)],
    read: Arc<dyn Fn() -> Vec<Sample> + Send + Sync>,
}

impl Collector for Attached {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut by_name: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for sample in (self.read)() {
            by_name.entry(sample.name).or_default().push((sample.labels, sample.value));
        }
        let mut to = Exposition(encoder);
        by_name.into_iter().try_for_each(|(name, samples)| {
            let help = self.families.iter().find(|(family, _)| *family == name).map_or("See the documentation", |(_, help)| help);
            if self.are_gauges {
                return to.each(name, help, samples, |value| ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX)));
            }
            to.each(name, help, samples, ConstCounter::new)
        })
    }
}

impl fmt::Debug for Attached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attached").field("families", &self.families).finish_non_exhaustive()
    }
}

struct Exposition<'a>(DescriptorEncoder<'a>);

impl Exposition<'_> {
    /// A family of one metric without labels.
    fn one(&mut self, name: &str, help: &str, metric: &impl EncodeMetric) -> fmt::Result {
        metric.encode(self.0.encode_descriptor(name, &format!("{help}."), None, metric.metric_type())?)
    }

    /// A family of one metric for each label set.
    fn each<L: EncodeLabelSet, V, M: EncodeMetric + TypedMetric>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (L, V)>,
        metric: impl Fn(V) -> M,
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, &format!("{help}."), None, M::TYPE)?;
        samples.into_iter().try_for_each(|(labels, value)| metric(value).encode(family.encode_family(&labels)?))
    }
}

#[cfg(test)]
mod tests;
