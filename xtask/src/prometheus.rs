//! Gets Prometheus and promtool, which the tests of the metrics use.

use std::env;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use xtask::workspace::Workspace;

use crate::setup;
use crate::step;

const PACKAGE: &str = "prometheus";
const PROGRAMS: [&str; 2] = ["prometheus", "promtool"];

/// The folder that holds both programs: one of PATH, else one under `target/`, into which Debian's package is unpacked.
/// Installing it would start a service.
pub fn find(workspace: &Workspace) -> Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let has_both = |folder: &PathBuf| PROGRAMS.iter().all(|program| folder.join(program).is_file());
    if let Some(folder) = env::split_paths(&path).find(has_both) {
        return Ok(folder);
    }
    let unpacked = workspace.target.join("test/prometheus");
    let folder = unpacked.join("usr/bin");
    if has_both(&folder) {
        return Ok(folder);
    }
    ensure!(setup::is_debian(), "Prometheus and promtool are not on PATH, and this is neither Debian nor Ubuntu");
    fs::create_dir_all(&unpacked).with_context(|| format!("create {}", unpacked.display()))?;
    let log = unpacked.with_extension("log");
    let download = || {
        let mut download = Command::new("apt-get");
        download.args(["download", PACKAGE]).current_dir(&unpacked);
        step::run("downloading Debian's prometheus (19 MB)", &mut download, &log)
    };
    if let Err(error) = download() {
        // The package lists may be old, or not be there yet.
        ensure!(setup::is_root(), "{error:#}; run `apt-get update` as root");
        let mut update = Command::new("apt-get");
        step::run("updating the package lists", update.args(["-o", "DPkg::Lock::Timeout=300", "update"]), &log)?;
        download()?;
    }
    let package = fs::read_dir(&unpacked)?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .context("apt-get downloaded no package")?;
    let mut unpack = Command::new("dpkg");
    step::run("unpacking it", unpack.arg("-x").arg(&package).arg(&unpacked), &log)?;
    fs::remove_file(&package)?;
    ensure!(has_both(&folder), "the package {PACKAGE} does not hold {}", PROGRAMS.join(" and "));
    Ok(folder)
}
