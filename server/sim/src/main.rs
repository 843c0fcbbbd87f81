//! vmgmt-sim: runs seeds of the simulator, for a count or for a time.
#![allow(clippy::print_stdout)]

use clap::Parser;
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use vmgmt_sim::{Fault, Options, run};

/// Runs the rooms under simulated faults: same seed, same story.
#[derive(Parser)]
struct Arguments {
    /// The first seed (decimal or 0x…); without it a fresh one.
    #[arg(long, value_parser = number)]
    seed: Option<u64>,
    /// So many seeds, one after the other; without --seconds 1 if --seed is given, else 100.
    #[arg(long)]
    seeds: Option<u64>,
    /// Steps of each seed before everything heals.
    #[arg(long, default_value_t = 3000)]
    steps: u64,
    /// Fresh seeds until so many seconds have passed.
    #[arg(long)]
    seconds: Option<u64>,
    /// Every action goes to standard error.
    #[arg(long)]
    aloud: bool,
    /// A deliberate mistake, by its name in faults.rs: to see what it leads to.
    #[arg(long, value_parser = fault, default_value = "None")]
    fault: Fault,
    /// Go on after a failure.
    #[arg(long)]
    keep_going: bool,
}

fn number(text: &str) -> Result<u64, String> {
    let parsed = text
        .strip_prefix("0x")
        .map_or_else(|| text.parse(), |hex| u64::from_str_radix(hex, 16));
    parsed.map_err(|error| format!("{text}: {error}"))
}

fn fault(name: &str) -> Result<Fault, String> {
    if name == "None" {
        return Ok(Fault::None);
    }
    Fault::named(name).ok_or_else(|| format!("{name}: none of {:?}", Fault::ALL))
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // The one thing here that is not determined: where to begin, when nobody says.
    let fresh = || RandomState::new().build_hasher().finish();
    let first = arguments.seed.unwrap_or_else(fresh);
    let seeds = match (arguments.seeds, arguments.seconds) {
        (Some(seeds), _) => seeds,
        (None, Some(_)) => u64::MAX,
        (None, None) if arguments.seed.is_some() => 1,
        (None, None) => 100,
    };
    println!("seeds from {first:#x}, each of {} steps", arguments.steps);
    let start = Instant::now();
    let limit = arguments.seconds.map(Duration::from_secs);
    let (mut done, mut failed) = (0u64, 0u64);
    let mut sums = [0u64; 10];
    while done < seeds && limit.is_none_or(|limit| start.elapsed() < limit) {
        let seed = first.wrapping_add(done);
        done += 1;
        match run(Options {
            seed,
            steps: arguments.steps,
            fault: arguments.fault,
            aloud: arguments.aloud,
        }) {
            Ok(report) => {
                let each = [
                    report.completions,
                    report.delivered,
                    report.committed,
                    report.taken,
                    report.deaths,
                    report.upgrades,
                    report.undead,
                    report.hand_overs,
                    report.freezes,
                    report.repeats,
                ];
                sums.iter_mut().zip(each).for_each(|(sum, each)| *sum += each);
                if seeds == 1 {
                    println!("trace {:#018x}", report.hash);
                }
            }
            Err(failure) => {
                failed += 1;
                println!("{failure}\n");
                if !arguments.keep_going {
                    break;
                }
            }
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let [
        completions,
        delivered,
        committed,
        taken,
        deaths,
        upgrades,
        undead,
        hand_overs,
        freezes,
        repeats,
    ] = sums;
    println!(
        "{done} seeds from {first:#x} of {} steps in {seconds:.1} s ({:.0} steps/s): {completions} completions, {delivered} messages ({repeats} again), \
         {committed} files, {taken} offers taken, {deaths} deaths of the core ({upgrades} in order, {undead} with a worker in disk sleep), \
         {hand_overs} hand-overs of the front, {freezes} freezes",
        arguments.steps,
        (done * arguments.steps) as f64 / seconds.max(0.001),
    );
    println!(
        "test result: {}. {} passed; {failed} failed; 0 ignored",
        if failed == 0 { "ok" } else { "FAILED" },
        done - failed
    );
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
