//! Turns the tasks of one event loop into the requests that are in flight on it.
//!
//! Each block of a busy loop is a reason to look, and most tasks were there the last time: what is known of a task that
//! can't have changed is not read again.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::task::{Met, RequestOfTask};
use super::{Fault, Interpreter, PyThreadInfo};
use crate::core::event::RequestFacts;
use crate::runtime::memory::TargetMemory;

/// Tasks that were nobody's request for so long are looked into no more often than that, all by the same look.
const SETTLED: Duration = Duration::from_secs(1);
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// Tasks looked at; the rest is said to be unread.
const MAX_TASKS: usize = 512;
/// Slots of a set's table that are read.
const MAX_SLOTS: u64 = 1 << 14;
/// `PySetObject.mask` and `.table` (`cpython/setobject.h`).
const SET_MASK: u64 = 32;
const SET_TABLE: u64 = 40;
/// Words of an entry of a set: key and hash.
const SET_ENTRY: usize = 2;
/// First field after an object's header: `FutureObj.fut_loop`, `PyWeakReference.wr_object`.
const FIRST_FIELD: u64 = 16;
/// `struct llist_node.next` (`pycore_llist.h`).
const LIST_NEXT: u64 = 0;

/// Addresses of the tasks of a loop.
pub(super) struct Tasks {
    pub tasks: Vec<u64>,
    /// There are that many more.
    pub unread: u32,
}

/// What the looks before have found.
#[derive(Debug, Default)]
pub(super) struct KnownTasks {
    by_address: HashMap<u64, KnownTask>,
    /// When the last look began that was thorough, and whether that which goes on now is.
    thorough_at: Option<Instant>,
    is_thorough: bool,
}

#[derive(Debug)]
struct KnownTask {
    identity: TaskIdentity,
    found: Found,
    is_there: bool,
}

/// Which task it is: addresses are used again, numbers are not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TaskIdentity {
    number: u32,
    coroutine: u64,
}

#[derive(Debug)]
enum Found {
    /// That of the scope, or the object, which the task's outermost coroutine was called with.
    Request { address: u64, request: RequestFacts },
    /// No request's.
    Nothing { since: Instant },
}

/// What is known of a task without looking into it.
pub(super) enum Known<'a> {
    /// It may be this request's, if what its outermost coroutine was called with is still there.
    Request(u64, &'a RequestFacts),
    NoRequest,
    Unknown,
}

impl KnownTasks {
    /// A look begins. Says whether it looks into tasks, too, that are settled.
    pub fn begin(&mut self, now: Instant) -> bool {
        self.is_thorough = self.thorough_at.is_none_or(|at| now.saturating_duration_since(at) >= LOOK_AGAIN);
        if self.is_thorough {
            self.thorough_at = Some(now);
        }
        self.is_thorough
    }

    pub fn get(&mut self, task: u64, identity: Option<TaskIdentity>) -> Known<'_> {
        match self.by_address.get_mut(&task) {
            Some(known) if Some(known.identity) == identity => {
                known.is_there = true;
                match &known.found {
                    Found::Request { address, request } => Known::Request(*address, request),
                    Found::Nothing { since } if since.elapsed() > SETTLED && !self.is_thorough => Known::NoRequest,
                    Found::Nothing { .. } => Known::Unknown,
                }
            }
            _ => Known::Unknown,
        }
    }

    pub fn is_request(&mut self, task: u64, identity: TaskIdentity, (address, request): (u64, &RequestFacts)) {
        let found = Found::Request { address, request: request.clone() };
        self.by_address.insert(task, KnownTask { identity, found, is_there: true });
    }

    pub fn is_no_request(&mut self, task: u64, identity: TaskIdentity) {
        let since = match self.by_address.get(&task) {
            Some(KnownTask { identity: of, found: Found::Nothing { since }, .. }) if *of == identity => *since,
            _ => Instant::now(),
        };
        let found = Found::Nothing { since };
        self.by_address.insert(task, KnownTask { identity, found, is_there: true });
    }

    /// Forgets the tasks that no look has met since the last call.
    pub fn sweep(&mut self) {
        self.by_address.retain(|_, known| std::mem::take(&mut known.is_there));
    }
}

impl Interpreter {
    /// `None`: somebody gave it a name of its own, or it has none yet.
    pub(super) fn task_identity(&self, task: u64) -> Option<TaskIdentity> {
        Some(TaskIdentity { number: self.task_number(task)?, coroutine: self.task_coroutine(task).ok()? })
    }

    /// Where the request in the outermost coroutine of a task is, if it is there: as a rule the task is called with it.
    pub(super) fn outermost_request(&self, met: &mut Met, task: u64) -> Option<u64> {
        let frame = self.first_coroutine_frame(self.task_coroutine(task).ok()?)?;
        Some(self.request_in_frame(met, frame).ok()??.address())
    }

    /// The tasks of the event loop that a thread runs, those that are done perhaps among them.
    pub(super) fn tasks_of_loop(&self, thread: &PyThreadInfo) -> Result<Tasks, Fault> {
        if self.version.minor >= 14 { self.tasks_in_list(thread) } else { self.tasks_in_set(thread) }
    }

    /// 3.14 on: each thread has a list of its tasks.
    fn tasks_in_list(&self, thread: &PyThreadInfo) -> Result<Tasks, Fault> {
        let mut found = Tasks { tasks: Vec::new(), unread: 0 };
        let Some(asyncio) = self.asyncio.get().filter(|offsets| offsets.task_node > 0 && offsets.tasks_head > 0) else {
            return Err(Fault::Unexpected { address: thread.state, expected: "a thread with a list of tasks" });
        };
        let head = thread.state.wrapping_add(asyncio.tasks_head);
        let mut node = self.memory.field(head, LIST_NEXT)?;
        while node != head && node != 0 {
            if found.tasks.len() == MAX_TASKS {
                found.unread = 1;
                break;
            }
            found.tasks.push(node.wrapping_sub(asyncio.task_node));
            // The list may change under our hands: what was found so far is good.
            let Ok(next) = self.memory.field(node, LIST_NEXT) else {
                found.unread = 1;
                break;
            };
            node = next;
        }
        Ok(found)
    }

    /// Before 3.14: all tasks of all loops are in a `WeakSet` of the module `asyncio.tasks`.
    fn tasks_in_set(&self, thread: &PyThreadInfo) -> Result<Tasks, Fault> {
        let mut found = Tasks { tasks: Vec::new(), unread: 0 };
        let Some(weak_set) = self.all_tasks(thread.interpreter)? else { return Ok(found) };
        let Some(set) = self.attribute(weak_set, "data")? else { return Ok(found) };
        let running = self.running_loop(thread)?;
        let slots = self.memory.field(set, SET_MASK)?.saturating_add(1).min(MAX_SLOTS) as usize;
        let table = self.memory.field(set, SET_TABLE)?;
        for [reference, _hash] in self.memory.words(table, slots * SET_ENTRY)?.as_chunks::<SET_ENTRY>().0 {
            // Empty slots are null, freed ones hold a dummy that is no weak reference.
            if *reference == 0 || !self.is_weak_reference(*reference) {
                continue;
            }
            let Ok(task) = self.memory.field(*reference, FIRST_FIELD) else {
                found.unread += 1;
                continue;
            };
            if !self.is_task(task) || self.memory.field(task, FIRST_FIELD).is_ok_and(|of| running != 0 && of != running)
            {
                continue;
            }
            if found.tasks.len() == MAX_TASKS {
                found.unread += 1;
                continue;
            }
            found.tasks.push(task);
        }
        Ok(found)
    }

    /// The `WeakSet` that `asyncio.tasks` keeps as long as the module lives.
    fn all_tasks(&self, interpreter: u64) -> Result<Option<u64>, Fault> {
        if let Some(&known) = self.all_tasks.get()
            && self.type_name(known)? == "WeakSet"
        {
            return Ok(Some(known));
        }
        let name = if self.version.minor == 11 { "_all_tasks" } else { "_scheduled_tasks" };
        let Some(set) = self.asyncio_tasks_global(interpreter, name)? else { return Ok(None) };
        Ok(Some(*self.all_tasks.get_or_init(|| set)))
    }

    fn is_weak_reference(&self, object: u64) -> bool {
        self.type_name(object).is_ok_and(|name| name.ends_with("ReferenceType") || name == "weakref")
    }

    /// The request in a task's own coroutines; `Ok(None)`: it has none.
    pub(super) fn request_in_task(&self, met: &mut Met, task: u64) -> Result<Option<RequestOfTask>, Fault> {
        if !self.is_task(task) {
            return Err(Fault::Unexpected { address: task, expected: "a task" });
        }
        self.task_coroutine(task)?;
        Ok(self.request_in_coroutines(met, task))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TASK: u64 = 0x1000;
    const IDENTITY: TaskIdentity = TaskIdentity { number: 7, coroutine: 0x2000 };

    fn address_of(tasks: &mut KnownTasks, identity: Option<TaskIdentity>) -> Option<u64> {
        match tasks.get(TASK, identity) {
            Known::Request(address, _) => Some(address),
            Known::NoRequest | Known::Unknown => None,
        }
    }

    #[test]
    fn what_is_known_of_a_task_is_not_believed_of_another_at_its_place() {
        let request = RequestFacts {
            id: "a".into(),
            method: None,
            path: "/".into(),
            route: Some("/".into()),
            client: None,
            trace_id: None,
        };
        let mut tasks = KnownTasks::default();
        tasks.is_request(TASK, IDENTITY, (0x3000, &request));
        assert_eq!(address_of(&mut tasks, Some(IDENTITY)), Some(0x3000));
        assert_eq!(address_of(&mut tasks, Some(TaskIdentity { number: 8, ..IDENTITY })), None);
        assert_eq!(address_of(&mut tasks, Some(TaskIdentity { coroutine: 0x2800, ..IDENTITY })), None);
        assert_eq!(address_of(&mut tasks, None), None);
        // It was met since the last sweep, and then no more.
        tasks.sweep();
        assert_eq!(address_of(&mut tasks, Some(IDENTITY)), Some(0x3000));
        tasks.sweep();
        tasks.sweep();
        assert_eq!(address_of(&mut tasks, Some(IDENTITY)), None);
    }

    #[test]
    fn a_new_task_is_looked_into_each_time() {
        let mut tasks = KnownTasks::default();
        for _ in 0..3 {
            assert!(matches!(tasks.get(TASK, Some(IDENTITY)), Known::Unknown));
            tasks.is_no_request(TASK, IDENTITY);
        }
        // Long since known to be nobody's.
        let long_ago = Instant::now().checked_sub(SETTLED * 2).expect("the machine runs for longer");
        let Some(known) = tasks.by_address.get_mut(&TASK) else { panic!("it was just told of") };
        known.found = Found::Nothing { since: long_ago };
        assert!(tasks.begin(long_ago));
        assert!(matches!(tasks.get(TASK, Some(IDENTITY)), Known::Unknown));
        assert!(!tasks.begin(long_ago + LOOK_AGAIN / 2));
        assert!(matches!(tasks.get(TASK, Some(IDENTITY)), Known::NoRequest));
        assert!(matches!(tasks.get(TASK, Some(TaskIdentity { number: 8, ..IDENTITY })), Known::Unknown));
        assert!(tasks.begin(long_ago + LOOK_AGAIN));
        assert!(matches!(tasks.get(TASK, Some(IDENTITY)), Known::Unknown));
        tasks.by_address.clear();
        tasks.is_no_request(TASK, IDENTITY);
        assert!(matches!(tasks.get(TASK, Some(IDENTITY)), Known::Unknown));
    }
}
