//! Edits of bytes that were good: most arbitrary bytes are refused at the first look, an edited state gets deeper.
//!
//! In: good bytes and choices. Out: the same bytes with some of them changed, cut out, doubled or set to an edge. Must never know what they mean.

use arbitrary::{Result, Unstructured};

/// Numbers near which mistakes are made.
const EDGES: [u64; 14] = [
    0,
    1,
    2,
    7,
    63,
    4095,
    4096,
    0xffff,
    0x1_0000,
    1 << 20,
    u32::MAX as u64,
    1 << 32,
    i64::MAX as u64,
    u64::MAX,
];

/// A number, often near an edge.
pub fn edge(u: &mut Unstructured<'_>) -> Result<u64> {
    Ok(match u.int_in_range(0..=3u8)? {
        0 => u64::from(u.arbitrary::<u8>()?),
        1 | 2 => {
            let near = *u.choose(&EDGES)?;
            near.wrapping_add(u64::from(u.int_in_range(0..=4u8)?))
                .wrapping_sub(2)
        }
        _ => u.arbitrary()?,
    })
}

/// Changes bytes in up to eight places.
pub fn edit(u: &mut Unstructured<'_>, bytes: &mut Vec<u8>) -> Result<()> {
    for _ in 0..u.int_in_range(0..=8u8)? {
        let at = u.int_in_range(0..=bytes.len().saturating_sub(1))?;
        match u.int_in_range(0..=5u8)? {
            0 => {
                let value = u.arbitrary()?;
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = value;
                }
            }
            1 => bytes.truncate(at),
            2 => {
                let value = edge(u)?.to_le_bytes();
                for (byte, value) in bytes.iter_mut().skip(at).zip(value) {
                    *byte = value;
                }
            }
            3 => {
                let end = (at + u.int_in_range(0..=32usize)?).min(bytes.len());
                bytes.drain(at.min(end)..end);
            }
            4 => {
                let end = (at + u.int_in_range(0..=32usize)?).min(bytes.len());
                let piece = bytes.get(at.min(end)..end).unwrap_or_default().to_vec();
                bytes.splice(at.min(bytes.len())..at.min(bytes.len()), piece);
            }
            _ => {
                let piece = u.bytes(u.len().min(9))?.to_vec();
                bytes.splice(at.min(bytes.len())..at.min(bytes.len()), piece);
            }
        }
    }
    Ok(())
}
