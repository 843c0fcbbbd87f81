//! Records and numbers of chat mode.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `handle` of SEND: the target's name is in meta.
pub const PEER_BY_NAME: u64 = 0;
/// The host.
pub const PEER_HOST: u64 = u64::MAX;
/// All VMs that publish themselves (needs a right that is off by default).
pub const PEER_ALL: u64 = u64::MAX - 1;
/// The host's reserved name.
pub const HOST_NAME: &str = "host";
/// The reserved name for all.
pub const ALL_NAME: &str = "all";
/// Longest description of PUBLISH, in bytes.
pub const DESCRIPTION_BYTES_MAX: usize = 1024;

/// What RECEIVE gives; the source's name and the message follow, unpadded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MessageHeader {
    /// The message's number, one sequence per source.
    pub sequence: u64,
    /// Number of the source VM, or [`PEER_HOST`]; stamped by the core.
    pub source: u64,
    /// Bytes of the whole message.
    pub message_bytes: u64,
    /// When the core accepted it, nanoseconds since 1970.
    pub accepted_ns: u64,
    pub source_name_bytes: u32,
    /// [`message_flag`] bits.
    pub flags: u32,
}

/// Bits of `MessageHeader::flags`.
pub mod message_flag {
    /// Sent to all.
    pub const TO_ALL: u32 = 1 << 0;
    /// Goes on with the message of the RECEIVE before (no header and no name follow again but this one).
    pub const CONTINUED: u32 = 1 << 1;
    /// It waited in the mailbox.
    pub const FROM_MAILBOX: u32 = 1 << 2;
}

/// One entry of PEERS; name and description follow, padded together with zeros to a multiple of 8.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PeerEntry {
    /// Number of the VM (for SEND), or [`PEER_HOST`].
    pub number: u64,
    /// [`presence`] bits.
    pub presence: u32,
    pub name_bytes: u16,
    pub description_bytes: u16,
}

/// Bits of `PeerEntry::presence`.
pub mod presence {
    /// Its device is connected.
    pub const CONNECTED: u32 = 1 << 0;
    /// It has published itself.
    pub const PUBLISHED: u32 = 1 << 1;
    /// A RECEIVE is posted.
    pub const LISTENING: u32 = 1 << 2;
}

const _: () = {
    assert!(core::mem::size_of::<MessageHeader>() == 40);
    assert!(core::mem::size_of::<PeerEntry>() == 16);
};
