//! HOST, words: the memory behind the pages that front and core share.
//!
//! In: a size. Out: two descriptors of the same memory, one to write and one that can only ever be read, and the mapped words.
//! Knows nothing of what the words mean (`vmgmt_device::page` does).

use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::fs::{
    MemfdFlags, Mode, OFlags, SealFlags, fchmod, fcntl_add_seals, ftruncate, memfd_create, open,
};
use rustix::io::Errno;
use vmgmt_device::page::Words;
use vmgmt_mem::{MapError, SharedWords};

/// A page's words, mapped. A clone is the same words.
#[derive(Clone, Debug)]
pub struct MappedWords(SharedWords);

impl MappedWords {
    /// Maps a page to read and write it.
    ///
    /// # Errors
    /// [`MapError`]: the descriptor is not sealed, empty, or read-only.
    pub fn writable(fd: impl AsFd) -> Result<Self, MapError> {
        SharedWords::map(fd, true).map(Self)
    }

    /// Maps a page to read it; stores do nothing.
    ///
    /// # Errors
    /// [`MapError`]: the descriptor is not sealed, or empty.
    pub fn read_only(fd: impl AsFd) -> Result<Self, MapError> {
        SharedWords::map(fd, false).map(Self)
    }
}

impl Words for MappedWords {
    fn len(&self) -> usize {
        self.0.len()
    }
    #[inline]
    fn load(&self, index: usize) -> u64 {
        self.0.load(index)
    }
    #[inline]
    fn store(&self, index: usize, value: u64) {
        self.0.store(index, value);
    }
    fn read_bytes(&self, index: usize, into: &mut [u8]) {
        self.0.read_bytes(index, into);
    }
    fn write_bytes(&self, index: usize, from: &[u8]) {
        self.0.write_bytes(index, from);
    }
}

/// Makes the memory of a page of `words` words, close-on-exec.
///
/// It is sealed against any change of its size, so that no access to it can raise SIGBUS.
///
/// # Errors
/// The operating system's: no memory, no descriptors.
pub fn create_writable_page(name: &str, words: usize) -> Result<OwnedFd, Errno> {
    let bytes = u64::try_from(words)
        .ok()
        .and_then(|words| words.checked_mul(8))
        .ok_or(Errno::FBIG)?;
    let writable = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&writable, bytes)?;
    fcntl_add_seals(&writable, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(writable)
}

/// The same with a second descriptor, (read-write, read-only), for a page that one role writes and the other reads.
///
/// The second one is open for reading and the file's mode is 0: under another user id it can neither be mapped writable nor be opened
/// again for writing (survival.md, "Front and core"); nor in a sandbox, where nothing changes a mode.
///
/// # Errors
/// As [`create_writable_page`], or there is no /proc.
pub fn create_page(name: &str, words: usize) -> Result<(OwnedFd, OwnedFd), Errno> {
    let writable = create_writable_page(name, words)?;
    let read_only = open(
        format!("/proc/self/fd/{}", writable.as_raw_fd()),
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    fchmod(&writable, Mode::empty())?;
    Ok((writable, read_only))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{fcntl_getfl, fstat};
    use vmgmt_device::page::{FrontPage, MapRecord};

    #[test]
    fn one_side_writes_what_the_other_reads() {
        let (writable, read_only) =
            create_page("front page", FrontPage::<MappedWords>::words_needed(64)).unwrap();
        let front = FrontPage::new(MappedWords::writable(&writable).unwrap());
        let core = FrontPage::new(MappedWords::read_only(&read_only).unwrap());
        assert!(!core.is_valid());
        front.init(7, 3);
        let record = MapRecord {
            number: 1,
            iova: 0x1000,
            bytes: 0x1000,
            object: 1,
            offset: 0,
            rights: 3,
        };
        front.set_map(63, Some(&record));
        assert!(core.is_valid());
        assert_eq!(
            (core.session(), core.maps_max(), core.map(63)),
            (7, 64, Some(record))
        );
        core.set_life(9);
        assert_eq!(front.life(), 0);
    }

    #[test]
    fn the_read_only_descriptor_cannot_be_mapped_writable() {
        let (writable, read_only) = create_page("page", 512).unwrap();
        assert!(MappedWords::writable(&read_only).is_err());
        assert_eq!(fcntl_getfl(&read_only).unwrap() & OFlags::RWMODE, OFlags::RDONLY);
        assert_eq!(fstat(&read_only).unwrap().st_mode & 0o7777, 0);
        assert!(ftruncate(&writable, 0).is_err());
        assert!(create_page("page", usize::MAX).is_err());
    }
}
