//! Does what the rules want of the pushes of one digest, all of them together: each look-up once, each signature once, and
//! one write for all that go to one place. What became of it is told for each push.

use std::{collections::HashMap, sync::Arc};

use futures::{StreamExt as _, stream};
use tokio::time::{Instant, timeout_at};

use super::{
    Error, Pipeline, Report, Setup, in_words,
    locate::{Looked, Seen, locate},
    plan::{self, Asker, Plan, Request, Target, Wanted},
    seats::Seated,
    write::{Desk, FreshTags, Written},
};
use crate::{
    event::PushEvent,
    ledger::{RuleOutcome, SignatureResult, SignatureState},
    outcome::{Classify as _, Outcome, Skip, Verdict},
    rule::{Matches, Occasion, Rule, Trigger},
    subject::TagState,
};

/// Digests that are signed at once: the platforms of an index.
const DIGESTS_AT_ONCE: usize = 4;

/// An event, and the message that it came by.
#[derive(Debug, Clone, Copy)]
pub(super) struct Push<'a> {
    pub event: &'a PushEvent,
    pub message_id: &'a str,
}

/// A push on its way through the stages.
struct Case<'a> {
    push: Push<'a>,
    /// The rules that are to be carried out; none once nothing more is.
    rules: Vec<Arc<Rule>>,
    tag: TagState,
    report: Report,
    by_rule: HashMap<String, RuleOutcome>,
}

impl Pipeline {
    /// Does what the rules want of these pushes, all of one digest, until the deadline. One report for each, in order.
    pub(super) async fn carry_out(&self, pushes: &[Push<'_>], trigger: Trigger, deadline: Instant) -> Vec<Report> {
        let setup = self.setup();
        let mut cases: Vec<Case<'_>> = pushes.iter().map(|push| Case::open(*push, &setup, trigger)).collect();
        // By hand, one waits as long as it takes.
        let _seated = match trigger {
            Trigger::Automatic => Some(self.take_seats(&setup, &mut cases)),
            Trigger::Manual => None,
        };
        if let Err(error) = self.see_to(&setup, &mut cases, deadline).await {
            let error = Arc::new(error);
            cases.iter_mut().filter(|case| case.is_open()).for_each(|case| case.fail(Error::Shared(error.clone())));
        }
        cases.into_iter().map(Case::close).collect()
    }

    /// Seats at the witnesses of all rules. Rules that find none are not carried out now.
    fn take_seats(&self, setup: &Setup, cases: &mut [Case<'_>]) -> Option<Seated<'_>> {
        let mut rules: Vec<Arc<Rule>> = vec![];
        for rule in cases.iter().flat_map(|case| &case.rules) {
            if !rules.iter().any(|known| Arc::ptr_eq(known, rule)) {
                rules.push(rule.clone());
            }
        }
        if rules.is_empty() {
            return None;
        }
        let pushes = cases.iter().filter(|case| case.is_open()).count();
        let (seated, turned_away) = self.seats.assign(setup, &rules, pushes);
        for (rule, error) in turned_away {
            let detail = in_words(&error);
            for case in &mut *cases {
                let before = case.rules.len();
                case.rules.retain(|wanted| !Arc::ptr_eq(wanted, &rule));
                if case.rules.len() < before {
                    case.note(&rule, Outcome::Retrying, Some(&detail));
                    case.report.failures.push(Error::Shared(error.clone()));
                }
            }
        }
        Some(seated)
    }

    /// Finds what the open cases name, and sees to all signatures that they ask for.
    async fn see_to(&self, setup: &Setup, cases: &mut [Case<'_>], deadline: Instant) -> Result<(), Error> {
        let mut open: Vec<&mut Case<'_>> = cases.iter_mut().filter(|case| case.is_open()).collect();
        let Some(name) = open.first().map(|case| &case.push.event.registry) else { return Ok(()) };
        let registry = setup.registries.get(name).ok_or_else(|| Error::UnknownRegistry(name.clone()))?;
        let events: Vec<&PushEvent> = open.iter().map(|case| case.push.event).collect();
        let looking = timeout_at(deadline, locate(registry, &events, &self.clock)).await;
        let Looked { image, asked, seen } = looking.map_err(|_| Error::Deadline { throttled: false })?;
        for (case, seen) in open.iter_mut().zip(seen) {
            match seen {
                Ok(Seen::Image(tag)) => case.tag = tag,
                Ok(Seen::Nothing(skip)) => case.skip(skip),
                Err(error) => case.fail(error),
            }
        }
        open.retain(|case| case.is_open());
        let Some(image) = image else { return Ok(()) };

        let requests: Vec<Request<'_>> = open.iter().map(|case| case.request()).collect();
        let Plan { targets, skipped, unwitnessed } = plan::plan(&image, &requests, &setup.witnesses, self.clock.now());
        let tags = FreshTags::new(asked);
        let desk = Desk { registry, ledger: &self.ledger, turns: &self.turns, clock: &self.clock, tags: &tags, deadline };
        let work: Vec<_> = targets.iter().map(|target| desk.see_to(target)).collect();
        let done: Vec<_> = stream::iter(work).buffered(DIGESTS_AT_ONCE).collect().await;
        for (target, answers) in targets.iter().zip(done) {
            for (wanted, answer) in target.wanted.iter().zip(answers) {
                tell(&mut open, target, wanted, answer);
            }
        }
        for (push, rule) in unwitnessed {
            let missing = Error::NoWitness { rule: rule.name.clone(), witness: rule.witness.clone() };
            open[push].report.failures.push(missing);
            open[push].note(&rule, Outcome::Retrying, None);
        }
        for (push, rule, skip) in skipped {
            open[push].note(&rule, Outcome::Skipped(skip), None);
        }
        Ok(())
    }
}

/// Tells all who asked for a signature what became of it.
fn tell(cases: &mut [&mut Case<'_>], target: &Target, wanted: &Wanted, answer: Written) {
    let result = |asker: &Asker, state| SignatureResult {
        rule: asker.rule.name.clone(),
        witness: wanted.witness.name().to_owned(),
        format: wanted.prepared.format().name(),
        digest: target.subject.digest().clone(),
        reference: target.reference(wanted),
        payload_sha256: *wanted.prepared.sha256(),
        state,
    };
    let first = &wanted.first;
    let askers = std::iter::once(first).chain(&wanted.others);
    if let Written::Failed(error) = answer {
        let detail = in_words(&error);
        let outcome = match error.verdict() {
            Verdict::Retry { .. } => Outcome::Retrying,
            Verdict::Refuse { .. } | Verdict::Poison => Outcome::Dead,
        };
        let error = Arc::new(error);
        for asker in askers {
            cases[asker.push].report.failures.push(Error::Shared(error.clone()));
            cases[asker.push].note_all(asker, &outcome, Some(&detail));
        }
        // It was intended for the first alone, so nothing is on record of it for the others.
        cases[first.push].report.signatures.push(result(first, SignatureState::Failed(detail)));
        return;
    }
    for (place, asker) in askers.enumerate() {
        // The first has had it made, and the others found it.
        let (outcome, state) = match answer {
            Written::New if place == 0 => (Outcome::Signed, SignatureState::Written),
            _ => (Outcome::AlreadySigned, SignatureState::Found),
        };
        cases[asker.push].note_all(asker, &outcome, None);
        cases[asker.push].report.signatures.push(result(asker, state));
    }
}

impl<'a> Case<'a> {
    fn open(push: Push<'a>, setup: &Setup, trigger: Trigger) -> Self {
        let event = push.event;
        let Matches { matched, skipped } = setup.rules.matching(&Occasion {
            registry: &event.registry,
            repository: &event.repository,
            tag: event.tag.as_ref(),
            pushed_at: event.pushed_at,
            trigger,
        });
        let report = if matched.is_empty() { nothing_matched(skipped) } else { Report::default() };
        Self { push, rules: matched, tag: TagState::None, report, by_rule: HashMap::new() }
    }

    fn is_open(&self) -> bool {
        !self.rules.is_empty()
    }

    /// What its rules want.
    fn request(&self) -> Request<'_> {
        let Push { event, message_id } = self.push;
        Request { message_id, pushed_at: event.pushed_at, tag: &self.tag, rules: &self.rules }
    }

    /// For all rules by which this push asked.
    fn note_all(&mut self, asker: &Asker, outcome: &Outcome, detail: Option<&String>) {
        for rule in std::iter::once(&asker.rule).chain(&asker.more) {
            self.note(rule, outcome.clone(), detail);
        }
    }

    /// A rule's outcome is the worst of what became of its signatures.
    fn note(&mut self, rule: &Rule, outcome: Outcome, detail: Option<&String>) {
        let severity = |outcome: &Outcome| match outcome {
            Outcome::Skipped(_) => 0,
            Outcome::AlreadySigned => 1,
            Outcome::Signed => 2,
            Outcome::Dead => 3,
            Outcome::Retrying => 4,
        };
        let new = RuleOutcome { rule: rule.name.clone(), outcome, detail: detail.cloned() };
        self.by_rule
            .entry(rule.name.clone())
            .and_modify(|known| {
                if severity(&new.outcome) > severity(&known.outcome) {
                    *known = new.clone();
                }
            })
            .or_insert(new);
    }

    /// Nothing of it can be done now.
    fn fail(&mut self, error: Error) {
        self.end(Report::failed(error));
    }

    /// There is nothing to do.
    fn skip(&mut self, skip: Skip) {
        self.end(Report::skipped(skip));
    }

    fn end(&mut self, report: Report) {
        self.rules.clear();
        self.by_rule.clear();
        self.report = report;
    }

    fn close(self) -> Report {
        if self.by_rule.is_empty() { self.report } else { self.report.with_rules(self.by_rule) }
    }
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
