//! What loopguard costs the server: a tick and a step to the nanosecond, and requests under wrk in pairs of rounds.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

use super::rig::{Rig, Server, cpu_time, on_cpu};
use super::{median, quantile, rounded, row, table};
use crate::companion::Companion;
use crate::step::say;

/// How long each state of the loop is measured.
const STATE: Duration = Duration::from_secs(6);
const ROUND_SECONDS: u32 = 3;
/// How long applications in one process take turns.
const TURNS_SECONDS: u32 = 60;
/// A round counts if others had less of the CPUs than this, of one CPU.
const FOREIGN: f64 = 0.05;

pub fn run(rig: &Rig, pairs: u32) -> Result<Value> {
    let mut steps = Map::new();
    for event_loop in ["uvloop", "asyncio"] {
        say(&format!("ticks and steps on {event_loop}"));
        steps.insert(event_loop.to_owned(), ticks_and_steps(rig, event_loop)?);
    }
    print_steps(&steps);
    let (requests, turns) = if on_path("wrk") {
        rig.install_package()?;
        (requests(rig, pairs)?, in_turns(rig)?)
    } else {
        say("wrk is not installed: requests per second are not measured");
        (json!({ "skipped": "wrk is not installed" }), Value::Null)
    };
    Ok(json!({ "loop": steps, "requests": requests, "turns": turns }))
}

/// What a request costs more inside a middleware, as `turns.py` measures it.
fn in_turns(rig: &Rig) -> Result<Value> {
    say(&format!("hello world inside and outside middleware, taking turns for {TURNS_SECONDS} s"));
    let file = rig.folder.join("turns.jsonl");
    let server = rig.serve(&rig.python(), "uvloop", &[("BENCH_TURNS", &file)])?;
    wrk(&server, TURNS_SECONDS)?;
    let text = fs::read_to_string(&file)?;
    let told: Value = serde_json::from_str(text.lines().last().context("nothing was measured")?)?;
    let fields = ["throughput_ratio", "between_ratio", "added_cpu_us", "between_us"];
    let measured = told.as_object().into_iter().flatten().filter(|(_, value)| value.is_object());
    let rows: Vec<Vec<String>> = measured.map(|(name, value)| row(name, value, &fields)).collect();
    table(&["in one process, against bare", "throughput", "95 %", "CPU us/request added", "95 %"], &rows);
    say(&format!("{} us bare, {} rounds", told["bare_cpu_us"], told["rounds"]));
    Ok(told)
}

pub(super) fn on_path(program: &str) -> bool {
    std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()).any(|folder| folder.join(program).is_file())
}

/// The same loop in each state that loopguard can put it in.
fn ticks_and_steps(rig: &Rig, event_loop: &str) -> Result<Value> {
    let (mut target, file) = busy_loop(rig, event_loop)?;
    let mut stdin = target.stdin().context("its input is a pipe")?;

    let before = least(&file)?;
    let watching = rig.attach(target.pid(), &["--steps=auto"])?;
    let quiet = least(&file)?;
    stdin.write_all(b"block\n")?;
    // Three blocks, and time to place the probes.
    thread::sleep(Duration::from_secs(3));
    let used = cpu_time(watching.process.pid())?;
    let since = Instant::now();
    let armed = least(&file)?;
    let own_cpu = (cpu_time(watching.process.pid())? - used).as_secs_f64() / since.elapsed().as_secs_f64();
    let blocks = watching.stop()?["blocks"].as_u64().unwrap_or(0);
    ensure!(blocks >= 3, "loopguard saw {blocks} of 3 blocks, so its step probes may not be in place");
    let watching = rig.attach(target.pid(), &["--steps=off"])?;
    let off = least(&file)?;
    watching.stop()?;
    let after = least(&file)?;
    ensure!(target.ended().is_none(), "the measured loop ended");
    let bare = Least { tick_ns: before.tick_ns.min(after.tick_ns), step_ns: before.step_ns.min(after.step_ns) };
    let state = |least: &Least| {
        json!({
            "tick_ns": least.tick_ns.round(), "step_ns": least.step_ns.round(),
            "added_tick_ns": (least.tick_ns - bare.tick_ns).round(),
            "added_step_ns": (least.step_ns - bare.step_ns).round(),
        })
    };
    Ok(json!({
        "bare": state(&bare),
        "attached, never blocked": state(&quiet),
        "attached, step probes in place": state(&armed),
        "attached, --steps off": state(&off),
        // The bare loop, before and after: what this machine's drift makes of the same thing.
        "drift_tick": (before.tick_ns - after.tick_ns).abs().round(),
        "drift_step": (before.step_ns - after.step_ns).abs().round(),
        "loopguard_cpu_percent": rounded(own_cpu * 100.0, 2),
    }))
}

/// A loop that measures its own ticks and steps, and the file that it writes them to. A line on its input blocks it.
pub fn busy_loop(rig: &Rig, event_loop: &str) -> Result<(Companion, PathBuf)> {
    let file = rig.folder.join("loop-steps.jsonl");
    let mut command = on_cpu(0, &rig.python());
    command
        .arg(rig.scripts.join("loop_steps.py"))
        .arg(event_loop)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .stdin(Stdio::piped())
        .stdout(File::create(&file)?);
    let target = Companion::start(&mut command)?;
    thread::sleep(Duration::from_secs(2));
    Ok((target, file))
}

struct Least {
    tick_ns: f64,
    step_ns: f64,
}

fn least(file: &Path) -> Result<Least> {
    let lines = said(file, STATE)?;
    let least = |field: &str| lines.iter().filter_map(|line| line[field].as_f64()).fold(f64::INFINITY, f64::min);
    Ok(Least { tick_ns: least("tick_ns"), step_ns: least("step_ns") })
}

/// What the loop says of itself from now on.
pub fn said(file: &Path, time: Duration) -> Result<Vec<Value>> {
    let skip = fs::read_to_string(file)?.len();
    thread::sleep(time);
    let text = fs::read_to_string(file)?;
    // The first line began before.
    let lines: Vec<Value> = text[skip..].lines().skip(1).filter_map(|line| serde_json::from_str(line).ok()).collect();
    ensure!(!lines.is_empty(), "the measured loop says nothing");
    Ok(lines)
}

fn print_steps(steps: &Map<String, Value>) {
    let states = ["bare", "attached, never blocked", "attached, step probes in place", "attached, --steps off"];
    let mut rows = Vec::new();
    for (event_loop, measured) in steps {
        for name in states {
            let fields = ["tick_ns", "added_tick_ns", "step_ns", "added_step_ns"];
            rows.push(row(&format!("{event_loop}, {name}"), &measured[name], &fields));
        }
    }
    table(&["CPU time of the loop's thread", "tick, ns", "added", "step, ns", "added"], &rows);
}

/// One server under load for one round.
#[derive(Clone, Copy)]
pub(super) struct Round {
    pub per_second: f64,
    /// Of a request.
    pub cpu_us: f64,
    pub valid: bool,
}

fn requests(rig: &Rig, pairs: u32) -> Result<Value> {
    let bare = rig.serve(&rig.python(), "uvloop", &[])?;
    let mut results = Map::new();
    say(&format!("hello world under wrk, bare and attached, {pairs} pairs of {ROUND_SECONDS} s"));
    results.insert("attached".to_owned(), attached_in_pairs(rig, pairs, &bare, &bare)?);
    say("the same with the middleware of loopguard-emit, not attached and attached");
    let telling = rig.serve(&rig.python(), "uvloop", &[("BENCH_MIDDLEWARE", Path::new("1"))])?;
    let alone = in_pairs(pairs, || round(&bare, None), || round(&telling, None))?;
    results.insert("middleware".to_owned(), alone);
    results.insert("middleware, attached".to_owned(), attached_in_pairs(rig, pairs, &bare, &telling)?);
    drop(telling);
    if let Some(venv) = &rig.in_process {
        say("the same with fastapi-loopguard");
        let other = rig.serve(&venv.python(), "uvloop", &[("BENCH_IN_PROCESS", Path::new("1"))])?;
        let other = in_pairs(pairs, || round(&bare, None), || round(&other, None))?;
        results.insert("fastapi-loopguard".to_owned(), other);
    }
    drop(bare);
    say("axum without and with the layer of loopguard-emit");
    let (axum, telling) = (rig.serve_axum(&[])?, rig.serve_axum(&["--probes"])?);
    let layered = in_pairs(pairs, || round(&axum, None), || round(&telling, None))?;
    results.insert("axum, with the layer".to_owned(), layered);
    let fields = ["throughput_ratio", "throughput_ratio_spread", "added_cpu_us", "added_cpu_us_spread", "valid_pairs"];
    let rows: Vec<Vec<String>> = results.iter().map(|(name, measured)| row(name, measured, &fields)).collect();
    let head = ["against bare", "throughput", "quartiles", "CPU us/request added", "quartiles", "valid pairs"];
    table(&head, &rows);
    Ok(Value::Object(results))
}

/// Against `bare`: `server` with loopguard attached to it. The same server may be both.
fn attached_in_pairs(rig: &Rig, pairs: u32, bare: &Server, server: &Server) -> Result<Value> {
    let mut own_cpu = Vec::new();
    let mut measured = in_pairs(
        pairs,
        || round(bare, None),
        || {
            let watching = rig.attach(server.process.pid(), &[])?;
            let (used, since) = (cpu_time(watching.process.pid())?, Instant::now());
            let measured = round(server, Some(watching.process.pid()))?;
            own_cpu.push((cpu_time(watching.process.pid())? - used).as_secs_f64() / since.elapsed().as_secs_f64());
            watching.stop()?;
            Ok(measured)
        },
    )?;
    measured["loopguard_cpu_percent"] = json!(rounded(median(&own_cpu) * 100.0, 2));
    Ok(measured)
}

/// Pairs of rounds, each first in turn; a pair counts if nothing disturbed either.
fn in_pairs(
    pairs: u32,
    mut bare: impl FnMut() -> Result<Round>,
    mut other: impl FnMut() -> Result<Round>,
) -> Result<Value> {
    let (mut ratios, mut added, mut per_second, mut cpu_us) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    bare()?;
    for pair in 0..pairs {
        let (first, second) = if pair.is_multiple_of(2) {
            let first = bare()?;
            (first, other()?)
        } else {
            let second = other()?;
            (bare()?, second)
        };
        if first.valid && second.valid {
            ratios.push(second.per_second / first.per_second);
            added.push(second.cpu_us - first.cpu_us);
            per_second.push(first.per_second);
            cpu_us.push(first.cpu_us);
        }
    }
    if ratios.is_empty() {
        return Ok(json!({ "pairs": pairs, "valid_pairs": 0 }));
    }
    let spread = |values: &[f64], digits| {
        json!([rounded(quantile(values, 0.25), digits), rounded(quantile(values, 0.75), digits)])
    };
    Ok(json!({
        "pairs": pairs,
        "valid_pairs": ratios.len(),
        "bare_requests_per_second": median(&per_second).round(),
        "bare_cpu_us": rounded(median(&cpu_us), 2),
        "throughput_ratio": rounded(median(&ratios), 3),
        "throughput_ratio_spread": spread(&ratios, 3),
        "added_cpu_us": rounded(median(&added), 2),
        "added_cpu_us_spread": spread(&added, 2),
    }))
}

fn round(server: &Server, watcher: Option<u32>) -> Result<Round> {
    round_of(server, watcher, || wrk(server, ROUND_SECONDS))
}

/// As many requests as the server can answer to 32 connections; returns how many.
pub(super) fn wrk(server: &Server, seconds: u32) -> Result<f64> {
    let output = wrk_command(server, seconds).output().context("run wrk")?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines()
        .find_map(|line| line.trim().split_once(" requests in")?.0.parse().ok())
        .with_context(|| format!("wrk says no number of requests: {text}"))
}

pub(super) fn wrk_command(server: &Server, seconds: u32) -> std::process::Command {
    let mut wrk = on_cpu(1, Path::new("wrk"));
    wrk.args(["-t1", "-c32", &format!("-d{seconds}s"), &format!("http://127.0.0.1:{}/hello", server.port)]);
    wrk
}

/// A round in which `load` sends requests and says how many were answered.
pub(super) fn round_of(server: &Server, watcher: Option<u32>, load: impl FnOnce() -> Result<f64>) -> Result<Round> {
    let known = || -> Result<f64> {
        let mut known = cpu_time(server.process.pid())?;
        if let Some(watcher) = watcher {
            known += cpu_time(watcher)?;
        }
        Ok(known.as_secs_f64() + of_children())
    };
    let (known_before, machine, cpu) = (known()?, Machine::now()?, cpu_time(server.process.pid())?);
    let since = Instant::now();
    let requests = load()?;
    let elapsed = since.elapsed().as_secs_f64();
    let cpu = cpu_time(server.process.pid())? - cpu;
    let after = Machine::now()?;
    let foreign = (after.busy - machine.busy) - (known()? - known_before);
    let stolen = after.stolen - machine.stolen;
    let valid = foreign < FOREIGN * elapsed && stolen < FOREIGN * elapsed;
    if !valid {
        say(&format!("round left out: others had {foreign:.2} s of CPU, {stolen:.2} s were stolen"));
    }
    Ok(Round { per_second: requests / elapsed, cpu_us: cpu.as_secs_f64() * 1e6 / requests, valid })
}

/// CPU seconds of the programs that we started and that ended: the load's.
fn of_children() -> f64 {
    // SAFETY: plain numbers, of which all bit patterns are valid, filled by the call.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_CHILDREN, &raw mut usage);
        usage
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// Seconds of CPU time, all CPUs together. Interrupts belong to nobody and are left out.
struct Machine {
    busy: f64,
    stolen: f64,
}

impl Machine {
    fn now() -> Result<Self> {
        let text = fs::read_to_string("/proc/stat")?;
        let first = text.lines().next().context("/proc/stat is empty")?;
        let ticks: Vec<f64> = first.split_whitespace().skip(1).filter_map(|word| word.parse().ok()).collect();
        let at = |index: usize| ticks.get(index).copied().unwrap_or(0.0) / 100.0;
        Ok(Self { busy: at(0) + at(1) + at(2), stolen: at(7) })
    }
}
