use std::{collections::HashMap, hash::Hash, mem};

/// What was found lately, at most so many entries. What is asked for stays; of the rest, the older half goes at once, so
/// that neither looking up nor forgetting depends on how much there is.
pub(super) struct Generations<K, V> {
    young: HashMap<K, V>,
    old: HashMap<K, V>,
    half: usize,
}

impl<K: Hash + Eq + Clone, V: Clone> Generations<K, V> {
    /// Room for `entries`, of which there are at least two.
    pub(super) fn new(entries: usize) -> Self {
        Self { young: HashMap::new(), old: HashMap::new(), half: (entries / 2).max(1) }
    }

    pub(super) fn get(&mut self, key: &K) -> Option<V> {
        if let Some(value) = self.young.get(key) {
            return Some(value.clone());
        }
        let (key, value) = self.old.remove_entry(key)?;
        self.insert(key, value.clone());
        Some(value)
    }

    pub(super) fn insert(&mut self, key: K, value: V) {
        self.old.remove(&key);
        if self.young.len() >= self.half && !self.young.contains_key(&key) {
            self.old = mem::take(&mut self.young);
        }
        self.young.insert(key, value);
    }

    pub(super) fn forget(&mut self, key: &K) {
        self.young.remove(key);
        self.old.remove(key);
    }

    pub(super) fn clear(&mut self) {
        self.young.clear();
        self.old.clear();
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.young.len() + self.old.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_million_entries_stay_within_bounds_and_what_is_asked_for_stays() {
        let mut cache = Generations::new(1000);
        for number in 0..1_000_000 {
            cache.insert(number, number);
            assert!(cache.get(&0).is_some(), "forgotten at {number}");
            assert!(cache.len() <= 1001);
        }
        assert!(cache.get(&1).is_none());
        assert_eq!(cache.get(&999_999), Some(999_999));
    }

    #[test]
    fn an_entry_has_one_value() {
        let mut cache = Generations::new(2);
        cache.insert("a", 1);
        cache.insert("b", 2);
        cache.insert("a", 3);
        assert_eq!((cache.get(&"a"), cache.len()), (Some(3), 2));
        cache.clear();
        assert_eq!(cache.len(), 0);
    }
}
