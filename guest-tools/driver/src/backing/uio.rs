//! The device through `uio_pci_generic`: BARs from sysfs, INTx from `/dev/uioN`, physical addresses from pagemap.
//!
//! Comes in: register numbers, lengths. Goes out: values, locked memory with its physical pieces, the uio descriptor. There is no
//! IOMMU between the device and memory here: the addresses must be right and must stay right (see `allocate`).

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;

use super::hold;
use super::pages::{self, Pages};
use super::pci::{self, PciFunction};
use super::ports::restore_bars;
use super::register_map::RegisterMap;
use super::{
    Backing, COMMAND_INTX_DISABLE, COMMAND_IO, COMMAND_MASTER, COMMAND_MEMORY, InterruptKind, Interrupts,
    Width,
};
use crate::error::{DriverError, Result};
use crate::limits::PAGE_BYTES;
use crate::memory::{DmaMemory, Piece, push_piece};

/// Bits of a pagemap entry: the page is there; the number of its frame (Documentation/admin-guide/mm/pagemap.rst).
const PAGEMAP_PRESENT: u64 = 1 << 63;
const PAGEMAP_FRAME: u64 = (1 << 55) - 1;

/// A device bound to `uio_pci_generic`.
pub struct Uio {
    function: PciFunction,
    registers: RegisterMap,
    /// None when the kernel gave the I/O BAR no address.
    ports: Option<File>,
    config: File,
    interrupt: Arc<OwnedFd>,
}

impl Uio {
    /// Opens the function's uio node and BARs.
    ///
    /// # Errors
    /// What is missing: the driver, the node, the right.
    pub fn open(function: &PciFunction) -> Result<Self> {
        if function.driver().as_deref() != Some("uio_pci_generic") {
            return Err(DriverError::SetUp(format!(
                "{} is not bound to uio_pci_generic: vmgmt bind --driver uio",
                function.address()
            )));
        }
        refuse_translation(function)?;
        let node = node(function)?;
        let shown = node.display().to_string();
        let interrupt = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&node)
            .map_err(|error| pci::denied(&shown, error))?;
        let backing = Self {
            registers: RegisterMap::new(function.open("resource0")?.as_fd(), 0)?,
            ports: function.open("resource2").ok(),
            config: function.open("config")?,
            function: function.clone(),
            interrupt: Arc::new(interrupt.into()),
        };
        backing.restore_function()?;
        Ok(backing)
    }

    fn ports(&self) -> Result<&File> {
        self.ports.as_ref().ok_or(DriverError::NotPossible(
            "a port access",
            "uio: the I/O BAR has no address",
        ))
    }
}

impl Backing for Uio {
    fn name(&self) -> &'static str {
        "uio"
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
        pci::port_read(self.ports()?, 0, offset, width)
    }

    fn port_write(&self, offset: u32, width: Width, value: u32) -> Result<()> {
        pci::port_write(self.ports()?, 0, offset, width, value)
    }

    /// Locked memory whose pages stay where they are, and with the device until the uio node is closed, also when this program is killed.
    fn allocate(&self, bytes: usize) -> Result<DmaMemory> {
        let pages = pages::take(bytes)?;
        let held = pages::lock(&pages).and_then(|()| {
            let held = hold::hold(&pages)?;
            Ok((held, physical_pieces(&pages)?))
        });
        let Pages { pointer, length } = pages;
        match held {
            Ok((held, pieces)) => {
                Ok(DmaMemory::owning(pointer, length, pieces)?.and_then_release(move || drop(held)))
            }
            Err(error) => {
                crate::memory::unmap(pointer.as_ptr() as usize, length);
                Err(error)
            }
        }
    }

    fn set_up_interrupts(&self, _vectors_wanted: u32) -> Result<Interrupts> {
        self.set_command(0, COMMAND_INTX_DISABLE)?;
        Ok(Interrupts {
            kind: InterruptKind::IntX,
            vectors: 1,
        })
    }

    fn interrupt_descriptor(&self, _vector: u32) -> Option<Arc<OwnedFd>> {
        Some(Arc::clone(&self.interrupt))
    }

    fn take_interrupt(&self, _vector: u32) -> Result<()> {
        let mut count = [0; 4];
        match rustix::io::read(&self.interrupt, &mut count) {
            Ok(_) => {}
            // The kernel sets INTx disable only together with an event: without one there is nothing to clear.
            Err(rustix::io::Errno::AGAIN) => return Ok(()),
            Err(error) => {
                return Err(DriverError::system(
                    "reading the uio node (is the device still plugged in, and has it an interrupt?)",
                    error,
                ));
            }
        }
        self.set_command(0, COMMAND_INTX_DISABLE)
    }

    fn config_read(&self, offset: u32, width: Width) -> Result<u32> {
        pci::config_read(&self.config, u64::from(offset), width)
    }

    fn config_write(&self, offset: u32, width: Width, value: u32) -> Result<()> {
        pci::config_write(&self.config, u64::from(offset), width, value)
    }

    fn restore_function(&self) -> Result<()> {
        restore_bars(&self.function, &self.config)?;
        self.set_command(COMMAND_IO | COMMAND_MEMORY, 0)
    }

    fn keep_function(&self) -> Result<()> {
        // A reset through sysfs puts back the COMMAND of its beginning: with the line disabled where an interrupt was being taken just then.
        // Where one waits to be taken, the kernel disables the line once more.
        self.set_command(COMMAND_MEMORY | COMMAND_MASTER, COMMAND_INTX_DISABLE)
    }

    fn reset_function(&self) -> Result<bool> {
        // The kernel saves and restores configuration space around it.
        let path = self.function.path("reset");
        if !path.exists() {
            return Ok(false);
        }
        pci::put(&path, "1")?;
        self.restore_function().map(|()| true)
    }
}

/// Behind an IOMMU that translates, physical addresses are the wrong ones.
fn refuse_translation(function: &PciFunction) -> Result<()> {
    let kind = fs::read_to_string(function.path("iommu_group/type")).unwrap_or_default();
    match kind.trim() {
        "" | "identity" => Ok(()),
        kind => Err(DriverError::SetUp(format!(
            "{} is behind an IOMMU ({kind}), so uio's physical addresses do not reach memory: use vfio (vmgmt bind --driver vfio), or boot this kernel with iommu=pt",
            function.address()
        ))),
    }
}

/// `/dev/uioN` of a function.
fn node(function: &PciFunction) -> Result<PathBuf> {
    let directory = function.path("uio");
    let name = fs::read_dir(&directory)
        .map_err(|error| DriverError::system(directory.display().to_string(), error))?
        .flatten()
        .find_map(|entry| {
            entry
                .file_name()
                .to_str()
                .filter(|name| name.starts_with("uio"))
                .map(str::to_owned)
        })
        .ok_or_else(|| DriverError::SetUp(format!("{}: no uio node", directory.display())))?;
    Ok(PathBuf::from("/dev").join(name))
}

/// Physical pieces of a locked mapping.
fn physical_pieces(pages: &Pages) -> Result<Vec<Piece>> {
    let failed = |error| DriverError::system("/proc/self/pagemap", error);
    let pagemap = File::open("/proc/self/pagemap").map_err(failed)?;
    let count = pages.length / PAGE_BYTES;
    let mut bytes = vec![0_u8; count * 8];
    let first = pages.pointer.as_ptr() as usize / PAGE_BYTES;
    pagemap
        .read_exact_at(&mut bytes, first as u64 * 8)
        .map_err(failed)?;
    let mut pieces = Vec::new();
    for entry in bytes.as_chunks::<8>().0 {
        let entry = u64::from_ne_bytes(*entry);
        let frame = entry & PAGEMAP_FRAME;
        if entry & PAGEMAP_PRESENT == 0 || frame == 0 {
            return Err(DriverError::SetUp(
                "/proc/self/pagemap hides physical addresses: run as root (CAP_SYS_ADMIN), or use vfio"
                    .into(),
            ));
        }
        push_piece(&mut pieces, frame * PAGE_BYTES as u64, PAGE_BYTES as u64);
    }
    Ok(pieces)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locked_pages_have_addresses_or_a_clear_error() {
        let pages = pages::take(8 * PAGE_BYTES).unwrap();
        match physical_pieces(&pages) {
            Ok(pieces) => assert_eq!(
                pieces.iter().map(|piece| piece.length).sum::<u64>(),
                8 * PAGE_BYTES as u64
            ),
            Err(error) => assert!(error.to_string().contains("CAP_SYS_ADMIN"), "{error}"),
        }
        crate::memory::unmap(pages.pointer.as_ptr() as usize, pages.length);
    }
}
