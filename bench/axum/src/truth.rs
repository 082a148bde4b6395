//! Writes down what the server really did: for which request a worker was blocked, and from when to when.
//!
//! The form is that of `bench/truth.py`: `steps` are polls of the request's own future of 3 ms or more, deliberate or
//! not; `spans` are the deliberate blocks, also those in tasks that the request spawned.

use std::{
    cell::Cell,
    fs::File,
    future::Future,
    io::{self, BufWriter, Write as _},
    mem,
    path::Path,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
};

use serde_json::json;

const SHORTEST_STEP_NS: u64 = 3_000_000;
/// Requests for which there is room from the beginning: more than a load of half a minute sends.
const RECORDS: usize = 1 << 15;

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
        let end = now();
        held(&self.spans).push((start, end, kind));
        result
    }
}

/// Runs `code` with the worker given away, as `block_in_place` does.
pub fn gives_worker_away<R>(code: impl FnOnce() -> R) -> R {
    GAVE_WORKER_AWAY.set(true);
    tokio::task::block_in_place(code)
}

/// What is known until the end, and the file that it is written to then: text made within a poll, behind that poll's
/// last look at the clock, would be part of what blocks the worker but not of the truth.
#[derive(Clone)]
pub struct Truth(Arc<Mutex<Known>>);

struct Known {
    file: File,
    records: Vec<Record>,
}

enum Record {
    Background { start: u64, end: u64 },
    Request { id: Option<String>, path: String, start: u64, end: u64, steps: Vec<(u64, u64)>, spans: Vec<Span> },
}

impl Truth {
    pub fn create(path: &Path) -> io::Result<Self> {
        Ok(Self(Arc::new(Mutex::new(Known { file: File::create(path)?, records: Vec::with_capacity(RECORDS) }))))
    }

    pub fn background(&self, start: u64, end: u64) {
        held(&self.0).records.push(Record::Background { start, end });
    }

    /// Writes what came since the last time.
    pub fn flush(&self) -> io::Result<()> {
        let mut known = held(&self.0);
        let records = mem::take(&mut known.records);
        let mut file = BufWriter::new(&known.file);
        for record in records {
            let line = match record {
                Record::Background { start, end } => {
                    json!({"type": "background", "spans": [(start, end, "background")]})
                }
                Record::Request { id, path, start, end, steps, spans } => json!({
                    "type": "request", "request_id": id, "path": path,
                    "start_ns": start, "end_ns": end, "steps": steps, "spans": spans,
                }),
            };
            writeln!(file, "{line}")?;
        }
        file.flush()
    }

    /// Serves one request and keeps what it did.
    pub async fn record<F: Future>(&self, id: Option<String>, path: String, serve: F) -> F::Output {
        let truth = Arc::new(RequestTruth::default());
        let start = now();
        let timed = TimedPolls { inner: Box::pin(serve), truth: truth.clone() };
        let output = CURRENT.scope(truth.clone(), timed).await;
        let (steps, spans) = (mem::take(&mut *held(&truth.steps)), mem::take(&mut *held(&truth.spans)));
        held(&self.0).records.push(Record::Request { id, path, start, end: now(), steps, spans });
        output
    }
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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
            held(&self.truth.steps).push((start, end));
        }
        polled
    }
}
