//! Guest memory of every kind: not shared at all, private behind a descriptor, and what the VM's owner gets told.

use crate::site::{LONG, checksum, host_checksum, site};
use anyhow::{Result, ensure};
use vmgmt_testkit::huge_pages::HugePages;
use vmgmt_testkit::vm::Memory;

/// A VM of 256 MiB, and its firmware's memory.
const HUGE_PAGES: u64 = 160;

fn transfers(memory: Memory, bytes: usize) -> Result<()> {
    let Some(site) = site(1)? else { return Ok(()) };
    let vm = site.builder("vm1").memory(memory).start()?;
    site.check(&[&vm], || {
        site.fill("in.bin", bytes)?;
        vm.ok_for("vmgmt selftest", LONG)?;
        vm.ok_for("vmgmt get data/in.bin /tmp/in.bin", LONG)?;
        ensure!(checksum(&vm, "/tmp/in.bin")? == host_checksum(&site.shared("in.bin"))?);
        vm.ok_for("vmgmt put /tmp/in.bin data/out.bin", LONG)?;
        ensure!(host_checksum(&site.shared("out.bin"))? == host_checksum(&site.shared("in.bin"))?);
        Ok(())
    })
}

#[test]
fn memory_without_a_descriptor_goes_by_messages() -> Result<()> {
    transfers(Memory::Plain, 2_000_003)
}

#[test]
fn private_memory_is_found_out_and_goes_by_messages() -> Result<()> {
    let Some(site) = site(1)? else { return Ok(()) };
    let vm = site.builder("vm1").memory(Memory::Private).start()?;
    site.check(&[&vm], || {
        site.fill("in.bin", 2_000_003)?;
        vm.ok_for("vmgmt get data/in.bin /tmp/in.bin", LONG)?;
        ensure!(checksum(&vm, "/tmp/in.bin")? == host_checksum(&site.shared("in.bin"))?);
        // The operator is told why this VM is slow, and what to do.
        let log = site.operator(&["log"])?;
        ensure!(log.contains("share=on"), "the log does not say what to do: {log}");
        Ok(())
    })
}

#[test]
fn memory_of_huge_pages() -> Result<()> {
    let _pages = match HugePages::borrow(HUGE_PAGES) {
        Ok(pages) => pages,
        Err(reason) => {
            vmgmt_testkit::skipped(reason);
            return Ok(());
        }
    };
    transfers(Memory::HugePages, 8_000_003)
}

#[test]
fn memory_in_a_file() -> Result<()> {
    transfers(Memory::File, 8_000_003)
}
