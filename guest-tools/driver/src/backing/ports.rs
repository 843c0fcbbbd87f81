//! The port window alone: no kernel driver bound, no DMA, no interrupt.
//!
//! Comes in: port offsets. Goes out: bytes, through sysfs `resource2`, or the machine's own instructions where that file
//! cannot be used.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vmgmt_abi::port;

use super::pci::{self, PciFunction};
use super::port_instructions::PortRange;
use super::{Backing, COMMAND_IO, CONFIG_BAR0, Interrupts, Width};
use crate::error::{DriverError, Result};
use crate::memory::DmaMemory;

enum Access {
    File(File),
    Instructions(PortRange),
}

/// A device reached through its I/O ports.
pub struct Ports {
    function: PciFunction,
    config: File,
    access: Access,
}

impl Ports {
    /// Opens the port window and enables it.
    ///
    /// # Errors
    /// Not root, or the kernel forbids port access.
    pub fn open(function: &PciFunction) -> Result<Self> {
        let config = function.open("config")?;
        if function.driver().is_none()
            && let Ok(mut enable) = function.open("enable")
        {
            // Fails when it is enabled already; COMMAND is set below in any case.
            let _already = enable.write_all(b"1");
        }
        let probe = |file: File| {
            let mut magic = [0; 4];
            file.read_exact_at(&mut magic, 0).ok().map(|()| file)
        };
        let ports = |access| Self {
            function: function.clone(),
            config,
            access,
        };
        let ports = match function.open("resource2").ok().and_then(probe) {
            Some(file) => ports(Access::File(file)),
            None => ports(Access::Instructions(PortRange::take(
                function.resource(2)?.0,
                port::BAR2_BYTES as u16,
            )?)),
        };
        ports.restore_function()?;
        Ok(ports)
    }
}

impl Backing for Ports {
    fn name(&self) -> &'static str {
        "ports"
    }

    fn has_registers(&self) -> bool {
        false
    }

    fn has_dma(&self) -> bool {
        false
    }

    fn read32(&self, _offset: u32) -> Result<u32> {
        Err(DriverError::NotPossible("reading a register of BAR0", "ports"))
    }

    fn write32(&self, _offset: u32, _value: u32) -> Result<()> {
        Err(DriverError::NotPossible("writing a register of BAR0", "ports"))
    }

    fn port_read(&self, offset: u32, width: Width) -> Result<u32> {
        match &self.access {
            Access::File(file) => pci::port_read(file, 0, offset, width),
            Access::Instructions(range) => range.read(offset, width),
        }
    }

    fn port_write(&self, offset: u32, width: Width, value: u32) -> Result<()> {
        match &self.access {
            Access::File(file) => pci::port_write(file, 0, offset, width, value),
            Access::Instructions(range) => range.write(offset, width, value),
        }
    }

    fn allocate(&self, bytes: usize) -> Result<DmaMemory> {
        DmaMemory::ordinary(bytes)
    }

    fn set_up_interrupts(&self, _vectors_wanted: u32) -> Result<Interrupts> {
        Ok(Interrupts::NONE)
    }

    fn interrupt_descriptor(&self, _vector: u32) -> Option<Arc<OwnedFd>> {
        None
    }

    fn take_interrupt(&self, _vector: u32) -> Result<()> {
        Ok(())
    }

    fn config_read(&self, offset: u32, width: Width) -> Result<u32> {
        pci::config_read(&self.config, u64::from(offset), width)
    }

    fn config_write(&self, offset: u32, width: Width, value: u32) -> Result<()> {
        pci::config_write(&self.config, u64::from(offset), width, value)
    }

    fn restore_function(&self) -> Result<()> {
        restore_bars(&self.function, &self.config)?;
        self.set_command(COMMAND_IO, 0)
    }
}

/// Writes the addresses that the kernel assigned into base address registers that lost them (a restored VM).
pub(super) fn restore_bars(function: &PciFunction, config: &File) -> Result<()> {
    for index in 0..3_u32 {
        let Ok((start, _)) = function.resource(index as usize) else {
            continue;
        };
        let register = CONFIG_BAR0 + 4 * index;
        let now = pci::config_read(config, register.into(), Width::Four)?;
        if now & !0xf == 0 {
            pci::config_write(config, register.into(), Width::Four, start as u32)?;
            if now & 0x7 == 0x4 {
                pci::config_write(config, (register + 4).into(), Width::Four, (start >> 32) as u32)?;
            }
        }
    }
    Ok(())
}
