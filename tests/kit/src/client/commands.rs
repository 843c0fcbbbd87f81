//! The commands of the specification, one method each.
//!
//! In: plain arguments, also senseless ones. Out: the reply's fields, checked against the request. Must
//! never know: what this server's device is.

use std::os::fd::{AsFd, BorrowedFd};

use super::{Client, ClientError, QEMU_CAPABILITIES, RawMessage, broken, command};

/// SET_IRQS flags.
pub mod irq {
    #![allow(missing_docs)] // the names say it
    pub const DATA_NONE: u32 = 1 << 0;
    pub const DATA_BOOL: u32 = 1 << 1;
    pub const DATA_EVENTFD: u32 = 1 << 2;
    pub const MASK: u32 = 1 << 3;
    pub const UNMASK: u32 = 1 << 4;
    pub const TRIGGER: u32 = 1 << 5;
    pub const INTX: u32 = 0;
    pub const MSI: u32 = 1;
    pub const MSIX: u32 = 2;
    pub const ERR: u32 = 3;
    pub const REQ: u32 = 4;
}

/// Reply to DEVICE_GET_INFO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Bytes the full reply needs.
    pub argsz: u32,
    /// Bit 0: can be reset; bit 1: is PCI.
    pub flags: u32,
    /// Number of regions.
    pub regions: u32,
    /// Number of interrupt indexes.
    pub irqs: u32,
}

/// Reply to DEVICE_GET_REGION_INFO.
#[derive(Debug)]
pub struct RegionInfo {
    /// Bytes the full reply needs.
    pub argsz: u32,
    /// Bit 0: readable; 1: writable; 2: mappable; 3: has capabilities.
    pub flags: u32,
    /// Where in the body the first capability starts.
    pub cap_offset: u32,
    /// Bytes of the region.
    pub bytes: u64,
    /// The whole reply, with capabilities and descriptors.
    pub raw: RawMessage,
}

/// Reply to DEVICE_GET_IRQ_INFO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IrqInfo {
    /// Bit 0: eventfds; 1: maskable; 2: masks itself; 3: set up as a whole.
    pub flags: u32,
    /// Number of interrupts.
    pub count: u32,
}

/// Arguments of DMA_MAP.
#[derive(Clone, Copy, Debug)]
pub struct Mapping<'a> {
    /// First DMA address.
    pub iova: u64,
    /// Bytes.
    pub bytes: u64,
    /// Bit 0: readable; bit 1: writable.
    pub flags: u32,
    /// The memory and the offset in its file; none for memory reached by messages only.
    pub memory: Option<(BorrowedFd<'a>, u64)>,
}

/// One write of REGION_WRITE_MULTI; at most 8 bytes.
#[derive(Clone, Copy, Debug)]
pub struct Write<'a> {
    /// Region index.
    pub region: u32,
    /// Bytes from its start.
    pub offset: u64,
    /// What to write.
    pub data: &'a [u8],
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Body of a region access.
pub fn access_body(region: u32, offset: u64, count: u32, data: &[u8]) -> Vec<u8> {
    let mut body = offset.to_le_bytes().to_vec();
    body.extend(words(&[region, count]));
    body.extend_from_slice(data);
    body
}

fn same(reply: &[u8], expected: &[u8], what: &str) -> Result<(), ClientError> {
    if reply == expected {
        Ok(())
    } else {
        broken(format!("{what}: reply {reply:?}, expected {expected:?}"))
    }
}

impl Client {
    /// VERSION as QEMU 11.1.3 sends it; the server's JSON. Checks what QEMU checks.
    pub fn negotiate(&mut self) -> Result<serde_json::Value, ClientError> {
        let mut body = vec![0; 4];
        body.extend_from_slice(QEMU_CAPABILITIES.as_bytes());
        body.push(0);
        self.negotiate_with(&body)
    }

    /// VERSION with any body; the server's JSON.
    pub fn negotiate_with(&mut self, body: &[u8]) -> Result<serde_json::Value, ClientError> {
        let reply = self.request(command::VERSION, body, &[])?;
        if reply.u32_at(0)? != 0 {
            return broken("the server's version is not 0.0");
        }
        if reply.body.len() + 16 > 214 {
            return broken(format!(
                "VERSION reply of {} bytes: QEMU takes 214",
                reply.body.len() + 16
            ));
        }
        let Some((0, json)) = reply.body[4..].split_last() else {
            return broken("capabilities without a NUL at the end");
        };
        serde_json::from_slice(json).map_err(|error| ClientError::Protocol(format!("capabilities: {error}")))
    }

    /// DEVICE_GET_INFO.
    pub fn get_info(&mut self) -> Result<DeviceInfo, ClientError> {
        let reply = self.request(command::DEVICE_GET_INFO, &words(&[16, 0, 0, 0]), &[])?;
        if reply.body.len() != 16 {
            return broken(format!("device info of {} bytes", reply.body.len()));
        }
        Ok(DeviceInfo {
            argsz: reply.u32_at(0)?,
            flags: reply.u32_at(4)?,
            regions: reply.u32_at(8)?,
            irqs: reply.u32_at(12)?,
        })
    }

    /// DEVICE_GET_REGION_INFO, asking for the fixed part only.
    pub fn region_info(&mut self, region: u32) -> Result<RegionInfo, ClientError> {
        self.region_info_with(region, 32)
    }

    /// DEVICE_GET_REGION_INFO with room for `argsz` bytes.
    pub fn region_info_with(&mut self, region: u32, argsz: u32) -> Result<RegionInfo, ClientError> {
        let mut body = words(&[argsz, 0, region, 0]);
        body.extend([0; 16]);
        let raw = self.request(command::DEVICE_GET_REGION_INFO, &body, &[])?;
        if raw.body.len() > argsz as usize || raw.u32_at(8)? != region {
            return broken(format!("region info {:?} does not fit what was asked", raw.body));
        }
        Ok(RegionInfo {
            argsz: raw.u32_at(0)?,
            flags: raw.u32_at(4)?,
            cap_offset: raw.u32_at(12)?,
            bytes: raw.u64_at(16)?,
            raw,
        })
    }

    /// DEVICE_GET_IRQ_INFO.
    pub fn irq_info(&mut self, index: u32) -> Result<IrqInfo, ClientError> {
        let reply = self.request(command::DEVICE_GET_IRQ_INFO, &words(&[16, 0, index, 0]), &[])?;
        if reply.body.len() != 16 || reply.u32_at(8)? != index {
            return broken(format!("interrupt info {:?}", reply.body));
        }
        Ok(IrqInfo {
            flags: reply.u32_at(4)?,
            count: reply.u32_at(12)?,
        })
    }

    /// DMA_MAP.
    pub fn dma_map(&mut self, mapping: Mapping) -> Result<(), ClientError> {
        let id = self.start_dma_map(mapping)?;
        let reply = self.finish(id)?;
        same(&reply.body, &[], "DMA_MAP")
    }

    /// DMA_MAP without waiting, as QEMU sends them in a row: its id.
    pub fn start_dma_map(&mut self, mapping: Mapping) -> Result<u16, ClientError> {
        let offset = mapping.memory.map_or(0, |(_, offset)| offset);
        let mut body = words(&[32, mapping.flags]);
        for word in [offset, mapping.iova, mapping.bytes] {
            body.extend(word.to_le_bytes());
        }
        let fds: Vec<BorrowedFd> = mapping.memory.iter().map(|(fd, _)| *fd).collect();
        self.start(command::DMA_MAP, &body, &fds)
    }

    /// DMA_UNMAP of one range.
    pub fn dma_unmap(&mut self, iova: u64, bytes: u64) -> Result<(), ClientError> {
        let id = self.start_dma_unmap(iova, bytes)?;
        let reply = self.finish(id)?;
        same(
            reply.body.get(8..).unwrap_or_default(),
            &[iova.to_le_bytes(), bytes.to_le_bytes()].concat(),
            "DMA_UNMAP",
        )
    }

    /// DMA_UNMAP without waiting: its id.
    pub fn start_dma_unmap(&mut self, iova: u64, bytes: u64) -> Result<u16, ClientError> {
        let mut body = words(&[24, 0]);
        body.extend(iova.to_le_bytes());
        body.extend(bytes.to_le_bytes());
        self.start(command::DMA_UNMAP, &body, &[])
    }

    /// SET_IRQS in general.
    pub fn set_irqs(
        &mut self,
        index: u32,
        flags: u32,
        start: u32,
        count: u32,
        data: &[u8],
        fds: &[BorrowedFd],
    ) -> Result<(), ClientError> {
        let mut body = words(&[20 + data.len() as u32, flags, index, start, count]);
        body.extend_from_slice(data);
        let reply = self.request(command::DEVICE_SET_IRQS, &body, fds)?;
        same(&reply.body, &[], "DEVICE_SET_IRQS")
    }

    /// From now on these eventfds are the interrupts of `index`, from `start`.
    pub fn assign_irqs(&mut self, index: u32, start: u32, eventfds: &[impl AsFd]) -> Result<(), ClientError> {
        let fds: Vec<BorrowedFd> = eventfds.iter().map(AsFd::as_fd).collect();
        self.set_irqs(
            index,
            irq::DATA_EVENTFD | irq::TRIGGER,
            start,
            fds.len() as u32,
            &[],
            &fds,
        )
    }

    /// All interrupts of `index` off.
    pub fn disable_irqs(&mut self, index: u32) -> Result<(), ClientError> {
        self.set_irqs(index, irq::DATA_NONE | irq::TRIGGER, 0, 0, &[], &[])
    }

    /// REGION_READ.
    pub fn region_read(&mut self, region: u32, offset: u64, count: u32) -> Result<Vec<u8>, ClientError> {
        let body = access_body(region, offset, count, &[]);
        let mut reply = self.request(command::REGION_READ, &body, &[])?;
        if reply.body.len() != 16 + count as usize {
            return broken(format!(
                "REGION_READ of {count} bytes gave a body of {}",
                reply.body.len()
            ));
        }
        same(&reply.body[..16], &body, "REGION_READ")?;
        Ok(reply.body.split_off(16))
    }

    /// REGION_WRITE that waits.
    pub fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), ClientError> {
        let body = access_body(region, offset, data.len() as u32, data);
        let reply = self.request(command::REGION_WRITE, &body, &[])?;
        same(&reply.body, &body[..16], "REGION_WRITE")
    }

    /// REGION_WRITE without a reply.
    pub fn region_write_posted(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), ClientError> {
        let body = access_body(region, offset, data.len() as u32, data);
        self.post(command::REGION_WRITE, &body, &[]).map(|_| ())
    }

    /// A 32-bit load.
    pub fn read_u32(&mut self, region: u32, offset: u64) -> Result<u32, ClientError> {
        let data = self.region_read(region, offset, 4)?;
        Ok(u32::from_le_bytes([data[0], data[1], data[2], data[3]]))
    }

    /// A 32-bit store that waits.
    pub fn write_u32(&mut self, region: u32, offset: u64, value: u32) -> Result<(), ClientError> {
        self.region_write(region, offset, &value.to_le_bytes())
    }

    /// REGION_WRITE_MULTI, with a reply or posted (as QEMU does).
    pub fn write_multi(&mut self, writes: &[Write], posted: bool) -> Result<(), ClientError> {
        let mut body = (writes.len() as u64).to_le_bytes().to_vec();
        for write in writes {
            let mut data = [0; 8];
            let Some(target) = data.get_mut(..write.data.len()) else {
                return broken("a write of REGION_WRITE_MULTI has at most 8 bytes");
            };
            target.copy_from_slice(write.data);
            body.extend(access_body(
                write.region,
                write.offset,
                write.data.len() as u32,
                &data,
            ));
        }
        if posted {
            return self.post(command::REGION_WRITE_MULTI, &body, &[]).map(|_| ());
        }
        let reply = self.request(command::REGION_WRITE_MULTI, &body, &[])?;
        same(
            &reply.body,
            &(writes.len() as u64).to_le_bytes(),
            "REGION_WRITE_MULTI",
        )
    }

    /// DEVICE_RESET.
    pub fn reset(&mut self) -> Result<(), ClientError> {
        let reply = self.request(command::DEVICE_RESET, &[], &[])?;
        same(&reply.body, &[], "DEVICE_RESET")
    }
}
