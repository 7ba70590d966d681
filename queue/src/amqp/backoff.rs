//! How long to wait before something that failed is tried again.

use std::time::Duration;

/// The wait after the first failure; it doubles with each further one.
const FIRST: Duration = Duration::from_millis(200);
/// A connection that held for so long was a good one.
const GOOD: Duration = Duration::from_secs(30);

/// Of tries that follow one another.
pub(super) struct Backoff {
    longest: Duration,
    failures: u32,
}

impl Backoff {
    pub fn new(longest: Duration) -> Self {
        Self { longest, failures: 0 }
    }

    /// The wait after one more failure. Up to half of it is left to chance: who failed together tries at different times.
    pub fn failed(&mut self) -> Duration {
        let full = FIRST.saturating_mul(1 << self.failures.min(10)).min(self.longest);
        self.failures = self.failures.saturating_add(1);
        full.mul_f64(0.5 + fastrand::f64() / 2.0)
    }

    /// The wait after a connection that is over, this long after it was begun to be made: one that was let in and thrown out at
    /// once has failed as well.
    pub fn ended(&mut self, after: Duration) -> Duration {
        if after > GOOD {
            self.failures = 0;
        }
        self.failed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_longest_and_begin_anew_after_a_good_connection() {
        let mut backoff = Backoff::new(Duration::from_secs(5));
        let short = Duration::from_millis(10);
        for full in [200, 400, 800, 1600, 3200, 5000, 5000].into_iter().chain([5000; 100]).map(Duration::from_millis) {
            let wait = backoff.ended(short);
            assert!((full / 2..=full).contains(&wait), "{wait:?} of {full:?}");
        }
        assert!(backoff.ended(2 * GOOD) <= FIRST);
        assert!(backoff.ended(short) >= FIRST);
    }

    #[test]
    fn those_who_failed_together_try_at_different_times() {
        let waits = (0..20).map(|_| Backoff::new(GOOD).failed());
        assert!(waits.collect::<std::collections::HashSet<_>>().len() > 10);
    }
}
