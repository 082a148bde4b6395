//! Turns strings of the target, which are hostile, into text that is safe to print.

use std::fmt::{self, Display, Write};

/// Characters of one string that text output shows; the rest becomes `…`.
pub const MAX_CHARS: usize = 160;

/// Shows at most [`MAX_CHARS`] characters, with [dangerous](is_dangerous) ones escaped.
pub fn printable(text: &str) -> Escaped<'_> {
    Escaped { text, must_escape: is_dangerous }
}

/// [`printable`], and spaces escaped too: for what stands in a line of several words and must not forge its neighbours.
pub fn word(text: &str) -> Escaped<'_> {
    Escaped { text, must_escape: |char| char.is_whitespace() || is_dangerous(char) }
}

pub struct Escaped<'a> {
    text: &'a str,
    must_escape: fn(char) -> bool,
}

impl Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shown, char) in self.text.chars().enumerate() {
            if shown == MAX_CHARS {
                return f.write_char('…');
            }
            if !(self.must_escape)(char) {
                f.write_char(char)?;
            } else if char.is_ascii() {
                write!(f, "\\x{:02x}", u32::from(char))?;
            } else {
                write!(f, "\\u{{{:x}}}", u32::from(char))?;
            }
        }
        Ok(())
    }
}

/// An error's text without the numbers that the system's own end in: `(os error 2)` tells a person nothing.
pub fn plain(text: &str) -> String {
    let mut parts = text.split(" (os error ");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |text, part| text + part.split_once(')').map_or(part, |(_, rest)| rest))
}

/// Whether a terminal or an editor may act on the character instead of showing it: controls (C0, C1, DEL), line and
/// paragraph separators, and what turns the direction of writing or hides.
pub fn is_dangerous(char: char) -> bool {
    char.is_control()
        || matches!(char,
            '\u{61c}'
            | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2066}'..='\u{2069}'
            | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_numbers_are_left_out() {
        assert_eq!(plain("open x: No such file (os error 2): too bad"), "open x: No such file: too bad");
        assert_eq!(plain("nothing (to) see"), "nothing (to) see");
    }

    fn check(text: &str, expected: &str) {
        assert_eq!(printable(text).to_string(), expected);
    }

    #[test]
    fn ordinary_text_stays() {
        check("/items/7?q=ü 漢字 🦀", "/items/7?q=ü 漢字 🦀");
    }

    #[test]
    fn what_a_terminal_would_obey_is_escaped() {
        check("\x1b[2J\x07\r\n\t\0\x7f", r"\x1b[2J\x07\x0d\x0a\x09\x00\x7f");
        check("\u{9b}31m", r"\u{9b}31m");
        check("a\u{202e}b\u{2066}c\u{2069}d\u{2028}e\u{200b}f", r"a\u{202e}b\u{2066}c\u{2069}d\u{2028}e\u{200b}f");
    }

    #[test]
    fn a_word_is_one_word() {
        assert_eq!(word("/a (route /b)\u{a0}id=1").to_string(), r"/a\x20(route\x20/b)\u{a0}id=1");
    }

    #[test]
    fn long_text_is_cut() {
        let shown = printable(&"ü".repeat(1_000_000)).to_string();
        assert_eq!(shown.chars().count(), MAX_CHARS + 1);
        assert!(shown.ends_with('…'));
        check(&"x".repeat(MAX_CHARS), &"x".repeat(MAX_CHARS));
    }
}
