//! loopguard on a server that tells of its requests by its own probes: every request has its record, every block its
//! owner, and whatever is not as it should be is bounded and said.

mod support;

use std::{
    collections::BTreeMap,
    env, fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use support::{Events, PATIENCE, Watching, alone, can_trace, pythons, request};

/// Long enough that nothing a healthy server does comes near it, on any machine.
const BLOCK_MS: u32 = 300;
const THRESHOLD: &str = "150ms";

/// The release build of `examples/axum_blocking`.
fn axum() -> Option<PathBuf> {
    let path = env::var_os("LOOPGUARD_TEST_AXUM").map(PathBuf::from);
    assert!(
        path.is_some() || env::var_os("LOOPGUARD_REQUIRE_BPF").is_none_or(|value| value != "1"),
        "LOOPGUARD_REQUIRE_BPF=1, but LOOPGUARD_TEST_AXUM names no server: run `cargo xtask test`"
    );
    if path.is_none() {
        eprintln!("SKIPPED: LOOPGUARD_TEST_AXUM names no server: run `cargo xtask test`");
    }
    path
}

struct Axum {
    child: Child,
    port: u16,
}

impl Axum {
    fn start(program: &Path, arguments: &[&str]) -> Self {
        let folder = env!("CARGO_TARGET_TMPDIR");
        let mut child = Command::new(program)
            .args(["--probes", "--folder", folder])
            .args(arguments)
            .env("RUST_BACKTRACE", "0")
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let port = line.trim().rsplit(':').next().and_then(|port| port.parse().ok()).expect("it says where it listens");
        Self { child, port }
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    fn get(&self, path: &str, id: &str) -> String {
        request(self.port, &asks("GET", path, id))
    }

    /// Sends a request and does not wait for its answer.
    fn open(&self, path: &str, id: &str) -> TcpStream {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.write_all(asks("GET", path, id).as_bytes()).unwrap();
        stream
    }

    /// Keeps all workers busy until loopguard knows each of them.
    fn show_workers(&self, watching: &Watching, count: usize) {
        let started = Instant::now();
        while watching.messages().matches("watching process").count() < count {
            assert!(started.elapsed() < PATIENCE, "workers stay unseen: {}", watching.messages());
            thread::scope(|scope| {
                for _ in 0..2 * count {
                    scope.spawn(|| self.get("/block/sleep/20", "warm-up"));
                }
            });
        }
    }
}

fn asks(method: &str, path: &str, id: &str) -> String {
    format!("{method} {path} HTTP/1.1\r\nhost: test\r\nx-request-id: {id}\r\nconnection: close\r\n\r\n")
}

impl Drop for Axum {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The records of requests by id, without those that warmed up.
fn records(events: &Events) -> BTreeMap<String, Vec<&Value>> {
    let mut records: BTreeMap<String, Vec<&Value>> = BTreeMap::new();
    for record in events.of_type("request").filter(|record| record["id"] != "warm-up") {
        records.entry(record["id"].as_str().unwrap().to_owned()).or_default().push(record);
    }
    records
}

fn number(record: &Value, field: &str) -> f64 {
    record[field].as_f64().unwrap_or_else(|| panic!("{field}: {record}"))
}

fn assert_parts_add_up(record: &Value) {
    let parts: f64 =
        ["on_cpu_ms", "waiting_ms", "gil_ms", "run_queue_ms"].map(|part| number(record, part)).iter().sum();
    assert!((parts - number(record, "held_ms")).abs() <= 0.01 + number(record, "held_ms") * 0.01, "{record}");
    assert!(number(record, "held_ms") <= number(record, "duration_ms") + 0.01, "{record}");
    assert!(number(record, "blocked_ms") <= number(record, "held_ms") + 0.01, "{record}");
}

/// What `readelf -n` says of a file's probes: name and arguments.
fn listed_probes(file: &Path) -> BTreeMap<String, String> {
    let output = Command::new("readelf").arg("-n").arg(file).output().expect("readelf, of binutils");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let field = |line: &str, name: &str| line.trim().strip_prefix(name).map(str::to_owned);
    let lines: Vec<&str> = text.lines().collect();
    let mut probes = BTreeMap::new();
    for (index, _) in lines.iter().enumerate().filter(|(_, line)| line.trim() == "Provider: loopguard") {
        let name = field(lines[index + 1], "Name: ").expect("a name");
        probes.insert(name, field(lines[index + 3], "Arguments: ").expect("arguments"));
    }
    probes
}

fn copy_of(program: &Path, name: &str) -> PathBuf {
    let copy = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("axum-{name}-{}", std::process::id()));
    fs::copy(program, &copy).unwrap();
    copy
}

/// A copy of the server in which the bytes of its probe notes are changed.
fn with_notes(program: &Path, name: &str, change: impl Fn(&mut [u8])) -> PathBuf {
    use object::{Object as _, ObjectSection as _};
    let copy = copy_of(program, name);
    let mut bytes = fs::read(&copy).unwrap();
    let (start, length) = {
        let file = object::File::parse(bytes.as_slice()).unwrap();
        file.section_by_name(".note.stapsdt").unwrap().file_range().unwrap()
    };
    change(&mut bytes[start as usize..][..length as usize]);
    fs::write(&copy, bytes).unwrap();
    copy
}

#[test]
fn readelf_lists_the_probes_of_a_release_server() {
    let Some(program) = axum() else { return };
    let stripped = copy_of(&program, "stripped");
    assert!(Command::new("strip").arg(&stripped).status().expect("strip, of binutils").success());
    for file in [&program, &stripped] {
        let told: Vec<(String, usize)> =
            listed_probes(file).into_iter().map(|(name, arguments)| (name, arguments.split(' ').count())).collect();
        let expected = [
            ("request__end", 2),
            ("request__enter", 1),
            ("request__exit", 1),
            ("request__route", 3),
            ("request__start", 7),
        ];
        assert_eq!(told, expected.map(|(name, count)| (name.to_owned(), count)), "{}", file.display());
    }
    fs::remove_file(stripped).unwrap();
}

#[test]
fn every_request_has_its_record_and_every_block_its_owner() {
    let _alone = alone();
    let Some(program) = axum().filter(|_| can_trace()) else { return };
    // As it comes from a package: without symbols, the notes are still there.
    let stripped = copy_of(&program, "served");
    assert!(Command::new("strip").arg(&stripped).status().expect("strip, of binutils").success());
    for (flavour, workers) in [("current-thread", 1), ("workers", 2)] {
        let server = Axum::start(&stripped, &["--runtime", flavour]);
        let watching = Watching::start(server.pid(), &["--threshold", THRESHOLD]);
        server.show_workers(&watching, workers);
        let kinds = ["sleep", "between", "cpu", "file", "lock", "nested", "gather", "dependency", "stream"];
        for kind in kinds {
            thread::scope(|scope| {
                for i in 0..4 {
                    let server = &server;
                    scope.spawn(move || server.get("/ok/sleep/30", &format!("fine-{kind}-{i}")));
                }
                scope.spawn(|| server.get(&format!("/block/{kind}/{BLOCK_MS}"), &format!("block-{kind}")));
                scope.spawn(|| server.get(&format!("/ok/in-place/{BLOCK_MS}"), &format!("fine-{kind}-in-place")));
            });
        }
        let events = watching.stop();
        assert_eq!(events.status.code(), Some(0), "{flavour}: {}", events.messages);
        let records = records(&events);
        assert_eq!(records.len(), 6 * kinds.len(), "{flavour}: {:?}", records.keys());
        for (id, own) in &records {
            let [record] = own[..] else { panic!("{flavour}: {id} has {} records", own.len()) };
            assert_eq!((&record["status"], &record["complete"]), (&200.into(), &true.into()), "{flavour}: {record}");
            assert_parts_add_up(record);
            let kind = id.split('-').nth(1).unwrap();
            if id.starts_with("block-") {
                assert_eq!(record["path"], format!("/block/{kind}/{BLOCK_MS}"), "{flavour}: {record}");
                assert_eq!(record["route"], format!("/block/{kind}/{{ms}}"), "{flavour}: {record}");
                assert!(number(record, "blocked_ms") >= f64::from(BLOCK_MS), "{flavour}: {record}");
                let blocks: Vec<_> = events.blocks_of(id).collect();
                assert!(!blocks.is_empty(), "{flavour}: {id} is not blamed: {:#?}", events.lines);
                for block in blocks {
                    let known = (&block["attribution"], &block["how"]);
                    assert_eq!(known, (&"exact".into(), &"usdt".into()), "{flavour}: {block}");
                }
            } else if events.blocks_of(id).all(|block| block["verdict"] != "host") {
                assert_eq!(record["blocked_ms"], 0.0, "{flavour}: {record}");
            }
        }
        events.assert_parts_add_up();
        let (summary, counts) = (events.summary(), &events.summary()["requests"]);
        assert_eq!(summary["lost_records"], 0, "{flavour}: {summary}");
        assert_eq!(counts["ended"], events.of_type("request").count(), "{flavour}: {counts}");
        for nothing in ["open", "never_ended", "untracked", "unpaired"] {
            assert_eq!(counts[nothing], 0, "{flavour}: {nothing}: {counts}");
        }
    }
    fs::remove_file(stripped).unwrap();
}

#[test]
fn requests_that_end_in_other_ways_have_their_records_too() {
    let _alone = alone();
    let Some(program) = axum().filter(|_| can_trace()) else { return };
    let server = Axum::start(&program, &["--runtime", "current-thread"]);
    let watching = Watching::start(server.pid(), &["--threshold", THRESHOLD]);
    drop(server.open("/ok/sleep/60000", "cancelled-at-once"));
    let cancelled = server.open("/ok/sleep/60000", "cancelled");
    server.get("/ok/sleep/50", "meanwhile");
    drop(cancelled);
    server.get("/panics", "panics");
    server.get("/ok/stream/60", "stream");
    server.get("/nowhere", "not-found");
    let upgrade = "GET /upgrade HTTP/1.1\r\nhost: test\r\nx-request-id: upgrade\r\nconnection: upgrade\r\nupgrade: silence\r\n\r\n";
    request(server.port, upgrade);
    server.get("/hello", "last");
    let events = watching.stop();
    let records = records(&events);
    let told: Vec<(&str, Option<u64>)> = records
        .iter()
        .map(|(id, own)| {
            assert_eq!(own.len(), 1, "{own:?}");
            assert_parts_add_up(own[0]);
            (id.as_str(), own[0]["status"].as_u64())
        })
        .filter(|(id, _)| *id != "cancelled-at-once")
        .collect();
    let expected = [
        ("cancelled", None),
        ("last", Some(200)),
        ("meanwhile", Some(200)),
        ("not-found", Some(404)),
        ("panics", None),
        ("stream", Some(200)),
        ("upgrade", Some(101)),
    ];
    assert_eq!(told, expected);
    assert!(number(records["stream"][0], "steps") > 6.0, "a step for each piece: {:?}", records["stream"]);
    assert!(number(records["stream"][0], "duration_ms") >= 50.0, "up to its last piece: {:?}", records["stream"]);
    assert_eq!(records["not-found"][0]["route"], Value::Null);
    assert_eq!(events.summary()["requests"]["unpaired"], 0, "{}", events.summary());
}

#[test]
fn requests_open_at_either_end_are_neither_negative_nor_endless() {
    let _alone = alone();
    let Some(program) = axum().filter(|_| can_trace()) else { return };
    let server = Axum::start(&program, &["--runtime", "current-thread"]);
    let mut before = server.open("/ok/sleep/3000", "from-before");
    // It has begun once a later one was answered.
    server.get("/hello", "also-before");
    let watching = Watching::start(server.pid(), &["--threshold", THRESHOLD]);
    let mut answer = String::new();
    before.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let endless = server.open("/ok/sleep/60000", "endless");
    server.get("/hello", "complete");
    let events = watching.stop();
    drop(endless);
    let records = records(&events);
    assert!(!records.contains_key("endless") && !records.contains_key("from-before"), "{records:?}");
    assert_eq!(records["complete"][0]["complete"], true);
    let (_, unnamed) = records.iter().find(|(id, _)| *id != "complete").expect("the one from before");
    let [record] = unnamed[..] else { panic!("{unnamed:?}") };
    assert_eq!((&record["complete"], &record["path"]), (&false.into(), &Value::Null), "{record}");
    let duration = number(record, "duration_ms");
    assert!((0.0..3000.0).contains(&duration), "only what was seen of it: {record}");
    assert_parts_add_up(record);
    assert_eq!(events.summary()["requests"]["open"], 1, "{}", events.summary());
}

#[test]
fn probes_of_others_and_broken_notes_are_no_requests() {
    let _alone = alone();
    let Some(program) = axum().filter(|_| can_trace()) else { return };
    let others = with_notes(&program, "others", |notes| {
        for at in 0..notes.len() - 9 {
            if &notes[at..at + 9] == b"loopguard" {
                notes[at..at + 9].copy_from_slice(b"elsewhere");
            }
        }
    });
    let arguments = with_notes(&program, "arguments", |notes| {
        for at in 0..notes.len() - 6 {
            if &notes[at..at + 6] == b"8@%rdi" {
                notes[at..at + 6].copy_from_slice(b"8@%xyz");
            }
        }
    });
    let cut = with_notes(&program, "cut", |notes| notes[4..8].copy_from_slice(&u32::MAX.to_le_bytes()));
    for (server, says) in [(others, None), (arguments, Some("cannot be used")), (cut, Some("cannot be used"))] {
        let serving = Axum::start(&server, &["--runtime", "current-thread"]);
        let watching = Watching::start(serving.pid(), &["--threshold", THRESHOLD]);
        serving.get("/hello", "hello");
        serving.get(&format!("/block/sleep/{BLOCK_MS}"), "block");
        // Its tick is over once the next request was seen.
        serving.get("/hello", "hello");
        let events = watching.stop();
        assert_eq!(events.status.code(), Some(0), "{}", events.messages);
        assert_eq!(events.of_type("request").count(), 0, "{:?}", events.lines);
        assert_eq!(events.summary()["requests"], Value::Null, "{}", events.summary());
        assert!(events.blocks().all(|block| block["how"] != "usdt"), "{:?}", events.lines);
        assert!(events.blocks().count() >= 1, "its blocks are seen all the same: {:?}", events.lines);
        assert_eq!(says.is_some(), events.messages.contains(says.unwrap_or("cannot be used")), "{}", events.messages);
        drop(serving);
        fs::remove_file(server).unwrap();
    }
}

#[test]
fn probes_that_are_loaded_late_are_found() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    let Some(python) = pythons().into_iter().next_back() else { return };
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs/late_probes.py");
    let mut child = Command::new(python).arg(program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let (mut input, mut output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    let watching = Watching::start(child.id(), &["--threshold", THRESHOLD]);
    assert!(!watching.messages().contains("tells of its requests"), "{}", watching.messages());
    input.write_all(b"load\n").unwrap();
    let started = Instant::now();
    while !watching.messages().contains("tells of its requests") {
        assert!(started.elapsed() < PATIENCE, "the probes stay unseen: {}", watching.messages());
        thread::sleep(Duration::from_millis(20));
    }
    input.write_all(b"run\n").unwrap();
    output.read_line(&mut line).unwrap();
    let events = watching.stop();
    drop(input);
    support::wait(&mut child);
    let records = records(&events);
    assert_eq!(records.keys().collect::<Vec<_>>(), ["late"], "{line}");
    assert_eq!((&records["late"][0]["path"], &records["late"][0]["status"]), (&"/late".into(), &200.into()));
    assert_eq!(records["late"][0]["complete"], true);
}

#[test]
fn a_server_that_is_killed_leaves_its_requests_counted() {
    let _alone = alone();
    let Some(program) = axum().filter(|_| can_trace()) else { return };
    let mut server = Axum::start(&program, &["--runtime", "current-thread"]);
    let watching = Watching::start(server.pid(), &["--threshold", THRESHOLD]);
    let open: Vec<TcpStream> = (0..3).map(|i| server.open("/ok/sleep/60000", &format!("open-{i}"))).collect();
    server.get("/hello", "answered");
    // Their starts are fetched a few times a threshold.
    thread::sleep(Duration::from_millis(300));
    server.child.kill().unwrap();
    server.child.wait().unwrap();
    let events = watching.ended();
    drop(open);
    assert_eq!(records(&events).keys().collect::<Vec<_>>(), ["answered"]);
    let counts = &events.summary()["requests"];
    assert_eq!((&counts["never_ended"], &counts["open"]), (&3.into(), &0.into()), "{counts}");
}
