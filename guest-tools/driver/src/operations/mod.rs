//! The operations of each mode, typed: names and bytes in, answers out. All work over a ring and over the port window.

pub mod chat;
pub mod common;
pub mod file;
pub mod offer;

use vmgmt_abi::ring::META_BYTES_MAX;

use crate::channel::{Finished, Request};
use crate::client::Client;
use crate::error::{DriverError, Result};

impl Client {
    /// Room for a listing in one submission of this channel.
    pub(crate) fn listing_bytes(&self) -> usize {
        crate::limits::LISTING_BYTES.min(self.data_bytes_max())
    }

    /// Puts input into a buffer with room for `output_bytes` more, lets `request` name it, and calls.
    pub(crate) fn call_with(
        &mut self,
        request: Request,
        meta: &[u8],
        output_bytes: usize,
    ) -> Result<Finished> {
        check_meta(meta)?;
        let buffer = self.borrow(meta.len() + output_bytes)?;
        buffer.write(0, meta)?;
        let request = request.output(&buffer, 0, meta.len() + output_bytes, meta.len());
        let mut finished = self.call(request)?;
        if output_bytes == 0 {
            finished.span = None;
            self.give_back(buffer);
        }
        Ok(finished)
    }

    /// Copies `bytes` bytes of output out of an answer and keeps its buffer for the next call.
    pub(crate) fn take_data(&mut self, mut finished: Finished, bytes: usize) -> Result<Vec<u8>> {
        let copy = finished.data(bytes)?;
        if let Some(span) = finished.span.take() {
            self.give_back(span.memory);
        }
        Ok(copy)
    }
}

pub(crate) fn check_meta(meta: &[u8]) -> Result<()> {
    if meta.len() > META_BYTES_MAX as usize {
        return Err(DriverError::BadArgument(format!(
            "a name of {} bytes is too long",
            meta.len()
        )));
    }
    Ok(())
}

/// Two names in one meta: the first, a NUL, the second.
pub(crate) fn pair(first: &str, second: &str) -> Result<Vec<u8>> {
    if first.contains('\0') || second.contains('\0') {
        return Err(DriverError::BadArgument("a name holds a NUL".into()));
    }
    let mut meta = Vec::with_capacity(first.len() + second.len() + 1);
    meta.extend_from_slice(first.as_bytes());
    meta.push(0);
    meta.extend_from_slice(second.as_bytes());
    Ok(meta)
}
