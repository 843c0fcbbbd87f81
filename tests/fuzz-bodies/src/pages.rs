//! Core against a hostile front: pages of any words that change at any time, memory objects of any kind, packets of any bytes. (The front
//! against a hostile core: `registers` and `front`.)

use crate::edits::{edge, edit};
use crate::rings::{any_setup, bounded};
use arbitrary::{Result, Unstructured};
use rustix::fd::{AsFd, OwnedFd};
use rustix::net::{SendFlags, send};
use serde::Serialize;
use serde::de::DeserializeOwned;
use vmgmt_abi::Submission;
use vmgmt_device::page::{CorePage, FrontPage, Interrupts, MapRecord, PortSubmission, Words, control};
use vmgmt_device::rings::{Answer, Input, Output, STATE_WORDS};
use vmgmt_device::{Direction, GuestMemory, MemoryError, Tick};
use vmgmt_host::channel::{Channel, ChannelError};
use vmgmt_host::core::memory::MemoryLimits;
use vmgmt_host::core::sessions::Session;
use vmgmt_host::messages::{
    CoreToFront, CoreToKeeper, FrontToCore, FrontToKeeper, KeeperToCore, KeeperToFront,
};
use vmgmt_host::words::{MappedWords, create_page};
use zerocopy::IntoBytes;

const MAPS: usize = 16;
const RAM_BYTES: u64 = 1 << 18;

pub fn run(bytes: &[u8]) {
    let mut u = Unstructured::new(bytes);
    let _ = choose(&mut u);
}

fn choose(u: &mut Unstructured<'_>) -> Result<()> {
    if u.ratio(1, 6)? { packets(u) } else { session(u) }
}

/// One packet that was good, edited, and read as `T`: it decodes, or is an error.
fn read<T: DeserializeOwned + Serialize>(bytes: &[u8]) {
    let (ours, theirs) = Channel::pair().unwrap();
    send(ours.as_fd(), bytes, SendFlags::NOSIGNAL).unwrap();
    match theirs.receive::<T>() {
        Ok(Some(packet)) => {
            // What decoded is a packet that can be sent.
            let again = ours.send(&packet.header, &packet.payload, &[]);
            assert!(
                again.is_ok() || matches!(again, Err(ChannelError::Malformed(_))),
                "{again:?}"
            );
        }
        Ok(None) => panic!("the packet is lost"),
        Err(ChannelError::Malformed(_)) => {}
        // A packet without bytes is the end of the channel.
        Err(ChannelError::Closed) => assert!(bytes.is_empty()),
        Err(error) => panic!("{error}"),
    }
}

fn packets(u: &mut Unstructured<'_>) -> Result<()> {
    let header = match u.int_in_range(0..=4u8)? {
        0 => cbor(&FrontToCore::Vectors {
            session: edge(u)?,
            present: u.arbitrary()?,
        }),
        1 => cbor(&CoreToFront::DmaRead {
            session: edge(u)?,
            request: edge(u)?,
            fence: edge(u)?,
            iova: edge(u)?,
            bytes: u.arbitrary()?,
        }),
        2 => cbor(&KeeperToFront::Refused {
            session: edge(u)?,
            reason: "held".into(),
        }),
        3 => cbor(&FrontToKeeper::CoreStuck {
            life: edge(u)?,
            innocent: false,
        }),
        _ => u.bytes(u.len().min(64))?.to_vec(),
    };
    let mut bytes = (header.len() as u32).to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.extend(b"payload");
    edit(u, &mut bytes)?;
    match u.int_in_range(0..=5u8)? {
        0 => read::<FrontToCore>(&bytes),
        1 => read::<CoreToFront>(&bytes),
        2 => read::<KeeperToFront>(&bytes),
        3 => read::<FrontToKeeper>(&bytes),
        4 => read::<KeeperToCore>(&bytes),
        _ => read::<CoreToKeeper>(&bytes),
    }
    Ok(())
}

fn cbor(value: &impl Serialize) -> Vec<u8> {
    let mut bytes = Vec::new();
    ciborium::into_writer(value, &mut bytes).unwrap();
    bytes
}

/// A memory object: as QEMU makes them, without a seal, empty, a pipe.
fn object(u: &mut Unstructured<'_>) -> Result<OwnedFd> {
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
    let kind = u.int_in_range(0..=5u8)?;
    if kind == 5 {
        return Ok(rustix::pipe::pipe().unwrap().0);
    }
    let fd = memfd_create("object", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, if kind == 4 { 0 } else { RAM_BYTES }).unwrap();
    if kind < 3 {
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW).unwrap();
    }
    Ok(fd)
}

fn any_map(u: &mut Unstructured<'_>, number: u64) -> Result<MapRecord> {
    let wild = u.ratio(1, 5)?;
    let page = |u: &mut Unstructured<'_>| {
        if wild {
            edge(u)
        } else {
            Ok(u.int_in_range(0..=32u64)? << 12)
        }
    };
    Ok(MapRecord {
        number: if wild { edge(u)? } else { number },
        iova: page(u)?,
        bytes: page(u)?,
        object: u.int_in_range(0..=4)?,
        offset: page(u)?,
        rights: u.int_in_range(0..=7)?,
    })
}

/// The core's whole session, as its loop uses it.
fn session(u: &mut Unstructured<'_>) -> Result<()> {
    let words = FrontPage::<MappedWords>::words_needed(MAPS);
    let (front_rw, front_ro) = create_page("front page", words).unwrap();
    let (core_rw, _) = create_page("core page", CorePage::<MappedWords>::WORDS).unwrap();
    let state_words = if u.ratio(1, 16)? { 64 } else { STATE_WORDS };
    let (state, _) = create_page("state", state_words).unwrap();
    let front_words = MappedWords::writable(&front_rw).unwrap();
    let front = FrontPage::new(front_words.clone());
    front.init(7, 3);
    front.set_life(1);
    front.set_generation(1);
    front.set_control(control::BUS_MASTER);
    front.set_interrupts(Interrupts::Message { vectors: 4 });
    front.set_features(u64::MAX);
    CorePage::new(MappedWords::writable(&core_rw).unwrap()).init(7, 1);
    if u.ratio(1, 8)? {
        front_words.store(u.int_in_range(0..=8)?, edge(u)?);
    }
    let mut fds = vec![front_ro, core_rw, state];
    if u.ratio(1, 32)? {
        fds.truncate(u.int_in_range(0..=3)?);
    }
    let limits = MemoryLimits {
        mapped_bytes_max: RAM_BYTES * 2,
        objects_max: 3,
    };
    let Ok(mut session) = Session::attach(7, 0, 3, fds, limits) else {
        return Ok(());
    };
    let mut now = Tick(1_000_000);
    let mut number = 0;
    let mut tail = 0u32;
    let mut held = Vec::new();
    while !u.is_empty() {
        match u.int_in_range(0..=13u8)? {
            0 => front_words.store(u.int_in_range(0..=words)?, edge(u)?),
            1 => {
                // Where rings are set up.
                front_words.store(u.int_in_range(0..=600)?, edge(u)?);
            }
            2 | 3 => {
                number += 1;
                let record = any_map(u, number)?;
                front.set_map(u.int_in_range(0..=MAPS)?, Some(&record));
            }
            4 => {
                front.set_map(u.int_in_range(0..=MAPS)?, None);
                front.move_fence();
            }
            5 => {
                session
                    .memory
                    .object(u.int_in_range(0..=4)?, object(u)?, u.arbitrary()?);
                session.memory.drained();
            }
            6 => session.memory.object_gone(u.int_in_range(0..=4)?),
            7 => {
                let setup = any_setup(u)?;
                front.set_ring(u.int_in_range(0..=15)?, &setup);
            }
            8 => {
                front.set_control(u.int_in_range(0..=31)?);
                front.move_fence();
                if u.arbitrary()? {
                    front.set_generation(front.generation().wrapping_add(1));
                }
            }
            9 => {
                let mut bytes = Submission {
                    opcode: 0x102,
                    length: 64,
                    ..Submission::default()
                }
                .as_bytes()
                .to_vec();
                bytes.extend(u.bytes(u.len().min(32))?);
                front.submit_port(&PortSubmission {
                    sequence: (front.generation() << 32) | u64::from(tail),
                    mode: u.int_in_range(0..=5)?,
                    bytes,
                });
            }
            10 => session.memory.handle_dma_answer(
                now,
                u.int_in_range(0..=8)?,
                if u.arbitrary()? { 0 } else { u.arbitrary()? },
                vec![u.arbitrary()?; *u.choose(&[0usize, 4, 8, 64, 4096, 70_000])?],
            ),
            11 => {
                let present: u32 = u.arbitrary()?;
                let fd = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
                session.set_vectors(present, vec![fd]);
            }
            12 => {
                now = now.after_ns(u64::from(u.arbitrary::<u32>()?));
                session.memory.handle_timeout(now);
            }
            _ => {
                tail = tail.wrapping_add(u32::from(u.int_in_range(0..=9u8)?));
                front.ring_doorbell(u.int_in_range(0..=15)?, tail);
            }
        }
        turn(u, &mut session, now, &mut held)?;
    }
    Ok(())
}

/// A turn as the core's loop makes it.
fn turn(
    u: &mut Unstructured<'_>,
    session: &mut Session,
    now: Tick,
    held: &mut Vec<vmgmt_host::core::memory::Pieces>,
) -> Result<()> {
    session.memory.begin_dma(now);
    session.handle(now, Input::Touched);
    session.handle(now, Input::Poll { budget: 32 });
    while let Some(output) = session.rings.poll_output() {
        if let Output::Submission(fetched) = output {
            bounded(&fetched);
            session.handle(
                now,
                Input::Complete {
                    token: fetched.token,
                    answer: Answer::ok(1),
                    payload: vec![1; 8],
                    confirm: true,
                },
            );
        }
    }
    session.handle(now, Input::TurnEnd);
    while session.rings.poll_output().is_some() {}
    // Guest memory as rooms and effects use it.
    let (iova, bytes) = if u.ratio(1, 4)? {
        (edge(u)?, edge(u)?)
    } else {
        (u.int_in_range(0..=40u64)? << 10, 512)
    };
    let mut buffer = [0; 64];
    let _ = session.memory.read(iova, &mut buffer);
    let _ = session.memory.write(iova, &buffer);
    let _ = session.memory.load_u32(iova & !3);
    let _ = session.memory.store_u64(iova & !7, 3);
    let _ = session.memory.prove(iova & !7, 0);
    let checked = session.memory.check(iova, bytes, Direction::IntoGuest);
    assert_ne!(checked, Err(MemoryError::Pending), "a check asks for nothing");
    if let Ok(pieces) = session.memory.resolve(&[(iova, bytes)], Direction::IntoGuest) {
        let _ = session.memory.read_pieces(&pieces, 0, &mut buffer);
        let _ = session.memory.write_pieces(&pieces, 0, &buffer);
        if u.ratio(1, 4)? && held.len() < 4 {
            held.push(pieces);
        }
    }
    session.memory.end_dma(now);
    session.memory.poll_fences(now);
    if u.ratio(1, 3)? {
        held.clear();
    }
    while session.memory.poll_output(now).is_some() {}
    while session.memory.poll_notice().is_some() {}
    if session.memory.wants_turn() {
        session.memory.drained();
    }
    let _ = session.rings.arm(&session.front, &mut session.memory);
    Ok(())
}
