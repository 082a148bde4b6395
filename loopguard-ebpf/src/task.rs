//! Polls of tokio's tasks, and what their connections read and write meanwhile.
//!
//! A probe at the entry of each task's poll function begins a step, one behind the call ends it. What a poll reads and
//! writes on its connection is kept for each task, so that a long poll can be given its request.

use aya_ebpf::{
    EbpfContext as _,
    bindings::pt_regs,
    helpers::{
        bpf_get_current_pid_tgid, bpf_probe_read_kernel, bpf_probe_read_user,
        generated::{
            bpf_get_attach_cookie, bpf_get_current_task_btf, bpf_ktime_get_ns,
            bpf_probe_read_kernel as read_kernel_raw, bpf_probe_read_user as read_user_raw, bpf_task_pt_regs,
        },
    },
    macros::{map, tracepoint, uprobe},
    maps::{Array, HashMap, LruHashMap, PerCpuArray},
    programs::{ProbeContext, TracePointContext},
};
use loopguard_common::{
    clock::EndedStep,
    records::{
        Counter, NO_SLOT, PollRecord, RecordHeader, RecordKind, STEP_PROBED, STEP_WAS_HELD, STEP_WITHOUT_END,
        StepRecord, THREAD_PARKS_ON_FUTEX, THREAD_STEPS_TASK, THREAD_TELLS_SHORT, THREAD_TOKIO, TaskRecord,
        TaskReturnRecord, UnclearWaitRecord,
    },
    trail::{Read, TRAIL_ANSWER, TRAIL_PIECE, TRAIL_START, TaskKey, Trail, is_answer},
    worker::{
        Begun, FutexMeaning, FutexWait, PLACE_MARKED, PLACE_OF_FIRST_POLLS, PLACE_REPORTED, Poll, PollCookie, PoolTask,
        ReturnPlace, WORKER_AWAY, WORKER_HOLDS_STEP, WORKER_JUST_POLLED, WORKER_PARKED, Worker,
    },
};

use crate::{
    capture::current_syscall,
    maps::{
        PROCESSES, RECORDS, REPORTED_POLLS, REPORTED_THREADS, Watched, at_slot, count, maybe_watched, watch_from_poll,
        watched,
    },
    sched::futex_syscall,
    send,
};

/// Beside the clocks, by slot; user space sizes these two at load.
#[map]
static WORKERS: Array<Worker> = Array::with_max_entries(64, 0);
/// Long polls that wait for what follows.
#[map]
static HELD: Array<StepRecord> = Array::with_max_entries(64, 0);

/// Where polls return to, and what is known of the place.
#[map]
static RETURNS: HashMap<ReturnPlace, u32> = HashMap::with_max_entries(1024, 0);

/// The last task of the blocking pool on each thread, by tid.
#[map]
static POOL_TASKS: LruHashMap<u32, PoolTask> = LruHashMap::with_max_entries(2048, 0);

/// What the tasks' connections read and wrote.
#[map]
static TRAILS: LruHashMap<TaskKey, Trail> = LruHashMap::with_max_entries(4096, 0);
/// A value to begin with: it does not fit on the stack.
#[map]
static EMPTY_TRAIL: PerCpuArray<Trail> = PerCpuArray::with_max_entries(1, 0);

const REPORT_AGAIN_NS: u64 = 1_000_000_000;
/// A poll that spawns more tasks is followed for so many.
const MAX_SPAWNED: u64 = 4;
/// asm/unistd_64.h
const SYSCALL_READV: u64 = 19;
const SYSCALL_WRITEV: u64 = 20;
const SYSCALL_CLONE: i32 = 56;
const SYSCALL_CLONE3: i32 = 435;
/// uapi/linux/futex.h: the operations that wait, and the bits that are none of the operation.
const FUTEX_COMMAND: u32 = 0x7f;
const FUTEX_WAIT: u32 = 0;
const FUTEX_WAIT_BITSET: u32 = 9;
/// `struct syscall_trace_exit`: the common header, the number, then the result (kernel/trace/trace.h).
const RESULT: usize = 16;

fn worker(slot: u32) -> Option<&'static mut Worker> {
    let worker = WORKERS.get_ptr_mut(slot)?;
    // SAFETY: as for the clock of the same slot.
    Some(unsafe { &mut *worker })
}

fn trail(key: &TaskKey) -> Option<&'static mut Trail> {
    let trail = TRAILS.get_ptr_mut(key)?;
    // SAFETY: a task runs on one thread at a time, and only its own polls change its trail.
    Some(unsafe { &mut *trail })
}

#[inline(always)]
fn user_word(address: u64) -> u64 {
    // SAFETY: any user address may be asked for.
    unsafe { bpf_probe_read_user(address as *const u64) }.unwrap_or(0)
}

#[inline(always)]
fn now() -> u64 {
    // SAFETY: a helper without conditions.
    unsafe { bpf_ktime_get_ns() }
}

/// A task's poll function is entered.
#[uprobe]
pub fn on_task_poll(ctx: ProbeContext) -> u32 {
    let id = bpf_get_current_pid_tgid();
    let (tgid, tid) = ((id >> 32) as u32, id as u32);
    let Some(target) = watched(tid).or_else(|| new_worker(tgid, tid)) else { return 0 };
    if target.thread.flags & THREAD_STEPS_TASK == 0 {
        return 0;
    }
    // SAFETY: a helper that reads what the probe was attached with.
    let cookie = PollCookie::of(unsafe { bpf_get_attach_cookie(ctx.as_ptr()) });
    // SAFETY: a uprobe's context is the thread's registers.
    let (sp, task) = unsafe {
        let registers = ctx.as_ptr().cast::<pt_regs>();
        ((*registers).rsp + u64::from(cookie.stack_down), (*registers).rdi)
    };
    let Some(worker) = worker(target.slot) else { return 0 };
    let now = now();
    target.clock.seen_running(now);
    if worker.polls(target.clock) && sp < worker.poll_sp {
        return 0;
    }
    if worker.flags & WORKER_AWAY != 0 {
        becomes_worker(tid);
    }
    // Whatever ended before did not give the worker away.
    release(&target, worker);
    let place = ReturnPlace { address: user_word(sp), tgid, _pad: 0 };
    let follows = worker.flags & WORKER_JUST_POLLED != 0;
    let known = return_place(&place, tid, worker.flags & WORKER_PARKED != 0);
    let poll = Poll {
        sp,
        task_id: user_word(task + u64::from(cookie.id_offset)),
        task_type: u32::from(cookie.task_type),
        has_end: known & PLACE_MARKED != 0,
    };
    if follows && known & PLACE_OF_FIRST_POLLS == 0 {
        inherit(worker, tgid, poll.task_id);
    }
    worker.flags &= !(WORKER_JUST_POLLED | WORKER_PARKED);
    let Begun::Step(ended) = worker.poll_begins(target.clock, now, poll) else { return 0 };
    let request = target.clock.leave_all_requests();
    send::step_if_long(target.thread, target.clock, ended, request);
    target.clock.begin_step(now, if poll.has_end { STEP_PROBED } else { STEP_WITHOUT_END });
    if target.thread.task_ids != 0 {
        worker.first_spawned = user_word(target.thread.task_ids);
    }
    0
}

/// What is known of the place a poll returns to; reports it when that is nothing.
#[inline(always)]
fn return_place(place: &ReturnPlace, tid: u32, is_first: bool) -> u32 {
    if let Some(known) = RETURNS.get_ptr_mut(place) {
        // SAFETY: a word; that another processor may write it as well does no harm.
        unsafe {
            if is_first && *known & PLACE_OF_FIRST_POLLS == 0 {
                *known |= PLACE_OF_FIRST_POLLS;
            }
            return *known;
        }
    }
    let value = PLACE_REPORTED | if is_first { PLACE_OF_FIRST_POLLS } else { 0 };
    if RETURNS.insert(place, value, 0).is_ok() {
        report_return(place, tid);
    }
    0
}

#[inline(never)]
fn report_return(place: &ReturnPlace, tid: u32) {
    let header = RecordHeader { kind: RecordKind::TaskReturn as u32, tgid: place.tgid, tid, _pad: 0 };
    let sent = RECORDS.output::<TaskReturnRecord>(&TaskReturnRecord { header, address: place.address }, send::WAKE_UP);
    count(if sent.is_ok() { Counter::Sent } else { Counter::Lost });
}

/// A thread polls a task and is not watched yet. In a process whose polls are marked that is a new worker, as
/// `block_in_place` makes them: it is watched from here on, since this very poll may be long.
#[inline(always)]
fn new_worker(tgid: u32, tid: u32) -> Option<Watched> {
    becomes_worker(tid);
    if watch_worker(tgid, tid) == 0 {
        return None;
    }
    watched(tid)
}

#[inline(never)]
fn watch_worker(tgid: u32, tid: u32) -> u32 {
    if !maybe_watched(tgid) {
        return 0;
    }
    let now = now();
    // SAFETY: only whether the entry exists matters, or a word that is replaced whole.
    let (process, reported) = unsafe { (PROCESSES.get(tgid), REPORTED_THREADS.get(tid)) };
    if process.is_none() || reported.is_some_and(|at| now - *at < REPORT_AGAIN_NS) {
        return 0;
    }
    let _ = REPORTED_THREADS.insert(tid, now, 0);
    let flags = THREAD_TOKIO | THREAD_STEPS_TASK | THREAD_PARKS_ON_FUTEX;
    let slot = watch_from_poll((tgid, tid), -1, flags, now);
    let header = RecordHeader { kind: RecordKind::Poll as u32, tgid, tid, _pad: 0 };
    let slot_or_none = slot.unwrap_or(NO_SLOT);
    send::poll(&PollRecord { header, at_ns: now, epoll_fd: -1, syscall: -1, timeout_ms: -1, slot: slot_or_none });
    u32::from(slot.is_some())
}

/// The code behind the call of a poll function is reached. The cookie says how far the stack pointer has moved since.
#[uprobe]
pub fn on_task_return(ctx: ProbeContext) -> u32 {
    let id = bpf_get_current_pid_tgid();
    let Some(mut target) = watched(id as u32) else { return 0 };
    // SAFETY: a helper that reads what the probe was attached with, and the registers that are a uprobe's context.
    let sp = unsafe {
        let down = bpf_get_attach_cookie(ctx.as_ptr());
        (*ctx.as_ptr().cast::<pt_regs>()).rsp.wrapping_add(down)
    };
    let Some(worker) = worker(target.slot) else { return 0 };
    if !worker.is_poll_end(target.clock, sp) {
        return 0;
    }
    let now = now();
    let ended = target.clock.end_step(now);
    finish(&mut target, worker, ended);
    target.clock.begin_step(now, 0);
    worker.flags |= WORKER_JUST_POLLED;
    if target.thread.task_ids != 0 && target.thread.flags & THREAD_PARKS_ON_FUTEX == 0 {
        bequeath(&target, worker);
    }
    0
}

/// Part of a poll, or all of it, has ended.
#[inline(always)]
fn finish(target: &mut Watched, worker: &mut Worker, ended: EndedStep) {
    let duration = ended.duration_ns();
    if duration >= target.thread.threshold_ns {
        finish_long(target, worker, ended);
    } else if duration >= target.thread.short.floor_ns {
        if target.thread.flags & THREAD_TELLS_SHORT != 0 {
            send_task(target, worker);
        }
        let request = target.clock.running.current();
        send::step_if_long(target.thread, target.clock, ended, request);
    }
}

#[inline(never)]
fn finish_long(target: &mut Watched, worker: &mut Worker, ended: EndedStep) {
    let request = target.clock.running.current();
    // Of an earlier part of the same poll, if there is one.
    release(target, worker);
    if gave_worker_away(worker, ended) {
        return;
    }
    send_task(target, worker);
    if target.thread.flags & THREAD_PARKS_ON_FUTEX == 0 {
        send::step_if_long(target.thread, target.clock, ended, request);
        return;
    }
    // It may have given its worker away with `block_in_place`: then it goes back to the blocking pool, which shows in
    // what it does next.
    hold(target, worker, ended, request);
}

#[inline(always)]
fn hold(target: &mut Watched, worker: &mut Worker, ended: EndedStep, request: u64) {
    if let Some(held) = HELD.get_ptr_mut(target.slot) {
        // SAFETY: as for the clock of the same slot.
        let held = unsafe { &mut *held };
        send::fill_step(held, target.thread, target.clock, (ended, request));
        held.flags |= STEP_WAS_HELD;
        worker.flags |= WORKER_HOLDS_STEP;
        // The next park releases it.
        target.clock.parked = 0;
    }
}

/// A step that the server's own probes ended, on a worker: it has to wait like the poll that it is part of, also while
/// polls are not marked. Whether it has to.
#[inline(always)]
pub fn step_of_request(target: &mut Watched, ended: EndedStep, request: u64) -> bool {
    if ended.duration_ns() < target.thread.threshold_ns || target.thread.flags & THREAD_PARKS_ON_FUTEX == 0 {
        return false;
    }
    let Some(worker) = worker(target.slot) else { return false };
    release(target, worker);
    if gave_worker_away(worker, ended) {
        return true;
    }
    hold(target, worker, ended, request);
    true
}

/// Whether a thread that the poll woke or started has become a worker since: `block_in_place` does that, to have its
/// own worker go on there. The poll may have got it back before its end.
#[inline(always)]
fn gave_worker_away(worker: &Worker, ended: EndedStep) -> bool {
    let is_worker_since = |tid: u32| {
        // SAFETY: two words, each replaced whole.
        let task = unsafe { POOL_TASKS.get(tid) };
        task.is_some_and(|task| task.is_worker != 0 && task.since_ns >= ended.start_ns)
    };
    let [first, second, third, fourth] = worker.woke;
    is_worker_since(first) || is_worker_since(second) || is_worker_since(third) || is_worker_since(fourth)
}

/// A thread of the blocking pool polls tasks.
#[inline(never)]
pub fn becomes_worker(tid: u32) {
    if let Some(task) = POOL_TASKS.get_ptr_mut(tid) {
        // SAFETY: only the thread itself writes it.
        unsafe { (*task).is_worker = 1 };
    }
}

/// A thread that is known and not idle in the blocking pool.
#[inline(always)]
fn is_worker(tid: u32) -> bool {
    watched(tid).is_some_and(|target| worker(target.slot).is_some_and(|worker| worker.flags & WORKER_AWAY == 0))
}

/// The current thread makes another one runnable; only those of its own process matter, and only if it means to: a timer
/// that ends another thread's sleep wakes that one on whatever thread it interrupts.
#[inline(always)]
pub fn wakes(woken: u32, tgid: u32) {
    if let Some(target) = watched(bpf_get_current_pid_tgid() as u32)
        && target.thread.flags & THREAD_PARKS_ON_FUTEX != 0
        && target.thread.tgid == tgid
        && target.clock.step_flags & STEP_PROBED != 0
        && wakes_or_starts_threads(current_syscall().number)
        && !is_worker(woken)
        && let Some(worker) = worker(target.slot)
        && worker.woke[0] != woken
    {
        let [first, second, third, _] = worker.woke;
        worker.woke = [woken, first, second, third];
    }
}

/// Of a system call.
#[inline(always)]
fn wakes_or_starts_threads(number: i32) -> bool {
    number == futex_syscall() || number == SYSCALL_CLONE || number == SYSCALL_CLONE3
}

/// The thread goes on as a worker: what it held has blocked it.
#[inline(always)]
pub fn release(target: &Watched, worker: &mut Worker) {
    if worker.flags & WORKER_HOLDS_STEP != 0 {
        worker.flags &= !WORKER_HOLDS_STEP;
        if let Some(held) = HELD.get_ptr_mut(target.slot) {
            // SAFETY: as for the clock of the same slot.
            send::held_step(unsafe { &*held });
        }
    }
}

#[inline(never)]
fn send_task(target: &Watched, worker: &Worker) {
    let Some(mut entry) = RECORDS.reserve::<TaskRecord>(0) else {
        count(Counter::Lost);
        return;
    };
    let record = entry.as_mut_ptr();
    let key = TaskKey { task_id: worker.task_id, tgid: target.thread.tgid, _pad: 0 };
    let from = TRAILS.get_ptr(&key);
    // SAFETY: every field of the reserved record is written; the trail is copied whole from the map's value.
    unsafe {
        (*record).header =
            RecordHeader { kind: RecordKind::Task as u32, tgid: target.thread.tgid, tid: target.thread.tid, _pad: 0 };
        (*record).seq = target.clock.step_seq;
        (*record).task_id = worker.task_id;
        (*record).task_type = worker.task_type;
        (*record).has_trail = 0;
        if let Some(from) = from {
            let to = (&raw mut (*record).trail).cast();
            (*record).has_trail = (read_kernel_raw(to, size_of::<Trail>() as u32, from.cast()) == 0) as u32;
        }
    }
    entry.submit(send::NO_WAKEUP);
    count(Counter::Sent);
}

/// Gives a task that the last poll on this worker spawned the trail of its parent.
#[inline(always)]
fn inherit(worker: &Worker, tgid: u32, task_id: u64) {
    // Later ids than the parent's poll began with; that nothing else spawned it shows in where it is polled.
    if worker.first_spawned != 0 && task_id >= worker.first_spawned && task_id != worker.task_id {
        hand_down(TaskKey { task_id: worker.task_id, tgid, _pad: 0 }, task_id);
    }
}

/// On the only thread of a runtime: every task that came into being during a poll was spawned by it.
#[inline(never)]
fn bequeath(target: &Watched, worker: &Worker) {
    let next = user_word(target.thread.task_ids);
    let key = TaskKey { task_id: worker.task_id, tgid: target.thread.tgid, _pad: 0 };
    let mut n = 0;
    while n < MAX_SPAWNED && worker.first_spawned != 0 && worker.first_spawned + n < next {
        hand_down(key, worker.first_spawned + n);
        n += 1;
    }
}

#[inline(never)]
fn hand_down(parent: TaskKey, task_id: u64) {
    let child = TaskKey { task_id, ..parent };
    if TRAILS.get_ptr(&child).is_some() {
        return;
    }
    let Some(from) = TRAILS.get_ptr(&parent) else { return };
    // SAFETY: the map's own value; it stays in place while this program runs.
    if TRAILS.insert(&child, unsafe { &*from }, 0).is_ok()
        && let Some(trail) = trail(&child)
    {
        trail.inherited = 1;
    }
}

/// A task of the blocking pool begins: this thread is no worker meanwhile.
#[uprobe]
pub fn on_blocking_task(_ctx: ProbeContext) -> u32 {
    let tid = bpf_get_current_pid_tgid() as u32;
    let _ = POOL_TASKS.insert(tid, PoolTask { since_ns: now(), is_worker: 0 }, 0);
    if let Some(target) = watched(tid)
        && let Some(worker) = worker(target.slot)
        && !worker.polls(target.clock)
    {
        worker.leaves(target.clock);
    }
    0
}

/// A worker ends its tick in epoll.
#[inline(always)]
pub fn parks(target: &Watched) {
    if target.thread.flags & THREAD_TOKIO != 0 && target.clock.parked == 0 {
        task_parks(target.slot, target.thread.tid);
    }
}

/// Global too.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn task_parks(slot: u32, tid: u32) -> u32 {
    if let Some(target) = at_slot(slot, tid)
        && let Some(worker) = worker(slot)
    {
        if worker.flags & WORKER_AWAY != 0 {
            becomes_worker(tid);
        }
        release(&target, worker);
        worker.parks(target.clock);
    }
    0
}

/// Whether an epoll descriptor is the thread's own: a worker that was found by its polls has none that is known yet.
#[inline(always)]
pub fn polls_own(target: &Watched, epoll_fd: i32) -> bool {
    target.thread.epoll_fd == epoll_fd
        || (target.thread.epoll_fd < 0
            && target.thread.flags & THREAD_TOKIO != 0
            && target.clock.step_flags & STEP_PROBED == 0)
}

/// Whether a wait in `futex` of a thread that parks there leaves it idle (1), and does what follows from that.
///
/// A global function, like [`capture_take`](crate::capture::capture_take) and for the same reason.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn task_idles(slot: u32, tid: u32, at: u64) -> u32 {
    let Some(target) = at_slot(slot, tid) else { return 0 };
    let meaning = futex_meaning(&target, at);
    if meaning == FutexMeaning::Waits {
        return 0;
    }
    idles(target, at, meaning);
    1
}

/// What a wait in `futex` means.
#[inline(always)]
fn futex_meaning(target: &Watched, at: u64) -> FutexMeaning {
    let Some(worker) = worker(target.slot) else { return FutexMeaning::Waits };
    // SAFETY: the current task exists; its saved registers are read through a helper that checks.
    let saved = unsafe { bpf_probe_read_kernel(bpf_task_pt_regs(bpf_get_current_task_btf()) as *const pt_regs) };
    let Ok(saved) = saved else { return FutexMeaning::Waits };
    let command = saved.rsi as u32 & FUTEX_COMMAND;
    if command != FUTEX_WAIT && command != FUTEX_WAIT_BITSET {
        return FutexMeaning::Waits;
    }
    let wait = FutexWait {
        sp: saved.rsp,
        address: saved.rdi,
        expected: saved.rdx as u32,
        has_timeout: saved.r10 != 0,
        marked: target.thread.flags & THREAD_STEPS_TASK != 0,
    };
    let meaning = worker.futex_waits(target.clock, wait);
    if matches!(meaning, FutexMeaning::Unclear | FutexMeaning::MayLeave) && !wait.marked && !worker.knows_park() {
        report_unclear(target, at, 0);
    }
    meaning
}

/// What follows from a wait in which the thread is idle.
#[inline(always)]
fn idles(mut target: Watched, at: u64, meaning: FutexMeaning) {
    let Some(worker) = worker(target.slot) else { return };
    if meaning == FutexMeaning::Leaves {
        worker.leaves(target.clock);
        return;
    }
    if target.clock.in_tick() {
        let ended = target.clock.end_step(at);
        let request = target.clock.leave_all_requests();
        if !meaning.is_workers() && ended.duration_ns() >= target.thread.threshold_ns {
            // In place of what it held, if anything: a thread that waits like this twice is hardly a worker.
            hold(&mut target, worker, ended, request);
        } else {
            send::step_if_long(target.thread, target.clock, ended, request);
        }
        if meaning.is_workers() {
            release(&target, worker);
        }
        target.clock.end_tick(at);
    }
    if meaning.is_workers() {
        worker.parks(target.clock);
    }
    target.clock.switch_out(at, meaning.switch_out());
}

/// A thread goes on after a sleep that may have been a block: a long one is reported, if it was seen to park elsewhere.
///
/// A global function, like [`task_idles`].
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn task_goes_on(slot: u32, tid: u32, now: u64) -> u32 {
    if let Some(target) = at_slot(slot, tid)
        && let Some(worker) = worker(slot)
        && let Some(slept_ns) = target.clock.unclear_sleep_ns(now)
        && slept_ns >= target.thread.capture_age_ns
        && worker.knows_park()
    {
        report_unclear(&target, now, slept_ns);
    }
    0
}

#[inline(never)]
fn report_unclear(target: &Watched, now: u64, waited_ns: u64) {
    // SAFETY: a word that is replaced whole.
    if unsafe { REPORTED_POLLS.get(target.thread.tid) }.is_some_and(|last| now - *last < REPORT_AGAIN_NS) {
        return;
    }
    let _ = REPORTED_POLLS.insert(target.thread.tid, now, 0);
    let header = RecordHeader {
        kind: RecordKind::UnclearWait as u32,
        tgid: target.thread.tgid,
        tid: target.thread.tid,
        _pad: 0,
    };
    let sent = RECORDS.output::<UnclearWaitRecord>(&UnclearWaitRecord { header, waited_ns }, send::NO_WAKEUP);
    count(if sent.is_ok() { Counter::Sent } else { Counter::Lost });
}

/// The length, but less than `END`, a power of two: in a form that the verifier of every kernel sees the bounds of. The
/// compiler knows them itself and would leave the mask out.
#[inline(always)]
fn below<const END: u32>(length: u64) -> u32 {
    let length = if length < u64::from(END) { length as u32 } else { END - 1 };
    core::hint::black_box(length) & (END - 1)
}

/// What a system call on a connection did.
struct Transfer {
    fd: i32,
    buffer: u64,
    /// Bytes from there on that the call has filled or sent.
    length: u64,
    /// Bytes in all.
    total: u64,
    start: [u8; TRAIL_START],
}

/// A read or a write of a running poll that has moved some bytes.
#[inline(always)]
fn transfer(ctx: &TracePointContext, target: &Watched, vectored: u64) -> Option<Transfer> {
    // SAFETY: the result word of a system call's tracepoint, inside what the verifier knows of it.
    let total = unsafe { *ctx.as_ptr().cast::<u8>().add(RESULT).cast::<i64>() };
    if total <= 0 || target.thread.flags & THREAD_STEPS_TASK == 0 || target.clock.step_flags & STEP_PROBED == 0 {
        return None;
    }
    // SAFETY: the current task exists; its saved registers are read through a helper that checks, one by one since all
    // of them take a third of the stack. Arguments are still in them at the exit.
    let (fd, arguments, call) = unsafe {
        let saved = bpf_task_pt_regs(bpf_get_current_task_btf()) as *const pt_regs;
        let read = |register: *const u64| bpf_probe_read_kernel(register).ok();
        (read(&raw const (*saved).rdi)?, read(&raw const (*saved).rsi)?, read(&raw const (*saved).orig_rax)?)
    };
    let (mut buffer, mut length) = (arguments, total as u64);
    if call == vectored {
        // struct iovec: base, length.
        buffer = user_word(arguments);
        length = length.min(user_word(arguments + 8));
    }
    let mut transfer = Transfer { fd: fd as i32, buffer, length, total: total as u64, start: [0; TRAIL_START] };
    let seen = below::<{ TRAIL_START as u32 }>(length);
    // SAFETY: at most as many bytes as there is room for.
    unsafe { read_user_raw(transfer.start.as_mut_ptr().cast(), seen, buffer as *const _) };
    Some(transfer)
}

/// `read`, `readv` and `recvfrom` return.
#[tracepoint]
pub fn on_read(ctx: TracePointContext) -> u32 {
    let Some(mut target) = watched(bpf_get_current_pid_tgid() as u32) else { return 0 };
    let Some(read) = transfer(&ctx, &target, SYSCALL_READV) else { return 0 };
    let Some(worker) = worker(target.slot) else { return 0 };
    let key = TaskKey { task_id: worker.task_id, tgid: target.thread.tgid, _pad: 0 };
    let meaning = match trail(&key) {
        Some(trail) => trail.read(read.fd, &read.start, read.length),
        None => {
            let meaning = Trail::first_read(&read.start, read.length);
            if meaning == Read::Begin
                && let Some(empty) = EMPTY_TRAIL.get_ptr(0)
            {
                // SAFETY: this CPU's own value, which nobody writes.
                let _ = TRAILS.insert(&key, unsafe { &*empty }, 0);
            }
            meaning
        }
    };
    let Some(trail) = trail(&key) else { return 0 };
    match meaning {
        Read::Ignore => return 0,
        Read::Begin => {
            if trail.answers != 0 && trail.inherited == 0 {
                // The one before it had this poll until now.
                cut(&mut target, worker);
            }
            trail.begin(read.fd);
        }
        Read::GoOn => {}
    }
    let kept = trail.kept;
    if kept < TRAIL_PIECE as u32 {
        let length = below::<{ TRAIL_PIECE as u32 }>(read.length);
        // SAFETY: the second half has room for a whole piece from any place in the first.
        let got = unsafe {
            let to = trail.read.as_mut_ptr().add(below::<{ TRAIL_PIECE as u32 }>(u64::from(kept)) as usize);
            read_user_raw(to.cast(), length, read.buffer as *const _)
        };
        if got == 0 {
            trail.kept = kept + length;
        }
    }
    trail.read_length += read.total;
    0
}

/// `write`, `writev` and `sendto` return.
#[tracepoint]
pub fn on_write(ctx: TracePointContext) -> u32 {
    let Some(mut target) = watched(bpf_get_current_pid_tgid() as u32) else { return 0 };
    let Some(written) = transfer(&ctx, &target, SYSCALL_WRITEV) else { return 0 };
    let Some(worker) = worker(target.slot) else { return 0 };
    let key = TaskKey { task_id: worker.task_id, tgid: target.thread.tgid, _pad: 0 };
    let Some(trail) = trail(&key) else { return 0 };
    if trail.fd != written.fd || trail.inherited != 0 {
        return 0;
    }
    if !is_answer(&written.start) {
        trail.answer_length += written.total;
        return 0;
    }
    // What follows may be the next request's, when several came at once.
    cut(&mut target, worker);
    trail.answers += 1;
    trail.answer_length = written.total;
    let length = below::<{ TRAIL_ANSWER as u32 }>(written.length);
    // SAFETY: at most as many bytes as there is room for.
    let got = unsafe { read_user_raw(trail.answer.as_mut_ptr().cast(), length, written.buffer as *const _) };
    trail.answer_kept = if got == 0 { length } else { 0 };
    0
}

/// The poll goes on, but not necessarily for the same request.
#[inline(always)]
fn cut(target: &mut Watched, worker: &mut Worker) {
    let now = now();
    let ended = target.clock.end_step(now);
    finish(target, worker, ended);
    target.clock.begin_step(now, STEP_PROBED);
}
