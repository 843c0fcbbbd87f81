//! CORE, message DMA: writes that nobody waits for any more, of which somebody may still ask whether they were done.
//!
//! In: writes that are given up, late answers, time. Out: which of them are lost. Knows no queue.

use super::{Write, overlap};
use crate::core::memory::limits::GIVEN_UP_MAX;
use std::collections::BTreeMap;
use vmgmt_device::Tick;

/// Writes that nobody waits for any more.
#[derive(Debug, Default)]
pub(super) struct GivenUp {
    /// Given out and not answered: address, bytes, and until when. An answer may still be in the channel.
    pub(super) outstanding: BTreeMap<u64, (u64, u64, Tick)>,
    /// Not done, as far as is known.
    pub(super) lost: Vec<(u64, u64)>,
    /// More than [`GIVEN_UP_MAX`] were: all count as lost.
    pub(super) too_many: bool,
}

impl GivenUp {
    pub(super) fn lose(&mut self, iova: u64, bytes: u64) {
        if self.lost.len() < GIVEN_UP_MAX {
            self.lost.push((iova, bytes));
        } else {
            self.too_many = true;
        }
    }

    pub(super) fn lose_write(&mut self, write: &Write) {
        if !write.buffer {
            self.lose(write.iova, write.data.len() as u64);
        }
    }

    /// An answer: true, if it is about one of these.
    pub(super) fn answered(&mut self, request: u64, done: bool) -> bool {
        let Some((iova, bytes, _)) = self.outstanding.remove(&request) else {
            return false;
        };
        if !done {
            self.lose(iova, bytes);
        }
        true
    }

    pub(super) fn time_out(&mut self, now: Tick) {
        let due = self.outstanding.iter();
        let due: Vec<u64> = due
            .filter(|(_, (.., until))| *until <= now)
            .map(|(request, _)| *request)
            .collect();
        for request in due {
            self.answered(request, false);
        }
    }

    /// What is written anew is not asked about as what it was.
    pub(super) fn forget(&mut self, iova: u64, bytes: u64) {
        if !self.lost.is_empty() || !self.outstanding.is_empty() {
            self.lost
                .retain(|(start, length)| !overlap(iova, bytes, *start, *length));
            self.outstanding
                .retain(|_, (start, length, _)| !overlap(iova, bytes, *start, *length));
        }
    }
}
