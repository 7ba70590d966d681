//! Keeps a connection, and does everything that happens on it unasked.

use std::{error::Error as StdError, sync::Arc, time::Duration};

use futures::{
    StreamExt as _,
    future::{BoxFuture, try_join_all},
    stream::FuturesUnordered,
};
use lapin::message::Delivery;
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, interval},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Core,
    backoff::Backoff,
    connect,
    envelope::Envelope,
    inbox::Held,
    layouts, lock,
    session::{Session, Source},
    settle::Chore,
    shares, stats, unanswered,
};
use crate::Error;

/// The longest wait for the next connection.
const LONGEST: Duration = Duration::from_secs(5);

type Running = FuturesUnordered<BoxFuture<'static, ()>>;

/// Until `stop` is cancelled and nothing is in hand. `opened` is told how the first attempt went.
pub(super) async fn run(
    core: Arc<Core>,
    mut chores: mpsc::UnboundedReceiver<Chore>,
    stop: CancellationToken,
    tracker: TaskTracker,
    opened: oneshot::Sender<Result<(), Error>>,
) {
    let mut opened = Some(opened);
    let (mut backoff, mut is_known) = (Backoff::new(LONGEST), false);
    let mut running = Running::new();
    for number in 1.. {
        let began = Instant::now();
        let connecting = connect(&core, number, is_known, &tracker);
        let Some(connected) = idle(&core, &mut chores, &mut running, &stop, connecting).await else { return };
        match connected {
            Ok(session) => {
                *lock(&core.trouble) = None;
                core.session.send_replace(Some(Arc::clone(&session)));
                if let Some(opened) = opened.take() {
                    let _ = opened.send(Ok(()));
                } else {
                    tracing::info!("connected to the broker");
                }
                is_known = true;
                let over = Box::pin(live(&core, &session, &mut chores, &mut running, &stop)).await;
                core.session.send_replace(None);
                core.unanswered.keep(None).await;
                session.end().await;
                drop(core.inbox.take_all());
                core.inbox.lose_sources();
                core.forget_others();
                // Whoever holds what is to be forgotten may be one of those that are running.
                if over || idle(&core, &mut chores, &mut running, &stop, core.graveyard.forget()).await.is_none() {
                    return;
                }
            }
            Err(error) => {
                let trouble = explain(&error);
                if lock(&core.trouble).replace(trouble.clone()).as_ref() != Some(&trouble) {
                    tracing::warn!(error = &error as &dyn StdError, "no connection to the broker, trying on");
                }
                if let Some(opened) = opened.take() {
                    let fatal = matches!(error, Error::Mismatch { .. });
                    // Whoever opened the queue may have it by now, and is told by each refused push.
                    if opened.send(Err(error)).is_ok() && fatal {
                        return;
                    }
                }
            }
        }
        let pause = tokio::time::sleep(backoff.ended(began.elapsed()));
        if idle(&core, &mut chores, &mut running, &stop, pause).await.is_none() {
            return;
        }
    }
}

/// The brokers in turn, each time beginning with another.
async fn connect(core: &Core, number: u64, is_known: bool, tracker: &TaskTracker) -> Result<Arc<Session>, Error> {
    let access = (core.options.access)().map_err(|what| Error::Unavailable { what, source: None })?;
    let mut addresses = connect::addresses(&access)?;
    let first = usize::try_from(number - 1).unwrap_or_default() % addresses.len();
    addresses.rotate_left(first);
    let mut last = None;
    for address in &addresses {
        match Session::open(number, is_known, address, &core.options.replica, &core.topology, tracker).await {
            Ok(session) => match begin(core, &session).await {
                Ok(()) => return Ok(session),
                Err(error) => {
                    session.end().await;
                    last = Some(error);
                }
            },
            // Another broker of the cluster says the same.
            Err(error @ Error::Mismatch { .. }) => return Err(error),
            Err(error) => last = Some(error),
        }
    }
    Err(last.unwrap_or_else(super::session::lost))
}

async fn begin(core: &Core, session: &Session) -> Result<(), Error> {
    if core.consumes() {
        session.consume(Source::Stray, &core.topology.stray(), core.options.window).await?;
        for (route, queue) in core.topology.layout().queues() {
            session.consume(Source::Partition { route }, &queue.name, core.options.window).await?;
        }
    }
    match layouts::look(core, session).await {
        Err(error) if session.is_over() => Err(error),
        // A broker that takes no messages now has work for us all the same.
        Err(_) | Ok(()) => Ok(()),
    }
}

/// As long as the connection holds. True if it is the end of all.
async fn live(
    core: &Arc<Core>,
    session: &Arc<Session>,
    chores: &mut mpsc::UnboundedReceiver<Chore>,
    running: &mut Running,
    stop: &CancellationToken,
) -> bool {
    let receive = session.receive(|source, delivery| arrive(core, session, source, delivery));
    let mut beat = interval(stats::BEAT);
    let reports = stats::listen(core, session);
    let others = layouts::watch(core, session);
    let sharing = shares::watch(core, session);
    let mut unanswered = Box::pin(unanswered::watch(core, session));
    tokio::pin!(receive, reports, others, sharing);
    let mut receiving = true;
    let finished = async {
        stop.cancelled().await;
        core.inbox.close();
        core.inbox.empty().await;
    };
    tokio::pin!(finished);
    loop {
        tokio::select! {
            () = session.failed() => return false,
            () = &mut receive, if receiving => receiving = false,
            task = chores.recv() => {
                if let Some(task) = task {
                    start(core, Some(session), task, running);
                }
            }
            Some(()) = running.next(), if !running.is_empty() => {}
            _ = beat.tick() => running.push(Box::pin(stats::report(Arc::clone(core), Arc::clone(session)))),
            () = &mut reports => {}
            () = &mut others => {}
            () = &mut sharing => {}
            () = &mut unanswered => {}
            () = &mut finished => {
                if !session.is_closing() {
                    let (core, session) = (Arc::clone(core), Arc::clone(session));
                    running.push(Box::pin(async move { close(&core, &session).await }));
                }
                // It may have to wait for another of them.
                while running.next().await.is_some() {}
                chores.close();
                while let Some(task) = chores.recv().await {
                    start(core, Some(session), task, running);
                }
                while running.next().await.is_some() {}
                return true;
            }
        }
    }
}

/// Waits without a connection. `None` if it is the end of all.
async fn idle<T>(
    core: &Arc<Core>,
    chores: &mut mpsc::UnboundedReceiver<Chore>,
    running: &mut Running,
    stop: &CancellationToken,
    until: impl Future<Output = T>,
) -> Option<T> {
    tokio::pin!(until);
    loop {
        tokio::select! {
            done = &mut until => return Some(done),
            () = stop.cancelled() => return None,
            task = chores.recv() => {
                if let Some(task) = task {
                    start(core, None, task, running);
                }
            }
            Some(()) = running.next(), if !running.is_empty() => {}
        }
    }
}

fn start(core: &Arc<Core>, session: Option<&Arc<Session>>, task: Chore, running: &mut Running) {
    let core = Arc::clone(core);
    match task {
        Chore::Settle(held, settlement, reply) => {
            running.push(Box::pin(async move { core.settle(held, settlement, reply).await }));
        }
        Chore::Close(done) => {
            let session = session.cloned();
            running.push(Box::pin(async move {
                if let Some(session) = session {
                    close(&core, &session).await;
                }
                // They may have gone away.
                let _ = done.send(());
            }));
        }
        task => running.push(Box::pin(async move { core.chore(task).await })),
    }
}

/// Lets the other replicas have each partition as soon as nothing of it is in hand.
async fn close(core: &Core, session: &Session) {
    let releasing = session.consume_no_more().into_iter().map(|number| shares::release(core, session, number));
    // What could not be released is, with the connection.
    let _ = try_join_all(releasing).await;
}

/// Takes what the broker delivered.
pub(super) fn arrive(core: &Core, session: &Session, source: usize, delivery: Delivery) {
    let envelope = Envelope::read(&delivery.properties, delivery.data, core.now());
    let (redelivered, acker) = (delivery.redelivered, delivery.acker);
    let held = Held { envelope, source, redelivered, acker, session: session.number, lost: session.cut(), number: 0 };
    session.is_ours(source);
    core.no_longer_waiting(&held.envelope);
    let tasks = if let Some(settlement) = core.remembered(&held) {
        vec![Chore::Carry(held, settlement)]
    } else if held.envelope.left > 0 {
        vec![Chore::Wait(held)]
    } else if matches!(session.source(source), Some(Source::Stray | Source::Drained { .. })) {
        vec![Chore::Reroute(held)]
    } else {
        core.inbox.arrive(held).into_iter().map(Chore::Move).collect()
    };
    for task in tasks {
        core.moves.begin();
        // We are the supervisor that takes them.
        let _ = core.chores.send(task);
    }
}

/// With its causes, for whoever asks why.
fn explain(error: &Error) -> String {
    let mut text = match error {
        Error::Unavailable { what, .. } => what.clone(),
        error => error.to_string(),
    };
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}
