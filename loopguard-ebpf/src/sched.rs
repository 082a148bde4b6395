//! Scheduler switches of loop threads: where the time of a step goes, and what it waits for.

use aya_ebpf::{
    helpers::bpf_get_current_pid_tgid,
    helpers::generated::{bpf_get_current_task_btf, bpf_ktime_get_ns},
    macros::btf_tracepoint,
    programs::BtfTracePointContext,
};
use loopguard_common::{
    clock::SwitchOut,
    records::{
        CaptureCause, REGISTER_SP, RunQueueFields, SYSCALL_NONE, THREAD_PARKS, THREAD_PARKS_ON_FUTEX, THREAD_TOKIO,
    },
};

use crate::{
    capture::{self, InSyscall, current_syscall, pace},
    maps::{Watched, capture_buffer, watched},
    poll, send, stack, task,
};

/// Offset of `pid` in the kernel's `struct task_struct`, set at load from its BTF.
#[unsafe(no_mangle)]
static TASK_PID_OFFSET: u32 = 0;
/// Offset of the state in it, likewise; only used where `sched_switch` does not pass the state.
#[unsafe(no_mangle)]
static TASK_STATE_OFFSET: u32 = 0;
/// Offset of `tgid` in it.
#[unsafe(no_mangle)]
static TASK_TGID_OFFSET: u32 = 0;
/// How long a thread was kept from a CPU, set at load from the kernel's BTF.
#[unsafe(no_mangle)]
static RUN_QUEUE: RunQueueFields = RunQueueFields::NONE;
/// Number of the `futex` system call, set at load.
#[unsafe(no_mangle)]
static FUTEX_SYSCALL: i32 = 0;

/// include/linux/sched.h
const TASK_RUNNING: u32 = 0;

/// Whether this is `epoll_wait` or one of its variants (asm/unistd_64.h).
#[inline(always)]
fn is_epoll(syscall: i32) -> bool {
    syscall == 232 || syscall == 281 || syscall == 441
}

/// The field at `offset` of a struct of the kernel's.
///
/// # Safety
/// The verifier must know what `at` points to: a thread that a tracepoint passed, or what is reached from there. Then
/// it checks the offset, and a pointer that leads nowhere reads as 0.
#[inline(always)]
pub unsafe fn field_of<T: Copy>(at: *const u8, offset: &'static u32) -> T {
    // SAFETY: see above. Offsets are set before the program is loaded: they must be read, not taken for what stands here.
    unsafe { *at.add(core::ptr::read_volatile(offset) as usize).cast::<T>() }
}

#[inline(always)]
pub fn tid_of(task: *const u8) -> u32 {
    // SAFETY: `task` comes from a tracepoint.
    unsafe { field_of(task, &TASK_PID_OFFSET) }
}

#[inline(always)]
pub fn tgid_of(task: *const u8) -> u32 {
    // SAFETY: as above.
    unsafe { field_of(task, &TASK_TGID_OFFSET) }
}

#[inline(always)]
fn state_of(task: *const u8) -> u32 {
    // SAFETY: as above.
    unsafe { field_of(task, &TASK_STATE_OFFSET) }
}

/// `sched_switch(bool preempt, struct task_struct *prev, struct task_struct *next, unsigned int prev_state)`; the
/// current task is still `prev`, so its memory can be read. Which of the three forms a kernel has is in its BTF.
#[btf_tracepoint(function = "sched_switch")]
pub fn on_sched_switch(ctx: BtfTracePointContext) -> i32 {
    switched(ctx.arg::<*const u8>(2), || ctx.arg::<u64>(0) as u8 != 0 || ctx.arg::<u64>(3) as u32 == TASK_RUNNING)
}

/// The form of the first releases of Linux 5.18.
#[btf_tracepoint(function = "sched_switch")]
pub fn on_sched_switch_state_second(ctx: BtfTracePointContext) -> i32 {
    switched(ctx.arg::<*const u8>(3), || ctx.arg::<u64>(0) as u8 != 0 || ctx.arg::<u64>(1) as u32 == TASK_RUNNING)
}

/// The form before Linux 5.18: the state is still in the task, unless another processor wakes the task at this very
/// moment and has set it to "waking", which is not "running" either.
#[btf_tracepoint(function = "sched_switch")]
pub fn on_sched_switch_state_in_task(ctx: BtfTracePointContext) -> i32 {
    switched(ctx.arg::<*const u8>(2), || {
        ctx.arg::<u64>(0) as u8 != 0 || state_of(ctx.arg::<*const u8>(1)) == TASK_RUNNING
    })
}

#[inline(always)]
fn switched(next: *const u8, is_preempted: impl Fn() -> bool) -> i32 {
    if let Some(target) = watched(bpf_get_current_pid_tgid() as u32) {
        switched_out(target, is_preempted());
    }
    if let Some(target) = watched(tid_of(next)) {
        switched_in(target, next);
    }
    0
}

#[inline(always)]
fn knows_run_queue() -> bool {
    // SAFETY: set before the program is loaded, like the offsets.
    unsafe { core::ptr::read_volatile(&raw const RUN_QUEUE.run_delay) != 0 }
}

/// How long `task`, which is about to run, has been ready to run without a CPU in all its life, ns. On the way from one
/// CPU to another the kernel adds to the sum and queues it anew.
#[inline(always)]
fn run_delay_until_now(task: *const u8) -> u64 {
    // SAFETY: `task` comes from the tracepoint; the others are what the kernel's types say.
    unsafe {
        let before: u64 = field_of(task, &RUN_QUEUE.run_delay);
        let queued: u64 = field_of(task, &RUN_QUEUE.last_queued);
        if queued == 0 {
            return before;
        }
        let cfs_rq: *const u8 = field_of(task, &RUN_QUEUE.cfs_rq);
        let rq: *const u8 = field_of(cfs_rq, &RUN_QUEUE.rq);
        let clock: u64 = field_of(rq, &RUN_QUEUE.clock);
        // Two processors' clocks may differ by a little.
        before + clock.saturating_sub(queued)
    }
}

#[inline(always)]
fn switched_out(mut target: Watched, preempted: bool) {
    // SAFETY: a helper without conditions.
    let now = unsafe { bpf_ktime_get_ns() };
    if preempted {
        target.clock.seen_running(now);
        target.clock.switch_out(now, SwitchOut::Preempted);
        // Only a thread on the CPU is sampled: a step that is kept from it meets few samples. Healthy steps are over long
        // before they are this old.
        let pace = pace(target.thread, target.clock, now);
        if target.clock.in_tick() && now - target.clock.step_start_ns >= pace.age_ns / 8 {
            let in_none = InSyscall { number: SYSCALL_NONE, arg0: 0 };
            // Its stack too, without that counting: the wait that may follow has its own.
            leave_capture(&mut target, now, CaptureCause::Sample, &in_none, |_| true);
            target.clock.capture_pending = 1;
        }
        return;
    }
    let call = current_syscall();
    let polls = is_epoll(call.number) && task::polls_own(&target, call.arg0 as i32);
    if polls || is_parked(&target, call.number) {
        // The poll's tracepoint ended the tick already, unless it was passed over: the kernel skips a program when
        // another one, or a map operation of ours, is in the middle of its work on this processor.
        poll::last_step_ends(&mut target, now);
        target.clock.switch_out(now, SwitchOut::Polls);
        task::parks(&target);
        return;
    }
    target.clock.seen_running(now);
    let futex = call.number == futex_syscall();
    if futex
        && target.thread.flags & THREAD_PARKS_ON_FUTEX != 0
        && task::task_idles(target.slot, target.thread.tid, now) != 0
    {
        return;
    }
    let gil = futex && (target.thread.gil[0].contains(call.arg0) || target.thread.gil[1].contains(call.arg0));
    target.clock.switch_out(now, SwitchOut::Waits { syscall: call.number, arg0: call.arg0, gil });
    if knows_run_queue() {
        // SAFETY: the current thread exists.
        target.clock.waits_after(unsafe { field_of(bpf_get_current_task_btf().cast(), &RUN_QUEUE.run_delay) });
    }
    // In an old step the wait need not be long to be worth a capture.
    let is_stack_due = |target: &mut Watched| {
        target.clock.stack_due(now) || target.clock.capture_due(now, pace(target.thread, target.clock, now))
    };
    leave_capture(&mut target, now, CaptureCause::Wait, &call, is_stack_due);
    if futex {
        capture::capture_futex(target.slot, call.arg0, u32::from(gil));
    }
    target.clock.capture_pending = 1;
}

/// Captures where the thread leaves the CPU. Whether that is worth sending shows when it is back.
#[inline(always)]
fn leave_capture(
    target: &mut Watched,
    now: u64,
    cause: CaptureCause,
    call: &InSyscall,
    is_stack_due: impl Fn(&mut Watched) -> bool,
) {
    let Some(buffer) = capture_buffer(target.slot) else { return };
    buffer.record.cause = cause as u32;
    buffer.record.syscall = call.number;
    buffer.record.arg0 = call.arg0;
    capture::capture_take(target.slot, now);
    buffer.record.stack_pages = 0;
    if is_stack_due(target) {
        stack::stack_copy(target.slot, target.thread.tid, now, buffer.record.registers[REGISTER_SP]);
    }
}

/// `sched_waking(struct task_struct *p)`: the current thread wakes it.
#[btf_tracepoint(function = "sched_waking")]
pub fn on_sched_waking(ctx: BtfTracePointContext) -> i32 {
    let task = ctx.arg::<*const u8>(0);
    task::wakes(tid_of(task), tgid_of(task));
    0
}

/// `sched_wakeup_new(struct task_struct *p)`: the current thread has started it.
#[btf_tracepoint(function = "sched_wakeup_new")]
pub fn on_sched_wakeup_new(ctx: BtfTracePointContext) -> i32 {
    let task = ctx.arg::<*const u8>(0);
    task::wakes(tid_of(task), tgid_of(task));
    0
}

/// A worker without work, as far as its server's own probes tell. Those of tokio are known better.
#[inline(always)]
fn is_parked(target: &Watched, syscall: i32) -> bool {
    target.thread.flags & (THREAD_PARKS | THREAD_TOKIO) == THREAD_PARKS
        && syscall == futex_syscall()
        && target.clock.running.current() == 0
}

#[inline(always)]
pub fn futex_syscall() -> i32 {
    // SAFETY: set before the program is loaded: it must be read, not taken for what stands there.
    unsafe { core::ptr::read_volatile(&raw const FUTEX_SYSCALL) }
}

#[inline(always)]
fn switched_in(target: Watched, task: *const u8) {
    // SAFETY: a helper without conditions.
    let now = unsafe { bpf_ktime_get_ns() };
    if target.clock.unclear_sleep_ns(now).is_some() {
        task::task_goes_on(target.slot, target.thread.tid, now);
    }
    if target.clock.is_waiting() && knows_run_queue() {
        target.clock.woken_before(now, run_delay_until_now(task));
    }
    target.clock.switch_in(now);
    if target.clock.capture_pending == 0 {
        return;
    }
    target.clock.capture_pending = 0;
    if target.clock.capture_due(now, pace(target.thread, target.clock, now))
        && let Some(buffer) = capture_buffer(target.slot)
    {
        buffer.record.until_ns = now;
        buffer.record.off_cpu = target.clock.off_cpu();
        target.clock.last_capture_ns = now;
        stack::stack_send(target.slot);
        // What it waited for may be there to be read a moment longer.
        send::capture(&buffer.record, true);
    }
}
