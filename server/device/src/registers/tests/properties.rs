//! Any sequence of accesses keeps the invariants, and packing at any step is invisible.

use super::*;
use crate::page::{OpenAnswer, Words};
use proptest::prelude::*;
use std::collections::BTreeSet;
use vmgmt_abi::Status;
use vmgmt_abi::registers::{DeviceState, RingState};
use vmgmt_wire::{IrqAction, IrqOperation, SetIrqs};

/// One step of the client, the core or the keeper.
#[derive(Clone, Debug)]
enum Step {
    Read(u32, u64, u32),
    Write(u32, u64, Vec<u8>),
    Map(u64, u64, u64),
    Unmap(u64, u64),
    UnmapAll,
    Reset,
    Irqs(u32, IrqOperation),
    CoreBegins,
    CoreDies,
    /// The core stores any word of its page.
    CoreStores(usize, u64),
    /// The core says something that makes sense.
    CoreAnswers(u8),
    Kick,
    Unmask,
    Time(u64),
    Freeze(bool),
}

fn action() -> impl Strategy<Value = IrqAction> {
    prop_oneof![
        Just(IrqAction::Mask),
        Just(IrqAction::Unmask),
        Just(IrqAction::Trigger)
    ]
}

fn irqs() -> impl Strategy<Value = IrqOperation> {
    prop_oneof![
        Just(IrqOperation::DisableAll),
        (action(), 0u32..4, 1u32..4).prop_map(|(action, start, count)| IrqOperation::Assign {
            action,
            start,
            eventfds: vec![FdSlot(0); count as usize]
        }),
        (action(), 0u32..4, 1u32..4).prop_map(|(action, start, count)| IrqOperation::Deassign {
            action,
            start,
            count
        }),
        (action(), 0u32..4, 1u32..4).prop_map(|(action, start, count)| IrqOperation::Act {
            action,
            start,
            count
        }),
    ]
}

/// Offsets where something is, more often than elsewhere.
fn place() -> impl Strategy<Value = (u32, u64)> {
    prop_oneof![
        4 => (Just(0u32), (0u64..0x1c).prop_map(|n| n * 4)),
        4 => (Just(0u32), (0u64..0x50).prop_map(|n| 0x400 + n * 4)),
        2 => (Just(0u32), (0u64..6).prop_map(|n| 0x2000 + n * 4)),
        6 => (Just(2u32), (0u64..16).prop_map(|n| n * 4)),
        4 => (Just(7u32), 0u64..0xb0),
        1 => (0u32..10, 0u64..0x5000),
    ]
}

fn data() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        3 => prop_oneof![Just(0u32), Just(1), any::<u32>()].prop_map(|word| word.to_le_bytes().to_vec()),
        1 => prop::collection::vec(any::<u8>(), 1..70),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (place(), prop_oneof![Just(4u32), 1u32..70]).prop_map(|((region, offset), bytes)| Step::Read(region, offset, bytes)),
        10 => (place(), data()).prop_map(|((region, offset), data)| Step::Write(region, offset, data)),
        3 => (0u64..40, 1u64..8, 0u64..6).prop_map(|(page, pages, object)| Step::Map(page << 12, pages << 12, object)),
        2 => (0u64..40, 1u64..16).prop_map(|(page, pages)| Step::Unmap(page << 12, pages << 12)),
        1 => Just(Step::UnmapAll),
        1 => Just(Step::Reset),
        2 => (0u32..6, irqs()).prop_map(|(index, operation)| Step::Irqs(index, operation)),
        1 => Just(Step::CoreBegins),
        1 => Just(Step::CoreDies),
        3 => (0usize..CorePage::<PlainWords>::WORDS, any::<u64>()).prop_map(|(word, value)| Step::CoreStores(word, value)),
        3 => any::<u8>().prop_map(Step::CoreAnswers),
        2 => Just(Step::Kick),
        1 => Just(Step::Unmask),
        2 => (0u64..3_000_000_000).prop_map(Step::Time),
        1 => any::<bool>().prop_map(Step::Freeze),
    ]
}

/// Drives a bench; what it says is its outputs.
struct Driver {
    bench: Bench,
    core_words: Vec<(u64, PlainWords)>,
    life: u64,
    next_slot: u32,
    /// Requests without a reply or a giving up yet.
    owed: BTreeSet<u64>,
    open_slots: BTreeSet<u32>,
}

impl Driver {
    fn new(msix: bool) -> Self {
        Self {
            bench: Bench::with(Settings { msix, ..settings() }),
            core_words: vec![],
            life: 0,
            next_slot: 0,
            owed: BTreeSet::new(),
            open_slots: BTreeSet::new(),
        }
    }

    fn request(&mut self, command: Command) {
        let handle = self.bench.handle_of(user::VFIO_USER_REGION_WRITE);
        self.owed.insert(handle.sequence);
        self.bench.input(Input::Command { handle, command });
    }

    fn step(&mut self, step: &Step) {
        match step.clone() {
            Step::Read(region, offset, bytes) => {
                self.request(Command::RegionRead(
                    RegionAccess::new(region, offset, bytes).unwrap(),
                ));
            }
            Step::Write(region, offset, data) => {
                self.request(Command::RegionWrite(
                    RegionWrite::new(region, offset, data).unwrap(),
                ));
            }
            Step::Map(iova, bytes, object) => {
                self.bench.map(iova, bytes, object).unwrap();
            }
            Step::Unmap(iova, bytes) => {
                self.request(Command::DmaUnmap(DmaUnmap::Range(
                    IovaRange::new(iova, bytes).unwrap(),
                )));
            }
            Step::UnmapAll => self.request(Command::DmaUnmap(DmaUnmap::All)),
            Step::Reset => self.request(Command::DeviceReset),
            Step::Irqs(index, mut operation) => {
                if let IrqOperation::Assign { eventfds, .. } = &mut operation {
                    for slot in eventfds {
                        *slot = FdSlot(self.next_slot);
                        self.open_slots.insert(self.next_slot);
                        self.next_slot += 1;
                    }
                }
                self.request(Command::DeviceSetIrqs(SetIrqs { index, operation }));
            }
            Step::CoreBegins => {
                self.life += 1;
                let words = PlainWords::new(CorePage::<PlainWords>::WORDS);
                self.core_words.push((self.life, words.clone()));
                self.bench.input(Input::CoreBegins {
                    life: self.life,
                    page: words,
                });
            }
            Step::CoreDies => self.bench.input(Input::CoreDead { life: self.life }),
            Step::CoreStores(word, value) => {
                if let Some((_, words)) = self.core_words.last() {
                    words.store(word, value);
                }
            }
            Step::CoreAnswers(choice) => self.core_answers(choice),
            Step::Kick => self.bench.input(Input::Kicked),
            Step::Unmask => self.bench.input(Input::UnmaskSignalled),
            Step::Time(nanoseconds) => {
                self.bench.now = self.bench.now.after_ns(nanoseconds);
                if self.bench.function.poll_timeout() <= self.bench.now {
                    self.bench.function.handle_timeout(self.bench.now);
                    self.bench.poll();
                }
            }
            Step::Freeze(frozen) => self.bench.input(Input::Freeze(frozen)),
        }
    }

    fn core_answers(&mut self, choice: u8) {
        let Some((_, words)) = self.core_words.last() else {
            return;
        };
        let core = CorePage::new(words.clone());
        let front = &self.bench.front;
        match choice % 6 {
            0 => core.set_busy(choice & 8 != 0),
            1 => core.set_fenced(front.fence()),
            2 => core.set_state(front.generation(), DeviceState::FAILED, Status(u16::from(choice))),
            3 => {
                let n = usize::from(choice >> 4) % 4;
                let epoch = front.ring(n).map_or(0, |ring| ring.epoch);
                core.set_open_answer(
                    n,
                    OpenAnswer {
                        epoch,
                        state: RingState::OPEN,
                        status: Status::OK,
                    },
                );
            }
            4 => core.set_port_result(front.port_sequence(), &[choice; 64]),
            _ => core.set_raise(usize::from(choice >> 4), u64::from(choice) + 1000),
        }
    }

    /// Packs the function and goes on with what is unpacked.
    fn repack(&mut self) {
        let saved = self.bench.function.save().expect("all outputs are polled");
        let again = saved.clone();
        let words = self.bench.words.clone();
        self.bench.function = Function::restore(saved, words, &self.core_words).unwrap();
        assert_eq!(self.bench.function.save(), Some(again));
    }

    fn check(&mut self) {
        for output in &self.bench.outputs {
            match output {
                Output::Reply { handle, .. } | Output::GiveUp { handle } => {
                    assert!(self.owed.remove(&handle.sequence), "one answer to each request");
                }
                Output::Close(slot) => {
                    assert!(self.open_slots.remove(&slot.0), "closed once");
                }
                Output::Signal(slot) => assert!(self.open_slots.contains(&slot.0)),
                _ => {}
            }
        }
        let held: BTreeSet<u32> = self.bench.function.eventfds().iter().map(|slot| slot.0).collect();
        assert_eq!(held, self.open_slots, "every eventfd is held or was closed");
        let maps: Vec<_> = self.bench.function.maps().copied().collect();
        for pair in maps.windows(2) {
            assert!(pair[0].record.iova + pair[0].record.bytes <= pair[1].record.iova);
        }
        let on_page = (0..MAPS)
            .filter(|slot| self.bench.front.map(*slot).is_some())
            .count();
        assert_eq!(on_page, maps.len());
        for mapped in maps {
            assert_eq!(self.bench.front.map(mapped.slot), Some(mapped.record));
        }
        assert!(self.owed.is_empty() || self.bench.function.waits_for_core());
        assert_eq!(
            self.bench.function.waits_for_core(),
            self.bench.function.poll_timeout() != Tick::NEVER
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn any_accesses_keep_the_invariants_and_packing_is_invisible(
        msix in any::<bool>(),
        steps in prop::collection::vec(step(), 1..120),
    ) {
        let mut plain = Driver::new(msix);
        let mut packed = Driver::new(msix);
        for step in &steps {
            plain.step(step);
            packed.step(step);
            packed.repack();
            prop_assert_eq!(&plain.bench.outputs, &packed.bench.outputs);
            plain.check();
            packed.check();
            plain.bench.outputs.clear();
            packed.bench.outputs.clear();
        }
        let words = |bench: &Bench| -> Vec<u64> {
            let words = bench.words.clone();
            (0..words.len()).map(|index| words.load(index)).collect()
        };
        prop_assert_eq!(words(&plain.bench), words(&packed.bench));
    }
}
