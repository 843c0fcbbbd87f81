//! BAR4 where MSI-X is configured: the vector table, which the client keeps for itself too, and the pending bits.
//!
//! In: reads and writes. Out: bytes. Must never know: which eventfd a vector has (SET_IRQS says so).

use super::limits::MSIX_PENDING_OFFSET;
use vmgmt_wire::pci::{PCI_MSIX_ENTRY_CTRL_MASKBIT, PCI_MSIX_ENTRY_SIZE, PCI_MSIX_ENTRY_VECTOR_CTRL};

/// The table's bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MsixTable {
    bytes: Vec<u8>,
}

impl MsixTable {
    /// All vectors masked, as after a reset.
    pub fn new(vectors: u8) -> Self {
        let entry = usize::from(PCI_MSIX_ENTRY_SIZE);
        let mut bytes = vec![0; entry * usize::from(vectors)];
        for entry in bytes.chunks_exact_mut(entry) {
            entry[usize::from(PCI_MSIX_ENTRY_VECTOR_CTRL)] = PCI_MSIX_ENTRY_CTRL_MASKBIT as u8;
        }
        Self { bytes }
    }

    /// Fills `into` from `offset` on; `pending` are the vectors whose interrupt is due.
    pub fn read(&self, offset: u64, into: &mut [u8], pending: u32) {
        for (position, byte) in (offset..).zip(into) {
            *byte = match position.checked_sub(MSIX_PENDING_OFFSET) {
                Some(index) => (u64::from(pending))
                    .to_le_bytes()
                    .get(index as usize)
                    .copied()
                    .unwrap_or(0),
                None => self.bytes.get(position as usize).copied().unwrap_or(0),
            };
        }
    }

    /// Stores 4 or 8 aligned bytes; anything else is ignored, as the specification allows no other access.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let aligned = matches!(data.len(), 4 | 8) && offset.is_multiple_of(data.len() as u64);
        let target = usize::try_from(offset)
            .ok()
            .and_then(|start| self.bytes.get_mut(start..start + data.len()));
        if let (true, Some(target)) = (aligned, target) {
            target.copy_from_slice(data);
        }
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Takes saved bytes in.
    ///
    /// # Errors
    /// Another number of vectors.
    pub fn restore(mut self, bytes: &[u8]) -> Result<Self, &'static str> {
        if bytes.len() != self.bytes.len() {
            return Err("an MSI-X table of another size");
        }
        self.bytes.copy_from_slice(bytes);
        Ok(self)
    }
}
