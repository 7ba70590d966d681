//! Reading a stream: a log on the broker, of which each record has a number that is never given again.
//!
//! Reading takes nothing away and locks nobody out. How many records there ever were is counted from mark to mark, so it goes on
//! when the broker has forgotten the oldest, and over its restarts.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use futures::StreamExt as _;
use lapin::{
    BasicProperties, Channel, Consumer,
    protocol::AMQPSoftError,
    types::{AMQPValue, FieldTable},
};
use tokio::time::{Instant, sleep, timeout};

use super::{
    envelope::{Envelope, Read},
    flags, lock,
    session::{Session, in_time, lost, unavailable},
    topology::soft_error,
};
use crate::Error;

/// How long the broker may take to answer, or to send what must be there.
const LIMIT: Duration = Duration::from_secs(10);
/// A stream that has sent nothing for so long has nothing: the broker does not say so, only when it cannot be read. Waited for
/// once a connection.
const GLANCE: Duration = Duration::from_secs(1);
/// Records that the broker may send ahead when its last ones are asked for.
const TAIL: u16 = 64;
/// And when many are counted.
const AHEAD: u16 = 512;

/// Where to begin.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place {
    /// At the record with this number, or the first there is after it.
    At(u64),
    /// With the last few.
    Last,
}

pub(super) struct Record {
    pub number: u64,
    delivery: lapin::message::Delivery,
}

impl Record {
    pub fn read(self, now: jiff::Timestamp) -> Envelope {
        Envelope::read(&self.delivery.properties, self.delivery.data, now)
    }
}

/// A consumer on a channel of its own, which goes with it.
pub(super) struct Reader {
    session: Arc<Session>,
    stream: String,
    channel: Channel,
    consumer: Consumer,
    window: u16,
    /// Records that the broker was not told of yet that we have them.
    had: u16,
}

impl Reader {
    /// The broker sends at most `window` records ahead.
    pub async fn open(session: &Arc<Session>, stream: &str, place: Place, window: u16) -> Result<Self, Error> {
        let channel = session.channel().await?;
        let mut arguments = FieldTable::default();
        let place = match place {
            Place::At(number) => AMQPValue::LongLongInt(number.cast_signed()),
            Place::Last => AMQPValue::LongString("last".into()),
        };
        arguments.insert("x-stream-offset".into(), place);
        let consuming = async {
            // Streams are not read without a limit.
            channel.basic_qos(window, flags::WINDOW).await?;
            channel.basic_consume(stream.into(), "reader".into(), flags::CONSUME, arguments).await
        };
        let consumer = answered(session, consuming).await?;
        Ok(Self { session: Arc::clone(session), stream: stream.to_owned(), channel, consumer, window, had: 0 })
    }

    /// The next record; `None` if there is none after so long.
    pub async fn next(&mut self, patience: Duration) -> Result<Option<Record>, Error> {
        let delivery = match timeout(patience, self.consumer.next()).await {
            Err(_) => return Ok(None),
            Ok(Some(Ok(delivery))) => delivery,
            Ok(Some(Err(error))) => return Err(unavailable(format!("{} could not be read on", self.stream), error)),
            Ok(None) => return Err(lost()),
        };
        self.had += 1;
        if self.had >= self.window.div_ceil(2) {
            self.had = 0;
            let told = self.channel.basic_ack(delivery.delivery_tag, flags::ACK_ALL);
            answered(&self.session, told).await?;
        }
        let number = Read::new(&delivery.properties).number("x-stream-offset");
        Ok(Some(Record { number, delivery }))
    }

    /// The next record, which is there.
    pub async fn expect(&mut self) -> Result<Record, Error> {
        self.next(LIMIT).await?.ok_or_else(|| self.silent())
    }

    /// When this returns, all that the broker sent before is here: it sends in order.
    async fn catch_up(&self) -> Result<(), Error> {
        // The count in its answer is seconds old.
        let asking = self.channel.queue_declare(self.stream.as_str().into(), flags::LOOK_AT_QUEUE, FieldTable::default());
        answered(&self.session, asking).await.map(drop)
    }

    fn silent(&self) -> Error {
        let what = format!("the broker has sent nothing of {} for {} s", self.stream, LIMIT.as_secs());
        Error::Unavailable { what, source: None }
    }
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader").field("stream", &self.stream).finish_non_exhaustive()
    }
}

/// What goes wrong here ends the channel, and the session only if the stream is gone: the next one declares it again.
async fn answered<T>(session: &Session, answer: impl Future<Output = lapin::Result<T>>) -> Result<T, Error> {
    in_time(answer).await?.map_err(|error| {
        let is_gone = soft_error(&error) == Some(AMQPSoftError::NOTFOUND);
        let error = unavailable("a stream of the broker cannot be read", error);
        if is_gone {
            session.fail(&error);
        }
        error
    })
}

/// A place in a stream, and how many records were before it: fewer than its number, because the broker takes a number for
/// itself with each segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Mark {
    /// The number of the record at that place, or that the next one will have at least.
    pub end: u64,
    pub count: u64,
}

impl Mark {
    /// As a record has it with it; nothing that cannot be.
    fn of(record: &Record) -> Self {
        let headers = Read::new(&record.delivery.properties);
        let mark = Self { end: headers.number("counted-to"), count: headers.number("counted") };
        if mark.count <= mark.end && mark.end <= record.number { mark } else { Self::default() }
    }
}

/// How many records a stream ever had.
///
/// The broker does not say, and forgets the oldest. So each record has the newest [`Mark`] of its sender with it, and whoever
/// counts goes on from the newest that it finds at the end of the stream. Senders count every few seconds, so that is not far;
/// only if the broker forgot what nobody had counted is it guessed, by numbers.
#[derive(Debug, Default)]
pub(super) struct Counter {
    /// What waits for the first record of a stream that was empty.
    waiting: tokio::sync::Mutex<Option<Reader>>,
    known: Mutex<Known>,
}

/// What is known for certain.
#[derive(Debug, Default)]
struct Known {
    /// A broker may come back with nothing: what is known is of one connection.
    session: u64,
    /// How often was looked.
    looks: u64,
    /// What was seen then.
    mark: Mark,
    /// And was confirmed to us since.
    more: u64,
    /// A connection before this one found something: that there is nothing now is believed later.
    was_more: bool,
}

/// When a record was sent, and what was known then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sent {
    session: u64,
    looks: u64,
    mark: Mark,
}

impl Sent {
    /// The record's properties, with the mark.
    pub fn stamp(self, properties: BasicProperties) -> BasicProperties {
        let mut headers = properties.headers().clone().unwrap_or_default();
        for (name, number) in [("counted-to", self.mark.end), ("counted", self.mark.count)] {
            headers.insert(name.into(), AMQPValue::LongLongInt(number.cast_signed()));
        }
        properties.with_headers(headers)
    }
}

impl Counter {
    /// Before a record is sent.
    pub fn sending(&self, session: &Session) -> Sent {
        self.known(session.number).sending()
    }

    /// It was confirmed. What was sent before the last look may have been seen there.
    pub fn confirmed(&self, sent: Sent) {
        let mut known = lock(&self.known);
        if known.sending() == sent {
            known.more += 1;
        }
    }

    /// Whether something was sent since the last look that others would have to count, and nobody here counts now.
    pub fn is_behind(&self, session: &Session) -> bool {
        self.waiting.try_lock().is_ok() && self.known(session.number).more > 0
    }

    /// Includes all that was confirmed to this process before. What is read may be a copy that is a moment behind, so that is
    /// waited for.
    pub async fn total(&self, session: &Arc<Session>, stream: &str) -> Result<Mark, Error> {
        let mut waiting = self.waiting.lock().await;
        let began = Instant::now();
        loop {
            let (known, least, patience) = {
                let known = self.known(session.number);
                let least = known.mark.count + known.more;
                let patience = match (least > 0, known.was_more) {
                    (true, _) => LIMIT,
                    (false, true) => 3 * GLANCE,
                    (false, false) => GLANCE,
                };
                (known.mark, least, patience)
            };
            let mark = look(session, stream, &mut waiting, known, patience).await?;
            if mark.count == 0 {
                self.known(session.number).was_more = false;
            }
            if mark.count >= least {
                let mut known = self.known(session.number);
                known.looks += 1;
                known.more = (known.mark.count + known.more).saturating_sub(mark.count);
                known.mark = mark;
                return Ok(mark);
            }
            if began.elapsed() > LIMIT {
                let what = format!("{stream} has {} records, and {least} were confirmed", mark.count);
                return Err(Error::Unavailable { what, source: None });
            }
            sleep(Duration::from_millis(5)).await;
        }
    }

    fn known(&self, session: u64) -> MutexGuard<'_, Known> {
        let mut known = lock(&self.known);
        if known.session < session {
            let was_more = known.was_more || known.mark.count + known.more > 0;
            *known = Known { session, was_more, ..Known::default() };
        }
        known
    }
}

impl Known {
    fn sending(&self) -> Sent {
        Sent { session: self.session, looks: self.looks, mark: self.mark }
    }
}

/// Counts on from what is known, or from a later mark.
async fn look(
    session: &Arc<Session>,
    stream: &str,
    waiting: &mut Option<Reader>,
    known: Mark,
    patience: Duration,
) -> Result<Mark, Error> {
    let (mut reader, patience) = match waiting.take().filter(|reader| reader.session.number == session.number) {
        // It has waited already, unless there is news.
        Some(reader) => (reader, if patience > GLANCE { patience } else { Duration::ZERO }),
        None => (Reader::open(session, stream, Place::Last, TAIL).await?, patience),
    };
    reader.catch_up().await?;
    let Some(first) = reader.next(patience).await? else {
        if known.count > 0 {
            return Err(reader.silent());
        }
        *waiting = Some(reader);
        return Ok(known);
    };
    let (mut mark, mut numbers) = (known.max(Mark::of(&first)), vec![first.number]);
    // The broker sends all that is there at once, as far as it may.
    loop {
        reader.catch_up().await?;
        let before = numbers.len();
        while let Some(next) = reader.next(Duration::ZERO).await? {
            mark = mark.max(Mark::of(&next));
            numbers.push(next.number);
        }
        if numbers.len() - before < usize::from(TAIL / 2) {
            break;
        }
    }
    let last = *numbers.last().expect("there is the first");
    if mark.end < first.number {
        let mut reader = Reader::open(session, stream, Place::At(mark.end), AHEAD).await?;
        let mut number = reader.expect().await?.number;
        // Forgotten, and counted by nobody.
        mark.count += number.saturating_sub(mark.end + 1);
        while number < first.number {
            mark.count += 1;
            number = reader.expect().await?.number;
        }
        mark.end = first.number;
    }
    let count = mark.count + numbers.iter().filter(|number| **number >= mark.end).count() as u64;
    Ok(Mark { end: mark.end.max(last + 1), count })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_confirmed_since_the_last_look_is_known_to_be_there() {
        let counter = Counter::default();
        let sent = |session| counter.known(session).sending();
        let (one, other) = (sent(1), sent(1));
        counter.confirmed(one);
        assert_eq!(counter.known(1).more, 1);
        {
            let mut known = counter.known(1);
            known.looks += 1;
            (known.mark, known.more) = (Mark { end: 3, count: 2 }, 0);
        }
        counter.confirmed(other);
        assert_eq!(counter.known(1).more, 0, "the look has counted it");
        let before = sent(1);
        counter.confirmed(before);
        assert_eq!(counter.known(1).more, 1);
        assert_eq!(sent(2).mark, Mark::default(), "the broker may have lost its disk");
        counter.confirmed(before);
        assert_eq!(counter.known(2).more, 0);
    }
}
