//! Chat mode, one operation after the other, with the failures of each.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod house;

use house::{Ask, House, config};
use vmgmt_abi::chat::{MessageHeader, PEER_ALL, PEER_HOST, PeerEntry, message_flag, presence};
use vmgmt_abi::ring::completion_flag;
use vmgmt_abi::{Budget, Opcode, Status};
use vmgmt_core::{ControlReply, ControlRequest, Input};
use vmgmt_device::rings::{Channel, Token};
use zerocopy::FromBytes;

const A: u64 = 11;
const B: u64 = 12;
const SECOND_NS: u64 = 1_000_000_000;

fn send(target: u64, text: &str) -> Ask {
    Ask::new(Opcode::SEND).handle(target).data(text)
}

fn receive() -> Ask {
    Ask::new(Opcode::RECEIVE).room(512)
}

fn message(house: &House, token: Token) -> (MessageHeader, String, Vec<u8>) {
    let (answer, payload) = house.answer(token);
    assert_eq!((answer.status, answer.result), (0, payload.len() as u64));
    let (header, rest) = MessageHeader::read_from_prefix(payload).unwrap();
    let (name, body) = rest.split_at(header.source_name_bytes as usize);
    (header, String::from_utf8(name.to_vec()).unwrap(), body.to_vec())
}

#[test]
fn a_message_goes_to_a_posted_receive_with_the_sender_stamped() {
    let mut house = House::new();
    let received = house.ask(B, receive());
    assert_eq!(house.ok(A, send(2, "hello")), 1);
    let (header, name, body) = message(&house, received);
    assert_eq!(
        (header.sequence, header.source, header.message_bytes, header.flags),
        (1, 1, 5, 0)
    );
    assert!(header.accepted_ns >= 1_700_000_000_000_000_000);
    assert_eq!((name.as_str(), body.as_slice()), ("a", b"hello".as_slice()));
}

#[test]
fn a_message_waits_for_who_is_away_and_comes_in_order() {
    let mut house = House::new();
    house.close_session(B);
    for number in 1..=3 {
        assert_eq!(
            house.ok(A, Ask::new(Opcode::SEND).meta("b").data(number.to_string())),
            number
        );
    }
    house.input(Input::SessionOpened { session: 22, vm: 2 });
    for number in 1..=3_u64 {
        let received = house.ask(22, receive());
        let (header, _, body) = message(&house, received);
        assert_eq!(
            (header.sequence, header.flags),
            (number, message_flag::FROM_MAILBOX)
        );
        assert_eq!(body, number.to_string().into_bytes());
    }
}

#[test]
fn a_large_message_comes_in_parts_on_one_ring_and_nothing_comes_between() {
    let mut house = House::new();
    let body: Vec<u8> = (0..1000_u32).map(|byte| byte as u8).collect();
    house.ok(A, Ask::new(Opcode::SEND).handle(2).data(&body));
    house.ok(A, send(2, "next"));
    let mut got = Vec::new();
    let mut parts = 0;
    loop {
        let received = house.ask(B, Ask::new(Opcode::RECEIVE).room(200));
        let (answer, _) = *house.answer(received);
        let (header, _, part) = message(&house, received);
        assert_eq!(header.flags & message_flag::CONTINUED != 0, parts > 0);
        got.extend(part);
        parts += 1;
        assert_eq!(answer.extra, 1000 - got.len() as u64);
        if answer.flags & completion_flag::MORE == 0 {
            break;
        }
    }
    assert_eq!((got, parts), (body, 7));
    let received = house.ask(B, receive());
    assert_eq!(message(&house, received).2, b"next");
}

#[test]
fn another_ring_gets_other_messages_and_a_closed_ring_gives_its_part_back() {
    let mut house = House::new();
    house.ok(A, Ask::new(Opcode::SEND).handle(2).data([7; 600]));
    house.ok(A, send(2, "second"));
    let first = house.ask_on(B, Channel::Ring(1), Ask::new(Opcode::RECEIVE).room(200));
    assert_ne!(house.answer(first).0.flags & completion_flag::MORE, 0);
    let other = house.ask_on(B, Channel::Ring(2), receive());
    assert_eq!(message(&house, other).2, b"second");
    house.input(Input::ChannelClosed {
        session: B,
        channel: Channel::Ring(1),
    });
    let whole = house.ask_on(B, Channel::Ring(2), Ask::new(Opcode::RECEIVE).room(4096));
    let (header, _, body) = message(&house, whole);
    assert_eq!((header.flags & message_flag::CONTINUED, body), (0, vec![7; 600]));
}

#[test]
fn a_whole_message_published_late_does_not_break_up_the_one_behind_it() {
    for order in [[0, 0], [1, 0]] {
        let mut house = House::new();
        house.ok(A, send(2, "whole"));
        house.ok(A, Ask::new(Opcode::SEND).handle(2).data([7; 300]));
        house.ok(A, send(2, "behind"));
        house.manual = true;
        let whole = house.ask(B, receive());
        let part = house.ask(B, Ask::new(Opcode::RECEIVE).room(200));
        let rest = house.ask(B, receive());
        assert!(
            !house.answers.contains_key(&rest),
            "not before the part is known to be published"
        );
        for choice in order {
            house.step(choice);
        }
        house.settle();
        assert_eq!(message(&house, whole).2, b"whole");
        let bytes = message(&house, part).2.len() + message(&house, rest).2.len();
        assert_eq!(
            (bytes, message(&house, rest).0.flags & message_flag::CONTINUED),
            (300, message_flag::CONTINUED)
        );
    }
}

#[test]
fn an_unpublished_delivery_goes_back_to_the_front() {
    let mut house = House::new();
    house.manual = true;
    let first = house.ask(B, receive());
    house.unpublished.insert(first);
    house.ask(A, send(2, "one"));
    house.ask(A, send(2, "two"));
    house.settle();
    house.manual = false;
    let (second, third) = (house.ask(B, receive()), house.ask(B, receive()));
    assert_eq!(message(&house, second).2, b"one");
    assert_eq!(message(&house, third).2, b"two");
}

#[test]
fn a_mailbox_is_bounded_and_the_sender_is_told() {
    let mut receiver = config(2, "b");
    receiver.limits.mailbox_bytes_max = 1000;
    let mut house = House::with(vec![config(1, "a"), receiver]);
    house.ok(A, Ask::new(Opcode::SEND).handle(2).data([0; 700]));
    let refused = house.ask(A, Ask::new(Opcode::SEND).handle(2).data([0; 700]));
    let answer = house.answer(refused).0;
    assert_eq!(
        (Status(answer.status), Budget(answer.detail)),
        (Status::OVER_BUDGET, Budget::MAILBOX_BYTES)
    );
    assert!(
        house
            .logs
            .iter()
            .any(|(vm, text)| *vm == 1 && text.contains("mailbox-bytes-max")),
        "{:?}",
        house.logs
    );
}

#[test]
fn old_messages_are_dropped_and_counted_whatever_the_wall_clock_does() {
    let mut receiver = config(2, "b");
    receiver.limits.mailbox_seconds_max = 60;
    let mut house = House::with(vec![config(1, "a"), receiver]);
    house.ok(A, send(2, "old"));
    // A jump of the wall clock by a year is no reason.
    house.input(Input::WallClock {
        now_ns: 1_700_000_000_000_000_000 + 365 * 24 * 3600 * SECOND_NS,
    });
    house.pass_ns(50 * SECOND_NS);
    let status = |house: &House| house.hub.vm_statuses()[1].clone();
    assert_eq!(
        (status(&house).mailbox_messages, status(&house).messages_dropped),
        (1, 0)
    );
    house.pass_ns(11 * SECOND_NS);
    assert_eq!(
        (status(&house).mailbox_messages, status(&house).messages_dropped),
        (0, 1)
    );
    assert!(house.logs.iter().any(|(_, text)| text.contains("dropped")));
}

#[test]
fn a_message_that_came_back_grows_old_as_any_other() {
    let mut receiver = config(2, "b");
    receiver.limits.mailbox_seconds_max = 60;
    for way in 0..3 {
        let mut house = House::with(vec![config(1, "a"), receiver.clone()]);
        house.manual = true;
        let received = house.ask(B, Ask::new(Opcode::RECEIVE).room(512));
        let sent = house.ask(A, send(2, "hello"));
        let status = |house: &House| house.hub.vm_statuses()[1].clone();
        assert_eq!(
            house.answers.contains_key(&received),
            house.answers.contains_key(&sent)
        );
        match way {
            0 => house.close_session(B),
            1 => house.reset_session(B),
            _ => {
                house.unpublished.insert(received);
                house.settle();
            }
        }
        assert_eq!(status(&house).mailbox_messages, 1, "{way}");
        house.pass_ns(61 * SECOND_NS);
        assert_eq!(
            (status(&house).mailbox_messages, status(&house).messages_dropped),
            (0, 1),
            "{way}"
        );
    }
}

#[test]
fn policy_decides_who_is_reached_and_seen() {
    let mut only_b = config(1, "a");
    only_b.reach = vec!["b".to_owned()];
    let mut house = House::with(vec![only_b, config(2, "b"), config(3, "c")]);
    house.fails(A, send(3, "x"), Status::DENIED);
    house.fails(A, Ask::new(Opcode::SEND).meta("c").data("x"), Status::DENIED);
    house.fails(A, send(99, "x"), Status::DENIED);
    house.fails(B, send(99, "x"), Status::PEER_ABSENT);
    house.fails(
        B,
        Ask::new(Opcode::SEND).meta("nobody").data("x"),
        Status::PEER_ABSENT,
    );
    house.ok(A, send(2, "x"));
    house.ok(A, send(PEER_HOST, "x"));
    house.fails(A, send(PEER_ALL, "x"), Status::DENIED);
    house.ok(B, Ask::new(Opcode::PUBLISH).argument(1).data("the printer"));
    let listed = house.ask(A, Ask::new(Opcode::PEERS).room(4096));
    let (answer, payload) = house.answer(listed).clone();
    assert_eq!(answer.result, payload.len() as u64);
    let (host, rest) = PeerEntry::read_from_prefix(&payload).unwrap();
    assert_eq!((host.number, &rest[..4]), (PEER_HOST, b"host".as_slice()));
    let (peer, rest) = PeerEntry::read_from_prefix(&rest[8..]).unwrap();
    assert_eq!(
        (peer.number, peer.presence),
        (2, presence::CONNECTED | presence::PUBLISHED)
    );
    assert_eq!(&rest[..12], b"bthe printer");
    assert_eq!(rest.len(), 16, "c is not listed");
}

#[test]
fn peers_go_on_at_their_cursor() {
    let mut house = House::new();
    let mut cursor = 0;
    let mut numbers = Vec::new();
    loop {
        let listed = house.ask(13, Ask::new(Opcode::PEERS).offset(cursor).room(24));
        let (answer, payload) = house.answer(listed).clone();
        numbers.push(PeerEntry::read_from_prefix(&payload).unwrap().0.number);
        cursor = answer.extra;
        if answer.flags & completion_flag::MORE == 0 {
            break;
        }
    }
    assert_eq!(numbers, [PEER_HOST, 1, 2]);
    house.fails(A, Ask::new(Opcode::PEERS).room(8), Status::TOO_LARGE);
}

#[test]
fn to_all_needs_a_right_and_tells_how_many() {
    let mut caller = config(1, "a");
    caller.send_to_all = true;
    let mut house = House::with(vec![caller, config(2, "b"), config(3, "c"), config(4, "d")]);
    house.ok(B, Ask::new(Opcode::PUBLISH).argument(1));
    house.ok(13, Ask::new(Opcode::PUBLISH).argument(1));
    let received = house.ask(13, receive());
    assert_eq!(house.ok(A, Ask::new(Opcode::SEND).meta("all").data("fire")), 2);
    assert_eq!(message(&house, received).0.flags, message_flag::TO_ALL);
    house.ok(13, Ask::new(Opcode::PUBLISH).argument(0));
    assert_eq!(house.ok(A, send(PEER_ALL, "again")), 1);
}

#[test]
fn presence_ends_with_the_session_or_its_reset() {
    let mut house = House::new();
    house.ok(A, Ask::new(Opcode::PUBLISH).argument(1).data("x"));
    assert!(house.hub.vm_statuses()[0].published);
    house.void_session(A);
    house.input(Input::SessionReset { session: A });
    assert!(!house.hub.vm_statuses()[0].published);
    house.fails(A, Ask::new(Opcode::PUBLISH).argument(2), Status::BAD_ARGUMENT);
    house.fails(
        A,
        Ask::new(Opcode::PUBLISH).argument(1).data([0xff]),
        Status::BAD_ARGUMENT,
    );
    house.fails(
        A,
        Ask::new(Opcode::PUBLISH).argument(1).data([b'x'; 1025]),
        Status::BAD_ARGUMENT,
    );
}

#[test]
fn a_repeated_key_is_answered_the_same_and_delivered_once() {
    let mut house = House::new();
    let ask = send(2, "pay 10").argument(77);
    assert_eq!(house.ok(A, ask.clone()), 1);
    assert_eq!(house.ok(A, ask.clone()), 1);
    assert_eq!(
        house.ok(A, send(3, "pay 10").argument(77)),
        2,
        "another target, another key"
    );
    assert_eq!(house.hub.vm_statuses()[1].mailbox_messages, 1);
}

#[test]
fn bodies_beyond_the_prefetch_are_fetched_and_keep_their_order() {
    let mut house = House::new();
    house.manual = true;
    let large = house.ask(A, Ask::new(Opcode::SEND).handle(2).data([1; 5000]));
    let small = house.ask(A, send(2, "small"));
    let largest = house.ask(A, Ask::new(Opcode::SEND).handle(2).data(vec![2; 1 << 20]));
    let cancelled = house.ask(A, send(2, "never"));
    assert!(house.answers.is_empty());
    house.input(Input::Cancel(cancelled));
    assert_eq!(house.status(cancelled), Status::CANCELLED);
    house.settle();
    house.manual = false;
    let numbers = [large, small, largest].map(|token| house.answer(token).0.result);
    assert_eq!(numbers, [1, 2, 3]);
    let too_large = house.ask(A, Ask::new(Opcode::SEND).handle(2).data(vec![2; (1 << 20) + 1]));
    let answer = house.answer(too_large).0;
    assert_eq!(
        (Status(answer.status), Budget(answer.detail)),
        (Status::OVER_BUDGET, Budget::MESSAGE_BYTES)
    );
}

#[test]
fn receives_end_by_cancel_deadline_and_budget() {
    let mut poor = config(1, "a");
    poor.limits.receives_max = 2;
    let mut house = House::with(vec![poor]);
    let cancelled = house.ask(A, receive());
    let late = house.ask(A, receive().deadline_ns(SECOND_NS));
    let refused = house.ask(A, receive());
    assert_eq!(Budget(house.answer(refused).0.detail), Budget::RECEIVES);
    house.input(Input::Cancel(cancelled));
    assert_eq!(house.status(cancelled), Status::CANCELLED);
    house.pass_ns(SECOND_NS - 1);
    assert!(!house.answers.contains_key(&late));
    assert_eq!(house.hub.next_timeout_of(), (late.session, 0), "whose it is");
    house.pass_ns(1);
    assert_eq!(house.status(late), Status::TIMED_OUT);
    house.fails(A, Ask::new(Opcode::RECEIVE).room(50), Status::TOO_LARGE);
}

#[test]
fn the_host_talks_and_listens() {
    let mut house = House::new();
    house.ok(A, send(PEER_HOST, "hello host"));
    house.control(
        5,
        ControlRequest::Receive {
            follow: false,
            wait_ns: SECOND_NS,
        },
    );
    let (_, _, reply, last) = house.replies.pop().unwrap();
    assert!(last);
    assert!(
        matches!(reply, ControlReply::Message { source, message, .. } if source == "a" && message == b"hello host")
    );
    house.control(
        5,
        ControlRequest::Receive {
            follow: false,
            wait_ns: SECOND_NS,
        },
    );
    house.pass_ns(SECOND_NS);
    assert_eq!(house.replies.pop().unwrap().2, ControlReply::NoMessage);
    let received = house.ask(B, receive());
    house.control(
        5,
        ControlRequest::Send {
            key: 0,
            target: "b".to_owned(),
            message: b"do it".to_vec(),
        },
    );
    let (header, name, body) = message(&house, received);
    assert_eq!(
        (header.source, name.as_str(), body.as_slice()),
        (PEER_HOST, "host", b"do it".as_slice())
    );
    house.control(
        5,
        ControlRequest::Send {
            key: 0,
            target: "nobody".to_owned(),
            message: Vec::new(),
        },
    );
    assert!(
        matches!(house.replies.pop().unwrap().2, ControlReply::Failed { status, .. } if status == Status::PEER_ABSENT.0)
    );
    house.control(
        6,
        ControlRequest::Receive {
            follow: true,
            wait_ns: 0,
        },
    );
    house.input(Input::ControlClosed { client: 6 });
    house.ok(A, send(PEER_HOST, "nobody listens"));
    house.control(
        7,
        ControlRequest::Receive {
            follow: true,
            wait_ns: 0,
        },
    );
    house.ok(A, send(PEER_HOST, "one"));
    let to_seven = house.replies.iter().filter(|(client, _, reply, last)| {
        *client == 7 && !*last && matches!(reply, ControlReply::Message { .. })
    });
    assert_eq!(to_seven.count(), 2);
    // An operator reaches the operators who wait.
    house.control(
        8,
        ControlRequest::Send {
            key: 0,
            target: "host".to_owned(),
            message: b"to ourselves".to_vec(),
        },
    );
    let ours = house.replies.iter().any(|(client, _, reply, _)| {
        *client == 7
            && matches!(reply, ControlReply::Message { source, message, .. } if source == "host" && message == b"to ourselves")
    });
    assert!(ours, "{:?}", house.replies);
}

#[test]
fn with_its_memory_nearly_full_nothing_is_taken_that_makes_it_fuller() {
    let mut house = House::new();
    house.repack = false;
    let send = |key| Ask::new(Opcode::SEND).handle(2).argument(key).data("message");
    let sent = house.ok(A, send(1));
    // More than three quarters of it are taken.
    let bytes = house.hub.state_bytes();
    house.has_room(bytes / 4 * 5);
    for ask in [
        send(2),
        Ask::new(Opcode::PUT).meta("rw/f"),
        Ask::new(Opcode::OPEN).meta("rw/f").argument(0b110),
        Ask::new(Opcode::OFFER).meta("b\0f").offset(1),
    ] {
        let token = house.ask(A, ask);
        let answer = house.answer(token).0;
        assert_eq!(
            (Status(answer.status), answer.detail),
            (Status::OVER_BUDGET, Budget::STATE_BYTES.0)
        );
    }
    assert_eq!(house.ok(A, send(1)), sent, "what was accepted is said again");
    house.ok(B, Ask::new(Opcode::RECEIVE).room(4096));
    house.has_room(1 << 20);
    house.ok(A, send(2));
}

/// The core dies; a new one has the journal, and is told nothing of the rings yet.
fn crash(house: &mut House) {
    house.open.clear();
    house.confirming.clear();
    house.crash();
}

#[test]
fn after_a_crash_an_accepted_send_is_not_sent_twice_and_an_unaccepted_one_is() {
    let mut house = House::new();
    house.manual = true;
    let lost = house.ask(A, send(2, "accepted, answer lost").tag(9));
    assert_eq!(house.status(lost), Status::OK);
    crash(&mut house);
    house.manual = false;
    assert_eq!(house.hub.unresolved(), [lost]);
    // Another submission, though of the same tag, is not that one.
    assert_eq!(house.ok(A, send(2, "never seen").tag(9).again()), 2);
    house.ask_again(lost);
    assert_eq!(house.answer(lost).0.result, 1);
    assert!(house.hub.unresolved().is_empty());
    assert_eq!(house.ok(A, send(2, "never seen").tag(9).again()), 3);
    assert_eq!(house.hub.vm_statuses()[1].mailbox_messages, 3);
}

#[test]
fn after_a_crash_a_delivery_is_resolved_by_what_the_ring_says() {
    for published in [true, false] {
        let mut house = House::new();
        house.manual = true;
        let received = house.ask(B, receive());
        house.control(
            1,
            ControlRequest::Send {
                key: 0,
                target: "b".to_owned(),
                message: b"x".to_vec(),
            },
        );
        assert_eq!(house.status(received), Status::OK);
        crash(&mut house);
        assert_eq!(house.hub.unresolved(), [received]);
        house.manual = false;
        let next = house.ask(B, receive());
        assert!(
            !house.answers.contains_key(&next),
            "not before the ring was looked at"
        );
        house.input(Input::Published {
            token: received,
            published,
        });
        assert_eq!(house.answers.contains_key(&next), !published);
    }
}

#[test]
fn after_a_crash_nothing_overtakes_a_delivery_of_before_on_its_channel() {
    let mut house = House::new();
    house.manual = true;
    let received = house.ask(B, receive());
    let sent: Vec<Token> = ["first", "second"].map(|text| house.ask(A, send(2, text))).into();
    assert_eq!(house.status(received), Status::OK);
    crash(&mut house);
    for token in sent {
        house.input(Input::Published {
            token,
            published: true,
        });
    }
    house.manual = false;
    // The rings give what was in flight again, one after the other.
    let earlier = house.ask(B, receive().again());
    assert!(
        !house.answers.contains_key(&earlier),
        "the second message, while the first is on its way"
    );
    // Another ring of the VM has no order with this one.
    let elsewhere = house.ask_on(B, Channel::Ring(1), receive());
    assert_eq!(message(&house, elsewhere).2, b"second");
    house.input(Input::Published {
        token: received,
        published: false,
    });
    assert_eq!(message(&house, earlier).2, b"first");
}

/// The host's messages that connection `client` was given.
fn given(house: &mut House, client: u64) -> Vec<u64> {
    let replies = house.replies.drain(..).filter(|(to, ..)| *to == client);
    let sequences = replies.filter_map(|(_, _, reply, _)| match reply {
        ControlReply::Message { sequence, .. } => Some(sequence),
        _ => None,
    });
    sequences.collect()
}

#[test]
fn a_message_to_the_host_stays_until_it_is_in_the_operators_socket() {
    let mut house = House::new();
    let follow = ControlRequest::Receive {
        follow: true,
        wait_ns: 0,
    };
    house.sockets_full = true;
    house.control(5, follow.clone());
    for number in 0..20 {
        house.ok(A, send(PEER_HOST, &format!("number {number}")));
    }
    // No more than there is room to hold for somebody who does not read.
    assert_eq!(given(&mut house, 5), (1..=16).collect::<Vec<_>>());
    house.input(Input::Told { client: 5, id: 1 });
    assert_eq!(given(&mut house, 5), [17]);
    // The connection breaks: what was in its socket is gone, the rest goes to the next, in order.
    house.input(Input::ControlClosed { client: 5 });
    house.control(
        6,
        ControlRequest::Receive {
            follow: false,
            wait_ns: SECOND_NS,
        },
    );
    assert_eq!(given(&mut house, 6), [2]);
    house.input(Input::Told { client: 6, id: 1 });
    // Of a request that is not there, or was told of everything.
    house.input(Input::Told { client: 6, id: 1 });
    house.input(Input::Told { client: 5, id: 1 });
    house.control(7, follow.clone());
    assert_eq!(given(&mut house, 7), (3..=18).collect::<Vec<_>>());
    // A core that dies before the bytes are in the socket has lost nothing; what it knows to be there does not come again.
    for _ in 0..3 {
        house.input(Input::Told { client: 7, id: 1 });
    }
    assert_eq!(given(&mut house, 7), [19, 20]);
    house.crash();
    house.sockets_full = false;
    house.control(8, follow);
    assert_eq!(given(&mut house, 8), (6..=20).collect::<Vec<_>>());
    house.crash();
    house.control(
        9,
        ControlRequest::Receive {
            follow: true,
            wait_ns: 0,
        },
    );
    assert!(given(&mut house, 9).is_empty());
}
