//! Rings, lists and port window over guest memory that changes between any two reads, with a front page of any content, cores that are replaced
//! in between and answers to tokens that never were. What is fetched is in bounds, work is bounded, accesses are aligned.

use crate::edits::edge;
use arbitrary::{Result, Unstructured};
use std::cell::RefCell;
use std::rc::Rc;
use vmgmt_abi::ring::{LIST_ENTRIES_MAX, TRANSFER_BYTES_MAX};
use vmgmt_abi::{Mode, Submission};
use vmgmt_device::page::{PlainWords, PortSubmission, RingSetup};
use vmgmt_device::rings::testing::{Bed, FlatGuest, FlatMemory, RingPlan};
use vmgmt_device::rings::{Answer, Buffer, Channel, Fetched, HostFacts, Input, Output, Token};
use vmgmt_device::{Direction, GuestMemory, MemoryError, Tick};
use zerocopy::IntoBytes;

/// What guest memory answers instead of what it holds: taken from the end of the input.
type Lies = Rc<RefCell<Vec<u8>>>;

/// Memory of which any read may give any bytes, and any access may fail.
pub struct Lying {
    pub flat: FlatMemory,
    lies: Lies,
}

impl Lying {
    /// `Ok(true)`: the answer is to be a lie.
    fn shake(&mut self) -> std::result::Result<bool, MemoryError> {
        match self.lies.borrow_mut().pop().unwrap_or(0) {
            240..=243 => Err(MemoryError::Quiet),
            244..=246 => Err(MemoryError::Gone { iova: 0 }),
            247..=249 => Err(MemoryError::Denied { iova: 0 }),
            250..=253 => Err(MemoryError::Unmapped { iova: 0 }),
            200..=239 => Ok(true),
            _ => Ok(false),
        }
    }

    fn lie(&self, into: &mut [u8]) {
        let mut lies = self.lies.borrow_mut();
        // Few bytes are enough: a lie about all of a long read would use all of them up.
        for byte in into.iter_mut().rev().take(80) {
            *byte = lies.pop().unwrap_or(0);
        }
    }
}

impl GuestMemory for Lying {
    fn read(&mut self, iova: u64, into: &mut [u8]) -> std::result::Result<(), MemoryError> {
        let lie = self.shake()?;
        self.flat.read(iova, into)?;
        if lie {
            self.lie(into);
        }
        Ok(())
    }
    fn write(&mut self, iova: u64, from: &[u8]) -> std::result::Result<(), MemoryError> {
        self.shake()?;
        self.flat.write(iova, from)
    }
    fn load_u32(&mut self, iova: u64) -> std::result::Result<u32, MemoryError> {
        assert_eq!(iova % 4, 0);
        let lie = self.shake()?;
        let value = self.flat.load_u32(iova)?;
        let mut bytes = value.to_le_bytes();
        if lie {
            self.lie(&mut bytes);
        }
        Ok(u32::from_le_bytes(bytes))
    }
    fn store_u32(&mut self, iova: u64, value: u32) -> std::result::Result<(), MemoryError> {
        assert_eq!(iova % 4, 0);
        self.shake()?;
        self.flat.store_u32(iova, value)
    }
    fn store_u64(&mut self, iova: u64, value: u64) -> std::result::Result<(), MemoryError> {
        assert_eq!(iova % 8, 0);
        self.shake()?;
        self.flat.store_u64(iova, value)
    }
    fn fence(&mut self) {
        self.flat.fence();
    }
    fn settled(&mut self) -> std::result::Result<(), MemoryError> {
        self.shake()?;
        self.flat.settled()
    }
    fn check(&mut self, iova: u64, bytes: u64, direction: Direction) -> std::result::Result<(), MemoryError> {
        self.flat.check(iova, bytes, direction)
    }
    fn is_shared(&mut self, iova: u64) -> bool {
        self.flat.is_shared(iova)
    }
    fn prove(&mut self, iova: u64, nonce: u64) -> std::result::Result<bool, MemoryError> {
        self.flat.prove(iova, nonce)
    }
}

pub fn bounded(fetched: &Fetched) {
    assert!(fetched.meta.len() <= 4096);
    assert!(fetched.data_bytes <= u64::from(TRANSFER_BYTES_MAX));
    assert!(fetched.data.as_ref().is_none_or(|data| data.len() <= 4096));
    assert!(fetched.opcode.name().is_some());
    assert!(fetched.opcode.mode() == Mode::COMMON || fetched.opcode.mode() == fetched.mode);
}

pub fn any_setup(u: &mut Unstructured<'_>) -> Result<RingSetup> {
    let wild = u.ratio(1, 3)?;
    let place = |u: &mut Unstructured<'_>| {
        if wild {
            edge(u)
        } else {
            Ok(u64::from(u.int_in_range(0..=255u8)?) << 12)
        }
    };
    Ok(RingSetup {
        epoch: 0,
        enabled: u.ratio(7, 8)?,
        submissions: place(u)?,
        completions: place(u)?,
        events: place(u)?,
        submission_entries: if wild {
            edge(u)? as u32
        } else {
            1 << u.int_in_range(0..=10u8)?
        },
        completion_entries: if wild {
            edge(u)? as u32
        } else {
            1 << u.int_in_range(0..=10u8)?
        },
        mode: u.int_in_range(0..=6)?,
        vector: u.arbitrary()?,
        nonce: 0,
    })
}

fn any_submission(u: &mut Unstructured<'_>) -> Result<Submission> {
    const OPCODES: [u16; 22] = [
        0, 1, 2, 3, 4, 0x101, 0x102, 0x103, 0x104, 0x105, 0x106, 0x107, 0x108, 0x109, 0x10a, 0x201, 0x202,
        0x203, 0x204, 0x205, 0x206, 0x900,
    ];
    let mut submission = Submission {
        tag: u.int_in_range(0..=8)?,
        opcode: *u.choose(&OPCODES)?,
        ..Submission::default()
    };
    if u.ratio(2, 3)? {
        submission.buffer = u.int_in_range(0..=(1u64 << 20))? & !15;
        submission.length = u.int_in_range(0..=600)?;
        submission.meta_bytes = u.int_in_range(0..=200)?;
    }
    if u.ratio(1, 4)? {
        submission.flags = 1;
        submission.list_entries = u.int_in_range(0..=80)?;
    }
    if u.ratio(1, 8)? {
        submission.argument = edge(u)?;
        submission.deadline_ns = edge(u)?;
        submission.length = edge(u)?;
    }
    if u.ratio(1, 8)? {
        let at = u.int_in_range(0..=63usize)?;
        submission.as_mut_bytes()[at] = u.arbitrary()?;
    }
    Ok(submission)
}

fn any_token(u: &mut Unstructured<'_>) -> Result<Token> {
    Ok(Token {
        session: 7 + u.int_in_range(0..=1u64)?,
        channel: if u.ratio(1, 4)? {
            Channel::Port
        } else {
            Channel::Ring(u.arbitrary()?)
        },
        index: if u.arbitrary()? {
            u.int_in_range(0..=64)?
        } else {
            edge(u)? as u32
        },
        generation: u.int_in_range(0..=4)?,
    })
}

pub fn run(bytes: &[u8]) {
    // The first half says what is done, the second what guest memory lies.
    let (steps, lies) = bytes.split_at(bytes.len() / 2);
    let lies = Rc::new(RefCell::new(lies.to_vec()));
    let mut u = Unstructured::new(steps);
    let _ = play(&mut u, &lies);
}

fn play(u: &mut Unstructured<'_>, lies: &Lies) -> Result<()> {
    let guest = FlatGuest::new(1 << 20);
    let mut flat = FlatMemory::new(&guest);
    flat.set_by_messages(u.ratio(1, 4)?);
    let memory = Lying {
        flat,
        lies: Rc::clone(lies),
    };
    let mut bed = Bed::new(&guest, memory, PlainWords::new).unwrap();
    let (submissions, completions) = (1 << u.int_in_range(0..=6u8)?, 1 << u.int_in_range(0..=6u8)?);
    let mut plan = RingPlan::new(0, 0, submissions, completions, u.int_in_range(1..=2)?);
    bed.enable(&mut plan);
    let mut open: Vec<Token> = Vec::new();
    while !u.is_empty() {
        match u.int_in_range(0..=15u8)? {
            0 => {
                let setup = any_setup(u)?;
                bed.front.set_ring(u.int_in_range(0..=16)?, &setup);
                bed.touch();
            }
            1 => {
                let mut bytes = any_submission(u)?.as_bytes().to_vec();
                bytes.resize(u.int_in_range(0..=4300)?, 7);
                let submission = PortSubmission {
                    sequence: (bed.front.generation() << 32) | u64::from(u.arbitrary::<u8>()?),
                    mode: u.int_in_range(0..=6)?,
                    bytes,
                };
                bed.front.submit_port(&submission);
                bed.touch();
            }
            2 => {
                bed.front.set_host_page(edge(u)?);
                let facts = HostFacts {
                    throttled_ns: u.arbitrary()?,
                    ..HostFacts::default()
                };
                bed.handle(Input::HostPage(facts));
            }
            3 | 4 => {
                let token = if !open.is_empty() && u.ratio(3, 4)? {
                    open.swap_remove(u.int_in_range(0..=open.len() - 1)?)
                } else {
                    any_token(u)?
                };
                if let Some(Buffer::Guest { segments, bytes }) = bed.rings.buffer(token) {
                    assert!(segments.len() <= LIST_ENTRIES_MAX as usize);
                    assert_eq!(segments.iter().map(|segment| segment.bytes).sum::<u64>(), bytes);
                    for segment in segments {
                        assert!(segment.iova.checked_add(segment.bytes).is_some());
                    }
                }
                bed.rings.port_write(token, edge(u)?, &[1; 9]);
                let input = Input::Complete {
                    token,
                    answer: Answer::ok(edge(u)?),
                    payload: vec![3; u.int_in_range(0..=300)?],
                    confirm: u.arbitrary()?,
                };
                bed.handle(input);
            }
            5 => {
                let at = *u.choose(&[0u64, 4, 8, 12, 16])?;
                guest.store_u32(at, edge(u)? as u32);
            }
            6 => {
                bed.front.set_generation(bed.front.generation() + 1);
                bed.enable(&mut plan);
            }
            7 => {
                bed.replace_core(PlainWords::new).unwrap();
                bed.touch();
            }
            8 => {
                bed.now = Tick(bed.now.0.saturating_add(edge(u)?));
                bed.rings
                    .handle_timeout(bed.now, &bed.front, &bed.core, &mut bed.memory);
            }
            9 => drop(bed.arm()),
            10 => bed.front.set_control(u.int_in_range(0..=15)?),
            _ => {
                for _ in 0..u.int_in_range(0..=20u8)? {
                    let submission = any_submission(u)?;
                    plan.submit(&guest, &submission);
                }
                if u.ratio(1, 8)? {
                    plan.tail = edge(u)? as u32;
                }
                bed.front.ring_doorbell(0, plan.tail);
                bed.touch();
                let before = bed.memory.flat.accesses();
                let turn = bed.poll(64);
                assert!(turn.fetched <= 64 + 1);
                assert!(bed.memory.flat.accesses() - before < 64 * (u64::from(LIST_ENTRIES_MAX) * 2 + 64));
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
    Ok(())
}
