//! A disk that does not answer, under a guest that takes its memory back, and under a core that is killed. No request of the client waits
//! for the disk, and the neighbour's transfer goes on.

use super::*;
use vmgmt_driver::channel::{Request, Tag};
use vmgmt_driver::{Client, DmaMemory, Opcode};
use vmgmt_testkit::client::{GuestRam, Mapping, Seal};
use vmgmt_testkit::slow_disk::{HELD, HELD_DIRECT, SlowDisk};

const BYTES: usize = 1 << 20;
const IOVA: u64 = 1 << 41;

/// The street on a slow disk; nothing where this machine has no FUSE for us.
fn slow_street() -> Result<Option<(SlowDisk, Street)>> {
    let data = pattern(4 << 20);
    let disk = match SlowDisk::mount(data.clone()) {
        Ok(disk) => disk,
        Err(error) => {
            vmgmt_testkit::skipped(format_args!("no file system of our own here: {error:#}"));
            return Ok(None);
        }
    };
    let site = SitePlan::new(env!("CARGO_BIN_EXE_vmgmtd"), 2)
        .share_at(disk.path())
        .start()?;
    Ok(Some((disk, street_in(site, "work/quick", data)?)))
}

/// Memory of vm0 beside its RAM, shared and proven.
fn lend(vm: &SimulatedVm, files: &mut Client, seal: Seal) -> Result<(Arc<GuestRam>, Arc<DmaMemory>)> {
    let ram = Arc::new(GuestRam::new(BYTES as u64, seal)?);
    vm.backing().with_client(|client| {
        client.dma_map(Mapping {
            iova: IOVA,
            bytes: ram.bytes(),
            flags: 3,
            memory: Some((ram.fd(), 0)),
        })
    })?;
    let memory = Arc::new(DmaMemory::map_file(ram.fd(), 0, BYTES, IOVA)?);
    ensure!(files.prove(&memory, 0x2468_ace0)?, "shared memory was not proven");
    Ok((ram, memory))
}

fn finished(files: &mut Client, tag: Tag) -> Result<()> {
    let deadline = std::time::Instant::now() + PATIENCE;
    files
        .finish(tag, Some(deadline))?
        .context("a submission was never completed")?;
    Ok(())
}

/// A transfer to or from `file` waits for the disk when the guest takes the buffer's memory back.
fn unmapped_while_held(file: &str, opcode: Opcode, seal: Seal) -> Result<()> {
    let Some((disk, street)) = slow_street()? else {
        return Ok(());
    };
    street.during(|| {
        let vm = street.site.vm(0)?;
        let mut files = vm.ring(Mode::FILE)?;
        let (ram, memory) = lend(&vm, &mut files, seal)?;
        let path = format!("work/{file}");
        let handle = if opcode == Opcode::WRITE {
            files.open_file(
                &path,
                vmgmt_driver::abi::file::open::READ | vmgmt_driver::abi::file::open::WRITE,
            )?
        } else {
            files.open_for_reading(&path)?
        };
        disk.hold();
        let request = Request::new(opcode).handle(handle.handle).offset(0);
        let tag = files.start(match opcode {
            Opcode::WRITE => request.input(&memory, 0, BYTES, 0),
            _ => request.output(&memory, 0, BYTES, 0),
        })?;
        disk.wait_for_request(PATIENCE)?;
        // The disk says nothing in all that time, however long the client has patience.
        vm.backing()
            .with_client(|client| client.dma_unmap(IOVA, ram.bytes()))?;
        // The guest has it back and uses it for something else.
        ram.write(0, &vec![0xa5; BYTES])?;
        disk.release();
        finished(&mut files, tag)?;
        ensure!(
            ram.read(0, BYTES)?.iter().all(|byte| *byte == 0xa5),
            "the device wrote to memory that was taken back"
        );
        files.close(handle.handle)?;
        ensure!(files.echo(b"still here")? == b"still here");
        Ok(())
    })
}

#[test]
fn an_unmap_does_not_wait_for_a_read_of_a_disk_that_hangs() -> Result<()> {
    unmapped_while_held(HELD, Opcode::READ, Seal::Shrink)?;
    unmapped_while_held(HELD_DIRECT, Opcode::READ, Seal::None)
}

#[test]
fn an_unmap_does_not_wait_for_a_write_to_a_disk_that_hangs() -> Result<()> {
    unmapped_while_held(HELD_DIRECT, Opcode::WRITE, Seal::Shrink)?;
    unmapped_while_held(HELD_DIRECT, Opcode::WRITE, Seal::None)
}

#[test]
fn a_core_whose_worker_cannot_die_is_replaced_all_the_same() -> Result<()> {
    let Some((disk, street)) = slow_street()? else {
        return Ok(());
    };
    let vm = street.site.vm(0)?;
    let mut files = vm.ring(Mode::FILE)?;
    let held = files.open_for_reading(&format!("work/{HELD_DIRECT}"))?;
    let buffer = files.allocate(BYTES)?;
    disk.hold();
    let request = Request::new(Opcode::READ).handle(held.handle).offset(0);
    let tag = files.start(request.output(&buffer, 0, BYTES, 0))?;
    disk.wait_for_request(PATIENCE)?;
    let dead = street.site.daemon.kill_role("core")?;
    // The disk still holds: the process cannot end, and nobody waits for it.
    street.transfer()?;
    ensure!(
        std::path::Path::new(&format!("/proc/{dead}")).exists(),
        "the killed core was to sleep in the kernel; this test shows nothing otherwise"
    );
    let echo = vm.ring(Mode::COMMON)?.echo(b"alive")?;
    ensure!(echo == b"alive");
    disk.release();
    finished(&mut files, tag)?;
    wait_until("the end of the core that slept", PATIENCE, || {
        Ok((!std::path::Path::new(&format!("/proc/{dead}")).exists()).then_some(()))
    })?;
    street.transfer()
}
