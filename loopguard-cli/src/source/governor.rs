//! Decides how much less closely to look while watching costs more than its budget.

use std::time::Duration;

/// What is compared is the cost of this long.
const WINDOW: Duration = Duration::from_secs(4);
/// Windows at the start that don't count: files are read and symbols looked up, once.
const FIRST_WINDOWS: u32 = 2;
/// Windows of plenty after which it looks more closely again; twice as many each time that this proves too much.
const PLENTY_WINDOWS: u32 = 15;
const MAX_PLENTY_WINDOWS: u32 = 960;
/// Plenty is a cost below this part of the budget: at the next level it may be several times as high.
const PLENTY: f64 = 0.25;
/// It keeps to this part of the budget. The rest is for what a window does not show: the kernel's part is measured for
/// a twentieth of the time only.
const AIM: f64 = 0.85;
/// Of one processor: below this there is nothing to save, however little the targets do.
const LEAST: f64 = 0.005;
/// How long loops are watched at a time, at least, where they are not watched all the time.
const WATCH: Duration = Duration::from_millis(400);
/// How much longer, to see a block to its end.
const MAX_OVERTIME: Duration = Duration::from_secs(2);

/// Where nobody says what it may cost.
const USUAL: f64 = 0.02;

/// How closely it looks, from the most to the least.
const LEVELS: [Effort; 8] = [
    Effort::FULL,
    Effort { slowdown: 2, reads_details: true, parts: 1 },
    Effort { slowdown: 4, reads_details: true, parts: 1 },
    Effort { slowdown: 8, reads_details: false, parts: 1 },
    Effort { slowdown: 8, reads_details: false, parts: 2 },
    Effort { slowdown: 8, reads_details: false, parts: 4 },
    Effort { slowdown: 8, reads_details: false, parts: 8 },
    Effort { slowdown: 8, reads_details: false, parts: 16 },
];

/// The levels at which every block is still found, with its owner and its stack.
const USUAL_LEVELS: usize = 3;

/// The part of the targets' CPU time that watching them may cost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// Nobody said what: beyond [`USUAL`] samples are fewer, but nothing is missed.
    Usual,
    /// Kept to, whatever has to be given up.
    Strict(f64),
}

impl Budget {
    pub fn share(self) -> f64 {
        match self {
            Self::Usual => USUAL,
            Self::Strict(share) => share,
        }
    }

    fn levels(self) -> &'static [Effort] {
        match self {
            Self::Usual => &LEVELS[..USUAL_LEVELS],
            Self::Strict(_) => &LEVELS,
        }
    }
}

/// How closely to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Effort {
    /// How many times as far apart as usual samples are.
    pub slowdown: u32,
    /// Whether steps are marked, and native stacks and requests in flight read: all that a block can be told without.
    pub reads_details: bool,
    /// Of so many equal parts of the time one is watched.
    pub parts: u32,
}

impl Effort {
    /// Nothing is given up.
    pub const FULL: Self = Self { slowdown: 1, reads_details: true, parts: 1 };

    /// What is different, a sentence for each, for the person at the terminal.
    pub fn changes_from(self, before: Self) -> Vec<String> {
        let mut changes = Vec::new();
        if self.slowdown != before.slowdown {
            changes.push(match self.slowdown {
                1 => "samples are as close as usual again".to_owned(),
                times => format!("samples are {times} times as far apart as usual from now on"),
            });
        }
        if self.reads_details != before.reads_details {
            changes.push(match self.reads_details {
                true => "steps are marked, and native stacks and requests in flight are read again".to_owned(),
                false => {
                    "steps are not marked, and native stacks and requests in flight are not read from now on".to_owned()
                }
            });
        }
        if self.parts != before.parts {
            changes.push(match self.parts {
                1 => "loops are watched all the time again".to_owned(),
                parts => format!("loops are watched 1/{parts} of the time from now on: blocks are missed"),
            });
        }
        changes
    }
}

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
    budget: Budget,
    since: Option<Spent>,
    windows: u32,
    plenty: u32,
    plenty_needed: u32,
    was_raised: bool,
    level: usize,
}

/// What watching costs now, and what follows from it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Change {
    /// Of the targets' CPU time, in the last window.
    pub share: f64,
    pub from: Effort,
    pub to: Effort,
}

impl Governor {
    pub fn new(budget: Budget) -> Self {
        Self { budget, since: None, windows: 0, plenty: 0, plenty_needed: PLENTY_WINDOWS, was_raised: false, level: 0 }
    }

    pub fn effort(&self) -> Effort {
        LEVELS[self.level]
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
        let allowed = (targets * self.budget.share()).max(elapsed.as_secs_f64() * LEAST);
        let before = self.level;
        if own > allowed * AIM {
            self.look_less(if own > 2.0 * allowed { 2 } else { 1 });
        } else if own < allowed * PLENTY {
            self.plenty += 1;
            if self.plenty >= self.plenty_needed && self.level > 0 {
                self.plenty = 0;
                self.level -= 1;
                self.was_raised = true;
            }
        } else {
            self.plenty = 0;
        }
        let share = own / targets.max(1e-3);
        (self.level != before).then(|| Change { share, from: LEVELS[before], to: self.effort() })
    }

    fn look_less(&mut self, levels: usize) {
        self.plenty = 0;
        self.level = (self.level + levels).min(self.budget.levels().len() - 1);
        if std::mem::take(&mut self.was_raised) {
            self.plenty_needed = (self.plenty_needed * 2).min(MAX_PLENTY_WINDOWS);
        }
    }
}

/// Says when to watch and when to rest, where only a part of the time is watched.
#[derive(Clone, Debug, Default)]
pub struct Shifts {
    rests: bool,
    since: Duration,
    /// How long it watched before it rests.
    watched: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shift {
    Watch,
    Rest,
}

impl Shifts {
    pub fn rests(&self) -> bool {
        self.rests
    }

    /// Call it regularly. `is_blocked`: a loop is blocked just now, which is better seen to its end.
    pub fn turn(&mut self, at: Duration, parts: u32, is_blocked: bool) -> Option<Shift> {
        let elapsed = at.saturating_sub(self.since);
        if self.rests {
            if elapsed < self.watched * (parts - 1) {
                return None;
            }
            *self = Self { rests: false, since: at, watched: Duration::ZERO };
            return Some(Shift::Watch);
        }
        if parts == 1 || elapsed < if is_blocked { WATCH + MAX_OVERTIME } else { WATCH } {
            return None;
        }
        // What was watched before there were shifts is no part of one.
        *self = Self { rests: true, since: at, watched: elapsed.min(WATCH + MAX_OVERTIME) };
        Some(Shift::Rest)
    }

    /// What was said could not be done: it rests on, and says it again at the next turn.
    pub fn still_rests(&mut self) {
        self.rests = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Windows with what loopguard and the targets spend in each, in thousandths of a processor, and the level after it.
    fn check(windows: &[(u64, u64, usize)]) {
        check_with(Budget::Strict(0.02), windows);
    }

    fn check_with(budget: Budget, windows: &[(u64, u64, usize)]) {
        let mut governor = Governor::new(budget);
        let mut spent = Spent::default();
        governor.turn(spent);
        for (number, (own, targets, level)) in windows.iter().enumerate() {
            spent.at += WINDOW;
            spent.own += WINDOW.mul_f64(*own as f64 / 1000.0);
            spent.targets += WINDOW.mul_f64(*targets as f64 / 1000.0);
            let before = governor.level;
            let change = governor.turn(spent);
            assert_eq!(governor.level, *level, "window {number}");
            let expected = (before != *level).then(|| (LEVELS[before], LEVELS[*level]));
            assert_eq!(change.map(|change| (change.from, change.to)), expected);
        }
    }

    #[test]
    fn it_looks_less_closely_until_the_budget_holds() {
        check(&[
            (500, 900, 0),
            (300, 900, 0),
            (16, 1000, 0),
            (25, 1000, 1),
            (50, 1000, 3),
            (18, 1000, 4),
            (16, 1000, 4),
        ]);
    }

    #[test]
    fn there_is_a_least() {
        check(&[
            (500, 900, 0),
            (300, 900, 0),
            (90, 1000, 2),
            (90, 1000, 4),
            (90, 1000, 6),
            (90, 1000, 7),
            (90, 1000, 7),
        ]);
    }

    #[test]
    fn nothing_is_missed_for_a_budget_that_nobody_set() {
        check_with(Budget::Usual, &[(500, 900, 0), (300, 900, 0), (90, 1000, 2), (90, 1000, 2)]);
        assert!(Budget::Usual.levels().iter().all(|effort| effort.reads_details && effort.parts == 1));
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

    #[test]
    fn where_that_was_too_much_the_next_time_is_later() {
        let mut windows = vec![(0, 1000, 0), (0, 1000, 0), (30, 1000, 1)];
        windows.extend([(1, 1000, 1); 14]);
        windows.extend([(1, 1000, 0), (30, 1000, 1)]);
        windows.extend([(1, 1000, 1); 29]);
        windows.push((1, 1000, 0));
        check(&windows);
    }

    #[test]
    fn what_is_given_up_and_taken_up_again_is_said() {
        assert_eq!(
            LEVELS[4].changes_from(LEVELS[2]),
            [
                "samples are 8 times as far apart as usual from now on",
                "steps are not marked, and native stacks and requests in flight are not read from now on",
                "loops are watched 1/2 of the time from now on: blocks are missed",
            ]
        );
        assert_eq!(
            LEVELS[0].changes_from(LEVELS[4]),
            [
                "samples are as close as usual again",
                "steps are marked, and native stacks and requests in flight are read again",
                "loops are watched all the time again",
            ]
        );
        let said_nothing = LEVELS.windows(2).filter(|levels| levels[1].changes_from(levels[0]).is_empty());
        assert_eq!(said_nothing.count(), 0);
    }

    /// Turns 200 ms apart: how many of `turns` are watched of so many `parts`.
    fn watched(turns: u64, parts: u32, is_blocked: bool) -> u64 {
        let mut shifts = Shifts::default();
        let mut watched = 0;
        for turn in 1..=turns {
            watched += u64::from(!shifts.rests());
            shifts.turn(Duration::from_millis(200 * turn), parts, is_blocked);
        }
        watched
    }

    #[test]
    fn a_part_of_the_time_is_watched() {
        assert_eq!(watched(1600, 1, false), 1600);
        for parts in [2, 4, 8, 16] {
            assert_eq!(watched(1600, parts, false), u64::from(1600 / parts));
        }
        // Longer at a time, and more rarely.
        assert_eq!(watched(1536, 4, true), 1536 / 4);
    }

    #[test]
    fn what_cannot_be_attached_is_tried_again() {
        let mut shifts = Shifts::default();
        let at = Duration::from_secs;
        assert_eq!(shifts.turn(at(1), 2, false), Some(Shift::Rest));
        assert_eq!(shifts.turn(at(3), 2, false), Some(Shift::Watch));
        shifts.still_rests();
        assert_eq!(shifts.turn(at(4), 2, false), Some(Shift::Watch));
    }
}
