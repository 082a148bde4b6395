//! Makes a chroot with Debian sid's CPythons: static, stripped and newer than most machines have.

use std::ffi::CString;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use xtask::workspace::Workspace;

use crate::setup;
use crate::step::{self, say};
use crate::suite;

const VERSIONS: [&str; 3] = ["3.13", "3.14", "3.15"];
const MIRROR: &str = "http://deb.debian.org/debian";
const CERTIFICATES: &str = "/etc/ssl/certs/ca-certificates.crt";

pub struct Sid {
    root: PathBuf,
    /// Programs of ours, each of which becomes one of the chroot's Pythons that has the test servers.
    pythons: Vec<PathBuf>,
}

impl Sid {
    /// Takes about two minutes the first time.
    pub fn prepare(workspace: &Workspace) -> Result<Self> {
        let mut sid = Self::interpreters(workspace)?;
        sid.show(&workspace.root.join("loopguard-cli/tests"))?;
        for version in VERSIONS {
            match sid.venv(workspace, version).and_then(|()| sid.python(version)) {
                Ok(python) => sid.pythons.push(python),
                Err(error) => say(&format!("going on without sid's Python {version}: {error:#}")),
            }
        }
        ensure!(!sid.pythons.is_empty(), "no Python of the chroot can run the test servers: the lines above say why");
        Ok(sid)
    }

    /// Only the interpreters, without what the test servers need.
    pub fn interpreters(workspace: &Workspace) -> Result<Self> {
        ensure!(setup::is_root(), "a chroot with all interpreters needs root");
        let sid = Self { root: workspace.target.join("test/sid"), pythons: Vec::new() };
        sid.bootstrap()?;
        sid.mount_proc()?;
        Ok(sid)
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn pythons(&self) -> &[PathBuf] {
        &self.pythons
    }

    fn bootstrap(&self) -> Result<()> {
        let stamp = self.root.join("bootstrapped");
        if stamp.exists() {
            return Ok(());
        }
        if !Path::new("/usr/sbin/debootstrap").exists() {
            bail!("--all-pythons needs debootstrap: run `apt-get install debootstrap`");
        }
        if self.root.exists() {
            fs::remove_dir_all(&self.root).with_context(|| format!("remove half-made {}", self.root.display()))?;
        }
        let packages: Vec<_> = VERSIONS.iter().map(|v| format!("python{v},python{v}-venv")).collect();
        let mut debootstrap = Command::new("/usr/sbin/debootstrap");
        debootstrap
            .arg("--variant=minbase")
            .arg(format!("--include={},ca-certificates", packages.join(",")))
            .arg("sid")
            .arg(&self.root)
            .arg(MIRROR);
        let what = format!("making a Debian sid chroot in {} (about 75 s)", self.root.display());
        step::run(&what, &mut debootstrap, &self.root.with_extension("log"))?;
        fs::write(stamp, "")?;
        Ok(())
    }

    /// In a mount namespace of our own, so that nothing stays mounted under `target/` whatever ends us: deleting
    /// `target/` must never reach into a mounted file system.
    fn mount_proc(&self) -> Result<()> {
        let target = CString::new(self.root.join("proc").into_os_string().into_encoded_bytes())?;
        // SAFETY: all pointers are to strings that end in NUL and live through the calls; null where the kernel
        // ignores the argument.
        let mounted = unsafe {
            libc::unshare(libc::CLONE_NEWNS) == 0
                && libc::mount(
                    c"none".as_ptr(),
                    c"/".as_ptr(),
                    std::ptr::null(),
                    libc::MS_REC | libc::MS_PRIVATE,
                    std::ptr::null(),
                ) == 0
                && libc::mount(c"proc".as_ptr(), target.as_ptr(), c"proc".as_ptr(), 0, std::ptr::null()) == 0
        };
        if mounted {
            return Ok(());
        }
        Err(std::io::Error::last_os_error()).context("mount /proc in the chroot")
    }

    /// Puts a folder of the machine where it is in the chroot, too; after [`mount_proc`](Self::mount_proc) this is seen by
    /// us and our children only.
    fn show(&self, folder: &Path) -> Result<()> {
        let there = self.root.join(folder.strip_prefix("/").context("a path without a root")?);
        fs::create_dir_all(&there)?;
        let [from, to] = [folder, &there].map(|path| CString::new(path.as_os_str().as_encoded_bytes()));
        let (from, to) = (from?, to?);
        // SAFETY: strings that end in NUL and live through the call; null where the kernel ignores the argument.
        let mounted =
            unsafe { libc::mount(from.as_ptr(), to.as_ptr(), std::ptr::null(), libc::MS_BIND, std::ptr::null()) };
        if mounted == 0 {
            return Ok(());
        }
        Err(std::io::Error::last_os_error()).with_context(|| format!("mount {} in the chroot", folder.display()))
    }

    /// A program that becomes, as the same process, the chroot's Python.
    fn python(&self, version: &str) -> Result<PathBuf> {
        let program = self.root.with_file_name(format!("sid-python-{version}"));
        let script = format!("#!/bin/sh\nexec chroot '{}' /venv-{version}/bin/python \"$@\"\n", self.root.display());
        fs::write(&program, script)?;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
        Ok(program)
    }

    fn venv(&self, workspace: &Workspace, version: &str) -> Result<()> {
        let requirements = workspace.root.join(suite::REQUIREMENTS);
        let wanted = crate::pythons::read_requirements(&requirements)?;
        let stamp = self.root.join(format!("venv-{version}/made-from.txt"));
        if fs::read_to_string(&stamp).is_ok_and(|made_from| made_from == wanted) {
            return Ok(());
        }
        self.share_network_settings()?;
        // The text with all includes in place; a chroot does not see the files it came from.
        let flat: String = wanted.lines().filter(|line| !line.starts_with("-r ")).map(|l| format!("{l}\n")).collect();
        fs::write(self.root.join("requirements.txt"), flat)?;
        let log = self.root.with_file_name(format!("sid-venv-{version}.log"));
        let mut create = self.command(&format!("python{version}"));
        create.args(["-m", "venv", "--clear", &format!("/venv-{version}")]);
        step::run(&format!("making sid's virtual environment for Python {version}"), &mut create, &log)?;
        let mut install = self.command(&format!("/venv-{version}/bin/python"));
        install
            .args(["-m", "pip", "install", "--disable-pip-version-check", "--requirement", "/requirements.txt"])
            .env("PIP_CERT", CERTIFICATES);
        step::run("installing the test servers in it from PyPI", &mut install, &log)?;
        Ok(fs::write(stamp, wanted)?)
    }

    fn command(&self, program: &str) -> Command {
        let mut chroot = Command::new("chroot");
        chroot.arg(&self.root).arg(program);
        chroot
    }

    /// The machine's name servers, certificates and pip settings.
    fn share_network_settings(&self) -> Result<()> {
        for file in ["/etc/resolv.conf", "/etc/pip.conf", CERTIFICATES] {
            if Path::new(file).exists() {
                let to = self.root.join(&file[1..]);
                fs::copy(file, &to).with_context(|| format!("copy {file} to {}", to.display()))?;
            }
        }
        Ok(())
    }
}
