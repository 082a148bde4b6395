//! Scripted blocks and figures for the tests of the live screen.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use super::{Dashboard, Source, SourceAt, Target};
use crate::core::event::{Frame, FrameKind, How, LoopInfo, Origin, Owner, RequestFacts, Runtime, Stack, StepMarks};
use crate::core::incident::{
    Attribution, Blame, Cumulative, Incident, LineShare, Ongoing, OwnerShare, Split, Update, Victims, WaitTotal,
};
use crate::core::status::{Status, ThreadStatus};

pub const TID: u32 = 1235;
const THRESHOLD_NS: u64 = 50_000_000;

pub fn ms(ms: u64) -> u64 {
    ms * 1_000_000
}

/// `METHOD /path`, or `-name` for a background task.
pub fn block_at(who: &str, at: Range<u64>) -> Incident {
    let ns = at.end - at.start;
    Incident {
        on: Arc::new(thread()),
        start_ns: at.start,
        end_ns: at.end,
        threshold_ns: THRESHOLD_NS,
        split: Split { on_cpu_ns: ns, ..Split::default() },
        waits: Vec::new(),
        blame: Blame { owner: owner(who), attribution: Attribution::Exact, stack: stack("view < run.loop") },
        victims: None,
        hint: None,
        cut_at_attach: false,
    }
}

pub fn block(who: &str, for_ms: u64) -> Incident {
    block_at(who, 0..ms(for_ms))
}

pub fn ongoing_at(who: &str, at: Range<u64>) -> Ongoing {
    let Incident { on, threshold_ns, blame, .. } = block_at(who, at.clone());
    Ongoing { on, start_ns: at.start, now_ns: at.end, threshold_ns, blame, hint: None }
}

pub fn status_at(now_ns: u64) -> Status {
    let thread = ThreadStatus {
        info: thread(),
        is_gone: false,
        threshold_ns: THRESHOLD_NS,
        ticks: now_ns / 1_000_000,
        busy_ns: now_ns / 5,
        tick_histogram: Default::default(),
        step_start_ns: None,
    };
    Status {
        since_ns: 0,
        now_ns,
        threads: vec![thread],
        lost_records: 0,
        records: Default::default(),
        unsymbolized: 0,
        self_cpu: Duration::from_nanos(now_ns / 200),
        ..Status::default()
    }
}

pub fn thread() -> LoopInfo {
    LoopInfo {
        pid: 1234,
        tid: TID,
        thread: "uvicorn".to_owned(),
        runtime: Runtime::Uvloop,
        worker: None,
        steps: StepMarks::Exact,
    }
}

fn owner(who: &str) -> Owner {
    if let Some(task) = who.strip_prefix('-') {
        return Owner::NoRequest { task: Some(task.to_owned()) };
    }
    let (method, path) = who.split_once(' ').expect("a method and a path");
    let route = path.rsplit_once('/').filter(|(_, id)| id.chars().all(|char| char.is_ascii_digit()));
    let request = RequestFacts {
        id: format!("req-{}", path.len()),
        method: Some(method.to_owned()),
        path: path.to_owned(),
        route: Some(route.map_or(path.to_owned(), |(before, _)| format!("{before}/{{id}}"))),
        client: Some("10.0.0.9:41022".to_owned()),
        trace_id: None,
    };
    Owner::Request { request: Arc::new(request), how: How::AsgiFrame }
}

/// `inner < outer`, innermost first; a name with a dot is a library's function, any other the user's.
pub fn stack(text: &str) -> Arc<Stack> {
    let frame = |name: &str| {
        let is_library = name.contains('.');
        let library = format!("/venv/lib/python3.12/site-packages/{}/core.py", name.split('.').next().unwrap_or(name));
        Arc::new(Frame {
            kind: FrameKind::Python,
            origin: if is_library { Origin::Library } else { Origin::User },
            function: name.into(),
            file: Some(if is_library { library.into() } else { "/srv/shop/app.py".into() }),
            line: Some(40 + name.len() as u32),
            module: None,
        })
    };
    let frames = text.split('<').map(str::trim).filter(|name| !name.is_empty()).map(frame).collect();
    Arc::new(Stack { frames, incomplete: None })
}

const SERVER: &str = "starlette.app < starlette.__call__ < fastapi.__call__ < uvicorn.run_asgi";

/// A shop server that was watched for a while: blocks of every kind, a library's notice, figures.
pub fn shop() -> Dashboard {
    let mut dashboard = Dashboard::default();
    dashboard.found(Target {
        pid: 1234,
        command: "/venv/bin/python -m uvicorn app:app --port 8000".to_owned(),
        language: "CPython 3.12.1".to_owned(),
    });
    dashboard.status(&status_at(ms(178_000)));
    let wait = |syscall: &str, on: &str, ns| WaitTotal {
        syscall: syscall.to_owned(),
        on: Some(on.to_owned()).filter(|on| !on.is_empty()),
        ns,
    };
    for round in 0..24u64 {
        let at = 100_000 + round * 3_200;
        let order = at..at + 62 + round % 5 * 9;
        let mut block = block_at(&format!("POST /orders/{round}"), ms(order.start)..ms(order.end));
        block.blame.stack = stack(&format!("urllib.urlopen < charge < place_order < {SERVER}"));
        let ns = block.duration_ns();
        block.split = Split { on_cpu_ns: ms(2), waiting_ns: ns - ms(2) - 600_000, gil_ns: 0, run_queue_ns: 600_000 };
        block.waits = vec![wait("poll", "127.0.0.1:36701", ns - ms(3)), wait("futex", "", 400_000)];
        block.hint = Some("use httpx.AsyncClient, or asyncio.to_thread");
        block.victims = Some(victims(&["GET /health", "GET /items/7", "GET /items/9"], ns));
        dashboard.update(&Update::Block(block));
        if round % 3 == 0 {
            let mut block = block_at("GET /catalogue/export", ms(at + 700)..ms(at + 884));
            block.blame.stack = stack(&format!("fastapi.jsonable_encoder < export_catalogue < {SERVER}"));
            dashboard.update(&Update::Block(block));
        }
        if round % 4 == 1 {
            let mut block = block_at("-housekeeping", ms(at + 1500)..ms(at + 1553));
            block.blame.stack = stack("drop_old_sessions < housekeeping < asyncio.run");
            block.split = Split { waiting_ns: block.duration_ns(), ..Split::default() };
            block.waits = vec![wait("clock_nanosleep", "", ms(53))];
            dashboard.update(&Update::Block(block));
        }
        if round % 6 == 2 {
            let mut block = block_at(&format!("GET /items/{round}"), ms(at + 2000)..ms(at + 2120));
            block.split = Split { on_cpu_ns: ms(10), waiting_ns: ms(5), gil_ns: ms(105), run_queue_ns: 0 };
            block.blame.attribution = Attribution::Inferred;
            dashboard.update(&Update::Block(block));
            let mut block = block_at(&format!("GET /items/{round}"), ms(at + 2500)..ms(at + 2590));
            block.split = Split { on_cpu_ns: ms(30), waiting_ns: 0, gil_ns: 0, run_queue_ns: ms(60) };
            dashboard.update(&Update::Block(block));
        }
    }
    dashboard.update(&Update::Cumulative(many_steps(ms(176_000)..ms(176_900))));
    dashboard.status(&status_at(ms(179_000)));
    dashboard.at(ms(180_000));
    dashboard
}

fn victims(names: &[&str], ns: u64) -> Victims {
    let request = |name: &&str| match owner(name) {
        Owner::Request { request, .. } => request,
        Owner::NoRequest { .. } | Owner::Task { .. } | Owner::Unknown(_) => unreachable!(),
    };
    let count = names.len() as u64;
    Victims { count, delay_ns: count * ns, requests: names.iter().map(request).collect(), unread: 0 }
}

/// Short steps of one request that added up.
pub fn many_steps(at: Range<u64>) -> Cumulative {
    let Incident { on, blame, .. } = block_at("GET /feed", at.clone());
    let stack = stack(&format!("json.dumps < render < feed < {SERVER}"));
    let (total_ns, count) = (ms(640), 45);
    let share = |who: &str, ns, count| OwnerShare { owner: owner(who), attribution: Attribution::Exact, ns, count };
    Cumulative {
        on,
        start_ns: at.start,
        end_ns: at.end,
        window_ns: ms(1_000),
        threshold_ns: ms(500),
        total_ns,
        count,
        split: Split { on_cpu_ns: ms(600), waiting_ns: 0, gil_ns: ms(40), run_queue_ns: 0 },
        waits: Vec::new(),
        blame: Blame { stack: Arc::clone(&stack), ..blame },
        owners: vec![share("GET /feed", ms(600), 42), share("-housekeeping", ms(40), 3)],
        lines: vec![LineShare { stack, ns: total_ns, count }],
        hint: None,
    }
}

/// The file behind the shop's stacks.
pub fn with_source(mut dashboard: Dashboard) -> Dashboard {
    while let Some(at) = dashboard.wanted_source() {
        let lines = (at.line - 3..=at.line + 3).map(|line| {
            let text = match line - (at.line - 3) {
                2 => "    body = json.dumps({\"item\": order.item}).encode()",
                3 => "    with urlopen(request, timeout=5) as response:  # waits for another server",
                4 => "        return json.load(response)",
                5 => "",
                _ => "# more of the shop",
            };
            (line, text.to_owned())
        });
        let source = Source::Lines { lines: lines.collect(), is_newer: false };
        dashboard.source_read(SourceAt { ..at }, source);
    }
    dashboard
}

/// Names that try to be something else.
pub fn hostile() -> Dashboard {
    let mut dashboard = Dashboard::default();
    dashboard.found(Target {
        pid: 1234,
        command: "\x1b]0;owned\x07 python\r\n\u{202e}nohtyp".to_owned(),
        language: "CPython 3.12.1".to_owned(),
    });
    dashboard.status(&status_at(ms(9_000)));
    let names = [
        "/\x1b[2J\x1b[1;1H\x07\r\nfake row\t\0\u{9b}31m".to_owned(),
        format!("/{}", "very-long-".repeat(400)),
        "/漢字/かな漢字交じり文/🦀🦀🦀🦀🦀🦀🦀🦀🦀🦀🦀🦀🦀🦀🦀🦀🦀🦀🦀🦀🦀🦀🦀🦀🦀🦀🦀🦀🦀🦀".to_owned(),
        "/שלום/עולם 12".to_owned(),
        "/مرحبا/بالعالم 34".to_owned(),
        "/\u{202e}gnp.exe\u{2066}a\u{2069}\u{200b}\u{feff}".to_owned(),
        format!("/zalgo{}", "\u{300}\u{301}\u{302}\u{336}".repeat(30)),
        "/👨\u{200d}👩\u{200d}👧\u{fe0f}/☺\u{fe0f}/👍🏽/🇩🇪".to_owned(),
        "".to_owned(),
        "\u{fffd}\u{fffd}\u{e000}\u{10ffff}\u{ad}soft".to_owned(),
    ];
    for (index, name) in (0..).zip(&names) {
        let mut block = block_at("GET /", ms(1_000 + index * 500)..ms(1_060 + index * 500));
        let Owner::Request { request, .. } = &mut block.blame.owner else { unreachable!() };
        let request = Arc::make_mut(request);
        request.path = name.clone();
        request.route = Some(name.clone());
        request.id = name.clone();
        request.method = Some(name.chars().take(5).collect());
        request.client = Some(name.clone());
        block.on = Arc::new(LoopInfo { thread: name.chars().take(15).collect(), ..thread() });
        let frame = Frame {
            kind: FrameKind::Python,
            origin: Origin::User,
            function: name.as_str().into(),
            file: Some(format!("/srv/{name}.py").into()),
            line: Some(7),
            module: Some(name.as_str().into()),
        };
        let library = Frame { origin: Origin::Library, ..frame.clone() };
        let frames = vec![Arc::new(library), Arc::new(frame)];
        block.blame.stack = Arc::new(Stack { frames, incomplete: Some("too deep") });
        block.waits = vec![WaitTotal { syscall: "read".to_owned(), on: Some(name.clone()), ns: ms(50) }];
        dashboard.update(&Update::Block(block));
        dashboard.notice(name);
    }
    let last = names.len() as u64;
    let open = dashboard.live().recent[last as usize - 7].block.clone();
    let blame = open.blame().clone();
    let now_ns = ms(9_900);
    let open =
        Ongoing { on: open.on().clone(), start_ns: ms(9_000), now_ns, threshold_ns: THRESHOLD_NS, blame, hint: None };
    dashboard.update(&Update::Ongoing(open));
    while let Some(at) = dashboard.wanted_source() {
        let lines = (0..).zip(&names).map(|(line, name)| (at.line + line - 1, name.clone())).take(7).collect();
        dashboard.source_read(at, Source::Lines { lines, is_newer: true });
    }
    dashboard.at(ms(10_000));
    dashboard
}
