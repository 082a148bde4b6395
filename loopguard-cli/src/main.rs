//! The `loopguard` program: parses the command line and turns outcomes into exit codes.

use std::process::ExitCode;

use anyhow::Result;
use loopguard::{
    args::Command,
    attach::{self, Outcome},
    config::{self, ProcessEnvironment, Wrong},
    doctor,
    sink::escape::{plain, printable},
};

/// As linters have them.
const FOUND: u8 = 1;
const FAILED: u8 = 2;

fn main() -> ExitCode {
    give_memory_back();
    match run() {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("loopguard: {}", printable(&plain(&format!("{error:#}"))));
            ExitCode::from(FAILED)
        }
    }
}

/// Most of what loopguard ever allocates is needed while it attaches: the kernel's types, symbol tables. glibc would keep
/// that for later, once for each thread (mallopt(3)); a profiler beside a server gives it back.
fn give_memory_back() {
    #[cfg(target_env = "gnu")]
    for (parameter, value) in
        [(libc::M_ARENA_MAX, 1), (libc::M_MMAP_THRESHOLD, 128 << 10), (libc::M_TRIM_THRESHOLD, 4 << 20)]
    {
        // SAFETY: no memory of ours is involved, and no other thread runs yet.
        unsafe { libc::mallopt(parameter, value) };
    }
}

fn run() -> Result<u8> {
    let configured = match config::parse(std::env::args_os().collect(), &ProcessEnvironment) {
        Ok(configured) => configured,
        Err(Wrong::Usage(error)) => error.exit(),
        Err(Wrong::Value(error)) => return Err(error),
    };
    match &configured.arguments.command {
        Command::Attach(options) => attach::run(options).map(code),
        Command::Run(options) => attach::run_command(options).map(code),
        Command::Config(_) => config::print(&configured.effective).map(|()| 0),
        Command::Doctor(options) => doctor::run(options).map(|healthy| if healthy { 0 } else { FAILED }),
    }
}

/// A command that failed says more than a block.
fn code(outcome: Outcome) -> u8 {
    match outcome.command {
        Some(code) if code != 0 => code,
        _ if outcome.failing_blocks > 0 => FOUND,
        _ => 0,
    }
}
