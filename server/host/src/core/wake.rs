//! Sleeping and waking between front and core: the scheme of `device/page/shared.rs`, with its eventfds.
//!
//! In: "I am about to sleep", "look at this session". Out: whether there is something to look at; a signal if the other
//! sleeps. Must never know what there is to look at.

use crate::words::MappedWords;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use vmgmt_device::page::{LifePage, TouchedPage};

/// The core's side of one core life.
#[derive(Debug)]
pub struct Wake {
    touched: TouchedPage<MappedWords>,
    life: LifePage<MappedWords>,
    core: OwnedFd,
    front: OwnedFd,
    /// `total` when the slots were last looked at.
    seen: u64,
    kicked: bool,
}

impl Wake {
    #[must_use]
    pub const fn new(
        touched: TouchedPage<MappedWords>,
        life: LifePage<MappedWords>,
        core: OwnedFd,
        front: OwnedFd,
    ) -> Self {
        Self {
            touched,
            life,
            core,
            front,
            seen: u64::MAX,
            kicked: false,
        }
    }

    /// The eventfd by which the front wakes the core.
    #[must_use]
    pub fn core_fd(&self) -> BorrowedFd<'_> {
        self.core.as_fd()
    }

    /// Clears it.
    pub fn drain(&self) {
        let mut value = [0u8; 8];
        let _ = rustix::io::read(&self.core, &mut value);
    }

    /// Whether any session was touched since this was last asked.
    pub fn is_touched(&mut self) -> bool {
        let total = self.touched.total();
        std::mem::replace(&mut self.seen, total) != total
    }

    /// The front's counter for a slot.
    #[must_use]
    pub fn touched(&self, slot: usize) -> u64 {
        self.touched.touched(slot)
    }

    /// The front is to look at the session in this slot; told by [`Wake::tell`].
    pub fn kick(&mut self, slot: usize) {
        self.life.kick(slot);
        self.kicked = true;
    }

    /// Wakes the front if it was kicked and sleeps.
    pub fn tell(&mut self) {
        if std::mem::take(&mut self.kicked) && self.touched.must_wake_front() {
            let _ = rustix::io::write(&self.front, &1u64.to_ne_bytes());
        }
    }

    /// Says that the core is about to sleep. False: something was touched meanwhile, it must not.
    pub fn fall_asleep(&mut self) -> bool {
        let sleeps = self.life.core_falls_asleep(&self.touched, self.seen);
        if sleeps {
            // All touches so far were looked at: one that came in the middle of this turn would else seem to wait as long as nothing else happens.
            self.beat();
        } else {
            self.life.set_core_asleep(false);
        }
        sleeps
    }

    /// Says that it is awake again.
    pub fn wake_up(&self) {
        self.life.set_core_asleep(false);
    }

    /// The loop goes round.
    pub fn beat(&self) {
        self.life.move_beat();
    }

    /// The session whose input is handled, 0: none.
    pub fn blame(&self, session: u64) {
        self.life.set_blame(session, 0);
    }

    /// Two whose memories meet (0: none).
    pub fn blame_both(&self, session: u64, other: u64) {
        self.life.set_blame(session, other);
    }

    /// The VM for which the loop does something of which it does not know the session, 0: none.
    pub fn blame_vm(&self, vm: u64) {
        self.life.set_blamed_vm(0, vm);
    }

    /// By which workers say for which VM they work.
    pub fn worker_blame(&self) -> impl Fn(usize, u64) + Send + Sync + 'static {
        let life = self.life.clone();
        move |worker, vm| life.set_blamed_vm(1 + worker, vm)
    }
}
