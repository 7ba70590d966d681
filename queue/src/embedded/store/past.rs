//! What is kept of the past: settled messages, until they are too old or take too much room.
//!
//! They are forgotten in small steps, each in a transaction of its own, so that nobody waits for it and nobody's push fails
//! with it. It is begun a little late, and then done for as long as there is something, so that it costs no transaction a
//! message.

use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension as _, Row, named_params};

use super::{Books, Failure, LISTED, LISTED_BYTES, Store, Writing, message, nanoseconds, timestamp};
use crate::{History, Kept};

/// Messages that are forgotten in one step, at most.
const STEP: u32 = 256;
/// Bytes of bodies, after which a step ends.
const STEP_BYTES: i64 = 512 * 1024;
/// What a row takes beside its body: key, id (twice), numbers.
const ROW: i64 = 512;
const MINUTE: i64 = 60_000_000_000;

/// What a row with a body of this length takes, about.
pub(super) fn row_bytes(body: i64) -> i64 {
    body.saturating_add(ROW)
}

/// How much of the past is kept.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Past {
    /// Nanoseconds since the push.
    pub span: i64,
    /// What all that is not buried may take before the oldest of the kept are forgotten.
    pub bytes: i64,
}

impl Past {
    pub fn is_kept(self) -> bool {
        self.span > 0 && self.bytes > 0
    }

    /// What was pushed before this is not kept.
    fn begin(self, now: i64) -> i64 {
        if self.is_kept() { now.saturating_sub(self.span) } else { i64::MAX }
    }

    /// When a first step of forgetting is due, if nothing more is pushed.
    fn overdue_at(self, books: &Books) -> Option<i64> {
        let first = books.first_kept?;
        if !self.is_kept() || books.bytes > self.bytes.saturating_add(self.bytes / 64) {
            return Some(i64::MIN);
        }
        Some(first.saturating_add(self.span).saturating_add((self.span / 64).min(MINUTE)))
    }
}

impl Store {
    /// When [`Store::forget`] has something to do.
    pub fn overdue_at(&self) -> Option<i64> {
        self.past.overdue_at(&self.books)
    }

    /// Forgets some of what is no longer to be kept. Whether there is more.
    pub fn forget(&mut self, now: i64) -> Result<bool, Failure> {
        self.write(false, |writing| writing.forget(now))
    }

    /// As [`crate::Queue::history`].
    pub fn history(
        &self,
        now: i64,
        (from, until): (Timestamp, Timestamp),
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<Kept>, Failure> {
        // Both halves come in order from their index, so that a page costs what it holds.
        const PAGE: &str = "
            SELECT id, content_type, key, body, replay_of, pushed_at, seq FROM message
             WHERE state = 3 AND pushed_at >= :from AND pushed_at < :until AND (pushed_at, seq) > (:time, :seq)
               AND replay_of IS NULL
            UNION ALL
            SELECT id, content_type, key, body, replay_of, pushed_at, seq FROM message
             WHERE state < 3 AND pushed_at >= :from AND pushed_at < :until AND (pushed_at, seq) > (:time, :seq)
               AND replay_of IS NULL
            ORDER BY pushed_at, seq";
        let (time, seq) = after.and_then(read_cursor).unwrap_or((i64::MIN, 0));
        let from = nanoseconds(from).max(self.past.begin(now)).max(time);
        let read = || {
            let mut select = self.connection.prepare_cached(PAGE)?;
            let mut rows =
                select.query(named_params! { ":from": from, ":until": nanoseconds(until), ":time": time, ":seq": seq })?;
            let mut page = Vec::new();
            let mut bytes = 0;
            while page.len() < limit.min(LISTED)
                && bytes < LISTED_BYTES
                && let Some(row) = rows.next()?
            {
                let kept = kept(row)?;
                bytes += kept.message.body.len();
                page.push(kept);
            }
            Ok(page)
        };
        read().map_err(|error| Failure::new(&self.path, error))
    }

    /// How far back [`Store::history`] reaches.
    pub fn reach(&self, now: i64) -> Result<Option<History>, Failure> {
        if !self.past.is_kept() {
            return Ok(None);
        }
        let read = || {
            let mut select = self.connection.prepare_cached(
                "SELECT min(pushed_at) FROM (
                     SELECT min(pushed_at) AS pushed_at FROM message WHERE state = 3 AND pushed_at >= ?1
                     UNION ALL SELECT min(pushed_at) FROM message WHERE state < 3 AND pushed_at >= ?1)",
            )?;
            let oldest: Option<i64> = select.query_row([self.past.begin(now)], |row| row.get(0))?;
            let Books { kept, ready, blocked, waiting, .. } = self.books;
            let messages = (kept + ready + blocked + waiting).unsigned_abs();
            Ok(Some(History { oldest: oldest.map(timestamp), messages }))
        };
        read().map_err(|error| Failure::new(&self.path, error))
    }
}

impl Writing<'_> {
    fn forget(&mut self, now: i64) -> rusqlite::Result<bool> {
        let begin = self.past.begin(now);
        let mut oldest = self
            .connection
            .prepare_cached("SELECT seq, pushed_at, length(body) FROM message WHERE state = 3 ORDER BY pushed_at LIMIT ?1")?;
        let found = oldest.query_map([STEP], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
        let found = found.collect::<rusqlite::Result<Vec<(i64, i64, i64)>>>()?;
        let mut delete = self.connection.prepare_cached("DELETE FROM message WHERE seq = ?1")?;
        let (mut bytes, mut is_done) = (0, found.len() < STEP as usize);
        for (seq, pushed_at, length) in found {
            if pushed_at >= begin && self.books.bytes <= self.past.bytes {
                is_done = true;
                break;
            }
            if bytes >= STEP_BYTES {
                is_done = false;
                break;
            }
            delete.execute([seq])?;
            self.books.kept -= 1;
            self.books.bytes -= row_bytes(length);
            bytes += length;
        }
        self.books.first_kept = first_kept(self.connection)?;
        Ok(!is_done)
    }
}

pub(super) fn first_kept(connection: &Connection) -> rusqlite::Result<Option<i64>> {
    let mut select = connection.prepare_cached("SELECT pushed_at FROM message WHERE state = 3 ORDER BY pushed_at LIMIT 1")?;
    select.query_row([], |row| row.get(0)).optional()
}

fn kept(row: &Row<'_>) -> rusqlite::Result<Kept> {
    let (time, seq): (i64, i64) = (row.get(5)?, row.get(6)?);
    Ok(Kept { cursor: format!("{time}.{seq}"), message: message(row, 0)?, pushed_at: timestamp(time) })
}

/// The time of a push, and its number among those of that time.
fn read_cursor(cursor: &str) -> Option<(i64, i64)> {
    let (time, seq) = cursor.split_once('.')?;
    Some((time.parse().ok()?, seq.parse().ok()?))
}
