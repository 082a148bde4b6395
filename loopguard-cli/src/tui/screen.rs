//! Owns the terminal: takes it over, hands keys to the state, draws what changed a few times a second, and gives it
//! back as it was.

use std::collections::VecDeque;
use std::io::{self, BufWriter, IsTerminal as _, Stdout, Write as _};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use crossterm::event::{DisableMouseCapture, EnableMouseCapture, Event};
use crossterm::terminal::{EnterAlternateScreen, LeaveAlternateScreen, enable_raw_mode};
use crossterm::{Command as _, cursor, execute};
use ratatui::Terminal;
use ratatui::backend::CrosstermBackend;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::{Instant, sleep_until};

use super::draw::draw;
use super::draw::look::{Colours, Glyphs, Look};
use super::export;
use super::source::SourceReader;
use super::state::{Ask, Dashboard, Target};
use crate::core::incident::Update;
use crate::core::status::Status;
use crate::core::summary::Summary;
use crate::sink::Sink;
use crate::sink::text::Text;
use crate::source::process;

/// Five screens a second go through any connection.
const DRAW_EVERY: Duration = Duration::from_millis(200);
/// Notices that are printed once the terminal is given back.
const MAX_NOTICES: usize = 200;
/// One write a screen.
const OUTPUT_BUFFER: usize = 1 << 16;

pub struct Screen {
    look: Look,
    /// How the closing summary looks.
    closing: crate::sink::text::Look,
    dashboard: Dashboard,
    sources: SourceReader,
    taken: Option<Taken>,
    has_changed: bool,
    drawn_at: Option<Instant>,
    notices: VecDeque<String>,
}

/// The terminal, while it is ours.
struct Taken {
    terminal: Terminal<CrosstermBackend<BufWriter<Stdout>>>,
    keys: UnboundedReceiver<io::Result<Event>>,
}

/// What the person at the keyboard wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    GoOn,
    Leave,
}

/// What the environment says of the terminal.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    pub term: String,
    pub colorterm: String,
    pub no_color: bool,
    /// The first of LC_ALL, LC_CTYPE and LANG that says something.
    pub locale: String,
}

impl Environment {
    pub fn read() -> Self {
        let get = |name: &str| std::env::var(name).unwrap_or_default();
        let locale = ["LC_ALL", "LC_CTYPE", "LANG"].map(get).into_iter().find(|value| !value.is_empty());
        Self {
            term: get("TERM"),
            colorterm: get("COLORTERM"),
            no_color: !get("NO_COLOR").is_empty(),
            locale: locale.unwrap_or_default(),
        }
    }

    pub fn colours(&self) -> Colours {
        let (term, colorterm) = (self.term.as_str(), self.colorterm.as_str());
        if self.no_color {
            Colours::None
        } else if term.contains("256color")
            || matches!(colorterm, "truecolor" | "24bit")
            || ["kitty", "alacritty", "foot", "ghostty", "wezterm", "direct"].iter().any(|name| term.contains(name))
        {
            Colours::Indexed
        } else {
            Colours::Basic
        }
    }

    pub fn glyphs(&self) -> Glyphs {
        let locale = self.locale.to_lowercase();
        if locale.contains("utf-8") || locale.contains("utf8") { Glyphs::Unicode } else { Glyphs::Ascii }
    }
}

/// Whether there is a terminal to draw on and to read keys from.
pub fn is_possible() -> bool {
    let is_dumb = matches!(std::env::var("TERM").as_deref(), Ok("dumb" | "") | Err(_));
    io::stdin().is_terminal() && io::stdout().is_terminal() && !is_dumb
}

impl Screen {
    pub fn new(look: Look, closing: crate::sink::text::Look) -> Result<Self> {
        if !is_possible() {
            bail!("--format tui needs a terminal for input and output (and TERM); use --format text or jsonl");
        }
        Ok(Self {
            look,
            closing,
            dashboard: Dashboard::default(),
            sources: SourceReader::default(),
            taken: None,
            has_changed: true,
            drawn_at: None,
            notices: VecDeque::new(),
        })
    }

    /// From here on the terminal is ours.
    pub fn take_terminal(&mut self) -> Result<()> {
        give_back_on_panic();
        remember_terminal().context("read the terminal's settings")?;
        IS_TAKEN.store(true, Ordering::SeqCst);
        enable_raw_mode().context("set the terminal to single keys")?;
        execute!(io::stdout(), EnterAlternateScreen, EnableMouseCapture, cursor::Hide)
            .context("write to the terminal")?;
        let out = BufWriter::with_capacity(OUTPUT_BUFFER, io::stdout());
        let terminal = Terminal::new(CrosstermBackend::new(out)).context("draw on the terminal")?;
        self.taken = Some(Taken { terminal, keys: read_keys()? });
        self.draw()
    }

    /// For the person at the terminal; shown, and printed again at the end.
    pub fn say(&mut self, text: &str) {
        self.dashboard.notice(text);
        if self.notices.len() == MAX_NOTICES {
            self.notices.pop_front();
        }
        self.notices.push_back(text.to_owned());
        self.has_changed = true;
    }

    pub fn found(&mut self, target: Target) {
        self.dashboard.found(target);
        self.has_changed = true;
    }

    /// Waits for a key, a source file or the time to draw, and does what follows from it.
    pub async fn turn(&mut self) -> Result<Wish> {
        let due = self.due();
        let Some(taken) = &mut self.taken else { return std::future::pending().await };
        tokio::select! {
            event = taken.keys.recv() => {
                // Without a terminal there is nobody left to show anything.
                return Ok(event.and_then(Result::ok).map_or(Wish::Leave, |event| self.event(event)));
            }
            (at, source) = self.sources.read() => {
                self.dashboard.source_read(at, source);
                self.has_changed = true;
            }
            _ = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => self.draw()?,
        }
        Ok(Wish::GoOn)
    }

    /// When to draw next: not more often than anybody can see, and not at all while nothing changes.
    fn due(&self) -> Option<Instant> {
        let next = self.drawn_at.map_or_else(Instant::now, |at| at + DRAW_EVERY);
        (self.has_changed || self.dashboard.is_moving()).then_some(next)
    }

    fn event(&mut self, event: Event) -> Wish {
        self.has_changed = true;
        let asked = match event {
            Event::Key(key) => self.dashboard.key(key),
            Event::Mouse(mouse) => {
                self.dashboard.mouse(mouse);
                None
            }
            _ => None,
        };
        match asked {
            Some(Ask::Leave) => return Wish::Leave,
            Some(Ask::Export(blocks)) => {
                let here = std::env::current_dir().unwrap_or_else(|_| ".".into());
                let told = match export::write(&blocks, &here) {
                    Ok(path) => {
                        let name = path.file_name().unwrap_or_default().display().to_string();
                        let s = if blocks.len() == 1 { "" } else { "s" };
                        format!("wrote {} block{s} to {name}", blocks.len())
                    }
                    Err(why) => why,
                };
                self.dashboard.exported(&told);
            }
            None => {}
        }
        Wish::GoOn
    }

    fn draw(&mut self) -> Result<()> {
        let Some(taken) = &mut self.taken else { return Ok(()) };
        let (dashboard, look) = (&mut self.dashboard, &self.look);
        dashboard.at(process::monotonic_ns());
        let mut hits = None;
        taken.terminal.draw(|frame| hits = Some(draw(dashboard, look, frame))).context("draw on the terminal")?;
        if let Some(hits) = hits {
            dashboard.drawn(hits);
        }
        self.has_changed = false;
        self.drawn_at = Some(Instant::now());
        if let Some(wanted) = self.dashboard.wanted_source() {
            self.sources.start(wanted);
        }
        Ok(())
    }

    fn give_back(&mut self) {
        self.taken = None;
        give_back();
    }
}

impl Sink for Screen {
    fn update(&mut self, update: &Update) -> io::Result<()> {
        self.dashboard.update(update);
        self.has_changed |= !matches!(update, Update::Request(_));
        Ok(())
    }

    fn status(&mut self, status: &Status) -> io::Result<()> {
        self.dashboard.status(status);
        self.has_changed = true;
        Ok(())
    }

    /// The terminal is as it was, and below what stood there stand the notices and the summary.
    fn finish(&mut self, summary: &Summary) -> io::Result<()> {
        self.give_back();
        let mut errors = io::stderr().lock();
        for notice in &self.notices {
            // If nobody reads along, there is nothing to be done about it.
            let _ = writeln!(errors, "loopguard: {}", crate::sink::escape::printable(notice));
        }
        Text::new(io::stdout(), self.closing.clone()).finish(summary)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.give_back();
    }
}

/// Keys as they come. They are read by a thread of their own: to ask for them is costly, and the loop that waits for them
/// runs for every record too.
fn read_keys() -> Result<UnboundedReceiver<io::Result<Event>>> {
    let (sender, keys) = unbounded_channel();
    let read = move || {
        loop {
            let event = crossterm::event::read();
            let is_last = event.is_err();
            if sender.send(event).is_err() || is_last {
                break;
            }
        }
    };
    thread::Builder::new().name("loopguard-keys".to_owned()).spawn(read).context("start a thread")?;
    Ok(keys)
}

static IS_TAKEN: AtomicBool = AtomicBool::new(false);
static BEFORE: OnceLock<Before> = OnceLock::new();

/// The terminal as it was, and what undoes what was written to it.
struct Before {
    settings: libc::termios,
    undo: String,
}

fn remember_terminal() -> io::Result<()> {
    // SAFETY: a struct of integers, for which all zero is a value.
    let mut settings: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: a valid place for the result.
    if unsafe { libc::tcgetattr(libc::STDIN_FILENO, &mut settings) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut undo = String::new();
    let written = DisableMouseCapture
        .write_ansi(&mut undo)
        .and_then(|()| LeaveAlternateScreen.write_ansi(&mut undo))
        .and_then(|()| crossterm::style::ResetColor.write_ansi(&mut undo))
        .and_then(|()| cursor::Show.write_ansi(&mut undo));
    written.map_err(io::Error::other)?;
    BEFORE.get_or_init(|| Before { settings, undo });
    Ok(())
}

/// Also called while everything falls apart: takes no lock, and does something only once.
fn give_back() {
    if !IS_TAKEN.swap(false, Ordering::SeqCst) {
        return;
    }
    let Some(Before { settings, undo }) = BEFORE.get() else { return };
    // SAFETY: bytes that live on, and settings that were read from the same terminal.
    unsafe {
        libc::write(libc::STDOUT_FILENO, undo.as_ptr().cast(), undo.len());
        libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, settings);
    }
}

/// What a panic says must not be drawn over, nor lost with the alternate screen.
fn give_back_on_panic() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let tell = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            give_back();
            tell(panic);
        }));
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(term: &str, colorterm: &str, locale: &str) -> Environment {
        Environment { term: term.into(), colorterm: colorterm.into(), no_color: false, locale: locale.into() }
    }

    #[test]
    fn colours_by_terminal() {
        let colours = |term, colorterm| environment(term, colorterm, "").colours();
        assert_eq!(colours("xterm-256color", ""), Colours::Indexed);
        assert_eq!(colours("tmux-256color", ""), Colours::Indexed);
        assert_eq!(colours("xterm", "truecolor"), Colours::Indexed);
        assert_eq!(colours("xterm-kitty", ""), Colours::Indexed);
        assert_eq!(colours("linux", ""), Colours::Basic);
        assert_eq!(Environment { no_color: true, ..environment("xterm-256color", "", "") }.colours(), Colours::None);
    }

    #[test]
    fn characters_by_locale() {
        let glyphs = |locale| environment("xterm", "", locale).glyphs();
        assert_eq!(["C.UTF-8", "de_DE.utf8"].map(glyphs), [Glyphs::Unicode; 2]);
        assert_eq!(["", "C", "POSIX", "de_DE.ISO-8859-1"].map(glyphs), [Glyphs::Ascii; 4]);
    }
}
