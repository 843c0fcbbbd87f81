//! BAR0.

use super::*;
use crate::page::OpenAnswer;
use vmgmt_abi::Status;
use vmgmt_abi::registers as abi;
use vmgmt_abi::registers::{DeviceState, RingState};

const fn ring(n: u32, register: u32) -> u32 {
    abi::RINGS + n * abi::RING_STRIDE + register
}

#[test]
fn identity_and_limits() {
    let mut bench = Bench::new();
    bench.core(5);
    for (offset, value) in [
        (abi::MAGIC, vmgmt_abi::MAGIC),
        (abi::ABI_VERSION, vmgmt_abi::ABI_VERSION),
        (abi::FEATURES_LOW, 0x103),
        (abi::STATE, 0),
        (abi::RING_COUNT, 4),
        (abi::RING_ENTRIES_MAX, 1024),
        (abi::VECTORS, 16),
        (abi::CORE_LIFE_LOW, 5),
        (abi::SESSION_LOW, 7),
        (abi::GENERATION, 0),
        (abi::TRANSFER_BYTES_MAX, 16 << 20),
        (abi::LIST_ENTRIES_MAX, 4096),
        (abi::BAD_ACCESSES, 0),
    ] {
        assert_eq!(bench.get(0, offset), value, "{offset:#x}");
    }
    assert_eq!(
        bench.read(0, u64::from(abi::CORE_LIFE_LOW), 8),
        5u64.to_le_bytes()
    );
}

#[test]
fn odd_accesses_read_zeros_change_nothing_and_are_counted() {
    let mut bench = Bench::new();
    for (offset, bytes) in [
        (0u64, 1),
        (0, 2),
        (2, 4),
        (4, 8),
        (0x5c, 4),
        (0x3ff8, 8),
        (0, 16),
        (0, 16384),
    ] {
        assert!(bench.read(0, offset, bytes).iter().all(|byte| *byte == 0));
    }
    // A ring and a doorbell that this device does not have; a write to what is read only.
    bench.get(0, ring(4, 0));
    bench.set(0, abi::DOORBELLS + 16, 1);
    bench.set(0, abi::MAGIC, 1);
    bench.set(0, abi::CONTROL, 3);
    assert_eq!(bench.get(0, abi::BAD_ACCESSES), 12);
    assert_eq!(bench.front.generation(), 0);
}

#[test]
fn a_ring_is_latched_when_enabled_and_locked_then() {
    let mut bench = Bench::new();
    let core = bench.core(1);
    bench.write(
        0,
        u64::from(ring(1, abi::RING_SUBMISSIONS_LOW)),
        &0x1234_5678_9abc_def0u64.to_le_bytes(),
    );
    bench.set(0, ring(1, abi::RING_COMPLETIONS_HIGH), 9);
    bench.set(0, ring(1, abi::RING_SUBMISSION_ENTRIES), 64);
    bench.set(0, ring(1, abi::RING_MODE), 2);
    bench.set(0, ring(1, abi::RING_NONCE_LOW), 77);
    bench.set(0, ring(1, abi::RING_ENABLE), 1);
    let epoch = bench.get(0, ring(1, abi::RING_EPOCH));
    let setup = bench.front.ring(1).unwrap();
    assert_eq!(
        (
            setup.epoch,
            setup.enabled,
            setup.submissions,
            setup.completions,
            setup.mode,
            setup.nonce
        ),
        (epoch, true, 0x1234_5678_9abc_def0, 9 << 32, 2, 77)
    );
    assert_eq!(bench.get(0, abi::STATE), DeviceState::ACTIVE.0);
    assert_eq!(bench.get(0, ring(1, abi::RING_STATUS)), RingState::OPENING.0);
    bench.set(0, ring(1, abi::RING_MODE), 3);
    assert_eq!(bench.get(0, ring(1, abi::RING_MODE)), 2);
    // Features are locked too.
    bench.set(0, abi::FEATURES_ACK_LOW, 1);
    assert_eq!(bench.front.features(), 0);

    let answer = OpenAnswer {
        epoch,
        state: RingState::REFUSED,
        status: Status::BAD_ARGUMENT,
    };
    core.set_open_answer(
        1,
        OpenAnswer {
            epoch: epoch + 2,
            ..answer
        },
    );
    assert_eq!(bench.get(0, ring(1, abi::RING_STATUS)), RingState::OPENING.0);
    core.set_open_answer(
        1,
        OpenAnswer {
            state: RingState(77),
            ..answer
        },
    );
    assert_eq!(bench.get(0, ring(1, abi::RING_STATUS)), RingState::OPENING.0);
    core.set_open_answer(1, answer);
    assert_eq!(bench.get(0, ring(1, abi::RING_STATUS)), 3 | (1 << 16));
    // What was said holds over the core's death.
    bench.input(Input::CoreDead { life: 1 });
    assert_eq!(bench.get(0, ring(1, abi::RING_STATUS)), 3 | (1 << 16));
}

#[test]
fn a_closed_ring_says_so_when_its_dma_is_over() {
    let mut bench = Bench::new();
    let core = bench.core(1);
    bench.set(0, ring(0, abi::RING_ENABLE), 1);
    core.set_busy(true);
    bench.set(0, ring(0, abi::RING_ENABLE), 0);
    assert!(!bench.front.ring(0).unwrap().enabled);
    assert_eq!(bench.get(0, ring(0, abi::RING_STATUS)), RingState::OPEN.0);
    core.set_busy(false);
    assert_eq!(bench.get(0, ring(0, abi::RING_STATUS)), RingState::CLOSED.0);
}

#[test]
fn a_closed_ring_of_a_busy_core_is_closed_when_the_core_says_so() {
    let mut bench = Bench::new();
    let core = bench.core(1);
    bench.set(0, ring(0, abi::RING_ENABLE), 1);
    core.set_busy(true);
    bench.set(0, ring(0, abi::RING_ENABLE), 0);
    // A fence passes although messages are on their way into the ring.
    core.set_fenced(bench.front.fence());
    assert_eq!(bench.get(0, ring(0, abi::RING_STATUS)), RingState::OPEN.0);
    core.set_open_answer(
        0,
        OpenAnswer {
            epoch: bench.front.ring(0).unwrap().epoch,
            state: RingState::CLOSED,
            status: Status::OK,
        },
    );
    assert_eq!(bench.get(0, ring(0, abi::RING_STATUS)), RingState::CLOSED.0);
}

#[test]
fn features_that_are_not_offered_are_dropped_and_the_host_page_is_latched_by_its_high_half() {
    let mut bench = Bench::new();
    bench.write(0, u64::from(abi::FEATURES_ACK_LOW), &u64::MAX.to_le_bytes());
    assert_eq!(bench.front.features(), 0x103);
    bench.set(0, abi::HOST_PAGE_LOW, 0x5fff);
    assert_eq!(bench.front.host_page().0, 0);
    bench.set(0, abi::HOST_PAGE_HIGH, 1);
    assert_eq!(bench.front.host_page(), (0x1_0000_5000, 1));
}

#[test]
fn doorbells_count_and_wake_the_core() {
    let mut bench = Bench::new();
    bench.set(0, abi::DOORBELLS + 8, 17);
    assert!(bench.outputs.contains(&Output::Touched));
    assert_eq!(bench.front.doorbell(2), (1 << 32) | 17);
}

#[test]
fn a_failed_device_stays_failed_until_reset_and_quarantine_is_shown() {
    let mut bench = Bench::new();
    let core = bench.core(1);
    core.set_state(0, DeviceState::FAILED, Status::BAD_ADDRESS);
    assert_eq!(bench.get(0, abi::STATE), DeviceState::FAILED.0);
    bench.core(2);
    assert_eq!(bench.get(0, abi::FAIL_CAUSE), u32::from(Status::BAD_ADDRESS.0));
    bench.set(0, abi::CONTROL, abi::CONTROL_RESET);
    assert_eq!(bench.get(0, abi::STATE), DeviceState::BLANK.0);
    // A state of another generation, or one that is not the core's to give, is not heard.
    core.set_state(0, DeviceState::FAILED, Status::BAD_ADDRESS);
    assert_eq!(bench.get(0, abi::STATE), DeviceState::BLANK.0);
    bench.input(Input::Quarantine(true));
    assert_eq!(bench.get(0, abi::STATE), DeviceState::QUARANTINED.0);
}
