//! The caretaker's weeding: `cargo xtask fuzz`, libFuzzer over every way in.
//!
//! In: how long, which target. Out: what libFuzzer says, and one line per target at the end; not zero if anything was found. It must never know
//! what a target does: that is in tests/fuzz-bodies, which the ordinary tests run over the same corpus.

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use std::{
    fs,
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};
use vmgmt_testkit::setup::repository;

/// The targets, in the order in which they are run: the names of tests/fuzz/targets/*.rs.
const TARGETS: [&str; 9] = [
    "wire",
    "registers",
    "rings",
    "pages",
    "saved",
    "config",
    "control",
    "front",
    "driver",
];
/// Seconds for each target in the short run of `cargo xtask test`.
const SECONDS_SHORT: u32 = 5;
/// Longest input: the deepest sequences of the corpus are shorter.
const INPUT_BYTES_MAX: u32 = 4096;
/// One input that takes longer than this, or makes the process larger than this, is a finding.
const INPUT_SECONDS_MAX: u32 = 25;
const MEMORY_MIB_MAX: u32 = 2048;
/// The cargo-fuzz that is installed where there is none.
const CARGO_FUZZ: &str = "0.13.2";

#[derive(Args)]
pub struct Options {
    /// How long each target is run.
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// Only this target (wire, registers, rings, pages, saved, config, control, front, driver).
    #[arg(long)]
    target: Option<String>,
    /// With AddressSanitizer: slower; the rooms are safe Rust, but `server/mem` and the driver's memory are not.
    #[arg(long)]
    address_sanitizer: bool,
    /// Put what libFuzzer found worth keeping into the committed corpus, minimised.
    #[arg(long)]
    keep: bool,
}

/// `cargo xtask fuzz`.
pub fn fuzz(options: &Options) -> Result<()> {
    if let Some(reason) = missing() {
        bail!("{reason}");
    }
    let mut targets = TARGETS.to_vec();
    if let Some(wanted) = &options.target {
        targets.retain(|name| name == wanted);
        ensure!(
            !targets.is_empty(),
            "no target {wanted}; there are {}",
            TARGETS.join(", ")
        );
    }
    run(&targets, options)
}

/// The short form, as a part of `cargo xtask test`. `Ok(Some(reason))`: skipped.
pub fn fuzz_short() -> Result<Option<String>> {
    if missing().is_some() {
        // A new machine may have the stable compiler alone. Whether it worked is seen below.
        let mut install = Command::new("rustup");
        install.args(["toolchain", "install", "nightly", "--profile", "minimal"]);
        let _ = install.status();
    }
    if let Some(reason) = missing() {
        return Ok(Some(reason));
    }
    let options = Options {
        seconds: SECONDS_SHORT,
        target: None,
        address_sanitizer: false,
        keep: false,
    };
    run(&TARGETS, &options).map(|()| None)
}

/// Why there can be no fuzzing on this machine.
fn missing() -> Option<String> {
    let answers = nightly("rustc").arg("--version").output();
    match answers {
        Ok(output) if output.status.success() => None,
        _ => Some(
            "libFuzzer needs the nightly compiler: rustup toolchain install nightly --profile minimal".into(),
        ),
    }
}

/// A tool of the nightly toolchain; without what the cargo that runs us has set for its own.
fn nightly(tool: &str) -> Command {
    let mut command = Command::new("rustup");
    command.args(["run", "nightly", tool]).current_dir(repository());
    for name in [
        "CARGO",
        "RUSTC",
        "RUSTUP_TOOLCHAIN",
        "RUSTFLAGS",
        "CARGO_TARGET_DIR",
    ] {
        command.env_remove(name);
    }
    command
}

fn cache() -> PathBuf {
    repository().join(".cache")
}

/// Where cargo-fuzz is; installed into the cache if it is not there.
fn cargo_fuzz() -> Result<PathBuf> {
    let folder = cache().join("cargo-fuzz");
    let program = folder.join("bin/cargo-fuzz");
    if !program.exists() {
        println!(
            "cargo-fuzz {CARGO_FUZZ} is missing: installing it into {}",
            folder.display()
        );
        let status = nightly("cargo")
            .args([
                "install",
                "cargo-fuzz",
                "--locked",
                "--quiet",
                "--version",
                CARGO_FUZZ,
                "--root",
            ])
            .arg(&folder)
            .status()
            .context("cannot start cargo install")?;
        ensure!(status.success(), "cargo-fuzz could not be installed: {status}");
    }
    Ok(program)
}

/// `cargo fuzz VERB TARGET…` with its folders.
fn command(verb: &str, options: &Options) -> Result<Command> {
    let mut command = nightly("cargo");
    // The subcommand is found beside cargo or in PATH.
    let bin = cargo_fuzz()?;
    let bin = bin.parent().context("cargo-fuzz lies in no folder")?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let paths = std::iter::once(bin.to_owned()).chain(std::env::split_paths(&path));
    command.env("PATH", std::env::join_paths(paths)?);
    let sanitizer = if options.address_sanitizer {
        "address"
    } else {
        "none"
    };
    command.args(["fuzz", verb, "--fuzz-dir", "tests/fuzz", "--sanitizer", sanitizer]);
    // One folder for each kind of build: they share nothing, and each is used again.
    command
        .arg("--target-dir")
        .arg(cache().join(format!("fuzz-target-{sanitizer}")));
    Ok(command)
}

fn run(targets: &[&str], options: &Options) -> Result<()> {
    let start = Instant::now();
    let built = command("build", options)?
        .status()
        .context("cannot start cargo fuzz")?;
    ensure!(built.success(), "the fuzz targets do not build");
    println!("fuzz targets built in {:.1} s", start.elapsed().as_secs_f64());
    let mut lines = Vec::new();
    let mut found = Vec::new();
    for name in targets {
        let (line, calm) = run_one(name, options)?;
        lines.push(line);
        if !calm {
            found.push(*name);
        }
    }
    println!(
        "\n{:<10} {:>8} {:>12} {:>10}  result",
        "target", "time", "executions", "per second"
    );
    for line in lines {
        println!("{line}");
    }
    ensure!(
        found.is_empty(),
        "found in {}: the inputs are in tests/fuzz/artifacts; fix it, then move the input to tests/fuzz/corpus/TARGET so that it stays fixed",
        found.join(", ")
    );
    Ok(())
}

/// Runs one target; its line for the table, and whether nothing was found.
fn run_one(name: &str, options: &Options) -> Result<(String, bool)> {
    let committed = repository().join("tests/fuzz/corpus").join(name);
    ensure!(committed.is_dir(), "{} is not there", committed.display());
    // What libFuzzer adds goes to the cache; it goes on from there the next time.
    let grown = cache().join("fuzz-corpus").join(name);
    fs::create_dir_all(&grown).with_context(|| format!("cannot make {}", grown.display()))?;
    println!("\n--- {name}: {} s ---", options.seconds);
    let start = Instant::now();
    let mut libfuzzer = command("run", options)?;
    libfuzzer.arg(name).arg(&grown).arg(&committed).arg("--");
    libfuzzer.args([
        format!("-max_total_time={}", options.seconds),
        format!("-max_len={INPUT_BYTES_MAX}"),
        format!("-timeout={INPUT_SECONDS_MAX}"),
        format!("-rss_limit_mb={MEMORY_MIB_MAX}"),
        "-print_final_stats=1".into(),
        "-verbosity=0".into(),
    ]);
    let output = libfuzzer
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .with_context(|| format!("cannot start the target {name}"))?;
    let time = start.elapsed();
    let calm = output.status.success();
    let said = String::from_utf8_lossy(&output.stderr);
    if !calm {
        println!("{said}");
    }
    let executions = statistic(&said, "stat::number_of_executed_units:");
    ensure!(!calm || executions > 0, "{name}: nothing was run:\n{said}");
    if calm && options.keep {
        keep(name, options)?;
    }
    Ok((row(name, time, executions, calm), calm))
}

/// Merges what was found worth keeping into the committed corpus: libFuzzer adds only what reaches something new.
fn keep(name: &str, options: &Options) -> Result<()> {
    let folder = |place: PathBuf| place.join(name);
    let mut merge = command("run", options)?;
    merge
        .arg(name)
        .arg(folder(repository().join("tests/fuzz/corpus")))
        .arg(folder(cache().join("fuzz-corpus")))
        .args(["--", "-merge=1", "-max_len=1024", "-verbosity=0"]);
    let status = merge.status().context("cannot start the merge")?;
    ensure!(status.success(), "the corpus of {name} could not be merged");
    Ok(())
}

fn row(name: &str, time: Duration, executions: u64, calm: bool) -> String {
    let seconds = time.as_secs_f64();
    let rate = executions as f64 / seconds.max(0.001);
    let result = if calm { "ok" } else { "FOUND SOMETHING" };
    format!("{name:<10} {seconds:>6.1} s {executions:>12} {rate:>10.0}  {result}")
}

/// A number of libFuzzer's closing lines.
fn statistic(said: &str, name: &str) -> u64 {
    said.lines()
        .filter_map(|line| line.strip_prefix(name))
        .find_map(|rest| rest.trim().parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_has_its_file_and_its_corpus() {
        for name in TARGETS {
            let folder = repository().join("tests/fuzz");
            assert!(
                folder.join("targets").join(name).with_extension("rs").is_file(),
                "{name}"
            );
            assert!(folder.join("corpus").join(name).is_dir(), "{name}");
        }
        let files = fs::read_dir(repository().join("tests/fuzz/targets"))
            .unwrap()
            .count();
        assert_eq!(files, TARGETS.len());
    }

    #[test]
    fn the_closing_lines_are_read() {
        let said = "stat::number_of_executed_units: 1234\nstat::average_exec_per_sec: 7\n";
        assert_eq!(statistic(said, "stat::number_of_executed_units:"), 1234);
        assert_eq!(statistic(said, "stat::nothing:"), 0);
    }
}
