//! The end of a tick: a loop thread's calls of `epoll_wait` and its variants on its own epoll descriptor, and of
//! `close`.
//!
//! The next tick begins with the call itself, unless the thread goes to sleep in it: then when it runs again, which the
//! scheduler tells. So the return from the call needs no program.

use aya_ebpf::{
    EbpfContext as _, helpers::bpf_get_current_pid_tgid, helpers::generated::bpf_ktime_get_ns, macros::tracepoint,
    programs::TracePointContext,
};
use aya_log_ebpf::debug;
use loopguard_common::records::{NO_SLOT, PROCESS_BEFORE_POLLS, PollRecord, RecordHeader, RecordKind};

use crate::{
    maps::{PROCESSES, REPORTED_POLLS, Watched, maybe_watched, watch_from_poll, watched},
    request, send, task,
};

/// `struct syscall_trace_enter`: the common header, the number, then the arguments as words (kernel/trace/trace.h).
const SYSCALL_NUMBER: usize = 8;
const FIRST_ARGUMENT: usize = 16;
const FOURTH_ARGUMENT: usize = 40;
/// Takes its timeout as a `struct timespec` (asm/unistd_64.h, and the same everywhere else).
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
    let epoll_fd = descriptor(&ctx);
    // SAFETY: a helper without conditions.
    let now = unsafe { bpf_ktime_get_ns() };
    let is_unwatched = target.is_none();
    if let Some(mut target) = target
        && task::polls_own(&target, epoll_fd)
    {
        let is_known = target.thread.epoll_fd >= 0;
        last_step_ends(&mut target, now);
        target.clock.end_tick(now);
        task::parks(&target);
        if is_known {
            return 0;
        }
    }
    report_unknown(&ctx, Unknown { tgid, tid, now, epoll_fd, is_unwatched });
    0
}

/// Enters `close`. Without the epoll descriptor of its loop a thread runs no loop: what it does until it polls again
/// (the interpreter's end, a script between two loops) blocks nobody.
#[tracepoint]
pub fn on_close_enter(ctx: TracePointContext) -> u32 {
    let Some(mut target) = watched(bpf_get_current_pid_tgid() as u32) else { return 0 };
    let fd = descriptor(&ctx);
    if fd >= 0 && target.thread.epoll_fd == fd {
        loop_ends(&mut target);
    }
    0
}

/// The descriptor that a system call is about: its first argument.
#[inline(always)]
fn descriptor(ctx: &TracePointContext) -> i32 {
    // SAFETY: an argument word of a system call's tracepoint, inside what the verifier knows of it.
    unsafe { *ctx.as_ptr().cast::<u8>().add(FIRST_ARGUMENT).cast::<u64>() as i32 }
}

/// The thread runs no loop from here on: its tick ends with its last step, and none begins.
#[inline(always)]
pub fn loop_ends(target: &mut Watched) {
    // SAFETY: a helper without conditions.
    let now = unsafe { bpf_ktime_get_ns() };
    last_step_ends(target, now);
    target.clock.end_tick(now);
    target.clock.leave();
}

/// The tick's last step ends, if there is a tick; the tick itself goes on until it is told otherwise.
#[inline(always)]
pub fn last_step_ends(target: &mut Watched, now: u64) {
    if target.clock.in_tick() {
        let ended = target.clock.end_step(now);
        let request = target.clock.running.current();
        send::step_if_long(target.thread, target.clock, ended, request);
        request::tick_ended(target, ended);
    }
}

/// A thread that is not watched, or a descriptor that is not its loop's: user space decides what it is. In a process
/// that was watched since before it polled, a thread is watched from its first poll on until that is decided, so that
/// nothing is missed meanwhile.
#[inline(always)]
fn report_unknown(ctx: &TracePointContext, unknown: Unknown) {
    let Unknown { tgid, tid, now, epoll_fd, is_unwatched } = unknown;
    // SAFETY: a word that is replaced whole.
    let Some(process) = (unsafe { PROCESSES.get(tgid) }) else { return };
    let mut slot = None;
    if let Some(reported_ns) = REPORTED_POLLS.get_ptr_mut(tid) {
        // SAFETY: an entry that only its own thread writes.
        let reported_ns = unsafe { &mut *reported_ns };
        if now - *reported_ns < REPORT_AGAIN_NS {
            return;
        }
        *reported_ns = now;
    } else {
        let _ = REPORTED_POLLS.insert(tid, now, 0);
        if is_unwatched && *process == PROCESS_BEFORE_POLLS {
            slot = watch_from_poll((tgid, tid), epoll_fd, 0, now);
        }
    }
    // SAFETY: the number word and an argument of a system call's tracepoint, likewise.
    let (syscall, timeout) = unsafe {
        let words = ctx.as_ptr().cast::<u8>();
        (*words.add(SYSCALL_NUMBER).cast::<u64>() as i32, *words.add(FOURTH_ARGUMENT).cast::<u64>() as i32)
    };
    debug!(ctx, "thread {} of process {} polls epoll descriptor {}", tid, tgid, epoll_fd);
    send::poll(&PollRecord {
        header: RecordHeader { kind: RecordKind::Poll as u32, tgid, tid, _pad: 0 },
        at_ns: now,
        epoll_fd,
        syscall,
        timeout_ms: if syscall == EPOLL_PWAIT2 { -1 } else { timeout },
        slot: slot.unwrap_or(NO_SLOT),
    });
}

/// A poll of nobody known.
struct Unknown {
    tgid: u32,
    tid: u32,
    now: u64,
    epoll_fd: i32,
    /// The thread is not watched; else only the descriptor is new.
    is_unwatched: bool,
}
