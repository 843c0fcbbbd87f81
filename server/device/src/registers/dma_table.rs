//! The DMA maps of a session: which guest addresses lie where in which memory object.
//!
//! In: ranges to map and to unmap. Out: slots of the front page that changed. Must never know: a descriptor, the
//! memory, who else uses it.
//!
//! Numbers are never used again, so that a late completion for a remapped range can be told from a timely one.

use crate::page::MapRecord;
use std::collections::{BTreeMap, BTreeSet};
use vmgmt_wire::{DmaMap, Errno, IovaRange};

/// The memory behind a map: an interned descriptor of this session.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MapObject {
    /// Never used again in this session; not 0.
    pub number: u64,
    /// Rights that the descriptor itself gives ([`crate::page::rights`]).
    pub rights: u64,
}

/// One map and its slot on the front page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mapped {
    pub slot: usize,
    pub record: MapRecord,
}

/// All maps, by their first address. They never overlap.
#[derive(Clone, Debug)]
pub struct DmaTable {
    maps: BTreeMap<u64, Mapped>,
    free: BTreeSet<usize>,
    /// Slots from here on were never used.
    fresh: usize,
    next_number: u64,
    mapped_bytes: u64,
    /// Maps per object.
    objects: BTreeMap<u64, u32>,
    maps_max: usize,
    mapped_bytes_max: u64,
    objects_max: usize,
}

impl DmaTable {
    pub const fn new(maps_max: usize, mapped_bytes_max: u64, objects_max: usize) -> Self {
        Self {
            maps: BTreeMap::new(),
            free: BTreeSet::new(),
            fresh: 0,
            next_number: 1,
            mapped_bytes: 0,
            objects: BTreeMap::new(),
            maps_max,
            mapped_bytes_max,
            objects_max,
        }
    }

    /// Whether the range may be mapped now. `object` is 0 where the memory is reached by messages.
    ///
    /// # Errors
    /// EEXIST: overlaps a map. ENOSPC: too many maps or objects. ENOMEM: too many bytes.
    pub fn check(&self, range: IovaRange, object: u64) -> Result<(), Errno> {
        if self.overlapping(range).next().is_some() {
            return Err(Errno::EEXIST);
        }
        let new_object = object != 0 && !self.objects.contains_key(&object);
        if self.maps.len() >= self.maps_max || (new_object && self.objects.len() >= self.objects_max) {
            return Err(Errno::ENOSPC);
        }
        match self.mapped_bytes.checked_add(range.bytes()) {
            Some(bytes) if bytes <= self.mapped_bytes_max => Ok(()),
            _ => Err(Errno::ENOMEM),
        }
    }

    /// Maps a range.
    ///
    /// # Errors
    /// As [`DmaTable::check`]; EACCES when the descriptor gives none of the rights asked for.
    pub fn map(&mut self, map: &DmaMap, rights: u64, object: Option<MapObject>) -> Result<Mapped, Errno> {
        let number = object.map_or(0, |object| object.number);
        self.check(map.range, number)?;
        let rights = object.map_or(rights, |object| rights & object.rights);
        if rights == 0 {
            return Err(Errno::EACCES);
        }
        let record = MapRecord {
            number: self.next_number,
            iova: map.range.start(),
            bytes: map.range.bytes(),
            object: number,
            offset: map.file_offset,
            rights,
        };
        let slot = self.free.pop_first().unwrap_or_else(|| {
            self.fresh += 1;
            self.fresh - 1
        });
        self.next_number += 1;
        let mapped = Mapped { slot, record };
        self.insert(mapped);
        Ok(mapped)
    }

    /// Takes away the maps within `range`; none is fine, as with a virtual IOMMU ranges are unmapped that never were mapped.
    ///
    /// # Errors
    /// EINVAL when a map lies only partly in the range: nothing is taken away.
    pub fn unmap(&mut self, range: IovaRange) -> Result<Vec<Mapped>, Errno> {
        let inside =
            |mapped: &Mapped| mapped.record.iova >= range.start() && last(&mapped.record) <= range.last();
        let maps: Vec<Mapped> = self.overlapping(range).copied().collect();
        if !maps.iter().all(inside) {
            return Err(Errno::EINVAL);
        }
        for mapped in &maps {
            self.remove(mapped);
        }
        Ok(maps)
    }

    /// Takes away all maps.
    pub fn unmap_all(&mut self) -> Vec<Mapped> {
        let maps: Vec<Mapped> = self.maps.values().copied().collect();
        for mapped in &maps {
            self.remove(mapped);
        }
        maps
    }

    /// Whether a map names the object.
    pub fn uses_object(&self, object: u64) -> bool {
        self.objects.contains_key(&object)
    }

    /// All maps, by address.
    pub fn maps(&self) -> impl Iterator<Item = &Mapped> {
        self.maps.values()
    }

    /// The number that the next map gets.
    pub const fn next_number(&self) -> u64 {
        self.next_number
    }

    /// Rebuilds the table from saved maps.
    ///
    /// # Errors
    /// What contradicts: overlap, a slot or number used twice or out of range, a limit.
    pub fn restore(mut self, maps: &[Mapped], next_number: u64) -> Result<Self, &'static str> {
        let mut slots = BTreeSet::new();
        let mut numbers = BTreeSet::new();
        for mapped in maps {
            let record = &mapped.record;
            let range = IovaRange::new(record.iova, record.bytes).ok_or("a map's range is empty or wraps")?;
            self.check(range, record.object)
                .map_err(|_| "maps overlap or are over a limit")?;
            let in_range = mapped.slot < self.maps_max && (1..next_number).contains(&record.number);
            if !in_range || !slots.insert(mapped.slot) || !numbers.insert(record.number) {
                return Err("a map's slot or number is out of range or used twice");
            }
            self.insert(*mapped);
        }
        self.fresh = slots.last().map_or(0, |slot| slot + 1);
        self.free = (0..self.fresh).filter(|slot| !slots.contains(slot)).collect();
        self.next_number = next_number.max(1);
        Ok(self)
    }

    fn insert(&mut self, mapped: Mapped) {
        self.mapped_bytes = self.mapped_bytes.saturating_add(mapped.record.bytes);
        if mapped.record.object != 0 {
            *self.objects.entry(mapped.record.object).or_insert(0) += 1;
        }
        self.maps.insert(mapped.record.iova, mapped);
    }

    fn remove(&mut self, mapped: &Mapped) {
        self.maps.remove(&mapped.record.iova);
        self.mapped_bytes = self.mapped_bytes.saturating_sub(mapped.record.bytes);
        // Free slots at the end become fresh again, so that the table does not depend on how it came about.
        self.free.insert(mapped.slot);
        while self.fresh > 0 && self.free.remove(&(self.fresh - 1)) {
            self.fresh -= 1;
        }
        if let Some(count) = self.objects.get_mut(&mapped.record.object) {
            *count -= 1;
            if *count == 0 {
                self.objects.remove(&mapped.record.object);
            }
        }
    }

    /// Maps that share an address with `range`. They never overlap each other, so all but the first start in it.
    fn overlapping(&self, range: IovaRange) -> impl Iterator<Item = &Mapped> {
        let before = self.maps.range(..range.start()).next_back();
        let before = before
            .map(|(_, mapped)| mapped)
            .filter(|mapped| last(&mapped.record) >= range.start());
        let within = self
            .maps
            .range(range.start()..=range.last())
            .map(|(_, mapped)| mapped);
        before.into_iter().chain(within)
    }
}

/// Last address of a map, whose range was checked when it came in.
const fn last(record: &MapRecord) -> u64 {
    record.iova + (record.bytes - 1)
}
