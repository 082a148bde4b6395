//! A target that is costly to watch: loopguard notices what it costs, looks less closely and says so.

mod support;

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use loopguard::source::process::stat;
use support::{Watching, alone, can_trace, free_port, pythons, request};

/// Steps as short as they can be, each of which meets a step probe, and a block now and then so that steps are marked.
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
    await asyncio.gather(block(), *(spin() for _ in range(4)))

asyncio.run(main())
";
/// Two windows at the start that don't count, and a few in which it finds out.
const FIND_OUT: Duration = Duration::from_secs(26);
/// Long enough for two of its measurements.
const MEASURE: Duration = Duration::from_secs(10);

/// Of loopguard with its kernel programs, by its own account.
fn own_cpu(port: u16) -> f64 {
    let metrics = request(port, "GET /metrics HTTP/1.1\r\nhost: test\r\n\r\n");
    let value = metrics.lines().find_map(|line| line.strip_prefix("loopguard_self_cpu_seconds_total "));
    value.unwrap_or_else(|| panic!("{metrics}")).trim().parse().unwrap()
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
    let port = free_port();
    let address = format!("127.0.0.1:{port}");
    let watching = Watching::start(target.id(), &["--threshold", "50ms", "--budget", "2%", "--prometheus", &address]);
    let spent = || (own_cpu(port), stat(target.id()).unwrap().cpu.as_secs_f64());
    thread::sleep(FIND_OUT);
    let before = spent();
    thread::sleep(MEASURE);
    let after = spent();
    let events = watching.stop();
    target.kill().unwrap();
    target.wait().unwrap();
    fs::remove_file(&program).unwrap();

    let said: Vec<&str> = events.messages.lines().filter(|line| line.contains("over the budget of 2 %")).collect();
    assert!(!said.is_empty(), "{}", events.messages);
    assert!(said.iter().any(|line| line.contains("steps are not marked")), "{}", events.messages);
    let share = (after.0 - before.0) / (after.1 - before.1);
    println!("watching took {:.2} % of the target's CPU time in the end", share * 100.0);
    assert!(share <= 0.02, "{share}: {}", events.messages);
    assert!(events.blocks().count() > 0, "it still sees blocks");
}
