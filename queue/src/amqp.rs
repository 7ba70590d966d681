//! The queue on RabbitMQ, for any number of replicas.
//!
//! Messages are spread over partitions by their key; each partition is a quorum queue with a single active consumer, so one
//! replica at a time has its messages, and in that replica equal keys take turns. What a push was answered has been
//! confirmed by the broker, and what was not confirmed was not accepted. A retry waits in a delay queue on the broker, a
//! dead letter lies in a queue of its own. `topology.rs` has every queue, and `flags.rs` every flag, with its reason.
//!
//! At least once: a message that is published again (for a retry, a burial, a replay) is acked only when its copy is
//! confirmed, so a crash in between leaves both. Whoever pulls has to be idempotent.
//!
//! Connections end for many reasons; each time, everything is begun anew in the background, and meanwhile pushes are refused
//! with [`Error::Unavailable`] and pulls wait. What was in hand then is delivered again, perhaps to another replica, whatever
//! is done with it here; if it comes here again, what was decided is carried out without asking anybody.

mod backoff;
mod connect;
mod dead;
mod envelope;
mod feed;
mod flags;
mod inbox;
mod layouts;
mod past;
mod returns;
mod session;
mod settle;
mod shares;
mod stats;
mod stream;
mod supervisor;
mod topology;
mod unanswered;
mod wire;

use std::{
    collections::HashMap,
    fmt,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use async_trait::async_trait;
use jiff::Timestamp;
use tokio::{
    sync::{mpsc, watch},
    time::timeout,
};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};

pub use self::{
    connect::Access,
    feed::{Feed, Letter, Take},
};
use self::{
    dead::Graveyard,
    envelope::Envelope,
    inbox::{Held, Inbox},
    layouts::Moves,
    past::Past,
    session::Session,
    settle::{Chore, Hand, Settlement},
    stream::Counter,
    topology::Topology,
    unanswered::Unanswered,
};
use crate::{DeadLetter, Delivery, Error, Kept, Message, Queue, Stats};

/// Id, key and content type travel in headers, which share one frame.
const HEADERS: usize = 16 * 1024;
/// How long whoever opens a queue waits for a broker. One that is far away takes longer until everything is declared.
const FIRST_TRY: Duration = Duration::from_secs(20);

/// How an [`Amqp`] queue is to run.
#[derive(Clone)]
pub struct Options {
    /// Asked at each connect.
    pub access: Arc<dyn Fn() -> Result<Access, String> + Send + Sync>,
    /// What all names on the broker begin with.
    pub prefix: String,
    /// Partitions, 1 to 64: at most so many replicas work at once. The same in all replicas; when it is changed, what is in the
    /// old ones is moved to the new.
    pub partitions: u16,
    /// Whether messages are taken. If not, [`Queue::pull`] waits for ever; all else is as with the others.
    pub consume: bool,
    /// Messages of one partition that may be unsettled here: some times [`crate::MOST_TOGETHER`], which one hand may have.
    pub window: u16,
    /// How long what was pushed is shown as history; zero shows none. The broker forgets the oldest by size: see `topology.rs`.
    pub history: Duration,
    /// The name of this process, for the others: unique among them.
    pub replica: String,
    /// A file of this process's own (it may not be there yet), for what the broker has not answered when it went away. Without
    /// one, the totals may be wrong by as much if the process ends before the broker is back.
    pub unanswered: Option<PathBuf>,
    /// What time it is: stamps pushes and burials.
    pub now: Arc<dyn Fn() -> Timestamp + Send + Sync>,
}

impl Options {
    /// The defaults, with the given brokers, name and source of time.
    #[must_use]
    pub fn new(
        access: impl Fn() -> Result<Access, String> + Send + Sync + 'static,
        replica: impl Into<String>,
        now: impl Fn() -> Timestamp + Send + Sync + 'static,
    ) -> Self {
        Self {
            access: Arc::new(access),
            prefix: "countersign".to_owned(),
            partitions: 8,
            consume: true,
            window: 256,
            history: Duration::from_secs(7 * 24 * 3600),
            replica: replica.into(),
            unanswered: None,
            now: Arc::new(now),
        }
    }
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options")
            .field("prefix", &self.prefix)
            .field("partitions", &self.partitions)
            .field("window", &self.window)
            .field("history", &self.history)
            .field("replica", &self.replica)
            .finish_non_exhaustive()
    }
}

/// The queue on a broker.
///
/// Dropping it and every [`Delivery`] of it ends its tasks and its connections.
#[derive(Debug)]
pub struct Amqp {
    core: Arc<Core>,
    _stop: DropGuard,
}

#[derive(Debug)]
struct Core {
    options: Options,
    topology: Topology,
    inbox: Inbox,
    /// The connection there is; none while there is none.
    session: watch::Sender<Option<Arc<Session>>>,
    /// Why there is none.
    trouble: Mutex<Option<String>>,
    tracker: TaskTracker,
    /// For the supervisor to do.
    chores: mpsc::UnboundedSender<Chore>,
    /// What was decided of messages whose connection broke before the broker heard it, by their ids and the number of the copy.
    unwritten: Mutex<HashMap<(String, u64), Settlement>>,
    graveyard: Graveyard,
    past: Past,
    unanswered: Unanswered,
    discarded: Counter,
    moves: Moves,
    /// What this replica handed back, for as long as it waits, by its id.
    waiting: Mutex<HashMap<String, stats::Waiting>>,
    others: Mutex<HashMap<String, stats::Report>>,
}

impl Amqp {
    /// Connects, and declares what is not there. All tasks run on `tracker`.
    ///
    /// If no broker can be reached, or none within 20 s, the queue is opened all the same, and goes on trying: until then pushes
    /// are refused.
    ///
    /// [`Error::Mismatch`]: the broker has something of ours with other arguments.
    pub async fn open(options: Options, tracker: &TaskTracker) -> Result<Self, Error> {
        let stop = CancellationToken::new();
        let (chores, inbox) = mpsc::unbounded_channel();
        let topology = Topology::new(&options.prefix, options.partitions);
        let unanswered = Unanswered::open(options.unanswered.clone()).await;
        let core = Arc::new(Core {
            inbox: Inbox::new(options.window.into()),
            options,
            topology,
            session: watch::Sender::new(None),
            trouble: Mutex::default(),
            tracker: tracker.clone(),
            chores,
            unwritten: Mutex::default(),
            graveyard: Graveyard::default(),
            past: Past::default(),
            unanswered,
            discarded: Counter::default(),
            moves: Moves::default(),
            waiting: Mutex::default(),
            others: Mutex::default(),
        });
        let (opened, first) = tokio::sync::oneshot::channel();
        tracker.spawn(supervisor::run(Arc::clone(&core), inbox, stop.clone(), tracker.clone(), opened));
        let queue = Self { core, _stop: stop.drop_guard() };
        match timeout(FIRST_TRY, first).await {
            Ok(Ok(Err(error @ Error::Mismatch { .. }))) => Err(error),
            // Far away, it is connected to some time later.
            Err(_) | Ok(Ok(_)) => Ok(queue),
            Ok(Err(_)) => Err(Error::Died),
        }
    }
}

#[async_trait]
impl Queue for Amqp {
    /// After an error, and when it was cancelled, some of the messages may have been kept. An id that is there already is not
    /// looked for.
    async fn push(&self, messages: Vec<Message>) -> Result<(), Error> {
        if self.core.inbox.is_closed() {
            return Err(Error::Closed);
        }
        if messages.is_empty() {
            return Ok(());
        }
        let session = self.core.session()?;
        let (now, mut envelopes) = (self.core.now(), Vec::with_capacity(messages.len()));
        for message in messages {
            if message.id.len() + message.key.0.len() + message.content_type.len() > HEADERS {
                let what = "id, key and content type of a message have more than 16 KiB".to_owned();
                return Err(Error::Unavailable { what, source: None });
            }
            envelopes.push(Envelope::new(message, now));
        }
        unanswered::push(&self.core, &session, envelopes).await
    }

    async fn pull_together(&self) -> Result<Vec<Delivery>, Error> {
        let deliver = |held: Held| {
            let Envelope { message, pushed_at, attempts, waited, .. } = held.envelope.clone();
            let lost = held.lost.clone();
            let hand = Hand::new(Arc::clone(&self.core), held);
            Delivery::new(message, pushed_at, attempts, waited, Box::new(hand)).until(lost)
        };
        Ok(self.core.inbox.take().await.into_iter().map(deliver).collect())
    }

    async fn stats(&self) -> Result<Stats, Error> {
        stats::read(&self.core).await
    }

    async fn dead_letters(&self, after: Option<&str>, limit: usize) -> Result<Vec<DeadLetter>, Error> {
        self.core.graveyard.list(&self.core, after, limit).await
    }

    async fn replay(&self, id: &str) -> Result<bool, Error> {
        self.core.graveyard.replay(&self.core, id).await
    }

    async fn discard(&self, id: &str) -> Result<bool, Error> {
        self.core.graveyard.discard(&self.core, id).await
    }

    async fn history(&self, from: Timestamp, until: Timestamp, after: Option<&str>, limit: usize) -> Result<Vec<Kept>, Error> {
        self.core.past.list(&self.core, (from, until), after, limit).await
    }

    async fn probe(&self) -> Result<(), Error> {
        let session = self.core.session()?;
        let properties = lapin::BasicProperties::default().with_delivery_mode(2);
        session.publish("", &self.core.topology.probe(), properties, b"probe").await
    }

    async fn close(&self) {
        if self.core.inbox.is_closed() {
            return;
        }
        self.core.inbox.close();
        let (done, closed) = tokio::sync::oneshot::channel();
        // Whoever closes may be the one who has something in hand, which is waited for.
        if self.core.chores.send(Chore::Close(done)).is_ok() && self.core.inbox.level().in_hand == 0 {
            // Or there is nobody who could consume.
            let _ = closed.await;
        }
    }
}

impl Core {
    fn now(&self) -> Timestamp {
        (self.options.now)()
    }

    fn consumes(&self) -> bool {
        self.options.consume && !self.inbox.is_closed()
    }

    /// The connection, if there is one that works.
    fn session(&self) -> Result<Arc<Session>, Error> {
        match &*self.session.borrow() {
            Some(session) if !session.is_over() => Ok(Arc::clone(session)),
            _ => {
                let trouble = lock(&self.trouble).clone();
                let what = trouble.unwrap_or_else(|| "there is no connection to the broker".to_owned());
                Err(Error::Unavailable { what, source: None })
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("nothing panics while it holds the lock")
}
