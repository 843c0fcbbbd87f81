//! A killed core's worker sleeps in a disk while the next core serves: what it may still do to files is waited for, and nothing else is.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod house;

use house::{Ask, House};
use std::collections::BTreeSet;
use vmgmt_abi::file::{OfferHeader, SIZE_UNKNOWN, existing, open, put};
use vmgmt_abi::{Opcode, Status};
use vmgmt_core::{ControlReply, ControlRequest};
use vmgmt_device::rings::Token;
use zerocopy::FromBytes;

const A: u64 = 11;
const B: u64 = 12;

fn put_of(path: &str) -> Ask {
    Ask::new(Opcode::PUT)
        .meta(path)
        .offset(SIZE_UNKNOWN)
        .argument(existing::REPLACE)
}

fn write(handle: u64, data: &str) -> Ask {
    Ask::new(Opcode::WRITE).handle(handle).data(data)
}

fn commit(handle: u64, bytes: u64) -> Ask {
    Ask::new(Opcode::COMMIT).handle(handle).offset(bytes).room(64)
}

/// The core dies while a worker has something of VM 1 (session A).
fn haunted(mut house: House) -> House {
    house.undead = BTreeSet::from([1]);
    house.crash();
    house
}

/// A house in which A's write of "first" is with a worker when the core dies, and one of B's with another, which dies with it.
fn two_puts_in_flight() -> (House, [u64; 2], [Token; 2]) {
    let mut house = House::new();
    let handles = [house.ok(A, put_of("rw/f")), house.ok(B, put_of("rw/g"))];
    house.manual = true;
    let writes = [
        house.ask(A, write(handles[0], "first")),
        house.ask(B, write(handles[1], "other")),
    ];
    house.pending.clear();
    house.manual = false;
    (haunted(house), handles, writes)
}

/// What the sleeping worker was in the middle of comes to its end: by now the guest's buffer holds something else.
fn late_write(house: &mut House, contents: &str) {
    let mut spoilt = 0;
    for ((_, path), bytes) in &mut house.files {
        if path.starts_with(".vmgmt-put-1-") {
            *bytes = contents.into();
            spoilt += 1;
        }
    }
    assert_eq!(spoilt, 1, "the file is under its temporary name");
}

#[test]
fn a_put_waits_for_the_worker_that_may_write_to_its_file_and_others_do_not() {
    let (mut house, [mine, theirs], [waits, goes_on]) = two_puts_in_flight();
    assert!(house.open.contains(&waits));
    // Another VM's put goes on, and so do a new put and reads of the same VM.
    assert_eq!(house.status(goes_on), Status::OK);
    house.ok(B, commit(theirs, 5));
    let handle = house.ok(A, put_of("rw/new"));
    house.ok(A, write(handle, "new"));
    house.ok(A, commit(handle, 3));
    let handle = house.ok(A, Ask::new(Opcode::OPEN).meta("rw/new").argument(open::READ));
    house.ok(A, Ask::new(Opcode::READ).handle(handle).room(3));
    house.ok(A, Ask::new(Opcode::REMOVE).meta("rw/g"));
    // Who wants to put the same file anew hears why not.
    house.fails(A, put_of("rw/f"), Status::BUSY);
    let committed = house.ask(A, commit(mine, 5));
    late_write(&mut house, "spoilt");
    assert!(house.open.contains(&committed) && house.file("rw", "f").is_none());
    house.bury();
    assert_eq!(
        (house.status(waits), house.status(committed)),
        (Status::OK, Status::OK)
    );
    assert_eq!(house.file("rw", "f").map(Vec::as_slice), Some(&b"first"[..]));
}

#[test]
fn what_waits_can_be_cancelled_and_its_deadline_passes() {
    let (mut house, [mine, _], [waits, _]) = two_puts_in_flight();
    house.cancel(waits);
    assert_eq!(house.status(waits), Status::CANCELLED);
    let late = house.ask(A, write(mine, "other").deadline_ns(1_000_000));
    let closing = house.ask(A, Ask::new(Opcode::CLOSE).handle(mine));
    house.pass_ns(2_000_000);
    assert_eq!(house.status(late), Status::TIMED_OUT);
    house.cancel(closing);
    assert_eq!(house.status(closing), Status::CANCELLED);
    house.bury();
    house.ok(A, write(mine, "third"));
    house.ok(A, commit(mine, 5));
    assert_eq!(house.file("rw", "f").map(Vec::as_slice), Some(&b"third"[..]));
}

#[test]
fn a_reset_does_not_wait_and_what_it_leaves_is_tidied_up_in_the_end() {
    for close in [false, true] {
        let (mut house, ..) = two_puts_in_flight();
        if close {
            house.close_session(A);
        } else {
            house.reset_session(A);
            // The file is still the sleeping worker's.
            house.fails(A, put_of("rw/f"), Status::BUSY);
        }
        late_write(&mut house, "late");
        house.bury();
        assert_eq!(house.hub.vm_statuses()[0].open_files, 0);
        assert!(
            !house
                .files
                .keys()
                .any(|(_, path)| path.starts_with(".vmgmt-put-1-"))
        );
    }
}

#[test]
fn a_core_that_dies_while_it_waits_leaves_the_wait_to_the_next() {
    let (mut house, [mine, _], [waits, _]) = two_puts_in_flight();
    house.crash();
    assert!(house.open.contains(&waits));
    house.close_session(A);
    house.crash();
    late_write(&mut house, "late");
    assert!(
        house.file("rw", "f").is_none(),
        "handle {mine} is nobody's any more"
    );
    house.bury();
    assert!(
        !house
            .files
            .keys()
            .any(|(_, path)| path.starts_with(".vmgmt-put-1-"))
    );
    assert_eq!(house.hub.effects_open(), 0);
}

#[test]
fn a_put_with_resume_waits_too() {
    let mut house = House::new();
    let ask = put_of("rw/f").argument(existing::REPLACE | put::RESUME);
    let handle = house.ok(A, ask.clone());
    house.manual = true;
    let token = house.ask(A, write(handle, "first"));
    house.pending.clear();
    house.manual = false;
    let mut house = haunted(house);
    house.reset_session(A);
    house.fails(A, ask.clone(), Status::BUSY);
    late_write(&mut house, "late");
    house.bury();
    assert!(!house.answers.contains_key(&token));
    // What is there is the guest's to check, as ever.
    let resumed = house.ask(A, ask);
    assert_eq!(
        (house.status(resumed), house.answer(resumed).0.extra),
        (Status::OK, 4)
    );
}

#[test]
fn open_files_wait_if_they_are_open_for_writing() {
    let mut house = House::new();
    house
        .files
        .insert(("rw".into(), "f".into()), b"contents".to_vec());
    let writes = house.ok(
        A,
        Ask::new(Opcode::OPEN)
            .meta("rw/f")
            .argument(open::READ | open::WRITE),
    );
    let reads = house.ok(A, Ask::new(Opcode::OPEN).meta("rw/f").argument(open::READ));
    let mut house = haunted(house);
    house.ok(A, Ask::new(Opcode::READ).handle(reads).room(8));
    let truncated = house.ask(A, Ask::new(Opcode::TRUNCATE).handle(writes).offset(3));
    assert!(house.open.contains(&truncated));
    house.bury();
    assert_eq!(house.status(truncated), Status::OK);
    assert_eq!(house.file("rw", "f").map(Vec::as_slice), Some(&b"con"[..]));
}

#[test]
fn an_open_that_may_still_cut_its_file_waits_and_a_new_one_does_not() {
    let mut house = House::new();
    house
        .files
        .insert(("rw".into(), "f".into()), b"contents".to_vec());
    let ask = Ask::new(Opcode::OPEN)
        .meta("rw/f")
        .argument(open::WRITE | open::TRUNCATE);
    house.manual = true;
    let tokens = [house.ask(A, ask.clone()), house.ask(A, ask.clone())];
    house.pending.clear();
    house.manual = false;
    let mut house = haunted(house);
    assert!(tokens.iter().all(|token| house.open.contains(token)));
    house.cancel(tokens[1]);
    assert_eq!(house.status(tokens[1]), Status::CANCELLED);
    house.ok(A, ask);
    house.bury();
    assert_eq!(house.status(tokens[0]), Status::OK);
    assert_eq!(house.hub.vm_statuses()[0].open_files, 2);
}

#[test]
fn a_name_operation_is_judged_when_its_first_attempt_can_change_nothing_any_more() {
    // In each the intent is written down, and the worker sleeps in the call itself.
    for ask in [
        Ask::new(Opcode::MAKE_DIRECTORY).meta("rw/d"),
        Ask::new(Opcode::RENAME)
            .meta("rw/f\0rw/g")
            .argument(existing::REPLACE),
        Ask::new(Opcode::REMOVE).meta("rw/f"),
    ] {
        for comes_through in [false, true] {
            let mut house = House::new();
            house.files.insert(("rw".into(), "f".into()), b"f".to_vec());
            house.manual = true;
            let token = house.ask(A, ask.clone());
            house.step(0);
            let (_, asleep) = house.pending.pop().expect("the operation itself");
            house.manual = false;
            let mut house = haunted(house);
            assert!(house.open.contains(&token), "{ask:?}");
            if comes_through {
                house.perform(&asleep);
            }
            house.bury();
            assert_eq!(house.status(token), Status::OK, "{ask:?}");
            let names: Vec<_> = house.files.keys().chain(house.directories.keys()).collect();
            let wanted: &[&str] = match Opcode(ask.opcode) {
                Opcode::MAKE_DIRECTORY => &["f", "d"],
                Opcode::RENAME => &["g"],
                _ => &[],
            };
            assert!(
                names
                    .iter()
                    .map(|(_, path)| path.as_str())
                    .eq(wanted.iter().copied()),
                "{ask:?}: {names:?}"
            );
        }
    }
}

#[test]
fn a_pull_into_the_operators_file_waits_and_is_given_up_at_once() {
    for give_up in [false, true] {
        let mut house = House::new();
        let file = house.host_file("host", "p", b"");
        let request = |file| ControlRequest::Pull {
            source: "a".into(),
            path: "p".into(),
            file,
            wait_ns: 1 << 40,
            key: 78,
        };
        house.control(5, request(file));
        let shown = house.ask(A, Ask::new(Opcode::NEXT_OFFER).room(600));
        let offer = OfferHeader::read_from_prefix(&house.answer(shown).1)
            .unwrap()
            .0
            .handle;
        let ask = Ask::new(Opcode::OFFER).meta("host\0p").handle(offer).offset(5);
        let handle = house.ok(A, ask);
        house.manual = true;
        let token = house.ask(A, Ask::new(Opcode::STREAM_WRITE).handle(handle).data("first"));
        house.pending.clear();
        house.manual = false;
        let mut house = haunted(house);
        let file = house.host_file("host", "p", b"");
        house.control(6, request(file));
        assert!(house.open.contains(&token));
        house.files.insert(("host".into(), "p".into()), b"late!".to_vec());
        if give_up {
            house.cancel(token);
            assert_eq!(house.status(token), Status::CANCELLED);
            house.bury();
            continue;
        }
        house.bury();
        assert_eq!(house.status(token), Status::OK);
        house.ok(A, Ask::new(Opcode::STREAM_END).handle(handle).offset(5));
        assert!(matches!(
            house.replies.last().unwrap().2,
            ControlReply::Transferred { bytes: 5, .. }
        ));
        assert_eq!(house.file("host", "p").map(Vec::as_slice), Some(&b"first"[..]));
    }
}
