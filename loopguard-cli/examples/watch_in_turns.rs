//! Watches the loops of a process and lets go of them in turns, and says what CPU time the process took in each: what
//! watching costs, on a machine whose speed changes from one second to the next.
//!
//! usage: watch_in_turns PID SETTLE_S SECONDS
//! Nothing is told of the first SETTLE_S seconds: loopguard learns what it needs of the loops. Then it prints one JSON
//! object a turn. How many TCP segments came in in its network namespace meanwhile is in it, too: under a load without a
//! fixed rate they tell how many requests there were.

use std::{
    collections::BTreeSet,
    fs, thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use loopguard::{
    core::cumulative::CumulativeSettings,
    source::{
        governor::Budget,
        kernel::Talk,
        live::{Live, Options, StackSize, Steps},
    },
};
use serde_json::json;

/// Long against what it takes to attach the programs, short against how the machine changes.
const TURN: Duration = Duration::from_millis(200);
/// For so long after each change nothing is measured: a change takes a processor from whatever makes the load, which then
/// catches up.
const AFTER_CHANGE: Duration = Duration::from_millis(150);
const LOOK_EVERY: Duration = Duration::from_millis(10);
const REAP_EVERY: Duration = Duration::from_millis(500);

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, pid, settle, seconds] = &arguments[..] else { bail!("usage: watch_in_turns PID SETTLE_S SECONDS") };
    let pid: u32 = pid.parse()?;
    let (settle, seconds) = (Duration::from_secs(settle.parse()?), Duration::from_secs(seconds.parse()?));
    // What waits for records belongs to it.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let _entered = runtime.enter();
    let mut live = Live::attach(&BTreeSet::from([pid]), options())?;
    let mut events = Vec::new();
    live.scan(&mut events)?;
    let settled = Instant::now() + settle;
    while Instant::now() < settled {
        look_for(REAP_EVERY, &mut live)?;
        live.reap(&mut events);
        events.clear();
    }
    // From here on nothing is reaped: then it would measure its own cost, which the target pays a little for, in some turns.
    let (until, mut watches) = (Instant::now() + seconds, true);
    while Instant::now() < until {
        look_for(AFTER_CHANGE, &mut live)?;
        let (since, segments, cpu) = (Instant::now(), segments_in(pid)?, cpu_time(pid)?);
        look_for(TURN, &mut live)?;
        let (cpu, segments, wall) = (cpu_time(pid)? - cpu, segments_in(pid)? - segments, since.elapsed());
        let (wall, cpu) = (wall.as_nanos(), cpu.as_nanos());
        println!("{}", json!({ "watches": watches, "wall_ns": wall, "cpu_ns": cpu, "segments": segments }));
        watches = !watches;
        if watches {
            live.watch_again();
        } else {
            live.rest();
        }
    }
    Ok(())
}

/// Those of `loopguard attach`.
fn options() -> Options {
    Options {
        threshold_ns: 50_000_000,
        steps: Steps::Auto,
        stack_size: StackSize::AsNeeded,
        cumulative: CumulativeSettings::default(),
        capture_after_ns: None,
        sample_every_ns: None,
        slowdown: 1,
        budget: Budget::Usual,
        talk: Talk::Silent,
    }
}

/// What the program does meanwhile.
fn look_for(time: Duration, live: &mut Live) -> Result<()> {
    let since = Instant::now();
    let mut events = Vec::new();
    while since.elapsed() < time {
        thread::sleep(LOOK_EVERY.min(time.saturating_sub(since.elapsed())));
        live.watch(&mut events)?;
        events.clear();
    }
    Ok(())
}

/// `Tcp: InSegs` (net/ipv4/proc.c), the tenth count.
fn segments_in(pid: u32) -> Result<u64> {
    let counts = fs::read_to_string(format!("/proc/{pid}/net/snmp"))?;
    let tcp = counts.lines().filter_map(|line| line.strip_prefix("Tcp:")).nth(1);
    let count = tcp.and_then(|values| values.split_whitespace().nth(9)).context("no counts of TCP")?;
    Ok(count.parse()?)
}

/// Up to this moment, of the threads that run, too.
fn cpu_time(pid: u32) -> Result<Duration> {
    let mut clock = 0;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: places for the results.
    let found = unsafe {
        libc::clock_getcpuclockid(pid.cast_signed(), &raw mut clock) == 0
            && libc::clock_gettime(clock, &raw mut time) == 0
    };
    ensure!(found, "process {pid} is gone");
    Ok(Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
}
