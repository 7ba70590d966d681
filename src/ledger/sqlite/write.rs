//! The writing thread: what waits is done in one transaction, then everybody is told.

use std::{
    collections::HashMap,
    sync::{Arc, mpsc},
};

use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension, Row, Transaction, TransactionBehavior, params};
use tokio::sync::oneshot;

use super::rows::{DigestColumn, TimeColumn, outcome};
use crate::{
    clock::Clock,
    ledger::{
        Conclusion, EventFacts, Intent, MOST_PER_COMMIT, SignatureResult, SignatureState, Work,
        columns::{reason, reference_column, repository_word, rules_column, shortened, state_columns},
        is_counted,
    },
    oci::{Digest, RegistryName, Repository, Tag},
    outcome::Outcome,
};

/// Repositories come from events, of which there is no end.
const MOST_WORDS: usize = 20_000;

pub(super) struct Job {
    pub(super) work: Work,
    pub(super) reply: oneshot::Sender<Result<(), Arc<rusqlite::Error>>>,
}

pub(super) struct Writer {
    connection: Connection,
    clock: Clock,
    /// The numbers of words, as committed.
    words: HashMap<String, i64>,
}

impl Writer {
    pub(super) fn new(connection: Connection, clock: Clock) -> Self {
        Self { connection, clock, words: HashMap::new() }
    }

    /// Until the last [`super::Store`] is dropped.
    pub(super) fn run(mut self, jobs: &mpsc::Receiver<Job>) {
        while let Ok(first) = jobs.recv() {
            let mut batch = vec![first];
            batch.extend(jobs.try_iter().take(MOST_PER_COMMIT - 1));
            let result = self.commit(&batch).map_err(Arc::new);
            for job in batch {
                // Whoever waited may have gone.
                let _ = job.reply.send(result.clone());
            }
        }
    }

    fn commit(&mut self, batch: &[Job]) -> rusqlite::Result<()> {
        if self.words.len() > MOST_WORDS {
            self.words.clear();
        }
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let mut page = Page { transaction: &transaction, words: &mut self.words, tally: HashMap::new(), now: self.clock.now() };
        let written = batch.iter().try_for_each(|job| page.write(&job.work)).and_then(|()| page.write_tally());
        let result = written.and_then(|()| transaction.commit());
        if result.is_err() {
            // Words that were new went with the transaction.
            self.words.clear();
        }
        result
    }
}

/// What is on record of an event.
struct Recorded {
    id: i64,
    outcome: Outcome,
    source: Option<String>,
    concluded_at: Timestamp,
}

/// One transaction.
struct Page<'a> {
    transaction: &'a Transaction<'a>,
    words: &'a mut HashMap<String, i64>,
    /// What to add to the tally of each (outcome, reason).
    tally: HashMap<(&'static str, &'static str), i64>,
    now: Timestamp,
}

impl Page<'_> {
    fn write(&mut self, work: &Work) -> rusqlite::Result<()> {
        match work {
            Work::Intend(intents) => intents.iter().try_for_each(|intent| self.intend(intent)),
            Work::Conclude(conclusion) => self.conclude(conclusion),
            Work::Forget(message, until) => self.forget(message, *until),
            Work::Check => self.check(),
        }
    }

    fn intend(&mut self, intent: &Intent) -> rusqlite::Result<()> {
        let row = params![
            intent.message_id,
            self.word(&intent.rule)?,
            self.word(&intent.witness)?,
            self.word(intent.format)?,
            self.subject(&intent.registry, &intent.repository, &intent.digest)?,
            reference_column(&intent.reference, &intent.digest, &intent.registry, &intent.repository),
            intent.payload_sha256,
            self.word(&intent.key)?,
            self.word(intent.algorithm.name())?,
            TimeColumn(self.now),
        ];
        // What is about to be written is open again, whatever was said of it before.
        let mut again = self.transaction.prepare_cached(
            "UPDATE signature INDEXED BY signature_by_subject
                SET asked = asked + 1, asked_last_at = ?10, state = NULL, detail = NULL, concluded_at = NULL
              WHERE subject = ?5 AND reference = ?6 AND message = ?1 AND rule = ?2 AND witness = ?3 AND format = ?4
                AND payload = ?7 AND key = ?8 AND algorithm = ?9",
        )?;
        if again.execute(row)? == 0 {
            let mut first = self.transaction.prepare_cached(
                "INSERT INTO signature (message, rule, witness, format, subject, reference, payload,
                                        key, algorithm, asked, asked_first_at, asked_last_at)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, 1, ?10, ?10)",
            )?;
            first.execute(row)?;
        }
        Ok(())
    }

    fn conclude(&mut self, conclusion: &Conclusion) -> rusqlite::Result<()> {
        let event = &conclusion.event;
        self.count(event.source.as_deref(), &conclusion.outcome, 1);
        let outcome = conclusion.outcome.name();
        let reason = reason(&conclusion.outcome);
        let rules = rules_column(&conclusion.rules);
        let detail = conclusion.detail.as_deref().map(shortened);
        if let Some(before) = self.recorded(&event.message_id)? {
            self.count(before.source.as_deref(), &before.outcome, -1);
            // The facts of one message never change.
            let mut again = self.transaction.prepare_cached(
                "UPDATE event SET outcome = ?2, reason = ?3, rules = ?4, detail = ?5, attempt = ?6, concluded_at = ?7
                  WHERE id = ?1",
            )?;
            again.execute(params![before.id, outcome, reason, rules, detail, conclusion.attempt, TimeColumn(self.now)])?;
        } else {
            let source = event.source.as_deref().map(|source| self.word(source)).transpose()?;
            let repository = match (&event.registry, &event.repository) {
                (Some(registry), Some(repository)) => Some(self.repository(registry, repository)?),
                _ => None,
            };
            let subject = match (&event.registry, &event.repository, &event.digest) {
                (Some(registry), Some(repository), Some(digest)) => Some(self.subject(registry, repository, digest)?),
                _ => None,
            };
            let mut first = self.transaction.prepare_cached(
                "INSERT INTO event (message, source, sender_id, repository, tag, subject, pushed_at, received_at, actor,
                                    outcome, reason, rules, detail, attempt, concluded_at)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15)",
            )?;
            first.execute(params![
                event.message_id,
                source,
                event.event_id.as_deref().map(shortened),
                repository,
                event.tag.as_ref().map(Tag::as_str),
                subject,
                event.pushed_at.map(TimeColumn),
                event.received_at.map(TimeColumn),
                event.actor.as_deref().map(shortened),
                outcome,
                reason,
                rules,
                detail,
                conclusion.attempt,
                TimeColumn(self.now),
            ])?;
        }
        conclusion.signatures.iter().try_for_each(|result| self.conclude_signature(event, result))
    }

    fn conclude_signature(&mut self, event: &EventFacts, result: &SignatureResult) -> rusqlite::Result<()> {
        let registry = event.registry.as_ref().unwrap_or(&result.reference.registry);
        let repository = event.repository.as_ref().unwrap_or(&result.reference.repository);
        let reference = reference_column(&result.reference, &result.digest, registry, repository);
        let subject = self.subject(registry, repository, &result.digest)?;
        let witness = self.word(&result.witness)?;
        let format = self.word(result.format)?;
        let rule = self.word(&result.rule)?;
        let (state, detail) = state_columns(&result.state);

        // With another key in between there are several: the one asked last is meant. One that we wrote stays written.
        let intent: Option<(i64, Option<String>)> = self
            .transaction
            .prepare_cached(
                "SELECT id, state FROM signature INDEXED BY signature_by_subject
                  WHERE subject = ?1 AND reference = ?2 AND message = ?3 AND rule = ?4 AND witness = ?5 AND format = ?6
                    AND payload = ?7
                  ORDER BY asked_last_at DESC, id DESC LIMIT 1",
            )?
            .query_row(params![subject, reference, event.message_id, rule, witness, format, result.payload_sha256], |row| {
                Ok((row.get(0)?, row.get(1)?))
            })
            .optional()?;
        let found = result.state == SignatureState::Found;
        match intent {
            Some((_, Some(before))) if found && before == "written" => return Ok(()),
            Some((id, _)) => {
                let mut conclude = self
                    .transaction
                    .prepare_cached("UPDATE signature SET state = ?2, detail = ?3, concluded_at = ?4 WHERE id = ?1")?;
                conclude.execute(params![id, state, detail, TimeColumn(self.now)])?;
                return Ok(());
            }
            None => {}
        }

        // Another event's record of the same signature says all that there is to say of one that was found.
        let known = found
            && self
                .transaction
                .prepare_cached(
                    "SELECT 1 FROM signature INDEXED BY signature_by_subject
                      WHERE subject = ?1 AND reference = ?2 AND witness = ?3 AND format = ?4 AND payload = ?5
                        AND state IN ('written', 'found')",
                )?
                .exists(params![subject, reference, witness, format, result.payload_sha256])?;
        if !known {
            let mut insert = self.transaction.prepare_cached(
                "INSERT INTO signature (message, rule, witness, format, subject, reference, payload,
                                        asked, state, detail, concluded_at)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, 0, ?8, ?9, ?10)",
            )?;
            insert.execute(params![
                event.message_id,
                rule,
                witness,
                format,
                subject,
                reference,
                result.payload_sha256,
                state,
                detail,
                TimeColumn(self.now),
            ])?;
        }
        Ok(())
    }

    fn forget(&mut self, message: &str, until: Timestamp) -> rusqlite::Result<()> {
        let dead = |recorded: &Recorded| recorded.outcome == Outcome::Dead && recorded.concluded_at <= until;
        let Some(before) = self.recorded(message)?.filter(dead) else { return Ok(()) };
        self.count(before.source.as_deref(), &before.outcome, -1);
        let mut forget = self.transaction.prepare_cached(
            "UPDATE event SET outcome = ?2, detail = 'replayed: ' || coalesce(detail, ''), concluded_at = ?3 WHERE id = ?1",
        )?;
        forget.execute(params![before.id, Outcome::Retrying.name(), TimeColumn(self.now)])?;
        Ok(())
    }

    fn check(&mut self) -> rusqlite::Result<()> {
        let mut probe = self.transaction.prepare_cached("INSERT OR REPLACE INTO probe (id, written_at) VALUES (1, ?1)")?;
        probe.execute(params![TimeColumn(self.now)])?;
        Ok(())
    }

    fn recorded(&self, message: &str) -> rusqlite::Result<Option<Recorded>> {
        let mut find = self.transaction.prepare_cached(
            "SELECT id, outcome, reason, (SELECT text FROM word WHERE word.id = source) AS source, concluded_at
               FROM event WHERE message = ?1",
        )?;
        let recorded = |row: &Row<'_>| {
            Ok(Recorded {
                id: row.get("id")?,
                outcome: outcome(row)?,
                source: row.get("source")?,
                concluded_at: row.get::<_, TimeColumn>("concluded_at")?.0,
            })
        };
        find.query_row(params![message], recorded).optional()
    }

    fn count(&mut self, source: Option<&str>, outcome: &Outcome, by: i64) {
        if is_counted(source, outcome) {
            *self.tally.entry((outcome.name(), reason(outcome).unwrap_or_default())).or_default() += by;
        }
    }

    fn write_tally(&self) -> rusqlite::Result<()> {
        for ((outcome, reason), by) in self.tally.iter().filter(|(_, by)| **by != 0) {
            let mut add = self.transaction.prepare_cached(
                "INSERT INTO tally (outcome, reason, events) VALUES (?1, ?2, ?3)
                 ON CONFLICT DO UPDATE SET events = events + excluded.events",
            )?;
            add.execute(params![outcome, reason, by])?;
        }
        Ok(())
    }

    /// The number of a manifest in a repository.
    fn subject(&mut self, registry: &RegistryName, repository: &Repository, digest: &Digest) -> rusqlite::Result<i64> {
        let digest = DigestColumn(digest.clone());
        let repository = self.repository(registry, repository)?;
        let mut find = self.transaction.prepare_cached("SELECT id FROM subject WHERE digest = ?1 AND repository = ?2")?;
        match find.query_row(params![digest, repository], |row| row.get(0)).optional()? {
            Some(number) => Ok(number),
            None => self
                .transaction
                .prepare_cached("INSERT INTO subject (digest, repository) VALUES (?1, ?2)")?
                .insert(params![digest, repository]),
        }
    }

    fn repository(&mut self, registry: &RegistryName, repository: &Repository) -> rusqlite::Result<i64> {
        self.word(&repository_word(registry, repository))
    }

    /// The number of a word, which it is given when it is met first.
    fn word(&mut self, text: &str) -> rusqlite::Result<i64> {
        if let Some(number) = self.words.get(text) {
            return Ok(*number);
        }
        let known =
            self.transaction.prepare_cached("SELECT id FROM word WHERE text = ?1")?.query_row(params![text], |row| row.get(0));
        let number = match known.optional()? {
            Some(number) => number,
            None => self.transaction.prepare_cached("INSERT INTO word (text) VALUES (?1)")?.insert(params![text])?,
        };
        self.words.insert(text.to_owned(), number);
        Ok(number)
    }
}
