//! The front and the keeper are replaced under running guests: nobody notices, and a program that is no good changes nothing. And a fault
//! of the front's own in one session ends that session alone.
//!
//! "Another program" is the same one under another name. Programs that fail are made so from outside: by limits, by SIGSTOP, by SIGKILL.

#[path = "hand_over/faults.rs"]
mod faults;

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use vmgmt_ctl::protocol::{
    AddVm, Call, Part, RemoveVm, Status, Upgrade, UpgradeReport, UpgradeState, Upgrading, Vms,
};
use vmgmt_ctl::{Client, ClientError};
use vmgmt_driver::{Mode, TransferOptions};
use vmgmt_testkit::client::Client as Device;
use vmgmt_testkit::guest::{GuestOptions, Site, SitePlan};
use vmgmt_testkit::process::wait_until;

const DAEMON: &str = env!("CARGO_BIN_EXE_vmgmtd");
/// Looks that show the same, one after the other, of what counts as at rest.
const LOOKS_AT_REST: u32 = 10;
const PATIENCE: Duration = Duration::from_secs(60);

fn call<T: serde::de::DeserializeOwned>(site: &Site, call: &Call) -> Result<T, ClientError> {
    let mut client = Client::connect(&site.control())?;
    let result = client.call(call, &[], Some(PATIENCE), &mut |_| true)?;
    serde_json::from_value(result).map_err(|error| ClientError::Garbled(error.to_string()))
}

fn begin(site: &Site, to: Option<&Path>, part: Part) -> Result<u64> {
    let wish = Upgrade {
        to: to.map(|path| path.display().to_string()),
        parts: vec![part],
    };
    let begun: Upgrading = wait_until("the upgrade's begin", PATIENCE, || {
        Ok(call(site, &Call::Upgrade(wish.clone())).ok())
    })?;
    Ok(begun.number)
}

fn end(site: &Site, number: u64) -> Result<UpgradeReport> {
    wait_until("the upgrade's end", PATIENCE, || {
        let status = call::<Status>(site, &Call::Status).ok();
        Ok(status
            .and_then(|status| status.upgrade)
            .filter(|report| report.number == number && report.is_over()))
    })
    .with_context(|| site.daemon.log().tail())
}

fn upgrade(site: &Site, to: Option<&Path>, part: Part) -> Result<UpgradeReport> {
    let number = begin(site, to, part)?;
    end(site, number)
}

fn done(site: &Site, to: Option<&Path>, part: Part) -> Result<u64> {
    let report = upgrade(site, to, part)?;
    ensure!(
        report.state == UpgradeState::Done,
        "{report:?}\n{}",
        site.daemon.log().tail()
    );
    Ok(report.parts[0].stall_ms)
}

/// The same program under another name.
fn another(folder: &Path) -> Result<PathBuf> {
    let path = folder.join("vmgmtd-new");
    if std::fs::hard_link(DAEMON, &path).is_err() {
        std::fs::copy(DAEMON, &path)?;
    }
    Ok(path)
}

fn script(folder: &Path, name: &str, text: &str) -> Result<PathBuf> {
    let path = folder.join(name);
    std::fs::write(&path, format!("#!/bin/sh\n{text}\n"))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

fn signal(pid: u32, signal: Signal) -> Result<()> {
    Ok(kill_process(
        Pid::from_raw(pid.cast_signed()).context("a pid")?,
        signal,
    )?)
}

/// What the descriptors of a process lead to, sorted, without numbers that differ each time.
fn descriptors(pid: u32) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        let target = std::fs::read_link(entry?.path()).unwrap_or_default();
        let target = target.to_string_lossy();
        let kind = target.split(":[").next().unwrap_or_default();
        all.push(kind.to_owned());
    }
    all.sort();
    Ok(all)
}

/// The descriptors of a process that has come to rest: an operator's connection is closed a moment after the operator has left.
fn at_rest(pid: u32) -> Result<Vec<String>> {
    let (mut seen, mut times) = (Vec::new(), 0);
    wait_until("the same descriptors at every look", PATIENCE, || {
        let now = descriptors(pid)?;
        times = if now == seen { times + 1 } else { 0 };
        seen = now;
        Ok((times >= LOOKS_AT_REST).then(|| seen.clone()))
    })
}

/// Waits until a process has the descriptors that it had (or fewer: one that was about to be closed may have been among them).
fn same_descriptors(pid: impl Fn() -> Result<u32>, before: &[String]) -> Result<()> {
    let mut now = Vec::new();
    wait_until("the same descriptors", PATIENCE, || {
        now = descriptors(pid()?).unwrap_or_default();
        let mut left = before.to_vec();
        let known = now.iter().all(|kind| {
            let place = left.iter().position(|other| other == kind);
            place.map(|place| left.swap_remove(place)).is_some()
        });
        Ok((known && !now.is_empty()).then_some(()))
    })
    .with_context(|| format!("before: {before:?}\nnow: {now:?}"))
}

fn fronts(keeper: u32) -> Vec<u32> {
    let children = format!("/proc/{keeper}/task/{keeper}/children");
    let children = std::fs::read_to_string(children).unwrap_or_default();
    let pids = children.split_whitespace().filter_map(|pid| pid.parse().ok());
    pids.filter(|pid| {
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        command.starts_with(b"vmgmtd-front\0")
    })
    .collect()
}

fn only_front(site: &Site) -> Result<u32> {
    wait_until("one front", PATIENCE, || {
        let fronts = fronts(site.daemon.pid());
        Ok((fronts.len() == 1).then(|| fronts[0]))
    })
}

/// Guests that work all the time while something is done; gives the longest time that one register access took.
fn under_load(site: &Site, guests: usize, act: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let over = AtomicBool::new(false);
    let longest = AtomicU64::new(0);
    let rounds: Vec<AtomicU64> = (0..guests).map(|_| AtomicU64::new(0)).collect();
    std::thread::scope(|scope| {
        let mut workers = Vec::new();
        for (number, round) in rounds.iter().enumerate() {
            let (over, longest) = (&over, &longest);
            workers.push(scope.spawn(move || -> Result<()> {
                let vm = site.vm_with(number, GuestOptions::default().ram_bytes(16 << 20))?;
                let mut ring = vm.ring(Mode::FILE)?;
                let mut ports = vm.ports(Mode::COMMON)?;
                while !over.load(Ordering::Relaxed) || round.load(Ordering::Relaxed) < 2 {
                    let text = format!("guest {number}, round {round:?}");
                    ensure!(ports.echo(text.as_bytes())? == text.as_bytes());
                    let bytes = text.repeat(500).into_bytes();
                    std::fs::write(site.share().join(number.to_string()), &bytes)?;
                    let path = format!("work/{number}");
                    let (memory, _) = ring.get_to_memory(&path, &TransferOptions::default())?;
                    ensure!(memory.to_vec(0, bytes.len())? == bytes, "another file came back");
                    let start = Instant::now();
                    vm.device().check_health()?;
                    let took = u64::try_from(start.elapsed().as_micros())?;
                    longest.fetch_max(took, Ordering::Relaxed);
                    round.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            }));
        }
        let begun = wait_until("work in all guests", PATIENCE, || {
            Ok(rounds
                .iter()
                .all(|round| round.load(Ordering::Relaxed) > 0)
                .then_some(()))
        });
        let acted = begun.and_then(|()| act());
        over.store(true, Ordering::Relaxed);
        for (number, worker) in workers.into_iter().enumerate() {
            let ended = worker.join().ok().context("a guest's thread died")?;
            ended.with_context(|| format!("guest {number}; vmgmtd said:\n{}", site.daemon.log().tail()))?;
        }
        acted
    })?;
    Ok(Duration::from_micros(longest.into_inner()))
}

#[test]
fn twenty_hand_overs_of_many_sessions_under_load() -> Result<()> {
    const GUESTS: usize = 4;
    const IDLE: usize = 150;
    let site = SitePlan::new(DAEMON, GUESTS + IDLE).start()?;
    let folder = tempfile::tempdir()?;
    let (old, new) = (PathBuf::from(DAEMON), another(folder.path())?);
    let mut idle = (GUESTS..GUESTS + IDLE)
        .map(|number| Device::connect_ready(site.socket(number)))
        .collect::<Result<Vec<_>, _>>()?;
    let (keeper, core) = (site.daemon.pid(), site.daemon.role("core")?);
    let fronts = at_rest(only_front(&site)?)?;
    let keepers = at_rest(keeper)?;
    let longest = under_load(&site, GUESTS, || {
        for round in 0..20 {
            let before = only_front(&site)?;
            let to = if round % 2 == 0 { &new } else { &old };
            let stall_ms = done(&site, Some(to), Part::Front)?;
            let after = only_front(&site)?;
            ensure!(after != before, "the same front serves");
            let program = std::fs::read_link(format!("/proc/{after}/exe"))?;
            ensure!(program.file_name() == to.file_name(), "{program:?} runs");
            println!(
                "hand-over {round}: {} sessions stood still for {stall_ms} ms",
                GUESTS + IDLE
            );
            for device in &mut idle {
                ensure!(device.read_u32(0, 0)? == vmgmt_abi::MAGIC);
            }
        }
        Ok(())
    })?;
    println!("the longest register access took {longest:?} (QEMU waits 5 s)");
    ensure!(
        site.daemon.role("core")? == core,
        "the core was another's business"
    );
    // Sessions end and begin as ever, and no descriptor is left over.
    same_descriptors(|| only_front(&site), &fronts)?;
    same_descriptors(|| Ok(keeper), &keepers)?;
    drop(idle);
    wait_until("no session", PATIENCE, || {
        let vms: Vms = call(&site, &Call::Vms)?;
        Ok(vms.vms.iter().all(|vm| vm.sessions.is_empty()).then_some(()))
    })?;
    Device::connect_ready(site.socket(GUESTS))?;
    Ok(())
}

#[test]
fn a_front_that_cannot_take_over_changes_nothing() -> Result<()> {
    let site = SitePlan::new(DAEMON, 32).start()?;
    let folder = tempfile::tempdir()?;
    let mut idle = (2..32)
        .map(|number| Device::connect_ready(site.socket(number)))
        .collect::<Result<Vec<_>, _>>()?;
    let front = only_front(&site)?;
    let fronts_at_rest = at_rest(front)?;
    let few = format!("ulimit -n 60; exec {DAEMON} \"$@\"");
    let cases = [
        ("dies", "exit 3", UpgradeState::Denied, "exit code 3"),
        ("hangs", "exec sleep 1000", UpgradeState::Denied, "within 5 s"),
        ("small", &few, UpgradeState::RolledBack, "no descriptors left"),
    ];
    under_load(&site, 2, || {
        for (name, text, state, reason) in cases {
            let bad = script(folder.path(), name, text)?;
            let report = upgrade(&site, Some(&bad), Part::Front)?;
            ensure!(
                report.state == state && report.reason.contains(reason),
                "{name}: {report:?}\n{}",
                site.daemon.log().tail()
            );
            ensure!(only_front(&site)? == front, "{name}: another front serves");
            for device in &mut idle {
                ensure!(device.read_u32(0, 0)? == vmgmt_abi::MAGIC);
            }
        }
        // In the middle: the old one stands still, then the new one does, or dies.
        for (new_gets, old_goes_on) in [
            (None, false),
            (Some(Signal::STOP), true),
            (Some(Signal::KILL), true),
        ] {
            signal(front, Signal::STOP)?;
            let number = begin(&site, None, Part::Front)?;
            let new = wait_until("the new front", PATIENCE, || {
                Ok(fronts(site.daemon.pid()).into_iter().find(|pid| *pid != front))
            })?;
            // It has its channel to the old one; or it is gone, where it was not ready in the keeper's time.
            let moving = wait_until("the hand-over", PATIENCE, || {
                let sockets = descriptors(new)?.iter().filter(|kind| *kind == "socket").count();
                Ok((sockets >= 2).then_some(()))
            });
            if let (Ok(()), Some(number)) = (&moving, new_gets) {
                // (For the same reason it may be gone by now.)
                let _ = signal(new, number);
            }
            if old_goes_on {
                signal(front, Signal::CONT)?;
            }
            wait_until("the end of the new front", PATIENCE, || {
                Ok((!fronts(site.daemon.pid()).contains(&new)).then_some(()))
            })?;
            signal(front, Signal::CONT)?;
            let report = end(&site, number)?;
            let late = moving.is_err() && report.state == UpgradeState::Denied;
            ensure!(report.state == UpgradeState::RolledBack || late, "{report:?}");
            println!(
                "{new_gets:?}: {}, after {} ms",
                report.reason, report.parts[0].stall_ms
            );
            ensure!(only_front(&site)? == front);
        }
        Ok(())
    })?;
    for device in &mut idle {
        ensure!(device.read_u32(0, 0)? == vmgmt_abi::MAGIC);
    }
    same_descriptors(|| only_front(&site), &fronts_at_rest)?;
    done(&site, None, Part::Front)?;
    for device in &mut idle {
        ensure!(device.read_u32(0, 0)? == vmgmt_abi::MAGIC);
    }
    Ok(())
}

#[test]
fn the_keeper_becomes_another_program_with_the_same_children() -> Result<()> {
    let site = SitePlan::new(DAEMON, 3).shared_socket().start()?;
    let folder = tempfile::tempdir()?;
    let (old, new) = (PathBuf::from(DAEMON), another(folder.path())?);
    let before = site.pids()?;
    let keepers = at_rest(before.keeper)?;
    let mut idle = Device::connect_ready(site.socket(2))?;
    let mut shared = Device::connect_ready(site.shared_socket())?;
    under_load(&site, 2, || {
        for round in 0..6 {
            let to = if round % 2 == 0 { &new } else { &old };
            let stall_ms = done(&site, Some(to), Part::Keeper)?;
            println!("the keeper was away for {stall_ms} ms");
            ensure!(site.pids()? == before, "the same processes");
            let program = std::fs::read_link(format!("/proc/{}/exe", before.keeper))?;
            ensure!(program.file_name() == to.file_name(), "{program:?} runs");
            ensure!(idle.read_u32(0, 0)? == vmgmt_abi::MAGIC);
        }
        Ok(())
    })?;
    // A device of the same process is still a device of the same VM.
    ensure!(shared.read_u32(0, 0)? == vmgmt_abi::MAGIC);
    let vms: Vms = call(&site, &Call::Vms)?;
    let anonymous = vms.vms.iter().filter(|vm| vm.name.starts_with("anon-"));
    ensure!(anonymous.count() == 1, "{vms:?}");
    // It knows its children: a dead core is replaced, and a VM comes and goes.
    let core = site.daemon.kill_role("core")?;
    site.daemon.wait_for_new("core", core, PATIENCE)?;
    let socket = site.daemon.path("late.sock");
    let add = Call::AddVm(Box::new(AddVm {
        name: "late".into(),
        socket: socket.display().to_string(),
        ..AddVm::default()
    }));
    wait_until("a VM is added", PATIENCE, || {
        Ok(call::<serde_json::Value>(&site, &add).ok())
    })
    .with_context(|| site.daemon.log().tail())?;
    let mut late = Device::connect_ready(&socket)?;
    ensure!(late.read_u32(0, 0)? == vmgmt_abi::MAGIC && idle.read_u32(0, 0)? == vmgmt_abi::MAGIC);
    let status: Status = call(&site, &Call::Status)?;
    ensure!(status.pid == before.keeper && status.notices.iter().any(|line| line.contains("signal 9")));
    drop((late, shared, idle));
    call::<serde_json::Value>(&site, &Call::RemoveVm(RemoveVm { name: "late".into() }))?;
    same_descriptors(|| Ok(before.keeper), &keepers)?;
    // And how to end.
    let end = site.daemon.stop(PATIENCE)?;
    ensure!(end.code() == Some(0), "{end:?}");
    Ok(())
}

/// A keeper's upgrade that does not come about: so it is, for this reason, and all is as it was.
fn remains(site: &Site, to: &Path, state: UpgradeState, reason: &str) -> Result<()> {
    let before = (site.pids()?, at_rest(site.daemon.pid())?);
    let report = upgrade(site, Some(to), Part::Keeper)?;
    let name = to.display();
    ensure!(
        report.state == state && report.reason.contains(reason),
        "{name}: {report:?}\n{}",
        site.daemon.log().tail()
    );
    let program = std::fs::read_link(format!("/proc/{}/exe", site.daemon.pid()))?;
    ensure!(program == Path::new(DAEMON), "{name}: {program:?} runs");
    ensure!(site.pids()? == before.0, "{name}: other processes");
    same_descriptors(|| Ok(site.daemon.pid()), &before.1).with_context(|| format!("after {name}"))
}

#[test]
fn a_keeper_that_cannot_take_over_changes_nothing() -> Result<()> {
    let faults = "rehearse@k-exits=exit,rehearse@k-aborts=abort,rehearse@k-hangs=hang,\
                  resume@k-refuses=refuse,resume@k-panics=panic";
    let site = SitePlan::new(DAEMON, 2).variable("VMGMT_FAULT", faults).start()?;
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let before = site.pids()?;
    let few = format!("ulimit -n 12; exec {DAEMON} \"$@\"");
    let gone = format!("rm -f \"$0\"; exec {DAEMON} \"$@\"");
    let script = |name: &str, text: &str| script(folder, name, text);
    let program = |name: &str| -> Result<PathBuf> {
        let path = folder.join(name);
        std::fs::hard_link(DAEMON, &path).or_else(|_| std::fs::copy(DAEMON, &path).map(drop))?;
        Ok(path)
    };
    let (denied, back) = (UpgradeState::Denied, UpgradeState::RolledBack);
    let cases = [
        (
            script("refuses", "echo I am too old >&2; exit 3")?,
            denied,
            "I am too old",
        ),
        (script("hangs", "exec sleep 1000")?, denied, "within 5 s"),
        (PathBuf::from("/bin/true"), denied, "is it a vmgmtd?"),
        (script("small", &few)?, denied, "no descriptors left"),
        // It passes the rehearsal, and then there is nothing to execute.
        (script("gone", &gone)?, denied, "does not run"),
        (program("k-exits")?, denied, "exit code 1"),
        (program("k-aborts")?, denied, "SIGABRT"),
        (program("k-hangs")?, denied, "within 5 s"),
        // These pass it, and fail when they are the keeper: the old program is executed again.
        (program("k-refuses")?, back, "a fault was asked for"),
        (program("k-panics")?, back, "panicked: a fault was asked for"),
    ];
    under_load(&site, 2, || {
        // The directories of shares are opened when a core is started: the first keeper has them open, one that took over has not.
        done(&site, None, Part::Keeper)?;
        for (path, state, reason) in &cases {
            remains(&site, path, *state, reason)?;
        }
        done(&site, None, Part::Keeper)?;
        Ok(())
    })?;
    ensure!(site.pids()? == before);
    // It knows its children as before: a dead core is replaced, and the end is in order.
    let core = site.daemon.kill_role("core")?;
    site.daemon.wait_for_new("core", core, PATIENCE)?;
    let end = site.daemon.stop(PATIENCE)?;
    ensure!(end.code() == Some(0), "{end:?}");
    Ok(())
}

/// Other processes that the keeper has started and not collected.
fn dead_children(keeper: u32) -> Vec<u32> {
    let children =
        std::fs::read_to_string(format!("/proc/{keeper}/task/{keeper}/children")).unwrap_or_default();
    let pids = children.split_whitespace().filter_map(|pid| pid.parse().ok());
    pids.filter(|pid| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(") ")
            .is_some_and(|(_, rest)| rest.starts_with('Z'))
    })
    .collect()
}

#[test]
fn the_shares_stay_open_and_no_child_is_left_when_all_parts_were_replaced() -> Result<()> {
    let site = SitePlan::new(DAEMON, 1).start()?;
    std::fs::write(site.share().join("file"), b"the one that was opened")?;
    let vm = site.vm(0)?;
    let mut ring = vm.ring(Mode::FILE)?;
    for part in [Part::Core, Part::Front, Part::Keeper] {
        done(&site, None, part)?;
    }
    wait_until("no dead child", PATIENCE, || {
        Ok(dead_children(site.daemon.pid()).is_empty().then_some(()))
    })?;
    // Another directory in its place.
    std::fs::rename(site.share(), site.daemon.path("elsewhere"))?;
    std::fs::create_dir(site.share())?;
    std::fs::write(site.share().join("file"), b"another")?;
    let core = site.daemon.kill_role("core")?;
    site.daemon.wait_for_new("core", core, PATIENCE)?;
    let (memory, read) = ring
        .get_to_memory("work/file", &TransferOptions::default())
        .with_context(|| site.daemon.log().tail())?;
    let bytes = memory.to_vec(0, usize::try_from(read.bytes)?)?;
    ensure!(
        bytes == b"the one that was opened",
        "{:?}",
        String::from_utf8_lossy(&bytes)
    );
    Ok(())
}

#[test]
fn a_plain_upgrade_takes_what_is_where_the_daemon_was_started_whatever_was_tried_before() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("vmgmtd");
    let put =
        |path: &Path| std::fs::hard_link(DAEMON, path).or_else(|_| std::fs::copy(DAEMON, path).map(drop));
    put(&path)?;
    let site = SitePlan::new(&path, 1)
        .variable("VMGMT_FAULT", "resume@vmgmtd=refuse")
        .start()?;
    // Another program is put in its place, is tried, and cannot go on.
    std::fs::remove_file(&path)?;
    put(&path)?;
    for _ in 0..2 {
        let report = upgrade(&site, None, Part::Keeper)?;
        ensure!(
            report.state == UpgradeState::RolledBack && Path::new(&report.binary) == path,
            "{report:?}"
        );
    }
    // And so it is after one from elsewhere.
    let other = another(folder.path())?;
    done(&site, Some(&other), Part::Keeper)?;
    let report = upgrade(&site, None, Part::Keeper)?;
    ensure!(Path::new(&report.binary) == path, "{report:?}");
    Ok(())
}

#[test]
fn a_new_front_that_hangs_when_it_is_to_serve_is_told_of_and_holds_up_nothing_else() -> Result<()> {
    let site = SitePlan::new(DAEMON, 1)
        .variable("VMGMT_FAULT", "serve=hang")
        .start()?;
    let report = upgrade(&site, None, Part::Front)?;
    ensure!(
        report.state == UpgradeState::Failed && report.reason.contains("has not said within 5 s"),
        "{report:?}"
    );
    let status: Status = call(&site, &Call::Status)?;
    ensure!(
        status
            .notices
            .iter()
            .any(|line| line.contains("is failed: front: ")),
        "{status:?}"
    );
    done(&site, None, Part::Keeper)?;
    Ok(())
}
