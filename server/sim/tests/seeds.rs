//! Fixed seeds, for regression; the same seed twice, for determinism; deliberate mistakes, as proof that the simulator can fail.
#![allow(clippy::panic)]

use vmgmt_sim::{Fault, Options, Report, run};

fn options(seed: u64, fault: Fault) -> Options {
    Options {
        seed,
        steps: 1500,
        fault,
        aloud: false,
    }
}

fn passes(seed: u64) -> Report {
    run(options(seed, Fault::None)).unwrap_or_else(|failure| panic!("{failure}"))
}

#[test]
fn fixed_seeds_pass() {
    let (mut deaths, mut delivered, mut committed) = (0, 0, 0);
    for seed in (0..SEEDS).chain(FOUND) {
        let report = passes(seed);
        deaths += report.deaths;
        delivered += report.delivered;
        committed += report.committed;
    }
    // Seeds under which nothing happens prove nothing.
    assert!(
        deaths > SEEDS && delivered > SEEDS && committed > SEEDS / 4,
        "{deaths} deaths, {delivered} messages, {committed} files in {SEEDS} seeds"
    );
}

#[test]
fn the_same_seed_tells_the_same_story() {
    for seed in [3, 1 << 40, u64::MAX] {
        let first = run(options(seed, Fault::None)).map_err(|failure| failure.to_string());
        let second = run(options(seed, Fault::None)).map_err(|failure| failure.to_string());
        assert_eq!(first, second, "seed {seed:#x}");
    }
}

#[test]
fn each_mistake_is_caught() {
    let mut missed = Vec::new();
    for fault in Fault::ALL.into_iter() {
        // A seed that fails without the mistake proves nothing.
        let caught = (0..SEEDS_OF_A_MISTAKE)
            .chain(ALSO)
            .filter_map(|seed| run(options(seed, fault)).err())
            .find(|failure| run(options(failure.seed, Fault::None)).is_ok());
        match caught {
            Some(failure) => println!("{fault:?}: seed {:#x}: {}", failure.seed, failure.complaint),
            None => missed.push(fault),
        }
    }
    assert!(
        missed.is_empty(),
        "not noticed in {SEEDS_OF_A_MISTAKE} seeds: {missed:?}"
    );
}

const SEEDS: u64 = 60;
/// Seeds that a sweep found, and that failed before the product was mended: a SEND that was done, could not be read by the next core, and was done again
/// by the one after it.
const FOUND: [u64; 1] = [0x4696_0f9b_d3ee_dfff];
/// In these a dead core's worker, asleep in the disk, writes into a file that goes on.
const ALSO: [u64; 3] = [0x507, 0xf02, 0xfbc];
const SEEDS_OF_A_MISTAKE: u64 = 200;
