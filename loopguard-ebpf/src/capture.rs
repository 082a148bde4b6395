//! Captures what a loop thread is doing: registers, interpreter frames and the request in them.

use core::mem::MaybeUninit;

use aya_ebpf::{
    bindings::pt_regs,
    helpers::bpf_get_current_pid_tgid,
    helpers::generated::{
        bpf_get_current_task_btf, bpf_ktime_get_ns, bpf_probe_read_kernel, bpf_probe_read_user, bpf_task_pt_regs,
    },
    macros::perf_event,
    programs::PerfEventContext,
};
use loopguard_common::{
    clock::{BACKOFF_STEP, BACKOFF_TICK, CapturePace, LoopClock},
    records::{
        CaptureCause, Counter, FUTEX_WORDS, LoopThread, REGISTER_SP, REGISTERS, RecordHeader, RecordKind, SYSCALL_NONE,
        THREAD_STEPS_CONTEXT_ENTER, THREAD_STEPS_CONTEXT_RUN, THREAD_TELLS_SHORT, WalkStatus,
    },
    walk::{Memory, PyThread, snapshot_request, walk_frames, walk_holder},
};

use crate::{
    maps::{LAYOUTS, Watched, at_slot, capture_buffer, count, watched},
    send, stack,
};

/// The memory of the current task. Pages that are not resident read as absent.
pub struct OwnMemory;

impl Memory for OwnMemory {
    #[inline(always)]
    unsafe fn read_raw(&self, address: u64, to: *mut u8, length: usize) -> bool {
        // SAFETY: the caller's promise about `to`; any user address may be asked for.
        unsafe { bpf_probe_read_user(to.cast(), length as u32, address as *const _) == 0 }
    }
}

/// The system call a thread is in.
#[derive(Clone, Copy)]
pub struct InSyscall {
    /// [`SYSCALL_NONE`]: in none.
    pub number: i32,
    pub arg0: u64,
}

/// The system call that the current task is in.
#[inline(always)]
pub fn current_syscall() -> InSyscall {
    // SAFETY: the verifier knows the saved registers of the current task for what they are: they are read in place.
    let (number, arg0) = unsafe {
        let saved = bpf_task_pt_regs(bpf_get_current_task_btf()) as *const pt_regs;
        ((*saved).orig_rax as i64, (*saved).rdi)
    };
    // x86: `orig_ax` is the number of the system call, or negative for an exception or interrupt.
    if number < 0 {
        return InSyscall { number: SYSCALL_NONE, arg0: 0 };
    }
    InSyscall { number: number as i32, arg0 }
}

/// The registers with which the current task entered the kernel, by DWARF number; all zero when they cannot be read.
#[inline(always)]
fn write_registers(to: &mut [u64; REGISTERS]) {
    let mut saved = MaybeUninit::<pt_regs>::uninit();
    // SAFETY: as above. The helper fills all of it, with zeroes when it cannot read: a value that is there on one way
    // only would not do, since verifiers before Linux 6.3 refuse programs that carry it along.
    let saved = unsafe {
        let from = bpf_task_pt_regs(bpf_get_current_task_btf()) as *const _;
        bpf_probe_read_kernel(saved.as_mut_ptr().cast(), size_of::<pt_regs>() as u32, from);
        saved.assume_init()
    };
    *to = [
        saved.rax, saved.rdx, saved.rcx, saved.rbx, saved.rsi, saved.rdi, saved.rbp, saved.rsp, saved.r8, saved.r9,
        saved.r10, saved.r11, saved.r12, saved.r13, saved.r14, saved.r15, saved.rip,
    ];
}

#[inline(always)]
pub fn pace(thread: &LoopThread, clock: &LoopClock, now: u64) -> CapturePace {
    let probed = thread.flags & (THREAD_STEPS_CONTEXT_RUN | THREAD_STEPS_CONTEXT_ENTER) != 0;
    CapturePace {
        age_ns: if thread.flags & THREAD_TELLS_SHORT != 0 || clock.short.is_enough(now, &thread.short) {
            thread.capture_age_ns.min(thread.short.floor_ns / 2)
        } else {
            thread.capture_age_ns
        },
        gap_ns: thread.capture_gap_ns,
        backoff_shift: if probed { BACKOFF_STEP } else { BACKOFF_TICK },
    }
}

/// Captures the current thread, whose slot this is, into its buffer. The cause is there already.
///
/// A global function: the verifier looks at it by itself, once, and not again for every way that leads to it. What it
/// has to look at is a sum then, where it would be a product; it gives up at a million instructions.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn capture_take(slot: u32, now: u64) -> u32 {
    let Some(target) = at_slot(slot, bpf_get_current_pid_tgid() as u32) else { return 0 };
    let Some(buffer) = capture_buffer(slot) else { return 0 };
    let (record, scratch) = (&mut buffer.record, &mut buffer.scratch);
    let id = bpf_get_current_pid_tgid();
    // The same scope in the same step is the same request: what was copied of it still holds.
    // Kept in memory: a value in a register would make the verifier go through the walk once for each.
    scratch.known_scope = record.request.scope;
    if record.header.tid != id as u32 {
        scratch.change_process();
    } else if record.step_seq != target.clock.step_seq {
        scratch.known_scope = 0;
    }
    record.header = RecordHeader { kind: RecordKind::Capture as u32, tgid: (id >> 32) as u32, tid: id as u32, _pad: 0 };
    write_registers(&mut record.registers);
    record.at_ns = now;
    record.until_ns = now;
    record.step_seq = target.clock.step_seq;
    record.step_start_ns = target.clock.step_start_ns;
    record.tick_start_ns = target.clock.tick_start_ns;
    record.frame_count = 0;
    record.walk = WalkStatus::None as u32;
    record.task = 0;
    record.running = target.clock.running.current();
    // SAFETY: written before the thread is watched, then only replaced whole.
    if let Some(layout) = unsafe { LAYOUTS.get(target.thread.tgid) }
        && target.thread.thread_state != 0
    {
        let thread = PyThread { state: target.thread.thread_state, native_thread_id: target.thread.native_thread_id };
        walk_frames(&OwnMemory, layout, thread, scratch, record);
        snapshot_request(&OwnMemory, layout, scratch, &record.frames, &mut record.request);
    } else {
        record.request.scope = 0;
    }
    0
}

/// Copies what says whom a futex is waited for: the GIL's holder (`is_gil` not 0), or the owner of a mutex. A global
/// function too.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn capture_futex(slot: u32, address: u64, is_gil: u32) -> u32 {
    let Some(target) = at_slot(slot, bpf_get_current_pid_tgid() as u32) else { return 0 };
    let Some(buffer) = capture_buffer(slot) else { return 0 };
    buffer.record.holder.native_thread_id = 0;
    if is_gil == 0 {
        if !OwnMemory.read(address, &mut buffer.record.futex) {
            buffer.record.futex = [0; FUTEX_WORDS];
        }
        return 0;
    }
    // SAFETY: written before the thread is watched, then only replaced whole.
    if let Some(layout) = unsafe { LAYOUTS.get(target.thread.tgid) } {
        let gil = target.thread.gil[0].start;
        walk_holder(&OwnMemory, layout, gil, &mut buffer.scratch, &mut buffer.record.holder);
    }
    0
}

/// A sampling clock ticked: that of this CPU, or a loop thread's own.
#[perf_event]
pub fn on_sample(_ctx: PerfEventContext) -> u32 {
    count(Counter::Samples);
    if let Some(mut target) = watched(bpf_get_current_pid_tgid() as u32) {
        // SAFETY: a helper without conditions.
        sample(&mut target, unsafe { bpf_ktime_get_ns() });
    }
    0
}

#[inline(always)]
fn sample(target: &mut Watched, now: u64) {
    // A timer's interrupt: it can't come between the program at a switch and the switch.
    target.clock.seen_running(now);
    if !target.clock.capture_due(now, pace(target.thread, target.clock, now)) {
        return;
    }
    let Some(buffer) = capture_buffer(target.slot) else { return };
    buffer.record.cause = CaptureCause::Sample as u32;
    buffer.record.syscall = SYSCALL_NONE;
    buffer.record.arg0 = 0;
    capture_take(target.slot, now);
    buffer.record.off_cpu = target.clock.off_cpu();
    let is_first = target.clock.last_capture_ns < target.clock.step_start_ns;
    target.clock.last_capture_ns = now;
    stack::stack_copy(target.slot, target.thread.tid, now, buffer.record.registers[REGISTER_SP]);
    stack::stack_send(target.slot);
    send::capture(&buffer.record, is_first);
}
