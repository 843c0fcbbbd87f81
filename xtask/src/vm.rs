//! The caretaker's show room: one VM on the terminal.
//!
//! In: sockets of management devices. Out: QEMU in this terminal. It must never start vmgmtd: whoever wants a device has one running.

use anyhow::{Result, ensure};
use clap::{Args, ValueEnum};
use std::{os::unix::process::CommandExt, path::PathBuf};
use vmgmt_testkit::{
    setup::{self, Image, Wanted},
    vm::{Driver, Iommu, Memory, VmBuilder},
};

#[derive(Args)]
pub struct Options {
    /// Socket of a running vmgmtd; more than once for more devices. Without one the VM has no management device.
    #[arg(long)]
    socket: Vec<PathBuf>,
    /// The VM's and the guest's name.
    #[arg(long, default_value = "guest")]
    name: String,
    /// Memory in MiB; 256, or 768 with --large.
    #[arg(long)]
    memory: Option<u32>,
    /// The driver that the guest gives to the device.
    #[arg(long, value_enum, default_value_t = DriverChoice::Uio)]
    driver: DriverChoice,
    /// The virtual IOMMU; vfio wants one.
    #[arg(long, value_enum)]
    iommu: Option<IommuChoice>,
    /// No shared memory: the device reaches it by messages only.
    #[arg(long)]
    plain_memory: bool,
    /// The image with git, GNU tar and dropbear.
    #[arg(long)]
    large: bool,
    /// Print the QEMU command line and end.
    #[arg(long)]
    dry_run: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum DriverChoice {
    Uio,
    Vfio,
    None,
}

#[derive(Clone, Copy, ValueEnum)]
enum IommuChoice {
    None,
    Intel,
    Virtio,
}

/// Becomes QEMU.
pub fn vm(options: &Options) -> Result<()> {
    let image = if options.large { Image::Large } else { Image::Small };
    let tools = setup::prepare(Wanted { image, install: true })?;
    let mut builder = VmBuilder::new(&tools, &options.name);
    let driver = match options.driver {
        DriverChoice::Uio => Driver::Uio,
        DriverChoice::Vfio => Driver::Vfio,
        DriverChoice::None => Driver::None,
    };
    let iommu = match (options.iommu, driver) {
        (Some(IommuChoice::None), _) => Iommu::None,
        (Some(IommuChoice::Virtio), _) => Iommu::Virtio,
        (Some(IommuChoice::Intel), _) | (None, Driver::Vfio) => Iommu::Intel,
        (None, _) => Iommu::None,
    };
    builder = builder.driver(driver).iommu(iommu);
    if let Some(size) = options.memory {
        builder = builder.memory_mib(size);
    }
    if options.plain_memory {
        builder = builder.memory(Memory::Plain);
    }
    for (index, socket) in options.socket.iter().enumerate() {
        ensure!(
            socket.exists() || options.dry_run,
            "no socket {}: start vmgmtd first, then give the path of one of its VM sockets",
            socket.display()
        );
        builder = builder.device(socket, &format!("mgmt{index}"));
    }
    let mut command = builder.interactive()?;
    if options.dry_run {
        println!("{command:?}");
        return Ok(());
    }
    println!("QEMU's escape is Ctrl-A; Ctrl-A X ends the VM.");
    Err(command.exec().into())
}
