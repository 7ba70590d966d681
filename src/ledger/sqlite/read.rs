//! What is asked of the ledger.

use std::collections::HashMap;

use rusqlite::{Connection, OptionalExtension as _, Row, named_params};

use super::rows::{DigestColumn, TimeColumn, damaged, outcome, parsed};
use crate::{
    ledger::{
        Asked, EventFacts, EventRecord, KeptCertificate, MOST_SIGNATURES, RuleOutcome, SignatureRecord, StoryQuery, Sums,
        columns::{read_reference, read_repository, read_rules, read_state, repository_word},
    },
    oci::{Digest, RegistryName, Repository},
};

pub(super) fn sums(connection: &Connection) -> rusqlite::Result<Sums> {
    let mut sums = Sums::default();
    let mut tally = connection.prepare_cached("SELECT outcome, reason, events FROM tally WHERE events > 0")?;
    let mut rows = tally.query([])?;
    while let Some(row) = rows.next()? {
        let (outcome, reason): (String, String) = (row.get("outcome")?, row.get("reason")?);
        let events = u64::try_from(row.get::<_, i64>("events")?).map_err(|_| damaged(row, "events"))?;
        sums.add(&outcome, &reason, events).ok_or_else(|| damaged(row, "outcome"))?;
    }
    Ok(sums)
}

pub(super) fn story(connection: &Connection, query: &StoryQuery) -> rusqlite::Result<Vec<EventRecord>> {
    let mut events = connection.prepare_cached(&story_sql(query))?;
    let repository = repository_word(&query.registry, &query.repository);
    let tag = query.tag.as_ref().map(crate::oci::Tag::as_str);
    let digest = query.digest.clone().map(DigestColumn);
    let parameters = named_params! { ":repository": repository, ":tag": tag, ":digest": digest, ":limit": query.limit };
    events.query_map(parameters, event)?.collect()
}

pub(super) fn rule_outcomes(
    connection: &Connection,
    message_ids: Vec<String>,
) -> rusqlite::Result<HashMap<String, Vec<RuleOutcome>>> {
    let mut rules = connection.prepare_cached("SELECT rules FROM event WHERE message = ?1")?;
    let mut outcomes = HashMap::new();
    for id in message_ids {
        let recorded = rules.query_row([&id], |row| {
            let rules: Option<String> = row.get("rules")?;
            read_rules(rules.as_deref()).ok_or_else(|| damaged(row, "rules"))
        });
        if let Some(recorded) = recorded.optional()? {
            outcomes.insert(id, recorded);
        }
    }
    Ok(outcomes)
}

/// An index answers each of the questions. Which, is not left to the planner: it cannot know that a digest tells more
/// than a repository.
pub(in crate::ledger) fn story_sql(query: &StoryQuery) -> String {
    let repository = "(SELECT id FROM word WHERE text = :repository)";
    let index = if query.digest.is_some() { "event_by_subject" } else { "event_by_tag" };
    let tag = if query.tag.is_some() { "tag = :tag" } else { ":tag IS NULL" };
    let subject = if query.digest.is_some() {
        format!("subject = (SELECT id FROM subject WHERE digest = :digest AND repository = {repository})")
    } else {
        ":digest IS NULL".to_owned()
    };
    format!(
        "SELECT message, (SELECT text FROM word WHERE word.id = source) AS source, sender_id,
                (SELECT text FROM word WHERE word.id = repository) AS repository, tag,
                (SELECT digest FROM subject WHERE subject.id = event.subject) AS digest, pushed_at, received_at, actor,
                outcome, reason, rules, detail, attempt, concluded_at
           FROM event
          WHERE id IN (SELECT id FROM event INDEXED BY {index}
                        WHERE repository = {repository} AND {tag} AND {subject}
                        ORDER BY id DESC LIMIT :limit)
          ORDER BY id DESC"
    )
}

fn event(row: &Row<'_>) -> rusqlite::Result<EventRecord> {
    let (registry, repository) = repository(row)?.unzip();
    let rules: Option<String> = row.get("rules")?;
    Ok(EventRecord {
        event: EventFacts {
            message_id: row.get("message")?,
            source: row.get("source")?,
            event_id: row.get("sender_id")?,
            registry,
            repository,
            tag: parsed(row, "tag")?,
            digest: row.get::<_, Option<DigestColumn>>("digest")?.map(|digest| digest.0),
            pushed_at: row.get::<_, Option<TimeColumn>>("pushed_at")?.map(|time| time.0),
            received_at: row.get::<_, Option<TimeColumn>>("received_at")?.map(|time| time.0),
            actor: row.get("actor")?,
        },
        outcome: outcome(row)?,
        rules: read_rules(rules.as_deref()).ok_or_else(|| damaged(row, "rules"))?,
        detail: row.get("detail")?,
        attempt: row.get("attempt")?,
        concluded_at: row.get::<_, TimeColumn>("concluded_at")?.0,
    })
}

pub(in crate::ledger) const SIGNATURES: &str = "
    SELECT message, (SELECT text FROM word WHERE word.id = rule) AS rule,
           (SELECT text FROM word WHERE word.id = witness) AS witness, (SELECT text FROM word WHERE word.id = format) AS format,
           reference, payload,
           (SELECT text FROM word WHERE word.id = key) AS key, (SELECT text FROM word WHERE word.id = algorithm) AS algorithm,
           asked, asked_first_at, asked_last_at, state, detail, concluded_at
      FROM signature INDEXED BY signature_by_subject
     WHERE subject = (SELECT id FROM subject
                       WHERE digest = :digest AND repository = (SELECT id FROM word WHERE text = :repository))
     ORDER BY id DESC LIMIT :limit";

pub(super) fn signatures(
    connection: &Connection,
    registry: &RegistryName,
    repository: &Repository,
    digest: &Digest,
) -> rusqlite::Result<Vec<SignatureRecord>> {
    let mut signatures = connection.prepare_cached(SIGNATURES)?;
    let parameters = named_params! {
        ":digest": DigestColumn(digest.clone()),
        ":repository": repository_word(registry, repository),
        ":limit": MOST_SIGNATURES,
    };
    signatures.query_map(parameters, |row| signature(row, registry, repository, digest))?.collect()
}

pub(super) fn certificates(connection: &Connection, witness: &str, key: &str) -> rusqlite::Result<Vec<KeptCertificate>> {
    let mut certificates = connection
        .prepare_cached("SELECT number, pem FROM certificate WHERE witness = :witness AND key = :key ORDER BY number DESC")?;
    let certificate = |row: &Row<'_>| {
        let (witness, key) = (witness.to_owned(), key.to_owned());
        Ok(KeptCertificate { witness, key, number: row.get("number")?, pem: row.get("pem")? })
    };
    certificates.query_map(named_params! { ":witness": witness, ":key": key }, certificate)?.collect()
}

fn signature(
    row: &Row<'_>,
    registry: &RegistryName,
    repository: &Repository,
    digest: &Digest,
) -> rusqlite::Result<SignatureRecord> {
    let reference: String = row.get("reference")?;
    let state: Option<String> = row.get("state")?;
    let detail: Option<String> = row.get("detail")?;
    Ok(SignatureRecord {
        message_id: row.get("message")?,
        rule: row.get("rule")?,
        witness: row.get("witness")?,
        format: row.get("format")?,
        reference: read_reference(&reference, digest, registry, repository).ok_or_else(|| damaged(row, "reference"))?,
        payload_sha256: row.get("payload")?,
        asked: asked(row)?,
        state: match state {
            Some(name) => Some(read_state(&name, detail).ok_or_else(|| damaged(row, "state"))?),
            None => None,
        },
        concluded_at: row.get::<_, Option<TimeColumn>>("concluded_at")?.map(|time| time.0),
    })
}

fn asked(row: &Row<'_>) -> rusqlite::Result<Option<Asked>> {
    let times = row.get("asked")?;
    if times == 0 {
        return Ok(None);
    }
    Ok(Some(Asked {
        key: row.get("key")?,
        algorithm: parsed(row, "algorithm")?.ok_or_else(|| damaged(row, "algorithm"))?,
        times,
        first_at: row.get::<_, TimeColumn>("asked_first_at")?.0,
        last_at: row.get::<_, TimeColumn>("asked_last_at")?.0,
    }))
}

fn repository(row: &Row<'_>) -> rusqlite::Result<Option<(RegistryName, Repository)>> {
    let word: Option<String> = row.get("repository")?;
    word.map(|word| read_repository(&word).ok_or_else(|| damaged(row, "repository"))).transpose()
}
