//! Follows running processes: turns kernel records into events, reading the target while the step still runs.
//!
//! [`follow`] keeps up with processes, [`discover`] finds their loop threads, [`steps`] marks the steps of these, [`facts`]
//! reads what a step is about, [`requests`] what servers tell of their requests, [`pages`] puts stack copies together,
//! [`waits`] says what a wait waits on.

mod discover;
mod facts;
mod follow;
mod pages;
mod polls;
mod requests;
mod steps;
mod victims;
mod waits;

use std::{
    collections::{BTreeSet, HashMap},
    io,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use aya::maps::{MapData, RingBuf};
use loopguard_common::{
    records::{MAX_STACK_PAGES, NO_SLOT, STACK_PAGE, STEP_ADDS_UP},
    short::ShortPace,
};
use tokio::io::unix::AsyncFd;

use super::{
    cost::CostMeter,
    decode::{Record, decode},
    governor::{Budget, Change, Effort, Governor, Shift, Shifts, Spent},
    kernel::{Kernel, Pace, Talk},
    process::{self, Identity},
};
use crate::{
    core::{
        cumulative::CumulativeSettings,
        event::{Event, LoopInfo, Tid},
        status::{RecordCounts, StackCounts, Status, ThreadStatus},
    },
    runtime::cpython::{Inspector, Interpreter, PyThreadInfo},
    symbol::naming::Naming,
};
use discover::Poll;
use facts::{Freshness, StepFacts, step};
use pages::StackPages;
use polls::{PollOwners, TokioTarget};
use requests::Requests;
use steps::{Closeness, StepMark};

const NOT_MEASURED: &str = "without CAP_SYS_ADMIN what loopguard costs in the kernel is not measured: it is missing from \
                            its CPU time, and the budget does not limit it";
/// Short steps are told once they sum up to this part of the cumulative threshold.
const SHORT_SHARE: u64 = 8;
/// How long a program may still write its record after the end, far more than it takes, and how often that is looked at.
const SETTLED: Duration = Duration::from_millis(200);
const SETTLING: Duration = Duration::from_millis(1);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Steps {
    /// Step probes where they can be placed.
    Auto,
    /// None: ticks only.
    Off,
}

/// How much of a user stack is copied for a capture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StackSize {
    /// As much as is enough for nearly all, and as much as can be of the threads for which it was not.
    AsNeeded,
    /// So many bytes.
    Bytes(usize),
}

impl StackSize {
    /// What a thread begins with, in bytes.
    fn first(self) -> usize {
        match self {
            Self::AsNeeded => 32 << 10,
            Self::Bytes(bytes) => bytes,
        }
    }

    fn most(self) -> usize {
        match self {
            Self::AsNeeded => MAX_STACK_PAGES * STACK_PAGE,
            Self::Bytes(bytes) => bytes,
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// What a loop begins with.
    pub threshold_ns: u64,
    pub steps: Steps,
    pub stack_size: StackSize,
    pub cumulative: CumulativeSettings,
    /// How old a step must be to be looked into, and how far apart captures are; `None`: by the threshold.
    pub capture_after_ns: Option<u64>,
    pub sample_every_ns: Option<u64>,
    /// How many times as far apart they are for now.
    pub slowdown: u32,
    pub budget: Budget,
    /// Whether the kernel programs' own log is printed.
    pub talk: Talk,
}

pub struct Live {
    /// When it began to watch.
    since_ns: u64,
    kernel: Kernel,
    records: AsyncFd<RingBuf<MapData>>,
    pages: StackPages,
    /// Events on their way out, and the stacks among them that are being named.
    naming: Naming,
    options: Options,
    targets: HashMap<u32, Target>,
    watched_processes: usize,
    loops: HashMap<Tid, Loop>,
    requests: Requests,
    /// Threads that are watched already, without anything being known of them but their polls.
    unintroduced: Vec<Poll>,
    cost: CostMeter,
    governor: Governor,
    shifts: Shifts,
    /// For how long loops were not watched, and less was looked at, to keep to the budget.
    unwatched: Duration,
    limited: Duration,
    governed_at: Option<Duration>,
    /// CPU time of each process when it was last looked at, and of all in sum since the start.
    cpu_of: HashMap<u32, Duration>,
    targets_cpu: Duration,
    /// What happened and did not fit into events: for the person at the terminal.
    notices: Vec<String>,
    /// That some CPUs are not sampled was said.
    told_of_cpus: bool,
    /// It was said that there are more loops than can be watched.
    said_full: bool,
    /// What loops that are gone had done.
    finished: Vec<ThreadStatus>,
    /// Lost records when it was last looked for threads of which nobody told.
    lost_when_searched: u64,
    /// Records that were taken from the ring buffer, and those among them that no code here understood.
    received_records: u64,
    unknown_records: u64,
}

/// A process that is watched.
struct Target {
    identity: Identity,
    /// The watched process that made it.
    parent: Option<u32>,
    /// Whether it is known what it runs.
    looked_into: bool,
    /// It was watched before the program it runs polled for the first time.
    before_polls: bool,
    /// It runs the program of the process that it was forked from.
    is_fork: bool,
    /// Its number among its parent's children with loops.
    worker: Option<u32>,
    python: Option<Python>,
    tokio: Option<TokioTarget>,
    uses_uvloop: bool,
    closeness: Closeness,
    ended: bool,
}

struct Python {
    interpreter: Arc<Interpreter>,
    inspector: Inspector,
}

/// A loop thread that is watched.
struct Loop {
    info: LoopInfo,
    /// When it became known.
    since_ns: u64,
    python: Option<PyThreadInfo>,
    epoll_fd: i32,
    slot: u32,
    marks: Option<StepMark>,
    step: StepFacts,
    /// How closely it is looked at.
    pace: Pace,
    /// What is shown as its threshold.
    threshold_ns: u64,
    poll_owners: PollOwners,
}

impl Options {
    /// How closely a loop is looked at whose steps may be blocks from `threshold_ns` on.
    fn pace(&self, threshold_ns: u64) -> Pace {
        let by_threshold_ns = match self.steps {
            // Half the threshold leaves the other half to read the target while the step still runs.
            Steps::Auto => threshold_ns / 2,
            // The tick has to be cut from captures: they must begin before its first owner is gone.
            Steps::Off => threshold_ns / 4,
        };
        let CumulativeSettings { window_ns, threshold_ns: cumulative_ns, .. } = self.cumulative;
        let floor_ns = self.cumulative.floor_ns(threshold_ns);
        let pace = Pace {
            threshold_ns,
            capture_age_ns: self.capture_after_ns.map_or(by_threshold_ns, |after| after.min(threshold_ns)),
            sample_every_ns: self.sample_every_ns,
            stack_pages: self.stack_size.first().div_ceil(STACK_PAGE).min(MAX_STACK_PAGES) as u32,
            short: ShortPace { floor_ns, window_ns, enough_ns: cumulative_ns / SHORT_SHARE },
        };
        match self.slowdown {
            ..=1 => pace,
            times => Pace { sample_every_ns: Some(pace.gap_ns().saturating_mul(u64::from(times))), ..pace },
        }
    }
}

impl Live {
    /// Loads the kernel programs and finds the loops of `pids`. Events of what is found come with the first drain.
    pub fn attach(pids: &BTreeSet<u32>, options: Options) -> Result<Self> {
        let (kernel, rings) = Kernel::load(options.pace(options.threshold_ns), options.talk)?;
        let mut live = Self {
            since_ns: process::monotonic_ns(),
            kernel,
            // SAFETY: the ring buffer owns its descriptor and keeps it open as long as it lives.
            records: unsafe { AsyncFd::register(rings.records) }
                .map_err(io::Error::from)
                .context("wait for the ring buffer")?,
            pages: StackPages::new(rings.stacks),
            naming: Naming::start()?,
            options,
            targets: HashMap::new(),
            watched_processes: 0,
            loops: HashMap::new(),
            requests: Requests::default(),
            unintroduced: Vec::new(),
            cost: CostMeter::default(),
            governor: Governor::new(options.budget),
            shifts: Shifts::default(),
            unwatched: Duration::ZERO,
            limited: Duration::ZERO,
            governed_at: None,
            cpu_of: HashMap::new(),
            targets_cpu: Duration::ZERO,
            notices: Vec::new(),
            told_of_cpus: false,
            said_full: false,
            finished: Vec::new(),
            lost_when_searched: 0,
            received_records: 0,
            unknown_records: 0,
        };
        for &pid in pids {
            live.add_tree(pid)?;
        }
        Ok(live)
    }

    /// Waits until a record is there that is better not left to the next [`watch`](Self::watch).
    pub async fn readable(&self) -> Result<()> {
        self.records.readable().await.context("wait for records")?.clear_ready();
        Ok(())
    }

    /// Takes all records that are there and appends what they mean, and what earlier ones meant that is known only now.
    pub fn drain(&mut self, events: &mut Vec<Event>) -> Result<()> {
        let mut fresh = Vec::new();
        self.take_records(&mut fresh)?;
        self.hand_on(fresh, events);
        Ok(())
    }

    /// Stops recording, takes what is left, and waits for what is still being named.
    pub fn finish(&mut self, events: &mut Vec<Event>) -> Result<()> {
        self.kernel.fall_silent();
        let silent = Instant::now();
        loop {
            // Programs that ran at that moment write their records.
            thread::sleep(SETTLING);
            self.drain(events)?;
            let counts = self.record_counts();
            if counts.sent == counts.received + counts.lost || silent.elapsed() > SETTLED {
                break;
            }
        }
        let mut fresh = Vec::new();
        self.settle_requests(u64::MAX, &mut fresh);
        self.hand_on(fresh, events);
        self.naming.finish(events);
        Ok(())
    }

    /// Everything goes out in the order it came, and so behind the stacks that are being named.
    fn hand_on(&mut self, mut fresh: Vec<Event>, events: &mut Vec<Event>) {
        self.pass_events(&mut fresh);
        self.naming.release(events);
        for tid in self.naming.take_outgrown() {
            if self.options.stack_size == StackSize::AsNeeded {
                // A thread that has ended by now needs nothing.
                let _ = self.kernel.deepen_stack(tid);
            }
        }
    }

    fn take_records(&mut self, events: &mut Vec<Event>) -> Result<()> {
        // A record is copied out before it is understood: its place is free for the next ones meanwhile.
        while let Some(record) = self.records.get_mut().next().map(|bytes| decode(&bytes)) {
            self.received_records += 1;
            match record {
                Ok(Record::Capture(mut record)) => {
                    self.introduce(record.header.tid, events)?;
                    self.complete(&mut record);
                    let copy = self.pages.take(&record).or_else(|| self.copied_meanwhile(&record));
                    if let Some(capture) = self.capture(&record, Freshness::Unknown) {
                        let seen = self.seen(&record, capture, copy);
                        self.pass_events(events);
                        self.naming.pass(seen);
                    }
                }
                Ok(Record::Step(record)) => {
                    self.introduce(record.header.tid, events)?;
                    if record.flags & STEP_ADDS_UP != 0 {
                        self.watch_closely(record.header.tgid);
                    }
                    self.requests.blocked(&record);
                    let told = self.requests.owner(record.header.tgid, record.request);
                    if told.is_none() {
                        events.extend(self.owner_of_step(&record).map(Event::Capture));
                    }
                    events.push(Event::Step(step(&record, told)));
                }
                Ok(Record::RequestStart(record)) => self.request_started(&record),
                Ok(Record::RequestRoute(record)) => self.request_routed(&record),
                Ok(Record::RequestEnd(record)) => events.extend(self.request_ended(&record)),
                Ok(Record::Task(record)) => self.task(&record),
                Ok(Record::TaskReturn(record)) => self.task_return(&record),
                Ok(Record::UnclearWait(record)) => self.unclear_wait(&record),
                Ok(Record::Poll(record)) => {
                    let found = Poll {
                        pid: record.header.tgid,
                        tid: record.header.tid,
                        epoll_fd: record.epoll_fd,
                        syscall: i64::from(record.syscall),
                        returned_ns: (record.timeout_ms == 0).then_some(record.at_ns),
                    };
                    let slot = (record.slot != NO_SLOT).then_some(record.slot);
                    self.reported(found, slot, events)?;
                }
                Ok(Record::Process(record)) => self.process_changed(&record, events),
                Ok(Record::StackPage(_)) | Err(_) => self.unknown_records += 1,
            }
        }
        while let Some(tid) = self.unintroduced.first().map(|poll| poll.tid) {
            self.introduce(tid, events)?;
        }
        Ok(())
    }

    /// Lets go of threads and processes that are gone. Call it regularly: what the kernel programs cost is measured
    /// on the way.
    pub fn reap(&mut self, events: &mut Vec<Event>) {
        let mut fresh = Vec::new();
        self.reap_gone(&mut fresh);
        self.hand_on(fresh, events);
    }

    fn reap_gone(&mut self, events: &mut Vec<Event>) {
        let was_denied = self.cost.is_denied();
        self.cost.turn(&self.kernel);
        if self.cost.is_denied() && !was_denied {
            self.notices.push(NOT_MEASURED.to_owned());
        }
        self.govern();
        if let Err(error) = self.kernel.follow_cpus()
            && !std::mem::replace(&mut self.told_of_cpus, true)
        {
            self.notices.push(format!("not all CPUs are sampled: {error:#}"));
        }
        self.kernel.flush_log();
        self.relax();
        self.end_learning();
        self.look_at_task_ids();
        self.let_go(events);
        let now_ns = process::monotonic_ns();
        self.settle_requests(now_ns, events);
        events.push(Event::TimePassed { now_ns });
        self.tend_requests();
    }

    /// Looks less closely while watching costs more than its budget.
    fn govern(&mut self) {
        for &pid in self.targets.keys() {
            let Ok(process::Stat { cpu, .. }) = process::stat(pid) else { continue };
            let before = self.cpu_of.insert(pid, cpu).unwrap_or(cpu);
            self.targets_cpu += cpu.saturating_sub(before);
        }
        self.cpu_of.retain(|pid, _| self.targets.contains_key(pid));
        let at = Duration::from_nanos(process::monotonic_ns());
        let since_last = at.saturating_sub(self.governed_at.replace(at).unwrap_or(at));
        if self.governor.effort() != Effort::FULL {
            self.limited += since_last;
        }
        if self.shifts.rests() {
            self.unwatched += since_last;
        }
        let own = process::own_cpu() + self.cost.total();
        if let Some(change) = self.governor.turn(Spent { at, own, targets: self.targets_cpu }) {
            self.change_effort(change);
        }
        let is_blocked = !self.shifts.rests() && self.is_blocked(at.as_nanos() as u64);
        match self.shifts.turn(at, self.governor.effort().parts, is_blocked) {
            Some(Shift::Rest) => self.rest(),
            Some(Shift::Watch) => self.watch_again(),
            None => {}
        }
    }

    fn change_effort(&mut self, Change { share, from, to }: Change) {
        let budget = self.options.budget.share();
        let why = match share / budget {
            ..=0.5 => "well within",
            ..=1.0 => "close to",
            _ => "over",
        };
        // 7 % is no round number as a part of one.
        let (share, budget) = (share * 100.0, (budget * 1000.0).round() / 10.0);
        self.notices.push(format!(
            "watching took {share:.1} % of the CPU time of what is watched, {why} the budget of {budget} %"
        ));
        self.notices.extend(to.changes_from(from));
        self.options.slowdown = to.slowdown;
        self.apply_pace();
        self.cost.changes(&self.kernel);
    }

    fn is_blocked(&self, now_ns: u64) -> bool {
        self.loops.values().any(|known| {
            let clock = self.kernel.clock(known.info.tid);
            clock.is_some_and(|clock| {
                clock.in_tick() && now_ns.saturating_sub(clock.step_start_ns) >= known.pace.threshold_ns
            })
        })
    }

    /// Loops are not watched for a while; processes still are.
    pub fn rest(&mut self) {
        self.cost.set_rests(true, &self.kernel);
        self.kernel.unwatch_loops();
    }

    /// Loops are watched again.
    pub fn watch_again(&mut self) {
        // A loop that began while nobody watched was not seen to begin.
        for (&pid, target) in &mut self.targets {
            target.before_polls = false;
            // A process that is gone is let go of soon.
            let _ = self.kernel.may_poll(pid);
        }
        match self.kernel.watch_loops() {
            Ok(()) => self.cost.set_rests(false, &self.kernel),
            Err(error) => {
                self.shifts.still_rests();
                self.notices.push(format!("loops cannot be watched again just now: {error:#}"));
            }
        }
    }

    /// Gives all threads the pace that follows from the options by now.
    fn apply_pace(&mut self) {
        // Threads that end meanwhile don't need it.
        let _ = self.kernel.set_pace(self.options.pace(self.options.threshold_ns));
        for known in self.loops.values_mut() {
            known.pace = self.options.pace(known.pace.threshold_ns);
            let pace = known.pace;
            let _ = self.kernel.update_thread(known.info.tid, |thread| pace.fill_in(thread));
        }
        for pid in self.targets.keys().copied().collect::<Vec<_>>() {
            if !self.governor.effort().reads_details {
                self.unmark_steps(pid);
            }
            // The others have no clocks of their own.
            if self.targets.get(&pid).is_none_or(|target| !target.closeness.is_close()) {
                continue;
            }
            self.mark_polls(pid);
            let loops = self.loops.values().filter(|known| known.info.pid == pid);
            for tid in loops.map(|known| known.info.tid).collect::<Vec<_>>() {
                self.watch_loop_closely(tid);
            }
        }
    }

    /// Processes that were watched in all.
    pub fn watched_processes(&self) -> usize {
        self.watched_processes
    }

    pub fn all_ended(&self) -> bool {
        self.targets.is_empty()
    }

    fn thread_status(&self, known: &Loop) -> ThreadStatus {
        let clock = self.kernel.clock(known.info.tid).unwrap_or_default();
        ThreadStatus {
            info: known.info.clone(),
            is_gone: false,
            threshold_ns: known.threshold_ns,
            ticks: clock.ticks,
            busy_ns: clock.busy_ns,
            tick_histogram: clock.tick_histogram,
            step_start_ns: clock.in_tick().then_some(clock.step_start_ns),
        }
    }

    /// What a loop's threshold is, and from which length on its steps may be blocks; from its next tick on.
    pub fn set_threshold(&mut self, tid: Tid, threshold_ns: u64, told_from_ns: u64) -> Result<()> {
        let Some(known) = self.loops.get_mut(&tid) else { return Ok(()) };
        known.threshold_ns = threshold_ns;
        if known.pace.threshold_ns == told_from_ns {
            return Ok(());
        }
        known.pace = self.options.pace(told_from_ns);
        let pace = known.pace;
        self.kernel.update_thread(tid, |thread| pace.fill_in(thread))
    }

    fn record_counts(&self) -> RecordCounts {
        let counts = self.kernel.counts();
        RecordCounts { sent: counts.sent + counts.lost, received: self.received_records, lost: counts.lost }
    }

    /// What each loop did so far, those that are gone included, and what it cost to know.
    pub fn status(&self) -> Status {
        let threads = self.loops.values().map(|known| self.thread_status(known));
        Status {
            since_ns: self.since_ns,
            now_ns: process::monotonic_ns(),
            threads: self.finished.iter().cloned().chain(threads).collect(),
            lost_records: self.kernel.counts().lost + self.unknown_records,
            records: self.record_counts(),
            requests: self.request_counts(),
            unsymbolized: self.naming.unnamed(),
            stacks: StackCounts { lost: self.pages.lost, ..self.naming.counts() },
            self_cpu: process::own_cpu() + self.cost.total(),
            limited: self.limited,
            unwatched: self.unwatched,
        }
    }

    /// What each target turned out to be, for the person at the terminal.
    pub fn describe(&self, pid: u32) -> String {
        match self.targets.get(&pid).and_then(|target| target.python.as_ref()) {
            Some(python) => format!("CPython {}", python.interpreter.version),
            None => match self.targets.get(&pid).and_then(|target| target.tokio.as_ref()) {
                Some(known) => format!("tokio {}", known.tokio.version.as_deref().unwrap_or("1.x")),
                None => "no Python, no tokio".to_owned(),
            },
        }
    }

    pub fn take_notices(&mut self) -> Vec<String> {
        let mut notices = std::mem::take(&mut self.notices);
        notices.extend(self.naming.take_notices());
        notices
    }
}
