//! Dead letters: a queue that is looked through without taking anything away.
//!
//! A queue has no way to be listed but to consume it. So a cursor does that on a channel of its own and holds what it listed
//! unacked, some seconds from page to page; when it is let go of, everything is back in its place. While one is open the
//! others would see gaps: an exclusive queue is the lock between replicas.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::StreamExt as _;
use lapin::{
    BasicProperties, Channel,
    options::{
        BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions, QueueDeclareOptions,
        QueueDeleteOptions,
    },
    types::FieldTable,
};
use tokio::{
    sync::Mutex,
    time::{Instant, timeout},
};

use super::{
    Core,
    envelope::Envelope,
    session::{Session, lost},
};
use crate::{DeadLetter, Error};

/// How long a cursor stays open for the next page.
const IDLE: Duration = Duration::from_secs(5);
/// How long another replica's cursor is waited for.
const PATIENCE: Duration = Duration::from_secs(12);
/// A page has no more than this, whatever is asked for.
const PAGE: usize = 1000;
/// Nor more bytes of bodies than this and one chunk.
const PAGE_BYTES: usize = 8 * 1024 * 1024;
/// Letters that are asked for at once: what memory has to hold beyond a page.
const CHUNK: usize = 50;

#[derive(Debug, Default)]
pub(super) struct Graveyard {
    cursor: Mutex<Option<Cursor>>,
    /// Letters that a cursor of ours holds, and that the broker does not count as there.
    held: AtomicU64,
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
        self.let_go(core, place).await;
        if let Some(after) = after {
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
            None => place.insert(Cursor::open(core).await?),
        };
        let page = cursor.page(core, limit).await;
        self.held.store(cursor.tags.len() as u64, Ordering::Relaxed);
        page
    }

    /// As [`crate::Queue::replay`].
    pub async fn replay(&self, core: &Core, id: &str) -> Result<bool, Error> {
        let mut place = self.cursor.lock().await;
        if !self.find(core, &mut place, id, true).await? {
            return Ok(false);
        }
        let cursor = place.as_mut().expect("it was found by it");
        let dead = cursor.shown.get(id).expect("it was found there");
        let envelope = Envelope::new(dead.message.clone(), dead.pushed_at);
        let session = Arc::clone(&cursor.session);
        let done = core.put_off(&session, envelope, Duration::ZERO).await;
        self.take_away(core, &mut place, id, done).await
    }

    /// As [`crate::Queue::discard`]. A crash between the two steps counts it, and leaves it there.
    pub async fn discard(&self, core: &Core, id: &str) -> Result<bool, Error> {
        let mut place = self.cursor.lock().await;
        if !self.find(core, &mut place, id, false).await? {
            return Ok(false);
        }
        let cursor = place.as_mut().expect("it was found by it");
        let session = Arc::clone(&cursor.session);
        // What was discarded, without its body.
        let mut headers = FieldTable::default();
        headers.insert("id".into(), lapin::types::AMQPValue::LongString(id.into()));
        let receipt = BasicProperties::default().with_delivery_mode(2).with_headers(headers);
        let sent = core.discarded.sending(&session);
        let done = session.publish("", &core.topology.discarded(), sent.stamp(receipt), &[]).await;
        if done.is_ok() {
            core.discarded.confirmed(sent);
        }
        self.take_away(core, &mut place, id, done).await
    }

    async fn take_away(&self, core: &Core, place: &mut Option<Cursor>, id: &str, done: Result<(), Error>) -> Result<bool, Error> {
        let cursor = place.as_mut().expect("it was found by it");
        let done = match done {
            Ok(()) => cursor.ack(id).await,
            Err(error) => Err(error),
        };
        self.held.store(cursor.tags.len() as u64, Ordering::Relaxed);
        if let Err(error) = done {
            self.let_go(core, place).await;
            return Err(error);
        }
        Ok(true)
    }

    /// Goes to a letter; `whole` if its body is needed. False, and everything is let go of, if there is none.
    async fn find(&self, core: &Core, place: &mut Option<Cursor>, id: &str, whole: bool) -> Result<bool, Error> {
        if let Some(cursor) = place.as_ref().filter(|cursor| cursor.works())
            && (cursor.shown.contains_key(id) || !whole && cursor.tags.contains_key(id))
        {
            return Ok(true);
        }
        self.let_go(core, place).await;
        loop {
            match self.page(core, place, PAGE).await {
                Ok(page) if page.iter().any(|letter| letter.message.id == id) => return Ok(true),
                Ok(page) if !page.is_empty() => {}
                Ok(_) => {
                    self.let_go(core, place).await;
                    return Ok(false);
                }
                Err(error) => {
                    self.let_go(core, place).await;
                    return Err(error);
                }
            }
        }
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
        self.held.store(0, Ordering::Relaxed);
    }

    async fn let_go(&self, core: &Core, place: &mut Option<Cursor>) {
        if let Some(cursor) = place.take()
            && cursor.works()
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
    channel: Channel,
    /// What was listed and is still there.
    tags: HashMap<String, u64>,
    /// The last page.
    shown: HashMap<String, DeadLetter>,
    last: Option<String>,
    /// Consumers that there were.
    chunks: u64,
    used: Instant,
}

impl Cursor {
    async fn open(core: &Core) -> Result<Self, Error> {
        let session = core.session()?;
        take_lock(core, &session).await?;
        let channel = session.channel().await?;
        Ok(Self { session, channel, tags: HashMap::new(), shown: HashMap::new(), last: None, chunks: 0, used: Instant::now() })
    }

    fn works(&self) -> bool {
        !self.session.is_over()
    }

    async fn page(&mut self, core: &Core, limit: usize) -> Result<Vec<DeadLetter>, Error> {
        let (mut page, mut bytes) = (Vec::new(), 0);
        self.shown.clear();
        while page.len() < limit && bytes < PAGE_BYTES {
            let chunk = self.chunk(core, (limit - page.len()).min(CHUNK)).await?;
            if chunk.is_empty() {
                break;
            }
            bytes += chunk.iter().map(|letter| letter.message.body.len()).sum::<usize>();
            page.extend(chunk);
        }
        for letter in &page {
            self.shown.insert(letter.message.id.clone(), letter.clone());
        }
        if let Some(last) = page.last() {
            self.last = Some(last.message.id.clone());
        }
        self.used = Instant::now();
        Ok(page)
    }

    /// The next few, by a consumer that may have no more than those.
    async fn chunk(&mut self, core: &Core, limit: usize) -> Result<Vec<DeadLetter>, Error> {
        let (session, queue) = (Arc::clone(&self.session), core.topology.dead());
        let there = session.depth(&queue).await?.0;
        let expected = usize::try_from(there).unwrap_or(usize::MAX).min(limit);
        if expected == 0 {
            return Ok(vec![]);
        }
        // In this order they are given back.
        let tag = format!("dead-{:012}", self.chunks);
        self.chunks += 1;
        let prefetch = u16::try_from(expected).unwrap_or(u16::MAX);
        session.asked(self.channel.basic_qos(prefetch, BasicQosOptions { global: false })).await?;
        let consuming = self.channel.basic_consume(
            queue.as_str().into(),
            tag.as_str().into(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        );
        let mut consumer = session.asked(consuming).await?;
        let mut letters = Vec::with_capacity(expected);
        let mut twice = Vec::new();
        let mut seen = HashSet::new();
        while seen.len() + twice.len() < expected {
            let Ok(Some(Ok(delivery))) = timeout(Duration::from_secs(10), consumer.next()).await else { return Err(lost()) };
            let letter = Envelope::read_dead(&delivery.properties, delivery.data, core.now());
            let id = letter.message.id.clone();
            // A burial that was done twice left two: one is enough.
            if self.tags.contains_key(&id) {
                twice.push(delivery.delivery_tag);
            } else {
                self.tags.insert(id.clone(), delivery.delivery_tag);
                seen.insert(id);
                letters.push(letter);
            }
        }
        session.asked(self.channel.basic_cancel(tag.as_str().into(), BasicCancelOptions { nowait: false })).await?;
        for tag in twice {
            session.asked(self.channel.basic_ack(tag, BasicAckOptions { multiple: false })).await?;
        }
        Ok(letters)
    }

    async fn ack(&mut self, id: &str) -> Result<(), Error> {
        let tag = self.tags.remove(id).ok_or_else(lost)?;
        self.shown.remove(id);
        self.used = Instant::now();
        self.session.asked(self.channel.basic_ack(tag, BasicAckOptions { multiple: false })).await
    }

    /// Gives everything back, in its order, and the lock when the broker has it.
    async fn close(self, core: &Core) -> Result<(), Error> {
        let (session, queue) = (&self.session, core.topology.dead());
        if let Some(last) = self.tags.values().max() {
            session.asked(self.channel.basic_nack(*last, BasicNackOptions { multiple: true, requeue: true })).await?;
        }
        let back = self.tags.len() as u64;
        let settled = async {
            // The broker takes it back some time after it has heard it.
            while session.depth(&queue).await?.0 < back {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            Ok(())
        };
        timeout(Duration::from_secs(5), settled).await.unwrap_or(Ok(()))?;
        session.asked(self.channel.close(200, "OK".into())).await?;
        let lock = core.topology.lock("dead");
        let channel = session.channel().await?;
        session.asked(channel.queue_delete(lock.as_str().into(), QueueDeleteOptions::default())).await?;
        session.asked(channel.close(200, "OK".into())).await
    }
}

/// Declares a queue that only this connection may have.
async fn take_lock(core: &Core, session: &Session) -> Result<(), Error> {
    let name = core.topology.lock("dead");
    let began = Instant::now();
    loop {
        let channel = session.channel().await?;
        let options = QueueDeclareOptions { exclusive: true, auto_delete: false, ..QueueDeclareOptions::default() };
        // Refused, the broker closes the channel, and nothing else.
        if channel.queue_declare(name.as_str().into(), options, FieldTable::default()).await.is_ok() {
            return session.asked(channel.close(200, "OK".into())).await;
        }
        if began.elapsed() > PATIENCE {
            let what = "another replica is going through the dead letters: try again in some seconds".to_owned();
            return Err(Error::Unavailable { what, source: None });
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
