//! The one thread that reads and writes the database.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    error::Error as StdError,
    mem,
    sync::{
        Arc,
        mpsc::{self, Receiver, RecvTimeoutError},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use jiff::Timestamp;
use tokio::sync::oneshot;

use super::{
    folder::Folder,
    shelf::{Shelf, died},
    store::{Change, Failure, Outcome, Place, Store, Stored, Turn, nanoseconds},
};
use crate::{DeadLetter, Error, Kept, MOST_TOGETHER, Stats};

/// Commands that share a transaction, at most.
const BATCH: usize = 1024;
/// Retries whose time has come that are put in line at once; the rest in the next transaction.
const WOKEN: usize = 256;
/// After the disk refused something that has to be done: when to try again.
const PAUSE: Duration = Duration::from_millis(500);
/// The wall clock may be set while we wait for a retry's time, so it is looked at this often.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

pub(super) type Reply<T> = oneshot::Sender<Result<T, Error>>;

pub(super) enum Command {
    Change(Change, Reply<bool>),
    /// A message was given back unsettled.
    Release(Place),
    /// There is room on the shelf.
    Refill,
    Stats(Reply<Stats>),
    DeadLetters {
        after: Option<String>,
        limit: usize,
        reply: Reply<Vec<DeadLetter>>,
    },
    History {
        span: (Timestamp, Timestamp),
        after: Option<String>,
        limit: usize,
        reply: Reply<Vec<Kept>>,
    },
}

/// The way to the thread. The thread ends, and the folder is free, once this is gone.
pub(super) struct StorageThread {
    commands: mpsc::Sender<Command>,
    handle: JoinHandle<()>,
}

impl StorageThread {
    pub fn start(
        folder: Folder,
        store: Store,
        shelf: Arc<Shelf>,
        now: Arc<dyn Fn() -> Timestamp + Send + Sync>,
    ) -> Result<Self, Error> {
        let (commands, inbox) = mpsc::channel();
        let worker = Worker {
            store,
            _folder: folder,
            shelf,
            now,
            inbox,
            cursor: 0,
            out: HashMap::new(),
            left: HashSet::new(),
            returned: VecDeque::new(),
            unwritten: Vec::new(),
            pause: None,
            forgetting: false,
            forget_after: None,
        };
        let handle = thread::Builder::new().name("queue".into()).spawn(move || worker.run()).map_err(|cause| {
            Error::Unavailable { what: "its storage thread could not be started".into(), source: Some(cause.into()) }
        })?;
        Ok(Self { commands, handle })
    }

    /// Sends a command that nobody waits for. Does not block.
    pub fn tell(&self, command: Command) {
        // A thread that is gone has told the pullers so.
        let _ = self.commands.send(command);
    }

    pub async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        self.tell(command(reply));
        answer.await.unwrap_or_else(|_| Err(died()))
    }

    /// Has it changed, durably. False if there was no such dead letter.
    pub async fn change(&self, change: Change) -> Result<bool, Error> {
        self.ask(|reply| Command::Change(change, reply)).await
    }

    /// Waits until everything that was sent is done and the folder is free.
    pub fn join(self) {
        drop(self.commands);
        // If it panicked, the panic has been printed, and pullers have been told.
        let _ = self.handle.join();
    }
}

/// A change, and who wants to know; nobody if they have been told that it could not be written yet.
struct Asked {
    change: Change,
    reply: Option<Reply<bool>>,
}

impl Asked {
    fn answer(self, answer: Result<bool, Error>) {
        // The memory it took is free when its caller goes on.
        drop(self.change);
        if let Some(reply) = self.reply {
            // They may have gone away.
            let _ = reply.send(answer);
        }
    }

    fn is_settlement(&self) -> bool {
        matches!(self.change, Change::Settle { .. })
    }
}

/// A turn that is out.
struct Out {
    /// Its messages that are not settled, in their order in line.
    left: Vec<i64>,
    /// So many of them have not been given back.
    in_hand: usize,
}

/// What is read ahead at once.
struct Found {
    turns: Vec<Turn>,
    /// So much more may be.
    room: usize,
    room_bytes: usize,
}

impl Found {
    fn is_full(&self) -> bool {
        self.room == 0 || self.room_bytes == 0
    }

    /// Takes a ready message, even if those behind it cannot be read.
    fn take(&mut self, ready: Stored, store: &Store, out: &mut HashSet<i64>) -> Result<(), Failure> {
        self.count(&ready);
        let key = ready.message.key.clone();
        let mut turn = vec![ready];
        let mut read = Ok(());
        if !self.is_full() {
            read = store.behind(&key, |stored| {
                self.count(&stored);
                turn.push(stored);
                turn.len() < MOST_TOGETHER && !self.is_full()
            });
        }
        out.extend(turn.iter().map(|stored| stored.seq));
        self.turns.push(Turn(turn));
        read
    }

    fn count(&mut self, stored: &Stored) {
        self.room = self.room.saturating_sub(1);
        self.room_bytes = self.room_bytes.saturating_sub(stored.message.body.len());
    }
}

struct Worker {
    // Closed before the folder is unlocked: fields drop in this order.
    store: Store,
    _folder: Folder,
    shelf: Arc<Shelf>,
    now: Arc<dyn Fn() -> Timestamp + Send + Sync>,
    inbox: Receiver<Command>,
    /// Everything that is ready and was in line up to this turn has been on the shelf.
    cursor: i64,
    /// The turns that are on the shelf or in somebody's hands, by number. Of each, one message is ready on disk.
    out: HashMap<i64, Out>,
    /// What is left of all of them: in line on disk, and not to be read.
    left: HashSet<i64>,
    /// Ready messages that were given back, and are to go on the shelf again.
    returned: VecDeque<i64>,
    /// Settlements that the disk did not take. Their messages count as in flight.
    unwritten: Vec<Asked>,
    /// Until when nothing is tried that nobody asks for, because it failed.
    pause: Option<Instant>,
    /// There is more that is no longer to be kept.
    forgetting: bool,
    /// Until when nothing is forgotten, because that failed.
    forget_after: Option<Instant>,
}

impl Worker {
    fn run(mut self) {
        let _on_panic = Guard(Arc::clone(&self.shelf));
        self.fill();
        while let Some(commands) = self.next_commands() {
            self.round(commands);
        }
        let unwritten = mem::take(&mut self.unwritten);
        self.write(unwritten);
    }

    /// Waits for commands, or for the time to do something unasked. `None` at the end.
    fn next_commands(&self) -> Option<Vec<Command>> {
        let first = match self.wait() {
            None => Some(self.inbox.recv().ok()?),
            Some(wait) => match self.inbox.recv_timeout(wait) {
                Ok(command) => Some(command),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return None,
            },
        };
        Some(first.into_iter().chain(self.inbox.try_iter()).take(BATCH).collect())
    }

    fn wait(&self) -> Option<Duration> {
        if let Some(end) = self.pause {
            return Some(end.saturating_duration_since(Instant::now()));
        }
        if self.forgetting {
            return Some(Duration::ZERO);
        }
        let forget_at = self.store.overdue_at().filter(|_| self.may_forget());
        let next = self.store.books().next_due.into_iter().chain(forget_at).min();
        let Some(next) = next else { return self.forget_after.map(|_| LONGEST_WAIT) };
        let left = next.saturating_sub(self.now());
        Some(Duration::from_nanos(left.max(0).unsigned_abs()).min(LONGEST_WAIT))
    }

    fn may_forget(&self) -> bool {
        self.forget_after.is_none_or(|end| Instant::now() >= end)
    }

    fn round(&mut self, commands: Vec<Command>) {
        let mut changes = Vec::new();
        let mut questions = Vec::new();
        for command in commands {
            match command {
                // Nobody waits for it any more, so nobody will say that it is durable.
                Command::Change(Change::Push { .. }, reply) if reply.is_closed() => {}
                Command::Change(change, reply) => changes.push(Asked { change, reply: Some(reply) }),
                Command::Release(place) => {
                    self.shelf.landed();
                    self.let_go(place, true);
                }
                Command::Refill => {}
                Command::Stats(_) | Command::DeadLetters { .. } | Command::History { .. } => questions.push(command),
            }
        }
        let paused = self.pause.is_some_and(|end| Instant::now() < end);
        if !paused || !changes.is_empty() {
            changes.append(&mut self.unwritten);
            self.write(changes);
        }
        self.fill();
        for question in questions {
            self.answer(question);
        }
        self.forget();
    }

    fn write(&mut self, changes: Vec<Asked>) {
        let now = self.now();
        let is_due = self.store.books().next_due.is_some_and(|due| due <= now);
        if changes.is_empty() && !is_due {
            self.pause = None;
            return;
        }
        let failure = match self.transact(&changes, now) {
            Ok(outcomes) => return self.written(changes, outcomes),
            Err(failure) => failure,
        };
        let (settlements, refused): (Vec<_>, Vec<_>) = changes.into_iter().partition(Asked::is_settlement);
        let alone = refused.is_empty();
        for asked in refused {
            asked.answer(Err(failure.error()));
        }
        // They may fit where a push did not.
        if !alone
            && !settlements.is_empty()
            && let Ok(outcomes) = self.transact(&settlements, now)
        {
            return self.written(settlements, outcomes);
        }
        if is_due || !settlements.is_empty() {
            self.rest(&failure);
        }
        for Asked { change, reply } in settlements {
            if let Some(reply) = reply {
                let _ = reply.send(Err(failure.error()));
            }
            self.unwritten.push(Asked { change, reply: None });
        }
    }

    fn transact(&mut self, changes: &[Asked], now: i64) -> Result<Vec<Outcome>, Failure> {
        let synced = changes.iter().any(|asked| asked.change.is_synced());
        let is_due = self.store.books().next_due.is_some_and(|due| due <= now);
        self.store.write(synced, |writing| {
            if is_due {
                writing.wake(now, WOKEN)?;
            }
            changes.iter().map(|asked| writing.apply(&asked.change, now)).collect()
        })
    }

    fn written(&mut self, changes: Vec<Asked>, outcomes: Vec<Outcome>) {
        if self.pause.take().is_some() {
            tracing::info!("the queue writes again");
        }
        for (asked, outcome) in changes.into_iter().zip(outcomes) {
            if let Change::Settle { place, .. } = asked.change {
                self.shelf.landed();
                self.let_go(place, false);
            }
            asked.answer(match outcome {
                Outcome::Done => Ok(true),
                Outcome::Nothing => Ok(false),
                Outcome::Duplicate(id) => Err(Error::Duplicate(id)),
            });
        }
        self.tidy();
    }

    fn tidy(&mut self) {
        if let Err(failure) = self.store.tidy() {
            tracing::warn!(error = &failure.error() as &dyn StdError, "the queue's log could not be written back");
        }
    }

    /// One step of forgetting what is no longer kept, if it is time. When it fails, all else goes on.
    fn forget(&mut self) {
        let now = self.now();
        let is_overdue = self.store.overdue_at().is_some_and(|due| due <= now);
        if !(self.forgetting || is_overdue) || self.pause.is_some() || !self.may_forget() {
            return;
        }
        match self.store.forget(now) {
            Ok(more) => {
                self.forgetting = more;
                self.forget_after = None;
                self.tidy();
            }
            Err(failure) => {
                tracing::warn!(error = &failure.error() as &dyn StdError, "what is too old to be kept could not be removed");
                self.forgetting = false;
                self.forget_after = Some(Instant::now() + LONGEST_WAIT);
            }
        }
    }

    /// A message is out of hand. With the last one its turn is over: what was given back of it may come again.
    fn let_go(&mut self, Place { turn, seq }: Place, given_back: bool) {
        let out = self.out.get_mut(&turn).expect("a turn is out until all of it is out of hand");
        out.in_hand -= 1;
        if !given_back {
            out.left.retain(|left| *left != seq);
            self.left.remove(&seq);
        }
        if out.in_hand > 0 {
            return;
        }
        if let Some(Out { left, .. }) = self.out.remove(&turn) {
            for seq in &left {
                self.left.remove(seq);
            }
            // The first of them is the one that is ready.
            self.returned.extend(left.first());
        }
    }

    /// Puts messages on the shelf, if it is half empty and the disk is well.
    fn fill(&mut self) {
        if self.pause.is_some() || !self.unwritten.is_empty() {
            return;
        }
        let level = self.shelf.level();
        let ready = usize::try_from(self.store.books().ready).unwrap_or_default();
        let mut on_disk = ready.saturating_sub(self.out.len());
        let mut found = Found { turns: vec![], room: level.room, room_bytes: level.room_bytes };
        if on_disk > 0 && level.is_low {
            if let Err(failure) = self.read_ahead(&mut found, on_disk.saturating_sub(self.returned.len())) {
                self.shelf.add_error(failure.error());
                self.rest(&failure);
            }
            on_disk -= found.turns.len();
        }
        for turn in &found.turns {
            let left: Vec<i64> = turn.0.iter().map(|stored| stored.seq).collect();
            self.out.insert(turn.number(), Out { in_hand: left.len(), left });
        }
        self.shelf.add(found.turns, on_disk > 0);
    }

    fn read_ahead(&mut self, found: &mut Found, in_line: usize) -> Result<(), Failure> {
        while !found.is_full()
            && let Some(seq) = self.returned.pop_front()
        {
            match self.store.ready(seq) {
                Ok(Some(stored)) => found.take(stored, &self.store, &mut self.left)?,
                Ok(None) => {}
                Err(failure) => {
                    self.returned.push_front(seq);
                    return Err(failure);
                }
            }
        }
        let mut done = Ok(());
        if in_line > 0 && !found.is_full() {
            let (store, cursor, left) = (&self.store, &mut self.cursor, &mut self.left);
            store.ready_after(*cursor, |stored| {
                *cursor = stored.turn;
                // What was handed out behind another of its key becomes ready when that has left the line.
                if !left.contains(&stored.seq) {
                    done = found.take(stored, store, left);
                }
                done.is_ok() && !found.is_full()
            })?;
        }
        done
    }

    /// Leaves the disk alone for a moment.
    fn rest(&mut self, failure: &Failure) {
        if self.pause.replace(Instant::now() + PAUSE).is_none() {
            tracing::error!(error = &failure.error() as &dyn StdError, "the queue waits for its disk");
        }
    }

    fn answer(&self, question: Command) {
        match question {
            Command::Stats(reply) => {
                let _ = reply.send(self.stats().map_err(|failure| failure.error()));
            }
            Command::DeadLetters { after, limit, reply } => {
                let letters = self.store.dead_letters(after.as_deref(), limit);
                let _ = reply.send(letters.map_err(|failure| failure.error()));
            }
            Command::History { span, after, limit, reply } => {
                let kept = self.store.history(self.now(), span, after.as_deref(), limit);
                let _ = reply.send(kept.map_err(|failure| failure.error()));
            }
            Command::Change(..) | Command::Release(_) | Command::Refill => {}
        }
    }

    fn stats(&self) -> Result<Stats, Failure> {
        let books = self.store.books();
        let in_flight = self.shelf.level().in_flight as u64;
        Ok(Stats {
            pushed_total: books.pushed.unsigned_abs(),
            discarded_total: books.discarded.unsigned_abs(),
            ready: (books.ready + books.blocked).unsigned_abs().saturating_sub(in_flight),
            waiting: books.waiting.unsigned_abs(),
            in_flight,
            dead: books.dead.unsigned_abs(),
            oldest: self.store.oldest()?,
            history: self.store.reach(self.now())?,
            partitions: vec![],
        })
    }

    fn now(&self) -> i64 {
        nanoseconds((self.now)())
    }
}

/// Tells the pullers when the thread ends, be it by a panic.
struct Guard(Arc<Shelf>);

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.died();
    }
}
