//! The parts of the configuration that travel to the roles.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A socket that VMs come in by.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListenerConfig {
    /// Number given by the keeper, never used again.
    pub listener: u32,
    pub path: PathBuf,
    /// Permission bits of the socket file.
    pub mode: u32,
    /// Group of the socket file, by name or number; `None`: as it comes.
    pub group: Option<String>,
    pub identity: Identity,
    pub device: DeviceConfig,
}

/// Who comes in by a socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Identity {
    /// One VM: the socket is the identity.
    Vm {
        /// Number of the VM ([`VmConfig::vm`]).
        vm: u64,
    },
    /// Any number of VMs, each a new one per QEMU process, with these grants; it ends with the process.
    Anonymous(Box<VmConfig>),
}

/// What the device of a session looks like.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceConfig {
    pub pci_vendor: u16,
    pub pci_device: u16,
    /// Offer MSI-X instead of MSI.
    pub msix: bool,
    /// Interrupt vectors, 1 to 16, a power of two.
    pub vectors: u8,
    /// Ring pairs, 1 to 16.
    pub rings: u8,
    /// Devices that may be connected at the same time under one VM.
    pub devices_max: u32,
    /// DMA maps per session.
    pub maps_max: u32,
    /// Bytes of guest memory that a session may map in all.
    pub mapped_bytes_max: u64,
    /// Memory objects (descriptors) per session.
    pub objects_max: u32,
}

/// A VM, as the core sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmConfig {
    /// Number given by the keeper, never used again.
    pub vm: u64,
    pub name: String,
    pub shares: Vec<ShareGrant>,
    /// VMs it may reach; empty: all.
    pub reach: Vec<String>,
    /// May send to all.
    pub send_to_all: bool,
    pub limits: VmLimits,
    /// Ends with its last session (a VM of a shared socket).
    pub transient: bool,
}

/// A share granted to a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShareGrant {
    /// Name of a [`ShareConfig`].
    pub share: String,
    pub access: Access,
}

/// What a VM may do in a share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Access {
    ReadOnly,
    ReadWrite,
}

/// Budgets of a VM. Defaults are generous and written down in the README.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmLimits {
    pub submissions_per_second_max: u64,
    pub bytes_per_second_max: u64,
    pub bytes_in_flight_max: u64,
    pub submissions_in_flight_max: u32,
    pub open_files_max: u32,
    pub mailbox_bytes_max: u64,
    /// Messages that wait in the mailbox longer than this are dropped (and counted), in seconds.
    pub mailbox_seconds_max: u64,
    pub message_bytes_max: u64,
    pub offers_max: u32,
    pub receives_max: u32,
}

/// A directory of the host that VMs can be granted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShareConfig {
    pub name: String,
    pub path: PathBuf,
    /// Bytes that VMs may put there in all; `None`: as much as the file system holds.
    pub bytes_max: Option<u64>,
    /// Files that VMs may make there in all.
    pub files_max: Option<u64>,
}

/// What the core needs at its start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoreConfig {
    pub shares: Vec<ShareConfig>,
    /// How long the core polls the rings after its last work before it sleeps, in nanoseconds.
    pub poll_ns: u64,
    /// Worker threads for what can sleep on a disk.
    pub workers: u32,
    /// The sockets, for `vmgmtctl qemu-args`: (VM's name or none for a shared one, path).
    pub sockets: Vec<(Option<String>, PathBuf)>,
}

impl Default for DeviceConfig {
    fn default() -> Self {
        Self {
            pci_vendor: vmgmt_abi::PCI_VENDOR,
            pci_device: vmgmt_abi::PCI_DEVICE,
            msix: false,
            vectors: 16,
            rings: 16,
            devices_max: 1,
            maps_max: 65_536,
            mapped_bytes_max: 1 << 44,
            objects_max: 64,
        }
    }
}

impl Default for VmLimits {
    fn default() -> Self {
        Self {
            submissions_per_second_max: u64::MAX,
            bytes_per_second_max: u64::MAX,
            bytes_in_flight_max: 1 << 30,
            submissions_in_flight_max: 8192,
            open_files_max: 1024,
            mailbox_bytes_max: 4 << 20,
            mailbox_seconds_max: 24 * 3600,
            message_bytes_max: 1 << 20,
            offers_max: 64,
            receives_max: 1024,
        }
    }
}
