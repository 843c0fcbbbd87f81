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
