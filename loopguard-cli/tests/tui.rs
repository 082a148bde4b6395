//! The live screen on a real blocking server, in a real terminal: what it shows, and that the terminal is as before.

mod support;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use support::{PATIENCE, Server, Setup, alone, can_trace, pythons, signal};

const POLL: Duration = Duration::from_millis(50);
/// What the screen promises: a block that has just ended is on it.
const SHOWN_WITHIN: Duration = Duration::from_secs(2);

/// A shell in a terminal of its own, in an empty folder. It ends with the test.
struct Terminal {
    socket: String,
    folder: PathBuf,
    /// `stty -g` before anything ran.
    settings: String,
}

impl Terminal {
    /// `None`, and said so, where there is no tmux to be had.
    fn start(name: &str, (columns, rows): (u16, u16)) -> Option<Self> {
        if Command::new("tmux").arg("-V").output().is_err() {
            assert!(
                std::env::var_os("LOOPGUARD_REQUIRE_BPF").is_none_or(|value| value != "1"),
                "LOOPGUARD_REQUIRE_BPF=1, but there is no tmux: run `cargo xtask test`"
            );
            eprintln!("SKIPPED: the live screen is tested in tmux, which is not here");
            return None;
        }
        let socket = format!("loopguard-{name}-{}", std::process::id());
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(&socket);
        fs::create_dir_all(&folder).unwrap();
        let mut terminal = Self { socket, folder, settings: String::new() };
        let folder = terminal.folder.to_str().unwrap().to_owned();
        // A plain prompt, no start-up files, and the same characters and colours everywhere.
        let shell = "env -u NO_COLOR LC_ALL=C.UTF-8 COLORTERM=truecolor PS1='$ ' sh";
        let size = (columns.to_string(), rows.to_string());
        terminal.tmux(&["new-session", "-d", "-x", &size.0, "-y", &size.1, "-c", &folder, shell]);
        terminal.wait_for("$");
        terminal.type_line("stty -g > before; echo a line from before");
        terminal.wait_until("the line", |screen| screen.lines().any(|line| line == "a line from before"));
        terminal.settings = terminal.written("before");
        Some(terminal)
    }

    fn tmux(&self, arguments: &[&str]) -> String {
        let output =
            Command::new("tmux").args(["-L", &self.socket, "-f", "/dev/null"]).args(arguments).output().unwrap();
        assert!(output.status.success(), "tmux {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn keys(&self, keys: &[&str]) {
        self.tmux(&[&["send-keys"], keys].concat());
    }

    fn type_line(&self, line: &str) {
        self.tmux(&["send-keys", "-l", line]);
        self.keys(&["Enter"]);
    }

    fn screen(&self) -> String {
        self.tmux(&["capture-pane", "-p"])
    }

    /// Waits until the screen shows a text, and returns the screen.
    #[track_caller]
    fn wait_for(&self, text: &str) -> String {
        self.wait_until(text, |screen| screen.contains(text))
    }

    #[track_caller]
    fn wait_until(&self, what: &str, shows: impl Fn(&str) -> bool) -> String {
        let started = Instant::now();
        loop {
            let screen = self.screen();
            if shows(&screen) {
                return screen;
            }
            assert!(started.elapsed() < PATIENCE, "{what:?} is not shown:\n{screen}");
            thread::sleep(POLL);
        }
    }

    fn written(&self, name: &str) -> String {
        let started = Instant::now();
        loop {
            match fs::read_to_string(self.folder.join(name)) {
                Ok(text) if text.ends_with('\n') => return text,
                other => assert!(started.elapsed() < PATIENCE, "{name}: {other:?}"),
            }
            thread::sleep(POLL);
        }
    }

    /// Starts loopguard on a server and waits until it says that it watches it.
    fn watch(&self, server: &Server) {
        let program = env!("CARGO_BIN_EXE_loopguard");
        self.type_line(&format!("{program} attach --pid {} --threshold 150ms; echo status $?", server.pid()));
        self.wait_for("1 loop thread");
    }

    fn loopguard_pid(&self) -> u32 {
        let shell = self.tmux(&["display-message", "-p", "#{pane_pid}"]);
        let children = format!("/proc/{0}/task/{0}/children", shell.trim());
        let children = fs::read_to_string(children).unwrap();
        let [child] = children.split_whitespace().collect::<Vec<_>>()[..] else { panic!("children: {children:?}") };
        child.parse().unwrap()
    }

    /// The screen from before with the summary below it, and every mode that was set taken back.
    fn assert_given_back(&self, status: &str) {
        let screen = self.wait_until(status, |screen| screen.lines().any(|line| line == status));
        // What was there before scrolls away below a long summary, but is not lost.
        let history = self.tmux(&["capture-pane", "-p", "-S", "-"]);
        assert!(history.lines().any(|line| line == "a line from before"), "{history}");
        assert!(history.contains("Watched for "), "{history}");
        assert!(history.contains("loopguard: watching process"), "the notices are told: {history}");
        assert!(!screen.contains("1 Blocks   2 Routes"), "{screen}");
        self.assert_modes_are_as_before();
    }

    fn assert_modes_are_as_before(&self) {
        let modes =
            "#{alternate_on} #{cursor_flag} #{mouse_any_flag} #{keypad_cursor_flag} #{insert_flag} #{wrap_flag}";
        assert_eq!(self.tmux(&["display-message", "-p", modes]).trim(), "0 1 0 0 0 1", "{}", self.screen());
        self.type_line("stty -g > after");
        assert_eq!(self.written("after"), self.settings);
        fs::remove_file(self.folder.join("after")).unwrap();
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // The server behind our own socket, which this test started.
        let _ = Command::new("tmux").args(["-L", &self.socket, "kill-server"]).output();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Where kernel programs can be loaded.
fn server() -> Option<Server> {
    if !can_trace() {
        return None;
    }
    let python = pythons().into_iter().next_back()?;
    Some(Server::start(&Setup { python: &python, server: "uvicorn-httptools", event_loop: "uvloop", environment: &[] }))
}

fn blocking_line() -> String {
    let source = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/servers/app.py")).unwrap();
    let index = source.lines().position(|line| line.ends_with("# line: block_sleep")).unwrap();
    format!("app.py:{} block_sleep", index + 1)
}

#[test]
fn a_person_finds_the_culprit_and_leaves_the_terminal_as_it_was() {
    let _alone = alone();
    let Some(server) = server() else { return };
    let Some(terminal) = Terminal::start("person", (100, 30)) else { return };
    terminal.watch(&server);
    terminal.wait_for("no block so far");

    server.get("/block/sleep/300", "first");
    let ended = Instant::now();
    let line = blocking_line();
    let screen =
        terminal.wait_until("the first block", |screen| screen.contains("/block/sleep") && screen.contains(&line));
    let took = ended.elapsed();
    println!("the first block was on the screen {took:.2?} after it ended");
    assert!(took < SHOWN_WITHIN, "{took:?}:\n{screen}");

    // To its route, its blocks, its stack.
    terminal.keys(&["2"]);
    let screen = terminal.wait_for("GET /block/sleep/{ms}");
    assert!(screen.contains("p99"), "{screen}");
    terminal.keys(&["Enter"]);
    terminal.wait_for("of GET /block/sleep/{ms}");
    terminal.keys(&["Enter"]);
    let screen = terminal.wait_for("stack, innermost first");
    assert!(screen.contains("waiting (") && screen.contains("clock_nanosleep"), "{screen}");
    assert!(screen.contains("id first"), "{screen}");
    let marked = |screen: &str| screen.lines().any(|shown| shown.starts_with('▶') && shown.ends_with(&line));
    assert!(marked(&screen), "{screen}");
    // The source is read from the file of the process.
    terminal.wait_for("time.sleep(ms / 1000)  # line: block_sleep");

    terminal.keys(&["e"]);
    let screen = terminal.wait_for("wrote 1 block to ");
    let name = screen.split("wrote 1 block to ").nth(1).unwrap().split_whitespace().next().unwrap();
    let exported: Value = serde_json::from_str(terminal.written(name).trim_end()).unwrap();
    assert_eq!((&exported["type"], &exported["requests"][0]["id"]), (&"block".into(), &"first".into()));

    // Flame, then back to all blocks and a search.
    terminal.keys(&["5"]);
    let screen = terminal.wait_for("all blocks: blocked ");
    assert!(screen.contains("block_sleep app.py:"), "{screen}");
    terminal.keys(&["1", "Escape"]);
    terminal.wait_until("all of it", |screen| !screen.contains("of GET /block"));
    terminal.keys(&["1", "/"]);
    terminal.keys(&["-l", "nonsense"]);
    terminal.wait_for("nothing matches the search");
    terminal.keys(&["Escape"]);
    terminal.wait_for("/block/sleep/300");

    // What happens while the screen is paused comes when it goes on.
    terminal.keys(&["p"]);
    terminal.wait_for("PAUSED, 0 blocks since");
    server.get("/block/cpu/300", "second");
    let screen = terminal.wait_for("PAUSED, 1 blocks since");
    assert!(!screen.contains("/block/cpu"), "{screen}");
    terminal.keys(&["p"]);
    terminal.wait_for("/block/cpu");

    // A block is announced while it goes on.
    thread::scope(|scope| {
        scope.spawn(|| server.get("/block/sleep/2500", "stuck"));
        let screen = terminal.wait_for("BLOCKED for ");
        assert!(screen.contains("GET /block/sleep/2500") && screen.contains(&line), "{screen}");
    });
    server.get("/fine/after", "after");
    terminal.wait_until("its end", |screen| !screen.contains("BLOCKED for ") && screen.contains("blocks 3"));

    // A smaller window, down to nothing, and back.
    for size in [("60", "15"), ("20", "4"), ("100", "30")] {
        terminal.tmux(&["resize-window", "-x", size.0, "-y", size.1]);
        let shown = if size.0 == "20" { "blocks" } else { "1 Blocks" };
        terminal.wait_for(shown);
    }
    terminal.keys(&["q"]);
    terminal.assert_given_back("status 0");
}

#[test]
fn a_signal_and_the_end_of_the_target_give_the_terminal_back() {
    let _alone = alone();
    let Some(server) = server() else { return };
    let Some(terminal) = Terminal::start("ends", (80, 24)) else { return };
    for ends_it in [libc::SIGTERM, libc::SIGHUP] {
        terminal.watch(&server);
        signal(terminal.loopguard_pid(), ends_it);
        terminal.assert_given_back("status 0");
        terminal.type_line("clear; echo a line from before");
        terminal.wait_until("a fresh screen", |screen| !screen.contains("status") && screen.contains("\n$"));
    }
    terminal.watch(&server);
    server.get("/block/sleep/300", "last");
    terminal.wait_for("/block/sleep/300");
    signal(server.pid(), libc::SIGKILL);
    terminal.assert_given_back("status 0");
    let history = terminal.tmux(&["capture-pane", "-p", "-S", "-"]);
    assert!(history.contains("loopguard: the process has ended"), "{history}");
}

/// Not a test: run by the next one in a terminal, which it takes and then panics.
#[test]
#[ignore = "panics on purpose; run by a_panic_gives_the_terminal_back"]
fn panics_while_it_holds_the_terminal() {
    use loopguard::sink::text::{Look as TextLook, Style, Times};
    use loopguard::tui::draw::look::{Colours, Glyphs, Look};
    use loopguard::tui::screen::Screen;
    // What comes after the hook must find nothing left to do: no destructor runs.
    std::panic::set_hook(Box::new(|_| std::process::abort()));
    let times = Times::SinceStart { start_ns: 0 };
    let look = Look { glyphs: Glyphs::Ascii, colours: Colours::Basic, times, current_dir: None };
    let text = TextLook { style: Style::Plain, times, current_dir: None };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut screen = Screen::new(look, text).unwrap();
        screen.take_terminal().unwrap();
        fs::write("taken", "\n").unwrap();
        // Long enough to be seen.
        thread::sleep(Duration::from_secs(1));
        panic!("on purpose");
    });
}

#[test]
fn a_panic_gives_the_terminal_back() {
    let Some(terminal) = Terminal::start("panic", (80, 24)) else { return };
    let this = std::env::current_exe().unwrap();
    let test = "--ignored --exact panics_while_it_holds_the_terminal --nocapture --test-threads 1";
    terminal.type_line(&format!("{} {test}; echo status $?", this.display()));
    terminal.written("taken");
    assert!(terminal.tmux(&["display-message", "-p", "#{alternate_on} #{mouse_any_flag}"]).trim() == "1 1");
    // 128 + SIGABRT
    terminal.wait_until("its end", |screen| screen.lines().any(|line| line == "status 134"));
    assert!(terminal.screen().contains("a line from before"));
    terminal.assert_modes_are_as_before();
}
