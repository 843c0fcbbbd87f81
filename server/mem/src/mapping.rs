//! MEM, guest memory: a mapped range of a memory object that a VM's process owns.
//!
//! In: a descriptor and a range of it. Out: copies, and single words in order. Knows no guest address, no right but "writable", and nothing of who uses it.
//!
//! Two ways in, chosen once when it is mapped: *direct*, by instructions, where the owner cannot shrink the object (it is sealed, and
//! is not huge-page memory, which can be punched while the pool is empty); else *through the kernel*, whose copies answer EFAULT where
//! an instruction would raise SIGBUS. There `process_vm_readv` on our own process is used with guest memory as the *local* side
//! wherever it is written: the local side is not pinned, so a copy in flight ends when the range is replaced.

use crate::calls::{GuestSlice, kernel_copy};
use crate::{MapError, copy, order};
use memmap2::{MmapOptions, MmapRaw};
use rustix::fd::AsFd;
use rustix::fs::{SealFlags, fcntl_get_seals, fstat, fstatfs};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, AtomicU64, fence};

/// `f_type` of hugetlbfs, also of memory made with MFD_HUGETLB (linux/magic.h).
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// Why an access to mapped guest memory failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Fault {
    /// It does not lie within the mapping, or would write a read-only one.
    #[error("the access is outside the mapping or against its rights")]
    Refused,
    /// The memory behind it is gone: shrunk, or punched without a page to replace it.
    #[error("the memory behind the mapping is gone")]
    Gone,
}

/// Which side of a copy failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CopyFault {
    #[error("source: {0}")]
    Source(Fault),
    #[error("target: {0}")]
    Target(Fault),
}

/// A mapped range of a memory object. Address space is given back when it is dropped.
#[derive(Debug)]
pub struct GuestMapping {
    /// Owns the address space.
    _raw: MmapRaw,
    pub(crate) base: *mut u8,
    bytes: usize,
    pub(crate) writable: bool,
    pub(crate) direct: bool,
}

// SAFETY: the address space belongs to this value alone, and every access to it is atomic, opaque to the compiler or the kernel's.
unsafe impl Send for GuestMapping {}
// SAFETY: as above; no method needs exclusive access.
unsafe impl Sync for GuestMapping {}

/// The accesses of a word of one width.
macro_rules! word_access {
    ($load:ident, $store:ident, $word:ty, $atomic:ty) => {
        /// Loads a word (little-endian) with acquire order; not torn if its address is aligned and the mapping is direct.
        ///
        /// # Errors
        /// See [`Fault`].
        #[inline]
        pub fn $load(&self, offset: usize) -> Result<$word, Fault> {
            let address = self.address(offset, size_of::<$word>())?.cast::<$word>();
            if self.direct && address.is_aligned() {
                // SAFETY: mapped, aligned, cannot shrink; the reference to the atomic ends with this expression.
                return Ok(<$word>::from_le(
                    unsafe { <$atomic>::from_ptr(address) }.load(order::LOAD),
                ));
            }
            let mut bytes = [0; size_of::<$word>()];
            self.read(offset, &mut bytes)
                .map(|()| <$word>::from_le_bytes(bytes))
        }

        /// Stores a word (little-endian) with release order; not torn if its address is aligned and the mapping is direct.
        ///
        /// # Errors
        /// See [`Fault`].
        #[inline]
        pub fn $store(&self, offset: usize, value: $word) -> Result<(), Fault> {
            let address = self
                .writable_address(offset, size_of::<$word>())?
                .cast::<$word>();
            if !self.direct || !address.is_aligned() {
                return self.write(offset, &value.to_le_bytes());
            }
            // SAFETY: mapped writable, aligned, cannot shrink; the reference to the atomic ends with this expression.
            unsafe { <$atomic>::from_ptr(address) }.store(value.to_le(), order::STORE);
            Ok(())
        }
    };
}

impl GuestMapping {
    /// Maps `bytes` bytes of `fd` from `offset` on, shared, never for execution, left out of core dumps and of children.
    ///
    /// `offset` must be a multiple of the object's page size (huge pages: of that size).
    ///
    /// # Errors
    /// TooSmall when the object ends earlier; else the system's.
    pub fn map(fd: impl AsFd, offset: u64, bytes: usize, writable: bool) -> Result<Self, MapError> {
        let fd = fd.as_fd();
        let needed_bytes = offset.saturating_add(bytes as u64);
        let object_bytes = u64::try_from(fstat(fd)?.st_size).unwrap_or(0);
        if bytes == 0 || object_bytes < needed_bytes {
            return Err(MapError::TooSmall {
                object_bytes,
                needed_bytes: needed_bytes.max(1),
            });
        }
        // The size was read before the seals: if it is sealed now and the size is still enough, it stays so.
        let sealed = fcntl_get_seals(fd).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
        let direct = sealed
            && u64::try_from(fstat(fd)?.st_size).unwrap_or(0) >= needed_bytes
            && fstatfs(fd)?.f_type != HUGETLBFS_MAGIC;
        let mut options = MmapOptions::new();
        // No swap reserved: huge pages are not to be reserved for ranges that nobody uses.
        options.offset(offset).len(bytes).no_reserve_swap();
        let mapped = if writable {
            options.map_raw(fd.as_raw_fd())
        } else {
            options.map_raw_read_only(fd.as_raw_fd())
        };
        let raw = mapped.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        let base = raw.as_mut_ptr();
        for advice in [Advice::LinuxDontDump, Advice::LinuxDontFork] {
            // SAFETY: our own fresh range; neither advice changes what the memory holds. (A wish: errors change nothing here.)
            let _ = unsafe { madvise(base.cast(), bytes, advice) };
        }
        Ok(Self {
            _raw: raw,
            base,
            bytes,
            writable,
            direct,
        })
    }

    /// Bytes that are mapped.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether it is reached by instructions of ours (else through the kernel).
    #[must_use]
    pub const fn is_direct(&self) -> bool {
        self.direct
    }

    /// Whether it may be written.
    #[must_use]
    pub const fn is_writable(&self) -> bool {
        self.writable
    }

    /// A part of it, checked once.
    ///
    /// # Errors
    /// Refused when it does not lie within the mapping.
    pub fn slice(&self, offset: usize, bytes: usize) -> Result<GuestSlice<'_>, Fault> {
        self.address(offset, bytes)?;
        Ok(GuestSlice {
            mapping: self,
            offset,
            bytes,
        })
    }

    /// Copies out; after it an acquire fence.
    ///
    /// # Errors
    /// See [`Fault`]; nothing of `into` means anything then.
    #[inline]
    pub fn read(&self, offset: usize, into: &mut [u8]) -> Result<(), Fault> {
        let source = self.address(offset, into.len())?;
        if !self.direct {
            return kernel_copy(into.as_mut_ptr(), source, into.len()).map_err(|_| Fault::Gone);
        }
        // SAFETY: `source` is mapped for its whole length and cannot shrink; `into` is private.
        unsafe { copy::copy(into.as_mut_ptr(), source, into.len()) };
        fence(order::AFTER_READ);
        Ok(())
    }

    /// Copies in; before it a release fence.
    ///
    /// # Errors
    /// See [`Fault`]; some of it may have been written.
    #[inline]
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<(), Fault> {
        let target = self.writable_address(offset, from.len())?;
        if !self.direct {
            return kernel_copy(target, from.as_ptr(), from.len()).map_err(|_| Fault::Gone);
        }
        fence(order::BEFORE_WRITE);
        // SAFETY: `target` is mapped writable for its whole length and cannot shrink; `from` is private.
        unsafe { copy::copy(target, from.as_ptr(), from.len()) };
        Ok(())
    }

    word_access!(load_u32, store_u32, u32, AtomicU32);
    word_access!(load_u64, store_u64, u64, AtomicU64);

    /// Puts private zeroed memory over a part, for good: what is still being copied there ends in that memory. Other users of the
    /// mapping go on, and read zeros there.
    ///
    /// Both ends must be multiples of the object's page size, or the mapping's own end.
    ///
    /// # Errors
    /// The system's (also for huge-page memory and an end within a huge page); the mapping is as before then.
    pub fn replace_with_anonymous(&self, offset: usize, bytes: usize) -> Result<(), MapError> {
        let address = self.address(offset, bytes).map_err(|_| Errno::INVAL)?;
        let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
        // SAFETY: the range lies within our own mapping (the kernel refuses an address that is not at a page; rounding up
        // the end stays within the mapping's last page); all accesses to it may race with its contents, by construction.
        unsafe { mmap_anonymous(address.cast(), bytes, ProtFlags::READ | ProtFlags::WRITE, flags)? };
        Ok(())
    }

    #[inline]
    pub(crate) const fn address(&self, offset: usize, bytes: usize) -> Result<*mut u8, Fault> {
        match offset.checked_add(bytes) {
            Some(end) if end <= self.bytes => Ok(self.base.wrapping_add(offset)),
            _ => Err(Fault::Refused),
        }
    }

    #[inline]
    pub(crate) const fn writable_address(&self, offset: usize, bytes: usize) -> Result<*mut u8, Fault> {
        if self.writable {
            self.address(offset, bytes)
        } else {
            Err(Fault::Refused)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{copy_guest, read_file, write_file};
    use rustix::fd::OwnedFd;
    use rustix::fs::{MemfdFlags, fcntl_add_seals, ftruncate, memfd_create};

    fn object(bytes: u64, sealed: bool) -> OwnedFd {
        let fd = memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&fd, bytes).unwrap();
        if sealed {
            fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
        }
        fd
    }

    #[test]
    fn every_length_and_alignment_is_copied_and_nothing_beside_it() {
        for sealed in [true, false] {
            let fd = object(16384, sealed);
            let mapping = GuestMapping::map(&fd, 0, 16384, true).unwrap();
            assert_eq!(mapping.is_direct(), sealed);
            for offset in 0..9 {
                for bytes in (0..40).chain(120..140).chain([255, 4095, 4096, 5000]) {
                    let from: Vec<u8> = (0..bytes).map(|n| (n % 250) as u8 + 1).collect();
                    mapping.write(4000 + offset, &from).unwrap();
                    let mut into = vec![0; bytes + 2];
                    mapping.read(4000 + offset - 1, &mut into).unwrap();
                    assert!(
                        into[1..=bytes] == from && into[0] == 0 && into[bytes + 1] == 0,
                        "{offset} {bytes}"
                    );
                    mapping.write(4000 + offset, &vec![0; bytes]).unwrap();
                }
            }
        }
    }

    #[test]
    fn words_are_little_endian_at_any_address() {
        let fd = object(4096, true);
        let mapping = GuestMapping::map(&fd, 0, 4096, true).unwrap();
        for offset in [0, 8, 9, 4088] {
            mapping.store_u64(offset, 0x0807_0605_0403_0201).unwrap();
            assert_eq!(mapping.load_u64(offset), Ok(0x0807_0605_0403_0201));
            assert_eq!(mapping.load_u32(offset + 4), Ok(0x0807_0605));
            let mut bytes = [0; 8];
            rustix::io::pread(&fd, &mut bytes, offset as u64).unwrap();
            assert_eq!(bytes, [1, 2, 3, 4, 5, 6, 7, 8]);
        }
        for outside in [4089, 4096, usize::MAX, usize::MAX - 3] {
            assert_eq!(mapping.load_u64(outside), Err(Fault::Refused));
            assert_eq!(mapping.store_u64(outside, 1), Err(Fault::Refused));
            assert!(
                mapping.slice(outside, 8).is_err() && mapping.replace_with_anonymous(outside, 8).is_err()
            );
        }
    }

    #[test]
    fn a_read_only_mapping_is_never_written() {
        let (fd, other) = (object(8192, true), object(8192, true));
        let mapping = GuestMapping::map(&fd, 4096, 4096, false).unwrap();
        let source = GuestMapping::map(&other, 0, 4096, true).unwrap();
        assert_eq!(mapping.write(0, &[1]), Err(Fault::Refused));
        assert_eq!(mapping.store_u32(0, 1), Err(Fault::Refused));
        let (to, from) = (mapping.slice(0, 8).unwrap(), source.slice(0, 8).unwrap());
        assert_eq!(copy_guest(&to, &from), Err(CopyFault::Target(Fault::Refused)));
        assert_eq!(read_file(other.as_fd(), 0, &[to], true), Err(Errno::FAULT));
        assert_eq!(write_file(other.as_fd(), 0, &[to]), Ok(8));
        assert!(GuestMapping::map(&fd, 4096, 4097, false).is_err());
        assert!(GuestMapping::map(&fd, u64::MAX, 2, false).is_err());
    }

    #[test]
    fn replaced_memory_is_no_longer_the_owners() {
        let fd = object(3 * 4096, true);
        let mapping = GuestMapping::map(&fd, 0, 3 * 4096, true).unwrap();
        mapping.write(0, &[7; 3 * 4096]).unwrap();
        assert!(
            mapping.replace_with_anonymous(100, 4096).is_err(),
            "not at a page"
        );
        mapping.replace_with_anonymous(4096, 4096).unwrap();
        assert_eq!(
            (mapping.load_u32(4092), mapping.load_u32(4096)),
            (Ok(0x0707_0707), Ok(0))
        );
        mapping.write(0, &[9; 3 * 4096]).unwrap();
        let mut seen = [0; 3 * 4096];
        rustix::io::pread(&fd, &mut seen, 0).unwrap();
        assert!(seen[..4096] == [9; 4096] && seen[4096..8192] == [7; 4096] && seen[8192..] == [9; 4096]);
    }
}
