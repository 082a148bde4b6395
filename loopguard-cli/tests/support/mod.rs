//! Servers to watch, requests to send, and loopguard watching: what the tests on real kernels share.

#![allow(dead_code, reason = "each test program uses its own part of it")]

use std::{
    env, fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use tokio::net::TcpSocket;

/// Nothing here takes long; what does is broken.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// One test at a time: a machine with two processors cannot serve, load and trace several servers at once.
pub fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether kernel programs can be loaded here. Says so when not; fails where that must not happen.
pub fn can_trace() -> bool {
    // SAFETY: no arguments, cannot fail.
    if unsafe { libc::geteuid() } == 0 || has_capabilities() {
        return true;
    }
    assert!(
        env::var_os("LOOPGUARD_REQUIRE_BPF").is_none_or(|value| value != "1"),
        "LOOPGUARD_REQUIRE_BPF=1, but this is not root and lacks capabilities"
    );
    eprintln!("SKIPPED: loading kernel programs needs root, or the capabilities in docs/SECURITY.md");
    false
}

/// Those that suffice where tracefs is mounted (linux/capability.h): DAC_READ_SEARCH, SYS_PTRACE, PERFMON and BPF.
fn has_capabilities() -> bool {
    const ENOUGH: u64 = 1 << 2 | 1 << 19 | 1 << 38 | 1 << 39;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let held = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok());
    held.is_some_and(|held| held & ENOUGH == ENOUGH)
}

/// Interpreters with FastAPI, uvicorn and hypercorn installed.
pub fn pythons() -> Vec<PathBuf> {
    let pythons = listed("LOOPGUARD_TEST_PYTHONS");
    assert!(
        !pythons.is_empty() || env::var_os("LOOPGUARD_REQUIRE_BPF").is_none_or(|value| value != "1"),
        "LOOPGUARD_REQUIRE_BPF=1, but LOOPGUARD_TEST_PYTHONS names no interpreter: run `cargo xtask test`"
    );
    if pythons.is_empty() {
        eprintln!("SKIPPED: LOOPGUARD_TEST_PYTHONS names no interpreter: run `cargo xtask test`");
    }
    pythons
}

/// Also those in a chroot, if `cargo xtask test --all-pythons` made one.
pub fn all_pythons() -> Vec<PathBuf> {
    [pythons(), listed("LOOPGUARD_TEST_SID")].concat()
}

fn listed(variable: &str) -> Vec<PathBuf> {
    let listed = env::var_os(variable).unwrap_or_default();
    env::split_paths(&listed).filter(|path| !path.as_os_str().is_empty()).collect()
}

pub fn loopguard() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_loopguard"));
    command.stdin(Stdio::null());
    command
}

/// It is bound only, never listened on: a process that another test starts at that moment keeps a copy of the socket
/// until it has executed its program, and who connects meanwhile would take it for the server.
pub fn free_port() -> u16 {
    let socket = TcpSocket::new_v4().unwrap();
    // So that such a copy does not keep the server from the port either.
    socket.set_reuseaddr(true).unwrap();
    socket.bind(([127, 0, 0, 1], 0).into()).unwrap();
    socket.local_addr().unwrap().port()
}

/// Who connects to a free port may be given that very port to connect from, and so meet itself.
pub fn listens(port: u16) -> bool {
    let met =
        TcpStream::connect(("127.0.0.1", port)).and_then(|stream| Ok((stream.local_addr()?, stream.peer_addr()?)));
    met.is_ok_and(|(own, peer)| own != peer)
}

/// Waits until something listens on a port, as long as the process lives that is to do so.
pub fn wait_until_up(child: &mut Child, port: u16) {
    let started = Instant::now();
    while !listens(port) {
        assert!(child.try_wait().unwrap().is_none(), "the server ended");
        assert!(started.elapsed() < PATIENCE, "the server does not come up");
        thread::sleep(Duration::from_millis(20));
    }
}

/// A file in the folder of the tests.
fn of_tests(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(path)
}

pub struct Server {
    pub child: Child,
    pub port: u16,
}

/// What to run and how.
pub struct Setup<'a> {
    pub python: &'a Path,
    pub server: &'a str,
    pub event_loop: &'a str,
    pub environment: &'a [(&'a str, &'a str)],
}

impl Server {
    pub fn start(setup: &Setup) -> Self {
        let mut command = Command::new(setup.python);
        command.arg(of_tests("servers/app.py")).args([setup.server, setup.event_loop]);
        command.envs(setup.environment.iter().copied());
        Self::run(
            command,
            &["/fine/warm", "/block/stream/0", "/block/gather/0", "/block/dependency/0?ms=0", "/block/sleep/0"],
        )
    }

    /// One of `servers/frameworks.py`.
    pub fn of_framework(python: &Path, name: &str) -> Self {
        let mut command = Command::new(python);
        command.arg(of_tests("servers/frameworks.py")).arg(name);
        Self::run(command, &["/api/wait/1", "/api/block-gather/0"])
    }

    /// `command` gets a port as its last argument; the requests to `warm_up` are the first ones.
    fn run(mut command: Command, warm_up: &[&str]) -> Self {
        let port = free_port();
        let child =
            command.arg(port.to_string()).env("PYTHONDONTWRITEBYTECODE", "1").stdin(Stdio::piped()).spawn().unwrap();
        let mut server = Self { child, port };
        wait_until_up(&mut server.child, port);
        // Imports that the first requests bring are no blocks of theirs.
        for path in warm_up {
            server.get(path, "warm-up");
        }
        server
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a request and waits for its answer.
    pub fn get(&self, path: &str, id: &str) -> String {
        request(
            self.port,
            &format!("GET {path} HTTP/1.1\r\nhost: test\r\nx-request-id: {id}\r\nconnection: close\r\n\r\n"),
        )
    }
}

/// Sends bytes and reads the answer to its end.
pub fn request(port: u16, text: &str) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let _ = stream.write_all(text.as_bytes());
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

/// Like [`request`], of a server that may be gone.
pub fn try_request(port: u16, text: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(text.as_bytes())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// loopguard attached to a server, its events in a file.
pub struct Watching {
    child: Child,
    events: PathBuf,
    messages: PathBuf,
}

impl Watching {
    /// Returns once loopguard says that it watches a loop.
    pub fn start(pid: u32, arguments: &[&str]) -> Self {
        let mut watching = Self::begin(pid, arguments);
        watching.wait_for_loops(1);
        watching
    }

    /// Returns once loopguard watches a process that has no event loop yet.
    pub fn before_polls(pid: u32, arguments: &[&str]) -> Self {
        let mut watching = Self::begin(pid, arguments);
        watching.wait_for("no event loop seen so far");
        watching
    }

    /// Returns at once.
    pub fn begin(pid: u32, arguments: &[&str]) -> Self {
        Self::with(&[&["--pid", &pid.to_string()], arguments].concat())
    }

    /// Likewise, with a selection among the arguments.
    pub fn with(arguments: &[&str]) -> Self {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
        let name = format!("{}-{number}", std::process::id());
        let (events, messages) = (folder.join(format!("{name}.jsonl")), folder.join(format!("{name}.messages")));
        let child = loopguard()
            .args(["attach", "--format", "jsonl", "--output"])
            .arg(&events)
            .args(arguments)
            .stderr(fs::File::create(&messages).unwrap())
            .spawn()
            .unwrap();
        Self { child, events, messages }
    }

    /// Waits until loopguard says that it watches so many loops, those that are gone again included.
    pub fn wait_for_loops(&mut self, count: usize) {
        let started = Instant::now();
        let says = |messages: &str| messages.matches("watching process").count() >= count && messages.ends_with('\n');
        while !says(&self.messages()) {
            assert!(self.child.try_wait().unwrap().is_none(), "loopguard ended: {}", self.messages());
            assert!(started.elapsed() < PATIENCE, "loopguard does not see {count} loops: {}", self.messages());
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until loopguard says this.
    pub fn wait_for(&mut self, message: &str) {
        let started = Instant::now();
        while !self.messages().contains(message) {
            assert!(self.child.try_wait().unwrap().is_none(), "loopguard ended: {}", self.messages());
            assert!(started.elapsed() < PATIENCE, "loopguard does not say {message:?}: {}", self.messages());
            thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn messages(&self) -> String {
        fs::read_to_string(&self.messages).unwrap_or_default()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Asks loopguard to stop, as Ctrl-C does, and returns what it wrote.
    pub fn stop(mut self) -> Events {
        signal(self.pid(), libc::SIGINT);
        let status = wait(&mut self.child);
        self.finish(status)
    }

    /// Waits for loopguard to end by itself.
    pub fn ended(mut self) -> Events {
        let status = wait(&mut self.child);
        self.finish(status)
    }

    /// Ends loopguard without any chance to clean up.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn finish(&self, status: ExitStatus) -> Events {
        let text = fs::read_to_string(&self.events).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str(line).expect("every line is JSON")).collect();
        Events { status, lines, messages: self.messages() }
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        // Only where a test failed: it ends by itself otherwise.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn signal(pid: u32, signal: i32) {
    // SAFETY: a signal to a process of this test.
    assert_eq!(unsafe { libc::kill(pid as i32, signal) }, 0);
}

pub fn wait(child: &mut Child) -> ExitStatus {
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        assert!(started.elapsed() < PATIENCE, "still running");
        thread::sleep(Duration::from_millis(10));
    }
}

/// What loopguard wrote.
pub struct Events {
    pub status: ExitStatus,
    pub lines: Vec<Value>,
    pub messages: String,
}

impl Events {
    pub fn of_type<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Value> {
        self.lines.iter().filter(move |line| line["type"] == name)
    }

    pub fn blocks(&self) -> impl Iterator<Item = &Value> {
        self.of_type("block")
    }

    pub fn summary(&self) -> &Value {
        let last = self.lines.last().expect("a summary at least");
        assert_eq!(last["type"], "summary");
        last
    }

    /// Blocks that name this request, and nobody else.
    pub fn blocks_of<'a>(&'a self, id: &'a str) -> impl Iterator<Item = &'a Value> {
        self.blocks().filter(move |block| {
            block["requests"].as_array().is_some_and(|requests| requests.len() == 1 && requests[0]["id"] == id)
        })
    }

    /// The parts of every block add up to its duration, within one percent.
    pub fn assert_parts_add_up(&self) {
        for block in self.blocks() {
            let ms = |field: &str| block[field].as_f64().unwrap();
            let sum = ms("on_cpu_ms") + ms("waiting_ms") + ms("gil_ms") + ms("run_queue_ms");
            assert!((sum - ms("duration_ms")).abs() <= ms("duration_ms") * 0.01, "{block}");
        }
    }
}

/// Whether a function of this name stands in the block's stack, and at which line.
pub fn line_of(block: &Value, function: &str) -> Option<u64> {
    let frames = block["stack"].as_array()?;
    frames.iter().find(|frame| frame["function"] == function)?["line"].as_u64()
}
