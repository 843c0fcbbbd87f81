//! Records and numbers of file mode. A path is `SHARE/relative/path`, UTF-8, no leading slash, no `.` or `..`.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `offset` of PUT and OFFER when the length is not known at the start.
pub const SIZE_UNKNOWN: u64 = u64::MAX;

/// `Completion::detail` of COMMIT and RENAME with OUTCOME_UNKNOWN.
pub mod unknown {
    /// The file has its name, and was to be durable; then the disk failed: whether a power cut would leave it there is not known.
    pub const NOT_DURABLE: u32 = 1;
}

/// What to do with an existing target (PUT, RENAME): `argument` bits 0..4.
pub mod existing {
    pub const REFUSE: u64 = 0;
    pub const REPLACE: u64 = 1;
    /// A free name is found: `name.1.ext`, …
    pub const RENAME: u64 = 2;
    pub const MASK: u64 = 0xf;
}

/// Further `argument` bits of PUT.
pub mod put {
    /// Go on where an earlier put of the same path and VM broke off; `extra` says how many bytes are there.
    pub const RESUME: u64 = 1 << 4;
    /// Bits 16..32: permission bits of the new file, with this bit set; else the host's default.
    pub const SET_PERMISSIONS: u64 = 1 << 5;
    pub const PERMISSIONS_SHIFT: u32 = 16;
    /// COMMIT will say no checksum, so none is worked out while bytes come. (One that it says all the same is compared with the file as it is then.)
    pub const UNCHECKED: u64 = 1 << 6;
    pub const KNOWN: u64 =
        super::existing::MASK | RESUME | SET_PERMISSIONS | UNCHECKED | (0x1ff << PERMISSIONS_SHIFT);
}

/// `argument` bits of OPEN.
pub mod open {
    pub const READ: u64 = 1 << 0;
    pub const WRITE: u64 = 1 << 1;
    pub const CREATE: u64 = 1 << 2;
    pub const EXCLUSIVE: u64 = 1 << 3;
    pub const TRUNCATE: u64 = 1 << 4;
    pub const KNOWN: u64 = READ | WRITE | CREATE | EXCLUSIVE | TRUNCATE;
}

/// Kinds of directory entries.
pub mod kind {
    pub const FILE: u32 = 1;
    pub const DIRECTORY: u32 = 2;
    pub const OTHER: u32 = 3;
}

/// Answer of STAT.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FileStat {
    /// Bytes.
    pub size: u64,
    /// Bytes on disk.
    pub allocated: u64,
    /// Last change, nanoseconds since 1970; negative before.
    pub modified_ns: i64,
    /// A [`kind`].
    pub kind: u32,
    /// Permission bits (0o777).
    pub permissions: u32,
}

/// One entry of LIST; `name_bytes` bytes of name follow, padded with zeros to a multiple of 8.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DirectoryEntry {
    pub stat: FileStat,
    pub name_bytes: u32,
    pub reserved: u32,
}

/// One entry of SHARES; the name follows, padded with zeros to a multiple of 8.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ShareEntry {
    /// Bytes the VM may still put there; `u64::MAX`: no quota.
    pub bytes_left: u64,
    /// 1 when the VM may write.
    pub writable: u32,
    pub name_bytes: u32,
}

/// Kinds of what NEXT_OFFER gives.
pub mod offer_kind {
    /// Somebody offers a file: ACCEPT or REFUSE.
    pub const OFFER: u32 = 1;
    /// The host asks for a file: answer with an OFFER to `host` that carries this handle, or REFUSE.
    pub const REQUEST: u32 = 2;
}

/// What NEXT_OFFER gives; the source's name and the file's name follow, unpadded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct OfferHeader {
    /// For ACCEPT, REFUSE, or OFFER.
    pub handle: u64,
    /// Number of the source VM; `chat::PEER_HOST`: the host.
    pub source: u64,
    /// Bytes, or [`SIZE_UNKNOWN`].
    pub size: u64,
    /// An [`offer_kind`].
    pub kind: u32,
    pub source_name_bytes: u16,
    pub file_name_bytes: u16,
}

const _: () = {
    assert!(core::mem::size_of::<FileStat>() == 32);
    assert!(core::mem::size_of::<DirectoryEntry>() == 40);
    assert!(core::mem::size_of::<ShareEntry>() == 16);
    assert!(core::mem::size_of::<OfferHeader>() == 32);
};
