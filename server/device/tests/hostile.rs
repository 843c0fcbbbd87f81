//! Guests that lie: memory that changes between reads, set-ups, port submissions and front pages of random content, answers to tokens that
//! never were. Nothing panics, nothing grows without bound, and what is fetched is always in bounds.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use proptest::prelude::*;
use vmgmt_abi::ring::{LIST_ENTRIES_MAX, TRANSFER_BYTES_MAX, event_offset};
use vmgmt_abi::{Mode, Submission};
use vmgmt_device::page::{FrontPage, PlainWords, PortSubmission, RingSetup, Words};
use vmgmt_device::rings::testing::{Bed, FlatGuest, FlatMemory, RingPlan};
use vmgmt_device::rings::{Answer, Buffer, Channel, Fetched, HostFacts, Input, Output, Token};
use vmgmt_device::{Direction, GuestMemory, MemoryError, Tick};
use zerocopy::IntoBytes;

/// Small pseudo-random numbers from a seed (xorshift64*): the same in every run.
#[derive(Clone, Debug)]
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
    /// Mostly near an edge.
    fn edge(&mut self) -> u64 {
        let near = [0, 1, 2, 64, 4096, 1 << 16, 1 << 20, 1 << 32, 1 << 63, u64::MAX];
        let at = near[self.below(near.len() as u64) as usize];
        at.wrapping_add(self.below(5)).wrapping_sub(2)
    }
}

/// Memory that changes under every access, and fails at times.
struct Changing {
    flat: FlatMemory,
    guest: FlatGuest,
    dice: Dice,
    rate: u64,
}

impl Changing {
    fn shake(&mut self) -> Result<(), MemoryError> {
        if self.rate > 0 && self.dice.below(self.rate) == 0 {
            let address = match self.dice.below(3) {
                0 => self.dice.below(128),
                1 => 0x1_0000 + self.dice.below(64 * 64),
                _ => self.dice.below(1 << 18),
            };
            let value = if self.dice.below(2) == 0 {
                self.dice.edge()
            } else {
                self.dice.next()
            };
            self.guest.write(address, &value.to_le_bytes());
        }
        if self.rate > 0 && self.dice.below(self.rate * 8) == 0 {
            return Err(match self.dice.below(4) {
                0 => MemoryError::Quiet,
                1 => MemoryError::Gone { iova: 0 },
                2 => MemoryError::Denied { iova: 0 },
                _ => MemoryError::Unmapped { iova: 0 },
            });
        }
        Ok(())
    }
}

impl GuestMemory for Changing {
    fn read(&mut self, iova: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        self.shake()?;
        self.flat.read(iova, into)
    }
    fn write(&mut self, iova: u64, from: &[u8]) -> Result<(), MemoryError> {
        self.shake()?;
        self.flat.write(iova, from)
    }
    fn load_u32(&mut self, iova: u64) -> Result<u32, MemoryError> {
        assert_eq!(iova % 4, 0);
        self.shake()?;
        self.flat.load_u32(iova)
    }
    fn store_u32(&mut self, iova: u64, value: u32) -> Result<(), MemoryError> {
        assert_eq!(iova % 4, 0);
        self.shake()?;
        self.flat.store_u32(iova, value)
    }
    fn store_u64(&mut self, iova: u64, value: u64) -> Result<(), MemoryError> {
        assert_eq!(iova % 8, 0);
        self.shake()?;
        self.flat.store_u64(iova, value)
    }
    fn fence(&mut self) {
        self.flat.fence();
    }
    fn settled(&mut self) -> Result<(), MemoryError> {
        self.shake()?;
        self.flat.settled()
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

fn bounded(fetched: &Fetched) {
    assert!(fetched.meta.len() <= 4096);
    assert!(fetched.data_bytes <= u64::from(TRANSFER_BYTES_MAX));
    assert!(fetched.data.as_ref().is_none_or(|data| data.len() <= 4096));
    assert!(fetched.opcode.name().is_some());
    assert!(fetched.opcode.mode() == Mode::COMMON || fetched.opcode.mode() == fetched.mode);
}

fn hostile_run(seed: u64, steps: u64, rate: u64, by_messages: bool) {
    let mut dice = Dice(seed | 1);
    let guest = FlatGuest::new(1 << 20);
    let mut flat = FlatMemory::new(&guest);
    flat.set_by_messages(by_messages);
    let memory = Changing {
        flat,
        guest: guest.clone(),
        dice: Dice(seed.rotate_left(17) | 1),
        rate,
    };
    let mut bed = Bed::new(&guest, memory, PlainWords::new).unwrap();
    let mut plan = RingPlan::new(0, 0, 64, 16, 1 + dice.below(2) as u32);
    bed.enable(&mut plan);
    let mut open: Vec<Token> = Vec::new();
    for _ in 0..steps {
        match dice.below(16) {
            0 => {
                let setup = RingSetup {
                    epoch: 0,
                    enabled: dice.below(4) > 0,
                    submissions: dice.edge(),
                    completions: dice.edge(),
                    events: dice.edge(),
                    submission_entries: dice.edge() as u32,
                    completion_entries: dice.edge() as u32,
                    mode: dice.below(7) as u32,
                    vector: dice.next() as u32,
                    nonce: 0,
                };
                bed.front.set_ring(1 + dice.below(15) as usize, &setup);
                bed.touch();
            }
            1 => {
                let bytes = (0..dice.below(4200)).map(|_| dice.below(4) as u8).collect();
                bed.front.submit_port(&PortSubmission {
                    sequence: (bed.front.generation() << 32) | dice.below(1 << 20),
                    mode: dice.below(6) as u32,
                    bytes,
                });
                bed.touch();
            }
            2 => {
                bed.front.set_host_page(dice.edge());
                bed.handle(Input::HostPage(HostFacts {
                    throttled_ns: dice.next(),
                    ..HostFacts::default()
                }));
            }
            3 => {
                let token = if dice.below(2) == 0 && !open.is_empty() {
                    open.swap_remove(dice.below(open.len() as u64) as usize)
                } else {
                    Token {
                        session: 7 + dice.below(2),
                        channel: if dice.below(4) == 0 {
                            Channel::Port
                        } else {
                            Channel::Ring(dice.below(256) as u8)
                        },
                        index: dice.edge() as u32,
                        generation: dice.below(4) as u32,
                    }
                };
                if let Some(Buffer::Guest { segments, bytes }) = bed.rings.buffer(token) {
                    assert!(segments.len() <= LIST_ENTRIES_MAX as usize);
                    assert_eq!(segments.iter().map(|segment| segment.bytes).sum::<u64>(), bytes);
                    assert!(
                        segments
                            .iter()
                            .all(|segment| segment.iova.checked_add(segment.bytes).is_some())
                    );
                }
                bed.rings.port_write(token, dice.edge(), &[1; 9]);
                bed.handle(Input::Complete {
                    token,
                    answer: Answer::ok(1),
                    payload: vec![3; dice.below(100) as usize],
                    confirm: dice.below(2) == 0,
                });
            }
            4 => {
                let event = [0, 4, 8][dice.below(3) as usize];
                guest.store_u32(event, dice.edge() as u32);
            }
            5 => {
                // A reset, and an honest start.
                bed.front.set_generation(bed.front.generation() + 1);
                bed.enable(&mut plan);
            }
            6 => {
                bed.replace_core(PlainWords::new).unwrap();
                bed.touch();
            }
            7 => {
                bed.now = Tick(bed.now.0.saturating_add(dice.edge()));
                bed.rings
                    .handle_timeout(bed.now, &bed.front, &bed.core, &mut bed.memory);
            }
            8 => {
                let _ = bed.arm();
            }
            _ => {
                for _ in 0..dice.below(20) {
                    let mut submission = Submission {
                        tag: dice.below(8) as u32,
                        opcode: [0, 1, 2, 3, 4, 0x102, 0x107, 0x202, 0x203, 0x900][dice.below(10) as usize],
                        ..Submission::default()
                    };
                    if dice.below(3) > 0 {
                        submission.buffer = dice.below(1 << 20) & !15;
                        submission.length = dice.below(300);
                        submission.meta_bytes = dice.below(100) as u32;
                    }
                    if dice.below(4) == 0 {
                        submission.flags = 1;
                        submission.list_entries = dice.below(80) as u32;
                    }
                    if dice.below(6) == 0 {
                        let at = dice.below(64) as usize;
                        submission.as_mut_bytes()[at] = dice.next() as u8;
                    }
                    plan.submit(&guest, &submission);
                }
                bed.front.ring_doorbell(0, plan.tail);
                bed.touch();
                let before = bed.memory.flat.accesses();
                let turn = bed.poll(64);
                assert!(turn.fetched <= 64 + 1);
                // Each submission costs at most its batch's share, its list and its meta, piece by piece.
                assert!(bed.memory.flat.accesses() - before < 64 * (LIST_ENTRIES_MAX as u64 * 2 + 64));
                bed.end_turn();
                while plan.take(&guest).is_some() {}
            }
        }
        bed.memory.flat.deliver();
        while let Some(output) = bed.rings.poll_output() {
            if let Output::Submission(fetched) = output {
                bounded(&fetched);
                open.push(fetched.token);
            }
        }
        assert!(bed.rings.in_flight() <= 16 * 1024);
        open.truncate(1000);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn memory_that_changes_between_reads(seed in any::<u64>(), rate in 0..40u64, by_messages in any::<bool>()) {
        hostile_run(seed, 120, rate, by_messages);
    }

    /// The front is trusted with nothing either: its page is read as it comes.
    #[test]
    fn front_pages_of_any_content(seed in any::<u64>(), words in 50..4000usize) {
        let guest = FlatGuest::new(1 << 20);
        let mut bed = Bed::new(&guest, FlatMemory::new(&guest), PlainWords::new).unwrap();
        let mut dice = Dice(seed | 1);
        let page = PlainWords::new(FrontPage::<PlainWords>::words_needed(8));
        bed.front = FrontPage::new(page.clone());
        bed.front.set_control(1);
        for _ in 0..words {
            let at = if dice.below(2) == 0 { dice.below(600) } else { 64 + dice.below(64) };
            let value = if dice.below(2) == 0 { dice.below(1 << 20) & !63 } else { dice.edge() };
            if at != 5 {
                page.store(at as usize, value);
            }
            if dice.below(8) == 0 {
                bed.touch();
                bed.poll(16);
                bed.end_turn();
                bed.arm();
                bed.outputs();
            }
        }
    }

    /// A table of any content is adopted or refused, and does not bring the core down.
    #[test]
    fn tables_of_any_content(seed in any::<u64>(), words in 1..3000u64) {
        let guest = FlatGuest::new(1 << 20);
        let mut bed = Bed::new(&guest, FlatMemory::new(&guest), PlainWords::new).unwrap();
        let mut plan = RingPlan::new(0, 0, 64, 16, 2);
        bed.enable(&mut plan);
        for tag in 0..9 {
            let submission = Submission { tag, opcode: 0x203, buffer: 0x8_0000, length: 64, ..Submission::default() };
            plan.submit(&guest, &submission);
        }
        bed.poll(64);
        let mut dice = Dice(seed | 1);
        for _ in 0..words {
            let at = match dice.below(3) {
                0 => 1 + dice.below(30),
                1 => 160 + dice.below(8),
                _ => 1024 + dice.below(16 * 12),
            };
            let value = if dice.below(2) == 0 { dice.below(64) } else { dice.edge() };
            bed.state.store(at as usize, value);
        }
        if bed.replace_core(PlainWords::new).is_ok() {
            for _ in 0..4 {
                bed.touch();
                bed.poll(64);
                bed.end_turn();
                bed.outputs();
            }
        }
        guest.store_u32(event_offset::COMPLETION_HEAD, dice.edge() as u32);
        bed.poll(64);
    }

    /// save, a new core, restore: at any step, and the guest sees the same.
    #[test]
    fn a_handoff_at_any_step_is_not_seen(seed in any::<u64>(), at in 0..40u64) {
        let run = |handoff: Option<u64>| {
            let guest = FlatGuest::new(1 << 20);
            let mut bed = Bed::new(&guest, FlatMemory::new(&guest), PlainWords::new).unwrap();
            let mut plan = RingPlan::new(0, 0, 16, 16, 2);
            bed.enable(&mut plan);
            let mut dice = Dice(seed | 1);
            let mut open: Vec<Fetched> = Vec::new();
            let mut seen = Vec::new();
            let mut saved = bed.rings.save();
            for step in 0..40 {
                if handoff == Some(step) {
                    saved = bed.rings.save();
                    bed.replace_core(PlainWords::new).unwrap();
                    bed.rings.restore(&saved).unwrap();
                    assert_eq!(bed.rings.save(), saved);
                    open.clear();
                    bed.touch();
                }
                for tag in 0..dice.below(4) as u32 {
                    if plan.room(&guest) > 0 {
                        let opcode = [0, 0x203, 0x900][dice.below(3) as usize];
                        let length = if opcode == 0x203 { 64 } else { 0 };
                        let tag = step as u32 * 8 + tag;
                        let submission = Submission { tag, opcode, buffer: 0x8_0000, length, ..Submission::default() };
                        plan.submit(&guest, &submission);
                    }
                }
                bed.poll(64);
                for output in bed.outputs() {
                    if let Output::Submission(fetched) = output {
                        open.push(*fetched);
                    }
                }
                if dice.below(2) == 0 && !open.is_empty() {
                    let fetched = open.remove(0);
                    bed.handle(Input::Complete {
                        token: fetched.token,
                        answer: Answer::ok(u64::from(fetched.tag)),
                        payload: vec![1; 3],
                        confirm: false,
                    });
                }
                bed.end_turn();
                bed.outputs();
                while let Some(completion) = plan.take(&guest) {
                    seen.push(completion);
                }
            }
            let counters = bed.rings.counters();
            (seen, counters.completions, saved.version)
        };
        let (plain, count, _) = run(None);
        let (handed, handed_count, version) = run(Some(at));
        prop_assert_eq!((plain, count), (handed, handed_count));
        prop_assert_eq!(version, 1);
    }
}
