//! DMA maps with descriptors, and guest memory by messages.

use super::*;
use crate::messages::{CoreToFront, FrontToCore};
use rustix::fd::AsFd;
use std::sync::Arc;
use vmgmt_abi::registers as abi;
use vmgmt_abi::registers::DeviceState;
use vmgmt_device::page::rights;
use vmgmt_testkit::client::{RawMessage, encode, flag};
use vmgmt_wire::Errno;

/// Descriptors of this process that lead to the memory of `ram`.
fn holders(ram: &GuestRam) -> usize {
    let wanted = rustix::fs::fstat(ram.fd()).unwrap();
    let numbers = std::fs::read_dir("/proc/self/fd").unwrap();
    let same = |entry: &std::fs::DirEntry| {
        rustix::fs::stat(entry.path())
            .is_ok_and(|stat| (stat.st_dev, stat.st_ino) == (wanted.st_dev, wanted.st_ino))
    };
    numbers.flatten().filter(same).count()
}

/// So many hold it, soon: a thread of the front's closes what is refused or let go.
fn wait_for_holders(ram: &GuestRam, count: usize) {
    while holders(ram) != count {
        std::thread::yield_now();
    }
}

/// A client's error answer.
fn refusal(request: &RawMessage) -> Vec<u8> {
    encode(request.id, request.command, flag::REPLY | flag::ERROR, &[])
}

#[test]
fn one_descriptor_is_kept_of_each_memory_and_let_go_with_its_last_map() {
    let mut bench = Bench::new();
    let (mut client, admitted) = bench.client();
    let core = bench.core(1);
    core.session();
    core.adopted();
    let ram = GuestRam::new(1 << 20, Seal::Shrink).unwrap();
    for page in 0..64 {
        let memory = Some((ram.fd(), page << 12));
        client
            .dma_map(Mapping {
                iova: page << 12,
                bytes: 4096,
                flags: 3,
                memory,
            })
            .unwrap();
    }
    let object = core.next();
    assert!(matches!(object.header, FrontToCore::Object { object: 1, .. }));
    // Ours, the front's, and the one that the core was sent.
    assert_eq!(holders(&ram), 3);
    // Open for reading only: another object, and no right to write.
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&ram.fd()));
    let read_only = std::fs::File::open(path).unwrap();
    let memory = Some((read_only.as_fd(), 0));
    client
        .dma_map(Mapping {
            iova: 1 << 30,
            bytes: 4096,
            flags: 3,
            memory,
        })
        .unwrap();
    assert!(matches!(
        core.next().header,
        FrontToCore::Object {
            object: 2,
            writable: false,
            ..
        }
    ));
    let record = admitted.page.map(64).unwrap();
    assert_eq!((record.object, record.rights), (2, rights::READ));
    client.dma_unmap(0, 64 << 12).unwrap();
    assert!(matches!(
        core.next().header,
        FrontToCore::ObjectGone { object: 1, .. }
    ));
    drop(object);
    drop(read_only);
    // Ours and the read-only one of the front.
    wait_for_holders(&ram, 2);
    drop(client);
    assert!(matches!(core.next().header, FrontToCore::SessionGone { .. }));
    bench.next();
    bench.stop();
}

#[test]
fn maps_that_cannot_be_are_refused_and_their_descriptors_closed() {
    let mut bench = Bench::new();
    let (mut client, admitted) = bench.client();
    let ram = GuestRam::new(1 << 16, Seal::Shrink).unwrap();
    let memory = Some((ram.fd(), 0));
    let mut refused = |mapping: Mapping<'_>| client.dma_map(mapping).unwrap_err().errno().unwrap();
    let too_long = Mapping {
        iova: 0,
        bytes: (1 << 16) + 1,
        flags: 3,
        memory,
    };
    assert_eq!(refused(too_long), Errno::EINVAL.0);
    let directory = std::fs::File::open("/tmp").unwrap();
    assert_eq!(
        refused(Mapping {
            iova: 0,
            bytes: 4096,
            flags: 3,
            memory: Some((directory.as_fd(), 0))
        }),
        Errno::EINVAL.0
    );
    let pipe = rustix::pipe::pipe().unwrap();
    assert_eq!(
        refused(Mapping {
            iova: 0,
            bytes: 4096,
            flags: 3,
            memory: Some((pipe.0.as_fd(), 0))
        }),
        Errno::EINVAL.0
    );
    wait_for_holders(&ram, 1);
    // Without a descriptor: reached by messages.
    client
        .dma_map(Mapping {
            iova: 0,
            bytes: 4096,
            flags: 1,
            memory: None,
        })
        .unwrap();
    let record = admitted.page.map(0).unwrap();
    assert_eq!((record.object, record.rights), (0, rights::READ));
    assert_eq!(
        map(&mut client, 0, 4096, &ram).unwrap_err().errno(),
        Some(Errno::EEXIST.0)
    );
    wait_for_holders(&ram, 1);
    // A file that somebody else serves, here the kernel: reached by messages too, for whoever mapped it would wait for them.
    let served = std::fs::File::open("/proc/self/cmdline").unwrap();
    client
        .dma_map(Mapping {
            iova: 0x4000,
            bytes: 4096,
            flags: 1,
            memory: Some((served.as_fd(), 0)),
        })
        .unwrap();
    assert_eq!(admitted.page.map(1).unwrap().object, 0);
    client.dma_unmap(0x10_0000, 0x1000).unwrap();
    bench.stop();
}

#[test]
fn guest_memory_by_messages() {
    let mut bench = Bench::new();
    let (mut client, admitted) = bench.client();
    bus_master(&mut client);
    let core = bench.core(1);
    core.session();
    core.adopted();
    let session = admitted.session;
    let ram = Arc::new(GuestRam::new(1 << 20, Seal::Shrink).unwrap());
    ram.write(0x100, b"from the guest").unwrap();
    client.serve_memory(0, 1 << 20, &ram, 0);
    core.send(
        &CoreToFront::DmaRead {
            session,
            request: 5,
            fence: u64::MAX,
            iova: 0x100,
            bytes: 14,
        },
        b"",
    );
    core.send(
        &CoreToFront::DmaWrite {
            session,
            request: 6,
            fence: u64::MAX,
            iova: 0x200,
        },
        b"to the guest",
    );
    client
        .serve_until(|client| client.dma_served().len() == 2)
        .unwrap();
    let read = core.next();
    assert!(matches!(
        read.header,
        FrontToCore::DmaAnswer {
            request: 5,
            error: 0,
            ..
        }
    ));
    assert_eq!(read.payload, b"from the guest");
    assert!(matches!(
        core.next().header,
        FrontToCore::DmaAnswer {
            request: 6,
            error: 0,
            ..
        }
    ));
    assert_eq!(ram.read(0x200, 12).unwrap(), b"to the guest");
    // What cannot be sent is answered too.
    core.send(
        &CoreToFront::DmaRead {
            session,
            request: 7,
            fence: u64::MAX,
            iova: 0,
            bytes: 1 << 20,
        },
        b"",
    );
    let answer = core.next().header;
    assert!(matches!(answer, FrontToCore::DmaAnswer { request: 7, error, .. } if error == Errno::EINVAL.0));
    core.send(
        &CoreToFront::DmaRead {
            session: 1,
            request: 8,
            fence: u64::MAX,
            iova: 0,
            bytes: 1,
        },
        b"",
    );
    let answer = core.next().header;
    assert!(matches!(answer, FrontToCore::DmaAnswer { request: 8, error, .. } if error == Errno::ENODEV.0));
    bench.stop();
}

#[test]
fn a_fence_voids_message_dma_and_no_reply_waits_for_it() {
    let mut bench = Bench::new();
    let (mut client, admitted) = bench.client();
    bus_master(&mut client);
    let core = bench.core(1);
    core.session();
    core.adopted();
    for request in 0..4 {
        core.send(
            &CoreToFront::DmaRead {
                session: admitted.session,
                request,
                fence: u64::MAX,
                iova: 0,
                bytes: 8,
            },
            b"",
        );
    }
    // The client has all of them and answers none; the reset is answered all the same.
    let asked: Vec<_> = (0..4).map(|_| client.recv_raw().unwrap()).collect();
    client.reset().unwrap();
    let mut answers: Vec<u64> = (0..4)
        .map(|_| match core.next().header {
            FrontToCore::DmaAnswer { request, error, .. } if error == Errno::EAGAIN.0 => request,
            other => panic!("{other:?}"),
        })
        .collect();
    answers.sort_unstable();
    assert_eq!(answers, [0, 1, 2, 3]);
    // The late answers are dropped, and a new request goes through.
    for request in &asked {
        let answer = refusal(request);
        client.send_raw(&answer, &[]).unwrap();
    }
    core.send(
        &CoreToFront::DmaRead {
            session: admitted.session,
            request: 9,
            fence: u64::MAX,
            iova: 0,
            bytes: 8,
        },
        b"",
    );
    let message = client.recv_raw().unwrap();
    let answer = refusal(&message);
    client.send_raw(&answer, &[]).unwrap();
    assert!(matches!(core.next().header, FrontToCore::DmaAnswer { request: 9, error, .. } if error != 0));
    bench.stop();
}

/// The guest may use its memory again once STATE says BLANK: a write that the client was sent before must be done by then. And the core learns
/// whether it was: the guest may have seen it.
#[test]
fn a_reset_is_over_when_the_client_has_answered_what_it_was_sent() {
    for (done, expected) in [(false, Errno::EAGAIN), (true, Errno(0))] {
        let mut bench = Bench::new();
        let (mut client, admitted) = bench.client();
        bus_master(&mut client);
        let core = bench.core(1);
        core.session();
        core.adopted();
        core.send(
            &CoreToFront::DmaWrite {
                session: admitted.session,
                request: 1,
                fence: u64::MAX,
                iova: 0x200,
            },
            b"before",
        );
        let message = client.recv_raw().unwrap();
        client
            .write_u32(BAR0, u64::from(abi::CONTROL), abi::CONTROL_RESET)
            .unwrap();
        let state = |client: &mut Client| client.read_u32(BAR0, u64::from(abi::STATE)).unwrap();
        assert_eq!(state(&mut client), DeviceState::RESETTING.0);
        let answer = if done {
            encode(message.id, message.command, flag::REPLY, &message.body[..16])
        } else {
            refusal(&message)
        };
        client.send_raw(&answer, &[]).unwrap();
        assert_eq!(state(&mut client), DeviceState::BLANK.0);
        let answer = core.next().header;
        assert!(
            matches!(answer, FrontToCore::DmaAnswer { request: 1, error, .. } if error == expected.0),
            "{answer:?}"
        );
        bench.stop();
    }
}

#[test]
fn a_request_from_before_a_fence_never_reaches_the_client() {
    let mut bench = Bench::new();
    let (mut client, admitted) = bench.client();
    bus_master(&mut client);
    let core = bench.core(1);
    core.session();
    core.adopted();
    // The core asked before it saw this reset, and the packet comes after the reset was answered.
    client.reset().unwrap();
    bus_master(&mut client);
    core.send(
        &CoreToFront::DmaWrite {
            session: admitted.session,
            request: 3,
            fence: 0,
            iova: 0x200,
        },
        b"late",
    );
    let answer = core.next().header;
    assert!(
        matches!(answer, FrontToCore::DmaAnswer { request: 3, error, .. } if error == Errno::EAGAIN.0),
        "{answer:?}"
    );
    let ram = Arc::new(GuestRam::new(1 << 20, Seal::Shrink).unwrap());
    client.serve_memory(0, 1 << 20, &ram, 0);
    // A round trip behind it: nothing was sent in between.
    client.get_info().unwrap();
    assert_eq!(client.dma_served().len(), 0);
    assert_eq!(ram.read(0x200, 4).unwrap(), [0; 4]);
    bench.stop();
}

#[test]
fn a_client_that_answers_late_gets_its_places_back() {
    let mut bench = Bench::new();
    let (mut client, admitted) = bench.client();
    bus_master(&mut client);
    let core = bench.core(1);
    core.session();
    core.adopted();
    let session = admitted.session;
    let ask = |request: u64| {
        let (fence, iova, bytes) = (u64::MAX, 0, 8);
        let read = CoreToFront::DmaRead {
            session,
            request,
            fence,
            iova,
            bytes,
        };
        core.send(&read, b"");
    };
    // As many as are sent, as many as wait, and one for which there is no room.
    (0..9).for_each(ask);
    let answer = core.next().header;
    assert!(
        matches!(answer, FrontToCore::DmaAnswer { request: 8, error, .. } if error == Errno::EBUSY.0),
        "{answer:?}"
    );
    // It answers in the end: what waited goes out, and so does what is asked after that.
    for expected in 0..8 {
        let message = client.recv_raw().unwrap();
        client.send_raw(&refusal(&message), &[]).unwrap();
        let answer = core.next().header;
        assert!(
            matches!(answer, FrontToCore::DmaAnswer { request, .. } if request == expected),
            "{answer:?}"
        );
    }
    ask(9);
    let message = client.recv_raw().unwrap();
    client.send_raw(&refusal(&message), &[]).unwrap();
    assert!(matches!(
        core.next().header,
        FrontToCore::DmaAnswer { request: 9, .. }
    ));
    bench.stop();
}
