//! `loopguard attach` and `run`: follow processes until they end, the time is over or somebody says stop.

use std::{collections::BTreeSet, ffi::OsString, fs::File, path::Path, pin::pin, time::Duration};

use anyhow::{Context as _, Result, bail};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    time::{Instant, Interval, MissedTickBehavior, interval, sleep_until},
};

use crate::{
    alarm::Alarm,
    args,
    core::{
        event::{Event, TickCounts},
        incident::Update,
        profile::{Profile, Settings},
        status::{Status, ThreadStatus},
        summary::{Measured, Summary},
    },
    options,
    output::{Output, output_error, wall_clock},
    run::{self, Held, Started},
    sink::{
        Sink as _, Sinks,
        gate::{Allowed, Gate, Reports},
        log::Log,
        prometheus::Prometheus,
    },
    source::{
        governor::Budget,
        kernel::Talk,
        live::{Live, Options, StackSize, Steps},
        select::{Newcomers, Selection},
        target,
    },
    tui::screen::Wish,
};

/// How often threads and processes are looked over.
const REAP_EVERY: Duration = Duration::from_millis(200);
/// How often processes are looked for that start later and belong to what was asked for.
const NEWCOMERS_EVERY: Duration = Duration::from_secs(1);
/// How often sinks get the live figures.
const STATUS_EVERY: Duration = Duration::from_secs(1);
/// How long a target may take to show its first loop thread before loopguard says that it sees none.
const NO_LOOP_HINT: Duration = Duration::from_secs(3);
const NO_LOOP: &str = "no event loop seen so far: no thread of the target has called epoll_wait; still looking";

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Blocks that make the run fail.
    pub failing_blocks: u64,
    /// The exit code of the command that was run, if one was.
    pub command: Option<u8>,
}

/// Watches processes that run already.
pub fn run(arguments: &args::Attach) -> Result<Outcome> {
    if selection(arguments) == Selection::default() {
        bail!("say which process to watch: --pid, --name, --cgroup or --container");
    }
    target::check_privileges()?;
    for &pid in &arguments.pids {
        target::check(pid)?;
    }
    start(arguments, None)
}

fn selection(arguments: &args::Attach) -> Selection {
    Selection {
        pids: arguments.pids.clone(),
        names: arguments.names.clone(),
        cgroups: arguments.cgroups.clone(),
        containers: arguments.containers.clone(),
    }
}

/// Starts a command and watches it.
pub fn run_command(arguments: &args::Run) -> Result<Outcome> {
    if selection(&arguments.attach) != Selection::default() {
        bail!("loopguard run starts its own process; use loopguard attach --pid for one that runs already");
    }
    let mut attach = arguments.attach.clone();
    // A live view would share the terminal with the command.
    attach.format.get_or_insert(args::Format::Text);
    start(&attach, Some(&arguments.command))
}

fn start(arguments: &args::Attach, command: Option<&[OsString]>) -> Result<Outcome> {
    target::check_privileges()?;
    let settings = arguments.detection.settings(arguments.monitoring.label_cap).map_err(anyhow::Error::msg)?;
    // Before anything is attached: an output that cannot be written is better known now.
    let outputs = Outputs::open(arguments)?;
    // And before it is started what can't be watched.
    let held = command.map(Held::start).transpose()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the event loop")?;
    runtime.block_on(follow(arguments, settings, outputs, held))
}

/// Where what is found goes.
struct Outputs {
    main: Output,
    others: Sinks,
    gate: Gate<Box<dyn Fn(u64) -> bool>>,
}

impl Outputs {
    fn open(arguments: &args::Attach) -> Result<Self> {
        let options::Gate { fail_on_blocking, allow, junit, markdown } = arguments.gate.clone();
        let allowed = allow.as_deref().map(Allowed::read).transpose()?.unwrap_or_default();
        for report in [&junit, &markdown].into_iter().flatten() {
            create(report)?;
        }
        let fails = Box::new(move |ns| fail_on_blocking.is_failed_by(ns));
        let mut others = Sinks::default();
        if let Some(path) = &arguments.monitoring.log {
            let log = Log::open(path, wall_clock()).with_context(|| format!("cannot write to {}", path.display()))?;
            others.0.push(Box::new(log));
        }
        if let Some(address) = arguments.monitoring.prometheus {
            // Privileges are a thread's own: this one reads what comes from the network.
            let serve = Prometheus::serve(address, arguments.monitoring.label_cap, target::drop_all_privileges);
            others.0.push(Box::new(serve?));
        }
        let gate = Gate::new(allowed, Reports { junit, markdown }, fails as Box<dyn Fn(u64) -> bool>);
        Ok(Self { main: Output::open(arguments)?, others, gate })
    }

    fn update(&mut self, update: &Update) -> Result<()> {
        self.gate.update(update).map_err(output_error)?;
        self.others.update(update).map_err(output_error)?;
        self.main.sink().update(update).map_err(output_error)
    }

    fn status(&mut self, status: &Status) -> Result<()> {
        self.others.status(status).map_err(output_error)?;
        self.main.sink().status(status).map_err(output_error)
    }

    fn finish(&mut self, summary: &Summary) -> Result<()> {
        self.main.sink().finish(summary).map_err(output_error)?;
        self.gate.finish(summary).map_err(output_error)?;
        self.others.finish(summary).map_err(output_error)
    }
}

async fn follow(
    arguments: &args::Attach,
    settings: Settings,
    mut outputs: Outputs,
    held: Option<Held>,
) -> Result<Outcome> {
    let options = options_of(arguments, &settings);
    let mut stop = Stop::listen()?;
    let pids: BTreeSet<u32> = match &held {
        Some(held) => [held.pid].into(),
        None => selection(arguments).find()?,
    };
    if let Some(address) = arguments.monitoring.prometheus.filter(|address| !address.ip().is_loopback()) {
        outputs.main.say(&format!("--prometheus: {address} can be reached from other machines, without a password"));
    }
    let mut live = Live::attach(&pids, options)?;
    let mut newcomers = Newcomers::of(&selection(arguments));
    outputs.main.begin()?;
    let mut profile = Profile::new(settings);
    let mut events = Vec::new();
    live.scan(&mut events)?;
    let mut command = held.map(Held::go).transpose()?;

    let look = Alarm::new().context("set a timer")?;
    let mut reap = every(REAP_EVERY);
    let mut status = every(STATUS_EVERY);
    let mut newcomer = every(NEWCOMERS_EVERY);
    let far_away = Duration::from_secs(10 * 365 * 24 * 3600);
    let mut end = pin!(sleep_until(Instant::now() + arguments.duration.unwrap_or(far_away)));
    let mut no_loop_hint = Some(Instant::now() + NO_LOOP_HINT);
    let mut saw_loop = false;

    loop {
        for notice in live.take_notices() {
            outputs.main.say(&notice);
        }
        for event in events.drain(..) {
            if let Event::LoopFound(info) = &event {
                saw_loop = true;
                outputs.main.found(info, &live.describe(info.pid), options.threshold_ns);
            }
            for update in profile.apply(event) {
                outputs.update(&update)?;
            }
        }
        for (tid, threshold_ns, told_from_ns) in profile.thresholds() {
            live.set_threshold(tid, threshold_ns, told_from_ns)?;
        }
        if live.all_ended() {
            outputs.main.say(if live.watched_processes() == 1 {
                "the process has ended"
            } else {
                "the processes have ended"
            });
            break;
        }
        tokio::select! {
            ready = live.readable() => {
                ready?;
                live.drain(&mut events)?;
            }
            rings = look.rings() => {
                rings.context("wait for a timer")?;
                look.set(live.watch(&mut events)?).context("set a timer")?;
            }
            _ = reap.tick() => {
                live.drain(&mut events)?;
                live.reap(&mut events);
                if no_loop_hint.is_some_and(|at| Instant::now() >= at) {
                    no_loop_hint = None;
                    if !saw_loop {
                        outputs.main.say(NO_LOOP);
                    }
                }
            }
            _ = status.tick() => {
                let status = live.status();
                events.extend(tick_counts(&status));
                outputs.status(&status)?;
            }
            _ = newcomer.tick(), if newcomers.is_some() => {
                for pid in newcomers.iter_mut().flat_map(Newcomers::look) {
                    // One that cannot be watched, or is gone again, keeps nobody from watching the others.
                    if let Err(error) = live.add_tree(pid) {
                        outputs.main.say(&format!("process {pid} is not watched: {error:#}"));
                    }
                }
                live.scan(&mut events)?;
            }
            () = &mut end => break,
            told = stop.told() => match (told, &mut command) {
                // Somebody rotates logs. Without one it says that the terminal is gone.
                (Told::HangUp, _) if arguments.monitoring.log.is_some() => {
                    outputs.others.reopen().map_err(output_error)?;
                }
                (Told::HangUp, _) | (_, None) => break,
                // The command's end is ours; whoever asks twice does not want to wait for it.
                (Told::Signal(_), Some(command)) if command.was_told() => break,
                (Told::Signal(signal), Some(command)) => command.tell(signal),
            },
            wish = outputs.main.turn() => if wish? == Wish::Leave { break },
        }
    }
    // What is under way when the end comes still counts.
    live.finish(&mut events)?;
    for event in events.drain(..) {
        for update in profile.apply(event) {
            outputs.update(&update)?;
        }
    }
    for update in profile.finish() {
        outputs.update(&update)?;
    }
    outputs.finish(&profile.summary(&Measured::from(&live.status())))?;
    for entry in outputs.gate.stale() {
        outputs.main.say(&format!("the allow file names {entry}, but nothing there blocked"));
    }
    // Let go of it before it is waited for: it may live on after --duration.
    drop(live);
    let command = command.map(Started::code).transpose()?;
    if !saw_loop {
        bail!("{}", saw_none(&pids, command.is_some()));
    }
    Ok(Outcome { failing_blocks: outputs.gate.failed(), command })
}

/// One that does not catch up on what it missed.
fn every(period: Duration) -> Interval {
    let mut timer = interval(period);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    timer
}

fn options_of(arguments: &args::Attach, settings: &Settings) -> Options {
    let ns = |time: Option<Duration>| time.map(|time| time.as_nanos() as u64);
    Options {
        threshold_ns: settings.threshold.initial_ns(),
        cumulative: settings.cumulative,
        capture_after_ns: ns(arguments.detection.capture_after),
        sample_every_ns: ns(arguments.detection.sample_every),
        slowdown: 1,
        budget: arguments.detection.budget.map_or(Budget::Usual, Budget::Strict),
        steps: match arguments.steps {
            args::Steps::Auto => Steps::Auto,
            args::Steps::Off => Steps::Off,
        },
        stack_size: arguments.stack_size.map_or(StackSize::AsNeeded, StackSize::Bytes),
        talk: if arguments.debug_bpf { Talk::Debug } else { Talk::Silent },
    }
}

fn saw_none(pids: &BTreeSet<u32>, is_over: bool) -> String {
    let names: Vec<String> = pids.iter().map(u32::to_string).collect();
    let names = names.join(", ");
    if is_over {
        return format!("saw no event loop in process {names}: nothing can be said about blocking");
    }
    let first = pids.first().copied().unwrap_or_default();
    format!(
        "saw no event loop in process {names}: nothing can be said about blocking (loopguard doctor --pid {first} says \
         why)"
    )
}

/// What an adaptive threshold follows.
fn tick_counts(status: &Status) -> impl Iterator<Item = Event> {
    status.threads.iter().filter(|thread| !thread.is_gone).map(|thread| {
        let ThreadStatus { info, tick_histogram: histogram, .. } = thread;
        Event::Ticks(TickCounts { tid: info.tid, now_ns: status.now_ns, histogram: *histogram })
    })
}

fn create(path: &Path) -> Result<File> {
    File::create(path).with_context(|| format!("cannot write to {}", path.display()))
}

/// Everything that asks loopguard to end, and lets it say what it saw.
struct Stop {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

enum Told {
    /// To be passed on to the command, if there is one.
    Signal(run::Signal),
    HangUp,
}

impl Stop {
    fn listen() -> Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    async fn told(&mut self) -> Told {
        tokio::select! {
            _ = self.interrupt.recv() => Told::Signal(run::Signal::Interrupt),
            _ = self.terminate.recv() => Told::Signal(run::Signal::Terminate),
            _ = self.hangup.recv() => Told::HangUp,
        }
    }
}
