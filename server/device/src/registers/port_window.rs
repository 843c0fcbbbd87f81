//! The port window's FIFOs: what a program writes before COMMIT, and what it reads when the core is done.
//!
//! In: bytes, commits, aborts, results. Out: submissions, bytes. Must never know: what a submission means, and the pages.

use serde::{Deserialize, Serialize};
use vmgmt_abi::port::{
    INPUT_BYTES_MAX, OUTPUT_BYTES_MAX, STATUS_BUSY, STATUS_DONE, STATUS_ERROR, STATUS_OVERFLOW,
    STATUS_UNDERFLOW,
};
use vmgmt_abi::ring::{COMPLETION_BYTES, SUBMISSION_BYTES};
use vmgmt_abi::{Completion, Status};
use zerocopy::IntoBytes;

/// Most bytes of the FIFO towards the core.
pub const FIFO_IN_BYTES_MAX: usize = SUBMISSION_BYTES + INPUT_BYTES_MAX;
/// Most bytes of the FIFO towards the guest.
pub const FIFO_OUT_BYTES_MAX: usize = COMPLETION_BYTES + OUTPUT_BYTES_MAX;

/// The window of one session. Its fields are what is saved.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct PortWindow {
    /// Who holds it; 0: nobody.
    pub claim: u32,
    pub mode: u32,
    #[serde(with = "serde_bytes")]
    input: Vec<u8>,
    #[serde(with = "serde_bytes")]
    output: Vec<u8>,
    /// Bytes of `output` that were read.
    taken: usize,
    /// UNDERFLOW, OVERFLOW and ERROR.
    errors: u32,
    /// Sequence of the submission that the core has.
    busy: Option<u64>,
    /// Lower half of the last sequence.
    last: u32,
}

impl PortWindow {
    /// The STATUS register.
    pub fn status(&self) -> u32 {
        let busy = if self.busy.is_some() { STATUS_BUSY } else { 0 };
        let done = if self.readable() > 0 { STATUS_DONE } else { 0 };
        self.errors | busy | done
    }

    /// Clears the error bits that are set in `bits`.
    pub fn clear_errors(&mut self, bits: u32) {
        self.errors &= !bits;
    }

    /// Bytes that a read can give now.
    pub fn readable(&self) -> usize {
        self.output.len().saturating_sub(self.taken)
    }

    /// Bytes that a write can take now.
    pub fn writable(&self) -> usize {
        if self.busy.is_some() {
            0
        } else {
            FIFO_IN_BYTES_MAX.saturating_sub(self.input.len())
        }
    }

    /// The sequence of the submission under way.
    pub const fn busy(&self) -> Option<u64> {
        self.busy
    }

    /// Gives bytes of the result. Beyond its end there are zeros, and UNDERFLOW is set.
    pub fn read(&mut self, into: &mut [u8]) {
        let bytes = self.readable().min(into.len());
        if bytes < into.len() {
            self.errors |= STATUS_UNDERFLOW;
        }
        into.fill(0);
        for (target, source) in into.iter_mut().zip(self.output.iter().skip(self.taken)) {
            *target = *source;
        }
        self.taken += bytes;
    }

    /// Takes bytes; those that do not fit are dropped as a whole, and OVERFLOW is set.
    pub fn write(&mut self, data: &[u8]) {
        if data.len() > self.writable() {
            self.errors |= STATUS_OVERFLOW;
        } else {
            self.input.extend_from_slice(data);
        }
    }

    /// Hands what was written to the core: its sequence and bytes. `None`, and ERROR is set, when it is not a whole submission or one is under way.
    pub fn commit(&mut self, generation: u64) -> Option<(u64, Vec<u8>)> {
        if self.busy.is_some() || self.input.len() < SUBMISSION_BYTES {
            self.errors |= STATUS_ERROR;
            return None;
        }
        let sequence = self.next_sequence(generation);
        self.busy = Some(sequence);
        self.empty_output();
        Some((sequence, std::mem::take(&mut self.input)))
    }

    /// Empties both FIFOs. The sequence under which a submission under way is to be withdrawn, if there is one.
    pub fn abort(&mut self, generation: u64) -> Option<u64> {
        self.input.clear();
        self.empty_output();
        self.busy.take().map(|_| self.next_sequence(generation))
    }

    /// As after power-on, but for the sequence.
    pub fn reset(&mut self, generation: u64) -> Option<u64> {
        let withdrawn = self.abort(generation);
        self.claim = 0;
        self.mode = 0;
        self.errors = 0;
        withdrawn
    }

    /// The core's result of the submission under way. One that is no whole completion comes from a broken core and becomes an error.
    pub fn finish(&mut self, result: Vec<u8>) {
        self.busy = None;
        self.taken = 0;
        self.output = result;
        self.output.truncate(FIFO_OUT_BYTES_MAX);
        if self.output.len() < COMPLETION_BYTES {
            let failed = Completion {
                status: Status::IO_ERROR.0,
                ..Completion::default()
            };
            self.output = failed.as_bytes().to_vec();
        }
    }

    /// Whether saved fields can be those of a window.
    pub fn is_valid(&self) -> bool {
        let fifos = self.input.len() <= FIFO_IN_BYTES_MAX && self.output.len() <= FIFO_OUT_BYTES_MAX;
        let errors = self.errors & !(STATUS_UNDERFLOW | STATUS_OVERFLOW | STATUS_ERROR) == 0;
        fifos && errors && self.taken <= self.output.len() && self.busy != Some(0)
    }

    fn empty_output(&mut self) {
        self.output.clear();
        self.taken = 0;
    }

    fn next_sequence(&mut self, generation: u64) -> u64 {
        // Never 0, which means "none".
        self.last = self.last.checked_add(1).unwrap_or(1);
        (generation << 32) | u64::from(self.last)
    }
}
