//! The first rows (what is watched, the figures, what blocks right now) and the last one (keys, messages, the search).

use ratatui::layout::Rect;

use super::pen::{Pen, Piece};
use super::words;
use crate::core::event::{LoopInfo, Runtime};
use crate::core::incident::Blame;
use crate::sink::text::span;
use crate::tui::state::{Dashboard, Picture, Tab};

const ROWS: u16 = 2;
/// From here on a block that goes on has a second row, for its line.
const MIN_ROWS_FOR_PLACE: u16 = 20;

pub fn height(dashboard: &Dashboard, area: Rect) -> u16 {
    ROWS + banner_height(dashboard, area.height)
}

fn banner_height(dashboard: &Dashboard, rows: u16) -> u16 {
    match Banner::of(dashboard) {
        None => 0,
        Some(_) => 1 + u16::from(rows >= MIN_ROWS_FOR_PLACE),
    }
}

pub fn draw(dashboard: &Dashboard, pen: &mut Pen, area: Rect) {
    let picture = dashboard.live();
    let up = picture.status.as_ref().map_or(0, |status| dashboard.now_ns().saturating_sub(status.since_ns));
    let up = format!(" up {}", clock(up));
    let room = area.width.saturating_sub(up.len() as u16);
    pen.line((area.x, area.y), room, &target(picture, pen));
    pen.right((area.x + room, area.y), up.len() as u16, &up, pen.look.dim());
    let figures = figures(dashboard, pen);
    pen.line((area.x, area.y + 1), area.width, &figures);
    if let Some(banner) = Banner::of(dashboard) {
        let place = Rect { y: area.y + ROWS, height: area.height - ROWS, ..area };
        draw_banner(&banner, pen, place);
    }
}

/// What goes on right now.
struct Banner<'a> {
    what: String,
    on: &'a LoopInfo,
    blame: &'a Blame,
    /// When it was looked at.
    seen: String,
}

impl<'a> Banner<'a> {
    /// A block, else short steps that add up.
    fn of(dashboard: &'a Dashboard) -> Option<Self> {
        let picture = dashboard.live();
        if let Some(oldest) = picture.ongoing.first() {
            let more = picture.ongoing.len() - 1;
            let more = if more > 0 { format!(" (and {more} more)") } else { String::new() };
            let age = span(dashboard.now_ns().saturating_sub(oldest.start_ns));
            let what = format!("BLOCKED for {age}{more}");
            let seen = format!("seen after {}", span(oldest.age_ns()));
            return Some(Self { what, on: &oldest.on, blame: &oldest.blame, seen });
        }
        let open = picture.adding_up.iter().max_by_key(|open| open.total_ns)?;
        let within = span(open.end_ns.saturating_sub(open.start_ns));
        let what = format!("ADDING UP: {} in {} short steps", span(open.total_ns), open.count);
        Some(Self { what, on: &open.on, blame: &open.blame, seen: format!("within {within}") })
    }
}

/// Loud: whoever looks must not miss that the loop is stuck right now.
fn draw_banner(banner: &Banner, pen: &mut Pen, area: Rect) {
    let style = pen.look.banner();
    pen.fill(area, style);
    for y in area.top()..area.bottom() {
        // Cells of a style alone would be left out by a terminal that clears with its own colours.
        pen.text((area.x, y), area.width, &" ".repeat(usize::from(area.width)), style);
    }
    let Banner { what, on, blame, seen } = banner;
    let sign = pen.look.either("▲", "!");
    let who = words::owner(blame);
    let place = words::place(blame, pen.look);
    if area.height > 1 {
        pen.text((area.x + 1, area.y), area.width - 1, &format!("{sign} {what}  {who}"), style);
        let text = format!("  at {place}  ({seen}, thread {} {})", on.thread, on.tid);
        pen.text((area.x + 1, area.y + 1), area.width - 1, &text, style);
    } else {
        pen.text((area.x, area.y), area.width, &format!("{sign} {what} {who} at {place}"), style);
    }
}

/// Too small for more than one thing at a time.
pub fn draw_smallest(dashboard: &Dashboard, pen: &mut Pen, area: Rect) {
    let picture = dashboard.live();
    if let Some(banner) = Banner::of(dashboard) {
        draw_banner(&banner, pen, Rect { height: area.height.min(2), ..area });
    } else {
        pen.text((area.x, area.y), area.width, &format!("loopguard: {} blocks", picture.blocks), pen.look.strong());
        pen.text((area.x, area.y + 1), area.width, "(too small a window)", pen.look.dim());
    }
}

fn target(picture: &Picture, pen: &Pen) -> Vec<Piece> {
    let mut pieces = vec![("loopguard  ".to_owned(), pen.look.dim())];
    let (first, others) = match picture.targets.as_slice() {
        [] => return pieces.into_iter().chain([("no event loop seen so far".to_owned(), pen.look.strong())]).collect(),
        [first, others @ ..] => (first, others.len()),
    };
    let mut runtimes: Vec<Runtime> =
        picture.threads().filter(|thread| !thread.is_gone).map(|thread| thread.info.runtime).collect();
    let threads = match runtimes.len() {
        1 => "1 loop thread".to_owned(),
        more => format!("{more} loop threads"),
    };
    runtimes.dedup();
    let runtimes: Vec<String> = runtimes.iter().map(|runtime| format!("{runtime:?}").to_lowercase()).collect();
    let more = if others > 0 { format!(" and {others} more") } else { String::new() };
    // What must not be cut comes first.
    pieces.push((format!("pid {}{more}", first.pid), pen.look.strong()));
    pieces.push((format!("  {}, {}, {threads}  ", first.language, runtimes.join("/")), pen.look.dim()));
    pieces.push((first.command.clone(), pen.look.strong()));
    pieces
}

fn figures(dashboard: &Dashboard, pen: &Pen) -> Vec<Piece> {
    let look = pen.look;
    let picture = dashboard.live();
    let mut pieces = Vec::new();
    let mut figure = |name: &str, value: String, style| {
        pieces.push((format!("{name} "), look.dim()));
        pieces.push((format!("{value}  "), style));
    };
    if let Some(blocks) = dashboard.paused() {
        figure("PAUSED,", format!("{blocks} blocks since"), look.selected());
    }
    let blocked = picture.blocked_share(dashboard.now_ns());
    let is_bad = if picture.blocks > 0 { look.alarm() } else { look.strong() };
    figure("blocks", picture.blocks.to_string(), is_bad);
    figure("blocked, last min", words::percent(blocked), if blocked > 0.0 { look.alarm() } else { look.strong() });
    figure("threshold", threshold(picture), look.strong());
    if let Some(status) = &picture.status {
        let lost = if status.lost_records > 0 { look.alarm() } else { look.strong() };
        figure("lost", status.lost_records.to_string(), lost);
    }
    if let Some(own) = picture.own_cpu {
        figure("own CPU", words::percent(own), look.strong());
    }
    pieces
}

fn threshold(picture: &Picture) -> String {
    let mut now: Vec<u64> =
        picture.threads().filter(|thread| !thread.is_gone).map(|thread| thread.threshold_ns).collect();
    now.sort_unstable();
    let adaptive = if picture.is_adaptive { " (adaptive)" } else { "" };
    match (now.first(), now.last()) {
        (Some(low), Some(high)) if low == high => format!("{}{adaptive}", span(*low)),
        (Some(low), Some(high)) => format!("{} to {}{adaptive}", span(*low), span(*high)),
        _ => "?".to_owned(),
    }
}

/// Hours, minutes and seconds.
fn clock(ns: u64) -> String {
    let seconds = ns / 1_000_000_000;
    format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

pub fn draw_foot(dashboard: &Dashboard, pen: &mut Pen, area: Rect) {
    let view = dashboard.view();
    if view.search.is_typing {
        let used = pen.text((area.x, area.y), area.width, &format!("/{}", view.search.text), pen.look.strong());
        let rest = area.width - used;
        pen.text(
            (area.x + used, area.y),
            rest,
            pen.look.either("▏ Enter: keep  Esc: clear", "_ Enter: keep  Esc: clear"),
            pen.look.dim(),
        );
    } else if let Some(message) = &view.message {
        pen.text((area.x, area.y), area.width, message, pen.look.strong());
    } else {
        pen.text((area.x, area.y), area.width, &hints(dashboard), pen.look.dim());
    }
}

fn hints(dashboard: &Dashboard) -> String {
    let view = dashboard.view();
    let here: &[&str] = if view.open.is_some() {
        &["Esc back", "h/l newer/older", "u unfold", "e export"]
    } else {
        match view.tab {
            Tab::Recent if view.scope.is_some() => {
                &["Enter details", "Esc all blocks", "f flame", "/ search", "s sort", "e export"]
            }
            Tab::Recent => &["Enter details", "/ search", "s sort", "e export", "+/- zoom"],
            Tab::Routes | Tab::Lines | Tab::Waits => &["Enter its blocks", "f flame", "/ search", "s sort", "e export"],
            Tab::Flame => &["hjkl move", "Enter zoom", "Esc out", "b blocks", "e export"],
            Tab::Notices => &["/ search"],
        }
    };
    let pause = if dashboard.paused().is_some() { "p go on" } else { "p pause" };
    [&["? help", "q quit", pause], here].concat().join("   ")
}
