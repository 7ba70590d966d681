//! Takes the deliveries of one digest that wait together through the stages under one deadline, records what came of each, and
//! settles it.
//!
//! Handling an event is idempotent: whatever happened to an earlier try, this one looks at the registry and does what
//! is missing. So a crash between any two lines here costs look-ups, never a signature and never a second one.

mod carry_out;
mod locate;
mod plan;
mod report;
mod seats;
pub(crate) mod write;

use std::{
    collections::HashMap,
    sync::{Arc, RwLock},
    time::Duration,
};

use futures::future::try_join_all;
use queue::{Burial, Delivery, Queue, Retry};
use tokio::time::Instant;
use tracing::{Instrument as _, error, info, warn};

use crate::{
    clock::Clock,
    event::{self, PushEvent},
    ledger::{self, Conclusion, EventFacts, Ledger, SignatureState},
    oci::RegistryName,
    outcome::{Outcome, Verdict},
    registry::Registry,
    rule::{Rules, Trigger},
    telemetry::Metrics,
    witness::Witness,
};

pub(crate) use self::report::in_words;
pub use self::report::{Error, Fatal, Report};
use self::{carry_out::Push, seats::Seats, write::Turns};

/// Nothing takes longer in one go; what is not done by then is tried again.
const DEADLINE: Duration = Duration::from_secs(120);
const LOST: &str = "the connection that the event came by is gone: it is left to whoever is given it next";

/// What the configuration decides, replaced as a whole when it is loaded again.
#[derive(Debug, Default)]
pub struct Setup {
    pub registries: HashMap<RegistryName, Registry>,
    pub witnesses: HashMap<String, Arc<Witness>>,
    pub rules: Rules,
    /// Witnesses that are configured and not among `witnesses`, because their KMS could not be reached yet.
    pub shut: Vec<String>,
}

/// How long a failing event is tried again.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// The wait after the first try; each further one doubles it.
    pub first: Duration,
    pub longest: Duration,
    /// The sum of waits after which an event is a dead letter. Waits that a peer asked for do not count.
    pub give_up: Duration,
}

impl Patience {
    /// The wait after this many tries, with jitter, so that what failed together does not come back together.
    fn wait(&self, attempts: u32) -> Duration {
        let full = self.first.saturating_mul(2u32.saturating_pow(attempts.min(30))).min(self.longest);
        full.mul_f64(fastrand::f64().mul_add(0.5, 0.5))
    }
}

/// The stages, and what they need.
#[derive(Debug)]
pub struct Pipeline {
    setup: RwLock<Arc<Setup>>,
    ledger: Ledger,
    metrics: Metrics,
    clock: Clock,
    patience: Patience,
    turns: Turns,
    seats: Seats,
}

impl Pipeline {
    #[must_use]
    pub fn new(setup: Setup, ledger: Ledger, metrics: Metrics, clock: Clock, patience: Patience) -> Self {
        Self {
            setup: RwLock::new(Arc::new(setup)),
            ledger,
            metrics,
            clock,
            patience,
            turns: Turns::default(),
            seats: Seats::default(),
        }
    }

    /// The same, shared fairly between the witnesses: so many events are in hand at once ([`Self::work`] runs so often).
    #[must_use]
    pub fn with_slots(self, slots: usize) -> Self {
        Self { seats: Seats::new(slots), ..self }
    }

    /// What is in force now.
    pub fn setup(&self) -> Arc<Setup> {
        self.setup.read().expect("nothing panics while it holds the set-up").clone()
    }

    /// Events from now on are handled by the new set-up; those in hand end with the one they began with.
    pub fn replace_setup(&self, setup: Setup) {
        *self.setup.write().expect("nothing panics while it holds the set-up") = Arc::new(setup);
    }

    /// Handles deliveries, one after the other, until the queue is closed. Dropped, it gives back what is in hand.
    ///
    /// While one is put on record and settled, the next is looked at already. Those of one digest that wait together are
    /// handled together.
    ///
    /// # Errors
    /// When this process can do no more work: it should end, and be started again.
    pub async fn work(&self, queue: &dyn Queue) -> Result<(), Fatal> {
        let mut handled = vec![];
        loop {
            let ((), next) = tokio::try_join!(self.settle(handled), self.next(queue))?;
            let Some(next) = next else { return Ok(()) };
            handled = next;
        }
    }

    /// The next deliveries, and what came of them; None when the queue is closed.
    async fn next(&self, queue: &dyn Queue) -> Result<Option<Vec<Handled>>, Fatal> {
        loop {
            match queue.pull_together().await {
                Ok(deliveries) if deliveries.is_empty() => return Ok(None),
                Ok(deliveries) => {
                    if let Some(handled) = self.handle(deliveries).await {
                        return Ok(Some(handled));
                    }
                }
                Err(error @ queue::Error::Died) => return Err(Fatal::Queue(error)),
                Err(error) => {
                    warn!(error = &error as &dyn std::error::Error, "the queue gives no deliveries, asking again in a second");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        }
    }

    /// None if they were lost meanwhile: whoever has them now may be at the same signatures.
    async fn handle(&self, deliveries: Vec<Delivery>) -> Option<Vec<Handled>> {
        let lost = deliveries.first()?.lost().clone();
        let deadline = Instant::now() + DEADLINE;
        let mut handled: Vec<Handled> = deliveries.into_iter().map(Handled::open).collect();
        // They have one key, and so name one digest, unless somebody else gave them their key.
        handled.sort_by_cached_key(Handled::subject);
        for together in handled.chunk_by_mut(|one, other| one.subject() == other.subject()) {
            let pushes: Vec<Push<'_>> = together.iter().filter_map(Handled::push).collect();
            let span = together[0].span.clone();
            if let [first, others @ ..] = &*together {
                let first = &first.delivery.message().id;
                for other in others {
                    other.span.record("handled.with", first);
                }
            }
            let work = self.carry_out(&pushes, Trigger::Automatic, deadline).instrument(span.clone());
            let Some(reports) = lost.run_until_cancelled(work).await else {
                span.in_scope(|| info!("{LOST}"));
                return None;
            };
            for (handled, report) in together.iter_mut().filter(|handled| handled.event.is_some()).zip(reports) {
                handled.report = report;
            }
        }
        Some(handled)
    }

    /// Signs what an administrator names, whether the rules that want it are manual or automatic, and records it.
    pub async fn sign_by_hand(&self, event: &PushEvent) -> Result<Report, ledger::Error> {
        let push = Push { event, message_id: &event.id };
        let report = self.carry_out(&[push], Trigger::Manual, Instant::now() + DEADLINE).await.pop().expect("one for each push");
        let conclusion = Conclusion {
            event: EventFacts::of(&event.id, event),
            outcome: if report.failures.is_empty() { report.outcome() } else { Outcome::Dead },
            rules: report.rules.clone(),
            signatures: report.signatures.clone(),
            detail: report.detail(),
            attempt: 1,
        };
        self.ledger.conclude(conclusion).await?;
        Ok(report)
    }

    /// Records what became of each event, then tells the queue.
    async fn settle(&self, handled: Vec<Handled>) -> Result<(), Fatal> {
        let settled = handled.into_iter().map(async |Handled { delivery, event, report, began, span }| {
            let settled = self.record(delivery, event, report).instrument(span).await;
            self.metrics.event_handled(began.elapsed());
            settled
        });
        try_join_all(settled).await.map(drop)
    }

    async fn record(&self, delivery: Delivery, event: Option<PushEvent>, report: Report) -> Result<(), Fatal> {
        let detail = report.detail();
        let settlement = match report.verdict() {
            None => Settlement::Done,
            Some(Verdict::Retry { after, throttled }) => {
                // What costs no attempt does not wait for the attempts before it, either.
                let named = throttled && after.is_some();
                let wait = self.patience.wait(if named { 0 } else { delivery.attempts() });
                // A peer that names a time means it, within reason.
                let wait = after.map_or(wait, |after| after.max(wait).min(self.patience.longest.max(wait)));
                if !throttled && delivery.waited() + wait > self.patience.give_up {
                    Settlement::Bury("gave_up")
                } else {
                    Settlement::Retry(wait, !throttled)
                }
            }
            Some(Verdict::Refuse { .. }) => Settlement::Bury("refused"),
            Some(Verdict::Poison) => Settlement::Bury("poison"),
        };
        let outcome = match settlement {
            Settlement::Done => report.outcome(),
            Settlement::Retry(..) => Outcome::Retrying,
            Settlement::Bury(_) => Outcome::Dead,
        };
        if delivery.lost().is_cancelled() && !matches!(settlement, Settlement::Done) {
            // What its next holder says of it must not be replaced by less.
            info!("{LOST}");
            return Ok(());
        }
        let conclusion = Arc::new(Conclusion {
            event: facts(&delivery, event.as_ref()),
            outcome,
            rules: report.rules,
            signatures: report.signatures,
            detail: detail.clone(),
            attempt: delivery.attempts() + 1,
        });
        // Nothing is waited for before this, so that of events that were handled together the first is on record first: what it
        // wrote, the others found.
        let recorded = self.ledger.conclude(conclusion.clone()).await;
        if recorded.is_ok() {
            self.tell(&delivery, event.as_ref(), &conclusion);
        }
        let settled = match (recorded, settlement) {
            (Ok(()), Settlement::Done) => delivery.ack().await,
            (Ok(()), Settlement::Retry(after, counted)) => {
                delivery.retry(Retry { after, counted, reason: detail.unwrap_or_default() }).await
            }
            (Ok(()), Settlement::Bury(kind)) => {
                delivery.bury(Burial { kind: kind.into(), reason: detail.unwrap_or_default() }).await
            }
            // The delivery is dropped, and so given back.
            (Err(error @ ledger::Error::Closed), _) => return Err(Fatal::Ledger(error)),
            // Not on record is not done. The next try finds the signatures that this one wrote.
            (Err(error), _) => {
                error!(
                    error = &error as &dyn std::error::Error,
                    "the ledger does not take the outcome, the event is tried again"
                );
                let after = self.patience.wait(0);
                delivery
                    .retry(Retry { after, counted: false, reason: format!("the ledger did not take the outcome: {error}") })
                    .await
            }
        };
        if let Err(error) = settled {
            warn!(
                error = &error as &dyn std::error::Error,
                "the queue did not take the settlement, the event will be delivered again"
            );
        }
        Ok(())
    }

    /// Logs the outcome once, and counts it.
    fn tell(&self, delivery: &Delivery, event: Option<&PushEvent>, conclusion: &Conclusion) {
        let Conclusion { outcome, rules, signatures, detail, .. } = conclusion;
        let detail = detail.as_deref();
        for rule in rules {
            self.metrics.rule_concluded(&rule.rule, &rule.outcome);
        }
        for signature in signatures {
            match signature.state {
                SignatureState::Written => self.metrics.signature_written(&signature.witness, signature.format),
                SignatureState::Found => self.metrics.signature_found(&signature.witness, signature.format),
                SignatureState::Failed(_) => {}
            }
        }
        let written = signatures.iter().filter(|signature| signature.state == SignatureState::Written).count();
        match outcome {
            Outcome::Signed => {
                // How long ago the past was says nothing of how fast we are.
                if let Some(event) = event.filter(|_| delivery.message().replay_of.is_none()) {
                    let since = self.clock.now().duration_since(event.received_at);
                    self.metrics.pushed_to_signed(Duration::try_from(since).unwrap_or_default());
                }
                info!(outcome = outcome.name(), signatures = written, "signed");
            }
            Outcome::AlreadySigned => info!(outcome = outcome.name(), "already signed"),
            Outcome::Skipped(skip) => info!(outcome = outcome.name(), reason = skip.name(), "nothing to sign: {skip}"),
            Outcome::Retrying => warn!(outcome = outcome.name(), error = detail, "not done, will be tried again"),
            Outcome::Dead => error!(
                outcome = outcome.name(),
                error = detail,
                "dead letter: see `countersign queue dead`, then replay or discard {}",
                delivery.message().id
            ),
        }
    }
}

/// A delivery that has been through all stages but the last.
struct Handled {
    delivery: Delivery,
    /// None if it is no event.
    event: Option<PushEvent>,
    report: Report,
    began: Instant,
    span: tracing::Span,
}

impl Handled {
    /// Reads what was delivered.
    fn open(delivery: Delivery) -> Self {
        let message = delivery.message();
        let span = tracing::info_span!(
            "pipeline.event",
            event.id = %message.id,
            attempt = delivery.attempts() + 1,
            image.repository = tracing::field::Empty,
            image.tag = tracing::field::Empty,
            image.digest = tracing::field::Empty,
            replay.of = message.replay_of,
            // The first event of those that it is handled together with, whose span has the work.
            handled.with = tracing::field::Empty,
        );
        let event = if message.content_type == event::CONTENT_TYPE {
            PushEvent::from_cloud_event(&message.body).map_err(Error::from)
        } else {
            Err(Error::Quarantined)
        };
        let (event, report) = match event {
            Ok(event) => {
                span.record("image.repository", tracing::field::display(&event.repository));
                span.record("image.digest", tracing::field::display(&event.digest));
                if let Some(tag) = &event.tag {
                    span.record("image.tag", tracing::field::display(tag));
                }
                (Some(event), Report::default())
            }
            Err(error) => (None, Report::failed(error)),
        };
        Self { delivery, event, report, began: Instant::now(), span }
    }

    fn push(&self) -> Option<Push<'_>> {
        self.event.as_ref().map(|event| Push { event, message_id: &self.delivery.message().id })
    }

    /// What its signatures are of.
    fn subject(&self) -> Option<String> {
        self.event.as_ref().map(PushEvent::partition_key)
    }
}

enum Settlement {
    Done,
    /// After this time; whether it is counted.
    Retry(Duration, bool),
    Bury(&'static str),
}

fn facts(delivery: &Delivery, event: Option<&PushEvent>) -> EventFacts {
    let id = &delivery.message().id;
    event.map_or_else(|| EventFacts::poison(id, delivery.pushed_at()), |event| EventFacts::of(id, event))
}

#[cfg(test)]
pub(crate) mod tests;
