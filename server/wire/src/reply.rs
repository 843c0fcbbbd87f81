//! Answers to requests, and their bytes.
//!
//! In: a [`Reply`] and the handle of the request it answers. Out: the bytes of one message.
//! Must never know: the socket, the order of answers, why the device answers so.

use serde::{Deserialize, Serialize};
use zerocopy::IntoBytes;

use crate::FdSlot;
use crate::errno::Errno;
use crate::request::{DmaUnmap, RegionAccess};
use crate::uapi::{self, user};

/// Names one request to the connection that delivered it. Copies are harmless: the connection answers each
/// request once (QEMU loses step over a second reply).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplyHandle {
    /// Number of the request on its connection, never reused (message ids are).
    pub sequence: u64,
    /// The client's id of the message, which the reply repeats.
    pub message_id: u16,
    /// The command (`user::VFIO_USER_*`).
    pub command: u16,
    /// The client wants no reply; none is sent, not even an error.
    pub no_reply: bool,
    /// Most bytes of the reply's body (`argsz`).
    pub reply_bytes_max: u32,
}

/// An answer. Each belongs to the commands named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// DMA_MAP, DEVICE_SET_IRQS, DEVICE_RESET: done.
    Done,
    /// DMA_UNMAP: no DMA reaches it any more.
    DmaUnmap(DmaUnmap),
    /// DEVICE_GET_INFO.
    DeviceInfo(DeviceInfo),
    /// DEVICE_GET_REGION_INFO.
    RegionInfo(RegionInfo),
    /// DEVICE_GET_REGION_IO_FDS: this region has none.
    RegionIoFds {
        /// Region index.
        region: u32,
    },
    /// DEVICE_GET_IRQ_INFO.
    IrqInfo(IrqInfo),
    /// REGION_READ: exactly the bytes asked for.
    RegionRead {
        /// What was asked.
        access: RegionAccess,
        /// `access.bytes()` bytes.
        data: Vec<u8>,
    },
    /// REGION_WRITE: written.
    RegionWrite(RegionAccess),
    /// REGION_WRITE_MULTI: written.
    RegionWriteMulti {
        /// Number of writes done.
        count: u64,
    },
    /// DEVICE_FEATURE.
    DeviceFeature(DeviceFeatureReply),
    /// Any command: refused.
    Error(Errno),
}

/// Answer to DEVICE_GET_INFO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// `VFIO_DEVICE_FLAGS_*`.
    pub flags: u32,
    /// Number of regions.
    pub regions: u32,
    /// Number of interrupt indexes.
    pub irqs: u32,
}

/// Answer to DEVICE_GET_REGION_INFO.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RegionInfo {
    /// `VFIO_REGION_INFO_FLAG_*`; the capability flag is set by the encoder.
    pub flags: u32,
    /// Region index.
    pub region: u32,
    /// Bytes of the region.
    pub bytes: u64,
    /// Offset for mmap of the descriptor.
    pub file_offset: u64,
    /// Areas that can be mapped, where only some can.
    pub sparse_areas: Vec<SparseArea>,
    /// The descriptor to map, which stays the shell's.
    pub descriptor: Option<FdSlot>,
}

/// One area of a region that can be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SparseArea {
    /// Bytes from the region's start.
    pub offset: u64,
    /// Bytes.
    pub bytes: u64,
}

/// Answer to DEVICE_GET_IRQ_INFO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IrqInfo {
    /// `VFIO_IRQ_INFO_*`.
    pub flags: u32,
    /// Interrupt index.
    pub index: u32,
    /// Number of interrupts.
    pub count: u32,
}

/// Answer to DEVICE_FEATURE.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceFeatureReply {
    /// The request's flags.
    pub flags: u32,
    /// The feature's data.
    pub data: Vec<u8>,
}

/// Why a reply was not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReplyRefused {
    /// The client asked for no reply: nothing was sent, and nothing is wrong.
    #[error("the client wants no reply to this message")]
    NotWanted,
    /// Answered before, given up, or never asked on this connection.
    #[error("no reply is owed to this message")]
    NotOwed,
    /// The reply does not belong to the command, or its data has the wrong length.
    #[error("the reply does not fit the command it answers")]
    Mismatch,
}

/// The body and descriptors of a reply, or a mismatch of reply and command.
pub(crate) fn encode_body(
    handle: &ReplyHandle,
    reply: &Reply,
) -> Result<(Vec<u8>, Vec<FdSlot>), ReplyRefused> {
    let mut descriptors = Vec::new();
    let body = match (handle.command, reply) {
        (
            user::VFIO_USER_DMA_MAP | user::VFIO_USER_DEVICE_SET_IRQS | user::VFIO_USER_DEVICE_RESET,
            Reply::Done,
        ) => Vec::new(),
        (user::VFIO_USER_DMA_UNMAP, Reply::DmaUnmap(unmap)) => dma_unmap(unmap),
        (user::VFIO_USER_DEVICE_GET_INFO, Reply::DeviceInfo(info)) => device_info(info),
        (user::VFIO_USER_DEVICE_GET_REGION_INFO, Reply::RegionInfo(info)) => {
            let (body, fits) = region_info(info, handle.reply_bytes_max);
            // The client asks again with more room; one descriptor is enough.
            descriptors.extend(info.descriptor.filter(|_| fits));
            body
        }
        (user::VFIO_USER_DEVICE_GET_REGION_IO_FDS, Reply::RegionIoFds { region }) => region_io_fds(*region),
        (user::VFIO_USER_DEVICE_GET_IRQ_INFO, Reply::IrqInfo(info)) => irq_info(info),
        (user::VFIO_USER_REGION_READ, Reply::RegionRead { access, data })
            if data.len() == access.bytes() as usize =>
        {
            let mut body = access_head(access);
            body.extend_from_slice(data);
            body
        }
        (user::VFIO_USER_REGION_WRITE, Reply::RegionWrite(access)) => access_head(access),
        (user::VFIO_USER_REGION_WRITE_MULTI, Reply::RegionWriteMulti { count }) => {
            count.to_le_bytes().to_vec()
        }
        (user::VFIO_USER_DEVICE_FEATURE, Reply::DeviceFeature(feature)) => {
            device_feature(feature, handle.reply_bytes_max)
        }
        _ => return Err(ReplyRefused::Mismatch),
    };
    Ok((body, descriptors))
}

/// A whole message: header and body.
pub(crate) fn message(message_id: u16, command: u16, flags: u32, errno: u32, body: &[u8]) -> Vec<u8> {
    let header = uapi::Header {
        message_id: message_id.into(),
        command: command.into(),
        message_bytes: ((uapi::HEADER_BYTES + body.len()) as u32).into(),
        flags: flags.into(),
        error: errno.into(),
    };
    let mut message = Vec::with_capacity(uapi::HEADER_BYTES + body.len());
    message.extend_from_slice(header.as_bytes());
    message.extend_from_slice(body);
    message
}

/// A whole error reply. "If an error occurs, the reply message must only include the reply header."
pub(crate) fn error_message(handle: &ReplyHandle, errno: Errno) -> Vec<u8> {
    let flags = user::VFIO_USER_TYPE_REPLY | user::VFIO_USER_ERROR;
    message(handle.message_id, handle.command, flags, errno.0, &[])
}

fn dma_unmap(unmap: &DmaUnmap) -> Vec<u8> {
    let (flags, iova, size) = match unmap {
        DmaUnmap::Range(range) => (0, range.start(), range.bytes()),
        DmaUnmap::All => (uapi::VFIO_DMA_UNMAP_FLAG_ALL, 0, 0),
    };
    let argsz = size_of::<uapi::DmaUnmapBody>() as u32;
    let body = uapi::DmaUnmapBody {
        argsz: argsz.into(),
        flags: flags.into(),
        iova: iova.into(),
        size: size.into(),
    };
    body.as_bytes().to_vec()
}

fn device_info(info: &DeviceInfo) -> Vec<u8> {
    let body = uapi::DeviceInfoBody {
        argsz: (size_of::<uapi::DeviceInfoBody>() as u32).into(),
        flags: info.flags.into(),
        num_regions: info.regions.into(),
        num_irqs: info.irqs.into(),
    };
    body.as_bytes().to_vec()
}

/// With capabilities that do not fit `argsz` only the head goes out, saying how much is needed.
fn region_info(info: &RegionInfo, reply_bytes_max: u32) -> (Vec<u8>, bool) {
    let head_bytes = size_of::<uapi::RegionInfoBody>() as u32;
    let capabilities = sparse_capability(&info.sparse_areas);
    let needed = head_bytes + capabilities.len() as u32;
    let fits = needed <= reply_bytes_max;
    let flags = if capabilities.is_empty() {
        info.flags & !uapi::VFIO_REGION_INFO_FLAG_CAPS
    } else {
        info.flags | uapi::VFIO_REGION_INFO_FLAG_CAPS
    };
    // Said even where the capabilities do not fit: QEMU looks at it before it asks again with more room.
    let cap_offset = if capabilities.is_empty() { 0 } else { head_bytes };
    let head = uapi::RegionInfoBody {
        argsz: needed.into(),
        flags: flags.into(),
        index: info.region.into(),
        cap_offset: cap_offset.into(),
        size: info.bytes.into(),
        offset: info.file_offset.into(),
    };
    let mut body = head.as_bytes().to_vec();
    if fits {
        body.extend_from_slice(&capabilities);
    }
    (body, fits)
}

fn sparse_capability(areas: &[SparseArea]) -> Vec<u8> {
    if areas.is_empty() {
        return Vec::new();
    }
    let head = uapi::SparseMmapHead {
        header: uapi::InfoCapHeader {
            id: uapi::VFIO_REGION_INFO_CAP_SPARSE_MMAP.into(),
            version: 1.into(),
            next: 0.into(),
        },
        nr_areas: (areas.len() as u32).into(),
        reserved: 0.into(),
    };
    let mut bytes = head.as_bytes().to_vec();
    for area in areas {
        let area = uapi::SparseMmapArea {
            offset: area.offset.into(),
            size: area.bytes.into(),
        };
        bytes.extend_from_slice(area.as_bytes());
    }
    bytes
}

fn region_io_fds(region: u32) -> Vec<u8> {
    let body = uapi::RegionIoFdsBody {
        argsz: (size_of::<uapi::RegionIoFdsBody>() as u32).into(),
        flags: 0.into(),
        index: region.into(),
        count: 0.into(),
    };
    body.as_bytes().to_vec()
}

fn irq_info(info: &IrqInfo) -> Vec<u8> {
    let body = uapi::IrqInfoBody {
        argsz: (size_of::<uapi::IrqInfoBody>() as u32).into(),
        flags: info.flags.into(),
        index: info.index.into(),
        count: info.count.into(),
    };
    body.as_bytes().to_vec()
}

fn access_head(access: &RegionAccess) -> Vec<u8> {
    let head = uapi::RegionAccessHead {
        offset: access.offset().into(),
        region: access.region().into(),
        count: access.bytes().into(),
    };
    head.as_bytes().to_vec()
}

fn device_feature(feature: &DeviceFeatureReply, reply_bytes_max: u32) -> Vec<u8> {
    let needed = (size_of::<uapi::DeviceFeatureHead>() + feature.data.len()) as u32;
    let head = uapi::DeviceFeatureHead {
        argsz: needed.into(),
        flags: feature.flags.into(),
    };
    let mut body = head.as_bytes().to_vec();
    if needed <= reply_bytes_max {
        body.extend_from_slice(&feature.data);
    }
    body
}
