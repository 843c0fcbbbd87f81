//! WORKSHOP file: which ranges of a put have a known checksum. In: pieces in any order. Out: gaps, and the checksum of the whole.
//! It never knows where the bytes are.

use crate::limits::PUT_RANGES_MAX;
use crc32fast::Hasher;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Ranges with their crc32, apart from each other; neighbours are merged.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Coverage {
    /// Start to (bytes, crc32).
    ranges: BTreeMap<u64, (u64, u32)>,
}

/// The crc32 of two neighbours.
#[must_use]
pub fn combine(first: u32, second: u32, second_bytes: u64) -> u32 {
    let mut hasher = Hasher::new_with_initial(first);
    hasher.combine(&Hasher::new_with_initial_len(second, second_bytes));
    hasher.finalize()
}

impl Coverage {
    /// Whether the ranges are as this type makes them: for what was saved.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        let mut end = 0;
        self.ranges
            .iter()
            .enumerate()
            .all(|(index, (start, (bytes, _)))| {
                let apart = index == 0 || *start > end;
                end = start.saturating_add(*bytes);
                apart && *bytes > 0 && end <= crate::limits::FILE_OFFSET_MAX
            })
    }

    /// Ranges that are remembered.
    #[must_use]
    pub fn count(&self) -> usize {
        self.ranges.len()
    }

    /// Whether something is known of these bytes.
    #[must_use]
    pub fn knows(&self, start: u64, bytes: u64) -> bool {
        let last = self.ranges.range(..start.saturating_add(bytes)).next_back();
        last.is_some_and(|(from, (length, _))| from.saturating_add(*length) > start)
    }

    /// Bytes from `start` are about to change: nothing is known of them any more.
    pub fn forget(&mut self, start: u64, bytes: u64) {
        let end = start.saturating_add(bytes);
        let before = self
            .ranges
            .range(..start)
            .next_back()
            .map(|(from, (length, _))| (*from, *length));
        if let Some((from, length)) = before
            && from.saturating_add(length) > start
        {
            self.ranges.remove(&from);
        }
        while let Some((&from, _)) = self.ranges.range(start..end).next() {
            self.ranges.remove(&from);
        }
    }

    /// Bytes from `start` have this checksum. What overlaps something known was written twice at once: then nothing is known of either.
    pub fn insert(&mut self, start: u64, bytes: u64, crc32: u32) {
        if bytes == 0 {
            return;
        }
        let count = self.ranges.len();
        self.forget(start, bytes);
        if self.ranges.len() != count || count >= PUT_RANGES_MAX {
            return;
        }
        let (mut start, mut bytes, mut crc32) = (start, bytes, crc32);
        let before = self
            .ranges
            .range(..start)
            .next_back()
            .map(|(from, range)| (*from, *range));
        if let Some((from, (length, first))) = before
            && from + length == start
        {
            self.ranges.remove(&from);
            crc32 = combine(first, crc32, bytes);
            (start, bytes) = (from, length + bytes);
        }
        if let Some((length, second)) = self.ranges.remove(&(start + bytes)) {
            crc32 = combine(crc32, second, length);
            bytes += length;
        }
        self.ranges.insert(start, (bytes, crc32));
    }

    /// Ranges of `0..bytes` of which nothing is known: (start, bytes). What reaches over the end is not known.
    #[must_use]
    pub fn gaps(&self, bytes: u64) -> Vec<(u64, u64)> {
        let mut gaps = Vec::new();
        let mut at = 0;
        for (&start, &(length, _)) in self.ranges.range(..bytes) {
            if start + length > bytes {
                break;
            }
            if start > at {
                gaps.push((at, start - at));
            }
            at = start + length;
        }
        if at < bytes {
            gaps.push((at, bytes - at));
        }
        gaps
    }

    /// The checksum of `0..bytes`, when all of it is known.
    #[must_use]
    pub fn checksum(&self, bytes: u64) -> Option<u32> {
        if bytes == 0 {
            return Some(0);
        }
        match self.ranges.get(&0) {
            Some((length, crc32)) if *length == bytes => Some(*crc32),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn overlaps_make_both_unknown() {
        let mut coverage = Coverage::default();
        coverage.insert(0, 10, 1);
        coverage.insert(20, 10, 2);
        assert!(coverage.knows(9, 1) && coverage.knows(5, 10) && !coverage.knows(10, 10));
        coverage.insert(5, 10, 3);
        assert_eq!(coverage.gaps(30), [(0, 20)]);
        coverage.forget(29, 1);
        assert_eq!(coverage.gaps(30), [(0, 30)]);
        assert_eq!(Coverage::default().checksum(0), Some(0));
    }

    proptest! {
        #[test]
        fn pieces_in_any_order_give_the_checksum_of_the_whole(
            data in proptest::collection::vec(any::<u8>(), 1..300),
            cuts in proptest::collection::btree_set(1_usize..300, 0..12),
            order in any::<u64>(),
        ) {
            let mut edges: Vec<usize> = std::iter::once(0).chain(cuts.into_iter().filter(|cut| *cut < data.len())).collect();
            edges.push(data.len());
            let mut pieces: Vec<_> = edges.windows(2).map(|edge| (edge[0], edge[1])).collect();
            let mut state = order | 1;
            for index in (1..pieces.len()).rev() {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                pieces.swap(index, (state >> 33) as usize % (index + 1));
            }
            let mut coverage = Coverage::default();
            for (start, end) in pieces {
                prop_assert_eq!(coverage.checksum(data.len() as u64), None);
                coverage.insert(start as u64, (end - start) as u64, crc32fast::hash(&data[start..end]));
            }
            prop_assert_eq!(coverage.checksum(data.len() as u64), Some(crc32fast::hash(&data)));
            prop_assert!(coverage.gaps(data.len() as u64).is_empty());
        }
    }
}
