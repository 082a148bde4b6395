//! Turns updates into a few lines a person on call can read at a glance.

use std::fmt::{self, Display, Formatter};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Sink;
use super::escape::{printable, word};
use crate::core::event::{Frame, LoopInfo, Origin, Owner, RequestFacts, Worker};
use crate::core::incident::{
    Attribution, Blame, Cumulative, Incident, LineShare, Ongoing, OwnerShare, Split, ThresholdChange, Update, Verdict,
    Victims, WaitTotal, user_line,
};
use crate::core::request::RequestCounts;
use crate::core::status::StackCounts;
use crate::core::summary::{LineLabel, RouteLabel, Summary, ThreadTotal, Total};

/// Rows of a table in the summary, waits of a block.
const MAX_ROWS: usize = 10;
const MAX_WAITS: usize = 3;
/// Requests of a block besides its own.
const MAX_VICTIMS: usize = 3;
/// A shorter wait explains no block.
const MIN_WAIT_NS: u64 = 100_000;
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
            Update::Cumulative(block) => self.look.cumulative(block),
            Update::CumulativeOngoing(open) => self.look.cumulative_ongoing(open),
            Update::Threshold(change) => self.look.threshold(change),
            // One for every request of a busy server is nothing to read along: the summary counts them.
            Update::Request(_) => return Ok(()),
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
        text += &format!("    {}: {}", verdict(incident.verdict()), parts(&incident.split));
        text += &self.dim(format_args!("  [{}]", thread(&incident.on)));
        text.push('\n');
        text += &waits(&incident.waits);
        text += &incident.victims.as_ref().map(|victims| self.victims(victims)).unwrap_or_default();
        text += &self.hint(incident.hint);
        text
    }

    fn victims(&self, victims: &Victims) -> String {
        let unread = match victims.unread {
            0 => String::new(),
            unread => format!("; {unread} tasks could not be read"),
        };
        match victims.count {
            0 if unread.is_empty() => String::new(),
            0 => format!("    held up nobody that could be seen{unread}\n"),
            count => {
                let shown: Vec<String> = victims.requests.iter().take(MAX_VICTIMS).map(|it| short_name(it)).collect();
                let more = if count > MAX_VICTIMS as u64 { ", ..." } else { "" };
                let what = if count == 1 { "request" } else { "requests" };
                format!("    held up {count} {what}: {}{more}{unread}\n", shown.join(", "))
            }
        }
    }

    fn hint(&self, hint: Option<&str>) -> String {
        hint.map(|hint| format!("    hint: {hint}\n")).unwrap_or_default()
    }

    fn cumulative(&self, block: &Cumulative) -> String {
        let time = self.times.show(block.start_ns);
        let within = span(block.end_ns.saturating_sub(block.start_ns));
        let sum = self.bold(format_args!("{} in {} short steps", span(block.total_ns), block.count));
        let mut text = format!("{time}  {sum} within {within}  {}\n", self.cumulative_owner(block));
        text += &self.place(&block.blame);
        text += &format!("    {}: {}", verdict(block.verdict()), parts(&block.split));
        text += &self.dim(format_args!("  [{}]", thread(&block.on)));
        text.push('\n');
        text += &waits(&block.waits);
        if block.owners.len() > 1 {
            let share = |share: &OwnerShare| format!("{} {}", span(share.ns), owner_name(&share.owner));
            let shown: Vec<String> = block.owners.iter().take(MAX_VICTIMS).map(share).collect();
            let more = if block.owners.len() > MAX_VICTIMS { ", ..." } else { "" };
            text += &format!("    in all {}{more}\n", shown.join(", "));
        }
        if block.lines.len() > 1 {
            let share = |share: &LineShare| {
                let line = user_line(&share.stack).map(|at| at.frame).or(share.stack.frames.first().map(|it| &**it));
                let line = line.map_or_else(|| "line unknown".to_owned(), |frame| self.frame(frame));
                format!("{} {line}", span(share.ns))
            };
            let shown: Vec<String> = block.lines.iter().take(MAX_WAITS).map(share).collect();
            text += &format!("    by line {}\n", shown.join(", "));
        }
        text + &self.hint(block.hint)
    }

    fn cumulative_ongoing(&self, open: &Cumulative) -> String {
        let time = self.times.show(open.end_ns);
        let sum = self.bold(format_args!("so far {} in {} short steps", span(open.total_ns), open.count));
        let thread = self.dim(format_args!("  [{}]", thread(&open.on)));
        format!("{time}  {sum}  {}{thread}\n{}", self.cumulative_owner(open), self.place(&open.blame))
    }

    fn cumulative_owner(&self, block: &Cumulative) -> String {
        match block.owners.len() {
            0 | 1 => self.owner(&block.blame),
            several => format!("{several} owners, most of it {}", self.owner(&block.blame)),
        }
    }

    fn threshold(&self, change: &ThresholdChange) -> String {
        let thread = thread(&change.on);
        let text = format!("threshold now {}  [{thread}]", span(change.threshold_ns));
        self.dim(format_args!("{text}")) + "\n"
    }

    fn ongoing(&self, ongoing: &Ongoing) -> String {
        let time = self.times.show(ongoing.now_ns);
        let age = self.bold(format_args!("still blocked after {}", span(ongoing.age_ns())));
        let thread = self.dim(format_args!("  [{}]", thread(&ongoing.on)));
        let (owner, place) = (self.owner(&ongoing.blame), self.place(&ongoing.blame));
        format!("{time}  {age}  {owner}{thread}\n{place}{}", self.hint(ongoing.hint))
    }

    fn owner(&self, blame: &Blame) -> String {
        let name = match &blame.owner {
            Owner::Request { request, .. } => self.request(request),
            Owner::NoRequest { task: Some(task) } => format!("no request: task {}", printable(task)),
            Owner::Task { task } => format!("task {}, of which no request is known", printable(task)),
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
        let mut text = self.bold(format_args!("{} {}", word(method), word(&request.path)));
        if let Some(route) = &request.route {
            text += &format!(" (route {})", word(route));
        }
        text += &format!(" id={}", word(&request.id));
        if let Some(client) = &request.client {
            text += &format!(" client {}", word(client));
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
        let in_all = if blocks > 0 { format!(", {} in all", span(blocked_ns)) } else { String::new() };
        let cumulative = match summary.cumulative.blocks {
            0 => String::new(),
            1 => format!("; 1 cumulative block of {}", span(summary.cumulative.blocked_ns)),
            more => format!("; {more} cumulative blocks, {} in all", span(summary.cumulative.blocked_ns)),
        };
        let mut text = format!("\nWatched for {watched}, {} ticks: {headline}{in_all}{cumulative}\n", summary.ticks());
        if blocks > 0 {
            text += &self.table("by route", &summary.routes, route);
            text += &self.table("by line", &summary.lines, |label| self.line(label));
        }
        if !summary.victims.is_empty() {
            let head = format_args!("{:>8}  {:>10}  {:>10}  who was held up", "times", "at most", "longest");
            text += &self.rows(&self.dim(head), &summary.victims, route);
        }
        let threads: Vec<_> = summary.threads.iter().map(|thread| (thread, thread.total)).collect();
        text += &self.table("by thread", &threads, |counted| thread_total(counted));
        if summary.excluded.blocks > 0 {
            let Total { blocks, blocked_ns, .. } = summary.excluded;
            text += &format!("  not told, as their routes are excluded: {blocks} blocks, {}\n", span(blocked_ns));
        }
        text += &requests(summary.requests, &measured.requests);
        text += &format!(
            "  lost records: {}, frames without a name: {}, CPU time of loopguard: {}\n",
            measured.lost_records,
            measured.unsymbolized,
            span(measured.self_cpu.as_nanos() as u64)
        );
        if !measured.limited.is_zero() {
            let [limited, unwatched] = [measured.limited, measured.unwatched].map(|time| span(time.as_nanos() as u64));
            text += &format!("  looked less closely for {limited}, to keep to the budget");
            if !measured.unwatched.is_zero() {
                text += &format!(", and not at all for {unwatched} of it: blocks then were missed");
            }
            text += "\n";
        }
        text += &native_stacks(&measured.stacks);
        text
    }

    fn table<L>(&self, title: &str, rows: &[(L, Total)], name: impl Fn(&L) -> String) -> String {
        let head = format_args!("{:>8}  {:>10}  {:>10}  {title}", "blocks", "blocked", "longest");
        self.rows(&self.dim(head), rows, name)
    }

    fn rows<L>(&self, head: &str, rows: &[(L, Total)], name: impl Fn(&L) -> String) -> String {
        let mut text = head.to_owned() + "\n";
        for (label, total) in rows.iter().take(MAX_ROWS) {
            let (blocked, longest) = (span(total.blocked_ns), span(total.longest_ns));
            text += &format!("{:>8}  {blocked:>10}  {longest:>10}  {}\n", total.blocks, name(label));
        }
        if rows.len() > MAX_ROWS {
            text += &format!("{:>34}and {} more\n", "", rows.len() - MAX_ROWS);
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
    pub fn show(&self, ns: u64) -> String {
        match self {
            Self::SinceStart { start_ns } => format!("+{:.3}s", ns.saturating_sub(*start_ns) as f64 / 1e9),
            Self::Local(clock) => clock.time_of_day(ns),
        }
    }
}

impl WallClock {
    /// Since 1970, UTC.
    pub fn unix_time(&self, ns: u64) -> Duration {
        let unix_ns = self.unix.as_nanos() as i128 + i128::from(ns) - i128::from(self.monotonic_ns);
        Duration::from_nanos(u64::try_from(unix_ns).unwrap_or(0))
    }

    fn time_of_day(&self, ns: u64) -> String {
        let unix_ns = self.unix.as_nanos() as i128 + i128::from(ns) - i128::from(self.monotonic_ns);
        let ms = (unix_ns.div_euclid(1_000_000) + i128::from(self.utc_offset_s) * 1000).rem_euclid(24 * 3600 * 1000);
        let [hour, minute, second] = [ms / 3_600_000, ms / 60_000 % 60, ms / 1000 % 60];
        format!("{hour:02}:{minute:02}:{second:02}.{:03}", ms % 1000)
    }
}

/// A duration as a person writes it, with three significant digits or so.
pub fn span(ns: u64) -> impl Display {
    struct Span(u64);
    impl Display for Span {
        fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
            let ms = self.0 as f64 / 1e6;
            let text = match self.0 / 1_000_000 {
                0 if self.0 == 0 => "0 ms".to_owned(),
                0 => format!("{ms:.2} ms"),
                1..100 => format!("{ms:.1} ms"),
                100..1000 => format!("{ms:.0} ms"),
                1000..10_000 => format!("{:.2} s", ms / 1e3),
                10_000..60_000 => format!("{:.1} s", ms / 1e3),
                60_000..3_600_000 => format!("{:.1} min", ms / 60e3),
                _ => format!("{:.1} h", ms / 3600e3),
            };
            f.pad(text.strip_suffix(".0 ms").map_or(text.clone(), |whole| format!("{whole} ms")).as_str())
        }
    }
    Span(ns)
}

fn verdict(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Code => "code",
        Verdict::Host => "host (no CPU free)",
        Verdict::Gil => "gil (another thread held it)",
        Verdict::Unknown => "no clear cause",
    }
}

/// Where the time went, without the parts too short to show.
fn parts(split: &Split) -> String {
    let parts = [
        (split.on_cpu_ns, "on CPU"),
        (split.waiting_ns, "waiting"),
        (split.gil_ns, "for the GIL"),
        (split.run_queue_ns, "for a CPU"),
    ];
    let worth_showing = parts.iter().map(|(ns, _)| ns / 200).sum();
    let shown: Vec<String> = parts
        .iter()
        .filter(|(ns, _)| *ns > 0 && *ns >= worth_showing)
        .map(|(ns, name)| format!("{} {name}", span(*ns)))
        .collect();
    shown.join(", ")
}

fn waits(waits: &[WaitTotal]) -> String {
    let shown: Vec<String> = waits
        .iter()
        .filter(|wait| wait.ns >= MIN_WAIT_NS)
        .take(MAX_WAITS)
        .map(|wait| {
            let on = wait.on.as_ref().map(|on| format!(" on {}", printable(on))).unwrap_or_default();
            format!("{} in {}{on}", span(wait.ns), printable(&wait.syscall))
        })
        .collect();
    if shown.is_empty() { String::new() } else { format!("    waited {}\n", shown.join(", ")) }
}

/// Nothing when all is well.
fn native_stacks(stacks: &StackCounts) -> String {
    let StackCounts { unwound, complete, lost, incomplete } = stacks;
    if complete == unwound && *lost == 0 {
        return String::new();
    }
    let mut text = format!("  native stacks: {complete} of {unwound} complete, {lost} lost\n");
    for (why, count) in incomplete {
        text += &format!("    {count}: {why}\n");
    }
    text
}

fn thread(info: &LoopInfo) -> String {
    let name = format!("{} {}", printable(&info.thread), info.tid);
    match info.worker.as_ref().and_then(Worker::name) {
        Some(worker) => format!("{worker}, {name}"),
        None => name,
    }
}

/// What the servers told of their requests, where they do, and what was not well with that.
fn requests(ended: u64, counts: &RequestCounts) -> String {
    if !counts.are_told {
        return String::new();
    }
    let mut text = format!("  requests ended: {ended}, still open: {}", counts.open);
    for (count, what) in [
        (counts.never_ended, "that never ended"),
        (counts.untracked, "too many to follow"),
        (counts.unpaired, "enters and exits without a counterpart"),
        (counts.frames_disagree, "steps in which the frames showed another request"),
    ] {
        if count > 0 {
            text += &format!(", {what}: {count}");
        }
    }
    text + "\n"
}

fn thread_total(counted: &ThreadTotal) -> String {
    let LoopInfo { pid, runtime, .. } = &*counted.on;
    let runtime = format!("{runtime:?}").to_lowercase();
    format!("{} (pid {pid}, {runtime}), {} ticks", thread(&counted.on), counted.ticks)
}

pub fn route(label: &RouteLabel) -> String {
    match label {
        RouteLabel::Route { method, route } => {
            format!("{} {}", word(method.as_deref().unwrap_or("?")), word(route))
        }
        RouteLabel::NoRequest => "(no request)".to_owned(),
        RouteLabel::Unknown => "(request unknown)".to_owned(),
        RouteLabel::Other => "(other)".to_owned(),
    }
}

fn short_name(request: &RequestFacts) -> String {
    format!("{} {}", word(request.method.as_deref().unwrap_or("?")), word(&request.path))
}

fn owner_name(owner: &Owner) -> String {
    match owner {
        Owner::Request { request, .. } => short_name(request),
        Owner::NoRequest { task: Some(task) } | Owner::Task { task } => format!("task {}", printable(task)),
        Owner::NoRequest { task: None } => "(no request)".to_owned(),
        Owner::Unknown(_) => "(request unknown)".to_owned(),
    }
}

/// A file relative to the current directory, or its last few components.
pub fn shortened(file: &str, current_dir: Option<&Path>) -> String {
    let below = current_dir.and_then(|dir| Path::new(file).strip_prefix(dir).ok()).and_then(Path::to_str);
    if let Some(below) = below.filter(|below| !below.is_empty()) {
        return below.to_owned();
    }
    match file.rmatch_indices('/').nth(PATH_COMPONENTS - 1) {
        // At 0 nothing is left out, so the path stays absolute.
        Some((0, _)) | None => file.to_owned(),
        Some((slash, _)) => file[slash + 1..].to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::example;
    use super::*;
    use crate::core::summary::Measured;

    fn look() -> Look {
        Look {
            style: Style::Plain,
            times: Times::SinceStart { start_ns: 0 },
            current_dir: Some(PathBuf::from("/srv/shop")),
        }
    }

    fn shown(look: Look, update: Update) -> String {
        let mut out = Vec::new();
        Text::new(&mut out, look).update(&update).unwrap();
        lines(out)
    }

    /// Marks where lines begin, so that a snapshot keeps their indentation.
    fn lines(out: Vec<u8>) -> String {
        String::from_utf8(out).unwrap().lines().map(|line| format!("|{line}\n")).collect()
    }

    fn summed_up(summary: &Summary) -> String {
        let mut out = Vec::new();
        Text::new(&mut out, look()).finish(summary).unwrap();
        lines(out)
    }

    #[test]
    fn a_block() {
        insta::assert_snapshot!(shown(look(), Update::Block(example::block())), @r"
        |+1.235s  52.3 ms  GET /items/7 (route /items/{id}) id=abc-123 client 10.0.0.9:41022
        |    at store.py:41 Store.load, calling site-packages/psycopg/waiting.py:228 wait
        |    from api/items.py:12 read_item
        |    code: 1.8 ms on CPU, 50 ms waiting, 0.40 ms for the GIL  [uvicorn 1235]
        |    waited 49.9 ms in recvfrom on 127.0.0.1:5432, 0.50 ms in futex
        ");
    }

    #[test]
    fn a_block_in_colour_at_local_time() {
        let clock = WallClock { monotonic_ns: 0, unix: Duration::from_secs(1_700_000_000), utc_offset_s: -3600 };
        let look = Look { style: Style::Ansi, times: Times::Local(clock), current_dir: None };
        insta::assert_snapshot!(shown(look, Update::Block(example::block())).replace('\x1b', "ESC"), @r"
        |21:13:21.234  ESC[1m52.3 msESC[0m  ESC[1mGET /items/7ESC[0m (route /items/{id}) id=abc-123 client 10.0.0.9:41022
        |    at /srv/shop/store.py:41 Store.load, calling site-packages/psycopg/waiting.py:228 wait
        |    from shop/api/items.py:12 read_item
        |    code: 1.8 ms on CPU, 50 ms waiting, 0.40 ms for the GILESC[2m  [uvicorn 1235]ESC[0m
        |    waited 49.9 ms in recvfrom on 127.0.0.1:5432, 0.50 ms in futex
        ");
    }

    #[test]
    fn how_well_the_owner_is_known_is_said() {
        let told = |owner, attribution, stack| {
            let blame = Blame { owner, attribution, stack };
            shown(look(), Update::Block(Incident { blame, waits: Vec::new(), ..example::block() }))
        };
        let task = Some("gt-background-blocker".to_owned());
        let request = example::block().blame.owner;
        let told = [
            told(Owner::NoRequest { task }, Attribution::Exact, example::library_stack()),
            told(Owner::NoRequest { task: None }, Attribution::Inferred, Default::default()),
            told(Owner::Task { task: "resize (task 9)".to_owned() }, Attribution::Inferred, Default::default()),
            told(Owner::Unknown("nothing was captured while it ran"), Attribution::Unknown, Default::default()),
            told(request, Attribution::Inferred, example::stack()),
        ];
        insta::assert_snapshot!(told.concat(), @r"
        |+1.235s  52.3 ms  no request: task gt-background-blocker
        |    in site-packages/orjson/core.py:5 dumps, no user code on the stack
        |    code: 1.8 ms on CPU, 50 ms waiting, 0.40 ms for the GIL  [uvicorn 1235]
        |+1.235s  52.3 ms  no request: a callback, or the loop itself  (inferred)
        |    line unknown: no stack was captured
        |    code: 1.8 ms on CPU, 50 ms waiting, 0.40 ms for the GIL  [uvicorn 1235]
        |+1.235s  52.3 ms  task resize (task 9), of which no request is known  (inferred)
        |    line unknown: no stack was captured
        |    code: 1.8 ms on CPU, 50 ms waiting, 0.40 ms for the GIL  [uvicorn 1235]
        |+1.235s  52.3 ms  request unknown: nothing was captured while it ran
        |    line unknown: no stack was captured
        |    code: 1.8 ms on CPU, 50 ms waiting, 0.40 ms for the GIL  [uvicorn 1235]
        |+1.235s  52.3 ms  GET /items/7 (route /items/{id}) id=abc-123 client 10.0.0.9:41022  (inferred)
        |    at store.py:41 Store.load, calling site-packages/psycopg/waiting.py:228 wait
        |    from api/items.py:12 read_item
        |    code: 1.8 ms on CPU, 50 ms waiting, 0.40 ms for the GIL  [uvicorn 1235]
        ");
    }

    #[test]
    fn a_block_with_victims_and_a_hint() {
        insta::assert_snapshot!(shown(look(), Update::Block(example::block_with_victims())), @r"
        |+1.235s  52.3 ms  GET /items/7 (route /items/{id}) id=abc-123 client 10.0.0.9:41022
        |    at store.py:41 Store.load, calling site-packages/psycopg/waiting.py:228 wait
        |    from api/items.py:12 read_item
        |    code: 1.8 ms on CPU, 50 ms waiting, 0.40 ms for the GIL  [uvicorn 1235]
        |    waited 49.9 ms in recvfrom on 127.0.0.1:5432, 0.50 ms in futex
        |    held up 5 requests: GET /items/1, GET /items/2, GET /items/3, ...; 2 tasks could not be read
        |    hint: this PostgreSQL driver is synchronous: use psycopg's AsyncConnection or asyncpg
        ");
    }

    #[test]
    fn a_cumulative_block() {
        insta::assert_snapshot!(shown(look(), Update::Cumulative(example::cumulative())), @r"
        |+1.235s  300 ms in 20 short steps within 612 ms  2 owners, most of it GET /items/7 (route /items/{id}) id=abc-123 client 10.0.0.9:41022
        |    at store.py:41 Store.load, calling site-packages/psycopg/waiting.py:228 wait
        |    from api/items.py:12 read_item
        |    code: 10 ms on CPU, 285 ms waiting, 5 ms for a CPU  [uvicorn 1235]
        |    waited 285 ms in recvfrom on 127.0.0.1:5432
        |    in all 240 ms GET /items/7, 60 ms GET /items/8
        |    by line 285 ms store.py:41 Store.load, 15 ms site-packages/orjson/core.py:5 dumps
        |    hint: this PostgreSQL driver is synchronous: use psycopg's AsyncConnection or asyncpg
        ");
        insta::assert_snapshot!(shown(look(), Update::CumulativeOngoing(example::cumulative())), @r"
        |+1.847s  so far 300 ms in 20 short steps  2 owners, most of it GET /items/7 (route /items/{id}) id=abc-123 client 10.0.0.9:41022  [uvicorn 1235]
        |    at store.py:41 Store.load, calling site-packages/psycopg/waiting.py:228 wait
        |    from api/items.py:12 read_item
        ");
    }

    #[test]
    fn a_block_that_goes_on() {
        insta::assert_snapshot!(shown(look(), Update::Ongoing(example::ongoing())), @r"
        |+3.235s  still blocked after 2.00 s  GET /items/7 (route /items/{id}) id=abc-123 client 10.0.0.9:41022  [uvicorn 1235]
        |    at store.py:41 Store.load, calling site-packages/psycopg/waiting.py:228 wait
        |    from api/items.py:12 read_item
        ");
    }

    #[test]
    fn hostile_names_stay_on_their_line() {
        let told = shown(look(), Update::Block(example::hostile_block()));
        assert!(told.len() < 4000, "bounded");
        assert!(!told.chars().any(|char| char != '\n' && super::super::escape::is_dangerous(char)));
        insta::assert_snapshot!(told.replace(&"x".repeat(100), "(100 x)"), @r#"
        |+1.235s  52.3 ms  GET /\x1b]0;owned\x07\x0d\x0a{"type":"block"}\u{202e}txt.exe\u{9b}31m(100 x)xxxxxxxxxxxxxxxxxxx… (route /items/{id}) id=id\x0averdict:\x20host client 10.0.0.9:41022
        |    at \u{2066}evil\u{2069}.py\x09:3 f\x0auser code
        |    code: 1.8 ms on CPU, 50 ms waiting, 0.40 ms for the GIL  [w\x1b[2J 1235]
        |    waited 49.9 ms in recvfrom on sock\u{2028}et, 0.50 ms in futex
        "#);
    }

    #[test]
    fn a_summary() {
        insta::assert_snapshot!(summed_up(&example::summary()), @r"
        |
        |Watched for 30.0 s, 48211 ticks: 12 blocks of 50 ms or longer, 1.24 s in all
        |  blocks     blocked     longest  by route
        |      10      1.10 s      181 ms  GET /items/{id}
        |       2      140 ms       75 ms  (no request)
        |  blocks     blocked     longest  by line
        |      11      1.18 s      181 ms  store.py:41 Store.load, calling wait
        |       1       60 ms       60 ms  (no user code on the stack)
        |  blocks     blocked     longest  by thread
        |      12      1.24 s      181 ms  uvicorn 1235 (pid 1234, uvloop), 48211 ticks
        |  lost records: 0, frames without a name: 2, CPU time of loopguard: 210 ms
        ");
    }

    #[test]
    fn a_summary_with_everything() {
        let total = |blocks, blocked_ns| Total { blocks, blocked_ns, longest_ns: blocked_ns };
        let route = RouteLabel::Route { method: Some("GET".to_owned()), route: "/orders".to_owned() };
        insta::assert_snapshot!(
            summed_up(&Summary {
                victims: vec![(route, total(7, 400_000_000))],
                cumulative: total(2, 500_000_000),
                excluded: total(3, 180_000_000),
                measured: Measured {
                    limited: Duration::from_secs(12),
                    unwatched: Duration::from_secs(3),
                    ..example::summary().measured
                },
                ..example::summary()
            }),
            @r"
            |
            |Watched for 30.0 s, 48211 ticks: 12 blocks of 50 ms or longer, 1.24 s in all; 2 cumulative blocks, 500 ms in all
            |  blocks     blocked     longest  by route
            |      10      1.10 s      181 ms  GET /items/{id}
            |       2      140 ms       75 ms  (no request)
            |  blocks     blocked     longest  by line
            |      11      1.18 s      181 ms  store.py:41 Store.load, calling wait
            |       1       60 ms       60 ms  (no user code on the stack)
            |   times     at most     longest  who was held up
            |       7      400 ms      400 ms  GET /orders
            |  blocks     blocked     longest  by thread
            |      12      1.24 s      181 ms  uvicorn 1235 (pid 1234, uvloop), 48211 ticks
            |  not told, as their routes are excluded: 3 blocks, 180 ms
            |  lost records: 0, frames without a name: 2, CPU time of loopguard: 210 ms
            |  looked less closely for 12.0 s, to keep to the budget, and not at all for 3.00 s of it: blocks then were missed
            "
        );
    }

    #[test]
    fn a_summary_of_nothing() {
        let mut quiet =
            Summary { total: Total::default(), routes: Vec::new(), lines: Vec::new(), ..example::summary() };
        quiet.threads[0].total = Total::default();
        let blind = Summary { threads: Vec::new(), ..quiet.clone() };
        insta::assert_snapshot!(summed_up(&quiet) + &summed_up(&blind), @r"
        |
        |Watched for 30.0 s, 48211 ticks: no block of 50 ms or longer
        |  blocks     blocked     longest  by thread
        |       0        0 ms        0 ms  uvicorn 1235 (pid 1234, uvloop), 48211 ticks
        |  lost records: 0, frames without a name: 2, CPU time of loopguard: 210 ms
        |
        |Watched for 30.0 s: saw no event loop, so this says nothing about blocking.
        ");
    }

    #[test]
    fn long_tables_are_cut() {
        let label = |index| RouteLabel::Route { method: None, route: format!("/{index}") };
        let routes = (0..200).map(|index| (label(index), Total { blocks: 1, blocked_ns: 1, longest_ns: 1 })).collect();
        let text = summed_up(&Summary { routes, ..example::summary() });
        assert!(text.contains("and 190 more\n"), "{text}");
    }

    #[test]
    fn durations() {
        let shown: Vec<String> =
            [0, 40_000, 5_250_000, 50_000_000, 523_456_789, 1_234_567_890, 90_000_000_000, 7_200_000_000_000]
                .map(|ns| span(ns).to_string())
                .into();
        assert_eq!(shown, ["0 ms", "0.04 ms", "5.2 ms", "50 ms", "523 ms", "1.23 s", "1.5 min", "2.0 h"]);
    }

    #[test]
    fn files_are_shortened() {
        let check = |file: &str, expected: &str| assert_eq!(shortened(file, Some(Path::new("/srv/shop"))), expected);
        check("/srv/shop/app/api/items/views.py", "app/api/items/views.py");
        check("/srv/shopping/app/api/views.py", "app/api/views.py");
        check("/usr/lib/python3.12/asyncio/events.py", "python3.12/asyncio/events.py");
        check("/a.py", "/a.py");
        check("/srv/app/main.py", "/srv/app/main.py");
        check("<frozen importlib>", "<frozen importlib>");
        check("/srv/shop", "/srv/shop");
    }

    #[test]
    fn midnight_is_passed() {
        let clock = WallClock { monotonic_ns: 5_000_000_000, unix: Duration::from_secs(86_399), utc_offset_s: 0 };
        assert_eq!(clock.time_of_day(5_001_000_000), "23:59:59.001");
        assert_eq!(clock.time_of_day(7_000_000_000), "00:00:01.000");
        let east = WallClock { utc_offset_s: 7200, ..clock };
        assert_eq!(east.time_of_day(0), "01:59:54.000");
    }
}
