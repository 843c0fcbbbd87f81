//! Bytes and files that VMs may put into a share. Charged before a write, given back when it fails or a file goes.
//!
//! The measure is file lengths, not blocks: it does not depend on the file system. What was there at the start is counted
//! once, by a walk on a worker, file by file; who changes a file that the walk has not come to counts it first. Until it is
//! done a quota is not yet exact.

use super::Share;
use super::charge::{Inodes, Key, key_of, lock, size_of};
use super::walk::{ENTRIES_PER_TURN, Walk};
use rustix::fs::{AtFlags, DirEntry, FileType, statat};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// A share's quota and what is used of it.
#[derive(Debug)]
pub struct Quota {
    bytes_max: Option<u64>,
    files_max: Option<u64>,
    bytes: AtomicU64,
    files: AtomicU64,
    /// As long as what was there at the start is being counted.
    counted: Mutex<Option<Counted>>,
    /// Held while a name goes to another file, or to none.
    pub(super) names: Mutex<()>,
    /// Files that are open, or whose name is being changed.
    pub(super) inodes: Inodes,
}

/// What has been counted so far.
#[derive(Debug, Default)]
struct Counted {
    /// A bit for each file, 64 numbers a word: file systems give numbers close together.
    words: BTreeMap<Key, u64>,
    /// A directory was moved: the walk may have missed what is in it.
    again: bool,
}

/// Words of what has been counted: 64 files each at best, some 50 bytes of memory. Beyond, files that are changed meanwhile may be charged twice.
const COUNTED_WORDS_MAX: usize = 1 << 20;
/// Walks that the count takes at most, where somebody moves directories all the while.
const WALKS_MAX: u32 = 16;

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
            counted: Mutex::new(None),
            names: Mutex::new(()),
            inodes: Mutex::new(BTreeMap::new()),
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

    /// Charges what is there already, whatever the limits are.
    pub fn add(&self, bytes: u64, files: u64) {
        for (counter, amount) in [(&self.bytes, bytes), (&self.files, files)] {
            let _ = counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| {
                Some(now.saturating_add(amount))
            });
        }
    }

    /// A file of this length, that is there, is about to be changed: it is in the charge from here on.
    pub fn settle(&self, key: Key, bytes: u64) {
        let mut counted = lock(&self.counted);
        if counted
            .as_mut()
            .is_some_and(|counted| counted.insert(key) == Some(true))
        {
            self.add(bytes, 1);
        }
    }

    /// It is not there any more; another one may get its number.
    pub fn unsettle(&self, key: Key) {
        if let Some(counted) = lock(&self.counted).as_mut() {
            counted.remove(key);
        }
    }

    /// A file was made, and charged for by its maker.
    pub fn made(&self, key: Key) {
        let mut counted = lock(&self.counted);
        // The walk may have been faster.
        if counted
            .as_mut()
            .is_some_and(|counted| counted.insert(key) == Some(false))
        {
            self.give_back(0, 1);
        }
    }

    /// A directory has been moved.
    pub fn directory_moved(&self) {
        if let Some(counted) = lock(&self.counted).as_mut() {
            counted.again = true;
        }
    }

    fn count(&self, key: Key, bytes: u64) {
        let mut counted = lock(&self.counted);
        if counted
            .as_mut()
            .is_some_and(|counted| counted.insert(key) != Some(false))
        {
            self.add(bytes, 1);
        }
    }
}

impl Counted {
    /// Whether it was not there before; `None`: there is no room to know it.
    fn insert(&mut self, (device, number): Key) -> Option<bool> {
        let (word, bit) = ((device, number / 64), 1 << (number % 64));
        if self.words.len() >= COUNTED_WORDS_MAX && !self.words.contains_key(&word) {
            return None;
        }
        let word = self.words.entry(word).or_default();
        let is_new = *word & bit == 0;
        *word |= bit;
        Some(is_new)
    }

    fn remove(&mut self, (device, number): Key) {
        if let Some(word) = self.words.get_mut(&(device, number / 64)) {
            *word &= !(1 << (number % 64));
        }
    }
}

/// The count of what is beneath a share's root. Runs on workers, in turns.
pub(super) struct Count {
    share: Arc<Share>,
    walk: Walk,
    walks: u32,
}

impl Count {
    /// Begins: from here on changes are counted as well.
    pub fn new(share: Arc<Share>) -> Self {
        *lock(&share.quota.counted) = Some(Counted::default());
        Self {
            walk: Walk::new(share.root()),
            share,
            walks: 1,
        }
    }

    /// Goes on for a while; true: it is done.
    pub fn turn(&mut self) -> bool {
        for _ in 0..ENTRIES_PER_TURN {
            match self.walk.entry() {
                Some(entry) => {
                    // Gone meanwhile: who removed it knows what was charged for it.
                    let _ = self.count(&entry);
                }
                None => return self.is_done(),
            }
        }
        false
    }

    fn count(&mut self, entry: &DirEntry) -> Result<(), Errno> {
        match self.walk.kind(entry) {
            FileType::Directory => self.walk.enter(entry.file_name()),
            FileType::RegularFile => {
                let directory = self.walk.directory()?;
                // Who takes its name away in between would give its charge back before it is made.
                let _names = self.share.quota.lock_names();
                let stat = statat(directory, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW)?;
                if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile {
                    self.share.quota.count(key_of(&stat), size_of(&stat));
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Whether nothing was moved since; else it begins again.
    fn is_done(&mut self) -> bool {
        let mut counted = lock(&self.share.quota.counted);
        let again = counted
            .as_mut()
            .is_some_and(|counted| std::mem::take(&mut counted.again));
        if again && self.walks < WALKS_MAX {
            drop(counted);
            self.walks += 1;
            self.walk = Walk::new(self.share.root());
            return false;
        }
        *counted = None;
        if let Some(missed) = self.walk.missed() {
            let (directories, errno) = (missed.directories, missed.errno);
            tracing::warn!(share = self.share.index, directories, %errno,
                "directories of a share could not be counted for its quota");
        }
        true
    }
}

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
}
