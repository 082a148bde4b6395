//! Every view at three sizes, from scripted states; and that nothing hostile breaks out of its cells.

use std::sync::Arc;
use std::time::Duration;

use crossterm::event::{KeyCode, KeyEvent, KeyModifiers, MouseButton, MouseEvent, MouseEventKind};
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::buffer::Buffer;
use ratatui::style::Color;
use unicode_width::UnicodeWidthStr as _;

use super::draw;
use super::look::{Colours, Glyphs, Look};
use crate::core::incident::{ThresholdChange, Update};
use crate::sink::escape::is_dangerous;
use crate::sink::text::{Times, WallClock};
use crate::tui::state::scripted::{
    TID, block_at, hostile, many_steps, ms, ongoing_at, shop, status_at, thread, with_source,
};
use crate::tui::state::{Ask, Dashboard, Tab};

const SIZES: [(u16, u16); 3] = [(80, 24), (120, 40), (200, 60)];

fn look(glyphs: Glyphs, colours: Colours) -> Look {
    let clock = WallClock { monotonic_ns: 0, unix: Duration::from_secs(1_700_000_000), utc_offset_s: 0 };
    Look { glyphs, colours, times: Times::Local(clock), current_dir: Some("/srv/shop".into()) }
}

fn usual() -> Look {
    look(Glyphs::Unicode, Colours::Indexed)
}

fn screen(dashboard: &mut Dashboard, look: &Look, (columns, rows): (u16, u16)) -> Buffer {
    let mut terminal = Terminal::new(TestBackend::new(columns, rows)).unwrap();
    let mut hits = None;
    terminal.draw(|frame| hits = Some(draw(dashboard, look, frame))).unwrap();
    dashboard.drawn(hits.unwrap());
    terminal.backend().buffer().clone()
}

fn rows(buffer: &Buffer) -> Vec<String> {
    let columns = usize::from(buffer.area.width);
    let row = |cells: &[ratatui::buffer::Cell]| {
        let mut text = String::new();
        // The cell after a wide letter is covered by it.
        let mut covered = 0;
        for cell in cells {
            if covered == 0 {
                text += cell.symbol();
                covered = cell.symbol().width().max(1);
            }
            covered -= 1;
        }
        text
    };
    buffer.content.chunks(columns).map(row).collect()
}

fn press(dashboard: &mut Dashboard, keys: &str) -> Vec<Ask> {
    keys.chars()
        .filter_map(|key| {
            let code = match key {
                '\n' => KeyCode::Enter,
                '\t' => KeyCode::Tab,
                '\x1b' => KeyCode::Esc,
                key => KeyCode::Char(key),
            };
            let asked = dashboard.key(KeyEvent::new(code, KeyModifiers::NONE));
            dashboard.at(dashboard.now_ns());
            asked
        })
        .collect()
}

/// The screen at each size after some keys.
fn shown(build: impl Fn() -> Dashboard, keys: &str) -> String {
    let mut text = String::new();
    for size in SIZES {
        let mut dashboard = build();
        press(&mut dashboard, keys);
        let mut dashboard = with_source(dashboard);
        // Twice: where a list was scrolled to is known after the first.
        screen(&mut dashboard, &usual(), size);
        let buffer = screen(&mut dashboard, &usual(), size);
        let rows = rows(&buffer);
        text += &format!("{}x{}\n", size.0, size.1);
        for row in rows {
            assert_eq!(row.replace('\u{200e}', "").width(), usize::from(size.0), "{row:?}");
            text += &format!("|{}|\n", row.replace('\u{200e}', "<LRM>"));
        }
    }
    text
}

fn blocked() -> Dashboard {
    let mut dashboard = shop();
    let mut open = ongoing_at("POST /orders/25", ms(177_500)..ms(178_500));
    open.blame.stack = dashboard.live().recent[0].block.blame().stack.clone();
    dashboard.update(&Update::Ongoing(open));
    dashboard.at(ms(180_300));
    dashboard
}

fn adding_up() -> Dashboard {
    let mut dashboard = shop();
    let change = ThresholdChange { on: Arc::new(thread()), threshold_ns: ms(50), baseline_ns: ms(5) };
    dashboard.update(&Update::Threshold(change));
    dashboard.update(&Update::CumulativeOngoing(many_steps(ms(179_000)..ms(179_800))));
    dashboard
}

fn with_notices() -> Dashboard {
    let mut dashboard = shop();
    dashboard
        .notice("watching process 1234, thread 1235 (uvicorn): uvloop, CPython 3.12.1, exact steps; threshold 50 ms");
    dashboard.notice(
        "process 1234: steps cannot be marked (no such function); ticks with several owners are cut by captures",
    );
    dashboard
}

macro_rules! views {
    ($($name:ident: $build:expr, $keys:expr;)*) => {
        $(#[test]
        fn $name() {
            insta::assert_snapshot!(stringify!($name), shown($build, $keys));
        })*
    };
}

views! {
    blocks: shop, "jj";
    routes: shop, "2";
    lines: shop, "3s";
    waits: shop, "4";
    flame: shop, "5jjjjjj";
    flame_of_a_route: shop, "2f";
    notices: with_notices, "6";
    details: shop, "j\n";
    details_of_many_steps: shop, "/feed\n\n";
    short_steps_adding_up: adding_up, "";
    details_unfolded: shop, "/charge\n\nu";
    blocks_of_a_route: shop, "2j\n";
    searching: shop, "/items";
    nothing_found: shop, "/nonsense\n";
    help: shop, "?";
    a_block_going_on: blocked, "";
    paused: shop, "p";
    nothing_yet: Dashboard::default, "";
    hostile_blocks: hostile, "";
    hostile_details: hostile, "jj\n";
    hostile_routes: hostile, "2";
    hostile_lines: hostile, "3";
    hostile_waits: hostile, "4";
    hostile_flame: hostile, "5j";
    hostile_notices: hostile, "6";
}

#[test]
fn without_colours_and_without_unicode() {
    let mut dashboard = with_source(blocked());
    let plain = look(Glyphs::Ascii, Colours::None);
    let mut text = String::new();
    for keys in ["", "5", "1\n"] {
        press(&mut dashboard, keys);
        let buffer = screen(&mut dashboard, &plain, (80, 24));
        assert!(buffer.content.iter().all(|cell| (cell.fg, cell.bg) == (Color::Reset, Color::Reset)));
        assert!(buffer.content.iter().all(|cell| cell.symbol().is_ascii()));
        text += &rows(&buffer).into_iter().map(|row| format!("|{row}|\n")).collect::<String>();
    }
    insta::assert_snapshot!(text);
}

/// What is drawn while the window is any size, and whatever was pressed before.
#[test]
fn every_view_fits_every_size() {
    for build in [shop as fn() -> Dashboard, blocked, adding_up, hostile] {
        for keys in ["", "\n", "2\n", "3", "4", "5jj", "5jj\n", "6", "?", "/x", "p"] {
            let mut dashboard = build();
            press(&mut dashboard, keys);
            for columns in [1, 10, 29, 30, 60, 110, 300] {
                for rows in [1, 7, 8, 13, 14, 20, 100] {
                    for look in [usual(), look(Glyphs::Ascii, Colours::None)] {
                        screen(&mut dashboard, &look, (columns, rows));
                    }
                }
            }
        }
    }
}

#[test]
fn nothing_hostile_reaches_the_terminal() {
    for keys in ["", "\n", "\nl", "\nll", "\nlll", "\nllll", "\nlllll", "\nllllll", "2", "3", "4", "5jj", "6"] {
        for (glyphs, size) in [Glyphs::Unicode, Glyphs::Ascii].into_iter().flat_map(|it| SIZES.map(|size| (it, size))) {
            let mut dashboard = hostile();
            press(&mut dashboard, keys);
            let buffer = screen(&mut dashboard, &look(glyphs, Colours::Indexed), size);
            for cell in &buffer.content {
                // The one mark of our own.
                let symbol = cell.symbol().strip_suffix('\u{200e}').unwrap_or(cell.symbol());
                assert!(!symbol.chars().any(is_dangerous), "{keys:?} {size:?}: {symbol:?}");
                assert!(symbol.chars().count() <= 8, "{symbol:?}");
            }
        }
    }
}

#[test]
fn hostile_names_do_not_forge_rows() {
    let text = shown(hostile, "");
    assert!(!text.lines().any(|line| line.starts_with("|fake row")), "{text}");
}

/// The selection stays on its block when others come, and on the first row when it was there.
#[test]
fn the_selection_stays_where_it_was_put() {
    let mut dashboard = shop();
    let newest = |dashboard: &Dashboard| dashboard.looked_at().unwrap().start_ns();
    let first = newest(&dashboard);
    let new = |at| Update::Block(block_at("GET /new", ms(at)..ms(at + 60)));
    dashboard.update(&new(181_000));
    assert_eq!(newest(&dashboard), ms(181_000));
    press(&mut dashboard, "j");
    assert_eq!(newest(&dashboard), first);
    dashboard.update(&new(182_000));
    assert_eq!(newest(&dashboard), first);
    press(&mut dashboard, "kkk");
    dashboard.update(&new(183_000));
    assert_eq!(newest(&dashboard), ms(183_000));
}

#[test]
fn a_paused_screen_stands_still_and_nothing_is_lost() {
    let mut dashboard = shop();
    press(&mut dashboard, "p");
    let before = dashboard.rows().len();
    dashboard.update(&Update::Block(block_at("GET /new", ms(181_000)..ms(181_060))));
    assert_eq!((dashboard.rows().len(), dashboard.paused()), (before, Some(1)));
    press(&mut dashboard, "p");
    assert_eq!((dashboard.rows().len(), dashboard.paused()), (before + 1, None));
}

#[test]
fn what_is_selected_is_exported() {
    let exported = |keys: &str| {
        let mut dashboard = shop();
        match press(&mut dashboard, keys).as_slice() {
            [Ask::Export(blocks)] => blocks.len(),
            other => panic!("{keys:?}: {other:?}"),
        }
    };
    assert_eq!(exported("e"), 1);
    assert_eq!(exported("\ne"), 1);
    assert_eq!(exported("2e"), 24, "all of the worst route");
    assert_eq!(exported("2/export\ne"), 8);
    assert_eq!(exported("5e"), shop().picture().blocks as usize);
    let mut dashboard = Dashboard::default();
    assert_eq!(press(&mut dashboard, "e"), []);
    assert!(dashboard.view().message.is_some());
}

#[test]
fn keys_lead_from_a_route_to_its_stack_and_back() {
    let mut dashboard = shop();
    press(&mut dashboard, "2\n\n");
    assert!(dashboard.view().open.is_some());
    press(&mut dashboard, "\x1b\x1b");
    assert_eq!(
        (dashboard.view().tab, dashboard.view().open, dashboard.view().scope.is_some()),
        (Tab::Routes, None, false)
    );
    assert_eq!(press(&mut dashboard, "q"), [Ask::Leave]);
    press(&mut dashboard, "/q");
    assert_eq!(dashboard.view().search.text, "q", "typed, not obeyed");
}

#[test]
fn a_click_selects_and_another_opens() {
    let mut dashboard = shop();
    let click = |dashboard: &mut Dashboard, (column, row): (u16, u16)| {
        let kind = MouseEventKind::Down(MouseButton::Left);
        dashboard.mouse(MouseEvent { kind, column, row, modifiers: KeyModifiers::NONE });
        dashboard.at(dashboard.now_ns());
        screen(dashboard, &usual(), (80, 24));
    };
    screen(&mut dashboard, &usual(), (80, 24));
    let (routes, _) = dashboard.view().hits.tabs[1];
    click(&mut dashboard, (routes.x + 1, routes.y));
    assert_eq!(dashboard.view().tab, Tab::Routes);
    let list = dashboard.view().hits.list.unwrap().area;
    click(&mut dashboard, (list.x + 5, list.y + 1));
    assert_eq!((dashboard.view().tab, dashboard.selected(&dashboard.rows())), (Tab::Routes, 1));
    click(&mut dashboard, (list.x + 5, list.y + 1));
    assert_eq!(dashboard.view().tab, Tab::Recent);
    // The last column of the timeline that holds a block.
    let lane = dashboard.view().hits.lanes[0];
    let last = dashboard.picture().recent.back().unwrap().block.clone();
    assert_eq!(lane.tid, TID);
    let column = (last.start_ns() - lane.from_ns) / lane.column_ns;
    click(&mut dashboard, (lane.area.x + column as u16, lane.area.y));
    assert_eq!(dashboard.looked_at().unwrap().start_ns(), last.start_ns());
    assert!(dashboard.view().open.is_some());
    let (flame, _) = dashboard.view().hits.tabs[4];
    click(&mut dashboard, (flame.x + 1, flame.y));
    let (place, node) = dashboard.view().hits.flame[2];
    click(&mut dashboard, (place.x, place.y));
    assert_eq!(dashboard.flame().find(&dashboard.view().flame.selected), node);
}

#[test]
fn the_timeline_zooms_and_pans_and_comes_back() {
    let mut dashboard = shop();
    press(&mut dashboard, "---------");
    assert_eq!(dashboard.view().time.zoom, 4);
    press(&mut dashboard, "+++++++++");
    assert_eq!(dashboard.view().time.zoom, 0);
    press(&mut dashboard, "h");
    assert!(dashboard.view().time.until_ns.is_some_and(|until_ns| until_ns < dashboard.now_ns()));
    press(&mut dashboard, "l");
    assert_eq!(dashboard.view().time.until_ns, None, "now again");
}

#[test]
fn a_status_without_threads_is_shown_too() {
    let mut dashboard = Dashboard::default();
    let mut status = status_at(ms(5_000));
    status.threads.clear();
    dashboard.status(&status);
    screen(&mut dashboard, &usual(), (80, 24));
}
