//! RAM of the simulated guest: a memfd at a DMA address, given out in stretches.
//!
//! In: how the memory is shared with the server. Out: [`DmaMemory`] for the driver; the descriptor that the server is to get. It
//! must never know the socket.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};

use vmgmt_driver::{DmaMemory, DriverError, Result};

use crate::client::{ClientError, GuestRam, Seal};
use crate::process::locked;

const PAGE_BYTES: u64 = 4096;
/// Where RAM begins for the device: above 4 GiB, so that a lost upper half of an address is seen.
pub const RAM_BASE: u64 = 1 << 32;

/// How the server sees the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// A descriptor, sealed against shrinking (QEMU's memfd backend with share=on).
    Sealed,
    /// A descriptor of a file that its owner can make smaller.
    Unsealed,
    /// No descriptor: DMA goes by messages (QEMU's plain `-m`).
    Messages,
    /// A descriptor of *other* memory (QEMU's share=off): reads give zeros, writes are lost, and nothing says so.
    OtherMemory,
}

/// The guest's RAM.
pub struct GuestMemory {
    ram: Arc<GuestRam>,
    decoy: Option<GuestRam>,
    sharing: Sharing,
    /// Pages in reverse order, so that no two neighbours meet: buffers become lists.
    scattered: bool,
    free: Mutex<Free>,
}

struct Free {
    /// Offset to bytes, neighbours joined.
    stretches: BTreeMap<u64, u64>,
    /// Bytes below this were used before and are to be zeroed.
    used: u64,
}

impl GuestMemory {
    /// `bytes` of zeros, whole pages.
    pub fn new(bytes: u64, sharing: Sharing, scattered: bool) -> std::result::Result<Arc<Self>, ClientError> {
        let seal = match sharing {
            Sharing::Unsealed => Seal::None,
            _ => Seal::Shrink,
        };
        let decoy = match sharing {
            Sharing::OtherMemory => Some(GuestRam::new(bytes, seal)?),
            _ => None,
        };
        Ok(Arc::new(Self {
            ram: Arc::new(GuestRam::new(bytes, seal)?),
            decoy,
            sharing,
            scattered,
            free: Mutex::new(Free {
                stretches: BTreeMap::from([(0, bytes)]),
                used: 0,
            }),
        }))
    }

    /// The memory itself: offset 0 is at [`Self::base`].
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// DMA address of its first byte.
    pub const fn base(&self) -> u64 {
        RAM_BASE
    }

    /// Bytes.
    pub fn bytes(&self) -> u64 {
        self.ram.bytes()
    }

    /// How it is shared.
    pub const fn sharing(&self) -> Sharing {
        self.sharing
    }

    /// What goes with DMA_MAP.
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match (self.sharing, &self.decoy) {
            (Sharing::Messages, _) => None,
            (_, Some(decoy)) => Some(decoy.fd()),
            _ => Some(self.ram.fd()),
        }
    }

    /// Whether DMA has to go by messages.
    pub const fn needs_messages(&self) -> bool {
        matches!(self.sharing, Sharing::Messages | Sharing::OtherMemory)
    }

    /// Zeroed memory; it comes back when the `DmaMemory` is dropped. One page is always one piece.
    pub fn allocate(self: &Arc<Self>, bytes: usize) -> Result<DmaMemory> {
        let length = (bytes.max(1) as u64).next_multiple_of(PAGE_BYTES);
        let (offset, dirty) = self.take(length)?;
        let stretches: Vec<(u64, usize, u64)> = if self.scattered {
            (0..length / PAGE_BYTES)
                .rev()
                .map(|page| offset + page * PAGE_BYTES)
                .map(|page| (page, PAGE_BYTES as usize, RAM_BASE + page))
                .collect()
        } else {
            vec![(offset, length as usize, RAM_BASE + offset)]
        };
        let memory = DmaMemory::map_file_pages(self.ram.fd(), &stretches)?;
        if dirty {
            let zeros = [0; PAGE_BYTES as usize];
            for start in (0..memory.len()).step_by(zeros.len()) {
                memory.write(start, &zeros)?;
            }
        }
        let owner = Arc::clone(self);
        Ok(memory.and_then_release(move || owner.give_back(offset, length)))
    }

    fn take(&self, length: u64) -> Result<(u64, bool)> {
        let mut free = locked(&self.free);
        let found = free.stretches.iter().find(|(_, bytes)| **bytes >= length);
        let Some((offset, bytes)) = found.map(|(offset, bytes)| (*offset, *bytes)) else {
            return Err(DriverError::SetUp(format!(
                "no {length} bytes of the simulated guest's memory are free in one stretch: give it more"
            )));
        };
        free.stretches.remove(&offset);
        if bytes > length {
            free.stretches.insert(offset + length, bytes - length);
        }
        let dirty = offset < free.used;
        free.used = free.used.max(offset + length);
        Ok((offset, dirty))
    }

    fn give_back(&self, offset: u64, length: u64) {
        let stretches = &mut locked(&self.free).stretches;
        let mut start = offset;
        let mut end = offset + length;
        if let Some((before, bytes)) = stretches.range(..offset).next_back().map(|(k, v)| (*k, *v))
            && before + bytes == offset
        {
            stretches.remove(&before);
            start = before;
        }
        if let Some(bytes) = stretches.remove(&end) {
            end += bytes;
        }
        stretches.insert(start, end - start);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a failing step fails the test
mod tests {
    use super::*;

    #[test]
    fn memory_comes_back_zeroed_and_joined() {
        let memory = GuestMemory::new(8 * PAGE_BYTES, Sharing::Sealed, false).unwrap();
        let parts: Vec<_> = (0..8).map(|_| memory.allocate(1).unwrap()).collect();
        assert!(memory.allocate(1).is_err());
        for part in &parts {
            part.store64(8, u64::MAX).unwrap();
        }
        drop(parts);
        let whole = memory.allocate(8 * PAGE_BYTES as usize).unwrap();
        assert_eq!(whole.pieces().len(), 1);
        assert!(
            whole
                .to_vec(0, whole.len())
                .unwrap()
                .iter()
                .all(|byte| *byte == 0)
        );
    }

    #[test]
    fn scattered_memory_is_many_pieces_of_the_same_bytes() {
        let memory = GuestMemory::new(8 * PAGE_BYTES, Sharing::Sealed, true).unwrap();
        let part = memory.allocate(3 * PAGE_BYTES as usize).unwrap();
        assert_eq!(part.pieces().len(), 3);
        part.write(PAGE_BYTES as usize - 2, b"abcd").unwrap();
        let (first, second) = (part.pieces()[0].address, part.pieces()[1].address);
        let ram = memory.ram();
        assert_eq!(ram.read(first - RAM_BASE + PAGE_BYTES - 2, 2).unwrap(), b"ab");
        assert_eq!(ram.read(second - RAM_BASE, 2).unwrap(), b"cd");
    }
}
