//! What the kernel programs cost, from the kernel's own statistics of them, and how large their records are.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use loopguard_common::records::{CAPTURE_BASE, PollRecord, RawFrame, StepRecord};
use serde_json::{Map, Value, json};

use super::rig::Rig;
use super::table;
use crate::step::say;

const SWITCH: &str = "/proc/sys/kernel/bpf_stats_enabled";
/// Waits of one request, and requests: what looking at one wait costs is far above the noise then.
const WAITS: u32 = 2000;
/// Of the application's own, in the deeper of two measurements.
const FRAMES: usize = 50;

pub fn run(rig: &Rig, seconds: u32) -> Result<Value> {
    let statistics = Statistics::enable()?;
    let server = rig.serve(&rig.python(), "uvloop", &[])?;
    let watching = rig.attach(server.process.pid(), &["--threshold=10ms"])?;
    let pid = watching.process.pid();
    let load = |arguments: &[&str]| -> Result<()> {
        let status = rig.script("load.py").arg(format!("--port={}", server.port)).args(arguments).status()?;
        ensure!(status.success(), "the load failed");
        Ok(())
    };
    let seconds_text = seconds.to_string();
    let mut results = Map::new();

    say(&format!("idle, {seconds} s"));
    let idle = during(pid, || {
        thread::sleep(Duration::from_secs(seconds.into()));
        Ok(())
    })?;
    say("waits, without and with fifty more frames");
    let shallow = during(pid, || get(server.port, &format!("/waits/{WAITS}?depth=0")))?;
    let waits = during(pid, || get(server.port, &format!("/waits/{WAITS}?depth={FRAMES}")))?;
    say(&format!("blocking load, {seconds} s"));
    let blocking = during(pid, || load(&["--profile=mixed", "--seconds", &seconds_text]))?;
    say(&format!("realistic load, step probes in place, {seconds} s"));
    let realistic = during(pid, || load(&["--profile=realistic", "--seconds", &seconds_text]))?;

    let (capture_ns, deeper_ns) = (capture_cost(&idle, &shallow), capture_cost(&idle, &waits));
    let frame_ns = ((deeper_ns - capture_ns) / FRAMES as f64).round();
    let mut rows = Vec::new();
    for (name, runs) in [("idle", idle), ("realistic", realistic), ("mixed", blocking), ("waits", waits)] {
        let mut programs = Map::new();
        for (program, run) in runs {
            let mean = run.mean().round();
            rows.push(vec![format!("{name}: {program}"), run.count.to_string(), mean.to_string()]);
            programs.insert(program, json!({ "runs": run.count, "run_ns": mean }));
        }
        results.insert(name.to_owned(), Value::Object(programs));
    }
    table(&["program", "runs", "ns a run"], &rows);
    let summary = watching.stop()?;
    drop(statistics);

    let records = json!({
        "step_bytes": size_of::<StepRecord>(),
        "poll_bytes": size_of::<PollRecord>(),
        "capture_bytes_without_frames": CAPTURE_BASE,
        "capture_bytes_with_50_frames": CAPTURE_BASE + FRAMES * size_of::<RawFrame>(),
    });
    println!("records: {records}");
    println!("a wait in a FastAPI handler, looked at: {capture_ns} ns; each frame more: {frame_ns} ns");
    Ok(json!({
        "programs": results,
        "records": records,
        "wait_capture_ns": capture_ns,
        "wait_capture_ns_with_50_more_frames": deeper_ns,
        "capture_ns_per_frame": frame_ns,
        "lost_records": summary["lost_records"],
    }))
}

/// What a switch to sleep with a capture costs, and the switch back: the run time of the waits' switches, without what
/// the other switches of that time cost, shared among the waits.
fn capture_cost(idle: &Runs, waits: &Runs) -> f64 {
    const SWITCH_PROGRAM: &str = "on_sched_switch";
    let (Some(miss), Some(all)) = (idle.get(SWITCH_PROGRAM), waits.get(SWITCH_PROGRAM)) else { return 0.0 };
    let known = f64::from(WAITS);
    let others = (all.count as f64 - 2.0 * known).max(0.0);
    ((all.time_ns as f64 - others * miss.mean()) / known).round()
}

fn get(port: u16, path: &str) -> Result<()> {
    use std::io::{Read as _, Write as _};
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port))?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.starts_with("HTTP/1.1 200"), "the server answers {answer}");
    Ok(())
}

/// The kernel's statistics of BPF programs, on as long as this lives and then as before.
struct Statistics {
    before: String,
}

impl Statistics {
    fn enable() -> Result<Self> {
        let before = fs::read_to_string(SWITCH).with_context(|| format!("read {SWITCH}"))?;
        fs::write(SWITCH, "1").with_context(|| format!("write {SWITCH}"))?;
        Ok(Self { before })
    }
}

impl Drop for Statistics {
    fn drop(&mut self) {
        let _ = fs::write(SWITCH, self.before.trim());
    }
}

#[derive(Clone, Copy, Default)]
struct Run {
    count: u64,
    time_ns: u64,
}

impl Run {
    fn mean(self) -> f64 {
        if self.count == 0 { 0.0 } else { self.time_ns as f64 / self.count as f64 }
    }
}

/// By name of the program.
type Runs = BTreeMap<String, Run>;

fn during(pid: u32, what: impl FnOnce() -> Result<()>) -> Result<Runs> {
    let before = programs(pid)?;
    what()?;
    let mut runs = programs(pid)?;
    for (name, run) in &mut runs {
        let earlier = before.get(name).copied().unwrap_or_default();
        run.count -= earlier.count;
        run.time_ns -= earlier.time_ns;
    }
    runs.retain(|_, run| run.count > 0);
    Ok(runs)
}

/// Of every program that the process holds; `/proc/PID/fdinfo` has the figures and the ids.
fn programs(pid: u32) -> Result<Runs> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(Path::new("/proc").join(pid.to_string()).join("fdinfo"))? {
        let Ok(text) = fs::read_to_string(entry?.path()) else { continue };
        let field = |name: &str| {
            text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t")?.trim().parse::<u64>().ok())
        };
        // A link's file names its program too, but has no figures.
        if let (Some(id), Some(time_ns), Some(count)) = (field("prog_id"), field("run_time_ns"), field("run_cnt")) {
            found.insert(id as u32, Run { count, time_ns });
        }
    }
    let mut runs = Runs::new();
    for (id, run) in found {
        let sum = runs.entry(program_name(id)?).or_default();
        sum.count += run.count;
        sum.time_ns += run.time_ns;
    }
    Ok(runs)
}

/// The kernel keeps the first 15 characters.
fn program_name(id: u32) -> Result<String> {
    const GET_FD_BY_ID: libc::c_int = 13;
    const INFO_BY_FD: libc::c_int = 15;
    const NAME: std::ops::Range<usize> = 64..80;
    // `union bpf_attr`: the id for the one, for the other the descriptor, the room and where it is.
    let mut by_id = [0u32; 3];
    by_id[0] = id;
    let fd = bpf(GET_FD_BY_ID, &mut by_id)?;
    // SAFETY: just opened, and nobody else's.
    let fd = unsafe { <std::os::fd::OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd) };
    let mut info = [0u8; 96];
    let address = (&raw mut info) as u64;
    let descriptor = std::os::fd::AsRawFd::as_raw_fd(&fd).cast_unsigned();
    bpf(INFO_BY_FD, &mut [descriptor, info.len() as u32, address as u32, (address >> 32) as u32])?;
    let name = &info[NAME];
    Ok(String::from_utf8_lossy(name.split(|byte| *byte == 0).next().unwrap_or(name)).into_owned())
}

fn bpf(command: libc::c_int, attributes: &mut [u32]) -> Result<libc::c_int> {
    // SAFETY: the attributes outlive the call, and what they point to is as long as they say.
    let answer =
        unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), size_of_val::<[u32]>(attributes)) };
    ensure!(answer >= 0, "ask the kernel for a program's name: {}", std::io::Error::last_os_error());
    Ok(answer as libc::c_int)
}
