//! MEM, words: a page of 64-bit words that two of our processes share, one of them the only writer.
//!
//! In: a sealed memory descriptor. Out: loads and stores of whole words, in order. Knows nothing of what they mean.

use crate::{GuestMapping, MapError};
use rustix::fd::AsFd;
use rustix::fs::fstat;
use std::sync::Arc;

/// Mapped words; a clone is the same words. Indexes out of range read 0 and are not written.
///
/// The words are little-endian in memory.
#[derive(Clone, Debug)]
pub struct SharedWords(Arc<GuestMapping>);

impl SharedWords {
    /// Maps all of `fd` (a memfd sealed with F_SEAL_SHRINK, so that no access can raise SIGBUS).
    ///
    /// # Errors
    /// Unsealed, TooSmall (less than one word), or the system's (a read-only descriptor with `writable`).
    pub fn map(fd: impl AsFd, writable: bool) -> Result<Self, MapError> {
        let object_bytes = u64::try_from(fstat(&fd)?.st_size).unwrap_or(0);
        let bytes = usize::try_from(object_bytes & !7).unwrap_or(0);
        if bytes == 0 {
            return Err(MapError::TooSmall {
                object_bytes,
                needed_bytes: 8,
            });
        }
        let mapping = GuestMapping::map(fd, 0, bytes, writable)?;
        if mapping.is_direct() {
            Ok(Self(Arc::new(mapping)))
        } else {
            Err(MapError::Unsealed)
        }
    }

    /// Number of words.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.bytes() / 8
    }

    /// Never: [`SharedWords::map`] refuses such.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Loads with acquire order.
    #[inline]
    #[must_use]
    pub fn load(&self, index: usize) -> u64 {
        self.0.load_u64(index.saturating_mul(8)).unwrap_or(0)
    }

    /// Stores with release order; nothing happens to a read-only mapping.
    #[inline]
    pub fn store(&self, index: usize, value: u64) {
        // Refused where the index is out of range or the mapping is read-only: nothing happens, as promised.
        let _ = self.0.store_u64(index.saturating_mul(8), value);
    }

    /// Copies bytes out, from the start of word `index` on; the shorter of both ends it. After it an acquire fence.
    pub fn read_bytes(&self, index: usize, into: &mut [u8]) {
        let bytes = into.len().min(self.bytes_from(index));
        let _ = self.0.read(index.saturating_mul(8), &mut into[..bytes]);
    }

    /// Copies bytes in, from the start of word `index` on; a last part of a word is filled up with zeros; what does not
    /// fit is left out. Before it a release fence.
    pub fn write_bytes(&self, index: usize, from: &[u8]) {
        let from = &from[..from.len().min(self.bytes_from(index))];
        let (words, rest) = from.split_at(from.len() & !7);
        let _ = self.0.write(index.saturating_mul(8), words);
        if !rest.is_empty() {
            let mut last = [0; 8];
            last[..rest.len()].copy_from_slice(rest);
            self.store(index + words.len() / 8, u64::from_le_bytes(last));
        }
    }

    fn bytes_from(&self, index: usize) -> usize {
        self.len().saturating_sub(index) * 8
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

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
