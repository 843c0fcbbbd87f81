//! Huge pages of the host, borrowed for one test.
//!
//! In: how many are needed. Out: a guard while they are there, or the reason why they are not; with the guard they go back. It must never take any
//! away that somebody else has reserved.

use rustix::fs::{FlockOperation, flock};
use std::fs::{File, OpenOptions};

const RESERVED: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
const FREE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";

/// Huge pages of 2 MiB that are free, for one test at a time.
pub struct HugePages {
    before: u64,
    _turn: File,
}

impl HugePages {
    /// Waits for its turn and has `count` pages reserved beside those that are in use.
    ///
    /// # Errors
    /// Why there are none: for a person, as the reason of a skipped test.
    pub fn borrow(count: u64) -> Result<Self, String> {
        let unable = |what: &str, error: std::io::Error| format!("{what}: {error}");
        let path = std::env::temp_dir().join("vmgmt-huge-pages.lock");
        let turn = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|error| unable(&path.display().to_string(), error))?;
        flock(&turn, FlockOperation::LockExclusive).map_err(|errno| unable("flock", errno.into()))?;
        let before = read(RESERVED)?;
        let pages = Self { before, _turn: turn };
        let missing = count.saturating_sub(read(FREE)?);
        if missing > 0 {
            std::fs::write(RESERVED, (before + missing).to_string())
                .map_err(|error| unable(RESERVED, error))?;
        }
        // The kernel gives as many as it can, without an error.
        match read(FREE)? {
            free if free >= count => Ok(pages),
            free => Err(format!("{free} free huge pages of 2 MiB, {count} are needed")),
        }
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        // Nobody is there to hear that they stay reserved.
        let _unheard = std::fs::write(RESERVED, self.before.to_string());
    }
}

fn read(path: &str) -> Result<u64, String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))?;
    text.trim()
        .parse()
        .map_err(|_| format!("{path} says {:?}", text.trim()))
}
