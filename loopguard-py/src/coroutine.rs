//! Drives a coroutine of Python's own type as `await` does, step by step.

use pyo3::exceptions::PyStopIteration;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyTuple, PyType};
use pyo3::{ffi, intern};

pub struct Coroutine(Py<PyAny>);

/// How a step ended that did not raise.
pub enum Outcome {
    Suspended(Py<PyAny>),
    Returned(Py<PyAny>),
}

impl Coroutine {
    /// Of whatever can be awaited.
    pub fn of(awaitable: Bound<'_, PyAny>) -> PyResult<Self> {
        static ADAPTER: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        if is_coroutine(&awaitable)? {
            return Ok(Self(awaitable.unbind()));
        }
        let adapter = ADAPTER.import(awaitable.py(), "loopguard_emit._tasks", "awaited")?;
        adapter.call1((awaitable,)).map(|coroutine| Self(coroutine.unbind()))
    }

    pub fn send(&self, value: &Bound<'_, PyAny>) -> PyResult<Outcome> {
        let mut result = std::ptr::null_mut();
        // SAFETY: both are live objects; `result` stays null if the step raises.
        let how = unsafe { ffi::PyIter_Send(self.0.as_ptr(), value.as_ptr(), &raw mut result) };
        // SAFETY: a new reference, or null with an exception set.
        let result = unsafe { Bound::from_owned_ptr_or_err(value.py(), result) }?.unbind();
        Ok(match how {
            ffi::PySendResult::PYGEN_NEXT => Outcome::Suspended(result),
            _ => Outcome::Returned(result),
        })
    }

    pub fn throw<'py>(&self, exception: &Bound<'py, PyTuple>) -> PyResult<Bound<'py, PyAny>> {
        let py = exception.py();
        self.0.bind(py).call_method1(intern!(py, "throw"), exception)
    }

    pub fn close<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.0.bind(py).call_method0(intern!(py, "close"))
    }

    pub fn attribute<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
        self.0.bind(py).getattr(name)
    }

    pub fn object(&self) -> &Py<PyAny> {
        &self.0
    }
}

impl Outcome {
    /// For `__next__`, where ending without an exception means to return `None`.
    pub fn or_stop(self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        match self {
            Self::Suspended(awaited) => Ok(Some(awaited)),
            Self::Returned(value) if value.is_none(py) => Ok(None),
            Self::Returned(value) => Err(stop(value)),
        }
    }

    /// For `send`.
    pub fn or_raise(self) -> PyResult<Py<PyAny>> {
        match self {
            Self::Suspended(awaited) => Ok(awaited),
            Self::Returned(value) => Err(stop(value)),
        }
    }
}

/// The value in a tuple of its own: a tuple would be taken for the exception's arguments.
fn stop(value: Py<PyAny>) -> PyErr {
    PyStopIteration::new_err((value,))
}

pub fn is_coroutine(value: &Bound<'_, PyAny>) -> PyResult<bool> {
    static TYPE: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    let coroutine = TYPE.import(value.py(), "types", "CoroutineType")?;
    Ok(value.get_type_ptr() == coroutine.as_type_ptr())
}
