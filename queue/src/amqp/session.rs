//! One life of the connections to the broker. Whatever goes wrong ends it as a whole, and a new one begins.
//!
//! Two connections: the broker stops reading from one that publishes while memory or disk are short
//! (`connection.blocked`), and acks must go through all the same.

use std::{
    collections::HashSet,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use futures::{StreamExt as _, stream::SelectAll};
use lapin::{Channel, Connection, Consumer, Event, types::FieldTable};
use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep_until, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

mod publish;

pub(super) use self::publish::Word;
use super::{
    connect::{self, Address},
    flags,
    returns::Returns,
    topology::{self, Layout, Topology},
};
use crate::Error;

/// How long the broker may take to confirm a message, or to answer.
const LIMIT: Duration = Duration::from_secs(10);

pub(super) struct Session {
    pub number: u64,
    /// Tells it from every other session of any replica.
    pub mark: u64,
    began: Instant,
    publishing: Connection,
    consuming: Connection,
    publish: Channel,
    /// What is published there may come back.
    probing: Channel,
    returns: Returns,
    pub consume: Channel,
    /// Cancelled when anything is wrong, and at the end.
    cut: CancellationToken,
    /// Why the broker takes no messages.
    blocked: watch::Sender<Option<String>>,
    sources: Mutex<Sources>,
    /// Those that are on the broker beside the configured one.
    layouts: Mutex<Vec<Layout>>,
    /// The receiver has to look at the sources again.
    changed: Notify,
    reported: AtomicBool,
    /// Since when the other replicas are heard.
    hears_since: OnceLock<Instant>,
    /// Nothing is consumed any more.
    closing: AtomicBool,
}

/// A queue that is consumed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// A partition of the configured layout, by its routing key.
    Partition { route: String },
    /// A partition of another layout: what is in it goes to the configured one.
    Drained { route: String },
    /// What came back to a layout that is gone.
    Stray,
}

#[derive(Default)]
struct Sources {
    /// Their places are the numbers that deliveries are known by.
    all: Vec<Source>,
    /// Those whose consumers end because we want it.
    left: HashSet<usize>,
    /// Those that something was delivered from. Whoever is a queue's single active consumer stays that as long as it consumes.
    active: HashSet<usize>,
    consumers: SelectAll<Numbered>,
}

/// A consumer's deliveries with its source's number.
type Numbered = futures::stream::BoxStream<'static, (usize, Option<lapin::Result<lapin::message::Delivery>>)>;

/// Waits for one answer: all of them together may take longer, as they do of a broker that is far away.
pub(super) async fn in_time<T>(answer: impl Future<Output = T>) -> Result<T, Error> {
    let late = |_| Error::Unavailable { what: format!("the broker has not answered for {} s", LIMIT.as_secs()), source: None };
    timeout(LIMIT, answer).await.map_err(late)
}

impl Session {
    /// Connects to one broker and declares everything. If it `is_known`, that ought to be there.
    pub async fn open(
        number: u64,
        is_known: bool,
        address: &Address,
        name: &str,
        topology: &Topology,
        tracker: &TaskTracker,
    ) -> Result<Arc<Self>, Error> {
        let cut = CancellationToken::new();
        // Whatever was begun ends with an error in here.
        let guard = cut.clone().drop_guard();
        let opening = async {
            let (consuming, _) = connect::open(address, name, tracker, &cut).await?;
            let (publishing, returns) = connect::open(address, name, tracker, &cut).await?;
            let open = |error| unavailable("the broker opened no channel", error);
            let consume = in_time(consuming.create_channel()).await?.map_err(open)?;
            let publish = in_time(publishing.create_channel()).await?.map_err(open)?;
            let probing = in_time(publishing.create_channel()).await?.map_err(open)?;
            for channel in [&publish, &probing] {
                in_time(channel.confirm_select(flags::CONFIRM)).await?.map_err(open)?;
            }
            if is_known && topology::is_bare(&in_time(consuming.create_channel()).await?.map_err(open)?, topology).await? {
                tracing::error!(
                    broker = address.shown(),
                    "the broker came back without anything of ours, as with an empty disk: what was queued there, dead letters and \
                     the past are lost, and the totals begin anew. It is set up again; what the registry got since the oldest \
                     event that was still queued may be unsigned: have it sent again, or sign it by hand"
                );
            }
            topology::declare(&consume, topology).await?;
            Ok(((consuming, consume), (publishing, publish, probing, returns)))
        };
        let ((consuming, consume), (publishing, publish, probing, returns)) = opening.await.map_err(|error| match error {
            Error::Unavailable { what, source } if !what.contains(&address.shown()) => {
                Error::Unavailable { what: format!("{}: {what}", address.shown()), source }
            }
            error => error,
        })?;
        guard.disarm();
        let session = Arc::new(Self {
            number,
            mark: fastrand::u64(..),
            began: Instant::now(),
            publishing,
            consuming,
            publish,
            probing,
            returns,
            consume,
            cut,
            blocked: watch::Sender::new(None),
            sources: Mutex::default(),
            layouts: Mutex::default(),
            changed: Notify::new(),
            reported: AtomicBool::new(false),
            hears_since: OnceLock::new(),
            closing: AtomicBool::new(false),
        });
        for events in [session.publishing.events_listener().boxed(), session.consuming.events_listener().boxed()] {
            tracker.spawn(watch_events(Arc::clone(&session), events));
        }
        Ok(session)
    }

    /// Begins to consume a queue; at most `window` of its messages are unsettled here.
    pub async fn consume(&self, source: Source, queue: &str, window: u16) -> Result<(), Error> {
        let number = {
            let mut sources = self.sources();
            sources.all.push(source);
            sources.all.len() - 1
        };
        let consuming = async {
            self.consume.basic_qos(window, flags::WINDOW).await?;
            self.consume.basic_consume(queue.into(), tag(number).into(), flags::CONSUME, FieldTable::default()).await
        };
        let consumer: Consumer = self.asked(consuming).await?;
        let deliveries = consumer.map(move |delivery| (number, Some(delivery)));
        // Its end is something to hear of.
        let end = futures::stream::once(async move { (number, None) });
        self.sources().consumers.push(deliveries.chain(end).boxed());
        self.changed.notify_one();
        // It was begun while the others were ended.
        if self.is_closing() { self.leave(number).await } else { Ok(()) }
    }

    /// Ends one consumer; what was delivered stays.
    pub async fn leave(&self, number: usize) -> Result<(), Error> {
        {
            let mut sources = self.sources();
            sources.left.insert(number);
            sources.active.remove(&number);
        }
        self.asked(self.consume.basic_cancel(tag(number).into(), flags::LEAVE)).await
    }

    /// Begins to end all consumers, and no more are begun: their numbers.
    pub fn consume_no_more(&self) -> Vec<usize> {
        self.closing.store(true, Ordering::Relaxed);
        let sources = self.sources();
        (0..sources.all.len()).filter(|number| !sources.left.contains(number)).collect()
    }

    /// The consumer of a queue, if there is one.
    pub fn number_of(&self, source: &Source) -> Option<usize> {
        let sources = self.sources();
        (0..sources.all.len()).find(|number| sources.all[*number] == *source && !sources.left.contains(number))
    }

    pub fn source(&self, number: usize) -> Option<Source> {
        self.sources().all.get(number).cloned()
    }

    /// Something was delivered from this source: it is ours.
    pub fn is_ours(&self, number: usize) {
        let mut sources = self.sources();
        if !sources.left.contains(&number) {
            sources.active.insert(number);
        }
    }

    /// Sources whose messages come to us and to nobody else.
    pub fn ours(&self) -> Vec<usize> {
        if self.is_closing() { vec![] } else { self.sources().active.iter().copied().collect() }
    }

    pub fn all_sources(&self) -> Vec<Source> {
        self.sources().all.clone()
    }

    /// Layouts that are on the broker beside the configured one, as far as they are known.
    pub fn layouts(&self) -> Vec<Layout> {
        self.layouts.lock().expect("nothing panics while it holds the layouts").clone()
    }

    /// There is another layout.
    pub fn learn(&self, layout: Layout) {
        self.layouts.lock().expect("nothing panics while it holds the layouts").push(layout);
    }

    /// Hands over what has arrived, for ever. Ends when a consumer does.
    pub async fn receive(&self, mut take: impl FnMut(usize, lapin::message::Delivery)) {
        loop {
            let changed = self.changed.notified();
            let ended = futures::future::poll_fn(|context| self.poll_arrived(context, &mut take));
            tokio::select! {
                () = changed => {}
                () = ended => return,
            }
        }
    }

    /// Hands over what has arrived by now.
    pub fn gather(&self, mut take: impl FnMut(usize, lapin::message::Delivery)) {
        let _ = self.poll_arrived(&mut Context::from_waker(Waker::noop()), &mut take);
        // The receiver was the one to be woken.
        self.changed.notify_one();
    }

    fn poll_arrived(&self, context: &mut Context<'_>, take: &mut impl FnMut(usize, lapin::message::Delivery)) -> Poll<()> {
        let (mut arrived, mut end) = (Vec::new(), Poll::Pending);
        let mut sources = self.sources();
        // Without consumers there is nothing to wait for.
        while let Poll::Ready(Some((number, delivery))) = sources.consumers.poll_next_unpin(context) {
            match delivery {
                Some(Ok(delivery)) => arrived.push((number, delivery)),
                Some(Err(error)) => {
                    self.fail(&unavailable("a consumer ended", error));
                    end = Poll::Ready(());
                }
                None if sources.left.contains(&number) => {}
                None => {
                    let what = match sources.all.get(number) {
                        Some(Source::Partition { route }) => format!(
                            "the broker ended the consumer of partition {route}, as it does when somebody deletes its queue, which is \
                             declared again: what was in it, and what was pushed meanwhile, is in the past alone, where \
                             `countersign queue replay --since` finds it"
                        ),
                        other => format!("the broker ended the consumer of {other:?}"),
                    };
                    self.fail(&Error::Unavailable { what, source: None });
                    end = Poll::Ready(());
                }
            }
        }
        // Whoever takes them looks at the sources.
        drop(sources);
        for (number, delivery) in arrived {
            take(number, delivery);
        }
        end
    }

    /// Messages that are ready in a queue, and its consumers.
    pub async fn depth(&self, queue: &str) -> Result<(u64, u32), Error> {
        let looking = self.consume.queue_declare(queue.into(), flags::LOOK_AT_QUEUE, FieldTable::default());
        let queue = self.asked(looking).await?;
        Ok((queue.message_count().into(), queue.consumer_count()))
    }

    /// A channel of its own, for what may fail without harm to others.
    pub async fn channel(&self) -> Result<Channel, Error> {
        self.asked(self.consuming.create_channel()).await
    }

    /// Waits for an answer of the broker's, for as long as the session lives and not too long.
    pub async fn asked<T>(&self, answer: impl Future<Output = lapin::Result<T>>) -> Result<T, Error> {
        tokio::select! {
            biased;
            answer = in_time(answer) => match answer {
                Ok(Ok(answer)) => Ok(answer),
                Ok(Err(error)) => {
                    let error = unavailable("the broker ended the connection or a channel", error);
                    self.fail(&error);
                    Err(error)
                }
                Err(error) => {
                    self.fail(&error);
                    Err(error)
                }
            },
            () = self.cut.cancelled() => Err(lost()),
        }
    }

    /// Whether messages are taken now.
    pub fn blocked(&self) -> Option<String> {
        self.blocked.borrow().clone()
    }

    /// Ends the session: something is wrong.
    pub fn fail(&self, error: &Error) {
        if !self.cut.is_cancelled() && !self.reported.swap(true, Ordering::Relaxed) {
            tracing::warn!(error = error as &dyn std::error::Error, "the connection to the broker is given up");
        }
        self.cut.cancel();
    }

    /// Waits until the session is so old, or over.
    pub async fn has_lived_for(&self, age: Duration) {
        tokio::select! {
            () = sleep_until(self.began + age) => {}
            () = self.failed() => {}
        }
    }

    /// The other replicas are heard from now on.
    pub fn hears(&self) {
        let _ = self.hears_since.set(Instant::now());
    }

    /// Whether the other replicas have been heard for so long.
    pub fn has_heard_for(&self, span: Duration) -> bool {
        self.hears_since.get().is_some_and(|since| since.elapsed() >= span)
    }

    /// Cancelled when the session is over.
    pub fn cut(&self) -> CancellationToken {
        self.cut.clone()
    }

    pub async fn failed(&self) {
        self.cut.cancelled().await;
    }

    /// Nothing is consumed any more.
    pub fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Relaxed)
    }

    pub fn is_over(&self) -> bool {
        self.cut.is_cancelled()
    }

    /// Says goodbye, and lets go of the sockets.
    pub async fn end(&self) {
        self.reported.store(true, Ordering::Relaxed);
        if !self.cut.is_cancelled() {
            let goodbye = async {
                let _ = self.publishing.close(200, "OK".into()).await;
                let _ = self.consuming.close(200, "OK".into()).await;
            };
            // It makes no difference to what was agreed.
            let _ = timeout(Duration::from_secs(2), goodbye).await;
        }
        self.cut.cancel();
        self.sources().consumers.clear();
    }

    fn sources(&self) -> MutexGuard<'_, Sources> {
        self.sources.lock().expect("nothing panics while it holds the sources")
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("number", &self.number).finish_non_exhaustive()
    }
}

async fn watch_events(session: Arc<Session>, mut events: futures::stream::BoxStream<'static, Event>) {
    loop {
        let event = tokio::select! {
            () = session.cut.cancelled() => return,
            event = events.next() => event,
        };
        match event {
            Some(Event::ConnectionBlocked(reason)) => {
                tracing::warn!(reason, "the broker takes no messages");
                session.blocked.send_replace(Some(reason));
            }
            Some(Event::ConnectionUnblocked) => {
                tracing::info!("the broker takes messages again");
                session.blocked.send_replace(None);
            }
            Some(Event::Error(error)) => return session.fail(&unavailable("the connection broke", error)),
            Some(_) => {}
            None => return session.fail(&lost()),
        }
    }
}

fn tag(source: usize) -> String {
    format!("countersign-{source}")
}

pub(super) fn unavailable(what: impl Into<String>, source: lapin::Error) -> Error {
    Error::Unavailable { what: what.into(), source: Some(Box::new(source)) }
}

pub(super) fn lost() -> Error {
    Error::Unavailable { what: "there is no connection to the broker".to_owned(), source: None }
}
