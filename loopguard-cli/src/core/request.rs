//! Requests as their server tells of them: one that has ended, and what could not be told.

use std::sync::Arc;

use super::cut::Span;
use super::event::{OffCpu, RequestFacts};
use super::incident::Split;

/// A request that has ended. Times are `CLOCK_MONOTONIC` nanoseconds.
#[derive(Clone, Debug, PartialEq)]
pub struct EndedRequest {
    pub pid: u32,
    pub facts: Arc<RequestFacts>,
    /// `None`: it got no response.
    pub status: Option<u64>,
    pub start_ns: u64,
    pub end_ns: u64,
    pub held: Held,
    /// Whether all of it was seen: it began and its code ran while loopguard watched.
    pub is_complete: bool,
}

/// What a request had of its loop, in all its steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    pub ns: u64,
    /// Of that, what was off the CPU.
    pub off_cpu: OffCpu,
    /// In steps that reached the threshold.
    pub blocked_ns: u64,
    pub longest_ns: u64,
    pub steps: u32,
    pub blocks: u32,
}

impl EndedRequest {
    pub fn duration_ns(&self) -> u64 {
        self.end_ns.saturating_sub(self.start_ns)
    }

    /// Where the time of its steps went.
    pub fn split(&self) -> Split {
        Split::of(&Span { start_ns: 0, end_ns: self.held.ns, off_cpu: self.held.off_cpu })
    }
}

/// What is known of requests beside those that ended, since loopguard came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestCounts {
    /// Whether any watched process tells of its requests.
    pub are_told: bool,
    /// Open now.
    pub open: u64,
    /// Their process ended, or their id came again, or they made room for newer ones.
    pub never_ended: u64,
    /// Not followed: too many were open.
    pub untracked: u64,
    /// Enters and exits without a counterpart.
    pub unpaired: u64,
    /// Long steps in which the frames showed the same request as the server told, and those in which they did not.
    pub frames_agree: u64,
    pub frames_disagree: u64,
}

/// Whether what the frames showed is the request that the server told of. Where one of them has no id from outside,
/// the ids say nothing.
pub fn same_request(told: &RequestFacts, in_frames: &RequestFacts) -> bool {
    let has_own_id = |facts: &RequestFacts| facts.id.starts_with(OWN_ID);
    let same_id = told.id == in_frames.id || has_own_id(told) || has_own_id(in_frames);
    let same_method = told.method == in_frames.method || told.method.is_none() || in_frames.method.is_none();
    // What the server tells may be cut off.
    let same_path = in_frames.path.starts_with(&told.path);
    same_id && same_method && same_path
}

/// How ids begin that loopguard made up.
pub const OWN_ID: &str = "lg-";

/// What the server told, and what of the rest the frames showed.
pub fn merged(told: &RequestFacts, in_frames: &RequestFacts) -> RequestFacts {
    let either = |told: &Option<String>, seen: &Option<String>| told.as_ref().or(seen.as_ref()).cloned();
    RequestFacts {
        id: told.id.clone(),
        method: either(&told.method, &in_frames.method),
        path: if told.path.is_empty() { in_frames.path.clone() } else { told.path.clone() },
        route: either(&told.route, &in_frames.route),
        client: either(&told.client, &in_frames.client),
        trace_id: either(&told.trace_id, &in_frames.trace_id),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(id: &str, path: &str) -> RequestFacts {
        RequestFacts {
            id: id.to_owned(),
            method: Some("GET".to_owned()),
            path: path.to_owned(),
            route: None,
            client: None,
            trace_id: None,
        }
    }

    #[test]
    fn ids_from_outside_must_agree_and_made_up_ones_need_not() {
        assert!(same_request(&facts("a", "/x"), &facts("a", "/x")));
        assert!(!same_request(&facts("a", "/x"), &facts("b", "/x")));
        assert!(same_request(&facts("lg-1-2", "/x"), &facts("lg-00ff", "/x")));
        assert!(!same_request(&facts("lg-1-2", "/x"), &facts("lg-00ff", "/y")));
        assert!(same_request(&facts("a", "/long/pa"), &facts("a", "/long/path")));
    }

    #[test]
    fn what_the_server_did_not_tell_comes_from_the_frames() {
        let seen =
            RequestFacts { client: Some("10.0.0.9:1".into()), route: Some("/{x}".into()), ..facts("lg-1", "/x") };
        let told = RequestFacts { route: Some("/{id}".into()), ..facts("a", "/x") };
        let both = merged(&told, &seen);
        assert_eq!((both.id.as_str(), both.route.as_deref()), ("a", Some("/{id}")));
        assert_eq!(both.client.as_deref(), Some("10.0.0.9:1"));
    }

    #[test]
    fn the_parts_of_its_time_are_the_whole() {
        let ended = EndedRequest {
            pid: 1,
            facts: Arc::new(facts("a", "/x")),
            status: Some(200),
            start_ns: 5,
            end_ns: 105,
            held: Held { ns: 60, off_cpu: OffCpu { waiting_ns: 20, gil_ns: 1, run_queue_ns: 2 }, ..Held::default() },
            is_complete: true,
        };
        assert_eq!(ended.duration_ns(), 100);
        assert_eq!(ended.split(), Split { on_cpu_ns: 37, waiting_ns: 20, gil_ns: 1, run_queue_ns: 2 });
    }
}
