//! Guest RAM for tests: a memfd, as QEMU's `memory-backend-memfd` is.
//!
//! In: offsets and bytes. Out: bytes. Must never know: DMA addresses.
//!
//! Bulk goes through `pread`/`pwrite` of the memfd, which sees the same pages as every mapping of it; single
//! words go through a mapping of our own, since a word that the other side may write at this moment must be
//! loaded whole. No Rust reference to the memory is ever made but to one atomic word at a time.

#![allow(unsafe_code)] // tests only: atomic words in a mapping, see `word_u32` and `word_u64`

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};

use super::ClientError;

/// Whether the memory can be made smaller later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seal {
    /// Sealed against shrinking, as QEMU seals its memfd by default.
    Shrink,
    /// Not sealed: [`GuestRam::truncate`] works, and a server must survive it.
    None,
}

/// A piece of guest memory.
pub struct GuestRam {
    memfd: OwnedFd,
    mapping: memmap2::MmapRaw,
}

impl GuestRam {
    /// `bytes` of zeros; a multiple of 4096.
    pub fn new(bytes: u64, seal: Seal) -> Result<Self, ClientError> {
        let memfd = rustix::fs::memfd_create("guest-ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&memfd, bytes)?;
        if seal == Seal::Shrink {
            rustix::fs::fcntl_add_seals(&memfd, SealFlags::SHRINK | SealFlags::GROW)?;
        }
        let mapping = memmap2::MmapOptions::new().map_raw(&memfd)?;
        Ok(Self { memfd, mapping })
    }

    /// The descriptor to send with DMA_MAP.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.memfd.as_fd()
    }

    /// Bytes it was made with.
    pub fn bytes(&self) -> u64 {
        self.mapping.len() as u64
    }

    /// Bytes at an offset.
    pub fn read(&self, offset: u64, bytes: usize) -> Result<Vec<u8>, ClientError> {
        let mut data = vec![0; bytes];
        let mut done = 0;
        while done < bytes {
            let count = rustix::io::pread(&self.memfd, &mut data[done..], offset + done as u64)?;
            if count == 0 {
                return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
            }
            done += count;
        }
        Ok(data)
    }

    /// Puts bytes at an offset.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), ClientError> {
        if offset
            .checked_add(data.len() as u64)
            .is_none_or(|end| end > self.bytes())
        {
            return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
        }
        let mut done = 0;
        while done < data.len() {
            done += rustix::io::pwrite(&self.memfd, &data[done..], offset + done as u64)?;
        }
        Ok(())
    }

    /// A 32-bit word, aligned. Panics outside the memory.
    pub fn load_u32(&self, offset: u64) -> u32 {
        u32::from_le(self.word_u32(offset).load(Ordering::SeqCst))
    }

    /// Stores a 32-bit word, aligned. Panics outside the memory.
    pub fn store_u32(&self, offset: u64, value: u32) {
        self.word_u32(offset).store(value.to_le(), Ordering::SeqCst);
    }

    /// A 64-bit word, aligned. Panics outside the memory.
    pub fn load_u64(&self, offset: u64) -> u64 {
        u64::from_le(self.word_u64(offset).load(Ordering::SeqCst))
    }

    /// Stores a 64-bit word, aligned. Panics outside the memory.
    pub fn store_u64(&self, offset: u64, value: u64) {
        self.word_u64(offset).store(value.to_le(), Ordering::SeqCst);
    }

    /// Makes the memory smaller under the server's feet. Needs `Seal::None`. Words beyond must not be
    /// touched afterwards (SIGBUS), reads and writes of bytes beyond fail.
    pub fn truncate(&self, bytes: u64) -> Result<(), ClientError> {
        Ok(rustix::fs::ftruncate(&self.memfd, bytes)?)
    }

    /// Punches a hole: the pages read as zeros.
    pub fn punch(&self, offset: u64, bytes: u64) -> Result<(), ClientError> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(&self.memfd, flags, offset, bytes)?)
    }

    fn word(&self, offset: u64, bytes: u64) -> *mut u8 {
        assert!(
            offset.is_multiple_of(bytes),
            "a word at {offset:#x} is not aligned"
        );
        let end = offset.checked_add(bytes);
        assert!(
            end.is_some_and(|end| end <= self.bytes()),
            "a word at {offset:#x} is outside"
        );
        self.mapping.as_mut_ptr().wrapping_add(offset as usize)
    }

    fn word_u32(&self, offset: u64) -> &AtomicU32 {
        // SAFETY: inside the mapping and aligned (checked by `word`; the mapping is page-aligned), mapped as
        // long as `self` lives, and only ever touched atomically here; the other process cannot break an atomic.
        unsafe { AtomicU32::from_ptr(self.word(offset, 4).cast()) }
    }

    fn word_u64(&self, offset: u64) -> &AtomicU64 {
        // SAFETY: as in `word_u32`.
        unsafe { AtomicU64::from_ptr(self.word(offset, 8).cast()) }
    }
}
