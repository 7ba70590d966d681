//! From the first signal to the exit code: who is told to stop, how long it may take, and what ends the process.
//!
//! SIGTERM or SIGINT *drains*: no new events, what is in hand is finished or given back. A second one, or the end of the
//! grace period, *aborts*. SIGHUP asks for a reload. A task that ends before it was asked to takes the process down, so
//! that whatever runs the daemon starts it again, instead of half a daemon looking alive.

use std::{any::Any, error::Error, future::Future, io, panic::AssertUnwindSafe, pin::Pin, process::ExitCode, time::Duration};

use futures::{FutureExt, Stream, StreamExt, stream};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{error, info, warn};

/// How long tasks have to notice an abort.
const ABORTING: Duration = Duration::from_millis(500);

/// One process's life. Tasks are spawned on it, then it is run.
pub struct Lifecycle {
    drain: CancellationToken,
    abort: CancellationToken,
    tracker: TaskTracker,
    /// Cancelled when a task ends that should not have.
    failed: CancellationToken,
    reload: watch::Sender<u64>,
    grace: Duration,
    signals: Signals,
}

type Signals = Pin<Box<dyn Stream<Item = Signal> + Send>>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Signal {
    Stop,
    Reload,
}

impl Lifecycle {
    /// Takes the signals over from here on; before, SIGTERM ends the process as it does any other.
    ///
    /// # Errors
    /// When the system does not let handlers be set.
    pub fn install(grace: Duration) -> io::Result<Self> {
        let of = |kind, meaning| {
            let mut signals = signal(kind)?;
            io::Result::Ok(stream::poll_fn(move |cx| signals.poll_recv(cx)).map(move |()| meaning))
        };
        let stops = stream::select(of(SignalKind::terminate(), Signal::Stop)?, of(SignalKind::interrupt(), Signal::Stop)?);
        Ok(Self::new(grace, Box::pin(stream::select(stops, of(SignalKind::hangup(), Signal::Reload)?))))
    }

    fn new(grace: Duration, signals: Signals) -> Self {
        Self {
            drain: CancellationToken::new(),
            abort: CancellationToken::new(),
            tracker: TaskTracker::new(),
            failed: CancellationToken::new(),
            reload: watch::Sender::new(0),
            grace,
            signals,
        }
    }

    /// Cancelled when no more events are to be taken.
    #[must_use]
    pub fn drain(&self) -> CancellationToken {
        self.drain.clone()
    }

    /// Cancelled when even what is in hand is to be dropped. Tasks that do not watch it are dropped all the same, soon after.
    #[must_use]
    pub fn abort(&self) -> CancellationToken {
        self.abort.clone()
    }

    /// Changes with each SIGHUP; the value counts them. One that came earlier is a change, too.
    #[must_use]
    pub fn reload(&self) -> watch::Receiver<u64> {
        let mut asked = self.reload.subscribe();
        if *asked.borrow() > 0 {
            asked.mark_changed();
        }
        asked
    }

    /// What `work` gives, or None if a signal to stop comes first: starting may wait for a peer that does not answer.
    pub async fn unless_stopped<T>(&mut self, work: impl Future<Output = T>) -> Option<T> {
        tokio::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return Some(done),
                Some(signal) = self.signals.next() => match signal {
                    Signal::Reload => self.reload.send_modify(|count| *count += 1),
                    Signal::Stop => return None,
                },
            }
        }
    }

    /// Runs `task` until it is done, which it may be, without an error, once draining has begun. One that returns earlier,
    /// returns an error at any time, or panics, drains the process and makes it exit with 1.
    pub fn spawn<F, T>(&self, name: &'static str, task: F)
    where
        F: Future<Output = T> + Send + 'static,
        T: IntoEnd + Send + 'static,
    {
        let (drain, failed) = (self.drain.clone(), self.failed.clone());
        self.tracker.spawn(async move {
            match AssertUnwindSafe(task).catch_unwind().await.map(IntoEnd::into_end) {
                Ok(Ok(())) if drain.is_cancelled() => return,
                Ok(Ok(())) => error!(task = name, "a task ended that should run as long as the process: shutting down"),
                Ok(Err(error)) => error!(task = name, error = &*error, "a task failed: shutting down"),
                Err(panic) => {
                    error!(task = name, panic = text_of(&*panic), "a task panicked, which is a bug: shutting down");
                }
            }
            failed.cancel();
            drain.cancel();
        });
    }

    /// Waits for the end: of a signal to stop or of a task, and then of all tasks.
    ///
    /// 0 after a clean drain; 1 if a task failed or the drain did not end within the grace period or before a second signal.
    /// Threads of `spawn_blocking` may then still run: leave the runtime by `Runtime::shutdown_background`.
    pub async fn run(mut self) -> ExitCode {
        self.until_drain().await;
        self.drain.cancel();
        self.tracker.close();
        if self.tracker.is_empty() || self.drained().await {
            if self.failed.is_cancelled() {
                return ExitCode::FAILURE;
            }
            info!("stopped");
            return ExitCode::SUCCESS;
        }
        self.abort.cancel();
        if timeout(ABORTING, self.tracker.wait()).await.is_err() {
            warn!(tasks = self.tracker.len(), "tasks that do not stop are dropped");
        }
        ExitCode::FAILURE
    }

    async fn until_drain(&mut self) {
        loop {
            tokio::select! {
                () = self.drain.cancelled() => return,
                signal = self.signals.next() => match signal {
                    Some(Signal::Reload) => self.reload.send_modify(|count| *count += 1),
                    Some(Signal::Stop) => {
                        info!(grace = ?self.grace, "stopping: finishing what is in hand; a second signal stops at once");
                        return;
                    }
                    // The system's streams do not end; without signals there is still the end of a task.
                    None => return self.drain.cancelled().await,
                }
            }
        }
    }

    /// Whether all tasks ended before patience did.
    async fn drained(&mut self) -> bool {
        let again = self.signals.by_ref().filter(|&signal| std::future::ready(signal == Signal::Stop));
        tokio::select! {
            biased;
            () = self.tracker.wait() => true,
            Some(_) = again.into_future().map(|(signal, _)| signal) => {
                warn!("a second signal: stopping at once, events in hand are delivered again at the next start");
                false
            }
            () = sleep(self.grace) => {
                warn!(grace = ?self.grace, "the grace period is over: stopping at once, events in hand are delivered again at the next start");
                false
            }
        }
    }
}

/// How a task can end: with nothing to say, or with a result.
pub trait IntoEnd {
    fn into_end(self) -> Result<(), Box<dyn Error + Send + Sync>>;
}

impl IntoEnd for () {
    fn into_end(self) -> Result<(), Box<dyn Error + Send + Sync>> {
        Ok(())
    }
}

impl<E: Into<Box<dyn Error + Send + Sync>>> IntoEnd for Result<(), E> {
    fn into_end(self) -> Result<(), Box<dyn Error + Send + Sync>> {
        self.map_err(Into::into)
    }
}

fn text_of(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

impl std::fmt::Debug for Lifecycle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lifecycle").field("grace", &self.grace).field("tasks", &self.tracker.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::{future::pending, process::Command};

    use futures::channel::mpsc;
    use tokio::time::Instant;

    use super::*;

    const GRACE: Duration = Duration::from_secs(20);

    fn lifecycle() -> (mpsc::UnboundedSender<Signal>, Lifecycle) {
        let (send, receive) = mpsc::unbounded();
        (send, Lifecycle::new(GRACE, Box::pin(receive)))
    }

    fn is_success(code: ExitCode) -> bool {
        format!("{code:?}") == format!("{:?}", ExitCode::SUCCESS)
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_signal_drains_and_a_clean_drain_is_success() {
        let (signals, lifecycle) = lifecycle();
        let drain = lifecycle.drain();
        lifecycle.spawn("worker", async move {
            drain.cancelled().await;
            sleep(GRACE / 2).await;
        });
        let abort = lifecycle.abort();
        signals.unbounded_send(Signal::Stop).unwrap();
        assert!(is_success(lifecycle.run().await));
        assert!(!abort.is_cancelled());
    }

    #[tokio::test(start_paused = true)]
    async fn a_start_that_waits_for_ever_can_be_stopped_and_a_reload_waits_for_its_end() {
        let (signals, mut lifecycle) = lifecycle();
        signals.unbounded_send(Signal::Reload).unwrap();
        assert!(!lifecycle.reload().has_changed().unwrap());
        assert_eq!(lifecycle.unless_stopped(sleep(GRACE)).await, Some(()));
        assert!(lifecycle.reload().has_changed().unwrap(), "what was asked for meanwhile is done then");
        signals.unbounded_send(Signal::Stop).unwrap();
        assert_eq!(lifecycle.unless_stopped(pending::<()>()).await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_second_signal_aborts() {
        let (signals, lifecycle) = lifecycle();
        let (drain, abort) = (lifecycle.drain(), lifecycle.abort());
        let again = signals.clone();
        lifecycle.spawn("worker", async move {
            drain.cancelled().await;
            again.unbounded_send(Signal::Reload).unwrap();
            again.unbounded_send(Signal::Stop).unwrap();
            abort.cancelled().await;
        });
        signals.unbounded_send(Signal::Stop).unwrap();
        let start = Instant::now();
        assert!(!is_success(lifecycle.run().await));
        assert_eq!(start.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_of_the_grace_period_aborts_even_what_does_not_listen() {
        let (signals, lifecycle) = lifecycle();
        let abort = lifecycle.abort();
        lifecycle.spawn("deaf", pending::<()>());
        signals.unbounded_send(Signal::Stop).unwrap();
        let start = Instant::now();
        assert!(!is_success(lifecycle.run().await));
        assert!(abort.is_cancelled());
        assert_eq!(start.elapsed(), GRACE + ABORTING);
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_ends_early_fails_or_panics_takes_the_process_down() {
        for end in ["returns", "fails", "panics"] {
            let (_signals, lifecycle) = lifecycle();
            lifecycle.spawn(end, async move {
                match end {
                    "returns" => Ok(()),
                    "fails" => Err(io::Error::other("the disk is gone")),
                    _ => panic!("on purpose"),
                }
            });
            let drain = lifecycle.drain();
            lifecycle.spawn("neighbour", async move { drain.cancelled().await });
            assert!(!is_success(lifecycle.run().await), "{end}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_error_while_draining_is_a_failure_too() {
        let (signals, lifecycle) = lifecycle();
        let drain = lifecycle.drain();
        lifecycle.spawn("worker", async move {
            drain.cancelled().await;
            Err::<(), _>("the queue could not be closed")
        });
        signals.unbounded_send(Signal::Stop).unwrap();
        assert!(!is_success(lifecycle.run().await));
    }

    #[tokio::test(start_paused = true)]
    async fn a_reload_is_passed_on_and_stops_nothing() {
        let (signals, lifecycle) = lifecycle();
        let mut reload = lifecycle.reload();
        let drain = lifecycle.drain();
        signals.unbounded_send(Signal::Reload).unwrap();
        lifecycle.spawn("reloader", async move {
            reload.changed().await.unwrap();
            assert!(!drain.is_cancelled());
            signals.unbounded_send(Signal::Stop).unwrap();
            drain.cancelled().await;
        });
        assert!(is_success(lifecycle.run().await));
    }

    #[tokio::test]
    async fn real_signals_arrive() {
        let lifecycle = Lifecycle::install(GRACE).unwrap();
        let mut reload = lifecycle.reload();
        let drain = lifecycle.drain();
        let raise = |signal: &str| {
            let me = std::process::id().to_string();
            assert!(Command::new("kill").args([signal, &me]).status().unwrap().success());
        };
        lifecycle.spawn("worker", async move {
            raise("-HUP");
            reload.changed().await.unwrap();
            assert!(!drain.is_cancelled());
            raise("-TERM");
            drain.cancelled().await;
        });
        assert!(is_success(lifecycle.run().await));
    }
}
