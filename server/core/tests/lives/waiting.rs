//! What is held ready for a VM, offers and mail, while its device is reset, is away, and the core dies.

use crate::house::{Ask, House};
use crate::{A, B, at_every_output};
use vmgmt_abi::file::{OfferHeader, SIZE_UNKNOWN};
use vmgmt_abi::ring::flag;
use vmgmt_abi::{Opcode, Status};
use vmgmt_core::Input;
use vmgmt_device::rings::Token;
use zerocopy::FromBytes;

const SECOND_NS: u64 = 1_000_000_000;
/// Another device of B's VM.
const B_AGAIN: u64 = 22;

fn offer() -> Ask {
    Ask::new(Opcode::OFFER).meta("b\0f").offset(SIZE_UNKNOWN)
}

fn next_offer() -> Ask {
    Ask::new(Opcode::NEXT_OFFER).room(4096)
}

fn shown(house: &House, token: Token) -> u64 {
    let payload = &house.answer(token).1;
    OfferHeader::read_from_prefix(payload).unwrap().0.handle
}

fn accept(offer: u64) -> Ask {
    Ask::new(Opcode::ACCEPT).handle(offer)
}

/// As a driver does that opens the device. A core that dies over it finds the reset itself.
fn reset(house: &mut House, session: u64) {
    loop {
        let before = house.crashes;
        house.reset_session(session);
        if house.crashes == before {
            return;
        }
    }
}

#[test]
fn an_offer_waits_for_a_vm_whose_device_is_reset() {
    for deadline_ns in [0, SECOND_NS] {
        at_every_output(|house| {
            // Nobody is told of it; then somebody waits for it; then somebody has seen it: each program's end resets the device.
            let offered = house.ask(A, offer().deadline_ns(deadline_ns));
            reset(house, B);
            let seen = house.ask(B, next_offer());
            let old = shown(house, seen);
            reset(house, B);
            house.fails(B, accept(old), Status::STALE);
            let waiting = house.ask(B, next_offer());
            assert!(
                !house.answers.contains_key(&offered),
                "{:?}",
                house.answer(offered)
            );
            let target = house.ok(B, accept(shown(house, waiting)));
            assert_eq!(house.status(offered), Status::OK);
            let source = house.answer(offered).0.result;
            house.ok(A, Ask::new(Opcode::CLOSE).handle(source));
            house.ok(B, Ask::new(Opcode::CLOSE).handle(target));
            assert!(house.hub.vm_statuses().iter().all(|vm| vm.open_files == 0));
        });
    }
}

#[test]
fn mail_waits_as_well() {
    at_every_output(|house| {
        let before = [b'x'; 400];
        house.ok(A, Ask::new(Opcode::SEND).handle(2).data(before));
        let cut = house.ask(B, Ask::new(Opcode::RECEIVE).room(200));
        assert!(house.answer(cut).0.extra > 0, "half of it is there");
        reset(house, B);
        house.ok(A, Ask::new(Opcode::SEND).handle(2).data("after"));
        for text in [&before[..], b"after"] {
            let token = house.ask(B, Ask::new(Opcode::RECEIVE).room(4096));
            assert!(house.answer(token).1.ends_with(text), "{text:?}");
        }
    });
}

#[test]
fn an_offerer_that_is_reset_takes_its_offer_back() {
    at_every_output(|house| {
        house.ask(A, offer());
        let seen = house.ask(B, next_offer());
        let old = shown(house, seen);
        house.ask(A, offer().deadline_ns(SECOND_NS));
        reset(house, A);
        house.fails(B, accept(old), Status::STALE);
        let waiting = house.ask(B, next_offer());
        assert!(
            !house.answers.contains_key(&waiting),
            "the second one is gone too"
        );
        reset(house, B);
    });
}

#[test]
fn what_was_accepted_ends_with_the_receivers_reset_and_the_sender_is_told_why() {
    let mut house = House::new();
    let offered = house.ask(A, offer());
    let seen = house.ask(B, next_offer());
    let target = house.ok(B, accept(shown(&house, seen)));
    let source = house.answer(offered).0.result;
    let write = |data: &[u8]| Ask::new(Opcode::STREAM_WRITE).handle(source).data(data);
    let end = Ask::new(Opcode::STREAM_END)
        .handle(source)
        .offset(300)
        .argument(1)
        .flags(flag::CHECK);
    let done = house.ask(A, write(&[1; 100]));
    let read = house.ask(B, Ask::new(Opcode::STREAM_READ).handle(target).room(100));
    assert_eq!((house.status(done), house.status(read)), (Status::OK, Status::OK));
    let waiting = [
        house.ask(A, write(&[2; 100])),
        house.ask(A, write(&[3; 100])),
        house.ask(A, end),
    ];
    house.reset_session(B);
    for token in waiting {
        assert_eq!(house.status(token), Status::PEER_ABSENT);
    }
    house.fails(A, write(b"more"), Status::PEER_ABSENT);
    house.ok(A, Ask::new(Opcode::CLOSE).handle(source));
    house.fails(B, Ask::new(Opcode::CLOSE).handle(target), Status::STALE);
    assert!(
        house
            .hub
            .vm_statuses()
            .iter()
            .all(|vm| (vm.open_files, vm.transfers) == (0, 0))
    );
    assert_eq!(house.hub.submissions_open(), 0);
}

#[test]
fn without_a_deadline_an_offer_needs_a_device_and_with_one_it_waits_for_it() {
    let mut house = House::new();
    house.input(Input::SessionOpened {
        session: B_AGAIN,
        vm: 2,
    });
    let [short, long] = [0, SECOND_NS].map(|deadline_ns| house.ask(A, offer().deadline_ns(deadline_ns)));
    house.close_session(B_AGAIN);
    assert!(!house.answers.contains_key(&short), "a device is left");
    house.close_session(B);
    assert_eq!(house.status(short), Status::PEER_ABSENT);
    house.fails(A, offer(), Status::PEER_ABSENT);
    // Also those that a core before was told of.
    house.crash();
    house.input(Input::SessionOpened {
        session: B_AGAIN,
        vm: 2,
    });
    let seen = house.ask(B_AGAIN, next_offer());
    house.ok(B_AGAIN, accept(shown(&house, seen)));
    assert_eq!(house.status(long), Status::OK);
}

#[test]
fn who_left_while_no_core_lived_is_absent_to_the_next() {
    let mut house = House::new();
    let [short, long] = [0, SECOND_NS].map(|deadline_ns| house.ask(A, offer().deadline_ns(deadline_ns)));
    house.void_session(B);
    house.connected.remove(&B);
    house.crash();
    assert_eq!(house.status(short), Status::PEER_ABSENT);
    assert!(!house.answers.contains_key(&long));
    house.pass_ns(2 * SECOND_NS);
    assert_eq!(house.status(long), Status::TIMED_OUT);
    assert_eq!(house.hub.submissions_open(), 0);
}

#[test]
fn a_core_that_is_still_being_told_who_is_there_takes_nobody_for_absent() {
    let mut house = House::new();
    house.repack = true;
    let there = std::mem::take(&mut house.connected);
    house.crash_untold();
    house.input(Input::SessionOpened { session: A, vm: 1 });
    let [to_b, to_c] = ["b\0f", "c\0f"].map(|meta| house.ask(A, offer().meta(meta)));
    assert!(!house.answers.contains_key(&to_b) && !house.answers.contains_key(&to_c));
    house.input(Input::SessionOpened {
        session: B,
        vm: there[&B],
    });
    house.input(Input::Adopted);
    assert_eq!(house.status(to_c), Status::PEER_ABSENT);
    let seen = house.ask(B, next_offer());
    house.ok(B, accept(shown(&house, seen)));
    assert_eq!(house.status(to_b), Status::OK);
}
