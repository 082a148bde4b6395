//! Turns the tree of stacks into boxes: one below the other as they call, as wide as they held the loop.

use ratatui::layout::Rect;
use ratatui::style::Modifier;

use super::pen::Pen;
use super::words;
use crate::core::event::{Frame, Origin};
use crate::sink::text::span;
use crate::tui::state::{Dashboard, Flame, Hits};

/// Rows above the boxes: what is selected.
const HEAD: u16 = 2;

struct Canvas<'a, 'b> {
    flame: &'a Flame,
    selected: usize,
    /// Depth of the first row.
    above: u16,
    area: Rect,
    pen: &'a mut Pen<'b>,
    hits: &'a mut Hits,
    needle: String,
}

pub fn draw(dashboard: &Dashboard, pen: &mut Pen, area: Rect, hits: &mut Hits) {
    let flame = dashboard.flame();
    if flame.total_ns() == 0 || area.height <= HEAD {
        pen.text((area.x + 1, area.y), area.width - 1, "no block so far", pen.look.dim());
        return;
    }
    let view = &dashboard.view().flame;
    let selected = flame.find(&view.selected);
    let zoomed = flame.find(&view.zoomed);
    draw_head(flame, selected, pen, area);
    let area = Rect { y: area.y + HEAD, height: area.height - HEAD, ..area };
    // The selected box is on the screen, with what it calls below.
    let depth = (flame.path(selected).len() as u16).saturating_sub(flame.path(zoomed).len() as u16);
    let above = (depth + area.height / 3).saturating_sub(area.height - 1).min(depth);
    let needle = dashboard.view().search.text.to_lowercase();
    let mut canvas = Canvas { flame, selected, above, area, pen, hits, needle };
    canvas.draw(zoomed, 0, (area.x, area.width));
}

fn draw_head(flame: &Flame, selected: usize, pen: &mut Pen, area: Rect) {
    let Some(node) = flame.node(selected) else { return };
    let share = words::percent(node.ns as f64 / flame.total_ns() as f64);
    let name = name(node.frame.as_deref(), pen);
    let own_ns =
        node.ns - node.children.iter().filter_map(|&child| flame.node(child)).map(|child| child.ns).sum::<u64>();
    let own = if own_ns > 0 { format!(", {} in itself", span(own_ns)) } else { String::new() };
    let text = format!("{name}: blocked {} of {} ({share}){own}", span(node.ns), span(flame.total_ns()));
    pen.text((area.x, area.y), area.width, &text, pen.look.strong());
    let about = "blocking time of the kept blocks, each on the stack of most of it; callers above what they call";
    pen.text((area.x, area.y + 1), area.width, about, pen.look.dim());
}

fn name(frame: Option<&Frame>, pen: &Pen) -> String {
    frame.map_or_else(|| "all blocks".to_owned(), |frame| words::frame(frame, pen.look))
}

impl Canvas<'_, '_> {
    fn draw(&mut self, at: usize, depth: u16, (x, width): (u16, u16)) {
        let Some(node) = self.flame.node(at) else { return };
        if width == 0 || depth >= self.above + self.area.height {
            return;
        }
        if depth >= self.above {
            let place = Rect { x, y: self.area.y + depth - self.above, width, height: 1 };
            self.draw_box(at, place);
        }
        let mut before_ns = 0;
        for &child in &node.children {
            let Some(ns) = self.flame.node(child).map(|child| child.ns) else { continue };
            // Both edges are rounded alike, so that boxes side by side never overlap.
            let edge = |ns: u64| (u128::from(ns) * u128::from(width) / u128::from(node.ns.max(1))) as u16;
            let (from, to) = (edge(before_ns), edge(before_ns + ns));
            self.draw(child, depth + 1, (x + from, to - from));
            before_ns += ns;
        }
    }

    fn draw_box(&mut self, at: usize, place: Rect) {
        let Some(node) = self.flame.node(at) else { return };
        let look = self.pen.look;
        let frame = node.frame.as_deref();
        let mut style = look.flame(frame.map_or(Origin::Runtime, |frame| frame.origin));
        if at == self.selected {
            style = style.add_modifier(Modifier::REVERSED | Modifier::BOLD);
        }
        let text = match frame {
            None => format!("all blocks {}", span(node.ns)),
            Some(frame) => {
                let line = words::file_and_line(frame).filter(|_| frame.origin == Origin::User);
                let is_hit =
                    !self.needle.is_empty() && name(Some(frame), self.pen).to_lowercase().contains(&self.needle);
                if is_hit {
                    style = style.add_modifier(Modifier::UNDERLINED);
                }
                let line = line.map(|line| format!(" {line}")).unwrap_or_default();
                format!("{}{}{line}", if is_hit { "*" } else { "" }, frame.function)
            }
        };
        // A gap, or a bar where there is no colour, tells neighbours apart.
        let gap = u16::from(place.width > 2);
        let start = if look.is_plain() { "|" } else { "" };
        let inside = Rect { width: place.width - gap, ..place };
        let blank = " ".repeat(inside.width.into());
        self.pen.text((inside.x, inside.y), inside.width, &blank, style);
        self.pen.text((inside.x, inside.y), inside.width, &format!("{start}{text}"), style);
        self.hits.flame.push((place, at));
    }
}
