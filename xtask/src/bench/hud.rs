//! hud (github.com/cong-or/hud), another tool for tokio that needs no change to the server, beside loopguard: the same
//! server, built as hud wants it, and the same load for one after the other.

use std::fs::{self, File};
use std::path::Path;
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::rig::{Rig, TokioBuild, cpu_time, on_cpu};
use super::tokio::{charged_to_harmless, load, scored, serve_anywhere, warm_up};
use super::{rounded, table};
use crate::companion::Companion;
use crate::step::{self, say};

const THRESHOLD_MS: &str = "10";
/// hud says nothing when it has begun to watch; and it is told when to end.
const BEFORE: Duration = Duration::from_secs(3);
const AFTER: u32 = 4;

pub fn run(rig: &Rig, hud: &Path, seconds: u32) -> Result<Value> {
    let programs = rig.build_tokio(TokioBuild::FramePointers)?;
    let truth = rig.folder.join("truth-hud.jsonl");

    say(&format!("loopguard, {seconds} s"));
    let server = serve_anywhere(rig, &programs, "multi", &truth)?;
    let watching = rig.attach(server.process.pid(), &["--threshold=10ms"])?;
    warm_up(&server)?;
    load(&programs, &server, seconds)?;
    let loopguard_cpu = cpu_time(watching.process.pid())?;
    let events = watching.events.clone();
    watching.stop()?;
    drop(server);
    let wrong = rig.folder.join("hud.wrong");
    let score = &scored(rig, &truth, &events, &wrong)?["at_10ms"];
    let loopguard = json!({
        "true_blocks": score["true_blocks"],
        "reports": score["reports"],
        "recall": score["recall"],
        "precision": score["precision"],
        "attribution_precision": score["attribution_precision"],
        "attribution_recall": score["attribution_recall"],
        "negatives_reported": charged_to_harmless(&fs::read_to_string(&wrong)?).len(),
        "cpu_s": rounded(loopguard_cpu.as_secs_f64(), 2),
    });

    say(&format!("hud, {seconds} s"));
    let server = serve_anywhere(rig, &programs, "multi", &truth)?;
    let log = rig.folder.join("hud.log");
    let file = File::create(&log)?;
    let mut command = on_cpu(1, hud);
    command
        .args(["--pid", &server.process.pid().to_string(), "--workers=shop", "--headless", "--export"])
        .arg(rig.folder.join("hud-trace.json"))
        .args(["--threshold", THRESHOLD_MS, "--duration", &(seconds + AFTER).to_string()])
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file);
    let mut watching = Companion::start(&mut command)?;
    thread::sleep(BEFORE);
    ensure!(watching.ended().is_none(), "hud did not begin:\n{}", step::tail(&log));
    warm_up(&server)?;
    load(&programs, &server, seconds)?;
    let hud_cpu = cpu_time(watching.pid())?;
    while watching.ended().is_none() {
        thread::sleep(Duration::from_millis(100));
    }
    drop(server);
    let nothing = rig.folder.join("nothing.jsonl");
    fs::write(&nothing, "")?;
    let printed = fs::read_to_string(&log)?;
    // The first line is its name and version.
    let version = printed.lines().next().unwrap_or_default();
    ensure!(version.starts_with("hud v"), "that is no hud:\n{}", step::tail(&log));
    let told = Told::read(&printed);
    let hud = json!({
        "true_blocks": scored(rig, &truth, &nothing, &wrong)?["at_10ms"]["true_blocks"],
        "reports": told.blocks,
        "reports_with_a_stack": told.blocks_with_stack,
        "cpu_samples": told.samples,
        "cpu_s": rounded(hud_cpu.as_secs_f64(), 2),
    });

    let shown = |value: &Value| if value.is_null() { "not told".to_owned() } else { value.to_string() };
    let rows: Vec<Vec<String>> = [
        ("blocks of 12.5 ms or more", "true_blocks"),
        ("reports", "reports"),
        ("blocks found", "recall"),
        ("reports that are right", "precision"),
        ("requests rightly blamed", "attribution_precision"),
        ("blocks whose request is named", "attribution_recall"),
        ("harmless requests wrongly reported", "negatives_reported"),
        ("CPU samples", "cpu_samples"),
        ("its own CPU, s", "cpu_s"),
    ]
    .into_iter()
    .map(|(title, field)| vec![title.to_owned(), shown(&loopguard[field]), shown(&hud[field])])
    .collect();
    table(&["told at 10 ms", "loopguard", version], &rows);
    Ok(json!({ "loopguard": loopguard, "hud": hud, "hud_version": version }))
}

/// What hud printed.
#[derive(Debug, Default, PartialEq, Eq)]
struct Told {
    /// That a worker was blocked.
    blocks: usize,
    /// Of those: with the code that did it.
    blocks_with_stack: usize,
    /// Of a thread that was on a CPU.
    samples: usize,
}

impl Told {
    fn read(text: &str) -> Self {
        let blocks = text.matches("[BLOCK]").count();
        Self {
            blocks,
            blocks_with_stack: blocks - text.matches("No stack trace captured").count().min(blocks),
            samples: text.matches("[EXEC_START]").count(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Told;

    #[test]
    fn what_hud_prints_is_counted() {
        let text = "[EXEC_START] pid=1 tid=2 worker=0\n\n[BLOCK] 19.97ms pid=1 tid=2\n  state=RUNNING\n\n   \
                    No stack trace captured (stack_id = -1)\n[BLOCK] 12.00ms pid=1 tid=2\n";
        assert_eq!(Told::read(text), Told { blocks: 2, blocks_with_stack: 1, samples: 1 });
        assert_eq!(Told::read(""), Told::default());
    }
}
