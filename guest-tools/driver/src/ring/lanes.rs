//! Memory and indexes of a ring from its opening to its end.
//!
//! In: sizes and a device that has a ring free. Out: slots to write submissions into, completions as they are published.
//! Never trusted: an index of the device's. It is checked against the one kept here.

use std::sync::Arc;
use std::time::Instant;

use vmgmt_abi::registers::{self as registers, RING_STRIDE, RINGS, RingState};
use vmgmt_abi::ring::{COMPLETION_BYTES, RING_EVENTS_BYTES, SUBMISSION_BYTES, event_offset};
use vmgmt_abi::{Completion, Status};

use super::RingOptions;
use crate::channel::{Request, Tag};
use crate::device::{Device, pause, read_patiently};
use crate::error::{DriverError, Result};
use crate::limits::{
    LOOKS_BEFORE_COMMAND, PAGE_BYTES, SETTLE_PAUSE_FIRST, SETTLE_PAUSE_LAST, SETTLE_TIMEOUT,
};
use crate::memory::DmaMemory;
use crate::order;
use crate::tags::TagTable;

/// What belongs to a submission in flight.
pub(super) struct Pending {
    pub(super) request: Request,
    pub(super) list: Option<DmaMemory>,
}

/// Memory and indexes of one opening.
pub(super) struct Lanes {
    pub(super) index: u32,
    pub(super) set_up: u64,
    pub(super) submissions: DmaMemory,
    pub(super) completions: DmaMemory,
    pub(super) events: DmaMemory,
    pub(super) submission_entries: u32,
    pub(super) completion_entries: u32,
    /// Index after the last submission written.
    pub(super) tail: u32,
    /// Index after the last submission the device has taken, as far as checked.
    pub(super) submission_head: u32,
    /// Index after the last completion taken.
    pub(super) completion_head: u32,
    /// `tail` at the last look at the device's health.
    pub(super) tail_at_look: Option<u32>,
    pub(super) pending: TagTable<Pending>,
}

impl Lanes {
    pub(super) fn open(device: &Arc<Device>, options: &RingOptions, index: u32, set_up: u64) -> Result<Self> {
        let backing = device.backing();
        let most = device.facts().ring_entries_max;
        let (submissions, submission_entries) =
            lane(device, options.submission_entries.min(most), SUBMISSION_BYTES)?;
        let (completions, completion_entries) =
            lane(device, options.completion_entries.min(most), COMPLETION_BYTES)?;
        let events = backing.allocate(RING_EVENTS_BYTES)?;
        let nonce = nonce();
        events.store64(event_offset::NONCE as usize, nonce)?;

        let block = RINGS + index * RING_STRIDE;
        let address = |memory: &DmaMemory| memory.pieces().first().map_or(0, |piece| piece.address);
        backing.write64(block + registers::RING_SUBMISSIONS_LOW, address(&submissions))?;
        backing.write64(block + registers::RING_COMPLETIONS_LOW, address(&completions))?;
        backing.write64(block + registers::RING_EVENTS_LOW, address(&events))?;
        backing.write32(block + registers::RING_SUBMISSION_ENTRIES, submission_entries)?;
        backing.write32(block + registers::RING_COMPLETION_ENTRIES, completion_entries)?;
        backing.write32(block + registers::RING_MODE, options.mode.0)?;
        backing.write32(block + registers::RING_VECTOR, options.vector)?;
        backing.write64(block + registers::RING_NONCE_LOW, nonce)?;
        backing.write32(block + registers::RING_ENABLE, 1)?;
        let capacity = submission_entries.min(completion_entries) as usize;
        let lanes = Self {
            index,
            set_up,
            submissions,
            completions,
            events,
            submission_entries,
            completion_entries,
            tail: 0,
            submission_head: 0,
            completion_head: 0,
            tail_at_look: None,
            pending: TagTable::new(capacity),
        };
        let opened = await_open(device, block);
        if let Err(mut error) = opened {
            // Whatever was read: of a device that was reset meanwhile it means nothing.
            if let Err(replaced @ DriverError::DeviceReplaced) = device.check_health() {
                error = replaced;
            }
            let undone = backing
                .write32(block + registers::RING_ENABLE, 0)
                .and_then(|()| device.reset())
                .or_else(|_| device.stop());
            if undone.is_err() {
                lanes.leak();
            }
            return Err(error);
        }
        Ok(lanes)
    }

    /// Whether a submission slot is free. The device's head may only move forward, and not past the tail.
    pub(super) fn has_room(&mut self) -> Result<bool> {
        let head = self.events.load32(event_offset::SUBMISSION_HEAD as usize)?;
        let taken = head.wrapping_sub(self.submission_head);
        let written = self.tail.wrapping_sub(self.submission_head);
        if taken > written {
            return Err(DriverError::contract(format!(
                "submission head {head:#x} is outside of {:#x}..={:#x}",
                self.submission_head, self.tail
            )));
        }
        self.submission_head = head;
        Ok(self.tail.wrapping_sub(head) < self.submission_entries
            && self.pending.len() < self.pending.capacity())
    }

    /// Asked at each look at the device's health: whether a submission that was there at the look before is there still.
    pub(super) fn is_unheard(&mut self) -> Result<bool> {
        let before = self.tail_at_look.replace(self.tail);
        // Checks the head, too.
        self.has_room()?;
        Ok(before.is_some_and(|tail| {
            (1..=self.submission_entries).contains(&tail.wrapping_sub(self.submission_head))
        }))
    }

    pub(super) fn has_completion(&self) -> Result<bool> {
        let word = order::published(&self.completions, self.completion_entries, self.completion_head)?;
        Ok(word.is_some())
    }

    pub(super) fn take_completion(&mut self) -> Result<Option<Completion>> {
        let (entries, head) = (self.completion_entries, self.completion_head);
        let completion = order::take_completion(&self.completions, &self.events, entries, head)?;
        if completion.is_some() {
            self.completion_head = head.wrapping_add(1);
        }
        Ok(completion)
    }

    /// Leaves everything where it is: the device may still write to it.
    pub(super) fn leak(mut self) {
        let tags: Vec<Tag> = self.pending.tags().collect();
        for pending in tags.into_iter().filter_map(|tag| self.pending.remove(tag)) {
            std::mem::forget(pending.request.span);
            pending.list.into_iter().for_each(DmaMemory::leak);
        }
        self.submissions.leak();
        self.completions.leak();
        self.events.leak();
    }
}

/// Waits until a ring is open: as long as the device is well, for a frozen one opens none until it is thawed.
fn await_open(device: &Device, block: u32) -> Result<()> {
    let backing = &**device.backing();
    let cancel = device.cancel_descriptor();
    let started = Instant::now();
    let (mut looks, mut noticed) = (0, false);
    let mut length = SETTLE_PAUSE_FIRST;
    loop {
        let status = read_patiently(backing, block + registers::RING_STATUS)?;
        let late = started.elapsed() > SETTLE_TIMEOUT;
        match RingState(status & 0xff) {
            RingState::OPEN => return Ok(()),
            RingState::REFUSED => return Err(DriverError::RingRefused(Status((status >> 16) as u16))),
            RingState::OPENING => {
                looks += 1;
                if looks >= LOOKS_BEFORE_COMMAND {
                    device.check_health()?;
                }
                if late && !noticed {
                    noticed = true;
                    device.notice_waiting();
                }
            }
            // Not latched: the device is being reset or has failed.
            RingState::CLOSED => {
                device.check_health()?;
                if late {
                    return Err(DriverError::DeviceTimeout {
                        what: "opening a ring",
                        waited: SETTLE_TIMEOUT,
                    });
                }
            }
            other => return Err(DriverError::contract(format!("unknown ring state {}", other.0))),
        }
        pause(length, cancel.as_deref())?;
        length = (length * 2).min(SETTLE_PAUSE_LAST);
    }
}

/// Memory for a ring in one piece, with as many entries as that allows.
fn lane(device: &Device, entries: u32, entry_bytes: usize) -> Result<(DmaMemory, u32)> {
    if !entries.is_power_of_two() {
        return Err(DriverError::BadArgument(format!(
            "{entries} ring entries are no power of two"
        )));
    }
    let mut entries = entries;
    loop {
        let bytes = entries as usize * entry_bytes;
        let memory = device.backing().allocate(bytes)?;
        if memory
            .pieces()
            .first()
            .is_some_and(|piece| piece.length >= bytes as u64)
        {
            return Ok((memory, entries));
        }
        if bytes <= PAGE_BYTES {
            return Err(DriverError::NotPossible("DMA", device.backing().name()));
        }
        entries /= 2;
    }
}

/// A number that memory does not hold by chance. It proves a mapping, it keeps no secret.
pub(super) fn nonce() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    // The standard library seeds each of these from the system.
    let mut hasher = std::collections::hash_map::RandomState::new().build_hasher();
    hasher.write_u64(0x766d_676d_7470_726f);
    hasher.finish() | 1
}
