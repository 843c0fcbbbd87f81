//! The two pages that all sessions share in one core life: by them a sleeper learns that and where to look.
//!
//! *Touched page* (front writes): 0 layout, 1 total, 2 front asleep, 3 front's life, 64 + slot: changes of that session.
//! *Life page* (core writes): 0 layout, 1 asleep, 2 beat, 3 kicks, 4 and 5 blame: sessions, 64 + slot: "look at this session", behind
//! them blame: the VM of each worker.
//!
//! The scheme, both ways: the writer writes its words, moves `touched[slot]` and `total`, makes a SeqCst fence, and signals
//! the eventfd if the other is asleep. The sleeper sets `asleep`, makes a SeqCst fence, compares `total`, and only then sleeps.
//! Both halves of it are here, so that a model checker can run them (tests/fuzz-bodies/tests/ordering).

use super::{LAYOUT, Words, is_readable};

/// Session slots at most: sessions that live at the same time in one front.
pub const SLOTS_MAX: usize = 4096;

const TOTAL: usize = 1;
const FRONT_ASLEEP: usize = 2;
const SLOTS: usize = 64;

const ASLEEP: usize = 1;
const BEAT: usize = 2;
const KICKS: usize = 3;
const BLAME: usize = 4;
/// A copy from VM to VM handles two.
const BLAMED_SESSIONS: usize = 2;
const BLAMED_VM: usize = SLOTS + SLOTS_MAX;
/// Places that can blame a VM: the loop, and each worker.
pub const BLAMED_VMS: usize = 257;

/// View of the touched page.
#[derive(Clone, Debug)]
pub struct TouchedPage<W: Words> {
    words: W,
}

impl<W: Words> TouchedPage<W> {
    pub const WORDS: usize = SLOTS + SLOTS_MAX;

    pub const fn new(words: W) -> Self {
        Self { words }
    }
    pub fn init(&self) {
        self.words.store(0, LAYOUT);
    }
    #[must_use]
    pub fn is_valid(&self) -> bool {
        is_readable(self.words.load(0)) && self.words.len() >= Self::WORDS
    }
    /// Front: something changed in the session in `slot`.
    pub fn touch(&self, slot: usize) {
        if slot < SLOTS_MAX {
            self.words
                .store(SLOTS + slot, self.words.load(SLOTS + slot).wrapping_add(1));
            self.words.store(TOTAL, self.words.load(TOTAL).wrapping_add(1));
        }
    }
    #[must_use]
    pub fn total(&self) -> u64 {
        self.words.load(TOTAL)
    }
    #[must_use]
    pub fn touched(&self, slot: usize) -> u64 {
        if slot < SLOTS_MAX {
            self.words.load(SLOTS + slot)
        } else {
            0
        }
    }
    #[must_use]
    pub fn front_asleep(&self) -> bool {
        self.words.load(FRONT_ASLEEP) != 0
    }
    pub fn set_front_asleep(&self, asleep: bool) {
        self.words.store(FRONT_ASLEEP, u64::from(asleep));
    }
    /// Core, after its kicks: whether the front sleeps and is to be signalled.
    #[must_use]
    pub fn must_wake_front(&self) -> bool {
        self.words.fence();
        self.front_asleep()
    }
    /// Front: says that it goes to sleep. False: the core kicked since `kicks_seen`, it must not.
    #[must_use]
    pub fn front_falls_asleep(&self, life: &LifePage<W>, kicks_seen: u64) -> bool {
        self.set_front_asleep(true);
        self.words.fence();
        life.kicks() == kicks_seen
    }
}

/// View of the life page.
#[derive(Clone, Debug)]
pub struct LifePage<W: Words> {
    words: W,
}

impl<W: Words> LifePage<W> {
    pub const WORDS: usize = BLAMED_VM + BLAMED_VMS;

    pub const fn new(words: W) -> Self {
        Self { words }
    }
    pub fn init(&self) {
        self.words.store(0, LAYOUT);
    }
    #[must_use]
    pub fn is_valid(&self) -> bool {
        is_readable(self.words.load(0)) && self.words.len() >= Self::WORDS
    }
    #[must_use]
    pub fn core_asleep(&self) -> bool {
        self.words.load(ASLEEP) != 0
    }
    pub fn set_core_asleep(&self, asleep: bool) {
        self.words.store(ASLEEP, u64::from(asleep));
    }
    /// Front, after its touches: whether the core sleeps and is to be signalled.
    #[must_use]
    pub fn must_wake_core(&self) -> bool {
        self.words.fence();
        self.core_asleep()
    }
    /// Core: says that it goes to sleep. False: something was touched since `total_seen`, it must not.
    #[must_use]
    pub fn core_falls_asleep(&self, touched: &TouchedPage<W>, total_seen: u64) -> bool {
        self.set_core_asleep(true);
        self.words.fence();
        touched.total() == total_seen
    }
    #[must_use]
    pub fn beat(&self) -> u64 {
        self.words.load(BEAT)
    }
    pub fn move_beat(&self) {
        self.words.store(BEAT, self.words.load(BEAT).wrapping_add(1));
    }
    #[must_use]
    pub fn kicks(&self) -> u64 {
        self.words.load(KICKS)
    }
    /// Core: look at the session in `slot` (an INTx is due, a fence has passed).
    pub fn kick(&self, slot: usize) {
        if slot < SLOTS_MAX {
            self.words
                .store(SLOTS + slot, self.words.load(SLOTS + slot).wrapping_add(1));
            self.words.store(KICKS, self.words.load(KICKS).wrapping_add(1));
        }
    }
    #[must_use]
    pub fn kicked(&self, slot: usize) -> u64 {
        if slot < SLOTS_MAX {
            self.words.load(SLOTS + slot)
        } else {
            0
        }
    }
    /// Sessions whose input the core's loop is handling. Read by the keeper after a death.
    pub fn blamed_sessions(&self) -> impl Iterator<Item = u64> + '_ {
        (BLAME..BLAME + BLAMED_SESSIONS)
            .map(|index| self.words.load(index))
            .filter(|session| *session != 0)
    }
    /// Sets them (0: none).
    pub fn set_blame(&self, session: u64, other: u64) {
        self.words.store(BLAME, session);
        self.words.store(BLAME + 1, other);
    }
    /// VMs for which a worker is doing something, or the loop something of which it does not know the session.
    pub fn blamed_vms(&self) -> impl Iterator<Item = u64> + '_ {
        (BLAMED_VM..BLAMED_VM + BLAMED_VMS)
            .map(|index| self.words.load(index))
            .filter(|vm| *vm != 0)
    }
    /// `place` 0 is the loop's, the others are the workers'. 0: no VM.
    pub fn set_blamed_vm(&self, place: usize, vm: u64) {
        if place < BLAMED_VMS {
            self.words.store(BLAMED_VM + place, vm);
        }
    }
}
