//! Turns what a guest's console showed into a verdict: whether every block was found, named and explained.

use std::collections::BTreeMap;
use std::fmt;

use serde_json::Value;

use super::Expected;

/// The parts of a block's time must add up to it this closely.
const SUM_TOLERANCE: f64 = 0.01;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// What is said if there are no complaints.
    summary: String,
    complaints: Vec<String>,
}

impl Verdict {
    pub fn passed(&self) -> bool {
        self.complaints.is_empty()
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.passed() { f.write_str(&self.summary) } else { write!(f, "FAILED: {}", self.complaints.join("; ")) }
    }
}

/// `marked` holds the lines of the server that are marked as blocking.
pub fn judge(console: &str, expected: Expected, marked: &BTreeMap<String, u64>) -> Verdict {
    let mut complaints = Vec::new();
    let mut said = Vec::new();
    let runs: Vec<Run> = console.split("\nLOOP ").skip(1).map(Run::read).collect();
    if runs.is_empty() || !console.lines().any(|line| line == "END") {
        complaints.push("the guest did not come to its end".to_owned());
    }
    for run in &runs {
        let result = match expected {
            Expected::Works => run.works(marked).map(|text| format!("{}: {text}", run.event_loop)),
            // The same sentence for each loop is one.
            Expected::Refused => run.is_refused(),
        };
        match result {
            Ok(text) => said.push(text),
            Err(text) => complaints.push(format!("{}: {text}", run.event_loop)),
        }
    }
    said.dedup();
    Verdict { summary: said.join("; "), complaints }
}

/// One event loop's part of the console.
struct Run<'a> {
    event_loop: &'a str,
    /// Tag and text.
    lines: Vec<(&'a str, &'a str)>,
}

impl<'a> Run<'a> {
    fn read(text: &'a str) -> Self {
        let mut lines = text.lines();
        Self {
            event_loop: lines.next().unwrap_or_default(),
            lines: lines.filter_map(|line| line.split_once(' ')).collect(),
        }
    }

    fn tagged(&self, tag: &str) -> impl Iterator<Item = &'a str> {
        self.lines.iter().filter(move |(found, _)| *found == tag).map(|(_, text)| *text)
    }

    fn objects(&self, tag: &str) -> Vec<Value> {
        self.tagged(tag).filter_map(|text| serde_json::from_str(text).ok()).collect()
    }

    fn last_message(&self) -> &'a str {
        self.tagged("MESSAGE").last().unwrap_or("loopguard said nothing")
    }

    fn works(&self, marked: &BTreeMap<String, u64>) -> Result<String, String> {
        if self.tagged("EXIT").next() != Some("0") {
            return Err(self.last_message().to_owned());
        }
        if self.tagged("DOCTOR-EXIT").next() != Some("0") {
            let missing = self.tagged("DOCTOR").find(|line| line.starts_with("MISSING"));
            return Err(format!("doctor: {}", missing.unwrap_or("failed")));
        }
        let events = self.objects("EVENT");
        let of_type = |name: &str| events.iter().filter(|event| event["type"] == name).collect::<Vec<_>>();
        let sent: Vec<Value> = self.objects("SENT").into_iter().filter(|sent| sent["id"] != "warm-up").collect();
        if sent.is_empty() {
            return Err("no request was sent".to_owned());
        }
        let blocks: Vec<&Value> = of_type("block").into_iter().filter(|block| block["event"] == "single").collect();
        for (i, request) in sent.iter().enumerate() {
            // Steps are marked once one has been late: the first is a tick cut by captures.
            let attributions: &[&str] = if i == 0 { &["exact", "inferred"] } else { &["exact"] };
            check_block(request, (&blocks, attributions), marked)?;
        }
        for block in &blocks {
            let owned = block["requests"].as_array().is_some_and(|requests| !requests.is_empty());
            if owned && !sent.iter().any(|request| request["id"] == block["requests"][0]["id"]) {
                return Err(format!("a block is charged to {}", block["requests"][0]["path"]));
            }
        }
        match of_type("summary").first() {
            Some(summary) if summary["lost_records"] == 0 => {
                Ok(format!("{} of {} blocks named", sent.len(), sent.len()))
            }
            Some(summary) => Err(format!("{} records lost", summary["lost_records"])),
            None => Err("no summary".to_owned()),
        }
    }

    fn is_refused(&self) -> Result<String, String> {
        let refusal = self.last_message();
        let doctor = self.tagged("DOCTOR").any(|line| line.starts_with("MISSING"));
        if refusal.contains("lacks what loopguard needs") && doctor && self.tagged("DOCTOR-EXIT").next() == Some("2") {
            return Ok(format!("refused: \"{}\"", refusal.trim_start_matches("loopguard: ")));
        }
        Err(format!("no clear refusal: {refusal}"))
    }
}

fn check_block(
    request: &Value,
    (blocks, attributions): (&[&Value], &[&str]),
    marked: &BTreeMap<String, u64>,
) -> Result<(), String> {
    let (path, id) = (request["path"].as_str().unwrap_or_default(), &request["id"]);
    let about = |what: &str| Err(format!("{path}: {what}"));
    if request["status"] != 200 {
        return about("the server failed");
    }
    let Some(block) = blocks.iter().find(|block| block["requests"][0]["id"] == *id) else {
        return about("its block was not found");
    };
    let number = |field: &str| block[field].as_f64().unwrap_or(-1.0);
    if block["requests"][0]["path"] != path {
        return about("another path is named");
    }
    if !block["attribution"].as_str().is_some_and(|how| attributions.contains(&how)) {
        return about(&format!("its request is {}", block["attribution"]));
    }
    let Some(asked) = path.rsplit('/').next().and_then(|ms| ms.parse::<f64>().ok()) else {
        return about("its path does not say for how long");
    };
    let duration = number("duration_ms");
    if duration < asked * (1.0 - SUM_TOLERANCE) {
        return about(&format!("blocked for {asked} ms, but {duration} ms are reported"));
    }
    let (on_cpu, waiting) = (number("on_cpu_ms"), number("waiting_ms"));
    let sum = on_cpu + waiting + number("gil_ms") + number("run_queue_ms");
    if (sum - duration).abs() > duration * SUM_TOLERANCE {
        return about(&format!("the parts make {sum} ms of {duration} ms"));
    }
    let is_cpu = path.starts_with("/block/cpu/");
    // Of the time that was asked for, nearly all: the emulated processor adds its own.
    if (if is_cpu { on_cpu } else { waiting }) < asked * 0.9 {
        return about(&format!("{on_cpu} ms on the CPU and {waiting} ms waiting"));
    }
    let function = match path.split('/').nth(2) {
        Some("nested") => "nested".to_owned(),
        name => format!("block_{}", name.unwrap_or_default()),
    };
    let in_app =
        block["stack"].as_array().into_iter().flatten().find(|frame| {
            frame["kind"] == "python" && frame["file"].as_str().is_some_and(|file| file.ends_with("app.py"))
        });
    let Some(frame) = in_app.filter(|frame| frame["function"] == *function) else {
        return about(&format!("{function} is not the innermost function of the server's"));
    };
    match marked.get(&function) {
        Some(line) if frame["line"] != *line => about(&format!("line {} instead of {line}", frame["line"])),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: &str = r#"EVENT {"type":"block","event":"single","duration_ms":510.0,"on_cpu_ms":9.0,"waiting_ms":500.0,"gil_ms":0.0,"run_queue_ms":1.0,"attribution":"exact","requests":[{"id":"g-0","path":"/block/sleep/500"}],"stack":[{"kind":"native","function":"sleep"},{"kind":"python","function":"block_sleep","file":"/guest/app.py","line":59}]}"#;

    fn console(block: &str) -> String {
        format!(
            "RELEASE 6.1\nLOOP asyncio\nDOCTOR ok       kernel  Linux\nDOCTOR-EXIT 0\n\
             SENT {{\"path\":\"/block/sleep/500\",\"id\":\"g-0\",\"status\":200}}\n{block}\n\
             EVENT {{\"type\":\"summary\",\"lost_records\":0}}\nEXIT 0\nEND\n"
        )
    }

    fn said(console: &str, expected: Expected) -> String {
        judge(console, expected, &BTreeMap::from([("block_sleep".to_owned(), 59)])).to_string()
    }

    #[test]
    fn a_named_block_passes() {
        assert_eq!(said(&console(BLOCK), Expected::Works), "asyncio: 1 of 1 blocks named");
    }

    #[test]
    fn what_is_wrong_with_a_block_is_said() {
        let works = |from, to| said(&console(&BLOCK.replace(from, to)), Expected::Works);
        assert!(works("exact", "unknown").contains("its request is \"unknown\""));
        assert!(works("\"path\":\"/block", "\"path\":\"/other").contains("another path"));
        assert!(works("g-0", "g-1").contains("its block was not found"));
        assert!(works("59", "60").contains("line 60 instead of 59"));
        assert!(works("block_sleep\"", "other\"").contains("block_sleep is not the innermost"));
        assert!(works("\"gil_ms\":0.0", "\"gil_ms\":20.0").contains("the parts make"));
        assert!(works("510.0", "400.0").contains("are reported"));
        assert!(works("EVENT", "GARBAGE").contains("its block was not found"));
    }

    #[test]
    fn a_guest_that_stops_early_has_not_passed() {
        assert!(said("SeaBIOS", Expected::Works).contains("did not come to its end"));
        assert!(said("SeaBIOS", Expected::Refused).contains("did not come to its end"));
        assert!(said(&console(BLOCK).replace("END\n", ""), Expected::Works).starts_with("FAILED"));
    }

    #[test]
    fn a_refusal_must_be_one() {
        let refusing = "\nLOOP asyncio\nDOCTOR MISSING  registers\nDOCTOR-EXIT 2\n\
                        MESSAGE loopguard: this kernel lacks what loopguard needs: x\nEND\n";
        assert_eq!(said(refusing, Expected::Refused), "refused: \"this kernel lacks what loopguard needs: x\"");
        assert!(said(&console(BLOCK), Expected::Refused).starts_with("FAILED"));
    }
}
