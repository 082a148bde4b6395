//! Turns events into incidents: which request blocked the loop, on which line, and where the time went.

use std::collections::HashMap;
use std::sync::Arc;

use super::captures::OpenCaptures;
use super::cumulative::{CumulativeSettings, ShortStep, ShortSteps, Told};
use super::cut::{self, Part, Span, same_owner};
use super::event::{
    Capture, Event, Frame, How, InFlight, LoopInfo, OffCpu, OpenStep, Owner, RequestFacts, Stack, Step, StepMarks,
    StepWait, TickCounts, Tid, Worker,
};
use super::hint::hint;
use super::incident::{
    Attribution, Blame, Incident, MAX_VICTIMS_LISTED, Ongoing, Split, ThresholdChange, Update, Victims, WaitTotal,
    user_line,
};
use super::routes::RouteRules;
use super::summary::{MAX_LABELS, Measured, Summary, Totals};
use super::threshold::{AdaptiveThreshold, ThresholdRule};

/// Blocks of one loop that wait until its threshold is known; the longest are kept.
const MAX_HELD: usize = 1000;

#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// A step at least this long is a block.
    pub threshold: ThresholdRule,
    pub cumulative: CumulativeSettings,
    pub routes: RouteRules,
    /// Routes, and lines, that the summary tells apart.
    pub label_cap: usize,
}

impl Settings {
    /// A fixed threshold, and the defaults for everything else.
    pub fn fixed(threshold_ns: u64) -> Self {
        Self {
            threshold: ThresholdRule::Fixed { ns: threshold_ns },
            cumulative: CumulativeSettings::default(),
            routes: RouteRules::default(),
            label_cap: MAX_LABELS,
        }
    }
}

/// All that is known of the watched loops. The same events always give the same updates.
#[derive(Debug)]
pub struct Profile {
    settings: Settings,
    loops: HashMap<Tid, LoopThread>,
    totals: Totals,
}

#[derive(Debug)]
struct LoopThread {
    info: Arc<LoopInfo>,
    captures: OpenCaptures,
    /// Who was in flight in the newest step somebody looked at.
    in_flight: Option<InFlight>,
    short: ShortSteps,
    threshold: LoopThreshold,
    /// Blocks that may turn out to be below the threshold.
    held: Vec<Incident>,
}

#[derive(Debug)]
enum LoopThreshold {
    Fixed(u64),
    Adaptive(Box<AdaptiveThreshold>),
}

/// What ties the parts of a step to their owners.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Marks {
    /// A step probe: all of the step is one owner's.
    StepProbe,
    /// Captures alone: the owner may have changed unseen between two of them.
    Captures,
}

impl Profile {
    pub fn new(settings: Settings) -> Self {
        let totals = Totals::capped_at(settings.label_cap);
        Self { settings, loops: HashMap::new(), totals }
    }

    /// What follows from `event`. Events of a thread that no [`Event::LoopFound`] introduced are ignored.
    pub fn apply(&mut self, event: Event) -> Vec<Update> {
        let updates = self.updates(event);
        for update in &updates {
            match update {
                Update::Block(block) => self.totals.add(block),
                Update::Cumulative(block) => self.totals.add_cumulative(block),
                Update::Request(_) => self.totals.add_request(),
                Update::Ongoing(_) | Update::CumulativeOngoing(_) | Update::Threshold(_) => {}
            }
        }
        updates
    }

    fn updates(&mut self, event: Event) -> Vec<Update> {
        let (settings, totals) = (&self.settings, &mut self.totals);
        match event {
            Event::LoopFound(info) => {
                let info = Arc::new(info);
                totals.loop_found(&info);
                recount_workers(&mut self.loops, totals, info.worker);
                // Found again: a new loop on a reused thread id, whose steps are counted anew.
                let before = self.loops.insert(info.tid, LoopThread::new(info, settings));
                before.map(|mut thread| thread.finish(settings)).unwrap_or_default()
            }
            Event::LoopGone { tid } => {
                totals.loop_gone(tid);
                self.loops.remove(&tid).map(|mut thread| thread.finish(settings)).unwrap_or_default()
            }
            Event::Capture(capture) => {
                if let Some(thread) = self.loops.get_mut(&capture.tid) {
                    thread.captures.add(capture);
                }
                Vec::new()
            }
            Event::InFlight(in_flight) => {
                if let Some(thread) = self.loops.get_mut(&in_flight.tid) {
                    thread.in_flight = Some(in_flight);
                }
                Vec::new()
            }
            Event::Step(step) => {
                let Some(thread) = self.loops.get_mut(&step.tid) else { return Vec::new() };
                let ended = thread.ended(&step, settings);
                ended.excluded.iter().for_each(|block| totals.add_excluded(block));
                ended.updates
            }
            Event::Request(request) => vec![Update::Request(request)],
            Event::StillOpen(step) => {
                let Some(thread) = self.loops.get_mut(&step.tid) else { return Vec::new() };
                thread.still_open(&step, settings).map(Update::Ongoing).into_iter().collect()
            }
            Event::Ticks(ticks) => {
                let Some(thread) = self.loops.get_mut(&ticks.tid) else { return Vec::new() };
                thread.count(&ticks, settings)
            }
            Event::TimePassed { now_ns } => {
                // In the order of their ids: replays are equal.
                let mut threads: Vec<&mut LoopThread> = self.loops.values_mut().collect();
                threads.sort_by_key(|thread| thread.info.tid);
                let pass = |thread: &mut LoopThread| thread.short.pass(&thread.info, &settings.cumulative, now_ns);
                threads.into_iter().flat_map(pass).map(Update::from).collect()
            }
        }
    }

    /// What is still under way when the watch ends.
    pub fn finish(&mut self) -> Vec<Update> {
        let mut tids: Vec<Tid> = self.loops.keys().copied().collect();
        tids.sort_unstable();
        tids.into_iter().flat_map(|tid| self.apply(Event::LoopGone { tid })).collect()
    }

    /// What has been seen so far; the clock's and the kernel's figures are `measured` by the caller.
    pub fn summary(&self, measured: &Measured) -> Summary {
        self.totals.summary(self.settings.threshold.initial_ns(), measured)
    }

    /// Blocks so far, cumulative ones among them.
    pub fn blocks(&self) -> u64 {
        self.totals.blocks()
    }

    /// Of each loop its threshold, and from which length on its steps may be blocks: shorter ones need not be told.
    pub fn thresholds(&self) -> impl Iterator<Item = (Tid, u64, u64)> {
        let lowest_ns = self.settings.routes.lowest_ns().unwrap_or(u64::MAX);
        self.loops.iter().map(move |(tid, known)| (*tid, known.threshold_ns(), known.threshold_ns().min(lowest_ns)))
    }
}

impl From<Told> for Update {
    fn from(told: Told) -> Self {
        match told {
            Told::Ended(cumulative) => Self::Cumulative(cumulative),
            Told::GoesOn(cumulative) => Self::CumulativeOngoing(cumulative),
        }
    }
}

/// What came of a step.
#[derive(Default)]
struct Ended {
    updates: Vec<Update>,
    /// Blocks of routes nobody wants to hear of.
    excluded: Vec<Incident>,
}

/// With each new worker of a server the others are of so many more.
fn recount_workers(loops: &mut HashMap<Tid, LoopThread>, totals: &mut Totals, newest: Option<Worker>) {
    let Some(newest) = newest else { return };
    for thread in loops.values_mut() {
        if let Some(worker) = thread.info.worker
            && worker.server == newest.server
            && worker.of != newest.of
        {
            let worker = Some(Worker { of: newest.of, ..worker });
            thread.info = Arc::new(LoopInfo { worker, ..LoopInfo::clone(&thread.info) });
            totals.renamed(&thread.info);
        }
    }
}

impl LoopThread {
    fn new(info: Arc<LoopInfo>, settings: &Settings) -> Self {
        let threshold = match &settings.threshold {
            ThresholdRule::Fixed { ns } => LoopThreshold::Fixed(*ns),
            ThresholdRule::Adaptive(adaptive) => LoopThreshold::Adaptive(Box::new(AdaptiveThreshold::new(adaptive))),
        };
        Self {
            info,
            captures: OpenCaptures::default(),
            in_flight: None,
            short: ShortSteps::default(),
            threshold,
            held: Vec::new(),
        }
    }

    fn threshold_ns(&self) -> u64 {
        match &self.threshold {
            LoopThreshold::Fixed(ns) => *ns,
            LoopThreshold::Adaptive(adaptive) => adaptive.threshold_ns(),
        }
    }

    fn ended(&mut self, step: &Step, settings: &Settings) -> Ended {
        let span = Span { start_ns: step.start_ns, end_ns: step.end_ns, off_cpu: step.off_cpu };
        let mut captures = self.captures.take(step.seq);
        cut::settle(&mut captures, &span);
        let probe = if step.probed { Marks::StepProbe } else { Marks::Captures };
        let (parts, marks) = match step.told {
            Some(_) => (vec![Part { span, captures: &captures }], Marks::StepProbe),
            None => parts(&span, &captures, probe),
        };
        let is_whole = parts.len() == 1;
        // Now and then the kernel shows nobody that a thread is awake again: then it has no wait that ended, only the time.
        let is_summed = !step.waits.is_empty() || (step.off_cpu.waiting_ns, step.off_cpu.gil_ns) == (0, 0);
        let in_flight = self.in_flight.take().filter(|in_flight| in_flight.step_seq == step.seq);
        let mut ended = Ended::default();
        for part in &parts {
            let blame = blame(part, marks, step.told.as_ref());
            let split = Split::of(&part.span);
            let of_route = settings.routes.threshold_ns(&blame.owner);
            let threshold_ns = of_route.unwrap_or(self.threshold_ns());
            let waits = if is_whole && is_summed {
                waits_of_step(&step.waits, part.captures)
            } else {
                waits_seen(part.captures)
            };
            if part.span.duration_ns() < threshold_ns {
                let (start_ns, end_ns) = (part.span.start_ns, part.span.end_ns);
                let short = ShortStep { start_ns, end_ns, split, waits, blame };
                ended.updates.extend(self.short_step(short, settings));
                continue;
            }
            let block = Incident {
                on: Arc::clone(&self.info),
                start_ns: part.span.start_ns,
                end_ns: part.span.end_ns,
                threshold_ns,
                split,
                victims: in_flight.as_ref().map(|seen| victims(seen, &blame.owner, part.span.duration_ns())),
                hint: hint(&blame, &split, &waits),
                waits,
                blame,
                cut_at_attach: step.cut_at_attach && part.span.start_ns == step.start_ns,
            };
            if settings.routes.excludes(&block.blame.owner) {
                ended.excluded.push(block);
            } else if of_route.is_none() && self.may_be_none(&block, settings) {
                self.hold(block);
            } else {
                ended.updates.push(Update::Block(block));
            }
        }
        ended
    }

    /// A part that is no block by itself.
    fn short_step(&mut self, step: ShortStep, settings: &Settings) -> Vec<Update> {
        let floor_ns = settings.cumulative.floor_ns(self.threshold_ns());
        if step.own_ns() < floor_ns || settings.routes.excludes(&step.blame.owner) {
            return Vec::new();
        }
        self.short.add(&self.info, &settings.cumulative, step).into_iter().map(Update::from).collect()
    }

    /// Whether a block may turn out to be below the threshold once that is known.
    fn may_be_none(&self, block: &Incident, settings: &Settings) -> bool {
        match (&self.threshold, &settings.threshold) {
            (LoopThreshold::Adaptive(threshold), ThresholdRule::Adaptive(adaptive)) => {
                !threshold.is_calibrated() && block.duration_ns() < adaptive.cap_ns
            }
            _ => false,
        }
    }

    fn hold(&mut self, block: Incident) {
        if self.held.len() == MAX_HELD {
            let shortest = self.held.iter().enumerate().min_by_key(|(_, held)| held.duration_ns());
            let Some((index, shortest)) = shortest else { return };
            if shortest.duration_ns() >= block.duration_ns() {
                return;
            }
            self.held.remove(index);
        }
        self.held.push(block);
    }

    /// Ticks were counted: the threshold may change, and blocks that waited for it are judged.
    fn count(&mut self, ticks: &TickCounts, settings: &Settings) -> Vec<Update> {
        let (LoopThreshold::Adaptive(threshold), ThresholdRule::Adaptive(adaptive)) =
            (&mut self.threshold, &settings.threshold)
        else {
            return Vec::new();
        };
        let Some(baseline_ns) = threshold.update(adaptive, ticks.now_ns, &ticks.histogram) else { return Vec::new() };
        let threshold_ns = threshold.threshold_ns();
        let change = ThresholdChange { on: Arc::clone(&self.info), threshold_ns, baseline_ns };
        let mut updates = vec![Update::Threshold(change)];
        updates.extend(self.release(threshold_ns));
        updates
    }

    fn release(&mut self, threshold_ns: u64) -> Vec<Update> {
        let held = std::mem::take(&mut self.held).into_iter();
        held.filter(|block| block.duration_ns() >= threshold_ns)
            .map(|block| Update::Block(Incident { threshold_ns, ..block }))
            .collect()
    }

    /// Nothing more comes of this loop. What was never judged is judged by the floor, which it reached.
    fn finish(&mut self, settings: &Settings) -> Vec<Update> {
        let mut updates = self.release(self.threshold_ns());
        updates.extend(self.short.finish(&self.info, &settings.cumulative).into_iter().map(Update::from));
        updates
    }

    /// Only the last owner still blocks; what an earlier one did comes with the end of the step.
    fn still_open(&mut self, step: &OpenStep, settings: &Settings) -> Option<Ongoing> {
        let span = Span { start_ns: step.start_ns, end_ns: step.now_ns, off_cpu: OffCpu::default() };
        let mut captures = self.captures.so_far(step.seq).to_vec();
        cut::settle(&mut captures, &span);
        // A tick's first step begins with the tick and is the loop's own; a probe begins every other.
        let began_at_probe = captures.first().is_some_and(|capture| capture.step_start_ns > capture.tick_start_ns);
        let probe = match self.info.steps {
            StepMarks::Exact if began_at_probe => Marks::StepProbe,
            StepMarks::Exact | StepMarks::TicksOnly => Marks::Captures,
        };
        let (parts, marks) = match step.told {
            Some(_) => (vec![Part { span, captures: &captures }], Marks::StepProbe),
            None => parts(&span, &captures, probe),
        };
        let part = parts.last()?;
        let blame = blame(part, marks, step.told.as_ref());
        let threshold_ns = settings.routes.threshold_ns(&blame.owner).unwrap_or(self.threshold_ns());
        if part.span.duration_ns() < threshold_ns || settings.routes.excludes(&blame.owner) {
            return None;
        }
        Some(Ongoing {
            on: Arc::clone(&self.info),
            start_ns: part.span.start_ns,
            now_ns: part.span.end_ns,
            threshold_ns,
            hint: hint(&blame, &Split::of(&part.span), &waits_seen(part.captures)),
            blame,
        })
    }
}

/// Everyone in flight but the one who blocked.
fn victims(seen: &InFlight, owner: &Owner, duration_ns: u64) -> Victims {
    let is_owner =
        |request: &RequestFacts| matches!(owner, Owner::Request { request: own, .. } if own.is_same(request));
    let others = seen.requests.iter().filter(|request| !is_owner(request));
    let requests: Vec<_> = others.clone().take(MAX_VICTIMS_LISTED).cloned().collect();
    let count = others.count() as u64;
    Victims { count, delay_ns: duration_ns.saturating_mul(count), requests, unread: seen.unread }
}

/// One part for a probed step, else one for each change of owner. A probed step in which captures saw different
/// requests was not one step: a probe was missed, so the captures are believed.
fn parts<'a>(span: &Span, captures: &'a [Capture], marks: Marks) -> (Vec<Part<'a>>, Marks) {
    if marks == Marks::StepProbe && at_most_one_request(captures) {
        (vec![Part { span: *span, captures }], Marks::StepProbe)
    } else {
        (cut::by_owner(span, captures), Marks::Captures)
    }
}

fn at_most_one_request(captures: &[Capture]) -> bool {
    let mut requests =
        captures.iter().map(|capture| &capture.owner).filter(|owner| matches!(owner, Owner::Request { .. }));
    requests.next().is_none_or(|first| requests.all(|other| same_owner(first, other)))
}

/// `told`: whose it is, if the server said so.
fn blame(part: &Part, marks: Marks, told: Option<&Owner>) -> Blame {
    let owner = told.cloned().unwrap_or_else(|| owner(part.captures));
    let attribution = match (&owner, marks) {
        (Owner::Unknown(_), _) => Attribution::Unknown,
        (_, Marks::Captures) | (Owner::Task { .. }, _) => Attribution::Inferred,
        (Owner::NoRequest { .. }, Marks::StepProbe) => Attribution::Exact,
        (Owner::Request { how, .. }, Marks::StepProbe) => match how {
            How::Usdt | How::AsgiFrame | How::HttpRecv => Attribution::Exact,
            How::AsyncioTask | How::HttpRecvOfParent | How::None => Attribution::Inferred,
        },
    };
    Blame { owner, attribution, stack: dominant_stack(part) }
}

/// What is known best: a request, else that there is none, else why it is not known.
fn owner(captures: &[Capture]) -> Owner {
    captures
        .iter()
        .map(|capture| &capture.owner)
        .max_by_key(|owner| match owner {
            Owner::Request { request, how } => (2, certainty(*how), request.route.is_some()),
            Owner::NoRequest { task } => (1, 1, task.is_some()),
            Owner::Task { .. } => (1, 0, true),
            Owner::Unknown(_) => (0, 0, false),
        })
        .cloned()
        .unwrap_or(Owner::Unknown("nothing was captured while it ran"))
}

fn certainty(how: How) -> u8 {
    match how {
        How::Usdt => 4,
        How::AsgiFrame => 3,
        How::HttpRecv => 2,
        How::AsyncioTask | How::HttpRecvOfParent => 1,
        How::None => 0,
    }
}

/// The stack that stands for most of the time: first the blocking line that does, then the stack at that line.
fn dominant_stack(part: &Part) -> Arc<Stack> {
    let mut by_line = Weights::default();
    let mut by_stack = Weights::default();
    let weighted = || {
        let mut since_ns = part.span.start_ns;
        let last = part.captures.len().saturating_sub(1);
        part.captures.iter().enumerate().filter_map(move |(index, capture)| {
            let until_ns = if index == last { part.span.end_ns } else { capture.until_ns };
            let weight = until_ns.saturating_sub(since_ns);
            since_ns = until_ns;
            (!capture.stack.frames.is_empty()).then_some((&capture.stack, weight))
        })
    };
    for (stack, weight) in weighted() {
        by_line.add(blocking_line(stack), weight);
    }
    let Some(line) = by_line.heaviest() else {
        return part.captures.last().map(|capture| Arc::clone(&capture.stack)).unwrap_or_default();
    };
    for (stack, weight) in weighted().filter(|(stack, _)| blocking_line(stack) == line) {
        by_stack.add(stack, weight);
    }
    by_stack.heaviest().map(Arc::clone).unwrap_or_default()
}

/// What makes two stacks the same answer: the deepest line of the user's and the function it called; where no user
/// code runs, the innermost function.
fn blocking_line(stack: &Stack) -> (Option<&Frame>, Option<FunctionName<'_>>) {
    match user_line(stack) {
        Some(line) => (Some(line.frame), line.called.map(function_name)),
        None => (None, stack.frames.first().map(|frame| function_name(frame))),
    }
}

type FunctionName<'a> = (Option<&'a str>, &'a str);

fn function_name(frame: &Frame) -> FunctionName<'_> {
    (frame.file.as_deref(), &frame.function)
}

/// Sums by key; few keys, so a list. The first of equals is the heaviest, which keeps replays equal.
struct Weights<K>(Vec<(K, u64)>);

impl<K> Default for Weights<K> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<K: PartialEq> Weights<K> {
    fn add(&mut self, key: K, weight: u64) {
        match self.0.iter_mut().find(|(known, _)| *known == key) {
            Some((_, sum)) => *sum = sum.saturating_add(weight),
            None => self.0.push((key, weight)),
        }
    }

    fn heaviest(self) -> Option<K> {
        self.0.into_iter().reduce(|best, other| if other.1 > best.1 { other } else { best }).map(|(key, _)| key)
    }
}

/// The kernel's own sums, which miss no wait, named by what captures saw.
fn waits_of_step(waits: &[StepWait], captures: &[Capture]) -> Vec<WaitTotal> {
    let on = |wait: &StepWait| {
        captures
            .iter()
            .filter_map(|capture| capture.wait.as_ref().map(|seen| (seen, capture.until_ns - capture.at_ns)))
            .filter(|(seen, _)| seen.on.is_some() && seen.arg0 == wait.arg0 && seen.syscall == wait.syscall)
            // A descriptor can be closed and reused within a step: the longest wait is what matters.
            .max_by_key(|(_, ns)| *ns)
            .and_then(|(seen, _)| seen.on.clone())
    };
    longest_first(waits.iter().map(|wait| (wait.syscall.clone(), on(wait), wait.ns)))
}

/// The kernel sums waits over the whole step only; of a part, the waits long enough to be captured are known.
fn waits_seen(captures: &[Capture]) -> Vec<WaitTotal> {
    longest_first(captures.iter().filter_map(|capture| {
        let wait = capture.wait.as_ref()?;
        Some((wait.syscall.clone(), wait.on.clone(), capture.until_ns - capture.at_ns))
    }))
}

fn longest_first(waits: impl Iterator<Item = (String, Option<String>, u64)>) -> Vec<WaitTotal> {
    let mut sums = Weights::default();
    for (syscall, on, ns) in waits {
        sums.add((syscall, on), ns);
    }
    let mut totals: Vec<WaitTotal> =
        sums.0.into_iter().map(|((syscall, on), ns)| WaitTotal { syscall, on, ns }).collect();
    totals.sort_by_key(|wait| std::cmp::Reverse(wait.ns));
    totals
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::captures::MAX_CAPTURES;
    use super::super::story::{check, events, ms, owner, profile, sample, step, tick, wait, waited};
    use super::*;
    use StepMarks::{Exact, TicksOnly};

    #[test]
    fn a_probed_step_is_one_owners_exactly() {
        check(
            Exact,
            events![sample(1, 5, "A work"), sample(1, 6, "A work"), step(1, 2..32)],
            &["2..32 A Exact | Code 30+0+0+0 | work"],
        );
    }

    #[test]
    fn what_the_server_tells_stands_whatever_was_captured() {
        let told = |captures: &[&str]| {
            let captured = captures.iter().zip(3..).map(|(who, at)| Event::from(sample(1, at, who)));
            let step = Step { told: Some(owner("A")), ..step(1, 2..32) };
            captured.chain([step.into()]).collect::<Vec<_>>()
        };
        check(TicksOnly, told(&[]), &["2..32 A Exact | Code 30+0+0+0"]);
        check(Exact, told(&["? work", "B work"]), &["2..32 A Exact | Code 30+0+0+0 | work"]);
        let open = OpenStep { tid: 7, seq: 2, start_ns: ms(40), now_ns: ms(900), told: Some(owner("A")) };
        check(TicksOnly, events![sample(2, 50, "-"), open], &["40.. A Exact"]);
    }

    #[test]
    fn a_child_tasks_request_is_inferred() {
        check(Exact, events![sample(1, 5, "~A"), step(1, 0..20)], &["0..20 A Inferred | Code 20+0+0+0"]);
    }

    #[test]
    fn one_capture_that_saw_the_request_is_enough() {
        check(
            Exact,
            events![sample(1, 4, "?"), sample(1, 5, "-"), sample(1, 6, "A"), sample(1, 7, "~A"), step(1, 0..20)],
            &["0..20 A Exact | Code 20+0+0+0"],
        );
    }

    #[test]
    fn background_work_is_charged_to_no_request() {
        check(
            Exact,
            events![
                sample(1, 5, "A"),
                step(1, 0..12),
                sample(2, 15, "-blocker sweep"),
                sample(2, 18, "?"),
                step(2, 12..40),
            ],
            &["0..12 A Exact | Code 12+0+0+0", "12..40 -blocker Exact | Code 28+0+0+0 | sweep"],
        );
    }

    #[test]
    fn unknown_stays_unknown() {
        let expected = &["0..20 ? Unknown | Code 20+0+0+0"];
        check(Exact, events![step(1, 0..20)], expected);
        check(Exact, events![sample(1, 5, "?"), step(1, 0..20)], expected);
        check(TicksOnly, events![sample(1, 5, "?"), tick(1, 0..20)], expected);
        check(TicksOnly, events![tick(1, 0..20)], expected);
    }

    #[test]
    fn a_tick_of_two_owners_is_cut_half_way() {
        check(
            TicksOnly,
            events![sample(1, 5, "A load"), sample(1, 14, "A load"), sample(1, 16, "B dump"), tick(1, 0..30)],
            &["0..15 A Inferred | Code 15+0+0+0 | load", "15..30 B Inferred | Code 15+0+0+0 | dump"],
        );
    }

    #[test]
    fn parts_below_the_threshold_are_not_blocks() {
        check(
            TicksOnly,
            events![sample(1, 5, "A"), sample(1, 17, "B"), sample(1, 23, "-"), tick(1, 0..45)],
            &["0..11 A Inferred | Code 11+0+0+0", "20..45 - Inferred | Code 25+0+0+0"],
        );
    }

    #[test]
    fn the_loops_own_work_before_the_first_step_is_inferred() {
        check(Exact, events![sample(1, 5, "-"), tick(1, 0..15)], &["0..15 - Inferred | Code 15+0+0+0"]);
    }

    #[test]
    fn a_probed_step_with_two_requests_is_cut_like_a_tick() {
        check(
            Exact,
            events![sample(1, 10, "A"), sample(1, 20, "B"), step(1, 0..30)],
            &["0..15 A Inferred | Code 15+0+0+0", "15..30 B Inferred | Code 15+0+0+0"],
        );
    }

    #[test]
    fn neighbouring_steps_of_one_request_stay_apart() {
        check(
            Exact,
            events![sample(1, 5, "A"), step(1, 0..12), sample(2, 15, "A"), step(2, 12..24)],
            &["0..12 A Exact | Code 12+0+0+0", "12..24 A Exact | Code 12+0+0+0"],
        );
    }

    #[test]
    fn captures_of_a_step_below_the_threshold_are_not_the_next_ones() {
        check(Exact, events![sample(1, 5, "A"), step(2, 9..30)], &["9..30 ? Unknown | Code 21+0+0+0"]);
    }

    #[test]
    fn the_split_and_the_waits_are_the_kernels() {
        let waits = vec![
            StepWait { syscall: "futex".to_owned(), arg0: 1, ns: ms(4), count: 2 },
            StepWait { syscall: "recvfrom".to_owned(), arg0: 9, ns: ms(20), count: 1 },
        ];
        check(
            Exact,
            events![
                wait(1, 5..25, "A recvfrom psycopg.wait < query < handler"),
                Step { off_cpu: waited([20, 4, 1]), waits, ..step(1, 0..30) },
            ],
            &["0..30 A Exact | Code 5+20+4+1 | query calls psycopg.wait | 20 recvfrom 127.0.0.1:5432 | 4 futex ?"],
        );
    }

    #[test]
    fn a_wait_whose_end_the_kernel_did_not_show_is_named_by_who_saw_it() {
        check(
            Exact,
            events![
                wait(1, 5..25, "A recvfrom psycopg.wait < query < handler"),
                Step { off_cpu: waited([25, 0, 0]), ..step(1, 0..30) },
            ],
            &["0..30 A Exact | Code 5+25+0+0 | query calls psycopg.wait | 20 recvfrom 127.0.0.1:5432"],
        );
    }

    #[test]
    fn a_part_has_its_own_share_of_the_waits() {
        let off_cpu = waited([20, 0, 0]);
        check(
            TicksOnly,
            events![
                sample(1, 4, "A parse"),
                Capture { off_cpu, ..wait(1, 18..38, "B recvfrom query") },
                Step { off_cpu, ..tick(1, 0..40) },
            ],
            &[
                "0..11 A Inferred | Code 11+0+0+0 | parse",
                "11..40 B Inferred | Code 9+20+0+0 | query | 20 recvfrom 127.0.0.1:5432",
            ],
        );
    }

    #[test]
    fn a_stack_weighs_as_long_as_it_stood() {
        check(
            Exact,
            events![
                sample(1, 1, "A warm"),
                sample(1, 2, "A warm"),
                sample(1, 3, "A warm"),
                wait(1, 4..24, "A recvfrom query"),
                sample(1, 25, "A warm"),
                sample(1, 26, "A warm"),
                step(1, 0..28),
            ],
            &["0..28 A Exact | Code 28+0+0+0 | query"],
        );
    }

    #[test]
    fn one_line_in_several_library_functions_is_one_line() {
        check(
            Exact,
            events![
                sample(1, 5, "A other"),
                sample(1, 10, "A a.inner < lib.render < page"),
                sample(1, 12, "A b.inner < lib.render < page"),
                sample(1, 14, "A a.inner < lib.render < page"),
                step(1, 0..14),
            ],
            &["0..14 A Exact | Code 14+0+0+0 | page calls lib.render"],
        );
    }

    #[test]
    fn a_block_that_goes_on_is_told_with_its_last_owner() {
        let open = |now| OpenStep { tid: 7, seq: 1, start_ns: 0, now_ns: ms(now), told: None };
        check(Exact, events![open(12)], &["0.. ? Unknown"]);
        let probed = Capture { step_start_ns: ms(1), ..sample(1, 5, "A") };
        check(Exact, events![probed, open(30)], &["0.. A Exact"]);
        check(TicksOnly, events![sample(1, 6, "A"), sample(1, 16, "B"), open(20), open(30)], &["11.. B Inferred"]);
    }

    fn in_flight(seq: u64, ids: &[&str]) -> Event {
        let request = |id: &&str| match super::super::story::owner(id) {
            Owner::Request { request, .. } => request,
            Owner::NoRequest { .. } | Owner::Task { .. } | Owner::Unknown(_) => unreachable!(),
        };
        Event::InFlight(InFlight { tid: 7, step_seq: seq, requests: ids.iter().map(request).collect(), unread: 0 })
    }

    #[test]
    fn who_was_in_flight_is_held_up_but_for_the_one_who_blocks() {
        check(
            Exact,
            events![
                sample(1, 5, "A"),
                in_flight(1, &["A", "B", "C"]),
                step(1, 0..20),
                sample(2, 25, "B"),
                step(2, 20..40)
            ],
            &["0..20 A Exact | Code 20+0+0+0 | held up 2: B C", "20..40 B Exact | Code 20+0+0+0"],
        );
        // What was seen in another step says nothing of this one.
        check(Exact, events![in_flight(1, &["B"]), step(2, 0..20)], &["0..20 ? Unknown | Code 20+0+0+0"]);
    }

    #[test]
    fn who_suffers_is_summed_up_by_route() {
        let mut profile = profile(Exact, 10);
        for seq in 1..=3 {
            profile.apply(in_flight(seq, &["B", "C"]));
            profile.apply(step(seq, 0..20).into());
        }
        let many: Vec<String> = (0..50).map(|index| format!("v{index}")).collect();
        profile.apply(in_flight(4, &many.iter().map(String::as_str).collect::<Vec<_>>()));
        profile.apply(step(4, 0..20).into());
        let victims = profile.summary(&Measured::default()).victims;
        assert_eq!(victims.len(), 2 + MAX_VICTIMS_LISTED + 1);
        assert_eq!(victims[0].1.blocks, 50 - MAX_VICTIMS_LISTED as u64, "those beyond the listed ones are other");
        assert_eq!((victims[1].1.blocks, victims[1].1.blocked_ns), (3, ms(60)));
    }

    #[test]
    fn a_thread_that_is_gone_or_unknown_says_nothing() {
        check(Exact, events![sample(1, 5, "A"), Event::LoopGone { tid: 7 }, step(1, 0..20)], &[]);
        check(Exact, events![Step { tid: 99, ..step(1, 0..20) }], &[]);
    }

    #[test]
    fn a_stuck_loop_keeps_a_bounded_number_of_captures_and_its_owner() {
        let mut events: Vec<Event> = (1..20_000).map(|at| sample(1, at, "A spin").into()).collect();
        events.push(step(1, 0..20_000).into());
        check(Exact, events, &["0..20000 A Exact | Code 20000+0+0+0 | spin"]);
    }

    /// What happens next on a thread: an owner runs a while, then waits a while, seen or unseen.
    #[derive(Clone, Debug)]
    struct Stretch {
        owner: &'static str,
        on_cpu_ms: u64,
        off_cpu_ms: [u64; 3],
        is_seen: bool,
    }

    fn stretches() -> impl Strategy<Value = Vec<Stretch>> {
        let owner = prop::sample::select(vec!["A", "B", "~A", "-", "-task", "?"]);
        let stretch = (owner, 0..20u64, prop::array::uniform3(0..20u64), any::<bool>());
        prop::collection::vec(
            stretch.prop_map(|(owner, on_cpu_ms, off_cpu_ms, is_seen)| Stretch {
                owner,
                on_cpu_ms,
                off_cpu_ms,
                is_seen,
            }),
            0..40,
        )
    }

    fn blocks(updates: Vec<Update>) -> Vec<Incident> {
        updates
            .into_iter()
            .filter_map(|update| match update {
                Update::Block(block) => Some(block),
                _ => None,
            })
            .collect()
    }

    fn sum(split: &Split) -> u64 {
        split.on_cpu_ns + split.waiting_ns + split.gil_ns + split.run_queue_ns
    }

    proptest! {
        // A failure becomes a story of its own above, not a file of seeds.
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn parts_sum_to_the_whole(story in stretches(), probed: bool) {
            let mut profile = profile(TicksOnly, 0);
            let (mut now, mut off_cpu) = (0, OffCpu::default());
            for stretch in &story {
                let at = now + stretch.on_cpu_ms;
                now = at + stretch.off_cpu_ms.iter().sum::<u64>();
                off_cpu = cut::each([off_cpu, waited(stretch.off_cpu_ms)], |[a, b]| a + b);
                if stretch.is_seen {
                    let capture = Capture { off_cpu, ..wait(1, at..now, &format!("{} futex", stretch.owner)) };
                    profile.apply(capture.into());
                }
            }
            let whole = Step { off_cpu, probed, ..step(1, 0..now) };
            let parts = blocks(profile.apply(whole.into()));

            prop_assert_eq!(parts[0].start_ns, 0);
            prop_assert_eq!(parts[parts.len() - 1].end_ns, ms(now));
            for pair in parts.windows(2) {
                prop_assert_eq!(pair[0].end_ns, pair[1].start_ns);
            }
            for part in &parts {
                prop_assert_eq!(sum(&part.split), part.duration_ns());
            }
            let total = |of: fn(&Split) -> u64| parts.iter().map(|part| of(&part.split)).sum::<u64>();
            // Interpolated totals are whole nanoseconds: a cut may move a few of them from one kind to another.
            let rounding = 4 * parts.len() as u64;
            prop_assert!(total(|split| split.waiting_ns).abs_diff(off_cpu.waiting_ns) <= rounding);
            prop_assert!(total(|split| split.gil_ns).abs_diff(off_cpu.gil_ns) <= rounding);
            prop_assert!(total(|split| split.run_queue_ns).abs_diff(off_cpu.run_queue_ns) <= rounding);
        }

        /// Records can be lost, late, out of order or nonsense: never a panic, never a part outside its step.
        #[test]
        fn any_events_at_all(
            events in prop::collection::vec((0..8u8, 0..4u64, any::<[u64; 5]>(), stretches()), 0..60),
            is_exact: bool,
        ) {
            let steps = if is_exact { Exact } else { TicksOnly };
            let (mut profile, mut replayed) = (profile(steps, 0), profile(steps, 0));
            for (kind, seq, [a, b, waiting_ns, gil_ns, run_queue_ns], story) in events {
                let off_cpu = OffCpu { waiting_ns, gil_ns, run_queue_ns };
                let event = match kind {
                    0 => Event::LoopGone { tid: 7 },
                    1 => super::super::story::loop_found(steps),
                    2 => OpenStep { tid: 7, seq, start_ns: a, now_ns: b, told: None }.into(),
                    6 => Event::TimePassed { now_ns: a },
                    7 => in_flight(seq, &["A", "B"]),
                    3 => Step { start_ns: a, end_ns: b, off_cpu, probed: is_exact, ..step(seq, 0..0) }.into(),
                    _ => {
                        let owner = story.first().map_or("?", |stretch| stretch.owner);
                        Capture { at_ns: a, until_ns: b, off_cpu, ..wait(seq, 0..0, &format!("{owner} read f")) }.into()
                    }
                };
                let updates = profile.apply(event.clone());
                prop_assert_eq!(&updates, &replayed.apply(event.clone()));
                if let Event::Step(step) = event {
                    for part in blocks(updates) {
                        prop_assert_eq!(sum(&part.split), part.duration_ns());
                        prop_assert!(step.start_ns <= part.start_ns);
                        prop_assert!(part.end_ns <= step.end_ns.max(step.start_ns));
                    }
                }
            }
        }

        #[test]
        fn memory_is_bounded(at in prop::collection::vec(any::<u64>(), MAX_CAPTURES..4 * MAX_CAPTURES)) {
            let mut open = OpenCaptures::default();
            for at_ns in at {
                open.add(Capture { at_ns, ..sample(1, 0, "A") });
                prop_assert!(open.so_far(1).len() <= MAX_CAPTURES);
            }
        }
    }
}
