//! Finds the loop threads of a process, and what kind of loop they run.

use std::collections::HashMap;

use anyhow::Result;
use loopguard_common::{
    records::{AddressRange, LoopThread, THREAD_PARKS, THREAD_PARKS_ON_FUTEX},
    walk::{Scratch, walk_frames},
};

use super::{
    Live, Loop,
    facts::{StepFacts, empty_capture, frames, walk_status},
    polls::PollOwners,
};
use crate::{
    core::event::{Event, Frame, LoopInfo, Runtime, Stack, StepMarks, Tid},
    runtime::cpython::PyThreadInfo,
    source::{
        kernel::{MAX_THREADS, Standing},
        process, syscall,
    },
};

/// How often a thread's frames are looked at before it is no loop.
const LOOKS_AT_FRAMES: usize = 5;
/// A worker's epoll descriptor as long as it is not known: its first poll will tell.
const NO_DESCRIPTOR: i32 = -1;

impl Live {
    /// Looks for loop threads that nobody reported: at the start, and for those that are stuck in a step.
    pub fn scan(&mut self, events: &mut Vec<Event>) -> Result<()> {
        let mut fresh = Vec::new();
        self.look_for_loops(&mut fresh)?;
        self.hand_on(fresh, events);
        Ok(())
    }

    fn look_for_loops(&mut self, events: &mut Vec<Event>) -> Result<()> {
        // Workers are numbered as they are found: the oldest first.
        let mut pids: Vec<u32> = self.targets.keys().copied().collect();
        pids.sort_by_key(|pid| (self.targets[pid].identity.start_ticks, *pid));
        for pid in pids {
            let Ok(tids) = process::threads(pid) else { continue };
            let mut ticking = None;
            for tid in tids {
                if self.loops.contains_key(&tid) {
                    continue;
                }
                if let Some((number, epoll_fd)) = process::current_syscall(pid, tid)
                    && syscall::is_epoll(number)
                {
                    let found = Poll { pid, tid, epoll_fd: epoll_fd as i32, syscall: number, returned_ns: None };
                    self.polled(found, events)?;
                } else {
                    let ticking = ticking.get_or_insert_with(|| self.may_tick(pid));
                    self.find_busy_loop(pid, tid, ticking, events)?;
                }
            }
        }
        Ok(())
    }

    /// What loop threads of a process must have if they are in the middle of a tick. Read once for all of its threads,
    /// which may be very many.
    fn may_tick(&self, pid: u32) -> MayTick {
        let interpreter =
            self.targets.get(&pid).and_then(|target| target.python.as_ref()).map(|python| &python.interpreter);
        let threads = interpreter.and_then(|interpreter| interpreter.threads().ok()).unwrap_or_default();
        MayTick {
            epoll_descriptors: process::epoll_descriptors(pid),
            states: threads.into_iter().map(|thread| (thread.native_thread_id, thread)).collect(),
        }
    }

    /// A loop thread in the middle of a tick shows no poll, but the frames of its loop.
    fn find_busy_loop(&mut self, pid: u32, tid: Tid, ticking: &MayTick, events: &mut Vec<Event>) -> Result<()> {
        let [epoll_fd] = ticking.epoll_descriptors[..] else { return Ok(()) };
        let Some(python) = process::innermost_tid(pid, tid).ok().and_then(|id| ticking.states.get(&id)).copied() else {
            return Ok(());
        };
        let Some(stack) = self.stack_of(pid, &python) else { return Ok(()) };
        let uses_uvloop = self.targets.get(&pid).is_some_and(|target| target.uses_uvloop);
        let runtime = match LoopFrames::of(&stack) {
            LoopFrames::Asyncio { .. } => Runtime::Asyncio,
            LoopFrames::Runner if uses_uvloop => Runtime::Uvloop,
            _ => return Ok(()),
        };
        let standing = Standing::InTick { now_ns: process::monotonic_ns(), waits_in: waits_in(pid, tid) };
        self.adopt(Found { pid, tid, epoll_fd, runtime, python: Some(python) }, standing, events)
    }

    /// A thread was seen to poll. One that polled for the first time is watched since, and what came of it may be among
    /// the next records; to find out what it is can wait until then.
    pub(super) fn reported(&mut self, poll: Poll, slot: Option<u32>, events: &mut Vec<Event>) -> Result<()> {
        let Some(slot) = slot else {
            let _ = self.look_into(poll.pid);
            return self.polled(poll, events);
        };
        self.kernel.take_over(poll.tid, slot)?;
        if !self.loops.contains_key(&poll.tid) {
            self.unintroduced.push(poll);
        }
        Ok(())
    }

    /// Finds out what a thread is that is watched already, and lets go of it if it is no loop.
    pub(super) fn introduce(&mut self, tid: Tid, events: &mut Vec<Event>) -> Result<()> {
        let Some(at) = self.unintroduced.iter().position(|poll| poll.tid == tid) else { return Ok(()) };
        let poll = self.unintroduced.remove(at);
        // It runs meanwhile: what is read of its frames while they change may make no sense.
        for _ in 0..LOOKS_AT_FRAMES {
            if self.loops.contains_key(&tid) || self.look_into(poll.pid).is_err() {
                break;
            }
            self.polled(poll.clone(), events)?;
        }
        if !self.loops.contains_key(&tid) {
            self.kernel.unwatch_thread(tid);
        }
        Ok(())
    }

    /// A thread polls: is it a loop of ours, and is this the loop's own poll?
    pub(super) fn polled(&mut self, poll: Poll, events: &mut Vec<Event>) -> Result<()> {
        let Poll { pid, tid, epoll_fd, syscall, returned_ns } = poll;
        if epoll_fd < 0 {
            return self.runs_tasks(pid, tid, events);
        }
        if let Some(known) = self.loops.get_mut(&tid) {
            // A nested poll is blocking like any other wait, unless the loop was replaced by another one.
            if known.epoll_fd != epoll_fd && !process::is_epoll_descriptor(pid, known.epoll_fd) {
                known.epoll_fd = epoll_fd;
                let flags = self.tokio_flags((pid, tid), epoll_fd);
                self.kernel.update_thread(tid, |thread| {
                    thread.epoll_fd = epoll_fd;
                    if flags != 0 {
                        thread.flags = thread.flags & !THREAD_PARKS_ON_FUTEX | flags;
                    }
                })?;
            }
            return Ok(());
        }
        let Some(target) = self.targets.get_mut(&pid) else { return Ok(()) };
        // It may have come in since.
        target.uses_uvloop = target.uses_uvloop || process::uses_uvloop(pid);
        let (uses_uvloop, is_python) = (target.uses_uvloop, target.python.is_some());
        let is_first = target.before_polls && self.kernel.slot_of(tid).is_some();
        let found = match self.python_stack(pid, tid) {
            Some((python, stack)) => {
                let runtime = match LoopFrames::of(&stack) {
                    // libuv polls with epoll_pwait, Python's own selector with epoll_wait.
                    _ if uses_uvloop && syscall == libc::SYS_epoll_pwait => Runtime::Uvloop,
                    LoopFrames::Asyncio { polls: true } => Runtime::Asyncio,
                    // A loop that only looked what is ready, and is in its first tick by now.
                    LoopFrames::Asyncio { polls: false } if returned_ns.is_some() => Runtime::Asyncio,
                    // It has gone on since: with no other descriptor to poll, that was the loop's.
                    LoopFrames::Asyncio { .. } if process::epoll_descriptors(pid) == [epoll_fd] => Runtime::Asyncio,
                    // The first poll of a thread that was watched since its process began: the loop's, which polls
                    // before it runs anything.
                    LoopFrames::Asyncio { .. } if is_first && process::is_epoll_descriptor(pid, epoll_fd) => {
                        Runtime::Asyncio
                    }
                    // A poll inside a step: the loop's own will follow.
                    LoopFrames::Asyncio { polls: false } => return Ok(()),
                    // Read while they changed, these frames say nothing. Its next poll is told of.
                    LoopFrames::None if is_partial(&stack) && !sleeps_in_poll(pid, tid) => return Ok(()),
                    _ => Runtime::Epoll,
                };
                Found { pid, tid, epoll_fd, runtime, python: Some(python) }
            }
            // A helper thread of an extension module: no loop of the server.
            None if is_python => return Ok(()),
            None => Found { pid, tid, epoll_fd, runtime: self.native_runtime(pid), python: None },
        };
        self.adopt(found, standing(&poll), events)
    }

    /// A thread that nobody knew polls a task or runs a request's code: a worker, whose idling need not be a poll of its own.
    fn runs_tasks(&mut self, pid: u32, tid: Tid, events: &mut Vec<Event>) -> Result<()> {
        // The loops of an interpreter show themselves when they poll.
        if self.loops.contains_key(&tid) || self.targets.get(&pid).is_none_or(|target| target.python.is_some()) {
            return Ok(());
        }
        // Workers of one runtime take turns at polling the same one.
        let others = self.loops.values().find(|known| known.info.pid == pid && known.epoll_fd >= 0);
        let epoll_fd = match (others, &process::epoll_descriptors(pid)[..]) {
            (Some(other), _) => other.epoll_fd,
            (None, [only]) => *only,
            (None, _) => NO_DESCRIPTOR,
        };
        let runtime = self.native_runtime(pid);
        let standing = match runtime {
            // It may have parked meanwhile: its next poll tells.
            Runtime::Tokio => Standing::Idle,
            _ => Standing::InTick { now_ns: process::monotonic_ns(), waits_in: None },
        };
        self.adopt(Found { pid, tid, epoll_fd, runtime, python: None }, standing, events)
    }

    /// What kind of loop runs in a process without an interpreter.
    fn native_runtime(&self, pid: u32) -> Runtime {
        let has_tokio = self.targets.get(&pid).is_some_and(|target| target.tokio.is_some());
        if has_tokio { Runtime::Tokio } else { Runtime::Epoll }
    }

    /// Where servers tell of their requests, a sleeping worker is told from a blocked one.
    pub(super) fn mark_workers(&mut self, pid: u32) {
        let workers = self.loops.values().filter(|known| known.info.pid == pid && known.python.is_none());
        for tid in workers.map(|known| known.info.tid) {
            // If it ended meanwhile, that is seen soon.
            let _ = self.kernel.update_thread(tid, |thread| thread.flags |= THREAD_PARKS);
        }
    }

    fn watch_from(&mut self, thread: LoopThread, (pid, tid): (u32, Tid), standing: Standing) -> Result<u32> {
        let slot = self.kernel.watch_thread(thread, standing)?;
        match self.fell_asleep((pid, tid), standing) {
            Some(standing) => {
                self.kernel.unwatch_thread(tid);
                self.kernel.watch_thread(thread, standing)
            }
            None => Ok(slot),
        }
    }

    /// Where a thread stands that went to sleep between the look at it and the moment it was watched, which no program
    /// of ours saw.
    fn fell_asleep(&self, (pid, tid): (u32, Tid), standing: Standing) -> Option<Standing> {
        let Standing::InTick { now_ns, waits_in: None } = standing else { return None };
        let (number, arg0) = process::current_syscall(pid, tid).filter(|(number, _)| *number >= 0)?;
        let clock = self.kernel.clock(tid)?;
        let is_unseen = clock.step_start_ns == now_ns && !clock.is_waiting() && !syscall::is_epoll(number);
        is_unseen.then_some(Standing::InTick { now_ns, waits_in: Some((number as i32, arg0)) })
    }

    /// The interpreter's thread state of a thread, and its frames now.
    fn python_stack(&mut self, pid: u32, tid: Tid) -> Option<(PyThreadInfo, Stack)> {
        let native = process::innermost_tid(pid, tid).ok()?;
        let thread = self.targets.get(&pid)?.python.as_ref()?.interpreter.thread(native).ok()??;
        let stack = self.stack_of(pid, &thread)?;
        Some((thread, stack))
    }

    fn stack_of(&mut self, pid: u32, thread: &PyThreadInfo) -> Option<Stack> {
        let python = self.targets.get_mut(&pid)?.python.as_mut()?;
        let mut record = empty_capture();
        let mut scratch = Scratch::default();
        let (memory, layout) = (python.interpreter.memory(), python.interpreter.layout());
        walk_frames(memory, &layout, thread.walked(), &mut scratch, &mut record);
        Some(python.inspector.stack(frames(&record), walk_status(&record)))
    }

    /// Says what a thread is that is watched since it was seen for the first time.
    fn introduce_watched(&mut self, slot: u32, thread: LoopThread) -> Result<u32> {
        let known = self.kernel.thread(slot).map_or(0, |thread| thread.flags);
        self.kernel.introduce_thread(thread)?;
        // Its programs could not know that this is how it parks, unless they knew it for a worker.
        const PARKS: u32 = THREAD_PARKS | THREAD_PARKS_ON_FUTEX;
        let may_be_parked = known & PARKS == 0 && thread.flags & PARKS != 0;
        let waits = || waits_in(thread.tgid, thread.tid);
        if may_be_parked && waits().is_some_and(|(call, _)| i64::from(call) == libc::SYS_futex) {
            self.kernel.set_idle(thread.tid)?;
        }
        Ok(slot)
    }

    fn adopt(&mut self, found: Found, standing: Standing, events: &mut Vec<Event>) -> Result<()> {
        let Found { pid, tid, epoll_fd, runtime, python } = found;
        let gil = match (&python, &self.targets[&pid].python) {
            (Some(thread), Some(python)) => python.interpreter.gil_ranges(thread.interpreter),
            _ => [AddressRange::default(); 2],
        };
        let parks = python.is_none() && self.requests.are_told_by(pid);
        let thread = LoopThread {
            tid,
            tgid: pid,
            flags: self.tokio_flags((pid, tid), epoll_fd) | if parks { THREAD_PARKS } else { 0 },
            epoll_fd,
            task_ids: self.task_ids(pid),
            thread_state: python.as_ref().map_or(0, |thread| thread.state),
            native_thread_id: python.as_ref().map_or(0, |thread| thread.native_thread_id),
            gil,
            ..LoopThread::default()
        };
        let watched = match self.kernel.slot_of(tid) {
            Some(slot) => self.introduce_watched(slot, thread),
            None => self.watch_from(thread, (pid, tid), standing),
        };
        let slot = match watched {
            Ok(slot) => slot,
            Err(_) if self.kernel.is_full() => {
                // Each of them would be said again whenever it polls.
                if !std::mem::replace(&mut self.said_full, true) {
                    self.notices.push(format!("{MAX_THREADS} loop threads are watched; further ones are not"));
                }
                return Ok(());
            }
            Err(error) => {
                // The thread ended meanwhile; if its process did too, that is seen soon.
                self.notices.push(format!("thread {tid} of process {pid} cannot be watched: {error:#}"));
                return Ok(());
            }
        };
        self.naming.prepare(pid);
        let marks = self.marks_of_sibling(pid, runtime).or_else(|| self.step_marks(pid, runtime));
        if let Some(target) = self.targets.get_mut(&pid)
            && let Some(python) = &mut target.python
            && python.interpreter.refresh_asyncio()
        {
            self.kernel.update_layout(pid, &python.interpreter.layout())?;
        }
        let info = LoopInfo {
            pid,
            tid,
            thread: process::thread_name(pid, tid),
            runtime,
            worker: self.worker(pid),
            steps: if marks.is_some() || self.polls_are_marked(pid) { StepMarks::Exact } else { StepMarks::TicksOnly },
        };
        events.push(Event::LoopFound(info.clone()));
        let pace = self.options.pace(self.options.threshold_ns);
        self.loops.insert(
            tid,
            Loop {
                info,
                since_ns: process::monotonic_ns(),
                python,
                epoll_fd,
                slot,
                marks,
                step: StepFacts::default(),
                pace,
                threshold_ns: pace.threshold_ns,
                poll_owners: PollOwners::default(),
            },
        );
        if self.targets[&pid].closeness.is_close() {
            self.watch_loop_closely(tid);
        } else if self.has_close_sibling(pid) {
            self.watch_closely(pid);
        } else {
            // They may be marked for another reason.
            self.mark_polls_of_thread(tid);
        }
        Ok(())
    }
}

/// The epoll descriptors of a process, and its Python threads by the ids that it knows them by.
struct MayTick {
    epoll_descriptors: Vec<i32>,
    states: HashMap<u64, PyThreadInfo>,
}

#[derive(Clone)]
pub(super) struct Poll {
    pub(super) pid: u32,
    pub(super) tid: Tid,
    pub(super) epoll_fd: i32,
    pub(super) syscall: i64,
    /// When it returned, if it did not wait for anything: a tick began then.
    pub(super) returned_ns: Option<u64>,
}

/// Where a thread stands by now that was seen to poll.
fn standing(poll: &Poll) -> Standing {
    let now_in = process::current_syscall(poll.pid, poll.tid);
    match poll.returned_ns {
        Some(now_ns) if !now_in.is_some_and(|(number, _)| syscall::is_epoll(number)) => {
            let waits_in = now_in.filter(|(number, _)| *number >= 0).map(|(number, arg0)| (number as i32, arg0));
            Standing::InTick { now_ns, waits_in }
        }
        _ => Standing::Idle,
    }
}

fn is_partial(stack: &Stack) -> bool {
    stack.frames.is_empty() || stack.incomplete.is_some()
}

fn sleeps_in_poll(pid: u32, tid: Tid) -> bool {
    process::current_syscall(pid, tid).is_some_and(|(number, _)| syscall::is_epoll(number))
}

/// The system call a thread sleeps in, with its first argument.
fn waits_in(pid: u32, tid: Tid) -> Option<(i32, u64)> {
    process::current_syscall(pid, tid).map(|(number, arg0)| (number as i32, arg0))
}

struct Found {
    pid: u32,
    tid: Tid,
    epoll_fd: i32,
    runtime: Runtime,
    python: Option<PyThreadInfo>,
}

/// What a thread's Python frames say about its event loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LoopFrames {
    /// asyncio's own loop; `polls`: it is in its poll, not in a step.
    Asyncio {
        polls: bool,
    },
    /// Started by `asyncio.run` or its like, the loop itself has no Python frames.
    Runner,
    None,
}

impl LoopFrames {
    fn of(stack: &Stack) -> Self {
        let is = |frame: &Frame, function: &str, file: &str| {
            frame.function.ends_with(function) && frame.file.as_deref().is_some_and(|path| path.ends_with(file))
        };
        let run_once = stack.frames.iter().position(|frame| is(frame, "._run_once", "asyncio/base_events.py"));
        if let Some(depth) = run_once {
            // In the poll only the selector's `select` is inside `_run_once`.
            let polls = stack.frames[..depth].iter().all(|frame| is(frame, ".select", "selectors.py"));
            return Self::Asyncio { polls };
        }
        let runs = |frame: &Frame| is(frame, ".run", "asyncio/runners.py") || is(frame, "run", "uvloop/__init__.py");
        if stack.frames.iter().any(|frame| runs(frame)) { Self::Runner } else { Self::None }
    }
}
