//! The ways in which guest memory is shared, or only seems to be.

use super::*;
use vmgmt_driver::channel::Channel;
use vmgmt_driver::{Ring, RingOptions};
use vmgmt_testkit::guest::Sharing;

/// Everything that moves bytes, both ways, once.
fn moves_bytes(site: &Site, vm: &SimulatedVm) -> Result<()> {
    let mut files = vm.ring(Mode::FILE)?;
    for _ in 0..3 {
        echoes(&mut files)?;
    }
    let data = pattern(700_001, 41);
    std::fs::write(site.share().join("down"), &data)?;
    let (memory, done) = files.get_to_memory("work/down", &TransferOptions::default())?;
    ensure!(
        done.bytes == data.len() as u64 && memory.to_vec(0, data.len())? == data,
        "host to guest"
    );
    files.put_from_memory("work/up", &memory, data.len(), 1, &TransferOptions::default())?;
    ensure!(std::fs::read(site.share().join("up"))? == data, "guest to host");
    ensure!(files.list("work")?.len() == 2);
    Ok(())
}

fn runs(sharing: Sharing, proven: bool) -> Result<()> {
    let site = site(1)?;
    let pids = site.pids()?;
    let vm = site.vm_with(0, GuestOptions::default().sharing(sharing))?;
    let ring = Ring::open(vm.device(), RingOptions::new(Mode::COMMON))?;
    ensure!(
        ring.is_shared() == proven,
        "{sharing:?}: the host says shared: {}",
        ring.is_shared()
    );
    drop(ring);
    moves_bytes(&site, &vm).with_context(|| format!("{sharing:?}"))?;
    if !proven {
        let messages = vm.backing().with_client(|client| client.dma_served().len());
        ensure!(messages > 0, "not one DMA message was sent");
    }
    site.check_unharmed(pids)
}

#[test]
fn sealed_memory_is_proven_shared() -> Result<()> {
    runs(Sharing::Sealed, true)
}

#[test]
fn unsealed_memory_is_proven_shared() -> Result<()> {
    runs(Sharing::Unsealed, true)
}

#[test]
fn without_a_descriptor_everything_goes_by_messages() -> Result<()> {
    runs(Sharing::Messages, false)
}

#[test]
fn memory_that_only_seems_shared_is_found_out() -> Result<()> {
    runs(Sharing::OtherMemory, false)
}

#[test]
fn without_bus_mastering_nothing_is_moved() -> Result<()> {
    use vmgmt_driver::backing::{Backing, COMMAND_MASTER};
    let site = site(1)?;
    let vm = site.vm(0)?;
    let mut ring = vm.ring(Mode::COMMON)?;
    ring.noop()?;
    vm.backing().set_command(0, COMMAND_MASTER)?;
    let buffer = ring.allocate(4096)?;
    buffer.store64(2048, 0x5555)?;
    let request =
        vmgmt_driver::channel::Request::new(vmgmt_driver::Opcode::ECHO).output(&buffer, 0, 4096, 2048);
    let tag = ring.start(request)?;
    // Nothing is answered: an answer would be DMA. That nothing is written is what counts; how long to look is arbitrary.
    let early = ring.finish(tag, Some(Instant::now() + Duration::from_millis(100)))?;
    ensure!(
        early.is_none(),
        "a completion was written without bus mastering: {early:?}"
    );
    ensure!(buffer.load64(2048)? == 0x5555);
    vm.backing().set_command(COMMAND_MASTER, 0)?;
    // It goes on, or the ring starts anew; a fresh one works in any case.
    drop(ring);
    echoes(&mut vm.ring(Mode::COMMON)?)
}

#[test]
fn after_an_unmap_nothing_is_written_there() -> Result<()> {
    let site = site(1)?;
    let pids = site.pids()?;
    std::fs::write(site.share().join("big"), pattern(32 << 20, 6))?;
    let vm = site.vm_with(0, GuestOptions::default().ram_bytes(128 << 20))?;
    let mut files = vm.ring(Mode::FILE)?;
    for round in 0..5_u64 {
        // A buffer in memory of its own at an address of its own, as a virtual IOMMU's guest has them.
        let ram = std::sync::Arc::new(vmgmt_testkit::client::GuestRam::new(
            32 << 20,
            vmgmt_testkit::client::Seal::Shrink,
        )?);
        let iova = (1 << 40) + (round << 30);
        vm.backing().with_client(|client| {
            client.dma_map(vmgmt_testkit::client::Mapping {
                iova,
                bytes: ram.bytes(),
                flags: 3,
                memory: Some((ram.fd(), 0)),
            })
        })?;
        let memory = vmgmt_driver::DmaMemory::map_file(ram.fd(), 0, 32 << 20, iova)?;
        let memory = std::sync::Arc::new(memory);
        // Memory of another object: until it is proven it is reached by messages, which this client does not serve there.
        ensure!(
            files.prove(&memory, 0x1357_9bdf ^ round)?,
            "shared memory was not proven"
        );
        let file = files.open_for_reading("work/big")?;
        let mut tags = Vec::new();
        for chunk in 0..32_usize {
            let request = vmgmt_driver::channel::Request::new(vmgmt_driver::Opcode::READ)
                .handle(file.handle)
                .offset((chunk << 20) as u64)
                .output(&memory, chunk << 20, 1 << 20, 0);
            tags.push(files.start(request)?);
        }
        // While the transfer runs.
        vm.backing()
            .with_client(|client| client.dma_unmap(iova, ram.bytes()))?;
        ram.write(0, &vec![0xee; 32 << 20])?;
        for tag in tags {
            let finished = files
                .finish(tag, deadline())?
                .context("a read was never completed")?;
            ensure!(
                matches!(
                    finished.status,
                    vmgmt_driver::Status::OK | vmgmt_driver::Status::BAD_ADDRESS
                ),
                "{:?}",
                finished.status
            );
        }
        let after = ram.read(0, 32 << 20)?;
        ensure!(
            after.iter().all(|byte| *byte == 0xee),
            "round {round}: DMA after the unmap was answered"
        );
        files.close(file.handle)?;
    }
    echoes(&mut files)?;
    site.check_unharmed(pids)
}

#[test]
fn what_is_mapped_anew_while_there_is_no_core_is_not_written() -> Result<()> {
    use rustix::process::{Pid, Signal, kill_process};
    use vmgmt_driver::Opcode;
    use vmgmt_driver::channel::Request;
    use vmgmt_driver::operations::chat::Receiver;
    use vmgmt_testkit::client::{GuestRam, Mapping, Seal};
    const BYTES: u64 = 1 << 20;
    const IOVA: u64 = 1 << 40;
    let site = site(2)?;
    let (source, target) = (site.vm(0)?, site.vm(1)?);
    let mut from = source.ring(Mode::CHAT)?;
    let mut at = target.ring(Mode::CHAT)?;
    let map = |ram: &GuestRam| {
        target.backing().with_client(|client| {
            client.dma_map(Mapping {
                iova: IOVA,
                bytes: BYTES,
                flags: 3,
                memory: Some((ram.fd(), 0)),
            })
        })
    };
    let ram = GuestRam::new(BYTES, Seal::Shrink)?;
    map(&ram)?;
    let memory = std::sync::Arc::new(vmgmt_driver::DmaMemory::map_file(
        ram.fd(),
        0,
        BYTES as usize,
        IOVA,
    )?);
    ensure!(at.prove(&memory, 0x1357_9bdf)?, "shared memory was not proven");
    let posted = at.start(Request::new(Opcode::RECEIVE).output(&memory, 0, 4096, 0))?;
    // Fetched in order: when this is answered the one before is in flight.
    at.noop()?;
    // No core lives before the keeper goes on.
    let keeper = Pid::from_raw(site.daemon.pid().cast_signed()).context("a pid")?;
    let core = site.daemon.role("core")?;
    let core_is = |states: &[char]| {
        let stat = std::fs::read_to_string(format!("/proc/{core}/stat")).unwrap_or_default();
        let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
        Ok(state.is_none_or(|state| states.contains(&state)).then_some(()))
    };
    // One that dies in the middle of its DMA owes the unmap until the keeper, which is to stand still, has seen it dead.
    wait_until("the core's sleep", PATIENCE, || core_is(&['S']))?;
    kill_process(keeper, Signal::STOP)?;
    let old = site.daemon.kill_role("core")?;
    wait_until("the core's death", PATIENCE, || core_is(&['Z']))?;
    let other = GuestRam::new(BYTES, Seal::Shrink)?;
    target
        .backing()
        .with_client(|client| client.dma_unmap(IOVA, BYTES))?;
    map(&other)?;
    kill_process(keeper, Signal::CONT)?;
    site.daemon.wait_for_new("core", old, PATIENCE)?;
    let finished = at
        .finish(posted, deadline())?
        .context("the receive was never completed")?;
    ensure!(
        finished.status == vmgmt_driver::Status::OUTCOME_UNKNOWN,
        "{finished:?}"
    );
    // The message goes to the next receive, and nothing of all that into either memory.
    from.send("vm1", b"for whom", 1)?;
    let mut receiver = Receiver::default();
    let message = at.receive(&mut receiver, deadline())?.context("no message")?;
    ensure!(message.bytes == b"for whom", "{message:?}");
    for (ram, what) in [(&ram, "the old"), (&other, "the new")] {
        // The proof's nonce lies in the old one.
        let written = ram.read(0, 4096)?.windows(8).any(|part| part == b"for whom");
        ensure!(!written, "{what} memory was written");
    }
    Ok(())
}

#[test]
fn what_waits_for_a_message_that_is_never_answered_goes_on_when_that_is_given_up() -> Result<()> {
    use vmgmt_driver::abi::file::open;
    use vmgmt_driver::channel::Request;
    use vmgmt_driver::{Opcode, Status};
    use vmgmt_testkit::client::{GuestRam, Mapping, Seal};
    const BYTES: u64 = 1 << 20;
    const IOVA: u64 = 1 << 40;
    let site = site(1)?;
    let pids = site.pids()?;
    std::fs::write(site.share().join("down"), pattern(4096, 8))?;
    let vm = site.vm(0)?;
    let mut files = vm.ring(Mode::FILE)?;
    let down = files.open_for_reading("work/down")?.handle;
    let up = files.open_file("work/up", open::CREATE | open::WRITE)?.handle;
    // The rings are in shared memory, the buffers are not, and the VM's process stands still.
    let ram = GuestRam::new(BYTES, Seal::Shrink)?;
    vm.backing().with_client(|client| {
        client.leave_unanswered();
        client.dma_map(Mapping {
            iova: IOVA,
            bytes: BYTES,
            flags: 3,
            memory: None,
        })
    })?;
    let memory = vmgmt_driver::DmaMemory::map_file(ram.fd(), 0, BYTES as usize, IOVA)?;
    let memory = std::sync::Arc::new(memory);
    let waits = [
        (
            "a transfer",
            Request::new(Opcode::WRITE).handle(up).input(&memory, 0, 4096, 0),
        ),
        (
            "a completion behind its payload",
            Request::new(Opcode::READ)
                .handle(down)
                .output(&memory, 4096, 4096, 0),
        ),
        (
            "a submission",
            Request::new(Opcode::ECHO).output(&memory, 8192, 4096, 2048),
        ),
    ];
    let mut started = Vec::new();
    for (what, request) in waits {
        started.push((what, files.start(request)?));
    }
    // Nobody rings a doorbell from here on: it is the core's own clock that ends the waits.
    for (what, tag) in started {
        let finished = files
            .finish(tag, Some(Instant::now() + 3 * PATIENCE))?
            .with_context(|| format!("{what} stands for ever"))?;
        ensure!(finished.status == Status::BAD_ADDRESS, "{what}: {finished:?}");
    }
    echoes(&mut files)?;
    site.check_unharmed(pids)
}
