//! Messages: delivered once, refused once, whoever waits.

use crate::house::{Ask, House, config};
use crate::{A, B, at_every_output};
use std::collections::BTreeSet;
use vmgmt_abi::chat::{MessageHeader, message_flag};
use vmgmt_abi::ring::completion_flag;
use vmgmt_abi::{Mode, Opcode, Status};
use vmgmt_core::{Hub, Input, Output, Record};
use vmgmt_device::Tick;
use vmgmt_device::rings::{Channel, Fetched, Token};
use zerocopy::FromBytes;

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
