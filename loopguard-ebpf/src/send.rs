//! Puts records into the ring buffer and counts those that did not fit.

use aya_ebpf::helpers::generated::bpf_ringbuf_output;
use loopguard_common::{
    clock::{EndedStep, LoopClock},
    records::{
        CAPTURE_BASE, CaptureRecord, Counter, LoopThread, MAX_FRAMES, PollRecord, ProcessRecord, RawFrame,
        RecordHeader, RecordKind, STEP_ADDS_UP, StepRecord, THREAD_TELLS_SHORT,
    },
};

use crate::maps::{RECORDS, count};

/// `BPF_RB_NO_WAKEUP` (linux/bpf.h): user space finds it when it next looks, soon enough. A wake-up costs both sides
/// more than the record.
pub const NO_WAKEUP: u64 = 1;
/// `BPF_RB_FORCE_WAKEUP`: what must be followed up at once. Without it a record wakes nobody that lies behind another
/// one.
pub const WAKE_UP: u64 = 2;

#[inline(always)]
pub fn step_if_long(thread: &LoopThread, clock: &mut LoopClock, ended: EndedStep, request: u64) {
    let duration = ended.duration_ns();
    if duration >= thread.threshold_ns {
        step(thread, clock, ended, request);
    } else if duration >= thread.short.floor_ns {
        step_if_it_adds_up(thread, clock, ended, request);
    }
}

/// Time without a CPU is not the loop's doing.
#[inline(never)]
fn step_if_it_adds_up(thread: &LoopThread, clock: &mut LoopClock, ended: EndedStep, request: u64) {
    let own_ns = ended.duration_ns().saturating_sub(clock.off_cpu().run_queue_ns);
    if own_ns < thread.short.floor_ns {
        return;
    }
    let adds_up = clock.short.add(ended.end_ns, own_ns, &thread.short);
    if adds_up {
        clock.step_flags |= STEP_ADDS_UP;
    }
    if adds_up || thread.flags & THREAD_TELLS_SHORT != 0 {
        step(thread, clock, ended, request);
    }
}

/// Out of line: nearly every edge ends a short step, and what it does not run should not be in its way.
#[inline(never)]
fn step(thread: &LoopThread, clock: &LoopClock, ended: EndedStep, request: u64) {
    let Some(mut entry) = RECORDS.reserve::<StepRecord>(0) else {
        count(Counter::Lost);
        return;
    };
    // SAFETY: room for a record, of which every field is written.
    fill_step(unsafe { &mut *entry.as_mut_ptr() }, thread, clock, (ended, request));
    entry.submit(NO_WAKEUP);
    count(Counter::Sent);
}

/// Field by field: a record is half of what fits on the stack.
#[inline(always)]
pub fn fill_step(record: &mut StepRecord, thread: &LoopThread, clock: &LoopClock, (ended, request): (EndedStep, u64)) {
    record.header = RecordHeader { kind: RecordKind::Step as u32, tgid: thread.tgid, tid: thread.tid, _pad: 0 };
    record.seq = clock.step_seq;
    record.request = request;
    record.tick_start_ns = clock.tick_start_ns;
    record.start_ns = ended.start_ns;
    record.end_ns = ended.end_ns;
    record.off_cpu = clock.off_cpu();
    record.waits = clock.waits;
    record.flags = clock.step_flags;
    record.wait_count = clock.wait_count;
}

/// A step that had to wait for what followed.
#[inline(never)]
pub fn held_step(record: &StepRecord) {
    let sent = RECORDS.output::<StepRecord>(record, NO_WAKEUP);
    count(if sent.is_ok() { Counter::Sent } else { Counter::Lost });
}

/// Sends a capture without the frames it does not have. What is not in it must be read while the step still runs;
/// `is_first`: nothing is known of the step yet.
#[inline(always)]
pub fn capture(record: &CaptureRecord, is_first: bool) {
    let frames = record.frame_count as usize;
    if frames > MAX_FRAMES {
        return;
    }
    let length = CAPTURE_BASE + frames * size_of::<RawFrame>();
    // SAFETY: `length` bytes of the record, at most all of it.
    let sent = unsafe {
        bpf_ringbuf_output(
            (&raw const RECORDS).cast_mut().cast(),
            (&raw const *record).cast_mut().cast(),
            length as u64,
            if is_first || record.request.scope == 0 { WAKE_UP } else { NO_WAKEUP },
        )
    };
    count(if sent == 0 { Counter::Sent } else { Counter::Lost });
}

#[inline(always)]
pub fn poll(record: &PollRecord) {
    let sent = RECORDS.output::<PollRecord>(record, WAKE_UP);
    count(if sent.is_ok() { Counter::Sent } else { Counter::Lost });
}

#[inline(always)]
pub fn process(record: &ProcessRecord) {
    let sent = RECORDS.output::<ProcessRecord>(record, WAKE_UP);
    count(if sent.is_ok() { Counter::Sent } else { Counter::Lost });
}
