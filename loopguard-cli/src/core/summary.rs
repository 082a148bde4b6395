//! Adds incidents up to the closing summary, in bounded memory.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

use super::event::{LoopInfo, Owner, RequestFacts, Tid};
use super::incident::{Blame, Cumulative, Incident};
use super::request::RequestCounts;
use super::status::{RecordCounts, StackCounts};

/// Routes, and lines, that are told apart unless another number is asked for; what comes later counts as `other`.
pub const MAX_LABELS: usize = 200;
/// Loop threads that are listed; the oldest that are gone make room.
pub const MAX_THREADS: usize = 1000;

/// What was seen in all. Routes, lines and threads are sorted by the time they blocked, most first.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    pub threshold_ns: u64,
    pub measured: Measured,
    pub total: Total,
    pub routes: Vec<(RouteLabel, Total)>,
    pub lines: Vec<(LineLabel, Total)>,
    /// Who was held up: how often, for how long at most in all, and by the longest block.
    pub victims: Vec<(RouteLabel, Total)>,
    /// Cumulative blocks, which are not in `total`.
    pub cumulative: Total,
    /// Blocks of excluded routes, which are not in `total` either.
    pub excluded: Total,
    pub threads: Vec<ThreadTotal>,
    /// Requests that ended, where servers tell of them.
    pub requests: u64,
}

/// What the pure core can't know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Measured {
    /// How long loopguard watched.
    pub duration: Duration,
    /// From the kernel's tick histogram.
    pub ticks: BTreeMap<Tid, u64>,
    pub lost_records: u64,
    pub records: RecordCounts,
    /// Where servers tell of their requests.
    pub requests: RequestCounts,
    /// Frames that could not be named.
    pub unsymbolized: u64,
    pub stacks: StackCounts,
    /// CPU time of loopguard, its kernel programs included.
    pub self_cpu: Duration,
    /// For how long it looked less closely, to keep to its budget, and for how long it did not watch at all.
    pub limited: Duration,
    pub unwatched: Duration,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Total {
    pub blocks: u64,
    pub blocked_ns: u64,
    pub longest_ns: u64,
}

#[derive(Clone, Debug, PartialEq)]
pub struct ThreadTotal {
    pub on: Arc<LoopInfo>,
    pub ticks: u64,
    pub total: Total,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RouteLabel {
    /// The route template; the path where the framework keeps none.
    Route {
        method: Option<String>,
        route: String,
    },
    NoRequest,
    Unknown,
    Other,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LineLabel {
    Line {
        file: Option<String>,
        line: Option<u32>,
        function: String,
        /// Name of the function that the line called.
        called: Option<String>,
    },
    /// No code of the user's was on the stack.
    NoUserCode,
    Other,
}

/// The running sums behind a [`Summary`].
#[derive(Debug)]
pub struct Totals {
    /// Routes, and lines, that are told apart.
    label_cap: usize,
    total: Total,
    routes: HashMap<RouteLabel, Total>,
    lines: HashMap<LineLabel, Total>,
    victims: HashMap<RouteLabel, Total>,
    cumulative: Total,
    excluded: Total,
    requests: u64,
    /// In the order they were found.
    threads: Vec<ThreadSum>,
}

#[derive(Debug)]
struct ThreadSum {
    on: Arc<LoopInfo>,
    is_gone: bool,
    total: Total,
}

impl Default for Totals {
    fn default() -> Self {
        Self::capped_at(MAX_LABELS)
    }
}

impl Totals {
    /// `label_cap`: routes, and lines, that are told apart.
    pub fn capped_at(label_cap: usize) -> Self {
        Self {
            label_cap,
            total: Total::default(),
            routes: HashMap::new(),
            lines: HashMap::new(),
            victims: HashMap::new(),
            cumulative: Total::default(),
            excluded: Total::default(),
            requests: 0,
            threads: Vec::new(),
        }
    }

    pub fn loop_found(&mut self, info: &Arc<LoopInfo>) {
        let tid = info.tid;
        if let Some(known) = self.thread(tid) {
            if known.on.pid == info.pid {
                known.on = Arc::clone(info);
                known.is_gone = false;
                return;
            }
            known.is_gone = true;
        }
        if self.threads.len() >= MAX_THREADS
            && let Some(oldest) = self.threads.iter().position(|thread| thread.is_gone)
        {
            self.threads.remove(oldest);
        }
        self.threads.push(ThreadSum { on: Arc::clone(info), is_gone: false, total: Total::default() });
    }

    /// The same loop, with a better name.
    pub fn renamed(&mut self, info: &Arc<LoopInfo>) {
        if let Some(known) = self.thread(info.tid)
            && known.on.pid == info.pid
        {
            known.on = Arc::clone(info);
        }
    }

    pub fn loop_gone(&mut self, tid: Tid) {
        if let Some(thread) = self.thread(tid) {
            thread.is_gone = true;
        }
    }

    pub fn add(&mut self, incident: &Incident) {
        let ns = incident.duration_ns();
        self.total.add(ns);
        let cap = self.label_cap;
        capped(&mut self.routes, cap, (route_label(&incident.blame.owner), RouteLabel::Other)).add(ns);
        capped(&mut self.lines, cap, (line_label(&incident.blame), LineLabel::Other)).add(ns);
        if let Some(thread) = self.thread(incident.on.tid) {
            thread.total.add(ns);
        }
        if let Some(victims) = &incident.victims {
            // Of those beyond the listed ones only the number is known.
            let listed = victims.requests.len() as u64;
            for victim in &victims.requests {
                capped(&mut self.victims, cap, (label_of(victim), RouteLabel::Other)).add(ns);
            }
            if victims.count > listed {
                let rest = self.victims.entry(RouteLabel::Other).or_default();
                (listed..victims.count).for_each(|_| rest.add(ns));
            }
        }
    }

    pub fn add_request(&mut self) {
        self.requests += 1;
    }

    pub fn add_cumulative(&mut self, block: &Cumulative) {
        self.cumulative.add(block.total_ns);
    }

    pub fn add_excluded(&mut self, incident: &Incident) {
        self.excluded.add(incident.duration_ns());
    }

    /// Cumulative ones among them.
    pub fn blocks(&self) -> u64 {
        self.total.blocks + self.cumulative.blocks
    }

    pub fn summary(&self, threshold_ns: u64, measured: &Measured) -> Summary {
        let mut ticks = measured.ticks.clone();
        // A thread id used twice: the ticks are the newer thread's.
        let mut threads: Vec<ThreadTotal> = self
            .threads
            .iter()
            .rev()
            .map(|thread| ThreadTotal {
                on: Arc::clone(&thread.on),
                ticks: ticks.remove(&thread.on.tid).unwrap_or(0),
                total: thread.total,
            })
            .collect();
        threads.sort_by_key(|thread| (std::cmp::Reverse(thread.total.blocked_ns), thread.on.pid, thread.on.tid));
        Summary {
            threshold_ns,
            measured: measured.clone(),
            total: self.total,
            routes: most_blocked_first(&self.routes),
            lines: most_blocked_first(&self.lines),
            victims: most_blocked_first(&self.victims),
            cumulative: self.cumulative,
            excluded: self.excluded,
            threads,
            requests: self.requests,
        }
    }

    fn thread(&mut self, tid: Tid) -> Option<&mut ThreadSum> {
        self.threads.iter_mut().rev().find(|thread| thread.on.tid == tid)
    }
}

impl Summary {
    pub fn ticks(&self) -> u64 {
        self.measured.ticks.values().sum()
    }
}

impl Total {
    pub fn add(&mut self, ns: u64) {
        self.blocks += 1;
        self.blocked_ns = self.blocked_ns.saturating_add(ns);
        self.longest_ns = self.longest_ns.max(ns);
    }
}

fn label_of(request: &RequestFacts) -> RouteLabel {
    RouteLabel::Route { method: request.method.clone(), route: request.route.as_ref().unwrap_or(&request.path).clone() }
}

pub fn route_label(owner: &Owner) -> RouteLabel {
    match owner {
        Owner::Request { request, .. } => label_of(request),
        Owner::NoRequest { .. } | Owner::Task { .. } => RouteLabel::NoRequest,
        Owner::Unknown(_) => RouteLabel::Unknown,
    }
}

pub fn line_label(blame: &Blame) -> LineLabel {
    match blame.user_line() {
        Some(at) => LineLabel::Line {
            file: at.frame.file.as_deref().map(str::to_owned),
            line: at.frame.line,
            function: at.frame.function.to_string(),
            called: at.called.map(|called| called.function.to_string()),
        },
        None => LineLabel::NoUserCode,
    }
}

fn capped<L: Hash + Eq>(totals: &mut HashMap<L, Total>, cap: usize, (label, other): (L, L)) -> &mut Total {
    let has_room = totals.len() < cap || totals.contains_key(&label);
    totals.entry(if has_room { label } else { other }).or_default()
}

fn most_blocked_first<L: Clone + Ord>(totals: &HashMap<L, Total>) -> Vec<(L, Total)> {
    let mut sorted: Vec<(L, Total)> = totals.iter().map(|(label, total)| (label.clone(), *total)).collect();
    sorted.sort_by(|(a, a_total), (b, b_total)| b_total.blocked_ns.cmp(&a_total.blocked_ns).then_with(|| a.cmp(b)));
    sorted
}

#[cfg(test)]
mod tests {
    use super::super::event::{Event, Runtime, StepMarks};
    use super::super::story::{ms, profile, sample, step};
    use super::*;

    fn label(index: usize) -> RouteLabel {
        RouteLabel::Route { method: Some("GET".to_owned()), route: format!("/r{index}") }
    }

    #[test]
    fn routes_and_lines_are_capped_and_nothing_is_lost() {
        let mut profile = profile(StepMarks::Exact, 10);
        for index in 0..500usize {
            let seq = index as u64;
            profile.apply(sample(seq, 5, &format!("r{index} f{index}")).into());
            // The first route blocks longest, so the order below is by time and not by name.
            profile.apply(step(seq, 0..if index == 0 { 50 } else { 20 }).into());
        }
        let summary = profile.summary(&Measured::default());
        assert_eq!(summary.total, Total { blocks: 500, blocked_ns: ms(50 + 499 * 20), longest_ns: ms(50) });
        assert_eq!(summary.routes.len(), MAX_LABELS + 1);
        assert_eq!(summary.lines.len(), MAX_LABELS + 1);
        assert_eq!(
            summary.routes[0],
            (RouteLabel::Other, Total { blocks: 300, blocked_ns: ms(6000), longest_ns: ms(20) })
        );
        assert_eq!(summary.routes[1], (label(0), Total { blocks: 1, blocked_ns: ms(50), longest_ns: ms(50) }));
        assert_eq!(summary.lines[0].0, LineLabel::Other);
    }

    #[test]
    fn no_request_and_unknown_have_labels_of_their_own() {
        let mut profile = profile(StepMarks::Exact, 10);
        for (seq, who) in [(1, "-task"), (2, "-"), (3, "?")] {
            profile.apply(sample(seq, 5, who).into());
            profile.apply(step(seq, 0..20).into());
        }
        let routes: Vec<_> = profile
            .summary(&Measured::default())
            .routes
            .into_iter()
            .map(|(label, total)| (label, total.blocks))
            .collect();
        assert_eq!(routes, [(RouteLabel::NoRequest, 2), (RouteLabel::Unknown, 1)]);
    }

    #[test]
    fn threads_are_listed_with_their_ticks_also_when_gone() {
        let mut profile = profile(StepMarks::Exact, 10);
        profile.apply(step(1, 0..20).into());
        profile.apply(Event::LoopGone { tid: 7 });
        let measured = Measured { ticks: [(7, 42)].into(), ..Measured::default() };
        let summary = profile.summary(&measured);
        assert_eq!(summary.ticks(), 42);
        let threads: Vec<_> =
            summary.threads.iter().map(|thread| (thread.on.tid, thread.ticks, thread.total.blocks)).collect();
        assert_eq!(threads, [(7, 42, 1)]);
    }

    #[test]
    fn threads_that_are_gone_make_room() {
        let mut totals = Totals::default();
        for tid in 1..=2 * MAX_THREADS as u32 {
            let thread = format!("worker {tid}");
            let info =
                LoopInfo { pid: tid, tid, thread, runtime: Runtime::Asyncio, worker: None, steps: StepMarks::Exact };
            totals.loop_found(&Arc::new(info));
            if tid != 1 {
                totals.loop_gone(tid);
            }
        }
        let threads = totals.summary(0, &Measured::default()).threads;
        assert_eq!(threads.len(), MAX_THREADS);
        assert_eq!(threads[0].on.tid, 1, "it still runs");
    }
}
