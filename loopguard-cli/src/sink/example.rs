//! Updates for the tests of the sinks.

use std::sync::Arc;
use std::time::Duration;

use crate::core::event::*;
use crate::core::incident::{
    Attribution, Blame, Cumulative, Incident, LineShare, Ongoing, OwnerShare, Split, Victims, WaitTotal,
};
use crate::core::request::{EndedRequest, Held, RequestCounts};
use crate::core::status::RecordCounts;
use crate::core::summary::{LineLabel, Measured, RouteLabel, Summary, ThreadTotal, Total};

const START_NS: u64 = 1_234_567_890;

pub fn block() -> Incident {
    Incident {
        on: thread("uvicorn"),
        start_ns: START_NS,
        end_ns: START_NS + 52_345_678,
        threshold_ns: 50_000_000,
        split: Split { on_cpu_ns: 1_845_678, waiting_ns: 50_000_000, gil_ns: 400_000, run_queue_ns: 100_000 },
        waits: vec![
            WaitTotal { syscall: "recvfrom".to_owned(), on: Some("127.0.0.1:5432".to_owned()), ns: 49_900_000 },
            WaitTotal { syscall: "futex".to_owned(), on: None, ns: 500_000 },
        ],
        blame: Blame { owner: request("/items/7", "abc-123"), attribution: Attribution::Exact, stack: stack() },
        victims: None,
        hint: None,
        cut_at_attach: false,
    }
}

pub fn block_with_victims() -> Incident {
    let named = |path: &str, id: &str| match request(path, id) {
        Owner::Request { request, .. } => request,
        Owner::NoRequest { .. } | Owner::Task { .. } | Owner::Unknown(_) => unreachable!(),
    };
    let requests = (1..=5).map(|number| named(&format!("/items/{number}"), &format!("v-{number}"))).collect();
    let victims = Victims { count: 5, delay_ns: 5 * 52_345_678, requests, unread: 2 };
    let hint = Some("this PostgreSQL driver is synchronous: use psycopg's AsyncConnection or asyncpg");
    Incident { victims: Some(victims), hint, ..block() }
}

pub fn cumulative() -> Cumulative {
    let Incident { on, blame, .. } = block();
    let share =
        |owner: &Owner, ns, count| OwnerShare { owner: owner.clone(), attribution: Attribution::Exact, ns, count };
    Cumulative {
        on,
        start_ns: START_NS,
        end_ns: START_NS + 612_000_000,
        window_ns: 1_000_000_000,
        threshold_ns: 200_000_000,
        total_ns: 300_000_000,
        count: 20,
        split: Split { on_cpu_ns: 10_000_000, waiting_ns: 285_000_000, gil_ns: 0, run_queue_ns: 5_000_000 },
        owners: vec![share(&blame.owner, 240_000_000, 16), share(&request("/items/8", "abc-124"), 60_000_000, 4)],
        lines: vec![
            LineShare { stack: stack(), ns: 285_000_000, count: 19 },
            LineShare { stack: library_stack(), ns: 15_000_000, count: 1 },
        ],
        waits: vec![WaitTotal {
            syscall: "recvfrom".to_owned(),
            on: Some("127.0.0.1:5432".to_owned()),
            ns: 285_000_000,
        }],
        hint: Some("this PostgreSQL driver is synchronous: use psycopg's AsyncConnection or asyncpg"),
        blame,
    }
}

pub fn ongoing() -> Ongoing {
    let Incident { on, start_ns, threshold_ns, blame, .. } = block();
    Ongoing { on, start_ns, now_ns: start_ns + 2_000_000_000, threshold_ns, blame, hint: None }
}

pub fn ended_request() -> EndedRequest {
    let Owner::Request { request, .. } = request("/items/7", "abc-123") else { unreachable!() };
    EndedRequest {
        pid: 1234,
        facts: request,
        status: Some(200),
        start_ns: START_NS,
        end_ns: START_NS + 90_000_000,
        held: Held {
            ns: 60_500_000,
            off_cpu: OffCpu { waiting_ns: 50_000_000, gil_ns: 400_000, run_queue_ns: 100_000 },
            blocked_ns: 52_345_678,
            longest_ns: 52_345_678,
            steps: 4,
            blocks: 1,
        },
        is_complete: true,
    }
}

/// Every string tries to be something else.
pub fn hostile_block() -> Incident {
    let path = format!("/\x1b]0;owned\x07\r\n{{\"type\":\"block\"}}\u{202e}txt.exe\u{9b}31m{}", "x".repeat(1000));
    let frame = Frame {
        function: "f\nuser code".into(),
        file: Some("/srv/shop/\u{2066}evil\u{2069}.py\t".into()),
        ..(*frame(Origin::User, "", "", 3)).clone()
    };
    let mut block = block();
    block.on = thread("w\x1b[2J");
    block.waits[0].on = Some("sock\u{2028}et".to_owned());
    block.blame.owner = request(&path, "id\nverdict: host");
    block.blame.stack = Arc::new(Stack { frames: vec![Arc::new(frame)], incomplete: None });
    block
}

pub fn stack() -> Arc<Stack> {
    let frames = vec![
        native("__recv", "libc.so.6"),
        frame(Origin::Library, "wait", "/venv/lib/python3.12/site-packages/psycopg/waiting.py", 228),
        frame(Origin::User, "Store.load", "/srv/shop/store.py", 41),
        frame(Origin::User, "read_item", "/srv/shop/api/items.py", 12),
        frame(Origin::Runtime, "Handle._run", "/usr/lib/python3.12/asyncio/events.py", 88),
    ];
    Arc::new(Stack { frames, incomplete: None })
}

pub fn library_stack() -> Arc<Stack> {
    let frames = vec![frame(Origin::Library, "dumps", "/venv/lib/python3.12/site-packages/orjson/core.py", 5)];
    Arc::new(Stack { frames, incomplete: None })
}

pub fn summary() -> Summary {
    let total = |blocks, blocked_ms: u64, longest_ms: u64| Total {
        blocks,
        blocked_ns: blocked_ms * 1_000_000,
        longest_ns: longest_ms * 1_000_000,
    };
    let route = RouteLabel::Route { method: Some("GET".to_owned()), route: "/items/{id}".to_owned() };
    let line = LineLabel::Line {
        file: Some("/srv/shop/store.py".to_owned()),
        line: Some(41),
        function: "Store.load".to_owned(),
        called: Some("wait".to_owned()),
    };
    Summary {
        threshold_ns: 50_000_000,
        measured: Measured {
            duration: Duration::from_millis(30_000),
            ticks: [(1235, 48_211)].into(),
            lost_records: 0,
            records: RecordCounts { sent: 61, received: 61, lost: 0 },
            requests: RequestCounts::default(),
            unsymbolized: 2,
            stacks: Default::default(),
            self_cpu: Duration::from_micros(210_400),
            limited: Duration::ZERO,
            unwatched: Duration::ZERO,
        },
        total: total(12, 1240, 181),
        routes: vec![(route, total(10, 1100, 181)), (RouteLabel::NoRequest, total(2, 140, 75))],
        lines: vec![(line, total(11, 1180, 181)), (LineLabel::NoUserCode, total(1, 60, 60))],
        victims: Vec::new(),
        cumulative: Total::default(),
        excluded: Total::default(),
        threads: vec![ThreadTotal { on: thread("uvicorn"), ticks: 48_211, total: total(12, 1240, 181) }],
        requests: 0,
    }
}

fn thread(name: &str) -> Arc<LoopInfo> {
    let thread = name.to_owned();
    Arc::new(LoopInfo { pid: 1234, tid: 1235, thread, runtime: Runtime::Uvloop, worker: None, steps: StepMarks::Exact })
}

fn request(path: &str, id: &str) -> Owner {
    let request = RequestFacts {
        id: id.to_owned(),
        method: Some("GET".to_owned()),
        path: path.to_owned(),
        route: Some("/items/{id}".to_owned()),
        client: Some("10.0.0.9:41022".to_owned()),
        trace_id: None,
    };
    Owner::Request { request: Arc::new(request), how: How::AsgiFrame }
}

fn frame(origin: Origin, function: &str, file: &str, line: u32) -> Arc<Frame> {
    Arc::new(Frame {
        kind: FrameKind::Python,
        origin,
        function: function.into(),
        file: Some(file.into()),
        line: Some(line),
        module: None,
    })
}

fn native(function: &str, module: &str) -> Arc<Frame> {
    Arc::new(Frame {
        kind: FrameKind::Native,
        origin: Origin::Runtime,
        function: function.into(),
        file: None,
        line: None,
        module: Some(module.into()),
    })
}
