//! BAR2.

use super::*;
use vmgmt_abi::port;

const BAR2: u32 = 2;

fn commit(bench: &mut Bench, bytes: &[u8]) {
    for chunk in bytes.chunks(4) {
        bench.write(BAR2, u64::from(port::DATA), chunk);
    }
    bench.set(BAR2, port::COMMIT, 1);
}

#[test]
fn a_submission_goes_to_the_core_and_its_result_comes_back() {
    let mut bench = Bench::new();
    let core = bench.core(1);
    bench.set(BAR2, port::MODE, 1);
    commit(&mut bench, &[3; 68]);
    let submission = bench.front.port_submission().unwrap();
    assert_eq!(
        (submission.mode, submission.bytes.as_slice()),
        (1, [3; 68].as_slice())
    );
    assert_eq!(bench.get(BAR2, port::STATUS), port::STATUS_BUSY);
    bench.set(BAR2, port::MODE, 2);
    assert_eq!(bench.get(BAR2, port::MODE), 1);
    core.set_port_result(submission.sequence, &[9; 33]);
    assert_eq!(bench.get(BAR2, port::STATUS), port::STATUS_DONE);
    assert_eq!(bench.front.port_taken(), submission.sequence);
    assert_eq!(bench.get(BAR2, port::READABLE), 33);
    for _ in 0..8 {
        assert_eq!(bench.get(BAR2, port::DATA), 0x0909_0909);
    }
    assert_eq!(bench.read(BAR2, u64::from(port::DATA), 2), [9, 0]);
    assert_eq!(bench.get(BAR2, port::STATUS), port::STATUS_UNDERFLOW);
    bench.set(BAR2, port::STATUS, port::STATUS_UNDERFLOW);
    assert_eq!(bench.get(BAR2, port::STATUS), 0);
}

#[test]
fn a_result_survives_the_core_and_a_short_one_becomes_an_error() {
    let mut bench = Bench::new();
    let core = bench.core(1);
    commit(&mut bench, &[0; 64]);
    core.set_port_result(bench.front.port_sequence(), &[1]);
    bench.input(Input::Kicked);
    bench.input(Input::CoreDead { life: 1 });
    assert_eq!(bench.get(BAR2, port::READABLE), 32);
    let completion = bench.read(BAR2, u64::from(port::DATA), 4);
    assert_eq!(completion, [0; 4]);
}

#[test]
fn errors_are_set_and_nothing_waits() {
    let mut bench = Bench::new();
    commit(&mut bench, &[0; 60]);
    assert_eq!(bench.get(BAR2, port::STATUS), port::STATUS_ERROR);
    assert_eq!(bench.get(BAR2, port::WRITABLE), 64 + 4096 - 60);
    for _ in 0..1026 {
        bench.set(BAR2, port::DATA, 0);
    }
    assert_eq!(
        bench.get(BAR2, port::WRITABLE),
        0,
        "1026 words more would not fit"
    );
    assert_eq!(
        bench.get(BAR2, port::STATUS),
        port::STATUS_ERROR | port::STATUS_OVERFLOW
    );
    assert_eq!(bench.get(BAR2, port::DATA), 0);
    assert_eq!(bench.get(BAR2, port::MAGIC), port::PORT_MAGIC);
    assert_eq!(bench.read(BAR2, 1, 2), [0, 0]);
}

#[test]
fn an_abort_withdraws_and_late_results_are_not_seen() {
    let mut bench = Bench::new();
    let core = bench.core(1);
    commit(&mut bench, &[1; 64]);
    let sequence = bench.front.port_sequence();
    bench.set(BAR2, port::ABORT, 1);
    let withdrawn = bench.front.port_submission().unwrap();
    assert!(withdrawn.bytes.is_empty() && withdrawn.sequence != sequence);
    assert_eq!(bench.front.port_taken(), 0);
    core.set_port_result(sequence, &[9; 40]);
    assert_eq!(bench.get(BAR2, port::STATUS), 0);
    // Nor does it hide that the result of the one before was taken.
    commit(&mut bench, &[1; 64]);
    let taken = bench.front.port_sequence();
    core.set_port_result(taken, &[9; 40]);
    assert_eq!(bench.get(BAR2, port::STATUS), port::STATUS_DONE);
    commit(&mut bench, &[1; 64]);
    bench.set(BAR2, port::ABORT, 1);
    assert!(bench.front.port_sequence() > taken);
    assert_eq!(bench.front.port_taken(), taken);
}

#[test]
fn the_window_is_claimed_by_one() {
    let mut bench = Bench::new();
    bench.set(BAR2, port::CLAIM, 5);
    bench.set(BAR2, port::CLAIM, 6);
    assert_eq!(bench.get(BAR2, port::CLAIM), 5);
    bench.set(BAR2, port::DATA, 1);
    bench.set(BAR2, port::CLAIM, 5);
    assert_eq!(
        (bench.get(BAR2, port::CLAIM), bench.get(BAR2, port::WRITABLE)),
        (0, 64 + 4096)
    );
}
