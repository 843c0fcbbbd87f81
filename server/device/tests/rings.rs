//! The rings, by their verbs: what a guest and a hub see.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use vmgmt_abi::registers::{DeviceState, RingState};
use vmgmt_abi::ring::{event_offset, flag};
use vmgmt_abi::{Completion, Mode, Opcode, Status, Submission};
use vmgmt_device::Tick;
use vmgmt_device::page::{Interrupts, PlainWords, PortSubmission, control};
use vmgmt_device::rings::testing::{Bed, FlatGuest, FlatMemory, FlatRegion, RingPlan};
use vmgmt_device::rings::{Answer, Buffer, Channel, Fetched, HostFacts, Input, Output, Segment};
use zerocopy::{FromBytes, IntoBytes};

type PlainBed = Bed<PlainWords, FlatMemory>;
const DATA: u64 = 0x8_0000;

fn bed() -> PlainBed {
    let guest = FlatGuest::new(1 << 20);
    Bed::new(&guest, FlatMemory::new(&guest), PlainWords::new).unwrap()
}

fn open(bed: &mut PlainBed, mode: Mode) -> RingPlan {
    let mut ring = RingPlan::new(0, 0, 64, 64, mode.0);
    bed.enable(&mut ring);
    assert_eq!(bed.core.open_answer(0).state, RingState::OPEN);
    ring
}

fn of(opcode: Opcode, tag: u32) -> Submission {
    Submission {
        tag,
        opcode: opcode.0,
        ..Submission::default()
    }
}

/// One turn; signals and kicks are left out.
fn turn(bed: &mut PlainBed) -> Vec<Output> {
    let mut outputs = Vec::new();
    loop {
        let turn = bed.poll(64);
        outputs.extend(bed.outputs());
        bed.end_turn();
        outputs.extend(bed.outputs());
        let delivered = turn.waiting && bed.memory.deliver();
        if !delivered && !turn.more {
            break;
        }
    }
    while bed.memory.deliver() {
        bed.poll(64);
        bed.end_turn();
        outputs.extend(bed.outputs());
    }
    outputs.retain(|output| !matches!(output, Output::Signal { .. } | Output::Kick));
    outputs
}

fn submission(outputs: &[Output]) -> Fetched {
    match outputs {
        [Output::Submission(fetched)] => (**fetched).clone(),
        other => panic!("one submission expected, not {other:?}"),
    }
}

fn complete(bed: &mut PlainBed, fetched: &Fetched, answer: Answer, payload: &[u8], confirm: bool) {
    bed.handle(Input::Complete {
        token: fetched.token,
        answer,
        payload: payload.to_vec(),
        confirm,
    });
}

fn status(completion: Option<Completion>) -> Option<(u32, Status)> {
    completion.map(|completion| (completion.tag, Status(completion.status)))
}

#[test]
fn a_submission_goes_to_the_hub_and_its_answer_comes_back() {
    for by_messages in [false, true] {
        let mut bed = bed();
        bed.memory.set_by_messages(by_messages);
        let mut ring = RingPlan::new(0, 0, 64, 64, Mode::CHAT.0);
        bed.enable(&mut ring);
        turn(&mut bed);
        assert_eq!(bed.core.open_answer(0).state, RingState::OPEN);
        bed.guest.write(DATA, b"peerhello");
        ring.submit(
            &bed.guest,
            &Submission {
                buffer: DATA,
                length: 9,
                meta_bytes: 4,
                deadline_ns: 500,
                argument: 77,
                ..of(Opcode::SEND, 5)
            },
        );
        bed.front.ring_doorbell(0, ring.tail);
        bed.touch();
        let fetched = submission(&turn(&mut bed));
        assert_eq!(
            (fetched.meta.as_slice(), fetched.data.as_deref()),
            (&b"peer"[..], Some(&b"hello"[..]))
        );
        assert_eq!(
            (fetched.argument, fetched.data_bytes, fetched.again),
            (77, 5, false)
        );
        assert_eq!(fetched.deadline, Tick(1_000_500));
        assert_eq!(
            bed.rings.buffer(fetched.token),
            Some(Buffer::Guest {
                segments: &[Segment {
                    iova: DATA + 4,
                    bytes: 5
                }],
                bytes: 5
            })
        );
        assert_eq!(
            bed.guest.load_u32(event_offset::SUBMISSION_HEAD),
            1,
            "the slot is the guest's again"
        );
        assert_eq!(ring.take(&bed.guest), None);
        complete(&mut bed, &fetched, Answer::ok_extra(9, 10), b"HEL", true);
        let outputs = turn(&mut bed);
        assert_eq!(
            outputs,
            [Output::Published {
                token: fetched.token,
                published: true
            }]
        );
        let completion = ring.take(&bed.guest).unwrap();
        assert_eq!(
            (
                completion.tag,
                completion.status,
                completion.result,
                completion.extra
            ),
            (5, 0, 9, 10)
        );
        let mut there = [0; 9];
        bed.guest.read(DATA, &mut there);
        assert_eq!(&there, b"peerHELlo", "meta is never written over");
        bed.end_turn();
        assert_eq!(bed.rings.in_flight(), 0);
        complete(&mut bed, &fetched, Answer::ok(0), &[], false);
        assert_eq!(bed.rings.counters().stale_answers, 1);
        assert_eq!(ring.take(&bed.guest), None);
    }
}

#[test]
fn a_buffer_that_the_vms_process_refuses_fails_its_submission_and_nothing_else() {
    let mut bed = bed();
    bed.memory.set_by_messages(true);
    let mut ring = RingPlan::new(0, 0, 64, 64, Mode::FILE.0);
    bed.enable(&mut ring);
    turn(&mut bed);
    bed.memory.set_refusing(DATA..DATA + 4096);
    let stat = |tag, buffer| Submission {
        buffer,
        length: 64,
        ..of(Opcode::LIST, tag)
    };
    ring.submit(&bed.guest, &stat(1, DATA + 16));
    ring.submit(&bed.guest, &stat(2, DATA + 4096));
    bed.front.ring_doorbell(0, ring.tail);
    bed.touch();
    let outputs = turn(&mut bed);
    let [Output::Submission(first), Output::Submission(second)] = outputs.as_slice() else {
        panic!("two submissions expected, not {outputs:?}");
    };
    complete(&mut bed, first, Answer::ok(5), b"first", true);
    complete(&mut bed, second, Answer::ok(6), b"second", true);
    let published = turn(&mut bed);
    let told = |fetched: &Fetched, published| Output::Published {
        token: fetched.token,
        published,
    };
    assert_eq!(published, [told(first, false), told(second, true)]);
    assert_eq!(status(ring.take(&bed.guest)), Some((1, Status::BAD_ADDRESS)));
    assert_eq!(status(ring.take(&bed.guest)), Some((2, Status::OK)));
    let mut there = [0; 6];
    bed.guest.read(DATA + 4096, &mut there);
    assert_eq!(&there, b"second");
    assert_eq!(bed.core.open_answer(0).state, RingState::OPEN);
}

#[test]
fn what_the_rings_answer_themselves() {
    let mut bed = bed();
    let mut ring = open(&mut bed, Mode::FILE);
    bed.guest.write(DATA, b"echo");
    bed.guest.store_u64(DATA + 64, 99);
    let submissions = [
        (of(Opcode::NOOP, 1), Status::OK, 0),
        (
            Submission {
                buffer: DATA,
                length: 8,
                meta_bytes: 4,
                ..of(Opcode::ECHO, 2)
            },
            Status::OK,
            4,
        ),
        (
            Submission {
                buffer: DATA + 64,
                length: 8,
                argument: 99,
                ..of(Opcode::PROVE, 3)
            },
            Status::OK,
            1,
        ),
        (
            Submission {
                buffer: DATA + 64,
                length: 8,
                argument: 98,
                ..of(Opcode::PROVE, 4)
            },
            Status::INTEGRITY,
            0,
        ),
        (
            Submission {
                argument: 55,
                ..of(Opcode::CANCEL, 5)
            },
            Status::OK,
            0,
        ),
        (of(Opcode(0x7fff), 6), Status::NOT_SUPPORTED, 0),
        (of(Opcode::SEND, 7), Status::WRONG_MODE, 0),
        (
            Submission {
                flags: 1 << 9,
                ..of(Opcode::STAT, 8)
            },
            Status::BAD_ARGUMENT,
            0,
        ),
        (
            Submission {
                buffer: 1 << 40,
                length: 4,
                meta_bytes: 4,
                ..of(Opcode::STAT, 9)
            },
            Status::BAD_ADDRESS,
            0,
        ),
    ];
    for (submission, _, _) in &submissions {
        ring.submit(&bed.guest, submission);
    }
    assert_eq!(turn(&mut bed), []);
    let mut got: Vec<_> = std::iter::from_fn(|| ring.take(&bed.guest)).collect();
    got.sort_by_key(|completion| completion.tag);
    let expected: Vec<_> = submissions
        .iter()
        .map(|(submission, status, result)| (submission.tag, *status, *result))
        .collect();
    let got: Vec<_> = got
        .iter()
        .map(|completion| (completion.tag, Status(completion.status), completion.result))
        .collect();
    assert_eq!(got, expected);
    let mut there = [0; 8];
    bed.guest.read(DATA, &mut there);
    assert_eq!(&there, b"echoecho");
    assert_eq!(bed.rings.in_flight(), 0);
}

#[test]
fn cancel_goes_to_the_hub_for_what_is_there() {
    let mut bed = bed();
    let mut ring = open(&mut bed, Mode::CHAT);
    ring.submit(
        &bed.guest,
        &Submission {
            buffer: DATA,
            length: 64,
            ..of(Opcode::RECEIVE, 5)
        },
    );
    let fetched = submission(&turn(&mut bed));
    ring.submit(
        &bed.guest,
        &Submission {
            argument: 5,
            ..of(Opcode::CANCEL, 6)
        },
    );
    assert_eq!(turn(&mut bed), [Output::Cancel(fetched.token)]);
    assert_eq!(
        ring.take(&bed.guest)
            .map(|completion| (completion.tag, completion.result)),
        Some((6, 1))
    );
    complete(&mut bed, &fetched, Answer::failed(Status::CANCELLED), &[], false);
    assert_eq!(status(ring.take(&bed.guest)), Some((5, Status::CANCELLED)));
}

#[test]
fn buffer_lists_are_read_in_pieces_and_bounded() {
    for by_messages in [false, true] {
        let mut bed = bed();
        let mut ring = open(&mut bed, Mode::FILE);
        if by_messages {
            bed.memory.set_by_messages(true);
            bed.enable(&mut ring);
            turn(&mut bed);
        }
        let entries = 300u64;
        for n in 0..entries {
            bed.guest.store_u64(DATA + 16 * n, 0x9_0000 + 16 * n);
            bed.guest.store_u64(DATA + 16 * n + 8, 3);
            bed.guest.write(0x9_0000 + 16 * n, &[b'a' + (n % 26) as u8; 3]);
        }
        let list = Submission {
            flags: flag::LIST,
            buffer: DATA,
            length: 3 * entries,
            list_entries: entries as u32,
            meta_bytes: 4,
            ..of(Opcode::STAT, 1)
        };
        let submit = |bed: &mut PlainBed, ring: &mut RingPlan, submission: &Submission| {
            ring.submit(&bed.guest, submission);
            bed.front.ring_doorbell(0, ring.tail);
            bed.touch();
            turn(bed)
        };
        let fetched = submission(&submit(&mut bed, &mut ring, &list));
        assert_eq!(fetched.meta, b"aaab");
        let Some(Buffer::Guest { segments, bytes }) = bed.rings.buffer(fetched.token) else {
            panic!("a buffer");
        };
        assert_eq!((bytes, segments.len()), (896, 299));
        assert_eq!(
            segments[0],
            Segment {
                iova: 0x9_0011,
                bytes: 2
            }
        );
        complete(&mut bed, &fetched, Answer::ok(0), b"ABCDE", false);
        turn(&mut bed);
        assert_eq!(status(ring.take(&bed.guest)), Some((1, Status::OK)));
        let mut there = [0; 20];
        bed.guest.read(0x9_0010, &mut there);
        assert_eq!((&there[..3], &there[16..19]), (&b"bAB"[..], &b"CDE"[..]));

        let bad = [
            Submission {
                length: 3 * entries + 1,
                ..list
            },
            Submission {
                length: 3 * entries - 1,
                ..list
            },
            Submission {
                list_entries: 299,
                ..list
            },
        ];
        for submission in bad {
            assert_eq!(submit(&mut bed, &mut ring, &submission), []);
            assert_eq!(
                status(ring.take(&bed.guest)),
                Some((1, Status::BAD_ARGUMENT)),
                "{submission:?}"
            );
        }
        bed.guest.store_u64(DATA + 16 * 150 + 8, 0);
        assert_eq!(
            submit(&mut bed, &mut ring, &Submission { length: 897, ..list }),
            []
        );
        assert_eq!(
            status(ring.take(&bed.guest)),
            Some((1, Status::BAD_ARGUMENT)),
            "a piece of length 0"
        );
        bed.guest.store_u64(DATA + 16 * 150 + 8, u64::MAX);
        assert_eq!(submit(&mut bed, &mut ring, &list), []);
        assert_eq!(
            status(ring.take(&bed.guest)),
            Some((1, Status::BAD_ARGUMENT)),
            "sums that overflow"
        );
        assert_eq!(bed.rings.in_flight(), 0);
    }
}

#[test]
fn nothing_is_fetched_without_a_free_completion_slot() {
    let mut bed = bed();
    let mut ring = RingPlan::new(0, 0, 64, 4, 0);
    bed.enable(&mut ring);
    for tag in 0..10 {
        ring.submit(&bed.guest, &of(Opcode::NOOP, tag));
    }
    assert!(!bed.poll(64).more);
    assert_eq!(bed.guest.load_u32(event_offset::SUBMISSION_HEAD), 4);
    let first = bed
        .rings
        .poll_timeout()
        .expect("a stalled ring is looked at again");
    assert!(first > bed.now);
    bed.now = first;
    bed.rings
        .handle_timeout(bed.now, &bed.front, &bed.core, &mut bed.memory);
    let second = bed.rings.poll_timeout().unwrap();
    assert!(
        second.since_ns(first) >= first.since_ns(Tick(1_000_000)),
        "ever more seldom"
    );
    for tag in 0..10 {
        assert_eq!(status(ring.take(&bed.guest)), Some((tag, Status::OK)));
        bed.poll(64);
    }
    assert_eq!(bed.rings.poll_timeout(), None);
}

#[test]
fn event_words_spare_wake_ups_and_lose_none() {
    let mut bed = bed();
    let mut ring = open(&mut bed, Mode::COMMON);
    assert!(bed.arm(), "nobody has looked yet");
    assert_eq!(turn(&mut bed), []);
    assert!(!bed.arm());
    assert!(
        ring.submit(&bed.guest, &of(Opcode::NOOP, 1)),
        "armed: the doorbell is wanted"
    );
    assert!(!ring.submit(&bed.guest, &of(Opcode::NOOP, 2)), "busy: it is not");
    assert!(bed.arm(), "work that came before arming is seen");
    bed.poll(64);
    bed.end_turn();
    assert_eq!(bed.outputs(), [Output::Signal { vector: 0 }], "one for both");
    // The guest waits for the fourth completion only.
    bed.guest.store_u32(event_offset::COMPLETION_EVENT, 3);
    ring.submit(&bed.guest, &of(Opcode::NOOP, 3));
    bed.poll(64);
    bed.end_turn();
    assert_eq!(bed.outputs(), []);
    ring.submit(&bed.guest, &of(Opcode::NOOP, 4));
    bed.poll(64);
    bed.end_turn();
    assert_eq!(bed.outputs(), [Output::Signal { vector: 0 }]);
    bed.end_turn();
    assert_eq!(bed.outputs(), []);
    assert_eq!(bed.rings.counters().signals_spared, 1);
    bed.front.set_features(0);
    bed.touch();
    ring.submit(&bed.guest, &of(Opcode::NOOP, 5));
    bed.poll(64);
    bed.end_turn();
    assert_eq!(
        bed.outputs(),
        [Output::Signal { vector: 0 }],
        "a driver without event words is always signalled"
    );
}

#[test]
fn intx_is_raised_in_the_core_page() {
    let mut bed = bed();
    bed.front.set_interrupts(Interrupts::Intx);
    bed.front.set_ack(0, 41);
    bed.replace_core(PlainWords::new).unwrap();
    bed.touch();
    let mut ring = open(&mut bed, Mode::COMMON);
    assert_eq!(bed.core.raise(0), 41, "nothing is pending");
    ring.submit(&bed.guest, &of(Opcode::NOOP, 1));
    bed.poll(64);
    bed.end_turn();
    assert!(bed.outputs().contains(&Output::Kick));
    assert_eq!(bed.core.raise(0), 42);
}

#[test]
fn a_broken_ring_fails_the_device_and_a_reset_heals_it() {
    let mut bed = bed();
    let mut ring = open(&mut bed, Mode::CHAT);
    ring.submit(
        &bed.guest,
        &Submission {
            buffer: DATA,
            length: 64,
            ..of(Opcode::RECEIVE, 5)
        },
    );
    let fetched = submission(&turn(&mut bed));
    bed.guest.store_u32(event_offset::SUBMISSION_TAIL, 1000);
    let outputs = turn(&mut bed);
    let closed = Output::ChannelClosed {
        session: 7,
        channel: Channel::Ring(0),
    };
    assert_eq!(outputs, [closed]);
    assert_eq!(
        bed.core.state(1),
        Some((DeviceState::FAILED, Status::BAD_ARGUMENT))
    );
    assert_eq!(bed.core.open_answer(0).state, RingState::REFUSED);
    complete(&mut bed, &fetched, Answer::ok(0), b"late", true);
    assert_eq!(
        bed.outputs(),
        [Output::Published {
            token: fetched.token,
            published: false
        }]
    );
    let mut there = [0; 4];
    bed.guest.read(DATA, &mut there);
    assert_eq!(there, [0; 4], "no late DMA");
    bed.enable(&mut ring);
    assert_eq!(
        (bed.core.open_answer(0).state, bed.core.open_answer(0).status),
        (RingState::REFUSED, Status::NOT_READY)
    );
    bed.replace_core(PlainWords::new).unwrap();
    bed.touch();
    assert_eq!(
        bed.core.state(1),
        Some((DeviceState::FAILED, Status::BAD_ARGUMENT)),
        "the next core says so too"
    );
    bed.outputs();
    bed.front.set_generation(2);
    bed.touch();
    assert_eq!(bed.outputs(), [Output::Reset { session: 7 }]);
    bed.end_turn();
    let mut ring = open(&mut bed, Mode::CHAT);
    ring.submit(&bed.guest, &of(Opcode::NOOP, 1));
    turn(&mut bed);
    assert_eq!(status(ring.take(&bed.guest)), Some((1, Status::OK)));
    assert_eq!(bed.core.state(2), Some((DeviceState::ACTIVE, Status::OK)));
}

#[test]
fn a_head_beyond_what_was_published_fails_the_device() {
    let mut bed = bed();
    let mut ring = RingPlan::new(0, 0, 64, 4, 0);
    bed.enable(&mut ring);
    bed.guest.store_u32(event_offset::COMPLETION_HEAD, 1);
    for tag in 0..10 {
        ring.submit(&bed.guest, &of(Opcode::NOOP, tag));
    }
    bed.poll(64);
    bed.guest.store_u32(event_offset::COMPLETION_HEAD, 9);
    bed.poll(64);
    assert_eq!(
        bed.core.state(1),
        Some((DeviceState::FAILED, Status::BAD_ARGUMENT))
    );
}

#[test]
fn a_closed_ring_forgets_everything() {
    let mut bed = bed();
    let mut ring = open(&mut bed, Mode::CHAT);
    ring.submit(
        &bed.guest,
        &Submission {
            buffer: DATA,
            length: 64,
            ..of(Opcode::RECEIVE, 5)
        },
    );
    let old = submission(&turn(&mut bed));
    bed.enable(&mut ring);
    let closed = Output::ChannelClosed {
        session: 7,
        channel: Channel::Ring(0),
    };
    assert_eq!(bed.outputs(), [closed]);
    ring.submit(
        &bed.guest,
        &Submission {
            buffer: DATA,
            length: 64,
            ..of(Opcode::RECEIVE, 6)
        },
    );
    let new = submission(&turn(&mut bed));
    assert_ne!(old.token, new.token);
    complete(&mut bed, &old, Answer::ok(0), &[], false);
    assert_eq!(bed.rings.buffer(old.token), None);
    assert_eq!(ring.take(&bed.guest), None);
    complete(&mut bed, &new, Answer::ok(0), &[], false);
    assert_eq!(status(ring.take(&bed.guest)), Some((6, Status::OK)));
}

#[test]
fn a_buffer_that_is_gone_is_a_status() {
    let mut bed = bed();
    let mut ring = open(&mut bed, Mode::CHAT);
    ring.submit(
        &bed.guest,
        &Submission {
            buffer: DATA,
            length: 64,
            ..of(Opcode::RECEIVE, 5)
        },
    );
    let fetched = submission(&turn(&mut bed));
    bed.memory.set_regions(vec![FlatRegion {
        iova: 0,
        bytes: DATA,
        readable: true,
        writable: true,
        number: 0,
    }]);
    complete(&mut bed, &fetched, Answer::ok(4), b"data", true);
    assert_eq!(
        turn(&mut bed),
        [Output::Published {
            token: fetched.token,
            published: false
        }]
    );
    assert_eq!(status(ring.take(&bed.guest)), Some((5, Status::BAD_ADDRESS)));
    bed.memory.set_regions(vec![FlatRegion {
        iova: 0,
        bytes: 0x1000,
        readable: true,
        writable: true,
        number: 0,
    }]);
    ring.submit(&bed.guest, &of(Opcode::NOOP, 6));
    bed.poll(1);
    assert_eq!(
        bed.core.state(1),
        Some((DeviceState::FAILED, Status::BAD_ADDRESS)),
        "the ring itself is gone"
    );
}

#[test]
fn quiet_loses_nothing() {
    let mut bed = bed();
    let mut ring = open(&mut bed, Mode::CHAT);
    ring.submit(
        &bed.guest,
        &Submission {
            buffer: DATA,
            length: 64,
            ..of(Opcode::RECEIVE, 5)
        },
    );
    let fetched = submission(&turn(&mut bed));
    for by_control in [true, false] {
        if by_control {
            bed.front.set_control(0);
        } else {
            bed.memory.set_quiet(true);
        }
        ring.submit(&bed.guest, &of(Opcode::NOOP, 6 + u32::from(by_control)));
        if by_control {
            complete(&mut bed, &fetched, Answer::ok(4), b"data", false);
        }
        assert_eq!(turn(&mut bed), []);
        assert_eq!(ring.take(&bed.guest), None);
        bed.front.set_control(control::BUS_MASTER);
        bed.memory.set_quiet(false);
        bed.touch();
        turn(&mut bed);
        assert_eq!(
            std::iter::from_fn(|| ring.take(&bed.guest)).count(),
            1 + usize::from(by_control)
        );
    }
}

#[test]
fn set_ups_that_cannot_be_are_refused_with_their_cause() {
    let mut bed = bed();
    let good = RingPlan::new(1, 0x2_0000, 64, 64, 0);
    let mut refused = |change: &dyn Fn(&mut RingPlan)| {
        let mut plan = good;
        change(&mut plan);
        bed.enable(&mut plan);
        // The hub hears first that the one before is closed.
        turn(&mut bed);
        let answer = bed.core.open_answer(1);
        assert_eq!(answer.epoch, plan.setup.epoch);
        (answer.state == RingState::REFUSED).then_some(answer.status)
    };
    assert_eq!(refused(&|_| {}), None);
    assert_eq!(refused(&|plan| plan.setup.mode = 3), Some(Status::NOT_SUPPORTED));
    assert_eq!(refused(&|plan| plan.setup.mode = 77), Some(Status::BAD_ARGUMENT));
    assert_eq!(
        refused(&|plan| plan.setup.submissions = 1 << 40),
        Some(Status::BAD_ADDRESS)
    );
    assert_eq!(
        refused(&|plan| plan.setup.events = (1 << 20) - 64),
        Some(Status::BAD_ADDRESS)
    );
    assert_eq!(
        refused(&|plan| plan.setup.submission_entries = 63),
        Some(Status::BAD_ARGUMENT)
    );
    let mut plan = good;
    bed.enable(&mut plan);
    bed.guest.store_u64(plan.setup.events + event_offset::NONCE, 1);
    bed.front.set_ring(1, &plan.setup);
    bed.touch();
    turn(&mut bed);
    assert_eq!(bed.core.open_answer(1).status, Status::INTEGRITY);
}

#[test]
fn the_hosts_page_is_written_and_goes_on_in_the_next_life() {
    let mut bed = bed();
    let read = |bed: &PlainBed| [0, 8, 16, 24].map(|offset| bed.guest.load_u64(0x4_0000 + offset));
    bed.front.set_host_page(0x4_0000);
    bed.touch();
    assert_eq!(read(&bed), [2, 1, 0, 0]);
    bed.handle(Input::HostPage(HostFacts {
        throttled_ns: 5,
        granted_cpu_milli: 6,
        granted_memory_bytes: 7,
    }));
    assert_eq!(read(&bed), [4, 1, 5, 6]);
    let saved = bed.rings.save();
    bed.replace_core(PlainWords::new).unwrap();
    bed.rings.restore(&saved).unwrap();
    bed.touch();
    assert_eq!(read(&bed), [6, 2, 5, 6]);
    bed.front.set_host_page(0x4_0008);
    bed.touch();
    assert_eq!(bed.rings.counters().host_page_errors, 1);
}

fn port(bed: &mut PlainBed, sequence: u64, mode: Mode, submission: &Submission, input: &[u8]) {
    let mut bytes = submission.as_bytes().to_vec();
    bytes.extend_from_slice(input);
    bed.front.submit_port(&PortSubmission {
        sequence: (1 << 32) | sequence,
        mode: mode.0,
        bytes,
    });
    bed.touch();
}

fn port_result(bed: &PlainBed, sequence: u64) -> Option<(Completion, Vec<u8>)> {
    let result = bed.core.port_result((1 << 32) | sequence)?;
    let (completion, output) = Completion::read_from_prefix(&result).unwrap();
    Some((completion, output.to_vec()))
}

#[test]
fn the_port_window_does_the_same_without_dma() {
    let mut bed = bed();
    bed.front.set_control(0);
    let echo = Submission {
        length: 8,
        meta_bytes: 4,
        ..of(Opcode::ECHO, 1)
    };
    port(&mut bed, 1, Mode::COMMON, &echo, b"echo");
    let (completion, output) = port_result(&bed, 1).unwrap();
    assert_eq!(
        (completion.tag, completion.result, output.as_slice()),
        (1, 4, &b"echo"[..])
    );
    assert!(bed.outputs().contains(&Output::Kick));

    let read = Submission {
        length: 8000,
        handle: 3,
        ..of(Opcode::READ, 2)
    };
    port(&mut bed, 2, Mode::FILE, &read, &[]);
    let mut outputs = bed.outputs();
    assert_eq!(
        outputs.remove(0),
        Output::ChannelClosed {
            session: 7,
            channel: Channel::Port
        }
    );
    let fetched = submission(&outputs);
    assert_eq!(fetched.data_bytes, 4096, "more could not be given back");
    assert!(bed.rings.port_write(fetched.token, 2, b"cd"));
    assert!(!bed.rings.port_write(fetched.token, 4095, b"cd"));
    complete(&mut bed, &fetched, Answer::ok(4), b"ab", true);
    let (completion, output) = port_result(&bed, 2).unwrap();
    assert_eq!((completion.tag, output.as_slice()), (2, &b"abcd"[..]));
    bed.touch();
    assert_eq!(bed.outputs(), [Output::Kick], "not delivered yet");
    // A new core publishes it again, until the front has taken it.
    bed.replace_core(PlainWords::new).unwrap();
    bed.touch();
    assert_eq!(port_result(&bed, 2).unwrap().1, b"abcd");
    bed.front.set_port_taken((1 << 32) | 2);
    bed.touch();
    assert!(bed.outputs().contains(&Output::Published {
        token: fetched.token,
        published: true
    }));

    port(&mut bed, 3, Mode::FILE, &read, &[]);
    let fetched = submission(&bed.outputs());
    bed.replace_core(PlainWords::new).unwrap();
    bed.touch();
    let again = submission(&bed.outputs());
    assert_eq!(
        again,
        Fetched {
            again: true,
            ..fetched.clone()
        }
    );
    bed.front.submit_port(&PortSubmission {
        sequence: (1 << 32) | 4,
        mode: 1,
        bytes: vec![],
    });
    bed.touch();
    assert_eq!(bed.outputs(), [Output::Void(fetched.token)]);
    complete(&mut bed, &fetched, Answer::ok(4), b"ab", false);
    assert_eq!(bed.rings.counters().stale_answers, 1);

    bed.front.submit_port(&PortSubmission {
        sequence: (1 << 32) | 5,
        mode: 1,
        bytes: vec![1; 63],
    });
    bed.touch();
    assert_eq!(port_result(&bed, 5).unwrap().0.status, Status::BAD_ARGUMENT.0);
}

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
