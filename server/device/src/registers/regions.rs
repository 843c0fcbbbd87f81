//! The regions of the function: which there are, and where an access goes.
//!
//! In: region accesses of the client. Out: data; replies, held where the write ended DMA. Must never know: what a register does.

use super::fences::HeldReply;
use super::function::Function;
use super::limits;
use crate::page::Words;
use crate::tick::Tick;
use vmgmt_abi::port::BAR2_BYTES;
use vmgmt_abi::registers::BAR0_BYTES;
use vmgmt_wire::uapi::*;
use vmgmt_wire::{Errno, RegionAccess, RegionInfo, RegionWrite, Reply, ReplyHandle};

impl<W: Words> Function<W> {
    /// Bytes of a region; `None` where PCI has no such region.
    fn region_bytes(&self, region: u32) -> Option<u64> {
        match region {
            VFIO_PCI_BAR0_REGION_INDEX => Some(BAR0_BYTES as u64),
            VFIO_PCI_BAR2_REGION_INDEX => Some(BAR2_BYTES as u64),
            VFIO_PCI_BAR4_REGION_INDEX if self.settings.msix => Some(limits::MSIX_BAR_BYTES),
            VFIO_PCI_CONFIG_REGION_INDEX => Some(limits::CONFIG_BYTES),
            _ if region < VFIO_PCI_NUM_REGIONS => Some(0),
            _ => None,
        }
    }

    pub(super) fn region_info(&self, region: u32) -> Result<RegionInfo, Errno> {
        let bytes = self.region_bytes(region).ok_or(Errno::EINVAL)?;
        // Never MMAP: one region with it makes the client wait for every write of the device.
        let flags = if bytes == 0 {
            0
        } else {
            VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE
        };
        Ok(RegionInfo {
            flags,
            region,
            bytes,
            ..RegionInfo::default()
        })
    }

    /// Refuses an access that leaves its region, or a region that is not there.
    fn check_access(&self, access: RegionAccess) -> Result<(), Errno> {
        match self.region_bytes(access.region()) {
            Some(bytes) if access.end() <= bytes => Ok(()),
            _ => Err(Errno::EINVAL),
        }
    }

    pub(super) fn region_read(&mut self, access: RegionAccess) -> Result<Vec<u8>, Errno> {
        self.check_access(access)?;
        let mut data = vec![0; access.bytes() as usize];
        match access.region() {
            VFIO_PCI_BAR0_REGION_INDEX => self.read_memory_bar(access.offset(), &mut data),
            VFIO_PCI_BAR2_REGION_INDEX => self.read_port_bar(access.offset(), &mut data),
            VFIO_PCI_BAR4_REGION_INDEX => self.msix.read(access.offset(), &mut data, self.pending()),
            _ => self.config.read(access.offset(), &mut data, self.intx_status()),
        }
        Ok(data)
    }

    pub(super) fn region_write(&mut self, now: Tick, handle: ReplyHandle, write: &RegionWrite) {
        let fence = self.page.fence();
        let done = self.write_one(write);
        match done {
            Ok(waits) if waits && self.page.fence() != fence => {
                self.hold(now, handle, HeldReply::RegionWrite(write.access()));
            }
            done => self.answer(handle, done.map(|_| Reply::RegionWrite(write.access()))),
        }
    }

    pub(super) fn region_writes(&mut self, now: Tick, handle: ReplyHandle, writes: &[RegionWrite]) {
        let fence = self.page.fence();
        let mut waits = false;
        for write in writes {
            match self.write_one(write) {
                Ok(wait) => waits |= wait,
                Err(errno) => return self.answer(handle, Err(errno)),
            }
        }
        let count = writes.len() as u64;
        if waits && self.page.fence() != fence {
            self.hold(now, handle, HeldReply::RegionWriteMulti(count));
        } else {
            self.answer(handle, Ok(Reply::RegionWriteMulti { count }));
        }
    }

    /// True: a write of the kind that waits for the fences it moved (configuration space).
    fn write_one(&mut self, write: &RegionWrite) -> Result<bool, Errno> {
        let access = write.access();
        self.check_access(access)?;
        match access.region() {
            VFIO_PCI_BAR0_REGION_INDEX => self.write_memory_bar(access.offset(), write.data()),
            VFIO_PCI_BAR2_REGION_INDEX => self.write_port_bar(access.offset(), write.data()),
            VFIO_PCI_BAR4_REGION_INDEX => self.msix.write(access.offset(), write.data()),
            _ => {
                if self.config.write(access.offset(), write.data()) {
                    self.function_reset();
                } else {
                    self.publish_control();
                }
                return Ok(true);
            }
        }
        Ok(false)
    }
}
