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

/// Locks a mapping into memory and keeps the kernel from putting other pages under it: from here on its physical addresses can be looked up.
pub fn lock(pages: &Pages) -> Result<()> {
    let (start, length) = (pages.pointer.as_ptr().cast::<libc::c_void>(), pages.length);
    // SAFETY: a range of our own; no memory is changed.
    if unsafe { libc::mlock(start, length) } != 0 {
        let error = std::io::Error::last_os_error();
        return Err(DriverError::SetUp(format!(
            "locking {length} bytes of memory: {error}; run as root or raise the limit (ulimit -l)"
        )));
    }
    // A lock is no pin. khugepaged would copy small pages into a new huge one (a huge page that is there already stays); after a fork the
    // next write would go to a copy; NUMA balancing would move pages to who uses them, but for memory with a policy of its own. A kernel that
    // refuses one of these does not do that either.
    // SAFETY: advice about, and the policy of, a range of our own; no memory is changed.
    unsafe {
        libc::madvise(start, length, libc::MADV_NOHUGEPAGE);
        libc::madvise(start, length, libc::MADV_DONTFORK);
        libc::syscall(
            libc::SYS_mbind,
            start,
            length,
            libc::MPOL_LOCAL,
            0_usize,
            0_usize,
            0_usize,
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel says of the mapping at an address: a line of /proc/self/smaps that begins with `name`.
    fn smaps(address: usize, name: &str) -> String {
        let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut inside = false;
        for line in text.lines() {
            let range = line.split_once(' ').and_then(|(range, _)| range.split_once('-'));
            let ends = range.and_then(|(start, end)| {
                Some((
                    usize::from_str_radix(start, 16).ok()?,
                    usize::from_str_radix(end, 16).ok()?,
                ))
            });
            if let Some((start, end)) = ends {
                inside = (start..end).contains(&address);
            } else if inside && let Some(rest) = line.strip_prefix(name) {
                return rest.to_owned();
            }
        }
        panic!("nothing is mapped at {address:#x}");
    }

    #[test]
    fn locked_memory_keeps_its_pages() {
        for bytes in [PAGE_BYTES, HUGE_PAGE_BYTES] {
            let pages = take(bytes).unwrap();
            lock(&pages).unwrap();
            let flags = smaps(pages.pointer.as_ptr() as usize, "VmFlags:");
            let has = |wanted| flags.split_whitespace().any(|flag| flag == wanted);
            assert!(has("lo") && has("dc"), "{flags}");
            // Reserved huge pages ("ht") are none of khugepaged's; a kernel without transparent ones has no khugepaged.
            let thp = std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists();
            assert!(has("nh") || has("ht") || !thp, "{bytes} bytes: {flags}");
            unmap(pages.pointer.as_ptr() as usize, pages.length);
        }
    }
}
