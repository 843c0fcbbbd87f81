//! The numbers and structures of `linux/vfio.h` that the driver uses, by hand (the build needs no headers).
//! All structures are naturally aligned and have no hidden padding, as the assertions say.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

const fn request(number: u32) -> u32 {
    // _IO(VFIO_TYPE, VFIO_BASE + number): no direction, no size.
    ((b';' as u32) << 8) | (100 + number)
}

pub const GET_API_VERSION: u32 = request(0);
pub const CHECK_EXTENSION: u32 = request(1);
pub const SET_IOMMU: u32 = request(2);
pub const GROUP_GET_STATUS: u32 = request(3);
pub const GROUP_SET_CONTAINER: u32 = request(4);
pub const GROUP_GET_DEVICE_FD: u32 = request(6);
pub const DEVICE_GET_INFO: u32 = request(7);
pub const DEVICE_GET_REGION_INFO: u32 = request(8);
pub const DEVICE_GET_IRQ_INFO: u32 = request(9);
pub const DEVICE_SET_IRQS: u32 = request(10);
pub const DEVICE_RESET: u32 = request(11);
pub const IOMMU_GET_INFO: u32 = request(12);
pub const IOMMU_MAP_DMA: u32 = request(13);
pub const IOMMU_UNMAP_DMA: u32 = request(14);

pub const API_VERSION: i32 = 0;
pub const TYPE1_IOMMU: usize = 1;
pub const GROUP_FLAGS_VIABLE: u32 = 1;
pub const DEVICE_FLAGS_RESET: u32 = 1;
pub const REGION_FLAG_MMAP: u32 = 1 << 2;
pub const REGION_BAR0: u32 = 0;
pub const REGION_BAR2: u32 = 2;
pub const REGION_CONFIG: u32 = 7;
pub const IRQ_INTX: u32 = 0;
pub const IRQ_MSI: u32 = 1;
pub const IRQ_MSIX: u32 = 2;
pub const IRQ_DATA_NONE: u32 = 1 << 0;
pub const IRQ_DATA_EVENTFD: u32 = 1 << 2;
pub const IRQ_ACTION_UNMASK: u32 = 1 << 4;
pub const IRQ_ACTION_TRIGGER: u32 = 1 << 5;
pub const DMA_READ: u32 = 1 << 0;
pub const DMA_WRITE: u32 = 1 << 1;
pub const IOMMU_INFO_CAPABILITIES: u32 = 1 << 1;
pub const CAPABILITY_IOVA_RANGE: u16 = 1;

#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct GroupStatus {
    pub argsz: u32,
    pub flags: u32,
}

#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct DeviceInfo {
    pub argsz: u32,
    pub flags: u32,
    pub regions: u32,
    pub irqs: u32,
}

#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct RegionInfo {
    pub argsz: u32,
    pub flags: u32,
    pub index: u32,
    pub capability_offset: u32,
    pub size: u64,
    pub offset: u64,
}

#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct IrqInfo {
    pub argsz: u32,
    pub flags: u32,
    pub index: u32,
    pub count: u32,
}

/// Room for the most vectors the device may have.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct IrqSet {
    pub argsz: u32,
    pub flags: u32,
    pub index: u32,
    pub start: u32,
    pub count: u32,
    pub descriptors: [i32; vmgmt_abi::registers::VECTORS_MAX],
}

/// The header, and room for capabilities.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct IommuInfo {
    pub argsz: u32,
    pub flags: u32,
    pub page_sizes: u64,
    pub capability_offset: u32,
    pub padding: u32,
    pub capabilities: [u8; 4096 - 24],
}

#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct DmaMap {
    pub argsz: u32,
    pub flags: u32,
    pub virtual_address: u64,
    pub iova: u64,
    pub size: u64,
}

#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct DmaUnmap {
    pub argsz: u32,
    pub flags: u32,
    pub iova: u64,
    pub size: u64,
}

const _: () = assert!(size_of::<RegionInfo>() == 32);
const _: () = assert!(size_of::<IrqSet>() == 20 + 4 * vmgmt_abi::registers::VECTORS_MAX);
const _: () = assert!(size_of::<IommuInfo>() == 4096);
const _: () = assert!(size_of::<DmaMap>() == 32);
const _: () = assert!(size_of::<DmaUnmap>() == 24);

/// Bytes of a structure, for its `argsz`.
#[must_use]
pub const fn argsz<T>() -> u32 {
    size_of::<T>() as u32
}

/// An ioctl whose argument is a structure that begins with its own size.
///
/// # Errors
/// What the kernel says.
pub fn call<T: Copy>(file: BorrowedFd<'_>, request: u32, argument: &mut T) -> io::Result<i32> {
    // SAFETY: every structure of this file is plain data and at least as long as the `argsz` it carries, which bounds
    // what the kernel reads and writes.
    check(unsafe {
        libc::ioctl(
            file.as_raw_fd(),
            request as libc::Ioctl,
            std::ptr::from_mut(argument),
        )
    })
}

/// An ioctl whose argument is a number or nothing.
///
/// # Errors
/// What the kernel says.
pub fn call_number(file: BorrowedFd<'_>, request: u32, argument: usize) -> io::Result<i32> {
    // SAFETY: used only with the requests above that take a number by value.
    check(unsafe { libc::ioctl(file.as_raw_fd(), request as libc::Ioctl, argument) })
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
