//! What must outlive a core life: a snapshot and the records of what changed since, in memory that the keeper holds.
//!
//! In: bytes of a snapshot, bytes of records, in order. Out: after a `kill -9` between any two instructions, the last snapshot and
//! all records whose append had returned (and never half of one). Must never know what the bytes mean.
//!
//! Layout, in words: 0 layout, 1 commit (number of the snapshot in force; its half is number % 2; 0: none), 2 bytes of a half.
//! Each half: 0 snapshot bytes, 1 crc32 of the snapshot, 2 journal tail in words, then the snapshot, then records: a word with
//! length and crc32, then the bytes. A record is there when the tail has passed it; the tail is stored after it, with release
//! order. A new snapshot is written into the other half whole, then the commit word moves.

use vmgmt_device::page::{LAYOUT, Words, is_readable};

/// A journal longer than this and four times its snapshot is worth a new snapshot.
const JOURNAL_BYTES_MIN: usize = 1 << 20;
/// One longer than this and its snapshot is worth a new snapshot while there is nothing else to do: after a death the next core reads all of it
/// before it serves anybody, about a millisecond for so much.
const JOURNAL_BYTES_IDLE: usize = 256 << 10;
const COMMIT: usize = 1;
const HALF_WORDS: usize = 2;
const HALVES: usize = 8;
const SNAPSHOT_BYTES: usize = 0;
const SNAPSHOT_CRC: usize = 1;
const TAIL: usize = 2;
const CONTENTS: usize = 4;

/// Why a state cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("the state memory has layout {found:#x}, this version reads {LAYOUT:#x}")]
    Layout { found: u64 },
    #[error("the state memory is too small: {words} words")]
    TooSmall { words: usize },
    #[error("{0} does not match its checksum")]
    Corrupt(&'static str),
    /// The record or snapshot does not fit: write a new snapshot, or (for a snapshot) more than the memory holds is to be kept.
    #[error("no room for {bytes} bytes")]
    Full { bytes: usize },
}

/// What an earlier core life left.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// `None`: nothing was ever written.
    pub snapshot: Option<Vec<u8>>,
    pub records: Vec<Vec<u8>>,
}

/// What the fill of the memory asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fill {
    /// A new snapshot pays: there are many records, or they take room that is needed.
    pub compact: bool,
    /// It pays where nobody waits for anything else.
    pub compact_idle: bool,
}

impl Fill {
    /// Of a memory with `room_bytes`, of which a snapshot and records take some.
    #[must_use]
    pub const fn of(room_bytes: usize, snapshot_bytes: usize, journal_bytes: usize) -> Self {
        let much = snapshot_bytes.saturating_add(journal_bytes) > room_bytes / 4 * 3;
        let long = if snapshot_bytes * 4 > JOURNAL_BYTES_MIN {
            journal_bytes > snapshot_bytes * 4
        } else {
            journal_bytes > JOURNAL_BYTES_MIN
        };
        let compact = long || (much && journal_bytes > room_bytes / 16);
        Self {
            compact,
            compact_idle: journal_bytes > JOURNAL_BYTES_IDLE && journal_bytes > snapshot_bytes,
        }
    }
}

/// The writer.
#[derive(Debug)]
pub struct Journal<W: Words> {
    words: W,
    half_words: usize,
}

impl<W: Words> Journal<W> {
    /// Opens the memory: formats it when it is all new.
    ///
    /// # Errors
    /// Layout, or TooSmall.
    pub fn open(words: W) -> Result<Self, JournalError> {
        let half_words = words.len().saturating_sub(HALVES) / 2;
        if half_words <= CONTENTS {
            return Err(JournalError::TooSmall { words: words.len() });
        }
        match words.load(0) {
            0 => {
                words.store(HALF_WORDS, half_words as u64);
                words.store(0, LAYOUT);
            }
            layout if is_readable(layout) && words.load(HALF_WORDS) == half_words as u64 => {}
            found => return Err(JournalError::Layout { found }),
        }
        Ok(Self { words, half_words })
    }

    /// What is there.
    ///
    /// # Errors
    /// Corrupt: somebody else wrote into it.
    pub fn recover(&self) -> Result<Recovered, JournalError> {
        let Some(half) = self.half_in_force() else {
            return Ok(Recovered::default());
        };
        let bytes = self.words.load(half + SNAPSHOT_BYTES) as usize;
        if bytes.div_ceil(8) + CONTENTS > self.half_words {
            return Err(JournalError::Corrupt("the length of a snapshot"));
        }
        let mut snapshot = vec![0; bytes];
        self.words.read_bytes(half + CONTENTS, &mut snapshot);
        if u64::from(crc32fast::hash(&snapshot)) != self.words.load(half + SNAPSHOT_CRC) {
            return Err(JournalError::Corrupt("a snapshot"));
        }
        let tail = self.words.load(half + TAIL) as usize;
        let mut position = CONTENTS + bytes.div_ceil(8);
        if tail < position || tail > self.half_words {
            return Err(JournalError::Corrupt("the tail of the journal"));
        }
        let mut records = Vec::new();
        while position < tail {
            let head = self.words.load(half + position);
            let (bytes, crc) = ((head & 0xffff_ffff) as usize, (head >> 32) as u32);
            if position + 1 + bytes.div_ceil(8) > tail {
                return Err(JournalError::Corrupt("the length of a record"));
            }
            let mut record = vec![0; bytes];
            self.words.read_bytes(half + position + 1, &mut record);
            if crc32fast::hash(&record) != crc {
                return Err(JournalError::Corrupt("a record"));
            }
            records.push(record);
            position += 1 + bytes.div_ceil(8);
        }
        Ok(Recovered {
            snapshot: Some(snapshot),
            records,
        })
    }

    /// Appends a record. When it returns, the record is there for whoever comes after.
    ///
    /// # Errors
    /// Full: take a snapshot first. (Also when there is no snapshot yet.)
    pub fn append(&mut self, record: &[u8]) -> Result<(), JournalError> {
        let full = JournalError::Full { bytes: record.len() };
        let Some(half) = self.half_in_force() else {
            return Err(full);
        };
        let tail = (self.words.load(half + TAIL) as usize).min(self.half_words);
        let next = tail + 1 + record.len().div_ceil(8);
        if next > self.half_words || record.len() > u32::MAX as usize {
            return Err(full);
        }
        let head = record.len() as u64 | (u64::from(crc32fast::hash(record)) << 32);
        self.words.store(half + tail, head);
        self.words.write_bytes(half + tail + 1, record);
        self.words.store(half + TAIL, next as u64);
        Ok(())
    }

    /// Puts a new snapshot in force; the records before it are no longer needed.
    ///
    /// # Errors
    /// Full: the state in force stays as it is.
    pub fn snapshot(&mut self, snapshot: &[u8]) -> Result<(), JournalError> {
        if CONTENTS + snapshot.len().div_ceil(8) > self.half_words {
            return Err(JournalError::Full {
                bytes: snapshot.len(),
            });
        }
        // Never 0, and never the half that is in force, whatever the word was.
        let number = match self.words.load(COMMIT).wrapping_add(1) {
            0 => 2,
            number => number,
        };
        let half = self.half(number);
        self.words.store(half + SNAPSHOT_BYTES, snapshot.len() as u64);
        self.words
            .store(half + SNAPSHOT_CRC, u64::from(crc32fast::hash(snapshot)));
        self.words.write_bytes(half + CONTENTS, snapshot);
        self.words
            .store(half + TAIL, (CONTENTS + snapshot.len().div_ceil(8)) as u64);
        self.words.store(COMMIT, number);
        Ok(())
    }

    /// Bytes of records since the snapshot: when it is much more than the snapshot, a new one pays.
    #[must_use]
    pub fn journal_bytes(&self) -> usize {
        self.half_in_force().map_or(0, |half| {
            let begin = CONTENTS + (self.words.load(half + SNAPSHOT_BYTES) as usize).div_ceil(8);
            let words = (self.words.load(half + TAIL) as usize).saturating_sub(begin);
            // More than there is: somebody else wrote into it, and `recover` says so.
            words.min(self.half_words) * 8
        })
    }

    /// Bytes that a snapshot and its records may have together.
    #[must_use]
    pub const fn room_bytes(&self) -> usize {
        (self.half_words - CONTENTS) * 8
    }

    fn half_in_force(&self) -> Option<usize> {
        match self.words.load(COMMIT) {
            0 => None,
            number => Some(self.half(number)),
        }
    }

    const fn half(&self, number: u64) -> usize {
        HALVES + (number % 2) as usize * self.half_words
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use vmgmt_device::page::PlainWords;

    /// Words whose writer dies after so many stores.
    #[derive(Clone)]
    struct Mortal(PlainWords, Arc<AtomicU64>);

    impl Words for Mortal {
        fn len(&self) -> usize {
            self.0.len()
        }
        fn load(&self, index: usize) -> u64 {
            self.0.load(index)
        }
        fn store(&self, index: usize, value: u64) {
            let lives = self
                .1
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
            if lives.is_ok() {
                self.0.store(index, value);
            }
        }
    }

    #[derive(Debug, Clone)]
    enum Step {
        Append(Vec<u8>),
        Snapshot(Vec<u8>),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let bytes = || proptest::collection::vec(any::<u8>(), 0..40);
        proptest::collection::vec(
            prop_oneof![3 => bytes().prop_map(Step::Append), 1 => bytes().prop_map(Step::Snapshot)],
            1..20,
        )
    }

    proptest! {
        #[test]
        fn a_death_between_any_two_stores_leaves_a_state_that_was(steps in steps(), lives in 0u64..300) {
            let plain = PlainWords::new(600);
            let left = Arc::new(AtomicU64::new(u64::MAX));
            let mut journal = Journal::open(Mortal(plain.clone(), Arc::clone(&left))).unwrap();
            journal.snapshot(b"first").unwrap();
            left.store(lives, Ordering::Relaxed);
            let mut states = vec![Recovered { snapshot: Some(b"first".to_vec()), records: vec![] }];
            let mut promised = 0;
            for step in steps {
                let mut state = Recovered { snapshot: states.last().unwrap().snapshot.clone(), records: states.last().unwrap().records.clone() };
                let done = match step {
                    Step::Append(record) => {
                        state.records.push(record.clone());
                        journal.append(&record)
                    }
                    Step::Snapshot(snapshot) => {
                        state = Recovered { snapshot: Some(snapshot.clone()), records: vec![] };
                        journal.snapshot(&snapshot)
                    }
                };
                if done.is_err() {
                    continue;
                }
                states.push(state);
                if left.load(Ordering::Relaxed) > 0 {
                    promised = states.len() - 1;
                }
            }
            let recovered = Journal::open(plain).unwrap().recover().unwrap();
            let found = states.iter().rposition(|state| *state == recovered);
            prop_assert!(found.is_some_and(|found| found >= promised), "{recovered:?} is not a state from {promised} on of {states:?}");
        }
    }

    #[test]
    fn a_full_journal_says_so_and_keeps_what_it_has() {
        let mut journal = Journal::open(PlainWords::new(8 + 2 * 12)).unwrap();
        assert!(matches!(journal.append(b"x"), Err(JournalError::Full { .. })));
        journal.snapshot(b"0123456789").unwrap();
        journal.append(&[7; 32]).unwrap();
        assert!(matches!(journal.append(b"x"), Err(JournalError::Full { .. })));
        assert!(matches!(
            journal.snapshot(&[0; 100]),
            Err(JournalError::Full { .. })
        ));
        assert_eq!(journal.journal_bytes(), 40);
        let expected = Recovered {
            snapshot: Some(b"0123456789".to_vec()),
            records: vec![vec![7; 32]],
        };
        assert_eq!(journal.recover().unwrap(), expected);
    }

    #[test]
    fn a_memory_that_fills_is_compacted() {
        const ROOM: usize = 128 << 20;
        let of = |snapshot: usize, journal: usize| Fill::of(ROOM, snapshot << 20, journal << 20).compact;
        assert!(!of(0, 1) && of(0, 2), "more than a little");
        assert!(!of(30, 60) && of(10, 60), "four times the snapshot");
        assert!(of(60, 40), "room is needed");
        assert!(
            !of(92, 3) && !of(92, 5) && !of(100, 0),
            "it would free too little"
        );
        let idle =
            |snapshot: usize, journal: usize| Fill::of(ROOM, snapshot << 10, journal << 10).compact_idle;
        assert!(!idle(0, 256) && idle(0, 257) && idle(256, 257), "a little");
        assert!(
            !idle(5000, 5000) && idle(5000, 5001),
            "as much as would be written"
        );
    }

    #[test]
    fn foreign_writes_are_noticed() {
        let words = PlainWords::new(600);
        let mut journal = Journal::open(words.clone()).unwrap();
        journal.snapshot(b"snapshot").unwrap();
        journal.append(b"record").unwrap();
        for index in 0..600 {
            let before = words.load(index);
            for value in [u64::MAX, 1 << 40, before ^ 1] {
                words.store(index, value);
                // Anything but a panic; what is outside the half in force does not matter.
                let _ =
                    Journal::open(words.clone()).map(|journal| (journal.recover(), journal.journal_bytes()));
            }
            words.store(index, before);
        }
        assert!(journal.recover().is_ok());
    }
}
