//! Decides which steps below the threshold are worth telling: those that may add up to a cumulative block.
//!
//! A loop that is healthy has no step of the floor's length, or so few that their sum stays small: nothing is told of
//! it. The sum is of the current window and the one before it, so it is never below that of a sliding window.

/// From where on short steps count, and from where on their sum does.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShortPace {
    /// A step that held the loop less than this by its own doing does not count.
    pub floor_ns: u64,
    pub window_ns: u64,
    /// With so much of them in a window, short steps are told.
    pub enough_ns: u64,
}

/// How much of short steps there was lately.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShortSum {
    since_ns: u64,
    sum_ns: u64,
    before_ns: u64,
}

impl ShortSum {
    /// A step that counts has ended. Whether it and those before it may add up.
    #[inline(always)]
    pub fn add(&mut self, now: u64, own_ns: u64, pace: &ShortPace) -> bool {
        let passed = now.saturating_sub(self.since_ns);
        if passed >= pace.window_ns {
            self.before_ns = if passed < pace.window_ns.saturating_mul(2) { self.sum_ns } else { 0 };
            self.sum_ns = 0;
            self.since_ns = now;
        }
        self.sum_ns = self.sum_ns.saturating_add(own_ns);
        self.sum_ns.saturating_add(self.before_ns) >= pace.enough_ns
    }

    /// Whether short steps are being told.
    #[inline(always)]
    pub fn is_enough(&self, now: u64, pace: &ShortPace) -> bool {
        let passed = now.saturating_sub(self.since_ns);
        let sum = if passed < pace.window_ns {
            self.sum_ns.saturating_add(self.before_ns)
        } else if passed < pace.window_ns.saturating_mul(2) {
            self.sum_ns
        } else {
            0
        };
        sum >= pace.enough_ns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;
    const PACE: ShortPace = ShortPace { floor_ns: 5 * MS, window_ns: 1000 * MS, enough_ns: 25 * MS };

    /// Steps of 8 ms that end at these milliseconds: which of them are told.
    fn check(ends: &[u64], expected: &[u64]) -> ShortSum {
        let mut sum = ShortSum::default();
        let told: Vec<u64> = ends.iter().copied().filter(|end| sum.add(end * MS, 8 * MS, &PACE)).collect();
        assert_eq!(told, expected);
        sum
    }

    #[test]
    fn the_first_few_are_not_told() {
        check(&[5000, 5010, 5020, 5030, 5040], &[5030, 5040]);
    }

    #[test]
    fn steps_far_apart_never_are() {
        let every_second: Vec<u64> = (5..100).map(|second| second * 1000).collect();
        check(&every_second, &[]);
    }

    #[test]
    fn a_window_that_begins_anew_remembers_the_last_one() {
        check(&[5000, 5900, 5990, 6005], &[6005]);
        check(&[5000, 5010, 5020, 7500, 7510], &[]);
    }

    #[test]
    fn after_two_windows_of_silence_nothing_is_left() {
        let sum = check(&[5000, 5010, 5020, 5030], &[5030]);
        assert!(sum.is_enough(5500 * MS, &PACE));
        assert!(sum.is_enough(6900 * MS, &PACE));
        assert!(!sum.is_enough(7001 * MS, &PACE));
    }
}
