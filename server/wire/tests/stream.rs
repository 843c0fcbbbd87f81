//! Any cut of the stream gives the same requests, and saving and restoring at any step is invisible.

#![allow(clippy::unwrap_used, clippy::panic)] // a test's own helper may fail the test

mod support;
use proptest::prelude::*;
use support::*;
use vmgmt_wire::*;

#[derive(Clone, Debug)]
struct Sent {
    bytes: Vec<u8>,
    fds: Vec<u32>,
}

/// Honest, wrong and senseless messages, alike in proportion.
fn any_message() -> impl Strategy<Value = Sent> {
    let fds = prop_oneof![3 => Just(0usize), 2 => Just(1), 1 => 0usize..4];
    let flags = prop_oneof![6 => Just(0u32), 2 => Just(0x10), 1 => Just(1u32), 1 => any::<u32>()];
    let body = prop_oneof![
        Just((2u16, dma_map_body(3, 0, 0x1000, 0x1000))),
        Just((2, dma_map_body(9, 0, 0x1000, 0x1000))),
        Just((3, dma_unmap_body(0, 0x1000, 0x1000))),
        Just((4, words(&[16, 0, 0, 0]))),
        Just((5, region_info_body(32, 7))),
        (0u32..4).prop_map(|count| (8, words(&[20, 0x24, 1, 0, count]))),
        Just((8, words(&[20, 0x21, 1, 0, 0]))),
        (1u32..64).prop_map(|count| (9, region_body(0, 8, count, &[]))),
        (1u32..600).prop_map(|count| (10, region_body(0, 8, count, &vec![7; count as usize]))),
        Just((15, multi_body(&[(0, 0, 4), (0, 8, 8)]))),
        Just((13, vec![])),
        (any::<u16>(), proptest::collection::vec(any::<u8>(), 0..40)),
    ];
    (any::<u16>(), body, flags, fds).prop_map(|(id, (command, body), flags, fds)| Sent {
        bytes: message(id, command, flags, &body),
        fds: vec![0; fds],
    })
}

/// A whole conversation: VERSION (mostly), then anything, now and then a header that loses step.
fn conversation() -> impl Strategy<Value = Vec<Sent>> {
    let version = prop_oneof![
        8 => Just(message(0, 1, 0, &version_body(0, Some(QEMU_CAPABILITIES)))),
        1 => Just(message(0, 1, 0, &version_body(1, None))),
        1 => Just(message(0, 13, 0, &[])),
    ];
    let broken = prop_oneof![9 => Just(None), 1 => (0u32..16).prop_map(Some)];
    (version, proptest::collection::vec(any_message(), 0..24), broken).prop_map(
        |(version, messages, broken)| {
            let mut all = vec![Sent {
                bytes: version,
                fds: vec![],
            }];
            all.extend(messages);
            if let Some(claimed) = broken {
                let mut bytes = message(1, 13, 0, &[]);
                bytes[4..8].copy_from_slice(&claimed.to_le_bytes());
                all.push(Sent { bytes, fds: vec![0] });
            }
            let mut next = 0;
            for sent in &mut all {
                for fd in &mut sent.fds {
                    *fd = next;
                    next += 1;
                }
            }
            all
        },
    )
}

/// What an observer sees: events (descriptors to close apart, since a read decides when they are told of)
/// and the bytes that were sent.
#[derive(Debug, PartialEq)]
struct Seen {
    events: Vec<Event>,
    closed: Vec<FdSlot>,
    output: Vec<u8>,
    phase: Phase,
    counters: Counters,
}

fn save_and_restore(connection: Connection) -> Connection {
    let text = serde_json::to_string(&connection.save()).unwrap();
    let restored = Connection::restore(serde_json::from_str(&text).unwrap()).unwrap();
    assert_eq!(restored.save(), connection.save());
    restored
}

fn run(conversation: &[Sent], reads: &[usize], handovers: bool) -> Seen {
    let mut kernel = KernelModel::default();
    for sent in conversation {
        kernel.send(&sent.bytes, &sent.fds);
    }
    let mut connection = Connection::new();
    let mut seen = Seen {
        events: vec![],
        closed: vec![],
        output: vec![],
        phase: Phase::Failed,
        counters: Counters::default(),
    };
    let mut sizes = reads.iter().copied().cycle();
    let mut cookie = 0;
    loop {
        let (bytes, slots) = kernel.read(sizes.next().unwrap());
        if bytes.is_empty() {
            break;
        }
        connection.handle_read(&bytes, slots, false);
        loop {
            if handovers {
                connection = save_and_restore(connection);
            }
            let Some(event) = connection.poll_event() else {
                break;
            };
            if handovers {
                connection = save_and_restore(connection);
            }
            match &event {
                Event::CloseDescriptor(slot) => {
                    seen.closed.push(*slot);
                    continue;
                }
                Event::Request(Request {
                    handle,
                    command: Command::Version(_),
                }) => {
                    connection
                        .accept_version(handle, &ServerOffer::default())
                        .unwrap();
                }
                Event::Request(request) => {
                    let _ = connection.reply(&request.handle, &answer(request));
                    // Our own requests go out between the replies.
                    cookie += 1;
                    let _ = connection.send_dma_read(cookie << 12, 16, cookie);
                }
                _ => {}
            }
            seen.events.push(event);
            // Send in pieces, handing over in the middle of messages too.
            let mut piece = 1;
            while let Some(pending) = connection.pending_output() {
                let step = pending.bytes.len().min(piece);
                seen.output.extend_from_slice(&pending.bytes[..step]);
                connection.advance_output(step);
                piece += 7;
                if handovers {
                    connection = save_and_restore(connection);
                }
            }
        }
    }
    seen.closed.extend(connection.take_descriptors());
    seen.closed.sort();
    seen.phase = connection.phase();
    seen.counters = Counters {
        descriptors_refused: 0,
        ..connection.counters()
    };
    seen
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn any_cut_of_the_stream_gives_the_same(
        conversation in conversation(),
        reads in proptest::collection::vec(prop_oneof![1usize..20, 1usize..2000], 1..30),
    ) {
        let whole = run(&conversation, &[usize::MAX], false);
        prop_assert_eq!(&run(&conversation, &reads, false), &whole);
        prop_assert_eq!(&run(&conversation, &[1], false), &whole);
    }

    #[test]
    fn a_hand_over_at_any_step_is_invisible(
        conversation in conversation(),
        reads in proptest::collection::vec(prop_oneof![1usize..20, 1usize..2000], 1..30),
    ) {
        prop_assert_eq!(&run(&conversation, &reads, true), &run(&conversation, &reads, false));
    }

    #[test]
    fn no_descriptor_is_forgotten(
        conversation in conversation(),
        reads in proptest::collection::vec(1usize..200, 1..30),
    ) {
        let seen = run(&conversation, &reads, false);
        let mut slots = seen.closed;
        for event in &seen.events {
            match event {
                Event::Request(Request { command: Command::DmaMap(map), .. }) => slots.extend(map.descriptor),
                Event::Request(Request { command: Command::DeviceSetIrqs(set), .. }) => {
                    if let IrqOperation::Assign { eventfds, .. } = &set.operation {
                        slots.extend(eventfds);
                    }
                }
                _ => {}
            }
        }
        slots.sort();
        let sent: Vec<FdSlot> = conversation.iter().flat_map(|sent| sent.fds.iter().copied().map(FdSlot)).collect();
        prop_assert_eq!(slots, sent);
    }

    #[test]
    fn senseless_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..4000), negotiated: bool) {
        let mut connection = if negotiated { ready() } else { Connection::new() };
        connection.handle_read(&bytes, vec![FdSlot(0)], false);
        while connection.poll_event().is_some() {}
    }
}

#[test]
fn descriptors_beyond_all_measure_are_bounded() {
    let mut connection = ready();
    let long = message(1, 10, 0, &region_body(0, 0, 1 << 20, &vec![0; 1 << 20]));
    let (mut sent, mut closed) = (0u32, 0u32);
    for byte in &long[..5000] {
        connection.handle_read(&[*byte], (0..253).map(|fd| FdSlot(sent + fd)).collect(), false);
        sent += 253;
        while let Some(Event::CloseDescriptor(_)) = connection.poll_event() {
            closed += 1;
        }
        assert!((sent - closed) as usize <= limits::QUEUED_DESCRIPTORS_MAX);
    }
    connection.handle_read(&long[5000..], Vec::new(), false);
    assert!(matches!(
        connection.poll_event(),
        Some(Event::Refused { command: 10, .. })
    ));
    while let Some(Event::CloseDescriptor(_)) = connection.poll_event() {
        closed += 1;
    }
    assert_eq!(sent, closed);
}

#[test]
fn a_saved_state_is_checked() {
    let mut connection = ready();
    connection.send_dma_read(0, 4, 1).unwrap();
    let held = request(&mut connection, 13, 0, &[], &[]);
    assert!(!held.handle.no_reply);
    let good = serde_json::to_value(connection.save()).unwrap();
    let restore = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut value = good.clone();
        change(&mut value);
        serde_json::from_value::<SavedConnection>(value)
            .map_err(|_| ())
            .and_then(|saved| {
                Connection::restore(saved)
                    .map(|_| ())
                    .map_err(|error| assert!(!error.to_string().is_empty()))
            })
    };
    assert_eq!(restore(&|_| {}), Ok(()));
    assert!(restore(&|saved| saved["negotiated"] = serde_json::Value::Null).is_err());
    assert!(restore(&|saved| saved["phase"] = "VersionProposed".into()).is_err());
    assert!(restore(&|saved| saved["owed"] = serde_json::json!([99])).is_err());
    assert!(restore(&|saved| saved["output"][0]["sent"] = 32.into()).is_err());
    assert!(restore(&|saved| saved["outstanding"]["0"]["range"] = serde_json::json!([5, 0])).is_err());
    assert!(restore(&|saved| saved["negotiated"]["dma_message_bytes_max"] = u32::MAX.into()).is_err());
    assert!(restore(&|saved| saved["input_bytes"] = vec![0u8; limits::INPUT_BYTES_MAX + 1].into()).is_err());
}
