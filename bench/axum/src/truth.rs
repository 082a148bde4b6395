//! Writes down what the server really did: for which request a worker was blocked, and from when to when.
//!
//! The form is that of `bench/truth.py`: `steps` are polls of the request's own future of 3 ms or more, deliberate or
//! not; `spans` are the deliberate blocks, also those in tasks that the request spawned.

use std::{
    cell::Cell,
    fs::File,
    future::Future,
    io::{self, BufWriter, Write as _},
    path::Path,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};

use serde_json::{Value, json};

const SHORTEST_STEP_NS: u64 = 3_000_000;

type Span = (u64, u64, &'static str);

thread_local! {
    /// The poll that runs gave its worker away with `block_in_place`: it blocks nobody.
    static GAVE_WORKER_AWAY: Cell<bool> = const { Cell::new(false) };
}

tokio::task_local! {
    static CURRENT: Arc<RequestTruth>;
}

pub fn now() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a valid place for the result; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

#[derive(Default)]
pub struct RequestTruth {
    steps: Mutex<Vec<(u64, u64)>>,
    spans: Mutex<Vec<Span>>,
}

impl RequestTruth {
    pub fn current() -> Arc<Self> {
        CURRENT.try_with(Arc::clone).unwrap_or_default()
    }

    /// Everything in `code` runs on the worker without giving it back.
    pub fn blocking<R>(&self, kind: &'static str, code: impl FnOnce() -> R) -> R {
        let start = now();
        let result = code();
        self.spans.lock().unwrap_or_else(PoisonError::into_inner).push((start, now(), kind));
        result
    }
}

/// Runs `code` with the worker given away, as `block_in_place` does.
pub fn gives_worker_away<R>(code: impl FnOnce() -> R) -> R {
    GAVE_WORKER_AWAY.set(true);
    tokio::task::block_in_place(code)
}

/// The file of ground truth.
#[derive(Clone)]
pub struct Truth(Arc<Mutex<BufWriter<File>>>);

impl Truth {
    pub fn create(path: &Path) -> io::Result<Self> {
        Ok(Self(Arc::new(Mutex::new(BufWriter::new(File::create(path)?)))))
    }

    fn write(&self, record: &Value) {
        let mut file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = writeln!(file, "{record}");
    }

    pub fn background(&self, start: u64, end: u64) {
        self.write(&json!({"type": "background", "spans": [(start, end, "background")]}));
    }

    pub fn flush(&self) {
        let _ = self.0.lock().unwrap_or_else(PoisonError::into_inner).flush();
    }

    /// Serves one request and writes down what it did.
    pub async fn record<F: Future>(&self, id: Option<String>, path: String, serve: F) -> F::Output {
        let truth = Arc::new(RequestTruth::default());
        let start = now();
        let timed = TimedPolls { inner: Box::pin(serve), truth: truth.clone() };
        let output = CURRENT.scope(truth.clone(), timed).await;
        let steps = std::mem::take(&mut *truth.steps.lock().unwrap_or_else(PoisonError::into_inner));
        let spans = std::mem::take(&mut *truth.spans.lock().unwrap_or_else(PoisonError::into_inner));
        self.write(&json!({
            "type": "request", "request_id": id, "path": path,
            "start_ns": start, "end_ns": now(), "steps": steps, "spans": spans,
        }));
        output
    }
}

struct TimedPolls<F> {
    inner: Pin<Box<F>>,
    truth: Arc<RequestTruth>,
}

impl<F: Future> Future for TimedPolls<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        GAVE_WORKER_AWAY.set(false);
        let start = now();
        let polled = self.inner.as_mut().poll(context);
        let end = now();
        if end - start >= SHORTEST_STEP_NS && !GAVE_WORKER_AWAY.get() {
            self.truth.steps.lock().unwrap_or_else(PoisonError::into_inner).push((start, end));
        }
        polled
    }
}
