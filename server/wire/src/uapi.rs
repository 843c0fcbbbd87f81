//! The numbers and structures of VFIO and vfio-user, written by hand as little-endian types.
//!
//! In: nothing. Out: constants and plain layouts. Must never know: what a value means to this device.
//! Names that exist in `linux/vfio.h` are spelled as there and are held against that header by
//! `tests/uapi_check.rs`; `VFIO_USER_*` exist only in the vfio-user specification (sections "Commands"
//! and "Header").

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

macro_rules! constants {
    ($($(#[$doc:meta])* $name:ident: $type:ty = $value:expr;)*) => {
        $($(#[$doc])* pub const $name: $type = $value;)*
        /// Name and value of every constant above, for the check against the system's headers.
        pub const CONSTANTS: &[(&str, u64)] = &[$((stringify!($name), $name as u64)),*];
    };
}
pub(crate) use constants;

/// Bytes of the header that starts every message.
pub const HEADER_BYTES: usize = size_of::<Header>();

/// The vfio-user command numbers (specification, "Commands").
pub mod user {
    /// Negotiation; the first message of a connection.
    pub const VFIO_USER_VERSION: u16 = 1;
    /// Guest memory becomes reachable.
    pub const VFIO_USER_DMA_MAP: u16 = 2;
    /// Guest memory goes away.
    pub const VFIO_USER_DMA_UNMAP: u16 = 3;
    /// What the device is.
    pub const VFIO_USER_DEVICE_GET_INFO: u16 = 4;
    /// What a region is.
    pub const VFIO_USER_DEVICE_GET_REGION_INFO: u16 = 5;
    /// Descriptors for direct region I/O.
    pub const VFIO_USER_DEVICE_GET_REGION_IO_FDS: u16 = 6;
    /// What an interrupt index is.
    pub const VFIO_USER_DEVICE_GET_IRQ_INFO: u16 = 7;
    /// Eventfds, masks and triggers.
    pub const VFIO_USER_DEVICE_SET_IRQS: u16 = 8;
    /// A load from a region.
    pub const VFIO_USER_REGION_READ: u16 = 9;
    /// A store to a region.
    pub const VFIO_USER_REGION_WRITE: u16 = 10;
    /// Server to client: read guest memory.
    pub const VFIO_USER_DMA_READ: u16 = 11;
    /// Server to client: write guest memory.
    pub const VFIO_USER_DMA_WRITE: u16 = 12;
    /// Reset the device.
    pub const VFIO_USER_DEVICE_RESET: u16 = 13;
    /// Dirty page log (no longer in the specification).
    pub const VFIO_USER_DIRTY_PAGES: u16 = 14;
    /// Several small posted stores in one message.
    pub const VFIO_USER_REGION_WRITE_MULTI: u16 = 15;
    /// Get, set or probe a device feature.
    pub const VFIO_USER_DEVICE_FEATURE: u16 = 16;
    /// Migration stream, source.
    pub const VFIO_USER_MIG_DATA_READ: u16 = 17;
    /// Migration stream, target.
    pub const VFIO_USER_MIG_DATA_WRITE: u16 = 18;

    /// Header flags: mask of the type bits.
    pub const VFIO_USER_TYPE_MASK: u32 = 0xf;
    /// Header flags: the message is a command.
    pub const VFIO_USER_TYPE_COMMAND: u32 = 0;
    /// Header flags: the message is a reply.
    pub const VFIO_USER_TYPE_REPLY: u32 = 1;
    /// Header flags: no reply is wanted.
    pub const VFIO_USER_NO_REPLY: u32 = 1 << 4;
    /// Header flags: the reply is an error, the error field is valid.
    pub const VFIO_USER_ERROR: u32 = 1 << 5;

    /// DMA map flags: readable.
    pub const VFIO_USER_DMA_MAP_READABLE: u32 = 1 << 0;
    /// DMA map flags: writable.
    pub const VFIO_USER_DMA_MAP_WRITEABLE: u32 = 1 << 1;

    /// The only major version.
    pub const VERSION_MAJOR: u16 = 0;
    /// The only minor version.
    pub const VERSION_MINOR: u16 = 0;
}

constants! {
    /// The device can be reset.
    VFIO_DEVICE_FLAGS_RESET: u32 = 1 << 0;
    /// The device is a PCI device.
    VFIO_DEVICE_FLAGS_PCI: u32 = 1 << 1;

    /// The region can be read.
    VFIO_REGION_INFO_FLAG_READ: u32 = 1 << 0;
    /// The region can be written.
    VFIO_REGION_INFO_FLAG_WRITE: u32 = 1 << 1;
    /// The region can be mapped.
    VFIO_REGION_INFO_FLAG_MMAP: u32 = 1 << 2;
    /// The region info has capabilities.
    VFIO_REGION_INFO_FLAG_CAPS: u32 = 1 << 3;
    /// Capability: only some areas can be mapped.
    VFIO_REGION_INFO_CAP_SPARSE_MMAP: u16 = 1;
    /// Capability: a device-specific region.
    VFIO_REGION_INFO_CAP_TYPE: u16 = 2;

    /// Region of BAR 0.
    VFIO_PCI_BAR0_REGION_INDEX: u32 = 0;
    /// Region of BAR 1.
    VFIO_PCI_BAR1_REGION_INDEX: u32 = 1;
    /// Region of BAR 2.
    VFIO_PCI_BAR2_REGION_INDEX: u32 = 2;
    /// Region of BAR 3.
    VFIO_PCI_BAR3_REGION_INDEX: u32 = 3;
    /// Region of BAR 4.
    VFIO_PCI_BAR4_REGION_INDEX: u32 = 4;
    /// Region of BAR 5.
    VFIO_PCI_BAR5_REGION_INDEX: u32 = 5;
    /// Region of the expansion ROM.
    VFIO_PCI_ROM_REGION_INDEX: u32 = 6;
    /// Region of the configuration space.
    VFIO_PCI_CONFIG_REGION_INDEX: u32 = 7;
    /// Region of legacy VGA.
    VFIO_PCI_VGA_REGION_INDEX: u32 = 8;
    /// Number of the fixed PCI regions.
    VFIO_PCI_NUM_REGIONS: u32 = 9;

    /// Interrupt index of INTx.
    VFIO_PCI_INTX_IRQ_INDEX: u32 = 0;
    /// Interrupt index of MSI.
    VFIO_PCI_MSI_IRQ_INDEX: u32 = 1;
    /// Interrupt index of MSI-X.
    VFIO_PCI_MSIX_IRQ_INDEX: u32 = 2;
    /// Interrupt index of PCI errors.
    VFIO_PCI_ERR_IRQ_INDEX: u32 = 3;
    /// Interrupt index of the request to give the device back.
    VFIO_PCI_REQ_IRQ_INDEX: u32 = 4;
    /// Number of the PCI interrupt indexes.
    VFIO_PCI_NUM_IRQS: u32 = 5;

    /// Interrupts can signal an eventfd.
    VFIO_IRQ_INFO_EVENTFD: u32 = 1 << 0;
    /// Interrupts can be masked.
    VFIO_IRQ_INFO_MASKABLE: u32 = 1 << 1;
    /// Interrupts mask themselves when they fire.
    VFIO_IRQ_INFO_AUTOMASKED: u32 = 1 << 2;
    /// Interrupts are set up as one set.
    VFIO_IRQ_INFO_NORESIZE: u32 = 1 << 3;

    /// SET_IRQS without data.
    VFIO_IRQ_SET_DATA_NONE: u32 = 1 << 0;
    /// SET_IRQS with one byte per interrupt.
    VFIO_IRQ_SET_DATA_BOOL: u32 = 1 << 1;
    /// SET_IRQS with eventfds.
    VFIO_IRQ_SET_DATA_EVENTFD: u32 = 1 << 2;
    /// SET_IRQS masks.
    VFIO_IRQ_SET_ACTION_MASK: u32 = 1 << 3;
    /// SET_IRQS unmasks.
    VFIO_IRQ_SET_ACTION_UNMASK: u32 = 1 << 4;
    /// SET_IRQS triggers.
    VFIO_IRQ_SET_ACTION_TRIGGER: u32 = 1 << 5;
    /// All data bits of SET_IRQS.
    VFIO_IRQ_SET_DATA_TYPE_MASK: u32 = 0x07;
    /// All action bits of SET_IRQS.
    VFIO_IRQ_SET_ACTION_TYPE_MASK: u32 = 0x38;

    /// DMA map: the device may read.
    VFIO_DMA_MAP_FLAG_READ: u32 = 1 << 0;
    /// DMA map: the device may write.
    VFIO_DMA_MAP_FLAG_WRITE: u32 = 1 << 1;
    /// DMA unmap: with a bitmap of dirty pages.
    VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP: u32 = 1 << 0;
    /// DMA unmap: everything.
    VFIO_DMA_UNMAP_FLAG_ALL: u32 = 1 << 1;

    /// DEVICE_FEATURE: the index bits.
    VFIO_DEVICE_FEATURE_MASK: u32 = 0xffff;
    /// DEVICE_FEATURE: get.
    VFIO_DEVICE_FEATURE_GET: u32 = 1 << 16;
    /// DEVICE_FEATURE: set.
    VFIO_DEVICE_FEATURE_SET: u32 = 1 << 17;
    /// DEVICE_FEATURE: only ask whether it would work.
    VFIO_DEVICE_FEATURE_PROBE: u32 = 1 << 18;
    /// Feature: migration.
    VFIO_DEVICE_FEATURE_MIGRATION: u32 = 1;
    /// Feature: migration state.
    VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE: u32 = 2;
}

macro_rules! layout {
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* } = $bytes:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
        #[repr(C)]
        pub struct $name { $($(#[$field_doc])* pub $field: $type,)* }
        const _: () = assert!(size_of::<$name>() == $bytes);
    };
}

layout! {
    /// The header of every message (specification, "Header").
    Header {
        /// The sender's name for the message; the reply repeats it.
        message_id: U16,
        /// One of `user::VFIO_USER_*`.
        command: U16,
        /// Bytes of the whole message, this header included.
        message_bytes: U32,
        /// Type, no-reply and error bits.
        flags: U32,
        /// Errno of an error reply; zero in a command.
        error: U32,
    } = 16
}

layout! {
    /// Head of a VERSION message; NUL-terminated JSON follows.
    VersionHead {
        /// Major version.
        major: U16,
        /// Minor version.
        minor: U16,
    } = 4
}

layout! {
    /// Body of DMA_MAP (the kernel's `vfio_iommu_type1_dma_map` with a file offset for the address).
    DmaMapBody {
        /// Bytes of this structure.
        argsz: U32,
        /// `VFIO_DMA_MAP_FLAG_*`.
        flags: U32,
        /// Where in the descriptor's file the range starts.
        offset: U64,
        /// First DMA address.
        iova: U64,
        /// Bytes.
        size: U64,
    } = 32
}

layout! {
    /// Body of DMA_UNMAP and of its reply (`vfio_iommu_type1_dma_unmap`).
    DmaUnmapBody {
        /// Most bytes of reply.
        argsz: U32,
        /// `VFIO_DMA_UNMAP_FLAG_*`.
        flags: U32,
        /// First DMA address.
        iova: U64,
        /// Bytes.
        size: U64,
    } = 24
}

layout! {
    /// Body of DEVICE_GET_INFO and of its reply: the part of `vfio_device_info` that vfio-user has.
    DeviceInfoBody {
        /// Most bytes of reply; in the reply: bytes needed.
        argsz: U32,
        /// `VFIO_DEVICE_FLAGS_*`.
        flags: U32,
        /// Number of regions.
        num_regions: U32,
        /// Number of interrupt indexes.
        num_irqs: U32,
    } = 16
}

layout! {
    /// Body of DEVICE_GET_REGION_INFO and of its reply (`vfio_region_info`).
    RegionInfoBody {
        /// Most bytes of reply; in the reply: bytes needed.
        argsz: U32,
        /// `VFIO_REGION_INFO_FLAG_*`.
        flags: U32,
        /// Region index.
        index: U32,
        /// Where in the reply's body the first capability starts, 0 for none.
        cap_offset: U32,
        /// Bytes of the region.
        size: U64,
        /// Offset for mmap.
        offset: U64,
    } = 32
}

layout! {
    /// Head of each region capability (`vfio_info_cap_header`).
    InfoCapHeader {
        /// `VFIO_REGION_INFO_CAP_*`.
        id: U16,
        /// Version of that capability.
        version: U16,
        /// Where in the reply's body the next one starts, 0 for none.
        next: U32,
    } = 8
}

layout! {
    /// Head of the sparse mmap capability (`vfio_region_info_cap_sparse_mmap`); areas follow.
    SparseMmapHead {
        /// The common head.
        header: InfoCapHeader,
        /// Number of areas that follow.
        nr_areas: U32,
        /// Zero.
        reserved: U32,
    } = 16
}

layout! {
    /// One area that can be mapped (`vfio_region_sparse_mmap_area`).
    SparseMmapArea {
        /// Bytes from the region's start.
        offset: U64,
        /// Bytes.
        size: U64,
    } = 16
}

layout! {
    /// Body of DEVICE_GET_REGION_IO_FDS and head of its reply.
    RegionIoFdsBody {
        /// Most bytes of reply; in the reply: bytes needed.
        argsz: U32,
        /// Zero.
        flags: U32,
        /// Region index.
        index: U32,
        /// Number of sub-regions that follow in the reply.
        count: U32,
    } = 16
}

layout! {
    /// Body of DEVICE_GET_IRQ_INFO and of its reply (`vfio_irq_info`).
    IrqInfoBody {
        /// Most bytes of reply; in the reply: bytes needed.
        argsz: U32,
        /// `VFIO_IRQ_INFO_*`.
        flags: U32,
        /// Interrupt index.
        index: U32,
        /// Number of interrupts.
        count: U32,
    } = 16
}

layout! {
    /// Head of DEVICE_SET_IRQS (`vfio_irq_set`); bytes of booleans may follow.
    IrqSetHead {
        /// Bytes of the request's body.
        argsz: U32,
        /// `VFIO_IRQ_SET_*`.
        flags: U32,
        /// Interrupt index.
        index: U32,
        /// First interrupt.
        start: U32,
        /// Number of interrupts.
        count: U32,
    } = 20
}

layout! {
    /// Head of REGION_READ, REGION_WRITE and of each write in REGION_WRITE_MULTI.
    RegionAccessHead {
        /// Bytes from the region's start.
        offset: U64,
        /// Region index.
        region: U32,
        /// Bytes of data.
        count: U32,
    } = 16
}

layout! {
    /// One write of REGION_WRITE_MULTI.
    MultiWrite {
        /// Where and how much.
        head: RegionAccessHead,
        /// `head.count` bytes of data, then padding.
        data: [u8; 8],
    } = 24
}

layout! {
    /// Head of DMA_READ, DMA_WRITE and their replies. QEMU 11.1.3 has the 64-bit count too (tried with a
    /// pattern in guest memory); only the reply to DMA_WRITE is 12 bytes in the specification, 16 in QEMU.
    DmaAccessHead {
        /// First DMA address.
        iova: U64,
        /// Bytes of data.
        count: U64,
    } = 16
}

layout! {
    /// Head of DEVICE_FEATURE (`vfio_device_feature`); data may follow.
    DeviceFeatureHead {
        /// Most bytes of reply.
        argsz: U32,
        /// Feature index and `VFIO_DEVICE_FEATURE_*`.
        flags: U32,
    } = 8
}
