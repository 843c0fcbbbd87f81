//! One ring pair as the core holds it: private shadows of every index, what is in flight, what waits to be published.
//!
//! In: a set-up that open.rs checked. Out: addresses and slots for fetch.rs, complete.rs and recover.rs. Knows nothing of operations.

use super::interface::{Answer, Channel, Counters, Output, Segment, Settings, Token, Turn};
use super::limits::{BATCH_MAX, RECORDS_MAX, STALL_FIRST_NS};
use super::prepare::Preparing;
use super::recover::Recovering;
use super::table::Table;
use crate::page::{RingSetup, Words};
use crate::{GuestMemory, MemoryError, Tick};
use std::collections::VecDeque;
use vmgmt_abi::ring::{COMPLETION_BYTES, RING_EVENTS_BYTES, SUBMISSION_BYTES, event_offset};
use vmgmt_abi::{Mode, Status};

/// Why work on a ring stops before it is done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stop {
    /// Memory by messages was asked for.
    Wait,
    /// No DMA now.
    Quiet,
    /// The guest broke the contract: its device fails.
    Fail(Status),
}

/// What a failed access to the rings themselves means (to a buffer it means less: see prepare.rs and complete.rs).
impl From<MemoryError> for Stop {
    fn from(error: MemoryError) -> Self {
        match error {
            MemoryError::Pending => Self::Wait,
            MemoryError::Quiet => Self::Quiet,
            MemoryError::Unmapped { .. } | MemoryError::Denied { .. } | MemoryError::Gone { .. } => {
                Self::Fail(Status::BAD_ADDRESS)
            }
        }
    }
}

/// What all rings of a session share.
#[derive(Debug)]
pub(super) struct Desk<W: Words> {
    pub settings: Settings,
    pub table: Table<W>,
    pub now: Tick,
    /// The device's generation that all of this speaks of.
    pub generation: u64,
    /// The driver uses event words.
    pub suppression: bool,
    pub outputs: VecDeque<Output>,
    pub counters: Counters,
    pub turn: Turn,
    /// For each `Output::Published` in order of output: the record that is freed once the hub knows.
    pub telling: VecDeque<Option<(usize, u32, u32)>>,
    /// How many of them the shell has polled.
    pub told: usize,
    /// While what an earlier life left is taken up: the highest number of a map that it had seen. What lies in a newer one was mapped while
    /// no core lived: it is not the memory that the guest meant.
    pub maps_before: Option<u64>,
    /// The highest number of a map that this life has written down as seen.
    pub maps_seen: u64,
}

impl<W: Words> Desk<W> {
    pub fn token(&self, n: usize, index: u32, generation: u32) -> Token {
        Token {
            session: self.settings.session,
            channel: Channel::Ring(n as u8),
            index,
            generation,
        }
    }

    /// Whether part of this range was mapped while no core lived. (Where it is not mapped now, the access will say so.)
    pub fn is_remapped<M: GuestMemory>(&self, memory: &mut M, iova: u64, bytes: u64) -> bool {
        self.maps_before
            .is_some_and(|before| memory.newest_map_of(iova, bytes) > before)
    }

    /// Writes down which maps were seen: before anything is done that a later life may take up. Not while that of an earlier life is taken
    /// up: the next death must not make its maps known.
    pub fn note_maps<M: GuestMemory>(&mut self, memory: &M) {
        let newest = memory.newest_map();
        if self.maps_before.is_none() && newest > self.maps_seen {
            self.maps_seen = newest;
            self.table.set_maps_seen(newest);
        }
    }

    /// Tells the hub that a completion it asked about is visible or never will be; `record` is freed when it knows.
    pub fn tell(&mut self, token: Token, published: bool, record: Option<(usize, u32, u32)>) {
        self.telling.push_back(record);
        self.outputs.push_back(Output::Published { token, published });
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stage {
    Closed,
    /// Enabled by the guest; with `adopt` it was open in the core life before.
    Opening {
        adopt: bool,
    },
    Refused,
    Open,
    /// The guest closed it under this epoch. What goes by message may still be on its way into its memory: it says CLOSED when that has ended.
    Closing {
        under: RingSetup,
    },
}

/// Where a submission in flight stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Standing {
    Free,
    /// In flight since an earlier core life, and not yet given to the hub again.
    Recovering,
    /// The hub has it.
    Hub,
    /// Answered; its completion waits in `due`.
    Due,
    /// Its completion is written, by message, and perhaps not yet there.
    Unsettled,
    /// Published; its record waits until the hub knows.
    Told,
}

/// Pieces of a data area; one piece needs no allocation.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) enum Segments {
    #[default]
    None,
    One([Segment; 1]),
    Many(Vec<Segment>),
}

impl Segments {
    pub fn as_slice(&self) -> &[Segment] {
        match self {
            Self::None => &[],
            Self::One(one) => one,
            Self::Many(many) => many,
        }
    }
    /// Pieces held on the heap.
    pub fn held(&self) -> usize {
        match self {
            Self::None | Self::One(_) => 0,
            Self::Many(many) => many.len(),
        }
    }
}

/// One place of the table of submissions in flight; its record in the in-flight table has the same index.
#[derive(Debug)]
pub(super) struct Slot {
    pub generation: u32,
    pub standing: Standing,
    pub tag: u32,
    pub flags: u8,
    pub segments: Segments,
    pub data_bytes: u64,
    /// An answer that came before the submission was given to the hub again.
    pub early: Option<Box<Due>>,
}

/// How far the publication of an answer has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Step {
    Payload,
    /// The payload went by messages and must be there before the completion may be journaled.
    Settle,
    Journal,
    /// Journaled under this completion index; the buffer is not touched again.
    Publish(u32),
}

/// An answer on its way into the guest's ring.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Due {
    pub index: u32,
    pub answer: Answer,
    pub payload: Vec<u8>,
    pub confirm: bool,
    pub lost: bool,
    pub step: Step,
}

impl Due {
    pub const fn new(index: u32, answer: Answer, payload: Vec<u8>, confirm: bool) -> Self {
        Self {
            index,
            answer,
            payload,
            confirm,
            lost: false,
            step: Step::Payload,
        }
    }
}

/// One ring pair.
#[derive(Debug)]
pub(super) struct Ring {
    pub stage: Stage,
    pub setup: RingSetup,
    pub mode: Mode,
    /// All of the ring's own memory is shared for certain: stores are visible when they return, event words work.
    pub shared: bool,

    /// Submissions fetched in this epoch.
    pub fetched: u64,
    /// The `submission_head` that the guest was told last.
    pub returned: u32,
    /// The last `submission_tail` read, bounded.
    pub tail: u32,
    /// The doorbell word seen last.
    pub doorbell: u64,
    /// `submission_tail` is to be read again although the ring is reached by messages.
    pub look: bool,
    /// The doorbell rang since `completion_head` was read last.
    pub look_head: bool,
    /// The doorbell word when the read of `submission_tail` that is under way was asked for.
    pub asked_under: Option<u64>,
    /// The `submission_event` that was written by message last.
    pub armed: Option<u32>,
    /// How many submissions the read of a batch that is under way asked for.
    pub asked_batch: Option<u32>,
    pub batch: Box<[u8]>,
    pub batch_at: usize,
    pub batch_count: usize,
    pub preparing: Option<Preparing>,
    pub recovering: VecDeque<Recovering>,

    /// Next completion index.
    pub completion_tail: u32,
    /// Completions before it are published (and settled).
    pub published: u32,
    /// Completions before it were signalled, or the guest spared it.
    pub signalled: u32,
    /// An interrupt is due whatever the event word says.
    pub signal: bool,
    /// The last `completion_head` read, bounded.
    pub completion_head: u32,
    /// When to look again for free completion slots, and how long to wait the next time.
    pub stalled_until: Option<Tick>,
    pub stall_ns: u64,

    pub slots: Vec<Slot>,
    pub free: Vec<u32>,
    /// Submissions in flight that have no completion slot yet: so many are reserved.
    pub owed: u32,
    pub due: VecDeque<Due>,
    pub unsettled: Vec<u32>,
    pub entries_held: usize,
}

impl Ring {
    pub fn closed() -> Self {
        Self {
            stage: Stage::Closed,
            setup: RingSetup::default(),
            mode: Mode::COMMON,
            shared: false,
            fetched: 0,
            returned: 0,
            tail: 0,
            doorbell: 0,
            look: true,
            look_head: false,
            asked_under: None,
            armed: None,
            asked_batch: None,
            batch: Box::default(),
            batch_at: 0,
            batch_count: 0,
            preparing: None,
            recovering: VecDeque::new(),
            completion_tail: 0,
            published: 0,
            signalled: 0,
            signal: false,
            completion_head: 0,
            stalled_until: None,
            stall_ns: STALL_FIRST_NS,
            slots: Vec::new(),
            free: Vec::new(),
            owed: 0,
            due: VecDeque::new(),
            unsettled: Vec::new(),
            entries_held: 0,
        }
    }

    /// A ring that the guest enabled with `setup`.
    pub fn opening(setup: RingSetup, adopt: bool) -> Self {
        Self {
            stage: Stage::Opening { adopt },
            setup,
            mode: Mode(setup.mode),
            batch: vec![0; BATCH_MAX as usize * SUBMISSION_BYTES].into_boxed_slice(),
            ..Self::closed()
        }
    }

    pub fn is_open(&self) -> bool {
        self.stage == Stage::Open
    }

    /// Epoch of the set-up that was seen last.
    pub const fn epoch_seen(&self) -> u32 {
        match self.stage {
            Stage::Closing { under } => under.epoch,
            _ => self.setup.epoch,
        }
    }

    /// The guest's memory that this ring writes: completions, event words, data areas of what is in flight.
    pub fn written_areas(&self) -> impl Iterator<Item = Segment> + '_ {
        let completions = Segment {
            iova: self.setup.completions,
            bytes: u64::from(self.setup.completion_entries) * COMPLETION_BYTES as u64,
        };
        let events = Segment {
            iova: self.setup.events,
            bytes: RING_EVENTS_BYTES as u64,
        };
        let data = self.slots.iter().flat_map(|slot| slot.segments.as_slice());
        [completions, events].into_iter().chain(data.copied())
    }

    /// Index of the next submission.
    pub const fn head(&self) -> u32 {
        self.fetched as u32
    }

    pub fn event_address(&self, offset: u64) -> u64 {
        self.setup.events.wrapping_add(offset)
    }

    pub fn nonce_address(&self) -> u64 {
        self.event_address(event_offset::NONCE)
    }

    /// Where submission `index` lies. (Sizes and bases were checked against overflow when the ring was opened.)
    pub fn submission_address(&self, index: u32) -> u64 {
        let slot = index & self.setup.submission_entries.wrapping_sub(1);
        self.setup
            .submissions
            .wrapping_add(u64::from(slot) * SUBMISSION_BYTES as u64)
    }

    /// Where completion `index` lies.
    pub fn completion_address(&self, index: u32) -> u64 {
        let slot = index & self.setup.completion_entries.wrapping_sub(1);
        self.setup
            .completions
            .wrapping_add(u64::from(slot) * COMPLETION_BYTES as u64)
    }

    /// Completion slots that are neither taken nor reserved.
    pub fn completion_slots_free(&self) -> u32 {
        let taken = self.completion_tail.wrapping_sub(self.completion_head);
        self.setup
            .completion_entries
            .saturating_sub(taken)
            .saturating_sub(self.owed)
    }

    /// Records that are free.
    pub fn records_free(&self) -> u32 {
        let used = self.slots.len().saturating_sub(self.free.len());
        RECORDS_MAX.saturating_sub(used as u32)
    }

    /// Takes a free place, with a token generation that none had before.
    pub fn take_slot<W: Words>(&mut self, table: &Table<W>, n: usize) -> Option<u32> {
        if let Some(index) = self.free.pop() {
            return Some(index);
        }
        let index = u32::try_from(self.slots.len())
            .ok()
            .filter(|index| *index < RECORDS_MAX)?;
        let generation = table.use_record(n, index);
        self.slots.push(Slot {
            generation,
            standing: Standing::Free,
            tag: 0,
            flags: 0,
            segments: Segments::None,
            data_bytes: 0,
            early: None,
        });
        Some(index)
    }

    pub fn slot(&self, index: u32) -> Option<&Slot> {
        self.slots.get(index as usize)
    }

    pub fn slot_mut(&mut self, index: u32) -> Option<&mut Slot> {
        self.slots.get_mut(index as usize)
    }

    /// Queues the answer of the submission in its place, which is in flight.
    pub fn queue(&mut self, due: Due) {
        if let Some(slot) = self.slot_mut(due.index) {
            slot.standing = Standing::Due;
            self.due.push_back(due);
        }
    }

    /// Frees a place and its record.
    pub fn free_slot<W: Words>(&mut self, table: &Table<W>, n: usize, index: u32) {
        let Some(slot) = self.slots.get_mut(index as usize) else {
            return;
        };
        slot.generation = slot.generation.wrapping_add(1);
        slot.standing = Standing::Free;
        self.entries_held = self.entries_held.saturating_sub(slot.segments.held());
        slot.segments = Segments::None;
        slot.early = None;
        table.set_free(n, index, slot.generation);
        self.free.push(index);
    }

    /// Moves the cursor of the in-flight table to where this ring is.
    pub fn save_cursor<W: Words>(&self, table: &Table<W>, n: usize) {
        table.set_cursor(n, self.fetched, self.published);
    }
}
