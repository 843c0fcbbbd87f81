//! Finding the PCI function and its files in sysfs, binding it to a kernel driver, and the lock that one program holds on it.
//!
//! Comes in: a vendor, a device, an address. Goes out: paths and open files. Never: device registers.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::Width;
use crate::error::{DriverError, Result};

const DEVICES: &str = "/sys/bus/pci/devices";
const LOCKS: &str = "/run/vmgmt";

/// A PCI function of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciFunction {
    address: String,
    directory: PathBuf,
    vendor: u16,
    device: u16,
}

impl PciFunction {
    /// The function at an address, as `0000:00:03.0` or `00:03.0`.
    ///
    /// # Errors
    /// There is none.
    pub fn at(address: &str) -> Result<Self> {
        let address = if address.matches(':').count() == 1 {
            format!("0000:{address}")
        } else {
            address.to_owned()
        };
        let plain = address
            .chars()
            .all(|c| c.is_ascii_hexdigit() || c == ':' || c == '.');
        if !plain {
            return Err(DriverError::BadArgument(format!(
                "{address:?} is not a PCI address such as 0000:00:03.0"
            )));
        }
        let directory = Path::new(DEVICES).join(&address);
        let number = |name: &str| {
            let text = fs::read_to_string(directory.join(name)).ok()?;
            u16::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok()
        };
        match (number("vendor"), number("device")) {
            (Some(vendor), Some(device)) => Ok(Self {
                address,
                directory,
                vendor,
                device,
            }),
            _ => Err(DriverError::NoDevice(format!(
                "there is no PCI function {address}"
            ))),
        }
    }

    /// The only function with these numbers.
    ///
    /// # Errors
    /// There is none, or there are several (all are named).
    pub fn find(vendor: u16, device: u16) -> Result<Self> {
        let mut found = Vec::new();
        for entry in fs::read_dir(DEVICES)
            .map_err(|error| DriverError::system(DEVICES, error))?
            .flatten()
        {
            if let Some(function) = entry.file_name().to_str().and_then(|name| Self::at(name).ok())
                && function.vendor == vendor
                && function.device == device
            {
                found.push(function);
            }
        }
        found.sort_by(|left, right| left.address.cmp(&right.address));
        let names: Vec<String> = found.iter().map(|function| function.address.clone()).collect();
        let mut found = found.into_iter();
        match (found.next(), found.next()) {
            (Some(one), None) => Ok(one),
            (None, _) => Err(DriverError::NoDevice(format!(
                "no PCI device {vendor:04x}:{device:04x} in this machine: is the VM started with -device vfio-user-pci, or has the device other numbers (--device)?"
            ))),
            _ => Err(DriverError::NoDevice(format!(
                "several devices, choose one with --device: {}",
                names.join(", ")
            ))),
        }
    }

    /// Its address, as `0000:00:03.0`.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Vendor and device numbers.
    #[must_use]
    pub const fn numbers(&self) -> (u16, u16) {
        (self.vendor, self.device)
    }

    /// A file of its sysfs directory.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Opens a file of its sysfs directory for reading and writing.
    ///
    /// # Errors
    /// The file is not there or may not be opened.
    pub fn open(&self, name: &str) -> Result<File> {
        let path = self.path(name);
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .map_err(|error| denied(&path.display().to_string(), error))
    }

    /// The kernel driver it is bound to.
    #[must_use]
    pub fn driver(&self) -> Option<String> {
        link_name(&self.path("driver"))
    }

    /// Its IOMMU group.
    #[must_use]
    pub fn iommu_group(&self) -> Option<String> {
        link_name(&self.path("iommu_group"))
    }

    /// Start and end (inclusive) of a base address register's window, as the kernel assigned it.
    ///
    /// # Errors
    /// The file `resource` is not readable or has no such line.
    pub fn resource(&self, index: usize) -> Result<(u64, u64)> {
        let path = self.path("resource");
        let text = fs::read_to_string(&path)
            .map_err(|error| DriverError::system(path.display().to_string(), error))?;
        let mut words = text.lines().nth(index).unwrap_or_default().split_whitespace();
        let mut word = || u64::from_str_radix(words.next()?.trim_start_matches("0x"), 16).ok();
        match (word(), word()) {
            (Some(start), Some(end)) if end > start => Ok((start, end)),
            _ => Err(DriverError::SetUp(format!(
                "{}: BAR{index} has no address",
                self.address
            ))),
        }
    }

    /// Binds it to a kernel driver (or to none), through `driver_override`.
    ///
    /// # Errors
    /// What is missing: the module, the right, the IOMMU.
    pub fn bind(&self, driver: Option<&str>) -> Result<()> {
        if self.driver().as_deref() == driver {
            return Ok(());
        }
        if let Some(driver) = driver
            && !Path::new("/sys/bus/pci/drivers").join(driver).exists()
        {
            return Err(DriverError::SetUp(format!(
                "the kernel driver {driver} is not loaded: `modprobe {}`, or install the kernel's module package",
                driver.replace('-', "_")
            )));
        }
        put(&self.path("driver_override"), driver.unwrap_or("\n"))?;
        if self.driver().is_some() {
            put(&self.path("driver/unbind"), &self.address)?;
        }
        if let Some(driver) = driver {
            // uio_pci_generic and vfio-pci take a device with driver_override without knowing its numbers.
            let probed = put(Path::new("/sys/bus/pci/drivers_probe"), &self.address);
            if self.driver().as_deref() != Some(driver) {
                put(
                    &Path::new("/sys/bus/pci/drivers").join(driver).join("new_id"),
                    &format!("{:04x} {:04x}", self.vendor, self.device),
                )
                .or(probed)?;
            }
            if self.driver().as_deref() != Some(driver) {
                return Err(DriverError::SetUp(format!(
                    "{driver} did not take the device {}: see the kernel's log (dmesg){}",
                    self.address,
                    if driver == "vfio-pci" && self.iommu_group().is_none() {
                        "; this machine has no IOMMU: start QEMU with -device intel-iommu,caching-mode=on or -device virtio-iommu-pci, or bind to uio"
                    } else {
                        ""
                    }
                )));
            }
        }
        Ok(())
    }
}

/// Reads configuration space through sysfs.
pub(crate) fn config_read(config: &File, offset: u64, width: Width) -> Result<u32> {
    let mut bytes = [0_u8; 4];
    let part = bytes.get_mut(..width.bytes()).unwrap_or_default();
    config
        .read_exact_at(part, offset)
        .map_err(|error| DriverError::system(format!("reading configuration space at {offset:#x}"), error))?;
    Ok(u32::from_le_bytes(bytes))
}

/// Writes configuration space through sysfs.
pub(crate) fn config_write(config: &File, offset: u64, width: Width, value: u32) -> Result<()> {
    let bytes = value.to_le_bytes();
    config
        .write_all_at(bytes.get(..width.bytes()).unwrap_or_default(), offset)
        .map_err(|error| DriverError::system(format!("writing configuration space at {offset:#x}"), error))
}

/// Reads the port window through a file whose bytes are ports.
pub(crate) fn port_read(file: &File, base: u64, offset: u32, width: Width) -> Result<u32> {
    let mut bytes = [0_u8; 4];
    let part = bytes.get_mut(..width.bytes()).unwrap_or_default();
    file.read_exact_at(part, base + u64::from(offset))
        .map_err(|error| DriverError::system(format!("reading port {offset:#x}"), error))?;
    Ok(u32::from_le_bytes(bytes))
}

/// Writes the port window through a file whose bytes are ports.
pub(crate) fn port_write(file: &File, base: u64, offset: u32, width: Width, value: u32) -> Result<()> {
    let bytes = value.to_le_bytes();
    file.write_all_at(
        bytes.get(..width.bytes()).unwrap_or_default(),
        base + u64::from(offset),
    )
    .map_err(|error| DriverError::system(format!("writing port {offset:#x}"), error))
}

/// Says which right is missing.
pub(crate) fn denied(what: &str, error: std::io::Error) -> DriverError {
    if error.kind() == std::io::ErrorKind::PermissionDenied {
        return DriverError::SetUp(format!(
            "{what}: permission denied; run as root (or, for vfio, give the user the group's file)"
        ));
    }
    DriverError::system(what, error)
}

fn link_name(link: &Path) -> Option<String> {
    Some(fs::read_link(link).ok()?.file_name()?.to_str()?.to_owned())
}

/// Writes a word into a file of sysfs.
pub(crate) fn put(path: &Path, text: &str) -> Result<()> {
    let name = path.display().to_string();
    let mut file = OpenOptions::new()
        .write(true)
        .open(path)
        .map_err(|error| denied(&name, error))?;
    file.write_all(text.as_bytes())
        .map_err(|error| denied(&name, error))
}

/// The right to drive one device, for one program at a time.
#[derive(Debug)]
pub struct DeviceLock {
    _file: File,
}

impl DeviceLock {
    /// Takes the lock of a function, waiting at most `patience`.
    ///
    /// # Errors
    /// Somebody else holds it (with the process number), or the lock file cannot be made.
    pub fn take(function: &PciFunction, patience: Duration) -> Result<Self> {
        Self::take_file(Path::new(LOCKS), function.address(), patience)
    }

    /// The same in another directory.
    ///
    /// # Errors
    /// As [`Self::take`].
    pub fn take_file(directory: &Path, name: &str, patience: Duration) -> Result<Self> {
        fs::create_dir_all(directory).map_err(|error| denied(&directory.display().to_string(), error))?;
        let path = directory.join(format!("{name}.lock"));
        let shown = path.display().to_string();
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|error| denied(&shown, error))?;
        let until = Instant::now() + patience;
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(fs::TryLockError::WouldBlock) if Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(fs::TryLockError::WouldBlock) => {
                    let mut holder = String::new();
                    let _unreadable = file.read_to_string(&mut holder);
                    let holder = if holder.trim().is_empty() {
                        "(unknown)".to_owned()
                    } else {
                        holder.trim().to_owned()
                    };
                    return Err(DriverError::InUse {
                        device: name.to_owned(),
                        holder,
                    });
                }
                Err(fs::TryLockError::Error(error)) => return Err(DriverError::system(shown, error)),
            }
        }
        let recorded = file
            .set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| file.write_all(std::process::id().to_string().as_bytes()));
        recorded.map_err(|error| DriverError::system(shown, error))?;
        Ok(Self { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_lock_names_the_holder() {
        let directory = tempfile::tempdir().unwrap();
        let first = DeviceLock::take_file(directory.path(), "0000:00:03.0", Duration::ZERO).unwrap();
        let error = DeviceLock::take_file(directory.path(), "0000:00:03.0", Duration::ZERO).unwrap_err();
        assert!(
            error.to_string().contains(&std::process::id().to_string()),
            "{error}"
        );
        drop(first);
        DeviceLock::take_file(directory.path(), "0000:00:03.0", Duration::ZERO).unwrap();
    }

    #[test]
    fn an_address_is_not_a_path() {
        assert!(matches!(
            PciFunction::at("../../x"),
            Err(DriverError::BadArgument(_))
        ));
        assert!(matches!(
            PciFunction::at("ffff:ff:1f.7"),
            Err(DriverError::NoDevice(_))
        ));
    }
}
