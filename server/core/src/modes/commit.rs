//! WORKSHOP file: COMMIT of a put: its file gets the length and the checksum that were said, and then its name.
//!
//! In: COMMIT, outcomes of its steps. Out: effects, the answer. It never knows where a share is.

use super::coverage::Coverage;
use super::file::{failure, not_durable};
use super::puts::{Commit, PutOpening, Puts, Step, forget, open_put};
use super::{Submitted, Uses, Verdict};
use crate::effect::{Effect, FileSlot, Outcome};
use crate::kept::Change;
use crate::limits::{FILE_OFFSET_MAX, PUT_GAPS_MAX};
use crate::office::{Office, Wait, room};
use crate::refusal::Refusal;
use vmgmt_abi::Status;
use vmgmt_abi::file::SIZE_UNKNOWN;
use vmgmt_abi::ring::flag;
use vmgmt_device::rings::{Answer, Fetched};

impl Puts {
    /// COMMIT.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn commit(&mut self, office: &mut Office, fetched: &Fetched) -> Submitted {
        let flags = flag::CHECK | flag::DURABLE;
        Uses {
            handle: true,
            offset: true,
            argument: true,
            flags,
            ..Uses::default()
        }
        .check(fetched)?;
        if fetched.again && !self.has(fetched.handle) {
            // Its first life may have given the file its name.
            return Ok(Verdict::Done(Answer::failed(Status::OUTCOME_UNKNOWN)));
        }
        let put = open_put(&mut self.puts, fetched)?;
        let check = fetched.flags & flag::CHECK != 0;
        let crc32 = u32::try_from(fetched.argument).map_err(|_| Refusal::Field)?;
        if put.stale && fetched.again {
            return Ok(Verdict::Done(Answer::failed(Status::OUTCOME_UNKNOWN)));
        }
        if put.stale {
            return Err(Refusal::Stale);
        }
        if (!check && crc32 != 0)
            || fetched.offset > FILE_OFFSET_MAX
            || (put.what.size != SIZE_UNKNOWN && put.what.size != fetched.offset)
        {
            return Err(Refusal::Field);
        }
        put.commit = Some(Commit {
            token: fetched.token,
            bytes: fetched.offset,
            crc32: check.then_some(crc32),
            durable: fetched.flags & flag::DURABLE != 0,
            again: fetched.again,
            step: Step::Start,
        });
        office.park(fetched, Wait::Room);
        self.advance(office, fetched.handle);
        Ok(Verdict::Open)
    }

    /// A step of a COMMIT ended.
    pub fn committed(&mut self, office: &mut Office, handle: u64, outcome: Outcome) {
        let Some(put) = self.puts.get_mut(&handle) else {
            return;
        };
        put.busy = put.busy.saturating_sub(1);
        let Some(commit) = put.commit.as_mut() else { return };
        match (&commit.step, outcome) {
            (Step::Truncating, Outcome::Done) => {
                let bytes = commit.bytes;
                commit.step = Step::Start;
                office.change(Change::Cut { handle, bytes });
            }
            (Step::Checking { start, bytes }, Outcome::Checksum { bytes: found, crc32 })
                if *bytes == found =>
            {
                let (offset, bytes) = (*start, *bytes);
                commit.step = Step::Start;
                forget(office, handle, offset, bytes);
                office.change(Change::Wrote {
                    handle,
                    offset,
                    bytes,
                    crc32: Some(crc32),
                    extent: offset.saturating_add(bytes),
                });
            }
            (Step::Naming, Outcome::Committed { path }) => {
                self.named(office, handle, &path, Answer::ok(0));
                return;
            }
            // It is there, and has to be said to be: so nobody puts it a second time, or waits for what a power cut may have taken.
            (Step::Naming, Outcome::NotDurable { path }) => {
                self.named(office, handle, &path, not_durable());
                return;
            }
            (step, outcome) => {
                let token = commit.token;
                let mut answer = failure(&outcome);
                // Its first life may have given the file its name, and now nobody could look.
                if commit.again && *step == Step::Naming && answer.status != Status::EXISTS.0 {
                    answer = Answer::failed(Status::OUTCOME_UNKNOWN);
                }
                put.commit = None;
                office.end(token, answer);
            }
        }
        self.advance(office, handle);
    }

    /// The file has its name; `answer`: what the guest is told, with that.
    fn named(&mut self, office: &mut Office, handle: u64, path: &str, answer: Answer) {
        let Some(put) = self.remove(office, handle) else {
            return;
        };
        self.live.remove(&put.what.key());
        let closed = Change::Closed { handle };
        let Some(commit) = put.commit else {
            return office.change(closed);
        };
        if let Some(token) = put.closing {
            office.end(token, Answer::ok(0));
        }
        let Some(flight) = office.flights.get(&commit.token) else {
            return office.change(closed);
        };
        let name = format!("{}/{path}", put.what.share);
        let fits = name.len() as u64 <= room(commit.token, flight.data_bytes);
        let payload = if fits {
            name.clone().into_bytes()
        } else {
            Vec::new()
        };
        let answer = Answer {
            result: payload.len() as u64,
            extra: name.len() as u64,
            ..answer
        };
        office.settle(commit.token, answer, payload, closed);
    }
}

pub(super) fn naming(what: &PutOpening, slot: FileSlot, commit: &mut Commit) -> Effect {
    commit.step = Step::Naming;
    Effect::Commit {
        slot,
        share: what.share.clone(),
        temporary: what.temporary.clone(),
        target: what.path.clone(),
        existing: what.existing,
        durable: commit.durable,
        bytes: commit.bytes,
        again: commit.again,
    }
}

/// The checksum of the whole, or the range to read back next.
pub(super) fn check(coverage: &Coverage, bytes: u64) -> Result<u32, (u64, u64)> {
    if let Some(crc32) = coverage.checksum(bytes) {
        return Ok(crc32);
    }
    let gaps = coverage.gaps(bytes);
    match gaps.first() {
        Some(gap) if gaps.len() <= PUT_GAPS_MAX => Err(*gap),
        // Many gaps, or none and yet no checksum (which merging excludes): all of it.
        _ => Err((0, bytes)),
    }
}
