//! Anonymous memory as large pages as the machine gives: reserved huge pages, transparent ones, small ones.
//!
//! Comes in: a length. Goes out: a zeroed, page-aligned, resident mapping. Fewer and larger pages mean fewer DMA maps
//! (each 4 KiB page is one more through a virtual IOMMU) and shorter buffer lists.

use std::ptr::NonNull;

use crate::error::{DriverError, Result};
use crate::limits::{HUGE_PAGE_BYTES, PAGE_BYTES};
use crate::memory::{map, round_up, unmap};

/// An anonymous mapping, not yet owned by a `DmaMemory`.
pub struct Pages {
    pub pointer: NonNull<u8>,
    pub length: usize,
}

/// Maps memory; from half a huge page up in huge pages where there are any.
pub fn take(bytes: usize) -> Result<Pages> {
    let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    if bytes >= HUGE_PAGE_BYTES / 2 {
        let length = round_up(bytes, HUGE_PAGE_BYTES)?;
        if let Ok(pointer) = map(
            None,
            length,
            anonymous | libc::MAP_HUGETLB | libc::MAP_POPULATE,
            -1,
            0,
        ) {
            return Ok(Pages { pointer, length });
        }
        return transparent(length);
    }
    let length = round_up(bytes, PAGE_BYTES)?;
    let pointer = map(None, length, anonymous | libc::MAP_POPULATE, -1, 0)
        .map_err(|error| DriverError::system(format!("mapping {length} bytes"), error))?;
    Ok(Pages { pointer, length })
}

/// A mapping aligned to huge pages that asks for transparent ones.
fn transparent(length: usize) -> Result<Pages> {
    let failed = |error| DriverError::system(format!("mapping {length} bytes"), error);
    let reserved = length
        .checked_add(HUGE_PAGE_BYTES)
        .ok_or_else(|| DriverError::BadArgument("too many bytes".into()))?;
    let whole = map(None, reserved, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0).map_err(failed)?;
    let address = whole.as_ptr() as usize;
    let skip = address.next_multiple_of(HUGE_PAGE_BYTES) - address;
    if skip > 0 {
        unmap(address, skip);
    }
    unmap(address + skip + length, reserved - skip - length);
    // SAFETY: skip < reserved, so this is within the mapping, of which exactly `length` bytes are left here.
    let pointer = unsafe { whole.add(skip) };
    // SAFETY: advice about, and population of, a mapping that is ours alone. Refusal of the advice changes nothing.
    let populated = unsafe {
        libc::madvise(pointer.as_ptr().cast(), length, libc::MADV_HUGEPAGE);
        libc::madvise(pointer.as_ptr().cast(), length, libc::MADV_POPULATE_WRITE)
    };
    if populated != 0 {
        // A kernel before 5.14: touch each page.
        for start in (0..length).step_by(PAGE_BYTES) {
            // SAFETY: within the mapping.
            unsafe { pointer.as_ptr().add(start).write_volatile(0) };
        }
    }
    Ok(Pages { pointer, length })
}

/// Locks a mapping into memory.
pub fn lock(pages: &Pages) -> Result<()> {
    // SAFETY: a range of our own; no memory is changed.
    if unsafe { libc::mlock(pages.pointer.as_ptr().cast(), pages.length) } != 0 {
        let error = std::io::Error::last_os_error();
        return Err(DriverError::SetUp(format!(
            "locking {} bytes of memory: {error}; run as root or raise the limit (ulimit -l)",
            pages.length
        )));
    }
    Ok(())
}
