//! Owns the kernel programs: loads them, tells them what to watch, and reads their maps.

mod clocks;
mod closing;
mod cpu_clocks;
mod multi;
mod polls;
mod requests;

use std::{
    any::Any, collections::HashMap as StdHashMap, fs, io, num::NonZeroU32, os::fd::OwnedFd, path::Path, thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{
    Btf, Ebpf, EbpfLoader,
    maps::{Array, HashMap, MapData, PerCpuArray, Queue, RingBuf},
    programs::{
        BtfTracePoint, PerfEvent, Program, ProgramError, ProgramInfo, TracePoint, UProbe,
        perf_event::{PerfEventConfig, PerfEventLinkId, PerfEventScope, SamplePolicy, SoftwareEvent},
        uprobe::{UProbeAttachLocation, UProbeAttachPoint, UProbeLinkId, UProbeScope},
    },
    sys::{Stats, enable_stats},
};
use aya_log::EbpfLogger;
use loopguard_common::{
    clock::{LoopClock, SwitchOut},
    layout::PyLayout,
    records::{
        CaptureRecord, Counter, LoopThread, MARK_LOOK_UP, MAX_STACK_PAGES, PROCESS_BEFORE_POLLS, PROCESS_MAY_POLL,
        RunQueueFields, STEP_CUT_AT_ATTACH, slot_mark,
    },
    short::ShortPace,
    walk::CaptureBuffer,
};

use polls::PollProbes;

use super::{
    features::{Features, SwitchShape},
    target,
};
use crate::{
    core::event::Tid,
    runtime::{cpython::StepProbe, probe_site::ProbeSite, usdt::RequestProbe},
    sink::escape::printable,
};
use clocks::Clocks;
use closing::Closing;
use cpu_clocks::CpuClocks;
use requests::RequestMaps;

/// The object that `cargo xtask build-ebpf` makes; empty in a build without the BPF toolchain.
static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("LOOPGUARD_BPF_OBJECT"));

/// A uprobe's way into the kernel and back, which the kernel's statistics leave out: an empty program took 450 to 500 ns
/// on Linux 6.18.
const TRAP_NS: u64 = 450;
/// Only for an id that has no entry yet (linux/bpf.h).
const BPF_NOEXIST: u64 = 1;

/// Loop threads that can be watched at once: each has a clock and a capture buffer of about 4 KiB.
pub const MAX_THREADS: u32 = 512;
/// Of these, threads of which more of the stack can be copied than of others, some 64 KiB of kernel memory each.
const MAX_DEEP_STACKS: u32 = 32;
/// Requests that can be open at once, where servers tell of them.
pub const MAX_OPEN_REQUESTS: u32 = 16384;

/// How closely the kernel programs look.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// A step at least this long is recorded.
    pub threshold_ns: u64,
    /// A step or tick younger than this is not looked into.
    pub capture_age_ns: u64,
    /// Pages copied of the user stack for a capture.
    pub stack_pages: u32,
    /// How far apart captures are, instead of by the threshold.
    pub sample_every_ns: Option<u64>,
    /// Which shorter steps are recorded too.
    pub short: ShortPace,
}

/// Whether the kernel programs say what they do (`--debug-bpf`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Talk {
    Silent,
    Debug,
}

/// Prints what the kernel programs log.
struct ToStandardError;

impl log::Log for ToStandardError {
    fn enabled(&self, _metadata: &log::Metadata) -> bool {
        true
    }

    fn log(&self, record: &log::Record) {
        eprintln!("loopguard: kernel: {}", printable(&record.args().to_string()));
    }

    fn flush(&self) {}
}

impl Pace {
    /// How far apart captures of one step are at least.
    pub fn gap_ns(self) -> u64 {
        // A short step that counts meets it once.
        let by_floor = (self.short.floor_ns / 2).max(1_000_000);
        self.sample_every_ns.unwrap_or((self.threshold_ns / 16).clamp(1_000_000, 5_000_000).min(by_floor))
    }

    /// What the kernel programs are told of it.
    pub fn fill_in(&self, thread: &mut LoopThread) {
        thread.threshold_ns = self.threshold_ns;
        thread.capture_age_ns = self.capture_age_ns;
        thread.capture_gap_ns = self.gap_ns();
        thread.short = self.short;
    }

    /// How often the sampling clock ticks.
    fn sampling_period_ns(self, sampling: Sampling) -> u64 {
        match sampling {
            // A step that reaches the threshold on one CPU meets it once after the age at which it is looked into.
            Sampling::Watchful => self.capture_age_ns.min(self.threshold_ns.saturating_sub(self.capture_age_ns)),
            // A block has at least eight of them.
            Sampling::Close => self.gap_ns(),
        }
        .max(self.gap_ns())
    }
}

/// Whether the loops of a process that is to be watched run already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    MayPoll,
    BeforePolls,
}

/// How closely threads on the CPU are sampled. An interrupt costs a few microseconds; and a clock of a thread's own most
/// of one at each of the thread's switches, or several where it has to be set anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sampling {
    /// Enough to notice the first step that becomes old: by the clocks of the CPUs, which all threads share.
    Watchful,
    /// Enough to tell what a step was about, and where in a tick its owner changed: by a clock of the thread's own, which
    /// ticks in time that it is on the CPU.
    Close,
}

/// What the kernel programs send.
pub struct Rings {
    pub records: RingBuf<MapData>,
    /// Pages of user stacks, each sent before the capture it belongs to.
    pub stacks: RingBuf<MapData>,
}

pub struct Kernel {
    bpf: Ebpf,
    watched: Array<MapData, u32>,
    processes: HashMap<MapData, u32, u32>,
    layouts: HashMap<MapData, u32, PyLayout>,
    slots: HashMap<MapData, u32, u32>,
    free_slots: Queue<MapData, u32>,
    threads: Array<MapData, LoopThread>,
    clocks: Clocks,
    captures: Array<MapData, CaptureBuffer>,
    counts: PerCpuArray<MapData, u64>,
    /// Watched ids, tgids and tids, with how many watch them: two ids can share an entry.
    ids: StdHashMap<u32, u32>,
    /// Which thread has which slot, as far as it is known here.
    taken: StdHashMap<Tid, u32>,
    /// Who has which of the rooms for deep stacks, by slot.
    deep_stacks: [Option<u32>; MAX_DEEP_STACKS as usize],
    pace: Pace,
    log: Option<EbpfLogger<ToStandardError>>,
    requests: RequestMaps,
    closing: Closing,
    /// What is attached for the loops of all processes; nothing while they are not watched.
    watching: Vec<Box<dyn Any + Send>>,
    switch: SwitchShape,
    /// None while loops are not watched.
    cpu_clocks: CpuClocks,
    /// The sampling clocks of threads.
    samplers: StdHashMap<Tid, PerfEventLinkId>,
    /// By process and program.
    step_probes: StdHashMap<(u32, &'static str), UProbeLinkId>,
    polls: PollProbes,
}

/// Where a thread that begins to be watched stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// In its poll, or not known to be in a tick: its first tick begins at its next return from the poll.
    Idle,
    /// In the middle of a tick: it counts from this moment. If it sleeps, in which system call and with which first
    /// argument.
    InTick { now_ns: u64, waits_in: Option<(i32, u64)> },
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Records for which the ring buffer had no room.
    pub lost: u64,
    pub lost_stack_pages: u64,
    /// Records for which it had.
    pub sent: u64,
    /// Requests for which there was no place.
    pub requests_untracked: u64,
    /// Enters and exits without a counterpart.
    pub requests_astray: u64,
}

impl Kernel {
    /// Loads and attaches everything that is not bound to one target.
    pub fn load(pace: Pace, talk: Talk) -> Result<(Self, Rings)> {
        if OBJECT.is_empty() {
            bail!("this loopguard was built without its kernel programs; build it again after `cargo xtask setup`");
        }
        tracefs()?;
        target::drop_privileges().context("give up privileges that are not needed")?;
        let features = Features::of_this_kernel()?;
        features.check()?;
        let task_offset = |offset: Option<u32>, field: &str| {
            offset.with_context(|| format!("the kernel's BTF has no task_struct.{field}"))
        };
        let pid_offset = task_offset(features.task_pid, "pid")?;
        let tgid_offset = task_offset(features.task_tgid, "tgid")?;
        let start_offset = task_offset(features.task_start, "start_boottime")?;
        let switch = features.switch.context("the kernel's BTF has no sched_switch")?;
        let task_state_offset = if let SwitchShape::StateInTask(offset) = switch { offset } else { 0 };
        let btf = Btf::from_sys_fs().context("read the kernel's BTF")?;
        // `log::Level` as a number; nothing is below 1.
        let log_level: &u8 = if talk == Talk::Debug { &4 } else { &0 };
        let mut bpf = EbpfLoader::new()
            .btf(Some(&btf))
            .override_global("TASK_PID_OFFSET", &pid_offset, true)
            .override_global("TASK_TGID_OFFSET", &tgid_offset, true)
            .override_global("TASK_START_BOOTTIME_OFFSET", &start_offset, true)
            .override_global("TASK_STATE_OFFSET", &task_state_offset, true)
            .override_global("AYA_LOG_LEVEL", log_level, false)
            .override_global("STACK_PAGE_LIMIT", &pace.stack_pages, true)
            .override_global("RUN_QUEUE", &features.run_queue.unwrap_or(RunQueueFields::NONE), true)
            .override_global("FUTEX_SYSCALL", &(libc::SYS_futex as i32), true)
            .map_max_entries("THREADS", MAX_THREADS)
            .map_max_entries("CLOCKS", MAX_THREADS)
            .map_max_entries("CAPTURES", MAX_THREADS)
            .map_max_entries("WORKERS", MAX_THREADS)
            .map_max_entries("HELD", MAX_THREADS)
            .map_max_entries("FREE_SLOTS", MAX_THREADS)
            .map_max_entries("STACK_PAGES", first_deep_stack(pace) + MAX_DEEP_STACKS * MAX_STACK_PAGES as u32)
            .map_max_entries("REQUESTS", MAX_OPEN_REQUESTS)
            .load(OBJECT)
            .context("load the kernel programs (root, or CAP_BPF and CAP_PERFMON, is needed)")?;
        let log = match talk {
            Talk::Debug => Some(EbpfLogger::init_with_logger(&mut bpf, ToStandardError).context("read the log")?),
            Talk::Silent => None,
        };
        let maps = multi::Maps::of(&bpf).context("duplicate the maps")?;
        let rings = Rings {
            records: RingBuf::try_from(take_map(&mut bpf, "RECORDS")?)?,
            stacks: RingBuf::try_from(take_map(&mut bpf, "STACKS")?)?,
        };
        let mut kernel = Self {
            polls: PollProbes::new(&mut bpf, maps)?,
            watched: take_map(&mut bpf, "WATCHED")?.try_into()?,
            processes: take_map(&mut bpf, "PROCESSES")?.try_into()?,
            layouts: take_map(&mut bpf, "LAYOUTS")?.try_into()?,
            free_slots: take_map(&mut bpf, "FREE_SLOTS")?.try_into()?,
            slots: take_map(&mut bpf, "SLOTS")?.try_into()?,
            threads: take_map(&mut bpf, "THREADS")?.try_into()?,
            clocks: Clocks::new(take_map(&mut bpf, "CLOCKS")?)?,
            captures: take_map(&mut bpf, "CAPTURES")?.try_into()?,
            counts: take_map(&mut bpf, "COUNTS")?.try_into()?,
            ids: StdHashMap::new(),
            taken: StdHashMap::new(),
            deep_stacks: [None; MAX_DEEP_STACKS as usize],
            pace,
            log,
            requests: RequestMaps::take(&mut bpf)?,
            closing: Closing::start()?,
            watching: Vec::new(),
            switch,
            cpu_clocks: CpuClocks::default(),
            samplers: StdHashMap::new(),
            step_probes: StdHashMap::new(),
            bpf,
        };
        for slot in 0..MAX_THREADS {
            kernel.free_slots.push(slot, 0)?;
        }
        kernel.set_pace(pace)?;
        kernel.attach_everywhere(&btf).map_err(explain)?;
        Ok((kernel, rings))
    }

    fn attach_everywhere(&mut self, btf: &Btf) -> Result<()> {
        let mut programs: StdHashMap<&str, &mut Program> = self.bpf.programs_mut().collect();
        let mut take = |name: &'static str| {
            programs.remove(name).with_context(|| format!("the kernel object has no program {name}"))
        };
        let sample: &mut PerfEvent = take("on_sample")?.try_into()?;
        let switch: &mut BtfTracePoint = take(switch_program(self.switch))?.try_into()?;
        // The verifier takes its time for the two programs that walk frames: let it look at both at once.
        thread::scope(|scope| {
            let sample = scope.spawn(|| sample.load().context("load the sampling program"));
            switch.load("sched_switch", btf).context("load the program for sched_switch")?;
            sample.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
        for (name, tracepoint) in
            [("on_fork", "sched_process_fork"), ("on_exec", "sched_process_exec"), ("on_exit", "sched_process_exit")]
        {
            let program: &mut BtfTracePoint = take(name)?.try_into()?;
            program.load(tracepoint, btf).with_context(|| format!("load the program for {tracepoint}"))?;
            program.attach().with_context(|| format!("attach {tracepoint}"))?;
        }
        for (name, tracepoint) in polls::WAKES {
            let waking: &mut BtfTracePoint = take(name)?.try_into()?;
            waking.load(tracepoint, btf).with_context(|| format!("load the program for {tracepoint}"))?;
        }
        for (name, what) in [("on_poll_enter", "polls"), ("on_close_enter", "closed loops")] {
            let program: &mut TracePoint = take(name)?.try_into()?;
            program.load().with_context(|| format!("load the program for {what}"))?;
        }
        for which in [StepProbe::ContextRun, StepProbe::ContextEnter] {
            let program: &mut UProbe = take(step_program(which))?.try_into()?;
            program.load().context("load the step programs")?;
        }
        for probe in RequestProbe::ALL {
            let program: &mut UProbe = take(requests::program(probe))?.try_into()?;
            program.load().with_context(|| format!("load the program for {}", probe.name()))?;
        }
        self.watch_loops()
    }

    /// Attaches what watches loops. A thread that was watched before begins its next tick with its own poll.
    pub fn watch_loops(&mut self) -> Result<()> {
        // Whatever happened since is not known.
        self.leave_ticks();
        let attached = self.attach_watching();
        if attached.is_err() {
            self.unwatch_loops();
        }
        attached
    }

    fn attach_watching(&mut self) -> Result<()> {
        const POLL: &str = "on_poll_enter";
        let switch: &mut BtfTracePoint = program_mut(&mut self.bpf, switch_program(self.switch))?.try_into()?;
        let link = switch.attach().context("attach sched_switch")?;
        self.watching.push(Box::new(switch.take_link(link)?));
        let calls = [("epoll_wait", POLL), ("epoll_pwait", POLL), ("epoll_pwait2", POLL), ("close", "on_close_enter")];
        for (call, name) in calls {
            let tracepoint = format!("sys_enter_{call}");
            // Not every architecture and kernel has all of them.
            if Path::new(TRACEFS).join("events/syscalls").join(&tracepoint).exists() {
                let program: &mut TracePoint = program_mut(&mut self.bpf, name)?.try_into()?;
                let link = program.attach("syscalls", &tracepoint).with_context(|| format!("attach {tracepoint}"))?;
                self.watching.push(Box::new(program.take_link(link)?));
            }
        }
        self.sample_cpus()
    }

    fn sample_cpus(&mut self) -> Result<()> {
        let program: &mut PerfEvent = program_mut(&mut self.bpf, "on_sample")?.try_into()?;
        self.cpu_clocks.start(program, self.pace.sampling_period_ns(Sampling::Watchful))
    }

    /// Has all CPUs sampled that are there by now; to be called now and then.
    ///
    /// # Errors
    /// When the clocks of the CPUs can't be attached: those that were go on.
    pub fn follow_cpus(&mut self) -> Result<()> {
        let samples = || {
            let by_cpu = self.counts.get(&(Counter::Samples as u32), 0);
            by_cpu.map(|by_cpu| by_cpu.iter().copied().collect()).unwrap_or_default()
        };
        if self.cpu_clocks.want_start(samples) { self.sample_cpus() } else { Ok(()) }
    }

    /// Takes away what watches loops.
    pub fn unwatch_loops(&mut self) {
        // Here and now: a program is attached once at a time, and nothing is missed while this waits for the kernel.
        self.watching.clear();
        self.cpu_clocks.stop();
        // What else looks at clocks must not take what they stand at for a long step.
        self.leave_ticks();
    }

    fn leave_ticks(&mut self) {
        for &slot in self.taken.values() {
            if let Some(mut clock) = self.clocks.get(slot) {
                clock.leave();
                // A slot that exists.
                let _ = self.clocks.set(slot, clock);
            }
        }
    }

    /// Reports the loop threads of a process that are not watched yet as they poll, and what becomes of the process.
    /// Its children are watched from their first instant.
    pub fn watch_process(&mut self, pid: u32, progress: Progress) -> Result<()> {
        let known = match progress {
            Progress::MayPoll => PROCESS_MAY_POLL,
            Progress::BeforePolls => PROCESS_BEFORE_POLLS,
        };
        // The kernel programs may know it better already.
        let _ = self.processes.insert(pid, known, BPF_NOEXIST);
        self.mark(pid, true)
    }

    /// It began to poll just when it was to be watched.
    pub fn may_poll(&mut self, pid: u32) -> Result<()> {
        Ok(self.processes.insert(pid, PROCESS_MAY_POLL, 0)?)
    }

    pub fn update_layout(&mut self, pid: u32, layout: &PyLayout) -> Result<()> {
        Ok(self.layouts.insert(pid, layout, 0)?)
    }

    pub fn unwatch_process(&mut self, pid: u32) {
        let _ = self.processes.remove(&pid);
        let _ = self.mark(pid, false);
        self.forget_program(pid);
    }

    /// Nothing is recorded from here on, but by programs that run at this very moment. What clocks have counted stays.
    pub fn fall_silent(&mut self) {
        let pids: Vec<u32> = self.processes.keys().flatten().collect();
        for pid in pids {
            let _ = self.processes.remove(&pid);
            self.detach_steps(pid);
            self.detach_requests(pid);
            self.forget_polls(pid);
        }
        for id in self.ids.keys() {
            let _ = self.watched.set(id % self.watched.len(), 0, 0);
        }
        let slots: Vec<(Tid, u32)> = self.slots.iter().flatten().collect();
        for (tid, slot) in slots {
            let _ = self.watched.set(tid % self.watched.len(), 0, 0);
            let _ = self.threads.set(slot, LoopThread::default(), 0);
        }
    }

    /// The process runs another program now: what was known of the last one is wrong.
    pub fn forget_program(&mut self, pid: u32) {
        let _ = self.layouts.remove(&pid);
        self.detach_steps(pid);
        self.detach_requests(pid);
        self.forget_polls(pid);
    }

    pub fn detach_steps(&mut self, pid: u32) {
        for which in [StepProbe::ContextRun, StepProbe::ContextEnter] {
            if let Some(link) = self.step_probes.remove(&(pid, step_program(which)))
                && let Some(program) = self.bpf.program_mut(step_program(which))
                && let Ok(program) = <&mut UProbe>::try_from(program)
                && let Ok(link) = program.take_link(link)
            {
                self.closing.close(link);
            }
        }
    }

    /// Whether as many threads are watched as can be.
    pub fn is_full(&self) -> bool {
        self.taken.len() >= MAX_THREADS as usize
    }

    /// Watches a loop thread; the pace is filled in here. Returns its slot.
    pub fn watch_thread(&mut self, mut thread: LoopThread, standing: Standing) -> Result<u32> {
        let tid = thread.tid;
        self.pace.fill_in(&mut thread);
        if let Ok(slot) = self.slots.get(&tid, 0) {
            self.take_over(tid, slot)?;
            return self.introduce_thread(thread);
        }
        let Ok(slot) = self.free_slots.pop(0) else {
            bail!("{MAX_THREADS} loop threads are watched already");
        };
        let mut clock = LoopClock::idle();
        let in_tick = match standing {
            Standing::Idle => None,
            Standing::InTick { now_ns, waits_in } => Some((now_ns, waits_in)),
        };
        if let Some((now_ns, waits_in)) = in_tick {
            clock.begin_tick(now_ns);
            clock.step_flags = STEP_CUT_AT_ATTACH;
            if let Some((syscall, arg0)) = waits_in {
                let gil = syscall == libc::SYS_futex as i32 && thread.gil.iter().any(|range| range.contains(arg0));
                clock.switch_out(now_ns, SwitchOut::Waits { syscall, arg0, gil });
            }
        }
        self.clocks.set(slot, clock)?;
        self.threads.set(slot, thread, 0)?;
        if self.slots.insert(tid, slot, BPF_NOEXIST).is_err() {
            // It polled just now, and is watched since.
            self.free(slot)?;
            let slot = self.slots.get(&tid, 0)?;
            self.take_over(tid, slot)?;
            return self.introduce_thread(thread);
        }
        self.take_over(tid, slot)?;
        Ok(slot)
    }

    /// A thread is watched that the programs have taken the slot for.
    pub fn take_over(&mut self, tid: Tid, slot: u32) -> Result<()> {
        ensure!(slot < MAX_THREADS, "a slot that does not exist");
        // Whoever had it before is gone.
        self.taken.retain(|other, of_other| *of_other != slot || *other == tid);
        if self.taken.insert(tid, slot).is_none() {
            self.mark(tid, true)?;
        }
        Ok(())
    }

    /// Says what a thread is that is watched already; its clock and its pace stay, and its poll if it has shown one.
    /// Returns its slot.
    pub fn introduce_thread(&mut self, thread: LoopThread) -> Result<u32> {
        self.update_thread(thread.tid, |known| {
            let LoopThread { flags, epoll_fd, thread_state, native_thread_id, gil, task_ids, .. } = thread;
            let flags = known.flags | flags;
            let epoll_fd = if known.epoll_fd < 0 { epoll_fd } else { known.epoll_fd };
            *known = LoopThread { flags, epoll_fd, thread_state, native_thread_id, gil, task_ids, ..*known };
        })?;
        Ok(self.slots.get(&thread.tid, 0)?)
    }

    /// The thread is parked, not blocked: what says so was not known yet when it went to sleep.
    pub fn set_idle(&mut self, tid: Tid) -> Result<()> {
        let slot = self.slots.get(&tid, 0)?;
        self.clocks.set(slot, LoopClock::idle())
    }

    /// Threads that are watched and not known here: those that were reported with a record that was lost.
    pub fn unknown_threads(&self) -> Vec<(Tid, u32)> {
        self.slots.iter().flatten().filter(|(tid, slot)| self.taken.get(tid) != Some(slot)).collect()
    }

    fn free(&mut self, slot: u32) -> Result<()> {
        self.threads.set(slot, LoopThread::default(), 0)?;
        self.clocks.set(slot, LoopClock::default())?;
        self.polls.forget_worker(slot)?;
        for room in self.deep_stacks.iter_mut().filter(|room| **room == Some(slot)) {
            *room = None;
        }
        Ok(self.free_slots.push(slot, 0)?)
    }

    /// Has a thread sampled this closely.
    pub fn sample(&mut self, tid: Tid, sampling: Sampling) -> Result<()> {
        let program: &mut PerfEvent = program_mut(&mut self.bpf, "on_sample")?.try_into()?;
        let before = match sampling {
            Sampling::Watchful => self.samplers.remove(&tid),
            Sampling::Close => {
                let scope = PerfEventScope::OneProcess { pid: tid, cpu: None };
                let link = attach_clock(program, scope, self.pace.sampling_period_ns(sampling))?;
                self.samplers.insert(tid, link)
            }
        };
        if let Some(before) = before
            && let Ok(before) = program.take_link(before)
        {
            self.closing.close(before);
        }
        Ok(())
    }

    pub fn unwatch_thread(&mut self, tid: Tid) {
        let Some(slot) = self.taken.remove(&tid) else { return };
        let _ = self.mark(tid, false);
        let _ = self.slots.remove(&tid);
        let _ = self.free(slot);
        let _ = self.sample(tid, Sampling::Watchful);
    }

    /// Changes what is known of a watched thread, its clock untouched.
    pub fn update_thread(&mut self, tid: Tid, change: impl FnOnce(&mut LoopThread)) -> Result<()> {
        let slot = self.slots.get(&tid, 0)?;
        let mut thread = self.threads.get(&slot, 0)?;
        change(&mut thread);
        Ok(self.threads.set(slot, thread, 0)?)
    }

    /// From now on as much as can be is copied of a watched thread's stack, if there is room.
    pub fn deepen_stack(&mut self, tid: Tid) -> Result<()> {
        let slot = self.slots.get(&tid, 0)?;
        if self.deep_stacks.contains(&Some(slot)) {
            return Ok(());
        }
        let Some(room) = self.deep_stacks.iter().position(Option::is_none) else { return Ok(()) };
        self.deep_stacks[room] = Some(slot);
        let deep_stack = first_deep_stack(self.pace) + (room * MAX_STACK_PAGES) as u32;
        self.update_thread(tid, |thread| thread.deep_stack = deep_stack)
    }

    /// Marks the steps of a process's loops; once per process and kind of loop. `slot` is that of the loop it is
    /// placed for, which the probe then finds faster.
    pub fn attach_steps(&mut self, pid: u32, which: StepProbe, (site, slot): (&ProbeSite, u32)) -> Result<()> {
        if self.step_probes.contains_key(&(pid, step_program(which))) {
            return Ok(());
        }
        let program: &mut UProbe = program_mut(&mut self.bpf, step_program(which))?.try_into()?;
        let scope = UProbeScope::OneProcess(NonZeroU32::new(pid).context("pid 0 is the kernel's")?);
        let point = UProbeAttachPoint {
            location: UProbeAttachLocation::AbsoluteOffset(site.offset),
            cookie: Some(u64::from(slot)),
        };
        let link = program.attach(point, &site.file, scope).context("attach the step probe")?;
        self.step_probes.insert((pid, step_program(which)), link);
        Ok(())
    }

    /// What the programs know of the thread at a slot.
    pub fn thread(&self, slot: u32) -> Option<LoopThread> {
        self.threads.get(&slot, 0).ok()
    }

    pub fn slot_of(&self, tid: Tid) -> Option<u32> {
        self.taken.get(&tid).copied()
    }

    /// The state of a watched thread's clock.
    pub fn clock(&self, tid: Tid) -> Option<LoopClock> {
        self.clocks.get(self.slot_of(tid)?)
    }

    /// Whether a watched thread is still in this step.
    pub fn is_running(&self, tid: Tid, seq: u64) -> bool {
        self.clock(tid).is_some_and(|clock| clock.step_seq == seq && clock.in_tick())
    }

    /// What was captured of a watched thread when it last went to sleep in a step.
    pub fn last_capture(&self, tid: Tid) -> Option<Box<CaptureRecord>> {
        let CaptureBuffer { record, .. } = self.captures.get(&self.slot_of(tid)?, 0).ok()?;
        (record.header.tid == tid).then(|| Box::new(record))
    }

    /// Prints what the programs have logged since.
    pub fn flush_log(&mut self) {
        if let Some(log) = &mut self.log {
            log.flush();
        }
    }

    pub fn counts(&self) -> Counts {
        let total =
            |counter: Counter| self.counts.get(&(counter as u32), 0).map_or(0, |per_cpu| per_cpu.iter().sum::<u64>());
        Counts {
            lost: total(Counter::Lost),
            lost_stack_pages: total(Counter::LostStackPages),
            sent: total(Counter::Sent),
            requests_untracked: total(Counter::RequestsUntracked),
            requests_astray: total(Counter::RequestsAstray),
        }
    }

    /// What threads begin with that are watched from here on.
    pub fn set_pace(&mut self, pace: Pace) -> Result<()> {
        self.pace = pace;
        let mut new_thread = LoopThread::default();
        pace.fill_in(&mut new_thread);
        Array::<_, LoopThread>::try_from(self.bpf.map_mut("NEW_THREAD").context("the kernel object has no map")?)?
            .set(0, new_thread, 0)?;
        if self.cpu_clocks.tick_otherwise(pace.sampling_period_ns(Sampling::Watchful)) {
            self.sample_cpus()?;
        }
        Ok(())
    }

    /// CPU time of all programs while the kernel's statistics were on (see [`measure_run_time`]).
    pub fn run_time(&self) -> Duration {
        let infos = self.bpf.programs().filter_map(|(_, program)| Some((program, program.info().ok()?)));
        let with_trap = |(program, info): (&Program, ProgramInfo)| {
            let traps = if matches!(program, Program::UProbe(_)) { info.run_count() } else { 0 };
            info.run_time() + Duration::from_nanos(traps.saturating_mul(TRAP_NS))
        };
        infos.map(with_trap).chain(self.poll_figures().map(|(_, run_time, _)| run_time)).sum()
    }

    fn mark(&mut self, id: u32, watch: bool) -> Result<()> {
        let entry = self.ids.entry(id).or_default();
        *entry = if watch { *entry + 1 } else { entry.saturating_sub(1) };
        if *entry == 0 {
            self.ids.remove(&id);
        }
        let entry = id % self.watched.len();
        let is_of = |id: u32| id % self.watched.len() == entry;
        let slot = self.taken.iter().find(|(tid, _)| is_of(**tid)).map(|(_, slot)| *slot);
        let looked_up = self.ids.keys().any(|&id| is_of(id)).then_some(MARK_LOOK_UP);
        let mark = slot.map(slot_mark).or(looked_up).unwrap_or(0);
        Ok(self.watched.set(entry, mark, 0)?)
    }
}

fn attach_clock(program: &mut PerfEvent, scope: PerfEventScope, period_ns: u64) -> Result<PerfEventLinkId> {
    let clock = PerfEventConfig::Software(SoftwareEvent::CpuClock);
    program.attach(clock, scope, SamplePolicy::Period(period_ns), false).context("attach the sampling clock")
}

/// Where the rooms for deep stacks begin: behind those of the slots.
fn first_deep_stack(pace: Pace) -> u32 {
    MAX_THREADS * pace.stack_pages.max(1)
}

/// The verifier's log is a transcript of many lines, of which the last but its statistics says what was wrong.
fn explain(error: anyhow::Error) -> anyhow::Error {
    const STATISTICS: [&str; 3] = ["processed ", "stack depth ", "verification time "];
    let Some(ProgramError::LoadError { verifier_log, .. }) = error.chain().find_map(|cause| cause.downcast_ref())
    else {
        return error;
    };
    let log = verifier_log.to_string();
    let says_something = |line: &&str| !line.trim().is_empty() && !STATISTICS.iter().any(|word| line.starts_with(word));
    let reason = log.lines().rfind(says_something).unwrap_or("it does not say why");
    anyhow::anyhow!("{error}: the kernel's verifier refuses it: {reason}")
}

/// The one that takes the arguments as this kernel passes them.
fn switch_program(shape: SwitchShape) -> &'static str {
    match shape {
        SwitchShape::StateLast => "on_sched_switch",
        SwitchShape::StateSecond => "on_sched_switch_state_second",
        SwitchShape::StateInTask(_) => "on_sched_switch_state_in_task",
    }
}

fn step_program(which: StepProbe) -> &'static str {
    match which {
        StepProbe::ContextRun => "on_context_run",
        StepProbe::ContextEnter => "on_context_enter",
    }
}

fn take_map(bpf: &mut Ebpf, name: &str) -> Result<aya::maps::Map> {
    bpf.take_map(name).with_context(|| format!("the kernel object has no map {name}"))
}

fn program_mut<'a>(bpf: &'a mut Ebpf, name: &str) -> Result<&'a mut aya::programs::Program> {
    bpf.program_mut(name).with_context(|| format!("the kernel object has no program {name}"))
}

pub const TRACEFS: &str = "/sys/kernel/tracing";

/// Has the kernel measure the run time of BPF programs until the handle is dropped; each run costs a little more
/// meanwhile.
pub fn measure_run_time() -> Option<OwnedFd> {
    enable_stats(Stats::RunTime).ok()
}

/// Loads everything and lets go of it again. Returns the program that gave the kernel's verifier most to do, with how
/// many instructions that were: it gives up at a million.
pub fn try_load() -> Result<Option<(String, u32)>> {
    let short = ShortPace { floor_ns: u64::MAX, window_ns: u64::MAX, enough_ns: u64::MAX };
    let pace = Pace { threshold_ns: u64::MAX, capture_age_ns: u64::MAX, sample_every_ns: None, stack_pages: 1, short };
    // The programs of polls are loaded later and use the rings too.
    let (mut kernel, _rings) = Kernel::load(pace, Talk::Silent)?;
    kernel.load_polls().map_err(explain)?;
    let programs = kernel.bpf.programs();
    let verified = programs
        .filter_map(|(name, program)| Some((name.to_owned(), program.info().ok()?.verified_instruction_count()?)))
        .chain(kernel.poll_figures().map(|(name, _, instructions)| (name.to_owned(), instructions)));
    Ok(verified.max_by_key(|(_, instructions)| *instructions))
}

/// Sees to it that there is a tracefs that can be read, or says what to do.
fn tracefs() -> Result<()> {
    let events = Path::new(TRACEFS).join("events");
    let denied = |error: &io::Error| error.kind() == io::ErrorKind::PermissionDenied;
    match fs::read_dir(&events) {
        Ok(_) => return Ok(()),
        Err(error) if denied(&error) => bail!(
            "not permitted: without CAP_DAC_READ_SEARCH {TRACEFS} cannot be read; give it that, or mount tracefs with a \
             group of loopguard's: mount -o remount,gid=GROUP,mode=0750 {TRACEFS}"
        ),
        Err(_) => {}
    }
    private_tracefs().map_err(|error| {
        if denied(&error) {
            anyhow::anyhow!(
                "not permitted: without CAP_SYS_ADMIN tracefs cannot be mounted; mount it before, as root: \
                 mount -t tracefs nodev {TRACEFS}"
            )
        } else {
            anyhow::Error::from(error).context("tracepoints need tracefs at /sys/kernel/tracing")
        }
    })
}

/// Where tracefs is not mounted, mounts it in a mount namespace of our own: nothing is left behind.
fn private_tracefs() -> io::Result<()> {
    if Path::new(TRACEFS).join("events").exists() {
        return Ok(());
    }
    let check = |result: libc::c_int| if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
    let none = std::ptr::null();
    // SAFETY: a plain system call.
    check(unsafe { libc::unshare(libc::CLONE_NEWNS) })?;
    // What is mounted from here on must not spread to the namespace we came from. In a chroot `/` need not be a mount
    // point, but what holds the folder to mount on is one.
    let private = [c"/", c"/sys", c"/sys/kernel"].map(|point| {
        // SAFETY: constant strings, and null where the call takes nothing.
        check(unsafe { libc::mount(none, point.as_ptr(), none, libc::MS_REC | libc::MS_PRIVATE, none.cast()) })
    });
    if private.iter().all(Result::is_err) {
        return private.into_iter().next().unwrap_or(Ok(()));
    }
    let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    // SAFETY: constant strings.
    check(unsafe {
        libc::mount(c"loopguard".as_ptr(), c"/sys/kernel/tracing".as_ptr(), c"tracefs".as_ptr(), flags, none.cast())
    })?;
    fs::metadata(Path::new(TRACEFS).join("events")).map(drop)
}
