//! OFFICE: a map from numbers that somebody counts up (VMs, sessions) to what they name.
//!
//! Small numbers are a place in a vector: a message takes some twenty look-ups of VMs and sessions, and a search in a tree of a thousand VMs
//! costs more than all the rest of it. Large ones are in a tree. Order is that of the numbers.

use std::collections::BTreeMap;

/// Numbers below this have a place of their own: at most 512 KiB of places.
const DIRECT_MAX: u64 = 1 << 16;

/// The map.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Table<V> {
    /// No `None` at the end.
    direct: Vec<Option<Box<V>>>,
    rest: BTreeMap<u64, V>,
    count: usize,
}

impl<V> Default for Table<V> {
    fn default() -> Self {
        Self {
            direct: Vec::new(),
            rest: BTreeMap::new(),
            count: 0,
        }
    }
}

/// The place of a small number.
fn place(number: u64) -> Option<usize> {
    if number < DIRECT_MAX {
        usize::try_from(number).ok()
    } else {
        None
    }
}

impl<V> Table<V> {
    #[must_use]
    pub fn get(&self, number: &u64) -> Option<&V> {
        match place(*number) {
            Some(place) => self.direct.get(place)?.as_deref(),
            None => self.rest.get(number),
        }
    }

    pub fn get_mut(&mut self, number: &u64) -> Option<&mut V> {
        match place(*number) {
            Some(place) => self.direct.get_mut(place)?.as_deref_mut(),
            None => self.rest.get_mut(number),
        }
    }

    #[must_use]
    pub fn contains_key(&self, number: &u64) -> bool {
        self.get(number).is_some()
    }

    /// Returns what was there.
    pub fn insert(&mut self, number: u64, value: V) -> Option<V> {
        let old = match place(number) {
            Some(place) => {
                if self.direct.len() <= place {
                    self.direct.resize_with(place + 1, || None);
                }
                let slot = self.direct.get_mut(place)?;
                slot.replace(Box::new(value)).map(|old| *old)
            }
            None => self.rest.insert(number, value),
        };
        self.count += usize::from(old.is_none());
        old
    }

    pub fn remove(&mut self, number: &u64) -> Option<V> {
        let old = match place(*number) {
            Some(place) => {
                let old = self.direct.get_mut(place)?.take().map(|old| *old);
                while self.direct.last().is_some_and(Option::is_none) {
                    self.direct.pop();
                }
                old
            }
            None => self.rest.remove(number),
        };
        self.count -= usize::from(old.is_some());
        old
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.count
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// From this number on, in order.
    pub fn from(&self, first: u64) -> impl Iterator<Item = (u64, &V)> {
        let start = usize::try_from(first.min(DIRECT_MAX)).unwrap_or(usize::MAX);
        let direct = self.direct.get(start..).unwrap_or(&[]).iter().zip(first..);
        let direct = direct.filter_map(|(value, number)| Some((number, value.as_deref()?)));
        direct.chain(self.rest.range(first..).map(|(number, value)| (*number, value)))
    }

    /// All, in order.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &V)> {
        self.from(0)
    }

    pub fn keys(&self) -> impl Iterator<Item = u64> {
        self.iter().map(|(number, _)| number)
    }

    pub fn values(&self) -> impl Iterator<Item = &V> {
        self.iter().map(|(_, value)| value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_is_a_map(steps in proptest::collection::vec((any::<bool>(), 0_u64..40, any::<u8>()), 0..200)) {
            let (mut table, mut map) = (Table::default(), BTreeMap::new());
            for (insert, number, value) in steps {
                // Half of them beyond the direct ones.
                let number = if number % 2 == 0 { number } else { DIRECT_MAX - 20 + number };
                if insert {
                    prop_assert_eq!(table.insert(number, value), map.insert(number, value));
                } else {
                    prop_assert_eq!(table.remove(&number), map.remove(&number));
                }
                prop_assert_eq!(table.get(&number), map.get(&number));
                prop_assert_eq!(table.len(), map.len());
                let wanted: Vec<_> = map.range(number..).map(|(number, value)| (*number, value)).collect();
                prop_assert_eq!(table.from(number).collect::<Vec<_>>(), wanted);
                prop_assert_eq!(table.keys().collect::<Vec<_>>(), map.keys().copied().collect::<Vec<_>>());
            }
        }
    }
}
