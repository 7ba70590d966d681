//! What is asked of the ledger, and the little that is said to it one by one.

use std::{collections::HashMap, str::FromStr};

use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};
use tokio_postgres::Row;

use super::{Failure, Link, link::Session, write::text_column};
use crate::{
    ledger::{
        Asked, Error, EventFacts, EventRecord, KeptCertificate, MOST_SIGNATURES, RuleOutcome, SignatureRecord, StoryQuery, Sums,
        columns::{
            digest_column, read_digest, read_outcome, read_reference, read_repository, read_rules, read_state, repository_word,
        },
    },
    oci::{Digest, RegistryName, Repository, Tag},
    outcome::Outcome,
};

type Reply<T> = oneshot::Sender<Result<T, Error>>;
type Manifest = (RegistryName, Repository, Digest);

/// A question, and the way back to whoever asked.
pub(super) enum Question {
    Sums(Reply<Sums>),
    Story(StoryQuery, Reply<Vec<EventRecord>>),
    Rules(Vec<String>, Reply<HashMap<String, Vec<RuleOutcome>>>),
    Signatures(Manifest, Reply<Vec<SignatureRecord>>),
    Certificates(String, String, Reply<Vec<KeptCertificate>>),
    Keep(KeptCertificate, Reply<()>),
}

const SUMS: &str = "SELECT outcome, reason, sum(events)::bigint FROM countersign.tally GROUP BY outcome, reason";

const RULES: &str = "SELECT message, rules FROM countersign.event WHERE message = ANY($1)";

const SIGNATURES: &str = "
    SELECT message, rule, witness, format, reference, payload, key, algorithm, asked, asked_first_at, asked_last_at,
           state, detail, concluded_at
      FROM countersign.signature
     WHERE digest = $1 AND repository = $2
     ORDER BY id DESC LIMIT $3";

const CERTIFICATES: &str = "
    SELECT number, pem FROM countersign.certificate WHERE witness = $1 AND key = $2 ORDER BY number DESC";

const KEEP: &str =
    "INSERT INTO countersign.certificate (witness, key, number, pem) VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING";

/// An index answers each of the questions: a digest tells more than a repository.
fn story_sql(condition: &str) -> String {
    format!(
        "SELECT message, source, sender_id, repository, tag, digest, pushed_at, received_at, actor,
                outcome, reason, rules, detail, attempt, concluded_at
           FROM countersign.event
          WHERE repository = $1 AND {condition}
          ORDER BY id DESC LIMIT $2"
    )
}

pub(super) fn statements() -> [String; 8] {
    let whole = story_sql("true");
    let by_tag = story_sql("tag = $3");
    let by_digest = story_sql("($3::text IS NULL OR tag = $3) AND digest = $4");
    let [sums, signatures, rules] = [SUMS, SIGNATURES, RULES].map(str::to_owned);
    [sums, signatures, whole, by_tag, by_digest, rules, CERTIFICATES.to_owned(), KEEP.to_owned()]
}

/// Until the last [`super::Store`] is dropped.
pub(super) async fn run(mut link: Link<8>, mut questions: mpsc::UnboundedReceiver<Question>) {
    while let Some(question) = questions.recv().await {
        // Whoever asked may have gone.
        match question {
            Question::Sums(reply) => drop(reply.send(answer(&mut link, sums).await)),
            Question::Story(query, reply) => {
                drop(reply.send(answer(&mut link, async |session: &Session<8>| story(session, &query).await).await));
            }
            Question::Rules(messages, reply) => {
                drop(reply.send(answer(&mut link, async |session: &Session<8>| rules(session, &messages).await).await));
            }
            Question::Signatures(manifest, reply) => {
                drop(reply.send(answer(&mut link, async |session: &Session<8>| signatures(session, &manifest).await).await));
            }
            Question::Certificates(witness, key, reply) => {
                let ask = async |session: &Session<8>| certificates(session, &witness, &key).await;
                drop(reply.send(answer(&mut link, ask).await));
            }
            // Said twice, it is kept once.
            Question::Keep(certificate, reply) => {
                drop(reply.send(answer(&mut link, async |session: &Session<8>| keep(session, &certificate).await).await));
            }
        }
    }
}

/// Asks, and once more over a new connection if this one is gone.
async fn answer<T>(link: &mut Link<8>, mut ask: impl AsyncFnMut(&Session<8>) -> Result<T, Failure>) -> Result<T, Error> {
    let mut again = true;
    loop {
        let patience = link.patience();
        let session = link.session("read").await?;
        let answer = timeout(patience, ask(session)).await.unwrap_or(Err(Failure::Silent));
        let failure = match answer {
            Ok(answer) => return Ok(answer),
            Err(failure) => failure,
        };
        let is_gone = failure.is_lost();
        link.drop_session();
        if !(is_gone && std::mem::take(&mut again)) {
            return Err(failure.into_error("read"));
        }
    }
}

async fn sums(session: &Session<8>) -> Result<Sums, Failure> {
    let mut sums = Sums::default();
    for row in session.client.query(&session.statements[0], &[]).await? {
        let (outcome, reason): (&str, &str) = (row.try_get(0)?, row.try_get(1)?);
        let events = u64::try_from(row.try_get::<_, i64>(2)?).map_err(|_| Failure::Damaged("events"))?;
        if events > 0 {
            sums.add(outcome, reason, events).ok_or(Failure::Damaged("outcome"))?;
        }
    }
    Ok(sums)
}

async fn story(session: &Session<8>, query: &StoryQuery) -> Result<Vec<EventRecord>, Failure> {
    let repository = repository_word(&query.registry, &query.repository);
    let tag = query.tag.as_ref().map(Tag::as_str);
    let limit = i64::from(query.limit);
    let [_, _, whole, by_tag, by_digest, ..] = &session.statements;
    let rows = match (&query.digest, tag) {
        (Some(digest), _) => session.client.query(by_digest, &[&repository, &limit, &tag, &digest_column(digest)]).await?,
        (None, Some(_)) => session.client.query(by_tag, &[&repository, &limit, &tag]).await?,
        (None, None) => session.client.query(whole, &[&repository, &limit]).await?,
    };
    rows.iter().map(event).collect()
}

fn event(row: &Row) -> Result<EventRecord, Failure> {
    let repository: Option<&str> = row.try_get("repository")?;
    let repository = repository.map(|word| read_repository(word).ok_or(Failure::Damaged("repository"))).transpose()?;
    let (registry, repository) = repository.unzip();
    let digest: Option<&[u8]> = row.try_get("digest")?;
    Ok(EventRecord {
        event: EventFacts {
            message_id: row.try_get("message")?,
            source: row.try_get("source")?,
            event_id: row.try_get("sender_id")?,
            registry,
            repository,
            tag: parsed(row, "tag")?,
            digest: digest.map(|raw| read_digest(raw).map_err(|_| Failure::Damaged("digest"))).transpose()?,
            pushed_at: row.try_get("pushed_at")?,
            received_at: row.try_get("received_at")?,
            actor: row.try_get("actor")?,
        },
        outcome: outcome(row)?,
        rules: read_rules(row.try_get("rules")?).ok_or(Failure::Damaged("rules"))?,
        detail: row.try_get("detail")?,
        attempt: count(row, "attempt")?,
        concluded_at: row.try_get("concluded_at")?,
    })
}

/// From the columns `outcome` and `reason`.
pub(super) fn outcome(row: &Row) -> Result<Outcome, Failure> {
    read_outcome(row.try_get("outcome")?, row.try_get("reason")?).ok_or(Failure::Damaged("outcome"))
}

async fn rules(session: &Session<8>, messages: &[String]) -> Result<HashMap<String, Vec<RuleOutcome>>, Failure> {
    // By the id as it was asked for, which is the column's but for characters that PostgreSQL does not hold.
    let columns: HashMap<_, _> = messages.iter().map(|message| (text_column(message), message)).collect();
    let rows = session.client.query(&session.statements[5], &[&columns.keys().collect::<Vec<_>>()]).await?;
    let rules = |row: &Row| {
        let message = columns.get(row.try_get::<_, &str>("message")?).ok_or(Failure::Damaged("message"))?;
        Ok(((*message).clone(), read_rules(row.try_get("rules")?).ok_or(Failure::Damaged("rules"))?))
    };
    rows.iter().map(rules).collect()
}

async fn signatures(session: &Session<8>, (registry, repository, digest): &Manifest) -> Result<Vec<SignatureRecord>, Failure> {
    let limit = i64::from(MOST_SIGNATURES);
    let word = repository_word(registry, repository);
    let rows = session.client.query(&session.statements[1], &[&digest_column(digest), &word, &limit]).await?;
    let signature = |row: &Row| {
        let state: Option<&str> = row.try_get("state")?;
        let detail: Option<String> = row.try_get("detail")?;
        let reference = read_reference(row.try_get("reference")?, digest, registry, repository);
        let payload: &[u8] = row.try_get("payload")?;
        Ok(SignatureRecord {
            message_id: row.try_get("message")?,
            rule: row.try_get("rule")?,
            witness: row.try_get("witness")?,
            format: row.try_get("format")?,
            reference: reference.ok_or(Failure::Damaged("reference"))?,
            payload_sha256: payload.try_into().map_err(|_| Failure::Damaged("payload"))?,
            asked: asked(row)?,
            state: state.map(|name| read_state(name, detail).ok_or(Failure::Damaged("state"))).transpose()?,
            concluded_at: row.try_get("concluded_at")?,
        })
    };
    rows.iter().map(signature).collect()
}

async fn certificates(session: &Session<8>, witness: &str, key: &str) -> Result<Vec<KeptCertificate>, Failure> {
    let rows = session.client.query(&session.statements[6], &[&witness, &key]).await?;
    let certificate = |row: &Row| {
        let (witness, key) = (witness.to_owned(), key.to_owned());
        Ok(KeptCertificate { witness, key, number: count(row, "number")?, pem: row.try_get("pem")? })
    };
    rows.iter().map(certificate).collect()
}

async fn keep(session: &Session<8>, certificate: &KeptCertificate) -> Result<(), Failure> {
    let KeptCertificate { witness, key, number, pem } = certificate;
    session.client.execute(&session.statements[7], &[witness, key, &i64::from(*number), pem]).await?;
    Ok(())
}

fn asked(row: &Row) -> Result<Option<Asked>, Failure> {
    let times = count(row, "asked")?;
    if times == 0 {
        return Ok(None);
    }
    Ok(Some(Asked {
        key: row.try_get("key")?,
        algorithm: parsed(row, "algorithm")?.ok_or(Failure::Damaged("algorithm"))?,
        times,
        first_at: row.try_get("asked_first_at")?,
        last_at: row.try_get("asked_last_at")?,
    }))
}

fn count(row: &Row, column: &'static str) -> Result<u32, Failure> {
    row.try_get::<_, i64>(column)?.try_into().map_err(|_| Failure::Damaged(column))
}

/// A column that is read by a parser.
fn parsed<T: FromStr>(row: &Row, column: &'static str) -> Result<Option<T>, Failure> {
    let text: Option<&str> = row.try_get(column)?;
    text.map(|text| text.parse().map_err(|_| Failure::Damaged(column))).transpose()
}
