//! The queue on this machine's own disk: one SQLite file in one folder, for one process at a time.
//!
//! One thread owns the file. It takes every command that waits for it, does them in one transaction, and answers: so that
//! many pushes share one sync. Ready messages are read ahead a little; whatever is behind those is on disk only, so that
//! memory does not grow with the backlog. Who holds which message is known to memory alone: after a crash everything
//! unsettled is delivered again.
//!
//! What is settled stays for a while, for those who ask for the past.
//!
//! When the disk is full (or fails), pushes are refused with [`Error::Unavailable`]. What cannot be settled then is kept in
//! memory, told to the caller with the same error, and written as soon as the disk takes it; until then nothing further is
//! read ahead, so memory stays bounded and nothing handled is handed out twice.

mod folder;
mod shelf;
mod store;
mod thread;

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use jiff::Timestamp;
use tokio::sync::Semaphore;

use self::{
    folder::Folder,
    shelf::Shelf,
    store::{Change, Past, Place, Settlement, Store, Stored},
    thread::{Command, StorageThread},
};
use crate::{Burial, DeadLetter, Delivery, Error, Kept, Message, Queue, Retry, Settle, Stats};

/// Bytes of pushes that may wait for the storage thread; further pushes wait outside. Bounds memory when the disk hangs.
const WAITING_BYTES: u32 = 8 * 1024 * 1024;
/// What a message costs beyond its body while it waits to be written.
const MESSAGE_OVERHEAD: usize = 512;

const WEEK: Duration = Duration::from_secs(7 * 24 * 3600);

/// How an [`Embedded`] queue is to run.
#[derive(Clone)]
pub struct Options {
    /// What time it is: stamps pushes and burials, and says when a retry is due.
    pub now: Arc<dyn Fn() -> Timestamp + Send + Sync>,
    /// At most so many ready messages are held in memory (at least 1, and never more than 1 MiB of bodies).
    pub read_ahead: usize,
    /// How long after its push a message is kept, whatever became of it ([`Queue::history`]). Zero keeps none.
    pub history: Duration,
    /// Bytes that the queue may take, dead letters aside, before the oldest of what is kept is forgotten early. What is queued
    /// counts, and is never forgotten. Zero keeps none.
    pub history_bytes: u64,
}

impl Options {
    /// The defaults, with the given source of time: a week of the past is kept, and at most 1 GiB.
    #[must_use]
    pub fn new(now: impl Fn() -> Timestamp + Send + Sync + 'static) -> Self {
        Self { now: Arc::new(now), read_ahead: 256, history: WEEK, history_bytes: 1 << 30 }
    }
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options")
            .field("now", &(self.now)())
            .field("read_ahead", &self.read_ahead)
            .field("history", &self.history)
            .field("history_bytes", &self.history_bytes)
            .finish()
    }
}

/// The queue in a folder.
///
/// Dropping it and every [`Delivery`] of it ends the storage thread and frees the folder; if no delivery is left, the drop
/// waits for that (milliseconds).
pub struct Embedded {
    folder: PathBuf,
    shelf: Arc<Shelf>,
    /// Bytes that pushes may still send to the storage thread.
    room: Arc<Semaphore>,
    /// Always there until dropped.
    thread: Option<Arc<StorageThread>>,
}

impl Embedded {
    /// Opens the queue in this folder, and makes both (the folder 0700, the files 0600) if they are not there.
    ///
    /// A queue of an earlier version is brought up to this one.
    ///
    /// Blocks for as long as recovering the last transactions takes, and counting the messages (0.1 s for a million).
    ///
    /// [`Error::InUse`]: another process has it, whose pid is named. [`Error::Unreadable`]: the file is no queue, or one of a
    /// newer version; it was not touched. [`Error::Unavailable`]: the folder cannot be made or written.
    pub fn open(folder: &Path, options: Options) -> Result<Self, Error> {
        let path = folder.to_path_buf();
        let folder = Folder::lock(folder)?;
        let past = Past {
            span: i64::try_from(options.history.as_nanos()).unwrap_or(i64::MAX),
            bytes: i64::try_from(options.history_bytes).unwrap_or(i64::MAX),
        };
        let store = Store::open(&folder.database()?, past)?;
        let shelf = Arc::new(Shelf::new(options.read_ahead));
        let thread = StorageThread::start(folder, store, Arc::clone(&shelf), options.now)?;
        Ok(Self { folder: path, shelf, room: Arc::new(Semaphore::new(WAITING_BYTES as usize)), thread: Some(Arc::new(thread)) })
    }

    fn thread(&self) -> &Arc<StorageThread> {
        self.thread.as_ref().expect("taken by drop only")
    }

    fn deliver(&self, turn: i64, stored: Stored) -> Delivery {
        let hand = Hand { place: Place { turn, seq: stored.seq }, thread: Arc::clone(self.thread()) };
        Delivery::new(stored.message, stored.pushed_at, stored.attempts, stored.waited, Box::new(hand))
    }
}

#[async_trait]
impl Queue for Embedded {
    /// Cancelled before the storage thread came to it, nothing is stored; after that, all of it may be.
    async fn push(&self, messages: Vec<Message>) -> Result<(), Error> {
        if self.shelf.is_closed() {
            return Err(Error::Closed);
        }
        if messages.is_empty() {
            return Ok(());
        }
        let size: usize = messages.iter().map(|message| message.body.len() + MESSAGE_OVERHEAD).sum();
        let size = u32::try_from(size).unwrap_or(u32::MAX).min(WAITING_BYTES);
        let _room = Arc::clone(&self.room).acquire_many_owned(size).await.expect("this semaphore is never closed");
        self.thread().change(Change::Push { messages, _room }).await.map(drop)
    }

    async fn pull_together(&self) -> Result<Vec<Delivery>, Error> {
        match self.shelf.take().await? {
            Some((turn, low)) => {
                if low {
                    self.thread().tell(Command::Refill);
                }
                let number = turn.number();
                Ok(turn.0.into_iter().map(|stored| self.deliver(number, stored)).collect())
            }
            None => Ok(vec![]),
        }
    }

    async fn stats(&self) -> Result<Stats, Error> {
        self.thread().ask(Command::Stats).await
    }

    async fn dead_letters(&self, after: Option<&str>, limit: usize) -> Result<Vec<DeadLetter>, Error> {
        let after = after.map(str::to_owned);
        self.thread().ask(|reply| Command::DeadLetters { after, limit, reply }).await
    }

    async fn replay(&self, id: &str) -> Result<bool, Error> {
        self.thread().change(Change::Replay { id: id.to_owned() }).await
    }

    async fn discard(&self, id: &str) -> Result<bool, Error> {
        self.thread().change(Change::Discard { id: id.to_owned() }).await
    }

    async fn history(&self, from: Timestamp, until: Timestamp, after: Option<&str>, limit: usize) -> Result<Vec<Kept>, Error> {
        let after = after.map(str::to_owned);
        self.thread().ask(|reply| Command::History { span: (from, until), after, limit, reply }).await
    }

    async fn probe(&self) -> Result<(), Error> {
        if self.shelf.is_closed() {
            return Err(Error::Closed);
        }
        self.thread().change(Change::Probe).await.map(drop)
    }

    async fn close(&self) {
        self.shelf.close();
    }
}

impl fmt::Debug for Embedded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Embedded").field("folder", &self.folder).finish_non_exhaustive()
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        self.shelf.close();
        if let Some(thread) = self.thread.take().and_then(Arc::into_inner) {
            thread.join();
        }
    }
}

/// Settles one message that was handed out.
struct Hand {
    place: Place,
    thread: Arc<StorageThread>,
}

impl Hand {
    async fn settle(&self, settlement: Settlement) -> Result<(), Error> {
        self.thread.change(Change::Settle { place: self.place, settlement }).await.map(drop)
    }
}

#[async_trait]
impl Settle for Hand {
    async fn ack(self: Box<Self>) -> Result<(), Error> {
        self.settle(Settlement::Ack).await
    }

    async fn retry(self: Box<Self>, retry: Retry) -> Result<(), Error> {
        self.settle(Settlement::Retry(retry)).await
    }

    async fn bury(self: Box<Self>, burial: Burial) -> Result<(), Error> {
        self.settle(Settlement::Bury(burial)).await
    }

    fn release(self: Box<Self>) {
        self.thread.tell(Command::Release(self.place));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PartitionKey;

    #[tokio::test]
    async fn read_ahead_is_bounded_in_messages_whatever_the_backlog() {
        let folder = tempfile::tempdir().unwrap();
        let queue = open(folder.path(), 16);
        for n in 0..20 {
            queue.push((0..100).map(|m| message(100 * n + m, 10)).collect()).await.unwrap();
            assert!(queue.shelf.messages() <= 16);
        }
        for _ in 0..2000 {
            queue.pull().await.unwrap().unwrap().ack().await.unwrap();
            assert!(queue.shelf.messages() <= 16);
        }
        assert_eq!(queue.stats().await.unwrap().queued(), 0);
    }

    #[tokio::test]
    async fn read_ahead_is_bounded_in_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let queue = open(folder.path(), 256);
        for n in 0..30 {
            queue.push(vec![message(n, 400_000)]).await.unwrap();
        }
        let mut held = Vec::new();
        for _ in 0..30 {
            queue.stats().await.unwrap();
            assert!(queue.shelf.messages() <= 3);
            held.push(queue.pull().await.unwrap().unwrap());
        }
        // All of them come back at once, and go back on disk.
        drop(held);
        assert_eq!(queue.stats().await.unwrap().ready, 30);
        assert!(queue.shelf.messages() <= 3);
        for _ in 0..30 {
            queue.pull().await.unwrap().unwrap().ack().await.unwrap();
        }
    }

    #[tokio::test]
    async fn read_ahead_of_one_is_enough() {
        let folder = tempfile::tempdir().unwrap();
        let queue = open(folder.path(), 0);
        queue.push((0..10).map(|n| message(n, 10)).collect()).await.unwrap();
        let held = [queue.pull().await.unwrap().unwrap(), queue.pull().await.unwrap().unwrap()];
        drop(held);
        for _ in 0..10 {
            queue.pull().await.unwrap().unwrap().ack().await.unwrap();
        }
        assert_eq!(queue.stats().await.unwrap().queued(), 0);
    }

    #[tokio::test]
    async fn read_ahead_is_bounded_with_one_key_too() {
        let folder = tempfile::tempdir().unwrap();
        let queue = open(folder.path(), 16);
        queue.push((0..200).map(|n| Message { key: PartitionKey("key".into()), ..message(n, 10) }).collect()).await.unwrap();
        let mut left = 200;
        while left > 0 {
            queue.stats().await.unwrap();
            assert!(queue.shelf.messages() <= 16);
            let together = queue.pull_together().await.unwrap();
            assert!(!together.is_empty() && together.len() <= 16);
            for delivery in together {
                delivery.ack().await.unwrap();
                left -= 1;
                assert_eq!(queue.stats().await.unwrap().queued(), left);
            }
        }
    }

    #[tokio::test]
    async fn what_is_buried_and_replayed_while_others_of_its_turn_are_settled_comes_again() {
        let folder = tempfile::tempdir().unwrap();
        let queue = open(folder.path(), 16);
        for round in 0..20 {
            let messages = (0..3).map(|n| Message { key: PartitionKey("key".into()), ..message(3 * round + n, 10) });
            queue.push(messages.collect()).await.unwrap();
            let mut together = queue.pull_together().await.unwrap().into_iter();
            let (first, second, third) = (together.next().unwrap(), together.next().unwrap(), together.next().unwrap());
            let id = second.message().id.clone();
            let burial = Burial { kind: "denied".into(), reason: "not now".into() };
            // While the thread is busy with the first, the others come to be done in one transaction.
            let (pushed, buried, replayed, ..) = tokio::join!(
                queue.push(vec![message(1000 + round, 4_000_000)]),
                second.bury(burial),
                queue.replay(&id),
                first.ack(),
                third.ack()
            );
            pushed.and(buried).unwrap();
            assert!(replayed.unwrap() || queue.replay(&id).await.unwrap());
            let mut came = Vec::new();
            while came.len() < 2 {
                let delivery = tokio::time::timeout(Duration::from_secs(30), queue.pull()).await.expect("it comes again");
                let delivery = delivery.unwrap().unwrap();
                came.push(delivery.message().id.clone());
                delivery.ack().await.unwrap();
            }
            assert!(came.contains(&id), "{came:?}");
        }
    }

    #[tokio::test]
    async fn pushes_wait_outside_when_the_disk_is_slow() {
        let folder = tempfile::tempdir().unwrap();
        let queue = open(folder.path(), 16);
        let all = Arc::clone(&queue.room).acquire_many_owned(WAITING_BYTES).await.unwrap();
        let push = queue.push(vec![message(1, 100)]);
        assert!(tokio::time::timeout(Duration::from_millis(50), push).await.is_err());
        drop(all);
        assert_eq!(queue.stats().await.unwrap().pushed_total, 0, "what was given up is not stored");
        queue.push(vec![message(1, 2 * WAITING_BYTES as usize)]).await.unwrap();
        assert_eq!(queue.room.available_permits(), WAITING_BYTES as usize);
    }

    fn open(folder: &Path, read_ahead: usize) -> Embedded {
        let options = Options { read_ahead, ..Options::new(|| Timestamp::UNIX_EPOCH) };
        Embedded::open(folder, options).unwrap()
    }

    fn message(number: usize, bytes: usize) -> Message {
        Message {
            id: number.to_string(),
            content_type: "text/plain".into(),
            key: PartitionKey(number.to_string()),
            body: vec![b'x'; bytes].into(),
            replay_of: None,
        }
    }
}
