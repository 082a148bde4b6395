//! Where a run's output goes: a stream of text or JSON, or the live screen; and what is said beside it.

use std::{
    fs::File,
    io::{self, BufWriter, IsTerminal as _, Write},
    time::SystemTime,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    args::{self, Format},
    core::event::{LoopInfo, StepMarks, Worker},
    sink::{
        Sink,
        escape::printable,
        jsonl::JsonLines,
        text::{Look, Style, Text, Times, WallClock},
    },
    source::process,
    tui::{
        draw::look::{Glyphs, Look as ScreenLook},
        screen::{self, Environment, Screen, Wish},
        state::Target,
    },
};

pub enum Output {
    Stream(Box<dyn Sink>),
    Screen(Box<Screen>),
}

impl Output {
    /// Opens what will be written to. The terminal is not taken yet.
    pub fn open(arguments: &args::Attach) -> Result<Self> {
        if is_screen(arguments)? {
            let environment = Environment::read();
            let look = ScreenLook {
                glyphs: if arguments.ascii { Glyphs::Ascii } else { environment.glyphs() },
                colours: environment.colours(),
                times: Times::Local(wall_clock()),
                current_dir: std::env::current_dir().ok(),
            };
            return Ok(Self::Screen(Box::new(Screen::new(look, text_look(true))?)));
        }
        let (out, is_terminal): (Box<dyn Write>, bool) = match &arguments.output {
            Some(path) => {
                let file = File::create(path).with_context(|| format!("cannot write to {}", path.display()))?;
                (Box::new(file), false)
            }
            None => (Box::new(io::stdout()), io::stdout().is_terminal()),
        };
        let out = BufWriter::new(out);
        Ok(Self::Stream(match arguments.format {
            Some(Format::Jsonl) => Box::new(JsonLines::new(out)),
            Some(Format::Text | Format::Tui) | None => Box::new(Text::new(out, text_look(is_terminal))),
        }))
    }

    /// Once everything is attached: what went wrong before is told on an ordinary terminal.
    pub fn begin(&mut self) -> Result<()> {
        match self {
            Self::Stream(_) => Ok(()),
            Self::Screen(screen) => screen.take_terminal(),
        }
    }

    pub fn sink(&mut self) -> &mut dyn Sink {
        match self {
            Self::Stream(sink) => sink.as_mut(),
            Self::Screen(screen) => screen.as_mut(),
        }
    }

    /// What the output does by itself: draw, read keys. Never ready for a stream.
    pub async fn turn(&mut self) -> Result<Wish> {
        match self {
            Self::Stream(_) => std::future::pending().await,
            Self::Screen(screen) => screen.turn().await,
        }
    }

    /// For the person at the terminal; never mixed into a stream itself.
    pub fn say(&mut self, text: &str) {
        match self {
            Self::Stream(_) => {
                let line = format!("loopguard: {}\n", printable(text));
                // In one piece, for whoever reads along. If nobody does, there is nothing to be done about it.
                let _ = io::stderr().write_all(line.as_bytes());
            }
            Self::Screen(screen) => screen.say(text),
        }
    }

    /// A loop is watched from now on. `language` is what its process runs on.
    pub fn found(&mut self, info: &LoopInfo, language: &str, threshold_ns: u64) {
        let runtime = format!("{:?}", info.runtime).to_lowercase();
        let steps = match info.steps {
            StepMarks::Exact => "exact steps",
            StepMarks::TicksOnly => "ticks only",
        };
        let worker = info.worker.as_ref().and_then(Worker::name).map_or_else(String::new, |name| format!(" ({name})"));
        self.say(&format!(
            "watching process {}{worker}, thread {} ({}): {runtime}, {language}, {steps}; threshold {} ms",
            info.pid,
            info.tid,
            info.thread,
            threshold_ns as f64 / 1e6,
        ));
        if let Self::Screen(screen) = self {
            let command = process::command_line(info.pid);
            screen.found(Target { pid: info.pid, command, language: language.to_owned() });
        }
    }
}

/// The live screen is for a person at a terminal who did not ask for anything else.
fn is_screen(arguments: &args::Attach) -> Result<bool> {
    match arguments.format {
        Some(Format::Tui) if arguments.output.is_some() => {
            bail!("--format tui draws on the terminal; leave out --output, or use --format text or jsonl")
        }
        Some(Format::Tui) if arguments.debug_bpf => {
            bail!("--debug-bpf would print over the live view; use --format text or jsonl")
        }
        Some(Format::Tui) => Ok(true),
        Some(Format::Text | Format::Jsonl) => Ok(false),
        None => Ok(arguments.output.is_none() && !arguments.debug_bpf && screen::is_possible()),
    }
}

fn text_look(is_terminal: bool) -> Look {
    let plain = !is_terminal || std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    Look {
        style: if plain { Style::Plain } else { Style::Ansi },
        times: Times::Local(wall_clock()),
        current_dir: std::env::current_dir().ok(),
    }
}

pub fn wall_clock() -> WallClock {
    let unix = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let seconds = unix.as_secs() as libc::time_t;
    // SAFETY: a plain struct, filled by the call.
    let utc_offset_s = unsafe {
        let mut local = std::mem::zeroed::<libc::tm>();
        libc::localtime_r(&seconds, &mut local);
        local.tm_gmtoff as i32
    };
    WallClock { monotonic_ns: process::monotonic_ns(), unix, utc_offset_s }
}

pub fn output_error(error: io::Error) -> anyhow::Error {
    match error.kind() {
        io::ErrorKind::BrokenPipe => anyhow::anyhow!("the reader of the output is gone; stopped"),
        io::ErrorKind::StorageFull => {
            anyhow::anyhow!("no space left where the output is written; what was written before is kept")
        }
        _ => anyhow::Error::new(error).context("cannot write the output"),
    }
}
