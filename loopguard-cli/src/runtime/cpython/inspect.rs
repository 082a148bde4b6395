//! Turns what the kernel captured in one process into stacks, requests and tasks, remembering what it resolved.

use std::sync::Arc;
use std::time::Instant;

use loopguard_common::records::{FRAME_ENTRY, FRAME_SHIM, RawFrame, RequestSnapshot, WalkStatus};

use super::code::Codes;
use super::in_flight::{Known, KnownTasks};
use super::request::Routes;
use super::task::{Met, RequestOfTask};
use super::{Fault, Interpreter, NotTold, PyThreadInfo, TaskFacts};
use crate::core::event::{Frame, RequestFacts, Stack};
use crate::runtime::memory::Usual;
use crate::symbol::join::PythonRun;

/// Resolves the captures of one process; its caches are bounded.
#[derive(Debug)]
pub struct Inspector {
    interpreter: Arc<Interpreter>,
    met: Met,
    routes: Routes,
    tasks: KnownTasks,
    has_seen_request: bool,
    /// The capture last asked about: it is asked for its stack and for its runs, and a busy route blocks at one place.
    last: Option<Walked>,
}

/// Frames as the kernel saw them, and what they are.
#[derive(Debug)]
struct Walked {
    raw: Vec<RawFrame>,
    /// `None`: an entry shim.
    frames: Vec<Option<Arc<Frame>>>,
}

impl Inspector {
    pub fn new(interpreter: Arc<Interpreter>) -> Self {
        Self {
            interpreter,
            met: Met::default(),
            routes: Routes::default(),
            tasks: KnownTasks::default(),
            has_seen_request: false,
            last: None,
        }
    }

    pub fn interpreter(&self) -> &Arc<Interpreter> {
        &self.interpreter
    }

    /// What each frame of a capture is.
    fn walked(&mut self, raw: &[RawFrame]) -> &[Option<Arc<Frame>>] {
        if self.last.as_ref().is_none_or(|last| last.raw != raw || !last.is_known(&self.met.codes)) {
            let frames = raw.iter().map(|raw| self.met.codes.frame(&self.interpreter, raw)).collect();
            self.last = Some(Walked { raw: raw.to_vec(), frames });
        }
        self.last.as_ref().map_or(&[], |last| &last.frames)
    }

    /// The Python frames of a capture, innermost first, without entry shims. A frame whose code object is gone by now
    /// is `<unknown>`.
    pub fn stack(&mut self, frames: &[RawFrame], walk: WalkStatus) -> Stack {
        let frames = self.walked(frames).iter().flatten().cloned().collect();
        Stack { frames, incomplete: incomplete(walk) }
    }

    /// The same frames, by the native call of the evaluation loop that runs them.
    pub fn runs(&mut self, frames: &[RawFrame]) -> Vec<PythonRun> {
        let mut runs = Vec::new();
        let mut run = PythonRun::default();
        for (raw, frame) in frames.iter().zip(self.walked(frames)) {
            run.frames.extend(frame.clone());
            let is_shim = raw.code & FRAME_SHIM != 0;
            if is_shim || raw.code & FRAME_ENTRY != 0 {
                run.entry = is_shim.then_some(raw.instr);
                runs.push(std::mem::take(&mut run));
            }
        }
        if !run.frames.is_empty() {
            runs.push(run);
        }
        // At the outer end of a thread stands a shim that ran no Python code.
        runs.retain(|run| !run.frames.is_empty());
        runs
    }

    /// The request whose scope stood in the frames; `None`: there was none. Reads the target for the route only.
    pub fn request(&mut self, snapshot: &RequestSnapshot) -> Option<RequestFacts> {
        let request = self.routes.request(&self.interpreter, snapshot);
        self.has_seen_request |= request.is_some();
        request
    }

    /// Whether any request of the process was ever read. As long as none was, its server may be one of those whose
    /// requests nobody here knows how to read.
    pub fn has_seen_request(&self) -> bool {
        self.has_seen_request
    }

    /// The asyncio task that a thread runs; `Ok(None)`: it runs none.
    ///
    /// `running_task` is what the capture says (3.14 on). Before 3.14 that is 0 and the target is read, so the answer
    /// belongs to the capture only as long as the step it was taken in still runs.
    pub fn current_task(&mut self, thread: &PyThreadInfo, running_task: u64) -> Result<Option<TaskFacts>, NotTold> {
        let _glance = self.interpreter.memory.glance();
        let task = self.interpreter.current_task(thread, running_task)?;
        Ok(task.map(|task| self.interpreter.task_facts(task)))
    }

    /// The requests that have a task on the event loop a thread runs, each once; and how many tasks could not be read.
    ///
    /// `running`: the scope of the step that runs, and its request, which need not be read once more.
    pub fn requests_in_flight(
        &mut self,
        thread: &PyThreadInfo,
        running: Option<(u64, &RequestFacts)>,
    ) -> Result<(Vec<RequestFacts>, u32), NotTold> {
        let interpreter = self.interpreter.clone();
        let usual = if self.tasks.begin(Instant::now()) { Usual::Thorough } else { Usual::Brief };
        let _glance = interpreter.memory.usual_glance(usual);
        let seen = self.interpreter.tasks_of_loop(thread).map_err(|_| NotTold::Unreadable)?;
        let mut unread = seen.unread;
        let mut requests: Vec<RequestFacts> = Vec::new();
        for task in seen.tasks {
            match self.request_in_task(task, running) {
                Ok(Some(request)) if requests.iter().any(|known| known.is_same(&request)) => {}
                Ok(Some(request)) => requests.push(request),
                Ok(None) => {}
                Err(_) => unread += 1,
            }
        }
        self.tasks.sweep();
        Ok((requests, unread))
    }

    fn request_in_task(
        &mut self,
        task: u64,
        running: Option<(u64, &RequestFacts)>,
    ) -> Result<Option<RequestFacts>, Fault> {
        let identity = self.interpreter.task_identity(task);
        let known = self.tasks.get(task, identity);
        if let Known::NoRequest = known {
            return Ok(None);
        }
        let outermost = self.interpreter.outermost_request(&mut self.met, task);
        match (known, running) {
            (_, Some((of, request))) if outermost == Some(of) => return Ok(Some(request.clone())),
            (Known::Request(of, request), _) if outermost == Some(of) => return Ok(Some(request.clone())),
            _ => {}
        }
        let Some(found) = self.interpreter.request_in_task(&mut self.met, task)? else {
            if let Some(identity) = identity {
                self.tasks.is_no_request(task, identity);
            }
            return Ok(None);
        };
        let request = self.found(&found)?;
        // Its route may still come.
        if let Some(identity) = identity.filter(|_| outermost == Some(found.address()) && request.route.is_some()) {
            self.tasks.is_request(task, identity, (found.address(), &request));
        }
        Ok(Some(request))
    }

    /// The request that a live task works for, by its own coroutines or by those that await it; `Ok(None)`: none.
    pub fn request_of_task(&mut self, task: u64) -> Result<Option<RequestFacts>, NotTold> {
        let interpreter = self.interpreter.clone();
        let _glance = interpreter.memory.glance();
        match self.interpreter.request_of_task(&mut self.met, task)? {
            Some(found) => self.found(&found).map(Some).map_err(|_| NotTold::Unreadable),
            None => Ok(None),
        }
    }

    fn found(&mut self, found: &RequestOfTask) -> Result<RequestFacts, Fault> {
        match found {
            RequestOfTask::Scope(snapshot) => {
                self.request(snapshot).ok_or(Fault::Unexpected { address: snapshot.scope, expected: "a request" })
            }
            RequestOfTask::Object(address, server) => {
                let request = self.routes.request_of_object(&self.interpreter, *address, *server)?;
                self.has_seen_request = true;
                Ok(request)
            }
        }
    }
}

impl Walked {
    /// What could not be told may be told the next time.
    fn is_known(&self, codes: &Codes) -> bool {
        !self.frames.iter().flatten().any(|frame| codes.is_unknown(frame))
    }
}

/// Why the outermost frames are missing, if they are.
pub fn incomplete(walk: WalkStatus) -> Option<&'static str> {
    match walk {
        WalkStatus::Complete => None,
        WalkStatus::None => Some("there was no interpreter to walk"),
        WalkStatus::TooDeep => Some("the stack is deeper than loopguard walks"),
        WalkStatus::Unreadable => Some("a frame could not be read"),
        WalkStatus::NotThisThread => Some("the thread had ended"),
    }
}
