//! One file to copy to a server: loopguard with all its libraries in it.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use xtask::workspace::{Workspace, cargo};

use crate::setup;
use crate::step::{self, say};

/// It links statically with the C library of the distribution it is built on.
const TARGET: &str = "x86_64-unknown-linux-gnu";
const PROFILE: &str = "stripped";

pub fn run() -> Result<()> {
    let workspace = Workspace::locate()?;
    setup::run(&workspace)?;
    let mut build = cargo();
    build
        .args(["build", "--package", "loopguard", "--target", TARGET, "--profile", PROFILE])
        // Of this target only: what runs during the build can't be static, for the compiler loads it.
        .env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS", "-Ctarget-feature=+crt-static")
        .env_remove("RUSTFLAGS")
        .current_dir(&workspace.root);
    let folder = workspace.target.join("dist");
    step::run("building loopguard with its libraries in it", &mut build, &folder.join("build.log"))?;
    let built = workspace.target.join(TARGET).join(PROFILE).join("loopguard");
    let program = folder.join(format!("loopguard-{}-linux-x86_64", env!("CARGO_PKG_VERSION")));
    fs::copy(&built, &program).with_context(|| format!("copy {}", built.display()))?;
    check(&program, &folder)?;
    let bytes = fs::metadata(&program)?.len();
    say(&format!("{} ({:.1} MB)", program.display(), bytes as f64 / 1e6));
    Ok(())
}

/// Runs it where there is nothing else.
fn check(program: &Path, folder: &Path) -> Result<()> {
    if !setup::is_root() {
        say("not tried without its surroundings: that needs root");
        return Ok(());
    }
    let root = folder.join("empty");
    fs::create_dir_all(&root)?;
    fs::copy(program, root.join("loopguard"))?;
    let output = Command::new("chroot").arg(&root).args(["/loopguard", "--version"]).output().context("run chroot")?;
    fs::remove_dir_all(&root)?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success() && said.contains(env!("CARGO_PKG_VERSION")),
        "it does not run in an empty root ({}): {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}
