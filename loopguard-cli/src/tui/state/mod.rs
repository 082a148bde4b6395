//! What the live screen shows: all that was seen, and where the person at the keyboard is in it. No clock, no
//! terminal, no files: time comes with the calls, and what only the system can do is asked for.

mod cause;
mod durations;
mod flame;
mod input;
mod picture;
mod ranking;
mod rows;
#[cfg(test)]
pub mod scripted;
mod seen;
mod timeline;
mod view;

use std::collections::VecDeque;
use std::sync::Arc;

pub use cause::Cause;
pub use flame::{Flame, Node};
pub use picture::{Picture, Recent, Target};
pub use ranking::{Row, WaitLabel};
pub use rows::{Item, Key, Order, Scope};
pub use seen::Seen;
pub use timeline::{Lane, Peak, ZOOMS_NS};
pub use view::{Hits, LaneHit, ListHit, Tab, View};

use crate::core::incident::Update;
use crate::core::status::Status;

/// Source excerpts that are kept.
const MAX_SOURCES: usize = 16;
/// The tree of stacks is built anew at most this often while blocks arrive.
const FLAME_EVERY_NS: u64 = 1_000_000_000;

#[derive(Clone, Debug, Default)]
pub struct Dashboard {
    live: Picture,
    /// What is shown while paused.
    frozen: Option<Box<Picture>>,
    view: View,
    now_ns: u64,
    flame: BuiltFlame,
    sources: VecDeque<(SourceAt, Source)>,
}

/// A tree of stacks, and of what it was built.
#[derive(Clone, Debug, Default)]
struct BuiltFlame {
    flame: Flame,
    of: Option<(Option<Scope>, u64)>,
    at_ns: u64,
}

/// What the screen asks the system for.
#[derive(Clone, Debug, PartialEq)]
pub enum Ask {
    Leave,
    /// Write these blocks to a file, oldest first.
    Export(Vec<Arc<Seen>>),
}

/// A line of a source file, as its process names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceAt {
    pub pid: u32,
    pub file: String,
    pub line: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    Lines {
        /// With their numbers.
        lines: Vec<(u32, String)>,
        /// The file is newer than the process: what runs may be another text.
        is_newer: bool,
    },
    /// Why there is none.
    Unreadable(String),
}

impl Dashboard {
    pub fn update(&mut self, update: &Update) {
        self.live.update(update);
    }

    pub fn status(&mut self, status: &Status) {
        self.live.status(status);
        self.now_ns = self.now_ns.max(status.now_ns);
    }

    pub fn found(&mut self, target: Target) {
        self.live.found(target);
    }

    /// For the person at the terminal: kept in a list, the newest in the last row.
    pub fn notice(&mut self, text: &str) {
        self.live.notice(text);
        self.view.say(text);
    }

    /// The time that is shown; call it before drawing.
    pub fn at(&mut self, now_ns: u64) {
        self.now_ns = self.now_ns.max(now_ns);
        if self.view.tab == Tab::Flame {
            self.build_flame();
        }
    }

    fn build_flame(&mut self) {
        let picture = self.picture();
        let of = (self.view.scope.clone(), picture.blocks);
        let same_scope = self.flame.of.as_ref().is_some_and(|built| built.0 == of.0);
        let is_fresh = self.flame.of.as_ref() == Some(&of)
            || same_scope && self.now_ns < self.flame.at_ns + FLAME_EVERY_NS && self.flame.at_ns > 0;
        if !is_fresh {
            let flame = Flame::of(self.in_scope().map(|recent| &*recent.block));
            self.flame = BuiltFlame { flame, of: Some(of), at_ns: self.now_ns };
        }
    }

    /// What the last drawing put where.
    pub fn drawn(&mut self, hits: Hits) {
        self.view.hits = hits;
    }

    pub fn exported(&mut self, told: &str) {
        self.view.say(told);
    }

    /// The source line that is on the screen and not known yet.
    pub fn wanted_source(&self) -> Option<SourceAt> {
        let block = self.looked_at()?;
        let at = block.user_line()?;
        let wanted = SourceAt {
            pid: block.on().pid,
            file: at.frame.file.as_deref()?.to_owned(),
            line: at.frame.line.filter(|line| *line > 0)?,
        };
        self.source(&wanted).is_none().then_some(wanted)
    }

    pub fn source_read(&mut self, at: SourceAt, source: Source) {
        self.sources.retain(|(known, _)| *known != at);
        if self.sources.len() == MAX_SOURCES {
            self.sources.pop_front();
        }
        self.sources.push_back((at, source));
    }

    pub fn source(&self, at: &SourceAt) -> Option<&Source> {
        self.sources.iter().find(|(known, _)| known == at).map(|(_, source)| source)
    }

    /// What is shown: now, or what was there when it was paused.
    pub fn picture(&self) -> &Picture {
        self.frozen.as_deref().unwrap_or(&self.live)
    }

    /// Blocks that came since it was paused; `None`: it is not.
    pub fn paused(&self) -> Option<u64> {
        self.frozen.as_ref().map(|frozen| self.live.blocks - frozen.blocks)
    }

    /// What goes on now, also while paused.
    pub fn live(&self) -> &Picture {
        &self.live
    }

    pub fn view(&self) -> &View {
        &self.view
    }

    pub fn flame(&self) -> &Flame {
        &self.flame.flame
    }

    pub fn now_ns(&self) -> u64 {
        self.now_ns
    }

    /// Whether the screen changes by the passing of time alone.
    pub fn is_moving(&self) -> bool {
        !self.live.ongoing.is_empty()
    }
}
