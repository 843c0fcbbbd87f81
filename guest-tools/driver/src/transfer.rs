//! Transfers of any length: many submissions on one handle, some of them in flight at once.
//!
//! Comes in: a handle or a stream, and a file or memory of this program. Goes out: bytes in order, their count and crc32. The
//! device's DMA lands in the buffer that `write(2)` reads from; nothing is copied in between. Here stands what all of them share; how bytes come is in
//! `gets`, how they go in `puts`, and both between VMs in `streams`.

mod gets;
mod puts;
mod streams;

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;

use vmgmt_abi::file::SIZE_UNKNOWN;

use crate::channel::Tag;
use crate::client::Client;
use crate::error::{DriverError, Result};
use crate::limits::{CHUNK_BYTES_DEFAULT, CHUNKS_IN_FLIGHT_DEFAULT};
use crate::memory::{Buffer, DmaMemory};

/// How a transfer is cut up.
#[derive(Clone, Copy, Debug)]
pub struct TransferOptions {
    /// Bytes of one submission; less where the channel takes less.
    pub chunk_bytes: usize,
    /// Submissions in flight.
    pub chunks_in_flight: usize,
    /// Compute a crc32 on the way.
    pub check: bool,
}

impl TransferOptions {
    /// What a PUT says of it: with no checksum to compare at the end, the host works none out either.
    #[must_use]
    pub const fn put_bits(&self) -> u64 {
        if self.check {
            0
        } else {
            vmgmt_abi::file::put::UNCHECKED
        }
    }
}

impl Default for TransferOptions {
    fn default() -> Self {
        Self {
            chunk_bytes: CHUNK_BYTES_DEFAULT,
            chunks_in_flight: CHUNKS_IN_FLIGHT_DEFAULT,
            check: true,
        }
    }
}

/// What went through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transferred {
    pub bytes: u64,
    /// Of all bytes; none when it was not asked for.
    pub checksum: Option<u32>,
}

/// Where bytes go, in order.
pub trait Sink {
    /// Takes `length` bytes at `start`.
    ///
    /// # Errors
    /// The transfer ends with it.
    fn take(&mut self, memory: &DmaMemory, start: usize, length: usize) -> Result<()>;
}

/// Where bytes come from, in order.
pub trait Source {
    /// Fills at most `length` bytes at `start`; 0 at the end.
    ///
    /// # Errors
    /// The transfer ends with it.
    fn fill(&mut self, memory: &DmaMemory, start: usize, length: usize) -> Result<usize>;

    /// A descriptor to wait for before `fill`, when it may block for long.
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// A file of this program: written with `write(2)`, read with `read(2)`, straight from and into the device's buffers.
#[derive(Debug)]
pub struct Descriptor<'a> {
    file: BorrowedFd<'a>,
    name: &'a str,
}

impl<'a> Descriptor<'a> {
    /// A descriptor, and what to call it in errors.
    #[must_use]
    pub const fn new(file: BorrowedFd<'a>, name: &'a str) -> Self {
        Self { file, name }
    }
}

impl Sink for Descriptor<'_> {
    fn take(&mut self, memory: &DmaMemory, start: usize, length: usize) -> Result<()> {
        let mut done = 0;
        while done < length {
            match memory.write_to(self.file, start + done, length - done) {
                Ok(0) => {
                    return Err(DriverError::file(
                        format!("writing {}", self.name),
                        io::ErrorKind::WriteZero,
                    ));
                }
                Ok(bytes) => done += bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(DriverError::file(format!("writing {}", self.name), error)),
            }
        }
        Ok(())
    }
}

impl Source for Descriptor<'_> {
    fn fill(&mut self, memory: &DmaMemory, start: usize, length: usize) -> Result<usize> {
        loop {
            match memory.read_from(self.file, start, length) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => {
                    return other.map_err(|error| DriverError::file(format!("reading {}", self.name), error));
                }
            }
        }
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file)
    }
}

/// Takes everything and keeps nothing, for measuring.
#[derive(Clone, Copy, Debug, Default)]
pub struct Discard;

impl Sink for Discard {
    fn take(&mut self, _memory: &DmaMemory, _start: usize, _length: usize) -> Result<()> {
        Ok(())
    }
}

/// Counts and checks bytes in order.
struct Tally {
    bytes: u64,
    hasher: Option<crc32fast::Hasher>,
}

impl Tally {
    fn new(check: bool) -> Self {
        Self {
            bytes: 0,
            hasher: check.then(crc32fast::Hasher::new),
        }
    }

    fn add(&mut self, memory: &DmaMemory, start: usize, length: usize) -> Result<()> {
        if let Some(hasher) = &mut self.hasher {
            memory.checksum(start, length, hasher)?;
        }
        self.bytes += length as u64;
        Ok(())
    }

    fn end(self) -> Transferred {
        Transferred {
            bytes: self.bytes,
            checksum: self.hasher.map(crc32fast::Hasher::finalize),
        }
    }
}

/// A chunk in flight.
struct Chunk {
    tag: Tag,
    buffer: Buffer,
    start: usize,
    length: usize,
}

/// Chunks in flight, oldest first.
type Chunks = VecDeque<Chunk>;

/// Reports bytes done so far.
pub type Progress<'a> = &'a mut dyn FnMut(u64);

impl Client {
    fn chunk_bytes(&self, options: &TransferOptions) -> usize {
        options.chunk_bytes.clamp(1, self.data_bytes_max())
    }

    /// Runs a transfer; when it fails, the answers still to come go by.
    fn guarded<T>(&mut self, transfer: impl FnOnce(&mut Self, &mut Chunks) -> Result<T>) -> Result<T> {
        let mut chunks = Chunks::new();
        let done = transfer(self, &mut chunks);
        self.abandon(chunks.into_iter().map(|chunk| chunk.tag));
        done
    }

    /// The first `size` bytes of a memory of the caller, chunk by chunk: `start` submits the one at (offset, bytes), `end` takes each in order.
    fn each_chunk(
        &mut self,
        memory: &Buffer,
        size: usize,
        options: &TransferOptions,
        start: impl Fn(&mut Self, usize, usize) -> Result<Tag>,
        end: impl Fn(&mut Self, &mut Tally, &Chunk) -> Result<()>,
    ) -> Result<Transferred> {
        let chunk_bytes = self.chunk_bytes(options);
        let depth = self.chunks_in_flight(options);
        self.guarded(|client, chunks| {
            let mut next = 0;
            let mut tally = Tally::new(options.check);
            loop {
                while chunks.len() < depth && next < size {
                    let length = chunk_bytes.min(size - next);
                    let tag = start(client, next, length)?;
                    chunks.push_back(Chunk {
                        tag,
                        buffer: Buffer::clone(memory),
                        start: next,
                        length,
                    });
                    next += length;
                }
                let Some(chunk) = chunks.pop_front() else {
                    return Ok(tally.end());
                };
                end(client, &mut tally, &chunk)?;
            }
        })
    }

    fn chunks_in_flight(&self, options: &TransferOptions) -> usize {
        options.chunks_in_flight.clamp(1, self.depth())
    }
}

impl Transferred {
    /// Whether two checksums agree; one that is missing agrees with all.
    #[must_use]
    pub fn matches(&self, other: Option<u32>) -> bool {
        self.checksum
            .zip(other)
            .is_none_or(|(mine, theirs)| mine == theirs)
    }
}

/// The size to announce for a source.
#[must_use]
pub const fn announced(size: Option<u64>) -> u64 {
    match size {
        Some(size) => size,
        None => SIZE_UNKNOWN,
    }
}
