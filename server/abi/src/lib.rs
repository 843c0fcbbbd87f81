//! The device contract: everything that a vmgmt device and a guest's driver must agree on, and nothing else.
//!
//! Both sides use this crate; there is no second definition. Numbers are explicit, sizes and offsets are pinned by
//! compile-time assertions here and by a golden dump in a test. All words are little-endian. Reserved fields must be
//! zero and are checked. A number that is not named here is legal data from a peer and gets a clean error.
//!
//! What must never come in here: anything of vfio-user, of Linux, of the host.
#![no_std]
#![forbid(unsafe_code)]

pub mod chat;
pub mod file;
pub mod operation;
pub mod port;
pub mod registers;
pub mod ring;
pub mod status;

pub use operation::{Mode, Opcode};
pub use ring::{Completion, ListEntry, Submission};
pub use status::{Budget, Status};

/// PCI vendor of the device: the range that Red Hat reserves for experiments.
pub const PCI_VENDOR: u16 = 0x1af4;
/// PCI device of the default identity (1af4:10f0).
pub const PCI_DEVICE: u16 = 0x10f0;
/// PCI class: base 08 (system peripheral), sub 80 (other), interface 00.
pub const PCI_CLASS: u32 = 0x08_80_00;

/// "VMGM", read at offset 0 of BAR0.
pub const MAGIC: u32 = 0x4d47_4d56;
/// Version of this contract: major in the upper half (a driver refuses another), minor in the lower (additions only).
pub const ABI_VERSION: u32 = 1 << 16;

/// The longest name of a VM, a share or a service, in bytes of UTF-8.
pub const NAME_BYTES_MAX: usize = 63;
/// The longest path within a share, in bytes of UTF-8.
pub const PATH_BYTES_MAX: usize = 4096 - 256;

/// Feature bits (BAR0 `FEATURES`); a driver acknowledges the ones it uses.
pub mod feature {
    /// Event suppression through words in guest memory, both ways.
    pub const EVENT_SUPPRESSION: u64 = 1 << 0;
    /// The host's page: answers of the host that the guest reads without leaving the VM.
    pub const HOST_PAGE: u64 = 1 << 1;
    /// File mode is there.
    pub const MODE_FILE: u64 = 1 << 8;
    /// Chat mode is there.
    pub const MODE_CHAT: u64 = 1 << 9;
    /// Statistics mode is there.
    pub const MODE_STATISTICS: u64 = 1 << 10;
    /// Calculation mode is there.
    pub const MODE_CALCULATION: u64 = 1 << 11;
}
