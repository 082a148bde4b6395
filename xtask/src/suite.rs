//! Runs the tests, with a virtual environment for every Python that can be had, and lints the Python files.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use xtask::workspace::{Workspace, cargo};

use crate::prometheus;
use crate::pythons::{self, Venv};
use crate::setup;
use crate::sid::Sid;
use crate::step::say;
use crate::wheel::{self, Wheel};

/// What the tests start servers with.
pub const REQUIREMENTS: &str = "xtask/requirements-test.txt";
const LINT_REQUIREMENTS: &str = "xtask/requirements-lint.txt";

/// Which interpreters the tests get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pythons {
    Host,
    /// Also those of Debian sid, in a chroot.
    HostAndSid,
}

/// The tests read which servers they may start from the environment:
/// `LOOPGUARD_TEST_PYTHONS` (also as `LOOPGUARD_PYTHONS`) holds the Python of each virtual environment, joined by
/// colons; `LOOPGUARD_TEST_SID` likewise those that are in the chroot; `LOOPGUARD_TEST_PROMETHEUS` is the folder of
/// Prometheus and promtool; `LOOPGUARD_TEST_AXUM` is a release build of the axum server.
pub fn run(which: Pythons, cargo_test_arguments: &[&str]) -> Result<()> {
    let workspace = Workspace::locate()?;
    setup::run(&workspace)?;
    setup::terminal_for_tests(&workspace);
    let pythons = host_pythons(&workspace)?;
    let axum = release_axum(&workspace)?;
    let joined = std::env::join_paths(&pythons).context("a path holds a colon")?;

    let mut test = cargo();
    test.arg("test")
        .args(cargo_test_arguments)
        .current_dir(&workspace.root)
        .env("LOOPGUARD_TEST_PYTHONS", &joined)
        .env("LOOPGUARD_PYTHONS", &joined)
        .env("LOOPGUARD_TEST_AXUM", axum);
    match prometheus::find(&workspace) {
        Ok(folder) => drop(test.env("LOOPGUARD_TEST_PROMETHEUS", folder)),
        Err(error) => say(&format!("going on without Prometheus: {error:#}")),
    }
    // Lives until the tests are done: its mounts go with it.
    let sid = match which {
        Pythons::Host => None,
        Pythons::HostAndSid => Some(Sid::prepare(&workspace)?),
    };
    if let Some(sid) = &sid {
        test.env("LOOPGUARD_TEST_SID", std::env::join_paths(sid.pythons()).context("a path holds a colon")?);
    }
    if !setup::is_root() {
        say("not root: the tests that load kernel programs are skipped");
    }
    let status = test.status().context("run cargo test")?;
    ensure!(status.success(), "tests failed");
    if cargo_test_arguments.is_empty() {
        test_package(&workspace, &pythons)?;
    }
    Ok(())
}

/// A Rust server as it is deployed, with the probes of `loopguard-emit`.
fn release_axum(workspace: &Workspace) -> Result<PathBuf> {
    let mut build = cargo();
    build.args(["build", "--quiet", "--release", "--package", "axum-blocking"]).current_dir(&workspace.root);
    ensure!(build.status().context("run cargo build")?.success(), "the axum server does not build");
    Ok(workspace.target.join("release/axum-blocking"))
}

/// The Python package's tests alone.
pub fn python() -> Result<()> {
    let workspace = Workspace::locate()?;
    test_package(&workspace, &host_pythons(&workspace)?)
}

fn test_package(workspace: &Workspace, pythons: &[PathBuf]) -> Result<()> {
    pythons.iter().try_for_each(|python| wheel::test(workspace, python))
}

fn host_pythons(workspace: &Workspace) -> Result<Vec<PathBuf>> {
    let requirements = workspace.root.join(REQUIREMENTS);
    let (pythons, mut ready) = (pythons::find(), Vec::new());
    let newest = pythons.last().context("no CPython 3.11 or newer with venv: run `cargo xtask setup`")?;
    let wheel = Wheel::build(workspace, newest)?;
    for python in &pythons {
        let folder = workspace.target.join(format!("test/venv-{python}"));
        match Venv::prepare(python, folder, &requirements) {
            Ok(venv) => {
                wheel.install(&venv)?;
                ready.push(venv.python());
            }
            Err(error) => say(&format!("going on without Python {python}: {error:#}")),
        }
    }
    ensure!(!ready.is_empty(), "no Python here can run the test servers: the lines above say why");
    Ok(ready)
}

pub fn lint_python() -> Result<()> {
    let workspace = Workspace::locate()?;
    let python = pythons::find().pop().context("no CPython 3.11 or newer with venv: run `cargo xtask setup`")?;
    let requirements = workspace.root.join(LINT_REQUIREMENTS);
    let venv = Venv::prepare(&python, workspace.target.join("lint/venv"), &requirements)?;
    for arguments in [["check", "."].as_slice(), &["format", "--check", "."]] {
        let status = Command::new(venv.program("ruff"))
            .args(arguments)
            .current_dir(&workspace.root)
            .status()
            .context("run ruff")?;
        ensure!(status.success(), "`ruff {}` found something", arguments.join(" "));
    }
    Ok(())
}
