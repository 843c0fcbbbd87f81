//! Event suppression, the guest's half: the few lines on whose order it hangs that no wake-up is lost.
//!
//! Comes in: the ring's event words. Goes out: whether to ring the doorbell; an armed interrupt. Never: anything else of a ring.
//! The words are behind a trait so that a model checker can stand in for memory (tests/fuzz-bodies/tests/ordering.rs).
//!
//! Both sides of a ring: publish, full fence, read the other's event word; or arm, full fence, look again, sleep. A release fence is
//! not enough: a processor may read the event word before its own store is visible.

use std::sync::atomic::{Ordering, fence};

use vmgmt_abi::ring::{event_due, event_offset};

use crate::error::Result;
use crate::memory::DmaMemory;

/// A ring's event words.
pub trait EventWords {
    /// Loads the word at this offset, with acquire order.
    ///
    /// # Errors
    /// It is outside of the memory.
    fn load32(&self, start: usize) -> Result<u32>;

    /// Stores it, with release order.
    ///
    /// # Errors
    /// As [`Self::load32`].
    fn store32(&self, start: usize, value: u32) -> Result<()>;

    /// What was stored before is visible before anything is loaded after.
    fn full_fence(&self) {
        fence(Ordering::SeqCst);
    }
}

impl EventWords for DmaMemory {
    fn load32(&self, start: usize) -> Result<u32> {
        Self::load32(self, start)
    }

    fn store32(&self, start: usize, value: u32) -> Result<()> {
        Self::store32(self, start, value)
    }
}

/// Publishes the submissions up to `tail` (`old`: the tail before). True: the device asked for a doorbell at one of them.
///
/// # Errors
/// As [`EventWords::load32`].
pub fn publish(words: &impl EventWords, old: u32, tail: u32) -> Result<bool> {
    words.store32(event_offset::SUBMISSION_TAIL as usize, tail)?;
    words.full_fence();
    let event = words.load32(event_offset::SUBMISSION_EVENT as usize)?;
    Ok(event_due(event, old, tail))
}

/// Asks for an interrupt with the completion that follows `head`. The caller looks at the ring again before it sleeps.
///
/// # Errors
/// As [`EventWords::load32`].
pub fn arm(words: &impl EventWords, head: u32) -> Result<()> {
    words.store32(event_offset::COMPLETION_EVENT as usize, head)?;
    words.full_fence();
    Ok(())
}
