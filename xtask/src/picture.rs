//! Turns a real run of the live view on the demo server into the picture of the README.

use std::fmt::Write as _;
use std::fs;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use xtask::workspace::Workspace;

use crate::companion;
use crate::demo;
use crate::setup;
use crate::step::say;

const PICTURE: &str = "docs/live-view.svg";
const COLUMNS: u16 = 132;
const ROWS: u16 = 38;
/// Until the view has something to show.
const WATCH: Duration = Duration::from_secs(40);
const SETTLE: Duration = Duration::from_secs(1);
/// Five rows down, so that the details beside the list stand still.
const KEYS: [&str; 5] = ["j", "j", "j", "j", "j"];

/// Of one cell, in the picture's units.
const CELL: (f64, f64) = (8.0, 17.0);
const FOREGROUND: &str = "#d4d4d4";
const BACKGROUND: &str = "#1b1d21";

pub fn run() -> Result<()> {
    ensure!(setup::is_root(), "attaching to a process needs root");
    let workspace = Workspace::locate()?;
    setup::terminal_for_tests(&workspace);
    companion::outlive_interrupts();
    let shop = demo::Shop::open(&workspace)?;
    say(&format!("watching for {} s", WATCH.as_secs()));
    let terminal = Terminal::start(&shop)?;
    thread::sleep(WATCH);
    for key in KEYS {
        terminal.tmux(&["send-keys", key])?;
    }
    thread::sleep(SETTLE);
    let screen = terminal.tmux(&["capture-pane", "-e", "-p"])?;
    let picture = workspace.root.join(PICTURE);
    fs::write(&picture, svg(&screen)).with_context(|| format!("write {}", picture.display()))?;
    say(&format!("wrote {PICTURE}"));
    Ok(())
}

/// tmux with the live view in it, until this is dropped.
struct Terminal {
    socket: String,
}

impl Terminal {
    fn start(shop: &demo::Shop) -> Result<Self> {
        let terminal = Self { socket: format!("loopguard-picture-{}", std::process::id()) };
        let command = format!(
            "env -u NO_COLOR LC_ALL=C.UTF-8 COLORTERM=truecolor {} attach --pid {} --threshold 20ms --format tui",
            shop.loopguard.display(),
            shop.pid()
        );
        let (columns, rows) = (COLUMNS.to_string(), ROWS.to_string());
        terminal.tmux(&["new-session", "-d", "-x", &columns, "-y", &rows, &command])?;
        Ok(terminal)
    }

    fn tmux(&self, arguments: &[&str]) -> Result<String> {
        let output = Command::new("tmux").args(["-L", &self.socket, "-f", "/dev/null"]).args(arguments).output();
        let output = output.context("run tmux")?;
        ensure!(output.status.success(), "tmux: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.tmux(&["kill-server"]);
    }
}

/// How letters are shown, as far as the view sets it (ECMA-48, SGR).
#[derive(Clone, Debug, Default, PartialEq)]
struct Style {
    foreground: Option<String>,
    background: Option<String>,
    is_bold: bool,
    is_dim: bool,
    is_underlined: bool,
    is_reversed: bool,
}

/// Letters of one style beside each other.
struct Run {
    column: usize,
    text: String,
    style: Style,
}

fn svg(screen: &str) -> String {
    let rows: Vec<&str> = screen.lines().collect();
    let (width, height) = (f64::from(COLUMNS) * CELL.0, rows.len() as f64 * CELL.1);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"-8 -8 {} {}\" font-family=\"ui-monospace, 'DejaVu Sans \
         Mono', Menlo, Consolas, monospace\" font-size=\"13.3\">\n<rect x=\"-8\" y=\"-8\" width=\"100%\" \
         height=\"100%\" rx=\"6\" fill=\"{BACKGROUND}\"/>\n",
        width + 16.0,
        height + 16.0
    );
    let mut style = Style::default();
    for (row, line) in rows.iter().enumerate() {
        for run in runs(line, &mut style) {
            draw(&run, row, &mut svg);
        }
    }
    svg + "</svg>\n"
}

/// Splits a line where its style changes, and around each bar.
fn runs(line: &str, style: &mut Style) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let mut column = 0;
    let mut rest = line;
    while let Some(char) = rest.chars().next() {
        if let Some(after) = rest.strip_prefix("\x1b[") {
            let end = after.find(|char: char| char.is_ascii_alphabetic()).unwrap_or(after.len());
            if after[end..].starts_with('m') {
                set(style, &after[..end]);
            }
            rest = after.get(end + 1..).unwrap_or_default();
            continue;
        }
        rest = &rest[char.len_utf8()..];
        match runs.last_mut() {
            Some(run) if run.style == *style && !is_bar(char) && !run.text.chars().any(is_bar) => run.text.push(char),
            _ => runs.push(Run { column, text: char.to_string(), style: style.clone() }),
        }
        column += 1;
    }
    runs
}

fn set(style: &mut Style, codes: &str) {
    let mut codes = codes.split([';', ':']).map(|code| code.parse::<u8>().unwrap_or(0));
    while let Some(code) = codes.next() {
        match code {
            0 => *style = Style::default(),
            1 => style.is_bold = true,
            2 => style.is_dim = true,
            4 => style.is_underlined = true,
            7 => style.is_reversed = true,
            22 => (style.is_bold, style.is_dim) = (false, false),
            24 => style.is_underlined = false,
            27 => style.is_reversed = false,
            39 => style.foreground = None,
            49 => style.background = None,
            38 | 48 => {
                // Of the forms that there are, the view uses `5;n`.
                let colour = codes.next().filter(|form| *form == 5).and_then(|_| codes.next()).map(colour);
                if code == 38 { style.foreground = colour } else { style.background = colour }
            }
            _ => {}
        }
    }
}

/// Of xterm's cube and grey ramp.
fn colour(index: u8) -> String {
    const STEPS: [u8; 6] = [0, 95, 135, 175, 215, 255];
    let [red, green, blue] = match index {
        0..16 => return FOREGROUND.to_owned(),
        16..=231 => [(index - 16) / 36, (index - 16) / 6 % 6, (index - 16) % 6].map(|step| STEPS[usize::from(step)]),
        232.. => [8 + (index - 232) * 10; 3],
    };
    format!("#{red:02x}{green:02x}{blue:02x}")
}

/// Eighths of a cell, from the bottom.
fn is_bar(char: char) -> bool {
    ('▁'..='█').contains(&char)
}

fn draw(run: &Run, row: usize, svg: &mut String) {
    let columns = run.text.chars().count();
    let (x, y) = (run.column as f64 * CELL.0, row as f64 * CELL.1);
    let width = columns as f64 * CELL.0;
    let style = &run.style;
    let mut foreground = style.foreground.as_deref().unwrap_or(FOREGROUND);
    let mut background = style.background.as_deref();
    if style.is_reversed {
        (foreground, background) = (background.unwrap_or(BACKGROUND), Some(foreground));
    }
    if let Some(fill) = background {
        let _ = writeln!(svg, r#"<rect x="{x}" y="{y}" width="{width}" height="{}" fill="{fill}"/>"#, CELL.1);
    }
    if let Some(bar) = run.text.chars().next().filter(|char| is_bar(*char)) {
        let filled = f64::from(bar as u32 - '▁' as u32 + 1) / 8.0 * CELL.1;
        let top = y + CELL.1 - filled;
        // A little wider, or seams show between neighbours.
        let wide = CELL.0 + 0.3;
        let _ = writeln!(svg, r#"<rect x="{x}" y="{top}" width="{wide}" height="{filled}" fill="{foreground}"/>"#);
        return;
    }
    if run.text.trim().is_empty() && !style.is_underlined {
        return;
    }
    let mut more = String::new();
    if style.is_bold {
        more += " font-weight=\"bold\"";
    }
    if style.is_dim {
        more += " opacity=\"0.6\"";
    }
    if style.is_underlined {
        more += " text-decoration=\"underline\"";
    }
    let text = run.text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let baseline = y + CELL.1 * 0.75;
    let _ = writeln!(
        svg,
        "<text x=\"{x}\" y=\"{baseline}\" textLength=\"{width}\" lengthAdjust=\"spacingAndGlyphs\" fill=\"{foreground}\" \
         xml:space=\"preserve\"{more}>{text}</text>"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_keep_their_columns_and_colours() {
        let mut style = Style::default();
        let runs = runs("a\x1b[1m<b\x1b[0;38;5;32m█▁\x1b[39m c", &mut style);
        let shown: Vec<_> = runs.iter().map(|run| (run.column, run.text.as_str(), run.style.is_bold)).collect();
        assert_eq!(shown, [(0, "a", false), (1, "<b", true), (3, "█", false), (4, "▁", false), (5, " c", false)]);
        assert_eq!(runs[2].style.foreground.as_deref(), Some("#0087d7"));
        let svg = svg("a\x1b[1m<b");
        assert!(svg.contains("font-weight=\"bold\">&lt;b</text>"), "{svg}");
    }
}
