//! Turns the blocks of a run into a verdict for continuous integration: failed or not, what is allowed, and reports.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use super::Sink;
use super::escape::{printable, word};
use crate::core::event::{Frame, Owner};
use crate::core::incident::{Blame, Split, Update, user_line};
use crate::core::summary::{Summary, Total};

/// Lines that are told apart; a run with more has other worries.
const MAX_FINDINGS: usize = 1000;

/// Lines that may block, each with a reason.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Allowed {
    entries: Vec<AllowedLine>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AllowedLine {
    /// A path or the end of one.
    file: String,
    place: Place,
    pub reason: String,
    /// Line of the file it stands in.
    number: usize,
    is_used: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    Line(u32),
    Function(String),
}

impl Allowed {
    pub fn read(path: &Path) -> Result<Self> {
        let text =
            fs::read_to_string(path).with_context(|| format!("cannot read the allow file {}", path.display()))?;
        Self::parse(&text, &path.display().to_string())
    }

    /// One entry a line: `FILE:LINE REASON` or `FILE:FUNCTION REASON`; `#` begins a comment.
    fn parse(text: &str, name: &str) -> Result<Self> {
        let mut entries = Vec::new();
        for (line, number) in text.lines().zip(1..) {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (place, reason) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
            let Some((file, place)) =
                place.rsplit_once(':').filter(|(file, place)| !file.is_empty() && !place.is_empty())
            else {
                bail!(
                    "{name}:{number}: an entry is FILE:LINE or FILE:FUNCTION and a reason, like `app/store.py:41 why`"
                );
            };
            let reason = reason.trim().trim_start_matches('#').trim();
            if reason.is_empty() {
                bail!("{name}:{number}: the reason is missing: say behind the place why it may block");
            }
            let place = place.parse().map_or_else(|_| Place::Function(place.to_owned()), Place::Line);
            entries.push(AllowedLine {
                file: file.to_owned(),
                place,
                reason: reason.to_owned(),
                number,
                is_used: false,
            });
        }
        Ok(Self { entries })
    }

    /// The reason for which a line may block.
    fn reason(&mut self, frame: &Frame) -> Option<String> {
        let entry = self.entries.iter_mut().find(|entry| entry.covers(frame))?;
        entry.is_used = true;
        Some(entry.reason.clone())
    }

    /// Entries that nothing matched, as they stand in the file.
    pub fn stale(&self) -> Vec<String> {
        self.entries.iter().filter(|entry| !entry.is_used).map(AllowedLine::to_string).collect()
    }
}

impl AllowedLine {
    fn covers(&self, frame: &Frame) -> bool {
        let Some(file) = frame.file.as_deref() else { return false };
        // Whole components: `store.py` is not `bookstore.py`.
        let is_file =
            file == self.file || file.strip_suffix(self.file.as_str()).is_some_and(|rest| rest.ends_with('/'));
        is_file
            && match &self.place {
                Place::Line(line) => frame.line == Some(*line),
                Place::Function(function) => *frame.function == **function,
            }
    }
}

impl std::fmt::Display for AllowedLine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { file, place, number, .. } = self;
        match place {
            Place::Line(line) => write!(f, "{file}:{line} (line {number} of the allow file)"),
            Place::Function(function) => write!(f, "{file}:{function} (line {number} of the allow file)"),
        }
    }
}

/// Where reports go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reports {
    pub junit: Option<PathBuf>,
    pub markdown: Option<PathBuf>,
}

/// What a line did, by line and whose blocks they were.
#[derive(Clone, Debug, Default, PartialEq)]
struct Finding {
    total: Total,
    cumulative: u64,
    /// Blocks that make the run fail, were they not allowed.
    failing: u64,
    allowed: Option<String>,
    hint: Option<&'static str>,
}

/// Judges the blocks of a run. `fails` says of a length whether a block of it makes the run fail.
pub struct Gate<F> {
    allowed: Allowed,
    reports: Reports,
    fails: F,
    findings: BTreeMap<(String, String), Finding>,
    failed: u64,
}

impl<F: Fn(u64) -> bool> Gate<F> {
    pub fn new(allowed: Allowed, reports: Reports, fails: F) -> Self {
        Self { allowed, reports, fails, findings: BTreeMap::new(), failed: 0 }
    }

    /// Blocks that make the run fail.
    pub fn failed(&self) -> u64 {
        self.failed
    }

    pub fn stale(&self) -> Vec<String> {
        self.allowed.stale()
    }

    /// `split` is of the whole block; time without a CPU is the machine's, and makes no run fail.
    fn add(&mut self, blame: &Blame, (split, least_ns): (&Split, u64), hint: Option<&'static str>) -> &mut Finding {
        let ns = split.total_ns();
        let own_ns = ns.saturating_sub(split.run_queue_ns);
        let frame = user_line(&blame.stack).map(|line| line.frame).or(blame.stack.frames.first().map(|frame| &**frame));
        let allowed = frame.and_then(|frame| self.allowed.reason(frame));
        let is_failing = own_ns >= least_ns && (self.fails)(own_ns);
        if is_failing && allowed.is_none() {
            self.failed += 1;
        }
        let mut key = (frame.map_or_else(|| "line unknown".to_owned(), place), whose(&blame.owner));
        if self.findings.len() >= MAX_FINDINGS && !self.findings.contains_key(&key) {
            key = ("(other)".to_owned(), String::new());
        }
        let finding = self.findings.entry(key).or_default();
        finding.total.add(ns);
        finding.failing += u64::from(is_failing);
        finding.allowed = allowed;
        finding.hint = hint.or(finding.hint);
        finding
    }

    fn junit(&self) -> String {
        let findings = self.findings.values();
        let failures = findings.clone().filter(|finding| finding.is_failure()).count();
        let skipped = findings.clone().filter(|finding| finding.allowed.is_some()).count() + self.stale().len();
        let tests = self.findings.len().max(1) + self.stale().len();
        let mut xml = format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuites>\n<testsuite name=\"loopguard\" tests=\"{tests}\" \
             failures=\"{failures}\" errors=\"0\" skipped=\"{skipped}\">\n"
        );
        if self.findings.is_empty() {
            xml += "<testcase classname=\"loopguard\" name=\"no blocking\"/>\n";
        }
        for ((line, owner), finding) in &self.findings {
            let seconds = finding.total.blocked_ns as f64 / 1e9;
            let (name, class) = (xml_text(line), xml_text(owner));
            let _ = write!(xml, "<testcase classname=\"{class}\" name=\"{name}\" time=\"{seconds:.3}\">");
            let text = xml_text(&finding.sentence());
            match &finding.allowed {
                Some(reason) => {
                    let _ = write!(xml, "<skipped message=\"allowed: {}\"/>", xml_text(reason));
                }
                None if finding.failing > 0 => {
                    let hint = finding.hint.map(xml_text).unwrap_or_default();
                    let _ = write!(xml, "<failure type=\"blocking\" message=\"{text}\">{hint}</failure>");
                }
                None => {
                    let _ = write!(xml, "<system-out>{text}</system-out>");
                }
            }
            xml += "</testcase>\n";
        }
        for entry in self.stale() {
            let name = xml_text(&entry);
            let _ = writeln!(
                xml,
                "<testcase classname=\"allow file\" name=\"{name}\"><skipped message=\"stale: nothing matched it\"/></testcase>"
            );
        }
        xml + "</testsuite>\n</testsuites>\n"
    }

    fn markdown(&self, summary: &Summary) -> String {
        let blocks = summary.total.blocks + summary.cumulative.blocks;
        let verdict = match (self.failed, blocks) {
            (0, 0) => "No blocking found.".to_owned(),
            (0, _) => format!("{blocks} blocks found; none makes this run fail."),
            (failed, _) => format!("**{failed} of {blocks} blocks make this run fail.**"),
        };
        let watched = summary.measured.duration.as_secs_f64();
        let mut text = format!("## loopguard\n\n{verdict} Watched for {watched:.1} s.\n");
        if !self.findings.is_empty() {
            text += "\n| line | whose | blocks | in all | longest | |\n|---|---|---:|---:|---:|---|\n";
            let mut sorted: Vec<_> = self.findings.iter().collect();
            sorted.sort_by_key(|(_, finding)| (!finding.is_failure(), std::cmp::Reverse(finding.total.blocked_ns)));
            for ((line, owner), finding) in sorted {
                let Total { blocks, blocked_ns, longest_ns } = finding.total;
                let [in_all, longest] = [blocked_ns, longest_ns].map(|ns| format!("{:.1} ms", ns as f64 / 1e6));
                let remark = match (&finding.allowed, finding.hint) {
                    (Some(reason), _) => format!("allowed: {}", markdown_text(reason)),
                    (None, Some(hint)) => markdown_text(hint),
                    (None, None) => String::new(),
                };
                let (line, owner) = (markdown_text(line), markdown_text(owner));
                let _ = writeln!(text, "| {line} | {owner} | {blocks} | {in_all} | {longest} | {remark} |");
            }
        }
        let stale = self.stale();
        if !stale.is_empty() {
            text += "\nStale entries of the allow file, which nothing matched:\n\n";
            for entry in stale {
                let _ = writeln!(text, "- {}", markdown_text(&entry));
            }
        }
        text
    }
}

impl Finding {
    fn is_failure(&self) -> bool {
        self.failing > 0 && self.allowed.is_none()
    }

    fn sentence(&self) -> String {
        let Total { blocks, blocked_ns, longest_ns } = self.total;
        let [in_all, longest] = [blocked_ns, longest_ns].map(|ns| ns as f64 / 1e6);
        let cumulative = if self.cumulative > 0 { format!(", {} cumulative", self.cumulative) } else { String::new() };
        format!("blocked the event loop {blocks} times{cumulative}, {in_all:.1} ms in all, {longest:.1} ms at most")
    }
}

impl<F: Fn(u64) -> bool> Sink for Gate<F> {
    fn update(&mut self, update: &Update) -> io::Result<()> {
        match update {
            Update::Block(block) => {
                self.add(&block.blame, (&block.split, block.threshold_ns), block.hint);
            }
            Update::Cumulative(block) => {
                self.add(&block.blame, (&block.split, block.threshold_ns), block.hint).cumulative += 1;
            }
            _ => {}
        }
        Ok(())
    }

    fn finish(&mut self, summary: &Summary) -> io::Result<()> {
        if let Some(path) = &self.reports.junit {
            fs::write(path, self.junit())?;
        }
        if let Some(path) = &self.reports.markdown {
            fs::write(path, self.markdown(summary))?;
        }
        Ok(())
    }
}

fn place(frame: &Frame) -> String {
    match (frame.file.as_deref().or(frame.module.as_deref()), frame.line) {
        (Some(file), Some(line)) => format!("{file}:{line} {}", frame.function),
        (Some(file), None) => format!("{file} {}", frame.function),
        (None, _) => frame.function.to_string(),
    }
}

fn whose(owner: &Owner) -> String {
    match owner {
        Owner::Request { request, .. } => {
            let route = request.route.as_deref().unwrap_or(&request.path);
            format!("{} {}", word(request.method.as_deref().unwrap_or("?")), word(route))
        }
        Owner::NoRequest { task: Some(task) } | Owner::Task { task } => format!("task {task}"),
        Owner::NoRequest { task: None } => "no request".to_owned(),
        Owner::Unknown(_) => "request unknown".to_owned(),
    }
}

/// Without control characters, of which XML allows few, and fit for an attribute.
fn xml_text(text: &str) -> String {
    let text = printable(text).to_string();
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// One cell of a table that is text and nothing else.
fn markdown_text(text: &str) -> String {
    let mut escaped = String::new();
    for char in printable(text).to_string().chars() {
        if matches!(char, '|' | '`' | '*' | '_' | '[' | ']' | '<' | '>' | '\\' | '#' | '!') {
            escaped.push('\\');
        }
        escaped.push(char);
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::super::example;
    use super::*;

    fn gate(allowed: &str) -> Gate<impl Fn(u64) -> bool> {
        let allowed = Allowed::parse(allowed, "allow.txt").unwrap();
        Gate::new(allowed, Reports::default(), |ns| ns >= 50_000_000)
    }

    fn judged(allowed: &str) -> Gate<impl Fn(u64) -> bool> {
        let mut gate = gate(allowed);
        gate.update(&Update::Block(example::block())).unwrap();
        gate.update(&Update::Cumulative(example::cumulative())).unwrap();
        gate.update(&Update::Block(example::hostile_block())).unwrap();
        gate
    }

    #[test]
    fn what_is_not_allowed_fails_the_run() {
        assert_eq!(gate("").failed(), 0);
        assert_eq!(judged("").failed(), 3);
        assert_eq!(judged("store.py:41 until the driver is replaced").failed(), 1);
        assert_eq!(judged("shop/store.py:Store.load until the driver is replaced").failed(), 1);
        assert_eq!(judged("tore.py:41 another file").failed(), 3);
        assert_eq!(judged("store.py:42 another line").failed(), 3);
    }

    #[test]
    fn time_without_a_cpu_makes_no_run_fail() {
        let mut gate = gate("");
        let mut block = example::block();
        block.split = Split { on_cpu_ns: 2_345_678, run_queue_ns: 50_000_000, ..Split::default() };
        gate.update(&Update::Block(block)).unwrap();
        assert_eq!((gate.failed(), gate.findings.len()), (0, 1));
    }

    #[test]
    fn entries_that_match_nothing_are_stale() {
        let gate = judged("# known\n\nstore.py:41 until May\nstore.py:7  gone\n/srv/a.py:f # gone too\n");
        assert_eq!(gate.stale(), ["store.py:7 (line 4 of the allow file)", "/srv/a.py:f (line 5 of the allow file)"]);
    }

    #[test]
    fn a_wrong_allow_file_is_one_clear_sentence() {
        let wrong = |text: &str| Allowed::parse(text, "allow.txt").unwrap_err().to_string();
        assert!(wrong("a.py:1 fine\nstore.py:41").starts_with("allow.txt:2: the reason is missing"));
        assert!(wrong("store.py because").starts_with("allow.txt:1: an entry is FILE:LINE"));
        assert!(wrong(":7 because").starts_with("allow.txt:1: an entry is FILE:LINE"));
    }

    #[test]
    fn reports() {
        let gate = judged("store.py:41 until the driver is replaced\nold.py:3 gone");
        insta::assert_snapshot!(gate.junit().replace(&"x".repeat(200), "(200 x)"), @r#"
        <?xml version="1.0" encoding="UTF-8"?>
        <testsuites>
        <testsuite name="loopguard" tests="3" failures="1" errors="0" skipped="2">
        <testcase classname="GET /items/{id}" name="/srv/shop/store.py:41 Store.load" time="0.352"><skipped message="allowed: until the driver is replaced"/></testcase>
        <testcase classname="GET /items/{id}" name="/srv/shop/\u{2066}evil\u{2069}.py\x09:3 f\x0auser code" time="0.052"><failure type="blocking" message="blocked the event loop 1 times, 52.3 ms in all, 52.3 ms at most"></failure></testcase>
        <testcase classname="allow file" name="old.py:3 (line 2 of the allow file)"><skipped message="stale: nothing matched it"/></testcase>
        </testsuite>
        </testsuites>
        "#);
        insta::assert_snapshot!(gate.markdown(&example::summary()).replace(&"x".repeat(200), "(200 x)"), @r"
        ## loopguard

        **1 of 12 blocks make this run fail.** Watched for 30.0 s.

        | line | whose | blocks | in all | longest | |
        |---|---|---:|---:|---:|---|
        | /srv/shop/\\u{2066}evil\\u{2069}.py\\x09:3 f\\x0auser code | GET /items/{id} | 1 | 52.3 ms | 52.3 ms |  |
        | /srv/shop/store.py:41 Store.load | GET /items/{id} | 2 | 352.3 ms | 300.0 ms | allowed: until the driver is replaced |

        Stale entries of the allow file, which nothing matched:

        - old.py:3 (line 2 of the allow file)
        ");
        let clean = gate_without_findings();
        insta::assert_snapshot!(clean.junit(), @r#"
        <?xml version="1.0" encoding="UTF-8"?>
        <testsuites>
        <testsuite name="loopguard" tests="1" failures="0" errors="0" skipped="0">
        <testcase classname="loopguard" name="no blocking"/>
        </testsuite>
        </testsuites>
        "#);
    }

    fn gate_without_findings() -> Gate<impl Fn(u64) -> bool> {
        gate("")
    }

    #[test]
    fn findings_are_bounded() {
        let mut gate = gate("");
        for number in 0..3000 {
            let mut block = example::block();
            block.blame.owner = Owner::NoRequest { task: Some(format!("task {number}")) };
            gate.update(&Update::Block(block)).unwrap();
        }
        assert_eq!((gate.findings.len(), gate.failed()), (MAX_FINDINGS + 1, 3000));
    }
}
