//! Memory whose owner takes it away while it is used: truncated, punched, unmapped.

use super::*;
use vmgmt_driver::channel::Request;
use vmgmt_driver::{DmaMemory, Opcode};
use vmgmt_testkit::client::{GuestRam, Mapping, Seal};
use vmgmt_testkit::guest::{GuestInterrupts, Sharing};

/// Reads of `big` into memory of its own, which `mischief` takes away while they run. The ring itself stays.
fn reads_while(seal: Seal, mischief: impl Fn(&SimulatedVm, &GuestRam, u64) -> Result<()>) -> Result<()> {
    let street = street()?;
    let big: Vec<u8> = vec![7; 16 << 20];
    std::fs::write(street.site.share().join("big"), &big)?;
    street.during(|| {
        let vm = street.site.vm(0)?;
        let mut files = vm.ring(Mode::FILE)?;
        for round in 0..5_u64 {
            let ram = Arc::new(GuestRam::new(16 << 20, seal)?);
            let iova = (1 << 41) + (round << 30);
            vm.backing().with_client(|client| {
                client.dma_map(Mapping {
                    iova,
                    bytes: ram.bytes(),
                    flags: 3,
                    memory: Some((ram.fd(), 0)),
                })
            })?;
            let memory = Arc::new(DmaMemory::map_file(ram.fd(), 0, 16 << 20, iova)?);
            // Memory of another object: until it is proven it is reached by messages, which this client does not serve there.
            ensure!(
                files.prove(&memory, 0x1357_9bdf ^ round)?,
                "shared memory was not proven"
            );
            let file = files.open_for_reading("work/big")?;
            let mut tags = Vec::new();
            for chunk in 0..16_usize {
                let request = Request::new(Opcode::READ)
                    .handle(file.handle)
                    .offset((chunk << 20) as u64)
                    .output(&memory, chunk << 20, 1 << 20, 0);
                tags.push(files.start(request)?);
            }
            mischief(&vm, &ram, iova)?;
            for tag in tags {
                let deadline = std::time::Instant::now() + PATIENCE;
                files
                    .finish(tag, Some(deadline))?
                    .context("a read was never completed")?;
            }
            files.close(file.handle)?;
            vm.backing()
                .with_client(|client| client.dma_unmap(iova, ram.bytes()))?;
        }
        ensure!(files.echo(b"still here")? == b"still here");
        Ok(())
    })
}

#[test]
fn a_buffer_truncated_under_a_transfer() -> Result<()> {
    reads_while(Seal::None, |_, ram, _| Ok(ram.truncate(0)?))
}

#[test]
fn a_buffer_truncated_to_the_middle_of_a_page() -> Result<()> {
    reads_while(Seal::None, |_, ram, _| Ok(ram.truncate((5 << 20) + 100)?))
}

#[test]
fn a_buffer_with_holes_punched_under_a_transfer() -> Result<()> {
    for seal in [Seal::None, Seal::Shrink] {
        reads_while(seal, |_, ram, _| {
            for piece in 0..16 {
                ram.punch(piece << 20, 1 << 19)?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_buffer_unmapped_under_a_transfer() -> Result<()> {
    reads_while(Seal::Shrink, |vm, ram, iova| {
        Ok(vm
            .backing()
            .with_client(|client| client.dma_unmap(iova, ram.bytes()))?)
    })
}

#[test]
fn the_rings_own_memory_truncated() -> Result<()> {
    let street = street()?;
    street.during(|| {
        for _ in 0..3 {
            let options = GuestOptions::default()
                .sharing(Sharing::Unsealed)
                .interrupts(GuestInterrupts::None);
            let machine = street.machine(options)?;
            let device = vmgmt_driver::Device::open(machine.clone())?;
            let ring = vmgmt_driver::Ring::open(&device, vmgmt_driver::RingOptions::new(Mode::CHAT))?;
            // From here on this program must not touch its own RAM: the driver is given up where it stands.
            std::mem::forget(ring);
            std::mem::forget(device);
            machine.memory().ram().truncate(0)?;
            for doorbell in 0..100 {
                machine.write32(vmgmt_driver::abi::registers::DOORBELLS, doorbell)?;
            }
            ensure!(machine.read32(vmgmt_driver::abi::registers::MAGIC)? == vmgmt_driver::abi::MAGIC);
            machine.vanish();
        }
        Ok(())
    })
}

#[test]
fn the_rings_own_memory_unmapped() -> Result<()> {
    let street = street()?;
    street.during(|| {
        let machine = street.machine(GuestOptions::default().interrupts(GuestInterrupts::None))?;
        let device = vmgmt_driver::Device::open(machine.clone())?;
        let ring = vmgmt_driver::Ring::open(&device, vmgmt_driver::RingOptions::new(Mode::CHAT))?;
        let (base, bytes) = (machine.memory().base(), machine.memory().bytes());
        machine.with_client(|client| client.dma_unmap(base, bytes))?;
        for doorbell in 0..100 {
            machine.write32(vmgmt_driver::abi::registers::DOORBELLS, doorbell)?;
        }
        // The guest has its page back, and nobody writes to it.
        let ram = machine.memory().ram().clone();
        let zeros = vec![0; usize::try_from(bytes)?];
        ram.write(0, &zeros)?;
        for doorbell in 0..100 {
            machine.write32(vmgmt_driver::abi::registers::DOORBELLS, doorbell)?;
        }
        machine.read32(vmgmt_driver::abi::registers::STATE)?;
        ensure!(
            ram.read(0, zeros.len())? == zeros,
            "the device wrote to memory that is not its any more"
        );
        drop(ring);
        machine.with_client(|client| {
            client.dma_map(Mapping {
                iova: base,
                bytes,
                flags: 3,
                memory: machine.memory().descriptor().map(|fd| (fd, 0)),
            })
        })?;
        drop(device);
        street.heals(&machine)
    })
}
