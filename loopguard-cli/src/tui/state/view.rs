//! Where the person at the keyboard is: the tab, the selection, what was searched for, how far it was scrolled.

use std::sync::Arc;

use ratatui::layout::Rect;

use super::rows::{Key, Order, Scope};
use crate::core::event::Frame;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tab {
    #[default]
    Recent,
    Routes,
    Lines,
    Waits,
    Flame,
    Notices,
}

#[derive(Clone, Debug, Default)]
pub struct View {
    pub tab: Tab,
    pub help: bool,
    pub search: Search,
    /// Only blocks of this are listed and drawn as a flame.
    pub scope: Option<Scope>,
    /// Where `Esc` leads back to from the scope.
    pub came_from: Option<Tab>,
    /// The block whose details fill the screen.
    pub open: Option<u64>,
    pub scrolled: u16,
    /// Frames that are not the user's are listed one by one.
    pub unfolded: bool,
    pub time: TimeWindow,
    pub flame: FlameView,
    /// Shown in the last row until a key is pressed.
    pub message: Option<String>,
    pub hits: Hits,
    lists: [ListView; 6],
}

#[derive(Clone, Debug, Default)]
pub struct Search {
    pub text: String,
    pub is_typing: bool,
}

#[derive(Clone, Debug, Default)]
pub struct ListView {
    /// `None`: whatever is first.
    pub selected: Option<Key>,
    /// Where the selection was last, for when it is gone.
    pub index: usize,
    pub order: usize,
    pub is_reversed: bool,
}

/// The part of the timeline that is shown.
#[derive(Clone, Debug)]
pub struct TimeWindow {
    /// Index into the zoom steps.
    pub zoom: usize,
    /// Its end; `None`: now.
    pub until_ns: Option<u64>,
}

impl Default for TimeWindow {
    /// A column a second: the last minute or minutes.
    fn default() -> Self {
        Self { zoom: 1, until_ns: None }
    }
}

#[derive(Clone, Debug, Default)]
pub struct FlameView {
    /// Frames from the outermost one to the selected one.
    pub selected: Vec<Arc<Frame>>,
    /// The frame that fills the width.
    pub zoomed: Vec<Arc<Frame>>,
}

/// What the last drawing put where, for the mouse and for paging.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Hits {
    pub tabs: Vec<(Rect, Tab)>,
    pub list: Option<ListHit>,
    /// A line of the timeline: its place, its thread, and the span of time from its first to its last column.
    pub lanes: Vec<LaneHit>,
    pub flame: Vec<(Rect, usize)>,
    /// Rows that details have beyond the screen.
    pub scrollable: u16,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ListHit {
    pub area: Rect,
    /// Index of the row that is drawn first.
    pub first: usize,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LaneHit {
    pub area: Rect,
    pub tid: u32,
    pub from_ns: u64,
    pub column_ns: u64,
}

impl Tab {
    pub const ALL: [Self; 6] = [Self::Recent, Self::Routes, Self::Lines, Self::Waits, Self::Flame, Self::Notices];

    pub fn title(self) -> &'static str {
        match self {
            Self::Recent => "Blocks",
            Self::Routes => "Routes",
            Self::Lines => "Lines",
            Self::Waits => "Waits",
            Self::Flame => "Flame",
            Self::Notices => "Notices",
        }
    }

    pub fn neighbour(self, step: isize) -> Self {
        let at = Self::ALL.iter().position(|tab| *tab == self).unwrap_or(0) as isize + step;
        Self::ALL[at.rem_euclid(Self::ALL.len() as isize) as usize]
    }
}

impl View {
    pub fn list(&self) -> &ListView {
        &self.lists[self.tab as usize]
    }

    pub fn list_mut(&mut self) -> &mut ListView {
        &mut self.lists[self.tab as usize]
    }

    pub fn order(&self) -> Order {
        let orders = Order::of(self.tab);
        orders[self.list().order % orders.len()]
    }

    pub fn say(&mut self, text: &str) {
        self.message = Some(text.to_owned());
    }
}
