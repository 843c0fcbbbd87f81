//! The front's loop, towards the core: its lives, what it asks, whether it is alive.
//!
//! In: core lives, packets and kicks of the core. Out: packets for it; calls of sessions. Must never know: what a client asks.

use super::closer::NO_LISTENER;
use super::core_link::CoreLink;
use super::limits::{self, FREEZE_ORPHANED_NS_MAX, FREEZES_ASKED_MAX};
use super::message_dma::Ask;
use super::server::{CORE, Front, WAKE};
use super::session::Session;
use crate::channel::Packet;
use crate::messages::{CoreToFront, FrontToCore, FrontToKeeper};
use mio::Interest;
use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use std::collections::{BTreeSet, VecDeque};
use vmgmt_device::Tick;

impl Front {
    pub(super) fn core_begins(&mut self, life: u64, fds: Vec<OwnedFd>) -> anyhow::Result<()> {
        let core = CoreLink::new(life, fds)?;
        self.drop_core();
        self.watch_core(core)?;
        self.tell_sandbox();
        self.adopting = Some(self.slots().into());
        Ok(())
    }

    /// What this process is shut in, for the operators.
    pub(super) fn tell_sandbox(&mut self) {
        let sandbox = Box::new(self.sandbox.clone());
        let to_keeper = FrontToKeeper::Sandboxed(sandbox.clone());
        self.keeper.send(to_keeper, Vec::new(), Vec::new());
        if let Some(core) = &mut self.core {
            core.outbox
                .send(FrontToCore::Sandboxed(sandbox), Vec::new(), Vec::new());
        }
    }

    /// Takes a link to the core into service.
    pub(super) fn watch_core(&mut self, core: CoreLink) -> std::io::Result<()> {
        let channel = core.outbox.channel().as_fd().as_raw_fd();
        self.register(channel, CORE, Interest::READABLE)?;
        self.register(core.wake_front.as_raw_fd(), WAKE, Interest::READABLE)?;
        self.core = Some(core);
        self.core_ready = true;
        Ok(())
    }

    /// Tells the new core of the sessions that there are, some in each turn; then `Adopted`.
    pub(super) fn adopt(&mut self) {
        for _ in 0..limits::ADOPTIONS_PER_TURN_MAX {
            if self.adopting.is_none() || self.is_held_up() {
                return;
            }
            match self.adopting.as_mut().and_then(VecDeque::pop_front) {
                Some(slot) => self.serve(slot, Session::tell_core),
                None => {
                    self.adopting = None;
                    for (vm, _) in self.frozen.all() {
                        self.tell_frozen(vm, 0);
                    }
                    if let Some(core) = &mut self.core {
                        core.wake(self.now);
                        core.outbox.send(FrontToCore::Adopted, Vec::new(), Vec::new());
                    }
                }
            }
        }
    }

    pub(super) fn core_dead(&mut self, life: u64) {
        if self.core.as_ref().is_some_and(|core| core.life == life) {
            self.drop_core();
        }
        for slot in self.slots() {
            self.serve(slot, |session, outside| session.core_dead(outside, life));
            self.enqueue(slot);
        }
    }

    fn drop_core(&mut self) {
        self.adopting = None;
        self.frozen.core_gone(self.now.after_ns(FREEZE_ORPHANED_NS_MAX));
        self.core_ready = false;
        if let Some(core) = self.core.take() {
            self.deregister(core.outbox.channel().as_fd().as_raw_fd());
            self.deregister(core.wake_front.as_raw_fd());
        }
    }

    pub(super) fn core_packets(&mut self) {
        for _ in 0..limits::PACKETS_PER_TURN_MAX {
            // Most are answered: a core that asks on, and does not take what waits, is not listened to.
            if self.is_held_up() {
                return;
            }
            let Some(core) = self
                .core
                .as_ref()
                .filter(|core| self.core_ready && !core.outbox.is_broken())
            else {
                self.core_ready = false;
                return;
            };
            match core.outbox.channel().receive::<CoreToFront>() {
                Ok(Some(packet)) => self.core_packet(packet),
                Ok(None) => self.core_ready = false,
                Err(error) => {
                    tracing::warn!(%error, "the core's channel");
                    self.core_broken(false);
                }
            }
        }
    }

    fn core_packet(&mut self, packet: Packet<CoreToFront>) {
        // It has no reason to send any. What a core that was taken over sends may be a client's.
        for fd in packet.fds {
            self.closer.close(NO_LISTENER, fd);
        }
        if self.closer.is_behind(NO_LISTENER) {
            return self.core_broken(false);
        }
        let (number, request, fence, ask) = match packet.header {
            CoreToFront::DmaRead {
                session,
                request,
                fence,
                iova,
                bytes,
            } => (session, request, fence, Ask::Read { iova, bytes }),
            CoreToFront::DmaWrite {
                session,
                request,
                fence,
                iova,
            } => (
                session,
                request,
                fence,
                Ask::Write {
                    iova,
                    data: packet.payload,
                },
            ),
            CoreToFront::Freeze {
                vm,
                until,
                request,
                kept,
            } => return self.freeze(vm, until, request, kept),
        };
        let slot = self.numbers.get(&number).copied();
        let live = slot.filter(|slot| {
            self.sessions
                .get(*slot)
                .is_some_and(|session| session.socket.is_some())
        });
        match live {
            Some(slot) => self.serve(slot, |session, outside| {
                session.message_dma(outside, request, fence, ask)
            }),
            None => {
                let error = vmgmt_wire::Errno::ENODEV.0;
                if let Some(core) = &mut self.core {
                    core.outbox.send(
                        FrontToCore::DmaAnswer {
                            session: number,
                            request,
                            error,
                        },
                        Vec::new(),
                        Vec::new(),
                    );
                }
            }
        }
    }

    /// The operator's wish: a level that outlives sessions and core lives.
    fn freeze(&mut self, vm: u64, until: Option<Tick>, request: u64, kept: Option<bool>) {
        if kept == Some(true) {
            self.frozen.keep(vm);
            return self.tell_frozen(vm, request);
        }
        if !self.frozen.set(vm, until, kept.is_none()) {
            tracing::error!(vm, "more VMs are frozen than the front keeps in mind");
        }
        let until = self.frozen.until(vm);
        if until.is_none() {
            self.frozen.asked.retain(|(asked, _)| *asked != vm);
        }
        for slot in self.slots() {
            if self.sessions.get(slot).is_some_and(|session| session.vm == vm) {
                self.serve(slot, |session, outside| session.freeze(outside, until.is_some()));
            }
        }
        match until {
            Some(_) if self.frozen.asked.len() < FREEZES_ASKED_MAX => self.frozen.asked.push((vm, request)),
            _ => self.tell_frozen(vm, request),
        }
    }

    /// Lets those go whose time is over, and answers where no client has a message of ours any more that reads or writes its memory (the
    /// answers do not matter, but a write that comes late would).
    pub(super) fn freezes(&mut self) {
        while let Some(vm) = self.frozen.due(self.now) {
            let kept = self.frozen.is_kept(vm);
            tracing::warn!(
                vm,
                kept,
                "thawed: the time that the VM was to be frozen is over, or (not kept) the core died before it answered who asked"
            );
            self.freeze(vm, None, 0, None);
        }
        for (vm, request) in std::mem::take(&mut self.frozen.asked) {
            let of_vm = self.sessions.iter().filter(|(_, session)| session.vm == vm);
            if of_vm.into_iter().any(|(_, session)| session.messages_out) {
                self.frozen.asked.push((vm, request));
            } else {
                self.tell_frozen(vm, request);
            }
        }
    }

    fn tell_frozen(&mut self, vm: u64, request: u64) {
        let (until, kept) = (self.frozen.until(vm), self.frozen.is_kept(vm));
        if let Some(core) = &mut self.core {
            let told = FrontToCore::Frozen {
                vm,
                until,
                request,
                kept,
            };
            core.outbox.send(told, Vec::new(), Vec::new());
        }
    }

    /// Sends what waited for the core.
    pub(super) fn flush_core(&mut self) {
        if let Some(core) = &mut self.core {
            core.outbox.flush();
        }
    }

    /// Maps whose objects are with the core go on. It is asked anew in each turn: whoever sends anything sends what waits before it, too.
    pub(super) fn resume_maps(&mut self) {
        if self.stalled.is_empty() {
            return;
        }
        let behind: BTreeSet<u64> = self.core.iter().flat_map(CoreLink::objects_waiting).collect();
        for slot in self.stalled.clone() {
            let number = self.sessions.get(slot).map(|session| session.number);
            if number.is_some_and(|number| !behind.contains(&number)) {
                self.enqueue(slot);
            }
        }
    }

    /// The keeper kills a core that does not speak any more; nothing is sent to it until its death is told.
    pub(super) fn core_broken(&mut self, innocent: bool) {
        let told = self
            .core
            .as_mut()
            .and_then(|core| core.give_up().then_some(core.life));
        if let Some(life) = told {
            self.tell_keeper(FrontToKeeper::CoreStuck { life, innocent });
        }
        self.core_ready = false;
        for slot in self.slots() {
            self.enqueue(slot);
        }
    }

    pub(super) fn kicks(&mut self) {
        if self.core.as_mut().is_some_and(CoreLink::take_kicks) {
            for slot in self.slots() {
                self.serve(slot, Session::kicks);
            }
        }
    }

    pub(super) fn beat(&mut self) {
        let owes = !self.waiting.is_empty();
        let now = self.now;
        let stuck = self
            .core
            .as_mut()
            .and_then(|core| core.is_stuck(now, owes).then_some(core.life));
        if let Some(life) = stuck {
            tracing::warn!(life, "the core's beat stands still");
            let innocent = false;
            self.tell_keeper(FrontToKeeper::CoreStuck { life, innocent });
        }
    }

    /// So much waits for the core that nobody is served.
    pub(super) fn is_held_up(&self) -> bool {
        self.core
            .as_ref()
            .is_some_and(|core| core.outbox.len() >= limits::CORE_QUEUE_MAX)
    }
}
