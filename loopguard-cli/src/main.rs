//! The `loopguard` program: parses the command line and turns outcomes into exit codes.

use std::process::ExitCode;

use clap::Parser as _;
use loopguard::{
    args::{Args, Command},
    attach, doctor,
    sink::escape::printable,
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
            eprintln!("loopguard: {}", printable(&without_numbers(&format!("{error:#}"))));
            ExitCode::from(FAILED)
        }
    }
}

/// Error texts of the system end in `(os error 2)`, which tells a person nothing.
fn without_numbers(text: &str) -> String {
    let mut parts = text.split(" (os error ");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |text, part| text + part.split_once(')').map_or(part, |(_, rest)| rest))
}
