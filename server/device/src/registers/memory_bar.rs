//! BAR0: what its registers give and do.
//!
//! In: accesses of any width. Out: values; words on the front page. Must never know: guest memory: what a guest wrote into a ring's
//! registers is latched as it is, the core validates it.

use super::bar0::{Half, Register, RingRegister};
use super::function::{Function, Ring};
use crate::page::{RingSetup, Words};
use vmgmt_abi::registers as abi;
use vmgmt_abi::registers::{DeviceState, RingState};
use vmgmt_abi::{Status, ring};

impl<W: Words> Function<W> {
    /// Reads BAR0: one 32-bit register, or two that form a 64-bit value; anything else gives zeros and is counted.
    pub(super) fn read_memory_bar(&mut self, offset: u64, into: &mut [u8]) {
        into.fill(0);
        match (self.decode(offset, into.len()), into.len()) {
            (Some(register), 4) => into.copy_from_slice(&self.read_register(register).to_le_bytes()),
            (Some(register), 8) => {
                let high = Register::decode(offset as u32 + 4).map_or(0, |high| self.read_register(high));
                let value = u64::from(self.read_register(register)) | (u64::from(high) << 32);
                into.copy_from_slice(&value.to_le_bytes());
            }
            _ => self.bad_accesses = self.bad_accesses.saturating_add(1),
        }
    }

    /// Writes BAR0, likewise; the low half of a 64-bit value first.
    pub(super) fn write_memory_bar(&mut self, offset: u64, data: &[u8]) {
        let Some(register) = self.decode(offset, data.len()) else {
            self.bad_accesses = self.bad_accesses.saturating_add(1);
            return;
        };
        if let Ok(word) = <[u8; 4]>::try_from(data) {
            self.write_register(register, u32::from_le_bytes(word));
        } else if let Ok(words) = <[u8; 8]>::try_from(data) {
            let value = u64::from_le_bytes(words);
            self.write_register(register, value as u32);
            if let Some(high) = Register::decode(offset as u32 + 4) {
                self.write_register(high, (value >> 32) as u32);
            }
        }
    }

    /// The state that the guest is shown, and why it is FAILED.
    pub(super) fn device_state(&mut self) -> (DeviceState, Status) {
        if self.quarantined {
            return (DeviceState::QUARANTINED, Status::DENIED);
        }
        self.observe_fences();
        if self.reset_fence.is_some() {
            return (DeviceState::RESETTING, Status::OK);
        }
        // Only failing is the core's to say, and once said it holds until the next reset, whichever core lives then.
        let generation = self.page.generation();
        if let Some((DeviceState::FAILED, cause)) = self.cores.page().and_then(|page| page.state(generation))
        {
            self.failed = Some(cause);
        }
        match self.failed {
            Some(cause) => (DeviceState::FAILED, cause),
            None if self.activated => (DeviceState::ACTIVE, Status::OK),
            None => (DeviceState::BLANK, Status::OK),
        }
    }

    /// Vectors whose interrupt is due, one bit each.
    pub(super) fn pending(&self) -> u32 {
        let Some(page) = self.cores.page() else { return 0 };
        (0..usize::from(self.settings.vectors))
            .filter(|vector| page.raise(*vector) != self.page.ack(*vector))
            .fold(0, |mask, vector| mask | (1 << vector))
    }

    fn decode(&self, offset: u64, bytes: usize) -> Option<Register> {
        let offset = u32::try_from(offset).ok()?;
        let register = Register::decode(offset)?;
        let rings = usize::from(self.settings.rings);
        let exists = !matches!(register, Register::Ring(n, _) | Register::Doorbell(n) if n >= rings);
        let fits = match bytes {
            4 => true,
            8 => register.is_low_half(),
            _ => false,
        };
        (exists && fits).then_some(register)
    }

    fn read_register(&mut self, register: Register) -> u32 {
        match register {
            Register::Magic => vmgmt_abi::MAGIC,
            Register::AbiVersion => vmgmt_abi::ABI_VERSION,
            Register::Features(half) => half.of(self.settings.features),
            Register::FeaturesAck(half) => half.of(self.page.features()),
            Register::State => self.device_state().0.0,
            Register::FailCause => u32::from(self.device_state().1.0),
            Register::RingCount => u32::from(self.settings.rings),
            Register::RingEntriesMax => abi::ENTRIES_MAX,
            Register::Vectors => u32::from(self.settings.vectors),
            Register::CoreLife(half) => half.of(self.page.life()),
            Register::Session(half) => half.of(self.settings.session),
            Register::Generation => self.page.generation() as u32,
            Register::TransferBytesMax => ring::TRANSFER_BYTES_MAX,
            Register::ListEntriesMax => ring::LIST_ENTRIES_MAX,
            Register::BadAccesses => self.bad_accesses,
            Register::InterruptPending => self.pending(),
            Register::InterruptEnable => self.interrupt_enable,
            Register::HostPage(half) => half.of(self.host_page),
            Register::Ring(n, register) => self.read_ring(n, register),
            Register::Control | Register::InterruptAck | Register::Doorbell(_) => 0,
        }
    }

    fn write_register(&mut self, register: Register, value: u32) {
        match register {
            Register::FeaturesAck(half) => self.acknowledge_features(half, value),
            Register::Control if value == abi::CONTROL_RESET => self.reset(),
            Register::InterruptEnable => {
                self.interrupt_enable = value & ((1u32 << self.settings.vectors) - 1);
            }
            Register::InterruptAck => self.acknowledge_interrupts(value),
            Register::HostPage(half) => self.set_host_page(half, value),
            Register::Ring(n, register) => self.write_ring(n, register, value),
            Register::Doorbell(n) => {
                self.page.ring_doorbell(n, value);
                self.touched = true;
            }
            // A reserved value, or a register that is read only.
            _ => self.bad_accesses = self.bad_accesses.saturating_add(1),
        }
    }

    fn acknowledge_features(&mut self, half: Half, value: u32) {
        if self.rings.iter().any(|ring| ring.enabled) {
            return;
        }
        let mut features = self.page.features();
        half.set(&mut features, value);
        self.page.set_features(features & self.settings.features);
        self.touched = true;
    }

    fn acknowledge_interrupts(&mut self, vectors: u32) {
        let Some(page) = self.cores.page() else { return };
        for vector in (0..usize::from(self.settings.vectors)).filter(|vector| vectors & (1 << vector) != 0) {
            self.page.set_ack(vector, page.raise(vector));
        }
    }

    /// The high half latches; the page is 4 KiB aligned.
    fn set_host_page(&mut self, half: Half, value: u32) {
        half.set(&mut self.host_page, value);
        self.host_page &= !0xfff;
        if half == Half::High {
            self.page.set_host_page(self.host_page);
            // The old page may be the guest's again: no DMA to it goes on behind this fence.
            self.page.move_fence();
            self.touched = true;
        }
    }

    fn read_ring(&mut self, n: usize, register: RingRegister) -> u32 {
        self.observe_fences();
        let generation_page = self.cores.page().map(|page| page.open_answer(n));
        let Some(ring) = self.rings.get_mut(n) else {
            return 0;
        };
        match register {
            RingRegister::Submissions(half) => half.of(ring.setup.submissions),
            RingRegister::Completions(half) => half.of(ring.setup.completions),
            RingRegister::Events(half) => half.of(ring.setup.events),
            RingRegister::SubmissionEntries => ring.setup.submission_entries,
            RingRegister::CompletionEntries => ring.setup.completion_entries,
            RingRegister::Mode => ring.setup.mode,
            RingRegister::Vector => ring.setup.vector,
            RingRegister::Nonce(half) => half.of(ring.setup.nonce),
            RingRegister::Enable => u32::from(ring.enabled),
            RingRegister::Epoch => ring.setup.epoch,
            RingRegister::Status => {
                if let Some(answer) = generation_page {
                    ring.hear(answer);
                }
                let (state, status) = ring.status();
                (state.0 & 0xff) | (u32::from(status.0) << 16)
            }
        }
    }

    fn write_ring(&mut self, n: usize, register: RingRegister, value: u32) {
        let Some(ring) = self.rings.get_mut(n) else { return };
        let setup = &mut ring.setup;
        match register {
            RingRegister::Enable => self.enable_ring(n, value),
            RingRegister::Status | RingRegister::Epoch => {
                self.bad_accesses = self.bad_accesses.saturating_add(1);
            }
            // Locked while enabled.
            _ if ring.enabled => {}
            RingRegister::Submissions(half) => half.set(&mut setup.submissions, value),
            RingRegister::Completions(half) => half.set(&mut setup.completions, value),
            RingRegister::Events(half) => half.set(&mut setup.events, value),
            RingRegister::SubmissionEntries => setup.submission_entries = value,
            RingRegister::CompletionEntries => setup.completion_entries = value,
            RingRegister::Mode => setup.mode = value,
            RingRegister::Vector => setup.vector = value,
            RingRegister::Nonce(half) => half.set(&mut setup.nonce, value),
        }
    }

    fn enable_ring(&mut self, n: usize, value: u32) {
        self.observe_fences();
        let ready = self.reset_fence.is_none() && !self.quarantined;
        let Some(ring) = self.rings.get_mut(n) else { return };
        match (value, ring.enabled) {
            (1, false) if ready => {
                ring.enabled = true;
                ring.closing = None;
                ring.answer = None;
                ring.setup.epoch = self.page.set_ring(
                    n,
                    &RingSetup {
                        enabled: true,
                        ..ring.setup
                    },
                );
                self.activated = true;
                self.touched = true;
            }
            (0, true) => {
                ring.close(n, &self.page);
                ring.closing = Some(self.page.move_fence());
                self.touched = true;
                self.observe_fences();
            }
            (0, false) | (1, true) => {}
            _ => self.bad_accesses = self.bad_accesses.saturating_add(1),
        }
    }
}

impl Ring {
    /// What the core says about this ring; only an answer to the present set-up counts, and only a state that the core can give.
    fn hear(&mut self, answer: crate::page::OpenAnswer) {
        let known = matches!(answer.state, RingState::OPEN | RingState::REFUSED);
        if self.enabled && known && answer.epoch == self.setup.epoch {
            self.answer = Some((answer.state, answer.status));
        }
    }

    /// What the guest is shown. A closed ring shows OPEN until no DMA of it goes on.
    fn status(&self) -> (RingState, Status) {
        match (self.enabled, self.closing, self.answer) {
            (true, _, Some(answer)) => answer,
            (true, _, None) => (RingState::OPENING, Status::OK),
            (false, Some(_), _) => (RingState::OPEN, Status::OK),
            (false, None, _) => (RingState::CLOSED, Status::OK),
        }
    }
}
