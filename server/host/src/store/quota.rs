//! Bytes and files that VMs may put into a share. Charged before a write, given back when it fails or a file goes.
//!
//! The measure is file lengths, not blocks: it does not depend on the file system. What was there at the start is counted
//! once, by a walk on a worker, which passes over what has changed since it began: that has been charged by its writer. Until it is
//! done a quota is not yet exact.

use super::resolve;
use rustix::fd::AsFd;
use rustix::fs::{AtFlags, Dir, FileType, statat};
use rustix::io::Errno;
use rustix::time::{ClockId, Timespec, clock_gettime};
use std::sync::atomic::{AtomicU64, Ordering};

/// A share's quota and what is used of it.
#[derive(Debug)]
pub struct Quota {
    bytes_max: Option<u64>,
    files_max: Option<u64>,
    bytes: AtomicU64,
    files: AtomicU64,
}

/// Which of the two was exceeded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exceeded {
    Bytes,
    Files,
}

impl Quota {
    #[must_use]
    pub const fn new(bytes_max: Option<u64>, files_max: Option<u64>) -> Self {
        Self {
            bytes_max,
            files_max,
            bytes: AtomicU64::new(0),
            files: AtomicU64::new(0),
        }
    }

    /// Whether anything has to be counted at all.
    #[must_use]
    pub const fn is_limited(&self) -> bool {
        self.bytes_max.is_some() || self.files_max.is_some()
    }

    /// Bytes that may still be put; `u64::MAX`: no limit.
    #[must_use]
    pub fn bytes_left(&self) -> u64 {
        self.bytes_max.map_or(u64::MAX, |max| {
            max.saturating_sub(self.bytes.load(Ordering::Relaxed))
        })
    }

    /// Charges growth.
    ///
    /// # Errors
    /// Exceeded; nothing is charged then.
    pub fn charge(&self, bytes: u64, files: u64) -> Result<(), Exceeded> {
        let charge = |counter: &AtomicU64, amount: u64, max: Option<u64>| {
            let update = |now: u64| {
                let next = now.saturating_add(amount);
                (amount == 0 || max.is_none_or(|max| next <= max)).then_some(next)
            };
            counter
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, update)
                .is_ok()
        };
        if !charge(&self.files, files, self.files_max) {
            return Err(Exceeded::Files);
        }
        if !charge(&self.bytes, bytes, self.bytes_max) {
            self.give_back(0, files);
            return Err(Exceeded::Bytes);
        }
        Ok(())
    }

    /// Gives back what was charged.
    pub fn give_back(&self, bytes: u64, files: u64) {
        for (counter, amount) in [(&self.bytes, bytes), (&self.files, files)] {
            let _ = counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| {
                Some(now.saturating_sub(amount))
            });
        }
    }

    /// The time from which on changes are charged by who makes them: as the kernel stamps files, by its coarse clock.
    #[must_use]
    pub fn now() -> Timespec {
        clock_gettime(ClockId::RealtimeCoarse)
    }

    /// Counts what is beneath a directory and was there when it `began`, without following links or leaving its file system depth unbounded.
    pub fn count_tree(&self, root: impl AsFd, began: Timespec) {
        let mut open = vec![resolve::directory_to_read(root.as_fd(), "")];
        while let Some(Ok(directory)) = open.pop() {
            if let Err(errno) = self.count_directory(&directory, &mut open, began) {
                tracing::warn!(%errno, "a directory of a share cannot be counted for its quota");
            }
        }
    }

    fn count_directory(
        &self,
        directory: &rustix::fd::OwnedFd,
        open: &mut Vec<Result<rustix::fd::OwnedFd, Errno>>,
        began: Timespec,
    ) -> Result<(), Errno> {
        let entries = Dir::new(resolve::directory_to_read(directory.as_fd(), "")?)?;
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            let stat = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory if open.len() < DIRECTORIES_OPEN_MAX => {
                    open.push(resolve::directory(directory.as_fd(), name));
                }
                FileType::RegularFile
                    if (stat.st_ctime, stat.st_ctime_nsec as i64) < (began.tv_sec, began.tv_nsec) =>
                {
                    self.bytes
                        .fetch_add(u64::try_from(stat.st_size).unwrap_or(0), Ordering::Relaxed);
                    self.files.fetch_add(1, Ordering::Relaxed);
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Directories that the walk holds open at a time, so that a wide tree cannot take all descriptors; what lies beyond is
/// not counted and so errs on the VMs' side.
const DIRECTORIES_OPEN_MAX: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_charge_that_does_not_fit_charges_nothing() {
        let quota = Quota::new(Some(10), Some(1));
        assert_eq!(quota.charge(11, 1), Err(Exceeded::Bytes));
        assert_eq!(quota.charge(10, 1), Ok(()));
        assert_eq!(
            (quota.charge(1, 0), quota.charge(0, 1)),
            (Err(Exceeded::Bytes), Err(Exceeded::Files))
        );
        assert_eq!(quota.bytes_left(), 0);
        quota.give_back(4, 1);
        assert_eq!((quota.bytes_left(), quota.charge(4, 1)), (4, Ok(())));
    }

    #[test]
    fn what_is_there_is_counted() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(directory.path().join("a/b")).unwrap();
        std::fs::write(directory.path().join("a/b/c"), b"12345").unwrap();
        std::fs::write(directory.path().join("d"), b"678").unwrap();
        std::os::unix::fs::symlink("/", directory.path().join("link")).unwrap();
        let quota = Quota::new(Some(10), Some(3));
        let later = Timespec {
            tv_sec: i64::MAX,
            tv_nsec: 0,
        };
        quota.count_tree(
            std::fs::File::open(directory.path()).unwrap(),
            Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
        );
        assert_eq!(quota.bytes_left(), 10);
        quota.count_tree(std::fs::File::open(directory.path()).unwrap(), later);
        assert_eq!(quota.bytes_left(), 2);
        assert_eq!(
            (quota.charge(2, 1), quota.charge(0, 1)),
            (Ok(()), Err(Exceeded::Files))
        );
    }
}
