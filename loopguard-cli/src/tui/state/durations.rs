//! Turns any number of durations into their quantiles, in bounded memory.

use std::collections::BTreeMap;

/// Buckets per doubling: a quantile is at most this part of itself too high.
const PER_DOUBLING: u64 = 16;

/// A histogram of logarithmic buckets. Only those in use take room.
#[derive(Clone, Debug, Default)]
pub struct Durations {
    counts: BTreeMap<u16, u64>,
    total: u64,
}

impl Durations {
    pub fn add(&mut self, ns: u64) {
        *self.counts.entry(bucket(ns)).or_default() += 1;
        self.total += 1;
    }

    /// The duration that `share` of all do not exceed, rounded up by a bucket at most; 0 when there are none.
    pub fn quantile(&self, share: f64) -> u64 {
        let rank = ((self.total as f64 * share).ceil() as u64).clamp(1, self.total.max(1));
        let mut seen = 0;
        for (&bucket, &count) in &self.counts {
            seen += count;
            if seen >= rank {
                return upper_bound(bucket);
            }
        }
        0
    }
}

/// Exact below `PER_DOUBLING`, then that many buckets for each doubling.
fn bucket(ns: u64) -> u16 {
    if ns < PER_DOUBLING {
        return ns as u16;
    }
    let doublings = u64::from(ns.ilog2() - PER_DOUBLING.ilog2());
    (doublings * PER_DOUBLING + (ns >> doublings)) as u16
}

fn upper_bound(bucket: u16) -> u64 {
    let bucket = u64::from(bucket);
    if bucket < PER_DOUBLING {
        return bucket;
    }
    let doublings = bucket / PER_DOUBLING - 1;
    let lowest = (bucket % PER_DOUBLING + PER_DOUBLING) << doublings;
    lowest + ((1 << doublings) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_holds_what_is_put_into_it() {
        for ns in (0..2000).chain((0..64).flat_map(|bit| [(1 << bit) - 1, 1 << bit, (1 << bit) + 1])) {
            let upper = upper_bound(bucket(ns));
            assert!(upper >= ns, "{ns}: {upper}");
            assert!(upper - ns <= ns / PER_DOUBLING, "{ns}: {upper}");
        }
        assert_eq!(upper_bound(bucket(u64::MAX)), u64::MAX);
    }

    #[test]
    fn quantiles() {
        let mut durations = Durations::default();
        assert_eq!(durations.quantile(0.99), 0);
        for ms in 1..=1000 {
            durations.add(ms * 1_000_000);
        }
        let near = |found: u64, expected: u64| {
            (expected..=expected + expected / PER_DOUBLING).contains(&found).then_some(()).ok_or(found)
        };
        assert_eq!(near(durations.quantile(0.5), 500_000_000), Ok(()));
        assert_eq!(near(durations.quantile(0.99), 990_000_000), Ok(()));
        assert_eq!(near(durations.quantile(1.0), 1_000_000_000), Ok(()));
    }

    #[test]
    fn memory_does_not_grow_with_the_number_of_durations() {
        let mut durations = Durations::default();
        for ns in 0..1_000_000u64 {
            durations.add(ns.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        }
        assert!(durations.counts.len() <= 64 * PER_DOUBLING as usize);
    }
}
