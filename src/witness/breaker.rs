use std::{
    sync::{Mutex, MutexGuard},
    time::Duration,
};

use jiff::{Timestamp, Unit};
use tokio::time::Instant;

use crate::clock::Clock;

/// Keeps a KMS that is away from being asked by everybody: after some failures in a row it lets one call through at a time, ever
/// more seldom, until one is answered. That call is a signature that is wanted (or a probe that somebody asked for anyway), so
/// finding out costs nothing.
#[derive(Debug)]
pub(super) struct Breaker {
    clock: Clock,
    state: Mutex<State>,
}

/// Failures in a row after which a KMS counts as away: more than a lost connection makes, fewer than a worker's patience.
const FAILURES: u32 = 5;
/// The wait before the first call that tries it again; each one that fails doubles it.
const FIRST: Duration = Duration::from_secs(1);
/// So a KMS that is back is asked after half a minute at most.
const LONGEST: Duration = Duration::from_secs(30);
/// How long the others wait for one that is under way: as long as a provider waits for an answer.
const UNDER_WAY: Duration = Duration::from_secs(5);

#[derive(Debug)]
enum State {
    /// Asked as ever; the last so many calls failed, the first of them then.
    Closed {
        failures: u32,
        first: Option<Timestamp>,
    },
    Open(Open),
}

#[derive(Debug, Clone, Copy)]
struct Open {
    since: Timestamp,
    next: Instant,
    wait: Duration,
    /// One call is under way to see whether it is back.
    trying: bool,
}

/// The KMS is away, and when it is asked again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Away {
    pub since: Timestamp,
    pub next: Timestamp,
    /// How long it is until then.
    pub after: Duration,
}

/// Leave to ask once. Dropped without an end, as with a deadline, it says nothing about the KMS.
#[derive(Debug)]
pub(super) struct Leave<'a> {
    breaker: &'a Breaker,
    trying: bool,
}

impl Breaker {
    pub(super) fn new(clock: Clock) -> Self {
        Self { clock, state: Mutex::new(State::Closed { failures: 0, first: None }) }
    }

    /// Whether it would let a call through now.
    pub(super) fn look(&self) -> Result<(), Away> {
        match &*self.state() {
            State::Closed { .. } => Ok(()),
            State::Open(open) => self.pass(*open),
        }
    }

    /// Lets a call through, or says when to come again.
    pub(super) fn enter(&self) -> Result<Leave<'_>, Away> {
        let mut state = self.state();
        let trying = match &mut *state {
            State::Closed { .. } => false,
            State::Open(open) => {
                self.pass(*open)?;
                open.trying = true;
                true
            }
        };
        Ok(Leave { breaker: self, trying })
    }

    /// Since when the KMS is away, if it is.
    pub(super) fn away(&self) -> Option<Away> {
        match &*self.state() {
            State::Closed { .. } => None,
            State::Open(open) => Some(self.told(*open, Instant::now())),
        }
    }

    fn pass(&self, open: Open) -> Result<(), Away> {
        let now = Instant::now();
        if open.trying || now < open.next { Err(self.told(open, now)) } else { Ok(()) }
    }

    fn told(&self, open: Open, now: Instant) -> Away {
        let left = open.next.saturating_duration_since(now);
        let after = if open.trying { left.max(UNDER_WAY) } else { left };
        Away { since: open.since, next: seconds(self.clock.now() + after), after }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while it holds the breaker")
    }
}

impl Leave<'_> {
    /// It answered, be it with a refusal. True if it had been away.
    pub(super) fn answered(self) -> bool {
        let was = std::mem::replace(&mut *self.breaker.state(), State::Closed { failures: 0, first: None });
        matches!(was, State::Open(_))
    }

    /// It did not answer. Says since when it counts as away if that is so from now on.
    pub(super) fn failed(mut self) -> Option<Away> {
        let trying = std::mem::take(&mut self.trying);
        let now = Instant::now();
        let mut state = self.breaker.state();
        match &mut *state {
            State::Closed { failures, first } => {
                *failures += 1;
                let since = *first.get_or_insert_with(|| seconds(self.breaker.clock.now()));
                if *failures < FAILURES {
                    return None;
                }
                let open = Open { since, next: now + shorter(FIRST), wait: FIRST, trying: false };
                *state = State::Open(open);
                drop(state);
                Some(self.breaker.told(open, now))
            }
            // Of those that were under way when it opened nothing new is learnt.
            State::Open(open) if trying => {
                let wait = (open.wait * 2).min(LONGEST);
                *open = Open { next: now + shorter(wait), wait, trying: false, ..*open };
                None
            }
            State::Open(_) => None,
        }
    }
}

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        if self.trying
            && let State::Open(open) = &mut *self.breaker.state()
        {
            open.trying = false;
        }
    }
}

/// By up to a fifth, so that replicas that lost a KMS together do not come back together.
fn shorter(wait: Duration) -> Duration {
    wait.mul_f64(1.0 - fastrand::f64() / 5.0)
}

/// For people.
fn seconds(time: Timestamp) -> Timestamp {
    time.round(Unit::Second).unwrap_or(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn breaker() -> Breaker {
        Breaker::new(Clock::manual("2026-11-21T09:00:00Z".parse().unwrap()).0)
    }

    fn fail(breaker: &Breaker) -> bool {
        breaker.enter().unwrap().failed().is_some()
    }

    fn open() -> Breaker {
        let breaker = breaker();
        let opened: Vec<_> = (0..FAILURES).map(|_| fail(&breaker)).collect();
        assert_eq!(opened, [false, false, false, false, true]);
        breaker
    }

    #[tokio::test(start_paused = true)]
    async fn it_opens_after_failures_in_a_row_and_not_before() {
        let breaker = breaker();
        for _ in 0..20 {
            for _ in 1..FAILURES {
                assert!(!fail(&breaker));
            }
            assert!(!breaker.enter().unwrap().answered());
        }
        let breaker = open();
        let away = breaker.enter().unwrap_err();
        assert_eq!(away.since.to_string(), "2026-11-21T09:00:00Z");
        assert!(away.after <= FIRST && away.after >= FIRST.mul_f64(0.8), "{away:?}");
        assert_eq!(breaker.look(), Err(away));
    }

    #[tokio::test(start_paused = true)]
    async fn one_call_at_a_time_tries_it_again_ever_more_seldom_and_an_answer_closes_it() {
        let breaker = open();
        let (start, mut tries) = (Instant::now(), 0);
        while start.elapsed() < Duration::from_secs(600) {
            let Err(away) = breaker.enter() else { panic!("it is open") };
            tokio::time::advance(away.after).await;
            let trying = breaker.enter().unwrap();
            assert!(breaker.look().is_err() && breaker.enter().is_err(), "only one");
            assert_eq!(trying.failed(), None);
            tries += 1;
        }
        assert!((20..=32).contains(&tries), "{tries} in ten minutes");
        tokio::time::advance(LONGEST).await;
        assert!(breaker.enter().unwrap().answered());
        for _ in 0..100 {
            breaker.enter().unwrap();
        }
        assert_eq!(breaker.away(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_is_given_up_leaves_the_next_to_try() {
        let breaker = open();
        tokio::time::advance(FIRST).await;
        drop(breaker.enter().unwrap());
        assert!(breaker.enter().unwrap().answered());
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_under_way_when_it_opened_neither_prolongs_it_nor_is_lost_on_it() {
        let breaker = breaker();
        let late: Vec<_> = (0..10).map(|_| breaker.enter().unwrap()).collect();
        let opened = late.into_iter().filter_map(Leave::failed).count();
        assert_eq!(opened, 1);
        assert!(breaker.away().unwrap().after <= FIRST);
        let breaker = self::breaker();
        let late = breaker.enter().unwrap();
        for _ in 0..FAILURES {
            fail(&breaker);
        }
        assert!(breaker.away().is_some());
        assert!(late.answered(), "an answer is an answer");
        assert_eq!(breaker.away(), None);
    }
}
