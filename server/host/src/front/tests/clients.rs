//! Connections: admission, negotiation, limits, the end.

use super::*;
use crate::front::closer::Closer;
use crate::front::limits;
use crate::front::session::{Outside, Session};
use crate::messages::{FrontToKeeper, KeeperToFront};
use rustix::fd::{AsFd, OwnedFd};
use rustix::net::Shutdown;
use std::io::Write;
use std::time::{Duration, Instant};
use vmgmt_abi::registers as abi;
use vmgmt_testkit::client::command;

#[test]
fn nothing_is_answered_before_the_keeper_has() {
    let mut bench = Bench::new();
    let mut client = Client::connect(&bench.path).unwrap();
    let session = bench.asked();
    client.set_timeout(Duration::from_millis(50));
    let Err(ClientError::TimedOut(_)) = client.negotiate() else {
        panic!("answered")
    };
    let admitted = bench.admit(session);
    client.set_timeout(Duration::from_secs(60));
    // The answer to the proposal that waited.
    assert_eq!(client.recv_raw().unwrap().command, 1);
    assert_eq!(
        client.read_u32(BAR0, u64::from(abi::MAGIC)).unwrap(),
        vmgmt_abi::MAGIC
    );
    assert_eq!((admitted.page.session(), admitted.page.vm()), (session, 3));
    drop(client);
    assert!(matches!(bench.next(), FrontToKeeper::SessionGone { session: gone, .. } if gone == session));
    bench.stop();
}

#[test]
fn a_refused_client_gets_an_error_to_its_version() {
    let mut bench = Bench::new();
    let mut client = Client::connect(&bench.path).unwrap();
    let session = bench.asked();
    bench.tell(&KeeperToFront::Refused {
        session,
        reason: "held by another".into(),
    });
    assert!(client.negotiate().unwrap_err().errno().is_some());
    client.wait_closed().unwrap();
    assert!(matches!(bench.next(), FrontToKeeper::SessionGone { .. }));
    // One that leaves before it is admitted is gone when it is.
    let early = Client::connect(&bench.path).unwrap();
    let session = bench.asked();
    drop(early);
    bench.admit(session);
    assert!(matches!(bench.next(), FrontToKeeper::SessionGone { session: gone, .. } if gone == session));
    bench.client();
    bench.stop();
}

#[test]
fn several_sessions_live_side_by_side_and_protocol_errors_end_one() {
    let mut bench = Bench::new();
    let (mut first, one) = bench.client();
    let (mut second, two) = bench.client();
    assert_ne!(one.session, two.session);
    for (client, admitted) in [(&mut first, &one), (&mut second, &two)] {
        let session = client.region_read(BAR0, u64::from(abi::SESSION_LOW), 8).unwrap();
        assert_eq!(session, admitted.session.to_le_bytes());
        assert_eq!(client.get_info().unwrap().regions, 9);
        assert_eq!(client.region_info(0).unwrap().bytes, 16384);
        assert_eq!(client.irq_info(irq::MSI).unwrap().count, 16);
    }
    // A length smaller than the header.
    first
        .send_raw(&[1, 0, 9, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[])
        .unwrap();
    first.wait_closed().unwrap();
    assert!(matches!(bench.next(), FrontToKeeper::SessionGone { session, .. } if session == one.session));
    assert_eq!(second.read_u32(BAR0, 0).unwrap(), vmgmt_abi::MAGIC);
    bench.tell(&KeeperToFront::CloseVm { vm: 3 });
    second.wait_closed().unwrap();
    bench.stop();
}

#[test]
fn a_flood_that_is_not_read_is_held_back_while_others_are_served() {
    let mut bench = Bench::new();
    let (flooding, _one) = bench.client();
    let (mut other, _two) = bench.client();
    let read = vmgmt_testkit::client::encode(9, 9, 0, &{
        let mut body = vec![0; 8];
        body.extend(7u32.to_le_bytes());
        body.extend(4096u32.to_le_bytes());
        body
    });
    let mut sent = 0usize;
    // Until the socket takes no more: the front has stopped reading.
    let started = Instant::now();
    let mut refused = 0;
    while refused < 200 {
        assert!(
            started.elapsed() < Duration::from_secs(120),
            "{sent} bytes were taken without end"
        );
        let flags = rustix::net::SendFlags::DONTWAIT | rustix::net::SendFlags::NOSIGNAL;
        match rustix::net::send(flooding.socket(), &read, flags) {
            Ok(bytes) => {
                assert_eq!(bytes, read.len());
                sent += bytes;
                refused = 0;
            }
            // The front may just not have had its turn: each round trip of the other client gives it one.
            Err(rustix::io::Errno::AGAIN) => {
                refused += 1;
                assert_eq!(other.read_u32(BAR0, 0).unwrap(), vmgmt_abi::MAGIC);
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert!(
        sent < 1 << 20,
        "{sent} bytes of requests taken: answers of 128 times that size are held"
    );
    bench.stop();
}

/// Gives the front turns (one for each round trip of another client) until a condition holds; what was seen last stands in the failure.
fn turns_until(other: &mut Client, look: impl Fn() -> (bool, String)) {
    let begun = Instant::now();
    loop {
        let (holds, seen) = look();
        if holds {
            return;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "it stays at {seen}");
        assert_eq!(other.read_u32(BAR0, 0).unwrap(), vmgmt_abi::MAGIC);
    }
}

#[test]
fn what_a_client_said_before_it_went_is_done_though_nobody_reads_the_answers() {
    let mut bench = Bench::new();
    let (mut client, admitted) = bench.client();
    let (mut other, _) = bench.client();
    let doorbell = u64::from(abi::DOORBELLS);
    // It reads no more: the first answer cannot be given, and it is still a client.
    rustix::net::shutdown(client.socket(), Shutdown::Read).unwrap();
    for value in 1..200_u32 {
        client.start(command::DEVICE_GET_INFO, &[0; 16], &[]).unwrap();
        client
            .region_write_posted(BAR0, doorbell, &value.to_le_bytes())
            .unwrap();
    }
    turns_until(&mut other, || {
        let doorbell = admitted.page.doorbell(0) as u32;
        (doorbell == 199, format!("doorbell {doorbell}"))
    });
    client.start(command::DEVICE_GET_INFO, &[0; 16], &[]).unwrap();
    client
        .region_write_posted(BAR0, doorbell, &200_u32.to_le_bytes())
        .unwrap();
    drop(client);
    let FrontToKeeper::SessionGone { session, .. } = bench.next() else {
        panic!("the session does not end with its stream")
    };
    assert_eq!(
        (session, admitted.page.doorbell(0) as u32),
        (admitted.session, 200)
    );
    bench.stop();
}

#[test]
fn a_client_that_went_while_all_its_answers_were_owed_ends_when_they_are_given() {
    let mut bench = Bench::new();
    let (mut client, admitted) = bench.client();
    let (mut other, _) = bench.client();
    let core = bench.core(1);
    let told = core.session();
    core.session();
    core.adopted();
    assert_eq!(told.session, admitted.session);
    rustix::net::shutdown(client.socket(), Shutdown::Read).unwrap();
    // The core is slow with the fence of each reset, and the front looks at no more requests than may be owed.
    told.page.set_busy(true);
    let owed = vmgmt_wire::limits::REPLIES_OWED_MAX as u64;
    let before = admitted.page.fence();
    for _ in 0..owed {
        client.start(command::DEVICE_RESET, &[], &[]).unwrap();
    }
    client
        .region_write_posted(BAR0, u64::from(abi::DOORBELLS), &7_u32.to_le_bytes())
        .unwrap();
    drop(client);
    turns_until(&mut other, || {
        let fence = admitted.page.fence();
        (
            fence >= before + owed,
            format!("fence {fence}, {owed} after {before}"),
        )
    });
    told.page.set_busy(false);
    told.page.set_fenced(admitted.page.fence());
    core.kick(told.slot);
    // (A core that took long over a fence is complained of.)
    let gone = std::iter::repeat_with(|| bench.next())
        .find(|said| !matches!(said, FrontToKeeper::CoreStuck { .. }))
        .unwrap();
    assert!(matches!(gone, FrontToKeeper::SessionGone { session, .. } if session == admitted.session));
    assert_eq!(admitted.page.doorbell(0) as u32, 7);
    bench.stop();
}

#[test]
fn unlisten_and_stop_close_everything() {
    let mut bench = Bench::new();
    let (mut client, _) = bench.client();
    bench.tell(&KeeperToFront::Unlisten { listener: 1 });
    client.wait_closed().unwrap();
    assert!(matches!(bench.next(), FrontToKeeper::SessionGone { .. }));
    assert!(Client::connect(&bench.path).is_err());
    bench.stop();
}

/// A socket whose close waits for a peer that does not read, for hours.
struct Lingering {
    socket: OwnedFd,
    peer: std::net::TcpStream,
}

fn lingering() -> Lingering {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let socket = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (peer, _) = listener.accept().unwrap();
    socket.set_nonblocking(true).unwrap();
    while (&socket).write(&[0; 1 << 16]).is_ok() {}
    rustix::net::sockopt::set_socket_linger(&socket, Some(Duration::from_secs(3600))).unwrap();
    Lingering {
        socket: socket.into(),
        peer,
    }
}

/// Sends a descriptor that no message needs, and keeps none: whoever has it in hand closes it last.
fn leave_with(client: &mut Client, lingering: Lingering) -> std::net::TcpStream {
    let half_a_header = &[0; 8];
    client
        .send_raw(half_a_header, &[lingering.socket.as_fd()])
        .unwrap();
    drop(lingering.socket);
    lingering.peer
}

#[test]
fn a_descriptor_whose_close_waits_holds_nobody_up() {
    let mut bench = Bench::new();
    let (mut other, _) = bench.client();
    // Of a client that was let in: it was read, and is closed with the session.
    let (mut client, admitted) = bench.client();
    let _peer = leave_with(&mut client, lingering());
    drop(client);
    assert!(
        matches!(bench.next(), FrontToKeeper::SessionGone { session, .. } if session == admitted.session)
    );
    other.get_info().unwrap();
    // Of one that was not: it lies unread in the session's own socket.
    let mut early = Client::connect(&bench.path).unwrap();
    let session = bench.asked();
    let _second_peer = leave_with(&mut early, lingering());
    drop(early);
    // Its slot is kept until the keeper has decided.
    other.get_info().unwrap();
    let reason = "nobody is let in".into();
    bench.tell(&KeeperToFront::Refused { session, reason });
    assert!(matches!(bench.next(), FrontToKeeper::SessionGone { session: gone, .. } if gone == session));
    other.get_info().unwrap();
    bench.stop();
}

#[test]
fn what_comes_with_an_urgent_byte_is_not_closed_by_the_read() {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let mut bench = Bench::new();
    let (mut other, _) = bench.client();
    let (client, admitted) = bench.client();
    let lingering = lingering();
    let fds = [lingering.socket.as_fd()];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut rights = SendAncillaryBuffer::new(&mut space);
    assert!(rights.push(SendAncillaryMessage::ScmRights(&fds)));
    let byte = [std::io::IoSlice::new(&[0])];
    sendmsg(client.socket(), &byte, &mut rights, SendFlags::OOB).unwrap();
    drop(lingering.socket);
    drop(client);
    assert!(
        matches!(bench.next(), FrontToKeeper::SessionGone { session, .. } if session == admitted.session)
    );
    other.get_info().unwrap();
    bench.stop();
}

#[test]
fn a_descriptor_before_the_version_ends_a_connection() {
    let (socket, client) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut client = Client::from_socket(client);
    let now = vmgmt_device::Tick(1);
    let mut session = Session::new(now, 1, 0, 1, "one".into(), socket.into());
    // (It is read, whatever the keeper has said of it.)
    session.refuse("for this test");
    let signals = vmgmt_mem::Signals::new().unwrap();
    let mut outside = Outside {
        now,
        core: None,
        buffer: &mut [0; 64],
        signals: &signals,
        closer: &Closer::new().unwrap(),
    };
    client.send_raw(&[0; 8], &[]).unwrap();
    session.work(&mut outside);
    assert!(session.socket.is_some(), "half a header alone is well");
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    client.send_raw(&[0; 4], &[writer.as_fd()]).unwrap();
    drop(writer);
    session.readable = true;
    session.work(&mut outside);
    assert!(session.socket.is_none() && session.done);
    // It is closed, soon: this read waits for that.
    assert_eq!(rustix::io::read(&reader, &mut [0]), Ok(0));
}

#[test]
fn what_lies_unaccepted_in_a_listener_that_is_taken_away_holds_nobody_up() {
    let mut bench = Bench::new();
    let another = bench.path.with_extension("other");
    let listener = std::os::unix::net::UnixListener::bind(&another).unwrap();
    bench.listen(2, &another, listener.into());
    let (mut other, _) = bench.client();
    let newcomers: Vec<_> = (0..limits::NEWCOMERS_MAX)
        .map(|_| Client::connect(&another).unwrap())
        .collect();
    for _ in &newcomers {
        assert!(matches!(bench.next(), FrontToKeeper::Admit { listener: 2, .. }));
    }
    // One more waits in the socket.
    let mut client = Client::connect(&another).unwrap();
    let _peer = leave_with(&mut client, lingering());
    drop(client);
    bench.tell(&KeeperToFront::Unlisten { listener: 2 });
    for mut client in newcomers {
        client.wait_closed().unwrap();
    }
    other.get_info().unwrap();
    bench.stop();
}
