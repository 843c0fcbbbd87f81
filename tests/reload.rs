//! The configuration is read anew under running guests: what it says is in force then, for each core to come; what is wrong with it changes
//! nothing.

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use vmgmt_abi::file::open;
use vmgmt_ctl::protocol::{AddVm, Call, Part, Status, Upgrade, UpgradeReport, UpgradeState, Upgrading, Vms};
use vmgmt_ctl::{Client, ClientError};
use vmgmt_driver::operations::file::Share;
use vmgmt_driver::{Mode, TransferOptions};
use vmgmt_testkit::client::Client as Device;
use vmgmt_testkit::guest::{GuestOptions, Site, SitePlan};
use vmgmt_testkit::process::wait_until;

const DAEMON: &str = env!("CARGO_BIN_EXE_vmgmtd");
const PATIENCE: Duration = Duration::from_secs(60);

fn call<T: serde::de::DeserializeOwned>(site: &Site, call: &Call) -> Result<T, ClientError> {
    let mut client = Client::connect(&site.control())?;
    let result = client.call(call, &[], Some(PATIENCE), &mut |_| true)?;
    serde_json::from_value(result).map_err(|error| ClientError::Garbled(error.to_string()))
}

fn configuration(site: &Site) -> Result<String> {
    Ok(std::fs::read_to_string(site.daemon.path("vmgmtd.toml"))?)
}

fn write(site: &Site, text: &str) -> Result<()> {
    Ok(std::fs::write(site.daemon.path("vmgmtd.toml"), text)?)
}

/// Replaces something that is in the configuration.
fn edit(site: &Site, from: &str, to: &str) -> Result<()> {
    let text = configuration(site)?;
    ensure!(text.contains(from), "{from:?} is not in {text}");
    write(site, &text.replace(from, to))
}

fn end(site: &Site, number: u64) -> Result<UpgradeReport> {
    wait_until("the end", PATIENCE, || {
        let status = call::<Status>(site, &Call::Status).ok();
        let report = status.and_then(|status| status.upgrade);
        Ok(report.filter(|report| report.number == number && report.is_over()))
    })
    .with_context(|| site.daemon.log().tail())
}

fn begun(site: &Site, wish: &Call) -> Result<u64> {
    let begun: Upgrading = wait_until("its begin", PATIENCE, || Ok(call(site, wish).ok()))?;
    Ok(begun.number)
}

fn reload(site: &Site) -> Result<UpgradeReport> {
    end(site, begun(site, &Call::Reload)?)
}

/// A reload that is done and changes this.
fn reloads(site: &Site, changes: &[&str]) -> Result<()> {
    let report = reload(site)?;
    ensure!(
        report.state == UpgradeState::Done && report.changes == changes,
        "{report:?}\n{}",
        site.daemon.log().tail()
    );
    Ok(())
}

/// A reload that leaves all as it is, for this reason.
fn remains(site: &Site, state: UpgradeState, why: &str) -> Result<UpgradeReport> {
    let before = site.pids()?;
    let report = reload(site)?;
    ensure!(
        report.state == state && report.reason.contains(why),
        "{why}: {report:?}"
    );
    let now = site.pids()?;
    ensure!((now.keeper, now.front) == (before.keeper, before.front));
    ensure!((now.core == before.core) == (state == UpgradeState::Denied));
    Ok(report)
}

fn upgrade_keeper(site: &Site) -> Result<()> {
    let wish = Upgrade {
        to: None,
        parts: vec![Part::Keeper],
    };
    let report = end(site, begun(site, &Call::Upgrade(wish))?)?;
    ensure!(report.state == UpgradeState::Done, "{report:?}");
    Ok(())
}

fn kill_core(site: &Site) -> Result<()> {
    let core = site.daemon.kill_role("core")?;
    site.daemon.wait_for_new("core", core, PATIENCE)?;
    Ok(())
}

fn names(shares: &[Share]) -> Vec<(&str, bool)> {
    shares
        .iter()
        .map(|share| (share.name.as_str(), share.writable))
        .collect()
}

fn failed<T: std::fmt::Debug>(result: vmgmt_driver::Result<T>, status: vmgmt_driver::Status) -> Result<()> {
    match result {
        Err(error) if error.status() == Some(status) => Ok(()),
        other => anyhow::bail!("{other:?}"),
    }
}

#[test]
fn shares_come_and_go_under_a_running_transfer_and_stay_so_for_each_core_to_come() -> Result<()> {
    let site = SitePlan::new(DAEMON, 2).start()?;
    let data: Vec<u8> = (0..(8usize << 20)).map(|n| (n % 251) as u8).collect();
    std::fs::write(site.share().join("big"), &data)?;
    std::fs::write(site.share().join("held"), b"held")?;
    let extra = site.daemon.path("extra");
    std::fs::create_dir(&extra)?;
    let (reader, vm) = (
        site.vm_with(0, GuestOptions::default().ram_bytes(64 << 20))?,
        site.vm(1)?,
    );
    let mut ring = vm.ring(Mode::FILE)?;
    let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let reading = scope.spawn(|| -> Result<()> {
            let mut files = reader.ring(Mode::FILE)?;
            while !stop.load(Ordering::Relaxed) {
                let (memory, _) = files.get_to_memory("work/big", &TransferOptions::default())?;
                ensure!(memory.to_vec(0, data.len())? == data, "other bytes");
                rounds.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        });
        let acted = (|| {
            wait_until("a transfer", PATIENCE, || {
                Ok((rounds.load(Ordering::Relaxed) > 0 || reading.is_finished()).then_some(()))
            })?;
            let before = site.pids()?;
            // Added, and given to one of the VMs.
            let text = configuration(&site)?.replacen(
                "[[vm]]",
                &format!("[[share]]\nname = \"extra\"\npath = {extra:?}\n\n[[vm]]"),
                1,
            );
            let second = text.rfind("\"work:rw\"").context("the second VM's grant")?;
            let (one, other) = text.split_at(second);
            write(
                &site,
                &format!(
                    "{one}{}",
                    other.replacen("\"work:rw\"", "\"work:rw\", \"extra\"", 1)
                ),
            )?;
            failed(
                ring.open_for_reading("extra/file"),
                vmgmt_driver::Status::NO_SUCH_NAME,
            )?;
            reloads(&site, &["share extra: added", "VM vm1: shares"])?;
            let now = site.pids()?;
            ensure!((now.keeper, now.front) == (before.keeper, before.front) && now.core != before.core);
            ensure!(names(&ring.shares()?) == [("work", true), ("extra", true)]);
            let path = extra.join("file");
            let buffer = ring.allocate(4096)?;
            buffer.write(0, b"from a guest")?;
            ring.put_from_memory("extra/file", &buffer, 12, 0, &TransferOptions::default())?;
            ensure!(std::fs::read(&path)? == b"from a guest");
            // So it is for the next core, and for the next keeper's cores, whatever becomes of the path.
            kill_core(&site)?;
            let open_there = ring.open_for_reading("extra/file")?;
            let held = ring.open_file("work/held", open::READ | open::WRITE)?;
            upgrade_keeper(&site)?;
            std::fs::rename(&extra, site.daemon.path("elsewhere"))?;
            kill_core(&site)?;
            ensure!(ring.read_at(open_there.handle, 0, &buffer, 0, 4096)? == 12);
            // Without the directory the configuration is bad.
            remains(&site, UpgradeState::Denied, "does not exist")?;
            std::fs::rename(site.daemon.path("elsewhere"), &extra)?;
            // Taken away, and work is only to be read: what is open there is stale, and what was not there before is as ever.
            edit(&site, ", \"extra\"", "")?;
            edit(
                &site,
                &format!("[[share]]\nname = \"extra\"\npath = {extra:?}\n"),
                "",
            )?;
            let text = configuration(&site)?;
            let second = text.rfind("\"work:rw\"").context("the second VM's grant")?;
            let (one, other) = text.split_at(second);
            write(
                &site,
                &format!("{one}{}", other.replacen("\"work:rw\"", "\"work:ro\"", 1)),
            )?;
            let half = ring.put("work/half", 4096, 0)?;
            let only_read = ring.open_for_reading("work/held")?;
            reloads(&site, &["share extra: removed", "VM vm1: shares"])?;
            ensure!(names(&ring.shares()?) == [("work", false)]);
            let stale = vmgmt_driver::Status::STALE;
            failed(ring.read_at(open_there.handle, 0, &buffer, 0, 4096), stale)?;
            failed(ring.read_at(held.handle, 0, &buffer, 0, 4096), stale)?;
            failed(ring.write_at(half.handle, 0, &buffer, 0, 4096), stale)?;
            ensure!(ring.read_at(only_read.handle, 0, &buffer, 0, 4096)? == 4);
            failed(
                ring.open_for_reading("extra/file"),
                vmgmt_driver::Status::NO_SUCH_NAME,
            )?;
            failed(
                ring.open_file("work/held", open::WRITE),
                vmgmt_driver::Status::READ_ONLY,
            )?;
            kill_core(&site)?;
            ensure!(names(&ring.shares()?) == [("work", false)]);
            Ok(())
        })();
        stop.store(true, Ordering::Relaxed);
        let read = reading.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?;
        acted.and(read)
    })
    .with_context(|| site.daemon.log().tail())?;
    ensure!(rounds.load(Ordering::Relaxed) > 1);
    Ok(())
}

#[test]
fn vms_and_sockets_come_and_go_and_those_of_the_others_stay() -> Result<()> {
    let site = SitePlan::new(DAEMON, 2).shared_socket().start()?;
    let socket = |name: &str| site.daemon.path(name);
    let mut kept = Device::connect_ready(site.socket(0))?;
    let mut leaving = Device::connect_ready(site.socket(1))?;
    let mut anonymous = Device::connect_ready(site.shared_socket())?;
    let late = AddVm {
        name: "late".into(),
        socket: socket("late.sock").display().to_string(),
        shares: vec!["work".into()],
        ..AddVm::default()
    };
    call::<serde_json::Value>(&site, &Call::AddVm(Box::new(late)))?;
    let mut added_before = Device::connect_ready(socket("late.sock"))?;
    ensure!(Device::connect_ready(site.socket(0)).is_err(), "two at once");
    // vm1 goes, `new` comes, vm0 may have two devices, who comes by the shared socket may write.
    let text = configuration(&site)?;
    let begin = text.find("[[vm]]\nname = \"vm1\"").context("vm1")?;
    let shared = text.find("[[socket]]").context("the shared socket")?;
    let new = format!(
        "[[vm]]\nname = \"new\"\nsocket = {:?}\nshares = [\"work:ro\"]\n\n",
        socket("new.sock")
    );
    let text = format!("{}{new}{}", &text[..begin], &text[shared..]);
    let text = text.replace("devices-max = 1", "devices-max = 2").replace(
        "[\"work:ro\"]\n\n[[socket]]",
        "[\"work:ro\"]\nmode = \"0600\"\n\n[[socket]]",
    );
    write(
        &site,
        &text.replace(
            "sock\"\nshares = [\"work:ro\"]\n",
            "sock\"\nshares = [\"work:rw\"]\n",
        ),
    )?;
    reloads(
        &site,
        &[
            "VM vm0: device (for those that connect from now on)",
            "VM new: added",
            &format!("socket {}: shares", site.shared_socket().display()),
            "VM vm1: removed",
        ],
    )?;
    let mut second = Device::connect_ready(site.socket(0))?;
    let mut new = Device::connect_ready(socket("new.sock"))?;
    for device in [
        &mut kept,
        &mut second,
        &mut new,
        &mut anonymous,
        &mut added_before,
    ] {
        ensure!(device.read_u32(0, 0)? == vmgmt_abi::MAGIC);
    }
    wait_until("the end of vm1's device", PATIENCE, || {
        Ok(leaving.read_u32(0, 0).err().map(drop))
    })?;
    ensure!(!site.socket(1).exists());
    let seen = || -> Result<Vec<(String, Vec<String>)>> {
        let vms: Vms = call(&site, &Call::Vms)?;
        let mut vms: Vec<_> = vms.vms.into_iter().map(|vm| (vm.name, vm.shares)).collect();
        vms.sort();
        Ok(vms)
    };
    let rights = |name: &str, share: &str| (name.to_owned(), vec![share.to_owned()]);
    let expected = vec![
        rights("anon-1", "work:rw"),
        rights("late", "work:rw"),
        rights("new", "work:rw"),
        rights("vm0", "work:rw"),
    ];
    wait_until("the VMs of the new configuration", PATIENCE, || {
        Ok((seen()? == expected).then_some(()))
    })
    .with_context(|| format!("{:?}", seen()))?;
    upgrade_keeper(&site)?;
    kill_core(&site)?;
    ensure!(seen()? == expected, "{:?}", seen());
    // The keeper of before has told the next one what is the configuration's.
    reloads(&site, &[])?;
    for device in [
        &mut kept,
        &mut second,
        &mut new,
        &mut anonymous,
        &mut added_before,
    ] {
        ensure!(device.read_u32(0, 0)? == vmgmt_abi::MAGIC);
    }
    Ok(())
}

#[test]
fn what_is_wrong_or_cannot_change_is_told_by_name_and_changes_nothing() -> Result<()> {
    let site = SitePlan::new(DAEMON, 1).start()?;
    let vm = site.vm(0)?;
    let mut ring = vm.ring(Mode::FILE)?;
    let good = configuration(&site)?;
    let control = site.control();
    let taken = std::os::unix::net::UnixListener::bind(site.daemon.path("taken.sock"))?;
    let new_vm = |socket: &str| {
        let socket = site.daemon.path(socket);
        format!("{good}\n[[vm]]\nname = \"new\"\nsocket = {socket:?}\n")
    };
    let vm0 = site.socket(0);
    let cases = [
        ("no TOML [".to_owned(), "mistake in the configuration"),
        (good.replace("[device]", "[device]\nrings = 77"), "77 rings"),
        (
            format!("{good}\n[[share]]\nname = \"gone\"\npath = \"/no/such/directory\"\n"),
            "/no/such/directory does not exist",
        ),
        (
            good.replace(&*control.to_string_lossy(), "/run/other.sock"),
            "[server] control cannot change while vmgmtd runs",
        ),
        (
            format!("{good}\n[sandbox]\nenabled = false\n"),
            "[sandbox] enabled cannot change while vmgmtd runs",
        ),
        (
            good.replace(&*vm0.to_string_lossy(), "/run/elsewhere.sock"),
            "take the VM out in one reload and put it back in the next",
        ),
        (
            good.replace("name = \"vm0\"", "name = \"other\""),
            "is that of VM vm0 now",
        ),
        (new_vm("taken.sock"), "somebody listens on it already"),
    ];
    for (text, why) in &cases {
        write(&site, text)?;
        let report = remains(&site, UpgradeState::Denied, why)?;
        ensure!(
            Path::new(&report.configuration) == site.daemon.path("vmgmtd.toml"),
            "{report:?}"
        );
        ensure!(names(&ring.shares()?) == [("work", true)]);
    }
    drop(taken);
    // And a good one is taken after all of them, by the signal.
    write(&site, &new_vm("new.sock"))?;
    let pid = Pid::from_raw(site.daemon.pid().cast_signed()).context("a pid")?;
    kill_process(pid, Signal::HUP)?;
    let report = end(&site, cases.len() as u64 + 1)?;
    ensure!(
        report.state == UpgradeState::Done && report.changes == ["VM new: added"],
        "{report:?}"
    );
    Device::connect_ready(site.daemon.path("new.sock"))?;
    Ok(())
}

#[test]
fn a_core_that_fails_with_the_new_configuration_brings_the_old_one_back() -> Result<()> {
    let site = SitePlan::new(DAEMON, 1)
        .variable("VMGMT_FAULT", "trial=abort")
        .start()?;
    let vm = site.vm(0)?;
    let mut ring = vm.ring(Mode::FILE)?;
    let good = configuration(&site)?;
    let socket = site.daemon.path("new.sock");
    let text = good.replace("[\"work:rw\"]", "[\"work:ro\"]");
    write(
        &site,
        &format!("{text}\n[[vm]]\nname = \"new\"\nsocket = {socket:?}\n"),
    )?;
    remains(&site, UpgradeState::RolledBack, "failed on trial")?;
    ensure!(names(&ring.shares()?) == [("work", true)] && !socket.exists());
    kill_core(&site)?;
    ensure!(names(&ring.shares()?) == [("work", true)]);
    Ok(())
}

#[test]
fn a_disk_that_hangs_under_the_configuration_holds_up_only_the_reload() -> Result<()> {
    let site = SitePlan::new(DAEMON, 1)
        .variable("VMGMT_FAULT", "read=hang")
        .start()?;
    let number = begun(&site, &Call::Reload)?;
    // A core dies meanwhile, and the next one is there at once.
    kill_core(&site)?;
    let mut device = Device::connect_ready(site.socket(0))?;
    ensure!(device.read_u32(0, 0)? == vmgmt_abi::MAGIC);
    let report = end(&site, number)?;
    ensure!(
        report.state == UpgradeState::Denied && report.reason.contains("does the disk of a share hang?"),
        "{report:?}"
    );
    Ok(())
}

#[test]
fn vmgmtctl_says_what_has_changed() -> Result<()> {
    let site = SitePlan::new(DAEMON, 1).start()?;
    let run = |arguments: &[&str]| -> Result<(Option<i32>, String)> {
        let output = Command::new(env!("CARGO_BIN_EXE_vmgmtctl"))
            .arg("--control")
            .arg(site.control())
            .args(arguments)
            .output()?;
        Ok((
            output.status.code(),
            String::from_utf8_lossy(&output.stdout).into_owned(),
        ))
    };
    let (code, out) = run(&["reload"])?;
    ensure!(
        code == Some(0) && out.contains("nothing has changed"),
        "{code:?} {out}"
    );
    edit(&site, "[limits]\n", "[limits]\noffers-max = 3\n")?;
    let (code, out) = run(&["reload"])?;
    ensure!(
        code == Some(0) && out.contains("\n    VM vm0: limits\n"),
        "{code:?} {out}"
    );
    edit(&site, "offers-max", "no-such-key")?;
    let (code, out) = run(&["reload"])?;
    ensure!(
        code == Some(1) && out.contains("denied") && out.contains("no-such-key"),
        "{code:?} {out}"
    );
    let (_, out) = run(&["status"])?;
    ensure!(
        out.contains("reload 3 of ") && out.contains("no-such-key"),
        "{out}"
    );
    Ok(())
}
