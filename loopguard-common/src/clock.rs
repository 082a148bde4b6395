//! Turns a loop thread's poll edges, step probes and scheduler switches into steps whose time adds up.
//!
//! One [`LoopClock`] per loop thread lives in a BPF map; the kernel programs hand it timestamps, tests hand it
//! timelines. At any moment the thread is on the CPU, waiting or runnable, and every edge charges the time since the
//! last one to that state: the parts sum to the whole by construction.

use crate::records::{MAX_WAITS, OffCpu, SYSCALL_OTHER, Wait};
use crate::request::RunningRequests;
use crate::short::ShortSum;

/// Buckets of the tick histogram: bucket `n` counts ticks of `2^(n-1)..2^n` microseconds.
pub const TICK_BUCKETS: usize = 24;

/// What the thread is doing, as far as the scheduler is concerned: an index of [`LoopClock::spent_ns`].
const ON_CPU: u32 = 0;
const WAITING: u32 = 1;
const WAITING_GIL: u32 = 2;
const RUNNABLE: u32 = 3;

/// A value of [`LoopClock::polling`].
const POLLS: u32 = 1;
/// The same: it may as well be blocked, and nobody can tell.
const MAY_POLL: u32 = 2;

/// The fields that every edge touches come first, in two cache lines, and then what the end of a short tick does: cold
/// lines are what an edge costs.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoopClock {
    /// Start of the current tick; 0 while the thread sleeps in its poll, or before its first poll was seen.
    pub tick_start_ns: u64,
    /// Start of the current step.
    pub step_start_ns: u64,
    /// Counts step and tick edges: as long as it stays the same, the same step is running.
    pub step_seq: u64,
    /// Up to when the time is accounted for.
    pub mark_ns: u64,
    /// Stack pointer at the tick's first step probe, to tell a nested `Context.run`.
    pub step_sp: u64,
    state: u32,
    /// Whether the thread sleeps in its own poll call: 0, [`POLLS`] or [`MAY_POLL`].
    polling: u32,
    /// `STEP_*` flags of the current step.
    pub step_flags: u32,
    /// Entries of `waits` in use.
    pub wait_count: u32,
    /// The capture buffer holds what was taken at the last switch-out.
    pub capture_pending: u32,
    /// A tokio worker has parked, and nothing was told of it since: to park again changes nothing.
    pub parked: u32,
    /// Time of the current step by state.
    spent_ns: [u64; 4],
    /// When a capture of this step was last sent; 0: none yet.
    pub last_capture_ns: u64,
    /// The requests whose code the thread is in, as the server's own probes tell.
    pub running: RunningRequests,
    /// Finished ticks, and their total time.
    pub ticks: u64,
    pub busy_ns: u64,
    pub tick_histogram: [u32; TICK_BUCKETS],
    pub wait_arg0: u64,
    pub wait_start_ns: u64,
    /// When the stack was last copied at a switch.
    pub last_stack_ns: u64,
    /// Steps below the threshold that count.
    pub short: ShortSum,
    /// Waits of the current step.
    pub waits: [Wait; MAX_WAITS],
    /// How long it had been kept from a CPU in all when it last began to wait, as the kernel counts.
    run_delay_ns: u64,
    pub wait_syscall: i32,
    pub _pad: u32,
}

// What the scheduler tells of a healthy loop needs the first line, and the split at the start of the second.
const _: () = assert!(size_of::<LoopClock>() == 512 && core::mem::offset_of!(LoopClock, spent_ns) == 64);
const _: () =
    assert!(size_of::<LoopClock>() == 13 * 8 + 6 * 4 + 40 + 3 * 8 + TICK_BUCKETS * 4 + 24 + MAX_WAITS * 24 + 8);

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
    /// It sleeps in its own poll: it is idle.
    Polls,
    /// It sleeps there or waits for something, and nobody can tell: it is taken for idle.
    MayPoll,
    Waits {
        syscall: i32,
        arg0: u64,
        gil: bool,
    },
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

/// A copy costs some three microseconds: so no thread spends more than about three percent on copies for nothing.
const STACK_GAP_NS: u64 = 100_000;

/// A step has one owner: a few dozen captures tell its lines, however long it is.
pub const BACKOFF_STEP: u32 = 5;
/// A tick has to be cut where its owner changes: that is as exact as the captures are close.
pub const BACKOFF_TICK: u32 = 9;

impl LoopClock {
    #[inline(always)]
    pub fn in_tick(&self) -> bool {
        self.tick_start_ns != 0
    }

    /// Of a thread that sleeps in its own poll: when it runs again, a tick begins.
    pub fn idle() -> Self {
        Self { polling: POLLS, ..Self::default() }
    }

    /// Off the CPU because it began to wait, not because it has none. That the wait is over shows when it runs again.
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

    /// A tick begins: the thread ran again after it slept in its own poll, or it polled and did not have to sleep.
    #[inline(always)]
    pub fn begin_tick(&mut self, now: u64) {
        self.polling = 0;
        self.mark_ns = now;
        self.state = ON_CPU;
        self.step_sp = 0;
        self.begin_step(now, 0);
        self.tick_start_ns = now;
    }

    /// The thread is seen to run. If it was last seen off the CPU, its way back was passed over (another tracer coming
    /// or going at that moment can do that): its wait ended, or its tick began, now at the latest.
    #[inline(always)]
    pub fn seen_running(&mut self, now: u64) {
        if self.polling != 0 || self.state != ON_CPU {
            self.switch_in(now);
        }
    }

    /// How long a thread has slept until `now` that was taken for idle without anybody knowing.
    #[inline(always)]
    pub fn unclear_sleep_ns(&self, now: u64) -> Option<u64> {
        (self.polling == MAY_POLL).then(|| now.saturating_sub(self.mark_ns))
    }

    /// Ends the current step; its waits and split stay readable until the next edge. Only the thread itself does that:
    /// so it runs.
    #[inline(always)]
    pub fn end_step(&mut self, now: u64) -> EndedStep {
        self.goes_on(now);
        EndedStep { start_ns: self.step_start_ns, end_ns: self.mark_ns }
    }

    #[inline(always)]
    pub fn begin_step(&mut self, now: u64, flags: u32) {
        self.step_seq += 1;
        self.step_start_ns = if now > self.mark_ns { now } else { self.mark_ns };
        self.step_flags = flags;
        self.spent_ns = [0; 4];
        self.last_capture_ns = 0;
        self.wait_count = 0;
    }

    /// The thread enters its own poll: the tick is over. Until it sleeps there the next one has begun. Call
    /// [`end_step`](Self::end_step) first.
    #[inline(always)]
    pub fn end_tick(&mut self, now: u64) {
        if self.tick_start_ns != 0 {
            let length = self.mark_ns.saturating_sub(self.tick_start_ns);
            self.ticks += 1;
            self.busy_ns += length;
            self.tick_histogram[bucket(length)] += 1;
        }
        self.begin_tick(now);
    }

    /// The thread is no loop thread for now: it is in no tick until [`begin_tick`](Self::begin_tick).
    #[inline(always)]
    pub fn leave(&mut self) {
        self.step_seq += 1;
        self.tick_start_ns = 0;
        self.step_flags = 0;
        self.polling = 0;
    }

    /// A step probe was hit: does it begin a new step? `sp` is the stack pointer there; where probes `nest`, a deeper
    /// one than the tick's first belongs to the step that is running.
    #[inline(always)]
    pub fn is_step_edge(&mut self, sp: u64, nest: bool) -> bool {
        // A request's own probes are closer to the truth than the contexts its code enters.
        if self.tick_start_ns == 0 || self.running.current() != 0 {
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
            SwitchOut::Polls | SwitchOut::MayPoll => {
                self.state = RUNNABLE;
                self.step_seq += 1;
                self.tick_start_ns = 0;
                self.polling = if matches!(why, SwitchOut::Polls) { POLLS } else { MAY_POLL };
            }
            SwitchOut::Waits { syscall, arg0, gil } => {
                self.state = if gil { WAITING_GIL } else { WAITING };
                self.wait_start_ns = now;
                self.wait_syscall = syscall;
                self.wait_arg0 = arg0;
            }
        }
    }

    /// The kernel's sum of the time for which the thread, which begins to wait, has been ready to run without a CPU.
    #[inline(always)]
    pub fn waits_after(&mut self, run_delay_ns: u64) {
        self.run_delay_ns = run_delay_ns;
    }

    /// The thread is about to run: by the same sum, when its wait ended.
    #[inline(always)]
    pub fn woken_before(&mut self, now: u64, run_delay_ns: u64) {
        self.wakeup(now.saturating_sub(run_delay_ns.saturating_sub(self.run_delay_ns)).max(self.mark_ns));
    }

    /// The thread was made runnable: its wait, if it was in one, has ended.
    #[inline(always)]
    fn wakeup(&mut self, now: u64) {
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
        if self.polling != 0 {
            self.begin_tick(now);
            return;
        }
        self.goes_on(now);
    }

    /// It is on the CPU. A wait of which nothing else told the end has ended by now.
    #[inline(always)]
    fn goes_on(&mut self, now: u64) {
        if self.state != ON_CPU {
            self.wakeup(now);
        }
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

    /// Whether to copy the stack at a switch: nobody knows yet how long the wait will be, so a thread that waits often
    /// and briefly must not pay for it each time. Remembers that it was copied.
    #[inline(always)]
    pub fn stack_due(&mut self, now: u64) -> bool {
        let due = now.saturating_sub(self.last_stack_ns) >= STACK_GAP_NS;
        if due {
            self.last_stack_ns = now;
        }
        due
    }

    /// Out of line: no edge of a healthy tick needs it.
    #[inline(never)]
    fn add_wait(&mut self, syscall: i32, arg0: u64, ns: u64) {
        let mut i = 0;
        while i < MAX_WAITS {
            let wait = &mut self.waits[i];
            if i as u32 >= self.wait_count {
                *wait = Wait { arg0, ns, syscall, count: 1 };
                self.wait_count = i as u32 + 1;
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
///
/// By halves, and without a division: a loop is what short ticks would pay for.
#[inline(always)]
fn bucket(length_ns: u64) -> usize {
    let (mut rest, mut n) = (length_ns, 0);
    for step in [16, 8, 4, 2, 1] {
        if rest >= 1000 << (step - 1) {
            rest >>= step;
            n += step;
        }
    }
    n.min(TICK_BUCKETS - 1)
}

#[cfg(feature = "user")]
// SAFETY: plain integers without padding bytes.
unsafe impl aya::Pod for LoopClock {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::STEP_PROBED;

    const MS: u64 = 1_000_000;
    /// The clock never shows 0, which stands for "not in a tick".
    const START: u64 = 1000 * MS;

    /// A thread's story, one edge a line: `time_ms what`; one that runs may have been ready to for some milliseconds.
    /// What comes out: one line for each ended step, with its start..end and its time off the CPU, and its waits.
    fn check(story: &str, expected: &[&str]) {
        let mut clock = LoopClock::idle();
        let mut told = Vec::new();
        let mut in_queues = 0;
        for line in story.lines().map(str::trim).filter(|line| !line.is_empty()) {
            let mut words = line.split_whitespace();
            let now = START + words.next().unwrap().parse::<u64>().unwrap() * MS;
            let ended = match words.next().unwrap() {
                "poll-returns" => {
                    clock.switch_in(now);
                    None
                }
                verb @ ("polls" | "polls-briefly") => {
                    let ended = clock.in_tick().then(|| clock.end_step(now));
                    let told = ended.map(|ended| tell(&clock, ended));
                    clock.end_tick(now);
                    if verb == "polls" {
                        clock.switch_out(now, SwitchOut::Polls);
                    }
                    told
                }
                "step" => {
                    let sp = words.next().map_or(1000, |sp| sp.parse().unwrap());
                    clock.is_step_edge(sp, true).then(|| {
                        let ended = clock.end_step(now);
                        let told = tell(&clock, ended);
                        clock.begin_step(now, STEP_PROBED);
                        told
                    })
                }
                "sleeps" => {
                    let (syscall, gil) = match words.next().unwrap() {
                        "gil" => (202, true),
                        number => (number.parse().unwrap(), false),
                    };
                    clock.switch_out(now, SwitchOut::Waits { syscall, arg0: 7, gil });
                    clock.waits_after(in_queues);
                    None
                }
                "sampled" => {
                    clock.seen_running(now);
                    None
                }
                "preempted" => {
                    clock.seen_running(now);
                    clock.switch_out(now, SwitchOut::Preempted);
                    None
                }
                "runs" => {
                    if let Some(queued) = words.next() {
                        in_queues += queued.parse::<u64>().unwrap() * MS;
                        clock.woken_before(now, in_queues);
                    }
                    clock.switch_in(now);
                    None
                }
                other => panic!("{other}"),
            };
            told.extend(ended);
        }
        assert_eq!(told, expected);
    }

    fn tell(clock: &LoopClock, ended: EndedStep) -> String {
        let OffCpu { waiting_ns, gil_ns, run_queue_ns } = clock.off_cpu();
        let on_cpu = ended.duration_ns() - waiting_ns - gil_ns - run_queue_ns;
        let mut told = format!("{}..{}", (ended.start_ns - START) / MS, (ended.end_ns - START) / MS);
        for (name, ns) in [("cpu", on_cpu), ("wait", waiting_ns), ("gil", gil_ns), ("queue", run_queue_ns)] {
            if ns > 0 {
                told += &format!(" {name} {}", ns / MS);
            }
        }
        for wait in &clock.waits[..clock.wait_count as usize] {
            told += &format!(" [{}x{} {}]", wait.syscall, wait.count, wait.ns / MS);
        }
        told
    }

    #[test]
    fn a_tick_without_probes_is_one_step() {
        check("10 poll-returns\n 40 polls", &["10..40 cpu 30"]);
    }

    #[test]
    fn probes_cut_a_tick_into_steps() {
        check("10 poll-returns\n 11 step\n 31 step\n 40 polls", &["10..11 cpu 1", "11..31 cpu 20", "31..40 cpu 9"]);
    }

    #[test]
    fn a_return_from_the_poll_that_nobody_saw_does_not_hide_the_tick() {
        let mut clock = LoopClock::idle();
        clock.seen_running(START + 5 * MS);
        assert!(clock.in_tick() && clock.is_step_edge(1000, true));
        clock.switch_out(START + 6 * MS, SwitchOut::Waits { syscall: 230, arg0: 1, gil: false });
        clock.switch_in(START + 36 * MS);
        let ended = clock.end_step(START + 37 * MS);
        assert_eq!(tell(&clock, ended), "5..37 cpu 2 wait 30 [230x1 30]");
    }

    #[test]
    fn a_nested_context_run_is_the_same_step() {
        check("10 poll-returns\n 11 step 1000\n 20 step 900\n 40 polls", &["10..11 cpu 1", "11..40 cpu 29"]);
        // The next tick may begin deeper: nothing of the last one counts.
        check(
            "1 poll-returns\n 1 step 900\n 2 polls\n 3 poll-returns\n 4 step 800\n 9 polls",
            &["1..1", "1..2 cpu 1", "3..4 cpu 1", "4..9 cpu 5"],
        );
    }

    #[test]
    fn probes_outside_a_tick_are_nobodys() {
        check("1 step\n 2 poll-returns\n 3 polls\n 4 step", &["2..3 cpu 1"]);
    }

    #[test]
    fn time_off_the_cpu_is_split_and_adds_up() {
        check(
            "0 poll-returns\n 5 sleeps 45\n 27 runs 2\n 30 preempted\n 34 runs\n 35 sleeps gil\n 43 runs 1\n 50 polls",
            &["0..50 cpu 16 wait 20 gil 7 queue 7 [45x1 20] [202x1 7]"],
        );
    }

    #[test]
    fn a_thread_was_not_ready_to_run_before_it_began_to_wait() {
        check("0 poll-returns\n 5 sleeps 230\n 9 runs 6\n 10 polls", &["0..10 cpu 6 queue 4 [230x1 0]"]);
    }

    #[test]
    fn a_wait_across_an_unseen_wakeup_ends_when_the_thread_runs() {
        check("0 poll-returns\n 5 sleeps 230\n 9 runs\n 10 polls", &["0..10 cpu 6 wait 4 [230x1 4]"]);
    }

    #[test]
    fn a_wait_whose_end_nobody_saw_ends_with_its_step() {
        check(
            "0 poll-returns\n 5 sleeps 230\n 9 step\n 12 step\n 20 polls",
            &["0..9 cpu 5 wait 4 [230x1 4]", "9..12 cpu 3", "12..20 cpu 8"],
        );
        check("0 poll-returns\n 5 sleeps 230\n 9 sampled\n 12 polls", &["0..12 cpu 8 wait 4 [230x1 4]"]);
        check("0 poll-returns\n 5 preempted\n 9 polls-briefly\n 12 polls", &["0..9 cpu 5 queue 4", "9..12 cpu 3"]);
        check(
            "0 poll-returns\n 5 sleeps 230\n 9 preempted\n 12 runs\n 13 polls",
            &["0..13 cpu 6 wait 4 queue 3 [230x1 4]"],
        );
    }

    #[test]
    fn waits_of_one_kind_are_one_and_the_rest_is_other() {
        let mut story = "0 poll-returns\n".to_owned();
        for i in 0..12 {
            story += &format!("{} sleeps {i}\n {} runs\n", 1 + i * 2, 2 + i * 2);
        }
        check(
            &(story + "30 polls"),
            &["0..30 cpu 18 wait 12 [0x1 1] [1x1 1] [2x1 1] [3x1 1] [4x1 1] [5x1 1] [6x1 1] [-2x5 5]"],
        );
        check("0 poll-returns\n 1 sleeps 1\n 2 runs\n 3 sleeps 1\n 5 runs\n 6 polls", &["0..6 cpu 3 wait 3 [1x2 3]"]);
    }

    #[test]
    fn idling_is_nobodys_time() {
        check("0 poll-returns\n 1 polls\n 61 poll-returns\n 63 polls", &["0..1 cpu 1", "61..63 cpu 2"]);
    }

    #[test]
    fn a_poll_that_need_not_sleep_only_cuts() {
        check(
            "0 poll-returns\n 10 polls-briefly\n 15 step\n 30 polls",
            &["0..10 cpu 10", "10..15 cpu 5", "15..30 cpu 15"],
        );
    }

    #[test]
    fn captures_keep_their_distance() {
        let pace = CapturePace { age_ns: 5 * MS, gap_ns: MS, backoff_shift: 5 };
        let mut clock = LoopClock::default();
        clock.begin_tick(100 * MS);
        assert!(!clock.capture_due(104 * MS, pace), "young");
        assert!(clock.capture_due(105 * MS, pace));
        clock.last_capture_ns = 105 * MS;
        assert!(!clock.capture_due(105 * MS + MS / 2, pace), "just captured");
        assert!(clock.capture_due(106 * MS, pace));
        clock.last_capture_ns = 420 * MS;
        assert!(!clock.capture_due(425 * MS, pace), "the older the step, the further apart");
        assert!(clock.capture_due(432 * MS, pace));
    }

    #[test]
    fn a_thread_that_waits_often_pays_for_few_stacks() {
        let mut clock = LoopClock::default();
        let copied = (1..=1000).filter(|i| clock.stack_due(START + i * 10_000)).count();
        assert_eq!(copied, 100);
    }

    #[test]
    fn ticks_are_counted_by_length() {
        let mut clock = LoopClock::default();
        for (start, end) in [(0, 0), (10, 11), (20, 120)] {
            clock.begin_tick(1 + start * MS);
            clock.end_step(1 + end * MS);
            clock.end_tick(1 + end * MS);
        }
        assert_eq!((clock.ticks, clock.busy_ns), (3, 101 * MS));
        assert_eq!((clock.tick_histogram[0], clock.tick_histogram[10], clock.tick_histogram[17]), (1, 1, 1));
    }

    #[test]
    fn a_bucket_ends_where_the_next_begins() {
        assert_eq!((bucket(0), bucket(999)), (0, 0));
        for n in 1..TICK_BUCKETS {
            assert_eq!(bucket(1000 << (n - 1)), n);
            assert_eq!(bucket((1000 << (n - 1)) - 1), n - 1);
        }
        assert_eq!(bucket(u64::MAX), TICK_BUCKETS - 1);
    }
}
