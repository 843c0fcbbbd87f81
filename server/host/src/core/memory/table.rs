//! CORE, map table: the mirror of the session's DMA maps, taken from the front page.
//!
//! In: the front page's words. Out: for a guest address the map that covers it. Knows no memory; where a map's bytes are is
//! kept beside it for the one who looks it up ([`Backing`]).

use super::object::Extent;
use crate::words::MappedWords;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use vmgmt_device::page::{ChangedMaps, FrontPage, MapRecord};

/// Where the bytes of a map are.
#[derive(Clone, Debug)]
pub enum Backing {
    /// Not looked for yet.
    Unknown,
    /// Not mapped here: reached by messages.
    Messages,
    /// In an extent, from this offset on.
    Mapped(Arc<Extent>, usize),
}

#[derive(Debug)]
pub struct Map {
    pub record: MapRecord,
    pub backing: Backing,
}

/// Rounds of reading until the table stands still: more only postpones what the next turn sees anyway.
const ROUNDS_MAX: usize = 3;

/// The mirror.
#[derive(Debug, Default)]
pub struct Table {
    /// By guest address.
    maps: BTreeMap<u64, Map>,
    /// Slot to (number, guest address).
    slots: BTreeMap<usize, (u64, u64)>,
    numbers: BTreeSet<u64>,
    /// The highest number that was ever there.
    newest: u64,
    /// The `events` word up to which it is read.
    seen: u64,
}

impl Table {
    /// Takes over what changed since the last time; true when anything did.
    pub fn refresh(&mut self, front: &FrontPage<MappedWords>) -> bool {
        let mut any = false;
        for _ in 0..ROUNDS_MAX {
            if front.events() == self.seen {
                break;
            }
            any = true;
            let (changed, seen) = front.changed_maps(self.seen);
            let slots = match changed {
                ChangedMaps::Slots(mut slots) => {
                    slots.sort_unstable();
                    slots.dedup();
                    slots
                }
                ChangedMaps::All => (0..front.maps_max()).collect(),
            };
            // All old ones go first: a range may have moved from one slot to another.
            for slot in &slots {
                self.remove(*slot);
            }
            for slot in slots {
                if let Some(record) = front.map(slot) {
                    self.insert(slot, record);
                }
            }
            self.seen = seen;
        }
        any
    }

    /// The map that covers `iova`.
    pub fn find(&mut self, iova: u64) -> Option<&mut Map> {
        let (start, map) = self.maps.range_mut(..=iova).next_back()?;
        (iova - start < map.record.bytes).then_some(map)
    }

    /// Whether the map with this number still exists.
    pub fn has_number(&self, number: u64) -> bool {
        self.numbers.contains(&number)
    }

    /// The highest number of a map that was ever there.
    pub const fn newest(&self) -> u64 {
        self.newest
    }

    /// The highest number of the maps that meet a range; 0: there is none.
    pub fn newest_of(&self, iova: u64, bytes: u64) -> u64 {
        let Some(last) = bytes.checked_sub(1).map(|more| iova.saturating_add(more)) else {
            return 0;
        };
        let maps = self.maps.range(..=last).rev();
        let meets = maps.take_while(|(start, map)| iova <= **start || iova - **start < map.record.bytes);
        meets.map(|(_, map)| map.record.number).max().unwrap_or(0)
    }

    /// The `events` word up to which it is read.
    pub const fn seen(&self) -> u64 {
        self.seen
    }

    pub fn maps_mut(&mut self) -> impl Iterator<Item = &mut Map> {
        self.maps.values_mut()
    }

    fn remove(&mut self, slot: usize) {
        let Some((number, iova)) = self.slots.remove(&slot) else {
            return;
        };
        self.numbers.remove(&number);
        if self
            .maps
            .get(&iova)
            .is_some_and(|map| map.record.number == number)
        {
            self.maps.remove(&iova);
        }
    }

    fn insert(&mut self, slot: usize, record: MapRecord) {
        let sane = record.bytes > 0
            && record.iova.checked_add(record.bytes - 1).is_some()
            && record.offset.checked_add(record.bytes).is_some();
        if sane {
            self.slots.insert(slot, (record.number, record.iova));
            self.numbers.insert(record.number);
            self.newest = self.newest.max(record.number);
            self.maps.insert(
                record.iova,
                Map {
                    record,
                    backing: Backing::Unknown,
                },
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_map_of_a_range_is_that_of_those_it_meets() {
        let mut table = Table::default();
        let record = |number, iova, bytes| MapRecord {
            number,
            iova,
            bytes,
            object: 1,
            offset: 0,
            rights: 3,
        };
        for (slot, (number, iova, bytes)) in [(7, 0x1000, 0x1000), (9, 0x2000, 0x1000), (8, 0x8000, 0x10)]
            .into_iter()
            .enumerate()
        {
            table.insert(slot, record(number, iova, bytes));
        }
        for (iova, bytes, newest) in [
            (0, 0x1000, 0),
            (0, 0x1001, 7),
            (0x1fff, 1, 7),
            (0x1fff, 2, 9),
            (0x2fff, 0x6000, 9),
            (0x3000, 0x5000, 0),
            (0x3000, u64::MAX, 8),
            (0x8010, 1, 0),
            (0x1000, 0, 0),
        ] {
            assert_eq!(table.newest_of(iova, bytes), newest, "{iova:#x} {bytes:#x}");
        }
        table.remove(1);
        assert_eq!((table.newest(), table.newest_of(0, 0x8000)), (9, 7));
    }
}
