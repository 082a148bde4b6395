//! Turns the kernel's captures and steps into events, with what is read of the target while the step still runs.
//!
//! What a step's code is about (its task, what its descriptors lead to) is only there as long as the step runs. The
//! kernel copies what it can on the spot; the rest is read from here and kept only if the thread's step counter shows
//! that the same step was still running afterwards.

use std::{ops::RangeInclusive, sync::Arc, time::Duration};

use anyhow::Result;
use loopguard_common::{
    clock::LoopClock,
    records::{CaptureCause, CaptureRecord, RawFrame, STEP_CUT_AT_ATTACH, STEP_PROBED, StepRecord, WalkStatus},
    walk::{Scratch, snapshot_request, walk_frames},
};

use super::Live;
use crate::{
    core::event::{Capture, CapturedWait, Event, How, OpenStep, Owner, RequestFacts, Stack, Step, StepWait, Tid},
    source::{process, syscall},
    symbol::{naming::Seen, unwind::StackCopy},
};

/// Steps that wait are looked at this many times within one threshold.
const LOOKS_PER_THRESHOLD: u64 = 4;
/// The least and the most time between two looks.
const LOOK_EVERY_NS: RangeInclusive<u64> = 2_000_000..=50_000_000;

/// Where details are not read, they are so many times as far apart.
const PATIENCE: u32 = 4;

/// A block that goes on is reported when it is this old, then each time its age has doubled.
const ONGOING_AFTER_NS: u64 = 500_000_000;

/// What was found out about the step that runs, or ran last.
#[derive(Default)]
pub(super) struct StepFacts {
    seq: u64,
    captured: bool,
    /// Whose it is, and when that was seen.
    owner: Option<(Owner, u64)>,
    /// The scope in the frames of a step that is one request's as a whole, and that request.
    pub(super) scope: Option<(u64, Arc<RequestFacts>)>,
    waits_on: Vec<((i32, u64), Option<String>)>,
    /// Looked at from here while it waited.
    looked_at: bool,
    /// What was seen then, of a wait that had begun before it was known where the thread keeps its frames.
    looked: Option<Box<CaptureRecord>>,
    /// What was copied of its stack then, of a wait of which the kernel programs copied nothing, and when that began.
    copied: Option<(u64, StackCopy)>,
    /// Who else is in flight was read.
    pub(super) counted: bool,
    report_ongoing_ns: u64,
}

impl StepFacts {
    /// `owner` as the kernel saw it at the end of step `seq`, with what could only be read while it ran.
    pub(super) fn same_with_client(&self, seq: u64, owner: Owner) -> Owner {
        match (&self.owner, &owner) {
            (Some((seen @ Owner::Request { request: earlier, .. }, _)), Owner::Request { request, .. })
                if self.seq == seq && earlier.id == request.id && earlier.path == request.path =>
            {
                seen.clone()
            }
            _ => owner,
        }
    }
}

/// Whether the step of a capture may have ended since.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Freshness {
    Unknown,
    /// Taken from here a moment ago, with the step still running.
    JustTaken,
}

impl Live {
    /// Gives a capture of a wait the frames that were read from here meanwhile, where the kernel programs did not know
    /// yet where to find them.
    pub(super) fn complete(&self, record: &mut CaptureRecord) {
        let Some(known) = self.loops.get(&record.header.tid) else { return };
        let Some(looked) = known.step.looked.as_ref().filter(|_| walk_status(record) == WalkStatus::None) else {
            return;
        };
        let is_same_wait = known.step.seq == record.step_seq
            && (record.at_ns..=record.until_ns).contains(&looked.at_ns)
            && record.syscall == looked.syscall;
        if is_same_wait {
            record.walk = looked.walk;
            record.frame_count = looked.frame_count;
            record.frames = looked.frames;
            record.request = looked.request;
        }
    }

    /// The stack of a wait that was looked at from here, where the kernel programs copied nothing of it: it began too soon
    /// after another one.
    pub(super) fn copied_meanwhile(&mut self, record: &CaptureRecord) -> Option<StackCopy> {
        let copied = &mut self.loops.get_mut(&record.header.tid)?.step.copied;
        copied.take_if(|(since_ns, _)| *since_ns == record.at_ns).map(|(_, copy)| copy)
    }

    pub(super) fn capture(&mut self, record: &CaptureRecord, freshness: Freshness) -> Option<Capture> {
        let tid = record.header.tid;
        // A short step is looked into only because others before it added up; one that only waited for a CPU did not
        // become old by what its code does, and on a busy machine all loops have such.
        let age_ns = record.until_ns.saturating_sub(record.step_start_ns);
        let own_age_ns = age_ns.saturating_sub(record.off_cpu.run_queue_ns);
        if own_age_ns >= self.loops.get(&tid)?.pace.capture_age_ns {
            self.watch_closely(record.header.tgid);
        }
        let runs = |live: &Self| match freshness {
            Freshness::Unknown => live.kernel.is_running(tid, record.step_seq),
            Freshness::JustTaken => true,
        };
        let facts = &mut self.loops.get_mut(&tid)?.step;
        if facts.seq != record.step_seq {
            *facts = StepFacts { seq: record.step_seq, ..StepFacts::default() };
        }
        let is_first_capture = !std::mem::replace(&mut facts.captured, true);
        let is_wait = record.cause == CaptureCause::Wait as u32;
        let key = (record.syscall, record.arg0);
        let known_on = facts.waits_on.iter().find(|(known, _)| *known == key).map(|(_, on)| on.clone());
        // One owner for all of a step; in a tick whose steps are not marked only for as long as the thread stays put.
        let is_step = record.step_start_ns > record.tick_start_ns;
        let known_owner = facts.owner.as_ref();
        let known_owner = known_owner.filter(|(_, at)| is_step || (record.at_ns..=record.until_ns).contains(at));
        let known_owner = known_owner.map(|(owner, _)| owner.clone());

        let target = self.targets.get_mut(&record.header.tgid)?;
        let stack = match &mut target.python {
            Some(python) => python.inspector.stack(frames(record), walk_status(record)),
            None => Stack { frames: Vec::new(), incomplete: Some("nothing was copied of its stack") },
        };
        let in_frames = match &mut target.python {
            Some(python) if record.request.scope != 0 => python.inspector.request(&record.request),
            _ => None,
        };
        if let Some(request) = &in_frames {
            self.requests.seen_in_frames((record.header.tgid, record.running), request, is_first_capture);
        }
        let told = self.requests.owner(record.header.tgid, record.running);
        let mut scope = None;
        let owner = match (in_frames, told.or(known_owner)) {
            // The server's own word stands, and the frames add to it.
            (_, Some(told @ Owner::Request { how: How::Usdt, .. })) => told,
            (Some(request), _) => {
                let request = Arc::new(request);
                scope = is_step.then(|| (record.request.scope, request.clone()));
                Owner::Request { request, how: How::AsgiFrame }
            }
            (None, Some(known)) => known,
            (None, None) if runs(self) => {
                let owner = self.owner_by_task(record);
                // Between the look and the reading the step may have ended, and its memory be another's.
                if self.kernel.is_running(tid, record.step_seq) {
                    owner
                } else {
                    Owner::Unknown("the step ended before its task could be read")
                }
            }
            (None, None) => Owner::Unknown("the step ended before its task could be read"),
        };
        let on = match known_on {
            // Whoever has it now: that changes within a step.
            _ if is_wait && record.syscall == libc::SYS_futex as i32 => self.futex_owner(record),
            Some(on) => on,
            None if is_wait && runs(self) => {
                let on = self.waits_on(record);
                if self.kernel.is_running(tid, record.step_seq) { on } else { None }
            }
            None => None,
        };
        let facts = &mut self.loops.get_mut(&tid)?.step;
        if !matches!(owner, Owner::Unknown(_)) {
            facts.owner = Some((owner.clone(), record.until_ns));
        }
        if scope.is_some() {
            facts.scope = scope;
        }
        if is_wait && on.is_some() && !facts.waits_on.iter().any(|(known, _)| *known == key) {
            facts.waits_on.push((key, on.clone()));
        }
        Some(Capture {
            tid,
            step_seq: record.step_seq,
            step_start_ns: record.step_start_ns,
            tick_start_ns: record.tick_start_ns,
            at_ns: record.at_ns,
            until_ns: record.until_ns,
            off_cpu: record.off_cpu,
            wait: is_wait.then(|| CapturedWait { syscall: syscall::name(record.syscall), arg0: record.arg0, on }),
            stack: Arc::new(stack),
            owner,
        })
    }

    /// Whose step it is when no scope stands in its frames: the current task, and the tasks that await it.
    fn owner_by_task(&mut self, record: &CaptureRecord) -> Owner {
        if self.targets.get(&record.header.tgid).is_some_and(|target| target.tokio.is_some()) {
            return self.owner_by_poll(record.header.tid, record.step_seq);
        }
        let Some(thread) = self.loops.get(&record.header.tid).and_then(|known| known.python) else {
            return Owner::Unknown("no interpreter");
        };
        let Some(python) = self.targets.get_mut(&record.header.tgid).and_then(|target| target.python.as_mut()) else {
            return Owner::Unknown("no interpreter");
        };
        if walk_status(record) == WalkStatus::NotThisThread || record.frame_count == 0 {
            return Owner::Unknown("its frames could not be read");
        }
        let task = match python.inspector.current_task(&thread, record.task) {
            Ok(Some(task)) => task,
            Ok(None) => return Owner::NoRequest { task: None },
            Err(reason) => return Owner::Unknown(reason.reason()),
        };
        match python.inspector.request_of_task(task.address) {
            Ok(Some(request)) => Owner::Request { request: Arc::new(request), how: How::AsyncioTask },
            Ok(None) => match task.name.or(task.coroutine) {
                Some(task) if !python.inspector.has_seen_request() => Owner::Task { task },
                task => Owner::NoRequest { task },
            },
            Err(reason) => Owner::Unknown(reason.reason()),
        }
    }

    /// Takes all records that are there, and looks at the steps that are old and still wait. Returns when to come back:
    /// most records and all stacks that have been named wake nobody.
    pub fn watch(&mut self, events: &mut Vec<Event>) -> Result<Duration> {
        self.drain(events)?;
        let mut seen = Vec::new();
        let next_in_ns = self.look_at_old_steps(&mut seen);
        // What was sent of earlier steps may still be in the ring buffer; it has to come first, or it would be taken
        // for late.
        let mut fresh = Vec::new();
        self.take_records(&mut fresh)?;
        self.pass_events(&mut fresh);
        for seen in seen {
            self.naming.pass(seen);
        }
        let kernel = &self.kernel;
        self.naming.settle(|tid, seq| kernel.is_running(tid, seq));
        self.naming.release(events);
        let patience = if self.governor.effort().reads_details { 1 } else { PATIENCE };
        Ok(Duration::from_nanos(next_in_ns) * patience)
    }

    /// Looks at steps that are old and still wait: what they are about can be read now, and what goes on must be seen
    /// before it ends. Returns in how long one may have become old, in nanoseconds.
    fn look_at_old_steps(&mut self, seen: &mut Vec<Seen>) -> u64 {
        let now = process::monotonic_ns();
        let mut next_in_ns = *LOOK_EVERY_NS.end();
        for tid in self.loops.keys().copied().collect::<Vec<_>>() {
            let Some(clock) = self.kernel.clock(tid) else { continue };
            let age = now.saturating_sub(clock.step_start_ns);
            let Some(known) = self.loops.get_mut(&tid) else { continue };
            let threshold_ns = known.pace.threshold_ns;
            let gap_ns = (threshold_ns / LOOKS_PER_THRESHOLD).clamp(*LOOK_EVERY_NS.start(), *LOOK_EVERY_NS.end());
            // A step that begins now is old after half a threshold.
            let age = if clock.in_tick() { age } else { 0 };
            next_in_ns = next_in_ns.min((threshold_ns / 2).saturating_sub(age).max(gap_ns));
            if age < threshold_ns / 2 {
                continue;
            }
            if known.step.seq != clock.step_seq {
                known.step = StepFacts { seq: clock.step_seq, ..StepFacts::default() };
            }
            if !known.step.looked_at && clock.is_waiting() {
                known.step.looked_at = true;
                if let Some(record) = self.look(tid, &clock)
                    && let Some(capture) = self.capture(&record, Freshness::JustTaken)
                {
                    let is_read = self.governor.effort().reads_details;
                    let copy = if is_read { self.copy_stack(&record) } else { None };
                    let copied = if record.stack_pages == 0 { copy.clone() } else { None };
                    seen.push(self.seen(&record, capture, copy));
                    if let Some(known) = self.loops.get_mut(&tid) {
                        known.step.copied = copied.map(|copy| (clock.wait_start_ns, copy));
                        if clock.wait_start_ns < known.since_ns {
                            known.step.looked = Some(record);
                        }
                    }
                }
            }
            // Most of the way to a block: worth to know who is held up.
            if age >= threshold_ns / 4 * 3 {
                seen.extend(self.in_flight(tid, clock.step_seq).map(Seen::Event));
            }
            let Some(known) = self.loops.get_mut(&tid) else { continue };
            let due = known.step.report_ongoing_ns.max(ONGOING_AFTER_NS.max(threshold_ns));
            if age >= due {
                known.step.report_ongoing_ns = due * 2;
                seen.push(Seen::Event(Event::StillOpen(OpenStep {
                    tid,
                    seq: clock.step_seq,
                    start_ns: clock.step_start_ns,
                    now_ns: now,
                    told: self.requests.owner(known.info.pid, clock.running.current()),
                })));
            }
        }
        next_in_ns
    }

    /// What a thread that sleeps was doing when it went to sleep.
    fn look(&mut self, tid: Tid, clock: &LoopClock) -> Option<Box<CaptureRecord>> {
        let mut record = match self.kernel.last_capture(tid) {
            // Before it is pending it may be half written.
            Some(record) if clock.capture_pending != 0 && record.at_ns == clock.wait_start_ns => record,
            // It slept already when it began to be watched.
            _ => self.unwalked_capture(tid)?,
        };
        let is_whole = record.walk == WalkStatus::Complete as u32 || self.walk_from_here(tid, &mut record)?;
        let now = process::monotonic_ns();
        record.at_ns = now;
        record.until_ns = now;
        record.step_seq = clock.step_seq;
        record.step_start_ns = clock.step_start_ns;
        record.tick_start_ns = clock.tick_start_ns;
        record.running = clock.running.current();
        record.off_cpu = clock.off_cpu();
        // Still the same wait: nothing of what was read can have changed meanwhile.
        let after = self.kernel.clock(tid)?;
        let is_same = after.step_seq == clock.step_seq
            && after.is_waiting()
            && after.wait_start_ns == clock.wait_start_ns
            && is_whole;
        is_same.then_some(record)
    }

    /// Of a wait that the kernel programs did not see begin: what the system says of it.
    fn unwalked_capture(&self, tid: Tid) -> Option<Box<CaptureRecord>> {
        let pid = self.loops.get(&tid)?.info.pid;
        let (number, arg0) = process::current_syscall(pid, tid)?;
        let mut record = empty_capture();
        record.header.tgid = pid;
        record.header.tid = tid;
        record.cause = CaptureCause::Wait as u32;
        record.syscall = number as i32;
        record.arg0 = arg0;
        Some(record)
    }

    /// Walks the frames of a thread that sleeps, as the kernel programs do: those can't where memory is not resident.
    /// Returns whether all of them were read; where there is no interpreter, there are none.
    fn walk_from_here(&self, tid: Tid, record: &mut CaptureRecord) -> Option<bool> {
        let known = self.loops.get(&tid)?;
        let (Some(thread), Some(python)) = (known.python, self.targets.get(&known.info.pid)?.python.as_ref()) else {
            return Some(true);
        };
        let mut scratch = Scratch::default();
        let (memory, layout) = (python.interpreter.memory(), python.interpreter.layout());
        let _glance = memory.glance();
        walk_frames(memory, &layout, thread.walked(), &mut scratch, record);
        snapshot_request(memory, &layout, &mut scratch, &record.frames, &mut record.request);
        Some(record.walk == WalkStatus::Complete as u32)
    }
}

/// `told`: whose it is, if the server said so.
pub(super) fn step(record: &StepRecord, told: Option<Owner>) -> Step {
    let waits = record.waits.iter().take((record.wait_count as usize).min(record.waits.len()));
    Step {
        tid: record.header.tid,
        seq: record.seq,
        tick_start_ns: record.tick_start_ns,
        start_ns: record.start_ns,
        end_ns: record.end_ns,
        off_cpu: record.off_cpu,
        waits: waits
            .map(|wait| StepWait {
                syscall: syscall::name(wait.syscall),
                arg0: wait.arg0,
                ns: wait.ns,
                count: wait.count,
            })
            .collect(),
        probed: record.flags & STEP_PROBED != 0,
        told,
        cut_at_attach: record.flags & STEP_CUT_AT_ATTACH != 0,
    }
}

pub(super) fn frames(record: &CaptureRecord) -> &[RawFrame] {
    &record.frames[..(record.frame_count as usize).min(record.frames.len())]
}

pub(super) fn walk_status(record: &CaptureRecord) -> WalkStatus {
    [WalkStatus::Complete, WalkStatus::TooDeep, WalkStatus::Unreadable, WalkStatus::NotThisThread]
        .into_iter()
        .find(|status| *status as u32 == record.walk)
        .unwrap_or(WalkStatus::None)
}

pub(super) fn empty_capture() -> Box<CaptureRecord> {
    // SAFETY: a struct of integers, for which all zero is a value.
    unsafe { Box::<CaptureRecord>::new_zeroed().assume_init() }
}
