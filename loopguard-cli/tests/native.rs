//! Native stacks of real programs: the functions, the lines, and what each wait waits on.

mod support;

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use support::{Watching, alone, can_trace, pythons};

const WATCH_FOR: Duration = Duration::from_secs(4);

/// The line that ends in `// line: NAME`, or `#` for Python.
fn marked_line(source: &str, comment: &str, name: &str) -> u64 {
    let mark = format!("{comment} line: {name}");
    source.lines().position(|line| line.ends_with(&mark)).unwrap_or_else(|| panic!("{mark}")) as u64 + 1
}

fn frames(block: &Value) -> &[Value] {
    block["stack"].as_array().unwrap()
}

fn function(frame: &Value) -> &str {
    frame["function"].as_str().unwrap()
}

/// Whether the functions of these names, at these lines, follow each other in the stack, innermost first.
fn has_lines(block: &Value, expected: &[(&str, u64)]) -> bool {
    let mut frames = frames(block).iter();
    expected.iter().all(|(name, line)| frames.any(|frame| function(frame).ends_with(name) && frame["line"] == *line))
}

fn on(block: &Value) -> Vec<&str> {
    block["waits"].as_array().unwrap().iter().filter_map(|wait| wait["on"].as_str()).collect()
}

mod target {
    //! An event loop in Rust that blocks in known lines.

    use super::*;

    const BLOCK: Duration = Duration::from_millis(60);

    #[inline(always)]
    fn inlined_sleep() {
        thread::sleep(BLOCK); // line: inlined_sleep
    }

    #[inline(never)]
    fn sleeps() {
        inlined_sleep(); // line: sleeps
        std::hint::black_box(());
    }

    #[inline(always)]
    fn inlined_spin(end: Instant) {
        while Instant::now() < end {
            std::hint::spin_loop();
        }
    }

    #[inline(never)]
    fn spins() {
        inlined_spin(Instant::now() + BLOCK); // line: spins
        std::hint::black_box(());
    }

    /// Below more of the stack than is copied of a thread for which that is always enough.
    #[inline(never)]
    fn spins_deeply() {
        let mut buffer = [1u8; 40 << 10];
        std::hint::black_box(&mut buffer);
        inlined_spin(Instant::now() + BLOCK); // line: spins_deeply
        std::hint::black_box(&mut buffer);
    }

    #[inline(never)]
    fn reads(address: std::net::SocketAddr) {
        let mut peer = TcpStream::connect(address).unwrap();
        let _ = peer.read(&mut [0]); // line: reads
    }

    #[inline(never)]
    fn locks(mutex: usize) {
        // SAFETY: the mutex lives as long as the process, and is unlocked by the thread that locked it.
        unsafe {
            libc::pthread_mutex_lock(mutex as *mut libc::pthread_mutex_t); // line: locks
            libc::pthread_mutex_unlock(mutex as *mut libc::pthread_mutex_t);
        }
    }

    pub fn run() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            for connection in listener.incoming() {
                thread::sleep(BLOCK);
                drop(connection);
            }
        });
        let mutex = Box::into_raw(Box::new(libc::PTHREAD_MUTEX_INITIALIZER)) as usize;
        thread::Builder::new()
            .name("owner".to_owned())
            .spawn(move || {
                loop {
                    // SAFETY: as above.
                    unsafe { libc::pthread_mutex_lock(mutex as *mut libc::pthread_mutex_t) };
                    thread::sleep(BLOCK);
                    // SAFETY: as above.
                    unsafe { libc::pthread_mutex_unlock(mutex as *mut libc::pthread_mutex_t) };
                    thread::sleep(Duration::from_millis(1));
                }
            })
            .unwrap();
        // SAFETY: plain system calls.
        let epoll = unsafe { libc::epoll_create1(0) };
        println!("{}", address.port());
        loop {
            for work in [&sleeps as &dyn Fn(), &spins, &spins_deeply, &|| reads(address), &|| locks(mutex)] {
                let mut event = libc::epoll_event { events: 0, u64: 0 };
                // SAFETY: one valid entry.
                unsafe { libc::epoll_wait(epoll, &mut event, 1, 5) };
                work();
            }
        }
    }
}

/// Not a test: what the next one watches.
#[test]
#[ignore = "runs until it is ended, for the test that watches it"]
fn the_target() {
    target::run();
}

#[test]
fn lines_of_rust_are_right_and_inlined_functions_are_shown() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "the_target", "--nocapture"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut says = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let port: u16 = says.find_map(|line| line.trim().parse().ok()).unwrap();
    let watching = Watching::start(child.id(), &["--threshold", "20ms"]);
    thread::sleep(WATCH_FOR);
    let events = watching.stop();
    child.kill().unwrap();
    child.wait().unwrap();

    let line = |name: &str| marked_line(include_str!("native.rs"), "//", name);
    let is_whole = |block: &&Value| block["stack_incomplete"].is_null() && !frames(block).is_empty();
    let blocks: Vec<&Value> = events.blocks().filter(is_whole).collect();
    // Line tables have the names of what was inlined, but not the modules.
    let inlined = if cfg!(debug_assertions) { "target::inlined_sleep" } else { "inlined_sleep" };
    for (expected, waits_on) in [
        (&[(inlined, line("inlined_sleep")), ("target::sleeps", line("sleeps"))][..], None),
        (&[("target::spins", line("spins"))], None),
        (&[("target::spins_deeply", line("spins_deeply"))], None),
        (&[("target::reads", line("reads"))], Some(format!("127.0.0.1:{port}"))),
        (&[("target::locks", line("locks"))], Some("mutex held by thread owner (tid ".to_owned())),
    ] {
        let found: Vec<_> = blocks.iter().filter(|block| has_lines(block, expected)).collect();
        assert!(!found.is_empty(), "{expected:?}: {:#?}", events.lines);
        let Some(waits_on) = waits_on else { continue };
        assert!(found.iter().any(|block| on(block).iter().any(|on| on.starts_with(&waits_on))), "{found:#?}");
    }
    for block in &blocks {
        // From the thread's start on.
        let last = function(frames(block).last().unwrap());
        assert!(last.contains("clone"), "{last}: {block:#}");
        for frame in frames(block).iter().filter(|frame| function(frame).contains("::target::")) {
            assert_eq!(frame["origin"], "user", "{frame}");
        }
    }
    let stacks = &events.summary()["stacks"];
    let (complete, unwound) = (stacks["complete"].as_f64().unwrap(), stacks["unwound"].as_f64().unwrap());
    // Until it is known how deep the thread's stack is; how many those are is up to the machine.
    let reasons = stacks["incomplete"].as_object().unwrap().keys();
    assert!(reasons.clone().all(|why| why.starts_with("the stack is larger than what was copied")), "{stacks}");
    assert!(complete >= 0.8 * unwound, "{stacks}");
}

#[test]
fn python_and_native_frames_are_one_stack_and_waits_say_on_what() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs/waits.py");
    for python in pythons() {
        let mut child =
            Command::new(&python).arg(&program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut says = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        let port = says.next().unwrap();
        let watching = Watching::start(child.id(), &["--threshold", "20ms"]);
        thread::sleep(WATCH_FOR);
        let events = watching.stop();
        child.stdin.take().unwrap().flush().unwrap();
        let _ = child.wait();

        let context = python.display();
        let line = |name: &str| marked_line(include_str!("programs/waits.py"), "#", name);
        for (name, inside, waits_on) in [
            ("sleeps", "clock_nanosleep", None),
            ("sleeps_again", "clock_nanosleep", None),
            ("hashes", "PKCS5_PBKDF2_HMAC", None),
            ("reads_socket", "recvfrom", Some(format!("127.0.0.1:{port}"))),
            ("waits_for_child", "wait4", Some("child sleep (pid ".to_owned())),
            ("waits_for_lock", "futex", Some("lock or condition at ".to_owned())),
            ("waits_for_gil", "", Some("GIL held by thread ".to_owned())),
        ] {
            let found: Vec<_> = events.blocks().filter(|block| has_lines(block, &[(name, line(name))])).collect();
            assert!(!found.is_empty(), "{context}: {name}: {:#?}", events.lines);
            // What the line called stands inside it, what the interpreter was started by outside.
            let is_joined = |block: &&&Value| {
                let at = frames(block).iter().position(|frame| function(frame) == name).unwrap();
                let (inner, outer) = frames(block).split_at(at);
                inner.iter().any(|frame| function(frame).contains(inside) && frame["kind"] == "native")
                    && outer.iter().any(|frame| function(frame).contains("libc_start"))
                    && frames(block).iter().all(|frame| function(frame) != "_PyEval_EvalFrameDefault")
            };
            let joined = found.iter().filter(is_joined).count();
            assert!(
                joined > 0 && (name != "sleeps_again" || joined > found.len() / 2),
                "{context}: {name}: {found:#?}"
            );
            if let Some(waits_on) = waits_on {
                let told = found.iter().any(|block| on(block).iter().any(|on| on.starts_with(&waits_on)));
                assert!(told, "{context}: {waits_on}: {found:#?}");
            }
            if name == "waits_for_gil" {
                let holder = format!("at waits.py:{} crunch", line("crunch"));
                assert!(found.iter().any(|block| on(block).iter().any(|on| on.contains(&holder))), "{found:#?}");
                for block in found {
                    // A machine without a free processor makes everybody wait: then that is the larger part.
                    let (gil, queue) = (block["gil_ms"].as_f64().unwrap(), block["run_queue_ms"].as_f64().unwrap());
                    assert!(block["verdict"] == "gil" || queue > gil / 2.0, "{context}: {block:#}");
                }
            }
        }
    }
}
