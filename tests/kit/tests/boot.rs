//! Boots real VMs without a management device: the machine room itself is what is tested here.

use anyhow::{Context, Result, ensure};
use std::time::Duration;
use vmgmt_testkit::{
    huge_pages::HugePages,
    setup::{Image, Tools},
    vm::{Driver, Firmware, Iommu, Memory, VmBuilder, tools_or_skip},
};

const SHORT: Duration = Duration::from_secs(30);

fn small() -> Result<Option<Tools>> {
    tools_or_skip(Image::Small)
}

#[test]
fn commands_run_and_their_status_comes_back() -> Result<()> {
    let Some(tools) = small()? else { return Ok(()) };
    let vm = VmBuilder::new(&tools, "plain").driver(Driver::Uio).start()?;
    assert_eq!(vm.ok("hostname")?, "plain");
    let output = vm.run("echo said; echo complained >&2; exit 7")?;
    assert_eq!((output.text().as_str(), output.status), ("said\ncomplained", 7));
    assert!(vm.ok("false").is_err());
    assert_eq!(vm.run("kill -9 $$")?.status, 128 + 9);

    // Bytes of every value come through, and quotes and newlines of the script reach the shell.
    let every_byte =
        vm.run(r#"i=0; while [ $i -lt 256 ]; do printf "\\$(printf %o $i)"; i=$((i+1)); done"#)?;
    assert_eq!(every_byte.bytes, (0..=255).collect::<Vec<u8>>());
    assert_eq!(vm.ok("cat <<'EOF'\nit's \"quoted\"\nEOF")?, "it's \"quoted\"");

    // More output than any buffer on the way holds.
    let long = vm.run("head -c 3000000 /dev/zero | tr '\\0' x")?;
    assert_eq!((long.bytes.len(), long.status), (3_000_000, 0));

    let written: Vec<u8> = (0..100_000_u32).map(|i| (i * 7 % 251) as u8).collect();
    vm.write_file("/tmp/written", &written)?;
    assert_eq!(vm.run("cat /tmp/written")?.bytes, written);

    let modules = vm.ok("lsmod")?;
    ensure!(
        modules.contains("uio_pci_generic"),
        "the uio driver is not loaded: {modules}"
    );
    vm.ok("test ! -e /run/init.failed")?;
    vm.ok("test -x /usr/bin/vmgmt && ls -d /sys/bus/pci/drivers/uio_pci_generic")?;
    vm.quit(SHORT)
}

#[test]
fn several_commands_run_at_once_and_can_be_signalled() -> Result<()> {
    let Some(tools) = small()? else { return Ok(()) };
    let vm = VmBuilder::new(&tools, "several").channels(3).start()?;
    // Each waits for the next: in turn they would never end.
    vm.ok("mkfifo /tmp/a /tmp/b")?;
    let first = vm.spawn("cat /tmp/a")?;
    let second = vm.spawn("cat /tmp/b > /tmp/a")?;
    let third = vm.spawn("echo through both > /tmp/b")?;
    let refused = vm.run("true").unwrap_err().to_string();
    ensure!(refused.contains("all 3 command channels"), "{refused}");
    assert_eq!(first.wait(SHORT)?.text(), "through both");
    assert_eq!(second.wait(SHORT)?.status, 0);
    assert_eq!(third.wait(SHORT)?.status, 0);

    let mut waiting =
        vm.spawn("trap 'echo interrupted; exit 3' INT; echo waiting; while :; do sleep 0.1; done")?;
    waiting.wait_for("waiting", SHORT)?;
    waiting.signal("INT")?;
    let ended = waiting.wait(SHORT)?;
    assert_eq!((ended.text().as_str(), ended.status), ("waiting\ninterrupted", 3));

    // A command that is dropped is killed, and its channel is free again.
    for _ in 0..4 {
        let pid = vm.spawn("sleep 1000")?.pid(SHORT)?;
        vm.ok(&format!("test ! -d /proc/{pid}"))
            .context("the dropped command still runs")?;
    }

    // A command that takes too long is an error that shows what it said, and is killed as well.
    let late = vm
        .run_for("echo so far; sleep 1000", Duration::from_secs(5))
        .unwrap_err()
        .to_string();
    ensure!(
        late.contains("so far") && late.contains("end of its console"),
        "{late}"
    );
    vm.ok("true").map(drop)
}

#[test]
fn monitor_reset_pause_and_death() -> Result<()> {
    let Some(tools) = small()? else { return Ok(()) };
    let vm = VmBuilder::new(&tools, "monitor")
        .processors(2)
        .memory(Memory::Plain)
        .ports(1)
        .start()?;
    assert_eq!(vm.ok("nproc")?, "2");
    let status = || vm.qmp().execute("query-status", serde_json::json!({}));
    vm.pause()?;
    assert_eq!(status()?["status"], "paused");
    vm.go_on()?;
    assert_eq!(status()?["status"], "running");
    vm.ok("touch /tmp/before")?;
    vm.reset()?;
    vm.qmp().wait_event("RESET", SHORT)?;
    vm.ok("test ! -e /tmp/before")
        .context("the guest was not reset")?;

    // An ordinary device in and out: the guest must see it, and let go of it.
    let seen = "grep -l 0x11e8 /sys/bus/pci/devices/*/device";
    assert_ne!(vm.run(seen)?.status, 0);
    vm.plug_json(serde_json::json!({"driver": "edu", "id": "edu"}), 0)?;
    vm.ok(&format!("until {seen}; do sleep 0.05; done"))?;
    vm.unplug("edu")?;
    assert_ne!(vm.run(seen)?.status, 0);
    let wrong = vm
        .plug("/nonexistent/socket", "absent", 0)
        .unwrap_err()
        .to_string();
    ensure!(
        wrong.contains("/nonexistent/socket") || wrong.contains("No such file"),
        "{wrong}"
    );
    vm.check_alive()?;

    let waiting = vm.spawn("sleep 1000")?;
    vm.kill();
    let ended = waiting.wait(SHORT).unwrap_err().to_string();
    ensure!(ended.contains("the VM ended"), "{ended}");
    assert!(vm.check_alive().is_err());
    Ok(())
}

#[test]
fn every_kind_of_memory_boots() -> Result<()> {
    let Some(tools) = small()? else { return Ok(()) };
    for memory in [Memory::Private, Memory::File] {
        let name = format!("{memory:?}").to_lowercase();
        let vm = VmBuilder::new(&tools, &name)
            .memory(memory)
            .memory_mib(192)
            .start()?;
        let total: u64 = vm
            .ok("sed -n 's/^MemTotal: *//p' /proc/meminfo | cut -d' ' -f1")?
            .parse()?;
        ensure!((100 << 10..192 << 10).contains(&total), "{memory:?}: {total} KiB");
        assert_eq!(vm.folder().join("ram").exists(), memory == Memory::File);
    }
    Ok(())
}

/// QEMU's teaching device stands in for ours: any PCI device shows whether groups and binding work.
#[test]
fn vfio_gets_a_group_behind_each_iommu() -> Result<()> {
    let Some(tools) = small()? else { return Ok(()) };
    for (iommu, name) in [(Iommu::Intel, "intel"), (Iommu::Virtio, "virtio")] {
        let vm = VmBuilder::new(&tools, name)
            .iommu(iommu)
            .driver(Driver::Vfio)
            .kernel_word("vmgmt.bind=1234:11e8")
            .device_json(serde_json::json!({"driver": "edu", "id": "edu"}))
            .start()?;
        let bound = vm.ok("cat /run/init.failed 2>/dev/null; ls /sys/bus/pci/drivers/vfio-pci")?;
        ensure!(
            bound.contains("0000:00:"),
            "{name}: no device bound to vfio-pci: {bound}\n{}",
            vm.evidence()
        );
        vm.ok("test ! -e /run/init.failed")?;
        let unsafe_interrupts = "/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts";
        assert_eq!(vm.ok(&format!("cat {unsafe_interrupts}"))?, "Y");
        let groups = vm.ok("ls /dev/vfio")?;
        ensure!(
            groups
                .split_whitespace()
                .any(|group| group.parse::<u32>().is_ok()),
            "{name}: {groups}"
        );
    }
    Ok(())
}

#[test]
fn the_large_image_has_its_tools() -> Result<()> {
    let Some(tools) = tools_or_skip(Image::Large)? else {
        return Ok(());
    };
    let vm = VmBuilder::new(&tools, "large").start()?;
    ensure!(vm.ok("git --version")?.starts_with("git version 2."));
    ensure!(vm.ok("tar --version")?.contains("GNU tar"));
    ensure!(vm.run("dropbear -V")?.text().contains("Dropbear v"));
    vm.ok(
        "cd /tmp && git init -q house && cd house && echo door > door && git add door && \
           git -c user.name=t -c user.email=t@t commit -qm one && git clone -q . ../second && \
           cmp door ../second/door && tar cf - . | tar tf - | grep -q door",
    )?;
    vm.ok("dropbearkey -t ed25519 -f /tmp/key >/dev/null && test -s /tmp/key")?;
    Ok(())
}

#[test]
fn firmware_reaches_the_uefi_shell() -> Result<()> {
    let Some(tools) = small()? else { return Ok(()) };
    if tools.qemu.ovmf.is_none() {
        vmgmt_testkit::skipped("no OVMF beside this QEMU");
        return Ok(());
    }
    let vm = VmBuilder::new(&tools, "firmware")
        .firmware(Firmware::Ovmf)
        .start()?;
    vm.wait_console("Shell>", Duration::from_secs(120))?;
    vm.type_on_console("echo it-answers\r")?;
    vm.wait_console("it-answers", SHORT)
}

#[test]
fn huge_pages_where_the_host_gives_some() -> Result<()> {
    let Some(tools) = small()? else { return Ok(()) };
    let _pages = match HugePages::borrow(96) {
        Ok(pages) => pages,
        Err(reason) => {
            vmgmt_testkit::skipped(reason);
            return Ok(());
        }
    };
    let vm = VmBuilder::new(&tools, "huge")
        .memory(Memory::HugePages)
        .memory_mib(192)
        .start()?;
    vm.ok("true").map(drop)
}
