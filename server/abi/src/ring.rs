//! Rings in guest memory: submissions, completions, and the words by which each side spares the other a wake-up.
//!
//! Indexes (tail, head, event) are free-running 32-bit counters; an entry's slot is its index modulo the ring's size.
//!
//! * The guest writes a [`Submission`] into its slot, then `submission_tail` (release), then a SeqCst fence, then reads
//!   `submission_event`, and rings the doorbell if that index lies within what it just published ([`event_due`]).
//! * The device writes a [`Completion`] with its last 8-byte word last (release). That word's phase bit tells new from old: the phase of
//!   completion index `i` in a ring of `n` entries is `1` when `(i / n)` is even, `0` when it is odd ([`phase`]).
//!   Then a SeqCst fence, then it reads `completion_event`, and interrupts if that index lies within what it just published.
//! * Whoever wants to sleep writes its event word, makes a SeqCst fence, looks once more, and only then sleeps.
//! * The guest moves `completion_head` when it has taken completions. No submission is fetched unless a completion
//!   slot is free for it. A submission's slot is the guest's again when `submission_head` has passed it.
//!
//! Without shared memory (the ring was proven by messages) event suppression is off: the guest rings for each batch,
//! the device interrupts for each batch.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// What a guest asks for: 64 bytes.
///
/// The buffer is `meta_bytes` of input (a path, a name) followed by the data area, which is input or output as the
/// opcode says. Nothing is ever written over the input.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Submission {
    /// Chosen by the guest, given back in the completion; two submissions in flight on a ring should differ.
    pub tag: u32,
    /// An [`crate::Opcode`].
    pub opcode: u16,
    /// [`flag`] bits; unknown ones are refused.
    pub flags: u16,
    /// A file, stream, offer or peer, as the opcode says; 0 where it has none.
    pub handle: u64,
    /// A position in bytes, a cursor or a total length, as the opcode says; 0 where it has none.
    pub offset: u64,
    /// Guest address of the buffer, or with [`flag::LIST`] of the list, which is 16-byte aligned.
    pub buffer: u64,
    /// Bytes of the whole buffer, at most `TRANSFER_BYTES_MAX`.
    pub length: u64,
    /// Entries of the list with [`flag::LIST`], else 0.
    pub list_entries: u32,
    /// Bytes of input at the buffer's start, at most `PATH_BYTES_MAX` + 256 and at most `length`.
    pub meta_bytes: u32,
    /// Nanoseconds after which the submission ends as TIMED_OUT; 0: none.
    pub deadline_ns: u64,
    /// As the opcode says; 0 where it has none.
    pub argument: u64,
}

/// Bits of `Submission::flags`.
pub mod flag {
    /// `buffer` is the address of a list of `list_entries` [`super::ListEntry`].
    pub const LIST: u16 = 1 << 0;
    /// The operation checks the checksum in `argument` (COMMIT, STREAM_END).
    pub const CHECK: u16 = 1 << 1;
    /// Data must be durable before the completion (COMMIT, RENAME).
    pub const DURABLE: u16 = 1 << 2;
    /// All bits that have a meaning.
    pub const KNOWN: u16 = LIST | CHECK | DURABLE;
}

/// The answer: 32 bytes. Exactly one for each submission.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Completion {
    /// Bytes moved, a new handle, or a number, as the opcode says.
    pub result: u64,
    /// A second answer, as the opcode says.
    pub extra: u64,
    /// With OVER_BUDGET the [`crate::Budget`]; else as the opcode says or 0.
    pub detail: u32,
    pub reserved: u32,
    /// As in the submission. With `status` and `flags` this is the word that is written last.
    pub tag: u32,
    /// A [`crate::Status`].
    pub status: u16,
    /// [`completion_flag`] bits.
    pub flags: u16,
}

/// Bits of `Completion::flags`.
pub mod completion_flag {
    /// The phase bit.
    pub const PHASE: u16 = 1 << 0;
    /// There is more: of this message (RECEIVE), of this listing (LIST, PEERS, SHARES).
    pub const MORE: u16 = 1 << 1;
    /// The stream has ended, `extra` is the sender's crc32 and `detail` is 1 when there is one (STREAM_READ).
    pub const END: u16 = 1 << 2;
}

/// One piece of a buffer. Pieces of length 0 are refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ListEntry {
    /// Guest address.
    pub address: u64,
    /// Bytes.
    pub length: u64,
}

/// The words beside a ring, in guest memory: one cache line that the guest writes, one that the device writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RingEvents {
    /// guest: index after the last submission written.
    pub submission_tail: u32,
    /// guest: index after the last completion taken.
    pub completion_head: u32,
    /// guest: interrupt me when the completion with this index is published.
    pub completion_event: u32,
    pub reserved_guest: u32,
    /// guest: as in the nonce registers, written before the ring is enabled.
    pub nonce: u64,
    pub reserved_guest_line: [u64; 5],
    /// device: index after the last submission whose slot the guest may use again.
    pub submission_head: u32,
    /// device: ring the doorbell when the submission with this index is published.
    pub submission_event: u32,
    pub reserved_device: [u32; 2],
    pub reserved_device_line: [u64; 6],
}

/// Offsets of the words of [`RingEvents`], in bytes.
pub mod event_offset {
    pub const SUBMISSION_TAIL: u64 = 0;
    pub const COMPLETION_HEAD: u64 = 4;
    pub const COMPLETION_EVENT: u64 = 8;
    pub const NONCE: u64 = 16;
    pub const SUBMISSION_HEAD: u64 = 64;
    pub const SUBMISSION_EVENT: u64 = 68;
}

pub const SUBMISSION_BYTES: usize = 64;
pub const COMPLETION_BYTES: usize = 32;
pub const LIST_ENTRY_BYTES: usize = 16;
pub const RING_EVENTS_BYTES: usize = 128;
/// Most entries of a buffer list.
pub const LIST_ENTRIES_MAX: u32 = 4096;
/// Most bytes of one submission's buffer: 16 MiB, so that a cancel or an unmap never waits behind more than that.
pub const TRANSFER_BYTES_MAX: u32 = 16 << 20;
/// Most bytes of input at a buffer's start.
pub const META_BYTES_MAX: u32 = 4096;

/// The phase bit of completion index `index` in a ring of `entries` (a power of two).
#[must_use]
pub const fn phase(index: u32, entries: u32) -> u16 {
    if (index / entries) & 1 == 0 { 1 } else { 0 }
}

/// Whether a peer that asked to be woken at index `event` is to be woken, after the indexes `old..new` were published.
#[must_use]
pub const fn event_due(event: u32, old: u32, new: u32) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

const _: () = {
    assert!(core::mem::size_of::<Submission>() == SUBMISSION_BYTES);
    assert!(core::mem::size_of::<Completion>() == COMPLETION_BYTES);
    assert!(core::mem::size_of::<ListEntry>() == LIST_ENTRY_BYTES);
    assert!(core::mem::size_of::<RingEvents>() == RING_EVENTS_BYTES);
    assert!(core::mem::offset_of!(RingEvents, nonce) == event_offset::NONCE as usize);
    assert!(core::mem::offset_of!(RingEvents, submission_head) == event_offset::SUBMISSION_HEAD as usize);
    assert!(core::mem::offset_of!(RingEvents, submission_event) == event_offset::SUBMISSION_EVENT as usize);
    assert!(core::mem::offset_of!(Completion, tag) == 24);
    assert!(META_BYTES_MAX as usize >= crate::PATH_BYTES_MAX + 256);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phase_flips_each_time_round() {
        assert_eq!((phase(0, 4), phase(3, 4), phase(4, 4), phase(8, 4)), (1, 1, 0, 1));
        assert_eq!(phase(u32::MAX, 1024), 0);
    }

    #[test]
    fn an_event_is_due_only_within_what_was_published() {
        assert!(event_due(5, 5, 6));
        assert!(!event_due(6, 5, 6));
        assert!(!event_due(4, 5, 6));
        assert!(event_due(u32::MAX, u32::MAX, 1));
        assert!(!event_due(3, 7, 7));
    }
}
