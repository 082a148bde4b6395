//! Leaves the tasks that a request starts with their request.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use crate::coroutine::{Coroutine, is_coroutine};
use crate::request::{Request, current};

/// A task factory. A task belongs to the request whose code makes it.
#[pyclass(frozen, module = "loopguard_emit._native")]
pub struct TaskFactory {
    /// The loop's own, if it had one.
    previous: Option<Py<PyAny>>,
    /// `asyncio.Task`.
    task: Py<PyAny>,
    /// Makes a coroutine of Python's own type of a request's scope, a child's steps, and the child.
    follow: Py<PyAny>,
}

#[pymethods]
impl TaskFactory {
    #[new]
    fn new(previous: Option<Py<PyAny>>, task: Py<PyAny>, follow: Py<PyAny>) -> Self {
        Self { previous, task, follow }
    }

    #[pyo3(signature = (event_loop, coroutine, **options))]
    fn __call__<'py>(
        &self,
        event_loop: Bound<'py, PyAny>,
        coroutine: Bound<'py, PyAny>,
        options: Option<Bound<'py, PyDict>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = event_loop.py();
        let coroutine = match current(py) {
            Some(request) if is_coroutine(&coroutine)? => self.follow(&request, coroutine)?,
            _ => coroutine,
        };
        if let Some(previous) = &self.previous {
            return previous.bind(py).call((event_loop, coroutine), options.as_ref());
        }
        let options = options.unwrap_or_else(|| PyDict::new(py));
        options.set_item(intern!(py, "loop"), event_loop)?;
        self.task.bind(py).call((coroutine,), Some(&options))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.previous)?;
        visit.call(&self.task)?;
        visit.call(&self.follow)
    }
}

impl TaskFactory {
    fn follow<'py>(&self, request: &Bound<'py, Request>, child: Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let py = child.py();
        let steps = ChildSteps {
            coroutine: Coroutine::of(child.clone())?,
            request: request.clone().unbind(),
            begun: AtomicBool::new(false),
        };
        self.follow.bind(py).call1((request.getattr(intern!(py, "scope"))?, steps, child))
    }
}

/// Awaiting it runs a child task's coroutine, with every step of it marked as its request's.
#[pyclass(frozen, generic, module = "loopguard_emit._native")]
pub struct ChildSteps {
    coroutine: Coroutine,
    request: Py<Request>,
    begun: AtomicBool,
}

impl ChildSteps {
    fn run<T>(&self, py: Python<'_>, code: impl FnOnce(&Coroutine) -> PyResult<T>) -> PyResult<T> {
        self.begun.store(true, Relaxed);
        Request::run(self.request.bind(py), || code(&self.coroutine))
    }
}

#[pymethods]
impl ChildSteps {
    fn __await__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __iter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __next__(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        self.run(py, |coroutine| coroutine.send(py.None().bind(py)))?.or_stop(py)
    }

    fn send(&self, py: Python<'_>, value: &Bound<'_, PyAny>) -> PyResult<Py<PyAny>> {
        self.run(py, |coroutine| coroutine.send(value))?.or_raise()
    }

    #[pyo3(signature = (*exception))]
    fn throw<'py>(&self, exception: &Bound<'py, PyTuple>) -> PyResult<Bound<'py, PyAny>> {
        self.run(exception.py(), |coroutine| coroutine.throw(exception))
    }

    fn close<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.run(py, |coroutine| coroutine.close(py))
    }

    #[getter]
    fn cr_await<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.coroutine.attribute(py, "cr_await")
    }

    #[getter]
    fn cr_code<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.coroutine.attribute(py, "cr_code")
    }

    #[getter]
    fn cr_frame<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.coroutine.attribute(py, "cr_frame")
    }

    #[getter]
    fn cr_running<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.coroutine.attribute(py, "cr_running")
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(self.coroutine.object())?;
        visit.call(&self.request)
    }
}

impl Drop for ChildSteps {
    /// A task that is cancelled before its first step never gets to its coroutine; asyncio would have closed that.
    fn drop(&mut self) {
        if self.begun.load(Relaxed) {
            return;
        }
        Python::attach(|py| {
            if let Err(error) = self.coroutine.close(py) {
                error.write_unraisable(py, None);
            }
        });
    }
}
