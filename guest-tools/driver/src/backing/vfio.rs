//! The device through `vfio-pci`: the group interface and the type 1 IOMMU.
//!
//! Comes in: register numbers, lengths. Goes out: values, memory mapped for the device, eventfds. Memory that is dropped is
//! unmapped first, so a late DMA meets the IOMMU and not another program.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::EventfdFlags;
use vmgmt_abi::registers::VECTORS_MAX;

use super::pages::{self, Pages};
use super::pci::{self, PciFunction};
use super::register_map::RegisterMap;
use super::vfio_interface::{self as interface, argsz};
use super::{Backing, COMMAND_INTX_DISABLE, COMMAND_IO, COMMAND_MEMORY, InterruptKind, Interrupts, Width};
use crate::error::{DriverError, Result};
use crate::limits::{HUGE_PAGE_BYTES, OPEN_DEVICE_ATTEMPTS, OPEN_DEVICE_PAUSE};
use crate::memory::{DmaMemory, Piece};

/// Device addresses are dealt from here: above all RAM below 4 GiB and its reserved windows (MSI at 0xfee00000).
const IOVA_FIRST: u64 = 4 << 30;
/// And below here, where the IOMMU does not say: 39 bits are the least that Intel's have.
const IOVA_LAST: u64 = (1 << 39) - 1;

/// The container: what memory unmaps itself from when it is dropped.
struct Container {
    file: File,
    addresses: Mutex<Addresses>,
}

/// Device addresses: usable ranges, the next one never used, and those given back, by length.
struct Addresses {
    ranges: Vec<(u64, u64)>,
    next: u64,
    returned: Vec<(u64, u64)>,
}

struct Vectors {
    granted: Interrupts,
    descriptors: Vec<Arc<OwnedFd>>,
}

/// A device bound to `vfio-pci`. Fields are dropped in this order: the device before its container.
pub struct Vfio {
    registers: RegisterMap,
    vectors: Mutex<Vectors>,
    device: File,
    config_offset: u64,
    ports_offset: u64,
    can_reset: bool,
    container: Arc<Container>,
    _group: File,
}

impl Vfio {
    /// Opens the function's group and the device in it.
    ///
    /// # Errors
    /// What is missing: the driver, the IOMMU, the right.
    pub fn open(function: &PciFunction) -> Result<Self> {
        let address = function.address();
        if function.driver().as_deref() != Some("vfio-pci") {
            return Err(DriverError::SetUp(format!(
                "{address} is not bound to vfio-pci: vmgmt bind --driver vfio"
            )));
        }
        let number = function.iommu_group().ok_or_else(|| {
            DriverError::SetUp(format!("{address} is in no IOMMU group: start QEMU with -device intel-iommu,caching-mode=on or -device virtio-iommu-pci, or bind to uio"))
        })?;
        let group = open_node(&Path::new("/dev/vfio").join(&number))?;
        let container = open_node(Path::new("/dev/vfio/vfio"))?;
        let failed = |what: &str| {
            let what = format!("vfio, {what}");
            move |error| DriverError::system(what, error)
        };

        let version = interface::call_number(container.as_fd(), interface::GET_API_VERSION, 0)
            .map_err(failed("version"))?;
        let type1 = interface::call_number(
            container.as_fd(),
            interface::CHECK_EXTENSION,
            interface::TYPE1_IOMMU,
        );
        if version != interface::API_VERSION || type1.unwrap_or(0) == 0 {
            return Err(DriverError::SetUp(
                "this kernel's vfio has no type 1 IOMMU: modprobe vfio_iommu_type1".into(),
            ));
        }
        let mut status = interface::GroupStatus {
            argsz: argsz::<interface::GroupStatus>(),
            flags: 0,
        };
        interface::call(group.as_fd(), interface::GROUP_GET_STATUS, &mut status).map_err(failed("group"))?;
        if status.flags & interface::GROUP_FLAGS_VIABLE == 0 {
            return Err(DriverError::SetUp(format!(
                "the IOMMU group {number} holds devices of other drivers: bind them to vfio-pci or to none"
            )));
        }
        let mut descriptor = container.as_raw_fd();
        interface::call(group.as_fd(), interface::GROUP_SET_CONTAINER, &mut descriptor)
            .map_err(failed("container"))?;
        interface::call_number(container.as_fd(), interface::SET_IOMMU, interface::TYPE1_IOMMU).map_err(|error| {
            if error.kind() == io::ErrorKind::PermissionDenied {
                return DriverError::SetUp("vfio refuses this IOMMU because it cannot remap interrupts: load vfio_iommu_type1 with allow_unsafe_interrupts=1 (or use intel-iommu with intremap=on)".into());
            }
            failed("IOMMU")(error)
        })?;

        let mut name = [0_u8; 32];
        let bytes = address.as_bytes();
        name.get_mut(..bytes.len().min(31))
            .unwrap_or_default()
            .copy_from_slice(bytes.get(..bytes.len().min(31)).unwrap_or_default());
        let mut attempt = 1;
        let raw = loop {
            match interface::call(group.as_fd(), interface::GROUP_GET_DEVICE_FD, &mut name) {
                // Somebody resets the function at this moment (sysfs, another program that ends): vfio wants to do the same, and does not wait.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && attempt < OPEN_DEVICE_ATTEMPTS => {
                    attempt += 1;
                    std::thread::sleep(OPEN_DEVICE_PAUSE);
                }
                opened => break opened.map_err(failed("device"))?,
            }
        };
        // SAFETY: the kernel has just made this descriptor for us.
        let device = unsafe { File::from_raw_fd(raw) };

        let mut info = interface::DeviceInfo {
            argsz: argsz::<interface::DeviceInfo>(),
            ..Default::default()
        };
        interface::call(device.as_fd(), interface::DEVICE_GET_INFO, &mut info)
            .map_err(failed("device information"))?;
        let region = |index| {
            let mut region = interface::RegionInfo {
                argsz: argsz::<interface::RegionInfo>(),
                index,
                ..Default::default()
            };
            interface::call(device.as_fd(), interface::DEVICE_GET_REGION_INFO, &mut region)
                .map_err(failed("regions"))?;
            Ok::<_, DriverError>(region)
        };
        let bar0 = region(interface::REGION_BAR0)?;
        if bar0.flags & interface::REGION_FLAG_MMAP == 0
            || bar0.size < vmgmt_abi::registers::BAR0_BYTES as u64
        {
            return Err(DriverError::SetUp(format!(
                "BAR0 of {address} cannot be mapped ({} bytes)",
                bar0.size
            )));
        }
        let addresses = Mutex::new(Addresses {
            ranges: usable_ranges(&container),
            next: 0,
            returned: Vec::new(),
        });
        let backing = Self {
            registers: RegisterMap::new(device.as_fd(), bar0.offset)?,
            vectors: Mutex::new(Vectors {
                granted: Interrupts::NONE,
                descriptors: Vec::new(),
            }),
            config_offset: region(interface::REGION_CONFIG)?.offset,
            ports_offset: region(interface::REGION_BAR2)?.offset,
            can_reset: info.flags & interface::DEVICE_FLAGS_RESET != 0,
            device,
            container: Arc::new(Container {
                file: container,
                addresses,
            }),
            _group: group,
        };
        backing.restore_function()?;
        Ok(backing)
    }

    /// Lets an index trigger the descriptors, or with none: turns it off. Gives how many could be had when fewer.
    fn set_irqs(&self, index: u32, descriptors: &[Arc<OwnedFd>]) -> io::Result<i32> {
        let mut set = interface::IrqSet {
            argsz: 20 + 4 * descriptors.len() as u32,
            flags: interface::IRQ_ACTION_TRIGGER
                | if descriptors.is_empty() {
                    interface::IRQ_DATA_NONE
                } else {
                    interface::IRQ_DATA_EVENTFD
                },
            index,
            start: 0,
            count: descriptors.len() as u32,
            descriptors: [-1; VECTORS_MAX],
        };
        for (slot, descriptor) in set.descriptors.iter_mut().zip(descriptors) {
            *slot = descriptor.as_raw_fd();
        }
        interface::call(self.device.as_fd(), interface::DEVICE_SET_IRQS, &mut set)
    }

    /// Tries one kind of interrupt with fewer and fewer vectors.
    fn try_vectors(&self, index: u32, wanted: u32) -> Result<Option<Vec<Arc<OwnedFd>>>> {
        let mut info = interface::IrqInfo {
            argsz: argsz::<interface::IrqInfo>(),
            index,
            ..Default::default()
        };
        if interface::call(self.device.as_fd(), interface::DEVICE_GET_IRQ_INFO, &mut info).is_err() {
            return Ok(None);
        }
        let mut count = info.count.min(wanted.max(1)).min(VECTORS_MAX as u32);
        while count > 0 {
            let descriptors: Vec<Arc<OwnedFd>> =
                (0..count).map(|_| event_descriptor()).collect::<Result<_>>()?;
            match self.set_irqs(index, &descriptors) {
                Ok(0) => return Ok(Some(descriptors)),
                Ok(possible) => count = u32::try_from(possible).unwrap_or(0).min(count - 1),
                // Several MSI vectors need interrupt remapping; then one is what there is.
                Err(_) if count > 1 => count = 1,
                Err(_) => return Ok(None),
            }
        }
        Ok(None)
    }
}

impl Backing for Vfio {
    fn name(&self) -> &'static str {
        "vfio"
    }

    fn has_registers(&self) -> bool {
        true
    }

    fn has_dma(&self) -> bool {
        true
    }

    fn read32(&self, offset: u32) -> Result<u32> {
        self.registers.read32(offset)
    }

    fn write32(&self, offset: u32, value: u32) -> Result<()> {
        self.registers.write32(offset, value)
    }

    fn port_read(&self, offset: u32, width: Width) -> Result<u32> {
        pci::port_read(&self.device, self.ports_offset, offset, width)
    }

    fn port_write(&self, offset: u32, width: Width, value: u32) -> Result<()> {
        pci::port_write(&self.device, self.ports_offset, offset, width, value)
    }

    fn allocate(&self, bytes: usize) -> Result<DmaMemory> {
        let Pages { pointer, length } = pages::take(bytes)?;
        let address = pointer.as_ptr() as usize;
        let iova = match self.container.map(address, length) {
            Ok(iova) => iova,
            Err(error) => {
                crate::memory::unmap(address, length);
                return Err(error);
            }
        };
        let container = Arc::clone(&self.container);
        let memory = DmaMemory::owning(
            pointer,
            length,
            vec![Piece {
                address: iova,
                length: length as u64,
            }],
        )?;
        Ok(memory.release_after(move || container.unmap(iova, length as u64)))
    }

    fn set_up_interrupts(&self, vectors_wanted: u32) -> Result<Interrupts> {
        let mut vectors = self.vectors.lock().unwrap_or_else(PoisonError::into_inner);
        let kinds = [
            (interface::IRQ_MSIX, InterruptKind::MsiX),
            (interface::IRQ_MSI, InterruptKind::Msi),
            (interface::IRQ_INTX, InterruptKind::IntX),
        ];
        for (index, _) in kinds {
            // Whatever was on before (also behind the back of a restored VM) goes off first; what was off says no.
            let _was_off = self.set_irqs(index, &[]);
        }
        self.set_command(0, COMMAND_INTX_DISABLE)?;
        for (index, kind) in kinds {
            if let Some(descriptors) = self.try_vectors(index, vectors_wanted)? {
                vectors.granted = Interrupts {
                    kind,
                    vectors: descriptors.len() as u32,
                };
                vectors.descriptors = descriptors;
                return Ok(vectors.granted);
            }
        }
        Err(DriverError::SetUp(
            "the kernel grants the device no interrupt: neither MSI nor INTx".into(),
        ))
    }

    fn interrupt_descriptor(&self, vector: u32) -> Option<Arc<OwnedFd>> {
        let vectors = self.vectors.lock().unwrap_or_else(PoisonError::into_inner);
        let index = vector.checked_rem(vectors.granted.vectors)?;
        vectors.descriptors.get(index as usize).cloned()
    }

    fn take_interrupt(&self, vector: u32) -> Result<()> {
        let kind = self
            .vectors
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .granted
            .kind;
        if let Some(descriptor) = self.interrupt_descriptor(vector) {
            let mut count = [0; 8];
            match rustix::io::read(&descriptor, &mut count) {
                Ok(_) | Err(rustix::io::Errno::AGAIN) => {}
                Err(error) => return Err(DriverError::system("reading an interrupt's eventfd", error)),
            }
        }
        if kind == InterruptKind::IntX {
            let mut set = interface::IrqSet {
                argsz: 20,
                flags: interface::IRQ_DATA_NONE | interface::IRQ_ACTION_UNMASK,
                index: interface::IRQ_INTX,
                start: 0,
                count: 1,
                descriptors: [-1; VECTORS_MAX],
            };
            interface::call(self.device.as_fd(), interface::DEVICE_SET_IRQS, &mut set)
                .map_err(|error| DriverError::system("unmasking INTx", error))?;
        }
        Ok(())
    }

    fn config_read(&self, offset: u32, width: Width) -> Result<u32> {
        pci::config_read(&self.device, self.config_position(offset)?, width)
    }

    fn config_write(&self, offset: u32, width: Width, value: u32) -> Result<()> {
        pci::config_write(&self.device, self.config_position(offset)?, width, value)
    }

    fn restore_function(&self) -> Result<()> {
        // Written even when the value looks right: writing the enable bits is what makes vfio put lost BARs back.
        let command = self.config_read(super::CONFIG_COMMAND, Width::Two)?;
        let wanted = command | COMMAND_IO | COMMAND_MEMORY;
        self.config_write(super::CONFIG_COMMAND, Width::Two, wanted)
    }

    fn reset_function(&self) -> Result<bool> {
        if !self.can_reset {
            return Ok(false);
        }
        interface::call_number(self.device.as_fd(), interface::DEVICE_RESET, 0)
            .map_err(|error| DriverError::system("resetting the function", error))?;
        self.restore_function()?;
        Ok(true)
    }
}

impl Container {
    fn map(&self, address: usize, length: usize) -> Result<u64> {
        let mut addresses = self.addresses.lock().unwrap_or_else(PoisonError::into_inner);
        let iova = addresses
            .take(length as u64)
            .ok_or_else(|| DriverError::SetUp(format!("the IOMMU has no room for {length} bytes")))?;
        let mut map = interface::DmaMap {
            argsz: argsz::<interface::DmaMap>(),
            flags: interface::DMA_READ | interface::DMA_WRITE,
            virtual_address: address as u64,
            iova,
            size: length as u64,
        };
        interface::call(self.file.as_fd(), interface::IOMMU_MAP_DMA, &mut map).map_err(|error| {
            if error.raw_os_error() == Some(libc::ENOMEM) {
                return DriverError::SetUp(format!(
                    "vfio may not lock {length} bytes: raise the limit (ulimit -l)"
                ));
            }
            DriverError::system(format!("mapping {length} bytes for DMA"), error)
        })?;
        Ok(iova)
    }

    fn unmap(&self, iova: u64, length: u64) {
        let mut unmap = interface::DmaUnmap {
            argsz: argsz::<interface::DmaUnmap>(),
            iova,
            size: length,
            ..Default::default()
        };
        // It cannot fail for a range that `map` made; if it did, the address is not used again.
        if interface::call(self.file.as_fd(), interface::IOMMU_UNMAP_DMA, &mut unmap).is_ok() {
            self.addresses
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .returned
                .push((length, iova));
        }
    }
}

impl Addresses {
    /// An address for `length` bytes, aligned to huge pages where a huge page fits.
    fn take(&mut self, length: u64) -> Option<u64> {
        if let Some(index) = self.returned.iter().position(|(bytes, _)| *bytes == length) {
            return Some(self.returned.swap_remove(index).1);
        }
        let huge = HUGE_PAGE_BYTES as u64;
        let alignment = if length >= huge {
            huge
        } else {
            crate::limits::PAGE_BYTES as u64
        };
        for (first, last) in &self.ranges {
            let start = self.next.max(*first).checked_next_multiple_of(alignment)?;
            let end = start.checked_add(length - 1)?;
            if end <= *last {
                self.next = end + 1;
                return Some(start);
            }
        }
        None
    }
}

/// The ranges of device addresses that the IOMMU has, from 4 GiB up; where there are none so high, from 1 MiB up.
fn usable_ranges(container: &File) -> Vec<(u64, u64)> {
    let mut info = interface::IommuInfo {
        argsz: argsz::<interface::IommuInfo>(),
        flags: 0,
        page_sizes: 0,
        capability_offset: 0,
        padding: 0,
        capabilities: [0; 4096 - 24],
    };
    let default = vec![(IOVA_FIRST, IOVA_LAST)];
    if interface::call(container.as_fd(), interface::IOMMU_GET_INFO, &mut info).is_err()
        || info.flags & interface::IOMMU_INFO_CAPABILITIES == 0
    {
        return default;
    }
    let ranges = iova_ranges(&info.capabilities, info.capability_offset);
    let above = |floor: u64| -> Vec<(u64, u64)> {
        ranges
            .iter()
            .filter(|(_, last)| *last > floor)
            .map(|(first, last)| ((*first).max(floor), *last))
            .collect()
    };
    match (above(IOVA_FIRST), above(1 << 20)) {
        (high, _) if !high.is_empty() => high,
        (_, low) if !low.is_empty() => low,
        _ => default,
    }
}

/// Walks the capability chain; offsets count from the start of the structure, whose header is 24 bytes.
fn iova_ranges(capabilities: &[u8], first: u32) -> Vec<(u64, u64)> {
    let word32 = |at: usize| {
        capabilities
            .get(at..at + 4)?
            .try_into()
            .ok()
            .map(u32::from_ne_bytes)
    };
    let word64 = |at: usize| {
        capabilities
            .get(at..at + 8)?
            .try_into()
            .ok()
            .map(u64::from_ne_bytes)
    };
    let mut ranges = Vec::new();
    let mut next = first;
    // A chain has fewer links than this; a loop in it ends here.
    for _ in 0..16 {
        let Some(at) = (next as usize).checked_sub(24) else {
            break;
        };
        let (Some(head), Some(link)) = (word32(at), word32(at + 4)) else {
            break;
        };
        if head & 0xffff == u32::from(interface::CAPABILITY_IOVA_RANGE) {
            for index in 0..word32(at + 8).unwrap_or(0).min(128) as usize {
                if let (Some(start), Some(end)) = (word64(at + 16 + 16 * index), word64(at + 24 + 16 * index))
                {
                    ranges.push((start, end));
                }
            }
        }
        next = link;
    }
    ranges
}

impl Vfio {
    fn config_position(&self, offset: u32) -> Result<u64> {
        Ok(self.config_offset + u64::from(offset))
    }
}

fn open_node(path: &Path) -> Result<File> {
    let shown = path.display().to_string();
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(|error| match error.raw_os_error() {
            Some(libc::ENOENT) => DriverError::SetUp(format!(
                "{shown} is not there: modprobe vfio-pci (and devtmpfs must be mounted on /dev)"
            )),
            Some(libc::EBUSY) => DriverError::InUse {
                device: shown,
                holder: "(another vfio user)".into(),
            },
            _ => pci::denied(&shown, error),
        })
}

fn event_descriptor() -> Result<Arc<OwnedFd>> {
    rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
        .map(Arc::new)
        .map_err(|error| DriverError::system("making an eventfd", error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_do_not_overlap_and_are_used_again() {
        let mut addresses = Addresses {
            ranges: vec![(0x1000, 0x2fff), (4 << 30, (4 << 30) + (8 << 20))],
            next: 0,
            returned: Vec::new(),
        };
        assert_eq!(addresses.take(0x1000), Some(0x1000));
        assert_eq!(addresses.take(4 << 20), Some(4 << 30));
        assert_eq!(addresses.take(0x1000), Some((4 << 30) + (4 << 20)));
        addresses.returned.push((0x1000, 0x1000));
        assert_eq!(addresses.take(0x1000), Some(0x1000));
        assert_eq!(addresses.take(1 << 30), None);
    }

    #[test]
    fn a_chain_of_capabilities_ends() {
        let mut bytes = vec![0_u8; 64];
        bytes[0..4].copy_from_slice(&1_u32.to_ne_bytes());
        bytes[4..8].copy_from_slice(&24_u32.to_ne_bytes());
        bytes[8..12].copy_from_slice(&1_u32.to_ne_bytes());
        bytes[16..24].copy_from_slice(&0x1000_u64.to_ne_bytes());
        bytes[24..32].copy_from_slice(&0xffff_u64.to_ne_bytes());
        assert_eq!(iova_ranges(&bytes, 24).first(), Some(&(0x1000, 0xffff)));
        assert!(iova_ranges(&bytes, 4000).is_empty());
        assert!(iova_ranges(&bytes, 3).is_empty());
    }
}
