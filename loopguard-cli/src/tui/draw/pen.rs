//! Puts text of any origin into the cells it may use and no others.

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::style::Style;
use unicode_width::UnicodeWidthChar as _;

use super::look::Look;
use crate::sink::escape::{MAX_CHARS, is_dangerous, printable};

/// Marks that are put on one letter; more make a smear over the rows around it.
const MAX_MARKS: usize = 2;

/// Everything that reaches the screen goes through here, so nothing of the target gets there as it is.
pub struct Pen<'a> {
    pub buffer: &'a mut Buffer,
    pub look: &'a Look,
}

/// A piece of a line.
pub type Piece = (String, Style);

impl Pen<'_> {
    /// Writes into one row, at most `width` columns; a text that is cut ends in an ellipsis. Returns the columns used.
    pub fn text(&mut self, (x, y): (u16, u16), width: u16, text: &str, style: Style) -> u16 {
        let area = self.buffer.area;
        if y < area.top() || y >= area.bottom() || x < area.left() || x >= area.right() {
            return 0;
        }
        let width = width.min(area.right() - x);
        let text = fitted(text, width, self.look);
        let (end, _) = self.buffer.set_stringn(x, y, text, usize::from(width), style);
        end - x
    }

    /// The same, at the right end of the columns.
    pub fn right(&mut self, (x, y): (u16, u16), width: u16, text: &str, style: Style) {
        let text = fitted(text, width, self.look);
        let used = columns(&text).min(width);
        self.text((x + width - used, y), used, &text, style);
    }

    /// Pieces one after the other.
    pub fn line(&mut self, (x, y): (u16, u16), width: u16, pieces: &[Piece]) -> u16 {
        let mut used = 0;
        for (text, style) in pieces {
            if used >= width {
                break;
            }
            used += self.text((x + used, y), width - used, text, *style);
        }
        used
    }

    pub fn fill(&mut self, area: Rect, style: Style) {
        self.buffer.set_style(area.intersection(self.buffer.area), style);
    }

    /// A terminal that writes from right to left where such letters stand would also move the digits and blanks beside
    /// them, over the columns' bounds. A mark after each run of such letters keeps it in its own cells (Unicode Annex
    /// 9: LRM).
    pub fn keep_columns_apart(&mut self) {
        let area = self.buffer.area;
        for y in area.top()..area.bottom() {
            let mut run_ends = None;
            for x in area.left()..area.right() {
                if self.buffer[(x, y)].symbol().chars().next().is_some_and(is_right_to_left) {
                    run_ends = Some(x);
                } else if let Some(x) = run_ends.take() {
                    self.end_right_to_left((x, y));
                }
            }
            if let Some(x) = run_ends {
                self.end_right_to_left((x, y));
            }
        }
    }

    fn end_right_to_left(&mut self, at: (u16, u16)) {
        let marked = format!("{}\u{200e}", self.buffer[at].symbol());
        self.buffer[at].set_symbol(&marked);
    }
}

/// Hebrew, Arabic and the scripts beside them in Unicode.
fn is_right_to_left(char: char) -> bool {
    matches!(char,
        '\u{590}'..='\u{8ff}' | '\u{fb1d}'..='\u{fdff}' | '\u{fe70}'..='\u{fefe}'
        | '\u{10800}'..='\u{10fff}' | '\u{1e800}'..='\u{1efff}')
}

/// The columns that a text takes at most.
pub fn columns(text: &str) -> u16 {
    text.chars().map(|char| char.width().unwrap_or(0) as u16).fold(0, u16::saturating_add)
}

/// Harmless, and no wider than asked for.
fn fitted(text: &str, width: u16, look: &Look) -> String {
    // The usual case: nothing to be escaped, and a byte is a column.
    if text.len() <= usize::from(width) && text.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
        return text.to_owned();
    }
    let ellipsis = look.either("…", "~");
    let (mut shown, mut used, mut fits) = (String::new(), 0, 0);
    // Where the text would be cut.
    for piece in safe_pieces(text, look.is_ascii()) {
        used += columns(&piece);
        if used > width {
            shown.truncate(fits);
            return shown + ellipsis;
        }
        shown += &piece;
        if used < width {
            fits = shown.len();
        }
    }
    shown
}

/// Each piece is a character, a mark on the one before it, or an escaped character.
fn safe_pieces(text: &str, is_ascii: bool) -> impl Iterator<Item = String> {
    let mut marks = 0;
    let is_longer = text.char_indices().nth(MAX_CHARS).is_some();
    let pieces = text.chars().take(MAX_CHARS).filter_map(move |char| {
        if is_dangerous(char) || has_no_width(char) || (is_ascii && !char.is_ascii()) {
            return Some(escaped(char));
        }
        match char.width() {
            Some(0) | None => {
                marks += 1;
                // What makes a sign narrow or wide is understood differently by every terminal.
                let selects = matches!(char, '\u{fe00}'..='\u{fe0f}' | '\u{e0000}'..='\u{e0fff}');
                (marks <= MAX_MARKS && !selects).then(|| char.to_string())
            }
            Some(_) => {
                marks = 0;
                Some(char.to_string())
            }
        }
    });
    let end = if is_ascii { "~" } else { "…" };
    pieces.chain(is_longer.then(|| end.to_owned()))
}

/// Private use and what is no character: every font makes its own of it, in a width of its own.
fn has_no_width(char: char) -> bool {
    let is_private = matches!(char, '\u{e000}'..='\u{f8ff}' | '\u{f0000}'..);
    is_private || matches!(char, '\u{fdd0}'..='\u{fdef}') || u32::from(char) & 0xfffe == 0xfffe
}

fn escaped(char: char) -> String {
    if is_dangerous(char) {
        printable(char.encode_utf8(&mut [0; 4])).to_string()
    } else {
        char.escape_unicode().to_string()
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use proptest::prelude::*;
    use unicode_width::UnicodeWidthStr as _;

    use super::super::look::{Colours, Glyphs};
    use super::*;
    use crate::sink::text::Times;

    fn look(glyphs: Glyphs) -> Look {
        let times = Times::SinceStart { start_ns: 0 };
        Look { glyphs, colours: Colours::None, times, current_dir: None::<PathBuf> }
    }

    #[track_caller]
    fn check(text: &str, width: u16, unicode: &str, ascii: &str) {
        let shown = [Glyphs::Unicode, Glyphs::Ascii].map(|glyphs| fitted(text, width, &look(glyphs)));
        assert_eq!(shown, [unicode, ascii]);
    }

    #[test]
    fn text_is_cut_to_its_columns() {
        check("GET /items", 10, "GET /items", "GET /items");
        check("GET /items/7", 10, "GET /item…", "GET /item~");
        check("x", 0, "…", "~");
        check("漢字かな", 8, "漢字かな", "~");
        check("漢字かな", 6, "漢字…", "~");
        check("a漢字かな", 7, "a漢字…", "a~");
        check("a漢字かな", 20, "a漢字かな", "a\\u{6f22}\\u{5b57}~");
    }

    #[test]
    fn what_a_terminal_would_obey_is_escaped() {
        check("a\x1b[2J\tb", 20, "a\\x1b[2J\\x09b", "a\\x1b[2J\\x09b");
        check("\u{202e}b", 20, "\\u{202e}b", "\\u{202e}b");
        check("e\u{301}\u{301}\u{301}\u{301}", 20, "e\u{301}\u{301}", "e\\u{301}\\u{301}~");
    }

    #[test]
    fn a_run_from_right_to_left_is_ended() {
        let mut buffer = Buffer::empty(Rect::new(0, 0, 12, 1));
        let look = look(Glyphs::Unicode);
        let mut pen = Pen { buffer: &mut buffer, look: &look };
        pen.text((0, 0), 12, "a שלו/ם 12", Style::new());
        pen.keep_columns_apart();
        let row: String = buffer.content.iter().map(|cell| cell.symbol()).collect();
        assert_eq!(row, "a שלו\u{200e}/ם\u{200e} 12  ");
    }

    proptest! {
        #[test]
        fn no_text_leaves_its_columns_or_speaks_to_the_terminal(text in "\\PC*|.*|[\u{0}-\u{10ffff}]*", width in 0..60u16) {
            for glyphs in [Glyphs::Unicode, Glyphs::Ascii] {
                let shown = fitted(&text, width, &look(glyphs));
                prop_assert!(!shown.chars().any(is_dangerous));
                prop_assert!(glyphs == Glyphs::Unicode || shown.is_ascii());
                prop_assert!(shown.width() <= usize::from(width.max(1)), "{:?}", shown);
                let mut buffer = Buffer::empty(Rect::new(0, 0, 70, 3));
                let look = look(glyphs);
                let mut pen = Pen { buffer: &mut buffer, look: &look };
                pen.text((5, 1), width, &text, Style::new());
                pen.keep_columns_apart();
                for (at, cell) in buffer.content.iter().enumerate() {
                    let inside = (75..75 + usize::from(width)).contains(&at);
                    prop_assert!(inside || cell.symbol() == " ", "{} {:?}", at, cell);
                }
            }
        }
    }
}
