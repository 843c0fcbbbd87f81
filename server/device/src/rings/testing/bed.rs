//! A guest's rings, the front's page and the shell's turn in one place, each with its own honest behaviour.
//!
//! The guest half keeps the ABI's ordering rules; tests write past it to misbehave.

use super::FlatGuest;
use crate::page::{CorePage, FrontPage, Interrupts, RingSetup, Words, control};
use crate::rings::{AttachError, Input, Output, Rings, STATE_WORDS, Settings, Turn};
use crate::{GuestMemory, Tick};
use vmgmt_abi::ring::{COMPLETION_BYTES, SUBMISSION_BYTES, completion_flag, event_due, event_offset, phase};
use vmgmt_abi::{Completion, Submission, feature};
use zerocopy::{FromBytes, IntoBytes};

/// Nonce that the bed's guest uses.
const NONCE: u64 = 0x7072_6f76_6564_2121;
/// Maps that the bed's front page has room for.
const MAPS_MAX: usize = 8;

/// Where a guest's ring lies, and how far its guest is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RingPlan {
    pub n: usize,
    pub setup: RingSetup,
    /// Index of the next submission.
    pub tail: u32,
    /// Index of the next completion.
    pub head: u32,
}

impl RingPlan {
    /// Ring `n` of `mode`, `base` being the guest address of 128 KiB for it.
    #[must_use]
    pub fn new(n: usize, base: u64, submission_entries: u32, completion_entries: u32, mode: u32) -> Self {
        Self {
            n,
            setup: RingSetup {
                epoch: 0,
                enabled: true,
                events: base,
                completions: base + 0x1000,
                submissions: base + 0x1_0000,
                submission_entries,
                completion_entries,
                mode,
                vector: n as u32,
                nonce: NONCE,
            },
            tail: 0,
            head: 0,
        }
    }

    /// Writes a submission and publishes it. True: the doorbell is to be rung.
    pub fn submit(&mut self, guest: &FlatGuest, submission: &Submission) -> bool {
        let slot = self.tail % self.setup.submission_entries.max(1);
        guest.write(
            self.setup.submissions + u64::from(slot) * SUBMISSION_BYTES as u64,
            submission.as_bytes(),
        );
        let old = self.tail;
        self.tail = old.wrapping_add(1);
        guest.store_u32(self.setup.events + event_offset::SUBMISSION_TAIL, self.tail);
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        let event = guest.load_u32(self.setup.events + event_offset::SUBMISSION_EVENT);
        event_due(event, old, self.tail)
    }

    /// Room for submissions: slots that the device has returned, and completions that are not owed.
    #[must_use]
    pub fn room(&self, guest: &FlatGuest) -> u32 {
        let returned = guest.load_u32(self.setup.events + event_offset::SUBMISSION_HEAD);
        let used = self.tail.wrapping_sub(returned);
        let owed = self.tail.wrapping_sub(self.head);
        let slots = self.setup.submission_entries.saturating_sub(used);
        slots.min(self.setup.completion_entries.saturating_sub(owed))
    }

    /// Takes the next completion, if it is there.
    pub fn take(&mut self, guest: &FlatGuest) -> Option<Completion> {
        let entries = self.setup.completion_entries;
        let address =
            self.setup.completions + u64::from(self.head % entries.max(1)) * COMPLETION_BYTES as u64;
        let last = guest.load_u64(address + 24);
        if (last >> 48) as u16 & completion_flag::PHASE != phase(self.head, entries) {
            return None;
        }
        let mut bytes = [0; COMPLETION_BYTES];
        guest.read(address, &mut bytes);
        self.head = self.head.wrapping_add(1);
        guest.store_u32(self.setup.events + event_offset::COMPLETION_HEAD, self.head);
        Completion::read_from_bytes(&bytes).ok()
    }
}

/// A session: the front's page, the core's page, the state that outlives the core, and the rings of the core that lives now.
#[derive(Debug)]
pub struct Bed<W: Words, M: GuestMemory> {
    pub guest: FlatGuest,
    pub memory: M,
    pub front: FrontPage<W>,
    /// The front page's, for a test that writes half of a record.
    pub front_words: W,
    pub core: CorePage<W>,
    pub state: W,
    pub rings: Rings<W>,
    pub now: Tick,
    pub settings: Settings,
}

impl<W: Words, M: GuestMemory> Bed<W, M> {
    /// A fresh session; `words` makes zeroed words.
    ///
    /// # Errors
    /// As [`Rings::attach`].
    pub fn new(guest: &FlatGuest, memory: M, words: impl Fn(usize) -> W) -> Result<Self, AttachError> {
        let front_words = words(FrontPage::<W>::words_needed(MAPS_MAX));
        let front = FrontPage::new(front_words.clone());
        front.init(7, 3);
        front.set_life(1);
        front.set_generation(1);
        front.set_control(control::BUS_MASTER);
        front.set_features(feature::EVENT_SUPPRESSION);
        front.set_interrupts(Interrupts::Message { vectors: 4 });
        let core = CorePage::new(words(CorePage::<W>::WORDS));
        core.init(7, 1);
        let state = words(STATE_WORDS);
        let settings = Settings {
            session: 7,
            modes: crate::rings::Modes::default(),
        };
        let rings = Rings::attach(settings, state.clone(), &front, &core)?;
        let mut bed = Self {
            guest: guest.clone(),
            memory,
            front,
            front_words,
            core,
            state,
            rings,
            now: Tick(1_000_000),
            settings,
        };
        bed.touch();
        Ok(bed)
    }

    /// The core is replaced: a new core page, and the rings attach to what the old ones left.
    ///
    /// # Errors
    /// As [`Rings::attach`].
    pub fn replace_core(&mut self, words: impl Fn(usize) -> W) -> Result<(), AttachError> {
        let life = self.front.life() + 1;
        self.front.set_life(life);
        self.core = CorePage::new(words(CorePage::<W>::WORDS));
        self.core.init(self.front.session(), life);
        self.rings = Rings::attach(self.settings, self.state.clone(), &self.front, &self.core)?;
        Ok(())
    }

    /// The guest clears the ring's memory, writes its nonce and enables the ring.
    pub fn enable(&mut self, plan: &mut RingPlan) {
        plan.tail = 0;
        plan.head = 0;
        let setup = plan.setup;
        for word in 0..16 {
            self.guest.store_u64(setup.events + 8 * word, 0);
        }
        for slot in 0..u64::from(setup.completion_entries) {
            self.guest
                .store_u64(setup.completions + slot * COMPLETION_BYTES as u64 + 24, 0);
        }
        self.guest
            .store_u64(setup.events + event_offset::NONCE, setup.nonce);
        plan.setup.epoch = self.front.set_ring(plan.n, &setup);
        self.touch();
    }

    pub fn handle(&mut self, input: Input) -> Turn {
        self.rings
            .handle(self.now, &self.front, &self.core, &mut self.memory, input)
    }

    pub fn touch(&mut self) -> Turn {
        self.handle(Input::Touched)
    }

    pub fn poll(&mut self, budget: u32) -> Turn {
        self.handle(Input::Poll { budget })
    }

    pub fn end_turn(&mut self) -> Turn {
        self.handle(Input::TurnEnd)
    }

    /// All outputs there are.
    pub fn outputs(&mut self) -> Vec<Output> {
        std::iter::from_fn(|| self.rings.poll_output()).collect()
    }

    pub fn arm(&mut self) -> bool {
        self.rings.arm(&self.front, &mut self.memory)
    }
}
