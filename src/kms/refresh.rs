//! Credentials that last for a time, and are fetched anew before it is over.

mod error;
mod file;

use std::{
    fmt,
    sync::{Mutex, PoisonError},
};

use jiff::{SignedDuration, Timestamp};

use crate::clock::Clock;
pub(super) use error::CredentialsError;
pub(super) use file::{Text, is_sendable, text_of, token_of};

/// Where credentials come from.
pub(super) trait Source: Send + Sync {
    type Credentials: Expiring;
    /// Cloned for those who waited for the same fetch.
    type Error: fmt::Display + Clone + Send + Sync;

    fn fetch(&self) -> impl Future<Output = Result<Self::Credentials, Self::Error>> + Send;
}

pub(super) trait Expiring: Clone + PartialEq + Send + Sync {
    /// From when on they are worth nothing; never, if absent.
    fn expires(&self) -> Option<Timestamp>;
}

/// The credentials of a source, kept while they last.
///
/// They are fetched by who asks: one at a time, and in their last minutes by one caller while the others go on with those that
/// still last. If that fails they are used to their end, with a try every minute.
pub(super) struct Kept<S: Source> {
    source: S,
    clock: Clock,
    state: Mutex<State<S>>,
    /// Held by the one who fetches.
    fetching: tokio::sync::Mutex<()>,
}

struct State<S: Source> {
    held: Option<Held<S::Credentials>>,
    /// How many fetches have ended.
    ended: u64,
    /// What the last one ended with, if it failed.
    failure: Option<S::Error>,
}

struct Held<C> {
    credentials: C,
    /// When to look for newer ones.
    due: Option<Timestamp>,
    /// When these are over.
    over: Option<Timestamp>,
}

enum Age<C> {
    Fresh(C),
    Due(C),
    Over,
}

/// How long before their end credentials are fetched anew, if they last long enough.
const AHEAD: SignedDuration = SignedDuration::from_mins(5);
/// Between two tries, while the old ones last.
const BETWEEN: SignedDuration = SignedDuration::from_mins(1);

impl<S: Source> Kept<S> {
    pub(super) fn new(source: S, clock: Clock) -> Self {
        let state = State { held: None, ended: 0, failure: None };
        Self { source, clock, state: Mutex::new(state), fetching: tokio::sync::Mutex::new(()) }
    }

    /// Credentials that last, as far as this machine's clock can tell.
    pub(super) async fn current(&self) -> Result<S::Credentials, S::Error> {
        match self.age() {
            Age::Fresh(credentials) => Ok(credentials),
            Age::Due(old) => {
                let Ok(_one) = self.fetching.try_lock() else { return Ok(old) };
                match self.age() {
                    Age::Fresh(credentials) => return Ok(credentials),
                    Age::Due(_) | Age::Over => {}
                }
                match self.fetch().await {
                    Ok(credentials) => Ok(credentials),
                    Err(error) => {
                        tracing::warn!(%error, "the credentials could not be renewed: those from before are used while they last");
                        self.put_off();
                        Ok(old)
                    }
                }
            }
            Age::Over => {
                let seen = self.state().ended;
                let _one = self.fetching.lock().await;
                match self.age() {
                    Age::Fresh(credentials) | Age::Due(credentials) => Ok(credentials),
                    Age::Over => match self.failure_since(seen) {
                        Some(error) => Err(error),
                        None => self.fetch().await,
                    },
                }
            }
        }
    }

    /// The credentials after these ones were refused as expired or unknown: fetched anew, unless somebody else just did.
    pub(super) async fn renewed(&self, refused: &S::Credentials) -> Result<S::Credentials, S::Error> {
        let seen = self.state().ended;
        let _one = self.fetching.lock().await;
        if let Some(held) = &self.state().held
            && held.credentials != *refused
        {
            return Ok(held.credentials.clone());
        }
        match self.failure_since(seen) {
            Some(error) => Err(error),
            None => self.fetch().await,
        }
    }

    async fn fetch(&self) -> Result<S::Credentials, S::Error> {
        let fetched = self.source.fetch().await;
        let now = self.clock.now();
        let mut state = self.state();
        state.ended += 1;
        match fetched {
            Ok(credentials) => {
                state.failure = None;
                state.held = Some(Held::of(credentials.clone(), now));
                Ok(credentials)
            }
            Err(error) => {
                state.failure = Some(error.clone());
                Err(error)
            }
        }
    }

    /// How a fetch failed that ended while one waited to do it oneself.
    fn failure_since(&self, seen: u64) -> Option<S::Error> {
        let state = self.state();
        (state.ended != seen).then(|| state.failure.clone()).flatten()
    }

    fn age(&self) -> Age<S::Credentials> {
        let now = self.clock.now();
        match &self.state().held {
            Some(held) if held.over.is_some_and(|over| over <= now) => Age::Over,
            Some(held) if held.due.is_some_and(|due| due <= now) => Age::Due(held.credentials.clone()),
            Some(held) => Age::Fresh(held.credentials.clone()),
            None => Age::Over,
        }
    }

    fn put_off(&self) {
        let next = self.clock.now().checked_add(BETWEEN).ok();
        if let Some(held) = &mut self.state().held {
            held.due = next;
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State<S>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S: Source> fmt::Debug for Kept<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // What it holds is secret.
        f.write_str("Kept")
    }
}

impl<C: Expiring> Held<C> {
    fn of(credentials: C, now: Timestamp) -> Self {
        let Some(expires) = credentials.expires() else { return Self { credentials, due: None, over: None } };
        let left = expires.duration_since(now);
        if left <= SignedDuration::ZERO {
            // Instance metadata serves what it has while it is in trouble itself, and our clock may be wrong. The KMS decides.
            tracing::warn!(%expires, "the credentials that were just fetched are expired by this machine's clock");
            return Self { credentials, due: now.checked_add(BETWEEN).ok(), over: None };
        }
        // Up to a fifth earlier, so that replicas that started together do not come together.
        let ahead = AHEAD.min(left / 3);
        let ahead = ahead + ahead.mul_f64(fastrand::f64() / 5.0);
        Self { credentials, due: expires.checked_sub(ahead).ok(), over: Some(expires) }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::VecDeque,
        sync::atomic::{AtomicUsize, Ordering},
        time::Duration,
    };

    use futures::future::join_all;
    use tokio::sync::Semaphore;

    use super::*;
    use crate::clock::ManualClock;

    #[derive(Debug, Clone, PartialEq)]
    struct Pass(u32, Option<Timestamp>);

    impl Expiring for Pass {
        fn expires(&self) -> Option<Timestamp> {
            self.1
        }
    }

    /// Gives what it is told to, after being let to.
    struct Scripted {
        script: Mutex<VecDeque<Result<Pass, String>>>,
        fetches: AtomicUsize,
        gate: Semaphore,
    }

    impl Source for Scripted {
        type Credentials = Pass;
        type Error = String;

        async fn fetch(&self) -> Result<Pass, String> {
            self.fetches.fetch_add(1, Ordering::SeqCst);
            self.gate.acquire().await.unwrap().forget();
            self.script.lock().unwrap().pop_front().expect("no fetch too many")
        }
    }

    fn start() -> Timestamp {
        "2026-01-01T00:00:00Z".parse().unwrap()
    }

    fn minutes(number: i64) -> Timestamp {
        start() + SignedDuration::from_mins(number)
    }

    fn kept<const N: usize>(script: [Result<Pass, &str>; N]) -> (Kept<Scripted>, ManualClock) {
        let (clock, hand) = Clock::manual(start());
        let script = script.into_iter().map(|result| result.map_err(str::to_owned)).collect();
        let gate = Semaphore::new(1000);
        (Kept::new(Scripted { script: Mutex::new(script), fetches: AtomicUsize::new(0), gate }, clock), hand)
    }

    fn fetches(kept: &Kept<Scripted>) -> usize {
        kept.source.fetches.load(Ordering::SeqCst)
    }

    #[tokio::test]
    async fn what_does_not_expire_is_fetched_once() {
        let (kept, hand) = kept([Ok(Pass(1, None))]);
        for _ in 0..3 {
            assert_eq!(kept.current().await.unwrap().0, 1);
            hand.advance(Duration::from_secs(1_000_000));
        }
        assert_eq!(fetches(&kept), 1);
    }

    #[tokio::test]
    async fn credentials_are_fetched_anew_some_minutes_before_their_end() {
        let (kept, hand) = kept([Ok(Pass(1, Some(minutes(60)))), Ok(Pass(2, Some(minutes(120))))]);
        kept.current().await.unwrap();
        hand.advance(Duration::from_secs(53 * 60 + 50));
        assert_eq!(kept.current().await.unwrap().0, 1);
        hand.advance(Duration::from_secs(70));
        assert_eq!(kept.current().await.unwrap().0, 2);
        assert_eq!(fetches(&kept), 2);
    }

    #[tokio::test]
    async fn while_a_renewal_fails_the_old_ones_are_used_to_their_end() {
        let (kept, hand) =
            kept([Ok(Pass(1, Some(minutes(60)))), Err("down"), Err("down"), Err("down for good"), Ok(Pass(2, None))]);
        kept.current().await.unwrap();
        hand.advance(Duration::from_secs(57 * 60));
        for _ in 0..10 {
            assert_eq!(kept.current().await.unwrap().0, 1);
        }
        assert_eq!(fetches(&kept), 2);
        hand.advance(Duration::from_secs(61));
        assert_eq!(kept.current().await.unwrap().0, 1);
        assert_eq!(fetches(&kept), 3);
        hand.advance(Duration::from_secs(120));
        assert_eq!(kept.current().await.unwrap_err(), "down for good");
        assert_eq!(kept.current().await.unwrap().0, 2);
    }

    #[tokio::test]
    async fn callers_at_once_share_one_fetch_and_its_failure() {
        let (kept, _) = kept([Err("down"), Ok(Pass(1, None))]);
        kept.source.gate.forget_permits(1000);
        let all = join_all((0..20).map(|_| kept.current()));
        let (results, ()) = tokio::join!(all, async {
            tokio::task::yield_now().await;
            kept.source.gate.add_permits(1);
        });
        assert!(results.iter().all(|result| result.as_ref().is_err_and(|error| error == "down")));
        assert_eq!(fetches(&kept), 1);
        kept.source.gate.add_permits(1);
        assert_eq!(kept.current().await.unwrap().0, 1);
    }

    #[tokio::test]
    async fn nobody_waits_for_a_renewal_while_the_old_ones_last() {
        let (kept, hand) = kept([Ok(Pass(1, Some(minutes(60)))), Ok(Pass(2, Some(minutes(120))))]);
        kept.current().await.unwrap();
        hand.advance(Duration::from_secs(57 * 60));
        kept.source.gate.forget_permits(999);
        let (first, second) = tokio::join!(kept.current(), async {
            let second = kept.current().await;
            kept.source.gate.add_permits(1);
            second
        });
        assert_eq!((first.unwrap().0, second.unwrap().0), (2, 1));
    }

    #[tokio::test]
    async fn what_was_refused_is_fetched_anew_once_for_all_who_were_refused() {
        let (kept, _) = kept([Ok(Pass(1, None)), Ok(Pass(2, None))]);
        let refused = kept.current().await.unwrap();
        let renewed = join_all((0..5).map(|_| kept.renewed(&refused))).await;
        assert!(renewed.into_iter().all(|pass| pass.unwrap().0 == 2));
        assert_eq!(fetches(&kept), 2);
    }

    #[tokio::test]
    async fn what_comes_expired_is_used_until_there_is_better() {
        let (kept, hand) = kept([Ok(Pass(1, Some(minutes(-10)))), Ok(Pass(2, Some(minutes(60))))]);
        assert_eq!(kept.current().await.unwrap().0, 1);
        assert_eq!(kept.current().await.unwrap().0, 1);
        hand.advance(Duration::from_secs(60));
        assert_eq!(kept.current().await.unwrap().0, 2);
    }

    #[tokio::test]
    async fn a_caller_that_gives_up_leaves_the_fetch_to_the_next() {
        let (kept, _) = kept([Ok(Pass(1, None))]);
        kept.source.gate.forget_permits(1000);
        assert!(tokio::time::timeout(Duration::ZERO, kept.current()).await.is_err());
        kept.source.gate.add_permits(1);
        assert_eq!(kept.current().await.unwrap().0, 1);
        assert_eq!(fetches(&kept), 2);
    }
}
