//! Idempotency keys of a source's last sends, and what these were answered.
//!
//! They are most of a busy hub's state, and a core that takes over needs next to none of them: so the saved form is the one they are kept
//! in, and what finds a key quickly is made when a key is first looked for, or many come in.

use crate::limits::KEYS_PER_SOURCE_MAX;
use std::cell::OnceCell;
use std::collections::{BTreeMap, VecDeque};

/// As asked, key, result; the oldest first.
type Entry = (u64, u64, u64);

/// So often all entries may be gone through before an index, which takes as long as that, is made.
const SEARCHES_MAX: u32 = 64;

/// The last [`KEYS_PER_SOURCE_MAX`] of them.
#[derive(Clone, Debug, Default)]
pub(super) struct KeyWindow {
    entries: VecDeque<Entry>,
    /// Derived.
    results: OnceCell<BTreeMap<(u64, u64), u64>>,
    /// How often all entries were gone through for want of that.
    searches: u32,
}

impl KeyWindow {
    /// What the send with that key was answered.
    pub(super) fn result(&self, asked: u64, key: u64) -> Option<u64> {
        self.indexed().get(&(asked, key)).copied()
    }

    fn indexed(&self) -> &BTreeMap<(u64, u64), u64> {
        let indexed = |(asked, key, result): &Entry| ((*asked, *key), *result);
        self.results
            .get_or_init(|| self.entries.iter().map(indexed).collect())
    }

    /// A send was answered.
    pub(super) fn insert(&mut self, asked: u64, key: u64, result: u64) {
        // The few records of a core that died are not worth an index; those of one that had no time for a snapshot are.
        if self.results.get().is_none() {
            self.searches += 1;
            if self.searches > SEARCHES_MAX {
                self.indexed();
            }
        }
        // Where there is an index, it tells most that they are new.
        let may_be_known = self
            .results
            .get_mut()
            .is_none_or(|results| results.insert((asked, key), result).is_some());
        if may_be_known && let Some(entry) = self.find(asked, key) {
            entry.2 = result;
            return;
        }
        self.entries.push_back((asked, key, result));
        if self.entries.len() > KEYS_PER_SOURCE_MAX {
            let oldest = self.entries.pop_front();
            if let (Some((asked, key, _)), Some(results)) = (oldest, self.results.get_mut()) {
                results.remove(&(asked, key));
            }
        }
    }

    /// Step by step: good enough for a key that comes twice, and for a few records of a core that died.
    fn find(&mut self, asked: u64, key: u64) -> Option<&mut Entry> {
        let same = |entry: &&mut Entry| (entry.0, entry.1) == (asked, key);
        self.entries.iter_mut().find(same)
    }

    /// What they take at most when they are saved.
    pub(super) fn bytes(&self) -> u64 {
        self.entries.len() as u64 * super::books::KEY_BYTES
    }

    /// As it is saved.
    pub(super) fn save(&self) -> Vec<Entry> {
        self.entries.iter().copied().collect()
    }

    /// From what was saved; of more than are kept the oldest go.
    pub(super) fn restore(saved: Vec<Entry>) -> Self {
        let mut entries = VecDeque::from(saved);
        let surplus = entries.len().saturating_sub(KEYS_PER_SOURCE_MAX);
        entries.drain(..surplus);
        Self {
            entries,
            results: OnceCell::new(),
            searches: 0,
        }
    }
}

impl PartialEq for KeyWindow {
    fn eq(&self, other: &Self) -> bool {
        self.entries == other.entries
    }
}

impl Eq for KeyWindow {}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What it is to be: everything in order, and the last word counts.
    fn insert(model: &mut Vec<Entry>, asked: u64, key: u64, result: u64) {
        match model.iter_mut().find(|entry| (entry.0, entry.1) == (asked, key)) {
            Some(entry) => entry.2 = result,
            None => model.push((asked, key, result)),
        }
        if model.len() > KEYS_PER_SOURCE_MAX {
            model.remove(0);
        }
    }

    proptest! {
        #[test]
        fn it_is_the_same_whether_and_whenever_it_is_saved_and_looked_at(
            steps in prop::collection::vec((0..3_u64, 0..1500_u64, 0..9_u64, 0..40_u32), 0..3000),
        ) {
            let (mut keys, mut model) = (KeyWindow::default(), Vec::new());
            for (asked, key, result, what) in steps {
                keys.insert(asked, key, result);
                insert(&mut model, asked, key, result);
                match what {
                    0 => keys = KeyWindow::restore(keys.save()),
                    1 => {
                        let expected = model.iter().find(|entry| (entry.0, entry.1) == (asked, key / 2));
                        prop_assert_eq!(keys.result(asked, key / 2), expected.map(|entry| entry.2));
                    }
                    _ => {}
                }
            }
            prop_assert_eq!(keys.save(), model);
        }
    }

    #[test]
    fn a_few_keys_are_searched_for_and_of_many_an_index_is_made() {
        let saved = (0..KEYS_PER_SOURCE_MAX as u64).map(|key| (1, key, 2)).collect();
        let mut keys = KeyWindow::restore(saved);
        for key in 0..u64::from(SEARCHES_MAX) {
            keys.insert(1, key, 3);
        }
        assert!(keys.results.get().is_none());
        keys.insert(1, 5000, 4);
        assert_eq!(keys.results.get().unwrap().len(), KEYS_PER_SOURCE_MAX);
        assert_eq!((keys.result(1, 0), keys.result(1, 1)), (None, Some(3)));
        assert_eq!(keys.result(1, 5000), Some(4));
    }

    #[test]
    fn of_more_than_are_kept_the_oldest_go() {
        let saved = |count: usize| (0..count as u64).map(|key| (1, key, 2)).collect::<Vec<_>>();
        let keys = KeyWindow::restore(saved(KEYS_PER_SOURCE_MAX + 1));
        assert_eq!(keys.save(), saved(KEYS_PER_SOURCE_MAX + 1)[1..]);
        assert_eq!((keys.result(1, 0), keys.result(1, 1)), (None, Some(2)));
    }
}
