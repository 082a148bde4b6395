//! A cache that keeps what was asked for lately, in tables that never grow.

use std::{collections::HashMap, hash::Hash, mem};

/// Two generations. What is asked for is in the young one, or moves there; when that is full it becomes the old one, and
/// what was left in the old one is forgotten.
#[derive(Debug)]
pub struct Recent<K, V> {
    young: HashMap<K, V>,
    old: HashMap<K, V>,
    generation: usize,
}

impl<K: Copy + Eq + Hash, V: Clone> Recent<K, V> {
    /// Keeps at least the `generation` entries that were used last, and at most twice as many.
    pub fn of(generation: usize) -> Self {
        let empty = || HashMap::with_capacity(generation);
        Self { young: empty(), old: empty(), generation }
    }

    pub fn get(&mut self, key: K) -> Option<V> {
        if let Some(value) = self.young.get(&key) {
            return Some(value.clone());
        }
        let value = self.old.remove(&key)?;
        self.insert(key, value.clone());
        Some(value)
    }

    pub fn insert(&mut self, key: K, value: V) {
        if self.young.len() >= self.generation {
            mem::swap(&mut self.young, &mut self.old);
            self.young.clear();
        }
        self.young.insert(key, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_used_stays_and_the_rest_is_forgotten() {
        let mut recent = Recent::of(10);
        for n in 0..1000 {
            recent.insert(n, n * 2);
            assert_eq!(recent.get(0), Some(0));
            assert!(recent.young.len() + recent.old.len() <= 20);
        }
        // The last ones before the next generation begins, in any case.
        assert!((991..1000).all(|n| recent.get(n) == Some(n * 2)));
        assert_eq!((1..970).filter(|&n| recent.get(n).is_some()).count(), 0);
    }
}
