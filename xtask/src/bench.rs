//! The caretaker's measuring room: figures of the whole product and of what a user would take instead, from the same minutes of the same
//! machine.
//!
//! In: which parts, how long. Out: a table for people, a document for programs, the figures' section of `docs/performance.md`. It must
//! never print a figure that was not measured in this run, nor hide one that could not be.

use crate::{bench_cost, bench_facts::Facts, bench_host, bench_table, bench_vms};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

const BEGIN: &str = "<!-- figures:begin -->";
const END: &str = "<!-- figures:end -->";

#[derive(Args)]
pub struct Options {
    /// Only the part with VMs.
    #[arg(long, conflicts_with = "host")]
    qemu: bool,
    /// Only the part without VMs: the packages' own benchmarks.
    #[arg(long)]
    pub host: bool,
    /// Both parts (the default).
    #[arg(long, conflicts_with_all = ["qemu", "host"])]
    all: bool,
    /// What crash-consistency costs: everything twice, with and without; with --host without VMs.
    #[arg(long, conflicts_with_all = ["qemu", "all"])]
    cost: bool,
    /// Small sizes and one round: to see that everything works, not for figures.
    #[arg(long)]
    pub quick: bool,
    /// Write everything to this file, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Put the tables into this file, between its lines `<!-- figures:begin -->` and `<!-- figures:end -->`.
    #[arg(long, value_name = "FILE")]
    write: Option<PathBuf>,
    /// Rounds of the file figures: the middle one is shown [default: 3, with --quick 1].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=99))]
    pub rounds: Option<u32>,
    /// Size of the file that is moved, in MiB [default: 256, with --quick 16].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub mib: Option<u32>,
    /// Where the share is made [default: a temporary folder]; a folder in memory takes the disk out of the figures.
    #[arg(long, value_name = "FOLDER")]
    pub share_in: Option<PathBuf>,
    /// A ready-made vmgmtd instead of building one; what profile it was built with is then not known.
    #[arg(long, value_name = "PROGRAM")]
    pub server: Option<PathBuf>,
}

/// Some figures of one kind, made in one setting.
pub struct Group {
    /// What it is, for people.
    pub title: String,
    pub rows: Vec<Row>,
    /// What is to be known about it: what was left out, how it was set.
    pub notes: Vec<String>,
}

/// One figure: the middle of its samples, and the same of others.
pub struct Row {
    pub name: String,
    pub unit: String,
    pub samples: Vec<f64>,
    /// The 99th of a hundred, where a sample is a median of many.
    pub p99: Option<f64>,
    /// Who, and its middle.
    pub peers: Vec<(String, f64)>,
}

impl Row {
    /// The middle sample.
    pub fn median(&self) -> f64 {
        median(&self.samples)
    }
}

/// The middle one (the upper of two).
pub fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Measures, shows, writes.
pub fn bench(options: &Options) -> Result<()> {
    // What can be wrong with the target is said before minutes have gone by.
    let target = options.write.as_deref().map(read_target).transpose()?;
    let command = command_line();
    let start = Instant::now();
    let mut facts = Facts::of_host();
    let mut groups = Vec::new();
    let mut failed = Vec::new();
    if options.cost {
        let outcome = bench_cost::measure(options, &mut groups);
        if let Err(error) = outcome {
            failed.push(format!("cost: {error:#}"));
        }
    } else if !options.qemu {
        let outcome = bench_host::measure(options, &mut groups);
        if let Err(error) = outcome {
            failed.push(format!("host: {error:#}"));
        }
    }
    if !options.host && !options.cost {
        let outcome = bench_vms::measure(options, &mut facts, &mut groups);
        if let Err(error) = outcome {
            failed.push(format!("qemu: {error:#}"));
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let load_after = Facts::load();
    println!("\n{}", bench_table::text(&facts, &groups, &command, seconds));
    if let Some(path) = &options.json {
        let document = json!({
            "command": command, "seconds": seconds, "quick": options.quick, "facts": facts.json(), "load_after": load_after,
            "groups": groups.iter().map(group_json).collect::<Vec<_>>(), "failed": failed,
        });
        fs::write(path, format!("{document:#}\n"))
            .with_context(|| format!("cannot write {}", path.display()))?;
        println!("written: {}", path.display());
    }
    if !failed.is_empty() {
        bail!("not everything could be measured: {}", failed.join("; "));
    }
    if let (Some(path), Some((before, after))) = (&options.write, target) {
        let figures = bench_table::markdown(&facts, &groups, &command, seconds, options.quick);
        fs::write(path, format!("{before}{BEGIN}\n{figures}{END}{after}"))
            .with_context(|| format!("cannot write {}", path.display()))?;
        println!("written: {}", path.display());
    }
    Ok(())
}

/// What a person types to do this again.
fn command_line() -> String {
    let words: Vec<String> = std::env::args().skip(1).collect();
    format!("cargo xtask {}", words.join(" "))
}

/// The target's text before and after the figures.
fn read_target(path: &Path) -> Result<(String, String)> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let parts = text.split_once(BEGIN).and_then(|(before, rest)| {
        let (_, after) = rest.split_once(END)?;
        Some((before.to_owned(), after.to_owned()))
    });
    let parts = parts.with_context(|| format!("{} has no lines {BEGIN} and {END}", path.display()))?;
    ensure!(
        !parts.1.contains(BEGIN),
        "{} has more than one line {BEGIN}",
        path.display()
    );
    Ok(parts)
}

fn group_json(group: &Group) -> Value {
    let rows: Vec<Value> = group
        .rows
        .iter()
        .map(|row| {
            let peers: serde_json::Map<String, Value> = row
                .peers
                .iter()
                .map(|(name, value)| (name.clone(), json!({"value": value, "ratio": row.median() / value})))
                .collect();
            json!({"figure": row.name, "unit": row.unit, "median": row.median(), "samples": row.samples, "p99": row.p99, "peers": peers})
        })
        .collect();
    json!({"title": group.title, "rows": rows, "notes": group.notes})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_is_a_sample() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[2.0, 1.0]), 2.0);
        assert!(median(&[]).is_nan());
    }
}
