//! A walk through all directories of a share, with as much memory as it likes, whatever tree a guest has made.
//!
//! In: a root. Out: its entries, and those of the directories that the caller enters; what could not be looked at. It holds open the directories
//! from the root to where it is, at most [`DEPTH_MAX`], and nothing for their neighbours. Must never know what is looked for.

use super::resolve;
use rustix::fd::BorrowedFd;
use rustix::fs::{AtFlags, Dir, DirEntry, FileType, statat};
use rustix::io::Errno;
use std::ffi::CStr;

/// Directories below one another: a descriptor and at most 24 KiB each. People do not go so deep; who does so to hide something, hides it from
/// the sweep and from the count only, and pays for it while it is made.
pub const DEPTH_MAX: usize = 128;
/// Entries that a walk on a worker looks at in one turn: some milliseconds.
pub const ENTRIES_PER_TURN: usize = 1024;

/// A walk, somewhere on its way.
#[derive(Debug)]
pub struct Walk {
    levels: Vec<Level>,
    /// The innermost level's directory, beneath the root; empty or with a slash at its end.
    path: Vec<u8>,
    missed: Option<Missed>,
}

#[derive(Debug)]
struct Level {
    entries: Dir,
    /// Bytes of the path that are this directory's.
    path_bytes: usize,
}

/// Directories that could not be looked at, or not to their end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Missed {
    pub directories: u64,
    /// Why the first of them could not.
    pub errno: Errno,
}

impl Walk {
    pub fn new(root: BorrowedFd<'_>) -> Self {
        let mut walk = Self {
            levels: Vec::new(),
            path: Vec::new(),
            missed: None,
        };
        match resolve::directory_to_read(root, "").and_then(Dir::new) {
            Ok(entries) => walk.levels.push(Level {
                entries,
                path_bytes: 0,
            }),
            Err(errno) => walk.miss(errno),
        }
        walk
    }

    /// The next entry of the innermost directory; where it has no more, of the one above. `None`: that was all.
    pub fn entry(&mut self) -> Option<DirEntry> {
        loop {
            let level = self.levels.last_mut()?;
            self.path.truncate(level.path_bytes);
            match level.entries.next() {
                Some(Ok(entry)) if entry.file_name() == c"." || entry.file_name() == c".." => {}
                Some(Ok(entry)) => return Some(entry),
                Some(Err(errno)) => {
                    self.miss(errno);
                    self.levels.pop();
                }
                None => {
                    self.levels.pop();
                }
            }
        }
    }

    /// Where the last entry is.
    ///
    /// # Errors
    /// The system's.
    pub fn directory(&self) -> Result<BorrowedFd<'_>, Errno> {
        self.levels.last().ok_or(Errno::NOENT)?.entries.fd()
    }

    /// What kind of thing the last entry is.
    pub fn kind(&self, entry: &DirEntry) -> FileType {
        match entry.file_type() {
            // The file system does not say it in its listing.
            FileType::Unknown => self
                .directory()
                .and_then(|directory| statat(directory, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW))
                .map_or(FileType::Unknown, |stat| FileType::from_raw_mode(stat.st_mode)),
            kind => kind,
        }
    }

    /// The path of the last entry beneath the root.
    pub fn path_of(&self, name: &CStr) -> Vec<u8> {
        [&self.path, name.to_bytes()].concat()
    }

    /// Goes on with the entries of a directory that was the last entry.
    pub fn enter(&mut self, name: &CStr) {
        if self.levels.len() >= DEPTH_MAX {
            return self.miss(Errno::NAMETOOLONG);
        }
        let opened = self
            .directory()
            .and_then(|directory| resolve::directory_below(directory, name))
            .and_then(Dir::new);
        match opened {
            Ok(entries) => {
                self.path.extend_from_slice(name.to_bytes());
                self.path.push(b'/');
                self.levels.push(Level {
                    entries,
                    path_bytes: self.path.len(),
                });
            }
            // It has gone meanwhile, or something else has its name.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
            Err(errno) => self.miss(errno),
        }
    }

    /// What could not be looked at so far.
    pub const fn missed(&self) -> Option<Missed> {
        self.missed
    }

    fn miss(&mut self, errno: Errno) {
        self.missed
            .get_or_insert(Missed {
                directories: 0,
                errno,
            })
            .directories += 1;
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use rustix::fd::{AsFd, OwnedFd};
    use rustix::fs::{Mode, OFlags, mkdirat, openat, renameat, unlinkat};

    /// Makes directories below one another, more than any path can name; the innermost.
    pub fn make_deep(root: BorrowedFd<'_>, depth: usize) -> OwnedFd {
        let open = |at: BorrowedFd<'_>, name: &str| {
            openat(at, name, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap()
        };
        let mut at = open(root, ".");
        for _ in 0..depth {
            mkdirat(&at, "d", Mode::from_raw_mode(0o755)).unwrap();
            at = open(at.as_fd(), "d");
        }
        at
    }

    /// Takes them away again, which a test's temporary directory could not.
    pub fn remove_deep(root: BorrowedFd<'_>) {
        while renameat(root, "d/d", root, "below").is_ok() {
            unlinkat(root, "d", AtFlags::REMOVEDIR).unwrap();
            renameat(root, "below", root, "d").unwrap();
        }
    }

    fn walk_all(root: BorrowedFd<'_>) -> (usize, usize, Option<Missed>) {
        let mut walk = Walk::new(root);
        let (mut seen, mut open_max) = (0, 0);
        while let Some(entry) = walk.entry() {
            seen += 1;
            if walk.kind(&entry) == FileType::Directory {
                walk.enter(entry.file_name());
            }
            open_max = open_max.max(walk.levels.len());
        }
        (seen, open_max, walk.missed())
    }

    #[test]
    fn a_wide_tree_takes_no_more_than_a_narrow_one() {
        let directory = tempfile::tempdir().unwrap();
        for number in 0..3000 {
            std::fs::create_dir(directory.path().join(number.to_string())).unwrap();
        }
        let root = std::fs::File::open(directory.path()).unwrap();
        assert_eq!(walk_all(root.as_fd()), (3000, 2, None));
    }

    #[test]
    fn a_deep_tree_is_walked_as_far_as_it_may_and_what_is_beside_it_wholly() {
        let directory = tempfile::tempdir().unwrap();
        let root = std::fs::File::open(directory.path()).unwrap();
        make_deep(root.as_fd(), 3000);
        for number in 0..10 {
            std::fs::create_dir_all(directory.path().join(format!("beside-{number}/below"))).unwrap();
        }
        let missed = Missed {
            directories: 1,
            errno: Errno::NAMETOOLONG,
        };
        let walked = walk_all(root.as_fd());
        remove_deep(root.as_fd());
        assert_eq!(walked, (DEPTH_MAX + 20, DEPTH_MAX, Some(missed)));
    }
}
