//! The shares' directories for a core that is nobody on the host: opened by the keeper, which may, and handed over as descriptors.
//!
//! In: the configuration's shares. Out: one descriptor each. Where the file system can, it is a clone of the mount on which the share's
//! owner and the core's user are exchanged (an idmapped mount, Linux 5.12): the core can do there exactly what the owner can, and what
//! it makes belongs to the owner on disk. Elsewhere it is the directory as it is, and the core needs permissions of its own.

use super::{Account, SandboxConfig, ShareRoot, calls, own_account};
use crate::config::ShareConfig;
use crate::store::StoreError;
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags, fstat, open, statx};
use rustix::io::{Errno, fcntl_dupfd_cloexec};
use rustix::mount::{OpenTreeFlags, open_tree};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// Opens shares: each once, so that the keeper never waits for a disk that hangs when a core is to be replaced.
#[derive(Debug, Default)]
pub struct Shares {
    /// What each core life gets, by the directory's path.
    opened: BTreeMap<PathBuf, OwnedFd>,
    /// User namespaces that exchange an owner with the core's user.
    namespaces: BTreeMap<(u32, u32), OwnedFd>,
}

impl Shares {
    /// What is open, for a keeper that goes on as another program. (The namespaces were only needed to open it.)
    pub fn opened(&self) -> impl Iterator<Item = (&PathBuf, &OwnedFd)> {
        self.opened.iter()
    }

    /// What was open there.
    #[must_use]
    pub fn of_opened(opened: impl IntoIterator<Item = (PathBuf, OwnedFd)>) -> Self {
        Self {
            opened: opened.into_iter().collect(),
            namespaces: BTreeMap::new(),
        }
    }

    /// The directories, in the order of the configuration.
    ///
    /// # Errors
    /// One cannot be opened at all.
    pub fn open(
        &mut self,
        shares: &[ShareConfig],
        sandbox: &SandboxConfig,
    ) -> Result<Vec<OwnedFd>, StoreError> {
        let account = sandbox.core.filter(|_| sandbox.enabled);
        shares.iter().map(|share| self.open_one(share, account)).collect()
    }

    fn open_one(&mut self, share: &ShareConfig, account: Option<Account>) -> Result<OwnedFd, StoreError> {
        if let Some(opened) = self.opened.get(&share.path) {
            return fcntl_dupfd_cloexec(opened, 3).map_err(|errno| refused(share, errno));
        }
        let directory = open_directory(share)?;
        let opened = match account.map(|account| (account, self.mapped(&directory, account))) {
            None => directory,
            Some((_, Ok(mapped))) => mapped,
            Some((account, Err(error))) => {
                tracing::info!(
                    "share {:?}: the core works there as user {account}, not as the owner: {error:#}",
                    share.name
                );
                directory
            }
        };
        let copy = fcntl_dupfd_cloexec(&opened, 3).map_err(|errno| refused(share, errno))?;
        self.opened.insert(share.path.clone(), opened);
        Ok(copy)
    }

    fn mapped(&mut self, directory: &OwnedFd, account: Account) -> anyhow::Result<OwnedFd> {
        let stat = fstat(directory)?;
        let owner = (stat.st_uid, stat.st_gid);
        let namespace = match self.namespaces.entry(owner) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => new.insert(namespace(owner, account)?),
        };
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH
            | OpenTreeFlags::AT_RECURSIVE;
        let mount = open_tree(directory, "", flags)
            .map_err(|errno| anyhow::anyhow!("the mount cannot be cloned: {errno}"))?;
        calls::map_mount(&mount, namespace)
            .map_err(|errno| anyhow::anyhow!("its file system cannot map users: {errno}"))?;
        Ok(mount)
    }
}

/// A share's directory as it is.
///
/// # Errors
/// It cannot be opened.
pub fn open_directory(share: &ShareConfig) -> Result<OwnedFd, StoreError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    open(&share.path, flags, Mode::empty()).map_err(|errno| refused(share, errno))
}

fn refused(share: &ShareConfig, errno: Errno) -> StoreError {
    StoreError::Share {
        name: share.name.clone(),
        path: share.path.display().to_string(),
        errno,
    }
}

/// A user namespace in which owner and account are exchanged and everybody else is himself.
fn namespace(owner: (u32, u32), account: Account) -> anyhow::Result<OwnedFd> {
    let mut holder = Command::new("/proc/self/exe")
        .args(["--role", "namespace", "--parent", &std::process::id().to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let made = made_namespace(&mut holder, owner, account);
    // Its standard input closes: it ends. Whatever it says then, the namespace is held by its descriptor.
    drop(holder.stdin.take());
    let _ = holder.wait();
    made
}

fn made_namespace(
    holder: &mut std::process::Child,
    owner: (u32, u32),
    account: Account,
) -> anyhow::Result<OwnedFd> {
    let mut ready = [0; 1];
    let told = holder.stdout.as_mut().map(|out| out.read_exact(&mut ready));
    anyhow::ensure!(matches!(told, Some(Ok(()))), "the system gives no user namespace");
    let pid = holder.id();
    let map = |name: &str, owner: u32, account: u32| {
        std::fs::write(format!("/proc/{pid}/{name}"), exchange(owner, account))
            .map_err(|error| anyhow::anyhow!("the {name} of a user namespace: {error}"))
    };
    map("uid_map", owner.0, account.uid)?;
    map("gid_map", owner.1, account.gid)?;
    Ok(std::fs::File::open(format!("/proc/{pid}/ns/user"))?.into())
}

/// The lines of a map that exchanges two numbers and leaves all others.
fn exchange(one: u32, other: u32) -> String {
    let (low, high) = (one.min(other), one.max(other));
    let mut extents = vec![(0, 0, low), (low, high, 1)];
    if low != high {
        extents.extend([(low + 1, low + 1, high - low - 1), (high, low, 1)]);
    }
    // The last number means "none".
    extents.push((high + 1, high + 1, u32::MAX - high - 1));
    let lines = extents.into_iter().filter(|(_, _, count)| *count > 0);
    lines
        .map(|(inside, outside, count)| format!("{inside} {outside} {count}\n"))
        .collect()
}

/// The process that holds a user namespace until its starter has taken it; role `namespace`.
///
/// # Errors
/// The system gives none.
pub fn hold_namespace() -> anyhow::Result<()> {
    calls::new_user_namespace()?;
    let mut out = std::io::stdout();
    out.write_all(b"+")?;
    out.flush()?;
    // Until the end of the input.
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

/// What this process, which is the core's user now, cannot do in a share by its permission bits, and what helps. It looks at what the
/// kernel knows already: a core on trial or after a death must not wait for a disk.
pub(super) fn lacking_access(share: &ShareRoot<'_>) -> Option<String> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let stat = statx(share.fd, "", flags, StatxFlags::BASIC_STATS).ok()?;
    let account = own_account();
    let rights = rights_of(account, stat.stx_uid, stat.stx_gid, stat.stx_mode.into());
    let lacking = match (rights & 0o5 == 0o5, rights & 0o2 == 0o2) {
        (true, true) => return None,
        (true, false) => "write",
        _ => "read or write",
    };
    Some(format!(
        "share {:?}: by the permission bits of its directory user {account} may not {lacking} there; give it the directory (chown, setfacl), \
         name its owner in [sandbox] core-user, or keep the share on a file system that can map users (ext4, xfs, btrfs, tmpfs)",
        share.name
    ))
}

/// Which of read (4), write (2) and search (1) the bits of a mode give.
const fn rights_of(account: Account, owner: u32, group: u32, mode: u32) -> u32 {
    let shift = if account.uid == 0 {
        return 0o7;
    } else if account.uid == owner {
        6
    } else if account.gid == group {
        3
    } else {
        0
    };
    mode >> shift & 0o7
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rights_are_those_of_owner_group_or_others_and_of_nobody_else() {
        let account = Account { uid: 7, gid: 8 };
        assert_eq!(rights_of(account, 7, 8, 0o40077), 0);
        assert_eq!(rights_of(account, 1, 8, 0o40757), 5);
        assert_eq!(rights_of(account, 1, 1, 0o40002), 2);
    }

    #[test]
    fn each_share_is_opened_once_whatever_becomes_of_its_path() {
        let directory = tempfile::tempdir().unwrap();
        let share = ShareConfig {
            name: "data".into(),
            path: directory.path().join("share"),
            bytes_max: None,
            files_max: None,
        };
        std::fs::create_dir(&share.path).unwrap();
        let off = SandboxConfig {
            enabled: false,
            front: None,
            core: None,
        };
        let mut shares = Shares::default();
        let first = shares.open(std::slice::from_ref(&share), &off).unwrap();
        std::fs::rename(&share.path, directory.path().join("elsewhere")).unwrap();
        let second = shares.open(&[share], &off).unwrap();
        assert_eq!(
            fstat(&first[0]).unwrap().st_ino,
            fstat(&second[0]).unwrap().st_ino
        );
    }

    #[test]
    fn a_map_exchanges_two_numbers_and_covers_all() {
        assert_eq!(exchange(0, 3), "0 3 1\n1 1 2\n3 0 1\n4 4 4294967291\n");
        assert_eq!(exchange(5, 4), "0 0 4\n4 5 1\n5 4 1\n6 6 4294967289\n");
        assert_eq!(exchange(7, 7), "0 0 7\n7 7 1\n8 8 4294967287\n");
        for (one, other) in [(0, 61_185), (1000, 61_185), (u32::MAX - 1, 0)] {
            let mut next = 0u64;
            for line in exchange(one, other).lines() {
                let numbers: Vec<u64> = line.split(' ').map(|number| number.parse().unwrap()).collect();
                assert_eq!(numbers[0], next);
                next += numbers[2];
            }
            assert_eq!(next, u64::from(u32::MAX));
        }
    }
}
