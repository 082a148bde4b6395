//! How right loopguard is: a server that knows what it did, a seeded load, and a scorer.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

use super::rig::{Rig, on_cpu};
use super::{output, table};
use crate::companion::Companion;
use crate::step::{self, say};

/// What loopguard is told to report; scored at 50 ms as well.
const THRESHOLD: &str = "--threshold=10ms";

struct Case {
    tool: Tool,
    event_loop: &'static str,
    profile: &'static str,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Tool {
    /// With no change to the server; `--steps`.
    Loopguard(&'static str),
    /// The server has the middleware of `loopguard-emit`.
    LoopguardTold,
    /// Middleware in the server.
    FastapiLoopguard,
    /// asyncio's own `slow_callback_duration`.
    DebugMode,
    /// From outside, by samples alone.
    PySpy,
}

impl Tool {
    fn name(self) -> String {
        match self {
            Self::Loopguard(steps) => format!("loopguard --steps {steps}"),
            Self::LoopguardTold => "loopguard with USDT".to_owned(),
            Self::FastapiLoopguard => "fastapi-loopguard".to_owned(),
            Self::DebugMode => "asyncio's debug mode".to_owned(),
            Self::PySpy => "py-spy record".to_owned(),
        }
    }
}

const fn case(tool: Tool, event_loop: &'static str, profile: &'static str) -> Case {
    Case { tool, event_loop, profile }
}

const CASES: [Case; 14] = [
    case(Tool::Loopguard("auto"), "uvloop", "realistic"),
    case(Tool::Loopguard("off"), "uvloop", "realistic"),
    case(Tool::LoopguardTold, "uvloop", "realistic"),
    case(Tool::FastapiLoopguard, "uvloop", "realistic"),
    case(Tool::Loopguard("auto"), "uvloop", "mixed"),
    case(Tool::Loopguard("off"), "uvloop", "mixed"),
    case(Tool::LoopguardTold, "uvloop", "mixed"),
    case(Tool::FastapiLoopguard, "uvloop", "mixed"),
    case(Tool::Loopguard("auto"), "asyncio", "realistic"),
    case(Tool::Loopguard("off"), "asyncio", "realistic"),
    case(Tool::DebugMode, "asyncio", "realistic"),
    case(Tool::DebugMode, "asyncio", "mixed"),
    case(Tool::PySpy, "asyncio", "realistic"),
    case(Tool::PySpy, "asyncio", "mixed"),
];

pub fn run(rig: &Rig, seconds: u32) -> Result<Value> {
    rig.install_package()?;
    let py_spy = rig.py_spy();
    if let Err(error) = &py_spy {
        say(&format!("going on without py-spy: {error:#}"));
    }
    let mut results = Map::new();
    for case in &CASES {
        let name = format!("{}, {} {}", case.tool.name(), case.event_loop, case.profile);
        let is_missing = match case.tool {
            Tool::FastapiLoopguard => rig.in_process.is_none(),
            Tool::PySpy => py_spy.is_err(),
            Tool::Loopguard(_) | Tool::LoopguardTold | Tool::DebugMode => false,
        };
        if is_missing {
            continue;
        }
        say(&format!("{name}, {seconds} s"));
        results.insert(name, one(rig, case, seconds)?);
    }
    for threshold in ["at_50ms", "at_10ms"] {
        print(&results, threshold);
    }
    Ok(Value::Object(results))
}

fn one(rig: &Rig, case: &Case, seconds: u32) -> Result<Value> {
    let (truth, reports) = (rig.folder.join("truth.jsonl"), rig.folder.join("reports.jsonl"));
    let _ = fs::remove_file(&reports);
    let mut environment = vec![("BENCH_TRUTH", truth.as_path())];
    let mut python = rig.python();
    let mut steps = None;
    match case.tool {
        Tool::Loopguard(which) => steps = Some(which),
        Tool::LoopguardTold => {
            steps = Some("auto");
            environment.push(("BENCH_MIDDLEWARE", Path::new("1")));
        }
        Tool::FastapiLoopguard => {
            python = rig.in_process.as_ref().context("no fastapi-loopguard")?.python();
            environment.extend([("BENCH_IN_PROCESS", Path::new("1")), ("BENCH_REPORTS", reports.as_path())]);
        }
        Tool::PySpy => {}
        Tool::DebugMode => environment.push(("BENCH_DEBUG", reports.as_path())),
    }
    let server = rig.serve(&python, case.event_loop, &environment)?;
    let steps = steps.map(|steps| format!("--steps={steps}"));
    let watching = steps.map(|steps| rig.attach(server.process.pid(), &[THRESHOLD, steps.as_str()])).transpose()?;
    let sampling =
        (case.tool == Tool::PySpy).then(|| Sampling::start(rig, server.process.pid(), seconds)).transpose()?;
    let mut load = rig.script("load.py");
    load.args([&format!("--port={}", server.port), &format!("--seconds={seconds}"), "--profile", case.profile]);
    let sent: Value = serde_json::from_str(&output(&mut load).context("the load failed")?)?;
    let summary = match (watching, sampling) {
        (Some(watching), _) => {
            let events = watching.events.clone();
            let summary = watching.stop()?;
            fs::copy(events, &reports)?;
            Some(summary)
        }
        (None, Some(sampling)) => {
            fs::write(&reports, sampling.blocks(rig)?)?;
            None
        }
        (None, None) => None,
    };
    // Its truth is whole when it has ended.
    drop(server);
    let mut score: Value =
        serde_json::from_str(&output(rig.script("score.py").arg(&truth).arg(&reports)).context("the scorer failed")?)?;
    score["load"] = sent;
    if let Some(summary) = summary {
        ensure!(summary["type"] == "summary", "loopguard ended without a summary");
        score["lost_records"] = summary["lost_records"].clone();
        score["self_cpu_ms"] = summary["self_cpu_ms"].clone();
        score["requests_told"] = summary["requests"].clone();
        score["watched_s"] = json!(summary["duration_s"]);
    }
    Ok(score)
}

/// py-spy's look at a server.
struct Sampling {
    process: Companion,
    trace: PathBuf,
    /// `CLOCK_MONOTONIC` when it said that it samples: its own times count from about there.
    start_ns: i128,
}

impl Sampling {
    /// Samples a second, as often as py-spy does by default.
    const RATE: &str = "100";
    /// Beyond the load.
    const LONGER: u32 = 3;
    const PATIENCE: Duration = Duration::from_secs(20);

    fn start(rig: &Rig, pid: u32, seconds: u32) -> Result<Self> {
        let (trace, says) = (rig.folder.join("py-spy.json"), rig.folder.join("py-spy.log"));
        let _ = fs::remove_file(&trace);
        let output = File::create(&says)?;
        let mut command = on_cpu(1, &rig.py_spy()?);
        // Idle threads too: a loop that sleeps in a handler is blocked.
        command
            .args(["record", "--idle", "--format=chrometrace", "--rate", Self::RATE, "--pid", &pid.to_string()])
            .args(["--duration", &(seconds + Self::LONGER).to_string(), "--output"])
            .arg(&trace)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        let mut process = Companion::start(&mut command)?;
        let since = Instant::now();
        while !fs::read_to_string(&says)?.contains("Sampling process") {
            ensure!(process.ended().is_none(), "py-spy ended:\n{}", step::tail(&says));
            ensure!(since.elapsed() < Self::PATIENCE, "py-spy does not sample:\n{}", step::tail(&says));
            thread::sleep(Duration::from_millis(1));
        }
        Ok(Self { process, trace, start_ns: monotonic_ns() })
    }

    /// What of it a reader of its samples could call blocks.
    fn blocks(mut self, rig: &Rig) -> Result<String> {
        let since = Instant::now();
        while self.process.ended().is_none() {
            ensure!(since.elapsed() < Self::PATIENCE, "py-spy does not end");
            thread::sleep(Duration::from_millis(20));
        }
        let mut read = rig.script("py_spy_blocks.py");
        read.arg(&self.trace).arg(self.start_ns.to_string()).arg("bench/app.py");
        let blocks = output(&mut read).context("py-spy's trace cannot be read")?;
        ensure!(!blocks.is_empty(), "py-spy saw nothing of the application");
        Ok(blocks)
    }
}

fn monotonic_ns() -> i128 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: fills the struct it is given.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec)
}

fn print(results: &Map<String, Value>, threshold: &str) {
    let columns = [
        ("blocks", "true_blocks"),
        ("recall", "recall"),
        ("precision", "precision"),
        ("error median, ms", "duration_error_ms_median"),
        ("p95, ms", "duration_error_ms_p95"),
        ("attribution precision", "attribution_precision"),
        ("attribution recall", "attribution_recall"),
        ("background blamed", "background_blamed"),
    ];
    let show = |value: &Value| if value.is_null() { "-".to_owned() } else { value.to_string() };
    let rows: Vec<Vec<String>> = results
        .iter()
        .map(|(name, score)| {
            let figures = columns.iter().map(|(_, field)| show(&score[threshold][field]));
            [name.clone()].into_iter().chain(figures).chain([show(&score["lost_records"])]).collect()
        })
        .collect();
    let head: Vec<&str> =
        [threshold].into_iter().chain(columns.iter().map(|(title, _)| *title)).chain(["lost"]).collect();
    table(&head, &rows);
}
