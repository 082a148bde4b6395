//! Turns the blocks of each loop thread into a row of bars over time, coloured by what the blocks were.

use ratatui::layout::Rect;
use ratatui::style::Style;

use super::pen::Pen;
use super::words;
use crate::sink::text::span;
use crate::tui::state::{Cause, Dashboard, Hits, Lane, LaneHit, Peak, ZOOMS_NS};

/// Columns for a thread's name.
const NAME: u16 = 16;
/// A bar of one step stands for a block this much shorter than the threshold.
const BASE_NS: u64 = 1_000_000;

/// What a column shows.
#[derive(Clone, Copy)]
struct Bar {
    ns: u64,
    style: Style,
    /// Tells causes apart where there is no colour.
    letter: &'static str,
}

pub fn height(dashboard: &Dashboard, area: Rect) -> u16 {
    let lanes = dashboard.picture().timeline.lanes().len() as u16;
    if lanes == 0 { 0 } else { lanes.min(most_lanes(area)) * lane_height(lanes, area) + 1 }
}

fn most_lanes(area: Rect) -> u16 {
    (area.height / 4).max(2)
}

fn lane_height(lanes: u16, area: Rect) -> u16 {
    let room = (area.height / 5).max(3);
    (room / lanes).clamp(1, if lanes == 1 { 8 } else { 3 })
}

pub fn draw(dashboard: &Dashboard, pen: &mut Pen, area: Rect, hits: &mut Hits) {
    let lanes = dashboard.picture().timeline.lanes();
    if area.height < 2 || lanes.is_empty() {
        return;
    }
    let rows = area.height - 1;
    let per_lane = (rows / lanes.len() as u16).max(1);
    let shown = &lanes[..lanes.len().min(usize::from(rows / per_lane))];
    let columns = area.width - NAME;
    let zoom_ns = ZOOMS_NS[dashboard.view().time.zoom];
    let until_ns = dashboard.view().time.until_ns.unwrap_or(dashboard.now_ns());
    let bars: Vec<Vec<Option<Bar>>> =
        shown.iter().map(|lane| bars(dashboard, lane, pen, (zoom_ns, until_ns, columns))).collect();
    let longest_ns = bars.iter().flatten().flatten().map(|bar| bar.ns).max().unwrap_or(0);
    for (index, (lane, bars)) in (0..).zip(shown.iter().zip(&bars)) {
        let place = Rect { y: area.y + index * per_lane, height: per_lane, ..area };
        draw_name(dashboard, lane, pen, place);
        let place = Rect { x: area.x + NAME, width: columns, ..place };
        for (x, bar) in (place.x..).zip(bars) {
            draw_bar(*bar, longest_ns, pen, Rect { x, width: 1, ..place });
        }
        let from_ns = (until_ns / zoom_ns + 1).saturating_sub(u64::from(columns)) * zoom_ns;
        hits.lanes.push(LaneHit { area: place, tid: lane.on.tid, from_ns, column_ns: zoom_ns });
    }
    let axis = Rect { y: area.y + rows, height: 1, ..area };
    let hidden = lanes.len() - shown.len();
    draw_axis(dashboard, pen, axis, (longest_ns, hidden));
}

fn bars(
    dashboard: &Dashboard,
    lane: &Lane,
    pen: &Pen,
    (zoom_ns, until_ns, columns): (u64, u64, u16),
) -> Vec<Option<Bar>> {
    let peaks = lane.columns(zoom_ns, until_ns, columns.into());
    let bar = |peak: Peak| Bar { ns: peak.ns, style: pen.look.cause(peak.cause), letter: letter(peak.cause) };
    let mut bars: Vec<Option<Bar>> = peaks.into_iter().map(|peak| peak.map(bar)).collect();
    let open = dashboard.picture().ongoing.iter().find(|open| open.on.tid == lane.on.tid);
    if let Some(open) = open {
        let now_ns = dashboard.now_ns();
        let last = until_ns / zoom_ns;
        for (back, bar) in (0..).zip(bars.iter_mut().rev()) {
            let Some(column) = u64::checked_sub(last, back) else { break };
            if (open.start_ns / zoom_ns..=now_ns / zoom_ns).contains(&column) {
                let ns = now_ns.saturating_sub(open.start_ns);
                *bar = Some(Bar { ns, style: pen.look.alarm(), letter: "!" });
            }
        }
    }
    bars
}

fn letter(cause: Cause) -> &'static str {
    match cause {
        Cause::Unknown => "?",
        known => &known.name()[..1],
    }
}

fn draw_name(dashboard: &Dashboard, lane: &Lane, pen: &mut Pen, place: Rect) {
    let busy = dashboard.picture().busy.get(&lane.on.tid).map(|share| words::percent(*share));
    let (x, y) = (place.x, place.y);
    let number = lane.on.tid.to_string();
    let room = (NAME - 2).saturating_sub(number.len() as u16);
    if place.height > 1 {
        let used = pen.text((x, y), room, &lane.on.thread, pen.look.strong());
        pen.text((x + used + 1, y), NAME - used - 1, &number, pen.look.dim());
        let busy = busy.map_or_else(String::new, |busy| format!("busy {busy}"));
        pen.text((x, y + 1), NAME - 1, &busy, pen.look.dim());
    } else {
        pen.text((x, y), room, &lane.on.thread, pen.look.strong());
        pen.right((x, y), NAME - 1, &busy.unwrap_or(number), pen.look.dim());
    }
}

/// On a logarithmic scale, or short blocks would vanish beside a long one.
fn draw_bar(bar: Option<Bar>, longest_ns: u64, pen: &mut Pen, place: Rect) {
    let Some(bar) = bar else {
        let ground = pen.look.either("·", ".");
        pen.text((place.x, place.bottom() - 1), 1, ground, pen.look.dim());
        return;
    };
    const EIGHTHS: [&str; 9] = [" ", "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"];
    const QUARTERS: [&str; 5] = [" ", ".", ":", "|", "#"];
    let steps: &[&str] = pen.look.either(&EIGHTHS, &QUARTERS);
    let per_row = steps.len() as u16 - 1;
    let filled = scaled(bar.ns, longest_ns, place.height * per_row);
    let top = (filled - 1) / per_row;
    for row in 0..place.height {
        let left = filled.saturating_sub(row * per_row).min(per_row);
        let glyph = if pen.look.is_plain() && row == top { bar.letter } else { steps[usize::from(left)] };
        pen.text((place.x, place.bottom() - 1 - row), 1, glyph, bar.style);
    }
}

/// Steps out of `most`, one at least.
fn scaled(ns: u64, longest_ns: u64, most: u16) -> u16 {
    let size = |ns: u64| (ns.max(BASE_NS) as f64 / BASE_NS as f64).ln() + 1.0;
    let steps = size(ns) / size(longest_ns) * f64::from(most);
    (steps.round() as u16).clamp(1, most)
}

fn draw_axis(dashboard: &Dashboard, pen: &mut Pen, area: Rect, (longest_ns, hidden): (u64, usize)) {
    let time = &dashboard.view().time;
    let zoom_ns = ZOOMS_NS[time.zoom];
    let columns = u64::from(area.width - NAME);
    let look = pen.look;
    let ago = |ns: u64| format!("-{}", span(ns));
    let until_ns = time.until_ns.unwrap_or(dashboard.now_ns());
    let behind_ns = dashboard.now_ns() - until_ns.min(dashboard.now_ns());
    let left = ago(behind_ns + columns * zoom_ns);
    let right = if behind_ns > 0 { format!("{} (0: now)", ago(behind_ns)) } else { "now".to_owned() };
    let x = area.x + NAME;
    let mut used = NAME + pen.text((x, area.y), area.width - NAME, &format!("{left}  "), look.dim());
    if hidden > 0 {
        pen.text((area.x, area.y), NAME - 1, &format!("+{hidden} threads"), look.dim());
    }
    let right_at = area.width.saturating_sub(right.len() as u16);
    for cause in [Cause::Code, Cause::Wait, Cause::Gil, Cause::Host] {
        if used + 8 >= right_at {
            break;
        }
        let square = if look.is_plain() { format!("{}=", letter(cause)) } else { look.either("■ ", "# ").to_owned() };
        used += pen.text((area.x + used, area.y), 2, &square, look.cause(cause));
        used += pen.text((area.x + used, area.y), 6, cause.name(), look.dim()) + 1;
    }
    let scale = format!("max {}, {}/column", span(longest_ns.max(1)), span(zoom_ns));
    if longest_ns > 0 && used + 2 + (scale.len() as u16) < right_at {
        pen.text((area.x + used + 1, area.y), right_at - used - 2, &scale, look.dim());
    }
    pen.right((area.x + used, area.y), area.width - used, &right, look.dim());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_grow_with_their_block_and_the_longest_fills_the_row() {
        let ms = |ms: u64| ms * 1_000_000;
        let steps = [0, 1, 10, 50, 100, 1000, 5000].map(|length| scaled(ms(length), ms(5000), 16));
        assert!(steps.is_sorted(), "{steps:?}");
        assert_eq!((steps[0] > 0, steps[6]), (true, 16));
    }
}
