//! What came of one event, and what its errors together ask for.

use std::{collections::HashMap, sync::Arc, time::Duration};

use super::DEADLINE;
use crate::{
    event, kms,
    ledger::{self, RuleOutcome, SignatureResult},
    oci::{Digest, RegistryName, Repository, Tag},
    outcome::{Classify, Outcome, Skip, Verdict},
    registry,
    signature::cosign,
    subject, verify,
};

/// Why an event could not be carried out.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Subject(#[from] subject::Error),
    #[error(transparent)]
    Registry(#[from] registry::Error),
    #[error(transparent)]
    Kms(#[from] kms::Error),
    #[error("the ledger cannot be written")]
    Ledger(#[from] ledger::Error),
    #[error("no [[registry]] is named {0}")]
    UnknownRegistry(RegistryName),
    #[error("rule {rule} names witness {witness}, which could not be opened")]
    NoWitness { rule: String, witness: String },
    #[error("the tag {tag} of {repository} is no signature manifest that could be added to")]
    SignatureTag {
        repository: Repository,
        tag: Tag,
        #[source]
        source: cosign::Error,
    },
    #[error("the index of referrers under {tag} of {repository} cannot be added to")]
    ReferrersTag {
        repository: Repository,
        tag: Tag,
        #[source]
        source: registry::IndexError,
    },
    #[error("the registry took the referrer and does not list it among those of {subject}")]
    Unlisted { subject: Digest },
    #[error("the signature that was just made would not be accepted")]
    Unverified(#[source] verify::Rejection),
    #[error("the registry does not have the push yet, or its tag names another")]
    Unsettled,
    #[error("the tag {tag} moved to another digest while its image was being signed")]
    TagMoved { tag: Tag },
    #[error("other writers replaced what was added under {tag} {rounds} times in a row")]
    Overwritten { tag: String, rounds: u32 },
    #[error("not done within {} s{}", DEADLINE.as_secs(), if *throttled { ", most of it in line for the key" } else { "" })]
    Deadline {
        /// There was a line for a witness's key, whose rate or whose KMS asks for patience.
        throttled: bool,
    },
    #[error("as many events as may wait for witness {witness}: this one comes back in {:.1} s", after.as_secs_f64())]
    Crowded {
        witness: String,
        /// When there should be room.
        after: Duration,
    },
    #[error("the body is no push event")]
    NotAnEvent(#[from] event::Error),
    #[error("an authenticated sender sent a body that is no notification")]
    Quarantined,
    /// One failure that several signatures met.
    #[error(transparent)]
    Shared(Arc<Error>),
}

impl Classify for Error {
    fn verdict(&self) -> Verdict {
        match self {
            Self::Subject(error) => error.verdict(),
            Self::Registry(error) => error.verdict(),
            Self::Kms(error) => error.verdict(),
            Self::Ledger(error) => error.verdict(),
            Self::UnknownRegistry(_) => Verdict::Refuse { cure: "configure the registry again, or discard this event" },
            Self::SignatureTag { .. } => {
                Verdict::Refuse { cure: "look at what the tag holds; if nobody needs it, delete the tag and replay this event" }
            }
            Self::ReferrersTag { .. } => {
                Verdict::Refuse { cure: "have the index made smaller: entries whose manifests are gone can be removed from it" }
            }
            Self::Unverified(_) => Verdict::Refuse { cure: "see that the rule's algorithm and the witness's key go together" },
            // Waiting for a push that is on its way is no failure, so it costs no patience.
            Self::Unsettled => Verdict::Retry { after: None, throttled: true },
            Self::Crowded { after, .. } => Verdict::Retry { after: Some(*after), throttled: true },
            Self::Deadline { throttled } => Verdict::Retry { after: None, throttled: *throttled },
            Self::NoWitness { .. } | Self::Unlisted { .. } | Self::TagMoved { .. } | Self::Overwritten { .. } => {
                Verdict::TRANSIENT
            }
            Self::NotAnEvent(_) | Self::Quarantined => Verdict::Poison,
            Self::Shared(error) => error.verdict(),
        }
    }
}

/// What the pipeline needs is gone and does not come back in this process.
#[derive(Debug, thiserror::Error)]
pub enum Fatal {
    #[error(transparent)]
    Queue(queue::Error),
    #[error("the ledger's thread ended early; restart the daemon")]
    Ledger(#[source] ledger::Error),
}

/// What became of one event.
#[derive(Debug, Default)]
pub struct Report {
    pub rules: Vec<RuleOutcome>,
    pub signatures: Vec<SignatureResult>,
    /// When nothing was wanted.
    pub skip: Option<Skip>,
    /// The errors that keep the event from being done.
    pub failures: Vec<Error>,
}

impl Report {
    pub(super) fn skipped(skip: Skip) -> Self {
        Self { skip: Some(skip), ..Self::default() }
    }

    pub(super) fn with_rules(mut self, by_rule: HashMap<String, RuleOutcome>) -> Self {
        self.rules = by_rule.into_values().collect();
        self.rules.sort_by(|one, other| one.rule.cmp(&other.rule));
        self
    }

    pub(super) fn failed(error: Error) -> Self {
        Self { failures: vec![error], ..Self::default() }
    }

    /// The outcome of the event as a whole, if nothing failed.
    #[must_use]
    pub fn outcome(&self) -> Outcome {
        let any = |wanted: Outcome| self.rules.iter().any(|rule| rule.outcome == wanted);
        if any(Outcome::Signed) {
            Outcome::Signed
        } else if any(Outcome::AlreadySigned) {
            Outcome::AlreadySigned
        } else {
            let skip = self.rules.iter().find_map(|rule| match rule.outcome {
                Outcome::Skipped(skip) => Some(skip),
                _ => None,
            });
            Outcome::Skipped(self.skip.or(skip).unwrap_or(Skip::NoRule))
        }
    }

    /// What the failures together ask for: whatever may still pass is tried again first.
    #[must_use]
    pub fn verdict(&self) -> Option<Verdict> {
        let verdicts: Vec<Verdict> = self.failures.iter().map(Classify::verdict).collect();
        let retries: Vec<_> = verdicts
            .iter()
            .filter_map(|verdict| match verdict {
                Verdict::Retry { after, throttled } => Some((*after, *throttled)),
                Verdict::Refuse { .. } | Verdict::Poison => None,
            })
            .collect();
        if retries.is_empty() {
            return verdicts.into_iter().next();
        }
        Some(Verdict::Retry {
            after: retries.iter().filter_map(|(after, _)| *after).max(),
            throttled: retries.iter().all(|(_, throttled)| *throttled),
        })
    }

    /// All failures with their causes, in words: each once, and of many (an index has many children) the first.
    #[must_use]
    pub fn detail(&self) -> Option<String> {
        const MOST: usize = 5;
        let mut texts: Vec<String> = vec![];
        for text in self.failures.iter().map(in_words) {
            if !texts.contains(&text) {
                texts.push(text);
            }
        }
        let more = texts.len().saturating_sub(MOST);
        texts.truncate(MOST);
        if more > 0 {
            texts.push(format!("and {more} more"));
        }
        (!texts.is_empty()).then(|| texts.join("; "))
    }
}

/// An error with its causes and its cure, on one line.
pub(crate) fn in_words(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    if let Verdict::Refuse { cure } = error.verdict() {
        text.push_str(" (");
        text.push_str(cure);
        text.push(')');
    }
    text
}
