//! Turns updates and live figures into metrics that Prometheus scrapes.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result};
use prometheus::core::{Collector, Desc};
use prometheus::proto::{
    Bucket, Counter, Gauge, Histogram as HistogramProto, LabelPair, Metric, MetricFamily, MetricType,
};
use prometheus::{
    CounterVec, Encoder as _, Histogram, HistogramOpts, IntCounter, IntCounterVec, Opts, Registry, TextEncoder,
};

use super::Sink;
use super::escape::printable;
use crate::core::event::{LoopInfo, Owner, RequestFacts};
use crate::core::incident::{Split, Update};
use crate::core::status::{Status, ThreadStatus};
use crate::core::summary::Summary;

mod openmetrics;
mod server;

/// Characters of a route that make a label.
const MAX_LABEL: usize = 200;
/// Requests that are remembered, so that one is not counted twice.
const MAX_REQUESTS: usize = 8192;
/// Lengths of blocks, in seconds.
const LAG_BUCKETS: [f64; 13] = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0];

/// The metrics of a run, and the server that shows them for as long as this lives.
pub struct Prometheus {
    metrics: Metrics,
    _server: server::Server,
}

impl Prometheus {
    /// Listens at once; the thread that serves does `first` before anything else.
    pub fn serve(address: SocketAddr, label_cap: usize, first: fn() -> io::Result<()>) -> Result<Self> {
        let metrics = Metrics::new(label_cap).context("define the metrics")?;
        let server = server::Server::start(address, metrics.registry.clone(), first)?;
        Ok(Self { metrics, _server: server })
    }
}

impl Sink for Prometheus {
    fn update(&mut self, update: &Update) -> io::Result<()> {
        self.metrics.update(update);
        Ok(())
    }

    fn status(&mut self, status: &Status) -> io::Result<()> {
        self.metrics.status(status);
        Ok(())
    }

    fn finish(&mut self, _summary: &Summary) -> io::Result<()> {
        Ok(())
    }
}

struct Metrics {
    registry: Registry,
    routes: Labels,
    blocking: IntCounterVec,
    cumulative: IntCounterVec,
    blocked_seconds: CounterVec,
    victims: IntCounterVec,
    victim_delay: CounterVec,
    lag: Histogram,
    requests: IntCounter,
    seen: SeenRequests,
    /// The server tells of its requests: those that are only seen are among them.
    is_told: bool,
    live: Arc<Mutex<LiveFigures>>,
}

impl Metrics {
    fn new(label_cap: usize) -> prometheus::Result<Self> {
        let registry = Registry::new();
        let by_route = ["method", "route"];
        let counter = |name: &str, help: &str| IntCounterVec::new(Opts::new(name, help), &by_route);
        let metrics = Self {
            routes: Labels::new(label_cap),
            blocking: counter(
                "loopguard_blocking_total",
                "Blocks: one owner held the event loop at least as long as the threshold.",
            )?,
            cumulative: counter(
                "loopguard_cumulative_blocking_total",
                "Cumulative blocks: steps below the threshold that added up within the window.",
            )?,
            blocked_seconds: CounterVec::new(
                Opts::new(
                    "loopguard_blocked_seconds_total",
                    "Time of blocks, cumulative ones among them, by where it went: on_cpu, waiting, gil or run_queue.",
                ),
                &["method", "route", "cause"],
            )?,
            victims: counter(
                "loopguard_victims_total",
                "Requests that were in flight while a block held their loop, once for each block.",
            )?,
            victim_delay: CounterVec::new(
                Opts::new(
                    "loopguard_victim_delay_seconds_total",
                    "Delay inflicted at most on requests in flight: the lengths of the blocks that held their loop.",
                ),
                &by_route,
            )?,
            lag: Histogram::with_opts(
                HistogramOpts::new(
                    "loopguard_lag_seconds",
                    "Lengths of blocks: for so long nothing else ran on the loop.",
                )
                .buckets(LAG_BUCKETS.to_vec()),
            )?,
            requests: IntCounter::new(
                "loopguard_requests_monitored_total",
                "Requests that loopguard saw: those it was told of, that ran in an old step, or that were in flight in a block.",
            )?,
            seen: SeenRequests::default(),
            is_told: false,
            live: Arc::default(),
            registry,
        };
        metrics.registry.register(Box::new(metrics.blocking.clone()))?;
        metrics.registry.register(Box::new(metrics.cumulative.clone()))?;
        metrics.registry.register(Box::new(metrics.blocked_seconds.clone()))?;
        metrics.registry.register(Box::new(metrics.victims.clone()))?;
        metrics.registry.register(Box::new(metrics.victim_delay.clone()))?;
        metrics.registry.register(Box::new(metrics.lag.clone()))?;
        metrics.registry.register(Box::new(metrics.requests.clone()))?;
        metrics.registry.register(Box::new(LiveCollector::new(Arc::clone(&metrics.live))?))?;
        Ok(metrics)
    }

    fn update(&mut self, update: &Update) {
        match update {
            Update::Block(block) => {
                let [method, route] = self.routes.of_owner(&block.blame.owner);
                self.blocking.with_label_values(&[&method, &route]).inc();
                self.blocked([&method, &route], &block.split);
                self.lag.observe(seconds(block.duration_ns()));
                self.see(block.blame.request());
                let Some(victims) = &block.victims else { return };
                for victim in &victims.requests {
                    self.see(Some(victim));
                    let labels = self.routes.of_request(victim);
                    self.held_up([&labels[0], &labels[1]], 1, block.duration_ns());
                }
                let unlisted = victims.count - victims.requests.len() as u64;
                if unlisted > 0 {
                    self.held_up(["", OTHER], unlisted, block.duration_ns());
                }
            }
            Update::Cumulative(block) => {
                let [method, route] = self.routes.of_owner(&block.blame.owner);
                self.cumulative.with_label_values(&[&method, &route]).inc();
                self.blocked([&method, &route], &block.split);
                for share in &block.owners {
                    if let Owner::Request { request, .. } = &share.owner {
                        self.see(Some(request));
                    }
                }
            }
            Update::Request(_) => {
                self.is_told = true;
                self.requests.inc();
            }
            Update::Ongoing(_) | Update::CumulativeOngoing(_) | Update::Threshold(_) => {}
        }
    }

    fn blocked(&self, [method, route]: [&str; 2], split: &Split) {
        for (cause, ns) in [
            ("on_cpu", split.on_cpu_ns),
            ("waiting", split.waiting_ns),
            ("gil", split.gil_ns),
            ("run_queue", split.run_queue_ns),
        ] {
            self.blocked_seconds.with_label_values(&[method, route, cause]).inc_by(seconds(ns));
        }
    }

    fn held_up(&self, labels: [&str; 2], count: u64, ns: u64) {
        self.victims.with_label_values(&labels).inc_by(count);
        self.victim_delay.with_label_values(&labels).inc_by(seconds(ns) * count as f64);
    }

    fn see(&mut self, request: Option<&Arc<RequestFacts>>) {
        if !self.is_told && request.is_some_and(|request| self.seen.is_new(&request.id)) {
            self.requests.inc();
        }
    }

    fn status(&mut self, status: &Status) {
        let mut live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        live.take(status);
    }
}

const OTHER: &str = "other";

/// Routes that have labels of their own; what comes when there are enough is `other`.
struct Labels {
    cap: usize,
    known: HashSet<[String; 2]>,
}

impl Labels {
    fn new(cap: usize) -> Self {
        Self { cap, known: HashSet::new() }
    }

    fn of_owner(&mut self, owner: &Owner) -> [String; 2] {
        match owner {
            Owner::Request { request, .. } => self.of_request(request),
            Owner::NoRequest { .. } | Owner::Task { .. } => self.capped([String::new(), "(no request)".to_owned()]),
            Owner::Unknown(_) => self.capped([String::new(), "(unknown)".to_owned()]),
        }
    }

    /// Templates only: of paths there is no end.
    fn of_request(&mut self, request: &RequestFacts) -> [String; 2] {
        let bounded = |text: &str| -> String { printable(text).to_string().chars().take(MAX_LABEL).collect() };
        let method = request.method.as_deref().map(bounded).unwrap_or_default();
        let route = request.route.as_deref().map_or_else(|| "(no route)".to_owned(), bounded);
        self.capped([method, route])
    }

    fn capped(&mut self, labels: [String; 2]) -> [String; 2] {
        if self.known.contains(&labels) {
            return labels;
        }
        if self.known.len() >= self.cap {
            return [String::new(), OTHER.to_owned()];
        }
        self.known.insert(labels.clone());
        labels
    }
}

/// Ids of requests lately seen.
#[derive(Default)]
struct SeenRequests {
    ids: HashSet<String>,
    order: VecDeque<String>,
}

impl SeenRequests {
    fn is_new(&mut self, id: &str) -> bool {
        if !self.ids.insert(id.to_owned()) {
            return false;
        }
        self.order.push_back(id.to_owned());
        if self.order.len() > MAX_REQUESTS
            && let Some(oldest) = self.order.pop_front()
        {
            self.ids.remove(&oldest);
        }
        true
    }
}

/// The newest figures, and how busy each loop was between the last two.
#[derive(Default)]
struct LiveFigures {
    status: Status,
    utilisation: HashMap<u32, f64>,
}

impl LiveFigures {
    fn take(&mut self, status: &Status) {
        let passed = status.now_ns.saturating_sub(self.status.now_ns);
        let before: HashMap<u32, u64> =
            self.status.threads.iter().map(|thread| (thread.info.tid, thread.busy_ns)).collect();
        self.utilisation = status
            .threads
            .iter()
            .filter(|thread| !thread.is_gone && passed > 0)
            .filter_map(|thread| {
                let busy = thread.busy_ns.saturating_sub(*before.get(&thread.info.tid)?);
                Some((thread.info.tid, (busy as f64 / passed as f64).min(1.0)))
            })
            .collect();
        self.status = status.clone();
    }
}

/// Shows the live figures as they are when somebody asks. Loops that are gone are not shown: their number has no end.
struct LiveCollector {
    live: Arc<Mutex<LiveFigures>>,
    descriptions: Vec<Desc>,
}

const BY_THREAD: [&str; 4] = ["pid", "tid", "thread", "runtime"];
/// Name, help, labels.
const LIVE: [(&str, &str, &[&str]); 8] = [
    ("loopguard_threshold_seconds", "How long one owner must hold the loop to be a block.", &BY_THREAD),
    ("loopguard_tick_seconds", "Lengths of the loop's ticks: from one poll to the next.", &BY_THREAD),
    ("loopguard_loop_busy_seconds_total", "Time the loop spent in ticks.", &BY_THREAD),
    ("loopguard_loop_utilization_ratio", "Part of the last second or so that the loop spent in ticks.", &BY_THREAD),
    ("loopguard_lost_records_total", "Records of the kernel programs that did not arrive.", &[]),
    ("loopguard_self_cpu_seconds_total", "CPU time of loopguard, its kernel programs included.", &[]),
    ("loopguard_unwatched_seconds_total", "Time in which loops were not watched, to keep to the budget.", &[]),
    ("loopguard_loops", "Event loops that are watched.", &[]),
];

impl LiveCollector {
    fn new(live: Arc<Mutex<LiveFigures>>) -> prometheus::Result<Self> {
        let describe = |(name, help, labels): &(&str, &str, &[&str])| {
            let labels = labels.iter().map(|label| (*label).to_owned()).collect();
            Desc::new((*name).to_owned(), (*help).to_owned(), labels, HashMap::new())
        };
        Ok(Self { live, descriptions: LIVE.iter().map(describe).collect::<prometheus::Result<_>>()? })
    }
}

impl Collector for LiveCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.descriptions.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        let status = &live.status;
        let threads: Vec<&ThreadStatus> = status.threads.iter().filter(|thread| !thread.is_gone).collect();
        let each = |metric: &dyn Fn(&ThreadStatus) -> Option<Metric>| -> Vec<Metric> {
            let labelled = |thread: &&ThreadStatus| {
                let mut metric = metric(thread)?;
                metric.set_label(labels(&thread.info));
                Some(metric)
            };
            threads.iter().filter_map(labelled).collect()
        };
        let families = [
            (MetricType::GAUGE, each(&|thread| Some(gauge(seconds(thread.threshold_ns))))),
            (MetricType::HISTOGRAM, each(&|thread| Some(ticks(thread)))),
            (MetricType::COUNTER, each(&|thread| Some(counter(seconds(thread.busy_ns))))),
            (MetricType::GAUGE, each(&|thread| live.utilisation.get(&thread.info.tid).map(|part| gauge(*part)))),
            (MetricType::COUNTER, vec![counter(status.lost_records as f64)]),
            (MetricType::COUNTER, vec![counter(status.self_cpu.as_secs_f64())]),
            (MetricType::COUNTER, vec![counter(status.unwatched.as_secs_f64())]),
            (MetricType::GAUGE, vec![gauge(threads.len() as f64)]),
        ];
        LIVE.iter()
            .zip(families)
            .filter(|(_, (_, metrics))| !metrics.is_empty())
            .map(|((name, help, _), (kind, metrics))| {
                let mut family = MetricFamily::default();
                family.set_name((*name).to_owned());
                family.set_help((*help).to_owned());
                family.set_field_type(kind);
                family.set_metric(metrics);
                family
            })
            .collect()
    }
}

fn labels(info: &LoopInfo) -> Vec<LabelPair> {
    let thread: String = printable(&info.thread).to_string().chars().take(MAX_LABEL).collect();
    let runtime = format!("{:?}", info.runtime).to_lowercase();
    let values = [info.pid.to_string(), info.tid.to_string(), thread, runtime];
    BY_THREAD
        .iter()
        .zip(values)
        .map(|(name, value)| {
            let mut pair = LabelPair::default();
            pair.set_name((*name).to_owned());
            pair.set_value(value);
            pair
        })
        .collect()
}

fn gauge(value: f64) -> Metric {
    let (mut metric, mut gauge) = (Metric::default(), Gauge::default());
    gauge.set_value(value);
    metric.set_gauge(gauge);
    metric
}

fn counter(value: f64) -> Metric {
    let (mut metric, mut counter) = (Metric::default(), Counter::default());
    counter.set_value(value);
    metric.set_counter(counter);
    metric
}

/// Bucket `n` of the kernel counts ticks below `2^n` microseconds; the last one all that are longer.
fn ticks(thread: &ThreadStatus) -> Metric {
    let (mut metric, mut histogram) = (Metric::default(), HistogramProto::default());
    let mut cumulative = 0;
    let mut buckets = Vec::new();
    let last = thread.tick_histogram.len() - 1;
    for (index, count) in thread.tick_histogram.iter().enumerate() {
        cumulative += u64::from(*count);
        if index == last {
            break;
        }
        let mut bucket = Bucket::default();
        bucket.set_cumulative_count(cumulative);
        bucket.set_upper_bound((1u64 << index) as f64 / 1e6);
        buckets.push(bucket);
    }
    histogram.set_bucket(buckets);
    histogram.set_sample_count(cumulative);
    histogram.set_sample_sum(seconds(thread.busy_ns));
    metric.set_histogram(histogram);
    metric
}

fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

/// What a scraper can be given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Exposition {
    /// Prometheus's own text format.
    Text,
    OpenMetrics,
}

impl Exposition {
    /// What an `Accept` header asks for; OpenMetrics only if it is named and not refused.
    fn negotiate(accept: Option<&str>) -> Self {
        let quality = |range: &str| -> f64 {
            let mut parameters = range.split(';').map(str::trim);
            let quality = parameters.find_map(|parameter| parameter.strip_prefix("q="));
            quality.map_or(1.0, |quality| quality.parse().unwrap_or(0.0))
        };
        let ranges = || accept.unwrap_or_default().split(',').map(str::trim);
        let best = |names: &[&str]| {
            let of_names = |range: &&str| names.contains(&range.split(';').next().unwrap_or_default().trim());
            ranges().filter(of_names).map(quality).fold(0.0, f64::max)
        };
        let openmetrics = best(&["application/openmetrics-text"]);
        if openmetrics > 0.0 && openmetrics >= best(&["text/plain"]) { Self::OpenMetrics } else { Self::Text }
    }

    fn content_type(self) -> &'static str {
        match self {
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }

    fn encode(self, families: &[MetricFamily]) -> String {
        match self {
            Self::Text => {
                let mut text = Vec::new();
                // Into memory, of families that the crate itself made: neither can fail.
                let _ = TextEncoder::new().encode(families, &mut text);
                String::from_utf8_lossy(&text).into_owned()
            }
            Self::OpenMetrics => openmetrics::encode(families),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::example;
    use super::*;
    use crate::core::event::{Runtime, StepMarks};

    fn metrics_of(updates: impl IntoIterator<Item = Update>, cap: usize) -> Metrics {
        let mut metrics = Metrics::new(cap).unwrap();
        updates.into_iter().for_each(|update| metrics.update(&update));
        metrics
    }

    fn status() -> Status {
        let mut tick_histogram = [0; loopguard_common::clock::TICK_BUCKETS];
        (tick_histogram[3], tick_histogram[12], tick_histogram[23]) = (100, 7, 1);
        let info = LoopInfo {
            pid: 1234,
            tid: 1235,
            thread: "uvi\"corn\n\x1b[2J".to_owned(),
            runtime: Runtime::Uvloop,
            worker: None,
            steps: StepMarks::Exact,
        };
        let thread = ThreadStatus {
            info,
            is_gone: false,
            threshold_ns: 50_000_000,
            ticks: 108,
            busy_ns: 9_500_000_000,
            tick_histogram,
            step_start_ns: None,
        };
        Status { now_ns: 1, threads: vec![thread], self_cpu: Duration::from_millis(250), ..Status::default() }
    }

    fn example_metrics() -> Metrics {
        let updates = [
            Update::Block(example::block_with_victims()),
            Update::Cumulative(example::cumulative()),
            Update::Block(example::hostile_block()),
        ];
        let mut metrics = metrics_of(updates, 200);
        metrics.status(&status());
        let mut later = status();
        (later.now_ns, later.threads[0].busy_ns) = (1_000_000_001, 9_750_000_000);
        metrics.status(&later);
        metrics
    }

    #[test]
    fn both_forms_say_the_same() {
        let families = example_metrics().registry.gather();
        let text = Exposition::Text.encode(&families);
        let open = Exposition::OpenMetrics.encode(&families);
        assert!(open.ends_with("# EOF\n"));
        let samples = |text: &str| -> Vec<String> {
            text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect()
        };
        let numbers = |text: &str| -> Vec<(String, f64)> {
            samples(text)
                .iter()
                .map(|line| {
                    let (name, value) = line.rsplit_once(' ').unwrap();
                    (name.replace("+Inf", "inf").replace(".0\"", "\""), value.parse().unwrap())
                })
                .collect()
        };
        assert_eq!(numbers(&text), numbers(&open));
        for text in [&text, &open] {
            assert!(!text.chars().any(|char| char != '\n' && super::super::escape::is_dangerous(char)), "{text}");
        }
        assert!(text.contains("loopguard_blocking_total{method=\"GET\",route=\"/items/{id}\"} 2"), "{text}");
        assert!(text.contains("loopguard_requests_monitored_total 8"), "{text}");
        assert!(text.contains("loopguard_victims_total{method=\"GET\",route=\"/items/{id}\"} 5"), "{text}");
        assert!(text.contains("runtime=\"uvloop\""), "{text}");
        assert!(text.contains("loopguard_loop_utilization_ratio{") && text.contains("} 0.25"), "{text}");
    }

    #[test]
    fn every_family_has_help_and_type() {
        let families = example_metrics().registry.gather();
        for text in [Exposition::Text.encode(&families), Exposition::OpenMetrics.encode(&families)] {
            let count = |what: &str| text.lines().filter(|line| line.starts_with(what)).count();
            assert_eq!((count("# HELP"), count("# TYPE")), (families.len(), families.len()), "{text}");
        }
    }

    #[test]
    fn seventeen_thousand_paths_leave_a_capped_number_of_label_sets() {
        let block = |number: u32, route: Option<String>| {
            let mut block = example::block();
            let Owner::Request { request, how } = block.blame.owner else { unreachable!() };
            let request = RequestFacts { path: format!("/raw/{number}"), route, ..(*request).clone() };
            block.blame.owner = Owner::Request { request: Arc::new(request), how };
            Update::Block(block)
        };
        let label_sets = |metrics: &Metrics, name: &str| {
            let families = metrics.registry.gather();
            families.iter().find(|family| family.name() == name).map_or(0, |family| family.get_metric().len())
        };
        // A framework without templates: paths are no labels.
        let metrics = metrics_of((0..17_000).map(|number| block(number, None)), 200);
        assert_eq!(label_sets(&metrics, "loopguard_blocking_total"), 1);
        // Templates without end, as a broken router has them.
        let metrics = metrics_of((0..17_000).map(|number| block(number, Some(format!("/raw/{number}")))), 200);
        assert_eq!(label_sets(&metrics, "loopguard_blocking_total"), 201);
        assert_eq!(label_sets(&metrics, "loopguard_blocked_seconds_total"), 4 * 201);
        assert!(metrics.seen.ids.len() <= MAX_REQUESTS);
    }

    #[test]
    fn openmetrics_is_given_to_who_asks_for_it() {
        let negotiate = |accept: &str| Exposition::negotiate(Some(accept));
        // As Prometheus 2.53 sends it.
        let prometheus = "application/openmetrics-text;version=1.0.0;escaping=values;q=0.5,\
                          application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
        assert_eq!(negotiate(prometheus), Exposition::OpenMetrics);
        assert_eq!(negotiate("text/plain, application/openmetrics-text;q=0.5"), Exposition::Text);
        assert_eq!(negotiate("application/openmetrics-text;q=0"), Exposition::Text);
        assert_eq!(negotiate("application/openmetrics-text;q=high"), Exposition::Text);
        assert_eq!(negotiate("*/*"), Exposition::Text);
        assert_eq!(Exposition::negotiate(None), Exposition::Text);
    }
}
