//! How values stand in columns, in whichever database: the pure part.

use serde::{
    Deserialize, Serialize,
    de::{IntoDeserializer, value},
};

use super::{LONGEST_DETAIL, RuleOutcome, SignatureState};
use crate::{
    oci::{Digest, Reference, RegistryName, Repository},
    outcome::{Outcome, Skip},
};

/// Raw bytes: 32 are SHA-256, 64 are SHA-512.
pub(super) fn digest_column(digest: &Digest) -> Vec<u8> {
    hex::decode(digest.encoded()).expect("the parser lets hex digits only through")
}

pub(super) fn read_digest(raw: &[u8]) -> Result<Digest, <Digest as std::str::FromStr>::Err> {
    let algorithm = if raw.len() == 64 { "sha512" } else { "sha256" };
    format!("{algorithm}:{}", hex::encode(raw)).parse()
}

/// `registry/repository`: one word. A registry's name has no slash.
pub(super) fn repository_word(registry: &RegistryName, repository: &Repository) -> String {
    format!("{registry}/{repository}")
}

pub(super) fn read_repository(word: &str) -> Option<(RegistryName, Repository)> {
    let (registry, repository) = word.split_once('/')?;
    Some((registry.parse().ok()?, repository.parse().ok()?))
}

/// Short where the reference is what it nearly always is: this repository by a tag (`:tag`), or by this digest (`@`).
pub(super) fn reference_column(
    reference: &Reference,
    digest: &Digest,
    registry: &RegistryName,
    repository: &Repository,
) -> String {
    let here = reference.registry == *registry && reference.repository == *repository;
    match (&reference.tag, &reference.digest) {
        (Some(tag), None) if here => format!(":{tag}"),
        (None, Some(pinned)) if here && pinned == digest => "@".to_owned(),
        _ => reference.to_string(),
    }
}

pub(super) fn read_reference(
    column: &str,
    digest: &Digest,
    registry: &RegistryName,
    repository: &Repository,
) -> Option<Reference> {
    if column == "@" {
        return Some(Reference::pinned(registry, repository, digest));
    }
    match column.strip_prefix(':') {
        Some(tag) => Some(Reference::tagged(registry, repository, &tag.parse().ok()?)),
        None => column.parse().ok(),
    }
}

/// The reason's column beside the outcome's.
pub(super) fn reason(outcome: &Outcome) -> Option<&'static str> {
    match outcome {
        Outcome::Skipped(skip) => Some(skip.name()),
        Outcome::Signed | Outcome::AlreadySigned | Outcome::Retrying | Outcome::Dead => None,
    }
}

pub(super) fn read_outcome(name: &str, reason: Option<&str>) -> Option<Outcome> {
    match (name, reason) {
        ("signed", None) => Some(Outcome::Signed),
        ("already_signed", None) => Some(Outcome::AlreadySigned),
        ("skipped", Some(reason)) => read_skip(reason).map(Outcome::Skipped),
        ("retrying", None) => Some(Outcome::Retrying),
        ("dead", None) => Some(Outcome::Dead),
        _ => None,
    }
}

pub(super) fn read_skip(name: &str) -> Option<Skip> {
    let name: value::StrDeserializer<'_, value::Error> = name.into_deserializer();
    Skip::deserialize(name).ok()
}

pub(super) fn state_columns(state: &SignatureState) -> (&'static str, Option<&str>) {
    match state {
        SignatureState::Written => ("written", None),
        SignatureState::Found => ("found", None),
        SignatureState::Failed(detail) => ("failed", Some(shortened(detail))),
    }
}

pub(super) fn read_state(name: &str, detail: Option<String>) -> Option<SignatureState> {
    match name {
        "written" => Some(SignatureState::Written),
        "found" => Some(SignatureState::Found),
        "failed" => Some(SignatureState::Failed(detail.unwrap_or_default())),
        _ => None,
    }
}

/// The rules' outcomes as JSON in one column: they are only ever read and replaced together.
pub(super) fn rules_column(rules: &[RuleOutcome]) -> Option<String> {
    let entry = |rule: &RuleOutcome| RuleEntry {
        rule: rule.rule.clone(),
        outcome: rule.outcome.name().to_owned(),
        reason: reason(&rule.outcome).map(str::to_owned),
        detail: rule.detail.as_deref().map(shortened).map(str::to_owned),
    };
    let entries: Vec<_> = rules.iter().map(entry).collect();
    (!entries.is_empty()).then(|| serde_json::to_string(&entries).expect("strings always serialise"))
}

pub(super) fn read_rules(column: Option<&str>) -> Option<Vec<RuleOutcome>> {
    let entries: Vec<RuleEntry> = column.map_or(Ok(Vec::new()), serde_json::from_str).ok()?;
    let rule = |entry: RuleEntry| {
        let outcome = read_outcome(&entry.outcome, entry.reason.as_deref())?;
        Some(RuleOutcome { rule: entry.rule, outcome, detail: entry.detail })
    };
    entries.into_iter().map(rule).collect()
}

#[derive(Serialize, Deserialize)]
struct RuleEntry {
    rule: String,
    outcome: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    detail: Option<String>,
}

pub(super) fn shortened(text: &str) -> &str {
    let end = (0..=LONGEST_DETAIL.min(text.len())).rev().find(|&end| text.is_char_boundary(end));
    &text[..end.unwrap_or_default()]
}
