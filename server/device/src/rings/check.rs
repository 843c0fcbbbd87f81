//! Whether this version understands an in-flight table, before it touches it.
//!
//! In: a table. Out: what is wrong with it, by name. Writes nothing.

use super::interface::AttachError;
use super::limits::RECORDS_MAX;
use super::table::{LAYOUT, LAYOUT_OLDEST, STATE_WORDS, Table};
use crate::page::Words;
use vmgmt_abi::registers::RINGS_MAX;

/// Features that this version understands in a table. None is there yet: all that version 1 writes, version 1 reads.
const FEATURES_KNOWN: [&str; 0] = [];

/// Looks at a session's whole in-flight table without writing: a core that could not adopt it says so before it takes over.
///
/// # Errors
/// See [`AttachError`].
pub fn check_state<W: Words>(state: W) -> Result<(), AttachError> {
    let table = Table::new(state);
    if table.len() < STATE_WORDS {
        return Err(AttachError::TooSmall {
            words: table.len(),
            needed: STATE_WORDS,
        });
    }
    if check_header(&table)? {
        return Ok(());
    }
    for ring in 0..RINGS_MAX {
        if table.ring_epoch(ring).is_none() {
            continue;
        }
        let used = table.used(ring).min(RECORDS_MAX);
        if (0..used).any(|index| table.record(ring, index).is_none()) {
            return Err(AttachError::Record { ring });
        }
    }
    Ok(())
}

/// Voids all that a table says is in flight, and of which generation it was: of a session whose device has failed for good. Generations
/// of tokens go on, so that none is given twice.
pub fn forget_state<W: Words + Clone>(state: &W) {
    Table::new(state.clone()).forget();
}

/// Whether the table is new; an error where this version does not understand it.
pub(super) fn check_header<W: Words>(table: &Table<W>) -> Result<bool, AttachError> {
    match table.layout() {
        0 => return Ok(true),
        LAYOUT_OLDEST..=LAYOUT => {}
        found => return Err(AttachError::Layout { found, known: LAYOUT }),
    }
    match table
        .features()
        .find(|name| !FEATURES_KNOWN.contains(&name.as_str()))
    {
        Some(name) => Err(AttachError::Feature(name)),
        None => Ok(false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::PlainWords;

    #[test]
    fn a_table_of_a_later_version_is_refused_by_name_and_nothing_is_written() {
        let words = PlainWords::new(STATE_WORDS);
        assert_eq!(check_state(words.clone()), Ok(()));
        assert_eq!(words.load(0), 0, "a new table stays new");
        let table = Table::new(words.clone());
        table.init();
        table.open_ring(2, 4);
        table.use_record(2, 0);
        assert_eq!(check_state(words.clone()), Ok(()));
        words.store(10, u64::from_le_bytes(*b"coalesce"));
        assert_eq!(
            check_state(words.clone()).unwrap_err().to_string(),
            "the in-flight table uses \"coalesce\", which this program does not know: upgrade to one that does"
        );
        words.store(10, 0);
        let generation = table.use_record(2, 1);
        forget_state(&words);
        assert_eq!((table.ring_epoch(2), table.generation()), (None, None));
        table.open_ring(2, 6);
        table.use_record(2, 0);
        assert!(table.use_record(2, 1) > generation, "no token twice");
        table.set_free(2, 0, 1);
        let record = 1024 + 16 * RECORDS_MAX as usize * 2;
        words.store(record, 7);
        assert_eq!(check_state(words.clone()), Err(AttachError::Record { ring: 2 }));
        words.store(0, LAYOUT + 1);
        assert_eq!(
            check_state(words),
            Err(AttachError::Layout {
                found: LAYOUT + 1,
                known: LAYOUT
            })
        );
        assert!(matches!(
            check_state(PlainWords::new(8)),
            Err(AttachError::TooSmall { .. })
        ));
    }
}
