//! A snapshot is taken in the middle of what the hub has to say: it and the records behind it tell the hub's story, nothing of it twice.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use vmgmt_abi::{Mode, Opcode};
use vmgmt_core::policy::{VmConfig, VmLimits};
use vmgmt_core::{Hub, Input, Output};
use vmgmt_device::Tick;
use vmgmt_device::rings::{Channel, Fetched, Token};

fn config(vm: u64) -> VmConfig {
    VmConfig {
        vm,
        name: format!("vm{vm}"),
        shares: Vec::new(),
        reach: Vec::new(),
        send_to_all: false,
        limits: VmLimits::default(),
        transient: false,
    }
}

fn send(index: u32) -> Input {
    Input::Submission(Box::new(Fetched {
        token: Token {
            session: 11,
            channel: Channel::Ring(0),
            index,
            generation: 1,
        },
        mode: Mode::CHAT,
        opcode: Opcode::SEND,
        flags: 0,
        tag: index,
        handle: 2,
        offset: 0,
        argument: 0,
        deadline: Tick::NEVER,
        meta: Vec::new(),
        data_bytes: 5,
        data: Some(b"hello".to_vec()),
        again: false,
    }))
}

fn hub() -> Hub {
    let mut hub = Hub::new(1);
    for vm in [1, 2] {
        hub.handle(Tick(1), Input::Vm(config(vm)));
        hub.handle(Tick(1), Input::SessionOpened { session: 10 + vm, vm });
    }
    hub
}

#[test]
fn a_record_that_a_snapshot_has_is_not_written_behind_it() {
    // After each of the outputs of one batch.
    for at in 0..12 {
        let mut hub = hub();
        let mut records = Vec::new();
        let mut snapshot = None;
        (1..=3).for_each(|index| hub.handle(Tick(2), send(index)));
        let mut outputs = 0;
        while let Some(output) = hub.poll_output() {
            if let Output::Journal(record) = output {
                records.push(record);
            }
            if outputs == at {
                snapshot = Some(hub.snapshot());
                hub.drop_records();
                records.clear();
            }
            outputs += 1;
        }
        let replayed = Hub::replay(2, snapshot, records).unwrap();
        assert!(
            replayed.surviving() == hub.surviving(),
            "a snapshot after output {at} of {outputs}: {:#?} instead of {:#?}",
            replayed.surviving(),
            hub.surviving()
        );
    }
}
