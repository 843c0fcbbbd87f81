//! From a stretch of memory to what a submission names: one address, or a list of pieces.
//!
//! Comes in: pieces of a memory and a range of it. Goes out: device addresses that cover exactly that range.

use vmgmt_abi::ListEntry;

use crate::error::{DriverError, Result};
use crate::memory::Piece;

/// The device addresses of `length` bytes from `start`, neighbours joined, none of length 0.
///
/// # Errors
/// The range is not within the pieces.
pub fn cover(pieces: &[Piece], start: usize, length: usize) -> Result<Vec<ListEntry>> {
    let mut skip = start as u64;
    let mut left = length as u64;
    let mut entries: Vec<ListEntry> = Vec::new();
    for piece in pieces {
        if left == 0 {
            break;
        }
        if skip >= piece.length {
            skip -= piece.length;
            continue;
        }
        let bytes = (piece.length - skip).min(left);
        let address = piece.address + skip;
        match entries.last_mut() {
            Some(last) if last.address.checked_add(last.length) == Some(address) => last.length += bytes,
            _ => entries.push(ListEntry {
                address,
                length: bytes,
            }),
        }
        skip = 0;
        left -= bytes;
    }
    if left > 0 {
        let memory_bytes = pieces.iter().map(|piece| piece.length as usize).sum();
        return Err(DriverError::Bounds {
            start,
            length,
            memory_bytes,
        });
    }
    Ok(entries)
}

/// Cuts entries into pieces of at most `most` bytes.
#[must_use]
pub fn cut(entries: &[ListEntry], most: u64) -> Vec<ListEntry> {
    let most = most.max(1);
    let pieces = |entry: &ListEntry| {
        let ListEntry { address, length } = *entry;
        (0..length.div_ceil(most)).map(move |index| {
            let start = index * most;
            ListEntry {
                address: address + start,
                length: most.min(length - start),
            }
        })
    };
    entries.iter().flat_map(pieces).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The address of each single byte, the slow and obvious way.
    fn bytes_of(pieces: &[Piece]) -> Vec<u64> {
        pieces
            .iter()
            .flat_map(|piece| (0..piece.length).map(|i| piece.address + i))
            .collect()
    }

    #[test]
    fn a_cut_list_has_the_same_bytes() {
        let entries = [
            ListEntry {
                address: 100,
                length: 10,
            },
            ListEntry {
                address: 500,
                length: 3,
            },
        ];
        let cut = cut(&entries, 4);
        assert_eq!(
            cut.iter().map(|e| (e.address, e.length)).collect::<Vec<_>>(),
            [(100, 4), (104, 4), (108, 2), (500, 3)]
        );
    }

    proptest! {
        #[test]
        fn a_list_covers_the_range_and_nothing_else(
            lengths in prop::collection::vec((0_u64..4, 1_u64..40), 1..12), start in 0_usize..200, length in 0_usize..200,
        ) {
            let mut address = 0x1000;
            let pieces: Vec<Piece> = lengths.iter().map(|(gap, length)| {
                let piece = Piece { address: address + gap, length: *length };
                address += gap + length;
                piece
            }).collect();
            let all = bytes_of(&pieces);
            match cover(&pieces, start, length) {
                Ok(entries) => {
                    let covered: Vec<u64> = entries.iter().flat_map(|e| (0..e.length).map(|i| e.address + i)).collect();
                    prop_assert_eq!(&covered[..], &all[start.min(all.len())..][..length]);
                    prop_assert!(entries.iter().all(|entry| entry.length > 0));
                    prop_assert!(entries.windows(2).all(|pair| pair[0].address + pair[0].length != pair[1].address));
                }
                Err(_) => prop_assert!(start + length > all.len()),
            }
        }
    }
}
