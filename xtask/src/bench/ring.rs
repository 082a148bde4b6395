//! How much the ring buffer has room for: records sent, received and lost at 1, 10 and 100 times a normal rate, and
//! while loopguard is stopped.

use std::fs::File;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::rig::{Rig, cpu_time, on_cpu};
use super::{rounded, table};
use crate::companion::Companion;
use crate::step::say;

/// A loop that is blocked without a break by waits of this length is captured a hundred times a second, which is called
/// normal here. So many loops at once are so many times that.
const WAIT_MS: &str = "10";
const TIMES: [u32; 3] = [1, 10, 100];
/// Every wait is worth a capture then.
const CLOSELY: [&str; 3] = ["--threshold=16ms", "--sample-every=1ms", "--steps=off"];
/// For all loops to be found.
const SETTLE: Duration = Duration::from_secs(2);
/// Of the stopped loopguard. The ring buffer is full after a second or two.
const STOPPED_TIMES: u32 = 10;

pub fn run(rig: &Rig, seconds: u32) -> Result<Value> {
    let seconds = Duration::from_secs(seconds.into());
    let mut results: Vec<(String, Value)> = Vec::new();
    for times in TIMES {
        say(&format!("{times} times a normal rate, {} s", seconds.as_secs()));
        results.push((format!("{times}x"), one(rig, times, seconds, |_| Ok(()))?));
    }
    say(&format!("{STOPPED_TIMES} times, loopguard stopped for {} s", seconds.as_secs()));
    let stopped = one(rig, STOPPED_TIMES, Duration::from_secs(1), |pid| {
        signal(pid, libc::SIGSTOP)?;
        thread::sleep(seconds);
        signal(pid, libc::SIGCONT)
    })?;
    ensure!(stopped["lost"].as_u64() > Some(0), "the ring buffer did not overflow: {stopped}");
    results.push((format!("{STOPPED_TIMES}x, loopguard stopped"), stopped));
    let fields = ["records_per_second", "sent", "received", "lost", "lost_stacks", "loopguard_cpu_percent"];
    let rows: Vec<Vec<String>> = results
        .iter()
        .map(|(name, run)| {
            [name.clone()].into_iter().chain(fields.iter().map(|field| run[field].to_string())).collect()
        })
        .collect();
    table(&["rate", "records a second", "sent", "received", "lost", "stacks lost", "loopguard's CPU, %"], &rows);
    Ok(Value::Object(results.into_iter().collect()))
}

/// Watches so many loops for so long, with something done to loopguard halfway. That each record that was sent was
/// received or lost is no figure: where it is not so, there are none.
fn one(rig: &Rig, loops: u32, seconds: Duration, halfway: impl FnOnce(u32) -> Result<()>) -> Result<Value> {
    let mut command = on_cpu(0, &rig.python());
    command
        .arg(rig.scripts.join("many_waits.py"))
        .args([&loops.to_string(), WAIT_MS])
        .stdin(Stdio::null())
        .stdout(File::create(rig.folder.join("many-waits.log"))?);
    let target = Companion::start(&mut command)?;
    thread::sleep(SETTLE);
    let watching = rig.attach(target.pid(), &CLOSELY)?;
    let pid = watching.process.pid();
    thread::sleep(SETTLE);
    let (used, since) = (cpu_time(pid)?, Instant::now());
    thread::sleep(seconds / 2);
    halfway(pid)?;
    thread::sleep(seconds / 2);
    let own_cpu = (cpu_time(pid)? - used).as_secs_f64() / since.elapsed().as_secs_f64();
    let summary = watching.stop()?;
    let count = |name: &str| summary["records"][name].as_u64().with_context(|| format!("no {name} in {summary}"));
    let (sent, received, lost) = (count("sent")?, count("received")?, count("lost")?);
    ensure!(sent == received + lost, "sent {sent}, received {received}, lost {lost}: this does not add up");
    let threads = summary["threads"].as_array().map_or(0, Vec::len);
    ensure!(threads == loops as usize, "loopguard saw {threads} of {loops} loops");
    let watched_s = summary["duration_s"].as_f64().unwrap_or(f64::INFINITY);
    Ok(json!({
        "loops": loops,
        "watched_s": watched_s,
        "records_per_second": (sent as f64 / watched_s).round(),
        "sent": sent,
        "received": received,
        "lost": lost,
        "lost_stacks": summary["stacks"]["lost"],
        "unwound_stacks": summary["stacks"]["unwound"],
        "loopguard_cpu_percent": rounded(own_cpu * 100.0, 2),
    }))
}

fn signal(pid: u32, signal: libc::c_int) -> Result<()> {
    // SAFETY: a plain system call; the process is our own child and not waited for yet.
    ensure!(unsafe { libc::kill(pid.cast_signed(), signal) } == 0, "loopguard is gone");
    Ok(())
}
