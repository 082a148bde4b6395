//! The project's chores: `cargo xtask build-ebpf`.

use std::process::ExitCode;

use anyhow::{Result, bail};
use xtask::toolchain;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    match std::env::args().nth(1).as_deref() {
        Some("build-ebpf") => println!("{}", toolchain::build_ebpf()?.display()),
        _ => bail!("usage: cargo xtask build-ebpf"),
    }
    Ok(())
}
