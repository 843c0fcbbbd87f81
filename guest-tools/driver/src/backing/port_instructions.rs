//! The machine's own `in` and `out`, for when sysfs offers no file for the ports.
//!
//! Comes in: a port the kernel allowed (`ioperm`). Goes out: bytes. Only x86 has them.

use super::Width;
use crate::error::{DriverError, Result};

/// The right to use a range of ports from this thread on (and from threads it starts).
#[derive(Debug)]
pub struct PortRange {
    base: u16,
    length: u16,
}

impl PortRange {
    /// Asks the kernel for the ports.
    ///
    /// # Errors
    /// Not root, a locked-down kernel, or another machine.
    #[cfg(target_arch = "x86_64")]
    pub fn take(base: u64, length: u16) -> Result<Self> {
        let base = u16::try_from(base)
            .ok()
            .filter(|base| base.checked_add(length).is_some());
        let base =
            base.ok_or_else(|| DriverError::SetUp("the device's I/O BAR has no port address".into()))?;
        // SAFETY: grants this thread ports that belong to our device; touches no memory.
        if unsafe { libc::ioperm(base.into(), length.into(), 1) } != 0 {
            let error = std::io::Error::last_os_error();
            return Err(super::pci::denied("ioperm (access to I/O ports)", error));
        }
        Ok(Self { base, length })
    }

    /// Other machines have no ports.
    ///
    /// # Errors
    /// Always.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn take(_base: u64, _length: u16) -> Result<Self> {
        Err(DriverError::SetUp("this machine has no I/O ports".into()))
    }

    fn port(&self, offset: u32, width: Width) -> Result<u16> {
        u16::try_from(offset)
            .ok()
            .filter(|offset| {
                offset
                    .checked_add(width.bytes() as u16)
                    .is_some_and(|end| end <= self.length)
            })
            .and_then(|offset| self.base.checked_add(offset))
            .ok_or(DriverError::Bounds {
                start: offset as usize,
                length: width.bytes(),
                memory_bytes: self.length.into(),
            })
    }

    /// `in`.
    ///
    /// # Errors
    /// Beyond the range.
    #[cfg(target_arch = "x86_64")]
    pub fn read(&self, offset: u32, width: Width) -> Result<u32> {
        use std::arch::asm;
        let port = self.port(offset, width)?;
        let value: u32;
        // SAFETY: the kernel granted these ports to this thread; a port access touches no memory of ours.
        unsafe {
            match width {
                Width::One => {
                    let byte: u8;
                    asm!("in al, dx", in("dx") port, out("al") byte, options(nomem, nostack, preserves_flags));
                    value = byte.into();
                }
                Width::Two => {
                    let word: u16;
                    asm!("in ax, dx", in("dx") port, out("ax") word, options(nomem, nostack, preserves_flags));
                    value = word.into();
                }
                Width::Four => {
                    asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack, preserves_flags));
                }
            }
        }
        Ok(value)
    }

    /// `out`.
    ///
    /// # Errors
    /// Beyond the range.
    #[cfg(target_arch = "x86_64")]
    pub fn write(&self, offset: u32, width: Width, value: u32) -> Result<()> {
        use std::arch::asm;
        let port = self.port(offset, width)?;
        // SAFETY: as in `read`.
        unsafe {
            match width {
                Width::One => {
                    asm!("out dx, al", in("dx") port, in("al") value as u8, options(nomem, nostack, preserves_flags));
                }
                Width::Two => {
                    asm!("out dx, ax", in("dx") port, in("ax") value as u16, options(nomem, nostack, preserves_flags));
                }
                Width::Four => {
                    asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack, preserves_flags));
                }
            }
        }
        Ok(())
    }

    /// Never reached: `take` fails.
    ///
    /// # Errors
    /// Always.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn read(&self, offset: u32, width: Width) -> Result<u32> {
        self.port(offset, width)
            .and(Err(DriverError::NotPossible("a port access", "ports")))
    }

    /// Never reached: `take` fails.
    ///
    /// # Errors
    /// Always.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn write(&self, offset: u32, width: Width, _value: u32) -> Result<()> {
        self.port(offset, width)
            .and(Err(DriverError::NotPossible("a port access", "ports")))
    }
}
