//! Turns blocks into a structured log: one JSON line each, in OpenTelemetry's log data model, with its attribute names
//! where it has one.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::Sink;
use super::escape::printable;
use super::jsonl::write_line;
use super::text::WallClock;
use crate::core::event::{LoopInfo, Owner, RequestFacts};
use crate::core::incident::{Blame, Split, Update, user_line};
use crate::core::summary::Summary;

/// `WARN` (OpenTelemetry's severity numbers).
const WARN: u64 = 13;

pub struct Log {
    place: Place,
    clock: WallClock,
}

enum Place {
    StandardError,
    File { path: PathBuf, file: File },
}

impl Log {
    /// `-` is standard error.
    pub fn open(path: &Path, clock: WallClock) -> io::Result<Self> {
        let place = match path.to_str() {
            Some("-") => Place::StandardError,
            _ => Place::File { path: path.to_owned(), file: append(path)? },
        };
        Ok(Self { place, clock })
    }

    fn line(&mut self, object: &Value) -> io::Result<()> {
        match &mut self.place {
            Place::StandardError => write_line(&mut io::stderr().lock(), object),
            Place::File { file, .. } => write_line(file, object),
        }
    }
}

/// Only ever at the end: several may write to one file, and a rotated one may have been replaced. A link is not followed:
/// whoever may write to the folder, a target perhaps, could have root write anywhere.
fn append(path: &Path) -> io::Result<File> {
    let opened = OpenOptions::new().create(true).append(true).custom_flags(libc::O_NOFOLLOW).open(path);
    opened.map_err(|error| match error.raw_os_error() {
        Some(libc::ELOOP) => io::Error::other("it is a link; name the file that it leads to"),
        _ => error,
    })
}

impl Sink for Log {
    fn update(&mut self, update: &Update) -> io::Result<()> {
        let object = match update {
            Update::Block(block) => {
                let mut attributes = common("loopguard.block", &block.on, &block.blame);
                let victims = block.victims.as_ref();
                insert(&mut attributes, "loopguard.event", json!("single"));
                insert(&mut attributes, "loopguard.duration_ms", ms(block.duration_ns()));
                insert(&mut attributes, "loopguard.threshold_ms", ms(block.threshold_ns));
                split(&mut attributes, &block.split);
                insert(&mut attributes, "loopguard.victims", json!(victims.map(|victims| victims.count)));
                insert(&mut attributes, "loopguard.hint", json!(block.hint));
                let body = format!("event loop blocked for {:.1} ms", block.duration_ns() as f64 / 1e6);
                self.record(block.end_ns, &body, &block.blame, attributes)
            }
            Update::Cumulative(block) => {
                let mut attributes = common("loopguard.block", &block.on, &block.blame);
                insert(&mut attributes, "loopguard.event", json!("cumulative"));
                insert(&mut attributes, "loopguard.duration_ms", ms(block.total_ns));
                insert(&mut attributes, "loopguard.threshold_ms", ms(block.threshold_ns));
                insert(&mut attributes, "loopguard.window_ms", ms(block.window_ns));
                insert(&mut attributes, "loopguard.count", json!(block.count));
                split(&mut attributes, &block.split);
                insert(&mut attributes, "loopguard.hint", json!(block.hint));
                let (total, count) = (block.total_ns as f64 / 1e6, block.count);
                let body = format!("event loop held for {total:.1} ms by {count} short steps");
                self.record(block.end_ns, &body, &block.blame, attributes)
            }
            _ => return Ok(()),
        };
        self.line(&object)
    }

    fn finish(&mut self, _summary: &Summary) -> io::Result<()> {
        Ok(())
    }

    fn reopen(&mut self) -> io::Result<()> {
        if let Place::File { path, file } = &mut self.place {
            *file = append(path)?;
        }
        Ok(())
    }
}

impl Log {
    fn record(&self, at_ns: u64, body: &str, blame: &Blame, attributes: Map<String, Value>) -> Value {
        let trace_id = blame.request().and_then(|request| request.trace_id.as_deref());
        let mut record = json!({
            "timestamp": timestamp(self.clock.unix_time(at_ns)),
            "severity_text": "WARN",
            "severity_number": WARN,
            "body": format!("{body}{}", whose(blame)),
            "attributes": attributes,
        });
        if let (Some(trace_id), Some(record)) = (trace_id, record.as_object_mut()) {
            insert(record, "trace_id", json!(trace_id));
        }
        record
    }
}

fn whose(blame: &Blame) -> String {
    let by = match &blame.owner {
        Owner::Request { request, .. } => {
            let method = request.method.as_deref().unwrap_or("?");
            format!(" by {method} {}", request.route.as_deref().unwrap_or(&request.path))
        }
        Owner::NoRequest { task: Some(task) } | Owner::Task { task } => format!(" by task {task}"),
        Owner::NoRequest { task: None } | Owner::Unknown(_) => String::new(),
    };
    let at = user_line(&blame.stack).map(|line| {
        let (file, number) = (line.frame.file.as_deref().unwrap_or("?"), line.frame.line.unwrap_or(0));
        format!(" at {file}:{number} {}", line.frame.function)
    });
    printable(&(by + &at.unwrap_or_default())).to_string()
}

/// What every record has. Names without `loopguard.` are OpenTelemetry's semantic conventions.
fn common(event: &str, on: &LoopInfo, blame: &Blame) -> Map<String, Value> {
    let mut attributes = Map::new();
    insert(&mut attributes, "event.name", json!(event));
    insert(&mut attributes, "process.pid", json!(on.pid));
    insert(&mut attributes, "thread.id", json!(on.tid));
    insert(&mut attributes, "thread.name", json!(on.thread));
    insert(&mut attributes, "loopguard.runtime", json!(on.runtime));
    insert(&mut attributes, "loopguard.attribution", json!(blame.attribution));
    insert(&mut attributes, "loopguard.how", json!(blame.how()));
    insert(&mut attributes, "loopguard.task", json!(blame.task()));
    if let Some(request) = blame.request() {
        of_request(&mut attributes, request);
    }
    let frame = user_line(&blame.stack).map(|line| line.frame).or(blame.stack.frames.first().map(|frame| &**frame));
    if let Some(frame) = frame {
        insert(&mut attributes, "code.function.name", json!(frame.function));
        insert(&mut attributes, "code.file.path", json!(frame.file));
        insert(&mut attributes, "code.line.number", json!(frame.line));
    }
    attributes
}

fn of_request(attributes: &mut Map<String, Value>, request: &RequestFacts) {
    insert(attributes, "http.request.method", json!(request.method));
    insert(attributes, "http.route", json!(request.route));
    insert(attributes, "url.path", json!(request.path));
    insert(attributes, "http.request.header.x-request-id", json!([request.id]));
    if let Some((address, port)) = request.client.as_deref().and_then(|client| client.rsplit_once(':')) {
        insert(attributes, "client.address", json!(address.trim_matches(['[', ']'])));
        insert(attributes, "client.port", json!(port.parse::<u16>().ok()));
    }
}

fn split(attributes: &mut Map<String, Value>, split: &Split) {
    insert(attributes, "loopguard.on_cpu_ms", ms(split.on_cpu_ns));
    insert(attributes, "loopguard.waiting_ms", ms(split.waiting_ns));
    insert(attributes, "loopguard.gil_ms", ms(split.gil_ns));
    insert(attributes, "loopguard.run_queue_ms", ms(split.run_queue_ns));
    insert(attributes, "loopguard.verdict", json!(split.verdict()));
}

/// What is not known is left out.
fn insert(attributes: &mut Map<String, Value>, name: &str, value: Value) {
    if !value.is_null() {
        attributes.insert(name.to_owned(), value);
    }
}

fn ms(ns: u64) -> Value {
    json!((ns as f64 / 1e3).round() / 1e3)
}

/// RFC 3339 in UTC, with milliseconds.
fn timestamp(unix: Duration) -> String {
    let (days, second) = (unix.as_secs() / 86_400, unix.as_secs() % 86_400);
    // Days since 0000-03-01 in eras of 400 years: the civil calendar begins its year in March.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let [hour, minute, second] = [second / 3600, second / 60 % 60, second % 60];
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:03}Z", unix.subsec_millis())
}

#[cfg(test)]
mod tests {
    use super::super::example;
    use super::*;

    fn clock() -> WallClock {
        WallClock { monotonic_ns: 0, unix: Duration::from_secs(1_700_000_000), utc_offset_s: 3600 }
    }

    fn folder() -> PathBuf {
        let folder = std::env::temp_dir().join(format!("loopguard-log-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        folder
    }

    fn logged(name: &str, update: Update) -> Value {
        let path = folder().join(name);
        Log::open(&path, clock()).unwrap().update(&update).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(text.find('\n'), Some(text.len() - 1), "one line");
        assert!(!text.trim_end().chars().any(super::super::escape::is_dangerous));
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn a_link_is_not_followed() {
        let (link, file) = (folder().join("link"), folder().join("elsewhere"));
        std::os::unix::fs::symlink(&file, &link).unwrap();
        let said = Log::open(&link, clock()).err().unwrap().to_string();
        std::fs::remove_file(&link).unwrap();
        assert_eq!(said, "it is a link; name the file that it leads to");
        assert!(!file.exists());
    }

    #[test]
    fn a_block() {
        let record = logged("block", Update::Block(example::block_with_victims()));
        insta::assert_snapshot!(serde_json::to_string_pretty(&record).unwrap(), @r#"
        {
          "attributes": {
            "client.address": "10.0.0.9",
            "client.port": 41022,
            "code.file.path": "/srv/shop/store.py",
            "code.function.name": "Store.load",
            "code.line.number": 41,
            "event.name": "loopguard.block",
            "http.request.header.x-request-id": [
              "abc-123"
            ],
            "http.request.method": "GET",
            "http.route": "/items/{id}",
            "loopguard.attribution": "exact",
            "loopguard.duration_ms": 52.346,
            "loopguard.event": "single",
            "loopguard.gil_ms": 0.4,
            "loopguard.hint": "this PostgreSQL driver is synchronous: use psycopg's AsyncConnection or asyncpg",
            "loopguard.how": "asgi-frame",
            "loopguard.on_cpu_ms": 1.846,
            "loopguard.run_queue_ms": 0.1,
            "loopguard.runtime": "uvloop",
            "loopguard.threshold_ms": 50.0,
            "loopguard.verdict": "code",
            "loopguard.victims": 5,
            "loopguard.waiting_ms": 50.0,
            "process.pid": 1234,
            "thread.id": 1235,
            "thread.name": "uvicorn",
            "url.path": "/items/7"
          },
          "body": "event loop blocked for 52.3 ms by GET /items/{id} at /srv/shop/store.py:41 Store.load",
          "severity_number": 13,
          "severity_text": "WARN",
          "timestamp": "2023-11-14T22:13:21.286Z"
        }
        "#);
    }

    #[test]
    fn a_cumulative_block_and_hostile_names() {
        let record = logged("cumulative", Update::Cumulative(example::cumulative()));
        assert_eq!(record["attributes"]["loopguard.event"], "cumulative");
        assert_eq!(record["attributes"]["loopguard.count"], 20);
        let record = logged("hostile", Update::Block(example::hostile_block()));
        assert!(record["attributes"]["url.path"].as_str().unwrap().contains('\x1b'), "whole, and escaped in the file");
    }

    #[test]
    fn a_rotated_file_is_opened_anew() {
        let (path, rotated) = (folder().join("rotate.log"), folder().join("rotate.log.1"));
        let mut log = Log::open(&path, clock()).unwrap();
        let block = Update::Block(example::block());
        log.update(&block).unwrap();
        std::fs::rename(&path, &rotated).unwrap();
        log.update(&block).unwrap();
        log.reopen().unwrap();
        log.update(&block).unwrap();
        let lines = |path: &Path| std::fs::read_to_string(path).unwrap().lines().count();
        assert_eq!((lines(&rotated), lines(&path)), (2, 1));
        std::fs::remove_file(&path).unwrap();
        std::fs::remove_file(&rotated).unwrap();
    }

    #[test]
    fn timestamps() {
        let at = |seconds: u64, ms: u64| timestamp(Duration::from_millis(seconds * 1000 + ms));
        assert_eq!(at(0, 0), "1970-01-01T00:00:00.000Z");
        assert_eq!(at(951_782_399, 7), "2000-02-28T23:59:59.007Z");
        assert_eq!(at(951_782_400, 0), "2000-02-29T00:00:00.000Z");
        assert_eq!(at(1_700_000_000, 0), "2023-11-14T22:13:20.000Z");
        assert_eq!(at(4_102_444_800, 0), "2100-01-01T00:00:00.000Z");
    }
}
