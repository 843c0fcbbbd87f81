//! What a submission costs the core: no-ops of one ring over flat memory, everything included (guest half too, measured apart).
//!
//! `cargo bench -p vmgmt-device --bench rings`; the first argument is the number of submissions.

use std::hint::black_box;
use std::time::{Duration, Instant};
use vmgmt_abi::{Opcode, Submission};
use vmgmt_device::page::PlainWords;
use vmgmt_device::rings::testing::{Bed, FlatGuest, FlatMemory, RingPlan};

const BATCH: u32 = 32;
const RUNS: u64 = 50;

fn main() {
    // cargo passes --bench; a number is ours.
    let count: u64 = std::env::args()
        .skip(1)
        .find_map(|argument| argument.parse().ok())
        .unwrap_or(4_000_000);
    for entries in [64, 256, 1024] {
        // The best of many short runs: what else runs on the machine is not ours to measure.
        let best = (0..RUNS)
            .map(|_| noops(count / RUNS, entries))
            .min()
            .unwrap_or(Duration::MAX);
        let ns = best.as_nanos() as f64 / (count / RUNS) as f64;
        println!(
            "noop, {entries} entries, batches of {BATCH}: {ns:.1} ns each, {:.2} million/s (core's half)",
            1e3 / ns
        );
    }
}

/// Time that the rings took for `count` no-ops.
fn noops(count: u64, entries: u32) -> Duration {
    let guest = FlatGuest::new(1 << 20);
    let Ok(mut bed) = Bed::new(&guest, FlatMemory::new(&guest), PlainWords::new) else {
        return Duration::MAX;
    };
    let mut ring = RingPlan::new(0, 0, entries, entries, 0);
    bed.enable(&mut ring);
    let mut took = Duration::ZERO;
    let mut done = 0;
    while done < count {
        for tag in 0..BATCH {
            ring.submit(
                &guest,
                &Submission {
                    tag,
                    opcode: Opcode::NOOP.0,
                    ..Submission::default()
                },
            );
        }
        let start = Instant::now();
        let turn = bed.poll(BATCH);
        bed.end_turn();
        while let Some(output) = bed.rings.poll_output() {
            black_box(output);
        }
        took += start.elapsed();
        assert_eq!(turn.completed, BATCH, "every no-op is answered in its turn");
        for tag in 0..BATCH {
            assert_eq!(ring.take(&guest).map(|completion| completion.tag), Some(tag));
        }
        done += u64::from(BATCH);
    }
    took
}
