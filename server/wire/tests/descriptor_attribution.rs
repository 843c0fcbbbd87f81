//! What the kernel really does with descriptors on a stream socket: the ground under the rule in
//! `src/input.rs`, tried on a real socket pair, and the connection on top of it.

#![allow(clippy::unwrap_used, clippy::panic)] // a test's own helper may fail the test

mod support;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use support::*;
use vmgmt_wire::*;

fn pair() -> (OwnedFd, OwnedFd) {
    socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::NONBLOCK,
        None,
    )
    .unwrap()
}

fn send(socket: &OwnedFd, bytes: &[u8], descriptors: usize) {
    let null = std::fs::File::open("/dev/null").unwrap();
    let fds = vec![null.as_fd(); descriptors];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if descriptors > 0 {
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
    }
    let sent = sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::empty()).unwrap();
    assert_eq!(sent, bytes.len());
}

/// One read: bytes, and the number of descriptors that came (closed here).
fn receive(socket: &OwnedFd, bytes_max: usize) -> Option<(Vec<u8>, usize)> {
    let mut bytes = vec![0; bytes_max];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let got = recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, flags).ok()?;
    let mut descriptors = 0;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            descriptors += fds.count();
        }
    }
    bytes.truncate(got.bytes);
    Some((bytes, descriptors))
}

#[test]
fn a_read_goes_over_plain_bytes_and_stops_behind_descriptors() {
    let (client, server) = pair();
    send(&client, b"aaaa", 0);
    send(&client, b"bbbb", 1);
    send(&client, b"cccc", 0);
    send(&client, b"dddd", 2);
    assert_eq!(
        receive(&server, 100),
        Some((b"aaaabbbb".to_vec(), 1)),
        "they came with the last byte"
    );
    assert_eq!(receive(&server, 100), Some((b"ccccdddd".to_vec(), 2)));
    assert_eq!(receive(&server, 100), None);
}

#[test]
fn descriptors_come_with_the_first_byte_of_their_buffer() {
    let (client, server) = pair();
    send(&client, b"aa", 0);
    send(&client, b"bbbb", 1);
    send(&client, b"cc", 1);
    assert_eq!(receive(&server, 2), Some((b"aa".to_vec(), 0)), "none before it");
    assert_eq!(
        receive(&server, 1),
        Some((b"b".to_vec(), 1)),
        "all with its first byte"
    );
    assert_eq!(receive(&server, 1), Some((b"b".to_vec(), 0)));
    // The rest of a buffer whose descriptors are gone does not stop a read.
    assert_eq!(receive(&server, 100), Some((b"bbcc".to_vec(), 1)));
}

/// The property the model in `support` is used for, on the real thing: random sends, random read sizes.
#[test]
fn the_model_reads_as_the_kernel_does() {
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = |below: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % below
    };
    for _ in 0..200 {
        let (client, server) = pair();
        let mut model = KernelModel::default();
        for _ in 0..random(12) + 1 {
            let bytes = vec![random(256) as u8; random(40) as usize + 1];
            let descriptors = if random(2) == 0 { 0 } else { random(3) as usize };
            send(&client, &bytes, descriptors);
            model.send(&bytes, &vec![0; descriptors]);
        }
        loop {
            let bytes_max = random(60) as usize + 1;
            let (bytes, slots) = model.read(bytes_max);
            let Some((real_bytes, real_descriptors)) = receive(&server, bytes_max) else {
                assert!(bytes.is_empty());
                break;
            };
            assert_eq!((real_bytes, real_descriptors), (bytes, slots.len()));
        }
    }
}

#[test]
fn a_map_without_descriptor_and_one_with_in_one_read() {
    let plain = message(1, 2, 0, &dma_map_body(1, 0, 0xf_0000, 0x1_0000));
    let shared = message(2, 2, 0, &dma_map_body(3, 0, 0, 0xa_0000));
    for (first, second, expected) in [
        ((&plain, 0), (&shared, 1), [None, Some(FdSlot(0))]),
        ((&shared, 1), (&plain, 0), [Some(FdSlot(0)), None]),
    ] {
        let (client, server) = pair();
        send(&client, first.0, first.1);
        send(&client, second.0, second.1);
        let mut connection = ready();
        let (mut maps, mut slots) = (Vec::new(), 0);
        while let Some((bytes, descriptors)) = receive(&server, 4096) {
            let tokens = (slots..slots + descriptors as u32).map(FdSlot).collect();
            slots += descriptors as u32;
            connection.handle_read(&bytes, tokens, false);
            while let Some(Event::Request(Request {
                command: Command::DmaMap(map),
                ..
            })) = connection.poll_event()
            {
                maps.push(map.descriptor);
            }
        }
        assert_eq!(maps, expected);
    }
}
