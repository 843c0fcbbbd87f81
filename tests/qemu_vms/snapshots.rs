//! VMs that are saved under load and come back: snapshots, and a migration into another QEMU. The scripts of qemu-configs are what runs.

use crate::site::{LONG, SHORT, Site, checksum, host_checksum, site};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use vmgmt_testkit::process::wait_until;
use vmgmt_testkit::setup::repository;
use vmgmt_testkit::vm::{Driver, Iommu, Vm, VmBuilder};

/// What a guest does all the time: get, compare, put, send. It ends with the first thing that is wrong.
const LOOP: &str = r#"
echo $$ > /tmp/loop.pid
want=$1; n=0
while [ ! -e /tmp/enough ]; do
    vmgmt get --force data/in.bin /tmp/in.bin || exit 1
    got=$(sha256sum < /tmp/in.bin)
    [ "$got" = "$want  -" ] || { echo "torn: $got"; exit 1; }
    vmgmt put --existing replace /tmp/in.bin data/out.bin || exit 1
    vmgmt send host "round $n" --key $((n + 1)) || exit 1
    n=$((n + 1)); echo $n > /tmp/n.new; mv /tmp/n.new /tmp/n
done
echo "the loop is done"
"#;

fn config(name: &str) -> PathBuf {
    repository().join("qemu-configs").join(name)
}

/// Where the second monitor is, the one for scripts.
fn monitor(site: &Site) -> PathBuf {
    site.daemon.path("qmp2")
}

fn builder(site: &Site, driver: Driver, iommu: Iommu) -> VmBuilder {
    let place = format!("unix:{},server=on,wait=off", monitor(site).display());
    site.builder("vm1")
        .driver(driver)
        .iommu(iommu)
        .memory_mib(192)
        .extra(["-qmp".to_owned(), place])
}

/// Runs qmp-job.py under frozen.sh, as an operator would.
fn frozen(site: &Site, job: &[&str]) -> Result<()> {
    let output = Command::new(config("frozen.sh"))
        .env("VMGMTCTL", env!("CARGO_BIN_EXE_vmgmtctl"))
        .env("VMGMT_CONTROL", site.daemon.path("control.sock"))
        .args(["vm1", "--"])
        .arg(config("qmp-job.py"))
        .arg(monitor(site))
        .args(job)
        .stdin(Stdio::null())
        .output()
        .context("frozen.sh")?;
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    ensure!(output.status.success(), "{job:?}: {}: {said}", output.status);
    let vms = site.operator(&["vms"])?;
    ensure!(!vms.contains("frozen"), "it is still frozen: {vms}");
    Ok(())
}

/// A job of QEMU's block layer, to its end.
fn block_job(vm: &Vm, options: Value) -> Result<()> {
    let id = "create";
    vm.qmp()
        .execute("blockdev-create", json!({ "job-id": id, "options": options }))?;
    let state = wait_until("a block job", SHORT, || {
        let jobs = vm.qmp().execute("query-jobs", json!({}))?;
        let mine = jobs.as_array().into_iter().flatten().find(|job| job["id"] == id);
        Ok(mine.filter(|job| job["status"] == "concluded").cloned())
    })?;
    vm.qmp().execute("job-dismiss", json!({ "id": id }))?;
    ensure!(state.get("error").is_none(), "{state}");
    Ok(())
}

/// A disk that can hold snapshots; the guest need not see it.
fn add_disk(site: &Site, vm: &Vm) -> Result<()> {
    let file = site.daemon.path("disk.qcow2");
    std::fs::write(&file, b"")?;
    let add = |node: Value| vm.qmp().execute("blockdev-add", node);
    add(json!({ "driver": "file", "node-name": "file0", "filename": file }))?;
    block_job(
        vm,
        json!({ "driver": "qcow2", "file": "file0", "size": 64 << 20 }),
    )?;
    add(json!({ "driver": "qcow2", "node-name": "disk0", "file": "file0" })).map(drop)
}

fn start_loop(site: &Site, vm: &Vm) -> Result<()> {
    site.fill("in.bin", 3_000_000)?;
    vm.write_file("/tmp/loop", LOOP.as_bytes())?;
    let want = host_checksum(&site.shared("in.bin"))?;
    vm.ok(&format!(
        "setsid sh /tmp/loop {want} > /tmp/loop.log 2>&1 < /dev/null &"
    ))?;
    rounds(vm, 2)
}

/// Waits until the loop has gone round so often from now on.
fn rounds(vm: &Vm, count: u32) -> Result<()> {
    vm.ok_for(
        &format!(
            "touch /tmp/n; a=$(cat /tmp/n); while [ \"$(cat /tmp/n)\" -lt $((a + {count})) ] 2>/dev/null || [ -z \"$(cat /tmp/n)\" ]; do \
             kill -0 $(cat /tmp/loop.pid) || {{ cat /tmp/loop.log; exit 1; }}; sleep 0.2; done"
        ),
        LONG,
    )
    .map(drop)
}

/// Ends the loop; nothing was wrong in it, or in the kernel's log, and what was for the VM before is still there.
fn ends_well(site: &Site, vm: &Vm) -> Result<()> {
    vm.ok_for(
        "touch /tmp/enough; while kill -0 $(cat /tmp/loop.pid) 2>/dev/null; do sleep 0.1; done",
        LONG,
    )?;
    let said = vm.ok("cat /tmp/loop.log")?;
    ensure!(said.contains("the loop is done"), "the loop said: {said}");
    ensure!(host_checksum(&site.shared("out.bin"))? == host_checksum(&site.shared("in.bin"))?);
    ensure!(checksum(vm, "/tmp/in.bin")? == host_checksum(&site.shared("in.bin"))?);
    let mail = vm.ok_for("vmgmt recv --count 1 --timeout 30", LONG)?;
    ensure!(mail.contains("mail from before"), "{mail}");
    vm.ok_for("vmgmt selftest", LONG)?;
    Ok(())
}

fn goes_back(driver: Driver, iommu: Iommu) -> Result<()> {
    let Some(site) = site(1)? else { return Ok(()) };
    let vm = builder(&site, driver, iommu).start()?;
    site.check(&[&vm], || {
        add_disk(&site, &vm)?;
        start_loop(&site, &vm)?;
        site.operator(&["send", "vm1", "mail from before"])?;
        for tag in ["one", "two"] {
            rounds(&vm, 1)?;
            frozen(&site, &["savevm", tag, "disk0"])?;
        }
        for tag in ["one", "two", "one"] {
            rounds(&vm, 1)?;
            frozen(&site, &["loadvm", tag, "disk0"])?;
            // The driver finds a blank device and sets it up again by itself.
            rounds(&vm, 2).with_context(|| format!("after loadvm {tag}"))?;
        }
        ends_well(&site, &vm)
    })
}

#[test]
fn a_vm_goes_back_to_a_snapshot_under_load() -> Result<()> {
    goes_back(Driver::Uio, Iommu::None)
}

#[test]
fn a_vm_with_vfio_goes_back_to_a_snapshot_under_load() -> Result<()> {
    goes_back(Driver::Vfio, Iommu::Intel)
}

#[test]
fn a_receive_that_waits_outlives_a_restore() -> Result<()> {
    let Some(site) = site(1)? else { return Ok(()) };
    let vm = builder(&site, Driver::Uio, Iommu::None).start()?;
    site.check(&[&vm], || {
        add_disk(&site, &vm)?;
        vm.ok("vmgmt recv --count 1 --timeout 200 > /tmp/mail 2>&1 < /dev/null & echo $! > /tmp/recv.pid")?;
        let listens = || {
            wait_until("vm1 waits for a message", SHORT, || {
                let vms = site.operator(&["--json", "vms"])?;
                Ok(vms.contains("\"listening\":true").then_some(()))
            })
        };
        listens()?;
        frozen(&site, &["savevm", "one", "disk0"])?;
        frozen(&site, &["loadvm", "one", "disk0"])?;
        // Nothing is sent to it before: it has to find out by itself.
        listens()?;
        site.operator(&["send", "vm1", "after the restore"])?;
        vm.ok_for(
            "while kill -0 $(cat /tmp/recv.pid) 2>/dev/null; do sleep 0.1; done",
            LONG,
        )?;
        let mail = vm.ok("cat /tmp/mail")?;
        ensure!(mail.contains("after the restore"), "{mail}");
        Ok(())
    })
}

#[test]
fn a_vm_goes_on_in_another_qemu() -> Result<()> {
    let Some(site) = site(1)? else { return Ok(()) };
    let file = format!("file:{}", site.daemon.path("machine").display());
    let source = builder(&site, Driver::Uio, Iommu::None).start()?;
    site.check(&[&source], || {
        start_loop(&site, &source)?;
        site.operator(&["send", "vm1", "mail from before"])?;
        rounds(&source, 1)?;
        frozen(&site, &["migrate", &file])
    })?;
    source.quit(SHORT)?;
    // QEMU takes its socket away itself, unless it was killed.
    let _ = std::fs::remove_file(monitor(&site));
    // Its guest runs already: there is no boot to wait for.
    let target = builder(&site, Driver::Uio, Iommu::None)
        .extra(["-incoming", &file])
        .start_only()?;
    site.check(&[&target], || {
        let output = Command::new(config("qmp-job.py"))
            .arg(monitor(&site))
            .arg("wait-incoming")
            .output()?;
        ensure!(output.status.success(), "{output:?}");
        rounds(&target, 2)?;
        ends_well(&site, &target)
    })
}
