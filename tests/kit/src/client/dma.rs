//! The client's side of DMA by messages: the server's DMA_READ and DMA_WRITE, served as QEMU serves them.
//!
//! In: the server's requests. Out: replies, and a record of what was asked. Must never know: why.

use std::sync::Arc;

use super::{Client, GuestRam, RawMessage, command, encode, flag};

const EFAULT: u32 = 14;
const E2BIG: u32 = 7;
const ENODEV: u32 = 19;
const EINVAL: u32 = 22;
const ENOSYS: u32 = 38;

/// One DMA message that was served or refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaServed {
    /// DMA_WRITE, not DMA_READ.
    pub write: bool,
    /// First DMA address.
    pub iova: u64,
    /// Bytes.
    pub bytes: u64,
    /// 0, or the errno answered.
    pub errno: u32,
}

struct Window {
    iova: u64,
    bytes: u64,
    ram: Arc<GuestRam>,
    offset: u64,
}

#[derive(Default)]
pub(super) struct ServedMemory {
    windows: Vec<Window>,
    bus_master: bool,
    /// What the server asks is taken and not answered.
    pub(super) is_silent: bool,
    served: Vec<DmaServed>,
}

impl Client {
    /// Serves DMA messages for `bytes` at `iova` from `ram` at `offset`. Turns bus mastering on.
    pub fn serve_memory(&mut self, iova: u64, bytes: u64, ram: &Arc<GuestRam>, offset: u64) {
        self.memory.windows.push(Window {
            iova,
            bytes,
            ram: ram.clone(),
            offset,
        });
        self.memory.bus_master = true;
    }

    /// Serves nothing at that address any more.
    pub fn stop_serving(&mut self, iova: u64) {
        self.memory.windows.retain(|window| window.iova != iova);
    }

    /// While it is off, DMA messages get ENODEV, as from QEMU.
    pub fn set_bus_master(&mut self, on: bool) {
        self.memory.bus_master = on;
    }

    /// From now on DMA messages are taken and never answered, as by a process that stands still.
    pub fn leave_unanswered(&mut self) {
        self.memory.is_silent = true;
    }

    /// What the server asked so far.
    pub fn dma_served(&self) -> &[DmaServed] {
        &self.memory.served
    }
}

impl ServedMemory {
    /// The reply to one request of the server, as bytes.
    pub fn serve(&mut self, request: &RawMessage) -> Vec<u8> {
        let result = match request.command {
            command::DMA_READ | command::DMA_WRITE if request.fds.is_empty() => self.access(request),
            command::DMA_READ | command::DMA_WRITE => Err(EINVAL),
            _ => Err(ENOSYS),
        };
        match result {
            Ok(body) => encode(request.id, request.command, flag::REPLY, &body),
            Err(errno) => {
                let mut bytes = encode(request.id, request.command, flag::REPLY | flag::ERROR, &[]);
                bytes[12..16].copy_from_slice(&errno.to_le_bytes());
                bytes
            }
        }
    }

    fn access(&mut self, request: &RawMessage) -> Result<Vec<u8>, u32> {
        let (Ok(iova), Ok(bytes)) = (request.u64_at(0), request.u64_at(8)) else {
            return Err(EINVAL);
        };
        let write = request.command == command::DMA_WRITE;
        let data = &request.body[16..];
        let result = self.copy(write, iova, bytes, data);
        let errno = result.as_ref().err().copied().unwrap_or(0);
        self.served.push(DmaServed {
            write,
            iova,
            bytes,
            errno,
        });
        let mut body = request.body[..16].to_vec();
        body.extend(result?);
        Ok(body)
    }

    fn copy(&self, write: bool, iova: u64, bytes: u64, data: &[u8]) -> Result<Vec<u8>, u32> {
        if bytes > 1024 * 1024 || (write && bytes > data.len() as u64) {
            return Err(E2BIG);
        }
        if !self.bus_master {
            return Err(ENODEV);
        }
        let inside = |window: &&Window| {
            iova >= window.iova
                && iova - window.iova <= window.bytes
                && bytes <= window.bytes - (iova - window.iova)
        };
        let window = self.windows.iter().find(inside).ok_or(EFAULT)?;
        let offset = window.offset + (iova - window.iova);
        if write {
            window
                .ram
                .write(offset, &data[..bytes as usize])
                .map_err(|_| EFAULT)?;
            return Ok(Vec::new());
        }
        window.ram.read(offset, bytes as usize).map_err(|_| EFAULT)
    }
}
