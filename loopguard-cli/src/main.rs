//! The `loopguard` program: parses the command line and turns outcomes into exit codes.

use std::process::ExitCode;

use clap::Parser as _;
use loopguard::{
    args::{Args, Command},
    attach, doctor,
    sink::escape::{plain, printable},
};

/// As linters have them.
const FOUND: u8 = 1;
const FAILED: u8 = 2;

fn main() -> ExitCode {
    let arguments = Args::parse();
    let outcome = match &arguments.command {
        Command::Attach(options) => {
            attach::run(options).map(|outcome| if options.fail_on_blocking && outcome.blocks > 0 { FOUND } else { 0 })
        }
        Command::Doctor(options) => doctor::run(options).map(|healthy| if healthy { 0 } else { FAILED }),
    };
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("loopguard: {}", printable(&plain(&format!("{error:#}"))));
            ExitCode::from(FAILED)
        }
    }
}
