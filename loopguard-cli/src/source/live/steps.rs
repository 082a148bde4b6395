//! Places step probes in a process once a step of it has become old, and takes them away when nothing needs them.

use super::{Live, Steps};
use crate::{
    core::event::{Runtime, Tid},
    runtime::{cpython::StepProbe, probe_site::ProbeSite},
    source::{kernel::Sampling, process},
};
use loopguard_common::records::{
    THREAD_STEPS_CONTEXT_ENTER, THREAD_STEPS_CONTEXT_RUN, THREAD_STEPS_NEST, THREAD_STEPS_TASK, THREAD_TELLS_SHORT,
};

/// What holds only while a process is watched closely, of `THREAD_*`.
const THREAD_CLOSE: u32 =
    THREAD_STEPS_CONTEXT_RUN | THREAD_STEPS_CONTEXT_ENTER | THREAD_STEPS_NEST | THREAD_STEPS_TASK | THREAD_TELLS_SHORT;
/// How long a process is watched closely after an old step: twice the time since the one before it, within these
/// bounds. Close watching costs about a microsecond a step, which a loop that is hardly ever blocked need not pay.
const CLOSE_AT_LEAST_NS: u64 = 10_000_000_000;
const CLOSE_AT_MOST_NS: u64 = 300_000_000_000;

/// Whether the steps of a process are marked and sampled closely, and until when.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Closeness {
    until_ns: Option<u64>,
    last_old_step_ns: u64,
}

impl Closeness {
    pub(super) fn is_close(&self) -> bool {
        self.until_ns.is_some()
    }

    /// A step has become old. Whether that begins a time of close watching.
    fn old_step(&mut self, now_ns: u64) -> bool {
        let since_last = now_ns.saturating_sub(self.last_old_step_ns);
        let lasts = since_last.saturating_mul(2).clamp(CLOSE_AT_LEAST_NS, CLOSE_AT_MOST_NS);
        let begins = self.until_ns.is_none();
        // The first one ever says nothing about how far apart they are.
        let lasts = if self.last_old_step_ns == 0 { CLOSE_AT_LEAST_NS } else { lasts };
        self.until_ns = self.until_ns.max(Some(now_ns.saturating_add(lasts)));
        self.last_old_step_ns = now_ns;
        begins
    }

    /// Whether the time of close watching is over just now.
    fn is_over(&mut self, now_ns: u64) -> bool {
        self.until_ns.take_if(|until| *until <= now_ns).is_some()
    }
}

/// How the steps of a loop can be marked.
#[derive(Clone)]
pub(super) struct StepMark {
    which: StepProbe,
    site: ProbeSite,
    /// `THREAD_*` of the loop while they are.
    flags: u32,
}

impl StepMark {
    /// The same in another process that maps the same file at the same place, if it does.
    pub(super) fn in_process(&self, from: u32, to: u32) -> Option<Self> {
        let mapping = self.site.file.strip_prefix(format!("/proc/{from}")).ok()?;
        let file = std::path::Path::new("/proc").join(to.to_string()).join(mapping);
        file.exists().then(|| Self { site: ProbeSite { file, ..self.site.clone() }, ..self.clone() })
    }
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

    /// Watches a process closely, or goes on with that: a step of it has become old.
    pub(super) fn watch_closely(&mut self, pid: u32) {
        let Some(target) = self.targets.get_mut(&pid) else { return };
        if !target.closeness.old_step(process::monotonic_ns()) {
            return;
        }
        self.mark_polls(pid);
        let loops = self.loops.values().filter(|known| known.info.pid == pid);
        for tid in loops.map(|known| known.info.tid).collect::<Vec<_>>() {
            self.watch_loop_closely(tid);
        }
    }

    pub(super) fn watch_loop_closely(&mut self, tid: Tid) {
        let Some(known) = self.loops.get_mut(&tid) else { return };
        if let Err(error) = self.kernel.sample(tid, Sampling::Close) {
            self.notices.push(format!("thread {tid} is not sampled closely ({error:#})"));
        }
        let marks = known.marks.clone().filter(|_| self.governor.effort().reads_details);
        let Some(StepMark { which, site, flags }) = marks else {
            let _ = self.kernel.update_thread(tid, |thread| thread.flags |= THREAD_TELLS_SHORT);
            self.mark_polls_of_thread(tid);
            return;
        };
        let flags = flags | THREAD_TELLS_SHORT;
        let placed = self.kernel.attach_steps(known.info.pid, which, (&site, known.slot));
        match placed.and_then(|()| self.kernel.update_thread(tid, |thread| thread.flags |= flags)) {
            Ok(()) => {}
            Err(error) => {
                known.marks = None;
                self.notices.push(format!("process {}: steps cannot be marked ({error:#})", known.info.pid));
            }
        }
    }

    /// Steps back from processes in which nothing was late for a while.
    pub(super) fn relax(&mut self) {
        let now = process::monotonic_ns();
        let over = self.targets.iter_mut().filter_map(|(pid, target)| target.closeness.is_over(now).then_some(*pid));
        for pid in over.collect::<Vec<_>>() {
            self.unmark_steps(pid);
            for known in self.loops.values().filter(|known| known.info.pid == pid) {
                let _ = self.kernel.sample(known.info.tid, Sampling::Watchful);
            }
        }
    }

    /// Takes away what marks the steps of a process's loops.
    pub(super) fn unmark_steps(&mut self, pid: u32) {
        for known in self.loops.values().filter(|known| known.info.pid == pid) {
            let _ = self.kernel.update_thread(known.info.tid, |thread| thread.flags &= !THREAD_CLOSE);
        }
        self.kernel.detach_steps(pid);
        self.unmark_polls(pid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;

    /// Old steps at these seconds; what is close at the end, and until when.
    fn check(old_steps: &[u64], expected_until_s: u64) {
        let mut closeness = Closeness::default();
        for at in old_steps {
            closeness.is_over(at * S);
            closeness.old_step(at * S);
        }
        assert!(!closeness.is_over(expected_until_s * S - 1));
        assert!(closeness.is_close());
        assert!(closeness.is_over(expected_until_s * S));
        assert!(!closeness.is_close());
    }

    #[test]
    fn a_single_old_step_is_followed_by_a_short_time_of_close_watching() {
        check(&[1000], 1010);
        check(&[1000, 1001], 1011);
    }

    #[test]
    fn where_old_steps_come_back_the_next_one_is_awaited() {
        check(&[1000, 1030], 1090);
        check(&[1000, 1030, 1060], 1120);
        // A burst does not shorten it.
        check(&[1000, 1030, 1031], 1090);
        check(&[1000, 4000], 4300);
    }
}
