//! The order in which the guest writes and reads a ring: the few lines on which it hangs that nothing half-written is taken for whole, and that no
//! wake-up is lost.
//!
//! Comes in: the words of a ring, a submission, indexes. Goes out: a submission that is published, a completion that is, whether to ring the
//! doorbell; an armed interrupt. Never: what any of it means. The words are behind a trait so that a model checker can stand in for memory
//! (tests/fuzz-bodies/tests/ordering), with the orders named below.
//!
//! Both sides of a ring: publish, full fence, read the other's event word; or arm, full fence, look again, sleep. A release fence is
//! not enough: a processor may read the event word before its own store is visible. Nor is each full fence one in a VM
//! (`crate::memory::full_fence`).

use std::sync::atomic::{Ordering, fence};

use vmgmt_abi::ring::{COMPLETION_BYTES, SUBMISSION_BYTES, completion_flag, event_due, event_offset, phase};
use vmgmt_abi::{Completion, Submission};
use zerocopy::IntoBytes;

use crate::error::Result;
use crate::memory::DmaMemory;

/// Of a word's load: what is read after it is as new as the word.
pub const LOAD: Ordering = Ordering::Acquire;
/// Of a word's store: whoever sees it sees what was written before it.
pub const STORE: Ordering = Ordering::Release;
/// Of each word of a copy: not torn, and no more.
pub const COPY: Ordering = Ordering::Relaxed;
/// Of [`RingWords::full_fence`].
pub const FENCE: Ordering = Ordering::SeqCst;

/// Where the last word of a completion lies in it: the one that is written last.
const LAST_WORD: usize = std::mem::offset_of!(Completion, tag);

/// Memory of a ring that the device looks at and writes at any moment.
pub trait RingWords {
    /// Loads the word at this offset, in the order of [`LOAD`].
    ///
    /// # Errors
    /// It is outside of the memory.
    fn load32(&self, start: usize) -> Result<u32>;

    /// As [`Self::load32`], 64 bits.
    ///
    /// # Errors
    /// As [`Self::load32`].
    fn load64(&self, start: usize) -> Result<u64>;

    /// Stores it, in the order of [`STORE`].
    ///
    /// # Errors
    /// As [`Self::load32`].
    fn store32(&self, start: usize, value: u32) -> Result<()>;

    /// Copies bytes in, each word in the order of [`COPY`].
    ///
    /// # Errors
    /// As [`Self::load32`].
    fn write(&self, start: usize, bytes: &[u8]) -> Result<()>;

    /// What was stored before is visible before anything is loaded after.
    fn full_fence(&self) {
        fence(FENCE);
    }
}

impl RingWords for DmaMemory {
    fn load32(&self, start: usize) -> Result<u32> {
        Self::load32(self, start)
    }

    fn load64(&self, start: usize) -> Result<u64> {
        Self::load64(self, start)
    }

    fn store32(&self, start: usize, value: u32) -> Result<()> {
        Self::store32(self, start, value)
    }

    fn write(&self, start: usize, bytes: &[u8]) -> Result<()> {
        Self::write(self, start, bytes)
    }

    fn full_fence(&self) {
        crate::memory::full_fence();
    }
}

/// Writes submission `at` into its slot of a ring of `entries`. The slot is the guest's: the device's head, loaded before, has passed it.
///
/// # Errors
/// As [`RingWords::load32`].
pub fn write_submission(
    submissions: &impl RingWords,
    entries: u32,
    at: u32,
    submission: &Submission,
) -> Result<()> {
    let slot = (at % entries.max(1)) as usize;
    submissions.write(slot * SUBMISSION_BYTES, submission.as_bytes())
}

/// Publishes the submissions up to `tail` (`old`: the tail before). True: the device asked for a doorbell at one of them.
///
/// # Errors
/// As [`RingWords::load32`].
pub fn publish(events: &impl RingWords, old: u32, tail: u32) -> Result<bool> {
    events.store32(event_offset::SUBMISSION_TAIL as usize, tail)?;
    events.full_fence();
    let event = events.load32(event_offset::SUBMISSION_EVENT as usize)?;
    Ok(event_due(event, old, tail))
}

/// The last word of completion `head` in a ring of `entries`, if the device has published it.
///
/// # Errors
/// As [`RingWords::load32`].
pub fn published(completions: &impl RingWords, entries: u32, head: u32) -> Result<Option<u64>> {
    let word = completions.load64(completion_start(entries, head) + LAST_WORD)?;
    let bit = (word >> 48) as u16 & completion_flag::PHASE;
    Ok((bit == phase(head, entries)).then_some(word))
}

/// Takes completion `head`, if it is published: its last word first, then the rest, then the device is told that the slot is free.
///
/// # Errors
/// As [`RingWords::load32`].
pub fn take_completion(
    completions: &impl RingWords,
    events: &impl RingWords,
    entries: u32,
    head: u32,
) -> Result<Option<Completion>> {
    let Some(word) = published(completions, entries, head)? else {
        return Ok(None);
    };
    let start = completion_start(entries, head);
    let third = completions.load64(start + 16)?;
    let completion = Completion {
        result: completions.load64(start)?,
        extra: completions.load64(start + 8)?,
        detail: third as u32,
        reserved: (third >> 32) as u32,
        tag: word as u32,
        status: (word >> 32) as u16,
        flags: (word >> 48) as u16,
    };
    events.store32(event_offset::COMPLETION_HEAD as usize, head.wrapping_add(1))?;
    Ok(Some(completion))
}

fn completion_start(entries: u32, head: u32) -> usize {
    (head % entries.max(1)) as usize * COMPLETION_BYTES
}

/// Asks for an interrupt with the completion that follows `head`. The caller looks at the ring again before it sleeps.
///
/// # Errors
/// As [`RingWords::load32`].
pub fn arm(events: &impl RingWords, head: u32) -> Result<()> {
    events.store32(event_offset::COMPLETION_EVENT as usize, head)?;
    events.full_fence();
    Ok(())
}
