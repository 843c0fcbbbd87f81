//! What a core life decided and did not bring to its end: the next one finds the guest's memory otherwise, and decides nothing anew.
//!
//! Each test kills the core after each of its steps in turn.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use vmgmt_abi::{Mode, Opcode, Status, Submission};
use vmgmt_device::page::{PlainWords, Words};
use vmgmt_device::rings::testing::{Bed, FlatGuest, FlatMemory, FlatRegion, RingPlan};
use vmgmt_device::rings::{Answer, Input, Output};

type PlainBed = Bed<PlainWords, FlatMemory>;
/// The ring lies before it.
const DATA: u64 = 0x8_0000;
const STEPS_MAX: usize = 200;

fn bed() -> (PlainBed, RingPlan) {
    let guest = FlatGuest::new(1 << 20);
    let mut bed = Bed::new(&guest, FlatMemory::new(&guest), PlainWords::new).unwrap();
    let mut ring = RingPlan::new(0, 0, 64, 64, Mode::CHAT.0);
    bed.enable(&mut ring);
    bed.outputs();
    (bed, ring)
}

/// Whether the memory behind the ring is there.
fn plug(bed: &mut PlainBed, data: bool) {
    let region = FlatRegion {
        iova: 0,
        bytes: if data { 1 << 20 } else { DATA },
        readable: true,
        writable: true,
        number: 1,
    };
    bed.memory.set_regions(vec![region]);
}

fn with_buffer(opcode: Opcode, tag: u32) -> Submission {
    Submission {
        tag,
        opcode: opcode.0,
        buffer: DATA,
        length: 64,
        ..Submission::default()
    }
}

/// A step of the core: a turn, or answers to its messages. False: nothing is left to be done.
fn step(bed: &mut PlainBed, outputs: &mut Vec<Output>) -> bool {
    let turn = bed.poll(64);
    outputs.extend(bed.outputs());
    bed.end_turn();
    let before = outputs.len();
    outputs.extend(bed.outputs());
    let told = outputs.len() > before;
    bed.memory.deliver() || turn.more || told
}

/// So many steps at most, then all that is left when the core is another and lives on.
fn live_and_die(bed: &mut PlainBed, steps: usize, heal: impl FnOnce(&mut PlainBed)) -> [Vec<Output>; 2] {
    let mut lives = [Vec::new(), Vec::new()];
    let [first, second] = &mut lives;
    for _ in 0..steps {
        step(bed, first);
    }
    heal(bed);
    bed.replace_core(PlainWords::new).unwrap();
    bed.touch();
    for _ in 0..STEPS_MAX {
        step(bed, second);
    }
    lives
}

fn tags(outputs: &[Output]) -> Vec<u32> {
    let tag = |output: &Output| match output {
        Output::Submission(fetched) => Some(fetched.tag),
        _ => None,
    };
    outputs.iter().filter_map(tag).collect()
}

fn taken(bed: &PlainBed, ring: &mut RingPlan) -> Vec<(u32, Status)> {
    let mut taken: Vec<_> = std::iter::from_fn(|| ring.take(&bed.guest))
        .map(|completion| (completion.tag, Status(completion.status)))
        .collect();
    taken.sort_by_key(|(tag, _)| *tag);
    taken
}

#[test]
fn what_was_refused_is_not_done_behind_what_was_submitted_later() {
    let mut refused_first = 0;
    for steps in 0..20 {
        let (mut bed, mut ring) = bed();
        plug(&mut bed, false);
        bed.memory.set_by_messages(true);
        ring.submit(&bed.guest, &with_buffer(Opcode::SEND, 0));
        let later = Submission {
            length: 0,
            buffer: 0,
            ..with_buffer(Opcode::SEND, 1)
        };
        ring.submit(&bed.guest, &later);
        let [first, second] = live_and_die(&mut bed, steps, |bed| plug(bed, true));
        let handed: Vec<u32> = tags(&first).into_iter().chain(tags(&second)).collect();
        match handed.as_slice() {
            // The first life died before it looked.
            [0, 1] => {}
            [1] | [1, 1] => {
                refused_first += 1;
                assert_eq!(
                    taken(&bed, &mut ring),
                    [(0, Status::BAD_ADDRESS)],
                    "{steps} steps"
                );
            }
            other => panic!("{steps} steps: the hub got {other:?}"),
        }
    }
    assert!(refused_first > 1, "never refused in a life that died");
}

#[test]
fn what_the_hub_was_told_to_forget_is_not_given_to_it_again() {
    let mut forgotten = 0;
    for steps in 0..20 {
        let (mut bed, mut ring) = bed();
        plug(&mut bed, true);
        ring.submit(&bed.guest, &with_buffer(Opcode::SEND, 0));
        let mut outputs = Vec::new();
        step(&mut bed, &mut outputs);
        assert_eq!(tags(&outputs), [0]);
        plug(&mut bed, false);
        bed.memory.set_by_messages(true);
        bed.replace_core(PlainWords::new).unwrap();
        bed.touch();
        let [first, second] = live_and_die(&mut bed, steps, |bed| plug(bed, true));
        let is_void = |output: &Output| matches!(output, Output::Void(_));
        assert!(tags(&first).is_empty());
        if first.iter().any(is_void) {
            forgotten += 1;
            assert!(
                tags(&second).is_empty(),
                "{steps} steps: forgotten, and then given to it"
            );
            assert_eq!(taken(&bed, &mut ring), [(0, Status::OUTCOME_UNKNOWN)]);
        } else {
            assert_eq!(tags(&second), [0], "{steps} steps");
        }
    }
    assert!(forgotten > 1, "never told in a life that died");
}

#[test]
fn a_completion_without_a_record_is_not_written_over() {
    let (mut bed, mut ring) = bed();
    plug(&mut bed, true);
    ring.submit(&bed.guest, &with_buffer(Opcode::RECEIVE, 0));
    let mut outputs = Vec::new();
    step(&mut bed, &mut outputs);
    let [Output::Submission(fetched)] = outputs.as_slice() else {
        panic!("{outputs:?}");
    };
    let words: Vec<u64> = (0..bed.state.len()).map(|at| bed.state.load(at)).collect();
    let noop = Submission {
        tag: 1,
        opcode: Opcode::NOOP.0,
        ..Submission::default()
    };
    ring.submit(&bed.guest, &noop);
    step(&mut bed, &mut Vec::new());
    assert_eq!(taken(&bed, &mut ring), [(1, Status::OK)]);
    // The kill came between the completion and the cursor.
    for (at, word) in words.into_iter().enumerate() {
        bed.state.store(at, word);
    }
    bed.replace_core(PlainWords::new).unwrap();
    bed.handle(Input::Complete {
        token: fetched.token,
        answer: Answer::ok(4),
        payload: b"data".to_vec(),
        confirm: false,
    });
    // Another NOOP behind both of them.
    ring.submit(&bed.guest, &Submission { tag: 2, ..noop });
    bed.touch();
    for _ in 0..STEPS_MAX {
        step(&mut bed, &mut Vec::new());
    }
    assert_eq!(taken(&bed, &mut ring), [(0, Status::OK), (2, Status::OK)]);
}
