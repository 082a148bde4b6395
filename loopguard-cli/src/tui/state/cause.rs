//! Turns where a block's time went into the one word its colour stands for.

use crate::core::incident::{Split, Verdict};

/// What most of a block's time was, as the screen tells blocks apart: the verdict, with code that ran and code that
/// waited set apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Cause {
    /// The code ran.
    Code,
    /// The code waited for something it asked for.
    Wait,
    /// Another thread held the interpreter lock.
    Gil,
    /// The machine gave it no CPU.
    Host,
    Unknown,
}

impl Cause {
    pub const ALL: [Self; 5] = [Self::Code, Self::Wait, Self::Gil, Self::Host, Self::Unknown];

    pub fn of(split: &Split) -> Self {
        match split.verdict() {
            Verdict::Code if split.waiting_ns > split.on_cpu_ns => Self::Wait,
            Verdict::Code => Self::Code,
            Verdict::Gil => Self::Gil,
            Verdict::Host => Self::Host,
            Verdict::Unknown => Self::Unknown,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Code => "code",
            Self::Wait => "wait",
            Self::Gil => "gil",
            Self::Host => "host",
            Self::Unknown => "unclear",
        }
    }
}
