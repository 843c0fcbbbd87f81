//! What outlives a process: hub snapshot, journal memory, in-flight table, the function's and the connection's state. Edited or arbitrary,
//! it is refused with an error, or restored to something that says the same when it is saved again, and goes on without harm.

use crate::edits::{edge, edit};
use crate::registers::Driver;
use arbitrary::{Result, Unstructured};
use serde::Serialize;
use vmgmt_abi::{Mode, Opcode, Submission};
use vmgmt_core::interface::{ControlRequest, Input};
use vmgmt_core::policy::{Access, ShareGrant, VmConfig, VmLimits};
use vmgmt_core::{Hub, Output, Record, Saved};
use vmgmt_device::Tick;
use vmgmt_device::page::{LAYOUT, PlainWords, Words};
use vmgmt_device::registers::Function;
use vmgmt_device::rings::testing::{Bed, FlatGuest, FlatMemory, RingPlan};
use vmgmt_device::rings::{Answer, Channel, Fetched, Input as RingInput, Rings, STATE_WORDS, Token};
use vmgmt_host::core::journal::Journal;
use vmgmt_wire::{Command, Connection, Event, FdSlot, ServerOffer};

fn cbor(value: &impl Serialize) -> Vec<u8> {
    let mut bytes = Vec::new();
    ciborium::into_writer(value, &mut bytes).unwrap();
    bytes
}

pub fn run(bytes: &[u8]) {
    let mut u = Unstructured::new(bytes);
    let _ = choose(&mut u);
}

fn choose(u: &mut Unstructured<'_>) -> Result<()> {
    match u.int_in_range(0..=5u8)? {
        0 => hub(u),
        1 => records(u),
        2 => journal(u),
        3 => table(u),
        4 => function(u),
        _ => connection(u),
    }
}

fn vm(vm: u64) -> VmConfig {
    VmConfig {
        vm,
        name: format!("vm{vm}"),
        shares: vec![ShareGrant {
            share: "pub".into(),
            access: Access::ReadWrite,
        }],
        reach: vec![],
        send_to_all: true,
        limits: VmLimits::default(),
        transient: vm == 2,
    }
}

/// A submission of any operation, as the rings would hand it over.
fn fetched(u: &mut Unstructured<'_>, index: u32) -> Result<Box<Fetched>> {
    let opcode = Opcode(*u.choose(&[
        0x101u16, 0x102, 0x103, 0x104, 0x105, 0x106, 0x107, 0x108, 0x109, 0x10a, 0x10b, 0x10c, 0x201, 0x202,
        0x203, 0x204, 0x205, 0x206, 0x207, 0x208, 0x209,
    ])?);
    let mode = opcode.mode();
    let channel = if mode == Mode::FILE { 0 } else { 1 };
    let body_bytes = u.int_in_range(0..=12)?;
    let body = u.bytes(u.len().min(body_bytes))?.to_vec();
    Ok(Box::new(Fetched {
        token: Token {
            session: 10 + u.int_in_range(0..=1u64)?,
            channel: Channel::Ring(channel),
            index,
            generation: 1,
        },
        mode,
        opcode,
        flags: if u.ratio(1, 8)? { u.int_in_range(0..=7)? } else { 0 },
        tag: index,
        handle: u.int_in_range(0..=4)?,
        offset: if u.ratio(1, 4)? { edge(u)? } else { 0 },
        argument: u.int_in_range(0..=3)?,
        deadline: if u.ratio(1, 4)? {
            Tick(2_000_000)
        } else {
            Tick::NEVER
        },
        meta: u
            .choose(&[&b"pub/a"[..], b"pub/b", b"name", b"", b"pub"])?
            .to_vec(),
        data_bytes: body.len() as u64,
        data: Some(body),
        again: u.ratio(1, 16)?,
    }))
}

/// A hub that has seen something, and the records it gave.
fn some_hub(u: &mut Unstructured<'_>) -> Result<(Hub, Vec<Record>)> {
    let mut hub = Hub::new(1);
    let now = Tick(1_000_000);
    let mut records = Vec::new();
    hub.handle(now, Input::WallClock { now_ns: 1 << 60 });
    for number in 1..=2 {
        hub.handle(now, Input::Vm(vm(number)));
        let session = 9 + number;
        hub.handle(now, Input::SessionOpened { session, vm: number });
    }
    for n in 0..u.int_in_range(0..=10u32)? {
        match u.int_in_range(0..=6u8)? {
            0 => {
                let request = ControlRequest::Send {
                    key: 0,
                    target: "vm1".into(),
                    message: vec![n as u8; 9],
                };
                hub.handle(
                    now,
                    Input::Control {
                        client: 1,
                        id: n.into(),
                        request,
                    },
                );
            }
            1 => {
                let request = ControlRequest::Receive {
                    follow: false,
                    wait_ns: 1000,
                };
                hub.handle(
                    now,
                    Input::Control {
                        client: 1,
                        id: n.into(),
                        request,
                    },
                );
            }
            _ => hub.handle(now, Input::Submission(fetched(u, n)?)),
        }
        // Without outputs there is more to save: those not polled yet.
        if u.ratio(3, 4)? {
            while let Some(output) = hub.poll_output() {
                if let Output::Journal(record) = output {
                    records.push(record);
                }
            }
        }
    }
    Ok((hub, records))
}

/// Whatever was restored must bear some life.
fn live(u: &mut Unstructured<'_>, mut hub: Hub) -> Result<()> {
    let mut now = Tick(3_000_000);
    for n in 0..6u32 {
        hub.handle_timeout(now);
        let request = if n % 2 == 0 {
            ControlRequest::Vms
        } else {
            ControlRequest::Peers
        };
        hub.handle(
            now,
            Input::Control {
                client: 9,
                id: n.into(),
                request,
            },
        );
        hub.handle(now, Input::Submission(fetched(u, 100 + n)?));
        now = now.after_ns(1 << (n * 6));
        for _ in 0..10_000 {
            if hub.poll_output().is_none() {
                break;
            }
        }
    }
    hub.handle(now, Input::SessionReset { session: 10 });
    hub.handle(now, Input::SessionClosed { session: 11 });
    hub.handle(now, Input::VmGone { vm: 1 });
    Ok(())
}

fn hub(u: &mut Unstructured<'_>) -> Result<()> {
    let mut bytes = if u.ratio(1, 8)? {
        u.bytes(u.len())?.to_vec()
    } else {
        let (hub, _) = some_hub(u)?;
        let saved = hub.save();
        let again = Hub::restore(Saved::from_bytes(&saved.to_bytes()).expect("our own bytes"))
            .expect("our own state is restored");
        assert_eq!(again.save(), saved, "packing is invisible");
        saved.to_bytes()
    };
    edit(u, &mut bytes)?;
    let Ok(saved) = Saved::from_bytes(&bytes) else {
        return Ok(());
    };
    // After a crash only the surviving part is taken.
    if let Ok(hub) = Hub::replay(2, Some(saved.clone()), []) {
        live(u, hub)?;
    }
    let Ok(restored) = Hub::restore(saved) else {
        return Ok(());
    };
    let packed = restored.save();
    let twice = Hub::restore(packed.clone()).expect("what was restored and saved is restored again");
    assert_eq!(twice.save(), packed);
    live(u, restored)
}

/// Journal records, each edited, dropped, doubled or in another order.
fn records(u: &mut Unstructured<'_>) -> Result<()> {
    let (_, records) = some_hub(u)?;
    let mut edited = Vec::new();
    for record in records {
        let mut bytes = Vec::new();
        record.write(&mut bytes);
        if u.ratio(1, 2)? {
            edit(u, &mut bytes)?;
        }
        for _ in 0..u.int_in_range(0..=2u8)? {
            edited.extend(Record::read(&bytes));
        }
    }
    if u.arbitrary()? {
        edited.reverse();
    }
    let hub = Hub::replay(2, None, edited).expect("records alone are never refused");
    let saved = hub.save();
    let restored = Hub::restore(saved.clone()).expect("what a replay gave is saved and restored");
    assert_eq!(restored.save(), saved);
    live(u, hub)
}

/// Memory of a journal that somebody wrote into.
fn journal(u: &mut Unstructured<'_>) -> Result<()> {
    let count = u.int_in_range(0..=200usize)?;
    let words = PlainWords::new(count);
    if let Ok(mut journal) = Journal::open(words.clone()) {
        for _ in 0..u.int_in_range(0..=6u8)? {
            let bytes = vec![u.arbitrary()?; u.int_in_range(0..=60)?];
            let _ = if u.ratio(1, 3)? {
                journal.snapshot(&bytes)
            } else {
                journal.append(&bytes)
            };
        }
    }
    for _ in 0..u.int_in_range(0..=12u8)? {
        let value = if u.ratio(1, 8)? { LAYOUT } else { edge(u)? };
        words.store(u.int_in_range(0..=count)?, value);
    }
    let Ok(mut journal) = Journal::open(words) else {
        return Ok(());
    };
    let Ok(found) = journal.recover() else {
        // Refused; the writer's verbs must still not harm.
        let _ = journal.journal_bytes();
        let _ = journal.append(b"record");
        let _ = journal.snapshot(b"snapshot");
        let _ = journal.recover();
        return Ok(());
    };
    let _ = journal.journal_bytes();
    if journal.append(b"one more").is_ok() {
        let mut expected = found.records.clone();
        expected.push(b"one more".to_vec());
        assert_eq!(journal.recover().unwrap().records, expected);
    }
    if journal.snapshot(b"fresh").is_ok() {
        let after = journal.recover().unwrap();
        assert_eq!((after.snapshot, after.records), (Some(b"fresh".to_vec()), vec![]));
    }
    Ok(())
}

/// The in-flight table of a session, with words changed under the core that takes it over.
fn table(u: &mut Unstructured<'_>) -> Result<()> {
    let guest = FlatGuest::new(1 << 20);
    let mut bed = Bed::new(&guest, FlatMemory::new(&guest), PlainWords::new).unwrap();
    let mut plan = RingPlan::new(0, 0, 16, 16, 1);
    bed.enable(&mut plan);
    for tag in 0..u.int_in_range(0..=12u32)? {
        let submission = Submission {
            tag,
            opcode: 0x102,
            buffer: 0x4_0000,
            length: 64,
            meta_bytes: 5,
            ..Submission::default()
        };
        plan.submit(&guest, &submission);
    }
    bed.poll(16);
    for output in bed.outputs() {
        if let vmgmt_device::rings::Output::Submission(fetched) = output
            && u.arbitrary()?
        {
            bed.handle(RingInput::Complete {
                token: fetched.token,
                answer: Answer::ok(1),
                payload: vec![],
                confirm: u.arbitrary()?,
            });
        }
    }
    for _ in 0..u.int_in_range(0..=12u8)? {
        // Most of the memory is never looked at: near its start and near the first ring's records is where something is.
        let at = match u.int_in_range(0..=2u8)? {
            0 => u.int_in_range(0..=127)?,
            1 => u.int_in_range(0..=2047)?,
            _ => u.int_in_range(0..=STATE_WORDS)?,
        };
        let value = if u.arbitrary()? {
            edge(u)?
        } else {
            bed.state.load(at) ^ (1 << u.int_in_range(0..=63u8)?)
        };
        bed.state.store(at, value);
    }
    let attached = Rings::attach(bed.settings, bed.state.clone(), &bed.front, &bed.core);
    let Ok(rings) = attached else { return Ok(()) };
    bed.rings = rings;
    for _ in 0..4 {
        bed.touch();
        bed.poll(64);
        for output in bed.outputs() {
            if let vmgmt_device::rings::Output::Submission(fetched) = output {
                crate::rings::bounded(&fetched);
                bed.handle(RingInput::Complete {
                    token: fetched.token,
                    answer: Answer::ok(2),
                    payload: vec![1; 8],
                    confirm: false,
                });
            }
        }
        bed.end_turn();
        while plan.take(&guest).is_some() {}
    }
    Ok(())
}

fn function(u: &mut Unstructured<'_>) -> Result<()> {
    let mut driver = Driver::new(u)?;
    for _ in 0..u.int_in_range(0..=12u8)? {
        let step = driver.step(u);
        driver.check();
        step?;
    }
    let mut bytes = cbor(&driver.function.save().expect("all outputs are polled"));
    edit(u, &mut bytes)?;
    let Ok(saved) = ciborium::from_reader(bytes.as_slice()) else {
        return Ok(());
    };
    let Ok(mut restored) = Function::restore(saved, driver.words.clone(), &driver.cores) else {
        return Ok(());
    };
    while restored.poll_output().is_some() {}
    if let Some(packed) = restored.save() {
        let twice = Function::restore(packed.clone(), driver.words.clone(), &driver.cores);
        assert_eq!(
            twice.expect("what was restored is restored again").save(),
            Some(packed)
        );
    }
    // It may hold other descriptors and requests than the driver knows: it must live, not agree with it.
    driver.function = restored;
    for _ in 0..12 {
        driver.step(u)?;
        while driver.function.poll_output().is_some() {}
    }
    Ok(())
}

fn connection(u: &mut Unstructured<'_>) -> Result<()> {
    let mut connection = Connection::new();
    for n in 0..u.int_in_range(0..=6u16)? {
        let command = if n == 0 {
            1
        } else {
            *u.choose(&crate::wire::COMMANDS)?
        };
        let body = crate::wire::body(u, command)?;
        let mut bytes = crate::wire::message(n, command, 0, 0, &body, None);
        bytes.truncate(u.int_in_range(0..=bytes.len() * 4)?.max(1));
        connection.handle_read(&bytes, vec![FdSlot(n.into())], false);
        while let Some(event) = connection.poll_event() {
            if let Event::Request(request) = event {
                if matches!(request.command, Command::Version(_)) {
                    let _ = connection.accept_version(&request.handle, &ServerOffer::default());
                }
                let _ = connection.send_dma_write(u64::from(n) << 12, &[7; 9], n.into());
            }
        }
        connection.advance_output(u.int_in_range(0..=40)?);
    }
    let mut bytes = cbor(&connection.save());
    edit(u, &mut bytes)?;
    let Ok(saved) = ciborium::from_reader(bytes.as_slice()) else {
        return Ok(());
    };
    let Ok(mut restored) = Connection::restore(saved) else {
        return Ok(());
    };
    let packed = restored.save();
    let twice = Connection::restore(packed.clone()).expect("what was restored is restored again");
    assert_eq!(twice.save(), packed);
    for n in 0..4u16 {
        let body = crate::wire::body(u, 9)?;
        restored.handle_read(
            &crate::wire::message(n, 9, 0, 0, &body, None),
            vec![FdSlot(99)],
            false,
        );
        while restored.poll_event().is_some() {}
        restored.drop_unsent_dma();
        restored.advance_output(17);
        let _ = restored.send_dma_read(0, 8, 1);
    }
    Ok(())
}
