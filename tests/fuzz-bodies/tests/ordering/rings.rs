//! Both sides of a ring under the model checker: wake-ups, and entries that are whole.

use crate::{caught, checked_fence, unless};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vmgmt_abi::ring::{COMPLETION_BYTES, SUBMISSION_BYTES, event_offset};
use vmgmt_abi::{Opcode, Submission};
use vmgmt_device::page::PlainWords;
use vmgmt_device::rings::Output;
use vmgmt_device::rings::testing::{Bed, FlatGuest, FlatMemory, RingPlan};
use vmgmt_device::{Direction, GuestMemory, MemoryError};
use vmgmt_driver::order::{
    self as guest, RingWords, arm, publish, published, take_completion, write_submission,
};
use vmgmt_mem::order as host;

/// Which order is replaced by a weaker one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Weak {
    Nothing,
    GuestFence,
    HostFence,
    /// The guest publishes its tail.
    GuestStore,
    /// The guest looks whether a completion is there.
    GuestLoad,
    /// The device looks at the tail.
    HostLoad,
    /// The device publishes a completion.
    HostStore,
}

/// Entries of each lane: as few as a ring may have, so that three submissions use a slot again.
const ENTRIES: u32 = 2;
const COMPLETIONS: u64 = 0x1000;
const SUBMISSIONS: u64 = 0x1_0000;
/// A buffer for each slot: 8 bytes of input, 8 of output.
const BUFFERS: u64 = 0x1_8000;
const BUFFER_BYTES: u64 = 16;

/// The words of a ring that both sides look at without asking each other, as the checker knows them.
#[derive(Debug)]
struct Shared {
    /// Of the ring's events, by address. The ring of the tests lies at guest address 0.
    events: BTreeMap<u64, loom::sync::atomic::AtomicU32>,
    /// Of submissions, completions and buffers.
    words: BTreeMap<u64, loom::sync::atomic::AtomicU64>,
    weak: Weak,
}

impl Shared {
    fn new(weak: Weak) -> Arc<Self> {
        use event_offset::{
            COMPLETION_EVENT, COMPLETION_HEAD, SUBMISSION_EVENT, SUBMISSION_HEAD, SUBMISSION_TAIL,
        };
        let events = [
            SUBMISSION_TAIL,
            SUBMISSION_HEAD,
            SUBMISSION_EVENT,
            COMPLETION_HEAD,
            COMPLETION_EVENT,
        ];
        let entries = u64::from(ENTRIES);
        let words = [
            SUBMISSIONS..SUBMISSIONS + entries * SUBMISSION_BYTES as u64,
            COMPLETIONS..COMPLETIONS + entries * COMPLETION_BYTES as u64,
            BUFFERS..BUFFERS + entries * BUFFER_BYTES,
        ];
        Arc::new(Self {
            events: events
                .into_iter()
                .map(|at| (at, loom::sync::atomic::AtomicU32::new(0)))
                .collect(),
            words: words
                .into_iter()
                .flat_map(|range| range.step_by(8))
                .map(|at| (at, loom::sync::atomic::AtomicU64::new(0)))
                .collect(),
            weak,
        })
    }

    /// Copies bytes out, word by word; false: they are not the checker's.
    fn copy_out(&self, address: u64, into: &mut [u8], order: Ordering) -> bool {
        if !self.words.contains_key(&(address & !7)) {
            return false;
        }
        for (word, at) in into.chunks_mut(8).zip((address..).step_by(8)) {
            let bytes = self.words[&at].load(order).to_le_bytes();
            word.copy_from_slice(&bytes[..word.len()]);
        }
        true
    }

    fn copy_in(&self, address: u64, from: &[u8], order: Ordering) -> bool {
        if !self.words.contains_key(&(address & !7)) {
            return false;
        }
        for (word, at) in from.as_chunks::<8>().0.iter().zip((address..).step_by(8)) {
            self.words[&at].store(u64::from_le_bytes(*word), order);
        }
        true
    }
}

/// Guest memory for the core: those words are the checker's, the rest is plain. The orders are those of `vmgmt_mem`.
struct CheckedMemory {
    flat: FlatMemory,
    shared: Arc<Shared>,
}

impl GuestMemory for CheckedMemory {
    fn read(&mut self, iova: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        if self.shared.copy_out(iova, into, host::COPY) {
            loom::sync::atomic::fence(host::AFTER_READ);
            return Ok(());
        }
        self.flat.read(iova, into)
    }
    fn write(&mut self, iova: u64, from: &[u8]) -> Result<(), MemoryError> {
        if self.shared.words.contains_key(&(iova & !7)) {
            loom::sync::atomic::fence(host::BEFORE_WRITE);
            self.shared.copy_in(iova, from, host::COPY);
            return Ok(());
        }
        self.flat.write(iova, from)
    }
    fn load_u32(&mut self, iova: u64) -> Result<u32, MemoryError> {
        let order = unless(self.shared.weak == Weak::HostLoad, host::LOAD);
        match self.shared.events.get(&iova) {
            Some(word) => Ok(word.load(order)),
            None => self.flat.load_u32(iova),
        }
    }
    fn store_u32(&mut self, iova: u64, value: u32) -> Result<(), MemoryError> {
        match self.shared.events.get(&iova) {
            Some(word) => {
                word.store(value, host::STORE);
                Ok(())
            }
            None => self.flat.store_u32(iova, value),
        }
    }
    fn store_u64(&mut self, iova: u64, value: u64) -> Result<(), MemoryError> {
        let order = unless(self.shared.weak == Weak::HostStore, host::STORE);
        match self.shared.words.get(&iova) {
            Some(word) => {
                word.store(value, order);
                Ok(())
            }
            None => self.flat.store_u64(iova, value),
        }
    }
    fn fence(&mut self) {
        checked_fence(host::FENCE, self.shared.weak == Weak::HostFence);
    }
    fn settled(&mut self) -> Result<(), MemoryError> {
        self.flat.settled()
    }
    fn check(&mut self, iova: u64, bytes: u64, direction: Direction) -> Result<(), MemoryError> {
        self.flat.check(iova, bytes, direction)
    }
    fn is_shared(&mut self, _: u64) -> bool {
        true
    }
    fn prove(&mut self, iova: u64, nonce: u64) -> Result<bool, MemoryError> {
        self.flat.prove(iova, nonce)
    }
}

/// The same words for the guest's driver: one of its memories, from this guest address on.
struct CheckedWords {
    shared: Arc<Shared>,
    base: u64,
}

impl CheckedWords {
    fn new(shared: &Arc<Shared>, base: u64) -> Self {
        Self {
            shared: Arc::clone(shared),
            base,
        }
    }
}

impl RingWords for CheckedWords {
    fn load32(&self, start: usize) -> vmgmt_driver::Result<u32> {
        Ok(self.shared.events[&(self.base + start as u64)].load(guest::LOAD))
    }
    fn load64(&self, start: usize) -> vmgmt_driver::Result<u64> {
        let order = unless(self.shared.weak == Weak::GuestLoad, guest::LOAD);
        Ok(self.shared.words[&(self.base + start as u64)].load(order))
    }
    fn store32(&self, start: usize, value: u32) -> vmgmt_driver::Result<()> {
        let order = unless(self.shared.weak == Weak::GuestStore, guest::STORE);
        self.shared.events[&(self.base + start as u64)].store(value, order);
        Ok(())
    }
    fn write(&self, start: usize, bytes: &[u8]) -> vmgmt_driver::Result<()> {
        assert!(self.shared.copy_in(self.base + start as u64, bytes, guest::COPY));
        Ok(())
    }
    fn full_fence(&self) {
        checked_fence(guest::FENCE, self.shared.weak == Weak::GuestFence);
    }
}

type CheckedBed = Bed<PlainWords, CheckedMemory>;

/// An open ring with nothing in it.
fn ring(weak: Weak) -> (CheckedBed, Arc<Shared>) {
    let guest = FlatGuest::new(0x2_0000);
    let shared = Shared::new(weak);
    let memory = CheckedMemory {
        flat: FlatMemory::new(&guest),
        shared: Arc::clone(&shared),
    };
    let mut bed = Bed::new(&guest, memory, PlainWords::new).unwrap();
    let mut plan = RingPlan::new(0, 0, ENTRIES, ENTRIES, 1);
    assert_eq!(
        (plan.setup.completions, plan.setup.submissions),
        (COMPLETIONS, SUBMISSIONS)
    );
    bed.enable(&mut plan);
    bed.poll(1);
    bed.outputs();
    (bed, shared)
}

/// The same, with one NOOP that is written but not published, and the guest's words.
fn ring_with_one(weak: Weak) -> (CheckedBed, CheckedWords) {
    let (bed, shared) = ring(weak);
    let submissions = CheckedWords::new(&shared, SUBMISSIONS);
    write_submission(&submissions, ENTRIES, 0, &Submission::default()).unwrap();
    (bed, CheckedWords::new(&shared, 0))
}

/// What the guest knows of its ring, and the driver's code over it.
struct Guest {
    events: CheckedWords,
    submissions: CheckedWords,
    completions: CheckedWords,
    tail: u32,
    head: u32,
}

impl Guest {
    fn new(shared: &Arc<Shared>) -> Self {
        Self {
            events: CheckedWords::new(shared, 0),
            submissions: CheckedWords::new(shared, SUBMISSIONS),
            completions: CheckedWords::new(shared, COMPLETIONS),
            tail: 0,
            head: 0,
        }
    }

    /// Bytes that submission `at` asks to have echoed: of this one alone.
    const fn input(at: u32) -> u64 {
        0x1111_1111_1111_1111 * (at as u64 + 1)
    }

    /// Submits an ECHO, if there is room for it.
    fn submit(&mut self) -> bool {
        let returned = self
            .events
            .load32(event_offset::SUBMISSION_HEAD as usize)
            .unwrap();
        if self.tail.wrapping_sub(returned.min(self.head)) >= ENTRIES {
            return false;
        }
        let buffer = BUFFERS + u64::from(self.tail % ENTRIES) * BUFFER_BYTES;
        let bytes = [Self::input(self.tail).to_le_bytes(), [0; 8]].concat();
        assert!(self.events.shared.copy_in(buffer, &bytes, guest::COPY));
        let submission = Submission {
            tag: self.tail + 1,
            opcode: Opcode::ECHO.0,
            buffer,
            length: BUFFER_BYTES,
            meta_bytes: 8,
            ..Submission::default()
        };
        write_submission(&self.submissions, ENTRIES, self.tail, &submission).unwrap();
        publish(&self.events, self.tail, self.tail + 1).unwrap();
        self.tail += 1;
        true
    }

    /// Takes the next completion, if it is there, and compares all of it.
    fn take(&mut self) -> bool {
        let Some(completion) = take_completion(&self.completions, &self.events, ENTRIES, self.head).unwrap()
        else {
            return false;
        };
        let phase = vmgmt_abi::ring::phase(self.head, ENTRIES);
        let whole = vmgmt_abi::Completion {
            result: 8,
            tag: self.head + 1,
            flags: phase,
            ..vmgmt_abi::Completion::default()
        };
        assert_eq!(completion, whole, "torn: a completion or its submission");
        let output = BUFFERS + u64::from(self.head % ENTRIES) * BUFFER_BYTES + 8;
        let mut echoed = [0; 8];
        assert!(self.events.shared.copy_out(output, &mut echoed, guest::COPY));
        assert_eq!(
            u64::from_le_bytes(echoed),
            Self::input(self.head),
            "torn: what was echoed"
        );
        self.head += 1;
        true
    }
}

/// Submissions, their buffers and completions while both sides are at work, each slot used again; at the end everything is there.
fn entries(weak: Weak) {
    // Three: two use a ring of two, the third comes into a slot of before.
    const SUBMISSIONS_MAX: u32 = 3;
    let mut model = loom::model::Builder::new();
    // Enough to interrupt at any three places; without a bound the tries are too many to end.
    model.preemption_bound = Some(3);
    model.check(move || {
        let (mut bed, shared) = ring(weak);
        let mut guest = Guest::new(&shared);
        let core = loom::thread::spawn(move || {
            for _ in 0..3 {
                bed.poll(ENTRIES);
                bed.end_turn();
            }
            bed
        });
        for _ in 0..SUBMISSIONS_MAX {
            guest.submit();
            guest.take();
        }
        let mut bed = core.join().unwrap();
        for _ in 0..2 * SUBMISSIONS_MAX {
            while guest.tail < SUBMISSIONS_MAX && guest.submit() {}
            bed.poll(ENTRIES);
            bed.end_turn();
            while guest.take() {}
        }
        assert_eq!(
            guest.head, SUBMISSIONS_MAX,
            "lost: a submission or its completion"
        );
    });
}

/// The guest publishes and perhaps rings; the core looks, arms, looks and perhaps sleeps.
fn doorbell(weak: Weak) {
    loom::model(move || {
        let (mut bed, words) = ring_with_one(weak);
        // As after a time in which the core was busy: it wants no doorbell yet.
        words
            .store32(event_offset::SUBMISSION_EVENT as usize, u32::MAX)
            .unwrap();
        let core = loom::thread::spawn(move || {
            let fetched = bed.poll(1).fetched;
            // The shell's rule: it sleeps unless there is work.
            fetched == 0 && !bed.arm()
        });
        let rings = publish(&words, 0, 1).unwrap();
        let sleeps = core.join().unwrap();
        assert!(
            rings || !sleeps,
            "lost: the core sleeps over a submission whose doorbell was spared"
        );
    });
}

/// The core publishes a completion and perhaps signals; the guest arms, looks and perhaps sleeps.
fn interrupt(weak: Weak) {
    loom::model(move || {
        let (mut bed, words) = ring_with_one(weak);
        let completions = CheckedWords::new(&words.shared, COMPLETIONS);
        // The submission is there; the guest has looked at its ring before, and wants no interrupt yet.
        publish(&words, 0, 1).unwrap();
        words
            .store32(event_offset::COMPLETION_EVENT as usize, u32::MAX)
            .unwrap();
        let core = loom::thread::spawn(move || {
            bed.poll(1);
            bed.end_turn();
            let outputs = bed.outputs();
            outputs
                .iter()
                .any(|output| matches!(output, Output::Signal { .. }))
        });
        arm(&words, 0).unwrap();
        let sleeps = published(&completions, ENTRIES, 0).unwrap().is_none();
        let signalled = core.join().unwrap();
        assert!(
            signalled || !sleeps,
            "lost: the guest sleeps over a completion whose interrupt was spared"
        );
    });
}

#[test]
fn no_doorbell_is_lost_in_any_order() {
    doorbell(Weak::Nothing);
}

#[test]
fn no_interrupt_is_lost_in_any_order() {
    interrupt(Weak::Nothing);
}

#[test]
fn nothing_half_written_is_taken_in_any_order() {
    entries(Weak::Nothing);
}

#[test]
fn a_weaker_order_of_an_index_is_caught() {
    for weak in [Weak::GuestStore, Weak::GuestLoad, Weak::HostLoad, Weak::HostStore] {
        caught(&format!("entries with {weak:?}"), || entries(weak));
    }
}

#[test]
fn a_weaker_fence_of_a_ring_is_caught() {
    for weak in [Weak::GuestFence, Weak::HostFence] {
        caught("a doorbell with a weaker fence", || doorbell(weak));
        caught("an interrupt with a weaker fence", || interrupt(weak));
    }
}
