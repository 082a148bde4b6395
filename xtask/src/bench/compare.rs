//! Says which figures of a benchmark got worse since an earlier run.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// Differences up to this share of the older figure are noise.
const TOLERANCE: f64 = 0.1;

pub fn run(old: &Path, new: &Path) -> Result<()> {
    let (old, new) = (read(old)?, read(new)?);
    ensure!(old["bench"] == new["bench"], "these are results of two different benchmarks");
    let worse = worse(&old["results"], &new["results"]);
    if worse.is_empty() {
        println!("nothing got worse");
    }
    for line in worse {
        println!("{line}");
    }
    Ok(())
}

fn read(path: &Path) -> Result<Value> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is not a benchmark's results", path.display()))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Better {
    More,
    Less,
}

/// What a figure is, by its name. Counts of what happened are neither good nor bad.
fn better(name: &str) -> Option<Better> {
    let is = |parts: &[&str]| parts.iter().any(|part| name.contains(part));
    if is(&["recall", "precision", "throughput_ratio", "requests_per_second", "elements_per_second"]) {
        Some(Better::More)
    } else if is(&[
        "error",
        "invented",
        "background_blamed",
        "lost",
        "_ns",
        "_us",
        "cpu_percent",
        "bytes",
        "resident_kib",
    ]) {
        Some(Better::Less)
    } else {
        None
    }
}

/// How far apart two figures must be at least, for measures whose noise is no share of them.
fn noise(name: &str) -> f64 {
    if name.contains("recall") || name.contains("precision") || name.contains("ratio") {
        0.02
    } else if name.contains("_ns") {
        20.0
    } else if name.contains("_us") {
        5.0
    } else if name.contains("_ms") || name.contains("cpu_percent") {
        0.2
    } else {
        0.0
    }
}

fn worse(old: &Value, new: &Value) -> Vec<String> {
    let mut found = Vec::new();
    collect("", "", old, new, &mut found);
    found
}

fn collect(path: &str, name: &str, old: &Value, new: &Value, found: &mut Vec<String>) {
    if let Value::Object(fields) = old {
        for (name, value) in fields {
            let path = if path.is_empty() { name.clone() } else { format!("{path} / {name}") };
            collect(&path, name, value, &new[name], found);
        }
        return;
    }
    let (Some(better), Some(was)) = (better(name), old.as_f64()) else { return };
    let Some(is) = new.as_f64() else {
        found.push(format!("{path}: was {was}, is gone"));
        return;
    };
    let loss = match better {
        Better::More => was - is,
        Better::Less => is - was,
    };
    // A share below one cannot hide a tenth of itself.
    let tolerance = if noise(name) == 0.02 { 0.02 } else { noise(name).max(was.abs() * TOLERANCE) };
    if loss > tolerance {
        found.push(format!("{path}: was {was}, is {is}"));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::worse;

    #[test]
    fn only_what_got_worse_is_named() {
        let old = json!({"a": {"recall": 1.0, "duration_error_ms_p95": 1.0, "reports": 50, "lost_records": 0}});
        let new = json!({"a": {"recall": 0.9, "duration_error_ms_p95": 0.4, "reports": 10, "lost_records": 3}});
        assert_eq!(worse(&old, &new), ["a / lost_records: was 0, is 3", "a / recall: was 1, is 0.9"]);
    }

    #[test]
    fn noise_is_not_worse() {
        let old = json!({"recall": 1.0, "tick_ns": 150.0, "added_cpu_us": 1.0});
        let new = json!({"recall": 0.99, "tick_ns": 165.0, "added_cpu_us": 3.0});
        assert!(worse(&old, &new).is_empty());
    }

    #[test]
    fn a_figure_that_is_gone_is_worse() {
        let old = json!({"a": {"recall": 1.0}, "note": "x"});
        assert_eq!(worse(&old, &json!({})), ["a / recall: was 1, is gone"]);
    }
}
