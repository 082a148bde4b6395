//! Days on which much goes wrong at once: the server serves on, and loopguard says what it saw or why it saw nothing.

mod support;

use std::{
    fs,
    path::Path,
    process::{Child, Command, Output, Stdio},
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use support::{
    Events, PATIENCE, Server, Setup, Watching, alone, can_trace, free_port, line_of, pythons, signal, try_request,
    wait, wait_until_up,
};

const THRESHOLD: [&str; 2] = ["--threshold", "50ms"];

fn server() -> Option<Server> {
    let python = pythons().into_iter().next_back().filter(|_| can_trace())?;
    Some(Server::start(&Setup { python: &python, server: "uvicorn-h11", event_loop: "asyncio", environment: &[] }))
}

/// Whoever asks this server in the meantime gets an answer, each time.
fn while_it_serves<T>(port: u16, during: impl FnOnce() -> T) -> T {
    let (over, served) = (AtomicBool::new(false), AtomicU32::new(0));
    thread::scope(|scope| {
        let client = scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let answer =
                    try_request(port, "GET /fine/x HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n").unwrap();
                assert!(answer.starts_with("HTTP/1.1 200"), "{answer:?} after {served:?} answers");
                served.fetch_add(1, Ordering::Relaxed);
                thread::sleep(Duration::from_millis(20));
            }
        });
        let outcome = during();
        over.store(true, Ordering::Relaxed);
        client.join().unwrap();
        assert!(served.load(Ordering::Relaxed) > 0);
        outcome
    })
}

fn get(server: &Server, path: &str, id: &str) {
    let answer = server.get(path, id);
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer:?}");
}

/// Waits until the thread of this id is in `time.sleep`.
fn wait_until_asleep(tid: u32) {
    let (started, call) = (Instant::now(), format!("{} ", libc::SYS_clock_nanosleep));
    while !fs::read_to_string(format!("/proc/{tid}/syscall")).unwrap().starts_with(&call) {
        assert!(started.elapsed() < PATIENCE, "it does not sleep");
        thread::sleep(Duration::from_millis(1));
    }
}

/// One block of each of these requests, and nobody else is blamed.
fn assert_blocks_of(events: &Events, ids: &[&str]) {
    assert!(events.status.success(), "{}", events.messages);
    events.assert_parts_add_up();
    for id in ids {
        assert_eq!(events.blocks_of(id).count(), 1, "{id}: {:#?} {}", events.lines, events.messages);
    }
    for block in events.blocks() {
        for request in block["requests"].as_array().unwrap() {
            let is_expected = ids.iter().any(|id| request["id"] == *id);
            // A machine that is short of processors holds up whoever runs: that is said as such.
            assert!(is_expected || block["verdict"] == "host", "{block:#}");
        }
    }
    assert_eq!(events.summary()["lost_records"], 0, "{}", events.messages);
}

#[test]
fn a_target_is_stopped_and_goes_on() {
    let _alone = alone();
    let Some(server) = server() else { return };
    let watching = Watching::start(server.pid(), &THRESHOLD);
    let stop_for = |time: u64| {
        signal(server.pid(), libc::SIGSTOP);
        thread::sleep(Duration::from_millis(time));
        signal(server.pid(), libc::SIGCONT);
    };
    // While it idles: nobody's block.
    stop_for(500);
    get(&server, "/fine/x", "behind-a-stop");
    // In the middle of a request's work, which so takes longer.
    thread::scope(|scope| {
        scope.spawn(|| get(&server, "/block/sleep/400", "stopped"));
        wait_until_asleep(server.pid());
        stop_for(1000);
    });
    get(&server, "/block/sleep/100", "after");
    let events = watching.stop();
    assert_blocks_of(&events, &["stopped", "after"]);
    let stopped = events.blocks_of("stopped").next().unwrap();
    assert!(stopped["duration_ms"].as_f64().unwrap() >= 1000.0, "{stopped:#}");
}

#[test]
fn a_debugger_looks_at_the_target_too() {
    let _alone = alone();
    if Command::new("gdb").arg("--version").stdout(Stdio::null()).status().is_err() {
        eprintln!("SKIPPED: there is no gdb");
        return;
    }
    let Some(server) = server() else { return };
    let pid = server.pid().to_string();
    let first = Watching::start(server.pid(), &THRESHOLD);
    // So that step probes are placed: gdb sees the changed instruction.
    get(&server, "/block/sleep/100", "before-gdb");
    let gdb = Command::new("gdb")
        .args(["-nx", "--batch", "-iex", "set debuginfod enabled off", "-p", &pid])
        .args([
            "-ex",
            "echo attached\\n",
            "-ex",
            "shell sleep 1",
            "-ex",
            "thread apply all backtrace 4",
            "-ex",
            "detach",
        ])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    // One that comes while gdb holds the target, or thereabouts.
    let second = Watching::begin(server.pid(), &THRESHOLD);
    while_it_serves(server.port, || {
        let said = gdb.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&said.stdout);
        assert!(said.status.success() && text.contains("attached\n") && text.contains("#0"), "{text}");
    });
    let mut second = second;
    second.wait_for_loops(1);
    get(&server, "/block/sleep/100", "after-gdb");
    let (first, second) = (first.stop(), second.stop());
    for (events, ids) in [(first, &["before-gdb", "after-gdb"][..]), (second, &["after-gdb"])] {
        assert!(events.status.success(), "{}", events.messages);
        for id in ids {
            assert_eq!(events.blocks_of(id).count(), 1, "{id}: {:#?} {}", events.lines, events.messages);
        }
    }
}

#[test]
fn several_loopguards_watch_one_target() {
    let _alone = alone();
    let Some(server) = server() else { return };
    let all = ["a0", "a1", "a2", "b0", "b1", "b2", "c0", "c1", "c2"];
    let block = |ids: &[&str]| ids.iter().for_each(|id| get(&server, "/block/sleep/100", id));
    let (first, second) = (Watching::start(server.pid(), &THRESHOLD), Watching::start(server.pid(), &THRESHOLD));
    block(&all[..3]);
    first.kill();
    block(&all[3..6]);
    let third = Watching::start(server.pid(), &THRESHOLD);
    block(&all[6..]);
    assert_blocks_of(&second.stop(), &all);
    assert_blocks_of(&third.stop(), &all[6..]);
}

/// What loopguard says and how it ends when its output is set up by a shell's `redirection`.
fn with_output(redirection: &str, format: &str, pid: u32) -> Output {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("exec \"$@\" {redirection}"), "sh", env!("CARGO_BIN_EXE_loopguard")]);
    command.args(["attach", "--pid", &pid.to_string(), "--format", format, "--duration", "1500ms"]).args(THRESHOLD);
    command.stdin(Stdio::null()).output().unwrap()
}

#[test]
fn the_output_fails() {
    let _alone = alone();
    let Some(server) = server() else { return };
    for format in ["text", "jsonl"] {
        let outputs = while_it_serves(server.port, || {
            thread::scope(|scope| {
                let watching = scope
                    .spawn(|| [">/dev/full", ">&-"].map(|redirection| with_output(redirection, format, server.pid())));
                while !watching.is_finished() {
                    get(&server, "/block/sleep/100", "unwritten");
                }
                watching.join().unwrap()
            })
        });
        let [full, closed] = outputs.map(|output| (output.status.code(), String::from_utf8(output.stderr).unwrap()));
        assert_eq!(full.0, Some(2), "{format}: {}", full.1);
        assert_eq!(full.1.matches("no space left").count(), 1, "{format}: {}", full.1);
        // Nobody wants to read it: that is no failure.
        assert_eq!(closed.0, Some(0), "{format}: {}", closed.1);
        for said in [full.1, closed.1] {
            assert!(!said.contains("panicked") && !said.contains("os error"), "{format}: {said}");
        }
    }
}

/// A server with very much of one thing.
struct Crowd {
    child: Child,
    port: u16,
}

impl Crowd {
    fn start(kind: &str, count: usize) -> Option<Self> {
        let python = pythons().into_iter().next_back().filter(|_| can_trace())?;
        let port = free_port();
        let mut child = Command::new(python)
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/servers/crowd.py"))
            .args([&port.to_string(), kind, &count.to_string()])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        wait_until_up(&mut child, port);
        Some(Self { child, port })
    }

    /// What loopguard saw of two blocks of its main loop.
    fn watched(&self, loops: usize) -> Events {
        let mut watching = Watching::begin(self.child.id(), &THRESHOLD);
        match loops {
            1 => while_it_serves(self.port, || watching.wait_for_loops(loops)),
            // An idle loop is found where it sleeps: while the main loop serves, the others could take all places.
            _ => watching.wait_for_loops(loops),
        }
        for _ in 0..2 {
            let answer = try_request(self.port, "GET /block HTTP/1.1\r\n\r\n").unwrap();
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer:?}");
        }
        let events = watching.stop();
        assert!(events.status.success(), "{}", events.messages);
        let main = u64::from(self.child.id());
        let seen = events.blocks().filter(|block| block["tid"] == main && line_of(block, "block").is_some());
        assert_eq!(seen.count(), 2, "{:#?} {}", events.lines, events.messages);
        // Should the machine stall, a step of every loop is old at once: hundreds are more than the ring buffer holds.
        assert!(loops > 1 || events.summary()["lost_records"] == 0, "{}", events.messages);
        events
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        wait(&mut self.child);
    }
}

#[test]
fn a_target_has_ten_thousand_threads() {
    let _alone = alone();
    let Some(crowd) = Crowd::start("threads", 10_000) else { return };
    let events = crowd.watched(1);
    assert_eq!(events.summary()["threads"].as_array().unwrap().len(), 1);
}

#[test]
fn a_target_has_more_loops_than_can_be_watched() {
    let _alone = alone();
    let most = loopguard::source::kernel::MAX_THREADS as usize;
    let Some(crowd) = Crowd::start("loops", most) else { return };
    let events = crowd.watched(most);
    assert_eq!(events.messages.matches("further ones are not").count(), 1, "{}", events.messages);
    assert_eq!(events.summary()["threads"].as_array().unwrap().len(), most);
}

#[test]
fn a_target_maps_as_many_regions_as_it_may() {
    let _alone = alone();
    let limit = fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
    // Its own are some hundreds.
    let count = (limit.trim().parse::<usize>().unwrap() - 1500).min(100_000);
    let Some(crowd) = Crowd::start("regions", count) else { return };
    crowd.watched(1);
}
