//! Transfers of any length: many submissions on one handle, some of them in flight at once.
//!
//! Comes in: a handle or a stream, and a file or memory of this program. Goes out: bytes in order, their count and crc32. The
//! device's DMA lands in the buffer that `write(2)` reads from; nothing is copied in between.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;

use vmgmt_abi::file::SIZE_UNKNOWN;
use vmgmt_abi::{Opcode, Status};

use crate::channel::{Request, Tag};
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

    fn chunks_in_flight(&self, options: &TransferOptions) -> usize {
        options.chunks_in_flight.clamp(1, self.depth())
    }

    /// Reads `offset..end` of an open file into a sink, in order.
    ///
    /// # Errors
    /// A refusal, the sink's error, or `Changed` when the file is shorter than `end`.
    pub fn get(
        &mut self,
        handle: u64,
        offset: u64,
        end: u64,
        sink: &mut dyn Sink,
        options: &TransferOptions,
        progress: Progress<'_>,
    ) -> Result<Transferred> {
        let chunk_bytes = self.chunk_bytes(options);
        let depth = self.chunks_in_flight(options);
        self.guarded(|client, chunks| {
            let mut next = offset;
            let mut tally = Tally::new(options.check);
            loop {
                while chunks.len() < depth && next < end {
                    let length = usize::try_from(end - next).unwrap_or(usize::MAX).min(chunk_bytes);
                    let buffer = client.borrow(chunk_bytes)?;
                    let request = Request::new(Opcode::READ)
                        .handle(handle)
                        .offset(next)
                        .output(&buffer, 0, length, 0);
                    let tag = client.start(request)?;
                    chunks.push_back(Chunk {
                        tag,
                        buffer,
                        start: 0,
                        length,
                    });
                    next += length as u64;
                }
                let Some(chunk) = chunks.pop_front() else {
                    return Ok(tally.end());
                };
                let got = client.await_ok(chunk.tag)?.result_bytes(chunk.length)?;
                tally.add(&chunk.buffer, chunk.start, got)?;
                sink.take(&chunk.buffer, chunk.start, got)?;
                client.give_back(chunk.buffer);
                progress(tally.bytes);
                if got < chunk.length {
                    return Err(DriverError::Changed("the file".into()));
                }
            }
        })
    }

    /// Reads a whole file into memory of its own, by DMA alone. Gives the memory (a little longer than the file) and the bytes.
    ///
    /// # Errors
    /// As [`Self::get`]; no memory.
    pub fn get_to_memory(&mut self, path: &str, options: &TransferOptions) -> Result<(Buffer, Transferred)> {
        let file = self.open_for_reading(path)?;
        let size = usize::try_from(file.size)
            .map_err(|_| DriverError::BadArgument("the file is too large for memory".into()))?;
        let memory = self.allocate(size.max(1))?;
        let read = self.get_into(file.handle, &memory, size, options);
        let read = read.and_then(|done| self.verify(file.handle, path, done).map(|()| done));
        let closed = self.close(file.handle);
        read.and_then(|done| closed.map(|()| (memory, done)))
    }

    /// Reads the first `size` bytes of an open file into memory of the caller, by DMA alone.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub fn get_into(
        &mut self,
        handle: u64,
        memory: &Buffer,
        size: usize,
        options: &TransferOptions,
    ) -> Result<Transferred> {
        let chunk_bytes = self.chunk_bytes(options);
        let depth = self.chunks_in_flight(options);
        self.guarded(|client, chunks| {
            let mut next = 0;
            let mut tally = Tally::new(options.check);
            loop {
                while chunks.len() < depth && next < size {
                    let length = chunk_bytes.min(size - next);
                    let request = Request::new(Opcode::READ).handle(handle).offset(next as u64);
                    let tag = client.start(request.output(memory, next, length, 0))?;
                    chunks.push_back(Chunk {
                        tag,
                        buffer: Buffer::clone(memory),
                        start: next,
                        length,
                    });
                    next += length;
                }
                let Some(Chunk {
                    tag, start, length, ..
                }) = chunks.pop_front()
                else {
                    return Ok(tally.end());
                };
                if client.await_ok(tag)?.result_bytes(length)? < length {
                    return Err(DriverError::Changed("the file".into()));
                }
                tally.add(memory, start, length)?;
            }
        })
    }

    /// Compares a transfer's checksum with what the host computes over the same file.
    ///
    /// # Errors
    /// `Integrity`, or a refusal.
    pub fn verify(&mut self, handle: u64, name: &str, done: Transferred) -> Result<()> {
        let Some(found) = done.checksum else { return Ok(()) };
        let (bytes, expected) = self.checksum(handle, 0, done.bytes)?;
        if bytes != done.bytes {
            return Err(DriverError::Changed(name.to_owned()));
        }
        if expected != found {
            return Err(DriverError::Integrity {
                what: name.to_owned(),
                expected,
                found,
            });
        }
        Ok(())
    }

    /// Fills one chunk from a source, to the brim or to the end.
    fn fill(&self, source: &mut dyn Source, buffer: &Buffer, length: usize) -> Result<usize> {
        let mut filled = 0;
        while filled < length {
            if let Some(descriptor) = source.descriptor() {
                self.wait_readable(descriptor)?;
            }
            match source.fill(buffer, filled, length - filled)? {
                0 => break,
                bytes => filled += bytes,
            }
        }
        Ok(filled)
    }

    /// Sends a source to its end by submissions of one opcode: WRITE (with offsets, from what is tallied already) or STREAM_WRITE.
    fn pour(
        &mut self,
        opcode: Opcode,
        handle: u64,
        source: &mut dyn Source,
        mut tally: Tally,
        options: &TransferOptions,
        progress: Progress<'_>,
    ) -> Result<Transferred> {
        let chunk_bytes = self.chunk_bytes(options);
        let depth = self.chunks_in_flight(options);
        self.guarded(|client, chunks| {
            let mut position = tally.bytes;
            let mut at_end = false;
            let mut done = position;
            loop {
                while chunks.len() < depth && !at_end {
                    let buffer = client.borrow(chunk_bytes)?;
                    let length = client.fill(source, &buffer, chunk_bytes)?;
                    at_end = length < chunk_bytes;
                    if length == 0 {
                        client.give_back(buffer);
                        break;
                    }
                    let request = Request::new(opcode).handle(handle);
                    let request = if opcode == Opcode::WRITE {
                        request.offset(position)
                    } else {
                        request
                    };
                    let tag = client.start(request.input(&buffer, 0, length, 0))?;
                    // While the device reads it, so do we.
                    tally.add(&buffer, 0, length)?;
                    position += length as u64;
                    chunks.push_back(Chunk {
                        tag,
                        buffer,
                        start: 0,
                        length,
                    });
                }
                let Some(chunk) = chunks.pop_front() else {
                    return Ok(tally.end());
                };
                let taken = client.await_ok(chunk.tag)?.result_bytes(chunk.length)?;
                if taken < chunk.length {
                    return Err(DriverError::contract(format!(
                        "{opcode:?} took {taken} of {} bytes",
                        chunk.length
                    )));
                }
                done += taken as u64;
                client.give_back(chunk.buffer);
                progress(done);
            }
        })
    }

    /// Writes a source into a put or an open file, from `offset` on. `prefix`: what is there already (a resumed put), so that count and
    /// checksum are those of the whole.
    ///
    /// # Errors
    /// A refusal, or the source's error.
    pub fn write_all(
        &mut self,
        handle: u64,
        prefix: Option<(u64, u32)>,
        source: &mut dyn Source,
        options: &TransferOptions,
        progress: Progress<'_>,
    ) -> Result<Transferred> {
        let mut tally = Tally::new(options.check);
        if let Some((bytes, checksum)) = prefix {
            tally.bytes = bytes;
            tally.hasher = options
                .check
                .then(|| crc32fast::Hasher::new_with_initial_len(checksum, bytes));
        }
        self.pour(Opcode::WRITE, handle, source, tally, options, progress)
    }

    /// Puts bytes that are in device memory as a file: no copy in this VM.
    ///
    /// # Errors
    /// A refusal.
    pub fn put_from_memory(
        &mut self,
        path: &str,
        memory: &Buffer,
        bytes: usize,
        how: u64,
        options: &TransferOptions,
    ) -> Result<String> {
        let how = how & !vmgmt_abi::file::put::RESUME | options.put_bits();
        let put = self.put(path, bytes as u64, how)?;
        let written = self.write_from(put.handle, memory, bytes, options);
        written
            .and_then(|done| self.commit(put.handle, done.bytes, done.checksum, false))
            .inspect_err(|_| {
                // A refused COMMIT leaves the put open, and its name taken. The first error is the one that matters.
                let _closed = self.close(put.handle);
            })
    }

    /// Writes the first `size` bytes of a memory into a put or an open file.
    ///
    /// # Errors
    /// A refusal.
    pub fn write_from(
        &mut self,
        handle: u64,
        memory: &Buffer,
        size: usize,
        options: &TransferOptions,
    ) -> Result<Transferred> {
        let chunk_bytes = self.chunk_bytes(options);
        let depth = self.chunks_in_flight(options);
        self.guarded(|client, chunks| {
            let mut next = 0;
            let mut tally = Tally::new(options.check);
            loop {
                while chunks.len() < depth && next < size {
                    let length = chunk_bytes.min(size - next);
                    let request = Request::new(Opcode::WRITE).handle(handle).offset(next as u64);
                    let tag = client.start(request.input(memory, next, length, 0))?;
                    chunks.push_back(Chunk {
                        tag,
                        buffer: Buffer::clone(memory),
                        start: next,
                        length,
                    });
                    next += length;
                }
                let Some(Chunk {
                    tag, start, length, ..
                }) = chunks.pop_front()
                else {
                    return Ok(tally.end());
                };
                tally.add(memory, start, length)?;
                let taken = client.await_ok(tag)?.result_bytes(length)?;
                if taken < length {
                    return Err(DriverError::contract(format!(
                        "WRITE took {taken} of {length} bytes"
                    )));
                }
            }
        })
    }

    /// Computes the checksum of the next `bytes` bytes of a source without sending them (the prefix of a resumed put).
    ///
    /// # Errors
    /// The source's error, or it is shorter.
    pub fn skip(&mut self, source: &mut dyn Source, bytes: u64, options: &TransferOptions) -> Result<u32> {
        let chunk_bytes = self.chunk_bytes(options);
        let buffer = self.borrow(chunk_bytes)?;
        let mut tally = Tally::new(true);
        while tally.bytes < bytes {
            let wanted = usize::try_from(bytes - tally.bytes)
                .unwrap_or(usize::MAX)
                .min(chunk_bytes);
            let filled = self.fill(source, &buffer, wanted)?;
            if filled == 0 {
                return Err(DriverError::Changed("the source".into()));
            }
            tally.add(&buffer, 0, filled)?;
        }
        self.give_back(buffer);
        Ok(tally.end().checksum.unwrap_or_default())
    }

    /// Sends a source down a stream and ends it; waits until the receiver has confirmed.
    ///
    /// # Errors
    /// A refusal (also the receiver's), or the source's error.
    pub fn stream_send(
        &mut self,
        stream: u64,
        source: &mut dyn Source,
        options: &TransferOptions,
        progress: Progress<'_>,
    ) -> Result<Transferred> {
        let tally = Tally::new(options.check);
        let done = self.pour(Opcode::STREAM_WRITE, stream, source, tally, options, progress)?;
        self.stream_end(stream, done.bytes, done.checksum)?;
        Ok(done)
    }

    /// Receives a stream to its end. Gives what came and the sender's checksum, which the caller compares (`Transferred::matches`)
    /// before it confirms.
    ///
    /// # Errors
    /// A refusal (also the sender's abort), or the sink's error.
    pub fn stream_receive(
        &mut self,
        stream: u64,
        sink: &mut dyn Sink,
        options: &TransferOptions,
        progress: Progress<'_>,
    ) -> Result<(Transferred, Option<u32>)> {
        let chunk_bytes = self.chunk_bytes(options);
        let depth = self.chunks_in_flight(options);
        self.guarded(|client, chunks| {
            let mut tally = Tally::new(options.check);
            let mut ended: Option<Option<u32>> = None;
            loop {
                while chunks.len() < depth && ended.is_none() {
                    let buffer = client.borrow(chunk_bytes)?;
                    let request =
                        Request::new(Opcode::STREAM_READ)
                            .handle(stream)
                            .output(&buffer, 0, chunk_bytes, 0);
                    let tag = client.start(request)?;
                    chunks.push_back(Chunk {
                        tag,
                        buffer,
                        start: 0,
                        length: chunk_bytes,
                    });
                }
                let Some(chunk) = chunks.pop_front() else {
                    return Ok((tally.end(), ended.flatten()));
                };
                let finished = client.finish(chunk.tag, None)?.ok_or(DriverError::TimedOut)?;
                if ended.is_some() {
                    // Reads that were posted behind the end: they find nothing.
                    if finished.status == Status::OK && finished.result != 0 {
                        return Err(DriverError::contract("bytes behind the end of a stream"));
                    }
                    client.give_back(chunk.buffer);
                    continue;
                }
                let finished = finished.ok()?;
                let got = finished.result_bytes(chunk.length)?;
                if got == 0 && !finished.end() {
                    return Err(DriverError::contract("STREAM_READ gave nothing and no end"));
                }
                tally.add(&chunk.buffer, chunk.start, got)?;
                sink.take(&chunk.buffer, chunk.start, got)?;
                if finished.end() {
                    ended = Some((finished.detail == 1).then_some(finished.extra as u32));
                }
                drop(finished);
                client.give_back(chunk.buffer);
                progress(tally.bytes);
            }
        })
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
