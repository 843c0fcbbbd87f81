//! Operations of every mode: nothing, echo, proof of shared memory, who am I.

use vmgmt_abi::{NAME_BYTES_MAX, Opcode};

use crate::channel::Request;
use crate::client::Client;
use crate::error::{DriverError, Result};
use crate::memory::Buffer;

/// Who the host says this VM is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub number: u64,
    pub name: String,
}

impl Client {
    /// Does nothing, there and back.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn noop(&mut self) -> Result<()> {
        self.call(Request::new(Opcode::NOOP)).map(drop)
    }

    /// Sends up to 4,096 bytes to the host and gets them back.
    ///
    /// # Errors
    /// As [`Client::call`]; too many bytes.
    pub fn echo(&mut self, bytes: &[u8]) -> Result<Vec<u8>> {
        let finished = self.call_with(Request::new(Opcode::ECHO), bytes, bytes.len())?;
        let count = finished.result_bytes(bytes.len())?;
        self.take_data(finished, count)
    }

    /// The same within a buffer of the caller's: `bytes` bytes at `start`, echoed behind them.
    ///
    /// # Errors
    /// As [`Client::call`]; out of range.
    pub fn echo_in_place(&mut self, buffer: &Buffer, start: usize, bytes: usize) -> Result<usize> {
        let length = bytes
            .checked_mul(2)
            .ok_or_else(|| DriverError::BadArgument("length".into()))?;
        let finished = self.call(Request::new(Opcode::ECHO).output(buffer, start, length, bytes))?;
        finished.result_bytes(bytes)
    }

    /// Whether the host sees this memory directly (true) or by messages (false).
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn prove(&mut self, buffer: &Buffer, nonce: u64) -> Result<bool> {
        buffer.store64(0, nonce)?;
        let finished = self.call(Request::new(Opcode::PROVE).argument(nonce).input(buffer, 0, 8, 0))?;
        match finished.result {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(DriverError::contract(format!("PROVE gave {other}"))),
        }
    }

    /// The number and name that the host knows this VM by.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn identity(&mut self) -> Result<Identity> {
        let finished = self.call_with(Request::new(Opcode::IDENTITY), &[], NAME_BYTES_MAX)?;
        let bytes = usize::try_from(finished.extra)
            .ok()
            .filter(|bytes| *bytes <= NAME_BYTES_MAX);
        let bytes =
            bytes.ok_or_else(|| DriverError::contract(format!("a name of {} bytes", finished.extra)))?;
        let number = finished.result;
        let name = String::from_utf8_lossy(&self.take_data(finished, bytes)?).into_owned();
        Ok(Identity { number, name })
    }
}
