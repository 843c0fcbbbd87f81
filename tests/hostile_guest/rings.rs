//! Rings set up by hand: addresses, sizes, indexes and submissions that an honest driver would never write.

use super::*;
use vmgmt_driver::DmaMemory;
use vmgmt_driver::abi::registers::{self, DeviceState, RING_STRIDE, RINGS, RingState};
use vmgmt_driver::abi::ring::{self, event_offset};
use vmgmt_driver::abi::{Opcode, Submission};
use zerocopy::IntoBytes;

/// What is written into a ring's registers.
#[derive(Clone, Copy)]
struct SetUp {
    submissions: u64,
    completions: u64,
    events: u64,
    submission_entries: u32,
    completion_entries: u32,
    mode: u32,
    vector: u32,
    nonce: u64,
}

/// A ring by hand: one page for each part.
struct HandMade {
    machine: Arc<SocketBacking>,
    memory: DmaMemory,
    setup: SetUp,
}

const SUBMISSIONS: usize = 0;
const COMPLETIONS: usize = 4096;
const EVENTS: usize = 8192;
const NONCE: u64 = 0x1234_5678_9abc_def1;

impl HandMade {
    fn new(machine: &Arc<SocketBacking>) -> Result<Self> {
        let memory = machine.allocate(4 * 4096)?;
        let base = memory.pieces().first().context("no address")?.address;
        memory.store64(EVENTS + event_offset::NONCE as usize, NONCE)?;
        let setup = SetUp {
            submissions: base + SUBMISSIONS as u64,
            completions: base + COMPLETIONS as u64,
            events: base + EVENTS as u64,
            submission_entries: 64,
            completion_entries: 128,
            mode: Mode::FILE.0,
            vector: 0,
            nonce: NONCE,
        };
        Ok(Self {
            machine: machine.clone(),
            memory,
            setup,
        })
    }

    /// Enables ring 0 and waits for what becomes of it.
    fn enable(&self) -> Result<RingState> {
        let machine = &self.machine;
        let block = RINGS;
        let setup = self.setup;
        machine.write32(block + registers::RING_ENABLE, 0)?;
        self.wait_closed()?;
        machine.write64(block + registers::RING_SUBMISSIONS_LOW, setup.submissions)?;
        machine.write64(block + registers::RING_COMPLETIONS_LOW, setup.completions)?;
        machine.write64(block + registers::RING_EVENTS_LOW, setup.events)?;
        machine.write32(
            block + registers::RING_SUBMISSION_ENTRIES,
            setup.submission_entries,
        )?;
        machine.write32(
            block + registers::RING_COMPLETION_ENTRIES,
            setup.completion_entries,
        )?;
        machine.write32(block + registers::RING_MODE, setup.mode)?;
        machine.write32(block + registers::RING_VECTOR, setup.vector)?;
        machine.write64(block + registers::RING_NONCE_LOW, setup.nonce)?;
        machine.write32(block + registers::RING_ENABLE, 1)?;
        wait_until("the ring to be opened or refused", PATIENCE, || {
            let state = RingState(machine.read32(block + registers::RING_STATUS)? & 0xff);
            let device = DeviceState(machine.read32(registers::STATE)?);
            let settled = matches!(state, RingState::OPEN | RingState::REFUSED)
                || device == DeviceState::FAILED
                || (state == RingState::CLOSED && device != DeviceState::RESETTING);
            Ok(settled.then_some(state))
        })
    }

    fn wait_closed(&self) -> Result<()> {
        wait_until("the ring to be closed", PATIENCE, || {
            let state = RingState(self.machine.read32(RINGS + registers::RING_STATUS)? & 0xff);
            Ok((state == RingState::CLOSED).then_some(()))
        })
    }

    /// A reset, to its end.
    fn reset(&self) -> Result<()> {
        self.machine
            .write32(registers::CONTROL, registers::CONTROL_RESET)?;
        wait_until("BLANK", PATIENCE, || {
            Ok((DeviceState(self.machine.read32(registers::STATE)?) == DeviceState::BLANK).then_some(()))
        })
    }

    fn tail(&self, value: u32) -> Result<()> {
        self.memory
            .store32(EVENTS + event_offset::SUBMISSION_TAIL as usize, value)?;
        Ok(self.machine.write32(registers::DOORBELLS, value)?)
    }

    fn submission(&self, slot: usize, submission: &Submission) -> Result<()> {
        Ok(self
            .memory
            .write(SUBMISSIONS + slot * ring::SUBMISSION_BYTES, submission.as_bytes())?)
    }

    /// The statuses of the first completions, once there are `count` (by tag's slot); or the device has failed.
    fn completions(&self, count: usize) -> Result<Option<Vec<u16>>> {
        wait_until("completions, or FAILED", PATIENCE, || {
            if DeviceState(self.machine.read32(registers::STATE)?) == DeviceState::FAILED {
                return Ok(Some(None));
            }
            let mut statuses = Vec::new();
            for slot in 0..count {
                let word = self
                    .memory
                    .load64(COMPLETIONS + slot * ring::COMPLETION_BYTES + 24)?;
                if (word >> 48) & 1 == 0 {
                    return Ok(None);
                }
                statuses.push((word >> 32) as u16);
            }
            Ok(Some(Some(statuses)))
        })
    }
}

#[test]
fn rings_that_are_nowhere_are_refused() -> Result<()> {
    let street = street()?;
    street.during(|| {
        let machine = street.machine(GuestOptions::default())?;
        let good = HandMade::new(&machine)?;
        ensure!(
            good.enable()? == RingState::OPEN,
            "an honest ring made by hand does not open"
        );
        let outside = 0x7000_0000_0000;
        let s = good.setup;
        let bad: Vec<(&str, SetUp)> = vec![
            (
                "submissions outside",
                SetUp {
                    submissions: outside,
                    ..s
                },
            ),
            (
                "completions outside",
                SetUp {
                    completions: outside,
                    ..s
                },
            ),
            ("events outside", SetUp { events: outside, ..s }),
            (
                "submissions across the end",
                SetUp {
                    submissions: machine.memory().base() + machine.memory().bytes() - 64,
                    ..s
                },
            ),
            (
                "an address that wraps",
                SetUp {
                    completions: u64::MAX - 63,
                    ..s
                },
            ),
            (
                "not aligned",
                SetUp {
                    submissions: s.submissions + 8,
                    ..s
                },
            ),
            (
                "events not aligned",
                SetUp {
                    events: s.events + 4,
                    ..s
                },
            ),
            (
                "no entries",
                SetUp {
                    submission_entries: 0,
                    ..s
                },
            ),
            (
                "three entries",
                SetUp {
                    completion_entries: 3,
                    ..s
                },
            ),
            (
                "very many entries",
                SetUp {
                    submission_entries: 1 << 31,
                    ..s
                },
            ),
            (
                "more than the device takes",
                SetUp {
                    completion_entries: 1 << 16,
                    ..s
                },
            ),
            (
                "firmware without a descriptor",
                SetUp {
                    events: 0xfffc_0000,
                    ..s
                },
            ),
            ("no such mode", SetUp { mode: 77, ..s }),
        ];
        for (what, setup) in bad {
            let ring = HandMade {
                machine: machine.clone(),
                memory: machine.allocate(4 * 4096)?,
                setup,
            };
            let state = ring.enable().context(what)?;
            ensure!(state != RingState::OPEN, "{what}: it opened");
            ring.reset().context(what)?;
        }
        street.heals(&machine)
    })
}

#[test]
fn indexes_that_jump_fail_that_device_only() -> Result<()> {
    let street = street()?;
    street.during(|| {
        let machine = street.machine(GuestOptions::default())?;
        for tail in [65, 1000, u32::MAX, 1 << 31, 0x8000_0001] {
            let ring = HandMade::new(&machine)?;
            ensure!(ring.enable()? == RingState::OPEN);
            ring.tail(tail)?;
            wait_until("FAILED", PATIENCE, || {
                Ok((DeviceState(machine.read32(registers::STATE)?) == DeviceState::FAILED).then_some(()))
            })
            .with_context(|| format!("tail {tail:#x}"))?;
            ring.reset()?;
        }
        // Completions "taken" that were never given.
        for head in [1, 200, u32::MAX, 1 << 31] {
            let ring = HandMade::new(&machine)?;
            ensure!(ring.enable()? == RingState::OPEN);
            ring.memory
                .store32(EVENTS + event_offset::COMPLETION_HEAD as usize, head)?;
            for slot in 0..4 {
                ring.submission(
                    slot,
                    &Submission {
                        tag: slot as u32,
                        ..Submission::default()
                    },
                )?;
            }
            ring.tail(4)?;
            ring.completions(4).with_context(|| format!("head {head:#x}"))?;
            ring.reset()?;
        }
        street.heals(&machine)
    })
}

#[test]
fn submissions_that_lie_get_an_error_each() -> Result<()> {
    let street = street()?;
    street.during(|| {
        let machine = street.machine(GuestOptions::default())?;
        let ring = HandMade::new(&machine)?;
        ensure!(ring.enable()? == RingState::OPEN);
        let here = ring.setup.submissions + 3 * 4096;
        let echo = Submission {
            opcode: Opcode::ECHO.0,
            buffer: here,
            length: 64,
            meta_bytes: 32,
            ..Submission::default()
        };
        let list = Submission {
            flags: ring::flag::LIST,
            list_entries: 1,
            ..echo
        };
        let lies = [
            Submission {
                buffer: 0x7000_0000_0000,
                ..echo
            },
            Submission {
                buffer: u64::MAX - 10,
                ..echo
            },
            Submission {
                length: u64::MAX,
                ..echo
            },
            Submission {
                length: (16 << 20) + 1,
                ..echo
            },
            Submission {
                meta_bytes: u32::MAX,
                ..echo
            },
            Submission {
                meta_bytes: 65,
                ..echo
            },
            Submission {
                list_entries: 3,
                ..echo
            },
            Submission {
                list_entries: 0,
                ..list
            },
            Submission {
                list_entries: 4097,
                ..list
            },
            Submission {
                list_entries: u32::MAX,
                ..list
            },
            Submission {
                buffer: here + 8,
                ..list
            },
            Submission {
                buffer: 0x7000_0000_0000,
                ..list
            },
            // The list is a page of zeros: pieces of no length.
            list,
            Submission {
                flags: u16::MAX,
                ..echo
            },
            Submission {
                opcode: u16::MAX,
                ..echo
            },
            Submission {
                buffer: 0xfffc_0000,
                ..echo
            },
        ];
        for (slot, lie) in lies.iter().enumerate() {
            ring.submission(
                slot,
                &Submission {
                    tag: slot as u32,
                    ..*lie
                },
            )?;
        }
        ring.tail(lies.len() as u32)?;
        let statuses = ring.completions(lies.len())?;
        let statuses = statuses.context("a bad submission failed the whole device")?;
        ensure!(
            statuses.iter().all(|status| *status != 0),
            "a lie was believed: {statuses:?}"
        );
        ring.reset()?;
        street.heals(&machine)
    })
}

#[test]
fn rings_on_top_of_each_other_and_of_their_buffers_harm_nobody() -> Result<()> {
    let street = street()?;
    street.during(|| {
        let machine = street.machine(GuestOptions::default())?;
        let mut ring = HandMade::new(&machine)?;
        let base = ring.setup.submissions;
        ring.setup.completions = base;
        ring.setup.events = base;
        ring.enable()?;
        for slot in 0..16 {
            // Input and output are the rings themselves.
            let echo = Submission {
                tag: slot,
                opcode: Opcode::ECHO.0,
                buffer: base,
                length: 8192,
                meta_bytes: 4096,
                ..Submission::default()
            };
            ring.submission(slot as usize, &echo)?;
        }
        ring.tail(16)?;
        // The device is alive, in whatever state.
        ensure!(machine.read32(registers::MAGIC)? == vmgmt_driver::abi::MAGIC);
        ring.reset()?;
        street.heals(&machine)
    })
}

#[test]
fn memory_that_changes_between_reads_is_read_once() -> Result<()> {
    let street = street()?;
    street.during(|| {
        let machine = street.machine(GuestOptions::default())?;
        let mut dice = Dice(0x5eed);
        for _ in 0..20 {
            let ring = HandMade::new(&machine)?;
            ring.enable()?;
            let flipping = AtomicBool::new(true);
            std::thread::scope(|scope| {
                let flipper = scope.spawn(|| {
                    let mut dice = Dice(0xf11b);
                    while flipping.load(Ordering::Relaxed) {
                        // Rings, events and lists, all of it, but rarely the indexes, so that it gets far.
                        let at = (dice.roll() % (2 * 4096 / 8)) as usize * 8;
                        ring.memory.store64(
                            if dice.roll().is_multiple_of(64) {
                                EVENTS
                            } else {
                                at
                            },
                            dice.roll() % 5000,
                        )?;
                    }
                    Ok::<_, anyhow::Error>(())
                });
                for tail in 1..200_u32 {
                    ring.tail(tail % 60)?;
                    machine.write32(
                        registers::DOORBELLS + 4 * (dice.roll() % 16) as u32,
                        dice.roll() as u32,
                    )?;
                }
                machine.read32(registers::STATE)?;
                flipping.store(false, Ordering::Relaxed);
                flipper
                    .join()
                    .map_err(|_| anyhow::anyhow!("the flipper panicked"))?
            })?;
            ring.reset()?;
        }
        street.heals(&machine)
    })
}

#[test]
fn random_register_writes_harm_nobody() -> Result<()> {
    let street = street()?;
    street.during(|| {
        let machine = street.machine(GuestOptions::default())?;
        let mut dice = Dice(0xbad);
        for _ in 0..20_000 {
            let offset = (dice.roll() as u32 % (registers::BAR0_BYTES as u32)) & !3;
            let value = match dice.roll() % 4 {
                0 => dice.roll() as u32,
                1 => u32::MAX,
                2 => (machine.memory().base() >> 32) as u32,
                _ => dice.roll() as u32 % 300,
            };
            machine.write32(offset, value)?;
            if dice.roll().is_multiple_of(16) {
                let port = (dice.roll() as u32 % 64) & !3;
                machine.port_write(port, vmgmt_driver::backing::Width::Four, dice.roll() as u32)?;
            }
        }
        ensure!(machine.read32(registers::MAGIC)? == vmgmt_driver::abi::MAGIC);
        let _ = RING_STRIDE;
        street.heals(&machine)
    })
}
