//! The rings, by their verbs: what a guest and a hub see.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod lives_of_a_ring;
mod next_core;
mod port;
mod signals;
mod submissions;

use vmgmt_abi::registers::RingState;
use vmgmt_abi::{Completion, Mode, Opcode, Status, Submission};
use vmgmt_device::page::PlainWords;
use vmgmt_device::rings::testing::{Bed, FlatGuest, FlatMemory, RingPlan};
use vmgmt_device::rings::{Answer, Fetched, Input, Output};

type PlainBed = Bed<PlainWords, FlatMemory>;
const DATA: u64 = 0x8_0000;

fn bed() -> PlainBed {
    let guest = FlatGuest::new(1 << 20);
    Bed::new(&guest, FlatMemory::new(&guest), PlainWords::new).unwrap()
}

fn open(bed: &mut PlainBed, mode: Mode) -> RingPlan {
    let mut ring = RingPlan::new(0, 0, 64, 64, mode.0);
    bed.enable(&mut ring);
    assert_eq!(bed.core.open_answer(0).state, RingState::OPEN);
    ring
}

fn of(opcode: Opcode, tag: u32) -> Submission {
    Submission {
        tag,
        opcode: opcode.0,
        ..Submission::default()
    }
}

/// One turn; signals and kicks are left out.
fn turn(bed: &mut PlainBed) -> Vec<Output> {
    let mut outputs = Vec::new();
    loop {
        let turn = bed.poll(64);
        outputs.extend(bed.outputs());
        bed.end_turn();
        outputs.extend(bed.outputs());
        let delivered = turn.waiting && bed.memory.deliver();
        if !delivered && !turn.more {
            break;
        }
    }
    while bed.memory.deliver() {
        bed.poll(64);
        bed.end_turn();
        outputs.extend(bed.outputs());
    }
    outputs.retain(|output| !matches!(output, Output::Signal { .. } | Output::Kick));
    outputs
}

fn submission(outputs: &[Output]) -> Fetched {
    match outputs {
        [Output::Submission(fetched)] => (**fetched).clone(),
        other => panic!("one submission expected, not {other:?}"),
    }
}

fn complete(bed: &mut PlainBed, fetched: &Fetched, answer: Answer, payload: &[u8], confirm: bool) {
    bed.handle(Input::Complete {
        token: fetched.token,
        answer,
        payload: payload.to_vec(),
        confirm,
    });
}

fn status(completion: Option<Completion>) -> Option<(u32, Status)> {
    completion.map(|completion| (completion.tag, Status(completion.status)))
}
