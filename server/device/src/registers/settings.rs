//! What the operator chose for a device, checked.
//!
//! In: numbers of the configuration. Out: [`Settings`] that cannot be wrong. Must never know: where the configuration stands.

use serde::{Deserialize, Serialize};
use vmgmt_abi::registers::{RINGS_MAX, VECTORS_MAX};

/// What a device looks like, and what its client may use up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// Number of the session, never used again.
    pub session: u64,
    /// Number of the VM.
    pub vm: u64,
    pub pci_vendor: u16,
    pub pci_device: u16,
    /// Offer MSI-X instead of MSI.
    pub msix: bool,
    /// Interrupt vectors: 1 to 16, a power of two.
    pub vectors: u8,
    /// Ring pairs: 1 to 16.
    pub rings: u8,
    /// DMA maps at most; what the front page has room for bounds it too.
    pub maps_max: u32,
    /// Bytes of guest memory mapped at most, in all.
    pub mapped_bytes_max: u64,
    /// Memory objects that maps may name at most.
    pub objects_max: u32,
    /// Feature bits offered to the driver ([`vmgmt_abi::feature`]).
    pub features: u64,
}

/// A setting that no device can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SettingsError {
    #[error("{0} interrupt vectors: choose 1, 2, 4, 8 or {VECTORS_MAX}")]
    Vectors(u8),
    #[error("{0} ring pairs: choose 1 to {RINGS_MAX}")]
    Rings(u8),
    #[error("vendor {0:#06x}: choose one from 0x0001 to 0xfffe")]
    Vendor(u16),
}

impl Settings {
    /// Checks all of them.
    ///
    /// # Errors
    /// The first setting that is out of its range.
    pub fn check(&self) -> Result<(), SettingsError> {
        if !self.vectors.is_power_of_two() || usize::from(self.vectors) > VECTORS_MAX {
            return Err(SettingsError::Vectors(self.vectors));
        }
        if self.rings == 0 || usize::from(self.rings) > RINGS_MAX {
            return Err(SettingsError::Rings(self.rings));
        }
        if matches!(self.pci_vendor, 0 | 0xffff) {
            return Err(SettingsError::Vendor(self.pci_vendor));
        }
        Ok(())
    }
}
