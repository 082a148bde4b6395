//! Processes: a watched one's children are watched from their first instant, and what ends is let go of at once.

use aya_ebpf::{
    helpers::bpf_get_current_pid_tgid, helpers::generated::bpf_ktime_get_ns, macros::btf_tracepoint,
    programs::BtfTracePointContext,
};
use loopguard_common::records::{PROCESS_BEFORE_POLLS, ProcessChange, ProcessRecord, RecordHeader, RecordKind};

use crate::{
    maps::{PROCESSES, REPORTED_POLLS, mark_watched, maybe_watched, unwatch, watched},
    poll,
    sched::{field_of, tgid_of, tid_of},
    send,
};

/// Offset in the kernel's `struct task_struct`, set at load from its BTF.
#[unsafe(no_mangle)]
static TASK_START_BOOTTIME_OFFSET: u32 = 0;

/// `sched_process_fork(struct task_struct *parent, struct task_struct *child)`; the current task is the parent.
#[btf_tracepoint(function = "sched_process_fork")]
pub fn on_fork(ctx: BtfTracePointContext) -> i32 {
    let parent = (bpf_get_current_pid_tgid() >> 32) as u32;
    // SAFETY: only whether the entry exists matters.
    if !maybe_watched(parent) || unsafe { PROCESSES.get(parent) }.is_none() {
        return 0;
    }
    let child = ctx.arg::<*const u8>(1);
    let tgid = tgid_of(child);
    if tgid == parent {
        // Only a thread.
        return 0;
    }
    // SAFETY: `child` comes from the tracepoint.
    let start_boottime_ns = unsafe { field_of(child, &TASK_START_BOOTTIME_OFFSET) };
    let _ = PROCESSES.insert(tgid, PROCESS_BEFORE_POLLS, 0);
    mark_watched(tgid);
    tell(ProcessChange::Forked, (tgid, tid_of(child)), Origin { parent, start_boottime_ns });
    0
}

/// `sched_process_exec(struct task_struct *p, pid_t old_pid, struct linux_binprm *bprm)`: the other threads are gone,
/// and this one has the process's id.
#[btf_tracepoint(function = "sched_process_exec")]
pub fn on_exec(_ctx: BtfTracePointContext) -> i32 {
    let id = bpf_get_current_pid_tgid();
    let (tgid, tid) = ((id >> 32) as u32, id as u32);
    // SAFETY: only whether the entry exists matters.
    if maybe_watched(tgid) && unsafe { PROCESSES.get(tgid) }.is_some() {
        finish(tid);
        let _ = REPORTED_POLLS.remove(tid);
        let _ = PROCESSES.insert(tgid, PROCESS_BEFORE_POLLS, 0);
        tell(ProcessChange::Exec, (tgid, tid), Origin::default());
    }
    0
}

/// `sched_process_exit(struct task_struct *p, ...)`, for every thread.
#[btf_tracepoint(function = "sched_process_exit")]
pub fn on_exit(_ctx: BtfTracePointContext) -> i32 {
    let id = bpf_get_current_pid_tgid();
    let (tgid, tid) = ((id >> 32) as u32, id as u32);
    if !maybe_watched(tgid) && !maybe_watched(tid) {
        return 0;
    }
    let _ = REPORTED_POLLS.remove(tid);
    let was_loop = finish(tid);
    // SAFETY: only whether the entry exists matters.
    if was_loop || (tid == tgid && unsafe { PROCESSES.get(tgid) }.is_some()) {
        tell(ProcessChange::Ended, (tgid, tid), Origin::default());
    }
    0
}

/// A loop thread that ends in the middle of a step ends the step: what blocks for so long that somebody kills it must
/// not be lost. Whether it was a loop thread.
#[inline(always)]
fn finish(tid: u32) -> bool {
    let Some(mut target) = watched(tid) else { return false };
    poll::loop_ends(&mut target);
    unwatch(target.slot);
    true
}

#[derive(Default)]
struct Origin {
    parent: u32,
    start_boottime_ns: u64,
}

#[inline(always)]
fn tell(change: ProcessChange, (tgid, tid): (u32, u32), origin: Origin) {
    send::process(&ProcessRecord {
        header: RecordHeader { kind: RecordKind::Process as u32, tgid, tid, _pad: 0 },
        // SAFETY: a helper without conditions.
        at_ns: unsafe { bpf_ktime_get_ns() },
        start_boottime_ns: origin.start_boottime_ns,
        change: change as u32,
        parent: origin.parent,
    });
}
