//! The project's chores: `cargo xtask setup | build-ebpf | demo | picture | dist | test | bench | fuzz | soak | lint-python`.

mod bench;
mod companion;
mod conformance;
mod demo;
mod dist;
mod fuzz;
mod kernels;
mod picture;
mod prometheus;
mod pythons;
mod setup;
mod sid;
mod soak;
mod step;
mod suite;
mod wheel;

use std::process::ExitCode;

use anyhow::{Result, bail};
use xtask::toolchain;
use xtask::workspace::Workspace;

use crate::demo::Screen;
use crate::suite::Pythons;

const USAGE: &str = "\
usage: cargo xtask COMMAND

  setup                        find or install what the build, the demo and the tests need
  build-ebpf                   build the kernel programs and print where the object is
  demo [--tui]                 block a demo server on purpose and let loopguard say who did it
  picture                      watch the demo's server and draw the README's picture of the live view
  dist                         one file to copy to a server: loopguard with all its libraries in it
  test [--all-pythons] [-- CARGO-TEST-ARGUMENTS]
                               all tests; as root those in the real kernel too;
                               --all-pythons: also Debian's newest interpreters, in a chroot
  test --python                only those of the Python package
  test --asgi-conformance      Starlette's and FastAPI's own test suites, without the package's middleware and with it
  test --kernels [NAME...]     have loopguard watch a server on other kernels, from 5.10 to the newest, under QEMU
  bench accuracy|overhead|kernel|stacks|stacks-gdb|stacks-rate [--json FILE], bench --compare OLD.json NEW.json
                               measure, as root, and compare with what was measured before
  fuzz [--seconds N | --runs N] [TARGET...]
                               give loopguard bytes that a hostile target could give it
  soak --hours N [--json FILE] [--markdown FILE]
                               watch one server for hours, as root, and report memory and losses
  lint-python                  ruff over the Python files";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["setup"] => {
            let workspace = Workspace::locate()?;
            setup::terminal_for_tests(&workspace);
            setup::run(&workspace)
        }
        ["build-ebpf"] => {
            println!("{}", toolchain::build_ebpf()?.display());
            Ok(())
        }
        ["demo"] => demo::run(Screen::Text),
        ["demo", "--tui"] => demo::run(Screen::Tui),
        ["picture"] => picture::run(),
        ["dist"] => dist::run(),
        ["test"] => suite::run(Pythons::Host, &[]),
        ["test", "--all-pythons"] => suite::run(Pythons::HostAndSid, &[]),
        ["test", "--python"] => suite::python(),
        ["test", "--asgi-conformance"] => conformance::run(),
        ["test", "--", rest @ ..] => suite::run(Pythons::Host, rest),
        ["test", "--all-pythons", "--", rest @ ..] => suite::run(Pythons::HostAndSid, rest),
        ["test", "--kernels", rest @ ..] => kernels::run(rest),
        ["bench", rest @ ..] => bench::run(rest),
        ["fuzz", rest @ ..] => fuzz::run(rest),
        ["soak", rest @ ..] => soak::run(rest),
        ["lint-python"] => suite::lint_python(),
        [] | ["help" | "--help" | "-h"] => {
            println!("{USAGE}");
            Ok(())
        }
        _ => bail!("don't know `cargo xtask {}`\n{USAGE}", arguments.join(" ")),
    }
}
