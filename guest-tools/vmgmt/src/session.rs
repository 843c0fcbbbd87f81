//! From the options to an open channel: device, lock, backing, Ctrl-C.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use vmgmt_driver::backing::pci::{DeviceLock, PciFunction};
use vmgmt_driver::backing::{self, BackingKind};
use vmgmt_driver::{Client, Device, DriverError, Mode, PortChannel, Ring, RingOptions, TransferOptions, abi};

use crate::arguments::{Backing, General};
use crate::output;

/// The device, held by this program. The lock is let go last.
pub struct Session {
    pub backing: Arc<dyn backing::Backing>,
    /// None over the port window alone.
    pub device: Option<Arc<Device>>,
    pub function: PciFunction,
    pub general: General,
    /// Readable once the program is asked to end.
    pub cancel: Arc<OwnedFd>,
    lock: DeviceLock,
}

/// The PCI function that the options name.
pub fn function(general: &General) -> Result<PciFunction> {
    match general.device.as_deref() {
        None => Ok(PciFunction::find(abi::PCI_VENDOR, abi::PCI_DEVICE)?),
        Some(text) => match text
            .split_once(':')
            .map(|(vendor, device)| (vendor.len(), device.len(), vendor, device))
        {
            Some((4, 4, vendor, device)) => {
                let number = |text| {
                    u16::from_str_radix(text, 16).map_err(|_| {
                        DriverError::BadArgument(format!("--device {text}: not a hexadecimal number"))
                    })
                };
                Ok(PciFunction::find(number(vendor)?, number(device)?)?)
            }
            _ => Ok(PciFunction::at(text)?),
        },
    }
}

/// Seconds from the command line.
pub fn seconds(value: f64) -> Result<Duration> {
    Duration::try_from_secs_f64(value)
        .map_err(|_| DriverError::BadArgument(format!("{value} is not a number of seconds")).into())
}

impl Session {
    /// Takes the device.
    pub fn open(general: &General) -> Result<Self> {
        let function = function(general)?;
        let lock = DeviceLock::take(&function, seconds(general.wait_device)?)?;
        let cancel = cancel_on_signals()?;
        let kind = match general.backing {
            Backing::Auto => BackingKind::Automatic,
            Backing::Vfio => BackingKind::Vfio,
            Backing::Uio => BackingKind::Uio,
            Backing::Ports => BackingKind::Ports,
        };
        raise_file_limit();
        let backing = backing::open(&function, kind)?;
        let device = if backing.has_registers() {
            let device = Device::open(Arc::clone(&backing))?;
            device.set_cancel(Some(Arc::clone(&cancel)));
            device.set_notice(|text| output::complain(format_args!("vmgmt: {text}")));
            Some(device)
        } else {
            None
        };
        Ok(Self {
            backing,
            device,
            function,
            general: general.clone(),
            cancel,
            lock,
        })
    }

    /// A ring in a mode, or the port window where there are no rings.
    pub fn client(&self, mode: Mode) -> Result<Client> {
        match &self.device {
            Some(device) => self.ring(device, mode, Duration::from_micros(self.general.spin_us)),
            None => self.port(mode),
        }
    }

    /// A ring with a spin time of its own.
    pub fn ring(&self, device: &Arc<Device>, mode: Mode, spin: Duration) -> Result<Client> {
        let depth = u32::from(self.general.depth) + 8;
        let options = RingOptions {
            spin,
            submission_entries: depth.next_power_of_two().max(64),
            completion_entries: depth.next_power_of_two().max(128),
            ..RingOptions::new(mode)
        };
        Ok(Client::new(
            Ring::open(device, options).with_context(|| format!("opening a ring in mode {mode:?}"))?,
        ))
    }

    /// The port window in a mode.
    pub fn port(&self, mode: Mode) -> Result<Client> {
        Ok(Client::new(PortChannel::open_locked(
            &self.backing,
            mode,
            Some(Arc::clone(&self.cancel)),
            &self.lock,
        )?))
    }

    /// How transfers are cut up.
    pub fn transfer(&self, check: bool) -> TransferOptions {
        TransferOptions {
            chunk_bytes: usize::from(self.general.chunk_kib) << 10,
            chunks_in_flight: self.general.depth.into(),
            check,
        }
    }
}

/// Lets the program open what it may: under uio each piece of memory for the device takes a descriptor.
fn raise_file_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // Up to the hard limit everybody may; if not, few submissions in flight need few.
    let _as_it_was = setrlimit(Resource::Nofile, limit);
}

/// A pipe that becomes readable at a signal that asks the program to end, and stays so.
fn cancel_on_signals() -> Result<Arc<OwnedFd>> {
    let (read, write) = std::io::pipe().context("making a pipe for signals")?;
    for signal in [
        signal_hook::consts::SIGINT,
        signal_hook::consts::SIGTERM,
        signal_hook::consts::SIGHUP,
        signal_hook::consts::SIGQUIT,
    ] {
        let write = write.try_clone().context("making a pipe for signals")?;
        signal_hook::low_level::pipe::register(signal, OwnedFd::from(write)).context("catching signals")?;
    }
    Ok(Arc::new(read.into()))
}
