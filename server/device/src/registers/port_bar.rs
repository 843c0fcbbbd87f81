//! BAR2: the registers of the port window.
//!
//! In: accesses of 1, 2 and 4 bytes. Out: values; submissions on the front page. Must never know: what a submission means.

use super::function::Function;
use crate::page::{PortSubmission, Words};
use vmgmt_abi::port;

impl<W: Words> Function<W> {
    /// Reads BAR2. Registers are read as aligned 32-bit words, DATA as 1, 2 or 4 bytes; anything else gives zeros.
    pub(super) fn read_port_bar(&mut self, offset: u64, into: &mut [u8]) {
        self.take_port_result();
        into.fill(0);
        let Ok(offset) = u32::try_from(offset) else { return };
        if offset == port::DATA {
            if matches!(into.len(), 1 | 2 | 4) {
                self.port.read(into);
            }
            return;
        }
        if into.len() != 4 {
            return;
        }
        let value = match offset {
            port::MAGIC => port::PORT_MAGIC,
            port::ABI_VERSION => vmgmt_abi::ABI_VERSION,
            port::CLAIM => self.port.claim,
            port::MODE => self.port.mode,
            port::STATUS => self.port.status(),
            port::READABLE => self.port.readable() as u32,
            port::WRITABLE => self.port.writable() as u32,
            port::EPOCH => self.page.generation() as u32,
            port::DEVICE_STATE => self.device_state().0.0,
            _ => 0,
        };
        into.copy_from_slice(&value.to_le_bytes());
    }

    /// Writes BAR2.
    pub(super) fn write_port_bar(&mut self, offset: u64, data: &[u8]) {
        self.take_port_result();
        let Ok(offset) = u32::try_from(offset) else { return };
        if offset == port::DATA {
            if matches!(data.len(), 1 | 2 | 4) {
                self.port.write(data);
            }
            return;
        }
        let Ok(word) = <[u8; 4]>::try_from(data) else {
            return;
        };
        let value = u32::from_le_bytes(word);
        match offset {
            port::CLAIM => self.claim_port(value),
            port::MODE if self.port.busy().is_none() => self.port.mode = value,
            port::STATUS => self.port.clear_errors(value),
            port::COMMIT => self.commit_port(),
            port::ABORT => {
                let withdrawn = self.port.abort(self.page.generation());
                self.withdraw_port(withdrawn);
            }
            _ => {}
        }
    }

    /// Copies the core's result into the window, when there is one.
    pub(super) fn take_port_result(&mut self) {
        let Some(sequence) = self.port.busy() else { return };
        if let Some(result) = self.cores.page().and_then(|page| page.port_result(sequence)) {
            self.port.finish(result);
            self.page.set_port_taken(sequence);
            self.touched = true;
        }
    }

    /// Takes a submission back; `sequence` is the one that stands for nothing. Nothing of it is taken: which result was taken last stays said
    /// until the core has heard it.
    pub(super) fn withdraw_port(&mut self, sequence: Option<u64>) {
        if let Some(sequence) = sequence {
            self.page.submit_port(&PortSubmission {
                sequence,
                mode: 0,
                bytes: Vec::new(),
            });
            self.touched = true;
        }
    }

    fn commit_port(&mut self) {
        if let Some((sequence, bytes)) = self.port.commit(self.page.generation()) {
            self.page.submit_port(&PortSubmission {
                sequence,
                mode: self.port.mode,
                bytes,
            });
            self.touched = true;
        }
    }

    fn claim_port(&mut self, value: u32) {
        if value == 0 {
            return;
        }
        if self.port.claim == 0 {
            self.port.claim = value;
        } else if self.port.claim == value {
            self.port.claim = 0;
            let withdrawn = self.port.abort(self.page.generation());
            self.withdraw_port(withdrawn);
        }
    }
}
