//! Planned upgrades of the real daemon under load, and programs that are no good: what was in service stays in service.
//!
//! "Another program" is the same one under another name (a hard link): what is tested is the way, the report and the state. Faults of a
//! bad program are asked for by `VMGMT_FAULT`, which debug builds honour and which names the program that is to have them.

#[path = "upgrade/way_back.rs"]
mod way_back;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use vmgmt_abi::Mode;
use vmgmt_ctl::protocol::{Call, Part, Status, Upgrade, UpgradeReport, UpgradeState, Upgrading};
use vmgmt_ctl::{Client, ClientError};
use vmgmt_driver::TransferOptions;
use vmgmt_driver::operations::chat::Receiver;
use vmgmt_testkit::guest::{GuestOptions, SimulatedVm, Site, SitePlan};
use vmgmt_testkit::process::wait_until;

const DAEMON: &str = env!("CARGO_BIN_EXE_vmgmtd");
const PATIENCE: Duration = Duration::from_secs(60);

fn deadline() -> Option<Instant> {
    Some(Instant::now() + PATIENCE)
}

fn call<T: serde::de::DeserializeOwned>(site: &Site, call: &Call) -> Result<T, ClientError> {
    let mut client = Client::connect(&site.control())?;
    let result = client.call(call, &[], Some(PATIENCE), &mut |_| true)?;
    serde_json::from_value(result).map_err(|error| ClientError::Garbled(error.to_string()))
}

fn status(site: &Site) -> Result<Status> {
    wait_until("a status", PATIENCE, || Ok(call(site, &Call::Status).ok()))
}

/// Upgrades the core to `to` and waits for the report.
fn upgrade(site: &Site, to: &Path) -> Result<UpgradeReport> {
    upgrade_parts(site, to, vec![Part::Core])
}

/// The same of these parts, or (if none is named) of all.
fn upgrade_parts(site: &Site, to: &Path, parts: Vec<Part>) -> Result<UpgradeReport> {
    let wish = Upgrade {
        to: Some(to.display().to_string()),
        parts,
    };
    let Upgrading { number } =
        call(site, &Call::Upgrade(wish)).map_err(|error| anyhow::anyhow!("{error}"))?;
    wait_until("the end of the upgrade", PATIENCE, || {
        let status = status(site)?;
        // Whoever answers knows of it, and how the front is shut in.
        let known = status
            .upgrade
            .as_ref()
            .is_some_and(|report| report.number == number);
        let front = status.sandbox.iter().any(|row| row.role == "front");
        ensure!(known && front, "{status:?}");
        Ok(status.upgrade.filter(|report| report.is_over()))
    })
    .with_context(|| site.daemon.log().tail())
}

/// The daemon's program under another name.
fn program(folder: &Path, name: &str) -> Result<PathBuf> {
    let path = folder.join(name);
    if std::fs::hard_link(DAEMON, &path).is_err() {
        std::fs::copy(DAEMON, &path)?;
    }
    Ok(path)
}

fn script(folder: &Path, name: &str, text: &str) -> Result<PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    let path = folder.join(name);
    std::fs::write(&path, format!("#!/bin/sh\n{text}\n"))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

fn program_of_core(site: &Site) -> Result<PathBuf> {
    Ok(std::fs::read_link(format!(
        "/proc/{}/exe",
        site.daemon.role("core")?
    ))?)
}

fn pattern(bytes: usize, seed: usize) -> Vec<u8> {
    (0..bytes)
        .map(|n| ((n * 7 + n / 251 + seed) % 251) as u8)
        .collect()
}

/// Messages from VM to VM, each with the next number, until told to stop; how many.
fn send_messages(vm: &SimulatedVm, stop: &AtomicBool) -> Result<u64> {
    let mut chat = vm.ring(Mode::CHAT)?;
    let mut sent = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        chat.send("vm1", &(sent + 1).to_le_bytes(), sent + 1)?;
        sent += 1;
    }
    chat.send("vm1", &0_u64.to_le_bytes(), sent + 1)?;
    Ok(sent)
}

/// Takes them in until the one that says that it was the last; how many, each the next.
fn receive_messages(vm: &SimulatedVm) -> Result<u64> {
    let mut chat = vm.ring(Mode::CHAT)?;
    let mut receiver = Receiver::default();
    let mut count = 0;
    loop {
        chat.post_receives(&mut receiver, 16)?;
        let message = chat
            .receive(&mut receiver, deadline())?
            .context("no message came")?;
        match u64::from_le_bytes(message.bytes.as_slice().try_into()?) {
            0 => return Ok(count),
            number => ensure!(number == count + 1, "{number} came after {count}"),
        }
        count += 1;
    }
}

/// Reads the same file over and over; how often it was whole. A handle survives a core, or says that it is stale.
fn read_files(vm: &SimulatedVm, data: &[u8], stop: &AtomicBool) -> Result<u64> {
    let mut files = vm.ring(Mode::FILE)?;
    let mut whole = 0;
    while !stop.load(Ordering::Relaxed) || whole == 0 {
        match files.get_to_memory("work/big", &TransferOptions::default()) {
            Ok((memory, done)) => {
                ensure!(
                    done.bytes == data.len() as u64 && memory.to_vec(0, data.len())? == data,
                    "other bytes"
                );
                whole += 1;
            }
            Err(error) => ensure!(error.status() == Some(vmgmt_driver::Status::STALE), "{error}"),
        }
    }
    Ok(whole)
}

#[test]
fn old_new_old_new_under_load_and_nothing_is_lost() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let next = program(folder.path(), "vmgmtd-next")?;
    let site = SitePlan::new(DAEMON, 2).start()?;
    let before = site.pids()?;
    let data = pattern(24 << 20, 3);
    std::fs::write(site.share().join("big"), &data)?;
    let (source, target) = (
        site.vm_with(0, GuestOptions::default().ram_bytes(128 << 20))?,
        site.vm(1)?,
    );
    let stop = AtomicBool::new(false);
    let (reports, sent, received, whole) = std::thread::scope(|scope| {
        let receiving = scope.spawn(|| receive_messages(&target));
        let sending = scope.spawn(|| send_messages(&source, &stop));
        let reading = scope.spawn(|| read_files(&source, &data, &stop));
        let reports: Result<Vec<_>> = [next.as_path(), Path::new(DAEMON), &next, Path::new(DAEMON)]
            .into_iter()
            .map(|to| {
                let report = upgrade(&site, to)?;
                Ok((report, program_of_core(&site)? == to))
            })
            .collect();
        stop.store(true, Ordering::Relaxed);
        let joined = |thread: std::thread::ScopedJoinHandle<'_, Result<u64>>| {
            thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?
        };
        anyhow::Ok((reports?, joined(sending)?, joined(receiving)?, joined(reading)?))
    })
    .with_context(|| site.daemon.log().tail())?;
    for (report, in_service) in &reports {
        ensure!(report.state == UpgradeState::Done && *in_service, "{report:?}");
        println!("out of service for {} ms", report.parts[0].stall_ms);
    }
    ensure!(
        sent == received && whole > 0,
        "{sent} sent, {received} received, {whole} files"
    );
    println!("{sent} messages, {whole} files of {} bytes", data.len());
    let after = site.pids()?;
    ensure!(
        (after.keeper, after.front) == (before.keeper, before.front),
        "{before:?} {after:?}"
    );
    let status = status(&site)?;
    ensure!(status.life == 5 && status.answered_by == "core", "{status:?}");
    ensure!(
        !site.daemon.log().text().contains("died"),
        "an upgrade is no death: {}",
        site.daemon.log().tail()
    );
    // What crashes now is started again from the program in service.
    let next = upgrade(&site, &next)?;
    ensure!(next.number == 5);
    let old = site.daemon.kill_role("core")?;
    site.daemon.wait_for_new("core", old, PATIENCE)?;
    ensure!(program_of_core(&site)?.ends_with("vmgmtd-next"));
    source.ring(Mode::COMMON)?.noop()?;
    Ok(())
}

/// What the descriptors of a process lead to, sorted, without numbers that differ each time.
fn descriptors(pid: u32) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        let target = std::fs::read_link(entry?.path()).unwrap_or_default();
        let target = target.to_string_lossy().replace("vmgmtd-next", "vmgmtd");
        let kind = target.rsplit('/').next().unwrap_or_default();
        all.push(kind.split(":[").next().unwrap_or_default().to_owned());
    }
    all.sort();
    Ok(all)
}

/// Keeper, front and core.
fn all_descriptors(site: &Site) -> Result<[Vec<String>; 3]> {
    let pids = site.pids()?;
    Ok([
        descriptors(pids.keeper)?,
        descriptors(pids.front)?,
        descriptors(pids.core)?,
    ])
}

/// The same when all have come to rest: an operator's connection is closed a moment after the operator has left.
fn at_rest(site: &Site) -> Result<[Vec<String>; 3]> {
    let (mut seen, mut times) = (all_descriptors(site)?, 0);
    wait_until("the same descriptors at every look", PATIENCE, || {
        let now = all_descriptors(site)?;
        times = if now == seen { times + 1 } else { 0 };
        seen = now;
        Ok((times >= 10).then(|| seen.clone()))
    })
}

/// A front of before leaves when the new one serves, and may take a moment to.
fn wait_gone(pid: u32) -> Result<()> {
    wait_until("the front of before to leave", PATIENCE, || {
        Ok((!Path::new(&format!("/proc/{pid}")).exists()).then_some(()))
    })
}

/// Register accesses until told to stop; the longest took so many milliseconds.
fn look_at_registers(vm: &SimulatedVm, stop: &AtomicBool) -> Result<u64> {
    let mut longest = Duration::ZERO;
    while !stop.load(Ordering::Relaxed) {
        let begin = Instant::now();
        vm.device().check_health()?;
        longest = longest.max(begin.elapsed());
    }
    Ok(u64::try_from(longest.as_millis())?)
}

/// Asks for the status until told to stop; how often it was answered. Whoever answers knows of the last upgrade that has begun.
fn ask_for_status(site: &Site, begun: &AtomicU64, stop: &AtomicBool) -> Result<u64> {
    let mut answers = 0;
    while !stop.load(Ordering::Relaxed) {
        let known = begun.load(Ordering::Relaxed);
        // Connections end with the core that served them.
        if let Ok(status) = call::<Status>(site, &Call::Status) {
            let told = status.upgrade.as_ref().map_or(0, |report| report.number);
            ensure!(told >= known, "upgrade {known} has begun, and: {status:?}");
            answers += 1;
        }
    }
    Ok(answers)
}

#[test]
fn all_three_parts_old_new_old_new_under_load_and_nothing_is_lost_or_left_over() -> Result<()> {
    // More than the core takes in from the keeper at once.
    const VMS: usize = 80;
    let folder = tempfile::tempdir()?;
    let next = program(folder.path(), "vmgmtd-next")?;
    let site = SitePlan::new(DAEMON, VMS).start()?;
    let data = pattern(4 << 20, 5);
    std::fs::write(site.share().join("big"), &data)?;
    let (source, target) = (
        site.vm_with(0, GuestOptions::default().ram_bytes(64 << 20))?,
        site.vm(1)?,
    );
    // Once without load: each later round begins and ends as this one ends.
    let first = site.pids()?.front;
    let report = upgrade_parts(&site, Path::new(DAEMON), vec![])?;
    ensure!(report.state == UpgradeState::Done, "{report:?}");
    wait_gone(first)?;
    source.ring(Mode::COMMON)?.noop()?;
    target.ring(Mode::COMMON)?.noop()?;
    let (keeper, at_rest) = (site.pids()?.keeper, at_rest(&site)?);
    let (stop, begun) = (AtomicBool::new(false), AtomicU64::new(report.number));
    let results = std::thread::scope(|scope| {
        let threads = [
            scope.spawn(|| receive_messages(&target)),
            scope.spawn(|| send_messages(&source, &stop)),
            scope.spawn(|| read_files(&source, &data, &stop)),
            scope.spawn(|| look_at_registers(&target, &stop)),
            scope.spawn(|| ask_for_status(&site, &begun, &stop)),
        ];
        let cycled = [next.as_path(), Path::new(DAEMON), &next, Path::new(DAEMON)]
            .into_iter()
            .try_for_each(|to| {
                let before = site.pids()?;
                let report = upgrade_parts(&site, to, vec![])?;
                begun.store(report.number, Ordering::Relaxed);
                let done = report.parts.iter().all(|part| part.state == UpgradeState::Done);
                ensure!(done && report.parts.len() == 3, "{report:?}");
                let stalls: Vec<_> = report.parts.iter().map(|part| part.stall_ms).collect();
                println!("core, front and keeper were out of service for {stalls:?} ms");
                wait_gone(before.front)?;
                let now = site.pids()?;
                ensure!(now.keeper == keeper && now.front != before.front && now.core != before.core);
                for pid in [now.keeper, now.front, now.core] {
                    let runs = std::fs::read_link(format!("/proc/{pid}/exe"))?;
                    ensure!(runs == to, "process {pid} runs {}", runs.display());
                }
                Ok(())
            });
        stop.store(true, Ordering::Relaxed);
        let results: Result<Vec<_>> = threads
            .into_iter()
            .map(|thread| thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?)
            .collect();
        cycled.and(results)
    })
    .with_context(|| site.daemon.log().tail())?;
    let [received, sent, whole, longest_ms, answers] = results[..] else {
        anyhow::bail!("{results:?}");
    };
    println!(
        "{sent} messages, {whole} files, {answers} answers, the longest register access took {longest_ms} ms"
    );
    ensure!(
        sent == received && sent > 0 && whole > 0 && answers > 0,
        "{sent} sent, {received} received, {whole} files, {answers} answers"
    );
    let mut now = at_rest.clone();
    wait_until("the descriptors of before, or fewer", PATIENCE, || {
        now = all_descriptors(&site)?;
        let known = now.iter().zip(&at_rest).all(|(now, before)| {
            let mut left = before.clone();
            now.iter().all(|kind| {
                let place = left.iter().position(|other| other == kind);
                place.map(|place| left.swap_remove(place)).is_some()
            })
        });
        Ok(known.then_some(()))
    })
    .with_context(|| format!("before: {at_rest:?}\nnow: {now:?}"))?;
    let text = site.daemon.log().text();
    ensure!(
        !text.contains("died"),
        "an upgrade is no death: {}",
        site.daemon.log().tail()
    );
    Ok(())
}

#[test]
fn every_bad_program_leaves_the_old_one_in_service() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let faults = "check@check-exits=exit,check@check-crashes=abort,check@check-hangs=hang,\
                  trial@trial-exits=exit,trial@trial-crashes=abort,trial@trial-hangs=hang,go@go-crashes=abort";
    let site = SitePlan::new(DAEMON, 2).variable("VMGMT_FAULT", faults).start()?;
    let (vm, other) = (site.vm(0)?, site.vm(1)?);
    let mut ring = vm.ring(Mode::COMMON)?;
    let mut chat = vm.ring(Mode::CHAT)?;
    chat.send("vm1", b"before", 1)?;
    let program = |name: &str| program(folder, name);
    let cases = [
        (
            PathBuf::from("/bin/true"),
            UpgradeState::Denied,
            "is it a vmgmtd?",
        ),
        (
            script(folder, "exits", "exit 1")?,
            UpgradeState::Denied,
            "exit code 1",
        ),
        (
            script(folder, "hangs", "exec sleep 1000")?,
            UpgradeState::Denied,
            "did not answer within 5 s",
        ),
        (program("check-exits")?, UpgradeState::Denied, "exit code 1"),
        (program("check-crashes")?, UpgradeState::Denied, "SIGABRT"),
        (
            program("check-hangs")?,
            UpgradeState::Denied,
            "did not answer within 5 s",
        ),
        (program("trial-exits")?, UpgradeState::RolledBack, "exit code 1"),
        (program("trial-crashes")?, UpgradeState::RolledBack, "SIGABRT"),
        (program("trial-hangs")?, UpgradeState::RolledBack, "within 10 s"),
        (program("go-crashes")?, UpgradeState::RolledBack, "SIGABRT"),
    ];
    for (number, (path, state, why)) in (1..).zip(&cases) {
        let core = site.daemon.role("core")?;
        let report = upgrade(&site, path)?;
        ensure!(
            report.number == number && report.state == *state,
            "{}: {report:?}",
            path.display()
        );
        ensure!(
            report.reason.starts_with("core: ") && report.reason.contains(why),
            "{report:?}"
        );
        ensure!(
            (site.daemon.role("core")? == core) == (*state == UpgradeState::Denied),
            "{report:?}"
        );
        ensure!(program_of_core(&site)? == Path::new(DAEMON), "{}", path.display());
        ring.noop().with_context(|| format!("after {}", path.display()))?;
    }
    // What was accepted before is still there, once.
    let mut at = other.ring(Mode::CHAT)?;
    chat.send("vm1", b"after", 2)?;
    let mut receiver = Receiver::default();
    at.post_receives(&mut receiver, 4)?;
    for expected in [&b"before"[..], b"after"] {
        let message = at.receive(&mut receiver, deadline())?.context("no message")?;
        ensure!(message.bytes == expected, "{message:?}");
    }
    // And a good one is taken after all of them.
    let good = program("vmgmtd-good")?;
    ensure!(upgrade(&site, &good)?.state == UpgradeState::Done);
    Ok(())
}

#[test]
fn a_file_replaced_or_deleted_harms_nobody_and_a_signal_takes_what_is_there() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = program(folder.path(), "vmgmtd")?;
    let site = SitePlan::new(&path, 1).start()?;
    let vm = site.vm(0)?;
    let mut ring = vm.ring(Mode::COMMON)?;
    // Replaced by something bad, the old program is still the one that is started.
    std::fs::remove_file(&path)?;
    script(folder.path(), "vmgmtd", "exit 1")?;
    let old = site.daemon.kill_role("core")?;
    site.daemon.wait_for_new("core", old, PATIENCE)?;
    ring.noop()?;
    let signalled = |number: u64| -> Result<UpgradeReport> {
        let pid = rustix::process::Pid::from_raw(site.daemon.pid() as i32).context("pid")?;
        rustix::process::kill_process(pid, rustix::process::Signal::USR2)?;
        wait_until("the end of the upgrade", PATIENCE, || {
            let report = status(&site)?.upgrade.filter(|report| report.is_over());
            Ok(report.filter(|report| report.number == number))
        })
    };
    let report = signalled(1)?;
    ensure!(
        report.state == UpgradeState::Denied && Path::new(&report.binary) == path,
        "{report:?}"
    );
    std::fs::remove_file(&path)?;
    program(folder.path(), "vmgmtd")?;
    let core = site.daemon.role("core")?;
    let report = signalled(2)?;
    ensure!(report.parts[0].state == UpgradeState::Done, "{report:?}");
    ensure!(site.daemon.role("core")? != core);
    ring.noop()?;
    Ok(())
}

#[test]
fn vmgmtctl_tells_the_outcome_and_what_cannot_begin() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let site = SitePlan::new(DAEMON, 1).start()?;
    let run = |arguments: &[&str]| -> Result<(Option<i32>, String, String)> {
        let output = Command::new(env!("CARGO_BIN_EXE_vmgmtctl"))
            .arg("--control")
            .arg(site.control())
            .args(arguments)
            .output()?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok((output.status.code(), text(output.stdout), text(output.stderr)))
    };
    let next = program(folder.path(), "vmgmtd-next")?;
    let shown = next.to_str().context("a path")?;
    let (code, out, err) = run(&["upgrade", "--part", "core", "--to", shown])?;
    ensure!(
        code == Some(0) && out.contains("core: done, out of service for"),
        "{code:?} {out} {err}"
    );
    let (code, out, err) = run(&["--json", "upgrade", "--part", "core", "--to", "/bin/true"])?;
    let report: UpgradeReport = serde_json::from_str(&out).with_context(|| err.clone())?;
    ensure!(
        code == Some(1) && (report.number, report.state) == (2, UpgradeState::Denied),
        "{out}"
    );
    for (path, why) in [
        ("/no/such/file", "No such file"),
        ("/etc/passwd", "chmod +x"),
        ("/tmp", "is no file"),
    ] {
        let (code, _, err) = run(&["upgrade", "--to", path])?;
        ensure!(code == Some(1) && err.contains(why), "{path}: {code:?} {err}");
    }
    let (_, out, _) = run(&["status"])?;
    ensure!(out.contains("upgrade 2 to /bin/true: denied"), "{out}");
    let (code, _, err) = run(&["release", "vm0"])?;
    ensure!(
        code == Some(1) && err.contains("no device of VM \"vm0\" is quarantined"),
        "{err}"
    );
    Ok(())
}
