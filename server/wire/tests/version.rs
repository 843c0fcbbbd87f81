//! Negotiation: what is taken, what is refused, and how long the answer is.

#![allow(clippy::unwrap_used, clippy::panic)] // a test's own helper may fail the test

mod support;
use support::*;
use vmgmt_wire::*;

fn propose(body: &[u8]) -> (Connection, Option<Event>) {
    let mut c = Connection::new();
    c.handle_read(&message(3, 1, 0, body), Vec::new(), false);
    let event = c.poll_event();
    (c, event)
}

fn accepted(json: Option<&str>, offer: &ServerOffer) -> (Negotiated, Vec<u8>) {
    let (mut c, event) = propose(&version_body(0, json));
    let Some(Event::Request(Request {
        handle,
        command: Command::Version(_),
    })) = event
    else {
        panic!("{json:?} gave {event:?}")
    };
    let negotiated = c.accept_version(&handle, offer).unwrap();
    assert_eq!(
        c.accept_version(&handle, offer),
        Err(ReplyRefused::Mismatch),
        "once"
    );
    (negotiated, drain(&mut c))
}

fn json_of(reply: &[u8]) -> serde_json::Value {
    assert_eq!(&reply[..4], [3, 0, 1, 0]);
    assert_eq!(
        &reply[8..20],
        [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        "a reply, version 0.0"
    );
    assert_eq!(reply.last(), Some(&0));
    serde_json::from_slice(&reply[20..reply.len() - 1]).unwrap()
}

#[test]
fn qemu() {
    let offer = ServerOffer {
        max_dma_maps: u32::MAX,
        page_sizes: !4095,
        ..ServerOffer::default()
    };
    let (negotiated, reply) = accepted(Some(QEMU_CAPABILITIES), &offer);
    assert!(negotiated.write_multiple);
    assert_eq!(negotiated.dma_message_bytes_max, 60 * 1024);
    assert_eq!(
        message(3, 1, 0, &version_body(0, Some(QEMU_CAPABILITIES))).len(),
        214,
        "as QEMU 11.1 sends it"
    );
    assert!(
        reply.len() <= limits::VERSION_REPLY_BYTES_MAX,
        "{} bytes",
        reply.len()
    );
    let expected = serde_json::json!({"capabilities": {"max_msg_fds": 16, "max_data_xfer_size": 1048576,
        "max_dma_maps": 65535, "pgsizes": !4095u64, "write_multiple": true}});
    assert_eq!(json_of(&reply), expected);
}

#[test]
fn only_what_the_client_named_is_answered() {
    let (negotiated, reply) = accepted(None, &ServerOffer::default());
    assert_eq!(negotiated.client, ClientCapabilities::default());
    assert!(!negotiated.write_multiple);
    assert_eq!(json_of(&reply), serde_json::json!({"capabilities": {}}));
    let offer = ServerOffer {
        max_dma_maps: 100,
        ..ServerOffer::default()
    };
    let (_, reply) = accepted(Some("{}"), &offer);
    assert_eq!(
        json_of(&reply),
        serde_json::json!({"capabilities": {"max_dma_maps": 100}}),
        "a limit is said"
    );
    let (negotiated, reply) = accepted(
        Some(
            r#"{"capabilities":{"max_data_xfer_size":4096,"write_multiple":false,"twin_socket":{"supported":true}}}"#,
        ),
        &ServerOffer::default(),
    );
    assert_eq!(negotiated.dma_message_bytes_max, 4096);
    assert!(negotiated.client.twin_socket && !negotiated.write_multiple);
    assert_eq!(
        json_of(&reply),
        serde_json::json!({"capabilities": {"max_data_xfer_size": 1048576}})
    );
}

#[test]
fn write_multi_needs_both_sides() {
    let offer = ServerOffer {
        write_multiple: false,
        ..ServerOffer::default()
    };
    let (mut c, event) = propose(&version_body(0, Some(QEMU_CAPABILITIES)));
    let Some(Event::Request(request)) = event else {
        panic!()
    };
    c.accept_version(&request.handle, &offer).unwrap();
    let reply = drain(&mut c);
    assert!(json_of(&reply)["capabilities"].get("write_multiple").is_none());
    assert_eq!(
        refused(&mut c, 15, &multi_body(&[(0, 0, 4)]), &[], Errno::EOPNOTSUPP),
        Refusal::Command(15)
    );
}

#[test]
fn refused_proposals() {
    let deep = format!("{{\"x\":{}1{}}}", "[".repeat(1000), "]".repeat(1000));
    let long = format!("{{\"x\":\"{}\"}}", "a".repeat(4090));
    let mut bodies: Vec<Vec<u8>> = vec![
        vec![],
        vec![0; 3],
        version_body(1, Some(QEMU_CAPABILITIES)),
        version_body(0, Some("")),
        version_body(0, Some("[]")),
        version_body(0, Some("{} {}")),
        version_body(0, Some("{}\0")),
        version_body(0, Some(r#"{"capabilities":[]}"#)),
        version_body(0, Some(r#"{"capabilities":{"max_msg_fds":-1}}"#)),
        version_body(0, Some(r#"{"capabilities":{"max_msg_fds":1.5}}"#)),
        version_body(0, Some(r#"{"capabilities":{"pgsizes":"4096"}}"#)),
        version_body(0, Some(r#"{"capabilities":{"write_multiple":1}}"#)),
        version_body(0, Some(r#"{"capabilities":{"twin_socket":[true]}}"#)),
        version_body(0, Some(&deep)),
        version_body(0, Some(&long)),
    ];
    let mut unterminated = version_body(0, Some("{}"));
    unterminated.pop();
    bodies.push(unterminated);
    bodies.push([&[0, 0, 0, 0][..], b"{\"a\":\"\xff\"}\0"].concat());
    for body in bodies {
        let (mut c, event) = propose(&body);
        let Some(Event::Refused { command: 1, refusal }) = event else {
            panic!("{body:?} gave {event:?}")
        };
        assert_eq!(c.phase(), Phase::Refused);
        assert!(!c.should_close(), "the error reply goes out first");
        let expected = [&[3, 0, 1, 0][..], &words(&[16, 0x21, refusal.errno().0])].concat();
        assert_eq!(drain(&mut c), expected, "{refusal}");
        assert!(c.should_close());
    }
}

#[test]
fn version_comes_first_and_once() {
    let mut c = Connection::new();
    for command in [2, 4, 13, 99] {
        assert_eq!(
            refused(&mut c, command, &[], &[6], Errno::EINVAL),
            Refusal::BeforeVersion(command)
        );
    }
    assert_eq!(c.send_dma_read(0, 1, 0), Err(DmaSendError::NotNegotiated));
    let first = request(&mut c, 1, 0, &version_body(0, None), &[]);
    assert_eq!(
        refused(&mut c, 1, &version_body(0, None), &[], Errno::EBUSY),
        Refusal::VersionAgain
    );
    c.accept_version(&first.handle, &ServerOffer::default()).unwrap();
    drain(&mut c);
    assert_eq!(
        refused(&mut c, 1, &version_body(0, None), &[], Errno::EBUSY),
        Refusal::VersionAgain
    );
    let mut c = Connection::new();
    c.handle_read(
        &message(1, 1, NO_REPLY, &version_body(0, None)),
        Vec::new(),
        false,
    );
    let refusal = Refusal::VersionPosted;
    assert_eq!(c.poll_event(), Some(Event::Refused { command: 1, refusal }));
    assert!(c.should_close());
    let mut c = Connection::new();
    refused(&mut c, 1, &version_body(0, None), &[5], Errno::EINVAL);
}

#[test]
fn admission_refused_by_the_front() {
    let (mut c, event) = propose(&version_body(0, Some(QEMU_CAPABILITIES)));
    let Some(Event::Request(request)) = event else {
        panic!()
    };
    c.reply(&request.handle, &Reply::Error(Errno::EPERM)).unwrap();
    assert_eq!(
        drain(&mut c),
        [&[3, 0, 1, 0][..], &words(&[16, 0x21, 1])].concat()
    );
    assert!(c.should_close() && c.phase() == Phase::Refused);
    assert_eq!(
        c.accept_version(&request.handle, &ServerOffer::default()),
        Err(ReplyRefused::Mismatch)
    );
}
