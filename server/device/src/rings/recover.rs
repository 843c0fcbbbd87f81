//! What an earlier core life left in flight.
//!
//! In: the in-flight table, then guest memory. Out: completions finished, submissions given to the hub again under the same tokens.
//! Whether an operation may be done twice is the hub's to decide: it kept its own record before the effect, and `Fetched::again` tells it
//! to look there. The rings give it all of them, so that each gets its one completion.

use super::complete;
use super::fetch::hand_on;
use super::interface::{Answer, Output};
use super::prepare::{Failure, Preparing};
use super::ring::{Desk, Due, Ring, Segments, Slot, Standing, Stop};
use super::shape::judge;
use super::table::{FLAG_LOST, FLAG_REFUSED, Kind, Record};
use crate::page::{RingSetup, Words};
use crate::{GuestMemory, Tick};
use vmgmt_abi::ring::{completion_flag, phase};
use vmgmt_abi::{Completion, Status, Submission};

/// One thing to be brought to its end, oldest work first.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Recovering {
    /// The next completion may be in the guest's ring already, without a record: see `fetch::answer_at_once`.
    AtOnce,
    /// Its completion may or may not be in the guest's ring.
    Completing {
        index: u32,
        at: u32,
        completion: Completion,
    },
    /// Its answer is not known.
    Fetched {
        index: u32,
        number: u64,
        submission: Submission,
        deadline: Tick,
    },
    /// The rings refused it. `lost`: the hub may know it.
    Refused {
        index: u32,
        number: u64,
        answer: Answer,
        lost: bool,
    },
}

impl Recovering {
    fn unanswered(index: u32, record: &Record) -> Self {
        let number = record.number;
        if record.flags & FLAG_REFUSED != 0 {
            Self::Refused {
                index,
                number,
                answer: complete::answer_of(&record.completion),
                lost: record.flags & FLAG_LOST != 0,
            }
        } else {
            Self::Fetched {
                index,
                number,
                submission: record.submission,
                deadline: Tick(record.deadline),
            }
        }
    }
}

/// Takes ring `n` over from the table; `None`: the table says what no core of this version writes.
pub(super) fn adopt<W: Words>(desk: &mut Desk<W>, n: usize, setup: RingSetup) -> Option<Ring> {
    let mut ring = Ring::opening(setup, true);
    let (mut fetched, published) = desk.table.cursor(n);
    let mut completing = Vec::new();
    let mut unanswered = Vec::new();
    let mut told = Vec::new();
    for index in 0..desk.table.used(n) {
        let record = desk.table.record(n, index)?;
        let standing = match record.kind {
            Kind::Free => {
                ring.free.push(index);
                Standing::Free
            }
            Kind::Fetched => {
                // The kill may have come between the record and the cursor.
                if record.number == fetched {
                    fetched += 1;
                }
                unanswered.push(Recovering::unanswered(index, &record));
                Standing::Recovering
            }
            Kind::Completing => {
                completing.push((record.completion_index, index, record.completion));
                Standing::Unsettled
            }
            Kind::Published => {
                told.push((index, record.generation, record.flags));
                Standing::Told
            }
        };
        ring.slots.push(Slot {
            generation: record.generation,
            standing,
            tag: record.submission.tag,
            flags: record.flags,
            segments: Segments::None,
            data_bytes: 0,
            early: None,
        });
    }
    // Now, while that record says Fetched: the next kill may come when it says more.
    desk.table.set_cursor(n, fetched, published);
    ring.free.reverse();
    unanswered.sort_by_key(|record| match record {
        Recovering::Fetched { number, .. } | Recovering::Refused { number, .. } => *number,
        Recovering::Completing { .. } | Recovering::AtOnce => 0,
    });
    // At most the table's records lie on either side of `published`.
    completing.sort_by_key(|(at, _, _)| at.wrapping_sub(published).wrapping_add(1 << 31));
    ring.fetched = fetched;
    ring.tail = fetched as u32;
    ring.returned = (fetched as u32).wrapping_sub(1);
    ring.published = published;
    ring.completion_tail = published;
    for (at, _, _) in &completing {
        let distance = at.wrapping_sub(published);
        if distance < 1 << 31 {
            // They follow one another, or the table is not ours.
            if *at != ring.completion_tail {
                return None;
            }
            ring.completion_tail = at.wrapping_add(1);
        }
    }
    ring.signalled = ring.completion_tail;
    ring.signal = true;
    // Nothing is known of the guest's head: it is read before anything is fetched.
    ring.completion_head = ring.completion_tail.wrapping_sub(setup.completion_entries);
    ring.owed = u32::try_from(unanswered.len()).ok()?;
    // Behind a completion with a record that is not published nothing was answered at once.
    let at_once = (ring.completion_tail == published).then_some(Recovering::AtOnce);
    let completing = completing
        .into_iter()
        .map(|(at, index, completion)| Recovering::Completing {
            index,
            at,
            completion,
        });
    ring.recovering = at_once.into_iter().chain(completing).chain(unanswered).collect();
    for (index, generation, flags) in told {
        let token = desk.token(n, index, generation);
        desk.tell(token, flags & FLAG_LOST == 0, Some((n, index, generation)));
    }
    Some(ring)
}

/// Brings what was left to its end, or to the hub.
pub(super) fn recover<W: Words, M: GuestMemory>(
    desk: &mut Desk<W>,
    ring: &mut Ring,
    n: usize,
    memory: &mut M,
) -> Result<(), Stop> {
    while let Some(record) = ring.recovering.pop_front() {
        if let Err(stop) = recover_one(desk, ring, n, memory, &record) {
            ring.recovering.push_front(record);
            return Err(stop);
        }
    }
    Ok(())
}

fn recover_one<W: Words, M: GuestMemory>(
    desk: &mut Desk<W>,
    ring: &mut Ring,
    n: usize,
    memory: &mut M,
    record: &Recovering,
) -> Result<(), Stop> {
    match record {
        Recovering::AtOnce => answered_at_once(desk, ring, n, memory),
        Recovering::Completing {
            index,
            at,
            completion,
        } => finish(desk, ring, n, memory, *index, *at, completion),
        Recovering::Fetched {
            index,
            submission,
            deadline,
            ..
        } => again(desk, ring, n, memory, *index, submission, *deadline),
        Recovering::Refused {
            index, answer, lost, ..
        } => {
            refused(desk, ring, n, *index, *answer, *lost);
            Ok(())
        }
    }
}

/// The life before may have answered the next submission at once and died before the cursor moved. Then the guest may have taken that
/// completion, and the place in its ring is not written again. Its phase says so: no completion with a record was ever written there.
fn answered_at_once<W: Words, M: GuestMemory>(
    desk: &mut Desk<W>,
    ring: &mut Ring,
    n: usize,
    memory: &mut M,
) -> Result<(), Stop> {
    let at = ring.completion_tail;
    let mut there = [0; 8];
    memory.read(complete::last_word_address(ring, at), &mut there)?;
    let phase_bit = u64::from_le_bytes(there) & PHASE != 0;
    if phase_bit == (phase(at, ring.setup.completion_entries) != 0) {
        ring.fetched = ring.fetched.wrapping_add(1);
        ring.tail = ring.head();
        ring.completion_tail = at.wrapping_add(1);
        ring.completion_head = ring.completion_head.wrapping_add(1);
        ring.published = ring.completion_tail;
        ring.save_cursor(&desk.table, n);
        complete::count(desk);
    }
    Ok(())
}

/// The slot in guest memory says whether the completion was published; the buffer is not touched.
fn finish<W: Words, M: GuestMemory>(
    desk: &mut Desk<W>,
    ring: &mut Ring,
    n: usize,
    memory: &mut M,
    index: u32,
    at: u32,
    completion: &Completion,
) -> Result<(), Stop> {
    if at.wrapping_sub(ring.published) >= 1 << 31 {
        complete::published(desk, ring, n, index);
        return Ok(());
    }
    complete::settled_first(ring.shared, memory)?;
    let mut there = [0; 8];
    memory.read(complete::last_word_address(ring, at), &mut there)?;
    if !carries(u64::from_le_bytes(there), completion) {
        complete::write_raw(ring, memory, at, completion)?;
    }
    complete::written(desk, ring, n, index, at);
    Ok(())
}

const PHASE: u64 = (completion_flag::PHASE as u64) << 48;

/// Whether a slot's last word is this completion's: by tag and phase, as the guest tells.
fn carries(there: u64, completion: &Completion) -> bool {
    const TAG_AND_PHASE: u64 = u32::MAX as u64 | PHASE;
    (there ^ complete::last_word(completion)) & TAG_AND_PHASE == 0
}

/// Gives a submission to the hub again (or answers it here again), under its old token.
fn again<W: Words, M: GuestMemory>(
    desk: &mut Desk<W>,
    ring: &mut Ring,
    n: usize,
    memory: &mut M,
    index: u32,
    submission: &Submission,
    deadline: Tick,
) -> Result<(), Stop> {
    let mut unreachable = false;
    if ring.preparing.is_none() {
        match judge(submission, ring.mode) {
            Ok(shape) => ring.preparing = Some(Preparing::new(*submission, shape)),
            Err(status) => {
                // Only a form that goes by messages was journaled.
                ring.queue(Due::new(index, Answer::failed(status), Vec::new(), false));
                return Ok(());
            }
        }
    }
    if let Some(preparing) = ring.preparing.as_mut() {
        match preparing.advance(memory) {
            Ok(()) => {}
            Err(Failure::Stop(stop)) => return Err(stop),
            Err(Failure::Status(_)) => unreachable = true,
        }
    }
    let Some(preparing) = ring.preparing.take() else {
        return Ok(());
    };
    let remapped = |(iova, bytes)| desk.is_remapped(memory, iova, bytes);
    unreachable = unreachable || preparing.named().any(remapped);
    let early = ring.slot_mut(index).and_then(|slot| slot.early.take());
    if unreachable && early.is_none() {
        // It was valid in the life before, so it may have been done; what it was can no longer be read, or lies in memory that is not the one it
        // was given. The hub forgets it when this answer is written down, not before: a life that finds the memory again would do it twice.
        let answer = Answer::failed(Status::OUTCOME_UNKNOWN);
        complete::note_refused(desk, ring, n, index, &answer, FLAG_LOST);
        refused(desk, ring, n, index, answer, true);
        return Ok(());
    }
    match early {
        None => hand_on(desk, ring, n, index, preparing, Ok(()), deadline, true),
        Some(mut due) => {
            if unreachable && !due.payload.is_empty() {
                complete::lose(desk, &mut due, Status::BAD_ADDRESS);
            }
            if let Some(slot) = ring.slot_mut(index) {
                slot.data_bytes = preparing.data_bytes();
                slot.segments = preparing.segments;
                slot.standing = Standing::Due;
                ring.entries_held += ring
                    .slots
                    .get(index as usize)
                    .map_or(0, |slot| slot.segments.held());
                ring.due.push_back(*due);
            }
        }
    }
    Ok(())
}

/// Answers what the rings refused, in this core life or in one before. `lost`: the hub is told to forget it, as often as there are lives.
fn refused<W: Words>(desk: &mut Desk<W>, ring: &mut Ring, n: usize, index: u32, answer: Answer, lost: bool) {
    if lost && let Some(slot) = ring.slot_mut(index) {
        slot.early = None;
        let generation = slot.generation;
        desk.outputs
            .push_back(Output::Void(desk.token(n, index, generation)));
    }
    let due = Due {
        lost,
        ..Due::new(index, answer, Vec::new(), lost)
    };
    ring.queue(due);
}
