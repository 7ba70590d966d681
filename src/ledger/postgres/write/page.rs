//! One transaction: what was said, as rows, and how they come to stand in the tables.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap, HashSet},
};

use futures::try_join;
use jiff::Timestamp;
use tokio_postgres::{Row, types::ToSql};

use super::{
    super::read::outcome,
    Failure, Session,
    named::{Named, Names},
};
use crate::{
    ledger::{
        Conclusion, EventFacts, Intent, SignatureState, Work,
        columns::{digest_column, reason, repository_word, rules_column, shortened, state_columns},
        is_counted,
    },
    oci::Tag,
    outcome::Outcome,
};

const LOCK: usize = 0;
const CLAIMED: usize = 1;
const INSERT_EVENTS: usize = 2;
const UPDATE_EVENTS: usize = 3;
const FORGET: usize = 4;
const INTEND: usize = 5;
const CONCLUDE: usize = 6;
const TELL: usize = 7;
const COUNT: usize = 8;
const PROBE: usize = 9;

/// By the numbers above.
pub(super) const STATEMENTS: [&str; 10] = [
    "SELECT message, source, outcome, reason, concluded_at
       FROM countersign.event
      WHERE message = ANY($1)
      ORDER BY message
        FOR UPDATE",
    // With another key in between there are several: the one asked last is meant.
    "SELECT DISTINCT ON (claim) claim, id
       FROM countersign.signature
      WHERE claim = ANY($1)
      ORDER BY claim, asked_last_at DESC NULLS LAST, id DESC",
    "INSERT INTO countersign.event (message, source, sender_id, repository, tag, digest, pushed_at, received_at, actor,
                                    outcome, reason, rules, detail, attempt, concluded_at)
     SELECT *, $15
       FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::bytea[], $7::timestamptz[],
                   $8::timestamptz[], $9::text[], $10::text[], $11::text[], $12::text[], $13::text[], $14::bigint[])
     ON CONFLICT (message) DO NOTHING",
    // The facts of one message never change.
    "UPDATE countersign.event
        SET outcome = new.outcome, reason = new.reason, rules = new.rules, detail = new.detail, attempt = new.attempt,
            concluded_at = $7
       FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::bigint[])
            AS new (message, outcome, reason, rules, detail, attempt)
      WHERE event.message = new.message",
    "UPDATE countersign.event
        SET outcome = 'retrying', reason = NULL, detail = 'replayed: ' || coalesce(detail, ''), concluded_at = $2
      WHERE message = ANY($1)",
    // What is about to be written is open again, whatever was said of it before.
    "INSERT INTO countersign.signature AS before (identity, claim, message, rule, witness, format, repository, digest, reference,
                                                  payload, key, algorithm, asked, asked_first_at, asked_last_at)
     SELECT *, $14, $14
       FROM unnest($1::bytea[], $2::bytea[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::bytea[], $9::text[],
                   $10::bytea[], $11::text[], $12::text[], $13::bigint[])
     ON CONFLICT (identity) DO UPDATE
        SET asked = before.asked + excluded.asked, asked_last_at = excluded.asked_last_at,
            state = NULL, detail = NULL, concluded_at = NULL",
    // One that we wrote stays written.
    "UPDATE countersign.signature
        SET state = new.state, detail = new.detail, concluded_at = $4
       FROM unnest($1::bigint[], $2::text[], $3::text[]) AS new (id, state, detail)
      WHERE signature.id = new.id AND NOT (new.state = 'found' AND signature.state IS NOT DISTINCT FROM 'written')",
    // Another event's record of the same signature says all that there is to say of one that was found.
    "INSERT INTO countersign.signature AS before (identity, claim, message, rule, witness, format, repository, digest, reference,
                                                  payload, state, detail, asked, concluded_at)
     SELECT *, 0, $13
       FROM unnest($1::bytea[], $2::bytea[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::bytea[], $9::text[],
                   $10::bytea[], $11::text[], $12::text[])
            AS new (identity, claim, message, rule, witness, format, repository, digest, reference, payload, state, detail)
      WHERE NOT (state = 'found' AND EXISTS (
                SELECT 1 FROM countersign.signature AS known
                 WHERE known.digest = new.digest AND known.repository = new.repository AND known.reference = new.reference
                   AND known.witness = new.witness AND known.format = new.format AND known.payload = new.payload
                   AND known.state IN ('written', 'found')))
     ON CONFLICT (identity) DO UPDATE
        SET state = excluded.state, detail = excluded.detail, concluded_at = excluded.concluded_at
      WHERE before.state = 'failed'",
    "INSERT INTO countersign.tally AS before (shard, outcome, reason, events)
     SELECT $1, * FROM unnest($2::text[], $3::text[], $4::bigint[])
     ON CONFLICT (shard, outcome, reason) DO UPDATE SET events = before.events + excluded.events",
    "INSERT INTO countersign.probe (shard, written_at) VALUES ($1, $2)
     ON CONFLICT (shard) DO UPDATE SET written_at = excluded.written_at",
];

/// What one transaction is to say, in the order of the messages, which is the order in which rows are locked; of one message in
/// the order in which it was said, which is that of the rules.
pub(super) struct Page<'a> {
    now: Timestamp,
    /// Of the tally.
    shard: i32,
    /// With their identities; and how often each is said.
    intents: Vec<(Vec<u8>, &'a Intent, i64)>,
    /// By message.
    conclusions: BTreeMap<String, &'a Conclusion>,
    /// What died until then, by message.
    forgotten: BTreeMap<String, Timestamp>,
    /// With their claims, of which each is there once.
    results: Vec<(Vec<u8>, Named, &'a SignatureState)>,
    is_probe: bool,
}

impl<'a> Page<'a> {
    /// Of works about different messages.
    pub(super) fn new(works: &[&'a Work], now: Timestamp, shard: i32) -> Self {
        let mut page = Self {
            now: time_column(now),
            shard,
            intents: vec![],
            conclusions: BTreeMap::new(),
            forgotten: BTreeMap::new(),
            results: vec![],
            is_probe: false,
        };
        for work in works {
            match work {
                Work::Intend(intents) => {
                    for intent in intents {
                        let identity = Named::of_intent(intent).asked(&intent.key, intent.algorithm.name());
                        match page.intents.iter_mut().rev().take(intents.len()).find(|(known, ..)| *known == identity) {
                            Some((_, _, times)) => *times += 1,
                            None => page.intents.push((identity, intent, 1)),
                        }
                    }
                }
                Work::Conclude(conclusion) => {
                    page.conclusions.insert(text_column(&conclusion.event.message_id).into_owned(), conclusion);
                    for result in &conclusion.signatures {
                        let named = Named::of_result(&conclusion.event, result);
                        let claim = named.claim();
                        let said = conclusion.signatures.len();
                        match page.results.iter_mut().rev().take(said).find(|(known, ..)| *known == claim) {
                            Some((_, _, state)) => *state = &result.state,
                            None => page.results.push((claim, named, &result.state)),
                        }
                    }
                }
                Work::Forget(message, until) => {
                    page.forgotten.insert(text_column(message).into_owned(), *until);
                }
                Work::Check => page.is_probe = true,
            }
        }
        // Stable.
        page.intents.sort_by(|(_, one, _), (_, other, _)| one.message_id.cmp(&other.message_id));
        page.results.sort_by(|(_, one, _), (_, other, _)| one.message.cmp(&other.message));
        page
    }

    /// Begins a transaction and does all of it but the commit.
    pub(super) async fn write(&self, session: &Session<10>) -> Result<(), Failure> {
        let begin = async { Ok(session.client.batch_execute("BEGIN").await?) };
        // Sent in this order, without waiting for each other's answers.
        let ((), recorded, claimed) = try_join!(begin, self.lock(session), self.claimed(session))?;

        let mut tally: BTreeMap<(&str, &str), i64> = BTreeMap::new();
        let mut count = |source: Option<&str>, outcome: &Outcome, by: i64| {
            if is_counted(source, outcome) {
                *tally.entry((outcome.name(), reason(outcome).unwrap_or_default())).or_default() += by;
            }
        };
        for (message, conclusion) in &self.conclusions {
            if let Some(before) = recorded.get(message) {
                count(before.source.as_deref(), &before.outcome, -1);
            }
            count(conclusion.event.source.as_deref(), &conclusion.outcome, 1);
        }
        let mut forgotten = vec![];
        for (message, until) in &self.forgotten {
            let dead = |before: &&Recorded| before.outcome == Outcome::Dead && before.concluded_at <= *until;
            if let Some(before) = recorded.get(message).filter(dead) {
                count(before.source.as_deref(), &before.outcome, -1);
                forgotten.push(message);
            }
        }
        let (again, new): (Vec<_>, Vec<_>) = self.conclusions.iter().partition(|(message, _)| recorded.contains_key(*message));
        let (asked, told): (Vec<_>, Vec<_>) = self.results.iter().partition(|(claim, ..)| claimed.contains_key(claim));
        let asked = asked.into_iter().map(|(claim, _, state)| (claimed[claim], *state)).collect();

        try_join!(
            self.insert_events(session, &new),
            self.update_events(session, &again),
            self.forget(session, &forgotten),
            self.intend(session),
            self.conclude(session, asked),
            self.tell(session, &told),
            self.count(session, &tally),
            self.probe(session),
        )?;
        Ok(())
    }

    /// What is on record of these events, and nobody else says anything of them until the commit.
    async fn lock(&self, session: &Session<10>) -> Result<HashMap<String, Recorded>, Failure> {
        let messages: Vec<_> = self.conclusions.keys().chain(self.forgotten.keys()).collect();
        if messages.is_empty() {
            return Ok(HashMap::new());
        }
        let rows = session.client.query(&session.statements[LOCK], &[&messages]).await?;
        rows.iter().map(|row| Ok((row.try_get("message")?, Recorded::read(row)?))).collect()
    }

    /// The rows of the signatures that something is said of, by claim.
    async fn claimed(&self, session: &Session<10>) -> Result<HashMap<Vec<u8>, i64>, Failure> {
        let claims = column(&self.results, |(claim, ..)| claim);
        if claims.is_empty() {
            return Ok(HashMap::new());
        }
        let rows = session.client.query(&session.statements[CLAIMED], &[&claims]).await?;
        rows.iter().map(|row| Ok((row.try_get("claim")?, row.try_get("id")?))).collect()
    }

    async fn insert_events(&self, session: &Session<10>, rows: &[(&String, &&Conclusion)]) -> Result<(), Failure> {
        let event = |of: fn(&EventFacts) -> Option<Cow<'_, str>>| column(rows, move |(_, said)| of(&said.event));
        let messages = column(rows, |(message, _)| message.as_str());
        let repositories =
            column(rows, |(_, said)| Some(repository_word(said.event.registry.as_ref()?, said.event.repository.as_ref()?)));
        let digests = column(rows, |(_, said)| said.event.digest.as_ref().map(digest_column));
        let pushed = column(rows, |(_, said)| said.event.pushed_at.map(time_column));
        let received = column(rows, |(_, said)| said.event.received_at.map(time_column));
        let said = Said::of(rows);
        let inserted = execute(
            session,
            INSERT_EVENTS,
            rows.len(),
            &[
                &messages,
                &event(|event| event.source.as_deref().map(text_column)),
                &event(|event| event.event_id.as_deref().map(shortened).map(text_column)),
                &repositories,
                &event(|event| event.tag.as_ref().map(Tag::as_str).map(text_column)),
                &digests,
                &pushed,
                &received,
                &event(|event| event.actor.as_deref().map(shortened).map(text_column)),
                &said.outcomes,
                &said.reasons,
                &said.rules,
                &said.details,
                &said.attempts,
                &self.now,
            ],
        )
        .await?;
        // Another replica was faster with one of them, and what is to be counted is no longer known.
        if inserted == rows.len() as u64 { Ok(()) } else { Err(Failure::Raced) }
    }

    async fn update_events(&self, session: &Session<10>, rows: &[(&String, &&Conclusion)]) -> Result<(), Failure> {
        let messages = column(rows, |(message, _)| message.as_str());
        let Said { outcomes, reasons, rules, details, attempts } = Said::of(rows);
        let parameters: Parameters<'_> = &[&messages, &outcomes, &reasons, &rules, &details, &attempts, &self.now];
        execute(session, UPDATE_EVENTS, rows.len(), parameters).await.map(drop)
    }

    async fn forget(&self, session: &Session<10>, messages: &[&String]) -> Result<(), Failure> {
        execute(session, FORGET, messages.len(), &[&messages, &self.now]).await.map(drop)
    }

    async fn intend(&self, session: &Session<10>) -> Result<(), Failure> {
        let identities = column(&self.intents, |(identity, ..)| identity);
        let named = column(&self.intents, |(_, intent, _)| Named::of_intent(intent));
        let keys = column(&self.intents, |(_, intent, _)| text_column(&intent.key));
        let algorithms = column(&self.intents, |(_, intent, _)| intent.algorithm.name());
        let times = column(&self.intents, |(.., times)| *times);
        let columns = Names::of(&named);
        let mut parameters: Vec<&(dyn ToSql + Sync)> = vec![&identities];
        parameters.extend(columns.all());
        parameters.extend([&keys as &(dyn ToSql + Sync), &algorithms, &times, &self.now]);
        execute(session, INTEND, self.intents.len(), &parameters).await.map(drop)
    }

    /// Of rows that are there.
    async fn conclude(&self, session: &Session<10>, mut rows: Vec<(i64, &SignatureState)>) -> Result<(), Failure> {
        rows.sort_by_key(|(id, _)| *id);
        let ids = column(&rows, |(id, _)| *id);
        let (states, details) = states(rows.iter().map(|(_, state)| *state));
        execute(session, CONCLUDE, rows.len(), &[&ids, &states, &details, &self.now]).await.map(drop)
    }

    /// Of signatures that nobody here asked a key for.
    async fn tell(&self, session: &Session<10>, rows: &[&(Vec<u8>, Named, &SignatureState)]) -> Result<(), Failure> {
        // One that several events found is one row, of the first.
        let mut known = HashSet::new();
        let rows = rows.iter().map(|(_, named, state)| (named.told(state), named, *state));
        let rows: Vec<_> = rows.filter(|(identity, ..)| known.insert(identity.clone())).collect();
        let identities = column(&rows, |(identity, ..)| identity);
        let named = column(&rows, |(_, named, _)| *named);
        let (states, details) = states(rows.iter().map(|(.., state)| *state));
        let columns = Names::of(named.iter().copied());
        let mut parameters: Vec<&(dyn ToSql + Sync)> = vec![&identities];
        parameters.extend(columns.all());
        parameters.extend([&states as &(dyn ToSql + Sync), &details, &self.now]);
        execute(session, TELL, rows.len(), &parameters).await.map(drop)
    }

    async fn count(&self, session: &Session<10>, tally: &BTreeMap<(&str, &str), i64>) -> Result<(), Failure> {
        let changed: Vec<_> = tally.iter().filter(|(_, by)| **by != 0).collect();
        let outcomes = column(&changed, |((outcome, _), _)| *outcome);
        let reasons = column(&changed, |((_, reason), _)| *reason);
        let events = column(&changed, |(_, by)| **by);
        execute(session, COUNT, changed.len(), &[&self.shard, &outcomes, &reasons, &events]).await.map(drop)
    }

    async fn probe(&self, session: &Session<10>) -> Result<(), Failure> {
        execute(session, PROBE, usize::from(self.is_probe), &[&self.shard, &self.now]).await.map(drop)
    }
}

type Parameters<'a> = &'a [&'a (dyn ToSql + Sync)];

/// Runs a statement, unless there are no rows for it.
async fn execute(session: &Session<10>, statement: usize, rows: usize, parameters: Parameters<'_>) -> Result<u64, Failure> {
    if rows == 0 {
        return Ok(0);
    }
    Ok(session.client.execute(&session.statements[statement], parameters).await?)
}

/// One column of many rows.
fn column<'a, R, T>(rows: &'a [R], of: impl FnMut(&'a R) -> T) -> Vec<T> {
    rows.iter().map(of).collect()
}

/// What is on record of an event.
struct Recorded {
    source: Option<String>,
    outcome: Outcome,
    concluded_at: Timestamp,
}

impl Recorded {
    fn read(row: &Row) -> Result<Self, Failure> {
        Ok(Self { source: row.try_get("source")?, outcome: outcome(row)?, concluded_at: row.try_get("concluded_at")? })
    }
}

/// What conclusions say, in columns.
struct Said<'a> {
    outcomes: Vec<&'static str>,
    reasons: Vec<Option<&'static str>>,
    rules: Vec<Option<String>>,
    details: Vec<Option<Cow<'a, str>>>,
    attempts: Vec<i64>,
}

impl<'a> Said<'a> {
    fn of(rows: &'a [(&String, &&Conclusion)]) -> Self {
        Self {
            outcomes: column(rows, |(_, said)| said.outcome.name()),
            reasons: column(rows, |(_, said)| reason(&said.outcome)),
            rules: column(rows, |(_, said)| rules_column(&said.rules)),
            details: column(rows, |(_, said)| said.detail.as_deref().map(shortened).map(text_column)),
            attempts: column(rows, |(_, said)| i64::from(said.attempt)),
        }
    }
}

fn states<'a>(states: impl Iterator<Item = &'a SignatureState>) -> (Vec<&'static str>, Vec<Option<Cow<'a, str>>>) {
    states.map(state_columns).map(|(state, detail)| (state, detail.map(text_column))).unzip()
}

/// PostgreSQL's texts hold every character but NUL, which is written as the sign for it.
pub(in crate::ledger::postgres) fn text_column(text: &str) -> Cow<'_, str> {
    if text.contains('\0') { Cow::Owned(text.replace('\0', "\u{2400}")) } else { Cow::Borrowed(text) }
}

/// To the microsecond. What a registry says of times before our era PostgreSQL cannot say.
fn time_column(time: Timestamp) -> Timestamp {
    const EARLIEST: Timestamp = Timestamp::constant(-62_135_596_800, 0);
    Timestamp::from_microsecond(time.as_microsecond()).map_or(EARLIEST, |time| time.max(EARLIEST))
}
