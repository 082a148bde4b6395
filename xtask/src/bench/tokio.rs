//! How right loopguard is about a server on tokio, and what it costs such a server.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

use super::overhead::{Round, on_path, round_of, wrk};
use super::rig::{Rig, Server, TokioBuild, TokioPrograms, cpu_time, free_port, on_cpu};
use super::turns::{self, Load};
use super::{median, output, quantile, rounded, row, table};
use crate::step::say;

const THRESHOLD: &str = "--threshold=10ms";
const CONNECTIONS: &str = "16";
const SEED: &str = "7";
/// So many harmless requests show where polls end.
const WARM_UP: usize = 60;
/// Polls are marked for so long at most after loopguard came, to see where workers park.
const SETTLED: Duration = Duration::from_millis(11_500);
const ROUND_SECONDS: u32 = 2;
/// Calls of a stack that are shown.
const CALLS: usize = 12;
/// Requests a second, for a server that has time to sleep.
const RATE: u32 = 5000;

struct Case {
    name: &'static str,
    build: TokioBuild,
    runtime: &'static str,
    /// Arguments behind the file of ground truth: `layer` for that of `loopguard-emit`.
    options: &'static [&'static str],
}

const fn case(name: &'static str, build: TokioBuild, runtime: &'static str) -> Case {
    Case { name, build, runtime, options: &[] }
}

const fn with_layer(case: Case) -> Case {
    Case { options: &["layer"], ..case }
}

const CASES: [Case; 11] = [
    case("release, multi-thread", TokioBuild::Release, "multi"),
    case("release, current-thread", TokioBuild::Release, "current"),
    case("release, everything in tasks", TokioBuild::Release, "spawned"),
    with_layer(case("release, multi-thread, with the layer", TokioBuild::Release, "multi")),
    with_layer(case("release, current-thread, with the layer", TokioBuild::Release, "current")),
    case("release, stripped, multi-thread", TokioBuild::Stripped, "multi"),
    case("release, stripped, current-thread", TokioBuild::Stripped, "current"),
    case("fat LTO, multi-thread", TokioBuild::FatLto, "multi"),
    case("fat LTO, current-thread", TokioBuild::FatLto, "current"),
    case("fat LTO, stripped, multi-thread", TokioBuild::FatLtoStripped, "multi"),
    case("fat LTO, stripped, current-thread", TokioBuild::FatLtoStripped, "current"),
];

pub fn accuracy(rig: &Rig, seconds: u32) -> Result<Value> {
    let mut results = Map::new();
    for case in &CASES {
        let programs = rig.build_tokio(case.build)?;
        say(&format!("{}, {seconds} s", case.name));
        results.insert(case.name.to_owned(), one(rig, case, &programs, seconds)?);
    }
    let columns = [
        ("blocks", "true_blocks"),
        ("recall", "recall"),
        ("one to one", "recall_one_to_one"),
        ("precision", "precision"),
        ("error median, ms", "duration_error_ms_median"),
        ("attribution precision", "attribution_precision"),
        ("attribution recall", "attribution_recall"),
        ("background blamed", "background_blamed"),
    ];
    let rows: Vec<Vec<String>> = results
        .iter()
        .map(|(name, score)| {
            let figures = columns.iter().map(|(_, field)| score["at_10ms"][field].to_string());
            let ends = [&score["negatives_reported"], &score["lost_records"]].map(Value::to_string);
            [name.clone()].into_iter().chain(figures).chain(ends).collect()
        })
        .collect();
    let head: Vec<&str> =
        ["at_10ms"].into_iter().chain(columns.map(|(title, _)| title)).chain(["negatives", "lost"]).collect();
    table(&head, &rows);
    Ok(Value::Object(results))
}

fn one(rig: &Rig, case: &Case, programs: &TokioPrograms, seconds: u32) -> Result<Value> {
    let truth = rig.folder.join("truth-tokio.jsonl");
    let truth_path = truth.to_str().context("a path that is no text")?;
    let arguments = [&[truth_path][..], case.options].concat();
    let server = serve(rig, programs, case.runtime, Placing::Anywhere, &arguments)?;
    let watching = rig.attach(server.process.pid(), &[THRESHOLD])?;
    warm_up(&server)?;
    let sent = load(programs, &server, seconds)?;
    let events = watching.events.clone();
    let summary = watching.stop()?;
    // Its truth is whole when it has ended.
    drop(server);
    ensure!(summary["type"] == "summary", "loopguard ended without a summary");
    // What each figure comes from, for whoever wants to know why.
    let kept = rig.folder.join(format!("tokio-{}.jsonl", case.name.replace([',', ' '], "-")));
    fs::copy(&events, &kept)?;
    fs::copy(&truth, kept.with_extension("truth"))?;
    let wrong = kept.with_extension("wrong");
    let mut score = scored(rig, &truth, &events, &wrong)?;
    let (reported, wrong) = (fs::read_to_string(&events)?, fs::read_to_string(&wrong)?);
    wrong.lines().for_each(|report| say(&format!("wrong: {}", brief(report))));
    let charged = charged_to_harmless(&reported);
    charged.iter().for_each(|report| say(&format!("charged to a request that was to be harmless: {}", brief(report))));
    // What was to be harmless may block for once: on a lock of tokio's, say. The server's own clock tells.
    score["negatives_reported"] = json!(charged_to_harmless(&wrong).len());
    score["harmless_that_blocked"] = json!(charged.len() - charged_to_harmless(&wrong).len());
    score["load"] = sent;
    for field in ["lost_records", "self_cpu_ms", "duration_s"] {
        score[field] = summary[field].clone();
    }
    Ok(score)
}

/// Shows where polls end, and where workers park.
pub fn warm_up(server: &Server) -> Result<()> {
    (0..WARM_UP).try_for_each(|_| get(server.port, "/hello"))
}

/// Requests that block the server and others, from the same seed always; returns how many.
pub fn load(programs: &TokioPrograms, server: &Server, seconds: u32) -> Result<Value> {
    let mut load = std::process::Command::new(&programs.load);
    load.args([&server.port.to_string(), CONNECTIONS, &seconds.to_string(), SEED]);
    Ok(serde_json::from_str(&output(&mut load).context("the load failed")?)?)
}

/// The reports in `events` against what the server wrote down; the wrong ones are copied to `wrong`.
pub fn scored(rig: &Rig, truth: &Path, events: &Path, wrong: &Path) -> Result<Value> {
    let mut scorer = rig.script("score.py");
    scorer.args([truth, events]).arg("--wrong").arg(wrong);
    Ok(serde_json::from_str(&output(&mut scorer).context("the scorer failed")?)?)
}

/// With its ground truth, on any processor.
pub fn serve_anywhere(rig: &Rig, programs: &TokioPrograms, runtime: &str, truth: &Path) -> Result<Server> {
    serve(rig, programs, runtime, Placing::Anywhere, &[truth.to_str().context("a path that is no text")?])
}

/// Blocks that were charged to requests which should block nobody: only where the host is not to blame.
pub fn charged_to_harmless(reported: &str) -> Vec<&str> {
    let blames_harmless = |line: &&str| {
        let Ok(event) = serde_json::from_str::<Value>(line) else { return false };
        let requests = event["requests"].as_array();
        let paths = requests.into_iter().flatten().filter_map(|request| request["path"].as_str());
        event["type"] == "block"
            && event["event"] == "single"
            && event["verdict"] != "host"
            && paths.into_iter().any(|path| path.starts_with("/ok/"))
    };
    reported.lines().filter(blames_harmless).collect()
}

/// Who, for how long, why and where.
fn brief(report: &str) -> String {
    let Ok(event) = serde_json::from_str::<Value>(report) else { return report.to_owned() };
    let requests = event["requests"].as_array().into_iter().flatten();
    let paths: Vec<&Value> = requests.map(|request| &request["path"]).collect();
    let stack = event["stack"].as_array().into_iter().flatten();
    let calls: Vec<&str> = stack.filter_map(|frame| frame["function"].as_str()).take(CALLS).collect();
    let times = ["t_start_ns", "duration_ms", "on_cpu_ms", "waiting_ms", "run_queue_ms"];
    let times = times.map(|field| format!("{field} {}", event[field]));
    format!(
        "{paths:?} {} {} {} in {}, {}",
        event["attribution"],
        event["verdict"],
        event["waits"],
        calls.join(" < "),
        times.join(" ")
    )
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Placing {
    Anywhere,
    FirstCpu,
}

fn serve(rig: &Rig, programs: &TokioPrograms, runtime: &str, placing: Placing, arguments: &[&str]) -> Result<Server> {
    let (port, log) = (free_port()?, rig.folder.join("server-tokio.log"));
    let file = File::create(&log)?;
    let mut command = match placing {
        Placing::Anywhere => std::process::Command::new(&programs.server),
        Placing::FirstCpu => on_cpu(0, &programs.server),
    };
    command
        .args([runtime, &port.to_string()])
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file);
    Server::start(&mut command, None, port, &log)
}

/// A request without an id: the scorer leaves it out.
fn get(port: u16, path: &str) -> Result<()> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n\r\n")?;
    stream.read_to_end(&mut Vec::new())?;
    Ok(())
}

/// Bare, healthy, closely watched and bare again, each under both loads: that often. Then watched in turns under both.
pub fn overhead(rig: &Rig, runtime: &str, pairs: u32) -> Result<Value> {
    ensure!(on_path("wrk"), "this needs wrk: run `apt-get install wrk`");
    let programs = rig.build_tokio(TokioBuild::Release)?;
    let server = serve(rig, &programs, runtime, Placing::FirstCpu, &[])?;
    let mut measured: BTreeMap<&str, Vec<Pair>> = BTreeMap::new();
    let mut own_cpu = Vec::new();
    say(&format!("hello world on {runtime}, {pairs} times bare, attached, closely watched and bare again"));
    both_loads(&programs, &server, None)?;
    for _ in 0..pairs {
        let before = both_loads(&programs, &server, None)?;
        let watching = rig.attach(server.process.pid(), &[])?;
        let (pid, since) = (watching.process.pid(), Instant::now());
        // Under load, so that it sees where workers park.
        both_loads(&programs, &server, Some(pid))?;
        thread::sleep(SETTLED.saturating_sub(since.elapsed()));
        let (used, settled) = (cpu_time(pid)?, Instant::now());
        let healthy = round_of(&server, Some(pid), || wrk(&server, ROUND_SECONDS))?;
        own_cpu.push((cpu_time(pid)? - used).as_secs_f64() / settled.elapsed().as_secs_f64());
        // From one block on it is watched closely for ten seconds.
        get(server.port, BLOCK)?;
        let closely = both_loads(&programs, &server, Some(pid))?;
        let blocks = watching.stop()?["blocks"].as_u64().unwrap_or(0);
        ensure!(blocks > 0, "loopguard saw no block: it did not watch closely");
        if blocks > 1 {
            say(&format!("it reported {blocks} blocks, not the one: the healthy time may not have been one"));
        }
        let after = both_loads(&programs, &server, None)?;
        let [wrk, paced] = [0, 1].map(|load| [before[load], after[load]]);
        let rounds = [
            ("attached, wrk", wrk, healthy),
            ("closely watched, wrk", wrk, closely[0]),
            (CLOSELY_PACED, paced, closely[1]),
        ];
        for (name, around, during) in rounds {
            if during.valid && around.iter().all(|round| round.valid) {
                measured.entry(name).or_default().push(Pair::of(around, during));
            }
        }
    }
    let mut results = Map::new();
    let mut rows = Vec::new();
    for (name, pairs) in &measured {
        let column = |figure: fn(&Pair) -> f64| pairs.iter().map(figure).collect::<Vec<_>>();
        let spread = |values: &[f64], digits| {
            json!([rounded(quantile(values, 0.25), digits), rounded(quantile(values, 0.75), digits)])
        };
        let (throughput, added, ratio) =
            (column(|pair| pair.throughput_ratio), column(|pair| pair.added_cpu_us), column(|pair| pair.cpu_ratio));
        let result = json!({
            "valid_pairs": pairs.len(),
            "bare_requests_per_second": median(&column(|pair| pair.bare.per_second)).round(),
            "bare_cpu_us": rounded(median(&column(|pair| pair.bare.cpu_us)), 2),
            "throughput_ratio": rounded(median(&throughput), 3),
            "throughput_ratio_spread": spread(&throughput, 3),
            "added_cpu_us": rounded(median(&added), 2),
            "added_cpu_us_spread": spread(&added, 2),
            "server_cpu_ratio": rounded(median(&ratio), 3),
            "server_cpu_ratio_spread": spread(&ratio, 3),
        });
        let fields = [
            "bare_cpu_us",
            "added_cpu_us",
            "added_cpu_us_spread",
            "server_cpu_ratio",
            "throughput_ratio",
            "valid_pairs",
        ];
        rows.push(row(&format!("{runtime}, {name}"), &result, &fields));
        results.insert((*name).to_owned(), result);
    }
    let head = ["against bare", "CPU us/request", "added", "quartiles", "CPU ratio", "throughput", "valid pairs"];
    table(&head, &rows);
    let loads = [(FULL, Load::full(&server)?, FULL_SECONDS), (PACED, Load::Paced(RATE), PACED_IN_TURNS_SECONDS)];
    for (name, load, seconds) in loads {
        let in_turns = turns::in_turns(rig, &programs, &server, load, seconds)?;
        turns::print(&format!("{runtime}, {name}"), &in_turns);
        results.insert(name.to_owned(), in_turns);
    }
    results.insert("loopguard_cpu_percent".to_owned(), json!(rounded(median(&own_cpu) * 100.0, 2)));
    results.insert("pairs".to_owned(), json!(pairs));
    Ok(json!({ runtime: results }))
}

/// Longer than the threshold.
const BLOCK: &str = "/block/sleep/150";
const CLOSELY_PACED: &str = "closely watched, 5000 requests a second";
const FULL: &str = "attached, wrk, in turns";
const PACED: &str = "attached, 5000 requests a second";
/// How long these are measured: turns differ more where threads sleep.
const FULL_SECONDS: u32 = 60;
const PACED_IN_TURNS_SECONDS: u32 = 180;

fn both_loads(programs: &TokioPrograms, server: &Server, watcher: Option<u32>) -> Result<[Round; 2]> {
    let paced = || {
        round_of(server, watcher, || {
            let mut pace = on_cpu(1, &programs.pace);
            pace.args([server.port.into(), 32, RATE, PACED_SECONDS].map(|number: u32| number.to_string()));
            let sent: Value = serde_json::from_str(&output(&mut pace).context("the paced load failed")?)?;
            sent["answered"].as_f64().context("the paced load says no number")
        })
    };
    let full = round_of(server, watcher, || wrk(server, ROUND_SECONDS))?;
    let rounds = (0..PACED_ROUNDS).map(|_| paced()).collect::<Result<Vec<_>>>()?;
    Ok([full, middle(rounds)])
}

/// At a fixed rate a request's CPU time depends on how the threads happen to take turns, which differs from one start of
/// the load to the next by more than what is measured. So there are several, of which the median by CPU time counts.
/// With the round under wrk they end before close watching does.
const PACED_ROUNDS: usize = 5;
const PACED_SECONDS: u32 = 1;

/// The median of the valid ones, if most of them are.
fn middle(mut rounds: Vec<Round>) -> Round {
    let all = rounds.len();
    rounds.retain(|round| round.valid);
    let valid = rounds.len() * 2 > all;
    let column = |figure: fn(&Round) -> f64| median(&rounds.iter().map(figure).collect::<Vec<_>>());
    Round { per_second: column(|round| round.per_second), cpu_us: column(|round| round.cpu_us), valid }
}

/// A round, and the bare ones around it.
struct Pair {
    bare: Round,
    throughput_ratio: f64,
    added_cpu_us: f64,
    cpu_ratio: f64,
}

impl Pair {
    fn of([before, after]: [Round; 2], during: Round) -> Self {
        let bare = Round {
            per_second: (before.per_second + after.per_second) / 2.0,
            cpu_us: (before.cpu_us + after.cpu_us) / 2.0,
            valid: true,
        };
        Self {
            bare,
            throughput_ratio: during.per_second / bare.per_second,
            added_cpu_us: during.cpu_us - bare.cpu_us,
            cpu_ratio: during.cpu_us / bare.cpu_us,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::charged_to_harmless;

    #[test]
    fn only_what_is_charged_to_a_harmless_request_counts() {
        let line = |path: &str, verdict: &str| {
            format!(r#"{{"type":"block","event":"single","verdict":"{verdict}","requests":[{{"path":"{path}"}}]}}"#)
        };
        let harmless = line("/ok/pool/30", "code");
        assert_eq!(charged_to_harmless(&harmless), [&harmless]);
        assert!(charged_to_harmless(&line("/ok/pool/30", "host")).is_empty());
        assert!(charged_to_harmless(&line("/block/sleep/30", "code")).is_empty());
        assert!(charged_to_harmless(r#"{"type":"summary"}"#).is_empty());
    }
}
