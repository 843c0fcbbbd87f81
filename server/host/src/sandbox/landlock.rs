//! Landlock: which files may be reached by name. The front: none. The core: those beneath its shares.
//!
//! In: descriptors of the shares' directories. Out: the kernel's ABI that is in force. It holds for the calling thread and for those it
//! makes later. Descriptors that come over a socket (guest memory, operators' files) keep the rights that they were opened with.

use super::{ShareRoot, calls};
use ::landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, Ruleset, RulesetAttr, RulesetStatus, Scope, make_bitflags,
};
use anyhow::Context;
use rustix::fd::OwnedFd;
use rustix::io::Errno;

/// The newest ABI that this was written against and tested on; an older kernel takes what it knows of it, a newer one the same.
/// (1: files, 2: renames across directories, 3: truncation, 4: TCP, 5: ioctl of devices, 6: signals and abstract sockets, 7: its log.)
const WRITTEN_FOR: ABI = ABI::V7;

/// What the core may do beneath a share. Not here, and so denied: to execute, to make links, devices, FIFOs and sockets, ioctl of devices.
fn share_rights() -> BitFlags<AccessFs> {
    make_bitflags!(AccessFs::{
        ReadFile      // get, and reading in place
        | ReadDir     // list, sweep, the quota's count
        | WriteFile   // put, and writing in place
        | Truncate    // the right length of a put, truncate
        | MakeReg     // temporary files, created files
        | MakeDir     // make directory
        | RemoveFile  // remove, sweep, and a rename takes the old name away
        | RemoveDir   // remove
        | Refer       // rename from one directory into another
    })
}

/// Restricts this thread; the ABI in force.
pub(super) fn restrict(shares: &[ShareRoot<'_>]) -> Result<u32, String> {
    let abi = match calls::landlock_abi() {
        Ok(abi) => abi.min(WRITTEN_FOR as i32),
        Err(Errno::OPNOTSUPP) => {
            return Err("it is not enabled: add landlock to the kernel's lsm= parameter".into());
        }
        Err(errno) => return Err(format!("this kernel has none (5.13 and later do): {errno}")),
    };
    let mut rights = share_rights();
    if abi < 2 {
        return Err(
            "ABI 1 cannot allow a rename from one directory into another (5.19 and later can)".into(),
        );
    }
    if abi < 3 {
        rights.remove(AccessFs::Truncate); // not known yet, and so not denied
    }
    build(shares, rights).map_err(|error| format!("{error:#}"))?;
    Ok(abi.unsigned_abs())
}

fn build(shares: &[ShareRoot<'_>], rights: BitFlags<AccessFs>) -> anyhow::Result<()> {
    let ruleset = Ruleset::default()
        // All that can be handled is denied unless a rule allows it; where a kernel knows less, that less is.
        .handle_access(AccessFs::from_all(WRITTEN_FOR))?
        .handle_access(AccessNet::from_all(WRITTEN_FOR))?
        .scope(Scope::from_all(WRITTEN_FOR))?
        .create()?;
    let handle: Option<OwnedFd> = ruleset.try_clone()?.into();
    let handle = handle.context("no ruleset was made")?;
    for share in shares {
        calls::allow_beneath(&handle, share.fd, rights.bits())
            .with_context(|| format!("share {:?}", share.name))?;
    }
    let status = ruleset.restrict_self()?;
    anyhow::ensure!(status.ruleset != RulesetStatus::NotEnforced, "it is not enforced");
    Ok(())
}
