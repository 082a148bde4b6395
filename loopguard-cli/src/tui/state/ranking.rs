//! Turns incidents into tables: how often and how long each route, line or awaited thing blocked, in bounded memory.

use std::collections::HashMap;
use std::hash::Hash;

use super::durations::Durations;
use crate::core::incident::WaitTotal;
use crate::core::summary::{LineLabel, MAX_LABELS, RouteLabel};

/// One row of a table.
#[derive(Clone, Debug, Default)]
pub struct Row {
    pub blocks: u64,
    pub total_ns: u64,
    pub longest_ns: u64,
    /// What others were delayed by it, all of them together, at most.
    pub victims_ns: u64,
    durations: Durations,
}

/// What a block adds to its rows.
#[derive(Clone, Copy, Debug, Default)]
pub struct Held {
    pub ns: u64,
    pub victims_ns: u64,
}

/// What a column is sorted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SortBy {
    Blocks,
    Total,
    Longest,
    P99,
    Victims,
    Name,
}

/// What a row is about.
pub trait Label: Clone + Eq + Hash + Ord {
    /// Stands for all that came when the table was full.
    fn other() -> Self;
}

/// A table without an order of its own.
#[derive(Clone, Debug)]
pub struct Ranking<L> {
    rows: HashMap<L, Row>,
}

/// What a block waited on.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum WaitLabel {
    On { syscall: String, on: Option<String> },
    Other,
}

impl Row {
    pub fn p99_ns(&self) -> u64 {
        self.durations.quantile(0.99).min(self.longest_ns)
    }

    fn add(&mut self, Held { ns, victims_ns }: Held) {
        self.blocks += 1;
        self.victims_ns = self.victims_ns.saturating_add(victims_ns);
        self.total_ns = self.total_ns.saturating_add(ns);
        self.longest_ns = self.longest_ns.max(ns);
        self.durations.add(ns);
    }

    fn key(&self, by: SortBy) -> u64 {
        match by {
            SortBy::Blocks => self.blocks,
            SortBy::Total => self.total_ns,
            SortBy::Longest => self.longest_ns,
            SortBy::P99 => self.p99_ns(),
            SortBy::Victims => self.victims_ns,
            SortBy::Name => 0,
        }
    }
}

impl<L: Label> Ranking<L> {
    pub fn add(&mut self, label: L, held: Held) {
        let has_room = self.rows.len() < MAX_LABELS || self.rows.contains_key(&label);
        self.rows.entry(if has_room { label } else { L::other() }).or_default().add(held);
    }

    /// Largest first, and by name where that is equal.
    pub fn sorted(&self, by: SortBy) -> Vec<(&L, &Row)> {
        let mut rows: Vec<_> = self.rows.iter().map(|(label, row)| (row.key(by), label, row)).collect();
        rows.sort_by(|(a_key, a, _), (b_key, b, _)| b_key.cmp(a_key).then_with(|| a.cmp(b)));
        rows.into_iter().map(|(_, label, row)| (label, row)).collect()
    }

    pub fn len(&self) -> usize {
        self.rows.len()
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Whether there is a row of this name; what has none is part of [`Label::other`].
    pub fn contains(&self, label: &L) -> bool {
        self.rows.contains_key(label)
    }
}

impl<L> Default for Ranking<L> {
    fn default() -> Self {
        Self { rows: HashMap::new() }
    }
}

impl WaitLabel {
    pub fn of(wait: &WaitTotal) -> Self {
        Self::On { syscall: wait.syscall.clone(), on: wait.on.clone() }
    }
}

impl Label for RouteLabel {
    fn other() -> Self {
        Self::Other
    }
}

impl Label for LineLabel {
    fn other() -> Self {
        Self::Other
    }
}

impl Label for WaitLabel {
    fn other() -> Self {
        Self::Other
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(name: &str) -> RouteLabel {
        RouteLabel::Route { method: None, route: name.to_owned() }
    }

    #[test]
    fn every_column_sorts() {
        let mut table = Ranking::default();
        for (name, durations) in [("a", &[10, 10, 10][..]), ("b", &[50]), ("c", &[15, 15, 15, 15]), ("d", &[50])] {
            durations.iter().for_each(|&ns| table.add(route(name), Held { ns, victims_ns: 100 / ns }));
        }
        let order = |by| {
            let rows = table.sorted(by).into_iter();
            rows.map(|(label, _)| match label {
                RouteLabel::Route { route, .. } => route.as_str(),
                _ => "?",
            })
            .collect::<String>()
        };
        assert_eq!(order(SortBy::Blocks), "cabd");
        assert_eq!(order(SortBy::Total), "cbda");
        assert_eq!(order(SortBy::Longest), "bdca");
        assert_eq!(order(SortBy::P99), "bdca");
        assert_eq!(order(SortBy::Victims), "acbd");
        assert_eq!(order(SortBy::Name), "abcd");
    }

    #[test]
    fn labels_are_capped_and_nothing_is_lost() {
        let mut table = Ranking::default();
        for index in 0..100_000 {
            table.add(route(&format!("/{index}")), Held::default());
        }
        assert_eq!(table.len(), MAX_LABELS + 1);
        assert_eq!(table.sorted(SortBy::Blocks)[0].0, &RouteLabel::Other);
        assert_eq!(table.sorted(SortBy::Name).iter().map(|(_, row)| row.blocks).sum::<u64>(), 100_000);
    }
}
