//! GARDEN, the core's way to guest memory: as `host/core/memory`, over memory that is not there.
//!
//! In: the session's front page, memory objects, answers to message DMA, time. Out: [`GuestMemory`] for the rings, leases for workers, requests
//! for the front, `busy` and `fenced`. The queue of messages is the real one.
//!
//! As in the real room, memory is reached through its mapping only after a nonce proved it; before, and where there is no descriptor, by message.

mod access;

use crate::clockwork::{SimWords, Steps};
use crate::faults::Fault;
use crate::limits::{LEASE_WAIT_NS, MESSAGE_BYTES_MAX};
use crate::ram::Ram;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::{Rc, Weak};
use vmgmt_abi::registers::RINGS_MAX;
use vmgmt_device::page::{CorePage, FrontPage, MapRecord, control, rights};
use vmgmt_device::{Direction, GuestMemory, MemoryError, Tick};
use vmgmt_host::core::memory::message_dma::{Asked, DmaRequest, MessageQueue, Write};

const DMA_BITS: u64 = control::BUS_MASTER | control::FROZEN | control::QUARANTINED | control::GONE;

/// Held by whoever moves bytes between guest memory and a file.
#[derive(Debug)]
pub struct Lease {
    numbers: Vec<u64>,
    /// Its memory was taken away.
    pub revoked: Cell<bool>,
    /// Where the bytes are.
    pub parts: Vec<(Rc<Ram>, u64, u64)>,
}

/// Part of a range that lies in one map.
struct Span {
    iova: u64,
    bytes: u64,
    number: u64,
    /// `None`: by message.
    place: Option<(Rc<Ram>, u64)>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Proof {
    #[default]
    Unproven,
    Shared,
    Private,
}

#[derive(Debug)]
struct Waiting {
    until: Tick,
    leases: Vec<Weak<Lease>>,
}

/// Guest memory of one session in one core life.
#[derive(Debug)]
pub struct Reach {
    session: u64,
    front: FrontPage<SimWords>,
    core: CorePage<SimWords>,
    steps: Rc<Steps>,
    objects: BTreeMap<u64, (Rc<Ram>, Proof)>,
    maps: BTreeMap<u64, MapRecord>,
    /// The highest number of a map that was ever there.
    newest: u64,
    events: Option<u64>,
    drained: u64,
    wants_drain: bool,
    seen: u64,
    control: u64,
    generation: u64,
    epochs: [Option<u32>; RINGS_MAX],
    waiting: Option<Waiting>,
    leases: Vec<Weak<Lease>>,
    messages: MessageQueue,
    open: bool,
    stored_late: bool,
    /// A deliberate mistake: fences are answered before leases have ended, or a frozen VM's memory is reached.
    fault: Fault,
}

impl Reach {
    pub fn new(
        session: u64,
        front: FrontPage<SimWords>,
        core: CorePage<SimWords>,
        steps: Rc<Steps>,
        fault: Fault,
    ) -> Self {
        Self {
            session,
            seen: core.fenced(),
            control: front.control(),
            generation: front.generation(),
            epochs: std::array::from_fn(|n| front.ring(n).map(|ring| ring.epoch)),
            front,
            core,
            steps,
            objects: BTreeMap::new(),
            maps: BTreeMap::new(),
            newest: 0,
            events: None,
            drained: 0,
            wants_drain: false,
            waiting: None,
            leases: Vec::new(),
            messages: MessageQueue::default(),
            open: false,
            stored_late: false,
            fault,
        }
    }

    pub fn object(&mut self, object: u64, ram: Rc<Ram>) {
        self.objects.insert(object, (ram, Proof::Unproven));
    }
    pub fn object_gone(&mut self, object: u64) {
        self.objects.remove(&object);
    }
    pub fn drained(&mut self) {
        self.drained = self.events.unwrap_or(0);
        self.wants_drain = false;
    }
    /// As `SessionMemory::wants_turn`.
    pub fn wants_turn(&mut self) -> bool {
        let stored_late = std::mem::take(&mut self.stored_late);
        stored_late || self.wants_drain || self.stores_wait()
    }
    pub const fn is_fence_waiting(&self) -> bool {
        self.waiting.is_some()
    }
    fn stores_wait(&self) -> bool {
        self.allowed() && self.front.fence() == self.seen && self.messages.local_is_next()
    }
    pub fn forget_reads(&mut self) {
        self.messages.forget_reads();
    }
    pub fn holds_leases(&self) -> bool {
        self.leases.iter().any(|lease| lease.strong_count() > 0)
    }

    pub fn begin_dma(&mut self, now: Tick) {
        self.core.set_busy(true);
        self.open = false;
        self.look(now);
        self.open = self.allowed();
        self.messages.handle_time(now);
        self.store_late();
    }

    pub fn end_dma(&mut self, now: Tick) {
        self.open = false;
        if self.front.fence() != self.seen {
            self.look(now);
        }
        self.rest();
    }

    pub fn poll_fences(&mut self, now: Tick) {
        self.messages.handle_timeout(now);
        self.look(now);
        self.rest();
    }

    pub fn poll_timeout(&self) -> Option<Tick> {
        let fence = self.waiting.as_ref().map(|waiting| waiting.until);
        [fence, self.messages.poll_timeout()].into_iter().flatten().min()
    }

    pub fn poll_output(&mut self, now: Tick) -> Option<DmaRequest> {
        if !self.allowed() || self.front.fence() != self.seen {
            return None;
        }
        self.messages.poll_output(self.session, self.seen, now)
    }

    pub fn handle_dma_answer(&mut self, now: Tick, request: u64, error: u32, payload: Vec<u8>) {
        self.messages.handle_answer(now, request, error, payload);
    }

    fn allowed(&self) -> bool {
        let mut bits = DMA_BITS;
        if self.fault == Fault::WritesWhileFrozen {
            bits &= !control::FROZEN;
        }
        self.control & bits == control::BUS_MASTER
    }

    /// The operator has frozen it: who needs its memory waits.
    pub fn is_frozen(&self) -> bool {
        let ignored = matches!(self.fault, Fault::WritesWhileFrozen | Fault::RefusesWhileFrozen);
        !ignored && self.control & control::FROZEN != 0
    }

    /// What of a frozen session is still busy, as in `host/core/memory`; `None`: no byte of its memory moves.
    pub fn busy_with(&self) -> Option<String> {
        let messages = self.messages.outstanding();
        if self.control & control::FROZEN == 0 || self.open || self.front.fence() != self.seen {
            Some("the core has not looked at it yet".into())
        } else if self.held() || self.is_fence_waiting() {
            Some("transfers hold its memory".into())
        } else if messages > 0 {
            Some(format!("{messages} messages are under way"))
        } else {
            None
        }
    }

    /// Somebody holds a lease that was not taken away.
    fn held(&self) -> bool {
        let mut leases = self.leases.iter().filter_map(Weak::upgrade);
        leases.any(|lease| !lease.revoked.get())
    }

    fn look(&mut self, now: Tick) {
        let seen = self.front.fence();
        self.control = self.front.control();
        self.refresh();
        if seen != self.seen {
            self.gather(seen, now);
        }
        self.pass(now);
    }

    fn refresh(&mut self) {
        let events = self.front.events();
        if self.events != Some(events) {
            self.maps = (0..self.front.maps_max())
                .filter_map(|slot| self.front.map(slot))
                .map(|record| (record.iova, record))
                .collect();
            let newest = self.maps.values().map(|map| map.number).max();
            self.newest = self.newest.max(newest.unwrap_or(0));
            self.events = Some(events);
        }
    }

    fn gather(&mut self, seen: u64, now: Tick) {
        let generation = self.front.generation();
        let epochs = std::array::from_fn(|n| self.front.ring(n).map(|ring| ring.epoch));
        let reset = generation != self.generation;
        let all = reset || !self.allowed() || epochs != self.epochs;
        (self.generation, self.epochs, self.seen) = (generation, epochs, seen);
        let numbers: Vec<u64> = self.maps.values().map(|map| map.number).collect();
        if reset || self.control & (control::QUARANTINED | control::GONE) != 0 {
            self.messages.clear();
        } else {
            self.messages.drop_unmapped(|number| numbers.contains(&number));
        }
        let concerned = self.leases.iter().filter(|lease| {
            lease.upgrade().is_some_and(|lease| {
                !lease.revoked.get() && (all || lease.numbers.iter().any(|number| !numbers.contains(number)))
            })
        });
        let concerned: Vec<_> = concerned.cloned().collect();
        let waiting = self.waiting.get_or_insert_with(|| Waiting {
            until: now.after_ns(LEASE_WAIT_NS),
            leases: Vec::new(),
        });
        waiting.leases.extend(concerned);
    }

    fn pass(&mut self, now: Tick) {
        let Some(mut waiting) = self.waiting.take() else {
            return;
        };
        waiting.leases.retain(|lease| lease.strong_count() > 0);
        if now >= waiting.until {
            for lease in waiting.leases.drain(..).filter_map(|lease| lease.upgrade()) {
                lease.revoked.set(true);
            }
        }
        if waiting.leases.is_empty() || self.fault == Fault::FencesTooEarly {
            self.core.set_fenced(self.seen);
        } else {
            self.waiting = Some(waiting);
        }
    }

    fn rest(&mut self) {
        self.leases.retain(|lease| lease.strong_count() > 0);
        let hasty = self.fault == Fault::FencesTooEarly;
        if !self.open && (hasty || !self.held() && self.messages.is_idle()) {
            self.core.set_busy(false);
        }
    }

    /// A buffer to be held while a worker moves it. `None`: it is (partly) reached by messages.
    pub fn lease(
        &mut self,
        segments: &[(u64, u64)],
        direction: Direction,
    ) -> Result<Option<Rc<Lease>>, MemoryError> {
        self.quiet()?;
        let (mut numbers, mut parts) = (Vec::new(), Vec::new());
        for (iova, bytes) in segments {
            for span in self.spans(*iova, *bytes, right(direction), true)? {
                numbers.push(span.number);
                let Some((ram, offset)) = span.place else {
                    return Ok(None);
                };
                parts.push((ram, offset, span.bytes));
            }
        }
        let lease = Rc::new(Lease {
            numbers,
            revoked: Cell::new(false),
            parts,
        });
        self.leases.push(Rc::downgrade(&lease));
        Ok(Some(lease))
    }

    fn quiet(&self) -> Result<(), MemoryError> {
        if self.open {
            Ok(())
        } else {
            Err(MemoryError::Quiet)
        }
    }

    fn find(&self, iova: u64) -> Option<MapRecord> {
        let (_, map) = self.maps.range(..=iova).next_back()?;
        (iova - map.iova < map.bytes).then_some(*map)
    }

    /// The guest may have mapped it after this turn began, and before it submitted what names it.
    fn find_fresh(&mut self, iova: u64) -> Result<MapRecord, MemoryError> {
        if self.find(iova).is_none() {
            self.refresh();
        }
        self.find(iova).ok_or(MemoryError::Unmapped { iova })
    }

    fn spans(
        &mut self,
        mut iova: u64,
        mut left: u64,
        right: u64,
        wait: bool,
    ) -> Result<Vec<Span>, MemoryError> {
        let mut spans = Vec::with_capacity(1);
        while left > 0 {
            let map = self.find_fresh(iova)?;
            if map.rights & right == 0 {
                return Err(MemoryError::Denied { iova });
            }
            let bytes = left.min(map.bytes - (iova - map.iova));
            let place = match self.objects.get(&map.object) {
                Some((ram, Proof::Shared)) => Some((Rc::clone(ram), map.offset + (iova - map.iova))),
                Some(_) => None,
                None if wait && map.object != 0 && self.drained < self.events.unwrap_or(0) => {
                    self.wants_drain = true;
                    return Err(MemoryError::Pending);
                }
                None => None,
            };
            spans.push(Span {
                iova,
                bytes,
                number: map.number,
                place,
            });
            left -= bytes;
            if left > 0 {
                iova = iova
                    .checked_add(bytes)
                    .ok_or(MemoryError::Unmapped { iova: u64::MAX })?;
            }
        }
        Ok(spans)
    }

    fn store_late(&mut self) {
        while self.open {
            let Some(write) = self.messages.next_local() else {
                break;
            };
            self.stored_late = true;
            let done = self
                .spans(write.iova, write.data.len() as u64, rights::WRITE, false)
                .is_ok_and(|spans| self.store(&spans, &write.data));
            if !done {
                self.messages.fail(&write);
            }
        }
    }

    fn store(&self, spans: &[Span], from: &[u8]) -> bool {
        let mut rest = from;
        for span in spans {
            let (now, later) = rest.split_at(span.bytes as usize);
            rest = later;
            let Some((ram, offset)) = &span.place else {
                return false;
            };
            if now.len() > 8 {
                // Not atomic: a death may come in its middle.
                let (first, second) = now.split_at(now.len() / 2);
                self.steps.step();
                ram.device_write(*offset, first, span.number);
                self.steps.step();
                ram.device_write(*offset + first.len() as u64, second, span.number);
            } else {
                self.steps.step();
                ram.device_write(*offset, now, span.number);
            }
        }
        true
    }

    fn put(&mut self, iova: u64, from: &[u8], barrier: bool, buffer: bool) -> Result<(), MemoryError> {
        self.quiet()?;
        let spans = self.spans(iova, from.len() as u64, rights::WRITE, false)?;
        let mut rest = from;
        for span in spans {
            let (now, later) = rest.split_at(span.bytes as usize);
            rest = later;
            if span.place.is_some() && !self.messages.has_writes() {
                self.store(&[span], now);
                continue;
            }
            let local = span.place.is_some();
            let step = if local {
                now.len().max(1)
            } else {
                MESSAGE_BYTES_MAX as usize
            };
            let mut at = span.iova;
            for chunk in now.chunks(step) {
                let write = Write {
                    iova: at,
                    data: chunk.to_vec(),
                    number: span.number,
                    barrier,
                    buffer,
                    local,
                };
                if !self.messages.write(write) {
                    return Err(MemoryError::Gone { iova: at });
                }
                at += chunk.len() as u64;
            }
        }
        Ok(())
    }
}

const fn right(direction: Direction) -> u64 {
    match direction {
        Direction::FromGuest => rights::READ,
        Direction::IntoGuest => rights::WRITE,
    }
}
