//! The caretaker's measuring room, what crash-consistency costs: the same benchmarks with a vmgmtd that writes everything down for the next core, and
//! with one that writes nothing (the feature `without-crash-consistency`, which is for this and nothing else), in turns.
//!
//! In: how often. Out: one group of figures, each with its like beside it. It must never compare runs of different minutes.

use crate::{
    bench::{Group, Options, Row, median},
    bench_vms,
    build::{cargo_within, host_programs, host_programs_with},
};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::{collections::BTreeMap, path::Path, process::Stdio};

const FEATURE: &str = "without-crash-consistency";
/// One run of the benchmark without VMs.
const DEADLINE_S: u32 = 180;
/// Parts of it that say something about this.
const PARTS: [&str; 7] = [
    "rate", "messages", "latency", "host", "bulk", "bulk-64k", "stream",
];
const WITHOUT: &str = "without";

/// A figure, both ways.
#[derive(Default)]
struct Pair {
    words: String,
    unit: String,
    with: Vec<f64>,
    without: Vec<f64>,
}

/// Builds both, runs both in turns.
pub fn measure(options: &Options, groups: &mut Vec<Group>) -> Result<()> {
    println!("* building vmgmtd (release), with and without crash-consistency");
    let with = only(host_programs(&["vmgmtd"], true)?)?;
    let without = only(host_programs_with(&["vmgmtd"], true, Some(FEATURE))?)?;
    let rounds = options.rounds.unwrap_or(if options.quick { 1 } else { 3 });
    let mut pairs: BTreeMap<String, Pair> = BTreeMap::new();
    for round in 1..=rounds {
        for (server, is_with) in [(&with, true), (&without, false)] {
            let named = if is_with { "with" } else { WITHOUT };
            println!("* round {round} of {rounds}, {named}");
            without_vms(options, server, is_with, &mut pairs)?;
            if !options.host {
                for row in bench_vms::round_trips(options, server)? {
                    let key = format!("in QEMU: {}", row.name);
                    note(
                        &mut pairs,
                        key.clone(),
                        key,
                        row.unit.clone(),
                        row.median(),
                        is_with,
                    );
                }
            }
        }
    }
    let rows = pairs.into_values().map(|pair| Row {
        peers: vec![(WITHOUT.to_owned(), median(&pair.without))],
        name: pair.words,
        unit: pair.unit,
        samples: pair.with,
        p99: None,
    });
    groups.push(Group {
        title: "What crash-consistency costs: each figure with it, and without".into(),
        rows: rows.collect(),
        notes: vec![format!(
            "{rounds} rounds of both in turns. *Without*: no journal of the hub and no in-flight table; what a core would need to take over \
             (identity of files, order of words in the pages) is worked out all the same."
        )],
    });
    Ok(())
}

fn only(mut programs: Vec<std::path::PathBuf>) -> Result<std::path::PathBuf> {
    programs.pop().context("cargo built no vmgmtd")
}

fn without_vms(
    options: &Options,
    server: &Path,
    is_with: bool,
    pairs: &mut BTreeMap<String, Pair>,
) -> Result<()> {
    let mut command = cargo_within(DEADLINE_S);
    command
        .args([
            "bench",
            "--quiet",
            "--package",
            "vmgmtd",
            "--bench",
            "in_process",
            "--",
            "--json",
        ])
        .args(PARTS)
        .env("VMGMT_BENCH_SERVER", server)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit());
    if options.quick {
        command.arg("--quick");
    }
    let output = command.output().context("cannot run timeout (coreutils)")?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success(),
        "the benchmark ended with {}: {said}",
        output.status
    );
    let documents = said
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let mut found = 0;
    for figure in documents
        .filter_map(|document| document.get("figures")?.as_array().cloned())
        .flatten()
    {
        let text = |name: &str| figure.get(name).and_then(Value::as_str).map(str::to_owned);
        let (Some(key), Some(words), Some(unit)) = (text("key"), text("words"), text("unit")) else {
            continue;
        };
        // What is not ours, and ratios to it, is the same for both.
        if unit.starts_with("of ") || key.contains("plain") || key.contains("memcpy") {
            continue;
        }
        if let Some(value) = figure.get("value").and_then(Value::as_f64) {
            note(pairs, key, words, unit, value, is_with);
            found += 1;
        }
    }
    ensure!(found > 0, "the benchmark gave no figures: {said}");
    Ok(())
}

fn note(
    pairs: &mut BTreeMap<String, Pair>,
    key: String,
    words: String,
    unit: String,
    value: f64,
    is_with: bool,
) {
    let pair = pairs.entry(key).or_default();
    if pair.words.is_empty() {
        (pair.words, pair.unit) = (words, unit);
    }
    if is_with {
        pair.with.push(value);
    } else {
        pair.without.push(value);
    }
}
