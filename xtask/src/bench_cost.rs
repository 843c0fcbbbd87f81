//! The caretaker's measuring room, what crash-consistency costs: the same benchmarks with a vmgmtd that writes everything down for the next core, and
//! with one that writes nothing (the feature `without-crash-consistency`, which is for this and nothing else), in turns.
//!
//! In: how often. Out: one group of figures, each with its like beside it. It must never compare runs of different minutes.

use crate::{
    bench::{Group, Options, Row, median},
    bench_aims::{self, Pair, Pairs, Subject},
    bench_cost_vms,
    build::{cargo, cargo_within, host_programs, host_programs_with},
};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::{path::Path, process::Stdio};

const FEATURE: &str = "without-crash-consistency";
/// One run of the benchmark without VMs.
const DEADLINE_S: u32 = 180;
const MESSAGES: &str = "messages";
/// Parts of it that say something about this.
const PARTS: [&str; 7] = ["rate", MESSAGES, "latency", "host", "bulk", "bulk-64k", "stream"];
/// The benchmark, in cargo's words.
const BENCH: [&str; 6] = ["bench", "--quiet", "--package", "vmgmtd", "--bench", "in_process"];
const WITHOUT: &str = "without";
/// The benchmark's key of 64-byte messages.
const MESSAGE_RATE: &str = "messages_64_bytes_per_second";

/// Turns of what there are aims for, for each round of everything without VMs: they are shorter, and their middle is to mean something.
const TURNS_EACH_ROUND: u32 = 5;
const ROUNDS: u32 = 2;

/// Builds both, runs both in turns.
pub fn measure(options: &Options, groups: &mut Vec<Group>) -> Result<()> {
    println!("* building vmgmtd (release), with and without crash-consistency");
    let with = only(host_programs(&["vmgmtd"], true)?)?;
    let without = only(host_programs_with(&["vmgmtd"], true, Some(FEATURE))?)?;
    // Before its deadline begins.
    let built = cargo()
        .args(BENCH)
        .arg("--no-run")
        .stdin(Stdio::null())
        .status()
        .context("cannot run cargo")?;
    ensure!(built.success(), "building the benchmark failed");
    let rounds = options.rounds.unwrap_or(if options.quick { 1 } else { ROUNDS });
    let turns = if options.quick {
        1
    } else {
        rounds * TURNS_EACH_ROUND
    };
    let mut pairs = Pairs::new();
    for turn in 0..turns {
        let parts = if turn < rounds { &PARTS[..] } else { &[MESSAGES] };
        println!("* turn {} of {turns} without VMs: {}", turn + 1, parts.join(" "));
        let mut both = [(&with, true), (&without, false)];
        // What comes first changes from turn to turn, so that it is no advantage.
        if turn % 2 == 1 {
            both.reverse();
        }
        for (server, is_with) in both {
            without_vms(options, parts, server, is_with, &mut pairs)?;
        }
    }
    let mut notes = vec![format!(
        "{rounds} rounds of both in turns, of 64-byte messages {turns}. *Without*: no journal of the hub and no in-flight table; what a core would need to take over \
         (identity of files, order of words in the pages) is worked out all the same."
    )];
    if !options.host {
        let done = bench_cost_vms::measure(options, [&with, &without], rounds, turns, &mut pairs)?;
        let short = if done < turns {
            format!(" of {turns} (no time was left)")
        } else {
            String::new()
        };
        notes.push(format!(
            "In QEMU: {done} turns{short}, each device for some seconds, in the same two VMs, which have a device of both; files from and to \
             the program's memory without checksum, the middle of several in each turn."
        ));
    }
    let aims = bench_aims::lines(&pairs);
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
        notes,
    });
    groups.push(Group {
        title: "What crash-consistency costs: the aims".into(),
        rows: Vec::new(),
        notes: aims,
    });
    Ok(())
}

fn only(mut programs: Vec<std::path::PathBuf>) -> Result<std::path::PathBuf> {
    programs.pop().context("cargo built no vmgmtd")
}

fn without_vms(
    options: &Options,
    parts: &[&str],
    server: &Path,
    is_with: bool,
    pairs: &mut Pairs,
) -> Result<()> {
    let mut command = cargo_within(DEADLINE_S);
    command
        .args(BENCH)
        .args(["--", "--json"])
        .args(parts)
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
        if unit.starts_with("of ")
            || ["plain", "memcpy", "wake_ups"]
                .iter()
                .any(|not| key.contains(not))
        {
            continue;
        }
        // The words stand below a title there.
        let words = match key.contains("_64k_") {
            true => format!("{words}, 64 KiB pieces"),
            false if key.ends_with("_mb_per_second") => format!("{words}, 1 MiB pieces"),
            false => words,
        };
        if let Some(value) = figure.get("value").and_then(Value::as_f64) {
            note(pairs, key, words, unit, value, is_with);
            found += 1;
        }
    }
    ensure!(found > 0, "the benchmark gave no figures: {said}");
    Ok(())
}

fn note(pairs: &mut Pairs, key: String, words: String, unit: String, value: f64, is_with: bool) {
    let subject = if key == MESSAGE_RATE {
        Subject::MessageRate
    } else {
        Subject::Other
    };
    let pair = pairs.entry(key).or_insert_with(|| Pair {
        words,
        unit,
        subject,
        with: Vec::new(),
        without: Vec::new(),
    });
    if is_with {
        pair.with.push(value);
    } else {
        pair.without.push(value);
    }
}
