//! Several VMs on one vmgmtd: files and messages between them, and a shared socket.

use crate::site::{LONG, SHORT, checksum, host_checksum, site};
use anyhow::{Context, Result, ensure};
use std::thread;
use vmgmt_testkit::vm::{Driver, Vm, VmBuilder};

fn boot_all(site: &crate::site::Site, names: &[&str]) -> Result<Vec<Vm>> {
    thread::scope(|scope| {
        let starting: Vec<_> = names.iter().map(|name| scope.spawn(|| site.vm(name))).collect();
        starting
            .into_iter()
            .map(|vm| vm.join().ok().context("a VM's thread died")?)
            .collect()
    })
}

#[test]
fn four_vms_pass_files_and_messages_round() -> Result<()> {
    let Some(site) = site(4)? else { return Ok(()) };
    let names = ["vm1", "vm2", "vm3", "vm4"];
    let vms = boot_all(&site, &names)?;
    let all: Vec<&Vm> = vms.iter().collect();
    site.check(&all, || {
        site.fill("start.bin", 4_000_037)?;
        vms[0].ok_for("vmgmt get data/start.bin /tmp/file.bin", LONG)?;
        for pair in vms.windows(2) {
            let accept = pair[1].spawn("vmgmt accept --once --into /tmp")?;
            pair[0].ok_for(&format!("vmgmt cp /tmp/file.bin {}:", pair[1].name()), LONG)?;
            accept.wait(LONG)?.ok()?;
        }
        vms[3].ok_for("vmgmt put /tmp/file.bin data/end.bin", LONG)?;
        ensure!(host_checksum(&site.shared("end.bin"))? == host_checksum(&site.shared("start.bin"))?);

        // All four at once, each its own file.
        thread::scope(|scope| {
            let work: Vec<_> = vms
                .iter()
                .map(|vm| {
                    scope.spawn(move || {
                        let name = vm.name();
                        vm.ok_for(&format!("vmgmt put /tmp/file.bin data/{name}.bin && vmgmt get data/{name}.bin /tmp/back.bin"), LONG)?;
                        checksum(vm, "/tmp/back.bin")
                    })
                })
                .collect();
            let expected = host_checksum(&site.shared("start.bin"))?;
            for sum in work {
                ensure!(sum.join().ok().context("a thread died")?? == expected);
            }
            anyhow::Ok(())
        })?;

        for (from, to) in [(0, 1), (1, 2), (2, 3), (3, 0)] {
            let receive = vms[to].spawn("vmgmt recv --count 1 --timeout 60")?;
            vms[from].ok(&format!("vmgmt send {} 'hello from {}'", names[to], names[from]))?;
            let received = receive.wait(SHORT)?.ok()?;
            ensure!(received.contains(&format!("hello from {}", names[from])), "{received}");
        }
        // To a VM that is away: the mailbox keeps it.
        vms[0].ok("vmgmt send vm2 'kept for you'")?;
        let received = vms[1].ok("vmgmt recv --count 1 --timeout 60")?;
        ensure!(received.contains("kept for you"), "{received}");
        let peers = vms[0].ok("vmgmt peers")?;
        ensure!(peers.contains("host"), "{peers}");
        let vms_shown = site.operator(&["vms"])?;
        ensure!(names.iter().all(|name| vms_shown.contains(name)), "{vms_shown}");
        Ok(())
    })
}

#[test]
fn a_shared_socket_serves_vms_that_nobody_named() -> Result<()> {
    let Some(site) = site(0)? else { return Ok(()) };
    let start = |name: &'static str| {
        VmBuilder::new(&site.tools, name)
            .driver(Driver::Uio)
            .device(site.daemon.path("shared.sock"), "mgmt")
            .start()
    };
    let (first, second) = thread::scope(|scope| {
        let second = scope.spawn(|| start("second"));
        (start("first"), second.join())
    });
    let (first, second) = (first?, second.ok().context("a thread died")??);
    site.check(&[&first, &second], || {
        site.fill("in.bin", 1_000_000)?;
        for vm in [&first, &second] {
            vm.ok_for("vmgmt get data/in.bin /tmp/in.bin", LONG)?;
        }
        let name = |vm: &Vm| -> Result<String> {
            let said = vm.ok("vmgmt --json info")?;
            let line = said
                .lines()
                .find(|line| line.starts_with('{'))
                .context("info gives no object")?;
            let info: serde_json::Value = serde_json::from_str(line).with_context(|| said.clone())?;
            Ok(info["name"].as_str().context("info has no name")?.to_owned())
        };
        let (one, two) = (name(&first)?, name(&second)?);
        ensure!(one != two && one.starts_with("anon-"), "{one} and {two}");
        let receive = second.spawn("vmgmt recv --count 1 --timeout 60")?;
        first.ok(&format!("vmgmt send {two} 'across'"))?;
        ensure!(receive.wait(SHORT)?.ok()?.contains("across"));
        Ok(())
    })
}

#[test]
fn the_host_pushes_and_pulls() -> Result<()> {
    let Some(site) = site(1)? else { return Ok(()) };
    let vm = site.vm("vm1")?;
    site.check(&[&vm], || {
        site.fill("in.bin", 2_500_000)?;
        let expected = host_checksum(&site.shared("in.bin"))?;
        let mut accept = vm.spawn("mkdir -p /tmp/in && vmgmt accept --into /tmp/in --serve /tmp/in")?;
        accept.pid(SHORT)?;
        let source = site.shared("in.bin");
        site.operator(&["push", source.to_str().context("a path")?, "vm1:pushed.bin"])?;
        let target = site.daemon.path("pulled.bin");
        site.operator(&["pull", "vm1:pushed.bin", target.to_str().context("a path")?])?;
        ensure!(host_checksum(&target)? == expected);
        ensure!(checksum(&vm, "/tmp/in/pushed.bin")? == expected);
        let refused = site.operator(&["pull", "vm1:../etc/passwd", target.to_str().context("a path")?]);
        ensure!(
            refused.is_err(),
            "a path outside the served directory was given out"
        );
        accept.signal("INT")?;
        Ok(())
    })
}
