//! Numbers of the rings, with their derivation.

use vmgmt_abi::{port, registers, ring};

/// Submissions copied out of a ring at once: 2 KiB of private memory, one copy for up to 32 of them.
pub const BATCH_MAX: u32 = 32;
/// Records of a ring's in-flight table: a completion slot is reserved for each, and a ring has at most so many.
pub const RECORDS_MAX: u32 = registers::ENTRIES_MAX;
/// Fewest entries of a ring: with one, the phase bit could not tell full from empty.
pub const ENTRIES_MIN: u32 = 2;
/// Buffer list entries read at once (1 KiB).
pub const LIST_PIECE_ENTRIES: u32 = 64;
/// Pieces of buffer lists that the submissions in flight of a ring may hold together (1 MiB of the core's memory): 16 of the longest.
pub const LIST_ENTRIES_HELD_MAX: usize = 16 * ring::LIST_ENTRIES_MAX as usize;
/// Data of SEND and PUBLISH up to this length is fetched with the submission: one page, the usual message.
pub const PREFETCH_BYTES_MAX: u64 = 4096;
/// First wait until a ring that is stalled for want of completion slots is looked at again without being asked.
pub const STALL_FIRST_NS: u64 = 1_000_000;
/// Longest such wait: a guest that never takes its completions costs at most eight looks a second.
pub const STALL_LAST_NS: u64 = 128_000_000;
/// Bytes of a port result: completion and output.
pub const PORT_RESULT_BYTES_MAX: usize = ring::COMPLETION_BYTES + port::OUTPUT_BYTES_MAX;

const _: () = assert!(ENTRIES_MIN.is_power_of_two() && registers::ENTRIES_MAX.is_power_of_two());
const _: () = assert!(ring::LIST_ENTRIES_MAX.is_multiple_of(LIST_PIECE_ENTRIES));
const _: () = assert!(STALL_FIRST_NS < STALL_LAST_NS);
const _: () = assert!(PREFETCH_BYTES_MAX >= vmgmt_abi::chat::DESCRIPTION_BYTES_MAX as u64);
