//! How right loopguard is: a server that knows what it did, a seeded load, and a scorer.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

use super::rig::Rig;
use super::{output, table};
use crate::step::say;

/// What loopguard is told to report; scored at 50 ms as well.
const THRESHOLD: &str = "--threshold=10ms";

struct Case {
    event_loop: &'static str,
    profile: &'static str,
    /// `--steps`; none: fastapi-loopguard instead of loopguard.
    steps: Option<&'static str>,
}

const fn case(event_loop: &'static str, profile: &'static str, steps: Option<&'static str>) -> Case {
    Case { event_loop, profile, steps }
}

const CASES: [Case; 8] = [
    case("uvloop", "realistic", Some("auto")),
    case("uvloop", "realistic", Some("off")),
    case("uvloop", "realistic", None),
    case("uvloop", "mixed", Some("auto")),
    case("uvloop", "mixed", Some("off")),
    case("uvloop", "mixed", None),
    case("asyncio", "realistic", Some("auto")),
    case("asyncio", "realistic", Some("off")),
];

pub fn run(rig: &Rig, seconds: u32) -> Result<Value> {
    let mut results = Map::new();
    for case in &CASES {
        let tool = case.steps.map_or("fastapi-loopguard".to_owned(), |steps| format!("loopguard --steps {steps}"));
        let name = format!("{tool}, {} {}", case.event_loop, case.profile);
        if case.steps.is_none() && rig.in_process.is_none() {
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
    if case.steps.is_none() {
        python = rig.in_process.as_ref().context("no fastapi-loopguard")?.python();
        environment.extend([("BENCH_IN_PROCESS", Path::new("1")), ("BENCH_REPORTS", reports.as_path())]);
    }
    let server = rig.serve(&python, case.event_loop, &environment)?;
    let steps = case.steps.map(|steps| format!("--steps={steps}"));
    let watching = steps.map(|steps| rig.attach(server.process.pid(), &[THRESHOLD, steps.as_str()])).transpose()?;
    let mut load = rig.script("load.py");
    load.args([&format!("--port={}", server.port), &format!("--seconds={seconds}"), "--profile", case.profile]);
    let sent: Value = serde_json::from_str(&output(&mut load).context("the load failed")?)?;
    let (reported, summary) = match watching {
        Some(watching) => (watching.events.clone(), Some(watching.stop()?)),
        None => (reports, None),
    };
    // Its truth is whole when it has ended.
    drop(server);
    let mut score: Value =
        serde_json::from_str(&output(rig.script("score.py").arg(&truth).arg(&reported)).context("the scorer failed")?)?;
    score["load"] = sent;
    if let Some(summary) = summary {
        ensure!(summary["type"] == "summary", "loopguard ended without a summary");
        score["lost_records"] = summary["lost_records"].clone();
        score["self_cpu_ms"] = summary["self_cpu_ms"].clone();
        score["watched_s"] = json!(summary["duration_s"]);
    }
    Ok(score)
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
