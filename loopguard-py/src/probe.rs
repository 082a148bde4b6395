//! Fires the probes, and writes them down for the tests, which have no tracer.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use pyo3::prelude::*;

static RECORDING: AtomicBool = AtomicBool::new(false);
static RECORDED: Mutex<Vec<String>> = Mutex::new(Vec::new());

pub fn start(id: u64, method: &[u8], path: &[u8], request_id: &[u8]) {
    loopguard_emit::start(id, method, path, request_id);
    note(|| format!("start {id} {} {} {}", method.escape_ascii(), path.escape_ascii(), request_id.escape_ascii()));
}

pub fn route(id: u64, route: &[u8]) {
    loopguard_emit::route(id, route);
    note(|| format!("route {id} {}", route.escape_ascii()));
}

pub fn enter(id: u64) {
    loopguard_emit::enter(id);
    note(|| format!("enter {id}"));
}

pub fn exit(id: u64) {
    loopguard_emit::exit(id);
    note(|| format!("exit {id}"));
}

pub fn end(id: u64, status: u64) {
    loopguard_emit::end(id, status);
    note(|| format!("end {id} {status}"));
}

#[inline(always)]
fn note(line: impl FnOnce() -> String) {
    if RECORDING.load(Relaxed) {
        write_down(line());
    }
}

#[cold]
fn write_down(line: String) {
    if let Ok(mut recorded) = RECORDED.lock() {
        recorded.push(line);
    }
}

/// Whether somebody listens to the probes.
#[pyfunction]
pub fn is_traced() -> bool {
    RECORDING.load(Relaxed) || loopguard_emit::is_traced()
}

/// From now on, or no longer, the probes that fire are also written down.
#[pyfunction]
pub fn record(on: bool) {
    RECORDING.store(on, Relaxed);
}

/// What was written down since the last call: the probe's name and its arguments.
#[pyfunction]
pub fn recorded() -> Vec<String> {
    RECORDED.lock().map(|mut recorded| std::mem::take(&mut *recorded)).unwrap_or_default()
}
