//! Turns the tasks of one event loop into the requests that are in flight on it.

use loopguard_common::records::RequestSnapshot;

use super::code::Codes;
use super::{Fault, Interpreter, PyThreadInfo};
use crate::runtime::memory::TargetMemory;

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

impl Interpreter {
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

    /// The ASGI scope in a task's own coroutines; `Ok(None)`: it has none.
    pub(super) fn scope_in_task(&self, codes: &mut Codes, task: u64) -> Result<Option<RequestSnapshot>, Fault> {
        if !self.is_task(task) {
            return Err(Fault::Unexpected { address: task, expected: "a task" });
        }
        self.task_coroutine(task)?;
        Ok(self.scope_of_task(codes, task))
    }
}
