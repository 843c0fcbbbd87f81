//! The in-flight table: what must survive the core, as fixed records in shared words (the session's state memory).
//!
//! In: facts about submissions, each written before its effect. Out: the same facts for the next core life. Knows nothing of guest memory.
//!
//! Records in place instead of a log: the set of what is in flight is bounded, each record has one life cycle, and reading the table
//! *is* the recovery, with nothing to replay or to compact (vhost-user keeps its in-flight memory the same way). Every record is
//! written first and its state word last (release), so that a kill between any two stores leaves the old state or the new one.
//!
//! | words | meaning |
//! |---|---|
//! | 0 | layout version |
//! | 1 | generation of the device that the table speaks of, plus one |
//! | 2 | core life that wrote it last |
//! | 3, 4 | failed: generation + 1 in which the device failed (0: not), and the cause |
//! | 5 | sequence of the host's page (even) |
//! | 6 | generation of the next port token |
//! | 7 | highest number of the VM's maps that was seen, plus one (0: not known) |
//! | 8..12 | names of the features in use that an older version would not understand, at most 8 ASCII letters each (0: none) |
//! | 16 + 8 n | ring n: `1 << 32 \| epoch` when open; cursor: submissions fetched << 12 \| those of them not published; records ever used |
//! | 160.. | port: state, sequence, bytes of the result, mode, result |
//! | 1024 + 16 (1024 n + i) | record i of ring n |
//!
//! Record: state (kind in bits 0..8, flags in 8..16, token generation in 32..64); number of the submission (64 bits, so that one that
//! waits for years is not taken for a young one); deadline; completion index; the submission (64 bytes); the completion (32 bytes; of a
//! fetched one it means something only with the flag for that).

use super::limits::{PORT_RESULT_BYTES_MAX, RECORDS_MAX};
use crate::page::Words;
use vmgmt_abi::registers::RINGS_MAX;
use vmgmt_abi::{Completion, Status, Submission};
use zerocopy::{FromZeros, IntoBytes};

/// Whether the table is only pretended to be kept. For one measurement: what it costs to keep it.
const FORGETFUL: bool = cfg!(feature = "without-crash-consistency");

/// Layout version of the table, first word.
pub const LAYOUT: u64 = 0x564d_4752_0000_0001;
/// The oldest that this version reads: its own, and the one before where there is one. A table keeps the layout that it was made with.
pub const LAYOUT_OLDEST: u64 = LAYOUT;

const GENERATION: usize = 1;
const LIFE: usize = 2;
const FAILED: usize = 3;
const CAUSE: usize = 4;
const HOST_PAGE: usize = 5;
const PORT_TOKEN: usize = 6;
const MAPS_SEEN: usize = 7;
const FEATURES: usize = 8;
const FEATURES_MAX: usize = 4;
const RINGS: usize = 16;
const RING_WORDS: usize = 8;
const PORT: usize = 160;
const PORT_RESULT: usize = PORT + 4;
/// Room for [`RECORDS_MAX`] outstanding submissions beside 52 bits of their number: 14 years at one each 100 ns.
const OUTSTANDING_BITS: u32 = 12;
const OUTSTANDING_MASK: u64 = (1 << OUTSTANDING_BITS) - 1;
const RECORDS: usize = 1024;
const RECORD_WORDS: usize = 16;
const SUBMISSION: usize = 4;
const COMPLETION: usize = 12;

const _: () = assert!((RECORDS_MAX as u64) < OUTSTANDING_MASK);
const _: () = assert!(RINGS + RING_WORDS * RINGS_MAX <= PORT);
const _: () = assert!(PORT_RESULT + PORT_RESULT_BYTES_MAX.div_ceil(8) <= RECORDS);

/// Words of a session's in-flight table.
pub const STATE_WORDS: usize = RECORDS + RECORD_WORDS * RECORDS_MAX as usize * RINGS_MAX;
/// Bytes of a session's in-flight table (sparse: a page is touched when its records are first used).
pub const STATE_BYTES: usize = STATE_WORDS * 8;

/// What a record says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Free,
    /// Fetched; its answer is not known.
    Fetched,
    /// Its payload is in the buffer and its completion is being written; the buffer is not touched again.
    Completing,
    /// Published, and the hub has still to hear of it.
    Published,
}

/// The answer asked for a confirmation.
pub const FLAG_CONFIRM: u8 = 1 << 0;
/// The payload could not be written, or (of a refused submission) an earlier core life may have done it: the hub is to forget it.
pub const FLAG_LOST: u8 = 1 << 1;
/// Of a fetched submission: the rings answer it themselves, by the completion in the record (all but its phase).
pub const FLAG_REFUSED: u8 = 1 << 2;

/// A record as read back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Record {
    pub kind: Kind,
    pub flags: u8,
    pub generation: u32,
    /// Submissions of the ring fetched before it, in this epoch; its low half is the ring's index.
    pub number: u64,
    pub completion_index: u32,
    pub deadline: u64,
    pub submission: Submission,
    pub completion: Completion,
}

/// State of the port window's record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PortRecord {
    pub kind: Kind,
    pub flags: u8,
    pub generation: u32,
    pub sequence: u64,
    pub mode: u32,
}

/// View of the table.
#[derive(Clone, Debug)]
pub struct Table<W: Words> {
    words: W,
}

const fn state_word(kind: Kind, flags: u8, generation: u32) -> u64 {
    let kind = match kind {
        Kind::Free => 0,
        Kind::Fetched => 1,
        Kind::Completing => 2,
        Kind::Published => 3,
    };
    kind | (flags as u64) << 8 | (generation as u64) << 32
}

const fn kind_of(word: u64) -> Option<Kind> {
    match word & 0xff {
        0 => Some(Kind::Free),
        1 => Some(Kind::Fetched),
        2 => Some(Kind::Completing),
        3 => Some(Kind::Published),
        _ => None,
    }
}

const fn pair(low: u32, high: u32) -> u64 {
    low as u64 | (high as u64) << 32
}

const fn ring_at(n: usize) -> usize {
    RINGS + RING_WORDS * n
}

const fn record_at(n: usize, index: u32) -> usize {
    RECORDS + RECORD_WORDS * (RECORDS_MAX as usize * n + index as usize)
}

impl<W: Words> Table<W> {
    pub const fn new(words: W) -> Self {
        Self { words }
    }
    pub fn len(&self) -> usize {
        self.words.len()
    }
    /// 0: never used.
    pub fn layout(&self) -> u64 {
        self.words.load(0)
    }
    /// Makes a fresh (zeroed) table one of this layout.
    pub fn init(&self) {
        self.words.store(0, LAYOUT);
    }
    /// Nothing is in flight and no generation is known.
    pub fn forget(&self) {
        self.words.store(GENERATION, 0);
        self.words.store(FAILED, 0);
        (RINGS..RINGS + RING_WORDS * RINGS_MAX).for_each(|index| self.words.store(index, 0));
        self.set_port_free();
    }
    /// Names of the features in use.
    pub fn features(&self) -> impl Iterator<Item = String> + '_ {
        (FEATURES..FEATURES + FEATURES_MAX)
            .map(|index| self.words.load(index))
            .filter(|word| *word != 0)
            .map(|word| {
                let bytes = word.to_le_bytes();
                let name = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
                String::from_utf8_lossy(name).into_owned()
            })
    }
    /// The device's generation, `None` when none was written yet.
    pub fn generation(&self) -> Option<u64> {
        self.words.load(GENERATION).checked_sub(1)
    }
    pub fn set_generation(&self, generation: u64) {
        self.words.store(GENERATION, generation.wrapping_add(1));
    }
    #[cfg(test)]
    pub fn life(&self) -> u64 {
        self.words.load(LIFE)
    }
    pub fn set_life(&self, life: u64) {
        self.words.store(LIFE, life);
    }
    /// Why the device failed in `generation`, if it did.
    pub fn failed(&self, generation: u64) -> Option<Status> {
        (self.words.load(FAILED) == generation.wrapping_add(1)).then(|| Status(self.words.load(CAUSE) as u16))
    }
    pub fn set_failed(&self, generation: u64, cause: Status) {
        self.words.store(CAUSE, u64::from(cause.0));
        self.words.store(FAILED, generation.wrapping_add(1));
    }
    /// Moves the sequence of the host's page on to the next even number and gives it.
    pub fn next_host_page_sequence(&self) -> u64 {
        let next = (self.words.load(HOST_PAGE) & !1).wrapping_add(2);
        self.words.store(HOST_PAGE, next);
        next
    }

    /// Highest number of a map that an earlier core life had seen; `None`: not known.
    pub fn maps_seen(&self) -> Option<u64> {
        self.words.load(MAPS_SEEN).checked_sub(1)
    }
    pub fn set_maps_seen(&self, number: u64) {
        self.words.store(MAPS_SEEN, number.wrapping_add(1));
    }

    /// Epoch of ring `n` when the table holds it as open.
    pub fn ring_epoch(&self, n: usize) -> Option<u32> {
        let word = self.words.load(ring_at(n));
        (word >> 32 == 1).then_some(word as u32)
    }
    /// Ring `n` begins under `epoch` with nothing in flight.
    pub fn open_ring(&self, n: usize, epoch: u32) {
        self.words.store(ring_at(n), 0);
        self.words.store(ring_at(n) + 1, 0);
        self.words.store(ring_at(n) + 2, 0);
        self.words.store(ring_at(n), pair(epoch, 1));
    }
    pub fn close_ring(&self, n: usize) {
        self.words.store(ring_at(n), 0);
    }
    /// Submissions fetched, and how many completions are published.
    pub fn cursor(&self, n: usize) -> (u64, u32) {
        let word = self.words.load(ring_at(n) + 1);
        let fetched = word >> OUTSTANDING_BITS;
        (fetched, fetched.wrapping_sub(word & OUTSTANDING_MASK) as u32)
    }
    /// Moves both in one store: `fetched` submissions were fetched, all completions before index `published` are published (never
    /// more than were fetched, and never more than the table's records fewer).
    #[inline]
    pub fn set_cursor(&self, n: usize, fetched: u64, published: u32) {
        if FORGETFUL {
            return;
        }
        let outstanding = u64::from((fetched as u32).wrapping_sub(published)) & OUTSTANDING_MASK;
        self.words
            .store(ring_at(n) + 1, fetched << OUTSTANDING_BITS | outstanding);
    }
    /// Records used in this epoch: those behind it mean nothing.
    pub fn used(&self, n: usize) -> u32 {
        self.words.load(ring_at(n) + 2).min(u64::from(RECORDS_MAX)) as u32
    }
    /// Takes record `index` (the next one never used in this epoch) into use and gives its token generation, another than any before.
    pub fn use_record(&self, n: usize, index: u32) -> u32 {
        let at = record_at(n, index);
        let generation = ((self.words.load(at) >> 32) as u32).wrapping_add(1);
        self.words.store(at, state_word(Kind::Free, 0, generation));
        self.words.store(ring_at(n) + 2, u64::from(index) + 1);
        generation
    }

    /// `None`: no state that this version writes.
    pub fn record(&self, n: usize, index: u32) -> Option<Record> {
        let at = record_at(n, index);
        let state = self.words.load(at);
        let mut submission = Submission::new_zeroed();
        self.words.read_bytes(at + SUBMISSION, submission.as_mut_bytes());
        let mut completion = Completion::new_zeroed();
        self.words.read_bytes(at + COMPLETION, completion.as_mut_bytes());
        Some(Record {
            kind: kind_of(state)?,
            flags: (state >> 8) as u8,
            generation: (state >> 32) as u32,
            number: self.words.load(at + 1),
            completion_index: self.words.load(at + 3) as u32,
            deadline: self.words.load(at + 2),
            submission,
            completion,
        })
    }
    pub fn set_fetched(
        &self,
        n: usize,
        index: u32,
        generation: u32,
        number: u64,
        deadline: u64,
        submission: &Submission,
    ) {
        if FORGETFUL {
            return;
        }
        let at = record_at(n, index);
        self.words.store(at + 1, number);
        self.words.store(at + 2, deadline);
        self.words.write_bytes(at + SUBMISSION, submission.as_bytes());
        self.words.store(at, state_word(Kind::Fetched, 0, generation));
    }
    /// The answer of a fetched submission that the rings refuse is sure from now on: what is found in guest memory later changes nothing.
    pub fn set_refused(&self, n: usize, index: u32, generation: u32, flags: u8, completion: &Completion) {
        if FORGETFUL {
            return;
        }
        let at = record_at(n, index);
        self.words.write_bytes(at + COMPLETION, completion.as_bytes());
        self.words
            .store(at, state_word(Kind::Fetched, flags | FLAG_REFUSED, generation));
    }
    pub fn set_completing(
        &self,
        n: usize,
        index: u32,
        generation: u32,
        flags: u8,
        completion_index: u32,
        completion: &Completion,
    ) {
        if FORGETFUL {
            return;
        }
        let at = record_at(n, index);
        self.words.write_bytes(at + COMPLETION, completion.as_bytes());
        self.words.store(at + 3, u64::from(completion_index));
        self.words
            .store(at, state_word(Kind::Completing, flags, generation));
    }
    pub fn set_published(&self, n: usize, index: u32, generation: u32, flags: u8) {
        if FORGETFUL {
            return;
        }
        self.words.store(
            record_at(n, index),
            state_word(Kind::Published, flags, generation),
        );
    }
    /// Frees a record; `generation` is its next user's.
    pub fn set_free(&self, n: usize, index: u32, generation: u32) {
        if FORGETFUL {
            return;
        }
        self.words
            .store(record_at(n, index), state_word(Kind::Free, 0, generation));
    }

    pub fn port(&self) -> Option<PortRecord> {
        let state = self.words.load(PORT);
        Some(PortRecord {
            kind: kind_of(state)?,
            flags: (state >> 8) as u8,
            generation: (state >> 32) as u32,
            sequence: self.words.load(PORT + 1),
            mode: self.words.load(PORT + 3) as u32,
        })
    }
    /// A generation for a port token that none had before.
    pub fn next_port_generation(&self) -> u32 {
        let next = (self.words.load(PORT_TOKEN) as u32).wrapping_add(1);
        self.words.store(PORT_TOKEN, u64::from(next));
        next
    }
    pub fn set_port_fetched(&self, sequence: u64, mode: u32, generation: u32) {
        self.words.store(PORT, state_word(Kind::Free, 0, 0));
        self.words.store(PORT + 1, sequence);
        self.words.store(PORT + 3, u64::from(mode));
        self.words.store(PORT, state_word(Kind::Fetched, 0, generation));
    }
    pub fn set_port_completing(&self, generation: u32, flags: u8, result: &[u8]) {
        let result = result.get(..PORT_RESULT_BYTES_MAX).unwrap_or(result);
        self.words.write_bytes(PORT_RESULT, result);
        self.words.store(PORT + 2, result.len() as u64);
        self.words
            .store(PORT, state_word(Kind::Completing, flags, generation));
    }
    pub fn port_result(&self) -> Vec<u8> {
        let mut result = vec![0; (self.words.load(PORT + 2) as usize).min(PORT_RESULT_BYTES_MAX)];
        self.words.read_bytes(PORT_RESULT, &mut result);
        result
    }
    pub fn set_port_free(&self) {
        self.words.store(PORT, state_word(Kind::Free, 0, 0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::PlainWords;

    #[test]
    fn records_are_read_back_and_generations_move() {
        let table = Table::new(PlainWords::new(STATE_WORDS));
        assert_eq!(
            (table.layout(), table.generation(), table.ring_epoch(3)),
            (0, None, None)
        );
        table.init();
        table.set_generation(0);
        table.set_life(4);
        assert_eq!((table.generation(), table.life()), (Some(0), 4));
        table.open_ring(15, 8);
        let generation = table.use_record(15, 0);
        assert_eq!((table.ring_epoch(15), table.used(15)), (Some(8), 1));
        let submission = Submission {
            tag: 7,
            argument: 9,
            ..Submission::default()
        };
        table.set_fetched(15, 0, generation, 11, 12, &submission);
        let completion = Completion {
            tag: 7,
            result: 3,
            ..Completion::default()
        };
        table.set_completing(15, 0, generation, FLAG_CONFIRM, 13, &completion);
        let record = table.record(15, 0).unwrap();
        assert_eq!(
            (record.kind, record.flags, record.number, record.completion_index),
            (Kind::Completing, FLAG_CONFIRM, 11, 13)
        );
        assert_eq!(
            (record.submission, record.completion, record.deadline),
            (submission, completion, 12)
        );
        table.open_ring(15, 10);
        assert_eq!(table.used(15), 0);
        table.set_cursor(15, (7 << 32) + 5, u32::MAX);
        assert_eq!(table.cursor(15), ((7 << 32) + 5, u32::MAX));
        assert_ne!(table.use_record(15, 0), generation);
        assert_eq!(table.record(15, 0).unwrap().kind, Kind::Free);
    }

    #[test]
    fn the_last_record_fits() {
        let table = Table::new(PlainWords::new(STATE_WORDS));
        table.set_free(RINGS_MAX - 1, RECORDS_MAX - 1, 5);
        assert_eq!(
            table.record(RINGS_MAX - 1, RECORDS_MAX - 1).unwrap().generation,
            5
        );
        assert_eq!(
            STATE_WORDS,
            record_at(RINGS_MAX - 1, RECORDS_MAX - 1) + RECORD_WORDS
        );
    }
}
