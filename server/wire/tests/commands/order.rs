//! Whatever the command: headers, answers, and who waits.

use crate::support::*;
use vmgmt_wire::*;

#[test]
fn commands_a_server_does_not_take() {
    let mut c = ready();
    for command in [0, 11, 12, 14, 17, 18, 19, u16::MAX] {
        let refusal = refused(&mut c, command, &[1, 2, 3], &[4, 5], Errno::EOPNOTSUPP);
        assert_eq!(refusal, Refusal::Command(command));
    }
}

#[test]
fn bad_headers_that_keep_step() {
    let mut c = ready();
    for flags in [2, 0xf, 0x20, 0x40, 1 << 31] {
        let refusal = refused_raw(&mut c, message(7, 13, flags, &[]), &[], Errno::EINVAL);
        assert!(
            matches!(refusal, Refusal::MessageType(_) | Refusal::HeaderReserved),
            "{refusal}"
        );
    }
    let mut with_error = message(7, 13, 0, &[]);
    with_error[12] = 1;
    assert_eq!(
        refused_raw(&mut c, with_error, &[], Errno::EINVAL),
        Refusal::HeaderReserved
    );
}

#[test]
fn bad_headers_that_lose_step_end_the_connection() {
    for (claimed, ready_first) in [
        (0u32, true),
        (15, true),
        (16 + 32 + (1 << 20) + 1, true),
        (u32::MAX, true),
        (20_000, false),
    ] {
        let mut c = if ready_first { ready() } else { Connection::new() };
        let mut bytes = message(9, 13, 0, &[]);
        bytes[4..8].copy_from_slice(&claimed.to_le_bytes());
        c.handle_read(&bytes, vec![FdSlot(3)], false);
        let mut events: Vec<Event> = std::iter::from_fn(|| c.poll_event()).collect();
        events.sort_by_key(|event| matches!(event, Event::Failed(_)));
        let [Event::CloseDescriptor(FdSlot(3)), Event::Failed(error)] = &events[..] else {
            panic!("{events:?}")
        };
        assert!(
            matches!(error, FatalError::TooShort { .. } | FatalError::TooLong { .. }),
            "{error}"
        );
        assert!(c.should_close() && !c.wants_read());
        c.handle_read(&message(1, 13, 0, &[]), vec![FdSlot(4)], false);
        assert_eq!(c.poll_event(), Some(Event::CloseDescriptor(FdSlot(4))));
        assert_eq!(c.poll_event(), None, "told once");
    }
}

#[test]
fn a_request_is_answered_once() {
    let mut c = ready();
    let got = request(&mut c, 13, 0, &[], &[]);
    let region = Reply::RegionIoFds { region: 0 };
    assert_eq!(c.reply(&got.handle, &region), Err(ReplyRefused::Mismatch));
    assert_eq!(c.replies_owed(), 1);
    c.reply(&got.handle, &Reply::Done).unwrap();
    assert_eq!(c.reply(&got.handle, &Reply::Done), Err(ReplyRefused::NotOwed));
    assert_eq!(
        c.reply(&got.handle, &Reply::Error(Errno::EIO)),
        Err(ReplyRefused::NotOwed)
    );
    assert_eq!(drain(&mut c), message(7, 13, 1, &[]));
    let late = request(&mut c, 13, 0, &[], &[]);
    assert!(c.forget_reply(&late.handle) && !c.forget_reply(&late.handle));
    assert_eq!(c.reply(&late.handle, &Reply::Done), Err(ReplyRefused::NotOwed));
    assert!(c.pending_output().is_none());
}

#[test]
fn a_client_that_does_not_read_waits_by_itself() {
    let mut c = ready();
    let read = message(1, 9, 0, &region_body(0, 0, 1 << 20, &[]));
    c.handle_read(&read.repeat(10), Vec::new(), false);
    let mut taken = 0;
    while let Some(Event::Request(request)) = c.poll_event() {
        taken += 1;
        c.reply(&request.handle, &answer(&request)).unwrap();
    }
    assert!(taken < 10 && !c.wants_read(), "{taken} answered");
    drain(&mut c);
    while let Some(Event::Request(request)) = c.poll_event() {
        taken += 1;
        c.reply(&request.handle, &answer(&request)).unwrap();
        drain(&mut c);
    }
    assert_eq!(taken, 10);
    assert!(c.wants_read());
}
