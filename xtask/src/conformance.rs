//! Runs the test suites of Starlette and FastAPI twice, without the middleware and with it around every application,
//! and compares how each test went.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use xtask::workspace::Workspace;

use crate::pythons::{self, Venv};
use crate::step::{self, say};
use crate::wheel::Wheel;

const FOLDER: &str = "loopguard-py/conformance";
const PLUGIN: &str = "wrap_every_app";
/// Of the tests that went differently.
const SHOWN: usize = 20;

pub fn run() -> Result<()> {
    let workspace = Workspace::locate()?;
    let (ours, folder) = (workspace.root.join(FOLDER), workspace.target.join("conformance"));
    let python = pythons::find().pop().context("no CPython 3.11 or newer with venv: run `cargo xtask setup`")?;
    let venv = Venv::prepare(&python, folder.join("venv"), &ours.join("requirements.txt"))?;
    Wheel::build(&workspace, &python)?.install(&venv)?;
    for source in fs::read_to_string(ours.join("sources.txt"))?.lines() {
        let source = fetch(&venv, source, &folder)?;
        let suite = Suite { venv: &venv, plugins: &ours, source: &source };
        suite.compare()?;
    }
    Ok(())
}

/// A source package of PyPI, unpacked.
fn fetch(venv: &Venv, source: &str, folder: &Path) -> Result<PathBuf> {
    let (name, version) = source.split_once("==").context("sources are pinned")?;
    let unpacked = folder.join(format!("{name}-{version}"));
    if unpacked.exists() {
        return Ok(unpacked);
    }
    let log = folder.join(format!("{name}.log"));
    let mut download = Command::new(venv.python());
    download
        .args(["-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--no-binary", name, "--dest"])
        .arg(folder)
        .arg(source);
    step::run(&format!("downloading the sources of {source} from PyPI"), &mut download, &log)?;
    let mut unpack = Command::new("tar");
    unpack.arg("-xzf").arg(folder.join(format!("{name}-{version}.tar.gz"))).arg("-C").arg(folder);
    step::run(&format!("unpacking {source}"), &mut unpack, &log)?;
    Ok(unpacked)
}

struct Suite<'a> {
    venv: &'a Venv,
    /// Where our plugin is.
    plugins: &'a Path,
    source: &'a Path,
}

impl Suite<'_> {
    fn compare(&self) -> Result<()> {
        let (bare, wrapped) = (self.outcomes("0")?, self.outcomes("1")?);
        let only = |these: &str, those: &str, sign: &str| -> Vec<String> {
            let those: std::collections::BTreeSet<&str> = those.lines().collect();
            these.lines().filter(|line| !those.contains(line)).map(|line| format!("{sign} {line}")).collect()
        };
        let different = [only(&bare, &wrapped, "without:"), only(&wrapped, &bare, "with:")].concat();
        let name = self.source.file_name().unwrap_or_default().display();
        for line in different.iter().take(SHOWN) {
            println!("  {line}");
        }
        ensure!(different.is_empty(), "{name}: {} outcomes differ", different.len());
        let count = |outcome: &str| wrapped.lines().filter(|line| line.ends_with(outcome)).count();
        let [passed, failed, skipped] = [" passed", " failed", " skipped"].map(count);
        ensure!(passed > 0, "{name}: no test passed");
        say(&format!("{name}: the same with the middleware: {passed} passed, {failed} failed, {skipped} skipped"));
        Ok(())
    }

    /// How each test went. That some fail for reasons of their own, for one because they run as root, is no matter.
    fn outcomes(&self, wrap: &str) -> Result<String> {
        let file = self.source.join(format!("outcomes-{wrap}.txt"));
        let _ = fs::remove_file(&file);
        say(&format!("tests in {}{}", self.source.display(), if wrap == "1" { ", with the middleware" } else { "" }));
        let output = Command::new(self.venv.python())
            .args(["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", PLUGIN, "tests"])
            .current_dir(self.source)
            .env("PYTHONPATH", self.plugins)
            .env("CONFORMANCE_WRAP", wrap)
            .env("CONFORMANCE_OUTCOMES", &file)
            .output()
            .context("run pytest")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let last: Vec<&str> = text.lines().rev().take(2).collect();
        last.iter().rev().for_each(|line| println!("  {line}"));
        fs::read_to_string(&file).with_context(|| format!("the tests in {} did not run", self.source.display()))
    }
}
