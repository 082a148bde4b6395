//! Where requests come in: tells an ASGI scope that is a request from one that is not, and runs the application for it.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use pyo3::exceptions::PyTypeError;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyDict, PyFrozenSet, PyString, PyTuple};

use crate::coroutine::Coroutine;
use crate::headers::Names;
use crate::request::{Request, Rule, Told, current, item};

/// Longer names than this are not repeated in a response.
const MAX_NAME_LENGTH: usize = 128;

/// The middleware without its Python part. It is called as an ASGI application is.
#[pyclass(frozen, subclass, module = "loopguard_emit._native")]
pub struct Gate {
    #[pyo3(get)]
    app: Py<PyAny>,
    threshold_ns: u64,
    on_block: Option<Py<PyAny>>,
    /// Paths that are not watched.
    excluded: Option<Py<PyFrozenSet>>,
    /// Makes, of an HTTP request, what its application calls as `send`; such requests all have names.
    answer: Option<Py<PyAny>>,
    /// The names that we gave.
    named: AtomicU64,
    /// Of those: what tells this program from others.
    prefix: String,
    /// Called with an event loop that was not seen before.
    on_loop: Option<Py<PyAny>>,
    /// The last that was seen.
    event_loop: Mutex<Option<Py<PyAny>>>,
}

#[pymethods]
impl Gate {
    #[new]
    #[pyo3(signature = (app, *, threshold_ns, on_block, excluded, answer, prefix, on_loop))]
    fn new(
        app: Py<PyAny>,
        threshold_ns: u64,
        on_block: Option<Py<PyAny>>,
        excluded: Bound<'_, PyFrozenSet>,
        answer: Option<Py<PyAny>>,
        prefix: String,
        on_loop: Option<Py<PyAny>>,
    ) -> Self {
        let excluded = (!excluded.is_empty()).then(|| excluded.unbind());
        let (named, event_loop) = (AtomicU64::new(0), Mutex::new(None));
        Self { app, threshold_ns, on_block, excluded, answer, named, prefix, on_loop, event_loop }
    }

    /// The application's own awaitable where the scope is no request, an excluded one, or one that another gate
    /// further out let in. Called with `scope`, `receive` and `send`, mostly in a tuple that can be handed on as it is.
    #[pyo3(signature = (*arguments, **named))]
    fn __call__<'py>(
        &self,
        mut arguments: Bound<'py, PyTuple>,
        named: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = arguments.py();
        if named.is_some() || arguments.len() != ARGUMENTS.len() {
            arguments = in_order(&arguments, named)?;
        }
        let scope = arguments.get_borrowed_item(0)?;
        let app = self.app.bind(py);
        let Some(kind) = self.lets_in(&scope)? else { return app.call1(arguments) };
        self.meet_loop(py)?;
        let rule =
            Rule { threshold_ns: self.threshold_ns, on_block: self.on_block.as_ref().map(|call| call.clone_ref(py)) };
        let answer = self.answer.as_ref().filter(|_| kind == Kind::Http);
        let told = Told::to_whom_it_may_concern();
        if answer.is_none() && told == Told::Briefly {
            let application = Coroutine::of(app.call1(arguments.clone())?)?;
            return Ok(Bound::new(py, Request::running(arguments, rule, application))?.into_any());
        }
        let request = Bound::new(py, Request::new(told, arguments.clone(), rule))?;
        let send = match answer {
            Some(answer) => {
                request.get().call_it(self.name(&*scope.cast::<PyDict>()?));
                answer.bind(py).call1((&request,))?
            }
            None => request.getattr(intern!(py, "respond"))?,
        };
        let receive = arguments.get_borrowed_item(1)?;
        request.get().is_to_run(py, Coroutine::of(app.call1((scope, receive, send))?)?);
        Ok(request.into_any())
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.app)?;
        visit.call(&self.on_block)?;
        visit.call(&self.answer)?;
        visit.call(&self.on_loop)?;
        match self.event_loop.try_lock() {
            Ok(event_loop) => visit.call(&*event_loop),
            Err(_) => Ok(()),
        }
    }
}

/// The names of what an ASGI application is called with.
const ARGUMENTS: [&str; 3] = ["scope", "receive", "send"];

/// What was given by name in its place.
#[cold]
fn in_order<'py>(arguments: &Bound<'py, PyTuple>, named: Option<&Bound<'py, PyDict>>) -> PyResult<Bound<'py, PyTuple>> {
    let py = arguments.py();
    let mut all: Vec<_> = arguments.iter().collect();
    let mut left = named.map_or(0, |named| named.len());
    for name in ARGUMENTS.iter().skip(all.len()) {
        let value = named.and_then(|named| named.get_item(name).transpose()).transpose()?;
        all.push(value.ok_or_else(|| PyTypeError::new_err(format!("the argument {name} is missing")))?);
        left -= 1;
    }
    if all.len() > ARGUMENTS.len() || left > 0 {
        return Err(PyTypeError::new_err("an ASGI application is called with scope, receive and send, each once"));
    }
    PyTuple::new(py, all)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Http,
    Websocket,
}

impl Gate {
    fn lets_in(&self, scope: &Bound<'_, PyAny>) -> PyResult<Option<Kind>> {
        let py = scope.py();
        let Ok(scope) = scope.cast::<PyDict>() else { return Ok(None) };
        let Some(kind) = kind(scope) else { return Ok(None) };
        if let Some(excluded) = &self.excluded
            && let Some(path) = item(scope, intern!(py, "path"))
            && path.is_instance_of::<PyString>()
            && excluded.bind(py).contains(path)?
        {
            return Ok(None);
        }
        if let Some(current) = current(py)
            && let Some(headers) = item(scope, intern!(py, "headers"))
            && current.get().has(&headers)
        {
            return Ok(None);
        }
        Ok(Some(kind))
    }

    fn meet_loop(&self, py: Python<'_>) -> PyResult<()> {
        static RUNNING: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        let Some(on_loop) = &self.on_loop else { return Ok(()) };
        // None under another library than asyncio.
        let running = RUNNING.import(py, "asyncio", "_get_running_loop")?.call0()?;
        let Ok(mut known) = self.event_loop.lock() else { return Ok(()) };
        if running.is_none() || known.as_ref().is_some_and(|known| known.is(&running)) {
            return Ok(());
        }
        *known = Some(running.clone().unbind());
        drop(known);
        on_loop.call1(py, (running,)).map(drop)
    }

    /// What the response can call the request.
    fn name<'py>(&self, scope: &Bound<'py, PyDict>) -> Bound<'py, PyBytes> {
        let py = scope.py();
        let given = item(scope, intern!(py, "headers")).and_then(|headers| Names::find(&headers).request_id);
        given.filter(can_be_sent).unwrap_or_else(|| {
            // A fork has our prefix and our count.
            let (process, count) = (std::process::id(), self.named.fetch_add(1, Relaxed));
            PyBytes::new(py, format!("{}-{process:x}-{count:x}", self.prefix).as_bytes())
        })
    }
}

fn kind(scope: &Bound<'_, PyDict>) -> Option<Kind> {
    let kind = item(scope, intern!(scope.py(), "type"))?;
    match kind.cast::<PyString>().ok()?.to_str().ok()? {
        "http" => Some(Kind::Http),
        "websocket" => Some(Kind::Websocket),
        _ => None,
    }
}

fn can_be_sent(name: &Bound<'_, PyBytes>) -> bool {
    let name = name.as_bytes();
    (1..=MAX_NAME_LENGTH).contains(&name.len()) && name.iter().all(u8::is_ascii_graphic)
}
