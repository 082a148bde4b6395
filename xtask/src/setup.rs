//! Finds or installs what the build, the demo and the tests need; running it again changes nothing.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use xtask::toolchain::{self, Compiler, Linker, Missing, Toolchain};
use xtask::workspace::{Workspace, cargo};

use crate::pythons;
use crate::step;

const BPF_LINKER: &str = "0.13.0";
/// LLVM versions that this bpf-linker can be built with.
const BPF_LINKER_LLVM: std::ops::RangeInclusive<u32> = 21..=23;

const WITH_RUSTUP: &str = "\
install a nightly compiler and bpf-linker by hand, then run `cargo xtask setup` again:
    rustup toolchain install nightly --component rust-src
    cargo install cargo-binstall && cargo binstall bpf-linker
  (without binstall: https://github.com/aya-rs/bpf-linker has binaries and build instructions)";

pub fn run(workspace: &Workspace) -> Result<()> {
    let toolchain = match Toolchain::find(workspace) {
        Ok(toolchain) => toolchain,
        Err(missing) => install_toolchain(workspace, missing)?,
    };
    step::say(&format!("BPF toolchain: {toolchain}"));
    let python = match pythons::find().pop() {
        Some(python) => python,
        None => install_python(workspace)?,
    };
    step::say(&format!("Python: {} ({python})", python.executable.display()));
    Ok(())
}

/// What `cargo xtask test --kernels` needs besides.
pub fn for_kernels(workspace: &Workspace) -> Result<()> {
    const NEEDED: [(&str, &str); 4] = [
        ("/usr/bin/qemu-system-x86_64", "qemu-system-x86"),
        ("/usr/bin/cpio", "cpio"),
        ("/usr/share/doc/busybox-static", "busybox-static"),
        ("/usr/share/keyrings/debian-archive-keyring.gpg", "debian-archive-keyring"),
    ];
    let missing: Vec<&str> =
        NEEDED.iter().filter(|(file, _)| !Path::new(file).exists()).map(|(_, package)| *package).collect();
    if missing.is_empty() {
        return Ok(());
    }
    Apt::new(workspace).context("kernels come from Debian's archive, through apt")?.install(&missing)
}

/// The terminal in which the tests drive the live view; they say so themselves where it is missing.
pub fn terminal_for_tests(workspace: &Workspace) {
    const NEEDED: &str = "the tests of the live view need tmux";
    let is_there = || Command::new("tmux").arg("-V").output().is_ok_and(|output| output.status.success());
    if is_there() {
        return;
    }
    let installed = Apt::new(workspace).and_then(|apt| apt.install(&["tmux"]));
    if let Err(error) = installed.context(NEEDED) {
        step::say(&format!("going on without: {error:#}"));
    }
}

fn install_toolchain(workspace: &Workspace, missing: Missing) -> Result<Toolchain> {
    step::say(&format!("BPF toolchain: {}", missing.reason()));
    let buildable = |compiler: &&Compiler| llvm_config(compiler.llvm).exists();
    let compiler = match missing.compilers.iter().find(buildable) {
        Some(compiler) => compiler.clone(),
        None => install_packages(workspace)?,
    };
    build_linker(workspace, &compiler)?;
    Toolchain::find(workspace).context("after installing it")
}

/// The distribution's compiler and the LLVM libraries that go with it.
fn install_packages(workspace: &Workspace) -> Result<Compiler> {
    let compiler_packages = ["rustc-web", "cargo-web", "rust-web-src"];
    let apt = Apt::new(workspace).with_context(|| WITH_RUSTUP.to_owned())?;
    let compiler = match toolchain::system_compiler() {
        Some(compiler) => compiler,
        None => {
            apt.install(&compiler_packages).with_context(|| WITH_RUSTUP.to_owned())?;
            toolchain::system_compiler()
                .with_context(|| format!("this distribution's rustc is too old; {WITH_RUSTUP}"))?
        }
    };
    let llvm = compiler.llvm;
    apt.install(&[
        &format!("llvm-{llvm}-dev"),
        &format!("libpolly-{llvm}-dev"),
        "zlib1g-dev",
        "libzstd-dev",
        // For the linker's own link step: the C++ library that LLVM needs.
        "g++",
    ])?;
    Ok(compiler)
}

fn build_linker(workspace: &Workspace, compiler: &Compiler) -> Result<()> {
    let llvm = compiler.llvm;
    ensure!(
        BPF_LINKER_LLVM.contains(&llvm),
        "{compiler} needs a bpf-linker with LLVM {llvm}, and bpf-linker {BPF_LINKER} is known to build with LLVM {} to {}; {WITH_RUSTUP}",
        BPF_LINKER_LLVM.start(),
        BPF_LINKER_LLVM.end(),
    );
    let root = workspace.tools();
    let mut install = cargo();
    toolchain::without_outer_cargo(&mut install, std::env::vars_os().map(|(name, _)| name));
    install
        .args(["install", "--locked", "--force", "--no-default-features"])
        .arg(format!("--features=llvm-{llvm}"))
        .arg("--root")
        .arg(&root)
        .arg(format!("bpf-linker@{BPF_LINKER}"))
        // Without it the build finds another LLVM's library folder.
        .env("LLVM_PREFIX", llvm_prefix(llvm))
        .current_dir(&workspace.root);
    step::run(
        &format!("building bpf-linker {BPF_LINKER} with LLVM {llvm} into {} (about a minute)", root.display()),
        &mut install,
        &workspace.target.join("setup/bpf-linker.log"),
    )?;
    let linker = root.join("bin/bpf-linker");
    Linker::examine(linker.clone()).with_context(|| format!("{} does not run", linker.display()))?;
    Ok(())
}

fn llvm_prefix(llvm: u32) -> String {
    format!("/usr/lib/llvm-{llvm}")
}

fn llvm_config(llvm: u32) -> std::path::PathBuf {
    Path::new(&llvm_prefix(llvm)).join("bin/llvm-config")
}

fn install_python(workspace: &Workspace) -> Result<pythons::Python> {
    const NEEDED: &str = "the demo and the tests need CPython 3.11 or newer with the venv module";
    Apt::new(workspace).context(NEEDED)?.install(&["python3", "python3-venv"]).context(NEEDED)?;
    pythons::find().pop().with_context(|| format!("{NEEDED}; this distribution's python3 is older"))
}

/// Debian's and Ubuntu's package tool, run as root.
struct Apt<'a> {
    workspace: &'a Workspace,
}

impl<'a> Apt<'a> {
    fn new(workspace: &'a Workspace) -> Result<Self> {
        ensure!(is_debian(), "this is neither Debian nor Ubuntu, so nothing was installed");
        Ok(Self { workspace })
    }

    fn install(&self, packages: &[&str]) -> Result<()> {
        if !is_root() {
            bail!("not root: run `sudo apt-get install {}`, then `cargo xtask setup` again", packages.join(" "));
        }
        // A source that does not answer matters only if a package then can't be found.
        if let Err(error) = self.apt_get("update", &[], "updating the package lists") {
            eprintln!("  {error:#}; going on");
        }
        // Packages that conflict with what the user has are not worth a removal: rustup is the way then.
        self.apt_get(
            "install",
            &[&["--yes", "--no-install-recommends", "--no-remove"], packages].concat(),
            &format!("installing {}", packages.join(" ")),
        )
    }

    fn apt_get(&self, command: &str, arguments: &[&str], what: &str) -> Result<()> {
        let mut apt_get = Command::new("apt-get");
        apt_get
            // A fresh machine may be updating itself.
            .args(["-o", "DPkg::Lock::Timeout=300", command])
            .args(arguments)
            .env("DEBIAN_FRONTEND", "noninteractive");
        step::run(what, &mut apt_get, &self.workspace.target.join(format!("setup/apt-get-{command}.log")))
    }
}

pub fn is_debian() -> bool {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    release
        .lines()
        .filter_map(|line| line.strip_prefix("ID=").or_else(|| line.strip_prefix("ID_LIKE=")))
        .any(|ids| ids.trim_matches('"').split(' ').any(|id| id == "debian" || id == "ubuntu"))
}

pub fn is_root() -> bool {
    // SAFETY: reads one number; cannot fail.
    unsafe { libc::geteuid() == 0 }
}
