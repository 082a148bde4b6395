//! Turns a loop thread's poll edges, step probes and scheduler switches into steps whose time adds up.
//!
//! One [`LoopClock`] per loop thread lives in a BPF map; the kernel programs hand it timestamps, tests hand it
//! timelines. At any moment the thread is on the CPU, waiting or runnable, and every edge charges the time since the
//! last one to that state: the parts sum to the whole by construction.

use crate::records::{MAX_WAITS, OffCpu, SYSCALL_OTHER, Wait};

/// Buckets of the tick histogram: bucket `n` counts ticks of `2^(n-1)..2^n` microseconds.
pub const TICK_BUCKETS: usize = 24;

/// What the thread is doing, as far as the scheduler is concerned: an index of [`LoopClock::spent_ns`].
const ON_CPU: u32 = 0;
const WAITING: u32 = 1;
const WAITING_GIL: u32 = 2;
const RUNNABLE: u32 = 3;

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoopClock {
    /// Start of the current tick; 0 while the thread polls, or before its first poll was seen.
    pub tick_start_ns: u64,
    /// Start of the current step.
    pub step_start_ns: u64,
    /// Counts step and tick edges: as long as it stays the same, the same step is running.
    pub step_seq: u64,
    /// Up to when the time is accounted for.
    pub mark_ns: u64,
    /// Time of the current step by state.
    spent_ns: [u64; 4],
    /// When a capture of this step was last sent; 0: none yet.
    pub last_capture_ns: u64,
    /// Stack pointer at the tick's first step probe, to tell a nested `Context.run`.
    pub step_sp: u64,
    pub wait_start_ns: u64,
    pub wait_arg0: u64,
    pub wait_syscall: i32,
    state: u32,
    /// `STEP_*` flags of the current step.
    pub step_flags: u32,
    /// The thread is inside its own poll call.
    pub polling: u32,
    /// The capture buffer holds what was taken at the last switch-out.
    pub capture_pending: u32,
    pub _pad: u32,
    /// Waits of the current step.
    pub waits: [Wait; MAX_WAITS],
    /// Finished ticks, and their total time.
    pub ticks: u64,
    pub busy_ns: u64,
    pub tick_histogram: [u32; TICK_BUCKETS],
}

const _: () = assert!(size_of::<LoopClock>() == 8 * 8 + 32 + 24 + MAX_WAITS * 24 + 16 + TICK_BUCKETS * 4);

/// A step that just ended: the rest is still in the clock until [`LoopClock::begin_step`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndedStep {
    pub start_ns: u64,
    pub end_ns: u64,
}

impl EndedStep {
    #[inline(always)]
    pub fn duration_ns(&self) -> u64 {
        self.end_ns.saturating_sub(self.start_ns)
    }
}

/// Why and on what a thread gives up the CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SwitchOut {
    Preempted,
    Waits { syscall: i32, arg0: u64, gil: bool },
}

/// How often captures of one step are worth sending.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CapturePace {
    /// None in a step younger than this.
    pub age_ns: u64,
    /// At least this far apart,
    pub gap_ns: u64,
    /// and at least this power of two of the step's age.
    pub backoff_shift: u32,
}

/// A step has one owner: a few dozen captures tell its lines, however long it is.
pub const BACKOFF_STEP: u32 = 5;
/// A tick has to be cut where its owner changes: that is as exact as the captures are close.
pub const BACKOFF_TICK: u32 = 9;

impl LoopClock {
    #[inline(always)]
    pub fn in_tick(&self) -> bool {
        self.tick_start_ns != 0
    }

    /// Off the CPU because it waits, not because it has none.
    pub fn is_waiting(&self) -> bool {
        self.state == WAITING || self.state == WAITING_GIL
    }

    /// Off-CPU time of the current step, up to its last edge.
    #[inline(always)]
    pub fn off_cpu(&self) -> OffCpu {
        OffCpu {
            waiting_ns: self.spent_ns[WAITING as usize],
            gil_ns: self.spent_ns[WAITING_GIL as usize],
            run_queue_ns: self.spent_ns[RUNNABLE as usize],
        }
    }

    /// Charges the time since the last edge to the current state.
    #[inline(always)]
    fn account(&mut self, now: u64) {
        // A program that was itself switched out in between comes with an old `now`.
        if now > self.mark_ns {
            self.spent_ns[(self.state & 3) as usize] += now - self.mark_ns;
            self.mark_ns = now;
        }
    }

    /// The thread's own poll returned: a tick begins. `flags` are those of its first step.
    #[inline(always)]
    pub fn begin_tick(&mut self, now: u64) {
        self.polling = 0;
        self.mark_ns = now;
        self.state = ON_CPU;
        self.step_sp = 0;
        self.begin_step(now, 0);
        self.tick_start_ns = now;
    }

    /// Ends the current step; its waits and split stay readable until the next edge.
    #[inline(always)]
    pub fn end_step(&mut self, now: u64) -> EndedStep {
        self.account(now);
        EndedStep { start_ns: self.step_start_ns, end_ns: self.mark_ns }
    }

    #[inline(always)]
    pub fn begin_step(&mut self, now: u64, flags: u32) {
        self.step_seq += 1;
        self.step_start_ns = if now > self.mark_ns { now } else { self.mark_ns };
        self.step_flags = flags;
        self.spent_ns = [0; 4];
        self.last_capture_ns = 0;
        // The first free slot ends the list.
        self.waits[0].count = 0;
    }

    /// The thread polls: the tick is over. Call [`end_step`](Self::end_step) first.
    #[inline(always)]
    pub fn end_tick(&mut self) {
        if self.tick_start_ns != 0 {
            let length = self.mark_ns.saturating_sub(self.tick_start_ns);
            self.ticks += 1;
            self.busy_ns += length;
            self.tick_histogram[bucket(length)] += 1;
        }
        self.step_seq += 1;
        self.tick_start_ns = 0;
        self.polling = 1;
    }

    /// A step probe was hit: does it begin a new step? `sp` is the stack pointer there; where probes `nest`, a deeper
    /// one than the tick's first belongs to the step that is running.
    #[inline(always)]
    pub fn is_step_edge(&mut self, sp: u64, nest: bool) -> bool {
        if self.tick_start_ns == 0 {
            return false;
        }
        if nest && self.step_sp != 0 && sp < self.step_sp {
            return false;
        }
        self.step_sp = sp;
        true
    }

    #[inline(always)]
    pub fn switch_out(&mut self, now: u64, why: SwitchOut) {
        self.account(now);
        match why {
            SwitchOut::Preempted => self.state = RUNNABLE,
            SwitchOut::Waits { syscall, arg0, gil } => {
                self.state = if gil { WAITING_GIL } else { WAITING };
                self.wait_start_ns = now;
                self.wait_syscall = syscall;
                self.wait_arg0 = arg0;
            }
        }
    }

    /// Whether the thread was made runnable after a wait that now ended.
    #[inline(always)]
    pub fn wakeup(&mut self, now: u64) {
        if self.state != WAITING && self.state != WAITING_GIL {
            return;
        }
        self.account(now);
        self.state = RUNNABLE;
        if self.tick_start_ns != 0 {
            let (syscall, arg0) = (self.wait_syscall, self.wait_arg0);
            let waited = now.saturating_sub(self.wait_start_ns);
            self.add_wait(syscall, arg0, waited);
        }
    }

    #[inline(always)]
    pub fn switch_in(&mut self, now: u64) {
        // A wake-up that no tracepoint showed: the wait ended at the latest now.
        self.wakeup(now);
        self.account(now);
        self.state = ON_CPU;
    }

    /// Whether a capture taken until `now` is worth sending: the step is old, and the last one is a while ago.
    #[inline(always)]
    pub fn capture_due(&self, now: u64, pace: CapturePace) -> bool {
        let age = now.saturating_sub(self.step_start_ns);
        let since_last = now.saturating_sub(self.last_capture_ns);
        self.tick_start_ns != 0
            && age >= pace.age_ns
            && since_last >= pace.gap_ns
            && since_last >= age >> (pace.backoff_shift & 63)
    }

    #[inline(always)]
    fn add_wait(&mut self, syscall: i32, arg0: u64, ns: u64) {
        let mut i = 0;
        while i < MAX_WAITS {
            let wait = &mut self.waits[i];
            if wait.count == 0 {
                *wait = Wait { arg0, ns, syscall, count: 1 };
                if i + 1 < MAX_WAITS {
                    self.waits[i + 1].count = 0;
                }
                return;
            }
            if wait.syscall == syscall && wait.arg0 == arg0 {
                wait.ns += ns;
                wait.count += 1;
                return;
            }
            i += 1;
        }
        let last = &mut self.waits[MAX_WAITS - 1];
        *last = Wait { arg0: 0, ns: last.ns + ns, syscall: SYSCALL_OTHER, count: last.count + 1 };
    }
}

/// Bucket of the tick histogram for a tick of this length.
#[inline(always)]
fn bucket(length_ns: u64) -> usize {
    let mut microseconds = length_ns / 1000;
    let mut n = 0;
    while n < TICK_BUCKETS - 1 && microseconds > 0 {
        microseconds >>= 1;
        n += 1;
    }
    n
}

#[cfg(feature = "user")]
// SAFETY: plain integers without padding bytes.
unsafe impl aya::Pod for LoopClock {}
