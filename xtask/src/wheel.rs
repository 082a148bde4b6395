//! Builds the Python package's wheel, installs it where it is needed, and runs its own tests.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use xtask::toolchain;
use xtask::workspace::Workspace;

use crate::pythons::{Python, Venv};
use crate::step::{self, say};

const PACKAGE: &str = "loopguard-py";
const REQUIREMENTS: &str = "xtask/requirements-wheel.txt";

pub struct Wheel {
    file: PathBuf,
}

impl Wheel {
    /// One wheel does for every Python. Takes a moment when nothing has changed.
    pub fn build(workspace: &Workspace, python: &Python) -> Result<Self> {
        let folder = workspace.target.join("wheel");
        let venv = Venv::prepare(python, folder.join("venv"), &workspace.root.join(REQUIREMENTS))?;
        let out = folder.join("out");
        if out.exists() {
            fs::remove_dir_all(&out)?;
        }
        let mut maturin = Command::new(venv.program("maturin"));
        toolchain::without_outer_cargo(&mut maturin, std::env::vars_os().map(|(name, _)| name));
        maturin
            .args(["build", "--locked", "--interpreter"])
            .arg(venv.python())
            .arg("--out")
            .arg(&out)
            .current_dir(workspace.root.join(PACKAGE));
        step::run("building the Python package", &mut maturin, &folder.join("maturin.log"))?;
        let mut files = fs::read_dir(&out)?.flatten().map(|entry| entry.path());
        let file = files.find(|path| path.extension().is_some_and(|extension| extension == "whl"));
        Ok(Self { file: file.context("maturin made no wheel")? })
    }

    /// Without what it depends on, which is nothing.
    pub fn install(&self, venv: &Venv) -> Result<()> {
        let installed = venv.folder().join("installed.whl");
        if fs::read(&installed).ok() == Some(fs::read(&self.file)?) {
            return Ok(());
        }
        let mut pip = Command::new(venv.python());
        pip.args(["-m", "pip", "install", "--disable-pip-version-check", "--no-deps", "--force-reinstall"])
            .arg(&self.file);
        let what = format!("installing the Python package into {}", venv.folder().display());
        step::run(&what, &mut pip, &venv.folder().with_extension("wheel.log"))?;
        fs::copy(&self.file, installed)?;
        Ok(())
    }
}

/// The package's own tests, with the wheel as it is installed there.
pub fn test(workspace: &Workspace, python: &Path) -> Result<()> {
    say(&format!("tests of the Python package with {}", python.display()));
    let status = Command::new(python)
        .args(["-m", "pytest", "-q"])
        .current_dir(workspace.root.join(PACKAGE))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .status()
        .context("run pytest")?;
    ensure!(status.success(), "tests of the Python package failed");
    Ok(())
}
