//! What runs ahead of the VMs, and for how long.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use vmgmt_testkit::client::Client as Device;
use vmgmt_testkit::process::wait_until;

use super::{Daemon, PATIENCE, signal};

/// The nice value of each thread of a process, the first thread's first (proc_pid_stat(5)).
fn nice(pid: i32) -> Result<Vec<i32>> {
    let mut threads: Vec<PathBuf> = std::fs::read_dir(format!("/proc/{pid}/task"))?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    threads.sort_by_key(|path| !path.ends_with(pid.to_string()));
    let of = |path: &PathBuf| {
        let stat = std::fs::read_to_string(path.join("stat"))?;
        let fields = stat.rsplit_once(") ").context("no name")?.1;
        // State is the third field, nice the nineteenth.
        Ok(fields.split(' ').nth(16).context("too short")?.parse()?)
    };
    threads.iter().map(of).collect()
}

/// The first thread of a core runs ahead of the VMs until it serves them, and no other thread ever does.
#[test]
fn a_core_runs_ahead_until_it_serves() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        vmgmt_testkit::skipped("a priority is given by root only");
        return Ok(());
    }
    let directory = tempfile::tempdir()?;
    let hang = directory.path().join("hang");
    let fault = format!("adopt-1?{}=hang", hang.display());
    let daemon = Daemon::start_in(
        directory,
        &["--socket", "DIR/mgmt.sock"],
        &[("VMGMT_FAULT", &fault)],
    )?;
    daemon.wait_line("vmgmtd: ready")?;
    let mut device = Device::connect_ready(daemon.path("mgmt.sock"))?;
    let before = device.get_info()?;
    let all_alike = |pid| {
        wait_until("a core of ordinary threads", PATIENCE, || {
            let nice = nice(pid)?;
            Ok((nice.len() > 2 && nice.iter().all(|nice| *nice == 0)).then_some(()))
        })
    };
    let first = daemon.wait_role("core", None)?;
    all_alike(first)?;
    std::fs::write(&hang, "")?;
    signal(first, Signal::KILL)?;
    let second = daemon.wait_role("core", Some(first))?;
    // It hangs while it takes over, and so stays what it is.
    wait_until("a core whose first thread alone runs ahead", PATIENCE, || {
        let nice = nice(second)?;
        Ok((nice.len() > 2 && nice[0] == -10 && nice[1..].iter().all(|nice| *nice == 0)).then_some(()))
    })?;
    std::fs::remove_file(&hang)?;
    signal(second, Signal::KILL)?;
    let third = daemon.wait_role("core", Some(second))?;
    all_alike(third)?;
    ensure!(device.get_info()? == before);
    Ok(())
}
