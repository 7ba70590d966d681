//! What can be changed, and how a transaction changes it.

use std::collections::HashSet;

use rusqlite::{Connection, OptionalExtension as _, params};
use tokio::sync::OwnedSemaphorePermit;

use super::{
    BLOCKED, Books, KEPT, Place, READY, next_due,
    past::{self, Past},
};
use crate::{Burial, Message, Retry};

/// One call of somebody.
#[derive(Debug)]
pub(crate) enum Change {
    /// With the permit for its share of the memory that pushes may take.
    Push {
        messages: Vec<Message>,
        _room: OwnedSemaphorePermit,
    },
    Settle {
        place: Place,
        settlement: Settlement,
    },
    Replay {
        id: String,
    },
    Discard {
        id: String,
    },
    /// Nothing but a write that is synced.
    Probe,
}

#[derive(Debug)]
pub(crate) enum Settlement {
    Ack,
    Retry(Retry),
    Bury(Burial),
}

/// What a change that was made, or had nothing to be made to, tells its caller.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Done,
    /// There is no dead letter with this id.
    Nothing,
    /// A push, none of whose messages was stored, because of the one with this id.
    Duplicate(String),
}

impl Change {
    /// Whether it has to survive a power loss. If an ack or a retry does not, the message is delivered once more.
    pub fn is_synced(&self) -> bool {
        match self {
            Self::Push { .. } | Self::Replay { .. } | Self::Discard { .. } | Self::Probe => true,
            Self::Settle { settlement, .. } => match settlement {
                Settlement::Bury(_) => true,
                Settlement::Ack | Settlement::Retry(_) => false,
            },
        }
    }
}

/// A place in the line of a key.
struct InLine {
    key: String,
    state: i64,
}

/// A transaction under way.
pub(crate) struct Writing<'a> {
    pub(super) connection: &'a Connection,
    pub(super) books: Books,
    pub(super) past: Past,
    next: &'a mut i64,
}

impl<'a> Writing<'a> {
    pub(super) fn new(connection: &'a Connection, books: Books, past: Past, next: &'a mut i64) -> Self {
        Self { connection, books, past, next }
    }

    /// `now`: nanoseconds since 1970.
    pub fn apply(&mut self, change: &Change, now: i64) -> rusqlite::Result<Outcome> {
        match change {
            Change::Push { messages, .. } => self.push(messages, now),
            Change::Settle { place: Place { seq, .. }, settlement } => match settlement {
                Settlement::Ack => self.ack(*seq, now),
                Settlement::Retry(retry) => self.retry(*seq, retry, now),
                Settlement::Bury(burial) => self.bury(*seq, burial, now),
            },
            Change::Replay { id } => self.replay(id),
            Change::Discard { id } => self.discard(id),
            Change::Probe => self.touch(),
        }
    }

    /// Puts at most `limit` of those whose time has come in line.
    pub fn wake(&mut self, now: i64, limit: usize) -> rusqlite::Result<()> {
        let mut select = self
            .connection
            .prepare_cached("SELECT seq, key FROM message WHERE state = 2 AND turn <= ?1 ORDER BY turn LIMIT ?2")?;
        let due = select
            .query_map(params![now, i64::try_from(limit).unwrap_or(i64::MAX)], |row| Ok((row.get(0)?, row.get(1)?)))?
            .collect::<rusqlite::Result<Vec<(i64, String)>>>()?;
        for (seq, key) in due {
            let state = self.line_up(&key)?;
            let turn = self.take_number();
            let mut update = self.connection.prepare_cached("UPDATE message SET state = ?2, turn = ?3 WHERE seq = ?1")?;
            update.execute(params![seq, state, turn])?;
            self.books.waiting -= 1;
        }
        self.books.next_due = next_due(self.connection)?;
        Ok(())
    }

    /// The counts as they are once this is committed.
    pub(super) fn finish(self, before: &Books) -> rusqlite::Result<Books> {
        let Books { pushed, discarded, bytes, .. } = self.books;
        if (pushed, discarded, bytes) != (before.pushed, before.discarded, before.bytes) {
            let mut update = self.connection.prepare_cached("UPDATE totals SET pushed = ?1, discarded = ?2, bytes = ?3")?;
            update.execute([pushed, discarded, bytes])?;
        }
        Ok(self.books)
    }

    fn push(&mut self, messages: &[Message], now: i64) -> rusqlite::Result<Outcome> {
        let mut known = self
            .connection
            .prepare_cached("SELECT EXISTS (SELECT 1 FROM message WHERE id = ?1) OR EXISTS (SELECT 1 FROM dead WHERE id = ?1)")?;
        let mut ids = HashSet::new();
        for message in messages {
            if !ids.insert(&message.id) || known.query_row([&message.id], |row| row.get(0))? {
                return Ok(Outcome::Duplicate(message.id.clone()));
            }
        }
        for message in messages {
            let state = self.line_up(&message.key.0)?;
            let seq = self.take_number();
            let mut insert = self.connection.prepare_cached(
                "INSERT INTO message
                     (seq, id, key, state, turn, attempts, waited, pushed_at, reason, content_type, body, replay_of)
                 VALUES (?1, ?2, ?3, ?4, ?1, 0, 0, ?5, NULL, ?6, ?7, ?8)",
            )?;
            let Message { id, content_type, key, body, replay_of } = message;
            insert.execute(params![seq, id, key.0, state, now, content_type, &body[..], replay_of])?;
            self.books.pushed += 1;
            self.books.bytes += past::row_bytes(i64::try_from(body.len()).unwrap_or(i64::MAX));
        }
        Ok(Outcome::Done)
    }

    fn ack(&mut self, seq: i64, now: i64) -> rusqlite::Result<Outcome> {
        let line = self.contended(seq)?;
        if self.keep(seq, now)? || self.delete(seq)? {
            self.step_down(line)?;
        }
        Ok(Outcome::Done)
    }

    /// Leaves a settled message to the past. False if it does not belong there.
    fn keep(&mut self, seq: i64, now: i64) -> rusqlite::Result<bool> {
        if !self.past.is_kept() {
            return Ok(false);
        }
        let mut keep = self
            .connection
            .prepare_cached("UPDATE message SET state = ?2, reason = NULL WHERE seq = ?1 AND state < 3 AND replay_of IS NULL")?;
        let kept = keep.execute([seq, KEPT])? > 0;
        if kept {
            self.books.kept += 1;
            self.books.first_kept.get_or_insert(now);
        }
        Ok(kept)
    }

    /// Removes a message that is not buried. False if there is none.
    fn delete(&mut self, seq: i64) -> rusqlite::Result<bool> {
        let mut delete =
            self.connection.prepare_cached("DELETE FROM message WHERE seq = ?1 AND state < 3 RETURNING length(body)")?;
        let length = delete.query_row([seq], |row| row.get(0)).optional()?;
        self.books.bytes -= length.map_or(0, past::row_bytes);
        Ok(length.is_some())
    }

    fn retry(&mut self, seq: i64, retry: &Retry, now: i64) -> rusqlite::Result<Outcome> {
        let after = i64::try_from(retry.after.as_nanos()).unwrap_or(i64::MAX);
        let due = now.saturating_add(after);
        let (attempts, waited) = if retry.counted { (1, after) } else { (0, 0) };
        let line = self.contended(seq)?;
        let mut update = self.connection.prepare_cached(
            "UPDATE message SET state = 2, turn = ?2, attempts = attempts + ?3,
                 waited = min(waited, 9223372036854775807 - ?4) + ?4, reason = ?5 WHERE seq = ?1 AND state < 3",
        )?;
        if update.execute(params![seq, due, attempts, waited, retry.reason])? > 0 {
            self.books.waiting += 1;
            self.books.next_due = Some(self.books.next_due.map_or(due, |earlier| earlier.min(due)));
            self.step_down(line)?;
        }
        Ok(Outcome::Done)
    }

    fn bury(&mut self, seq: i64, burial: &Burial, now: i64) -> rusqlite::Result<Outcome> {
        let turn = self.take_number();
        let mut insert = self.connection.prepare_cached(
            "INSERT INTO dead (turn, seq, id, key, attempts, pushed_at, buried_at, kind, reason, content_type, body, replay_of)
             SELECT ?2, seq, id, key, attempts, pushed_at, ?3, ?4, ?5, content_type, body, replay_of
             FROM message WHERE seq = ?1 AND state < 3",
        )?;
        if insert.execute(params![seq, turn, now, burial.kind, burial.reason])? > 0 {
            self.books.dead += 1;
            self.ack(seq, now)?;
        }
        Ok(Outcome::Done)
    }

    fn replay(&mut self, id: &str) -> rusqlite::Result<Outcome> {
        let mut select = self.connection.prepare_cached("SELECT key FROM dead WHERE id = ?1")?;
        let Some(key) = select.query_row([id], |row| row.get::<_, String>(0)).optional()? else { return Ok(Outcome::Nothing) };
        let state = self.line_up(&key)?;
        let turn = self.take_number();
        // It may still be there, kept.
        let mut revive = self
            .connection
            .prepare_cached("UPDATE message SET state = ?2, turn = ?3, attempts = 0, waited = 0 WHERE id = ?1 AND state = 3")?;
        if revive.execute(params![id, state, turn])? > 0 {
            self.books.kept -= 1;
        } else {
            let mut insert = self.connection.prepare_cached(
                "INSERT INTO message
                     (seq, id, key, state, turn, attempts, waited, pushed_at, reason, content_type, body, replay_of)
                 SELECT seq, id, key, ?2, ?3, 0, 0, pushed_at, NULL, content_type, body, replay_of FROM dead WHERE id = ?1
                 RETURNING length(body)",
            )?;
            self.books.bytes += past::row_bytes(insert.query_row(params![id, state, turn], |row| row.get(0))?);
        }
        self.unearth(id)
    }

    fn discard(&mut self, id: &str) -> rusqlite::Result<Outcome> {
        let outcome = self.unearth(id)?;
        if outcome == Outcome::Done {
            self.books.discarded += 1;
        }
        Ok(outcome)
    }

    fn unearth(&mut self, id: &str) -> rusqlite::Result<Outcome> {
        if self.connection.prepare_cached("DELETE FROM dead WHERE id = ?1")?.execute([id])? == 0 {
            return Ok(Outcome::Nothing);
        }
        self.books.dead -= 1;
        Ok(Outcome::Done)
    }

    fn touch(&mut self) -> rusqlite::Result<Outcome> {
        // Something has to change, or SQLite writes nothing.
        self.connection.prepare_cached("UPDATE totals SET probed = probed + 1")?.execute([])?;
        Ok(Outcome::Done)
    }

    /// The state of a message of this key that joins the line now.
    fn line_up(&mut self, key: &str) -> rusqlite::Result<i64> {
        let mut select = self.connection.prepare_cached("SELECT EXISTS (SELECT 1 FROM message WHERE key = ?1 AND state = 0)")?;
        if select.query_row([key], |row| row.get(0))? {
            self.books.blocked += 1;
            Ok(BLOCKED)
        } else {
            self.books.ready += 1;
            Ok(READY)
        }
    }

    /// Where this message stands in the line of its key, if there may be another.
    fn contended(&self, seq: i64) -> rusqlite::Result<Option<InLine>> {
        if self.books.blocked == 0 {
            return Ok(None);
        }
        let mut select = self.connection.prepare_cached("SELECT key, state FROM message WHERE seq = ?1")?;
        select.query_row([seq], |row| Ok(InLine { key: row.get(0)?, state: row.get(1)? })).optional()
    }

    /// A message that was out has left the line. If it was the ready one, the next of its key is.
    fn step_down(&mut self, line: Option<InLine>) -> rusqlite::Result<()> {
        let Some(InLine { key, state }) = line else {
            self.books.ready -= 1;
            return Ok(());
        };
        if state == BLOCKED {
            self.books.blocked -= 1;
            return Ok(());
        }
        self.books.ready -= 1;
        let turn = self.take_number();
        let mut promote = self.connection.prepare_cached(
            "UPDATE message SET state = 0, turn = ?2
             WHERE seq = (SELECT seq FROM message WHERE key = ?1 AND state = 1 ORDER BY turn LIMIT 1)",
        )?;
        if promote.execute(params![key, turn])? > 0 {
            self.books.blocked -= 1;
            self.books.ready += 1;
        }
        Ok(())
    }

    fn take_number(&mut self) -> i64 {
        let number = *self.next;
        *self.next += 1;
        number
    }
}
