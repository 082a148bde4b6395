//! An axum server that blocks its tokio workers in every way that real servers do, and writes down when.
//!
//! usage: bench-axum RUNTIME PORT [TRUTH.jsonl [layer]]
//! RUNTIME: `multi` (main thread in `block_on`), `spawned` (everything in tasks) or `current` (one thread).
//! `layer`: it tells of its requests with the layer of `loopguard-emit`. Ends at SIGTERM and then closes the file.

mod truth;

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream, ToSocketAddrs as _},
    path::Path,
    sync::{Mutex, OnceLock, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use axum::{
    Router,
    extract::{Path as InPath, Request, State},
    middleware::{self, Next},
    response::Response,
    routing::get,
};
use tokio::signal::unix::{SignalKind, signal};
use truth::{RequestTruth, Truth, gives_worker_away, now};

/// Answers on its port after as many milliseconds as a line says.
static SLOW_PORT: OnceLock<u16> = OnceLock::new();
/// What everybody wants and one holds for too long.
static CONTENDED: Mutex<u64> = Mutex::new(0);
const BACKGROUND_BLOCK: Duration = Duration::from_millis(30);
const BACKGROUND_PERIOD: Duration = Duration::from_millis(700);

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, runtime, port, rest @ ..] = &arguments[..] else {
        bail!("usage: bench-axum RUNTIME PORT [TRUTH.jsonl [layer]]")
    };
    let port: u16 = port.parse().context("the port")?;
    let truth = rest.first().map(|path| Truth::create(Path::new(path))).transpose().context("create the truth")?;
    let telling = match rest.get(1).map(String::as_str) {
        None => Telling::Nothing,
        Some("layer") => Telling::Requests,
        Some(other) => bail!("no {other}"),
    };
    let _ = SLOW_PORT.set(slow_server()?);
    match runtime.as_str() {
        "current" => {
            tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(serve(port, truth, telling))
        }
        "multi" => workers()?.block_on(serve(port, truth, telling)),
        "spawned" => {
            let runtime = workers()?;
            let served = runtime.spawn(serve(port, truth, telling));
            runtime.block_on(served)?
        }
        other => bail!("no runtime {other}"),
    }
}

fn workers() -> Result<tokio::runtime::Runtime> {
    // A name of its own: nobody may rely on tokio's.
    Ok(tokio::runtime::Builder::new_multi_thread().worker_threads(2).thread_name("shop").enable_all().build()?)
}

/// What it tells tracers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Telling {
    Nothing,
    Requests,
}

async fn serve(port: u16, truth: Option<Truth>, telling: Telling) -> Result<()> {
    let mut routes = Router::new()
        .route("/hello", get(hello))
        .route("/ok/sleep/{ms}", get(ok_sleep))
        .route("/ok/pool/{ms}", get(ok_pool))
        .route("/ok/in-place/{ms}", get(ok_in_place))
        .route("/block/sleep/{ms}", get(block_sleep))
        .route("/block/spin/{ms}", get(block_spin))
        .route("/block/mutex/{ms}", get(block_mutex))
        .route("/block/file/{ms}", get(block_file).post(block_upload))
        .route("/block/socket/{ms}", get(block_socket))
        .route("/block/dns/{ms}", get(block_dns))
        .route("/block/between/{ms}", get(block_between))
        .route("/block/spawned/{ms}", get(block_spawned));
    if let Some(truth) = &truth {
        routes = routes.layer(middleware::from_fn_with_state(truth.clone(), record));
        tokio::spawn(background(truth.clone()));
    }
    if telling == Telling::Requests {
        routes = routes.layer(loopguard_emit::tower::RequestProbes);
    }
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await?;
    let mut stop = signal(SignalKind::terminate())?;
    tokio::select! {
        served = axum::serve(listener, routes) => served?,
        _ = stop.recv() => {}
    }
    if let Some(truth) = truth {
        truth.flush().context("write the truth")?;
    }
    Ok(())
}

async fn record(State(truth): State<Truth>, request: Request, next: Next) -> Response {
    let id = request.headers().get("x-request-id").and_then(|id| id.to_str().ok()).map(str::to_owned);
    let path = request.uri().path().to_owned();
    truth.record(id, path, next.run(request)).await
}

/// Belongs to no request: whoever is blamed for it is innocent.
async fn background(truth: Truth) {
    loop {
        tokio::time::sleep(BACKGROUND_PERIOD).await;
        let start = now();
        thread::sleep(BACKGROUND_BLOCK);
        truth.background(start, now());
    }
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

async fn hello() -> &'static str {
    "hello"
}

// Nothing below /ok blocks a worker, however long it takes.

async fn ok_sleep(InPath(time): InPath<u64>) {
    tokio::time::sleep(ms(time)).await;
}

async fn ok_pool(InPath(time): InPath<u64>) {
    let _ = tokio::task::spawn_blocking(move || thread::sleep(ms(time))).await;
}

async fn ok_in_place(InPath(time): InPath<u64>) {
    if tokio::runtime::Handle::current().runtime_flavor() == tokio::runtime::RuntimeFlavor::MultiThread {
        gives_worker_away(|| thread::sleep(ms(time)));
    }
}

async fn block_sleep(InPath(time): InPath<u64>) {
    RequestTruth::current().blocking("sleep", || thread::sleep(ms(time)));
}

async fn block_spin(InPath(time): InPath<u64>) {
    RequestTruth::current().blocking("spin", || spin(ms(time)));
}

#[inline(never)]
fn spin(time: Duration) {
    let started = Instant::now();
    while started.elapsed() < time {
        std::hint::black_box(0);
    }
}

async fn block_mutex(InPath(time): InPath<u64>) {
    let (held, wait_for) = mpsc::channel();
    RequestTruth::current().blocking("mutex", || {
        thread::spawn(move || {
            let mut count = CONTENDED.lock().unwrap_or_else(PoisonError::into_inner);
            *count += 1;
            let _ = held.send(());
            thread::sleep(ms(time));
        });
        let _ = wait_for.recv();
        *CONTENDED.lock().unwrap_or_else(PoisonError::into_inner) += 1;
    });
}

async fn block_file(InPath(time): InPath<u64>) {
    RequestTruth::current().blocking("file", || write_durably(ms(time)));
}

/// The body comes first, in a poll of its own or in several.
async fn block_upload(InPath(time): InPath<u64>, body: String) -> String {
    RequestTruth::current().blocking("upload", || write_durably(ms(time)));
    body.len().to_string()
}

fn write_durably(time: Duration) {
    let path = std::env::temp_dir().join(format!("bench-axum-{}-{:?}", std::process::id(), thread::current().id()));
    let started = Instant::now();
    while started.elapsed() < time {
        let written = File::create(&path).and_then(|mut file| {
            file.write_all(&[b'z'; 262_144])?;
            file.sync_all()
        });
        if written.is_err() {
            break;
        }
    }
    let _ = fs::remove_file(&path);
}

async fn block_socket(InPath(time): InPath<u64>) {
    RequestTruth::current().blocking("socket", || {
        let mut answer = [0; 16];
        let asked = TcpStream::connect(("127.0.0.1", *SLOW_PORT.get().unwrap_or(&0)))
            .and_then(|mut slow| writeln!(slow, "{time}").and_then(|()| slow.read(&mut answer)));
        drop(asked);
    });
}

async fn block_dns(InPath(time): InPath<u64>) {
    RequestTruth::current().blocking("dns", || {
        let started = Instant::now();
        while started.elapsed() < ms(time) {
            let _ = ("localhost", 80).to_socket_addrs().map(Iterator::count);
        }
    });
}

/// The request is read in one poll and blocks in a later one.
async fn block_between(InPath(time): InPath<u64>) {
    tokio::time::sleep(ms(5)).await;
    RequestTruth::current().blocking("between", || thread::sleep(ms(time)));
    tokio::time::sleep(ms(20)).await;
}

/// A task that the request spawned blocks, not the request's own.
async fn block_spawned(InPath(time): InPath<u64>) {
    let truth = RequestTruth::current();
    let _ = tokio::spawn(async move { truth.blocking("spawned", || thread::sleep(ms(time))) }).await;
}

fn slow_server() -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            thread::spawn(move || {
                let mut line = String::new();
                let asked = stream.try_clone().and_then(|read| BufReader::new(read).read_line(&mut line));
                thread::sleep(ms(line.trim().parse().unwrap_or(0)));
                let _ = asked.and_then(|_| stream.write_all(b"done\n"));
            });
        }
    });
    Ok(port)
}
