//! What user space's own work costs: runs the Criterion benchmarks of the library and reads what they found.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};
use xtask::workspace::{Workspace, cargo};

use super::table;
use crate::step::say;

/// What the benchmarks count in, and how many of them a second are wanted.
const APPLY: &str = "apply";
const WANTED_PER_SECOND: f64 = 1e6;

pub fn run() -> Result<Value> {
    let workspace = Workspace::locate()?;
    let folder = workspace.target.join("criterion");
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("remove {}", folder.display()))?;
    }
    say("the core on one processor");
    let mut bench = cargo();
    bench.args(["bench", "--package", "loopguard", "--bench", "core"]).current_dir(&workspace.root);
    ensure!(bench.status().context("run cargo bench")?.success(), "the benchmarks failed");
    let mut results = Map::new();
    collect(&folder, &mut results)?;
    ensure!(!results.is_empty(), "Criterion left nothing in {}", folder.display());
    let show = |run: &Value, field: &str| run[field].to_string();
    let rows: Vec<Vec<String>> = results
        .iter()
        .map(|(name, run)| {
            let figures = ["each_ns", "each_ns_low", "each_ns_high", "elements_per_second"];
            [name.clone()].into_iter().chain(figures.iter().map(|field| show(run, field))).collect()
        })
        .collect();
    table(&["core, one processor", "ns each", "95 % from", "to", "a second"], &rows);
    for (name, run) in results.iter().filter(|(name, _)| name.starts_with(APPLY)) {
        let per_second = run["elements_per_second"].as_f64().unwrap_or(0.0);
        if per_second < WANTED_PER_SECOND {
            say(&format!("{name}: {per_second} a second, fewer than the {WANTED_PER_SECOND} that are wanted"));
        }
    }
    Ok(Value::Object(results))
}

/// Every `new/estimates.json` below `folder`, beside the `new/benchmark.json` that says what it is of.
fn collect(folder: &Path, results: &mut Map<String, Value>) -> Result<()> {
    let new = folder.join("new");
    if new.is_dir() {
        let read = |name: &str| -> Result<Value> {
            let path = new.join(name);
            let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
            Ok(serde_json::from_str(&text)?)
        };
        let (name, figures) = figures(&read("benchmark.json")?, &read("estimates.json")?)?;
        results.insert(name, figures);
        return Ok(());
    }
    for entry in fs::read_dir(folder)?.flatten() {
        if entry.path().is_dir() {
            collect(&entry.path(), results)?;
        }
    }
    Ok(())
}

/// The median of the samples, for one element.
fn figures(benchmark: &Value, estimates: &Value) -> Result<(String, Value)> {
    let name = benchmark["full_id"].as_str().context("a benchmark without a name")?;
    let elements = benchmark["throughput"]["Elements"].as_f64().context("a benchmark that counts nothing")?;
    let median = &estimates["median"];
    let each = |value: &Value| value.as_f64().map(|ns| ns / elements).context("no median");
    let ns = each(&median["point_estimate"])?;
    let interval = &median["confidence_interval"];
    let round = |ns: f64| (ns * 10.0).round() / 10.0;
    Ok((
        name.to_owned(),
        json!({
            "each_ns": round(ns),
            "each_ns_low": round(each(&interval["lower_bound"])?),
            "each_ns_high": round(each(&interval["upper_bound"])?),
            "elements_per_second": (1e9 / ns).round(),
        }),
    ))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::figures;

    #[test]
    fn figures_are_for_one_element() {
        let benchmark = json!({"full_id": "apply/blocks", "throughput": {"Elements": 900}});
        let estimates = json!({"median": {
            "point_estimate": 450_000.0,
            "confidence_interval": {"lower_bound": 441_000.0, "upper_bound": 459_000.0},
        }});
        let (name, figures) = figures(&benchmark, &estimates).unwrap();
        assert_eq!(name, "apply/blocks");
        let expected = json!({
            "each_ns": 500.0, "each_ns_low": 490.0, "each_ns_high": 510.0, "elements_per_second": 2_000_000.0,
        });
        assert_eq!(figures, expected);
        assert!(super::figures(&json!({"full_id": "x"}), &estimates).is_err(), "counts nothing");
    }
}
