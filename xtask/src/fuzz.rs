//! Builds the fuzz targets, replays their corpus and fuzzes on from there for a while.
//!
//! This is what cargo-fuzz does, with the stable compiler: the folder has its layout, so it works there too.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use xtask::workspace::{Workspace, cargo};

use crate::step::{self, say};

const USAGE: &str = "usage: cargo xtask fuzz [--seconds N | --runs N] [TARGET...]";
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// In all.
const SECONDS: u32 = 30;
/// One input may take this long; real ones take microseconds.
const HANG_S: u32 = 10;
const MEMORY_MIB: u32 = 2048;
/// Longer inputs find nothing that shorter ones don't.
const MAX_BYTES: u32 = 8192;

/// How the compiler makes code that tells the fuzzer where an input led.
const COVERAGE: [&str; 6] = [
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];

#[derive(Clone, Copy)]
enum Limit {
    /// Seconds, of all targets together.
    Seconds(u32),
    /// Of each target.
    Runs(u64),
}

pub fn run(arguments: &[&str]) -> Result<()> {
    let (limit, names) = match arguments {
        ["--seconds", value, names @ ..] => (Limit::Seconds(number(value)?), names),
        ["--runs", value, names @ ..] => (Limit::Runs(number(value)?), names),
        names => (Limit::Seconds(SECONDS), names),
    };
    let workspace = Workspace::locate()?;
    let known = targets(&workspace.root.join("fuzz/targets"))?;
    if let Some(unknown) = names.iter().find(|name| !known.iter().any(|known| known == *name)) {
        bail!("there is no fuzz target `{unknown}`, only {}\n{USAGE}", known.join(", "));
    }
    let programs = build(&workspace)?;
    let chosen: Vec<&String> = known.iter().filter(|name| names.is_empty() || names.contains(&name.as_str())).collect();
    let limit = match limit {
        Limit::Seconds(all) => format!("-max_total_time={}", (all / chosen.len() as u32).max(1)),
        Limit::Runs(runs) => format!("-runs={runs}"),
    };
    for name in chosen {
        let runs = fuzz(&workspace, &programs.join(name), (name, &limit))?;
        say(&format!("fuzz {name}: {runs} executions, nothing found"));
    }
    Ok(())
}

fn number<T: std::str::FromStr>(text: &str) -> Result<T> {
    text.parse().ok().with_context(|| format!("`{text}` is not a number\n{USAGE}"))
}

fn targets(folder: &Path) -> Result<Vec<String>> {
    let mut names: Vec<String> =
        fs::read_dir(folder)?.filter_map(|entry| Some(entry.ok()?.path().file_stem()?.to_str()?.to_owned())).collect();
    names.sort();
    Ok(names)
}

/// The folder with the programs.
fn build(workspace: &Workspace) -> Result<PathBuf> {
    let folder = workspace.target.join("fuzz");
    let mut flags = COVERAGE.map(str::to_owned).to_vec();
    if has_address_sanitizer()? {
        flags.push("-Zsanitizer=address".to_owned());
    } else {
        say(
            "this compiler comes without AddressSanitizer: panics and hangs are found, wild reads only when they crash",
        );
    }
    let mut build = cargo();
    build
        .args(["build", "--release", "--locked", "--target", TARGET, "--target-dir"])
        .arg(&folder)
        .arg("--manifest-path")
        .arg(workspace.root.join("fuzz/Cargo.toml"))
        // The flags are a nightly's.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .env("LOOPGUARD_SKIP_BPF", "1");
    step::run("building the fuzz targets (two minutes the first time)", &mut build, &folder.join("build.log"))?;
    Ok(folder.join(TARGET).join("release"))
}

fn has_address_sanitizer() -> Result<bool> {
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(rustc).args(["--print", "target-libdir", "--target", TARGET]).output()?;
    let folder = String::from_utf8(output.stdout)?;
    let libraries = fs::read_dir(folder.trim()).context("the compiler has no libraries")?;
    Ok(libraries.flatten().any(|entry| entry.file_name().to_string_lossy().ends_with("_rt.asan.a")))
}

/// How many inputs were tried.
fn fuzz(workspace: &Workspace, program: &Path, (name, limit): (&str, &str)) -> Result<u64> {
    let folder = workspace.target.join("fuzz");
    let (found, artifacts) = (folder.join("corpus").join(name), folder.join("artifacts"));
    fs::create_dir_all(&found)?;
    fs::create_dir_all(&artifacts)?;
    let log = folder.join(format!("{name}.log"));
    let mut fuzzer = Command::new(program);
    fuzzer
        .arg(limit)
        .args([format!("-timeout={HANG_S}"), format!("-rss_limit_mb={MEMORY_MIB}"), format!("-max_len={MAX_BYTES}")])
        .args(["-print_final_stats=1", "-detect_leaks=0"])
        // To weigh inputs by how rare what they reach is takes longer than most of these runs do.
        .arg("-entropic=0")
        .arg(format!("-artifact_prefix={}/{name}-", artifacts.display()))
        // New inputs go into the first folder; the repository's are read.
        .arg(&found)
        .arg(workspace.root.join("fuzz/corpus").join(name))
        .current_dir(&workspace.root);
    step::run(&format!("fuzzing {name}"), &mut fuzzer, &log).with_context(|| {
        format!(
            "an input breaks `{name}`: it is in {}; give it to {} to see it again",
            artifacts.display(),
            program.display()
        )
    })?;
    let text = fs::read(&log)?;
    let runs = String::from_utf8_lossy(&text)
        .lines()
        .find_map(|line| line.strip_prefix("stat::number_of_executed_units:")?.trim().parse().ok());
    let runs = runs.with_context(|| format!("{} does not say how many inputs were tried", log.display()))?;
    ensure!(runs > 0, "nothing was tried");
    Ok(runs)
}
