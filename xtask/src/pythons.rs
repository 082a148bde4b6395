//! Finds the CPythons on this machine that loopguard supports, and makes virtual environments from them.

use std::collections::BTreeMap;
use std::env;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use crate::step;

/// Minor versions of Python 3.
const SUPPORTED: std::ops::RangeInclusive<u32> = 11..=15;

/// Prints the minor version where a venv with pip can be made; free-threaded builds are another interpreter.
const PROBE: &str = "\
import sys, ensurepip, venv
assert sys.implementation.name == 'cpython' and sys.version_info[0] == 3
assert getattr(sys, '_is_gil_enabled', lambda: True)()
print(sys.version_info[1])";

#[derive(Clone, Debug)]
pub struct Python {
    pub executable: PathBuf,
    minor: u32,
}

impl fmt::Display for Python {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "3.{}", self.minor)
    }
}

/// One interpreter for each minor version, the newest last. pyenv's come before those on PATH, whose shims may point
/// anywhere.
pub fn find() -> Vec<Python> {
    let mut found = BTreeMap::new();
    let on_path = SUPPORTED.map(|minor| format!("python3.{minor}")).chain(["python3".to_owned()]).map(PathBuf::from);
    for executable in pyenv().into_iter().chain(on_path) {
        if let Some(minor) = probe(&executable).filter(|minor| SUPPORTED.contains(minor)) {
            found.entry(minor).or_insert(Python { executable, minor });
        }
    }
    found.into_values().collect()
}

/// The newest patch release first.
fn pyenv() -> Vec<PathBuf> {
    let root = env::var_os("PYENV_ROOT").map(PathBuf::from).or_else(|| Some(env::home_dir()?.join(".pyenv")));
    let versions = root.and_then(|root| fs::read_dir(root.join("versions")).ok());
    let mut versions: Vec<PathBuf> = versions.into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    versions.sort_by_key(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        std::cmp::Reverse(name.split('.').map_while(|number| number.parse().ok()).collect::<Vec<u32>>())
    });
    versions.into_iter().map(|version| version.join("bin/python3")).collect()
}

fn probe(executable: &Path) -> Option<u32> {
    let output = Command::new(executable).args(["-I", "-c", PROBE]).stderr(Stdio::null()).output().ok()?;
    String::from_utf8(output.stdout).ok()?.trim().parse().ok()
}

/// A virtual environment that holds what a requirements file pins.
pub struct Venv {
    folder: PathBuf,
}

impl Venv {
    /// Takes no time when it is there already.
    pub fn prepare(python: &Python, folder: PathBuf, requirements: &Path) -> Result<Self> {
        let venv = Self { folder };
        let wanted = format!("{}\n{}", python.executable.display(), read_requirements(requirements)?);
        let stamp = venv.folder.join("made-from.txt");
        if fs::read_to_string(&stamp).is_ok_and(|made_from| made_from == wanted) && venv.python().exists() {
            return Ok(venv);
        }
        let log = venv.folder.with_extension("log");
        let mut create = Command::new(&python.executable);
        create.args(["-m", "venv", "--clear"]).arg(&venv.folder);
        step::run(&format!("making {} with Python {python}", venv.folder.display()), &mut create, &log)?;
        let mut install = Command::new(venv.python());
        install.args(["-m", "pip", "install", "--disable-pip-version-check", "--requirement"]).arg(requirements);
        step::run(&format!("installing {} from PyPI", requirements.display()), &mut install, &log)?;
        fs::write(stamp, wanted)?;
        Ok(venv)
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn python(&self) -> PathBuf {
        self.folder.join("bin/python")
    }

    pub fn program(&self, name: &str) -> PathBuf {
        self.folder.join("bin").join(name)
    }
}

/// The text of a requirements file and of those it includes.
pub fn read_requirements(path: &Path) -> Result<String> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    let mut all = text.clone();
    for included in text.lines().filter_map(|line| line.strip_prefix("-r ")) {
        all += &read_requirements(&path.with_file_name(included.trim()))?;
    }
    Ok(all)
}
