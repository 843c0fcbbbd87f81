//! The real driver against the real `vmgmtd`, without QEMU: every mode, every way to share memory, every kind of interrupt, and a core
//! that dies meanwhile.
//!
//! A simulated guest (test kit, `guest`) is the driver over a socket, with a memfd as RAM. What is tested with it is everything but
//! QEMU, the guest's kernel and its IOMMU.

#[path = "in_process/chat.rs"]
mod chat;
#[path = "in_process/core_dies.rs"]
mod core_dies;
#[path = "in_process/files.rs"]
mod files;
#[path = "in_process/freeze.rs"]
mod freeze;
#[path = "in_process/freeze_fails.rs"]
mod freeze_fails;
#[path = "in_process/interrupts.rs"]
mod interrupts;
#[path = "in_process/memory.rs"]
mod memory;
#[path = "in_process/rules.rs"]
mod rules;
#[path = "in_process/streams.rs"]
mod streams;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use vmgmt_driver::{Client, Mode, TransferOptions};
use vmgmt_testkit::guest::{GuestInterrupts, GuestOptions, SimulatedVm, Site, SitePlan};
use vmgmt_testkit::process::wait_until;

/// Long enough for a loaded machine; nothing here waits for its end.
const PATIENCE: Duration = Duration::from_secs(60);

fn site(vms: usize) -> Result<Site> {
    SitePlan::new(env!("CARGO_BIN_EXE_vmgmtd"), vms).start()
}

/// Bytes that no shift, no hole and no repetition leaves the same.
fn pattern(bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut data = Vec::with_capacity(bytes + 8);
    while data.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        data.extend_from_slice(&state.to_le_bytes());
    }
    data.truncate(bytes);
    data
}

fn deadline() -> Option<Instant> {
    Some(Instant::now() + PATIENCE)
}

/// Echoes of many lengths.
fn echoes(client: &mut Client) -> Result<()> {
    for bytes in [0, 1, 2, 3, 4, 5, 63, 64, 65, 1000, 2047, 2048] {
        let sent = pattern(bytes, bytes as u64);
        let back = client
            .echo(&sent)
            .with_context(|| format!("echo of {bytes} bytes"))?;
        ensure!(back == sent, "an echo of {bytes} bytes came back different");
    }
    Ok(())
}

#[test]
fn echo_comes_back_in_every_mode_by_ring_and_by_port() -> Result<()> {
    let site = site(1)?;
    let pids = site.pids()?;
    let vm = site.vm(0)?;
    for mode in [Mode::COMMON, Mode::FILE, Mode::CHAT] {
        echoes(&mut vm.ring(mode).with_context(|| format!("a ring in {mode:?}"))?)?;
        echoes(&mut vm.ports(mode).with_context(|| format!("the ports in {mode:?}"))?)?;
    }
    // As large as meta may be, which the port window takes too.
    let sent = pattern(4096, 7);
    ensure!(vm.ring(Mode::COMMON)?.echo(&sent)? == sent);
    site.check_unharmed(pids)
}

#[test]
fn all_rings_work_at_once() -> Result<()> {
    let site = site(1)?;
    let vm = site.vm(0)?;
    let count = vm.device().facts().ring_count;
    let mut rings: Vec<Client> = (0..count).map(|_| vm.ring(Mode::COMMON)).collect::<Result<_>>()?;
    ensure!(
        vm.ring(Mode::COMMON).is_err(),
        "there were more rings than the device says"
    );
    for round in 0..20 {
        for ring in &mut rings {
            let sent = pattern(512, round);
            ensure!(ring.echo(&sent)? == sent);
        }
    }
    drop(rings);
    vm.ring(Mode::COMMON)?.noop()?;
    Ok(())
}

#[test]
fn the_host_knows_who_it_is() -> Result<()> {
    let site = site(2)?;
    for number in 0..2 {
        let vm = site.vm(number)?;
        let name = format!("vm{number}");
        ensure!(vm.ring(Mode::COMMON)?.identity()?.name == name);
        ensure!(vm.ports(Mode::COMMON)?.identity()?.name == name);
    }
    Ok(())
}

fn works_with(options: GuestOptions) -> Result<SimulatedVm> {
    let site = site(1)?;
    let pids = site.pids()?;
    let vm = site.vm_with(0, options)?;
    let mut ring = vm.ring(Mode::FILE)?;
    for _ in 0..20 {
        echoes(&mut ring)?;
    }
    let data = pattern(300_000, 3);
    std::fs::write(site.share().join("some"), &data)?;
    let (memory, done) = ring.get_to_memory("work/some", &TransferOptions::default())?;
    ensure!(done.bytes == 300_000 && memory.to_vec(0, data.len())? == data);
    drop(ring);
    site.check_unharmed(pids)?;
    Ok(vm)
}

#[test]
fn it_works_with_any_number_of_msi_vectors() -> Result<()> {
    for vectors in [1, 2, 16] {
        works_with(GuestOptions::default().interrupts(GuestInterrupts::Msi(vectors)))
            .with_context(|| format!("{vectors} vectors"))?;
    }
    Ok(())
}

#[test]
fn it_works_with_intx() -> Result<()> {
    works_with(GuestOptions::default().interrupts(GuestInterrupts::IntX)).map(drop)
}

#[test]
fn it_works_without_interrupts() -> Result<()> {
    works_with(GuestOptions::spinning()).map(drop)
}

#[test]
fn an_interrupt_wakes_each_sleeper() -> Result<()> {
    for interrupts in [
        GuestInterrupts::Msi(1),
        GuestInterrupts::Msi(16),
        GuestInterrupts::IntX,
    ] {
        let site = site(1)?;
        let vm = site.vm_with(0, GuestOptions::default().interrupts(interrupts))?;
        let mut options = vmgmt_driver::RingOptions::new(Mode::COMMON);
        options.spin = Duration::ZERO;
        options.vector = 3;
        let mut ring = vm.ring_with(options)?;
        // An answer may come before the guest sleeps, on a busy machine many in a row: it is asked until it was woken often enough.
        let mut counters = ring.channel().counters();
        wait_until("sleeps that an interrupt ended", PATIENCE, || {
            for _ in 0..10 {
                ring.noop()?;
            }
            counters = ring.channel().counters();
            Ok((counters.interrupts >= 20).then_some(()))
        })
        .with_context(|| format!("{interrupts:?}: {:?}", ring.channel().counters()))?;
        // A look that a sleeper takes by itself may fall between an answer and its interrupt; where interrupts get lost, each sleep ends so.
        ensure!(
            counters.unannounced * 10 <= counters.interrupts,
            "{interrupts:?}: {counters:?}"
        );
    }
    Ok(())
}

#[test]
fn a_driver_that_comes_again_starts_clean() -> Result<()> {
    let site = site(1)?;
    let pids = site.pids()?;
    let vm = site.vm(0)?;
    let backing = vm.backing().clone();
    let mut ring = vm.ring(Mode::CHAT)?;
    let mut receiver = vmgmt_driver::operations::chat::Receiver::default();
    ring.post_receives(&mut receiver, 10)?;
    let before = vm.device().facts().generation;
    drop(ring);
    drop(vm);
    for _ in 0..5 {
        let device = vmgmt_driver::Device::open(backing.clone())?;
        ensure!(device.facts().generation > before);
        let mut ring = Client::new(vmgmt_driver::Ring::open(
            &device,
            vmgmt_driver::RingOptions::new(Mode::COMMON),
        )?);
        echoes(&mut ring)?;
    }
    site.check_unharmed(pids)
}

#[test]
fn bad_submissions_get_an_error_and_the_ring_goes_on() -> Result<()> {
    use vmgmt_driver::channel::Request;
    use vmgmt_driver::{Opcode, Status};
    let site = site(1)?;
    let pids = site.pids()?;
    let vm = site.vm(0)?;
    for mut channel in [vm.ring(Mode::FILE)?, vm.ports(Mode::FILE)?] {
        let cases = [
            (
                "an unknown opcode",
                Request::new(Opcode(0x01ff)),
                Status::NOT_SUPPORTED,
            ),
            (
                "an unknown mode",
                Request::new(Opcode(0xff00)),
                Status::WRONG_MODE,
            ),
            ("another mode", Request::new(Opcode::SEND), Status::WRONG_MODE),
            (
                "an unknown flag",
                Request::new(Opcode::NOOP).flags(1 << 9),
                Status::BAD_ARGUMENT,
            ),
            (
                "a handle of nobody",
                Request::new(Opcode::CLOSE).handle(12345),
                Status::STALE,
            ),
        ];
        for (what, request, expected) in cases {
            let tag = channel.start(request)?;
            let finished = channel.finish(tag, deadline())?.context("no answer")?;
            let fits = finished.status == expected
                || (expected == Status::STALE && finished.status == Status::BAD_ARGUMENT)
                || (expected == Status::WRONG_MODE && finished.status == Status::NOT_SUPPORTED);
            ensure!(fits, "{what}: {:?}", finished.status);
        }
        echoes(&mut channel)?;
    }
    site.check_unharmed(pids)
}
