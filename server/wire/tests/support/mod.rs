//! What the tests of this crate share: messages built byte by byte from the specification (never with the
//! crate's own layouts), a model of the kernel's stream socket, and a server that answers everything.

// Each test file uses a part of this; a test's own helper may fail the test.
#![allow(dead_code, clippy::unwrap_used, clippy::panic)]

use std::collections::VecDeque;

use vmgmt_wire::*;

pub const QEMU_CAPABILITIES: &str = r#"{"capabilities": {"pgsizes": 4096, "max_msg_fds": 16, "max_dma_maps": 65535, "max_data_xfer_size": 1048576, "migration": {"max_bitmap_size": 268435456, "pgsize": 4096}, "write_multiple": true}}"#;

pub const NO_REPLY: u32 = 0x10;

pub fn message(id: u16, command: u16, flags: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(id.to_le_bytes());
    bytes.extend(command.to_le_bytes());
    bytes.extend((16 + body.len() as u32).to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend(0u32.to_le_bytes());
    bytes.extend(body);
    bytes
}

pub fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

pub fn version_body(major: u16, json: Option<&str>) -> Vec<u8> {
    let mut body = major.to_le_bytes().to_vec();
    body.extend(0u16.to_le_bytes());
    if let Some(json) = json {
        body.extend(json.as_bytes());
        body.push(0);
    }
    body
}

pub fn dma_map_body(flags: u32, offset: u64, iova: u64, bytes: u64) -> Vec<u8> {
    let mut body = words(&[32, flags]);
    for word in [offset, iova, bytes] {
        body.extend(word.to_le_bytes());
    }
    body
}

pub fn dma_unmap_body(flags: u32, iova: u64, bytes: u64) -> Vec<u8> {
    let mut body = words(&[24, flags]);
    body.extend(iova.to_le_bytes());
    body.extend(bytes.to_le_bytes());
    body
}

pub fn region_body(region: u32, offset: u64, count: u32, data: &[u8]) -> Vec<u8> {
    let mut body = offset.to_le_bytes().to_vec();
    body.extend(words(&[region, count]));
    body.extend(data);
    body
}

pub fn region_info_body(argsz: u32, region: u32) -> Vec<u8> {
    let mut body = words(&[argsz, 0, region, 0]);
    body.extend([0; 16]);
    body
}

pub fn multi_body(writes: &[(u32, u64, u32)]) -> Vec<u8> {
    let mut body = (writes.len() as u64).to_le_bytes().to_vec();
    for (index, (region, offset, count)) in writes.iter().enumerate() {
        body.extend(region_body(*region, *offset, *count, &[index as u8 + 1; 8]));
    }
    body
}

/// A connection past VERSION, with that reply already sent.
pub fn ready() -> Connection {
    let mut connection = Connection::new();
    connection.handle_read(
        &message(0, 1, 0, &version_body(0, Some(QEMU_CAPABILITIES))),
        Vec::new(),
        false,
    );
    let Some(Event::Request(request)) = connection.poll_event() else {
        panic!("VERSION was not taken")
    };
    connection
        .accept_version(&request.handle, &ServerOffer::default())
        .unwrap();
    drain(&mut connection);
    connection
}

/// Everything waiting to be sent.
pub fn drain(connection: &mut Connection) -> Vec<u8> {
    let mut bytes = Vec::new();
    while let Some(pending) = connection.pending_output() {
        let step = pending.bytes.len();
        bytes.extend_from_slice(pending.bytes);
        connection.advance_output(step);
    }
    bytes
}

/// Feeds one message that must be taken as a request.
pub fn request(connection: &mut Connection, command: u16, flags: u32, body: &[u8], fds: &[u32]) -> Request {
    connection.handle_read(
        &message(7, command, flags, body),
        fds.iter().map(|fd| FdSlot(*fd)).collect(),
        false,
    );
    match connection.poll_event() {
        Some(Event::Request(request)) => request,
        other => panic!("command {command} gave {other:?}"),
    }
}

/// Feeds one message that must be refused with this errno, its descriptors closed, the stream in step.
pub fn refused(connection: &mut Connection, command: u16, body: &[u8], fds: &[u32], errno: Errno) -> Refusal {
    refused_raw(connection, message(7, command, 0, body), fds, errno)
}

pub fn refused_raw(connection: &mut Connection, bytes: Vec<u8>, fds: &[u32], errno: Errno) -> Refusal {
    let command = u16::from_le_bytes([bytes[2], bytes[3]]);
    connection.handle_read(&bytes, fds.iter().map(|fd| FdSlot(*fd)).collect(), false);
    let refusal = match connection.poll_event() {
        Some(Event::Refused {
            command: named,
            refusal,
        }) if named == command => refusal,
        other => panic!("command {command} gave {other:?}"),
    };
    let mut closed = Vec::new();
    while let Some(event) = connection.poll_event() {
        match event {
            Event::CloseDescriptor(slot) => closed.push(slot.0),
            other => panic!("after the refusal: {other:?}"),
        }
    }
    assert_eq!(closed, fds, "every descriptor of a bad request is closed");
    let reply = drain(connection);
    let mut expected = bytes[0..4].to_vec();
    expected.extend(words(&[16, 0x21, errno.0]));
    assert_eq!(reply, expected, "one error reply, header only: {refusal}");
    if connection.phase() == Phase::Ready {
        let next = request(connection, 13, 0, &[], &[]);
        assert_eq!(
            next.command,
            Command::DeviceReset,
            "the stream stays in step after {refusal}"
        );
        connection.reply(&next.handle, &Reply::Done).unwrap();
        drain(connection);
    }
    refusal
}

/// A proper answer to any request.
pub fn answer(request: &Request) -> Reply {
    match &request.command {
        Command::Version(_) => panic!("VERSION is accepted, not answered"),
        Command::DmaMap(_) | Command::DeviceSetIrqs(_) | Command::DeviceReset => Reply::Done,
        Command::DmaUnmap(unmap) => Reply::DmaUnmap(*unmap),
        Command::DeviceGetInfo => Reply::DeviceInfo(DeviceInfo {
            flags: 3,
            regions: 9,
            irqs: 5,
        }),
        Command::DeviceGetRegionInfo { region } => Reply::RegionInfo(RegionInfo {
            region: *region,
            bytes: 16384,
            ..RegionInfo::default()
        }),
        Command::DeviceGetRegionIoFds { region } => Reply::RegionIoFds { region: *region },
        Command::DeviceGetIrqInfo { index } => Reply::IrqInfo(IrqInfo {
            flags: 1,
            index: *index,
            count: 16,
        }),
        Command::RegionRead(access) => Reply::RegionRead {
            access: *access,
            data: vec![0x5a; access.bytes() as usize],
        },
        Command::RegionWrite(write) => Reply::RegionWrite(write.access()),
        Command::RegionWriteMulti(writes) => Reply::RegionWriteMulti {
            count: writes.len() as u64,
        },
        Command::DeviceFeature(_) => Reply::Error(Errno::EOPNOTSUPP),
    }
}

/// The kernel's stream socket: what one `sendmsg` sent is one buffer; one read crosses buffers, but stops
/// behind one that carried descriptors, and hands those out with its first byte.
#[derive(Default)]
pub struct KernelModel {
    buffers: VecDeque<(VecDeque<u8>, Vec<u32>)>,
}

impl KernelModel {
    pub fn send(&mut self, bytes: &[u8], fds: &[u32]) {
        self.buffers
            .push_back((bytes.iter().copied().collect(), fds.to_vec()));
    }

    pub fn read(&mut self, bytes_max: usize) -> (Vec<u8>, Vec<FdSlot>) {
        let (mut bytes, mut slots) = (Vec::new(), Vec::new());
        while bytes.len() < bytes_max {
            let Some((data, fds)) = self.buffers.front_mut() else {
                break;
            };
            if !fds.is_empty() && !slots.is_empty() {
                break;
            }
            slots.extend(fds.drain(..).map(FdSlot));
            let step = data.len().min(bytes_max - bytes.len());
            bytes.extend(data.drain(..step));
            if !data.is_empty() {
                break;
            }
            self.buffers.pop_front();
            if !slots.is_empty() {
                break;
            }
        }
        (bytes, slots)
    }
}
