//! Guest memory of an in-process device: a sealed memfd, shared exactly as QEMU shares a VM's RAM.
//!
//! Comes in: sizes. Goes out: [`DmaMemory`] whose device addresses are `base` + offset in the memfd. The device side maps
//! [`MemfdMemory::descriptor`] at `base`. With `scattered` each allocation's pages are dealt out in an order in which no two
//! neighbours meet, to exercise buffer lists.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{MemfdFlags, SealFlags};

use crate::error::{DriverError, Result};
use crate::limits::PAGE_BYTES;
use crate::memory::{DmaMemory, round_up};

/// Guest memory in a memfd.
#[derive(Debug)]
pub struct MemfdMemory {
    file: OwnedFd,
    bytes: u64,
    base: u64,
    scattered: bool,
    free: Mutex<BTreeSet<u64>>,
}

impl MemfdMemory {
    /// Makes `bytes` (whole pages) of memory that the device finds at `base`.
    ///
    /// # Errors
    /// No memory, or the size is no whole number of pages.
    pub fn new(bytes: usize, base: u64, scattered: bool) -> Result<Arc<Self>> {
        let pages = bytes / PAGE_BYTES;
        if pages == 0 || !bytes.is_multiple_of(PAGE_BYTES) || base.checked_add(bytes as u64).is_none() {
            return Err(DriverError::BadArgument(format!(
                "{bytes} bytes at {base:#x} are no guest memory"
            )));
        }
        let system = |error| DriverError::system("making guest memory", std::io::Error::from(error));
        let file = rustix::fs::memfd_create("vmgmt-guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(system)?;
        rustix::fs::ftruncate(&file, bytes as u64).map_err(system)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(system)?;
        let free = Mutex::new((0..pages as u64).collect());
        Ok(Arc::new(Self {
            file,
            bytes: bytes as u64,
            base,
            scattered,
            free,
        }))
    }

    /// The memfd.
    #[must_use]
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Bytes of it.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.bytes
    }

    /// Never true.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Device address of its first byte.
    #[must_use]
    pub const fn base(&self) -> u64 {
        self.base
    }

    /// Pages that are not given out.
    #[must_use]
    pub fn free_pages(&self) -> usize {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Gives out memory; it comes back when the `DmaMemory` is dropped. One page is always one piece.
    ///
    /// # Errors
    /// Not enough is left (in one stretch, unless `scattered`).
    pub fn allocate(self: &Arc<Self>, bytes: usize) -> Result<DmaMemory> {
        let length = round_up(bytes, PAGE_BYTES)?;
        let pages = self.take(length / PAGE_BYTES)?;
        let page = PAGE_BYTES as u64;
        let stretches: Vec<(u64, usize, u64)> = pages
            .iter()
            .map(|number| (number * page, PAGE_BYTES, self.base + number * page))
            .collect();
        let inner = DmaMemory::map_file_pages(self.file.as_fd(), &stretches)?;
        let zeros = [0_u8; PAGE_BYTES];
        for start in (0..length).step_by(PAGE_BYTES) {
            inner.write(start, &zeros)?;
        }
        let owner = Arc::clone(self);
        Ok(inner.and_then_release(move || {
            owner
                .free
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .extend(pages);
        }))
    }

    fn take(&self, count: usize) -> Result<Vec<u64>> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let chosen: Vec<u64> = if self.scattered {
            // From the end, so that each page's address lies below that of the one before.
            free.iter().rev().take(count).copied().collect()
        } else {
            let mut run: Vec<u64> = Vec::new();
            for number in free.iter().copied() {
                if run.last().is_some_and(|last| last + 1 != number) {
                    run.clear();
                }
                run.push(number);
                if run.len() == count {
                    break;
                }
            }
            run
        };
        if chosen.len() < count {
            return Err(DriverError::SetUp(format!(
                "guest memory is used up: {count} pages are not free"
            )));
        }
        for number in &chosen {
            free.remove(number);
        }
        Ok(chosen)
    }
}
