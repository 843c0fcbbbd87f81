//! MEM, guest memory: a mapped range of a memory object that a VM's process owns.
//!
//! In: a descriptor and a range of it. Out: copies, single words in order, and system calls that move bytes between guest memory
//! and files or other guest memory. Knows no guest address, no right but "writable", and nothing of who uses it.
//!
//! Two ways in, chosen once when it is mapped: *direct*, by instructions, where the owner cannot shrink the object (it is sealed, and
//! is not huge-page memory, which can be punched while the pool is empty); else *through the kernel*, whose copies answer EFAULT where
//! an instruction would raise SIGBUS. There `process_vm_readv` on our own process is used with guest memory as the *local* side
//! wherever it is written: the local side is not pinned, so a copy in flight ends when the range is replaced.

use crate::{MapError, copy};
use rustix::fd::{AsFd, BorrowedFd};
use rustix::fs::{SealFlags, fcntl_get_seals, fstat, fstatfs};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

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
    base: *mut u8,
    bytes: usize,
    writable: bool,
    direct: bool,
}

// SAFETY: the address space belongs to this value alone, and every access to it is atomic, opaque to the compiler or the kernel's.
unsafe impl Send for GuestMapping {}
// SAFETY: as above; no method needs exclusive access.
unsafe impl Sync for GuestMapping {}

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
        let protection = if writable {
            ProtFlags::READ | ProtFlags::WRITE
        } else {
            ProtFlags::READ
        };
        // NORESERVE: huge pages are not to be reserved for ranges that nobody uses.
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: a fresh mapping at an address that the kernel chooses touches no other memory.
        let base = unsafe { mmap(std::ptr::null_mut(), bytes, protection, flags, fd, offset)? };
        for advice in [Advice::LinuxDontDump, Advice::LinuxDontFork] {
            // SAFETY: our own fresh range; neither advice changes what the memory holds. (A wish: errors change nothing here.)
            let _ = unsafe { madvise(base, bytes, advice) };
        }
        Ok(Self {
            base: base.cast(),
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
        fence(Ordering::Acquire);
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
        fence(Ordering::Release);
        // SAFETY: `target` is mapped writable for its whole length and cannot shrink; `from` is private.
        unsafe { copy::copy(target, from.as_ptr(), from.len()) };
        Ok(())
    }

    /// Loads a word (little-endian) with acquire order; not torn if its address is aligned and the mapping is direct.
    ///
    /// # Errors
    /// See [`Fault`].
    #[inline]
    pub fn load_u32(&self, offset: usize) -> Result<u32, Fault> {
        let address = self.address(offset, 4)?;
        if self.direct && address.cast::<u32>().is_aligned() {
            // SAFETY: mapped, aligned, cannot shrink; the reference to the atomic ends with this expression.
            return Ok(u32::from_le(
                unsafe { AtomicU32::from_ptr(address.cast()) }.load(Ordering::Acquire),
            ));
        }
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// Stores a word (little-endian) with release order; not torn if its address is aligned and the mapping is direct.
    ///
    /// # Errors
    /// See [`Fault`].
    #[inline]
    pub fn store_u32(&self, offset: usize, value: u32) -> Result<(), Fault> {
        let address = self.writable_address(offset, 4)?;
        if self.direct && address.cast::<u32>().is_aligned() {
            // SAFETY: mapped writable, aligned, cannot shrink; the reference to the atomic ends with this expression.
            unsafe { AtomicU32::from_ptr(address.cast()) }.store(value.to_le(), Ordering::Release);
            return Ok(());
        }
        self.write(offset, &value.to_le_bytes())
    }

    /// As [`GuestMapping::store_u32`], for 8 bytes.
    ///
    /// # Errors
    /// See [`Fault`].
    #[inline]
    pub fn store_u64(&self, offset: usize, value: u64) -> Result<(), Fault> {
        let address = self.writable_address(offset, 8)?;
        if self.direct && address.cast::<u64>().is_aligned() {
            // SAFETY: mapped writable, aligned, cannot shrink; the reference to the atomic ends with this expression.
            unsafe { AtomicU64::from_ptr(address.cast()) }.store(value.to_le(), Ordering::Release);
            return Ok(());
        }
        self.write(offset, &value.to_le_bytes())
    }

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
    const fn address(&self, offset: usize, bytes: usize) -> Result<*mut u8, Fault> {
        match offset.checked_add(bytes) {
            Some(end) if end <= self.bytes => Ok(self.base.wrapping_add(offset)),
            _ => Err(Fault::Refused),
        }
    }

    #[inline]
    const fn writable_address(&self, offset: usize, bytes: usize) -> Result<*mut u8, Fault> {
        if self.writable {
            self.address(offset, bytes)
        } else {
            Err(Fault::Refused)
        }
    }
}

impl Drop for GuestMapping {
    fn drop(&mut self) {
        // SAFETY: the range is ours alone, and whoever uses it borrows this value.
        let _ = unsafe { munmap(self.base.cast(), self.bytes) };
    }
}

/// A part of a mapping, as target or source of a system call.
#[derive(Clone, Copy, Debug)]
pub struct GuestSlice<'a> {
    mapping: &'a GuestMapping,
    offset: usize,
    bytes: usize,
}

impl<'a> GuestSlice<'a> {
    /// Bytes of it.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// What is left of it after its first `bytes` bytes, if anything.
    #[must_use]
    pub fn after(&self, bytes: usize) -> Option<GuestSlice<'a>> {
        (bytes < self.bytes).then(|| GuestSlice {
            offset: self.offset + bytes,
            bytes: self.bytes - bytes,
            ..*self
        })
    }

    /// This and `next` as one, where `next` follows it in the same mapping.
    #[must_use]
    pub fn joined(&self, next: &GuestSlice<'a>) -> Option<GuestSlice<'a>> {
        let follows = std::ptr::eq(self.mapping, next.mapping) && self.offset + self.bytes == next.offset;
        follows.then(|| GuestSlice {
            bytes: self.bytes + next.bytes,
            ..*self
        })
    }

    const fn vector(&self) -> libc::iovec {
        libc::iovec {
            iov_base: self.mapping.base.wrapping_add(self.offset).cast(),
            iov_len: self.bytes,
        }
    }
}

/// Slices in one call at most: the kernel's UIO_MAXIOV.
pub const SLICES_MAX: usize = 1024;

/// Reads from `file` at `offset` into guest memory; with `wait` false only what needs no wait for a disk. Gives the bytes read, which
/// may be fewer than asked for, and 0 at the file's end.
///
/// # Errors
/// AGAIN: it would have to wait. OPNOTSUPP: this file cannot say. FAULT: the guest memory is gone or not writable. Else the file's.
pub fn read_file(
    file: BorrowedFd<'_>,
    offset: u64,
    targets: &[GuestSlice<'_>],
    wait: bool,
) -> Result<usize, Errno> {
    if targets.iter().any(|target| !target.mapping.writable) {
        return Err(Errno::FAULT);
    }
    let vectors: Vec<_> = targets.iter().take(SLICES_MAX).map(GuestSlice::vector).collect();
    let flags = if wait { 0 } else { libc::RWF_NOWAIT };
    // SAFETY: each vector lies within a mapping that `targets` borrows and that may be written at any time by anybody; the
    // kernel checks every page and answers EFAULT.
    checked(|| unsafe {
        libc::preadv2(
            file.as_raw_fd(),
            vectors.as_ptr(),
            vectors.len() as i32,
            offset.cast_signed(),
            flags,
        )
    })
}

/// Writes guest memory into `file` at `offset`; may wait for a disk. Gives the bytes written, which may be fewer than asked for.
///
/// # Errors
/// FAULT: the guest memory is gone. Else the file's.
pub fn write_file(file: BorrowedFd<'_>, offset: u64, sources: &[GuestSlice<'_>]) -> Result<usize, Errno> {
    let vectors: Vec<_> = sources.iter().take(SLICES_MAX).map(GuestSlice::vector).collect();
    // SAFETY: each vector lies within a mapping that `sources` borrows; the kernel only reads them, and answers EFAULT.
    checked(|| unsafe {
        libc::pwritev(
            file.as_raw_fd(),
            vectors.as_ptr(),
            vectors.len() as i32,
            offset.cast_signed(),
        )
    })
}

/// Copies guest memory to guest memory, both of the same length (the shorter one counts): one memory copy.
///
/// # Errors
/// Which side failed; some of it may have been copied.
pub fn copy_guest(target: &GuestSlice<'_>, source: &GuestSlice<'_>) -> Result<(), CopyFault> {
    let bytes = target.bytes.min(source.bytes);
    let from = source
        .mapping
        .address(source.offset, bytes)
        .map_err(CopyFault::Source)?;
    let to = target
        .mapping
        .writable_address(target.offset, bytes)
        .map_err(CopyFault::Target)?;
    if target.mapping.direct && source.mapping.direct {
        // SAFETY: both are mapped for their whole length and cannot shrink. (The ranges may be the same memory: the copy is
        // opaque to the compiler, and what the guest then finds there is its own affair.)
        unsafe { copy::copy(to, from, bytes) };
        return Ok(());
    }
    kernel_copy(to, from, bytes).map_err(|done| {
        // The kernel does not say which side it was: try the source's next byte by itself.
        let side = source
            .mapping
            .read(source.offset + done.min(bytes - 1), &mut [0; 1]);
        side.map_or_else(CopyFault::Source, |()| CopyFault::Target(Fault::Gone))
    })
}

/// Copies by the kernel, which answers a fault where an instruction of ours would raise a signal. The error: bytes copied until then.
fn kernel_copy(target: *mut u8, source: *const u8, bytes: usize) -> Result<(), usize> {
    let mut done = 0;
    while done < bytes {
        let vector = |base: *mut u8| libc::iovec {
            iov_base: base.wrapping_add(done).cast(),
            iov_len: bytes - done,
        };
        let (local, remote) = (vector(target), vector(source.cast_mut()));
        // SAFETY: callers pass a private buffer or a range of a live mapping for each side; the kernel checks every page.
        let moved = checked(|| unsafe {
            libc::process_vm_readv(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0)
        });
        match moved {
            Ok(moved) if moved > 0 => done += moved,
            _ => return Err(done),
        }
    }
    Ok(())
}

/// Calls until it is not interrupted by a signal.
fn checked(mut call: impl FnMut() -> isize) -> Result<usize, Errno> {
    loop {
        match usize::try_from(call()) {
            Ok(bytes) => return Ok(bytes),
            Err(_) => match Errno::from_io_error(&std::io::Error::last_os_error()) {
                Some(Errno::INTR) => {}
                error => return Err(error.unwrap_or(Errno::IO)),
            },
        }
    }
}
