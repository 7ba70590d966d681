use std::{
    sync::{Mutex, MutexGuard},
    time::Duration,
};

use tokio::time::{Instant, sleep_until};

use super::{Quota, Rate};

/// How fast a witness asks its KMS: a token bucket at the configured rate, or none; and slower for a while after the KMS throttled.
///
/// After a throttling the rate is half of what the KMS served in the last second, for half a second. Then it is 97% of that, and
/// grows by ever larger steps until the configured rate is reached, or twice what was served where none is configured. Most of
/// the time is so spent just below what the KMS gives, and a quota that was raised is found within a minute.
#[derive(Debug)]
pub(super) struct Pace {
    /// Held by the one whose turn is next; the others wait in the order they came.
    queue: tokio::sync::Mutex<()>,
    state: Mutex<State>,
}

/// When a call began.
#[derive(Debug, Clone, Copy)]
pub(super) struct Turn(Instant);

#[derive(Debug)]
struct State {
    configured: Option<Rate>,
    tokens: f64,
    refilled: Instant,
    slow: Option<Slow>,
    /// What the KMS asked for with Retry-After.
    not_before: Option<Instant>,
    served: Served,
}

/// Since when the rate is reduced, and how many a second the KMS served then.
#[derive(Debug, Clone, Copy)]
struct Slow {
    since: Instant,
    served: f64,
}

/// Counts over the last second, as a window that slides from the previous whole second into the current one.
#[derive(Debug)]
struct Served {
    second: Instant,
    previous: f64,
    current: f64,
}

/// Calls a second that a KMS of which nothing is known is thought to serve.
const UNKNOWN: f64 = 100.0;
const SECOND: Duration = Duration::from_secs(1);
const HALVED: Duration = Duration::from_millis(500);
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(60);
/// A second's share that may always come at once, so that the timer's steps of a millisecond do not lower the rate.
const LEAST_BURST: f64 = 0.01;

impl Pace {
    pub(super) fn new(configured: Option<Rate>) -> Self {
        let now = Instant::now();
        let tokens = configured.map_or(0.0, |rate| f64::from(rate.burst));
        let served = Served { second: now, previous: 0.0, current: 0.0 };
        let state = State { configured, tokens, refilled: now, slow: None, not_before: None, served };
        Self { queue: tokio::sync::Mutex::new(()), state: Mutex::new(state) }
    }

    /// Waits until the next call may be made. First come, first served; cancel-safe.
    pub(super) async fn turn(&self) -> Turn {
        let _front = self.queue.lock().await;
        loop {
            let now = Instant::now();
            let Err(later) = self.state().take(now) else { return Turn(now) };
            sleep_until(later).await;
        }
    }

    /// How much is used of what may be.
    pub(super) fn quota(&self) -> Quota {
        let now = Instant::now();
        let mut state = self.state();
        let rate = state.rate(now);
        Quota::new(state.configured, rate, state.served.per_second(now))
    }

    /// About how many calls a second will be served: what may be asked for or, without a limit, what was served lately, and not too
    /// few, because that may be all that was asked for.
    pub(super) fn expected(&self) -> f64 {
        let now = Instant::now();
        let mut state = self.state();
        match (state.rate(now), state.slow) {
            (Some(_), Some(slow)) => slow.served,
            (Some(rate), None) => rate,
            (None, _) => state.served.per_second(now).max(UNKNOWN),
        }
    }

    /// A call was served.
    pub(super) fn served(&self) {
        self.state().served.count(Instant::now());
    }

    /// A call was throttled. Returns the rate that holds now if that slowed the witness down; calls that were under way
    /// already when it was slowed down do not slow it again.
    pub(super) fn throttled(&self, turn: Turn, retry_after: Option<Duration>) -> Option<f64> {
        let now = Instant::now();
        let mut state = self.state();
        if let Some(after) = retry_after {
            let until = now + after.min(LONGEST_RETRY_AFTER);
            state.not_before = Some(state.not_before.map_or(until, |earlier| earlier.max(until)));
        }
        if state.slow.is_some_and(|slow| turn.0 <= slow.since || now < slow.since + SECOND) {
            return None;
        }
        let served = state.served.per_second(now).max(1.0);
        state.slow = Some(Slow { since: now, served });
        state.tokens = 0.0;
        state.rate(now)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while it holds the pace")
    }
}

impl State {
    /// Takes a token, or says when to ask again.
    fn take(&mut self, now: Instant) -> Result<(), Instant> {
        match self.not_before {
            Some(until) if now < until => return Err(until),
            _ => self.not_before = None,
        }
        let Some(rate) = self.rate(now) else { return Ok(()) };
        let burst = match self.configured {
            Some(configured) if self.slow.is_none() => f64::from(configured.burst),
            _ => 1.0,
        };
        let elapsed = now.duration_since(self.refilled).as_secs_f64();
        self.tokens = (self.tokens + elapsed * rate).min(burst.max(rate * LEAST_BURST).max(1.0));
        self.refilled = now;
        if self.tokens >= 1.0 {
            self.tokens -= 1.0;
            return Ok(());
        }
        Err(now + Duration::from_secs_f64((1.0 - self.tokens) / rate))
    }

    /// Calls a second; `None` is as many as are asked for.
    fn rate(&mut self, now: Instant) -> Option<f64> {
        let configured = self.configured.map(|rate| f64::from(rate.per_second.max(1)));
        let Some(slow) = self.slow else { return configured };
        let rate = slow.rate(now);
        if rate < configured.unwrap_or(2.0 * slow.served) {
            return Some(rate);
        }
        self.slow = None;
        configured
    }
}

impl Slow {
    fn rate(&self, now: Instant) -> f64 {
        let share = match now.duration_since(self.since).checked_sub(HALVED) {
            None => 0.5,
            Some(recovering) => 0.97 + 0.001 * recovering.as_secs_f64().powi(2),
        };
        (share * self.served).max(1.0)
    }
}

impl Served {
    fn count(&mut self, now: Instant) {
        self.slide(now);
        self.current += 1.0;
    }

    fn per_second(&mut self, now: Instant) -> f64 {
        self.slide(now);
        self.previous * (1.0 - now.duration_since(self.second).as_secs_f64()) + self.current
    }

    fn slide(&mut self, now: Instant) {
        let elapsed = now.duration_since(self.second);
        if elapsed < SECOND {
            return;
        }
        self.previous = if elapsed < 2 * SECOND { self.current } else { 0.0 };
        self.current = 0.0;
        self.second += Duration::from_secs(elapsed.as_secs());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A KMS that serves so many calls a second and throttles the others, under an offered load without end.
    async fn served_in(pace: &Pace, quota: u32, time: Duration) -> (u32, u32) {
        let (mut served, mut throttled) = (0, 0);
        let start = Instant::now();
        let (mut second, mut left) = (start, quota);
        while start.elapsed() < time {
            let turn = pace.turn().await;
            if second.elapsed() >= SECOND {
                (second, left) = (Instant::now(), quota);
            }
            // Without a pace, this many calls are under way one after the other in a second.
            tokio::time::advance(Duration::from_micros(500)).await;
            if left > 0 {
                left -= 1;
                served += 1;
                pace.served();
            } else {
                throttled += 1;
                pace.throttled(turn, None);
            }
        }
        (served, throttled)
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_rate_nobody_waits() {
        let pace = Pace::new(None);
        let start = Instant::now();
        for _ in 0..10_000 {
            pace.turn().await;
        }
        assert_eq!(start.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_configured_rate_holds_after_its_burst() {
        let pace = Pace::new(Some(Rate { per_second: 100, burst: 20 }));
        let start = Instant::now();
        for _ in 0..20 {
            pace.turn().await;
        }
        assert_eq!(start.elapsed(), Duration::ZERO);
        for _ in 0..300 {
            pace.turn().await;
        }
        let elapsed = start.elapsed().as_secs_f64();
        assert!((2.95..3.4).contains(&elapsed), "{elapsed}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_rate_above_the_timers_resolution_is_reached() {
        let pace = Pace::new(Some(Rate { per_second: 5_000, burst: 1 }));
        let start = Instant::now();
        for _ in 0..10_000 {
            pace.turn().await;
        }
        let elapsed = start.elapsed().as_secs_f64();
        assert!((1.9..2.3).contains(&elapsed), "{elapsed}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_rate_of_nothing_counts_as_one() {
        let pace = Pace::new(Some(Rate { per_second: 0, burst: 0 }));
        let start = Instant::now();
        pace.turn().await;
        pace.turn().await;
        assert!(start.elapsed() <= 3 * SECOND);
    }

    #[tokio::test(start_paused = true)]
    async fn nine_tenths_of_an_unknown_quota_are_used_and_few_calls_are_throttled() {
        for quota in [5, 20, 100, 500] {
            let pace = Pace::new(None);
            let (served, throttled) = served_in(&pace, quota, 60 * SECOND).await;
            let share = f64::from(served) / f64::from(quota * 60);
            let wasted = f64::from(throttled) / f64::from(served);
            let least = if quota < 10 { 0.85 } else { 0.9 };
            assert!(share > least, "{share} of a quota of {quota}");
            assert!(wasted < 0.15, "{throttled} throttled, {served} served with a quota of {quota}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_quota_that_was_raised_is_found() {
        let pace = Pace::new(None);
        served_in(&pace, 50, 10 * SECOND).await;
        served_in(&pace, 1_000, 60 * SECOND).await;
        let (served, _) = served_in(&pace, 1_000, 10 * SECOND).await;
        assert!(served > 8_500, "{served}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_kms_that_throttles_everything_is_asked_once_a_second() {
        let pace = Pace::new(None);
        let (served, throttled) = served_in(&pace, 0, 60 * SECOND).await;
        assert_eq!(served, 0);
        assert!(throttled <= 62, "{throttled}");
    }

    #[tokio::test(start_paused = true)]
    async fn calls_under_way_when_it_slowed_down_do_not_slow_it_again() {
        let pace = Pace::new(Some(Rate { per_second: 1_000, burst: 100 }));
        let mut turns = Vec::new();
        for _ in 0..32 {
            turns.push(pace.turn().await);
            pace.served();
        }
        let slowed: Vec<_> = turns.into_iter().filter_map(|turn| pace.throttled(turn, None)).collect();
        assert_eq!(slowed, [16.0]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_time_that_the_kms_names_is_waited_for_within_reason() {
        let pace = Pace::new(None);
        for (named, waited) in [(5, 5), (100_000, 60)] {
            let turn = pace.turn().await;
            pace.throttled(turn, Some(Duration::from_secs(named)));
            let start = Instant::now();
            pace.turn().await;
            let elapsed = start.elapsed();
            assert!(elapsed >= waited * SECOND && elapsed < (waited + 2) * SECOND, "{elapsed:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_gives_up_waiting_holds_nobody_up() {
        let pace = Pace::new(Some(Rate { per_second: 1, burst: 1 }));
        pace.turn().await;
        let given_up = tokio::time::timeout(Duration::from_millis(100), pace.turn()).await;
        assert!(given_up.is_err());
        let start = Instant::now();
        pace.turn().await;
        assert!(start.elapsed() < SECOND);
    }
}
