//! loopguard on an axum server: polls and requests with nothing rebuilt, in a binary with symbols and in a stripped one.

mod support;

use std::{
    env, fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

use support::{Events, PATIENCE, Watching, alone, can_trace, free_port, wait_until_up};

/// Long enough that nothing a healthy server does comes near it, on any machine.
const BLOCK_MS: u32 = 300;
const THRESHOLD: &str = "150ms";
const BLOCKERS: [&str; 7] = ["sleep", "spin", "mutex", "file", "socket", "dns", "between"];

/// The bench's server, built once and for all tests with the workspace's own cargo.
fn server_binary() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let status = Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--release", "--package", "bench-axum", "--bin", "bench-axum"])
            .current_dir(workspace)
            .status()
            .unwrap();
        assert!(status.success(), "the axum server does not build");
        let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace.join("target"), PathBuf::from);
        target.join("release/bench-axum")
    })
}

/// A copy without any symbol.
fn stripped(folder: &Path) -> PathBuf {
    let copy = folder.join(format!("bench-axum-stripped-{}", std::process::id()));
    fs::copy(server_binary(), &copy).unwrap();
    assert!(Command::new("strip").arg(&copy).status().unwrap().success());
    copy
}

struct Server {
    child: Child,
    port: u16,
}

impl Server {
    fn start(binary: &Path, runtime: &str) -> Self {
        let port = free_port();
        let mut child = Command::new(binary).args([runtime, &port.to_string()]).stdin(Stdio::null()).spawn().unwrap();
        wait_until_up(&mut child, port);
        Self { child, port }
    }

    /// Sends one request in as many pieces as there are, and waits for its answer.
    fn send(&self, pieces: &[&str]) -> String {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        for piece in pieces {
            stream.write_all(piece.as_bytes()).unwrap();
            thread::sleep(Duration::from_millis(20));
        }
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        answer
    }

    fn get(&self, path: &str, id: &str) {
        self.send(&[&format!("GET {path} HTTP/1.1\r\nhost: t\r\nx-request-id: {id}\r\nconnection: close\r\n\r\n")]);
    }

    /// Harmless requests until the places where polls end are known on all workers.
    fn warm_up(&self) {
        for n in 0..40 {
            thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| self.get("/ok/sleep/1", &format!("warm-{n}")));
                }
            });
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn ids(block: &serde_json::Value) -> Vec<&str> {
    block["requests"].as_array().unwrap().iter().map(|request| request["id"].as_str().unwrap()).collect()
}

fn assert_culprits(events: &Events, context: &str) {
    for kind in BLOCKERS {
        let id = format!("block-{kind}");
        let named: Vec<_> = events.blocks_of(&id).collect();
        assert_eq!(named.len(), 1, "{context}: {id}: {:#?}", events.lines);
        assert_eq!(named[0]["attribution"], "exact", "{context}: {:#}", named[0]);
        assert_eq!(named[0]["how"], "http-recv", "{context}");
        assert_eq!(named[0]["runtime"], "tokio", "{context}");
        assert_eq!(named[0]["requests"][0]["path"], format!("/block/{kind}/{BLOCK_MS}"), "{context}");
    }
    for block in events.blocks().filter(|block| block["verdict"] != "host") {
        for id in ids(block) {
            assert!(id.starts_with("block-"), "{context}: {id} is blamed: {block:#}");
        }
    }
    events.assert_parts_add_up();
    assert_eq!(events.summary()["lost_records"], 0, "{context}");
}

#[test]
fn every_poll_that_blocks_is_named_with_its_request() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    let stripped = stripped(Path::new(env!("CARGO_TARGET_TMPDIR")));
    for (binary, runtime) in
        [(server_binary(), "multi"), (server_binary(), "current"), (&stripped, "spawned"), (&stripped, "current")]
    {
        let context = format!("{} {runtime}", binary.display());
        let server = Server::start(binary, runtime);
        let watching = Watching::start(server.child.id(), &["--threshold", THRESHOLD]);
        assert!(watching.messages().contains("tokio, tokio 1."), "{context}: {}", watching.messages());
        server.warm_up();
        for kind in BLOCKERS {
            thread::scope(|scope| {
                scope.spawn(|| server.get("/ok/sleep/20", &format!("fine-{kind}")));
                scope.spawn(|| server.get(&format!("/block/{kind}/{BLOCK_MS}"), &format!("block-{kind}")));
            });
        }
        // What gives the worker back, or runs elsewhere, blocks nobody.
        server.get(&format!("/ok/pool/{BLOCK_MS}"), "fine-pool");
        server.get(&format!("/ok/sleep/{BLOCK_MS}"), "fine-sleep");
        server.get(&format!("/ok/in-place/{BLOCK_MS}"), "fine-in-place");
        assert_culprits(&watching.stop(), &context);
    }
    fs::remove_file(stripped).unwrap();
}

/// From the first moment on, when no poll was ever seen and nobody knows where its threads park.
#[test]
fn a_worker_that_was_given_away_is_not_blocked() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    let server = Server::start(server_binary(), "multi");
    let watching = Watching::start(server.child.id(), &["--threshold", THRESHOLD]);
    for n in 0..20 {
        thread::scope(|scope| {
            for client in 0..3 {
                let server = &server;
                // Not all back in the pool at once: a thread that then waits for the pool's lock, and was never seen to
                // park, may be taken for one that parks.
                let ms = BLOCK_MS + 50 * client;
                scope.spawn(move || server.get(&format!("/ok/in-place/{ms}"), &format!("away-{n}-{client}")));
            }
        });
    }
    server.get(&format!("/block/sleep/{BLOCK_MS}"), "block");
    // What is held back is told once its worker parks again, which may take it another turn.
    for n in 0..20 {
        server.get("/ok/sleep/1", &format!("after-{n}"));
    }
    let events = watching.stop();
    let blocks: Vec<_> = events.blocks().filter(|block| block["verdict"] != "host").collect();
    assert_eq!(blocks.len(), 1, "{blocks:#?}");
    assert!(ids(blocks[0]).iter().all(|id| *id == "block"), "{:#}", blocks[0]);
}

#[test]
fn the_right_one_of_several_requests_on_a_connection_is_named() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    let server = Server::start(server_binary(), "current");
    let watching = Watching::start(server.child.id(), &["--threshold", THRESHOLD]);
    server.warm_up();
    let request = |method: &str, path: &str, id: &str, rest: &str| {
        format!("{method} {path} HTTP/1.1\r\nhost: t\r\nx-request-id: {id}\r\n{rest}\r\n")
    };
    // All at once: only the second blocks.
    let all = [
        request("GET", "/hello", "first", ""),
        request("GET", &format!("/block/sleep/{BLOCK_MS}"), "second", ""),
        request("GET", "/hello", "third", "connection: close\r\n"),
    ]
    .concat();
    server.send(&[&all]);
    // In pieces: the head is split, and the body looks like a request.
    let body = request("GET", "/innocent", "innocent", "");
    let close = format!("content-length: {}\r\nconnection: close\r\n", body.len());
    let upload = request("POST", &format!("/block/file/{BLOCK_MS}"), "upload", &close);
    server.send(&[&upload[..9], &upload[9..40], &upload[40..], &body]);
    let events = watching.stop();
    for id in ["second", "upload"] {
        assert_eq!(events.blocks_of(id).count(), 1, "{id}: {:#?}", events.lines);
    }
    // A machine that is short of processors holds up whoever runs: that is said as such.
    for block in events.blocks().filter(|block| block["verdict"] != "host") {
        assert!(ids(block).iter().all(|id| ["second", "upload"].contains(id)), "{block:#}");
    }
}

/// How long it takes to place and to remove two hundred probes, on functions of the server that have nothing to do with
/// tasks; prints it. Not part of every run: the figure is the machine's.
#[test]
#[ignore = "measures"]
fn two_hundred_places_are_probed_quickly() {
    use loopguard::{
        runtime::{
            elf::{self, Image},
            probe_site::{ProbeSite, entry_block_site, function_starts},
            tokio::PollSite,
        },
        source::kernel::{Kernel, Pace, Talk},
    };
    let _alone = alone();
    if !can_trace() {
        return;
    }
    let server = Server::start(server_binary(), "multi");
    let pid = server.child.id();
    let image =
        Image::open(pid, server_binary().canonicalize().unwrap().to_str().unwrap(), &elf::mappings(pid).unwrap())
            .unwrap();
    let sites: Vec<PollSite> = function_starts(&image)
        .unwrap()
        .into_iter()
        .filter_map(|start| {
            let (distance, instruction) = entry_block_site(&image.bytes_at(start, 256)?, start).ok()?;
            let offset = image.file_offset(start + distance)?;
            let site = ProbeSite { file: image.opened.clone(), offset, instruction };
            Some(PollSite { site, task: 0, id_offset: 0, stack_down: 0 })
        })
        .take(200)
        .collect();
    assert_eq!(sites.len(), 200);
    let pace = Pace {
        threshold_ns: 1_000_000_000,
        capture_age_ns: 1_000_000_000,
        stack_pages: 1,
        sample_every_ns: None,
        short: loopguard_common::short::ShortPace::default(),
    };
    let (mut kernel, _rings) = Kernel::load(pace, Talk::Silent).unwrap();
    kernel.mark_polls(pid, &sites[..1], &[]).unwrap();
    kernel.unmark_polls(pid);
    let started = Instant::now();
    kernel.mark_polls(pid, &sites, &[]).unwrap();
    let placed = started.elapsed();
    drop(kernel);
    println!("200 probes placed in {placed:?}, removed in {:?}", started.elapsed() - placed);
    server.get("/hello", "alive");
}

/// Without symbols nothing says where tokio counts its tasks: new tasks show it.
#[test]
fn a_task_that_a_request_spawned_is_linked_to_it_without_symbols() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    let stripped = stripped(Path::new(env!("CARGO_TARGET_TMPDIR")));
    for runtime in ["multi", "current"] {
        let server = Server::start(&stripped, runtime);
        let watching = Watching::start(server.child.id(), &["--threshold", THRESHOLD]);
        server.warm_up();
        let spawned: Vec<String> = (0..6).map(|n| format!("spawned-{n}")).collect();
        for id in &spawned {
            server.get(&format!("/block/spawned/{BLOCK_MS}"), id);
        }
        let events = watching.stop();
        for id in &spawned[3..] {
            let linked: Vec<_> = events.blocks_of(id).collect();
            assert_eq!(linked.len(), 1, "{runtime}: {id}: {:#?}", events.lines);
            assert_eq!(linked[0]["attribution"], "inferred", "{runtime}: {:#}", linked[0]);
        }
        for block in events.blocks().filter(|block| block["verdict"] != "host") {
            assert!(ids(block).iter().all(|id| id.starts_with("spawned-")), "{runtime}: {block:#}");
        }
    }
    fs::remove_file(stripped).unwrap();
}

#[test]
fn a_binary_that_was_replaced_on_disk_is_read_as_it_runs() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    let copy = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("bench-axum-replaced-{}", std::process::id()));
    fs::copy(server_binary(), &copy).unwrap();
    let server = Server::start(&copy, "current");
    fs::remove_file(&copy).unwrap();
    fs::write(&copy, "something else").unwrap();
    let watching = Watching::start(server.child.id(), &["--threshold", THRESHOLD]);
    server.warm_up();
    server.get(&format!("/block/sleep/{BLOCK_MS}"), "block-sleep");
    let events = watching.stop();
    assert_eq!(events.blocks_of("block-sleep").count(), 1, "{:#?}", events.lines);
    fs::remove_file(&copy).unwrap();
}

/// A program that blocks its loop when it is asked to, with nothing in it that tells tasks or requests: `said` is what
/// loopguard says of it.
fn assert_blocks_without_names(binary: &Path, said: &[&str]) {
    let port = free_port();
    let mut server = Server { child: Command::new(binary).arg(port.to_string()).spawn().unwrap(), port };
    wait_until_up(&mut server.child, port);
    let watching = Watching::start(server.child.id(), &["--threshold", THRESHOLD]);
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(&[(BLOCK_MS / 10) as u8]).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "done");
    let events = watching.stop();
    for part in said {
        assert!(events.messages.contains(part), "{part:?} is not said: {}", events.messages);
    }
    let blocks: Vec<_> = events.blocks().filter(|block| block["verdict"] != "host").collect();
    assert_eq!(blocks.len(), 1, "{:#?}", events.lines);
    assert_eq!(blocks[0]["runtime"], "epoll", "{:#}", blocks[0]);
    assert_eq!(blocks[0]["requests"], serde_json::json!([]), "{:#}", blocks[0]);
    assert_eq!(blocks[0]["how"], "none", "{:#}", blocks[0]);
    events.assert_parts_add_up();
    assert_eq!(events.summary()["lost_records"], 0);
}

#[test]
fn a_loop_without_tokio_is_watched_by_its_ticks() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs/plain_epoll.rs");
    let binary = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("plain-epoll-{}", std::process::id()));
    let rustc = env::var_os("RUSTC").unwrap_or("rustc".into());
    let built = Command::new(rustc).args(["--edition=2024", "-O", "-o"]).args([&binary, &source]).status().unwrap();
    assert!(built.success(), "the server does not build");
    assert_blocks_without_names(&binary, &["no Python, no tokio"]);
    fs::remove_file(binary).unwrap();
}

#[test]
fn a_tokio_that_is_too_old_is_said_to_be_so() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs/old_tokio/Cargo.toml");
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("old-tokio");
    let built = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--release", "--locked", "--manifest-path"])
        .arg(manifest)
        .arg("--target-dir")
        .arg(&target)
        .status()
        .unwrap();
    assert!(built.success(), "the server does not build");
    assert_blocks_without_names(&target.join("release/old-tokio"), &["tokio 0.2.25", "1.23 or newer"]);
}
