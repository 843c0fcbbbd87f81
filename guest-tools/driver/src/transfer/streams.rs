//! Transfers over streams, from VM to VM and with the host.
//!
//! Comes in: a stream, and a source or a sink. Goes out: bytes in order, their count and crc32, for both sides.

use vmgmt_abi::{Opcode, Status};

use super::{Chunk, Progress, Sink, Source, Tally, TransferOptions, Transferred};
use crate::channel::Request;
use crate::client::Client;
use crate::error::{DriverError, Result};

impl Client {
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
