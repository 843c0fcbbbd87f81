//! MEM, calls: system calls that move bytes between guest memory and files or other guest memory, and the kernel's own copy.
//!
//! In: checked parts of mappings. Out: bytes moved, or which side failed. Knows no file but its descriptor.

use crate::{CopyFault, Fault, GuestMapping, copy};
use rustix::fd::BorrowedFd;
use rustix::io::{Errno, retry_on_intr};
use std::os::fd::AsRawFd;

/// A part of a mapping, as target or source of a system call.
#[derive(Clone, Copy, Debug)]
pub struct GuestSlice<'a> {
    pub(crate) mapping: &'a GuestMapping,
    pub(crate) offset: usize,
    pub(crate) bytes: usize,
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
pub fn kernel_copy(target: *mut u8, source: *const u8, bytes: usize) -> Result<(), usize> {
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
    retry_on_intr(|| {
        usize::try_from(call())
            .map_err(|_| Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
    })
}
