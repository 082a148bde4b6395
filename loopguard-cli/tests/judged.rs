//! What makes a run fail, what is left behind of it, and how `loopguard run` treats its command.

mod support;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Output, Stdio},
    thread,
    time::Duration,
};

use serde_json::Value;
use support::{Server, Setup, Watching, alone, can_trace, line_of, loopguard, pythons, signal};

fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    folder
}

fn suite(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/suites").join(name)
}

/// `loopguard run --fail-on-blocking` over pytest over a test-suite.
fn judge(python: &Path, name: &str, options: &[&str]) -> Output {
    loopguard()
        .args(["run", "--threshold", "150ms", "--format", "jsonl"])
        .args(options)
        .arg("--")
        .arg(python)
        .args(["-B", "-m", "pytest", "-q", "-p", "no:cacheprovider"])
        .arg(suite(name))
        .output()
        .unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[test]
fn a_test_suite_that_blocks_fails_and_a_clean_one_does_not() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    let Some(python) = pythons().into_iter().next_back() else { return };
    let folder = folder("judged");
    let (junit, markdown) = (folder.join("junit.xml"), folder.join("report.md"));
    let reports = ["--junit", junit.to_str().unwrap(), "--markdown", markdown.to_str().unwrap()];

    let blocking = judge(&python, "blocking_test.py", &[&["--fail-on-blocking"], &reports[..]].concat());
    assert_eq!(blocking.status.code(), Some(1), "{}", said(&blocking));
    assert!(said(&blocking).contains("2 passed"), "{}", said(&blocking));
    for report in [&junit, &markdown] {
        let text = fs::read_to_string(report).unwrap();
        assert!(text.contains("blocking_test.py:13 report") || text.contains("blocking\\_test.py:13 report"), "{text}");
        assert!(text.contains("asyncio.sleep"), "the hint: {text}");
    }
    assert!(fs::read_to_string(&junit).unwrap().contains("failures=\"1\""));

    let clean = judge(&python, "clean_test.py", &["--fail-on-blocking"]);
    assert_eq!(clean.status.code(), Some(0), "{}", said(&clean));
    assert!(said(&clean).contains("2 passed"), "{}", said(&clean));

    // A block shorter than what fails the run.
    let tolerant = judge(&python, "blocking_test.py", &["--fail-on-blocking=30s"]);
    assert_eq!(tolerant.status.code(), Some(0), "{}", said(&tolerant));

    // Known, with a reason; and one entry that nothing matches.
    let allow = folder.join("allow.txt");
    fs::write(&allow, "blocking_test.py:report it is a test\nold.py:7 gone by now\n").unwrap();
    let options = ["--fail-on-blocking", "--allow", allow.to_str().unwrap()];
    let allowed = judge(&python, "blocking_test.py", &[&options, &reports[..]].concat());
    assert_eq!(allowed.status.code(), Some(0), "{}", said(&allowed));
    assert!(said(&allowed).contains("the allow file names old.py:7"), "{}", said(&allowed));
    let junit = fs::read_to_string(&junit).unwrap();
    assert!(junit.contains("failures=\"0\"") && junit.contains("allowed: it is a test"), "{junit}");
    assert!(fs::read_to_string(&markdown).unwrap().contains("Stale entries"));
}

#[test]
fn a_command_without_a_loop_is_no_clean_bill() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    for options in [&["--fail-on-blocking"][..], &[]] {
        let output = loopguard().arg("run").args(options).args(["--", "true"]).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{}", said(&output));
        assert!(said(&output).contains("saw no event loop"), "{}", said(&output));
    }
    let output = loopguard().args(["run", "--", "/nowhere/at/all"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    assert!(said(&output).contains("there is no such program"), "{}", said(&output));
    let output = loopguard().args(["run", "--pid", "1", "--", "true"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
}

#[test]
fn the_commands_own_end_and_signals_are_passed_on() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    let Some(python) = pythons().into_iter().next_back() else { return };
    let script = "import asyncio, sys; asyncio.run(asyncio.sleep(0.05)); sys.exit(7)";
    let output = loopguard().args(["run", "--"]).arg(&python).args(["-c", script]).output().unwrap();
    assert_eq!(output.status.code(), Some(7), "{}", said(&output));

    let script = "import asyncio; print('up', flush=True); asyncio.run(asyncio.sleep(60))";
    let folder = folder("signals");
    let up = folder.join("up");
    let mut child = loopguard()
        .args(["run", "--format", "jsonl", "--output"])
        .arg(folder.join("events.jsonl"))
        .arg("--")
        .arg(&python)
        .args(["-c", script])
        .stdout(fs::File::create(&up).unwrap())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    while fs::read_to_string(&up).unwrap().is_empty() {
        assert!(child.try_wait().unwrap().is_none());
        thread::sleep(Duration::from_millis(10));
    }
    // Into its sleep, so that loopguard sees the loop.
    thread::sleep(Duration::from_millis(500));
    signal(child.id(), libc::SIGTERM);
    assert_eq!(support::wait(&mut child).code(), Some(128 + libc::SIGTERM));
}

#[test]
fn the_first_tick_of_a_command_is_seen() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    for python in pythons() {
        let script = "import asyncio, time\nasync def main():\n    time.sleep(0.4)\nasyncio.run(main(), debug=False)";
        let events = folder("first-tick").join("events.jsonl");
        let output = loopguard()
            .args(["run", "--threshold", "150ms", "--format", "jsonl", "--output"])
            .arg(&events)
            .arg("--")
            .arg(&python)
            .args(["-c", script])
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", said(&output));
        let lines = fs::read_to_string(&events).unwrap();
        let blocks: Vec<Value> = lines
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap())
            .filter(|line| line["type"] == "block")
            .collect();
        // All of it: the tick began with the loop's first look at what is ready. Where the last capture came too late to
        // tell its owner, the end of the tick is told apart.
        let total_ms: f64 = blocks.iter().map(|block| block["duration_ms"].as_f64().unwrap()).sum();
        assert!(total_ms >= 399.0, "{lines}");
        assert!(blocks.iter().any(|block| line_of(block, "main").is_some()), "{lines}");
    }
}

#[test]
fn many_short_steps_and_those_who_wait_are_named() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    for python in pythons() {
        for event_loop in ["uvloop", "asyncio"] {
            let setup = Setup { python: &python, server: "uvicorn-httptools", event_loop, environment: &[] };
            let server = Server::start(&setup);
            // A wide window: on a busy machine 300 ms of steps can take seconds.
            let options = ["--threshold", "150ms", "--cumulative-window", "10s"];
            let watching = Watching::start(server.pid(), &options);
            server.get("/block/cuts/15", "cuts");
            thread::scope(|scope| {
                for number in 0..3 {
                    let server = &server;
                    scope.spawn(move || server.get("/wait/2500", &format!("waits-{number}")));
                }
                thread::sleep(Duration::from_millis(500));
                server.get("/block/sleep/500", "blocks");
            });
            let events = watching.stop();
            let context = format!("{} {event_loop}: {:#?}", python.display(), events.lines);
            let cumulative: Vec<&Value> = events.blocks().filter(|block| block["event"] == "cumulative").collect();
            assert_eq!(cumulative.len(), 1, "{context}");
            assert_eq!(cumulative[0]["requests"].as_array().map(Vec::len), Some(1), "{context}");
            assert_eq!(cumulative[0]["requests"][0]["id"], "cuts", "{context}");
            assert!(line_of(cumulative[0], "block_cuts").is_some(), "{context}");
            assert!(cumulative[0]["total_ms"].as_f64().unwrap() >= 200.0, "{context}");
            assert!(cumulative[0]["hint"].as_str().unwrap().contains("asyncio.sleep"), "{context}");

            let block = events.blocks_of("blocks").next().unwrap_or_else(|| panic!("{context}"));
            let victims = block["victim_requests"].as_array().unwrap_or_else(|| panic!("{context}"));
            let mut ids: Vec<&str> = victims.iter().map(|victim| victim["id"].as_str().unwrap()).collect();
            ids.sort_unstable();
            assert_eq!(ids, ["waits-0", "waits-1", "waits-2"], "{context}");
            assert_eq!(block["victims"], 3, "{context}");
        }
    }
}

#[test]
fn the_log_survives_rotation() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    let Some(python) = pythons().into_iter().next() else { return };
    let setup = Setup { python: &python, server: "uvicorn-httptools", event_loop: "uvloop", environment: &[] };
    let server = Server::start(&setup);
    let folder = folder("log");
    let (log, rotated) = (folder.join("blocks.log"), folder.join("blocks.log.1"));
    let watching = Watching::start(server.pid(), &["--threshold", "150ms", "--log", log.to_str().unwrap()]);
    let ids = |path: &Path| -> Vec<String> {
        let text = fs::read_to_string(path).unwrap_or_default();
        let records = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        records
            .map(|it| it["attributes"]["http.request.header.x-request-id"][0].as_str().unwrap_or("-").to_owned())
            .collect()
    };
    let wait_for = |path: &Path, id: &str| {
        while !ids(path).iter().any(|seen| seen == id) {
            thread::sleep(Duration::from_millis(20));
        }
    };
    server.get("/block/sleep/300", "first");
    wait_for(&log, "first");
    fs::rename(&log, &rotated).unwrap();
    signal(watching.pid(), libc::SIGHUP);
    while !log.exists() {
        thread::sleep(Duration::from_millis(20));
    }
    server.get("/block/sleep/300", "second");
    wait_for(&log, "second");
    let events = watching.stop();
    assert!(ids(&rotated).contains(&"first".to_owned()) && !ids(&rotated).contains(&"second".to_owned()));
    let record: Value = serde_json::from_str(fs::read_to_string(&log).unwrap().lines().next().unwrap()).unwrap();
    assert_eq!(record["attributes"]["http.route"], "/block/sleep/{ms}", "{record:#}");
    assert_eq!(record["attributes"]["http.request.method"], "GET", "{record:#}");
    assert!(record["timestamp"].as_str().unwrap().ends_with('Z'), "{record:#}");
    assert_eq!(events.status.code(), Some(0), "{}", events.messages);
}

#[test]
fn config_prints_what_holds_and_why() {
    let file = folder("config").join("loopguard.toml");
    fs::write(&file, "threshold = \"auto\"\nexclude-route = [\"/up\"]\n").unwrap();
    let output = loopguard()
        .args(["config", "--steps", "off", "--config"])
        .arg(&file)
        .env("LOOPGUARD_LABEL_CAP", "50")
        .output()
        .unwrap();
    let printed = said(&output);
    assert_eq!(output.status.code(), Some(0), "{printed}");
    let has = |line: &str, origin: &str| {
        printed.lines().any(|printed| printed.starts_with(line) && printed.ends_with(&format!("# {origin}")))
    };
    assert!(has("threshold = \"auto\"", &format!("{}:1", file.display())), "{printed}");
    assert!(has("exclude-route = [\"/up\"]", &format!("{}:2", file.display())), "{printed}");
    assert!(has("label-cap = \"50\"", "LOOPGUARD_LABEL_CAP"), "{printed}");
    assert!(has("steps = \"off\"", "command line"), "{printed}");
    assert!(has("cumulative-window = \"1s\"", "default"), "{printed}");
    // What is printed can be read again, and means the same.
    let again = file.with_file_name("again.toml");
    fs::write(&again, &output.stdout).unwrap();
    let second = loopguard().arg("config").arg("--config").arg(&again).output().unwrap();
    let values = |text: &[u8]| -> Vec<String> {
        String::from_utf8_lossy(text)
            .lines()
            .map(|line| line.split("  #").next().unwrap().trim_end().to_owned())
            .collect()
    };
    assert_eq!(values(&second.stdout), values(&output.stdout), "{}", said(&second));

    fs::write(&file, "\n\nthreshold = 50\n").unwrap();
    let wrong = loopguard().args(["attach", "--pid", "1", "--config"]).arg(&file).output().unwrap();
    assert_eq!(wrong.status.code(), Some(2));
    let expected = format!("{}:3: threshold: a unit is missing", file.display());
    assert!(said(&wrong).contains(&expected), "{}", said(&wrong));
}
