//! The soak: loopguard watches one server for hours, and its memory, its descriptors and the server's health are
//! written down.
//!
//! The load is light, so that hours of it disturb nobody: a few clients, of whose requests some block the loop.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::bench::rig::{Rig, Server, Watching};
use crate::companion::Companion;
use crate::setup;
use crate::step::say;

const USAGE: &str = "usage: cargo xtask soak --hours N [--json FILE] [--markdown FILE]";

/// Blocks are frequent at this threshold, so that the whole way of an incident is walked all the time.
const THRESHOLD: &str = "--threshold=10ms";
const CLIENTS: u32 = 4;
/// The load comes in segments of this length; each says how many requests were answered.
const SEGMENT: Duration = Duration::from_secs(60);
const SAMPLE_EVERY: Duration = Duration::from_secs(10);
/// What is allocated meanwhile counts as warm-up, or a sixth of the run if that is less.
const WARM_UP: Duration = Duration::from_secs(600);
/// How far memory may move from where it was after the warm-up, by the medians of windows of this length: symbols that
/// are read for a new place come and go within a second, and are no drift.
const ALLOWED_DRIFT: f64 = 0.05;
const WINDOW: Duration = Duration::from_secs(600);
const PERIODIC_SIGN: u32 = 10;

struct Options {
    length: Duration,
    json: Option<PathBuf>,
    markdown: Option<PathBuf>,
}

pub fn run(arguments: &[&str]) -> Result<()> {
    let options = parse(arguments)?;
    ensure!(setup::is_root(), "the soak loads kernel programs: run it as root");
    let mut rig = Rig::prepare()?;
    rig.folder = rig.folder.with_file_name("soak");
    fs::create_dir_all(&rig.folder)?;
    // A copy: builds that happen meanwhile change nothing.
    let copy = rig.folder.join("loopguard");
    let _ = fs::remove_file(&copy);
    fs::copy(&rig.loopguard, &copy)?;
    rig.loopguard = copy;

    let report = soak(&rig, options.length)?;
    let markdown = markdown(&report);
    println!("\n{markdown}");
    let json = options.json.unwrap_or_else(|| rig.folder.join("report.json"));
    fs::write(&json, serde_json::to_string_pretty(&report)? + "\n")
        .with_context(|| format!("write {}", json.display()))?;
    say(&format!("report written to {}", json.display()));
    if let Some(path) = options.markdown {
        fs::write(&path, markdown).with_context(|| format!("write {}", path.display()))?;
    }
    let complaints: Vec<&str> =
        report["complaints"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    ensure!(complaints.is_empty(), "{}", complaints.join("; "));
    Ok(())
}

fn parse(arguments: &[&str]) -> Result<Options> {
    let mut options = Options { length: Duration::ZERO, json: None, markdown: None };
    for option in arguments.chunks(2) {
        match option {
            ["--hours", value] => {
                let hours: f64 = value.parse().with_context(|| format!("`{value}` is no number of hours"))?;
                ensure!((0.01..=1000.0).contains(&hours), "hours are a number from 0.01 to 1000");
                options.length = Duration::from_secs_f64(hours * 3600.0);
            }
            ["--json", value] => options.json = Some(value.into()),
            ["--markdown", value] => options.markdown = Some(value.into()),
            _ => bail!("don't know `{}`\n{USAGE}", option.join(" ")),
        }
    }
    ensure!(!options.length.is_zero(), "{USAGE}");
    Ok(options)
}

/// What the system says of one process at one moment.
#[derive(Clone, Copy, Debug, Default)]
struct Footprint {
    /// Memory that is its own: what a leak would grow.
    anonymous_kib: u64,
    resident_kib: u64,
    descriptors: u64,
    threads: u64,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    at: Duration,
    loopguard: Footprint,
    server: Footprint,
}

fn footprint(pid: u32) -> Result<Footprint> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).with_context(|| format!("process {pid} is gone"))?;
    let number = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse().ok()
    };
    Ok(Footprint {
        anonymous_kib: number("RssAnon:").context("the kernel does not say RssAnon")?,
        resident_kib: number("VmRSS:").unwrap_or(0),
        threads: number("Threads:").unwrap_or(0),
        descriptors: fs::read_dir(format!("/proc/{pid}/fd"))?.count() as u64,
    })
}

fn soak(rig: &Rig, length: Duration) -> Result<Value> {
    let server = rig.serve(&rig.python(), "uvloop", &[])?;
    say(&format!("one minute of load without loopguard, then {:.2} h with it", length.as_secs_f64() / 3600.0));
    let before = load(rig, &server, (0, SEGMENT))?.finish()?;
    let watching = rig.attach(server.process.pid(), &[THRESHOLD])?;
    let (samples, segments) = watch(rig, (&server, &watching), length)?;
    let summary = watching.stop()?;
    ensure!(summary["type"] == "summary", "loopguard ended without a summary");
    let after = load(rig, &server, (1_000_000, SEGMENT))?.finish()?;
    Ok(report(&samples, &Health { before, segments, after }, summary))
}

/// What the load says: without loopguard before, with it, and without it after.
struct Health {
    before: Value,
    segments: Vec<Value>,
    after: Value,
}

fn watch(rig: &Rig, (server, watching): (&Server, &Watching), length: Duration) -> Result<(Vec<Sample>, Vec<Value>)> {
    let started = Instant::now();
    let (mut samples, mut segments) = (Vec::new(), Vec::new());
    while started.elapsed() < length {
        let number = segments.len() as u32;
        let segment = load(rig, server, (number + 1, SEGMENT.min(length - started.elapsed())))?;
        let segment_end = Instant::now() + segment.length;
        while Instant::now() < segment_end {
            thread::sleep(SAMPLE_EVERY.min(segment_end.saturating_duration_since(Instant::now())));
            samples.push(Sample {
                at: started.elapsed(),
                loopguard: footprint(watching.process.pid())?,
                server: footprint(server.process.pid())?,
            });
        }
        segments.push(segment.finish()?);
        if segments.len().is_multiple_of(PERIODIC_SIGN as usize)
            && let Some(last) = samples.last()
        {
            say(&format!(
                "{} min: loopguard {} KiB of its own, {} descriptors",
                last.at.as_secs() / 60,
                last.loopguard.anonymous_kib,
                last.loopguard.descriptors
            ));
        }
    }
    Ok((samples, segments))
}

struct Load {
    process: Companion,
    output: PathBuf,
    length: Duration,
}

/// One segment of load; a seed gives the same requests every time.
fn load(rig: &Rig, server: &Server, (seed, length): (u32, Duration)) -> Result<Load> {
    let output = rig.folder.join("load.json");
    let mut command = rig.script("load.py");
    command
        .args([&format!("--port={}", server.port), &format!("--seconds={}", length.as_secs_f64())])
        .args([&format!("--clients={CLIENTS}"), &format!("--seed={seed}"), "--profile=realistic"])
        .stdout(Stdio::from(fs::File::create(&output)?));
    Ok(Load { process: Companion::start(&mut command)?, output, length })
}

impl Load {
    fn finish(mut self) -> Result<Value> {
        // Requests under way may take their own time limit to end.
        let patience = Instant::now() + self.length + SEGMENT;
        while self.process.ended().is_none() {
            ensure!(Instant::now() < patience, "the load does not end");
            thread::sleep(Duration::from_millis(50));
        }
        serde_json::from_str(&fs::read_to_string(&self.output)?).context("the load said nothing")
    }
}

fn report(samples: &[Sample], health: &Health, summary: Value) -> Value {
    let length = samples.last().map_or(Duration::ZERO, |sample| sample.at);
    let warm_up = WARM_UP.min(length / 6);
    let warm: Vec<&Sample> = samples.iter().filter(|sample| sample.at >= warm_up).collect();
    let memory: Vec<u64> = warm.iter().map(|sample| sample.loopguard.anonymous_kib).collect();
    let descriptors: Vec<u64> = warm.iter().map(|sample| sample.loopguard.descriptors).collect();
    let server_memory: Vec<u64> = warm.iter().map(|sample| sample.server.anonymous_kib).collect();
    let sum = |field: &str| health.segments.iter().filter_map(|segment| segment[field].as_u64()).sum::<u64>();
    let (answered, failed) = (sum("answered"), sum("failed"));
    let window = (WINDOW.as_secs() / SAMPLE_EVERY.as_secs()) as usize;
    let windows = medians(&memory, window);
    let drift = drift(&windows);

    let mut complaints = Vec::new();
    if drift.abs() > ALLOWED_DRIFT {
        complaints.push(format!("loopguard's memory moved by {:.1} % after the warm-up", drift * 100.0));
    }
    // Files of symbols come and go likewise.
    let open = medians(&descriptors, window);
    if range(&open).1 > open.first().copied().unwrap_or(0) + 2 {
        complaints.push("loopguard's descriptors grew".to_owned());
    }
    if failed > 0 {
        complaints.push(format!("{failed} requests failed"));
    }
    if summary["lost_records"].as_u64() != Some(0) {
        complaints.push(format!("{} records were lost", summary["lost_records"]));
    }
    let every_minute = samples.iter().step_by((SEGMENT.as_secs() / SAMPLE_EVERY.as_secs()) as usize);
    json!({
        "hours": round(length.as_secs_f64() / 3600.0),
        "warm_up_s": warm_up.as_secs(),
        "loopguard": {
            "anonymous_kib": spread(&memory),
            "anonymous_kib_medians": windows,
            "largest_drift_percent": round(drift * 100.0),
            "resident_kib": spread(&warm.iter().map(|sample| sample.loopguard.resident_kib).collect::<Vec<_>>()),
            "descriptors": spread(&descriptors),
            "threads": spread(&warm.iter().map(|sample| sample.loopguard.threads).collect::<Vec<_>>()),
            "cpu_percent": round(summary["self_cpu_ms"].as_f64().unwrap_or(0.0) / 10.0
                / summary["duration_s"].as_f64().unwrap_or(1.0).max(1e-3)),
        },
        "blocks": summary["blocks"],
        "ticks": summary["ticks"],
        "lost_records": summary["lost_records"],
        "server": {
            "anonymous_kib": spread(&server_memory),
            "descriptors": spread(&warm.iter().map(|sample| sample.server.descriptors).collect::<Vec<_>>()),
            "answered": answered,
            "failed": failed,
            "requests_per_second": {
                "before": health.before["requests_per_second"],
                "watched": round(answered as f64 / length.as_secs_f64().max(1e-3)),
                "after": health.after["requests_per_second"],
            },
        },
        "by_minute": every_minute.map(|sample| json!([
            sample.at.as_secs(), sample.loopguard.anonymous_kib, sample.loopguard.descriptors,
            sample.server.anonymous_kib,
        ])).collect::<Vec<_>>(),
        "complaints": complaints,
    })
}

/// Of each window of so many values; what is left at the end and less than half of one belongs to the last.
fn medians(values: &[u64], window: usize) -> Vec<u64> {
    let windows = ((values.len() + window / 2) / window).max(1);
    (0..windows)
        .filter_map(|n| {
            let end = if n + 1 == windows { values.len() } else { (n + 1) * window };
            let mut values = values.get(n * window..end)?.to_vec();
            values.sort_unstable();
            values.get(values.len() / 2).copied()
        })
        .collect()
}

/// How far the values went from the first one, with its sign, as a share of it.
fn drift(values: &[u64]) -> f64 {
    let Some(&first) = values.first().filter(|first| **first > 0) else { return 0.0 };
    let from_first = |value: u64| (value as f64 - first as f64) / first as f64;
    let (least, most) = range(values);
    let (down, up) = (from_first(least), from_first(most));
    if up >= -down { up } else { down }
}

fn range(values: &[u64]) -> (u64, u64) {
    (values.iter().copied().min().unwrap_or(0), values.iter().copied().max().unwrap_or(0))
}

fn spread(values: &[u64]) -> Value {
    let (least, most) = range(values);
    json!({ "first": values.first(), "last": values.last(), "least": least, "most": most })
}

fn round(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

fn markdown(report: &Value) -> String {
    let mut text = format!(
        "{} h, of which the first {} s are warm-up.\n\n| | first | last | least | most |\n|---|--:|--:|--:|--:|\n",
        report["hours"], report["warm_up_s"]
    );
    for (title, value) in [
        ("loopguard's own memory, KiB", &report["loopguard"]["anonymous_kib"]),
        ("loopguard resident, KiB", &report["loopguard"]["resident_kib"]),
        ("loopguard's descriptors", &report["loopguard"]["descriptors"]),
        ("loopguard's threads", &report["loopguard"]["threads"]),
        ("server's own memory, KiB", &report["server"]["anonymous_kib"]),
        ("server's descriptors", &report["server"]["descriptors"]),
    ] {
        text +=
            &format!("| {title} | {} | {} | {} | {} |\n", value["first"], value["last"], value["least"], value["most"]);
    }
    let (server, loopguard) = (&report["server"], &report["loopguard"]);
    let rates = &server["requests_per_second"];
    text += &format!(
        "\nMedians of loopguard's own memory, ten minutes each, in KiB: {}; the largest drift of these is {} %. {} blocks in {} ticks; lost records: {}. \
         loopguard's CPU, kernel programs included: {} %.\n\
         Requests: {} answered, {} failed; {} a second before, {} while watched, {} after.\n",
        loopguard["anonymous_kib_medians"],
        loopguard["largest_drift_percent"],
        report["blocks"],
        report["ticks"],
        report["lost_records"],
        loopguard["cpu_percent"],
        server["answered"],
        server["failed"],
        rates["before"],
        rates["watched"],
        rates["after"],
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(at_s: u64, anonymous_kib: u64) -> Sample {
        let loopguard = Footprint { anonymous_kib, resident_kib: 9000, descriptors: 40, threads: 1 };
        Sample { at: Duration::from_secs(at_s), loopguard, server: loopguard }
    }

    fn complaints_of(samples: &[Sample], failed: u64, lost: u64) -> Vec<String> {
        let segment = json!({ "answered": 10, "failed": failed, "requests_per_second": 1.0 });
        let health = Health { before: segment.clone(), segments: vec![segment.clone()], after: segment };
        let summary = json!({ "lost_records": lost, "blocks": 1, "ticks": 2, "self_cpu_ms": 1.0, "duration_s": 60.0 });
        let report = report(samples, &health, summary);
        report["complaints"].as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect()
    }

    #[test]
    fn growth_during_the_warm_up_is_none() {
        let samples = [sample(10, 1000), sample(590, 5000), sample(601, 5000), sample(7200, 5200)];
        assert!(complaints_of(&samples, 0, 0).is_empty());
    }

    #[test]
    fn what_went_wrong_is_said() {
        let ten_minutes = |kib: u64| (0..60).map(move |n| sample(601 + 10 * n, kib));
        let mut samples: Vec<Sample> = [5000, 5600, 5100].into_iter().flat_map(ten_minutes).collect();
        // What comes and goes is no growth.
        samples[170] = sample(7000, 9000);
        assert_eq!(
            complaints_of(&samples, 3, 7),
            ["loopguard's memory moved by 12.0 % after the warm-up", "3 requests failed", "7 records were lost"]
        );
        assert_eq!(drift(&[100, 80, 110]), -0.2);
        assert_eq!(medians(&[1, 2, 3, 10, 20, 30, 7], 3), [2, 20]);
    }

    #[test]
    fn hours_are_needed() {
        assert_eq!(parse(&["--hours", "0.5"]).unwrap().length, Duration::from_secs(1800));
        assert!(parse(&[]).is_err());
        assert!(parse(&["--hours", "x"]).is_err());
        assert!(parse(&["--minutes", "5"]).is_err());
    }
}
