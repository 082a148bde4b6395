//! Follows processes: their children, the programs they become, and their ends; and numbers the workers of a server.
//!
//! The kernel programs watch a child from its first instant, so that nothing is missed until it is known here. What it
//! runs is looked into when it first polls: most children of a server that is not pre-forked never do.

use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use loopguard_common::records::{ProcessChange, ProcessRecord};

use super::{
    Live, Python, Target,
    discover::Poll,
    steps::{Closeness, StepMark},
};
use crate::{
    core::{
        event::{Event, Runtime, Tid, Worker},
        status::ThreadStatus,
    },
    runtime::cpython::{self, Inspector, NotUsable},
    source::{
        kernel::Progress,
        process::{self, Identity},
    },
};

/// Processes that are watched at once; the kernel programs' table of them is as large.
const MAX_PROCESSES: usize = 1024;
/// Loops that are gone and still listed.
const MAX_FINISHED: usize = 1000;

impl Live {
    /// Watches a process and all its descendants.
    pub fn add_tree(&mut self, pid: u32) -> Result<()> {
        if self.targets.contains_key(&pid) {
            return Ok(());
        }
        let identity = Identity::of(pid).with_context(|| format!("process {pid} cannot be opened"))?;
        self.add_target(identity, None)?;
        if let Err(NotUsable::Gone) = self.look_into(pid) {
            bail!("process {pid} ended while loopguard was attaching");
        }
        self.find_request_probes(pid);
        self.add_descendants();
        Ok(())
    }

    /// A child made since its parent is watched is reported; older ones are found here. Each round finds those whose
    /// parents the last one did.
    fn add_descendants(&mut self) {
        let mut found = true;
        while std::mem::take(&mut found) {
            for (child, parent) in process::parents() {
                if !self.targets.contains_key(&parent) || self.targets.contains_key(&child) {
                    continue;
                }
                // One that ended meanwhile is no loss.
                let Ok(identity) = Identity::of(child) else { continue };
                if self.add_target(identity, Some(parent)).is_ok() {
                    let _ = self.look_into(child);
                    self.find_request_probes(child);
                    found = true;
                }
            }
        }
    }

    fn add_target(&mut self, identity: Identity, parent: Option<u32>) -> Result<()> {
        if self.targets.len() >= MAX_PROCESSES {
            bail!("{MAX_PROCESSES} processes are watched already");
        }
        let pid = identity.pid;
        // A server that is just starting is watched from its first tick on, like the children it makes later.
        let mut before_polls = process::has_no_epoll_descriptor(pid);
        self.kernel.watch_process(pid, if before_polls { Progress::BeforePolls } else { Progress::MayPoll })?;
        if before_polls && !process::has_no_epoll_descriptor(pid) {
            // It may have polled before it was watched.
            before_polls = false;
            self.kernel.may_poll(pid)?;
        }
        self.watched_processes += 1;
        self.targets.insert(
            pid,
            Target {
                parent: parent.or_else(|| process::parent(pid).filter(|parent| self.targets.contains_key(parent))),
                identity,
                looked_into: false,
                before_polls,
                is_fork: false,
                worker: None,
                python: None,
                tokio: None,
                uses_uvloop: false,
                closeness: Closeness::default(),
                ended: false,
            },
        );
        Ok(())
    }

    /// Finds out which interpreter a process runs, if any: once for each program that it becomes.
    pub(super) fn look_into(&mut self, pid: u32) -> Result<(), NotUsable> {
        let Some(target) = self.targets.get_mut(&pid) else { return Ok(()) };
        if std::mem::replace(&mut target.looked_into, true) {
            return Ok(());
        }
        match cpython::find(pid) {
            Ok(interpreter) => {
                let interpreter = Arc::new(interpreter);
                if let Err(error) = self.kernel.update_layout(pid, &interpreter.layout()) {
                    self.notices.push(format!("process {pid}: its frames cannot be captured ({error:#})"));
                }
                target.python = Some(Python { inspector: Inspector::new(interpreter.clone()), interpreter });
            }
            Err(NotUsable::NotPython) => {}
            Err(NotUsable::Gone) => return Err(NotUsable::Gone),
            Err(other) => {
                self.notices.push(format!("process {pid}: {other}; its loops are watched without names"));
            }
        }
        // Its own request probes are looked for in its turn: that takes longer than some blocks, and its siblings wait.
        target.uses_uvloop = process::uses_uvloop(pid);
        if target.python.is_none()
            && let Some(tokio) = self.find_tokio(pid)
            && let Some(target) = self.targets.get_mut(&pid)
        {
            target.tokio = Some(tokio);
            // Where its workers park is seen while polls are marked, and needed afterwards.
            self.watch_closely(pid);
        }
        Ok(())
    }

    pub(super) fn process_changed(&mut self, record: &ProcessRecord, events: &mut Vec<Event>) {
        let pid = record.header.tgid;
        if record.change == ProcessChange::Forked as u32 {
            self.forked(record, events);
        } else if record.change == ProcessChange::Exec as u32 {
            for poll in self.unintroduced.extract_if(.., |poll| poll.pid == pid) {
                self.kernel.unwatch_thread(poll.tid);
            }
            self.finish_loops_of(pid, events);
            self.unmark_polls(pid);
            self.kernel.forget_program(pid);
            self.naming.forget(pid);
            self.requests.close_process(pid);
            if let Some(target) = self.targets.get_mut(&pid) {
                target.before_polls = true;
                target.python = None;
                target.tokio = None;
                target.looked_into = false;
                target.is_fork = false;
                target.uses_uvloop = false;
                target.closeness = Closeness::default();
            }
        } else if record.change == ProcessChange::Ended as u32 {
            let tid = record.header.tid;
            let _ = self.introduce(tid, events);
            self.finish_loop(tid, events);
        }
    }

    fn forked(&mut self, record: &ProcessRecord, events: &mut Vec<Event>) {
        let pid = record.header.tgid;
        if let Some(known) = self.targets.get_mut(&pid) {
            if known.identity.is_process_of(record.start_boottime_ns) {
                // It was found before it was told of.
                known.before_polls = true;
                return;
            }
            // Its id was used again before its end was noticed.
            self.finish_target(pid, events);
        }
        // Whoever has the id now need not be the child: it may have ended, and its id be another's.
        match Identity::of(pid).ok().filter(|identity| identity.is_process_of(record.start_boottime_ns)) {
            Some(identity) => {
                if let Err(error) = self.add_target(identity, Some(record.parent)) {
                    self.notices.push(format!("process {pid}, a child of {}: not watched, {error:#}", record.parent));
                    self.kernel.unwatch_process(pid);
                } else {
                    if let Some(target) = self.targets.get_mut(&pid) {
                        target.before_polls = true;
                    }
                    self.inherit(pid, record.parent);
                }
            }
            None => self.kernel.unwatch_process(pid),
        }
    }

    /// A forked child has its parent's interpreter, at the same addresses, until it runs another program: its binaries
    /// need not be searched again, which takes longer than some blocks.
    fn inherit(&mut self, pid: u32, parent: u32) {
        let Some(python) = self.targets.get(&parent).and_then(|target| target.python.as_ref()) else { return };
        let Ok(interpreter) = python.interpreter.of_fork(pid).map(Arc::new) else { return };
        if self.kernel.update_layout(pid, &interpreter.layout()).is_ok()
            && let Some(target) = self.targets.get_mut(&pid)
        {
            target.python = Some(Python { inspector: Inspector::new(interpreter.clone()), interpreter });
            target.looked_into = true;
            target.is_fork = true;
            self.inherit_request_probes(pid, parent);
        }
    }

    /// How the steps of a loop are marked in a process forked from the same parent.
    pub(super) fn marks_of_sibling(&self, pid: u32, runtime: Runtime) -> Option<StepMark> {
        let server = self.targets.get(&pid).filter(|target| target.is_fork)?.parent;
        self.loops
            .values()
            .filter(|known| known.info.runtime == runtime && known.info.pid != pid)
            .filter(|known| {
                self.targets.get(&known.info.pid).is_some_and(|other| other.is_fork && other.parent == server)
            })
            .find_map(|known| known.marks.as_ref()?.in_process(known.info.pid, pid))
    }

    /// Lets go of the threads and processes that are gone.
    pub(super) fn let_go(&mut self, events: &mut Vec<Event>) {
        for target in self.targets.values_mut() {
            target.ended = process::has_ended(&target.identity.pidfd);
        }
        let ended: Vec<u32> = self.targets.iter().filter(|(_, target)| target.ended).map(|(pid, _)| *pid).collect();
        // The end of a thread is reported; should the report have been lost, this is how it is noticed.
        let is_gone = |pid: u32, tid: Tid| !std::path::Path::new(&format!("/proc/{pid}/task/{tid}")).exists();
        let loops = self.loops.values().map(|known| (known.info.pid, known.info.tid));
        let gone: Vec<Tid> = loops.filter(|(pid, tid)| is_gone(*pid, *tid)).map(|(_, tid)| tid).collect();
        if !ended.is_empty() || !gone.is_empty() {
            // What they did last is in the ring buffer by now, and comes before their end.
            let _ = self.take_records(events);
        }
        for pid in ended {
            self.finish_target(pid, events);
        }
        for tid in gone {
            self.finish_loop(tid, events);
        }
        self.find_untold();
    }

    /// A thread whose first poll was reported with a record that was lost is watched, and nobody knows of it.
    fn find_untold(&mut self) {
        let lost = self.kernel.counts().lost;
        if std::mem::replace(&mut self.lost_when_searched, lost) == lost {
            return;
        }
        for (tid, slot) in self.kernel.unknown_threads() {
            let Some(thread) = self.kernel.thread(slot) else { continue };
            let poll = Poll {
                pid: thread.tgid,
                tid,
                epoll_fd: thread.epoll_fd,
                syscall: libc::SYS_epoll_wait,
                returned_ns: None,
            };
            if self.kernel.take_over(tid, slot).is_ok() {
                self.unintroduced.push(poll);
            }
        }
    }

    fn finish_target(&mut self, pid: u32, events: &mut Vec<Event>) {
        self.finish_loops_of(pid, events);
        self.kernel.unwatch_process(pid);
        self.naming.forget(pid);
        self.requests.close_process(pid);
        self.targets.remove(&pid);
    }

    fn finish_loops_of(&mut self, pid: u32, events: &mut Vec<Event>) {
        let loops = self.loops.values().filter(|known| known.info.pid == pid);
        for tid in loops.map(|known| known.info.tid).collect::<Vec<_>>() {
            self.finish_loop(tid, events);
        }
    }

    fn finish_loop(&mut self, tid: Tid, events: &mut Vec<Event>) {
        let Some(known) = self.loops.remove(&tid) else { return };
        self.finished.push(ThreadStatus { is_gone: true, step_start_ns: None, ..self.thread_status(&known) });
        // Bounded, however many threads come and go.
        if self.finished.len() > MAX_FINISHED {
            self.finished.remove(0);
        }
        self.kernel.unwatch_thread(tid);
        events.push(Event::LoopGone { tid });
    }

    /// Which of its parent's workers a process with a loop is. Numbers stay as long as their processes live; a new
    /// process gets the lowest free one.
    pub(super) fn worker(&mut self, pid: u32) -> Option<Worker> {
        let target = self.targets.get(&pid)?;
        let server = target.parent?;
        let siblings = self.targets.values().filter(|other| other.parent == Some(server) && !other.ended);
        let taken: Vec<u32> = siblings.filter_map(|sibling| sibling.worker).collect();
        let number = target.worker.or_else(|| (1..).find(|number| !taken.contains(number)))?;
        self.targets.get_mut(&pid)?.worker = Some(number);
        Some(Worker { server, number, of: taken.into_iter().max().unwrap_or(0).max(number) })
    }

    /// Whether a sibling of this process is watched closely: what one worker does, the others will.
    pub(super) fn has_close_sibling(&self, pid: u32) -> bool {
        let Some(server) = self.targets.get(&pid).and_then(|target| target.parent) else { return false };
        self.targets.values().any(|other| other.parent == Some(server) && other.closeness.is_close())
    }
}
