//! Checks what loopguard reads of CPython from outside: on recorded memory of every supported version, and on live
//! interpreters.
//!
//! * Replays need nothing. Their images are in `tests/images/`; to record them again (needs ptrace access to the
//!   children, so usually root):
//!   `LOOPGUARD_PYTHONS=... cargo test -p loopguard --test cpython -- --ignored record`
//!   Lines are looked up in the program, so after a change to it they must be recorded again.
//! * Live tests need ptrace access as well, and interpreters: `LOOPGUARD_PYTHONS` is a colon-separated list of commands
//!   (`chroot DIR /usr/bin/python3.14` is one), else pyenv's, else `python3`.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use loopguard::core::event::{Origin, RequestFacts, Stack};
use loopguard::runtime::cpython::{
    self, Inspector, Interpreter, MemoryImage, NotTold, NotUsable, PyThreadInfo, StepProbe, Version,
};
use loopguard::runtime::memory::ProcessMemory;
use loopguard_common::layout::ABSENT;
use loopguard_common::records::{CaptureRecord, WalkStatus};
use loopguard_common::walk::{Memory, Scratch, snapshot_request, walk_frames};
use serde::{Deserialize, Serialize};

/// What blocks.
#[derive(Clone, Copy)]
struct Program {
    text: &'static str,
    file: &'static str,
}

const SCOPES: Program = Program { text: include_str!("programs/scopes.py"), file: "scopes.py" };
const REQUEST_OBJECTS: Program =
    Program { text: include_str!("programs/request_objects.py"), file: "request_objects.py" };

/// What each mode of the program must look like from outside.
struct Expected {
    program: Program,
    mode: &'static str,
    /// Function and line, innermost first, through the last frame of the program's own task.
    frames: Vec<(&'static str, u32)>,
    /// The request by the scope in the frames.
    request: Option<&'static str>,
    /// Coroutine of the current task.
    task: Option<&'static str>,
    request_of_task: Option<&'static str>,
}

impl Program {
    /// Number of the only line that contains `text`.
    fn line(self, text: &str) -> u32 {
        let mut lines = (1..).zip(self.text.lines()).filter(|(_, line)| line.contains(text));
        let (number, _) = lines.next().unwrap_or_else(|| panic!("no line has {text}"));
        assert!(lines.next().is_none(), "several lines have {text}");
        number
    }
}

fn expectations() -> Vec<Expected> {
    let mut all = of_scopes();
    all.extend(of_request_objects());
    all
}

/// Servers that keep a request in an object of their own.
fn of_request_objects() -> impl Iterator<Item = Expected> {
    let program = REQUEST_OBJECTS;
    let expected = move |mode, handler: &'static str, lines: [&str; 2]| {
        let [handler_line, serve_line] = lines.map(|text| program.line(text));
        let frames = vec![("block", program.line("# line: block")), (handler, handler_line), ("serve", serve_line)];
        Expected { program, mode, frames, request: None, task: Some("serve"), request_of_task: Some("/items/7") }
    };
    let function = |mode| expected(mode, "handle", ["# line: handle", "[mode]())  # line: serve"]);
    let method = expected("tornado", "RequestHandler._execute", ["# line: execute", "# line: serve tornado"]);
    [function("aiohttp"), function("sanic"), method].into_iter()
}

fn of_scopes() -> Vec<Expected> {
    let program = SCOPES;
    let line = |text| program.line(text);
    const PATH: Option<&str> = Some("/items/7");
    let innermost =
        || vec![("block", line("# line: block")), ("leaf", line("# line: leaf")), ("middle", line("await leaf()"))];
    let outermost = || {
        [
            ("App.endpoint", line("# line: endpoint")),
            ("App.__call__", line("# line: app")),
            ("serve", line("await App()(make_scope(), mode, None)")),
        ]
    };
    let mut all = Vec::new();
    let mut frames = innermost();
    frames.push(("App.direct", line("# line: direct")));
    frames.extend(outermost());
    all.push(Expected { program, mode: "direct", frames, request: PATH, task: Some("serve"), request_of_task: PATH });
    let mut frames = vec![
        ("block", line("# line: block")),
        ("generated", 3),
        ("App.greeting.<locals>.größe", line("# line: größe")),
        ("App.greeting.<locals>.長さ", line("# line: 長さ")),
        ("App.greeting", line("return 長さ()")),
    ];
    frames.extend(outermost());
    all.push(Expected { program, mode: "greeting", frames, request: PATH, task: Some("serve"), request_of_task: PATH });
    let mut frames = innermost();
    frames.extend([
        ("closure.<locals>.app.<locals>.inner", line("# line: inner")),
        ("closure.<locals>.app", line("await inner(copied, None)")),
        ("closure.<locals>.outer", line("await app(None, copied)")),
        ("closure", line("await outer(None, scope)")),
        ("serve", line("await GLOBAL_MODES[mode]()")),
    ]);
    all.push(Expected { program, mode: "closure", frames, request: PATH, task: Some("serve"), request_of_task: PATH });
    for mode in ["task", "gather", "group", "wait", "wait_for", "grandchild", "run_asgi", "anyio"] {
        let frames = innermost();
        all.push(Expected { program, mode, frames, request: None, task: Some("middle"), request_of_task: PATH });
    }
    for mode in ["shared", "detached"] {
        let frames = innermost();
        all.push(Expected { program, mode, frames, request: None, task: Some("middle"), request_of_task: None });
    }
    let frames = vec![("block", line("# line: block"))];
    all.push(Expected { program, mode: "callback", frames, request: None, task: None, request_of_task: None });
    all
}

/// Walks, resolves and compares everything.
fn check(interpreter: Arc<Interpreter>, thread: &PyThreadInfo, expected: &Expected) {
    let name = format!("{} {}", interpreter.version, expected.mode);
    let mut inspector = Inspector::new(interpreter.clone());
    // SAFETY: integers only.
    let mut capture: CaptureRecord = unsafe { std::mem::zeroed() };
    let mut scratch = Scratch::default();
    walk(&interpreter, thread, &mut scratch, &mut capture);
    assert_eq!(capture.walk, WalkStatus::Complete as u32, "{name}");
    let frames = &capture.frames[..capture.frame_count as usize];
    let stack = inspector.stack(frames, WalkStatus::Complete);
    check_stack(&name, &stack, expected);
    // Again, from the cache.
    assert_eq!(inspector.stack(frames, WalkStatus::Complete), stack, "{name}");

    snapshot_request(interpreter.memory(), &interpreter.layout(), &mut scratch, &capture.frames, &mut capture.request);
    let request = inspector.request(&capture.request);
    check_request(&name, request.as_ref(), expected.request);

    let task = inspector.current_task(thread, capture.task).unwrap();
    assert_eq!(task.as_ref().and_then(|task| task.coroutine.as_deref()), expected.task, "{name}");
    let Some(task) = task else { return };
    let task_name = task.name.unwrap_or_default();
    assert!(
        task_name.starts_with("Task-") || task_name == "child-of-await" || task_name == "background",
        "{name}: {task_name}"
    );
    if expected.mode == "shared" {
        assert_eq!(inspector.request_of_task(task.address), Err(NotTold::SeveralRequests), "{name}");
        return;
    }
    let through_task = inspector.request_of_task(task.address).unwrap();
    check_request(&name, through_task.as_ref(), expected.request_of_task);
    if request.is_some() {
        assert_eq!(request, through_task, "{name}");
    }
}

fn walk(interpreter: &Interpreter, thread: &PyThreadInfo, scratch: &mut Scratch, capture: &mut CaptureRecord) {
    walk_frames(interpreter.memory(), &interpreter.layout(), thread.walked(), scratch, capture);
}

fn check_stack(name: &str, stack: &Stack, expected: &Expected) {
    let got: Vec<(&str, u32)> =
        stack.frames.iter().map(|frame| (frame.function.as_ref(), frame.line.unwrap_or(0))).collect();
    assert_eq!(got[..expected.frames.len().min(got.len())], expected.frames, "{name}: {got:?}");
    let (task, runner) = stack.frames.split_at(expected.frames.len());
    for frame in task {
        let file = if &*frame.function == "generated" { "<string>" } else { expected.program.file };
        assert_eq!((frame.file.as_deref(), frame.origin), (Some(file), Origin::User), "{name}: {frame:?}");
    }
    assert_eq!(&*runner[0].function, "Handle._run", "{name}: {got:?}");
    assert_eq!(runner[0].origin, Origin::Runtime, "{name}: {:?}", runner[0]);
    assert!(runner[0].file.as_deref().is_some_and(|file| file.ends_with("/asyncio/events.py")), "{name}");
    let program: Vec<_> = runner.iter().filter(|frame| frame.file.as_deref() == Some(expected.program.file)).collect();
    assert_eq!(program.len(), 1, "{name}: {got:?}");
    assert_eq!(
        (program[0].function.as_ref(), program[0].line),
        ("<module>", Some(expected.program.line("asyncio.run(serve"))),
        "{name}"
    );
    assert_eq!(got.last(), Some(&("<module>", 1)), "{name}");
    assert_eq!(stack.incomplete, None);
}

fn check_request(name: &str, request: Option<&RequestFacts>, path: Option<&str>) {
    assert_eq!(request.map(|request| request.path.as_str()), path, "{name}");
    let Some(request) = request else { return };
    // Tornado knows no client's port, and its handlers no route.
    let (client, route) =
        if name.ends_with(" tornado") { ("10.1.2.3", None) } else { ("10.1.2.3:51234", Some("/items/{id}")) };
    assert_eq!(request.method.as_deref(), Some("POST"), "{name}");
    assert_eq!(request.route.as_deref(), route, "{name}");
    assert_eq!(request.client.as_deref(), Some(client), "{name}");
    assert_eq!(request.trace_id.as_deref(), Some("4bf92f3577b34da6a3ce929d0e0e4736"), "{name}");
    assert!(request.id.starts_with("lg-") && request.id.len() == 19, "{name}: {}", request.id);
}

/// A running program; ends with the test.
struct Target {
    child: Child,
    command: String,
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Target {
    /// Starts the program and waits until it blocks.
    fn start(python: &str, Program { text, file }: Program, mode: &str) -> Self {
        let mut words = python.split(' ');
        let mut child = Command::new(words.next().unwrap_or_default())
            .args(words)
            .arg("-c")
            .arg(format!("import sys; exec(compile(sys.stdin.buffer.read(), {file:?}, 'exec'))"))
            .arg(mode)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{python}: {error}"));
        child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        let mut ready = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut ready).unwrap();
        assert_eq!(ready, "ready\n", "{python} {mode}");
        let target = Self { child, command: python.to_owned() };
        // From here to the sleep is a few instructions; the deadline only keeps a broken test from hanging.
        let deadline = Instant::now() + Duration::from_secs(60);
        while !target.sleeps() {
            assert!(Instant::now() < deadline, "{python} {mode} does not go to sleep");
            std::thread::yield_now();
        }
        target
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    fn sleeps(&self) -> bool {
        let call = std::fs::read_to_string(format!("/proc/{}/syscall", self.pid())).unwrap_or_default();
        let number = call.split(' ').next().and_then(|number| number.parse::<i64>().ok());
        number == Some(libc::SYS_clock_nanosleep)
    }

    fn thread(&self, interpreter: &Interpreter) -> PyThreadInfo {
        let threads = interpreter.threads().unwrap();
        assert_eq!(threads.len(), 2, "{}", self.command);
        *threads.iter().find(|thread| thread.native_thread_id == u64::from(self.pid())).unwrap()
    }
}

/// The interpreters of this machine that loopguard supports.
fn pythons() -> Vec<String> {
    if let Ok(list) = std::env::var("LOOPGUARD_PYTHONS") {
        return list.split(':').filter(|command| !command.is_empty()).map(str::to_owned).collect();
    }
    let versions = PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".pyenv/versions");
    let mut found: Vec<String> = std::fs::read_dir(versions)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path().join("bin/python3"))
        .filter(|python| is_supported(python))
        .map(|python| python.to_string_lossy().into_owned())
        .collect();
    found.sort();
    if found.is_empty() && is_supported(Path::new("python3")) {
        found.push("python3".to_owned());
    }
    found
}

fn is_supported(python: &Path) -> bool {
    let test = "import sys; v = sys.version_info; sys.exit(not (3, 11) <= v[:2] <= (3, 15) or '+' in sys.version)";
    Command::new(python).args(["-c", test]).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

/// Whether children may be read at all; where not, the live tests say so and pass.
fn may_read(target: &Target) -> bool {
    let memory = ProcessMemory { pid: target.pid() };
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", target.pid())).unwrap_or_default();
    let start = maps.split('-').next().and_then(|start| u64::from_str_radix(start, 16).ok());
    let readable = start.is_some_and(|start| memory.read(start, &mut [0u8; 4]));
    if !readable {
        eprintln!("skipped: no permission to read the memory of a child");
    }
    readable
}

#[test]
fn live_interpreters() {
    for python in pythons() {
        for expected in expectations() {
            let target = Target::start(&python, expected.program, expected.mode);
            if !may_read(&target) {
                return;
            }
            let interpreter = Arc::new(cpython::find(target.pid()).unwrap_or_else(|why| panic!("{python}: {why}")));
            let thread = target.thread(&interpreter);
            eprintln!("{} ({:?}) {}", interpreter.version, interpreter.found_by, expected.mode);
            check(interpreter.clone(), &thread, &expected);
            check_other_thread(&target, &interpreter);
        }
    }
}

/// The second loop idles: its thread runs no task, whatever the first one's does.
fn check_other_thread(target: &Target, interpreter: &Arc<Interpreter>) {
    let threads = interpreter.threads().unwrap();
    let other = threads.iter().find(|thread| thread.native_thread_id != u64::from(target.pid())).unwrap();
    let mut inspector = Inspector::new(interpreter.clone());
    // SAFETY: integers only.
    let mut capture: CaptureRecord = unsafe { std::mem::zeroed() };
    let mut scratch = Scratch::default();
    walk(interpreter, other, &mut scratch, &mut capture);
    assert_eq!(inspector.current_task(other, capture.task), Ok(None));
    // A thread state that is not the thread's own gives nothing.
    walk(interpreter, &PyThreadInfo { native_thread_id: 1, ..*other }, &mut scratch, &mut capture);
    assert_eq!((capture.walk, capture.frame_count), (WalkStatus::NotThisThread as u32, 0));
}

#[test]
fn live_probe_sites_and_ranges() {
    for python in pythons() {
        let target = Target::start(&python, SCOPES, "direct");
        if !may_read(&target) {
            return;
        }
        let start = Instant::now();
        let interpreter = cpython::find(target.pid()).unwrap();
        eprintln!("{python}: found {} in {:?}", interpreter.version, start.elapsed());
        assert!(interpreter.knows_asyncio() && !interpreter.refresh_asyncio());
        let thread = target.thread(&interpreter);
        let [gil, none] = interpreter.gil_ranges(thread.interpreter);
        assert!(gil.start != 0 && gil.end - gil.start < 512 && none.start == none.end);
        // The default switch interval, 5 ms in microseconds, is the first word of the GIL's struct.
        let mut interval = 0u64;
        assert!(interpreter.memory().read(gil.start, &mut interval));
        assert_eq!(interval, 5000, "{python}");
        for probe in [StepProbe::ContextRun, StepProbe::ContextEnter] {
            let site = interpreter.probe_site(probe);
            eprintln!("{python}: {probe:?} at {site:?}");
            if cfg!(target_arch = "x86_64") {
                let site = site.unwrap();
                assert!(std::fs::metadata(&site.file).unwrap().len() > site.offset);
            } else {
                assert!(site.is_err());
            }
        }
    }
}

/// From 3.14 on the running task is known only once the program has imported asyncio, which may be after attaching.
#[test]
fn asyncio_may_come_later() {
    const LATE: &str = "print('ready', flush=True); input(); import asyncio; print('ready', flush=True); input()";
    for python in pythons() {
        let mut words = python.split(' ');
        let child = Command::new(words.next().unwrap_or_default())
            .args(words)
            .args(["-c", LATE])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut target = Target { child, command: python.clone() };
        let mut output = BufReader::new(target.child.stdout.take().unwrap()).lines();
        assert_eq!(output.next().unwrap().unwrap(), "ready");
        if !may_read(&target) {
            return;
        }
        let interpreter = cpython::find(target.pid()).unwrap();
        let known = interpreter.knows_asyncio();
        assert!(!interpreter.refresh_asyncio());
        target.child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
        assert_eq!(output.next().unwrap().unwrap(), "ready");
        assert_eq!(interpreter.refresh_asyncio(), !known, "{python}");
        assert!(interpreter.knows_asyncio() && !interpreter.refresh_asyncio(), "{python}");
        assert_eq!(interpreter.layout().ts_running_task != ABSENT, interpreter.version.minor >= 14, "{python}");
        eprintln!("{python}: knew of asyncio at once: {known}");
    }
}

/// A code object that is not what the kernel saw must not lend its name.
#[test]
fn a_stale_frame_is_unknown() {
    for (case, expected) in cases() {
        let thread = case.thread();
        let interpreter = Arc::new(case.image.interpreter().unwrap());
        // SAFETY: integers only.
        let mut capture: CaptureRecord = unsafe { std::mem::zeroed() };
        walk(&interpreter, &thread, &mut Scratch::default(), &mut capture);
        let mut inspector = Inspector::new(interpreter);
        let mut stale = capture.frames[0];
        stale.fingerprint ^= 1;
        let mut gone = capture.frames[0];
        gone.code = 0x1000;
        let mut elsewhere = capture.frames[0];
        elsewhere.instr = elsewhere.code.wrapping_sub(64);
        let stack = inspector.stack(&[stale, gone, capture.frames[0], stale, elsewhere], WalkStatus::Unreadable);
        let got: Vec<_> = stack.frames.iter().map(|frame| (frame.function.as_ref(), frame.line)).collect();
        let known = (expected.frames[0].0, Some(expected.frames[0].1));
        let unknown = ("<unknown>", None);
        assert_eq!(got, [unknown, unknown, known, unknown, (known.0, None)]);
        assert!(stack.incomplete.is_some());
    }
}

/// One recorded interpreter, blocked in one mode of the program.
#[derive(Serialize, Deserialize)]
struct Case {
    mode: String,
    native_thread_id: u64,
    state: u64,
    interpreter: u64,
    image: MemoryImage,
}

impl Case {
    fn thread(&self) -> PyThreadInfo {
        PyThreadInfo { native_thread_id: self.native_thread_id, state: self.state, interpreter: self.interpreter }
    }
}

fn images() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/images")
}

fn cases() -> Vec<(Case, Expected)> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(images()).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
        .iter()
        .map(|file| {
            let case: Case = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
            let expected = expectations().into_iter().find(|expected| expected.mode == case.mode).unwrap();
            (case, expected)
        })
        .collect()
}

#[test]
fn recorded_interpreters() {
    let mut versions: Vec<(u32, u32)> = Vec::new();
    for (case, expected) in cases() {
        let thread = case.thread();
        let interpreter = Arc::new(case.image.interpreter().unwrap());
        let Version { major, minor, .. } = interpreter.version;
        versions.push((major, minor));
        assert_eq!(interpreter.threads().unwrap().iter().filter(|other| **other == thread).count(), 1);
        check(interpreter, &thread, &expected);
    }
    versions.dedup();
    assert_eq!(versions, [(3, 11), (3, 12), (3, 13), (3, 14), (3, 15)]);
}

/// Memory that ends anywhere, or is not what it should be, gives less or nothing: never a panic.
#[test]
fn damaged_interpreters_are_harmless() {
    for (case, _) in cases() {
        let thread = case.thread();
        let text = serde_json::to_string(&case.image).unwrap();
        for (from, to) in [("0", "f"), ("1", "e"), ("7f", "00"), ("00000000", "ffffffff"), ("e3", "e2"), ("64", "28")] {
            // Only the memory: the addresses that lead into it stay.
            let Some((head, memory)) = text.split_once("\"memory\":") else { panic!("an image without memory") };
            let damaged: String = memory
                .split_inclusive("\",\"")
                .enumerate()
                .map(|(n, piece)| if n % 2 == 1 { piece.replace(from, to) } else { piece.to_owned() })
                .collect();
            let Ok(image) = serde_json::from_str::<MemoryImage>(&format!("{head}\"memory\":{damaged}")) else {
                continue;
            };
            match image.interpreter() {
                Ok(interpreter) => look_at_everything(&Arc::new(interpreter), &thread),
                Err(NotUsable::Unreadable(_) | NotUsable::FreeThreaded | NotUsable::UnsupportedVersion { .. }) => {}
                Err(why) => panic!("{why}"),
            }
        }
    }
}

fn look_at_everything(interpreter: &Arc<Interpreter>, thread: &PyThreadInfo) {
    let _ = interpreter.threads();
    interpreter.gil_ranges(thread.interpreter);
    // SAFETY: integers only.
    let mut capture: CaptureRecord = unsafe { std::mem::zeroed() };
    let mut scratch = Scratch::default();
    walk(interpreter, thread, &mut scratch, &mut capture);
    snapshot_request(interpreter.memory(), &interpreter.layout(), &mut scratch, &capture.frames, &mut capture.request);
    let mut inspector = Inspector::new(interpreter.clone());
    inspector.stack(&capture.frames[..capture.frame_count as usize], WalkStatus::Complete);
    inspector.request(&capture.request);
    if let Ok(Some(task)) = inspector.current_task(thread, capture.task) {
        let _ = inspector.request_of_task(task.address);
    }
}

/// The modes that images are of.
const RECORDED: [&str; 5] = ["closure", "grandchild", "aiohttp", "sanic", "tornado"];

/// Writes `tests/images/` from the interpreters of this machine, the oldest of each minor version; see above.
#[test]
#[ignore = "writes into the source tree"]
fn record() {
    let mut seen = Vec::new();
    for python in pythons() {
        for expected in expectations().iter().filter(|expected| RECORDED.contains(&expected.mode)) {
            let target = Target::start(&python, expected.program, expected.mode);
            let interpreter = Arc::new(cpython::find_recording(target.pid()).unwrap());
            let Version { major, minor, .. } = interpreter.version;
            let name = format!("{major}.{minor}-{}.json", expected.mode);
            if seen.contains(&name) {
                continue;
            }
            let thread = target.thread(&interpreter);
            check(interpreter.clone(), &thread, expected);
            let PyThreadInfo { native_thread_id, state, interpreter: of } = thread;
            let image = interpreter.image().unwrap();
            let case = Case { mode: expected.mode.to_owned(), native_thread_id, state, interpreter: of, image };
            let mut json = serde_json::to_string(&case).unwrap();
            json.push('\n');
            std::fs::write(images().join(&name), json).unwrap();
            seen.push(name);
        }
    }
}
