//! Steps: one task's code between two awaits, marked by probes on the interpreter's way into a task's context.

use aya_ebpf::{
    EbpfContext as _,
    bindings::pt_regs,
    helpers::bpf_get_current_pid_tgid,
    helpers::generated::{bpf_get_attach_cookie, bpf_ktime_get_ns},
    macros::uprobe,
    programs::ProbeContext,
};
use loopguard_common::records::{STEP_PROBED, THREAD_STEPS_CONTEXT_ENTER, THREAD_STEPS_CONTEXT_RUN, THREAD_STEPS_NEST};

use crate::{
    maps::{at_slot, watched},
    send,
};

/// asyncio's own loop enters `Context.run` for each callback and task step.
#[uprobe]
pub fn on_context_run(ctx: ProbeContext) -> u32 {
    step_edge(&ctx, THREAD_STEPS_CONTEXT_RUN);
    0
}

/// uvloop calls `PyContext_Enter` for the same.
#[uprobe]
pub fn on_context_enter(ctx: ProbeContext) -> u32 {
    step_edge(&ctx, THREAD_STEPS_CONTEXT_ENTER);
    0
}

#[inline(always)]
fn step_edge(ctx: &ProbeContext, marks: u32) {
    let tid = bpf_get_current_pid_tgid() as u32;
    // The probe knows the slot of the loop it was placed for; another loop of the same process is looked up.
    // SAFETY: a helper that reads what the probe was attached with.
    let slot = unsafe { bpf_get_attach_cookie(ctx.as_ptr()) } as u32;
    let Some(target) = at_slot(slot, tid).or_else(|| watched(tid)) else { return };
    if target.thread.flags & marks == 0 {
        return;
    }
    // SAFETY: a uprobe's context is the thread's registers.
    let sp = unsafe { (*ctx.as_ptr().cast::<pt_regs>()).rsp };
    // SAFETY: a helper without conditions.
    let now = unsafe { bpf_ktime_get_ns() };
    target.clock.seen_running(now);
    if !target.clock.is_step_edge(sp, target.thread.flags & THREAD_STEPS_NEST != 0) {
        return;
    }
    let ended = target.clock.end_step(now);
    send::step_if_long(target.thread, target.clock, ended, 0);
    target.clock.begin_step(now, STEP_PROBED);
}
