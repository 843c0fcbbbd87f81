//! How a driver reaches its device: the one trait that the rest of this crate knows.
//!
//! Comes in: register numbers, lengths. Goes out: values, memory that the device can reach, a descriptor that becomes
//! readable when the device interrupts. Never: anything of rings, modes or files.
//!
//! The trait is object-safe and takes `&self` everywhere; an implementation in another crate (an in-process device)
//! needs no `unsafe`: [`DmaMemory::map_file`] or [`memfd::MemfdMemory`] give it guest memory.

#[allow(unsafe_code)]
mod hold;
pub mod memfd;
#[allow(unsafe_code)]
mod pages;
pub mod pci;
#[allow(unsafe_code)]
mod port_instructions;
pub mod ports;
#[allow(unsafe_code)]
mod register_map;
pub mod uio;
#[allow(unsafe_code)]
pub mod vfio;
#[allow(unsafe_code)]
mod vfio_interface;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::error::{DriverError, Result};
use crate::memory::DmaMemory;

/// Width of an access to the port window or to configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    One,
    Two,
    Four,
}

impl Width {
    /// Bytes.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::One => 1,
            Self::Two => 2,
            Self::Four => 4,
        }
    }
}

/// Kinds of interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InterruptKind {
    /// None: the driver looks now and then.
    None,
    /// A shared level: acknowledge, enable again, look at the rings, sleep.
    IntX,
    Msi,
    MsiX,
}

/// What the system granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interrupts {
    pub kind: InterruptKind,
    /// Vectors that are enabled; ring vectors beyond them are taken modulo their number.
    pub vectors: u32,
}

impl Interrupts {
    /// No interrupt at all.
    pub const NONE: Self = Self {
        kind: InterruptKind::None,
        vectors: 0,
    };
}

/// A device as one program reaches it.
pub trait Backing: Send + Sync {
    /// A short name: "vfio", "uio", "ports", ….
    fn name(&self) -> &'static str;

    /// Whether BAR0 is there (`read32`, `write32`).
    fn has_registers(&self) -> bool;

    /// Whether the device can reach memory of this program (`allocate` gives pieces).
    fn has_dma(&self) -> bool;

    /// Reads an aligned 32-bit register of BAR0.
    ///
    /// # Errors
    /// There is no BAR0, or the offset is beyond it.
    fn read32(&self, offset: u32) -> Result<u32>;

    /// Writes an aligned 32-bit register of BAR0.
    ///
    /// # Errors
    /// As [`Self::read32`].
    fn write32(&self, offset: u32, value: u32) -> Result<()>;

    /// Reads a `_LOW`/`_HIGH` pair as two words.
    ///
    /// # Errors
    /// As [`Self::read32`].
    fn read64(&self, offset: u32) -> Result<u64> {
        let low = self.read32(offset)?;
        let high = self.read32(offset.saturating_add(4))?;
        Ok(u64::from(high) << 32 | u64::from(low))
    }

    /// Writes a `_LOW`/`_HIGH` pair as two words, the high one last (it latches where something latches).
    ///
    /// # Errors
    /// As [`Self::read32`].
    fn write64(&self, offset: u32, value: u64) -> Result<()> {
        self.write32(offset, value as u32)?;
        self.write32(offset.saturating_add(4), (value >> 32) as u32)
    }

    /// Reads from the port window (BAR2).
    ///
    /// # Errors
    /// There is no port window, or the access was refused by the system.
    fn port_read(&self, offset: u32, width: Width) -> Result<u32>;

    /// Writes to the port window (BAR2).
    ///
    /// # Errors
    /// As [`Self::port_read`].
    fn port_write(&self, offset: u32, width: Width, value: u32) -> Result<()>;

    /// Zeroed memory of at least `bytes` bytes (rounded up to pages), page-aligned, with its device addresses.
    ///
    /// # Errors
    /// No memory, no right to lock it, or no DMA with this backing.
    fn allocate(&self, bytes: usize) -> Result<DmaMemory>;

    /// Asks for interrupts; gives what was granted. Called again after a reset of the function.
    ///
    /// # Errors
    /// The system refused even one.
    fn set_up_interrupts(&self, vectors_wanted: u32) -> Result<Interrupts>;

    /// A descriptor that polls readable when `vector` has interrupted since the last [`Self::take_interrupt`].
    fn interrupt_descriptor(&self, vector: u32) -> Option<Arc<OwnedFd>>;

    /// Takes what is pending and makes the next interrupt possible (for INTx: clears COMMAND bit 10, or unmasks).
    /// The driver has written the acknowledge register before, and looks at its rings after.
    ///
    /// # Errors
    /// The descriptor or the configuration space failed.
    fn take_interrupt(&self, vector: u32) -> Result<()>;

    /// Reads configuration space.
    ///
    /// # Errors
    /// The system refused.
    fn config_read(&self, offset: u32, width: Width) -> Result<u32>;

    /// Writes configuration space.
    ///
    /// # Errors
    /// The system refused.
    fn config_write(&self, offset: u32, width: Width, value: u32) -> Result<()>;

    /// Puts back what a restore of the VM may have cleared: BARs and COMMAND (memory, I/O), so that registers are reached. DMA is let begin by
    /// [`Self::begin_mastering`].
    ///
    /// # Errors
    /// The configuration space failed.
    fn restore_function(&self) -> Result<()> {
        self.set_command(COMMAND_IO | COMMAND_MEMORY, 0)
    }

    /// Lets the function master the bus. Only when the device is BLANK: until then an access to memory of who held it before may be under way
    /// (docs/abi.md, "Finding the device"), and without bus mastering it comes to nothing.
    ///
    /// # Errors
    /// The configuration space failed.
    fn begin_mastering(&self) -> Result<()> {
        self.set_command(COMMAND_MASTER, 0)
    }

    /// Takes the bus from the function. The write is answered when no access of the device's to memory is under way any more.
    ///
    /// # Errors
    /// The configuration space failed, or does not say that it is so.
    fn end_mastering(&self) -> Result<()> {
        let read = || self.config_read(CONFIG_COMMAND, Width::Two);
        let command = read()?;
        // All ones is no answer.
        if command != 0xffff {
            self.config_write(CONFIG_COMMAND, Width::Two, command & !COMMAND_MASTER)?;
            if read()? & COMMAND_MASTER == 0 {
                return Ok(());
            }
        }
        Err(DriverError::DeviceAbsent)
    }

    /// Puts back what somebody else took from COMMAND while the device was in use: nothing is written where nothing is missing.
    ///
    /// # Errors
    /// The configuration space failed.
    fn keep_function(&self) -> Result<()> {
        self.set_command(COMMAND_MEMORY | COMMAND_MASTER, 0)
    }

    /// Resets the PCI function; false where this backing cannot.
    ///
    /// # Errors
    /// The system tried and failed.
    fn reset_function(&self) -> Result<bool> {
        Ok(false)
    }

    /// Sets and clears bits of COMMAND.
    ///
    /// # Errors
    /// The configuration space failed.
    fn set_command(&self, set: u32, clear: u32) -> Result<()> {
        let command = self.config_read(CONFIG_COMMAND, Width::Two)?;
        let wanted = (command | set) & !clear & 0xffff;
        if wanted != command {
            self.config_write(CONFIG_COMMAND, Width::Two, wanted)?;
        }
        Ok(())
    }
}

/// COMMAND of PCI configuration space (PCI 3.0, 6.2.2).
pub const CONFIG_COMMAND: u32 = 0x04;
/// First base address register.
pub const CONFIG_BAR0: u32 = 0x10;
pub const COMMAND_IO: u32 = 1 << 0;
pub const COMMAND_MEMORY: u32 = 1 << 1;
pub const COMMAND_MASTER: u32 = 1 << 2;
pub const COMMAND_INTX_DISABLE: u32 = 1 << 10;

/// Which backing to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum BackingKind {
    /// What the device's kernel driver allows: vfio, uio, else the ports.
    #[default]
    Automatic,
    Vfio,
    Uio,
    Ports,
}

/// Opens a PCI function through the backing asked for.
///
/// # Errors
/// What is missing on this machine, in words.
pub fn open(function: &pci::PciFunction, kind: BackingKind) -> Result<Arc<dyn Backing>> {
    let driver = function.driver();
    match (kind, driver.as_deref()) {
        (BackingKind::Vfio, _) | (BackingKind::Automatic, Some("vfio-pci")) => {
            Ok(Arc::new(vfio::Vfio::open(function)?))
        }
        (BackingKind::Uio, _) | (BackingKind::Automatic, Some("uio_pci_generic")) => {
            Ok(Arc::new(uio::Uio::open(function)?))
        }
        (BackingKind::Ports, _) | (BackingKind::Automatic, None) => {
            Ok(Arc::new(ports::Ports::open(function)?))
        }
        (BackingKind::Automatic, Some(other)) => Err(DriverError::SetUp(format!(
            "the device {} is bound to the kernel driver {other}: bind it to vfio-pci or uio_pci_generic (vmgmt bind)",
            function.address()
        ))),
    }
}
