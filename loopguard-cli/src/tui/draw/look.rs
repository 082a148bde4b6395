//! How the screen looks: which characters it may use, and which colours tell things apart on any background.

use std::path::PathBuf;

use ratatui::style::{Color, Modifier, Style};

use super::super::state::Cause;
use crate::core::event::Origin;
use crate::sink::text::Times;

/// Decided by the caller.
#[derive(Clone, Debug)]
pub struct Look {
    pub glyphs: Glyphs,
    pub colours: Colours,
    pub times: Times,
    /// Files below it are shown relative to it.
    pub current_dir: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Glyphs {
    Unicode,
    Ascii,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colours {
    None,
    /// The eight that every colour terminal has.
    Basic,
    /// The 256 of xterm.
    Indexed,
}

/// Each is readable on black and on white.
mod indexed {
    pub const ORANGE: u8 = 166;
    pub const BLUE: u8 = 32;
    pub const PURPLE: u8 = 133;
    pub const GREEN: u8 = 29;
    pub const GREY: u8 = 243;
    pub const RED: u8 = 160;
    pub const WHITE: u8 = 231;
    #[cfg(test)]
    pub const ON_ANY_BACKGROUND: [u8; 6] = [ORANGE, BLUE, PURPLE, GREEN, GREY, RED];
}

impl Look {
    pub fn is_ascii(&self) -> bool {
        self.glyphs == Glyphs::Ascii
    }

    pub fn is_plain(&self) -> bool {
        self.colours == Colours::None
    }

    /// One of two spellings.
    pub fn either<T>(&self, unicode: T, ascii: T) -> T {
        if self.is_ascii() { ascii } else { unicode }
    }

    pub fn cause(&self, cause: Cause) -> Style {
        let (basic, index) = match cause {
            Cause::Code => (Color::Yellow, indexed::ORANGE),
            Cause::Wait => (Color::Blue, indexed::BLUE),
            Cause::Gil => (Color::Magenta, indexed::PURPLE),
            Cause::Host => (Color::Green, indexed::GREEN),
            Cause::Unknown => (Color::Reset, indexed::GREY),
        };
        self.coloured(basic, index)
    }

    /// A block that goes on.
    pub fn alarm(&self) -> Style {
        self.coloured(Color::Red, indexed::RED).add_modifier(Modifier::BOLD)
    }

    /// The row that says so.
    pub fn banner(&self) -> Style {
        match self.colours {
            Colours::None => Style::new().add_modifier(Modifier::REVERSED | Modifier::BOLD),
            Colours::Basic => Style::new().fg(Color::Red).add_modifier(Modifier::REVERSED | Modifier::BOLD),
            Colours::Indexed => {
                let (white, red) = (Color::Indexed(indexed::WHITE), Color::Indexed(indexed::RED));
                Style::new().fg(white).bg(red).add_modifier(Modifier::BOLD)
            }
        }
    }

    pub fn strong(&self) -> Style {
        Style::new().add_modifier(Modifier::BOLD)
    }

    pub fn dim(&self) -> Style {
        match self.colours {
            Colours::Indexed => Style::new().fg(Color::Indexed(indexed::GREY)),
            Colours::Basic | Colours::None => Style::new().add_modifier(Modifier::DIM),
        }
    }

    pub fn selected(&self) -> Style {
        Style::new().add_modifier(Modifier::REVERSED)
    }

    /// The user's own code stands out.
    pub fn code(&self, origin: Origin) -> Style {
        match origin {
            Origin::User => self.strong(),
            Origin::Library | Origin::Runtime | Origin::Kernel => self.dim(),
        }
    }

    /// A box of the flame.
    pub fn flame(&self, origin: Origin) -> Style {
        let style = match origin {
            Origin::User => self.coloured(Color::Yellow, indexed::ORANGE).add_modifier(Modifier::BOLD),
            Origin::Library => self.coloured(Color::Blue, indexed::BLUE),
            Origin::Runtime => self.coloured(Color::Reset, indexed::GREY),
            Origin::Kernel => self.coloured(Color::Magenta, indexed::PURPLE),
        };
        match self.colours {
            Colours::None => style,
            Colours::Basic => style.add_modifier(Modifier::REVERSED),
            // Not reversed: the text would be the background's, whatever that is.
            Colours::Indexed => Style { fg: Some(Color::Indexed(indexed::WHITE)), bg: style.fg, ..style },
        }
    }

    fn coloured(&self, basic: Color, index: u8) -> Style {
        match self.colours {
            Colours::None => Style::new(),
            Colours::Basic => Style::new().fg(basic),
            Colours::Indexed => Style::new().fg(Color::Indexed(index)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Relative luminance of a colour of xterm's cube or grey ramp (WCAG 2).
    fn luminance(index: u8) -> f64 {
        const STEPS: [u8; 6] = [0, 95, 135, 175, 215, 255];
        let rgb = match index {
            16..=231 => [(index - 16) / 36, (index - 16) / 6 % 6, (index - 16) % 6].map(|step| STEPS[step as usize]),
            232.. => [8 + (index - 232) * 10; 3],
            _ => panic!("differs by terminal"),
        };
        let [r, g, b] = rgb.map(|part| match f64::from(part) / 255.0 {
            low if low <= 0.04045 => low / 12.92,
            high => ((high + 0.055) / 1.055).powf(2.4),
        });
        0.2126 * r + 0.7152 * g + 0.0722 * b
    }

    /// At least 3 to 1, as WCAG asks of large text and of graphics.
    #[test]
    fn colours_stand_out_on_black_and_on_white() {
        for index in indexed::ON_ANY_BACKGROUND {
            let light = luminance(index);
            let (on_black, on_white) = ((light + 0.05) / 0.05, 1.05 / (light + 0.05));
            assert!(on_black >= 3.0 && on_white >= 3.0, "{index}: {on_black:.1} on black, {on_white:.1} on white");
        }
    }
}
