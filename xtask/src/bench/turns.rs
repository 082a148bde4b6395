//! What watching costs a server under a load that goes on: its CPU time while it is watched and while it is not, in
//! turns of a fifth of a second.
//!
//! A machine whose speed changes from one second to the next tells nothing by rounds that are half a minute apart.

use std::fs;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::overhead::{wrk, wrk_command};
use super::rig::{Rig, Server, TokioPrograms, on_cpu};
use super::{median, output, rounded, row, table};
use crate::companion::Companion;
use crate::step::say;

/// Where a worker of tokio parks is known by then, and nothing is watched closely any more.
const SETTLE_SECONDS: u32 = 13;
/// The load begins earlier and ends later.
const MARGIN_SECONDS: u32 = 5;
const CONNECTIONS: u32 = 32;
/// For so long requests and segments are both counted.
const COUNTED_SECONDS: u32 = 3;

/// Requests of `/hello` on as many connections.
#[derive(Clone, Copy)]
pub enum Load {
    /// So many a second.
    Paced(u32),
    /// As many as are answered, of which each is so many TCP segments.
    Full { segments: f64 },
}

impl Load {
    /// As many as the server can answer.
    pub fn full(server: &Server) -> Result<Self> {
        let before = segments_in()?;
        let requests = wrk(server, COUNTED_SECONDS)?;
        Ok(Self::Full { segments: (segments_in()? - before) / requests })
    }

    fn command(self, programs: &TokioPrograms, server: &Server, seconds: u32) -> Command {
        match self {
            Self::Paced(per_second) => {
                let mut pace = on_cpu(1, &programs.pace);
                let numbers = [server.port.into(), CONNECTIONS, per_second, seconds];
                pace.args(numbers.map(|number: u32| number.to_string()));
                pace
            }
            Self::Full { .. } => {
                let mut wrk = wrk_command(server, seconds);
                wrk.stdout(Stdio::null());
                wrk
            }
        }
    }
}

/// TCP segments that came in on this machine: `Tcp: InSegs` (net/ipv4/proc.c), the tenth count.
fn segments_in() -> Result<f64> {
    let counts = fs::read_to_string("/proc/net/snmp")?;
    let tcp = counts.lines().filter_map(|line| line.strip_prefix("Tcp:")).nth(1);
    let count = tcp.and_then(|values| values.split_whitespace().nth(9)).context("no counts of TCP")?;
    Ok(count.parse()?)
}

/// A server under `load` for so many seconds.
pub fn in_turns(rig: &Rig, programs: &TokioPrograms, server: &Server, load: Load, seconds: u32) -> Result<Value> {
    let example = rig.build_example("watch_in_turns")?;
    say(&format!("watched and not, in turns, {seconds} s"));
    let _load = Companion::start(&mut load.command(programs, server, SETTLE_SECONDS + seconds + 2 * MARGIN_SECONDS))?;
    thread::sleep(Duration::from_secs(1));
    let mut watch = on_cpu(1, &example);
    watch.args([server.process.pid(), SETTLE_SECONDS, seconds].map(|number| number.to_string()));
    let told = output(&mut watch).context("the turns were not measured")?;
    let turns = told.lines().map(|line| Turn::read(line, load)).collect::<Result<Vec<_>>>()?;
    summary(&turns)
}

/// One turn, with the CPU time of a request.
struct Turn {
    watches: bool,
    cpu_us: f64,
}

impl Turn {
    fn read(line: &str, load: Load) -> Result<Self> {
        let told: Value = serde_json::from_str(line).with_context(|| format!("not a turn: {line}"))?;
        let number = |field: &str| told[field].as_f64().with_context(|| format!("a turn without {field}: {line}"));
        let requests = match load {
            Load::Paced(per_second) => number("wall_ns")? / 1e9 * f64::from(per_second),
            Load::Full { segments } => number("segments")? / segments,
        };
        let watches = told["watches"].as_bool().with_context(|| format!("a turn of nobody: {line}"))?;
        Ok(Self { watches, cpu_us: number("cpu_ns")? / 1e3 / requests })
    }
}

/// Each turn that was watched against the two around it.
fn summary(turns: &[Turn]) -> Result<Value> {
    let (mut bare, mut added, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for around in turns.windows(3).filter(|around| around[1].watches) {
        let unwatched = (around[0].cpu_us + around[2].cpu_us) / 2.0;
        bare.push(unwatched);
        added.push(around[1].cpu_us - unwatched);
        ratios.push(around[1].cpu_us / unwatched);
    }
    ensure!(bare.len() >= 10, "only {} turns were measured", bare.len());
    Ok(json!({
        "turns": bare.len(),
        "bare_cpu_us": rounded(median(&bare), 2),
        "added_cpu_us": rounded(median(&added), 2),
        "added_cpu_us_between": between(&added, 2),
        "server_cpu_ratio": rounded(median(&ratios), 3),
        "server_cpu_ratio_between": between(&ratios, 3),
    }))
}

/// Where the median lies with 95 %: by the ranks between which it falls that often, whatever the distribution.
fn between(values: &[f64], digits: i32) -> Value {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (middle, off) = (sorted.len() as f64 / 2.0, 0.98 * (sorted.len() as f64).sqrt());
    let at = |rank: f64| sorted[(rank.max(0.0) as usize).min(sorted.len() - 1)];
    json!([rounded(at((middle - off).floor()), digits), rounded(at((middle + off).ceil()), digits)])
}

/// What was measured of a server.
pub fn print(name: &str, measured: &Value) {
    let fields = [
        "bare_cpu_us",
        "added_cpu_us",
        "added_cpu_us_between",
        "server_cpu_ratio",
        "server_cpu_ratio_between",
        "turns",
    ];
    let head = ["in turns", "CPU us/request", "added", "95 %", "CPU ratio", "95 %", "turns"];
    table(&head, &[row(name, measured, &fields)]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watched_turn_is_measured_by_those_around_it() {
        let turns: Vec<Turn> = (0..41)
            .map(|n| {
                let line = json!({
                    "watches": n % 2 == 1,
                    "wall_ns": 200_000_000u64,
                    // The machine grows slower and slower.
                    "cpu_ns": 10_000_000u64 + n * 100_000 + u64::from(n % 2 == 1) * 1_000_000,
                });
                Turn::read(&line.to_string(), Load::Paced(5000)).unwrap()
            })
            .collect();
        let summary = summary(&turns).unwrap();
        assert_eq!(summary["turns"], 20);
        assert_eq!(summary["added_cpu_us"], 1.0);
        assert_eq!(summary["added_cpu_us_between"], json!([1.0, 1.0]));
    }

    #[test]
    fn without_a_rate_segments_tell_the_requests() {
        let line = r#"{"watches": true, "wall_ns": 1, "cpu_ns": 6000000, "segments": 2400}"#;
        assert_eq!(Turn::read(line, Load::Full { segments: 2.0 }).unwrap().cpu_us, 5.0);
    }

    #[test]
    fn the_median_of_many_is_known_better() {
        let few: Vec<f64> = (0..20).map(f64::from).collect();
        assert_eq!(between(&few, 0), json!([5.0, 15.0]));
        let many: Vec<f64> = (0..2000).map(|n| f64::from(n) / 100.0).collect();
        assert_eq!(between(&many, 2), json!([9.56, 10.44]));
    }
}
