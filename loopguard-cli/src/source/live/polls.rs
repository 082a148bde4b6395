//! Marks the polls of tokio's tasks, and tells whose they are.

use std::{collections::VecDeque, sync::Arc};

use loopguard_common::{
    records::{
        RecordHeader, STEP_PROBED, STEP_WITHOUT_END, StepRecord, THREAD_PARKS_ON_FUTEX, THREAD_STEPS_TASK,
        THREAD_TOKIO, TaskRecord, TaskReturnRecord, UnclearWaitRecord,
    },
    trail::Trail,
};

use super::{Live, Steps};
use crate::{
    core::event::{Capture, How, OffCpu, Owner, RequestFacts, Runtime, Stack, Tid},
    runtime::http::{self, NotHttp},
    runtime::memory::ProcessMemory,
    runtime::tokio::{self, NotUsable, ReturnSite, Tokio},
    source::{kernel::Kernel, process},
};

/// Owners of long polls whose steps are still to come: a worker has one or two.
const MAX_OWNERS: usize = 8;
/// More places than tokio polls tasks at.
const MAX_RETURNS: usize = 64;
/// A worker that is busy for longer parks later: its next wait asks again.
const LEARN_AT_MOST_NS: u64 = 10_000_000_000;

/// A process with tokio.
pub(super) struct TokioTarget {
    pub(super) tokio: Tokio,
    /// Where polls return to, as far as was seen.
    returns: Vec<(u64, ReturnSite)>,
    /// Since when its polls are marked.
    marked_since_ns: Option<u64>,
    /// Workers that are to be seen idle, with how often they were before, and until when at the latest.
    learning: Vec<(Tid, u64)>,
    learns_until_ns: u64,
    /// It was said that requests of this kind can't be read.
    said: Vec<NotHttp>,
}

/// Whose the long polls of one thread were, by the number of the step.
pub(super) type PollOwners = VecDeque<(u64, Owner)>;

impl Live {
    /// Looks for tokio in a process.
    pub(super) fn find_tokio(&mut self, pid: u32) -> Option<TokioTarget> {
        // The command of `loopguard run` is loopguard itself until it runs its own program.
        if process::program(pid) == process::program(std::process::id()) {
            return None;
        }
        match tokio::find(pid) {
            Ok(tokio) => {
                for unmarked in &tokio.unmarked {
                    self.notices.push(format!("process {pid}: polls of some tasks cannot be marked: {unmarked}"));
                }
                Some(TokioTarget {
                    tokio,
                    returns: Vec::new(),
                    marked_since_ns: None,
                    learning: Vec::new(),
                    learns_until_ns: 0,
                    said: Vec::new(),
                })
            }
            Err(NotUsable::NotTokio) => None,
            Err(error) => {
                self.notices.push(format!("process {pid}: {error}; its loops are watched without requests"));
                None
            }
        }
    }

    /// `THREAD_*` of a thread of a process with tokio, besides what marks its polls.
    pub(super) fn tokio_flags(&self, (pid, tid): (u32, Tid), epoll_fd: i32) -> u32 {
        if self.targets.get(&pid).is_none_or(|target| target.tokio.is_none()) {
            return 0;
        }
        // The process's first thread with an epoll of its own runs a current-thread runtime: it parks in epoll only.
        let parks_in_epoll_only = tid == pid && epoll_fd >= 0;
        THREAD_TOKIO | if parks_in_epoll_only { 0 } else { THREAD_PARKS_ON_FUTEX }
    }

    /// Where tokio counts its task ids in this process.
    pub(super) fn task_ids(&self, pid: u32) -> u64 {
        self.targets.get(&pid).and_then(|target| target.tokio.as_ref()?.tokio.next_id()).unwrap_or(0)
    }

    pub(super) fn polls_are_marked(&self, pid: u32) -> bool {
        self.options.steps == Steps::Auto
            && self.governor.effort().reads_details
            && self.targets.get(&pid).is_some_and(|target| target.tokio.is_some())
    }

    /// Places the probes on a process's polls.
    pub(super) fn mark_polls(&mut self, pid: u32) {
        if !self.polls_are_marked(pid) {
            return;
        }
        let Some(known) = self.targets.get_mut(&pid).and_then(|target| target.tokio.as_mut()) else { return };
        if known.marked_since_ns.is_some() {
            return;
        }
        let placed = self
            .kernel
            .mark_blocking_tasks(pid, known.tokio.blocking())
            .and_then(|()| self.kernel.mark_polls(pid, known.tokio.polls(), &known.returns));
        match placed {
            Ok(()) => known.marked_since_ns = Some(process::monotonic_ns()),
            Err(error) => {
                self.kernel.unmark_polls(pid);
                self.notices
                    .push(format!("process {pid}: polls cannot be marked ({error:#}); blocks are found by ticks"));
            }
        }
    }

    /// A worker is watched as the others of its process are.
    pub(super) fn mark_polls_of_thread(&mut self, tid: Tid) {
        let Some(pid) = self.loops.get(&tid).map(|known| known.info.pid) else { return };
        let Some(known) = self.targets.get(&pid).and_then(|target| target.tokio.as_ref()) else { return };
        let flag = if known.marked_since_ns.is_some() { THREAD_STEPS_TASK } else { 0 };
        let _ = self.kernel.update_thread(tid, |thread| thread.flags = thread.flags & !THREAD_STEPS_TASK | flag);
    }

    /// While polls are not marked a worker waits, and it is not clear for what.
    pub(super) fn unclear_wait(&mut self, record: &UnclearWaitRecord) {
        let RecordHeader { tgid, tid, .. } = record.header;
        if record.waited_ns == 0 {
            self.learn_park(tgid, tid);
        } else {
            // It may have been a block that nobody saw: the next one will be seen.
            self.watch_closely(tgid);
        }
    }

    /// Marks a process's polls for as long as it takes to see where a worker parks: without that a wait in a healthy
    /// worker can't be told from its idling, and that a worker waits says nothing about blocks.
    fn learn_park(&mut self, pid: u32, tid: Tid) {
        let Some(target) = self.targets.get_mut(&pid) else { return };
        if target.closeness.is_close() {
            // Polls are marked, and its next park will be seen.
            return;
        }
        let Some(known) = target.tokio.as_mut() else { return };
        if !known.learning.iter().any(|(learning, _)| *learning == tid) {
            known.learning.push((tid, seen_idle(&self.kernel, tid)));
        }
        known.learns_until_ns = process::monotonic_ns() + LEARN_AT_MOST_NS;
        self.mark_polls(pid);
        let loops = self.loops.values().filter(|known| known.info.pid == pid);
        for tid in loops.map(|known| known.info.tid).collect::<Vec<_>>() {
            self.mark_polls_of_thread(tid);
        }
    }

    /// Takes the probes away from processes that were marked only to learn where their workers park, and that is known.
    pub(super) fn end_learning(&mut self) {
        let now = process::monotonic_ns();
        let mut learned = Vec::new();
        for (&pid, target) in &mut self.targets {
            let Some(known) = target.tokio.as_mut().filter(|known| !known.learning.is_empty()) else { continue };
            known
                .learning
                .retain(|(tid, before)| self.loops.contains_key(tid) && seen_idle(&self.kernel, *tid) == *before);
            if known.learns_until_ns <= now {
                known.learning.clear();
            }
            if known.learning.is_empty() && !target.closeness.is_close() {
                learned.push(pid);
            }
        }
        for pid in learned {
            self.unmark_steps(pid);
        }
    }

    /// Takes the probes away again; the threads' flags are cleared already.
    pub(super) fn unmark_polls(&mut self, pid: u32) {
        if let Some(known) = self.targets.get_mut(&pid).and_then(|target| target.tokio.as_mut()) {
            known.marked_since_ns = None;
            known.learning.clear();
            self.kernel.unmark_polls(pid);
        }
    }

    /// Polls return to a place that nobody has seen before.
    pub(super) fn task_return(&mut self, record: &TaskReturnRecord) {
        let pid = record.header.tgid;
        let Some(known) = self.targets.get_mut(&pid).and_then(|target| target.tokio.as_mut()) else { return };
        if known.returns.iter().any(|(address, _)| *address == record.address) || known.returns.len() >= MAX_RETURNS {
            return;
        }
        let placed = known.tokio.poll_return(record.address).and_then(|site| {
            let place = (record.address, site);
            self.kernel.mark_returns(pid, std::slice::from_ref(&place)).map_err(|error| format!("{error:#}"))?;
            known.returns.push(place);
            Ok(())
        });
        if let Err(error) = placed {
            self.notices
                .push(format!("process {pid}: some polls cannot be marked ({error}); their blocks are found by ticks"));
        }
    }

    /// Looks which tasks workers poll.
    pub(super) fn look_at_task_ids(&mut self) {
        let is_marked = |target: &TokioTarget| target.marked_since_ns.is_some() && target.tokio.next_id().is_none();
        let marked = self.targets.iter().filter(|(_, target)| target.tokio.as_ref().is_some_and(is_marked));
        for pid in marked.map(|(pid, _)| *pid).collect::<Vec<_>>() {
            let workers = self.loops.values().filter(|known| known.info.pid == pid);
            let ids = workers.filter_map(|known| Some(self.kernel.worker(known.info.tid)?.task_id)).collect::<Vec<_>>();
            self.saw_task_ids(pid, &ids);
        }
    }

    /// Where no symbol says which word counts task ids, those that are seen tell.
    fn saw_task_ids(&mut self, pid: u32, ids: &[u64]) {
        let Some(known) = self.targets.get_mut(&pid).and_then(|target| target.tokio.as_mut()) else { return };
        if !known.tokio.saw_ids(ids.iter().copied(), &ProcessMemory { pid }) {
            return;
        }
        let task_ids = self.task_ids(pid);
        for known in self.loops.values().filter(|known| known.info.pid == pid) {
            let _ = self.kernel.update_thread(known.info.tid, |thread| thread.task_ids = task_ids);
        }
    }

    /// A long poll has ended: its step follows.
    pub(super) fn task(&mut self, record: &TaskRecord) {
        let (pid, tid) = (record.header.tgid, record.header.tid);
        self.saw_task_ids(pid, &[record.task_id]);
        let trail = (record.has_trail != 0).then_some(&record.trail);
        let owner = self.owner_of_task(pid, (record.task_type as u16, record.task_id), trail);
        let Some(known) = self.loops.get_mut(&tid) else { return };
        if known.poll_owners.len() >= MAX_OWNERS {
            known.poll_owners.pop_front();
        }
        known.poll_owners.push_back((record.seq, owner));
    }

    fn owner_of_task(&mut self, pid: u32, (task_type, id): (u16, u64), trail: Option<&Trail>) -> Owner {
        let Some(known) = self.targets.get_mut(&pid).and_then(|target| target.tokio.as_mut()) else {
            return Owner::Unknown("no tokio");
        };
        let name = known.tokio.task_name(task_type, id);
        // A background task, or one whose parent is not known.
        let Some(trail) = trail else { return Owner::Task { task: name } };
        match http::current(&of_record(trail)) {
            Ok(head) => Owner::Request {
                request: Arc::new(RequestFacts {
                    id: head.request_id.unwrap_or_else(|| format!("task-{id}")),
                    method: Some(head.method),
                    path: head.path,
                    route: None,
                    client: None,
                    trace_id: head.trace_id,
                }),
                how: if trail.inherited != 0 { How::HttpRecvOfParent } else { How::HttpRecv },
            },
            Err(why) => {
                if matches!(why, NotHttp::Tls | NotHttp::Http2) && !known.said.contains(&why) {
                    known.said.push(why);
                    self.notices.push(format!("process {pid}: {}", why.reason()));
                }
                Owner::Unknown(why.reason())
            }
        }
    }

    /// Whose poll runs on a worker now, if it is still that step.
    pub(super) fn owner_by_poll(&mut self, tid: Tid, seq: u64) -> Owner {
        let Some(pid) = self.loops.get(&tid).map(|known| known.info.pid) else {
            return Owner::Unknown("no such thread");
        };
        let (Some(clock), Some(worker)) = (self.kernel.clock(tid), self.kernel.worker(tid)) else {
            return Owner::Unknown("no such thread");
        };
        if clock.step_flags & STEP_WITHOUT_END != 0 {
            return Owner::Unknown("where its polls end was not known yet");
        }
        if clock.step_seq != seq || clock.step_flags & STEP_PROBED == 0 {
            return self.outside_polls((pid, tid), clock.tick_start_ns);
        }
        let trail = self.kernel.trail(pid, worker.task_id);
        let mut owner = self.owner_of_task(pid, (worker.task_type as u16, worker.task_id), trail.as_deref());
        if let (Owner::Request { request, .. }, Some(trail)) = (&mut owner, &trail) {
            let client = process::descriptor(pid, trail.fd).filter(|peer| peer != "socket");
            Arc::make_mut(request).client = client;
        }
        owner
    }

    /// Around polls run the scheduler and the future that `block_on` was given.
    fn outside_polls(&self, (pid, tid): (u32, Tid), tick_start_ns: u64) -> Owner {
        let marked_since = self.targets.get(&pid).and_then(|target| target.tokio.as_ref()?.marked_since_ns);
        if marked_since.is_some_and(|since| since < tick_start_ns) {
            Owner::NoRequest { task: (tid == pid).then(|| "the future in block_on".to_owned()) }
        } else {
            Owner::Unknown("polls were not marked yet")
        }
    }

    /// What is known of the owner of a step that has ended, in the form the core takes owners in.
    pub(super) fn owner_of_step(&mut self, record: &StepRecord) -> Option<Capture> {
        let (pid, tid) = (record.header.tgid, record.header.tid);
        let known = self.loops.get_mut(&tid).filter(|known| known.info.runtime == Runtime::Tokio)?;
        while known.poll_owners.front().is_some_and(|(seq, _)| *seq < record.seq) {
            known.poll_owners.pop_front();
        }
        let seen = known.poll_owners.front().filter(|(seq, _)| *seq == record.seq).map(|(_, owner)| owner.clone());
        let owner = match seen {
            Some(owner) => known.step.same_with_client(record.seq, owner),
            None if record.flags & STEP_PROBED != 0 => Owner::Unknown("what the kernel sent of its task was lost"),
            None if record.flags & STEP_WITHOUT_END != 0 => Owner::Unknown("where its polls end was not known yet"),
            None => self.outside_polls((pid, tid), record.tick_start_ns),
        };
        Some(Capture {
            tid,
            step_seq: record.seq,
            step_start_ns: record.start_ns,
            tick_start_ns: record.tick_start_ns,
            at_ns: record.end_ns,
            until_ns: record.end_ns,
            off_cpu: OffCpu { ..record.off_cpu },
            wait: None,
            stack: Arc::new(Stack::default()),
            owner,
        })
    }
}

fn seen_idle(kernel: &Kernel, tid: Tid) -> u64 {
    kernel.worker(tid).map_or(0, |worker| worker.seen_idle)
}

fn of_record(trail: &Trail) -> http::Trail<'_> {
    http::Trail {
        read: &trail.read[..(trail.kept as usize).min(trail.read.len())],
        read_length: trail.read_length,
        answers: trail.answers,
        answer: &trail.answer[..(trail.answer_kept as usize).min(trail.answer.len())],
        answer_length: trail.answer_length,
    }
}
