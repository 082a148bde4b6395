//! Turns a thread into its current asyncio task, and a task into the request it works for.
//!
//! A task that has no request in its own coroutines works for whoever awaits it. Where the awaiters lead to several
//! requests the answer is that it can't be told: no guesses.

use std::collections::HashSet;

use loopguard_common::records::{
    HOST_OBJECT, METHOD_OBJECT, PATH_OBJECT, REQUEST_ID_OBJECT, RequestSnapshot, TRACEPARENT_OBJECT,
};
use loopguard_common::walk::{Scratch, snapshot_scope};

use super::code::{Codes, RequestIn};
use super::offsets::{RunningLoop, StackTop};
use super::request_object::{Classes, Server};
use super::{Fault, Interpreter, PyThreadInfo};
use crate::runtime::memory::TargetMemory;

/// Awaiters of awaiters that are followed.
const MAX_HOPS: usize = 8;
/// Tasks and futures looked at for one answer.
const MAX_VISITED: usize = 64;
/// Coroutines in one chain of awaits.
const MAX_CHAIN: usize = 64;
/// Callbacks of a future that are looked at.
const MAX_CALLBACKS: u64 = 8;
/// Cells of a callback that are looked at.
const MAX_CELLS: usize = 16;
const MAX_NAME: usize = 256;
/// Values on a frame's stack; more is a sign of a wrong frame.
const MAX_STACK: u64 = 1 << 16;
/// Slots of a running frame's stack that are looked at; an awaited coroutine is near its bottom.
const MAX_RUNNING_STACK: u64 = 12;
/// `gi_frame_state` of a coroutine that runs (`pycore_frame.h`).
const FRAME_EXECUTING: u8 = 0;

/// First field of an object after its header: what a coroutine wrapper or an `asend` wraps, `PyModuleObject.md_dict`,
/// `PyRunningLoopHolder.rl_loop` (`Modules/_asynciomodule.c`).
const FIRST_FIELD: u64 = 16;
/// `FutureObj.fut_callback0` and `.fut_callbacks` (`Modules/_asynciomodule.c`).
const FUTURE_CALLBACK0: u64 = 24;
const FUTURE_CALLBACKS: u64 = 40;
/// `PyCFunctionObject.m_self`, `PyMethodObject.im_self`, `partialobject.args`: the second field after the header.
const SECOND_FIELD: u64 = 24;
/// `PyFunctionObject.func_closure` (`cpython/funcobject.h`).
const FUNCTION_CLOSURE: u64 = 72;
/// Words of an entry of a set: key and hash.
const SET_ENTRY: usize = 2;

/// An asyncio task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskFacts {
    /// Of the task object.
    pub address: u64,
    /// `Task.get_name()`.
    pub name: Option<String>,
    /// Qualified name of its coroutine.
    pub coroutine: Option<String>,
}

const NO_REQUEST: RequestSnapshot = RequestSnapshot {
    scope: 0,
    route: 0,
    client_port: 0,
    _pad: 0,
    path: [0; PATH_OBJECT],
    method: [0; METHOD_OBJECT],
    client_host: [0; HOST_OBJECT],
    request_id: [0; REQUEST_ID_OBJECT],
    traceparent: [0; TRACEPARENT_OBJECT],
};

/// Why something about a task can't be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotTold {
    Unreadable,
    SeveralRequests,
    TooManyAwaiters,
}

impl NotTold {
    /// For people, in a few words.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Unreadable => "its task could not be read",
            Self::SeveralRequests => "tasks of several requests await it",
            Self::TooManyAwaiters => "too many tasks await each other",
        }
    }
}

/// What is remembered of what frames were met.
#[derive(Debug, Default)]
pub(super) struct Met {
    pub codes: Codes,
    pub classes: Classes,
}

/// A request's object in a frame, by its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RequestAt {
    Scope(u64),
    Object(u64, Server),
}

impl RequestAt {
    pub fn address(self) -> u64 {
        match self {
            Self::Scope(address) | Self::Object(address, _) => address,
        }
    }
}

/// The request a task works for.
pub(super) enum RequestOfTask {
    Scope(Box<RequestSnapshot>),
    Object(u64, Server),
}

impl RequestOfTask {
    /// Of the scope or the object.
    pub fn address(&self) -> u64 {
        match self {
            Self::Scope(snapshot) => snapshot.scope,
            Self::Object(address, _) => *address,
        }
    }
}

impl Interpreter {
    /// Address of the task `thread` runs, `Ok(None)`: it runs none. `running` is what its thread state said (3.14 on).
    /// Before 3.14 it is what runs now, through the thread's running event loop.
    pub(super) fn current_task(&self, thread: &PyThreadInfo, running: u64) -> Result<Option<u64>, NotTold> {
        let task = if self.version.minor >= 14 {
            if !self.knows_asyncio() {
                return Err(NotTold::Unreadable);
            }
            running
        } else {
            self.task_of_running_loop(thread).map_err(|_| NotTold::Unreadable)?.unwrap_or(0)
        };
        match task {
            0 => Ok(None),
            task if self.is_task(task) => Ok(Some(task)),
            _ => Err(NotTold::Unreadable),
        }
    }

    /// `_current_tasks[running loop]`, as `asyncio.current_task()` finds it, for one thread of several.
    fn task_of_running_loop(&self, thread: &PyThreadInfo) -> Result<Option<u64>, Fault> {
        let running = self.running_loop(thread)?;
        if running == 0 {
            return Ok(None);
        }
        let Some(tasks) = self.current_tasks(thread.interpreter)? else { return Ok(None) };
        Ok(self.dict_entries(tasks)?.into_iter().find(|(key, _)| *key == running).map(|(_, task)| task))
    }

    /// The event loop that a thread runs, 0: none.
    pub(super) fn running_loop(&self, thread: &PyThreadInfo) -> Result<u64, Fault> {
        match self.offsets.running_loop {
            RunningLoop::InThread(offset) => self.memory.field(thread.state, offset),
            RunningLoop::InDict(offset) => {
                let locals = self.memory.field(thread.state, offset)?;
                if locals == 0 {
                    return Ok(0);
                }
                let Some(holder) = self.dict_get(locals, "__asyncio_running_event_loop__")? else { return Ok(0) };
                // 3.12 keeps the loop itself there.
                if self.type_name(holder)? == "_RunningLoopHolder" {
                    self.memory.field(holder, FIRST_FIELD)
                } else {
                    Ok(holder)
                }
            }
        }
    }

    /// A global of the module `asyncio.tasks`.
    pub(super) fn asyncio_tasks_global(&self, interpreter: u64, name: &str) -> Result<Option<u64>, Fault> {
        let modules = self.memory.field(interpreter, self.offsets.modules)?;
        let Some(module) = self.dict_get(modules, "asyncio.tasks")? else { return Ok(None) };
        self.dict_get(self.memory.field(module, FIRST_FIELD)?, name)
    }

    fn current_tasks(&self, interpreter: u64) -> Result<Option<u64>, Fault> {
        if let Some(tasks) = self.current_tasks.get() {
            return Ok(Some(*tasks));
        }
        let Some(tasks) = self.asyncio_tasks_global(interpreter, "_current_tasks")? else { return Ok(None) };
        if self.type_of(tasks)? != self.anchors.dict_type {
            return Ok(None);
        }
        Ok(Some(*self.current_tasks.get_or_init(|| tasks)))
    }

    pub(super) fn task_facts(&self, task: u64) -> TaskFacts {
        let name = match self.task_number(task) {
            Some(number) => Ok(format!("Task-{number}")),
            None => self.memory.field(task, self.task_name_offset()).and_then(|name| self.str(name, MAX_NAME)),
        };
        let coroutine = self
            .task_coroutine(task)
            .and_then(|coroutine| self.memory.field(coroutine, self.offsets.generator_qualname))
            .and_then(|name| self.str(name, MAX_NAME));
        TaskFacts { address: task, name: name.ok(), coroutine: coroutine.ok() }
    }

    /// What a task that nobody named is counted as: such tasks get their name, from 3.12 on, when somebody asks for it.
    pub(super) fn task_number(&self, task: u64) -> Option<u32> {
        let name = self.memory.field(task, self.task_name_offset()).ok()?;
        let is_number = name != 0 && self.type_name(name).is_ok_and(|name| name == "int");
        is_number.then(|| self.memory.u32(name.wrapping_add(self.offsets.layout.long_digit.into())).ok())?
    }

    fn task_name_offset(&self) -> u64 {
        self.asyncio.get().map_or(self.offsets.task_name, |asyncio| asyncio.task_name)
    }

    pub(super) fn task_coroutine(&self, task: u64) -> Result<u64, Fault> {
        self.memory.field(task, self.asyncio.get().map_or(self.offsets.task_coro, |asyncio| asyncio.task_coro))
    }

    pub(super) fn is_task(&self, object: u64) -> bool {
        self.type_name(object).is_ok_and(|name| name.ends_with("Task"))
    }

    fn is_future(&self, object: u64) -> bool {
        object != 0 && self.type_name(object).is_ok_and(|name| name.ends_with("Future") || name.ends_with("Task"))
    }

    /// The request a task works for: by what stands in its own coroutines, else by those that await it. `Ok(None)`: it
    /// works for none.
    pub(super) fn request_of_task(&self, met: &mut Met, task: u64) -> Result<Option<RequestOfTask>, NotTold> {
        if self.task_coroutine(task).is_err() {
            return Err(NotTold::Unreadable);
        }
        let mut visited = HashSet::from([task]);
        let mut hop = vec![task];
        let mut found: Option<RequestOfTask> = None;
        for _ in 0..=MAX_HOPS {
            let mut awaiters = Vec::new();
            for object in std::mem::take(&mut hop) {
                let request = if self.is_task(object) { self.request_in_coroutines(met, object) } else { None };
                match (request, &found) {
                    (Some(request), Some(other)) if request.address() != other.address() => {
                        return Err(NotTold::SeveralRequests);
                    }
                    (Some(request), _) => found = Some(request),
                    (None, _) => awaiters.extend(self.awaiters(object)),
                }
            }
            awaiters.retain(|awaiter| visited.insert(*awaiter));
            if visited.len() > MAX_VISITED {
                return Err(NotTold::TooManyAwaiters);
            }
            hop = awaiters;
        }
        Ok(found)
    }

    /// The outermost request in a task's coroutines; of a scope with the first route there is.
    pub(super) fn request_in_coroutines(&self, met: &mut Met, task: u64) -> Option<RequestOfTask> {
        let mut found: Option<Box<RequestSnapshot>> = None;
        for frame in self.coroutine_frames(self.task_coroutine(task).ok()?) {
            let scope = match self.request_in_frame(met, frame) {
                Ok(Some(RequestAt::Scope(scope))) => scope,
                Ok(Some(RequestAt::Object(address, server))) if found.is_none() => {
                    return Some(RequestOfTask::Object(address, server));
                }
                _ => continue,
            };
            let (mut scratch, mut snapshot) = (Scratch::default(), NO_REQUEST);
            if !snapshot_scope(&self.memory, &self.offsets.layout, scope, &mut scratch, &mut snapshot) {
                continue;
            }
            let request = found.get_or_insert_with(|| Box::new(snapshot));
            if request.route == 0 {
                request.route = snapshot.route;
            }
            if request.route != 0 {
                break;
            }
        }
        found.map(RequestOfTask::Scope)
    }

    pub(super) fn request_in_frame(&self, met: &mut Met, frame: u64) -> Result<Option<RequestAt>, Fault> {
        let layout = &self.offsets.layout;
        // Stack references carry tags in their low bits.
        let code = self.memory.field(frame, layout.frame_executable)? & !3;
        let request = met.codes.code(self, code, None)?.request;
        let slot = match request {
            RequestIn::Nowhere => return Ok(None),
            RequestIn::Scope(slot) | RequestIn::Object(slot) => slot,
            RequestIn::ScopeOfSelf | RequestIn::ObjectOfSelf => 0,
        };
        let local = self.memory.field(frame, u64::from(layout.frame_locals) + slot * 8)? & !3;
        let Some(local) = self.behind_cell(local)? else { return Ok(None) };
        let object = match request {
            RequestIn::ScopeOfSelf => self.attribute(local, "scope")?,
            RequestIn::ObjectOfSelf => self.attribute(local, "request")?,
            _ => Some(local),
        };
        let Some(object) = object else { return Ok(None) };
        match request {
            RequestIn::Object(_) | RequestIn::ObjectOfSelf => {
                Ok(met.classes.server_of(self, object)?.map(|server| RequestAt::Object(object, server)))
            }
            _ => Ok((self.type_of(object)? == self.anchors.dict_type).then_some(RequestAt::Scope(object))),
        }
    }

    /// The interpreter frames of a chain of coroutines that await each other, outermost first.
    fn coroutine_frames(&self, coroutine: u64) -> impl Iterator<Item = u64> {
        let mut next = Some(coroutine);
        let mut last = None;
        let mut left = MAX_CHAIN;
        std::iter::from_fn(move || {
            // Not before somebody asks: often the outermost frame is enough.
            if let Some(frame) = last.take() {
                next = self.awaited_in_frame(frame);
            }
            while let Some(coroutine) = next.take().filter(|_| left > 0) {
                left -= 1;
                match self.type_name(coroutine).as_deref() {
                    Ok("coroutine" | "generator" | "async_generator") => {
                        last = Some(coroutine.wrapping_add(self.offsets.generator_frame));
                        return last;
                    }
                    Ok("coroutine_wrapper" | "async_generator_asend" | "async_generator_athrow") => {
                        next = self.memory.field(coroutine, FIRST_FIELD).ok();
                    }
                    _ => {}
                }
            }
            None
        })
    }

    /// The frame of a coroutine itself.
    pub(super) fn first_coroutine_frame(&self, coroutine: u64) -> Option<u64> {
        self.coroutine_frames(coroutine).next()
    }

    /// What a frame waits for: the top of its stack.
    fn awaited_in_frame(&self, frame: u64) -> Option<u64> {
        let stack = self.memory.field(frame, self.offsets.frame_stack).ok()?;
        let locals = frame.wrapping_add(self.offsets.layout.frame_locals.into());
        let top = match self.offsets.stack {
            StackTop::Index => match u64::from(stack as u32) {
                values @ 1..MAX_STACK => locals.wrapping_add((values - 1) * 8),
                // It runs, and does not say how deep its stack is.
                _ => return self.executing_on_stack(frame).ok()?,
            },
            StackTop::Pointer => {
                let in_frame = stack.checked_sub(locals).is_some_and(|size| (8..MAX_STACK).contains(&size));
                in_frame.then_some(stack.wrapping_sub(8))?
            }
        };
        // Stack references carry tags in their low bits. 3.15 keeps an empty slot above the awaited object.
        let value = |slot: u64| self.memory.u64(slot).map_or(0, |value| value & !3);
        match value(top) {
            0 if top > locals => Some(value(top.wrapping_sub(8))),
            value => Some(value),
        }
        .filter(|&value| value != 0)
    }

    /// The one coroutine on a running frame's stack that runs as well: what the frame awaits. The stack's end is not
    /// known, and above it lie values of before, but none of those runs.
    fn executing_on_stack(&self, frame: u64) -> Result<Option<u64>, Fault> {
        let layout = &self.offsets.layout;
        let code = self.memory.field(frame, layout.frame_executable)? & !3;
        let locals = self.memory.u32(code.wrapping_add(self.offsets.code_nlocalsplus))?;
        let stack = frame.wrapping_add(u64::from(layout.frame_locals) + u64::from(locals) * 8);
        let mut found = None;
        for slot in 0..MAX_RUNNING_STACK {
            let Ok(value) = self.memory.field(stack, slot * 8) else { break };
            if value == 0 || found == Some(value) || self.type_name(value).as_deref() != Ok("coroutine") {
                continue;
            }
            if self.memory.u8(value.wrapping_add(self.offsets.generator_state)) == Ok(FRAME_EXECUTING) {
                if found.is_some() {
                    return Ok(None);
                }
                found = Some(value);
            }
        }
        Ok(found)
    }

    /// The tasks and futures that await this one.
    fn awaiters(&self, future: u64) -> Vec<u64> {
        let described = self.described_awaiters(future).unwrap_or_default();
        if !described.is_empty() {
            return described;
        }
        let callbacks = self.callbacks(future).unwrap_or_default();
        callbacks.into_iter().flat_map(|callback| self.awaiters_behind(future, callback).unwrap_or_default()).collect()
    }

    /// 3.14 on: a future knows who awaits it, one object or a set of them.
    fn described_awaiters(&self, future: u64) -> Result<Vec<u64>, Fault> {
        let Some(asyncio) = self.asyncio.get() else { return Ok(Vec::new()) };
        let awaited_by = self.memory.field(future, asyncio.task_awaited_by)?;
        if awaited_by == 0 {
            return Ok(Vec::new());
        }
        let mut awaiters = vec![awaited_by];
        if self.memory.u8(future.wrapping_add(asyncio.task_awaited_by_is_set))? != 0 {
            let slots = self.memory.field(awaited_by, self.offsets.set_mask)?.saturating_add(1).min(1024) as usize;
            let table = self.memory.field(awaited_by, self.offsets.set_table)?;
            let entries = self.memory.words(table, slots * SET_ENTRY)?;
            awaiters = entries.as_chunks::<SET_ENTRY>().0.iter().map(|entry| entry[0]).collect();
        }
        awaiters.retain(|&awaiter| self.is_future(awaiter));
        Ok(awaiters)
    }

    fn callbacks(&self, future: u64) -> Result<Vec<u64>, Fault> {
        let mut callbacks = vec![self.memory.field(future, FUTURE_CALLBACK0)?];
        let more = self.memory.field(future, FUTURE_CALLBACKS)?;
        if more != 0 && self.type_name(more)? == "list" {
            let count = self.memory.field(more, self.offsets.layout.var_size)?.min(MAX_CALLBACKS);
            let items = self.memory.field(more, self.offsets.layout.list_items)?;
            for pair in self.memory.words(items, count as usize)? {
                // A callback and its context.
                callbacks.extend(self.tuple(pair, 1)?);
            }
        }
        callbacks.retain(|&callback| callback != 0);
        Ok(callbacks)
    }

    /// The tasks or futures that a done callback of `future` wakes.
    fn awaiters_behind(&self, future: u64, callback: u64) -> Result<Vec<u64>, Fault> {
        let second = || self.memory.field(callback, SECOND_FIELD);
        let mut awaiters = match self.type_name(callback)?.as_str() {
            // `task_wakeup` of the awaiting task.
            "builtin_function_or_method" => vec![second()?],
            // `TaskGroup._on_task_done`, or the wake-up of a task written in Python.
            "method" => match second()? {
                owner if self.is_task(owner) => vec![owner],
                owner => self.attribute(owner, "_parent_task")?.into_iter().collect(),
            },
            // The inner functions of `gather`, `wait` and `shield`, which keep the outer future in a cell.
            "function" => self.futures_in_closure(callback)?,
            // `wait_for` before 3.12.
            "partial" => self.tuple(second()?, 1)?,
            _ => Vec::new(),
        };
        awaiters.retain(|&awaiter| awaiter != future && self.is_future(awaiter));
        Ok(awaiters)
    }

    fn futures_in_closure(&self, function: u64) -> Result<Vec<u64>, Fault> {
        let closure = self.memory.field(function, FUNCTION_CLOSURE)?;
        if closure == 0 || self.type_name(closure)? != "tuple" {
            return Ok(Vec::new());
        }
        let mut found = Vec::new();
        for cell in self.tuple(closure, MAX_CELLS)? {
            let value = self.cell(cell);
            if value == 0 {
                continue;
            }
            match self.type_name(value)?.as_str() {
                // anyio's: the task that opened its cancel scope.
                "TaskGroup" => {
                    if let Some(scope) = self.attribute(value, "cancel_scope")? {
                        found.extend(self.attribute(scope, "_host_task")?);
                    }
                }
                name if name.ends_with("Future") => found.push(value),
                _ => {}
            }
        }
        Ok(found)
    }
}
