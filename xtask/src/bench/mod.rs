//! The benchmarks: how right loopguard is, what it costs the server, what its kernel programs and its own work cost, what
//! its ring buffer has room for, how all of that grows, and how complete its native stacks are.

mod accuracy;
mod compare;
mod core;
mod growth;
mod hud;
mod kernel;
mod overhead;
pub mod rig;
mod ring;
mod stacks;
mod tokio;
mod turns;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use self::rig::Rig;
use self::stacks::Interpreters;
use crate::setup;
use crate::step::say;

pub const USAGE: &str = "\
usage: cargo xtask bench accuracy [--seconds N] [--json FILE]
       cargo xtask bench overhead [--pairs N] [--json FILE]
       cargo xtask bench tokio-accuracy [--seconds N] [--json FILE]
       cargo xtask bench tokio-overhead [--runtime multi|current] [--pairs N] [--json FILE]
       cargo xtask bench tokio-hud --hud PROGRAM [--seconds N] [--json FILE]
       cargo xtask bench kernel [--seconds N] [--json FILE]
       cargo xtask bench ring [--seconds N] [--json FILE]
       cargo xtask bench growth [--seconds N] [--json FILE]
       cargo xtask bench core [--json FILE]
       cargo xtask bench stacks [--pythons host|all] [--seconds N] [--json FILE]
       cargo xtask bench stacks-gdb [--pythons host|all] [--times N] [--json FILE]
       cargo xtask bench stacks-rate [--seconds N] [--json FILE]
       cargo xtask bench --compare OLD.json NEW.json";

const NAMES: [&str; 12] = [
    "accuracy",
    "overhead",
    "tokio-accuracy",
    "tokio-overhead",
    "tokio-hud",
    "kernel",
    "ring",
    "growth",
    "core",
    "stacks",
    "stacks-gdb",
    "stacks-rate",
];

pub fn run(arguments: &[&str]) -> Result<()> {
    match arguments {
        ["--compare", old, new] => compare::run(Path::new(old), Path::new(new)),
        [name, options @ ..] if NAMES.contains(name) => measure(name, options),
        _ => bail!("{USAGE}"),
    }
}

fn measure(name: &str, options: &[&str]) -> Result<()> {
    let (mut seconds, mut pairs, mut file, mut pythons) = (None, None, None, Interpreters::Host);
    let (mut runtime, mut hud) = ("multi", None);
    for option in options.chunks(2) {
        match (name, option) {
            (
                "accuracy" | "tokio-accuracy" | "tokio-hud" | "kernel" | "ring" | "growth" | "stacks" | "stacks-rate",
                ["--seconds", value],
            )
            | ("stacks-gdb", ["--times", value]) => seconds = Some(number(value)?),
            ("stacks" | "stacks-gdb", ["--pythons", "host"]) => pythons = Interpreters::Host,
            ("stacks" | "stacks-gdb", ["--pythons", "all"]) => pythons = Interpreters::HostAndSid,
            ("tokio-overhead", ["--runtime", value @ ("multi" | "current")]) => runtime = value,
            ("tokio-hud", ["--hud", value]) => hud = Some(Path::new(value)),
            ("overhead" | "tokio-overhead", ["--pairs", value]) => pairs = Some(number(value)?),
            (_, ["--json", value]) => file = Some(PathBuf::from(value)),
            _ => bail!("don't know `{}`\n{USAGE}", option.join(" ")),
        }
    }
    ensure!(setup::is_root(), "the benchmarks load kernel programs: run them as root");
    let rig = Rig::prepare()?;
    let results = match name {
        "accuracy" => accuracy::run(&rig, seconds.unwrap_or(30))?,
        "overhead" => overhead::run(&rig, pairs.unwrap_or(12))?,
        "tokio-accuracy" => tokio::accuracy(&rig, seconds.unwrap_or(20))?,
        "tokio-overhead" => tokio::overhead(&rig, runtime, pairs.unwrap_or(4))?,
        "tokio-hud" => {
            let hud = hud.with_context(|| format!("--hud is missing: where hud is\n{USAGE}"))?;
            hud::run(&rig, hud, seconds.unwrap_or(20))?
        }
        "ring" => ring::run(&rig, seconds.unwrap_or(8))?,
        "growth" => growth::run(&rig, seconds.unwrap_or(6))?,
        "core" => core::run()?,
        "stacks" => stacks::completeness(&rig, pythons, seconds.unwrap_or(8))?,
        "stacks-gdb" => stacks::beside_gdb(&rig, pythons, seconds.unwrap_or(5))?,
        "stacks-rate" => stacks::rate(&rig, seconds.unwrap_or(60))?,
        _ => kernel::run(&rig, seconds.unwrap_or(8))?,
    };
    let Some(file) = file else { return Ok(()) };
    let report = json!({
        "bench": name,
        "command": command(name, options),
        "machine": machine(&rig),
        "results": results,
    });
    fs::write(&file, serde_json::to_string_pretty(&report)? + "\n")
        .with_context(|| format!("write {}", file.display()))?;
    say(&format!("results written to {}", file.display()));
    Ok(())
}

/// What makes such results; where things lie on this machine says nothing of them.
fn command(name: &str, options: &[&str]) -> String {
    let options = options.chunks(2).filter(|option| option[0] != "--json");
    let options = options.flat_map(|option| if option[0] == "--hud" { &["--hud", "hud"] } else { option });
    ["cargo", "xtask", "bench", name].iter().chain(options).copied().collect::<Vec<_>>().join(" ")
}

fn number(text: &str) -> Result<u32> {
    text.parse().ok().filter(|number| (1..=600).contains(number)).with_context(|| format!("not 1 to 600: {text}"))
}

fn machine(rig: &Rig) -> Value {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpus = read("/proc/cpuinfo");
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map(|(_, name)| name);
    let release = read("/proc/sys/kernel/osrelease");
    // What follows the version names a build, not a kernel.
    let kernel = release.trim().split('-').next();
    json!({
        "cpu": model,
        "cpus": cpus.lines().filter(|line| line.starts_with("processor")).count(),
        "kernel": kernel,
        "python": output(Command::new(rig.python()).arg("--version")),
        "loopguard": output(Command::new(&rig.loopguard).arg("--version")),
        "packages": output(Command::new(rig.python()).args(["-c", VERSIONS])),
    })
}

const VERSIONS: &str = "\
from importlib.metadata import version
print(' '.join(f'{name}=={version(name)}' for name in ('fastapi', 'uvicorn', 'uvloop', 'httptools')))";

fn output(command: &mut Command) -> Option<String> {
    let output = command.output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// A row of it: what was measured, and these fields of the figures.
fn row(name: &str, measured: &Value, fields: &[&str]) -> Vec<String> {
    [name.to_owned()].into_iter().chain(fields.iter().map(|field| measured[field].to_string())).collect()
}

/// Prints a Markdown table.
fn table(head: &[&str], rows: &[Vec<String>]) {
    println!("\n| {} |", head.join(" | "));
    println!("|---|{}", "--:|".repeat(head.len() - 1));
    for row in rows {
        println!("| {} |", row.join(" | "));
    }
    println!();
}

fn rounded(value: f64, digits: i32) -> f64 {
    let scale = 10f64.powi(digits);
    (value * scale).round() / scale
}

fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

/// 0 of nothing.
fn quantile(values: &[f64], rank: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = rank * sorted.len().saturating_sub(1) as f64;
    let (Some(low), Some(high)) = (sorted.get(at.floor() as usize), sorted.get(at.ceil() as usize)) else { return 0.0 };
    low + (high - low) * at.fract()
}

#[cfg(test)]
mod tests {
    use super::{command, quantile};

    #[test]
    fn results_say_what_makes_them() {
        let options = ["--seconds", "5", "--json", "/somewhere/x.json"];
        assert_eq!(command("kernel", &options), "cargo xtask bench kernel --seconds 5");
        assert_eq!(command("core", &[]), "cargo xtask bench core");
    }

    #[test]
    fn quantiles_lie_between_values() {
        assert_eq!(quantile(&[4.0, 1.0, 3.0, 2.0], 0.5), 2.5);
        assert_eq!(quantile(&[1.0, 2.0, 3.0], 0.25), 1.5);
        assert_eq!(quantile(&[], 0.5), 0.0);
    }
}
