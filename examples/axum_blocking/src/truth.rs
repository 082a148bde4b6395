//! Writes down what the server really did: for which request a worker was blocked, and from when to when.
//!
//! One JSON object a line, as `bench/truth.py` writes them; times are CLOCK_MONOTONIC nanoseconds, the clock of
//! loopguard's output too. A request also says which thread each stretch ran on.

use std::{
    fs::File,
    io::{BufWriter, Write as _},
    path::Path,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};

use anyhow::{Context as _, Result};
use axum::{
    extract::{Request, State},
    middleware::Next,
    response::Response,
};
use serde_json::{Value, json};

/// Shorter steps are not written down.
const SHORTEST_STEP_NS: u64 = 3_000_000;

pub fn now() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: fills the struct it is given.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// The file of ground truth.
pub struct Truth(Mutex<BufWriter<File>>);

impl Truth {
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("create {}", path.display()))?;
        Ok(Self(Mutex::new(BufWriter::with_capacity(1 << 20, file))))
    }

    pub fn background(&self, start_ns: u64, end_ns: u64) {
        self.write(&json!({"type": "background", "spans": [[start_ns, end_ns, "background"]]}));
    }

    pub fn flush(&self) {
        let _ = self.0.lock().unwrap_or_else(PoisonError::into_inner).flush();
    }

    fn write(&self, record: &Value) {
        // The scorer sees what is missing.
        let _ = writeln!(self.0.lock().unwrap_or_else(PoisonError::into_inner), "{record}");
    }
}

type Stretches = Mutex<Vec<(u64, u64, i32, &'static str)>>;

/// What one request did; written down when nothing works on it any more.
pub struct Record {
    truth: Option<Arc<Truth>>,
    id: Option<String>,
    path: String,
    start_ns: u64,
    spans: Stretches,
    steps: Stretches,
}

impl Record {
    /// Everything inside runs on a worker without an await.
    pub fn blocking<T>(&self, kind: &'static str, code: impl FnOnce() -> T) -> T {
        let start = now();
        let result = code();
        note(&self.spans, (start, now()), kind);
        result
    }
}

fn note(stretches: &Stretches, (start, end): (u64, u64), kind: &'static str) {
    // SAFETY: a system call without arguments.
    let thread = unsafe { libc::gettid() };
    stretches.lock().unwrap_or_else(PoisonError::into_inner).push((start, end, thread, kind));
}

impl Drop for Record {
    fn drop(&mut self) {
        let Some(truth) = &self.truth else { return };
        let spans = self.spans.get_mut().unwrap_or_else(PoisonError::into_inner);
        let steps = self.steps.get_mut().unwrap_or_else(PoisonError::into_inner);
        truth.write(&json!({
            "type": "request",
            "request_id": self.id,
            "path": self.path,
            "start_ns": self.start_ns,
            "end_ns": now(),
            "steps": steps.iter().map(|(start, end, ..)| json!([start, end])).collect::<Vec<_>>(),
            "spans": spans.iter().map(|(start, end, _, kind)| json!([start, end, kind])).collect::<Vec<_>>(),
            "threads": spans.iter().map(|(_, _, thread, _)| *thread).collect::<Vec<_>>(),
        }));
    }
}

/// Times each poll of a request's future.
struct TimedSteps<F> {
    future: Pin<Box<F>>,
    record: Arc<Record>,
}

impl<F: Future> Future for TimedSteps<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let start = now();
        let polled = self.future.as_mut().poll(context);
        let end = now();
        if end - start >= SHORTEST_STEP_NS {
            note(&self.record.steps, (start, end), "step");
        }
        polled
    }
}

/// Gives each request its record.
pub async fn record(State(truth): State<Option<Arc<Truth>>>, mut request: Request, next: Next) -> Response {
    let id = request.headers().get("x-request-id").and_then(|value| value.to_str().ok());
    let record = Arc::new(Record {
        truth,
        id: id.map(str::to_owned),
        path: request.uri().path().to_owned(),
        start_ns: now(),
        spans: Stretches::default(),
        steps: Stretches::default(),
    });
    request.extensions_mut().insert(Arc::clone(&record));
    TimedSteps { future: Box::pin(next.run(request)), record }.await
}
