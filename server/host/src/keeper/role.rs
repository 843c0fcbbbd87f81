//! What a child does first: it ties its life to the keeper's and takes its channel over.

use rustix::fd::{AsFd, OwnedFd};
use rustix::process::{Signal, getppid, set_parent_process_death_signal};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Enters a role as a child of process `parent`: gives the channel to the keeper.
///
/// # Errors
/// This process was not started by the keeper, or the keeper is gone.
pub fn enter_role(role: &str, parent: u32) -> anyhow::Result<OwnedFd> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // Started by descriptor, it would be shown by that one's number.
    if let Ok(name) = std::ffi::CString::new(format!("vmgmtd-{role}")) {
        rustix::thread::set_name(&name)?;
    }
    // It may have died before that.
    let ours = getppid().map(|pid| pid.as_raw_nonzero().get().unsigned_abs());
    anyhow::ensure!(
        ours == Some(parent),
        "the {role} is started by vmgmtd itself, not by hand"
    );
    // A service manager signals all processes; the keeper tells its children when and how to end.
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGUSR2, libc::SIGHUP] {
        signal_hook::flag::register(signal, Arc::new(AtomicBool::new(false)))?;
    }
    // The keeper and the front are the last that a host short of memory should kill; the core can be replaced.
    if role == "core"
        && std::fs::read_to_string("/proc/self/oom_score_adj").is_ok_and(|text| text.trim() == "-1000")
    {
        std::fs::write("/proc/self/oom_score_adj", "0")?;
    }
    let channel = std::io::stdin().as_fd().try_clone_to_owned()?;
    rustix::stdio::dup2_stdin(std::fs::File::open("/dev/null")?)?;
    Ok(channel)
}
