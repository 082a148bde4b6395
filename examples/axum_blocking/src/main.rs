//! An axum server that blocks its workers in the ways real ones do, next to handlers that do not.
//!
//! It has the paths of `bench/app.py`, so the same load fits both, and writes the same ground truth (see `truth`).
//! `/panics` and `/upgrade` show how such requests end.

use std::{
    convert::Infallible,
    fs::File,
    hash::{DefaultHasher, Hasher as _},
    hint::black_box,
    io::{Read as _, Write as _},
    net::Ipv4Addr,
    path::PathBuf,
    sync::{Arc, Mutex, mpsc},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use axum::{
    Extension, Router,
    body::{Body, Bytes},
    extract::{FromRequestParts, Path, Request, State},
    http::{StatusCode, header, request::Parts},
    middleware,
    response::{IntoResponse, Response},
    routing::{any, get, post},
};
use clap::{Parser, ValueEnum};
use futures_util::stream;
use tokio::{
    net::TcpListener,
    runtime::{Builder, Handle, RuntimeFlavor},
    time,
};

use truth::{Record, Truth};

mod truth;

#[derive(Parser)]
struct Arguments {
    /// On 127.0.0.1; 0 takes a free one. The address is printed once it listens.
    #[arg(long, default_value_t = 0)]
    port: u16,
    #[arg(long, value_enum, default_value_t = Flavour::Workers)]
    runtime: Flavour,
    #[arg(long, default_value_t = 2)]
    workers: usize,
    /// Tell tracers about requests (`loopguard-emit`).
    #[arg(long)]
    probes: bool,
    /// The file of ground truth; without it nothing is written down.
    #[arg(long)]
    truth: Option<PathBuf>,
    /// The port of `bench/slow_server.py`.
    #[arg(long, env = "BENCH_SLOW_PORT", default_value_t = 0)]
    slow_port: u16,
    /// Where files are written and synced.
    #[arg(long, default_value = ".")]
    folder: PathBuf,
    /// A task of no request blocks about every 1.5 s for this long; 0: never.
    #[arg(long, default_value_t = 0)]
    background_ms: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Flavour {
    Workers,
    CurrentThread,
}

#[derive(Clone)]
struct Places {
    slow_port: u16,
    folder: Arc<PathBuf>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let mut builder = match arguments.runtime {
        Flavour::Workers => Builder::new_multi_thread(),
        Flavour::CurrentThread => Builder::new_current_thread(),
    };
    builder.worker_threads(arguments.workers).enable_all().build()?.block_on(serve(arguments))
}

async fn serve(arguments: Arguments) -> Result<()> {
    let truth = arguments.truth.as_deref().map(Truth::create).transpose()?.map(Arc::new);
    if let (Some(truth), block @ 1..) = (&truth, arguments.background_ms) {
        tokio::spawn(block_in_background(truth.clone(), Duration::from_millis(block)));
    }
    let mut app = routes(truth.clone());
    if arguments.probes {
        app = app.layer(loopguard_emit::tower::RequestProbes);
    }
    let places = Places { slow_port: arguments.slow_port, folder: Arc::new(arguments.folder) };
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, arguments.port)).await.context("listen")?;
    println!("listening on {}", listener.local_addr()?);
    tokio::select! {
        served = axum::serve(listener, app.with_state(places)) => served?,
        _ = terminated() => {}
    }
    if let Some(truth) = truth {
        truth.flush();
    }
    Ok(())
}

async fn terminated() {
    use tokio::signal::unix::{SignalKind, signal};
    match signal(SignalKind::terminate()) {
        Ok(mut signal) => {
            signal.recv().await;
        }
        Err(_) => std::future::pending().await,
    }
}

fn routes(truth: Option<Arc<Truth>>) -> Router<Places> {
    let hello = Router::new().route("/hello", get(async || "hello"));
    let recorded = Router::new()
        .route("/ok/sleep/{ms}", get(ok_sleep))
        .route("/ok/pool/{ms}", get(ok_pool))
        .route("/ok/dependency/{ms}", get(ok_dependency))
        .route("/ok/thread/{ms}", get(ok_pool))
        .route("/ok/in-place/{ms}", get(ok_in_place))
        .route("/ok/stream/{ms}", get(ok_stream))
        .route("/block/sleep/{ms}", get(block_sleep))
        .route("/block/between/{ms}", get(block_between_awaits))
        .route("/block/cpu/{ms}", get(block_cpu))
        .route("/block/hash/{ms}", post(block_hash))
        .route("/block/file/{ms}", get(block_file))
        .route("/block/socket/{ms}", get(block_socket))
        .route("/block/lock/{ms}", get(block_lock))
        // CPython's lock has no like here; a mutex that another thread holds comes closest.
        .route("/block/gil/{ms}", get(block_lock))
        .route("/block/cuts/{ms}", get(block_cuts))
        .route("/block/nested/{ms}", get(block_nested))
        .route("/block/gather/{ms}", get(block_gather))
        .route("/block/spawned/{ms}", get(block_spawned))
        .route("/block/dependency/{ms}", get(block_dependency))
        .route("/block/stream/{ms}", get(block_stream))
        .route("/panics", get(panics))
        .route("/upgrade", any(upgrade));
    // A server that is measured without ground truth runs nothing of it.
    let (plain, recorded) = match truth {
        Some(_) => (Router::new(), recorded.merge(hello)),
        None => (hello, recorded),
    };
    plain.merge(recorded.layer(middleware::from_fn_with_state(truth, truth::record)))
}

type Recording = Extension<Arc<Record>>;

/// A background task: it blocks a worker too, and no request is to blame.
async fn block_in_background(truth: Arc<Truth>, block: Duration) {
    for round in 0u64.. {
        time::sleep(Duration::from_millis(750 + (round * 617) % 1500)).await;
        let start = truth::now();
        thread::sleep(block); // blocks
        truth.background(start, truth::now());
    }
}

fn milliseconds(ms: f64) -> Duration {
    Duration::from_secs_f64(ms / 1000.0)
}

fn spin(ms: f64) {
    let started = Instant::now();
    while started.elapsed() < milliseconds(ms) {
        black_box(0);
    }
}

// What is fine.

async fn ok_sleep(Path(ms): Path<f64>) {
    time::sleep(milliseconds(ms)).await;
}

async fn ok_pool(Path(ms): Path<f64>) -> Result<(), StatusCode> {
    tokio::task::spawn_blocking(move || thread::sleep(milliseconds(ms)))
        .await
        .map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)
}

/// Its worker goes on elsewhere meanwhile, where there is more than one.
async fn ok_in_place(Path(ms): Path<f64>) {
    if Handle::current().runtime_flavor() == RuntimeFlavor::MultiThread {
        tokio::task::block_in_place(|| thread::sleep(milliseconds(ms)));
    }
}

async fn ok_dependency(ms: Path<f64>) -> Result<(), StatusCode> {
    ok_pool(ms).await
}

async fn ok_stream(Path(ms): Path<f64>) -> Response {
    let pieces = stream::unfold(0, move |piece| async move {
        if piece == 6 {
            return None;
        }
        time::sleep(milliseconds(ms / 6.0)).await;
        Some((Ok::<_, Infallible>(Bytes::from_static(&[b'x'; 256])), piece + 1))
    });
    Body::from_stream(pieces).into_response()
}

// What blocks.

async fn block_sleep(Path(ms): Path<f64>, record: Recording) {
    record.blocking("sleep", || thread::sleep(milliseconds(ms)));
}

/// Is still in flight long after it blocked.
async fn block_between_awaits(Path(ms): Path<f64>, record: Recording) {
    time::sleep(Duration::from_millis(5)).await;
    record.blocking("between", || thread::sleep(milliseconds(ms)));
    time::sleep(Duration::from_millis(50)).await;
}

async fn block_cpu(Path(ms): Path<f64>, record: Recording) {
    record.blocking("cpu", || spin(ms));
}

async fn block_hash(Path(ms): Path<f64>, record: Recording, body: Bytes) {
    record.blocking("hash", || {
        let (started, mut hasher) = (Instant::now(), DefaultHasher::new());
        while started.elapsed() < milliseconds(ms) {
            hasher.write(&body);
        }
        black_box(hasher.finish());
    });
}

async fn block_file(Path(ms): Path<f64>, State(places): State<Places>, record: Recording) -> Result<(), StatusCode> {
    let synced = record.blocking("file", || {
        let started = Instant::now();
        loop {
            let mut file = File::create(places.folder.join("synced.bin"))?;
            file.write_all(&[b'z'; 262_144])?;
            file.sync_all()?;
            if started.elapsed() >= milliseconds(ms) {
                return std::io::Result::Ok(());
            }
        }
    });
    synced.map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)
}

async fn block_socket(Path(ms): Path<f64>, State(places): State<Places>, record: Recording) -> Result<(), StatusCode> {
    let asked = record.blocking("socket", || {
        let mut slow = std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, places.slow_port))?;
        slow.write_all(format!("{ms}\n").as_bytes())?;
        slow.read(&mut [0; 16])
    });
    asked.map(|_| ()).map_err(|_| StatusCode::BAD_GATEWAY)
}

async fn block_lock(Path(ms): Path<f64>, record: Recording) {
    let (lock, (holds, held)) = (Arc::new(Mutex::new(())), mpsc::channel());
    record.blocking("lock", || {
        let theirs = Arc::clone(&lock);
        thread::spawn(move || {
            let _guard = theirs.lock();
            let _ = holds.send(());
            thread::sleep(milliseconds(ms));
        });
        let _ = held.recv_timeout(Duration::from_secs(1));
        drop(lock.lock());
    });
}

/// Twenty short blocks with an await after each.
async fn block_cuts(Path(ms): Path<f64>, record: Recording) {
    for _ in 0..20 {
        record.blocking("cut", || thread::sleep(milliseconds(ms)));
        tokio::task::yield_now().await;
    }
}

#[inline(never)]
fn nested(level: u32, ms: f64) {
    match level {
        0 => thread::sleep(milliseconds(ms)),
        _ => nested(level - 1, ms),
    }
    black_box(level);
}

async fn block_nested(Path(ms): Path<f64>, record: Recording) {
    time::sleep(Duration::from_millis(2)).await;
    record.blocking("nested", || nested(10, ms));
}

/// Two futures of one task.
async fn block_gather(Path(ms): Path<f64>, record: Recording) {
    let child = async {
        time::sleep(Duration::from_millis(3)).await;
        record.blocking("child", || thread::sleep(milliseconds(ms)));
    };
    tokio::join!(child, time::sleep(Duration::from_millis(20)));
}

/// Another task blocks, and this one awaits it.
async fn block_spawned(Path(ms): Path<f64>, Extension(record): Recording) -> Result<(), StatusCode> {
    let child = tokio::spawn(async move {
        time::sleep(Duration::from_millis(3)).await;
        record.blocking("spawned", || thread::sleep(milliseconds(ms)));
    });
    child.await.map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)
}

/// An extractor that blocks, before the handler is called.
struct BlockingDependency;

impl<S: Send + Sync> FromRequestParts<S> for BlockingDependency {
    type Rejection = StatusCode;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, StatusCode> {
        let Path(ms) =
            Path::<f64>::from_request_parts(parts, state).await.map_err(|_| StatusCode::UNPROCESSABLE_ENTITY)?;
        time::sleep(Duration::from_millis(1)).await;
        if let Some(record) = parts.extensions.get::<Arc<Record>>() {
            record.blocking("dependency", || thread::sleep(milliseconds(ms)));
        }
        Ok(Self)
    }
}

async fn block_dependency(_: BlockingDependency) {}

/// Blocks while its body is sent, after the handler has returned.
async fn block_stream(Path(ms): Path<f64>, Extension(record): Recording) -> Response {
    let pieces = stream::unfold((0, record), move |(piece, record)| async move {
        match piece {
            5 => return None,
            3 => record.blocking("stream", || thread::sleep(milliseconds(ms))),
            _ => {}
        }
        time::sleep(Duration::from_millis(5)).await;
        Some((Ok::<_, Infallible>(Bytes::from_static(&[b'x'; 256])), (piece + 1, record)))
    });
    Body::from_stream(pieces).into_response()
}

// What ends otherwise.

async fn panics() {
    panic!("as it was asked to");
}

/// Switches protocols, as a websocket does, and holds the connection for a while.
async fn upgrade(mut request: Request) -> Response {
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let upgraded = upgrade.await;
        time::sleep(Duration::from_millis(50)).await;
        drop(upgraded);
    });
    let headers = [(header::CONNECTION, "upgrade"), (header::UPGRADE, "silence")];
    (StatusCode::SWITCHING_PROTOCOLS, headers).into_response()
}
