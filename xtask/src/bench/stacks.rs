//! How complete native stacks are, on interpreters and servers with and without symbols; how they compare with gdb's;
//! and what a thousand captures a second cost.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};
use xtask::workspace::Workspace;

use super::rig::{Rig, TokioBuild, Watching, free_port, on_cpu};
use super::table;
use crate::companion::{Companion, listens};
use crate::pythons::{self, Venv};
use crate::sid::Sid;
use crate::step::say;

/// Enough that the looks into blocks are about a millisecond apart.
const CLOSELY: [&str; 2] = ["--threshold=16ms", "--steps=off"];
const KINDS: [&str; 7] = ["sleep", "socket", "python", "hashlib", "zlib", "sqlite3", "numpy"];
/// Of the axum server.
const BUILDS: [(&str, TokioBuild); 3] =
    [("release", TokioBuild::Release), ("fat-lto", TokioBuild::FatLto), ("release, stripped", TokioBuild::Stripped)];
const ENOUGH: u64 = 1000;
const MOST_TRIES: u32 = 4;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Interpreters {
    Host,
    HostAndSid,
}

/// What is watched, and what makes it do something.
struct Subject {
    name: String,
    process: Companion,
    /// Ends with it.
    _load: Option<Companion>,
}

pub fn completeness(rig: &Rig, interpreters: Interpreters, seconds: u32) -> Result<Value> {
    let workspace = Workspace::locate()?;
    let mut rows = Vec::new();
    let mut results = Map::new();
    let mut measure = |subject: Subject| -> Result<()> {
        let mut total = Counts::default();
        for _ in 0..MOST_TRIES {
            total.add(&watch(rig, &subject, seconds)?);
            if total.unwound >= ENOUGH {
                break;
            }
        }
        rows.push(total.row(&subject.name));
        results.insert(subject.name.clone(), total.json());
        Ok(())
    };
    for (version, python, script) in python_programs(rig, &workspace, interpreters)? {
        for kind in KINDS {
            if kind == "numpy" && script.chroot.is_some() {
                continue;
            }
            let process = Companion::start(&mut script.command(&python, kind))?;
            measure(Subject { name: format!("CPython {version}: {kind}"), process, _load: None })?;
        }
    }
    for (name, build) in BUILDS {
        measure(axum(rig, name, build)?)?;
    }
    table(&["stacks", "captures", "complete", "%", "lost", "why not"], &rows);
    Ok(Value::Object(results))
}

#[derive(Default)]
struct Counts {
    unwound: u64,
    complete: u64,
    lost: u64,
    why: Map<String, Value>,
}

impl Counts {
    fn add(&mut self, stacks: &Value) {
        let number = |value: &Value| value.as_u64().unwrap_or(0);
        self.unwound += number(&stacks["unwound"]);
        self.complete += number(&stacks["complete"]);
        self.lost += number(&stacks["lost"]);
        for (why, count) in stacks["incomplete"].as_object().into_iter().flatten() {
            let sum = self.why.get(why).map_or(0, number) + number(count);
            self.why.insert(why.clone(), json!(sum));
        }
    }

    fn percent(&self) -> f64 {
        (self.complete as f64 * 1e4 / self.unwound.max(1) as f64).round() / 100.0
    }

    fn row(&self, name: &str) -> Vec<String> {
        let why: Vec<String> = self.why.iter().map(|(why, count)| format!("{count}: {why}")).collect();
        let numbers = [self.unwound.to_string(), self.complete.to_string(), format!("{:.2}", self.percent())];
        let mut row = vec![name.to_owned()];
        row.extend(numbers);
        row.extend([self.lost.to_string(), why.join("; ")]);
        row
    }

    fn json(&self) -> Value {
        json!({
            "captures": self.unwound,
            "complete": self.complete,
            "percent": self.percent(),
            "lost": self.lost,
            "incomplete": self.why,
        })
    }
}

/// The counts of the stacks that loopguard saw in `seconds`.
fn watch(rig: &Rig, subject: &Subject, seconds: u32) -> Result<Value> {
    let watching = rig.attach(subject.process.pid(), &CLOSELY)?;
    thread::sleep(Duration::from_secs(seconds.into()));
    let summary = watching.stop()?;
    ensure!(summary["stacks"].is_object(), "{}: no stack was seen", subject.name);
    Ok(summary["stacks"].clone())
}

struct Script {
    path: PathBuf,
    chroot: Option<PathBuf>,
}

impl Script {
    fn command(&self, python: &Path, kind: &str) -> Command {
        let mut command = match &self.chroot {
            // OpenBLAS begins as many threads as it has processors, and puts large buffers on the stack then.
            None if kind == "numpy" => Command::new(python),
            None => on_cpu(0, python),
            Some(root) => {
                let mut command = on_cpu(0, Path::new("chroot"));
                command.arg(root).arg(python);
                command
            }
        };
        command.arg(&self.path).arg(kind).stdin(Stdio::null()).stdout(Stdio::null());
        command
    }
}

/// Version, interpreter and what it runs.
fn python_programs(
    rig: &Rig,
    workspace: &Workspace,
    interpreters: Interpreters,
) -> Result<Vec<(String, PathBuf, Script)>> {
    let script = rig.scripts.join("blockers.py");
    let mut programs = Vec::new();
    for python in pythons::find().iter().filter(|python| python.to_string() == "3.12") {
        let requirements = rig.scripts.join("requirements-stacks.txt");
        let venv = Venv::prepare(python, rig.folder.join("venv-stacks"), &requirements)?;
        programs.push((format!("{python} (pyenv)"), venv.python(), Script { path: script.clone(), chroot: None }));
    }
    if programs.is_empty() {
        say("going on without CPython 3.12: none is here");
    }
    if interpreters == Interpreters::HostAndSid {
        let sid = Sid::interpreters(workspace)?;
        fs::copy(&script, sid.root().join("blockers.py")).context("copy the script into the chroot")?;
        for version in ["3.13", "3.14"] {
            let script = Script { path: "/blockers.py".into(), chroot: Some(sid.root().to_owned()) };
            programs.push((
                format!("{version} (Debian, stripped)"),
                format!("/usr/bin/python{version}").into(),
                script,
            ));
        }
    }
    Ok(programs)
}

fn axum(rig: &Rig, name: &str, build: TokioBuild) -> Result<Subject> {
    let programs = rig.build_tokio(build)?;
    let port = free_port()?;
    let mut server = on_cpu(0, &programs.server);
    server.args(["spawned", &port.to_string()]).stdin(Stdio::null());
    let process = Companion::start(&mut server)?;
    for _ in 0..100 {
        if listens(port) {
            break;
        }
        thread::sleep(Duration::from_millis(50));
    }
    let mut load = on_cpu(1, &programs.load);
    load.args([&port.to_string(), "12", "600", "7", "100"]).stdin(Stdio::null()).stdout(Stdio::null());
    Ok(Subject { name: format!("axum, {name}"), process, _load: Some(Companion::start(&mut load)?) })
}

/// Stacks of processes that are stopped, beside those that gdb shows of them.
pub fn beside_gdb(rig: &Rig, interpreters: Interpreters, times: u32) -> Result<Value> {
    let workspace = Workspace::locate()?;
    if Command::new("gdb").arg("--version").stdout(Stdio::null()).status().is_err() {
        bail!("this needs gdb: run `apt-get install gdb`");
    }
    let program = rig.build_example("beside_gdb")?;
    let mut rows = Vec::new();
    let mut results = Map::new();
    for (version, python, script) in python_programs(rig, &workspace, interpreters)? {
        for kind in KINDS {
            if kind == "numpy" && script.chroot.is_some() {
                continue;
            }
            let target = Companion::start(&mut script.command(&python, kind))?;
            thread::sleep(Duration::from_secs(2));
            let output = Command::new(&program).args([target.pid().to_string(), times.to_string()]).output()?;
            let text = String::from_utf8_lossy(&output.stdout);
            let stacks: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
            ensure!(!stacks.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
            let sum = |field: &str| stacks.iter().filter_map(|stack| stack[field].as_u64()).sum::<u64>();
            let equal = stacks.iter().filter(|stack| stack["same"] == stack["gdb"] && stack["same"] == stack["frames"]);
            let differ: Vec<&Value> = stacks
                .iter()
                .filter(|stack| stack["same"] != stack["gdb"] || stack["same"] != stack["frames"])
                .collect();
            let name = format!("CPython {version}: {kind}");
            let numbers = [stacks.len() as u64, equal.count() as u64, sum("gdb"), sum("same")];
            rows.push([vec![name.clone()], numbers.map(|number| number.to_string()).to_vec()].concat());
            results.insert(
                name,
                json!({
                    "stacks": numbers[0], "equal": numbers[1], "gdb_frames": numbers[2], "same_frames": numbers[3],
                    "different": differ,
                }),
            );
        }
    }
    table(&["beside gdb", "stacks", "equal", "frames of gdb's", "the same"], &rows);
    Ok(Value::Object(results))
}

/// Two loops that compute, one on each processor, looked at every millisecond.
pub fn rate(rig: &Rig, seconds: u32) -> Result<Value> {
    let script = rig.scripts.join("blockers.py");
    let start = |cpu: usize| -> Result<Companion> {
        let mut command = on_cpu(cpu, &rig.python());
        command.arg(&script).arg("python").stdin(Stdio::null()).stdout(Stdio::null());
        Companion::start(&mut command)
    };
    let targets = [start(0)?, start(1)?];
    thread::sleep(Duration::from_secs(1));
    let other = targets[1].pid().to_string();
    // What so many captures cost is the question, so that they are not made fewer for it.
    let options = ["--pid", &other, CLOSELY[0], CLOSELY[1], "--budget=100%"];
    let watching: Watching = rig.attach(targets[0].pid(), &options)?;
    thread::sleep(Duration::from_secs(seconds.into()));
    let status = fs::read_to_string(format!("/proc/{}/status", watching.process.pid()))?;
    let peak =
        status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.split_whitespace().next()?.parse::<u64>().ok());
    let summary = watching.stop()?;
    let elapsed = summary["duration_s"].as_f64().unwrap_or(1.0);
    let unwound = summary["stacks"]["unwound"].as_u64().unwrap_or(0);
    let rate = unwound as f64 / elapsed;
    let cores = summary["self_cpu_ms"].as_f64().unwrap_or(0.0) / 1e3 / elapsed;
    let peak_mib = peak.unwrap_or(0) as f64 / 1024.0;
    let lost = [&summary["lost_records"], &summary["stacks"]["lost"]].map(|count| count.as_u64().unwrap_or(0));
    table(
        &["captures a second", "for, s", "complete", "lost records", "lost stacks", "cores", "peak memory, MiB"],
        &[vec![
            format!("{rate:.0}"),
            format!("{elapsed:.0}"),
            summary["stacks"]["complete"].to_string(),
            lost[0].to_string(),
            lost[1].to_string(),
            format!("{cores:.2}"),
            format!("{peak_mib:.0}"),
        ]],
    );
    Ok(json!({
        "captures_per_second": rate, "seconds": elapsed, "captures": unwound, "complete": summary["stacks"]["complete"],
        "lost_records": lost[0], "lost_stacks": lost[1], "cores": cores, "peak_mib": peak_mib,
    }))
}
