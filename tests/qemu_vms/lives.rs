//! VMs, devices, drivers and cores that end and begin again while others go on.

use crate::site::{LONG, SHORT, checksum, host_checksum, site};
use anyhow::{Context, Result, ensure};
use std::thread;
use std::time::Duration;
use vmgmt_testkit::deaths::while_cores_die;
use vmgmt_testkit::process::wait_until;
use vmgmt_testkit::vm::{Driver, Vm, VmBuilder};

fn both(site: &crate::site::Site) -> Result<(Vm, Vm)> {
    thread::scope(|scope| {
        let second = scope.spawn(|| site.vm("vm2"));
        let first = site.vm("vm1")?;
        Ok((first, second.join().ok().context("a thread died")??))
    })
}

/// A loop of transfers in a VM that ends when /tmp/enough is there, and fails with the first transfer that fails.
const TRANSFERS: &str = "while [ ! -e /tmp/enough ]; do vmgmt get --force data/big.bin /tmp/big.bin || exit 1; echo moved; done; rm /tmp/big.bin";

#[test]
fn the_core_is_killed_and_the_guest_does_nothing_about_it() -> Result<()> {
    let Some(site) = site(1)? else { return Ok(()) };
    let vm = site.vm("vm1")?;
    site.check(&[&vm], || {
        site.fill("in.bin", 1_000_000)?;
        vm.ok_for("vmgmt get data/in.bin /tmp/in.bin", LONG)?;
        for _ in 0..3 {
            let old = site.daemon.kill_role("core")?;
            // Registers are the front's: they answer whether there is a core or not.
            vm.ok("vmgmt info")?;
            site.daemon.wait_for_new("core", old, SHORT)?;
            vm.ok_for("vmgmt selftest", LONG)?;
            vm.ok_for("vmgmt get --force data/in.bin /tmp/in.bin", LONG)?;
            ensure!(checksum(&vm, "/tmp/in.bin")? == host_checksum(&site.shared("in.bin"))?);
        }
        Ok(())
    })
}

#[test]
fn files_go_every_way_while_cores_die_and_no_command_fails() -> Result<()> {
    let Some(site) = site(2)? else { return Ok(()) };
    let (vm1, vm2) = both(&site)?;
    site.check(&[&vm1, &vm2], || {
        site.fill("in.bin", (6 << 20) + 77)?;
        let expected = host_checksum(&site.shared("in.bin"))?;
        let apart = Duration::from_millis(150);
        let mut deaths = 0;
        for round in 0..2_u64 {
            let ((), died) = while_cores_die(&site.daemon, 31 * round + 3, apart, SHORT, || {
                vm1.ok_for(&format!("vmgmt get data/in.bin /tmp/got{round}"), LONG)?;
                vm1.ok_for(&format!("vmgmt put /tmp/got{round} data/put{round}"), LONG)?;
                let accept = vm2.spawn("vmgmt accept --once --into /tmp")?;
                vm1.ok_for(&format!("vmgmt cp /tmp/got{round} vm2:"), LONG)?;
                accept.wait(LONG)?.ok().map(drop)
            })?;
            deaths += died;
            ensure!(checksum(&vm1, &format!("/tmp/got{round}"))? == expected, "get");
            ensure!(
                host_checksum(&site.shared(&format!("put{round}")))? == expected,
                "put"
            );
            ensure!(checksum(&vm2, &format!("/tmp/got{round}"))? == expected, "cp");
        }
        ensure!(deaths >= 6, "only {deaths} cores died");
        Ok(())
    })
}

#[test]
fn every_part_is_upgraded_during_a_transfer_and_the_guest_sees_nothing() -> Result<()> {
    let Some(site) = site(1)? else { return Ok(()) };
    let vm = site.vm("vm1")?;
    site.check(&[&vm], || {
        site.fill("big.bin", 16 << 20)?;
        let mut transfers = vm.spawn(TRANSFERS)?;
        transfers.wait_for("moved", LONG)?;
        let next = site.daemon.path("vmgmtd-next");
        std::fs::copy(env!("CARGO_BIN_EXE_vmgmtd"), &next)?;
        let next = next.to_str().context("the path of the program")?.to_owned();
        for part in ["core", "front", "keeper", "front", "core"] {
            let old = (site.daemon.pid(), site.daemon.role(part).ok());
            let told = site.operator(&["upgrade", "--part", part, "--to", &next])?;
            ensure!(told.contains("done"), "{part}: {told}");
            // The keeper stays the process that it was; the others are new ones.
            ensure!(site.daemon.pid() == old.0);
            ensure!(
                part == "keeper" || site.daemon.role(part).ok() != old.1,
                "{part} is the same"
            );
            transfers.wait_for("moved", LONG)?;
        }
        vm.ok("touch /tmp/enough")?;
        transfers.wait(LONG)?.ok().context("a transfer failed")?;
        vm.ok_for("vmgmt selftest && vmgmt get data/big.bin /tmp/big.bin", LONG)?;
        ensure!(checksum(&vm, "/tmp/big.bin")? == host_checksum(&site.shared("big.bin"))?);
        Ok(())
    })
}

#[test]
fn a_receive_that_waits_outlives_the_core() -> Result<()> {
    let Some(site) = site(1)? else { return Ok(()) };
    let vm = site.vm("vm1")?;
    site.check(&[&vm], || {
        let receive = vm.spawn("vmgmt recv --count 1 --timeout 60")?;
        wait_until("vm1 waits for a message", SHORT, || {
            Ok(site
                .operator(&["--json", "vms"])?
                .contains("\"listening\":true")
                .then_some(()))
        })?;
        let old = site.daemon.kill_role("core")?;
        site.daemon.wait_for_new("core", old, SHORT)?;
        wait_until("the new core serves", SHORT, || {
            Ok(site.operator(&["send", "vm1", "after the crash"]).ok())
        })?;
        ensure!(receive.wait(SHORT)?.ok()?.contains("after the crash"));
        Ok(())
    })
}

#[test]
fn a_guest_reboots_during_a_transfer() -> Result<()> {
    let Some(site) = site(1)? else { return Ok(()) };
    let vm = site.vm("vm1")?;
    site.check(&[&vm], || {
        site.fill("big.bin", 32 << 20)?;
        let mut transfers = vm.spawn(TRANSFERS)?;
        transfers.wait_for("moved", LONG)?;
        vm.reset()?;
        drop(transfers);
        vm.ok_for("vmgmt selftest && vmgmt get data/big.bin /tmp/big.bin", LONG)?;
        ensure!(checksum(&vm, "/tmp/big.bin")? == host_checksum(&site.shared("big.bin"))?);
        Ok(())
    })
}

#[test]
fn one_qemu_is_killed_during_a_transfer_and_the_other_goes_on() -> Result<()> {
    let Some(site) = site(2)? else { return Ok(()) };
    let (vm1, vm2) = both(&site)?;
    site.check(&[&vm1, &vm2], || {
        site.fill("big.bin", 16 << 20)?;
        let mut dying = vm1.spawn(TRANSFERS)?;
        let mut living = vm2.spawn(TRANSFERS)?;
        dying.wait_for("moved", LONG)?;
        living.wait_for("moved", LONG)?;
        vm1.kill();
        vm2.ok("touch /tmp/enough")?;
        living
            .wait(LONG)?
            .ok()
            .context("the neighbour's transfer failed")?;
        // Its socket takes the VM again.
        let again = site.vm("vm1")?;
        again.ok_for("vmgmt selftest", LONG)?;
        Ok(())
    })
}

#[test]
fn a_device_is_unplugged_and_plugged_again() -> Result<()> {
    let Some(site) = site(2)? else { return Ok(()) };
    let socket = site.daemon.path("vm1.sock");
    let (vm1, vm2) = thread::scope(|scope| {
        let second = scope.spawn(|| site.vm("vm2"));
        let first = VmBuilder::new(&site.tools, "vm1")
            .driver(Driver::Uio)
            .ports(1)
            .start()?;
        anyhow::Ok((first, second.join().ok().context("a thread died")??))
    })?;
    site.check(&[&vm1, &vm2], || {
        site.fill("big.bin", 4 << 20)?;
        let mut living = vm2.spawn(TRANSFERS)?;
        living.wait_for("moved", LONG)?;
        for what in ["plugged in", "and once more", "and at last"] {
            // To a VM without a device: its mailbox keeps it.
            site.operator(&["send", "vm1", what])?;
            vm1.plug(&socket, "mgmt", 0)?;
            wait_until("the guest sees the device", SHORT, || {
                Ok((vm1.run("grep -q 0x10f0 /sys/bus/pci/devices/*/device")?.status == 0).then_some(()))
            })?;
            vm1.ok_for("vmgmt bind --driver uio && vmgmt selftest", LONG)?;
            as_before(&site, &vm1, what)?;
            // Between two looks, so that the neighbour is in the middle of something.
            living.wait_for("moved", LONG)?;
            vm1.unplug("mgmt")?;
        }
        vm2.ok("touch /tmp/enough")?;
        living
            .wait(LONG)?
            .ok()
            .context("the neighbour's transfer failed")?;
        Ok(())
    })
}

/// The share can be read, and the mailbox holds the one message `what`, once.
fn as_before(site: &crate::site::Site, vm: &Vm, what: &str) -> Result<()> {
    vm.ok_for("vmgmt get --force data/big.bin /tmp/got.bin", LONG)?;
    ensure!(
        checksum(vm, "/tmp/got.bin")? == host_checksum(&site.shared("big.bin"))?,
        "{what}: the share"
    );
    let mail = vm.ok_for("vmgmt recv --count 1 --timeout 30", LONG)?;
    ensure!(mail.contains(what), "{what}: the mail is {mail:?}");
    let more = vm.run("vmgmt recv --count 1 --timeout 1")?;
    ensure!(more.status == 5, "{what}: {}", more.text());
    Ok(())
}

#[test]
fn the_guests_driver_is_unloaded_and_loaded_again() -> Result<()> {
    let Some(site) = site(1)? else { return Ok(()) };
    let vm = site.vm("vm1")?;
    site.check(&[&vm], || {
        vm.ok("vmgmt send vm1 'before the reload'")?;
        for _ in 0..3 {
            vm.ok("vmgmt bind --driver none && rmmod uio_pci_generic")?;
            vm.ok_for("vmgmt bind --driver uio && vmgmt selftest", LONG)?;
        }
        // Killed while it holds the device.
        let mut receive = vm.spawn("vmgmt recv --count 2 --timeout 60")?;
        receive.wait_for("before the reload", SHORT)?;
        receive.signal("KILL")?;
        vm.ok_for("vmgmt selftest", LONG)?;
        Ok(())
    })
}

#[test]
fn a_vm_that_was_away_finds_its_mail() -> Result<()> {
    let Some(site) = site(2)? else { return Ok(()) };
    let (vm1, vm2) = both(&site)?;
    site.check(&[&vm1, &vm2], || {
        let peer = |wanted: &str| -> Result<bool> {
            let said = vm2.ok("vmgmt --json peers")?;
            Ok(said
                .lines()
                .any(|line| line.contains("\"name\":\"vm1\"") && line.contains(wanted)))
        };
        ensure!(peer("\"connected\":true")?, "vm1 is there and is not seen");
        vm1.quit(SHORT)?;
        wait_until("vm2 sees that vm1 is away", SHORT, || {
            Ok(peer("\"connected\":false")?.then_some(()))
        })?;
        vm2.ok("vmgmt send vm1 'from the other, first'")?;
        site.operator(&["send", "vm1", "from the host, second"])?;
        vm2.ok("vmgmt send vm1 'from the other, third'")?;
        let again = site.vm("vm1")?;
        let received = again.ok_for("vmgmt --json recv --count 3 --timeout 30", LONG)?;
        let places: Vec<Option<usize>> = ["first", "second", "third"]
            .iter()
            .map(|word| received.find(word))
            .collect();
        ensure!(
            places.iter().all(Option::is_some) && places.is_sorted(),
            "mail is missing or out of order: {received}"
        );
        ensure!(
            received.matches("\"from_mailbox\":true").count() == 3,
            "it does not say that it waited: {received}"
        );
        ensure!(peer("\"connected\":true")?, "vm1 is back and is not seen");
        // Once.
        let more = again.run("vmgmt recv --count 1 --timeout 1")?;
        ensure!(more.status == 5, "mail came twice: {}", more.text());
        Ok(())
    })
}

/// What a guest can do to its device without asking anybody: commands of the guest, and what it is.
const UPHEAVALS: [(&str, &str); 4] = [
    (
        "the function is reset",
        "echo 1 > $(dirname $(grep -l 0x10f0 /sys/bus/pci/devices/*/device))/reset",
    ),
    (
        "bus mastering goes off",
        "setpci_off() { d=$(dirname $(grep -l 0x10f0 /sys/bus/pci/devices/*/device)); printf '\\003' | dd of=$d/config bs=1 seek=4 conv=notrunc 2>/dev/null; }; setpci_off",
    ),
    (
        "the driver is unloaded and loaded",
        "vmgmt bind --driver none && rmmod uio_pci_generic && vmgmt bind --driver uio",
    ),
    (
        "the device is taken off the bus and found again",
        "d=$(dirname $(grep -l 0x10f0 /sys/bus/pci/devices/*/device)); echo 1 > $d/remove; echo 1 > /sys/bus/pci/rescan; vmgmt bind --driver uio",
    ),
];

#[test]
fn mail_and_shares_are_there_after_whatever_happens_to_the_device_while_others_run() -> Result<()> {
    let Some(site) = site(2)? else { return Ok(()) };
    let (vm1, vm2) = both(&site)?;
    site.check(&[&vm1, &vm2], || {
        site.fill("big.bin", 4 << 20)?;
        let mut living = vm2.spawn(TRANSFERS)?;
        living.wait_for("moved", LONG)?;
        let as_before = |what: &str| as_before(&site, &vm1, what);
        for (what, command) in UPHEAVALS {
            site.operator(&["send", "vm1", what])?;
            vm1.ok_for(command, LONG).context(what)?;
            as_before(what).context(what)?;
        }
        // One that receives would take along what is delivered to it; this one waits for offers.
        let killed = "the program that has the device is killed";
        site.operator(&["send", "vm1", killed])?;
        let mut holder = vm1.spawn("exec vmgmt accept --into /tmp")?;
        wait_until("the program has the device", SHORT, || {
            let held = vm1.run("ls -l /proc/[0-9]*/fd 2>/dev/null | grep -q /dev/uio")?;
            Ok((held.status == 0).then_some(()))
        })?;
        holder.signal("KILL")?;
        as_before(killed)?;
        site.operator(&["send", "vm1", "it boots again"])?;
        vm1.reset()?;
        as_before("it boots again")?;
        vm2.ok("touch /tmp/enough")?;
        living
            .wait(LONG)?
            .ok()
            .context("the neighbour's transfer failed")?;
        Ok(())
    })
}
