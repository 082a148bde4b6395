//! `loopguard attach`: follows running processes until they end, the time is over or somebody says stop.

use std::{collections::BTreeSet, time::Duration};

use anyhow::{Context as _, Result, bail};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};

use crate::{
    args,
    core::{
        event::{Event, TickCounts},
        profile::{Profile, Settings},
        status::{Status, ThreadStatus},
        summary::Measured,
    },
    output::{Output, output_error},
    source::{
        kernel::Talk,
        live::{Live, Options, Steps},
        target,
    },
    tui::screen::Wish,
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
const NO_LOOP: &str = "no event loop seen so far: no thread of the target has called epoll_wait; still looking";

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
    let mut output = Output::open(arguments)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the event loop")?;
    runtime.block_on(follow(arguments, &mut output))
}

async fn follow(arguments: &args::Attach, output: &mut Output) -> Result<Outcome> {
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
    let mut stop = Stop::listen()?;
    let pids: BTreeSet<u32> = arguments.pids.iter().copied().collect();
    let mut live = Live::attach(&pids, options)?;
    output.begin()?;
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
            output.say(&notice);
        }
        for event in events.drain(..) {
            if let Event::LoopFound(info) = &event {
                saw_loop = true;
                output.found(info, &live.describe(info.pid), options.threshold_ns);
            }
            for update in profile.apply(event) {
                output.sink().update(&update).map_err(output_error)?;
            }
        }
        for (tid, threshold_ns, told_from_ns) in profile.thresholds() {
            live.set_threshold(tid, threshold_ns, told_from_ns)?;
        }
        if live.all_ended() {
            output.say(if arguments.pids.len() == 1 { "the process has ended" } else { "the processes have ended" });
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
                        output.say(NO_LOOP);
                    }
                }
            }
            _ = status.tick() => {
                let status = live.status();
                events.extend(tick_counts(&status));
                output.sink().status(&status).map_err(output_error)?;
            }
            _ = sleep_until(end) => break,
            _ = stop.told() => break,
            wish = output.turn() => if wish? == Wish::Leave { break },
        }
    }
    // What is under way when the end comes still counts.
    live.finish(&mut events)?;
    for event in events.drain(..) {
        for update in profile.apply(event) {
            output.sink().update(&update).map_err(output_error)?;
        }
    }
    for update in profile.finish() {
        output.sink().update(&update).map_err(output_error)?;
    }
    let summary = profile.summary(&Measured::from(&live.status()));
    output.sink().finish(&summary).map_err(output_error)?;
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

/// Everything that asks loopguard to end, and lets it say what it saw.
struct Stop {
    interrupt: Signal,
    terminate: Signal,
    /// The terminal is gone.
    hangup: Signal,
}

impl Stop {
    fn listen() -> Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    async fn told(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = self.hangup.recv() => {}
        }
    }
}
