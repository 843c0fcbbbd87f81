//! From an answer to the guest's completion ring, exactly once.
//!
//! In: answers. Out: payload and completion in guest memory, interrupts. The order, in [`publish_one`]: payload; journal the whole completion
//! with its slot; completion; its last word (release); journal that it is published. So whoever comes after a kill finds either a submission
//! without an answer (all is done again), or one whose payload is in place and whose completion may be written once more. The payload goes before
//! the journal, not after it, because it is not in the journal: behind a journaled completion the buffer is never touched again.

use super::interface::{Answer, Output, Segment};
use super::prepare::scatter;
use super::ring::{Desk, Due, Ring, Slot, Standing, Step, Stop};
use super::table::{FLAG_CONFIRM, FLAG_LOST};
use crate::page::{CorePage, FrontPage, Interrupts, Words};
use crate::{GuestMemory, MemoryError};
use vmgmt_abi::registers::VECTORS_MAX;
use vmgmt_abi::ring::{completion_flag, event_due, event_offset, phase};
use vmgmt_abi::{Completion, Status};
use zerocopy::IntoBytes;

/// Bytes of a completion before its last word.
const LAST_WORD: usize = std::mem::offset_of!(Completion, tag);

/// The hub's answer to the submission in place `index`, which is in flight.
pub(super) fn accept(ring: &mut Ring, due: Due) {
    let Some(slot) = ring.slot_mut(due.index) else {
        return;
    };
    if slot.standing == Standing::Recovering {
        // Its buffer is not known again yet.
        slot.early = Some(Box::new(due));
    } else {
        ring.queue(due);
    }
}

/// Publishes what is due, in order.
pub(super) fn publish<W: Words, M: GuestMemory>(
    desk: &mut Desk<W>,
    ring: &mut Ring,
    n: usize,
    memory: &mut M,
) -> Result<(), Stop> {
    while let Some(mut due) = ring.due.pop_front() {
        if let Err(stop) = publish_one(desk, ring, n, memory, &mut due) {
            ring.due.push_front(due);
            return Err(stop);
        }
    }
    Ok(())
}

fn publish_one<W: Words, M: GuestMemory>(
    desk: &mut Desk<W>,
    ring: &mut Ring,
    n: usize,
    memory: &mut M,
    due: &mut Due,
) -> Result<(), Stop> {
    if due.step != Step::Settle {
        settled_first(ring.shared, memory)?;
    }
    let Some(slot) = ring.slots.get_mut(due.index as usize) else {
        return Ok(());
    };
    if due.step == Step::Payload {
        write_payload(desk, slot, memory, due)?;
        due.step = if slot.data_bytes > 0 && !is_shared(slot, memory) {
            Step::Settle
        } else {
            Step::Journal
        };
    }
    if due.step == Step::Settle {
        memory.settled()?;
        let refused =
            |refused: bool, segment: &Segment| memory.take_refused(segment.iova, segment.bytes) | refused;
        if slot.segments.as_slice().iter().fold(false, refused) && !due.lost {
            lose(desk, due, Status::BAD_ADDRESS);
        }
        due.step = Step::Journal;
    }
    if due.step == Step::Journal {
        let at = ring.completion_tail;
        let completion = completion(&due.answer, slot.tag, at, ring.setup.completion_entries);
        slot.flags = if due.confirm { FLAG_CONFIRM } else { 0 } | if due.lost { FLAG_LOST } else { 0 };
        desk.table
            .set_completing(n, due.index, slot.generation, slot.flags, at, &completion);
        ring.completion_tail = at.wrapping_add(1);
        ring.owed = ring.owed.saturating_sub(1);
        due.step = Step::Publish(at);
    }
    if let Step::Publish(at) = due.step {
        let tag = ring.slot(due.index).map_or(0, |slot| slot.tag);
        write(ring, memory, at, &due.answer, tag)?;
        written(desk, ring, n, due.index, at);
    }
    Ok(())
}

/// What goes by message goes first, and what is written to shared memory meanwhile waits behind it, unseen. A ring in shared memory counts
/// a completion as published when it has written it (its record is freed, its interrupt goes out): so it writes none before.
pub(super) fn settled_first<M: GuestMemory>(shared: bool, memory: &mut M) -> Result<(), Stop> {
    if shared {
        memory.settled()?;
    }
    Ok(())
}

/// A failure of the guest's buffer is a status in its completion.
fn write_payload<W: Words, M: GuestMemory>(
    desk: &mut Desk<W>,
    slot: &Slot,
    memory: &mut M,
    due: &mut Due,
) -> Result<(), Stop> {
    if due.payload.is_empty() || due.lost {
        return Ok(());
    }
    let status = if due.payload.len() as u64 > slot.data_bytes {
        Status::TOO_LARGE
    } else {
        match scatter(memory, slot.segments.as_slice(), &due.payload) {
            Ok(()) => return Ok(()),
            Err(MemoryError::Pending) => return Err(Stop::Wait),
            Err(MemoryError::Quiet) => return Err(Stop::Quiet),
            Err(MemoryError::Unmapped { .. } | MemoryError::Denied { .. } | MemoryError::Gone { .. }) => {
                Status::BAD_ADDRESS
            }
        }
    };
    lose(desk, due, status);
    Ok(())
}

/// What the guest was to get did not arrive: that is its answer.
pub(super) fn lose<W: Words>(desk: &mut Desk<W>, due: &mut Due, status: Status) {
    desk.counters.bad_addresses += 1;
    due.answer = Answer::failed(status);
    due.lost = true;
}

fn is_shared<M: GuestMemory>(slot: &Slot, memory: &mut M) -> bool {
    slot.segments
        .as_slice()
        .iter()
        .all(|segment| memory.is_shared(segment.iova))
}

fn completion(answer: &Answer, tag: u32, at: u32, entries: u32) -> Completion {
    let Answer {
        status,
        flags,
        detail,
        result,
        extra,
    } = *answer;
    Completion {
        result,
        extra,
        detail,
        reserved: 0,
        tag,
        status,
        flags: flags & !completion_flag::PHASE | phase(at, entries),
    }
}

/// Writes down that the rings refuse the submission in place `index`, and how. (The completion's place, and so its phase, is not known yet.)
pub(super) fn note_refused<W: Words>(
    desk: &Desk<W>,
    ring: &Ring,
    n: usize,
    index: u32,
    answer: &Answer,
    flags: u8,
) {
    if let Some(slot) = ring.slot(index) {
        let completion = completion(answer, slot.tag, 0, ring.setup.completion_entries);
        desk.table
            .set_refused(n, index, slot.generation, flags, &completion);
    }
}

/// The answer that a completion carries.
pub(super) const fn answer_of(completion: &Completion) -> Answer {
    Answer {
        status: completion.status,
        flags: completion.flags & !completion_flag::PHASE,
        detail: completion.detail,
        result: completion.result,
        extra: completion.extra,
    }
}

/// Writes completion `at`, its last word last.
pub(super) fn write<M: GuestMemory>(
    ring: &Ring,
    memory: &mut M,
    at: u32,
    answer: &Answer,
    tag: u32,
) -> Result<(), Stop> {
    let completion = completion(answer, tag, at, ring.setup.completion_entries);
    write_raw(ring, memory, at, &completion)
}

/// As [`write`], of a completion that is made up already.
pub(super) fn write_raw<M: GuestMemory>(
    ring: &Ring,
    memory: &mut M,
    at: u32,
    completion: &Completion,
) -> Result<(), Stop> {
    let address = ring.completion_address(at);
    let (first, _) = completion.as_bytes().split_at(LAST_WORD);
    memory.write(address, first)?;
    memory.store_u64(address.wrapping_add(LAST_WORD as u64), last_word(completion))?;
    Ok(())
}

/// Tag, status and flags of a completion as the one word that is written last.
pub(super) fn last_word(completion: &Completion) -> u64 {
    u64::from(completion.tag) | u64::from(completion.status) << 32 | u64::from(completion.flags) << 48
}

/// Where the last word of completion `at` lies.
pub(super) fn last_word_address(ring: &Ring, at: u32) -> u64 {
    ring.completion_address(at).wrapping_add(LAST_WORD as u64)
}

/// Completion `at` of the submission in place `index` is written.
pub(super) fn written<W: Words>(desk: &mut Desk<W>, ring: &mut Ring, n: usize, index: u32, at: u32) {
    count(desk);
    if ring.shared {
        ring.published = at.wrapping_add(1);
        ring.save_cursor(&desk.table, n);
        published(desk, ring, n, index);
    } else {
        if let Some(slot) = ring.slot_mut(index) {
            slot.standing = Standing::Unsettled;
        }
        ring.unsettled.push(index);
    }
}

pub(super) fn count<W: Words>(desk: &mut Desk<W>) {
    desk.counters.completions += 1;
    desk.turn.completed += 1;
}

/// The guest can see the completion of the submission in place `index`: its record is done with, once the hub knows.
pub(super) fn published<W: Words>(desk: &mut Desk<W>, ring: &mut Ring, n: usize, index: u32) {
    let Some(slot) = ring.slot_mut(index) else {
        return;
    };
    if slot.flags & FLAG_CONFIRM == 0 {
        ring.free_slot(&desk.table, n, index);
        return;
    }
    slot.standing = Standing::Told;
    let (generation, flags) = (slot.generation, slot.flags);
    desk.table.set_published(n, index, generation, flags);
    let token = desk.token(n, index, generation);
    desk.tell(token, flags & FLAG_LOST == 0, Some((n, index, generation)));
}

/// Completions that went by messages are published once all of them are there.
pub(super) fn settle<W: Words, M: GuestMemory>(
    desk: &mut Desk<W>,
    ring: &mut Ring,
    n: usize,
    memory: &mut M,
) -> Result<(), Stop> {
    if ring.unsettled.is_empty() {
        return Ok(());
    }
    memory.settled()?;
    // They follow one another. Others may be journaled behind them that are not written yet: those are not published.
    ring.published = ring.published.wrapping_add(ring.unsettled.len() as u32);
    ring.save_cursor(&desk.table, n);
    for index in std::mem::take(&mut ring.unsettled) {
        published(desk, ring, n, index);
    }
    Ok(())
}

/// As [`settle`], of a ring that the guest closed; also payloads whose completions were not journaled yet must be there, or void.
pub(super) fn settle_last<W: Words, M: GuestMemory>(
    desk: &mut Desk<W>,
    ring: &mut Ring,
    n: usize,
    memory: &mut M,
) -> Result<(), Stop> {
    memory.settled()?;
    settle(desk, ring, n, memory)
}

/// Whether the guest wants an interrupt for what was published since the last one.
pub(super) fn signal_due<W: Words, M: GuestMemory>(
    desk: &mut Desk<W>,
    ring: &mut Ring,
    memory: &mut M,
) -> Result<bool, Stop> {
    let (old, new) = (ring.signalled, ring.published);
    if old == new && !ring.signal {
        return Ok(false);
    }
    let mut due = true;
    if ring.shared && desk.suppression && !ring.signal {
        // Between the completions' last words and this load: see `vmgmt_abi::ring`.
        memory.fence();
        let event = memory.load_u32(ring.event_address(event_offset::COMPLETION_EVENT))?;
        due = event_due(event, old, new);
    }
    ring.signalled = new;
    ring.signal = false;
    if !due {
        desk.counters.signals_spared += 1;
    }
    Ok(due)
}

/// Raises the vectors of a turn, each once.
pub(super) fn raise<W: Words>(
    desk: &mut Desk<W>,
    front: &FrontPage<W>,
    core: &CorePage<W>,
    vectors: impl Iterator<Item = u32>,
) {
    let interrupts = front.interrupts();
    let count = match interrupts {
        Interrupts::Message { vectors } => u32::from(vectors),
        Interrupts::Intx | Interrupts::None => VECTORS_MAX as u32,
    };
    // With no vector that has an eventfd there is nobody to wake.
    if count == 0 {
        return;
    }
    let raised = vectors.fold(0u32, |raised, vector| raised | 1 << (vector % count));
    for vector in (0..VECTORS_MAX).filter(|vector| raised & 1 << vector != 0) {
        desk.counters.signals += 1;
        match interrupts {
            Interrupts::Message { .. } => desk.outputs.push_back(Output::Signal { vector: vector as u8 }),
            Interrupts::Intx | Interrupts::None => {
                core.set_raise(vector, core.raise(vector).wrapping_add(1));
            }
        }
    }
    if raised != 0 && interrupts == Interrupts::Intx {
        desk.outputs.push_back(Output::Kick);
    }
}
