//! A block as the screen lists it: a single one, or many short steps that added up.

use std::sync::Arc;

use super::cause::Cause;
use crate::core::event::LoopInfo;
use crate::core::incident::{Blame, Cumulative, Incident, Split, Update, UserLine, Verdict, Victims, WaitTotal};

#[derive(Clone, Debug, PartialEq)]
pub enum Seen {
    Single(Incident),
    Cumulative(Cumulative),
}

impl Seen {
    pub fn on(&self) -> &Arc<LoopInfo> {
        match self {
            Self::Single(block) => &block.on,
            Self::Cumulative(block) => &block.on,
        }
    }

    pub fn start_ns(&self) -> u64 {
        match self {
            Self::Single(block) => block.start_ns,
            Self::Cumulative(block) => block.start_ns,
        }
    }

    pub fn end_ns(&self) -> u64 {
        match self {
            Self::Single(block) => block.end_ns,
            Self::Cumulative(block) => block.end_ns,
        }
    }

    /// How long the loop was held: of short steps their sum, not the time in which they happened.
    pub fn blocked_ns(&self) -> u64 {
        match self {
            Self::Single(block) => block.duration_ns(),
            Self::Cumulative(block) => block.total_ns,
        }
    }

    pub fn split(&self) -> &Split {
        match self {
            Self::Single(block) => &block.split,
            Self::Cumulative(block) => &block.split,
        }
    }

    pub fn verdict(&self) -> Verdict {
        self.split().verdict()
    }

    pub fn cause(&self) -> Cause {
        Cause::of(self.split())
    }

    pub fn blame(&self) -> &Blame {
        match self {
            Self::Single(block) => &block.blame,
            Self::Cumulative(block) => &block.blame,
        }
    }

    pub fn user_line(&self) -> Option<UserLine<'_>> {
        self.blame().user_line()
    }

    pub fn waits(&self) -> &[WaitTotal] {
        match self {
            Self::Single(block) => &block.waits,
            Self::Cumulative(block) => &block.waits,
        }
    }

    pub fn victims(&self) -> Option<&Victims> {
        match self {
            Self::Single(block) => block.victims.as_ref(),
            Self::Cumulative(_) => None,
        }
    }

    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Single(block) => block.hint,
            Self::Cumulative(block) => block.hint,
        }
    }

    /// As a sink takes it.
    pub fn update(&self) -> Update {
        match self {
            Self::Single(block) => Update::Block(block.clone()),
            Self::Cumulative(block) => Update::Cumulative(block.clone()),
        }
    }
}
