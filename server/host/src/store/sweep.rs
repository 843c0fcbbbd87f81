//! The sweep of a share: what broken puts left is removed.
//!
//! Runs on workers, in turns: a guest decides how large the tree is. Must never know: guests, puts under way but by their names.

use super::names::{ONCE_SUFFIX, TEMPORARY_PREFIX};
use super::walk::{ENTRIES_PER_TURN, Walk};
use super::{Share, resolve};
use rustix::fs::{AtFlags, DirEntry, FileType, statat, unlinkat};
use rustix::io::Errno;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vmgmt_core::effect::Outcome;

/// A sweep, somewhere on its way.
pub(super) struct Sweep {
    share: Arc<Share>,
    walk: Walk,
    /// Wall time at its beginning, in seconds.
    now: i64,
    older_than_seconds: u64,
    keep: Vec<String>,
    adoption: bool,
}

impl Sweep {
    pub fn new(share: Arc<Share>, older_than_seconds: u64, keep: Vec<String>, adoption: bool) -> Self {
        Self {
            walk: Walk::new(share.root()),
            share,
            now: rustix::time::clock_gettime(rustix::time::ClockId::Realtime).tv_sec,
            older_than_seconds,
            keep,
            adoption,
        }
    }

    /// Goes on for a while; the outcome, when it has been everywhere.
    pub fn turn(&mut self) -> Option<Outcome> {
        for _ in 0..ENTRIES_PER_TURN {
            let Some(entry) = self.walk.entry() else {
                self.tell_what_was_missed();
                return Some(Outcome::Done);
            };
            let is_temporary = entry
                .file_name()
                .to_bytes()
                .starts_with(TEMPORARY_PREFIX.as_bytes());
            if is_temporary {
                // Gone meanwhile, or it cannot be removed: the next sweep finds it again.
                let _ = self.remove_if_left(&entry);
            } else if self.walk.kind(&entry) == FileType::Directory {
                self.walk.enter(entry.file_name());
            }
        }
        None
    }

    fn remove_if_left(&self, entry: &DirEntry) -> Result<(), Errno> {
        let (directory, name) = (self.walk.directory()?, entry.file_name());
        let stat = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let older_than = i64::try_from(self.older_than_seconds).unwrap_or(i64::MAX);
        let is_old = self.now.saturating_sub(stat.st_mtime) > older_than;
        let is_orphan = self.adoption
            && name.to_bytes().ends_with(ONCE_SUFFIX.as_bytes())
            && resolve::record(&stat).modified_ns < self.share.began_ns;
        let path = self.walk.path_of(name);
        if !(is_old || is_orphan) || self.keep.iter().any(|kept| kept.as_bytes() == path) {
            return Ok(());
        }
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => unlinkat(directory, name, AtFlags::REMOVEDIR),
            _ => self.share.unlink(directory, name),
        }
    }

    /// Once in the core's life: it is the same every hour.
    fn tell_what_was_missed(&self) {
        if let Some(missed) = self.walk.missed()
            && !self.share.told_missed.swap(true, Ordering::Relaxed)
        {
            let (directories, errno) = (missed.directories, missed.errno);
            tracing::warn!(share = self.share.index, directories, %errno,
                "directories of a share could not be searched for what broken puts left");
        }
    }
}
