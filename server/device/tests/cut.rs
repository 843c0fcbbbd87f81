//! The core dies between any two of its stores, to the in-flight table, to its page or into guest memory, and another one attaches: every
//! submission gets exactly one completion, with its own tag and result, and the hub hears of each delivery it asked about.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use vmgmt_abi::{Mode, Opcode, Status, Submission};
use vmgmt_device::page::{PlainWords, PortSubmission, Words};
use vmgmt_device::rings::testing::{Bed, FlatGuest, FlatMemory, RingPlan};
use vmgmt_device::rings::{Answer, Fetched, Input, Output, Token};
use vmgmt_device::{Direction, GuestMemory, MemoryError};
use zerocopy::IntoBytes;

/// Steps until death; negative: immortal.
#[derive(Clone, Debug)]
struct Life(Arc<AtomicI64>);

/// What a death unwinds with.
struct Death;

impl Life {
    fn step(&self) {
        let left = self.0.load(Ordering::Relaxed);
        if left == 0 {
            resume_unwind(Box::new(Death));
        }
        if left > 0 {
            self.0.store(left - 1, Ordering::Relaxed);
        }
    }
    fn set(&self, steps: i64) {
        self.0.store(steps, Ordering::Relaxed);
    }
}

/// Words whose writer dies.
#[derive(Clone, Debug)]
struct MortalWords {
    words: PlainWords,
    life: Life,
}

impl Words for MortalWords {
    fn len(&self) -> usize {
        self.words.len()
    }
    fn load(&self, index: usize) -> u64 {
        self.words.load(index)
    }
    fn store(&self, index: usize, value: u64) {
        self.life.step();
        self.words.store(index, value);
    }
}

/// Guest memory whose writer dies: a write may be cut in its middle.
struct MortalMemory {
    flat: FlatMemory,
    life: Life,
}

impl GuestMemory for MortalMemory {
    fn read(&mut self, iova: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        self.flat.read(iova, into)
    }
    fn write(&mut self, iova: u64, from: &[u8]) -> Result<(), MemoryError> {
        self.life.step();
        let (first, rest) = from.split_at(from.len() / 2);
        self.flat.write(iova, first)?;
        self.life.step();
        self.flat.write(iova + first.len() as u64, rest)
    }
    fn load_u32(&mut self, iova: u64) -> Result<u32, MemoryError> {
        self.flat.load_u32(iova)
    }
    fn store_u32(&mut self, iova: u64, value: u32) -> Result<(), MemoryError> {
        self.life.step();
        self.flat.store_u32(iova, value)
    }
    fn store_u64(&mut self, iova: u64, value: u64) -> Result<(), MemoryError> {
        self.life.step();
        self.flat.store_u64(iova, value)
    }
    fn fence(&mut self) {
        self.flat.fence();
    }
    fn settled(&mut self) -> Result<(), MemoryError> {
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

/// What the guest does next.
#[derive(Clone, Copy, Debug)]
enum Act {
    /// Submits of this kind to this ring.
    Submit {
        ring: usize,
        kind: u8,
    },
    Turn,
    /// The hub answers the oldest or the newest that it has.
    Answer {
        newest: bool,
    },
}

/// The hub of the model: what is with it, and what it was told. Its own memory outlives the core, as the real hub's journal does.
#[derive(Default)]
struct Hub {
    open: VecDeque<Fetched>,
    told: BTreeSet<Token>,
    seen: BTreeMap<Token, u32>,
}

const DATA: u64 = 0x8_0000;
const KINDS: u8 = 5;

struct World {
    bed: Bed<MortalWords, MortalMemory>,
    life: Life,
    rings: Vec<RingPlan>,
    hub: Hub,
    next_tag: u32,
    /// Kind of each submission in flight.
    sent: BTreeMap<u32, u8>,
    /// Tags of RECEIVEs that were completed.
    received: BTreeSet<u32>,
    deaths: u32,
}

impl World {
    fn new(by_messages: bool) -> Self {
        let life = Life(Arc::new(AtomicI64::new(-1)));
        let guest = FlatGuest::new(1 << 20);
        let mut flat = FlatMemory::new(&guest);
        flat.set_by_messages(by_messages);
        let memory = MortalMemory {
            flat,
            life: life.clone(),
        };
        let words = |count| MortalWords {
            words: PlainWords::new(count),
            life: life.clone(),
        };
        let mut bed = Bed::new(&guest, memory, words).unwrap();
        let mut rings = vec![
            RingPlan::new(0, 0, 8, 8, Mode::CHAT.0),
            RingPlan::new(3, 0x2_0000, 16, 4, Mode::CHAT.0),
        ];
        rings.iter_mut().for_each(|ring| bed.enable(ring));
        let mut world = Self {
            bed,
            life,
            rings,
            hub: Hub::default(),
            next_tag: 1,
            sent: BTreeMap::new(),
            received: BTreeSet::new(),
            deaths: 0,
        };
        world.turn(false);
        world
    }

    fn submit(&mut self, ring: usize, kind: u8) {
        let guest = self.bed.guest.clone();
        let plan = &mut self.rings[ring % 2];
        if plan.room(&guest) == 0 {
            return;
        }
        let tag = self.next_tag;
        self.next_tag += 1;
        // Each tag has a page-aligned buffer of its own.
        let buffer = DATA + u64::from(tag % 512) * 64;
        guest.write(buffer, &[0xee; 64]);
        guest.store_u32(buffer, tag);
        let of = |opcode: Opcode| Submission {
            tag,
            opcode: opcode.0,
            buffer,
            length: 64,
            meta_bytes: 4,
            ..Submission::default()
        };
        let submission = match kind {
            0 => Submission {
                buffer: 0,
                length: 0,
                meta_bytes: 0,
                ..of(Opcode::NOOP)
            },
            1 => of(Opcode::ECHO),
            2 => Submission {
                flags: 1 << 12,
                ..of(Opcode::RECEIVE)
            },
            3 => of(Opcode::RECEIVE),
            _ => of(Opcode::SEND),
        };
        if plan.submit(&guest, &submission) {
            self.bed.front.ring_doorbell(plan.n, plan.tail);
        }
        self.sent.insert(tag, kind);
    }

    /// One turn of the shell; with `steps` the core dies after so many stores, and is replaced.
    fn turn(&mut self, quick: bool) {
        let rounds = if quick { 1 } else { 12 };
        for _ in 0..rounds {
            // Time comes for a ring that is stalled for want of completion slots.
            self.bed.now = self.bed.rings.poll_timeout().unwrap_or(self.bed.now);
            self.step(|world| {
                world.bed.touch();
                world.outputs();
                world.bed.poll(8);
                world.outputs();
                world.bed.end_turn();
                world.outputs();
            });
            self.bed.memory.flat.deliver();
            self.take();
        }
    }

    fn outputs(&mut self) {
        while let Some(output) = self.bed.rings.poll_output() {
            match output {
                Output::Submission(fetched) => {
                    let tag = *self.hub.seen.entry(fetched.token).or_insert(fetched.tag);
                    assert_eq!(tag, fetched.tag, "a token is never used for another submission");
                    assert!(
                        self.sent.contains_key(&fetched.tag),
                        "{fetched:?} is not in flight any more"
                    );
                    assert_eq!(fetched.meta, fetched.tag.to_le_bytes());
                    assert!(!fetched.again || self.deaths > 0, "only a new core asks again");
                    if !self.hub.open.iter().any(|open| open.token == fetched.token) {
                        self.hub.open.push_back(*fetched);
                    }
                }
                Output::Published { token, published } => {
                    assert!(published);
                    self.hub.told.insert(token);
                }
                Output::Signal { .. } | Output::Kick => {}
                // A life that died over its opening may have left anything, as far as the next one can tell.
                Output::ChannelClosed { .. } => assert!(self.deaths > 0 && self.hub.seen.is_empty()),
                other => panic!("{other:?} was not asked for ({:?})", self.bed.core.state(1)),
            }
        }
    }

    fn answer(&mut self, newest: bool) {
        let fetched = if newest {
            self.hub.open.pop_back()
        } else {
            self.hub.open.pop_front()
        };
        let Some(fetched) = fetched else { return };
        self.step(move |world| {
            world.bed.handle(Input::Complete {
                token: fetched.token,
                answer: Answer::ok_extra(u64::from(fetched.tag) * 3, 1),
                payload: [fetched.tag.to_le_bytes(); 2].as_flattened().to_vec(),
                confirm: fetched.opcode == Opcode::RECEIVE,
            });
            world.outputs();
        });
    }

    /// Does something as the core; true: it died of it, and another one lives.
    fn step(&mut self, act: impl FnOnce(&mut Self)) -> bool {
        let outcome = catch_unwind(AssertUnwindSafe(|| act(self)));
        let Err(cause) = outcome else { return false };
        if cause.downcast_ref::<Death>().is_none() {
            resume_unwind(cause);
        }
        self.deaths += 1;
        self.life.set(-1);
        // What went by messages and had not left the core is lost with it.
        let by_messages = !self.bed.memory.is_shared(0);
        let mut flat = FlatMemory::new(&self.bed.guest);
        flat.set_by_messages(by_messages);
        self.bed.memory.flat = flat;
        // The hub knows what it was told; what was with it comes again.
        self.hub.open.clear();
        let life = self.life.clone();
        self.bed
            .replace_core(|count| MortalWords {
                words: PlainWords::new(count),
                life: life.clone(),
            })
            .unwrap();
        true
    }

    fn take(&mut self) {
        let guest = self.bed.guest.clone();
        for n in 0..self.rings.len() {
            while let Some(completion) = self.rings[n].take(&guest) {
                let tag = completion.tag;
                let kind = self
                    .sent
                    .remove(&tag)
                    .expect("one completion for each submission, and no more");
                let status = Status(completion.status);
                let mut there = [0; 12];
                guest.read(DATA + u64::from(tag % 512) * 64, &mut there);
                if kind == 3 {
                    self.received.insert(tag);
                }
                match kind {
                    0 => assert_eq!((status, completion.result), (Status::OK, 0)),
                    1 => {
                        assert_eq!((status, completion.result), (Status::OK, 4));
                        assert_eq!(there[4..8], tag.to_le_bytes(), "the payload was there before");
                    }
                    2 => assert_eq!(status, Status::BAD_ARGUMENT),
                    _ => {
                        assert_eq!(
                            (status, completion.result, completion.extra),
                            (Status::OK, u64::from(tag) * 3, 1)
                        );
                        assert_eq!(
                            (&there[4..8], &there[8..12]),
                            (&tag.to_le_bytes()[..], &tag.to_le_bytes()[..])
                        );
                    }
                }
                // Whoever writes the buffer after its completion is caught by the next look.
                guest.write(DATA + u64::from(tag % 512) * 64, &[0x11; 64]);
            }
        }
    }

    /// Everything comes to its end.
    fn finish(mut self) -> u32 {
        self.life.set(-1);
        for _ in 0..200 {
            self.turn(false);
            if self.sent.is_empty() {
                break;
            }
            while !self.hub.open.is_empty() {
                self.answer(false);
            }
        }
        assert!(self.sent.is_empty(), "without a completion: {:?}", self.sent);
        self.turn(false);
        self.turn(false);
        assert_eq!(self.bed.rings.in_flight(), 0, "every record is done with");
        for (token, tag) in &self.hub.seen {
            let asked = self.received.contains(tag);
            assert_eq!(
                self.hub.told.contains(token),
                asked,
                "whether the hub heard of {tag}"
            );
        }
        let guest = self.bed.guest.clone();
        for tag in 1..self.next_tag.min(512) {
            let mut there = [0; 64];
            guest.read(DATA + u64::from(tag) * 64, &mut there);
            assert_eq!(
                there, [0x11; 64],
                "the buffer of {tag} was written after its completion"
            );
        }
        self.deaths
    }
}

fn run(acts: &[Act], cuts: &[i64], by_messages: bool) -> u32 {
    let mut world = World::new(by_messages);
    let mut cuts = cuts.iter().copied();
    world.life.set(cuts.next().unwrap_or(-1));
    for act in acts {
        let deaths = world.deaths;
        match *act {
            Act::Submit { ring, kind } => {
                // The front and the guest do not die.
                let left = world.life.0.load(Ordering::Relaxed);
                world.life.set(-1);
                world.submit(ring, kind);
                world.life.set(left);
            }
            Act::Turn => world.turn(true),
            Act::Answer { newest } => world.answer(newest),
        }
        if world.deaths != deaths {
            world.life.set(cuts.next().unwrap_or(-1));
        }
    }
    world.finish()
}

fn workload() -> Vec<Act> {
    let mut acts = Vec::new();
    for round in 0..6u8 {
        for kind in 0..KINDS {
            acts.push(Act::Submit {
                ring: usize::from(round + kind),
                kind,
            });
        }
        acts.push(Act::Turn);
        acts.push(Act::Answer {
            newest: round % 2 == 0,
        });
        acts.push(Act::Turn);
    }
    acts
}

/// At every single store of a workload that has every kind of submission in it.
#[test]
fn a_cut_at_any_step_is_not_seen() {
    for by_messages in [false, true] {
        let mut steps = 0;
        loop {
            if run(&workload(), &[steps], by_messages) == 0 {
                break;
            }
            steps += 1;
        }
        assert!(steps > 150, "the workload has only {steps} steps");
    }
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        4 => (0..2usize, 0..KINDS).prop_map(|(ring, kind)| Act::Submit { ring, kind }),
        2 => Just(Act::Turn),
        2 => any::<bool>().prop_map(|newest| Act::Answer { newest }),
    ];
    prop::collection::vec(act, 1..80)
}

proptest! {
    /// Any workload, cut at any steps, also within the recovery from a cut.
    #[test]
    fn cuts_at_any_steps_are_not_seen(
        acts in acts(),
        cuts in prop::collection::vec(0..300i64, 1..6),
        by_messages in any::<bool>(),
    ) {
        run(&acts, &cuts, by_messages);
    }
}

/// A RECEIVE by the port window; all have the same tag, as one is in flight at a time.
fn receive_by_port(world: &mut World, sequence: u64) {
    let submission = Submission {
        tag: 5,
        opcode: Opcode::RECEIVE.0,
        length: 64,
        ..Submission::default()
    };
    world.bed.front.submit_port(&PortSubmission {
        sequence,
        mode: Mode::CHAT.0,
        bytes: submission.as_bytes().to_vec(),
    });
}

/// A turn as the shell's: what came out of the rings is journaled, then what depends on it is done, then the turn ends.
fn turn_of_port(world: &mut World, delivering: &mut BTreeSet<Token>) {
    world.bed.touch();
    while let Some(output) = world.bed.rings.poll_output() {
        match output {
            Output::Submission(fetched) => world.hub.open.push_back(*fetched),
            Output::Published { token, published } => {
                assert!(published);
                world.life.step();
                delivering.remove(&token);
                world.hub.told.insert(token);
            }
            _ => {}
        }
    }
    if let Some(fetched) = world.hub.open.pop_front() {
        assert!(!world.hub.told.contains(&fetched.token), "{fetched:?} has ended");
        world.life.step();
        delivering.insert(fetched.token);
        world.bed.handle(Input::Complete {
            token: fetched.token,
            answer: Answer::ok(4),
            payload: b"data".to_vec(),
            confirm: true,
        });
    }
    world.bed.end_turn();
}

/// The port window: the submission is given to the hub again, or its result published again; and the next one, which is there as soon as the
/// result of the one before was taken, does not make the hub miss that.
#[test]
fn a_cut_at_any_step_of_the_port_window_is_not_seen() {
    let mut steps = 0;
    loop {
        let mut world = World::new(false);
        let mut sequence = (1 << 32) | 1;
        let last = sequence + 2;
        let mut delivering = BTreeSet::new();
        receive_by_port(&mut world, sequence);
        world.life.set(steps);
        for _ in 0..16 {
            let died = world.step(|world| turn_of_port(world, &mut delivering));
            if !died && world.bed.core.port_result(sequence).is_some() {
                let left = world.life.0.load(Ordering::Relaxed);
                world.life.set(-1);
                world.bed.front.set_port_taken(sequence);
                if sequence < last {
                    sequence += 1;
                    receive_by_port(&mut world, sequence);
                }
                world.life.set(left);
            }
        }
        assert_eq!(world.bed.front.port_taken(), last);
        assert_eq!(
            (world.hub.told.len(), delivering.len()),
            (3, 0),
            "the hub hears of each delivery ({steps} steps)"
        );
        if world.deaths == 0 {
            break;
        }
        steps += 1;
    }
    assert!(steps > 30);
}
