//! A queue of somebody else's: what is published there is handed over, and acked once it has been taken.
//!
//! Nothing of ours is on that broker, unless an exchange is named: then a queue of our own is bound to it. A message that is not
//! taken is kept in hand and offered again after a while, so that nothing goes round in circles on the broker; the ones behind
//! it come all the same, as far as the window reaches. What was in hand when a connection ends is delivered again.

use std::{fmt, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use jiff::Timestamp;
use lapin::{
    message::Delivery,
    types::{AMQPValue, FieldTable},
};
use tokio::time::{Instant, sleep};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    backoff::Backoff,
    connect::{self, Access, Address},
    flags,
    session::{in_time, unavailable},
    topology::{self, Queue},
};
use crate::Error;

/// The longest wait after a failure, of a connection or of a message.
const LONGEST: Duration = Duration::from_secs(10);

/// What is consumed, and how.
#[derive(Clone)]
pub struct Feed {
    /// Asked at each connect.
    pub access: Arc<dyn Fn() -> Result<Access, String> + Send + Sync>,
    pub queue: String,
    /// An exchange and a routing key: `queue` is then declared, a durable quorum queue, and bound. Otherwise it has to be there.
    pub exchange: Option<(String, String)>,
    /// Messages that may be in hand at once.
    pub window: u16,
    /// The connection's name, for the broker's administrator.
    pub name: String,
}

impl fmt::Debug for Feed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Feed").field("queue", &self.queue).field("exchange", &self.exchange).finish_non_exhaustive()
    }
}

/// A message of somebody else's.
#[derive(Debug, Clone)]
pub struct Letter {
    pub body: Bytes,
    pub content_type: Option<String>,
    /// Those headers whose values are texts, and times as RFC 3339 has them.
    pub headers: Vec<(String, String)>,
}

/// Takes a letter; false if it is to be offered again later.
pub type Take = Arc<dyn Fn(Letter) -> BoxFuture<'static, bool> + Send + Sync>;

impl Feed {
    /// Hands letters to `take` until `stop` is cancelled: those in hand are then left to be delivered again. All tasks of the
    /// connection run on `tracker`.
    pub async fn run(self, take: Take, tracker: TaskTracker, stop: CancellationToken) {
        let (mut backoff, mut told) = (Backoff::new(LONGEST), None::<String>);
        loop {
            let (began, mut consumed) = (Instant::now(), false);
            let ended = tokio::select! {
                ended = self.consume_somewhere(&take, &tracker, &mut consumed) => ended,
                () = stop.cancelled() => return,
            };
            let trouble = ended.to_string();
            if consumed || told.as_ref() != Some(&trouble) {
                tracing::warn!(
                    queue = self.queue,
                    error = &ended as &dyn std::error::Error,
                    "no events come from this queue, trying on"
                );
                told = Some(trouble);
            }
            tokio::select! {
                () = sleep(backoff.ended(began.elapsed())) => {}
                () = stop.cancelled() => return,
            }
        }
    }

    /// Whether a broker can be reached, and has the queue; one that would be declared need not be there yet. Changes nothing.
    pub async fn look(&self) -> Result<(), Error> {
        let access = (self.access)().map_err(|what| Error::Unavailable { what, source: None })?;
        let (cut, tracker) = (CancellationToken::new(), TaskTracker::new());
        let _guard = cut.clone().drop_guard();
        let mut last = Error::Unavailable { what: "no URL of a broker is configured".to_owned(), source: None };
        for address in connect::addresses(&access)? {
            let (connection, _) = match connect::open(&address, &self.name, &tracker, &cut).await {
                Ok(connection) => connection,
                Err(error) => {
                    last = error;
                    continue;
                }
            };
            if self.exchange.is_some() {
                return Ok(());
            }
            let trouble = |error| unavailable(format!("the queue {} cannot be consumed", self.queue), error);
            let channel = in_time(connection.create_channel()).await?.map_err(trouble)?;
            let looking = channel.queue_declare(self.queue.as_str().into(), flags::LOOK_AT_QUEUE, FieldTable::default());
            return in_time(looking).await?.map(drop).map_err(trouble);
        }
        Err(last)
    }

    /// The brokers in turn. Ends with the last one's trouble, or when a connection that worked is over.
    async fn consume_somewhere(&self, take: &Take, tracker: &TaskTracker, consumed: &mut bool) -> Error {
        let mut last = Error::Unavailable { what: "no URL of a broker is configured".to_owned(), source: None };
        let access = (self.access)().map_err(|what| Error::Unavailable { what, source: None });
        let addresses = match access.and_then(|access| connect::addresses(&access)) {
            Ok(addresses) => addresses,
            Err(error) => return error,
        };
        for address in &addresses {
            match self.consume(address, take, tracker, consumed).await {
                Ok(never) => match never {},
                Err(error) => last = error,
            }
            if *consumed {
                break;
            }
        }
        last
    }

    async fn consume(
        &self,
        address: &Address,
        take: &Take,
        tracker: &TaskTracker,
        consumed: &mut bool,
    ) -> Result<std::convert::Infallible, Error> {
        let cut = CancellationToken::new();
        let _guard = cut.clone().drop_guard();
        let (connection, _) = connect::open(address, &self.name, tracker, &cut).await?;
        let trouble = |error| unavailable(format!("the queue {} cannot be consumed", self.queue), error);
        let channel = in_time(connection.create_channel()).await?.map_err(trouble)?;
        if let Some((exchange, key)) = &self.exchange {
            // It is not gone with us: what is published while nobody runs here waits.
            topology::declare_queue(&channel, Queue::durable(&self.queue)).await?;
            topology::bind(&channel, exchange, key, &self.queue).await?;
        }
        in_time(channel.basic_qos(self.window, flags::WINDOW)).await?.map_err(trouble)?;
        let (queue, tag) = (self.queue.as_str().into(), "countersign".into());
        let consuming = channel.basic_consume(queue, tag, flags::CONSUME, FieldTable::default());
        let mut letters = in_time(consuming).await?.map_err(trouble)?;
        tracing::info!(queue = self.queue, "events come from this queue");
        *consumed = true;
        let mut in_hand = FuturesUnordered::new();
        loop {
            tokio::select! {
                letter = letters.next() => match letter {
                    Some(Ok(delivery)) => in_hand.push(hand_over(delivery, take)),
                    Some(Err(error)) => return Err(trouble(error)),
                    None => {
                        let what = format!("the broker ended the consumer of {}", self.queue);
                        return Err(Error::Unavailable { what, source: None });
                    }
                },
                Some(()) = in_hand.next(), if !in_hand.is_empty() => {}
            }
        }
    }
}

/// Until it is taken.
async fn hand_over(delivery: Delivery, take: &Take) {
    let properties = &delivery.properties;
    let headers = properties.headers().iter().flat_map(FieldTable::inner);
    let headers = headers.filter_map(|(name, value)| Some((name.to_string(), text(value)?)));
    let letter = Letter {
        content_type: properties.content_type().as_ref().map(ToString::to_string),
        headers: headers.collect(),
        body: delivery.data.into(),
    };
    let mut backoff = Backoff::new(LONGEST);
    while !take(letter.clone()).await {
        sleep(backoff.failed()).await;
    }
    if let Err(error) = delivery.acker.ack(flags::ACK).await {
        tracing::debug!(error = &error as &dyn std::error::Error, "a message that was taken could not be acked and comes again");
    }
}

fn text(value: &AMQPValue) -> Option<String> {
    match value {
        AMQPValue::LongString(text) => Some(text.to_string()),
        AMQPValue::ShortString(text) => Some(text.to_string()),
        // In seconds. As such RabbitMQ hands on what was sent as a time by AMQP 1.0.
        AMQPValue::Timestamp(time) => Some(Timestamp::from_second(i64::try_from(*time).ok()?).ok()?.to_string()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_read_that_are_texts_or_times() {
        for (value, expected) in [
            (AMQPValue::LongString("text".into()), Some("text")),
            (AMQPValue::ShortString("short".into()), Some("short")),
            (AMQPValue::Timestamp(1_768_468_364), Some("2026-01-15T09:12:44Z")),
            (AMQPValue::Timestamp(u64::MAX), None),
            (AMQPValue::Boolean(true), None),
        ] {
            assert_eq!(text(&value).as_deref(), expected, "{value:?}");
        }
    }
}
