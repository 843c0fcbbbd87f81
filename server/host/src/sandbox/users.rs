//! Another user, no capability, no way back.
//!
//! In: an account. Out: a process that is only that. Linux keeps all of this per thread: the process must have one when it comes here.

use super::{Account, SandboxedRole, own_account};
use anyhow::{Context, ensure};
use rustix::process::{
    DumpableBehavior, Gid, Signal, Uid, getegid, geteuid, getgid, getppid, getuid, set_dumpable_behavior,
    set_parent_process_death_signal,
};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_keep_capabilities, set_no_new_privs,
    set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

/// Capabilities that a kernel may know: the sets have 64 bits.
const CAPABILITIES_MAX: u32 = 64;

/// Becomes that user and group, and a member of no other group.
pub(super) fn become_account(account: Account, parent: u32, notes: &mut Vec<String>) -> anyhow::Result<()> {
    let remedy = "vmgmtd needs CAP_SETUID and CAP_SETGID for that; `--sandbox off` goes without a sandbox";
    // While there is still the capability to do it: nothing that is executed later could get one back.
    let dropped: Result<Vec<()>, _> = (0..CAPABILITIES_MAX)
        .filter(|number| {
            rustix::thread::capability_is_in_bounding_set(CapabilitySet::from_bits_retain(1 << number))
                .unwrap_or(false)
        })
        .map(|number| remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << number)))
        .collect();
    if let Err(errno) = dropped {
        notes.push(format!(
            "the bounding set of capabilities stays: {errno} (CAP_SETPCAP is missing)"
        ));
    }
    set_keep_capabilities(false)?;
    let (uid, gid) = (Uid::from_raw(account.uid), Gid::from_raw(account.gid));
    set_thread_groups(&[]).context(remedy)?;
    set_thread_res_gid(gid, gid, gid).context(remedy)?;
    set_thread_res_uid(uid, uid, uid).context(remedy)?;
    ensure!(
        (getuid(), geteuid(), getgid(), getegid()) == (uid, uid, gid, gid),
        "the kernel did not change the user"
    );
    // A change of the user takes the tie to the keeper's life away (prctl(2)).
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let ours = getppid().map(|pid| pid.as_raw_nonzero().get().unsigned_abs());
    ensure!(ours == Some(parent), "the keeper is gone");
    Ok(())
}

/// Gives up every capability, and that any program could bring one back; shields the process's memory from its user's other processes.
pub(super) fn give_up_privileges(notes: &mut Vec<String>) -> anyhow::Result<()> {
    // Some kernels are built without ambient capabilities; then there are none.
    let _ = clear_ambient_capability_set();
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, none).context("capabilities cannot be given up")?;
    set_no_new_privs(true).context("no_new_privs")?;
    if let Err(errno) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        notes.push(format!(
            "its memory is not shielded from its user's other processes: {errno}"
        ));
    }
    Ok(())
}

/// What the process is now, as the kernel says it.
pub(super) fn describe(report: &mut SandboxedRole) {
    report.user = own_account().to_string();
    report.capabilities =
        capabilities(None).map_or(u64::MAX, |sets| (sets.effective | sets.permitted).bits());
}
