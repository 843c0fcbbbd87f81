//! The caretaker's measuring room, the bench without VMs: the packages' own benchmarks.
//!
//! In: every benchmark that cargo knows in this workspace. Out: what they say, line by line: each explains itself. It must never leave one
//! out silently.

use crate::{
    bench::{Group, Options, Row},
    build::{cargo, cargo_within},
};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::process::Stdio;

/// One benchmark, once it is built; `timeout` ends it with status 124.
const BENCH_DEADLINE_S: u32 = 300;

/// Builds and runs all of them, one after another.
pub fn measure(options: &Options, groups: &mut Vec<Group>) -> Result<()> {
    let benches = benches()?;
    ensure!(!benches.is_empty(), "cargo metadata names no benchmark");
    for (package, bench) in benches {
        let words = ["bench", "--quiet", "--package", &package, "--bench", &bench];
        println!("* cargo bench --package {package} --bench {bench}");
        let status = cargo()
            .args(words)
            .arg("--no-run")
            .stdin(Stdio::null())
            .status()
            .context("cannot run cargo")?;
        ensure!(status.success(), "building the benchmark {bench} failed");
        let mut command = cargo_within(BENCH_DEADLINE_S);
        command.args(words).stdin(Stdio::null()).stderr(Stdio::inherit());
        // Ours take these; one that does not know them says its words and runs in full.
        command.args(["--", "--json"]);
        if options.quick {
            command.arg("--quick");
        }
        let output = command.output().context("cannot run timeout (coreutils)")?;
        let status = output.status;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(
            status.success(),
            "the benchmark {bench} of {package} ended with {status}: {said}"
        );
        groups.push(group(
            format!("Without VMs: cargo bench --package {package} --bench {bench}"),
            &said,
        ));
    }
    Ok(())
}

/// A benchmark's own words, and its figures where it says them in JSON: `{"figures":[{"words","value","unit"}]}`.
fn group(title: String, said: &str) -> Group {
    let mut group = Group {
        title,
        rows: Vec::new(),
        notes: Vec::new(),
    };
    for line in said.lines().map(str::trim_end).filter(|line| !line.is_empty()) {
        let document: Option<Value> = serde_json::from_str(line).ok();
        let figures = document
            .as_ref()
            .and_then(|document| document.get("figures")?.as_array());
        let rows = figures.map(|figures| figures.iter().filter_map(row).collect::<Vec<_>>());
        match rows {
            Some(rows) if !rows.is_empty() => group.rows.extend(rows),
            _ => group.notes.push(format!("    {line}")),
        }
    }
    group
}

fn row(figure: &Value) -> Option<Row> {
    let text = |name: &str| figure.get(name).and_then(Value::as_str).map(str::to_owned);
    Some(Row {
        name: text("words")
            .filter(|words| !words.is_empty())
            .or_else(|| text("key"))?,
        unit: text("unit")?,
        samples: vec![figure.get("value")?.as_f64()?],
        p99: None,
        peers: Vec::new(),
    })
}

/// Package and name of every benchmark.
fn benches() -> Result<Vec<(String, String)>> {
    let output = cargo()
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .output()
        .context("cannot run cargo")?;
    ensure!(
        output.status.success(),
        "cargo metadata: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: Value = serde_json::from_slice(&output.stdout)?;
    let list = |value: &Value, name: &str| {
        value
            .get(name)
            .and_then(Value::as_array)
            .cloned()
            .unwrap_or_default()
    };
    let name = |value: &Value| {
        value
            .get("name")
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned()
    };
    let mut found = Vec::new();
    for package in list(&metadata, "packages") {
        for target in list(&package, "targets") {
            if list(&target, "kind").iter().any(|kind| kind == "bench") {
                found.push((name(&package), name(&target)));
            }
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_become_rows_and_words_stay_words() {
        let said = "noop: 88 ns\n\n{\"figures\":[{\"key\":\"a\",\"words\":\"a rate\",\"value\":1.5,\"unit\":\"M/s\"}]}\n";
        let group = group("title".into(), said);
        assert_eq!(group.notes, ["    noop: 88 ns"]);
        let row = group.rows.first().map(|row| (row.name.as_str(), row.median()));
        assert_eq!(row, Some(("a rate", 1.5)));
    }
}
