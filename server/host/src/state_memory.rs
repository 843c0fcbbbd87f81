//! HOST, state memory: memory that outlives the process that writes it, and copies of it.
//!
//! In: sizes, descriptors. Out: sealed descriptors. Knows nothing of what is in them. A copy of what nobody writes meanwhile (its
//! writer is dead or stopped) is what that writer's death would have left: readable, as all such state is at any instant.

use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::fs::{
    MemfdFlags, Mode, OFlags, SealFlags, SeekFrom, fcntl_add_seals, fstat, ftruncate, memfd_create, open,
    seek,
};
use rustix::io::{Errno, pread, pwrite};

/// Bytes copied at once.
const CHUNK_BYTES: usize = 256 << 10;

/// Memory of a fixed size; it is taken as it is written.
///
/// # Errors
/// The system's: no memory, no descriptors.
pub(crate) fn create(name: &str, bytes: u64) -> Result<OwnedFd, Errno> {
    let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&fd, bytes)?;
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(fd)
}

/// Bytes of a memory.
///
/// # Errors
/// The system's.
pub(crate) fn bytes(fd: impl AsFd) -> Result<u64, Errno> {
    Ok(u64::try_from(fstat(fd)?.st_size).unwrap_or(0))
}

/// A copy that can be written.
///
/// # Errors
/// The system's.
pub(crate) fn duplicate(name: &str, from: impl AsFd) -> Result<OwnedFd, Errno> {
    let copy = create(name, bytes(&from)?)?;
    copy_data(from, &copy, 0)?;
    Ok(copy)
}

/// One memory with a copy of each, one behind the other, that nobody can change any more and the descriptor can only read.
///
/// # Errors
/// The system's.
pub(crate) fn sealed_copies<F: AsFd>(from: impl IntoIterator<Item = F>) -> Result<OwnedFd, Errno> {
    let copies = memfd_create("vmgmt-copies", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut end = 0;
    for from in from {
        let bytes = bytes(&from)?;
        ftruncate(&copies, end + bytes)?;
        copy_data(from, &copies, end)?;
        end += bytes;
    }
    fcntl_add_seals(
        &copies,
        SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL,
    )?;
    // Linux before 6.7 maps write-sealed memory by such a descriptor only.
    let path = format!("/proc/self/fd/{}", copies.as_raw_fd());
    open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}

/// Copies what was ever written, not the holes between.
fn copy_data(from: impl AsFd, into: impl AsFd, begin: u64) -> Result<(), Errno> {
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut position = 0;
    loop {
        position = match seek(&from, SeekFrom::Data(position)) {
            Ok(data) => data,
            Err(Errno::NXIO) => return Ok(()),
            Err(errno) => return Err(errno),
        };
        let end = seek(&from, SeekFrom::Hole(position))?;
        while position < end {
            let wanted = usize::try_from(end - position)
                .unwrap_or(CHUNK_BYTES)
                .min(CHUNK_BYTES);
            let read = pread(&from, &mut buffer[..wanted], position)?;
            let written = pwrite(&into, &buffer[..read], begin + position)?;
            if written == 0 {
                return Err(Errno::IO);
            }
            position += written as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_hold_the_same_and_a_sealed_one_cannot_be_written() {
        let one = create("one", 16 << 20).unwrap();
        let two = create("two", 8192).unwrap();
        for (fd, at, text) in [
            (&one, 0, b"head"),
            (&one, (16 << 20) - 4, b"tail"),
            (&two, 100, b"last"),
        ] {
            pwrite(fd, text, at).unwrap();
        }
        let copies = sealed_copies([&one, &two]).unwrap();
        let read = |fd: &OwnedFd, at| {
            let mut text = [0; 4];
            pread(fd, &mut text, at).unwrap();
            text
        };
        assert_eq!(bytes(&copies).unwrap(), (16 << 20) + 8192);
        let found = [0, (16 << 20) - 4, (16 << 20) + 100, 4096].map(|at| read(&copies, at));
        assert_eq!(found, [*b"head", *b"tail", *b"last", [0; 4]]);
        assert!(fstat(&copies).unwrap().st_blocks < 2048, "holes stay holes");
        let writable = open(
            format!("/proc/self/fd/{}", copies.as_raw_fd()),
            OFlags::RDWR,
            Mode::empty(),
        );
        assert!(writable.is_err() || pwrite(writable.unwrap(), b"x", 0).is_err());
        let copy = duplicate("copy", &one).unwrap();
        pwrite(&copy, b"mine", 0).unwrap();
        assert_eq!(
            [read(&one, 0), read(&copy, 0), read(&copy, (16 << 20) - 4)],
            [*b"head", *b"mine", *b"tail"]
        );
    }
}
