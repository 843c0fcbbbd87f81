//! The end of a ring or a device: the hub hears first what the guest has got after all, and hears of a reset even if a core dies over it.
#![allow(clippy::unwrap_used, clippy::panic)]

use vmgmt_abi::registers::RingState;
use vmgmt_abi::{Mode, Opcode, Submission};
use vmgmt_device::page::{PlainWords, RingSetup, control};
use vmgmt_device::rings::testing::{Bed, FlatGuest, FlatMemory, RingPlan};
use vmgmt_device::rings::{Answer, Channel, Input, Output, Token};

type PlainBed = Bed<PlainWords, FlatMemory>;

fn bed() -> PlainBed {
    let guest = FlatGuest::new(1 << 20);
    Bed::new(&guest, FlatMemory::new(&guest), PlainWords::new).unwrap()
}

/// Turns until nothing is left to do; what came out.
fn run(bed: &mut PlainBed) -> Vec<Output> {
    let mut all = Vec::new();
    for _ in 0..20 {
        bed.poll(8);
        all.extend(bed.outputs());
        bed.end_turn();
        all.extend(bed.outputs());
        bed.memory.deliver();
    }
    all
}

fn ring(bed: &mut PlainBed) -> RingPlan {
    let mut ring = RingPlan::new(0, 0, 8, 8, Mode::CHAT.0);
    bed.enable(&mut ring);
    ring
}

fn send(bed: &PlainBed, ring: &mut RingPlan, tag: u32) {
    let submission = Submission {
        tag,
        opcode: Opcode::SEND.0,
        handle: 3,
        ..Submission::default()
    };
    ring.submit(&bed.guest, &submission);
    bed.front.ring_doorbell(0, ring.tail);
}

fn fetched(outputs: &[Output]) -> Vec<Token> {
    let token = |output: &Output| match output {
        Output::Submission(fetched) => Some(fetched.token),
        _ => None,
    };
    outputs.iter().filter_map(token).collect()
}

/// Published, ChannelClosed and Reset, in order.
fn told(outputs: Vec<Output>) -> Vec<Output> {
    let is_told = |output: &Output| {
        matches!(
            output,
            Output::Published { .. } | Output::ChannelClosed { .. } | Output::Reset { .. }
        )
    };
    outputs.into_iter().filter(is_told).collect()
}

const RESET: Output = Output::Reset { session: 7 };

/// Two answers are written by message; the first of them is there.
fn half_answered() -> (PlainBed, [Output; 2]) {
    let mut bed = bed();
    bed.memory.set_by_messages(true);
    let mut ring = ring(&mut bed);
    run(&mut bed);
    send(&bed, &mut ring, 1);
    send(&bed, &mut ring, 2);
    bed.touch();
    let tokens = fetched(&run(&mut bed));
    let [first, second] = tokens[..] else {
        panic!("{tokens:?}");
    };
    for token in [first, second] {
        bed.handle(Input::Complete {
            token,
            answer: Answer::ok(0),
            payload: Vec::new(),
            confirm: true,
        });
    }
    assert_eq!(told(bed.outputs()), [], "nothing is there yet");
    bed.memory.deliver_writes(2);
    let published = |token, published| Output::Published { token, published };
    (bed, [published(first, true), published(second, false)])
}

#[test]
fn what_the_guest_got_before_a_reset_is_told_before_the_reset() {
    let (mut bed, [first, second]) = half_answered();
    bed.front.set_generation(2);
    bed.touch();
    assert_eq!(
        told(bed.outputs()),
        vec![first],
        "the second may still be answered"
    );
    bed.memory.give_up();
    bed.poll(8);
    assert_eq!(told(bed.outputs()), [second, RESET]);
}

#[test]
fn what_the_guest_got_before_its_process_ended_is_told_before_the_end() {
    let (mut bed, published) = half_answered();
    bed.front.set_control(control::BUS_MASTER | control::GONE);
    bed.touch();
    assert_eq!(told(bed.outputs()), []);
    bed.handle(Input::End);
    assert_eq!(told(bed.outputs()), published);
}

#[test]
fn what_the_guest_got_is_told_before_its_ring_is_closed_without_dma() {
    let (mut bed, [first, second]) = half_answered();
    bed.front.set_control(0);
    bed.front.set_ring(0, &RingSetup::default());
    bed.touch();
    let closed = Output::ChannelClosed {
        session: 7,
        channel: Channel::Ring(0),
    };
    assert_eq!(told(bed.outputs()), [first, second, closed]);
}

#[test]
fn a_reset_is_told_by_the_next_life_until_the_hub_has_heard_of_it() {
    let mut bed = bed();
    ring(&mut bed);
    run(&mut bed);
    bed.front.set_generation(2);
    bed.touch();
    // It dies here; and once more when the hub has it, and has not journaled what follows.
    for _ in 0..2 {
        bed.replace_core(PlainWords::new).unwrap();
        bed.touch();
        assert_eq!(told(bed.outputs()), [RESET]);
    }
    bed.end_turn();
    bed.replace_core(PlainWords::new).unwrap();
    bed.touch();
    assert!(!told(bed.outputs()).contains(&RESET));
}

#[test]
fn a_ring_is_not_opened_before_the_hub_has_heard_that_it_was_closed() {
    let mut bed = bed();
    ring(&mut bed);
    run(&mut bed);
    // Closed and set up again while no core lived; the one that finds it so dies before the hub has journaled it.
    bed.front.set_ring(0, &RingSetup::default());
    let mut plan = RingPlan::new(0, 0, 8, 8, Mode::CHAT.0);
    plan.setup.epoch = bed.front.set_ring(0, &plan.setup);
    let closed = Output::ChannelClosed {
        session: 7,
        channel: Channel::Ring(0),
    };
    for _ in 0..2 {
        bed.replace_core(PlainWords::new).unwrap();
        bed.touch();
        assert!(bed.poll(8).more, "to be polled again");
        assert_eq!(told(bed.outputs()), vec![closed.clone()]);
        assert_ne!(bed.core.open_answer(0).state, RingState::OPEN);
    }
    bed.end_turn();
    bed.enable(&mut plan);
    run(&mut bed);
    assert_eq!(bed.core.open_answer(0).state, RingState::OPEN);
}

#[test]
fn nothing_is_fetched_before_the_hub_has_heard_of_the_reset() {
    let mut bed = bed();
    ring(&mut bed);
    run(&mut bed);
    bed.front.set_generation(2);
    let mut ring = ring(&mut bed);
    send(&bed, &mut ring, 5);
    bed.touch();
    assert!(bed.poll(8).more, "to be polled again");
    // The hub has not heard of it yet: a turn's end changes nothing.
    bed.end_turn();
    bed.poll(8);
    let outputs = bed.outputs();
    assert_eq!((told(outputs.clone()), fetched(&outputs).len()), (vec![RESET], 0));
    bed.end_turn();
    let outputs = run(&mut bed);
    assert_eq!((told(outputs.clone()), fetched(&outputs).len()), (vec![], 1));
}
