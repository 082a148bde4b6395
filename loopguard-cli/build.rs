//! Builds the kernel programs and tells the compiler where their object is, to be embedded.
//!
//! `LOOPGUARD_SKIP_BPF=1` embeds an empty object instead: enough for documentation and lints on a machine without the
//! BPF toolchain.

use std::env;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use xtask::toolchain::{self, Missing};

const SKIP: &str = "LOOPGUARD_SKIP_BPF";

fn main() -> ExitCode {
    println!("cargo::rerun-if-env-changed={SKIP}");
    for input in ["loopguard-ebpf", "loopguard-common", "Cargo.toml", "Cargo.lock"] {
        println!("cargo::rerun-if-changed=../{input}");
    }
    let object =
        if env::var_os(SKIP).is_some_and(|value| value == "1") { empty_object() } else { toolchain::build_ebpf() };
    match object {
        Ok(object) => {
            println!("cargo::rustc-env=LOOPGUARD_BPF_OBJECT={}", object.display());
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("cargo::error={error:#}");
            // Cargo fails the build either way; the script's failure makes it show the compiler's messages, of which
            // there are none when the toolchain is missing.
            if error.is::<Missing>() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
    }
}

fn empty_object() -> Result<PathBuf> {
    let path = PathBuf::from(env::var_os("OUT_DIR").context("cargo sets OUT_DIR")?).join("no-kernel-programs.o");
    fs::write(&path, [])?;
    Ok(path)
}
