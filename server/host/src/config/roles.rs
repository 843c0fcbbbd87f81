//! The parts of the configuration that travel to the roles.

use crate::sandbox::SandboxConfig;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
pub use vmgmt_core::policy::{Access, ShareGrant, VmConfig, VmLimits};

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
    /// What a VM that is added at run time gets.
    pub device: DeviceConfig,
    /// The same: its budgets.
    pub vm_limits: VmLimits,
    pub sandbox: SandboxConfig,
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
