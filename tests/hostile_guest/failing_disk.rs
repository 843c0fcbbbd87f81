//! A disk that fails when a name is to be made durable: whoever asked for that is told that the file is there, and that no more is known. One that fails
//! when the bytes are: there is no file, and no second COMMIT makes one of what the disk has lost.

use super::*;
use vmgmt_driver::abi::Status;
use vmgmt_driver::abi::file::unknown;
use vmgmt_driver::{Client, DriverError};
use vmgmt_testkit::late_disk::LateDisk;

/// A daemon whose share is a disk that can be told to fail; nothing, said to be skipped, where there can be no such disk.
fn with_a_disk() -> Result<Option<(LateDisk, Site)>> {
    let disk = match LateDisk::mount() {
        Ok(disk) => disk,
        Err(error) => {
            vmgmt_testkit::skipped(format_args!("no file system of our own here: {error:#}"));
            return Ok(None);
        }
    };
    let site = SitePlan::new(env!("CARGO_BIN_EXE_vmgmtd"), 1)
        .share_at(disk.path())
        .start()?;
    Ok(Some((disk, site)))
}

/// That it was told so, for people and for programs.
fn is_told(outcome: &Result<(), DriverError>) -> Result<()> {
    let told = matches!(outcome, Err(DriverError::Refused(refusal))
        if (refusal.status, refusal.detail) == (Status::OUTCOME_UNKNOWN, unknown::NOT_DURABLE));
    let text = outcome
        .as_ref()
        .map_or_else(ToString::to_string, |()| String::new());
    ensure!(told && text.contains("the file is there"), "{outcome:?}: {text}");
    Ok(())
}

#[test]
fn a_file_whose_name_may_not_be_durable_is_there_and_said_to_be() -> Result<()> {
    let Some((disk, site)) = with_a_disk()? else {
        return Ok(());
    };
    let vm = site.vm(0)?;
    let mut files = vm.ring(Mode::FILE)?;
    let bytes = pattern(1000);
    let memory = files.allocate(bytes.len())?;
    memory.write(0, &bytes)?;
    let put = |files: &mut Client, name: &str| {
        let put = files.put(&format!("work/{name}"), bytes.len() as u64, 0)?;
        let options = TransferOptions::default();
        let done = files.write_from(put.handle, &memory, bytes.len(), &options)?;
        files
            .commit(put.handle, done.bytes, done.checksum, true)
            .map(drop)
    };
    put(&mut files, "whole")?;
    disk.fail_directory_syncs(true);
    is_told(&put(&mut files, "unsure"))?;
    ensure!(
        disk.contents("unsure").as_ref() == Some(&bytes),
        "it is not there"
    );
    is_told(&files.rename("work/unsure", "work/moved", 0, true))?;
    ensure!(
        disk.contents("moved").as_ref() == Some(&bytes),
        "it was not moved"
    );
    // What is not to be durable has nothing to do with it; and the disk may recover.
    files.rename("work/moved", "work/again", 0, false)?;
    disk.fail_directory_syncs(false);
    files.rename("work/again", "work/sure", 0, true)?;
    ensure!(disk.names() == ["sure", "whole"], "{:?}", disk.names());
    Ok(())
}

#[test]
fn bytes_that_the_disk_has_lost_get_no_name_at_a_second_attempt() -> Result<()> {
    let Some((disk, site)) = with_a_disk()? else {
        return Ok(());
    };
    let vm = site.vm(0)?;
    let mut files = vm.ring(Mode::FILE)?;
    let bytes = pattern(1000);
    let memory = files.allocate(bytes.len())?;
    memory.write(0, &bytes)?;
    let put = files.put("work/file", bytes.len() as u64, 0)?;
    let options = TransferOptions::default();
    let done = files.write_from(put.handle, &memory, bytes.len(), &options)?;
    disk.fail_file_syncs(true);
    let commit = |files: &mut Client| match files.commit(put.handle, done.bytes, done.checksum, true) {
        Err(DriverError::Refused(refusal)) => Ok(refusal.status),
        other => anyhow::bail!("{other:?}"),
    };
    ensure!(commit(&mut files)? == Status::IO_ERROR, "the disk has failed");
    // The system says that once.
    disk.fail_file_syncs(false);
    ensure!(commit(&mut files)? == Status::STALE, "the bytes are lost");
    ensure!(disk.names().is_empty(), "{:?}", disk.names());
    files.close(put.handle)?;
    let put = files.put("work/file", bytes.len() as u64, 0)?;
    let done = files.write_from(put.handle, &memory, bytes.len(), &options)?;
    files.commit(put.handle, done.bytes, done.checksum, true)?;
    ensure!(disk.contents("file").as_ref() == Some(&bytes), "it is not there");
    Ok(())
}
