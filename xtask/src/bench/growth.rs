//! What becomes of the cost with more loop threads and with more requests in flight.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

use super::overhead::said;
use super::rig::{Rig, Watching, cpu_time, on_cpu};
use super::{median, rounded, table};
use crate::companion::Companion;
use crate::step::say;

const LOOPS: [u32; 3] = [1, 8, 64];
/// Of all loops together.
const TICKS_PER_SECOND: &str = "2000";
const IN_FLIGHT: [u32; 5] = [1, 10, 100, 1000, 10_000];
/// Requests in one round, and rounds in each state.
const REQUESTS: u32 = 500;
const ROUNDS: usize = 5;
const BLOCKS: u32 = 20;
const BLOCK_MS: u32 = 60;
/// For all loops to be found.
const SETTLE: Duration = Duration::from_secs(2);

pub fn run(rig: &Rig, seconds: u32) -> Result<Value> {
    let mut loops = Map::new();
    for count in LOOPS {
        say(&format!("{count} loop threads"));
        loops.insert(count.to_string(), loop_threads(rig, count, Duration::from_secs(seconds.into()))?);
    }
    say("requests in flight");
    let in_flight = requests_in_flight(rig)?;
    let show = |results: &Map<String, Value>, fields: &[&str]| -> Vec<Vec<String>> {
        let row = |name: &String, run: &Value| {
            [name.clone()].into_iter().chain(fields.iter().map(|field| run[field].to_string())).collect()
        };
        let mut rows: Vec<(u32, Vec<String>)> =
            results.iter().map(|(name, run)| (name.parse().unwrap_or(0), row(name, run))).collect();
        rows.sort();
        rows.into_iter().map(|(_, row)| row).collect()
    };
    let fields = ["bare_us", "attached_us", "added_us", "loopguard_cpu_percent", "resident_kib", "lost_records"];
    table(
        &["loop threads", "CPU us/tick", "attached", "added", "loopguard's CPU, %", "its memory, KiB", "lost records"],
        &show(&loops, &fields),
    );
    let fields = ["bare_us", "attached_us", "added_us", "loopguard_ms_per_block", "resident_kib", "victims"];
    table(
        &[
            "in flight",
            "CPU us/request",
            "attached",
            "added",
            "loopguard's ms/block",
            "its memory, KiB",
            "victims told",
        ],
        &show(&in_flight, &fields),
    );
    Ok(json!({ "loop_threads": loops, "requests_in_flight": in_flight }))
}

/// CPU time of the process for one tick, its loops ticking at a steady rate: before, with and after loopguard.
fn loop_threads(rig: &Rig, count: u32, time: Duration) -> Result<Value> {
    let file = rig.folder.join("many-loops.jsonl");
    let mut command = on_cpu(0, &rig.python());
    command
        .arg(rig.scripts.join("many_loops.py"))
        .args([&count.to_string(), TICKS_PER_SECOND])
        .stdin(Stdio::null())
        .stdout(File::create(&file)?);
    let target = Companion::start(&mut command)?;
    thread::sleep(SETTLE);
    let before = ticks(&file, time)?;
    let watching = rig.attach(target.pid(), &[])?;
    thread::sleep(SETTLE);
    let (used, since) = (cpu_time(watching.process.pid())?, Instant::now());
    let attached = ticks(&file, time)?;
    let own_cpu = (cpu_time(watching.process.pid())? - used).as_secs_f64() / since.elapsed().as_secs_f64();
    let resident_kib = resident_kib(&watching)?;
    let summary = watching.stop()?;
    let after = ticks(&file, time)?;
    let threads = summary["threads"].as_array().map_or(0, Vec::len);
    ensure!(threads == count as usize, "loopguard saw {threads} of {count} loops");
    let bare = median(&[before.clone(), after.clone()].concat());
    let attached = median(&attached);
    Ok(json!({
        "bare_us": rounded(bare, 2),
        "attached_us": rounded(attached, 2),
        "added_us": rounded(attached - bare, 2),
        "drift_us": rounded((median(&before) - median(&after)).abs(), 2),
        "ticks": summary["ticks"],
        "loopguard_cpu_percent": rounded(own_cpu * 100.0, 2),
        "resident_kib": resident_kib,
        "lost_records": summary["lost_records"],
    }))
}

/// Microseconds of CPU time a tick, of each line that the loops write from now on.
fn ticks(file: &Path, time: Duration) -> Result<Vec<f64>> {
    let ticks: Vec<f64> = said(file, time)?
        .iter()
        .filter_map(|line| Some(line["cpu_ns"].as_f64()? / 1e3 / line["ticks"].as_f64().filter(|ticks| *ticks > 0.0)?))
        .collect();
    ensure!(!ticks.is_empty(), "the loops do not tick");
    Ok(ticks)
}

fn resident_kib(watching: &Watching) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", watching.process.pid()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse().ok());
    line.context("the system does not say how much memory loopguard has")
}

/// One server, on which more and more requests sleep, while others are answered and some block.
fn requests_in_flight(rig: &Rig) -> Result<Map<String, Value>> {
    let server = rig.serve(&rig.python(), "uvloop", &[])?;
    let pid = server.process.pid();
    let mut client = Client::start(rig, server.port)?;
    client.ask(&format!("get {REQUESTS} /hello"))?;
    let mut results = Map::new();
    for count in IN_FLIGHT {
        say(&format!("{count} requests in flight"));
        client.ask(&format!("open {count}"))?;
        let before = client.rounds(pid)?;
        let watching = rig.attach(pid, &[])?;
        let own = watching.process.pid();
        thread::sleep(SETTLE);
        let (used, since) = (cpu_time(own)?, Instant::now());
        let attached = client.rounds(pid)?;
        let (quiet, quiet_for) = (cpu_time(own)?, since.elapsed());
        client.ask(&format!("get {BLOCKS} /block/sleep/{BLOCK_MS}"))?;
        // What blocks leave to do is done by then.
        thread::sleep(SETTLE);
        let per_block = (cpu_time(own)? - quiet).as_secs_f64() * 1e3 / f64::from(BLOCKS);
        let resident_kib = resident_kib(&watching)?;
        let events = watching.events.clone();
        let summary = watching.stop()?;
        ensure!(
            summary["blocks"].as_u64() >= Some(BLOCKS.into()),
            "loopguard saw {} of {BLOCKS} blocks",
            summary["blocks"]
        );
        let after = client.rounds(pid)?;
        let bare = median(&[before.clone(), after.clone()].concat());
        let attached = median(&attached);
        let run = json!({
            "bare_us": rounded(bare, 2),
            "attached_us": rounded(attached, 2),
            "added_us": rounded(attached - bare, 2),
            "drift_us": rounded((median(&before) - median(&after)).abs(), 2),
            "loopguard_cpu_percent": rounded((quiet - used).as_secs_f64() * 100.0 / quiet_for.as_secs_f64(), 2),
            "loopguard_ms_per_block": rounded(per_block, 2),
            "victims": median(&victims(&events)?),
            "resident_kib": resident_kib,
            "lost_records": summary["lost_records"],
        });
        results.insert(count.to_string(), run);
    }
    Ok(results)
}

/// How many were held up, of each block.
fn victims(events: &Path) -> Result<Vec<f64>> {
    let text = fs::read_to_string(events)?;
    let blocks = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    Ok(blocks.filter(|line| line["type"] == "block").filter_map(|block| block["victims"].as_f64()).collect())
}

/// `in_flight.py`.
struct Client {
    _process: Companion,
    stdin: std::process::ChildStdin,
    answers: BufReader<std::io::PipeReader>,
}

impl Client {
    fn start(rig: &Rig, port: u16) -> Result<Self> {
        let (reader, writer) = std::io::pipe()?;
        let mut command = on_cpu(1, &rig.python());
        command
            .arg(rig.scripts.join("in_flight.py"))
            .arg(port.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::from(writer));
        let mut process = Companion::start(&mut command)?;
        let stdin = process.stdin().context("its input is a pipe")?;
        // Its end of the pipe is closed here, so that its end is seen.
        drop(command);
        Ok(Self { _process: process, stdin, answers: BufReader::new(reader) })
    }

    fn ask(&mut self, what: &str) -> Result<()> {
        writeln!(self.stdin, "{what}")?;
        let mut answer = String::new();
        self.answers.read_line(&mut answer)?;
        ensure!(answer == "done\n", "the client of the server ended at `{what}`");
        Ok(())
    }

    /// Microseconds of the server's CPU time for a request, of each round.
    fn rounds(&mut self, server: u32) -> Result<Vec<f64>> {
        (0..ROUNDS)
            .map(|_| {
                let used = cpu_time(server)?;
                self.ask(&format!("get {REQUESTS} /hello"))?;
                Ok((cpu_time(server)? - used).as_secs_f64() * 1e6 / f64::from(REQUESTS))
            })
            .collect()
    }
}
