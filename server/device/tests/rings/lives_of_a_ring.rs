//! Rings begin, fail, are closed, and stand still without DMA.

use crate::{DATA, bed, complete, of, open, status, submission, turn};
use vmgmt_abi::registers::{DeviceState, RingState};
use vmgmt_abi::ring::event_offset;
use vmgmt_abi::{Mode, Opcode, Status, Submission};
use vmgmt_device::page::{FrontPage, PlainWords, RingSetup, Words, control};
use vmgmt_device::rings::testing::RingPlan;
use vmgmt_device::rings::{Answer, Channel, Output};

#[test]
fn a_broken_ring_fails_the_device_and_a_reset_heals_it() {
    let mut bed = bed();
    let mut ring = open(&mut bed, Mode::CHAT);
    ring.submit(
        &bed.guest,
        &Submission {
            buffer: DATA,
            length: 64,
            ..of(Opcode::RECEIVE, 5)
        },
    );
    let fetched = submission(&turn(&mut bed));
    bed.guest.store_u32(event_offset::SUBMISSION_TAIL, 1000);
    let outputs = turn(&mut bed);
    let closed = Output::ChannelClosed {
        session: 7,
        channel: Channel::Ring(0),
    };
    assert_eq!(outputs, [closed]);
    assert_eq!(
        bed.core.state(1),
        Some((DeviceState::FAILED, Status::BAD_ARGUMENT))
    );
    assert_eq!(bed.core.open_answer(0).state, RingState::REFUSED);
    complete(&mut bed, &fetched, Answer::ok(0), b"late", true);
    assert_eq!(
        bed.outputs(),
        [Output::Published {
            token: fetched.token,
            published: false
        }]
    );
    let mut there = [0; 4];
    bed.guest.read(DATA, &mut there);
    assert_eq!(there, [0; 4], "no late DMA");
    bed.enable(&mut ring);
    assert_eq!(
        (bed.core.open_answer(0).state, bed.core.open_answer(0).status),
        (RingState::REFUSED, Status::NOT_READY)
    );
    bed.replace_core(PlainWords::new).unwrap();
    bed.touch();
    assert_eq!(
        bed.core.state(1),
        Some((DeviceState::FAILED, Status::BAD_ARGUMENT)),
        "the next core says so too"
    );
    bed.outputs();
    bed.front.set_generation(2);
    bed.touch();
    assert_eq!(bed.outputs(), [Output::Reset { session: 7 }]);
    bed.end_turn();
    let mut ring = open(&mut bed, Mode::CHAT);
    ring.submit(&bed.guest, &of(Opcode::NOOP, 1));
    turn(&mut bed);
    assert_eq!(status(ring.take(&bed.guest)), Some((1, Status::OK)));
    assert_eq!(bed.core.state(2), Some((DeviceState::ACTIVE, Status::OK)));
}

#[test]
fn a_head_beyond_what_was_published_fails_the_device() {
    let mut bed = bed();
    let mut ring = RingPlan::new(0, 0, 64, 4, 0);
    bed.enable(&mut ring);
    bed.guest.store_u32(event_offset::COMPLETION_HEAD, 1);
    for tag in 0..10 {
        ring.submit(&bed.guest, &of(Opcode::NOOP, tag));
    }
    bed.poll(64);
    bed.guest.store_u32(event_offset::COMPLETION_HEAD, 9);
    bed.poll(64);
    assert_eq!(
        bed.core.state(1),
        Some((DeviceState::FAILED, Status::BAD_ARGUMENT))
    );
}

#[test]
fn a_closed_ring_forgets_everything() {
    let mut bed = bed();
    let mut ring = open(&mut bed, Mode::CHAT);
    ring.submit(
        &bed.guest,
        &Submission {
            buffer: DATA,
            length: 64,
            ..of(Opcode::RECEIVE, 5)
        },
    );
    let old = submission(&turn(&mut bed));
    bed.enable(&mut ring);
    let closed = Output::ChannelClosed {
        session: 7,
        channel: Channel::Ring(0),
    };
    assert_eq!(bed.outputs(), [closed]);
    ring.submit(
        &bed.guest,
        &Submission {
            buffer: DATA,
            length: 64,
            ..of(Opcode::RECEIVE, 6)
        },
    );
    let new = submission(&turn(&mut bed));
    assert_ne!(old.token, new.token);
    complete(&mut bed, &old, Answer::ok(0), &[], false);
    assert_eq!(bed.rings.buffer(old.token), None);
    assert_eq!(ring.take(&bed.guest), None);
    complete(&mut bed, &new, Answer::ok(0), &[], false);
    assert_eq!(status(ring.take(&bed.guest)), Some((6, Status::OK)));
}

/// The guest closes a ring, is told that it is closed, clears its memory and enables it again; the core looks in the middle of the last.
#[test]
fn a_ring_whose_next_set_up_is_being_written_is_left_alone() {
    let mut bed = bed();
    let mut ring = open(&mut bed, Mode::CHAT);
    for tag in 1..4 {
        ring.submit(&bed.guest, &of(Opcode::RECEIVE, tag));
    }
    turn(&mut bed);
    let before: Vec<u64> = (0..FrontPage::<PlainWords>::words_needed(8))
        .map(|index| bed.front_words.load(index))
        .collect();
    bed.front.set_ring(
        ring.n,
        &RingSetup {
            enabled: false,
            ..ring.setup
        },
    );
    // The epoch comes first in its record, and is odd while that is written.
    let epoch = (0..before.len()).find(|index| bed.front_words.load(*index) != before[*index]);
    let epoch = epoch.unwrap();
    let closed = bed.front_words.load(epoch);
    bed.front_words.store(epoch, closed | 1);
    (0..16).for_each(|word| bed.guest.store_u64(ring.setup.events + 8 * word, 0));
    bed.touch();
    turn(&mut bed);
    bed.front_words.store(epoch, closed);
    bed.enable(&mut ring);
    turn(&mut bed);
    assert_eq!(bed.core.state(1), Some((DeviceState::ACTIVE, Status::OK)));
    assert_eq!(bed.core.open_answer(ring.n).state, RingState::OPEN);
    ring.submit(&bed.guest, &of(Opcode::NOOP, 9));
    turn(&mut bed);
    assert_eq!(status(ring.take(&bed.guest)), Some((9, Status::OK)));
}

#[test]
fn quiet_loses_nothing() {
    let mut bed = bed();
    let mut ring = open(&mut bed, Mode::CHAT);
    ring.submit(
        &bed.guest,
        &Submission {
            buffer: DATA,
            length: 64,
            ..of(Opcode::RECEIVE, 5)
        },
    );
    let fetched = submission(&turn(&mut bed));
    for by_control in [true, false] {
        if by_control {
            bed.front.set_control(0);
        } else {
            bed.memory.set_quiet(true);
        }
        ring.submit(&bed.guest, &of(Opcode::NOOP, 6 + u32::from(by_control)));
        if by_control {
            complete(&mut bed, &fetched, Answer::ok(4), b"data", false);
        }
        assert_eq!(turn(&mut bed), []);
        assert_eq!(ring.take(&bed.guest), None);
        bed.front.set_control(control::BUS_MASTER);
        bed.memory.set_quiet(false);
        bed.touch();
        turn(&mut bed);
        assert_eq!(
            std::iter::from_fn(|| ring.take(&bed.guest)).count(),
            1 + usize::from(by_control)
        );
    }
}

#[test]
fn set_ups_that_cannot_be_are_refused_with_their_cause() {
    let mut bed = bed();
    let good = RingPlan::new(1, 0x2_0000, 64, 64, 0);
    let mut refused = |change: &dyn Fn(&mut RingPlan)| {
        let mut plan = good;
        change(&mut plan);
        bed.enable(&mut plan);
        // The hub hears first that the one before is closed.
        turn(&mut bed);
        let answer = bed.core.open_answer(1);
        assert_eq!(answer.epoch, plan.setup.epoch);
        (answer.state == RingState::REFUSED).then_some(answer.status)
    };
    assert_eq!(refused(&|_| {}), None);
    assert_eq!(refused(&|plan| plan.setup.mode = 3), Some(Status::NOT_SUPPORTED));
    assert_eq!(refused(&|plan| plan.setup.mode = 77), Some(Status::BAD_ARGUMENT));
    assert_eq!(
        refused(&|plan| plan.setup.submissions = 1 << 40),
        Some(Status::BAD_ADDRESS)
    );
    assert_eq!(
        refused(&|plan| plan.setup.events = (1 << 20) - 64),
        Some(Status::BAD_ADDRESS)
    );
    assert_eq!(
        refused(&|plan| plan.setup.submission_entries = 63),
        Some(Status::BAD_ARGUMENT)
    );
    let mut plan = good;
    bed.enable(&mut plan);
    bed.guest.store_u64(plan.setup.events + event_offset::NONCE, 1);
    bed.front.set_ring(1, &plan.setup);
    bed.touch();
    turn(&mut bed);
    assert_eq!(bed.core.open_answer(1).status, Status::INTEGRITY);
}
