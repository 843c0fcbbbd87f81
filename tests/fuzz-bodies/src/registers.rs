//! The register side: any commands of a client, with a core that writes anything into its page and dies at any time. Each request gets one
//! answer, each descriptor is closed once, the page says what the function holds, and packing at any step is invisible.

use crate::edits::edge;
use crate::wire::place;
use arbitrary::{Result, Unstructured};
use std::collections::BTreeSet;
use vmgmt_abi::Status;
use vmgmt_abi::registers::{DeviceState, RingState};
use vmgmt_device::Tick;
use vmgmt_device::page::{CorePage, FrontPage, OpenAnswer, PlainWords, Words};
use vmgmt_device::registers::{Function, Input, MapObject, Output, Settings};
use vmgmt_wire::{
    Command, DmaMap, DmaUnmap, FdSlot, IovaRange, IrqAction, IrqOperation, RegionAccess, RegionWrite, Reply,
    ReplyHandle, SetIrqs,
};

const MAPS: usize = 24;

pub struct Driver {
    pub function: Function<PlainWords>,
    pub front: FrontPage<PlainWords>,
    pub words: PlainWords,
    pub cores: Vec<(u64, PlainWords)>,
    now: Tick,
    sequence: u64,
    owed: BTreeSet<u64>,
    next_slot: u32,
    open_slots: BTreeSet<u32>,
    objects_gone: u64,
}

impl Driver {
    pub fn new(u: &mut Unstructured<'_>) -> Result<Self> {
        let settings = Settings {
            session: 7,
            vm: 3,
            pci_vendor: vmgmt_abi::PCI_VENDOR,
            pci_device: vmgmt_abi::PCI_DEVICE,
            msix: u.arbitrary()?,
            vectors: 1 << u.int_in_range(0..=4u8)?,
            rings: u.int_in_range(1..=16u8)?,
            maps_max: MAPS as u32,
            mapped_bytes_max: 1 << 32,
            objects_max: 4,
            features: 0x0103,
        };
        let words = PlainWords::new(FrontPage::<PlainWords>::words_needed(MAPS));
        Ok(Self {
            function: Function::new(settings, words.clone()).unwrap(),
            front: FrontPage::new(words.clone()),
            words,
            cores: vec![],
            now: Tick(0),
            sequence: 0,
            owed: BTreeSet::new(),
            next_slot: 0,
            open_slots: BTreeSet::new(),
            objects_gone: 0,
        })
    }

    fn handle(&mut self) -> ReplyHandle {
        self.sequence += 1;
        self.owed.insert(self.sequence);
        ReplyHandle {
            sequence: self.sequence,
            message_id: self.sequence as u16,
            command: 9,
            no_reply: false,
            reply_bytes_max: u32::MAX,
        }
    }

    fn request(&mut self, command: Command) {
        let handle = self.handle();
        self.function.handle(self.now, Input::Command { handle, command });
    }

    pub fn step(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        match u.int_in_range(0..=19u8)? {
            0..=2 => {
                let (region, offset) = place(u)?;
                let bytes = if u.ratio(3, 4)? {
                    4
                } else {
                    u.int_in_range(1..=70)?
                };
                if let Some(access) = RegionAccess::new(region, offset, bytes) {
                    self.request(Command::RegionRead(access));
                }
            }
            3..=7 => {
                let write = write(u)?;
                if let Some(write) = write {
                    self.request(Command::RegionWrite(write));
                }
            }
            8 => {
                let mut writes = Vec::new();
                for _ in 0..u.int_in_range(0..=5u8)? {
                    writes.extend(write(u)?);
                }
                self.request(Command::RegionWriteMulti(writes));
            }
            9 | 10 => {
                let map = DmaMap {
                    range: range(u)?,
                    readable: u.arbitrary()?,
                    writable: true,
                    descriptor: None,
                    file_offset: edge(u)? & 0xffff_ffff_f000,
                    descriptor_lost: u.arbitrary()?,
                };
                let object = match u.int_in_range(0..=6u64)? {
                    0 => None,
                    number => Some(MapObject {
                        number,
                        rights: u.int_in_range(0..=3)?,
                    }),
                };
                let handle = self.handle();
                self.function.handle(self.now, Input::Map { handle, map, object });
            }
            11 => {
                let range = range(u)?;
                let unmap = if u.ratio(1, 8)? {
                    DmaUnmap::All
                } else {
                    DmaUnmap::Range(range)
                };
                self.request(Command::DmaUnmap(unmap));
            }
            12 => self.request(Command::DeviceReset),
            13 => self.irqs(u)?,
            14 => match u.int_in_range(0..=5u8)? {
                0 => self.request(Command::DeviceGetInfo),
                1 => self.request(Command::DeviceGetRegionInfo {
                    region: edge(u)? as u32,
                }),
                2 => self.request(Command::DeviceGetIrqInfo {
                    index: edge(u)? as u32,
                }),
                3 => self.request(Command::DeviceGetRegionIoFds {
                    region: edge(u)? as u32,
                }),
                4 => self.function.handle(self.now, Input::Quarantine(u.arbitrary()?)),
                _ => self.function.handle(self.now, Input::Freeze(u.arbitrary()?)),
            },
            15 => self.core_life(u)?,
            16 => {
                // The core stores any word, also while it is read as a record.
                if let Some((_, words)) = self.cores.last() {
                    words.store(u.int_in_range(0..=CorePage::<PlainWords>::WORDS)?, edge(u)?);
                }
            }
            17 => self.core_answers(u)?,
            18 => match u.int_in_range(0..=1u8)? {
                0 => self.function.handle(self.now, Input::Kicked),
                _ => self.function.handle(self.now, Input::UnmaskSignalled),
            },
            _ => {
                self.now = self.now.after_ns(u64::from(u.arbitrary::<u32>()?));
                if self.function.poll_timeout() <= self.now {
                    self.function.handle_timeout(self.now);
                }
            }
        }
        Ok(())
    }

    fn irqs(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let action = *u.choose(&[IrqAction::Mask, IrqAction::Unmask, IrqAction::Trigger])?;
        let start = if u.ratio(1, 8)? {
            edge(u)? as u32
        } else {
            u.int_in_range(0..=17)?
        };
        let count = u.int_in_range(0..=17u32)?;
        let operation = match u.int_in_range(0..=3u8)? {
            0 => IrqOperation::DisableAll,
            1 => {
                let slots = self.next_slot..self.next_slot + count;
                self.next_slot += count;
                self.open_slots.extend(slots.clone());
                IrqOperation::Assign {
                    action,
                    start,
                    eventfds: slots.map(FdSlot).collect(),
                }
            }
            2 => IrqOperation::Deassign { action, start, count },
            _ => IrqOperation::Act { action, start, count },
        };
        let index = u.int_in_range(0..=6)?;
        self.request(Command::DeviceSetIrqs(SetIrqs { index, operation }));
        Ok(())
    }

    fn core_life(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        if u.arbitrary()? {
            // A core that nobody declared dead is still owed: but there are few of those.
            if self.cores.len() < 6 {
                let life = self.cores.last().map_or(1, |(life, _)| life + 1);
                let page = PlainWords::new(CorePage::<PlainWords>::WORDS);
                self.cores.push((life, page.clone()));
                self.function.handle(self.now, Input::CoreBegins { life, page });
            }
        } else {
            let life = u64::from(u.int_in_range(0..=6u8)?);
            self.function.handle(self.now, Input::CoreDead { life });
        }
        Ok(())
    }

    fn core_answers(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let Some((_, words)) = self.cores.last() else {
            return Ok(());
        };
        let core = CorePage::new(words.clone());
        match u.int_in_range(0..=5u8)? {
            0 => core.set_busy(u.arbitrary()?),
            1 => core.set_fenced(self.front.fence()),
            2 => core.set_state(
                self.front.generation(),
                DeviceState(u.int_in_range(0..=6)?),
                Status(u.arbitrary()?),
            ),
            3 => {
                let n = u.int_in_range(0..=16usize)?;
                let epoch = self.front.ring(n).map_or(0, |ring| ring.epoch);
                core.set_open_answer(
                    n,
                    OpenAnswer {
                        epoch,
                        state: *u.choose(&[RingState::OPEN, RingState::REFUSED, RingState::CLOSED])?,
                        status: Status(u.arbitrary()?),
                    },
                );
            }
            4 => {
                let bytes = u.int_in_range(0..=5000usize)?;
                core.set_port_result(self.front.port_sequence(), &vec![u.arbitrary()?; bytes]);
            }
            _ => core.set_raise(u.int_in_range(0..=16)?, edge(u)?),
        }
        Ok(())
    }

    pub fn check(&mut self) {
        while let Some(output) = self.function.poll_output() {
            match output {
                Output::Reply { handle, reply } => {
                    assert!(self.owed.remove(&handle.sequence), "one answer to each request");
                    if let Reply::RegionRead { access, data } = reply {
                        assert_eq!(data.len(), access.bytes() as usize);
                    }
                }
                Output::GiveUp { handle } => assert!(self.owed.remove(&handle.sequence)),
                Output::Close(slot) => assert!(self.open_slots.remove(&slot.0), "closed once"),
                Output::Signal(slot) => assert!(self.open_slots.contains(&slot.0)),
                Output::Vectors { present, eventfds } => {
                    assert_eq!(present.count_ones() as usize, eventfds.len());
                }
                Output::ObjectGone(_) => self.objects_gone += 1,
                Output::WatchUnmask(_) | Output::Touched | Output::Gone => {}
            }
        }
        let held: BTreeSet<u32> = self.function.eventfds().iter().map(|slot| slot.0).collect();
        assert_eq!(held, self.open_slots, "every eventfd is held or was closed");
        let maps: Vec<_> = self.function.maps().copied().collect();
        for pair in maps.windows(2) {
            assert!(pair[0].record.iova + (pair[0].record.bytes - 1) < pair[1].record.iova);
        }
        let on_page = (0..MAPS).filter(|slot| self.front.map(*slot).is_some()).count();
        assert_eq!(on_page, maps.len());
        assert!(self.owed.is_empty() || self.function.waits_for_core());
    }

    /// Packs the function and goes on with what is unpacked.
    pub fn repack(&mut self) {
        let saved = self.function.save().expect("all outputs are polled");
        let mut bytes = Vec::new();
        ciborium::into_writer(&saved, &mut bytes).unwrap();
        let again = ciborium::from_reader(bytes.as_slice()).unwrap();
        self.function = Function::restore(again, self.words.clone(), &self.cores).unwrap();
        assert_eq!(self.function.save(), Some(saved));
    }
}

fn write(u: &mut Unstructured<'_>) -> Result<Option<RegionWrite>> {
    let (region, offset) = place(u)?;
    let data = match u.int_in_range(0..=5u8)? {
        0 => {
            let count = u.int_in_range(0..=70usize)?;
            u.bytes(count.min(u.len()))?.to_vec()
        }
        1 => vec![u.arbitrary()?],
        2 => vec![1, 0, 0, 0],
        _ => (edge(u)? as u32).to_le_bytes().to_vec(),
    };
    Ok(RegionWrite::new(region, offset, data))
}

fn range(u: &mut Unstructured<'_>) -> Result<IovaRange> {
    let (start, bytes) = if u.ratio(1, 6)? {
        (edge(u)?, edge(u)?)
    } else {
        let (page, pages) = (u.int_in_range(0..=40u64)?, u.int_in_range(1..=8u64)?);
        (page << 12, pages << 12)
    };
    IovaRange::new(start, bytes).ok_or(arbitrary::Error::IncorrectFormat)
}

pub fn run(bytes: &[u8]) {
    let mut u = Unstructured::new(bytes);
    let _ = steps(&mut u);
}

fn steps(u: &mut Unstructured<'_>) -> Result<()> {
    let mut driver = Driver::new(u)?;
    let packing: bool = u.arbitrary()?;
    // Later steps of a long input find nothing that earlier ones do not: more inputs do.
    for _ in 0..200 {
        if u.is_empty() {
            break;
        }
        let step = driver.step(u);
        driver.check();
        if packing {
            driver.repack();
        }
        step?;
    }
    Ok(())
}
