//! What the next core finds in flight: submissions come again, and what was mapped anew meanwhile is not written.

use crate::{DATA, PlainBed, bed, complete, of, open, status, submission, turn};
use vmgmt_abi::registers::{DeviceState, RingState};
use vmgmt_abi::ring::flag;
use vmgmt_abi::{Mode, Opcode, Status, Submission};
use vmgmt_device::GuestMemory;
use vmgmt_device::Tick;
use vmgmt_device::page::PlainWords;
use vmgmt_device::rings::testing::FlatRegion;
use vmgmt_device::rings::{Answer, Fetched, Output};
use zerocopy::IntoBytes;

#[test]
fn what_was_in_flight_comes_again_under_the_same_token_and_in_order() {
    let mut bed = bed();
    let mut ring = open(&mut bed, Mode::CHAT);
    for tag in 0..5 {
        ring.submit(
            &bed.guest,
            &Submission {
                buffer: DATA,
                length: 64,
                deadline_ns: 9,
                ..of(Opcode::RECEIVE, tag)
            },
        );
    }
    let first: Vec<_> = turn(&mut bed);
    let Some(Output::Submission(second)) = first.get(1).cloned() else {
        panic!("{first:?}")
    };
    complete(&mut bed, &second, Answer::ok(1), b"x", false);
    bed.now = Tick(77);
    bed.replace_core(PlainWords::new).unwrap();
    assert_eq!(
        bed.core.open_answer(0).state,
        RingState::OPEN,
        "the guest sees no pause"
    );
    bed.touch();
    let again = turn(&mut bed);
    let expected: Vec<_> = first
        .into_iter()
        .filter(|output| *output != Output::Submission(second.clone()))
        .map(|output| match output {
            Output::Submission(fetched) => Output::Submission(Box::new(Fetched {
                again: true,
                ..*fetched
            })),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(again, expected);
    assert_eq!(bed.rings.counters().again, 4);
    assert_eq!(status(ring.take(&bed.guest)), Some((1, Status::OK)));
    for output in &again {
        let Output::Submission(fetched) = output else {
            panic!()
        };
        complete(&mut bed, fetched, Answer::ok(1), b"x", false);
    }
    for tag in [0, 2, 3, 4] {
        assert_eq!(status(ring.take(&bed.guest)), Some((tag, Status::OK)));
    }
    // While no core lived the guest reset its device: nothing of it goes on.
    ring.submit(
        &bed.guest,
        &Submission {
            buffer: DATA,
            length: 64,
            ..of(Opcode::RECEIVE, 9)
        },
    );
    turn(&mut bed);
    bed.front.set_generation(2);
    bed.replace_core(PlainWords::new).unwrap();
    assert_eq!(bed.outputs(), [Output::Reset { session: 7 }]);
}

/// Rings below [`DATA`] in one map, and a page each for the maps that follow; their numbers.
fn maps(bed: &mut PlainBed, rings: u64, pages: &[u64]) {
    let region = |iova, bytes, number| FlatRegion {
        iova,
        bytes,
        readable: true,
        writable: true,
        number,
    };
    let pages = pages.iter().zip((DATA..).step_by(0x1000));
    let mut regions = vec![region(0, DATA, rings)];
    regions.extend(pages.map(|(number, iova)| region(iova, 0x1000, *number)));
    bed.memory.set_regions(regions);
}

fn receive(tag: u32, buffer: u64) -> Submission {
    Submission {
        buffer,
        length: 64,
        ..of(Opcode::RECEIVE, tag)
    }
}

fn written(bed: &PlainBed, address: u64) -> bool {
    let mut bytes = [0; 64];
    bed.guest.read(address, &mut bytes);
    bytes != [0; 64]
}

#[test]
fn what_was_mapped_anew_while_no_core_lived_is_not_written() {
    let mut bed = bed();
    maps(&mut bed, 1, &[2, 3, 4]);
    let mut ring = open(&mut bed, Mode::CHAT);
    let buffers = [DATA, DATA + 0x1000, DATA + 0x2000];
    // The last by a list, which lies in the first page.
    bed.guest.write(
        DATA + 0x800,
        vmgmt_abi::ListEntry {
            address: buffers[2],
            length: 64,
        }
        .as_bytes(),
    );
    for (tag, buffer) in (0..).zip(buffers) {
        ring.submit(&bed.guest, &receive(tag, buffer));
    }
    let list = Submission {
        flags: flag::LIST,
        list_entries: 1,
        ..receive(3, DATA + 0x800)
    };
    ring.submit(&bed.guest, &list);
    let fetched: Vec<_> = turn(&mut bed)
        .into_iter()
        .map(|output| submission(&[output]))
        .collect();
    let no_list = bed.guest.load_u64(DATA + 0x800);
    // The first page is another one when the next core comes, and that one dies in the middle of taking up.
    maps(&mut bed, 1, &[5, 3, 4]);
    bed.guest.store_u64(DATA + 0x800, 0);
    bed.replace_core(PlainWords::new).unwrap();
    maps(&mut bed, 1, &[6, 3, 4]);
    bed.guest.store_u64(DATA + 0x800, no_list);
    bed.replace_core(PlainWords::new).unwrap();
    bed.memory.set_by_messages(true);
    bed.touch();
    assert!(bed.outputs().is_empty(), "it waits for its messages");
    bed.memory.set_by_messages(false);
    bed.replace_core(PlainWords::new).unwrap();
    // What the hub had answered already comes before the buffer is known again.
    complete(&mut bed, &fetched[0], Answer::ok(4), b"late", true);
    let outputs = turn(&mut bed);
    let (token_0, token_3) = (fetched[0].token, fetched[3].token);
    assert!(outputs.contains(&Output::Void(token_3)), "{outputs:?}");
    let lost = Output::Published {
        token: token_0,
        published: false,
    };
    assert!(outputs.contains(&lost), "{outputs:?}");
    let again = outputs.iter().filter_map(|output| match output {
        Output::Submission(fetched) => Some((**fetched).clone()),
        _ => None,
    });
    let again: Vec<_> = again.collect();
    assert_eq!(
        again.iter().map(|fetched| fetched.tag).collect::<Vec<_>>(),
        [1, 2]
    );
    for fetched in &again {
        complete(&mut bed, fetched, Answer::ok(4), b"data", false);
    }
    turn(&mut bed);
    let mut found: Vec<_> = std::iter::from_fn(|| status(ring.take(&bed.guest))).collect();
    found.sort_by_key(|(tag, _)| *tag);
    let expected = [
        (0, Status::BAD_ADDRESS),
        (1, Status::OK),
        (2, Status::OK),
        (3, Status::OUTCOME_UNKNOWN),
    ];
    assert_eq!(found, expected);
    assert_eq!(buffers.map(|buffer| written(&bed, buffer)), [false, true, true]);
}

/// A message of the session is on its way, behind which completions wait.
fn hold_up(bed: &mut PlainBed) {
    bed.memory.set_by_messages(true);
    bed.memory.write(0x7_0000, b"elsewhere").unwrap();
    bed.memory.set_by_messages(false);
}

#[test]
fn what_can_no_longer_be_read_is_refused_for_good_before_the_hub_forgets_it() {
    let mut bed = bed();
    maps(&mut bed, 2, &[1]);
    let mut ring = open(&mut bed, Mode::CHAT);
    let send = Submission {
        buffer: DATA,
        length: 64,
        meta_bytes: 4,
        ..of(Opcode::SEND, 5)
    };
    ring.submit(&bed.guest, &send);
    let fetched = submission(&turn(&mut bed));
    // The buffer is away: the answer is sure, and written down, before the hub is told. It cannot be given yet, and the core dies over it; the
    // next ones find the buffer again, and change nothing.
    let token = fetched.token;
    maps(&mut bed, 2, &[]);
    for _ in 0..3 {
        bed.replace_core(PlainWords::new).unwrap();
        hold_up(&mut bed);
        bed.touch();
        bed.poll(64);
        bed.end_turn();
        assert_eq!(
            (bed.outputs(), ring.take(&bed.guest)),
            (vec![Output::Void(token)], None)
        );
        maps(&mut bed, 2, &[1]);
    }
    bed.memory.deliver();
    bed.poll(64);
    let lost = Output::Published {
        token,
        published: false,
    };
    assert_eq!(bed.outputs(), std::slice::from_ref(&lost));
    bed.replace_core(PlainWords::new).unwrap();
    assert_eq!(turn(&mut bed), [lost]);
    assert_eq!(status(ring.take(&bed.guest)), Some((5, Status::OUTCOME_UNKNOWN)));
    assert_eq!((turn(&mut bed), ring.take(&bed.guest)), (vec![], None));
}

#[test]
fn what_was_mapped_anew_stays_unknown_until_that_is_answered() {
    let mut bed = bed();
    maps(&mut bed, 1, &[2, 3]);
    let mut ring = open(&mut bed, Mode::CHAT);
    ring.submit(&bed.guest, &receive(0, DATA));
    ring.submit(&bed.guest, &receive(1, DATA + 0x1000));
    let fetched: Vec<_> = turn(&mut bed)
        .into_iter()
        .map(|output| submission(&[output]))
        .collect();
    // While no core lived; and the next two die before they can write their answers down, one of which the hub had already.
    maps(&mut bed, 1, &[4, 5]);
    for _ in 0..2 {
        bed.replace_core(PlainWords::new).unwrap();
        hold_up(&mut bed);
        complete(&mut bed, &fetched[1], Answer::ok(4), b"late", true);
        for _ in 0..2 {
            bed.touch();
            bed.poll(64);
            bed.end_turn();
        }
        assert_eq!(bed.outputs(), [Output::Void(fetched[0].token)]);
    }
    bed.memory.deliver();
    bed.replace_core(PlainWords::new).unwrap();
    complete(&mut bed, &fetched[1], Answer::ok(4), b"late", true);
    turn(&mut bed);
    assert_eq!(status(ring.take(&bed.guest)), Some((0, Status::OUTCOME_UNKNOWN)));
    assert_eq!(status(ring.take(&bed.guest)), Some((1, Status::BAD_ADDRESS)));
    assert!(!written(&bed, DATA) && !written(&bed, DATA + 0x1000));
}

#[test]
fn what_was_mapped_anew_while_a_core_lived_goes_on_with_the_next() {
    let mut bed = bed();
    maps(&mut bed, 1, &[2]);
    let mut ring = open(&mut bed, Mode::CHAT);
    ring.submit(&bed.guest, &receive(0, DATA));
    turn(&mut bed);
    maps(&mut bed, 3, &[4]);
    turn(&mut bed);
    for _ in 0..2 {
        bed.replace_core(PlainWords::new).unwrap();
        bed.touch();
        let again = submission(&turn(&mut bed));
        assert!(again.again && again.tag == 0);
    }
}

#[test]
fn a_ring_that_lies_in_other_memory_than_before_fails_its_device_and_is_not_written() {
    let mut bed = bed();
    maps(&mut bed, 1, &[2]);
    let mut ring = open(&mut bed, Mode::CHAT);
    ring.submit(&bed.guest, &receive(0, DATA));
    let fetched = submission(&turn(&mut bed));
    maps(&mut bed, 3, &[2]);
    let before = bed.guest.load_u64(ring.setup.completions + 24);
    bed.replace_core(PlainWords::new).unwrap();
    complete(&mut bed, &fetched, Answer::ok(4), b"late", false);
    turn(&mut bed);
    assert_eq!(
        bed.core.state(1),
        Some((DeviceState::FAILED, Status::BAD_ADDRESS))
    );
    assert_eq!(bed.guest.load_u64(ring.setup.completions + 24), before);
    assert!(!written(&bed, DATA));
    // A reset heals it.
    bed.front.set_generation(2);
    bed.touch();
    bed.outputs();
    bed.end_turn();
    let mut ring = open(&mut bed, Mode::CHAT);
    ring.submit(&bed.guest, &of(Opcode::NOOP, 5));
    turn(&mut bed);
    assert_eq!(status(ring.take(&bed.guest)), Some((5, Status::OK)));
}
