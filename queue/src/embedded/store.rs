//! The SQL: what is on disk, and how each change of it is made.
//!
//! A message is `READY` (it is in line, or in somebody's hands), `BLOCKED` (behind a ready one of its key), `WAITING` (for
//! its time) or `KEPT` (settled, and there for those who ask for the past). At most one message of a key is ready: an index
//! holds that, so nobody has to look for keys when pulling. The blocked ones behind it may be handed out with it: they stay
//! blocked, and which they are is known to memory alone. Buried ones are in a table of their own, and kept beside that.

mod past;
mod writing;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use jiff::Timestamp;
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension as _, Row, ToSql, ffi};

pub(super) use self::{
    past::Past,
    writing::{Change, Outcome, Settlement, Writing},
};
use super::folder::{unreadable, wrong_version};
use crate::{Burial, DeadLetter, Error, Message, PartitionKey};

/// `PRAGMA application_id`: "csgQ".
pub(super) const APPLICATION: i32 = 0x6373_6751;
/// `PRAGMA user_version`: raised with every change of [`SCHEMA`].
pub(super) const VERSION: i32 = 2;

const READY: i64 = 0;
const BLOCKED: i64 = 1;
const KEPT: i64 = 3;

/// Times are nanoseconds since 1970, spans nanoseconds. States are the numbers above, and 2 for waiting. That a message is kept
/// costs its push nothing: it is stored once, and its ack changes the state of the row instead of deleting it.
const SCHEMA: &str = "
    CREATE TABLE message (
        seq          INTEGER PRIMARY KEY, -- the order of pushes; never used twice while somebody may know it
        id           TEXT    NOT NULL UNIQUE,
        key          TEXT    NOT NULL,
        state        INTEGER NOT NULL,
        turn         INTEGER NOT NULL,    -- ready, blocked: the place in line; waiting: when it is due
        attempts     INTEGER NOT NULL,
        waited       INTEGER NOT NULL,
        pushed_at    INTEGER NOT NULL,
        reason       TEXT,                -- of the last retry
        content_type TEXT    NOT NULL,
        body         BLOB    NOT NULL,
        replay_of    TEXT
    ) STRICT;
    CREATE INDEX        message_ready   ON message (turn)      WHERE state = 0;
    CREATE UNIQUE INDEX message_active  ON message (key)       WHERE state = 0;
    CREATE INDEX        message_blocked ON message (key, turn) WHERE state = 1;
    CREATE INDEX        message_waiting ON message (turn)      WHERE state = 2;
    CREATE INDEX        message_live    ON message (pushed_at) WHERE state < 3;
    CREATE INDEX        message_kept    ON message (pushed_at) WHERE state = 3;
    CREATE TABLE dead (
        turn         INTEGER PRIMARY KEY, -- the order of burials
        seq          INTEGER NOT NULL,
        id           TEXT    NOT NULL UNIQUE,
        key          TEXT    NOT NULL,
        attempts     INTEGER NOT NULL,
        pushed_at    INTEGER NOT NULL,
        buried_at    INTEGER NOT NULL,
        kind         TEXT    NOT NULL,
        reason       TEXT    NOT NULL,
        content_type TEXT    NOT NULL,
        body         BLOB    NOT NULL,
        replay_of    TEXT
    ) STRICT;
    CREATE TABLE totals (
        one       INTEGER PRIMARY KEY CHECK (one = 1),
        pushed    INTEGER NOT NULL,
        discarded INTEGER NOT NULL,
        probed    INTEGER NOT NULL,
        bytes     INTEGER NOT NULL DEFAULT 0 -- that the rows of message take, about
    ) STRICT;
    INSERT INTO totals VALUES (1, 0, 0, 0, 0);
";

/// From version 1, which kept nothing of the past.
const UPGRADE: &str = "
    ALTER TABLE message ADD COLUMN replay_of TEXT;
    ALTER TABLE dead    ADD COLUMN replay_of TEXT;
    ALTER TABLE totals  ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0;
    UPDATE totals SET bytes = (SELECT coalesce(sum(length(body) + 512), 0) FROM message);
    CREATE INDEX message_live ON message (pushed_at) WHERE state < 3;
    CREATE INDEX message_kept ON message (pushed_at) WHERE state = 3;
";

/// Pages (4 KiB) in the log at which it is written back to the file. Each time costs three syncs.
const CHECKPOINT_PAGES: i64 = 2000;
/// The log is cut to this many bytes if a burst made it longer.
const LOG_BYTES: i64 = 32 * 1024 * 1024;
/// What is listed at once stays below this many bytes of bodies, after the first.
const LISTED_BYTES: usize = 8 * 1024 * 1024;
const LISTED: usize = 1000;

/// A message in line as it is on disk.
pub(super) struct Stored {
    pub seq: i64,
    pub turn: i64,
    pub message: Message,
    pub pushed_at: Timestamp,
    pub attempts: u32,
    pub waited: Duration,
}

/// A ready message, and behind it those of its key that are handed out with it.
pub(super) struct Turn(pub Vec<Stored>);

impl Turn {
    /// Its first message: no other turn has the same while this one is out.
    pub fn number(&self) -> i64 {
        self.0[0].seq
    }

    /// Of the bodies.
    pub fn bytes(&self) -> usize {
        self.0.iter().map(|stored| stored.message.body.len()).sum()
    }
}

/// One message of a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub turn: i64,
    pub seq: i64,
}

/// The counts, kept beside the file so that nobody has to count it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Books {
    pub pushed: i64,
    pub discarded: i64,
    /// Includes what is in flight.
    pub ready: i64,
    pub blocked: i64,
    pub waiting: i64,
    pub dead: i64,
    /// When the first of the waiting is due.
    pub next_due: Option<i64>,
    /// Settled ones that are there for those who ask for the past.
    pub kept: i64,
    /// When the first of the kept was pushed, or not long after that.
    pub first_kept: Option<i64>,
    /// What all rows but the buried take, about.
    pub bytes: i64,
}

/// The open database. Everything in it blocks.
pub(super) struct Store {
    connection: Connection,
    path: PathBuf,
    books: Books,
    past: Past,
    /// Greater than every `seq` and every place in line.
    next: i64,
    /// So many pages in the log that are not in the file are enough to write them back.
    tidy_at: i64,
    /// `PRAGMA synchronous` as it is set.
    synced: bool,
    /// A sync failed: what the kernel has dropped of the log since the last one that succeeded is not known.
    suspect: bool,
}

/// Makes an empty queue of this (empty) file.
pub(super) fn create(path: &Path) -> rusqlite::Result<()> {
    let connection = open(path)?;
    connection.execute_batch(&format!(
        "BEGIN; PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {VERSION}; {SCHEMA} COMMIT;"
    ))?;
    connection.close().map_err(|(_, error)| error)
}

impl Store {
    /// Opens a queue whose header has been looked at, and counts what is in it. One of an earlier version is brought up to this
    /// one, in one transaction.
    pub fn open(path: &Path, past: Past) -> Result<Self, Error> {
        let trouble = |error: rusqlite::Error| match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
                Error::InUse { path: path.display().to_string(), holder: None }
            }
            Some(ErrorCode::DiskFull | ErrorCode::SystemIoFailure) => Failure::new(path, error).error(),
            _ => unreadable(path, "the database does not open", Some(error.into())),
        };
        let connection = open(path).map_err(trouble)?;
        let version = connection.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(trouble)?;
        if !(1..=VERSION).contains(&version) {
            return Err(wrong_version(path, version));
        }
        let mode: String = connection.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0)).map_err(trouble)?;
        if mode != "wal" {
            return Err(unreadable(path, "SQLite refuses to keep a write-ahead log for it", None));
        }
        let (books, next) = connection
            .execute_batch(&format!(
                "PRAGMA wal_autocheckpoint = 0; PRAGMA journal_size_limit = {LOG_BYTES}; PRAGMA synchronous = FULL;
                 PRAGMA cache_size = -2048; PRAGMA temp_store = MEMORY;"
            ))
            .and_then(|()| if version < VERSION { upgrade(&connection) } else { Ok(()) })
            .and_then(|()| Ok((count(&connection)?, next(&connection)?)))
            .map_err(trouble)?;
        connection.set_prepared_statement_cache_capacity(64);
        let path = path.to_path_buf();
        Ok(Self { connection, path, books, past, next, tidy_at: CHECKPOINT_PAGES, synced: true, suspect: false })
    }

    pub fn books(&self) -> &Books {
        &self.books
    }

    /// Does the work in one transaction. When it returns it survives a kill of this process, and with `synced` a power loss.
    /// If it fails, nothing was changed.
    pub fn write<T>(&mut self, synced: bool, work: impl Fn(&mut Writing<'_>) -> rusqlite::Result<T>) -> Result<T, Failure> {
        let mut done = self.try_write(synced, &work);
        // A log that is written back gives its room to the next transaction. The file itself needs room for new pages only.
        if done.as_ref().is_err_and(|error| error.sqlite_error_code() == Some(ErrorCode::DiskFull))
            && self.checkpoint("NOOP").is_ok_and(|(in_log, _)| in_log > 0)
            && self.checkpoint("TRUNCATE").is_ok()
        {
            done = self.try_write(synced, &work);
        }
        done.map_err(|error| Failure::new(&self.path, error))
    }

    fn try_write<T>(&mut self, synced: bool, work: impl Fn(&mut Writing<'_>) -> rusqlite::Result<T>) -> rusqlite::Result<T> {
        let done = self.transact(synced, work).inspect_err(|error| self.suspect |= is_failed_sync(error));
        if done.is_err()
            && !self.connection.is_autocommit()
            && let Err(error) = self.connection.execute_batch("ROLLBACK")
        {
            tracing::error!(error = &error as &dyn std::error::Error, "a failed transaction could not be rolled back");
        }
        done
    }

    fn transact<T>(&mut self, synced: bool, work: impl FnOnce(&mut Writing<'_>) -> rusqlite::Result<T>) -> rusqlite::Result<T> {
        if self.suspect {
            // The kernel reports a failed sync once and then forgets the pages. So nothing is put behind them: the log is
            // written back to the file whole, and begun anew.
            self.checkpoint("TRUNCATE")?;
            self.suspect = false;
        }
        if self.synced != synced {
            self.connection.execute_batch(if synced { "PRAGMA synchronous = FULL" } else { "PRAGMA synchronous = NORMAL" })?;
            self.synced = synced;
        }
        self.connection.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
        let mut writing = Writing::new(&self.connection, self.books, self.past, &mut self.next);
        let done = work(&mut writing)?;
        let books = writing.finish(&self.books)?;
        self.connection.prepare_cached("COMMIT")?.execute([])?;
        self.books = books;
        Ok(done)
    }

    /// Writes the log back to the file if it has grown long. If it fails, nothing is lost: the log goes on growing, and later
    /// calls try again.
    pub fn tidy(&mut self) -> Result<(), Failure> {
        let mut tidy = || {
            let (in_log, written_back) = self.checkpoint("NOOP")?;
            if in_log - written_back < self.tidy_at {
                return Ok(());
            }
            self.tidy_at = in_log - written_back + CHECKPOINT_PAGES / 4;
            self.checkpoint("PASSIVE")?;
            self.tidy_at = CHECKPOINT_PAGES;
            Ok(())
        };
        tidy().map_err(|error| Failure::new(&self.path, error))
    }

    /// Ready messages in line behind this turn, for as long as `take` says so.
    pub fn ready_after(&self, turn: i64, take: impl FnMut(Stored) -> bool) -> Result<(), Failure> {
        self.each("state = 0 AND turn > ?1 ORDER BY turn", turn, take)
    }

    /// Those that wait behind the ready message of this key, for as long as `take` says so.
    pub fn behind(&self, key: &PartitionKey, take: impl FnMut(Stored) -> bool) -> Result<(), Failure> {
        if self.books.blocked == 0 {
            return Ok(());
        }
        self.each("state = 1 AND key = ?1 ORDER BY turn", &key.0, take)
    }

    /// The message itself, if it is ready.
    pub fn ready(&self, seq: i64) -> Result<Option<Stored>, Failure> {
        let mut found = None;
        self.each("state = 0 AND seq = ?1", seq, |stored| {
            found = Some(stored);
            false
        })?;
        Ok(found)
    }

    fn each(&self, which: &str, parameter: impl ToSql, mut take: impl FnMut(Stored) -> bool) -> Result<(), Failure> {
        let mut read = || {
            let mut select = self.connection.prepare_cached(&format!(
                "SELECT seq, turn, id, content_type, key, body, replay_of, pushed_at, attempts, waited FROM message WHERE {which}"
            ))?;
            let mut rows = select.query([&parameter])?;
            while let Some(row) = rows.next()? {
                if !take(stored(row)?) {
                    break;
                }
            }
            Ok(())
        };
        read().map_err(|error| Failure::new(&self.path, error))
    }

    /// When the message that was pushed first, of those not settled, was pushed.
    pub fn oldest(&self) -> Result<Option<Timestamp>, Failure> {
        let read = || {
            let mut select =
                self.connection.prepare_cached("SELECT pushed_at FROM message WHERE state < 3 ORDER BY pushed_at LIMIT 1")?;
            select.query_row([], |row| Ok(timestamp(row.get(0)?))).optional()
        };
        read().map_err(|error| Failure::new(&self.path, error))
    }

    /// As [`crate::Queue::dead_letters`].
    pub fn dead_letters(&self, after: Option<&str>, limit: usize) -> Result<Vec<DeadLetter>, Failure> {
        let read = || {
            let mut select = self.connection.prepare_cached(
                "SELECT id, content_type, key, body, replay_of, kind, reason, pushed_at, buried_at, attempts FROM dead
                 WHERE turn > coalesce((SELECT turn FROM dead WHERE id = ?1), 0) ORDER BY turn",
            )?;
            let mut rows = select.query([after])?;
            let mut letters = Vec::new();
            let mut bytes = 0;
            while letters.len() < limit.min(LISTED)
                && bytes < LISTED_BYTES
                && let Some(row) = rows.next()?
            {
                let letter = dead_letter(row)?;
                bytes += letter.message.body.len();
                letters.push(letter);
            }
            Ok(letters)
        };
        read().map_err(|error| Failure::new(&self.path, error))
    }

    /// Pages in the log, and how many of those are in the file.
    fn checkpoint(&mut self, mode: &str) -> rusqlite::Result<(i64, i64)> {
        let done = self
            .connection
            .prepare_cached(&format!("PRAGMA wal_checkpoint({mode})"))
            .and_then(|mut checkpoint| checkpoint.query_row([], |row| Ok((row.get(1)?, row.get(2)?))));
        done.inspect_err(|error| self.suspect |= is_failed_sync(error))
    }
}

fn is_failed_sync(error: &rusqlite::Error) -> bool {
    let code = error.sqlite_error().map(|error| error.extended_code);
    matches!(code, Some(ffi::SQLITE_IOERR_FSYNC | ffi::SQLITE_IOERR_DIR_FSYNC))
}

/// Why the database did not do something; for as many callers as waited for it.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    what: String,
    source: Arc<rusqlite::Error>,
}

impl Failure {
    fn new(path: &Path, error: rusqlite::Error) -> Self {
        let path = path.display();
        let what = match error.sqlite_error_code() {
            Some(ErrorCode::DiskFull) => format!("the disk of {path} is full: make room there"),
            Some(ErrorCode::SystemIoFailure) => format!("the disk of {path} fails: see the kernel's log"),
            _ => format!("{path} could not be read or written"),
        };
        Self { what, source: Arc::new(error) }
    }

    pub fn error(&self) -> Error {
        Error::Unavailable { what: self.what.clone(), source: Some(Box::new(Arc::clone(&self.source))) }
    }
}

fn open(path: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    // Our lock file keeps out our own kind only. This keeps out everybody, and spares the shared-memory file.
    connection.execute_batch("PRAGMA locking_mode = EXCLUSIVE; PRAGMA busy_timeout = 0")?;
    Ok(connection)
}

/// The counts, from the rows themselves.
fn count(connection: &Connection) -> rusqlite::Result<Books> {
    let one = |sql: &str| connection.query_row(sql, [], |row| row.get(0));
    Ok(Books {
        pushed: one("SELECT pushed FROM totals")?,
        discarded: one("SELECT discarded FROM totals")?,
        ready: one("SELECT count(*) FROM message INDEXED BY message_ready WHERE state = 0")?,
        blocked: one("SELECT count(*) FROM message INDEXED BY message_blocked WHERE state = 1")?,
        waiting: one("SELECT count(*) FROM message INDEXED BY message_waiting WHERE state = 2")?,
        dead: one("SELECT count(*) FROM dead")?,
        next_due: next_due(connection)?,
        kept: one("SELECT count(*) FROM message INDEXED BY message_kept WHERE state = 3")?,
        first_kept: past::first_kept(connection)?,
        bytes: one("SELECT bytes FROM totals")?,
    })
}

fn upgrade(connection: &Connection) -> rusqlite::Result<()> {
    // One that fails is rolled back by the connection's end.
    connection.execute_batch(&format!("BEGIN IMMEDIATE; {UPGRADE} PRAGMA user_version = {VERSION}; COMMIT;"))
}

fn next(connection: &Connection) -> rusqlite::Result<i64> {
    connection.query_row(
        "SELECT 1 + max(
            coalesce((SELECT max(seq) FROM message), 0),
            coalesce((SELECT max(turn) FROM message INDEXED BY message_ready WHERE state = 0), 0),
            coalesce((SELECT max(turn) FROM message WHERE state = 1), 0),
            coalesce((SELECT max(turn) FROM dead), 0),
            coalesce((SELECT max(seq) FROM dead), 0))",
        [],
        |row| row.get(0),
    )
}

fn next_due(connection: &Connection) -> rusqlite::Result<Option<i64>> {
    connection.prepare_cached("SELECT min(turn) FROM message WHERE state = 2")?.query_row([], |row| row.get(0))
}

fn stored(row: &Row<'_>) -> rusqlite::Result<Stored> {
    Ok(Stored {
        seq: row.get(0)?,
        turn: row.get(1)?,
        message: message(row, 2)?,
        pushed_at: timestamp(row.get(7)?),
        attempts: row.get(8)?,
        waited: Duration::from_nanos(row.get::<_, i64>(9)?.unsigned_abs()),
    })
}

fn dead_letter(row: &Row<'_>) -> rusqlite::Result<DeadLetter> {
    Ok(DeadLetter {
        message: message(row, 0)?,
        burial: Burial { kind: row.get(5)?, reason: row.get(6)? },
        pushed_at: timestamp(row.get(7)?),
        buried_at: timestamp(row.get(8)?),
        attempts: row.get(9)?,
    })
}

/// From five columns, beginning with this one.
fn message(row: &Row<'_>, first: usize) -> rusqlite::Result<Message> {
    Ok(Message {
        id: row.get(first)?,
        content_type: row.get(first + 1)?,
        key: PartitionKey(row.get(first + 2)?),
        body: Bytes::from(row.get::<_, Vec<u8>>(first + 3)?),
        replay_of: row.get(first + 4)?,
    })
}

fn timestamp(nanoseconds: i64) -> Timestamp {
    Timestamp::from_nanosecond(nanoseconds.into()).expect("any i64 of nanoseconds is within a timestamp's range")
}

/// Nanoseconds since 1970, for the next 230 years.
pub(super) fn nanoseconds(time: Timestamp) -> i64 {
    let nanoseconds = time.as_nanosecond();
    i64::try_from(nanoseconds).unwrap_or(if nanoseconds < 0 { i64::MIN } else { i64::MAX })
}
