//! Which dead letters, or which events of the past.

use globset::{GlobBuilder, GlobMatcher};
use http::StatusCode;
use jiff::Timestamp;
use queue::DeadLetter;
use serde::{Deserialize, Serialize};

use super::Admin;
use crate::{
    event::PushEvent,
    http::Problem,
    ledger::RuleOutcome,
    outcome::Outcome,
    rule::{Occasion, Trigger},
};

/// All that are given must hold; nothing given holds of everything.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filter {
    /// A dead letter for which this rule failed, and whatever this rule would sign now.
    pub rule: Option<String>,
    /// A glob over the repository's name; `*` stays within a segment.
    pub repository: Option<String>,
    /// The dead letter's kind.
    pub kind: Option<String>,
    /// A text within the dead letter's reason.
    pub error: Option<String>,
    /// Buried then or later.
    pub buried_from: Option<Timestamp>,
    /// Buried then or before.
    pub buried_until: Option<Timestamp>,
}

/// A [`Filter`] that can be asked.
#[derive(Debug)]
pub(super) struct Selector<'a> {
    filter: &'a Filter,
    glob: Option<GlobMatcher>,
    admin: &'a Admin,
}

impl<'a> Selector<'a> {
    /// Refuses (400) what can hold of nothing: no glob, no such rule.
    pub fn new(filter: &'a Filter, admin: &'a Admin) -> Result<Self, Problem> {
        let refused = |detail: String| Problem::new(StatusCode::BAD_REQUEST, detail);
        let glob = filter.repository.as_deref().map(|glob| GlobBuilder::new(glob).literal_separator(true).build());
        let glob = glob.transpose().map_err(|error| refused(format!("the repository glob cannot be used: {error}")))?;
        if let Some(name) = &filter.rule
            && !admin.with_rules(|rules| rules.all().iter().any(|rule| rule.name == *name))
        {
            return Err(refused(format!("no [[rule]] of the configuration in force is named {name:?}")));
        }
        Ok(Self { filter, glob: glob.map(|glob| glob.compile_matcher()), admin })
    }

    /// Whether the ledger's record of a dead letter is needed to decide.
    pub fn asks_the_ledger(&self) -> bool {
        self.filter.rule.is_some()
    }

    /// `event`: what is in it, if it is one. `recorded`: what the ledger has of the rules.
    pub fn holds_of_letter(&self, letter: &DeadLetter, event: Option<&PushEvent>, recorded: Option<&[RuleOutcome]>) -> bool {
        let Filter { rule, kind, error, buried_from, buried_until, .. } = self.filter;
        kind.as_ref().is_none_or(|kind| *kind == letter.burial.kind)
            && error.as_ref().is_none_or(|text| letter.burial.reason.contains(text))
            && buried_from.is_none_or(|from| letter.buried_at >= from)
            && buried_until.is_none_or(|until| letter.buried_at <= until)
            && self.holds_of_repository(event)
            && rule.as_ref().is_none_or(|rule| {
                recorded.is_some_and(|recorded| failed(recorded, rule)) || event.is_some_and(|event| self.signs(rule, event))
            })
    }

    /// As far as an event of the past can be asked: its repository, and the rule that would sign it now.
    pub fn holds_of_event(&self, event: &PushEvent) -> bool {
        self.holds_of_repository(Some(event)) && self.filter.rule.as_ref().is_none_or(|rule| self.signs(rule, event))
    }

    fn holds_of_repository(&self, event: Option<&PushEvent>) -> bool {
        self.glob.as_ref().is_none_or(|glob| event.is_some_and(|event| glob.is_match(event.repository.as_str())))
    }

    /// By the configuration in force: its scope, its tags, and that the push is newer than the rule.
    fn signs(&self, rule: &str, event: &PushEvent) -> bool {
        let occasion = Occasion {
            registry: &event.registry,
            repository: &event.repository,
            tag: event.tag.as_ref(),
            pushed_at: event.pushed_at,
            trigger: Trigger::Automatic,
        };
        self.admin.with_rules(|rules| rules.matching(&occasion).matched.iter().any(|matched| matched.name == rule))
    }
}

fn failed(recorded: &[RuleOutcome], rule: &str) -> bool {
    recorded.iter().any(|one| one.rule == rule && matches!(one.outcome, Outcome::Dead | Outcome::Retrying))
}
