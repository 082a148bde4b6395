//! What loopguard can do without root: with the documented capabilities all of it, and without one of them it says which.

mod support;

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use support::{Server, Setup, Watching, alone, can_trace, free_port, pythons, request};

/// What docs/SECURITY.md says is needed where tracefs is mounted and only root may read it.
const DOCUMENTED: [&str; 4] = ["bpf", "perfmon", "sys_ptrace", "dac_read_search"];
/// Of nobody, on every Linux.
const USER: &str = "65534";

/// A copy that any user may run: the folders of a build need not be open to all.
struct Program(PathBuf);

impl Program {
    fn new() -> Self {
        let folder = std::env::temp_dir().join(format!("loopguard-privileges-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
        let program = folder.join("loopguard");
        fs::copy(env!("CARGO_BIN_EXE_loopguard"), &program).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        Self(program)
    }

    /// Watches `pid` for a second as another user with these capabilities and no others.
    fn watch(&self, pid: u32, capabilities: &[&str]) -> Output {
        let list = capabilities.iter().map(|name| format!(",+{name}")).collect::<String>();
        let script = "mountpoint -q /sys/kernel/tracing || mount -t tracefs nodev /sys/kernel/tracing; exec \"$@\"";
        Command::new("unshare")
            .args(["--mount", "sh", "-c", script, "sh", "setpriv", "--reuid", USER, "--regid", USER, "--clear-groups"])
            .args(["--inh-caps", "--ambient-caps", "--bounding-set"].map(|set| format!("{set}=-all{list}")))
            .arg(&self.0)
            .args(["attach", "--pid", &pid.to_string(), "--threshold", "50ms", "--duration", "2s", "--format", "jsonl"])
            .output()
            .unwrap()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(self.0.parent().unwrap_or(Path::new("/nonexistent")));
    }
}

fn server(python: &Path) -> Server {
    Server::start(&Setup { python, server: "uvicorn-httptools", event_loop: "asyncio", environment: &[] })
}

#[test]
fn the_documented_capabilities_suffice_and_each_missing_one_is_named() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    let Some(python) = pythons().into_iter().next_back() else { return };
    let server = server(&python);
    let program = Program::new();

    let output = std::thread::scope(|scope| {
        let watching = scope.spawn(|| program.watch(server.pid(), &DOCUMENTED));
        for number in 0..20 {
            server.get("/block/sleep/100", &format!("unprivileged-{number}"));
        }
        watching.join().unwrap()
    });
    let (events, messages) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(output.status.success(), "{messages}");
    let blocks: Vec<serde_json::Value> = events
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .filter(|line: &serde_json::Value| line["type"] == "block")
        .collect();
    assert!(!blocks.is_empty(), "{events}{messages}");
    let named = blocks
        .iter()
        .filter(|block| block["requests"][0]["id"].as_str().is_some_and(|id| id.starts_with("unprivileged-")));
    assert!(named.count() > 0, "{events}{messages}");

    let mut said = Vec::new();
    for missing in DOCUMENTED {
        let others: Vec<&str> = DOCUMENTED.into_iter().filter(|name| *name != missing).collect();
        let output = program.watch(server.pid(), &others);
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "without {missing}: {message}");
        let name = format!("without CAP_{} ", missing.to_uppercase());
        assert!(message.contains(&name) && !message.contains("os error"), "without {missing}: {message}");
        assert_eq!(message.lines().count(), 1, "without {missing}: {message}");
        said.push(message);
    }
    said.sort();
    said.dedup();
    assert_eq!(said.len(), DOCUMENTED.len(), "{said:?}");
}

/// Bits of what docs/SECURITY.md says that root keeps (linux/capability.h): DAC_READ_SEARCH, SYS_PTRACE, SYS_ADMIN,
/// PERFMON, BPF and CHECKPOINT_RESTORE.
const KEPT: u64 = 1 << 2 | 1 << 19 | 1 << 21 | 1 << 38 | 1 << 39 | 1 << 40;

#[test]
fn root_gives_up_what_is_not_needed() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    let Some(python) = pythons().into_iter().next_back() else { return };
    let server = server(&python);
    let port = free_port();
    let watching = Watching::start(server.pid(), &["--prometheus", &format!("127.0.0.1:{port}")]);
    // Whoever answers has given up what it had.
    assert!(request(port, "GET /metrics HTTP/1.1\r\nhost: test\r\n\r\n").starts_with("HTTP/1.1 200"));
    let mut names = Vec::new();
    for thread in fs::read_dir(format!("/proc/{}/task", watching.pid())).unwrap() {
        let status = fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim();
        let name = field("Name:");
        for set in ["CapEff:", "CapPrm:", "CapInh:"] {
            let held = u64::from_str_radix(field(set), 16).unwrap();
            let allowed = if name == "loopguard-http" { 0 } else { KEPT };
            assert_eq!(held & !allowed, 0, "{name}: {set} {held:x}");
        }
        assert_eq!(field("NoNewPrivs:"), "1", "{name}");
        names.push(name.to_owned());
    }
    assert!(names.iter().any(|name| name == "loopguard-http") && names.len() > 2, "{names:?}");
    watching.stop();
}
