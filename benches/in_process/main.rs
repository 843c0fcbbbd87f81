//! What vmgmtd costs by itself: the real daemon, the real driver, shared memory, no QEMU.
//!
//! `cargo bench --bench in_process` prints for a person; `-- --json` one JSON object; further words choose parts (`rate`, `messages`, `latency`, `host`,
//! `bulk`, `bulk-64k`, `stream`, `footprint`). Every figure is taken in this run, and what it is compared with as well; all of it takes about a
//! minute.

mod bulk;
mod facts;
mod footprint;
mod host;
mod latency;
mod rate;

use std::time::Duration;

use anyhow::Result;
use vmgmt_testkit::guest::{Site, SitePlan};

/// The daemon under test, as `cargo bench` builds it, or the one that `VMGMT_BENCH_SERVER` names.
fn site(vms: usize) -> Result<Site> {
    let server = std::env::var("VMGMT_BENCH_SERVER");
    let server = server.as_deref().unwrap_or(env!("CARGO_BIN_EXE_vmgmtd"));
    SitePlan::new(server, vms).log("warn").start()
}

/// Named figures, in the order they were taken.
#[derive(Default)]
pub struct Figures {
    rows: Vec<(String, f64, &'static str, String)>,
    quiet: bool,
}

impl Figures {
    /// One figure: a key for machines, its unit, and words for a person.
    fn add(&mut self, key: &str, value: f64, unit: &'static str, words: impl Into<String>) {
        let words = words.into();
        if !self.quiet {
            println!("{value:>14.2} {unit:<12} {words}");
        }
        self.rows.push((key.to_owned(), value, unit, words));
    }

    fn title(&self, text: &str) {
        if !self.quiet {
            println!("\n{text}");
        }
    }
}

/// Median and 99th percentile, in microseconds.
fn percentiles(mut samples: Vec<Duration>) -> (f64, f64) {
    samples.sort_unstable();
    let at = |share: usize| {
        let index = (samples.len() * share / 1000).min(samples.len().saturating_sub(1));
        samples
            .get(index)
            .map_or(0.0, |sample| sample.as_secs_f64() * 1e6)
    };
    (at(500), at(990))
}

/// Median of figures.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

/// A part of the run: its name, and what it does.
type Part = (&'static str, fn(&mut Figures) -> Result<()>);

const PARTS: [Part; 8] = [
    ("rate", rate::no_ops),
    ("messages", rate::messages),
    ("latency", latency::run),
    ("host", host::run),
    ("bulk", bulk::files),
    ("bulk-64k", bulk::files_in_small_pieces),
    ("stream", bulk::streams),
    ("footprint", footprint::run),
];

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let json = words.iter().any(|word| word == "--json");
    let chosen: Vec<&str> = words
        .iter()
        .map(String::as_str)
        .filter(|word| !word.starts_with("--"))
        .collect();
    let mut figures = Figures {
        quiet: json,
        ..Figures::default()
    };
    let facts = facts::take();
    if !json {
        for (name, value) in &facts {
            println!("{name}: {value}");
        }
    }
    for (name, part) in PARTS {
        if chosen.is_empty() || chosen.contains(&name) {
            part(&mut figures)?;
        }
    }
    if json {
        let rows: Vec<serde_json::Value> = figures
            .rows
            .iter()
            .map(|(key, value, unit, words)| {
                serde_json::json!({"key": key, "value": value, "unit": unit, "words": words})
            })
            .collect();
        let facts: serde_json::Map<String, serde_json::Value> = facts
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value.into()))
            .collect();
        println!("{}", serde_json::json!({"facts": facts, "figures": rows}));
    }
    Ok(())
}

/// A VM of a site once its place is free: the one before has just left it.
fn vm_again(
    site: &Site,
    number: usize,
    options: vmgmt_testkit::guest::GuestOptions,
) -> Result<vmgmt_testkit::guest::SimulatedVm> {
    vmgmt_testkit::process::wait_until("the VM's place", Duration::from_secs(10), || {
        Ok(site.vm_with(number, options).ok())
    })
}
