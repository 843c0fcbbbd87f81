//! The device through each kind of driver in the guest: uio with INTx, vfio with MSI behind a virtual IOMMU, plain I/O ports.

use crate::site::{LONG, checksum, host_checksum, site};
use anyhow::{Result, ensure};
use vmgmt_testkit::vm::{Driver, Iommu, Vm};

/// What every driver must be able to do.
fn works(site: &crate::site::Site, vm: &Vm, backing: &str) -> Result<()> {
    site.check(&[vm], || {
        let info = vm.ok("vmgmt --json info")?;
        ensure!(info.contains(backing), "not through {backing}: {info}");
        vm.ok_for("vmgmt selftest", LONG)?;
        site.fill("in.bin", 3_000_001)?;
        vm.ok_for("vmgmt get data/in.bin /tmp/in.bin", LONG)?;
        ensure!(checksum(vm, "/tmp/in.bin")? == host_checksum(&site.shared("in.bin"))?);
        vm.ok_for("vmgmt put /tmp/in.bin data/out.bin", LONG)?;
        ensure!(host_checksum(&site.shared("out.bin"))? == host_checksum(&site.shared("in.bin"))?);
        let listed = vm.ok("vmgmt ls data")?;
        ensure!(
            listed.contains("in.bin") && listed.contains("out.bin"),
            "{listed}"
        );
        vm.ok("vmgmt stat data/out.bin && vmgmt rm data/out.bin")?;
        ensure!(!site.shared("out.bin").exists());
        let absent = vm.run("vmgmt get data/absent /tmp/absent")?;
        ensure!(
            absent.status == 4,
            "a name that is not there ended with {}: {}",
            absent.status,
            absent.text()
        );
        vm.ok("vmgmt send host 'from the guest'")?;
        let received = site.operator(&["recv", "--wait", "30"])?;
        ensure!(
            received.contains("from the guest") && received.contains("vm1"),
            "{received}"
        );
        Ok(())
    })
}

#[test]
fn uio_with_intx() -> Result<()> {
    let Some(site) = site(1)? else { return Ok(()) };
    let vm = site.vm("vm1")?;
    works(&site, &vm, "uio")
}

#[test]
fn uio_with_huge_pages() -> Result<()> {
    let Some(site) = site(1)? else { return Ok(()) };
    let vm = site.builder("vm1").guest_huge_pages(32).start()?;
    works(&site, &vm, "uio")
}

#[test]
fn vfio_behind_an_intel_iommu() -> Result<()> {
    let Some(site) = site(1)? else { return Ok(()) };
    let vm = site
        .builder("vm1")
        .iommu(Iommu::Intel)
        .driver(Driver::Vfio)
        .start()?;
    works(&site, &vm, "vfio")
}

#[test]
fn vfio_behind_a_virtio_iommu() -> Result<()> {
    let Some(site) = site(1)? else { return Ok(()) };
    let vm = site
        .builder("vm1")
        .iommu(Iommu::Virtio)
        .driver(Driver::Vfio)
        .start()?;
    works(&site, &vm, "vfio")
}

#[test]
fn ports_without_any_driver() -> Result<()> {
    let Some(site) = site(1)? else { return Ok(()) };
    let vm = site.builder("vm1").driver(Driver::None).start()?;
    site.check(&[&vm], || {
        std::fs::write(site.shared("small.txt"), b"read through ports\n")?;
        vm.ok_for("vmgmt --backing ports selftest", LONG)?;
        let text = vm.ok("vmgmt --backing ports get data/small.txt -")?;
        ensure!(text.trim() == "read through ports", "{text}");
        vm.ok("vmgmt --backing ports send host 'through ports'")?;
        let received = site.operator(&["recv", "--wait", "30"])?;
        ensure!(received.contains("through ports"), "{received}");
        Ok(())
    })
}
