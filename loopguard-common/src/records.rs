//! The wire structs: what user space tells the kernel programs, and one struct per record they send back.
//!
//! All times are `CLOCK_MONOTONIC` nanoseconds (`bpf_ktime_get_ns`). Thread and process ids are those of the
//! initial pid namespace. Every struct is `repr(C)` with explicit padding, so that bytes mean the same on both sides.

use crate::short::ShortPace;
use crate::trail::Trail;

/// Interpreter frames one capture can hold; a minimal FastAPI request is 40 to 55 deep.
pub const MAX_FRAMES: usize = 128;
/// Different waits one step keeps apart; the last slot collects the rest as [`SYSCALL_OTHER`].
pub const MAX_WAITS: usize = 8;
/// Not inside a system call when it was switched out (a page fault).
pub const SYSCALL_NONE: i32 = -1;
/// The waits that no longer fitted, taken together.
pub const SYSCALL_OTHER: i32 = -2;

/// First word of every record: which struct follows.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordKind {
    Step = 1,
    Capture = 2,
    Poll = 3,
    StackPage = 4,
    /// Those of [`request`](crate::request).
    RequestStart = 16,
    RequestRoute = 17,
    RequestEnd = 18,
    Task = 8,
    TaskReturn = 9,
    Process = 10,
    UnclearWait = 11,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordHeader {
    /// A [`RecordKind`].
    pub kind: u32,
    pub tgid: u32,
    pub tid: u32,
    pub _pad: u32,
}

/// Where the off-CPU part of a span of time went; what is left of the span was spent on the CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OffCpu {
    /// Asleep for anything but the GIL.
    pub waiting_ns: u64,
    /// Asleep on a futex inside the interpreter's own state.
    pub gil_ns: u64,
    /// Ready to run, without a CPU.
    pub run_queue_ns: u64,
}

/// All waits of one step in the same system call with the same first argument.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wait {
    /// First argument of the system call: usually a file descriptor, for a futex its address.
    pub arg0: u64,
    pub ns: u64,
    /// Number of the system call, or [`SYSCALL_NONE`] or [`SYSCALL_OTHER`].
    pub syscall: i32,
    pub count: u32,
}

/// The step began at a step probe: it has one owner. Without it the step is a whole tick, or the part of a tick
/// before its first step probe.
pub const STEP_PROBED: u32 = 1;
/// The step was already running when loopguard came: its start is that moment.
pub const STEP_CUT_AT_ATTACH: u32 = 2;
/// The step is below the threshold, and those like it may add up.
pub const STEP_ADDS_UP: u32 = 1 << 16;
/// It began with the poll of a task whose end nobody would have seen: more than that poll may be in it.
pub const STEP_WITHOUT_END: u32 = 4;
/// Whether it blocked its worker was not known before now: its request's sums lack it.
pub const STEP_WAS_HELD: u32 = 8;

/// A step that has ended and reached the threshold, or is one of many short ones that may add up.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepRecord {
    pub header: RecordHeader,
    pub seq: u64,
    /// The request whose own probes bracket the step; 0: none.
    pub request: u64,
    pub tick_start_ns: u64,
    pub start_ns: u64,
    pub end_ns: u64,
    pub off_cpu: OffCpu,
    pub waits: [Wait; MAX_WAITS],
    /// [`STEP_PROBED`], [`STEP_CUT_AT_ATTACH`].
    pub flags: u32,
    /// Entries of `waits` in use.
    pub wait_count: u32,
}

/// An entry shim, which runs no Python code: a native call of the evaluation loop begins with it (3.12 on).
pub const FRAME_SHIM: u64 = 1;
/// The first frame of a native call of the evaluation loop (3.11).
pub const FRAME_ENTRY: u64 = 2;

/// One interpreter frame, innermost first in a capture.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RawFrame {
    /// Address of the `PyCodeObject`, and `FRAME_*` in its low bits.
    pub code: u64,
    /// Address of the instruction it is at, inside the code object's bytecode; of a shim, the frame's own address.
    pub instr: u64,
    /// What told this code object from another one at the same address: see [`fingerprint`](crate::walk::fingerprint).
    pub fingerprint: u64,
}

/// Frames kept of the thread that holds the GIL.
pub const HOLDER_FRAMES: usize = 8;

/// The thread that holds the GIL while another one waits for it. It runs meanwhile: a frame may be gone by now.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GilHolder {
    /// Its tid as the interpreter sees it; 0: not known.
    pub native_thread_id: u64,
    pub frame_count: u32,
    pub _pad: u32,
    pub frames: [RawFrame; HOLDER_FRAMES],
}

#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CaptureCause {
    /// The thread was on the CPU when the sampling clock ticked.
    Sample = 1,
    /// The thread gave up the CPU to wait.
    Wait = 2,
}

/// How the frame walk ended.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalkStatus {
    /// No interpreter to walk.
    None = 0,
    Complete = 1,
    /// More than [`MAX_FRAMES`]; the outermost are missing.
    TooDeep = 2,
    /// A frame could not be read; the outermost are missing.
    Unreadable = 3,
    /// The thread state belongs to another thread now; nothing was kept.
    NotThisThread = 4,
}

/// Bytes kept of a path's `str` object (header included).
pub const PATH_OBJECT: usize = 320;
pub const METHOD_OBJECT: usize = 72;
pub const HOST_OBJECT: usize = 112;
/// Bytes kept of a request id's `bytes` object (header included).
pub const REQUEST_ID_OBJECT: usize = 168;
pub const TRACEPARENT_OBJECT: usize = 96;

/// The facts of one request, copied from the ASGI scope while the step that serves it runs: raw `str` and `bytes`
/// objects, decoded in user space. An object that was not there is all zero.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestSnapshot {
    /// Address of the outermost ASGI scope dict in the frames; 0: there was none.
    pub scope: u64,
    /// Address of the object under `route` or `path_template`; 0: not routed yet, or a framework that keeps none.
    pub route: u64,
    pub client_port: u32,
    pub _pad: u32,
    pub path: [u8; PATH_OBJECT],
    pub method: [u8; METHOD_OBJECT],
    pub client_host: [u8; HOST_OBJECT],
    pub request_id: [u8; REQUEST_ID_OBJECT],
    pub traceparent: [u8; TRACEPARENT_OBJECT],
}

/// What a loop thread was doing at one instant. Sent without the unused tail of `frames`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CaptureRecord {
    pub header: RecordHeader,
    /// A [`CaptureCause`].
    pub cause: u32,
    /// For a wait: the system call, else [`SYSCALL_NONE`].
    pub syscall: i32,
    pub arg0: u64,
    /// When the stack was taken.
    pub at_ns: u64,
    /// Until when the thread stayed there: when it ran again, or `at_ns` for a sample.
    pub until_ns: u64,
    pub step_seq: u64,
    pub step_start_ns: u64,
    pub tick_start_ns: u64,
    /// From the step's start to `until_ns`.
    pub off_cpu: OffCpu,
    /// The user's general registers by their DWARF numbers, then the instruction pointer (System V psABI for AMD64,
    /// "DWARF Register Number Mapping").
    pub registers: [u64; REGISTERS],
    /// For a wait in `futex`: the first words at the address waited on, as they were then.
    pub futex: [u64; FUTEX_WORDS],
    /// For a wait for the GIL: who had it then.
    pub holder: GilHolder,
    /// Address of the current asyncio task where the thread state holds it (CPython 3.14 on), else 0.
    pub task: u64,
    /// The request whose own probes bracket the step; 0: none.
    pub running: u64,
    /// A [`WalkStatus`].
    pub walk: u32,
    pub frame_count: u32,
    /// [`StackPage`]s that were sent before this record.
    pub stack_pages: u32,
    /// Where the kernel programs kept the first of them meanwhile.
    pub stack_first: u32,
    pub request: RequestSnapshot,
    pub frames: [RawFrame; MAX_FRAMES],
}

/// Bytes of the user stack that are copied at a time: a page is there or it is not.
pub const STACK_PAGE: usize = 4096;
/// Pages that one capture can have.
pub const MAX_STACK_PAGES: usize = 16;
pub const REGISTERS: usize = 17;
pub const REGISTER_SP: usize = 7;
pub const REGISTER_IP: usize = 16;
/// Enough for the lock, the owner and the kind of a `pthread_mutex_t`.
pub const FUTEX_WORDS: usize = 3;

/// One page of a user stack, sent before the capture it belongs to.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StackPage {
    pub header: RecordHeader,
    /// That of the capture.
    pub at_ns: u64,
    /// Of the first byte: a multiple of [`STACK_PAGE`].
    pub address: u64,
    pub bytes: [u8; STACK_PAGE],
}

/// A thread of a watched process polled an epoll descriptor and is not watched yet.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PollRecord {
    pub header: RecordHeader,
    pub at_ns: u64,
    pub epoll_fd: i32,
    /// The system call: `epoll_wait` tells asyncio's selector from libuv's `epoll_pwait`.
    pub syscall: i32,
    /// Its timeout in milliseconds; 0: it does not wait. Of `epoll_pwait2` it is not known and says -1.
    pub timeout_ms: i32,
    /// The slot in which the thread is watched since this poll, or [`NO_SLOT`].
    pub slot: u32,
}

/// A process whose loops may run already: where their ticks began is not known.
pub const PROCESS_MAY_POLL: u32 = 1;
/// A process, or a program that it became, that is watched since before it polled: the first polls of its threads are
/// their loops'.
pub const PROCESS_BEFORE_POLLS: u32 = 2;

/// The thread is not watched from here on.
pub const NO_SLOT: u32 = u32::MAX;

/// What happened to a watched process or loop thread.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProcessChange {
    /// It came into being as the child of another watched one; `header` is the child's.
    Forked = 1,
    /// It runs another program now.
    Exec = 2,
    /// The thread of `header` ended: a loop thread, or the process's first one.
    Ended = 3,
}

/// A watched process has a child, runs another program, or ends.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessRecord {
    pub header: RecordHeader,
    pub at_ns: u64,
    /// When the process was made, on the clock that goes on while the machine sleeps: with its id, this names a process
    /// for ever. 0 where it was not read.
    pub start_boottime_ns: u64,
    /// A [`ProcessChange`].
    pub change: u32,
    /// The parent's tgid, for a child.
    pub parent: u32,
}

/// Which task a long step polled and what its connection read; sent before the step.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskRecord {
    pub header: RecordHeader,
    /// That of the step.
    pub seq: u64,
    pub task_id: u64,
    pub task_type: u32,
    /// `trail` holds something.
    pub has_trail: u32,
    pub trail: Trail,
}

/// A poll returns to a place that is not marked yet.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskReturnRecord {
    pub header: RecordHeader,
    pub address: u64,
}

/// While polls were not marked a worker waited, and whether it parked there or was blocked is not known.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnclearWaitRecord {
    pub header: RecordHeader,
    /// 0: it has only begun, and where the worker parks was never seen.
    pub waited_ns: u64,
}

const _: () = assert!(size_of::<UnclearWaitRecord>() == 24);

/// Step probes on this thread's own `Context.run` may nest: a deeper one belongs to the same step.
pub const THREAD_STEPS_NEST: u32 = 1;
/// `context_run` marks this thread's steps (asyncio's own loop).
pub const THREAD_STEPS_CONTEXT_RUN: u32 = 2;
/// `PyContext_Enter` marks this thread's steps (uvloop).
pub const THREAD_STEPS_CONTEXT_ENTER: u32 = 4;

/// The thread is a worker that may be parked in a futex: outside of a request's code that is its poll.
pub const THREAD_PARKS: u32 = 8;
/// Steps below the threshold are told from the floor on, whatever their sum.
pub const THREAD_TELLS_SHORT: u32 = 1 << 16;
/// A worker of tokio: its clock has a [`Worker`](crate::worker::Worker) beside it.
pub const THREAD_TOKIO: u32 = 1 << 8;
/// Polls of tokio's tasks are marked.
pub const THREAD_STEPS_TASK: u32 = 1 << 9;
/// When no poll runs, a wait on a futex is the thread's way to park.
pub const THREAD_PARKS_ON_FUTEX: u32 = 1 << 10;

/// Mark of an id that may be watched: which slot it has, if any, is to be looked up.
pub const MARK_LOOK_UP: u32 = 1;

/// Mark of the thread at `slot`.
pub const fn slot_mark(slot: u32) -> u32 {
    slot + 2
}

/// The slot that a mark tells, or one that nobody can have.
#[inline(always)]
pub const fn marked_slot(mark: u32) -> u32 {
    mark.wrapping_sub(2)
}

/// What user space tells the kernel programs about one loop thread; by slot. What every edge needs comes first: a cache
/// line.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoopThread {
    pub tid: u32,
    /// `THREAD_*`.
    pub flags: u32,
    /// A step at least this long is recorded.
    pub threshold_ns: u64,
    pub tgid: u32,
    /// The loop's own epoll descriptor.
    pub epoll_fd: i32,
    /// Which steps below the threshold are told.
    pub short: ShortPace,
    /// A step must be this old before anything is captured in it.
    pub capture_age_ns: u64,
    /// Captures of one step are at least this far apart; the older the step, the further.
    pub capture_gap_ns: u64,
    /// Address of its `PyThreadState`; 0: no Python here.
    pub thread_state: u64,
    /// Its tid as the interpreter sees it (in the innermost pid namespace).
    pub native_thread_id: u64,
    /// Address ranges that hold the GIL's futexes: `_PyRuntime` and the interpreter state.
    pub gil: [AddressRange; 2],
    /// Address of the counter that gives tokio's tasks their ids; 0: not known.
    pub task_ids: u64,
    /// Where there is room for [`MAX_STACK_PAGES`] of this thread's stack; 0: it has the room of its slot.
    pub deep_stack: u32,
    pub _pad: u32,
}

const _: () = assert!(size_of::<LoopThread>() == 128 && core::mem::offset_of!(LoopThread, thread_state) == 64);

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AddressRange {
    pub start: u64,
    pub end: u64,
}

impl AddressRange {
    #[inline(always)]
    pub fn contains(&self, address: u64) -> bool {
        self.start <= address && address < self.end
    }
}

/// Where the kernel keeps how long a thread that is ready to run has had no CPU; byte offsets from its BTF. All 0: it
/// does not keep that.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunQueueFields {
    /// `task_struct.sched_info.run_delay` (include/linux/sched.h): the sum, ns, up to when it was last queued:
    pub run_delay: u32,
    /// `task_struct.sched_info.last_queued`, ns on the queue's clock; 0: it is not queued.
    pub last_queued: u32,
    /// `task_struct.se.cfs_rq`, `cfs_rq.rq` and `rq.clock` (kernel/sched/sched.h): the way to that clock.
    pub cfs_rq: u32,
    pub rq: u32,
    pub clock: u32,
}

impl RunQueueFields {
    pub const NONE: Self = Self { run_delay: 0, last_queued: 0, cfs_rq: 0, rq: 0, clock: 0 };
}

/// What was done and what could not be, counted per CPU under these indices.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// Records dropped because the ring buffer was full.
    Lost = 0,
    /// Records sent.
    Sent = 1,
    /// Stack pages dropped because their ring buffer was full: a capture without its native frames.
    LostStackPages = 2,
    /// Requests for which there was no place among the open ones.
    RequestsUntracked = 3,
    /// Enters and exits of requests that had no counterpart.
    RequestsAstray = 4,
    /// Ticks of sampling clocks, whoever they met.
    Samples = 5,
}
pub const COUNTERS: u32 = 6;

const _: () = assert!(size_of::<RecordHeader>() == 16);
const _: () = assert!(size_of::<Wait>() == 24);
const _: () = assert!(size_of::<StepRecord>() == 16 + 5 * 8 + 24 + MAX_WAITS * 24 + 8);
const _: () = assert!(size_of::<RawFrame>() == 24);
const _: () = assert!(size_of::<RequestSnapshot>() == 24 + 320 + 72 + 112 + 168 + 96);
const _: () = assert!(
    offset_of!(CaptureRecord, frames) == 16 + 8 + 6 * 8 + 24 + (REGISTERS + FUTEX_WORDS + 2) * 8 + 208 + 16 + 792
);
const _: () = assert!(size_of::<GilHolder>() == 16 + 24 * HOLDER_FRAMES);
const _: () = assert!(size_of::<StackPage>() == 32 + STACK_PAGE);
const _: () = assert!(size_of::<PollRecord>() == 40);
const _: () = assert!(size_of::<LoopThread>() == 88 + 24 + 8 + 8);
const _: () = assert!(size_of::<TaskRecord>() == 16 + 24 + size_of::<Trail>());
const _: () = assert!(size_of::<ProcessRecord>() == 40);

use core::mem::offset_of;

/// Bytes of a capture with no frames: what is sent of one is this and its frames.
pub const CAPTURE_BASE: usize = offset_of!(CaptureRecord, frames);

#[cfg(feature = "user")]
mod user {
    use super::*;
    // SAFETY: plain integers without padding bytes.
    unsafe impl aya::Pod for LoopThread {}
    // SAFETY: likewise.
    unsafe impl aya::Pod for RunQueueFields {}
}
