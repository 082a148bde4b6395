//! Turns short stories (who was seen when, in milliseconds) into events for the core's tests, and updates into lines.

use std::ops::Range;
use std::sync::Arc;

use super::event::*;
use super::incident::{Blame, Cumulative, Incident, Update, user_line};
use super::profile::{Profile, Settings};

pub const TID: Tid = 7;

pub fn ms(ms: u64) -> u64 {
    ms * 1_000_000
}

/// `A`: request A, seen in the frames; `~A`: through its task; `-`: no request; `-name`: the task `name`, no request;
/// `-name?`: the task `name`, of which none is known; `?`: unknown.
pub fn owner(text: &str) -> Owner {
    let request = |id: &str, how| Owner::Request {
        request: Arc::new(RequestFacts {
            id: id.to_owned(),
            method: Some("GET".to_owned()),
            path: format!("/{id}"),
            route: None,
            client: None,
            trace_id: None,
        }),
        how,
    };
    match text.split_at(1) {
        ("?", _) => Owner::Unknown("its frames could not be read"),
        ("-", "") => Owner::NoRequest { task: None },
        ("-", task) if task.ends_with('?') => Owner::Task { task: task.trim_end_matches('?').to_owned() },
        ("-", task) => Owner::NoRequest { task: Some(task.to_owned()) },
        ("~", id) => request(id, How::AsyncioTask),
        _ => request(text, How::AsgiFrame),
    }
}

/// `inner < outer`, innermost first; a name with a dot is a library's function, any other the user's.
pub fn stack(text: &str) -> Arc<Stack> {
    let frame = |function: &str| {
        let is_library = function.contains('.');
        Arc::new(Frame {
            kind: FrameKind::Python,
            origin: if is_library { Origin::Library } else { Origin::User },
            function: function.into(),
            file: Some(if is_library { "/lib/site-packages/lib.py" } else { "/srv/app.py" }.into()),
            line: Some(function.len() as u32),
            module: None,
        })
    };
    let frames = text.split('<').map(str::trim).filter(|name| !name.is_empty()).map(frame).collect();
    Arc::new(Stack { frames, incomplete: None })
}

/// On the CPU at `at`; `seen` is an owner and, after a space, a stack.
pub fn sample(seq: u64, at: u64, seen: &str) -> Capture {
    let (who, frames) = seen.split_once(' ').unwrap_or((seen, ""));
    Capture {
        tid: TID,
        step_seq: seq,
        step_start_ns: 0,
        tick_start_ns: 0,
        at_ns: ms(at),
        until_ns: ms(at),
        off_cpu: OffCpu::default(),
        wait: None,
        stack: stack(frames),
        owner: owner(who),
    }
}

/// Waiting over `at`; `seen` is an owner, a system call and, after another space, a stack.
pub fn wait(seq: u64, at: Range<u64>, seen: &str) -> Capture {
    let (who, rest) = seen.split_once(' ').expect("an owner and a system call");
    let (syscall, frames) = rest.split_once(' ').unwrap_or((rest, ""));
    Capture {
        until_ns: ms(at.end),
        wait: Some(CapturedWait {
            syscall: syscall.to_owned(),
            arg0: 9,
            on: (syscall == "recvfrom").then(|| "127.0.0.1:5432".to_owned()),
        }),
        ..sample(seq, at.start, &format!("{who} {frames}"))
    }
}

/// The end of a step without off-CPU time, begun at a probe.
pub fn step(seq: u64, at: Range<u64>) -> Step {
    Step {
        tid: TID,
        seq,
        tick_start_ns: 0,
        start_ns: ms(at.start),
        end_ns: ms(at.end),
        off_cpu: OffCpu::default(),
        waits: Vec::new(),
        probed: true,
        told: None,
        cut_at_attach: false,
    }
}

/// The end of a whole tick, without step probes.
pub fn tick(seq: u64, at: Range<u64>) -> Step {
    Step { probed: false, ..step(seq, at) }
}

pub fn waited(ms_each: [u64; 3]) -> OffCpu {
    let [waiting_ns, gil_ns, run_queue_ns] = ms_each.map(ms);
    OffCpu { waiting_ns, gil_ns, run_queue_ns }
}

pub fn loop_found(steps: StepMarks) -> Event {
    Event::LoopFound(LoopInfo {
        pid: 6,
        tid: TID,
        thread: "uvicorn".to_owned(),
        runtime: Runtime::Uvloop,
        worker: None,
        steps,
    })
}

pub fn settings(threshold_ms: u64) -> Settings {
    Settings::fixed(ms(threshold_ms))
}

pub fn profile(steps: StepMarks, threshold_ms: u64) -> Profile {
    let mut profile = Profile::new(settings(threshold_ms));
    profile.apply(loop_found(steps));
    profile
}

/// Tells the events to a new profile with a threshold of 10 ms and compares the updates, one line each:
/// `start..end owner attribution | verdict cpu+waiting+gil+run queue | line | waits`.
#[track_caller]
pub fn check(steps: StepMarks, events: impl IntoIterator<Item = Event>, expected: &[&str]) {
    check_with(settings(10), steps, events, expected);
}

#[track_caller]
pub fn check_with(
    settings: Settings,
    steps: StepMarks,
    events: impl IntoIterator<Item = Event>,
    expected: &[&str],
) -> Profile {
    let mut profile = Profile::new(settings);
    profile.apply(loop_found(steps));
    let told: Vec<String> =
        events.into_iter().flat_map(|event| profile.apply(event)).map(|update| line(&update)).collect();
    assert_eq!(told, expected);
    profile
}

fn whole_ms(ns: u64) -> f64 {
    ns as f64 / 1e6
}

fn line(update: &Update) -> String {
    match update {
        Update::Request(ended) => format!("request {}", ended.facts.id),
        Update::Ongoing(open) => {
            format!("{}.. {}", whole_ms(open.start_ns), who(&open.blame))
        }
        Update::Block(block) => block_line(block),
        Update::Cumulative(block) => cumulative_line(block),
        Update::CumulativeOngoing(open) => format!(
            "{}.. cumulative {} | {} x {}",
            whole_ms(open.start_ns),
            who(&open.blame),
            open.count,
            whole_ms(open.total_ns)
        ),
        Update::Threshold(change) => format!("threshold {}", whole_ms(change.threshold_ns)),
    }
}

fn block_line(block: &Incident) -> String {
    let split = block.split;
    let parts = [split.on_cpu_ns, split.waiting_ns, split.gil_ns, split.run_queue_ns]
        .map(|ns| whole_ms(ns).to_string())
        .join("+");
    let at = block.user_line().map(|at| {
        let called = at.called.map(|called| format!(" calls {}", called.function)).unwrap_or_default();
        format!(" | {}{called}", at.frame.function)
    });
    let waits: Vec<String> = block
        .waits
        .iter()
        .map(|wait| format!(" | {} {} {}", whole_ms(wait.ns), wait.syscall, wait.on.as_deref().unwrap_or("?")))
        .collect();
    let victims = block.victims.as_ref().map(|victims| {
        let names: Vec<&str> = victims.requests.iter().map(|request| request.id.as_str()).collect();
        format!(" | held up {}: {}", victims.count, names.join(" "))
    });
    format!(
        "{}..{} {} | {:?} {parts}{}{}{}",
        whole_ms(block.start_ns),
        whole_ms(block.end_ns),
        who(&block.blame),
        block.verdict(),
        at.unwrap_or_default(),
        waits.concat(),
        victims.unwrap_or_default(),
    )
}

/// `start..end cumulative owner attribution | steps x total | owners' shares | lines' shares`.
fn cumulative_line(block: &Cumulative) -> String {
    let owners: Vec<String> =
        block.owners.iter().map(|share| format!("{} {}", owner_name(&share.owner), whole_ms(share.ns))).collect();
    let lines: Vec<String> = block
        .lines
        .iter()
        .map(|share| {
            let name = user_line(&share.stack).map_or("?", |line| &line.frame.function);
            format!("{name} {}", whole_ms(share.ns))
        })
        .collect();
    format!(
        "{}..{} cumulative {} | {} x {} | {} | {}",
        whole_ms(block.start_ns),
        whole_ms(block.end_ns),
        who(&block.blame),
        block.count,
        whole_ms(block.total_ns),
        owners.join(", "),
        lines.join(", ")
    )
}

fn who(blame: &Blame) -> String {
    format!("{} {:?}", owner_name(&blame.owner), blame.attribution)
}

fn owner_name(owner: &Owner) -> String {
    match owner {
        Owner::Request { request, .. } => request.id.clone(),
        Owner::NoRequest { task } => format!("-{}", task.as_deref().unwrap_or_default()),
        Owner::Task { task } => format!("-{task}?"),
        Owner::Unknown(_) => "?".to_owned(),
    }
}

impl From<Capture> for Event {
    fn from(capture: Capture) -> Self {
        Event::Capture(capture)
    }
}

impl From<Step> for Event {
    fn from(step: Step) -> Self {
        Event::Step(step)
    }
}

impl From<OpenStep> for Event {
    fn from(step: OpenStep) -> Self {
        Event::StillOpen(step)
    }
}

/// A list of events from anything that is one.
macro_rules! events {
    ($($event:expr),* $(,)?) => { [$($crate::core::event::Event::from($event)),*] };
}
pub(crate) use events;
