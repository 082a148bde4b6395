//! Turns the rows of the current list into columns.

use ratatui::layout::Rect;
use ratatui::style::{Modifier, Style};

use super::look::Look;
use super::pen::Pen;
use super::words;
use crate::sink::text::{route, span};
use crate::tui::state::{Dashboard, Hits, Item, ListHit, Order, Row, Seen, Tab};

const TIME: u16 = 12;
const FIGURE: u16 = 8;
const CAUSE: u16 = 7;
/// The columns of a table of figures, in the order of the screen.
const FIGURES: [(Order, &str); 5] = [
    (Order::Blocks, "blocks"),
    (Order::Total, "total"),
    (Order::Longest, "longest"),
    (Order::P99, "p99"),
    (Order::Victims, "victims"),
];

/// What is shown, of which part, and in which order.
pub fn title(dashboard: &Dashboard, look: &Look) -> String {
    let view = dashboard.view();
    let mut parts = Vec::new();
    if !view.search.text.is_empty() && !view.search.is_typing {
        parts.push(format!("/{}", view.search.text));
    }
    if let Some(scope) = view.scope.as_ref().filter(|_| matches!(view.tab, Tab::Recent | Tab::Flame)) {
        parts.push(format!("of {}", words::scope(scope, look)));
    }
    parts.join("  ")
}

pub fn draw(dashboard: &Dashboard, pen: &mut Pen, area: Rect, hits: &mut Hits) {
    if area.height < 2 {
        return;
    }
    draw_header(dashboard, pen, area);
    let rows = dashboard.rows();
    let body = Rect { y: area.y + 1, height: area.height - 1, ..area };
    if rows.is_empty() {
        pen.text((body.x + 1, body.y), body.width - 1, nothing(dashboard), pen.look.dim());
        return;
    }
    let selected = dashboard.selected(&rows);
    let first = first_row(dashboard, selected, (rows.len(), body.height.into()));
    for (y, (index, item)) in (body.top()..body.bottom()).zip(rows.iter().enumerate().skip(first)) {
        let row = Rect { y, height: 1, ..body };
        match item {
            Item::Block(recent) => draw_block(&recent.block, pen, row),
            Item::Route(label, figures) => draw_figures(figures, &route(label), pen, row),
            Item::Line(label, figures) => draw_figures(figures, &words::line(label, pen.look), pen, row),
            Item::Wait(label, figures) => draw_figures(figures, &words::wait(label), pen, row),
            Item::Notice(_, text) => {
                pen.text((row.x, row.y), row.width, text, Style::new());
            }
        }
        if index == selected {
            pen.fill(row, pen.look.selected());
        }
    }
    hits.list = Some(ListHit { area: body, first });
}

/// As it was, unless the selected row would not be seen.
fn first_row(dashboard: &Dashboard, selected: usize, (rows, height): (usize, usize)) -> usize {
    let before = dashboard.view().hits.list.map_or(0, |list| list.first);
    let lowest = (selected + 1).saturating_sub(height);
    before.clamp(lowest, selected).min(rows.saturating_sub(height).max(lowest))
}

fn nothing(dashboard: &Dashboard) -> &'static str {
    let view = dashboard.view();
    if !view.search.text.is_empty() {
        "nothing matches the search (Esc: clear it)"
    } else if view.tab == Tab::Notices {
        "nothing to tell"
    } else if view.scope.is_some() {
        "its blocks are no longer kept one by one (Esc: all blocks)"
    } else {
        "no block so far"
    }
}

fn draw_header(dashboard: &Dashboard, pen: &mut Pen, area: Rect) {
    let style = pen.look.dim().add_modifier(Modifier::UNDERLINED);
    pen.fill(Rect { height: 1, ..area }, style);
    let view = dashboard.view();
    let arrow = match view.list().is_reversed {
        false => pen.look.either("▼", "v"),
        true => pen.look.either("▲", "^"),
    };
    let by = |order: Order, name: &str| {
        if view.order() == order && Order::of(view.tab).len() > 1 { format!("{name}{arrow}") } else { name.to_owned() }
    };
    let (mut x, y) = (area.x, area.y);
    match view.tab {
        Tab::Recent => {
            pen.text((x, y), TIME, &by(Order::Newest, "time"), style);
            x += TIME;
            pen.right((x, y), FIGURE, &by(Order::Longest, "blocked"), style);
            x += FIGURE + 2;
            pen.text((x, y), CAUSE, "what", style);
            x += CAUSE + 1;
            let (request, line) = owner_and_line(area.right().saturating_sub(x));
            pen.text((x, y), request, "request", style);
            pen.text((x + request + 1, y), line, "line", style);
        }
        Tab::Notices => {
            pen.text((x, y), area.width, "what loopguard told", style);
        }
        _ => {
            for (order, name) in FIGURES {
                pen.right((x, y), FIGURE, &by(order, name), style);
                x += FIGURE + 1;
            }
            let name = match view.tab {
                Tab::Routes => "route",
                Tab::Lines => "line",
                _ => "waited in",
            };
            pen.text((x + 1, y), area.right().saturating_sub(x + 1), &by(Order::Name, name), style);
        }
    }
}

fn owner_and_line(columns: u16) -> (u16, u16) {
    let owner = columns * 9 / 20;
    (owner, columns.saturating_sub(owner + 1))
}

fn draw_block(block: &Seen, pen: &mut Pen, row: Rect) {
    let look = pen.look;
    let (mut x, y) = (row.x, row.y);
    pen.text((x, y), TIME, &look.times.show(block.start_ns()), look.dim());
    x += TIME;
    pen.right((x, y), FIGURE, &span(block.blocked_ns()).to_string(), look.strong());
    x += FIGURE + 2;
    let cause = block.cause();
    pen.text((x, y), CAUSE, cause.name(), look.cause(cause));
    x += CAUSE + 1;
    let (request, line) = owner_and_line(row.right().saturating_sub(x));
    pen.text((x, y), request, &words::seen(block), Style::new());
    let place = words::place_within(block.blame(), line, look);
    pen.text((x + request + 1, y), line, &place, Style::new());
}

fn draw_figures(figures: &Row, name: &str, pen: &mut Pen, row: Rect) {
    let (mut x, y) = (row.x, row.y);
    let times =
        [figures.total_ns, figures.longest_ns, figures.p99_ns(), figures.victims_ns].map(|ns| span(ns).to_string());
    for text in [figures.blocks.to_string()].into_iter().chain(times) {
        pen.right((x, y), FIGURE, &text, Style::new());
        x += FIGURE + 1;
    }
    pen.text((x + 1, y), row.right().saturating_sub(x + 1), name, pen.look.strong());
}
