//! Takes one delivery through the stages under one deadline, records the outcome, and settles it.
//!
//! Handling an event is idempotent: whatever happened to an earlier try, this one looks at the registry and does what
//! is missing. So a crash between any two lines here costs look-ups, never a signature and never a second one.

mod plan;
mod report;
mod seats;
pub(crate) mod write;

use std::{
    collections::HashMap,
    sync::{Arc, RwLock},
    time::Duration,
};

use futures::{StreamExt as _, stream};
use queue::{Burial, Delivery, Queue, Retry};
use tokio::time::{Instant, timeout_at};
use tracing::{Instrument as _, error, info, warn};

use crate::{
    clock::Clock,
    event::{self, PushEvent},
    ledger::{self, Conclusion, EventFacts, Ledger, RuleOutcome, SignatureResult, SignatureState},
    oci::RegistryName,
    outcome::{Classify, Outcome, Skip, Verdict},
    registry::Registry,
    rule::{Matches, Occasion, Rule, Rules, Trigger},
    subject::{self, Children, Located, TagState},
    telemetry::Metrics,
    witness::Witness,
};

pub(crate) use self::report::in_words;
pub use self::report::{Error, Fatal, Report};
use self::{
    plan::Plan,
    seats::Seats,
    write::{Desk, Turns, Written},
};

/// No event takes longer in one go; what is not done by then is tried again.
const DEADLINE: Duration = Duration::from_secs(120);
/// How long after its event a push may still be on its way into the registry.
const SETTLING: Duration = Duration::from_secs(5);
/// Waits before each look for a push that is on its way. What is not there then goes back to the queue.
const LOOKS_AFTER: [Duration; 4] =
    [Duration::ZERO, Duration::from_millis(20), Duration::from_millis(80), Duration::from_millis(300)];
const LOST: &str = "the connection that the event came by is gone: it is left to whoever is given it next";
/// Digests of one event that are signed at once: the platforms of an index.
const DIGESTS_AT_ONCE: usize = 4;

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
    /// While one is put on record and settled, the next is looked at already.
    ///
    /// # Errors
    /// When this process can do no more work: it should end, and be started again.
    pub async fn work(&self, queue: &dyn Queue) -> Result<(), Fatal> {
        let mut handled: Option<Handled> = None;
        loop {
            let settled = async {
                match handled {
                    Some(handled) => self.settle(handled).await,
                    None => Ok(()),
                }
            };
            let ((), next) = tokio::try_join!(settled, self.next(queue))?;
            if next.is_none() {
                return Ok(());
            }
            handled = next;
        }
    }

    /// The next delivery, and what came of it; None when the queue is closed.
    async fn next(&self, queue: &dyn Queue) -> Result<Option<Handled>, Fatal> {
        loop {
            match queue.pull().await {
                Ok(Some(delivery)) => {
                    if let Some(handled) = self.handle(delivery).await {
                        return Ok(Some(handled));
                    }
                }
                Ok(None) => return Ok(None),
                Err(error @ queue::Error::Died) => return Err(Fatal::Queue(error)),
                Err(error) => {
                    warn!(error = &error as &dyn std::error::Error, "the queue gives no deliveries, asking again in a second");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        }
    }

    /// None if it was lost meanwhile: whoever has it now may be at the same signatures.
    async fn handle(&self, delivery: Delivery) -> Option<Handled> {
        let began = Instant::now();
        let span = tracing::info_span!(
            "pipeline.event",
            event.id = %delivery.message().id,
            attempt = delivery.attempts() + 1,
            image.repository = tracing::field::Empty,
            image.tag = tracing::field::Empty,
            image.digest = tracing::field::Empty,
            replay.of = delivery.message().replay_of,
        );
        let message = delivery.message();
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
                let work = self.carry_out(&event, Trigger::Automatic, &message.id).instrument(span.clone());
                let Some(report) = delivery.lost().run_until_cancelled(work).await else {
                    span.in_scope(|| info!("{LOST}"));
                    return None;
                };
                (Some(event), report)
            }
            Err(error) => (None, Report::failed(error)),
        };
        Some(Handled { delivery, event, report, began, span })
    }

    /// Signs what an administrator names, whether the rules that want it are manual or automatic, and records it.
    pub async fn sign_by_hand(&self, event: &PushEvent) -> Result<Report, ledger::Error> {
        let report = self.carry_out(event, Trigger::Manual, &event.id).await;
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

    /// Does what the rules want of one event, within the deadline.
    async fn carry_out(&self, event: &PushEvent, trigger: Trigger, message_id: &str) -> Report {
        self.try_carry_out(event, trigger, message_id).await.unwrap_or_else(Report::failed)
    }

    async fn try_carry_out(&self, event: &PushEvent, trigger: Trigger, message_id: &str) -> Result<Report, Error> {
        let deadline = Instant::now() + DEADLINE;
        let setup = self.setup();
        let Matches { matched, skipped } = setup.rules.matching(&Occasion {
            registry: &event.registry,
            repository: &event.repository,
            tag: event.tag.as_ref(),
            pushed_at: event.pushed_at,
            trigger,
        });
        if matched.is_empty() {
            return Ok(nothing_matched(skipped));
        }
        // By hand, one waits as long as it takes.
        let (_seated, matched, turned_away) = match trigger {
            Trigger::Automatic => {
                let (seated, matched, turned_away) = self.seats.assign(&setup, matched);
                (Some(seated), matched, turned_away)
            }
            Trigger::Manual => (None, matched, vec![]),
        };
        let mut report = Report::default();
        let mut by_rule: HashMap<String, RuleOutcome> = HashMap::new();
        for (rule, error) in turned_away {
            let detail = in_words(&error);
            note(&mut by_rule, &rule, Outcome::Retrying, Some(&detail));
            report.failures.push(error);
        }
        if matched.is_empty() {
            return Ok(report.with_rules(by_rule));
        }
        let registry = setup.registries.get(&event.registry).ok_or_else(|| Error::UnknownRegistry(event.registry.clone()))?;
        let looking = timeout_at(deadline, self.locate(registry, event)).await;
        let (located, found) = looking.map_err(|_| Error::Deadline { throttled: false })??;
        let image = match found {
            Located::Image(image) => image,
            Located::Attachment => return Ok(Report::skipped(Skip::Attachment)),
            Located::Missing => return Ok(Report::skipped(Skip::NotFound)),
        };
        let Plan { targets, skipped, unwitnessed } =
            plan::plan(&image, event.pushed_at, &matched, &setup.witnesses, self.clock.now());
        let desk = Desk { registry, ledger: &self.ledger, turns: &self.turns, clock: &self.clock, message_id, located, deadline };
        let work: Vec<_> = targets.iter().map(|target| desk.see_to(target)).collect();
        let done: Vec<_> = stream::iter(work).buffered(DIGESTS_AT_ONCE).collect().await;

        for (target, answers) in targets.iter().zip(done) {
            for (wanted, answer) in target.wanted.iter().zip(answers) {
                let (outcome, state, detail) = match answer {
                    Written::New => (Outcome::Signed, SignatureState::Written, None),
                    Written::Found => (Outcome::AlreadySigned, SignatureState::Found, None),
                    Written::Failed(error) => {
                        let detail = in_words(&error);
                        let outcome = match error.verdict() {
                            Verdict::Retry { .. } => Outcome::Retrying,
                            Verdict::Refuse { .. } | Verdict::Poison => Outcome::Dead,
                        };
                        report.failures.push(error);
                        (outcome, SignatureState::Failed(detail.clone()), Some(detail))
                    }
                };
                for rule in &wanted.rules {
                    note(&mut by_rule, rule, outcome.clone(), detail.as_ref());
                }
                report.signatures.push(SignatureResult {
                    rule: wanted.rules.first().map(|rule| rule.name.clone()).unwrap_or_default(),
                    witness: wanted.witness.name().to_owned(),
                    format: wanted.prepared.format().name(),
                    digest: target.subject.digest().clone(),
                    reference: target.reference(wanted),
                    payload_sha256: *wanted.prepared.sha256(),
                    state,
                });
            }
        }
        for rule in unwitnessed {
            report.failures.push(Error::NoWitness { rule: rule.name.clone(), witness: rule.witness.clone() });
            note(&mut by_rule, &rule, Outcome::Retrying, None);
        }
        for (rule, skip) in skipped {
            note(&mut by_rule, &rule, Outcome::Skipped(skip), None);
        }
        Ok(report.with_rules(by_rule))
    }

    /// Asks the registry for what the event names, and when that was.
    ///
    /// docker-registry tells of a push before it lets the tag name it, and others take a while to serve everywhere what
    /// was stored. So while an event is young, "not there" and "elsewhere" are asked again before they are believed.
    async fn locate(&self, registry: &Registry, event: &PushEvent) -> Result<(Instant, Located), Error> {
        for wait in LOOKS_AFTER {
            tokio::time::sleep(wait).await;
            let asked = Instant::now();
            let located = subject::locate(registry, &event.repository, event.tag.as_ref(), &event.digest, Children::Signed);
            let located = located.await?;
            let is_settled = match &located {
                Located::Image(image) => !matches!(image.tag, TagState::Moved(_)),
                Located::Attachment => true,
                Located::Missing => false,
            };
            let age = Duration::try_from(self.clock.now().duration_since(event.received_at)).unwrap_or_default();
            if is_settled || age >= SETTLING || event.source == event::BY_HAND {
                return Ok((asked, located));
            }
        }
        Err(Error::Unsettled)
    }

    /// Records what became of the event, then tells the queue.
    async fn settle(&self, handled: Handled) -> Result<(), Fatal> {
        let Handled { delivery, event, report, began, span } = handled;
        let settled = self.record(delivery, event, report).instrument(span).await;
        self.metrics.event_handled(began.elapsed());
        settled
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

enum Settlement {
    Done,
    /// After this time; whether it is counted.
    Retry(Duration, bool),
    Bury(&'static str),
}

/// The story of an event that no rule signs keeps the reasons of the rules that came near.
fn nothing_matched(skipped: Vec<(Arc<Rule>, Skip)>) -> Report {
    const KEPT: usize = 16;
    let skip = Matches { matched: vec![], skipped: skipped.clone() }.reason();
    let rules = skipped
        .into_iter()
        .take(KEPT)
        .map(|(rule, skip)| RuleOutcome { rule: rule.name.clone(), outcome: Outcome::Skipped(skip), detail: None })
        .collect();
    Report { rules, skip: Some(skip), ..Report::default() }
}

/// A rule's outcome is the worst of what became of its signatures.
fn note(by_rule: &mut HashMap<String, RuleOutcome>, rule: &Rule, outcome: Outcome, detail: Option<&String>) {
    let severity = |outcome: &Outcome| match outcome {
        Outcome::Skipped(_) => 0,
        Outcome::AlreadySigned => 1,
        Outcome::Signed => 2,
        Outcome::Dead => 3,
        Outcome::Retrying => 4,
    };
    let new = RuleOutcome { rule: rule.name.clone(), outcome, detail: detail.cloned() };
    by_rule
        .entry(rule.name.clone())
        .and_modify(|known| {
            if severity(&new.outcome) > severity(&known.outcome) {
                *known = new.clone();
            }
        })
        .or_insert(new);
}

fn facts(delivery: &Delivery, event: Option<&PushEvent>) -> EventFacts {
    let id = &delivery.message().id;
    event.map_or_else(|| EventFacts::poison(id, delivery.pushed_at()), |event| EventFacts::of(id, event))
}

#[cfg(test)]
pub(crate) mod tests;
