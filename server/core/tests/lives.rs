//! The core dies between any two of its outputs, once and again: the guest gets one answer to each submission, and it is the one it would have got.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod house;

use ciborium::Value;
use house::{Ask, House, config};
use std::collections::BTreeSet;
use vmgmt_abi::chat::{MessageHeader, message_flag};
use vmgmt_abi::file::{OfferHeader, SIZE_UNKNOWN, open, put};
use vmgmt_abi::ring::{completion_flag, flag};
use vmgmt_abi::{Mode, Opcode, Status};
use vmgmt_core::{ControlReply, ControlRequest, Hub, Input, Output, Record, Saved};
use vmgmt_device::Tick;
use vmgmt_device::rings::{Channel, Fetched, Token};
use zerocopy::FromBytes;

const A: u64 = 11;
const B: u64 = 12;

/// Runs a scenario with a core that dies after so many outputs, until it dies no more in it.
fn at_every_output(scenario: impl Fn(&mut House)) {
    for again in 0..3 {
        for after in 0.. {
            let mut house = House::new();
            (house.dies_after, house.dies_again) = (Some(after), again);
            // That what is saved is the same after every input is asserted once; it takes most of the time.
            (house.repack, house.replay) = (again == 0, again == 0);
            scenario(&mut house);
            assert!(house.open.is_empty(), "without an answer: {:?}", house.open);
            if house.crashes == 0 {
                break;
            }
        }
    }
}

fn bytes(count: usize) -> Vec<u8> {
    (0..count).map(|place| (place * 7 + place / 251) as u8).collect()
}

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

#[test]
fn a_message_is_delivered_once_whoever_waits_first() {
    for receives_first in [true, false] {
        at_every_output(|house| {
            let mut receives = Vec::new();
            let post = |house: &mut House, receives: &mut Vec<Token>| {
                for _ in 0..4 {
                    receives.push(house.ask_on(B, Channel::Ring(1), Ask::new(Opcode::RECEIVE).room(150)));
                }
            };
            if receives_first {
                post(house, &mut receives);
            }
            for number in 1..=4_u64 {
                let send = Ask::new(Opcode::SEND)
                    .handle(2)
                    .argument(number)
                    .data(vec![number as u8; 30]);
                assert_eq!(house.ok(A, send.clone()), number);
                assert_eq!(house.ok(A, send), number, "a repeated key is answered the same");
            }
            if !receives_first {
                post(house, &mut receives);
            }
            let mut seen = BTreeSet::new();
            for token in &receives {
                let (header, rest) = MessageHeader::read_from_prefix(&house.answer(*token).1).unwrap();
                assert!(seen.insert(header.sequence), "{} came twice", header.sequence);
                assert!(rest.ends_with(&[header.sequence as u8; 30]));
            }
            assert_eq!(seen.len(), 4);
            assert_eq!(house.hub.vm_statuses()[1].mailbox_messages, 0);
            assert!(house.hub.unresolved().is_empty(), "{:?}", house.hub.unresolved());
        });
    }
}

/// What the core of version 1 would have saved: no handles, offers and streams, and of answers only those of accepted sends.
/// B's session of the life before is gone, another one has come, and it asks for messages before all sessions are told: whom the rest went to is not
/// known yet. Gives what it got before, and what it got after: sequence and flags.
fn received_by_a_successor(journal: &[Record]) -> [Vec<(u64, u32)>; 2] {
    let now = Tick(1_000_000_000);
    let mut hub = Hub::replay(2, None, journal.iter().cloned()).unwrap();
    let received = |hub: &mut Hub| {
        let mut got = Vec::new();
        while let Some(output) = hub.poll_output() {
            if let Output::Complete { token, payload, .. } = output
                && token.session == 22
            {
                let (header, _) = MessageHeader::read_from_prefix(&payload).unwrap();
                got.push((header.sequence, header.flags & message_flag::CONTINUED));
                hub.handle(
                    now,
                    Input::Published {
                        token,
                        published: true,
                    },
                );
            }
        }
        got
    };
    hub.handle(now, Input::SessionOpened { session: A, vm: 1 });
    hub.handle(now, Input::SessionOpened { session: 22, vm: 2 });
    for index in 0..3 {
        let token = Token {
            session: 22,
            channel: Channel::Ring(0),
            index,
            generation: 1,
        };
        let fetched = Fetched {
            token,
            mode: Mode::CHAT,
            opcode: Opcode::RECEIVE,
            flags: 0,
            tag: index,
            handle: 0,
            offset: 0,
            argument: 0,
            deadline: Tick::NEVER,
            meta: Vec::new(),
            data_bytes: 1000,
            data: None,
            again: false,
        };
        hub.handle(now, Input::Submission(Box::new(fetched)));
    }
    let before = received(&mut hub);
    hub.handle(now, Input::Adopted);
    [before, received(&mut hub)]
}

#[test]
fn what_a_dead_session_had_begun_to_get_comes_first() {
    let mut house = House::new();
    let receive = house.ask_on(B, Channel::Ring(0), Ask::new(Opcode::RECEIVE).room(150));
    house.ok(A, Ask::new(Opcode::SEND).handle(2).data([1; 300]));
    assert_ne!(house.answer(receive).0.flags & completion_flag::MORE, 0);
    house.ok(A, Ask::new(Opcode::SEND).handle(2).data([2; 30]));
    let received = received_by_a_successor(&house.journal);
    assert_eq!(received, [vec![], vec![(1, 0), (2, 0)]]);
}

#[test]
fn what_a_dead_session_was_about_to_get_goes_to_who_waits() {
    let mut house = House::new();
    house.manual = true;
    house.ask_on(B, Channel::Ring(0), Ask::new(Opcode::RECEIVE).room(150));
    house.ask(A, Ask::new(Opcode::SEND).handle(2).data([1; 30]));
    house.ask(A, Ask::new(Opcode::SEND).handle(2).data([2; 30]));
    let received = received_by_a_successor(&house.journal);
    assert_eq!(received, [vec![], vec![(1, 0), (2, 0)]]);
}

#[test]
fn a_send_that_was_refused_stays_refused_in_the_next_life() {
    let mut house = House::with(vec![config(1, "a")]);
    house.manual = true;
    house.ask(A, Ask::new(Opcode::SEND).handle(2).data([1; 30]));
    house.input(Input::Vm(config(2, "b")));
    house.ask(A, Ask::new(Opcode::SEND).handle(2).data([2; 30]));
    // The refusal was not seen, and the core dies. Now there is somebody to take it, behind the one that came after it.
    let mut hub = Hub::replay(2, None, house.journal.iter().cloned()).unwrap();
    hub.handle(house.now, Input::SessionOpened { session: A, vm: 1 });
    while hub.poll_output().is_some() {}
    let first = Fetched {
        token: *house.answers.keys().next().unwrap(),
        mode: Mode::CHAT,
        opcode: Opcode::SEND,
        flags: 0,
        tag: 1,
        handle: 2,
        offset: 0,
        argument: 0,
        deadline: Tick::NEVER,
        meta: Vec::new(),
        data_bytes: 30,
        data: Some(vec![1; 30]),
        again: true,
    };
    hub.handle(house.now, Input::Submission(Box::new(first)));
    let answer = std::iter::from_fn(|| hub.poll_output()).find_map(|output| match output {
        Output::Complete { answer, .. } => Some(answer.status),
        _ => None,
    });
    assert_eq!(answer, Some(Status::PEER_ABSENT.0));
}

fn as_version_1(saved: &[u8]) -> Vec<u8> {
    type Map = Vec<(Value, Value)>;
    fn entry<'a>(map: &'a mut Map, key: &str) -> &'a mut Value {
        let found = map.iter_mut().find(|(name, _)| name.as_text() == Some(key));
        &mut found.unwrap_or_else(|| panic!("no {key}")).1
    }
    let mut saved: Value = ciborium::from_reader(saved).unwrap();
    let saved_map = saved.as_map_mut().unwrap();
    *entry(saved_map, "version") = 1.into();
    saved_map.retain(|(name, _)| name.as_text() != Some("reopening"));
    let ledger = entry(saved_map, "ledger").as_map_mut().unwrap();
    let kept = entry(ledger, "kept").as_map_mut().unwrap();
    let settled = entry(kept, "settled").as_array().unwrap().clone();
    let origins = settled.into_iter().map(|mut settled| {
        let settled = settled.as_map_mut().unwrap();
        let result = entry(entry(settled, "answer").as_map_mut().unwrap(), "result").clone();
        let tag = entry(settled, "tag").clone();
        let origin = Value::Map(vec![("tag".into(), tag), ("result".into(), result)]);
        Value::Array(vec![entry(settled, "token").clone(), origin])
    });
    let origins = Value::Array(origins.collect());
    ledger.retain(|(name, _)| name.as_text() != Some("kept"));
    ledger.push(("origins".into(), origins));
    let mut bytes = Vec::new();
    ciborium::into_writer(&saved, &mut bytes).unwrap();
    bytes
}

#[test]
fn what_version_1_saved_is_read_and_a_later_version_is_refused() {
    let mut house = House::new();
    house.manual = true;
    let send = Ask::new(Opcode::SEND).handle(2).argument(7).data("message");
    let token = house.ask(A, send);
    let saved = house.hub.save().to_bytes();
    let old = Saved::from_bytes(&as_version_1(&saved)).unwrap();
    let hub = Hub::replay(2, Some(old), []).unwrap();
    assert_eq!(hub.unresolved(), [token]);
    assert_eq!(hub.surviving(), house.hub.surviving());

    let mut later: Value = ciborium::from_reader(saved.as_slice()).unwrap();
    let version = &mut later.as_map_mut().unwrap()[0];
    assert_eq!(version.0.as_text(), Some("version"));
    version.1 = 99.into();
    let mut bytes = Vec::new();
    ciborium::into_writer(&later, &mut bytes).unwrap();
    let error = Saved::from_bytes(&bytes).unwrap_err().to_string();
    assert!(error.contains("has version 99"), "{error}");
}

/// The operator asks with a key until it hears how it ended, as vmgmtctl does: whenever the core that had its request is gone.
fn insist(house: &mut House, asked_in: &mut Option<usize>, request: &dyn Fn(&mut House) -> ControlRequest) {
    while *asked_in != Some(house.crashes) {
        *asked_in = Some(house.crashes);
        let request = request(house);
        house.control(5, request);
    }
}

/// The first answer that ends a request.
fn told(house: &House) -> ControlReply {
    let told = house.replies.iter().find(|(.., last)| *last);
    told.unwrap_or_else(|| panic!("the operator was not told: {:?}", house.replies))
        .2
        .clone()
}

#[test]
fn a_push_of_the_operator_goes_on_in_the_next_life() {
    at_every_output(|house| {
        let data = bytes(1000);
        let request = |house: &mut House| ControlRequest::Push {
            target: "b".into(),
            file: house.host_file("host", "f", &bytes(1000)),
            size: 1000,
            name: "f".into(),
            wait_ns: 1 << 40,
            key: 77,
        };
        let mut asked_in = None;
        insist(house, &mut asked_in, &request);
        let shown = house.ask(B, Ask::new(Opcode::NEXT_OFFER).room(600));
        insist(house, &mut asked_in, &request);
        let offer = OfferHeader::read_from_prefix(&house.answer(shown).1)
            .unwrap()
            .0
            .handle;
        let handle = house.ok(B, Ask::new(Opcode::ACCEPT).handle(offer));
        let mut got = Vec::new();
        loop {
            let read = house.ask(B, Ask::new(Opcode::STREAM_READ).handle(handle).room(300));
            insist(house, &mut asked_in, &request);
            let answer = house.answer(read).0;
            assert_eq!(Status(answer.status), Status::OK);
            if answer.flags & completion_flag::END != 0 {
                assert_eq!(answer.extra, u64::from(crc32fast::hash(&data)));
                break;
            }
            got.extend_from_slice(&house.buffers[&read][..answer.result as usize]);
        }
        assert_eq!(got, data);
        house.ok(B, Ask::new(Opcode::STREAM_CONFIRM).handle(handle));
        insist(house, &mut asked_in, &request);
        let crc32 = crc32fast::hash(&data);
        assert_eq!(told(house), ControlReply::Transferred { bytes: 1000, crc32 });
        // Whoever asks once more hears the same, and nothing is offered.
        let request = request(house);
        house.control(6, request);
        let again = house.replies.last().unwrap();
        assert_eq!(again.2, ControlReply::Transferred { bytes: 1000, crc32 });
        assert_eq!(
            (house.slots_open(), house.hub.vm_statuses()[1].open_files),
            (0, 0)
        );
    });
}

#[test]
fn a_pull_of_the_operator_goes_on_in_the_next_life() {
    at_every_output(|house| {
        let data = bytes(700);
        let request = |house: &mut House| {
            let contents = house.file("host", "p").cloned().unwrap_or_default();
            ControlRequest::Pull {
                source: "a".into(),
                path: "p".into(),
                file: house.host_file("host", "p", &contents),
                wait_ns: 1 << 40,
                key: 78,
            }
        };
        let mut asked_in = None;
        insist(house, &mut asked_in, &request);
        let shown = house.ask(A, Ask::new(Opcode::NEXT_OFFER).room(600));
        insist(house, &mut asked_in, &request);
        let offer = OfferHeader::read_from_prefix(&house.answer(shown).1)
            .unwrap()
            .0
            .handle;
        let ask = Ask::new(Opcode::OFFER).meta("host\0p").handle(offer).offset(700);
        let handle = house.ok(A, ask);
        insist(house, &mut asked_in, &request);
        for piece in data.chunks(200) {
            let write = house.ask(A, Ask::new(Opcode::STREAM_WRITE).handle(handle).data(piece));
            insist(house, &mut asked_in, &request);
            let answer = house.answer(write).0;
            assert_eq!(
                (Status(answer.status), answer.result),
                (Status::OK, piece.len() as u64)
            );
        }
        let end = Ask::new(Opcode::STREAM_END)
            .handle(handle)
            .offset(700)
            .argument(u64::from(crc32fast::hash(&data)))
            .flags(flag::CHECK);
        let ended = house.ask(A, end);
        insist(house, &mut asked_in, &request);
        assert_eq!(house.status(ended), Status::OK);
        let crc32 = crc32fast::hash(&data);
        assert_eq!(told(house), ControlReply::Transferred { bytes: 700, crc32 });
        assert_eq!(house.file("host", "p"), Some(&data));
        assert_eq!(
            (house.slots_open(), house.hub.vm_statuses()[0].open_files),
            (0, 0)
        );
    });
}

#[test]
fn an_operator_that_does_not_come_back_is_waited_for_in_vain_and_not_for_ever() {
    let request = |house: &mut House, key: u64| ControlRequest::Push {
        target: "b".into(),
        file: house.host_file("host", "f", &bytes(1000)),
        size: 1000,
        name: "f".into(),
        wait_ns: 1 << 40,
        key,
    };
    let mut house = House::new();
    for key in [1, 2] {
        let request = request(&mut house, key);
        house.control(5, request);
    }
    let shown = house.ask(B, Ask::new(Opcode::NEXT_OFFER).room(600));
    let offer = OfferHeader::read_from_prefix(&house.answer(shown).1)
        .unwrap()
        .0
        .handle;
    let handle = house.ok(B, Ask::new(Opcode::ACCEPT).handle(offer));
    house.crash();
    let read = house.ask(B, Ask::new(Opcode::STREAM_READ).handle(handle).room(300));
    assert!(house.open.contains(&read), "it waits for the operator");
    house.pass_ns(31_000_000_000);
    assert_eq!(house.status(read), Status::PEER_ABSENT);
    house.ok(B, Ask::new(Opcode::CLOSE).handle(handle));
    // The one nobody had answered is not offered any more.
    let shown = house.ask(B, Ask::new(Opcode::NEXT_OFFER).room(600));
    assert!(house.open.contains(&shown));
    // Who asks too late hears what came of it, and a key is good for one transfer.
    house.replies.clear();
    for key in [1, 2] {
        let request = request(&mut house, key);
        house.control(5, request);
        assert!(matches!(told(&house), ControlReply::Failed { .. }));
        house.replies.clear();
    }
    house.close_session(B);
    assert_eq!(
        (house.slots_open(), house.hub.vm_statuses()[1].open_files),
        (0, 0)
    );
}

#[test]
fn a_key_is_one_transfer_of_one_connection() {
    let mut house = House::new();
    let push = |house: &mut House, target: &str| ControlRequest::Push {
        target: target.into(),
        file: house.host_file("host", "f", &bytes(10)),
        size: 10,
        name: "f".into(),
        wait_ns: 1 << 40,
        key: 9,
    };
    let request = push(&mut house, "b");
    house.control(5, request);
    for (target, status) in [("b", Status::BUSY), ("a", Status::BAD_ARGUMENT)] {
        let request = push(&mut house, target);
        house.control(6, request);
        assert!(matches!(told(&house), ControlReply::Failed { status: found, .. } if found == status.0));
        house.replies.clear();
    }
    assert_eq!(house.slots_open(), 1);
}

#[test]
fn a_message_of_the_host_that_is_sent_again_with_its_key_comes_once() {
    at_every_output(|house| {
        let request = |_: &mut House| ControlRequest::Send {
            target: "b".into(),
            message: b"once".to_vec(),
            key: 5,
        };
        let mut asked_in = None;
        insist(house, &mut asked_in, &request);
        for _ in 0..2 {
            let request = request(house);
            house.control(6, request);
        }
        insist(house, &mut asked_in, &request);
        let first = house.ask(B, Ask::new(Opcode::RECEIVE).room(600));
        assert_eq!(house.status(first), Status::OK);
        let second = house.ask(B, Ask::new(Opcode::RECEIVE).room(600));
        assert!(house.open.remove(&second), "it came twice");
        house.unmapped.insert(second);
        house.input(vmgmt_core::Input::Void(second));
    });
}
