//! The maps, and the way from a thread id to what is known of the thread.

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_NOEXIST},
    macros::map,
    maps::{Array, HashMap, LruHashMap, PerCpuArray, Queue, RingBuf},
};
use loopguard_common::{
    clock::LoopClock,
    layout::PyLayout,
    records::{COUNTERS, Counter, LoopThread, MARK_LOOK_UP, StackPage, marked_slot, slot_mark},
    walk::CaptureBuffer,
};

/// Entries for thread and process ids; ids that differ by a multiple of it share one.
const WATCHED_IDS: u32 = 1 << 16;

/// Everything for user space.
#[map]
pub static RECORDS: RingBuf = RingBuf::with_byte_size(2 << 20, 0);

/// Stack pages, apart from the records: they are a hundred times as large and must not push those out.
#[map]
pub static STACKS: RingBuf = RingBuf::with_byte_size(4 << 20, 0);

/// The last stack copied on each thread, one entry a page: first the slots' own, then the larger rooms that user space
/// gives to threads with deep stacks. It sizes this at load.
#[map]
pub static STACK_PAGES: Array<StackPage> = Array::with_max_entries(64, 0);

/// Not 0 for a watched thread or process id: what keeps the programs cheap for everything else on the machine; and for a
/// thread its slot ([`slot_mark`]), if no other id took the entry. A word each: these programs and user space change
/// neighbours at the same time.
#[map]
static WATCHED: Array<u32> = Array::with_max_entries(WATCHED_IDS, 0);

/// Processes whose new loop threads are wanted: `PROCESS_*`.
#[map]
pub static PROCESSES: HashMap<u32, u32> = HashMap::with_max_entries(1024, 0);

/// How to read each watched interpreter, by tgid.
#[map]
pub static LAYOUTS: HashMap<u32, PyLayout> = HashMap::with_max_entries(1024, 0);

/// Slots of the loop threads, by tid.
#[map]
static SLOTS: HashMap<u32, u32> = HashMap::with_max_entries(1024, 0);

/// Slots that no thread has, their clocks clean; user space fills it. First in, first out: a slot rests before it is
/// another thread's.
#[map]
static FREE_SLOTS: Queue<u32> = Queue::with_max_entries(64, 0);

/// What a thread begins with that is watched from here: its only entry is filled in by user space.
#[map]
static NEW_THREAD: Array<LoopThread> = Array::with_max_entries(1, 0);

/// By slot; user space sizes these three and the free slots at load. Of these two every edge touches an entry: the
/// memory of a map that could be mapped begins on a page, so that entries begin on cache lines.
#[map]
static THREADS: Array<LoopThread> = Array::with_max_entries(64, BPF_F_MMAPABLE);
#[map]
static CLOCKS: Array<LoopClock> = Array::with_max_entries(64, BPF_F_MMAPABLE);
#[map]
static CAPTURES: Array<CaptureBuffer> = Array::with_max_entries(64, 0);

/// When a thread that runs requests or polls tasks and is not watched was last reported, by tid.
#[map]
pub static REPORTED_THREADS: LruHashMap<u32, u64> = LruHashMap::with_max_entries(1024, 0);

/// When a thread's poll of a descriptor that is not known as its loop's was last reported, by tid.
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

/// Whether `id` may be watched: a look that says no for nearly everything that is not.
#[inline(always)]
pub fn maybe_watched(id: u32) -> bool {
    WATCHED.get(id & (WATCHED_IDS - 1)).is_some_and(|mark| *mark != 0)
}

/// From here on `id` may be watched.
#[inline(always)]
pub fn mark_watched(id: u32) {
    mark(id, MARK_LOOK_UP);
}

#[inline(always)]
fn mark(id: u32, with: u32) {
    if let Some(mark) = WATCHED.get_ptr_mut(id & (WATCHED_IDS - 1)) {
        // SAFETY: an entry of an array is never taken away.
        unsafe { *mark = with };
    }
}

/// Watches the current thread from this moment on: it calls its own poll, or polls a task. `flags`: `THREAD_*`. `None`:
/// all slots are taken.
#[inline(always)]
pub fn watch_from_poll((tgid, tid): (u32, u32), epoll_fd: i32, flags: u32, now: u64) -> Option<u32> {
    let slot = FREE_SLOTS.pop().ok()??;
    let (new, thread, clock) = (NEW_THREAD.get(0)?, THREADS.get_ptr_mut(slot)?, CLOCKS.get_ptr_mut(slot)?);
    // SAFETY: entries of arrays are never taken away, and a slot from the pool is nobody else's.
    unsafe {
        *thread = LoopThread { tid, tgid, epoll_fd, flags, ..*new };
        (*clock).begin_tick(now);
    }
    if SLOTS.insert(tid, slot, u64::from(BPF_NOEXIST)).is_err() {
        // User space came first, a moment ago.
        unwatch(slot);
        let _ = FREE_SLOTS.push(slot, 0);
        return None;
    }
    mark(tid, slot_mark(slot));
    Some(slot)
}

#[inline(always)]
pub fn watched(tid: u32) -> Option<Watched> {
    // The idle task, on one side of most switches: not even its mark has to be fetched.
    if tid == 0 {
        return None;
    }
    let mark = *WATCHED.get(tid & (WATCHED_IDS - 1))?;
    if mark == 0 {
        return None;
    }
    // SAFETY: a word that is replaced whole.
    at_slot(marked_slot(mark), tid).or_else(|| at_slot(unsafe { *SLOTS.get(tid)? }, tid))
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

/// Nothing of this thread is recorded any more: another one may get its id.
#[inline(always)]
pub fn unwatch(slot: u32) {
    if let Some(thread) = THREADS.get_ptr_mut(slot) {
        // SAFETY: an entry of an array is never taken away; the thread itself ends here.
        unsafe { (*thread).tid = 0 };
    }
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
