//! Servers of several processes: every worker is found, numbered, and blamed for nothing but its own.

mod support;

use std::{
    collections::{HashMap, HashSet},
    fs,
    io::Write as _,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use support::{Events, PATIENCE, Watching, alone, can_trace, free_port, listens, pythons, signal, try_request};

const THRESHOLD_MS: u64 = 50;
/// From here on a block must be found, however it is cut at the threshold.
const CERTAIN_NS: u64 = 60_000_000;

/// A server with several workers, and what they say they did.
struct Workers {
    child: Child,
    port: u16,
    truth: PathBuf,
}

/// One block, by the worker's own account.
#[derive(Debug)]
struct TrueBlock {
    pid: u64,
    /// None: while the worker started.
    id: Option<String>,
    begin_ns: u64,
    /// None: the worker did not live to see it.
    end_ns: Option<u64>,
}

impl Workers {
    fn gunicorn(python: &Path, count: u32) -> Self {
        let count = count.to_string();
        let arguments = ["-m", "gunicorn", "-k", "uvicorn.workers.UvicornWorker", "-w", &count, "--log-level", "error"];
        let mut command = Command::new(python);
        command.args(arguments).arg("-b").stdin(Stdio::null());
        Self::start(command, |port| format!("127.0.0.1:{port}"))
    }

    /// A process that becomes the server when [`go`](Self::go) says so.
    fn uvicorn_to_be(python: &Path, arguments: &[&str]) -> Self {
        let mut command = Command::new("sh");
        command.args(["-c", "read -r go; exec \"$@\"", "sh"]).arg(python).args([
            "-m",
            "uvicorn",
            "--log-level",
            "error",
        ]);
        command.args(arguments).arg("--port").stdin(Stdio::piped());
        Self::start(command, |port| port.to_string())
    }

    fn go(&mut self) {
        self.child.stdin.take().unwrap().write_all(b"\n").unwrap();
    }

    /// `command` ends with the option that takes what `at` makes of the port.
    fn start(mut command: Command, at: impl Fn(u16) -> String) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let truth = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{}-{number}.truth", std::process::id()));
        let _ = fs::remove_file(&truth);
        let port = free_port();
        let child = command
            .args([&at(port), "workers:app"])
            .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/servers"))
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("TRUTH", &truth)
            .spawn()
            .unwrap();
        Self { child, port, truth }
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    fn wait_until_up(&mut self) {
        let started = Instant::now();
        while !listens(self.port) || self.pids().is_empty() {
            assert!(self.child.try_wait().unwrap().is_none(), "the server ended");
            assert!(started.elapsed() < PATIENCE, "the server does not come up");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until so many workers in all have started.
    fn wait_for_workers(&self, count: usize) {
        let started = Instant::now();
        while self.truth().iter().filter(|block| block.id.is_none() && block.end_ns.is_some()).count() < count {
            assert!(started.elapsed() < PATIENCE, "the workers do not start: {:#?}", self.truth());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Whether the server answered.
    fn get(&self, path: &str, id: &str) -> bool {
        let text = format!("GET {path} HTTP/1.1\r\nhost: test\r\nx-request-id: {id}\r\nconnection: close\r\n\r\n");
        try_request(self.port, &text).is_ok_and(|answer| answer.starts_with("HTTP/1.1 200"))
    }

    fn truth(&self) -> Vec<TrueBlock> {
        let mut blocks: Vec<TrueBlock> = Vec::new();
        for line in fs::read_to_string(&self.truth).unwrap_or_default().lines() {
            let Ok(line) = serde_json::from_str::<Value>(line) else { continue };
            let (pid, id) = (line["pid"].as_u64().unwrap(), line["id"].as_str().map(str::to_owned));
            match (line["begin"].as_u64(), line["end"].as_u64()) {
                (Some(begin_ns), _) => blocks.push(TrueBlock { pid, id, begin_ns, end_ns: None }),
                (None, end_ns) => {
                    blocks.iter_mut().rfind(|block| (block.pid, &block.id) == (pid, &id)).unwrap().end_ns = end_ns;
                }
            }
        }
        blocks
    }

    /// The workers there have been.
    fn pids(&self) -> HashSet<u64> {
        self.truth().iter().map(|block| block.pid).collect()
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        // The server ends its workers.
        if self.child.try_wait().unwrap().is_none() {
            signal(self.pid(), libc::SIGTERM);
        }
        let started = Instant::now();
        while self.child.try_wait().unwrap().is_none() {
            if started.elapsed() > Duration::from_secs(10) {
                let _ = self.child.kill();
                break;
            }
            thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.wait();
        for pid in self.pids() {
            // SAFETY: a worker of this test, if it still lives.
            unsafe { libc::kill(pid as i32, libc::SIGKILL) };
        }
    }
}

/// Every certain block of `truth` is in the report of its own worker, under its own request; and whoever is reported
/// did block, there and then.
fn assert_owned(events: &Events, truth: &[TrueBlock], since_ns: u64) {
    let reported: Vec<Reported> = events.blocks().map(Reported::of).collect();
    for block in truth.iter().filter(|block| block.begin_ns >= since_ns) {
        let Some(end_ns) = block.end_ns else { continue };
        if end_ns - block.begin_ns < CERTAIN_NS {
            continue;
        }
        let same = |line: &&Reported| {
            line.pid == block.pid && line.overlap(block.begin_ns, end_ns) * 10 >= (end_ns - block.begin_ns) * 8
        };
        let found: Vec<_> = reported.iter().filter(same).collect();
        let owned = found.iter().any(|line| line.ids == block.id.iter().map(String::as_str).collect::<Vec<_>>());
        // A block that hardly got a processor met no sample: that is said, and blamed on nobody.
        let starved = found.iter().any(|line| line.line["verdict"] == "host" && line.line["attribution"] == "unknown");
        assert!(owned || starved, "{block:?} is reported as {found:#?}; {}", events.messages);
    }
    let by_id: HashMap<&str, &TrueBlock> =
        truth.iter().filter_map(|block| Some((block.id.as_deref()?, block))).collect();
    for line in &reported {
        for id in &line.ids {
            // A machine that is short of processors holds up whoever runs: that is said as such.
            if line.line["verdict"] == "host" && !by_id.contains_key(id) {
                continue;
            }
            let block = by_id.get(id).unwrap_or_else(|| panic!("{id} did not block: {:#}", line.line));
            assert_eq!(line.pid, block.pid, "the wrong worker: {:#}", line.line);
            assert!(
                line.overlap(block.begin_ns, block.end_ns.unwrap_or(u64::MAX)) > 0,
                "another time: {:#}",
                line.line
            );
        }
    }
    events.assert_parts_add_up();
    assert_eq!(events.summary()["lost_records"], 0, "{}", events.messages);
}

#[derive(Debug)]
struct Reported<'a> {
    line: &'a Value,
    pid: u64,
    start_ns: u64,
    end_ns: u64,
    ids: Vec<&'a str>,
}

impl<'a> Reported<'a> {
    fn of(line: &'a Value) -> Self {
        let ns = |field: &str| line[field].as_u64().unwrap();
        let requests = line["requests"].as_array().unwrap();
        let ids = requests.iter().map(|request| request["id"].as_str().unwrap()).collect();
        Self { line, pid: ns("pid"), start_ns: ns("t_start_ns"), end_ns: ns("t_end_ns"), ids }
    }

    fn overlap(&self, start_ns: u64, end_ns: u64) -> u64 {
        self.end_ns.min(end_ns).saturating_sub(self.start_ns.max(start_ns))
    }
}

/// Clients that send one request after the other until the end of `during`: one of three blocks.
fn under_load<T>(server: &Workers, during: impl FnOnce() -> T) -> T {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        for client in 0..6 {
            let over = &over;
            scope.spawn(move || {
                for number in 0.. {
                    if over.load(Ordering::Relaxed) {
                        return;
                    }
                    let kind = (client + number) % 6;
                    let path = match kind {
                        0 => "/block/sleep/80",
                        1 => "/block/cpu/70",
                        _ => "/fine/x",
                    };
                    // A worker that ends may refuse it.
                    server.get(path, &format!("c{client}-{number}"));
                    thread::sleep(Duration::from_millis(20));
                }
            });
        }
        let outcome = during();
        over.store(true, Ordering::Relaxed);
        outcome
    })
}

#[test]
fn every_block_of_every_worker_is_its_own() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    let Some(python) = pythons().into_iter().next_back() else { return };
    let mut server = Workers::gunicorn(&python, 4);
    server.wait_until_up();
    server.wait_for_workers(4);
    let first: Vec<u64> = server.pids().into_iter().collect();
    let mut watching = Watching::start(server.pid(), &["--threshold", &format!("{THRESHOLD_MS}ms")]);
    watching.wait_for_loops(4);
    let since_ns = loopguard::source::process::monotonic_ns();
    let killed = under_load(&server, || {
        thread::sleep(Duration::from_secs(2));
        // One dies in the middle of whatever it does, and is replaced.
        let killed = first[0];
        signal(killed as u32, libc::SIGKILL);
        server.wait_for_workers(5);
        thread::sleep(Duration::from_secs(2));
        // And then all are replaced.
        signal(server.pid(), libc::SIGHUP);
        server.wait_for_workers(9);
        thread::sleep(Duration::from_secs(2));
        killed
    });
    let events = watching.stop();
    let truth = server.truth();
    assert_owned(&events, &truth, since_ns);
    let pids: HashSet<u64> = events.blocks().map(|block| block["pid"].as_u64().unwrap()).collect();
    assert!(server.pids().iter().all(|pid| pids.contains(pid)), "blocks of all nine workers: {pids:?}");
    let names: HashSet<&str> = events.blocks().filter_map(|block| block["worker"].as_str()).collect();
    assert!(names.iter().any(|name| name.starts_with("worker 4 of ")), "{names:?}");
    // The end of the one that was killed ended its block too, if it was in one.
    for cut in truth.iter().filter(|block| block.end_ns.is_none()) {
        assert_eq!(cut.pid, killed, "{cut:?}");
        eprintln!("killed in the middle of {cut:?}");
    }
}

#[test]
fn a_worker_that_is_killed_in_a_block_leaves_the_block() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    let Some(python) = pythons().into_iter().next() else { return };
    let mut server = Workers::gunicorn(&python, 2);
    server.wait_until_up();
    server.wait_for_workers(2);
    let mut watching = Watching::start(server.pid(), &["--threshold", "50ms"]);
    watching.wait_for_loops(2);
    for (kind, id) in [("sleep", "stuck-asleep"), ("cpu", "stuck-spinning")] {
        thread::scope(|scope| {
            let client = scope.spawn(|| server.get(&format!("/block/{kind}/20000"), id));
            let started = Instant::now();
            let stuck = loop {
                if let Some(block) = server.truth().into_iter().find(|block| block.id.as_deref() == Some(id)) {
                    break block;
                }
                assert!(started.elapsed() < PATIENCE);
                thread::sleep(Duration::from_millis(10));
            };
            thread::sleep(Duration::from_millis(700));
            signal(stuck.pid as u32, libc::SIGKILL);
            assert!(!client.join().unwrap());
        });
        thread::sleep(Duration::from_millis(500));
    }
    let events = watching.stop();
    for (id, function) in [("stuck-asleep", "block_sleep"), ("stuck-spinning", "block_cpu")] {
        let blocks: Vec<_> = events.blocks_of(id).collect();
        assert_eq!(blocks.len(), 1, "{id}: {:#?}", events.lines);
        assert!(blocks[0]["duration_ms"].as_f64().unwrap() >= 650.0, "{id}: {:#}", blocks[0]);
        assert!(support::line_of(blocks[0], function).is_some(), "{id}: {:#}", blocks[0]);
    }
}

#[test]
fn workers_that_run_their_own_program_are_found_too() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    let Some(python) = pythons().into_iter().next_back() else { return };
    // `uvicorn --workers` starts its workers afresh instead of forking them, beside a helper that is none.
    let mut server = Workers::uvicorn_to_be(&python, &["--workers", "2", "--loop", "asyncio"]);
    let mut watching = Watching::before_polls(server.pid(), &["--threshold", "50ms"]);
    server.go();
    server.wait_until_up();
    server.wait_for_workers(2);
    watching.wait_for_loops(2);
    for number in 0..8 {
        assert!(server.get("/block/sleep/120", &format!("first-{number}")));
    }
    // The server itself is the last to be gone, and that ends loopguard.
    signal(server.pid(), libc::SIGTERM);
    support::wait(&mut server.child);
    let events = watching.ended();
    assert_owned(&events, &server.truth(), 0);
    assert!(events.messages.contains("(worker 2 of 2)"), "{}", events.messages);
    assert!(events.messages.contains("ended"), "{}", events.messages);
}

#[test]
fn a_loop_that_was_not_there_yet_is_watched_from_its_first_tick() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    for python in pythons() {
        let program = "import asyncio, time\nasync def main():\n    time.sleep(0.3)\n    await asyncio.sleep(1)\ninput()\nasyncio.run(main())";
        let mut child = Command::new(&python).args(["-c", program]).stdin(Stdio::piped()).spawn().unwrap();
        let watching = Watching::before_polls(child.id(), &["--threshold", "50ms"]);
        child.stdin.take().unwrap().write_all(b"\n").unwrap();
        let events = watching.ended();
        support::wait(&mut child);
        let blocks: Vec<_> = events.blocks().collect();
        let [block] = blocks[..] else { panic!("{:#?}; {}", events.lines, events.messages) };
        assert!(block["duration_ms"].as_f64().unwrap() >= 300.0, "{block:#}");
        assert!(support::line_of(block, "main").is_some(), "{block:#}");
        assert_eq!(events.summary()["threads"][0]["runtime"], "asyncio", "{}", events.messages);
    }
}

#[test]
fn a_server_is_found_by_its_name_also_when_it_starts_again() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    let Some(python) = pythons().into_iter().next_back() else { return };
    // A name that nothing else on this machine has.
    let name = format!("served-{}", std::process::id());
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(&name);
    fs::write(&program, "import asyncio, sys, time\n\nasync def main():\n    while True:\n        await asyncio.sleep(0.05)\n        time.sleep(0.1)\n\nasyncio.run(main())\n").unwrap();
    let start = || Command::new(&python).arg(&program).spawn().unwrap();
    let (mut first, mut bystander) =
        (start(), Command::new(&python).args(["-c", "input()"]).stdin(Stdio::piped()).spawn().unwrap());
    thread::sleep(Duration::from_millis(300));
    let mut watching = Watching::with(&["--name", &name, "--threshold", "50ms"]);
    watching.wait_for_loops(1);
    let mut second = start();
    watching.wait_for_loops(2);
    thread::sleep(Duration::from_millis(500));
    let events = watching.stop();
    let pids: HashSet<u64> = events.blocks().map(|block| block["pid"].as_u64().unwrap()).collect();
    assert_eq!(pids, HashSet::from([u64::from(first.id()), u64::from(second.id())]), "{}", events.messages);
    for child in [&mut first, &mut second, &mut bystander] {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    fs::remove_file(&program).unwrap();
}

/// loopguards that are killed in the middle of whatever they do; 200 of them by LOOPGUARD_CYCLES=200.
const CYCLES: u32 = 12;

#[test]
fn a_loopguard_that_is_killed_at_any_moment_leaves_nothing() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    let Some(python) = pythons().into_iter().next_back() else { return };
    let cycles = std::env::var("LOOPGUARD_CYCLES").map_or(CYCLES, |count| count.parse().unwrap());
    let mut server = Workers::gunicorn(&python, 2);
    server.wait_until_up();
    server.wait_for_workers(2);
    let before = kernel_objects();
    let changed = || -> Vec<String> { server.pids().iter().flat_map(|pid| changed_code(*pid)).collect() };
    assert_eq!(changed(), [""; 0]);
    let (served, failed) = (AtomicU32::new(0), AtomicU32::new(0));
    let over = AtomicBool::new(false);
    let serve = || {
        while !over.load(Ordering::Relaxed) {
            let path =
                if served.fetch_add(1, Ordering::Relaxed).is_multiple_of(16) { "/block/cpu/55" } else { "/fine/x" };
            if !server.get(path, "load") {
                failed.fetch_add(1, Ordering::Relaxed);
            }
        }
    };
    let throughput = |time: Duration| {
        let before = served.load(Ordering::Relaxed);
        thread::sleep(time);
        f64::from(served.load(Ordering::Relaxed) - before) / time.as_secs_f64()
    };
    let (first, last) = thread::scope(|scope| {
        (0..2).for_each(|_| drop(scope.spawn(serve)));
        let first = throughput(Duration::from_secs(3));
        // That a probe would be seen.
        let watching = Watching::start(server.pid(), &["--threshold", "50ms"]);
        let started = Instant::now();
        while changed().is_empty() {
            assert!(started.elapsed() < PATIENCE, "no step probe was placed: {}", watching.messages());
            thread::sleep(Duration::from_millis(50));
        }
        watching.kill();
        // Any moment: while it loads, attaches, watches, and while it lets go.
        let mut random = 0x9e37_79b9_u32;
        for cycle in 0..cycles {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let watching = Watching::begin(server.pid(), &["--threshold", "50ms"]);
            thread::sleep(Duration::from_millis(u64::from(random >> 16) % 700));
            if cycle % 4 == 0 {
                signal(watching.pid(), libc::SIGINT);
                thread::sleep(Duration::from_millis(u64::from(random >> 8) % 60));
            }
            watching.kill();
        }
        // What hung on the last one's descriptors goes a little later than it.
        let started = Instant::now();
        while kernel_objects() != before && started.elapsed() < PATIENCE {
            thread::sleep(Duration::from_millis(50));
        }
        let last = throughput(Duration::from_secs(3));
        over.store(true, Ordering::Relaxed);
        (first, last)
    });
    let served = served.into_inner();
    println!("{cycles} cycles, {served} requests; {first:.0} a second before, {last:.0} after");
    assert_eq!(failed.into_inner(), 0, "of {served} requests");
    assert_eq!(kernel_objects(), before, "BPF programs, maps and links");
    assert_eq!(changed(), [""; 0]);
    // A probe left behind would cost every step: a third is more than a busy machine's noise over seconds.
    assert!(last > first * 0.66, "{first} requests a second before, {last} after");
}

/// Mappings of a process whose code is not what stands in their files: a probe replaces an instruction.
fn changed_code(pid: u64) -> Vec<String> {
    let memory = fs::File::open(format!("/proc/{pid}/mem")).unwrap();
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let is_changed = |line: &&str| {
        let mut fields = line.split_whitespace();
        let (range, access, offset, path) = (fields.next(), fields.next(), fields.next(), fields.nth(2));
        let (Some(range), Some("r-xp"), Some(offset), Some(path)) = (range, access, offset, path) else { return false };
        if !path.starts_with('/') {
            return false;
        }
        let number = |text: &str| u64::from_str_radix(text, 16).unwrap();
        let (start, end) = range.split_once('-').unwrap();
        let mut mapped = vec![0; (number(end) - number(start)) as usize];
        memory.read_exact_at(&mut mapped, number(start)).unwrap();
        let mut file = vec![0; mapped.len()];
        // The last page goes on behind the file's end.
        let length = fs::File::open(path).unwrap().read_at(&mut file, number(offset)).unwrap();
        mapped[..length] != file[..length]
    };
    maps.lines().filter(is_changed).map(str::to_owned).collect()
}

/// How many BPF programs, maps and links the kernel has.
fn kernel_objects() -> [usize; 3] {
    // linux/bpf.h: BPF_PROG_GET_NEXT_ID, BPF_MAP_GET_NEXT_ID and BPF_LINK_GET_NEXT_ID; the attribute is the id to start
    // behind, the next id, and flags.
    [11, 12, 31].map(|command: libc::c_int| {
        let (mut ids, mut attribute) = (0, [0u32; 3]);
        loop {
            // SAFETY: the call writes the second word of an attribute of this size.
            let result =
                unsafe { libc::syscall(libc::SYS_bpf, command, attribute.as_mut_ptr(), size_of_val(&attribute)) };
            if result != 0 {
                return ids;
            }
            ids += 1;
            attribute[0] = attribute[1];
        }
    })
}
