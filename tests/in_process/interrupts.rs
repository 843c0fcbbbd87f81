//! Interrupts that are due when the core dies: the guest gets them (docs/abi.md, "Interrupts").

use super::core_dies::without_a_core;
use super::*;
use std::os::fd::OwnedFd;
use vmgmt_driver::RingOptions;
use vmgmt_driver::abi::registers::{INTERRUPT_ACK, INTERRUPT_PENDING};
use vmgmt_driver::backing::{Backing, Width};
use vmgmt_testkit::client::irq;

/// STATUS of configuration space, and its bit "interrupt asserted" (PCI 3.0, 6.2.3).
const CONFIG_STATUS: u32 = 6;
const ASSERTED: u32 = 1 << 3;

fn ring(vm: &SimulatedVm, vector: u32) -> Result<Client> {
    let mut options = RingOptions::new(Mode::COMMON);
    // It looks and never sleeps: interrupts are this test's.
    (options.vector, options.spin) = (vector, PATIENCE);
    vm.ring_with(options)
}

/// Takes what is signalled: false, nothing was.
fn taken(eventfd: &OwnedFd) -> bool {
    rustix::io::read(eventfd, &mut [0; 8]).is_ok()
}

#[test]
fn each_open_ring_is_signalled_by_message_after_the_core_died() -> Result<()> {
    let site = site(1)?;
    let vm = site.vm(0)?;
    let mut rings = [ring(&vm, 3)?, ring(&vm, 5)?];
    let fd = |vector: u32| vm.backing().interrupt_descriptor(vector).context("no eventfd");
    let (three, five, other) = (fd(3)?, fd(5)?, fd(7)?);
    rings[0].noop()?;
    rings[1].noop()?;
    for _ in 0..3 {
        // What was signalled before its death is lost with the guest's eventfd, as if it had died just before.
        without_a_core(&site, || {
            taken(&three);
            taken(&five);
            taken(&other);
            Ok(())
        })?;
        wait_until("both interrupts", PATIENCE, || Ok(taken(&three).then_some(())))?;
        wait_until("both interrupts", PATIENCE, || Ok(taken(&five).then_some(())))?;
        rings[0].noop()?;
        rings[1].noop()?;
    }
    Ok(())
}

#[test]
fn a_line_that_is_up_stays_up_until_it_is_acknowledged() -> Result<()> {
    let site = site(1)?;
    let vm = site.vm_with(0, GuestOptions::default().interrupts(GuestInterrupts::IntX))?;
    let mut ring = ring(&vm, 3)?;
    let backing = vm.backing();
    let line = backing.interrupt_descriptor(0).context("no eventfd")?;
    let is_pending = || Ok::<_, anyhow::Error>(backing.read32(INTERRUPT_PENDING)? & 1 << 3 != 0);
    let is_up = || Ok::<_, anyhow::Error>(backing.config_read(CONFIG_STATUS, Width::Two)? & ASSERTED != 0);
    // As QEMU does it when the guest has looked: the line is asserted anew if it is still up.
    let unmask = || {
        backing.with_client(|client| client.set_irqs(irq::INTX, irq::DATA_NONE | irq::UNMASK, 0, 1, &[], &[]))
    };
    let acknowledge = || {
        wait_until("a line that is down", PATIENCE, || {
            backing.write32(INTERRUPT_ACK, 1 << 3)?;
            Ok((!is_pending()?).then_some(()))
        })
    };
    ring.noop()?;
    for round in 0..3 {
        // A completion raises it, if nothing else does: the first of a ring, or the take-over by another core.
        wait_until("an interrupt", PATIENCE, || {
            Ok((is_pending()? && is_up()?).then_some(()))
        })?;
        without_a_core(&site, || {
            ensure!(is_pending()? && is_up()?, "round {round}: it fell with the core");
            taken(&line);
            unmask()?;
            ensure!(
                taken(&line),
                "round {round}: the guest is not told while there is no core"
            );
            Ok(())
        })?;
        unmask()?;
        wait_until("the interrupt of the next core", PATIENCE, || {
            Ok((is_pending()? && is_up()? && taken(&line)).then_some(()))
        })?;
        if round == 1 {
            acknowledge()?;
            taken(&line);
            unmask()?;
            ensure!(!is_up()? && !taken(&line), "an acknowledged line is up");
            // And by the death of a core it comes up again, once.
            without_a_core(&site, || {
                ensure!(!is_pending()? && !is_up()?, "it rose without a core");
                Ok(())
            })?;
        }
        ring.noop()?;
    }
    acknowledge()?;
    unmask()?;
    ensure!(!is_up()?);
    ring.noop().map_err(Into::into)
}
