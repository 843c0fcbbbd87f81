//! What the hub asks the shell to do, and what comes back. One [`Outcome`] for each [`Effect`], in any order.

use serde::{Deserialize, Serialize};
use vmgmt_abi::file::{DirectoryEntry, FileStat};
use vmgmt_abi::{Budget, Status};
use vmgmt_device::rings::Token;

/// Names an effect until its outcome; never used again in one core life.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash, Serialize, Deserialize)]
pub struct EffectId(pub u64);

/// An open file of the shell, with a generation so that a stale one is known.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash, Serialize, Deserialize)]
pub struct FileSlot {
    pub index: u32,
    pub generation: u32,
}

impl FileSlot {
    /// No slot of any shell: of a file that is not open in this core life, or not yet.
    pub const NONE: Self = Self {
        index: u32::MAX,
        generation: 0,
    };
}

/// Which file it is, whatever its name: for recovery.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Serialize, Deserialize)]
pub struct Identity {
    pub device: u64,
    pub inode: u64,
    /// When it was made, nanoseconds since 1970 (0: the file system does not say), because the number of a removed file is soon another's.
    pub born_ns: i64,
}

/// Part of the data area of a submission's buffer (offset 0 is the first byte behind its meta).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BufferRange {
    pub token: Token,
    pub offset: u64,
    pub bytes: u64,
}

/// Something that only the shell can do. Paths are relative to the share, checked for form by the hub; the shell
/// resolves them beneath the share's root (openat2), following no link out.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Effect {
    /// One memory copy from one submission's buffer to another's; `into.bytes` equals `from.bytes`. Outcome: Bytes.
    Copy { from: BufferRange, into: BufferRange },
    /// Bytes of a buffer into private memory. Outcome: Data.
    Fetch { from: BufferRange },

    /// Opens a file. Outcome: Opened.
    Open {
        share: String,
        path: String,
        read: bool,
        write: bool,
        create: bool,
        exclusive: bool,
        truncate: bool,
    },
    /// Makes (or with `resume` opens, if it is there) a temporary file beside `target`, in the same directory. Outcome: Opened, with the bytes
    /// that are there already as its size.
    CreateTemporary {
        share: String,
        target: String,
        temporary: String,
        resume: bool,
        permissions: Option<u32>,
    },
    /// Opens a file of an earlier core life again, if it is still the same. `put`: it is temporary, and may have got its final name already
    /// (as `Commit` says, target and `file::existing`). Outcome: Opened.
    Reopen {
        share: String,
        path: String,
        put: Option<(String, u64)>,
        read: bool,
        write: bool,
        identity: Identity,
    },
    /// Gives a temporary file its name, after cutting it to `bytes`; the slot is closed. `existing`: `file::existing`. Where it has its name
    /// already that is all. `again`: an earlier life may have done it, so that what cannot be told is OUTCOME_UNKNOWN. Outcome: Committed.
    Commit {
        slot: FileSlot,
        share: String,
        temporary: String,
        target: String,
        existing: u64,
        durable: bool,
        bytes: u64,
        again: bool,
    },
    /// Removes a temporary file and closes the slot. Outcome: Done.
    Discard {
        slot: FileSlot,
        share: String,
        temporary: String,
    },
    /// File into a buffer, as much as there is. Outcome: Bytes.
    Read {
        slot: FileSlot,
        offset: u64,
        into: BufferRange,
    },
    /// Buffer into a file. With `checksum` the crc32 of what the file then holds there. Outcome: Written.
    Write {
        slot: FileSlot,
        offset: u64,
        from: BufferRange,
        checksum: bool,
    },
    /// Outcome: Checksum.
    Checksum { slot: FileSlot, offset: u64, bytes: u64 },
    /// Outcome: Done.
    Truncate { slot: FileSlot, bytes: u64 },
    /// Outcome: Done.
    Sync { slot: FileSlot },
    /// Closes a slot. Outcome: Done.
    Close { slot: FileSlot },
    /// Outcome: Stat.
    Stat { share: String, path: String },
    /// Entries from `cursor` (0: the first) that fit `bytes_max` as `file::DirectoryEntry` records, temporary names left out. Outcome: Listed.
    List {
        share: String,
        path: String,
        cursor: u64,
        bytes_max: u64,
    },
    /// Which file or directory is there. Outcome: Identified.
    Identify { share: String, path: String },
    /// Makes a directory under a temporary name, beside the name it is to have, which must be free. Outcome: Identified.
    PrepareDirectory {
        share: String,
        path: String,
        temporary: String,
    },
    /// Gives it its name. `intended`: as in `Remove`. Outcome: Done.
    MakeDirectory {
        share: String,
        path: String,
        temporary: String,
        intended: Option<Identity>,
    },
    /// A file or an empty directory. `intended`: an earlier core life was about to do it, to this one, and may have. Outcome: Done.
    Remove {
        share: String,
        path: String,
        intended: Option<Identity>,
    },
    /// `intended`: as in `Remove`. Outcome: Committed.
    Rename {
        share: String,
        source: String,
        target: String,
        existing: u64,
        durable: bool,
        intended: Option<Identity>,
    },
    /// Removes temporary files of broken puts in a share that are older than this, in seconds, but for those to keep. `adoption`: also all that
    /// nobody can resume and that are older than this core life. Outcome: Done.
    Sweep {
        share: String,
        older_than_seconds: u64,
        keep: Vec<String>,
        adoption: bool,
    },
    /// What the quotas of these shares leave. Outcome: BytesLeft.
    BytesLeft { shares: Vec<String> },
}

/// On which side a copy failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum FailedAt {
    /// The buffer it came from (or the only buffer).
    From,
    /// The buffer it went to.
    Into,
    /// The file.
    File,
}

/// How an effect ended.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Outcome {
    Done,
    /// Bytes moved.
    Bytes(u64),
    /// Bytes written and, if asked for, the crc32 of them as the file holds them.
    Written {
        bytes: u64,
        crc32: Option<u32>,
    },
    Data(Vec<u8>),
    Opened {
        slot: FileSlot,
        stat: StatRecord,
        identity: Identity,
    },
    Identified(Identity),
    /// The name (relative to the share) it got.
    Committed {
        path: String,
    },
    Checksum {
        bytes: u64,
        crc32: u32,
    },
    Stat(StatRecord),
    /// Bytes that may still be put into each share, in the order of the question; `u64::MAX`: no quota.
    BytesLeft(Vec<u64>),
    /// Names with their stat; `next`: cursor to go on from, 0: that was all.
    Listed {
        entries: Vec<(String, StatRecord)>,
        next: u64,
    },
    /// As `Committed`, but the disk failed when the name was to be made durable: whether it would outlive the machine is not known.
    NotDurable {
        path: String,
    },
    Failed {
        status: u16,
        budget: u32,
        at: FailedAt,
    },
}

impl Outcome {
    /// A failure that is no budget's.
    #[must_use]
    pub const fn failed(status: Status, at: FailedAt) -> Self {
        Self::Failed {
            status: status.0,
            budget: Budget::NONE.0,
            at,
        }
    }
}

/// [`FileStat`] as the core saves it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct StatRecord {
    /// Bytes.
    pub size: u64,
    /// Bytes on disk.
    pub allocated: u64,
    /// Nanoseconds since 1970.
    pub modified_ns: i64,
    /// `file::kind`.
    pub kind: u32,
    /// Permission bits.
    pub permissions: u32,
}

impl From<StatRecord> for FileStat {
    fn from(stat: StatRecord) -> Self {
        let StatRecord {
            size,
            allocated,
            modified_ns,
            kind,
            permissions,
        } = stat;
        Self {
            size,
            allocated,
            modified_ns,
            kind,
            permissions,
        }
    }
}

/// Bytes that an entry of a listing takes in the guest's buffer.
#[must_use]
pub const fn entry_bytes(name: &str) -> usize {
    size_of::<DirectoryEntry>() + name.len().next_multiple_of(8)
}
