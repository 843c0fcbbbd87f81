//! What can go wrong between a guest program and its device, with words that say what to do.
//!
//! Errors named `Device…` mean that the device (or whoever stands behind it) broke the contract: the ring that saw it
//! is given up. `Refused` is the honest answer "no" of the host.

use std::io;
use std::time::Duration;

use vmgmt_abi::file::unknown;
use vmgmt_abi::{Budget, Opcode, Status};

/// Result of everything in this crate.
pub type Result<T> = std::result::Result<T, DriverError>;

/// The host's answer to one submission, when it was not OK.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub opcode: Opcode,
    pub status: Status,
    /// The budget with OVER_BUDGET, else as the opcode says.
    pub detail: u32,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}: {}", self.opcode, self.status.describe())?;
        match self.status {
            Status::OVER_BUDGET => write!(f, " ({})", Budget(self.detail).describe()),
            Status::OUTCOME_UNKNOWN if self.detail == unknown::NOT_DURABLE => f.write_str(
                " (the file is there, under its name, and whole; only whether it would be after a power cut is not known)",
            ),
            status if status.name().is_none() => write!(f, " (status {})", status.0),
            _ => Ok(()),
        }
    }
}

/// All errors of the driver.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// No such PCI function, or more than one and none was named.
    #[error("{0}")]
    NoDevice(String),
    /// Something of the machine's set-up is missing; the text says what and how to mend it.
    #[error("{0}")]
    SetUp(String),
    /// Another program drives the device.
    #[error("the device {device} is in use by process {holder}: stop it, or wait for it (--wait-device)")]
    InUse { device: String, holder: String },
    /// A system call failed.
    #[error("{what}: {cause}")]
    System { what: String, cause: io::Error },
    /// Reading or writing the program's own file failed.
    #[error("{what}: {cause}")]
    File { what: String, cause: io::Error },

    #[error(
        "the device does not answer (its registers read all ones): the host daemon's connection to this VM is gone, plug the device anew"
    )]
    DeviceAbsent,
    #[error("not a vmgmt device: it identifies itself as {found:#010x}")]
    DeviceMagic { found: u32 },
    #[error("the device speaks version {}.{} of the contract, this driver {}.x: install the driver that belongs to the host daemon", found >> 16, found & 0xffff, vmgmt_abi::ABI_VERSION >> 16)]
    DeviceVersion { found: u32 },
    #[error("the device states an impossible limit: {what} is {value}")]
    DeviceLimit { what: &'static str, value: u64 },
    #[error("the device is quarantined: the host's operator must release it (vmgmtctl release)")]
    DeviceQuarantined,
    #[error("the device is in FAILED state: {}", .0.describe())]
    DeviceFailed(Status),
    #[error("{what} took longer than {waited:?}")]
    DeviceTimeout { what: &'static str, waited: Duration },
    /// The device was reset or replaced behind the driver's back (a restored VM, another session).
    #[error("the device was reset or replaced meanwhile: what was in flight is lost")]
    DeviceReplaced,
    #[error("the device broke the contract: {0}")]
    DeviceContract(String),

    #[error("the device refused to open the ring: {}", .0.describe())]
    RingRefused(Status),
    #[error("{0}")]
    Refused(Refusal),
    #[error("interrupted")]
    Interrupted,
    #[error("no answer in time")]
    TimedOut,
    #[error("as many submissions are in flight as the channel takes ({0})")]
    Full(usize),
    #[error("bytes {start}..{start}+{length} are not within memory of {memory_bytes} bytes (or not aligned)")]
    Bounds {
        start: usize,
        length: usize,
        memory_bytes: usize,
    },
    #[error(
        "the buffer needs a list of {entries} pieces and {entries_max} are possible: reserve huge pages (vm.nr_hugepages) or use a smaller buffer"
    )]
    TooScattered { entries: usize, entries_max: usize },
    #[error("bad argument: {0}")]
    BadArgument(String),
    #[error("{0} is not possible with this backing ({1})")]
    NotPossible(&'static str, &'static str),
    #[error("checksum mismatch: {what} has crc32 {found:08x}, expected {expected:08x}")]
    Integrity { what: String, expected: u32, found: u32 },
    #[error("{0} changed while it was read")]
    Changed(String),
}

impl DriverError {
    /// A system call's error with what was being done.
    pub fn system(what: impl Into<String>, cause: impl Into<io::Error>) -> Self {
        Self::System {
            what: what.into(),
            cause: cause.into(),
        }
    }

    /// An error of the program's own file with what was being done.
    pub fn file(what: impl Into<String>, cause: impl Into<io::Error>) -> Self {
        Self::File {
            what: what.into(),
            cause: cause.into(),
        }
    }

    /// A broken contract, in words.
    pub fn contract(what: impl Into<String>) -> Self {
        Self::DeviceContract(what.into())
    }

    /// The host's status, when this is an honest refusal.
    #[must_use]
    pub const fn status(&self) -> Option<Status> {
        match self {
            Self::Refused(refusal) => Some(refusal.status),
            Self::RingRefused(status) => Some(*status),
            _ => None,
        }
    }

    /// Whether setting up again (`Client::reopen`) and repeating is likely to help.
    #[must_use]
    pub fn is_recoverable(&self) -> bool {
        matches!(self, Self::DeviceReplaced | Self::DeviceFailed(_))
            || matches!(self.status(), Some(Status::STALE | Status::NOT_READY))
    }
}
