//! A queue of somebody else's: what is published there is handed over, and acked once it has been taken.
//!
//! Nothing of ours is on that broker, unless an exchange is named: then a queue of our own is bound to it. A message that is not
//! taken is kept in hand and offered again after a while, so that nothing goes round in circles on the broker; the ones behind
//! it come all the same, as far as the window reaches. What was in hand when a connection ends is delivered again.

use std::{fmt, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use lapin::{
    message::Delivery,
    options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    connect::{self, Access, Address},
    session::{in_time, unavailable},
    topology::{self, Queue},
};
use crate::Error;

/// The wait after the first failure, of a connection or of a message; it doubles with each further one.
const FIRST: Duration = Duration::from_millis(200);
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
    /// Those headers whose values are texts.
    pub headers: Vec<(String, String)>,
}

/// Takes a letter; false if it is to be offered again later.
pub type Take = Arc<dyn Fn(Letter) -> BoxFuture<'static, bool> + Send + Sync>;

impl Feed {
    /// Hands letters to `take` until `stop` is cancelled: those in hand are then left to be delivered again. All tasks of the
    /// connection run on `tracker`.
    pub async fn run(self, take: Take, tracker: TaskTracker, stop: CancellationToken) {
        let (mut failures, mut told) = (0_u32, None::<String>);
        loop {
            let mut consumed = false;
            let ended = tokio::select! {
                ended = self.consume_somewhere(&take, &tracker, &mut consumed) => ended,
                () = stop.cancelled() => return,
            };
            failures = if consumed { 0 } else { failures.saturating_add(1) };
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
                () = pause(failures) => {}
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
            let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
            let declaring = channel.queue_declare(self.queue.as_str().into(), passive, FieldTable::default());
            return in_time(declaring).await?.map(drop).map_err(trouble);
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
        in_time(channel.basic_qos(self.window, BasicQosOptions::default())).await?.map_err(trouble)?;
        // Acked by hand, when it is durable elsewhere.
        let options = BasicConsumeOptions { no_ack: false, ..BasicConsumeOptions::default() };
        let consuming = channel.basic_consume(self.queue.as_str().into(), "countersign".into(), options, FieldTable::default());
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
    let headers = properties.headers().iter().flat_map(FieldTable::inner).filter_map(|(name, value)| match value {
        AMQPValue::LongString(text) => Some((name.to_string(), text.to_string())),
        AMQPValue::ShortString(text) => Some((name.to_string(), text.to_string())),
        _ => None,
    });
    let letter = Letter {
        content_type: properties.content_type().as_ref().map(ToString::to_string),
        headers: headers.collect(),
        body: delivery.data.into(),
    };
    for failures in 1.. {
        if take(letter.clone()).await {
            break;
        }
        pause(failures).await;
    }
    if let Err(error) = delivery.acker.ack(BasicAckOptions::default()).await {
        tracing::debug!(error = &error as &dyn std::error::Error, "a message that was taken could not be acked and comes again");
    }
}

/// Grows with the failures, and differs between those who failed together.
async fn pause(failures: u32) {
    let full = FIRST.saturating_mul(1 << failures.saturating_sub(1).min(10)).min(LONGEST);
    tokio::time::sleep(full.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
}
