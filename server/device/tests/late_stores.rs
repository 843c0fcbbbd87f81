//! Memory that is shared, in a session that also has memory which is reached by message: while a message is under way, stores to shared memory
//! wait behind it. No completion counts as published, and no interrupt goes out, before the guest can see it.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::VecDeque;
use vmgmt_abi::registers::RingState;
use vmgmt_abi::{Mode, Opcode, Submission};
use vmgmt_device::page::PlainWords;
use vmgmt_device::page::{RingSetup, control};
use vmgmt_device::rings::testing::{Bed, FlatGuest, FlatMemory, RingPlan};
use vmgmt_device::rings::{Answer, Channel, Input, Output, Token};
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

/// A ring that is reached by messages, with a delivery whose completion is on its way.
fn on_its_way() -> (Bed<PlainWords, FlatMemory>, RingPlan, FlatGuest, Token) {
    let guest = FlatGuest::new(1 << 20);
    let mut bed = Bed::new(&guest, FlatMemory::new(&guest), PlainWords::new).unwrap();
    bed.memory.set_by_messages(true);
    let mut ring = RingPlan::new(0, 0, 8, 8, Mode::CHAT.0);
    bed.enable(&mut ring);
    let submission = Submission {
        tag: 7,
        opcode: Opcode::RECEIVE.0,
        buffer: 0x8_0000,
        length: 64,
        ..Submission::default()
    };
    ring.submit(&guest, &submission);
    bed.front.ring_doorbell(ring.n, ring.tail);
    let mut token = None;
    while token.is_none() {
        bed.touch();
        bed.poll(8);
        assert!(bed.memory.deliver());
        token = bed.outputs().into_iter().find_map(|output| match output {
            Output::Submission(fetched) => Some(fetched.token),
            _ => None,
        });
    }
    let token = token.unwrap();
    bed.handle(Input::Complete {
        token,
        answer: Answer::ok(4),
        payload: b"mail".to_vec(),
        confirm: true,
    });
    // The payload is there, its completion is given out.
    bed.memory.deliver();
    bed.poll(8);
    bed.outputs();
    (bed, ring, guest, token)
}

fn close(bed: &mut Bed<PlainWords, FlatMemory>, ring: &RingPlan) -> u32 {
    let setup = RingSetup {
        enabled: false,
        ..ring.setup
    };
    let epoch = bed.front.set_ring(ring.n, &setup);
    bed.touch();
    epoch
}

fn is_closed(bed: &Bed<PlainWords, FlatMemory>, epoch: u32) -> bool {
    let answer = bed.core.open_answer(0);
    (answer.epoch, answer.state) == (epoch, RingState::CLOSED)
}

#[test]
fn a_ring_is_closed_when_what_goes_by_message_is_there_and_told() {
    let (mut bed, mut ring, guest, token) = on_its_way();
    let epoch = close(&mut bed, &ring);
    assert!(!is_closed(&bed, epoch) && bed.outputs().is_empty() && ring.take(&guest).is_none());
    assert!(bed.memory.deliver());
    bed.touch();
    assert!(is_closed(&bed, epoch));
    let [published, closed] = bed.outputs().try_into().unwrap();
    assert_eq!(
        published,
        Output::Published {
            token,
            published: true
        }
    );
    assert!(matches!(closed, Output::ChannelClosed { .. }));
    assert_eq!(ring.take(&guest).map(|completion| completion.tag), Some(7));
}

#[test]
fn what_waits_for_bus_mastering_is_dropped_with_its_ring() {
    let (mut bed, mut ring, guest, token) = on_its_way();
    bed.front.set_control(0);
    let epoch = close(&mut bed, &ring);
    assert!(is_closed(&bed, epoch));
    let [published, closed] = bed.outputs().try_into().unwrap();
    assert_eq!(
        published,
        Output::Published {
            token,
            published: false
        }
    );
    assert!(matches!(closed, Output::ChannelClosed { .. }));
    bed.front.set_control(control::BUS_MASTER);
    bed.memory.deliver();
    bed.touch();
    assert_eq!(ring.take(&guest), None);
}

#[test]
fn a_nonce_read_before_the_ring_was_set_up_anew_is_not_believed() {
    let guest = FlatGuest::new(1 << 20);
    let mut bed = Bed::new(&guest, FlatMemory::new(&guest), PlainWords::new).unwrap();
    bed.memory.set_by_messages(true);
    let mut ring = RingPlan::new(0, 0, 8, 8, Mode::CHAT.0);
    bed.enable(&mut ring);
    // The old nonce is read, and its answer waits when the ring is closed and set up with another.
    bed.poll(8);
    assert!(bed.memory.deliver());
    close(&mut bed, &ring);
    ring.setup.nonce ^= 0xff;
    bed.enable(&mut ring);
    for _ in 0..20 {
        bed.touch();
        bed.poll(8);
        bed.memory.deliver();
    }
    let answer = bed.core.open_answer(0);
    assert_eq!((answer.epoch, answer.state), (ring.setup.epoch, RingState::OPEN));
}

#[test]
fn a_core_that_dies_over_a_closed_ring_leaves_the_news_to_the_next() {
    let (mut bed, ring, _, _) = on_its_way();
    close(&mut bed, &ring);
    // This life saw it in the table, and its hub heard nothing.
    bed.replace_core(PlainWords::new).unwrap();
    bed.replace_core(PlainWords::new).unwrap();
    let closed = |output: &Output| {
        matches!(
            output,
            Output::ChannelClosed {
                channel: Channel::Ring(0),
                ..
            }
        )
    };
    assert!(bed.outputs().iter().any(closed));
}

#[test]
fn a_doorbell_that_rings_while_no_completion_slot_is_free_is_not_forgotten() {
    let guest = FlatGuest::new(1 << 20);
    let mut bed = Bed::new(&guest, FlatMemory::new(&guest), PlainWords::new).unwrap();
    bed.memory.set_by_messages(true);
    bed.front.set_features(0);
    let mut ring = RingPlan::new(0, 0, 8, 2, Mode::CHAT.0);
    bed.enable(&mut ring);
    let go_on = |bed: &mut Bed<PlainWords, FlatMemory>| {
        for _ in 0..20 {
            bed.now = bed.now.after_ns(100_000_000);
            bed.poll(8);
            bed.end_turn();
            bed.memory.deliver();
        }
    };
    for (count, first) in [(3, 0), (1, 3)] {
        for tag in first..first + count {
            let submission = Submission {
                tag,
                opcode: Opcode::NOOP.0,
                ..Submission::default()
            };
            ring.submit(&guest, &submission);
        }
        bed.front.ring_doorbell(ring.n, ring.tail);
        bed.touch();
        go_on(&mut bed);
    }
    let mut tags = Vec::new();
    for _ in 0..4 {
        tags.extend(std::iter::from_fn(|| ring.take(&guest)).map(|completion| completion.tag));
        go_on(&mut bed);
    }
    assert_eq!(tags, [0, 1, 2, 3]);
}
