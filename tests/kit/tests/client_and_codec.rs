//! The test client and the server's codec, written apart from one specification, talk over a real socket.
//!
//! The server here is the codec on a thread, with a register file of 4 KiB for each region instead of a
//! device, so that what is tested is the two sides of the wire and nothing else.

#![allow(clippy::unwrap_used, clippy::panic)] // a failing helper fails the test

use std::collections::BTreeMap;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::net::*;
use vmgmt_testkit::client::{self, Client, ClientError, GuestRam, Mapping, Seal, Write, irq};
use vmgmt_wire::*;

/// What the server saw.
#[derive(Default)]
struct Seen {
    /// Inode of each mapped descriptor, by DMA address; 0 for a map without.
    maps: BTreeMap<u64, u64>,
    eventfds: BTreeMap<u32, OwnedFd>,
    regions: BTreeMap<u32, Vec<u8>>,
    /// A write of these bytes at offset 0x800 asks for DMA: address and length; the answer goes to 0x900.
    dma_answers: Vec<Result<DmaAnswer, DmaFailure>>,
    descriptors_left: usize,
}

struct Server {
    socket: UnixStream,
    connection: Connection,
    table: BTreeMap<u32, OwnedFd>,
    next_slot: u32,
    seen: Seen,
}

fn serve(read_bytes_max: usize) -> (Client, JoinHandle<Seen>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = Server {
        socket: ours,
        connection: Connection::new(),
        table: BTreeMap::new(),
        next_slot: 0,
        seen: Seen::default(),
    };
    (
        Client::from_socket(theirs),
        std::thread::spawn(move || server.run(read_bytes_max)),
    )
}

impl Server {
    fn run(mut self, read_bytes_max: usize) -> Seen {
        loop {
            while let Some(event) = self.connection.poll_event() {
                self.event(event);
                self.flush();
            }
            self.flush();
            if self.connection.should_close() || !self.read(read_bytes_max) {
                break;
            }
        }
        for slot in self.connection.take_descriptors() {
            self.table.remove(&slot.0);
        }
        self.seen.descriptors_left = self.table.len();
        self.seen
    }

    fn read(&mut self, read_bytes_max: usize) -> bool {
        let mut bytes = vec![0; read_bytes_max];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let Ok(got) = recvmsg(
            &self.socket,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut ancillary,
            flags,
        ) else {
            return false;
        };
        let mut slots = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                for fd in fds {
                    self.table.insert(self.next_slot, fd);
                    slots.push(FdSlot(self.next_slot));
                    self.next_slot += 1;
                }
            }
        }
        self.connection.handle_read(&bytes[..got.bytes], slots, false);
        got.bytes > 0
    }

    fn flush(&mut self) {
        while let Some(pending) = self.connection.pending_output() {
            assert!(pending.descriptors.is_empty());
            let sent = sendmsg(
                &self.socket,
                &[IoSlice::new(pending.bytes)],
                &mut SendAncillaryBuffer::default(),
                SendFlags::NOSIGNAL,
            );
            let Ok(sent) = sent else { return };
            self.connection.advance_output(sent);
        }
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::CloseDescriptor(slot) => assert!(self.table.remove(&slot.0).is_some()),
            Event::DmaReply(reply) => self.seen.dma_answers.push(reply.result),
            Event::Refused { .. } | Event::Failed(_) => {}
            Event::Request(Request {
                handle,
                command: Command::Version(_),
            }) => {
                self.connection
                    .accept_version(&handle, &ServerOffer::default())
                    .unwrap();
            }
            Event::Request(Request { handle, command }) => {
                let reply = self.command(command);
                match self.connection.reply(&handle, &reply) {
                    Ok(()) | Err(ReplyRefused::NotWanted) => {}
                    Err(error) => panic!("{error}"),
                }
            }
        }
    }

    fn command(&mut self, command: Command) -> Reply {
        match command {
            Command::Version(_) => unreachable!(),
            Command::DmaMap(map) => {
                let fd = map.descriptor.and_then(|slot| self.table.remove(&slot.0));
                let inode = fd.map_or(0, |fd| rustix::fs::fstat(fd).unwrap().st_ino);
                self.seen.maps.insert(map.range.start(), inode);
                Reply::Done
            }
            Command::DmaUnmap(unmap) => {
                if let DmaUnmap::Range(range) = unmap {
                    self.seen.maps.remove(&range.start());
                }
                Reply::DmaUnmap(unmap)
            }
            Command::DeviceGetInfo => Reply::DeviceInfo(DeviceInfo {
                flags: 3,
                regions: 9,
                irqs: 5,
            }),
            Command::DeviceGetRegionInfo { region } if region < 9 => Reply::RegionInfo(RegionInfo {
                flags: 3,
                region,
                bytes: 4096,
                ..RegionInfo::default()
            }),
            Command::DeviceGetIrqInfo { index } if index < 5 => Reply::IrqInfo(IrqInfo {
                flags: 1,
                index,
                count: 16,
            }),
            Command::DeviceSetIrqs(set) => {
                match set.operation {
                    IrqOperation::Assign { start, eventfds, .. } => {
                        for (irq, slot) in (start..).zip(eventfds) {
                            let fd = self.table.remove(&slot.0).unwrap();
                            // Signalled at once, as one does who takes over an eventfd.
                            rustix::io::write(&fd, &1u64.to_ne_bytes()).unwrap();
                            self.seen.eventfds.insert(irq, fd);
                        }
                    }
                    IrqOperation::DisableAll => self.seen.eventfds.clear(),
                    _ => {}
                }
                Reply::Done
            }
            Command::RegionRead(access) => match self.bytes(access) {
                Some(bytes) => Reply::RegionRead {
                    access,
                    data: bytes.to_vec(),
                },
                None => Reply::Error(Errno::EINVAL),
            },
            Command::RegionWrite(write) => self.write(&write),
            Command::RegionWriteMulti(writes) => {
                let count = writes.len() as u64;
                for write in &writes {
                    self.write(write);
                }
                Reply::RegionWriteMulti { count }
            }
            Command::DeviceReset => {
                self.seen.regions.clear();
                Reply::Done
            }
            _ => Reply::Error(Errno::EOPNOTSUPP),
        }
    }

    fn bytes(&mut self, access: RegionAccess) -> Option<&mut [u8]> {
        let region = self
            .seen
            .regions
            .entry(access.region())
            .or_insert_with(|| vec![0; 4096]);
        region.get_mut(usize::try_from(access.offset()).ok()?..usize::try_from(access.end()).ok()?)
    }

    fn write(&mut self, write: &RegionWrite) -> Reply {
        match self.bytes(write.access()) {
            Some(bytes) => bytes.copy_from_slice(write.data()),
            None => return Reply::Error(Errno::EINVAL),
        }
        // The doorbells of this test: "read 16 bytes there", "write your 16 bytes there".
        let iova = write.data().try_into().map(u64::from_le_bytes);
        match (write.access().offset(), iova) {
            (0x800, Ok(iova)) => self.connection.send_dma_read(iova, 16, 1).unwrap(),
            (0x808, Ok(iova)) => self.connection.send_dma_write(iova, &[0xee; 16], 2).unwrap(),
            _ => {}
        }
        Reply::RegionWrite(write.access())
    }
}

fn ready(read_bytes_max: usize) -> (Client, JoinHandle<Seen>) {
    let (mut client, server) = serve(read_bytes_max);
    let capabilities = client.negotiate().unwrap();
    assert_eq!(capabilities["capabilities"]["max_msg_fds"], 16);
    (client, server)
}

#[test]
fn every_command() {
    for read_bytes_max in [1, 7, 65536] {
        let (mut client, server) = ready(read_bytes_max);
        let info = client.get_info().unwrap();
        assert_eq!(
            info,
            client::DeviceInfo {
                argsz: 16,
                flags: 3,
                regions: 9,
                irqs: 5
            }
        );
        let region = client.region_info(7).unwrap();
        assert_eq!((region.argsz, region.flags, region.bytes), (32, 3, 4096));
        assert_eq!(
            client.region_info(9).unwrap_err().errno(),
            Some(Errno::EOPNOTSUPP.0)
        );
        assert_eq!(
            client.irq_info(1).unwrap(),
            client::IrqInfo { flags: 1, count: 16 }
        );
        client.write_u32(0, 0x10, 0xdead_beef).unwrap();
        client.region_write_posted(0, 0x14, &[1, 2, 3, 4]).unwrap();
        assert_eq!(client.read_u32(0, 0x10).unwrap(), 0xdead_beef);
        assert_eq!(client.region_read(0, 0x14, 4).unwrap(), [1, 2, 3, 4]);
        assert_eq!(
            client.region_read(0, 4095, 2).unwrap_err().errno(),
            Some(Errno::EINVAL.0)
        );
        let writes = [
            Write {
                region: 2,
                offset: 0,
                data: &[9],
            },
            Write {
                region: 2,
                offset: 1,
                data: &[8; 8],
            },
        ];
        client.write_multi(&writes, true).unwrap();
        client.write_multi(&writes[1..], false).unwrap();
        assert_eq!(client.region_read(2, 0, 9).unwrap(), [9, 8, 8, 8, 8, 8, 8, 8, 8]);
        client.reset().unwrap();
        assert_eq!(client.read_u32(0, 0x10).unwrap(), 0);
        drop(client);
        assert_eq!(server.join().unwrap().descriptors_left, 0);
    }
}

#[test]
fn maps_keep_their_descriptors_however_they_are_read() {
    let ram = GuestRam::new(8192, Seal::Shrink).unwrap();
    let other = GuestRam::new(8192, Seal::None).unwrap();
    let inode = |ram: &GuestRam| rustix::fs::fstat(ram.fd()).unwrap().st_ino;
    for read_bytes_max in [1, 13, 48, 60, 65536] {
        let (mut client, server) = ready(read_bytes_max);
        let memory: [Option<(BorrowedFd, u64)>; 5] =
            [None, Some((ram.fd(), 0)), None, None, Some((other.fd(), 4096))];
        let mut ids = Vec::new();
        for (index, memory) in memory.iter().enumerate() {
            let iova = index as u64 * 4096;
            ids.push(
                client
                    .start_dma_map(Mapping {
                        iova,
                        bytes: 4096,
                        flags: 3,
                        memory: *memory,
                    })
                    .unwrap(),
            );
        }
        for id in ids.into_iter().rev() {
            assert!(client.finish(id).unwrap().body.is_empty());
        }
        // Refused, and its descriptors closed.
        let twice = [ram.fd(), other.fd()];
        let wrong = client
            .request(client::command::DEVICE_RESET, &[], &twice)
            .unwrap_err();
        assert_eq!(wrong.errno(), Some(Errno::EINVAL.0));
        client.dma_unmap(0, 4096).unwrap();
        drop(client);
        let seen = server.join().unwrap();
        let expected = [(4096, inode(&ram)), (8192, 0), (12288, 0), (16384, inode(&other))];
        assert_eq!(
            seen.maps,
            BTreeMap::from(expected),
            "reads of {read_bytes_max} bytes"
        );
        assert_eq!(seen.descriptors_left, 0);
    }
}

#[test]
fn interrupts_arrive() {
    let (mut client, server) = ready(65536);
    let eventfds: Vec<OwnedFd> = (0..3).map(|_| client::eventfd().unwrap()).collect();
    client.assign_irqs(irq::MSI, 0, &eventfds).unwrap();
    for eventfd in &eventfds {
        assert_eq!(client.wait_event(eventfd).unwrap(), 1);
    }
    client.disable_irqs(irq::MSI).unwrap();
    client.set_timeout(std::time::Duration::from_millis(50));
    assert!(matches!(
        client.wait_event(&eventfds[0]),
        Err(ClientError::TimedOut(_))
    ));
    drop(client);
    assert!(server.join().unwrap().eventfds.is_empty());
}

#[test]
fn dma_by_messages() {
    let (mut client, server) = ready(65536);
    let ram = Arc::new(GuestRam::new(4096, Seal::Shrink).unwrap());
    let pattern: Vec<u8> = (0x10..0x20).collect();
    ram.write(0x100, &pattern).unwrap();
    client.serve_memory(0x7000_0000, 4096, &ram, 0);
    let ring = |client: &mut Client, offset: u64, iova: u64| {
        let before = client.dma_served().len();
        client.region_write(0, offset, &iova.to_le_bytes()).unwrap();
        client
            .serve_until(|client| client.dma_served().len() > before)
            .unwrap();
        client.dma_served()[before].errno
    };
    assert_eq!(ring(&mut client, 0x800, 0x7000_0100), 0);
    assert_eq!(ring(&mut client, 0x808, 0x7000_0200), 0);
    assert_eq!(ram.load_u64(0x200), 0xeeee_eeee_eeee_eeee);
    assert_eq!(ring(&mut client, 0x800, 0x7000_0ff8), 14, "the end is outside");
    client.set_bus_master(false);
    assert_eq!(ring(&mut client, 0x808, 0x7000_0200), 19);
    drop(client);
    let answers = server.join().unwrap().dma_answers;
    let expected = [
        Ok(DmaAnswer::Read(pattern)),
        Ok(DmaAnswer::Written),
        Err(DmaFailure::Refused(Errno::EFAULT)),
        Err(DmaFailure::Refused(Errno::ENODEV)),
    ];
    assert_eq!(answers, expected);
}

#[test]
fn senseless_headers_end_the_connection_and_good_ones_go_on() {
    let (mut client, server) = ready(65536);
    let reset = client::encode(7, 13, 0, &[]);
    client.send_split(&reset, &[], &[1, 2, 3, 5, 8, 13]).unwrap();
    let reply = client.recv_raw().unwrap();
    assert_eq!((reply.id, reply.command, reply.flags, reply.error), (7, 13, 1, 0));
    let ram = GuestRam::new(4096, Seal::None).unwrap();
    client
        .send_raw(&client::encode(8, 99, 0, &[1, 2, 3]), &[ram.fd()])
        .unwrap();
    let reply = client.recv_raw().unwrap();
    assert_eq!(
        (reply.id, reply.command, reply.flags, reply.error),
        (8, 99, 0x21, Errno::EOPNOTSUPP.0)
    );
    let mut short = client::encode(9, 13, 0, &[]);
    short[4] = 15;
    client.send_raw(&short, &[ram.fd().as_fd()]).unwrap();
    assert!(
        client.wait_closed().unwrap().is_empty(),
        "no reply to what has no length"
    );
    assert_eq!(server.join().unwrap().descriptors_left, 0);
}

#[test]
fn ram_that_shrinks_and_ram_that_cannot() {
    let sealed = GuestRam::new(8192, Seal::Shrink).unwrap();
    assert!(sealed.truncate(4096).is_err());
    let loose = GuestRam::new(8192, Seal::None).unwrap();
    loose.store_u32(4, 0x0403_0201);
    assert_eq!(loose.read(4, 4).unwrap(), [1, 2, 3, 4]);
    loose.write(8, &7u64.to_le_bytes()).unwrap();
    assert_eq!((loose.load_u64(8), loose.load_u32(4)), (7, 0x0403_0201));
    loose.punch(0, 4096).unwrap();
    assert_eq!(loose.load_u64(8), 0);
    loose.truncate(4096).unwrap();
    assert!(loose.read(4096, 1).is_err());
    assert!(loose.write(8192, &[1]).is_err());
}
