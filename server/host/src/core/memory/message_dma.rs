//! CORE, message DMA: reads and writes of guest memory that is not shared, in one queue per session.
//!
//! In: what is asked for, in order, and the answers. Out: requests of at most 60 KiB, at most 4 outstanding. Knows no map but its
//! number, and no process.
//!
//! One queue for both directions, because the client serves requests in order: a read that is asked for after a write sees it. A
//! *barrier* write (a word that publishes) is given out only when all writes before it are answered, so that a guest never sees
//! a completion whose payload failed. Writes to shared memory that come while writes by message wait are queued too ([`Write::local`]).

mod given_up;

use super::limits::{MESSAGE_WAIT_NS, QUEUED_BYTES_MAX, READ_IDLE_NS, READS_MAX, REFUSED_MAX};
use crate::messages::{CoreToFront, MESSAGE_DMA_OUTSTANDING_MAX};
use given_up::GivenUp;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use vmgmt_device::Tick;

/// A request for the front: header and payload of a packet.
#[derive(Debug)]
pub struct DmaRequest {
    pub message: CoreToFront,
    pub payload: Vec<u8>,
}

/// A write that waits.
#[derive(Debug)]
pub struct Write {
    pub iova: u64,
    pub data: Vec<u8>,
    /// Number of the map it was checked against.
    pub number: u64,
    /// Only after all writes before it are answered.
    pub barrier: bool,
    /// Done by ourselves, in shared memory, when its turn comes (a barrier, too).
    pub local: bool,
    /// Into a submission's buffer: if it fails, that submission does, and nothing else.
    pub buffer: bool,
}

#[derive(Debug)]
enum Operation {
    Read {
        iova: u64,
        bytes: u32,
        number: u64,
        ticket: u64,
    },
    Write(Write),
}

#[derive(Debug)]
enum Answer {
    Awaited,
    Ready(Vec<u8>),
    Failed,
}

/// A read that somebody wants. An answer with another ticket is not its answer: it was asked for by somebody who gave up, and may
/// be older than the guest's last word.
#[derive(Debug)]
struct Read {
    ticket: u64,
    /// It was given out: what it will bring may be older than what is there now.
    out: bool,
    answer: Answer,
    /// When it was last asked for, or answered.
    touched: Tick,
}

/// What came of asking for a read.
#[derive(Debug, PartialEq, Eq)]
pub enum Asked {
    Pending,
    Ready,
    Failed,
}

/// A request that was given out.
#[derive(Debug)]
struct Outstanding {
    operation: Operation,
    /// When it is given up.
    until: Tick,
    /// The front's fence that it was given out under.
    fence: u64,
}

/// The queue.
#[derive(Debug, Default)]
pub struct MessageQueue {
    queue: VecDeque<Operation>,
    outstanding: BTreeMap<u64, Outstanding>,
    reads: BTreeMap<(u64, u32), Read>,
    requests: u64,
    tickets: u64,
    now: Tick,
    queued_bytes: usize,
    /// First address whose write failed since it was last told.
    failed: Option<u64>,
    /// Writes into buffers that failed and were not asked about: address and bytes.
    refused: Vec<(u64, u64)>,
    /// Requests given out that are not to be asked again.
    dropped: BTreeSet<u64>,
    /// What was given up: whether it is there is asked once more when its ring or its device ends.
    given_up: GivenUp,
}

const fn overlap(one: u64, one_bytes: u64, other: u64, other_bytes: u64) -> bool {
    one < other.saturating_add(other_bytes) && other < one.saturating_add(one_bytes)
}

/// errno of an answer that says: dropped at a fence, ask again if it still holds. It may have been sent all the same; doing it twice
/// does no harm, because no word that publishes it has been given out.
const AGAIN: u32 = libc::EAGAIN as u32;

impl MessageQueue {
    /// Nothing waits and nothing is outstanding.
    pub fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.outstanding.is_empty()
    }

    /// Requests given out and not answered.
    pub fn outstanding(&self) -> usize {
        self.outstanding.len()
    }

    /// Writes wait or are outstanding: later writes must queue behind them.
    pub fn has_writes(&self) -> bool {
        self.queue
            .iter()
            .any(|operation| matches!(operation, Operation::Write(_)))
            || self.writes_outstanding()
    }

    /// Bytes of writes that still fit.
    pub const fn write_room(&self) -> usize {
        QUEUED_BYTES_MAX.saturating_sub(self.queued_bytes)
    }

    /// Time goes on. Answers that nobody has asked for within [`READ_IDLE_NS`] are forgotten: who wanted them gave up. (Who waits for one that
    /// has not come does not ask again until it has.)
    pub fn handle_time(&mut self, now: Tick) {
        self.now = now;
        if !self.reads.is_empty() {
            self.reads.retain(|_, read| {
                matches!(read.answer, Answer::Awaited) || now.since_ns(read.touched) < READ_IDLE_NS
            });
        }
    }

    /// Asks for a read unless that was done; the answer stays for [`MessageQueue::take`].
    pub fn ask(&mut self, iova: u64, bytes: u32, number: u64) -> Asked {
        if let Some(read) = self.reads.get_mut(&(iova, bytes)) {
            read.touched = self.now;
            return match read.answer {
                Answer::Awaited => Asked::Pending,
                Answer::Ready(_) => Asked::Ready,
                Answer::Failed => Asked::Failed,
            };
        }
        if self.reads.len() >= READS_MAX && !self.evict() {
            // All are under way: the caller comes again when one is answered.
            return Asked::Pending;
        }
        self.tickets += 1;
        let ticket = self.tickets;
        self.reads.insert(
            (iova, bytes),
            Read {
                ticket,
                out: false,
                answer: Answer::Awaited,
                touched: self.now,
            },
        );
        self.queue.push_back(Operation::Read {
            iova,
            bytes,
            number,
            ticket,
        });
        Asked::Pending
    }

    /// Takes the answer of a read, if it is there; a failed one is forgotten.
    pub fn take(&mut self, iova: u64, bytes: u32) -> Option<Vec<u8>> {
        match self.reads.remove(&(iova, bytes))?.answer {
            Answer::Ready(data) => Some(data),
            Answer::Awaited | Answer::Failed => None,
        }
    }

    /// Forgets a read, answered or not.
    pub fn forget(&mut self, iova: u64, bytes: u32) {
        self.reads.remove(&(iova, bytes));
    }

    /// Forgets all reads: who still wants one asks again.
    pub fn forget_reads(&mut self) {
        self.reads.clear();
    }

    /// Forgets what was read, or is being read, in a range that is another's from now on. What is not given out yet stays: it will be as new
    /// as what that other asks for, and somebody may wait for nothing but its answer.
    pub fn forget_reads_of(&mut self, iova: u64, bytes: u64) {
        if !self.reads.is_empty() {
            self.reads.retain(|(start, length), read| {
                !read.out || !overlap(iova, bytes, *start, u64::from(*length))
            });
        }
    }

    /// Queues a write; false when there is no room. After a failure writes are dropped until it was told.
    pub fn write(&mut self, write: Write) -> bool {
        if self.failed.is_some() {
            self.given_up.lose_write(&write);
            return true;
        }
        if write.data.len() > self.write_room() {
            return false;
        }
        self.given_up.forget(write.iova, write.data.len() as u64);
        self.queued_bytes += write.data.len();
        if write.buffer && !self.refused.is_empty() {
            // What failed there before was another submission's, that nobody asks about any more.
            self.take_refused(write.iova, write.data.len() as u64);
        }
        self.queue.push_back(Operation::Write(write));
        true
    }

    /// Whether a write into a buffer failed within this range; it is forgotten with that.
    pub fn take_refused(&mut self, iova: u64, bytes: u64) -> bool {
        let before = self.refused.len();
        self.refused.retain(|(start, length)| {
            *start >= iova.saturating_add(bytes) || start.saturating_add(*length) <= iova
        });
        self.refused.len() != before
    }

    /// Whether all writes are done; `Err`: one failed since this was last asked, at this address.
    pub fn settled(&mut self) -> Result<bool, u64> {
        if self.has_writes() {
            return Ok(false);
        }
        self.failed.take().map_or(Ok(true), Err)
    }

    /// Whether the turn of a write has come that is done by ourselves.
    pub fn local_is_next(&self) -> bool {
        matches!(self.queue.front(), Some(Operation::Write(write)) if write.local)
            && !self.writes_outstanding()
    }

    /// A write to be done by ourselves, when its turn has come.
    pub fn next_local(&mut self) -> Option<Write> {
        if !self.local_is_next() {
            return None;
        }
        match self.queue.pop_front() {
            Some(Operation::Write(write)) => {
                self.queued_bytes -= write.data.len();
                Some(write)
            }
            _ => None,
        }
    }

    /// The next request for the front.
    pub fn poll_output(&mut self, session: u64, fence: u64, now: Tick) -> Option<DmaRequest> {
        if self.outstanding.len() >= MESSAGE_DMA_OUTSTANDING_MAX {
            return None;
        }
        loop {
            match self.queue.front()? {
                Operation::Write(write) if write.local || (write.barrier && self.writes_outstanding()) => {
                    return None;
                }
                Operation::Read {
                    iova, bytes, ticket, ..
                } if !self.wants(*iova, *bytes, *ticket) => {
                    self.queue.pop_front();
                }
                _ => break,
            }
        }
        let operation = self.queue.pop_front()?;
        self.set_out(&operation, true);
        self.requests += 1;
        let request = self.requests;
        let output = match &operation {
            Operation::Read { iova, bytes, .. } => DmaRequest {
                message: CoreToFront::DmaRead {
                    session,
                    request,
                    fence,
                    iova: *iova,
                    bytes: *bytes,
                },
                payload: Vec::new(),
            },
            Operation::Write(write) => DmaRequest {
                message: CoreToFront::DmaWrite {
                    session,
                    request,
                    fence,
                    iova: write.iova,
                },
                // Kept here too, in case the front drops it unsent at a fence.
                payload: write.data.clone(),
            },
        };
        let until = now.after_ns(MESSAGE_WAIT_NS);
        let given_out = Outstanding {
            operation,
            until,
            fence,
        };
        self.outstanding.insert(request, given_out);
        Some(output)
    }

    /// An answer came. Unknown requests (given up, or of before a reset) are ignored: false.
    pub fn handle_answer(&mut self, now: Tick, request: u64, error: u32, payload: Vec<u8>) -> bool {
        self.now = now;
        if self.given_up.answered(request, error == 0) {
            return true;
        }
        let Some(answered) = self.outstanding.get(&request) else {
            return false;
        };
        let fence = answered.fence;
        if error != AGAIN {
            self.dropped.remove(&request);
            if let Some(Outstanding { operation, .. }) = self.outstanding.remove(&request) {
                self.finish(operation, (error == 0).then_some(payload));
            }
            return true;
        }
        if matches!(answered.operation, Operation::Read { .. }) {
            // A write that was given out with it may be with the client, and is answered when that has answered.
            if let Some(given_out) = self.outstanding.remove(&request) {
                self.take_back(request, given_out.operation);
            }
            return true;
        }
        // Dropped at the next fence, and so were all that were given out under the same one: they go again, in order. What was given out under a
        // later fence, before this answer came, is with the client.
        let later = self.outstanding.split_off(&request);
        for (request, given_out) in later.into_iter().rev() {
            if given_out.fence > fence {
                self.outstanding.insert(request, given_out);
            } else {
                self.take_back(request, given_out.operation);
            }
        }
        true
    }

    /// What the client was not asked for, or will not answer, is first again of what waits, if it is still wanted.
    fn take_back(&mut self, request: u64, operation: Operation) {
        if !self.dropped.remove(&request) {
            self.set_out(&operation, false);
            self.queue.push_front(operation);
        } else if let Operation::Write(write) = operation {
            self.queued_bytes = self.queued_bytes.saturating_sub(write.data.len());
            self.given_up.lose_write(&write);
        }
    }

    /// When the oldest outstanding request is given up.
    pub fn poll_timeout(&self) -> Option<Tick> {
        let given_up = self.given_up.outstanding.values().map(|(.., until)| *until);
        let outstanding = self.outstanding.values().map(|given_out| given_out.until);
        outstanding.chain(given_up).min()
    }

    /// Gives up what is due; how many that are.
    pub fn handle_timeout(&mut self, now: Tick) -> u64 {
        self.now = now;
        self.given_up.time_out(now);
        let due: Vec<u64> = self
            .outstanding
            .iter()
            .filter(|(_, given_out)| given_out.until <= now)
            .map(|(request, _)| *request)
            .collect();
        let count = due.len() as u64;
        for request in due {
            if let Some(Outstanding { operation, .. }) = self.outstanding.remove(&request) {
                self.finish(operation, None);
            }
        }
        count
    }

    /// Everything is void: a reset, a quarantine, the session's end. Late answers only say whether a write was done all the same.
    pub fn clear(&mut self) {
        let before = std::mem::take(self);
        (self.requests, self.tickets, self.now) = (before.requests, before.tickets, before.now);
        self.given_up = before.given_up;
        for operation in before.queue {
            if let Operation::Write(write) = operation {
                self.given_up.lose_write(&write);
            }
        }
        for (request, given_out) in before.outstanding {
            if let Operation::Write(write) = given_out.operation
                && !write.buffer
            {
                let place = (write.iova, write.data.len() as u64, given_out.until);
                self.given_up.outstanding.insert(request, place);
            }
        }
    }

    /// Whether what was written into a range (not into a buffer) is there; `None`: that is not known yet.
    pub fn arrived(&self, iova: u64, bytes: u64) -> Option<bool> {
        let meets = |start: u64, length: u64| overlap(iova, bytes, start, length);
        let waits = |operation: &Operation| matches!(operation, Operation::Write(write) if meets(write.iova, write.data.len() as u64));
        let outstanding = self.outstanding.values();
        let given_up = self.given_up.outstanding.values();
        if self.queue.iter().any(waits)
            || outstanding.map(|given_out| &given_out.operation).any(waits)
            || given_up
                .map(|(start, length, _)| (*start, *length))
                .any(|(start, length)| meets(start, length))
        {
            return None;
        }
        let lost = self
            .given_up
            .lost
            .iter()
            .any(|(start, length)| meets(*start, *length));
        Some(!lost && !self.given_up.too_many)
    }

    /// Nobody asks any more about what was given up so far.
    pub fn forget_given_up(&mut self) {
        self.given_up = GivenUp::default();
    }

    /// Maps went away: what was not yet given out for one that `is_mapped` no longer knows fails.
    pub fn drop_unmapped(&mut self, is_mapped: impl Fn(u64) -> bool) {
        for operation in std::mem::take(&mut self.queue) {
            match operation {
                Operation::Read { number, .. } if !is_mapped(number) => self.finish(operation, None),
                Operation::Write(write) if self.failed.is_some() || !is_mapped(write.number) => {
                    // The writes before it still go; none after it, unless it was a buffer.
                    self.queued_bytes = self.queued_bytes.saturating_sub(write.data.len());
                    self.given_up.lose_write(&write);
                    if self.failed.is_some() || !self.refuse(&write) {
                        self.failed.get_or_insert(write.iova);
                    }
                }
                operation => self.queue.push_back(operation),
            }
        }
    }

    /// Writes that overlap a range are not wanted any more. Those that were given out and not answered are not asked again.
    pub fn drop_writes(&mut self, iova: u64, bytes: u64) {
        let overlaps = |operation: &Operation| matches!(operation, Operation::Write(write) if overlap(write.iova, write.data.len() as u64, iova, bytes));
        let (queued_bytes, given_up) = (&mut self.queued_bytes, &mut self.given_up);
        self.queue.retain(|operation| {
            let drops = overlaps(operation);
            if let Operation::Write(write) = operation
                && drops
            {
                *queued_bytes = queued_bytes.saturating_sub(write.data.len());
                given_up.lose_write(write);
            }
            !drops
        });
        let out = self.outstanding.iter();
        self.dropped.extend(
            out.filter(|(_, given_out)| overlaps(&given_out.operation))
                .map(|(request, _)| *request),
        );
    }

    fn wants(&self, iova: u64, bytes: u32, ticket: u64) -> bool {
        self.reads
            .get(&(iova, bytes))
            .is_some_and(|read| read.ticket == ticket)
    }

    /// A read goes out, or will once more.
    fn set_out(&mut self, operation: &Operation, out: bool) {
        if let Operation::Read {
            iova, bytes, ticket, ..
        } = operation
            && let Some(read) = self.reads.get_mut(&(*iova, *bytes))
            && read.ticket == *ticket
        {
            read.out = out;
        }
    }

    fn writes_outstanding(&self) -> bool {
        self.outstanding
            .values()
            .any(|given_out| matches!(given_out.operation, Operation::Write(_)))
    }

    fn finish(&mut self, operation: Operation, done: Option<Vec<u8>>) {
        match operation {
            Operation::Read {
                iova, bytes, ticket, ..
            } => {
                if let Some(read) = self
                    .reads
                    .get_mut(&(iova, bytes))
                    .filter(|read| read.ticket == ticket)
                {
                    read.answer = match done {
                        Some(data) if data.len() == bytes as usize => Answer::Ready(data),
                        _ => Answer::Failed,
                    };
                    read.out = true;
                    read.touched = self.now;
                }
            }
            Operation::Write(write) => {
                self.queued_bytes = self.queued_bytes.saturating_sub(write.data.len());
                if done.is_none() {
                    self.fail(&write);
                }
            }
        }
    }

    /// Notes that a write into a buffer failed; false: it is none, or there is no room for the note.
    fn refuse(&mut self, write: &Write) -> bool {
        let fits = write.buffer && self.refused.len() < REFUSED_MAX;
        if fits {
            self.refused.push((write.iova, write.data.len() as u64));
        }
        fits
    }

    /// A write failed: none after it may be seen by the guest, unless it was one into a buffer.
    pub fn fail(&mut self, write: &Write) {
        if self.refuse(write) {
            return;
        }
        self.given_up.lose_write(write);
        self.failed.get_or_insert(write.iova);
        self.queue.retain(|operation| match operation {
            Operation::Read { .. } => true,
            Operation::Write(write) => {
                self.queued_bytes = self.queued_bytes.saturating_sub(write.data.len());
                self.given_up.lose_write(write);
                false
            }
        });
    }

    /// Forgets the answer that nobody has asked for for the longest time.
    fn evict(&mut self) -> bool {
        let answered = self
            .reads
            .iter()
            .filter(|(_, read)| !matches!(read.answer, Answer::Awaited));
        let oldest = answered.map(|(key, read)| (read.touched, *key)).min();
        oldest.is_some_and(|(_, key)| self.reads.remove(&key).is_some())
    }
}
