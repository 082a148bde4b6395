//! Turns updates and live figures into all that the screen can show, in bounded memory.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::cause::Cause;
use super::ranking::{Held, Ranking, WaitLabel};
use super::seen::Seen;
use super::timeline::Timeline;
use crate::core::event::Tid;
use crate::core::incident::{Cumulative, Incident, Ongoing, ThresholdChange, Update};
use crate::core::status::{Status, ThreadStatus};
use crate::core::summary::{LineLabel, RouteLabel, line_label, route_label};
use crate::sink::text::span;

/// Blocks that can be looked at one by one; older ones live on in the tables.
pub const MAX_RECENT: usize = 1000;
pub const MAX_NOTICES: usize = 200;
/// Processes that are told apart in the header.
const MAX_TARGETS: usize = 64;
/// Blocks that go on and are shown.
const MAX_ONGOING: usize = 64;

#[derive(Clone, Debug, Default)]
pub struct Picture {
    pub targets: Vec<Target>,
    pub blocks: u64,
    /// Newest last.
    pub recent: VecDeque<Recent>,
    pub routes: Ranking<RouteLabel>,
    pub lines: Ranking<LineLabel>,
    pub waits: Ranking<WaitLabel>,
    pub timeline: Timeline,
    /// Oldest first.
    pub ongoing: Vec<Ongoing>,
    /// Short steps that add up right now.
    pub adding_up: Vec<Cumulative>,
    /// Thresholds follow what is usual on each loop.
    pub is_adaptive: bool,
    pub notices: VecDeque<String>,
    pub notice_count: u64,
    pub status: Option<Status>,
    /// loopguard's own share of one processor over the last moments.
    pub own_cpu: Option<f64>,
    /// The busy share of each thread over the last moments.
    pub busy: HashMap<Tid, f64>,
    minute: LastMinute,
}

/// A process that is watched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    pub pid: u32,
    pub command: String,
    /// `CPython 3.12.1`
    pub language: String,
}

/// A block, with a number by which it is found again.
#[derive(Clone, Debug)]
pub struct Recent {
    pub number: u64,
    pub block: Arc<Seen>,
}

/// Blocked time of each of the last seconds, all threads together.
#[derive(Clone, Debug, Default)]
struct LastMinute {
    /// Second of the clock, nanoseconds.
    seconds: VecDeque<(u64, u64)>,
}

impl Picture {
    pub fn update(&mut self, update: &Update) {
        match update {
            Update::Block(incident) => self.ended(incident),
            Update::Ongoing(ongoing) => self.goes_on(ongoing),
            Update::Cumulative(block) => self.added_up(block),
            Update::CumulativeOngoing(block) => self.adds_up(block),
            Update::Threshold(change) => self.threshold(change),
            // The screen is about blocks; a request that held up nobody has no place on it.
            Update::Request(_) => {}
        }
    }

    fn ended(&mut self, incident: &Incident) {
        self.timeline.add(&incident.on, incident.start_ns, incident.end_ns, Cause::of(&incident.split));
        self.minute.add(incident.start_ns, incident.end_ns);
        self.ongoing.retain(|open| open.on.tid != incident.on.tid || open.start_ns > incident.end_ns);
        self.keep(Seen::Single(incident.clone()));
    }

    fn added_up(&mut self, block: &Cumulative) {
        // On the timeline stands what held the loop at once, and these did not.
        self.adding_up.retain(|open| open.on.tid != block.on.tid);
        self.keep(Seen::Cumulative(block.clone()));
    }

    fn keep(&mut self, block: Seen) {
        let held = Held { ns: block.blocked_ns(), victims_ns: block.victims().map_or(0, |victims| victims.delay_ns) };
        self.blocks += 1;
        self.routes.add(route_label(&block.blame().owner), held);
        self.lines.add(line_label(block.blame()), held);
        for wait in block.waits() {
            self.waits.add(WaitLabel::of(wait), Held { ns: wait.ns, ..held });
        }
        if self.recent.len() == MAX_RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back(Recent { number: self.blocks, block: Arc::new(block) });
    }

    fn adds_up(&mut self, block: &Cumulative) {
        self.adding_up.retain(|open| open.on.tid != block.on.tid);
        if self.adding_up.len() < MAX_ONGOING {
            self.adding_up.push(block.clone());
        }
    }

    fn threshold(&mut self, change: &ThresholdChange) {
        self.is_adaptive = true;
        let ThresholdChange { on, threshold_ns, baseline_ns } = change;
        let (threshold, baseline) = (span(*threshold_ns), span(*baseline_ns));
        self.notice(&format!(
            "thread {} ({}): the threshold is {threshold} now, usual are {baseline}",
            on.tid, on.thread
        ));
    }

    fn goes_on(&mut self, ongoing: &Ongoing) {
        self.ongoing.retain(|open| open.on.tid != ongoing.on.tid);
        if self.ongoing.len() < MAX_ONGOING {
            let at = self.ongoing.partition_point(|open| open.start_ns <= ongoing.start_ns);
            self.ongoing.insert(at, ongoing.clone());
        }
    }

    pub fn status(&mut self, status: &Status) {
        if let Some(before) = &self.status {
            self.own_cpu = share(status.self_cpu.saturating_sub(before.self_cpu), before.now_ns, status.now_ns);
            self.busy = busy_shares(before, status);
        }
        for thread in status.threads.iter().filter(|thread| !thread.is_gone) {
            self.timeline.lane(&thread.info);
        }
        for thread in status.threads.iter().filter(|thread| thread.is_gone) {
            self.timeline.gone(thread.info.tid);
        }
        self.ongoing.retain(|open| still_runs(open, status));
        let is_gone =
            |open: &Cumulative| !status.threads.iter().any(|thread| thread.info.tid == open.on.tid && !thread.is_gone);
        self.adding_up.retain(|open| !is_gone(open));
        self.status = Some(status.clone());
    }

    pub fn found(&mut self, target: Target) {
        match self.targets.iter().position(|known| known.pid == target.pid) {
            Some(at) => self.targets[at] = target,
            None if self.targets.len() < MAX_TARGETS => self.targets.push(target),
            None => {}
        }
    }

    pub fn notice(&mut self, text: &str) {
        if self.notices.len() == MAX_NOTICES {
            self.notices.pop_front();
        }
        self.notices.push_back(text.to_owned());
        self.notice_count += 1;
    }

    /// The share of the last minute in which a loop was blocked: the mean of all watched threads.
    pub fn blocked_share(&self, now_ns: u64) -> f64 {
        let since_ns = self.status.as_ref().map_or(now_ns, |status| status.since_ns);
        let window_ns = now_ns.saturating_sub(since_ns).min(LastMinute::NS);
        let threads = self.threads().filter(|thread| !thread.is_gone).count().max(1);
        let open_ns: u64 = self.ongoing.iter().map(|open| now_ns.saturating_sub(open.start_ns).min(window_ns)).sum();
        let blocked_ns = self.minute.sum(now_ns) + open_ns;
        if window_ns == 0 { 0.0 } else { (blocked_ns as f64 / window_ns as f64 / threads as f64).min(1.0) }
    }

    pub fn threads(&self) -> impl Iterator<Item = &ThreadStatus> {
        self.status.iter().flat_map(|status| &status.threads)
    }

    pub fn block(&self, number: u64) -> Option<&Arc<Seen>> {
        let at = self.recent.binary_search_by_key(&number, |recent| recent.number).ok()?;
        Some(&self.recent[at].block)
    }
}

/// Whether the step of a block that was seen going on still runs: its thread may have gone on, and its end be lost.
fn still_runs(open: &Ongoing, status: &Status) -> bool {
    let Some(thread) = status.threads.iter().find(|thread| thread.info.tid == open.on.tid) else { return false };
    let runs = thread.step_start_ns.is_some_and(|start_ns| start_ns <= open.now_ns);
    !thread.is_gone && (runs || status.now_ns <= open.now_ns)
}

fn busy_shares(before: &Status, now: &Status) -> HashMap<Tid, f64> {
    let of = |thread: &ThreadStatus| {
        let known = before.threads.iter().find(|known| known.info == thread.info)?;
        // A tick counts when it ends: the one that runs is added, as far as it lies in between.
        let open = |thread: &ThreadStatus, at_ns: u64| {
            thread.step_start_ns.map_or(0, |start_ns| at_ns.saturating_sub(start_ns))
        };
        let busy_now = thread.busy_ns + open(thread, now.now_ns);
        let busy_then = known.busy_ns + open(known, before.now_ns);
        let busy = Duration::from_nanos(busy_now.saturating_sub(busy_then));
        Some((thread.info.tid, share(busy, before.now_ns, now.now_ns)?.min(1.0)))
    };
    now.threads.iter().filter(|thread| !thread.is_gone).filter_map(of).collect()
}

fn share(used: Duration, from_ns: u64, to_ns: u64) -> Option<f64> {
    let elapsed = to_ns.checked_sub(from_ns).filter(|elapsed| *elapsed > 0)?;
    Some(used.as_nanos() as f64 / elapsed as f64)
}

impl LastMinute {
    const SECOND_NS: u64 = 1_000_000_000;
    const SECONDS: u64 = 60;
    const NS: u64 = Self::SECONDS * Self::SECOND_NS;

    fn add(&mut self, start_ns: u64, end_ns: u64) {
        let last = end_ns / Self::SECOND_NS;
        let first = (start_ns / Self::SECOND_NS).max(last.saturating_sub(Self::SECONDS));
        for second in first..=last {
            let begins = second * Self::SECOND_NS;
            let ns = end_ns.min(begins + Self::SECOND_NS).saturating_sub(start_ns.max(begins));
            match self.seconds.binary_search_by_key(&second, |(known, _)| *known) {
                Ok(at) => self.seconds[at].1 += ns,
                Err(at) => self.seconds.insert(at, (second, ns)),
            }
        }
        while self.seconds.front().is_some_and(|(known, _)| known + Self::SECONDS < last) {
            self.seconds.pop_front();
        }
    }

    fn sum(&self, now_ns: u64) -> u64 {
        let now = now_ns / Self::SECOND_NS;
        self.seconds.iter().filter(|(second, _)| second + Self::SECONDS >= now).map(|(_, ns)| ns).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::super::scripted::{block_at, ms, ongoing_at, status_at};
    use super::*;

    fn close(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-9, "{found}");
    }

    #[test]
    fn the_blocked_share_is_that_of_the_last_minute() {
        let mut picture = Picture::default();
        picture.status(&status_at(ms(0)));
        picture.update(&Update::Block(block_at("GET /", ms(9_500)..ms(10_500))));
        close(picture.blocked_share(ms(20_000)), 0.05);
        close(picture.blocked_share(ms(61_000)), 1.0 / 60.0);
        close(picture.blocked_share(ms(70_500)), 0.5 / 60.0);
        close(picture.blocked_share(ms(90_000)), 0.0);
        picture.update(&Update::Ongoing(ongoing_at("GET /", ms(90_000)..ms(90_500))));
        close(picture.blocked_share(ms(93_000)), 3.0 / 60.0);
        // Longer than the window, however long.
        picture.update(&Update::Block(block_at("GET /", ms(90_000)..ms(400_000))));
        close(picture.blocked_share(ms(400_000)), 1.0);
    }

    #[test]
    fn a_block_that_goes_on_is_shown_until_it_ends_or_its_thread_went_on() {
        let mut picture = Picture::default();
        picture.update(&Update::Ongoing(ongoing_at("GET /a", ms(1_000)..ms(1_500))));
        let mut status = status_at(ms(2_000));
        status.threads[0].step_start_ns = Some(ms(1_000));
        picture.status(&status);
        assert_eq!(picture.ongoing.len(), 1);
        picture.update(&Update::Ongoing(ongoing_at("GET /a", ms(1_000)..ms(2_000))));
        assert_eq!(picture.ongoing.len(), 1);
        picture.update(&Update::Block(block_at("GET /a", ms(1_000)..ms(2_100))));
        assert_eq!(picture.ongoing.len(), 0);
        // The end of this one never arrives.
        picture.update(&Update::Ongoing(ongoing_at("GET /b", ms(3_000)..ms(3_500))));
        picture.status(&status_at(ms(4_000)));
        assert_eq!(picture.ongoing.len(), 0);
    }

    #[test]
    fn own_and_busy_shares_come_from_two_statuses() {
        let mut picture = Picture::default();
        let (mut before, mut after) = (status_at(ms(1_000)), status_at(ms(3_000)));
        before.threads[0].busy_ns = ms(100);
        before.threads[0].step_start_ns = Some(ms(900));
        after.threads[0].busy_ns = ms(1_200);
        after.self_cpu = before.self_cpu + Duration::from_millis(20);
        picture.status(&before);
        assert_eq!(picture.own_cpu, None);
        picture.status(&after);
        close(picture.own_cpu.unwrap(), 0.01);
        close(picture.busy[&after.threads[0].info.tid], 0.5);
    }

    #[test]
    fn only_the_newest_blocks_and_notices_stay() {
        let mut picture = Picture::default();
        for index in 0..MAX_RECENT as u64 + 5 {
            picture.update(&Update::Block(block_at("GET /", ms(index)..ms(index + 50))));
            picture.notice("hm");
        }
        assert_eq!((picture.recent.len(), picture.notices.len()), (MAX_RECENT, MAX_NOTICES));
        assert_eq!(picture.recent.front().unwrap().number, 6);
        assert!(picture.block(5).is_none());
        assert_eq!(picture.block(7).unwrap().start_ns(), ms(6));
    }
}
