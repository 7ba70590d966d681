//! A durable queue: bytes in, deliveries out.
//!
//! It does not know what the bytes mean. What it promises, whichever backend keeps it:
//!
//! - [`Queue::push`] returns once the message would survive a crash of this process and of the machine.
//! - A message is delivered until it is settled: at least once, and again after a crash, a dropped [`Delivery`] or a retry.
//! - Messages of equal [`PartitionKey`] are in one hand at a time: one of them, or several that are pulled together. Their order
//!   is not promised.
//! - A buried message (a dead letter) stays until it is replayed or discarded; listing loses none.
//! - What was pushed is kept for a while, whatever became of it, so that it can be run again ([`Queue::history`]).
//!
//! `tests/contract.rs` holds every backend to this.

pub mod amqp;
mod delivery;
mod embedded;

use std::{fmt, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;

pub use amqp::Amqp;
pub use delivery::{Delivery, Settle};
pub use embedded::{Embedded, Options};

/// So many messages of one key at most are delivered together.
pub const MOST_TOGETHER: usize = 32;

/// What is kept: opaque bytes, and how to address and read them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Unique among all messages ever pushed: the caller makes it (a UUID). Dead letters are addressed by it.
    pub id: String,
    /// What the body is, as a media type. Not looked at.
    pub content_type: String,
    /// Messages of equal keys are never in two hands at once.
    pub key: PartitionKey,
    pub body: Bytes,
    /// The id of the message that this one runs again; `None` for what comes in for the first time. A message that is run
    /// again has an id of its own, so that it is counted as any other.
    pub replay_of: Option<String>,
}

/// What must not be handled twice at once.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PartitionKey(pub String);

/// Why a message was buried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Burial {
    /// A word that can be filtered by: `denied`, `gave_up`, `poison`.
    pub kind: String,
    /// A sentence or more for the administrator: what happened and what to do.
    pub reason: String,
}

/// A buried message as it is listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadLetter {
    pub message: Message,
    pub burial: Burial,
    /// When it was pushed first.
    pub pushed_at: Timestamp,
    pub buried_at: Timestamp,
    /// Deliveries that were counted before it was buried.
    pub attempts: u32,
}

/// A message of the past as it is listed: what became of it is not said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Where it stands in the backend's history: the next page begins after it. Not to be looked into.
    pub cursor: String,
    pub message: Message,
    pub pushed_at: Timestamp,
}

/// How to hand a message back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retry {
    /// Not delivered again before this much time has passed.
    pub after: Duration,
    /// Whether this try and the wait use up the message's patience ([`Delivery::attempts`], [`Delivery::waited`]). Being
    /// asked to slow down does not.
    pub counted: bool,
    /// Why, for whoever looks at the queue.
    pub reason: String,
}

/// What is in the queue now, and what ever came in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Messages ever pushed into this queue: durable, survives restarts.
    pub pushed_total: u64,
    /// Dead letters ever discarded: durable.
    pub discarded_total: u64,
    /// Could be delivered now (those behind an equal key included).
    pub ready: u64,
    /// Handed back, and not due yet.
    pub waiting: u64,
    /// In somebody's hands, unsettled.
    pub in_flight: u64,
    /// Buried.
    pub dead: u64,
    /// When the oldest message that is neither settled nor buried was pushed; on a broker the oldest that a replica knows of.
    /// If none knows any, because nobody consumes or all have been started since, the oldest was pushed then or before. Copies
    /// that a crash has left, and a past that lost its end with the power, may make it look older.
    pub oldest: Option<Timestamp>,
    /// How far back [`Queue::history`] reaches; `None` if this queue was told to keep nothing.
    pub history: Option<History>,
    /// The same by partition, where the backend has several.
    pub partitions: Vec<Partition>,
}

/// What is kept of the past.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History {
    /// When the oldest message that is kept was pushed.
    pub oldest: Option<Timestamp>,
    /// How many are kept, as exactly as the backend knows. Those that are still queued are among them.
    pub messages: u64,
}

/// What is in one partition.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Partition {
    pub name: String,
    /// The replica that its messages come to. Until the first one has, the one whose share it is; for some seconds nobody.
    pub holder: Option<String>,
    pub ready: u64,
    pub in_flight: u64,
    /// When the oldest message that its holder has was pushed.
    pub oldest: Option<Timestamp>,
}

impl Stats {
    /// Everything that will still be handled.
    #[must_use]
    pub fn queued(&self) -> u64 {
        self.ready + self.waiting + self.in_flight
    }
}

/// Why the queue did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing was lost, nothing was accepted: full disk, broker gone. May pass.
    #[error("the queue cannot take or give messages now: {what}")]
    Unavailable {
        what: String,
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// Another process has the queue open.
    #[error("{path} is in use by another process{}", holder.map(|pid| format!(" (pid {pid})")).unwrap_or_default())]
    InUse { path: String, holder: Option<u32> },
    /// The store cannot be read as a queue of this version, and was left as it is.
    #[error("{path} cannot be opened as a queue: {what}")]
    Unreadable {
        path: String,
        what: String,
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// Something on the broker is not as we declare it, and was left as it is. Nothing works until an administrator has decided.
    #[error(
        "the {kind} {name} is on the broker already with {}: move its messages away and delete it, or give this queue \
         another prefix",
        argument.as_ref().map_or_else(|| "other arguments".to_owned(), |argument| format!("another `{argument}`"))
    )]
    Mismatch {
        /// `queue` or `exchange`.
        kind: &'static str,
        name: String,
        /// The argument that is another, if the broker said which.
        argument: Option<String>,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A message with this id is in the queue already, or kept of the past: it was not pushed again.
    #[error("a message with id {0} is in the queue already, or was not long ago")]
    Duplicate(String),
    /// It cannot go on, and will not until it is opened again: what is durable is safe.
    #[error("the queue's storage thread ended early; restart the daemon")]
    Died,
    /// Closed by us.
    #[error("the queue is closed")]
    Closed,
}

/// A backend.
#[async_trait]
pub trait Queue: Send + Sync + fmt::Debug {
    /// Returns once all the messages would survive a crash. After an error none of them may be relied on: a backend on one disk
    /// keeps all or none, one with a broker may have kept some, and the caller pushes them again.
    async fn push(&self, messages: Vec<Message>) -> Result<(), Error>;

    /// Waits for the next delivery; cancel-safe. `None` after [`Queue::close`].
    async fn pull(&self) -> Result<Option<Delivery>, Error> {
        let mut together = self.pull_together().await?;
        // What waits behind the first goes back, and the last of it first, so that it keeps its order.
        while together.len() > 1 {
            together.pop();
        }
        Ok(together.pop())
    }

    /// As [`Queue::pull`], and with the next delivery those that wait behind it because they have its key: at most
    /// [`MOST_TOGETHER`], and fewer if the backend has no more at hand. Empty after [`Queue::close`].
    ///
    /// They are in one hand: each is settled on its own, they are lost together ([`Delivery::lost`]), and the next of their key
    /// (one of these that was dropped, too) comes when none of them is in hand any more.
    async fn pull_together(&self) -> Result<Vec<Delivery>, Error>;

    async fn stats(&self) -> Result<Stats, Error>;

    /// Dead letters, oldest burial first (from a busy broker only as a rule), at most `limit` (a backend may give fewer; only an
    /// empty list is the end), beginning
    /// after the one with id `after`; from the start if that is no dead letter any more, so that paging while others replay and
    /// discard may repeat, but loses none.
    async fn dead_letters(&self, after: Option<&str>, limit: usize) -> Result<Vec<DeadLetter>, Error>;

    /// Puts a dead letter back, with its patience renewed. False if there is none with this id.
    async fn replay(&self, id: &str) -> Result<bool, Error>;

    /// Drops a dead letter for good. False if there is none with this id.
    async fn discard(&self, id: &str) -> Result<bool, Error>;

    /// What was pushed from `from` on and before `until`, whatever became of it, oldest first: at most `limit` (a
    /// backend may give fewer; only an empty list is the end), beginning after the message whose [`Kept::cursor`] is `after`,
    /// whether that one is still kept or not. A cursor that this queue never gave is as none.
    ///
    /// Left out are messages that are themselves run again ([`Message::replay_of`]), and those that are no longer kept: each
    /// backend is told how long, and may be told to keep none. To run one again is to push it under a new id.
    async fn history(&self, from: Timestamp, until: Timestamp, after: Option<&str>, limit: usize) -> Result<Vec<Kept>, Error>;

    /// Whether a push would be taken now, found out by writing something. For readiness checks.
    async fn probe(&self) -> Result<(), Error> {
        self.stats().await.map(drop)
    }

    /// Stops deliveries: pending and later [`Queue::pull`]s give `None`. What is in hand can still be settled; pushes fail.
    async fn close(&self);
}
