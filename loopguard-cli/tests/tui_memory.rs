//! The live view's memory over a day of blocks: it is bounded by what it keeps, not by how long it runs.
//!
//! `LOOPGUARD_TUI_DAY=1 cargo test --release -p loopguard --test tui_memory -- --nocapture` feeds a whole day.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use loopguard::core::event::{Frame, FrameKind, How, LoopInfo, Origin, Owner, RequestFacts, Runtime, Stack, StepMarks};
use loopguard::core::incident::{Attribution, Blame, Incident, Ongoing, Split, Update, WaitTotal};
use loopguard::core::status::{Status, ThreadStatus};
use loopguard::sink::text::Times;
use loopguard::tui::draw::draw;
use loopguard::tui::draw::look::{Colours, Glyphs, Look};
use loopguard::tui::state::{Dashboard, Source};
use ratatui::Terminal;
use ratatui::backend::TestBackend;

/// Counts what is allocated and not freed.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);

// SAFETY: the system's allocator does all the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const PER_SECOND: u64 = 100;
const DAY_S: u64 = 24 * 3600;
/// Long enough that the rings and tables of the live view are full.
const SHORT_S: u64 = 60;
const THREADS: u32 = 40;
const FRAMES: usize = 60;
/// As long as loopguard's own bounds let a path be, and longer than any real one.
const PATH: usize = 1024;
const MIB: usize = 1 << 20;

fn thread(number: u64) -> LoopInfo {
    let tid = 100 + (number % u64::from(THREADS)) as u32;
    LoopInfo {
        pid: 99,
        tid,
        thread: "worker".to_owned(),
        runtime: Runtime::Uvloop,
        worker: None,
        steps: StepMarks::Exact,
    }
}

/// No two blocks share a path, a line or what they waited on.
fn block(number: u64, at_ns: u64) -> Incident {
    let frame = |depth: usize| {
        Arc::new(Frame {
            kind: FrameKind::Python,
            origin: if depth % 7 == 3 { Origin::User } else { Origin::Library },
            function: format!("function_{depth}_{}", number % 5000).into(),
            file: Some(format!("/srv/app/module_{depth}.py").into()),
            line: Some((number % 100_000) as u32),
            module: None,
        })
    };
    let name = format!("/{number:0>PATH$}");
    let request = RequestFacts {
        id: name.clone(),
        method: Some("GET".to_owned()),
        path: name.clone(),
        route: None,
        client: Some(name.clone()),
        trace_id: None,
    };
    Incident {
        on: Arc::new(thread(number)),
        start_ns: at_ns,
        end_ns: at_ns + 5_000_000 + number * 7919 % 900_000_000,
        threshold_ns: 5_000_000,
        split: Split { on_cpu_ns: 1_000_000, waiting_ns: 4_000_000, gil_ns: 0, run_queue_ns: 0 },
        waits: vec![WaitTotal { syscall: "recvfrom".to_owned(), on: Some(name), ns: 4_000_000 }],
        blame: Blame {
            owner: Owner::Request { request: Arc::new(request), how: How::AsgiFrame },
            attribution: Attribution::Exact,
            stack: Arc::new(Stack { frames: (0..FRAMES).map(frame).collect(), incomplete: None }),
        },
        victims: None,
        hint: None,
        cut_at_attach: false,
    }
}

fn status(now_ns: u64) -> Status {
    let thread = |number: u32| ThreadStatus {
        info: thread(number.into()),
        is_gone: false,
        threshold_ns: 5_000_000,
        ticks: now_ns / 1_000_000,
        busy_ns: now_ns / 3,
        tick_histogram: Default::default(),
        step_start_ns: None,
    };
    Status {
        since_ns: 0,
        now_ns,
        threads: (0..THREADS).map(thread).collect(),
        lost_records: 0,
        records: Default::default(),
        unsymbolized: 0,
        self_cpu: Duration::from_nanos(now_ns / 100),
        ..Status::default()
    }
}

/// One second of a busy server, drawn at its end.
fn live_a_second(dashboard: &mut Dashboard, terminal: &mut Terminal<TestBackend>, second: u64) {
    let start_ns = second * 1_000_000_000;
    for index in 0..PER_SECOND {
        let number = second * PER_SECOND + index;
        let block = block(number, start_ns + index * 1_000_000_000 / PER_SECOND);
        if index == 0 {
            let Incident { on, start_ns, threshold_ns, blame, hint, .. } = block.clone();
            let now_ns = start_ns + 1_000_000;
            dashboard.update(&Update::Ongoing(Ongoing { on, start_ns, now_ns, threshold_ns, blame, hint }));
            dashboard.notice(&format!("something happened in second {second}"));
        }
        dashboard.update(&Update::Block(block));
    }
    dashboard.status(&status(start_ns + 1_000_000_000));
    let look = Look {
        glyphs: Glyphs::Unicode,
        colours: Colours::Indexed,
        times: Times::SinceStart { start_ns: 0 },
        current_dir: None,
    };
    // Every view in its turn, so that what is built for drawing counts too.
    let key = char::from(b'1' + (second % 6) as u8);
    dashboard.key(crossterm::event::KeyEvent::from(crossterm::event::KeyCode::Char(key)));
    dashboard.at(start_ns + 1_000_000_000);
    let mut hits = None;
    terminal.draw(|frame| hits = Some(draw(dashboard, &look, frame))).unwrap();
    dashboard.drawn(hits.unwrap());
    if let Some(wanted) = dashboard.wanted_source() {
        dashboard.source_read(wanted, Source::Lines { lines: vec![(1, "x".repeat(400)); 7], is_newer: false });
    }
}

fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let field = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib: usize = field.and_then(|field| field.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0);
    kib * 1024
}

#[test]
fn memory_is_bounded() {
    let is_whole_day = std::env::var_os("LOOPGUARD_TUI_DAY").is_some();
    let seconds = if is_whole_day { DAY_S } else { 4 * SHORT_S };
    let mut terminal = Terminal::new(TestBackend::new(120, 40)).unwrap();
    let before = LIVE.load(Ordering::Relaxed);
    let mut dashboard = Dashboard::default();
    let mut early = 0;
    for second in 0..seconds {
        live_a_second(&mut dashboard, &mut terminal, second);
        if second + 1 == SHORT_S {
            early = LIVE.load(Ordering::Relaxed) - before;
        }
        if is_whole_day && second % 3600 == 0 {
            println!(
                "hour {}: {} KiB kept, {} KiB resident",
                second / 3600,
                (LIVE.load(Ordering::Relaxed) - before) / 1024,
                resident() / 1024
            );
        }
    }
    let late = LIVE.load(Ordering::Relaxed) - before;
    println!(
        "after {SHORT_S} s {} KiB, after {seconds} s and {} blocks {} KiB, {} KiB resident",
        early / 1024,
        seconds * PER_SECOND,
        late / 1024,
        resident() / 1024
    );
    assert_eq!(dashboard.picture().blocks, seconds * PER_SECOND);
    assert!(late < 64 * MIB, "{late}");
    // Histograms may still find a bucket that was empty.
    assert!(late < early + early / 10, "{early} after {SHORT_S} s, {late} after {seconds} s");
    // While paused a second picture is kept, which shares the blocks.
    dashboard.key(crossterm::event::KeyEvent::from(crossterm::event::KeyCode::Char('p')));
    assert!(LIVE.load(Ordering::Relaxed) - before < 2 * late);
}
