//! Turns the dashboard into a screenful, and says what stands where. Nothing here changes anything.

mod bar;
mod detail;
mod flame;
mod head;
mod help;
mod list;
pub mod look;
mod pen;
#[cfg(test)]
mod snapshots;
mod timeline;
mod words;

use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::style::Modifier;

use self::look::Look;
use self::pen::Pen;
use super::state::{Dashboard, Hits, Tab};

/// Below this there is room for a headline only.
const MIN_COLUMNS: u16 = 30;
const MIN_ROWS: u16 = 8;
/// From here on the details of what is selected stand beside the list.
const MIN_COLUMNS_FOR_TWO: u16 = 110;
const MIN_ROWS_FOR_TIMELINE: u16 = 14;
/// Below this the details of a block have the timeline's rows too.
const MIN_ROWS_FOR_BOTH: u16 = 40;

pub fn draw(dashboard: &Dashboard, look: &Look, frame: &mut Frame) -> Hits {
    let area = frame.area();
    let mut hits = Hits::default();
    let mut pen = Pen { buffer: frame.buffer_mut(), look };
    if area.width < MIN_COLUMNS || area.height < MIN_ROWS {
        head::draw_smallest(dashboard, &mut pen, area);
    } else {
        let (top, rest) = split_off(area, head::height(dashboard, area));
        head::draw(dashboard, &mut pen, top);
        let needed = if dashboard.view().open.is_some() { MIN_ROWS_FOR_BOTH } else { MIN_ROWS_FOR_TIMELINE };
        let lanes = if area.height >= needed { timeline::height(dashboard, area) } else { 0 };
        let (time, rest) = split_off(rest, lanes);
        timeline::draw(dashboard, &mut pen, time, &mut hits);
        let (tabs, rest) = split_off(rest, 1);
        draw_tabs(dashboard, &mut pen, tabs, &mut hits);
        let (body, foot) = split_off(rest, rest.height - 1);
        draw_body(dashboard, &mut pen, body, &mut hits);
        head::draw_foot(dashboard, &mut pen, foot);
        if dashboard.view().help {
            help::draw(&mut pen, area);
        }
    }
    pen.keep_columns_apart();
    hits
}

fn split_off(area: Rect, rows: u16) -> (Rect, Rect) {
    let rows = rows.min(area.height);
    let top = Rect { height: rows, ..area };
    (top, Rect { y: area.y + rows, height: area.height - rows, ..area })
}

fn draw_tabs(dashboard: &Dashboard, pen: &mut Pen, area: Rect, hits: &mut Hits) {
    let mut x = area.x;
    let view = dashboard.view();
    for (number, tab) in (1..).zip(Tab::ALL) {
        let notices = dashboard.picture().notice_count;
        let count = if tab == Tab::Notices && notices > 0 { format!(" ({notices})") } else { String::new() };
        let title = format!(" {number} {}{count} ", tab.title());
        let is_current = tab == view.tab;
        let style = if is_current { pen.look.selected().add_modifier(Modifier::BOLD) } else { pen.look.dim() };
        let used = pen.text((x, area.y), area.right() - x, &title, style);
        hits.tabs.push((Rect { x, width: used, ..area }, tab));
        x = (x + used + 1).min(area.right());
    }
    let right = list::title(dashboard, pen.look);
    if x + 4 < area.right() {
        pen.right((x, area.y), area.right() - x, &right, pen.look.strong());
    }
}

fn draw_body(dashboard: &Dashboard, pen: &mut Pen, area: Rect, hits: &mut Hits) {
    if dashboard.view().open.is_some() {
        detail::draw_open(dashboard, pen, area, hits);
    } else if dashboard.view().tab == Tab::Flame {
        flame::draw(dashboard, pen, area, hits);
    } else if area.width >= MIN_COLUMNS_FOR_TWO && dashboard.view().tab != Tab::Notices {
        let list = Rect { width: area.width * 11 / 20, ..area };
        let beside = Rect { x: list.right() + 1, width: area.right() - list.right() - 1, ..area };
        list::draw(dashboard, pen, list, hits);
        for y in area.top()..area.bottom() {
            pen.text((list.right(), y), 1, pen.look.either("│", "|"), pen.look.dim());
        }
        detail::draw_beside(dashboard, pen, beside);
    } else {
        list::draw(dashboard, pen, area, hits);
    }
}
