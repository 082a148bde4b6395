//! Requests as the server itself tells of them, by its USDT probes: their steps, their sums, and what they are called.

use aya_ebpf::{
    EbpfContext as _,
    helpers::generated::{bpf_get_attach_cookie, bpf_ktime_get_ns, bpf_probe_read_user},
    helpers::{bpf_get_current_pid_tgid, bpf_probe_read_kernel},
    macros::{map, uprobe},
    maps::{Array, HashMap},
    programs::ProbeContext,
};
use loopguard_common::{
    clock::EndedStep,
    records::{Counter, NO_SLOT, PollRecord, RecordHeader, RecordKind, SYSCALL_NONE},
    request::{
        Crossing, ProbeArguments, REQUEST_HELD, REQUEST_OPEN_BEFORE, REQUEST_RAN_UNSEEN, Registers, RequestEndRecord,
        RequestKey, RequestRouteRecord, RequestStartRecord, RequestTotals, read_argument,
    },
};

use crate::{
    capture::OwnMemory,
    maps::{PROCESSES, RECORDS, REPORTED_THREADS, Watched, count, watched},
    poll::REPORT_AGAIN_NS,
    send, task,
};

/// What each probe site's arguments are, by the site's index.
#[map]
static PROBE_ARGUMENTS: Array<ProbeArguments> = Array::with_max_entries(1024, 0);

/// The open requests; user space sizes it at load.
#[map]
static REQUESTS: HashMap<RequestKey, RequestTotals> = HashMap::with_max_entries(64, 0);

/// A hit of a probe.
struct Hit {
    ctx: ProbeContext,
    arguments: &'static ProbeArguments,
    tgid: u32,
    tid: u32,
}

impl Registers for Hit {
    #[inline(always)]
    fn word(&self, offset: u16) -> Option<u64> {
        let at = self.ctx.as_ptr() as usize + offset as usize;
        // SAFETY: read through a helper that checks.
        unsafe { bpf_probe_read_kernel(at as *const u64) }.ok()
    }
}

impl Hit {
    #[inline(always)]
    fn new(ctx: ProbeContext) -> Option<Self> {
        // SAFETY: a helper that reads what the probe was attached with.
        let site = unsafe { bpf_get_attach_cookie(ctx.as_ptr()) };
        let arguments = PROBE_ARGUMENTS.get(site as u32)?;
        let id = bpf_get_current_pid_tgid();
        Some(Self { ctx, arguments, tgid: (id >> 32) as u32, tid: id as u32 })
    }

    #[inline(always)]
    fn argument<const N: usize>(&self) -> u64 {
        read_argument(&self.arguments.places[N], self, &OwnMemory).unwrap_or(0)
    }

    /// The request, its id being every probe's first argument.
    #[inline(always)]
    fn key(&self) -> RequestKey {
        RequestKey { id: self.argument::<0>(), tgid: self.tgid, _pad: 0 }
    }

    #[inline(always)]
    fn header(&self, kind: RecordKind) -> RecordHeader {
        RecordHeader { kind: kind as u32, tgid: self.tgid, tid: self.tid, _pad: 0 }
    }
}

#[inline(always)]
fn now() -> u64 {
    // SAFETY: a helper without conditions.
    unsafe { bpf_ktime_get_ns() }
}

#[inline(always)]
fn totals(key: &RequestKey) -> Option<&'static mut RequestTotals> {
    let totals = REQUESTS.get_ptr_mut(key)?;
    // SAFETY: a request's code runs on one thread at a time, so nothing else changes its sums.
    Some(unsafe { &mut *totals })
}

/// Its sums, also of a request that was open before loopguard came.
#[inline(always)]
fn totals_or_new(key: &RequestKey) -> Option<&'static mut RequestTotals> {
    if let Some(known) = totals(key) {
        return Some(known);
    }
    let new = RequestTotals { flags: REQUEST_OPEN_BEFORE, ..RequestTotals::default() };
    if REQUESTS.insert(key, new, 0).is_err() {
        count(Counter::RequestsUntracked);
    }
    totals(key)
}

/// Copies a string of the target, as much of it as there is room for. Returns how much; 0 when it can't be read.
#[inline(always)]
fn copy<const N: usize>(to: *mut [u8; N], address: u64, length: u64) -> u32 {
    let length = if length > N as u64 { N as u32 } else { length as u32 };
    // SAFETY: no more than there is room for.
    let read = unsafe { bpf_probe_read_user(to.cast(), length, address as *const _) };
    if read == 0 { length } else { 0 }
}

#[uprobe]
pub fn on_request_start(ctx: ProbeContext) -> u32 {
    let Some(hit) = Hit::new(ctx) else { return 0 };
    let (key, now) = (hit.key(), now());
    let new = RequestTotals { start_ns: now, ..RequestTotals::default() };
    if REQUESTS.insert(key, new, 0).is_err() {
        count(Counter::RequestsUntracked);
    }
    let Some(mut entry) = RECORDS.reserve::<RequestStartRecord>(0) else {
        count(Counter::Lost);
        return 0;
    };
    let record = entry.as_mut_ptr();
    // SAFETY: every field of the entry is written, or is behind the length that says how much of it counts.
    unsafe {
        (*record).header = hit.header(RecordKind::RequestStart);
        (*record).id = key.id;
        (*record).at_ns = now;
        (*record)._pad = 0;
        (*record).method_length = copy(&raw mut (*record).method, hit.argument::<1>(), hit.argument::<2>());
        (*record).path_length = copy(&raw mut (*record).path, hit.argument::<3>(), hit.argument::<4>());
        (*record).request_id_length = copy(&raw mut (*record).request_id, hit.argument::<5>(), hit.argument::<6>());
    }
    entry.submit(send::NO_WAKEUP);
    count(Counter::Sent);
    0
}

#[uprobe]
pub fn on_request_route(ctx: ProbeContext) -> u32 {
    let Some(hit) = Hit::new(ctx) else { return 0 };
    let Some(mut entry) = RECORDS.reserve::<RequestRouteRecord>(0) else {
        count(Counter::Lost);
        return 0;
    };
    let record = entry.as_mut_ptr();
    // SAFETY: as above.
    unsafe {
        (*record).header = hit.header(RecordKind::RequestRoute);
        (*record).id = hit.argument::<0>();
        (*record).route_length = u64::from(copy(&raw mut (*record).route, hit.argument::<1>(), hit.argument::<2>()));
    }
    entry.submit(send::NO_WAKEUP);
    count(Counter::Sent);
    0
}

#[uprobe]
pub fn on_request_enter(ctx: ProbeContext) -> u32 {
    let Some(hit) = Hit::new(ctx) else { return 0 };
    let key = hit.key();
    let Some(totals) = totals_or_new(&key) else { return 0 };
    match watched(hit.tid) {
        Some(target) => {
            let now = now();
            let crossing = target.clock.enter_request(now, key.id);
            crossed(target, now, crossing);
        }
        None => {
            totals.flags |= REQUEST_RAN_UNSEEN;
            report_thread(&hit);
        }
    }
    0
}

#[uprobe]
pub fn on_request_exit(ctx: ProbeContext) -> u32 {
    let Some(hit) = Hit::new(ctx) else { return 0 };
    if let Some(target) = watched(hit.tid) {
        let now = now();
        let crossing = target.clock.exit_request(now, hit.argument::<0>());
        crossed(target, now, crossing);
    }
    0
}

#[uprobe]
pub fn on_request_end(ctx: ProbeContext) -> u32 {
    let Some(hit) = Hit::new(ctx) else { return 0 };
    let (key, now) = (hit.key(), now());
    // A server that ends a request without having left it.
    if let Some(target) = watched(hit.tid)
        && target.clock.running.current() == key.id
    {
        let crossing = target.clock.exit_request(now, key.id);
        crossed(target, now, crossing);
    }
    let end = RequestEndRecord {
        header: hit.header(RecordKind::RequestEnd),
        id: key.id,
        status: hit.argument::<1>(),
        end_ns: now,
        totals: totals(&key).map_or(RequestTotals::default(), |totals| *totals),
    };
    let _ = REQUESTS.remove(&key);
    let sent = RECORDS.output::<RequestEndRecord>(&end, send::NO_WAKEUP);
    count(if sent.is_ok() { Counter::Sent } else { Counter::Lost });
    0
}

#[inline(always)]
fn crossed(mut target: Watched, now: u64, crossing: Crossing) {
    match crossing {
        Crossing::Edge { left, ended } => {
            let is_held = task::step_of_request(&mut target, ended, left);
            step_of_request(&target, left, ended, is_held);
            if !is_held {
                send::step_if_long(target.thread, target.clock, ended, left);
            }
            target.clock.begin_crossed(now);
        }
        Crossing::Same => {}
        Crossing::Astray => count(Counter::RequestsAstray),
    }
}

/// Adds a step that ended to the sums of the request it was of, if it was one's. `is_held`: whether it blocked is not
/// known yet.
#[inline(always)]
fn step_of_request(target: &Watched, request: u64, ended: EndedStep, is_held: bool) {
    if request == 0 {
        return;
    }
    let key = RequestKey { id: request, tgid: target.thread.tgid, _pad: 0 };
    if let Some(totals) = totals(&key) {
        if is_held {
            totals.flags |= REQUEST_HELD;
        }
        let threshold_ns = if is_held { u64::MAX } else { target.thread.threshold_ns };
        totals.add(ended, target.clock.off_cpu(), threshold_ns);
    }
}

/// The tick's last step has ended, with the tick. A request that was not left will not be.
#[inline(always)]
pub fn tick_ended(target: &mut Watched, ended: EndedStep) {
    let left = target.clock.leave_all_requests();
    if left != 0 {
        step_of_request(target, left, ended, false);
        count(Counter::RequestsAstray);
    }
}

/// A thread that runs requests and is not watched: user space decides what it is.
#[inline(always)]
fn report_thread(hit: &Hit) {
    let at_ns = now();
    // SAFETY: only whether the entry exists matters, or a word that is replaced whole.
    let (process, reported) = unsafe { (PROCESSES.get(hit.tgid), REPORTED_THREADS.get(hit.tid)) };
    if process.is_none() || reported.is_some_and(|at| at_ns - *at < REPORT_AGAIN_NS) {
        return;
    }
    let _ = REPORTED_THREADS.insert(hit.tid, at_ns, 0);
    let header = hit.header(RecordKind::Poll);
    send::poll(&PollRecord { header, at_ns, epoll_fd: -1, syscall: SYSCALL_NONE, timeout_ms: -1, slot: NO_SLOT });
}
