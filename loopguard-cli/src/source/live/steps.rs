//! Places step probes in a process once a step of it has become old, and takes them away when nothing needs them.

use super::{Live, Steps};
use crate::{
    core::event::{Runtime, Tid},
    runtime::{cpython::StepProbe, probe_site::ProbeSite},
    source::process,
};
use loopguard_common::records::{THREAD_STEPS_CONTEXT_ENTER, THREAD_STEPS_CONTEXT_RUN, THREAD_STEPS_NEST};

/// How long step probes stay after the last old step was seen. They cost about a microsecond a step, which a loop that
/// is never blocked need not pay.
const ARMED_FOR_NS: u64 = 300_000_000_000;
/// How the steps of a loop can be marked.
#[derive(Clone)]
pub(super) struct StepMark {
    which: StepProbe,
    site: ProbeSite,
    /// `THREAD_*` of the loop while they are.
    flags: u32,
}

impl Live {
    /// Where the steps of this kind of loop can be marked, if they are wanted and there is such a place.
    pub(super) fn step_marks(&mut self, pid: u32, runtime: Runtime) -> Option<StepMark> {
        let (which, flags) = match (self.options.steps, runtime) {
            (Steps::Auto, Runtime::Asyncio) => (StepProbe::ContextRun, THREAD_STEPS_CONTEXT_RUN | THREAD_STEPS_NEST),
            (Steps::Auto, Runtime::Uvloop) => (StepProbe::ContextEnter, THREAD_STEPS_CONTEXT_ENTER),
            _ => return None,
        };
        match self.targets.get(&pid)?.python.as_ref()?.interpreter.probe_site(which) {
            Ok(site) => Some(StepMark { which, site, flags }),
            Err(error) => {
                self.notices.push(format!(
                    "process {pid}: steps cannot be marked ({error}); ticks with several owners are cut by captures"
                ));
                None
            }
        }
    }

    /// Puts the step probes of a process in place, or keeps them there: a step of it has become old.
    pub(super) fn arm(&mut self, pid: u32) {
        let Some(target) = self.targets.get_mut(&pid) else { return };
        if target.armed_until_ns.replace(process::monotonic_ns() + ARMED_FOR_NS).is_some() {
            return;
        }
        let loops = self.loops.values().filter(|known| known.info.pid == pid);
        for tid in loops.map(|known| known.info.tid).collect::<Vec<_>>() {
            self.arm_loop(tid);
        }
    }

    pub(super) fn arm_loop(&mut self, tid: Tid) {
        let Some(known) = self.loops.get_mut(&tid) else { return };
        let Some(StepMark { which, site, flags }) = known.marks.clone() else { return };
        let placed = self.kernel.attach_steps(known.info.pid, which, (&site, known.slot));
        match placed.and_then(|()| self.kernel.update_thread(tid, |thread| thread.flags = flags)) {
            Ok(()) => {}
            Err(error) => {
                known.marks = None;
                self.notices.push(format!("process {}: steps cannot be marked ({error:#})", known.info.pid));
            }
        }
    }

    /// Takes step probes away that nothing has needed for a while.
    pub(super) fn disarm_unneeded(&mut self) {
        let now = process::monotonic_ns();
        for target in self.targets.values_mut() {
            if target.armed_until_ns.is_none_or(|until| now < until) {
                continue;
            }
            target.armed_until_ns = None;
            for known in self.loops.values().filter(|known| known.info.pid == target.pid) {
                let _ = self.kernel.update_thread(known.info.tid, |thread| thread.flags = 0);
            }
            self.kernel.detach_steps(target.pid);
        }
    }
}
