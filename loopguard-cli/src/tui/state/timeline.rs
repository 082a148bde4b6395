//! Turns blocks into how long each loop was held up over the last hours, in rings of fixed size.

use std::sync::Arc;

use super::cause::Cause;
use crate::core::event::{LoopInfo, Tid};

/// What one column of the screen may stand for, narrowest first.
pub const ZOOMS_NS: [u64; 5] = [FINE.slot_ns, 1_000_000_000, COARSE.slot_ns, 15_000_000_000, 60_000_000_000];

const FINE: Grain = Grain { slot_ns: 200_000_000, slots: 4500 };
const COARSE: Grain = Grain { slot_ns: 5_000_000_000, slots: 2880 };
/// Threads that have a lane; the one that blocked longest ago makes room.
const MAX_LANES: usize = 32;

#[derive(Clone, Debug, Default)]
pub struct Timeline {
    /// Sorted by process and thread.
    lanes: Vec<Lane>,
}

/// The blocks of one loop thread.
#[derive(Clone, Debug)]
pub struct Lane {
    pub on: Arc<LoopInfo>,
    fine: Ring,
    coarse: Ring,
    last_ns: u64,
}

/// The longest block that touches a stretch of time, and what it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peak {
    pub ns: u64,
    pub cause: Cause,
}

#[derive(Clone, Copy, Debug)]
struct Grain {
    slot_ns: u64,
    slots: usize,
}

/// The newest slots of an endless row.
#[derive(Clone, Debug)]
struct Ring {
    grain: Grain,
    slots: Vec<Option<Peak>>,
    /// Number of the newest slot since the clock's zero.
    newest: u64,
}

impl Timeline {
    pub fn add(&mut self, on: &LoopInfo, start_ns: u64, end_ns: u64, cause: Cause) {
        let lane = self.lane(on);
        let peak = Peak { ns: end_ns.saturating_sub(start_ns), cause };
        lane.fine.mark(start_ns, end_ns, peak);
        lane.coarse.mark(start_ns, end_ns, peak);
        lane.last_ns = lane.last_ns.max(end_ns);
    }

    /// Threads that are known get a lane also while they don't block.
    pub fn lane(&mut self, on: &LoopInfo) -> &mut Lane {
        let key = |info: &LoopInfo| (info.pid, info.tid);
        let at = match self.lanes.binary_search_by_key(&key(on), |lane| key(&lane.on)) {
            Ok(at) => at,
            Err(_) => {
                if self.lanes.len() == MAX_LANES
                    && let Some(oldest) = (0..MAX_LANES).min_by_key(|&at| self.lanes[at].last_ns)
                {
                    self.lanes.remove(oldest);
                }
                let at = self.lanes.partition_point(|lane| key(&lane.on) < key(on));
                self.lanes.insert(at, Lane::new(on));
                at
            }
        };
        &mut self.lanes[at]
    }

    pub fn lanes(&self) -> &[Lane] {
        &self.lanes
    }

    /// A thread that never blocked and is gone is not worth a lane.
    pub fn gone(&mut self, tid: Tid) {
        self.lanes.retain(|lane| lane.on.tid != tid || lane.last_ns > 0);
    }
}

impl Lane {
    fn new(on: &LoopInfo) -> Self {
        Self { on: Arc::new(on.clone()), fine: Ring::new(FINE), coarse: Ring::new(COARSE), last_ns: 0 }
    }

    /// The peak of each column, oldest first; the last one holds the instant `until_ns`.
    pub fn columns(&self, column_ns: u64, until_ns: u64, count: usize) -> Vec<Option<Peak>> {
        let ring = if column_ns < COARSE.slot_ns { &self.fine } else { &self.coarse };
        let last = until_ns / column_ns;
        (0..count as u64)
            .rev()
            .map(|back| {
                let from_ns = last.checked_sub(back)? * column_ns;
                ring.peak(from_ns, from_ns + column_ns)
            })
            .collect()
    }
}

impl Ring {
    fn new(grain: Grain) -> Self {
        Self { grain, slots: Vec::new(), newest: 0 }
    }

    fn mark(&mut self, start_ns: u64, end_ns: u64, peak: Peak) {
        // A loop that never blocks takes no room.
        if self.slots.is_empty() {
            self.slots = vec![None; self.grain.slots];
        }
        let (first, last) = (start_ns / self.grain.slot_ns, end_ns / self.grain.slot_ns);
        self.advance(last);
        for slot in first.max(self.oldest())..=last {
            let at = self.place(slot);
            if self.slots[at].is_none_or(|known| known.ns < peak.ns) {
                self.slots[at] = Some(peak);
            }
        }
    }

    fn advance(&mut self, to: u64) {
        let gone = to.saturating_sub(self.newest).min(self.slots.len() as u64);
        for slot in (to + 1).saturating_sub(gone)..=to {
            let at = self.place(slot);
            self.slots[at] = None;
        }
        self.newest = self.newest.max(to);
    }

    fn peak(&self, from_ns: u64, to_ns: u64) -> Option<Peak> {
        let slots = from_ns / self.grain.slot_ns..to_ns / self.grain.slot_ns;
        let known = slots.filter(|slot| (self.oldest()..=self.newest).contains(slot));
        known.filter_map(|slot| *self.slots.get(self.place(slot))?).max_by_key(|peak| peak.ns)
    }

    fn oldest(&self) -> u64 {
        (self.newest + 1).saturating_sub(self.grain.slots as u64)
    }

    fn place(&self, slot: u64) -> usize {
        (slot % self.grain.slots as u64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::event::{Runtime, StepMarks};

    const S: u64 = 1_000_000_000;

    fn thread(tid: u32) -> LoopInfo {
        let thread = "loop".to_owned();
        LoopInfo { pid: 1, tid, thread, runtime: Runtime::Asyncio, worker: None, steps: StepMarks::Exact }
    }

    /// One character a column of a second: the peak in seconds, and its cause.
    fn shown(timeline: &Timeline, zoom: usize, until_s: u64, count: usize) -> String {
        let columns = timeline.lanes()[0].columns(ZOOMS_NS[zoom], until_s * S, count);
        let letter = |peak: Peak| format!("{}{}", peak.ns / S, &peak.cause.name()[..1]);
        columns.into_iter().map(|peak| peak.map_or_else(|| "-".to_owned(), letter)).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn a_block_stands_in_every_column_it_touches() {
        let mut timeline = Timeline::default();
        timeline.add(&thread(1), 100 * S, 103 * S - 1, Cause::Wait);
        timeline.add(&thread(1), 102 * S + 1, 103 * S + 1, Cause::Code);
        assert_eq!(shown(&timeline, 1, 105, 7), "- 2w 2w 2w 1c - -");
        assert_eq!(shown(&timeline, 2, 105, 3), "- 2w -");
    }

    #[test]
    fn rings_forget_what_is_old() {
        let mut timeline = Timeline::default();
        timeline.add(&thread(1), 10 * S, 11 * S, Cause::Code);
        timeline.add(&thread(1), 5000 * S, 5001 * S, Cause::Gil);
        assert_eq!(shown(&timeline, 1, 11, 2), "- -", "beyond the fine ring");
        assert_eq!(shown(&timeline, 2, 11, 1), "1c", "still in the coarse one");
        assert_eq!(shown(&timeline, 1, 5001, 2), "1g 1g");
        timeline.add(&thread(1), 100_000 * S, 200_000 * S, Cause::Host);
        assert_eq!(shown(&timeline, 2, 11, 1), "-");
        assert_eq!(timeline.lanes()[0].fine.slots.len(), FINE.slots);
        assert_eq!(timeline.lanes()[0].coarse.slots.len(), COARSE.slots);
    }

    #[test]
    fn lanes_are_sorted_and_capped() {
        let mut timeline = Timeline::default();
        for tid in (1..=MAX_LANES as u32 + 10).rev() {
            timeline.add(&thread(tid), 0, u64::from(tid) * S, Cause::Code);
        }
        let tids: Vec<u32> = timeline.lanes().iter().map(|lane| lane.on.tid).collect();
        assert_eq!(tids.len(), MAX_LANES);
        assert!(tids.is_sorted());
    }

    #[test]
    fn time_before_the_clock_is_empty() {
        let timeline = {
            let mut timeline = Timeline::default();
            timeline.lane(&thread(1));
            timeline
        };
        assert_eq!(shown(&timeline, 1, 2, 5), "- - - - -");
    }
}
