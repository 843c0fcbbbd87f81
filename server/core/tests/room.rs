//! What survives a crash has a memory of a certain size: whatever guests and operators ask, it fits, and what would not is refused.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod house;

use house::{Ask, House, config};
use vmgmt_abi::chat::{ALL_NAME, PEER_ALL, PEER_HOST};
use vmgmt_abi::file::{SIZE_UNKNOWN, put};
use vmgmt_abi::ring::flag;
use vmgmt_abi::{Budget, Opcode, Status};
use vmgmt_core::{ControlReply, ControlRequest};
use vmgmt_device::rings::Token;

const A: u64 = 11;
const B: u64 = 12;
const NO_ROOM: (Status, u32) = (Status::OVER_BUDGET, Budget::STATE_BYTES.0);

/// So many VMs that publish themselves, the first of which may send to all; and so many bytes for a snapshot.
fn published(vms: u64, room: u64) -> House {
    let mut configs: Vec<_> = (1..=vms).map(|vm| config(vm, &format!("vm{vm}"))).collect();
    configs[0].send_to_all = true;
    let mut house = House::with(configs);
    // These tests ask for a lot; that every snapshot fits is asserted all the same.
    (house.repack, house.replay) = (false, false);
    house.has_room(room);
    for vm in 1..=vms {
        house.ok(10 + vm, Ask::new(Opcode::PUBLISH).argument(1));
    }
    house
}

fn outcome(house: &House, token: Token) -> (Status, u32) {
    let answer = house.answer(token).0;
    (Status(answer.status), answer.detail)
}

#[test]
fn a_message_to_all_is_counted_in_every_mailbox() {
    let mut house = published(100, 8 << 20);
    let mut told = Vec::new();
    for _ in 0..3 {
        house.control(
            1,
            ControlRequest::Send {
                target: ALL_NAME.to_owned(),
                message: vec![7; 128 << 10],
                key: 0,
            },
        );
        match house.replies.pop().unwrap().2 {
            ControlReply::Sent { number } => told.push(number),
            reply => assert!(matches!(reply, ControlReply::Failed { .. }), "{reply:?}"),
        }
    }
    assert!((40..100).contains(&told[0]), "{told:?}");
    // What is in the mailboxes is delivered, and then there is room again.
    for session in 11..111 {
        while house.hub.vm_statuses()[session as usize - 11].mailbox_messages > 0 {
            house.ok(session, Ask::new(Opcode::RECEIVE).room(256 << 10));
        }
    }
    house.ok(B, Ask::new(Opcode::SEND).handle(1).data("hello"));
}

#[test]
fn one_vm_does_not_take_the_room_of_all() {
    let mut house = published(100, 8 << 20);
    let body = vec![7; 60 << 10];
    for _ in 0..3 {
        let sent = house.ask(A, Ask::new(Opcode::SEND).handle(PEER_ALL).data(&body));
        assert!(matches!(outcome(&house, sent), (Status::OK, _) | NO_ROOM));
    }
    let sent = house.ask(A, Ask::new(Opcode::SEND).handle(2).data(&body));
    assert_eq!(outcome(&house, sent), NO_ROOM);
    // Another's mail, files and transfers go on.
    house.ok(B, Ask::new(Opcode::SEND).handle(3).data(&body));
    house.ok(B, Ask::new(Opcode::PUT).meta("rw/f").offset(SIZE_UNKNOWN));
    house.ok(B, Ask::new(Opcode::OPEN).meta("rw/g").argument(0b110));
    let offered = house.ask(B, Ask::new(Opcode::OFFER).meta("vm3\0f").offset(1));
    assert!(house.open.contains(&offered));
}

#[test]
fn ranges_of_a_put_that_have_no_room_are_read_back() {
    let mut house = House::new();
    (house.repack, house.replay) = (false, false);
    house.has_room(48 << 10);
    let ask = Ask::new(Opcode::PUT).meta("rw/f").offset(SIZE_UNKNOWN);
    let mut puts: Vec<u64> = (0..3)
        .map(|number| house.ok(A, ask.clone().meta(format!("rw/f{number}"))))
        .collect();
    let bytes = 1600;
    let contents: Vec<u8> = (0..bytes).map(|place| (place % 251) as u8).collect();
    for handle in &puts {
        for place in (0..bytes).step_by(2).chain((1..bytes).step_by(2)) {
            let write = Ask::new(Opcode::WRITE).handle(*handle).offset(place as u64);
            house.ok(A, write.data(&contents[place..=place]));
        }
    }
    let commit = |handle, crc32: u32| {
        let commit = Ask::new(Opcode::COMMIT).handle(handle).offset(bytes as u64);
        commit.argument(u64::from(crc32)).flags(flag::CHECK).room(64)
    };
    let crc32 = crc32fast::hash(&contents);
    let last = puts.pop().unwrap();
    for handle in puts {
        house.ok(A, commit(handle, crc32));
    }
    house.fails(A, commit(last, crc32 ^ 1), Status::INTEGRITY);
    assert_eq!(house.file("rw", "f1"), Some(&contents));
}

#[test]
fn a_write_that_has_no_room_for_its_range_leaves_no_other_writes_checksum() {
    let mut house = House::new();
    (house.repack, house.replay) = (false, false);
    let put = house.ok(A, Ask::new(Opcode::PUT).meta("rw/f").offset(SIZE_UNKNOWN));
    house.manual = true;
    let write = |data: &str| Ask::new(Opcode::WRITE).handle(put).data(data);
    // Both are under way; which is done last cannot be known.
    house.ask(A, write("first"));
    house.ask(A, write("other"));
    house.step(0);
    house.has_room(house.hub.state_bytes());
    house.settle();
    house.has_room(1 << 20);
    house.manual = false;
    let crc32 = u64::from(crc32fast::hash(b"other"));
    let commit = Ask::new(Opcode::COMMIT).handle(put).offset(5);
    house.ok(A, commit.argument(crc32).flags(flag::CHECK).room(64));
    assert_eq!(house.file("rw", "f").map(Vec::as_slice), Some(&b"other"[..]));
}

#[test]
fn mail_that_the_host_never_takes_makes_room_again_when_it_is_old() {
    let mut house = published(3, 1 << 20);
    let send = || Ask::new(Opcode::SEND).handle(PEER_HOST).data(vec![7; 60 << 10]);
    let refused = loop {
        let sent = house.ask(A, send());
        if house.status(sent) != Status::OK {
            break sent;
        }
    };
    assert_eq!(outcome(&house, refused), NO_ROOM);
    for _ in 0..26 {
        let at = house.hub.poll_timeout().unwrap();
        house.pass_ns(at.since_ns(house.now));
    }
    house.ok(A, send());
    house.ok(A, Ask::new(Opcode::OPEN).meta("rw/g").argument(0b110));
}

#[test]
fn intents_with_long_names_wait_for_room() {
    let mut house = published(3, 512 << 10);
    house.manual = true;
    let long = vec!["d".repeat(200); 15].join("/");
    let mut refused = 0;
    for session in [A, B] {
        for number in 0..400 {
            let meta = format!("rw/{long}/{number}");
            let asked = house.ask(session, Ask::new(Opcode::MAKE_DIRECTORY).meta(meta));
            refused += usize::from(house.answers.contains_key(&asked));
            // Their disk is slow: the intents are known, and nothing is done yet.
            if !house.open.contains(&asked) {
                assert_eq!(outcome(&house, asked), NO_ROOM);
            }
        }
        let waiting = house.pending.len();
        for _ in 0..waiting {
            house.step(0);
        }
    }
    assert!((100..800).contains(&refused), "{refused}");
    // A third is served meanwhile.
    let received = house.ask(13, Ask::new(Opcode::RECEIVE).room(512));
    house.manual = false;
    house.ok(13, Ask::new(Opcode::SEND).handle(3).data("to myself"));
    assert_eq!(house.status(received), Status::OK);
}

#[test]
fn resumable_puts_and_answers_that_nobody_takes_fit_too() {
    let mut house = published(3, 128 << 10);
    house.manual = true;
    // The completions' places are not free: nothing is known to be published.
    for number in 0..600 {
        let session = 11 + number % 3;
        let ask = match number % 4 {
            0 => Ask::new(Opcode::PUT)
                .meta(format!("rw/{}{number}", "p".repeat(200)))
                .offset(SIZE_UNKNOWN)
                .argument(put::RESUME),
            1 => Ask::new(Opcode::OPEN)
                .meta(format!("rw/{}{number}", "o".repeat(200)))
                .argument(0b110),
            2 => Ask::new(Opcode::SEND).handle(1 + number % 2).data("message"),
            _ => Ask::new(Opcode::RECEIVE).room(512),
        };
        house.ask(session, ask);
        while !house.pending.is_empty() {
            house.step(0);
        }
    }
    house.crash();
    house.manual = false;
    house.settle();
}
