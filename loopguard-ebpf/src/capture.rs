//! Captures what a loop thread is doing: registers, interpreter frames and the request in them.

use aya_ebpf::{
    bindings::pt_regs,
    helpers::generated::{bpf_get_current_task_btf, bpf_ktime_get_ns, bpf_probe_read_user, bpf_task_pt_regs},
    helpers::{bpf_get_current_pid_tgid, bpf_probe_read_kernel},
    macros::perf_event,
    programs::PerfEventContext,
};
use loopguard_common::{
    clock::{BACKOFF_STEP, BACKOFF_TICK, CapturePace, LoopClock},
    records::{
        CaptureCause, FUTEX_WORDS, LoopThread, REGISTER_SP, REGISTERS, RecordHeader, RecordKind, SYSCALL_NONE,
        THREAD_STEPS_CONTEXT_ENTER, THREAD_STEPS_CONTEXT_RUN, THREAD_TELLS_SHORT, WalkStatus,
    },
    walk::{Memory, PyThread, snapshot_request, walk_frames, walk_holder},
};

use crate::{
    maps::{CaptureBuffer, LAYOUTS, Watched, capture_buffer, watched},
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

/// Where a thread left user space.
#[derive(Clone, Copy)]
pub struct UserRegisters {
    saved: Option<pt_regs>,
    /// The system call it is in, else [`SYSCALL_NONE`].
    pub syscall: i32,
    pub arg0: u64,
}

/// The registers with which the current task entered the kernel.
#[inline(always)]
pub fn user_registers() -> UserRegisters {
    // SAFETY: the current task exists; its saved registers are read through a helper that checks.
    let saved = unsafe { bpf_probe_read_kernel(bpf_task_pt_regs(bpf_get_current_task_btf()) as *const pt_regs) };
    match saved {
        // x86: `orig_ax` is the number of the system call, or negative for an exception or interrupt.
        Ok(saved) => UserRegisters {
            saved: Some(saved),
            syscall: if (saved.orig_rax as i64) < 0 { SYSCALL_NONE } else { saved.orig_rax as i32 },
            arg0: saved.rdi,
        },
        Err(_) => UserRegisters { saved: None, syscall: SYSCALL_NONE, arg0: 0 },
    }
}

impl UserRegisters {
    /// By DWARF number; all zero when they could not be read.
    #[inline(always)]
    pub fn write(&self, to: &mut [u64; REGISTERS]) {
        match &self.saved {
            Some(saved) => {
                *to = [
                    saved.rax, saved.rdx, saved.rcx, saved.rbx, saved.rsi, saved.rdi, saved.rbp, saved.rsp, saved.r8,
                    saved.r9, saved.r10, saved.r11, saved.r12, saved.r13, saved.r14, saved.r15, saved.rip,
                ];
            }
            None => *to = [0; REGISTERS],
        }
    }
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

/// Captures the current thread, which is `target`, into its buffer. The cause and the registers are there already.
#[inline(always)]
pub fn take(target: &Watched, now: u64, buffer: &mut CaptureBuffer) {
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
        snapshot_request(&OwnMemory, layout, scratch, &mut record.request);
    } else {
        record.request.scope = 0;
    }
}

/// Copies what says whom a futex is waited for: the GIL's holder, or the owner of a mutex.
#[inline(always)]
pub fn take_futex(target: &Watched, address: u64, is_gil: bool, buffer: &mut CaptureBuffer) {
    buffer.record.holder.native_thread_id = 0;
    if !is_gil {
        if !OwnMemory.read(address, &mut buffer.record.futex) {
            buffer.record.futex = [0; FUTEX_WORDS];
        }
        return;
    }
    // SAFETY: written before the thread is watched, then only replaced whole.
    if let Some(layout) = unsafe { LAYOUTS.get(target.thread.tgid) } {
        let gil = target.thread.gil[0].start;
        walk_holder(&OwnMemory, layout, gil, &mut buffer.scratch, &mut buffer.record.holder);
    }
}

/// The sampling clock of one loop thread ticked while the thread was on the CPU.
#[perf_event]
pub fn on_sample(_ctx: PerfEventContext) -> u32 {
    let tid = bpf_get_current_pid_tgid() as u32;
    if let Some(target) = watched(tid) {
        // SAFETY: a helper without conditions.
        let now = unsafe { bpf_ktime_get_ns() };
        if target.clock.capture_due(now, pace(target.thread, target.clock, now)) {
            let registers = user_registers();
            if let Some(buffer) = capture_buffer(target.slot) {
                buffer.record.cause = CaptureCause::Sample as u32;
                buffer.record.syscall = SYSCALL_NONE;
                buffer.record.arg0 = 0;
                registers.write(&mut buffer.record.registers);
                take(&target, now, buffer);
                buffer.record.off_cpu = target.clock.off_cpu();
                target.clock.last_capture_ns = now;
                buffer.record.stack_pages = stack::copy(target.slot, tid, now, buffer.record.registers[REGISTER_SP]);
                stack::send(target.slot, buffer.record.stack_pages);
                send::capture(&buffer.record);
            }
        }
    }
    0
}
