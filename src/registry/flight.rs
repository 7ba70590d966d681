//! The same work, asked for many times at once, is done once.

use std::{collections::HashMap, hash::Hash, sync::Mutex};

use futures::{
    FutureExt,
    future::{BoxFuture, Shared, WeakShared},
};

/// Work that is under way, by what it is for.
///
/// All who wait for it drive it, so it goes on as long as one of them is left, and ends unfinished with the last of them.
pub(crate) struct Flights<K, T: Clone>(Mutex<HashMap<K, WeakShared<BoxFuture<'static, T>>>>);

impl<K: Hash + Eq, T: Clone> Flights<K, T> {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(HashMap::new()))
    }

    /// Joins the work on `key`, or begins it. The future of `begin` is not polled before this returns.
    pub(crate) fn join(&self, key: K, begin: impl FnOnce() -> BoxFuture<'static, T>) -> Shared<BoxFuture<'static, T>> {
        let mut flights = self.0.lock().expect("nothing panics while it holds this");
        if let Some(flight) = flights.get(&key).and_then(WeakShared::upgrade) {
            return flight;
        }
        flights.retain(|_, flight| flight.upgrade().is_some());
        let flight = begin().shared();
        flights.insert(key, flight.downgrade().expect("a future that was never polled has not ended"));
        flight
    }
}
