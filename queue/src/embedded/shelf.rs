//! The few ready messages that are in memory, between the storage thread that fills in and the pullers that take out.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard},
};

use tokio::sync::Semaphore;

use super::store::Turn;
use crate::Error;

/// Bodies of this many bytes at most are read ahead (a single larger message is, too).
const BYTES: usize = 1024 * 1024;

pub(super) struct Shelf {
    inner: Mutex<Inner>,
    /// One permit for each turn in `next`, and for the error: waiting for it is waiting for a message, first come, first served.
    arrivals: Semaphore,
    capacity: usize,
}

#[derive(Default)]
struct Inner {
    next: VecDeque<Turn>,
    /// Handed to one puller, once.
    error: Option<Error>,
    /// In `next`.
    messages: usize,
    /// Of the bodies in `next`.
    bytes: usize,
    /// Messages that were taken, and have not landed.
    in_flight: usize,
    /// There are ready messages on disk that are not here.
    more: bool,
    /// The storage thread was told already that there is room.
    refill_asked: bool,
    end: Option<End>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Closed,
    /// The storage thread is gone, and not because it was asked to.
    Died,
}

/// How much the shelf holds, for the storage thread.
pub(super) struct Level {
    pub in_flight: usize,
    /// It is at most half full, so that reading is worth while, and not closed.
    pub is_low: bool,
    /// So many more may be put on it.
    pub room: usize,
    pub room_bytes: usize,
}

impl Shelf {
    pub fn new(capacity: usize) -> Self {
        Self { inner: Mutex::default(), arrivals: Semaphore::new(0), capacity: capacity.max(1) }
    }

    /// Waits for a turn; cancel-safe. With it, whether the storage thread is to be told to refill. `None` after the end.
    pub async fn take(&self) -> Result<Option<(Turn, bool)>, Error> {
        let Ok(arrival) = self.arrivals.acquire().await else {
            return match self.lock().end {
                Some(End::Died) => Err(died()),
                Some(End::Closed) | None => Ok(None),
            };
        };
        arrival.forget();
        let mut inner = self.lock();
        if let Some(error) = inner.error.take() {
            return Err(error);
        }
        // Closed since the permit was given: the messages are still on disk.
        let Some(turn) = inner.next.pop_front() else { return Ok(None) };
        inner.messages -= turn.0.len();
        inner.bytes -= turn.bytes();
        inner.in_flight += turn.0.len();
        let low = inner.more && !inner.refill_asked && self.is_low(&inner);
        inner.refill_asked |= low;
        Ok(Some((turn, low)))
    }

    /// Puts turns behind those that are there. `more`: on disk there are further ones.
    pub fn add(&self, turns: Vec<Turn>, more: bool) {
        let mut inner = self.lock();
        inner.refill_asked = false;
        inner.more = more;
        if inner.end.is_some() {
            return;
        }
        self.arrivals.add_permits(turns.len());
        for turn in turns {
            inner.messages += turn.0.len();
            inner.bytes += turn.bytes();
            inner.next.push_back(turn);
        }
    }

    /// Tells one puller that the queue cannot give messages now.
    pub fn add_error(&self, error: Error) {
        let mut inner = self.lock();
        if inner.end.is_none() && inner.error.replace(error).is_none() {
            self.arrivals.add_permits(1);
        }
    }

    /// A message that was in flight is settled, or given back.
    pub fn landed(&self) {
        self.lock().in_flight -= 1;
    }

    pub fn level(&self) -> Level {
        let inner = self.lock();
        Level {
            in_flight: inner.in_flight,
            is_low: self.is_low(&inner) && inner.end.is_none(),
            room: self.capacity.saturating_sub(inner.messages),
            room_bytes: BYTES.saturating_sub(inner.bytes),
        }
    }

    #[cfg(test)]
    pub fn messages(&self) -> usize {
        self.lock().messages
    }

    pub fn is_closed(&self) -> bool {
        self.lock().end.is_some()
    }

    /// No message is handed out any more.
    pub fn close(&self) {
        self.end(End::Closed);
    }

    /// As [`Shelf::close`], and pullers are told that something broke, if it was not closed before.
    pub fn died(&self) {
        self.end(End::Died);
    }

    fn end(&self, end: End) {
        let mut inner = self.lock();
        inner.end.get_or_insert(end);
        inner.next = VecDeque::new();
        inner.messages = 0;
        inner.bytes = 0;
        self.arrivals.close();
    }

    fn is_low(&self, inner: &Inner) -> bool {
        inner.messages <= self.capacity / 2
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("nothing panics while it holds the shelf")
    }
}

/// What everybody hears once the storage thread is gone.
pub(super) fn died() -> Error {
    Error::Died
}
