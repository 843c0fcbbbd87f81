//! What a client can ask, as types that cannot be wrong.
//!
//! In: nothing (built only by `request_decode`). Out: values whose lengths, ranges and flags were checked
//! against the specification. What the device has (how many regions, how large) is the device's to check.
//! Must never know: the device, and what a descriptor is.

use serde::{Deserialize, Serialize};

use crate::FdSlot;
use crate::errno::Errno;
use crate::reply::ReplyHandle;
use crate::version::VersionProposal;

/// One well-formed request of the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// What to give back with the answer. A posted request has one too; answering it sends nothing.
    pub handle: ReplyHandle,
    /// What is asked.
    pub command: Command,
}

/// The commands, by the sections of the specification.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Negotiation; answer with `Connection::accept_version` or an error.
    Version(VersionProposal),
    /// Guest memory becomes reachable. Answer: `Reply::Done`.
    DmaMap(DmaMap),
    /// Guest memory goes away. Answer: `Reply::DmaUnmap`, once no DMA can reach it any more.
    DmaUnmap(DmaUnmap),
    /// Answer: `Reply::DeviceInfo`.
    DeviceGetInfo,
    /// Answer: `Reply::RegionInfo`.
    DeviceGetRegionInfo {
        /// Region index, unchecked against the device.
        region: u32,
    },
    /// Answer: `Reply::RegionIoFds` (none) or an error.
    DeviceGetRegionIoFds {
        /// Region index, unchecked against the device.
        region: u32,
    },
    /// Answer: `Reply::IrqInfo`.
    DeviceGetIrqInfo {
        /// Interrupt index, unchecked against the device.
        index: u32,
    },
    /// Answer: `Reply::Done`.
    DeviceSetIrqs(SetIrqs),
    /// Answer: `Reply::RegionRead`.
    RegionRead(RegionAccess),
    /// Answer: `Reply::RegionWrite`.
    RegionWrite(RegionWrite),
    /// Small writes to be done in order; at least one. Answer: `Reply::RegionWriteMulti`.
    RegionWriteMulti(Vec<RegionWrite>),
    /// Answer: `Reply::Done`.
    DeviceReset,
    /// Answer: `Reply::DeviceFeature` or an error.
    DeviceFeature(DeviceFeature),
}

/// A range of DMA addresses: not empty, and its last byte has an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "(u64, u64)", into = "(u64, u64)")]
pub struct IovaRange {
    start: u64,
    bytes: u64,
}

impl IovaRange {
    /// `None` when empty or past the end of the 64-bit address space.
    pub fn new(start: u64, bytes: u64) -> Option<Self> {
        start.checked_add(bytes.checked_sub(1)?)?;
        Some(Self { start, bytes })
    }

    /// First address.
    pub fn start(self) -> u64 {
        self.start
    }

    /// Length, at least 1.
    pub fn bytes(self) -> u64 {
        self.bytes
    }

    /// Last address (inclusive, so that a range may end where the address space does).
    pub fn last(self) -> u64 {
        self.start + (self.bytes - 1)
    }
}

impl TryFrom<(u64, u64)> for IovaRange {
    type Error = &'static str;

    fn try_from((start, bytes): (u64, u64)) -> Result<Self, Self::Error> {
        Self::new(start, bytes).ok_or("DMA range empty or past the end of the address space")
    }
}

impl From<IovaRange> for (u64, u64) {
    fn from(range: IovaRange) -> Self {
        (range.start, range.bytes)
    }
}

/// DMA_MAP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DmaMap {
    /// Which DMA addresses.
    pub range: IovaRange,
    /// The device may read them.
    pub readable: bool,
    /// The device may write them. At least one of both is set.
    pub writable: bool,
    /// The memory's descriptor; without one the memory is reached by messages only.
    pub descriptor: Option<FdSlot>,
    /// Where in that descriptor's file the range starts; offset plus length fit an `i64`.
    pub file_offset: u64,
    /// The kernel could not give us the descriptor that came with this message (our table is full): the
    /// memory is reachable by messages all the same.
    pub descriptor_lost: bool,
}

/// DMA_UNMAP; keeps what its reply must repeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DmaUnmap {
    /// One range; it must be exactly one that was mapped, or none at all.
    Range(IovaRange),
    /// Everything that is mapped.
    All,
}

/// A place in a region: 1 to `DATA_BYTES_MAX` bytes, whose end does not overflow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "(u32, u64, u32)", into = "(u32, u64, u32)")]
pub struct RegionAccess {
    region: u32,
    offset: u64,
    bytes: u32,
}

impl RegionAccess {
    /// `None` when empty, larger than `DATA_BYTES_MAX`, or when the end overflows.
    pub fn new(region: u32, offset: u64, bytes: u32) -> Option<Self> {
        if bytes == 0 || bytes > crate::limits::DATA_BYTES_MAX {
            return None;
        }
        offset.checked_add(u64::from(bytes))?;
        Some(Self {
            region,
            offset,
            bytes,
        })
    }

    /// Region index, unchecked against the device.
    pub fn region(self) -> u32 {
        self.region
    }

    /// Bytes from the region's start.
    pub fn offset(self) -> u64 {
        self.offset
    }

    /// Length, at least 1.
    pub fn bytes(self) -> u32 {
        self.bytes
    }

    /// First byte after the access; does not overflow.
    pub fn end(self) -> u64 {
        self.offset + u64::from(self.bytes)
    }
}

impl TryFrom<(u32, u64, u32)> for RegionAccess {
    type Error = &'static str;

    fn try_from((region, offset, bytes): (u32, u64, u32)) -> Result<Self, Self::Error> {
        Self::new(region, offset, bytes).ok_or("region access empty, too large or past the end")
    }
}

impl From<RegionAccess> for (u32, u64, u32) {
    fn from(access: RegionAccess) -> Self {
        (access.region, access.offset, access.bytes)
    }
}

/// A store to a region: as many bytes as its place says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionWrite {
    pub(crate) access: RegionAccess,
    pub(crate) data: Vec<u8>,
}

impl RegionWrite {
    /// `None` when `data` is empty or too long for one access.
    pub fn new(region: u32, offset: u64, data: Vec<u8>) -> Option<Self> {
        let access = RegionAccess::new(region, offset, u32::try_from(data.len()).ok()?)?;
        Some(Self { access, data })
    }

    /// Where.
    pub fn access(&self) -> RegionAccess {
        self.access
    }

    /// What; `access().bytes()` bytes.
    pub fn data(&self) -> &[u8] {
        &self.data
    }
}

/// DEVICE_SET_IRQS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetIrqs {
    /// Interrupt index (`VFIO_PCI_*_IRQ_INDEX`), unchecked against the device.
    pub index: u32,
    /// What to do with it.
    pub operation: IrqOperation,
}

/// What SET_IRQS does. `start + count` never exceeds `limits::IRQ_COUNT_MAX`, counts are at least 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IrqOperation {
    /// Turn off all interrupts of the index.
    DisableAll,
    /// From now on use these eventfds for the action, one per interrupt from `start`.
    Assign {
        /// Which action signals them (`Trigger`: the interrupt itself).
        action: IrqAction,
        /// First interrupt.
        start: u32,
        /// One each; not empty.
        eventfds: Vec<FdSlot>,
    },
    /// Forget the eventfds of the action.
    Deassign {
        /// Which action's.
        action: IrqAction,
        /// First interrupt.
        start: u32,
        /// Number of interrupts.
        count: u32,
    },
    /// Do the action now, on each interrupt of the range.
    Act {
        /// What.
        action: IrqAction,
        /// First interrupt.
        start: u32,
        /// Number of interrupts.
        count: u32,
    },
    /// Do the action now, where the flag is set.
    ActWhere {
        /// What.
        action: IrqAction,
        /// First interrupt.
        start: u32,
        /// One each; not empty.
        selected: Vec<bool>,
    },
}

/// The three actions on an interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum IrqAction {
    /// Mask it.
    Mask,
    /// Unmask it.
    Unmask,
    /// Trigger it.
    Trigger,
}

/// DEVICE_FEATURE.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceFeature {
    /// Feature index (`VFIO_DEVICE_FEATURE_*`).
    pub feature: u16,
    /// What to do with it.
    pub operation: FeatureOperation,
    /// The feature's own data; at most `DATA_BYTES_MAX`.
    pub data: Vec<u8>,
    /// The request's flags word, which the reply repeats.
    pub flags: u32,
}

/// What DEVICE_FEATURE does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeatureOperation {
    /// Read the feature's data.
    Get,
    /// Write the feature's data.
    Set,
    /// Only say whether these would work.
    Probe {
        /// Ask for get.
        get: bool,
        /// Ask for set.
        set: bool,
    },
}

/// Why a well-framed request was refused. The client has its error reply; this is for the log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Type bits neither command nor reply.
    #[error("message type {0} is neither command nor reply")]
    MessageType(u32),
    /// Reserved header bits, or an error in a command.
    #[error("header of a command has reserved bits set")]
    HeaderReserved,
    /// Body of the wrong length.
    #[error("body has {actual} bytes, the command needs {needed}")]
    BodyLength {
        /// Bytes that came.
        actual: usize,
        /// Bytes that the command's fixed part, or its own count, asks for.
        needed: usize,
    },
    /// `argsz` smaller than the fixed part.
    #[error("argsz is {actual}, at least {needed} is needed")]
    Argsz {
        /// What came.
        actual: u32,
        /// What is needed.
        needed: u32,
    },
    /// Flags unknown or contradictory.
    #[error("flags {0:#x} are unknown or contradict each other")]
    Flags(u32),
    /// A field that must be zero is not.
    #[error("a field that must be zero is not")]
    Reserved,
    /// A DMA range that is empty or wraps.
    #[error("DMA range at {iova:#x} of {bytes:#x} bytes is empty or wraps")]
    DmaRange {
        /// First address.
        iova: u64,
        /// Length.
        bytes: u64,
    },
    /// A file offset past what a file can have.
    #[error("file offset {0:#x} of a DMA map is too large")]
    FileOffset(u64),
    /// A region access that is empty, too large or wraps.
    #[error("region access of {bytes} bytes at {offset:#x} is empty, too large or wraps")]
    Access {
        /// Bytes from the region's start.
        offset: u64,
        /// Length.
        bytes: u32,
    },
    /// More interrupts than any device has, or none.
    #[error("interrupts {start} + {count} are none or out of range")]
    IrqRange {
        /// First interrupt.
        start: u32,
        /// Number.
        count: u32,
    },
    /// A number of writes that is zero, too large, or not what the body holds.
    #[error("REGION_WRITE_MULTI announces {0} writes")]
    WriteCount(u64),
    /// The wrong number of descriptors.
    #[error("{actual} descriptors came, {expected} were expected")]
    Descriptors {
        /// How many came.
        actual: usize,
        /// How many the request could use.
        expected: usize,
    },
    /// Descriptors were lost in the kernel, because this process has too many.
    #[error("descriptors of the message were lost: this process is at its limit of open files")]
    DescriptorsLost,
    /// Not a command a server takes, or one this server does not offer.
    #[error("command {0} is unknown or not offered")]
    Command(u16),
    /// Something other than VERSION came first.
    #[error("command {0} before VERSION was accepted")]
    BeforeVersion(u16),
    /// A second VERSION.
    #[error("VERSION a second time")]
    VersionAgain,
    /// VERSION wants no reply.
    #[error("VERSION with the no-reply bit")]
    VersionPosted,
    /// A major version that is not ours.
    #[error("protocol major version {0}, this server speaks 0")]
    VersionMajor(u16),
    /// The JSON of VERSION is too long, not terminated, or not what the specification says.
    #[error("capabilities of VERSION are not a NUL-terminated JSON object of the specified form")]
    VersionJson,
}

impl Refusal {
    /// The one table from refusal to errno.
    pub fn errno(self) -> Errno {
        match self {
            Refusal::Command(_) => Errno::EOPNOTSUPP,
            Refusal::DescriptorsLost => Errno::EMFILE,
            Refusal::VersionMajor(_) => Errno::EOPNOTSUPP,
            Refusal::VersionAgain => Errno::EBUSY,
            _ => Errno::EINVAL,
        }
    }
}
