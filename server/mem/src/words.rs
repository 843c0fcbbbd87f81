//! MEM, words: a page of 64-bit words that two of our processes share, one of them the only writer.
//!
//! In: a sealed memory descriptor. Out: loads and stores of whole words, in order. Knows nothing of what they mean.

use crate::{MapError, copy};
use memmap2::{MmapOptions, MmapRaw};
use rustix::fd::AsFd;
use rustix::fs::{SealFlags, fcntl_get_seals, fstat};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Mapped words; a clone is the same words. Indexes out of range read 0 and are not written.
///
/// The words are little-endian in memory.
#[derive(Clone, Debug)]
pub struct SharedWords {
    mapping: Arc<MmapRaw>,
    writable: bool,
    words: usize,
}

impl SharedWords {
    /// Maps all of `fd` (a memfd sealed with F_SEAL_SHRINK, so that no access can raise SIGBUS).
    ///
    /// # Errors
    /// Unsealed, TooSmall (less than one word), or the system's (a read-only descriptor with `writable`).
    pub fn map(fd: impl AsFd, writable: bool) -> Result<Self, MapError> {
        let fd = fd.as_fd();
        if !fcntl_get_seals(fd)?.contains(SealFlags::SHRINK) {
            return Err(MapError::Unsealed);
        }
        let object_bytes = u64::try_from(fstat(fd)?.st_size).unwrap_or(0);
        let words = usize::try_from(object_bytes / 8).unwrap_or(0);
        if words == 0 {
            return Err(MapError::TooSmall {
                object_bytes,
                needed_bytes: 8,
            });
        }
        let mut options = MmapOptions::new();
        options.len(words * 8);
        let mapped = if writable {
            options.map_raw(fd.as_raw_fd())
        } else {
            options.map_raw_read_only(fd.as_raw_fd())
        };
        let mapping = mapped.map_err(|error| {
            MapError::System(rustix::io::Errno::from_io_error(&error).unwrap_or(rustix::io::Errno::INVAL))
        })?;
        Ok(Self {
            mapping: Arc::new(mapping),
            writable,
            words,
        })
    }

    /// Number of words.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.words
    }

    /// Never: [`SharedWords::map`] refuses such.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.words == 0
    }

    /// Loads with acquire order.
    #[inline]
    #[must_use]
    pub fn load(&self, index: usize) -> u64 {
        if index >= self.words {
            return 0;
        }
        // SAFETY: within the mapping, aligned (a mapping begins at a page), and sealed against shrinking.
        let word = unsafe { &*self.mapping.as_mut_ptr().cast::<AtomicU64>().add(index) };
        u64::from_le(word.load(Ordering::Acquire))
    }

    /// Stores with release order; nothing happens to a read-only mapping.
    #[inline]
    pub fn store(&self, index: usize, value: u64) {
        if index >= self.words || !self.writable {
            return;
        }
        // SAFETY: within the mapping, which is writable, aligned, and sealed against shrinking.
        let word = unsafe { &*self.mapping.as_mut_ptr().cast::<AtomicU64>().add(index) };
        word.store(value.to_le(), Ordering::Release);
    }

    /// Copies bytes out, from the start of word `index` on; the shorter of both ends it. After it an acquire fence.
    pub fn read_bytes(&self, index: usize, into: &mut [u8]) {
        let bytes = into.len().min(self.words.saturating_sub(index).saturating_mul(8));
        if bytes > 0 {
            // SAFETY: `bytes` ends within the mapping; `into` is private memory of at least that length.
            unsafe { copy::copy(into.as_mut_ptr(), self.mapping.as_mut_ptr().add(index * 8), bytes) };
            std::sync::atomic::fence(Ordering::Acquire);
        }
    }

    /// Copies bytes in, from the start of word `index` on; a last part of a word is filled up with zeros; what does not
    /// fit is left out. Before it a release fence.
    pub fn write_bytes(&self, index: usize, from: &[u8]) {
        let bytes = from.len().min(self.words.saturating_sub(index).saturating_mul(8));
        if bytes == 0 || !self.writable {
            return;
        }
        std::sync::atomic::fence(Ordering::Release);
        // SAFETY: `bytes` ends within the mapping, which is writable; `from` is private memory of at least that length.
        unsafe {
            copy::copy(
                self.mapping.as_mut_ptr().add(index * 8),
                from.as_ptr(),
                bytes & !7,
            )
        };
        if bytes & 7 != 0 {
            let mut last = [0; 8];
            last[..bytes & 7].copy_from_slice(&from[bytes & !7..bytes]);
            self.store(index + bytes / 8, u64::from_le_bytes(last));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, fcntl_add_seals, ftruncate, memfd_create};

    fn sealed(bytes: u64) -> rustix::fd::OwnedFd {
        let fd = memfd_create("words", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&fd, bytes).unwrap();
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).unwrap();
        fd
    }

    #[test]
    fn two_mappings_see_the_same_words() {
        let fd = sealed(8192 + 16);
        let writer = SharedWords::map(&fd, true).unwrap();
        let reader = SharedWords::map(&fd, false).unwrap();
        assert_eq!(reader.len(), 1026);
        writer.store(1025, 7);
        assert_eq!(reader.load(1025), 7);
        reader.store(1025, 8);
        assert_eq!(writer.load(1025), 7, "a read-only mapping writes nothing");
        writer.store(1026, 1);
        assert_eq!((writer.load(1026), writer.load(usize::MAX)), (0, 0));
    }

    #[test]
    fn bytes_are_copied_and_padded() {
        let words = SharedWords::map(sealed(4096), true).unwrap();
        for bytes in [0usize, 1, 7, 8, 9, 127, 128, 129, 1000, 4000] {
            (0..words.len()).for_each(|index| words.store(index, u64::MAX));
            let from: Vec<u8> = (0..bytes).map(|n| n as u8 ^ 0x5a).collect();
            words.write_bytes(3, &from);
            let mut into = vec![0; bytes.next_multiple_of(8)];
            words.read_bytes(3, &mut into);
            assert_eq!(&into[..bytes], &from[..]);
            assert!(
                into[bytes..].iter().all(|byte| *byte == 0),
                "{bytes} bytes are padded"
            );
            assert_eq!(words.load(2), u64::MAX);
            assert_eq!(words.load(3 + bytes.div_ceil(8)), u64::MAX);
        }
        let mut into = [1; 24];
        words.read_bytes(510, &mut into);
        assert_eq!(into[16..], [1; 8], "what lies outside is left alone");
        words.write_bytes(511, &[9; 24]);
        words.write_bytes(usize::MAX, &[9; 24]);
        assert_eq!(words.load(511), 0x0909_0909_0909_0909);
    }

    #[test]
    fn unsealed_or_empty_memory_is_refused() {
        let fd = memfd_create("unsealed", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&fd, 4096).unwrap();
        assert!(matches!(SharedWords::map(&fd, false), Err(MapError::Unsealed)));
        assert!(matches!(
            SharedWords::map(sealed(7), true),
            Err(MapError::TooSmall { object_bytes: 7, .. })
        ));
    }
}
