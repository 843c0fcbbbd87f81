//! What a message costs in the hub: SEND of 64 bytes to a posted RECEIVE, both answers published, as the core's loop drives it.
//! `cargo bench -p vmgmt-core`. Prints nanoseconds for one round (four inputs, seven outputs).

use std::hint::black_box;
use vmgmt_abi::{Mode, Opcode};
use vmgmt_core::policy::{VmConfig, VmLimits};
use vmgmt_core::{Hub, Input, Output};
use vmgmt_device::Tick;
use vmgmt_device::rings::{Channel, Fetched, Token};

const ROUNDS: u32 = 200_000;

fn fetched(session: u64, index: u32, opcode: Opcode, handle: u64, data: Option<Vec<u8>>) -> Input {
    Input::Submission(Box::new(Fetched {
        token: Token {
            session,
            channel: Channel::Ring(0),
            index: index % 256,
            generation: index / 256,
        },
        mode: Mode::CHAT,
        opcode,
        flags: 0,
        tag: index,
        handle,
        offset: 0,
        argument: 0,
        deadline: Tick::NEVER,
        meta: Vec::new(),
        data_bytes: data.as_ref().map_or(512, |data| data.len() as u64),
        data,
        again: false,
    }))
}

/// Nanoseconds this thread was on a CPU: what others do on the machine is not our cost.
fn cpu_ns() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split(' ').next().and_then(|ns| ns.parse().ok()).unwrap_or(0)
}

/// Takes all outputs, as the loop does; returns how many, and the completions that want to be confirmed.
fn drain(hub: &mut Hub, confirming: &mut Vec<Token>) -> u64 {
    let mut count = 0;
    while let Some(output) = hub.poll_output() {
        if let Output::Complete {
            token, confirm: true, ..
        } = &output
        {
            confirming.push(*token);
        }
        black_box(&output);
        count += 1;
    }
    count
}

fn run(vms: u64, posted: u32) -> (f64, u64) {
    let mut hub = Hub::new(1);
    hub.handle(Tick(1), Input::WallClock { now_ns: 1 << 60 });
    for vm in 1..=vms {
        let config = VmConfig {
            vm,
            name: format!("vm{vm}"),
            shares: Vec::new(),
            reach: Vec::new(),
            send_to_all: false,
            limits: VmLimits::default(),
            transient: false,
        };
        hub.handle(Tick(1), Input::Vm(config));
        hub.handle(Tick(1), Input::SessionOpened { session: vm, vm });
    }
    let mut confirming = Vec::new();
    for index in 0..posted {
        hub.handle(Tick(2), fetched(vms, index, Opcode::RECEIVE, 0, None));
    }
    drain(&mut hub, &mut confirming);
    // The kernel adds up at its ticks: a process that has just begun may have nothing on its account yet.
    let begun = std::time::Instant::now();
    while cpu_ns() == 0 && begun.elapsed().as_secs() < 1 {
        std::hint::spin_loop();
    }
    assert_ne!(
        cpu_ns(),
        0,
        "this measurement needs /proc/thread-self/schedstat (CONFIG_SCHED_INFO)"
    );
    let mut outputs = 0;
    let start = cpu_ns();
    for round in 0..ROUNDS {
        let now = Tick(u64::from(round) + 10);
        hub.handle(now, fetched(vms, posted + round, Opcode::RECEIVE, 0, None));
        hub.handle(now, fetched(1, round, Opcode::SEND, vms, Some(vec![0x5a; 64])));
        outputs += drain(&mut hub, &mut confirming);
        for token in confirming.drain(..) {
            hub.handle(
                now,
                Input::Published {
                    token,
                    published: true,
                },
            );
        }
        let mut none = Vec::new();
        outputs += drain(&mut hub, &mut none);
    }
    let ns = (cpu_ns() - start) as f64 / f64::from(ROUNDS);
    assert_eq!(
        outputs,
        u64::from(ROUNDS) * 6,
        "each round: 4 records and 2 completions"
    );
    (ns, outputs)
}

fn main() {
    for (vms, posted) in [(2, 0), (2, 255), (64, 64), (1000, 64)] {
        // The first run warms up.
        run(vms, posted);
        let (ns, _) = run(vms, posted);
        println!("SEND 64 B -> RECEIVE, {vms} VMs, {posted} receives ahead: {ns:.0} ns a message");
    }
}
