//! Turns one block into all that is known of it: where the time went, whose it was, the source, the stack.

use std::sync::Arc;

use ratatui::layout::Rect;
use ratatui::style::{Modifier, Style};

use super::pen::{Pen, Piece};
use super::{bar, words};
use crate::core::event::{Frame, How, Origin, Owner, RequestFacts};
use crate::core::incident::{UserLine, Verdict, Victims, WaitTotal, user_line};
use crate::sink::text::span;
use crate::tui::state::{Dashboard, Hits, Seen, Source, SourceAt, Tab};

/// Fewer library frames than this are not worth folding.
const MIN_FOLDED: usize = 2;
/// Packages that are named for folded frames.
const MAX_PACKAGES: usize = 3;
/// Owners, and lines, of a cumulative block.
const MAX_SHARES: usize = 5;

/// The whole body is one block's.
pub fn draw_open(dashboard: &Dashboard, pen: &mut Pen, area: Rect, hits: &mut Hits) {
    let Some(block) = dashboard.looked_at() else {
        let gone = "this block is no longer kept: newer ones took its place (Esc: back)";
        pen.text((area.x + 1, area.y), area.width - 1, gone, pen.look.dim());
        return;
    };
    let lines = lines(dashboard, block, pen, area.width);
    let scrollable = (lines.len() as u16).saturating_sub(area.height);
    hits.scrollable = scrollable;
    let first = dashboard.view().scrolled.min(scrollable);
    for (y, line) in (area.top()..area.bottom()).zip(&lines[usize::from(first)..]) {
        pen.line((area.x, y), area.width, line);
    }
    if first < scrollable {
        let more = format!(" {} more (j, PgDn) ", scrollable - first);
        pen.right((area.x, area.bottom() - 1), area.width, &more, pen.look.selected());
    }
}

/// As much of it as there is room for.
pub fn draw_beside(dashboard: &Dashboard, pen: &mut Pen, area: Rect) {
    let Some(block) = dashboard.looked_at() else { return };
    let mut lines = lines(dashboard, block, pen, area.width);
    if dashboard.view().tab != Tab::Recent {
        lines.insert(0, vec![("newest of these:".to_owned(), pen.look.dim())]);
    }
    for (y, line) in (area.top()..area.bottom()).zip(&lines) {
        pen.line((area.x, y), area.width, line);
    }
}

fn lines(dashboard: &Dashboard, block: &Seen, pen: &Pen, columns: u16) -> Vec<Vec<Piece>> {
    let look = pen.look;
    let verdict = match block.verdict() {
        Verdict::Code => "the code ran or waited",
        Verdict::Host => "the host gave it no CPU",
        Verdict::Gil => "another thread held the GIL",
        Verdict::Unknown => "no clear cause",
    };
    let mut lines = vec![
        vec![(duration(block), look.strong()), (format!("  {}", words::owner(block.blame())), look.strong())],
        vec![
            (format!("{}  ", look.times.show(block.start_ns())), look.dim()),
            (verdict.to_owned(), look.cause(block.cause())),
        ],
        bar::bar(block.split(), columns, pen),
        bar::sum(block.split(), pen),
    ];
    lines.extend(block.hint().map(|hint| vec![("hint ".to_owned(), look.dim()), (hint.to_owned(), look.strong())]));
    lines.extend(facts(block, pen));
    lines.extend(block.victims().and_then(|held_up| victims(held_up, pen)));
    lines.extend(shares(block, pen));
    lines.extend(waits(block.waits(), pen));
    lines.extend(source(dashboard, block, pen));
    lines.push(heading("stack, innermost first", pen));
    lines.extend(stack(dashboard, block, pen));
    lines
}

fn duration(block: &Seen) -> String {
    let ns = span(block.blocked_ns());
    match block {
        Seen::Single(block) if block.cut_at_attach => format!("at least {ns}"),
        Seen::Single(_) => ns.to_string(),
        Seen::Cumulative(block) => {
            let within = span(block.end_ns.saturating_sub(block.start_ns));
            format!("{ns} in {} short steps within {within}", block.count)
        }
    }
}

fn victims(victims: &Victims, pen: &Pen) -> Option<Vec<Piece>> {
    if victims.count == 0 {
        return None;
    }
    let s = if victims.count == 1 { "" } else { "s" };
    let name = |request: &Arc<RequestFacts>| {
        format!("{} {}", request.method.as_deref().unwrap_or("?"), request.route.as_ref().unwrap_or(&request.path))
    };
    let mut names: Vec<String> = Vec::new();
    for name in victims.requests.iter().map(name) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let (by, who) = (span(victims.delay_ns), format!("{} request{s}", victims.count));
    Some(vec![
        ("held up ".to_owned(), pen.look.dim()),
        (who, pen.look.strong()),
        (format!(", {by} in all at most: "), pen.look.dim()),
        (names.join(", "), Style::new()),
    ])
}

/// What owners and lines had of a cumulative block.
fn shares(block: &Seen, pen: &Pen) -> Vec<Vec<Piece>> {
    let Seen::Cumulative(block) = block else { return Vec::new() };
    let share = |ns: u64, count: u64, name: String| {
        vec![
            (format!("{:>9}  ", span(ns).to_string()), pen.look.strong()),
            (format!("{count:>6} steps  "), pen.look.dim()),
            (name, Style::new()),
        ]
    };
    let mut lines = vec![heading("whose steps they were, and on which lines", pen)];
    lines.extend(block.owners.iter().take(MAX_SHARES).map(|it| share(it.ns, it.count, words::owner_name(&it.owner))));
    let line = |stack| match user_line(stack) {
        Some(UserLine { frame, .. }) => words::frame(frame, pen.look),
        None => "(no user code)".to_owned(),
    };
    lines.extend(block.lines.iter().take(MAX_SHARES).map(|it| share(it.ns, it.count, line(&it.stack))));
    lines
}

fn heading(text: &str, pen: &Pen) -> Vec<Piece> {
    vec![(text.to_owned(), pen.look.dim().add_modifier(Modifier::UNDERLINED))]
}

fn facts(block: &Seen, pen: &Pen) -> Vec<Vec<Piece>> {
    let fact = |name: &str, value: &str| [(format!("{name} "), pen.look.dim()), (format!("{value}   "), Style::new())];
    let mut lines = Vec::new();
    match &block.blame().owner {
        Owner::Request { request, .. } => {
            let route = request.route.as_deref().unwrap_or("(unknown)");
            lines.push([fact("route", route), fact("id", &request.id)].concat());
            let client = request.client.as_ref().map(|client| fact("client", client));
            let trace = request.trace_id.as_ref().map(|trace| fact("trace", trace));
            lines.push(client.into_iter().chain(trace).flatten().collect());
        }
        Owner::NoRequest { task } => {
            let task = task.as_deref().unwrap_or("(none: a callback, or the loop itself)");
            lines.push(fact("task", task).into());
        }
        Owner::Task { task } => lines.push(fact("task", task).into()),
        Owner::Unknown(why) => lines.push(fact("request unknown:", why).into()),
    }
    let how = match block.blame().how() {
        How::Usdt => ", told by the server's probes",
        How::AsgiFrame => ", from the ASGI scope on the stack",
        How::AsyncioTask => ", through the task that awaits it",
        How::HttpRecv => ", from the request it read",
        How::HttpRecvOfParent => ", from the request read by the task that spawned it",
        How::None => "",
    };
    let on = block.on();
    let known = fact("known", &format!("{}{how}", words::attribution(block.blame())));
    lines.push([known, fact("thread", &format!("{} {}", on.thread, on.tid))].concat());
    lines.retain(|line| !line.is_empty());
    lines
}

fn waits(waits: &[WaitTotal], pen: &Pen) -> Vec<Vec<Piece>> {
    if waits.is_empty() {
        return Vec::new();
    }
    let wait = |wait: &WaitTotal| {
        let on = wait.on.as_ref().map(|on| format!(" on {on}")).unwrap_or_default();
        vec![
            (format!("{:>9}  ", span(wait.ns).to_string()), pen.look.strong()),
            (format!("{}{on}", wait.syscall), Style::new()),
        ]
    };
    [heading("waits", pen)].into_iter().chain(waits.iter().map(wait)).collect()
}

fn source(dashboard: &Dashboard, block: &Seen, pen: &Pen) -> Vec<Vec<Piece>> {
    let Some(at) = block.user_line() else { return Vec::new() };
    let (Some(file), Some(line)) = (&at.frame.file, at.frame.line) else { return Vec::new() };
    let wanted = SourceAt { pid: block.on().pid, file: file.to_string(), line };
    let title = words::frame(at.frame, pen.look);
    let mut shown = vec![heading(&title, pen)];
    match dashboard.source(&wanted) {
        None => shown.push(vec![("  (reading)".to_owned(), pen.look.dim())]),
        Some(Source::Unreadable(why)) => shown.push(vec![(format!("  ({why})"), pen.look.dim())]),
        Some(Source::Lines { lines, is_newer }) => {
            if *is_newer {
                let warning = "  the file changed after the process started: this may not be what runs";
                shown.push(vec![(warning.to_owned(), pen.look.alarm())]);
            }
            let digits = lines.last().map_or(1, |(number, _)| number.to_string().len());
            for (number, text) in lines {
                let is_it = *number == line;
                let mark = if is_it { pen.look.either("▶", ">") } else { " " };
                let style = if is_it { pen.look.strong() } else { Style::new() };
                let text = text.replace('\t', "    ");
                shown.push(vec![
                    (format!("{mark} {number:>digits$} "), if is_it { pen.look.alarm() } else { pen.look.dim() }),
                    (text, style),
                ]);
            }
        }
    }
    shown
}

fn stack(dashboard: &Dashboard, block: &Seen, pen: &Pen) -> Vec<Vec<Piece>> {
    let stack = &block.blame().stack;
    let blocking = block.user_line().map(|at| at.frame);
    let mut lines = Vec::new();
    for run in stack.frames.chunk_by(|a, b| (a.origin == Origin::User) == (b.origin == Origin::User)) {
        let is_users = run[0].origin == Origin::User;
        if is_users || dashboard.view().unfolded || run.len() < MIN_FOLDED {
            lines.extend(run.iter().map(|frame| frame_line(frame, blocking, pen)));
        } else {
            lines.push(vec![(folded(run, pen), pen.look.dim())]);
        }
    }
    if let Some(why) = stack.incomplete {
        lines.push(vec![(format!("  (outer frames are missing: {why})"), pen.look.dim())]);
    }
    if stack.frames.is_empty() && stack.incomplete.is_none() {
        lines.push(vec![("  (no stack was captured)".to_owned(), pen.look.dim())]);
    }
    lines
}

fn frame_line(frame: &Arc<Frame>, blocking: Option<&Frame>, pen: &Pen) -> Vec<Piece> {
    let is_it = blocking.is_some_and(|blocking| std::ptr::eq(blocking, &**frame));
    let mark = if is_it { pen.look.either("▶ ", "> ") } else { "  " };
    vec![(mark.to_owned(), pen.look.alarm()), (words::frame(frame, pen.look), pen.look.code(frame.origin))]
}

/// `… 12 frames of starlette, fastapi (u: unfold)`
fn folded(run: &[Arc<Frame>], pen: &Pen) -> String {
    let mut packages: Vec<&str> = Vec::new();
    for package in run.iter().filter_map(|frame| package(frame)) {
        if !packages.contains(&package) {
            packages.push(package);
        }
    }
    let more = if packages.len() > MAX_PACKAGES { ", ..." } else { "" };
    packages.truncate(MAX_PACKAGES);
    let of = if packages.is_empty() { String::new() } else { format!(" of {}{more}", packages.join(", ")) };
    format!("  {} {} frames{of} (u: unfold)", pen.look.either("…", "..."), run.len())
}

/// The package that a frame's file belongs to, or the module of a native one.
fn package(frame: &Frame) -> Option<&str> {
    let Some(file) = frame.file.as_deref() else { return frame.module.as_deref() };
    let below = |folder: &str| file.find(folder).map(|at| &file[at + folder.len()..]);
    let inside = below("/site-packages/").or_else(|| below("/dist-packages/"));
    let inside = inside.or_else(|| {
        let at = file.find("/python3")?;
        file[at + 1..].split_once('/').map(|(_, rest)| rest)
    });
    let first = inside?.split('/').next()?;
    Some(first.strip_suffix(".py").unwrap_or(first))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::event::FrameKind;

    #[test]
    fn packages() {
        let package = |file: Option<&str>| {
            let frame = Frame {
                kind: FrameKind::Python,
                origin: Origin::Library,
                function: "".into(),
                file: file.map(Into::into),
                line: None,
                module: Some("libc.so.6".into()),
            };
            package(&frame).map(str::to_owned)
        };
        assert_eq!(package(Some("/v/lib/python3.12/site-packages/fastapi/a/b.py")).as_deref(), Some("fastapi"));
        assert_eq!(package(Some("/v/lib/python3.12/site-packages/six.py")).as_deref(), Some("six"));
        assert_eq!(package(Some("/usr/lib/python3.12/asyncio/events.py")).as_deref(), Some("asyncio"));
        assert_eq!(package(Some("/usr/lib/python3.12/socket.py")).as_deref(), Some("socket"));
        assert_eq!(package(Some("<frozen runpy>")), None);
        assert_eq!(package(None).as_deref(), Some("libc.so.6"));
    }
}
