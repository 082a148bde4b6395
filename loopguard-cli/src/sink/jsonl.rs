//! Turns updates into JSON lines: one object a line, for other programs.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter, Serializer};

use super::Sink;
use super::escape::is_dangerous;
use crate::core::event::{Frame, FrameKind, How, LoopInfo, RequestFacts, Runtime};
use crate::core::incident::{Attribution, Blame, Incident, Ongoing, Update, Verdict, WaitTotal};
use crate::core::summary::{Summary, ThreadTotal};

pub struct JsonLines<W> {
    out: W,
}

impl<W: Write> JsonLines<W> {
    pub fn new(out: W) -> Self {
        Self { out }
    }

    /// Whole lines only, so that a reader can follow along.
    fn line(&mut self, object: &impl Serialize) -> io::Result<()> {
        let mut line = Vec::with_capacity(1024);
        object.serialize(&mut Serializer::with_formatter(&mut line, SafeStrings(CompactFormatter)))?;
        line.push(b'\n');
        self.out.write_all(&line)?;
        self.out.flush()
    }
}

impl<W: Write> Sink for JsonLines<W> {
    fn update(&mut self, update: &Update) -> io::Result<()> {
        match update {
            Update::Block(incident) => self.line(&BlockObject::new(incident)),
            Update::Ongoing(ongoing) => self.line(&OngoingObject::new(ongoing)),
        }
    }

    fn finish(&mut self, summary: &Summary) -> io::Result<()> {
        self.line(&SummaryObject::new(summary))
    }
}

#[derive(Serialize)]
struct BlockObject<'a> {
    r#type: &'static str,
    event: &'static str,
    t_start_ns: u64,
    t_end_ns: u64,
    duration_ms: f64,
    threshold_ms: f64,
    #[serde(flatten)]
    on: LoopFields<'a>,
    on_cpu_ms: f64,
    waiting_ms: f64,
    gil_ms: f64,
    run_queue_ms: f64,
    verdict: Verdict,
    waits: Vec<WaitObject<'a>>,
    #[serde(flatten)]
    blame: BlameFields<'a>,
    /// Not known yet.
    victims: Option<u64>,
    hint: Option<&'a str>,
    stack: Vec<FrameObject<'a>>,
}

#[derive(Serialize)]
struct OngoingObject<'a> {
    r#type: &'static str,
    t_start_ns: u64,
    age_ms: f64,
    threshold_ms: f64,
    #[serde(flatten)]
    on: LoopFields<'a>,
    #[serde(flatten)]
    blame: BlameFields<'a>,
    stack: Vec<FrameObject<'a>>,
}

#[derive(Serialize)]
struct LoopFields<'a> {
    pid: u32,
    tid: u32,
    thread: &'a str,
    runtime: Runtime,
}

#[derive(Serialize)]
struct WaitObject<'a> {
    syscall: &'a str,
    on: Option<&'a str>,
    ms: f64,
}

#[derive(Serialize)]
struct BlameFields<'a> {
    attribution: Attribution,
    how: How,
    requests: Vec<RequestObject<'a>>,
    task: Option<&'a str>,
}

#[derive(Serialize)]
struct RequestObject<'a> {
    id: &'a str,
    method: Option<&'a str>,
    path: &'a str,
    route: Option<&'a str>,
    client: Option<&'a str>,
    trace_id: Option<&'a str>,
    ms: f64,
}

#[derive(Serialize)]
struct FrameObject<'a> {
    kind: FrameKind,
    function: &'a str,
    /// Native frames have one, Python frames no such field.
    #[serde(skip_serializing_if = "Option::is_none")]
    module: Option<Option<&'a str>>,
    file: Option<&'a str>,
    line: Option<u32>,
}

#[derive(Serialize)]
struct SummaryObject<'a> {
    r#type: &'static str,
    duration_s: f64,
    ticks: u64,
    blocks: u64,
    blocked_ms: f64,
    lost_records: u64,
    unsymbolized: u64,
    self_cpu_ms: f64,
    threads: Vec<ThreadObject<'a>>,
}

#[derive(Serialize)]
struct ThreadObject<'a> {
    #[serde(flatten)]
    on: LoopFields<'a>,
    ticks: u64,
    blocks: u64,
    blocked_ms: f64,
}

impl<'a> BlockObject<'a> {
    fn new(incident: &'a Incident) -> Self {
        let split = &incident.split;
        Self {
            r#type: "block",
            event: "single",
            t_start_ns: incident.start_ns,
            t_end_ns: incident.end_ns,
            duration_ms: ms(incident.duration_ns()),
            threshold_ms: ms(incident.threshold_ns),
            on: LoopFields::new(&incident.on),
            on_cpu_ms: ms(split.on_cpu_ns),
            waiting_ms: ms(split.waiting_ns),
            gil_ms: ms(split.gil_ns),
            run_queue_ms: ms(split.run_queue_ns),
            verdict: incident.verdict(),
            waits: incident.waits.iter().map(WaitObject::new).collect(),
            blame: BlameFields::new(&incident.blame, incident.duration_ns()),
            victims: None,
            hint: None,
            stack: stack(&incident.blame),
        }
    }
}

impl<'a> OngoingObject<'a> {
    fn new(ongoing: &'a Ongoing) -> Self {
        Self {
            r#type: "ongoing",
            t_start_ns: ongoing.start_ns,
            age_ms: ms(ongoing.age_ns()),
            threshold_ms: ms(ongoing.threshold_ns),
            on: LoopFields::new(&ongoing.on),
            blame: BlameFields::new(&ongoing.blame, ongoing.age_ns()),
            stack: stack(&ongoing.blame),
        }
    }
}

impl<'a> LoopFields<'a> {
    fn new(info: &'a LoopInfo) -> Self {
        Self { pid: info.pid, tid: info.tid, thread: &info.thread, runtime: info.runtime }
    }
}

impl<'a> WaitObject<'a> {
    fn new(wait: &'a WaitTotal) -> Self {
        Self { syscall: &wait.syscall, on: wait.on.as_deref(), ms: ms(wait.ns) }
    }
}

impl<'a> BlameFields<'a> {
    fn new(blame: &'a Blame, duration_ns: u64) -> Self {
        Self {
            attribution: blame.attribution,
            how: blame.how(),
            requests: blame.request().map(|request| RequestObject::new(request, duration_ns)).into_iter().collect(),
            task: blame.task(),
        }
    }
}

impl<'a> RequestObject<'a> {
    fn new(request: &'a RequestFacts, duration_ns: u64) -> Self {
        Self {
            id: &request.id,
            method: request.method.as_deref(),
            path: &request.path,
            route: request.route.as_deref(),
            client: request.client.as_deref(),
            trace_id: request.trace_id.as_deref(),
            ms: ms(duration_ns),
        }
    }
}

impl<'a> FrameObject<'a> {
    fn new(frame: &'a Frame) -> Self {
        Self {
            kind: frame.kind,
            function: &frame.function,
            module: (frame.kind == FrameKind::Native).then_some(frame.module.as_deref()),
            file: frame.file.as_deref(),
            line: frame.line,
        }
    }
}

impl<'a> SummaryObject<'a> {
    fn new(summary: &'a Summary) -> Self {
        let measured = &summary.measured;
        Self {
            r#type: "summary",
            duration_s: ms(measured.duration.as_micros() as u64),
            ticks: summary.ticks(),
            blocks: summary.total.blocks,
            blocked_ms: ms(summary.total.blocked_ns),
            lost_records: measured.lost_records,
            unsymbolized: measured.unsymbolized,
            self_cpu_ms: ms(measured.self_cpu.as_nanos() as u64),
            threads: summary.threads.iter().map(ThreadObject::new).collect(),
        }
    }
}

impl<'a> ThreadObject<'a> {
    fn new(thread: &'a ThreadTotal) -> Self {
        Self {
            on: LoopFields::new(&thread.on),
            ticks: thread.ticks,
            blocks: thread.total.blocks,
            blocked_ms: ms(thread.total.blocked_ns),
        }
    }
}

fn stack(blame: &Blame) -> Vec<FrameObject<'_>> {
    blame.stack.frames.iter().map(|frame| FrameObject::new(frame)).collect()
}

/// Milliseconds with three decimals.
fn ms(ns: u64) -> f64 {
    (ns as f64 / 1e3).round() / 1e3
}

/// JSON escapes C0 controls by itself. The others would reach a terminal that shows the line.
struct SafeStrings(CompactFormatter);

impl Formatter for SafeStrings {
    fn write_string_fragment<W: ?Sized + Write>(&mut self, out: &mut W, fragment: &str) -> io::Result<()> {
        let mut rest = fragment;
        while let Some((at, char)) = rest.char_indices().find(|(_, char)| is_dangerous(*char)) {
            self.0.write_string_fragment(out, &rest[..at])?;
            for unit in char.encode_utf16(&mut [0; 2]) {
                write!(out, "\\u{unit:04x}")?;
            }
            rest = &rest[at + char.len_utf8()..];
        }
        self.0.write_string_fragment(out, rest)
    }
}
