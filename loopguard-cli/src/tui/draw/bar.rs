//! Turns the parts of a block into one bar that adds up.

use ratatui::style::Style;

use super::pen::{Pen, Piece};
use super::words;
use crate::core::incident::Split;
use crate::sink::text::span;
use crate::tui::state::Cause;

struct Part {
    ns: u64,
    name: &'static str,
    cause: Cause,
    /// Tells it apart where there is no colour.
    letter: &'static str,
}

fn parts(split: &Split) -> [Part; 4] {
    [
        Part { ns: split.on_cpu_ns, name: "on CPU", cause: Cause::Code, letter: "#" },
        Part { ns: split.waiting_ns, name: "waiting", cause: Cause::Wait, letter: "w" },
        Part { ns: split.gil_ns, name: "for the GIL", cause: Cause::Gil, letter: "g" },
        Part { ns: split.run_queue_ns, name: "for a CPU", cause: Cause::Host, letter: "." },
    ]
}

pub fn bar(split: &Split, columns: u16, pen: &Pen) -> Vec<Piece> {
    let parts = parts(split);
    let widths = widths(parts.each_ref().map(|part| part.ns), columns);
    let glyph = |part: &Part| match (pen.look.is_plain(), pen.look.is_ascii()) {
        (false, false) => "█",
        _ => part.letter,
    };
    parts
        .iter()
        .zip(widths)
        .map(|(part, width)| (glyph(part).repeat(width.into()), pen.look.cause(part.cause)))
        .collect()
}

/// The bar's parts in words, and their sum.
pub fn sum(split: &Split, pen: &Pen) -> Vec<Piece> {
    let parts = parts(split);
    let total: u64 = parts.iter().map(|part| part.ns).sum();
    let mut pieces: Vec<Piece> = Vec::new();
    for part in parts.iter().filter(|part| part.ns > 0) {
        if !pieces.is_empty() {
            pieces.push((" + ".to_owned(), pen.look.dim()));
        }
        let share = words::percent(part.ns as f64 / total as f64);
        let letter =
            if pen.look.is_plain() || pen.look.is_ascii() { format!("{} ", part.letter) } else { String::new() };
        pieces.push((format!("{letter}{} {}", span(part.ns), part.name), pen.look.cause(part.cause)));
        pieces.push((format!(" ({share})"), pen.look.dim()));
    }
    pieces.push((format!(" = {}", span(total)), Style::new()));
    pieces
}

/// Columns of each part: they add up to all columns, and a part that is there has one at least.
fn widths(parts: [u64; 4], columns: u16) -> [u16; 4] {
    let total: u128 = parts.iter().map(|&part| u128::from(part)).sum();
    if total == 0 {
        return [0; 4];
    }
    let ideal = parts.map(|part| (u128::from(part) * u128::from(columns) / total) as u16);
    let mut widths = [0, 1, 2, 3].map(|at| ideal[at].max(u16::from(parts[at] > 0)));
    // What rounding left over, or took too much, is the largest part's.
    let largest = (0..4).max_by_key(|&at| parts[at]).unwrap_or(0);
    let others: u16 = widths.iter().sum::<u16>() - widths[largest];
    widths[largest] = columns.saturating_sub(others);
    widths
}

#[cfg(test)]
mod tests {
    use super::widths;

    #[test]
    fn a_bar_adds_up() {
        for parts in [[1, 0, 0, 0], [1, 1, 1, 1], [1, 1_000_000, 1, 1], [7, 11, 13, 17], [u64::MAX; 4], [0, 3, 0, 1]] {
            for columns in 4..200 {
                let widths = widths(parts, columns);
                assert_eq!(widths.iter().sum::<u16>(), columns, "{parts:?}");
                assert!(
                    parts.iter().zip(widths).all(|(&part, width)| (part > 0) == (width > 0)),
                    "{parts:?} {widths:?}"
                );
            }
        }
        assert_eq!(widths([0; 4], 10), [0; 4]);
        assert_eq!(widths([50, 25, 25, 0], 8), [4, 2, 2, 0]);
    }
}
