//! What is in a file: checksums, lengths, durability; and an open file as the loop's reads and writes need it.
//!
//! Runs on workers. Must never know: names, guests.

use super::charge::Inode;
use super::refused;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use vmgmt_core::effect::{Effect, Outcome};

/// Bytes read at a time for a checksum: stays in the second-level cache, so that the crc reads what was just copied.
const CHECKSUM_PIECE_BYTES: usize = 256 * 1024;

/// An open file: the descriptor, and where its share is charged for it.
#[derive(Debug)]
pub struct OpenFile {
    /// `None`: no quota. Let go before the descriptor is, with which the file's number may become another's.
    inode: Option<Arc<Inode>>,
    fd: OwnedFd,
    share_index: usize,
    /// The file system refuses RWF_NOWAIT (or it is not known yet that it does).
    no_nowait: AtomicBool,
}

/// How a file's bytes can go straight into guest memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Piecewise {
    /// With RWF_NOWAIT: never sleeps on a disk.
    Nowait,
    /// Through scratch memory, on a worker.
    Scratch,
}

impl OpenFile {
    pub(super) const fn new(fd: OwnedFd, share_index: usize, inode: Option<Arc<Inode>>) -> Self {
        Self {
            inode,
            fd,
            share_index,
            no_nowait: AtomicBool::new(false),
        }
    }

    /// The descriptor.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub(super) const fn share_index(&self) -> usize {
        self.share_index
    }

    /// How reads may go.
    #[must_use]
    pub fn piecewise(&self) -> Piecewise {
        if self.no_nowait.load(Ordering::Relaxed) {
            Piecewise::Scratch
        } else {
            Piecewise::Nowait
        }
    }

    /// The file system refused RWF_NOWAIT and is not one in memory.
    pub fn set_no_nowait(&self) {
        self.no_nowait.store(true, Ordering::Relaxed);
    }

    /// Does something that may change the file's length, at most to `end` if it grows, and charges the share for what it came to.
    ///
    /// # Errors
    /// The outcome that names the quota; nothing is done then.
    pub fn resize<R>(&self, end: u64, change: impl FnOnce() -> R) -> Result<R, Outcome> {
        match &self.inode {
            Some(inode) => inode.resize(self.fd(), end, change),
            None => Ok(change()),
        }
    }

    /// Reads a range into private memory (which also puts it into the page cache); shorter only at the end of the file.
    ///
    /// # Errors
    /// The system's.
    pub fn read_into(&self, offset: u64, into: &mut [u8]) -> Result<usize, Errno> {
        let mut done = 0;
        while done < into.len() {
            match rustix::io::pread(&self.fd, &mut into[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(bytes) => done += bytes,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(done)
    }

    /// The crc32 of a range as the file holds it, and the bytes that were there of it.
    ///
    /// # Errors
    /// The system's.
    pub fn checksum(&self, mut offset: u64, mut bytes: u64) -> Result<(u64, u32), Errno> {
        let mut hasher = crc32fast::Hasher::new();
        let mut piece = vec![
            0;
            CHECKSUM_PIECE_BYTES
                .min(usize::try_from(bytes).unwrap_or(usize::MAX))
                .max(1)
        ];
        let mut total = 0;
        while bytes > 0 {
            let want = piece.len().min(usize::try_from(bytes).unwrap_or(usize::MAX));
            let got = self.read_into(offset, &mut piece[..want])?;
            hasher.update(&piece[..got]);
            total += got as u64;
            if got < want {
                break;
            }
            offset = offset.saturating_add(got as u64);
            bytes -= got as u64;
        }
        Ok((total, hasher.finalize()))
    }
}

/// Carries out an effect on an open file.
pub(super) fn run(file: &OpenFile, effect: &Effect) -> Outcome {
    let result = match *effect {
        Effect::Checksum { offset, bytes, .. } => file
            .checksum(offset, bytes)
            .map(|(bytes, crc32)| Outcome::Checksum { bytes, crc32 }),
        Effect::Truncate { bytes, .. } => {
            match file.resize(bytes, || rustix::fs::ftruncate(file.fd(), bytes)) {
                Ok(cut) => cut.map(|()| Outcome::Done),
                Err(outcome) => return outcome,
            }
        }
        Effect::Sync { .. } => rustix::fs::fsync(file.fd()).map(|()| Outcome::Done),
        _ => Err(Errno::OPNOTSUPP),
    };
    result.unwrap_or_else(refused)
}
