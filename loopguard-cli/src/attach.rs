//! `loopguard attach`: follows running processes until they end, the time is over or somebody says stop.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, BufWriter, IsTerminal as _, Write},
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, bail};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};

use crate::{
    args::{self, Format},
    core::{
        event::{Event, LoopInfo, StepMarks, TickCounts},
        profile::{Profile, Settings},
        status::{Status, ThreadStatus},
        summary::Measured,
    },
    sink::{
        Sink,
        jsonl::JsonLines,
        text::{Look, Style, Text, Times, WallClock},
    },
    source::{
        kernel::Talk,
        live::{Live, Options, Steps},
        process, target,
    },
};

/// How often threads and processes are looked over.
const REAP_EVERY: Duration = Duration::from_millis(200);
/// How often sinks get the live figures.
const STATUS_EVERY: Duration = Duration::from_secs(1);
/// Steps that wait are looked at this many times within one threshold.
const LOOKS_PER_THRESHOLD: u32 = 4;
const LOOK_EVERY: std::ops::RangeInclusive<Duration> = Duration::from_millis(2)..=Duration::from_millis(50);
/// How long a target may take to show its first loop thread before loopguard says that it sees none.
const NO_LOOP_HINT: Duration = Duration::from_secs(3);

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub blocks: u64,
}

pub fn run(arguments: &args::Attach) -> Result<Outcome> {
    for &pid in &arguments.pids {
        target::check(pid)?;
    }
    target::check_privileges()?;
    // Before anything is attached: an output that cannot be written is better known now.
    let mut sink = open_sink(arguments)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the event loop")?;
    runtime.block_on(follow(arguments, sink.as_mut()))
}

async fn follow(arguments: &args::Attach, sink: &mut dyn Sink) -> Result<Outcome> {
    let settings = Settings::fixed(arguments.threshold.as_nanos() as u64);
    let options = Options {
        threshold_ns: settings.threshold.initial_ns(),
        cumulative: settings.cumulative,
        capture_after_ns: None,
        sample_every_ns: None,
        steps: match arguments.steps {
            args::Steps::Auto => Steps::Auto,
            args::Steps::Off => Steps::Off,
        },
        stack_size: arguments.stack_size,
        talk: if arguments.debug_bpf { Talk::Debug } else { Talk::Silent },
    };
    let mut stop = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let pids: BTreeSet<u32> = arguments.pids.iter().copied().collect();
    let mut live = Live::attach(&pids, options)?;
    let mut profile = Profile::new(settings);
    let mut events = Vec::new();
    live.scan(&mut events)?;

    let look_every = (arguments.threshold / LOOKS_PER_THRESHOLD).clamp(*LOOK_EVERY.start(), *LOOK_EVERY.end());
    let mut look = interval(look_every);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut reap = interval(REAP_EVERY);
    reap.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut status = interval(STATUS_EVERY);
    status.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let far_away = Duration::from_secs(10 * 365 * 24 * 3600);
    let end = Instant::now() + arguments.duration.unwrap_or(far_away);
    let mut no_loop_hint = Some(Instant::now() + NO_LOOP_HINT);
    let mut saw_loop = false;

    loop {
        for notice in live.take_notices() {
            say(&notice);
        }
        for event in events.drain(..) {
            if let Event::LoopFound(info) = &event {
                saw_loop = true;
                say_found(info, &live, options.threshold_ns);
            }
            for update in profile.apply(event) {
                sink.update(&update).map_err(output_error)?;
            }
        }
        for (tid, threshold_ns, told_from_ns) in profile.thresholds() {
            live.set_threshold(tid, threshold_ns, told_from_ns)?;
        }
        if live.all_ended() {
            say(if arguments.pids.len() == 1 { "the process has ended" } else { "the processes have ended" });
            break;
        }
        tokio::select! {
            ready = live.readable() => {
                ready?;
                live.drain(&mut events)?;
            }
            _ = look.tick() => {
                // Records of requests wake nobody.
                live.drain(&mut events)?;
                live.watch(&mut events)?;
            }
            _ = reap.tick() => {
                live.drain(&mut events)?;
                live.reap(&mut events);
                if no_loop_hint.is_some_and(|at| Instant::now() >= at) {
                    no_loop_hint = None;
                    if !saw_loop {
                        say("no event loop seen so far: no thread of the target has called epoll_wait; still looking");
                    }
                }
            }
            _ = status.tick() => {
                let status = live.status();
                events.extend(tick_counts(&status));
                sink.status(&status).map_err(output_error)?;
            }
            _ = sleep_until(end) => break,
            _ = stop.0.recv() => break,
            _ = stop.1.recv() => break,
        }
    }
    // What is under way when the end comes still counts.
    live.finish(&mut events)?;
    for event in events.drain(..) {
        for update in profile.apply(event) {
            sink.update(&update).map_err(output_error)?;
        }
    }
    for update in profile.finish() {
        sink.update(&update).map_err(output_error)?;
    }
    let summary = profile.summary(&Measured::from(&live.status()));
    sink.finish(&summary).map_err(output_error)?;
    if !saw_loop {
        bail!(
            "saw no event loop in process {}: nothing can be said about blocking (loopguard doctor --pid {} says why)",
            arguments.pids.iter().map(u32::to_string).collect::<Vec<_>>().join(", "),
            arguments.pids[0],
        );
    }
    Ok(Outcome { blocks: profile.blocks() })
}

/// What an adaptive threshold follows.
fn tick_counts(status: &Status) -> impl Iterator<Item = Event> {
    status.threads.iter().filter(|thread| !thread.is_gone).map(|thread| {
        let ThreadStatus { info, tick_histogram: histogram, .. } = thread;
        Event::Ticks(TickCounts { tid: info.tid, now_ns: status.now_ns, histogram: *histogram })
    })
}

fn open_sink(arguments: &args::Attach) -> Result<Box<dyn Sink>> {
    let (out, is_terminal): (Box<dyn Write>, bool) = match &arguments.output {
        Some(path) => {
            let file = File::create(path).with_context(|| format!("cannot write to {}", path.display()))?;
            (Box::new(file), false)
        }
        None => (Box::new(io::stdout()), io::stdout().is_terminal()),
    };
    let out = BufWriter::new(out);
    Ok(match arguments.format {
        Format::Jsonl => Box::new(JsonLines::new(out)),
        Format::Text => {
            let plain = !is_terminal || std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
            let look = Look {
                style: if plain { Style::Plain } else { Style::Ansi },
                times: Times::Local(wall_clock()),
                current_dir: std::env::current_dir().ok(),
            };
            Box::new(Text::new(out, look))
        }
    })
}

fn wall_clock() -> WallClock {
    let unix = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let seconds = unix.as_secs() as libc::time_t;
    // SAFETY: a plain struct, filled by the call.
    let utc_offset_s = unsafe {
        let mut local = std::mem::zeroed::<libc::tm>();
        libc::localtime_r(&seconds, &mut local);
        local.tm_gmtoff as i32
    };
    WallClock { monotonic_ns: process::monotonic_ns(), unix, utc_offset_s }
}

fn output_error(error: io::Error) -> anyhow::Error {
    match error.kind() {
        io::ErrorKind::BrokenPipe => anyhow::anyhow!("the reader of the output is gone; stopped"),
        io::ErrorKind::StorageFull => {
            anyhow::anyhow!("no space left where the output is written; what was written before is kept")
        }
        _ => anyhow::Error::new(error).context("cannot write the output"),
    }
}

/// For the person at the terminal; never mixed into the output itself.
fn say(text: &str) {
    let line = format!("loopguard: {}\n", crate::sink::escape::printable(text));
    // In one piece, for whoever reads along. If nobody does, there is nothing to be done about it.
    let _ = io::stderr().write_all(line.as_bytes());
}

fn say_found(info: &LoopInfo, live: &Live, threshold_ns: u64) {
    let runtime = format!("{:?}", info.runtime).to_lowercase();
    let steps = match info.steps {
        StepMarks::Exact => "exact steps",
        StepMarks::TicksOnly => "ticks only",
    };
    say(&format!(
        "watching process {}, thread {} ({}): {runtime}, {}, {steps}; threshold {} ms",
        info.pid,
        info.tid,
        info.thread,
        live.describe(info.pid),
        threshold_ns as f64 / 1e6,
    ));
}
