//! What user space's own work costs on one core: events through the profile, records out of bytes, stacks unwound and
//! named. `cargo xtask bench core` puts the figures into a table.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use loopguard::core::event::{
    Capture, CapturedWait, Event, Frame, FrameKind, How, LoopInfo, OffCpu, Origin, Owner, RequestFacts, Runtime, Stack,
    Step, StepMarks,
};
use loopguard::core::profile::{Profile, Settings};
use loopguard::runtime::memory::ProcessMemory;
use loopguard::source::decode::{Record, decode};
use loopguard::symbol::unwind::{End, StackCopy};
use loopguard::symbol::{RawStack, Stacks};
use loopguard_common::records::{
    CAPTURE_BASE, CaptureRecord, RawFrame, RecordHeader, RecordKind, STACK_PAGE, StepRecord,
};

const TID: u32 = 7;
const MS: u64 = 1_000_000;
const THRESHOLD_NS: u64 = 10 * MS;
/// Of one block.
const CAPTURES: u64 = 8;
/// A FastAPI request's.
const PYTHON_FRAMES: usize = 50;
/// Applied between two looks at the clock.
const BLOCKS: u64 = 100;
/// Calls that lead to the measured stack, besides those of the runtime.
const CALLS: u32 = 40;
/// More than they need; a copy ends where the stack does.
const STACK_BYTES: usize = 1 << 20;

criterion_group!(benches, apply, decode_records, stacks);
criterion_main!(benches);

fn apply(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("apply");
    group.throughput(Throughput::Elements(BLOCKS * (CAPTURES + 1)));
    let (mut told, mut profile) = (Story::new(), profile());
    group.bench_function("blocks with eight captures each", |bencher| {
        bencher.iter_batched(
            || (0..BLOCKS).flat_map(|_| told.block()).collect::<Vec<_>>(),
            |events| events.into_iter().map(|event| profile.apply(event).len()).sum::<usize>(),
            BatchSize::LargeInput,
        );
    });
    let blocks = profile.summary(&Default::default()).total.blocks;
    assert!(blocks >= BLOCKS, "{blocks} blocks: the events are no blocks");
    group.throughput(Throughput::Elements(BLOCKS));
    let (mut told, mut profile) = (Story::new(), self::profile());
    group.bench_function("short steps that add up", |bencher| {
        bencher.iter_batched(
            || (0..BLOCKS).map(|_| told.short_step()).collect::<Vec<_>>(),
            |events| events.into_iter().map(|event| profile.apply(event).len()).sum::<usize>(),
            BatchSize::LargeInput,
        );
    });
    group.finish();
}

fn profile() -> Profile {
    let mut profile = Profile::new(Settings::fixed(THRESHOLD_NS));
    profile.apply(Event::LoopFound(LoopInfo {
        pid: 6,
        tid: TID,
        thread: "uvicorn".to_owned(),
        runtime: Runtime::Uvloop,
        worker: None,
        steps: StepMarks::Exact,
    }));
    profile
}

/// Requests that block one after the other, of different paths and on one line each.
struct Story {
    now_ns: u64,
    seq: u64,
    stacks: Vec<Arc<Stack>>,
}

impl Story {
    fn new() -> Self {
        let frame = |function: String, origin| {
            let file = Some("/srv/shop/store.py".into());
            Arc::new(Frame {
                kind: FrameKind::Python,
                origin,
                function: function.into(),
                file,
                line: Some(41),
                module: None,
            })
        };
        let stack = |number: usize| {
            let own = std::iter::once(frame(format!("Store.load_{number}"), Origin::User));
            let others = (1..PYTHON_FRAMES).map(|depth| frame(format!("call_{depth}"), Origin::Library));
            Arc::new(Stack { frames: own.chain(others).collect(), incomplete: None })
        };
        Self { now_ns: MS, seq: 0, stacks: (0..20).map(stack).collect() }
    }

    fn owner(&self) -> Owner {
        let request = RequestFacts {
            id: format!("request-{}", self.seq),
            method: Some("GET".to_owned()),
            path: format!("/items/{}", self.seq),
            route: Some(format!("/items{}/{{id}}", self.seq % 40)),
            client: Some("127.0.0.1:41022".to_owned()),
            trace_id: None,
        };
        Owner::Request { request: Arc::new(request), how: How::AsgiFrame }
    }

    fn step(&mut self, length_ns: u64) -> Step {
        let start_ns = self.now_ns;
        self.now_ns += length_ns + MS;
        self.seq += 1;
        Step {
            tid: TID,
            seq: self.seq,
            tick_start_ns: start_ns,
            start_ns,
            end_ns: start_ns + length_ns,
            off_cpu: OffCpu { waiting_ns: length_ns / 2, gil_ns: 0, run_queue_ns: 0 },
            waits: Vec::new(),
            probed: true,
            told: None,
            cut_at_attach: false,
        }
    }

    /// Captures and then their step.
    fn block(&mut self) -> Vec<Event> {
        let step = self.step(40 * MS);
        let owner = self.owner();
        let mut events: Vec<Event> = (1..=CAPTURES)
            .map(|nth| {
                let at_ns = step.start_ns + nth * 4 * MS;
                Event::Capture(Capture {
                    tid: TID,
                    step_seq: step.seq,
                    step_start_ns: step.start_ns,
                    tick_start_ns: step.tick_start_ns,
                    at_ns,
                    until_ns: at_ns + MS,
                    off_cpu: OffCpu { waiting_ns: nth * MS, gil_ns: 0, run_queue_ns: 0 },
                    wait: Some(CapturedWait {
                        syscall: "recvfrom".to_owned(),
                        arg0: 9,
                        on: Some("127.0.0.1:5432".to_owned()),
                    }),
                    stack: Arc::clone(&self.stacks[step.seq as usize % self.stacks.len()]),
                    owner: owner.clone(),
                })
            })
            .collect();
        events.push(Event::Step(step));
        events
    }

    fn short_step(&mut self) -> Event {
        Event::Step(self.step(6 * MS))
    }
}

fn decode_records(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decode");
    group.throughput(Throughput::Elements(1));
    let header = |kind: RecordKind| RecordHeader { kind: kind as u32, tgid: 6, tid: TID, _pad: 0 };
    // SAFETY: integers through and through, of which all zeroes are a value.
    let (mut step, mut capture) = unsafe { (std::mem::zeroed::<StepRecord>(), std::mem::zeroed::<CaptureRecord>()) };
    step.header = header(RecordKind::Step);
    capture.header = header(RecordKind::Capture);
    capture.frame_count = PYTHON_FRAMES as u32;
    // SAFETY: plain structs of integers without padding that lives as long as the slices.
    let (step, capture) = unsafe { (bytes_of(&step), bytes_of(&capture)) };
    let capture = &capture[..CAPTURE_BASE + PYTHON_FRAMES * size_of::<RawFrame>()];
    assert!(matches!(decode(step), Ok(Record::Step(_))) && matches!(decode(capture), Ok(Record::Capture(_))));
    group.bench_function("a step", |bencher| bencher.iter(|| decode(black_box(step))));
    group.bench_function("a capture of fifty frames", |bencher| bencher.iter(|| decode(black_box(capture))));
    group.finish();
}

/// # Safety
/// `T` must have no padding.
unsafe fn bytes_of<T>(value: &T) -> &[u8] {
    // SAFETY: as many bytes as the value has; the caller vouches that all are initialized.
    unsafe { std::slice::from_raw_parts((&raw const *value).cast(), size_of::<T>()) }
}

/// The stack of a thread of this program, forty calls deep.
fn stacks(criterion: &mut Criterion) {
    let raw = std::thread::spawn(|| deep(CALLS)).join().expect("it only looks at itself");
    let mut warm = Stacks::default();
    let (calls, end) = warm.unwind(&raw);
    assert!(calls.len() > CALLS as usize && end == End::Complete, "{} calls, {end:?}", calls.len());
    let named = warm.name(&raw).stack.frames.iter().filter(|frame| frame.function.contains("deep")).count();
    assert!(named > CALLS as usize, "{named} of its calls have their name");

    let mut group = criterion.benchmark_group("stack of forty calls");
    group.throughput(Throughput::Elements(1));
    group.bench_function("unwound, warm", |bencher| bencher.iter(|| warm.unwind(black_box(&raw))));
    group.bench_function("unwound and named, warm", |bencher| bencher.iter(|| warm.name(black_box(&raw))));
    // Cold: what is read of a process and its files, and of their tables, is read again each time. The files are cached
    // by the system.
    group.sample_size(20);
    group.bench_function("unwound, cold", |bencher| {
        bencher.iter_batched_ref(Stacks::default, |cold| cold.unwind(black_box(&raw)), BatchSize::PerIteration);
    });
    group.bench_function("unwound and named, cold", |bencher| {
        bencher.iter_batched_ref(Stacks::default, |cold| cold.name(black_box(&raw)), BatchSize::PerIteration);
    });
    group.finish();
}

#[inline(never)]
fn deep(calls: u32) -> RawStack {
    let raw = if calls == 0 { own_stack() } else { deep(black_box(calls - 1)) };
    // Not a tail call.
    black_box(raw)
}

/// Registers and stack as they are here.
#[inline(never)]
fn own_stack() -> RawStack {
    // SAFETY: all zeroes are a value of it, and the call fills it.
    let context = unsafe {
        let mut context: libc::ucontext_t = std::mem::zeroed();
        assert_eq!(libc::getcontext(&raw mut context), 0);
        context
    };
    // By DWARF number.
    let order = [
        libc::REG_RAX,
        libc::REG_RDX,
        libc::REG_RCX,
        libc::REG_RBX,
        libc::REG_RSI,
        libc::REG_RDI,
        libc::REG_RBP,
        libc::REG_RSP,
        libc::REG_R8,
        libc::REG_R9,
        libc::REG_R10,
        libc::REG_R11,
        libc::REG_R12,
        libc::REG_R13,
        libc::REG_R14,
        libc::REG_R15,
        libc::REG_RIP,
    ];
    let registers = order.map(|register| Some(context.uc_mcontext.gregs[register as usize] as u64));
    let sp = context.uc_mcontext.gregs[libc::REG_RSP as usize] as u64;
    let start = sp & !(STACK_PAGE as u64 - 1);
    let pid = std::process::id();
    let bytes = ProcessMemory { pid }.bytes_up_to(start, STACK_BYTES);
    RawStack { pid, copy: StackCopy { registers, start, bytes }, ..RawStack::default() }
}
