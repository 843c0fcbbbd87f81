//! `vmgmt bind`: module, driver, and what is missing.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};
use serde_json::json;

use crate::arguments::{Driver, General};
use crate::output::say;
use crate::session::function;

/// Loads a module with modprobe, if it is not there. Gives what went wrong in words.
fn load(module: &str, driver: &str) -> Option<String> {
    if Path::new("/sys/bus/pci/drivers").join(driver).exists() {
        return None;
    }
    match Command::new("modprobe").arg(module).output() {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(format!(
            "modprobe {module}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        )),
        Err(error) => Some(format!("modprobe {module}: {error}")),
    }
}

/// Binds the device.
pub fn bind(general: &General, driver: Option<Driver>) -> Result<()> {
    let function = function(general)?;
    let driver = driver.unwrap_or(if function.iommu_group().is_some() {
        Driver::Vfio
    } else {
        Driver::Uio
    });
    let (name, module) = match driver {
        Driver::Vfio => (Some("vfio-pci"), Some("vfio-pci")),
        Driver::Uio => (Some("uio_pci_generic"), Some("uio_pci_generic")),
        Driver::None => (None, None),
    };
    if driver == Driver::Vfio && function.iommu_group().is_none() {
        bail!(crate::ending::ending(
            crate::ending::NO_DEVICE,
            "this machine has no IOMMU, which vfio needs: start QEMU with -device intel-iommu,caching-mode=on (or virtio-iommu-pci), or use --driver uio"
        ));
    }
    let missing = name.zip(module).and_then(|(name, module)| load(module, name));
    match (function.bind(name), missing) {
        (Ok(()), _) => {}
        (Err(error), Some(missing)) => return Err(anyhow::Error::new(error).context(missing)),
        (Err(error), None) => return Err(error.into()),
    }
    let mut note = None;
    if driver == Driver::Uio {
        // The driver holds pages so that they cannot be moved; compaction need not even look at them.
        let compaction = "/proc/sys/vm/compact_unevictable_allowed";
        match std::fs::write(compaction, "0") {
            Ok(()) => {
                note = Some(format!(
                    "{compaction} is 0 now: locked pages stay where the device finds them"
                ))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => note = Some(format!("{compaction}: {error}; it works without, too")),
        }
    }
    if general.json {
        say!(
            "{}",
            json!({"device": function.address(), "driver": name, "iommu_group": function.iommu_group(), "note": note})
        );
    } else {
        say!(
            "{} is bound to {}",
            function.address(),
            name.unwrap_or("no driver")
        );
        if let Some(note) = note {
            say!("{note}");
        }
    }
    Ok(())
}
