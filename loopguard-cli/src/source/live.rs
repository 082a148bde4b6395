//! Follows running processes: turns kernel records into events, reading the target while the step still runs.
//!
//! What a step's code is about (its task, what its descriptors lead to) is only there as long as the step runs. The
//! kernel copies what it can on the spot; the rest is read from here and kept only if the thread's step counter shows
//! that the same step was still running afterwards.

use std::{
    collections::{BTreeSet, HashMap},
    io,
    os::fd::OwnedFd,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use aya::maps::{MapData, RingBuf};
use loopguard_common::{
    records::{
        AddressRange, CaptureCause, CaptureRecord, LoopThread, STEP_CUT_AT_ATTACH, STEP_PROBED, StepRecord,
        THREAD_STEPS_CONTEXT_ENTER, THREAD_STEPS_CONTEXT_RUN, THREAD_STEPS_NEST, WalkStatus,
    },
    walk::{Memory as _, Scratch, snapshot_request, walk_frames},
};
use tokio::io::unix::AsyncFd;

use super::{
    cost::CostMeter,
    decode::{Record, decode},
    kernel::{Kernel, Pace, Standing, Talk},
    process, syscall,
};
use crate::{
    core::event::{
        Capture, CapturedWait, Event, How, LoopInfo, OpenStep, Owner, Runtime, Stack, Step, StepMarks, StepWait, Tid,
    },
    runtime::cpython::{self, Inspector, Interpreter, NotUsable, ProbeSite, PyThreadInfo, StepProbe},
};

/// How long step probes stay after the last old step was seen. They cost about a microsecond a step, which a loop that
/// is never blocked need not pay.
const ARMED_FOR_NS: u64 = 300_000_000_000;
/// Loops that are gone and still listed.
const MAX_FINISHED: usize = 1000;
/// A block that goes on is reported when it is this old, then each time its age has doubled.
const ONGOING_AFTER_NS: u64 = 500_000_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Steps {
    /// Step probes where they can be placed.
    Auto,
    /// None: ticks only.
    Off,
}

#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub threshold_ns: u64,
    pub steps: Steps,
    /// Whether the kernel programs' own log is printed.
    pub talk: Talk,
}

pub struct Live {
    kernel: Kernel,
    records: AsyncFd<RingBuf<MapData>>,
    options: Options,
    targets: HashMap<u32, Target>,
    loops: HashMap<Tid, Loop>,
    cost: CostMeter,
    /// What happened and did not fit into events: for the person at the terminal.
    notices: Vec<String>,
    /// What loops that are gone had done.
    finished: Vec<LoopTotals>,
    /// Frames whose code object could not be read.
    unsymbolized: u64,
    /// Records that no code here understood.
    unknown_records: u64,
}

/// A process that is watched.
struct Target {
    pid: u32,
    pidfd: OwnedFd,
    python: Option<Python>,
    uses_uvloop: bool,
    /// Until when its step probes stay in place (ns); `None`: they are not.
    armed_until_ns: Option<u64>,
    ended: bool,
}

struct Python {
    interpreter: Arc<Interpreter>,
    inspector: Inspector,
}

/// A loop thread that is watched.
struct Loop {
    info: LoopInfo,
    python: Option<PyThreadInfo>,
    epoll_fd: i32,
    slot: u32,
    marks: Option<StepMark>,
    step: StepFacts,
}

/// How the steps of a loop can be marked.
#[derive(Clone)]
struct StepMark {
    which: StepProbe,
    site: ProbeSite,
    /// `THREAD_*` of the loop while they are.
    flags: u32,
}

/// What was found out about the step that runs, or ran last.
#[derive(Default)]
struct StepFacts {
    seq: u64,
    /// Whose it is, and when that was seen.
    owner: Option<(Owner, u64)>,
    waits_on: Vec<((i32, u64), Option<String>)>,
    /// Looked at from here while it waited.
    looked_at: bool,
    report_ongoing_ns: u64,
}

/// What one loop did, for the closing summary.
#[derive(Clone, Debug)]
pub struct LoopTotals {
    pub info: LoopInfo,
    pub ticks: u64,
    pub busy_ns: u64,
}

impl Live {
    /// Loads the kernel programs and finds the loops of `pids`. Events of what is found come with the first drain.
    pub fn attach(pids: &BTreeSet<u32>, options: Options) -> Result<Self> {
        let capture_age_ns = match options.steps {
            // Half the threshold leaves the other half to read the target while the step still runs.
            Steps::Auto => options.threshold_ns / 2,
            // The tick has to be cut from captures: they must begin before its first owner is gone.
            Steps::Off => options.threshold_ns / 4,
        };
        let (kernel, records) =
            Kernel::load(Pace { threshold_ns: options.threshold_ns, capture_age_ns }, options.talk)?;
        let mut live = Self {
            kernel,
            // SAFETY: the ring buffer owns its descriptor and keeps it open as long as it lives.
            records: unsafe { AsyncFd::register(records) }
                .map_err(io::Error::from)
                .context("wait for the ring buffer")?,
            options,
            targets: HashMap::new(),
            loops: HashMap::new(),
            cost: CostMeter::default(),
            notices: Vec::new(),
            finished: Vec::new(),
            unsymbolized: 0,
            unknown_records: 0,
        };
        for &pid in pids {
            live.add_target(pid)?;
        }
        Ok(live)
    }

    fn add_target(&mut self, pid: u32) -> Result<()> {
        let pidfd = process::pidfd(pid).with_context(|| format!("process {pid} cannot be opened"))?;
        let python = match cpython::find(pid) {
            Ok(interpreter) => {
                let interpreter = Arc::new(interpreter);
                Some(Python { inspector: Inspector::new(interpreter.clone()), interpreter })
            }
            Err(NotUsable::NotPython) => None,
            Err(NotUsable::Gone) => bail!("process {pid} ended while loopguard was attaching"),
            Err(other) => {
                self.notices.push(format!("process {pid}: {other}; its loops are watched without names"));
                None
            }
        };
        let uses_uvloop = process::uses_uvloop(pid);
        let layout = python.as_ref().map(|python| python.interpreter.layout());
        self.kernel.watch_process(pid, layout.as_ref())?;
        self.targets.insert(pid, Target { pid, pidfd, python, uses_uvloop, armed_until_ns: None, ended: false });
        Ok(())
    }

    /// Waits until records are there.
    pub async fn readable(&self) -> Result<()> {
        self.records.readable().await.context("wait for records")?.clear_ready();
        Ok(())
    }

    /// Takes all records that are there and appends what they mean.
    pub fn drain(&mut self, events: &mut Vec<Event>) -> Result<()> {
        // A record is copied out before it is understood: its place is free for the next ones meanwhile.
        while let Some(record) = self.records.get_mut().next().map(|bytes| decode(&bytes)) {
            match record {
                Ok(Record::Capture(record)) => {
                    if let Some(event) = self.capture(&record, Freshness::Unknown) {
                        events.push(event);
                    }
                }
                Ok(Record::Step(record)) => events.push(Event::Step(step(&record))),
                Ok(Record::Poll(record)) => {
                    let found = Poll {
                        pid: record.header.tgid,
                        tid: record.header.tid,
                        epoll_fd: record.epoll_fd,
                        syscall: i64::from(record.syscall),
                    };
                    self.polled(found, Standing::Idle, events)?;
                }
                Err(_) => self.unknown_records += 1,
            }
        }
        Ok(())
    }

    /// Looks for loop threads that nobody reported: at the start, and for those that are stuck in a step.
    pub fn scan(&mut self, events: &mut Vec<Event>) -> Result<()> {
        for pid in self.targets.keys().copied().collect::<Vec<_>>() {
            let Ok(tids) = process::threads(pid) else { continue };
            for tid in tids {
                if self.loops.contains_key(&tid) {
                    continue;
                }
                if let Some((number, epoll_fd)) = process::current_syscall(pid, tid)
                    && syscall::is_epoll(number)
                {
                    let found = Poll { pid, tid, epoll_fd: epoll_fd as i32, syscall: number };
                    self.polled(found, Standing::Idle, events)?;
                } else {
                    self.find_busy_loop(pid, tid, events)?;
                }
            }
        }
        Ok(())
    }

    /// A loop thread in the middle of a tick shows no poll, but the frames of its loop.
    fn find_busy_loop(&mut self, pid: u32, tid: Tid, events: &mut Vec<Event>) -> Result<()> {
        let [epoll_fd] = process::epoll_descriptors(pid)[..] else { return Ok(()) };
        let Some((python, stack)) = self.python_stack(pid, tid) else { return Ok(()) };
        let uses_uvloop = self.targets.get(&pid).is_some_and(|target| target.uses_uvloop);
        let runtime = match LoopFrames::of(&stack) {
            LoopFrames::Asyncio { .. } => Runtime::Asyncio,
            LoopFrames::Runner if uses_uvloop => Runtime::Uvloop,
            _ => return Ok(()),
        };
        let standing = Standing::InTick {
            now_ns: process::monotonic_ns(),
            waits_in: process::current_syscall(pid, tid).map(|(number, arg0)| (number as i32, arg0)),
        };
        self.adopt(Found { pid, tid, epoll_fd, runtime, python: Some(python) }, standing, events)
    }

    /// A thread polls: is it a loop of ours, and is this the loop's own poll?
    fn polled(&mut self, poll: Poll, standing: Standing, events: &mut Vec<Event>) -> Result<()> {
        let Poll { pid, tid, epoll_fd, syscall } = poll;
        if let Some(known) = self.loops.get_mut(&tid) {
            // A nested poll is blocking like any other wait, unless the loop was replaced by another one.
            if known.epoll_fd != epoll_fd && !process::is_epoll_descriptor(pid, known.epoll_fd) {
                known.epoll_fd = epoll_fd;
                self.kernel.update_thread(tid, |thread| thread.epoll_fd = epoll_fd)?;
            }
            return Ok(());
        }
        let Some(target) = self.targets.get(&pid) else { return Ok(()) };
        let (uses_uvloop, is_python) = (target.uses_uvloop, target.python.is_some());
        let found = match self.python_stack(pid, tid) {
            Some((python, stack)) => {
                let runtime = match LoopFrames::of(&stack) {
                    // libuv polls with epoll_pwait, Python's own selector with epoll_wait.
                    _ if uses_uvloop && syscall == libc::SYS_epoll_pwait => Runtime::Uvloop,
                    LoopFrames::Asyncio { polls: true } => Runtime::Asyncio,
                    // A poll inside a step: the loop's own will follow.
                    LoopFrames::Asyncio { polls: false } => return Ok(()),
                    _ => Runtime::Epoll,
                };
                Found { pid, tid, epoll_fd, runtime, python: Some(python) }
            }
            // A helper thread of an extension module: no loop of the server.
            None if is_python => return Ok(()),
            None => Found { pid, tid, epoll_fd, runtime: Runtime::Epoll, python: None },
        };
        self.adopt(found, standing, events)
    }

    /// The interpreter's thread state of a thread, and its frames now.
    fn python_stack(&mut self, pid: u32, tid: Tid) -> Option<(PyThreadInfo, Stack)> {
        let python = self.targets.get_mut(&pid)?.python.as_mut()?;
        let native = process::innermost_tid(pid, tid).ok()?;
        let thread = python.interpreter.threads().ok()?.into_iter().find(|thread| thread.native_thread_id == native)?;
        let mut record = empty_capture();
        let mut scratch = Scratch::default();
        let (memory, layout) = (python.interpreter.memory(), python.interpreter.layout());
        walk_frames(memory, &layout, thread.walked(), &mut scratch, &mut record);
        let stack = python.inspector.stack(frames(&record), walk_status(&record));
        Some((thread, stack))
    }

    fn adopt(&mut self, found: Found, standing: Standing, events: &mut Vec<Event>) -> Result<()> {
        let Found { pid, tid, epoll_fd, runtime, python } = found;
        let gil = match (&python, &self.targets[&pid].python) {
            (Some(thread), Some(python)) => python.interpreter.gil_ranges(thread.interpreter),
            _ => [AddressRange::default(); 2],
        };
        let thread = LoopThread {
            tid,
            tgid: pid,
            epoll_fd,
            thread_state: python.as_ref().map_or(0, |thread| thread.state),
            native_thread_id: python.as_ref().map_or(0, |thread| thread.native_thread_id),
            gil,
            ..LoopThread::default()
        };
        let slot = match self.kernel.watch_thread(thread, standing) {
            Ok(slot) => slot,
            Err(error) => {
                // The thread ended meanwhile; if its process did too, that is seen soon.
                self.notices.push(format!("thread {tid} of process {pid} cannot be watched: {error:#}"));
                return Ok(());
            }
        };
        let marks = self.step_marks(pid, runtime);
        if let Some(target) = self.targets.get_mut(&pid)
            && let Some(python) = &mut target.python
            && python.interpreter.refresh_asyncio()
        {
            self.kernel.update_layout(pid, &python.interpreter.layout())?;
        }
        let info = LoopInfo {
            pid,
            tid,
            thread: process::thread_name(pid, tid),
            runtime,
            steps: if marks.is_some() { StepMarks::Exact } else { StepMarks::TicksOnly },
        };
        events.push(Event::LoopFound(info.clone()));
        self.loops.insert(tid, Loop { info, python, epoll_fd, slot, marks, step: StepFacts::default() });
        if self.targets[&pid].armed_until_ns.is_some() {
            self.arm_loop(tid);
        }
        Ok(())
    }

    /// Where the steps of this kind of loop can be marked, if they are wanted and there is such a place.
    fn step_marks(&mut self, pid: u32, runtime: Runtime) -> Option<StepMark> {
        let (which, flags) = match (self.options.steps, runtime) {
            (Steps::Auto, Runtime::Asyncio) => (StepProbe::ContextRun, THREAD_STEPS_CONTEXT_RUN | THREAD_STEPS_NEST),
            (Steps::Auto, Runtime::Uvloop) => (StepProbe::ContextEnter, THREAD_STEPS_CONTEXT_ENTER),
            _ => return None,
        };
        match self.targets.get(&pid)?.python.as_ref()?.interpreter.probe_site(which) {
            Ok(site) => Some(StepMark { which, site, flags }),
            Err(error) => {
                self.notices.push(format!(
                    "process {pid}: steps cannot be marked ({error}); ticks with several owners are cut by captures"
                ));
                None
            }
        }
    }

    /// Puts the step probes of a process in place, or keeps them there: a step of it has become old.
    fn arm(&mut self, pid: u32) {
        let Some(target) = self.targets.get_mut(&pid) else { return };
        if target.armed_until_ns.replace(process::monotonic_ns() + ARMED_FOR_NS).is_some() {
            return;
        }
        let loops = self.loops.values().filter(|known| known.info.pid == pid);
        for tid in loops.map(|known| known.info.tid).collect::<Vec<_>>() {
            self.arm_loop(tid);
        }
    }

    fn arm_loop(&mut self, tid: Tid) {
        let Some(known) = self.loops.get_mut(&tid) else { return };
        let Some(StepMark { which, site, flags }) = known.marks.clone() else { return };
        let placed = self.kernel.attach_steps(known.info.pid, which, (&site, known.slot));
        match placed.and_then(|()| self.kernel.update_thread(tid, |thread| thread.flags = flags)) {
            Ok(()) => {}
            Err(error) => {
                known.marks = None;
                self.notices.push(format!("process {}: steps cannot be marked ({error:#})", known.info.pid));
            }
        }
    }

    /// Takes step probes away that nothing has needed for a while.
    fn disarm_unneeded(&mut self) {
        let now = process::monotonic_ns();
        for target in self.targets.values_mut() {
            if target.armed_until_ns.is_none_or(|until| now < until) {
                continue;
            }
            target.armed_until_ns = None;
            for known in self.loops.values().filter(|known| known.info.pid == target.pid) {
                let _ = self.kernel.update_thread(known.info.tid, |thread| thread.flags = 0);
            }
            self.kernel.detach_steps(target.pid);
        }
    }

    fn is_running(&self, tid: Tid, seq: u64) -> bool {
        self.kernel.clock(tid).is_some_and(|clock| clock.step_seq == seq && clock.in_tick())
    }

    fn capture(&mut self, record: &CaptureRecord, freshness: Freshness) -> Option<Event> {
        self.arm(record.header.tgid);
        let tid = record.header.tid;
        let runs = |live: &Self| match freshness {
            Freshness::Unknown => live.is_running(tid, record.step_seq),
            Freshness::JustTaken => true,
        };
        let facts = &mut self.loops.get_mut(&tid)?.step;
        if facts.seq != record.step_seq {
            *facts = StepFacts { seq: record.step_seq, ..StepFacts::default() };
        }
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
            None => Stack { frames: Vec::new(), incomplete: Some("no interpreter") },
        };
        let in_frames = match &mut target.python {
            Some(python) if record.request.scope != 0 => python.inspector.request(&record.request),
            _ => None,
        };
        let owner = match (in_frames, known_owner) {
            (Some(request), _) => Owner::Request { request: Arc::new(request), how: How::AsgiFrame },
            (None, Some(known)) => known,
            (None, None) if runs(self) => {
                let owner = self.owner_by_task(record);
                // Between the look and the reading the step may have ended, and its memory be another's.
                if self.is_running(tid, record.step_seq) {
                    owner
                } else {
                    Owner::Unknown("the step ended before its task could be read")
                }
            }
            (None, None) => Owner::Unknown("the step ended before its task could be read"),
        };
        let on = match known_on {
            Some(on) => on,
            None if is_wait && runs(self) => {
                let on = self.waits_on(record);
                if self.is_running(tid, record.step_seq) { on } else { None }
            }
            None => None,
        };
        let facts = &mut self.loops.get_mut(&tid)?.step;
        if !matches!(owner, Owner::Unknown(_)) {
            facts.owner = Some((owner.clone(), record.until_ns));
        }
        if is_wait && on.is_some() && !facts.waits_on.iter().any(|(known, _)| *known == key) {
            facts.waits_on.push((key, on.clone()));
        }
        Some(Event::Capture(Capture {
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
        }))
    }

    /// Whose step it is when no scope stands in its frames: the current task, and the tasks that await it.
    fn owner_by_task(&mut self, record: &CaptureRecord) -> Owner {
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
            Ok(None) => Owner::NoRequest { task: task.name.or(task.coroutine) },
            Err(reason) => Owner::Unknown(reason.reason()),
        }
    }

    fn waits_on(&self, record: &CaptureRecord) -> Option<String> {
        let pid = record.header.tgid;
        match syscall::first_argument(record.syscall) {
            syscall::FirstArgument::Descriptor => process::descriptor(pid, record.arg0 as i32),
            syscall::FirstArgument::PollArray => {
                // struct pollfd: the descriptor comes first (poll.h).
                let mut fd = 0u32;
                let python = self.targets.get(&pid)?.python.as_ref()?;
                python.interpreter.memory().read(record.arg0, &mut fd).then(|| process::descriptor(pid, fd as i32))?
            }
            syscall::FirstArgument::Other => None,
        }
    }

    /// Looks at steps that are old and still wait: what they are about can be read now, and what goes on must be seen
    /// before it ends.
    pub fn watch(&mut self, events: &mut Vec<Event>) {
        let now = process::monotonic_ns();
        let age_ns = self.options.threshold_ns / 2;
        for tid in self.loops.keys().copied().collect::<Vec<_>>() {
            let Some(clock) = self.kernel.clock(tid) else { continue };
            let age = now.saturating_sub(clock.step_start_ns);
            if !clock.in_tick() || age < age_ns {
                continue;
            }
            let Some(known) = self.loops.get_mut(&tid) else { continue };
            if known.step.seq != clock.step_seq {
                known.step = StepFacts { seq: clock.step_seq, ..StepFacts::default() };
            }
            if !known.step.looked_at && clock.is_waiting() {
                known.step.looked_at = true;
                if let Some(record) = self.look(tid, &clock)
                    && let Some(event) = self.capture(&record, Freshness::JustTaken)
                {
                    events.push(event);
                }
            }
            let Some(known) = self.loops.get_mut(&tid) else { continue };
            let due = known.step.report_ongoing_ns.max(ONGOING_AFTER_NS.max(self.options.threshold_ns));
            if age >= due {
                known.step.report_ongoing_ns = due * 2;
                events.push(Event::StillOpen(OpenStep {
                    tid,
                    seq: clock.step_seq,
                    start_ns: clock.step_start_ns,
                    now_ns: now,
                }));
            }
        }
    }

    /// Takes the same capture as the kernel would, of a thread that sleeps.
    fn look(&mut self, tid: Tid, clock: &loopguard_common::clock::LoopClock) -> Option<Box<CaptureRecord>> {
        let known = self.loops.get(&tid)?;
        let (pid, thread) = (known.info.pid, known.python?);
        let python = self.targets.get(&pid)?.python.as_ref()?;
        let (number, arg0) = process::current_syscall(pid, tid)?;
        let now = process::monotonic_ns();
        let mut record = empty_capture();
        let mut scratch = Scratch::default();
        let (memory, layout) = (python.interpreter.memory(), python.interpreter.layout());
        walk_frames(memory, &layout, thread.walked(), &mut scratch, &mut record);
        snapshot_request(memory, &layout, &mut scratch, &mut record.request);
        record.header.tgid = pid;
        record.header.tid = tid;
        record.cause = CaptureCause::Wait as u32;
        record.syscall = number as i32;
        record.arg0 = arg0;
        record.at_ns = now;
        record.until_ns = now;
        record.step_seq = clock.step_seq;
        record.step_start_ns = clock.step_start_ns;
        record.tick_start_ns = clock.tick_start_ns;
        record.off_cpu = clock.off_cpu();
        // Still the same wait: nothing of what was read can have changed meanwhile.
        let after = self.kernel.clock(tid)?;
        let same = after.step_seq == clock.step_seq
            && after.is_waiting()
            && after.wait_start_ns == clock.wait_start_ns
            && record.walk == WalkStatus::Complete as u32;
        same.then_some(record)
    }

    /// Lets go of threads and processes that are gone. Call it regularly: what the kernel programs cost is measured
    /// on the way.
    pub fn reap(&mut self, events: &mut Vec<Event>) {
        self.cost.turn(&self.kernel);
        self.kernel.flush_log();
        self.disarm_unneeded();
        for target in self.targets.values_mut() {
            target.ended = process::has_ended(&target.pidfd);
        }
        let gone = |live: &Self, known: &Loop| {
            live.targets[&known.info.pid].ended
                || !std::path::Path::new(&format!("/proc/{}/task/{}", known.info.pid, known.info.tid)).exists()
        };
        let tids: Vec<Tid> =
            self.loops.values().filter(|known| gone(self, known)).map(|known| known.info.tid).collect();
        for tid in tids {
            if let Some(known) = self.loops.remove(&tid) {
                self.finished.push(self.totals(&known));
                // Bounded, however many threads come and go.
                if self.finished.len() > MAX_FINISHED {
                    self.finished.remove(0);
                }
            }
            self.kernel.unwatch_thread(tid);
            events.push(Event::LoopGone { tid });
        }
        for target in self.targets.values().filter(|target| target.ended) {
            self.kernel.unwatch_process(target.pid);
        }
    }

    pub fn all_ended(&self) -> bool {
        self.targets.values().all(|target| target.ended)
    }

    fn totals(&self, known: &Loop) -> LoopTotals {
        let clock = self.kernel.clock(known.info.tid).unwrap_or_default();
        LoopTotals { info: known.info.clone(), ticks: clock.ticks, busy_ns: clock.busy_ns }
    }

    /// What each loop did so far, those that are gone included.
    pub fn loops(&self) -> Vec<LoopTotals> {
        self.finished.iter().cloned().chain(self.loops.values().map(|known| self.totals(known))).collect()
    }

    /// Frames that could not be named.
    pub fn unsymbolized(&self) -> u64 {
        self.unsymbolized
    }

    /// What each target turned out to be, for the person at the terminal.
    pub fn describe(&self, pid: u32) -> String {
        match self.targets.get(&pid).and_then(|target| target.python.as_ref()) {
            Some(python) => format!("CPython {}", python.interpreter.version),
            None => "no Python".to_owned(),
        }
    }

    pub fn take_notices(&mut self) -> Vec<String> {
        std::mem::take(&mut self.notices)
    }

    /// CPU time of the kernel programs so far.
    pub fn kernel_cpu(&self) -> Duration {
        self.cost.total()
    }

    /// Records that did not arrive, or that nobody here understood.
    pub fn lost(&self) -> u64 {
        self.kernel.counts().lost + self.unknown_records
    }
}

/// Whether the step of a capture may have ended since.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Freshness {
    Unknown,
    /// Taken from here a moment ago, with the step still running.
    JustTaken,
}

struct Poll {
    pid: u32,
    tid: Tid,
    epoll_fd: i32,
    syscall: i64,
}

struct Found {
    pid: u32,
    tid: Tid,
    epoll_fd: i32,
    runtime: Runtime,
    python: Option<PyThreadInfo>,
}

/// What a thread's Python frames say about its event loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LoopFrames {
    /// asyncio's own loop; `polls`: it is in its poll, not in a step.
    Asyncio {
        polls: bool,
    },
    /// Started by `asyncio.run` or its like, the loop itself has no Python frames.
    Runner,
    None,
}

impl LoopFrames {
    fn of(stack: &Stack) -> Self {
        let is = |frame: &crate::core::event::Frame, function: &str, file: &str| {
            frame.function.ends_with(function) && frame.file.as_deref().is_some_and(|path| path.ends_with(file))
        };
        let run_once = stack.frames.iter().position(|frame| is(frame, "._run_once", "asyncio/base_events.py"));
        if let Some(depth) = run_once {
            // In the poll only the selector's `select` is inside `_run_once`.
            let polls = stack.frames[..depth].iter().all(|frame| is(frame, ".select", "selectors.py"));
            return Self::Asyncio { polls };
        }
        let runs = |frame: &crate::core::event::Frame| {
            is(frame, ".run", "asyncio/runners.py") || is(frame, "run", "uvloop/__init__.py")
        };
        if stack.frames.iter().any(|frame| runs(frame)) { Self::Runner } else { Self::None }
    }
}

fn step(record: &StepRecord) -> Step {
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
        cut_at_attach: record.flags & STEP_CUT_AT_ATTACH != 0,
    }
}

fn frames(record: &CaptureRecord) -> &[loopguard_common::records::RawFrame] {
    &record.frames[..(record.frame_count as usize).min(record.frames.len())]
}

fn walk_status(record: &CaptureRecord) -> WalkStatus {
    [WalkStatus::Complete, WalkStatus::TooDeep, WalkStatus::Unreadable, WalkStatus::NotThisThread]
        .into_iter()
        .find(|status| *status as u32 == record.walk)
        .unwrap_or(WalkStatus::None)
}

fn empty_capture() -> Box<CaptureRecord> {
    // SAFETY: a struct of integers, for which all zero is a value.
    unsafe { Box::<CaptureRecord>::new_zeroed().assume_init() }
}
