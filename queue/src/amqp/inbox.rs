//! What the broker has delivered to this process: whose turn it is, and what is in hand.
//!
//! A partition's messages come to one replica only, so it is enough that equal keys take turns in here.

use std::{
    collections::{HashMap, HashSet, VecDeque, hash_map::Entry},
    mem,
    sync::{Mutex, MutexGuard},
};

use jiff::Timestamp;
use lapin::Acker;
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;

use super::envelope::Envelope;
use crate::{MOST_TOGETHER, PartitionKey};

/// A delivery of the broker's, unsettled.
#[derive(Debug)]
pub(super) struct Held {
    pub envelope: Envelope,
    /// Where it comes from: [`super::session::Source`].
    pub source: usize,
    /// Not the first time that the broker delivers it.
    pub redelivered: bool,
    pub acker: Acker,
    /// The connection that it came by: only there can it be settled.
    pub session: u64,
    /// Cancelled when that is over.
    pub lost: CancellationToken,
    /// Of all that was ever in hand; 0 before.
    pub number: u64,
}

impl Held {
    fn key(&self) -> &PartitionKey {
        &self.envelope.message.key
    }
}

/// No source has this number.
const GONE: usize = usize::MAX;

#[derive(Debug)]
pub(super) struct Inbox {
    inner: Mutex<Inner>,
    /// About one permit for each key in `turns`: waiting for it is waiting for a message, first come, first served.
    arrivals: Semaphore,
    /// Told whenever a message is out of hand.
    let_go: Notify,
    /// Messages of one source that are held at most: the consumer's prefetch.
    window: usize,
}

#[derive(Debug, Default)]
struct Inner {
    lines: HashMap<PartitionKey, Line>,
    /// Each key that has a message waiting and none in hand, and some that no longer have.
    turns: VecDeque<PartitionKey>,
    /// Unsettled messages by source, in hand or not.
    unsettled: HashMap<usize, usize>,
    in_hand: usize,
    /// Messages that ever were in hand.
    handed: u64,
    /// Sources of which nothing is handed out.
    frozen: HashSet<usize>,
    closed: bool,
}

#[derive(Debug, Default)]
struct Line {
    /// They were taken together.
    in_hand: Vec<InHand>,
    waiting: VecDeque<Held>,
}

#[derive(Clone, Copy, Debug)]
struct InHand {
    number: u64,
    pushed_at: Timestamp,
    source: usize,
}

/// How many, and how old.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Level {
    pub waiting: u64,
    pub in_hand: u64,
    pub oldest: Option<Timestamp>,
}

impl Level {
    fn add(&mut self, waiting: bool, pushed_at: Timestamp) {
        *if waiting { &mut self.waiting } else { &mut self.in_hand } += 1;
        self.oldest = Some(self.oldest.map_or(pushed_at, |oldest| oldest.min(pushed_at)));
    }
}

impl Inbox {
    pub fn new(window: usize) -> Self {
        Self { inner: Mutex::default(), arrivals: Semaphore::new(0), let_go: Notify::new(), window }
    }

    /// Puts a message in line. What is returned is to be moved behind others on the broker: one busy key has more than half
    /// of what its partition may have unsettled, and keeps the others from coming.
    pub fn arrive(&self, held: Held) -> Vec<Held> {
        let mut inner = self.lock();
        if held.lost.is_cancelled() {
            // The broker has it already, and all others of its connection may have been taken away.
            return vec![];
        }
        let (key, source) = (held.key().clone(), held.source);
        *inner.unsettled.entry(source).or_default() += 1;
        let is_full = inner.unsettled[&source] >= self.window;
        let line = inner.lines.entry(key.clone()).or_default();
        let takes_turn = line.in_hand.is_empty() && line.waiting.is_empty();
        line.waiting.push_back(held);
        let (most, kept) = (self.window / 2, self.window / 4);
        let moved: Vec<Held> = if is_full && line.in_hand.len() + line.waiting.len() > most && line.waiting.len() > kept {
            line.waiting.split_off(kept).into()
        } else {
            vec![]
        };
        if takes_turn {
            inner.turns.push_back(key);
            self.arrivals.add_permits(1);
        }
        for held in &moved {
            inner.forget(held.source);
        }
        moved
    }

    /// Waits for a message, and takes with it those of its key that wait behind it; cancel-safe. Empty after [`Inbox::close`].
    pub async fn take(&self) -> Vec<Held> {
        loop {
            let Ok(arrival) = self.arrivals.acquire().await else { return vec![] };
            arrival.forget();
            let inner = &mut *self.lock();
            if inner.closed {
                return vec![];
            }
            // Whoever was in line may have gone with its connection.
            let Some(key) = inner.turns.pop_front() else { continue };
            let Some(line) = inner.lines.get_mut(&key).filter(|line| line.in_hand.is_empty()) else { continue };
            // What is lost stays until all of its connection is taken away.
            let is_due = |held: &Held| !inner.frozen.contains(&held.source) && !held.lost.is_cancelled();
            // So they are all of the connection there is, and lost together.
            let due = line.waiting.iter().take_while(|held| is_due(held)).count();
            if due == 0 {
                continue;
            }
            let most = MOST_TOGETHER.min(self.window / 4).max(1);
            let mut taken: Vec<Held> = line.waiting.drain(..due.min(most)).collect();
            for held in &mut taken {
                inner.handed += 1;
                held.number = inner.handed;
                line.in_hand.push(InHand { number: held.number, pushed_at: held.envelope.pushed_at, source: held.source });
            }
            inner.in_hand += taken.len();
            return taken;
        }
    }

    /// This message is no longer in hand: the next of its key may be.
    pub fn settled(&self, held: &Held) {
        let mut inner = self.lock();
        if let Some(source) = inner.let_go(held) {
            inner.forget(source);
        }
        self.next_turn(&mut inner, held.key());
    }

    /// Puts a message that was in hand back, before the others of its key. It is returned if the broker has to have it back.
    pub fn give_back(&self, held: Held, session: Option<u64>) -> Option<Held> {
        let mut inner = self.lock();
        let key = held.key().clone();
        let source = inner.let_go(&held);
        let mut returned = None;
        if inner.closed || session != Some(held.session) || held.lost.is_cancelled() {
            if let Some(source) = source {
                inner.forget(source);
            }
            returned = Some(held);
        } else {
            inner.lines.entry(key.clone()).or_default().waiting.push_front(held);
        }
        self.next_turn(&mut inner, &key);
        returned
    }

    /// Of this key, if nothing of it is in hand any more.
    fn next_turn(&self, inner: &mut Inner, key: &PartitionKey) {
        if let Entry::Occupied(line) = inner.lines.entry(key.clone())
            && line.get().in_hand.is_empty()
        {
            if line.get().waiting.is_empty() {
                line.remove();
            } else {
                inner.turns.push_back(key.clone());
                self.arrivals.add_permits(1);
            }
        }
        self.let_go.notify_waiters();
    }

    /// Nothing more of this source is handed out.
    pub fn freeze(&self, source: usize) {
        self.lock().frozen.insert(source);
    }

    pub fn thaw(&self, source: usize) {
        let mut inner = self.lock();
        inner.frozen.remove(&source);
        self.line_up(&mut inner);
    }

    /// Waits until nothing of this source is in hand.
    pub async fn let_go_of(&self, source: usize) {
        let is_held = || self.lock().lines.values().any(|line| line.in_hand.iter().any(|in_hand| in_hand.source == source));
        loop {
            let let_go = self.let_go.notified();
            if !is_held() {
                return;
            }
            let_go.await;
        }
    }

    /// Forgets a source, and what of it is not in hand.
    pub fn take_source(&self, source: usize) -> Vec<Held> {
        let inner = &mut *self.lock();
        let mut taken = Vec::new();
        for line in inner.lines.values_mut() {
            let (ours, others) = mem::take(&mut line.waiting).into_iter().partition(|held| held.source == source);
            line.waiting = others;
            taken.extend(Vec::from(ours));
        }
        inner.lines.retain(|_, line| !line.in_hand.is_empty() || !line.waiting.is_empty());
        inner.unsettled.remove(&source);
        inner.frozen.remove(&source);
        self.line_up(inner);
        taken
    }

    /// Keys whose turn was passed over are in line again.
    fn line_up(&self, inner: &mut Inner) {
        let lined: HashSet<PartitionKey> = inner.turns.iter().cloned().collect();
        for (key, line) in &inner.lines {
            if line.in_hand.is_empty() && !line.waiting.is_empty() && !lined.contains(key) {
                inner.turns.push_back(key.clone());
                self.arrivals.add_permits(1);
            }
        }
    }

    /// Forgets everything that is not in hand: the broker delivers it again, to whoever is there. For the end of a connection.
    pub fn take_all(&self) -> Vec<Held> {
        let mut inner = self.lock();
        inner.turns.clear();
        let waiting: Vec<Held> = inner.lines.values_mut().flat_map(|line| mem::take(&mut line.waiting)).collect();
        inner.lines.retain(|_, line| !line.in_hand.is_empty());
        for held in &waiting {
            inner.forget(held.source);
        }
        waiting
    }

    /// What is in hand comes from sources that no longer are.
    pub fn lose_sources(&self) {
        let mut inner = self.lock();
        inner.unsettled.clear();
        inner.frozen.clear();
        // The next connection gives the same numbers to sources of its own.
        inner.lines.values_mut().flat_map(|line| &mut line.in_hand).for_each(|in_hand| in_hand.source = GONE);
    }

    /// No message is handed out any more.
    pub fn close(&self) {
        self.lock().closed = true;
        self.arrivals.close();
    }

    pub fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Waits until nothing is in hand.
    pub async fn empty(&self) {
        loop {
            let let_go = self.let_go.notified();
            if self.lock().in_hand == 0 {
                return;
            }
            let_go.await;
        }
    }

    /// Of everything.
    pub fn level(&self) -> Level {
        let mut all = Level::default();
        self.each(|_, waiting, pushed_at| all.add(waiting, pushed_at));
        all
    }

    /// By source.
    pub fn levels(&self) -> HashMap<usize, Level> {
        let mut levels: HashMap<usize, Level> = HashMap::new();
        self.each(|source, waiting, pushed_at| levels.entry(source).or_default().add(waiting, pushed_at));
        levels
    }

    fn each(&self, mut see: impl FnMut(usize, bool, Timestamp)) {
        for line in self.lock().lines.values() {
            for in_hand in &line.in_hand {
                see(in_hand.source, false, in_hand.pushed_at);
            }
            for held in &line.waiting {
                see(held.source, true, held.envelope.pushed_at);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("nothing panics while it holds the inbox")
    }
}

impl Inner {
    /// The source of what was in hand.
    fn let_go(&mut self, held: &Held) -> Option<usize> {
        let in_hand = &mut self.lines.get_mut(held.key())?.in_hand;
        let place = in_hand.iter().position(|in_hand| in_hand.number == held.number)?;
        self.in_hand -= 1;
        Some(in_hand.swap_remove(place).source)
    }

    fn forget(&mut self, source: usize) {
        if let Some(unsettled) = self.unsettled.get_mut(&source) {
            *unsettled = unsettled.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use futures::FutureExt as _;
    use lapin::message::Delivery;

    use super::*;
    use crate::Message;

    fn held(id: &str, key: &str, source: usize, lost: &CancellationToken) -> Held {
        let message = Message {
            id: id.to_owned(),
            content_type: String::new(),
            key: PartitionKey(key.to_owned()),
            body: Bytes::new(),
            replay_of: None,
        };
        let acker = Delivery::mock(1, "".into(), "".into(), false, vec![]).acker;
        let envelope = Envelope::new(message, Timestamp::UNIX_EPOCH);
        Held { envelope, source, redelivered: false, acker, session: 1, lost: lost.clone(), number: 0 }
    }

    fn take(inbox: &Inbox) -> Vec<Held> {
        inbox.take().now_or_never().unwrap_or_default()
    }

    fn ids(taken: &[Held]) -> Vec<&str> {
        taken.iter().map(|held| held.envelope.message.id.as_str()).collect()
    }

    #[test]
    fn key_of_a_source_that_went_and_came_back_is_in_one_hand_only() {
        let (inbox, lost) = (Inbox::new(8), CancellationToken::new());
        inbox.arrive(held("before", "key", 1, &lost));
        inbox.freeze(1);
        assert_eq!(inbox.take_source(1).len(), 1);
        inbox.arrive(held("first", "key", 2, &lost));
        let first = take(&inbox);
        inbox.arrive(held("second", "key", 2, &lost));
        assert_eq!((ids(&first), take(&inbox).len()), (vec!["first"], 0));
        assert_eq!(inbox.level().in_hand, 1);
        inbox.settled(&first[0]);
        assert_eq!(ids(&take(&inbox)), ["second"]);
    }

    #[test]
    fn what_is_taken_together_is_one_hand_of_one_connection() {
        let (inbox, lost, live) = (Inbox::new(8), CancellationToken::new(), CancellationToken::new());
        for id in ["a", "b"] {
            inbox.arrive(held(id, "key", 1, &lost));
        }
        let before = take(&inbox);
        assert_eq!(ids(&before), ["a", "b"]);
        lost.cancel();
        inbox.take_all();
        inbox.lose_sources();
        for id in ["c", "d"] {
            inbox.arrive(Held { session: 2, ..held(id, "key", 1, &live) });
        }
        for held in before {
            assert!(take(&inbox).is_empty(), "something of the key is in hand");
            assert!(inbox.give_back(held, Some(2)).is_some());
        }
        assert_eq!(inbox.levels()[&1], Level { waiting: 2, in_hand: 0, oldest: Some(Timestamp::UNIX_EPOCH) });
        let after = take(&inbox);
        assert_eq!(ids(&after), ["c", "d"]);
        inbox.settled(&after[0]);
        assert!(take(&inbox).is_empty(), "one is still in hand");
        assert!(inbox.let_go_of(1).now_or_never().is_none());
        assert!(inbox.give_back(after.into_iter().nth(1).unwrap(), Some(2)).is_none());
        assert!(inbox.let_go_of(1).now_or_never().is_some());
        assert_eq!(ids(&take(&inbox)), ["d"]);
    }

    #[test]
    fn a_key_that_has_much_in_hand_leaves_its_partition_room_for_others() {
        for in_hand in [1, 32] {
            let (inbox, lost) = (Inbox::new(128), CancellationToken::new());
            let arrive = |n: usize| inbox.arrive(held(&n.to_string(), "busy", 1, &lost)).len();
            assert_eq!((0..in_hand).map(arrive).sum::<usize>(), 0);
            let taken = take(&inbox);
            assert_eq!(taken.len(), in_hand);
            assert_eq!((in_hand..128).map(arrive).sum::<usize>(), 128 - in_hand - 32);
        }
        // Of a small window no more than a quarter is one hand.
        let (inbox, lost) = (Inbox::new(8), CancellationToken::new());
        (0..6).for_each(|n| drop(inbox.arrive(held(&n.to_string(), "busy", 1, &lost))));
        assert_eq!(take(&inbox).len(), 2);
    }

    #[test]
    fn what_is_in_hand_from_before_does_not_count_against_the_next_connection() {
        let (inbox, lost) = (Inbox::new(8), CancellationToken::new());
        inbox.arrive(held("old", "old", 1, &lost));
        let old = take(&inbox);
        inbox.take_all();
        inbox.lose_sources();
        inbox.arrive(held("other", "other", 1, &lost));
        assert_eq!(inbox.levels()[&1], Level { waiting: 1, in_hand: 0, oldest: Some(Timestamp::UNIX_EPOCH) });
        assert!(inbox.let_go_of(1).now_or_never().is_some(), "nothing of the new one is in hand");
        inbox.settled(&old[0]);
        let moved: usize = (0..7).map(|n| inbox.arrive(held(&n.to_string(), "busy", 1, &lost)).len()).sum();
        assert!(moved > 0, "one key fills the window");
    }

    #[test]
    fn what_comes_in_when_its_connection_is_over_keeps_nothing_up() {
        let (inbox, lost, live) = (Inbox::new(8), CancellationToken::new(), CancellationToken::new());
        inbox.arrive(held("in hand", "key", 1, &lost));
        let in_hand = take(&inbox).pop().unwrap();
        lost.cancel();
        inbox.arrive(held("late", "other key", 1, &lost));
        assert!(inbox.give_back(in_hand, Some(1)).is_some());
        for key in ["key", "other key"] {
            inbox.arrive(held(key, key, 1, &live));
        }
        assert_eq!([ids(&take(&inbox)), ids(&take(&inbox))], [["key"], ["other key"]]);
    }
}
