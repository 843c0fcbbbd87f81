//! Descriptors: each belongs to the message it was sent with, and what nobody uses is closed.

use super::*;
use std::os::fd::AsFd;
use vmgmt_testkit::client::{GuestRam, Mapping, Seal, encode, eventfd, irq};

/// Open descriptors of a process.
pub fn count(pid: u32) -> Result<usize> {
    Ok(std::fs::read_dir(format!("/proc/{pid}/fd"))?.count())
}

/// Waits until the front has no more descriptors than that.
fn settles_at(scene: &Scene, most: usize) -> Result<()> {
    let what = format!("the front to have {most} descriptors");
    wait_until(&what, PATIENCE, || {
        Ok((count(scene.pids.front)? <= most).then_some(()))
    })
    .with_context(|| format!("it has {:?}", count(scene.pids.front)))
}

#[test]
fn descriptors_of_bad_requests_are_closed() -> Result<()> {
    let scene = scene()?;
    let mut client = scene.client()?;
    alive(&mut client)?;
    let before = count(scene.pids.front)?;
    let fds: Vec<_> = (0..16).map(|_| eventfd()).collect::<Result<_, _>>()?;
    let all: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    for round in 0..20 {
        // Where none belong, too many, of a wrong length, of an unknown command, in a reply, posted.
        for number in [
            command::DEVICE_GET_INFO,
            command::DMA_UNMAP,
            command::REGION_READ,
            command::DMA_MAP,
            99,
        ] {
            for bytes in [0, 16, 24, 32] {
                let outcome = client.request(number, &vec![0; bytes], &all);
                ensure!(outcome.is_err(), "command {number} with 16 descriptors was done");
            }
        }
        let outcome = client.set_irqs(irq::MSI, irq::DATA_EVENTFD | irq::TRIGGER, 8, 16, &[], &all);
        refused(outcome, EINVAL)?;
        client.send_raw(&encode(round, command::DMA_READ, 1, &[0; 32]), &all)?;
        client.post(command::DMA_MAP, &[0; 3], &all)?;
    }
    alive(&mut client)?;
    settles_at(&scene, before)?;
    scene.check()
}

#[test]
fn too_many_descriptors_with_one_message_are_refused_and_closed() -> Result<()> {
    let scene = scene()?;
    let mut client = scene.client()?;
    alive(&mut client)?;
    let before = count(scene.pids.front)?;
    let fd = eventfd()?;
    for number in [17, 100, 253] {
        let many = vec![fd.as_fd(); number];
        let outcome = client.request(command::DEVICE_GET_INFO, &words(&[16, 0, 0, 0]), &many);
        match outcome {
            Err(ClientError::Refused { .. }) => {}
            // More than a message may carry may also end the connection.
            Err(ClientError::Closed) => client = scene.client()?,
            other => bail!("{number} descriptors gave {other:?}"),
        }
    }
    alive(&mut client)?;
    settles_at(&scene, before)?;
    scene.check()
}

#[test]
fn a_map_without_a_descriptor_does_not_take_that_of_the_next() -> Result<()> {
    let scene = scene()?;
    let mut client = scene.client()?;
    let ram = GuestRam::new(1 << 20, Seal::Shrink)?;
    let before = count(scene.pids.front)?;
    // Both in the socket's queue before either is read, as QEMU pipelines them.
    let rom = client.start_dma_map(Mapping {
        iova: 0,
        bytes: 4096,
        flags: 1,
        memory: None,
    })?;
    let own = client.start_dma_map(Mapping {
        iova: 1 << 20,
        bytes: 1 << 20,
        flags: 3,
        memory: Some((ram.fd(), 0)),
    })?;
    client.finish(rom)?;
    client.finish(own)?;
    let with_map = count(scene.pids.front)?;
    // Unmapping the first closes nothing, unmapping the second its descriptor.
    client.dma_unmap(0, 4096)?;
    ensure!(
        count(scene.pids.front)? == with_map,
        "the map without a descriptor had one"
    );
    client.dma_unmap(1 << 20, 1 << 20)?;
    settles_at(&scene, before)?;
    scene.check()
}

#[test]
fn each_vector_gets_its_own_descriptor_when_messages_queue_up() -> Result<()> {
    let scene = scene()?;
    let mut client = scene.client()?;
    let fds: Vec<_> = (0..16).map(|_| eventfd()).collect::<Result<_, _>>()?;
    let mut ids = Vec::new();
    for (vector, fd) in (0_u32..).zip(&fds) {
        let body = words(&[20, irq::DATA_EVENTFD | irq::TRIGGER, irq::MSI, vector, 1]);
        ids.push(client.start(command::DEVICE_SET_IRQS, &body, &[fd.as_fd()])?);
        ids.push(client.start(command::DEVICE_GET_INFO, &words(&[16, 0, 0, 0]), &[])?);
    }
    for id in ids {
        client.finish(id)?;
    }
    for vector in 0..16_u32 {
        // Not at the first look: the core signals each eventfd once when it takes it over.
        wait_until("one vector's own interrupt and no other", PATIENCE, || {
            for fd in &fds {
                let _ = rustix::io::read(fd, &mut [0; 8]);
            }
            client.set_irqs(irq::MSI, irq::DATA_NONE | irq::TRIGGER, vector, 1, &[], &[])?;
            let signalled = fds.iter().map(|fd| rustix::io::read(fd, &mut [0; 8]).is_ok());
            let fits = (0_u32..)
                .zip(signalled)
                .all(|(other, signalled)| signalled == (other == vector));
            Ok(fits.then_some(()))
        })
        .with_context(|| format!("vector {vector}"))?;
    }
    scene.check()
}

#[test]
fn a_session_that_ends_gives_everything_back() -> Result<()> {
    let scene = scene()?;
    drop(scene.client()?);
    drop(scene.client()?);
    let mut client = scene.client()?;
    alive(&mut client)?;
    let one_session = count(scene.pids.front)?;
    drop(client);
    for _ in 0..20 {
        let mut client = scene.client()?;
        let ram = GuestRam::new(1 << 20, Seal::Shrink)?;
        client.dma_map(Mapping {
            iova: 0,
            bytes: 1 << 20,
            flags: 3,
            memory: Some((ram.fd(), 0)),
        })?;
        let fds: Vec<_> = (0..16).map(|_| eventfd()).collect::<Result<_, _>>()?;
        client.assign_irqs(irq::MSI, 0, &fds)?;
        client.assign_irqs(irq::INTX, 0, fds.get(..1).context("slice")?)?;
        // Half a message with a descriptor on it.
        let bytes = encode(1, command::DMA_MAP, 0, &[0; 32]);
        client.send_raw(bytes.get(..20).context("slice")?, &[ram.fd()])?;
    }
    let mut client = scene.client()?;
    alive(&mut client)?;
    settles_at(&scene, one_session)?;
    scene.check()
}
