//! From a submission to its completion: what the hub is given, what the guest gets, buffers and what is wrong with them.

use crate::{DATA, PlainBed, bed, complete, of, open, status, submission, turn};
use vmgmt_abi::registers::{DeviceState, RingState};
use vmgmt_abi::ring::{event_offset, flag};
use vmgmt_abi::{Mode, Opcode, Status, Submission};
use vmgmt_device::rings::testing::{FlatRegion, RingPlan};
use vmgmt_device::rings::{Answer, Buffer, Fetched, Output, Segment};
use vmgmt_device::{GuestMemory, MemoryError, Tick};

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
fn what_was_read_of_a_buffer_for_a_submission_that_was_given_up_is_no_others() {
    let mut bed = bed();
    bed.memory.set_by_messages(true);
    let mut ring = RingPlan::new(0, 0, 64, 64, Mode::FILE.0);
    bed.enable(&mut ring);
    turn(&mut bed);
    const LIST: u64 = 0x9_0000;
    let buffers = [(DATA, 2000, 0), (DATA, 2000, 9), (LIST, 2000, 0), (LIST, 2000, 9)];
    for (tag, (buffer, length, meta_bytes)) in buffers.into_iter().enumerate() {
        let (old, new) = ([b'a' + tag as u8; 2000], [b'A' + tag as u8; 2000]);
        bed.guest.write(DATA, &old);
        bed.memory.forget_reads();
        // What a transfer, or a submission whose name that was, asked for and never took.
        let data = (DATA + meta_bytes, vec![0; (length - meta_bytes) as usize]);
        let mut given_up = [(DATA, vec![0; meta_bytes as usize]), data, (LIST, vec![0; 32])];
        for (at, into) in given_up.iter_mut().filter(|(_, into)| !into.is_empty()) {
            assert_eq!(bed.memory.read(*at, into), Err(MemoryError::Pending));
        }
        assert!(bed.memory.deliver());
        bed.guest.write(DATA, &new);
        let list = [DATA, 1000, DATA + 1000, 1000];
        for (n, word) in list.into_iter().enumerate() {
            bed.guest.store_u64(LIST + 8 * n as u64, word);
        }
        let is_list = buffer == LIST;
        let write = Submission {
            buffer,
            length,
            flags: if is_list { flag::LIST } else { 0 },
            list_entries: if is_list { 2 } else { 0 },
            meta_bytes: meta_bytes as u32,
            ..of(Opcode::STAT, tag as u32)
        };
        ring.submit(&bed.guest, &write);
        bed.front.ring_doorbell(0, ring.tail);
        bed.touch();
        let fetched = submission(&turn(&mut bed));
        assert_eq!(fetched.meta, new[..meta_bytes as usize], "{tag}");
        let [_, (at, mut into), _] = given_up;
        assert_eq!(
            bed.memory.read(at, &mut into),
            Err(MemoryError::Pending),
            "{tag}: an old answer"
        );
        assert!(bed.memory.deliver());
        assert_eq!(bed.memory.read(at, &mut into), Ok(()));
        assert!(into == new[..into.len()]);
        complete(&mut bed, &fetched, Answer::ok(0), &[], false);
        turn(&mut bed);
    }
}

#[test]
fn a_batch_that_was_asked_for_is_waited_for_though_less_is_wanted_meanwhile() {
    let mut bed = bed();
    bed.memory.set_by_messages(true);
    let mut ring = RingPlan::new(0, 0, 16, 16, Mode::FILE.0);
    bed.enable(&mut ring);
    turn(&mut bed);
    let mut expected = Vec::new();
    let mut found = Vec::new();
    for round in 0..16 {
        for tag in [2 * round, 2 * round + 1] {
            assert!(ring.room(&bed.guest) > 0);
            ring.submit(&bed.guest, &of(Opcode::STAT, tag));
            expected.push(tag);
        }
        bed.front.ring_doorbell(0, ring.tail);
        bed.touch();
        let mut given = Vec::new();
        // Another ring took most of each second turn's share.
        for budget in [2, 1].into_iter().cycle().take(24) {
            bed.poll(budget);
            given.extend(bed.outputs().into_iter().filter_map(|output| match output {
                Output::Submission(fetched) => Some(*fetched),
                _ => None,
            }));
            bed.end_turn();
            bed.memory.deliver();
        }
        for fetched in given {
            found.push(fetched.tag);
            complete(&mut bed, &fetched, Answer::ok(0), &[], false);
        }
        turn(&mut bed);
        while ring.take(&bed.guest).is_some() {}
    }
    assert_eq!(found, expected);
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
