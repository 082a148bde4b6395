//! Boots kernels of Debian and Ubuntu under QEMU, has loopguard watch a blocking server in each, and judges what it
//! said.
//!
//! The processor is emulated, so nothing here depends on what virtualization this machine has, and nothing is measured
//! but whether it works.

mod guest;
mod packages;
mod verdict;

use std::fs;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use xtask::workspace::Workspace;

use self::guest::Guest;
use self::packages::Archive;
use self::verdict::{Verdict, judge};
use crate::demo::build_loopguard;
use crate::setup;
use crate::step::say;

/// What a kernel is expected to do with loopguard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    Works,
    /// loopguard says what is missing.
    Refused,
}

struct Kernel {
    /// Start of its version.
    name: &'static str,
    distribution: &'static str,
    /// Its packages, of which the newest is taken.
    packages: &'static str,
    expected: Expected,
}

const fn kernel(name: &'static str, distribution: &'static str, packages: &'static str) -> Kernel {
    Kernel { name, distribution, packages, expected: Expected::Works }
}

/// The oldest first.
const KERNELS: [Kernel; 8] = [
    Kernel { expected: Expected::Refused, ..kernel("5.10", "Debian 11", r"^linux-image-5\.10\.0-[0-9]+-cloud-amd64$") },
    kernel("5.15", "Ubuntu 22.04", r"^linux-image-unsigned-5\.15\.0-[0-9]+-generic$"),
    kernel("5.19", "Ubuntu 22.04", r"^linux-image-unsigned-5\.19\.0-[0-9]+-generic$"),
    kernel("6.1", "Debian 12", r"^linux-image-6\.1\.0-[0-9]+-cloud-amd64$"),
    kernel("6.8", "Ubuntu 22.04", r"^linux-image-unsigned-6\.8\.0-[0-9]+-generic$"),
    kernel("6.12", "Debian 13", r"^linux-image-6\.12\.[0-9]+\+deb13-cloud-amd64$"),
    kernel("6.18", "Debian 13", r"^linux-image-6\.18\.[0-9]+\+deb13-cloud-amd64$"),
    kernel("newest", "Debian", r"^linux-image-[7-9]\.[0-9]+\.[0-9]+\+deb[0-9]+-cloud-amd64$"),
];

/// `which` are names of kernels; none: all of them.
pub fn run(which: &[&str]) -> Result<()> {
    let known = KERNELS.map(|kernel| kernel.name);
    for name in which {
        ensure!(known.contains(name), "there is no kernel `{name}` here, only {}", known.join(", "));
    }
    let workspace = Workspace::locate()?;
    setup::run(&workspace)?;
    setup::for_kernels(&workspace)?;
    let loopguard = build_loopguard(&workspace)?;
    let folder = workspace.target.join("kernels");
    let archive = Archive::prepare(&folder.join("apt"))?;
    let guest = Guest::build(&workspace, &loopguard, &folder)?;
    let mut rows = Vec::new();
    for kernel in KERNELS.iter().filter(|kernel| which.is_empty() || which.contains(&kernel.name)) {
        let row = try_kernel(kernel, &archive, &guest).with_context(|| format!("kernel {}", kernel.name))?;
        say(&format!("{}: {}", row.release, row.verdict));
        rows.push(row);
    }
    let table = table(&rows);
    println!("\n{table}");
    fs::write(folder.join("results.md"), table)?;
    let failed: Vec<_> = rows.iter().filter(|row| !row.verdict.passed()).map(|row| row.release.as_str()).collect();
    if !failed.is_empty() {
        bail!("not as expected on {}; the consoles are in {}", failed.join(", "), folder.display());
    }
    Ok(())
}

struct Row {
    release: String,
    distribution: &'static str,
    verdict: Verdict,
    minutes: f64,
}

fn try_kernel(kernel: &Kernel, archive: &Archive, guest: &Guest) -> Result<Row> {
    let image = archive.image(kernel.packages)?;
    say(&format!("booting {}", image.display()));
    let started = Instant::now();
    let console = guest.boot(&image, kernel.name)?;
    let release = console.lines().find_map(|line| line.strip_prefix("RELEASE ")).unwrap_or(kernel.name);
    Ok(Row {
        release: release.to_owned(),
        distribution: kernel.distribution,
        verdict: judge(&console, kernel.expected, &guest.marked_lines),
        minutes: started.elapsed().as_secs_f64() / 60.0,
    })
}

fn table(rows: &[Row]) -> String {
    let mut table = "| kernel | from | result | minutes under emulation |\n|---|---|---|--:|\n".to_owned();
    for Row { release, distribution, verdict, minutes } in rows {
        table += &format!("| {release} | {distribution} | {verdict} | {minutes:.1} |\n");
    }
    table
}
