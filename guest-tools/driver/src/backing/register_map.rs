//! BAR0 mapped into this process.
//!
//! Comes in: a file whose bytes are the BAR. Goes out: single aligned 32-bit accesses, never split, joined or repeated.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;

use vmgmt_abi::registers::BAR0_BYTES;

use crate::error::{DriverError, Result};
use crate::memory::{map, unmap};

/// A mapped BAR0.
#[derive(Debug)]
pub struct RegisterMap {
    pointer: NonNull<u8>,
}

// SAFETY: registers are made to be accessed by anyone at any time; each access is one volatile word.
unsafe impl Send for RegisterMap {}
// SAFETY: as above.
unsafe impl Sync for RegisterMap {}

impl RegisterMap {
    /// Maps BAR0 from `file` at `offset`.
    ///
    /// # Errors
    /// The file cannot be mapped (for sysfs: a locked-down kernel).
    pub fn new(file: BorrowedFd<'_>, offset: u64) -> Result<Self> {
        let offset = i64::try_from(offset)
            .map_err(|_| DriverError::contract("the kernel names an impossible offset of BAR0"))?;
        let pointer = map(None, BAR0_BYTES, libc::MAP_SHARED, file.as_raw_fd(), offset)
            .map_err(|error| DriverError::system("mapping BAR0", error))?;
        Ok(Self { pointer })
    }

    fn at(&self, offset: u32) -> Result<*mut u32> {
        let start = offset as usize;
        if !start.is_multiple_of(4) || start > BAR0_BYTES - 4 {
            return Err(DriverError::Bounds {
                start,
                length: 4,
                memory_bytes: BAR0_BYTES,
            });
        }
        // SAFETY: within the mapping of BAR0_BYTES, checked above.
        Ok(unsafe { self.pointer.as_ptr().add(start) }.cast())
    }

    /// Reads one register.
    ///
    /// # Errors
    /// Beyond the BAR, or not aligned.
    pub fn read32(&self, offset: u32) -> Result<u32> {
        let pointer = self.at(offset)?;
        // SAFETY: mapped and aligned.
        Ok(u32::from_le(unsafe { pointer.read_volatile() }))
    }

    /// Writes one register.
    ///
    /// # Errors
    /// Beyond the BAR, or not aligned.
    pub fn write32(&self, offset: u32, value: u32) -> Result<()> {
        let pointer = self.at(offset)?;
        // SAFETY: mapped and aligned.
        unsafe { pointer.write_volatile(value.to_le()) };
        Ok(())
    }
}

impl Drop for RegisterMap {
    fn drop(&mut self) {
        unmap(self.pointer.as_ptr() as usize, BAR0_BYTES);
    }
}
