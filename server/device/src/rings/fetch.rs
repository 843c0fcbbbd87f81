//! From the guest's submission ring to the hub: a submission is fetched once.
//!
//! In: an open ring, memory, a budget. Out: `Output::Submission`s, and answers to what the rings answer themselves. The order:
//! copy, judge the copy, fetch what it points to, journal, move the cursor, hand on; the slot returns to the guest last.

use super::complete;
use super::interface::{Answer, Fetched, Output};
use super::limits::{BATCH_MAX, LIST_ENTRIES_HELD_MAX, STALL_LAST_NS};
use super::prepare::{Failure, Preparing};
use super::ring::{Desk, Due, Ring, Standing, Stop};
use super::shape::{Who, judge};
use crate::page::Words;
use crate::{GuestMemory, Tick};
use vmgmt_abi::ring::{SUBMISSION_BYTES, event_offset};
use vmgmt_abi::{Budget, Opcode, Status, Submission};
use zerocopy::FromBytes;

/// Fetches at most one batch of at most `budget` submissions and gives how many.
pub(super) fn fetch<W: Words, M: GuestMemory>(
    desk: &mut Desk<W>,
    ring: &mut Ring,
    n: usize,
    memory: &mut M,
    budget: u32,
) -> Result<u32, Stop> {
    if ring.batch_at == ring.batch_count && !copy_batch(desk, ring, memory, budget)? {
        return Ok(0);
    }
    let before = ring.fetched;
    let mut result = Ok(());
    while ring.batch_at < ring.batch_count {
        result = take_one(desk, ring, n, memory);
        if result.is_err() {
            break;
        }
        ring.batch_at += 1;
    }
    let fetched = ring.fetched.wrapping_sub(before) as u32;
    desk.counters.submissions += u64::from(fetched);
    desk.turn.fetched += fetched;
    return_slots(ring, memory)?;
    result.map(|()| fetched)
}

/// Tells the guest which submission slots are its own again.
pub(super) fn return_slots<M: GuestMemory>(ring: &mut Ring, memory: &mut M) -> Result<(), Stop> {
    if ring.returned != ring.head() {
        memory.store_u32(ring.event_address(event_offset::SUBMISSION_HEAD), ring.head())?;
        ring.returned = ring.head();
    }
    Ok(())
}

/// Copies the next submissions into private memory; false: there is none, or no completion slot for one.
fn copy_batch<W: Words, M: GuestMemory>(
    desk: &mut Desk<W>,
    ring: &mut Ring,
    memory: &mut M,
    budget: u32,
) -> Result<bool, Stop> {
    let head = ring.head();
    if ring.tail == head {
        let is_armed = ring.armed == Some(head) || !desk.suppression;
        if !ring.shared && !ring.look && is_armed {
            return Ok(false);
        }
        // What was armed must be there before the tail is looked at for the last time.
        if ring.armed == Some(head) && !ring.shared {
            memory.settled()?;
        }
        // A doorbell that rings after a message was sent is not answered by that message.
        let asked_under = *ring.asked_under.get_or_insert(ring.doorbell);
        let tail = memory.load_u32(ring.event_address(event_offset::SUBMISSION_TAIL))?;
        ring.asked_under = None;
        if tail.wrapping_sub(head) > ring.setup.submission_entries {
            return Err(Stop::Fail(Status::BAD_ARGUMENT));
        }
        ring.tail = tail;
        ring.look = ring.doorbell != asked_under;
        if tail == head {
            return arm_by_message(desk, ring, memory).map(|()| false);
        }
    }
    let slots_free = free_slots(desk.now, ring, memory)?.min(ring.records_free());
    let to_end = ring.setup.submission_entries - (head & (ring.setup.submission_entries - 1));
    let count = ring
        .tail
        .wrapping_sub(head)
        .min(to_end)
        .min(BATCH_MAX)
        .min(budget)
        .min(slots_free);
    // A read that is under way is the one to be waited for: left behind, its answer would be found when the ring has come round.
    let count = match ring.asked_batch.take() {
        Some(asked) if asked <= slots_free => asked,
        _ => count,
    };
    if count == 0 {
        return Ok(false);
    }
    let address = ring.submission_address(head);
    let Some(batch) = ring.batch.get_mut(..count as usize * SUBMISSION_BYTES) else {
        return Ok(false);
    };
    ring.asked_batch = Some(count);
    memory.read(address, batch)?;
    ring.asked_batch = None;
    ring.batch_at = 0;
    ring.batch_count = count as usize;
    Ok(true)
}

/// A guest need not know that its memory is not shared: its doorbell is asked for as ever, by a message, and the tail is looked at once
/// more when that is there. (Where memory is shared the shell arms, when it wants to sleep.)
fn arm_by_message<W: Words, M: GuestMemory>(
    desk: &Desk<W>,
    ring: &mut Ring,
    memory: &mut M,
) -> Result<(), Stop> {
    let head = ring.head();
    if ring.shared || !desk.suppression || ring.armed == Some(head) {
        return Ok(());
    }
    memory.store_u32(ring.event_address(event_offset::SUBMISSION_EVENT), head)?;
    ring.armed = Some(head);
    ring.look = true;
    Err(Stop::Wait)
}

/// Completion slots that submissions may be fetched for. A guest that lets its completion ring fill up rings no doorbell when it takes
/// completions: the ring is looked at again by itself, ever more seldom.
fn free_slots<M: GuestMemory>(now: Tick, ring: &mut Ring, memory: &mut M) -> Result<u32, Stop> {
    let free = ring.completion_slots_free();
    if free > 0 {
        return Ok(free);
    }
    // By messages each look costs one, so it waits for its time.
    if !ring.shared && !ring.look_head && ring.stalled_until.is_some_and(|until| now < until) {
        return Ok(0);
    }
    let head = memory.load_u32(ring.event_address(event_offset::COMPLETION_HEAD))?;
    // The doorbell may have rung for the tail too: that is still to be read.
    ring.look_head = false;
    if ring.completion_tail.wrapping_sub(head) > ring.setup.completion_entries {
        return Err(Stop::Fail(Status::BAD_ARGUMENT));
    }
    ring.completion_head = head;
    let free = ring.completion_slots_free();
    if free > 0 {
        ring.stalled_until = None;
        ring.stall_ns = super::limits::STALL_FIRST_NS;
    } else if ring.stalled_until.is_none_or(|until| now >= until) {
        ring.stalled_until = Some(now.after_ns(ring.stall_ns));
        ring.stall_ns = ring.stall_ns.saturating_mul(2).min(STALL_LAST_NS);
    }
    Ok(free)
}

/// Takes the submission at `batch_at`; at an error nothing of it has happened yet.
fn take_one<W: Words, M: GuestMemory>(
    desk: &mut Desk<W>,
    ring: &mut Ring,
    n: usize,
    memory: &mut M,
) -> Result<(), Stop> {
    if ring.preparing.is_none() {
        let at = ring.batch_at * SUBMISSION_BYTES;
        let Some(submission) = ring
            .batch
            .get(at..at + SUBMISSION_BYTES)
            .and_then(|bytes| Submission::read_from_bytes(bytes).ok())
        else {
            return Err(Stop::Fail(Status::BAD_ARGUMENT));
        };
        match judge(&submission, ring.mode) {
            Ok(shape) if shape.who == Who::Noop => {
                return answer_at_once(desk, ring, n, memory, &submission, Answer::ok(0));
            }
            Ok(shape) => ring.preparing = Some(Preparing::new(submission, shape)),
            Err(status) => {
                answer_at_once(desk, ring, n, memory, &submission, Answer::failed(status))?;
                desk.counters.refused += 1;
                return Ok(());
            }
        }
    }
    let outcome = match ring.preparing.as_mut().map(|preparing| preparing.advance(memory)) {
        Some(Err(Failure::Stop(stop))) => return Err(stop),
        Some(Err(Failure::Status(status))) => Err(status),
        Some(Ok(())) | None => Ok(()),
    };
    let Some(preparing) = ring.preparing.take() else {
        return Ok(());
    };
    let deadline = match preparing.submission.deadline_ns {
        0 => Tick::NEVER,
        nanoseconds => desk.now.after_ns(nanoseconds),
    };
    // Its maps may be newer than this turn.
    desk.note_maps(memory);
    let Some(index) = journal(desk, ring, n, &preparing.submission, deadline) else {
        return Err(Stop::Quiet);
    };
    hand_on(desk, ring, n, index, preparing, outcome, deadline, false);
    Ok(())
}

/// Writes the record of a submission, then moves the cursor past it. `None`: there is no free record (copy_batch saw to it that there is).
fn journal<W: Words>(
    desk: &mut Desk<W>,
    ring: &mut Ring,
    n: usize,
    submission: &Submission,
    deadline: Tick,
) -> Option<u32> {
    let index = ring.take_slot(&desk.table, n)?;
    let number = ring.fetched;
    let slot = ring.slot_mut(index)?;
    slot.tag = submission.tag;
    slot.flags = 0;
    slot.standing = Standing::Hub;
    let generation = slot.generation;
    desk.table
        .set_fetched(n, index, generation, number, deadline.0, submission);
    ring.fetched = ring.fetched.wrapping_add(1);
    ring.owed += 1;
    ring.save_cursor(&desk.table, n);
    Some(index)
}

/// Answers what needs no record: its answer follows from its 64 bytes alone, so a core life that finds the cursor before it answers it
/// again, or finds its completion where the next one is to go. Where that cannot be (writes go by messages, or another
/// completion is stuck half-way) it gets a record like all others.
fn answer_at_once<W: Words, M: GuestMemory>(
    desk: &mut Desk<W>,
    ring: &mut Ring,
    n: usize,
    memory: &mut M,
    submission: &Submission,
    answer: Answer,
) -> Result<(), Stop> {
    if ring.shared && ring.due.is_empty() {
        complete::settled_first(ring.shared, memory)?;
        complete::write(ring, memory, ring.completion_tail, &answer, submission.tag)?;
        ring.completion_tail = ring.completion_tail.wrapping_add(1);
        ring.published = ring.completion_tail;
        ring.fetched = ring.fetched.wrapping_add(1);
        ring.save_cursor(&desk.table, n);
        complete::count(desk);
        return Ok(());
    }
    let Some(index) = journal(desk, ring, n, submission, Tick::NEVER) else {
        return Err(Stop::Quiet);
    };
    answer_here(ring, index, answer, Vec::new());
    Ok(())
}

/// Queues an answer of the rings themselves.
fn answer_here(ring: &mut Ring, index: u32, answer: Answer, payload: Vec<u8>) {
    ring.queue(Due::new(index, answer, payload, false));
}

/// Refuses a journaled submission for what is not in its 64 bytes. That is written down at once, before anything behind it goes to the hub: a
/// core life that finds the guest's memory otherwise would do it after what was submitted later.
fn refuse<W: Words>(desk: &Desk<W>, ring: &mut Ring, n: usize, index: u32, answer: Answer) {
    complete::note_refused(desk, ring, n, index, &answer, 0);
    answer_here(ring, index, answer, Vec::new());
}

/// Hands a journaled submission to whoever answers it.
#[allow(clippy::too_many_arguments)]
pub(super) fn hand_on<W: Words>(
    desk: &mut Desk<W>,
    ring: &mut Ring,
    n: usize,
    index: u32,
    preparing: Preparing,
    outcome: Result<(), Status>,
    deadline: Tick,
    again: bool,
) {
    let data_bytes = preparing.data_bytes();
    let Preparing {
        submission,
        shape,
        meta,
        data,
        segments,
        proof,
        ..
    } = preparing;
    if let Err(status) = outcome {
        if status == Status::BAD_ADDRESS {
            desk.counters.bad_addresses += 1;
        }
        return refuse(desk, ring, n, index, Answer::failed(status));
    }
    if ring.entries_held.saturating_add(segments.held()) > LIST_ENTRIES_HELD_MAX {
        let answer = Answer::over_budget(Budget::SUBMISSIONS_IN_FLIGHT);
        return refuse(desk, ring, n, index, answer);
    }
    ring.entries_held += segments.held();
    let Some(slot) = ring.slot_mut(index) else {
        return;
    };
    slot.segments = segments;
    slot.data_bytes = data_bytes;
    slot.standing = Standing::Hub;
    let generation = slot.generation;
    match shape.who {
        Who::Noop => answer_here(ring, index, Answer::ok(0), Vec::new()),
        Who::Echo => answer_here(ring, index, Answer::ok(meta.len() as u64), meta),
        Who::Prove => answer_here(ring, index, Answer::ok(u64::from(proof)), Vec::new()),
        Who::Cancel => {
            let found = ring.slots.iter().enumerate().find(|(place, slot)| {
                *place != index as usize
                    && slot.standing == Standing::Hub
                    && u64::from(slot.tag) == submission.argument
            });
            let found = found.map(|(place, slot)| desk.token(n, place as u32, slot.generation));
            answer_here(ring, index, Answer::ok(u64::from(found.is_some())), Vec::new());
            desk.outputs.extend(found.map(Output::Cancel));
        }
        Who::Hub => {
            if again {
                desk.counters.again += 1;
            }
            let token = desk.token(n, index, generation);
            desk.outputs.push_back(Output::Submission(Box::new(Fetched {
                token,
                mode: ring.mode,
                opcode: Opcode(submission.opcode),
                flags: submission.flags,
                tag: submission.tag,
                handle: submission.handle,
                offset: submission.offset,
                argument: submission.argument,
                deadline,
                meta,
                data_bytes,
                data,
                again,
            })));
        }
    }
}
