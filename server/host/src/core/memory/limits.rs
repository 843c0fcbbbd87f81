//! CORE, memory: the numbers, each with its derivation.

use crate::messages::{MESSAGE_DMA_BYTES_MAX, MESSAGE_DMA_OUTSTANDING_MAX};
use vmgmt_abi::registers::ENTRIES_MAX;
use vmgmt_abi::ring::TRANSFER_BYTES_MAX;

/// How long a fence waits for leases, in all: a piece of 1 MiB takes below 1 ms, QEMU's guest waits for us meanwhile, and its
/// client gives up at 5 s (survival.md, "Workers and unmaps").
pub const LEASE_WAIT_NS: u64 = 100_000_000;
/// When anonymous memory could not be put over a range (no address space left), it is tried again after this.
pub const REVOKE_RETRY_NS: u64 = 10_000_000;
/// Bytes that one bulk call moves at most, so that a lease is short and a cancel is quick.
pub const PIECE_BYTES_MAX: usize = 1 << 20;
/// Bytes of several ranges that are written to a file, or read from one, by one call: from here on a longer call is not faster (ext4, tmpfs), and with the
/// eight pieces of 64 KiB that a guest has in flight one half is written while it learns of the other.
pub const JOINED_BYTES_MAX: usize = PIECE_BYTES_MAX / 4;
/// Extents are grown in windows of this (more for objects so large that this would take more than [`EXTENTS_OBJECT`]): one
/// mapping serves tens of thousands of small maps, and a process has 65,530 mappings for all its VMs.
pub const WINDOW_BYTES_MIN: u64 = 1 << 30;
/// Windows per object, about.
pub const EXTENTS_OBJECT: u64 = 64;
/// Smallest unit of a mapping: the page size of every host we run on divides it, or is reported by the object itself.
pub const PAGE_BYTES: u64 = 4096;
/// Answers to reads by message that are kept for the one who asked: the largest transfer in pieces, for several rings.
pub const READS_MAX: usize = 1024;
/// Refused writes into buffers that are remembered for those who ask; above, a refusal fails the device: one for each piece of two of the largest transfers.
pub const REFUSED_MAX: usize = 2 * TRANSFER_BYTES_MAX as usize / MESSAGE_DMA_BYTES_MAX as usize + 64;
/// Writes into rings that were given up and are remembered until their rings have ended; above, all count as not done: each is a
/// word or a completion of at most 32 bytes, for a ring of the largest size twice.
pub const GIVEN_UP_MAX: usize = 4 * ENTRIES_MAX as usize;
/// Bytes of writes by message that wait at most: two of the largest transfers, so that one fills while the other is sent.
pub const QUEUED_BYTES_MAX: usize = 2 * TRANSFER_BYTES_MAX as usize;
/// A read or write by message is given up after this: twice the time after which QEMU gives up on us.
pub const MESSAGE_WAIT_NS: u64 = 10_000_000_000;
/// An answer that nobody asks for again is forgotten after this: far above the time between two calls of a room that waits.
pub const READ_IDLE_NS: u64 = 1_000_000_000;
/// Lines for the log that wait at most; more are counted away.
pub const NOTICES_MAX: usize = 16;
/// The cache of the last look-ups, indexed by bits of the page number: submissions, completions, events and a few buffers.
pub const HITS: usize = 8;

const _: () = assert!(HITS.is_power_of_two());
const _: () = assert!(WINDOW_BYTES_MIN.is_multiple_of(PAGE_BYTES) && WINDOW_BYTES_MIN.is_power_of_two());
const _: () = assert!(READS_MAX > 2 * TRANSFER_BYTES_MAX as usize / MESSAGE_DMA_BYTES_MAX as usize);
const _: () = assert!(MESSAGE_DMA_OUTSTANDING_MAX >= 1 && MESSAGE_DMA_BYTES_MAX as usize <= PIECE_BYTES_MAX);
