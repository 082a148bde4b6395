//! Turns the picture and the view into the rows of a list: filtered, sorted, one of them selected.

use std::sync::Arc;

use super::flame::runs_through;
use super::picture::Recent;
use super::ranking::{Label, Ranking, Row, SortBy, WaitLabel};
use super::seen::Seen;
use super::view::Tab;
use super::{Dashboard, Picture};
use crate::core::event::{Frame, Owner};
use crate::core::incident::Blame;
use crate::core::summary::{LineLabel, RouteLabel, line_label, route_label};

/// By which a row is found again when others come and go.
#[derive(Clone, Debug, PartialEq)]
pub enum Key {
    Block(u64),
    Route(RouteLabel),
    Line(LineLabel),
    Wait(WaitLabel),
    Notice(u64),
}

/// A part of all blocks.
#[derive(Clone, Debug, PartialEq)]
pub enum Scope {
    Route(RouteLabel),
    Line(LineLabel),
    Wait(WaitLabel),
    /// Stacks that run through these frames, outermost first.
    Frames(Vec<Arc<Frame>>),
}

/// A row of a list.
#[derive(Clone, Copy, Debug)]
pub enum Item<'a> {
    Block(&'a Recent),
    Route(&'a RouteLabel, &'a Row),
    Line(&'a LineLabel, &'a Row),
    Wait(&'a WaitLabel, &'a Row),
    Notice(u64, &'a str),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    Newest,
    Blocks,
    Total,
    Longest,
    P99,
    Victims,
    Name,
}

impl Order {
    pub fn of(tab: Tab) -> &'static [Self] {
        match tab {
            Tab::Recent => &[Self::Newest, Self::Longest],
            Tab::Routes | Tab::Lines | Tab::Waits => {
                &[Self::Total, Self::Longest, Self::P99, Self::Victims, Self::Blocks, Self::Name]
            }
            Tab::Flame => &[Self::Total],
            Tab::Notices => &[Self::Newest],
        }
    }

    fn sort_by(self) -> SortBy {
        match self {
            Self::Blocks => SortBy::Blocks,
            Self::Longest => SortBy::Longest,
            Self::P99 => SortBy::P99,
            Self::Victims => SortBy::Victims,
            Self::Name => SortBy::Name,
            Self::Total | Self::Newest => SortBy::Total,
        }
    }
}

impl Item<'_> {
    pub fn key(&self) -> Key {
        match *self {
            Self::Block(recent) => Key::Block(recent.number),
            Self::Route(label, _) => Key::Route(label.clone()),
            Self::Line(label, _) => Key::Line(label.clone()),
            Self::Wait(label, _) => Key::Wait(label.clone()),
            Self::Notice(number, _) => Key::Notice(number),
        }
    }

    fn is(&self, key: &Key) -> bool {
        match (self, key) {
            (Self::Block(recent), Key::Block(number)) => recent.number == *number,
            (Self::Route(label, _), Key::Route(key)) => *label == key,
            (Self::Line(label, _), Key::Line(key)) => *label == key,
            (Self::Wait(label, _), Key::Wait(key)) => *label == key,
            (Self::Notice(number, _), Key::Notice(key)) => number == key,
            _ => false,
        }
    }

    /// The blocks that the row stands for.
    pub fn scope(&self) -> Option<Scope> {
        match *self {
            Self::Route(label, _) => Some(Scope::Route(label.clone())),
            Self::Line(label, _) => Some(Scope::Line(label.clone())),
            Self::Wait(label, _) => Some(Scope::Wait(label.clone())),
            Self::Block(_) | Self::Notice(..) => None,
        }
    }

    /// Whether a text, in small letters, occurs in it.
    fn contains(&self, needle: &str) -> bool {
        let has = |text: &str| text.to_lowercase().contains(needle);
        match *self {
            Self::Block(recent) => in_block(&recent.block, &has),
            Self::Route(RouteLabel::Route { method, route }, _) => {
                has(&format!("{} {route}", method.as_deref().unwrap_or_default()))
            }
            Self::Route(RouteLabel::NoRequest, _) => has("(no request)"),
            Self::Route(RouteLabel::Unknown, _) => has("(request unknown)"),
            Self::Line(LineLabel::Line { file, line, function, called }, _) => {
                let (file, line) = (file.as_deref().unwrap_or_default(), line.unwrap_or_default());
                has(&format!("{file}:{line} {function} {}", called.as_deref().unwrap_or_default()))
            }
            Self::Line(LineLabel::NoUserCode, _) => has("(no user code on the stack)"),
            Self::Wait(WaitLabel::On { syscall, on }, _) => {
                has(&format!("{syscall} on {}", on.as_deref().unwrap_or_default()))
            }
            Self::Route(RouteLabel::Other, _) | Self::Line(LineLabel::Other, _) | Self::Wait(WaitLabel::Other, _) => {
                has("(other)")
            }
            Self::Notice(_, text) => has(text),
        }
    }
}

fn in_block(block: &Seen, has: &dyn Fn(&str) -> bool) -> bool {
    let Blame { owner, stack, .. } = block.blame();
    let in_owner = match owner {
        Owner::Request { request, .. } => {
            let method = request.method.as_deref().unwrap_or_default();
            has(&format!("{method} {}", request.path))
                || has(&request.id)
                || [&request.route, &request.client, &request.trace_id].into_iter().flatten().any(|text| has(text))
        }
        Owner::NoRequest { task } => has("no request") || task.as_deref().is_some_and(has),
        Owner::Task { task } => has("no request") || has(task),
        Owner::Unknown(why) => has("request unknown") || has(why),
    };
    in_owner
        || stack.frames.iter().any(|frame| {
            let (file, line) = (frame.file.as_deref().unwrap_or_default(), frame.line.unwrap_or_default());
            has(&frame.function) || has(&format!("{file}:{line}"))
        })
        || block.waits().iter().any(|wait| has(&wait.syscall) || wait.on.as_deref().is_some_and(has))
        || has(&block.on().thread)
        || block.victims().is_some_and(|victims| victims.requests.iter().any(|request| has(&request.path)))
}

impl Scope {
    fn holds(&self, block: &Seen, picture: &Picture) -> bool {
        match self {
            Self::Route(label) => is_counted_as(&route_label(&block.blame().owner), label, &picture.routes),
            Self::Line(label) => is_counted_as(&line_label(block.blame()), label, &picture.lines),
            Self::Wait(label) => {
                block.waits().iter().any(|wait| is_counted_as(&WaitLabel::of(wait), label, &picture.waits))
            }
            Self::Frames(path) => runs_through(block, path),
        }
    }
}

/// What has no row of its own is part of `other`.
fn is_counted_as<L: Label>(own: &L, label: &L, table: &Ranking<L>) -> bool {
    own == label || (*label == L::other() && !table.contains(own))
}

impl Dashboard {
    /// The rows of the current list.
    pub fn rows(&self) -> Vec<Item<'_>> {
        let (picture, view) = (self.picture(), self.view());
        let by = view.order().sort_by();
        let mut rows: Vec<Item> = match view.tab {
            Tab::Recent => {
                let mut blocks: Vec<_> = self.in_scope().map(Item::Block).collect();
                blocks.reverse();
                if view.order() == Order::Longest {
                    blocks.sort_by_key(|item| match item {
                        Item::Block(recent) => std::cmp::Reverse(recent.block.blocked_ns()),
                        _ => std::cmp::Reverse(0),
                    });
                }
                blocks
            }
            Tab::Routes => picture.routes.sorted(by).into_iter().map(|(label, row)| Item::Route(label, row)).collect(),
            Tab::Lines => picture.lines.sorted(by).into_iter().map(|(label, row)| Item::Line(label, row)).collect(),
            Tab::Waits => picture.waits.sorted(by).into_iter().map(|(label, row)| Item::Wait(label, row)).collect(),
            Tab::Flame => Vec::new(),
            Tab::Notices => {
                let numbers = (1..=picture.notice_count).rev();
                numbers.zip(picture.notices.iter().rev()).map(|(number, text)| Item::Notice(number, text)).collect()
            }
        };
        if !view.search.text.is_empty() {
            let needle = view.search.text.to_lowercase();
            rows.retain(|item| item.contains(&needle));
        }
        if view.list().is_reversed {
            rows.reverse();
        }
        rows
    }

    /// Which of the rows is selected.
    pub fn selected(&self, rows: &[Item]) -> usize {
        let list = self.view().list();
        let at = match &list.selected {
            Some(key) => rows.iter().position(|item| item.is(key)).unwrap_or(list.index),
            None => 0,
        };
        at.min(rows.len().saturating_sub(1))
    }

    /// Blocks of the scope, oldest first.
    pub fn in_scope(&self) -> impl DoubleEndedIterator<Item = &Recent> {
        self.in_scope_of(self.view().scope.as_ref())
    }

    fn in_scope_of<'a>(&'a self, scope: Option<&'a Scope>) -> impl DoubleEndedIterator<Item = &'a Recent> {
        let picture = self.picture();
        let holds = move |recent: &&Recent| scope.is_none_or(|scope| scope.holds(&recent.block, picture));
        picture.recent.iter().filter(holds)
    }

    /// The block whose details are on the screen: the open one, or the newest that the selected row stands for.
    pub fn looked_at(&self) -> Option<&Arc<Seen>> {
        if let Some(number) = self.view().open {
            return self.picture().block(number);
        }
        let rows = self.rows();
        match rows.get(self.selected(&rows))? {
            Item::Block(recent) => Some(&recent.block),
            item => {
                let scope = item.scope()?;
                let newest =
                    self.picture().recent.iter().rev().find(|recent| scope.holds(&recent.block, self.picture()));
                newest.map(|recent| &recent.block)
            }
        }
    }

    /// All blocks that the selection stands for, oldest first.
    pub fn selection(&self) -> Vec<Arc<Seen>> {
        let of = |recent: &Recent| Arc::clone(&recent.block);
        if let Some(number) = self.view().open {
            return self.picture().block(number).into_iter().cloned().collect();
        }
        if self.view().tab == Tab::Flame {
            let path = &self.view().flame.selected;
            return self.in_scope().filter(|recent| runs_through(&recent.block, path)).map(of).collect();
        }
        let rows = self.rows();
        match rows.get(self.selected(&rows)) {
            Some(Item::Block(recent)) => vec![of(recent)],
            Some(item) => match item.scope() {
                Some(scope) => self.in_scope_of(Some(&scope)).map(of).collect(),
                None => Vec::new(),
            },
            None => Vec::new(),
        }
    }
}
