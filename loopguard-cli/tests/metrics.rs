//! The metrics as a real Prometheus sees them, and the examples in docs/monitoring that are built on them.

mod support;

use std::{
    collections::BTreeSet,
    env, fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use support::{PATIENCE, Server, Setup, Watching, alone, can_trace, free_port, listens, pythons, request};

/// The folder of Prometheus and promtool. Says so when there is none; fails where that must not happen.
fn tools() -> Option<PathBuf> {
    let folder = env::var_os("LOOPGUARD_TEST_PROMETHEUS").map(PathBuf::from);
    let is_required = env::var_os("LOOPGUARD_REQUIRE_BPF").is_some_and(|value| value == "1");
    assert!(folder.is_some() || !is_required, "LOOPGUARD_TEST_PROMETHEUS is not set: run `cargo xtask test`");
    if folder.is_none() {
        eprintln!("SKIPPED: LOOPGUARD_TEST_PROMETHEUS is not set: run `cargo xtask test`");
    }
    folder
}

/// What promtool says of `input`; it must find nothing wrong.
fn promtool(tools: &Path, arguments: &[&str], input: &str) -> String {
    let mut promtool = Command::new(tools.join("promtool"))
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    promtool.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "promtool {arguments:?}: {said}\n{input}");
    said
}

fn documents() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/monitoring")
}

/// Every expression of the dashboard, with Grafana's own variables filled in.
fn dashboard_expressions() -> Vec<String> {
    let text = fs::read_to_string(documents().join("dashboard.json")).unwrap();
    let dashboard: Value = serde_json::from_str(&text).unwrap();
    let panels = dashboard["panels"].as_array().unwrap().iter();
    let targets = panels.flat_map(|panel| panel["targets"].as_array().unwrap());
    let fill_in = |expression: &str| expression.replace("$__rate_interval", "1m").replace("$instance", ".*");
    targets.map(|target| fill_in(target["expr"].as_str().unwrap())).collect()
}

#[test]
fn the_examples_are_valid() {
    // A program that is started while the other test looks for a free port has that port's listener until its exec.
    let _alone = alone();
    let Some(tools) = tools() else { return };
    promtool(&tools, &["check", "rules", documents().join("alerts.yml").to_str().unwrap()], "");
    let expressions = dashboard_expressions();
    assert!(expressions.len() >= 10);
    let rules: String = expressions
        .iter()
        .enumerate()
        .map(|(index, expression)| {
            format!("  - record: dashboard:{index}\n    expr: {}\n", Value::from(expression.as_str()))
        })
        .collect();
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("dashboard.yml");
    fs::write(&file, format!("groups:\n- name: dashboard\n  rules:\n{rules}")).unwrap();
    promtool(&tools, &["check", "rules", file.to_str().unwrap()], "");
}

struct Prometheus {
    child: Child,
    port: u16,
    folder: PathBuf,
}

impl Prometheus {
    /// Scrapes one target, every second.
    fn start(tools: &Path, target: &str) -> Self {
        let (port, folder) = (free_port(), Path::new(env!("CARGO_TARGET_TMPDIR")).join("prometheus"));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        let config = folder.join("prometheus.yml");
        let text = format!(
            "global: {{scrape_interval: 1s}}\nscrape_configs:\n- job_name: loopguard\n  static_configs: [{{targets: ['{target}']}}]\n"
        );
        fs::write(&config, text).unwrap();
        let child = Command::new(tools.join("prometheus"))
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.tsdb.path={}", folder.join("data").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(folder.join("log")).unwrap())
            .spawn()
            .unwrap();
        Self { child, port, folder }
    }

    /// The first value of a query's answer, once there is a number.
    fn query(&self, query: &str) -> f64 {
        let encoded: String = query.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let started = Instant::now();
        loop {
            if listens(self.port) {
                let text = format!("GET /api/v1/query?query={encoded} HTTP/1.0\r\nhost: test\r\n\r\n");
                let answer = request(self.port, &text);
                let body = answer.split("\r\n\r\n").nth(1).unwrap_or_default();
                let value: Value = serde_json::from_str(body).unwrap_or_default();
                let number = value["data"]["result"][0]["value"][1].as_str().and_then(|text| text.parse::<f64>().ok());
                if let Some(number) = number.filter(|number| number.is_finite()) {
                    return number;
                }
            }
            assert!(
                started.elapsed() < 2 * PATIENCE,
                "{query}: {}",
                fs::read_to_string(self.folder.join("log")).unwrap()
            );
            thread::sleep(Duration::from_millis(200));
        }
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_real_prometheus_scrapes_a_run() {
    let _alone = alone();
    let (true, Some(tools)) = (can_trace(), tools()) else { return };
    let Some(python) = pythons().into_iter().next_back() else { return };
    let setup = Setup { python: &python, server: "uvicorn-httptools", event_loop: "uvloop", environment: &[] };
    let server = Server::start(&setup);
    let address = format!("127.0.0.1:{}", free_port());
    let watching = Watching::start(server.pid(), &["--threshold", "150ms", "--prometheus", &address]);
    let prometheus = Prometheus::start(&tools, &address);
    thread::scope(|scope| {
        for number in 0..3 {
            let server = &server;
            scope.spawn(move || server.get("/wait/1500", &format!("waits-{number}")));
        }
        thread::sleep(Duration::from_millis(300));
        server.get("/block/sleep/400", "blocks");
    });

    let quantile = "histogram_quantile(0.99, sum by (le) (rate(loopguard_tick_seconds_bucket[1m])))";
    assert!(prometheus.query(quantile) > 0.0);
    assert!(prometheus.query("histogram_quantile(0.5, sum by (le) (loopguard_lag_seconds_bucket))") >= 0.2);
    assert!(prometheus.query("loopguard_blocking_total{method=\"GET\",route=\"/block/sleep/{ms}\"}") >= 1.0);
    let waited = "loopguard_blocked_seconds_total{route=\"/block/sleep/{ms}\",cause=\"waiting\"}";
    assert!(prometheus.query(waited) >= 0.4);
    assert!(prometheus.query("loopguard_victims_total{route=\"/wait/{ms}\"}") >= 1.0);
    assert!(prometheus.query("loopguard_loop_busy_seconds_total") > 0.4);
    assert_eq!(prometheus.query("loopguard_threshold_seconds"), 0.15);
    assert_eq!(prometheus.query("loopguard_lost_records_total"), 0.0);

    let port = address.rsplit_once(':').unwrap().1.parse().unwrap();
    let answer = request(port, "GET /metrics HTTP/1.1\r\nhost: test\r\n\r\n");
    let text = answer.split_once("\r\n\r\n").unwrap().1;
    promtool(&tools, &["check", "metrics"], text);
    // What the examples build on is there.
    let families: BTreeSet<&str> =
        text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    let alerts = fs::read_to_string(documents().join("alerts.yml")).unwrap();
    for expression in dashboard_expressions().iter().chain([&alerts]) {
        let words = expression.split(|char: char| !char.is_ascii_alphanumeric() && char != '_');
        for name in words.filter(|word| word.starts_with("loopguard_")) {
            let is_there = [name, name.trim_end_matches("_bucket")].iter().any(|name| families.contains(name));
            // Nothing added up here.
            assert!(is_there || name == "loopguard_cumulative_blocking_total", "{name} is in an example: {families:?}");
        }
    }
    let events = watching.stop();
    assert!(events.blocks_of("blocks").count() >= 1, "{:#?}", events.lines);
}
