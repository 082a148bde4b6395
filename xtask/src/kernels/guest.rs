//! Builds an initramfs from this machine's Python, the test server and loopguard, and boots a kernel with it.
//!
//! The files stand in the guest where they stand here, so that an interpreter and its virtual environment need no
//! setting up.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use xtask::workspace::Workspace;

use crate::companion::Companion;
use crate::pythons::{self, Venv};
use crate::step::{self, say};
use crate::suite;

const QEMU: &str = "qemu-system-x86_64";
const APP: &str = "loopguard-cli/tests/servers/app.py";
const LOOPS: &str = "asyncio uvloop";
/// Memory of the guest. It holds the initramfs twice for a moment.
const MEMORY_MIB: u32 = 1536;
/// An emulated processor is twenty times slower than a real one.
const PATIENCE: Duration = Duration::from_secs(40 * 60);
const POLL: Duration = Duration::from_millis(200);
/// Parts of Python's library that no server imports.
const NOT_NEEDED: [&str; 9] =
    ["test", "tests", "idlelib", "tkinter", "ensurepip", "lib2to3", "turtledemo", "pip", "site-packages"];

/// Prints where an interpreter keeps what it needs, one path a line; the virtual environment's packages come first.
const PATHS: &str = "\
import sys, sysconfig
print(sysconfig.get_path('purelib'))
print(sysconfig.get_path('stdlib'))
print(sys.prefix + '/pyvenv.cfg')";

pub struct Guest {
    initramfs: PathBuf,
    consoles: PathBuf,
    /// Lines of the server that block, by the name in their comment.
    pub marked_lines: BTreeMap<String, u64>,
}

impl Guest {
    pub fn build(workspace: &Workspace, loopguard: &Path, folder: &Path) -> Result<Self> {
        say("building the guest");
        let venv = venv(workspace)?;
        let app = workspace.root.join(APP);
        let mut files = Files::default();
        files.add_python(&venv)?;
        let stage = folder.join("stage");
        let _ = fs::remove_dir_all(&stage);
        for inner in ["proc", "sys", "dev", "tmp", "guest/bin"] {
            fs::create_dir_all(stage.join(inner))?;
        }
        let guest = workspace.root.join("xtask/guest");
        let busybox = ["/usr/bin/busybox", "/bin/busybox"].map(Path::new);
        let busybox = busybox.into_iter().find(|path| path.exists()).context("there is no busybox")?;
        for (from, to) in [
            (guest.join("init"), "init"),
            (guest.join("watch.py"), "guest/watch.py"),
            (app.clone(), "guest/app.py"),
            (loopguard.to_owned(), "guest/bin/loopguard"),
            (busybox.to_owned(), "guest/bin/busybox"),
        ] {
            fs::copy(&from, stage.join(to)).with_context(|| format!("copy {}", from.display()))?;
        }
        for applet in ["sh", "mount", "ip", "uname", "poweroff"] {
            std::os::unix::fs::symlink("busybox", stage.join("guest/bin").join(applet))?;
        }
        fs::create_dir_all(stage.join("bin"))?;
        std::os::unix::fs::symlink("/guest/bin/busybox", stage.join("bin/sh"))?;
        make_executable(&stage.join("init"))?;
        let settings = format!("PYTHON='{}'\nLOOPS='{LOOPS}'\n", venv.python().display());
        fs::write(stage.join("guest/settings"), settings)?;
        files.add_libraries(&[loopguard.to_owned()])?;

        let initramfs = folder.join("initramfs.cpio");
        let mut archive = File::create(&initramfs)?;
        // The kernel unpacks archives that follow one another.
        let own = tree(&stage, &|_| true)?;
        pack(&stage, own.iter(), &archive)?;
        pack(Path::new("/"), files.0.iter().filter(|path| !own.contains(relative(path))), &archive)?;
        archive.flush()?;
        Ok(Self { initramfs, consoles: folder.to_owned(), marked_lines: marked_lines(&fs::read_to_string(app)?) })
    }

    /// Runs until the guest switches itself off; returns what its console showed.
    pub fn boot(&self, image: &Path, name: &str) -> Result<String> {
        let console = self.consoles.join(format!("console-{name}.log"));
        let mut qemu = Command::new(QEMU);
        // One after the other: emulated side by side, one processor may still run what another has patched in the kernel's
        // code, as every tracepoint does that comes or goes, and die of it.
        qemu.args(["-accel", "tcg,thread=single", "-cpu", "max", "-smp", "2", "-nodefaults", "-no-reboot"])
            .args(["-m", &MEMORY_MIB.to_string(), "-display", "none", "-serial", "stdio"])
            .arg("-kernel")
            .arg(image)
            .arg("-initrd")
            .arg(&self.initramfs)
            // A panic ends the guest instead of waiting for somebody to look at it.
            .args(["-append", "console=ttyS0 quiet panic=-1"])
            .stdin(Stdio::null())
            .stdout(File::create(&console)?)
            .stderr(File::create(self.consoles.join(format!("qemu-{name}.log")))?);
        let mut guest = Companion::start(&mut qemu)?;
        let started = Instant::now();
        let status = loop {
            if let Some(status) = guest.ended() {
                break status;
            }
            ensure!(started.elapsed() < PATIENCE, "the guest does not end:\n{}", step::tail(&console));
            std::thread::sleep(POLL);
        };
        ensure!(status.success(), "{QEMU} failed ({status}):\n{}", step::tail(&console));
        Ok(String::from_utf8_lossy(&fs::read(&console)?).replace('\r', ""))
    }
}

/// The tests' own, of the newest Python that has one.
fn venv(workspace: &Workspace) -> Result<Venv> {
    let requirements = workspace.root.join(suite::REQUIREMENTS);
    let mut reasons = String::new();
    for python in pythons::find().iter().rev() {
        match Venv::prepare(python, workspace.target.join(format!("test/venv-{python}")), &requirements) {
            Ok(venv) => return Ok(venv),
            Err(error) => reasons += &format!("; {python}: {error:#}"),
        }
    }
    anyhow::bail!("no Python here can run the test server{reasons}")
}

/// Files of this machine, with the folders and links on the way to them.
#[derive(Default)]
struct Files(BTreeSet<PathBuf>);

impl Files {
    fn add_python(&mut self, venv: &Venv) -> Result<()> {
        let output = Command::new(venv.python()).args(["-I", "-c", PATHS]).output().context("run python")?;
        let text = String::from_utf8(output.stdout).context("a path is not UTF-8")?;
        let mut paths = text.lines().map(PathBuf::from);
        let (packages, library) = (paths.next().context("no packages")?, paths.next().context("no library")?);
        let mut binaries = vec![venv.python()];
        let needed = |path: &Path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            !NOT_NEEDED.contains(&name.as_str()) && !name.starts_with("config-") && !name.starts_with("_tkinter")
        };
        for folder in [packages, library] {
            for inner in tree(&folder, &needed)? {
                let path = folder.join(inner);
                if path.extension() == Some(OsStr::new("so")) {
                    binaries.push(path.clone());
                }
                self.add(&path)?;
            }
        }
        for path in paths.chain([venv.python()]) {
            self.add(&path)?;
        }
        self.add_libraries(&binaries)
    }

    /// What the dynamic linker would load for these.
    fn add_libraries(&mut self, binaries: &[PathBuf]) -> Result<()> {
        let output = Command::new("ldd").args(binaries).output().context("run ldd")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let paths = text.lines().filter_map(|line| {
            let line = line.trim();
            let path = line.split_once("=> ").map_or(line, |(_, path)| path).split(" (").next()?;
            path.starts_with('/').then(|| PathBuf::from(path))
        });
        for path in paths.filter(|path| !path.to_string_lossy().ends_with(':')) {
            self.add(&path)?;
        }
        Ok(())
    }

    fn add(&mut self, path: &Path) -> Result<()> {
        let mut so_far = PathBuf::from("/");
        let mut rest = relative(path).components();
        while let Some(part) = rest.next() {
            match part {
                Component::ParentDir => {
                    so_far.pop();
                    continue;
                }
                part => so_far.push(part),
            }
            let kind = fs::symlink_metadata(&so_far).with_context(|| format!("read {}", so_far.display()))?;
            // Known already: then so is what it leads to, but not what lies below.
            self.0.insert(so_far.clone());
            if kind.is_symlink() {
                let folder = so_far.parent().unwrap_or(Path::new("/"));
                let leads_to = folder.join(fs::read_link(&so_far)?);
                return self.add(&leads_to.join(rest.as_path()));
            }
        }
        Ok(())
    }
}

/// All files, folders and links below a folder, relative to it; what is not `needed` is left out with all below.
fn tree(folder: &Path, needed: &dyn Fn(&Path) -> bool) -> Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    let mut open = vec![folder.to_owned()];
    while let Some(next) = open.pop() {
        for entry in fs::read_dir(&next).with_context(|| format!("read {}", next.display()))? {
            let entry = entry?;
            let path = entry.path();
            if !needed(&path) {
                continue;
            }
            if entry.file_type()?.is_dir() {
                open.push(path.clone());
            }
            found.insert(path.strip_prefix(folder)?.to_owned());
        }
    }
    Ok(found)
}

fn relative(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}

/// Appends a cpio archive of these paths, in their order: folders before what is in them.
fn pack<'a>(root: &Path, paths: impl Iterator<Item = &'a PathBuf>, to: &File) -> Result<()> {
    let mut cpio = Command::new("cpio")
        .args(["--create", "--format=newc", "--quiet", "--null", "--owner=0:0"])
        .current_dir(root)
        .stdin(Stdio::piped())
        .stdout(to.try_clone()?)
        .spawn()
        .context("run cpio")?;
    let mut list = Vec::new();
    for path in paths {
        list.extend_from_slice(relative(path).as_os_str().as_bytes());
        list.push(0);
    }
    cpio.stdin.take().context("cpio reads a list")?.write_all(&list)?;
    let status = cpio.wait()?;
    ensure!(status.success(), "cpio failed ({status})");
    Ok(())
}

fn make_executable(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o755))?)
}

fn marked_lines(app: &str) -> BTreeMap<String, u64> {
    let marked = app.lines().enumerate().filter_map(|(i, line)| {
        let (_, name) = line.split_once("# line: ")?;
        Some((name.trim().to_owned(), i as u64 + 1))
    });
    marked.collect()
}
