//! The options that detection, the other outputs and the CI gate bring to `attach` and `run`.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args as ClapArgs, Parser};

use crate::args::time;
use crate::core::{
    cumulative::CumulativeSettings,
    profile::Settings,
    routes::RouteRules,
    summary::MAX_LABELS,
    threshold::{AdaptiveSettings, ThresholdRule},
};

/// Routes of health checks and of monitoring, whose blocks nobody wants to hear of.
const EXCLUDED: [&str; 4] = ["/health", "/healthz", "/ready", "/metrics"];

/// What is a block.
#[derive(Clone, Debug, PartialEq, ClapArgs)]
#[command(next_help_heading = "What is a block")]
pub struct Detection {
    /// How long one owner must hold the loop to be reported, 1ms to 60s; `auto`: by the loop's own ticks
    #[arg(long, value_name = "TIME|auto", default_value = "50ms", value_parser = threshold)]
    pub threshold: Threshold,

    /// With `--threshold auto`: which part of the loop's ticks is shorter than its baseline
    #[arg(long, value_name = "PART", default_value = "0.95", value_parser = percentile)]
    pub threshold_percentile: f64,

    /// With `--threshold auto`: how many times its baseline a block is
    #[arg(long, value_name = "TIMES", default_value = "5", value_parser = multiplier)]
    pub threshold_multiplier: f64,

    /// With `--threshold auto`: never below this
    #[arg(long, value_name = "TIME", default_value = "10ms", value_parser = block_length)]
    pub threshold_floor: Duration,

    /// With `--threshold auto`: never above this
    #[arg(long, value_name = "TIME", default_value = "200ms", value_parser = block_length)]
    pub threshold_cap: Duration,

    /// Threshold of one route, like /reports/{id}=200ms; may be given several times
    #[arg(long = "route-threshold", value_name = "ROUTE=TIME", value_parser = route_threshold)]
    pub route_thresholds: Vec<(String, Duration)>,

    /// Route whose blocks are not told, as template or path, with * for any end; may be given several times
    #[arg(long = "exclude-route", value_name = "ROUTE", default_values = EXCLUDED, value_parser = route)]
    pub excluded_routes: Vec<String>,

    /// How much shorter steps must sum up to within the window to be a cumulative block
    #[arg(long, value_name = "TIME", default_value = "200ms", value_parser = block_length)]
    pub cumulative_threshold: Duration,

    /// The window in which shorter steps sum up, 100ms to 60s
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = window)]
    pub cumulative_window: Duration,

    /// Steps shorter than this don't count
    #[arg(long, value_name = "TIME", default_value = "5ms", value_parser = floor)]
    pub cumulative_floor: Duration,

    /// How old a step must be to be looked into [default: half the threshold]
    #[arg(long, value_name = "TIME", value_parser = floor)]
    pub capture_after: Option<Duration>,

    /// How far apart looks into a step on the CPU are, 1ms to 1s [default: a 16th of the threshold, 1ms to 5ms]
    #[arg(long, value_name = "TIME", value_parser = sample_every)]
    pub sample_every: Option<Duration>,

    /// What watching may cost, of the targets' CPU time, whatever is missed for it [default: beyond 2% fewer samples]
    #[arg(long, value_name = "PERCENT", value_parser = budget)]
    pub budget: Option<f64>,
}

/// Where what is found goes, besides the output itself.
#[derive(Clone, Debug, PartialEq, ClapArgs)]
#[command(next_help_heading = "Monitoring")]
pub struct Monitoring {
    /// Serve metrics for Prometheus at http://ADDRESS/metrics, like 127.0.0.1:9464
    #[arg(long, value_name = "ADDRESS", value_parser = address)]
    pub prometheus: Option<SocketAddr>,

    /// Append one JSON line per block to this file, `-`: standard error; SIGHUP opens the file anew
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,

    /// Routes, and lines, that are told apart in metrics and summary; the rest is `other`
    #[arg(long, value_name = "NUMBER", default_value_t = MAX_LABELS, value_parser = label_cap)]
    pub label_cap: usize,
}

/// What makes a run fail, and what it leaves behind.
#[derive(Clone, Debug, PartialEq, ClapArgs)]
#[command(next_help_heading = "Continuous integration")]
pub struct Gate {
    /// Exit with 1 when a block was found that is not allowed; with a time: one at least that long. Time for which
    /// there was no CPU does not count
    #[arg(
        long,
        value_name = "TIME",
        num_args = 0..=1,
        require_equals = true,
        default_value = "never",
        default_missing_value = "any",
        hide_default_value = true,
        value_parser = fail_on
    )]
    pub fail_on_blocking: FailOn,

    /// File of lines that may block, each with a reason: `app/store.py:41 until the driver is replaced`
    #[arg(long, value_name = "FILE")]
    pub allow: Option<PathBuf>,

    /// Write a JUnit report to this file
    #[arg(long, value_name = "FILE")]
    pub junit: Option<PathBuf>,

    /// Write a Markdown report to this file
    #[arg(long, value_name = "FILE")]
    pub markdown: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threshold {
    Fixed(Duration),
    Auto,
}

/// Which blocks make a run fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailOn {
    Never,
    Any,
    AtLeast(Duration),
}

/// The values of an option group when nothing is given: what the definition says, and not a second list.
macro_rules! default_by_definition {
    ($($group:ty),*) => {$(
        impl Default for $group {
            fn default() -> Self {
                #[derive(Parser)]
                struct Nothing {
                    #[command(flatten)]
                    given: $group,
                }
                Nothing::parse_from(["loopguard"]).given
            }
        }
    )*};
}
default_by_definition!(Detection, Monitoring, Gate);

impl Detection {
    /// What the core is told; an error where options contradict each other.
    pub fn settings(&self, label_cap: usize) -> Result<Settings, String> {
        let ns = |time: Duration| time.as_nanos() as u64;
        let threshold = match self.threshold {
            Threshold::Fixed(time) => ThresholdRule::Fixed { ns: ns(time) },
            Threshold::Auto if self.threshold_floor > self.threshold_cap => {
                return Err("--threshold-floor is above --threshold-cap".to_owned());
            }
            Threshold::Auto => ThresholdRule::Adaptive(AdaptiveSettings {
                percentile: self.threshold_percentile,
                multiplier: self.threshold_multiplier,
                floor_ns: ns(self.threshold_floor),
                cap_ns: ns(self.threshold_cap),
            }),
        };
        if self.cumulative_threshold > self.cumulative_window {
            return Err("--cumulative-threshold is longer than --cumulative-window: it can't be reached".to_owned());
        }
        let thresholds = self.route_thresholds.iter().map(|(route, time)| (route.clone(), ns(*time)));
        Ok(Settings {
            threshold,
            cumulative: CumulativeSettings {
                window_ns: ns(self.cumulative_window),
                threshold_ns: ns(self.cumulative_threshold),
                floor_ns: ns(self.cumulative_floor),
            },
            routes: RouteRules { excluded: self.excluded_routes.clone(), thresholds: thresholds.collect() },
            label_cap,
        })
    }
}

impl FailOn {
    /// Whether a block this long makes the run fail.
    pub fn is_failed_by(self, ns: u64) -> bool {
        match self {
            Self::Never => false,
            Self::Any => true,
            Self::AtLeast(time) => u128::from(ns) >= time.as_nanos(),
        }
    }
}

const MIN_BLOCK: Duration = Duration::from_millis(1);
const MAX_BLOCK: Duration = Duration::from_secs(60);

fn between(text: &str, (least, most): (Duration, Duration), what: &str) -> Result<Duration, String> {
    match time(text)? {
        time if (least..=most).contains(&time) => Ok(time),
        _ => Err(format!("{what} is between {least:?} and {most:?}")),
    }
}

fn threshold(text: &str) -> Result<Threshold, String> {
    if text == "auto" {
        return Ok(Threshold::Auto);
    }
    between(text, (MIN_BLOCK, MAX_BLOCK), "a threshold").map(Threshold::Fixed)
}

fn block_length(text: &str) -> Result<Duration, String> {
    between(text, (MIN_BLOCK, MAX_BLOCK), "it")
}

fn window(text: &str) -> Result<Duration, String> {
    between(text, (Duration::from_millis(100), MAX_BLOCK), "a window")
}

fn floor(text: &str) -> Result<Duration, String> {
    between(text, (Duration::from_micros(100), MAX_BLOCK), "it")
}

fn sample_every(text: &str) -> Result<Duration, String> {
    between(text, (MIN_BLOCK, Duration::from_secs(1)), "it")
}

fn number(text: &str, range: std::ops::RangeInclusive<f64>) -> Result<f64, String> {
    let (least, most) = (range.start(), range.end());
    match text.parse() {
        Ok(number) if range.contains(&number) => Ok(number),
        _ => Err(format!("it is a number from {least} to {most}")),
    }
}

/// As a part of one.
fn budget(text: &str) -> Result<f64, String> {
    Ok(number(text.strip_suffix('%').unwrap_or(text), 0.1..=100.0)? / 100.0)
}

fn percentile(text: &str) -> Result<f64, String> {
    number(text, 0.5..=0.999)
}

fn multiplier(text: &str) -> Result<f64, String> {
    number(text, 1.0..=100.0)
}

fn label_cap(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number @ 1..=10_000) => Ok(number),
        _ => Err("it is a number from 1 to 10000".to_owned()),
    }
}

fn route(text: &str) -> Result<String, String> {
    match text {
        "" => Err("a route is not empty".to_owned()),
        _ if text.starts_with('/') || text.ends_with('*') => Ok(text.to_owned()),
        _ => Err("a route begins with /, like /items/{id}".to_owned()),
    }
}

fn route_threshold(text: &str) -> Result<(String, Duration), String> {
    let (name, time) = text.rsplit_once('=').ok_or("it has the form ROUTE=TIME, like /reports/{id}=200ms")?;
    Ok((route(name)?, block_length(time)?))
}

fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "an address is an IP address and a port, like 127.0.0.1:9464".to_owned())
}

fn fail_on(text: &str) -> Result<FailOn, String> {
    match text {
        "never" | "false" => Ok(FailOn::Never),
        "any" | "true" => Ok(FailOn::Any),
        _ => between(text, (MIN_BLOCK, MAX_BLOCK), "it").map(FailOn::AtLeast),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_the_cores_own() {
        let settings = Detection::default().settings(MAX_LABELS).unwrap();
        let expected = Settings::fixed(50_000_000);
        assert_eq!((settings.cumulative, settings.threshold), (expected.cumulative, expected.threshold));
        let auto = Detection { threshold: Threshold::Auto, ..Detection::default() };
        assert_eq!(auto.settings(MAX_LABELS).unwrap().threshold, ThresholdRule::Adaptive(AdaptiveSettings::default()));
    }

    #[test]
    fn what_can_never_be_is_refused() {
        let detection = Detection::default;
        let crossed = Detection { threshold: Threshold::Auto, threshold_floor: MAX_BLOCK, ..detection() };
        assert!(crossed.settings(1).unwrap_err().contains("--threshold-floor is above"));
        let too_long = Detection { cumulative_threshold: Duration::from_secs(2), ..detection() };
        assert!(too_long.settings(1).unwrap_err().contains("can't be reached"));
    }

    #[test]
    fn routes_with_an_equals_sign_keep_it() {
        assert_eq!(route_threshold("/a=b=20ms"), Ok(("/a=b".to_owned(), Duration::from_millis(20))));
        assert!(route_threshold("/a").is_err() && route_threshold("a=20ms").is_err());
    }

    #[test]
    fn a_time_makes_only_longer_blocks_fail() {
        assert!(!FailOn::Never.is_failed_by(u64::MAX));
        assert!(FailOn::Any.is_failed_by(0));
        let at_least = fail_on("100ms").unwrap();
        assert!(at_least.is_failed_by(100_000_000) && !at_least.is_failed_by(99_999_999));
    }
}
