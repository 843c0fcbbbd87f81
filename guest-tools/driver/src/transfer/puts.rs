//! Transfers into files: from a source, or from memory by DMA alone.
//!
//! Comes in: a handle, where the bytes are. Goes out: how many went, and their crc32.

use vmgmt_abi::Opcode;

use super::{Chunk, Progress, Source, Tally, TransferOptions, Transferred};
use crate::channel::Request;
use crate::client::Client;
use crate::error::{DriverError, Result};
use crate::memory::Buffer;

impl Client {
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
    pub(super) fn pour(
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
        let start = |client: &mut Self, at, length| {
            let request = Request::new(Opcode::WRITE).handle(handle).offset(at as u64);
            client.start(request.input(memory, at, length, 0))
        };
        self.each_chunk(memory, size, options, start, |client, tally, chunk| {
            tally.add(memory, chunk.start, chunk.length)?;
            let taken = client.await_ok(chunk.tag)?.result_bytes(chunk.length)?;
            if taken < chunk.length {
                return Err(DriverError::contract(format!(
                    "WRITE took {taken} of {} bytes",
                    chunk.length
                )));
            }
            Ok(())
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
}
