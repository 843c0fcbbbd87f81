//! CORE, memory: guest memory of one session, as the core's loop holds it and as the rooms see it.
//!
//! In: the session's front page (maps, fences, control), memory objects from the front, answers to message DMA, time. Out: the trait
//! [`GuestMemory`] for the rooms, [`Pieces`] for whoever moves bulk, requests for the front, the words `busy` and `fenced`.
//! What must never come in here: an operation, a ring, a mode.
//!
//! A session's turn, on the loop's thread:
//! ```text
//! drain the front's channel           object(), object_gone(), handle_dma_answer(), then drained()
//! if memory.begin_dma(now) { ... }    busy = 1, SeqCst fence, fence and table read again; false: no DMA now
//!   rooms and effects                 &mut memory as GuestMemory; resolve(); read_pieces(), write_pieces()
//! memory.end_dma(now)                 busy = 0 unless leases are held or messages are under way
//! poll_output() until None            requests for the front
//! if memory.wants_turn()              drain the front's channel, drained(), and run the session again
//! ```
//! Whenever the session was touched: [`SessionMemory::poll_fences`], which never blocks. Leases ([`Pieces`]) may be held across turns and
//! on other threads; a fence waits for those that it concerns at most 100 ms in all, then takes their memory away.
//!
//! **By message or by mapping.** An object is reached through its mapping only after [`GuestMemory::prove`] found the nonce there.
//! Before (and for what cannot be mapped, or was disproven) every access, also a single load, goes by message: slower, and always
//! right. So a room proves the events page of a ring first, and only then looks at the ring.

mod access;
mod fences;
pub mod limits;
pub mod message_dma;
mod object;
mod pieces;
mod table;

#[cfg(test)]
pub(super) mod tests;

use crate::words::MappedWords;
use fences::Fences;
use limits::{HITS, NOTICES_MAX};
use message_dma::MessageQueue;
use object::{Extent, Objects};
use pieces::Lease;
use rustix::fd::OwnedFd;
use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Weak};
use table::Table;
use vmgmt_device::page::{CorePage, FrontPage};
use vmgmt_device::{GuestMemory, MemoryError, Tick};

pub use limits::{JOINED_BYTES_MAX, PIECE_BYTES_MAX};
pub use message_dma::DmaRequest;
pub use pieces::{BulkError, Pieces, Side};

/// What a session may take.
#[derive(Clone, Copy, Debug)]
pub struct MemoryLimits {
    /// Bytes of address space; maps beyond it are reached by messages.
    pub mapped_bytes_max: u64,
    /// Memory objects; maps of further ones are reached by messages.
    pub objects_max: usize,
}

/// Something the operator should read about, once.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Notice(pub String);

/// What of the session the operator can see.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MemoryCounters {
    /// Bytes of address space mapped now.
    pub mapped_bytes: u64,
    /// Leases whose memory was taken away so far.
    pub revoked: u64,
    /// Message-DMA answers that came too late so far.
    pub late_answers: u64,
    /// Messages of ours that were given up, unanswered, so far.
    pub messages_given_up: u64,
    /// Notices that found no room.
    pub notices_lost: u64,
}

/// A look-up that is remembered: mapped, proven memory only.
#[derive(Debug)]
struct Hit {
    first: u64,
    bytes: u64,
    rights: u64,
    extent: Arc<Extent>,
    offset: usize,
}

/// Guest memory of one session in one core life.
#[derive(Debug)]
pub struct SessionMemory {
    session: u64,
    front: FrontPage<MappedWords>,
    core: CorePage<MappedWords>,
    table: Table,
    objects: Objects,
    hits: [Option<Hit>; HITS],
    messages: MessageQueue,
    leases: Vec<Weak<Lease>>,
    fences: Fences,
    /// Within a turn in which DMA is allowed.
    open: bool,
    /// Up to this value of `events` all objects have been received.
    drained: u64,
    wants_drain: bool,
    /// A write to shared memory waited behind messages and was done: rings are to be looked at again.
    stored_late: bool,
    notices: VecDeque<Notice>,
    /// The operator knows that this VM's memory comes without descriptors.
    told_no_descriptor: bool,
    counters: MemoryCounters,
}

impl SessionMemory {
    /// A session whose pages (checked with `is_valid` by the caller) these are: the front page read-only, the core page of
    /// this life. No object has been received yet.
    #[must_use]
    pub fn new(
        session: u64,
        front: FrontPage<MappedWords>,
        core: CorePage<MappedWords>,
        limits: MemoryLimits,
    ) -> Self {
        let fences = Fences::new(&front, &core);
        Self {
            session,
            front,
            core,
            table: Table::default(),
            objects: Objects::new(limits.mapped_bytes_max, limits.objects_max),
            hits: std::array::from_fn(|_| None),
            messages: MessageQueue::default(),
            leases: Vec::new(),
            fences,
            open: false,
            drained: 0,
            wants_drain: false,
            stored_late: false,
            notices: VecDeque::new(),
            told_no_descriptor: false,
            counters: MemoryCounters::default(),
        }
    }

    /// The session's front page.
    #[must_use]
    pub const fn front(&self) -> &FrontPage<MappedWords> {
        &self.front
    }

    /// The session's core page of this life.
    #[must_use]
    pub const fn core(&self) -> &CorePage<MappedWords> {
        &self.core
    }

    /// A memory object arrived ([`crate::messages::FrontToCore::Object`]).
    pub fn object(&mut self, object: u64, fd: OwnedFd, writable: bool) {
        if !self.objects.insert(object, fd, writable) {
            self.notice(format!(
                "session {}: too many memory objects; object {object} is reached by messages: raise objects_max or give \
                 the VM fewer memory backends",
                self.session
            ));
        }
        self.forget_backings(object);
    }

    /// No map names the object any more. What is still held of it stays until it is let go.
    pub fn object_gone(&mut self, object: u64) {
        self.objects.remove(object);
        self.forget_backings(object);
    }

    /// The front's channel was empty just now: what has not come by now belongs to later events.
    pub fn drained(&mut self) {
        self.drained = self.table.seen();
        self.wants_drain = false;
    }

    /// Asked at the end of a turn: whether the session is to have another one without anything coming from outside, in which every ring is run once as
    /// if its doorbell had rung. So it is when
    /// * a look-up met a map whose object has not come yet (the room was told Pending): drain the front's channel first, and call
    ///   [`SessionMemory::drained`];
    /// * stores to shared memory were done late, behind messages: an event word was armed later than the room believes (said once);
    /// * stores to shared memory wait for nothing but a turn: what stood before them in the queue is not wanted any more.
    pub fn wants_turn(&mut self) -> bool {
        let stored_late = std::mem::take(&mut self.stored_late);
        stored_late || self.wants_drain || self.stores_wait()
    }

    /// Begins a turn: from here to [`SessionMemory::end_dma`] guest memory may be reached, if this answers true. (False: bus
    /// mastering is off, or the session is frozen, quarantined or gone; every access answers Quiet.)
    pub fn begin_dma(&mut self, now: Tick) -> bool {
        self.core.set_busy(true);
        // The front removes a map, makes its fence and reads busy; we set busy, make ours and read the table: one of us sees the other.
        fence(Ordering::SeqCst);
        self.open = false;
        self.look(now);
        self.open = self.fences.allowed();
        self.messages.handle_time(now);
        self.store_late();
        self.open
    }

    /// Ends a turn.
    pub fn end_dma(&mut self, now: Tick) {
        self.open = false;
        if self.front.fence() != self.fences.seen() {
            self.look(now);
        }
        self.rest();
    }

    /// Looks for new fences and lets those pass that can: at once, or as soon as the leases they concern have ended or were taken
    /// away. Gives true when it moved `fenced`: kick the session then (the front may wait for it).
    pub fn poll_fences(&mut self, now: Tick) -> bool {
        let before = self.core.fenced();
        self.look(now);
        self.rest();
        self.core.fenced() != before
    }

    /// A fence that waits for leases: new work of the session need not wait for it.
    #[must_use]
    pub const fn is_fence_waiting(&self) -> bool {
        self.fences.is_waiting()
    }

    /// The next request for the front, if one may go out now. Call in or after a turn until it gives `None`.
    pub fn poll_output(&mut self, now: Tick) -> Option<DmaRequest> {
        if !self.fences.allowed() || self.front.fence() != self.fences.seen() {
            // What waits is looked at again in the next turn: it may be void.
            return None;
        }
        self.messages.poll_output(self.session, self.fences.seen(), now)
    }

    /// An answer of the front ([`crate::messages::FrontToCore::DmaAnswer`]). Run a turn of the session after it. `error` EAGAIN:
    /// the front dropped the request at a fence; it is asked again, if it still holds.
    pub fn handle_dma_answer(&mut self, now: Tick, request: u64, error: u32, payload: Vec<u8>) {
        if !self.messages.handle_answer(now, request, error, payload) {
            self.counters.late_answers += 1;
        }
    }

    /// When [`SessionMemory::handle_timeout`] is to be called at the latest.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Tick> {
        [self.fences.poll_timeout(), self.messages.poll_timeout()]
            .into_iter()
            .flatten()
            .min()
    }

    /// Time has come for something: a fence's patience or a message's. Gives what [`SessionMemory::poll_fences`] gives.
    pub fn handle_timeout(&mut self, now: Tick) -> bool {
        let given_up = self.messages.handle_timeout(now);
        if given_up > 0 {
            self.counters.messages_given_up += given_up;
            self.notice(format!(
                "session {}: the VM's process (QEMU) has not answered {given_up} messages that read or write its memory for {} s: is it \
                 stopped? Until it answers, there is less room for others, and it cannot be frozen",
                self.session,
                limits::MESSAGE_WAIT_NS / 1_000_000_000
            ));
        }
        self.poll_fences(now)
    }

    /// Forgets all reads by message: call it when a submission that waited for one is cancelled, and at a reset. Who still wants
    /// one asks again.
    pub fn forget_reads(&mut self) {
        self.messages.forget_reads();
    }

    /// Bytes of writes by message for which there is room now.
    #[must_use]
    pub const fn write_room(&self) -> usize {
        self.messages.write_room()
    }

    /// Something for the log.
    pub fn poll_notice(&mut self) -> Option<Notice> {
        self.notices.pop_front()
    }

    /// Whether the operator has frozen the session, as far as was looked.
    #[must_use]
    pub const fn is_frozen(&self) -> bool {
        self.fences.is_frozen()
    }

    /// Whether DMA is allowed, as far as was looked.
    #[must_use]
    pub const fn is_allowed(&self) -> bool {
        self.fences.allowed()
    }

    /// What of a frozen session is still busy; `None`: nothing, no byte of its memory moves.
    #[must_use]
    pub fn busy_with(&self) -> Option<String> {
        let (leases, messages) = (self.held(), self.messages.outstanding());
        if !self.fences.is_frozen() || self.open || self.front.fence() != self.fences.seen() {
            Some("the core has not looked at it yet".into())
        } else if leases > 0 || self.is_fence_waiting() {
            Some(format!("{leases} transfers hold its memory"))
        } else if messages > 0 {
            Some(format!(
                "{messages} messages that read or write its memory are under way"
            ))
        } else {
            None
        }
    }

    /// Counters for the operator.
    #[must_use]
    pub fn counters(&self) -> MemoryCounters {
        MemoryCounters {
            mapped_bytes: self.objects.mapped_bytes(),
            ..self.counters
        }
    }

    /// Leases held now.
    #[must_use]
    pub fn leases(&self) -> usize {
        self.leases
            .iter()
            .filter(|lease| lease.strong_count() > 0)
            .count()
    }

    /// Lets every lease end: as at a reset, but of our own will (a ring is closed, the session ends). New pieces are not concerned.
    pub fn cancel_leases(&mut self) {
        for lease in self.leases.iter().filter_map(Weak::upgrade) {
            lease.cancel();
        }
    }

    fn stores_wait(&self) -> bool {
        self.fences.allowed() && self.front.fence() == self.fences.seen() && self.messages.local_is_next()
    }

    /// `busy` goes off when nothing is under way any more.
    fn rest(&mut self) {
        self.leases.retain(|lease| lease.strong_count() > 0);
        // What the last holder did with the memory comes before what we say now.
        fence(Ordering::Acquire);
        if !self.open && self.held() == 0 && self.messages.is_idle() {
            self.core.set_busy(false);
        }
    }

    /// Leases whose memory was not taken away.
    fn held(&self) -> usize {
        let held = self.leases.iter().filter_map(Weak::upgrade);
        held.filter(|lease| !lease.is_revoked()).count()
    }

    /// Stores to shared memory that waited behind messages, when their turn has come.
    fn store_late(&mut self) {
        while self.open {
            let Some(write) = self.messages.next_local() else {
                break;
            };
            self.stored_late = true;
            if self.write_through(write.iova, &write.data).is_err() {
                self.messages.fail(&write);
            }
        }
    }

    fn forget_backings(&mut self, object: u64) {
        self.hits = std::array::from_fn(|_| None);
        for map in self.table.maps_mut().filter(|map| map.record.object == object) {
            map.backing = table::Backing::Unknown;
        }
    }

    fn notice(&mut self, text: String) {
        if self.notices.len() < NOTICES_MAX {
            self.notices.push_back(Notice(text));
        } else {
            self.counters.notices_lost += 1;
        }
    }
}

// Pieces go to workers.
const _: () = {
    const fn is_send<T: Send + Sync>() {}
    is_send::<Pieces>();
};

/// The trait is implemented in `access`; named here so that the room's contract is found in one place.
const _: fn(&mut SessionMemory) -> Result<(), MemoryError> = <SessionMemory as GuestMemory>::settled;
