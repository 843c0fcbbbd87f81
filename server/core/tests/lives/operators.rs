//! What operators had asked for.

use crate::house::{Ask, House};
use crate::{A, B, at_every_output, bytes};
use vmgmt_abi::file::OfferHeader;
use vmgmt_abi::ring::{completion_flag, flag};
use vmgmt_abi::{Opcode, Status};
use vmgmt_core::{ControlReply, ControlRequest};
use zerocopy::FromBytes;

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
