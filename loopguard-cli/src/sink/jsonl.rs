//! Turns updates into JSON lines: one object a line, for other programs.

use std::io::{self, Write};
use std::time::Duration;

use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter, Serializer};

use super::Sink;
use super::escape::is_dangerous;
use crate::core::event::{Frame, FrameKind, How, LoopInfo, Origin, Owner, RequestFacts, Runtime, Worker};
use crate::core::incident::{Attribution, Blame, Cumulative, Incident, Ongoing, Update, Verdict, WaitTotal, user_line};
use crate::core::request::{EndedRequest, RequestCounts};
use crate::core::status::{RecordCounts, StackCounts};
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
        write_line(&mut self.out, object)
    }
}

/// In one piece.
pub(super) fn write_line(out: &mut impl Write, object: &impl Serialize) -> io::Result<()> {
    let mut line = Vec::with_capacity(1024);
    object.serialize(&mut Serializer::with_formatter(&mut line, SafeStrings(CompactFormatter)))?;
    line.push(b'\n');
    out.write_all(&line)?;
    out.flush()
}

impl<W: Write> Sink for JsonLines<W> {
    fn update(&mut self, update: &Update) -> io::Result<()> {
        match update {
            Update::Block(incident) => self.line(&BlockObject::new(incident)),
            Update::Ongoing(ongoing) => self.line(&OngoingObject::new(ongoing)),
            Update::Cumulative(block) => self.line(&CumulativeObject::new(block)),
            Update::CumulativeOngoing(open) => self.line(&CumulativeOngoingObject::new(open)),
            // Each block says which threshold held for it.
            Update::Threshold(_) => Ok(()),
            Update::Request(ended) => self.line(&EndedRequestObject::new(ended)),
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
    /// How many requests it held up; null: nobody could look while it ran.
    victims: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    victim_delay_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    victim_requests: Option<Vec<RequestObject<'a>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    victims_unread: Option<u32>,
    hint: Option<&'a str>,
    stack: Vec<FrameObject<'a>>,
    /// Why its outermost frames are missing, if they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    stack_incomplete: Option<&'a str>,
}

#[derive(Serialize)]
struct CumulativeObject<'a> {
    r#type: &'static str,
    event: &'static str,
    t_start_ns: u64,
    t_end_ns: u64,
    /// Of all its steps, as `total_ms`: from the first to the last is longer.
    duration_ms: f64,
    threshold_ms: f64,
    window_ms: f64,
    total_ms: f64,
    count: u64,
    #[serde(flatten)]
    on: LoopFields<'a>,
    on_cpu_ms: f64,
    waiting_ms: f64,
    gil_ms: f64,
    run_queue_ms: f64,
    verdict: Verdict,
    waits: Vec<WaitObject<'a>>,
    attribution: Attribution,
    how: How,
    /// The main contributors.
    requests: Vec<RequestObject<'a>>,
    task: Option<&'a str>,
    routes: Vec<RouteShareObject<'a>>,
    lines: Vec<LineShareObject<'a>>,
    victims: Option<u64>,
    hint: Option<&'a str>,
    stack: Vec<FrameObject<'a>>,
}

#[derive(Serialize)]
struct RouteShareObject<'a> {
    method: Option<&'a str>,
    route: Option<&'a str>,
    ms: f64,
    share: f64,
}

#[derive(Serialize)]
struct LineShareObject<'a> {
    function: &'a str,
    file: Option<&'a str>,
    line: Option<u32>,
    ms: f64,
    share: f64,
}

#[derive(Serialize)]
struct CumulativeOngoingObject<'a> {
    r#type: &'static str,
    event: &'static str,
    t_start_ns: u64,
    age_ms: f64,
    threshold_ms: f64,
    window_ms: f64,
    total_ms: f64,
    count: u64,
    #[serde(flatten)]
    on: LoopFields<'a>,
    #[serde(flatten)]
    blame: BlameFields<'a>,
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
    hint: Option<&'a str>,
    stack: Vec<FrameObject<'a>>,
    /// Why its outermost frames are missing, if they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    stack_incomplete: Option<&'a str>,
}

#[derive(Serialize)]
struct EndedRequestObject<'a> {
    r#type: &'static str,
    id: &'a str,
    method: Option<&'a str>,
    /// Unknown if the request began before loopguard came.
    path: Option<&'a str>,
    route: Option<&'a str>,
    client: Option<&'a str>,
    trace_id: Option<&'a str>,
    /// None: it got no response.
    status: Option<u64>,
    t_start_ns: u64,
    t_end_ns: u64,
    duration_ms: f64,
    blocked_ms: f64,
    /// Of its steps in all: on the CPU, waiting, waiting for the GIL and without a CPU add up to this.
    held_ms: f64,
    on_cpu_ms: f64,
    waiting_ms: f64,
    gil_ms: f64,
    run_queue_ms: f64,
    longest_step_ms: f64,
    steps: u32,
    blocks: u32,
    complete: bool,
    pid: u32,
}

#[derive(Serialize)]
struct RequestsObject {
    ended: u64,
    open: u64,
    never_ended: u64,
    untracked: u64,
    unpaired: u64,
    frames_agree: u64,
    frames_disagree: u64,
}

#[derive(Serialize)]
struct LoopFields<'a> {
    pid: u32,
    tid: u32,
    thread: &'a str,
    runtime: Runtime,
    #[serde(skip_serializing_if = "Option::is_none")]
    worker: Option<String>,
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
    /// Whose code it is.
    origin: Origin,
}

#[derive(Serialize)]
struct SummaryObject<'a> {
    r#type: &'static str,
    duration_s: f64,
    ticks: u64,
    blocks: u64,
    blocked_ms: f64,
    /// These are not among `blocks`.
    cumulative_blocks: u64,
    cumulative_ms: f64,
    /// Nor are these: blocks of routes that are excluded.
    excluded_blocks: u64,
    excluded_ms: f64,
    lost_records: u64,
    records: RecordCounts,
    unsymbolized: u64,
    /// Of targets whose native stacks were copied.
    #[serde(skip_serializing_if = "Option::is_none")]
    stacks: Option<&'a StackCounts>,
    self_cpu_ms: f64,
    /// For how long the budget limited what was looked at, and what was watched at all, if it did.
    #[serde(skip_serializing_if = "Option::is_none")]
    limited_s: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    unwatched_s: Option<f64>,
    /// Only where a server tells of its requests.
    #[serde(skip_serializing_if = "Option::is_none")]
    requests: Option<RequestsObject>,
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
            victims: incident.victims.as_ref().map(|victims| victims.count),
            victim_delay_ms: incident.victims.as_ref().map(|victims| ms(victims.delay_ns)),
            victim_requests: incident.victims.as_ref().map(|victims| {
                victims.requests.iter().map(|victim| RequestObject::new(victim, incident.duration_ns())).collect()
            }),
            victims_unread: incident.victims.as_ref().map(|victims| victims.unread).filter(|unread| *unread > 0),
            hint: incident.hint,
            stack: stack(&incident.blame),
            stack_incomplete: incident.blame.stack.incomplete,
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
            hint: ongoing.hint,
            stack: stack(&ongoing.blame),
            stack_incomplete: ongoing.blame.stack.incomplete,
        }
    }
}

impl<'a> CumulativeObject<'a> {
    fn new(block: &'a Cumulative) -> Self {
        let (split, total) = (&block.split, block.total_ns);
        let requests = block.owners.iter().filter_map(|share| match &share.owner {
            Owner::Request { request, .. } => Some(RequestObject::new(request, share.ns)),
            Owner::NoRequest { .. } | Owner::Task { .. } | Owner::Unknown(_) => None,
        });
        let mut routes: Vec<RouteShareObject> = Vec::new();
        for share in &block.owners {
            let Owner::Request { request, .. } = &share.owner else { continue };
            let (method, route) = (request.method.as_deref(), request.route.as_deref());
            match routes.iter_mut().find(|known| known.method == method && known.route == route) {
                Some(known) => known.ms += ms(share.ns),
                None => routes.push(RouteShareObject { method, route, ms: ms(share.ns), share: 0.0 }),
            }
        }
        routes.iter_mut().for_each(|route| route.share = share(route.ms, ms(total)));
        let lines = block.lines.iter().filter_map(|line| {
            let frame = user_line(&line.stack).map(|at| at.frame).or_else(|| Some(&**line.stack.frames.first()?))?;
            let (file, line_number) = (frame.file.as_deref(), frame.line);
            let ms_of_line = ms(line.ns);
            let share = share(ms_of_line, ms(total));
            Some(LineShareObject { function: &frame.function, file, line: line_number, ms: ms_of_line, share })
        });
        Self {
            r#type: "block",
            event: "cumulative",
            t_start_ns: block.start_ns,
            t_end_ns: block.end_ns,
            duration_ms: ms(total),
            threshold_ms: ms(block.threshold_ns),
            window_ms: ms(block.window_ns),
            total_ms: ms(total),
            count: block.count,
            on: LoopFields::new(&block.on),
            on_cpu_ms: ms(split.on_cpu_ns),
            waiting_ms: ms(split.waiting_ns),
            gil_ms: ms(split.gil_ns),
            run_queue_ms: ms(split.run_queue_ns),
            verdict: block.verdict(),
            waits: block.waits.iter().map(WaitObject::new).collect(),
            attribution: block.blame.attribution,
            how: block.blame.how(),
            requests: requests.collect(),
            task: block.blame.task(),
            routes,
            lines: lines.collect(),
            victims: None,
            hint: block.hint,
            stack: stack(&block.blame),
        }
    }
}

impl<'a> CumulativeOngoingObject<'a> {
    fn new(open: &'a Cumulative) -> Self {
        Self {
            r#type: "ongoing",
            event: "cumulative",
            t_start_ns: open.start_ns,
            age_ms: ms(open.end_ns.saturating_sub(open.start_ns)),
            threshold_ms: ms(open.threshold_ns),
            window_ms: ms(open.window_ns),
            total_ms: ms(open.total_ns),
            count: open.count,
            on: LoopFields::new(&open.on),
            blame: BlameFields::new(&open.blame, open.total_ns),
            hint: open.hint,
            stack: stack(&open.blame),
        }
    }
}

impl<'a> EndedRequestObject<'a> {
    fn new(ended: &'a EndedRequest) -> Self {
        let (facts, held, split) = (&ended.facts, &ended.held, ended.split());
        Self {
            r#type: "request",
            id: &facts.id,
            method: facts.method.as_deref(),
            path: Some(facts.path.as_str()).filter(|path| !path.is_empty()),
            route: facts.route.as_deref(),
            client: facts.client.as_deref(),
            trace_id: facts.trace_id.as_deref(),
            status: ended.status,
            t_start_ns: ended.start_ns,
            t_end_ns: ended.end_ns,
            duration_ms: ms(ended.duration_ns()),
            blocked_ms: ms(held.blocked_ns),
            held_ms: ms(held.ns),
            on_cpu_ms: ms(split.on_cpu_ns),
            waiting_ms: ms(split.waiting_ns),
            gil_ms: ms(split.gil_ns),
            run_queue_ms: ms(split.run_queue_ns),
            longest_step_ms: ms(held.longest_ns),
            steps: held.steps,
            blocks: held.blocks,
            complete: ended.is_complete,
            pid: ended.pid,
        }
    }
}

impl RequestsObject {
    fn new(ended: u64, counts: &RequestCounts) -> Option<Self> {
        let RequestCounts { are_told, open, never_ended, untracked, unpaired, frames_agree, frames_disagree } = *counts;
        are_told.then_some(Self { ended, open, never_ended, untracked, unpaired, frames_agree, frames_disagree })
    }
}

impl<'a> LoopFields<'a> {
    fn new(info: &'a LoopInfo) -> Self {
        Self {
            pid: info.pid,
            tid: info.tid,
            thread: &info.thread,
            runtime: info.runtime,
            worker: info.worker.as_ref().and_then(Worker::name),
        }
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
            origin: frame.origin,
        }
    }
}

impl<'a> SummaryObject<'a> {
    fn new(summary: &'a Summary) -> Self {
        let measured = &summary.measured;
        Self {
            r#type: "summary",
            duration_s: seconds(measured.duration),
            ticks: summary.ticks(),
            blocks: summary.total.blocks,
            blocked_ms: ms(summary.total.blocked_ns),
            cumulative_blocks: summary.cumulative.blocks,
            cumulative_ms: ms(summary.cumulative.blocked_ns),
            excluded_blocks: summary.excluded.blocks,
            excluded_ms: ms(summary.excluded.blocked_ns),
            lost_records: measured.lost_records,
            records: measured.records,
            unsymbolized: measured.unsymbolized,
            stacks: Some(&measured.stacks).filter(|stacks| stacks.unwound + stacks.lost > 0),
            self_cpu_ms: ms(measured.self_cpu.as_nanos() as u64),
            limited_s: Some(measured.limited).filter(|time| !time.is_zero()).map(seconds),
            unwatched_s: Some(measured.unwatched).filter(|time| !time.is_zero()).map(seconds),
            requests: RequestsObject::new(summary.requests, &measured.requests),
            threads: summary.threads.iter().map(ThreadObject::new).collect(),
        }
    }
}

fn seconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e3).round() / 1e3
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

/// A part of a whole, with three decimals.
fn share(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { (part / whole * 1e3).round() / 1e3 } else { 0.0 }
}

/// Milliseconds with three decimals.
fn ms(ns: u64) -> f64 {
    (ns as f64 / 1e3).round() / 1e3
}

/// JSON escapes C0 controls by itself. The others would reach a terminal that shows the line.
struct SafeStrings(CompactFormatter);

/// The only other one that is ASCII.
const DELETE: u8 = 0x7f;

impl Formatter for SafeStrings {
    fn write_string_fragment<W: ?Sized + Write>(&mut self, out: &mut W, fragment: &str) -> io::Result<()> {
        // Nearly all strings: a path has some fifty characters, a block some fifty paths.
        if fragment.is_ascii() && !fragment.as_bytes().contains(&DELETE) {
            return self.0.write_string_fragment(out, fragment);
        }
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

#[cfg(test)]
mod tests {
    use super::super::example;
    use super::*;

    fn shown(update: Update) -> String {
        let mut out = Vec::new();
        JsonLines::new(&mut out).update(&update).unwrap();
        String::from_utf8(out).unwrap()
    }

    /// A few fields a line, to be read beside the format's description.
    fn by_field(line: &str) -> String {
        assert_eq!(line.find('\n'), Some(line.len() - 1), "one line");
        let _: serde_json::Value = serde_json::from_str(line).unwrap();
        let starts =
            ["\"pid\"", "\"on_cpu_ms\"", "\"waits\"", "\"attribution\"", "\"requests\"", "\"task\"", "\"stack\""];
        let lines = starts.iter().fold(line.to_owned(), |line, start| line.replace(start, &format!("\n{start}")));
        lines.replace("{\"kind\"", "\n  {\"kind\"").replace("\"threads\"", "\n\"threads\"")
    }

    #[test]
    fn a_block() {
        insta::assert_snapshot!(by_field(&shown(Update::Block(example::block()))), @r#"
        {"type":"block","event":"single","t_start_ns":1234567890,"t_end_ns":1286913568,"duration_ms":52.346,"threshold_ms":50.0,
        "pid":1234,"tid":1235,"thread":"uvicorn","runtime":"uvloop",
        "on_cpu_ms":1.846,"waiting_ms":50.0,"gil_ms":0.4,"run_queue_ms":0.1,"verdict":"code",
        "waits":[{"syscall":"recvfrom","on":"127.0.0.1:5432","ms":49.9},{"syscall":"futex","on":null,"ms":0.5}],
        "attribution":"exact","how":"asgi-frame",
        "requests":[{"id":"abc-123","method":"GET","path":"/items/7","route":"/items/{id}","client":"10.0.0.9:41022","trace_id":null,"ms":52.346}],
        "task":null,"victims":null,"hint":null,
        "stack":[
          {"kind":"native","function":"__recv","module":"libc.so.6","file":null,"line":null,"origin":"runtime"},
          {"kind":"python","function":"wait","file":"/venv/lib/python3.12/site-packages/psycopg/waiting.py","line":228,"origin":"library"},
          {"kind":"python","function":"Store.load","file":"/srv/shop/store.py","line":41,"origin":"user"},
          {"kind":"python","function":"read_item","file":"/srv/shop/api/items.py","line":12,"origin":"user"},
          {"kind":"python","function":"Handle._run","file":"/usr/lib/python3.12/asyncio/events.py","line":88,"origin":"runtime"}]}
        "#);
    }

    #[test]
    fn a_block_of_no_request() {
        let mut block = example::block();
        block.blame.owner = crate::core::event::Owner::NoRequest { task: Some("sweeper".to_owned()) };
        block.blame.stack = Default::default();
        block.waits.clear();
        let object: serde_json::Value = serde_json::from_str(&shown(Update::Block(block))).unwrap();
        insta::assert_snapshot!(
            ["attribution", "how", "requests", "task", "waits", "stack"]
                .map(|field| format!("{field}: {}", object[field]))
                .join("\n"),
            @r#"
        attribution: "exact"
        how: "none"
        requests: []
        task: "sweeper"
        waits: []
        stack: []
        "#
        );
    }

    #[test]
    fn a_block_that_goes_on() {
        insta::assert_snapshot!(by_field(&shown(Update::Ongoing(example::ongoing()))), @r#"
        {"type":"ongoing","t_start_ns":1234567890,"age_ms":2000.0,"threshold_ms":50.0,
        "pid":1234,"tid":1235,"thread":"uvicorn","runtime":"uvloop",
        "attribution":"exact","how":"asgi-frame",
        "requests":[{"id":"abc-123","method":"GET","path":"/items/7","route":"/items/{id}","client":"10.0.0.9:41022","trace_id":null,"ms":2000.0}],
        "task":null,"hint":null,
        "stack":[
          {"kind":"native","function":"__recv","module":"libc.so.6","file":null,"line":null,"origin":"runtime"},
          {"kind":"python","function":"wait","file":"/venv/lib/python3.12/site-packages/psycopg/waiting.py","line":228,"origin":"library"},
          {"kind":"python","function":"Store.load","file":"/srv/shop/store.py","line":41,"origin":"user"},
          {"kind":"python","function":"read_item","file":"/srv/shop/api/items.py","line":12,"origin":"user"},
          {"kind":"python","function":"Handle._run","file":"/usr/lib/python3.12/asyncio/events.py","line":88,"origin":"runtime"}]}
        "#);
    }

    #[test]
    fn a_block_with_victims_and_a_hint() {
        let object: serde_json::Value =
            serde_json::from_str(&shown(Update::Block(example::block_with_victims()))).unwrap();
        insta::assert_snapshot!(
            ["victims", "victim_delay_ms", "victim_requests", "victims_unread", "hint"]
                .map(|field| format!("{field}: {}", object[field]))
                .join("\n"),
            @r#"
            victims: 5
            victim_delay_ms: 261.728
            victim_requests: [{"client":"10.0.0.9:41022","id":"v-1","method":"GET","ms":52.346,"path":"/items/1","route":"/items/{id}","trace_id":null},{"client":"10.0.0.9:41022","id":"v-2","method":"GET","ms":52.346,"path":"/items/2","route":"/items/{id}","trace_id":null},{"client":"10.0.0.9:41022","id":"v-3","method":"GET","ms":52.346,"path":"/items/3","route":"/items/{id}","trace_id":null},{"client":"10.0.0.9:41022","id":"v-4","method":"GET","ms":52.346,"path":"/items/4","route":"/items/{id}","trace_id":null},{"client":"10.0.0.9:41022","id":"v-5","method":"GET","ms":52.346,"path":"/items/5","route":"/items/{id}","trace_id":null}]
            victims_unread: 2
            hint: "this PostgreSQL driver is synchronous: use psycopg's AsyncConnection or asyncpg"
            "#
        );
    }

    #[test]
    fn a_cumulative_block() {
        insta::assert_snapshot!(by_field(&shown(Update::Cumulative(example::cumulative()))), @r#"
        {"type":"block","event":"cumulative","t_start_ns":1234567890,"t_end_ns":1846567890,"duration_ms":300.0,"threshold_ms":200.0,"window_ms":1000.0,"total_ms":300.0,"count":20,
        "pid":1234,"tid":1235,"thread":"uvicorn","runtime":"uvloop",
        "on_cpu_ms":10.0,"waiting_ms":285.0,"gil_ms":0.0,"run_queue_ms":5.0,"verdict":"code",
        "waits":[{"syscall":"recvfrom","on":"127.0.0.1:5432","ms":285.0}],
        "attribution":"exact","how":"asgi-frame",
        "requests":[{"id":"abc-123","method":"GET","path":"/items/7","route":"/items/{id}","client":"10.0.0.9:41022","trace_id":null,"ms":240.0},{"id":"abc-124","method":"GET","path":"/items/8","route":"/items/{id}","client":"10.0.0.9:41022","trace_id":null,"ms":60.0}],
        "task":null,"routes":[{"method":"GET","route":"/items/{id}","ms":300.0,"share":1.0}],"lines":[{"function":"Store.load","file":"/srv/shop/store.py","line":41,"ms":285.0,"share":0.95},{"function":"dumps","file":"/venv/lib/python3.12/site-packages/orjson/core.py","line":5,"ms":15.0,"share":0.05}],"victims":null,"hint":"this PostgreSQL driver is synchronous: use psycopg's AsyncConnection or asyncpg",
        "stack":[
          {"kind":"native","function":"__recv","module":"libc.so.6","file":null,"line":null,"origin":"runtime"},
          {"kind":"python","function":"wait","file":"/venv/lib/python3.12/site-packages/psycopg/waiting.py","line":228,"origin":"library"},
          {"kind":"python","function":"Store.load","file":"/srv/shop/store.py","line":41,"origin":"user"},
          {"kind":"python","function":"read_item","file":"/srv/shop/api/items.py","line":12,"origin":"user"},
          {"kind":"python","function":"Handle._run","file":"/usr/lib/python3.12/asyncio/events.py","line":88,"origin":"runtime"}]}
        "#);
    }

    #[test]
    fn a_cumulative_block_that_goes_on() {
        insta::assert_snapshot!(by_field(&shown(Update::CumulativeOngoing(example::cumulative()))), @r#"
        {"type":"ongoing","event":"cumulative","t_start_ns":1234567890,"age_ms":612.0,"threshold_ms":200.0,"window_ms":1000.0,"total_ms":300.0,"count":20,
        "pid":1234,"tid":1235,"thread":"uvicorn","runtime":"uvloop",
        "attribution":"exact","how":"asgi-frame",
        "requests":[{"id":"abc-123","method":"GET","path":"/items/7","route":"/items/{id}","client":"10.0.0.9:41022","trace_id":null,"ms":300.0}],
        "task":null,"hint":"this PostgreSQL driver is synchronous: use psycopg's AsyncConnection or asyncpg",
        "stack":[
          {"kind":"native","function":"__recv","module":"libc.so.6","file":null,"line":null,"origin":"runtime"},
          {"kind":"python","function":"wait","file":"/venv/lib/python3.12/site-packages/psycopg/waiting.py","line":228,"origin":"library"},
          {"kind":"python","function":"Store.load","file":"/srv/shop/store.py","line":41,"origin":"user"},
          {"kind":"python","function":"read_item","file":"/srv/shop/api/items.py","line":12,"origin":"user"},
          {"kind":"python","function":"Handle._run","file":"/usr/lib/python3.12/asyncio/events.py","line":88,"origin":"runtime"}]}
        "#);
    }

    #[test]
    fn a_request_that_ended() {
        let line = shown(Update::Request(example::ended_request()));
        let lines = ["\"status\"", "\"held_ms\"", "\"steps\""];
        let shown = lines.iter().fold(line, |line, start| line.replace(start, &format!("\n{start}")));
        insta::assert_snapshot!(shown, @r#"
        {"type":"request","id":"abc-123","method":"GET","path":"/items/7","route":"/items/{id}","client":"10.0.0.9:41022","trace_id":null,
        "status":200,"t_start_ns":1234567890,"t_end_ns":1324567890,"duration_ms":90.0,"blocked_ms":52.346,
        "held_ms":60.5,"on_cpu_ms":10.0,"waiting_ms":50.0,"gil_ms":0.4,"run_queue_ms":0.1,"longest_step_ms":52.346,
        "steps":4,"blocks":1,"complete":true,"pid":1234}
        "#);
    }

    #[test]
    fn a_summary_counts_requests_where_they_are_told() {
        let mut summary = example::summary();
        summary.requests = 9;
        summary.measured.requests =
            RequestCounts { are_told: true, open: 1, frames_agree: 3, ..RequestCounts::default() };
        let mut out = Vec::new();
        JsonLines::new(&mut out).finish(&summary).unwrap();
        let object: serde_json::Value = serde_json::from_slice(&out).unwrap();
        let counts =
            r#"{"ended":9,"frames_agree":3,"frames_disagree":0,"never_ended":0,"open":1,"unpaired":0,"untracked":0}"#;
        assert_eq!(object["requests"].to_string(), counts);
    }

    #[test]
    fn a_summary() {
        let mut out = Vec::new();
        JsonLines::new(&mut out).finish(&example::summary()).unwrap();
        insta::assert_snapshot!(by_field(&String::from_utf8(out).unwrap()), @r#"
        {"type":"summary","duration_s":30.0,"ticks":48211,"blocks":12,"blocked_ms":1240.0,"cumulative_blocks":0,"cumulative_ms":0.0,"excluded_blocks":0,"excluded_ms":0.0,"lost_records":0,"records":{"sent":61,"received":61,"lost":0},"unsymbolized":2,"self_cpu_ms":210.4,
        "threads":[{
        "pid":1234,"tid":1235,"thread":"uvicorn","runtime":"uvloop","ticks":48211,"blocks":12,"blocked_ms":1240.0}]}
        "#);
    }

    #[test]
    fn no_dangerous_character_stands_for_itself() {
        for char in '\0'..='\u{ffff}' {
            let (text, mut line) = (format!("a{char}b"), Vec::new());
            text.serialize(&mut Serializer::with_formatter(&mut line, SafeStrings(CompactFormatter))).unwrap();
            let line = String::from_utf8(line).unwrap();
            assert!(!line.chars().any(is_dangerous), "{char:?}");
            assert_eq!(serde_json::from_str::<String>(&line).unwrap(), text);
        }
    }

    #[test]
    fn hostile_names_are_escaped_and_come_back_whole() {
        let block = example::hostile_block();
        let line = shown(Update::Block(block.clone()));
        assert!(!line.trim_end_matches('\n').chars().any(is_dangerous));
        let object: serde_json::Value = serde_json::from_str(&line).unwrap();
        let request = block.blame.request().unwrap();
        assert_eq!(object["requests"][0]["path"], request.path);
        assert_eq!(object["requests"][0]["id"], request.id);
    }

    #[test]
    fn a_full_disk_is_an_error() {
        struct Full;
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::StorageFull.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let error = JsonLines::new(Full).update(&Update::Block(example::block())).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    }
}
