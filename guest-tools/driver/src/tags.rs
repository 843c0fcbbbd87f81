//! Tags of submissions in flight: a slot number with a counter, so that a completion for one that is over is recognised.
//!
//! Comes in: what belongs to a submission. Goes out: its tag; and for a tag from the device either that very thing or nothing.

/// Names a submission in flight on one channel.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Tag(pub u32);

#[derive(Debug)]
struct Slot<T> {
    counter: u16,
    entry: Option<T>,
}

/// A table of at most 65,536 entries.
#[derive(Debug)]
pub struct TagTable<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u16>,
    capacity: usize,
}

impl<T> TagTable<T> {
    /// A table for `capacity` submissions in flight.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            capacity: capacity.min(1 << 16),
        }
    }

    /// Submissions in flight.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// None in flight.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Most in flight.
    #[must_use]
    pub const fn capacity(&self) -> usize {
        self.capacity
    }

    /// Keeps an entry; gives it back when the table is full.
    ///
    /// # Errors
    /// The entry, when there is no room.
    pub fn insert(&mut self, entry: T) -> Result<Tag, T> {
        if let Some(index) = self.free.pop()
            && let Some(slot) = self.slots.get_mut(usize::from(index))
        {
            slot.counter = slot.counter.wrapping_add(1);
            slot.entry = Some(entry);
            return Ok(Tag(u32::from(slot.counter) << 16 | u32::from(index)));
        }
        match u16::try_from(self.slots.len()) {
            Ok(index) if self.slots.len() < self.capacity => {
                self.slots.push(Slot {
                    counter: 0,
                    entry: Some(entry),
                });
                Ok(Tag(u32::from(index)))
            }
            _ => Err(entry),
        }
    }

    /// Takes the entry of a tag, if that submission is in flight.
    pub fn remove(&mut self, tag: Tag) -> Option<T> {
        let index = (tag.0 & 0xffff) as u16;
        let slot = self.slots.get_mut(usize::from(index))?;
        if u32::from(slot.counter) != tag.0 >> 16 {
            return None;
        }
        let entry = slot.entry.take()?;
        self.free.push(index);
        Some(entry)
    }

    /// The tags in flight.
    pub fn tags(&self) -> impl Iterator<Item = Tag> + '_ {
        self.slots
            .iter()
            .enumerate()
            .filter(|(_, slot)| slot.entry.is_some())
            .map(|(index, slot)| Tag(u32::from(slot.counter) << 16 | index as u32))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        #[test]
        fn it_agrees_with_a_map(actions in prop::collection::vec((any::<bool>(), any::<u32>()), 0..200)) {
            let mut table = TagTable::new(7);
            let mut model: BTreeMap<u32, u32> = BTreeMap::new();
            let mut over: Vec<u32> = Vec::new();
            for (insert, number) in actions {
                if insert {
                    match table.insert(number) {
                        Ok(tag) => prop_assert!(model.insert(tag.0, number).is_none()),
                        Err(back) => { prop_assert_eq!(back, number); prop_assert_eq!(model.len(), 7); }
                    }
                } else {
                    let known: Vec<u32> = model.keys().copied().collect();
                    let tag = known.get(number as usize % 8).copied().unwrap_or(number);
                    prop_assert_eq!(table.remove(Tag(tag)), model.remove(&tag));
                    over.push(tag);
                }
                prop_assert_eq!(table.len(), model.len());
            }
            for tag in over {
                if !model.contains_key(&tag) {
                    prop_assert_eq!(table.remove(Tag(tag)), None);
                }
            }
        }
    }
}
