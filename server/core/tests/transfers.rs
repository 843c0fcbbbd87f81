//! Files from VM to VM and to and from the host, with the failures of each.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod house;

use house::{Ask, House, config};
use vmgmt_abi::chat::PEER_HOST;
use vmgmt_abi::file::{OfferHeader, SIZE_UNKNOWN, offer_kind};
use vmgmt_abi::ring::{completion_flag, flag};
use vmgmt_abi::{Budget, Opcode, Status};
use vmgmt_core::{ControlReply, ControlRequest, Effect, Input};
use vmgmt_device::rings::Token;
use zerocopy::FromBytes;

const A: u64 = 11;
const B: u64 = 12;
const SECOND_NS: u64 = 1_000_000_000;

fn offer(target: &str) -> Ask {
    Ask::new(Opcode::OFFER)
        .meta(format!("{target}\0dir/file"))
        .offset(SIZE_UNKNOWN)
}

fn next_offer() -> Ask {
    Ask::new(Opcode::NEXT_OFFER).room(4096)
}

fn write(handle: u64, data: &[u8]) -> Ask {
    Ask::new(Opcode::STREAM_WRITE).handle(handle).data(data)
}

fn read(handle: u64, bytes: usize) -> Ask {
    Ask::new(Opcode::STREAM_READ).handle(handle).room(bytes)
}

fn end(handle: u64, contents: &[u8]) -> Ask {
    let crc32 = u64::from(crc32fast::hash(contents));
    Ask::new(Opcode::STREAM_END)
        .handle(handle)
        .offset(contents.len() as u64)
        .argument(crc32)
        .flags(flag::CHECK)
}

fn confirm(handle: u64) -> Ask {
    Ask::new(Opcode::STREAM_CONFIRM).handle(handle)
}

fn shown(house: &House, token: Token) -> (OfferHeader, String) {
    let (header, names) = OfferHeader::read_from_prefix(&house.answer(token).1).unwrap();
    (header, String::from_utf8(names.to_vec()).unwrap())
}

/// A stream from a to b: handles of both ends.
fn stream(house: &mut House) -> (u64, u64) {
    let offered = house.ask(A, offer("b"));
    let taken = house.ask(B, next_offer());
    let handle = shown(house, taken).0.handle;
    let target = house.ok(B, Ask::new(Opcode::ACCEPT).handle(handle));
    (house.answer(offered).0.result, target)
}

fn quiet(house: &House) {
    for vm in house.hub.vm_statuses() {
        assert_eq!((vm.open_files, vm.transfers), (0, 0), "{vm:?}");
    }
    assert_eq!(
        (
            house.slots_open(),
            house.hub.effects_open(),
            house.hub.submissions_open()
        ),
        (0, 0, 0)
    );
}

#[test]
fn bytes_go_over_in_order_whatever_the_sizes_and_the_end_is_confirmed() {
    let mut house = House::new();
    house.repack = false;
    house.replay = false;
    let offered = house.ask(A, offer("b"));
    let taken = house.ask(B, next_offer());
    let (header, names) = shown(&house, taken);
    assert_eq!(
        (header.source, header.kind, names.as_str()),
        (1, offer_kind::OFFER, "adir/file")
    );
    let target = house.ok(B, Ask::new(Opcode::ACCEPT).handle(header.handle));
    let source = house.answer(offered).0.result;
    let contents: Vec<u8> = (0..3_000_000_u32).map(|byte| (byte * 7) as u8).collect();
    let writes: Vec<Token> = contents
        .chunks(1_300_000)
        .map(|chunk| house.ask(A, write(source, chunk)))
        .collect();
    let ended = house.ask(A, end(source, &contents));
    let mut got = Vec::new();
    loop {
        let token = house.ask(B, read(target, 700_001));
        let answer = house.answer(token).0;
        if answer.flags & completion_flag::END != 0 {
            assert_eq!(
                (answer.result, answer.detail, answer.extra),
                (0, 1, u64::from(crc32fast::hash(&contents)))
            );
            break;
        }
        got.extend_from_slice(&house.buffers[&token][..answer.result as usize]);
    }
    assert!(got == contents);
    assert!(writes.iter().all(|token| house.status(*token) == Status::OK));
    assert!(
        !house.answers.contains_key(&ended),
        "done only when the receiver says so"
    );
    house.ok(B, confirm(target));
    assert_eq!(
        (house.status(ended), house.answer(ended).0.result),
        (Status::OK, 3_000_000)
    );
    house.fails(B, read(target, 10), Status::STALE);
    quiet(&house);
}

#[test]
fn a_read_takes_what_is_there_and_a_waiting_read_the_first_bytes() {
    let mut house = House::new();
    let (source, target) = stream(&mut house);
    let waiting = house.ask(B, read(target, 100));
    house.ok(A, write(source, b"some"));
    assert_eq!(house.answer(waiting).0.result, 4);
    house.ok(A, write(source, b""));
    house.fails(B, read(target, 0), Status::TOO_LARGE);
    house.fails(B, write(target, b"x"), Status::BAD_ARGUMENT);
    house.fails(A, read(source, 1), Status::BAD_ARGUMENT);
    house.fails(A, end(source, b"som"), Status::BAD_ARGUMENT);
    house.fails(B, confirm(target), Status::BAD_ARGUMENT);
    house.ask(A, end(source, b"some"));
    house.fails(A, write(source, b"more"), Status::ENDED);
    house.ok(B, read(target, 10));
    house.fails(B, read(target, 10), Status::ENDED);
    house.ok(B, confirm(target).argument(u64::from(Status::INTEGRITY.0)));
    assert!(
        house
            .answers
            .values()
            .any(|(answer, _)| answer.status == Status::INTEGRITY.0)
    );
    quiet(&house);
}

#[test]
fn offers_are_refused_time_out_and_need_a_peer() {
    let mut house = House::new();
    let offered = house.ask(A, offer("b"));
    let taken = house.ask(B, next_offer());
    house.ok(B, Ask::new(Opcode::REFUSE).handle(shown(&house, taken).0.handle));
    assert_eq!(house.status(offered), Status::REFUSED);
    house.fails(
        B,
        Ask::new(Opcode::ACCEPT).handle(shown(&house, taken).0.handle),
        Status::STALE,
    );
    let offered = house.ask(A, offer("b").deadline_ns(SECOND_NS));
    let taken = house.ask(B, next_offer());
    house.pass_ns(SECOND_NS);
    assert_eq!(house.status(offered), Status::TIMED_OUT);
    house.fails(
        B,
        Ask::new(Opcode::ACCEPT).handle(shown(&house, taken).0.handle),
        Status::STALE,
    );
    house.fails(A, offer("nobody"), Status::PEER_ABSENT);
    house.fails(A, offer("host"), Status::DENIED);
    assert!(
        house
            .logs
            .iter()
            .any(|(_, text)| text.contains("must carry the handle of a request"))
    );
    house.fails(A, Ask::new(Opcode::OFFER).meta("b\0../x"), Status::BAD_ARGUMENT);
    house.fails(A, Ask::new(Opcode::OFFER).meta("b"), Status::BAD_ARGUMENT);
    let waiting = house.ask(A, offer("b"));
    house.close_session(B);
    assert_eq!(house.status(waiting), Status::PEER_ABSENT);
    house.fails(A, offer("b"), Status::PEER_ABSENT);
    let patient = house.ask(A, offer("b").deadline_ns(SECOND_NS));
    house.input(Input::SessionOpened { session: 22, vm: 2 });
    let taken = house.ask(22, next_offer());
    house.ok(22, Ask::new(Opcode::ACCEPT).handle(shown(&house, taken).0.handle));
    assert_eq!(house.status(patient), Status::OK);
}

#[test]
fn an_offer_whose_reader_died_waits_for_the_next() {
    let mut house = House::new();
    let offered = house.ask(A, offer("b").deadline_ns(SECOND_NS));
    house.ask(B, next_offer());
    house.void_session(B);
    house.input(Input::SessionReset { session: B });
    let taken = house.ask(B, next_offer());
    house.ok(B, Ask::new(Opcode::ACCEPT).handle(shown(&house, taken).0.handle));
    assert_eq!(house.status(offered), Status::OK);
}

#[test]
fn offers_are_bounded() {
    let mut poor = config(1, "a");
    poor.limits.offers_max = 2;
    let mut house = House::with(vec![poor, config(2, "b")]);
    let first = house.ask(A, offer("b"));
    house.ask(A, offer("b"));
    let third = house.ask(A, offer("b"));
    assert_eq!(Budget(house.answer(third).0.detail), Budget::OFFERS);
    house.input(Input::Cancel(first));
    assert_eq!(house.status(first), Status::CANCELLED);
    house.ask(A, offer("b"));
    assert_eq!(house.hub.submissions_open(), 2);
}

#[test]
fn either_side_can_go_and_the_other_is_told() {
    for closer in [A, B] {
        let mut house = House::new();
        let (source, target) = stream(&mut house);
        let (reading, ended) = if closer == A {
            (house.ask(B, read(target, 10)), None)
        } else {
            house.ask(A, write(source, b"x"));
            (
                Token {
                    session: 0,
                    ..house.ask(A, write(source, b"y"))
                },
                Some(()),
            )
        };
        house.close_session(closer);
        if ended.is_none() {
            assert_eq!(house.status(reading), Status::PEER_ABSENT);
            house.fails(B, read(target, 10), Status::PEER_ABSENT);
            house.ok(B, Ask::new(Opcode::CLOSE).handle(target));
        } else {
            assert_eq!(
                house
                    .answers
                    .values()
                    .filter(|(answer, _)| answer.status == Status::PEER_ABSENT.0)
                    .count(),
                2
            );
            house.fails(A, write(source, b"x"), Status::PEER_ABSENT);
            house.ok(A, Ask::new(Opcode::CLOSE).handle(source));
        }
        quiet(&house);
    }
}

#[test]
fn a_bad_buffer_is_its_owners_fault() {
    for guilty in [A, B] {
        let mut house = House::new();
        let (source, target) = stream(&mut house);
        house.manual = true;
        let writing = house.ask(A, write(source, b"data"));
        let more = house.ask(A, write(source, b"more"));
        let reading = house.ask(B, read(target, 10));
        house.unmapped.insert(if guilty == A { writing } else { reading });
        house.settle();
        let statuses = [writing, more, reading].map(|token| house.status(token));
        if guilty == A {
            assert_eq!(
                statuses,
                [Status::BAD_ADDRESS, Status::CANCELLED, Status::PEER_ABSENT]
            );
        } else {
            assert_eq!(
                statuses,
                [Status::PEER_ABSENT, Status::PEER_ABSENT, Status::BAD_ADDRESS]
            );
        }
        house.manual = false;
        house.ok(A, Ask::new(Opcode::CLOSE).handle(source));
        house.ok(B, Ask::new(Opcode::CLOSE).handle(target));
        quiet(&house);
    }
}

#[test]
fn giving_up_in_the_middle_of_a_copy_waits_for_the_copy() {
    let mut house = House::new();
    let (source, target) = stream(&mut house);
    house.manual = true;
    let writing = house.ask(A, write(source, &[1; 100]));
    let reading = house.ask(B, read(target, 10));
    house.input(Input::Cancel(reading));
    house.input(Input::Cancel(writing));
    assert!(!house.answers.contains_key(&reading) && !house.answers.contains_key(&writing));
    house.settle();
    assert_eq!(
        (house.status(reading), house.answer(reading).0.result),
        (Status::OK, 10)
    );
    assert_eq!(
        (house.status(writing), house.answer(writing).0.result),
        (Status::CANCELLED, 10)
    );
    // The stream counts only what went over.
    house.manual = false;
    house.ask(A, end(source, &[1; 10]));
    house.ok(B, read(target, 10));
    house.ok(B, confirm(target));
    quiet(&house);
}

#[test]
fn the_host_pushes_a_file() {
    let mut house = House::new();
    let contents = vec![9; 10_000];
    let file = house.host_file("host", "f", &contents);
    let push = |file| ControlRequest::Push {
        key: 0,
        target: "b".into(),
        file,
        size: 10_000,
        name: "f".into(),
        wait_ns: SECOND_NS,
    };
    house.control(5, push(file));
    let taken = house.ask(B, next_offer());
    let (header, names) = shown(&house, taken);
    assert_eq!(
        (header.source, header.size, names.as_str()),
        (PEER_HOST, 10_000, "hostf")
    );
    let target = house.ok(B, Ask::new(Opcode::ACCEPT).handle(header.handle));
    let token = house.ask(B, read(target, 20_000));
    assert_eq!(house.answer(token).0.result, 10_000);
    assert_eq!(&house.buffers[&token][..10_000], contents);
    let token = house.ask(B, read(target, 20_000));
    let crc32 = crc32fast::hash(&contents);
    assert_eq!(house.answer(token).0.extra, u64::from(crc32));
    house.ok(B, confirm(target));
    assert_eq!(
        house.replies.pop().unwrap().2,
        ControlReply::Transferred { bytes: 10_000, crc32 }
    );
    quiet(&house);
    // Nobody answers.
    let file = house.host_file("host", "f", &contents);
    house.control(5, push(file));
    house.pass_ns(SECOND_NS);
    assert!(
        matches!(house.replies.pop().unwrap().2, ControlReply::Failed { status, .. } if status == Status::TIMED_OUT.0)
    );
    // The operator goes away in the middle.
    let file = house.host_file("host", "f", &contents);
    house.control(5, push(file));
    let taken = house.ask(B, next_offer());
    let target = house.ok(B, Ask::new(Opcode::ACCEPT).handle(shown(&house, taken).0.handle));
    house.input(Input::ControlClosed { client: 5 });
    house.fails(B, read(target, 10), Status::PEER_ABSENT);
    house.ok(B, Ask::new(Opcode::CLOSE).handle(target));
    quiet(&house);
}

#[test]
fn the_host_pulls_a_file_and_checks_it() {
    for wrong in [false, true] {
        let mut house = House::new();
        let file = house.host_file("host", "pulled", b"");
        let path = "logs/today".to_owned();
        house.control(
            5,
            ControlRequest::Pull {
                key: 0,
                source: "a".into(),
                path,
                file,
                wait_ns: SECOND_NS,
            },
        );
        let taken = house.ask(A, next_offer());
        let (header, names) = shown(&house, taken);
        assert_eq!(
            (header.kind, names.as_str()),
            (offer_kind::REQUEST, "hostlogs/today")
        );
        house.fails(
            A,
            Ask::new(Opcode::ACCEPT).handle(header.handle),
            Status::BAD_ARGUMENT,
        );
        house.fails(A, offer("b").handle(header.handle), Status::BAD_ARGUMENT);
        let source = house.ok(A, offer("host").handle(header.handle));
        house.ok(A, write(source, b"line 1\n"));
        house.ok(A, write(source, b"line 2\n"));
        let said: &[u8] = if wrong {
            b"line 1\nline 3\n"
        } else {
            b"line 1\nline 2\n"
        };
        let ended = house.ask(A, end(source, said));
        let reply = house.replies.pop().unwrap().2;
        if wrong {
            assert_eq!(house.status(ended), Status::INTEGRITY);
            assert!(matches!(reply, ControlReply::Failed { status, .. } if status == Status::INTEGRITY.0));
        } else {
            assert_eq!(house.status(ended), Status::OK);
            assert_eq!(
                reply,
                ControlReply::Transferred {
                    bytes: 14,
                    crc32: crc32fast::hash(said)
                }
            );
            assert_eq!(house.file("host", "pulled").unwrap(), said);
        }
        quiet(&house);
    }
}

#[test]
fn a_file_that_became_shorter_is_no_endless_push() {
    let mut house = House::new();
    let file = house.host_file("host", "f", b"short");
    house.control(
        5,
        ControlRequest::Push {
            key: 0,
            target: "b".into(),
            file,
            size: 100,
            name: "f".into(),
            wait_ns: SECOND_NS,
        },
    );
    let taken = house.ask(B, next_offer());
    let target = house.ok(B, Ask::new(Opcode::ACCEPT).handle(shown(&house, taken).0.handle));
    house.fails(B, read(target, 100), Status::PEER_ABSENT);
    assert!(
        matches!(house.replies.pop().unwrap().2, ControlReply::Failed { status, .. } if status == Status::IO_ERROR.0)
    );
    house.ok(B, Ask::new(Opcode::CLOSE).handle(target));
    quiet(&house);
}

#[test]
fn pieces_are_small_enough_for_everybody_else() {
    let mut house = House::new();
    house.repack = false;
    let (source, target) = stream(&mut house);
    house.manual = true;
    house.ask(A, write(source, &vec![0; 4 << 20]));
    house.ask(B, read(target, 4 << 20));
    let mut pieces = 0;
    while let Some((_, Effect::Copy { from, .. })) = house.pending.first() {
        assert!(from.bytes <= 1 << 20);
        assert_eq!(house.pending.len(), 1);
        pieces += 1;
        house.step(0);
    }
    assert_eq!(pieces, 4);
}
