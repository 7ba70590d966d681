//! The ledger in a SQLite file, in WAL mode: readers never wait for the writer.
//!
//! One thread writes, so that all who wait share a commit; one reads. Both live as long as the [`Store`].

mod read;
mod rows;
mod write;

use std::{
    collections::HashMap,
    fmt,
    fs::OpenOptions,
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use rusqlite::{Connection, OpenFlags, TransactionBehavior, config::DbConfig};
use tokio::sync::oneshot;

use super::{Backend, Error, EventRecord, KeptCertificate, RuleOutcome, SignatureRecord, StoryQuery, Sums, Work};
use crate::{
    clock::Clock,
    oci::{Digest, RegistryName, Repository},
};

#[cfg(test)]
pub(super) use read::{SIGNATURES, story_sql};

/// `CSLG`: in the file's header, so that no other program's file (nor the queue's) is taken for a ledger.
const APPLICATION_ID: i32 = 0x4353_4c47;
/// Each brings a ledger one version further; its version is how many it has been through, in the file's `user_version`. One that
/// was released never changes.
const MIGRATIONS: [&str; 2] = [FIRST, CERTIFICATES];
const VERSION: i64 = 2;

const ANOTHER_FILE: &str = "name another file, or move this one away and a new ledger is begun";

/// How long to wait for another process's transaction.
const PATIENCE: Duration = Duration::from_secs(5);

/// `word` holds each name once (repositories, rules, witnesses, keys, sources, formats, algorithms), `subject` each manifest of a
/// repository; rows hold their numbers. Digests fall anywhere in an index, so that each costs a page of its own in the log;
/// numbers are given in order, and fall beside each other.
///
/// Times are microseconds since 1970 in UTC; digests are their raw bytes, and the length tells the algorithm. Skip reasons and
/// outcomes are the words of metrics. `tally` counts the terminal outcomes of `event`, in the same transactions.
/// `signature.reference` is `:tag` or `@` where it is the subject's repository by that tag or by its digest, else written out.
const FIRST: &str = "
    CREATE TABLE word (
        id      INTEGER PRIMARY KEY,
        text    TEXT NOT NULL UNIQUE
    ) STRICT;

    CREATE TABLE subject (
        id          INTEGER PRIMARY KEY,
        digest      BLOB NOT NULL,
        repository  INTEGER NOT NULL,
        UNIQUE (digest, repository)
    ) STRICT;

    CREATE TABLE event (
        id              INTEGER PRIMARY KEY,
        message         TEXT NOT NULL UNIQUE,
        source          INTEGER,
        sender_id       TEXT,
        repository      INTEGER,
        tag             TEXT,
        subject         INTEGER,
        pushed_at       INTEGER,
        received_at     INTEGER,
        actor           TEXT,
        outcome         TEXT NOT NULL,
        reason          TEXT,
        rules           TEXT,
        detail          TEXT,
        attempt         INTEGER NOT NULL,
        concluded_at    INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX event_by_tag ON event (repository, tag);
    CREATE INDEX event_by_subject ON event (subject);

    CREATE TABLE signature (
        id              INTEGER PRIMARY KEY,
        message         TEXT NOT NULL,
        rule            INTEGER NOT NULL,
        witness         INTEGER NOT NULL,
        format          INTEGER NOT NULL,
        subject         INTEGER NOT NULL,
        reference       TEXT NOT NULL,
        payload         BLOB NOT NULL,
        key             INTEGER,
        algorithm       INTEGER,
        asked           INTEGER NOT NULL,
        asked_first_at  INTEGER,
        asked_last_at   INTEGER,
        state           TEXT,
        detail          TEXT,
        concluded_at    INTEGER
    ) STRICT;
    CREATE INDEX signature_by_subject ON signature (subject, reference);

    CREATE TABLE tally (
        outcome TEXT NOT NULL,
        reason  TEXT NOT NULL,
        events  INTEGER NOT NULL,
        PRIMARY KEY (outcome, reason)
    ) STRICT, WITHOUT ROWID;

    CREATE TABLE probe (
        id          INTEGER PRIMARY KEY,
        written_at  INTEGER NOT NULL
    ) STRICT;
";

const CERTIFICATES: &str = "
    CREATE TABLE certificate (
        witness TEXT NOT NULL,
        key     TEXT NOT NULL,
        number  INTEGER NOT NULL,
        pem     TEXT NOT NULL,
        PRIMARY KEY (witness, key, number)
    ) STRICT, WITHOUT ROWID;
";

/// A question to the file, and the way back to whoever asked.
type Question = Box<dyn FnOnce(&Connection) + Send>;

/// The open file.
pub(super) struct Store {
    path: PathBuf,
    writer: mpsc::Sender<write::Job>,
    reader: mpsc::Sender<Question>,
}

impl Store {
    pub(super) fn open(path: &Path, clock: Clock) -> Result<Self, Error> {
        create_for_this_user(path).map_err(|source| Error::Create { path: path.to_owned(), source: Arc::new(source) })?;
        let open = |source| Error::Open { path: path.to_owned(), source: Arc::new(source) };

        let writing = connect(path)?;
        let reading = connect(path)?;
        reading.pragma_update(None, "query_only", true).map_err(open)?;

        let (writer, jobs) = mpsc::channel();
        let (reader, questions) = mpsc::channel::<Question>();
        let spawn = |name: &str, body: Box<dyn FnOnce() + Send>| {
            thread::Builder::new()
                .name(name.to_owned())
                .spawn(body)
                .map_err(|source| Error::Create { path: path.to_owned(), source: Arc::new(source) })
        };
        spawn("ledger-write", Box::new(move || write::Writer::new(writing, clock).run(&jobs)))?;
        spawn("ledger-read", Box::new(move || questions.iter().for_each(|question| question(&reading))))?;
        Ok(Self { path: path.to_owned(), writer, reader })
    }

    async fn read<T: Send + 'static>(
        &self,
        ask: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        let question: Question = Box::new(move |connection| {
            // Whoever asked may have gone.
            let _ = reply.send(ask(connection));
        });
        self.reader.send(question).map_err(|_| Error::Closed)?;
        let answer = answer.await.map_err(|_| Error::Closed)?;
        answer.map_err(|source| Error::Unavailable { what: "read", source: Arc::new(source) })
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Sqlite").field(&self.path).finish()
    }
}

#[async_trait]
impl Backend for Store {
    /// Returns once `work` is committed, with whatever else was waiting.
    async fn write(&self, work: Work) -> Result<(), Error> {
        let (reply, answer) = oneshot::channel();
        self.writer.send(write::Job { work, reply }).map_err(|_| Error::Closed)?;
        answer.await.map_err(|_| Error::Closed)?.map_err(|source| Error::Unavailable { what: "written", source })
    }

    async fn sums(&self) -> Result<Sums, Error> {
        self.read(read::sums).await
    }

    async fn story(&self, query: StoryQuery) -> Result<Vec<EventRecord>, Error> {
        self.read(move |connection| read::story(connection, &query)).await
    }

    async fn rule_outcomes(&self, message_ids: Vec<String>) -> Result<HashMap<String, Vec<RuleOutcome>>, Error> {
        self.read(move |connection| read::rule_outcomes(connection, message_ids)).await
    }

    async fn signatures(
        &self,
        registry: RegistryName,
        repository: Repository,
        digest: Digest,
    ) -> Result<Vec<SignatureRecord>, Error> {
        self.read(move |connection| read::signatures(connection, &registry, &repository, &digest)).await
    }

    /// Over a connection of its own: it happens once in a witness's life.
    async fn keep_certificate(&self, certificate: KeptCertificate) -> Result<(), Error> {
        let path = self.path.clone();
        let keep = move || {
            let kept = connect(&path)?.execute(
                "INSERT INTO certificate (witness, key, number, pem) VALUES (?1, ?2, ?3, ?4) ON CONFLICT DO NOTHING",
                (&certificate.witness, &certificate.key, certificate.number, &certificate.pem),
            );
            kept.map(drop).map_err(|source| Error::Unavailable { what: "written", source: Arc::new(source) })
        };
        tokio::task::spawn_blocking(keep).await.map_err(|_| Error::Closed)?
    }

    async fn certificates(&self, witness: String, key: String) -> Result<Vec<KeptCertificate>, Error> {
        self.read(move |connection| read::certificates(connection, &witness, &key)).await
    }
}

/// SQLite gives its other files (`-wal`, `-shm`) the mode of this one.
fn create_for_this_user(path: &Path) -> io::Result<()> {
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other.map(drop),
    }
}

/// Opens the file if it is a ledger of this version, or empty. Any other is only looked at.
fn connect(path: &Path) -> Result<Connection, Error> {
    let open = |source: rusqlite::Error| match source.sqlite_error_code() {
        Some(rusqlite::ErrorCode::NotADatabase) => Error::Foreign { place: path.display().to_string(), cure: ANOTHER_FILE },
        _ => Error::Open { path: path.to_owned(), source: Arc::new(source) },
    };
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut connection = Connection::open_with_flags(path, flags).map_err(open)?;
    connection.busy_timeout(PATIENCE).map_err(open)?;
    let behind = match state(&connection).map_err(open)? {
        State::Empty | State::Ours(1..VERSION) => true,
        State::Ours(VERSION) => false,
        State::Ours(found) => return Err(Error::Newer { place: path.display().to_string(), found, known: VERSION }),
        State::Foreign => return Err(Error::Foreign { place: path.display().to_string(), cure: ANOTHER_FILE }),
    };
    write_ahead(&connection).map_err(open)?;
    if behind {
        bring_up(&mut connection).map_err(open)?;
    }
    configure(&connection).map_err(open)?;
    Ok(connection)
}

enum State {
    Empty,
    Ours(i64),
    Foreign,
}

fn state(connection: &Connection) -> rusqlite::Result<State> {
    // In one statement, so that they are of one moment: another process may be creating it.
    let (application, version, objects): (i32, i64, i64) = connection.query_row(
        "SELECT application_id, user_version, (SELECT count(*) FROM sqlite_schema)
           FROM pragma_application_id, pragma_user_version",
        [],
        |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)),
    )?;
    Ok(match (application, version, objects) {
        (APPLICATION_ID, version, _) => State::Ours(version),
        (0, 0, 0) => State::Empty,
        _ => State::Foreign,
    })
}

/// Turns the file to WAL, which it then stays. SQLite waits for nobody there (it would do so with its lock for reading held, and
/// two that turn the same file would wait for each other), so that whoever opens a new ledger beside another asks again.
fn write_ahead(connection: &Connection) -> rusqlite::Result<()> {
    let begun = Instant::now();
    loop {
        match connection.pragma_update(None, "journal_mode", "WAL") {
            Err(error) if busy(&error) && begun.elapsed() < PATIENCE => thread::sleep(Duration::from_millis(10)),
            turned => return turned,
        }
    }
}

fn busy(error: &rusqlite::Error) -> bool {
    error.sqlite_error_code() == Some(rusqlite::ErrorCode::DatabaseBusy)
}

fn bring_up(connection: &mut Connection) -> rusqlite::Result<()> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    // Another process may have been first.
    let found = match state(&transaction)? {
        State::Empty => 0,
        State::Ours(found) => usize::try_from(found).unwrap_or(MIGRATIONS.len()),
        State::Foreign => MIGRATIONS.len(),
    };
    if found < MIGRATIONS.len() {
        for migration in &MIGRATIONS[found..] {
            transaction.execute_batch(migration)?;
        }
        transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
        transaction.pragma_update(None, "user_version", VERSION)?;
    }
    transaction.commit()
}

fn configure(connection: &Connection) -> rusqlite::Result<()> {
    // Each commit is on the disk before it returns: an outcome that is lost must not have let its event be acked.
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "temp_store", "MEMORY")?;
    // Up to 4 MiB of pages; and a log that grew under a long reader shrinks again.
    connection.pragma_update(None, "cache_size", -4096)?;
    connection.pragma_update(None, "journal_size_limit", 16 * 1024 * 1024)?;
    // Statements stay prepared. Without this, some are planned anew for each value that is bound, which was a quarter of what a
    // record cost.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
    connection.set_prepared_statement_cache_capacity(32);
    Ok(())
}
