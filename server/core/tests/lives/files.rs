//! Files: puts, open handles, names, streams and offers.

use crate::house::{Ask, House};
use crate::{A, B, at_every_output, bytes};
use vmgmt_abi::file::{OfferHeader, SIZE_UNKNOWN, open, put, unknown};
use vmgmt_abi::ring::{completion_flag, flag};
use vmgmt_abi::{Opcode, Status};
use vmgmt_core::Effect;
use vmgmt_device::rings::Token;
use zerocopy::FromBytes;

#[test]
fn a_put_is_whole_whenever_the_core_dies() {
    for resume in [0, put::RESUME] {
        at_every_output(|house| {
            let data = bytes(300);
            let ask = Ask::new(Opcode::PUT)
                .meta("rw/f")
                .offset(SIZE_UNKNOWN)
                .argument(resume);
            let handle = house.ok(A, ask);
            for (place, piece) in data.chunks(100).enumerate() {
                let write = Ask::new(Opcode::WRITE).handle(handle).offset(place as u64 * 100);
                house.ok(A, write.data(piece));
            }
            let commit = Ask::new(Opcode::COMMIT)
                .handle(handle)
                .offset(300)
                .argument(u64::from(crc32fast::hash(&data)))
                .flags(flag::CHECK)
                .room(64);
            let committed = house.ask(A, commit);
            assert_eq!(house.status(committed), Status::OK);
            assert_eq!(house.answer(committed).1, b"rw/f");
            assert_eq!(house.file("rw", "f"), Some(&data));
            assert_eq!(house.files.len(), 1, "{:?}", house.files.keys());
            assert_eq!(
                (house.slots_open(), house.hub.vm_statuses()[0].open_files),
                (0, 0)
            );
        });
    }
}

/// The worker had cut the file, and died with the core before it gave it its name.
#[test]
fn a_put_that_its_commit_has_cut_is_named_in_the_next_life() {
    let mut house = House::new();
    let handle = house.ok(A, Ask::new(Opcode::PUT).meta("rw/f").offset(SIZE_UNKNOWN));
    house.ok(A, Ask::new(Opcode::WRITE).handle(handle).data("contents"));
    house.manual = true;
    // One more was under way when it came.
    house.ask(A, Ask::new(Opcode::WRITE).handle(handle).offset(6).data("more"));
    let commit = Ask::new(Opcode::COMMIT).handle(handle).offset(4).room(64);
    let committed = house.ask(A, commit);
    while !matches!(house.pending.first(), Some((_, Effect::Commit { .. }))) {
        assert!(house.step(0));
    }
    let Some((_, Effect::Commit { share, temporary, .. })) = house.pending.first().cloned() else {
        panic!("{:?}", house.pending)
    };
    house.files.get_mut(&(share, temporary)).unwrap().truncate(4);
    house.crash();
    house.manual = false;
    house.settle();
    assert_eq!(house.status(committed), Status::OK);
    assert_eq!(house.file("rw", "f").map(Vec::as_slice), Some(&b"cont"[..]));
    assert_eq!(house.files.len(), 1, "{:?}", house.files.keys());
}

#[test]
fn a_name_that_is_not_known_to_be_durable_is_said_to_be_there() {
    at_every_output(|house| {
        house.undurable = true;
        let handle = house.ok(A, Ask::new(Opcode::PUT).meta("rw/f").offset(SIZE_UNKNOWN));
        house.ok(A, Ask::new(Opcode::WRITE).handle(handle).data("contents"));
        let commit = Ask::new(Opcode::COMMIT).handle(handle).offset(8).room(64);
        let committed = house.ask(A, commit.flags(flag::DURABLE));
        let (answer, name) = house.answer(committed).clone();
        assert_eq!(
            (
                Status(answer.status),
                answer.detail,
                answer.result,
                name.as_slice()
            ),
            (Status::OUTCOME_UNKNOWN, unknown::NOT_DURABLE, 4, &b"rw/f"[..])
        );
        assert_eq!(house.file("rw", "f").unwrap(), b"contents");
        // It is no put any more, and can be used as what it is.
        let more = Ask::new(Opcode::WRITE).handle(handle).data("more");
        house.fails(A, more, Status::STALE);
        let rename = Ask::new(Opcode::RENAME).meta("rw/f\0rw/g");
        let renamed = house.ask(A, rename.clone().flags(flag::DURABLE));
        let answer = house.answer(renamed).0;
        assert_eq!(
            (Status(answer.status), answer.detail),
            (Status::OUTCOME_UNKNOWN, unknown::NOT_DURABLE)
        );
        house.ok(A, Ask::new(Opcode::RENAME).meta("rw/g\0rw/h"));
        assert_eq!(house.file("rw", "h").unwrap(), b"contents");
        assert_eq!(
            (house.slots_open(), house.hub.vm_statuses()[0].open_files),
            (0, 0)
        );
    });
}

#[test]
fn a_wrong_checksum_is_said_and_leaves_nothing() {
    at_every_output(|house| {
        let handle = house.ok(A, Ask::new(Opcode::PUT).meta("rw/f").offset(SIZE_UNKNOWN));
        house.ok(A, Ask::new(Opcode::WRITE).handle(handle).data("contents"));
        let commit = Ask::new(Opcode::COMMIT)
            .handle(handle)
            .offset(8)
            .argument(1)
            .flags(flag::CHECK);
        house.fails(A, commit, Status::INTEGRITY);
        assert!(house.files.is_empty(), "{:?}", house.files.keys());
    });
}

#[test]
fn an_open_file_is_open_in_the_next_life() {
    at_every_output(|house| {
        house
            .files
            .insert(("rw".into(), "f".into()), b"contents".to_vec());
        let ask = Ask::new(Opcode::OPEN)
            .meta("rw/f")
            .argument(open::READ | open::WRITE);
        let handle = house.ok(A, ask);
        house.ok(A, Ask::new(Opcode::WRITE).handle(handle).offset(2).data("XY"));
        let read = house.ask(A, Ask::new(Opcode::READ).handle(handle).room(20));
        assert_eq!(house.answer(read).0.result, 8);
        assert_eq!(&house.buffers[&read][..8], b"coXYents");
        house.ok(A, Ask::new(Opcode::CLOSE).handle(handle));
        assert_eq!(
            (house.slots_open(), house.hub.vm_statuses()[0].open_files),
            (0, 0)
        );
    });
}

#[test]
fn a_file_that_was_replaced_meanwhile_makes_its_handle_stale() {
    let mut house = House::new();
    house
        .files
        .insert(("rw".into(), "f".into()), b"contents".to_vec());
    let handle = house.ok(A, Ask::new(Opcode::OPEN).meta("rw/f").argument(open::READ));
    house.ok(B, Ask::new(Opcode::REMOVE).meta("rw/f"));
    house.files.insert(("rw".into(), "f".into()), b"another".to_vec());
    house.crash();
    house.fails(A, Ask::new(Opcode::READ).handle(handle).room(20), Status::STALE);
    house.ok(A, Ask::new(Opcode::CLOSE).handle(handle));
}

#[test]
fn names_are_made_removed_and_moved_once() {
    at_every_output(|house| {
        house.files.insert(("rw".into(), "f".into()), b"f".to_vec());
        house.ok(A, Ask::new(Opcode::MAKE_DIRECTORY).meta("rw/d"));
        house.ok(A, Ask::new(Opcode::RENAME).meta("rw/f\0rw/g"));
        house.ok(A, Ask::new(Opcode::REMOVE).meta("rw/g"));
        house.fails(A, Ask::new(Opcode::REMOVE).meta("rw/g"), Status::NO_SUCH_NAME);
        house.fails(A, Ask::new(Opcode::MAKE_DIRECTORY).meta("rw/d"), Status::EXISTS);
        assert!(
            house.files.is_empty() && house.directories.len() == 1,
            "{:?}",
            house.directories
        );
    });
}

#[test]
fn a_name_operation_that_comes_again_and_meets_a_broken_disk_may_have_been_done() {
    for ask in [
        Ask::new(Opcode::MAKE_DIRECTORY).meta("rw/d"),
        Ask::new(Opcode::RENAME).meta("rw/f\0rw/g"),
        Ask::new(Opcode::REMOVE).meta("rw/f"),
    ] {
        for (crash, status) in [(true, Status::OUTCOME_UNKNOWN), (false, Status::IO_ERROR)] {
            let mut house = House::new();
            house.files.insert(("rw".into(), "f".into()), b"f".to_vec());
            house.manual = true;
            let token = house.ask(A, ask.clone());
            // It is known which file is meant; what is to be done to it waits.
            assert!(house.step(0));
            house.failing = true;
            if crash {
                house.crash();
            }
            house.settle();
            assert_eq!(house.status(token), status);
        }
    }
}

#[test]
fn an_effect_that_was_done_and_not_heard_of_is_not_done_again() {
    let steps = |house: &mut House, lost: usize| {
        house.files.insert(("rw".into(), "f".into()), b"f".to_vec());
        house.manual = true;
        let mut effects = 0;
        let mut ask = |house: &mut House, ask: Ask| {
            let token = house.ask(A, ask);
            while !house.pending.is_empty() || !house.confirming.is_empty() {
                if !house.pending.is_empty() {
                    effects += 1;
                    if effects == lost {
                        house.crash_after_effect(0);
                        continue;
                    }
                }
                house.step(0);
            }
            assert_eq!(house.status(token), Status::OK);
            house.answer(token).0.result
        };
        ask(house, Ask::new(Opcode::MAKE_DIRECTORY).meta("rw/d"));
        ask(house, Ask::new(Opcode::RENAME).meta("rw/f\0rw/g"));
        ask(house, Ask::new(Opcode::REMOVE).meta("rw/g"));
        let handle = ask(
            house,
            Ask::new(Opcode::PUT)
                .meta("rw/p")
                .offset(SIZE_UNKNOWN)
                .argument(2),
        );
        ask(house, Ask::new(Opcode::WRITE).handle(handle).data("contents"));
        ask(house, Ask::new(Opcode::COMMIT).handle(handle).offset(8));
        assert_eq!(house.file("rw", "p").map(Vec::as_slice), Some(&b"contents"[..]));
        assert_eq!(
            (house.files.len(), house.directories.len()),
            (1, 1),
            "{:?}",
            house.directories
        );
        effects
    };
    let all = steps(&mut House::new(), usize::MAX);
    assert!(all >= 9);
    for lost in 1..=all {
        steps(&mut House::new(), lost);
    }
}

fn shown(house: &House, token: Token) -> u64 {
    OfferHeader::read_from_prefix(&house.answer(token).1)
        .unwrap()
        .0
        .handle
}

#[test]
fn a_stream_brings_every_byte_once() {
    // Writes and reads of different lengths, so that both are half done now and then.
    for (write_bytes, read_bytes) in [(100, 70), (70, 100), (50, 200), (64, 64)] {
        at_every_output(|house| {
            let data = bytes(300);
            let offered = house.ask(A, Ask::new(Opcode::OFFER).meta("b\0f").offset(300));
            let next = house.ask(B, Ask::new(Opcode::NEXT_OFFER).room(4096));
            let offer = shown(house, next);
            let target = house.ok(B, Ask::new(Opcode::ACCEPT).handle(offer));
            let source = house.answer(offered).0.result;
            let mut got = Vec::new();
            let mut reads: Vec<Token> = Vec::new();
            let mut take = |house: &mut House, reads: &mut Vec<Token>| {
                while reads
                    .first()
                    .is_some_and(|token| house.answers.contains_key(token))
                {
                    let token = reads.remove(0);
                    let answer = house.answer(token).0;
                    assert_eq!(Status(answer.status), Status::OK);
                    if answer.flags & completion_flag::END != 0 {
                        assert_eq!(answer.extra, u64::from(crc32fast::hash(&data)));
                        return true;
                    }
                    got.extend_from_slice(&house.buffers[&token][..answer.result as usize]);
                }
                false
            };
            let mut writes = Vec::new();
            for piece in data.chunks(write_bytes) {
                writes.push(house.ask(A, Ask::new(Opcode::STREAM_WRITE).handle(source).data(piece)));
                reads.push(house.ask(B, Ask::new(Opcode::STREAM_READ).handle(target).room(read_bytes)));
                assert!(!take(house, &mut reads));
            }
            let end = Ask::new(Opcode::STREAM_END)
                .handle(source)
                .offset(300)
                .argument(u64::from(crc32fast::hash(&data)))
                .flags(flag::CHECK);
            let end = house.ask(A, end);
            while !take(house, &mut reads) {
                reads.push(house.ask(B, Ask::new(Opcode::STREAM_READ).handle(target).room(read_bytes)));
            }
            house.ok(B, Ask::new(Opcode::STREAM_CONFIRM).handle(target));
            assert_eq!((house.status(end), house.answer(end).0.result), (Status::OK, 300));
            for token in writes {
                assert_eq!(house.status(token), Status::OK);
            }
            assert_eq!(got, data);
            assert!(house.hub.vm_statuses().iter().all(|vm| vm.open_files == 0));
        });
    }
}

#[test]
fn an_offer_waits_on_and_a_refusal_arrives() {
    at_every_output(|house| {
        let offered = house.ask(A, Ask::new(Opcode::OFFER).meta("b\0f").offset(SIZE_UNKNOWN));
        let next = house.ask(B, Ask::new(Opcode::NEXT_OFFER).room(4096));
        let offer = shown(house, next);
        let refuse = Ask::new(Opcode::REFUSE)
            .handle(offer)
            .argument(u64::from(Status::NO_SPACE.0));
        house.ok(B, refuse);
        assert_eq!(house.status(offered), Status::NO_SPACE);
    });
}
