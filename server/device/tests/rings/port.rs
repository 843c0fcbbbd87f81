//! What goes past the rings: the host's page and the port window.

use crate::{PlainBed, bed, complete, of, submission};
use vmgmt_abi::{Completion, Mode, Opcode, Status, Submission};
use vmgmt_device::page::{PlainWords, PortSubmission};
use vmgmt_device::rings::{Answer, Channel, Fetched, HostFacts, Input, Output};
use zerocopy::{FromBytes, IntoBytes};

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
    let closed = Output::ChannelClosed {
        session: 7,
        channel: Channel::Port,
    };
    assert_eq!(bed.outputs(), std::slice::from_ref(&closed));
    // The hub has not journaled it: the next core says it again, and the shell comes again when it has.
    bed.replace_core(PlainWords::new).unwrap();
    assert!(bed.touch().more);
    assert_eq!(bed.outputs(), [closed]);
    bed.end_turn();
    assert!(!bed.poll(0).more);
    let fetched = submission(&bed.outputs());
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
    assert_eq!(
        bed.outputs(),
        [],
        "the hub has not journaled the end of the one before"
    );
    bed.end_turn();
    bed.poll(0);
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
    let void = [Output::Void(fetched.token)];
    assert_eq!(bed.outputs(), void);
    complete(&mut bed, &fetched, Answer::ok(4), b"ab", false);
    assert_eq!(bed.rings.counters().stale_answers, 1);
    bed.replace_core(PlainWords::new).unwrap();
    bed.touch();
    assert_eq!(bed.outputs(), void, "the hub had not journaled it");
    bed.end_turn();

    bed.front.submit_port(&PortSubmission {
        sequence: (1 << 32) | 5,
        mode: 1,
        bytes: vec![1; 63],
    });
    bed.touch();
    assert_eq!(port_result(&bed, 5).unwrap().0.status, Status::BAD_ARGUMENT.0);
}

/// A RECEIVE that is answered, and whose result is in the core page.
fn received(bed: &mut PlainBed) -> Fetched {
    let receive = Submission {
        length: 64,
        ..of(Opcode::RECEIVE, 1)
    };
    port(bed, 1, Mode::CHAT, &receive, &[]);
    let fetched = submission(&bed.outputs());
    complete(bed, &fetched, Answer::ok(4), b"data", true);
    assert_eq!(bed.outputs(), [Output::Kick]);
    fetched
}

#[test]
fn what_was_taken_before_a_reset_is_told_before_it_by_whatever_core() {
    for taken in [true, false] {
        let mut bed = bed();
        let fetched = received(&mut bed);
        if taken {
            bed.front.set_port_taken((1 << 32) | 1);
        }
        bed.front.set_generation(2);
        let published = Output::Published {
            token: fetched.token,
            published: true,
        };
        let reset = Output::Reset { session: 7 };
        let expected = if taken {
            vec![published, reset]
        } else {
            vec![reset]
        };
        bed.touch();
        assert_eq!(bed.outputs(), expected);
        bed.replace_core(PlainWords::new).unwrap();
        bed.touch();
        assert_eq!(bed.outputs(), expected, "the hub had not journaled it");
        bed.end_turn();
        bed.replace_core(PlainWords::new).unwrap();
        bed.touch();
        assert_eq!(bed.outputs(), []);
    }
}

#[test]
fn what_was_taken_before_the_session_ended_is_told() {
    let mut bed = bed();
    let fetched = received(&mut bed);
    bed.front.set_port_taken((1 << 32) | 1);
    bed.handle(Input::End);
    let published = Output::Published {
        token: fetched.token,
        published: true,
    };
    assert_eq!(bed.outputs(), [published]);
}
