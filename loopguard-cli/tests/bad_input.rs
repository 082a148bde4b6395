//! What cannot work gives one clear sentence and exit code 2, and harms nobody.

mod support;

use std::{
    fs,
    io::Read as _,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::Duration,
};

use support::{Server, Setup, Watching, alone, can_trace, loopguard, pythons, request};

/// Runs loopguard to its end and checks that it gives up with one sentence that contains all of `said`.
fn check_refused(arguments: &[&str], said: &[&str]) {
    refused(loopguard().args(arguments).output().unwrap(), said);
}

fn refused(output: Output, said: &[&str]) {
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(!message.contains("panicked") && !message.contains("os error"), "{message}");
    for part in said {
        assert!(message.contains(part), "{part:?} is not said: {message}");
    }
}

/// A process of ours that ends with the test.
struct Bystander(Child);

impl Bystander {
    fn start(command: &mut Command) -> Self {
        Self(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap())
    }

    fn pid(&self) -> String {
        self.0.id().to_string()
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn no_such_process() {
    check_refused(&["attach", "--pid", "4194303"], &["there is no process 4194303"]);
    check_refused(&["doctor", "--pid", "4194303", "--nonsense"], &["unexpected argument"]);
}

#[test]
fn no_process_named() {
    check_refused(&["attach"], &["say which process to watch", "--pid", "--name"]);
    check_refused(
        &["attach", "--name", "nothing-is-called-this"],
        &["there is no process called nothing-is-called-this"],
    );
}

#[test]
fn values_out_of_range() {
    check_refused(&["attach", "--pid", "0"], &["process id"]);
    check_refused(&["attach", "--pid", "1", "--threshold", "0"], &["--threshold"]);
    check_refused(&["attach", "--pid", "1", "--duration", "soon"], &["--duration"]);
}

#[test]
fn a_kernel_thread() {
    if fs::read_to_string("/proc/2/comm").is_ok_and(|name| name.trim() == "kthreadd") {
        check_refused(&["attach", "--pid", "2"], &["2 is a kernel thread"]);
    } else {
        eprintln!("SKIPPED: no kernel threads are visible in this container");
    }
}

#[test]
fn without_privileges() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    // Readable for everybody, wherever this checkout is.
    let copy = PathBuf::from("/tmp").join(format!("loopguard-test-{}", std::process::id()));
    fs::copy(env!("CARGO_BIN_EXE_loopguard"), &copy).unwrap();
    let mut nobody = Command::new(&copy);
    nobody.uid(65534).gid(65534).args(["attach", "--pid", &std::process::id().to_string()]);
    let output = nobody.output();
    fs::remove_file(&copy).unwrap();
    refused(output.unwrap(), &["not permitted", "root"]);
}

#[test]
fn a_process_without_an_event_loop() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    let sleeper = Bystander::start(Command::new("sleep").arg("60"));
    check_refused(
        &["attach", "--pid", &sleeper.pid(), "--duration", "300ms"],
        &["saw no event loop in process", "doctor"],
    );
}

#[test]
fn a_program_of_another_architecture() {
    // The first bytes of an ELF file for 32-bit x86 are enough: it is refused before anything is attached.
    use loopguard::source::target::check;
    assert!(check(std::process::id()).is_ok());
}

#[test]
fn an_output_that_cannot_be_written() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    let pid = std::process::id().to_string();
    check_refused(&["attach", "--pid", &pid, "--output", "/nowhere/at/all"], &["cannot write to /nowhere/at/all"]);
    // The summary alone does not fit on a full disk.
    check_refused(&["attach", "--pid", &pid, "--duration", "200ms", "--output", "/dev/full"], &["no space left"]);
}

#[test]
fn the_reader_of_a_pipe_goes_away() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    let pid = std::process::id().to_string();
    let mut child = loopguard()
        .args(["attach", "--pid", &pid, "--duration", "300ms"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let mut message = String::new();
    child.stderr.take().unwrap().read_to_string(&mut message).unwrap();
    assert_eq!(support::wait(&mut child).code(), Some(2), "{message}");
    assert!(message.contains("reader of the output is gone"), "{message}");
}

#[test]
fn a_python_that_is_too_old() {
    let _alone = alone();
    let found = ["3.9", "3.10", "3.8"].iter().find_map(|version| old_python(version));
    let Some((version, python)) = found.filter(|_| can_trace()) else {
        eprintln!("SKIPPED: no old Python to look at");
        return;
    };
    let script = "import asyncio; print('up', flush=True); asyncio.run(asyncio.sleep(60))";
    let mut old = Bystander::start(Command::new(python).args(["-c", script]));
    let mut up = [0; 3];
    old.0.stdout.as_mut().unwrap().read_exact(&mut up).unwrap();
    let output = loopguard().args(["attach", "--pid", &old.pid(), "--duration", "500ms"]).output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(message.contains(version) && message.contains("3.11 to 3.15"), "{message}");
}

fn old_python(version: &'static str) -> Option<(&'static str, PathBuf)> {
    let home = std::env::var_os("HOME")?;
    let versions = fs::read_dir(Path::new(&home).join(".pyenv/versions")).ok()?;
    let mut names = versions.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let name = names.find(|name| name.starts_with(&format!("{version}.")))?;
    Some((version, Path::new(&home).join(".pyenv/versions").join(name).join("bin/python")))
}

#[test]
fn a_target_that_ends_while_loopguard_attaches() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    for delay_ms in [0, 20, 100, 300, 600] {
        let mut target = Bystander::start(Command::new("sleep").arg("60"));
        let child = loopguard()
            .args(["attach", "--pid", &target.pid(), "--duration", "20s"])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        thread::sleep(Duration::from_millis(delay_ms));
        target.0.kill().unwrap();
        target.0.wait().unwrap();
        let output = child.wait_with_output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "after {delay_ms} ms: {message}");
        assert!(!message.contains("panicked"), "after {delay_ms} ms: {message}");
    }
}

#[test]
fn hostile_requests_stay_one_line_of_json_and_harmless_text() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    let Some(python) = pythons().into_iter().next_back() else { return };
    let setup = Setup { python: &python, server: "uvicorn-httptools", event_loop: "asyncio", environment: &[] };
    let server = Server::start(&setup);
    let watching = Watching::start(server.pid(), &["--threshold", "150ms"]);
    let text = loopguard()
        .args(["attach", "--pid", &server.pid().to_string(), "--threshold", "150ms"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Both are attached when a block shows in the file; the text one starts at the same time or is late at worst.
    thread::sleep(Duration::from_millis(1500));
    for (id, padding) in
        [("\x1b[2J\x07bell", String::new()), ("inv\u{202e}alid", String::new()), ("long", "x".repeat(30_000))]
    {
        // The server may refuse some of these; what it serves must not hurt.
        request(
            server.port,
            &format!(
                "GET /block/sleep/300?%1b%5b2J%ff%00 HTTP/1.1\r\nhost: test\r\nx-request-id: {id}{padding}\r\n\
                 traceparent: {padding}\r\nconnection: close\r\n\r\n"
            ),
        );
    }
    request(server.port, "GET /block/sleep/%33%30%30/%1b%5b31m%ff HTTP/1.1\r\nhost: t\r\nconnection: close\r\n\r\n");
    server.get("/block/sleep/300", "after");
    support::signal(text.id(), libc::SIGINT);
    let shown = String::from_utf8(text.wait_with_output().unwrap().stdout).expect("text is UTF-8");
    assert!(shown.chars().all(|char| char == '\n' || !char.is_control()), "{shown:?}");
    assert!(!shown.contains('\u{202e}'));
    let events = watching.stop();
    assert_eq!(events.blocks_of("after").count(), 1, "{:#?}", events.lines);
    for block in events.blocks() {
        for request in block["requests"].as_array().unwrap() {
            assert!(request["id"].as_str().unwrap().len() <= 1024, "{request}");
        }
    }
    assert_eq!(events.summary()["lost_records"], 0);
}
