//! A device in this process, written against the public trait alone: it shares a memfd with the driver as QEMU shares RAM, runs
//! rings on a thread of its own with event suppression both ways, and can be told to misbehave.
//! Here stand its rings and what a test tells it; what it answers is in `answers`, its registers in `backing`.

mod answers;
mod backing;

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use answers::answer;
use rustix::event::{EventfdFlags, eventfd};
use vmgmt_driver::DmaMemory;
use vmgmt_driver::abi::registers::{self, DeviceState, RING_STRIDE, RINGS, RINGS_MAX, RingState};
use vmgmt_driver::abi::ring::{
    COMPLETION_BYTES, LIST_ENTRY_BYTES, SUBMISSION_BYTES, event_due, event_offset, flag, phase,
};
use vmgmt_driver::abi::{Completion, ListEntry, Opcode, Status, Submission};
use vmgmt_driver::backing::memfd::MemfdMemory;
use vmgmt_driver::backing::{COMMAND_MASTER, COMMAND_MEMORY};
use zerocopy::{FromBytes, IntoBytes};

/// How often a device says that it is resetting.
const RESETTING_READS: u32 = 3;

/// Where guest memory begins for the device.
const BASE: u64 = 0x1_0000_0000;

/// What the device does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mischief {
    None,
    /// Completes with a tag that is not in flight.
    WrongTag,
    /// Completes each submission twice.
    Twice,
    /// Says that more bytes came than there was room for.
    HugeResult,
    /// Moves its head beyond the tail.
    HeadJump,
    /// Answers listings with noise.
    Noise,
    /// Answers everything with a status nobody knows.
    UnknownStatus,
    /// Lets a listing go on for ever.
    EndlessListing,
    /// Answers in an order of its own.
    Reversed,
}

#[derive(Clone, Copy, Default)]
struct FakeRing {
    open: bool,
    submissions: u64,
    completions: u64,
    events: u64,
    submission_entries: u32,
    completion_entries: u32,
    head: u32,
    tail: u32,
    vector: u32,
}

pub struct State {
    registers: BTreeMap<u32, u32>,
    rings: [FakeRing; RINGS_MAX],
    pub mischief: Mischief,
    pub shared: bool,
    pub suppression: bool,
    pub files: BTreeMap<String, Vec<u8>>,
    handles: BTreeMap<u64, String>,
    next_handle: u64,
    /// Receives that wait: ring and submission.
    receives: VecDeque<(usize, Submission)>,
    pub doorbells: u64,
    pub interrupts: u64,
    /// How often the driver took what had come.
    pub taken: u64,
    silent: bool,
    pub resets: u64,
    /// Reads of MAGIC that give all ones.
    pub absent_reads: u32,
    /// So often STATE is still RESETTING.
    pub resetting_reads: u32,
    replace_at_enable: bool,
    /// So many doorbells are not heard.
    pub deaf_doorbells: u64,
    /// Rings stay OPENING.
    pub frozen: bool,
    /// What a register reads as that is not decoded.
    pub undecoded: u32,
    /// No register is reached, whatever COMMAND says.
    pub deaf: bool,
    /// Configuration space is not reached either.
    pub unplugged: bool,
    /// COMMAND of configuration space: without bus mastering the device only waits.
    pub command: u32,
    kicks: u64,
    stop: bool,
}

pub struct Shared {
    pub memory: Arc<MemfdMemory>,
    guest: DmaMemory,
    state: Mutex<State>,
    kick: Condvar,
    /// Interrupts were taken, or no more are to come.
    quiet: Condvar,
    interrupt: Arc<OwnedFd>,
}

pub struct Fake {
    pub shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Fake {
    pub fn new(scattered: bool) -> Arc<Self> {
        let memory = MemfdMemory::new(64 << 20, BASE, scattered).unwrap();
        let guest = DmaMemory::map_file(memory.descriptor(), 0, 64 << 20, BASE).unwrap();
        let state = State {
            registers: BTreeMap::from([
                (registers::STATE, DeviceState::FAILED.0),
                (registers::SESSION_LOW, 7),
            ]),
            rings: [FakeRing::default(); RINGS_MAX],
            mischief: Mischief::None,
            shared: true,
            suppression: true,
            files: BTreeMap::new(),
            handles: BTreeMap::new(),
            next_handle: 1,
            receives: VecDeque::new(),
            doorbells: 0,
            interrupts: 0,
            taken: 0,
            silent: false,
            resets: 0,
            absent_reads: 0,
            resetting_reads: 0,
            replace_at_enable: false,
            deaf_doorbells: 0,
            frozen: false,
            undecoded: u32::MAX,
            deaf: false,
            unplugged: false,
            command: COMMAND_MEMORY,
            kicks: 0,
            stop: false,
        };
        let interrupt = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap());
        let shared = Arc::new(Shared {
            memory,
            guest,
            state: Mutex::new(state),
            kick: Condvar::new(),
            quiet: Condvar::new(),
            interrupt,
        });
        let worker = Arc::clone(&shared);
        let thread = Some(std::thread::spawn(move || worker.run()));
        Arc::new(Self { shared, thread })
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap()
    }

    /// As a restore of the VM does: another session, nothing open.
    pub fn replace(&self) {
        self.state().replace();
    }

    /// The next ring that is enabled meets a restore.
    pub fn replace_at_enable(&self) {
        self.state().replace_at_enable = true;
    }

    /// Somebody else's interrupts on the same line: the next as soon as the driver has taken the one before, until [`Fake::falls_silent`].
    pub fn is_noisy(&self) {
        let mut state = self.state();
        while !state.silent {
            let taken = state.taken;
            rustix::io::write(&self.shared.interrupt, &1_u64.to_ne_bytes()).unwrap();
            while state.taken == taken && !state.silent {
                state = self.shared.quiet.wait(state).unwrap();
            }
        }
    }

    /// Ends that.
    pub fn falls_silent(&self) {
        self.state().silent = true;
        self.shared.quiet.notify_all();
    }

    /// Completes the oldest receive with these bytes.
    pub fn answer_receive(&self, bytes: &[u8], extra: u64, flags: u16) {
        let mut state = self.state();
        let (ring, submission) = state.receives.pop_front().expect("no receive is posted");
        self.shared.write_data(&submission, 0, bytes);
        let completion = Completion {
            result: bytes.len() as u64,
            extra,
            flags,
            ..answer(&submission, Status::OK)
        };
        self.shared.publish(&mut state, ring, &completion);
    }

    /// Rings that were enabled meanwhile open.
    pub fn thaw(&self) {
        let mut state = self.state();
        state.frozen = false;
        for index in 0..RINGS_MAX {
            let status = RINGS + index as u32 * RING_STRIDE + registers::RING_STATUS;
            if state.registers.get(&status) == Some(&RingState::OPENING.0) {
                self.shared.enable(&mut state, index, true);
            }
        }
        state.kicks += 1;
        self.shared.kick.notify_all();
    }

    pub fn open_rings(&self) -> usize {
        self.state().rings.iter().filter(|ring| ring.open).count()
    }

    pub fn receives(&self) -> usize {
        self.state().receives.len()
    }
}

impl State {
    fn is_decoded(&self) -> bool {
        self.command & COMMAND_MEMORY != 0 && !self.deaf
    }

    fn replace(&mut self) {
        let state = self;
        *state.registers.entry(registers::SESSION_LOW).or_default() += 1;
        // As a reset of the function leaves it: without bus mastering, and for a moment with accesses of before under way.
        state.registers.insert(registers::STATE, DeviceState::RESETTING.0);
        state.resetting_reads = RESETTING_READS;
        state.command = COMMAND_MEMORY;
        state.rings = [FakeRing::default(); RINGS_MAX];
        state.handles.clear();
        state.receives.clear();
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.shared.state.lock().unwrap().stop = true;
        self.shared.kick.notify_all();
        let ended = self.thread.take().unwrap().join();
        assert!(ended.is_ok(), "the device's thread panicked");
    }
}

impl Shared {
    fn place(&self, address: u64) -> usize {
        (address - BASE) as usize
    }

    fn entries(&self, submission: &Submission) -> Vec<ListEntry> {
        if submission.flags & flag::LIST == 0 {
            return vec![ListEntry {
                address: submission.buffer,
                length: submission.length,
            }];
        }
        let count = submission.list_entries as usize;
        let bytes = self
            .guest
            .to_vec(self.place(submission.buffer), count * LIST_ENTRY_BYTES)
            .unwrap();
        bytes
            .chunks_exact(LIST_ENTRY_BYTES)
            .map(|entry| ListEntry::read_from_bytes(entry).unwrap())
            .collect()
    }

    fn read_buffer(&self, submission: &Submission) -> Vec<u8> {
        let mut bytes = Vec::new();
        if submission.length > 0 {
            for entry in self.entries(submission) {
                assert!(entry.length > 0);
                bytes.extend(
                    self.guest
                        .to_vec(self.place(entry.address), entry.length as usize)
                        .unwrap(),
                );
            }
        }
        assert_eq!(
            bytes.len() as u64,
            submission.length,
            "the list does not cover the buffer"
        );
        bytes
    }

    /// Writes into the data area, never over the input.
    fn write_data(&self, submission: &Submission, start: usize, bytes: &[u8]) {
        let mut skip = submission.meta_bytes as usize + start;
        let mut rest = bytes;
        for entry in self.entries(submission) {
            let length = entry.length as usize;
            let from = skip.min(length);
            let (part, behind) = rest.split_at((length - from).min(rest.len()));
            self.guest.write(self.place(entry.address) + from, part).unwrap();
            rest = behind;
            skip -= from;
        }
        assert!(rest.is_empty(), "no room for {} bytes", rest.len());
    }

    fn run(&self) {
        let mut state = self.state.lock().unwrap();
        let mut seen = 0;
        while !state.stop {
            let mut worked = false;
            for index in 0..RINGS_MAX {
                if state.rings[index].open && state.command & COMMAND_MASTER != 0 {
                    worked |= self.serve(&mut state, index);
                }
            }
            if worked {
                continue;
            }
            // Arm, fence, look again, sleep.
            for ring in state.rings.iter().filter(|ring| ring.open) {
                self.guest
                    .store32(
                        self.place(ring.events) + event_offset::SUBMISSION_EVENT as usize,
                        ring.head,
                    )
                    .unwrap();
            }
            fence(Ordering::SeqCst);
            let news = state.command & COMMAND_MASTER != 0
                && state
                    .rings
                    .iter()
                    .any(|ring| ring.open && self.tail(ring) != ring.head);
            if !news && state.kicks == seen {
                state = self.kick.wait(state).unwrap();
            }
            seen = state.kicks;
        }
    }

    fn tail(&self, ring: &FakeRing) -> u32 {
        self.guest
            .load32(self.place(ring.events) + event_offset::SUBMISSION_TAIL as usize)
            .unwrap()
    }

    fn serve(&self, state: &mut State, index: usize) -> bool {
        let ring = state.rings[index];
        let tail = self.tail(&ring);
        if tail == ring.head {
            return false;
        }
        let mut taken = Vec::new();
        let mut head = ring.head;
        while head != tail {
            let slot = (head % ring.submission_entries) as usize * SUBMISSION_BYTES;
            let bytes = self
                .guest
                .to_vec(self.place(ring.submissions) + slot, SUBMISSION_BYTES)
                .unwrap();
            taken.push(Submission::read_from_bytes(&bytes).unwrap());
            head = head.wrapping_add(1);
        }
        state.rings[index].head = head;
        let shown = if state.mischief == Mischief::HeadJump {
            head.wrapping_add(1000)
        } else {
            head
        };
        self.guest
            .store32(
                self.place(ring.events) + event_offset::SUBMISSION_HEAD as usize,
                shown,
            )
            .unwrap();
        if state.mischief == Mischief::Reversed {
            taken.reverse();
        }
        for submission in taken {
            if let Some(mut completion) = self.execute(state, index, &submission) {
                let honest = submission.opcode == Opcode::PROVE.0;
                match state.mischief {
                    Mischief::WrongTag if !honest => completion.tag ^= 0x5555,
                    Mischief::Twice if !honest => self.publish(state, index, &completion),
                    Mischief::HugeResult if !honest => completion.result = u64::MAX,
                    Mischief::UnknownStatus if !honest => completion.status = 0x7777,
                    _ => {}
                }
                self.publish(state, index, &completion);
            }
        }
        true
    }

    fn publish(&self, state: &mut State, index: usize, completion: &Completion) {
        let ring = &mut state.rings[index];
        let start =
            self.place(ring.completions) + (ring.tail % ring.completion_entries) as usize * COMPLETION_BYTES;
        let mut completion = *completion;
        completion.flags = completion.flags & !1 | phase(ring.tail, ring.completion_entries);
        let bytes = completion.as_bytes();
        self.guest.write(start, &bytes[..24]).unwrap();
        self.guest
            .store64(start + 24, u64::from_le_bytes(bytes[24..].try_into().unwrap()))
            .unwrap();
        let old = ring.tail;
        ring.tail = old.wrapping_add(1);
        fence(Ordering::SeqCst);
        let event = self
            .guest
            .load32(self.place(ring.events) + event_offset::COMPLETION_EVENT as usize)
            .unwrap();
        if !state.shared || event_due(event, old, ring.tail) {
            state.interrupts += 1;
            rustix::io::write(&self.interrupt, &1_u64.to_ne_bytes()).unwrap();
        }
    }

    fn enable(&self, state: &mut State, index: usize, on: bool) {
        let block = RINGS + index as u32 * RING_STRIDE;
        if on && state.frozen {
            let opening = RingState::OPENING.0;
            state.registers.insert(block + registers::RING_STATUS, opening);
            return;
        }
        let read = |offset: u32| state.registers.get(&(block + offset)).copied().unwrap_or(0);
        let wide = |offset: u32| u64::from(read(offset + 4)) << 32 | u64::from(read(offset));
        let ring = FakeRing {
            open: on,
            submissions: wide(registers::RING_SUBMISSIONS_LOW),
            completions: wide(registers::RING_COMPLETIONS_LOW),
            events: wide(registers::RING_EVENTS_LOW),
            submission_entries: read(registers::RING_SUBMISSION_ENTRIES),
            completion_entries: read(registers::RING_COMPLETION_ENTRIES),
            head: 0,
            tail: 0,
            vector: read(registers::RING_VECTOR),
        };
        if on {
            let nonce = self
                .guest
                .load64(self.place(ring.events) + event_offset::NONCE as usize)
                .unwrap();
            assert_eq!(nonce, wide(registers::RING_NONCE_LOW));
            assert_eq!(ring.vector, 0);
            state.registers.insert(registers::STATE, DeviceState::ACTIVE.0);
        }
        let status = if on { RingState::OPEN } else { RingState::CLOSED };
        state.registers.insert(block + registers::RING_STATUS, status.0);
        state.rings[index] = ring;
        state.receives.retain(|(ring, _)| *ring != index);
    }
}
