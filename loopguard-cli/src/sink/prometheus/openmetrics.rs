//! Turns metric families into the OpenMetrics text format, which the crate has no encoder for.

use std::fmt::Write as _;

use prometheus::proto::{LabelPair, MetricFamily, MetricType};

pub fn encode(families: &[MetricFamily]) -> String {
    let mut text = String::new();
    for family in families {
        let kind = family.get_field_type();
        // A counter's family is named without the suffix that its samples have.
        let name = match kind {
            MetricType::COUNTER => family.name().strip_suffix("_total").unwrap_or(family.name()),
            _ => family.name(),
        };
        let type_name = match kind {
            MetricType::COUNTER => "counter",
            MetricType::GAUGE => "gauge",
            MetricType::HISTOGRAM => "histogram",
            MetricType::SUMMARY | MetricType::UNTYPED => "unknown",
        };
        let _ = writeln!(text, "# HELP {name} {}", escaped(family.help()));
        let _ = writeln!(text, "# TYPE {name} {type_name}");
        for metric in family.get_metric() {
            let labels = metric.get_label();
            match kind {
                MetricType::COUNTER => {
                    sample(&mut text, &format!("{name}_total"), labels, None, metric.get_counter().get_value())
                }
                MetricType::GAUGE => sample(&mut text, name, labels, None, metric.get_gauge().get_value()),
                MetricType::HISTOGRAM => {
                    let histogram = metric.get_histogram();
                    let count = histogram.get_sample_count() as f64;
                    let bucket_name = format!("{name}_bucket");
                    for bucket in histogram.get_bucket() {
                        let (bound, below) = (number(bucket.upper_bound()), bucket.cumulative_count() as f64);
                        sample(&mut text, &bucket_name, labels, Some(&bound), below);
                    }
                    sample(&mut text, &bucket_name, labels, Some("+Inf"), count);
                    sample(&mut text, &format!("{name}_sum"), labels, None, histogram.get_sample_sum());
                    sample(&mut text, &format!("{name}_count"), labels, None, count);
                }
                MetricType::SUMMARY | MetricType::UNTYPED => {}
            }
        }
    }
    text + "# EOF\n"
}

fn sample(text: &mut String, name: &str, labels: &[LabelPair], bound: Option<&str>, value: f64) {
    let own = labels.iter().map(|label| (label.name(), escaped(label.value())));
    let bound = bound.map(|bound| ("le", bound.to_owned()));
    let pairs: Vec<String> = own.chain(bound).map(|(name, value)| format!("{name}=\"{value}\"")).collect();
    let labels = if pairs.is_empty() { String::new() } else { format!("{{{}}}", pairs.join(",")) };
    let _ = writeln!(text, "{name}{labels} {}", number(value));
}

/// Bounds of buckets are floating-point numbers, and look like it.
fn number(value: f64) -> String {
    if value == value.trunc() && value.abs() < 1e15 { format!("{value:.1}") } else { format!("{value}") }
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}
