//! A client that we did not write: `vfio_user` 0.1.7 against the real server process.
//!
//! It answers one question: does somebody else's reading of the specification agree with ours? Its quirks, looked up in its source:
//! `resettable()` is inverted; it takes no notice of error replies, so every call is checked by its effect.

use std::os::fd::AsRawFd;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vfio_user::Client;
use vmgmt_testkit::client::{GuestRam, Seal, eventfd, irq};
use vmgmt_testkit::guest::{Site, SitePlan};
use vmgmt_testkit::process::wait_until;

const CONFIG: u32 = 7;
/// Long enough for a loaded machine; nothing here waits for its end.
const PATIENCE: Duration = Duration::from_secs(60);

fn site() -> Result<Site> {
    SitePlan::new(env!("CARGO_BIN_EXE_vmgmtd"), 1).start()
}

fn word(client: &mut Client, region: u32, offset: u64) -> Result<u32> {
    let mut bytes = [0; 4];
    client.region_read(region, offset, &mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

#[test]
fn it_negotiates_and_sees_the_regions() -> Result<()> {
    let site = site()?;
    let client = Client::new(&site.socket(0))?;
    let sizes: Vec<u64> = (0..9)
        .map(|index| client.region(index).map_or(u64::MAX, |region| region.size))
        .collect();
    ensure!(sizes == [16384, 0, 64, 0, 0, 0, 0, 4096, 0], "regions: {sizes:?}");
    for index in [0, 2, 7] {
        let region = client.region(index).context("no region")?;
        ensure!(region.flags == 3, "region {index} has flags {}", region.flags);
        ensure!(region.file_offset.is_none() && region.sparse_areas.is_empty());
    }
    // Inverted in this version: it says the opposite of the RESET flag.
    ensure!(!client.resettable());
    Ok(())
}

#[test]
fn it_reads_and_writes_configuration_and_registers() -> Result<()> {
    let site = site()?;
    let mut client = Client::new(&site.socket(0))?;
    ensure!(word(&mut client, CONFIG, 0)? == 0x10f0_1af4);
    ensure!(word(&mut client, 0, 0)? == vmgmt_abi::MAGIC);
    ensure!(word(&mut client, 2, 0)? == vmgmt_abi::port::PORT_MAGIC);
    client.region_write(CONFIG, 4, &7_u16.to_le_bytes())?;
    ensure!(word(&mut client, CONFIG, 4)? & 0xffff == 7);
    client.region_write(
        0,
        vmgmt_abi::registers::INTERRUPT_ENABLE.into(),
        &3_u32.to_le_bytes(),
    )?;
    ensure!(word(&mut client, 0, vmgmt_abi::registers::INTERRUPT_ENABLE.into())? == 3);
    // A read of everything at once.
    let mut whole = vec![0; 4096];
    client.region_read(CONFIG, 0, &mut whole)?;
    ensure!(whole.get(..4) == Some(&[0xf4, 0x1a, 0xf0, 0x10][..]));
    Ok(())
}

#[test]
fn it_maps_and_unmaps_memory() -> Result<()> {
    let site = site()?;
    let mut client = Client::new(&site.socket(0))?;
    let ram = GuestRam::new(1 << 20, Seal::Shrink)?;
    for round in 0..20 {
        client.dma_map(0, round << 20, 1 << 20, ram.fd().as_raw_fd())?;
    }
    client.dma_unmap(0, 1 << 20)?;
    // Mapped anew at the same place, which an unmap that did not happen would refuse, silently for this client; the log is not silent.
    client.dma_map(4096, 0, 8192, ram.fd().as_raw_fd())?;
    for round in 1..20 {
        client.dma_unmap(round << 20, 1 << 20)?;
    }
    client.dma_unmap(0, 8192)?;
    ensure!(word(&mut client, 0, 0)? == vmgmt_abi::MAGIC);
    let log = site.daemon.log().text();
    ensure!(!log.contains("refused"), "the server refused something:\n{log}");
    Ok(())
}

#[test]
fn it_sets_interrupts_that_arrive() -> Result<()> {
    let site = site()?;
    let mut client = Client::new(&site.socket(0))?;
    let counts: Vec<u32> = (0..5)
        .map(|index| client.get_irq_info(index).map_or(u32::MAX, |info| info.count))
        .collect();
    ensure!(counts == [1, 16, 0, 1, 1], "interrupts: {counts:?}");
    ensure!(client.get_irq_info(irq::INTX)?.flags == 7 && client.get_irq_info(irq::MSI)?.flags == 1);
    let fds: Vec<_> = (0..16).map(|_| eventfd()).collect::<Result<_, _>>()?;
    let raw: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    client.set_irqs(irq::MSI, irq::DATA_EVENTFD | irq::TRIGGER, 0, 16, &raw)?;
    // The core signals each that it takes over once, after the answer: all are emptied when that has come.
    for fd in &fds {
        wait_until("the core to take over", PATIENCE, || {
            Ok(rustix::io::read(fd, &mut [0; 8]).ok())
        })?;
    }
    client.set_irqs(irq::MSI, irq::DATA_NONE | irq::TRIGGER, 5, 1, &[])?;
    ensure!(rustix::io::read(fds.get(5).context("no eventfd")?, &mut [0; 8]).is_ok());
    client.set_irqs(irq::MSI, irq::DATA_NONE | irq::TRIGGER, 0, 0, &[])?;
    client.set_irqs(irq::MSI, irq::DATA_NONE | irq::TRIGGER, 5, 1, &[])?;
    ensure!(rustix::io::read(fds.get(5).context("no eventfd")?, &mut [0; 8]).is_err());
    Ok(())
}

#[test]
fn it_resets_the_device() -> Result<()> {
    let site = site()?;
    let mut client = Client::new(&site.socket(0))?;
    let generation = vmgmt_abi::registers::GENERATION.into();
    let before = word(&mut client, 0, generation)?;
    client.region_write(CONFIG, 4, &7_u16.to_le_bytes())?;
    client.reset()?;
    ensure!(word(&mut client, 0, generation)? == before + 1);
    ensure!(word(&mut client, CONFIG, 4)? & 0x7 == 0);
    client.shutdown()?;
    // The next one finds the place free, and a device of its own.
    let mut next = wait_until("the place to be free", PATIENCE, || {
        Ok(Client::new(&site.socket(0)).ok())
    })?;
    ensure!(word(&mut next, 0, 0)? == vmgmt_abi::MAGIC);
    Ok(())
}
