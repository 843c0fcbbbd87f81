//! Guests that leave in the middle, and guests that take all they can get.

use super::*;
use vmgmt_driver::channel::Request;
use vmgmt_driver::{Opcode, Status};

#[test]
fn a_guest_that_vanishes_in_the_middle_of_a_transfer() -> Result<()> {
    let street = street()?;
    std::fs::write(street.site.share().join("big"), vec![1; 32 << 20])?;
    street.during(|| {
        for round in 0..6 {
            let vm = wait_until("vm0's place", PATIENCE, || Ok(street.site.vm(0).ok()))?;
            let mut files = vm.ring(Mode::FILE)?;
            let buffer = files.allocate(16 << 20)?;
            let file = files.open_for_reading("work/big")?;
            let put = files.put(&format!("work/left-{round}"), 16 << 20, 0)?;
            for chunk in 0..16_usize {
                let start = chunk << 20;
                let request = if chunk % 2 == 0 {
                    Request::new(Opcode::READ)
                        .handle(file.handle)
                        .output(&buffer, start, 1 << 20, 0)
                } else {
                    Request::new(Opcode::WRITE)
                        .handle(put.handle)
                        .input(&buffer, start, 1 << 20, 0)
                };
                files.start(request.offset(start as u64))?;
            }
            vm.backing().vanish();
            let ram = vm.backing().memory().ram().clone();
            // A killed QEMU's memory is gone with it; here it can still be looked at: nothing writes to it for ever.
            wait_until("the last DMA", PATIENCE, || {
                let first = ram.read(0, 1 << 20)?;
                Ok((ram.read(0, 1 << 20)? == first).then_some(()))
            })?;
        }
        let left = std::fs::read_dir(street.site.share())?.filter_map(|entry| {
            let name = entry.ok()?.file_name().to_string_lossy().into_owned();
            name.starts_with("left-").then_some(name)
        });
        let left: Vec<String> = left.collect();
        ensure!(left.is_empty(), "half a file is visible: {left:?}");
        Ok(())
    })
}

#[test]
fn a_guest_that_opens_everything_reaches_its_own_budget() -> Result<()> {
    let street = street()?;
    street.during(|| {
        let vm = street.site.vm(0)?;
        let mut files = vm.ring(Mode::FILE)?;
        let mut opened = 0;
        let refusal = loop {
            match files.open_for_reading("work/neighbour") {
                Ok(_) => opened += 1,
                Err(error) => break error,
            }
            ensure!(opened < 100_000, "there is no limit on open files");
        };
        ensure!(
            refusal.status() == Some(Status::OVER_BUDGET),
            "after {opened} files: {refusal}"
        );
        Ok(())
    })
}

#[test]
fn a_guest_that_floods_with_doorbells_and_no_ops() -> Result<()> {
    let street = street()?;
    street.during(|| {
        let vm = street.site.vm(0)?;
        let mut ring = vm.ring(Mode::COMMON)?;
        for round in 0..20_000_u32 {
            vm.backing()
                .write32(vmgmt_driver::abi::registers::DOORBELLS, round)?;
        }
        for _ in 0..20_000 {
            ring.start(Request::new(Opcode::NOOP))?;
        }
        while ring.channel().in_flight() > 0 {
            ensure!(
                ring.channel().wait(Some(std::time::Instant::now() + PATIENCE))?,
                "no-ops were not answered"
            );
            while ring.channel().reap()?.is_some() {}
        }
        Ok(())
    })
}

#[test]
fn connections_that_come_and_go_in_a_storm() -> Result<()> {
    let street = street()?;
    street.during(|| {
        for _ in 0..200 {
            let _ = vmgmt_testkit::client::Client::connect_ready(street.site.socket(0));
        }
        let machine = street.machine(GuestOptions::default())?;
        street.heals(&machine)
    })
}
