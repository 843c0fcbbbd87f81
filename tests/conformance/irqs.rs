//! DEVICE_SET_IRQS: eventfds, none and bools; mask, unmask and trigger; ranges; removal.

use super::*;
use std::os::fd::{AsFd, OwnedFd};
use vmgmt_testkit::client::{eventfd, irq};

/// Takes what is signalled already.
fn emptied(fds: &[OwnedFd]) {
    for fd in fds {
        taken(fd);
    }
}

/// Signals taken from an eventfd now.
fn taken(fd: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    match rustix::io::read(fd, &mut count) {
        Ok(_) => u64::from_ne_bytes(count),
        Err(_) => 0,
    }
}

fn eventfds(count: usize) -> Result<Vec<OwnedFd>> {
    Ok((0..count).map(|_| eventfd()).collect::<Result<_, _>>()?)
}

/// Waits until exactly the eventfds `expected` are signalled when the client triggers `start..start + count`. Not at the first look:
/// whoever takes an eventfd over signals it once, and the core takes them over when it comes to it.
fn expect_triggered(
    client: &mut Client,
    fds: &[OwnedFd],
    start: u32,
    count: u32,
    expected: &[usize],
) -> Result<()> {
    let mut seen = Vec::new();
    let outcome = wait_until("the interrupts expected", PATIENCE, || {
        emptied(fds);
        client.set_irqs(irq::MSI, irq::DATA_NONE | irq::TRIGGER, start, count, &[], &[])?;
        seen = (0..fds.len())
            .filter(|n| fds.get(*n).is_some_and(|fd| taken(fd) > 0))
            .collect();
        Ok((seen == expected).then_some(()))
    });
    outcome.with_context(|| format!("expected {expected:?}, seen {seen:?}"))
}

#[test]
fn vectors_are_assigned_in_chunks_and_triggered_by_range() -> Result<()> {
    let scene = scene()?;
    let mut client = scene.client()?;
    let fds = eventfds(16)?;
    let (first, rest) = fds.split_at(5);
    client.assign_irqs(irq::MSI, 0, first)?;
    client.assign_irqs(irq::MSI, 5, rest)?;
    expect_triggered(&mut client, &fds, 0, 16, &(0..16).collect::<Vec<_>>())?;
    expect_triggered(&mut client, &fds, 3, 4, &[3, 4, 5, 6])?;
    // By bools: only those that are set.
    wait_until("the interrupts that are set", PATIENCE, || {
        emptied(&fds);
        let by_bools = irq::DATA_BOOL | irq::TRIGGER;
        client.set_irqs(irq::MSI, by_bools, 2, 4, &[1, 0, 255, 0], &[])?;
        let counts = [2, 3, 4, 5].map(|vector: usize| taken(&fds[vector]));
        Ok((counts == [1, 0, 1, 0]).then_some(()))
    })?;
    scene.check()
}

#[test]
fn eventfds_are_replaced_and_removed() -> Result<()> {
    let scene = scene()?;
    let mut client = scene.client()?;
    let old = eventfds(4)?;
    let new = eventfds(2)?;
    client.assign_irqs(irq::MSI, 0, &old)?;
    client.assign_irqs(irq::MSI, 1, &new)?;
    emptied(&new);
    expect_triggered(&mut client, &old, 0, 4, &[0, 3])?;
    ensure!(taken(&new[0]) > 0 && taken(&new[1]) > 0);
    // No descriptor: taken away.
    client.set_irqs(irq::MSI, irq::DATA_EVENTFD | irq::TRIGGER, 0, 2, &[], &[])?;
    expect_triggered(&mut client, &old, 0, 4, &[3])?;
    client.disable_irqs(irq::MSI)?;
    expect_triggered(&mut client, &old, 0, 4, &[])?;
    client.disable_irqs(irq::MSI).context("twice")?;
    scene.check()
}

#[test]
fn intx_is_masked_unmasked_and_triggered() -> Result<()> {
    let scene = scene()?;
    let mut client = scene.client()?;
    let fds = eventfds(2)?;
    client.assign_irqs(irq::INTX, 0, &fds[..1])?;
    taken(&fds[0]);
    client.set_irqs(irq::INTX, irq::DATA_NONE | irq::TRIGGER, 0, 1, &[], &[])?;
    ensure!(taken(&fds[0]) == 1);
    client.set_irqs(irq::INTX, irq::DATA_NONE | irq::MASK, 0, 1, &[], &[])?;
    client.set_irqs(irq::INTX, irq::DATA_NONE | irq::UNMASK, 0, 1, &[], &[])?;
    // Nothing is pending, so unmasking signals nothing.
    ensure!(taken(&fds[0]) == 0);
    client.set_irqs(irq::INTX, irq::DATA_BOOL | irq::MASK, 0, 1, &[1], &[])?;
    // An eventfd that unmasks.
    client.set_irqs(
        irq::INTX,
        irq::DATA_EVENTFD | irq::UNMASK,
        0,
        1,
        &[],
        &[fds[1].as_fd()],
    )?;
    rustix::io::write(&fds[1], &1_u64.to_ne_bytes())?;
    alive(&mut client)?;
    client.disable_irqs(irq::INTX)?;
    scene.check()
}

#[test]
fn error_and_request_interrupts_are_taken() -> Result<()> {
    let scene = scene()?;
    let mut client = scene.client()?;
    let fds = eventfds(2)?;
    client.assign_irqs(irq::ERR, 0, &fds[..1])?;
    client.assign_irqs(irq::REQ, 0, &fds[1..])?;
    client.disable_irqs(irq::ERR)?;
    client.disable_irqs(irq::REQ)?;
    scene.check()
}

#[test]
fn sets_that_contradict_are_refused() -> Result<()> {
    let scene = scene()?;
    let mut client = scene.client()?;
    let fds = eventfds(2)?;
    let one = [fds[0].as_fd()];
    let two = [fds[0].as_fd(), fds[1].as_fd()];
    let none = irq::DATA_NONE | irq::TRIGGER;
    let by_fd = irq::DATA_EVENTFD | irq::TRIGGER;
    refused(client.set_irqs(irq::MSI, none, 16, 1, &[], &[]), EINVAL).context("a vector too many")?;
    refused(client.set_irqs(irq::MSI, none, 0, 17, &[], &[]), EINVAL).context("a range too long")?;
    refused(client.set_irqs(irq::MSI, none, u32::MAX, 2, &[], &[]), EINVAL).context("a range that wraps")?;
    refused(client.set_irqs(irq::MSI, none, 1, 0, &[], &[]), EINVAL).context("no vectors, not from 0")?;
    refused(client.set_irqs(irq::MSI, by_fd, 0, 2, &[], &one), EINVAL).context("fewer descriptors")?;
    refused(client.set_irqs(irq::MSI, by_fd, 0, 1, &[], &two), EINVAL).context("more descriptors")?;
    refused(client.set_irqs(irq::MSI, by_fd, 0, 0, &[], &[]), EINVAL).context("descriptors for nothing")?;
    refused(client.set_irqs(irq::MSI, by_fd, 15, 2, &[], &two), EINVAL).context("the last and one more")?;
    refused(client.set_irqs(irq::MSI, none, 0, 1, &[], &one), EINVAL).context("none with a descriptor")?;
    refused(client.set_irqs(irq::MSI, none, 0, 1, &[1], &[]), EINVAL).context("none with data")?;
    let bools = irq::DATA_BOOL | irq::TRIGGER;
    refused(client.set_irqs(irq::MSI, bools, 0, 2, &[1], &[]), EINVAL).context("fewer bools")?;
    refused(client.set_irqs(irq::MSI, bools, 0, 2, &[1, 1, 1], &[]), EINVAL).context("more bools")?;
    for flags in [
        0,
        irq::DATA_NONE,
        irq::TRIGGER,
        3 | irq::TRIGGER,
        irq::DATA_NONE | irq::MASK | irq::UNMASK,
        1 << 6,
    ] {
        refused(client.set_irqs(irq::MSI, flags, 0, 1, &[], &[]), EINVAL)
            .with_context(|| format!("flags {flags:#x}"))?;
    }
    refused(client.set_irqs(5, none, 0, 1, &[], &[]), EINVAL).context("no such index")?;
    refused(client.set_irqs(irq::MSIX, none, 0, 1, &[], &[]), EINVAL).context("no MSI-X here")?;
    // MSI has no mask in this device.
    let masked = client.set_irqs(irq::MSI, irq::DATA_NONE | irq::MASK, 0, 1, &[], &[]);
    ensure!(matches!(masked, Err(ClientError::Refused { .. })), "{masked:?}");
    alive(&mut client)?;
    scene.check()
}

#[test]
fn an_eventfd_that_is_none_harms_nobody() -> Result<()> {
    let scene = scene()?;
    let mut client = scene.client()?;
    let file = tempfile::tempfile()?;
    let pipe = std::io::pipe()?;
    // A full pipe would make a blocking write wait for ever.
    let (socket, _other) = std::os::unix::net::UnixStream::pair()?;
    for fd in [file.as_fd(), pipe.1.as_fd(), pipe.0.as_fd(), socket.as_fd()] {
        let outcome = client.set_irqs(irq::MSI, irq::DATA_EVENTFD | irq::TRIGGER, 0, 1, &[], &[fd]);
        ensure!(
            matches!(outcome, Ok(()) | Err(ClientError::Refused { .. })),
            "{outcome:?}"
        );
        for _ in 0..3 {
            let outcome = client.set_irqs(irq::MSI, irq::DATA_NONE | irq::TRIGGER, 0, 1, &[], &[]);
            ensure!(
                matches!(outcome, Ok(()) | Err(ClientError::Refused { .. })),
                "{outcome:?}"
            );
        }
    }
    // An eventfd that is full, and blocking: signalling it again would wait for its reader.
    let full = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)?;
    rustix::io::write(&full, &(u64::MAX - 1).to_ne_bytes())?;
    let outcome = client.assign_irqs(irq::MSI, 0, std::slice::from_ref(&full));
    ensure!(
        matches!(outcome, Ok(()) | Err(ClientError::Refused { .. })),
        "{outcome:?}"
    );
    let outcome = client.set_irqs(irq::MSI, irq::DATA_NONE | irq::TRIGGER, 0, 1, &[], &[]);
    ensure!(
        matches!(outcome, Ok(()) | Err(ClientError::Refused { .. })),
        "{outcome:?}"
    );
    alive(&mut client)?;
    scene.check()
}
