//! Memory that is shared, in a session that also has memory which is reached by message: while a message is under way, stores to shared memory
//! wait behind it. No completion counts as published, and no interrupt goes out, before the guest can see it.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::VecDeque;
use vmgmt_abi::{Mode, Opcode, Submission};
use vmgmt_device::page::PlainWords;
use vmgmt_device::rings::Output;
use vmgmt_device::rings::testing::{Bed, FlatGuest, FlatMemory, RingPlan};
use vmgmt_device::{Direction, GuestMemory, MemoryError};

/// Shared memory whose stores wait while `held`.
struct Held {
    flat: FlatMemory,
    held: bool,
    waiting: VecDeque<(u64, Vec<u8>)>,
}

impl Held {
    fn put(&mut self, iova: u64, from: &[u8]) -> Result<(), MemoryError> {
        if self.held {
            self.waiting.push_back((iova, from.to_vec()));
            return Ok(());
        }
        match from.len() {
            4 => self
                .flat
                .store_u32(iova, u32::from_le_bytes(from.try_into().unwrap())),
            8 => self
                .flat
                .store_u64(iova, u64::from_le_bytes(from.try_into().unwrap())),
            _ => self.flat.write(iova, from),
        }
    }
    fn release(&mut self) {
        self.held = false;
        for (iova, bytes) in std::mem::take(&mut self.waiting) {
            self.put(iova, &bytes).unwrap();
        }
    }
}

impl GuestMemory for Held {
    fn read(&mut self, iova: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        self.flat.read(iova, into)
    }
    fn write(&mut self, iova: u64, from: &[u8]) -> Result<(), MemoryError> {
        self.put(iova, from)
    }
    fn load_u32(&mut self, iova: u64) -> Result<u32, MemoryError> {
        self.flat.load_u32(iova)
    }
    fn store_u32(&mut self, iova: u64, value: u32) -> Result<(), MemoryError> {
        self.put(iova, &value.to_le_bytes())
    }
    fn store_u64(&mut self, iova: u64, value: u64) -> Result<(), MemoryError> {
        self.put(iova, &value.to_le_bytes())
    }
    fn fence(&mut self) {
        self.flat.fence();
    }
    fn settled(&mut self) -> Result<(), MemoryError> {
        if self.held {
            Err(MemoryError::Pending)
        } else {
            self.flat.settled()
        }
    }
    fn check(&mut self, iova: u64, bytes: u64, direction: Direction) -> Result<(), MemoryError> {
        self.flat.check(iova, bytes, direction)
    }
    fn is_shared(&mut self, iova: u64) -> bool {
        self.flat.is_shared(iova)
    }
    fn prove(&mut self, iova: u64, nonce: u64) -> Result<bool, MemoryError> {
        self.flat.prove(iova, nonce)
    }
}

fn signals(bed: &mut Bed<PlainWords, Held>) -> usize {
    let is_signal = |output: &Output| matches!(output, Output::Signal { .. });
    bed.outputs().iter().filter(|output| is_signal(output)).count()
}

fn bed() -> (Bed<PlainWords, Held>, RingPlan, FlatGuest) {
    let guest = FlatGuest::new(1 << 20);
    let memory = Held {
        flat: FlatMemory::new(&guest),
        held: false,
        waiting: VecDeque::new(),
    };
    let mut bed = Bed::new(&guest, memory, PlainWords::new).unwrap();
    let mut ring = RingPlan::new(0, 0, 8, 8, Mode::CHAT.0);
    bed.enable(&mut ring);
    bed.poll(8);
    bed.end_turn();
    signals(&mut bed);
    (bed, ring, guest)
}

/// NOOP is answered on the shortest way, ECHO with a record and a payload.
const OPCODES: [Opcode; 2] = [Opcode::NOOP, Opcode::ECHO];

fn submit(bed: &Bed<PlainWords, Held>, ring: &mut RingPlan, guest: &FlatGuest, opcode: Opcode) {
    let echo = opcode == Opcode::ECHO;
    let submission = Submission {
        tag: 7,
        opcode: opcode.0,
        buffer: if echo { 0x8_0000 } else { 0 },
        length: if echo { 64 } else { 0 },
        meta_bytes: if echo { 4 } else { 0 },
        ..Submission::default()
    };
    ring.submit(guest, &submission);
    bed.front.ring_doorbell(ring.n, ring.tail);
}

#[test]
fn no_interrupt_goes_out_before_its_completion_can_be_seen() {
    OPCODES.into_iter().for_each(seen);
}

fn seen(opcode: Opcode) {
    let (mut bed, mut ring, guest) = bed();
    bed.memory.held = true;
    submit(&bed, &mut ring, &guest, opcode);
    bed.touch();
    bed.poll(8);
    bed.end_turn();
    assert_eq!((signals(&mut bed), ring.take(&guest)), (0, None));
    bed.memory.release();
    bed.poll(8);
    bed.end_turn();
    assert_eq!(signals(&mut bed), 1);
    assert_eq!(ring.take(&guest).map(|completion| completion.tag), Some(7));
}

#[test]
fn a_core_that_dies_with_stores_behind_a_message_has_published_nothing() {
    OPCODES.into_iter().for_each(lost);
}

fn lost(opcode: Opcode) {
    let (mut bed, mut ring, guest) = bed();
    bed.memory.held = true;
    submit(&bed, &mut ring, &guest, opcode);
    bed.touch();
    bed.poll(8);
    bed.end_turn();
    // What waited is lost with it.
    bed.memory.waiting.clear();
    bed.memory.held = false;
    bed.replace_core(PlainWords::new).unwrap();
    bed.touch();
    bed.poll(8);
    bed.end_turn();
    assert!(signals(&mut bed) > 0);
    assert_eq!(ring.take(&guest).map(|completion| completion.tag), Some(7));
}
