//! Paths beneath a share's root. Nothing here follows a symbolic or magic link, or leaves the root: openat2 sees to it.
//!
//! In: a root directory and a relative path that a guest chose. Out: descriptors beneath the root. Must never know: who asks.

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, StatxFlags, fstat, openat2, statx};
use rustix::io::Errno;
use rustix::path::Arg;
use std::ffi::CStr;
use vmgmt_abi::file::kind;
use vmgmt_core::effect::{Identity, StatRecord};

/// openat2 retries when a rename races with `..`-checks (RESOLVE_BENEATH answers EAGAIN then); we never name `..`, but others
/// may rename above us.
const RACE_RETRIES: usize = 16;

fn open_beneath(
    root: BorrowedFd<'_>,
    path: impl Arg + Copy,
    flags: OFlags,
    mode: Mode,
) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let mut last = Errno::AGAIN;
    for _ in 0..RACE_RETRIES {
        match openat2(root, path, flags | OFlags::CLOEXEC, mode, resolve) {
            Err(errno @ (Errno::AGAIN | Errno::INTR)) => last = errno,
            other => return other,
        }
    }
    Err(last)
}

/// The empty path is the root.
const fn or_itself(path: &str) -> &str {
    if path.is_empty() { "." } else { path }
}

/// A directory beneath the root, for name operations (O_PATH).
///
/// # Errors
/// The system's: no such name, a link in the way (LOOP), not a directory.
pub fn directory(root: BorrowedFd<'_>, path: impl Arg + Copy) -> Result<OwnedFd, Errno> {
    open_beneath(
        root,
        path,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW,
        Mode::empty(),
    )
}

/// A directory beneath the root, for reading its entries.
///
/// # Errors
/// As [`directory`].
pub fn directory_to_read(root: BorrowedFd<'_>, path: &str) -> Result<OwnedFd, Errno> {
    open_beneath(
        root,
        or_itself(path),
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW,
        Mode::empty(),
    )
}

/// A directory that lies in another, for reading its entries.
///
/// # Errors
/// As [`directory`].
pub fn directory_below(above: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    open_beneath(
        above,
        name,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW,
        Mode::empty(),
    )
}

/// Splits a path into its directory (empty: the root) and its last component.
///
/// # Errors
/// INVAL for the root itself.
pub fn split(path: &str) -> Result<(&str, &str), Errno> {
    let (directory, name) = path.rsplit_once('/').unwrap_or(("", path));
    if name.is_empty() || name == "." || name == ".." {
        Err(Errno::INVAL)
    } else {
        Ok((directory, name))
    }
}

/// The directory that holds the last component of `path`, and that component.
///
/// # Errors
/// As [`directory`] and [`split`].
pub fn parent<'a>(root: BorrowedFd<'_>, path: &'a str) -> Result<(OwnedFd, &'a str), Errno> {
    let (above, name) = split(path)?;
    Ok((directory(root, or_itself(above))?, name))
}

/// What lies at a path, without opening it for use; a link as the last component is itself what lies there.
///
/// # Errors
/// As [`directory`].
pub fn stat(root: BorrowedFd<'_>, path: &str) -> Result<(StatRecord, Identity), Errno> {
    let fd = open_beneath(
        root,
        or_itself(path),
        OFlags::PATH | OFlags::NOFOLLOW,
        Mode::empty(),
    )?;
    stat_of(fd.as_fd())
}

/// Stat of an open descriptor.
///
/// # Errors
/// The system's.
pub fn stat_of(fd: BorrowedFd<'_>) -> Result<(StatRecord, Identity), Errno> {
    let stat = fstat(fd)?;
    // A file system (or a kernel) that does not know when a file was made says so by leaving the bit out.
    let born = statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::BTIME).ok();
    let born = born.filter(|statx| statx.stx_mask & StatxFlags::BTIME.bits() != 0);
    let born_ns = born.map_or(0, |statx| {
        let time = statx.stx_btime;
        time.tv_sec
            .saturating_mul(1_000_000_000)
            .saturating_add(i64::from(time.tv_nsec))
    });
    let identity = Identity {
        device: stat.st_dev,
        inode: stat.st_ino,
        born_ns,
    };
    Ok((record(&stat), identity))
}

/// Whether this file or directory lies at a path.
///
/// # Errors
/// The system's, where nobody could look: that is no "no".
pub fn is_at(root: BorrowedFd<'_>, path: &str, identity: Identity) -> Result<bool, Errno> {
    match stat(root, path) {
        Ok((_, found)) => Ok(found == identity),
        // Nothing is there, a file stands where a directory was, or a link has come that is not followed.
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// A regular file beneath the root, opened; anything else is refused before it is opened for use (a device node or a FIFO
/// may do something when it is opened).
///
/// # Errors
/// The system's; OPNOTSUPP for what is no regular file, ISDIR for a directory.
pub fn file(root: BorrowedFd<'_>, path: &str, flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
    match open_beneath(
        root,
        or_itself(path),
        OFlags::PATH | OFlags::NOFOLLOW,
        Mode::empty(),
    ) {
        Ok(seen) => refuse_special(seen.as_fd())?,
        Err(Errno::NOENT) if flags.contains(OFlags::CREATE) => {}
        Err(errno) => return Err(errno),
    }
    let fd = open_beneath(
        root,
        or_itself(path),
        flags | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY,
        mode,
    )?;
    refuse_special(fd.as_fd())?;
    Ok(fd)
}

fn refuse_special(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    match FileType::from_raw_mode(fstat(fd)?.st_mode) {
        FileType::RegularFile => Ok(()),
        FileType::Directory => Err(Errno::ISDIR),
        FileType::Symlink => Err(Errno::LOOP),
        _ => Err(Errno::OPNOTSUPP),
    }
}

/// The record of a stat.
#[must_use]
pub fn record(stat: &rustix::fs::Stat) -> StatRecord {
    StatRecord {
        size: u64::try_from(stat.st_size).unwrap_or(0),
        allocated: u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512),
        modified_ns: stat
            .st_mtime
            .saturating_mul(1_000_000_000)
            .saturating_add(stat.st_mtime_nsec as i64),
        kind: match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => kind::FILE,
            FileType::Directory => kind::DIRECTORY,
            _ => kind::OTHER,
        },
        permissions: stat.st_mode & 0o777,
    }
}
