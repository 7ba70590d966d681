//! Which events may be in hand for which witness, so that one whose KMS is slow or away does not keep the others waiting.
//!
//! An event, or several that are handled together, takes a seat at each of its witnesses before anything is looked up for it. A
//! witness has its share of the pipeline's slots, and more while a quarter of all is free; who finds no seat goes back to the queue
//! and is told when one should be free.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use tokio::time::Instant;

use super::{Error, Setup};
use crate::{kms, rule::Rule, witness::Witness};

/// Nobody is told to come back later than this: what is expected of a KMS can be wrong.
const FARTHEST: Duration = Duration::from_secs(60);
/// So much more than a witness is expected to sign is called back, so that its seats are never empty while events wait.
const SPARE: f64 = 1.25;
/// Of those who wait for a KMS that is away so many come back a second.
const RETURNING: f64 = 100.0;

/// The seats of all witnesses.
#[derive(Debug, Default)]
pub struct Seats {
    /// Events that are handled at once; no bound, if 0.
    slots: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Events in a slot.
    slotted: usize,
    by_witness: HashMap<String, Row>,
}

#[derive(Debug)]
struct Row {
    taken: usize,
    /// When the last one of those who found no seat comes back, and a little later.
    booked: Instant,
}

/// One event (or several that are handled together) in its slot, and its seats, until it is dropped.
#[derive(Debug)]
pub struct Seated<'a> {
    seats: &'a Seats,
    witnesses: Vec<String>,
}

/// The seats, and the rules that cannot be carried out now.
pub type Assigned<'a> = (Seated<'a>, Vec<(Arc<Rule>, Arc<Error>)>);

impl Seats {
    pub fn new(slots: usize) -> Self {
        Self { slots, state: Mutex::default() }
    }

    /// Finds one seat for these events together at each rule's witness. Returns the rules whose witness is known here and cannot be
    /// asked, with the reason.
    pub fn assign(&self, setup: &Setup, rules: &[Arc<Rule>], events: usize) -> Assigned<'_> {
        let mut seated = self.enter();
        let mut answers: HashMap<&str, Option<Arc<Error>>> = HashMap::new();
        let mut turned_away = vec![];
        for rule in rules {
            let answer = answers.entry(&rule.witness).or_insert_with(|| {
                let witness = setup.witnesses.get(&rule.witness)?;
                seated.take(witness, setup.witnesses.len(), events).err().map(Arc::new)
            });
            if let Some(error) = answer {
                turned_away.push((rule.clone(), error.clone()));
            }
        }
        (seated, turned_away)
    }

    /// An event that is handled in one of the slots, with no seat yet.
    fn enter(&self) -> Seated<'_> {
        self.state().slotted += 1;
        Seated { seats: self, witnesses: vec![] }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while it holds the seats")
    }
}

impl Seated<'_> {
    /// Takes a seat at one of `witnesses` many, or says why not and when to come back.
    fn take(&mut self, witness: &Witness, witnesses: usize, events: usize) -> Result<(), Error> {
        let slots = self.seats.slots;
        let mut state = self.seats.state();
        // Less this event's own.
        let free = slots.saturating_sub(state.slotted);
        let row = state.row(witness.name());
        match witness.look() {
            Ok(()) => {}
            Err(kms::Error::Away { key, since, next, after }) => {
                return Err(kms::Error::Away { key, since, next, after: row.book(after, RETURNING, events) }.into());
            }
            Err(error) => return Err(error.into()),
        }
        if slots == 0 || row.taken < (slots / witnesses.max(1)).max(1) || free >= slots / 4 {
            row.taken += 1;
            self.witnesses.push(witness.name().to_owned());
            return Ok(());
        }
        let after = row.book(Duration::ZERO, witness.expected_rate() * SPARE, events);
        Err(Error::Crowded { witness: witness.name().to_owned(), after })
    }
}

impl State {
    fn row(&mut self, witness: &str) -> &mut Row {
        if !self.by_witness.contains_key(witness) {
            self.by_witness.insert(witness.to_owned(), Row { taken: 0, booked: Instant::now() });
        }
        self.by_witness.get_mut(witness).expect("it was just put there")
    }
}

impl Row {
    /// They are called back one after the other, as fast as they can be served. Those that came together come back so.
    fn book(&mut self, earliest: Duration, per_second: f64, events: usize) -> Duration {
        let now = Instant::now();
        let farthest = now + FARTHEST.max(earliest);
        let at = self.booked.max(now + earliest);
        let served = Duration::from_secs_f64(1.0 / per_second.max(0.1)) * u32::try_from(events).unwrap_or(u32::MAX);
        self.booked = (at + served).min(farthest);
        let after = at - now;
        if at < farthest { after } else { after.mul_f64(1.0 - fastrand::f64() / 4.0) }
    }
}

impl Drop for Seated<'_> {
    fn drop(&mut self) {
        let mut state = self.seats.state();
        state.slotted -= 1;
        for witness in &self.witnesses {
            state.row(witness).taken -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        clock::Clock,
        kms::{self, KeySpec},
        witness::{Rate, WitnessSettings},
    };

    async fn witness(name: &str, per_second: u32) -> Witness {
        let folder = tempfile::tempdir().unwrap();
        let key = folder.path().join("key.pem");
        kms::generate(KeySpec::EcP256, &key).unwrap();
        let settings = WitnessSettings {
            name: name.into(),
            description: String::new(),
            key: kms::KeyUri::File(key),
            login: None,
            verify: vec![],
            rate: Some(Rate { per_second, burst: 1 }),
            pin: None,
        };
        Witness::open(&settings, Clock::system()).await.unwrap()
    }

    fn take<'a>(seats: &'a Seats, witness: &Witness) -> Result<Seated<'a>, Duration> {
        let mut seated = seats.enter();
        match seated.take(witness, 2, 1) {
            Ok(()) => Ok(seated),
            Err(Error::Crowded { after, .. }) => Err(after),
            Err(error) => panic!("{error}"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_witness_leaves_a_quarter_of_the_slots_and_two_share_them_all() {
        let (slow, other) = (witness("slow", 5).await, witness("other", 5).await);
        let seats = Seats::new(32);
        let slow_ones: Vec<_> = (0..100).filter_map(|_| take(&seats, &slow).ok()).collect();
        assert_eq!(slow_ones.len(), 24);
        let others: Vec<_> = (0..100).filter_map(|_| take(&seats, &other).ok()).collect();
        assert_eq!(others.len(), 16, "its share, whatever the other has");
        drop((slow_ones, others));
        assert!(take(&seats, &slow).is_ok());
        assert_eq!(seats.state().slotted, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn who_finds_no_seat_is_called_back_at_the_pace_of_the_witness() {
        let slow = witness("slow", 5).await;
        let seats = Seats::new(4);
        let _taken: Vec<_> = (0..3).map(|_| take(&seats, &slow).unwrap()).collect();
        let waits: Vec<_> = (0..200).map(|_| take(&seats, &slow).unwrap_err().as_secs_f64()).collect();
        assert!(waits[0] < 0.01 && (waits[100] - 16.0).abs() < 0.1, "{waits:?}");
        let more: Vec<_> = (0..1000).map(|_| take(&seats, &slow).unwrap_err()).collect();
        let farthest = more.iter().max().unwrap();
        assert!(*farthest <= FARTHEST && *farthest > FARTHEST / 2, "{farthest:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn without_slots_there_is_room_for_everybody() {
        let slow = witness("slow", 5).await;
        let seats = Seats::default();
        let all: Vec<_> = (0..1000).filter_map(|_| take(&seats, &slow).ok()).collect();
        assert_eq!(all.len(), 1000);
    }
}
