//! The end of a tick: a loop thread's calls of `epoll_wait` and its variants on its own epoll descriptor.
//!
//! The next tick begins with the call itself, unless the thread goes to sleep in it: then when it runs again, which the
//! scheduler tells. So the return from the call needs no program.

use aya_ebpf::{
    EbpfContext as _, helpers::bpf_get_current_pid_tgid, helpers::generated::bpf_ktime_get_ns, macros::tracepoint,
    programs::TracePointContext,
};
use aya_log_ebpf::debug;
use loopguard_common::records::{PollRecord, RecordHeader, RecordKind};

use crate::{
    maps::{PROCESSES, REPORTED_POLLS, maybe_watched, watched},
    request, send, task,
};

/// `struct syscall_trace_enter`: the common header, the number, then the arguments as words (kernel/trace/trace.h).
const SYSCALL_NUMBER: usize = 8;
const FIRST_ARGUMENT: usize = 16;
/// Number of `epoll_pwait2` (asm/unistd_64.h).
const EPOLL_PWAIT2: i32 = 441;
/// An unknown poll is reported again after this long, should the report have been lost.
pub const REPORT_AGAIN_NS: u64 = 1_000_000_000;

/// Enters `epoll_wait`, `epoll_pwait` or `epoll_pwait2`.
#[tracepoint]
pub fn on_poll_enter(ctx: TracePointContext) -> u32 {
    let id = bpf_get_current_pid_tgid();
    let (tgid, tid) = ((id >> 32) as u32, id as u32);
    let target = watched(tid);
    if target.is_none() && !maybe_watched(tgid) {
        return 0;
    }
    // SAFETY: the argument words of a system call's tracepoint, inside what the verifier knows of it.
    let epoll_fd = unsafe { *ctx.as_ptr().cast::<u8>().add(FIRST_ARGUMENT).cast::<u64>() } as i32;
    // SAFETY: a helper without conditions.
    let now = unsafe { bpf_ktime_get_ns() };
    if let Some(mut target) = target
        && task::polls_own(&target, epoll_fd)
    {
        let is_known = target.thread.epoll_fd >= 0;
        if target.clock.in_tick() {
            let ended = target.clock.end_step(now);
            let request = target.clock.running.current();
            send::step_if_long(target.thread, target.clock, ended, request);
            request::tick_ended(&mut target, ended);
        }
        target.clock.end_tick(now);
        task::parks(&target);
        if is_known {
            return 0;
        }
    }
    report_unknown(&ctx, RecordHeader { kind: RecordKind::Poll as u32, tgid, tid, _pad: 0 }, now, epoll_fd);
    0
}

/// A thread that is not watched, or a descriptor that is not its loop's: user space decides what it is.
#[inline(always)]
fn report_unknown(ctx: &TracePointContext, header: RecordHeader, now: u64, epoll_fd: i32) {
    // SAFETY: only whether the entry exists matters, or a word that is replaced whole.
    let (process, reported) = unsafe { (PROCESSES.get(header.tgid), REPORTED_POLLS.get(header.tid)) };
    if process.is_none() || reported.is_some_and(|at| now - *at < REPORT_AGAIN_NS) {
        return;
    }
    let _ = REPORTED_POLLS.insert(header.tid, now, 0);
    // SAFETY: the number word of a system call's tracepoint, likewise.
    let syscall = unsafe { *ctx.as_ptr().cast::<u8>().add(SYSCALL_NUMBER).cast::<u64>() } as i32;
    debug!(ctx, "thread {} of process {} polls epoll descriptor {}", header.tid, header.tgid, epoll_fd);
    // SAFETY: another argument word, likewise. That of `epoll_pwait2` is an address.
    let timeout = unsafe { *ctx.as_ptr().cast::<u8>().add(FIRST_ARGUMENT + 3 * 8).cast::<u64>() } as i32;
    let timeout_ms = if syscall == EPOLL_PWAIT2 { -1 } else { timeout };
    send::poll(&PollRecord { header, at_ns: now, epoll_fd, syscall, timeout_ms, _pad: 0 });
}
