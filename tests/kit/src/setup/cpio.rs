//! Setup, the packer: a writer of initramfs archives ("newc" cpio, Linux Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! In: paths, modes and bytes. Out: one archive, padded so that archives may be concatenated.
//! It must never know what the files are for.

use std::io::{self, Write};

/// The kernel wants each archive of a concatenation to begin at a multiple of four; 512 is what cpio itself pads to.
const ARCHIVE_ALIGN_BYTES: usize = 512;

const TYPE_DIRECTORY: u32 = 0o040_000;
const TYPE_FILE: u32 = 0o100_000;
const TYPE_LINK: u32 = 0o120_000;
const TYPE_CHARACTER: u32 = 0o020_000;

/// Writes one archive. Parents must be written before what they hold.
pub struct Writer<W: Write> {
    sink: W,
    written_bytes: usize,
    entries: u32,
}

impl<W: Write> Writer<W> {
    /// Starts an archive that goes into `sink`.
    pub fn new(sink: W) -> Self {
        Self {
            sink,
            written_bytes: 0,
            entries: 0,
        }
    }

    /// A directory `name` (relative, no leading slash) with mode 0755.
    pub fn directory(&mut self, name: &str) -> io::Result<()> {
        self.entry(name, TYPE_DIRECTORY | 0o755, &[], (0, 0))
    }

    /// A file with the permission bits of `mode`.
    pub fn file(&mut self, name: &str, mode: u32, contents: &[u8]) -> io::Result<()> {
        self.entry(name, TYPE_FILE | (mode & 0o7777), contents, (0, 0))
    }

    /// A symbolic link to `target`.
    pub fn link(&mut self, name: &str, target: &str) -> io::Result<()> {
        self.entry(name, TYPE_LINK | 0o777, target.as_bytes(), (0, 0))
    }

    /// A character device node, mode 0600.
    pub fn character_device(&mut self, name: &str, major: u32, minor: u32) -> io::Result<()> {
        self.entry(name, TYPE_CHARACTER | 0o600, &[], (major, minor))
    }

    /// Writes the end mark and the padding, and gives the sink back.
    pub fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, &[], (0, 0))?;
        self.pad(ARCHIVE_ALIGN_BYTES)?;
        self.sink.flush()?;
        Ok(self.sink)
    }

    fn entry(&mut self, name: &str, mode: u32, contents: &[u8], device: (u32, u32)) -> io::Result<()> {
        let size = u32::try_from(contents.len())
            .map_err(|_| io::Error::other(format!("{name} is over 4 GiB: a cpio archive cannot hold it")))?;
        self.entries += 1;
        let name_bytes = name.len() + 1;
        // Fields: inode, mode, uid, gid, links, mtime, size, device (major, minor), node (major, minor), name length, check.
        let header = format!(
            "070701{:08x}{mode:08x}{:08x}{:08x}{:08x}{:08x}{size:08x}{:08x}{:08x}{:08x}{:08x}{name_bytes:08x}{:08x}",
            self.entries, 0, 0, 1, 0, 0, 0, device.0, device.1, 0
        );
        self.put(header.as_bytes())?;
        self.put(name.as_bytes())?;
        self.put(&[0])?;
        self.pad(4)?;
        self.put(contents)?;
        self.pad(4)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written_bytes += bytes.len();
        self.sink.write_all(bytes)
    }

    fn pad(&mut self, align_bytes: usize) -> io::Result<()> {
        let missing = self.written_bytes.next_multiple_of(align_bytes) - self.written_bytes;
        self.put(&[0; ARCHIVE_ALIGN_BYTES][..missing])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_the_layout_the_kernel_reads() {
        let mut archive = Writer::new(Vec::new());
        archive.file("a", 0o644, b"hello").unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[14..22], b"000081a4", "mode");
        assert_eq!(&bytes[54..62], b"00000005", "size");
        assert_eq!(&bytes[94..102], b"00000002", "name with its NUL");
        assert_eq!(&bytes[110..112], b"a\0");
        assert_eq!(&bytes[112..117], b"hello", "contents begin at a multiple of four");
        assert_eq!(&bytes[120..126], b"070701", "so does the next header");
        assert_eq!(bytes.len() % ARCHIVE_ALIGN_BYTES, 0);
    }
}
