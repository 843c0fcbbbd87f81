//! CORE, fences: when the core may say that no DMA goes on that began before a fence.
//!
//! In: the front page's fence, control, generation and map table; leases that end. Out: the `fenced` word; leases cancelled, and
//! after 100 ms their memory taken away. A state machine with a deadline: nothing here blocks.
//!
//! Which leases a fence concerns: those with a part in a map that is gone; and all, when the device was reset, a ring was set
//! up or closed, or DMA is not allowed any more. The front does not say why it moved the counter, and taking one lease too many costs
//! its holder a repetition, nothing else.

use super::limits::{LEASE_WAIT_NS, REVOKE_RETRY_NS};
use super::pieces::Lease;
use super::table::Backing;
use super::{Extent, SessionMemory};
use crate::words::MappedWords;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Weak};
use vmgmt_abi::registers::RINGS_MAX;
use vmgmt_device::Tick;
use vmgmt_device::page::{CorePage, FrontPage, control};

/// DMA is allowed when of these bits BUS_MASTER alone is set.
const DMA_BITS: u64 = control::BUS_MASTER | control::FROZEN | control::QUARANTINED | control::GONE;

/// Where the session stands with the front's fences.
#[derive(Debug)]
pub struct Fences {
    /// The newest fence whose leases were gathered.
    seen: u64,
    control: u64,
    generation: u64,
    epochs: [Option<u32>; RINGS_MAX],
    waiting: Option<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    until: Tick,
    leases: Vec<Weak<Lease>>,
}

impl Fences {
    pub fn new(front: &FrontPage<MappedWords>, core: &CorePage<MappedWords>) -> Self {
        Self {
            seen: core.fenced(),
            control: front.control(),
            generation: front.generation(),
            epochs: epochs(front),
            waiting: None,
        }
    }

    pub const fn allowed(&self) -> bool {
        self.control & DMA_BITS == control::BUS_MASTER
    }

    pub const fn is_frozen(&self) -> bool {
        self.control & control::FROZEN != 0
    }

    pub const fn seen(&self) -> u64 {
        self.seen
    }

    pub const fn is_waiting(&self) -> bool {
        self.waiting.is_some()
    }

    pub fn poll_timeout(&self) -> Option<Tick> {
        self.waiting.as_ref().map(|waiting| waiting.until)
    }
}

impl SessionMemory {
    /// Reads the front's words again and does what follows from them.
    pub(super) fn look(&mut self, now: Tick) {
        // The fence first: what the front did before it moved the fence is then seen below.
        let seen = self.front.fence();
        self.fences.control = self.front.control();
        if self.table.refresh(&self.front) {
            self.hits = std::array::from_fn(|_| None);
        }
        if seen != self.fences.seen {
            self.gather(seen, now);
        }
        self.pass(now);
    }

    /// A fence was moved: cancels what it concerns.
    fn gather(&mut self, seen: u64, now: Tick) {
        let (generation, epochs) = (self.front.generation(), epochs(&self.front));
        let reset = generation != self.fences.generation;
        let stopped = !self.fences.allowed();
        let all = reset || stopped || epochs != self.fences.epochs;
        self.fences.generation = generation;
        self.fences.epochs = epochs;
        self.fences.seen = seen;

        // Bus mastering that is off, or a freeze, only holds messages up: the rings count what they wrote as on its way.
        if reset || self.fences.control & (control::QUARANTINED | control::GONE) != 0 {
            self.messages.clear();
        } else {
            let table = &self.table;
            self.messages.drop_unmapped(|number| table.has_number(number));
        }
        let mut concerned = Vec::new();
        for lease in self
            .leases
            .iter()
            .filter_map(Weak::upgrade)
            .filter(|lease| !lease.is_revoked())
        {
            if all || lease.parts.iter().any(|part| !self.table.has_number(part.number)) {
                lease.cancel();
                concerned.push(Arc::downgrade(&lease));
            }
        }
        let waiting = self.fences.waiting.get_or_insert_with(|| Waiting {
            // In all: a later fence does not begin the time anew.
            until: now.after_ns(LEASE_WAIT_NS),
            leases: Vec::new(),
        });
        waiting.leases.extend(concerned);
        waiting.leases.sort_by_key(Weak::as_ptr);
        waiting.leases.dedup_by(|one, other| one.ptr_eq(other));
    }

    /// Lets a waiting fence pass if it can.
    fn pass(&mut self, now: Tick) {
        let Some(mut waiting) = self.fences.waiting.take() else {
            return;
        };
        waiting.leases.retain(|lease| lease.strong_count() > 0);
        if !waiting.leases.is_empty() && now >= waiting.until {
            let held = std::mem::take(&mut waiting.leases);
            for lease in held {
                if let Some(held) = lease.upgrade()
                    && !self.revoke(&held)
                {
                    waiting.leases.push(lease);
                }
            }
            waiting.until = now.after_ns(REVOKE_RETRY_NS);
        }
        if waiting.leases.is_empty() {
            // The last access of whoever let go comes before the word that says so.
            fence(Ordering::SeqCst);
            self.core.set_fenced(self.fences.seen);
        } else {
            self.fences.waiting = Some(waiting);
        }
    }

    /// Takes a lease's memory away: anonymous memory lies over it from now on, and whoever else had it in use repeats in a fresh
    /// mapping. False: the system refused; to be tried again.
    fn revoke(&mut self, lease: &Lease) -> bool {
        let places: Vec<_> = lease
            .parts
            .iter()
            .filter_map(|part| {
                part.place
                    .as_ref()
                    .map(|(extent, offset)| (extent, *offset, part.bytes))
            })
            .map(|(extent, offset, bytes)| (extent, extent.whole_pages(offset, bytes)))
            .collect();
        // An extent that has a hole from now on is nobody's any more but the holders'.
        let mut retired: Vec<*const Extent> = Vec::new();
        for (extent, _) in &places {
            if !retired.contains(&Arc::as_ptr(extent)) {
                retired.push(Arc::as_ptr(extent));
                self.retire(extent);
            }
        }
        for (extent, (first, bytes)) in places {
            self.cancel_overlapping(extent, first, bytes);
            if let Err(error) = extent.mapping.replace_with_anonymous(first, bytes) {
                self.notice(format!(
                    "session {}: memory under a transfer could not be taken back, a fence waits for it: {error}",
                    self.session
                ));
                return false;
            }
        }
        lease.set_revoked();
        self.counters.revoked += 1;
        true
    }

    /// Maps in this extent get a fresh one when they are next used.
    fn retire(&mut self, extent: &Arc<Extent>) {
        self.objects.retire(extent);
        self.hits = std::array::from_fn(|_| None);
        for map in self.table.maps_mut() {
            if matches!(&map.backing, Backing::Mapped(held, _) if Arc::ptr_eq(held, extent)) {
                map.backing = Backing::Unknown;
            }
        }
    }

    /// Whoever uses a range that is taken away has to repeat.
    fn cancel_overlapping(&self, extent: &Arc<Extent>, first: usize, bytes: usize) {
        for lease in self.leases.iter().filter_map(Weak::upgrade) {
            let overlaps = lease.parts.iter().any(|part| {
                part.place.as_ref().is_some_and(|(held, offset)| {
                    Arc::ptr_eq(held, extent) && *offset < first + bytes && first < offset + part.bytes
                })
            });
            if overlaps {
                lease.cancel();
            }
        }
    }
}

fn epochs(front: &FrontPage<MappedWords>) -> [Option<u32>; RINGS_MAX] {
    std::array::from_fn(|n| front.ring(n).map(|ring| ring.epoch))
}
