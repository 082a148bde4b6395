//! loopguard on real servers in the real kernel: who is blamed, and what becomes of the target.

mod support;

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use support::{Events, PATIENCE, Server, Setup, Watching, all_pythons, alone, can_trace, line_of, pythons, signal};

/// Long enough that nothing a healthy server does comes near it, on any machine.
const BLOCK_MS: u32 = 300;
const THRESHOLD: &str = "150ms";

/// Everything that can block, with the function that does.
const BLOCKERS: [(&str, &str); 7] = [
    ("sleep", "block_sleep"),
    ("cpu", "block_cpu"),
    ("nested", "nested"),
    ("lock", "block_lock"),
    ("gather", "block_gather.<locals>.child"),
    ("stream", "block_stream.<locals>.body"),
    ("dependency", "dependency"),
];

/// The line of `function` in the test server that does the blocking, by the source itself.
fn marked_line(mark: &str) -> u64 {
    let source = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/servers/app.py")).unwrap();
    let index = source.lines().position(|line| line.ends_with(&format!("# line: {mark}"))).unwrap();
    index as u64 + 1
}

/// Sends one request of every blocking kind, each while harmless ones are in flight.
fn block_in_every_way(server: &Server) {
    for (kind, _) in BLOCKERS {
        thread::scope(|scope| {
            for i in 0..4 {
                scope.spawn(move || server.get(&format!("/fine/{kind}-{i}"), &format!("fine-{kind}-{i}")));
            }
            scope.spawn(move || {
                let path = format!("/block/{kind}/{BLOCK_MS}?ms={BLOCK_MS}");
                server.get(&path, &format!("block-{kind}"))
            });
        });
    }
}

/// Every blocking request is named with its function; nobody harmless is; nothing is lost.
fn assert_culprits(events: &Events, context: &str) {
    for (kind, function) in BLOCKERS {
        let id = format!("block-{kind}");
        let named: Vec<_> = events.blocks_of(&id).collect();
        assert!(!named.is_empty(), "{context}: {id} is not blamed: {:#?}", events.lines);
        assert!(
            named.iter().any(|block| line_of(block, function).is_some()),
            "{context}: {id} without {function}: {named:#?}"
        );
    }
    for block in events.blocks() {
        // A machine that is short of processors holds up whoever runs: that is said as such.
        let host = block["verdict"] == "host";
        for request in block["requests"].as_array().unwrap() {
            let id = request["id"].as_str().unwrap();
            assert!(host || id.starts_with("block-"), "{context}: {id} is blamed: {block:#}");
        }
    }
    events.assert_parts_add_up();
    let summary = events.summary();
    assert_eq!(summary["lost_records"], 0, "{context}: {summary}");
    // Stripped libraries leave native frames without names, but every Python frame has one.
    for frame in events.blocks().flat_map(|block| block["stack"].as_array().unwrap()) {
        assert!(frame["kind"] == "native" || frame["function"] != "<unknown>", "{context}: {frame}");
    }
    assert_eq!(events.status.code(), Some(0), "{context}: {}", events.messages);
}

#[test]
fn the_culprit_is_named_on_every_interpreter_and_loop() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    for python in all_pythons() {
        for event_loop in ["uvloop", "asyncio"] {
            let setup = Setup { python: &python, server: "uvicorn-httptools", event_loop, environment: &[] };
            let server = Server::start(&setup);
            let watching = Watching::start(server.pid(), &["--threshold", THRESHOLD]);
            let context = format!("{} {event_loop}", python.display());
            assert!(watching.messages().contains("exact steps"), "{context}: {}", watching.messages());
            // Step probes come with the first old step: from then on owners are exact.
            server.get(&format!("/block/sleep/{BLOCK_MS}"), "block-first");
            // On a busy machine loopguard may come late to that.
            thread::sleep(Duration::from_secs(1));
            block_in_every_way(&server);
            let events = watching.stop();
            assert_culprits(&events, &context);
            assert_eq!(events.blocks_of("block-first").count(), 1, "{context}: {:#?}", events.lines);
            let sleep = events.blocks_of("block-sleep").next().unwrap();
            assert_eq!(line_of(sleep, "block_sleep"), Some(marked_line("block_sleep")), "{context}: {sleep:#}");
            assert_eq!(sleep["requests"][0]["route"], "/block/sleep/{ms}", "{context}");
            assert_eq!(sleep["requests"][0]["method"], "GET", "{context}");
            assert_eq!(sleep["requests"][0]["path"], format!("/block/sleep/{BLOCK_MS}"), "{context}");
            assert_eq!((&sleep["attribution"], &sleep["how"]), (&"exact".into(), &"asgi-frame".into()), "{context}");
            assert_eq!(sleep["runtime"], event_loop, "{context}");
            assert_eq!(sleep["waits"][0]["syscall"], "clock_nanosleep", "{context}: {sleep:#}");
            let gather = events.blocks_of("block-gather").next().unwrap();
            assert_eq!(gather["attribution"], "inferred", "{context}: {gather:#}");
        }
    }
}

#[test]
fn every_server_and_middleware_shows_its_requests() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    let Some(python) = pythons().into_iter().next_back() else { return };
    let through_middleware: &[_] = &[("BASE_HTTP_MIDDLEWARE", "1")];
    for (server, environment) in
        [("uvicorn-h11", &[][..]), ("hypercorn", &[][..]), ("uvicorn-httptools", through_middleware)]
    {
        let setup = Setup { python: &python, server, event_loop: "asyncio", environment };
        let running = Server::start(&setup);
        let watching = Watching::start(running.pid(), &["--threshold", THRESHOLD]);
        block_in_every_way(&running);
        assert_culprits(&watching.stop(), &format!("{server} {environment:?}"));
    }
}

#[test]
fn a_route_that_is_no_object_is_told() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    for python in all_pythons() {
        let setup = Setup { python: &python, server: "uvicorn-h11", event_loop: "asyncio", environment: &[] };
        let server = Server::start(&setup);
        let watching = Watching::start(server.pid(), &["--threshold", THRESHOLD]);
        server.get(&format!("/templated/{BLOCK_MS}"), "templated");
        let events = watching.stop();
        let blocks: Vec<_> = events.blocks_of("templated").collect();
        assert_eq!(blocks.len(), 1, "{python:?}: {:#?}", events.lines);
        assert_eq!(blocks[0]["requests"][0]["route"], "/templated/{ms:int}", "{python:?}: {blocks:#?}");
    }
}

#[test]
fn servers_without_asgi_show_their_requests() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    let servers =
        [("aiohttp", Some("/api/{kind}/{ms}")), ("sanic", Some("/api/<kind:str>/<ms:int>")), ("tornado", None)];
    for python in pythons() {
        for (name, route) in servers {
            let context = format!("{} {name}", python.display());
            let server = Server::of_framework(&python, name);
            let watching = Watching::start(server.pid(), &["--threshold", THRESHOLD]);
            let functions = [("sleep", "sleep"), ("cpu", "compute"), ("gather", "in_child.<locals>.child")];
            for (kind, _) in functions {
                thread::scope(|scope| {
                    for i in 0..4 {
                        let server = &server;
                        scope.spawn(move || server.get("/api/wait/100", &format!("fine-{kind}-{i}")));
                    }
                    scope.spawn(|| server.get(&format!("/api/block-{kind}/{BLOCK_MS}?a=b"), &format!("block-{kind}")));
                });
            }
            keep_alive(&server);
            let events = watching.stop();

            for block in events.blocks() {
                for request in block["requests"].as_array().unwrap() {
                    let id = request["id"].as_str().unwrap();
                    assert!(id.starts_with("block-") || block["verdict"] == "host", "{context}: {id} is blamed");
                }
            }
            for (kind, function) in functions {
                let id = format!("block-{kind}");
                let blocks: Vec<_> = events.blocks_of(&id).collect();
                assert!(!blocks.is_empty(), "{context}: {kind} is not blamed: {:#?}", events.lines);
                assert!(blocks.iter().any(|block| line_of(block, function).is_some()), "{context}: {blocks:#?}");
                let request = &blocks[0]["requests"][0];
                assert_eq!(request["method"], "GET", "{context}");
                assert_eq!(request["path"], format!("/api/block-{kind}/{BLOCK_MS}"), "{context}");
                assert_eq!(request["route"].as_str(), route, "{context}");
                let client = request["client"].as_str().unwrap();
                // Tornado does not keep the port.
                assert_eq!(client.split(':').count(), if name == "tornado" { 1 } else { 2 }, "{context}: {client}");
                assert!(client.starts_with("127.0.0.1"), "{context}: {client}");
                assert_eq!(blocks[0]["how"], "asyncio-task", "{context}");
            }
            for id in ["block-first", "block-second"] {
                assert_eq!(events.blocks_of(id).count(), 1, "{context}: {id}: {:#?}", events.lines);
            }
            events.assert_parts_add_up();
            assert_eq!(events.summary()["lost_records"], 0, "{context}");
        }
    }
}

/// Three requests on one connection, of which the last blocks nobody.
fn keep_alive(server: &Server) {
    let mut stream = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let block = format!("block-sleep/{BLOCK_MS}");
    for (path, id) in [(block.as_str(), "block-first"), (&block, "block-second"), ("wait/1", "fine-third")] {
        let head = format!("GET /api/{path} HTTP/1.1\r\nhost: test\r\nX-Request-ID: {id}\r\n\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        let (mut answer, mut part) = (Vec::new(), [0; 1024]);
        while !answer.ends_with(b"done") {
            let length = stream.read(&mut part).unwrap();
            assert!(length > 0, "{id}: {}", String::from_utf8_lossy(&answer));
            answer.extend_from_slice(&part[..length]);
        }
    }
}

#[test]
fn without_step_probes_owners_are_inferred_and_still_right() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    let Some(python) = pythons().into_iter().next() else { return };
    let setup = Setup { python: &python, server: "uvicorn-httptools", event_loop: "uvloop", environment: &[] };
    let server = Server::start(&setup);
    let watching = Watching::start(server.pid(), &["--threshold", THRESHOLD, "--steps", "off"]);
    assert!(watching.messages().contains("ticks only"), "{}", watching.messages());
    block_in_every_way(&server);
    let events = watching.stop();
    assert_culprits(&events, "steps off");
    assert!(events.blocks().all(|block| block["attribution"] != "exact"));
}

#[test]
fn a_background_task_is_nobodys_request() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    for python in all_pythons() {
        let environment: &[_] = &[("BACKGROUND_PERIOD_S", "0.2")];
        let setup = Setup { python: &python, server: "uvicorn-httptools", event_loop: "uvloop", environment };
        let server = Server::start(&setup);
        let watching = Watching::start(server.pid(), &["--threshold", "70ms"]);
        thread::scope(|scope| {
            for client in 0..4 {
                let server = &server;
                scope.spawn(move || {
                    // Each takes 10 ms at least: in all several periods of the background task.
                    for i in 0..120 {
                        server.get(&format!("/fine/{i}"), &format!("fine-{client}-{i}"));
                    }
                });
            }
        });
        let events = watching.stop();
        let background: Vec<_> =
            events.blocks().filter(|block| line_of(block, "background_blocker").is_some()).collect();
        assert!(background.len() >= 2, "{:#?}", events.lines);
        // Where loopguard came too late to read whose step it was it says so; it never names anybody else.
        let known = background.iter().filter(|block| block["attribution"] != "unknown");
        assert!(known.clone().count() > 0, "{background:#?}");
        for block in &background {
            assert_eq!(block["requests"].as_array().map(Vec::len), Some(0), "{block:#}");
        }
        for block in known {
            assert_eq!(block["task"], "background-blocker", "{block:#}");
        }
        events.assert_parts_add_up();
    }
}

#[test]
fn a_block_that_goes_on_is_shown_and_attaching_in_its_middle_works() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    let Some(python) = pythons().into_iter().next_back() else { return };
    for event_loop in ["asyncio", "uvloop"] {
        let setup = Setup { python: &python, server: "uvicorn-h11", event_loop, environment: &[] };
        let server = Server::start(&setup);
        thread::scope(|scope| {
            let server = &server;
            let request = scope.spawn(move || server.get("/block/sleep/5000", "stuck"));
            // The request is on its way into its sleep; the loop will not poll for seconds.
            thread::sleep(Duration::from_millis(500));
            let watching = Watching::start(server.pid(), &["--threshold", "100ms"]);
            request.join().unwrap();
            // One more poll, so that the step has ended.
            server.get("/fine/after", "after");
            let events = watching.stop();
            let ongoing: Vec<_> = events.of_type("ongoing").collect();
            assert!(!ongoing.is_empty(), "{event_loop}: {:#?}", events.lines);
            for line in &ongoing {
                assert_eq!(line["requests"][0]["id"], "stuck", "{event_loop}: {line:#}");
                assert!(line_of(line, "block_sleep").is_some(), "{event_loop}: {line:#}");
            }
            assert_eq!(events.blocks_of("stuck").count(), 1, "{event_loop}: {:#?}", events.lines);
        });
    }
}

/// One of tests/programs, and the lines that it prints. It ends with its standard input.
fn program(python: &Path, name: &str) -> (Child, impl Iterator<Item = String>) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs").join(name);
    let mut target = Command::new(python).arg(path).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let says = BufReader::new(target.stdout.take().unwrap()).lines().map(Result::unwrap);
    (target, says)
}

#[test]
fn a_loop_that_starts_later_is_found() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    let Some(python) = pythons().into_iter().next_back() else { return };
    let (mut target, mut says) = program(&python, "later_loop.py");
    assert_eq!(says.next().as_deref(), Some("ready"));
    let watching = Watching::start(target.id(), &["--threshold", "100ms"]);
    target.stdin.as_mut().unwrap().write_all(b"start\n").unwrap();
    assert_eq!(says.next().as_deref(), Some("done"));
    // The end of its standard input ends the program, and that loopguard.
    drop(target.stdin.take());
    let events = watching.ended();
    target.wait().unwrap();
    let blocks: Vec<_> = events.blocks().filter(|block| line_of(block, "second").is_some()).collect();
    assert!(!blocks.is_empty(), "{:#?}", events.lines);
    assert!(blocks.iter().all(|block| block["tid"] != block["pid"]), "in the second thread: {blocks:#?}");
    // It has no request that anybody knows; that it had none is not claimed.
    assert!(blocks.iter().all(|block| block["attribution"] != "exact"), "{blocks:#?}");
    assert_eq!(events.summary()["threads"].as_array().map(Vec::len), Some(2), "{:#?}", events.lines);
}

#[test]
fn what_a_thread_does_without_a_loop_is_no_block() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    for python in all_pythons() {
        let (mut target, mut says) = program(&python, "two_loops.py");
        assert_eq!(says.next().as_deref(), Some("ready"));
        let watching = Watching::start(target.id(), &["--threshold", "100ms"]);
        target.stdin.as_mut().unwrap().write_all(b"go\n").unwrap();
        let events = watching.ended();
        target.wait().unwrap();
        let of = |function: &str| events.blocks().filter(|block| line_of(block, function).is_some()).count();
        assert_eq!((of("first"), of("second")), (1, 1), "{python:?}: {:#?}", events.lines);
        assert_eq!(of("without_a_loop"), 0, "{python:?}: {:#?}", events.lines);
    }
}

#[test]
fn every_record_that_was_sent_was_received_or_lost() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    let Some(python) = pythons().into_iter().next_back() else { return };
    let (mut target, mut says) = program(&python, "many_waits.py");
    assert_eq!(says.next().as_deref(), Some("ready"));
    let watching = Watching::start(target.id(), &["--threshold", "16ms", "--steps", "off", "--sample-every", "1ms"]);
    thread::sleep(Duration::from_secs(1));
    // Longer than the ring buffer has room for.
    signal(watching.pid(), libc::SIGSTOP);
    thread::sleep(Duration::from_secs(6));
    signal(watching.pid(), libc::SIGCONT);
    thread::sleep(Duration::from_secs(1));
    let events = watching.stop();
    drop(target.stdin.take());
    target.wait().unwrap();
    let summary = events.summary();
    let [sent, received, lost] = ["sent", "received", "lost"].map(|name| summary["records"][name].as_u64().unwrap());
    assert!(lost > 0 && received > 1000, "nothing overflowed: {summary}");
    assert_eq!(sent, received + lost, "{summary}");
    assert_eq!(summary["lost_records"], lost, "{summary}");
}

#[test]
fn a_block_that_hardly_gets_a_processor_is_named() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    let Some(python) = pythons().into_iter().next_back() else { return };
    let (mut target, mut says) = program(&python, "crowded.py");
    // From when the first block has been noticed on, samples are close: only the first one is hard to see.
    let watching = Watching::start(target.id(), &["--threshold", "50ms"]);
    target.stdin.as_mut().unwrap().write_all(b"block\n").unwrap();
    let said = says.next().unwrap();
    let (began, ended) = said.split_once(' ').unwrap();
    let [began, ended]: [u64; 2] = [began, ended].map(|instant| instant.parse().unwrap());
    drop(target.stdin.take());
    let events = watching.ended();
    target.wait().unwrap();
    // Where its task could not be read from the beginning on, it is told in two parts. What else the program does, up to
    // its end, may take as long: it hardly gets a processor either.
    let at = |block: &serde_json::Value, field: &str| block[field].as_u64().unwrap();
    let overlaps = |block: &&serde_json::Value| at(block, "t_start_ns") < ended && at(block, "t_end_ns") > began;
    let blocks: Vec<_> = events.blocks().filter(overlaps).collect();
    assert!(!blocks.is_empty(), "{:#?}", events.lines);
    assert!(blocks.iter().all(|block| line_of(block, "kept_waiting").is_some()), "{blocks:#?}");
}

#[test]
fn the_target_survives_the_death_of_loopguard_and_loopguard_that_of_the_target() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    let Some(python) = pythons().into_iter().next() else { return };
    let setup = Setup { python: &python, server: "uvicorn-httptools", event_loop: "uvloop", environment: &[] };
    let server = Server::start(&setup);
    let before = probed_code(server.pid());

    let watching = Watching::start(server.pid(), &["--threshold", THRESHOLD]);
    server.get("/block/sleep/200", "first");
    watching.kill();
    assert!(server.get("/fine/alive", "alive").contains("200 OK"));
    assert_eq!(probed_code(server.pid()), before, "the target's code is as it was");

    // Two at once, one after a crashed one: each sees what happens.
    let (one, other) = (
        Watching::start(server.pid(), &["--threshold", THRESHOLD]),
        Watching::start(server.pid(), &["--threshold", THRESHOLD]),
    );
    server.get(&format!("/block/sleep/{BLOCK_MS}"), "seen-twice");
    for events in [one.stop(), other.stop()] {
        assert_eq!(events.blocks_of("seen-twice").count(), 1, "{:#?}", events.lines);
    }

    let watching = Watching::start(server.pid(), &["--threshold", THRESHOLD]);
    server.get(&format!("/block/sleep/{BLOCK_MS}"), "last");
    signal(server.pid(), libc::SIGKILL);
    let events = watching.ended();
    assert_eq!(events.blocks_of("last").count(), 1, "{:#?}", events.lines);
    assert_eq!(events.status.code(), Some(0));
    assert!(events.messages.contains("the process has ended"), "{}", events.messages);
}

/// The bytes of the functions that step probes go to, read from the process's memory.
fn probed_code(pid: u32) -> Vec<Vec<u8>> {
    use loopguard::runtime::cpython::{StepProbe, find};
    use std::os::unix::fs::FileExt as _;
    let interpreter = find(pid).unwrap();
    let memory = fs::File::open(format!("/proc/{pid}/mem")).unwrap();
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    [StepProbe::ContextRun, StepProbe::ContextEnter]
        .into_iter()
        .map(|which| {
            let site = interpreter.probe_site(which).unwrap();
            // `/proc/PID/map_files/START-END` names a mapping of the file that holds the function.
            let inode = |line: &str| line.split_whitespace().nth(4).map(str::to_owned);
            let range = site.file.file_name().unwrap().to_str().unwrap().to_owned();
            let file = maps.lines().find(|line| line.starts_with(&range)).and_then(inode).unwrap();
            let (start, offset) = maps
                .lines()
                .filter(|line| inode(line).as_ref() == Some(&file))
                .find_map(|line| {
                    let mut fields = line.split_whitespace();
                    let (start, end) = fields.next()?.split_once('-')?;
                    let offset = u64::from_str_radix(fields.nth(1)?, 16).ok()?;
                    let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
                    (offset..offset + (end - start)).contains(&site.offset).then_some((start, offset))
                })
                .unwrap();
            let mut bytes = vec![0; 16];
            memory.read_exact_at(&mut bytes, start + site.offset - offset).unwrap();
            bytes
        })
        .collect()
}
