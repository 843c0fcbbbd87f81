//! Our own requests: encoded, matched, and refused when the answer is about something else.

#![allow(clippy::unwrap_used, clippy::panic)] // a test's own helper may fail the test

mod support;
use support::*;
use vmgmt_wire::*;

fn dma_body(iova: u64, count: u64, data: &[u8]) -> Vec<u8> {
    [&iova.to_le_bytes()[..], &count.to_le_bytes(), data].concat()
}

fn answer_with(c: &mut Connection, id: u16, command: u16, flags: u32, body: &[u8]) -> Option<Event> {
    c.handle_read(&message(id, command, flags, body), Vec::new(), false);
    c.poll_event()
}

fn result(event: Option<Event>) -> (u64, Result<DmaAnswer, DmaFailure>) {
    let Some(Event::DmaReply(reply)) = event else {
        panic!("{event:?}")
    };
    (reply.cookie, reply.result)
}

#[test]
fn read_and_write() {
    let mut c = ready();
    c.send_dma_read(0x1000, 4, 11).unwrap();
    c.send_dma_write(0x2000, &[1, 2, 3], 22).unwrap();
    let expected = [
        message(0, 11, 0, &dma_body(0x1000, 4, &[])),
        message(1, 12, 0, &dma_body(0x2000, 3, &[1, 2, 3])),
    ];
    assert_eq!(
        c.pending_output().unwrap().bytes,
        expected[0],
        "one message at a time"
    );
    assert_eq!(drain(&mut c), expected.concat());
    // Answers in another order; the one to a write with 64 and, below, with 32 bits of count.
    let written = answer_with(&mut c, 1, 12, 1, &dma_body(0x2000, 3, &[]));
    assert_eq!(result(written), (22, Ok(DmaAnswer::Written)));
    let read = answer_with(&mut c, 0, 11, 1, &dma_body(0x1000, 4, &[9, 8, 7, 6]));
    assert_eq!(result(read), (11, Ok(DmaAnswer::Read(vec![9, 8, 7, 6]))));
    c.send_dma_write(0x2000, &[1], 33).unwrap();
    assert_eq!(
        result(answer_with(&mut c, 2, 12, 1, &dma_body(0x2000, 1, &[])[..12])),
        (33, Ok(DmaAnswer::Written))
    );
    assert_eq!(c.dma_outstanding(), 0);
}

#[test]
fn answers_that_do_not_fit() {
    let malformed: [(u16, Vec<u8>); 9] = [
        (11, vec![]),
        (11, dma_body(0x1000, 4, &[1, 2, 3])),
        (11, dma_body(0x1000, 4, &[1, 2, 3, 4, 5])),
        (11, dma_body(0x1001, 4, &[1, 2, 3, 4])),
        (11, dma_body(0x1000, 5, &[1, 2, 3, 4])),
        (11, dma_body(0x1000, 3, &[1, 2, 3])),
        (11, dma_body(0x1000, u64::MAX, &[1, 2, 3, 4])),
        (12, dma_body(0x1000, 4, &[])),
        (4, dma_body(0x1000, 4, &[1, 2, 3, 4])),
    ];
    for (command, body) in malformed {
        let mut c = ready();
        c.send_dma_read(0x1000, 4, 1).unwrap();
        assert_eq!(
            result(answer_with(&mut c, 0, command, 1, &body)),
            (1, Err(DmaFailure::Malformed))
        );
    }
    for body in [
        vec![],
        dma_body(0x1000, 4, &[])[..11].to_vec(),
        dma_body(0x1000, 3, &[]),
        dma_body(0, 4, &[]),
        dma_body(0x1000, 4, &[0]),
    ] {
        let mut c = ready();
        c.send_dma_write(0x1000, &[0; 4], 1).unwrap();
        assert_eq!(
            result(answer_with(&mut c, 0, 12, 1, &body)),
            (1, Err(DmaFailure::Malformed))
        );
    }
}

#[test]
fn errors_of_the_client() {
    for (errno, told) in [(19, Errno::ENODEV), (0, Errno::EIO), (4711, Errno(4711))] {
        let mut c = ready();
        c.send_dma_read(0, 8, 5).unwrap();
        let mut bytes = message(0, 11, 0x21, &[]);
        bytes[12..16].copy_from_slice(&u32::to_le_bytes(errno));
        c.handle_read(&bytes, Vec::new(), false);
        assert_eq!(result(c.poll_event()), (5, Err(DmaFailure::Refused(told))));
    }
}

#[test]
fn unsolicited_replies_are_dropped_and_counted() {
    let mut c = ready();
    c.handle_read(
        &message(0, 11, 1, &dma_body(0, 4, &[0; 4])),
        vec![FdSlot(1)],
        false,
    );
    assert_eq!(c.poll_event(), Some(Event::CloseDescriptor(FdSlot(1))));
    assert_eq!(c.poll_event(), None);
    c.send_dma_read(0, 4, 1).unwrap();
    let good = message(0, 11, 1, &dma_body(0, 4, &[0; 4]));
    c.handle_read(&good.repeat(2), Vec::new(), false);
    assert!(matches!(c.poll_event(), Some(Event::DmaReply(_))));
    assert_eq!(c.poll_event(), None, "a second answer is one to nothing");
    assert_eq!(c.counters().replies_unsolicited, 2);
    assert_eq!(
        request(&mut c, 13, 0, &[], &[]).command,
        Command::DeviceReset,
        "in step"
    );
}

#[test]
fn bounds_of_what_is_sent() {
    let mut c = ready();
    let most = limits::DMA_MESSAGE_BYTES_MAX;
    assert_eq!(
        c.send_dma_read(0, most + 1, 0),
        Err(DmaSendError::TooLong {
            bytes: u64::from(most) + 1,
            bytes_max: most
        })
    );
    assert_eq!(c.send_dma_read(5, 0, 0), Err(DmaSendError::Range { iova: 5 }));
    assert_eq!(
        c.send_dma_write(u64::MAX, &[0; 2], 0),
        Err(DmaSendError::Range { iova: u64::MAX })
    );
    for cookie in 0..limits::DMA_OUTSTANDING_MAX as u64 {
        c.send_dma_read(0, most, cookie).unwrap();
    }
    assert_eq!(c.send_dma_read(0, 1, 9), Err(DmaSendError::TooManyOutstanding));
}

#[test]
fn a_fence_takes_back_what_is_unsent_and_gives_up_the_rest() {
    let mut c = ready();
    for cookie in 0..3 {
        c.send_dma_read(cookie * 4096, 4, cookie).unwrap();
    }
    let reset = request(&mut c, 13, 0, &[], &[]);
    c.reply(&reset.handle, &Reply::Done).unwrap();
    c.advance_output(5);
    assert_eq!(c.drop_unsent_dma(), [1, 2]);
    assert_eq!(c.abandon_dma(|cookie| cookie == 0), 1);
    assert_eq!(c.dma_outstanding(), 1, "an id stays taken until its answer comes");
    let sent = drain(&mut c);
    assert_eq!(
        sent.len(),
        32 - 5 + 16,
        "the begun message goes on whole, then the reply"
    );
    assert_eq!(answer_with(&mut c, 0, 11, 1, &dma_body(0, 4, &[0; 4])), None);
    assert_eq!(
        (c.counters().replies_late, c.dma_outstanding(), c.output_bytes()),
        (1, 0, 0)
    );
}

#[test]
fn ids_in_use_are_not_given_again() {
    let mut c = ready();
    c.send_dma_read(0, 4, 1).unwrap();
    for round in 1..=70_000u64 {
        c.send_dma_read(4096, 4, round).unwrap();
        let id = u16::from_le_bytes(
            drain(&mut c)[..][if round == 1 { 32 } else { 0 }..][..2]
                .try_into()
                .unwrap(),
        );
        assert_ne!(id, 0);
        assert_eq!(
            result(answer_with(&mut c, id, 11, 1, &dma_body(4096, 4, &[0; 4]))).0,
            round
        );
    }
}
