//! Runs one long command of a chore: a line says what it is, a sign of life comes while it lasts, and its output is
//! shown only when it fails.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

const SIGN_OF_LIFE: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(50);
/// Lines of the log that are shown after a failure.
const TAIL_LINES: usize = 20;

pub fn say(what: &str) {
    println!("» {what}");
}

/// `log` keeps the whole output.
pub fn run(what: &str, command: &mut Command, log: &Path) -> Result<()> {
    say(what);
    if let Some(folder) = log.parent() {
        fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    }
    let output = File::create(log).with_context(|| format!("create {}", log.display()))?;
    let started = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .spawn()
        .with_context(|| format!("run {}", command.get_program().display()))?;
    let mut next_sign = SIGN_OF_LIFE;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if started.elapsed() >= next_sign {
            println!("  … {} s", next_sign.as_secs());
            next_sign += SIGN_OF_LIFE;
        }
        thread::sleep(POLL);
    };
    if status.success() {
        return Ok(());
    }
    eprintln!("{}", tail(log));
    bail!("{} failed ({status}); all of its output is in {}", command.get_program().display(), log.display())
}

/// The last lines of a log, indented.
pub fn tail(log: &Path) -> String {
    let bytes = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> = text.lines().collect();
    let from = lines.len().saturating_sub(TAIL_LINES);
    lines[from..].iter().map(|line| format!("  | {line}")).collect::<Vec<_>>().join("\n")
}
