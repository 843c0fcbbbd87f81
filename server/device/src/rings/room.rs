//! The rings of one session in one core life: the verbs, and which part of the room does what.

use super::check;
use super::complete;
use super::farewell::Farewells;
use super::fetch;
use super::host_page::HostPageWriter;
use super::interface::{
    Answer, AttachError, Buffer, Channel, Counters, HostFacts, Input, Output, Saved, Settings, Token, Turn,
};
use super::limits::BATCH_MAX;
use super::open::{self, NotOpen};
use super::port::Port;
use super::recover;
use super::refresh::answer_open;
use super::ring::{Desk, Due, Ring, Stage, Standing, Stop};
use super::table::{STATE_WORDS, Table};
use crate::page::{CorePage, FrontPage, Interrupts, Words, control};
use crate::{GuestMemory, MemoryError, Tick};
use std::collections::VecDeque;
use vmgmt_abi::registers::{DeviceState, RINGS_MAX, RingState, VECTORS_MAX};
use vmgmt_abi::ring::event_offset;
use vmgmt_abi::{Status, feature};

/// Version of [`Saved`].
const SAVED_VERSION: u32 = 1;

/// The core half of one session's device. See the module's head for the shell's turn.
#[derive(Debug)]
pub struct Rings<W: Words> {
    pub(super) desk: Desk<W>,
    pub(super) rings: Vec<Ring>,
    /// Who is first in the next turn.
    next_ring: usize,
    pub(super) port: Port,
    host_page: HostPageWriter,
    pub(super) failed: bool,
    pub(super) farewells: Farewells,
    /// Reads by message that were asked for before a ring was set up anew are not to be believed.
    pub(super) stale_reads: bool,
    /// Interrupt set-up and descriptors as last seen: after a change every ring is signalled once.
    pub(super) interrupts: Option<(Interrupts, u64)>,
}

impl<W: Words> Rings<W> {
    /// Takes over a session: `state` is its in-flight table ([`super::STATE_WORDS`] words, zeros when the session is new). What an earlier
    /// core life left goes on if the device's generation and the rings' epochs are the same, else it is void; and what lies in maps that
    /// were made while no core lived ends, unreplayed. The first input is then [`Input::Touched`].
    ///
    /// # Errors
    /// The table is too small, or of a layout that this version does not read.
    pub fn attach(
        settings: Settings,
        state: W,
        front: &FrontPage<W>,
        core: &CorePage<W>,
    ) -> Result<Self, AttachError> {
        let table = Table::new(state);
        if table.len() < STATE_WORDS {
            return Err(AttachError::TooSmall {
                words: table.len(),
                needed: STATE_WORDS,
            });
        }
        if check::check_header(&table)? {
            table.init();
        }
        let generation = front.generation();
        let mut rings = Self {
            desk: Desk {
                settings,
                table,
                now: Tick::default(),
                generation,
                suppression: front.features() & feature::EVENT_SUPPRESSION != 0,
                outputs: VecDeque::new(),
                counters: Counters::default(),
                turn: Turn::default(),
                telling: VecDeque::new(),
                told: 0,
                maps_before: None,
                maps_seen: 0,
            },
            rings: (0..RINGS_MAX).map(|_| Ring::closed()).collect(),
            next_ring: 0,
            port: Port::default(),
            host_page: HostPageWriter::default(),
            failed: false,
            farewells: Farewells::default(),
            stale_reads: false,
            interrupts: None,
        };
        rings.desk.table.set_life(core.life());
        // An old `raise` is void: pending is only what this life raises.
        for vector in 0..VECTORS_MAX {
            core.set_raise(vector, front.ack(vector));
        }
        match rings.desk.table.generation() {
            Some(before) if before == generation => {
                rings.desk.maps_before = rings.desk.table.maps_seen();
                rings.adopt(front, core);
            }
            Some(_) => {
                rings.port = Port::adopt(&rings.desk).unwrap_or_default();
                rings.reset(generation, front);
            }
            None => rings.desk.table.set_generation(generation),
        }
        Ok(rings)
    }

    /// Takes one input. After it, [`Rings::poll_output`] until there is none.
    pub fn handle<M: GuestMemory>(
        &mut self,
        now: Tick,
        front: &FrontPage<W>,
        core: &CorePage<W>,
        memory: &mut M,
        input: Input,
    ) -> Turn {
        self.desk.now = now;
        self.desk.turn = Turn::default();
        match input {
            Input::Touched => {
                self.refresh(front, core);
                self.work(front, core, memory, 0);
            }
            Input::Poll { budget } => self.work(front, core, memory, budget),
            Input::Complete {
                token,
                answer,
                payload,
                confirm,
            } => self.complete(front, core, memory, token, answer, payload, confirm),
            Input::HostPage(facts) => {
                self.host_page.set(facts);
                self.write_host_page(front, core, memory);
            }
            Input::TurnEnd => self.end_turn(front, core, memory),
            Input::End => {
                self.port.take_leave(&mut self.desk, front);
                self.end(memory);
            }
        }
        self.desk.turn
    }

    /// What is to be done next, until there is nothing.
    pub fn poll_output(&mut self) -> Option<Output> {
        let output = self.desk.outputs.pop_front()?;
        if matches!(output, Output::Published { .. }) {
            self.desk.told += 1;
        }
        self.farewells.note_polled(&output);
        self.port.note_polled(&output);
        Some(output)
    }

    /// When [`Rings::handle_timeout`] is to be called: a ring whose guest takes no completions is looked at again.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Tick> {
        self.rings
            .iter()
            .filter(|ring| ring.is_open())
            .filter_map(|ring| ring.stalled_until)
            .min()
    }

    /// Looks again at what waited for its time.
    pub fn handle_timeout<M: GuestMemory>(
        &mut self,
        now: Tick,
        front: &FrontPage<W>,
        core: &CorePage<W>,
        memory: &mut M,
    ) -> Turn {
        self.handle(now, front, core, memory, Input::Poll { budget: BATCH_MAX })
    }

    /// Asks every guest for its doorbell, before the core sleeps. True: there is work already, poll instead.
    pub fn arm<M: GuestMemory>(&mut self, front: &FrontPage<W>, memory: &mut M) -> bool {
        self.arm_but(front, memory, 0)
    }

    /// As [`Rings::arm`], but not for the `spared` rings (a bit each): the core will look at them soon by itself.
    pub fn arm_but<M: GuestMemory>(&mut self, front: &FrontPage<W>, memory: &mut M, spared: u32) -> bool {
        if self.failed || !dma_is_allowed(front) {
            return false;
        }
        let mut work = false;
        for (n, ring) in self.rings.iter_mut().enumerate() {
            if !ring.is_open() {
                continue;
            }
            work |= front.doorbell(n) != ring.doorbell || ring_has_work(ring);
            if !ring.shared || spared >> n & 1 != 0 {
                continue;
            }
            let event = ring.event_address(event_offset::SUBMISSION_EVENT);
            if memory.store_u32(event, ring.tail).is_err() {
                // The next poll finds out what it was.
                continue;
            }
            memory.fence();
            let tail = ring.event_address(event_offset::SUBMISSION_TAIL);
            work |= memory.load_u32(tail).is_ok_and(|tail| tail != ring.tail);
        }
        work
    }

    /// Where the data area of a submission in flight is; `None`: the token is stale (or not given to the hub again yet).
    #[must_use]
    pub fn buffer(&self, token: Token) -> Option<Buffer<'_>> {
        if token.session != self.desk.settings.session {
            return None;
        }
        match token.channel {
            Channel::Port if self.port.is_in_flight(token) => self
                .port
                .buffer()
                .map(|(input, room)| Buffer::Port { input, room }),
            Channel::Port => None,
            Channel::Ring(n) => {
                let ring = self.rings.get(usize::from(n)).filter(|ring| ring.is_open())?;
                let slot = ring.slot(token.index)?;
                (slot.generation == token.generation && slot.standing == Standing::Hub).then(|| {
                    Buffer::Guest {
                        segments: slot.segments.as_slice(),
                        bytes: slot.data_bytes,
                    }
                })
            }
        }
    }

    /// Writes output of a port submission at `offset` of its data area. False: the token is stale, or it does not fit.
    pub fn port_write(&mut self, token: Token, offset: u64, bytes: &[u8]) -> bool {
        token.session == self.desk.settings.session
            && token.channel == Channel::Port
            && self.port.is_in_flight(token)
            && self.port.write(offset, bytes)
    }

    /// Whether all that an earlier core life left has been looked at, in guest memory too.
    #[must_use]
    pub fn is_taken_up(&self) -> bool {
        let adopts = |ring: &Ring| ring.stage == Stage::Opening { adopt: true };
        !(self.rings.iter()).any(|ring| adopts(ring) || !ring.recovering.is_empty())
    }

    /// Whether no completion that went by message waits to be known as there.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.rings.iter().all(|ring| ring.unsettled.is_empty())
    }

    /// Submissions in flight of all rings: fetched, and their record not yet done with.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.rings
            .iter()
            .map(|ring| ring.slots.len() - ring.free.len())
            .sum()
    }

    #[must_use]
    pub const fn counters(&self) -> Counters {
        self.desk.counters
    }

    /// What the in-flight table does not hold, for a planned handoff.
    #[must_use]
    pub const fn save(&self) -> Saved {
        Saved {
            version: SAVED_VERSION,
            counters: self.desk.counters,
            host_facts: self.host_page.facts,
        }
    }

    /// Goes on with what [`Rings::save`] gave, right after [`Rings::attach`].
    ///
    /// # Errors
    /// The record is of a version that this one does not read.
    pub fn restore(&mut self, saved: &Saved) -> Result<(), AttachError> {
        let Saved {
            version,
            counters,
            host_facts,
        } = *saved;
        if version != SAVED_VERSION {
            return Err(AttachError::Saved {
                found: version,
                known: SAVED_VERSION,
            });
        }
        self.desk.counters = counters;
        self.host_page.set(host_facts);
        Ok(())
    }

    /// Goes on with everything that can go on, and fetches up to `budget` submissions.
    fn work<M: GuestMemory>(
        &mut self,
        front: &FrontPage<W>,
        core: &CorePage<W>,
        memory: &mut M,
        budget: u32,
    ) {
        if !self.say_farewells(memory) {
            return;
        }
        if front.control() & (control::FROZEN | control::QUARANTINED | control::GONE) == 0 {
            self.port.look(&mut self.desk, front, core);
        }
        if std::mem::take(&mut self.stale_reads) {
            memory.forget_reads();
        }
        self.close_rings(front, core, memory);
        if !self.say_farewells(memory) || !dma_is_allowed(front) {
            return;
        }
        // What was found to lie in other memory is answered first: a life that comes before that is to find the same.
        let owes = |ring: &Ring| ring.due.iter().any(|due| due.lost);
        if self.desk.maps_before.is_some() && self.is_taken_up() && !self.rings.iter().any(owes) {
            self.desk.maps_before = None;
        }
        self.desk.note_maps(memory);
        self.write_host_page(front, core, memory);
        let mut left = budget;
        let mut stopped = 0u32;
        loop {
            let before = left;
            for turn in 0..RINGS_MAX {
                let n = (self.next_ring + turn) % RINGS_MAX;
                if self.failed || stopped & 1 << n != 0 {
                    continue;
                }
                match self.work_ring(n, core, memory, left) {
                    Ok(fetched) => left = left.saturating_sub(fetched),
                    Err(stop) => {
                        stopped |= 1 << n;
                        self.stop(n, stop, core);
                    }
                }
            }
            self.next_ring = (self.next_ring + 1) % RINGS_MAX;
            if left == 0 || left == before {
                break;
            }
        }
        self.desk.turn.more |= self
            .rings
            .iter()
            .enumerate()
            .any(|(n, ring)| stopped & 1 << n == 0 && ring_has_work(ring));
        // Of a device that has failed just now.
        self.say_farewells(memory);
    }

    /// Ends rings that the guest closed, when nothing of theirs is on its way any more.
    fn close_rings<M: GuestMemory>(&mut self, front: &FrontPage<W>, core: &CorePage<W>, memory: &mut M) {
        for n in 0..RINGS_MAX {
            let Some(ring) = self.rings.get_mut(n) else { return };
            let Stage::Closing { under } = ring.stage else {
                continue;
            };
            if dma_is_allowed(front) {
                // What the guest got, it got: the hub is to know.
                if complete::settle_last(&mut self.desk, ring, n, memory) == Err(Stop::Wait) {
                    self.desk.turn.waiting = true;
                    continue;
                }
            } else if front.control() & control::FROZEN != 0 && memory.settled() == Err(MemoryError::Pending)
            {
                // It goes on with the thaw.
                continue;
            } else {
                ring.written_areas()
                    .for_each(|area| memory.drop_writes(area.iova, area.bytes));
            }
            self.closed(n, &under, core);
        }
    }

    fn work_ring<M: GuestMemory>(
        &mut self,
        n: usize,
        core: &CorePage<W>,
        memory: &mut M,
        budget: u32,
    ) -> Result<u32, Stop> {
        let Some(ring) = self.rings.get_mut(n) else {
            return Ok(0);
        };
        match ring.stage {
            Stage::Closed | Stage::Refused | Stage::Closing { .. } => return Ok(0),
            Stage::Opening { adopt: false } if self.farewells.holds_openings_up() => {
                // Once the end of this turn has come.
                self.desk.turn.more = true;
                return Ok(0);
            }
            Stage::Opening { adopt } => match open::open(&mut self.desk, ring, n, memory) {
                Ok(()) => {
                    core.set_state(self.desk.generation, DeviceState::ACTIVE, Status::OK);
                    answer_open(core, n, ring.setup.epoch, RingState::OPEN, Status::OK);
                }
                Err(NotOpen::Stop(stop)) => return Err(stop),
                // It was open: the guest took the memory away beneath it.
                Err(NotOpen::Refused(status)) if adopt => return Err(Stop::Fail(status)),
                Err(NotOpen::Refused(status)) => {
                    ring.stage = Stage::Refused;
                    answer_open(core, n, ring.setup.epoch, RingState::REFUSED, status);
                    return Ok(0);
                }
            },
            Stage::Open => {}
        }
        let desk = &mut self.desk;
        fetch::return_slots(ring, memory)?;
        recover::recover(desk, ring, n, memory)?;
        complete::publish(desk, ring, n, memory)?;
        complete::settle(desk, ring, n, memory)?;
        if budget == 0 {
            return Ok(0);
        }
        let fetched = fetch::fetch(desk, ring, n, memory, budget)?;
        complete::publish(desk, ring, n, memory)?;
        Ok(fetched)
    }

    fn stop(&mut self, n: usize, stop: Stop, core: &CorePage<W>) {
        match stop {
            Stop::Wait => self.desk.turn.waiting = true,
            Stop::Quiet => {}
            Stop::Fail(cause) => self.fail(Some(n), cause, core),
        }
    }

    fn write_host_page<M: GuestMemory>(&mut self, front: &FrontPage<W>, core: &CorePage<W>, memory: &mut M) {
        if dma_is_allowed(front)
            && self.host_page.write(&mut self.desk, front, core, memory) == Err(Stop::Wait)
        {
            self.desk.turn.waiting = true;
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn complete<M: GuestMemory>(
        &mut self,
        front: &FrontPage<W>,
        core: &CorePage<W>,
        memory: &mut M,
        token: Token,
        answer: Answer,
        payload: Vec<u8>,
        confirm: bool,
    ) {
        let known = token.session == self.desk.settings.session
            && match token.channel {
                Channel::Port => self
                    .port
                    .complete(&mut self.desk, core, token, answer, &payload, confirm),
                Channel::Ring(n) => {
                    let n = usize::from(n);
                    let due = Due::new(token.index, answer, payload, confirm);
                    let known = self.accept(n, token, due);
                    if known && dma_is_allowed(front) {
                        self.publish_now(n, core, memory);
                    }
                    known
                }
            };
        if !known {
            self.desk.counters.stale_answers += 1;
            if confirm {
                self.desk.tell(token, false, None);
            }
        }
    }

    fn accept(&mut self, n: usize, token: Token, due: Due) -> bool {
        let Some(ring) = self.rings.get_mut(n) else {
            return false;
        };
        let known = ring.slot(token.index).is_some_and(|slot| {
            slot.generation == token.generation
                && match slot.standing {
                    Standing::Hub => true,
                    Standing::Recovering => slot.early.is_none(),
                    _ => false,
                }
        });
        if known {
            complete::accept(ring, due);
        }
        known
    }

    fn publish_now<M: GuestMemory>(&mut self, n: usize, core: &CorePage<W>, memory: &mut M) {
        let Some(ring) = self.rings.get_mut(n).filter(|ring| ring.is_open()) else {
            return;
        };
        // What is being recovered has its completion slots already.
        if !ring.recovering.is_empty() {
            return;
        }
        if let Err(stop) = complete::publish(&mut self.desk, ring, n, memory) {
            self.stop(n, stop, core);
        }
    }

    fn end_turn<M: GuestMemory>(&mut self, front: &FrontPage<W>, core: &CorePage<W>, memory: &mut M) {
        self.free_told();
        self.note_told();
        self.port.note_told(&self.desk);
        if self.failed || !dma_is_allowed(front) {
            return;
        }
        let mut vectors = [0; RINGS_MAX];
        let mut count = 0;
        for n in 0..RINGS_MAX {
            match self.end_turn_of_ring(n, memory) {
                Ok(None) => {}
                Ok(Some(vector)) => {
                    if let Some(place) = vectors.get_mut(count) {
                        *place = vector;
                        count += 1;
                    }
                }
                Err(stop) => self.stop(n, stop, core),
            }
        }
        let due = vectors.iter().copied().take(count);
        complete::raise(&mut self.desk, front, core, due);
    }

    /// The vector to raise for ring `n`, if any.
    fn end_turn_of_ring<M: GuestMemory>(&mut self, n: usize, memory: &mut M) -> Result<Option<u32>, Stop> {
        let Some(ring) = self.rings.get_mut(n).filter(|ring| ring.is_open()) else {
            return Ok(None);
        };
        if ring.recovering.is_empty() {
            complete::publish(&mut self.desk, ring, n, memory)?;
        }
        complete::settle(&mut self.desk, ring, n, memory)?;
        let due = complete::signal_due(&mut self.desk, ring, memory)?;
        Ok(due.then_some(ring.setup.vector))
    }

    /// Frees the records of completions that the hub knows to be published.
    fn free_told(&mut self) {
        for _ in 0..std::mem::take(&mut self.desk.told) {
            let Some(Some((n, index, generation))) = self.desk.telling.pop_front() else {
                continue;
            };
            if let Some(ring) = self.rings.get_mut(n)
                && ring
                    .slot(index)
                    .is_some_and(|slot| slot.generation == generation && slot.standing == Standing::Told)
            {
                ring.free_slot(&self.desk.table, n, index);
            }
        }
    }

    /// The facts that the host's page says.
    #[must_use]
    pub const fn host_facts(&self) -> HostFacts {
        self.host_page.facts
    }
}

fn dma_is_allowed<W: Words>(front: &FrontPage<W>) -> bool {
    const NEVER: u64 = control::FROZEN | control::QUARANTINED | control::GONE;
    front.control() & (control::BUS_MASTER | NEVER) == control::BUS_MASTER
}

/// Whether polling a ring again at once has a point.
fn ring_has_work(ring: &Ring) -> bool {
    ring.is_open()
        && ring.stalled_until.is_none()
        && ring.preparing.is_none()
        && ring.records_free() > 0
        && (ring.look || ring.tail != ring.head() || ring.batch_at < ring.batch_count)
}
