//! Dead letters: a queue that is looked through without taking anything away.
//!
//! A queue has no way to be listed but to consume it. So a cursor does that on a channel of its own and holds what it listed
//! unacked, some seconds from page to page; when it is let go of, everything is back. While one is open the others would see
//! gaps: an exclusive queue is the lock between replicas.
//!
//! RabbitMQ keeps the order of what is given back, and puts it before what was never read, but after what was given back before.
//! So a listing that went to its end leaves the order as it was, and one that was broken off leaves what it had behind the rest.

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    hash::{BuildHasher as _, RandomState},
    iter,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::StreamExt as _;
use lapin::{BasicProperties, Channel, types::FieldTable};
use tokio::{
    sync::{Mutex, RwLock, RwLockReadGuard},
    time::{Instant, timeout},
};

use super::{
    Core,
    envelope::Envelope,
    flags, lock,
    session::{Session, lost},
};
use crate::{DeadLetter, Error};

/// How long a cursor stays open for the next page.
const IDLE: Duration = Duration::from_secs(5);
/// How long a cursor is gone on with. After half an hour the broker would end a channel that holds unacked messages
/// (`consumer_timeout`).
const LONGEST: Duration = Duration::from_secs(600);
/// How long another replica's cursor is waited for.
const PATIENCE: Duration = Duration::from_secs(12);
/// A page has no more than this, whatever is asked for.
const PAGE: usize = 1000;
/// Nor more bytes of bodies than this and one chunk.
const PAGE_BYTES: usize = 8 * 1024 * 1024;
/// Letters that are asked for, and given back, at once: what memory has to hold beyond a page. RabbitMQ keeps the order of so
/// many; of more that one consumer gives back it takes any.
const CHUNK: usize = 32;
/// Letters on one channel, and up to a chunk more: with each ack the broker goes through what the channel has unacked.
const CHANNEL: u64 = 2000;
/// Chunks that are given back at once. RabbitMQ puts off what comes faster than it has it on record, and forgets the order then.
const CHUNKS: usize = 16;

#[derive(Debug, Default)]
pub(super) struct Graveyard {
    cursor: Mutex<Option<Cursor>>,
    /// Letters that we hold, and that the broker does not count as there.
    held: AtomicU64,
    /// A listing whose cursor was let go of: its last letter, and all that it had. What was given back may come after what was
    /// not looked at yet, so it goes on by what it had and not by place.
    broken_off: std::sync::Mutex<Option<(String, HashSet<Mark>)>>,
    marks: Marks,
    /// Passed by each letter that is being taken away: nothing is given back meanwhile.
    gate: RwLock<()>,
}

/// A letter that is being taken away, out of the cursor's hands.
struct Taken<'a> {
    session: Arc<Session>,
    channel: Channel,
    tag: u64,
    letter: Option<DeadLetter>,
    _pass: RwLockReadGuard<'a, ()>,
}

impl Graveyard {
    pub fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// As [`crate::Queue::dead_letters`].
    pub async fn list(&self, core: &Core, after: Option<&str>, limit: usize) -> Result<Vec<DeadLetter>, Error> {
        if limit == 0 {
            return Ok(vec![]);
        }
        let mut place = self.cursor.lock().await;
        let page = self.page_after(core, &mut place, after, limit.min(PAGE)).await;
        if !matches!(&page, Ok(page) if !page.is_empty()) {
            self.let_go(core, &mut place).await;
        }
        page
    }

    async fn page_after(
        &self,
        core: &Core,
        place: &mut Option<Cursor>,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, Error> {
        let is_next = place.as_ref().is_some_and(|cursor| cursor.works() && after.is_some() && cursor.last.as_deref() == after);
        if is_next {
            return self.page(core, place, limit).await;
        }
        let broken_off = lock(&self.broken_off).take().filter(|(last, _)| Some(last.as_str()) == after);
        self.let_go(core, place).await;
        if let Some((_, had)) = broken_off {
            place.insert(Cursor::open(core, &self.marks).await?).skip = had;
        } else if let Some(after) = after {
            loop {
                let mut page = self.page(core, place, limit).await?;
                if page.is_empty() {
                    // There is no such letter any more.
                    self.let_go(core, place).await;
                    break;
                }
                if let Some(found) = page.iter().position(|letter| letter.message.id == after) {
                    page.drain(..=found);
                    return if page.is_empty() { self.page(core, place, limit).await } else { Ok(page) };
                }
            }
        }
        self.page(core, place, limit).await
    }

    async fn page(&self, core: &Core, place: &mut Option<Cursor>, limit: usize) -> Result<Vec<DeadLetter>, Error> {
        let cursor = match place {
            Some(cursor) => cursor,
            None => place.insert(Cursor::open(core, &self.marks).await?),
        };
        cursor.page(core, limit, &self.held).await
    }

    /// As [`crate::Queue::replay`].
    pub async fn replay(&self, core: &Core, id: &str) -> Result<bool, Error> {
        let Some(mut taken) = self.take(core, id, true).await? else { return Ok(false) };
        let letter = taken.letter.take().expect("it was asked for as a whole");
        let envelope = Envelope::new(letter.message, letter.pushed_at);
        let done = core.put_off(&taken.session, envelope, Duration::ZERO).await;
        self.settle(taken, done).await
    }

    /// As [`crate::Queue::discard`]. A crash between the two steps counts it, and leaves it there.
    pub async fn discard(&self, core: &Core, id: &str) -> Result<bool, Error> {
        let Some(taken) = self.take(core, id, false).await? else { return Ok(false) };
        // What was discarded, without its body.
        let mut headers = FieldTable::default();
        headers.insert("id".into(), lapin::types::AMQPValue::LongString(id.into()));
        let receipt = BasicProperties::default().with_delivery_mode(2).with_headers(headers);
        let sent = core.discarded.sending(&taken.session);
        let done = taken.session.publish("", &core.topology.discarded(), sent.stamp(receipt), &[]).await;
        if done.is_ok() {
            core.discarded.confirmed(sent);
        }
        self.settle(taken, done).await
    }

    /// Takes a letter out of the cursor; `whole` if its body is needed. `None` if there is none.
    ///
    /// What the cursor has gone by it knows, so whatever is looked for is behind it, or known: going through many costs one
    /// reading of the queue, whether they are its next ones or a few far between.
    async fn take(&self, core: &Core, id: &str, whole: bool) -> Result<Option<Taken<'_>>, Error> {
        let mut place = self.cursor.lock().await;
        if place.as_ref().is_some_and(|cursor| !cursor.works() || !cursor.skip.is_empty()) {
            self.let_go(core, &mut place).await;
        }
        match self.find(core, &mut place, id, whole).await {
            Ok(true) => {}
            Ok(false) => return Ok(None),
            Err(error) => {
                self.let_go(core, &mut place).await;
                return Err(error);
            }
        }
        let pass = self.gate.read().await;
        let cursor = place.as_mut().expect("it was found by it");
        cursor.used = Instant::now();
        let (channel, tag) = cursor.tags.remove(&cursor.marks.of(id)).expect("it was found there");
        let letter = cursor.shown.iter_mut().find_map(|page| page.remove(id));
        Ok(Some(Taken {
            session: Arc::clone(&cursor.session),
            channel: cursor.channels[channel].clone(),
            tag,
            letter,
            _pass: pass,
        }))
    }

    async fn find(&self, core: &Core, place: &mut Option<Cursor>, id: &str, whole: bool) -> Result<bool, Error> {
        if let Some(cursor) = place
            && cursor.tags.contains_key(&cursor.marks.of(id))
        {
            if !whole || cursor.shown.iter().any(|page| page.contains_key(id)) {
                return Ok(true);
            }
            // Too far back: from the start again.
            self.let_go(core, place).await;
        }
        loop {
            let page = self.page(core, place, PAGE).await?;
            if page.is_empty() || page.iter().any(|letter| letter.message.id == id) {
                return Ok(!page.is_empty());
            }
        }
    }

    /// Acks what has got to where it goes, and gives back what has not.
    async fn settle(&self, taken: Taken<'_>, done: Result<(), Error>) -> Result<bool, Error> {
        let Taken { session, channel, tag, .. } = &taken;
        let settled = match &done {
            Ok(()) => session.asked(channel.basic_ack(*tag, flags::ACK)).await,
            Err(_) => session.asked(channel.basic_nack(*tag, flags::GIVE_BACK)).await,
        };
        self.held.fetch_sub(1, Ordering::Relaxed);
        done.and(settled).map(|()| true)
    }

    /// Lets go of a cursor that nobody has asked for a while.
    pub async fn tidy(&self, core: &Core) {
        if let Ok(mut place) = self.cursor.try_lock()
            && place.as_ref().is_some_and(|cursor| cursor.used.elapsed() > IDLE)
        {
            self.let_go(core, &mut place).await;
        }
    }

    /// The connection is gone, and the cursor with it.
    pub async fn forget(&self) {
        *self.cursor.lock().await = None;
        let _closed = self.gate.write().await;
        self.held.store(0, Ordering::Relaxed);
    }

    async fn let_go(&self, core: &Core, place: &mut Option<Cursor>) {
        let Some(cursor) = place.take() else { return };
        if let Some(last) = &cursor.last {
            let had = cursor.tags.keys().chain(&cursor.skip).copied().collect();
            *lock(&self.broken_off) = Some((last.clone(), had));
        }
        let _closed = self.gate.write().await;
        if !cursor.session.is_over()
            && let Err(error) = cursor.close(core).await
        {
            tracing::debug!(error = &error as &dyn std::error::Error, "the broker takes the dead letters back by itself");
        }
        self.held.store(0, Ordering::Relaxed);
    }
}

#[derive(Debug)]
struct Cursor {
    session: Arc<Session>,
    channels: Vec<Channel>,
    marks: Marks,
    /// What was listed and is still there, by its mark.
    tags: HashMap<Mark, Tag>,
    /// What an earlier part of this listing had.
    skip: HashSet<Mark>,
    /// The last two pages: many that are taken away at once may come to the next page while some are on the one before.
    shown: [HashMap<String, DeadLetter>; 2],
    last: Option<String>,
    /// The last tag of each chunk.
    chunks: Vec<Tag>,
    opened: Instant,
    used: Instant,
}

/// The number of a channel, and of a delivery on it.
type Tag = (usize, u64);

/// Stands for an id of any length: 128 bits that nobody can foresee, so that no two are the same.
type Mark = [u64; 2];

#[derive(Clone, Debug, Default)]
struct Marks([RandomState; 2]);

impl Marks {
    fn of(&self, id: &str) -> Mark {
        self.0.each_ref().map(|keys| keys.hash_one(id))
    }
}

impl Cursor {
    async fn open(core: &Core, marks: &Marks) -> Result<Self, Error> {
        let session = core.session()?;
        take_lock(core, &session).await?;
        let now = Instant::now();
        Ok(Self {
            session,
            channels: vec![],
            marks: marks.clone(),
            skip: HashSet::new(),
            tags: HashMap::new(),
            shown: Default::default(),
            last: None,
            chunks: vec![],
            opened: now,
            used: now,
        })
    }

    fn works(&self) -> bool {
        !self.session.is_over() && self.opened.elapsed() < LONGEST
    }

    async fn page(&mut self, core: &Core, limit: usize, held: &AtomicU64) -> Result<Vec<DeadLetter>, Error> {
        let (mut page, mut bytes) = (Vec::new(), 0);
        while page.len() < limit && bytes < PAGE_BYTES {
            let chunk = self.chunk(core, (limit - page.len()).min(CHUNK), held).await?;
            if chunk.is_empty() {
                break;
            }
            bytes += chunk.iter().map(|letter| letter.message.body.len()).sum::<usize>();
            page.extend(chunk.into_iter().filter(|letter| !self.skip.contains(&self.marks.of(&letter.message.id))));
        }
        if let Some(last) = page.last() {
            self.shown.rotate_left(1);
            self.shown[1] = page.iter().map(|letter| (letter.message.id.clone(), letter.clone())).collect();
            self.last = Some(last.message.id.clone());
        }
        self.used = Instant::now();
        Ok(page)
    }

    /// The next few, by a consumer that may have no more than those.
    async fn chunk(&mut self, core: &Core, limit: usize, held: &AtomicU64) -> Result<Vec<DeadLetter>, Error> {
        let (session, queue) = (Arc::clone(&self.session), core.topology.dead());
        let there = session.depth(&queue).await?.0;
        let expected = usize::try_from(there).unwrap_or(usize::MAX).min(limit);
        if expected == 0 {
            return Ok(vec![]);
        }
        if self.chunks.last().is_none_or(|(_, last)| *last >= CHANNEL) {
            self.channels.push(session.channel().await?);
        }
        let (number, channel) = (self.channels.len() - 1, &self.channels[self.channels.len() - 1]);
        let tag = format!("dead-{}", self.chunks.len());
        let prefetch = u16::try_from(expected).unwrap_or(u16::MAX);
        session.asked(channel.basic_qos(prefetch, flags::WINDOW)).await?;
        let consuming = channel.basic_consume(queue.as_str().into(), tag.as_str().into(), flags::CONSUME, FieldTable::default());
        let mut consumer = session.asked(consuming).await?;
        let mut letters = Vec::with_capacity(expected);
        let (mut twice, mut last) = (Vec::new(), 0);
        while letters.len() + twice.len() < expected {
            let Ok(Some(Ok(delivery))) = timeout(Duration::from_secs(10), consumer.next()).await else { return Err(lost()) };
            last = delivery.delivery_tag;
            let letter = Envelope::read_dead(&delivery.properties, delivery.data, core.now());
            // A burial that was done twice left two: one is enough.
            match self.tags.entry(self.marks.of(&letter.message.id)) {
                Entry::Occupied(_) => twice.push(delivery.delivery_tag),
                Entry::Vacant(tag) => {
                    tag.insert((number, delivery.delivery_tag));
                    held.fetch_add(1, Ordering::Relaxed);
                    letters.push(letter);
                }
            }
        }
        self.chunks.push((number, last));
        session.asked(channel.basic_cancel(tag.as_str().into(), flags::LEAVE)).await?;
        for tag in twice {
            session.asked(channel.basic_ack(tag, flags::ACK)).await?;
        }
        Ok(letters)
    }

    /// Gives everything back, in its order, and the lock when the broker has it.
    async fn close(self, core: &Core) -> Result<(), Error> {
        let (session, queue) = (&self.session, core.topology.dead());
        let mut tags: Vec<Tag> = self.tags.values().copied().collect();
        tags.sort_unstable();
        let chunk = |tag: &Tag| self.chunks.partition_point(|last| last < tag);
        let chunks: Vec<&[Tag]> = tags.chunk_by(|one, next| chunk(one) == chunk(next)).collect();
        let mut there = session.depth(&queue).await?.0;
        // Alone, the first one waits for the acks before it, which count as well.
        let (first, rest) = chunks.split_at(chunks.len().min(1));
        for some in iter::once(first).chain(rest.chunks(CHUNKS)) {
            for chunk in some {
                let (channel, last) = *chunk.last().expect("a chunk has letters");
                session.asked(self.channels[channel].basic_nack(last, flags::GIVE_ALL_BACK)).await?;
                there += chunk.len() as u64;
            }
            let taken_back = async {
                while session.depth(&queue).await?.0 < there {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                Ok(())
            };
            timeout(Duration::from_secs(5), taken_back).await.unwrap_or(Ok(()))?;
        }
        for channel in &self.channels {
            session.asked(channel.close(200, "OK".into())).await?;
        }
        let lock = core.topology.lock("dead");
        let channel = session.channel().await?;
        session.asked(channel.queue_delete(lock.as_str().into(), flags::UNLOCK)).await?;
        session.asked(channel.close(200, "OK".into())).await
    }
}

/// Declares a queue that only this connection may have.
async fn take_lock(core: &Core, session: &Session) -> Result<(), Error> {
    let name = core.topology.lock("dead");
    let began = Instant::now();
    loop {
        let channel = session.channel().await?;
        // Refused, the broker closes the channel, and nothing else.
        if channel.queue_declare(name.as_str().into(), flags::LOCK, FieldTable::default()).await.is_ok() {
            return session.asked(channel.close(200, "OK".into())).await;
        }
        if began.elapsed() > PATIENCE {
            let what = "another replica is going through the dead letters: try again in some seconds".to_owned();
            return Err(Error::Unavailable { what, source: None });
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
