//! What the front's page says, compared with what the rings hold: level-triggered, so that any number of changes may be missed.
//!
//! In: the front page, or the table that an earlier core life left. Out: rings that begin, end or are void, and the words that say so.

use super::interface::{Channel, Output};
use super::port::Port;
use super::recover;
use super::ring::{Ring, Stage};
use super::room::Rings;
use crate::page::{CorePage, FrontPage, OpenAnswer, RingSetup, Words};
use vmgmt_abi::registers::{DeviceState, RINGS_MAX, RingState};
use vmgmt_abi::{Status, feature};

impl<W: Words> Rings<W> {
    pub(super) fn adopt(&mut self, front: &FrontPage<W>, core: &CorePage<W>) {
        let Some(port) = Port::adopt(&self.desk) else {
            return self.fail(None, Status::OUTCOME_UNKNOWN, core);
        };
        self.port = port;
        if let Some(cause) = self.desk.table.failed(self.desk.generation) {
            self.failed = true;
            core.set_state(self.desk.generation, DeviceState::FAILED, cause);
        }
        for n in 0..RINGS_MAX {
            let Some(epoch) = self.desk.table.ring_epoch(n) else {
                // The life before may have closed it and died before the hub knew.
                if front.ring(n).is_none_or(|setup| setup.epoch != 0) {
                    self.channel_closed(n);
                }
                continue;
            };
            // A set-up that is being written has another epoch already.
            let setup = front
                .ring(n)
                .filter(|setup| setup.enabled && setup.epoch == epoch);
            let Some(setup) = setup.filter(|_| !self.failed) else {
                self.desk.table.close_ring(n);
                self.channel_closed(n);
                continue;
            };
            let Some(ring) = recover::adopt(&mut self.desk, n, setup) else {
                return self.fail(Some(n), Status::OUTCOME_UNKNOWN, core);
            };
            if let Some(place) = self.rings.get_mut(n) {
                *place = ring;
            }
            // As the guest knows it, while it is looked at.
            answer_open(core, n, epoch, RingState::OPEN, Status::OK);
            core.set_state(self.desk.generation, DeviceState::ACTIVE, Status::OK);
        }
    }

    /// The device was reset: everything in flight is void.
    pub(super) fn reset(&mut self, generation: u64, front: &FrontPage<W>) {
        for n in 0..RINGS_MAX {
            self.take_leave(n);
            self.desk.table.close_ring(n);
        }
        for ring in &mut self.rings {
            *ring = closed_under(ring.setup);
        }
        self.port.take_leave(&mut self.desk, front);
        self.desk.generation = generation;
        self.failed = false;
        // A second reset before the first was told says nothing new.
        if self.farewells.generation.replace(generation).is_none() {
            self.then_say(Output::Reset {
                session: self.desk.settings.session,
            });
        }
    }

    /// The guest broke the contract on ring `n`: its device fails until it is reset. The port window goes on, so that a program without
    /// a driver can still ask.
    pub(super) fn fail(&mut self, n: Option<usize>, cause: Status, core: &CorePage<W>) {
        self.failed = true;
        self.desk.counters.failures += 1;
        self.desk.table.set_failed(self.desk.generation, cause);
        core.set_state(self.desk.generation, DeviceState::FAILED, cause);
        for place in 0..RINGS_MAX {
            let known = self.desk.table.ring_epoch(place).is_some();
            self.take_leave(place);
            self.desk.table.close_ring(place);
            if known {
                self.channel_closed(place);
            }
        }
        for ring in &mut self.rings {
            *ring = closed_under(ring.setup);
        }
        if let Some((n, ring)) = n.and_then(|n| Some((n, self.rings.get(n)?))) {
            answer_open(core, n, ring.setup.epoch, RingState::REFUSED, cause);
        }
        self.desk.outputs.push_back(Output::Kick);
    }

    pub(super) fn channel_closed(&mut self, n: usize) {
        self.then_say(Output::ChannelClosed {
            session: self.desk.settings.session,
            channel: Channel::Ring(n as u8),
        });
    }

    /// Compares everything with the front page.
    pub(super) fn refresh(&mut self, front: &FrontPage<W>, core: &CorePage<W>) {
        let generation = front.generation();
        if generation != self.desk.generation {
            self.reset(generation, front);
        }
        self.desk.suppression = front.features() & feature::EVENT_SUPPRESSION != 0;
        for n in 0..RINGS_MAX {
            match front.ring(n) {
                Some(setup) => self.refresh_ring(n, &setup, front, core),
                None => self.end_unread(n, core),
            }
        }
        let interrupts = Some((front.interrupts(), front.vectors_changed()));
        if interrupts != self.interrupts {
            // What was signalled before may have gone nowhere.
            self.interrupts = interrupts;
            self.rings
                .iter_mut()
                .for_each(|ring| ring.signal |= ring.is_open());
        }
    }

    /// A set-up that is being written. The front will touch this session again; but whatever it is going to be, the ring of before has ended, and
    /// where it was closed before and is enabled again its memory is the guest's already.
    fn end_unread(&mut self, n: usize, core: &CorePage<W>) {
        let Some(ring) = self.rings.get(n) else {
            return;
        };
        if matches!(ring.stage, Stage::Open | Stage::Opening { .. }) {
            let under = RingSetup {
                enabled: false,
                ..ring.setup
            };
            self.close(n, &under, core);
        }
    }

    /// Ring `n` is closed under a set-up: at once, or, where it is open, when nothing of it is on its way any more.
    fn close(&mut self, n: usize, under: &RingSetup, core: &CorePage<W>) {
        // An answer may be of before the guest prepared the ring anew: its nonce would be the old one.
        self.stale_reads = true;
        match self.rings.get_mut(n) {
            // (It closes already where this set-up was seen while it was being written.)
            Some(ring) if matches!(ring.stage, Stage::Open | Stage::Closing { .. }) => {
                ring.stage = Stage::Closing { under: *under };
            }
            _ => self.closed(n, under, core),
        }
    }

    pub(super) fn refresh_ring(
        &mut self,
        n: usize,
        setup: &RingSetup,
        front: &FrontPage<W>,
        core: &CorePage<W>,
    ) {
        let Some(ring) = self.rings.get_mut(n) else {
            return;
        };
        let doorbell = front.doorbell(n);
        if doorbell != ring.doorbell {
            ring.doorbell = doorbell;
            (ring.look, ring.look_head) = (true, true);
        }
        if setup.epoch == ring.epoch_seen() {
            return;
        }
        if !setup.enabled {
            return self.close(n, setup, core);
        }
        // As where it is closed.
        self.stale_reads = true;
        let known = self.desk.table.ring_epoch(n).is_some();
        self.take_leave(n);
        let Some(ring) = self.rings.get_mut(n) else {
            return;
        };
        if self.failed {
            *ring = closed_under(*setup);
            answer_open(core, n, setup.epoch, RingState::REFUSED, Status::NOT_READY);
        } else {
            *ring = Ring::opening(*setup, false);
            ring.doorbell = doorbell;
        }
        if known {
            self.desk.table.close_ring(n);
            self.channel_closed(n);
        }
    }
}

impl<W: Words> Rings<W> {
    /// Ring `n` is closed under a set-up, and nothing of it is left.
    pub(super) fn closed(&mut self, n: usize, setup: &RingSetup, core: &CorePage<W>) {
        let known = self.desk.table.ring_epoch(n).is_some();
        self.take_leave(n);
        if let Some(ring) = self.rings.get_mut(n) {
            let doorbell = ring.doorbell;
            *ring = closed_under(*setup);
            ring.doorbell = doorbell;
        }
        if known {
            self.desk.table.close_ring(n);
            self.channel_closed(n);
        }
        answer_open(core, n, setup.epoch, RingState::CLOSED, Status::OK);
    }
}

/// A ring without work that remembers which set-up it has answered.
pub(super) fn closed_under(setup: RingSetup) -> Ring {
    Ring {
        setup,
        ..Ring::closed()
    }
}

pub(super) fn answer_open<W: Words>(
    core: &CorePage<W>,
    n: usize,
    epoch: u32,
    state: RingState,
    status: Status,
) {
    core.set_open_answer(n, OpenAnswer { epoch, state, status });
}
