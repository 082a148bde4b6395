//! Turns keys and clicks into where the person is next.

use crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers, MouseButton, MouseEvent, MouseEventKind};
use ratatui::layout::Position;

use super::flame::Flame;
use super::rows::{Item, Key, Order, Scope};
use super::seen::Seen;
use super::view::{LaneHit, ListHit, Tab};
use super::{Ask, Dashboard, ZOOMS_NS};

/// Letters of a search; more are ignored.
const MAX_SEARCH: usize = 100;
/// Rows that one turn of the wheel moves.
const WHEEL_ROWS: isize = 3;
/// Columns that one step moves the timeline.
const PAN_COLUMNS: u64 = 10;

impl Dashboard {
    pub fn key(&mut self, key: KeyEvent) -> Option<Ask> {
        if key.kind == KeyEventKind::Release {
            return None;
        }
        self.view.message = None;
        if key.modifiers.contains(KeyModifiers::CONTROL) {
            return self.control(key.code);
        }
        if self.view.search.is_typing {
            self.type_search(key.code);
            return None;
        }
        if self.view.help {
            self.view.help = false;
            return (key.code == KeyCode::Char('q')).then_some(Ask::Leave);
        }
        match key.code {
            KeyCode::Char('q') => return Some(Ask::Leave),
            KeyCode::Char('?') | KeyCode::F(1) => self.view.help = true,
            KeyCode::Char('p') => self.pause(),
            KeyCode::Char('/') => self.view.search.is_typing = true,
            KeyCode::Char('e') => return self.export(),
            KeyCode::Char('s') => self.sort(),
            KeyCode::Char('S') => self.view.list_mut().is_reversed ^= true,
            KeyCode::Char('f') => self.show_flame(),
            KeyCode::Char('b') => self.show_blocks(),
            KeyCode::Char('u') => self.view.unfolded ^= true,
            KeyCode::Char('+' | '=') => self.zoom(-1),
            KeyCode::Char('-' | '_') => self.zoom(1),
            KeyCode::Char(',' | '<') => self.pan(-1),
            KeyCode::Char('.' | '>') => self.pan(1),
            KeyCode::Char('0') => self.view.time.until_ns = None,
            KeyCode::Char(digit @ '1'..='6') => self.go_to(Tab::ALL[digit as usize - '1' as usize]),
            KeyCode::Tab => self.go_to(self.view.tab.neighbour(1)),
            KeyCode::BackTab => self.go_to(self.view.tab.neighbour(-1)),
            KeyCode::Enter => self.enter(),
            KeyCode::Esc | KeyCode::Backspace => self.back(),
            KeyCode::Up | KeyCode::Char('k') => self.step(-1),
            KeyCode::Down | KeyCode::Char('j') => self.step(1),
            KeyCode::Left | KeyCode::Char('h') => self.aside(-1),
            KeyCode::Right | KeyCode::Char('l') => self.aside(1),
            KeyCode::PageUp => self.step(-self.page()),
            KeyCode::PageDown => self.step(self.page()),
            KeyCode::Home | KeyCode::Char('g') => self.step(isize::MIN),
            KeyCode::End | KeyCode::Char('G') => self.step(isize::MAX),
            _ => {}
        }
        None
    }

    fn control(&mut self, code: KeyCode) -> Option<Ask> {
        match code {
            KeyCode::Char('c') => return Some(Ask::Leave),
            KeyCode::Char('d' | 'f') => self.step(self.page()),
            KeyCode::Char('u' | 'b') => self.step(-self.page()),
            KeyCode::Char('n') => self.step(1),
            KeyCode::Char('p') => self.step(-1),
            _ => {}
        }
        None
    }

    fn type_search(&mut self, code: KeyCode) {
        let search = &mut self.view.search;
        match code {
            KeyCode::Enter => search.is_typing = false,
            KeyCode::Esc => *search = Default::default(),
            KeyCode::Backspace if search.text.pop().is_none() => search.is_typing = false,
            KeyCode::Char(char) if search.text.chars().count() < MAX_SEARCH => search.text.push(char),
            _ => {}
        }
    }

    fn pause(&mut self) {
        self.frozen = match self.frozen {
            None => Some(Box::new(self.live.clone())),
            Some(_) => None,
        };
    }

    fn export(&mut self) -> Option<Ask> {
        let blocks = self.selection();
        if blocks.is_empty() {
            self.view.say("nothing selected that could be exported");
            return None;
        }
        Some(Ask::Export(blocks))
    }

    fn sort(&mut self) {
        let orders = Order::of(self.view.tab).len();
        let list = self.view.list_mut();
        list.order = (list.order + 1) % orders;
        list.selected = None;
    }

    fn go_to(&mut self, tab: Tab) {
        self.view.tab = tab;
        self.close();
    }

    fn close(&mut self) {
        self.view.open = None;
        self.view.scrolled = 0;
    }

    /// From a row of a table to its blocks, from a block to its details, from a frame into it.
    fn enter(&mut self) {
        if self.view.open.is_some() {
            return;
        }
        if self.view.tab == Tab::Flame {
            self.view.flame.zoomed = self.view.flame.selected.clone();
            return;
        }
        let rows = self.rows();
        let Some(item) = rows.get(self.selected(&rows)) else { return };
        let key = item.key();
        match item.scope() {
            Some(scope) => self.narrow(scope, Tab::Recent),
            None => {
                if let Key::Block(number) = key {
                    self.view.list_mut().selected = Some(key);
                    self.view.open = Some(number);
                    self.view.scrolled = 0;
                }
            }
        }
    }

    fn narrow(&mut self, scope: Scope, to: Tab) {
        self.view.came_from = Some(self.view.tab);
        self.view.scope = Some(scope);
        // What was searched for has been found.
        self.view.search = Default::default();
        self.go_to(to);
        *self.view.list_mut() = Default::default();
        self.view.flame = Default::default();
    }

    /// Undoes the last of: details, zoom, search, scope.
    fn back(&mut self) {
        if self.view.open.is_some() {
            self.close();
        } else if self.view.tab == Tab::Flame && !self.view.flame.zoomed.is_empty() {
            self.view.flame.zoomed.clear();
        } else if !self.view.search.text.is_empty() {
            self.view.search = Default::default();
        } else if self.view.scope.take().is_some() {
            self.view.flame = Default::default();
            if let Some(tab) = self.view.came_from.take() {
                self.go_to(tab);
            }
        } else {
            self.view.time = Default::default();
        }
    }

    /// The flame of what is selected.
    fn show_flame(&mut self) {
        let rows = self.rows();
        let scope = rows.get(self.selected(&rows)).and_then(Item::scope);
        match scope {
            Some(scope) if self.view.open.is_none() => self.narrow(scope, Tab::Flame),
            _ => self.go_to(Tab::Flame),
        }
    }

    /// The blocks below the selected frame of the flame.
    fn show_blocks(&mut self) {
        if self.view.tab == Tab::Flame && !self.view.flame.selected.is_empty() {
            self.narrow(Scope::Frames(self.view.flame.selected.clone()), Tab::Recent);
        }
    }

    fn step(&mut self, rows: isize) {
        if self.view.open.is_some() {
            let scrolled = (self.view.scrolled as isize).saturating_add(rows);
            self.view.scrolled = scrolled.clamp(0, self.view.hits.scrollable as isize) as u16;
        } else if self.view.tab == Tab::Flame {
            self.step_in_flame(rows);
        } else {
            let rows_now = self.rows();
            let at = self.selected(&rows_now).saturating_add_signed(rows).min(rows_now.len().saturating_sub(1));
            let key = rows_now.get(at).map(Item::key);
            self.select(at, key);
        }
    }

    fn select(&mut self, index: usize, key: Option<Key>) {
        let list = self.view.list_mut();
        // The first row stays the first: the newest block, the worst route.
        list.selected = key.filter(|_| index > 0);
        list.index = index;
    }

    fn step_in_flame(&mut self, rows: isize) {
        self.build_flame();
        let flame = &self.flame.flame;
        let mut at = flame.find(&self.view.flame.selected);
        for _ in 0..rows.unsigned_abs().min(256) {
            let Some(node) = flame.node(at) else { break };
            match rows.signum() {
                1 => match node.children.first() {
                    Some(&heaviest) => at = heaviest,
                    None => break,
                },
                _ => at = node.parent,
            }
        }
        self.view.flame.selected = flame.path(at);
    }

    fn aside(&mut self, step: isize) {
        if self.view.open.is_some() {
            self.open_neighbour(step);
        } else if self.view.tab == Tab::Flame {
            let flame = &self.flame.flame;
            let at = flame.find(&self.view.flame.selected);
            if let Some(siblings) = flame.node(at).and_then(|node| flame.node(node.parent)).map(|node| &node.children)
                && let Some(place) = siblings.iter().position(|child| *child == at)
                && let Some(&next) = place.checked_add_signed(step).and_then(|next| siblings.get(next))
            {
                self.view.flame.selected = flame.path(next);
            }
        } else {
            self.pan(step);
        }
    }

    /// The details of the row before or after the one whose details are shown.
    fn open_neighbour(&mut self, step: isize) {
        let rows = self.rows();
        let Some(number) = self.view.open else { return };
        let is_it = |item: &Item| matches!(item, Item::Block(recent) if recent.number == number);
        let Some(at) = rows.iter().position(is_it) else { return };
        let Some(next) = at.checked_add_signed(step) else { return };
        if let Some(Item::Block(recent)) = rows.get(next) {
            let number = recent.number;
            self.select(next, Some(Key::Block(number)));
            self.view.open = Some(number);
            self.view.scrolled = 0;
        }
    }

    fn zoom(&mut self, step: isize) {
        let zoom = self.view.time.zoom.saturating_add_signed(step);
        self.view.time.zoom = zoom.min(ZOOMS_NS.len() - 1);
    }

    fn pan(&mut self, step: isize) {
        let now_ns = self.now_ns;
        let by_ns = ZOOMS_NS[self.view.time.zoom] * PAN_COLUMNS;
        let until_ns = self.view.time.until_ns.unwrap_or(now_ns);
        let until_ns = if step < 0 { until_ns.saturating_sub(by_ns) } else { until_ns.saturating_add(by_ns) };
        self.view.time.until_ns = Some(until_ns).filter(|until_ns| *until_ns < now_ns);
    }

    fn page(&self) -> isize {
        self.view.hits.list.map_or(10, |list| (list.area.height as isize).max(2) - 1)
    }

    pub fn mouse(&mut self, mouse: MouseEvent) {
        let at = Position::new(mouse.column, mouse.row);
        match mouse.kind {
            MouseEventKind::ScrollUp if self.is_on_timeline(at) => self.zoom(-1),
            MouseEventKind::ScrollDown if self.is_on_timeline(at) => self.zoom(1),
            MouseEventKind::ScrollUp => self.step(-WHEEL_ROWS),
            MouseEventKind::ScrollDown => self.step(WHEEL_ROWS),
            MouseEventKind::Down(MouseButton::Left) => {
                self.view.message = None;
                self.click(at);
            }
            _ => {}
        }
    }

    fn is_on_timeline(&self, at: Position) -> bool {
        self.view.hits.lanes.iter().any(|lane| lane.area.contains(at))
    }

    /// A click selects; on what is selected already it opens.
    fn click(&mut self, at: Position) {
        self.view.help = false;
        let hits = &self.view.hits;
        if let Some(&(_, tab)) = hits.tabs.iter().find(|(area, _)| area.contains(at)) {
            self.go_to(tab);
        } else if let Some(&lane) = hits.lanes.iter().find(|lane| lane.area.contains(at)) {
            self.open_at(lane, at.x);
        } else if let Some(list) = hits.list.filter(|list| list.area.contains(at)) {
            self.click_row(list, at.y);
        } else if let Some(&(_, node)) = hits.flame.iter().find(|(area, _)| area.contains(at)) {
            let path = self.flame.flame.path(node);
            if path == self.view.flame.selected && node != Flame::ROOT {
                self.enter();
            } else {
                self.view.flame.selected = path;
            }
        }
    }

    fn click_row(&mut self, list: ListHit, y: u16) {
        let rows = self.rows();
        let index = list.first + usize::from(y - list.area.y);
        let Some(key) = rows.get(index).map(Item::key) else { return };
        if self.selected(&rows) == index {
            self.enter();
        } else {
            self.select(index, Some(key));
        }
    }

    /// The longest block of a thread in the column of the timeline that was clicked.
    fn open_at(&mut self, lane: LaneHit, x: u16) {
        let from_ns = lane.from_ns + u64::from(x - lane.area.x) * lane.column_ns;
        let to_ns = from_ns + lane.column_ns;
        let touches =
            |block: &Seen| block.on().tid == lane.tid && block.start_ns() < to_ns && block.end_ns() >= from_ns;
        let there = self.picture().recent.iter().filter(|recent| touches(&recent.block));
        let Some(number) = there.max_by_key(|recent| recent.block.blocked_ns()).map(|recent| recent.number) else {
            return;
        };
        self.view.tab = Tab::Recent;
        self.view.list_mut().selected = Some(Key::Block(number));
        self.view.open = Some(number);
        self.view.scrolled = 0;
    }
}
