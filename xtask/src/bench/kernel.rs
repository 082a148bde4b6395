//! What the kernel programs cost, from the kernel's own statistics of them, and how large their records are.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use loopguard_common::records::{CAPTURE_BASE, PollRecord, RawFrame, STACK_PAGE, StepRecord};
use serde_json::{Map, Value, json};

use super::overhead::{busy_loop, said};
use super::rig::{Rig, on_cpu};
use super::{median, table};
use crate::companion::Companion;
use crate::step::say;

const SWITCH: &str = "/proc/sys/kernel/bpf_stats_enabled";
/// Waits of one request, and requests: what looking at one wait costs is far above the noise then.
const WAITS: u32 = 2000;
/// Of the application's own, in the deeper of two measurements.
const FRAMES: usize = 50;
/// How often each figure of the budget is measured.
const ROUNDS: usize = 7;
const TICKS_PER_SECOND: &str = "2000";

const SWITCH_PROGRAM: &str = "on_sched_switch";
const POLL_PROGRAM: &str = "on_poll_enter";
const SAMPLE_PROGRAM: &str = "on_sample";

/// A tick after sleep: the poll and both switches.
const RUNS_A_TICK: f64 = 3.0;

/// The budget: what each may cost.
const TICK_NS: f64 = 400.0;
const MISS_NS: f64 = 50.0;
const SAMPLE_NS: f64 = 500.0;
const LOOK_NS: f64 = 5000.0;
const LOOK_WITH_STACK_NS: f64 = 15_000.0;

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
    let shallow = during(pid, || get(server.port, &format!("/waits/{WAITS}?depth=0")).map(drop))?;
    let waits = during(pid, || get(server.port, &format!("/waits/{WAITS}?depth={FRAMES}")).map(drop))?;
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
    drop(server);
    let budget = budget(rig, ["uvloop", "asyncio"])?;

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
        "budget": budget,
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
    let (Some(miss), Some(all)) = (idle.get(SWITCH_PROGRAM), waits.get(SWITCH_PROGRAM)) else { return 0.0 };
    let known = f64::from(WAITS);
    let others = (all.count as f64 - 2.0 * known).max(0.0);
    ((all.time_ns as f64 - others * miss.mean()) / known).round()
}

/// What a line of the budget is measured by: as often as it was, the least of it, since whatever else the machine does
/// only adds, and the median.
#[derive(Clone, Copy)]
struct Cost {
    least_ns: f64,
    median_ns: f64,
}

impl Cost {
    fn of(rounds: &[f64]) -> Self {
        Self { least_ns: rounds.iter().copied().fold(f64::INFINITY, f64::min), median_ns: median(rounds) }
    }

    /// The same of both figures.
    fn with(self, other: Self, change: impl Fn(f64, f64) -> f64) -> Self {
        Self { least_ns: change(self.least_ns, other.least_ns), median_ns: change(self.median_ns, other.median_ns) }
    }

    /// Held if the median is.
    fn within(self, budget_ns: f64) -> Value {
        let mut line = self.json();
        line["budget_ns"] = json!(budget_ns);
        line["held"] = json!(self.median_ns <= budget_ns);
        line
    }

    fn json(self) -> Value {
        json!({ "least_ns": self.least_ns.round(), "median_ns": self.median_ns.round() })
    }
}

/// Each line of what the kernel programs may cost, by name.
fn budget(rig: &Rig, event_loops: [&str; 2]) -> Result<Map<String, Value>> {
    let mut lines: Vec<(String, Value)> = Vec::new();
    for event_loop in event_loops {
        say(&format!("ticks of a healthy loop on {event_loop}, without the kernel's statistics"));
        let added = healthy_tick(rig, event_loop)?;
        lines.push((format!("healthy tick on {event_loop}, CPU time added to its thread"), added.within(TICK_NS)));
    }
    let statistics = Statistics::enable()?;
    say("switches of threads that are not watched");
    let miss = misses(rig)?;
    let own = |cost: Cost, runs: f64| cost.with(miss.empty, move |cost, empty| cost - runs * empty);
    let mut line = |name: &str, figures: Value| lines.push((name.to_owned(), figures));
    line("a program that does nothing, by the same statistics", miss.empty.json());
    line("sched_switch of threads that are not watched", miss.switch.within(MISS_NS));
    line(
        "sched_switch of threads that are not watched, without what the statistics cost",
        own(miss.switch, 1.0).within(MISS_NS),
    );
    say("ticks after sleep, and samples of young ticks");
    let asleep = sleeping_tick(rig, &miss)?;
    line("healthy tick after sleep, run time of its programs", asleep.within(TICK_NS));
    line("healthy tick after sleep, without what the statistics cost", own(asleep, RUNS_A_TICK).within(TICK_NS));
    let (sample, empty_sample) = young_sample(rig)?;
    line("sample of a young tick", sample.within(SAMPLE_NS));
    let own_sample = sample.with(empty_sample, |sample, empty| sample - empty);
    line("sample of a young tick, without what the statistics cost", own_sample.within(SAMPLE_NS));
    let looks = looks(rig, &miss)?;
    drop(statistics);
    line("a wait under 50 frames looked at, without its stack", looks.bare.within(LOOK_NS));
    line("a wait under 50 frames looked at, with 16 KiB of its stack", looks.with_16_kib.within(LOOK_WITH_STACK_NS));
    line("the first wait of a step, whose request is to be found, without its stack", looks.first.within(LOOK_NS));
    line("each frame of it", looks.frame.json());
    line("each page of its stack", looks.page.json());
    let rows: Vec<Vec<String>> = lines
        .iter()
        .map(|(name, line)| {
            let show = |field: &str| match &line[field] {
                Value::Null => "-".to_owned(),
                Value::Bool(held) => if *held { "yes" } else { "no" }.to_owned(),
                value => value.to_string(),
            };
            vec![name.clone(), show("least_ns"), show("median_ns"), show("budget_ns"), show("held")]
        })
        .collect();
    table(&["ns", "least", "median", "budget", "held"], &rows);
    Ok(lines.into_iter().collect())
}

/// A loop that never sleeps nor blocks, one callback a tick, without and with loopguard.
fn healthy_tick(rig: &Rig, event_loop: &str) -> Result<Cost> {
    let (target, file) = busy_loop(rig, event_loop)?;
    let ticks = || -> Result<Vec<f64>> {
        Ok(said(&file, Duration::from_secs(5))?.iter().filter_map(|line| line["tick_ns"].as_f64()).collect())
    };
    let mut bare = ticks()?;
    let watching = rig.attach(target.pid(), &[])?;
    let attached = Cost::of(&ticks()?);
    watching.stop()?;
    bare.extend(ticks()?);
    Ok(attached.with(Cost::of(&bare), |attached, bare| attached - bare))
}

/// What programs cost where there is nothing to do for them.
struct Misses {
    empty: Cost,
    switch: Cost,
}

/// Two threads of ours that wake each other, over and over, while loopguard watches a server that has nothing to do. A
/// program that does nothing hangs on the same switches: what its figure says is what the statistics themselves cost.
fn misses(rig: &Rig) -> Result<Misses> {
    let server = rig.serve(&rig.python(), "uvloop", &[])?;
    let watching = rig.attach(server.process.pid(), &[])?;
    let _empty = EmptyProgram::on_switches()?;
    let (mut empty, mut switch) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let (theirs, own) = beside(watching.process.pid(), || ping_pong(Duration::from_millis(500)))?;
        let mean = |runs: &Runs, name: &str| -> Result<f64> {
            let run = runs.get(name).with_context(|| format!("{name} did not run"))?;
            ensure!(run.count > 5000, "{name} ran only {} times", run.count);
            Ok(run.mean())
        };
        empty.push(mean(&own, EmptyProgram::NAME)?);
        switch.push(mean(&theirs, SWITCH_PROGRAM)?);
    }
    watching.stop()?;
    Ok(Misses { empty: Cost::of(&empty), switch: Cost::of(&switch) })
}

/// Switches between two threads on one processor.
fn ping_pong(time: Duration) -> Result<()> {
    let (mut ours, mut theirs) = UnixStream::pair()?;
    let until = Instant::now() + time;
    thread::scope(|scope| {
        scope.spawn(move || {
            on_first_processor();
            let mut ball = [0];
            while theirs.read_exact(&mut ball).is_ok() && theirs.write_all(&ball).is_ok() {}
        });
        scope.spawn(move || -> Result<()> {
            on_first_processor();
            let mut ball = [0];
            while Instant::now() < until {
                ours.write_all(&ball)?;
                ours.read_exact(&mut ball)?;
            }
            // Its end ends the other one.
            Ok(())
        });
    });
    Ok(())
}

/// The calling thread; where it cannot be kept there it has two to switch between.
fn on_first_processor() {
    // SAFETY: a plain set of bits, and a call that reads it.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(0, &mut set);
        libc::sched_setaffinity(0, size_of_val(&set), &raw const set);
    }
}

/// `return 0` where loopguard's programs do something: what it costs is what the statistics themselves cost there.
struct EmptyProgram {
    _program: OwnedFd,
    _attached: Vec<OwnedFd>,
}

impl EmptyProgram {
    const NAME: &str = "empty";

    fn on_switches() -> Result<Self> {
        const OPEN_RAW_TRACEPOINT: libc::c_int = 17;
        const RAW_TRACEPOINT: u32 = 17;
        let program = Self::load(RAW_TRACEPOINT)?;
        let tracepoint = c"sched_switch";
        let [low, high] = words(tracepoint.as_ptr() as u64);
        let link = owned(bpf(OPEN_RAW_TRACEPOINT, &mut [low, high, program.as_raw_fd().cast_unsigned(), 0])?);
        Ok(Self { _program: program, _attached: vec![link] })
    }

    /// A sampling clock on each processor, as loopguard's are.
    fn on_samples() -> Result<Self> {
        const PERF_EVENT: u32 = 7;
        const PERIOD_NS: u64 = 5_000_000;
        // `struct perf_event_attr` (linux/perf_event.h) in its first size: a software event, PERF_COUNT_SW_CPU_CLOCK, and
        // the period.
        let attributes: [u64; 8] = [64 << 32 | 1, 0, PERIOD_NS, 0, 0, 0, 0, 0];
        let program = Self::load(PERF_EVENT)?;
        let attached = (0..thread::available_parallelism()?.get()).map(|cpu| {
            // SAFETY: the attributes are as long as they say; the event is only counted.
            let event =
                unsafe { libc::syscall(libc::SYS_perf_event_open, attributes.as_ptr(), -1, cpu, -1, CLOSE_ON_EXEC) };
            ensure!(event >= 0, "a sampling clock on processor {cpu}: {}", std::io::Error::last_os_error());
            let event = owned(event as libc::c_int);
            // SAFETY: a descriptor of a program, as the call wants.
            let set = unsafe { libc::ioctl(event.as_raw_fd(), SET_BPF, program.as_raw_fd()) };
            ensure!(set == 0, "a program on a sampling clock: {}", std::io::Error::last_os_error());
            Ok(event)
        });
        let attached = attached.collect::<Result<_>>()?;
        Ok(Self { _program: program, _attached: attached })
    }

    fn load(kind: u32) -> Result<OwnedFd> {
        const LOAD: libc::c_int = 5;
        // `r0 = 0; exit`.
        let instructions: [u64; 2] = [0xb7, 0x95];
        let license = c"GPL";
        // `union bpf_attr`: kind, how many instructions, where they are, the licence; the name is 48 bytes in.
        let mut load = [0u32; 16];
        load[..2].copy_from_slice(&[kind, instructions.len() as u32]);
        load[2..4].copy_from_slice(&words(instructions.as_ptr() as u64));
        load[4..6].copy_from_slice(&words(license.as_ptr() as u64));
        let mut name = [0; 8];
        name[..Self::NAME.len()].copy_from_slice(Self::NAME.as_bytes());
        load[12..14].copy_from_slice(&words(u64::from_ne_bytes(name)));
        Ok(owned(bpf(LOAD, &mut load)?))
    }
}

/// PERF_FLAG_FD_CLOEXEC and PERF_EVENT_IOC_SET_BPF (linux/perf_event.h).
const CLOSE_ON_EXEC: libc::c_ulong = 8;
const SET_BPF: libc::c_ulong = 0x4004_2408;

/// A number of eight bytes, low half first.
fn words(number: u64) -> [u32; 2] {
    [number as u32, (number >> 32) as u32]
}

/// A loop that does next to nothing in each of its ticks, and sleeps before: the programs at the switches to sleep and
/// back and at the poll.
fn sleeping_tick(rig: &Rig, miss: &Misses) -> Result<Cost> {
    let file = rig.folder.join("many-loops.jsonl");
    let mut command = on_cpu(0, &rig.python());
    command
        .arg(rig.scripts.join("many_loops.py"))
        .args(["1", TICKS_PER_SECOND])
        .stdin(Stdio::null())
        .stdout(File::create(&file)?);
    let target = Companion::start(&mut command)?;
    thread::sleep(Duration::from_secs(1));
    let watching = rig.attach(target.pid(), &[])?;
    let mut rounds = Vec::new();
    for _ in 0..ROUNDS {
        let (mut lines, since) = (Vec::new(), Instant::now());
        let runs = during(watching.process.pid(), || {
            lines = said(&file, Duration::from_secs(2))?;
            Ok(())
        })?;
        let elapsed = since.elapsed().as_secs_f64();
        let sum = |field: &str| lines.iter().filter_map(|line| line[field].as_f64()).sum::<f64>();
        let ticks = sum("ticks") / sum("seconds") * elapsed;
        ensure!(ticks > 500.0, "the loop does not tick");
        // A poll of others is found out in the same way as a switch of others.
        let cost: f64 = [(POLL_PROGRAM, 1.0), (SWITCH_PROGRAM, 2.0)]
            .iter()
            .map(|(name, a_tick)| {
                let run = runs.get(*name).copied().unwrap_or_default();
                run.time_ns as f64 - (run.count as f64 - a_tick * ticks).max(0.0) * miss.switch.median_ns
            })
            .sum();
        rounds.push(cost / ticks);
    }
    watching.stop()?;
    Ok(Cost::of(&rounds))
}

/// A loop that is on the CPU all the time and whose ticks are over long before they are old; and a program that does
/// nothing, sampled likewise: an interrupt finds nothing of either in the processor's caches.
fn young_sample(rig: &Rig) -> Result<(Cost, Cost)> {
    let (target, _) = busy_loop(rig, "uvloop")?;
    let watching = rig.attach(target.pid(), &["--threshold=20ms"])?;
    let _empty = EmptyProgram::on_samples()?;
    let (mut rounds, mut empty) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let (theirs, own) = beside(watching.process.pid(), || {
            thread::sleep(Duration::from_secs(1));
            Ok(())
        })?;
        for (runs, name, means) in [(&theirs, SAMPLE_PROGRAM, &mut rounds), (&own, EmptyProgram::NAME, &mut empty)] {
            let run = runs.get(name).copied().unwrap_or_default();
            ensure!(run.count >= 20, "only {} samples by {name}", run.count);
            means.push(run.mean());
        }
    }
    let summary = watching.stop()?;
    say(&format!("records meanwhile: {}", summary["records"]["sent"]));
    Ok((Cost::of(&rounds), Cost::of(&empty)))
}

/// What looking at one wait costs while nothing of it is sent: the switch to sleep, and the one back.
struct Looks {
    bare: Cost,
    with_16_kib: Cost,
    first: Cost,
    frame: Cost,
    page: Cost,
}

/// Waits of 100 us in a FastAPI handler, all in one step but for those of `first`, under as many frames as there are
/// anyway and under fifty more: what each frame costs follows, and what fifty in all do. Likewise with one page of the
/// stack, the least that can be copied, and with four.
fn looks(rig: &Rig, miss: &Misses) -> Result<Looks> {
    const SIZES: [(&str, f64); 2] = [("--stack-size=4KiB", 1.0), ("--stack-size=16KiB", 4.0)];
    const FIRST: u32 = 200;
    // A stack ends with the environment: this makes it deep enough wherever the kernel lets it begin.
    let padding = "x".repeat(2 * STACK_PAGE);
    let server = rig.serve(&rig.python(), "uvloop", &[("BENCH_PADDING", Path::new(&padding))])?;
    let (port, pid) = (server.port, server.process.pid());
    let pages = stack_pages(port, pid)?;
    ensure!(pages >= 4, "the server's stack has only {pages} pages there");
    let mut depths = [0.0; 2];
    let mut costs = Vec::new();
    let mut first = Vec::new();
    for (size, _) in SIZES {
        let watching = rig.attach(
            pid,
            &["--threshold=60s", "--cumulative-threshold=60s", "--cumulative-window=60s", "--steps=off", size],
        )?;
        let own = watching.process.pid();
        say(&format!("waits that are only looked at, {size}"));
        let mut rounds = [Vec::new(), Vec::new()];
        for _ in 0..ROUNDS {
            for (depth, (rounds, frames)) in [0, FRAMES].iter().zip(rounds.iter_mut().zip(&mut depths)) {
                let mut answer = String::new();
                let runs = during(own, || {
                    answer = get(port, &format!("/waits/{WAITS}?depth={depth}"))?;
                    Ok(())
                })?;
                *frames = answer.rsplit("\r\n\r\n").next().and_then(|body| body.trim().parse().ok()).unwrap_or(0.0);
                rounds.push(of_waits(&runs, WAITS, miss) / f64::from(WAITS));
            }
            if size == SIZES[0].0 {
                // One wait a request, and none: the rest of both is the same.
                let all = |waits: u32| {
                    let path = format!("/waits/{waits}?depth={FRAMES}");
                    let runs = during(own, || (0..FIRST).try_for_each(|_| get(port, &path).map(drop)))?;
                    anyhow::Ok(of_waits(&runs, waits * FIRST, miss))
                };
                first.push((all(1)? - all(0)?) / f64::from(FIRST));
            }
        }
        let summary = watching.stop()?;
        ensure!(summary["blocks"] == 0, "waits that were to be looked at only were told");
        costs.push(rounds.map(|rounds| Cost::of(&rounds)));
    }
    ensure!(depths[0] > 0.0 && depths[1] > depths[0], "the server does not say how many frames it has");
    let [few, many] = [costs[0], costs[1]];
    let frame =
        |[shallow, deep]: [Cost; 2]| deep.with(shallow, |deep, shallow| (deep - shallow) / (depths[1] - depths[0]));
    let at_fifty =
        |costs: [Cost; 2]| costs[0].with(frame(costs), |shallow, frame| shallow + frame * (FRAMES as f64 - depths[0]));
    let page = at_fifty(many).with(at_fifty(few), |many, few| (many - few) / (SIZES[1].1 - SIZES[0].1));
    let without_page = |cost: Cost| cost.with(page, |cost, page| cost - page);
    // Those had fifty frames more than the fewest, not fifty in all.
    let extra = frame(few);
    let first = Cost::of(&first).with(extra, |first, frame| first - frame * (depths[1] - FRAMES as f64));
    Ok(Looks {
        bare: without_page(at_fifty(few)),
        with_16_kib: at_fifty(many),
        first: without_page(first),
        frame: extra,
        page,
    })
}

/// The run time of the switches of so many waits: all there was, without what the other switches cost.
fn of_waits(runs: &Runs, waits: u32, miss: &Misses) -> f64 {
    let all = runs.get(SWITCH_PROGRAM).copied().unwrap_or_default();
    let others = (all.count as f64 - 2.0 * f64::from(waits)).max(0.0);
    all.time_ns as f64 - others * miss.switch.median_ns
}

/// Pages of the main thread's stack from where it waits on: `/proc/PID/syscall` has the stack pointer.
fn stack_pages(port: u16, pid: u32) -> Result<u64> {
    let waits = thread::spawn(move || get(port, &format!("/waits/{WAITS}?depth={FRAMES}")));
    thread::sleep(Duration::from_millis(100));
    let mut pages = u64::MAX;
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let stack = maps.lines().find(|line| line.ends_with("[stack]")).context("no stack in its maps")?;
    let hex = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).ok();
    let end = stack.split(['-', ' ']).nth(1).and_then(hex).context("no end of the stack in its maps")?;
    for _ in 0..20 {
        let call = fs::read_to_string(format!("/proc/{pid}/syscall"))?;
        if let Some(sp) = call.split_whitespace().rev().nth(1).and_then(hex) {
            pages = pages.min((end - (sp & !(STACK_PAGE as u64 - 1))) / STACK_PAGE as u64);
        }
        thread::sleep(Duration::from_millis(3));
    }
    waits.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    ensure!(pages != u64::MAX, "it was never seen to wait");
    Ok(pages)
}

fn get(port: u16, path: &str) -> Result<String> {
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port))?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.starts_with("HTTP/1.1 200"), "the server answers {answer}");
    Ok(answer)
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

/// Of the process's programs and of our own.
fn beside(pid: u32, what: impl FnOnce() -> Result<()>) -> Result<(Runs, Runs)> {
    let mut own = Runs::new();
    let theirs = during(pid, || {
        own = during(std::process::id(), what)?;
        Ok(())
    })?;
    Ok((theirs, own))
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
    let fd = owned(bpf(GET_FD_BY_ID, &mut by_id)?);
    let mut info = [0u8; 96];
    let address = (&raw mut info) as u64;
    let descriptor = fd.as_raw_fd().cast_unsigned();
    bpf(INFO_BY_FD, &mut [descriptor, info.len() as u32, address as u32, (address >> 32) as u32])?;
    let name = &info[NAME];
    Ok(String::from_utf8_lossy(name.split(|byte| *byte == 0).next().unwrap_or(name)).into_owned())
}

fn owned(fd: libc::c_int) -> OwnedFd {
    // SAFETY: just opened by `bpf`, and nobody else's.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn bpf(command: libc::c_int, attributes: &mut [u32]) -> Result<libc::c_int> {
    // SAFETY: the attributes outlive the call, and what they point to is as long as they say.
    let answer =
        unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), size_of_val::<[u32]>(attributes)) };
    ensure!(answer >= 0, "BPF call {command}: {}", std::io::Error::last_os_error());
    Ok(answer as libc::c_int)
}
