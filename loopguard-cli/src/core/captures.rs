//! Collects the captures of a thread's newest step until it is known whether that step became a block.

use super::event::{Capture, Owner};

/// A longer step keeps fewer captures of its past, never more in all.
pub const MAX_CAPTURES: usize = 512;

/// The captures of one thread. A record of a later step shows that the ones collected so far belonged to a step that
/// ended below the threshold.
#[derive(Debug, Default)]
pub struct OpenCaptures {
    seq: u64,
    captures: Vec<Capture>,
}

impl OpenCaptures {
    pub fn add(&mut self, capture: Capture) {
        self.move_to(capture.step_seq);
        if capture.step_seq < self.seq {
            return;
        }
        if self.captures.len() == MAX_CAPTURES {
            self.thin_out();
        }
        self.captures.push(capture);
    }

    /// The captures of step `seq`, which has ended: nothing more of it is accepted.
    pub fn take(&mut self, seq: u64) -> Vec<Capture> {
        self.move_to(seq);
        if seq < self.seq {
            return Vec::new();
        }
        self.seq = seq.saturating_add(1);
        std::mem::take(&mut self.captures)
    }

    /// The captures so far of step `seq`, which still runs.
    pub fn so_far(&mut self, seq: u64) -> &[Capture] {
        self.move_to(seq);
        if seq < self.seq { &[] } else { &self.captures }
    }

    fn move_to(&mut self, seq: u64) {
        if seq > self.seq {
            self.seq = seq;
            self.captures.clear();
        }
    }

    /// Of each two neighbours keeps the one that tells more. The time a dropped one stood for passes to its successor,
    /// because a capture stands for all the time since the capture before it.
    fn thin_out(&mut self) {
        let mut captures = std::mem::take(&mut self.captures).into_iter();
        self.captures.reserve(MAX_CAPTURES);
        while let Some(first) = captures.next() {
            let kept = match captures.next() {
                Some(second) if tells(&second) > tells(&first) => second,
                _ => first,
            };
            self.captures.push(kept);
        }
    }
}

/// A known owner is worth more than any wait, a longer wait more than a shorter one.
fn tells(capture: &Capture) -> (bool, u64) {
    (!matches!(capture.owner, Owner::Unknown(_)), capture.until_ns.saturating_sub(capture.at_ns))
}

#[cfg(test)]
mod tests {
    use super::super::story::{ms, sample, wait};
    use super::*;

    fn instants(open: &mut OpenCaptures, seq: u64) -> Vec<u64> {
        open.take(seq).iter().map(|capture| capture.at_ns / ms(1)).collect()
    }

    #[test]
    fn a_later_step_shows_that_the_one_before_it_was_short() {
        let mut open = OpenCaptures::default();
        open.add(sample(1, 10, "A"));
        open.add(sample(2, 20, "A"));
        assert!(open.so_far(1).is_empty());
        assert_eq!(instants(&mut open, 2), [20]);
    }

    #[test]
    fn an_ended_step_takes_no_late_captures() {
        let mut open = OpenCaptures::default();
        open.add(sample(3, 10, "A"));
        assert_eq!(instants(&mut open, 3), [10]);
        open.add(sample(3, 11, "A"));
        assert_eq!(instants(&mut open, 3), [0; 0]);
        open.add(sample(4, 12, "A"));
        assert_eq!(instants(&mut open, 4), [12]);
    }

    #[test]
    fn a_long_step_is_thinned_and_keeps_what_tells_most() {
        let mut open = OpenCaptures::default();
        for at in 0..5000 {
            open.add(match at {
                100 => wait(1, 100..101, "A recvfrom"),
                _ => sample(1, at, "?"),
            });
            assert!(open.captures.len() <= MAX_CAPTURES);
        }
        let kept = open.take(1);
        assert!(kept.iter().any(|capture| capture.wait.is_some()), "the only capture with an owner");
        assert!(kept.is_sorted_by_key(|capture| capture.at_ns));
        assert_eq!(kept.last().map(|capture| capture.at_ns), Some(ms(4999)));
    }
}
