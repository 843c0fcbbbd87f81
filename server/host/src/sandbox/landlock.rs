//! Landlock: which files may be reached by name. The front: none. The core: those beneath its shares.
//!
//! In: descriptors of the shares' directories. Out: the kernel's ABI that is in force. It holds for the calling thread and for those it
//! makes later. Descriptors that come over a socket (guest memory, operators' files) keep the rights that they were opened with.

use super::ShareRoot;
use ::landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, LandlockStatus, PathBeneath, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope, make_bitflags,
};

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
    let status = build(shares).map_err(|error| error.to_string())?;
    let abi = match status.landlock {
        LandlockStatus::Available { effective_abi, .. } => effective_abi as u32,
        LandlockStatus::NotEnabled => {
            return Err("it is not enabled: add landlock to the kernel's lsm= parameter".into());
        }
        _ => return Err("this kernel has none (5.13 and later do)".into()),
    };
    match status.ruleset {
        RulesetStatus::NotEnforced => Err(format!(
            "ABI {abi} cannot allow a rename from one directory into another (5.19 and later can)"
        )),
        _ => Ok(abi),
    }
}

fn build(shares: &[ShareRoot<'_>]) -> Result<::landlock::RestrictionStatus, RulesetError> {
    let mut ruleset = Ruleset::default()
        // All that can be handled is denied unless a rule allows it; where a kernel knows less, that less is.
        .handle_access(AccessFs::from_all(WRITTEN_FOR))?
        .handle_access(AccessNet::from_all(WRITTEN_FOR))?
        .scope(Scope::from_all(WRITTEN_FOR))?
        .create()?;
    for share in shares {
        ruleset = ruleset.add_rule(PathBeneath::new(share.fd, share_rights()))?;
    }
    ruleset.restrict_self()
}
