//! What the core found, with everything a sink needs to show it.

use std::sync::Arc;

use serde::Serialize;

use super::cut::{Span, each, scaled, total};
use super::event::{Frame, FrameKind, How, LoopInfo, Origin, Owner, RequestFacts, Stack};
use super::request::EndedRequest;

#[derive(Clone, Debug, PartialEq)]
pub enum Update {
    /// A block that has ended.
    Block(Incident),
    /// A block that goes on; its [`Update::Block`] follows when it ends.
    Ongoing(Ongoing),
    /// Steps below the threshold that added up; told once, when the episode is over.
    Cumulative(Cumulative),
    /// An episode that goes on; its [`Update::Cumulative`] follows when it is over.
    CumulativeOngoing(Cumulative),
    /// The adaptive threshold of a loop has changed.
    Threshold(ThresholdChange),
    /// A request that has ended, where the server tells of its requests.
    Request(EndedRequest),
}

/// A step, or the part of a tick one owner had, that reached the threshold. Times are `CLOCK_MONOTONIC` nanoseconds.
#[derive(Clone, Debug, PartialEq)]
pub struct Incident {
    pub on: Arc<LoopInfo>,
    pub start_ns: u64,
    pub end_ns: u64,
    pub threshold_ns: u64,
    pub split: Split,
    /// Longest first.
    pub waits: Vec<WaitTotal>,
    pub blame: Blame,
    /// The requests it held up; `None`: nobody could look while it ran.
    pub victims: Option<Victims>,
    /// What to write instead, for a well-known blocking call.
    pub hint: Option<&'static str>,
    /// It was already running when loopguard came, so it is longer than what is reported.
    pub cut_at_attach: bool,
}

/// The requests that were in flight on the loop while a block held it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Victims {
    pub count: u64,
    /// What each of them was delayed at most: the block's length.
    pub delay_ns: u64,
    /// The first [`MAX_VICTIMS_LISTED`] of them.
    pub requests: Vec<Arc<RequestFacts>>,
    /// Tasks of the loop that could not be read: there may be more victims.
    pub unread: u32,
}

/// Victims whose names are kept.
pub const MAX_VICTIMS_LISTED: usize = 20;

/// Steps below the threshold that summed up to the cumulative threshold within its window.
#[derive(Clone, Debug, PartialEq)]
pub struct Cumulative {
    pub on: Arc<LoopInfo>,
    /// From the start of the first step to the end of the last.
    pub start_ns: u64,
    pub end_ns: u64,
    pub window_ns: u64,
    pub threshold_ns: u64,
    /// Of all its steps, by wall clock. What counts for the threshold is this without the time for which there was no
    /// CPU.
    pub total_ns: u64,
    /// Steps.
    pub count: u64,
    /// Where the total went.
    pub split: Split,
    /// Longest first.
    pub waits: Vec<WaitTotal>,
    /// The main owner, and the stack that stands for most of the time.
    pub blame: Blame,
    /// Whose steps they were, the largest share first.
    pub owners: Vec<OwnerShare>,
    /// By the user's line, the largest share first.
    pub lines: Vec<LineShare>,
    pub hint: Option<&'static str>,
}

/// What one owner had of a cumulative block.
#[derive(Clone, Debug, PartialEq)]
pub struct OwnerShare {
    pub owner: Owner,
    pub attribution: Attribution,
    pub ns: u64,
    /// Steps.
    pub count: u64,
}

/// What one line had of a cumulative block.
#[derive(Clone, Debug, PartialEq)]
pub struct LineShare {
    /// One that stands for all with this line.
    pub stack: Arc<Stack>,
    pub ns: u64,
    /// Steps.
    pub count: u64,
}

/// From the next tick on this is the loop's threshold.
#[derive(Clone, Debug, PartialEq)]
pub struct ThresholdChange {
    pub on: Arc<LoopInfo>,
    pub threshold_ns: u64,
    /// The tick length it is a multiple of.
    pub baseline_ns: u64,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Ongoing {
    pub on: Arc<LoopInfo>,
    pub start_ns: u64,
    pub now_ns: u64,
    pub threshold_ns: u64,
    pub blame: Blame,
    /// What to write instead, for a well-known blocking call.
    pub hint: Option<&'static str>,
}

/// Whose block it is, on which line, and how sure that is.
#[derive(Clone, Debug, PartialEq)]
pub struct Blame {
    pub owner: Owner,
    pub attribution: Attribution,
    /// The stack that stands for most of the time.
    pub stack: Arc<Stack>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Attribution {
    Exact,
    Inferred,
    Unknown,
}

/// What took most of the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// The code ran, or waited for something it asked for.
    Code,
    /// It was ready to run, but the machine gave it no CPU.
    Host,
    /// Another thread held the interpreter lock.
    Gil,
    /// No group took more than every other.
    Unknown,
}

/// Where a span of time went. The four parts sum to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Split {
    pub on_cpu_ns: u64,
    pub waiting_ns: u64,
    pub gil_ns: u64,
    pub run_queue_ns: u64,
}

/// All waits of an incident in the same system call on the same thing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WaitTotal {
    pub syscall: String,
    /// What it waited on, when that could be read.
    pub on: Option<String>,
    pub ns: u64,
}

/// The user's own code nearest to where the time went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UserLine<'a> {
    pub frame: &'a Frame,
    /// What that line called, when it is on the stack: a builtin function is not.
    pub called: Option<&'a Frame>,
}

impl Incident {
    pub fn duration_ns(&self) -> u64 {
        self.end_ns.saturating_sub(self.start_ns)
    }

    pub fn verdict(&self) -> Verdict {
        self.split.verdict()
    }

    pub fn user_line(&self) -> Option<UserLine<'_>> {
        user_line(&self.blame.stack)
    }
}

impl Cumulative {
    pub fn verdict(&self) -> Verdict {
        self.split.verdict()
    }

    pub fn user_line(&self) -> Option<UserLine<'_>> {
        user_line(&self.blame.stack)
    }
}

impl Ongoing {
    pub fn age_ns(&self) -> u64 {
        self.now_ns.saturating_sub(self.start_ns)
    }
}

impl Blame {
    pub fn request(&self) -> Option<&Arc<RequestFacts>> {
        match &self.owner {
            Owner::Request { request, .. } => Some(request),
            Owner::NoRequest { .. } | Owner::Task { .. } | Owner::Unknown(_) => None,
        }
    }

    pub fn how(&self) -> How {
        match self.owner {
            Owner::Request { how, .. } => how,
            Owner::NoRequest { .. } | Owner::Task { .. } | Owner::Unknown(_) => How::None,
        }
    }

    pub fn task(&self) -> Option<&str> {
        match &self.owner {
            Owner::NoRequest { task } => task.as_deref(),
            Owner::Task { task } => Some(task),
            Owner::Request { .. } | Owner::Unknown(_) => None,
        }
    }

    pub fn user_line(&self) -> Option<UserLine<'_>> {
        user_line(&self.stack)
    }
}

/// Where the deepest frame of the user's stands.
pub fn user_line_index(stack: &Stack) -> Option<usize> {
    stack.frames.iter().position(|frame| frame.origin == Origin::User)
}

pub fn user_line(stack: &Stack) -> Option<UserLine<'_>> {
    let deepest = user_line_index(stack)?;
    Some(UserLine { frame: &stack.frames[deepest], called: called(&stack.frames[..deepest]) })
}

/// What a line called, by the frames inside it: the interpreter's own machinery in between is no answer, and neither is
/// what that machinery did for itself.
fn called(inner: &[Arc<Frame>]) -> Option<&Frame> {
    let mut frames = inner.iter().rev().map(|frame| &**frame);
    let first = frames.next()?;
    if !is_machinery(first) {
        return Some(first);
    }
    frames.find(|frame| !is_machinery(frame)).filter(|frame| !is_c_library(frame))
}

/// The parts of CPython that run Python code, not those that are called from it by name.
fn is_machinery(frame: &Frame) -> bool {
    let Some(module) = frame.module.as_deref().filter(|_| frame.kind == FrameKind::Native) else { return false };
    let name = module.rsplit('/').next().unwrap_or(module);
    if !name.starts_with("libpython") && !name.starts_with("python") {
        return false;
    }
    match frame.file.as_deref() {
        Some(file) => ["/Objects/", "/Python/", "/Include/"].iter().any(|folder| file.contains(folder)),
        // Without debug information, names tell: of the C interface, of what leads to a C function, and file+offset.
        None => {
            let name = &*frame.function;
            name.starts_with('_') || name.starts_with("Py") || name.contains("vectorcall") || name.contains('+')
        }
    }
}

fn is_c_library(frame: &Frame) -> bool {
    let name = frame.module.as_deref().and_then(|module| module.rsplit('/').next()).unwrap_or_default();
    name.starts_with("libc.") || name.starts_with("libc-") || name.starts_with("ld-") || name == "[vdso]"
}

impl Split {
    pub fn of(span: &Span) -> Self {
        let duration = span.duration_ns();
        let off_total = total(span.off_cpu);
        // More time off the CPU than time there was: clocks read at slightly different instants. The proportions hold.
        let off = if off_total > duration.into() {
            each([span.off_cpu], |[ns]| scaled(ns, duration.into(), off_total))
        } else {
            span.off_cpu
        };
        Self {
            on_cpu_ns: duration - off.waiting_ns - off.gil_ns - off.run_queue_ns,
            waiting_ns: off.waiting_ns,
            gil_ns: off.gil_ns,
            run_queue_ns: off.run_queue_ns,
        }
    }

    pub fn total_ns(&self) -> u64 {
        [self.on_cpu_ns, self.waiting_ns, self.gil_ns, self.run_queue_ns].into_iter().fold(0, u64::saturating_add)
    }

    pub fn plus(&self, other: &Self) -> Self {
        Self {
            on_cpu_ns: self.on_cpu_ns.saturating_add(other.on_cpu_ns),
            waiting_ns: self.waiting_ns.saturating_add(other.waiting_ns),
            gil_ns: self.gil_ns.saturating_add(other.gil_ns),
            run_queue_ns: self.run_queue_ns.saturating_add(other.run_queue_ns),
        }
    }

    pub fn verdict(&self) -> Verdict {
        let mut groups = [
            (self.on_cpu_ns.saturating_add(self.waiting_ns), Verdict::Code),
            (self.gil_ns, Verdict::Gil),
            (self.run_queue_ns, Verdict::Host),
        ];
        groups.sort_by_key(|(ns, _)| std::cmp::Reverse(*ns));
        let [(first, verdict), (second, _), _] = groups;
        if first > second { verdict } else { Verdict::Unknown }
    }
}

#[cfg(test)]
mod tests {
    use super::super::event::OffCpu;
    use super::*;

    fn split(duration: u64, [waiting_ns, gil_ns, run_queue_ns]: [u64; 3]) -> Split {
        Split::of(&Span { start_ns: 5, end_ns: 5 + duration, off_cpu: OffCpu { waiting_ns, gil_ns, run_queue_ns } })
    }

    #[test]
    fn the_verdict_is_the_largest_group() {
        assert_eq!(split(100, [0, 0, 0]).verdict(), Verdict::Code);
        assert_eq!(split(100, [90, 0, 0]).verdict(), Verdict::Code);
        assert_eq!(split(100, [0, 60, 10]).verdict(), Verdict::Gil);
        assert_eq!(split(100, [10, 20, 60]).verdict(), Verdict::Host);
        // On-CPU and waiting count together: here 20 + 21 against 40.
        assert_eq!(split(100, [21, 40, 19]).verdict(), Verdict::Code);
    }

    #[test]
    fn a_tie_and_nothing_at_all_are_unknown() {
        assert_eq!(split(100, [0, 50, 0]).verdict(), Verdict::Unknown);
        assert_eq!(split(0, [0, 0, 0]).verdict(), Verdict::Unknown);
        assert_eq!(split(0, [7, 0, 0]).verdict(), Verdict::Unknown);
    }

    #[test]
    fn more_off_cpu_time_than_time_is_scaled_down() {
        let scaled = split(100, [150, 50, 0]);
        assert_eq!(scaled, Split { on_cpu_ns: 0, waiting_ns: 75, gil_ns: 25, run_queue_ns: 0 });
    }

    #[test]
    fn a_line_calls_what_the_interpreter_called_for_it() {
        let time_sleep = "time_sleep@/usr/bin/python3.13@/src/Modules/timemodule.c";
        let vectorcall = "cfunction_vectorcall_O@/usr/bin/python3.13@/src/Objects/methodobject.c";
        let push = "_PyEvalFramePushAndInit@/opt/lib/libpython3.13.so.1.0@/src/Python/ceval.c";
        let (libc, hash) = ("clock_nanosleep@/lib/libc.so.6@", "pbkdf2_hmac@/v/lib-dynload/_hashlib.so@");
        let (bare_sleep, bare_call) = ("time_sleep@/usr/bin/python3@", "cfunction_vectorcall_O@/usr/bin/python3@");
        let unnamed = "python3+0x1234@/usr/bin/python3@";
        for (frames, expected) in [
            (&[libc, time_sleep][..], Some("time_sleep")),
            (&[libc, time_sleep, vectorcall], Some("time_sleep")),
            (&[libc, bare_sleep, bare_call], Some("time_sleep")),
            (&[hash, bare_call, unnamed], Some("pbkdf2_hmac")),
            // What the interpreter does for itself.
            (&[libc, push], None),
            (&[libc, unnamed], None),
            (&[vectorcall], None),
            (&[], None),
        ] {
            let frame = |text: &&str| {
                let [function, module, file] = text.splitn(3, '@').collect::<Vec<_>>()[..] else { panic!("{text}") };
                let file = (!file.is_empty()).then(|| file.into());
                let (function, module) = (function.into(), Some(module.into()));
                Arc::new(Frame { kind: FrameKind::Native, origin: Origin::Runtime, function, file, line: None, module })
            };
            let frames: Vec<_> = frames.iter().map(frame).collect();
            assert_eq!(called(&frames).map(|frame| &*frame.function), expected, "{frames:?}");
        }
    }
}
