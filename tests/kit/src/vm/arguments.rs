//! The machine room's blueprint: what a VM consists of, and the QEMU command line that says so.
//!
//! In: a [`VmBuilder`]. Out: arguments. It must never start anything.

use super::{Driver, Firmware, Iommu, Memory, VmBuilder};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::path::Path;

/// How a person or a harness is connected to the VM.
pub(super) enum Wiring<'a> {
    /// Sockets below this folder, on which the harness listens.
    Sockets(&'a Path, &'a Path),
    /// Console and monitor on the terminal.
    Terminal,
}

/// The whole command line after the program's name.
pub(super) fn arguments(builder: &VmBuilder, wiring: &Wiring<'_>) -> Result<Vec<String>> {
    let mut list: Vec<String> = Vec::new();
    let mut add = |words: &[&str]| list.extend(words.iter().map(|word| (*word).to_owned()));
    add(&builder.tools.accelerator.arguments());
    add(&["-name", &builder.name, "-nodefaults", "-display", "none"]);
    add(&[
        "-smp",
        &builder.processors.to_string(),
        "-m",
        &format!("{}M", builder.memory_mib),
    ]);
    let machine = match memory_object(builder, wiring)? {
        Some(object) => {
            add(&["-object", &object.to_string()]);
            "q35,memory-backend=ram"
        }
        None => "q35",
    };
    add(&["-M", machine]);
    if let Some(uuid) = &builder.uuid {
        add(&["-uuid", uuid]);
    }
    if builder.no_reboot {
        add(&["-no-reboot"]);
    }
    if builder.paused {
        add(&["-S"]);
    }
    match builder.iommu {
        Iommu::None => {}
        // Without caching-mode QEMU ends at guest boot: it must see the guest's maps.
        Iommu::Intel => add(&["-device", "intel-iommu,caching-mode=on"]),
        Iommu::Virtio => add(&["-device", "virtio-iommu-pci"]),
    }
    match wiring {
        Wiring::Terminal => add(&["-serial", "mon:stdio"]),
        Wiring::Sockets(folder, console) => {
            let socket = |name: &str| folder.join(name).display().to_string();
            add(&["-qmp", &format!("unix:{}", socket("qmp"))]);
            let log = console.display();
            add(&[
                "-chardev",
                &format!("socket,id=console,path={},logfile={log}", socket("console")),
            ]);
            add(&["-serial", "chardev:console"]);
            if builder.firmware == Firmware::Kernel {
                add(&["-device", "virtio-serial-pci"]);
                for number in 0..builder.channels {
                    let path = socket(&format!("channel.{number}"));
                    add(&["-chardev", &format!("socket,id=channel{number},path={path}")]);
                    let port = format!("virtserialport,chardev=channel{number},name=vmgmt.channel.{number}");
                    add(&["-device", &port]);
                }
            }
        }
    }
    match builder.firmware {
        Firmware::Kernel => {
            let images = &builder.tools.images;
            add(&[
                "-kernel",
                utf8(&images.kernel)?,
                "-initrd",
                utf8(&images.initramfs)?,
            ]);
            add(&["-append", &kernel_line(builder, wiring)]);
        }
        Firmware::Ovmf => {
            let (code, variables) = builder
                .tools
                .qemu
                .ovmf
                .as_ref()
                .context("no OVMF firmware beside this QEMU")?;
            // Variables are lost at the end: each VM starts from the same ones.
            for (path, access) in [(code, "readonly=on"), (variables, "snapshot=on")] {
                let path = utf8(path)?;
                add(&["-drive", &format!("if=pflash,format=raw,file={path},{access}")]);
            }
        }
    }
    for number in 0..builder.ports {
        // An I/O window as well: a root port has none by default, and the device has an I/O BAR.
        let place = format!("id=port{number},chassis={},slot={number}", number + 1);
        add(&[
            "-device",
            &format!("pcie-root-port,{place},io-reserve=4096,mem-reserve=2M"),
        ]);
    }
    for device in &builder.devices {
        add(&["-device", &device.to_string()]);
    }
    add(&builder.extra.iter().map(String::as_str).collect::<Vec<_>>());
    Ok(list)
}

fn utf8(path: &Path) -> Result<&str> {
    path.to_str()
        .with_context(|| format!("{} is not UTF-8", path.display()))
}

/// The object that holds the guest's memory; none for QEMU's own.
fn memory_object(builder: &VmBuilder, wiring: &Wiring<'_>) -> Result<Option<Value>> {
    let size = u64::from(builder.memory_mib) << 20;
    Ok(match &builder.memory {
        Memory::Plain => None,
        Memory::Shared => {
            Some(json!({ "qom-type": "memory-backend-memfd", "id": "ram", "size": size, "share": true }))
        }
        Memory::Private => {
            Some(json!({ "qom-type": "memory-backend-memfd", "id": "ram", "size": size, "share": false }))
        }
        Memory::HugePages => Some(json!({
            "qom-type": "memory-backend-memfd", "id": "ram", "size": size, "share": true, "hugetlb": true,
        })),
        Memory::File => {
            let folder = match wiring {
                Wiring::Sockets(folder, _) => folder.to_path_buf(),
                Wiring::Terminal => std::env::temp_dir(),
            };
            let path = folder.join("ram");
            let path = utf8(&path)?;
            Some(json!({
                "qom-type": "memory-backend-file", "id": "ram", "size": size, "share": true, "mem-path": path,
            }))
        }
    })
}

/// What the kernel and our init are told.
fn kernel_line(builder: &VmBuilder, wiring: &Wiring<'_>) -> String {
    let mut line = String::from(
        // loglevel=5: warnings too, so that the console is the evidence that `complaints` judges.
        // no_timer_check: on a loaded host an emulated timer can miss the kernel's test of it, which then panics.
        "console=ttyS0 quiet loglevel=5 panic=-1 mitigations=off nokaslr random.trust_cpu=on no_timer_check",
    );
    if builder.iommu == Iommu::Intel {
        line.push_str(" intel_iommu=on");
    }
    let driver = match builder.driver {
        Driver::Uio => "uio",
        Driver::Vfio => "vfio",
        Driver::None => "none",
    };
    line.push_str(&format!(" vmgmt.driver={driver} vmgmt.hostname={}", builder.name));
    line.push_str(&format!(" vmgmt.hugepages={}", builder.guest_huge_pages));
    if matches!(wiring, Wiring::Terminal) {
        line.push_str(" vmgmt.shell=1");
    }
    for word in &builder.kernel_words {
        line.push(' ');
        line.push_str(word);
    }
    line
}

/// The JSON form of one management device: the only form that takes a socket.
pub(super) fn device(socket: &Path, id: &str) -> Value {
    json!({ "driver": "vfio-user-pci", "id": id, "socket": { "type": "unix", "path": socket } })
}
