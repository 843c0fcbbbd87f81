//! What a file is charged to its share's quota: its length as the file system has it, never as a handle believes.
//!
//! In: changes of a file's length, names that go. Out: the quota's charge, by the difference that each made. Under one lock for each file
//! (and one for a share's names), so that nobody else changes what is being measured. A file without a name is charged until the last who has it
//! open lets it go. Must never know: paths, guests.

use super::quota::Quota;
use super::{over_quota, refused};
use rustix::fd::BorrowedFd;
use rustix::fs::{AtFlags, FileType, Stat, fstat, statat};
use rustix::io::Errno;
use rustix::path::Arg;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use vmgmt_core::effect::Outcome;

/// Device and number.
pub type Key = (u64, u64);

/// Which file it is.
pub const fn key_of(stat: &Stat) -> Key {
    (stat.st_dev, stat.st_ino)
}

/// Its length.
pub fn size_of(stat: &Stat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or(0)
}

/// A file of a share with a quota, as long as it is open or something is done to its name: one for all who have it.
#[derive(Debug)]
pub struct Inode {
    quota: Arc<Quota>,
    key: Key,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// It has no name any more: its charge goes with the last who has it.
    gone: bool,
    /// That charge.
    bytes: u64,
}

/// Those of a share.
pub type Inodes = Mutex<BTreeMap<Key, Weak<Inode>>>;

impl Inode {
    /// Does something that may change the file's length, at most to `end` if it grows; charged is what it came to.
    ///
    /// # Errors
    /// The outcome that names the quota; nothing is done then.
    pub fn resize<R>(&self, fd: BorrowedFd<'_>, end: u64, change: impl FnOnce() -> R) -> Result<R, Outcome> {
        let mut state = lock(&self.state);
        let before = size_of(&fstat(fd).map_err(refused)?);
        if !state.gone {
            self.quota.settle(self.key, before);
        }
        let most = before.max(end);
        self.quota.charge(most - before, 0).map_err(over_quota)?;
        let result = change();
        let after = fstat(fd).map_or(most, |stat| size_of(&stat));
        self.quota.give_back(most.saturating_sub(after), 0);
        self.quota.add(after.saturating_sub(most), 0);
        state.bytes = after;
        Ok(result)
    }
}

impl Drop for Inode {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if state.gone {
            self.quota.give_back(state.bytes, 1);
        }
        let mut inodes = lock(&self.quota.inodes);
        if inodes
            .get(&self.key)
            .is_some_and(|inode| inode.strong_count() == 0)
        {
            inodes.remove(&self.key);
        }
    }
}

impl Quota {
    /// The file of a descriptor; `None`: there is no quota.
    ///
    /// # Errors
    /// The system's.
    pub fn opened(self: &Arc<Self>, fd: BorrowedFd<'_>) -> Result<Option<Arc<Inode>>, Errno> {
        if !self.is_limited() {
            return Ok(None);
        }
        let key = key_of(&fstat(fd)?);
        loop {
            let inode = self.inode(key);
            let mut state = lock(&inode.state);
            let stat = fstat(fd)?;
            match (state.gone, stat.st_nlink == 0) {
                // Its name went after it was opened, and with that its charge.
                (false, true) => {
                    self.add(size_of(&stat), 1);
                    (state.gone, state.bytes) = (true, size_of(&stat));
                }
                // The number is another file's now.
                (true, false) => {
                    drop(state);
                    self.forget(&inode);
                    continue;
                }
                (true, true) | (false, false) => {}
            }
            drop(state);
            return Ok(Some(inode));
        }
    }

    /// Does something after which, if it succeeds, a name leads no more to what it does now (but where that is `unless`). Under the lock for names.
    ///
    /// # Errors
    /// As `change`.
    pub fn lose_name<R>(
        self: &Arc<Self>,
        directory: BorrowedFd<'_>,
        name: impl Arg + Copy,
        unless: Option<Key>,
        change: impl FnOnce() -> Result<R, Errno>,
    ) -> Result<R, Errno> {
        let look = || {
            statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)
                .ok()
                .filter(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile)
                .filter(|stat| stat.st_nlink == 1 && Some(key_of(stat)) != unless)
        };
        let Some(key) = look().map(|stat| key_of(&stat)) else {
            return change();
        };
        let mut inode = self.inode(key);
        while lock(&inode.state).gone {
            // The number of a file that has a name is not that one's any more.
            self.forget(&inode);
            inode = self.inode(key);
        }
        let mut state = lock(&inode.state);
        // As long as it is now that nobody changes it.
        let Some(stat) = look().filter(|stat| key_of(stat) == key) else {
            return change();
        };
        self.settle(key, size_of(&stat));
        let changed = change()?;
        self.unsettle(key);
        (state.gone, state.bytes) = (true, size_of(&stat));
        Ok(changed)
    }

    /// For what changes which file a name leads to; nothing where there is no quota.
    pub fn lock_names(&self) -> Option<MutexGuard<'_, ()>> {
        self.is_limited().then(|| lock(&self.names))
    }

    fn inode(self: &Arc<Self>, key: Key) -> Arc<Inode> {
        let mut inodes = lock(&self.inodes);
        if let Some(inode) = inodes.get(&key).and_then(Weak::upgrade) {
            return inode;
        }
        let inode = Arc::new(Inode {
            quota: Arc::clone(self),
            key,
            state: Mutex::default(),
        });
        inodes.insert(key, Arc::downgrade(&inode));
        inode
    }

    /// Whoever has it keeps it; nobody finds it any more.
    fn forget(&self, inode: &Arc<Inode>) {
        let mut inodes = lock(&self.inodes);
        if inodes
            .get(&inode.key)
            .is_some_and(|found| std::ptr::eq(found.as_ptr(), Arc::as_ptr(inode)))
        {
            inodes.remove(&inode.key);
        }
    }
}

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A worker that panics under it ends the process.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
