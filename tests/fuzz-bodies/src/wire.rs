//! The wire decoder: a conversation of any messages with any descriptors, cut anywhere, packed anywhere, gives the same requests, the same
//! bytes back and the same descriptors; none is forgotten.

use crate::edits::edge;
use arbitrary::{Result, Unstructured};
use std::collections::VecDeque;
use vmgmt_wire::uapi::user;
use vmgmt_wire::*;

const CAPABILITIES: &str = r#"{"capabilities": {"pgsizes": 4096, "max_msg_fds": 16, "max_dma_maps": 65535, "max_data_xfer_size": 1048576, "write_multiple": true}}"#;

struct Sent {
    bytes: Vec<u8>,
    fds: Vec<u32>,
}

/// A message with header and body; the length it claims is mostly right.
pub fn message(id: u16, command: u16, flags: u32, error: u32, body: &[u8], claimed: Option<u32>) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(16 + body.len());
    bytes.extend(id.to_le_bytes());
    bytes.extend(command.to_le_bytes());
    bytes.extend(claimed.unwrap_or(16 + body.len() as u32).to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend(error.to_le_bytes());
    bytes.extend(body);
    bytes
}

fn words32(u: &mut Unstructured<'_>, first: &[u32]) -> Result<Vec<u8>> {
    let mut body = Vec::new();
    for word in first {
        let word = if u.ratio(1, 12)? { edge(u)? as u32 } else { *word };
        body.extend(word.to_le_bytes());
    }
    Ok(body)
}

/// An address or length that often fits another one.
fn page(u: &mut Unstructured<'_>) -> Result<u64> {
    if u.ratio(1, 6)? {
        edge(u)
    } else {
        Ok(u64::from(u.int_in_range(0..=40u8)?) << 12)
    }
}

/// The body of a command, mostly well formed.
pub fn body(u: &mut Unstructured<'_>, command: u16) -> Result<Vec<u8>> {
    let small = u32::from(u.int_in_range(0..=20u8)?);
    let mut body = match command {
        user::VFIO_USER_VERSION => {
            let mut body = words32(u, &[0])?;
            if u.ratio(3, 4)? {
                body.extend(CAPABILITIES.as_bytes());
                body.push(0);
            }
            body
        }
        user::VFIO_USER_DMA_MAP => {
            let mut body = words32(u, &[32, small & 3])?;
            for word in [page(u)?, page(u)?, page(u)?] {
                body.extend(word.to_le_bytes());
            }
            body
        }
        user::VFIO_USER_DMA_UNMAP => {
            let mut body = words32(u, &[24, if small == 0 { 2 } else { 0 }])?;
            for word in [page(u)?, page(u)?] {
                body.extend(word.to_le_bytes());
            }
            body
        }
        user::VFIO_USER_DEVICE_GET_INFO => words32(u, &[16, 0, 0, 0])?,
        user::VFIO_USER_DEVICE_GET_REGION_INFO => words32(u, &[32, 0, small % 10, 0, 0, 0, 0, 0])?,
        user::VFIO_USER_DEVICE_GET_REGION_IO_FDS => words32(u, &[16, 0, small % 10, 0])?,
        user::VFIO_USER_DEVICE_GET_IRQ_INFO => words32(u, &[16, 0, small % 6, 0])?,
        user::VFIO_USER_DEVICE_SET_IRQS => {
            let kinds = [0x21, 0x22, 0x24, 0x0c, 0x14, 0x24, 0x24, 0x09];
            let kind = *u.choose(&kinds)?;
            words32(u, &[20, kind, small % 6, 0, small / 6])?
        }
        user::VFIO_USER_REGION_READ | user::VFIO_USER_REGION_WRITE => {
            let (region, offset) = place(u)?;
            let count = *u.choose(&[4u32, 1, 2, 8, 64])?;
            let mut body = offset.to_le_bytes().to_vec();
            body.extend(words32(u, &[region, count])?);
            if command == user::VFIO_USER_REGION_WRITE {
                let data: [u8; 8] = u.arbitrary()?;
                body.extend((0..count as usize).map(|n| data[n % 8]));
            }
            body
        }
        user::VFIO_USER_REGION_WRITE_MULTI => {
            let count = u.int_in_range(0..=4u64)?;
            let mut body = count.to_le_bytes().to_vec();
            for _ in 0..count {
                let (region, offset) = place(u)?;
                body.extend(offset.to_le_bytes());
                body.extend(words32(u, &[region, 4])?);
                body.extend(u.arbitrary::<u64>()?.to_le_bytes());
            }
            body
        }
        _ => {
            let count = u.int_in_range(0..=40usize)?;
            u.bytes(u.len().min(count))?.to_vec()
        }
    };
    if u.ratio(1, 16)? {
        crate::edits::edit(u, &mut body)?;
    }
    Ok(body)
}

/// A region and an offset where something is, mostly.
pub fn place(u: &mut Unstructured<'_>) -> Result<(u32, u64)> {
    Ok(match u.int_in_range(0..=6u8)? {
        0 => (0, u64::from(u.int_in_range(0..=0x1bu8)?) * 4),
        1 => (0, 0x400 + u64::from(u.int_in_range(0..=0x5fu8)?) * 4),
        2 => (0, 0x2000 + u64::from(u.int_in_range(0..=7u8)?) * 4),
        3 => (2, u64::from(u.int_in_range(0..=0x41u8)?)),
        4 => (7, u64::from(u.int_in_range(0..=0xb0u8)?)),
        5 => (4, u64::from(u.int_in_range(0..=0x120u16)?)),
        _ => (u.arbitrary::<u8>()?.into(), edge(u)?),
    })
}

pub const COMMANDS: [u16; 16] = [1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10, 13, 15, 16, 11];

/// The messages, and whether each is as long as it claims.
fn conversation(u: &mut Unstructured<'_>) -> Result<(Vec<Sent>, bool)> {
    let mut in_step = true;
    let mut all = Vec::new();
    let mut next_fd = 0;
    if u.ratio(7, 8)? {
        let mut body = vec![0; 4];
        body.extend(CAPABILITIES.as_bytes());
        body.push(0);
        all.push(Sent {
            bytes: message(0, 1, 0, 0, &body, None),
            fds: vec![],
        });
    }
    while !u.is_empty() && all.len() < 40 {
        let command = if u.ratio(1, 16)? {
            u.arbitrary()?
        } else {
            *u.choose(&COMMANDS)?
        };
        let flags = match u.int_in_range(0..=11u8)? {
            0 => 0x10,
            1 => 1,
            2 => 0x21,
            3 => u.arbitrary()?,
            _ => 0,
        };
        let error = if u.ratio(1, 12)? { u.arbitrary()? } else { 0 };
        let body = body(u, command)?;
        let claimed = if u.ratio(1, 40)? {
            Some(edge(u)? as u32)
        } else {
            None
        };
        in_step &= claimed.is_none();
        let fds = match u.int_in_range(0..=15u8)? {
            0..=7 => 0,
            8..=12 => 1,
            13 | 14 => u.int_in_range(0..=17)?,
            _ => u.int_in_range(0..=253)?,
        };
        // More than can wait in one message are closed as they come, so that the cut decides which: see `raw`.
        let fds = fds.min((limits::QUEUED_DESCRIPTORS_MAX as u32).saturating_sub(next_fd));
        // What the client answers to us has our small numbers.
        let id = if u.ratio(1, 2)? {
            u16::from(u.int_in_range(0..=6u8)?)
        } else {
            u.arbitrary()?
        };
        all.push(Sent {
            bytes: message(id, command, flags, error, &body, claimed),
            fds: (next_fd..next_fd + fds).collect(),
        });
        next_fd += fds;
    }
    Ok((all, in_step))
}

/// The kernel's stream socket: a read crosses messages, but stops behind one that carried descriptors.
struct Kernel(VecDeque<(VecDeque<u8>, Vec<u32>)>);

impl Kernel {
    fn read(&mut self, bytes_max: usize) -> (Vec<u8>, Vec<FdSlot>) {
        let (mut bytes, mut slots) = (Vec::new(), Vec::new());
        while bytes.len() < bytes_max {
            let Some((data, fds)) = self.0.front_mut() else {
                break;
            };
            slots.extend(fds.drain(..).map(FdSlot));
            let step = data.len().min(bytes_max - bytes.len());
            bytes.extend(data.drain(..step));
            if !data.is_empty() {
                break;
            }
            self.0.pop_front();
            if !slots.is_empty() {
                break;
            }
        }
        (bytes, slots)
    }
}

#[derive(Debug, PartialEq)]
struct Seen {
    events: Vec<Event>,
    closed: Vec<FdSlot>,
    output: Vec<u8>,
    phase: Phase,
    counters: Counters,
}

fn repack(connection: Connection) -> Connection {
    let mut bytes = Vec::new();
    ciborium::into_writer(&connection.save(), &mut bytes).unwrap();
    let restored = Connection::restore(ciborium::from_reader(bytes.as_slice()).unwrap()).unwrap();
    assert_eq!(restored.save(), connection.save());
    restored
}

fn answer(request: &Request) -> Reply {
    match &request.command {
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
        Command::Version(_) | Command::DmaMap(_) | Command::DeviceSetIrqs(_) | Command::DeviceReset => {
            Reply::Done
        }
    }
}

fn converse(conversation: &[Sent], reads: &[usize], hand_overs: bool) -> Seen {
    let buffers = conversation
        .iter()
        .map(|sent| (sent.bytes.iter().copied().collect(), sent.fds.clone()));
    let mut kernel = Kernel(buffers.collect());
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
        let (bytes, slots) = kernel.read(sizes.next().unwrap_or(1).max(1));
        if bytes.is_empty() {
            break;
        }
        connection.handle_read(&bytes, slots, false);
        if hand_overs {
            connection = repack(connection);
        }
        while let Some(event) = connection.poll_event() {
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
                    let replied = connection.reply(&request.handle, &answer(request));
                    assert!(
                        replied.is_ok()
                            || request.handle.no_reply
                            || replied == Err(ReplyRefused::Mismatch)
                            || connection.forget_reply(&request.handle),
                        "{request:?}: {replied:?}"
                    );
                    cookie += 1;
                    let _ = connection.send_dma_read(cookie << 12, 16, cookie);
                }
                _ => {}
            }
            seen.events.push(event);
            let mut piece = 5;
            while let Some(pending) = connection.pending_output() {
                let step = pending.bytes.len().min(piece);
                seen.output.extend_from_slice(&pending.bytes[..step]);
                connection.advance_output(step);
                piece += 700;
                if hand_overs {
                    connection = repack(connection);
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

/// Bytes as they come, with descriptors and losses at any read.
fn raw(u: &mut Unstructured<'_>) -> Result<()> {
    let mut connection = Connection::new();
    let mut slot = 0;
    while !u.is_empty() {
        let count = u.int_in_range(0..=u.len().min(600))?;
        let fds = if u.ratio(1, 4)? {
            u.int_in_range(0..=253u32)?
        } else {
            0
        };
        let lost = u.ratio(1, 16)?;
        let bytes = u.bytes(count.min(u.len()))?;
        connection.handle_read(bytes, (slot..slot + fds).map(FdSlot).collect(), lost);
        slot += fds;
        while let Some(event) = connection.poll_event() {
            if let Event::Request(request) = event {
                if matches!(request.command, Command::Version(_)) {
                    let _ = connection.accept_version(&request.handle, &ServerOffer::default());
                } else if u.ratio(3, 4)? {
                    let _ = connection.reply(&request.handle, &answer(&request));
                }
            }
            if u.ratio(1, 8)? {
                connection = repack(connection);
            }
        }
    }
    Ok(())
}

pub fn run(bytes: &[u8]) {
    let mut u = Unstructured::new(bytes);
    let _ = structured(&mut u);
}

fn structured(u: &mut Unstructured<'_>) -> Result<()> {
    if u.ratio(1, 8)? {
        return raw(u);
    }
    let reads: Vec<usize> = (0..u.int_in_range(1..=8u8)?)
        .map(|_| u.int_in_range(1..=300usize))
        .collect::<Result<_>>()?;
    let hand_overs = u.arbitrary()?;
    let (conversation, in_step) = conversation(u)?;
    let whole = converse(&conversation, &[usize::MAX], false);
    let cut = converse(&conversation, &reads, hand_overs);
    // Descriptors that came with bytes of more than one message belong to whom the cut says (wire/src/input.rs).
    if in_step {
        assert_eq!(whole, cut);
    }
    nothing_is_forgotten(&conversation, whole);
    nothing_is_forgotten(&conversation, cut);
    Ok(())
}

/// Every descriptor is with a request, or was closed.
fn nothing_is_forgotten(conversation: &[Sent], seen: Seen) {
    let mut slots = seen.closed;
    for event in &seen.events {
        if let Event::Request(request) = event {
            match &request.command {
                Command::DmaMap(map) => slots.extend(map.descriptor),
                Command::DeviceSetIrqs(SetIrqs {
                    operation: IrqOperation::Assign { eventfds, .. },
                    ..
                }) => slots.extend(eventfds),
                _ => {}
            }
        }
    }
    slots.sort();
    let sent: Vec<FdSlot> = conversation
        .iter()
        .flat_map(|sent| sent.fds.iter().copied().map(FdSlot))
        .collect();
    assert_eq!(slots, sent);
}
