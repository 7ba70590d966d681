//! How signatures are told apart.

use sha2::{Digest as _, Sha256};
use tokio_postgres::types::ToSql;

use super::page::text_column;
use crate::{
    ledger::{
        EventFacts, Intent, SignatureResult, SignatureState,
        columns::{digest_column, reference_column, repository_word},
    },
    oci::{Digest, Reference, RegistryName, Repository},
};

/// The columns that name a signature, and the event that it is of.
pub(super) struct Named {
    pub(super) message: String,
    rule: String,
    witness: String,
    format: &'static str,
    repository: String,
    digest: Vec<u8>,
    reference: String,
    payload: Vec<u8>,
}

impl Named {
    pub(super) fn of_intent(intent: &Intent) -> Self {
        let Intent { message_id, rule, witness, format, registry, repository, digest, reference, payload_sha256, .. } = intent;
        Self::new((message_id, rule, witness, format), (registry, repository, digest), reference, payload_sha256)
    }

    pub(super) fn of_result(event: &EventFacts, result: &SignatureResult) -> Self {
        let SignatureResult { rule, witness, format, digest, reference, payload_sha256, .. } = result;
        let registry = event.registry.as_ref().unwrap_or(&reference.registry);
        let repository = event.repository.as_ref().unwrap_or(&reference.repository);
        Self::new((&event.message_id, rule, witness, format), (registry, repository, digest), reference, payload_sha256)
    }

    fn new(
        (message, rule, witness, format): (&str, &str, &str, &'static str),
        (registry, repository, digest): (&RegistryName, &Repository, &Digest),
        reference: &Reference,
        payload: &[u8; 32],
    ) -> Self {
        Self {
            message: text_column(message).into_owned(),
            rule: text_column(rule).into_owned(),
            witness: text_column(witness).into_owned(),
            format,
            repository: repository_word(registry, repository),
            digest: digest_column(digest),
            reference: reference_column(reference, digest, registry, repository),
            payload: payload.to_vec(),
        }
    }

    /// Who says it, and of which signature.
    pub(super) fn claim(&self) -> Vec<u8> {
        hash("claim", &[&self.signature(), self.message.as_bytes(), self.rule.as_bytes()])
    }

    /// Of a row that says that this key was asked.
    pub(super) fn asked(&self, key: &str, algorithm: &str) -> Vec<u8> {
        hash("asked", &[&self.claim(), key.as_bytes(), algorithm.as_bytes()])
    }

    /// Of a row about a signature that no key was asked for. One that was found is there once, whoever found it.
    pub(super) fn told(&self, state: &SignatureState) -> Vec<u8> {
        match state {
            SignatureState::Found => hash("found", &[&self.signature()]),
            SignatureState::Written | SignatureState::Failed(_) => hash("told", &[&self.claim()]),
        }
    }

    fn signature(&self) -> Vec<u8> {
        let texts = [&self.repository, &self.reference, &self.witness].map(String::as_bytes);
        let [repository, reference, witness] = texts;
        hash("signature", &[repository, &self.digest, reference, witness, self.format.as_bytes(), &self.payload])
    }
}

/// Each part with its length before it, so that no two lists of parts are the same bytes.
fn hash(what: &str, parts: &[&[u8]]) -> Vec<u8> {
    let mut hash = Sha256::new();
    for part in [what.as_bytes()].iter().chain(parts) {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    hash.finalize().to_vec()
}

/// What names signatures, in columns.
pub(super) struct Names<'a> {
    claims: Vec<Vec<u8>>,
    /// Message, rule, witness, format, repository.
    words: [Vec<&'a str>; 5],
    digests: Vec<&'a [u8]>,
    references: Vec<&'a str>,
    payloads: Vec<&'a [u8]>,
}

impl<'a> Names<'a> {
    pub(super) fn of(rows: impl IntoIterator<Item = &'a Named>) -> Self {
        let rows: Vec<_> = rows.into_iter().collect();
        let words: [fn(&'a Named) -> &'a str; 5] =
            [|row| &row.message, |row| &row.rule, |row| &row.witness, |row| row.format, |row| &row.repository];
        Self {
            claims: rows.iter().map(|row| row.claim()).collect(),
            words: words.map(|word| rows.iter().map(|row| word(row)).collect()),
            digests: rows.iter().map(|row| row.digest.as_slice()).collect(),
            references: rows.iter().map(|row| row.reference.as_str()).collect(),
            payloads: rows.iter().map(|row| row.payload.as_slice()).collect(),
        }
    }

    /// As `signature` has them, from `claim` on.
    pub(super) fn all(&self) -> impl Iterator<Item = &(dyn ToSql + Sync)> {
        let claims: &(dyn ToSql + Sync) = &self.claims;
        let words = self.words.iter().map(|word| word as &(dyn ToSql + Sync));
        let rest: [&(dyn ToSql + Sync); 3] = [&self.digests, &self.references, &self.payloads];
        [claims].into_iter().chain(words).chain(rest)
    }
}
