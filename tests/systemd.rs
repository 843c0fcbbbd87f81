//! The unit of qemu-configs under a real systemd, inside a VM: start, status, deaths, stop.

use anyhow::{Context, Result, ensure};
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use vmgmt_testkit::setup::{Image, repository};
use vmgmt_testkit::vm::{Vm, VmBuilder, tools_or_skip};

const CONFIGURATION: &str = "[[share]]\nname = \"data\"\npath = \"/var/lib/vmgmt\"\n\n[[vm]]\nname = \"vm1\"\n\
socket = \"/run/vmgmt/vm1.sock\"\nshares = [\"data\"]\n";

/// systemd's own start takes its time in an emulated VM.
const SLOW: Duration = Duration::from_secs(180);

/// Times that an upgrade may be denied because the VM is slow.
const UPGRADES_MAX: u32 = 3;

/// A program without its symbols: what a package would install.
fn stripped(program: &str, folder: &Path, name: &str) -> Result<Vec<u8>> {
    let target = folder.join(name);
    let status = Command::new("strip")
        .arg("-o")
        .arg(&target)
        .arg(program)
        .status()
        .context("strip (package binutils)")?;
    ensure!(status.success(), "strip {program}: {status}");
    Ok(std::fs::read(target)?)
}

fn machine(folder: &Path) -> Result<Option<Vm>> {
    let Some(mut tools) = tools_or_skip(Image::Systemd)? else {
        return Ok(None);
    };
    let unit = std::fs::read(repository().join("qemu-configs/systemd/vmgmtd.service"))?;
    let files = [
        (
            "usr/local/bin/vmgmtd",
            0o755,
            stripped(env!("CARGO_BIN_EXE_vmgmtd"), folder, "vmgmtd")?,
        ),
        (
            "usr/local/bin/vmgmtctl",
            0o755,
            stripped(env!("CARGO_BIN_EXE_vmgmtctl"), folder, "vmgmtctl")?,
        ),
        ("etc/systemd/system/vmgmtd.service", 0o644, unit),
        ("etc/vmgmt/vmgmtd.toml", 0o644, CONFIGURATION.into()),
    ];
    tools.images = tools.images.with_files(&folder.join("initramfs"), &files)?;
    let vm = VmBuilder::new(&tools, "systemd")
        .kernel_word("vmgmt.systemd=1")
        .kernel_word("systemd.getty_auto=no")
        .start()?;
    Ok(Some(vm))
}

/// A line for each process of the service: its id, a colon, its words.
const PROCESSES: &str = r#"for p in $(cat /sys/fs/cgroup/system.slice/vmgmtd.service/cgroup.procs 2>/dev/null); do
    echo "$p: $(tr '\0' ' ' < /proc/$p/cmdline)"; done"#;

fn property(vm: &Vm, name: &str) -> Result<String> {
    let value = vm.ok(&format!("systemctl show -p {name} --value vmgmtd"))?;
    Ok(value.trim().to_owned())
}

/// A shell's condition in the VM comes true.
fn becomes(vm: &Vm, condition: &str) -> Result<()> {
    vm.ok_for(&format!("until {condition}; do sleep 0.2; done"), SLOW)
        .map(drop)
}

#[test]
fn the_unit_keeps_its_word() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let Some(vm) = machine(folder.path())? else {
        return Ok(());
    };
    let outcome = keeps_its_word(&vm);
    outcome.map_err(|error| {
        let journal = vm.run("journalctl --no-pager -u vmgmtd | tail -40; systemctl --failed --no-pager");
        let journal = journal.map(|output| output.text()).unwrap_or_default();
        error.context(format!("{journal}\n{}", vm.evidence()))
    })
}

/// Another configuration is in force after a reload; one that is no good changes nothing, and is told.
fn reloads_its_configuration(vm: &Vm, main: &str) -> Result<()> {
    let file = "/etc/vmgmt/vmgmtd.toml";
    vm.ok(&format!(
        "printf '\\n[[vm]]\\nname = \"vm2\"\\nsocket = \"/run/vmgmt/vm2.sock\"\\n' >> {file}"
    ))?;
    let mut reload = vm.run_for("systemctl reload vmgmtd", SLOW)?;
    for _ in 1..UPGRADES_MAX {
        if reload.status != 0 {
            let said = vm.ok("journalctl --no-pager -u vmgmtd | tail -20")?;
            ensure!(
                said.contains("did not answer within"),
                "the reload failed: {said}"
            );
            reload = vm.run_for("systemctl reload vmgmtd", SLOW)?;
        }
    }
    if reload.status == 0 {
        ensure!(vm.ok("ls /run/vmgmt")?.contains("vm2.sock"));
        ensure!(vm.ok("vmgmtctl status")?.contains("VM vm2: added"));
    } else {
        vmgmt_testkit::skipped("the reload itself: this VM is too slow for another core");
    }
    vm.ok(&format!("echo 'no TOML [' >> {file}"))?;
    let bad = vm.run_for("systemctl reload vmgmtd", SLOW)?;
    ensure!(bad.status != 0, "a bad configuration was taken");
    ensure!(
        vm.ok("vmgmtctl status")?
            .contains("1 mistake in the configuration")
    );
    vm.ok(&format!("sed -i '$d' {file}"))?;
    ensure!(vm.ok("systemctl is-active vmgmtd")?.trim() == "active");
    ensure!(property(vm, "MainPID")? == main && property(vm, "NRestarts")? == "0");
    Ok(())
}

fn keeps_its_word(vm: &Vm) -> Result<()> {
    ensure!(vm.ok("cat /proc/1/comm")?.trim() == "systemd");
    // What systemd does not know in a unit it only logs.
    let verified = vm.ok_for(
        "systemd-analyze verify /etc/systemd/system/vmgmtd.service 2>&1 | grep vmgmtd.service || true",
        SLOW,
    )?;
    ensure!(verified.trim().is_empty(), "systemd-analyze: {verified}");

    // `start` comes back when it serves, not before.
    vm.ok_for("systemctl start vmgmtd", SLOW)?;
    let status = vm.ok("vmgmtctl --json status")?;
    ensure!(
        status.contains("\"serving\"") && status.contains("\"answered_by\":\"core\""),
        "{status}"
    );
    ensure!(
        vm.ok("systemctl status --no-pager vmgmtd")?
            .contains("active (running)")
    );
    let main = property(vm, "MainPID")?;
    ensure!(
        status.contains(&format!("\"pid\":{main}")),
        "main process {main}: {status}"
    );
    ensure!(vm.ok(&format!("cat /proc/{main}/oom_score_adj"))?.trim() == "-1000");
    ensure!(property(vm, "OOMPolicy")? == "continue");
    ensure!(vm.run_for("vmgmtctl doctor", SLOW)?.text().contains("kernel"));

    // The core dies: nobody else notices.
    let core = format!("{PROCESSES} | grep -w core | cut -d: -f1");
    let old = vm.ok(&core)?.trim().to_owned();
    vm.ok(&format!("kill -9 {old}"))?;
    becomes(vm, &format!("[ \"$({core})\" ] && [ \"$({core})\" != {old} ]"))?;
    becomes(vm, "vmgmtctl --json status | grep -q '\"life\":2'")?;
    ensure!(vm.ok("systemctl is-active vmgmtd")?.trim() == "active");
    ensure!(property(vm, "MainPID")? == main && property(vm, "NRestarts")? == "0");

    reloads_its_configuration(vm, &main)?;

    // An upgrade (here to the same program): other processes, and the main process the same. What is refused is said, and
    // leaves all as it was; a new program has five seconds to say that it can read the state, and a new front two to take over, which an
    // emulated VM may not manage.
    let front = format!("{PROCESSES} | grep -w front | cut -d: -f1");
    let mut before = (vm.ok(&core)?, vm.ok(&front)?);
    let mut upgraded = false;
    for _ in 0..UPGRADES_MAX {
        let upgrade = vm.run_for("vmgmtctl upgrade", SLOW)?;
        ensure!(vm.ok("systemctl is-active vmgmtd")?.trim() == "active");
        ensure!(property(vm, "MainPID")? == main && property(vm, "NRestarts")? == "0");
        let after = (vm.ok(&core)?, vm.ok(&front)?);
        if upgrade.status == 0 {
            ensure!(
                after.0 != before.0 && after.1 != before.1,
                "{before:?} became {after:?}"
            );
            upgraded = true;
            break;
        }
        let said = vm.ok("journalctl --no-pager -u vmgmtd | tail -20")?;
        ensure!(
            said.contains("did not answer within"),
            "the upgrade failed: {said}"
        );
        // (The core's turn is before the front's: it may have been replaced.)
        ensure!(
            after.1 == before.1,
            "an upgrade was denied, and yet {before:?} became {after:?}"
        );
        before = after;
    }
    if !upgraded {
        vmgmt_testkit::skipped("the upgrade itself: this VM is too slow for it");
    }
    ensure!(vm.ok("vmgmtctl --json status")?.contains("\"serving\""));

    // The keeper dies: all devices are gone, but vmgmtd is there again at once, and nothing of before is left.
    let others = vm.ok(&format!("{PROCESSES} | cut -d: -f1 | grep -vx {main}"))?;
    vm.ok(&format!("kill -9 {main}"))?;
    becomes(
        vm,
        "[ \"$(systemctl show -p NRestarts --value vmgmtd)\" = 1 ] && systemctl is-active -q vmgmtd",
    )?;
    ensure!(property(vm, "MainPID")? != main);
    ensure!(vm.ok("vmgmtctl --json status")?.contains("\"life\":1"));
    for pid in others.split_whitespace() {
        becomes(vm, &format!("[ ! -e /proc/{pid} ]"))?;
    }

    // It ends in order, and in the time that the unit gives it.
    vm.ok_for("systemctl stop vmgmtd", SLOW)?;
    ensure!(
        property(vm, "Result")? == "success",
        "it was killed, for it took too long"
    );
    let left = vm.run(PROCESSES)?.text();
    ensure!(left.trim().is_empty(), "processes are left: {left}");
    ensure!(vm.run("systemctl is-active vmgmtd")?.text().trim() == "inactive");
    Ok(())
}
