//! Transfers out of files: into a sink, or into memory by DMA alone.
//!
//! Comes in: a handle, where the bytes are to go. Goes out: bytes in order, their count and crc32.

use vmgmt_abi::Opcode;

use super::{Chunk, Progress, Sink, Tally, TransferOptions, Transferred};
use crate::channel::Request;
use crate::client::Client;
use crate::error::{DriverError, Result};
use crate::memory::Buffer;

impl Client {
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
        let start = |client: &mut Self, at, length| {
            let request = Request::new(Opcode::READ).handle(handle).offset(at as u64);
            client.start(request.output(memory, at, length, 0))
        };
        self.each_chunk(memory, size, options, start, |client, tally, chunk| {
            if client.await_ok(chunk.tag)?.result_bytes(chunk.length)? < chunk.length {
                return Err(DriverError::Changed("the file".into()));
            }
            tally.add(memory, chunk.start, chunk.length)
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
}
