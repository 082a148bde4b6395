//! Scheduler switches of loop threads: where the time of a step goes, and what it waits for.

use aya_ebpf::{
    helpers::generated::bpf_ktime_get_ns,
    helpers::{bpf_get_current_pid_tgid, bpf_probe_read_kernel},
    macros::btf_tracepoint,
    programs::BtfTracePointContext,
};
use loopguard_common::{
    clock::SwitchOut,
    records::{CaptureCause, SYSCALL_NONE, Settings},
};

use crate::{
    capture::{self, pace, user_registers},
    maps::{Watched, capture_buffer, maybe_watched, settings, watched},
    send,
};

#[inline(always)]
fn tid_of(task: *const u8, settings: &Settings) -> u32 {
    // SAFETY: `task` comes from the tracepoint, the offset from the kernel's own BTF; the read is checked.
    unsafe { bpf_probe_read_kernel(task.add(settings.task_pid_offset as usize).cast::<u32>()) }.unwrap_or(0)
}

/// `sched_switch(bool preempt, struct task_struct *prev, struct task_struct *next, unsigned int prev_state)`; the
/// current task is still `prev`, so its memory can be read.
#[btf_tracepoint(function = "sched_switch")]
pub fn on_sched_switch(ctx: BtfTracePointContext) -> i32 {
    let prev = bpf_get_current_pid_tgid() as u32;
    let Some(settings) = settings() else { return 0 };
    if maybe_watched(prev)
        && let Some(target) = watched(prev)
    {
        let preempted = ctx.arg::<u64>(0) as u8 != 0 || ctx.arg::<u64>(3) as u32 == 0;
        switched_out(target, preempted, settings);
    }
    let next = tid_of(ctx.arg::<*const u8>(2), settings);
    if maybe_watched(next)
        && let Some(target) = watched(next)
    {
        switched_in(target, settings);
    }
    0
}

#[inline(always)]
fn switched_out(target: Watched, preempted: bool, settings: &Settings) {
    // SAFETY: a helper without conditions.
    let now = unsafe { bpf_ktime_get_ns() };
    if !target.clock.in_tick() {
        // What an idle thread waits for is its own poll.
        target.clock.switch_out(now, SwitchOut::Preempted);
        return;
    }
    let registers = user_registers();
    let Some(buffer) = capture_buffer(target.thread.slot) else { return };
    // Into memory at once, for a value in a register the verifier would go through the walk once for each.
    buffer.record.arg0 = registers.arg0;
    buffer.record.user_ip = registers.ip;
    buffer.record.user_sp = registers.sp;
    if preempted {
        buffer.record.cause = CaptureCause::Preempted as u32;
        buffer.record.syscall = SYSCALL_NONE;
        target.clock.switch_out(now, SwitchOut::Preempted);
    } else {
        buffer.record.cause = CaptureCause::Wait as u32;
        buffer.record.syscall = registers.syscall;
        let gil = registers.syscall == settings.futex_syscall
            && (target.thread.gil[0].contains(registers.arg0) || target.thread.gil[1].contains(registers.arg0));
        target.clock.switch_out(now, SwitchOut::Waits { syscall: registers.syscall, arg0: registers.arg0, gil });
    }
    capture::take(&target, now, buffer);
    target.clock.capture_pending = 1;
}

#[inline(always)]
fn switched_in(target: Watched, settings: &Settings) {
    // SAFETY: a helper without conditions.
    let now = unsafe { bpf_ktime_get_ns() };
    target.clock.switch_in(now);
    if target.clock.capture_pending == 0 {
        return;
    }
    target.clock.capture_pending = 0;
    if target.clock.capture_due(now, pace(settings, target.thread))
        && let Some(buffer) = capture_buffer(target.thread.slot)
    {
        buffer.record.until_ns = now;
        buffer.record.off_cpu = target.clock.off_cpu();
        target.clock.last_capture_ns = now;
        send::capture(&buffer.record);
    }
}

/// `sched_wakeup(struct task_struct *p)`: runnable from here on.
#[btf_tracepoint(function = "sched_wakeup")]
pub fn on_sched_wakeup(ctx: BtfTracePointContext) -> i32 {
    let Some(settings) = settings() else { return 0 };
    let tid = tid_of(ctx.arg::<*const u8>(0), settings);
    if maybe_watched(tid)
        && let Some(target) = watched(tid)
    {
        // SAFETY: a helper without conditions.
        target.clock.wakeup(unsafe { bpf_ktime_get_ns() });
    }
    0
}
