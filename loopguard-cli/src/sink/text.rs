//! Turns updates into a few lines a person on call can read at a glance.

use std::fmt::{self, Display, Formatter};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Sink;
use super::escape::printable;
use crate::core::event::{Frame, LoopInfo, Origin, Owner, RequestFacts};
use crate::core::incident::{Attribution, Blame, Incident, Ongoing, Split, Update, Verdict, WaitTotal};
use crate::core::summary::{LineLabel, RouteLabel, Summary, ThreadTotal, Total};

/// Rows of a table in the summary, waits of a block.
const MAX_ROWS: usize = 10;
const MAX_WAITS: usize = 3;
/// What is left of a path outside the current directory.
const PATH_COMPONENTS: usize = 3;

pub struct Text<W> {
    out: W,
    look: Look,
}

/// How text looks, decided by the caller.
#[derive(Clone, Debug)]
pub struct Look {
    pub style: Style,
    pub times: Times,
    /// Files below it are shown relative to it.
    pub current_dir: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    Plain,
    Ansi,
}

/// How `CLOCK_MONOTONIC` times are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Times {
    /// Since this instant.
    SinceStart { start_ns: u64 },
    /// As the local time of day.
    Local(WallClock),
}

/// What the clocks showed at one instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WallClock {
    pub monotonic_ns: u64,
    /// Since 1970, UTC.
    pub unix: Duration,
    pub utc_offset_s: i32,
}

impl<W: Write> Text<W> {
    pub fn new(out: W, look: Look) -> Self {
        Self { out, look }
    }
}

impl<W: Write> Sink for Text<W> {
    fn update(&mut self, update: &Update) -> io::Result<()> {
        let text = match update {
            Update::Block(incident) => self.look.block(incident),
            Update::Ongoing(ongoing) => self.look.ongoing(ongoing),
        };
        self.out.write_all(text.as_bytes())?;
        self.out.flush()
    }

    fn finish(&mut self, summary: &Summary) -> io::Result<()> {
        self.out.write_all(self.look.summary(summary).as_bytes())?;
        self.out.flush()
    }
}

impl Look {
    fn block(&self, incident: &Incident) -> String {
        let time = self.times.show(incident.start_ns);
        let at_least = if incident.cut_at_attach { "at least " } else { "" };
        let duration = self.bold(format_args!("{at_least}{}", span(incident.duration_ns())));
        let mut text = format!("{time}  {duration}  {}\n", self.owner(&incident.blame));
        text += &self.place(&incident.blame);
        text += &format!("    {}: {}", self.verdict(incident.verdict()), parts(&incident.split));
        text += &self.dim(format_args!("  [{}]\n", thread(&incident.on)));
        text += &waits(&incident.waits);
        text
    }

    fn ongoing(&self, ongoing: &Ongoing) -> String {
        let time = self.times.show(ongoing.now_ns);
        let age = self.bold(format_args!("still blocked after {}", span(ongoing.age_ns())));
        let thread = self.dim(format_args!("  [{}]", thread(&ongoing.on)));
        format!("{time}  {age}  {}{thread}\n{}", self.owner(&ongoing.blame), self.place(&ongoing.blame))
    }

    fn owner(&self, blame: &Blame) -> String {
        let name = match &blame.owner {
            Owner::Request { request, .. } => self.request(request),
            Owner::NoRequest { task: Some(task) } => format!("no request: task {}", printable(task)),
            Owner::NoRequest { task: None } => "no request: a callback, or the loop itself".to_owned(),
            Owner::Unknown(why) => return format!("request unknown: {why}"),
        };
        match blame.attribution {
            Attribution::Exact => name,
            Attribution::Inferred => name + &self.dim(format_args!("  (inferred)")),
            Attribution::Unknown => name + &self.dim(format_args!("  (uncertain)")),
        }
    }

    fn request(&self, request: &RequestFacts) -> String {
        let method = request.method.as_deref().unwrap_or("?");
        let mut text = self.bold(format_args!("{} {}", printable(method), printable(&request.path)));
        if let Some(route) = &request.route {
            text += &format!(" (route {})", printable(route));
        }
        text += &format!(" id={}", printable(&request.id));
        if let Some(client) = &request.client {
            text += &format!(" client {}", printable(client));
        }
        text
    }

    /// Where the time went: the user's line, what it called, and whose line called it.
    fn place(&self, blame: &Blame) -> String {
        let frames = &blame.stack.frames;
        let Some(at) = blame.user_line() else {
            return match (frames.first(), blame.stack.incomplete) {
                (Some(frame), _) => format!("    in {}, no user code on the stack\n", self.frame(frame)),
                (None, Some(why)) => format!("    line unknown: {why}\n"),
                (None, None) => "    line unknown: no stack was captured\n".to_owned(),
            };
        };
        let mut text = format!("    at {}", self.frame(at.frame));
        if let Some(called) = at.called {
            text += &format!(", calling {}", self.frame(called));
        }
        let mut users = frames.iter().filter(|frame| frame.origin == Origin::User).skip(1);
        if let Some(caller) = users.find(|frame| frame.function != at.frame.function) {
            text += &format!("\n    from {}", self.frame(caller));
        }
        text + "\n"
    }

    fn frame(&self, frame: &Frame) -> String {
        let place = (frame.file.as_deref().or(frame.module.as_deref()), frame.line);
        self.function_at(&frame.function, place)
    }

    fn function_at(&self, function: &str, place: (Option<&str>, Option<u32>)) -> String {
        let function = printable(function);
        match place {
            (Some(file), Some(line)) => format!("{}:{line} {function}", self.file(file)),
            (Some(file), None) => format!("{} {function}", self.file(file)),
            (None, _) => function.to_string(),
        }
    }

    fn file(&self, file: &str) -> String {
        printable(&shortened(file, self.current_dir.as_deref())).to_string()
    }

    fn verdict(&self, verdict: Verdict) -> &'static str {
        match verdict {
            Verdict::Code => "code",
            Verdict::Host => "host (no CPU free)",
            Verdict::Gil => "gil (another thread held it)",
            Verdict::Unknown => "verdict unknown",
        }
    }

    fn summary(&self, summary: &Summary) -> String {
        let measured = &summary.measured;
        let watched = span(measured.duration.as_nanos() as u64);
        if summary.threads.is_empty() {
            return format!("\nWatched for {watched}: saw no event loop, so this says nothing about blocking.\n");
        }
        let Total { blocks, blocked_ns, .. } = summary.total;
        let verdict = match blocks {
            0 => "no block".to_owned(),
            1 => "1 block".to_owned(),
            more => format!("{more} blocks"),
        };
        let headline = self.bold(format_args!("{verdict} of {} or longer", span(summary.threshold_ns)));
        let mut text = format!("\nWatched for {watched}, {} ticks: {headline}", summary.ticks());
        if blocks > 0 {
            text += &format!(", {} in all", span(blocked_ns));
            text += "\n";
            text += &self.table("by route", &summary.routes, route);
            text += &self.table("by line", &summary.lines, |label| self.line(label));
        } else {
            text += "\n";
        }
        let threads: Vec<_> = summary.threads.iter().map(|thread| (thread, thread.total)).collect();
        text += &self.table("by thread", &threads, |counted| thread_total(counted));
        text += &format!(
            "  lost records: {}, frames without a name: {}, CPU time of loopguard: {}\n",
            measured.lost_records,
            measured.unsymbolized,
            span(measured.self_cpu.as_nanos() as u64)
        );
        text
    }

    fn table<L>(&self, title: &str, rows: &[(L, Total)], name: impl Fn(&L) -> String) -> String {
        let head = format!("{:>8}  {:>10}  {:>10}  {title}", "blocks", "blocked", "longest");
        let mut text = format!("{}\n", self.dim(format_args!("{head}")));
        for (label, total) in rows.iter().take(MAX_ROWS) {
            let (blocked, longest) = (span(total.blocked_ns), span(total.longest_ns));
            text += &format!("{:>8}  {blocked:>10}  {longest:>10}  {}\n", total.blocks, name(label));
        }
        if rows.len() > MAX_ROWS {
            text += &format!("{:>8}  {:>10}  {:>10}  and {} more\n", "", "", "", rows.len() - MAX_ROWS);
        }
        text
    }

    fn line(&self, label: &LineLabel) -> String {
        match label {
            LineLabel::Line { file, line, function, called } => {
                let at = self.function_at(function, (file.as_deref(), *line));
                match called {
                    Some(called) => format!("{at}, calling {}", printable(called)),
                    None => at,
                }
            }
            LineLabel::NoUserCode => "(no user code on the stack)".to_owned(),
            LineLabel::Other => "(other)".to_owned(),
        }
    }

    fn bold(&self, text: fmt::Arguments) -> String {
        self.paint("1", text)
    }

    fn dim(&self, text: fmt::Arguments) -> String {
        self.paint("2", text)
    }

    fn paint(&self, code: &str, text: fmt::Arguments) -> String {
        match self.style {
            Style::Plain => text.to_string(),
            Style::Ansi => format!("\x1b[{code}m{text}\x1b[0m"),
        }
    }
}

impl Times {
    fn show(&self, ns: u64) -> String {
        match self {
            Self::SinceStart { start_ns } => format!("{:>9.3} s", ns.saturating_sub(*start_ns) as f64 / 1e9),
            Self::Local(clock) => clock.time_of_day(ns),
        }
    }
}

impl WallClock {
    fn time_of_day(&self, ns: u64) -> String {
        let unix_ns = self.unix.as_nanos() as i128 + i128::from(ns) - i128::from(self.monotonic_ns);
        let ms = (unix_ns.div_euclid(1_000_000) + i128::from(self.utc_offset_s) * 1000).rem_euclid(24 * 3600 * 1000);
        let [hour, minute, second] = [ms / 3_600_000, ms / 60_000 % 60, ms / 1000 % 60];
        format!("{hour:02}:{minute:02}:{second:02}.{:03}", ms % 1000)
    }
}

/// A duration as a person writes it, with three significant digits or so.
fn span(ns: u64) -> impl Display {
    struct Span(u64);
    impl Display for Span {
        fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
            let ms = self.0 as f64 / 1e6;
            let text = match self.0 / 1_000_000 {
                0 if self.0 == 0 => "0 ms".to_owned(),
                0 => format!("{ms:.2} ms"),
                1..100 => format!("{ms:.1} ms"),
                100..1000 => format!("{ms:.0} ms"),
                1000..60_000 => format!("{:.2} s", ms / 1e3),
                60_000..3_600_000 => format!("{:.1} min", ms / 60e3),
                _ => format!("{:.1} h", ms / 3600e3),
            };
            f.pad(text.strip_suffix(".0 ms").map_or(text.clone(), |whole| format!("{whole} ms")).as_str())
        }
    }
    Span(ns)
}

/// Where the time went, without the parts too short to show.
fn parts(split: &Split) -> String {
    let parts = [
        (split.on_cpu_ns, "on CPU"),
        (split.waiting_ns, "waiting"),
        (split.gil_ns, "for the GIL"),
        (split.run_queue_ns, "for a CPU"),
    ];
    let total: u64 = parts.iter().map(|(ns, _)| ns).sum();
    let shown: Vec<String> =
        parts.iter().filter(|(ns, _)| *ns * 200 >= total).map(|(ns, name)| format!("{} {name}", span(*ns))).collect();
    shown.join(", ")
}

fn waits(waits: &[WaitTotal]) -> String {
    let shown: Vec<String> = waits
        .iter()
        .filter(|wait| wait.ns >= 100_000)
        .take(MAX_WAITS)
        .map(|wait| {
            let on = wait.on.as_ref().map(|on| format!(" on {}", printable(on))).unwrap_or_default();
            format!("{} in {}{on}", span(wait.ns), printable(&wait.syscall))
        })
        .collect();
    if shown.is_empty() { String::new() } else { format!("    waited {}\n", shown.join(", ")) }
}

fn thread(info: &LoopInfo) -> String {
    format!("{} {}", printable(&info.thread), info.tid)
}

fn thread_total(counted: &ThreadTotal) -> String {
    let LoopInfo { pid, runtime, .. } = &*counted.on;
    let runtime = format!("{runtime:?}").to_lowercase();
    format!("{} (pid {pid}, {runtime}), {} ticks", thread(&counted.on), counted.ticks)
}

fn route(label: &RouteLabel) -> String {
    match label {
        RouteLabel::Route { method, route } => {
            format!("{} {}", printable(method.as_deref().unwrap_or("?")), printable(route))
        }
        RouteLabel::NoRequest => "(no request)".to_owned(),
        RouteLabel::Unknown => "(request unknown)".to_owned(),
        RouteLabel::Other => "(other)".to_owned(),
    }
}

/// A file relative to the current directory, or its last few components.
fn shortened(file: &str, current_dir: Option<&Path>) -> String {
    let below = current_dir.and_then(|dir| Path::new(file).strip_prefix(dir).ok()).and_then(Path::to_str);
    if let Some(below) = below.filter(|below| !below.is_empty()) {
        return below.to_owned();
    }
    match file.rmatch_indices('/').nth(PATH_COMPONENTS - 1) {
        Some((slash, _)) => file[slash + 1..].to_owned(),
        None => file.to_owned(),
    }
}
