//! The whole front packed for its successor, and unpacked again.
//!
//! In: a [`Front`]; or bytes and descriptors of this or another version, checked like a peer's. Out: the other of both. Must never know: how
//! they travel.
//!
//! The saved form has types of its own; its format is that of [`crate::packed`].

mod core_link;
mod session;

use super::frozen::Frozen;
use super::log_budget::LogBudget;
use super::server::{Front, LISTENERS, Listener, SESSIONS, take_all_in_order};
use super::{limits, session::Session};
use crate::config::DeviceConfig;
use crate::packed::{self, Carried, Packer, Refusal, Unpacker};
use core_link::SavedCoreLink;
use mio::{Interest, Token};
use rustix::fd::{AsRawFd, BorrowedFd, OwnedFd};
use serde::{Deserialize, Serialize};
pub use session::SavedMessageDma;
use session::SavedSession;
use slab::Slab;
use std::collections::BTreeSet;
use vmgmt_device::Tick;

/// What this version writes. It reads this one and the one before.
const VERSION: u32 = 1;
const VERSION_OLDEST: u32 = 1;
#[derive(Debug, Serialize, Deserialize)]
struct SavedFront {
    next_session: u64,
    accept_again: Tick,
    log: SavedLogBudget,
    listeners: Vec<SavedListener>,
    sessions: Vec<SavedSession>,
    core: Option<SavedCoreLink>,
    adopting: Option<Vec<usize>>,
    frozen: SavedFrozen,
}

#[derive(Debug, Serialize, Deserialize)]
struct SavedListener {
    number: u32,
    socket: Carried,
    device: DeviceConfig,
}

/// Which VMs are frozen.
#[derive(Debug, Serialize, Deserialize)]
pub struct SavedFrozen {
    /// VM, until when.
    vms: Vec<(u64, Tick)>,
    /// VM and the core's request, not answered yet.
    asked: Vec<(u64, u64)>,
    /// VMs of whose freeze nobody was told, and when they are let go.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    untold: Vec<(u64, Tick)>,
}

#[derive(Debug, Serialize, Deserialize)]
struct SavedLogBudget {
    lines: u32,
    counted: Tick,
    suppressed: u64,
}

impl Front {
    /// Packs the front: bytes, and the descriptors that they name. Nothing changes by it.
    ///
    /// # Errors
    /// Something of ours is in a state that cannot be packed.
    pub fn save(&self) -> Result<(Vec<u8>, Vec<BorrowedFd<'_>>), Refusal> {
        // Exhaustive, so that a new field cannot be forgotten.
        let Self {
            poll: _,
            // Its words are with the keeper before a front is packed.
            keeper: _,
            listeners,
            sessions,
            numbers: _,
            core,
            adopting,
            ready: _,
            deadlines: _,
            waiting: _,
            stalled: _,
            unmask,
            next_session,
            accept_again,
            newcomers_again: _,
            buffer: _,
            keeper_ready: _,
            core_ready: _,
            stopping,
            left: _,
            frozen,
            log,
            // This process's own.
            sandbox: _,
            now: _,
            signals: _,
            // What waits to be closed is closed by this front, or by its end.
            closer: _,
        } = self;
        if stopping.is_some() {
            return Err("the daemon is being ended".into());
        }
        let mut packer = Packer::default();
        let saved = SavedFront {
            next_session: *next_session,
            accept_again: *accept_again,
            log: SavedLogBudget::from(log),
            listeners: listeners
                .iter()
                .map(|(number, Listener { socket, device, .. })| SavedListener {
                    number: *number,
                    socket: packer.carry(socket),
                    device: device.clone(),
                })
                .collect(),
            sessions: sessions
                .iter()
                .map(|(slot, session)| SavedSession::save(session, unmask.get(&slot), &mut packer))
                .collect::<Result<_, _>>()?,
            core: core.as_ref().map(|core| SavedCoreLink::save(core, &mut packer)),
            frozen: SavedFrozen::from(frozen),
            adopting: adopting.as_ref().map(|slots| slots.iter().copied().collect()),
        };
        let bytes = packed::write(VERSION, &saved, packer.fds.len())?;
        Ok((bytes, packer.fds))
    }

    /// Becomes the front that was packed; this one must be fresh. It touches nothing of a client, and looks at everything in its next turn.
    ///
    /// # Errors
    /// Whatever does not fit; the caller ends this front then.
    pub fn restore(&mut self, bytes: &[u8], fds: Vec<OwnedFd>) -> Result<(), Refusal> {
        let SavedFront {
            next_session,
            accept_again,
            log,
            listeners,
            sessions,
            core,
            adopting,
            frozen,
        } = packed::read(bytes, VERSION_OLDEST..=VERSION, fds.len())?;
        let mut unpacker = Unpacker::new(fds);
        self.frozen = frozen.restore()?;
        self.next_session = next_session;
        self.accept_again = accept_again;
        self.log = log.into();
        for SavedListener {
            number,
            socket,
            device,
        } in listeners
        {
            let socket = self.closer.watch(number, unpacker.shared(socket)?);
            let token = Token(LISTENERS + number as usize);
            self.register(socket.as_raw_fd(), token, Interest::READABLE)?;
            let listener = Listener {
                socket,
                device,
                ready: true,
            };
            if self.listeners.insert(number, listener).is_some() {
                return Err("a listener is there twice".into());
            }
        }
        if let Some(saved) = core {
            let core = saved.restore(&mut unpacker, &self.closer)?;
            self.watch_core(core)?;
        }
        self.take_sessions(sessions, &mut unpacker)?;
        unpacker.finish()?;
        let known = |slots: &Vec<usize>| slots.iter().all(|slot| *slot < limits::SESSIONS_MAX);
        if !adopting.as_ref().is_none_or(known) {
            return Err("a slot to be adopted is out of range".into());
        }
        self.adopting = adopting.filter(|_| self.core.is_some()).map(Into::into);
        Ok(())
    }

    fn take_sessions(&mut self, saved: Vec<SavedSession>, unpacker: &mut Unpacker) -> Result<(), Refusal> {
        let mut sessions: Vec<(usize, Session)> = Vec::new();
        let mut slots = BTreeSet::new();
        for one in saved {
            let (slot, session, unmask) = one.restore(unpacker, &self.closer)?;
            let number = session.number;
            if slot >= limits::SESSIONS_MAX || !slots.insert(slot) {
                return Err("a session's slot is out of range or used twice".into());
            }
            if number >= self.next_session || self.numbers.insert(number, slot).is_some() {
                return Err("a session's number is to come, or used twice".into());
            }
            if let Some(socket) = &session.socket {
                // A front of an earlier version may not have done it.
                take_all_in_order(socket)?;
                let token = Token(SESSIONS + 2 * slot);
                self.register(socket.as_raw_fd(), token, Interest::READABLE | Interest::WRITABLE)?;
            }
            if let Some(fd) = unmask {
                self.register(fd.as_raw_fd(), Token(SESSIONS + 2 * slot + 1), Interest::READABLE)?;
                self.unmask.insert(slot, fd);
            }
            sessions.push((slot, session));
        }
        self.sessions = sessions.into_iter().collect::<Slab<_>>();
        for slot in self.slots() {
            self.book(slot);
            self.enqueue(slot);
        }
        Ok(())
    }
}

impl From<&Frozen> for SavedFrozen {
    fn from(frozen: &Frozen) -> Self {
        Self {
            vms: frozen.all(),
            asked: frozen.asked.clone(),
            untold: frozen.untold.iter().map(|(vm, until)| (*vm, *until)).collect(),
        }
    }
}

impl SavedFrozen {
    /// # Errors
    /// More than there can be.
    pub fn restore(self) -> Result<Frozen, Refusal> {
        let Self { vms, asked, untold } = self;
        let mut frozen = Frozen::default();
        let room = vms.iter().all(|(vm, until)| frozen.set(*vm, Some(*until), true));
        if !room || asked.len() > limits::FREEZES_ASKED_MAX {
            return Err("more VMs are frozen than can be".into());
        }
        if untold.iter().any(|(vm, _)| frozen.until(*vm).is_none()) {
            return Err("a VM is to be thawed that is not frozen".into());
        }
        frozen.asked = asked;
        frozen.untold = untold.into_iter().collect();
        Ok(frozen)
    }
}

impl From<&LogBudget> for SavedLogBudget {
    fn from(budget: &LogBudget) -> Self {
        let LogBudget {
            lines,
            counted,
            suppressed,
        } = budget;
        Self {
            lines: *lines,
            counted: *counted,
            suppressed: *suppressed,
        }
    }
}

impl From<SavedLogBudget> for LogBudget {
    fn from(saved: SavedLogBudget) -> Self {
        let SavedLogBudget {
            lines,
            counted,
            suppressed,
        } = saved;
        Self {
            lines: lines.min(limits::LOG_LINES_MAX),
            counted,
            suppressed,
        }
    }
}
