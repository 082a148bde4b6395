//! Values of which many are alike: one of each is kept.

use std::{borrow::Borrow, collections::HashSet, hash::Hash, sync::Arc};

/// Below so many it is not worth looking for those that nobody has any more.
const FEW: usize = 1024;

/// The values that somebody has, each once; and some that nobody has any more.
#[derive(Debug)]
pub struct Shared<T: ?Sized> {
    known: HashSet<Arc<T>>,
    /// How many there are when those that nobody has are forgotten.
    full: usize,
}

impl<T: ?Sized> Default for Shared<T> {
    fn default() -> Self {
        Self { known: HashSet::new(), full: FEW }
    }
}

impl<T: Eq + Hash + ?Sized> Shared<T> {
    /// The one that is like `value`.
    pub fn one(&mut self, value: impl Borrow<T> + Into<Arc<T>>) -> Arc<T> {
        if let Some(known) = self.known.get(value.borrow()) {
            return Arc::clone(known);
        }
        if self.known.len() >= self.full {
            self.known.retain(|known| Arc::strong_count(known) > 1);
            self.full = FEW.max(self.known.len() * 2);
        }
        let value = value.into();
        self.known.insert(Arc::clone(&value));
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_that_are_alike_are_one_as_long_as_somebody_has_them() {
        let mut shared = Shared::default();
        let kept = shared.one(0);
        for value in 1..10 * FEW {
            shared.one(value);
            assert!(shared.known.len() <= FEW);
        }
        assert!(Arc::ptr_eq(&kept, &shared.one(0)));
        let all: Vec<_> = (0..10 * FEW).map(|value| shared.one(value)).collect();
        assert!(Arc::ptr_eq(&all[0], &kept));
        assert_eq!(shared.known.len(), all.len());
    }
}
