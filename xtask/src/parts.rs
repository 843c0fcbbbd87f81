//! The caretaker's rounds: every part of the tests, its time and its result.
//!
//! In: the names of the parts wanted, or none for all. Out: what the test runners say, live, and a table at the end; not zero if any part
//! failed. It must never judge a part by its words: the exit status decides, the words are only counted.

use crate::{
    build::{ENDED_BY_DEADLINE, cargo_within},
    soak, stress,
};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use std::{
    fs,
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};
use vmgmt_testkit::setup::{self, Image, Wanted, repository};

/// How long fresh seeds are simulated.
const SIM_SECONDS: u64 = 10;
/// The longest that one command of a part may take, several times what it needs: what hangs ends with a word about it.
const COMMAND_SECONDS_MAX: u32 = 2400;
/// QEMU tests that run at once, each with a VM or two: more than this on a small machine only wait for each other.
const QEMU_TESTS_AT_ONCE_MAX: usize = 3;

#[derive(Args)]
pub struct Options {
    /// Only these parts (setup, format, lint, unit, sim, integration, uapi, fuzz, qemu, soak, stress).
    parts: Vec<String>,
}

/// One part of the tests.
struct Part {
    name: &'static str,
    what: &'static str,
    run: fn(&mut Counts) -> Result<()>,
}

const PARTS: [Part; 11] = [
    Part {
        name: "setup",
        what: "QEMU and guest images",
        run: setup_part,
    },
    Part {
        name: "format",
        what: "cargo fmt --check",
        run: format_part,
    },
    Part {
        name: "lint",
        what: "clippy, warnings are errors",
        run: lint_part,
    },
    Part {
        name: "unit",
        what: "unit, property and simulation tests of the crates",
        run: unit_part,
    },
    Part {
        name: "sim",
        what: "fresh seeds of the simulator",
        run: sim_part,
    },
    Part {
        name: "integration",
        what: "vmgmtd as a process, without VMs",
        run: integration_part,
    },
    Part {
        name: "uapi",
        what: "our numbers against the kernel's headers",
        run: uapi_part,
    },
    Part {
        name: "fuzz",
        what: "a few seconds of libFuzzer for every way in",
        run: fuzz_part,
    },
    Part {
        name: "qemu",
        what: "real VMs",
        run: qemu_part,
    },
    Part {
        name: "soak",
        what: "simulated guests while the core is killed and parts are replaced, short form",
        run: soak_part,
    },
    Part {
        name: "stress",
        what: "real VMs and simulated ones, everything at once, short form",
        run: stress_part,
    },
];

/// What the test runners' closing lines add up to.
#[derive(Default)]
struct Counts {
    passed: u64,
    failed: u64,
    ignored: u64,
    skipped: Vec<String>,
}

/// A part that was run.
struct Row {
    name: &'static str,
    what: &'static str,
    time: Duration,
    error: Option<String>,
    counts: Counts,
}

/// Runs the parts and prints the table.
pub fn test(options: &Options) -> Result<()> {
    for wanted in &options.parts {
        let known: Vec<&str> = PARTS.iter().map(|part| part.name).collect();
        ensure!(
            known.contains(&wanted.as_str()),
            "no part {wanted}; there are {}",
            known.join(", ")
        );
    }
    let mut rows = Vec::new();
    for part in &PARTS {
        let named = options.parts.iter().any(|wanted| wanted == part.name);
        if !named && !options.parts.is_empty() {
            continue;
        }
        println!("\n=== {}: {} ===", part.name, part.what);
        let start = Instant::now();
        let mut counts = Counts::default();
        let error = (part.run)(&mut counts).err().map(|error| format!("{error:#}"));
        if let Some(error) = &error {
            println!("{}: FAILED: {error}", part.name);
        }
        rows.push(Row {
            name: part.name,
            what: part.what,
            time: start.elapsed(),
            error,
            counts,
        });
    }
    print_table(&rows);
    let failed: Vec<&str> = rows
        .iter()
        .filter(|row| row.error.is_some())
        .map(|row| row.name)
        .collect();
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    Ok(())
}

fn print_table(rows: &[Row]) {
    println!(
        "\n{:<12} {:>8} {:>7} {:>7} {:>8}  result",
        "part", "time", "passed", "failed", "ignored"
    );
    for row in rows {
        let result = if row.error.is_some() { "FAILED" } else { "ok" };
        let Counts {
            passed,
            failed,
            ignored,
            skipped,
        } = &row.counts;
        let seconds = row.time.as_secs_f64();
        let name = row.name;
        println!(
            "{name:<12} {seconds:>6.1} s {passed:>7} {failed:>7} {ignored:>8}  {result} ({})",
            row.what
        );
        for line in skipped {
            println!("{:<12} {line}", "");
        }
    }
    let sum = |count: fn(&Counts) -> u64| rows.iter().map(|row| count(&row.counts)).sum::<u64>();
    let seconds: f64 = rows.iter().map(|row| row.time.as_secs_f64()).sum();
    let all_passed = rows.iter().all(|row| row.error.is_none());
    println!(
        "test result: {}. {} passed; {} failed; {} ignored; {} parts in {seconds:.1} s",
        if all_passed { "ok" } else { "FAILED" },
        sum(|counts| counts.passed),
        sum(|counts| counts.failed),
        sum(|counts| counts.ignored),
        rows.len(),
    );
}

fn setup_part(_: &mut Counts) -> Result<()> {
    for image in [Image::Small, Image::Large, Image::Systemd] {
        setup::prepare(Wanted { image, install: true })?;
    }
    Ok(())
}

fn format_part(counts: &mut Counts) -> Result<()> {
    run(&Cargo::new(["fmt", "--all", "--check"]), counts)
}

fn lint_part(counts: &mut Counts) -> Result<()> {
    let workspace = ["--workspace", "--all-targets", "--quiet"];
    let warnings = ["--", "-D", "warnings"];
    run(&Cargo::new(["clippy"]).and(workspace).and(warnings), counts)?;
    // What users run has no fault places and no debug assertions: other code.
    let released = ["--release", "--package", "vmgmtd", "--quiet"];
    run(&Cargo::new(["clippy"]).and(released).and(warnings), counts)
}

/// All crates but the root package, whose tests are processes, and the kit, whose tests are VMs.
fn unit_part(counts: &mut Counts) -> Result<()> {
    let others = ["--exclude", "vmgmtd", "--exclude", "vmgmt-testkit"];
    let crates = Cargo::new(["test", "--workspace", "--no-fail-fast"]).and(others);
    let kit = Cargo::new(["test", "--package", "vmgmt-testkit", "--lib", "--no-fail-fast"]);
    run(&crates, counts).and(run(&kit, counts))
}

/// Seeds that nobody has seen before, as many as fit the time; those that have been seen are the crate's own tests. A failure prints the command
/// that shows it again.
fn sim_part(counts: &mut Counts) -> Result<()> {
    let seconds = SIM_SECONDS.to_string();
    let limits = ["--seconds", &seconds, "--steps", crate::sim::STEPS];
    run(&Cargo::new(crate::sim::COMMAND).and(limits), counts)
}

/// The root package's tests that need neither a VM nor the kernel's headers.
fn integration_part(counts: &mut Counts) -> Result<()> {
    let daemon = Cargo::new(["test", "--package", "vmgmtd", "--bins", "--no-fail-fast"]);
    let daemon = daemon.and_tests(root_tests(|name| {
        !name.starts_with("qemu") && !name.contains("uapi")
    })?);
    let kit = Cargo::new(["test", "--package", "vmgmt-testkit", "--test", "guards"]);
    run(&daemon, counts).and(run(&kit, counts))
}

fn uapi_part(counts: &mut Counts) -> Result<()> {
    let names = root_tests(|name| name.contains("uapi"))?;
    ensure!(
        !names.is_empty(),
        "no tests/*uapi*.rs: nothing holds our numbers against the kernel's headers"
    );
    let feature = ["--features", "uapi-check", "--no-fail-fast"];
    let daemon = Cargo::new(["test", "--package", "vmgmtd"]).and(feature);
    run(&daemon.and_tests(names), counts)
}

fn fuzz_part(counts: &mut Counts) -> Result<()> {
    if let Some(reason) = crate::fuzz::fuzz_short()? {
        counts.skipped.push(format!("skipped: {reason}"));
    }
    Ok(())
}

/// The tests that boot VMs or parse what boots them, a few at a time. Setup has run, so a test that skips itself says why.
fn qemu_part(counts: &mut Counts) -> Result<()> {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let at_once = format!("--test-threads={}", processors.clamp(1, QEMU_TESTS_AT_ONCE_MAX));
    let shown = ["--", &at_once, "--show-output"];
    let kit = Cargo::new(["test", "--package", "vmgmt-testkit", "--no-fail-fast"]);
    let kit = kit.and(["--test", "boot", "--test", "configs"]).and(shown);
    let kit = run(&kit, counts);
    let names = root_tests(|name| name.starts_with("qemu"))?;
    if names.is_empty() {
        counts
            .skipped
            .push("skipped: there is no tests/qemu_*.rs yet".into());
        return kit;
    }
    let daemon = Cargo::new(["test", "--package", "vmgmtd", "--no-fail-fast"]);
    kit.and(run(&daemon.and_tests(names).and(shown), counts))
}

/// `cargo xtask soak`, short.
fn soak_part(counts: &mut Counts) -> Result<()> {
    one_run(counts, soak::soak(&soak::Options::short()))
}

/// `cargo xtask stress`, short.
fn stress_part(counts: &mut Counts) -> Result<()> {
    one_run(counts, stress::stress(&stress::Options::short()))
}

fn one_run(counts: &mut Counts, result: Result<()>) -> Result<()> {
    counts.passed += u64::from(result.is_ok());
    counts.failed += u64::from(result.is_err());
    result
}

/// The names of those of the root package's integration tests that are wanted.
fn root_tests(wanted: impl Fn(&str) -> bool) -> Result<Vec<String>> {
    let folder = repository().join("tests");
    let mut names: Vec<String> = fs::read_dir(&folder)
        .with_context(|| format!("cannot list {}", folder.display()))?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".rs").map(str::to_owned))
        .filter(|name| wanted(name))
        .collect();
    names.sort();
    Ok(names)
}

/// A cargo command, in the words that somebody would type who wants to see it again.
struct Cargo {
    words: Vec<String>,
}

impl Cargo {
    fn new<W: Into<String>>(words: impl IntoIterator<Item = W>) -> Self {
        let words = words.into_iter().map(Into::into).collect();
        Self { words }
    }

    /// With more words behind.
    fn and<W: Into<String>>(mut self, words: impl IntoIterator<Item = W>) -> Self {
        self.words.extend(words.into_iter().map(Into::into));
        self
    }

    /// With these tests of the package.
    fn and_tests(self, names: Vec<String>) -> Self {
        let words = names.into_iter().flat_map(|name| ["--test".to_owned(), name]);
        self.and(words)
    }

    fn told(&self) -> String {
        format!("cargo {}", self.words.join(" "))
    }

    /// As a process, which ends even if a test hangs.
    fn command(&self) -> Command {
        let mut command = cargo_within(COMMAND_SECONDS_MAX);
        command.args(&self.words);
        command
    }
}

/// Runs a command, shows every line of it as it comes, and counts.
fn run(cargo: &Cargo, counts: &mut Counts) -> Result<()> {
    println!("$ {}", cargo.told());
    let what = cargo.words.first().map_or("", String::as_str);
    follow(&mut cargo.command(), counts).with_context(|| format!("cargo {what}"))
}

/// Follows a command to its end.
fn follow(command: &mut Command, counts: &mut Counts) -> Result<()> {
    let (reader, writer) = std::io::pipe()?;
    command
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer);
    let mut child = command.spawn().context("cannot start timeout (coreutils)")?;
    // The command still holds the writing ends; without this the pipe would never end.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    // A thread of its own: what escaped the deadline may hold the pipe open for ever.
    let (lines, heard) = mpsc::channel();
    let listener = thread::spawn(move || {
        for line in BufReader::new(reader).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).into_owned();
            println!("{line}");
            if lines.send(line).is_err() {
                break;
            }
        }
    });
    let status = child.wait()?;
    let late = status
        .code()
        .is_some_and(|code| ENDED_BY_DEADLINE.contains(&code));
    if !late && listener.join().is_err() {
        bail!("what it said could not be read to its end");
    }
    heard.try_iter().for_each(|line| count(&line, counts));
    ensure!(
        !late,
        "did not end in its time; a test that still ran is named above (\"has been running for over 60 seconds\")"
    );
    ensure!(status.success(), "ended with {status}");
    Ok(())
}

/// Adds up `test result: ok. 3 passed; 0 failed; 1 ignored; …` and keeps `skipped: …`.
fn count(line: &str, counts: &mut Counts) {
    if line.starts_with("skipped: ") {
        counts.skipped.push(line.to_owned());
    }
    let Some(rest) = line.strip_prefix("test result: ") else {
        return;
    };
    for piece in rest.split([';', '.']) {
        if let Some((Ok(number), what)) = piece
            .trim()
            .split_once(' ')
            .map(|(n, what)| (n.parse::<u64>(), what))
        {
            match what {
                "passed" => counts.passed += number,
                "failed" => counts.failed += number,
                "ignored" => counts.ignored += number,
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What hangs has said which test it is; a process that escaped holds the pipe, and nobody waits for it.
    #[test]
    fn a_command_that_hangs_is_ended_and_said_so() {
        let mut command = Command::new("timeout");
        let script = "echo 'test result: ok. 2 passed'; setsid sleep 60 & sleep 60";
        command.args(["--kill-after=5", "1", "sh", "-c", script]);
        let mut counts = Counts::default();
        let error = follow(&mut command, &mut counts).unwrap_err().to_string();
        assert!(error.contains("did not end in its time"), "{error}");
        assert_eq!(counts.passed, 2);
    }

    #[test]
    fn what_is_told_is_what_is_run() {
        let cargo = Cargo::new(["test", "--package", "vmgmtd"])
            .and_tests(vec!["keeper".into(), "upgrade".into()])
            .and(["--", "--show-output"]);
        let words = "test --package vmgmtd --test keeper --test upgrade -- --show-output";
        assert_eq!(cargo.told(), format!("cargo {words}"));
        let command = cargo.command();
        let run: Vec<_> = command.get_args().map(|word| word.to_string_lossy()).collect();
        assert!(run.join(" ").ends_with(&format!("cargo {words}")), "{run:?}");
    }

    #[test]
    fn closing_lines_add_up() {
        let mut counts = Counts::default();
        count(
            "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.20s",
            &mut counts,
        );
        count(
            "test result: FAILED. 4 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s",
            &mut counts,
        );
        count("skipped: no VM", &mut counts);
        count("running 3 tests", &mut counts);
        assert_eq!(
            (counts.passed, counts.failed, counts.ignored, counts.skipped.len()),
            (7, 2, 1, 1)
        );
    }
}
