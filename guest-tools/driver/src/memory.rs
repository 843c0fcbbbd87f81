//! Memory that the program and the device share.
//!
//! Comes in: a mapping with the device addresses of its pieces, from a backing. Goes out: copies, single words, and the
//! kernel's own copies from and to files. Never: a Rust reference to the bytes, because the device may write them at any moment.
//! All accesses are relaxed atomics of at most 8 bytes: no `rep movs` (15 MB/s under TCG), no tearing of words.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64};

use crate::error::{DriverError, Result};
use crate::limits::{CHECKSUM_COPY_BYTES, PAGE_BYTES};
use crate::order;

/// A run of addresses as the device sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Address for the device (an IOVA with vfio, a physical address with uio).
    pub address: u64,
    /// Bytes.
    pub length: u64,
}

/// A buffer that submissions share: it lives until the last one that names it is completed.
pub type Buffer = Arc<DmaMemory>;

/// What gives the memory back.
type Release = Box<dyn FnOnce() + Send + Sync>;

/// A stretch of memory, contiguous for the program, in one or more pieces for the device.
pub struct DmaMemory {
    pointer: NonNull<u8>,
    length: usize,
    pieces: Vec<Piece>,
    release: Option<Release>,
}

// SAFETY: the bytes are only touched through atomics (or by the kernel), so threads may share them.
unsafe impl Send for DmaMemory {}
// SAFETY: as above.
unsafe impl Sync for DmaMemory {}

impl std::fmt::Debug for DmaMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DmaMemory")
            .field("length", &self.length)
            .field("pieces", &self.pieces.len())
            .finish()
    }
}

impl DmaMemory {
    /// Takes over a mapping.
    ///
    /// # Errors
    /// The pieces are neither none at all nor `length` bytes in sum, or the pointer is not 8-byte aligned.
    ///
    /// # Safety
    /// `pointer` must be valid for reads and writes of `length` bytes until `release` is called, and nobody may hold a
    /// Rust reference into it.
    pub unsafe fn from_raw(
        pointer: NonNull<u8>,
        length: usize,
        pieces: Vec<Piece>,
        release: impl FnOnce() + Send + Sync + 'static,
    ) -> Result<Self> {
        let memory = Self {
            pointer,
            length,
            pieces,
            release: Some(Box::new(release)),
        };
        let sum = memory
            .pieces
            .iter()
            .try_fold(0_u64, |sum, piece| sum.checked_add(piece.length));
        let whole = memory.pieces.is_empty() || sum == Some(length as u64);
        if !whole || !(pointer.as_ptr() as usize).is_multiple_of(8) {
            return Err(DriverError::BadArgument(
                "the pieces of a DMA memory do not add up to its length".into(),
            ));
        }
        Ok(memory)
    }

    /// Memory without device addresses, for the port window.
    ///
    /// # Errors
    /// The system has none.
    pub fn ordinary(length: usize) -> Result<Self> {
        let length = round_up(length, PAGE_BYTES)?;
        let pointer = map(None, length, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
            .map_err(|error| DriverError::system(format!("mapping {length} bytes of memory"), error))?;
        Self::owning(pointer, length, Vec::new())
    }

    /// Maps a stretch of a shared file, for an in-process device whose guest memory is a memfd.
    /// The file must not be truncated while the mapping lives (seal it against shrinking).
    ///
    /// # Errors
    /// The file cannot be mapped there, or `address` leaves no room.
    pub fn map_file(file: BorrowedFd<'_>, offset: u64, length: usize, address: u64) -> Result<Self> {
        Self::map_file_pages(file, &[(offset, length, address)])
    }

    /// The same for several stretches of the file, each (offset in the file, bytes, device address), that are to follow one another in
    /// the program's address space: scattered pages.
    ///
    /// # Errors
    /// As [`Self::map_file`]; offsets and lengths must be multiples of the page size.
    pub fn map_file_pages(file: BorrowedFd<'_>, stretches: &[(u64, usize, u64)]) -> Result<Self> {
        let mut length = 0_usize;
        let mut pieces = Vec::with_capacity(stretches.len());
        for &(offset, bytes, address) in stretches {
            let whole =
                bytes.is_multiple_of(PAGE_BYTES) && offset.is_multiple_of(PAGE_BYTES as u64) && bytes > 0;
            let sum = length
                .checked_add(bytes)
                .filter(|_| whole && address.checked_add(bytes as u64).is_some());
            length = sum.ok_or_else(|| {
                DriverError::BadArgument("a stretch of guest memory is not whole pages".into())
            })?;
            push_piece(&mut pieces, address, bytes as u64);
        }
        let base = map(None, length, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
            .map_err(|error| DriverError::system("reserving address space", error))?;
        let memory = Self::owning(base, length, pieces)?;
        let mut start = 0;
        for &(offset, bytes, _) in stretches {
            let flags = libc::MAP_SHARED | libc::MAP_FIXED;
            let offset = i64::try_from(offset).map_err(|_| DriverError::BadArgument("file offset".into()))?;
            // SAFETY: start + bytes is within the reservation of `length` bytes just made.
            let target = unsafe { base.add(start) };
            map(Some(target.as_ptr()), bytes, flags, file.as_raw_fd(), offset)
                .map_err(|error| DriverError::system("mapping guest memory", error))?;
            start += bytes;
        }
        Ok(memory)
    }

    /// Takes over an mmap of our own.
    pub(crate) fn owning(pointer: NonNull<u8>, length: usize, pieces: Vec<Piece>) -> Result<Self> {
        let address = pointer.as_ptr() as usize;
        // SAFETY: the caller hands over a fresh mapping of `length` bytes; it is unmapped only by `release`.
        unsafe { Self::from_raw(pointer, length, pieces, move || unmap(address, length)) }
    }

    /// Bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.length
    }

    /// Never true for memory that a backing gave.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Where the device finds it, in order. Empty: it cannot.
    #[must_use]
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Address of the first byte in this process, for a backing that maps or looks it up. Not for access.
    #[must_use]
    pub fn virtual_address(&self) -> usize {
        self.pointer.as_ptr() as usize
    }

    /// Gives the memory up without returning it to the system: the last resort when a device may still write to it.
    pub(crate) fn leak(mut self) {
        if let Some(release) = self.release.take() {
            std::mem::forget(release);
        }
    }

    /// Adds something to be done after the memory was given back.
    #[must_use]
    pub fn and_then_release(mut self, then: impl FnOnce() + Send + Sync + 'static) -> Self {
        let first = self.release.take();
        self.release = Some(Box::new(move || {
            if let Some(first) = first {
                first();
            }
            then();
        }));
        self
    }

    /// Adds something to be done before the memory is given back.
    pub(crate) fn release_after(mut self, before: impl FnOnce() + Send + Sync + 'static) -> Self {
        let then = self.release.take();
        self.release = Some(Box::new(move || {
            before();
            if let Some(then) = then {
                then();
            }
        }));
        self
    }

    fn at(&self, start: usize, length: usize, alignment: usize) -> Result<*mut u8> {
        let inside = start.checked_add(length).is_some_and(|end| end <= self.length);
        if !inside || !start.is_multiple_of(alignment) {
            return Err(DriverError::Bounds {
                start,
                length,
                memory_bytes: self.length,
            });
        }
        // SAFETY: start <= length of the mapping, checked above.
        Ok(unsafe { self.pointer.as_ptr().add(start) })
    }

    /// One aligned 32-bit word, acquire.
    ///
    /// # Errors
    /// Out of range or not aligned; so for all accesses.
    pub fn load32(&self, start: usize) -> Result<u32> {
        let pointer = self.at(start, 4, 4)?;
        // SAFETY: in range and aligned (`at`; the base is 8-byte aligned).
        Ok(u32::from_le(
            unsafe { AtomicU32::from_ptr(pointer.cast()) }.load(order::LOAD),
        ))
    }

    /// One aligned 32-bit word, release.
    ///
    /// # Errors
    /// As [`Self::load32`].
    pub fn store32(&self, start: usize, value: u32) -> Result<()> {
        let pointer = self.at(start, 4, 4)?;
        // SAFETY: in range and aligned (`at`).
        unsafe { AtomicU32::from_ptr(pointer.cast()) }.store(value.to_le(), order::STORE);
        Ok(())
    }

    /// One aligned 64-bit word, acquire.
    ///
    /// # Errors
    /// As [`Self::load32`].
    pub fn load64(&self, start: usize) -> Result<u64> {
        let pointer = self.at(start, 8, 8)?;
        // SAFETY: in range and aligned (`at`).
        Ok(u64::from_le(
            unsafe { AtomicU64::from_ptr(pointer.cast()) }.load(order::LOAD),
        ))
    }

    /// One aligned 64-bit word, release.
    ///
    /// # Errors
    /// As [`Self::load32`].
    pub fn store64(&self, start: usize, value: u64) -> Result<()> {
        let pointer = self.at(start, 8, 8)?;
        // SAFETY: in range and aligned (`at`).
        unsafe { AtomicU64::from_ptr(pointer.cast()) }.store(value.to_le(), order::STORE);
        Ok(())
    }

    /// Copies bytes out. For small things: bulk data is used where it is, or moved by the kernel ([`Self::write_to`]).
    ///
    /// # Errors
    /// As [`Self::load32`].
    pub fn read(&self, start: usize, target: &mut [u8]) -> Result<()> {
        let pointer = self.at(start, target.len(), 1)?;
        let head = (pointer.align_offset(8)).min(target.len());
        let (first, rest) = target.split_at_mut(head);
        let mut cursor = pointer;
        let bytes = |part: &mut [u8], cursor: &mut *mut u8| {
            for byte in part {
                // SAFETY: `at` checked the whole range; the cursor moves once for each byte of it.
                unsafe {
                    *byte = AtomicU8::from_ptr(*cursor).load(order::COPY);
                    *cursor = cursor.add(1);
                }
            }
        };
        bytes(first, &mut cursor);
        let (words, last) = rest.as_chunks_mut::<8>();
        for word in words {
            // SAFETY: in the checked range, and aligned because `head` bytes led to an aligned address.
            unsafe {
                *word = AtomicU64::from_ptr(cursor.cast()).load(order::COPY).to_ne_bytes();
                cursor = cursor.add(8);
            }
        }
        bytes(last, &mut cursor);
        Ok(())
    }

    /// Copies bytes in. For small things, as [`Self::read`].
    ///
    /// # Errors
    /// As [`Self::load32`].
    pub fn write(&self, start: usize, source: &[u8]) -> Result<()> {
        let pointer = self.at(start, source.len(), 1)?;
        let head = (pointer.align_offset(8)).min(source.len());
        let (first, rest) = source.split_at(head);
        let mut cursor = pointer;
        let bytes = |part: &[u8], cursor: &mut *mut u8| {
            for byte in part {
                // SAFETY: `at` checked the whole range; the cursor moves once for each byte of it.
                unsafe {
                    AtomicU8::from_ptr(*cursor).store(*byte, order::COPY);
                    *cursor = cursor.add(1);
                }
            }
        };
        bytes(first, &mut cursor);
        let (words, last) = rest.as_chunks::<8>();
        for word in words {
            // SAFETY: in the checked range, and aligned because `head` bytes led to an aligned address.
            unsafe {
                AtomicU64::from_ptr(cursor.cast()).store(u64::from_ne_bytes(*word), order::COPY);
                cursor = cursor.add(8);
            }
        }
        bytes(last, &mut cursor);
        Ok(())
    }

    /// A copy of a stretch.
    ///
    /// # Errors
    /// As [`Self::load32`].
    pub fn to_vec(&self, start: usize, length: usize) -> Result<Vec<u8>> {
        self.at(start, length, 1)?;
        let mut copy = vec![0; length];
        self.read(start, &mut copy)?;
        Ok(copy)
    }

    /// Adds a stretch to a running checksum.
    ///
    /// # Errors
    /// As [`Self::load32`].
    pub fn checksum(&self, start: usize, length: usize, hasher: &mut crc32fast::Hasher) -> Result<()> {
        self.at(start, length, 1)?;
        let mut copy = [0_u8; CHECKSUM_COPY_BYTES];
        let mut done = 0;
        while done < length {
            let bytes = (length - done).min(copy.len());
            let part = copy.get_mut(..bytes).unwrap_or_default();
            self.read(start + done, part)?;
            hasher.update(part);
            done += bytes;
        }
        Ok(())
    }

    /// `write(2)` straight from this memory: the kernel copies. Gives the bytes written.
    ///
    /// # Errors
    /// Out of range (as `InvalidInput`), or what the system says.
    pub fn write_to(&self, file: BorrowedFd<'_>, start: usize, length: usize) -> io::Result<usize> {
        let pointer = self.at(start, length, 1).map_err(invalid)?;
        // SAFETY: the range is valid; the kernel only reads it.
        count(unsafe { libc::write(file.as_raw_fd(), pointer.cast(), length) })
    }

    /// `read(2)` straight into this memory: the kernel copies. Gives the bytes read, 0 at the end.
    ///
    /// # Errors
    /// As [`Self::write_to`].
    pub fn read_from(&self, file: BorrowedFd<'_>, start: usize, length: usize) -> io::Result<usize> {
        let pointer = self.at(start, length, 1).map_err(invalid)?;
        // SAFETY: the range is valid for writes and nobody holds a reference into it.
        count(unsafe { libc::read(file.as_raw_fd(), pointer.cast(), length) })
    }
}

impl Drop for DmaMemory {
    fn drop(&mut self) {
        if let Some(release) = self.release.take() {
            release();
        }
    }
}

/// Appends a run of device addresses, joined to the last one where it follows it.
pub(crate) fn push_piece(pieces: &mut Vec<Piece>, address: u64, length: u64) {
    match pieces.last_mut() {
        Some(last) if last.address.checked_add(last.length) == Some(address) => last.length += length,
        _ => pieces.push(Piece { address, length }),
    }
}

/// Rounds a length up to a multiple of `unit` (a power of two), at least one unit.
pub(crate) fn round_up(length: usize, unit: usize) -> Result<usize> {
    length
        .max(1)
        .checked_next_multiple_of(unit)
        .filter(|bytes| *bytes <= isize::MAX as usize)
        .ok_or_else(|| DriverError::BadArgument(format!("{length} bytes of memory are too many")))
}

/// mmap for reading and writing.
pub(crate) fn map(
    address: Option<*mut u8>,
    length: usize,
    flags: i32,
    file: i32,
    offset: i64,
) -> io::Result<NonNull<u8>> {
    let hint = address.unwrap_or(std::ptr::null_mut());
    // SAFETY: without MAP_FIXED it touches no existing mapping; with it the caller owns the range.
    let result = unsafe {
        libc::mmap(
            hint.cast(),
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
            file,
            offset,
        )
    };
    if result == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(result.cast()).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))
}

/// munmap of a mapping that `map` made.
pub(crate) fn unmap(address: usize, length: usize) {
    // SAFETY: called once, by the owner of the mapping; no reference into it exists.
    unsafe { libc::munmap(address as *mut libc::c_void, length) };
}

fn count(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

fn invalid(error: DriverError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, error)
}

/// What was stored before is visible to the device before anything is loaded after.
///
/// On x86 with an instruction of its own: what compilers make of a full fence there is a locked instruction nowadays, and QEMU's TCG makes
/// an ordinary one of that where the VM has one processor, without any order towards those who look at guest memory from outside.
pub(crate) fn full_fence() {
    #[cfg(target_arch = "x86_64")]
    {
        std::sync::atomic::compiler_fence(order::FENCE);
        // SAFETY: every x86-64 processor has it, and it touches nothing.
        unsafe { std::arch::x86_64::_mm_mfence() };
    }
    #[cfg(not(target_arch = "x86_64"))]
    std::sync::atomic::fence(order::FENCE);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_back_at_every_alignment() {
        let memory = DmaMemory::ordinary(4096).unwrap();
        for start in 0..17 {
            for length in 0..40 {
                let source: Vec<u8> = (0..length).map(|i| (i * 7 + start) as u8).collect();
                memory.write(start, &source).unwrap();
                assert_eq!(memory.to_vec(start, length).unwrap(), source);
            }
        }
    }

    #[test]
    fn nothing_outside_is_touched() {
        let memory = DmaMemory::ordinary(4096).unwrap();
        assert!(memory.load32(4096).is_err());
        assert!(memory.load32(2).is_err());
        assert!(memory.load64(4092).is_err());
        assert!(memory.read(usize::MAX, &mut [0; 2]).is_err());
        assert!(memory.write(4095, &[0; 2]).is_err());
        assert!(memory.to_vec(1, usize::MAX).is_err());
    }

    #[test]
    fn checksum_is_that_of_the_bytes() {
        let memory = DmaMemory::ordinary(64 * 1024).unwrap();
        let source: Vec<u8> = (0..50_000_u32).map(|i| ((i * i) >> 3) as u8).collect();
        memory.write(3, &source).unwrap();
        let mut hasher = crc32fast::Hasher::new();
        memory.checksum(3, source.len(), &mut hasher).unwrap();
        assert_eq!(hasher.finalize(), crc32fast::hash(&source));
    }

    /// With the other instruction VMs under QEMU's TCG lost a wake-up within minutes, on a busy host within one.
    #[test]
    #[cfg(target_arch = "x86_64")]
    fn the_full_fence_is_one_for_an_emulated_processor_too() {
        let start = full_fence as fn() as *const u8;
        // SAFETY: the code of a function that is there, and of those behind it.
        let code = unsafe { std::slice::from_raw_parts(start, 64) };
        let mfence = [0x0f, 0xae, 0xf0];
        assert!(code.windows(3).any(|bytes| bytes == mfence), "{code:02x?}");
    }
}
