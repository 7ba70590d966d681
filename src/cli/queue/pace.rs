//! How fast, and until when.

use std::{future::Future, pin::Pin, time::Duration};

use tokio::time::Instant;

use crate::cli::Usage;

/// At most so many by one request.
const BATCH: usize = 200;

/// Lets so many through a second.
#[derive(Debug)]
pub(super) struct Pace {
    per_second: Option<f64>,
    /// When the next may come.
    next: Instant,
}

impl Pace {
    /// `50`, `50/s`, `600/m`, `1000/h`; as fast as it goes without.
    pub fn new(rate: Option<&str>) -> Result<Self, Usage> {
        Ok(Self { per_second: rate.map(read).transpose()?, next: Instant::now() })
    }

    /// So many at once are smooth enough: a quarter of a second's.
    pub fn batch(&self) -> usize {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "bounded on both sides")]
        self.per_second.map_or(BATCH, |rate| (rate / 4.0).clamp(1.0, 200.0) as usize)
    }

    /// So many have gone through.
    pub fn went(&mut self, number: usize) {
        if let Some(rate) = self.per_second {
            let number = u32::try_from(number).unwrap_or(u32::MAX);
            // From when they might have gone, so that what the request took is no time lost; but nothing is saved up.
            self.next =
                self.next.max(Instant::now() - Duration::from_millis(250)) + Duration::from_secs_f64(f64::from(number) / rate);
        }
    }

    /// Waits until the next may come. False if that is not to be waited for.
    pub async fn wait(&self, stop: &mut Stop) -> bool {
        tokio::select! {
            biased;
            () = stop.asked() => false,
            () = tokio::time::sleep_until(self.next) => true,
        }
    }
}

fn read(text: &str) -> Result<f64, Usage> {
    let (number, seconds) = match text.split_once('/') {
        None | Some((_, "s")) => (text.trim_end_matches("/s"), 1.0),
        Some((number, "m")) => (number, 60.0),
        Some((number, "h")) => (number, 3600.0),
        Some(_) => ("", 1.0),
    };
    match number.parse::<u32>() {
        Ok(number) if number > 0 => Ok(f64::from(number) / seconds),
        _ => Err(Usage(format!("--rate: {text:?} is no rate: write 50 (a second), 600/m or 1000/h"))),
    }
}

/// Ctrl-C, which is taken note of and acted on between two requests.
pub(super) struct Stop {
    asked: Pin<Box<dyn Future<Output = ()> + Send>>,
    was_asked: bool,
}

impl Stop {
    pub fn on_interrupt() -> Self {
        Self::when(async {
            if tokio::signal::ctrl_c().await.is_err() {
                // Then it kills, as it does by default.
                std::future::pending::<()>().await;
            }
        })
    }

    pub fn when(asked: impl Future<Output = ()> + Send + 'static) -> Self {
        Self { asked: Box::pin(asked), was_asked: false }
    }

    async fn asked(&mut self) {
        if !self.was_asked {
            (&mut self.asked).await;
            self.was_asked = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_by_the_second_minute_and_hour() {
        for (text, expected) in [("50", 50.0), ("50/s", 50.0), ("600/m", 10.0), ("1800/h", 0.5)] {
            assert!((read(text).unwrap() - expected).abs() < 1e-9, "{text}");
        }
        for text in ["", "0", "-1", "1.5", "50/d", "/m", "50/s/s", "many", "50 /m"] {
            assert!(read(text).is_err(), "{text}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_than_the_rate_go_through() {
        for (rate, batch) in [("40", 10), ("600/m", 2), ("1800/h", 1)] {
            let mut pace = Pace::new(Some(rate)).unwrap();
            assert_eq!(pace.batch(), batch);
            let began = Instant::now();
            for _ in 0..40 / batch {
                assert!(pace.wait(&mut Stop::when(std::future::pending())).await);
                pace.went(batch);
            }
            assert!(pace.wait(&mut Stop::when(std::future::pending())).await);
            let expected = 40.0 / read(rate).unwrap();
            let took = began.elapsed().as_secs_f64();
            assert!((expected - 0.3..expected + 0.3).contains(&took), "{rate}: {took} s instead of {expected}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_asked_to_stop_does_not_wait() {
        let mut pace = Pace::new(Some("1/h")).unwrap();
        pace.went(1);
        let mut stop = Stop::when(tokio::time::sleep(Duration::from_secs(1)));
        let began = Instant::now();
        assert!(!pace.wait(&mut stop).await);
        assert!(!pace.wait(&mut stop).await, "and stays so");
        assert_eq!(began.elapsed(), Duration::from_secs(1));
    }
}
