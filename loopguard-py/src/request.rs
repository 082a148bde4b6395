//! One request, from its scope to its end: runs the application's coroutine, fires the request's probes around every
//! step, and adds up how often and how long it blocked its loop.

use std::borrow::Cow;
use std::cell::Cell;
use std::ptr::NonNull;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use pyo3::exceptions::{PyException, PyRuntimeError, PyStopIteration};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyString, PyTuple};
use pyo3::{ffi, intern};

use crate::clock::{milliseconds, now_ns};
use crate::coroutine::Coroutine;
use crate::headers::Names;
use crate::probe;

const SWITCHING_PROTOCOLS: u64 = 101;
/// A server answers a websocket so that the application closes before it has accepted it.
const FORBIDDEN: u64 = 403;
/// A server answers so when an application raises before it has begun to answer.
const INTERNAL_SERVER_ERROR: u64 = 500;

thread_local! {
    /// The request whose code this thread runs: a `Request` that `Request::run` keeps alive.
    static CURRENT: Cell<Option<NonNull<ffi::PyObject>>> = const { Cell::new(None) };
}

/// The request whose code this thread runs.
pub fn current(py: Python<'_>) -> Option<Bound<'_, Request>> {
    CURRENT.with(|slot| in_slot(py, slot))
}

#[inline(always)]
fn in_slot<'py>(py: Python<'py>, slot: &Cell<Option<NonNull<ffi::PyObject>>>) -> Option<Bound<'py, Request>> {
    // SAFETY: a live object of that type, see `CURRENT`.
    slot.get().map(|current| unsafe { Bound::from_borrowed_ptr(py, current.as_ptr()).cast_into_unchecked() })
}

/// The request that the calling code belongs to. None: it belongs to none, or its thread is not the event loop's.
#[pyfunction]
pub fn current_request(py: Python<'_>) -> Option<Bound<'_, Request>> {
    current(py).filter(|request| request.get().told != Told::Silent)
}

/// What its probes say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// All there is to say, because somebody listened when it began.
    Fully,
    /// Only its steps and its end: who comes later could not know more.
    Briefly,
    /// Nothing: it is no request but a test that is watched.
    Silent,
}

impl Told {
    /// Of a request that begins now.
    pub fn to_whom_it_may_concern() -> Self {
        if probe::is_traced() { Self::Fully } else { Self::Briefly }
    }
}

/// What counts as a block, and who wants to know: it is called with the request and the block's start and end.
pub struct Rule {
    pub threshold_ns: u64,
    pub on_block: Option<Py<PyAny>>,
}

/// An awaitable: awaiting it runs the application. All fields are used under the GIL; that they are atomic is for the
/// compiler, and for threads that look on.
#[pyclass(frozen, module = "loopguard_emit._native")]
pub struct Request {
    /// As the probes tell it; unique in this process.
    #[pyo3(get)]
    id: u64,
    told: Told,
    rule: Rule,
    /// What the server called us with: scope, receive and send.
    arguments: Option<Py<PyTuple>>,
    /// The application's, where it was there before the request.
    coroutine: Option<Coroutine>,
    /// Where it was made to send through the request.
    later: OnceLock<Coroutine>,
    name: OnceLock<Option<Py<PyBytes>>>,
    status: AtomicU64,
    routed: AtomicBool,
    ended: AtomicBool,
    /// 0: none of its code runs.
    running_since_ns: AtomicU64,
    blocks: AtomicU64,
    blocked_ns: AtomicU64,
}

impl Request {
    /// `arguments`: scope, a dict; receive; send.
    pub fn new(told: Told, arguments: Bound<'_, PyTuple>, rule: Rule) -> Self {
        Self::made(told, rule, Some(arguments.unbind()), None)
    }

    /// One of which only its steps and its end are told: then nothing has to know it before its application does.
    pub fn running(arguments: Bound<'_, PyTuple>, rule: Rule, application: Coroutine) -> Self {
        Self::made(Told::Briefly, rule, Some(arguments.unbind()), Some(application))
    }

    fn made(told: Told, rule: Rule, arguments: Option<Py<PyTuple>>, coroutine: Option<Coroutine>) -> Self {
        Self {
            id: loopguard_emit::next_id(),
            told,
            rule,
            arguments,
            coroutine,
            later: OnceLock::new(),
            name: OnceLock::new(),
            status: AtomicU64::new(loopguard_emit::NO_RESPONSE),
            routed: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            running_since_ns: AtomicU64::new(0),
            blocks: AtomicU64::new(0),
            blocked_ns: AtomicU64::new(0),
        }
    }

    /// What it is called, where that is not what its headers say.
    pub fn call_it(&self, name: Bound<'_, PyBytes>) {
        // Names are given once.
        let _ = self.name.set(Some(name.unbind()));
    }

    /// What it does when it is awaited.
    pub fn is_to_run(&self, py: Python<'_>, application: Coroutine) {
        let _ = self.later.set(application);
        if self.told == Told::Fully {
            self.tell_start(py);
        }
    }

    fn tell_start(&self, py: Python<'_>) {
        let Some(scope) = &self.scope_in(py) else { return };
        let (method, path) = (item(scope, intern!(py, "method")), item(scope, intern!(py, "path")));
        let (method, path) = (method.as_ref().and_then(text), path.as_ref().and_then(text));
        let kind = item(scope, intern!(py, "type"));
        // A websocket's scope has no method.
        let no_method = if kind.as_ref().and_then(text).as_deref() == Some(b"websocket") { "WEBSOCKET" } else { "" };
        let method = method.as_deref().unwrap_or(no_method.as_bytes());
        let name = self.name(py).map_or(&[][..], |name| name.as_bytes());
        probe::start(self.id, method, path.as_deref().unwrap_or_default(), name);
    }

    fn scope_in<'a, 'py: 'a>(&'a self, py: Python<'py>) -> Option<Borrowed<'a, 'py, PyDict>> {
        self.arguments.as_ref()?.bind(py).get_borrowed_item(0).ok()?.cast().ok()
    }

    fn application(&self) -> Option<&Coroutine> {
        self.coroutine.as_ref().or_else(|| self.later.get())
    }

    pub fn is_over(&self) -> bool {
        self.ended.load(Relaxed)
    }

    /// Whether it is the one of these headers: copies of a scope share them.
    pub fn has(&self, headers: &Bound<'_, PyAny>) -> bool {
        let py = headers.py();
        let own = self.scope_in(py).and_then(|scope| item(&scope, intern!(py, "headers")));
        own.is_some_and(|own| own.is(headers))
    }

    /// Runs some code of this request. Inside another step of the same request this is a part of that; inside one of
    /// another request, that one is interrupted. A test that is watched is not: it waits for what it calls.
    pub fn run<T>(slf: &Bound<'_, Self>, code: impl FnOnce() -> PyResult<T>) -> PyResult<T> {
        CURRENT.with(|slot| Self::run_as(slf, slot, code))
    }

    /// The thread's current request is found once: in a library that costs a call each time.
    #[inline(always)]
    fn run_as<T>(
        slf: &Bound<'_, Self>,
        slot: &Cell<Option<NonNull<ffi::PyObject>>>,
        code: impl FnOnce() -> PyResult<T>,
    ) -> PyResult<T> {
        let request = slf.get();
        let outer = in_slot(slf.py(), slot);
        if request.is_over() || outer.as_ref().is_some_and(|outer| outer.is(slf)) {
            return code();
        }
        let outer = outer.filter(|outer| outer.get().told != Told::Silent);
        let since = now_ns();
        if let Some(outer) = &outer {
            Self::exit(outer, since);
        }
        request.enter(since);
        let below = slot.replace(NonNull::new(slf.as_ptr()));
        let result = code();
        slot.set(below);
        let until = now_ns();
        Self::exit(slf, until);
        if let Some(outer) = &outer {
            outer.get().enter(until);
        }
        result
    }

    fn enter(&self, now: u64) {
        self.running_since_ns.store(now, Relaxed);
        if self.told != Told::Silent {
            probe::enter(self.id);
        }
    }

    /// `now`: until when it ran. That a block is told of is still the request's own time to tracers: the loop waits.
    fn exit(slf: &Bound<'_, Self>, now: u64) {
        let (py, request) = (slf.py(), slf.get());
        let since = request.running_since_ns.load(Relaxed);
        request.running_since_ns.store(0, Relaxed);
        let ns = now.saturating_sub(since);
        if ns >= request.rule.threshold_ns {
            request.note_block(slf, since, now);
        }
        if request.told != Told::Silent {
            request.tell_route(py);
            probe::exit(request.id);
        }
    }

    #[cold]
    fn note_block(&self, slf: &Bound<'_, Self>, since: u64, until: u64) {
        self.blocks.fetch_add(1, Relaxed);
        self.blocked_ns.fetch_add(until.saturating_sub(since), Relaxed);
        if let Some(on_block) = &self.rule.on_block
            && let Err(error) = on_block.call1(slf.py(), (slf, since, until))
        {
            error.write_unraisable(slf.py(), None);
        }
    }

    /// The first time that it is known.
    fn tell_route(&self, py: Python<'_>) {
        if self.told != Told::Fully || self.routed.load(Relaxed) {
            return;
        }
        if let Some(template) = self.template(py)
            && let Some(template) = text(template.as_any())
        {
            self.routed.store(true, Relaxed);
            probe::route(self.id, &template);
        }
    }

    /// As Starlette and FastAPI tell it, or as Litestar does.
    fn template<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyString>> {
        let scope = self.scope_in(py)?;
        match item(&scope, intern!(py, "route")) {
            Some(route) => route.getattr(intern!(py, "path")).ok()?.cast_into().ok(),
            None => item(&scope, intern!(py, "path_template"))?.cast_into().ok(),
        }
    }

    /// One of the application's own steps: after the last, the request is over.
    fn drive<T>(slf: &Bound<'_, Self>, code: impl FnOnce(&Coroutine) -> PyResult<T>) -> PyResult<T> {
        let (py, request) = (slf.py(), slf.get());
        let coroutine = request.application().ok_or_else(|| PyRuntimeError::new_err("there is nothing to run"))?;
        let result = Self::run(slf, || code(coroutine));
        if let Err(error) = &result {
            request.note_error(py, error);
            request.finish();
        }
        result
    }

    /// Its code has raised.
    fn note_error(&self, py: Python<'_>, error: &PyErr) {
        let unanswered = self.status.load(Relaxed) == loopguard_emit::NO_RESPONSE;
        if unanswered && error.is_instance_of::<PyException>(py) && !error.is_instance_of::<PyStopIteration>(py) {
            self.status.store(INTERNAL_SERVER_ERROR, Relaxed);
        }
    }

    fn finish(&self) {
        if !self.is_over() {
            self.ended.store(true, Relaxed);
            if self.told != Told::Silent {
                probe::end(self.id, self.status.load(Relaxed));
            }
        }
    }

    /// What a message of the application says about its response.
    fn note_status(&self, message: &Bound<'_, PyAny>) {
        let py = message.py();
        let Ok(message) = message.cast::<PyDict>() else { return };
        let Some(kind) = item(message, intern!(py, "type")) else { return };
        let status = match text(&kind).as_deref() {
            Some(b"http.response.start" | b"websocket.http.response.start") => {
                item(message, intern!(py, "status")).and_then(|status| status.extract().ok())
            }
            Some(b"websocket.accept") => Some(SWITCHING_PROTOCOLS),
            Some(b"websocket.close") => Some(FORBIDDEN),
            _ => None,
        };
        if let Some(status) = status {
            self.status.store(status, Relaxed);
        }
    }

    /// How long the step that runs now has been a block.
    fn block_so_far_ns(&self) -> Option<u64> {
        let since = self.running_since_ns.load(Relaxed);
        let ns = now_ns().saturating_sub(since);
        (since != 0 && ns >= self.rule.threshold_ns).then_some(ns)
    }

    fn attribute<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
        match self.application() {
            Some(coroutine) => coroutine.attribute(py, name),
            None => Ok(py.None().into_bound(py)),
        }
    }
}

#[pymethods]
impl Request {
    /// No request but something else that is run and watched: it fires no probes.
    #[staticmethod]
    fn watch(awaitable: Bound<'_, PyAny>, threshold_ns: u64, on_block: Py<PyAny>) -> PyResult<Self> {
        let rule = Rule { threshold_ns, on_block: Some(on_block) };
        Ok(Self::made(Told::Silent, rule, None, Some(Coroutine::of(awaitable)?)))
    }

    fn __await__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __iter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __next__(slf: &Bound<'_, Self>) -> PyResult<Option<Py<PyAny>>> {
        let py = slf.py();
        let next = Self::drive(slf, |coroutine| coroutine.send(py.None().bind(py))?.or_stop(py))?;
        if next.is_none() {
            slf.get().finish();
        }
        Ok(next)
    }

    fn send(slf: &Bound<'_, Self>, value: &Bound<'_, PyAny>) -> PyResult<Py<PyAny>> {
        Self::drive(slf, |coroutine| coroutine.send(value)?.or_raise())
    }

    #[pyo3(signature = (*exception))]
    fn throw<'py>(slf: &Bound<'py, Self>, exception: &Bound<'py, PyTuple>) -> PyResult<Bound<'py, PyAny>> {
        Self::drive(slf, |coroutine| coroutine.throw(exception))
    }

    fn close<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let closed = Self::drive(slf, |coroutine| coroutine.close(slf.py()))?;
        slf.get().finish();
        Ok(closed)
    }

    // With these, asyncio and debuggers look through to the coroutine.

    #[getter]
    fn cr_await<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.attribute(py, "cr_await")
    }

    #[getter]
    fn cr_code<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.attribute(py, "cr_code")
    }

    #[getter]
    fn cr_frame<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.attribute(py, "cr_frame")
    }

    #[getter]
    fn cr_running<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.attribute(py, "cr_running")
    }

    /// Sends a message to the server, after a look at what it says of the response.
    fn respond<'py>(&self, message: Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let py = message.py();
        if self.status.load(Relaxed) == loopguard_emit::NO_RESPONSE {
            self.note_status(&message);
        }
        let arguments = self.arguments.as_ref().ok_or_else(|| PyRuntimeError::new_err("nobody to send it to"))?;
        arguments.bind(py).get_borrowed_item(2)?.call1((message,))
    }

    #[getter]
    fn over(&self) -> bool {
        self.is_over()
    }

    #[getter]
    fn scope<'a, 'py: 'a>(&'a self, py: Python<'py>) -> Option<Borrowed<'a, 'py, PyDict>> {
        self.scope_in(py)
    }

    /// What its client or a proxy calls it, or else what the response's `x-request-id` will call it.
    #[getter]
    fn name<'py>(&self, py: Python<'py>) -> Option<&Bound<'py, PyBytes>> {
        let name = self.name.get_or_init(|| {
            let headers = item(&*self.scope_in(py)?, intern!(py, "headers"))?;
            let names = Names::find(&headers);
            names.request_id.or(names.traceparent).map(Bound::unbind)
        });
        name.as_ref().map(|name| name.bind(py))
    }

    #[getter]
    fn route<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyString>> {
        self.template(py)
    }

    /// How many of its steps blocked the loop, that which runs now among them, and the milliseconds they took.
    fn blocking(&self) -> (u64, f64) {
        let now = self.block_so_far_ns();
        let count = self.blocks.load(Relaxed) + u64::from(now.is_some());
        (count, milliseconds(self.blocked_ns.load(Relaxed) + now.unwrap_or(0)))
    }

    /// Since when its code has been running, by `time.monotonic_ns`; 0: it does not run.
    #[getter]
    fn running_since_ns(&self) -> u64 {
        self.running_since_ns.load(Relaxed)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.arguments)?;
        visit.call(&self.rule.on_block)?;
        visit.call(self.application().map(Coroutine::object))
    }
}

impl Drop for Request {
    /// Nobody waited for its end.
    fn drop(&mut self) {
        if self.application().is_some() {
            self.finish();
        }
    }
}

/// A dict's value, if it has one.
pub fn item<'py>(dict: &Bound<'py, PyDict>, key: &Bound<'py, PyString>) -> Option<Bound<'py, PyAny>> {
    dict.get_item(key).ok().flatten()
}

/// A string's bytes; what UTF-8 can't say is replaced. Nothing of what is not a string.
fn text<'a>(value: &'a Bound<'_, PyAny>) -> Option<Cow<'a, [u8]>> {
    let value = value.cast::<PyString>().ok()?;
    Some(match value.to_cow() {
        Ok(Cow::Borrowed(text)) => Cow::Borrowed(text.as_bytes()),
        Ok(Cow::Owned(text)) => Cow::Owned(text.into_bytes()),
        Err(_) => Cow::Owned(value.to_string_lossy().into_owned().into_bytes()),
    })
}
