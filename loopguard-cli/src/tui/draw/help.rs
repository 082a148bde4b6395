//! The keys, in a box over everything else.

use ratatui::layout::Rect;
use ratatui::style::Style;

use super::pen::Pen;

const KEYS: [(&str, &str); 17] = [
    ("1..6  Tab  Shift-Tab", "lists: blocks, routes, lines, waits, flame, notices"),
    ("arrows  hjkl  PgUp/PgDn  g G", "move; left and right pan the timeline"),
    ("Enter", "a row's blocks, a block's details, into a frame"),
    ("Esc", "back, and out of search, zoom and selection"),
    ("/", "search (requests, lines, functions, waits)"),
    ("s  S", "sort by the next column, turn the order around"),
    ("f", "flame of the selected row's blocks"),
    ("b", "blocks below the selected frame of the flame"),
    ("u", "library frames of a stack: unfold, fold"),
    ("p", "pause the screen; what happens meanwhile is kept"),
    ("e", "write the selected blocks to a JSON file here"),
    ("+  -  ,  .  0", "timeline: zoom in, out, earlier, later, now"),
    ("mouse", "click selects, click again opens, wheel scrolls"),
    ("?", "this help"),
    ("q  Ctrl-C", "leave; the summary is printed afterwards"),
    ("", ""),
    ("colours", "code ran, code waited, GIL held, no CPU given"),
];
const KEY_COLUMNS: u16 = 30;

pub fn draw(pen: &mut Pen, screen: Rect) {
    let rows = (KEYS.len() as u16 + 2).min(screen.height);
    let columns = 84.min(screen.width);
    let area = Rect {
        x: screen.x + (screen.width - columns) / 2,
        y: screen.y + (screen.height - rows) / 2,
        width: columns,
        height: rows,
    };
    for y in area.top()..area.bottom() {
        for x in area.left()..area.right() {
            pen.buffer[(x, y)].reset();
        }
    }
    draw_border(pen, area);
    let key_columns = KEY_COLUMNS.min(area.width / 2);
    for (y, (keys, meaning)) in (area.top() + 1..area.bottom() - 1).zip(KEYS) {
        pen.text((area.x + 2, y), key_columns - 1, keys, pen.look.strong());
        let room = area.width.saturating_sub(key_columns + 4);
        pen.text((area.x + 2 + key_columns, y), room, meaning, Style::new());
    }
}

fn draw_border(pen: &mut Pen, area: Rect) {
    let [across, down, corners] =
        pen.look.either([["─"; 4], ["│"; 4], ["┌", "┐", "└", "┘"]], [["-"; 4], ["|"; 4], ["+"; 4]]);
    let style = pen.look.dim();
    let (left, right, top, bottom) = (area.left(), area.right() - 1, area.top(), area.bottom() - 1);
    for x in left..=right {
        pen.text((x, top), 1, across[0], style);
        pen.text((x, bottom), 1, across[0], style);
    }
    for y in top..=bottom {
        pen.text((left, y), 1, down[0], style);
        pen.text((right, y), 1, down[0], style);
    }
    for (at, corner) in [(left, top), (right, top), (left, bottom), (right, bottom)].into_iter().zip(corners) {
        pen.text(at, 1, corner, style);
    }
    pen.text((left + 2, top), area.width - 4, " keys (any key: close) ", pen.look.strong());
}
