//! A target that is costly to watch: loopguard notices what it costs, looks less closely, says so, and keeps to its budget.

mod support;

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use aya::sys::{Stats, enable_stats};
use loopguard::source::process::stat;
use support::{Watching, alone, can_trace, pythons};

/// Steps as short as they can be, each of which meets a step probe and a tick's end, and a block now and then so that
/// steps are marked.
const COSTLY: &str = "
import asyncio, time

async def spin():
    while True:
        await asyncio.sleep(0)

async def block():
    while True:
        await asyncio.sleep(1)
        time.sleep(0.06)

async def main():
    await asyncio.gather(block(), spin())

asyncio.run(main())
";
const BUDGET: f64 = 0.02;
const CHANGED: &str = "the budget of 2 %";
/// It has found out what it has to give up when it gave up nothing more for so long: three of its windows.
const SETTLED: Duration = Duration::from_secs(12);
/// There are seven levels, and a window of four seconds before each.
const MAX_SETTLING: Duration = Duration::from_secs(60);
const MEASURE: Duration = Duration::from_secs(20);

/// CPU time of loopguard and of its kernel programs: by the kernel's account, not by its own.
fn cost(pid: u32) -> Duration {
    // Several descriptors can lead to one program.
    let mut programs: Vec<(u64, u64)> = fs::read_dir(format!("/proc/{pid}/fdinfo"))
        .unwrap()
        .filter_map(|entry| fs::read_to_string(entry.unwrap().path()).ok())
        .filter_map(|text| {
            let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
            Some((field("prog_id:")?, field("run_time_ns:")?))
        })
        .collect();
    programs.sort_unstable();
    programs.dedup_by_key(|(id, _)| *id);
    assert!(programs.len() > 5, "{programs:?}");
    stat(pid).unwrap().cpu + Duration::from_nanos(programs.iter().map(|(_, run_time)| run_time).sum())
}

#[test]
fn the_budget_is_held_on_a_target_that_is_costly_to_watch() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    let Some(python) = pythons().into_iter().next_back() else { return };
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("costly-{}.py", std::process::id()));
    fs::write(&program, COSTLY).unwrap();
    let mut target = Command::new(&python).arg(&program).stdin(Stdio::null()).spawn().unwrap();
    thread::sleep(Duration::from_millis(500));
    let statistics = enable_stats(Stats::RunTime).unwrap();
    let watching = Watching::start(target.id(), &["--threshold", "50ms", "--budget", "2%"]);
    let changes = || watching.messages().matches(CHANGED).count();
    let started = Instant::now();
    let (mut last, mut since) = (0, Instant::now());
    while last == 0 || since.elapsed() < SETTLED {
        assert!(started.elapsed() < MAX_SETTLING, "it does not settle: {}", watching.messages());
        thread::sleep(Duration::from_millis(200));
        if changes() != last {
            (last, since) = (changes(), Instant::now());
        }
    }
    let spent = || (cost(watching.pid()), stat(target.id()).unwrap().cpu);
    let before = spent();
    thread::sleep(MEASURE);
    let after = spent();
    drop(statistics);
    let events = watching.stop();
    target.kill().unwrap();
    target.wait().unwrap();
    fs::remove_file(&program).unwrap();

    let share = (after.0 - before.0).as_secs_f64() / (after.1 - before.1).as_secs_f64();
    println!("watching took {:.2} % of the target's CPU time in the end\n{}", share * 100.0, events.messages);
    assert!(share <= BUDGET, "{share}: {}", events.messages);
    for given_up in ["over the budget of 2 %", "samples are 8 times as far apart", "steps are not marked"] {
        assert!(events.messages.contains(given_up), "{given_up}: {}", events.messages);
    }
    assert!(events.blocks().count() > 0, "it still sees blocks");
    let summary = events.summary();
    assert!(summary["limited_s"].as_f64().unwrap() >= MEASURE.as_secs_f64(), "{summary}");
    let rested = events.messages.contains("loops are watched");
    assert_eq!(rested, summary["unwatched_s"].is_f64(), "{summary} {}", events.messages);
}
