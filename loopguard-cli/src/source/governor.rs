//! Decides how much less closely to look while watching costs more than its budget.

use std::time::Duration;

/// What is compared is the cost of this long.
const WINDOW: Duration = Duration::from_secs(4);
/// Windows at the start that don't count: files are read and symbols looked up, once.
const FIRST_WINDOWS: u32 = 2;
/// Windows of plenty after which it looks more closely again.
const PLENTY_WINDOWS: u32 = 15;
/// Of one processor: below this there is nothing to save, however little the targets do.
const LEAST: f64 = 0.005;
/// Samples are taken half as often at each level; at the last one steps are not marked either.
const LAST_LEVEL: u32 = 3;

/// CPU time spent so far, at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Spent {
    /// Since any fixed moment.
    pub at: Duration,
    /// Of loopguard, its kernel programs included.
    pub own: Duration,
    pub targets: Duration,
}

#[derive(Clone, Debug)]
pub struct Governor {
    /// Part of the targets' CPU time that watching them may cost.
    budget: f64,
    since: Option<Spent>,
    windows: u32,
    plenty: u32,
    level: u32,
}

/// What watching costs now, and what follows from it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Change {
    /// Of the targets' CPU time, in the last window.
    pub share: f64,
    pub is_less: bool,
}

impl Governor {
    pub fn new(budget: f64) -> Self {
        Self { budget, since: None, windows: 0, plenty: 0, level: 0 }
    }

    /// How many times as far apart samples are.
    pub fn slowdown(&self) -> u64 {
        1 << self.level
    }

    pub fn marks_steps(&self) -> bool {
        self.level < LAST_LEVEL
    }

    /// Call it regularly. Whether to look more or less closely from now on.
    pub fn turn(&mut self, now: Spent) -> Option<Change> {
        let since = *self.since.get_or_insert(now);
        let elapsed = now.at.saturating_sub(since.at);
        if elapsed < WINDOW {
            return None;
        }
        self.since = Some(now);
        self.windows += 1;
        if self.windows <= FIRST_WINDOWS {
            return None;
        }
        let own = now.own.saturating_sub(since.own).as_secs_f64();
        let targets = now.targets.saturating_sub(since.targets).as_secs_f64();
        let allowed = (targets * self.budget).max(elapsed.as_secs_f64() * LEAST);
        let before = self.level;
        if own > allowed {
            self.plenty = 0;
            self.level = (self.level + if own > 2.0 * allowed { 2 } else { 1 }).min(LAST_LEVEL);
        } else if own < allowed / 4.0 {
            self.plenty += 1;
            if self.plenty >= PLENTY_WINDOWS {
                self.plenty = 0;
                self.level = self.level.saturating_sub(1);
            }
        } else {
            self.plenty = 0;
        }
        let share = own / targets.max(1e-3);
        (self.level != before).then_some(Change { share, is_less: self.level > before })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Windows with what loopguard and the targets spend in each, in thousandths of a processor, and the level after it.
    fn check(windows: &[(u64, u64, u32)]) {
        let mut governor = Governor::new(0.02);
        let mut spent = Spent::default();
        governor.turn(spent);
        for (number, (own, targets, level)) in windows.iter().enumerate() {
            spent.at += WINDOW;
            spent.own += WINDOW.mul_f64(*own as f64 / 1000.0);
            spent.targets += WINDOW.mul_f64(*targets as f64 / 1000.0);
            let before = governor.level;
            let change = governor.turn(spent);
            assert_eq!(governor.level, *level, "window {number}");
            assert_eq!(change.map(|change| change.is_less), (before != *level).then_some(before < *level));
        }
    }

    #[test]
    fn it_looks_less_closely_until_the_budget_holds() {
        check(&[(500, 900, 0), (300, 900, 0), (20, 1000, 0), (25, 1000, 1), (50, 1000, 3), (60, 1000, 3)]);
    }

    #[test]
    fn targets_that_do_nothing_are_still_watched() {
        check(&[(4, 10, 0); 6]);
    }

    #[test]
    fn it_looks_more_closely_again_after_a_time_of_plenty() {
        let mut windows = vec![(0, 1000, 0), (0, 1000, 0), (30, 1000, 1)];
        windows.extend([(1, 1000, 1); 14]);
        windows.push((1, 1000, 0));
        check(&windows);
    }
}
