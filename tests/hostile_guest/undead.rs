//! A core is killed while a write of a guest's sleeps in the disk, and the disk is late with it: it lands when the next core has served for
//! long. No file that a put has made holds it, and nobody but that put waits for it.

use super::*;
use vmgmt_ctl::protocol::{Call, Part, Upgrade, UpgradeState};
use vmgmt_driver::abi::file::SIZE_UNKNOWN;
use vmgmt_driver::abi::{Opcode, Status};
use vmgmt_driver::channel::Request;
use vmgmt_driver::{Buffer, Client};
use vmgmt_testkit::late_disk::LateDisk;

/// One request of the file system, so that all of it is held.
const PIECE: usize = 64 * 1024;

/// A site on a late disk; nothing where this machine has no FUSE for us.
fn site() -> Result<Option<(LateDisk, Site)>> {
    let disk = match LateDisk::mount() {
        Ok(disk) => disk,
        Err(error) => {
            vmgmt_testkit::skipped(format_args!("no file system of our own here: {error:#}"));
            return Ok(None);
        }
    };
    let site = SitePlan::new(env!("CARGO_BIN_EXE_vmgmtd"), 2)
        .server("drain-deadline-ms = 300")
        .share_at(disk.path())
        .start()?;
    Ok(Some((disk, site)))
}

fn write(handle: u64, offset: usize, buffer: &Buffer) -> Request {
    Request::new(Opcode::WRITE)
        .handle(handle)
        .offset(offset as u64)
        .input(buffer, 0, PIECE, 0)
}

/// There and back again under a name of its own.
fn moves_a_file(files: &mut Client, name: &str) -> Result<()> {
    let bytes = pattern(3 * PIECE as u32);
    let memory = files.allocate(bytes.len())?;
    memory.write(0, &bytes)?;
    let options = TransferOptions::default();
    let path = format!("work/{name}");
    files.put_from_memory(&path, &memory, bytes.len(), 0, &options)?;
    let (got, _) = files.get_to_memory(&path, &options)?;
    ensure!(
        got.to_vec(0, bytes.len())? == bytes,
        "{name} came back as another file"
    );
    files.remove(&path)?;
    Ok(())
}

fn is_there(process: u32) -> bool {
    std::path::Path::new(&format!("/proc/{process}")).exists()
}

/// A put of vm0 with two pieces, of which the first is being written again when the core is killed: its handle, and the dead core's process.
fn killed_in_a_write(disk: &LateDisk, site: &Site, files: &mut Client) -> Result<(u64, u32)> {
    let put = files.put("work/mine", SIZE_UNKNOWN, 0)?;
    let buffer = files.allocate(PIECE)?;
    buffer.write(0, &vec![b'0'; PIECE])?;
    for piece in 0..2 {
        files.call(write(put.handle, piece * PIECE, &buffer))?;
    }
    buffer.write(0, &vec![b'1'; PIECE])?;
    disk.hold_next_write();
    let held = files.start(write(put.handle, 0, &buffer))?;
    disk.wait_for_write(PATIENCE)?;
    let dead = site.daemon.kill_role("core")?;
    // (Nothing tells of its death, but that nobody answers this.)
    let cancelled = files
        .cancel(held, PATIENCE)?
        .context("a write that waits for a dead core's worker cannot be cancelled")?;
    ensure!(cancelled.status == Status::CANCELLED, "{:?}", cancelled.status);
    ensure!(is_there(dead), "the killed core was to sleep in the kernel");
    Ok((put.handle, dead))
}

/// Runs a test on a late disk (where this machine has one for us); who waits for that disk for too long has failed.
fn on_late_disk(test: fn(&LateDisk, &Site) -> Result<()>) -> Result<()> {
    let Some((disk, site)) = site()? else {
        return Ok(());
    };
    let (over, is_over) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let test = scope.spawn(|| {
            let outcome = test(&disk, &site);
            // Nobody listens where it took too long.
            let _ = over.send(());
            outcome
        });
        let in_time = is_over.recv_timeout(3 * PATIENCE).is_ok();
        disk.release();
        let outcome = test.join().map_err(|_| anyhow::anyhow!("the test panicked"))?;
        ensure!(in_time, "somebody waits for the disk: {outcome:?}");
        outcome.with_context(|| site.daemon.log().tail())
    })
}

#[test]
fn a_write_of_a_dead_core_that_lands_late_is_in_no_file_that_was_put() -> Result<()> {
    on_late_disk(lands_late)
}

#[test]
fn a_guest_that_leaves_a_put_which_waits_does_not_wait_and_comes_back_to_it() -> Result<()> {
    on_late_disk(leaves_and_comes_back)
}

#[test]
fn an_upgrade_does_not_wait_for_what_waits_and_the_next_core_goes_on_with_it() -> Result<()> {
    on_late_disk(upgraded_meanwhile)
}

#[test]
fn an_upgrade_ends_although_the_old_core_sleeps_in_the_disk_and_no_file_is_torn() -> Result<()> {
    on_late_disk(drained_too_late)
}

fn lands_late(disk: &LateDisk, site: &Site) -> Result<()> {
    let (vm, neighbour) = (site.vm(0)?, site.vm(1)?);
    let mut files = vm.ring(Mode::FILE)?;
    let mut theirs = neighbour.ring(Mode::FILE)?;
    moves_a_file(&mut theirs, "theirs")?;
    let (handle, dead) = killed_in_a_write(disk, site, &mut files)?;
    // The guest has thought better of it: other bytes there, and that is the file.
    let buffer = files.allocate(PIECE)?;
    buffer.write(0, &vec![b'2'; PIECE])?;
    let wanted = [vec![b'2'; PIECE], vec![b'0'; PIECE]].concat();
    let written = files.start(write(handle, 0, &buffer))?;
    // Meanwhile all others go on, and this guest with whatever else it has.
    for _ in 0..3 {
        moves_a_file(&mut theirs, "theirs")?;
        let mut others = vm.ring(Mode::FILE)?;
        moves_a_file(&mut others, "other")?;
    }
    ensure!(is_there(dead), "the killed core was to sleep all the time");
    disk.release();
    let deadline = std::time::Instant::now() + PATIENCE;
    let finished = files.finish(written, Some(deadline))?.context("it hangs")?;
    ensure!(finished.status == Status::OK, "{:?}", finished.status);
    wait_until("the end of the core that slept", PATIENCE, || {
        Ok((!is_there(dead)).then_some(()))
    })?;
    // What was written last is known to be there: the checksum of these bytes is taken as it was found then.
    files.commit(handle, wanted.len() as u64, Some(crc32fast::hash(&wanted)), false)?;
    let found = disk.contents("mine").context("the file was put")?;
    let first = found.first().copied().map(char::from);
    ensure!(
        found == wanted,
        "the file holds {first:?}: what a dead core wrote"
    );
    ensure!(disk.names() == ["mine"], "{:?}", disk.names());
    moves_a_file(&mut files, "other")
}

fn leaves_and_comes_back(disk: &LateDisk, site: &Site) -> Result<()> {
    let vm = site.vm(0)?;
    let mut files = vm.ring(Mode::FILE)?;
    let (_, dead) = killed_in_a_write(disk, site, &mut files)?;
    // The ring goes, the device is reset, and a new program begins.
    drop(files);
    drop(vm);
    let vm = wait_until("vm0's place", PATIENCE, || Ok(site.vm(0).ok()))?;
    let mut files = vm.ring(Mode::FILE)?;
    moves_a_file(&mut files, "other")?;
    let refused = files.put("work/mine", SIZE_UNKNOWN, 0);
    let text = refused.map(|put| put.handle).map_err(|error| error.to_string());
    ensure!(text.as_ref().is_err_and(|text| text.contains("busy")), "{text:?}");
    ensure!(is_there(dead), "the killed core was to sleep all the time");
    disk.release();
    wait_until(
        "the put that nobody wanted any more is tidied up",
        PATIENCE,
        || Ok(disk.names().is_empty().then_some(())),
    )?;
    moves_a_file(&mut files, "mine")
}

fn upgraded_meanwhile(disk: &LateDisk, site: &Site) -> Result<()> {
    let vm = site.vm(0)?;
    let mut files = vm.ring(Mode::FILE)?;
    let (handle, dead) = killed_in_a_write(disk, site, &mut files)?;
    let buffer = files.allocate(PIECE)?;
    buffer.write(0, &vec![b'2'; PIECE])?;
    let written = files.start(write(handle, 0, &buffer))?;
    moves_a_file(&mut vm.ring(Mode::FILE)?, "other")?;
    upgrade(site)?;
    moves_a_file(&mut vm.ring(Mode::FILE)?, "other")?;
    ensure!(is_there(dead), "the killed core was to sleep all the time");
    disk.release();
    let deadline = std::time::Instant::now() + PATIENCE;
    let finished = files.finish(written, Some(deadline))?.context("it hangs")?;
    ensure!(finished.status == Status::OK, "{:?}", finished.status);
    let wanted = [vec![b'2'; PIECE], vec![b'0'; PIECE]].concat();
    files.commit(handle, wanted.len() as u64, Some(crc32fast::hash(&wanted)), false)?;
    ensure!(
        disk.contents("mine") == Some(wanted),
        "what a dead core wrote is in the file"
    );
    Ok(())
}

/// Another program becomes the core.
fn upgrade(site: &Site) -> Result<()> {
    let wish = Call::Upgrade(Upgrade {
        to: Some(env!("CARGO_BIN_EXE_vmgmtd").into()),
        parts: vec![Part::Core],
    });
    let asked = |call: &Call| -> Result<serde_json::Value> {
        let mut client = vmgmt_ctl::Client::connect(&site.control())?;
        Ok(client.call(call, &[], Some(PATIENCE), &mut |_| true)?)
    };
    asked(&wish)?;
    let report = wait_until("the end of the upgrade", PATIENCE, || {
        // Between two cores nobody may be there to answer.
        let status = asked(&Call::Status).and_then(|told| Ok(serde_json::from_value(told)?));
        let status = status
            .ok()
            .and_then(|status: vmgmt_ctl::protocol::Status| status.upgrade);
        Ok(status.filter(|report| report.is_over()))
    })?;
    ensure!(report.state == UpgradeState::Done, "{report:?}");
    Ok(())
}

/// A write sleeps in the disk when the core is to drain, past its deadline.
fn drained_too_late(disk: &LateDisk, site: &Site) -> Result<()> {
    let (vm, neighbour) = (site.vm(0)?, site.vm(1)?);
    let mut files = vm.ring(Mode::FILE)?;
    let put = files.put("work/mine", SIZE_UNKNOWN, 0)?;
    let buffer = files.allocate(PIECE)?;
    buffer.write(0, &vec![b'0'; PIECE])?;
    for piece in 0..2 {
        files.call(write(put.handle, piece * PIECE, &buffer))?;
    }
    buffer.write(0, &vec![b'1'; PIECE])?;
    disk.hold_next_write();
    let held = files.start(write(put.handle, 0, &buffer))?;
    disk.wait_for_write(PATIENCE)?;
    let old = site.daemon.role("core")?;
    upgrade(site)?;
    ensure!(
        is_there(old),
        "the old core was to sleep in the kernel beyond its end"
    );
    // It hinders nobody but this put.
    moves_a_file(&mut neighbour.ring(Mode::FILE)?, "theirs")?;
    moves_a_file(&mut vm.ring(Mode::FILE)?, "other")?;
    disk.release();
    let deadline = std::time::Instant::now() + PATIENCE;
    let finished = files.finish(held, Some(deadline))?.context("it hangs")?;
    ensure!(finished.status == Status::OK, "{:?}", finished.status);
    let wanted = [vec![b'1'; PIECE], vec![b'0'; PIECE]].concat();
    files.commit(
        put.handle,
        wanted.len() as u64,
        Some(crc32fast::hash(&wanted)),
        false,
    )?;
    ensure!(disk.contents("mine") == Some(wanted), "the file is torn");
    ensure!(disk.names() == ["mine"], "{:?}", disk.names());
    Ok(())
}
