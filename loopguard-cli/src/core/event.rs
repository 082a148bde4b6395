//! What a source tells the core: one event per kernel record, with the target's memory already read where that must
//! happen while the step still runs.

use std::sync::Arc;

use serde::Serialize;

use loopguard_common::clock::TICK_BUCKETS;
pub use loopguard_common::records::OffCpu;

use super::request::EndedRequest;

/// A thread id in the initial pid namespace: the key of everything that happens on one loop.
pub type Tid = u32;

#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    LoopFound(LoopInfo),
    /// The thread or its process is gone, or runs another program now.
    LoopGone {
        tid: Tid,
    },
    /// What the thread was doing at one instant of an old step; comes before the step's [`Event::Step`].
    Capture(Capture),
    /// A step has ended that reached the threshold, or that is long enough to add up with others.
    Step(Step),
    /// A step that has not ended yet is this old now.
    StillOpen(OpenStep),
    /// Who else was in flight on the loop while a step held it; comes before the step's [`Event::Step`].
    InFlight(InFlight),
    /// How many ticks of each length a loop had since it is watched; about once a second.
    Ticks(TickCounts),
    /// It is now that late, whatever else happens.
    TimePassed {
        now_ns: u64,
    },
    /// A request has ended whose server tells of its requests.
    Request(EndedRequest),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoopInfo {
    pub pid: u32,
    pub tid: Tid,
    /// The thread's name (`comm`).
    pub thread: String,
    pub runtime: Runtime,
    /// Which worker of a server its process is; none where the process was not made by a watched one.
    pub worker: Option<Worker>,
    /// Whether step probes mark the steps of this loop; without them a step is a whole tick.
    pub steps: StepMarks,
}

/// One of several processes that a server was forked into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Worker {
    /// The process that made it.
    pub server: u32,
    /// From 1 on; its own as long as it lives.
    pub number: u32,
    /// The highest number among those that live.
    pub of: u32,
}

impl Worker {
    /// `worker 3 of 8`; nothing where there is but one.
    pub fn name(&self) -> Option<String> {
        (self.of > 1).then(|| format!("worker {} of {}", self.number, self.of))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Runtime {
    Asyncio,
    Uvloop,
    Tokio,
    Epoll,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepMarks {
    Exact,
    TicksOnly,
}

/// Times are `CLOCK_MONOTONIC` nanoseconds.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    pub tid: Tid,
    /// Which step of the thread; the captures of this step carry the same number.
    pub seq: u64,
    pub tick_start_ns: u64,
    pub start_ns: u64,
    pub end_ns: u64,
    /// Where the off-CPU part of the step went; the rest was on the CPU.
    pub off_cpu: OffCpu,
    pub waits: Vec<StepWait>,
    /// It began at a step probe: one owner for all of it.
    pub probed: bool,
    /// Whose it is, if the server's own probes bracket it.
    pub told: Option<Owner>,
    /// It was already running when loopguard came; `start_ns` is that moment.
    pub cut_at_attach: bool,
}

/// All waits of a step in the same system call on the same thing.
#[derive(Clone, Debug, PartialEq)]
pub struct StepWait {
    /// Name of the system call, `page fault`, or `other` for what no longer fitted in the kernel's table.
    pub syscall: String,
    pub arg0: u64,
    pub ns: u64,
    pub count: u32,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Capture {
    pub tid: Tid,
    pub step_seq: u64,
    pub step_start_ns: u64,
    pub tick_start_ns: u64,
    /// When the stack was taken.
    pub at_ns: u64,
    /// Until when the thread certainly stayed there: the end of the wait, or `at_ns` for a sample.
    pub until_ns: u64,
    /// From the step's start to `until_ns`.
    pub off_cpu: OffCpu,
    pub wait: Option<CapturedWait>,
    pub stack: Arc<Stack>,
    pub owner: Owner,
}

/// The wait a capture was taken in.
#[derive(Clone, Debug, PartialEq)]
pub struct CapturedWait {
    pub syscall: String,
    pub arg0: u64,
    /// What it waits on (`127.0.0.1:5432`, a file's path), when that could be read while it waited.
    pub on: Option<String>,
}

/// Whose code a capture saw.
#[derive(Clone, Debug, PartialEq)]
pub enum Owner {
    Request {
        request: Arc<RequestFacts>,
        how: How,
    },
    /// Known to be no request's: a background task, a callback, the loop itself.
    NoRequest {
        task: Option<String>,
    },
    /// A task of which no request is known; whether it works for one is not known.
    Task {
        task: String,
    },
    /// Could not be told: why, in a few words.
    Unknown(&'static str),
}

/// How a request was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum How {
    Usdt,
    /// The ASGI scope stood in the running frames: exact.
    AsgiFrame,
    /// Through the current task and the tasks that await it: inferred.
    AsyncioTask,
    /// By the request that the task's connection read: exact.
    HttpRecv,
    /// The same for the task that spawned this one: inferred.
    #[serde(rename = "http-recv")]
    HttpRecvOfParent,
    None,
}

/// What is known of a request. Strings are the target's bytes, UTF-8-repaired and bounded, not yet escaped.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RequestFacts {
    /// The `x-request-id` header, else an id of loopguard's own.
    pub id: String,
    pub method: Option<String>,
    pub path: String,
    /// The route template, `/items/{id}`.
    pub route: Option<String>,
    /// `address:port` of the peer.
    pub client: Option<String>,
    /// From the `traceparent` header.
    pub trace_id: Option<String>,
}

impl RequestFacts {
    /// Whether two readings are of one request. Middleware may copy what it was read from, but not the connection.
    pub fn is_same(&self, other: &Self) -> bool {
        self.path == other.path && (self.id == other.id || self.client.is_some() && self.client == other.client)
    }
}

/// Innermost frame first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Stack {
    pub frames: Vec<Arc<Frame>>,
    /// Why the outermost frames are missing, if they are.
    pub incomplete: Option<&'static str>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Frame {
    pub kind: FrameKind,
    pub origin: Origin,
    /// Qualified name.
    pub function: Arc<str>,
    pub file: Option<Arc<str>>,
    pub line: Option<u32>,
    /// The executable or library, for native frames.
    pub module: Option<Arc<str>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FrameKind {
    Python,
    Native,
}

/// Whose code a frame is, so that the user's own stands out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    User,
    /// Installed packages.
    Library,
    /// The language's own: standard library, interpreter, event loop.
    Runtime,
    /// The operating system's.
    Kernel,
}

/// The requests in flight on a loop, read from the target while the step ran.
#[derive(Clone, Debug, PartialEq)]
pub struct InFlight {
    pub tid: Tid,
    pub step_seq: u64,
    /// Each once, the step's own among them.
    pub requests: Vec<Arc<RequestFacts>>,
    /// Tasks that could not be read.
    pub unread: u32,
}

#[derive(Clone, Debug, PartialEq)]
pub struct TickCounts {
    pub tid: Tid,
    pub now_ns: u64,
    /// Bucket `n` counts ticks of `2^(n-1)..2^n` microseconds.
    pub histogram: [u32; TICK_BUCKETS],
}

/// A step that still runs.
#[derive(Clone, Debug, PartialEq)]
pub struct OpenStep {
    pub tid: Tid,
    pub seq: u64,
    pub start_ns: u64,
    pub now_ns: u64,
    /// Whose it is, if the server's own probes bracket it.
    pub told: Option<Owner>,
}
