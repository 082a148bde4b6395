//! The live figures of a run: what is shown beside blocks, about once a second, and at the end.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use loopguard_common::clock::TICK_BUCKETS;

use super::event::LoopInfo;
use super::request::RequestCounts;
use super::summary::Measured;

/// What the kernel programs and the clocks say at one moment. Times are `CLOCK_MONOTONIC` nanoseconds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Status {
    /// When loopguard began to watch.
    pub since_ns: u64,
    pub now_ns: u64,
    /// The loop threads that are watched, and those that are gone.
    pub threads: Vec<ThreadStatus>,
    /// Records that did not arrive, or that nobody understood.
    pub lost_records: u64,
    pub records: RecordCounts,
    pub requests: RequestCounts,
    /// Frames that could not be named.
    pub unsymbolized: u64,
    pub stacks: StackCounts,
    /// CPU time of loopguard, its kernel programs included.
    pub self_cpu: Duration,
    /// For how long it looked less closely, to keep to its budget, and for how long it did not watch at all.
    pub limited: Duration,
    pub unwatched: Duration,
}

/// The kernel programs' records. At the end of a run every one that was sent was received or lost; before that some are
/// on their way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RecordCounts {
    /// By the programs, whether there was room or not.
    pub sent: u64,
    /// Taken from the ring buffer.
    pub received: u64,
    /// By the programs, as the ring buffer was full.
    pub lost: u64,
}

/// Native stacks that were unwound.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct StackCounts {
    pub unwound: u64,
    /// To the thread's start.
    pub complete: u64,
    /// Captures whose stack copy did not arrive.
    pub lost: u64,
    /// Why others are not complete, and how many.
    pub incomplete: BTreeMap<&'static str, u64>,
}

/// One loop thread since it is watched.
#[derive(Clone, Debug, PartialEq)]
pub struct ThreadStatus {
    pub info: LoopInfo,
    pub is_gone: bool,
    /// A step at least this long is recorded.
    pub threshold_ns: u64,
    /// Finished ticks, their total time, and how many of them there were of each length: bucket `n` counts ticks of
    /// `2^(n-1)..2^n` microseconds.
    pub ticks: u64,
    pub busy_ns: u64,
    pub tick_histogram: [u32; TICK_BUCKETS],
    /// Start of the step that runs now; `None` while the thread sleeps in its poll.
    pub step_start_ns: Option<u64>,
}

impl From<&Status> for Measured {
    fn from(status: &Status) -> Self {
        Self {
            duration: Duration::from_nanos(status.now_ns.saturating_sub(status.since_ns)),
            ticks: status.threads.iter().map(|thread| (thread.info.tid, thread.ticks)).collect(),
            lost_records: status.lost_records,
            records: status.records,
            requests: status.requests,
            unsymbolized: status.unsymbolized,
            stacks: status.stacks.clone(),
            self_cpu: status.self_cpu,
            limited: status.limited,
            unwatched: status.unwatched,
        }
    }
}
