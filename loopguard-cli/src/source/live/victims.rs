//! Reads who else is in flight on a loop while a step holds it.

use std::sync::Arc;

use super::Live;
use crate::core::event::{Event, InFlight, Tid};

impl Live {
    /// The requests in flight on a loop, once for each step; `None`: they can't be read, or the step has ended.
    pub(super) fn in_flight(&mut self, tid: Tid, step_seq: u64) -> Option<Event> {
        if !self.governor.effort().reads_details {
            return None;
        }
        let known = self.loops.get_mut(&tid)?;
        if std::mem::replace(&mut known.step.counted, true) {
            return None;
        }
        let (pid, thread) = (known.info.pid, known.python?);
        let running = known.step.scope.as_ref().map(|(scope, request)| (*scope, &**request));
        let inspector = &mut self.targets.get_mut(&pid)?.python.as_mut()?.inspector;
        let (requests, unread) = inspector.requests_in_flight(&thread, running).ok()?;
        // What was read holds only if the loop could not run meanwhile.
        self.kernel.is_running(tid, step_seq).then(|| {
            let requests = requests.into_iter().map(Arc::new).collect();
            Event::InFlight(InFlight { tid, step_seq, requests, unread })
        })
    }
}
