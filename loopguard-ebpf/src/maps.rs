//! The maps, and the way from a thread id to what is known of the thread.

use aya_ebpf::{
    macros::map,
    maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf},
};
use loopguard_common::{
    clock::LoopClock,
    layout::PyLayout,
    records::{COUNTERS, Counter, LoopThread, StackPage},
    walk::CaptureBuffer,
};

/// Words of the bit field over thread and process ids; ids that differ by a multiple of its bits share one.
const WATCHED_WORDS: u32 = 1024;

/// Everything for user space.
#[map]
pub static RECORDS: RingBuf = RingBuf::with_byte_size(2 << 20, 0);

/// Stack pages, apart from the records: they are a hundred times as large and must not push those out.
#[map]
pub static STACKS: RingBuf = RingBuf::with_byte_size(4 << 20, 0);

/// The last stack copied on each thread, one entry a page; user space sizes it at load.
#[map]
pub static STACK_PAGES: Array<StackPage> = Array::with_max_entries(64, 0);

/// One bit per watched thread or process id: what keeps the programs cheap for everything else on the machine.
#[map]
static WATCHED: Array<u64> = Array::with_max_entries(WATCHED_WORDS, 0);

/// Processes whose new loop threads are wanted.
#[map]
pub static PROCESSES: HashMap<u32, u32> = HashMap::with_max_entries(1024, 0);

/// How to read each watched interpreter, by tgid.
#[map]
pub static LAYOUTS: HashMap<u32, PyLayout> = HashMap::with_max_entries(1024, 0);

/// Slots of the loop threads, by tid.
#[map]
static SLOTS: HashMap<u32, u32> = HashMap::with_max_entries(1024, 0);

/// By slot; user space sizes these three at load.
#[map]
static THREADS: Array<LoopThread> = Array::with_max_entries(64, 0);
#[map]
static CLOCKS: Array<LoopClock> = Array::with_max_entries(64, 0);
#[map]
static CAPTURES: Array<CaptureBuffer> = Array::with_max_entries(64, 0);

/// When a thread's unknown poll was last reported, by tid.
#[map]
pub static REPORTED_POLLS: LruHashMap<u32, u64> = LruHashMap::with_max_entries(1024, 0);

#[map]
static COUNTS: PerCpuArray<u64> = PerCpuArray::with_max_entries(COUNTERS, 0);

/// A watched loop thread.
pub struct Watched {
    pub slot: u32,
    pub thread: &'static LoopThread,
    pub clock: &'static mut LoopClock,
}

/// Whether `id` may be watched: a bit test that says no for nearly everything that is not.
#[inline(always)]
pub fn maybe_watched(id: u32) -> bool {
    match WATCHED.get((id >> 6) & (WATCHED_WORDS - 1)) {
        Some(word) => (word >> (id & 63)) & 1 != 0,
        None => false,
    }
}

#[inline(always)]
pub fn watched(tid: u32) -> Option<Watched> {
    if !maybe_watched(tid) {
        return None;
    }
    // SAFETY: a word that is replaced whole.
    at_slot(unsafe { *SLOTS.get(tid)? }, tid)
}

/// The watched thread at `slot`, if it is `tid`.
#[inline(always)]
pub fn at_slot(slot: u32, tid: u32) -> Option<Watched> {
    let thread = THREADS.get(slot)?;
    if thread.tid != tid {
        return None;
    }
    let clock = CLOCKS.get_ptr_mut(slot)?;
    // SAFETY: a slot belongs to one thread, whose programs run one at a time but for the sampling clock, which only
    // writes what no other program does while the thread is on the CPU.
    Some(Watched { slot, thread, clock: unsafe { &mut *clock } })
}

#[inline(always)]
pub fn capture_buffer(slot: u32) -> Option<&'static mut CaptureBuffer> {
    let buffer = CAPTURES.get_ptr_mut(slot)?;
    // SAFETY: as for the clock.
    Some(unsafe { &mut *buffer })
}

#[inline(always)]
pub fn count(counter: Counter) {
    if let Some(value) = COUNTS.get_ptr_mut(counter as u32) {
        // SAFETY: this CPU's own entry.
        unsafe { *value += 1 };
    }
}
