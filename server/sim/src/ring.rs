//! GARDEN, a guest's ring: its words in guest memory, as a driver sees them. No device is asked anything here.

use crate::limits::RING_ENTRIES;
use crate::ram::Ram;
use std::collections::BTreeMap;
use vmgmt_abi::ring::{COMPLETION_BYTES, SUBMISSION_BYTES, completion_flag, event_due, event_offset, phase};
use vmgmt_abi::{Completion, Mode, Submission};
use zerocopy::{FromBytes, IntoBytes};

const COMPLETIONS: u64 = 0x400;
const SUBMISSIONS: u64 = 0x800;
/// The device's line of the event words.
const DEVICE_LINE: u64 = 64;

/// A ring pair.
#[derive(Clone, Debug)]
pub struct Ring<F> {
    pub n: usize,
    pub mode: Mode,
    pub base: u64,
    pub nonce: u64,
    tail: u32,
    head: u32,
    pub enabled: bool,
    /// Its memory is the device's to write.
    pub prepared: bool,
    /// It was closed, and CLOSED is awaited.
    pub closing: bool,
    /// It waits for its interrupt.
    pub sleeping: bool,
    /// The eventfd's count that was seen.
    pub interrupts_seen: u64,
    /// The tail is to be written to the doorbell.
    pub doorbell_due: bool,
    pub flights: BTreeMap<u32, F>,
}

impl<F> Ring<F> {
    pub const fn new(n: usize, mode: Mode) -> Self {
        Self {
            n,
            mode,
            base: n as u64 * 0x1000,
            nonce: 0,
            tail: 0,
            head: 0,
            enabled: false,
            prepared: false,
            closing: false,
            sleeping: false,
            interrupts_seen: 0,
            doorbell_due: false,
            flights: BTreeMap::new(),
        }
    }

    pub const fn completions(&self) -> u64 {
        self.base + COMPLETIONS
    }
    pub const fn submissions(&self) -> u64 {
        self.base + SUBMISSIONS
    }
    pub const fn tail(&self) -> u32 {
        self.tail
    }

    /// Clears its memory and writes the nonce. From now on the device may write its part.
    pub fn prepare(&mut self, ram: &Ram, nonce: u64) {
        (self.tail, self.head, self.nonce) = (0, 0, nonce);
        self.prepared = true;
        (self.sleeping, self.doorbell_due, self.closing) = (false, false, false);
        ram.write(self.base, &[0; 128]);
        ram.write(self.completions(), &[0; COMPLETION_BYTES * RING_ENTRIES as usize]);
        ram.write(self.base + event_offset::NONCE, &nonce.to_le_bytes());
        ram.expect(self.base + DEVICE_LINE, DEVICE_LINE);
        ram.expect(
            self.completions(),
            COMPLETION_BYTES as u64 * u64::from(RING_ENTRIES),
        );
    }

    /// The device may not write any more.
    pub fn retire(&mut self, ram: &Ram) {
        (self.enabled, self.closing, self.prepared) = (false, false, false);
        ram.forbid(self.base + DEVICE_LINE);
        ram.forbid(self.completions());
    }

    /// Room for a submission, one place kept free for a CANCEL.
    pub fn has_room(&self, ram: &Ram) -> bool {
        let returned = ram.load_u32(self.base + event_offset::SUBMISSION_HEAD);
        let used = self.tail.wrapping_sub(returned);
        used < RING_ENTRIES && (self.flights.len() as u32) < RING_ENTRIES
    }

    /// Writes a submission and publishes it. `suppression`: the device's event word says whether the doorbell is wanted.
    pub fn submit(&mut self, ram: &Ram, submission: &Submission, suppression: bool, flight: F) {
        let slot = u64::from(self.tail % RING_ENTRIES);
        ram.write(
            self.submissions() + slot * SUBMISSION_BYTES as u64,
            submission.as_bytes(),
        );
        let old = self.tail;
        self.tail = old.wrapping_add(1);
        ram.store_u32(self.base + event_offset::SUBMISSION_TAIL, self.tail);
        let event = ram.load_u32(self.base + event_offset::SUBMISSION_EVENT);
        self.doorbell_due |= !suppression || event_due(event, old, self.tail);
        self.flights.insert(submission.tag, flight);
    }

    /// Takes the next completion, if it is there.
    pub fn take(&mut self, ram: &Ram) -> Option<Completion> {
        if !self.prepared {
            return None;
        }
        let at = self.completions() + u64::from(self.head % RING_ENTRIES) * COMPLETION_BYTES as u64;
        let mut bytes = [0; COMPLETION_BYTES];
        ram.read(at, &mut bytes);
        let completion = Completion::read_from_bytes(&bytes).ok()?;
        if completion.flags & completion_flag::PHASE != phase(self.head, RING_ENTRIES) {
            return None;
        }
        self.head = self.head.wrapping_add(1);
        ram.store_u32(self.base + event_offset::COMPLETION_HEAD, self.head);
        Some(completion)
    }

    /// A completion is there that was not taken.
    pub fn has_completion(&self, ram: &Ram) -> bool {
        let mut copy = Ring::<()> {
            flights: BTreeMap::new(),
            n: self.n,
            mode: self.mode,
            base: self.base,
            nonce: self.nonce,
            tail: self.tail,
            head: self.head,
            enabled: self.enabled,
            prepared: self.prepared,
            closing: self.closing,
            sleeping: self.sleeping,
            interrupts_seen: self.interrupts_seen,
            doorbell_due: self.doorbell_due,
        };
        let before = ram.load_u32(self.base + event_offset::COMPLETION_HEAD);
        let there = copy.take(ram).is_some();
        ram.store_u32(self.base + event_offset::COMPLETION_HEAD, before);
        there
    }

    /// Asks for an interrupt with the next completion. The caller then looks once more.
    pub fn arm(&self, ram: &Ram) {
        ram.store_u32(self.base + event_offset::COMPLETION_EVENT, self.head);
    }
}
