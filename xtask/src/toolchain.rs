//! Finds a compiler and a linker for the kernel programs and turns `loopguard-ebpf` into one BPF object.
//!
//! The compiler is rustup's nightly with `rust-src`, or the system's own `/usr/bin/rustc` with its library sources.
//! The linker is bpf-linker, and its LLVM must be able to read the bitcode that the compiler's LLVM writes.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::workspace::Workspace;

/// The oldest release that builds the workspace: its `rust-version`.
const OLDEST_RUST: (u32, u32) = (1, 95);
const SYSTEM_RUSTC: &str = "/usr/bin/rustc";
/// Whether rustup may install on its own what something asks for.
const RUSTUP_INSTALLS: &str = "RUSTUP_AUTO_INSTALL";

/// A pair that fits together.
#[derive(Clone, Debug)]
pub struct Toolchain {
    pub compiler: Compiler,
    pub linker: Linker,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compiler {
    pub origin: Origin,
    pub rustc: PathBuf,
    /// `1.96.0`.
    pub release: String,
    /// Major version of its LLVM.
    pub llvm: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    RustupNightly,
    /// A stable compiler of the distribution: needs `RUSTC_BOOTSTRAP=1` to build `core`.
    System,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Linker {
    pub path: PathBuf,
    /// Major version of its LLVM.
    pub llvm: u32,
}

/// Why there is no [`Toolchain`]; its text names what to run.
#[derive(Clone, Debug)]
pub struct Missing {
    /// Usable compilers, each without a linker that fits it.
    pub compilers: Vec<Compiler>,
    pub linkers: Vec<Linker>,
}

impl Toolchain {
    pub fn find(workspace: &Workspace) -> Result<Self, Missing> {
        let compilers = compilers();
        let linkers = linkers(workspace);
        for compiler in &compilers {
            // A newer LLVM reads older bitcode, not the other way round.
            if let Some(linker) = linkers.iter().find(|linker| linker.llvm >= compiler.llvm) {
                return Ok(Self { compiler: compiler.clone(), linker: linker.clone() });
            }
        }
        Err(Missing { compilers, linkers })
    }
}

/// Builds the kernel programs and returns the object, whose path is the same every time.
pub fn build_ebpf() -> Result<PathBuf> {
    let workspace = Workspace::locate()?;
    let toolchain = Toolchain::find(&workspace)?;
    let built = toolchain.build(&workspace)?;
    let object = workspace.target.join("loopguard.bpf.o");
    publish(&built, &object).with_context(|| format!("copy the kernel programs to {}", object.display()))?;
    Ok(object)
}

impl Toolchain {
    fn build(&self, workspace: &Workspace) -> Result<PathBuf> {
        const TARGET: &str = "bpfel-unknown-none";
        // Not the target directory of the cargo that may be running us as a build script: it holds that one's lock.
        let target = workspace.target.join("ebpf");
        let rustflags = [&format!("--cfg=bpf_target_arch=\"{}\"", env::consts::ARCH), "-Clink-arg=--btf"];

        let mut cargo = Command::new(self.compiler.cargo());
        without_outer_cargo(&mut cargo, env::vars_os().map(|(name, _)| name));
        cargo
            .args(["build", "--release", "--package=loopguard-ebpf", "-Zbuild-std=core"])
            .arg(format!("--target={TARGET}"))
            .arg("--target-dir")
            .arg(&target)
            .current_dir(&workspace.root)
            .env("RUSTC", &self.compiler.rustc)
            .env("CARGO_ENCODED_RUSTFLAGS", rustflags.join("\x1f"))
            .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", &self.linker.path)
            // One module, so that the linker sees whole programs; BTF is made from the debug information.
            .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1")
            .env("CARGO_PROFILE_RELEASE_LTO", "true")
            .env("CARGO_PROFILE_RELEASE_PANIC", "abort")
            .env("CARGO_PROFILE_RELEASE_DEBUG", "2");
        if self.compiler.origin == Origin::System {
            cargo.env("RUSTC_BOOTSTRAP", "1");
        }
        let status = cargo.status().with_context(|| format!("run {}", self.compiler.cargo().display()))?;
        if !status.success() {
            bail!("the kernel programs (loopguard-ebpf) do not build with {self}: its messages say why");
        }
        Ok(target.join(TARGET).join("release/loopguard-ebpf"))
    }
}

impl Compiler {
    /// The cargo of the same installation.
    pub fn cargo(&self) -> PathBuf {
        self.rustc.with_file_name("cargo")
    }

    /// `None` unless it is there, new enough, and can build `core` from source.
    fn examine(origin: Origin, rustc: PathBuf) -> Option<Self> {
        let version = output_of(Command::new(&rustc).arg("-vV"))?;
        let release = field(&version, "release: ")?.to_owned();
        let llvm = major(field(&version, "LLVM version: ")?)?;
        let sysroot = output_of(Command::new(&rustc).args(["--print", "sysroot"]))?;
        let compiler = Self { origin, rustc, release, llvm };
        let sources = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/src/lib.rs");
        (compiler.is_new_enough() && compiler.cargo().exists() && sources.exists()).then_some(compiler)
    }

    fn is_new_enough(&self) -> bool {
        let mut numbers = self.release.split('.').map_while(|number| number.parse::<u32>().ok());
        (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= OLDEST_RUST
    }
}

/// What is on this machine, the preferred one first.
fn compilers() -> Vec<Compiler> {
    let nightly =
        output_of(Command::new("rustup").args(["which", "--toolchain", "nightly", "rustc"]).env(RUSTUP_INSTALLS, "0"))
            .and_then(|path| Compiler::examine(Origin::RustupNightly, path.trim().into()));
    nightly.into_iter().chain(system_compiler()).collect()
}

/// The distribution's compiler, if it can build the kernel programs.
pub fn system_compiler() -> Option<Compiler> {
    Compiler::examine(Origin::System, SYSTEM_RUSTC.into())
}

fn linkers(workspace: &Workspace) -> Vec<Linker> {
    let mut folders = vec![workspace.tools().join("bin")];
    folders.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()));
    folders.extend(env::var_os("CARGO_HOME").map(|home| Path::new(&home).join("bin")));
    folders.iter().filter_map(|folder| Linker::examine(folder.join("bpf-linker"))).collect()
}

impl Linker {
    pub fn examine(path: PathBuf) -> Option<Self> {
        if !path.is_file() {
            return None;
        }
        // LLVM's own `--version` is the only way to ask a linker for the LLVM inside it; it exits without linking.
        let version =
            output_of(Command::new(&path).args(["--llvm-args=--version", "--output=/dev/null", "/dev/null"]))?;
        let llvm = version.lines().find_map(|line| major(line.split_once("LLVM version ")?.1))?;
        Some(Self { path, llvm })
    }
}

impl fmt::Display for Toolchain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} and {}", self.compiler, self.linker)
    }
}

impl fmt::Display for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} (LLVM {})", self.rustc.display(), self.release, self.llvm)
    }
}

impl fmt::Display for Linker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (LLVM {})", self.path.display(), self.llvm)
    }
}

impl std::error::Error for Missing {}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the BPF toolchain is missing: run `cargo xtask setup` ({})", self.reason())
    }
}

impl Missing {
    /// What exactly is missing.
    pub fn reason(&self) -> String {
        let (major, minor) = OLDEST_RUST;
        match (self.compilers.as_slice(), self.linkers.as_slice()) {
            ([], _) => format!(
                "no compiler: neither a rustup nightly with rust-src \
                 nor {SYSTEM_RUSTC} {major}.{minor} or newer with the library sources"
            ),
            (compilers, []) => format!("no bpf-linker for {}", list(compilers)),
            (compilers, linkers) => {
                format!("{} cannot read what {} writes: its LLVM is too old", list(linkers), list(compilers))
            }
        }
    }
}

fn list(items: &[impl fmt::Display]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or ")
}

/// Takes from `command` what an outer cargo has set for its own build, but not the user's registry and network settings.
///
/// Nothing may change the user's toolchains on the way: some crates carry a rust-toolchain file that asks for more
/// components, and rustup's `rustc` would update the whole toolchain to get them. `RUSTUP_TOOLCHAIN` stays, which keeps
/// rustup from reading such files, and where it is not set rustup is told not to install.
pub fn without_outer_cargo(command: &mut Command, names: impl Iterator<Item = OsString>) {
    for name in names.filter(|name| belongs_to_outer_cargo(name)) {
        command.env_remove(name);
    }
    command.env(RUSTUP_INSTALLS, "0");
}

fn belongs_to_outer_cargo(name: &OsStr) -> bool {
    const SET_FOR_BUILD_SCRIPTS: [&str; 7] = ["OUT_DIR", "TARGET", "HOST", "PROFILE", "DEBUG", "OPT_LEVEL", "NUM_JOBS"];
    const USERS_OWN: [&str; 6] =
        ["CARGO_HOME", "CARGO_HTTP_", "CARGO_NET_", "CARGO_REGISTR", "CARGO_SOURCE_", "CARGO_TERM_"];
    let Some(name) = name.to_str() else { return false };
    let starts_with = |prefixes: &[&str]| prefixes.iter().any(|prefix| name.starts_with(prefix));
    SET_FOR_BUILD_SCRIPTS.contains(&name)
        || starts_with(&["RUSTC", "RUSTDOC", "RUSTFLAGS", "RUST_RECURSION_COUNT"])
        || starts_with(&["CARGO"]) && !starts_with(&USERS_OWN)
}

/// Replaces `to` in one step, and only when it differs: its age tells cargo whether to build the CLI again.
fn publish(from: &Path, to: &Path) -> Result<()> {
    let new = fs::read(from)?;
    if fs::read(to).is_ok_and(|old| old == new) {
        return Ok(());
    }
    let half_written = to.with_extension(format!("{}.tmp", std::process::id()));
    fs::write(&half_written, new)?;
    Ok(fs::rename(half_written, to)?)
}

/// Standard output, if the program could be run and succeeded.
fn output_of(command: &mut Command) -> Option<String> {
    let output = command.output().ok().filter(|output| output.status.success())?;
    String::from_utf8(output.stdout).ok()
}

fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.trim().strip_prefix(name))
}

fn major(version: &str) -> Option<u32> {
    version.trim().split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compiler(release: &str) -> Compiler {
        Compiler { origin: Origin::System, rustc: SYSTEM_RUSTC.into(), release: release.into(), llvm: 22 }
    }

    #[test]
    fn a_release_is_compared_by_number() {
        assert!(compiler("1.95.0").is_new_enough());
        assert!(compiler("1.100.0-nightly").is_new_enough());
        assert!(compiler("2.0.0").is_new_enough());
        assert!(!compiler("1.85.0").is_new_enough());
        assert!(!compiler("1.9.0").is_new_enough());
    }

    #[test]
    fn what_is_missing_is_named() {
        let none = Missing { compilers: vec![], linkers: vec![] }.to_string();
        assert!(none.starts_with("the BPF toolchain is missing: run `cargo xtask setup` (no compiler"), "{none}");
        let no_linker = Missing { compilers: vec![compiler("1.96.0")], linkers: vec![] }.to_string();
        assert!(no_linker.ends_with("(no bpf-linker for /usr/bin/rustc 1.96.0 (LLVM 22))"), "{no_linker}");
        let old = Linker { path: "/usr/local/bin/bpf-linker".into(), llvm: 19 };
        let too_old = Missing { compilers: vec![compiler("1.96.0")], linkers: vec![old] }.to_string();
        assert!(too_old.contains("/usr/local/bin/bpf-linker (LLVM 19) cannot read"), "{too_old}");
    }

    #[test]
    fn the_inner_cargo_keeps_only_the_users_settings() {
        for outer in ["CARGO", "CARGO_TARGET_DIR", "CARGO_MAKEFLAGS", "RUSTC", "RUSTC_WRAPPER", "RUSTFLAGS", "OUT_DIR"]
        {
            assert!(belongs_to_outer_cargo(OsStr::new(outer)), "{outer}");
        }
        for own in ["CARGO_HOME", "CARGO_HTTP_PROXY", "CARGO_NET_OFFLINE", "PATH", "HOME", "RUSTUP_TOOLCHAIN"] {
            assert!(!belongs_to_outer_cargo(OsStr::new(own)), "{own}");
        }
    }

    #[test]
    fn an_inner_cargo_never_changes_the_users_toolchains() {
        let mut command = Command::new("cargo");
        without_outer_cargo(&mut command, ["RUSTUP_TOOLCHAIN", "RUSTFLAGS"].map(OsString::from).into_iter());
        let changes: Vec<_> = command.get_envs().collect();
        assert!(changes.contains(&(OsStr::new("RUSTFLAGS"), None)));
        assert!(changes.contains(&(OsStr::new("RUSTUP_AUTO_INSTALL"), Some(OsStr::new("0")))));
        assert!(changes.iter().all(|(name, _)| *name != "RUSTUP_TOOLCHAIN"));
    }
}
